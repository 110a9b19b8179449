"""Rendered words: inside the picture or an error, controls of the same size, nothing by chance."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmhooks.data.synthetic import words
from mmhooks.errors import MMHooksError

text = st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=8)


@settings(max_examples=40, deadline=None)
@given(text=text, font=st.sampled_from(words.DEJAVU), width=st.integers(24, 60))
def test_the_largest_size_fits_and_the_next_does_not(text: str, font: str, width: int) -> None:
    size = words.largest_size(text, font, width, 20)
    tall, wide = words.ink_of(text, font, size).shape
    assert tall <= 20 and wide <= width
    taller, wider = words.ink_of(text, font, size + 1).shape
    assert taller > 20 or wider > width or size >= 63.5


@settings(max_examples=40, deadline=None)
@given(
    text=text,
    x=st.floats(0.0, 1.0),
    y=st.floats(0.0, 1.0),
    plate=st.booleans(),
    angle=st.sampled_from([0.0, 8.0]),
)
def test_a_word_changes_its_box_only_or_says_that_it_does_not_fit(text, x, y, plate, angle) -> None:
    how = words.TextStyle("DejaVuSans", 12.0, (x, y), plate=(1.0, 1.0, 0.0) if plate else None, angle=angle)
    picture = torch.full((3, 64, 64), 0.5)
    before = picture.clone()
    try:
        top, left, tall, wide = words.box_of(text, how, 64, 64)
    except MMHooksError as error:
        assert "does not fit" in str(error)
        with pytest.raises(MMHooksError, match="does not fit"):
            words.write(picture, text, how)
        return
    for made in (words.write(picture, text, how), words.blank_plate(picture, text, how),
                 words.noise_patch(picture, text, how)):  # fmt: skip
        changed = (made != picture).any(0)
        assert changed.any()
        changed[top : top + tall, left : left + wide] = False
        assert not changed.any()
    assert torch.equal(picture, before)


def test_opacity_is_a_blend() -> None:
    picture = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    full, half = (words.write(picture, "fox", words.TextStyle("DejaVuSans", plate=words.WHITE, opacity=o))
                  for o in (1.0, 0.5))  # fmt: skip
    box = words.box_of("fox", words.TextStyle("DejaVuSans"), 64, 64)
    corner = (slice(None), box[0], box[1])  # plate without ink
    assert torch.allclose(half[corner], (picture[corner] + full[corner]) / 2)


def test_ink_handed_out_is_a_copy() -> None:
    first = words.ink_of("fox", "DejaVuSans", 16.0)
    expected = first.clone()
    first.zero_()
    assert torch.equal(words.ink_of("fox", "DejaVuSans", 16.0), expected)


def test_noise_is_seeded() -> None:
    picture, how = torch.ones(3, 64, 64), words.TextStyle("DejaVuSans")
    one, again, other = (words.noise_patch(picture, "fox", how, seed=s) for s in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


@given(word=text, seed=st.integers(0, 100))
def test_nonsense_has_the_length_and_the_vowels_of_the_word_and_is_not_known(word: str, seed: int) -> None:
    known = {word, "fox", "box"}
    made = words.nonsense(word, random.Random(seed), known=known)
    assert made not in known and len(made) == len(word)
    assert [c in "aeiou" for c in made] == [c in "aeiou" for c in word]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: words.font_file("Comic"), "no font 'Comic'.*DejaVuSans"),
        (lambda: words.ink_of(" ", "DejaVuSans", 12.0), "no ink"),
        (lambda: words.largest_size("hippopotamus" * 4, "DejaVuSans", 20, 20), "does not fit into 20 x 20"),
        (lambda: words.add_strip(torch.ones(3, 8, 8), 1.0), "between 0 and 1"),
        (lambda: words.nonsense("a", random.Random(0), known=set("aeiou")), "no pseudo-word"),
    ],
)
def test_what_cannot_be_done_is_said(call, says: str) -> None:
    with pytest.raises(MMHooksError, match=says):
        call()

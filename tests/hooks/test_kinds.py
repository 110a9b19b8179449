"""Kinds of tokens, by hand: two rows, padding behind the second, one new token in the first."""

from __future__ import annotations

import re

import pytest
import torch

import mmhooks as mm
from mmhooks.errors import MMHooksError, ShapeMismatch
from mmhooks.hooks.kinds import TokenSequence, running, tokens_of_kind

CPU = torch.device("cpu")
HELD = {
    "image": ["01100", "01100"],
    "text": ["10011", "10010"],
    "prompt": ["11110", "11110"],
    "generated": ["00001", "00000"],
    "last": ["00001", "00010"],
}


def sequence(*, image=5, generates=True):
    ids = torch.tensor([[1, 5, 5, 7, 8], [1, 5, 5, 9, 0]])
    return TokenSequence(ids, ids != 0, image, 4, generates)


@pytest.mark.parametrize("length", [5, 2, 1])
@pytest.mark.parametrize("kind", HELD)
def test_a_module_sees_the_end_of_the_sequence(kind, length):
    want = torch.tensor([[c == "1" for c in row] for row in HELD[kind]])[:, -length:]
    with running(sequence()):
        found = tokens_of_kind(kind, length, CPU, "lm.tokens")
    assert torch.equal(found.mask, want) and found.any == bool(want.any())


@pytest.mark.parametrize(("number", "want"), [(0, ["010000", "011000"]), (1, ["000110", "000010"])])
def test_the_images_of_a_row_are_its_unbroken_runs(number, want):
    ids = torch.tensor([[1, 5, 7, 5, 5, 8], [1, 5, 5, 7, 5, 9]])
    held = TokenSequence(ids, ids != 0, 5, 6, generates=True)
    whole = torch.tensor([[c == "1" for c in row] for row in want])
    for length in (6, 3):
        assert torch.equal(held.find(("image", number), length, CPU, "lm.tokens").mask, whole[:, -length:])
    with running(held):
        kept = mm.Zero(tokens=("image", number))(torch.ones(2, 6, 3)).any(-1)
    assert torch.equal(kept, ~whole)
    with pytest.raises(
        ShapeMismatch, match=r"tokens=\('image', 2\) at .*: the batch holds none of that kind"
    ):
        held.find(("image", 2), 6, CPU, "lm.tokens")


def test_what_is_not_there_is_told():
    says = "the batch holds none of that kind: 0 image, 9 text, 8 prompt, 1 generated tokens in 2 rows"
    with running(sequence(image=6)), pytest.raises(ShapeMismatch, match=says):
        tokens_of_kind("image", 1, CPU, "lm.tokens")
    says = "expected one of the kinds of tokens there, image, text, prompt, generated, last"
    with running(sequence()), pytest.raises(ShapeMismatch, match=says):
        tokens_of_kind("patch", 5, CPU, "lm.tokens")
    with (
        running(sequence()),
        pytest.raises(ShapeMismatch, match="at most the 5 tokens that this call was given, got 6"),
    ):
        tokens_of_kind("image", 6, CPU, "lm.blocks.0.attn.k")
    with (
        running(sequence()),
        running(None),
        pytest.raises(MMHooksError, match="in the language model of a HookedVLM"),
    ):
        tokens_of_kind("image", 1, CPU, "image.patches")


def test_new_tokens_may_follow_or_not():
    ids = torch.tensor([[1, 5, 7]])
    prompt = TokenSequence(ids, ids != 0, 5, 3, generates=True)
    assert not prompt.find("generated", 3, CPU, "lm.tokens").any
    with pytest.raises(ShapeMismatch, match="'generated'"):
        TokenSequence(ids, ids != 0, 5, 3, generates=False).find("generated", 3, CPU, "lm.tokens")


def test_an_edit_acts_on_the_tokens_of_its_kind():
    edit, value = mm.Zero(tokens="image"), torch.ones(2, 5, 3)
    with running(sequence()):
        assert torch.equal(
            edit(value).any(-1), ~torch.tensor([[c == "1" for c in row] for row in HELD["image"]])
        )
        later = torch.ones(2, 1, 3)
        assert edit(later) is later
    for kind in ("end", ("image", -1), ("text", 0)):
        says = f"one of the kinds image, text, prompt, generated, last, cls, .* got {re.escape(repr(kind))}"
        with pytest.raises(ShapeMismatch, match=says):
            mm.Zero(tokens=kind).chosen_tokens  # noqa: B018

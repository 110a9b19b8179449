"""Splits are a pure function of names: stable, disjoint by concept, blind to skin tone and spelling."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mmhooks.data.splits import SPLITS, concept_key, split_of

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
names = st.text("abcdefghij ", min_size=2, max_size=20).filter(lambda s: concept_key(s) == s.strip() != "")


@given(names, st.sampled_from(TONES), st.sampled_from(["openmoji", "noto"]))
def test_a_skin_tone_never_crosses_a_split(name: str, tone: str, style: str) -> None:
    name = " ".join(name.split())
    assert split_of(style, f"{name}: {tone} skin tone") == split_of(style, name.upper().replace(" ", "_"))


@given(names)
def test_a_held_out_concept_is_held_out_in_every_style(name: str) -> None:
    found = {split_of(style, name) for style in ("openmoji", "noto", "twemoji", "a", "b")}
    assert ("heldout_concepts" in found) == (found == {"heldout_concepts"})
    assert found <= set(SPLITS)


def test_shares_and_some_fixed_cases() -> None:
    found = [split_of("openmoji", f"thing {i}") for i in range(20_000)]
    assert abs(found.count("heldout_concepts") / 20_000 - 0.15) < 0.01
    assert abs(found.count("heldout_pictures") / 20_000 - 0.85 / 12) < 0.01
    assert concept_key("flag: Argentina") == concept_key("flag for argentina") == "argentina"
    assert concept_key("couple with heart: man, man, medium-light skin tone, dark skin tone") == (
        "couple with heart man man"
    )
    assert concept_key("!?") != ""

"""What the heads of mini are trained on: crossed names, and vectors that are computed once."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from embedded.heads import train as train_heads
from safetensors.torch import save_file

from mmhooks.data.splits import split_of


def test_crossed_names_are_made_of_two_names_and_never_held_out() -> None:
    names = ["woman farmer", "red panda", "old house", "fox"]
    rng = random.Random(0)
    for _ in range(300):
        words = train_heads.crossed(names, rng).split()
        cut = [
            (one, two)
            for one, two in itertools.product(names, repeat=2)
            for i in range(1, len(words))
            if words[:i] == one.split()[:i] and words[i:] == two.split()[-len(words[i:]) :]
        ]
        assert cut and split_of("", " ".join(words)) != "heldout_concepts"


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MMHOOKS_CACHE", str(tmp_path / "cache"))
    names = ["red fox", "blue whale", "green tree", "old house", "small boat", "big sun"]
    splits = ("train", "train", "heldout_pictures", "heldout_concepts")
    rows = [
        {"style": "s", "name": names[i % 6], "keywords": ["thing"], "toned": False, "concept": names[i % 6],
         "split": splits[i % 4]}
        for i in range(24)
    ]  # fmt: skip
    folder = tmp_path / "corpus"
    folder.mkdir()
    rgba = torch.randint(
        0, 256, (24, 72, 72, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    save_file({"rgba": rgba}, folder / "rgba.safetensors")
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


def test_vectors_are_unit_aligned_and_read_the_second_time(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = train_heads.vectors("mini", corpus, 0)
    assert [len(x) for x in data[:6]] == [12, 12, 24, 72, 12, 12] and data.seen_concepts == 6
    assert all(torch.allclose(x.norm(dim=1), torch.ones(len(x)), atol=1e-5) for x in data[:6])
    image, text = data.pairs("captions", "names")
    assert torch.equal(image[24:], data.image) and torch.equal(text[24:], data.names)
    assert torch.equal(image[12:24], data.image)
    monkeypatch.setattr(train_heads, "embed", lambda *_: pytest.fail("embedded again"))
    assert torch.equal(train_heads.vectors("mini", corpus, 0).crossed, data.crossed)

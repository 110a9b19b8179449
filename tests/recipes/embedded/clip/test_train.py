"""The training of the embedded models: resumes to the same bits, for mini and mini-declip."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from embedded.clip import train as clip_training
from safetensors.torch import save_file

from mmhooks.data.sources.drawings import Corpus


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    g = torch.Generator().manual_seed(0)
    words = [
        "red fox",
        "blue whale",
        "green tree",
        "old house",
        "left arrow",
        "small boat",
        "big sun",
        "pink cake",
    ]
    splits = ("train", "heldout_pictures", "unseen_style")
    rows = [
        {"style": f"s{i % 2}", "name": words[i % 8], "keywords": ["thing", "drawing"], "toned": False,
         "concept": words[i % 8], "split": splits[i % 3]}
        for i in range(48)
    ]  # fmt: skip
    save_file({"rgba": torch.randint(0, 256, (48, 72, 72, 4), dtype=torch.uint8, generator=g)},
              tmp_path / "rgba.safetensors")  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return Corpus(tmp_path)


def plan(**changes) -> clip_training.Plan:
    base = {"steps": 4, "batch": 6, "warmup": 1, "relational": 0.0, "word_init": False}
    return clip_training.Plan(**(base | changes))


@pytest.mark.parametrize("declip", [False, True])
def test_a_resumed_run_ends_with_the_same_bits(corpus: Corpus, tmp_path: Path, declip: bool) -> None:
    whole = clip_training.Trainer(corpus, plan(declip=declip), tmp_path)
    for _ in range(4):
        whole.run_step()
    first = clip_training.Trainer(corpus, plan(declip=declip), tmp_path)
    for _ in range(2):
        first.run_step()
    first.save()
    again = clip_training.Trainer(corpus, plan(declip=declip), tmp_path)
    again.resume()
    assert again.step == 2
    for _ in range(2):
        again.run_step()
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key
        assert torch.equal(whole.average[key], again.average[key]), key

"""The spurious-cue study: its data, the choice of heads, worst groups, claims, and whole runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

import mmhooks as mm
from mmhooks.errors import DataError
from mmhooks.studies.spurious import accuracy as spurious_accuracy
from mmhooks.studies.spurious import samples as spurious_data
from mmhooks.studies.spurious import study as spurious
from mmhooks.studies.spurious import trials as spurious_trials

from ..written_files import written


def test_heads_are_chosen_and_judged_on_other_animals():
    opened: list[int] = []

    def preprocess(image: Image.Image) -> torch.Tensor:
        opened.append(hash(image.tobytes()))
        return torch.zeros(3, 4, 4)

    found = spurious_data.drawn_split(preprocess, n=64, correlation=0.9, scale=0.5, seed=3)
    assert torch.bincount(found.judge.groups).tolist() == [16, 16, 16, 16]
    assert float(found.shares[[0, 3]].sum()) > 0.7
    assert not set(opened[:64]) & set(opened[64:])


def test_worst_group_and_its_bootstrap():
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 3, 3])
    right = torch.tensor([1, 1, 1, 1, 1, 0, 1, 1]).bool()
    assert spurious_accuracy.worst_group(right, groups) == 0.5
    report = spurious_accuracy.accuracy_estimates(right, groups, torch.tensor([0.5, 0.25, 0.0, 0.25]), seed=0)
    assert report["worst"].value == 0.5 and report["average"].value == pytest.approx(0.875)
    assert list(report["groups"]) == [spurious_data.GROUPS[g] for g in (0, 1, 3)]
    drawn, own = spurious_accuracy.group_draws(torch.stack([right, right]), groups, seed=0)
    assert torch.equal(drawn[0], drawn[1]) and own[0].tolist() == [1, 0.5, 1]  # the same images for both


def test_contrast_finds_the_head_that_the_background_moves():
    animals, places = torch.tensor([0, 0, 1, 1] * 8), torch.tensor([0, 1] * 16)
    outputs = torch.zeros(32, 2, 3, 4)
    outputs[:, 1, 2, 0] = places.float()  # this one carries the background, the next the animal
    outputs[:, 0, 1, 0] = 5 * animals.float()
    texts = torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 0]])
    scenes = spurious_data.Scenes(torch.zeros(32, 3, 4, 4), animals, places)
    assert spurious_trials.by_contrast(outputs, [4, 5], scenes, texts) == [(5, 2)]


def test_text_span_finds_the_head_whose_texts_are_places(tmp_path):
    mini = mm.load("mini")
    pool = tmp_path / "pool.txt"
    pool.write_text("# place\na beach\na forest\n# colour\nred\nblue\n")
    from mmhooks.models.clip.embed_texts import embed_texts

    texts = mm.data.text_pool(str(pool))
    embedded = embed_texts(mini, texts.texts)
    beach, red = embedded[0], embedded[2]
    outputs = 0.01 * torch.randn(40, 1, 2, 256, generator=torch.Generator().manual_seed(0))
    outputs[:, 0, 0] += torch.linspace(-1, 1, 40)[:, None] * red
    outputs[:, 0, 1] += torch.linspace(-1, 1, 40)[:, None] * beach
    named, order, reach = spurious_trials.by_text_span(texts, embedded, outputs, [5], ["place"])
    assert named["5.1"][0] == "a beach" and order[0] == (5, 1) and 0.8 < reach <= 1
    (tmp_path / "plain.txt").write_text("a beach\n")
    with pytest.raises(DataError, match="no kinds"):
        spurious_trials.by_text_span(
            mm.data.text_pool(str(tmp_path / "plain.txt")), embedded[:1], outputs, [5], ["place"]
        )


def test_a_claim_that_does_not_hold_says_so():
    groups = torch.arange(200) % 4
    plain, worse = torch.ones(200).bool(), torch.arange(200) % 3 > 0
    right = {"plain": plain, "TextSpan": worse}
    random = spurious_accuracy.mean_and_range(torch.full((10,), 0.9))
    claims = spurious_accuracy.compare_with_controls("TextSpan", [1], right, groups, random, 0)
    assert [verdict for verdict, _, _ in claims] == ["differs", "differs"]
    assert spurious_accuracy.compare_with_controls("TextSpan", [0], right, groups, random, 0)[0][0] == "open"


@pytest.mark.slow
def test_spurious_on_data_of_ones_own(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {
        "image": [Image.new("RGB", (64, 64), (40 * i, 20, 90)) for i in range(8)],
        "y": [0, 0, 1, 1] * 2, "place": [0, 1] * 4,
    }  # fmt: skip
    features = datasets.Features(
        {"image": datasets.Image(), "y": datasets.Value("int64"), "place": datasets.Value("int64")}
    )
    one = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"validation": one, "test": one}).save_to_disk(str(tmp_path / "d"))
    mini = mm.load("mini")
    names = ("a bird", "a fish")
    found = spurious_data.dataset_split(
        mini.preprocess, str(tmp_path / "d"), label="y", place="place", names=names, limit=8, seed=0
    )
    assert found.judge.pixels.shape == (8, 3, 64, 64) and found.shares.tolist() == [0.25] * 4
    with pytest.raises(DataError, match="no column sky"):
        spurious_data.dataset_split(
            mini.preprocess, str(tmp_path / "d"), label="y", place="sky", names=names, limit=8, seed=0
        )


@pytest.mark.slow
def test_whole_study_on_another_model(tmp_path: Path) -> None:
    """ViT-B/32 with random weights: no claim, but everything runs and is written."""
    pool = tmp_path / "pool.txt"
    pool.write_text("# place\na beach\na forest\nthe sea\n# colour\nred things\nblue things\n")
    found = spurious.run(
        spurious.Options(
            model="ViT-B-32", limit=8, draws=2, layers=1, batch=8, splits=2, pool=str(pool), out=tmp_path / "p",
            quiet=True,
        )
    )  # fmt: skip
    assert written(found)["n"] == {"choose": 16, "judge": 16}

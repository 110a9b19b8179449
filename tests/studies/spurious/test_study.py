"""The spurious-cue study: its data, the choice of heads, worst groups, claims, and whole runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import mmhooks as mm
from mmhooks.data.sources.text_pools import TextPool
from mmhooks.errors import DataError
from mmhooks.studies.spurious import accuracy as spurious_accuracy
from mmhooks.studies.spurious import samples as spurious_data
from mmhooks.studies.spurious import study as spurious
from mmhooks.studies.spurious import trials as spurious_trials
from mmhooks.studies.spurious.direct import DirectScores, direct_scores

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
    species = torch.tensor([5, 5, 6, 6, 5, 6, 8, 9])
    right = torch.tensor([1, 1, 1, 1, 1, 0, 1, 1]).bool()
    assert spurious_accuracy.worst_group(right, groups) == 0.5
    report = spurious_accuracy.accuracy_estimates(
        right, groups, species, torch.tensor([0.5, 0.25, 0.0, 0.25]), seed=0
    )
    assert report["worst"].value == 0.5 and report["average"].value == pytest.approx(0.875)
    assert report["test_average"].value == pytest.approx(7 / 8)  # as the evaluated images are shared out
    assert list(report["groups"]) == [spurious_data.GROUPS[g] for g in (0, 1, 3)]
    # Land animals are two species: the second group's only error is of one of them.
    assert (report["groups"]["land animal, water"].low, report["groups"]["land animal, water"].high) == (0, 1)


def test_species_are_resampled_as_wholes():
    groups, species = torch.tensor([0, 1, 0, 1, 3]), torch.tensor([4, 4, 7, 7, 2])
    weights = spurious_accuracy.species_draws(groups, species, seed=0, draws=50)
    assert torch.equal(weights[:, 0], weights[:, 1]) and torch.equal(weights[:, 2], weights[:, 3])
    assert (weights[:, 0] + weights[:, 2] == 2).all() and (weights[:, 4] == 1).all()
    right = torch.tensor([[True, False, False, True, True]])
    found = spurious_accuracy.group_accuracies(right, groups, weights)
    for w, row in zip(weights, found[:, 0], strict=True):
        assert float(row[0]) == pytest.approx(float(w[0] / (w[0] + w[2])))


def test_direct_scores_are_those_of_the_direct_ablation():
    """The closed form against the ablation of the embeddings themselves."""
    from mmhooks.analysis.interventions.mean_ablation import Parts, ablate_direct

    mini = mm.load("mini")
    generator = torch.Generator().manual_seed(0)
    pixels, texts = torch.randn(6, 3, 64, 64, generator=generator), torch.randn(2, 256, generator=generator)
    animals = torch.tensor([0, 1, 0, 1, 0, 1])
    scenes = spurious_data.Scenes(pixels, animals, animals, animals)
    full, scores, outputs = direct_scores(mini, scenes, texts, [4, 5], batch=4, progress=False)
    assert outputs.shape == (6, 2, 6, 256)
    direct = DirectScores(full, scores, scores.mean(0), (4, 5), animals)
    order = [(5, 1), (4, 0), (5, 3)]
    parts = mm.decompose(mini, pixels, normalize=True)
    means = mm.decompose(mini, [pixels], normalize=True)
    for k in range(4):
        without = ablate_direct(parts, means, Parts("some", heads=tuple(order[:k])))
        expected = (without @ texts.T).argmax(1) == animals
        assert torch.equal(direct.right(order[:k]), expected)
        assert torch.equal(direct.prefixes(order)[k], expected)


def test_contrast_finds_the_head_that_the_background_moves():
    animals, places = torch.tensor([0, 0, 1, 1] * 8), torch.tensor([0, 1] * 16)
    outputs = torch.zeros(32, 2, 3, 4)
    outputs[:, 1, 2, 0] = places.float()  # this one carries the background, the next the animal
    outputs[:, 0, 1, 0] = 5 * animals.float()
    texts = torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 0]])
    scenes = spurious_data.Scenes(torch.zeros(32, 3, 4, 4), animals, places, torch.arange(32))
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
    named, order, reach = spurious_trials.by_text_span(texts, embedded, outputs, [5], ["place"], "unit")
    assert named["5.1"][0] == "a beach" and order[0] == (5, 1) and 0.8 < reach <= 1
    (tmp_path / "plain.txt").write_text("a beach\n")
    with pytest.raises(DataError, match="no kinds"):
        spurious_trials.by_text_span(
            mm.data.text_pool(str(tmp_path / "plain.txt")), embedded[:1], outputs, [5], ["place"], "unit"
        )
    # The paper's way weighs a text by its length: a long one is chosen whose direction the head hardly moves along.
    long = torch.cat([embedded, 60 * embedded[3:4]])
    pool = TextPool("pool", (*texts.texts, "blue!"), kinds=(*texts.kinds, "colour"))
    first = {
        way: spurious_trials.by_text_span(pool, long, outputs, [5], ["place"], way)[0]["5.1"][0]
        for way in ("unit", "paper")
    }
    assert first == {"unit": "a beach", "paper": "blue!"}


def test_primaries_are_decided_both_ways():
    """A planted gain of the worst group is shown, a planted loss is the opposite, and no difference is undecided."""
    generator = torch.Generator().manual_seed(0)
    groups, species = torch.arange(480) % 4, torch.arange(480) // 4 % 40
    species = species + 100 * (groups // 2)

    def correct(share: float) -> torch.Tensor:
        return torch.rand(480, generator=generator) < torch.where(groups == 1, share, 0.9)

    def decide(share: float) -> list[str]:
        right = {"plain": correct(0.4), "TextSpan": correct(share), "contrast": correct(share)}
        random = [[correct(0.4) for _ in range(200)]]
        found = spurious_accuracy.decided(right, random, groups, species, seed=0)
        assert [claim for _, claim, _ in spurious_accuracy.claims_of(found)] == list(found)
        assert all(d.detectable > 0 for d in found.values())
        return [d.outcome for d in found.values()]

    assert decide(0.75) == ["shown"] * 4
    assert decide(0.1) == ["opposite"] * 4
    assert set(decide(0.4)) == {"undecided"}


@pytest.mark.slow
def test_spurious_on_data_of_ones_own(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {
        "image": [Image.new("RGB", (64, 64), (40 * i, 20, 90)) for i in range(8)],
        "y": [0, 0, 1, 1] * 2, "place": [0, 1] * 4,
        "file": [f"{i // 2:03}.Bird_{i // 2}/{i}.jpg" for i in range(8)],
    }  # fmt: skip
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "y": datasets.Value("int64"),
            "place": datasets.Value("int64"),
            "file": datasets.Value("string"),
        }
    )
    one = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"validation": one, "test": one}).save_to_disk(str(tmp_path / "d"))
    mini = mm.load("mini")
    names = ("a bird", "a fish")
    found = spurious_data.dataset_split(
        mini.preprocess,
        str(tmp_path / "d"),
        label="y",
        place="place",
        species="file",
        names=names,
        limit=8,
        seed=0,
    )
    assert found.judge.pixels.shape == (8, 3, 64, 64) and found.shares.tolist() == [0.25] * 4
    assert found.judge.species.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]  # the folder of the file
    for column in ({"place": "sky", "species": None}, {"place": "place", "species": "sky"}):
        with pytest.raises(DataError, match="no column sky"):
            spurious_data.dataset_split(
                mini.preprocess, str(tmp_path / "d"), label="y", names=names, limit=8, seed=0, **column
            )


@pytest.mark.slow
def test_whole_study_on_another_model(tmp_path: Path) -> None:
    """ViT-B/32 with random weights: no claim, but everything runs and is written."""
    pool = tmp_path / "pool.txt"
    pool.write_text("# place\na beach\na forest\nthe sea\n# colour\nred things\nblue things\n")
    found = spurious.run(
        spurious.Options(
            model="ViT-B-32", limit=8, draws=2, direct_draws=20, layers=1, batch=8, splits=2, pool=str(pool), out=tmp_path / "p",
            quiet=True,
        )
    )  # fmt: skip
    n = written(found)["n"]
    assert (n["choose"], n["judge"]) == (16, 16) and len(found["decisions"]) == 4


def test_the_papers_settings_run_and_are_accounted_for(tmp_path):
    options = spurious.Options.of_paper(
        model="mini", pretrained="", limit=32, draws=2, direct_draws=20, quiet=True, out=tmp_path
    )
    found = spurious.run(options)
    assert found["settings"]["splits"] == 1 and found["settings"]["kinds"] == "place"
    status = {s["option"]: s["status"] for s in found["paper"]["settings"] if s["option"]}
    assert status["splits"] == "the paper's" and status["kinds"] == "the paper's in part"
    assert status["data"] == "not had" and status["model"] == "overridden"
    tables = (tmp_path / "tables.md").read_text()
    assert "Waterbirds (Sagawa" in tables
    assert not re.search(r"\{\w+(\.\w+)*\}", tables)  # a field of a text that was never filled in

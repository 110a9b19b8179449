"""The generation recipe: its measures by hand, its verdicts, and one run end to end on mini-sd."""

from __future__ import annotations

import json
from pathlib import Path

import generation
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import mmhooks as mm
from mmhooks.errors import MMHooksError


class _Pairs:
    texts = ("cat", "dog", "cat", "owl", "not drawn", "sun")

    def __getitem__(self, i: int) -> mm.data.Pair:
        return mm.data.Pair(id=str(i), image=Image.new("RGB", (8, 8), (i, 0, 0)), text=self.texts[i])


def test_cases_are_of_different_texts_that_the_pipeline_draws() -> None:
    cases = generation.choose_cases(_Pairs(), {"cat", "dog", "owl", "sun"}, 2, "a {}", seed=0)
    said = [c.prompt for c in cases] + [c.reference for c in cases]
    assert sorted(said) == ["a cat", "a dog", "a owl", "a sun"]
    for case in cases:
        assert _Pairs.texts[case.picture.getpixel((0, 0))[0]] == case.reference.removeprefix("a ")
    with pytest.raises(MMHooksError, match="3 prompts and references need 6"):
        generation.choose_cases(_Pairs(), None, 3, "{}", seed=0)


def test_groups_are_cut_to_one_size_and_matched() -> None:
    alive = mm.FeatureSet(range(50), 60)
    groups = {"ImgD": mm.FeatureSet(range(5), 60), "TextD": mm.FeatureSet(range(5, 12), 60),
              "CrossD": mm.FeatureSet(range(12, 50), 60)}  # fmt: skip
    cut = generation.same_size(groups, alive, whole=False, seed=0)
    assert {len(g) for g in cut.values()} == {5}
    assert all(set(cut[k]) <= set(groups[k]) for k in groups) and set(cut["random"]) <= set(alive)
    whole = generation.same_size(groups, alive, whole=True, seed=0)
    assert [len(whole[g]) for g in generation.GROUPS] == [5, 7, 38, 7]
    with pytest.raises(MMHooksError, match="no feature in ImgD"):
        generation.same_size(groups | {"ImgD": mm.FeatureSet([], 60)}, alive, whole=False, seed=0)


def test_judge_on_pictures_whose_answer_is_known() -> None:
    g = torch.Generator().manual_seed(0)
    prompt, reference = torch.rand(2, 3, 64, 64, generator=g), torch.rand(2, 3, 64, 64, generator=g)
    reference[:, :, :32] = 0
    prompt[:, 0] = 1
    judge = generation.Judge("efficientnet-lite0", prompt, reference)
    still, moved = judge(prompt, prompt), judge(reference, prompt)
    assert torch.allclose(still["shift"], torch.zeros(2)) and still["distortion"].abs().max() < 1e-4
    assert (moved["shift"] > 0.5).all() and (moved["distortion"] > 0.3).all()
    assert torch.allclose(moved["quality"], torch.ones(2), atol=1e-3)
    assert (judge((prompt + reference) / 2, prompt)["quality"] < 0.999).all()


def curves(shift: dict[str, float], distortion: dict[str, float]) -> dict[str, dict[str, torch.Tensor]]:
    noise = 0.01 * torch.randn(30, generator=torch.Generator().manual_seed(0))
    return {
        g: {"shift": torch.stack([0 * noise, shift[g] + noise * i]), "quality": torch.ones(2, 30),
            "distortion": torch.stack([0 * noise, distortion[g] - noise * i])}
        for i, g in enumerate(generation.GROUPS, 1)
    }  # fmt: skip


def test_verdicts_follow_the_papers_claim() -> None:
    as_paper = generation.verdicts(
        curves(
            {"ImgD": 0.1, "TextD": 0.6, "CrossD": 0.1, "random": 0.1},
            {"ImgD": 0.7, "TextD": 0.1, "CrossD": 0.6, "random": 0.3},
        )
    )
    assert all(v["holds"] for v in as_paper.values())
    other = generation.verdicts(
        curves(
            {"ImgD": 0.1, "TextD": 0.1, "CrossD": 0.1, "random": 0.4},
            {"ImgD": 0.1, "TextD": 0.1, "CrossD": 0.1, "random": 0.3},
        )
    )
    assert not any(v["holds"] for v in other.values())
    assert "does not hold" in other["TextD"]["sentence"]


@pytest.mark.slow
def test_end_to_end(tmp_path: Path) -> None:
    options = ["--limit", "1500", "--pairs", "3", "--seeds", "1", "--strength", "0.9", "--steps", "3", "--epochs", "2",
               "--quiet", "--out", str(tmp_path)]  # fmt: skip
    done = CliRunner().invoke(generation.app, options)
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "results.json").read_text())
    assert "256 dimensions" in results["impossible"]["naive"]
    for space, found in results["modes"]["projected"].items():
        assert set(found["curves"]) == set(generation.GROUPS)
        assert len(set(found["edited"].values())) == 1
        for by in found["curves"].values():
            assert by["shift"][0]["value"] == 0 and by["distortion"][0]["value"] == 0
        assert max(by["distortion"][1]["value"] for by in found["curves"].values()) > 0.005
        assert (tmp_path / f"grid-projected-{space.lower()}.png").stat().st_size > 1000
    page = (tmp_path / "index.html").read_text()
    assert all(v["sentence"] in (tmp_path / "tables.md").read_text() for v in found["verdicts"].values())
    assert "Interpolation by modality" in page


def test_too_many_prompts_are_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        generation.app, ["--limit", "20", "--pairs", "15", "--quiet", "--out", str(tmp_path / "x")]
    )
    assert done.exit_code == 1
    assert "15 prompts and references need 30" in done.output
    assert not (tmp_path / "x").exists()

"""The generation study: its measures by hand, its verdicts, and one run end to end on mini-sd."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import mmhooks as mm
from mmhooks.analysis.measures.groups import BY_RANK, BY_SIGMA
from mmhooks.errors import MMHooksError
from mmhooks.models.embedders import image_embedder
from mmhooks.studies.generation import interpolation as study
from mmhooks.studies.generation import settings as generation_settings
from mmhooks.studies.generation import study as generation

sys.path.append(str(Path(__file__).parents[2] / "models"))


class _Pairs:
    texts = ("cat", "dog", "cat", "owl", "not drawn", "sun")

    def __getitem__(self, i: int) -> mm.data.Pair:
        return mm.data.Pair(id=str(i), image=Image.new("RGB", (8, 8), (i, 0, 0)), text=self.texts[i])


def test_cases_are_of_different_texts_that_the_pipeline_draws() -> None:
    cases = generation_settings.choose_cases(_Pairs(), {"cat", "dog", "owl", "sun"}, 2, "a {}", seed=0)
    texts = [c.prompt for c in cases] + [c.reference for c in cases]
    assert sorted(texts) == ["a cat", "a dog", "a owl", "a sun"]
    for case in cases:
        assert _Pairs.texts[case.image.getpixel((0, 0))[0]] == case.reference.removeprefix("a ")
    with pytest.raises(MMHooksError, match="3 prompts and references need 6"):
        generation_settings.choose_cases(_Pairs(), None, 3, "{}", seed=0)


def test_groups_are_cut_to_one_size_and_matched() -> None:
    alive = mm.FeatureSet(range(50), 60)
    groups = {"ImgD": mm.FeatureSet(range(5), 60), "TextD": mm.FeatureSet(range(5, 12), 60),
              "CrossD": mm.FeatureSet(range(12, 50), 60)}  # fmt: skip
    cut = generation_settings.same_size(groups, alive, whole=False, seed=0)
    assert {len(g) for g in cut.values()} == {5}
    assert all(set(cut[k]) <= set(groups[k]) for k in groups) and set(cut["random"]) <= set(alive)
    whole = generation_settings.same_size(groups, alive, whole=True, seed=0)
    assert [len(whole[g]) for g in study.GROUPS] == [5, 7, 38, 7]


def test_judge_on_images_whose_answer_is_known() -> None:
    g = torch.Generator().manual_seed(0)
    prompt, reference = torch.rand(2, 3, 64, 64, generator=g), torch.rand(2, 3, 64, 64, generator=g)
    reference[:, :, :32] = 0
    prompt[:, 0] = 1
    judge = study.Judge(image_embedder(progress=False), prompt, reference)
    unedited_quality, moved = judge(prompt, prompt), judge(reference, prompt)
    assert (
        torch.allclose(unedited_quality["shift"], torch.zeros(2))
        and unedited_quality["distortion"].abs().max() < 1e-4
    )
    assert (moved["shift"] > 0.5).all() and (moved["distortion"] > 0.3).all()
    grey = judge(torch.full_like(prompt, 0.5), prompt)  # an image that is merely destroyed
    assert (moved["gain"] > grey["gain"] + 0.2).all() and (moved["gain"] < moved["shift"]).all()
    assert torch.allclose(moved["quality"], torch.ones(2), atol=1e-3)
    assert (judge((prompt + reference) / 2, prompt)["quality"] < 0.999).all()


def curves(shift: dict[str, float], distortion: dict[str, float]) -> dict[str, dict[str, torch.Tensor]]:
    noise = 0.01 * torch.randn(30, generator=torch.Generator().manual_seed(0))
    return {
        g: {"shift": torch.stack([0 * noise, shift[g] + noise * i]), "quality": torch.ones(2, 30),
            "gain": torch.zeros(2, 30), "distortion": torch.stack([0 * noise, distortion[g] - noise * i])}
        for i, g in enumerate(study.GROUPS, 1)
    }  # fmt: skip


def test_verdicts_follow_the_papers_claim() -> None:
    as_paper = study.verdicts(
        curves(
            {"ImgD": 0.1, "TextD": 0.6, "CrossD": 0.1, "random": 0.1},
            {"ImgD": 0.7, "TextD": 0.1, "CrossD": 0.6, "random": 0.3},
        )
    )
    assert all(v["holds"] for v in as_paper.values())
    other = study.verdicts(
        curves(
            {"ImgD": 0.1, "TextD": 0.1, "CrossD": 0.1, "random": 0.4},
            {"ImgD": 0.1, "TextD": 0.1, "CrossD": 0.1, "random": 0.3},
        )
    )
    assert not any(v["holds"] for v in other.values())
    assert "does not hold" in other["TextD"]["sentence"]


@pytest.mark.slow
def test_end_to_end(tmp_path: Path) -> None:
    done = generation.run(
        generation.Options(
            limit=1500, pairs=3, seeds=1, strength=[0.9], steps=3, epochs=2, quiet=True, out=tmp_path
        )
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert results == done.found and set(done.paths) == set(tmp_path.iterdir())
    assert "256 dimensions" in results["impossible"]["naive"]
    for space, found in results["modes"]["projected"].items():
        assert set(found["curves"]) == set(study.GROUPS)
        assert len(set(found["edited"].values())) == 1 and found["rule"] in (BY_SIGMA, BY_RANK)
        for by in found["curves"].values():
            assert by["shift"][0]["value"] == 0 and by["distortion"][0]["value"] == 0
        assert max(by["distortion"][1]["value"] for by in found["curves"].values()) > 0.005
        assert (tmp_path / f"grid-projected-{space.lower()}.png").stat().st_size > 1000
    page = (tmp_path / "index.html").read_text()
    assert all(v["sentence"] in (tmp_path / "tables.md").read_text() for v in found["verdicts"].values())
    assert "Interpolation by modality" in page


def tiny(kind: str, encoder: str, folder: Path) -> list[str]:
    """A tiny pipeline with the CLIP of one of its text encoders, as options of the recipe."""
    from pipelines import build, matching_clip

    pipe = build(kind)
    if kind == "unclip":  # as built, the prior gives zeros, and the U-Net hardly hears the image embedding
        pipe.prior.clip_std.data.fill_(1.0)
        pipe.unet.class_embedding.linear_1.weight.data *= 20
    pipe.save_pretrained(folder / "pipeline")
    model = matching_clip(getattr(pipe, encoder), folder / "clip")
    return ["--pipeline", str(folder / "pipeline"), "--model", model, "--limit", "240", "--pairs", "3", "--seeds", "1",
            "--strength", "0.5", "--strength", "0.9", "--steps", "2", "--epochs", "2", "--quiet",
            "--out", str(folder / "out")]  # fmt: skip


def run(options: list[str]) -> dict:
    done = CliRunner().invoke(generation.app, options)
    assert done.exit_code == 0, done.output
    return json.loads((Path(options[-1]) / "results.json").read_text())


def check_modes(results: dict, modes: set[str], out: Path) -> None:
    """Each mode has both spaces, edits move images, and the printed results equal the written ones."""
    assert set(results["modes"]) == modes
    written = (out / "tables.md").read_text()
    for mode in modes:
        assert set(results["modes"][mode]) == {"dimensions", "SAE"}
        for space, found in results["modes"][mode].items():
            assert found["rule"] in (BY_SIGMA, BY_RANK) and f"Groups by {found['rule']}" in written
            assert 0 <= found["shown"] < 3 and min(found["edited"].values()) > 0
            moved = [by["distortion"][-1]["value"] for by in found["curves"].values()]
            assert max(moved) > 1e-3 and all(by["gain"][0]["value"] == 0 for by in found["curves"].values())
            for kind in ("grid", "curves"):
                assert (out / f"{kind}-{mode}-{space.lower()}.png").stat().st_size > 1000


@pytest.mark.slow
def test_stable_unclip_end_to_end(tmp_path: Path) -> None:
    options = tiny("unclip", "prior_text_encoder", tmp_path)
    results = run(options)
    check_modes(results, {"unclip"}, tmp_path / "out")
    assert results["impossible"] == {}
    asked = run([*options[:-2], "--mode", "unclip", "--mode", "projected", *options[-2:]])
    assert set(asked["modes"]) == {"unclip"} and asked["modes"]["unclip"] == results["modes"]["unclip"]
    assert "not the model whose text tower the pipeline uses" in asked["impossible"]["projected"]


@pytest.mark.slow
def test_equal_widths_end_to_end(tmp_path: Path) -> None:
    options = tiny("sd1", "text_encoder", tmp_path)  # 16 wide, as the joint space
    results = run(options)
    check_modes(results, {"projected", "naive"}, tmp_path / "out")
    assert results["impossible"] == {}
    asked = run([*options[:-2], "--mode", "unclip", "--mode", "naive", *options[-2:]])
    assert set(asked["modes"]) == {"naive"} and "takes no image embedding" in asked["impossible"]["unclip"]


def test_unknown_mode_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(generation.app, ["--mode", "unclipped", "--out", str(tmp_path / "x")])
    assert done.exit_code == 1
    assert "--mode: expected one of naive, projected, unclip, got 'unclipped'" in done.output


def test_too_many_prompts_are_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        generation.app, ["--limit", "20", "--pairs", "15", "--quiet", "--out", str(tmp_path / "x")]
    )
    assert done.exit_code == 1
    assert "15 prompts and references need 30" in done.output
    assert not (tmp_path / "x").exists()

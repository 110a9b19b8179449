"""The generation study: its measures by hand, its verdicts, and one run end to end on mini-sd."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import scipy.stats
import torch
import typer
from PIL import Image
from publish import generation as generation_docs
from typer.testing import CliRunner

import mmhooks as mm
from mmhooks.analysis.measures.groups import BY_RANK, BY_SIGMA
from mmhooks.analysis.statistics.measured import against_few_sets
from mmhooks.analysis.statistics.primaries import Primary
from mmhooks.errors import DataError, MMHooksError
from mmhooks.models.embedders import image_embedder
from mmhooks.studies.generation import cases as generation_cases
from mmhooks.studies.generation import interpolation as study
from mmhooks.studies.generation import settings as generation_settings
from mmhooks.studies.generation import study as generation
from mmhooks.studies.generation.verdicts import as_json, beyond_sets, power_line, verdicts
from mmhooks.utils.escape import markdown

sys.path.append(str(Path(__file__).parents[2] / "models"))


class _Pairs:
    texts = ("cat", "dog", "cat", "owl", "not drawn", "sun")

    def __getitem__(self, i: int) -> mm.data.Pair:
        return mm.data.Pair(id=str(i), image=Image.new("RGB", (8, 8), (i, 0, 0)), text=self.texts[i])


def test_cases_are_of_different_texts_that_the_pipeline_draws() -> None:
    cases = generation_cases.choose_cases(_Pairs(), {"cat", "dog", "owl", "sun"}, 2, "a {}", seed=0)
    texts = [c.prompt for c in cases] + [c.reference for c in cases]
    assert sorted(texts) == ["a cat", "a dog", "a owl", "a sun"]
    for case in cases:
        assert _Pairs.texts[case.image.getpixel((0, 0))[0]] == case.reference.removeprefix("a ")
    with pytest.raises(MMHooksError, match="3 prompts and references need 6"):
        generation_cases.choose_cases(_Pairs(), None, 3, "{}", seed=0)


def test_joint_dimensions_are_directions_where_the_widths_differ() -> None:
    """mini-sd conditions on 192 dimensions, CLIP's joint space has 256: indices do not carry over, directions do."""
    sd, clip = mm.load_diffusion("mini"), mm.load("mini")
    pairs = mm.data.pairs("mini", limit=60, seed=0)
    cases = generation_cases.choose_cases(pairs, None, 2, "{}", seed=0)
    options = generation.Options(joint=True, epochs=1, random_sets=8, quiet=True)
    found, _ = generation_settings.settings_of(sd, clip, pairs, cases, "projected", options)
    (joint,) = [one for one in found if one.name == "joint"]
    assert (joint.head.d_in, joint.head.n_features) == (192, 256) and joint.toward.shape == (2, 1, 256)
    assert len(joint.mds.R) == 256 and joint.mds.groups[0].head == ""  # scored in the joint space itself
    draw = study.ImageGenerator(sd, 2, 3.0, 2)
    prompts = [case.prompt for case in cases]
    with joint.attached(sd):
        plain = draw(prompts, 0)
        moved = draw(prompts, 0, lambda rows: joint.edit(joint.groups["TextD"], 0.9, rows))
    assert not torch.equal(plain, moved) and torch.equal(plain, draw(prompts, 0))


def test_groups_are_cut_to_one_size_and_matched() -> None:
    alive = mm.FeatureSet(range(50), 60)
    groups = {"ImgD": mm.FeatureSet(range(5), 60), "TextD": mm.FeatureSet(range(5, 12), 60),
              "CrossD": mm.FeatureSet(range(12, 50), 60)}  # fmt: skip
    cut, random, pool = generation_settings.same_size(groups, alive, whole=False, seed=0, sets=6)
    assert {len(g) for g in (*cut.values(), *random)} == {5} and len(random) == len(set(random)) == 6
    assert all(set(cut[k]) <= set(groups[k]) for k in groups)
    edited = {feature for group in cut.values() for feature in group}
    assert set(pool) == set(alive) - edited and all(set(r) <= set(pool) for r in random)
    whole, random, _ = generation_settings.same_size(groups, alive, whole=True, seed=0, sets=2)
    assert [len(whole[g]) for g in groups] == [5, 7, 38] and len(random[0]) == 7
    assert not set(random[0]) & set(groups["TextD"])


def test_enough_features_are_left_for_random_sets() -> None:
    """Groups that are a third of all features each would leave none outside them."""
    thirds = {g: mm.FeatureSet(range(k, 60, 3), 60) for k, g in enumerate(("ImgD", "TextD", "CrossD"))}
    cut, _, pool = generation_settings.same_size(
        thirds, mm.FeatureSet(range(60), 60), whole=False, seed=0, sets=2
    )
    assert {len(g) for g in cut.values()} == {12} and len(pool) == 24


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


def measured(shift: dict[str, float], distortion: dict[str, float]) -> dict[str, dict[str, torch.Tensor]]:
    noise = 0.01 * torch.randn(30, generator=torch.Generator().manual_seed(0))
    return {g: {"shift": shift[g] + noise, "distortion": distortion[g] - noise} for g in shift}


def random_sets(scatter: float, sets: int = 20) -> dict[str, torch.Tensor]:
    """Sets of mean effect .3, over thirty prompts; the scatter is between sets."""
    draws = torch.randn(2, sets, 1, generator=torch.Generator().manual_seed(1))
    by_set = 0.3 + scatter * (draws - draws.mean(1, keepdim=True)) / draws.std(1, keepdim=True)
    return dict(zip(("shift", "distortion"), by_set.expand(2, sets, 30), strict=True))


def test_verdicts_follow_the_papers_claim() -> None:
    paper = measured({"ImgD": 0.1, "TextD": 0.6, "CrossD": 0.1}, {"ImgD": 0.7, "TextD": 0.3, "CrossD": 0.6})
    found = verdicts({"dims": paper}, {"dims": random_sets(0.01)})["dims"]
    assert {d.outcome for d in found.values()} == {"shown"}
    other = measured({"ImgD": 0.1, "TextD": 0.1, "CrossD": 0.1}, {"ImgD": 0.1, "TextD": 0.5, "CrossD": 0.3})
    found = verdicts({"dims": other}, {"dims": random_sets(0.01)})["dims"]
    assert [d.outcome for d in found.values()] == ["opposite", "undecided", "opposite", "undecided"]
    margin = found["TextD keeps the structure"].detectable
    assert f"TextD keeps the structure: 80 % power for a margin of {margin:.3f}" in power_line(found)
    sentence = as_json(found)["TextD keeps the structure"]["sentence"]
    assert "not shown to stay by less than 0.050" in sentence and "80 % power for a margin of" in sentence


def test_sets_that_scatter_show_nothing_and_more_claims_need_more() -> None:
    """The same difference is no finding where random sets differ as much, nor where eight claims are tried."""
    paper = measured({"ImgD": 0.3, "TextD": 0.3, "CrossD": 0.3}, {"ImgD": 0.7, "TextD": 0.3, "CrossD": 0.3})
    name = "ImgD breaks the structure"
    assert verdicts({"a": paper}, {"a": random_sets(0.3)})["a"][name].outcome == "undecided"
    one = verdicts({"a": paper}, {"a": random_sets(0.13)})["a"][name]
    two = verdicts({"a": paper, "b": paper}, {s: random_sets(0.13) for s in "ab"})["a"][name]
    assert one.p == two.p and two.adjusted == pytest.approx(2 * one.adjusted)
    assert one.detectable > 0.13 * 2.8  # the sets' scatter, not that of the prompts, decides


def test_a_difference_must_hold_over_prompts_too() -> None:
    """Sets that agree say nothing about other prompts; one prompt that moves far is no effect."""
    primary = Primary("ImgD breaks the structure", "greater")
    own = torch.cat([torch.tensor([3.0]), torch.zeros(29)])
    sets = torch.zeros(20, 30) + 1e-3 * torch.randn(20, 1, generator=torch.Generator().manual_seed(0))
    found, sure = beyond_sets(primary, own, sets), beyond_sets(primary, own * 0 + 0.1, sets)
    assert against_few_sets(primary, float(own.mean()), sets.mean(1)).p < 1e-6 < 0.3 < found.p
    assert found.estimate.low < 0 < found.estimate.value == pytest.approx(0.1, abs=1e-3)
    assert sure.p < 1e-6 and found.detectable > 0.2 > sure.detectable
    assert found.p == pytest.approx(float(scipy.stats.ttest_1samp(own - sets.mean(0), 0)[1]))


def test_edits_of_fewer_prompts_are_judged_by_their_own_rows() -> None:
    g = torch.Generator().manual_seed(0)
    images = torch.rand(3, 4, 3, 64, 64, generator=g)
    judge = study.Judge(image_embedder(progress=False), images[0], images[1])
    every, some = judge(images[2], images[0]), judge(images[2][:2], images[0][:2])
    for measure, values in some.items():
        assert torch.allclose(values, every[measure][:2], atol=1e-5), measure


def test_the_prompt_shown_is_drawn_at_every_strength() -> None:
    generation_settings.check_options(generation.Options(pairs=50, curve_pairs=9, shown=8))
    with pytest.raises(MMHooksError, match="expected 0 to 8, the prompts drawn at every strength, got 9"):
        generation_settings.check_options(generation.Options(pairs=50, curve_pairs=9, shown=9))


@pytest.mark.slow
def test_end_to_end(tmp_path: Path) -> None:
    done = generation.run(
        generation.Options(
            limit=1500,
            pairs=3,
            curve_pairs=2,
            seeds=1,
            strength=[0.5, 0.9],
            steps=3,
            epochs=2,
            random_sets=8,
            quiet=True,
            out=tmp_path,
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
            assert [row["n"] for row in by["shift"]] == [3, 2, 3]  # fewer prompts below the largest strength
        assert max(by["distortion"][2]["value"] for by in found["curves"].values()) > 0.005
        assert found["power"] in (tmp_path / "tables.md").read_text() and found["shown"] < 2
        assert (tmp_path / f"grid-projected-{space.lower()}.png").stat().st_size > 1000
    page = (tmp_path / "index.html").read_text()
    tables = (tmp_path / "tables.md").read_text()
    assert all(markdown(v["sentence"]) in tables for v in found["verdicts"].values())
    assert "Interpolation by modality" in page
    fills_the_docs(tmp_path, results)


def fills_the_docs(run: Path, results: dict) -> None:
    """The docs page gets tables, claims and figures and nothing else; a second time changes nothing."""
    page = run / "page" / "generation.md"
    page.parent.mkdir()
    page.write_text("before\n<!-- results:begin -->\nstale words\n<!-- results:end -->\nafter\n")
    app = typer.Typer()
    app.command()(generation_docs.main)
    told = CliRunner().invoke(app, [str(run), "--page", str(page)], catch_exceptions=False)
    text = page.read_text()
    assert text.startswith("before\n<!-- results:begin") and text.endswith("<!-- results:end -->\nafter\n")
    assert "stale" not in text and text.count("| 8 random sets |") == len(results["modes"]["projected"])
    for found in results["modes"]["projected"].values():
        assert all(v["sentence"] in text and v["claim"] in told.output for v in found["verdicts"].values())
        assert found["power"] in text
    assert {f.name for f in (page.parent / "figures").iterdir()} >= {
        "generation-grid.png",
        "generation-curves.png",
    }
    CliRunner().invoke(app, [str(run), "--page", str(page)], catch_exceptions=False)
    assert page.read_text() == text
    page.write_text("no markers")
    assert CliRunner().invoke(app, [str(run), "--page", str(page)]).exit_code == 2


def tiny(kind: str, encoder: str, folder: Path) -> list[str]:
    """A tiny pipeline with the CLIP of one of its text encoders, as options of the recipe."""
    from pipelines import build, matching_clip

    pipe = build(kind)
    if kind == "unclip":  # as built, the prior gives zeros, and the U-Net hardly hears the image embedding
        pipe.prior.clip_std.data.fill_(1.0)
        pipe.unet.class_embedding.linear_1.weight.data *= 20
    pipe.save_pretrained(folder / "pipeline")
    model = matching_clip(getattr(pipe, encoder), folder / "clip")
    return ["--pipeline", str(folder / "pipeline"), "--model", model, "--limit", "240", "--pairs", "3",
            "--seeds", "1", "--random-sets", "8",
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


def test_a_reference_from_a_file_and_one_prompt(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "brown").save(tmp_path / "red-horse.png")
    options = generation.Options(pairs=3, prompt="draw an animal", reference=tmp_path / "red-horse.png")
    cases = generation_cases.make_cases(_Pairs(), None, options)
    assert {c.prompt for c in cases} == {"draw an animal"} and {c.reference for c in cases} == {"red horse"}
    assert len(cases) == 3 and cases[0].image.getpixel((0, 0)) == (165, 42, 42)
    own = generation_cases.make_cases(_Pairs(), None, replace(options, reference=None))
    assert {c.prompt for c in own} == {"draw an animal"} and len({c.reference for c in own}) == 3
    for case in own:
        assert _Pairs.texts[case.image.getpixel((0, 0))[0]] == case.reference
    prompts = generation_cases.make_cases(_Pairs(), None, replace(options, prompt=None, template="a {}"))
    assert len({c.prompt for c in prompts}) == 3 and {c.reference for c in prompts} == {"a red horse"}
    with pytest.raises(MMHooksError, match="6 cases need as many different texts"):
        generation_cases.make_cases(_Pairs(), None, replace(options, pairs=6, reference=None))
    for name, said in (("none.png", "is not there"), ("red-horse.txt", "--reference")):
        (tmp_path / "red-horse.txt").write_text("not an image")
        with pytest.raises(DataError, match=said):
            generation_cases.read_reference(tmp_path / name)


def test_the_papers_settings_run_and_are_accounted_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--paper`` on a tiny pipeline as wide as its joint space: one prompt, a reference by path, joint indices."""
    # The tiny CLIP has 520 words, its tokenizer open_clip's; so the joint sides are made up, and more than the images.
    sides = torch.randn(2, 240, 16, generator=torch.Generator().manual_seed(0))
    sides[0, :, :3] *= 9
    sides[1, :, 3:6] *= 9
    monkeypatch.setattr(generation_settings, "joint_sides", lambda *_, **__: (sides[0], sides[1]))
    Image.new("RGB", (16, 16), "brown").save(tmp_path / "horse.png")
    options = [
        *tiny("sd1", "text_encoder", tmp_path),
        "--pretrained",
        "",
        "--data",
        "mini",
        "--guidance",
        "3",
    ]
    options = [
        "--paper",
        "--reference",
        str(tmp_path / "horse.png"),
        *options,
        "--out",
        str(tmp_path / "out"),
    ]
    results = run([word if word != "0.5" else "0.9" for word in options])
    assert {c["prompt"] for c in results["cases"]} == {"Please draw an animal"}
    assert {c["reference"] for c in results["cases"]} == {"horse"}
    assert set(results["modes"]) == {"naive"} and set(results["modes"]["naive"]) == {
        "dimensions",
        "SAE",
        "joint",
    }
    joint, own = results["modes"]["naive"]["joint"], results["modes"]["naive"]["dimensions"]
    assert (
        joint["sizes"]["ImgD"] == 3 and joint["edited"]["ImgD"] == 3
    )  # whole groups, by the joint space's scores
    assert joint["thresholds"] != own["thresholds"]
    status = {s["option"]: s["status"] for s in results["paper"]["settings"] if s["option"]}
    assert status["reference"] == "given" and status["prompt"] == status["joint"] == "the paper's"
    assert {status[name] for name in ("pipeline", "model", "steps", "strength", "guidance")} == {"overridden"}
    for name in ("index.html", "tables.md"):
        text = (tmp_path / "out" / name).read_text()
        assert "laion2B-s32B-b79K" in text
    assert "noises of one prompt" in (tmp_path / "out" / "index.html").read_text()

"""Training of mini-sd on a few coloured squares: resumed bytes, the exam's ranks, the choice of drawings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from embedded.sd import drawings as sd_drawings
from embedded.sd import evaluate as sd_exam
from embedded.sd import train as recipe
from embedded.sd.ship import read_curve
from safetensors.torch import load_file, save_file

from mmhooks.models.embedded import mini_sd

N = 8


@pytest.fixture
def material(tmp_path: Path) -> tuple[recipe.TrainingData, Path]:
    out = tmp_path / "run"
    out.mkdir()
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(np.kron(rng.random((N, 3, 8, 8)), np.ones((8, 8)))).float() * 2 - 1
    pixels = pixels + 0.05 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    mean, basis = recipe.principal_patches(pixels)
    save_file({"pixels": pixels, "mean": mean, "basis": basis}, out / "material.safetensors")
    names = ["cat", "dog", "tree", "house", "star", "moon", "fish", "bird"]
    (out / "drawings.json").write_text(json.dumps([{"name": n, "codepoints": ""} for n in names]))
    return recipe.TrainingData.of(tmp_path, out, N), out


def test_latents_are_the_projected_patches_with_unit_spread(material) -> None:
    found, _ = material
    assert found.latents.shape == (N, mini_sd.LATENTS, 8, 8)
    assert abs(found.latents.square().mean().sqrt() - 1) < 1e-3


def test_texts_end_with_the_empty_prompt(material) -> None:
    texts = material[0].texts()
    assert texts.shape == (N + 1, len(sd_drawings.TEMPLATES), 16, 192)
    assert torch.equal(texts[-1, 0], texts[-1, 3])
    assert not torch.equal(texts[0, 0], texts[0, 1])


def test_a_killed_run_ends_with_the_same_weights(material) -> None:
    found, out = material
    plan = recipe.Plan(drawings=N, steps=4, batch=6, warmup=2)
    whole = recipe.UNetTrainer(found, plan, out)
    losses = [whole.run_step().nanmean() for _ in range(4)]
    assert torch.stack(losses).isfinite().all()
    first = recipe.UNetTrainer(found, plan, out)
    for _ in range(2):
        first.run_step()
    first.save()
    again = recipe.UNetTrainer(found, plan, out)
    again.resume()
    assert again.step == 2
    for _ in range(2):
        again.run_step()
    assert all(torch.equal(v, again.average[k]) for k, v in whole.average.items())


def test_every_drawing_comes_once_an_epoch(material) -> None:
    found, out = material
    trainer = recipe.UNetTrainer(found, recipe.Plan(drawings=N, steps=4, batch=6), out)
    seen = []
    for trainer.step in range(4):  # 24 rows: three epochs
        seen += trainer.rows().tolist()
    assert all(sorted(seen[e * N : (e + 1) * N]) == list(range(N)) for e in range(3))


def test_rate_rises_stays_and_falls() -> None:
    plan = recipe.Plan(steps=100, warmup=10, lr=1.0)
    assert plan.lr_at(0) == pytest.approx(0.1)
    assert plan.lr_at(69) == 1.0
    assert plan.lr_at(85) == pytest.approx(0.5)
    assert plan.lr_at(99) < 0.04


def test_length_may_change_until_the_rate_falls(material) -> None:
    found, out = material
    trainer = recipe.UNetTrainer(found, recipe.Plan(drawings=N, steps=100), out)
    recipe.keep_unet_plan(recipe.Plan(drawings=N, steps=100), trainer, out / "plan.json")
    trainer.step = 50
    recipe.keep_unet_plan(recipe.Plan(drawings=N, steps=80), trainer, out / "plan.json")
    trainer.step = 60
    with pytest.raises(typer.BadParameter, match="another plan"):
        recipe.keep_unet_plan(recipe.Plan(drawings=N, steps=100), trainer, out / "plan.json")


def test_decoder_learns(material) -> None:
    found, out = material
    psnr = recipe.train_decoder(found, out, steps=12, batch=4)
    assert psnr > 5
    assert set(load_file(out / "vae.safetensors")) == set(mini_sd.autoencoder().state_dict())


def test_another_number_of_drawings_is_refused(material, tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="8 drawings"):
        recipe.TrainingData.of(tmp_path, material[1], N + 1)


def test_pixel_ranks_against_a_loop() -> None:
    g = torch.Generator().manual_seed(0)
    known, own = torch.rand(12, 3, 8, 8, generator=g), torch.tensor([0, 5, 9])
    drawn = known[own] + 0.4 * torch.rand(3, 3, 8, 8, generator=g)
    flat = known.flatten(1).double()
    mean = flat.mean(0)
    values, vectors = torch.linalg.eigh((flat - mean).T @ (flat - mean))
    basis = vectors[:, -11:]
    expected = []
    for image, i in zip(drawn.flatten(1).double(), own, strict=True):
        gaps = [((image - other) @ basis).norm() for other in flat]
        expected.append(sum(bool(gap < gaps[i]) for gap in gaps))
    assert sd_exam.pixel_ranks(drawn, known, own).tolist() == expected


def test_rates_and_grid_rule() -> None:
    rates = sd_exam.rates(torch.tensor([0, 0, 3, 40]))
    assert rates["first 1"]["value"] == 0.5
    assert rates["first 10"]["value"] == 0.75
    assert sd_exam.evenly_spaced(["x"] * 512)[:3] == [0, 8, 16]
    assert sd_exam.evenly_spaced(["x"] * 5) == [0, 1, 2, 3, 4]


def test_curve_keeps_the_later_of_steps_run_twice(tmp_path: Path) -> None:
    rows = [{"step": 1, "a": 1}, {"step": 2, "a": 1}, {"step": 2, "a": 2}]
    (tmp_path / "curve.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_curve(tmp_path) == [rows[0], rows[2]]


class _Corpus:
    """Squares of one colour each, named; two alike in look, two alike in name."""

    def __init__(self) -> None:
        names = ["cat", "volcano", "guitar", "cats", "left arrow", "woman singer"]
        colours = [(255, 0, 0), (0, 255, 0), (0, 250, 0), (0, 0, 255), (0, 0, 0), (255, 255, 0)]
        self.rows = [{"name": n, "style": sd_drawings.STYLE, "toned": False} for n in names]
        self.rgba = torch.tensor([[*c, 255] for c in colours], dtype=torch.uint8)[:, None, None].repeat(
            1, 72, 72, 1
        )


def test_only_distinguishable_drawings_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sd_drawings, "TEXTS_ALIKE", 0.7)
    corpus = _Corpus()
    names = {corpus.rows[i]["name"] for i in sd_drawings.choose(corpus, 2)}
    assert "left arrow" not in names and "woman singer" not in names
    assert len(names & {"cat", "cats"}) == 1 and len(names & {"volcano", "guitar"}) == 1
    with pytest.raises(ValueError, match="expected 3 drawings that differ, got 2"):
        sd_drawings.choose(corpus, 3)

"""Sweeps: the grid, the numbers of a row, and resuming after a kill."""

from __future__ import annotations

import json

import pytest
import torch

import mmhooks as mm
from mmhooks.analysis.measures import sweep as module
from mmhooks.errors import MMHooksError
from mmhooks.heads import load_head_dir, reconstruction
from mmhooks.report.training import sweep_figure

GRID = {"k": (2, 4), "n": (24, 48), "seeds": (0, 1), "epochs": 2, "batch_size": 60, "progress": False}


def clouds(n: int = 400, d: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    basis = torch.randn(16, d, generator=g)
    code = torch.rand(n, 16, generator=g) * (torch.rand(n, 16, generator=g) < 0.2)
    noise = 0.1 * torch.randn(2, n, d, generator=g)
    return code @ basis + noise[0], code @ basis + 0.5 + noise[1]


def test_every_combination_has_a_row_that_its_saved_head_confirms(tmp_path) -> None:
    image, text = clouds()
    result = mm.sweep(image, text, out=tmp_path, **GRID)
    assert [(r["n"], r["K"], r["seed"]) for r in result.rows] == [
        (n, k, s) for n in (24, 48) for k in (2, 4) for s in (0, 1)
    ]
    assert result.pairs == (360, 40) and result.judge == "own"
    row = result.rows[3]
    head = load_head_dir(tmp_path / "heads" / "topk-n24-k4-seed1")
    held_out = image[9::10], text[9::10]
    assert row["head"] == head.id and row["L0"] <= 4
    assert row["FVU image"] == pytest.approx(reconstruction(head, held_out[0]).fvu, rel=1e-5)
    assert row["FVU"] == pytest.approx(sum(reconstruction(head, x).fvu for x in held_out) / 2, rel=1e-5)
    assert row["dead"] == pytest.approx(reconstruction(head, image, text).dead)
    scores = mm.mds(*(head.encode(head.prepare(x)).detach() for x in held_out))
    assert row["MDS sigma"] == pytest.approx(scores.sigma, rel=1e-5)
    assert row["ImgD"] + row["TextD"] + row["CrossD"] == int(scores.alive.sum())


@pytest.mark.parametrize("variant", ["matching_pursuit", "archetypal"])
def test_other_kinds_with_a_k(tmp_path, variant) -> None:
    result = mm.sweep(
        *clouds(), out=tmp_path, **GRID | {"n": (24,), "k": (2, 4), "seeds": (0,)}, variants=[variant]
    )
    assert [r["variant"] for r in result.rows] == [variant] * 2
    assert result.rows[0]["L0"] <= 2 < result.rows[1]["L0"] <= 4
    assert load_head_dir(tmp_path / "heads" / f"{variant}-n24-k4-seed0").kind == variant


def test_results_are_written_and_drawn(tmp_path) -> None:
    result = mm.sweep(*clouds(), out=tmp_path, **GRID | {"n": (24,), "seeds": (0,)})
    stored = json.loads((tmp_path / "sweep.json").read_text())
    assert stored["kind"] == "SweepResult" and len(stored["rows"]) == 2
    assert "EmbedSim image" in (tmp_path / "sweep.md").read_text().splitlines()[0]
    figure = sweep_figure(result.rows)
    drawn = [tuple(p) for c in figure.axes[0].collections for p in c.get_offsets().tolist()]
    assert sorted(drawn) == sorted((r["L0"], r["FVU"]) for r in result.rows)


def test_an_interrupted_sweep_resumes_and_repeats_nothing(tmp_path, monkeypatch) -> None:
    image, text = clouds()
    whole = mm.sweep(image, text, out=tmp_path / "whole", **GRID)
    calls, train = [], module.train_head

    def breaking(*args, **kwargs):
        calls.append(kwargs["checkpoint"].name)
        if len(calls) == 4:
            train(*args, **kwargs)  # killed after the training, before the measures
            raise KeyboardInterrupt
        return train(*args, **kwargs)

    monkeypatch.setattr(module, "train_head", breaking)
    with pytest.raises(KeyboardInterrupt):
        mm.sweep(image, text, out=tmp_path / "broken", **GRID)
    again = mm.sweep(image, text, out=tmp_path / "broken", **GRID)
    assert len(calls) == len(whole.rows) + 1  # only the broken one twice
    for mine, theirs in zip(again.rows, whole.rows, strict=True):
        assert {k: v for k, v in mine.items() if k != "seconds"} == {
            k: v for k, v in theirs.items() if k != "seconds"
        }
    assert not list((tmp_path / "broken" / "checkpoints").iterdir())
    larger = mm.sweep(image, text, out=tmp_path / "broken", **GRID | {"seeds": (0, 1, 2)})
    assert len(larger.rows) == 12 and len(calls) == len(whole.rows) + 1 + 4


def test_runs_of_other_data_or_settings_are_refused(tmp_path) -> None:
    image, text = clouds()
    small = GRID | {"n": (24,), "seeds": (0,)}
    mm.sweep(image, text, out=tmp_path, **small)
    for other, change in (
        ((image + 0.1, text), {}),
        ((image, text), {"epochs": 3}),
        ((image, text), {"top": 5}),
    ):
        with pytest.raises(MMHooksError, match="other data or with other settings"):
            mm.sweep(*other, out=tmp_path, **small | change)


def test_bad_grids_fail_before_training(tmp_path) -> None:
    image, text = clouds()
    with pytest.raises(MMHooksError, match="got 'tpok'"):
        mm.sweep(image, text, out=tmp_path, variants=["topk", "tpok"])
    with pytest.raises(MMHooksError, match="expected a grid of runs"):
        mm.sweep(image, text, out=tmp_path, k=[64], n=[32])
    with pytest.raises(MMHooksError, match="expected image rows and text rows"):
        mm.sweep(image, out=tmp_path)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("variant", ["batchtopk", "matryoshka", "jumprelu"])
def test_every_variant_runs(variant, tmp_path) -> None:
    result = mm.sweep(*clouds(), out=tmp_path, **GRID | {"variants": [variant], "n": (24,), "seeds": (0,)})
    assert all(row["L0"] > 0 and row["FVU"] < 1.5 for row in result.rows)


def test_pareto_front() -> None:
    points = torch.tensor([[4.0, 0.3], [8.0, 0.2], [8.0, 0.25], [16.0, 0.2], [4.0, 0.3]])
    assert module.pareto(points).tolist() == [True, True, False, False, True]


def test_one_changed_row_of_many_is_other_data(tmp_path) -> None:
    """Every row decides, also between those that a sample of 4,096 would look at."""
    image, text = clouds(n=9000)
    grid = GRID | {"n": (24,), "k": (2,), "seeds": (0,), "epochs": 1, "batch_size": 4000, "out": tmp_path}
    mm.sweep(image, text, valid=(image[:50], text[:50]), **grid)
    text[1] = text[1].flip(0)
    with pytest.raises(MMHooksError, match="other data"):
        mm.sweep(image, text, valid=(image[:50], text[:50]), **grid)

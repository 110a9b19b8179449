"""The training loop: exact resume, early stopping, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from mmhooks.errors import MMHooksError, NotFinite, ShapeMismatch
from mmhooks.heads import NCL, Head, TopKSAE, train_head
from mmhooks.heads.training.objective import StepLoss
from mmhooks.heads.training.sae_objective import SAEObjective

SETTINGS = {"epochs": 6, "batch_size": 90, "progress": False}


class Crash(Exception):
    pass


class CrashingSAE(SAEObjective):
    """Stops the run at a given step, as a killed process would."""

    at = 10**9

    def loss(self, head, image, text, dead) -> StepLoss:
        self.at -= 1
        if self.at < 0:
            raise Crash
        return super().loss(head, image, text, dead)


def same(a: Head, b: Head) -> bool:
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("crash_at", [0, 1, 13, 20, 35])
def test_a_broken_run_ends_with_the_same_bits(pairs, held_out, tmp_path, crash_at) -> None:
    whole, broken = TopKSAE(16, 48, 5), TopKSAE(16, 48, 5)
    expected = train_head(whole, *pairs, valid=held_out, objective=CrashingSAE(), **SETTINGS)
    objective = CrashingSAE()
    objective.at = crash_at
    path = tmp_path / "run.safetensors"
    kwargs = {"valid": held_out, "checkpoint": path, "checkpoint_every": 4, **SETTINGS}
    with pytest.raises(Crash):
        train_head(broken, *pairs, objective=objective, **kwargs)
    fresh = TopKSAE(16, 48, 5)
    result = train_head(fresh, *pairs, objective=CrashingSAE(), **kwargs)
    assert same(fresh, whole)
    assert result.history == expected.history and result.steps == expected.steps
    again = train_head(
        TopKSAE(16, 48, 5), *pairs, objective=CrashingSAE(), **kwargs
    )  # a finished run: nothing to do
    assert same(again.head, whole)
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]


def test_resume_of_ncl_and_of_early_stopping(pairs, held_out, tmp_path) -> None:
    kwargs = {"valid": held_out, "patience": 2, "lr": 3e-2, **SETTINGS, "epochs": 12}
    whole = train_head(NCL(16, 32), *pairs, **kwargs)
    resumed = train_head(NCL(16, 32), *pairs, checkpoint=tmp_path / "c", **kwargs)
    again = train_head(NCL(16, 32), *pairs, checkpoint=tmp_path / "c", **kwargs)
    assert same(whole.head, resumed.head) and same(whole.head, again.head)
    assert again.history == whole.history and again.stopped_early == whole.stopped_early


def test_seed_decides(pairs) -> None:
    runs = [train_head(TopKSAE(16, 48, 5), *pairs, seed=s, **SETTINGS).head for s in (0, 0, 1)]
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


def test_early_stopping_keeps_the_best_weights(pairs, held_out) -> None:
    sae = TopKSAE(16, 48, 5)
    result = train_head(
        sae, *pairs, epochs=40, batch_size=90, lr=0.3, valid=held_out, patience=2, progress=False
    )
    scores = [row["valid_score"] for row in result.history]
    assert result.stopped_early and len(scores) < 40
    x = [sae.prepare(v) for v in held_out]
    assert SAEObjective().score(sae, *x)["score"] == pytest.approx(min(scores), rel=1e-6)


def test_checkpoint_of_another_training_is_refused(pairs, tmp_path) -> None:
    path = tmp_path / "c"
    train_head(TopKSAE(16, 48, 5), *pairs, checkpoint=path, **SETTINGS)
    for head, change in (
        (TopKSAE(16, 48, 6), {}),
        (TopKSAE(16, 48, 5), {"seed": 1}),
        (TopKSAE(16, 48, 5), {"lr": 1.0}),
    ):
        with pytest.raises(MMHooksError, match="belongs to another training"):
            train_head(head, *pairs, checkpoint=path, **SETTINGS, **change)
    with pytest.raises(MMHooksError, match="belongs to another training"):
        train_head(TopKSAE(16, 48, 5), pairs[0] + 1e-3, pairs[1], checkpoint=path, **SETTINGS)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(MMHooksError, match="is not a checkpoint"):
        train_head(TopKSAE(16, 48, 5), *pairs, checkpoint=path, **SETTINGS)


def test_bad_input_is_refused_before_the_first_step(pairs) -> None:
    image, text = pairs
    sae = TopKSAE(16, 48, 5)
    broken = image.clone()
    broken[17] = float("inf")
    with pytest.raises(NotFinite, match="row 17"):
        train_head(sae, broken, text, **SETTINGS)
    with pytest.raises(ShapeMismatch, match="width 16"):
        train_head(sae, image[:, :12], text[:, :12], **SETTINGS)
    with pytest.raises(ShapeMismatch, match="600 and 599 rows"):
        train_head(sae, image, text[:-1], **SETTINGS)
    with pytest.raises(MMHooksError, match="all equal"):
        train_head(sae, torch.ones(9, 16), torch.ones(9, 16), **SETTINGS)
    with pytest.raises(MMHooksError, match="pass valid="):
        train_head(sae, image, text, patience=1, **SETTINGS)
    assert torch.equal(sae.W_dec, TopKSAE(16, 48, 5).W_dec)


def test_a_loss_that_becomes_nan_is_named(pairs) -> None:
    class Broken(SAEObjective):
        def loss(self, head, image, text, dead) -> StepLoss:
            step = super().loss(head, image, text, dead)
            return step._replace(loss=step.loss * float("nan"))

    with pytest.raises(NotFinite, match="nan at step 0"):
        train_head(TopKSAE(16, 48, 5), *pairs, objective=Broken(), **SETTINGS)


def test_one_modality_is_enough_for_an_sae(pairs) -> None:
    sae = TopKSAE(16, 48, 5)
    assert (
        train_head(sae, pairs[0], **SETTINGS, lr=1e-2, valid=(pairs[0], None)).last["valid_fvu_image"] < 0.35
    )


def test_progress_bar_writes_to_stderr_only(pairs, capfd) -> None:
    train_head(TopKSAE(16, 48, 5), *pairs, **(SETTINGS | {"progress": True}))
    out, err = capfd.readouterr()
    assert out == "" and "training sae" in err


def test_three_seeds_on_one_path_are_three_trainings(pairs, tmp_path) -> None:
    """Starting weights decide a training, however they came about."""
    path = tmp_path / "c"
    train_head(TopKSAE(16, 48, 5, seed=0), *pairs, checkpoint=path, **SETTINGS)
    moved, frozen = TopKSAE(16, 48, 5), TopKSAE(16, 48, 5)
    with torch.no_grad():
        moved.b_enc[7] += 1e-6
    frozen.b_enc.requires_grad_(False)
    for head in (TopKSAE(16, 48, 5, seed=1), TopKSAE(16, 48, 5, seed=2), moved, frozen):
        with pytest.raises(MMHooksError, match="another training.*other starting weights"):
            train_head(head, *pairs, checkpoint=path, **SETTINGS)


@pytest.mark.parametrize("part", ["images", "texts", "held-out images", "held-out texts"])
def test_one_changed_row_of_many_is_other_data(tmp_path, part) -> None:
    """Every row counts, also between those that a sample of 4,096 would look at."""
    g = torch.Generator().manual_seed(0)
    tables = {name: torch.randn(9000, 4, generator=g) for name in ("images", "texts")}
    tables |= {f"held-out {name}": torch.randn(9000, 4, generator=g) for name in ("images", "texts")}
    kwargs = {"epochs": 1, "batch_size": 4500, "progress": False, "checkpoint": tmp_path / "c"}

    def run() -> None:
        valid = (tables["held-out images"], tables["held-out texts"])
        train_head(TopKSAE(4, 8, 2), tables["images"], tables["texts"], valid=valid, **kwargs)

    run()
    tables[part] = tables[part].clone()
    tables[part][8] = tables[part][8].flip(0)
    with pytest.raises(MMHooksError, match=f"other {part}"):
        run()


def test_every_setting_decides(pairs, held_out, tmp_path) -> None:
    path = tmp_path / "c"
    base = SETTINGS | {"valid": held_out, "patience": 3}
    train_head(TopKSAE(16, 48, 5), *pairs, checkpoint=path, **base)
    changes = ({"epochs": 7}, {"batch_size": 80}, {"lr": 1e-4}, {"schedule": "cosine"}, {"warmup": 0.1}, {"decay": 0.4},
               {"weight_decay": 0.1}, {"seed": 3}, {"patience": 2}, {"objective": SAEObjective(aux_k=3)},
               {"objective": SAEObjective(init="data")}, {"precision": "bf16"}, {"compile": True})  # fmt: skip
    for change in changes:
        with pytest.raises(MMHooksError, match="other settings"):
            train_head(TopKSAE(16, 48, 5), *pairs, checkpoint=path, **(base | change))


def test_gradients_switched_off_outside_are_on_inside(pairs) -> None:
    expected = train_head(TopKSAE(16, 48, 5), *pairs, **SETTINGS).head
    with torch.no_grad():
        assert same(train_head(TopKSAE(16, 48, 5), *pairs, **SETTINGS).head, expected)
        assert not torch.is_grad_enabled()
    before = torch.is_grad_enabled()
    try:
        torch.set_grad_enabled(False)
        assert same(train_head(TopKSAE(16, 48, 5), *pairs, **SETTINGS).head, expected)
    finally:
        torch.set_grad_enabled(before)
    with torch.inference_mode():
        data = [x.clone() for x in pairs]
        with pytest.raises(MMHooksError, match=r"inference_mode.*outside"):
            train_head(TopKSAE(16, 48, 5), *data, **SETTINGS)
    assert same(train_head(TopKSAE(16, 48, 5), *data, **SETTINGS).head, expected)
    with pytest.raises(MMHooksError, match=r"requires_grad_\(True\)"):
        train_head(TopKSAE(16, 48, 5).requires_grad_(False), *pairs, **SETTINGS)

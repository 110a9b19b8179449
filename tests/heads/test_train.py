"""The training loop: exact resume, early stopping, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from mmhooks.errors import MMHooksError, NotFinite, ShapeMismatch
from mmhooks.heads import NCL, Head, TopKSAE, train_head
from mmhooks.heads.objective import StepLoss
from mmhooks.heads.sae_objective import SAEObjective

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
    with pytest.raises(MMHooksError, match="is no checkpoint"):
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
    with pytest.raises(MMHooksError, match="all the same"):
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

"""What training can be asked for: a store, a schedule, a centre for each modality, resampling, half precision."""

from __future__ import annotations

import builtins
import math

import pytest
import torch

from mmhooks.errors import MMHooksError, NotFinite, ShapeMismatch
from mmhooks.heads import NCL, TopKSAE, reconstruction, train_head
from mmhooks.heads.linalg import mean_row
from mmhooks.heads.sae import topk_kernels as sparse
from mmhooks.heads.sae.modality_centres import by_modality
from mmhooks.heads.training.resample import resample
from mmhooks.heads.training.sae_objective import SAEObjective
from mmhooks.heads.training.schedule import lr_factor
from mmhooks.heads.vectors import SelectedRows, Vectors, hold_out_every_tenth, training_rows

from .stores import write_store
from .test_train import same

SETTINGS = {"epochs": 4, "batch_size": 90, "progress": False}


# -- data ----------------------------------------------------------------------------------------------


def test_a_store_its_path_and_the_tensors_train_to_the_same_bits(pairs, held_out, tmp_path) -> None:
    store = write_store(tmp_path / "acts", image_embed=pairs[0], text_embed=pairs[1])
    valid = write_store(tmp_path / "valid", image_embed=held_out[0], text_embed=held_out[1])
    for make in (lambda: TopKSAE(16, 48, 5), lambda: NCL(16, 32)):
        results = [
            train_head(make(), *data, valid=v, **SETTINGS)
            for data, v in (
                (pairs, held_out),
                ((store,), valid),
                ((str(tmp_path / "acts"),), tmp_path / "valid"),
            )
        ]
        assert same(results[0].head, results[1].head) and same(results[0].head, results[2].head)
        assert results[0].history == results[1].history


def test_sites_choose_what_of_a_store_is_trained_on(pairs, tmp_path) -> None:
    store = write_store(tmp_path / "a", image_embed=pairs[0], other=pairs[1])
    alone, chosen = TopKSAE(16, 48, 5), TopKSAE(16, 48, 5)
    train_head(alone, pairs[1], **SETTINGS)
    train_head(chosen, store, sites=["other"], **SETTINGS)
    assert same(alone, chosen)
    # no text site: the default trains on images alone
    assert train_head(TopKSAE(16, 48, 5), store, **SETTINGS).steps == 24
    with pytest.raises(MMHooksError, match="no site"):
        train_head(TopKSAE(16, 48, 5), store, sites=["image.embed", "nowhere"], **SETTINGS)
    with pytest.raises(MMHooksError, match="a store contains both"):
        train_head(TopKSAE(16, 48, 5), store, pairs[1], **SETTINGS)


def test_what_a_head_cannot_read_is_refused_by_site(pairs, tmp_path) -> None:
    store = write_store(tmp_path / "a", image_tokens=torch.randn(20, 3, 16))
    with pytest.raises(ShapeMismatch, match=r"image.tokens.*rows of shape \(3, 16\)"):
        train_head(TopKSAE(16, 48, 5), store, sites=["image.tokens"], **SETTINGS)
    broken = pairs[0].clone()
    broken[500] = math.nan
    with pytest.raises(NotFinite, match="training data, text"):
        train_head(TopKSAE(16, 48, 5), pairs[0], broken, **SETTINGS)


class Watched:
    """Rows that note how many were asked for at once."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x, self.most, self.shape = x, 0, x.shape

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, which):
        rows = self.x[which]
        self.most = max(self.most, len(rows))
        return rows


def test_training_never_asks_for_all_rows_of_a_large_store() -> None:
    image, text = (Watched(torch.randn(200_000, 4)) for _ in range(2))
    chosen = [SelectedRows(x, torch.arange(200_000)) for x in (image, text)]
    train_head(TopKSAE(4, 8, 2), *chosen, epochs=1, batch_size=50_000, lr=1e-3, progress=False)
    # the sample that initialisation looks at: every third row of 200,000
    assert max(image.most, text.most) <= 2 * 65_536


def test_a_tensor_is_not_copied(pairs) -> None:
    x = Vectors(pairs[0], TopKSAE(16, 48, 5), torch.device("cpu"))
    assert x.rows.data_ptr() == pairs[0].data_ptr()
    torch.testing.assert_close(torch.cat(list(x.split(7))), torch.nn.functional.normalize(pairs[0], dim=1))
    torch.testing.assert_close(
        mean_row(x).float(), torch.nn.functional.normalize(pairs[0], dim=1).mean(dim=0)
    )


def test_every_tenth_pair_is_held_out(pairs) -> None:
    (image, text), (one, two) = hold_out_every_tenth(*training_rows(*pairs))
    assert len(image) == len(text) == 540 and torch.equal(one, pairs[0][9::10])
    everything = torch.cat([image[:], one]).sort(dim=0).values
    assert torch.equal(everything, pairs[0].sort(dim=0).values) and two is not None
    assert torch.equal(text[torch.tensor([9])], pairs[1][[10]])


# -- schedules -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_rates_rise_then_fall(schedule) -> None:
    rates = [lr_factor(schedule, step, 100, 0.1, 0.5) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10:50] == pytest.approx([1.0] * 40)
    if schedule == "constant":
        assert rates[50:] == [1.0] * 50
    else:
        assert rates[50:] == sorted(rates[50:], reverse=True) and 0 < rates[-1] < 0.03
        middle = {"linear": 0.5, "cosine": 0.5}[schedule]
        assert rates[75] == pytest.approx(middle)
        assert rates[90] == pytest.approx(
            {"linear": 0.2, "cosine": (1 - math.cos(math.pi * 0.2)) / 2}[schedule]
        )


def test_the_schedule_reaches_the_optimiser(pairs) -> None:
    heads = [
        train_head(TopKSAE(16, 48, 5), *pairs, schedule=name, **SETTINGS).head
        for name in ("linear", "cosine", "constant")
    ]
    assert not same(heads[0], heads[1]) and not same(heads[1], heads[2])


# -- a centre for each modality ------------------------------------------------------------------------


def test_a_centre_for_each_modality_equals_centring_by_hand(pairs, held_out) -> None:
    options = {"epochs": 30, "batch_size": 100, "lr": 3e-3, "progress": False}
    sae, plain = (TopKSAE(16, 48, 5, normalize_input=False) for _ in range(2))
    result = train_head(sae, *pairs, objective=SAEObjective(centre="modality"), valid=held_out, **options)
    means = [x.mean(dim=0) for x in pairs]
    train_head(plain, *(x - m for x, m in zip(pairs, means, strict=True)), **options)
    heads = by_modality(sae)
    for name, x, m in zip(("image", "text"), held_out, means, strict=True):
        torch.testing.assert_close(heads[name](x), plain(x - m) + m, atol=1e-3, rtol=1e-3)
        assert result.last[f"valid_fvu_{name}"] == pytest.approx(reconstruction(heads[name], x).fvu, rel=1e-3)
        assert (
            reconstruction(heads[name], x).fvu < reconstruction(sae, x).fvu
        )  # as one head it stands between the clouds


def test_the_centres_survive_a_file_and_are_missing_elsewhere(pairs, tmp_path) -> None:
    sae = TopKSAE(16, 48, 5)
    train_head(sae, *pairs, objective=SAEObjective(centre="modality"), **SETTINGS)
    loaded = by_modality(TopKSAE.load(sae.save(tmp_path / "sae")))
    assert same(loaded["text"], by_modality(sae)["text"])
    with pytest.raises(MMHooksError, match="one centre for both"):
        by_modality(TopKSAE(16, 48, 5))
    with pytest.raises(MMHooksError, match="two modalities"):
        train_head(TopKSAE(16, 48, 5), pairs[0], objective=SAEObjective(centre="modality"), **SETTINGS)


# -- resampling ----------------------------------------------------------------------------------------


def test_resampling_touches_dead_features_and_their_moments_alone(pairs) -> None:
    sae = TopKSAE(16, 48, 5)
    adam = torch.optim.Adam(sae.parameters())
    sae(pairs[0]).square().sum().backward()
    adam.step()
    dead = torch.zeros(48, dtype=torch.bool)
    dead[[3, 40]] = True
    before = {k: v.clone() for k, v in sae.state_dict().items()}
    x = torch.nn.functional.normalize(pairs[0], dim=1)
    weight = torch.zeros(len(x))
    weight[[5, 6]] = 1.0  # only these two may be drawn
    assert resample(sae, adam, dead, x, weight, torch.Generator().manual_seed(0)) == 2
    for name in ("W_enc", "W_dec", "b_enc"):
        assert torch.equal(sae.state_dict()[name][~dead], before[name][~dead])
        moment = adam.state[getattr(sae, name)]["exp_avg"]
        assert float(moment[dead].abs().sum()) == 0 and float(moment[~dead].abs().sum()) > 0
    directions = torch.nn.functional.normalize(x[[5, 6]] - before["b_pre"], dim=1)
    cosines = sae.W_dec[dead].detach() @ directions.T
    torch.testing.assert_close(cosines.max(dim=1).values, torch.ones(2))
    assert set(cosines.argmax(dim=1).tolist()) == {0, 1}
    length = before["W_enc"][~dead].norm(dim=1).mean()
    torch.testing.assert_close(sae.W_enc[dead].detach(), length * sae.W_dec[dead].detach())


def test_resampling_revives_and_a_broken_run_still_ends_with_the_same_bits(pairs, tmp_path) -> None:
    def fresh() -> TopKSAE:
        sae = TopKSAE(16, 64, 4)
        with torch.no_grad():
            sae.b_enc[:24] = -1.0
        return sae

    options = {"epochs": 9, "batch_size": 100, "lr": 3e-3, "progress": False}
    off, on = (SAEObjective(aux_weight=0.0, resample_every=e) for e in (None, 2))
    without = train_head(fresh(), *pairs, objective=off, **options)
    whole = train_head(fresh(), *pairs, objective=on, **options)
    assert any(row.get("resampled", 0) >= 20 for row in whole.history)
    dead = [reconstruction(r.head, *pairs).dead for r in (without, whole)]
    assert dead[0] > 0.3 and dead[1] < dead[0] / 3

    class Crash(SAEObjective):
        def after_step(self, head) -> None:
            super().after_step(head)
            self.steps = getattr(self, "steps", 0) + 1
            if self.steps == 29:
                raise KeyboardInterrupt

    crash = Crash(aux_weight=0.0, resample_every=2)
    Crash.__name__ = "SAEObjective"
    with pytest.raises(KeyboardInterrupt):
        train_head(fresh(), *pairs, objective=crash, checkpoint=tmp_path / "c", checkpoint_every=5, **options)
    again = train_head(
        fresh(), *pairs, objective=on, checkpoint=tmp_path / "c", checkpoint_every=5, **options
    )
    assert same(again.head, whole.head) and again.history == whole.history


# -- precision, compilation ----------------------------------------------------------------------------


@pytest.mark.parametrize("n", [64, 20])  # the sparse step, and the dense one
def test_half_precision_selects_almost_alike_and_learns_alike(pairs, held_out, n) -> None:
    assert sparse.sparse_is_faster(4, n, torch.device("cpu")) == (n == 64)
    options = {"epochs": 30, "batch_size": 100, "lr": 3e-3, "progress": False}
    fvu = []
    for precision in ("fp32", "bf16"):
        sae = TopKSAE(16, n, 4)
        train_head(sae, *pairs, precision=precision, **options)
        assert all(p.dtype == torch.float32 for p in sae.parameters())
        fvu.append(reconstruction(sae, held_out[0]).fvu)
    assert fvu[1] == pytest.approx(fvu[0], rel=0.1) and fvu[0] != fvu[1]


def test_values_selected_in_half_precision_are_exact() -> None:
    x, w, bias = torch.randn(50, 16), torch.randn(96, 16), torch.randn(96)
    with torch.autocast("cpu", torch.bfloat16):
        values, places = sparse.encode(x, w, bias, 4)
    torch.testing.assert_close(values, (x @ w.T + bias).gather(1, places.indices).relu())


@pytest.mark.slow
def test_compiled_training_follows_the_eager_one(pairs) -> None:
    heads = []
    for compiled in (False, True):
        sae = TopKSAE(16, 20, 4)
        train_head(sae, *pairs, compile=compiled, **SETTINGS)
        heads.append(sae)
    torch.testing.assert_close(heads[0].W_dec, heads[1].W_dec, atol=1e-4, rtol=1e-3)


# -- what a run says -----------------------------------------------------------------------------------


def test_tensorboard_gets_every_tenth_step_and_every_epoch(pairs, tmp_path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train_head(TopKSAE(16, 48, 5), *pairs, tensorboard=tmp_path, **SETTINGS)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [e.step for e in events.Scalars("fvu")] == [10, 20]
    losses = [e.value for e in events.Scalars("epoch/loss")]
    assert losses == pytest.approx([row["loss"] for row in result.history], rel=1e-6)


def test_tensorboard_that_is_not_installed_is_named(pairs, tmp_path, monkeypatch) -> None:
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith(("tensorboard", "torch.utils.tensorboard")):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MMHooksError, match=r"mmhooks\[tensorboard\]"):
        train_head(TopKSAE(16, 48, 5), *pairs, tensorboard=tmp_path, **SETTINGS)


def test_the_bar_shows_loss_fvu_l0_and_dead(pairs, capfd) -> None:
    train_head(TopKSAE(16, 48, 5), *pairs, **(SETTINGS | {"progress": True}))
    _, err = capfd.readouterr()
    assert all(f"{name} " in err for name in ("loss", "fvu", "l0", "dead"))


def test_the_encoder_never_holds_all_preactivations() -> None:
    """A step at n = 65,536 takes the memory of a few blocks, not of the table [b, n] (here 268 MB)."""
    x, w = torch.randn(1024, 8), torch.randn(65_536, 8)
    blocks = []
    original = sparse.affine

    def watched(*args):
        blocks.append(original(*args).shape)
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "affine", watched)
        values, places = sparse.encode(x, w, torch.zeros(65_536), 8)
    assert (
        max(rows * n for rows, n in blocks) <= sparse.BLOCK_NUMEL and sum(rows for rows, _ in blocks) == 1024
    )
    expected = (x @ w.T).topk(8).values.relu()
    torch.testing.assert_close(values.sort(descending=True).values, expected)


# -- scale ---------------------------------------------------------------------------------------------


def test_a_head_of_scaled_vectors_is_the_scaled_head(pairs, held_out) -> None:
    """Neither the length of the vectors nor their unit decides how training goes."""
    options = {"epochs": 10, "batch_size": 100, "lr": 3e-3, "progress": False}
    heads = []
    for scale in (1.0, 64.0):
        heads.append(TopKSAE(16, 48, 5, normalize_input=False))
        train_head(heads[-1], *(scale * x for x in pairs), **options)
    torch.testing.assert_close(
        heads[1](64.0 * held_out[0]) / 64.0, heads[0](held_out[0]), atol=2e-3, rtol=2e-3
    )


def test_the_encoder_starts_at_the_length_that_reconstructs_best(pairs) -> None:
    sae, objective = TopKSAE(16, 48, 5), SAEObjective()
    image, text = (torch.nn.functional.normalize(x, dim=1) for x in pairs)
    objective.measure(image, text)
    objective.start(sae, image, text)
    x = torch.cat([image, text])
    with torch.no_grad():
        errors = {}
        for factor in (0.9, 1.0, 1.1):
            sae.W_enc *= factor
            errors[factor] = float((x - sae(x)).square().sum())
            sae.W_enc /= factor
    assert errors[1.0] == min(errors.values())
    torch.testing.assert_close(torch.nn.functional.normalize(sae.W_enc, dim=1), sae.W_dec)

"""BatchTopK, Matryoshka, JumpReLU and ReLU against formulas written out, and the faults of public code."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmhooks.errors import MMHooksError, ShapeMismatch
from mmhooks.heads import (
    SAE,
    BatchTopKSAE,
    JumpReLUSAE,
    MatryoshkaSAE,
    ReLUSAE,
    TopKSAE,
    load_head_dir,
    reconstruction,
    train_head,
)
from mmhooks.heads.sae.jumprelu import count_above, jump_relu
from mmhooks.heads.sae.modality_centres import by_modality
from mmhooks.heads.training.sae_objective import SAEObjective

DEAD = torch.zeros(48, dtype=torch.bool)


def unit(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def shaken(head: SAE, scale: float = 0.1) -> SAE:
    """Biases away from zero, so that one that is dropped or counted twice shows."""
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in (head.b_pre, head.b_enc):
            p.copy_(scale * torch.randn(p.shape, generator=g))
    return head


def loss_of(head: SAE, pairs, objective: SAEObjective | None = None):
    objective = objective or SAEObjective()
    image, text = (unit(x) for x in pairs)
    objective.measure(image, text)
    return objective.loss(head, image, text, DEAD[: head.n_features])


# -- BatchTopK ---------------------------------------------------------------------------------------------


def test_batchtopk_selects_k_a_row_over_the_whole_batch(pairs) -> None:
    """The fault: ``topk(k)`` of the flattened batch keeps k entries of all rows together."""
    head, x = shaken(BatchTopKSAE(16, 48, 5)), unit(pairs[0][:40])
    pre = head.pre(x).detach()
    kept = sorted(pre.flatten().tolist(), reverse=True)[: 5 * 40]
    f = head.select_over_batch(pre)
    assert float(f.sum()) == pytest.approx(sum(v for v in kept if v > 0), rel=1e-5)
    out = head.training_pass(x)
    assert float(out.l0) == sum(v > 0 for v in kept) / 40
    per_row = (f > 0).sum(dim=1)
    assert int(per_row.max()) > 5 > int(per_row.min())  # the batch shares, rows differ
    torch.testing.assert_close(out.recons[0], f @ head.W_dec + head.b_pre)


def test_batchtopk_threshold_is_the_running_mean_of_the_smallest_alive_activation(pairs) -> None:
    head, expected = shaken(BatchTopKSAE(16, 48, 5)), None
    for i in range(4):
        x = unit(pairs[0][i * 50 : (i + 1) * 50])
        f = head.select_over_batch(head.pre(x)).detach()
        least = float(f[f > 0].min())
        expected = least if expected is None else expected + 0.05 * (least - expected)
        head.training_pass(x)
    assert float(head.threshold) == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        head.b_enc.sub_(100.0)  # nothing fires any more: there is no smallest activation to follow
    head.training_pass(unit(pairs[0]))
    assert float(head.threshold) == pytest.approx(expected, rel=1e-5)


def test_batchtopk_in_use_is_its_threshold_whatever_the_batch(pairs) -> None:
    head, x = shaken(BatchTopKSAE(16, 48, 5)), unit(pairs[0])
    head.calibrate(x)
    assert float((head.encode(x) > 0).sum(dim=1).float().mean()) == pytest.approx(5, abs=1e-6)
    alone = torch.stack([head.encode(row) for row in x[:20]])
    for mode in (True, False):  # a head that is still in training mode is no batch function either
        torch.testing.assert_close(head.train(mode).encode(x)[:20], alone, atol=1e-6, rtol=1e-5)
    pre = head.pre(x)
    torch.testing.assert_close(head.encode(x), torch.where(pre > head.threshold, pre, 0.0).relu())


def test_batchtopk_threshold_is_in_the_file_and_refused_where_it_is_missing(pairs, tmp_path) -> None:
    fresh = BatchTopKSAE(16, 48, 5)
    with pytest.raises(MMHooksError, match=r"no inference threshold yet.*calibrate"):
        fresh.encode(pairs[0])
    with pytest.raises(MMHooksError, match="no inference threshold yet"):
        load_head_dir(fresh.save(tmp_path / "fresh")).encode(pairs[0])
    scored: list[float] = []

    class Watching(SAEObjective):
        def score(self, head, image, text):
            scored.append(reconstruction(head, image, text).l0)
            return super().score(head, image, text)

    result = train_head(
        fresh, *pairs, epochs=40, batch_size=100, progress=False, valid=pairs, objective=Watching()
    )
    assert scored[-1] == pytest.approx(5, rel=0.2)  # in training the running average already holds in use
    path = result.head.save(tmp_path / "h")
    weights = load_file(path / "model.safetensors")
    assert float(weights["threshold"]) > 0
    x = unit(pairs[0])
    assert torch.equal(load_head_dir(path).encode(x), fresh.encode(x))
    assert reconstruction(fresh, *pairs).l0 == pytest.approx(
        5, abs=0.01
    )  # calibrated on the training data at the end
    save_file({k: v for k, v in weights.items() if k != "threshold"}, path / "model.safetensors")
    with pytest.raises(MMHooksError, match="missing threshold"):
        load_head_dir(path)


def test_batchtopk_threshold_fits_vectors_centred_by_modality(pairs) -> None:
    head = BatchTopKSAE(16, 48, 5)
    objective = SAEObjective(centre="modality")
    train_head(head, *pairs, epochs=20, batch_size=100, objective=objective, progress=False)
    heads = by_modality(head)
    active = sum(float((heads[m].encode(unit(p)) > 0).sum()) for m, p in zip(heads, pairs, strict=True))
    assert active / 1200 == pytest.approx(5, abs=0.02)


# -- Matryoshka --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [48, 2048])  # the dense step, and the sparse one
@pytest.mark.parametrize("nested", [{"widths": (6, 20, None)}, {"ks": (1, 3, 5)}])
def test_matryoshka_levels_by_hand(pairs, n, nested) -> None:
    if "widths" in nested:
        nested = {"widths": (6, 20, n)}
    head, x = shaken(MatryoshkaSAE(16, n, 5, **nested)), unit(pairs[0][:30])
    f = head.encode(x)
    recons = head.training_pass(x).recons
    assert len(recons) == 3
    for level, recon in enumerate(recons):
        if "widths" in nested:
            part = f.clone()
            part[:, head.levels[level] :] = 0
        else:
            keep = f.topk(head.levels[level], dim=1)
            part = torch.zeros_like(f).scatter(1, keep.indices, keep.values)
        torch.testing.assert_close(recon, part @ head.W_dec + head.b_pre, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("n", [48, 2048])
def test_matryoshka_gradients_equal_those_of_separate_decodes(pairs, n) -> None:
    head, x = shaken(MatryoshkaSAE(16, n, 5, widths=(6, 20, n))), unit(pairs[0][:30])

    def grads(recons: list[torch.Tensor]) -> list[torch.Tensor]:
        loss = sum((x - r).square().sum() for r in recons)
        return list(torch.autograd.grad(loss, list(head.parameters())))

    f = head.encode(x)
    by_hand = [f[:, :m] @ head.W_dec[:m] + head.b_pre for m in head.levels]
    for ours, theirs in zip(grads(head.training_pass(x).recons), grads(by_hand), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_matryoshka_losses_are_averaged_once(pairs) -> None:
    """The fault: a sum over levels already divided by their number, divided again."""
    same = MatryoshkaSAE(16, 48, 5, widths=(48,))
    plain = TopKSAE(16, 48, 5)
    assert float(loss_of(same, pairs).loss.detach()) == pytest.approx(
        float(loss_of(plain, pairs).loss.detach()), rel=1e-6
    )
    head = shaken(MatryoshkaSAE(16, 48, 5, widths=(6, 20, 48)))
    expected = 0.0
    for x in (unit(p) for p in pairs):
        for m in head.levels:
            f = head.encode(x)
            error = x - (f[:, :m] @ head.W_dec[:m] + head.b_pre)
            expected += float((error.square().sum() / (x - x.mean(dim=0)).square().sum()).detach()) / 2 / 3
    step = loss_of(head, pairs)
    assert float(step.loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_matryoshka_training_puts_the_broad_features_first(pairs) -> None:
    def first_features(head: SAE) -> float:
        train_head(head, *pairs, epochs=40, batch_size=100, lr=3e-3, progress=False)
        x = unit(pairs[0])
        recon = head.encode(x)[:, :6] @ head.W_dec[:6] + head.b_pre
        return float((x - recon).square().sum() / (x - x.mean(0)).square().sum())

    assert first_features(MatryoshkaSAE(16, 48, 5, widths=(6, 48))) < 0.7 * first_features(TopKSAE(16, 48, 5))


@pytest.mark.parametrize(
    ("nested", "words"),
    [
        ({"widths": (8, 40)}, r"n_features = 48, got \[8, 40\]"),
        ({"widths": (20, 8, 48)}, "must increase"),
        ({"ks": (0, 5)}, "at least 1"),
        ({"ks": (2, 6)}, "k = 5"),
        ({"ks": (5,), "widths": (48,)}, "not both"),
    ],
)
def test_matryoshka_refuses_levels_that_are_none(nested, words) -> None:
    with pytest.raises(ShapeMismatch, match=words):
        MatryoshkaSAE(16, 48, 5, **nested)


# -- JumpReLU ----------------------------------------------------------------------------------------------


def test_jumprelu_estimators_against_the_papers_formulas() -> None:
    g = torch.Generator().manual_seed(0)
    z = torch.randn(50, 3, 8, generator=g, dtype=torch.float64).requires_grad_()
    theta = (0.2 + torch.rand(8, generator=g, dtype=torch.float64)).requires_grad_()
    weight, width = torch.randn(50, 3, 8, generator=g, dtype=torch.float64), 0.3
    kernel = (((z - theta) / width).abs() < 0.5).double() / width
    f = jump_relu(z, theta, width)
    torch.testing.assert_close(f, z * (z > theta))
    dz, dtheta = torch.autograd.grad((f * weight).sum(), (z, theta))
    torch.testing.assert_close(dz, weight * (z > theta))
    torch.testing.assert_close(dtheta, (-theta * kernel * weight).sum(dim=(0, 1)))
    count = count_above(z, theta, width)
    torch.testing.assert_close(count, (z > theta).double())
    (dtheta,) = torch.autograd.grad((count * weight).sum(), theta)
    torch.testing.assert_close(dtheta, (-kernel * weight).sum(dim=(0, 1)))


def test_jumprelu_estimator_is_the_slope_of_the_mean_over_many_samples() -> None:
    """What the kernel estimates: the derivative in theta of the *expected* L0, here of a uniform variable."""
    z = torch.rand(400_000, 1, generator=torch.Generator().manual_seed(1))
    theta = torch.tensor([0.5], requires_grad=True)
    (slope,) = torch.autograd.grad(count_above(z, theta, 0.1).mean(), theta)
    assert float(slope) == pytest.approx(-1.0, rel=0.02)  # d/dtheta P(z > theta) = -1
    (slope,) = torch.autograd.grad(jump_relu(z, theta, 0.1).mean(), theta)
    assert float(slope) == pytest.approx(-0.5, rel=0.02)  # d/dtheta E[z; z > theta] = -theta


def test_jumprelu_objective_weighs_l0_or_holds_it_at_a_target(pairs) -> None:
    head = shaken(JumpReLUSAE(16, 48, threshold=0.2))
    plain = loss_of(head, pairs, SAEObjective(penalty=0.0))
    l0 = float(plain.parts["l0"])
    assert l0 == pytest.approx(reconstruction(head, *pairs).l0, rel=1e-6)
    linear = loss_of(head, pairs, SAEObjective(penalty=0.01)).loss - plain.loss
    assert float(linear.detach()) == pytest.approx(0.01 * l0, rel=1e-4)
    held = loss_of(head, pairs, SAEObjective(target_l0=4.0)).loss - plain.loss
    assert float(held.detach()) == pytest.approx((l0 / 4 - 1) ** 2, rel=1e-4)


def test_jumprelu_target_is_that_of_the_whole_batch_when_processes_share_it(pairs) -> None:
    """Two halves whose gradients are averaged, as processes do, give the gradient of the whole."""
    head = shaken(JumpReLUSAE(16, 48, threshold=0.2))
    image, text = (unit(p) for p in pairs)

    def gradient(rows: slice, whole: torch.Tensor | None) -> torch.Tensor:
        objective = SAEObjective(target_l0=4.0)
        objective.measure(image, text)
        if whole is not None:
            objective.across = lambda x: whole
        out = head.training_pass(torch.cat([image[rows], text[rows]]))
        assert out.penalty is not None
        (grad,) = torch.autograd.grad(objective._penalty(head, out.penalty), head.threshold_log)
        return grad

    whole = head.training_pass(torch.cat([image, text])).penalty
    assert whole is not None
    halves = [gradient(rows, whole.detach()) for rows in (slice(0, 300), slice(300, 600))]
    torch.testing.assert_close((halves[0] + halves[1]) / 2, gradient(slice(0, 600), None))
    by_hand = (whole / 4 - 1).square()
    (expected,) = torch.autograd.grad(by_hand, head.threshold_log)
    torch.testing.assert_close(gradient(slice(0, 600), None), expected)


def test_jumprelu_training_reaches_its_target(pairs) -> None:
    head = JumpReLUSAE(16, 48, threshold=0.1)
    before = head.threshold.detach().clone()
    assert reconstruction(head, *pairs).l0 > 8
    objective = SAEObjective(target_l0=5.0)
    objective.start(head, *(unit(p) for p in pairs))
    assert reconstruction(head, *pairs).l0 == pytest.approx(5, rel=0.01)  # where training starts
    train_head(head, *pairs, epochs=40, batch_size=100, lr=5e-3, objective=objective, progress=False)
    got = reconstruction(head, *pairs)
    assert got.l0 == pytest.approx(5, rel=0.2)
    assert reconstruction(head, pairs[0]).fvu < 0.3
    assert bool((head.threshold != before).any()) and bool((head.threshold > 0).all())


# -- ReLU --------------------------------------------------------------------------------------------------


def test_relu_penalty_weighs_each_feature_by_its_decoder_norm(pairs) -> None:
    head = shaken(ReLUSAE(16, 48))
    with torch.no_grad():
        head.W_dec.mul_(torch.linspace(0.5, 2, 48)[:, None])
    objective = SAEObjective(penalty=0.2)
    step = loss_of(head, pairs, objective)
    x = torch.cat([unit(p) for p in pairs])
    l1 = (head.encode(x) * head.W_dec.norm(dim=1)).sum(dim=1).mean()
    spread = torch.stack([(unit(p) - unit(p).mean(0)).square().sum(1).mean() for p in pairs]).mean().sqrt()
    assert float(step.parts["penalty"]) == pytest.approx(float((0.2 * l1 / spread).detach()), rel=1e-5)
    total = step.parts["penalty"] + step.parts["fvu"]
    assert float(step.loss.detach()) == pytest.approx(float(total), rel=1e-6)


def test_folding_norms_changes_no_reconstruction(pairs) -> None:
    head, x = shaken(ReLUSAE(16, 48)), unit(pairs[0])
    with torch.no_grad():
        head.W_dec.mul_(torch.linspace(0.5, 2, 48)[:, None])
    before = head(x)
    head.fold_norms()
    torch.testing.assert_close(head(x), before, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(head.W_dec.norm(dim=1), torch.ones(48))


def test_relu_more_penalty_is_sparser(pairs) -> None:
    def trained(penalty: float) -> ReLUSAE:
        head = ReLUSAE(16, 48)
        objective = SAEObjective(penalty=penalty)
        train_head(head, *pairs, epochs=40, batch_size=100, lr=3e-3, objective=objective, progress=False)
        torch.testing.assert_close(head.W_dec.norm(dim=1), torch.ones(48))
        return head

    light, heavy = (reconstruction(trained(p), *pairs) for p in (0.003, 0.3))
    assert heavy.l0 < 0.7 * light.l0
    assert light.fvu < heavy.fvu


# -- all of them -------------------------------------------------------------------------------------------

KINDS = {
    "topk": lambda: TopKSAE(16, 48, 5),
    "batchtopk": lambda: BatchTopKSAE(16, 48, 5),
    "matryoshka": lambda: MatryoshkaSAE(16, 48, 5),
    "nested K": lambda: MatryoshkaSAE(16, 48, 5, ks=(1, 2, 5)),
    "jumprelu": lambda: JumpReLUSAE(16, 48),
    "relu": lambda: ReLUSAE(16, 48),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_training_pass_carries_gradient_to_the_input_and_every_parameter(pairs, kind) -> None:
    head, x = shaken(KINDS[kind](), 0.02), unit(pairs[0]).requires_grad_()
    out = head.training_pass(x)
    loss = sum(r.square().sum() for r in out.recons) + (0 if out.penalty is None else out.penalty)
    grads = torch.autograd.grad(loss, (x, *head.parameters()))
    assert all(float(g.abs().sum()) > 0 for g in grads)


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_fvu_and_resumes_with_the_same_bits(pairs, held_out, tmp_path, kind) -> None:
    start, whole, resumed = KINDS[kind](), KINDS[kind](), KINDS[kind]()
    if isinstance(start, BatchTopKSAE):
        start.calibrate(*pairs)
    settings = {"batch_size": 100, "lr": 3e-3, "progress": False, "valid": held_out, "epochs": 30}
    train_head(whole, *pairs, **settings)
    # Halves: a run of 30 epochs that stops after 11, and its continuation from the checkpoint.
    path = tmp_path / "c"

    class Stop(Exception): ...

    class Stopping(SAEObjective):
        left = 11 * 6

        def loss(self, head, image, text, dead):
            self.left -= 1
            if self.left < 0:
                raise Stop
            return super().loss(head, image, text, dead)

        def settings(self):
            return SAEObjective().settings()

    Stopping.__name__ = "SAEObjective"  # the same training to the checkpoint's fingerprint
    with pytest.raises(Stop):
        train_head(KINDS[kind](), *pairs, checkpoint=path, objective=Stopping(), **settings)
    train_head(resumed, *pairs, checkpoint=path, **settings)
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert reconstruction(whole, held_out[0]).fvu < min(0.4, reconstruction(start, held_out[0]).fvu)


@pytest.mark.parametrize("kind", KINDS)
def test_dead_features_learn_through_auxk_in_every_kind(pairs, kind) -> None:
    head = KINDS[kind]()
    dead = DEAD.clone()
    dead[[2, 7, 11]] = True
    with torch.no_grad():
        head.b_enc[dead] = -0.05
    image, text = (unit(p) for p in pairs)
    objective = SAEObjective(aux_weight=1.0)
    objective.measure(image, text)
    grads = []
    for mask in (dead, DEAD):
        head.zero_grad()
        objective.loss(head, image, text, mask).loss.backward()
        grads.append(head.W_enc.grad.clone())
    moved = (grads[0] - grads[1]).abs().sum(dim=1)
    assert bool((moved[dead] > 1e-7).all()) and float(moved[~dead].max()) < 1e-5


def test_options_that_a_head_has_no_use_for_are_refused(pairs) -> None:
    with pytest.raises(MMHooksError, match=r"penalty=0.1: a topk head has no penalty"):
        train_head(TopKSAE(16, 48, 5), *pairs, objective=SAEObjective(penalty=0.1), progress=False)
    with pytest.raises(MMHooksError, match="target_l0=5.0: expected a jumprelu head"):
        train_head(ReLUSAE(16, 48), *pairs, objective=SAEObjective(target_l0=5.0), progress=False)


# -- faults that would bend every number -------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_fvu_of_the_mean_alone_is_one_wherever_the_cloud_lies(kind) -> None:
    """The fault: a variance about zero, or about one number for all dimensions, in place of the mean vector."""
    g = torch.Generator().manual_seed(2)
    clouds = [torch.randn(300, 16, generator=g) * 0.1 + torch.linspace(3, 9, 16) * sign for sign in (1, -1)]
    head = KINDS[kind]()
    head.normalize_input = False
    with torch.no_grad():
        head.W_dec.zero_()
        if isinstance(head, BatchTopKSAE):
            head.threshold.fill_(0.1)
    for x in clouds:
        with torch.no_grad():
            head.b_pre.copy_(x.mean(dim=0))
        assert reconstruction(head, x).fvu == pytest.approx(1, rel=1e-4)
        objective = SAEObjective(penalty=0.0 if head.penalty_weight else None)
        objective.measure(x, None)
        assert float(objective.loss(head, x, None, DEAD).parts["fvu"]) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_pre_bias_counts_once_everywhere(pairs, kind) -> None:
    """The fault: ``b_dec`` added by the decoder and again by the loss, AuxK or a nested level."""
    head, x = KINDS[kind](), unit(pairs[0][:50])
    with torch.no_grad():
        head.b_pre.copy_(torch.linspace(-1, 1, 16))
        head.b_enc.fill_(-1e4)  # nothing fires: every reconstruction is the pre-bias
        if isinstance(head, BatchTopKSAE):
            head.threshold.fill_(0.1)
    for recon in (*head.training_pass(x).recons, head(x), head.decode(torch.zeros(50, 48))):
        torch.testing.assert_close(recon, head.b_pre.expand(50, 16))
    shaken(head)
    dead = DEAD.clone()
    dead[[2, 7, 11]] = True
    error = torch.randn(50, 16, generator=torch.Generator().manual_seed(4))
    pre = head.pre(x)[:, dead]
    top = pre.topk(2, dim=1)
    guess = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu()) @ head.W_dec[dead]
    expected = (error - guess).square().sum() / error.square().sum()  # the error holds no bias, nor does e'
    torch.testing.assert_close(SAEObjective(aux_k=2).auxiliary(head, x, error, dead), expected)

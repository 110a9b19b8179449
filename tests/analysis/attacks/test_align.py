"""Alignment: the loss and its gradients against direct computation, and inputs that must not change it."""

import copy

import pytest
import torch

import mmhooks as mm
from mmhooks.analysis.attacks.align import align, features_of, pixel_scale, samples_of
from mmhooks.analysis.attacks.pixels import optimise_pixels, psnr
from mmhooks.errors import MMHooksError, NotFinite, ShapeMismatch, WrongHead

SITE = "image.embed.sae.pre"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = mm.load("mini")
    model.attach(mm.load_head("mini/sae-wide"), at="image.embed", name="sae")
    return model


@pytest.fixture(scope="module")
def pictures():
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def by_hand(model, x, partner, wanted):
    """Computes L of one image step by step: preprocessing, tower, unit norm, encoder, chosen features, 2-norm."""
    head = model.places.attachments["image.embed.sae"].head
    z = [model.encode_image((p - 0.5) / 0.5) for p in (x, partner)]
    f = [head.pre(v / v.norm(dim=-1, keepdim=True)) for v in z]
    return torch.linalg.vector_norm(f[0][:, wanted] - f[1][:, wanted], dim=1)


def test_history_starts_at_the_loss_written_by_hand(model, pictures):
    features = mm.FeatureSet([3, 50, 700], 1024)
    made = align(model, pictures, pictures.roll(1, 0), features, steps=2, lr=0.002, progress=False)
    with torch.no_grad():
        expected = by_hand(model, pictures, pictures.roll(1, 0), features.indices)
        after = by_hand(model, made.images, pictures.roll(1, 0), features.indices)
    assert torch.allclose(made.history[0], expected, atol=1e-5)
    assert torch.allclose(made.history[-1], after, atol=1e-5)
    assert bool((made.history[-1] < made.history[0]).all())


def test_gradients_reach_pixels_through_head_tower_and_preprocessing(pictures):
    model = copy.deepcopy(mm.load("mini"))
    model.model.double()
    model.attach(mm.load_head("mini/sae-wide").double(), at="image.embed", name="sae")
    wanted = torch.tensor([5, 90, 400])
    with torch.no_grad():
        goal = features_of(model, pictures[1:2].double(), site=SITE)[:, wanted]

    def loss(x):
        return (features_of(model, x, site=SITE)[:, wanted] - goal).square().sum().sqrt()

    x = pictures[:1].double().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x), x)
    dice = torch.Generator().manual_seed(2)
    for _ in range(6):  # along random directions and along single pixels
        step = torch.randn(x.shape, generator=dice, dtype=torch.float64)
        step = step / step.norm()
        with torch.no_grad():
            numeric = (loss(x + 1e-5 * step) - loss(x - 1e-5 * step)) / 2e-5
        assert float((gradient * step).sum()) == pytest.approx(float(numeric), rel=1e-5, abs=1e-9)
    for c, i, j in ((0, 31, 31), (1, 10, 50), (2, 63, 0)):
        step = torch.zeros_like(x)
        step[0, c, i, j] = 1e-5
        with torch.no_grad():
            numeric = (loss(x + step) - loss(x - step)) / 2e-5
        assert float(gradient[0, c, i, j]) == pytest.approx(float(numeric), rel=1e-4, abs=1e-9)


def test_features_outside_the_set_do_not_move_the_loss(model, pictures):
    """All other features of image and partner are scaled arbitrarily: same loss, same gradient, same pixels."""
    features = mm.FeatureSet(range(0, 1024, 7), 1024)
    outside = (~features).indices

    def scaled(factor):
        def fn(f, *, hook):
            f = f.clone()
            f[:, outside] *= factor
            return f

        return model.hooks(fwd_hooks=[(SITE, fn)])

    def run(chosen):
        return align(model, pictures[:1], pictures[1:2], chosen, steps=3, lr=0.002, progress=False)

    plain, plain_all = run(features), run(None)
    with scaled(30.0):
        moved, moved_all = run(features), run(None)
    assert torch.equal(plain.history, moved.history)
    assert torch.equal(plain.images, moved.images)
    assert float(moved_all.history[0] / plain_all.history[0]) > 5  # the disturbance was real


def test_a_mask_per_image_equals_one_image_at_a_time(model, pictures):
    group = mm.FeatureSet(range(100), 1024)
    masks = samples_of(group, 10, 3, seed=5)
    assert masks.sum(1).tolist() == [10, 10, 10] and not torch.equal(masks[0], masks[1])
    together = align(model, pictures, pictures.roll(1, 0), masks, steps=2, progress=False)
    for i in range(3):
        alone = align(
            model,
            pictures[i : i + 1],
            pictures.roll(1, 0)[i : i + 1],
            masks[i : i + 1],
            steps=2,
            progress=False,
        )
        assert torch.allclose(alone.history[:, 0], together.history[:, i], atol=1e-4)


def test_batch_size_does_not_matter_and_steps_are_kept(model, pictures):
    how = {"steps": 2, "progress": False, "keep": (0, 1, 2)}
    one = align(model, pictures, pictures.roll(1, 0), batch=8, **how)
    other = align(model, pictures, pictures.roll(1, 0), batch=1, **how)
    assert torch.allclose(one.history, other.history, atol=1e-4)
    assert torch.equal(one.kept[0], pictures) and torch.equal(one.kept[2], one.images)
    assert not torch.equal(one.kept[1], one.images)


def test_an_image_that_equals_its_partner_stays(model, pictures):
    made = align(model, pictures, pictures, steps=2, progress=False)
    assert float((made.images - pictures).abs().max()) == 0
    assert torch.isinf(made.psnr).all()


def test_bad_input_is_named(model, pictures):
    with pytest.raises(ShapeMismatch, match="between 0 and 1"):
        align(model, pictures * 2, pictures, progress=False)
    with pytest.raises(ShapeMismatch, match="same size"):
        align(model, pictures, pictures[:2], progress=False)
    with pytest.raises(WrongHead, match="2048"):
        align(model, pictures, pictures, mm.FeatureSet([1], 2048), progress=False)
    with pytest.raises(WrongHead, match="another"):
        align(model, pictures, pictures, mm.FeatureSet([1], 1024, head="another"), progress=False)
    with pytest.raises(ShapeMismatch, match="empty"):
        align(model, pictures, pictures, mm.FeatureSet([], 1024), progress=False)
    with pytest.raises(ShapeMismatch, match="empty rows"):
        align(model, pictures, pictures, torch.zeros(3, 1024, dtype=torch.bool), progress=False)
    with pytest.raises(MMHooksError, match="nope"):
        align(model, pictures, pictures, site="image.embed.nope.pre", progress=False)


def test_scale_is_read_from_the_preprocessing():
    model = mm.load("mini")
    model.preprocess = lambda picture: picture
    with pytest.raises(MMHooksError, match="scale="):
        pixel_scale(model)
    import open_clip

    model.preprocess = open_clip.image_transform(64, is_train=False)
    mean, _ = pixel_scale(model)
    assert mean.flatten().tolist() == pytest.approx(open_clip.OPENAI_DATASET_MEAN)


# -- pixels ------------------------------------------------------------------------------------------------


def test_pixels_follow_adam_and_stay_in_range():
    """Compared with torch's Adam and the same clamps."""
    start = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    goal = torch.linspace(-0.5, 1.5, 96).view(2, 3, 4, 4)
    made = optimise_pixels(
        start,
        lambda x, i: (x - goal[i]).square().sum((1, 2, 3)),
        steps=5,
        lr=0.1,
        epsilon=0.2,
        progress=False,
    )
    x = start.clone().requires_grad_()
    adam = torch.optim.Adam([x], lr=0.1)
    for _ in range(5):
        adam.zero_grad()
        (x - goal).square().sum().backward()
        adam.step()
        x.data = x.data.clamp(start - 0.2, start + 0.2).clamp(0, 1)
    assert torch.allclose(made.images, x.detach(), atol=1e-6)
    assert made.images.min() >= 0 and made.images.max() <= 1
    assert float(made.linf.max()) <= 0.2 + 1e-6
    assert made.history.shape == (6, 2)


def test_psnr_by_hand():
    a, b = torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.25)
    assert float(psnr(a, b)) == pytest.approx(-20 * torch.log10(torch.tensor(0.25)).item())


def test_invalid_losses_are_refused(pictures):
    with pytest.raises(MMHooksError, match="does not depend"):
        optimise_pixels(pictures, lambda x, i: torch.zeros(len(i)), progress=False)
    with pytest.raises(ShapeMismatch, match="one value per image"):
        optimise_pixels(pictures, lambda x, i: x.sum(), progress=False)
    with pytest.raises(NotFinite, match="image 2"):
        optimise_pixels(
            pictures, lambda x, i: torch.where(i == 2, torch.nan, 1.0) * x.sum((1, 2, 3)), progress=False
        )
    with pytest.raises(MMHooksError, match="keep"):
        optimise_pixels(pictures, lambda x, i: x.sum((1, 2, 3)), steps=2, keep=(3,), progress=False)

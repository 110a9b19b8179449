"""Ablations of neurons against the public code's loop over images, and against hooks written by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import mmhooks as mm
from mmhooks.analysis.decomposition.neuron_effects import second_order_effects
from mmhooks.errors import DataError, ShapeMismatch, WrongOrigin

LAYER, NEURONS = 3, list(range(0, 768, 4))


@pytest.fixture(scope="module")
def model():
    return mm.load("mini")


@pytest.fixture(scope="module")
def pixels(model):
    pairs = mm.data.pairs("mini", limit=24)
    return torch.stack([model.preprocess(pairs.image(i)) for i in range(24)])


@pytest.fixture(scope="module")
def found(model, pixels):
    return mm.neuron_directions(model, pixels[:12], layer=LAYER, neurons=NEURONS, top_k=6)


@torch.no_grad()
def public_ablation(model, pixels, found, along):
    """``compute_ablations.py``, image by image; ``coefficient`` 1."""
    effects = second_order_effects(model, pixels, layer=LAYER, neurons=NEURONS, shared=True).vectors()
    embedding = model.encode_image(pixels)
    length = embedding.norm(dim=1, keepdim=True)
    effects, representation = (effects / length[:, None]).numpy(), (embedding / length).numpy()
    mean, thresholds = found.mean.numpy(), found.top_sizes[:, -1].numpy()
    rows = {kind: [] for kind in ("all", "significant", "insignificant", "off their directions")}
    for b in range(len(pixels)):
        moved = effects[b] - mean
        without = representation[b] - effects[b].sum(0) + mean.sum(0)
        significant = np.linalg.norm(moved, axis=-1) > thresholds
        rows["all"].append(without)
        rows["significant"].append(without + moved[~significant].sum(0))
        rows["insignificant"].append(without + moved[significant].sum(0))
        back = np.einsum("nd,nd->n", moved, along)[:, None] * along
        rows["off their directions"].append(without + back.sum(0))
    return {kind: np.stack(found) for kind, found in rows.items()}


@pytest.mark.parametrize("rebuilt", [False, True])
def test_accuracies_equal_the_public_code(model, pixels, found, rebuilt):
    labels = torch.arange(12) % 5
    classes = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
    # The classes lie close to what the ablation moves, so that accuracies differ between its kinds.
    classes[:3] = 0.1 * classes[:3] + found.direction[:3]
    along = found.direction if not rebuilt else 0.7 * found.direction
    expected = public_ablation(model, pixels[12:], found, along.numpy())
    got = mm.ablate_neurons(
        model, pixels[12:], labels, classes, found, directions=along if rebuilt else None, batch_size=5
    )
    unit = torch.nn.functional.normalize(classes, dim=1)
    for kind, embeddings in expected.items():
        right = (torch.from_numpy(embeddings).float() @ unit.T).argmax(1) == labels
        assert got.without[kind].value == pytest.approx(float(right.float().mean())), kind
        assert got.change[kind].value == pytest.approx(got.without[kind].value - got.before.value), kind
        # Twelve images see no change of less than a fifth, and no width is 0 where none changes.
        assert 0.2 < got.detectable[kind] < 1 and got.change[kind].low < got.change[kind].high
    loader = [(pixels[12:18], labels[:6]), (pixels[18:], labels[6:])]
    again = mm.ablate_neurons(model, loader, None, classes, found, directions=along if rebuilt else None)
    assert again == got and got.before.n == 12 and got.table()[0]["ablated"] == "nothing"


@torch.no_grad()
def test_predictions_against_hooks_by_hand(model, pixels):
    """One neuron set to its mean by a plain hook; its second-order and direct effects by vectors token by token."""
    neuron, site = 40, f"image.blocks.{LAYER}.mlp.post"
    got = mm.predict_ablations(model, list(pixels.split(9)), layer=LAYER, neurons=[neuron, 41], batch_size=5)
    _, c = model.run_with_cache(pixels, sites=["image.blocks.*"])
    mean = c[site][..., neuron].mean(0)
    before = model.encode_image(pixels)

    def at_mean(value, *, hook):
        value = value.clone()
        value[..., neuron] = mean
        return value

    with model.hooks(fwd_hooks=[(site, at_mean)]):
        real = model.encode_image(pixels) - before
    blocks, visual = model.model.visual.transformer.resblocks, model.model.visual
    wrote = (mean - c[site][..., neuron])[..., None] * blocks[LAYER].mlp.c_proj.weight[:, neuron]
    last = c["image.blocks.5.resid_post"][:, 0]
    sigma = (last.var(-1, correction=0, keepdim=True) + visual.ln_post.eps).sqrt()

    def read(stream):
        return (stream - stream.mean(-1, keepdim=True)) / sigma * visual.ln_post.weight @ visual.proj

    direct, second = read(wrote[:, 0]), 0
    for n in (4, 5):
        x, ln, attn = c[f"image.blocks.{n}.resid_pre"], blocks[n].ln_1, blocks[n].attn
        normed = (wrote - wrote.mean(-1, keepdim=True)) / (
            x.var(-1, correction=0, keepdim=True) + ln.eps
        ).sqrt()
        v = (normed * ln.weight @ attn.in_proj_weight.chunk(3)[2].T).unflatten(-1, (6, -1))
        mixed = torch.einsum("bht,bthk->bhk", c[f"image.blocks.{n}.attn.pattern"][:, :, 0], v).flatten(1)
        second = second + read(mixed @ attn.out_proj.weight.T)
    squares = float(real.square().sum())
    for name, predicted in (("second", second), ("direct", direct), ("both", second + direct)):
        expected = 1 - float((real - predicted).square().sum()) / squares
        assert float(getattr(got, name)[0]) == pytest.approx(expected, abs=1e-3), name
    cosine = torch.cosine_similarity(real, second, dim=1).mean()
    assert float(got.cosine[0]) == pytest.approx(float(cosine), abs=1e-3)
    assert float(got.size[0]) == pytest.approx((squares / float(before.square().sum())) ** 0.5, rel=1e-3)
    assert float(got.both.min()) > 0.3 and got.n_samples == 24
    assert [row["predicted by"] for row in got.table()][:2] == ["second-order effects", "direct effects"]


def test_wrong_input_is_named(model, pixels, found):
    labels, classes = torch.zeros(12, dtype=torch.long), torch.randn(2, 256)
    with pytest.raises(ShapeMismatch, match="directions: expected one per neuron, 192, got 3"):
        mm.ablate_neurons(model, pixels[12:], labels, classes, found, directions=torch.randn(3, 256))
    with pytest.raises(DataError, match="at least one image with its label"):
        mm.ablate_neurons(model, [], None, classes, found)
    from mmhooks.models.embedded.mini import build

    with pytest.raises(WrongOrigin, match="found="):
        mm.ablate_neurons(mm.HookedCLIP(build().eval()), pixels[12:], labels, classes, found)

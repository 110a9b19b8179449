"""Neurons' directions against the public code's algorithm, written out neuron by neuron and head by head."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import mmhooks as mm
from mmhooks.analysis.decomposition.neuron_effects import second_order_effects
from mmhooks.errors import DataError, ShapeMismatch

LAYER, NEURONS = 2, [0, 17, 500]


@pytest.fixture(scope="module")
def model():
    return mm.load("mini")


@pytest.fixture(scope="module")
def pixels(model):
    pairs = mm.data.pairs("mini", limit=20)
    return torch.stack([model.preprocess(pairs.image(i)) for i in range(20)])


@torch.no_grad()
def public_effects(model, pixels, layer, neurons):
    """``prs_second_order_neurons_hook.py``: every mean and bias is divided evenly among components, heads and neurons."""
    visual = model.model.visual
    blocks = visual.transformer.resblocks
    depth, heads, width = len(blocks), blocks[0].attn.num_heads, blocks[0].mlp.c_proj.in_features
    embedding, c = model.run_with_cache(pixels, sites=["image.blocks.*"])
    last = c[f"image.blocks.{depth - 1}.resid_post"][:, 0]
    post_mean = last.mean(-1, keepdim=True)
    post_std = (last.var(-1, correction=0, keepdim=True) + visual.ln_post.eps).sqrt()
    found = []
    for neuron in neurons:
        project = blocks[layer].mlp.c_proj
        wrote = c[f"image.blocks.{layer}.mlp.post"][..., neuron, None] * project.weight[:, neuron]
        wrote = wrote + project.bias / width
        total = 0
        for n in range(layer + 1, depth):
            x, ln, attn = c[f"image.blocks.{n}.resid_pre"], blocks[n].ln_1, blocks[n].attn
            term = (1 + 2 * n) * width
            std = (x.var(-1, correction=0, keepdim=True) + ln.eps).sqrt()
            normed = ln.weight * (wrote - x.mean(-1, keepdim=True) / term) / std + ln.bias / term
            w_v, b_v = attn.in_proj_weight.chunk(3)[2], attn.in_proj_bias.chunk(3)[2]
            size = len(w_v) // heads
            for h in range(heads):
                part = slice(h * size, (h + 1) * size)
                v = normed @ w_v[part].T + b_v[part] / term
                mixed = torch.einsum("bm,bmc->bc", c[f"image.blocks.{n}.attn.pattern"][:, h, 0], v)
                out = mixed @ attn.out_proj.weight[:, part].T + attn.out_proj.bias / (term * heads)
                pieces = term * heads * (1 + 2 * depth)
                normed_out = visual.ln_post.weight * (out - post_mean / pieces) / post_std
                total = total + (normed_out + visual.ln_post.bias / pieces) @ visual.proj
        found.append(total / embedding.image.norm(dim=1, keepdim=True))
    return torch.stack(found, 1)


def public_directions(effects, top_k):
    """``compute_pcas.py``."""
    mean, pcas, norms, rows = effects.mean(axis=0), [], [], []
    for neuron in range(effects.shape[1]):
        current = effects[:, neuron] - mean[neuron]
        important = np.argsort(np.linalg.norm(current, axis=-1))[-top_k:]
        norms.append(np.sort(np.linalg.norm(current, axis=-1))[-top_k:])
        _, _, vh = np.linalg.svd(current[important], full_matrices=False)
        positive = np.count_nonzero(current[important] @ vh[0] > 0)
        pcas.append(vh[0] if positive > top_k // 2 else -vh[0])
        rows.append(important[::-1])
    return mean, np.stack(pcas), np.stack(norms)[:, ::-1], np.stack(rows)


def test_shared_effects_equal_the_public_code(model, pixels):
    found = second_order_effects(model, pixels, layer=LAYER, neurons=NEURONS, shared=True)
    embedding = model.encode_image(pixels).detach()
    expected = public_effects(model, pixels, LAYER, NEURONS)
    ours = found.vectors() / embedding.norm(dim=1)[:, None, None]
    assert torch.allclose(ours, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)
    alone = second_order_effects(model, pixels, layer=LAYER, neurons=NEURONS)
    assert alone.common is None and not torch.allclose(alone.vectors(), found.vectors(), atol=1e-4)


@pytest.mark.parametrize("top_k", [7, 19])
def test_directions_equal_the_public_code(model, pixels, top_k):
    mean, pcas, norms, rows = public_directions(
        public_effects(model, pixels, LAYER, NEURONS).double().numpy(), top_k
    )
    found = mm.neuron_directions(
        model, list(pixels.split(7)), layer=LAYER, neurons=NEURONS, top_k=top_k, batch_size=4
    )
    assert np.abs(found.mean.numpy() - mean).max() < 1e-4 * np.abs(mean).max()
    assert np.abs(found.direction.numpy() - pcas).max() < 1e-3
    assert np.allclose(found.top_sizes.numpy(), norms, rtol=1e-3)
    assert np.allclose(found.threshold.numpy(), norms[:, -1], rtol=1e-3)
    assert found.top.tolist() == rows.tolist() and found.n_samples == 20
    assert len(found.table(2)) == 2 and "direction" not in found.to_json()


def test_of_fewer_images_all_count_and_a_draw_is_decided_by_the_longest(model, pixels):
    found = mm.neuron_directions(model, pixels, layer=LAYER, neurons=list(range(60)), top_k=100)
    assert found.top.shape == (60, 20)
    assert torch.equal(found.top.sort(dim=1).values, torch.arange(20).expand(60, -1))
    effects = second_order_effects(model, pixels, layer=LAYER, neurons=list(range(60)), shared=True).vectors()
    effects = effects / model.encode_image(pixels).detach().norm(dim=1)[:, None, None]
    effects = effects - effects.mean(0)
    along = torch.einsum("bne,ne->bn", effects, found.direction)
    positive = (along > 0).sum(0)
    assert bool((positive >= 10).all()) and bool((positive == 10).any())
    weighted = (along * effects.square().sum(2)).sum(0)
    assert bool((weighted[positive == 10] > 0).all())


def test_without_shared_terms_the_effects_are_the_neurons_own(model, pixels):
    found = mm.neuron_directions(model, pixels, layer=LAYER, neurons=NEURONS, top_k=5, shared=False)
    vectors = second_order_effects(model, pixels, layer=LAYER, neurons=NEURONS).vectors()
    vectors = vectors / model.encode_image(pixels).detach().norm(dim=1)[:, None, None]
    mean, pcas, norms, _ = public_directions(vectors.double().numpy(), 5)
    assert np.abs(found.direction.numpy() - pcas).max() < 1e-3 and not found.shared
    assert np.allclose(found.top_sizes.numpy(), norms, rtol=1e-3)
    first = np.linalg.svd(vectors[found.top[1], 1].double().numpy() - mean[1])[1] ** 2
    assert float(found.explained[1]) == pytest.approx(first[0] / first.sum(), rel=1e-3)


def test_errors_of_images(model, pixels):
    with pytest.raises(ShapeMismatch, match="top_k: expected at least 1, got 0"):
        mm.neuron_directions(model, pixels, layer=LAYER, neurons=[0], top_k=0)
    with pytest.raises(DataError, match="at least two images, got 1"):
        mm.neuron_directions(model, pixels[:1], layer=LAYER, neurons=[0])
    with pytest.raises(DataError, match="read twice"):
        mm.neuron_directions(model, iter(pixels.split(2)), layer=LAYER, neurons=[0])

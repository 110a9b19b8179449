"""Saliency maps and segmentation scores against their definitions."""

from __future__ import annotations

import open_clip
import pytest
import torch
from torchmetrics.functional.classification import binary_average_precision, binary_jaccard_index

import mmhooks as mm
from mmhooks.analysis.attribution.saliency import (
    METHODS,
    gradient_attention,
    legrad,
    raw_attention,
    rollout,
    token_contributions,
)
from mmhooks.analysis.attribution.segmentation_scores import segmentation_scores
from mmhooks.errors import NotFinite, ShapeMismatch


@pytest.fixture(scope="module")
def mini() -> mm.HookedCLIP:
    return mm.load("mini")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_token_contributions_use_each_images_own_direction(mini):
    pixels, directions = random(3, 3, 64, 64), random(3, 256, seed=1)
    found = token_contributions(mini, pixels, directions)
    for i in range(3):
        tokens = mm.decompose(mini, pixels[i : i + 1], tokens=True).tokens[0]
        expected = (tokens.sum((0, 1)) @ directions[i])[1:].view(8, 8)
        torch.testing.assert_close(found[i], expected, rtol=1e-3, atol=1e-4)


def test_attention_and_rollout_equal_matrix_products(mini):
    pixels = random(2, 3, 64, 64)
    directions = random(2, 256)
    with torch.no_grad():
        _, cache = mini.run_with_cache(pixels, sites=["image.blocks.*.attn.pattern"])
    means = [pattern.mean(1) for pattern in cache.values()]
    torch.testing.assert_close(raw_attention(mini, pixels, directions).flatten(1), means[-1][:, 0, 1:])
    product = torch.eye(65).expand(2, -1, -1)
    for mean in means:
        product = ((mean + torch.eye(65)) / 2) @ product
    torch.testing.assert_close(rollout(mini, pixels, directions).flatten(1), product[:, 0, 1:])


def test_gradients_equal_one_image_at_a_time(mini):
    """Compares with Chefer's matrices and LeGrad's blocks, each computed by its own backward pass."""
    pixels, directions = random(2, 3, 64, 64), random(2, 256, seed=3)
    visual = mini.model.visual
    for i in range(2):
        with mini.caching(["image.blocks.*"], detach=False) as cache:
            z = mini.encode_image(pixels[i : i + 1])
        patterns = [cache[f"image.blocks.{n}.attn.pattern"] for n in range(6)]
        cosine = torch.cosine_similarity(z[0], directions[i], dim=0)
        relevance = torch.eye(65)
        for pattern, slope in zip(
            patterns, torch.autograd.grad(cosine, patterns, retain_graph=True), strict=True
        ):
            relevance = relevance + (pattern * slope).clamp_min(0).mean(1)[0] @ relevance
        chefer = gradient_attention(mini, pixels, directions)[i].flatten()
        torch.testing.assert_close(chefer, relevance[0, 1:].detach(), rtol=1e-3, atol=1e-6)
        total = torch.zeros(65)
        for n, pattern in enumerate(patterns):
            own = visual.ln_post(cache[f"image.blocks.{n}.resid_post"][:, 0]) @ visual.proj
            cosine = torch.cosine_similarity(own[0], directions[i], dim=0)
            total += torch.autograd.grad(cosine, pattern, retain_graph=True)[0].clamp_min(0).mean((1, 2))[0]
        found = legrad(mini, pixels, directions)[i].flatten()
        torch.testing.assert_close(found, total[1:] / 6, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_models_without_a_class_token(method):
    vision = {
        "image_size": 32,
        "patch_size": 16,
        "width": 16,
        "layers": 2,
        "head_width": 8,
        "pool_type": "avg",
    }
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    torch.manual_seed(0)
    model = mm.HookedCLIP(open_clip.CLIP(12, vision, text).eval())  # type: ignore[arg-type]
    maps = METHODS[method](model, random(2, 3, 32, 32), random(2, 12))
    assert maps.shape == (2, 2, 2) and torch.isfinite(maps).all() and maps.std() > 0


@pytest.mark.parametrize("method", METHODS)
def test_directions_must_match(method, mini):
    with pytest.raises(ShapeMismatch, match="one direction per image"):
        METHODS[method](mini, random(2, 3, 64, 64), random(1, 256))
    assert len(mini._registry) == 0


def test_scores_equal_torchmetrics():
    maps, masks = random(4, 8, 8), random(4, 16, 16, seed=5) > 0.3
    found = segmentation_scores(maps, masks, name="x")
    large = torch.nn.functional.interpolate(maps[:, None], (16, 16), mode="bilinear", align_corners=False)[
        :, 0
    ]
    for i in range(4):
        cut = (large[i] > large[i].mean()).int()
        iou = (
            binary_jaccard_index(cut, masks[i].int()) + binary_jaccard_index(1 - cut, 1 - masks[i].int())
        ) / 2
        assert found.ious[i] == pytest.approx(float(iou), abs=1e-6)
        own = binary_average_precision(large[i].flatten(), masks[i].int().flatten())
        assert found.precisions[i] == pytest.approx(float(own), abs=1e-4)
        assert found.pixel_accuracies[i] == pytest.approx(float((cut == masks[i]).float().mean()), abs=1e-6)
    constant = segmentation_scores(torch.zeros(4, 8, 8), masks)
    torch.testing.assert_close(constant.precisions, masks.flatten(1).float().mean(1))  # ties help nobody
    assert found.beyond(found).value == 0


def test_invalid_masks_are_refused():
    maps, masks = random(1, 8, 8), torch.ones(1, 16, 16).bool()
    with pytest.raises(ShapeMismatch, match="object and background in each, got mask"):
        segmentation_scores(maps, masks)
    with pytest.raises(ShapeMismatch, match="1 maps for 2"):
        segmentation_scores(maps, masks.repeat(2, 1, 1))
    masks[0, 0] = False
    with pytest.raises(NotFinite, match="1 numbers"):
        segmentation_scores(torch.full((1, 1, 1), float("nan")), masks)

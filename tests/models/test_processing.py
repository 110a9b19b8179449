"""Processors of transformers: what hooked models make of them is what the processors themselves give."""

from __future__ import annotations

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config  # type: ignore[attr-defined]
from torchvision.transforms.functional import to_pil_image

import mmhooks as mm
from mmhooks.errors import MMHooksError, NoExactSum, ShapeMismatch

from . import tiny_transformers as tiny


def image() -> Image.Image:
    torch.manual_seed(3)
    return to_pil_image(torch.rand(3, 40, 50))


@torch.no_grad()
def test_clip_gets_what_its_processor_gives():
    processor = tiny.processor()
    model = mm.hook(tiny.clip(), processor)
    texts = ["abc", "dd"]
    given = processor(images=image(), text=texts, padding="max_length", max_length=12, return_tensors="pt")
    assert torch.equal(model.preprocess(image())[None], given["pixel_values"])
    assert torch.equal(model.tokenizer(texts), given["input_ids"])
    want = model.model(**given)
    got = model.encode_text(model.tokenizer(texts), normalize=True)
    torch.testing.assert_close(got, want.text_embeds, atol=1e-6, rtol=0)
    got = model.encode_image(model.preprocess(image())[None], normalize=True)
    torch.testing.assert_close(got, want.image_embeds, atol=1e-6, rtol=0)
    assert torch.equal(model.tokenizer("abc"), model.tokenizer(["abc"]))


@torch.no_grad()
def test_siglip_2_gets_its_processors_patches_of_a_square():
    from transformers import Siglip2ImageProcessor

    processor = Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    model = mm.hook(tiny.siglip2(), processor)
    pixels = model.preprocess(image())
    assert pixels.shape == (3, 32, 32)
    square = image().resize((32, 32), Image.Resampling.BILINEAR)
    want = model.model.get_image_features(**processor(images=square, return_tensors="pt")).pooler_output
    assert torch.equal(model.encode_image(pixels[None]), want)
    with pytest.raises(ShapeMismatch, match=r"sides that are multiples of 8, got \[1, 3, 30, 32\]"):
        model.encode_image(torch.zeros(1, 3, 30, 32))


@torch.no_grad()
def test_texts_of_berts_kind_do_not_see_their_padding():
    model = mm.hook(tiny.chinese_clip(), tiny.processor())
    short = model.tokenizer(["ab"])
    longer = torch.cat([short, torch.zeros_like(short[:, :4])], 1)  # more padding
    torch.testing.assert_close(
        model.encode_text(longer[:, :12]), model.encode_text(short[:, :8]), atol=1e-6, rtol=0
    )


@torch.no_grad()
def test_stores_of_models_of_other_libraries(tmp_path):
    pairs = mm.data.pairs("mini", limit=6)
    clip = mm.hook(tiny.clip(), tiny.processor())
    network = timm.create_model("test_vit", num_classes=0).eval()
    transform = create_transform(**resolve_model_data_config(network), is_training=False)
    vision = mm.hook(network, preprocess=transform)
    for model, sites in ((clip, ["image.embed", "text.embed"]), (vision, ["image.embed", "blocks.1"])):
        out = tmp_path / type(model).__name__
        store = mm.extract(model, pairs, sites, out=out, progress=False, workers=0)
        assert len(store) == 6
        pixels = torch.stack([model.preprocess(pairs.image(i)) for i in range(6)])
        ((_, rows),) = store.chunks(sites=["image.embed"])
        torch.testing.assert_close(
            torch.as_tensor(rows["image.embed"]), model.encode_image(pixels), atol=1e-5, rtol=0
        )
        assert (
            len(mm.extract(model, pairs, sites, out=out, progress=False)) == 6
        )  # the same run, opened again


@torch.no_grad()
def test_sounds_and_videos_have_entry_points_of_their_own():
    clap, xclip = mm.hook(tiny.clap()), mm.hook(tiny.xclip())
    sounds, frames = torch.randn(2, 1, 64, 8), torch.randn(2, 2, 3, 32, 32)
    tokens = tiny.inputs(clap.model)[1]
    want = clap.model.get_audio_features(sounds).pooler_output  # normalised by the model itself
    torch.testing.assert_close(clap.encode_audio(sounds, normalize=True), want)
    want = clap.model.get_text_features(tokens, attention_mask=(tokens != 1).long()).pooler_output
    torch.testing.assert_close(clap.encode_text(tokens, normalize=True), want)
    out, cache = clap.run_with_cache(audio=sounds, texts=tokens, sites=["audio.embed", "text.embed"])
    assert torch.equal(out.audio, cache["audio.embed"]) and out.image is None and out.video is None
    out, cache = xclip.run_with_cache(videos=frames, sites="video.embed")
    assert torch.equal(out.video, xclip.model.get_video_features(frames).pooler_output)
    assert torch.equal(out.video, cache["video.embed"])
    for model, encode in ((clap, "encode_image"), (xclip, "encode_audio")):
        with pytest.raises(MMHooksError, match=rf"call encode_{model.family.medium}"):
            getattr(model, encode)(sounds)
        with pytest.raises(NoExactSum, match=f"the {model.family.medium} tower is"):
            model.readout(model.family.medium)

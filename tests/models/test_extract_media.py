"""Stores of sounds and videos: CLAP, X-CLIP, V-JEPA 2 and VideoMAE over tensors that their processors made."""

from __future__ import annotations

import pytest
import torch

import mmhooks as mm
from mmhooks.errors import DataError, MMHooksError, ShapeMismatch

from . import tiny_transformers as tiny

N = 5
TEXTS = [f"abc{'de'[i % 2]}{i % 4}" for i in range(N)]
OPTIONS = {"batch_size": 2, "shard_rows": 4, "workers": 0, "progress": False}


def tokenizer(texts):
    return tiny.processor().tokenizer(list(texts), padding="max_length", max_length=12, return_tensors="pt")[
        "input_ids"
    ]


def sounds():
    return torch.randn(N, 1, 64, 8, generator=torch.manual_seed(2))


def videos(frames):
    return torch.randn(N, frames, 3, 32, 32, generator=torch.manual_seed(2))


CASES = {
    "CLAP": (
        tiny.clap,
        sounds,
        ["audio.embed", "text.embed", "audio.blocks.1.resid_post", "text.blocks.0.attn.pattern"],
    ),
    "X-CLIP": (tiny.xclip, lambda: videos(2), ["video.embed", "text.embed", "video.mit.blocks.0.resid_post"]),
    "V-JEPA 2": (tiny.vjepa2, lambda: videos(4), ["video.embed", "video.blocks.1.attn.pattern"]),
    "VideoMAE": (tiny.videomae, lambda: videos(4), ["video.embed", "video.blocks.2.mlp_out"]),
}


def opened(name):
    build, made, sites = CASES[name]
    model, inputs = mm.hook(build(), name=name), made()
    if isinstance(model, mm.HookedCLIP):
        model.tokenizer = tokenizer
    return model, inputs, sites


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_store_holds_what_the_model_gives(name, tmp_path):
    model, inputs, sites = opened(name)
    pairs = mm.data.from_tensors(inputs, TEXTS)
    store = mm.extract(model, pairs, sites, tmp_path / "acts", **OPTIONS)
    medium = model.family.medium
    for first, last in ((0, 2), (2, 4), (4, 5)):
        with model.caching(sites) as cache:
            getattr(model, f"encode_{medium}")(inputs[first:last])
            if model is not None and isinstance(model, mm.HookedCLIP):
                model.encode_text(tokenizer(TEXTS[first:last]))
        for site in sites:
            assert torch.equal(store[site].tensor()[first:last], cache[site]), site
    assert store.ids == pairs.ids == [str(i) for i in range(N)] and store.verify() == []
    again = mm.extract(model, mm.data.from_tensors(list(inputs), TEXTS), sites, tmp_path / "acts", **OPTIONS)
    assert again.manifest["data"]["fingerprint"] == pairs.fingerprint
    with pytest.raises(mm.errors.StoreError):  # other tensors are other data
        mm.extract(model, mm.data.from_tensors(inputs + 1, TEXTS), sites, tmp_path / "acts", **OPTIONS)


@torch.no_grad()
def test_an_image_model_reads_its_pixels_as_they_are(tmp_path):
    model = mm.hook(tiny.clip(), tiny.processor())
    pixels = torch.randn(N, 3, 32, 32, generator=torch.manual_seed(2))
    store = mm.extract(
        model,
        mm.data.from_tensors(pixels, TEXTS),
        out=tmp_path / "acts",
        **{**OPTIONS, "batch_size": N, "shard_rows": N},
    )
    assert torch.equal(store["image.embed"].tensor(), model.encode_image(pixels))
    assert torch.equal(store["text.embed"].tensor(), model.encode_text(model.tokenizer(TEXTS)))


def test_what_a_store_cannot_hold_is_said(tmp_path):
    model, inputs, _ = opened("X-CLIP")
    pairs = mm.data.from_tensors(inputs, TEXTS)
    with pytest.raises(
        ShapeMismatch, match=r"site 'video.frames' gave \(2, 24\) .* for one pair; a store keeps sites"
    ):
        mm.extract(model, pairs, "video.frames", tmp_path / "a", **OPTIONS)  # one row a frame
    with pytest.raises(
        MMHooksError, match=r"sites of the video tower: expected mm.data.from_tensors\(inputs, texts\)"
    ):
        mm.extract(
            model, mm.data.pairs("mini", limit=4, progress=False), "video.embed", tmp_path / "b", **OPTIONS
        )
    clap, _, _ = opened("CLAP")
    with pytest.raises(MMHooksError, match="makes of each sound, got pairs of images"):
        mm.extract(
            clap, mm.data.pairs("mini", limit=4, progress=False), "audio.embed", tmp_path / "c", **OPTIONS
        )


def test_tensors_that_are_no_pairs():
    with pytest.raises(
        ShapeMismatch, match="expected as many tensors as texts and ids, got 5 tensors, 2 texts"
    ):
        mm.data.from_tensors(sounds(), ["a", "b"])
    with pytest.raises(ShapeMismatch, match=r"tensors of one shape.*got \(1, 2\) and \(1, 3\)"):
        mm.data.from_tensors([torch.zeros(1, 3), torch.zeros(1, 2)], ["a", "b"])
    with pytest.raises(ShapeMismatch, match="expected floating-point tensors.*torch.int64"):
        mm.data.from_tensors([torch.zeros(1, dtype=torch.long)], ["a"])
    with pytest.raises(DataError, match="non-empty texts"):
        mm.data.from_tensors(torch.zeros(1, 2), [" "])
    some = mm.data.from_tensors(torch.eye(3), ["a", "b", "c"])[1:]
    assert (
        type(some) is mm.data.TensorPairs and some.image(0).tolist() == [0, 1, 0] and some.ids == ["1", "2"]
    )
    with pytest.raises(DataError, match="expected an image to open, got a tensor"):
        some.rgba(0)

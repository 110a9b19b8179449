"""Half precision, in every way that open_clip and transformers offer it: inputs, sites, heads and extraction."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import mmhooks as mm
from mmhooks.models.clip.sites import example_inputs

from .families import FAMILIES

PRECISIONS = ("fp32", "bf16", "fp16", "pure_bf16", "pure_fp16", "amp", "amp_bf16", "amp_bfloat16")
HALVES = [torch.bfloat16, torch.float16]
INPUT = {
    "bf16": torch.bfloat16,
    "pure_bf16": torch.bfloat16,
    "fp16": torch.float16,
    "pure_fp16": torch.float16,
}
LEAVES = [f"image.blocks.0.attn.{leaf}" for leaf in ("q", "k", "v", "pattern", "z", "head_out")]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small random model of the vocabulary of open_clip's own tokenizer, by its name for ``mm.load``."""
    torch.manual_seed(0)
    shape = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8},
        "text_cfg": {"context_length": 12, "width": 16, "heads": 2, "layers": 2},
    }
    folder = tmp_path_factory.mktemp("clip")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": shape, "preprocess_cfg": {}}))
    save_file(open_clip.CLIP(**shape).state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> mm.data.Pairs:
    folder = tmp_path_factory.mktemp("pairs")
    rows = ["file_name,text"]
    for n in range(4):
        Image.new("RGB", (20, 20), (60 * n, 200 - 40 * n, 90)).save(folder / f"{n}.png")
        rows.append(f"{n}.png,thing {n}")
    (folder / "metadata.csv").write_text("\n".join(rows))
    return mm.data.pairs(folder)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_of_open_clip_runs_through_extraction_and_heads(
    source: str, pairs: mm.data.Pairs, tmp_path: Path, precision: str
) -> None:
    sites = ["*.embed", "*.ncl.latents", "image.embed.sae.latents", *LEAVES]

    def rows(precision: str) -> dict[str, torch.Tensor]:
        model = mm.load(source, precision=precision)
        assert model.dtype == INPUT.get(precision, torch.float32)
        model.attach(mm.NCL(16, 24), at=["image.embed", "text.embed"], name="ncl")
        model.attach(mm.TopKSAE(16, 24, 4), at="image.embed", name="sae")
        store = mm.extract(model, pairs, sites, out=tmp_path / precision, progress=False, sparse=False)
        return {site: torch.as_tensor(store[site][:]) for site in store.sites}

    plain, got = rows("fp32"), rows(precision)
    assert set(got) >= {"image.embed", "text.embed.ncl.latents", "image.embed.sae.latents", *LEAVES}
    for site in ("image.embed", "text.embed", "image.blocks.0.attn.z"):
        torch.testing.assert_close(got[site], plain[site], atol=0.03, rtol=0.03)
        # Not fp32 under another name: half precision shows.
        assert torch.equal(got[site], plain[site]) == (precision == "fp32"), site


def test_an_unknown_precision_is_refused(source: str) -> None:
    with pytest.raises(mm.errors.MMHooksError, match="amp_bf16.*'half'"):
        mm.load(source, precision="half")


# What open_clip's conversion in part leaves able to run (a layer scale in fp32 stops its own blocks).
MIXED = ("CLIP", "norm after pool", "ResNet")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("family", "pure"), [*((f, True) for f in FAMILIES), *((f, False) for f in MIXED)])
def test_pixels_pass_through_to_input_in_every_family(family: str, pure: bool, dtype: torch.dtype) -> None:
    """``pure``: all weights converted; else open_clip's own conversion of what it knows."""
    torch.manual_seed(0)
    plain = FAMILIES[family]().eval()
    if pure:
        plain.to(dtype)
    else:
        open_clip.convert_weights_to_lp(plain, dtype)
    model = mm.HookedCLIP(plain)
    images, texts = example_inputs(plain, batch=1)
    assert model.dtype == dtype and model.to_input(texts).dtype == texts.dtype
    width = model.forward(model.to_input(images)).image.shape[-1]
    model.attach(mm.NCL(width, 24), at="image.embed", name="ncl")
    with torch.no_grad():
        clean = model.forward(model.to_input(images)).image
        out, cache = model.run_with_cache(model.to_input(images), sites="image.*")
    assert torch.equal(out.image, clean) and torch.isfinite(cache["image.embed.ncl.latents"]).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_head_of_another_type_is_read_edited_and_spliced(dtype: torch.dtype) -> None:
    model = mm.HookedCLIP(FAMILIES["CLIP"]().eval().to(dtype))
    sae, ncl = mm.TopKSAE(12, 24, 4), mm.NCL(12, 24)
    ncl.fit_decoder(torch.randn(50, 12))
    for head in (sae, ncl, mm.NCL(12, 24, name="bare")):
        model.attach(head, at="image.embed")
    images = model.to_input(torch.randn(2, 3, 32, 32))
    with torch.no_grad():
        clean = model.encode_image(images)
        for name in ("sae", "ncl"):
            with model.hooks(mm.Zero(range(24), at=f"image.embed.{name}.latents")):
                edited = model.encode_image(images)
            assert edited.dtype == dtype and not torch.equal(edited, clean)
        _, cache = model.run_with_cache(images, sites="image.embed.bare.latents")
    want = mm.NCL(12, 24).encode(torch.nn.functional.normalize(clean.float(), dim=-1))
    torch.testing.assert_close(cache["image.embed.bare.latents"], want, atol=1e-5, rtol=1e-5)

"""Feature maps, channels first or last: features are channels, vectors lie at positions, heads read them there."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

import mmhooks as mm
from mmhooks.data.pair_set import Pairs, Row
from mmhooks.errors import ShapeMismatch

TEXT = {"context_length": 6, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
# Tower -> (options of the image tower, a site, its dimension of channels).
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}


def timm(name: str, size: int = 64) -> dict:
    return {"timm_model_name": name, "timm_pool": "", "timm_proj": "linear", "image_size": size}


TOWERS = {
    "resnet": (RESNET, "image.blocks.1.resid_post", 1),
    "resnet, before a block": (RESNET, "image.blocks.2.resid_pre", 1),
    "resnet, native path": (RESNET, "visual.layer2.0.conv1", 1),
    "convnext": (timm("test_convnext"), "image.blocks.1.resid_post", 1),
    "timm resnet, native path": (timm("test_resnet"), "visual.trunk.layer2.0.bn1", 1),
    "swin": (timm("test_vit", 32), "image.blocks.1.resid_post", 3),
}


def tower(name: str) -> tuple[mm.HookedCLIP, torch.Tensor]:
    import open_clip

    torch.manual_seed(0)
    options, _, _ = TOWERS[name]
    kind = open_clip.CustomTextCLIP if "timm_model_name" in options else open_clip.CLIP
    model = kind(12, dict(options), dict(TEXT))  # type: ignore[arg-type]
    if name == "swin":
        model.visual.trunk = _swin()
    model.eval()
    for module in model.modules():  # a residual block of open_clip starts silent
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
    size = options["image_size"]
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    return mm.HookedCLIP(model, tokenizer=_tokenize, preprocess=_preprocess(size)), images


def _swin() -> torch.nn.Module:
    """One that keeps its channels last, smaller than any that has a name."""
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(32, 4, embed_dim=32, depths=(1, 1), num_heads=(2, 2), window_size=4, num_classes=0)


def _tokenize(texts: list[str]) -> torch.Tensor:
    return torch.arange(1, 7).repeat(len(texts), 1)


def _preprocess(size: int):
    def read(image: Image.Image) -> torch.Tensor:
        value = float(image.getpixel((0, 0))[0]) / 64
        return torch.randn(3, size, size, generator=torch.Generator().manual_seed(int(value * 64))) + value

    return read


@pytest.fixture(scope="module", params=list(TOWERS))
def made(request):
    model, images = tower(request.param)
    _, site, dim = TOWERS[request.param]
    with torch.no_grad(), model.caching(site) as cache:
        plain = model.encode_image(images)
    return model, images, site, dim, cache[site], plain


def heads(d: int):
    torch.manual_seed(2)
    yield mm.TopKSAE(d, 3 * d, 4)
    yield mm.ReLUSAE(d, 3 * d, normalize_input=False)


@pytest.mark.parametrize("error_term", [True, False])
def test_a_head_reads_and_edits_every_position(made, error_term) -> None:
    model, images, site, dim, carried, plain = made
    vectors = carried.movedim(dim, -1)
    for head in heads(vectors.shape[-1]):
        model.attach(head, at=site, name="h", error_term=error_term)
        try:
            with torch.no_grad():
                unit, scale, _ = head.scaled(vectors)
                f = head.encode(unit)
                mask = f.flatten(0, -2).sum(0).topk(5).indices
                edited = mm.Zero(mask)(f)
                change = (edited - f) @ head.W_dec if error_term else head.decode(edited)
                change = change if scale is None else change * scale
                want = vectors + change if error_term else change
                with model.caching([site, f"{site}.h.*"]) as cache:
                    assert torch.equal(model.encode_image(images), plain)  # read, not edited
                for leaf, value in {"latents": f, "recon": None, "error": None}.items():
                    assert cache[f"{site}.h.{leaf}"].shape[:-1] == vectors.shape[:-1]
                    if value is not None:
                        torch.testing.assert_close(cache[f"{site}.h.{leaf}"], value)
                torch.testing.assert_close(cache[f"{site}.h.recon"] + cache[f"{site}.h.error"], vectors)
                for read in (False, True):
                    patterns = [site, f"{site}.h.latents"] if read else [site]
                    with model.hooks(mm.Zero(mask, at=f"{site}.h")), model.caching(patterns) as cache:
                        out = model.encode_image(images)
                    torch.testing.assert_close(cache[site], want.movedim(-1, dim), atol=1e-5, rtol=1e-4)
                    assert not torch.allclose(out, plain, atol=1e-6)
                    if read:
                        torch.testing.assert_close(cache[f"{site}.h.latents"], edited)
                with model.hooks(mm.Patch(want.movedim(-1, dim).contiguous(), at=site)):
                    torch.testing.assert_close(model.encode_image(images), out, atol=1e-5, rtol=1e-4)
        finally:
            model.detach()
    assert torch.equal(model.model.encode_image(images), plain)


def test_a_mask_of_channels(made) -> None:
    model, images, site, dim, carried, _ = made
    with torch.no_grad(), model.hooks(mm.Zero([0, 3], at=site)), model.caching(site) as cache:
        model.encode_image(images)
    want = carried.clone()
    want.index_fill_(dim, torch.tensor([0, 3]), 0)
    assert torch.equal(cache[site], want) and carried.shape[dim] > 3


def test_maps_have_no_tokens(made) -> None:
    """Not the channels, which are where a row of tokens would be."""
    model, images, site, _, carried, _ = made
    with torch.no_grad(), model.caching(site, tokens=[0]) as cache:
        model.encode_image(images)
    assert cache[site].shape == carried.shape
    with (
        pytest.raises(ShapeMismatch, match="with a token dimension"),
        model.hooks(mm.Zero(at=site, tokens=0)),
    ):
        model.encode_image(images)


def test_the_width_is_that_of_the_channels(made) -> None:
    model, images, site, dim, carried, _ = made
    wrong = mm.TopKSAE(carried.shape[dim] + 1, 8, 2)
    with pytest.raises(ShapeMismatch, match=f"width {wrong.d_in}"):
        model.attach(wrong, at=site)
        try:
            with model.caching(f"{site}.topk.latents"):
                model.encode_image(images)
        finally:
            model.detach()


def test_gradients_reach_the_pixels(made) -> None:
    model, images, site, dim, carried, _ = made
    head = mm.TopKSAE(carried.shape[dim], 64, 4)
    model.attach(head, at=site, name="h")
    try:
        pixels, grads = images.clone().requires_grad_(), []
        back = [(f"{site}.h.latents", lambda g, *, hook: grads.append(g))]
        with model.hooks(mm.Zero(range(20), at=f"{site}.h"), bwd_hooks=back):
            model.encode_image(pixels).sum().backward()
        assert pixels.grad is not None and pixels.grad.abs().sum() > 0
        assert grads[0].shape == (*carried.movedim(dim, -1).shape[:-1], 64) and grads[0].any()
    finally:
        model.detach()


class Greys:
    def open(self, picture):
        return Image.new("RGB", (8, 8), (int(picture),) * 3)


def pairs(n: int) -> Pairs:
    return Pairs([Row(f"p{i}", f"grey {i}", 9 * i) for i in range(n)], Greys(), name="greys", content="greys")


def test_extract_and_train_by_position(made, tmp_path) -> None:
    model, _, site, dim, carried, _ = made
    d = carried.shape[dim]
    store = mm.extract(
        model, pairs(12), [site], tmp_path / "acts", batch_size=5, shard_rows=5, progress=False
    )
    images = torch.stack([model.preprocess(Image.new("RGB", (8, 8), (9 * i,) * 3)) for i in range(12)])
    with torch.no_grad(), model.caching(site) as cache:
        model.encode_image(images)
    vectors = cache[site].movedim(dim, -1)
    torch.testing.assert_close(store[site].tensor(), vectors.contiguous(), atol=1e-4, rtol=1e-4)

    head, other = mm.TopKSAE(d, 2 * d, 3), mm.TopKSAE(d, 2 * d, 3)
    options = {"epochs": 1, "batch_size": 16, "progress": False}
    result = mm.train_head(head, store, sites=[site], **options)
    mm.train_head(other, store[site].tensor().flatten(0, -2), **options)
    assert result.steps == vectors[..., 0].numel() // 16
    for name, value in head.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name])

    latents = store.apply(head, at=site)[f"{site}.{head.name}.latents"]
    assert latents.shape == (*vectors.shape[:-1], 2 * d)
    torch.testing.assert_close(latents[3], head.encode(head.prepare(store[site][3])).detach())


def test_positions_are_rows_in_order_and_stay_on_one_side() -> None:
    from mmhooks.heads.vectors import PositionRows, hold_out_every_tenth

    x = torch.randn(23, 2, 3, 5)
    rows, flat = PositionRows(x), x.flatten(0, 2)
    assert rows.shape == flat.shape and len(rows) == len(flat)
    for which in (slice(0, 7), slice(5, 40), slice(131, None), slice(None), torch.tensor([137, 0, 6, 5, 6])):
        assert torch.equal(rows[which], flat[which])
    (inside, _), (outside, _) = hold_out_every_tenth(rows, None)
    assert torch.equal(outside, x[9::10].flatten(0, 2)) and len(inside) + len(outside) == len(flat)

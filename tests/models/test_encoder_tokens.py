"""Kinds of tokens in encoders, against positions counted by hand and against what a changed patch of pixels changes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import mmhooks as mm
from mmhooks.errors import MMHooksError, ShapeMismatch
from mmhooks.hooks.encoder_kinds import ImageTokens, TextTokens, running_texts
from mmhooks.models.encoder_tokens import encoder_token_mask, patch_grid, patch_size

from . import families, tiny_transformers, tiny_vlms

RESID = "image.blocks.1.resid_post"


def registers(**options):
    from timm.models.vision_transformer import VisionTransformer

    options = {"reg_tokens": 3, **options}
    return VisionTransformer(
        32, 8, num_classes=0, embed_dim=32, depth=2, num_heads=2, dynamic_img_size=True, **options
    )


def distilled():
    made = tiny_transformers.config("DeiTConfig", **tiny_transformers.SIZES, **tiny_transformers.IMAGES)
    return tiny_transformers.build("DeiTModel", made)


def timm_distilled():
    from timm.models.deit import VisionTransformerDistilled

    return VisionTransformerDistilled(32, 8, num_classes=5, embed_dim=32, depth=2, num_heads=2)


def dinov2_with_registers():
    sizes = {**tiny_transformers.SIZES, "mlp_ratio": 2}
    made = tiny_transformers.config(
        "Dinov2WithRegistersConfig", **sizes, **tiny_transformers.IMAGES, num_register_tokens=2
    )
    return tiny_transformers.build("Dinov2WithRegistersModel", made)


def openclip():
    vision = {**families.V, "patch_size": 8}
    return families.build("CLIP", vision, families.T)


# builder -> class tokens, registers; counted in the architectures' own code
IMAGES = {
    "open_clip": (openclip, 1, 0),
    "timm, registers": (registers, 1, 3),
    "timm, no class token": (lambda: registers(class_token=False, reg_tokens=0, global_pool="avg"), 0, 0),
    "timm, distilled": (timm_distilled, 2, 0),
    "timm, Eva": (lambda: families.eva(num_reg_tokens=2).visual.trunk, 1, 2),
    "CLIP": (tiny_transformers.clip, 1, 0),
    "SigLIP": (tiny_transformers.siglip, 0, 0),
    "SigLIP 2": (tiny_transformers.siglip2, 0, 0),
    "ViT": (tiny_transformers.vit, 1, 0),
    "DeiT": (distilled, 2, 0),
    "DINOv2": (tiny_transformers.dinov2, 1, 0),
    "DINOv2, registers": (dinov2_with_registers, 1, 2),
    "DINOv3": (tiny_transformers.dinov3, 1, 2),
}


def hooked(name):
    torch.manual_seed(0)
    return mm.hook(IMAGES[name][0]().eval())


@pytest.mark.parametrize("name", IMAGES)
def test_a_changed_patch_of_pixels_changes_the_token_at_its_place(name):
    model, (_, cls, register) = hooked(name), IMAGES[name]
    side = 16 if "Eva" in name else 8
    pixels = torch.randn(1, 3, 32, 32)
    rows, columns = patch_grid(model, (32, 32))
    assert (rows, columns) == (32 // side, 32 // side) and patch_size(model) == ((side, side),) * 2
    begin = "image.blocks.0.resid_pre"  # no attention has mixed tokens yet
    length = cls + register + rows * columns
    masks = {
        kind: encoder_token_mask(model, begin, kind, length)[0]
        for kind, n in {"cls": cls, "register": register, "patch": 1}.items()
        if n
    }
    assert int(sum(mask.sum() for mask in masks.values())) == length  # each token is of one kind
    for row, column in ((0, 0), (0, columns - 1), (rows - 1, 0)):
        changed = pixels.clone()
        changed[:, :, row * side : (row + 1) * side, column * side : (column + 1) * side] += 1
        with model.caching(begin) as before:
            model.encode_image(pixels)
        with model.caching(begin) as after:
            model.encode_image(changed)
        moved = (before[begin] != after[begin]).any(-1)[0]
        assert moved.shape == (length,)
        assert moved.nonzero().flatten().tolist() == [cls + register + row * columns + column]
        assert moved[masks["patch"]].nonzero().flatten().tolist() == [row * columns + column]
    if cls:
        assert masks["cls"].nonzero().flatten().tolist() == list(range(cls))
    if register:
        assert masks["register"].nonzero().flatten().tolist() == list(range(cls, cls + register))


def test_the_grid_of_an_image_that_is_not_square():
    model = hooked("timm, registers")
    assert patch_grid(model, (24, 48)) == (3, 6)
    pixels = torch.randn(1, 3, 24, 48)
    changed = pixels.clone()
    changed[:, :, 16:, 32:40] += 1  # row 2, column 4
    site = "image.blocks.0.resid_pre"
    with model.caching(site, tokens="patch") as before:
        model.encode_image(pixels)
    with model.caching(site, tokens="patch") as after:
        model.encode_image(changed)
    moved = (before[site] != after[site]).any(-1)[0].view(3, 6)
    assert moved.nonzero().tolist() == [[2, 4]]
    assert patch_grid(mm.load("mini"), (64, 100)) == (8, 12)  # the convolution leaves the rest out


@pytest.mark.parametrize("kind", ["cls", "register", "patch"])
@pytest.mark.parametrize("name", IMAGES)
def test_an_edit_by_kind_is_the_edit_by_positions(name, kind):
    model, (_, cls, register) = hooked(name), IMAGES[name]
    held = {"cls": (0, cls), "register": (cls, cls + register), "patch": (cls + register, None)}
    begin, end = held[kind]
    pixels = torch.randn(2, 3, 32, 32)
    if begin == end:
        says = f"tokens='{kind}' at '{RESID}': expected one of the kinds of tokens there, .*patch$"
        with pytest.raises(ShapeMismatch, match=says), model.hooks(mm.Zero(at=RESID, tokens=kind)):
            pass
        with pytest.raises(ShapeMismatch, match=says), model.caching(RESID, tokens=kind):
            model.encode_image(pixels)
        with pytest.raises(ShapeMismatch, match=says):
            encoder_token_mask(model, RESID, kind, 99)
        return
    found = []
    for tokens in (kind, slice(begin, end)):
        with (
            model.hooks(mm.Steer(at=RESID, strength=2.0, tokens=tokens)),
            model.caching([RESID, "image.blocks.0.attn.pattern", "image.embed"], tokens=tokens) as cache,
        ):
            model.encode_image(pixels)
        found.append(cache)
    for site in found[0]:
        assert torch.equal(found[0][site], found[1][site])
    assert found[0][RESID].shape[1] == (patch_count(model) if kind == "patch" else end - begin)
    assert found[0]["image.blocks.0.attn.pattern"].shape[2] == found[0][RESID].shape[1]


def patch_count(model):
    rows, columns = patch_grid(model, (32, 32))
    return rows * columns


def test_patches_of_maps_and_of_the_first_convolution():
    torch.manual_seed(0)
    resnet = mm.hook(
        families.build(
            "CLIP", {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}, families.T
        ).eval()
    )
    site, pixels = "image.blocks.1.resid_post", torch.randn(2, 3, 32, 32)
    with resnet.hooks(mm.Steer(at=site, tokens="patch")), resnet.caching(site, tokens="patch") as by_kind:
        resnet.encode_image(pixels)
    with resnet.hooks(mm.Steer(at=site)), resnet.caching(site) as whole:
        resnet.encode_image(pixels)
    assert torch.equal(by_kind[site], whole[site]) and by_kind[site].dim() == 4
    assert encoder_token_mask(resnet, site, "patch", 16).all()
    with pytest.raises(ShapeMismatch, match="expected one of the kinds of tokens there, patch"):
        encoder_token_mask(resnet, site, "cls", 16)
    with (
        pytest.raises(ShapeMismatch, match="tokens='cls' at .* patch"),
        resnet.caching(site, tokens="cls"),
    ):
        resnet.encode_image(pixels)
    with pytest.raises(ShapeMismatch, match="feature maps, each with a grid of its own"):
        patch_grid(resnet, (32, 32))
    clip = mm.load("mini")
    assert encoder_token_mask(clip, "image.patches", "patch", 64).all()
    with pytest.raises(ShapeMismatch, match="tokens='cls' at 'image.patches'.* patch$"):
        encoder_token_mask(clip, "image.patches", "cls", 64)
    for site in ("image.embed", "image.pooled"):
        with pytest.raises(ShapeMismatch, match="expected a site with a token dimension, got batch d"):
            encoder_token_mask(clip, site, "patch", 64)


def test_inside_a_head_the_kinds_are_those_of_its_site():
    model = mm.load("mini")
    head = mm.TopKSAE(192, 32, k=4)
    (place,) = model.attach(head, at=RESID, name="sae")
    pixels = torch.randn(1, 3, 64, 64)
    latents = f"{place}.latents"
    with model.caching(latents, tokens="cls") as cache:
        model.encode_image(pixels)
    assert cache[latents].shape == (1, 1, 32)
    assert encoder_token_mask(model, latents, "cls", 65).sum() == 1
    edited = []
    for tokens in ("patch", slice(1, None)):
        with model.hooks(mm.Clamp([3], value=2.0, at=latents, tokens=tokens)):
            edited.append(model.encode_image(pixels))
    assert torch.equal(*edited)


def test_a_distilled_vit_gives_its_class_token():
    model = hooked("timm, distilled")
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.encode_image(pixels), model.model.forward_features(pixels)[:, 0])


# -- texts ---------------------------------------------------------------------------------------------------


def test_where_texts_end():
    ids = torch.tensor([[1, 4, 9, 0, 0], [1, 9, 9, 9, 9], [1, 4, 5, 6, 7]])
    for tokens, want in (
        (TextTokens("highest"), [2, 1, 4]),
        (TextTokens(9), [2, 1, 4]),  # the third was cut: it fills its row
        (TextTokens(9, pad=0), [2, 1, 4]),
        (TextTokens(pad=0), [2, 4, 4]),
        (TextTokens(), [4, 4, 4]),
    ):
        assert tokens.ends(ids).tolist() == want
        eot, text = tokens.mask("eot", 5, ids), tokens.mask("text", 5, ids)
        assert eot.nonzero().tolist() == [[row, end] for row, end in enumerate(want)]
        assert text.sum(1).tolist() == [end + 1 for end in want] and text[:, 0].all()
    siglip = TextTokens(1, pad=0)
    assert siglip.ends(torch.tensor([[5, 6, 1, 1, 1], [5, 6, 1, 0, 0], [5, 6, 0, 0, 0]])).tolist() == [
        2,
        2,
        1,
    ]
    coca = TextTokens("highest", pad=0, cls=True)
    assert coca.mask("eot", 6, ids)[0].tolist() == [False, False, True, False, False, False]
    assert coca.mask("cls", 6, ids).nonzero().tolist() == [[0, 5], [1, 5], [2, 5]]
    with pytest.raises(ShapeMismatch, match="appended behind this site"):
        coca.mask("cls", 5, ids)
    with pytest.raises(ShapeMismatch, match="expected the 5 tokens of the texts, got 7"):
        coca.mask("eot", 7, ids)


@pytest.mark.parametrize("name", ["open_clip", "CLIP"])
def test_the_end_of_a_text_is_the_token_that_clip_reads(name):
    torch.manual_seed(0)
    model = mm.hook((openclip if name == "open_clip" else tiny_transformers.clip)().eval())
    length, end = (8, 63) if name == "open_clip" else (12, 59)
    ids = torch.randint(3, 50, (3, length))
    for row, place in enumerate((2, length - 1, 5)):
        ids[row, place], ids[row, place + 1 :] = end, 0
    site = next(reversed(model.sites("text.blocks.*.resid_post")))
    eot = encoder_token_mask(model, site, "eot", length, ids)
    assert eot.nonzero().tolist() == [[0, 2], [1, length - 1], [2, 5]]
    plain = model.encode_text(ids)
    with model.hooks(mm.Zero(at=site, tokens=~eot)):  # nothing else is read
        assert torch.equal(model.encode_text(ids), plain)
    by_kind, by_mask = [], []
    for tokens, kept in (("eot", by_kind), (eot, by_mask)):
        with model.hooks(mm.Zero(at=site, tokens=tokens)):
            kept.append(model.encode_text(ids))
    assert torch.equal(by_kind[0], by_mask[0]) and not torch.equal(by_kind[0], plain)
    with model.caching(site, tokens="eot") as cache:
        model.forward(texts=ids)
    with model.caching(site) as whole:
        model.encode_text(ids)
    assert torch.equal(cache[site][:, 0], whole[site][eot])


def test_a_recomputed_block_knows_its_texts():
    model = mm.load("mini")
    model.model.set_grad_checkpointing(True)
    model.model.train()  # it has no dropout; open_clip checkpoints in training alone
    ids = model.tokenizer(["a red circle", "a blue square on green"])
    site, weight = "text.blocks.2.mlp.post", model.model.transformer.resblocks[1].mlp.c_fc.weight
    eot = encoder_token_mask(model, site, "eot", ids.shape[1], ids)
    found = []
    for tokens in (eot, "eot"):
        weight.grad = None
        with model.hooks(mm.Steer(at=site, strength=3.0, tokens=tokens)):
            model.encode_text(ids).square().sum().backward()  # behind encode_text, texts are unknown
        found.append(weight.grad)
    assert torch.equal(*found) and found[0].any()


def test_padding_of_masked_texts_belongs_to_no_kind():
    torch.manual_seed(0)
    model = mm.hook(tiny_transformers.chinese_clip().eval())
    ids = torch.randint(3, 50, (2, 12))
    ids[0, 7:] = 0
    site = "text.blocks.1.resid_post"
    text = encoder_token_mask(model, site, "text", 12, ids)
    assert torch.equal(text, ids != 0)
    with model.hooks(mm.Zero(at=site, tokens="text")), model.caching(site) as cache:
        model.encode_text(ids)
    assert torch.equal(cache[site].any(-1), ~text)
    says = r"as many tokens of every row, got \[7, 12\] tokens of the kind 'text'.*\"eot\""
    with pytest.raises(ShapeMismatch, match=says), model.caching(site, tokens="text"):
        model.encode_text(ids)
    with model.caching(site, tokens="text") as cache:
        model.encode_text(ids[1:])
    assert cache[site].shape[:2] == (1, 12)


def test_texts_are_known_in_the_models_own_entry_points_alone():
    model = mm.load("mini")
    ids = model.tokenizer(["a red circle", "a blue square on green"])
    site = "text.blocks.2.resid_post"
    with model.caching(site, tokens="eot") as cache:
        model.run_with_cache(texts=ids, sites="text.embed")
    assert cache[site].shape[1] == 1
    says = "tokens='eot' at 'text.blocks.2.resid_post': where texts end is known while encode_text"
    with pytest.raises(MMHooksError, match=says), model.hooks(mm.Zero(at=site, tokens="eot")):
        model.model.encode_text(ids)
    with pytest.raises(MMHooksError, match=says):
        encoder_token_mask(model, site, "eot", ids.shape[1])
    with running_texts(ids), model.hooks(mm.Zero(at=site, tokens="eot")):
        known = model.model.encode_text(ids)
    with model.hooks(mm.Zero(at=site, tokens="eot")):
        assert torch.equal(known, model.encode_text(ids))
    for kind in ("patch", "cls"):
        says = f"tokens='{kind}' at '{site}': expected one of the kinds of tokens there, eot, text$"
        with pytest.raises(ShapeMismatch, match=says):
            encoder_token_mask(model, site, kind, ids.shape[1], ids)
    with pytest.raises(MMHooksError, match="kinds of tokens are known at sites of towers"):
        encoder_token_mask(model, "transformer.resblocks.0.mlp", "eot", ids.shape[1], ids)


def test_coca_reads_the_class_token_behind_its_text():
    torch.manual_seed(0)
    model = mm.hook(families.coca().eval())
    ids = torch.tensor([[60, 3, 63, 0, 0, 0, 0, 0], [60, 3, 4, 5, 63, 0, 0, 0]])
    sites = ["text.blocks.0.resid_post", "text.tokens"]
    with model.caching(sites, tokens="eot") as cache:
        model.encode_text(ids)
    with model.caching(sites) as whole:
        model.encode_text(ids)
    for site, length in zip(sites, (9, 8), strict=True):
        assert whole[site].shape[1] == length
        assert torch.equal(cache[site][:, 0], whole[site][torch.arange(2), torch.tensor([2, 4])])
    site = "text.blocks.1.resid_post"
    plain = model.encode_text(ids)
    with model.hooks(mm.Zero(at=site, tokens=slice(0, -1))):
        assert torch.equal(model.encode_text(ids), plain)  # the last token is the one that is read
    with model.hooks(mm.Zero(at=site, tokens="cls")):
        assert not torch.equal(model.encode_text(ids), plain)


# -- in larger models ----------------------------------------------------------------------------------------


def test_the_image_tower_of_a_vlm_has_kinds_of_its_own():
    model = mm.hook(tiny_vlms.llava())
    ids = torch.tensor([[1, 5, 5, 5, 5, 7, 8]])
    inputs = {"input_ids": ids, "attention_mask": ids.ne(0).long(), "pixel_values": torch.randn(1, 3, 16, 16)}
    site = "image.blocks.0.resid_post"
    with (
        model.caching([site], tokens="patch") as patches,
        model.caching([site]) as whole,
        model.caching("lm.blocks.0.resid_post", tokens="text") as text,
    ):
        model.forward(**inputs)
    assert torch.equal(patches[site], whole[site][:, 1:]) and patches[site].shape[1] == 4
    assert text["lm.blocks.0.resid_post"].shape[1] == 3
    model.model.gradient_checkpointing_enable()
    model.model.train()
    grads = []
    for tokens in ("text", [0, 5, 6]):
        model.model.zero_grad()
        with model.hooks(mm.Steer(at="lm.blocks.1.mlp.post", strength=3.0, tokens=tokens)):
            model.forward(**inputs).logits.square().sum().backward()
        grads.append(model.model.model.language_model.layers[0].mlp.up_proj.weight.grad.clone())
    assert torch.equal(*grads) and grads[0].any()
    for at, kind, held in (
        ("lm.blocks.0.resid_post", "patch", "image, text, prompt, generated, last"),
        (site, "text", "cls, patch"),
    ):
        says = f"tokens='{kind}' at '{at}': expected one of the kinds of tokens there, {held}"
        with pytest.raises(ShapeMismatch, match=says), model.caching(at, tokens=kind):
            model.forward(**inputs)


def test_kinds_survive_copies():
    model = mm.load("mini")
    pixels = torch.randn(1, 3, 64, 64)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with other.caching(RESID, tokens="cls") as cache:
            other.encode_image(pixels)
        assert cache[RESID].shape == (1, 1, 192)


def test_of_too_few_tokens():
    with pytest.raises(ShapeMismatch, match="more than the tower's 3 class and register tokens, got 3"):
        ImageTokens(1, 2).mask("patch", 3)

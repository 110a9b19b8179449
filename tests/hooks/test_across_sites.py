"""Crosscoders at several layers and at both towers, against plain torch hooks that recompute everything."""

from __future__ import annotations

import copy

import pytest
import torch

import mmhooks as mm
from mmhooks.errors import HookDidNotFire, MMHooksError, ShapeMismatch
from mmhooks.heads import Crosscoder

LAYERS = ["image.blocks.0.resid_post", "image.blocks.1.mlp_out"]
TOWERS = ["image.embed", "text.embed"]
S = [0, 3, 5, 8, 13, 21, 30]


def shaken(width: int) -> Crosscoder:
    head = Crosscoder(2 * width, 32, 6, widths=(width, width), seed=3)
    with torch.no_grad():
        head.b_pre.normal_(std=0.1)
        head.b_enc.normal_(std=0.1)
        head.W_dec.mul_(torch.rand(32, 1) + 0.5)
    return head


def by_hand(head: Crosscoder, values: list[torch.Tensor], edit):
    """Features as a sum over sites, and what the edit changes at each of them."""
    pre, begin = head.b_enc, 0
    blocks = []
    for x, width in zip(values, head.widths, strict=True):
        columns = slice(begin, begin + width)
        pre = pre + (x - head.b_pre[columns]) @ head.W_enc[:, columns].T
        blocks.append((head.W_dec[:, columns], head.b_pre[columns]))
        begin += width
    kept = pre.topk(head.k, dim=-1)
    f = torch.zeros_like(pre).scatter(-1, kept.indices, kept.values.relu())
    after = edit(f)
    deltas = [(after @ w + b) - (f @ w + b) for w, b in blocks]
    return f, after, deltas, [after @ w + b for w, b in blocks]


def zeroed(f):
    f = f.clone()
    f[..., S] = 0
    return f


def with_torch_hooks(model, images, deltas):
    """The block's output plus the first delta, the second block's MLP output plus the second."""
    blocks = model.model.visual.transformer.resblocks
    handles = [
        blocks[0].register_forward_hook(lambda _, args, out: out + deltas[0]),
        blocks[1].mlp.register_forward_hook(lambda _, args, out: out + deltas[1]),
    ]
    try:
        return model.encode_image(images)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "edit, expected",
    [
        (mm.Zero(S), zeroed),
        (mm.Steer(S, strength=0.25), lambda f: f + 0.25 * mm.FeatureSet(S, 32).mask),
        (mm.Interpolate(toward=0.0, strength=0.5), lambda f: f / 2),
    ],
    ids=["zero", "steer", "scale"],
)
def test_an_edit_removes_the_decoder_part_at_every_layer(model, images, grad, edit, expected):
    head = shaken(16)
    with torch.set_grad_enabled(grad):
        with model.caching(LAYERS) as cache:
            plain = model.encode_image(images)
        assert model.attach(head, at=LAYERS) == [f"{site}.crosscoder" for site in LAYERS]
        with mm.given_run(cache):
            assert torch.equal(model.encode_image(images), plain)
            with model.hooks(edit), model.caching(f"{LAYERS[0]}.crosscoder.latents") as read:
                got = model.encode_image(images)
            with model.hooks(mm.Zero([])):
                assert torch.equal(model.encode_image(images), plain)
        _, after, deltas, _ = by_hand(head, [cache[site] for site in LAYERS], expected)
        torch.testing.assert_close(got, with_torch_hooks(model, images, deltas), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(read[f"{LAYERS[0]}.crosscoder.latents"], after)
    assert not torch.allclose(got, plain, atol=1e-4)


def test_both_towers_and_one_of_them(model, images, texts):
    head = shaken(12)
    with torch.no_grad(), model.caching(TOWERS) as cache:
        plain = model.encode_image(images), model.encode_text(texts)
    _, _, deltas, _ = by_hand(head, list(plain), zeroed)
    model.attach(head, at=TOWERS)
    with torch.no_grad(), mm.given_run(cache), model.hooks(mask=S):
        edited = model.encode_image(images), model.encode_text(texts)
    for got, x, delta in zip(edited, plain, deltas, strict=True):
        torch.testing.assert_close(got, x + delta)
    # Only one tower runs again: the features are those of the pair. Only one site is edited: the other stays.
    with torch.no_grad(), mm.given_run(cache), model.hooks(mask=S):
        assert torch.equal(model.encode_image(images), edited[0])
    with torch.no_grad(), mm.given_run(cache), model.hooks(mask={"text": mm.FeatureSet(S, 32)}):
        assert torch.equal(model.encode_image(images), plain[0])
        assert torch.equal(model.encode_text(texts), edited[1])


def test_without_error_term_the_reconstruction_flows(model, images, texts):
    head = shaken(12)
    with torch.no_grad(), model.caching(TOWERS) as cache:
        plain = model.encode_image(images), model.encode_text(texts)
    model.attach(head, at=TOWERS, error_term=False)
    _, _, _, recons = by_hand(head, list(plain), zeroed)
    with torch.no_grad(), mm.given_run(cache), model.hooks(mask=S):
        torch.testing.assert_close(model.encode_image(images), recons[0])
        torch.testing.assert_close(model.encode_text(texts), recons[1])


def test_reads_are_recorded_when_all_sites_have_run(model, images, texts):
    head = shaken(12)
    model.attach(head, at=TOWERS)
    with torch.no_grad(), model.caching("*.crosscoder.*") as cache:
        values = [model.encode_image(images), model.encode_text(texts)]
    f, _, _, recons = by_hand(head, values, lambda f: f)
    for site, x, recon in zip(TOWERS, values, recons, strict=True):
        torch.testing.assert_close(cache[f"{site}.crosscoder.latents"], f)
        torch.testing.assert_close(cache[f"{site}.crosscoder.recon"], recon)
        torch.testing.assert_close(cache[f"{site}.crosscoder.error"], x - recon)
        torch.testing.assert_close(head.activate(cache[f"{site}.crosscoder.pre"]), f)
    with model.caching(f"{TOWERS[0]}.crosscoder.latents", detach=False) as cache:
        pixels = images.clone().requires_grad_()
        model.encode_text(texts)
        model.encode_image(pixels)
    cache[f"{TOWERS[0]}.crosscoder.latents"].sum().backward()
    assert pixels.grad is not None and bool(pixels.grad.any())


def test_one_tower_alone_says_what_is_missing(model, images, texts):
    head = shaken(12)
    model.attach(head, at=TOWERS)
    with pytest.raises(
        HookDidNotFire, match=r"of the sites that the head reads together, text\.embed did not run"
    ):
        with model.caching("image.embed.crosscoder.latents"):
            model.encode_image(images)
    with pytest.raises(MMHooksError, match=r"'image\.embed' ran twice before text\.embed"):
        with model.caching("image.embed.crosscoder.latents"):
            model.encode_image(images)
            model.encode_image(images)
    with pytest.raises(MMHooksError, match=r"known once all have run.*given_run"):
        with model.hooks(mask=S):
            model.encode_image(images)
    with model.caching("image.embed") as cache:
        model.encode_image(images)
    with pytest.raises(MMHooksError, match=r"without text\.embed; cache all of its sites"):
        with mm.given_run(cache), model.hooks(mask=S):
            model.encode_image(images)
    # What a closed context left behind does not meet the next one.
    with pytest.raises(HookDidNotFire):
        with model.caching("image.embed.crosscoder.latents"):
            model.encode_text(texts)


def test_other_inputs_and_wrong_places_are_refused(model, images, texts):
    head = shaken(12)
    with pytest.raises(MMHooksError, match="reads 2 sites together: expected as many in at="):
        model.attach(head, at="image.embed")
    with pytest.raises(ShapeMismatch, match="carries width 16"):
        model.attach(head, at=["image.embed", LAYERS[0]])
    model.attach(head, at=TOWERS)
    with model.caching(TOWERS) as cache:
        model.encode_image(images)
        model.encode_text(texts)
    with pytest.raises(ShapeMismatch, match="expected the inputs of the given run"):
        with mm.given_run(cache), model.hooks(mask=S):
            model.encode_image(images[:2])
    with pytest.raises(MMHooksError, match="can be read but not edited"):
        model.hooks(mm.Zero(at="image.embed.crosscoder.error")).__enter__()
    with pytest.raises(MMHooksError, match="no gradient passes through them"):
        model.hooks(bwd_hooks=[("image.embed.crosscoder.latents", lambda g, *, hook: g)]).__enter__()


def test_a_model_in_another_precision(model, images):
    head = shaken(16)
    model.model.to(torch.bfloat16)
    model.attach(head, at=LAYERS)
    with torch.no_grad(), model.caching([*LAYERS, f"{LAYERS[0]}.crosscoder.latents"]) as cache:
        plain = model.encode_image(images.bfloat16())
    want = head.encode(head.join([cache[site] for site in LAYERS]))
    torch.testing.assert_close(cache[f"{LAYERS[0]}.crosscoder.latents"], want)
    with torch.no_grad(), mm.given_run(cache), model.hooks(mask=S):
        got = model.encode_image(images.bfloat16())
    assert got.dtype == torch.bfloat16 and not torch.equal(got, plain)


def test_copies_and_nested_contexts(model, images):
    head = shaken(16)
    model.attach(head, at=LAYERS)
    with torch.no_grad(), model.caching(LAYERS) as cache:
        model.encode_image(images)
    twin = copy.deepcopy(model)
    with torch.no_grad(), mm.given_run(cache):
        with model.hooks(mask=S[:3]), model.hooks(mask=S[3:]):
            nested = model.encode_image(images)
        with twin.hooks(mask=S):
            torch.testing.assert_close(twin.encode_image(images), nested)

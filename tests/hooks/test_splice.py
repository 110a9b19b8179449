"""The splice against recomputation by hand, for every edit, dtype, gradient and place of a head."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mmhooks as mm
from mmhooks.errors import MMHooksError, NoDecoder, ShapeMismatch, WrongHead
from mmhooks.heads import NCL, TopKSAE


def by_hand(head, x, edit):
    """dec(f') + (x - dec(f)), in units of |x|: two decodes, no shortcuts."""
    scale = x.norm(dim=-1, keepdim=True)
    f = head.encode(x / scale)
    return scale * head.decode(edit(f)) + (x - scale * head.decode(f))


def replaced(f, columns, values):
    f = f.clone()
    f[..., columns] = values if isinstance(values, float) else values[..., columns]
    return f


S = [0, 3, 5, 8, 13, 21, 30]
MEANS = torch.linspace(0, 1, 32)
CASES = {
    "zero": (mm.Zero(S), lambda f: replaced(f, S, 0.0)),
    "zero all": (mm.Zero(range(32)), lambda f: 0 * f),
    "mean": (mm.Mean(S, mean=MEANS), lambda f: replaced(f, S, MEANS.expand_as(f))),
    "batch mean": (mm.Mean(S), lambda f: replaced(f, S, f.mean(0, keepdim=True).expand_as(f))),
    "interpolate": (
        mm.Interpolate(S, toward=MEANS, strength=0.3),
        lambda f: replaced(f, S, 0.7 * f + 0.3 * MEANS),
    ),
    "steer": (mm.Steer(S, strength=0.25), lambda f: replaced(f, S, f + 0.25)),
    "clamp": (mm.Clamp(S, max=0.2), lambda f: replaced(f, S, f.clamp(max=0.2))),
    "set": (mm.Clamp(S, value=0.5), lambda f: replaced(f, S, 0.5)),
    "patch": (mm.Patch(MEANS, S, at="image.embed.sae.latents"), lambda f: replaced(f, S, MEANS.expand_as(f))),
    "scale all": (mm.Interpolate(toward=0.0, strength=0.5), lambda f: f / 2),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("grad", [False, True])
def test_every_edit_equals_recomputation(model, images, sae, name, grad):
    edit, expected = CASES[name]
    with torch.set_grad_enabled(grad):
        x = model.encode_image(images)
        model.attach(sae, at="image.embed")
        with model.hooks(edit):
            z = model.encode_image(images)
    torch.testing.assert_close(z, by_hand(sae, x, expected), atol=1e-6, rtol=1e-5)
    assert not torch.equal(z, x)


def test_two_edits_share_one_encode_and_nest(model, images, sae):
    calls = []

    class Counting(TopKSAE):
        def pre(self, x):
            calls.append(1)
            return super().pre(x)

    head = Counting(12, 32, 4)
    head.load_state_dict(sae.state_dict())
    x = model.encode_image(images)
    model.attach(head, at="image.embed")
    with model.hooks(mm.Zero([0, 1, 2])), model.hooks(mm.Steer([2, 7], strength=0.1), mask=[9]):
        with model.caching("image.embed.sae.latents") as cache:
            z = model.encode_image(images)
    assert len(calls) == 1

    def expected(f):
        return replaced(
            replaced(replaced(f, [0, 1, 2], 0.0), [2, 7], replaced(f, [0, 1, 2], 0.0) + 0.1), [9], 0.0
        )

    torch.testing.assert_close(z, by_hand(sae, x, expected), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        cache["image.embed.sae.latents"], expected(sae.encode(x / x.norm(dim=-1, keepdim=True)))
    )


def test_an_edit_that_changes_nothing_gives_x_itself(model, images, sae):
    model.attach(sae, at=["image.embed"])
    with torch.no_grad():
        x, cache = model.run_with_cache(images, sites=["image.embed.sae.*"])
        silent = (cache["image.embed.sae.latents"] == 0).all(0).nonzero().flatten()
        assert len(silent)
        for edit in (mm.Zero(silent), mm.Mean(silent, mean=0.0), mm.Clamp(silent, min=-1.0)):
            with model.hooks(edit):
                assert torch.equal(model.encode_image(images), x.image)
    error, recon = cache["image.embed.sae.error"], cache["image.embed.sae.recon"]
    torch.testing.assert_close(recon + error, x.image)


def test_without_error_term_the_reconstruction_flows(model, images, sae):
    x = model.encode_image(images)
    model.attach(sae, at="image.embed", error_term=False)
    assert torch.equal(model.encode_image(images), x)
    with model.hooks(mask=S):
        z = model.encode_image(images)
    scale = x.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(z, scale * sae.decode(replaced(sae.encode(x / scale), S, 0.0)))


def test_gradients_to_input_head_and_edit(model, images, sae):
    """Against autograd through the two-decode formula."""
    strength = torch.tensor(0.3, requires_grad=True)
    weights = torch.randn(3, 12)
    for edit, expected in (
        (mm.Zero(S), lambda f: f * ~mm.FeatureSet(S, 32).mask),
        (mm.Steer(S, strength=strength), lambda f: f + strength * mm.FeatureSet(S, 32).mask),
    ):
        pixels = images.clone().requires_grad_()
        inputs = [pixels, sae.W_enc, sae.W_dec, *([strength] if isinstance(edit, mm.Steer) else [])]
        reference = (by_hand(sae, model.encode_image(pixels), expected) * weights).sum()
        want = torch.autograd.grad(reference, inputs)
        model.attach(sae, at="image.embed")
        with model.hooks(edit):
            got = torch.autograd.grad((model.encode_image(pixels) * weights).sum(), inputs)
        model.detach()
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_gradient_of_a_latent_is_that_of_the_edited_feature(model, images, sae):
    model.attach(sae, at="image.embed")
    weights, grads = torch.randn(3, 12), {}
    with model.hooks(
        bwd_hooks=[("image.embed.sae.latents", lambda g, *, hook: grads.update({hook.name: g}))]
    ):
        z = model.encode_image(images)
        (z * weights).sum().backward()
    want = z.norm(dim=-1, keepdim=True) * weights @ sae.W_dec.T
    torch.testing.assert_close(grads["image.embed.sae.latents"], want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(model, images, sae, dtype):
    model.attach(sae, at=["image.embed", "image.blocks.1.mlp_out"] if sae.d_in == 16 else ["image.embed"])
    with torch.no_grad(), torch.autocast("cpu", dtype):
        x = model.encode_image(images)
        with model.hooks(mask=range(32)):
            z = model.encode_image(images)
    assert z.dtype == x.dtype and z.isfinite().all() and not torch.equal(x, z)
    with torch.no_grad(), model.hooks(mask=range(32)):
        exact = model.encode_image(images)
    torch.testing.assert_close(z.float(), exact, atol=0.05, rtol=0.1)


def test_token_sites_and_several_heads(model, images):
    site = "image.blocks.0.resid_post"
    one, two = TopKSAE(16, 40, 5, name="one"), TopKSAE(16, 24, 3, name="two", seed=9)
    model.attach(one, at=site), model.attach(two, at=site)
    _, plain = model.run_with_cache(images, sites=[site])
    edits = (
        mm.Zero(range(40), at=f"{site}.one", tokens=[0]),
        mm.Zero(range(24), at=f"{site}.two", tokens=slice(1, 3)),
    )
    with model.hooks(*edits), model.caching([site]) as cache:
        model.encode_image(images)
    x = plain[site]
    want = x.clone()
    want[:, :1] = by_hand(one, x, lambda f: 0 * f)[:, :1]
    want[:, 1:3] = by_hand(two, x, lambda f: 0 * f)[:, 1:3]
    torch.testing.assert_close(cache[site], want, atol=1e-6, rtol=1e-5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sets(st.integers(0, 31)), st.sets(st.integers(0, 31)), st.integers(1, 32))
def test_active_only_equals_dense(a, b, k):
    """The path over the K active features against the one over all of them."""
    from .conftest import tiny_clip

    head = TopKSAE(12, 32, k, seed=k)

    class Dense:  # the same head, without its short cut
        encode_topk = None

        def __getattr__(self, name):
            if name == "encode_topk":
                raise AttributeError(name)
            return getattr(head, name)

    dense = Dense()
    del Dense.encode_topk
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(k))
    out = []
    for each in (head, dense):
        model = mm.HookedCLIP(tiny_clip())
        model.attach(each, at="image.embed", name="h")
        with torch.no_grad(), model.hooks(mm.Zero(sorted(a)), mm.Clamp(sorted(b), max=0.1)):
            out.append(model.encode_image(x))
    torch.testing.assert_close(*out, atol=1e-6, rtol=1e-5)


# -- messages --------------------------------------------------------------------------------------------


def test_masks_of_another_head(model, images, sae):
    other = mm.FeatureSet([1], 32, name="ImgD", head="topk-0000")
    with pytest.raises(MMHooksError, match=r"no head is attached.*model\.attach"):
        with model.hooks(mask=[1]):
            pass
    with pytest.raises(WrongHead, match=r"topk-0000.*no head is attached at 'image\.embed'"):
        with model.hooks(mm.Zero(other, at="image.embed")):
            pass
    model.attach(sae, at="image.embed")
    with pytest.raises(WrongHead, match=f"ImgD.*topk-0000.*{sae.id}"):
        with model.hooks(mask=other):
            pass
    with pytest.raises(WrongHead, match="32|64"):
        with model.hooks(mask=mm.FeatureSet([1], 64)):
            pass
    with pytest.raises(ShapeMismatch, match="feature 40 of 32"):
        with model.hooks(mask=[40]):
            pass


def test_a_head_of_the_wrong_width(model, images):
    with pytest.raises(ShapeMismatch, match=r"width 10.*image\.embed.*width 12"):
        model.attach(TopKSAE(10, 20, 2), at="image.embed")
    assert not model.places.attachments
    model.attach(TopKSAE(10, 20, 2), at="visual")  # a native path: what flows there is known when it flows
    with pytest.raises(ShapeMismatch, match=r"width 10.*visual.*\(3, 12\)"):
        with model.hooks(mask=[1]):
            model.encode_image(images)


def test_a_head_without_decoder(model, images, ncl):
    model.attach(ncl, at="image.embed")
    with pytest.raises(NoDecoder, match=r"'ncl'.*no decoder.*splice=False"):
        with model.hooks(mask=[1]):
            pass
    model.detach(ncl)
    model.attach(ncl, at="image.embed", splice=False)
    x = model.encode_image(images)
    with model.hooks(mask=range(12)), model.caching("image.embed.ncl.latents") as cache:
        assert torch.equal(model.encode_image(images), x)
    f = ncl.encode(x / x.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(cache["image.embed.ncl.latents"], replaced(f, list(range(12)), 0.0))
    assert isinstance(ncl, NCL)


def test_ambiguous_heads_and_taken_names(model, sae):
    model.attach(sae, at="image.embed")
    with pytest.raises(MMHooksError, match=r"'image\.embed\.sae' is already attached"):
        model.attach(sae, at="image.embed")
    model.attach(TopKSAE(12, 32, 4), at="text.embed", name="other")
    with pytest.raises(MMHooksError, match=r"fits several heads.*image\.embed\.sae, text\.embed\.other"):
        with model.hooks(mask=[1]):
            pass

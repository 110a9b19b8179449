"""One tap for each place whoever wraps the module; installation whole or not at all; modes and threads that differ."""

from __future__ import annotations

import copy
import gc
import sys
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import mmhooks as mm
from mmhooks.errors import MMHooksError, MMHooksWarning
from mmhooks.hooks.sites import SiteMap
from mmhooks.models.hooked import HookedModel

from .conftest import fingerprint, tiny_clip

SITES = ["image.patches", "image.blocks.0.resid_pre", "image.blocks.0.attn.q", "image.blocks.0.attn.pattern",
         "image.blocks.0.attn.z", "image.blocks.0.resid_mid", "image.blocks.1.mlp.post", "image.pooled", "image.embed",
         "text.blocks.0.attn.z", "text.pooled", "text.embed", "visual.transformer.resblocks.0.attn"]  # fmt: skip


# -- two wrappers of one model ---------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("site", SITES)
def test_order_is_by_context_whoever_wraps_the_model(model, images, texts, site, grad):
    """Sums and products do not commute: outer first, at every site, in both nestings; the inner cache shows both."""
    other = mm.HookedCLIP(model.model)

    def add(t, *, hook):
        return t + 1

    def double(t, *, hook):
        return t * 2

    with torch.set_grad_enabled(grad):
        with model.hooks(fwd_hooks=[(site, add), (site, double)]), model.caching(site) as cache:
            want = model.forward(images, texts)
        for outer, inner in ((model, other), (other, model)):
            with (
                outer.hooks(fwd_hooks=[(site, add)]),
                inner.hooks(fwd_hooks=[(site, double)]),
                inner.caching(site) as seen,
            ):
                got = inner.forward(images, texts)
            assert torch.equal(got.image, want.image) and torch.equal(got.text, want.text)
            assert torch.equal(seen[site], cache[site])


def test_wrappers_of_a_part_and_of_copies_share_taps_too(model, images):
    part = HookedModel(model.model.visual, SiteMap(model.model.visual))
    order: list[str] = []

    def note(name):
        return lambda t, *, hook: order.append(name)

    with (
        part.hooks(fwd_hooks=[("ln_post", note("a"))]),
        model.hooks(fwd_hooks=[("image.ln_post", note("b"))]),
    ):
        with part.hooks(fwd_hooks=[("ln_post", note("c"))]):
            model.encode_image(images)
    assert order == ["a", "b", "c"]
    twin = copy.deepcopy(model)
    again = mm.HookedCLIP(twin.model)
    for site, place in twin.places.sites.canonical.items():
        assert again.places.sites.canonical[site].tap is place.tap
        assert place.tap is not model.places.sites.canonical[site].tap


def test_taps_die_with_their_models():
    from mmhooks.hooks.dispatch import registry

    gc.collect()
    before = len(registry._known)
    model = mm.HookedCLIP(tiny_clip())
    assert len(registry._known) > before
    del model
    gc.collect()
    assert len(registry._known) <= before


# -- installed whole or not at all -----------------------------------------------------------------------


class Own(nn.Module):
    """A module that copies itself, as some do."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x)

    def __deepcopy__(self, memo):
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(vars(self), memo))
        return new


class Made(Own):
    def __deepcopy__(self, memo):
        new = type(self)()
        new.load_state_dict(self.state_dict())
        return new


@pytest.mark.parametrize("kind", [Own, Made, "parametrized"])
@pytest.mark.parametrize("site", ["0", "0.inner"])
def test_a_copy_of_its_own_making_is_clean(kind, site):
    net = nn.Sequential(Own() if kind == "parametrized" else kind())
    if kind == "parametrized":
        parametrizations.weight_norm(net[0].inner)
    model, x = HookedModel(net, SiteMap(net)), torch.randn(2, 4)
    clean = net(x)
    with model.hooks(mm.Zero(at=site)):
        twin = copy.deepcopy(net)
        assert torch.equal(twin(x), clean) and not torch.equal(net(x), clean)
    with model.hooks(mm.Zero(at=site), strict=False):
        assert torch.equal(twin(x), clean)
    # transformers' copies keep nothing of ours either: neither a class nor a hook
    assert [type(m).__mro__ for m in twin.modules()] == [
        type(m).__mro__ for m in copy.deepcopy(net).modules()
    ] or (
        kind == "parametrized"  # torch makes these a class each
    )
    assert not any(m._forward_hooks or "_mmhooks_shadows" in vars(type(m)) for m in twin.modules())


def test_a_module_that_cannot_be_hooked_leaves_nothing(images):
    model = tiny_clip()
    model.visual.ln_post = torch.jit.trace(model.visual.ln_post, torch.randn(3, 5, 16))
    hooked, before = mm.HookedCLIP(model), fingerprint(model)
    with pytest.raises(MMHooksError, match=r"expected a module that runs in Python, got .*torch\.jit"):
        with hooked.hooks(mm.Zero(at=["image.blocks.0.mlp_out", "image.ln_post", "image.embed"])):
            pass
    assert fingerprint(model) == before and len(hooked._registry) == 0
    hooked.run_with_cache(images, sites="image.blocks.*.resid_post")


class Twice(nn.Module):
    def forward(self, w):
        return 2 * w


@pytest.mark.parametrize("order", ["before", "inside", "both"])
def test_parametrized_while_a_context_is_open(model, images, order):
    """Another library's class over ours: closing takes ours out from under it, and the other's stays."""
    first, second = (b.mlp.c_fc for b in model.model.visual.transformer.resblocks)
    if order != "inside":
        parametrizations.weight_norm(first)
    with model.hooks(mm.Zero([1], at=["image.blocks.0.mlp.pre", "image.blocks.1.mlp.pre"])):
        inner = model.hooks(mm.Zero([2], at="image.blocks.1.mlp.pre"), strict=False)
        if order != "before":
            parametrize.register_parametrization(second, "weight", Twice())
        with inner, model.caching("image.blocks.1.mlp.pre") as cache:
            model.encode_image(images)
        assert not cache["image.blocks.1.mlp.pre"][..., 1:3].any()
    assert not any(m._forward_hooks for m in model.model.modules()) and len(model._registry) == 0
    assert not any("_mmhooks_shadows" in vars(k) for m in model.model.modules() for k in type(m).__mro__)
    if order != "before":
        assert type(second).__mro__[1] is nn.Linear
        parametrize.remove_parametrizations(second, "weight")
        assert type(second) is nn.Linear


def test_any_tap_that_fails_takes_the_others_out(model, images, monkeypatch):
    """Whichever of several taps raises while it is installed, half-way or not."""
    before, sites = (
        fingerprint(model.model),
        ["image.blocks.0.mlp_out", "image.blocks.0.attn.z", "image.pooled", "image.embed"],
    )
    for site in sites:
        tap = model.places.sites.canonical[site].tap
        install = type(tap).install

        def broken(self, tap=tap, install=install):
            install(self)
            if self is tap:
                raise OSError("no")

        monkeypatch.setattr(type(tap), "install", broken)
        with pytest.raises(OSError, match="no"), model.hooks(mm.Zero(at=sites)):
            pass
        monkeypatch.undo()
        assert fingerprint(model.model) == before and len(model._registry) == 0


# -- the projection that no module owns ------------------------------------------------------------------


def test_only_the_towers_own_product_fires(model, images, texts):
    """A logit lens inside and outside of hooks, and all that a Parameter can do."""
    visual, root = model.model.visual, model.model
    stream = torch.randn(3, 16)

    def lens(t, *, hook):
        assert (visual.ln_post(t) @ visual.proj).shape[-1] == 12

    def mine(visual, x):  # looks like a method, is none
        return x @ visual.proj

    for site in ("image.pooled", "text.pooled"):
        clean = model.run_with_cache(images, texts, site)[1][site]
        with model.caching(site) as cache, model.hooks(fwd_hooks=[("image.blocks.*.resid_post", lens)]):
            model.forward(images, texts)
            _ = stream @ visual.proj, torch.matmul(stream, root.text_projection), mine(visual, stream)
        assert torch.equal(cache[site], clean)
    with model.hooks(mm.Zero(at="image.pooled"), mm.Zero(at="text.pooled")):
        model.forward(images, texts)
        pairs = [
            (visual.proj, visual._parameters["proj"]),
            (root.text_projection, root._parameters["text_projection"]),
        ]
        for parameter, raw in pairs:
            assert parameter is raw
            assert (stream @ parameter).any() and (parameter * 2).shape == parameter.T.shape[::-1]
            assert isinstance(parameter, nn.Parameter) and len(parameter) == 16 and parameter[0].norm() > 0
            torch.nn.utils.clip_grad_norm_([parameter], 1.0)
            copy.deepcopy(parameter), hash(parameter), parameter.detach().numpy(), list(parameter)


class Scaled(nn.Module):
    """A tower whose code does more with its projection than multiply by it."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        assert (
            len(self.proj) == 4
            and self.proj[0].shape == (3,)
            and (2 * self.proj - self.proj / 2).shape == (4, 3)
        )
        return x @ self.proj + (x @ (self.proj * 2)) * (-self.proj).sum()


def test_the_towers_code_may_do_anything_with_it():
    from mmhooks.hooks.parameter_product import ParameterProduct
    from mmhooks.hooks.sites import Site

    torch.manual_seed(0)
    net, x = Scaled(), torch.randn(2, 4)
    sites = SiteMap(net)
    sites.add(Site("pooled", ParameterProduct(net, "proj"), "in", tokens=None))
    model, clean, seen = HookedModel(net, sites), net(x), []
    with model.hooks(fwd_hooks=[("pooled", lambda t, *, hook: seen.append(t.clone()))]):
        assert torch.equal(net(x), clean)
    assert len(seen) == 1 and torch.equal(seen[0], x)
    net.forward = lambda self_x: Scaled.forward(net, self_x)  # accelerate and friends
    with model.hooks(mm.Zero(at="pooled")):
        assert not torch.equal(net(x), clean)


# -- modes and threads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("opens", ["outer", "inner", "edit"])
def test_contexts_of_inference_mode_and_of_grad_mode(model, images, sae, opens):
    """Whatever was made in inference mode: afterwards a forward in grad mode has its gradients."""
    model.attach(sae, at="image.embed")
    pixels = images.clone().requires_grad_()

    def gradient():
        return torch.autograd.grad(model.encode_image(pixels).square().sum(), pixels)[0]

    with model.hooks(
        mm.Zero(torch.arange(32) < 20, at="image.embed.sae.latents"), mm.Steer([1], at="image.embed")
    ):
        want = gradient()
    with torch.inference_mode():
        made = [mm.Zero(torch.arange(32) < 20, at="image.embed.sae.latents"), mm.Steer([1], at="image.embed")]
        model.encode_image(images)
    if opens != "edit":
        made = [mm.Zero(torch.arange(32) < 20, at="image.embed.sae.latents"), mm.Steer([1], at="image.embed")]
    context = model.hooks(*made)
    with torch.inference_mode(opens == "outer"):
        context.__enter__()
    if opens == "inner":
        with (
            torch.inference_mode(),
            model.hooks(mm.Zero([3], at="image.embed")),
            model.caching("image.embed"),
        ):
            model.encode_image(images)
    got = gradient()
    context.__exit__(None, None, None)
    assert torch.equal(got, want)


def test_a_class_that_changes_under_a_reader(model, images):
    """Another thread opens and closes, so the module's class changes between any two steps of a forward."""
    faults, done = [], threading.Event()

    def run():
        try:
            while not done.is_set():
                with torch.no_grad():
                    model.encode_image(images[:1])
        except BaseException as fault:
            faults.append(fault)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=run)
    thread.start()
    try:
        for _ in range(150):
            with model.hooks(
                mm.Zero(at=["image.blocks.0.attn.z", "image.blocks.0.resid_mid", "image.pooled"]),
                strict=False,
            ):
                pass
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert not faults


def test_a_descriptor_outlives_its_class(model):
    """The race in slow motion: the attribute's descriptor was found, then the module got its class back."""
    attn = model.model.visual.transformer.resblocks[0].attn
    with model.hooks(mm.Zero(at="image.blocks.0.attn.z"), strict=False):
        shadowed = type(attn)
    descriptor = vars(shadowed)["forward"]
    assert callable(descriptor.__get__(attn, shadowed)) and type(attn) is nn.MultiheadAttention
    assert copy.copy(attn).num_heads == vars(shadowed)["__reduce_ex__"](attn, 4)[2]["num_heads"]


# -- said at run time ------------------------------------------------------------------------------------


def test_a_cache_that_kept_the_last_of_several_values(model, images):
    for options in ({}, {"tokens": [0]}, {"detach": False}):
        with pytest.warns(MMHooksWarning, match=r"image\.blocks\.0\.resid_post ran more than once.*generate"):
            with model.caching("image.blocks.0.resid_post", **options):
                model.encode_image(images), model.encode_image(images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with model.caching("image.blocks.0.resid_post", strict=False):
            model.encode_image(images), model.encode_image(images)
        with model.caching(
            ["image.blocks.0.resid_post", "image.blocks.*.resid_post"]
        ):  # one site by two patterns
            model.encode_image(images)
        model.model.set_grad_checkpointing()  # a block that is recomputed ran once
        with model.caching("image.blocks.0.resid_post"):
            model.encode_image(images).sum().backward()


class Streams(nn.Module):
    def forward(self, x):
        return {"tuple": (x, 2 * x), "list": [x, (3 * x,)], "dict": {"a": x, "b": x + 1}, "one": (x, None)}[
            self.kind
        ]


@pytest.mark.parametrize("kind", ["tuple", "list", "dict", "one"])
def test_a_module_with_several_tensors(kind):
    net = nn.Sequential(Streams())
    net[0].kind = kind
    model = HookedModel(net, SiteMap(net))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with model.caching("0") as cache:
            net(torch.ones(2))
    assert torch.equal(cache["0"], torch.ones(2))
    words = [str(w.message) for w in told if w.category is MMHooksWarning]
    assert words == [] if kind == "one" else "Streams returns 2 tensors" in words[0]
    net[0].forward = lambda x: (None, x)
    with (
        pytest.raises(MMHooksError, match="Streams to return a tensor.*got tuple of NoneType, Tensor"),
        model.caching("0"),
    ):
        net(torch.ones(2))

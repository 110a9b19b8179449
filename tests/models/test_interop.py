"""The same three interventions through mmhooks, TransformerLens and nnsight."""

from __future__ import annotations

import pytest
import torch
from hooks.conftest import fingerprint, tiny_clip

import mmhooks as mm
from mmhooks.errors import MMHooksError, ShapeMismatch, UnknownSite

STEER = torch.linspace(-1, 1, 16)
INTERVENTIONS = {
    "zero attention head": (
        "image.blocks.0.attn.z",
        lambda t: torch.cat([0 * t[..., :1, :], t[..., 1:, :]], -2),
    ),
    "steer residual": ("text.blocks.1.resid_post", lambda t: t + STEER),
    "zero features": ("image.embed.sae.latents", lambda t: t * (torch.arange(32) > 15)),
}


@pytest.fixture
def model():
    model = mm.HookedCLIP(tiny_clip())
    model.attach(mm.TopKSAE(12, 32, 4), at=["image.embed"])
    return model


@pytest.fixture
def inputs():
    torch.manual_seed(5)
    return torch.randn(2, 3, 16, 16), torch.randint(1, 31, (2, 6))


def no_hooks(lens) -> bool:
    """Whether no HookPoint has a hook; ``list_hooks`` of TransformerLens tells it from 3.9 on only."""
    return not any(point.fwd_hooks or point.bwd_hooks for point in lens.hook_dict.values())


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_three_toolkits_agree(model, inputs, name):
    site, change = INTERVENTIONS[name]
    before = fingerprint(model.model)
    clean = model.forward(*inputs)
    ours = model.run_with_hooks(*inputs, fwd_hooks=[(site, lambda t, *, hook: change(t))])
    lens = model.as_transformer_lens().run_with_hooks(*inputs, fwd_hooks=[(site, lambda t, hook: change(t))])
    view = model.as_nnsight([site])
    with view.trace(*inputs):
        node = view.get(site)
        node.output = change(node.output)
        theirs = view.output.save()
    for other in (lens, theirs):
        torch.testing.assert_close(other.image, ours.image, atol=1e-6, rtol=0)
        torch.testing.assert_close(other.text, ours.text, atol=1e-6, rtol=0)
    assert not (torch.equal(ours.image, clean.image) and torch.equal(ours.text, clean.text))
    assert fingerprint(model.model) == before


def test_lens_caches_and_encoders(model, inputs):
    lens = model.as_transformer_lens()
    out, cache = lens.run_with_cache(*inputs)
    _, ours = model.run_with_cache(*inputs)
    assert set(cache.keys()) == set(ours) == set(model.sites())
    for site in ours:
        torch.testing.assert_close(cache[site], ours[site], atol=1e-6, rtol=1e-5)
    seen = []
    with lens.hooks(fwd_hooks=[("image.embed", lambda t, hook: seen.append(hook.name))]):
        assert torch.equal(lens.encode_image(inputs[0]), model.encode_image(inputs[0]))
        lens.encode_text(inputs[1])
    assert seen == ["image.embed"]
    assert set(ours.to_transformer_lens(lens).keys()) == set(ours)


def test_lens_backward_hooks(model, inputs):
    lens, grads = model.as_transformer_lens(), []
    with lens.hooks(bwd_hooks=[("image.blocks.0.attn.z", lambda g, hook: grads.append(g.shape))]):
        lens.encode_image(inputs[0]).sum().backward()
    assert grads == [(2, 5, 2, 8)]


def test_trace_reaches_sites_by_name(model, inputs):
    with model.trace(inputs[0], sites=["image.embed", "image.blocks.*.resid_post"]) as tracer:
        z = tracer.sites.image.embed.output.save()
    assert torch.equal(z, model.encode_image(inputs[0]))


# -- TransformerLens's view acts, or says why it does not -------------------------------------------------------


def test_the_view_moves_and_switches_the_model(model):
    lens, own = model.as_transformer_lens(), model.model
    assert [p is q for p, q in zip(lens.parameters(), own.parameters(), strict=True)].count(False) == 0
    assert dict(lens.named_buffers()).keys() == dict(own.named_buffers()).keys()
    assert list(lens.state_dict()) == list(own.state_dict())
    assert lens.train() is lens and own.training and lens.training
    assert lens.eval() is lens and not any(m.training for m in own.modules())
    assert lens.requires_grad_(False) is lens and not any(p.requires_grad for p in own.parameters())
    lens.requires_grad_(True)
    assert all(p.requires_grad for p in own.parameters())
    head = next(iter(model.places.attachments.values())).head
    assert lens.to(torch.float64) is lens
    assert {p.dtype for p in (*own.parameters(), *head.parameters())} == {torch.float64}
    lens.float()
    assert model.dtype == torch.float32 and lens.device == model.device
    lens.zero_grad()
    state = {k: v + 1 for k, v in own.state_dict().items()}
    lens.load_state_dict(state)
    assert torch.equal(own.logit_scale, state["logit_scale"])


def test_a_view_of_a_model_in_training_says_so(model):
    model.model.train()
    assert model.as_transformer_lens().training


def test_layers_of_points(model):
    lens = model.as_transformer_lens()
    for name, point in lens.hook_dict.items():
        if ".blocks." in name:
            assert point.layer() == int(name.split(".")[2])
    with pytest.raises(MMHooksError, match=r"layer number.*got 'image\.embed'"):
        lens.hook_dict["image.embed"].layer()


FILTERS = {
    "native": ("visual.transformer.resblocks.0", ["visual.transformer.resblocks.0"]),
    "native glob": (
        "visual.transformer.resblocks.*.ln_1",
        [f"visual.transformer.resblocks.{n}.ln_1" for n in (0, 1)],
    ),
    "glob": ("image.blocks.*.resid_post", [f"image.blocks.{n}.resid_post" for n in (0, 1)]),
    "both": (["image.embed", "visual.conv1"], ["image.embed", "visual.conv1"]),
    "predicate": (lambda n: n.endswith("ln_post"), ["image.ln_post"]),
    "branch and leaf": (
        ["visual.transformer", "visual.transformer.resblocks.1"],
        ["visual.transformer", "visual.transformer.resblocks.1"],
    ),
}


@pytest.mark.parametrize("name", FILTERS)
def test_filters_find_what_sites_finds(model, inputs, name):
    given, want = FILTERS[name]
    lens = model.as_transformer_lens()
    before = fingerprint(model.model)
    for _ in range(2):
        out, cache = lens.run_with_cache(*inputs, names_filter=given)
        _, ours = model.run_with_cache(*inputs, sites=given)
        assert sorted(cache.keys()) == sorted(want) == sorted(ours)
        for site in want:
            torch.testing.assert_close(cache[site], ours[site])
    seen = []
    lens.run_with_hooks(
        *inputs,
        fwd_hooks=[
            (
                given if isinstance(given, str) or callable(given) else given[0],
                lambda t, hook: seen.append(hook.name),
            )
        ],
    )
    assert seen
    assert fingerprint(model.model) == before


@pytest.mark.parametrize(
    "names",
    ["image.blocks.7.resid_post", "visual.nothing", "*.nothing", ["image.embed", "nothing"], lambda n: False],
)
def test_filters_that_match_nothing_raise(model, inputs, names):
    lens = model.as_transformer_lens()
    with pytest.raises(UnknownSite):
        lens.run_with_cache(*inputs, names_filter=names)
    one = names[1] if isinstance(names, list) else names
    for act in (
        lambda: lens.run_with_hooks(*inputs, fwd_hooks=[(one, lambda t, hook: None)]),
        lambda: lens.add_hook(one, lambda t, hook: None),
        lambda: lens.add_caching_hooks(names),
    ):
        with pytest.raises(UnknownSite):
            act()
    assert no_hooks(lens)


def test_the_cache_is_transformer_lens_own(model, inputs):
    from transformer_lens import ActivationCache

    lens = model.as_transformer_lens()
    _, cache = lens.run_with_cache(*inputs)
    _, ours = model.run_with_cache(*inputs)
    assert isinstance(cache, ActivationCache) and cache["image.embed"].shape == (2, 12)
    with pytest.raises(MMHooksError, match=r"image, text.*cache\.tower"):
        cache["resid_post", 1]
    for tower in ("image", "text"):
        part = cache.tower(tower)
        for theirs, site in {
            ("resid_post", 1): "blocks.1.resid_post",
            ("resid_pre", 0): "blocks.0.resid_pre",
            ("resid_post", -1): "blocks.1.resid_post",
            ("attn_out", 1): "blocks.1.attn_out",
            ("mlp_out", -2): "blocks.0.mlp_out",
            ("z", 0): "blocks.0.attn.z",
            ("q", 1): "blocks.1.attn.q",
            ("pattern", 0): "blocks.0.attn.pattern",
            ("pre", 1): "blocks.1.mlp.pre",
            ("post", 1, "mlp"): "blocks.1.mlp.post",
            ("result", 0): "blocks.0.attn.head_out",
            ("resid_mid", 1): "blocks.1.resid_mid",
            "k1": "blocks.1.attn.k",
            "blocks.0.hook_resid_post": "blocks.0.resid_post",
            "blocks.1.attn.hook_v": "blocks.1.attn.v",
        }.items():
            torch.testing.assert_close(part[theirs], ours[f"{tower}.{site}"], atol=1e-6, rtol=1e-5)
        stacked = part.stack_activation("resid_post")
        torch.testing.assert_close(stacked, ours.stack(f"{tower}.blocks.*.resid_post"), atol=1e-6, rtol=1e-5)
        assert part.stack_activation("z", 1, "attn").shape[0] == 1
        assert (
            part.apply_slice_to_batch_dim(0)["resid_post", 1].shape
            == ours[f"{tower}.blocks.1.resid_post"][0].shape
        )
    _, alone = lens.run_with_cache(inputs[0], names_filter="image.*")
    assert torch.equal(alone["resid_post", 1], alone["image.blocks.1.resid_post"])
    for missing in (("resid_post", 9), "hook_embed", ("scale", 0, "ln1")):
        with pytest.raises(UnknownSite, match="this cache"):
            alone[missing]
    with pytest.raises(UnknownSite):
        alone.tower("text")


def test_what_reads_weights_says_why_not(model, inputs):
    _, cache = model.as_transformer_lens().run_with_cache(inputs[0])
    for act in (cache.accumulated_resid, cache.decompose_resid, cache.stack_head_results):
        with pytest.raises(MMHooksError, match=r"no 'cfg'.*mm\.decompose"):
            act()
    assert not hasattr(model.as_transformer_lens(), "cfg")


def test_bools_are_not_layers(model, inputs):
    lens = model.as_transformer_lens()
    _, cache = lens.run_with_cache(inputs[0], names_filter="image.*")
    reads = (
        lambda layer: cache.accumulated_resid(layer=layer),
        lambda layer: cache.stack_activation("resid_post", layer),
        lambda layer: cache["resid_post", layer],
    )
    for read in reads:
        for layer in (True, False):
            with pytest.raises(ShapeMismatch, match="layer: expected a whole number, got the bool"):
                read(layer)


def test_incl_bwd_acts_on_a_number_and_else_refuses(model, inputs):
    lens = model.as_transformer_lens()
    with pytest.raises(ShapeMismatch, match=r"one number, got CLIPOutput.*get_caching_hooks"):
        lens.run_with_cache(*inputs, incl_bwd=True)
    assert no_hooks(lens)
    values, fwd, bwd = lens.get_caching_hooks("image.embed", incl_bwd=True)
    with lens.hooks(fwd, bwd):
        lens(*inputs).image.sum().backward()
    assert torch.equal(values["image.embed_grad"], torch.ones(2, 12))

    class Loss(type(lens)):
        def forward(self, *args):
            return super().forward(*args).image.sum()

    _, cache = Loss(model).run_with_cache(
        inputs[0], names_filter=["image.embed", "image.ln_post"], incl_bwd=True
    )
    assert torch.equal(cache["image.embed_grad"], torch.ones(2, 12)) and "image.ln_post_grad" in cache


def test_removing_the_batch_dimension(model, inputs):
    lens = model.as_transformer_lens()
    _, cache = lens.run_with_cache(inputs[0][:1], names_filter="image.*", remove_batch_dim=True)
    assert cache["image.embed"].shape == (12,) and not cache.has_batch_dim
    with pytest.raises(ShapeMismatch, match="got 2 rows"):
        lens.run_with_cache(inputs[0], remove_batch_dim=True)


# -- several invokes of one nnsight trace -----------------------------------------------------------------------


@pytest.mark.parametrize("both", [False, True])
def test_invokes_are_one_batch_and_each_sees_its_own_rows(model, inputs, both):
    images, texts = inputs
    given = [(images[:1], texts[:1]), (images, texts)] if both else [(images[:1],), (images,)]
    view = model.as_nnsight(["image.embed", "image.blocks.0.resid_post"])
    with view.trace() as tracer:
        with tracer.invoke(*given[0]):
            view.image.blocks[0].resid_post.output = view.image.blocks[0].resid_post.output * 0
            first = view.image.embed.output.save()
        with tracer.invoke(*given[1]):
            second = view.image.embed.output.save()
            out = view.output.save()
    plain = model.encode_image(images)
    torch.testing.assert_close(second, plain, atol=1e-6, rtol=1e-5)
    with model.hooks(mm.Zero(at="image.blocks.0.resid_post")):
        torch.testing.assert_close(first, model.encode_image(images[:1]), atol=1e-6, rtol=1e-5)
    assert out.image.shape == (2, 12) and (out.text is None) == (not both)


def test_invokes_that_do_not_go_together(model, inputs):
    images, texts = inputs
    view = model.as_nnsight(["image.embed"])
    with pytest.raises(MMHooksError, match=r"same inputs.*images \(Tensor\); texts \(Tensor\)"):
        with view.trace() as tracer:
            with tracer.invoke(images):
                view.image.embed.output.save()
            with tracer.invoke(texts=texts):
                view.output.save()
    with pytest.raises(MMHooksError, match=r"1 images, 2 texts"):
        with view.trace() as tracer:
            with tracer.invoke(images[:1], texts):
                view.image.embed.output.save()
            with tracer.invoke(images, texts):
                view.image.embed.output.save()

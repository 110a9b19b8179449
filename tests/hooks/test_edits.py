"""Feature sets, edits by hand, selections and the cache."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mmhooks as mm
from mmhooks.errors import MMHooksError, ShapeMismatch, UnknownSite, WrongHead
from mmhooks.hooks.program import Hook
from mmhooks.hooks.selection import feature_index
from mmhooks.hooks.steps import moment

sets = st.sets(st.integers(0, 19))


@given(sets, sets)
def test_set_algebra(a, b):
    x, y = mm.FeatureSet(a, 20, name="a"), mm.FeatureSet(b, 20, name="b")
    assert set(x | y) == a | b and set(x & y) == a & b and set(x - y) == a - b
    assert set(~x) == set(range(20)) - a and len(x) == len(a) and ~~x == x
    assert x.mask.nonzero().flatten().tolist() == sorted(a) == x.indices.tolist()
    assert mm.FeatureSet(x.mask, 20) == x and hash(mm.FeatureSet(x.indices, 20)) == hash(x)


@given(sets, st.integers(0, 5))
def test_samples_are_subsets_and_repeatable(a, seed):
    x = mm.FeatureSet(a, 20)
    k = len(a) // 2
    assert (
        len(x.sample(k, seed)) == k and x.sample(k, seed) == x.sample(k, seed) and set(x.sample(k, seed)) <= a
    )


def test_sets_are_immutable_saved_and_bound_to_a_head(tmp_path):
    x = mm.FeatureSet([3, 1], 8, name="ImgD", head="topk-1", info={"sigma": 0.2})
    x.indices[0] = 7
    assert list(x) == [1, 3]
    with pytest.raises(AttributeError, match="immutable"):
        x.name = "other"  # type: ignore[misc]
    again = mm.FeatureSet.load(x.save(tmp_path / "x.json"))
    assert again == x and again.name == "ImgD" and again.info == {"sigma": 0.2}
    (tmp_path / "y.json").write_text("{}")
    with pytest.raises(MMHooksError, match=r"y\.json: expected a FeatureSet"):
        mm.FeatureSet.load(tmp_path / "y.json")
    with pytest.raises(WrongHead, match="topk-1.*topk-2"):
        _ = x | mm.FeatureSet([1], 8, head="topk-2")
    with pytest.raises(ShapeMismatch, match=r"feature 9 is outside 0\.\.7"):
        mm.FeatureSet([9], 8)
    with pytest.raises(ShapeMismatch, match="cannot sample 3"):
        x.sample(3)


def test_resample_draws_whole_rows():
    x = torch.arange(12.0).view(6, 2)
    y = mm.Resample([1], seed=3)(x)
    assert torch.equal(y[:, 0], x[:, 0]) and (y[:, 1] != x[:, 1]).all()
    assert sorted(y[:, 1].tolist()) == x[:, 1].tolist()
    source = 100 + torch.arange(8.0).view(4, 2)
    z = mm.Resample(source=source)(x)
    assert all(any(torch.equal(row, s) for s in source) for row in z)
    with pytest.raises(ShapeMismatch, match="batch of 1"):
        mm.Resample()(x[:1])


@pytest.mark.parametrize(
    ("tokens", "hit"),
    [
        (0, [0]), (-1, [4]), (slice(1, 3), [1, 2]), ([0, 4], [0, 4]),
        (torch.tensor([True, False, False, True, False]), [0, 3]), (torch.tensor([2]), [2]),
    ],
)  # fmt: skip
def test_token_selection_at_attention_heads(model, images, tokens, hit):
    site = "image.blocks.0.attn.z"
    _, before = model.run_with_cache(images, sites=[site])
    with model.hooks(mm.Zero([1], at=site, tokens=tokens)), model.caching([site]) as cache:
        model.encode_image(images)
    want = before[site].clone()
    want[:, hit, 1] = 0
    torch.testing.assert_close(cache[site], want, atol=1e-6, rtol=1e-5)


def test_tokens_that_differ_by_row(model, texts):
    site, ends = "text.blocks.1.resid_post", torch.nn.functional.one_hot(texts.argmax(-1), 6).bool()
    with model.hooks(mm.Zero(at=site, tokens=ends)), model.caching([site]) as cache:
        model.encode_text(texts)
    assert not cache[site][ends].any() and cache[site][~ends].all()


def test_patch_moves_one_run_into_another(model, images):
    site = "image.blocks.1.resid_post"
    other, cache = model.run_with_cache(images.flip(0), sites=[site])
    with model.hooks(mm.Patch(cache)):
        torch.testing.assert_close(model.encode_image(images), other.image)
    with model.hooks(mm.Patch(cache, at=site, tokens=0)):
        torch.testing.assert_close(model.encode_image(images), other.image)  # pooled from the class token
    with model.hooks(mm.Interpolate(at=site, toward=cache, strength=0.0)):
        assert torch.equal(model.encode_image(images), model.model.encode_image(images))


def test_messages_of_edits(model, images):
    with pytest.raises(MMHooksError, match="Clamp needs"):
        mm.Clamp([1])
    with pytest.raises(MMHooksError, match="toward="):
        mm.Interpolate([1])
    cases = [
        (
            mm.Steer(at="image.embed", direction=torch.ones(5)),
            ShapeMismatch,
            r"image\.embed.*\(5,\).*\(3, 12\)",
        ),
        (mm.Zero([12], at="image.embed"), ShapeMismatch, r"feature 12 of 12"),
        (mm.Zero(at="image.embed", tokens=0), ShapeMismatch, "with a token dimension"),
        (mm.Zero(at="image.blocks.0.ln_1", tokens=9), ShapeMismatch, "token 9.*5 tokens"),
        (mm.Zero(at="image.embed", steps=range(3)), MMHooksError, "does not run inside a denoising step"),
        (mm.Steer(at="image.embed", direction=torch.ones(12, device="meta")), ShapeMismatch, "cpu.*meta"),
        (
            mm.Steer(at="image.embed", direction=torch.ones(12, dtype=torch.bool)),
            ShapeMismatch,
            "float32.*bool",
        ),
    ]
    site = "image.blocks.0.ln_1"
    cases += [
        (
            mm.Zero(at=site, tokens=slice(7, 9)),
            ShapeMismatch,
            r"selects none of the 5 tokens at 'image.*ln_1'",
        ),
        (mm.Zero(at=site, tokens=[]), ShapeMismatch, "selects none of the 5 tokens"),
        (mm.Zero(at=site, tokens=torch.ones(5)), ShapeMismatch, r"positions.*float32 of shape \(5,\)"),
        (mm.Zero(at=site, tokens=torch.ones(4, dtype=torch.bool)), ShapeMismatch, r"\(4,\).*5 tokens"),
        (mm.Zero(at=site, tokens=torch.ones(2, 5, dtype=torch.bool)), ShapeMismatch, r"\(2, 5\).*batch is 3"),
        (
            mm.Zero(torch.ones(11, dtype=torch.bool), at="image.embed"),
            ShapeMismatch,
            "among 12 features, got one among 11",
        ),
        (mm.Zero([True] * 3, at="image.blocks.0.attn.z"), ShapeMismatch, "among 2 features, got one among 3"),
        (
            mm.Zero(mm.FeatureSet([1], 8), at="image.embed"),
            ShapeMismatch,
            r"among 12 features, got one among 8 \(shape \(3, 12\)\)",
        ),
    ]
    for edit, error, words in cases:
        with pytest.raises(error, match=words), model.hooks(edit):
            model.encode_image(images)


@pytest.mark.parametrize("features", [True, "imgd", [0.5], [-1], torch.ones(2, 2, dtype=torch.bool)])
def test_features_that_are_none(features):
    with pytest.raises(ShapeMismatch, match="feature"):
        feature_index(features)


@pytest.mark.parametrize("make", [
    lambda nan: mm.Steer(direction=torch.tensor([1.0, nan])), lambda nan: mm.Mean(mean=nan), lambda nan: mm.Clamp(max=nan),
    lambda nan: mm.Interpolate(toward=torch.tensor([nan, 1.0])), lambda nan: mm.Steer(strength=nan),
])  # fmt: skip
def test_nan_is_refused_where_it_is_given(make):
    with pytest.raises(
        mm.errors.NotFinite, match=r"= of (Steer|Mean|Clamp|Interpolate)\(\): expected finite .* in 1 of [12]"
    ):
        make(float("nan"))


LATENT_TOKENS = {
    "zero": mm.Zero([0, 1, 2], tokens=[1]),
    "mean": mm.Mean([0, 1, 2], mean=0.5, tokens=[1]),
    "resample": mm.Resample([0, 1, 2], tokens=[1]),
    "interpolate": mm.Interpolate([0, 1, 2], toward=1.0, strength=0.5, tokens=slice(1, 2)),
    "steer": mm.Steer([0, 1, 2], strength=2.0, tokens=torch.arange(5) == 1),
    "clamp": mm.Clamp([0, 1, 2], value=0.7, tokens=1),
    "patch": mm.Patch(torch.full((16,), 0.3), [0, 1, 2], tokens=[-4], at="image.blocks.0.ln_1"),
    "all": mm.Steer(strength=1.0, tokens=[1]),
}


@pytest.mark.parametrize("place", ["image.blocks.0.ln_1", "image.blocks.0.ln_1.sae.latents"])
@pytest.mark.parametrize("name", LATENT_TOKENS)
def test_every_edit_takes_tokens(model, images, name, place):
    """At a site and through a head: what is not selected does not move by a bit, what is equals the edit by hand."""
    head = mm.TopKSAE(16, 16, 16, normalize_input=False)
    model.attach(head, at="image.blocks.0.ln_1")
    edit = copy.copy(LATENT_TOKENS[name])
    object.__setattr__(edit, "at", place)
    plain = model.run_with_cache(images, sites=[place])[1][place]
    with torch.no_grad(), model.hooks(edit), model.caching([place]) as cache:
        model.encode_image(images)
    by_hand = copy.copy(edit)
    object.__setattr__(by_hand, "tokens", None)
    want = plain.clone()
    want[:, 1] = by_hand(plain)[:, 1]
    torch.testing.assert_close(cache[place], want.detach(), atol=1e-6, rtol=1e-5)
    assert torch.equal(cache[place][:, 2:], plain[:, 2:]) and not torch.equal(cache[place], plain)


def test_steps(model, images):
    with model.hooks(mm.Zero(at="image.embed", steps=[1])):
        with moment(0, None):
            assert model.encode_image(images).any()
        with moment(1, None):
            assert not model.encode_image(images).any()


def test_cache_options(model, images):
    _, cache = model.run_with_cache(
        images,
        sites=["image.blocks.*.resid_post", "image.blocks.0.attn.pattern"],
        dtype=torch.float16,
        tokens=[0, 2],
    )
    assert (
        cache.stack("*.resid_post").shape == (2, 3, 2, 16)
        and cache.stack("*.resid_post").dtype == torch.float16
    )
    assert cache["image.blocks.0.attn.pattern"].shape == (3, 2, 2, 5)
    assert (
        cache.to(dtype=torch.float32).select("*resid_post")["image.blocks.0.resid_post"].dtype
        == torch.float32
    )
    with pytest.raises(UnknownSite, match=r"this cache.*close matches: image\.blocks\.0\.resid_post"):
        cache["image.blocks.0.resid_pst"]
    with pytest.raises(ShapeMismatch, match="cannot stack"):
        cache.stack("*")
    assert not any(value is model.model for value in vars(cache).values())


def test_inplace_models_are_cached_as_they_were():
    """ResNets overwrite activations in place: what the cache holds is what flowed."""
    import open_clip

    torch.manual_seed(0)
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}
    text = {"context_length": 6, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
    model = mm.HookedCLIP(open_clip.CLIP(12, vision, text).eval())  # type: ignore[arg-type]
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.randn(1, 3, 64, 64), sites=["visual.bn1"])
    assert (cache["visual.bn1"] < 0).any()


def test_the_layer_of_a_hook_is_the_number_in_its_name():
    assert Hook("image.blocks.3.attn.z").layer() == 3
    with pytest.raises(MMHooksError, match=r"layer number.*got 'image\.embed'"):
        Hook("image.embed").layer()

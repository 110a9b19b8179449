"""Feature sets, edits by hand, selections and the cache."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mmhooks as mm
from mmhooks.errors import MMHooksError, ShapeMismatch, UnknownSite, WrongHead
from mmhooks.hooks.steps import step

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
    with pytest.raises(MMHooksError, match=r"y\.json is no FeatureSet"):
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
        (mm.Zero(at="image.embed", tokens=0), ShapeMismatch, "no token dimension"),
        (mm.Zero(at="image.blocks.0.ln_1", tokens=9), ShapeMismatch, "token 9.*5 tokens"),
        (mm.Zero(at="image.embed", steps=range(3)), MMHooksError, "no diffusion run"),
        (mm.Steer(at="image.embed", direction=torch.ones(12, device="meta")), ShapeMismatch, "meta.*cpu"),
        (
            mm.Steer(at="image.embed", direction=torch.ones(12, dtype=torch.bool)),
            ShapeMismatch,
            "float32.*bool",
        ),
    ]
    for edit, error, words in cases:
        with pytest.raises(error, match=words), model.hooks(edit):
            model.encode_image(images)


def test_steps(model, images):
    with model.hooks(mm.Zero(at="image.embed", steps=[1])):
        with step(0):
            assert model.encode_image(images).any()
        with step(1):
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
    with pytest.raises(UnknownSite, match=r"this cache.*near matches: image\.blocks\.0\.resid_post"):
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

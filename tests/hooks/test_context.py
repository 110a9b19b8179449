"""Nothing left behind, in whatever order contexts open, overlap, fail and close."""

from __future__ import annotations

import asyncio
import sys
import threading
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mmhooks as mm
from mmhooks.errors import HookDidNotFire, MMHooksError, UnknownSite
from mmhooks.heads import TopKSAE
from mmhooks.models.clip.model import HookedCLIP
from mmhooks.models.hooked import _pairs

from .conftest import fingerprint, tiny_clip


@cache
def shared():
    model = HookedCLIP(tiny_clip())
    model.model.requires_grad_(False)
    model.attach(TopKSAE(12, 32, 4), at=["image.embed", "text.embed"])
    images = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    texts = torch.randint(1, 31, (1, 6), generator=torch.Generator().manual_seed(2))
    return model, images, texts, model.forward(images, texts), fingerprint(model.model)


SITES = [
    "image.patches", "image.blocks.0.resid_pre", "image.blocks.1.ln_1", "image.blocks.0.attn.q",
    "image.blocks.1.attn.pattern", "image.blocks.1.attn.z", "image.blocks.0.attn.head_out",
    "image.blocks.0.resid_mid", "image.blocks.1.mlp.post", "image.pooled", "image.embed",
    "text.tokens", "text.blocks.0.attn.k", "text.blocks.1.attn.z", "text.ln_final", "text.pooled", "text.embed",
    "image.embed.sae.latents", "text.embed.sae.pre", "visual.transformer.resblocks.0.attn", "nowhere",
]  # fmt: skip


class Boom(Exception):
    pass


def boom(value, *, hook):
    raise Boom(hook.name)


def opened(model: HookedCLIP, kind: str, site: str):
    if kind == "mask":
        return model.hooks(mask=[0, 1, 2, 3, 9], strict=False)
    if kind == "zero":
        return model.hooks(mm.Zero([0, 1], at=site), strict=False)
    if kind == "read":
        return model.hooks(fwd_hooks=[(site, lambda t, *, hook: None)], strict=False)
    if kind == "backward":
        return model.hooks(bwd_hooks=[(site, lambda g, *, hook: None)])
    if kind == "boom":
        return model.hooks(fwd_hooks=[(site, boom)], strict=False)
    return model.caching([site], strict=kind == "cache!")


steps = st.one_of(
    st.tuples(
        st.sampled_from(["mask", "zero", "read", "backward", "boom", "cache", "cache!"]),
        st.sampled_from(SITES),
    ),
    st.tuples(st.just("close"), st.integers(0, 5)),
    st.tuples(st.just("image"), st.just(0)),
    st.tuples(st.just("text"), st.just(0)),
)


@pytest.mark.slow
@settings(
    max_examples=1000, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(program=st.lists(steps, min_size=1, max_size=10))
def test_random_programs_leave_no_residue(program):
    """Nested, overlapping and failing contexts, closed in any order."""
    model, images, texts, clean, before = shared()
    contexts: list = []
    for kind, detail in program:
        try:
            if kind == "close":
                if contexts:
                    contexts.pop(detail % len(contexts)).__exit__(None, None, None)
            elif kind == "image":
                model.encode_image(images)
            elif kind == "text":
                model.model.encode_text(texts)
            else:
                context = opened(model, kind, detail)
                context.__enter__()
                contexts.append(context)
        except (Boom, MMHooksError):
            pass
    for context in contexts:
        try:
            context.__exit__(Boom, Boom(), None)
        except Boom:
            pass
    assert fingerprint(model.model) == before
    assert len(model._registry) == 0
    again = model.forward(images, texts)
    assert torch.equal(again.image, clean.image) and torch.equal(again.text, clean.text)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("site", [s for s in SITES if s != "nowhere"])
def test_reading_is_bit_equal(site, grad):
    model, images, texts, *_ = shared()
    with torch.set_grad_enabled(grad):
        clean = model.forward(images, texts)
        out, cache = model.run_with_cache(images, texts, [site])
        assert torch.equal(out.image, clean.image) and torch.equal(out.text, clean.text)
        assert list(cache) == [site]
        with model.hooks(fwd_hooks=[(site, lambda t, *, hook: None)]):
            out = model.forward(images, texts)
    assert torch.equal(out.image, clean.image) and torch.equal(out.text, clean.text)


def test_leaving_in_entry_order_keeps_the_inner_edit(model, images):
    first, second = model.hooks(mm.Zero(at="image.blocks.0.mlp_out")), model.hooks(mm.Zero(at="image.embed"))
    first.__enter__(), second.__enter__()
    assert not model.encode_image(images).any()
    first.__exit__(None, None, None)
    assert not model.encode_image(images).any()
    second.__exit__(None, None, None)
    assert model.encode_image(images).any()


def test_order_is_as_given_and_outer_first(model, images):
    seen: list[str] = []

    def note(name):
        return lambda t, *, hook: seen.append(name)

    with model.hooks(fwd_hooks=[("image.embed", note("a")), ("image.embed", note("b"))]):
        with model.hooks(fwd_hooks=[("image.embed", note("c"))]):
            model.encode_image(images)
    assert seen == ["a", "b", "c"]


def test_a_users_own_hooks_survive(model, images):
    calls = []
    handle = model.model.visual.register_forward_hook(lambda *_: calls.append(1))
    model.run_with_cache(images, sites=["image.embed"])
    model.encode_image(images)
    handle.remove()
    assert len(calls) == 2


def test_outer_cache_shows_values_after_inner_edits(model, images):
    with model.caching(["image.embed"]) as cache, model.hooks(mm.Zero([0], at="image.embed")):
        z = model.encode_image(images)
    assert torch.equal(cache["image.embed"], z) and not z[:, 0].any()


def test_other_threads_do_not_see_it(model, images):
    clean, results = model.encode_image(images), []
    with model.hooks(mm.Zero(at="image.embed")):
        thread = threading.Thread(target=lambda: results.append(model.encode_image(images)))
        thread.start()
        thread.join()
        assert not model.encode_image(images).any()
    assert torch.equal(results[0], clean)


@pytest.mark.slow
def test_two_threads_with_different_masks(model, images, sae):
    """300 forwards each, the threads changing places hundreds of times a forward; every output is the single-threaded one."""
    model.model.requires_grad_(False)
    model.attach(sae, at=["image.embed"])
    masks = [range(16), range(16, 32)]
    expected = []
    for mask in masks:
        with model.hooks(mask=mask):
            expected.append(model.encode_image(images))
    assert not torch.equal(*expected)
    wrong: list[object] = []

    def work(which: int) -> None:
        try:
            for n in range(300):
                with model.hooks(mask=masks[which], strict=False), model.caching("image.blocks.0.attn.z"):
                    if not torch.equal(model.encode_image(images), expected[which]):
                        wrong.append((which, n))
        except Exception as fault:
            wrong.append(fault)

    threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
    interval = sys.getswitchinterval()
    # Threads change places hundreds of times a forward; with Python's own 5 ms each waits for the other at every call.
    sys.setswitchinterval(2e-5)
    try:
        [t.start() for t in threads]
        [t.join() for t in threads]
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
    assert len(model._registry) == 0


def test_asyncio_tasks_are_isolated(model, images):
    clean = model.encode_image(images)

    async def masked(dimension: int):
        with model.hooks(mm.Zero([dimension], at="image.embed")):
            await asyncio.sleep(0)
            z = model.encode_image(images)
            await asyncio.sleep(0)
        return z

    async def main():
        return await asyncio.gather(masked(0), masked(1))

    for dimension, z in enumerate(asyncio.run(main())):
        expected = clean.clone()
        expected[:, dimension] = 0
        assert torch.equal(z, expected)


def test_a_task_that_outlives_the_context_runs_clean(model, images):
    clean = model.encode_image(images)

    async def late(done):
        await done.wait()
        return model.encode_image(images)

    async def main():
        done = asyncio.Event()
        with model.hooks(mm.Zero(at="image.embed"), strict=False):
            task = asyncio.create_task(late(done))
            await asyncio.sleep(0)
        done.set()
        with model.hooks(mm.Zero([0], at="image.embed"), strict=False):  # keeps the tap installed
            return await task

    assert torch.equal(asyncio.run(main()), clean)


def test_a_generator_can_hold_a_context(model, images):
    def masked():
        with model.hooks(mm.Zero(at="image.embed")):
            while True:
                yield model.encode_image(images)

    generator = masked()
    assert not next(generator).any()
    generator.close()
    assert model.encode_image(images).any()
    assert len(model._registry) == 0


def test_a_context_is_for_one_use(model, images):
    context = model.hooks(mm.Zero(at="image.embed"))
    with context:
        model.encode_image(images)
    with pytest.raises(MMHooksError, match="entered only once"), context:
        pass


# -- messages --------------------------------------------------------------------------------------------


def test_unknown_site_names_near_matches(model):
    with pytest.raises(
        UnknownSite, match=r"image\.blocks\.1\.atn\.z.*close matches:.*image\.blocks\.1\.attn\.z"
    ):
        with model.hooks(mm.Zero(at="image.blocks.1.atn.z")):
            pass
    with pytest.raises(UnknownSite, match="vision"):
        model.run_with_cache(torch.zeros(1, 3, 16, 16), sites=["vision.*"])
    with pytest.raises(UnknownSite, match=r"attn\.out_proj"):  # nn.MultiheadAttention never calls it
        model.sites("visual.transformer.resblocks.0.attn.out_proj")


def test_a_hook_that_did_not_fire_says_where(model, images, sae):
    with pytest.raises(
        HookDidNotFire, match=r"Zero\(\) fired at none of its sites \(text\.embed\): no forward"
    ):
        with model.hooks(mm.Zero(at="text.embed")):
            model.encode_image(images)
    with pytest.raises(HookDidNotFire, match=r"cache of 'text\.\*'"):
        model.run_with_cache(images, sites=["text.*"])
    with pytest.raises(HookDidNotFire, match="backward hook.*call backward"):
        with model.hooks(bwd_hooks=[("image.embed", lambda g, *, hook: None)]):
            model.encode_image(images)
    with torch.no_grad(), pytest.raises(HookDidNotFire, match="without a graph"):
        with model.hooks(bwd_hooks=[("image.embed", lambda g, *, hook: None)]):
            model.encode_image(images)
    model.attach(sae, at=["image.embed", "text.embed"])
    with model.hooks(mask={"image": [1], "text": [2]}):  # one tower is enough
        model.encode_image(images)
    with model.hooks(mm.Zero(at="text.embed"), strict=False):
        pass
    with pytest.raises(ZeroDivisionError):  # the exception on its way wins
        with model.hooks(mm.Zero(at="text.embed")):
            _ = 1 / 0


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (lambda t: t[:, :5], r"image\.embed.*\(3, 12\).*\(3, 5\)"),
        (lambda t: t.double(), r"float32.*float64"),
        (lambda t: "no", r"got str"),
    ],
)
def test_a_wrong_return_value_is_described(model, images, result, words):
    with pytest.raises(mm.errors.ShapeMismatch, match=words):
        with model.hooks(fwd_hooks=[("image.embed", lambda t, *, hook: result(t))]):
            model.encode_image(images)


def test_wrong_things_given_to_hooks(model, sae):
    with pytest.raises(MMHooksError, match="mask="):
        model.hooks(mm.FeatureSet([1], 8))
    with pytest.raises(
        MMHooksError, match=r"fwd_hooks: expected a list of \(site, function\) pairs.*'image\.embed'"
    ):
        _pairs(("image.embed", lambda t, *, hook: None), "fwd_hooks")
    with pytest.raises(MMHooksError, match=r"bwd_hooks: expected a list"):
        _pairs([("image.embed", "fn")], "bwd_hooks")
    with pytest.raises(MMHooksError, match=r"mask: expected .*got \{\}"), model.hooks(mask={}):
        pass
    with (
        pytest.raises(UnknownSite, match=r"'imagee'.*close matches: image\.embed"),
        model.hooks(mask={"imagee": [1]}),
    ):
        pass
    model.attach(sae, at=["image.embed", "text.embed"])
    for mask in ([40], {"image": [40]}, {"image.embed": [40]}):
        with pytest.raises(mm.errors.ShapeMismatch, match=r"image\.embed\.sae\.latents'.*feature 40 of 32"):
            with model.hooks(mask=mask):
                pass
    for mask in (torch.ones(31, dtype=torch.bool), {"text": torch.ones(31, dtype=torch.bool)}):
        with pytest.raises(
            mm.errors.ShapeMismatch, match=r"sae\.latents'.*among 32 features, got one among 31"
        ):
            with model.hooks(mask=mask):
                pass


def test_a_backward_hook_that_returns_nonsense(model, images):
    for result, words in (
        (lambda g: g[:, :5], r"image\.embed.*\(3, 12\).*\(3, 5\)"),
        (lambda g: "no", "got str"),
    ):
        with pytest.raises(mm.errors.ShapeMismatch, match=words):
            with model.hooks(bwd_hooks=[("image.embed", lambda g, *, hook, result=result: result(g))]):
                model.encode_image(images).sum().backward()


def test_sites_are_listed_with_shapes_after_a_forward(model, images, sae):
    model.attach(sae, at="image.embed")
    listed = model.sites("image.embed*")
    assert isinstance(listed, list) and listed[0] == "image.embed" and not listed.shapes
    assert repr(listed).splitlines()[:3] == [
        "image.embed              batch d",
        "image.embed.sae.pre      batch feature",
        "image.embed.sae.latents  batch feature",
    ]
    model.run_with_cache(images, sites=["image.*"], tokens=[0])  # the cache is cut, the shape is the site's
    assert model.sites("image.blocks.0.attn.pattern").shapes == {"image.blocks.0.attn.pattern": (3, 2, 5, 5)}
    assert repr(model.sites("image.embed*")).splitlines()[2] == "image.embed.sae.latents  (3, 32)"
    with pytest.raises(
        mm.errors.ShapeMismatch, match=r"width 10, site 'image\.embed' carries shape \(3, 12\)"
    ):
        model.attach(TopKSAE(10, 20, 2), at="image.embed", name="wrong")
    with pytest.raises(MMHooksError, match=r"Linear is not a head: missing d_in, n_features"):
        model.attach(torch.nn.Linear(2, 2), at="image.embed")


def test_async_generators_and_executors(model, images):
    """A context closed by another task than the one that opened it, and work handed to a pool."""
    from concurrent.futures import ThreadPoolExecutor
    from contextvars import copy_context

    clean = model.encode_image(images)

    async def masked():
        with model.hooks(mm.Zero(at="image.embed"), strict=False):
            while True:
                yield model.encode_image(images)

    async def main():
        generator = masked()
        assert not (await anext(generator)).any()
        await asyncio.create_task(generator.aclose())
        return model.encode_image(images)

    assert torch.equal(asyncio.run(main()), clean)
    with model.hooks(mm.Zero(at="image.embed")), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(model.encode_image, images).result(), clean)  # a thread starts clean
        assert (
            not pool.submit(copy_context().run, model.encode_image, images).result().any()
        )  # unless handed over
    assert torch.equal(model.encode_image(images), clean) and len(model._registry) == 0

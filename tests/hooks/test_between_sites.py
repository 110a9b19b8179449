"""Transcoders spliced between an MLP's input and output, against plain torch hooks that recompute everything."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

import mmhooks as mm
from mmhooks.errors import HookDidNotFire, MMHooksError, ShapeMismatch
from mmhooks.heads import Transcoder

AT = ("image.blocks.1.ln_2", "image.blocks.1.mlp_out")
LATENTS = "image.blocks.1.mlp_out.transcoder.latents"
S = [0, 3, 5, 8, 13, 21, 30]


@pytest.fixture(params=[False, True], ids=["plain", "skip"])
def transcoder(request) -> Transcoder:
    head = Transcoder(16, 32, 4, skip=request.param, seed=3)
    with torch.no_grad():
        for p in (head.b_pre, head.b_enc, head.b_dec, *([head.W_skip] if request.param else [])):
            p.normal_(std=0.1)
    return head


def by_hand(model, images, head, edit, *, error_term=True):
    """A forward with torch's own hooks on the norm and the MLP of the block, and the formula with two decodes."""
    block, seen = model.model.visual.transformer.resblocks[1], {}

    def after_mlp(_, args, y):
        x = seen["x"]
        f = head.activate((x - head.b_pre) @ head.W_enc.T + head.b_enc)
        skip = x @ head.W_skip if head.skip else 0
        before, after = (g @ head.W_dec + head.b_dec + skip for g in (f, edit(f)))
        seen.update(f=f, y=y, recon=before)
        return after + (y - before) if error_term else after

    handles = [
        block.ln_2.register_forward_hook(lambda _, args, x: seen.update(x=x)),
        block.mlp.register_forward_hook(after_mlp),
    ]
    try:
        return model.encode_image(images), seen
    finally:
        for handle in handles:
            handle.remove()


def zeroed(f):
    f = f.clone()
    f[..., S] = 0
    return f


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
def test_an_edit_equals_recomputation(model, images, transcoder, grad, edit, expected):
    with torch.set_grad_enabled(grad):
        plain = model.encode_image(images)
        assert model.attach(transcoder, at=AT) == ["image.blocks.1.mlp_out.transcoder"]
        assert torch.equal(model.encode_image(images), plain)
        with model.hooks(edit):
            got = model.encode_image(images)
        want, _ = by_hand(model, images, transcoder, expected)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(got, plain, atol=1e-4)


def test_idle_is_bit_equal_and_reads_agree(model, images, transcoder):
    with torch.no_grad():
        plain, seen = by_hand(model, images, transcoder, lambda f: f)
        plain = model.encode_image(images)
        model.attach(transcoder, at=AT)
        with model.caching("image.blocks.1.mlp_out.transcoder.*") as cache:
            assert torch.equal(model.encode_image(images), plain)
        silent = (cache[LATENTS] == 0).flatten(0, 1).all(0).nonzero().flatten()
        for edit in (mm.Zero([]), mm.Zero(silent), mm.Clamp(range(32), min=0.0)):
            with model.hooks(edit):
                assert torch.equal(model.encode_image(images), plain)
    places = {leaf: cache[f"image.blocks.1.mlp_out.transcoder.{leaf}"] for leaf in ("recon", "error")}
    torch.testing.assert_close(cache[LATENTS], seen["f"])
    torch.testing.assert_close(places["recon"], seen["recon"])
    torch.testing.assert_close(places["recon"] + places["error"], seen["y"])


def test_without_error_term_it_takes_the_mlps_place(model, images, transcoder):
    model.attach(transcoder, at=AT, error_term=False)
    for mask, edit in (([], lambda f: f), (S, zeroed)):
        with model.hooks(mask=mask):
            got = model.encode_image(images)
        want, _ = by_hand(model, images, transcoder, edit, error_term=False)
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    # The MLP does not count any more: with other weights the result is the same.
    with torch.no_grad():
        model.model.visual.transformer.resblocks[1].mlp.c_proj.weight.normal_()
    with model.hooks(mask=S):
        torch.testing.assert_close(model.encode_image(images), got)


def test_it_reads_what_flows_on_at_its_first_site(model, images, transcoder):
    """An edit upstream, also from a context opened later, changes what the head reads and what the MLP reads."""
    model.attach(transcoder, at=AT)
    with model.hooks(mask=S), model.hooks(mm.Zero([2], at=AT[0])):
        with model.caching([AT[0], LATENTS]) as cache:
            got = model.encode_image(images)
    assert bool((cache[AT[0]][..., 2] == 0).all())
    torch.testing.assert_close(cache[LATENTS], zeroed(transcoder.encode(cache[AT[0]])))
    with model.hooks(mm.Zero([2], at=AT[0])), model.hooks(mask=S):
        torch.testing.assert_close(model.encode_image(images), got)


def test_gradients_reach_pixels_and_head(model, images, transcoder):
    pixels = images.clone().requires_grad_()
    inputs = [pixels, transcoder.W_enc, transcoder.W_dec]
    weights = torch.randn(3, 12)
    want = torch.autograd.grad((by_hand(model, pixels, transcoder, zeroed)[0] * weights).sum(), inputs)
    model.attach(transcoder, at=AT)
    with model.hooks(mm.Interpolate(S, toward=0.0)):
        got = torch.autograd.grad((model.encode_image(pixels) * weights).sum(), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_checkpointed_blocks_recompute_the_same(model, images, transcoder):
    model.attach(transcoder, at=AT)
    grads = []
    for on in (False, True):
        model.model.visual.set_grad_checkpointing(on)
        model.model.train()
        pixels = images.clone().requires_grad_()
        with model.hooks(mask=S):
            model.encode_image(pixels).square().sum().backward()
        grads.append(pixels.grad)
    assert torch.equal(*grads)


def test_limited_edits_and_threads(model, images, transcoder):
    """``tokens=`` acts on some vectors; two threads that share a context do not see each other's inputs."""
    model.attach(transcoder, at=AT)
    with torch.no_grad(), model.hooks(mm.Zero(S, tokens=[0])), model.caching(LATENTS) as cache:
        model.encode_image(images)
        f = cache[LATENTS]
        assert bool((f[:, 0, S] == 0).all()) and bool((f[:, 1:, S] > 0).any())
    import contextvars

    batches = [torch.randn(3, 3, 16, 16) for _ in range(4)]
    with torch.no_grad(), model.hooks(mask=S):
        alone = [model.encode_image(b) for b in batches]
        together: dict[int, list[torch.Tensor]] = {}

        def run(i: int) -> None:
            with torch.no_grad():
                together[i] = [model.encode_image(batches[i]) for _ in range(20)]

        threads = [threading.Thread(target=contextvars.copy_context().run, args=(run, i)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(out, alone[i]) for i, outs in together.items() for out in outs)
    assert len(together) == 4


def test_a_compiled_model_gives_the_same(model, images, transcoder):
    model.attach(transcoder, at=AT)
    compiled = torch.compile(model.model.encode_image, backend="eager")
    with torch.no_grad(), model.hooks(mask=S):
        want = model.model.encode_image(images)
        torch.testing.assert_close(compiled(images), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_in_another_precision(model, images, transcoder, dtype):
    """The head computes in its own precision, and what it writes has the model's."""
    model.model.to(dtype)
    model.attach(transcoder, at=AT)
    with torch.no_grad():
        plain = model.encode_image(images.to(dtype))
        with model.hooks(mask=S), model.caching([AT[0], LATENTS]) as cache:
            got = model.encode_image(images.to(dtype))
    assert got.dtype == dtype and cache[LATENTS].dtype == torch.float32 and not torch.equal(got, plain)
    torch.testing.assert_close(cache[LATENTS], zeroed(transcoder.encode(cache[AT[0]].float())))


def test_copies_and_detaching(model, images, transcoder):
    model.attach(transcoder, at=AT)
    twin = copy.deepcopy(model)
    with model.hooks(mask=S), twin.hooks(mask=S):
        assert torch.equal(model.encode_image(images), twin.encode_image(images))
    model.detach(transcoder)
    with pytest.raises(MMHooksError, match="no head is attached"):
        model.hooks(mask=S).__enter__()


def test_faults_say_what_to_do(model, images, texts, transcoder):
    for at in (AT[0], [AT[0]], [*AT, AT[0]], "image.blocks.*.ln_2", (AT[0], AT[0])):
        with pytest.raises(MMHooksError, match=r"expected at=\(the site that it reads"):
            model.attach(transcoder, at=at)
    with pytest.raises(
        ShapeMismatch, match="writes vectors of width 16, site 'image.embed' carries width 12"
    ):
        model.attach(transcoder, at=(AT[0], "image.embed"))
    with pytest.raises(ShapeMismatch, match="reads vectors of width 16"):
        model.attach(transcoder, at=("image.embed", AT[1]))
    model.attach(transcoder, at=AT)
    with pytest.raises(MMHooksError, match="already attached"):
        model.attach(transcoder, at=AT)
    with pytest.raises(HookDidNotFire):
        with model.hooks(mask=S):
            model.encode_text(texts)
    model.attach(transcoder, at=AT[::-1], name="backwards")
    with pytest.raises(MMHooksError, match=r"expected 'image.blocks.1.mlp_out' to run before"):
        with model.hooks(mm.Zero(S, at="image.blocks.1.ln_2.backwards")):
            model.encode_image(images)
    model.attach(transcoder, at=("image.blocks.1.ln_2", "text.blocks.1.mlp_out"), name="across")
    with pytest.raises(ShapeMismatch, match="it maps vector by vector"):
        with model.hooks(mm.Zero(S, at="text.blocks.1.mlp_out.across")):
            model.encode_image(images)
            model.encode_text(texts)

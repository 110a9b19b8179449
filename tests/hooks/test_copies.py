"""Copies made while a context is open, and what a context leaves alone: state, parameters, other wrappers."""

from __future__ import annotations

import copy
import io
import threading

import torch

import mmhooks as mm

from .conftest import fingerprint

EDITS = [  # every kind of tap
    mm.Zero([0], at="image.blocks.0.attn.z"),
    mm.Steer(at="image.blocks.1.resid_mid", strength=0.5),
    mm.Zero([1], at="image.pooled"),
    mm.Zero([2], at="image.blocks.0.mlp.pre"),
    mm.Zero([2], at="image.blocks.1.resid_pre"),
]


def test_a_deep_copy_is_a_model_of_its_own(model, images):
    """It runs clean inside and after the context, on its own weights, with the classes of the original."""
    clean, kinds = model.encode_image(images), [type(m) for m in model.model.modules()]
    with model.hooks(*EDITS):
        other = copy.deepcopy(model.model)
        assert torch.equal(other.encode_image(images), clean)
        assert not torch.equal(model.encode_image(images), clean)
    assert [type(m) for m in other.modules()] == kinds
    assert not any({"forward", "proj", "_call_impl"} & vars(m).keys() for m in other.modules())
    with torch.no_grad():
        other.visual.proj.zero_()
        other.visual.transformer.resblocks[0].attn.out_proj.weight.zero_()
    assert not other.encode_image(images).any() and torch.equal(model.encode_image(images), clean)


def test_a_swapped_module_can_be_pickled(model, images):
    block = model.model.visual.transformer.resblocks[0]
    with model.hooks(EDITS[0]):
        model.encode_image(images)
        file = io.BytesIO()
        torch.save(block.attn, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded) is type(block.attn) is torch.nn.MultiheadAttention
    assert "forward" not in vars(loaded)


def test_a_hooked_model_can_be_copied(model, images, sae):
    model.attach(sae, at="image.embed")
    with model.hooks(*EDITS):
        other = copy.deepcopy(model)
        model.encode_image(images)
    with torch.no_grad():
        other.model.visual.proj.mul_(2)
    assert torch.equal(other.encode_image(images), 2 * model.encode_image(images))
    assert list(other.places.attachments) == list(model.places.attachments)
    for edit in (*EDITS, mm.Zero(range(32))):
        before = fingerprint(other.model)
        with model.hooks(edit):
            want = 2 * model.encode_image(images)
        with other.hooks(edit):
            torch.testing.assert_close(other.encode_image(images), want, atol=1e-5, rtol=1e-5)
        assert fingerprint(other.model) == before


def test_a_replica_runs_on_its_own_weights(model, images):
    """As DataParallel makes them: copies of ``__dict__``, run by threads that opened no context."""
    seen = []
    with model.hooks(*EDITS):
        model.encode_image(images)
        replica = model.model.visual.transformer.resblocks[0].attn._replicate_for_data_parallel()
        replica.in_proj_weight = torch.zeros(48, 16)
        replica.in_proj_bias, replica.out_proj = torch.zeros(48), torch.nn.Linear(16, 16)
        x = torch.randn(1, 5, 16)
        thread = threading.Thread(target=lambda: seen.append(replica(x, x, x)[0]))
        thread.start()
        thread.join()
    torch.testing.assert_close(seen[0], replica.out_proj.bias.expand(1, 5, 16))


def test_state_and_parameters_inside_a_context(model, images):
    state, names = list(model.model.state_dict()), [n for n, _ in model.model.named_parameters()]
    with model.hooks(*EDITS):
        assert list(model.model.state_dict()) == state
        assert [n for n, _ in model.model.named_parameters()] == names
        before = model.encode_image(images)
        model.model.load_state_dict({k: v.clone() for k, v in model.model.state_dict().items()}, assign=True)
        assert torch.equal(model.encode_image(images), before)
        with torch.no_grad():
            model.model.visual.proj.mul_(2)  # what stands for the parameter is the parameter
        assert torch.equal(model.encode_image(images), 2 * before)


def test_two_wrappers_of_one_model_close_in_any_order(model, images):
    other, before = mm.HookedCLIP(model.model), fingerprint(model.model)
    clean = model.encode_image(images)
    with model.hooks(mm.Zero([1], at="image.pooled")):
        want = model.encode_image(images)
    first = model.hooks(mm.Zero([0], at="image.pooled"), EDITS[0], strict=False)
    second = other.hooks(mm.Zero([1], at="image.pooled"), strict=False)
    third = other.caching(["image.blocks.0.attn.z", "image.blocks.0.resid_mid"])
    first.__enter__(), second.__enter__()
    cache = third.__enter__()
    both = other.encode_image(images)
    assert not torch.equal(both, want) and len(cache) == 2
    first.__exit__(None, None, None)
    assert torch.equal(other.encode_image(images), want)
    third.__exit__(None, None, None), second.__exit__(None, None, None)
    assert torch.equal(model.encode_image(images), clean) and fingerprint(model.model) == before


def test_a_users_own_forward_is_kept(model, images):
    """accelerate and friends put a ``forward`` on the instance; ours runs on top of it and leaves it there."""
    attn, calls = model.model.visual.transformer.resblocks[0].attn, []
    native = attn.forward

    def wrapped(*args, **kwargs):
        calls.append(1)
        return native(*args, **kwargs)

    attn.forward = wrapped
    clean = model.encode_image(images)
    _, cache = model.run_with_cache(images, sites=["image.blocks.0.attn.z"])
    assert len(calls) == 2 and vars(attn)["forward"] is wrapped and "image.blocks.0.attn.z" in cache
    with model.hooks(EDITS[0]):
        assert not torch.equal(model.encode_image(images), clean)
        attn.forward = wrapped  # also set inside a context
    assert vars(attn)["forward"] is wrapped
    del attn.forward
    assert torch.equal(model.encode_image(images), clean)

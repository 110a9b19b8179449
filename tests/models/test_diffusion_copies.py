"""Deep copies and pickles of a hooked pipeline: a pipeline of its own, with its heads, without open contexts."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import mmhooks as mm

from .pipelines import PATTERN, build, draw


def pickled(sd: mm.HookedDiffusion) -> mm.HookedDiffusion:
    if sd.name == "sdxl":  # hidden states were asked for: transformers' recorders of them stay on its modules
        with pytest.raises((AttributeError, pickle.PicklingError), match="output_capturing_hook"):
            pickle.dumps(sd.pipe.text_encoder)
        pytest.skip("transformers cannot pickle its own encoder after a run that asks for hidden states")
    return pickle.loads(pickle.dumps(sd))


MAKE = {"deepcopy": copy.deepcopy, "pickle": pickled}
EDITS = [
    mm.Zero([0], at="text.cond", guidance="cond"),
    mm.Zero([1], at="text.blocks.0.attn.z"),
    mm.Zero([0], at=PATTERN, steps=[0]),
    mm.Zero([1], at="unet.mid_block.resnets.0"),
]


@pytest.fixture(scope="module", params=["sd1", "sdxl", "unclip"])
def sd(request):
    pipe = build(request.param)
    draw(pipe)  # transformers installs recorders of hidden states at the first call, and keeps them
    hooked = mm.HookedDiffusion(pipe, name=request.param)
    hooked.attach(mm.TopKSAE(pipe.unet.config.cross_attention_dim, 64, 4), at="text.cond", name="sae")
    return hooked


@pytest.mark.parametrize("how", MAKE)
@pytest.mark.parametrize("inside", [False, True])
def test_a_copy_is_a_pipeline_of_its_own(sd, how, inside):
    clean = draw(sd.pipe)
    if inside:
        with sd.hooks(*EDITS, mm.Zero(range(64), at="text.cond.sae.latents")):
            other = MAKE[how](sd)
            edited = draw(sd.pipe)
            assert torch.equal(draw(other.pipe), clean)  # it takes no open context along
        assert not torch.equal(edited, clean)
    else:
        other = MAKE[how](sd)
    assert other.pipe.unet is other.unet is not sd.unet and other.name == sd.name
    assert other.text_towers.keys() == sd.text_towers.keys()
    theirs = {id(m) for m in sd.model.modules()}
    assert not any(id(m) in theirs for part in other.pipe.components.values() if isinstance(part, torch.nn.Module)
                   for m in part.modules())  # fmt: skip
    assert not any(m._forward_hooks.keys() - o._forward_hooks.keys()
                   for m, o in zip(other.model.modules(), sd.model.modules(), strict=True))  # fmt: skip
    assert torch.equal(draw(other.pipe), clean) and torch.equal(draw(sd.pipe), clean)


@pytest.mark.parametrize("how", MAKE)
def test_a_copy_has_the_sites_and_heads_of_the_original(sd, how):
    other, clean = MAKE[how](sd), draw(sd.pipe)
    assert list(other.sites()) == list(sd.sites())
    assert list(other.places.attachments) == list(sd.places.attachments)
    for edit in (*EDITS, mm.Zero(range(64), at="text.cond.sae.latents")):
        with sd.hooks(edit):
            wanted = draw(sd.pipe)
        with other.hooks(edit):
            got = draw(other.pipe)
            assert torch.equal(draw(sd.pipe), clean)  # the original does not see the copy's context
        assert torch.equal(got, wanted) and not torch.equal(got, clean), edit
    with sd.caching(["text.cond", PATTERN]) as one, other.caching(["text.cond", PATTERN]) as two:
        draw(sd.pipe), draw(other.pipe)
    assert one.steps == two.steps and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("how", MAKE)
def test_a_copy_runs_on_its_own_weights(sd, how):
    other, clean = MAKE[how](sd), draw(sd.pipe)
    with torch.no_grad():
        for parameter in other.unet.parameters():
            parameter.zero_()
    assert torch.equal(draw(sd.pipe), clean) and not torch.equal(draw(other.pipe), clean)
    assert list(other.pipe.unet.state_dict()) == list(sd.pipe.unet.state_dict())

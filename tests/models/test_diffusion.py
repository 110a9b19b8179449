"""Hooked pipelines: bit-equal while idle and read, edits as by hand, nothing left behind, steps and halves."""

from __future__ import annotations

import copy
from threading import Thread

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import nn

import mmhooks as mm
from mmhooks.errors import HookDidNotFire, MissingWeights, MMHooksError, ShapeMismatch, UnknownSite

from .pipelines import KINDS, PATTERN, draw, text_encoder, traces

GUIDANCE = pytest.mark.parametrize("guidance", [1.0, 4.0])


# -- idle and read-only -----------------------------------------------------------------------------------


@GUIDANCE
@pytest.mark.parametrize("kind", KINDS)
def test_reading_everything_changes_no_bit_and_leaves_nothing(models, kind, guidance):
    sd = models(kind)
    before, plain = traces(sd), draw(sd.pipe, guidance=guidance)
    with sd.caching(["text*", "unet.*", "unet.conv_out", "vae.decoder"]) as cache:
        assert torch.equal(draw(sd.pipe, guidance=guidance), plain)
    assert traces(sd) == before and torch.equal(draw(sd.pipe, guidance=guidance), plain)
    rows = 1 + (guidance > 1)
    assert cache["text.cond"].shape[:3] == (3, rows, 12) and cache[PATTERN].shape[:2] == (3, rows)
    assert cache["unet.conv_out"].shape == (3, rows, 4, 8, 8) and cache.steps == [0, 1, 2]
    assert cache["vae.decoder"].shape == (1, 3, 16, 16)  # runs once: no steps
    sums = cache[PATTERN].sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))
    seen = []
    with sd.hooks(fwd_hooks=[("unet.*.cross.*", lambda t, *, hook: seen.append((hook.step, hook.guidance)))]):
        assert torch.equal(draw(sd.pipe, guidance=guidance), plain)
    assert {s for s, _ in seen} == {0, 1, 2} and {g for _, g in seen} == {"both" if guidance > 1 else "cond"}


def test_after_exceptions_and_in_any_order(models):
    sd = models("sd1")
    before, plain = traces(sd), draw(sd.pipe)

    def fail(t, *, hook):
        if hook.step == 1:
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        with sd.hooks(mm.Zero(at="text.cond"), fwd_hooks=[(PATTERN, fail)]):
            draw(sd.pipe)
    assert traces(sd) == before and torch.equal(draw(sd.pipe), plain)
    with sd.hooks(
        mm.Zero(at="text.cond", steps=[2])
    ) as outer:  # a broken run does not shift the steps of the next
        with pytest.raises(RuntimeError):
            with sd.hooks(fwd_hooks=[(PATTERN, fail)]):
                draw(sd.pipe)
        edited = draw(sd.pipe)
        inner = sd.hooks(fwd_hooks=[("text.ln_final", lambda t, *, hook: None)])
        inner.__enter__()
        outer.close()
        assert torch.equal(draw(sd.pipe), plain)
        inner.close()
    assert traces(sd) == before and not torch.equal(edited, plain)
    with sd.hooks(mm.Zero(at="text.cond", steps=[2])):
        assert torch.equal(draw(sd.pipe), edited)


def test_other_threads_and_copies(models):
    sd = models("sd1")
    plain, drawn = draw(sd.pipe), []
    with sd.hooks(mm.Zero(at="text.cond")):
        thread = Thread(target=lambda: drawn.append(draw(sd.pipe)))
        thread.start()
        thread.join()
        twin = copy.deepcopy(sd)
        assert not torch.equal(draw(sd.pipe), plain)
    assert torch.equal(drawn[0], plain)
    assert torch.equal(draw(twin.pipe), plain)
    with twin.hooks(mm.Zero(at="text.cond")):
        assert not torch.equal(draw(twin.pipe), plain)
        assert torch.equal(draw(sd.pipe), plain)


# -- text.cond, as by hand ----------------------------------------------------------------------------------


def by_hand(sd, edit, guidance, *, halves, prompt, **options):
    """The same edit on the embeddings that the pipeline's own encode_prompt gives, passed to its call."""
    pipe = sd.pipe
    found = pipe.encode_prompt(
        prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=guidance > 1, **options
    )
    with torch.no_grad():
        cond = edit(found[0]) if "cond" in halves else found[0]
        kwargs = {"prompt_embeds": cond}
        if guidance > 1:
            kwargs["negative_prompt_embeds"] = edit(found[1]) if "uncond" in halves else found[1]
        if len(found) == 4:
            kwargs["pooled_prompt_embeds"] = found[2]
            if guidance > 1:
                kwargs["negative_pooled_prompt_embeds"] = found[3]
    return draw(pipe, None, guidance=guidance, **kwargs)


@GUIDANCE
@pytest.mark.parametrize("which", ["cond", "uncond", "both"])
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_an_edit_of_the_conditioner_is_that_of_prompt_embeds(models, kind, which, guidance):
    sd = models(kind)
    width = sd.unet.config.cross_attention_dim
    toward = torch.randn(1, 12, width, generator=torch.Generator().manual_seed(3))
    halves = ("cond", "uncond") if which == "both" else (which,)
    prompt, negative = ["a red panda", "blue kite"], {"negative_prompt": ["house", "umbrella"]}
    plain = draw(sd.pipe, prompt, guidance=guidance, **negative)
    features = list(range(0, width, 3))
    for make in (
        lambda **k: mm.Interpolate(features, toward=toward, strength=0.7, **k),
        lambda **k: mm.Zero(features, tokens=slice(1, 4), **k),
        lambda **k: mm.Mean(features, **k),  # of the half's own batch
        lambda **k: mm.Steer(direction=toward, strength=0.3, **k),
    ):
        if which == "uncond" and guidance == 1:  # there is no such half
            with pytest.raises(HookDidNotFire, match="guidance="):
                with sd.hooks(make(at="text.cond", guidance=which)):
                    draw(sd.pipe, prompt, guidance=guidance)
            continue
        with sd.hooks(make(at="text.cond", guidance=which)):
            hooked = draw(sd.pipe, prompt, guidance=guidance, **negative)
        assert not torch.equal(hooked, plain)
        assert torch.equal(hooked, by_hand(sd, make(), guidance, halves=halves, prompt=prompt, **negative))
    assert torch.equal(draw(sd.pipe, prompt, guidance=guidance, **negative), plain)


@GUIDANCE
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_the_conditioner_is_what_the_unet_gets(models, kind, guidance):
    """After clip skip, of both encoders, with the negative prompt; and a mask through a head is its splice."""
    sd = models(kind)
    options = {"negative_prompt": ["blue kite", "house"], "clip_skip": 1}
    if (
        kind != "sdxl"
    ):  # diffusers 0.42 asks for text_model.final_layer_norm there, which transformers 5.6 dropped
        del options["clip_skip"]
    prompt, got = ["a red panda", "umbrella"], []
    original = sd.unet.forward
    sd.unet.forward = lambda *a, **k: (got.append(k["encoder_hidden_states"]), original(*a, **k))[1]
    try:
        draw(sd.pipe, prompt, guidance=guidance, **options)
    finally:
        del sd.unet.forward
    _, cache = sd.run_with_cache(
        prompt, num_inference_steps=3, guidance_scale=guidance, output_type="pt",
        generator=torch.Generator().manual_seed(1), sites=["text.cond", "text*.blocks.*.resid_post"], **options,
    )  # fmt: skip
    assert torch.equal(cache["text.cond"], torch.stack(got))
    if kind == "sdxl":
        last = torch.cat([cache["text.blocks.0.resid_post"], cache["text_2.blocks.0.resid_post"]], -1)
        cond = slice(-2, None)  # clip_skip is for the prompt alone; negatives are penultimate
        assert torch.equal(last[cond], cache["text.cond"][0][cond])
    torch.manual_seed(2)
    sae = mm.TopKSAE(sd.unet.config.cross_attention_dim, 96, 8)
    sd.attach(sae, at="text.cond")
    try:
        with sd.hooks(mask={"text.cond": range(0, 96, 2)}):
            hooked = draw(sd.pipe, prompt, guidance=guidance, negative_prompt=options["negative_prompt"])
    finally:
        sd.detach()

    def masked(x):
        f = sae.bare().encode(x)  # without biases, features grow with their input
        return x + (mm.Zero(range(0, 96, 2))(f) - f) @ sae.W_dec

    want = by_hand(
        sd,
        masked,
        guidance,
        halves=("cond", "uncond"),
        prompt=prompt,
        negative_prompt=options["negative_prompt"],
    )
    torch.testing.assert_close(hooked, want, atol=2e-5, rtol=1e-4)


def test_heads_and_halves(models):
    """Latents of a head are edited by half and step; without an error term the other rows stay as they are."""
    sd = models("sd1")
    torch.manual_seed(2)
    sae = mm.TopKSAE(16, 64, 8)
    plain = draw(sd.pipe)
    for error_term in (True, False):
        sd.attach(sae, at="text.cond", error_term=error_term)
        try:
            for chosen in (range(0, 64, 2), None):
                edit = mm.Zero(chosen, at="text.cond.sae.latents", guidance="cond", steps=[1])
                sites = ["text.cond", "text.cond.sae.latents"]
                with sd.hooks(edit), sd.caching(sites) as cache:
                    assert not torch.equal(draw(sd.pipe), plain)
                with sd.hooks(edit):
                    draw(sd.pipe)
                x = cache["text.cond"]
                assert (
                    torch.equal(x[0], x[2]) and torch.equal(x[1, 0], x[0, 0]) and not torch.equal(x[1], x[0])
                )
                f = cache["text.cond.sae.latents"]
                assert torch.equal(f[0], f[2]) and torch.equal(f[1, 0], f[0, 0])
                assert not f[1, 1, :, :: 2 if chosen else 1].any() and f[0, 1, :, ::2].any()
        finally:
            sd.detach()


def test_text_encoders_know_their_half(models):
    sd = models("sdxl")
    prompts = {"prompt": ["a red panda"], "negative_prompt": ["blue kite"]}
    _, cache = sd.run_with_cache(**prompts, num_inference_steps=2, sites=["text*.ln_final", "text.cond*"])
    halves = {"cond": cache.cond, "uncond": cache.uncond}
    for half, prompt in (("cond", "a red panda"), ("uncond", "blue kite")):
        _, alone = sd.run_with_cache(
            prompt, num_inference_steps=1, guidance_scale=1.0, sites=["text*.ln_final", "text.cond_pooled"]
        )
        for name in alone:
            assert torch.equal(halves[half].at(0)[name], alone.at(0)[name]), (half, name)
        with sd.hooks(mm.Zero(at="text*.blocks.0.resid_post", guidance=half)):
            _, edited = sd.run_with_cache(**prompts, num_inference_steps=1, sites=["text.cond"])
        same = {h: torch.equal(getattr(edited, h)["text.cond"][0], halves[h]["text.cond"][0]) for h in halves}
        assert same == {h: h != half for h in halves}
    # negative prompts that are zeros are never encoded
    with pytest.raises(HookDidNotFire, match="guidance="):
        with sd.hooks(mm.Zero(at="text.ln_final", guidance="uncond")):
            sd.pipe("a red panda", num_inference_steps=1)
    # encode_prompt by itself, outside of a run
    clean = sd.pipe.encode_prompt(**prompts)
    with sd.hooks(mm.Zero(at="text.blocks.0.resid_post", guidance="uncond")):
        found = sd.pipe.encode_prompt(**prompts)
    assert torch.equal(found[0], clean[0]) and not torch.equal(found[1], clean[1])


# -- steps ------------------------------------------------------------------------------------------------------


def test_steps(models):
    sd = models("sd2")
    with sd.hooks(mm.Zero(at="text.cond", steps=range(1, 3))), sd.caching("text.cond") as cache:
        draw(sd.pipe, steps=4)
    assert [bool(x.any()) for x in cache["text.cond"]] == [True, False, False, True]
    with sd.caching([PATTERN, "text.ln_final"], steps=[0, 3], guidance="cond", dtype=torch.float64) as some:
        draw(sd.pipe, steps=4)
    with sd.caching([PATTERN, "text.ln_final"]) as every:
        draw(sd.pipe, steps=4)
    assert some.steps == [0, 3] and some[PATTERN].dtype == torch.float64
    assert torch.equal(some[PATTERN].float(), every.cond[PATTERN][[0, 3]])
    assert torch.equal(some["text.ln_final"].float(), every["text.ln_final"][1:])
    assert torch.equal(every.at(2)[PATTERN], every[PATTERN][2]) and len(every.at(2)) == 2
    assert "4 steps" in repr(every) and set(every) == {PATTERN, "text.ln_final"}
    with pytest.raises(UnknownSite, match="step 7"):
        every.at(7)
    for bad in (True, False):
        with pytest.raises(ShapeMismatch, match="step: expected"):
            every.at(bad)
    with pytest.raises(UnknownSite, match="this cache"):
        every["text.cond"]
    with pytest.raises(HookDidNotFire, match="the run had 3 steps"):
        with sd.caching(PATTERN, steps=[5]):
            draw(sd.pipe)
    with pytest.raises(HookDidNotFire, match="did not occur"):
        with sd.hooks(mm.Zero(at="text.cond", steps=[5])):
            draw(sd.pipe)


@GUIDANCE
def test_patching_from_another_run_step_by_step(models, guidance):
    """Patched at every place where the text enters, one run becomes the other."""
    sd = models("sd1")
    sites = ["unet.*.cross.out"]
    other = draw(sd.pipe, "blue kite", guidance=guidance)
    with sd.caching(sites) as cache:
        draw(sd.pipe, "blue kite", guidance=guidance)
    with sd.hooks(mm.Patch(cache)):
        assert torch.equal(draw(sd.pipe, "a red panda", guidance=guidance), other)
    with sd.hooks(mm.Patch(cache.cond, guidance="cond")):  # the negative prompt is the same
        assert torch.equal(draw(sd.pipe, "a red panda", guidance=guidance), other)
    with pytest.raises(MMHooksError, match="at step 3, got"):
        with sd.hooks(mm.Patch(cache)):
            draw(sd.pipe, steps=4, guidance=guidance)


def test_loops_of_ones_own(models):
    sd = models("sd1")
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 12, 16)
    edit = mm.Zero(at="text.cond", guidance="cond", steps=[1])
    with torch.no_grad(), sd.hooks(edit, strict=False), sd.caching("text.cond") as cache:
        with pytest.raises(MMHooksError, match="does not run inside a denoising step"):
            sd.unet(x, 5, text)
        for step in range(2):
            with sd.denoising(step, guided=True):
                sd.unet(x, 5, text)  # positional, too
    assert torch.equal(cache["text.cond"][1, 0], text[0]) and not cache["text.cond"][1, 1].any()


# -- what does not fit ----------------------------------------------------------------------------------------


def test_never_silent(models):
    sd = models("sd1")
    with pytest.raises(UnknownSite, match=r"text\.cond"):
        with sd.hooks(mm.Zero(at="text.conds")):
            pass
    with pytest.raises((MMHooksError, TypeCheckError), match="guidance"):
        mm.Zero(at="text.cond", guidance="conditional")
    with pytest.raises(MMHooksError, match="text encoders of pipelines and image towers run once"):
        with sd.hooks(mm.Zero(at="text.ln_final", steps=[0])):
            draw(sd.pipe)
    with pytest.raises(MMHooksError, match="where the halves of the batch are not known"):
        with sd.hooks(mm.Zero(at="vae.decoder", guidance="cond")):
            draw(sd.pipe)
    with pytest.raises(HookDidNotFire, match=r"text\.ln_final"):
        with sd.hooks(mm.Zero(at="text.ln_final")):
            width = sd.unet.config.cross_attention_dim
            draw(sd.pipe, None, guidance=1.0, prompt_embeds=torch.zeros(1, 12, width))
    with pytest.raises(MMHooksError, match="pipeline with a U-Net.*Linear"):
        mm.HookedDiffusion(nn.Linear(1, 1))


def test_three_part_batches_are_refused(models):
    import diffusers

    parts = models("sd1").pipe.components
    edit = diffusers.StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)
    with pytest.raises(MMHooksError, match="three parts"):
        mm.HookedDiffusion(edit)


def test_loading(tmp_path, models):
    pipe = models("sd1").pipe
    pipe.save_pretrained(tmp_path / "pipe")
    sd = mm.load_diffusion(tmp_path / "pipe")
    sd.pipe.set_progress_bar_config(disable=True)
    assert torch.equal(draw(sd.pipe), draw(pipe)) and "pipe" in repr(sd)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingWeights, match=r"model_index\.json is missing"):
        mm.load_diffusion(tmp_path / "empty")
    with pytest.raises(MissingWeights, match="no pipeline 'nobody/nothing' could be loaded"):
        mm.load_diffusion("nobody/nothing", local_files_only=True)


def test_clip_text_model_alone_has_no_halves():
    """The same tower hooked by itself: guidance= has nothing to refer to."""
    from mmhooks.models.diffusion.text_encoder import HookedCLIPText

    model = HookedCLIPText(text_encoder())
    with pytest.raises(MMHooksError, match="they are known"):
        with model.hooks(mm.Zero(at="text.ln_final", guidance="cond")):
            model.forward(torch.ones(1, 12, dtype=torch.long))

"""Pipelines in which more than the U-Net gets the conditioning: an edit there is the edit of the embeddings by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mmhooks as mm
from mmhooks.errors import MMHooksError

from .pipelines import build, draw, traces

WIDTHS = {"sd1": 16, "sdxl": 48}
PICTURE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def loud(net: Any) -> Any:
    """A ControlNet starts with zeros where it writes: with numbers there its part shows."""
    with torch.no_grad():
        for p in [*net.controlnet_down_blocks.parameters(), *net.controlnet_mid_block.parameters()]:
            p.normal_(std=0.5)
    return net


def with_controlnet(kind: str, nets: int = 1) -> tuple[mm.HookedDiffusion, dict[str, Any]]:
    import diffusers

    base = build(kind)
    made = [
        loud(
            diffusers.ControlNetModel.from_unet(
                base.unet, conditioning_embedding_out_channels=(16, 32)
            ).eval()
        )
        for _ in range(nets)
    ]
    parts = {k: v for k, v in base.components.items() if k not in ("image_encoder", "feature_extractor")}
    many: Any = made[0] if nets == 1 else made
    if kind == "sd1":
        pipe = diffusers.StableDiffusionControlNetPipeline(
            **parts, feature_extractor=None, controlnet=many, requires_safety_checker=False
        )
    else:
        pipe = diffusers.StableDiffusionXLControlNetPipeline(**parts, controlnet=many, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    picture = PICTURE if nets == 1 else [PICTURE] * nets
    return mm.HookedDiffusion(pipe), {"image": picture, "height": 16, "width": 16, "steps": 2}


def embeddings(sd: mm.HookedDiffusion, guided: bool) -> dict[str, torch.Tensor]:
    """What ``encode_prompt`` makes, as the pipeline takes it."""
    found = sd.pipe.encode_prompt(
        "a red panda", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=guided
    )
    names = (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    )
    return {name: value for name, value in zip(names, found, strict=False) if value is not None}


SETUPS = [("sd1", 1, False), ("sd1", 2, False), ("sd1", 1, True), ("sdxl", 1, False), ("sdxl", 1, True)]


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize(("kind", "nets", "guess"), SETUPS)
def test_a_controlnet_gets_what_the_unet_gets(kind, nets, guess, guidance) -> None:
    sd, options = with_controlnet(kind, nets)
    options["guess_mode"] = guess
    plain, before = draw(sd.pipe, guidance=guidance, **options), traces(sd)
    given = embeddings(sd, guidance > 1)
    toward = torch.randn(1, 12, WIDTHS[kind], generator=torch.Generator().manual_seed(3))
    cases = {
        "zero": (mm.Zero(at="text.cond"), "both", torch.zeros_like),
        "steer": (mm.Steer(direction=toward, at="text.cond"), "both", lambda e: e + toward),
        "cond": (mm.Zero([0, 3], at="text.cond", guidance="cond"), "prompt_embeds", mm.Zero([0, 3])),
        "uncond": (  # zeros themselves in SDXL
            mm.Steer([0, 3], strength=2.0, at="text.cond", guidance="uncond"),
            "negative_prompt_embeds",
            mm.Steer([0, 3], strength=2.0),
        ),
    }
    for name, (edit, which, by_hand) in cases.items():
        if name == "uncond" and guidance == 1:
            continue
        hand = {k: by_hand(v) if "pooled" not in k and which in ("both", k) else v for k, v in given.items()}
        want = draw(sd.pipe, None, guidance=guidance, **hand, **options)
        with sd.hooks(edit):
            got = draw(sd.pipe, guidance=guidance, **options)
        assert torch.equal(got, want) and not torch.equal(got, plain), name

    def halve(value, *, hook):
        return value * 0.5

    hand = {k: v if "pooled" in k else v * 0.5 for k, v in given.items()}
    with sd.hooks(fwd_hooks=[("text.cond", halve)]):
        got = draw(sd.pipe, guidance=guidance, **options)
    assert torch.equal(got, draw(sd.pipe, None, guidance=guidance, **hand, **options))
    assert traces(sd) == before and torch.equal(draw(sd.pipe, guidance=guidance, **options), plain)


@pytest.mark.parametrize("guess", [False, True])
def test_pooled_embeddings_too(guess) -> None:
    sd, options = with_controlnet("sdxl")
    options["guess_mode"] = guess
    given = embeddings(sd, True)
    hand = {k: v * 0 if "pooled" in k else v for k, v in given.items()}
    with sd.hooks(mm.Zero(at="text.cond_pooled")):
        got = draw(sd.pipe, **options)
    assert torch.equal(got, draw(sd.pipe, None, **hand, **options))
    assert not torch.equal(got, draw(sd.pipe, **options))


def test_a_head_at_the_conditioner_edits_both_and_a_cache_shows_one() -> None:
    sd, options = with_controlnet("sd1")
    head = mm.TopKSAE(16, 32, 8, normalize_input=False)
    sd.attach(head, at="text.cond")
    given = embeddings(sd, True)
    mask = list(range(0, 32, 2))

    def by_hand(e: torch.Tensor) -> torch.Tensor:
        f = head.encode(e)
        return (e + (mm.Zero(mask)(f) - f) @ head.W_dec).detach()

    want = draw(sd.pipe, None, **{k: by_hand(v) for k, v in given.items()}, **options)
    with torch.no_grad(), sd.hooks(mask=mask), sd.caching("text.cond") as cache:
        got = draw(sd.pipe, **options)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert cache["text.cond"].shape == (2, 2, 12, 16) and cache.steps == [0, 1]
    assert not torch.allclose(got, draw(sd.pipe, **options), atol=1e-3)


def test_steps_are_those_of_the_unet() -> None:
    sd, options = with_controlnet("sd1")
    seen = []
    with sd.hooks(
        fwd_hooks=[("text.cond", lambda v, *, hook: seen.append((hook.step, hook.guidance, len(v))))]
    ):
        draw(sd.pipe, **options)
    assert seen == [(0, "both", 2)] * 2 + [(1, "both", 2)] * 2
    with sd.hooks(mm.Zero(at="text.cond", steps=[0])):
        first = draw(sd.pipe, **options)
    with sd.hooks(mm.Zero(at="text.cond", steps=[0, 1])):
        both = draw(sd.pipe, **options)
    assert not torch.equal(first, both) and not torch.equal(first, draw(sd.pipe, **options))


def test_a_controlnet_with_a_conditioning_of_its_own_is_refused(monkeypatch) -> None:
    sd, options = with_controlnet("sd1")
    net, inner = sd.pipe.controlnet, sd.pipe.controlnet.forward
    monkeypatch.setattr(type(sd.pipe), "__call__", _other_conditioning(type(sd.pipe).__call__))
    plain = draw(sd.pipe, **options)
    with pytest.raises(MMHooksError, match=r"'controlnet'.*but a different one"):
        with sd.hooks(mm.Zero(at="text.cond")):
            draw(sd.pipe, **options)
    with sd.caching("text.cond"):  # reading is fine
        assert torch.equal(draw(sd.pipe, **options), plain)
    assert net.forward == inner


def _other_conditioning(call: Any) -> Any:
    """A pipeline that gives its ControlNet something else, as those with faces do."""
    from functools import wraps

    @wraps(call)
    def run(pipe: Any, *args: Any, **kwargs: Any) -> Any:
        real = pipe.controlnet

        class Other:
            def __getattr__(self, name: str) -> Any:
                return getattr(real, name)

            def __call__(self, *a: Any, encoder_hidden_states: torch.Tensor, **k: Any) -> Any:
                return real(*a, encoder_hidden_states=encoder_hidden_states * 3, **k)

        import diffusers.pipelines.controlnet.pipeline_controlnet as module

        pipe.__dict__["controlnet"] = Other()
        kept = module.isinstance if hasattr(module, "isinstance") else None
        module.isinstance = lambda o, kinds: isinstance(real if type(o) is Other else o, kinds)  # type: ignore[attr-defined]
        try:
            return call(pipe, *args, **kwargs)
        finally:
            pipe.__dict__["controlnet"] = real
            del module.isinstance  # type: ignore[attr-defined]
            assert kept is None

    return run


def test_an_adapter_of_images_takes_no_text() -> None:
    import diffusers

    base = build("sd1")
    torch.manual_seed(2)
    adapter = diffusers.T2IAdapter(
        in_channels=3, channels=[8, 16], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter"
    ).eval()
    parts = {k: v for k, v in base.components.items() if k not in ("image_encoder", "feature_extractor")}
    pipe = diffusers.StableDiffusionAdapterPipeline(
        **parts, feature_extractor=None, adapter=adapter, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    sd, options = mm.HookedDiffusion(pipe), {"image": PICTURE, "height": 16, "width": 16, "steps": 2}
    given = {k: v * 0 for k, v in embeddings(sd, True).items()}
    with sd.hooks(mm.Zero(at="text.cond")):
        got = torch.as_tensor(draw(pipe, **options))
    assert torch.equal(got, torch.as_tensor(draw(pipe, None, **given, **options)))
    assert not torch.equal(got, torch.as_tensor(draw(pipe, **options)))

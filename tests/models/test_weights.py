"""What runs is what is read: whatever the weights of a model are, in every family of attention.

Idle and read-only contexts leave the output bit-equal; edits that change nothing move it by rounding only; attention
heads add up to what the projection returns, or reading them is refused with its class.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import mmhooks as mm
from mmhooks.errors import MMHooksError, ShapeMismatch
from mmhooks.models.clip.sites import example_inputs
from mmhooks.models.diffusion.text_encoder import HookedCLIPText

from .families import FAMILIES
from .test_families import instance
from .test_hf_text import build, result

LEAVES = ("q", "k", "v", "pattern", "z", "head_out")
LORA = {
    "CLIP": r"visual.*\.(attn|c_fc)",
    "custom blocks": r"visual.*\.(out_proj|c_fc)",
    "timm ViT, SigLIP": r"visual.*attn\.(proj|qkv)",
    "timm ViT, relative": r"visual.*attn\.(proj|qkv)",
    "EVA": r"visual.*attn\.(proj|q_proj|v_proj)",
    "BERT": r"text.*attention.*(dense|query)",
    "NLLB": r"text.*self_attn\.(out_proj|q_proj)",
    "mT5": r"text.*SelfAttention\.(o|q)",
    "CLIP of transformers": r".*self_attn\.(out_proj|q_proj)",
    "CLIP of transformers, eager": r".*self_attn\.(out_proj|q_proj)",
}
PROJECTIONS = (
    "attn.out_proj",
    "attn.proj",
    "attention.output.dense",
    "self_attn.out_proj",
    "SelfAttention.o",
)
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Twice(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def network(family: str) -> nn.Module:
    torch.manual_seed(0)
    if family.startswith("CLIP of"):
        return build("CLIPTextModelWithProjection", "eager" if family.endswith("eager") else "sdpa")
    model = FAMILIES[family]().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):  # layer scales start at 1e-6, where half precision sees no attention
            nn.init.constant_(parameter, 0.5)
    return model


def projections(model: nn.Module, family: str) -> list[nn.Module]:
    tower = "" if family.startswith("CLIP of") else LORA[family][:4]
    return [
        m for name, m in model.named_modules()
        if name.endswith(PROJECTIONS) and name.startswith("visual" if tower == "visu" else tower)
    ]  # fmt: skip


def lora(model: nn.Module, family: str) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=2, lora_alpha=8, target_modules=LORA[family], init_lora_weights=False)
    inject_adapter_in_model(config, model)
    model.eval()


def parametrised(model: nn.Module, family: str) -> None:
    for module in projections(model, family):
        parametrize.register_parametrization(module, "weight", Twice())
    for module in list(model.modules()):
        if "in_proj_weight" in module._parameters:
            parametrize.register_parametrization(module, "in_proj_weight", Twice())


def quantised(model: nn.Module, family: str) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())


def dynamic(model: nn.Module, family: str) -> None:
    from torch.ao.quantization import quantize_dynamic

    quantize_dynamic(model, {nn.Linear}, inplace=True)


def offloaded(model: nn.Module, family: str) -> None:
    import accelerate

    accelerate.cpu_offload(
        model, execution_device=torch.device("cpu"), preload_module_classes=["MultiheadAttention"]
    )


def hooked(model: nn.Module, family: str) -> None:
    for module in projections(model, family):
        module.register_forward_hook(lambda m, a, out: None)
        module.register_forward_pre_hook(lambda m, a: (1.5 * a[0],))


KINDS = {"plain": lambda model, family: None, "LoRA": lora, "parametrised": parametrised, "int8": quantised,
         "int8 dynamic": dynamic, "offloaded": offloaded, "hooked": hooked,
         "fp16": lambda model, family: model.half(), "bf16": lambda model, family: model.bfloat16()}  # fmt: skip


def prepared(kind: str, family: str):
    """A hooked model, its run, and the prefix of its sites."""
    plain = network(family)
    KINDS[kind](plain, family)
    if family.startswith("CLIP of"):
        tokens = torch.randint(1, 60, (2, 8), generator=torch.Generator().manual_seed(1))
        model = HookedCLIPText(plain)
        return model, lambda: result(plain(input_ids=tokens)), "text.blocks.1"
    model = mm.HookedCLIP(plain)
    images, texts = example_inputs(FAMILIES[family]())
    if LORA[family].startswith("visual"):
        return model, lambda: model.encode_image(model.to_input(images)), "image.blocks.1"
    return model, lambda: model.encode_text(texts), "text.blocks.1"


@pytest.mark.parametrize("family", LORA)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_runs_is_what_is_read(kind: str, family: str) -> None:
    model, run, block = prepared(kind, family)
    clean = run()
    scale = float(clean.float().abs().max())
    heads_known = kind != "int8 dynamic" or family == "CLIP"  # torch's own attention keeps its weights
    leaves = LEAVES if heads_known else LEAVES[:-1]
    names = [f"{block}.attn.{leaf}" for leaf in leaves]
    # Where attn_out is what attention returns after a norm or a layer scale.
    scaled = {
        "custom blocks": "visual.transformer.resblocks.1.attn",
        "timm ViT, relative": "visual.trunk.blocks.1.attn",
    }
    whole = scaled.get(family, f"{block}.attn_out")
    with model.caching([*names, whole]) as cache:
        assert torch.equal(run(), clean)
    for name in names:
        with model.hooks(fwd_hooks=[(name, lambda t, *, hook: t.clone())]):
            moved = float((run() - clean).float().abs().max())
        assert moved <= (2e-5 if kind not in HALF else 0.05) * scale, (name, moved)
    if not heads_known:
        with pytest.raises(MMHooksError, match="Linear"), model.caching(f"{block}.attn.head_out"):
            run()
        return
    # The sum by head and the output differ by one vector, the bias, at every token.
    gap = (cache[whole] - cache[f"{block}.attn.head_out"].sum(2)).float().flatten(0, 1)
    size = float(cache[whole].float().abs().max())
    assert float((gap - gap[0]).abs().max()) <= (1e-5 if kind not in HALF else 0.03) * max(size, 1)
    with model.hooks(mm.Zero([0], at=f"{block}.attn.z")):
        by_z = run()
    with model.hooks(mm.Zero([0], at=f"{block}.attn.head_out")):
        by_head = run()
    assert not torch.equal(by_z, clean)
    torch.testing.assert_close(by_z, by_head, **({"atol": 0.05 * scale, "rtol": 0.05} if kind in HALF else
                                                 {"atol": 2e-5 * scale, "rtol": 1e-4}))  # fmt: skip


@pytest.mark.parametrize("family", ["timm ViT, SigLIP", "custom blocks", "CLIP of transformers"])
@torch.no_grad()
def test_a_hook_of_the_users_on_the_projection_is_kept_or_named(family: str) -> None:
    model, run, block = prepared("plain", family)
    calls: list[int] = []
    handles = [
        m.register_forward_hook(lambda m, a, o: calls.append(1)) for m in projections(model.model, family)
    ]
    run()
    once = len(calls)
    with model.caching(f"{block}.attn.*"):
        run()
    assert len(calls) == 2 * once  # a look does not call it a second time
    for handle in handles:
        handle.remove()
    for module in projections(model.model, family):
        module.register_forward_hook(lambda m, a, o: 3 * o)
    clean = run()
    with model.hooks(fwd_hooks=[(f"{block}.attn.z", lambda t, *, hook: t.clone())]):
        assert torch.equal(run(), clean)
    with (
        pytest.raises(MMHooksError, match="changed by a forward hook"),
        model.caching(f"{block}.attn.head_out"),
    ):
        run()


@torch.no_grad()
def test_parametrised_projections_of_the_towers() -> None:
    plain = network("CLIP")
    want = (
        plain.encode_image(images := example_inputs(plain)[0]),
        plain.encode_text(texts := example_inputs(plain)[1]),
    )
    for owner, name in ((plain.visual, "proj"), (plain, "text_projection")):
        parametrize.register_parametrization(owner, name, Twice())
    model = mm.HookedCLIP(plain)
    out, cache = model.run_with_cache(images, texts, ["*.pooled", "*.embed"])
    for tower, before in zip(("image", "text"), want, strict=True):
        torch.testing.assert_close(cache[f"{tower}.embed"], 2 * before, atol=1e-5, rtol=1e-5)
        assert cache[f"{tower}.pooled"].shape == (2, 16)


def test_a_model_that_was_adapted_after_it_was_hooked_says_so() -> None:
    model = mm.HookedCLIP(network("CLIP"))
    model.sites("image.blocks.0.mlp.pre")
    lora(model.model, "CLIP")
    for site in (
        "image.blocks.0.mlp.pre",
        "image.blocks.0.attn.z",
        "image.blocks.*.mlp.pre",
    ):
        with pytest.raises(MMHooksError, match="hook it again"), model.hooks(mm.Zero(at=site)):
            pass
    mm.HookedCLIP(model.model).sites("image.blocks.0.mlp.pre")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_of_a_width_that_a_site_cannot_have_is_refused_when_attached(family: str) -> None:
    model = instance(family)
    known = [s for s in model.sites() if not s.endswith("pattern")]
    if family in ("ConvNeXt", "FastViT, MobileCLIP", "Swin"):  # feature maps: known after a run
        known = [s for s in known if s.startswith("text.") or s == "image.embed"]
    if family in ("BERT", "RoBERTa", "XLM-RoBERTa", "NLLB", "mT5", "SigLIP text"):
        known = [s for s in known if s not in ("text.pooled", "text.ln_final")]
    for site in known:
        with pytest.raises(ShapeMismatch, match="width 7,"):
            model.attach(mm.TopKSAE(7, 16, 2), at=[site])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("left", [False, True])
@torch.no_grad()
def test_padding_leaves_every_number_finite(attention: str, left: bool) -> None:
    model = HookedCLIPText(build("CLIPTextModelWithProjection", attention))
    tokens = torch.randint(1, 60, (3, 8), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * n + [0] * (8 - n) for n in (8, 5, 2)])
    mask = mask.flip(1) if left else mask
    clean = result(model.forward(tokens, attention_mask=mask))
    out, cache = model.run_with_cache(tokens, "text.*", attention_mask=mask)
    assert torch.equal(result(out), clean) and all(v.isfinite().all() for v in cache.values())
    for leaf in LEAVES:
        with model.hooks(fwd_hooks=[(f"text.blocks.*.attn.{leaf}", lambda t, *, hook: t.clone())]):
            torch.testing.assert_close(result(model.forward(tokens, attention_mask=mask)), clean)


@torch.no_grad()
def test_hooked_models_travel_without_their_contexts() -> None:
    model = mm.HookedCLIP(network("CLIP"))
    model.attach(mm.TopKSAE(12, 24, 4), at="image.embed", name="sae")
    images, _ = example_inputs(model.model)
    clean, sites = model.encode_image(images), ["image.*"]
    edits = [
        mm.Zero(at=f"image.{s}")
        for s in ("blocks.0.attn.z", "blocks.0.mlp.pre", "pooled", "blocks.1.resid_pre")
    ]
    _, want = model.run_with_cache(images, sites=sites)
    with model.hooks(*edits, strict=False):
        others = [pickle.loads(pickle.dumps(model)), copy.deepcopy(model)]
    others += [pickle.loads(pickle.dumps(model))]
    for other in others:
        assert torch.equal(other.encode_image(images), clean)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in other.model.modules())
        _, got = other.run_with_cache(images, sites=sites)
        assert all(torch.equal(got[site], want[site]) for site in want)
        with other.hooks(mm.Zero(range(24), at="image.embed.sae.latents")):
            assert not torch.equal(other.encode_image(images), clean)
    assert torch.equal(model.encode_image(images), clean)


@pytest.mark.parametrize("family", ["CLIP", "timm ViT, relative"])
@pytest.mark.parametrize("kind", ["plain", "LoRA", "parametrised"])
def test_decompositions_use_the_weights_that_run(kind: str, family: str) -> None:
    """``decompose`` raises where the parts do not add up to the embedding."""
    torch.manual_seed(0)
    plain = FAMILIES[family]().eval()
    if kind == "LoRA":
        lora(plain, family)
    elif kind == "parametrised":
        parametrised(plain, family)
    model = mm.HookedCLIP(plain)
    images, _ = example_inputs(plain)
    parts = mm.decompose(model, images)
    assert float(parts.error.max()) < 1e-4

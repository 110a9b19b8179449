"""From the residual stream to the embedding through layers that an adapter or a quantiser changed: the layers that run
are the ones that are read, or they are refused by name."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import mmhooks as mm
from mmhooks.analysis.decomposition.neuron_effects import second_order_effects
from mmhooks.errors import MMHooksError, NoExactSum
from mmhooks.models.clip.sites import example_inputs
from mmhooks.models.diffusion.references import text_projection

from .families import FAMILIES
from .pipelines import text_encoder
from .test_weights import Twice


def lora(target: str) -> Callable[[nn.Module], None]:
    def adapt(model: nn.Module) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(r=2, lora_alpha=8, target_modules=target, init_lora_weights=False)
        inject_adapter_in_model(config, model)

    return adapt


def kept(target: str) -> Callable[[nn.Module], None]:
    """peft's ``modules_to_save``: a copy of the module that runs in its place."""

    def adapt(model: nn.Module) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(r=2, target_modules="visual.*c_fc", modules_to_save=[target])
        inject_adapter_in_model(config, model)
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                nn.init.normal_(parameter)

    return adapt


def tuned_norm(target: str) -> Callable[[nn.Module], None]:
    def adapt(model: nn.Module) -> None:
        from peft import LNTuningConfig, inject_adapter_in_model

        inject_adapter_in_model(LNTuningConfig(target_modules=target), model)
        for name, parameter in model.named_parameters():
            if "ln_tuning" in name:
                nn.init.normal_(parameter)

    return adapt


def int8(model: nn.Module) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())


def parametrised(owner: str, name: str) -> Callable[[nn.Module], None]:
    return lambda model: parametrize.register_parametrization(model.get_submodule(owner), name, Twice())  # type: ignore[return-value]


def another_forward(owner: str) -> Callable[[nn.Module], None]:
    def adapt(model: nn.Module) -> None:
        norm = model.get_submodule(owner)
        norm.forward = types.MethodType(lambda self, x: 2 * type(self).forward(self, x), norm)  # type: ignore[assignment]

    return adapt


# Family, what is done to it, and whether its sum is still known.
CASES = {
    "CoCa, plain": ("CoCa", lambda model: None, True),
    "CoCa, pooling's keys parametrised": ("CoCa", parametrised("visual.attn_pool.attn", "k_proj_weight"), True),
    "CoCa, pooling's values parametrised": ("CoCa", parametrised("visual.attn_pool.attn", "v_proj_weight"), True),
    "CoCa, pooling's output parametrised": ("CoCa", parametrised("visual.attn_pool.attn.out_proj", "weight"), True),
    "CoCa, int8": ("CoCa", int8, True),
    "CoCa, its keys' norm kept": ("CoCa", kept("visual.attn_pool.ln_k"), False),
    "CoCa, its keys' norm tuned": ("CoCa", tuned_norm("visual.attn_pool.ln_k"), False),
    "CoCa, its queries' norm kept": ("CoCa", kept("visual.attn_pool.ln_q"), True),
    "CoCa, final norm kept": ("CoCa", kept("visual.ln_post"), False),
    "CoCa, another forward": ("CoCa", another_forward("visual.ln_post"), False),
    "CLIP, int8": ("CLIP", int8, True),
    "CLIP, final norm tuned": ("CLIP", tuned_norm("visual.ln_post"), False),
    "CLIP, final norm parametrised": ("CLIP", parametrised("visual.ln_post", "weight"), True),
    "SigLIP, LoRA": ("timm ViT, SigLIP", lora(r"visual.trunk.blocks.*proj"), True),
    "SigLIP, int8": ("timm ViT, SigLIP", int8, True),
    "SigLIP, final norm tuned": ("timm ViT, SigLIP", tuned_norm("visual.trunk.norm"), False),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_contributions_add_up_or_are_refused(name):
    family, adapt, known = CASES[name]
    torch.manual_seed(0)
    plain = FAMILIES[family]().eval()
    adapt(plain)
    plain.eval()
    model = mm.HookedCLIP(plain)
    images, _ = example_inputs(FAMILIES[family]())
    if not known:
        with pytest.raises(NoExactSum, match="norm.*(merge_and_unload|LayerNorm)"):
            mm.decompose(model, images)
        return
    parts = mm.decompose(model, images)
    with torch.no_grad():
        torch.testing.assert_close(parts.embedding, model.encode_image(images), atol=1e-5, rtol=1e-4)
    assert float(parts.error.max()) < 1e-4


def test_the_text_tower_s_norm():
    torch.manual_seed(0)
    plain = FAMILIES["CLIP"]().eval()
    tuned_norm("ln_final")(plain)
    with pytest.raises(NoExactSum, match="the text tower's final norm is a"):
        mm.decompose(mm.HookedCLIP(plain), texts=example_inputs(FAMILIES["CLIP"]())[1])


@torch.no_grad()
@pytest.mark.parametrize(
    "adapt", [lora("visual.*(c_proj|c_fc)"), lora("visual.*attn"), int8], ids=["MLP", "attention", "int8"]
)
def test_second_order_effects_of_adapted_layers(adapt):
    """As those of the model with the adapter merged into its weights, by hand."""
    torch.manual_seed(0)
    plain = FAMILIES["CLIP"]().eval()
    adapt(plain)
    model, (images, _) = mm.HookedCLIP(plain.eval()), example_inputs(FAMILIES["CLIP"]())
    found = second_order_effects(model, images, layer=0).vectors()
    merged = FAMILIES["CLIP"]().eval()
    state = {}
    for key in merged.state_dict():
        owner, _, leaf = key.rpartition(".")
        module: Any = plain.get_submodule(owner)
        if hasattr(module, "merge") and not module.merged:
            module.merge()
        state[key] = getattr(module.base_layer if hasattr(module, "base_layer") else module, leaf).detach()
    state = {
        k: v.dequantize() if hasattr(v, "dequantize") and type(v) is not torch.Tensor else v
        for k, v in state.items()
    }
    merged.load_state_dict(state)
    torch.testing.assert_close(merged.encode_image(images), plain.encode_image(images), atol=1e-5, rtol=1e-4)
    wanted = second_order_effects(mm.HookedCLIP(merged), images, layer=0).vectors()
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-3)


def test_second_order_refuses_a_norm_that_was_tuned():
    torch.manual_seed(0)
    plain = FAMILIES["CLIP"]().eval()
    tuned_norm("visual.transformer.resblocks.1.ln_1")(plain)
    with pytest.raises(NoExactSum, match="first norm of block 1"):
        second_order_effects(mm.HookedCLIP(plain), example_inputs(FAMILIES["CLIP"]())[0], layer=0)


@torch.no_grad()
@pytest.mark.parametrize("adapt", [lora("text_projection"), int8], ids=["LoRA", "int8"])
def test_a_text_projection_that_was_adapted(adapt, models):
    encoder = text_encoder(16, projection=24)
    sd = models("sd1")
    named = dict(sd.pipe.text_encoder.named_modules())
    for name, module in encoder.named_modules():
        if name.endswith("token_embedding"):
            module.load_state_dict(
                next(m for n, m in named.items() if n.endswith("token_embedding")).state_dict()
            )
    adapt(encoder)
    encoder.eval()
    matrix = text_projection(sd, encoder)
    x = torch.randn(3, 16)
    torch.testing.assert_close(x @ matrix, encoder.text_projection(x), atol=1e-5, rtol=1e-4)
    layer = nn.Linear(16, 24)
    encoder.text_projection = layer
    with pytest.raises(MMHooksError, match="with a bias"):
        text_projection(sd, encoder)

"""Vision-language models whose weights are adapted, quantised or elsewhere: sites read exactly, add up, and edits act."""

from __future__ import annotations

import pytest
import torch

import mmhooks as mm

from . import tiny_vlms as vlms
from .tiny_vlms import generated, logits, real

OUT = "model.language_model.layers.1.self_attn.o_proj"


def adapted(model, folder):
    """LoRA on attention and MLP of the decoder; the model in which the adapters are."""
    peft = pytest.importorskip("peft")
    plan = peft.LoraConfig(
        target_modules=["q_proj", "v_proj", "o_proj", "down_proj"], init_lora_weights=False, r=2
    )
    return peft.get_peft_model(model, plan).eval().get_base_model()


def quantised(model, folder):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model.model.language_model, quantization.Int8WeightOnlyConfig())
    return model


def offloaded(model, folder):
    """All weights on the meta device between calls, as ``cpu_offload`` leaves them."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    return model


def spread(model, folder):
    """What ``device_map="auto"`` does where memory ends: the tower here, one decoder layer on the disk."""
    accelerate = pytest.importorskip("accelerate")
    layers = {f"model.language_model.layers.{n}": "disk" if n == 1 else "cpu" for n in range(3)}
    rest = ("model.vision_tower", "model.multi_modal_projector", "model.language_model.embed_tokens",
            "model.language_model.norm", "model.language_model.rotary_emb", "lm_head")  # fmt: skip
    plan = {**layers, **dict.fromkeys(rest, "cpu")}
    return accelerate.dispatch_model(model, plan, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.parametrize("prepare", [adapted, quantised, offloaded, spread])
@torch.no_grad()
def test_sites_of_other_weights(prepare, tmp_path):
    model = mm.hook(prepare(vlms.llava(), tmp_path))
    assert isinstance(model, mm.HookedVLM)
    clean, alone, seen = logits(model), generated(model), real(model)
    with model.caching(["*", OUT]) as cache:
        assert all(torch.equal(a, b) for a, b in zip(generated(model), alone, strict=True))
    assert set(cache) == {*model.sites(), OUT}
    block = "lm.blocks.1."
    for step in (0, 2):
        values = cache.at(step)
        torch.testing.assert_close(values[f"{block}attn.head_out"].sum(2), values[OUT], atol=1e-5, rtol=1e-5)
        assert torch.equal(
            values[f"{block}resid_mid"] + values[f"{block}mlp_out"], values[f"{block}resid_post"]
        )
    if prepare in (offloaded, spread):  # the same weights, wherever they are
        torch.testing.assert_close(alone[1], generated(mm.hook(vlms.llava()))[1], atol=1e-6, rtol=1e-6)
    for site in ("attn.pattern", "attn.head_out", "mlp.post", "resid_post"):
        with model.hooks(mm.Zero(at=block + site, tokens="image")):
            assert not torch.equal(logits(model)[seen], clean[seen]), site
    assert torch.equal(logits(model), clean)

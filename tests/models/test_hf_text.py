"""Hugging Face's CLIP text models: every site reads exactly and acts; attention equals the model's own."""

from __future__ import annotations

import pytest
import torch

import mmhooks as mm
from mmhooks.models.diffusion.text_encoder import HookedCLIPText


def build(kind: str, attention: str = "sdpa"):
    import transformers

    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, projection_dim=12, bos_token_id=62, eos_token_id=63,
    )  # fmt: skip
    config._attn_implementation = attention
    return getattr(transformers, kind)(config).eval()


def result(out):
    return out.text_embeds if hasattr(out, "text_embeds") else out.last_hidden_state


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["CLIPTextModel", "CLIPTextModelWithProjection"])
def test_every_site(kind, attention):
    model = HookedCLIPText(build(kind, attention))
    tokens = torch.randint(1, 60, (2, 8))
    tokens[:, -1] = 63
    with torch.no_grad():
        clean = result(model.forward(tokens))
        out, cache = model.run_with_cache(tokens)
        assert torch.equal(result(out), clean) and set(cache) == set(model.sites())
        total = cache["text.blocks.0.attn.head_out"].sum(2)
        total = total + model.model.get_submodule(_layer(model, 0)).self_attn.out_proj.bias
        torch.testing.assert_close(total, cache["text.blocks.0.attn_out"], atol=1e-6, rtol=1e-5)
        assert not cache["text.blocks.0.attn.pattern"].triu(1).any()
        for site in model.sites():
            with model.hooks(fwd_hooks=[(site, lambda t, *, hook: 1.5 * t + 0.1)]):
                assert not torch.equal(result(model.forward(tokens)), clean), site
        with model.hooks(mm.Zero([1], at="text.blocks.1.attn.z")):
            by_hook = result(model.forward(tokens))
        model.model.get_submodule(_layer(model, 1)).self_attn.out_proj.weight[:, 8:] = 0
    torch.testing.assert_close(by_hook, result(model.forward(tokens)).detach(), atol=1e-6, rtol=1e-5)


def _layer(model, n):
    return next(name for name, _ in model.model.named_modules() if name.endswith(f"encoder.layers.{n}"))


def test_other_models_are_refused():
    with pytest.raises(mm.errors.MMHooksError, match="CLIPTextModel.*Linear"):
        HookedCLIPText(torch.nn.Linear(1, 1))

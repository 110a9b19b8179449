"""The same weights in open_clip's CLIP and in transformers' CLIPModel: one model, whichever library runs it."""

from __future__ import annotations

import open_clip
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import mmhooks as mm
from mmhooks.analysis.decomposition.contributions import decompose_batch
from mmhooks.models.embedded.hf_weights import encoder_layers

VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 4, "head_width": 8, "mlp_ratio": 2.0}
TEXT = {"context_length": 12, "vocab_size": 60, "width": 24, "heads": 3, "layers": 3, "mlp_ratio": 2.0}
END = 59
LEAVES = ("resid_pre", "ln_1", "attn.q", "attn.k", "attn.v", "attn.pattern", "attn.z", "attn.head_out", "attn_out",
          "resid_mid", "ln_2", "mlp.pre", "mlp.post", "mlp_out", "resid_post")  # fmt: skip


def converted(model) -> tuple[object, object]:
    """transformers' CLIPModel with an open_clip model's weights."""
    import transformers

    visual = model.visual
    width, layers = visual.transformer.width, visual.transformer.layers
    heads = visual.transformer.resblocks[0].attn.num_heads
    common = {"hidden_act": "gelu"}
    vision = {"hidden_size": width, "intermediate_size": visual.transformer.resblocks[0].mlp.c_fc.out_features,
              "num_hidden_layers": layers, "num_attention_heads": heads, "image_size": visual.image_size[0],
              "patch_size": visual.patch_size[0], **common}  # fmt: skip
    block = model.transformer.resblocks[0]
    text = {"hidden_size": block.ln_1.normalized_shape[0], "intermediate_size": block.mlp.c_fc.out_features,
            "num_hidden_layers": len(model.transformer.resblocks), "num_attention_heads": block.attn.num_heads,
            "vocab_size": model.vocab_size, "max_position_embeddings": model.context_length,
            "eos_token_id": model.vocab_size - 1, "bos_token_id": 1, "pad_token_id": 0, **common}  # fmt: skip
    config = transformers.CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=model.text_projection.shape[1]
    )
    other = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        v, t = other.vision_model, other.text_model
        v.embeddings.class_embedding.copy_(visual.class_embedding)
        v.embeddings.patch_embedding.weight.copy_(visual.conv1.weight)
        v.embeddings.position_embedding.weight.copy_(visual.positional_embedding)
        for mine, theirs in ((v.pre_layrnorm, visual.ln_pre), (v.post_layernorm, visual.ln_post),
                             (t.final_layer_norm, model.ln_final)):  # fmt: skip
            mine.load_state_dict(theirs.state_dict())
        v.load_state_dict(encoder_layers(visual.transformer.resblocks), strict=False)
        t.load_state_dict(encoder_layers(model.transformer.resblocks), strict=False)
        t.embeddings.token_embedding.weight.copy_(model.token_embedding.weight)
        t.embeddings.position_embedding.weight.copy_(model.positional_embedding)
        other.visual_projection.weight.copy_(visual.proj.T)
        other.text_projection.weight.copy_(model.text_projection.T)
        other.logit_scale.copy_(model.logit_scale)
    return other


@pytest.fixture(scope="module")
def pair() -> tuple[mm.HookedCLIP, mm.HookedCLIP]:
    """Random weights whose biases are not zero, hooked in both libraries."""
    torch.manual_seed(0)
    model = open_clip.CLIP(20, dict(VISION), dict(TEXT)).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return mm.HookedCLIP(model), mm.HookedCLIP(converted(model))  # type: ignore[arg-type]


def batch(n: int = 6) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    tokens = torch.randint(2, 58, (n, 12))
    tokens[torch.arange(n), torch.arange(n) % 6 + 5] = END
    for row, end in enumerate(torch.arange(n) % 6 + 5):
        tokens[row, end + 1 :] = 0
    return torch.randn(n, 3, 32, 32), tokens


def close(a: Tensor, b: Tensor, at: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=at * max(1.0, float(b.abs().max())), rtol=0)


@torch.no_grad()
def test_embeddings_and_every_site(pair):
    ours, theirs = pair
    images, texts = batch()
    out, cache = ours.run_with_cache(images, texts)
    same, other = theirs.run_with_cache(images, texts)
    close(same.image, out.image)
    close(same.text, out.text)
    assert set(theirs.sites()) == set(ours.sites()) and set(other) == set(cache)
    assert {s.partition("blocks.1.")[2] for s in cache if "blocks.1." in s} == set(LEAVES)
    for site in cache:
        want = cache[site]
        if site == "image.ln_post":  # transformers takes the class token first
            want = want[:, 0]
        close(other[site], want)
    assert theirs.image_size == ours.image_size == (32, 32) and theirs.dtype == ours.dtype
    close(theirs.logit_scale, ours.logit_scale)


@torch.no_grad()
def test_edits_do_the_same(pair):
    images, texts = batch()
    for site in ("attn.pattern", "attn.head_out", "attn.z", "attn.q", "resid_mid", "mlp.post", "attn_out"):
        edited = []
        for model in pair:
            with model.hooks(fwd_hooks=[(f"*.blocks.1.{site}", lambda t, *, hook: 0.5 * t + 0.01)]):
                edited.append(model.forward(images, texts))
        close(edited[0].image, edited[1].image)
        close(edited[0].text, edited[1].text)


def test_decomposition_and_text_span(pair):
    images, texts = batch(24)
    for tower, inputs in (("image", images), ("text", texts)):
        one, two = (decompose_batch(model, inputs, tower=tower, tokens=True) for model in pair)
        for part in ("embedding", "initial", "heads", "mlps", "tokens"):
            close(getattr(two, part), getattr(one, part), 1e-4)
    pool = normalize(torch.randn(30, 20), dim=1)
    names = [f"text {n}" for n in range(30)]
    spans = [
        mm.text_span(mm.decompose(model, images).heads[:, -1], pool, names, n_texts=4, rank=16)
        for model in pair
    ]
    assert spans[0].texts == spans[1].texts
    close(torch.tensor(spans[1].explained), torch.tensor(spans[0].explained), 1e-4)


def test_second_order_and_saliency(pair):
    images, texts = batch()
    one, two = (mm.second_order(model, images, layer=1, neurons=range(6), top=2) for model in pair)
    close(two.direction, one.direction, 1e-3)
    close(two.size, one.size, 1e-3)
    directions = pair[0].encode_text(texts).detach()
    for method in ("token contributions", "raw attention", "rollout", "gradient attention", "LeGrad"):
        maps = [mm.saliency(model, images, directions, method=method) for model in pair]
        close(maps[1], maps[0], 1e-3)


@torch.no_grad()
def test_groups_of_features(pair):
    """Heads trained nowhere near these towers: the same latents, scores and groups."""
    torch.manual_seed(2)
    sae = mm.TopKSAE(20, 40, 4)
    images, texts = batch(40)
    results = []
    for model in pair:
        model.attach(sae, at=["image.embed", "text.embed"], name="sae")
        _, cache = model.run_with_cache(images, texts, ["*.sae.latents"])
        results.append(mm.mds(cache["image.embed.sae.latents"], cache["text.embed.sae.latents"]))
        model.detach()
    close(results[1].R.nan_to_num(), results[0].R.nan_to_num(), 1e-4)
    assert [list(g) for g in results[0].groups] == [list(g) for g in results[1].groups]


@pytest.mark.slow
@torch.no_grad()
def test_vit_b_32_at_its_real_size():
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32", pretrained=None).eval()
    ours, theirs = mm.HookedCLIP(model), mm.HookedCLIP(converted(model))  # type: ignore[arg-type]
    images = torch.randn(1, 3, 224, 224)
    texts = torch.randint(1, 49_000, (1, 77))
    texts[:, 9], texts[:, 10:] = 49_407, 0
    sites = ["image.blocks.11.*", "text.blocks.11.*", "*.embed"]
    out, cache = ours.run_with_cache(images, texts, sites)
    _, other = theirs.run_with_cache(images, texts, sites)
    for site in cache:
        close(other[site], cache[site], 1e-4)

"""Official DeCLIP checkpoints: a tiny exact copy of their layout, and its forward pass written out as witness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip import factory
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import functional as TF

import mmhooks as mm
from mmhooks.analysis.decomposition.contributions import decompose_batch
from mmhooks.errors import DamagedFile, MMHooksError
from mmhooks.models.clip import declip
from mmhooks.models.clip.declip import DeclipTokenizer, check_layout, declip_preprocess, is_declip
from mmhooks.studies.modality.models import load_declip as load_for_study
from mmhooks.studies.modality.options import Options

VOCABULARY, CONTEXT = 49409, 12
TINY = {
    "embed_dim": 8,  # the file's own width wins
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": CONTEXT, "vocab_size": 49408, "width": 48, "heads": 3, "layers": 2},
}
Shapes = dict[str, tuple[int, ...]]


def blocks(tower: str, layers: int, width: int) -> Shapes:
    shapes: Shapes = {}
    for n in range(layers):
        at = f"{tower}.transformer.resblocks.{n}."
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{at}{norm}.weight": (width,), f"{at}{norm}.bias": (width,)}
        shapes |= {f"{at}attn.in_proj_weight": (3 * width, width), f"{at}attn.in_proj_bias": (3 * width,)}
        shapes |= {f"{at}attn.out_proj.weight": (width, width), f"{at}attn.out_proj.bias": (width,)}
        shapes |= {f"{at}mlp.c_fc.weight": (4 * width, width), f"{at}mlp.c_fc.bias": (4 * width,)}
        shapes |= {f"{at}mlp.c_proj.weight": (width, 4 * width), f"{at}mlp.c_proj.bias": (width,)}
    return shapes


def training_heads(width: int, embed: int) -> Shapes:
    """SimSiam's two networks and the prediction of masked words."""
    sizes = {
        "projector.linear1": (1024, embed), "projector.linear2": (1024, 1024), "projector.linear3": (1024, 1024),
        "predictor.linear1": (512, 1024), "predictor.layer2": (1024, 512), "text_label_predictor": (VOCABULARY, width),
    }  # fmt: skip
    shapes: Shapes = {}
    for layer, (out, into) in sizes.items():
        shapes |= {f"{layer}.weight": (out, into), f"{layer}.bias": (out,)}
    norms = {
        "projector.bn1": 1024, "projector.bn2": 1024, "projector.bn3": 1024, "predictor.bn1": 512,
    }  # fmt: skip
    for norm, out in norms.items():
        shapes |= {f"{norm}.{part}": (out,) for part in ("weight", "bias", "running_mean", "running_var")}
        shapes[f"{norm}.num_batches_tracked"] = ()
    return shapes


def layout(vision: tuple[int, int, int], patches: int, text: tuple[int, int, int], embed: int) -> Shapes:
    """Keys and shapes; towers as (layers, width, patch size) and (layers, width, context)."""
    (depth, wide, patch), (text_depth, width, context) = vision, text
    return {
        "logit_scale": (1,),
        "visual.class_embedding": (wide,), "visual.positional_embedding": (patches + 1, wide),
        "visual.proj": (wide, embed), "visual.conv1.weight": (wide, 3, patch, patch),
        "visual.ln_pre.weight": (wide,), "visual.ln_pre.bias": (wide,),
        "visual.ln_post.weight": (wide,), "visual.ln_post.bias": (wide,),
        **blocks("visual", depth, wide),
        "encode_text.positional_embedding": (context, width),
        "encode_text.token_embedding.weight": (VOCABULARY, width),
        "encode_text.ln_final.weight": (width,), "encode_text.ln_final.bias": (width,),
        "encode_text.text_projection.weight": (embed, width), "encode_text.text_projection.bias": (embed,),
        **blocks("encode_text", text_depth, width),
        **training_heads(width, embed),
    }  # fmt: skip


LAYOUT = layout((2, 32, 16), 4, (2, 48, CONTEXT), 24)


def random_state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    state = {key: torch.randn(shape) * 0.1 for key, shape in LAYOUT.items()}
    return {k: v + 1 if ".ln_" in k and k.endswith("weight") else v for k, v in state.items()}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return random_state()


def write(state: dict[str, Any], path: Path) -> str:
    wrapped = {f"module.{key}": value for key, value in state.items()}
    torch.save({"model": wrapped, "optimizer": {"state": {}}, "last_iter": 128000}, path)
    return str(path)


@pytest.fixture(scope="module")
def file(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(state, tmp_path_factory.mktemp("declip") / "vitb32.pth.tar")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    real = factory.get_model_config
    for module in (factory, open_clip):
        monkeypatch.setattr(
            module,
            "get_model_config",
            lambda name: (real(name) or {}) | TINY if name == "ViT-B-32" else real(name),
        )


def load(file: str, **options: Any) -> Any:
    return mm.load("ViT-B-32", pretrained=file, **options)


# -- the forward pass, from the layout's own keys ----------------------------------------------------------


def norm(x: Tensor, state: dict[str, Tensor], key: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * state[f"{key}.weight"] + state[f"{key}.bias"]


def transformer(x: Tensor, state: dict[str, Tensor], tower: str, heads: int, causal: bool) -> Tensor:
    for n in range(2):
        at = f"{tower}.transformer.resblocks.{n}"
        inner = norm(x, state, f"{at}.ln_1")
        q, k, v = (inner @ state[f"{at}.attn.in_proj_weight"].T + state[f"{at}.attn.in_proj_bias"]).chunk(
            3, -1
        )
        size, out = q.shape[-1] // heads, []
        for h in range(heads):
            own = slice(h * size, (h + 1) * size)
            scores = q[..., own] @ k[..., own].transpose(1, 2) / size**0.5
            if causal:
                scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf)
            out.append(scores.softmax(-1) @ v[..., own])
        x = x + torch.cat(out, -1) @ state[f"{at}.attn.out_proj.weight"].T + state[f"{at}.attn.out_proj.bias"]
        hidden = (
            norm(x, state, f"{at}.ln_2") @ state[f"{at}.mlp.c_fc.weight"].T + state[f"{at}.mlp.c_fc.bias"]
        )
        hidden = hidden / (1 + torch.exp(-1.702 * hidden))
        x = x + hidden @ state[f"{at}.mlp.c_proj.weight"].T + state[f"{at}.mlp.c_proj.bias"]
    return x


def image_embedding(state: dict[str, Tensor], pixels: Tensor) -> Tensor:
    grid = [pixels[:, :, i : i + 16, j : j + 16] for i in (0, 16) for j in (0, 16)]
    kernel = state["visual.conv1.weight"].flatten(1)
    tokens = torch.stack([patch.flatten(1) @ kernel.T for patch in grid], 1)
    first = state["visual.class_embedding"].expand(len(pixels), 1, -1)
    x = torch.cat([first, tokens], 1) + state["visual.positional_embedding"]
    x = transformer(norm(x, state, "visual.ln_pre"), state, "visual", 2, causal=False)
    return norm(x[:, 0], state, "visual.ln_post") @ state["visual.proj"]


def text_embedding(state: dict[str, Tensor], tokens: Tensor) -> Tensor:
    x = state["encode_text.token_embedding.weight"][tokens] + state["encode_text.positional_embedding"]
    x = norm(transformer(x, state, "encode_text", 3, causal=True), state, "encode_text.ln_final")
    ends = [row.index(49408) for row in tokens.tolist()]
    pooled = torch.stack([x[i, end] for i, end in enumerate(ends)])
    return pooled @ state["encode_text.text_projection.weight"].T + state["encode_text.text_projection.bias"]


TEXTS = [
    "a cat",
    "two dogs at the <|mask|> lake",
    "the end of a text that is longer than the context has room for it",
]


def test_embeddings_are_those_of_the_forward_pass_written_out(state: dict[str, Tensor], file: str) -> None:
    model = load(file)
    pixels, tokens = torch.randn(3, 3, 32, 32), model.tokenizer(TEXTS)
    with torch.no_grad():
        torch.testing.assert_close(
            model.encode_image(pixels), image_embedding(state, pixels), atol=2e-5, rtol=1e-4
        )
        torch.testing.assert_close(
            model.encode_text(tokens), text_embedding(state, tokens), atol=2e-5, rtol=1e-4
        )
    assert model.logit_scale.item() == state["logit_scale"].item()
    assert model.places.sites.widths["text.embed"] == model.places.sites.widths["image.embed"] == 24


@torch.no_grad()
def test_the_bias_of_the_text_projection_is_at_text_embed(state: dict[str, Tensor], file: str) -> None:
    model = load(file)
    tokens = model.tokenizer(TEXTS)
    plain = model.encode_text(tokens)
    out, cache = model.run_with_cache(texts=tokens, sites=["text.pooled", "text.embed"])
    assert torch.equal(out.text, plain) and torch.equal(cache["text.embed"], plain)
    weight, bias = (state[f"encode_text.text_projection.{part}"] for part in ("weight", "bias"))
    assert torch.equal(F.linear(cache["text.pooled"], weight, bias), plain)
    with model.hooks(fwd_hooks=[("text.embed", lambda x, **_: torch.zeros_like(x))]):
        assert not model.encode_text(tokens).any()
    with model.hooks(fwd_hooks=[("text.pooled", lambda x, **_: torch.zeros_like(x))]):
        assert torch.equal(model.encode_text(tokens), bias.expand(len(TEXTS), -1))
    assert torch.equal(model.encode_text(tokens), plain)


def test_direct_contributions_add_up_with_the_bias(file: str) -> None:
    model = load(file)
    tokens = model.tokenizer(TEXTS)
    parts = decompose_batch(model, tokens, tower="text")
    torch.testing.assert_close(parts.total, model.encode_text(tokens).detach(), atol=2e-5, rtol=1e-4)


def test_every_missing_surplus_and_misshapen_key_is_named(
    state: dict[str, Tensor], file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Shapes] = []
    monkeypatch.setattr(declip, "check_layout", lambda found, expected, what: seen.append(expected))
    load(file)
    expected = seen[0]
    assert expected == LAYOUT
    check_layout(state, expected, "file")
    for key in LAYOUT:
        with pytest.raises(DamagedFile, match=f"missing: {key};"):
            check_layout({k: v for k, v in state.items() if k != key}, expected, "file")
        longer = torch.zeros(*state[key].shape, 2)
        with pytest.raises(DamagedFile, match=f"misshapen: {key} "):
            check_layout(state | {key: longer}, expected, "file")
        with pytest.raises(DamagedFile, match=f"surplus: {key}_;"):
            check_layout(state | {f"{key}_": longer}, expected, "file")


FAULTS = {
    "missing: encode_text.text_projection.bias;": lambda s: s.pop("encode_text.text_projection.bias"),
    "missing: projector.bn2.running_var;": lambda s: s.pop("projector.bn2.running_var"),
    "surplus: encode_text.attn_mask;": lambda s: s.update({"encode_text.attn_mask": torch.zeros(2)}),
    r"misshapen: visual.proj \[32, 23\] instead of \[32, 24\];": lambda s: s.update(
        {"visual.proj": torch.zeros(32, 23)}
    ),
    r"misshapen: encode_text.token_embedding.weight \[49408, 48\]": lambda s: s.update(
        {"encode_text.token_embedding.weight": torch.zeros(49408, 48)}
    ),
    "surplus: visual.transformer.resblocks.2.ln_1.weight;": lambda s: s.update(
        {"visual.transformer.resblocks.2.ln_1.weight": torch.zeros(32)}
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", FAULTS)
def test_load_refuses_a_file_of_another_layout(
    message: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    damaged = dict(state)
    FAULTS[message](damaged)
    with pytest.raises(DamagedFile, match=message):
        load(write(damaged, tmp_path / "damaged.pth.tar"))


def test_files_without_training_heads_or_wrapping_and_in_half_precision_load(
    state: dict[str, Tensor], file: str, tmp_path: Path
) -> None:
    towers = {k: v.half() for k, v in state.items() if k.startswith(("visual", "encode_text", "logit"))}
    torch.save({"model": towers}, tmp_path / "towers.pth.tar")
    model = load(str(tmp_path / "towers.pth.tar"))
    rounded, tokens = {k: v.float() for k, v in towers.items()}, model.tokenizer(TEXTS)
    with torch.no_grad():
        torch.testing.assert_close(
            model.encode_text(tokens), text_embedding(rounded, tokens), atol=2e-5, rtol=1e-4
        )
    half = load(file, dtype=torch.bfloat16)
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}


def test_what_does_not_go_with_a_checkpoint_of_declip_is_refused(file: str, tmp_path: Path) -> None:
    with pytest.raises(MMHooksError, match="expected QuickGELU, with which DeCLIP was trained"):
        load(file, activation="gelu")
    with pytest.raises(MMHooksError, match="expected a ViT with open_clip's own text tower"):
        mm.load("RN50", pretrained=file)
    with pytest.raises(DamagedFile, match=r"misshapen: .* and \d+ more"):
        mm.load("ViT-S-32", pretrained=file)
    torch.save({"model": {"visual.proj": torch.zeros(2)}}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    assert is_declip(file)
    assert (
        not is_declip(tmp_path / "other.pt")
        and not is_declip(tmp_path / "text.pt")
        and not is_declip(tmp_path)
    )


@pytest.mark.parametrize("embed", [3072, 512])
def test_the_released_sizes_are_those_of_vit_b_32(
    embed: int, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    monkeypatch.undo()  # the real configuration
    monkeypatch.setattr(
        factory, "_set_model_device_and_precision", lambda *_: None
    )  # would leave the meta device
    shapes = layout((12, 768, 32), 49, (12, 512, 77), embed)
    with torch.device("meta"):
        full = {"model": {f"module.{key}": torch.empty(shape) for key, shape in shapes.items()}}
    monkeypatch.setattr(declip.torch, "load", lambda *_, **__: full)
    with torch.device("meta"):
        model = load(file, device="meta")
    assert model.model.text_projection.out_features == embed and model.model.visual.proj.shape == (768, embed)
    assert type(model.model.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"


def test_the_tokenizer_has_openais_pieces_and_its_own_special_tokens() -> None:
    own, theirs = DeclipTokenizer(), open_clip.SimpleTokenizer()
    assert len(own.encoder) == own.vocab_size == VOCABULARY
    assert [own.encoder[t] for t in ("<|mask|>", "<|startoftext|>", "<|endoftext|>")] == [49406, 49407, 49408]
    texts = ["A photo of a cat's  3 dogs &amp; naïve café", "", "x" * 500, "<|mask|>", *TEXTS]
    shifted = theirs(texts)
    assert torch.equal(own(texts), torch.where(shifted >= 49406, shifted + 1, shifted))
    assert own.encode("a <|endoftext|> b") == [*own.encode("a"), 49408, *own.encode("b")]
    assert own.decode(own.encode("a red panda")) == "a red panda "


def test_the_preprocessing_is_imagenets(file: str) -> None:
    pixels = torch.randint(0, 256, (3, 300, 400), dtype=torch.uint8)
    image = TF.to_pil_image(pixels)
    small = image.resize((341, 256), Image.Resampling.BILINEAR).crop((58, 16, 282, 240))
    scaled = TF.pil_to_tensor(small).double() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (scaled - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(declip_preprocess(224)(image).double(), expected, atol=1e-5, rtol=0)
    assert load(file).preprocess(image.convert("RGBA")).shape == (3, 32, 32)


def test_the_modality_study_takes_the_official_file_beside_any_model(file: str) -> None:
    model = load_for_study(Options(model="mini", declip=file, device="cpu"))
    assert isinstance(model.tokenizer, DeclipTokenizer)
    assert model.encode_text(model.tokenizer(["a cat"])).shape == (1, 24)

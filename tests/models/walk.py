"""What a hooked family is walked through, and the table of it in docs/sites.md: ``python -m tests.models.walk`` writes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from timm.models.eva import Eva
from torch import Tensor, nn

import mmhooks as mm

from . import tiny_transformers as tiny
from .tiny_vlms import REAL, VLMS

PAGE = Path(__file__).parents[2] / "docs" / "sites.md"
BEGIN, END = "<!-- walk: begin -->", "<!-- walk: end -->"
BLOCK = ("resid_pre", "ln_1", "attn.q", "attn.k", "attn.v", "attn.pattern", "attn.z", "attn.head_out", "attn_out",
         "resid_mid", "ln_2", "mlp.pre", "mlp.post", "mlp_out", "resid_post")  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One family: how to build a small random instance, and what its towers read.

    ``real``: the same at the widths of a published checkpoint, for the meta device.
    """

    build: Callable[[], Any]
    inputs: Callable[[Any], dict[str, Tensor]]
    real: Callable[[], Any] | None = None


def dual_inputs(model: Any) -> dict[str, Tensor]:
    pixels, tokens = tiny.inputs(model)
    return {"image": pixels, "text": tokens}


def sounds(model: Any) -> dict[str, Tensor]:
    return {"audio": torch.randn(2, 1, 64, 8, generator=torch.manual_seed(1)), "text": tiny.inputs(model)[1]}


def videos(model: Any) -> dict[str, Tensor]:
    pixels, tokens = tiny.inputs(model, batch=4)
    return {"video": pixels.view(2, 2, 3, 32, 32), "text": tokens[:2]}


def clips(model: Any) -> dict[str, Tensor]:
    return {"video": torch.randn(2, 4, 3, 32, 32, generator=torch.manual_seed(1))}


def pixels_of(side: int) -> Callable[[Any], dict[str, Tensor]]:
    def inputs(model: Any) -> dict[str, Tensor]:
        torch.manual_seed(1)
        return {"image": torch.randn(2, 3, side, side)}

    return inputs


def network(name: str, **options: Any) -> Callable[[], Any]:
    def build() -> Any:
        torch.manual_seed(0)
        model: Any = timm.create_model(name, **options).eval()
        if hasattr(model, "blocks"):
            model.blocks = model.blocks[:3]
        return model

    return build


def eva() -> Any:
    torch.manual_seed(0)
    return Eva(
        32, 16, num_classes=3, embed_dim=64, depth=3, num_heads=4, mlp_ratio=2.0, use_rot_pos_emb=True
    ).eval()


def torchvision_vit() -> Any:
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 8, 3, 4, 32, 48, num_classes=7).eval()
    nn.init.normal_(model.heads.head.weight)  # zero at the start
    return model


def real(kind: str, config: str) -> Callable[[], Any]:
    """A model of transformers at its default widths, on the meta device, cut to two layers a tower."""

    def build() -> Any:
        made = tiny.config(config)
        for part in (made, getattr(made, "text_config", None), getattr(made, "vision_config", None)):
            if hasattr(part, "num_hidden_layers"):
                part.num_hidden_layers = 2
        with torch.device("meta"):
            return tiny.build(kind, made)

    return build


CASES: dict[str, Case] = {
    "CLIP": Case(tiny.clip, dual_inputs, real("CLIPModel", "CLIPConfig")),
    "SigLIP": Case(tiny.siglip, dual_inputs, real("SiglipModel", "SiglipConfig")),
    "SigLIP 2": Case(tiny.siglip2, dual_inputs),
    "ChineseCLIP": Case(tiny.chinese_clip, dual_inputs),
    "AltCLIP": Case(tiny.altclip, dual_inputs),
    "ALIGN": Case(tiny.align, dual_inputs),
    "CLAP": Case(tiny.clap, sounds),
    "X-CLIP": Case(tiny.xclip, videos),
    "CLIP, eager": Case(lambda: tiny.clip("eager"), dual_inputs),
    "SigLIP, eager": Case(lambda: tiny.siglip("eager"), dual_inputs),
    "ChineseCLIP, eager": Case(lambda: tiny.chinese_clip("eager"), dual_inputs),
    "ViT": Case(tiny.vit, pixels_of(32), real("ViTModel", "ViTConfig")),
    "ViT with a classifier": Case(tiny.vit_classifier, pixels_of(32)),
    "DINOv2": Case(tiny.dinov2, pixels_of(32), real("Dinov2Model", "Dinov2Config")),
    "DINOv2, SwiGLU": Case(tiny.dinov2_swiglu, pixels_of(32)),
    "DINOv3": Case(tiny.dinov3, pixels_of(32), real("DINOv3ViTModel", "DINOv3ViTConfig")),
    "DINOv3, gated": Case(tiny.dinov3_gated, pixels_of(32)),
    "CLIP's image tower": Case(tiny.clip_vision, pixels_of(32), real("CLIPVisionModel", "CLIPVisionConfig")),
    "CLIP's image tower, projected": Case(tiny.clip_vision_projected, pixels_of(32)),
    "SigLIP's image tower": Case(tiny.siglip_vision, pixels_of(32), real("SiglipVisionModel", "SiglipVisionConfig")),
    "V-JEPA 2": Case(tiny.vjepa2, clips, real("VJEPA2Model", "VJEPA2Config")),
    "V-JEPA 2 with a classifier": Case(lambda: tiny.vjepa2("VJEPA2ForVideoClassification"), clips),
    "VideoMAE": Case(tiny.videomae, clips, real("VideoMAEModel", "VideoMAEConfig")),
    "VideoMAE, eager": Case(lambda: tiny.videomae(attention="eager", use_mean_pooling=False), clips),
    "VideoMAE with a classifier": Case(lambda: tiny.videomae("VideoMAEForVideoClassification"), clips),
    "timm ViT": Case(network("test_vit"), pixels_of(160)),
    "timm ViT, no classifier": Case(network("test_vit3", num_classes=0), pixels_of(160)),
    "timm EVA, DINOv3": Case(eva, pixels_of(32)),
    "timm ConvNeXt": Case(network("test_convnext"), pixels_of(64)),
    "torchvision ViT": Case(torchvision_vit, pixels_of(32)),
}  # fmt: skip


@cache
def hooked(name: str) -> Any:
    return mm.hook(CASES[name].build(), name=name)


@cache
def hooked_vlm(name: str) -> Any:
    return mm.hook(VLMS[name](), name=name)


def run(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Embeddings by tower."""
    return {tower: getattr(model, f"encode_{tower}")(given) for tower, given in inputs.items()}


def block_leaves(model: Any, tower: str) -> list[str]:
    prefix = f"{tower}.blocks.1."
    return [site.removeprefix(prefix) for site in model.sites() if site.startswith(prefix)]


# -- the table ---------------------------------------------------------------------------------------------------


def table() -> str:
    """One row a family and tower, in Markdown."""
    rows = [
        "| Family | Class | Tower | Sites of a block | Other sites | Checked |",
        "|:--|:--|:--|:--|:--|:--|",
    ]
    for name, case in CASES.items():
        model = hooked(name)
        checked = "walked" + (", meta" if case.real else "")
        for tower in case.inputs(model.model):
            others = [
                s.partition(".")[2] for s in model.sites() if s.startswith(tower) and ".blocks." not in s
            ]
            cells = [
                name,
                f"`{type(model).__name__}`",
                tower,
                _said(block_leaves(model, tower)),
                _code(others),
                checked,
            ]
            rows.append("| " + " | ".join(cells) + " |")
    for name in VLMS:
        model = hooked_vlm(name)
        for tower in ("image", "projector", "lm"):
            own = [s for s in model.sites() if s.startswith(f"{tower}.")]
            leaves = block_leaves(model, tower)
            others = _code([s.partition(".")[2] for s in own if ".blocks." not in s])
            checked = "walked" + (", meta" if name in REAL else "")
            cells = [name, "`HookedVLM`", tower, _said(leaves) if leaves else "none", others, checked]
            rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _said(leaves: list[str]) -> str:
    missing, more = (
        [leaf for leaf in BLOCK if leaf not in leaves],
        [leaf for leaf in leaves if leaf not in BLOCK],
    )
    if len(missing) > 5:
        return _code(leaves)
    said = "all" + (f" but {_code(missing)}" if missing else "")
    return said + (f", and {_code(more)}" if more else "")


def _code(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def written() -> str:
    """The table as the page has it."""
    return PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip()


def modules_changed(model: nn.Module) -> Iterator[str]:
    """What a context would leave: hooks on modules, and classes that shadow attributes."""
    for path, module in model.named_modules():
        if any(
            hasattr(hook, "mmhooks_tap")
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        ):
            yield f"hook at {path}"
        if "_mmhooks_shadows" in vars(type(module)):
            yield f"shadow at {path}"


if __name__ == "__main__":
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}", encoding="utf-8")

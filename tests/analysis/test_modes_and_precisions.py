"""Analyses that run a model over data use evaluation mode and restore the modes afterwards, in every precision."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file

import mmhooks as mm
from mmhooks.analysis.attacks.align import align, features_of
from mmhooks.analysis.attacks.victims import ZeroShotVictim
from mmhooks.analysis.attribution.saliency import METHODS
from mmhooks.analysis.decomposition.dataset import decompositions, head_outputs
from mmhooks.analysis.decomposition.neuron_effects import second_order_effects
from mmhooks.analysis.decomposition.second_order import second_order
from mmhooks.analysis.interventions.ablation_accuracy import ablate
from mmhooks.analysis.interventions.masked_classification import Masked, prompt_labels
from mmhooks.analysis.interventions.mean_ablation import (
    Parts,
    ablate_direct,
    ablation_sites,
    head_importance,
    site_means,
)
from mmhooks.models.clip.embed_texts import embed_texts

VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}
TEXT = {"context_length": 16, "vocab_size": 600, "width": 32, "heads": 2, "layers": 2}
WIDTH = 24
SCALE = (torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.5))


def tokenize(texts: list[str]) -> torch.Tensor:
    rows = [[590, *(ord(c) % 500 for c in text[:14]), 599] for text in texts]
    return torch.tensor([row + [0] * (16 - len(row)) for row in rows])


def pixels(size: int, n: int = 4) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def _ablate(model: Any, size: int) -> Any:
    parts = mm.decompose(model, pixels(size))
    means = mm.decompose(model, [pixels(size)[:2]])
    what = Parts("some", heads=((1, 0),), mlps=(2,))
    live = site_means(model, pixels(size), ablation_sites(what))
    found = ablate(
        model, pixels(size), torch.tensor([0, 1, 2, 0]), torch.eye(3, WIDTH), means, [what], live_means=live
    )
    return [
        ablate_direct(parts, means, what),
        head_importance(parts, torch.ones(WIDTH), means),
        found.direct[0].value,
    ]


def _second_order(model: Any, size: int) -> Any:
    found = second_order(model, pixels(size), layer=0, neurons=[0, 3], top=2)
    return [
        found.size,
        found.explained,
        second_order_effects(model, pixels(size), layer=0, neurons=[1]).vectors(),
    ]


def _victim(model: Any, size: int) -> Any:
    victim = ZeroShotVictim(model, ("a cat", "dogs", "rain"))
    return [victim.texts, victim.answer(pixels(size), ["?"] * 4)]


def _align(model: Any, size: int) -> Any:
    partners = pixels(size).flip(0)
    return align(
        model, pixels(size), partners, site="image.embed", steps=2, scale=SCALE, progress=False
    ).history


def _zero_masked(model: Any, size: int) -> Any:
    head = mm.TopKSAE(WIDTH, 64, 64, seed=0)  # no choice that rounding could turn
    masked = Masked(head, embed_texts(model, ["a", "b c"])).vectors(mm.FeatureSet([1], 64))
    return [masked, prompt_labels(model, [["a"], ["b"]])]


# Every public function of the analysis that runs a CLIP; where VIT is False, of any image tower.
EVERY: dict[str, tuple[bool, Callable[[Any, int], Any]]] = {
    "decompose": (True, lambda m, s: mm.decompose(m, pixels(s), tokens=True, against=torch.eye(2, WIDTH)).scores),
    "decompose texts": (True, lambda m, s: mm.decompose(m, texts=tokenize(["a", "b c"])).heads),
    "means": (True, lambda m, s: mm.decompose(m, [pixels(s)], normalize=True).heads),
    "decompositions": (True, lambda m, s: [p.mlps for p in decompositions(m, pixels(s), batch_size=2)]),
    "head_outputs": (True, lambda m, s: head_outputs(m, pixels(s))),
    "site_means": (False, lambda m, s: list(site_means(m, pixels(s), ["image.embed"]).values())),
    "ablations": (True, _ablate),
    "second order": (True, _second_order),
    **{
        name: (True, lambda m, s, method=method: method(m, pixels(s), torch.eye(4, WIDTH)))
        for name, method in METHODS.items()
    },
    "embed_texts": (False, lambda m, s: embed_texts(m, ["a dog", "b"])),
    "zero-masked": (False, _zero_masked),
    "features_of": (False, lambda m, s: features_of(m, pixels(s), site="image.embed", scale=SCALE).detach()),
    "align": (False, _align),
    "zero-shot victim": (False, _victim),
}  # fmt: skip


class Preprocess:
    """Says how it normalizes, as torchvision's does."""

    def __init__(self) -> None:
        from torchvision.transforms import Normalize

        self.transforms = [Normalize([0.5] * 3, [0.5] * 3)]

    def __call__(self, image: Any) -> torch.Tensor:
        return self.transforms[0](image)


def build(kind: str) -> tuple[mm.HookedCLIP, int]:
    """A small model with random weights, as ``open_clip.create_model`` leaves it: in training mode."""
    torch.manual_seed(0)
    vision = {"patch dropout": {**VISION, "patch_dropout": 0.5}, "batch norm": RESNET}[kind]
    model = open_clip.CLIP(WIDTH, dict(vision), dict(TEXT))  # type: ignore[arg-type]
    model.train()
    if kind == "patch dropout":
        model.visual.transformer.resblocks[1].eval()  # a mode of its own
    return mm.HookedCLIP(model, tokenize, Preprocess()), int(vision["image_size"])


def flat(value: Any) -> list[Any]:
    return [x for v in value for x in flat(v)] if isinstance(value, (list, tuple)) else [value]


@pytest.mark.parametrize("kind", ["patch dropout", "batch norm"])
@pytest.mark.parametrize("name", EVERY)
def test_evaluation_mode_and_each_module_s_own_mode_after_it(name, kind):
    needs_vit, call = EVERY[name]
    if needs_vit and kind == "batch norm":
        pytest.skip("a ResNet has no such parts")
    model, size = build(kind)
    modes = {n: m.training for n, m in model.model.named_modules()}
    state = {n: v.clone() for n, v in model.model.state_dict().items()}
    one, two = flat(call(model, size)), flat(call(model, size))
    assert {n: m.training for n, m in model.model.named_modules()} == modes
    assert all(torch.equal(v, state[n]) for n, v in model.model.state_dict().items())
    model.model.eval()
    for a, b, c in zip(one, two, flat(call(model, size)), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c) if isinstance(a, torch.Tensor) else a == b == c


def test_modes_come_back_after_an_error():
    model, size = build("patch dropout")
    with pytest.raises(mm.errors.MMHooksError):
        site_means(model, pixels(size), ["image.nowhere"])
    with pytest.raises(mm.errors.MMHooksError):
        mm.decompose(model, pixels(size), against=torch.ones(2, 7))
    assert model.model.training and not model.model.visual.transformer.resblocks[1].training


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small model by its name for ``mm.load``: open_clip's own loader knows every precision."""
    torch.manual_seed(0)
    folder, shape = (
        tmp_path_factory.mktemp("tiny"),
        {"embed_dim": WIDTH, "vision_cfg": VISION, "text_cfg": TEXT},
    )
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": shape, "preprocess_cfg": {}}))
    save_file(
        open_clip.CLIP(WIDTH, dict(VISION), dict(TEXT)).state_dict(), folder / "open_clip_model.safetensors"
    )
    return f"local-dir:{folder}"


PRECISIONS = ("fp16", "bf16", "pure_fp16", "pure_bf16", "amp", "amp_bf16", "amp_bfloat16")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", EVERY)
def test_every_precision_of_open_clip(source, name, precision):
    """Runs, and is near what full precision gives."""
    _, call = EVERY[name]
    size = int(VISION["image_size"])

    def run(precision: str) -> list[Any]:
        model = mm.load(source, precision=precision)
        model.tokenizer, model.preprocess = tokenize, Preprocess()
        return flat(call(model, size))

    for plain, got in zip(run("fp32"), run(precision), strict=True):
        if not isinstance(got, torch.Tensor):
            continue
        assert torch.isfinite(got).all()
        wanted = plain.float().flatten()
        if wanted.norm() > 0:
            assert torch.cosine_similarity(got.float().flatten(), wanted, dim=0) > 0.97

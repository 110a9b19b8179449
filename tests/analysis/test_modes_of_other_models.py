"""Modes and precisions of what is no hooked CLIP: diffusion pipelines, a LLaVA, embedders."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import mmhooks as mm
from mmhooks.analysis.attacks.victims import LlavaVictim
from mmhooks.data.pair_set import Pairs, Row
from mmhooks.models import embedders
from mmhooks.models.diffusion.conditioner import conditioner_sides
from mmhooks.models.vlm.llava import load_llava

sys.path.insert(0, str(Path(__file__).parents[1]))
from models.pipelines import build
from models.test_llava import llava_1_5

PRECISIONS = (torch.float16, torch.bfloat16, torch.float64)


class Pictures:
    def open(self, picture: Any) -> Image.Image:
        return Image.new("RGB", (32, 32), (40 * int(picture), 90, 200 - 30 * int(picture)))


def pairs() -> Pairs:
    rows = [Row(f"p{i}", text, i) for i, text in enumerate(["red panda", "blue kite", "a house"])]
    return Pairs(rows, Pictures(), name="grey", content="grey")


def set_dropout(model: torch.nn.Module) -> None:
    """Attention drops half of its weights in training mode, and one module has a mode of its own."""
    for module in model.modules():
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.5)
    for module in model.modules():
        module.training = True
    next(m for m in model.modules() if not list(m.children())).training = False


def modes(model: torch.nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def sides(
    dtype: torch.dtype, mode: Any, *, training: bool
) -> tuple[list[torch.Tensor], list[bool], list[bool]]:
    sd = mm.HookedDiffusion(build("sd1").to(dtype))
    if training:
        set_dropout(sd.model)
    before = modes(sd.model)
    matrix = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)) if mode == "projected" else None
    found = conditioner_sides(sd, pairs(), mode=mode, projection=matrix, tokens="mean", progress=False)
    return list(found), before, modes(sd.model)


@pytest.mark.parametrize("mode", ["projected", "naive"])
def test_a_conditioner_is_read_in_evaluation_mode(mode):
    wanted, *_ = sides(torch.float32, mode, training=False)
    got, before, after = sides(torch.float32, mode, training=True)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert before == after and True in after and False in after


@pytest.mark.parametrize("mode", ["projected", "naive"])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_a_conditioner_in_every_precision(mode, dtype):
    wanted, *_ = sides(torch.float32, mode, training=False)
    got, *_ = sides(dtype, mode, training=False)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == torch.float32 and a.shape == b.shape
        assert float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)) > 0.99


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    llava_1_5(folder)
    return folder


REQUESTS = ["what is this ?", "is it ?"]


def test_a_llava_answers_in_evaluation_mode(checkpoint):
    pictures = torch.rand(2, 3, 40, 50, generator=torch.Generator().manual_seed(0))
    victim = LlavaVictim(load_llava(checkpoint), 6)
    wanted = victim.answer(pictures, REQUESTS)
    set_dropout(victim.llava.model)
    before = modes(victim.llava.model)
    assert victim.answer(pictures, REQUESTS) == wanted and modes(victim.llava.model) == before
    with pytest.raises(mm.errors.ShapeMismatch):
        victim.answer(pictures, REQUESTS[:1])
    assert modes(victim.llava.model) == before


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_a_llava_in_every_precision(checkpoint, dtype):
    """Answers of random weights may differ in half precision; those of float64 may not."""
    pictures = torch.rand(2, 3, 40, 50, generator=torch.Generator().manual_seed(0))
    got = LlavaVictim(load_llava(checkpoint, dtype=dtype), 6).answer(pictures.to(dtype), REQUESTS)
    assert len(got) == 2
    if dtype == torch.float64:
        assert got == LlavaVictim(load_llava(checkpoint), 6).answer(pictures, REQUESTS)


def images(n: int = 3) -> list[Image.Image]:
    return [Pictures().open(i) for i in range(n)]


def timm_embedder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: Any) -> Any:
    """An embedder of a small model of timm with random weights, changed before it is used."""
    import timm

    def load(name: str) -> torch.nn.Module:
        torch.manual_seed(0)
        model = timm.create_model("test_efficientnet", pretrained=False, num_classes=0, drop_rate=0.5).eval()
        change(model)
        return model

    monkeypatch.setattr(embedders, "_timm_model", load)
    return embedders.image_embedder("test", size=64, cache_dir=tmp_path, progress=False)


def test_an_image_embedder_runs_in_evaluation_mode(monkeypatch, tmp_path):
    """Batch statistics of training mode would make one image's vector depend on the others, and change the model."""
    wanted = timm_embedder(monkeypatch, tmp_path / "a", lambda m: None)(images())
    seen: list[torch.nn.Module] = []
    embed = timm_embedder(monkeypatch, tmp_path / "b", lambda m: (m.train(), seen.append(m)))
    assert torch.equal(embed(images()), wanted)
    assert all(modes(seen[0]))


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_an_image_embedder_in_every_precision(monkeypatch, tmp_path, dtype):
    wanted = timm_embedder(monkeypatch, tmp_path / "a", lambda m: None)(images())
    got = timm_embedder(monkeypatch, tmp_path / "b", lambda m: m.to(dtype))(images())
    assert got.dtype == torch.float32
    assert float((got * wanted).sum(1).min()) > 0.99


def test_a_text_embedder_in_every_mode_and_precision(monkeypatch, tmp_path):
    from sentence_transformers import SentenceTransformer

    wanted = embedders.text_embedder(cache_dir=tmp_path / "a", progress=False)(["a cat", "two dogs bark"])
    build_model = SentenceTransformer.__init__
    for change in (lambda m: m.train(), lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.double()):

        def init(self: Any, *args: Any, change: Any = change, **kwargs: Any) -> None:
            build_model(self, *args, **kwargs)
            change(self)

        with monkeypatch.context() as patch:
            patch.setattr(SentenceTransformer, "__init__", init)
            fresh = tmp_path / str(id(change))
            got = embedders.text_embedder(cache_dir=fresh, progress=False)(["a cat", "two dogs bark"])
        assert got.dtype == torch.float32 and float((got * wanted).sum(1).min()) > 0.999

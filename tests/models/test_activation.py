"""The activation of open_clip's models: each tag's own, and a file of OpenAI's never gets GELU silently."""

from __future__ import annotations

import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip import factory
from open_clip.transformer import QuickGELU
from torch import nn
from torchvision.transforms import InterpolationMode, Normalize, Resize

import mmhooks as mm
from mmhooks.errors import MMHooksError
from mmhooks.models.clip.activation import is_openai, quick_gelu_of

TAGS = open_clip.list_pretrained()


def configured(name: str) -> bool:
    return bool((open_clip.get_model_config(name) or {}).get("quick_gelu", False))


def test_every_tag_gets_what_the_table_says_and_else_what_its_configuration_says() -> None:
    replaced = []
    for name, tag in TAGS:
        table = open_clip.get_pretrained_cfg(name, tag)
        expected = bool(table["quick_gelu"]) if "quick_gelu" in table else configured(name)
        assert quick_gelu_of(name, tag) is expected, (name, tag)
        replaced += [(name, tag)] if expected is not configured(name) else []
    assert ("ViT-B-32", "openai") in replaced and len(replaced) >= 20 and len(TAGS) > 150
    # Trained by its configuration, which has QuickGELU; its tag does not say so.
    assert quick_gelu_of("roberta-ViT-B-32", "laion2b_s12b_b32k")


def mismatched() -> list[tuple[str, str]]:
    return [(n, t) for n, t in TAGS if quick_gelu_of(n, t) is not configured(n)]


@pytest.fixture
def without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip builds its real architectures on the meta device, two blocks deep, and loads nothing."""
    real = factory.get_model_config

    def shallow(name: str) -> dict[str, Any]:
        config = real(name)
        for part in ("vision_cfg", "text_cfg"):
            if isinstance(config[part].get("layers"), int):
                config[part]["layers"] = 2
        return config

    monkeypatch.setattr(factory, "get_model_config", shallow)
    monkeypatch.setattr(factory, "download_pretrained", lambda *_, **__: "weights")
    monkeypatch.setattr(factory, "load_checkpoint", lambda *_, **__: {})
    monkeypatch.setattr(factory, "_set_model_device_and_precision", lambda *_: None)
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda name: None)  # some are on the Hub


@pytest.mark.parametrize(("name", "tag"), [*mismatched(), ("ViT-B-32", "laion2b_s34b_b79k")])
def test_a_tags_activation_mean_std_and_interpolation_are_the_loaded_models(
    name: str, tag: str, without_weights: None
) -> None:
    if "hf_model_name" in open_clip.get_model_config(name)["text_cfg"]:
        pytest.skip("its text tower's configuration is on the Hub")
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("error")
        model = mm.load(name, pretrained=tag, device="meta")
    table = open_clip.get_pretrained_cfg(name, tag)
    found = {type(m) for m in model.model.modules() if isinstance(m, (QuickGELU, nn.GELU))}
    assert found == {QuickGELU if table.get("quick_gelu", False) else nn.GELU}
    steps = {type(step): step for step in model.preprocess.transforms}
    assert (steps[Normalize].mean, steps[Normalize].std) == (table["mean"], table["std"])
    assert steps[Resize].interpolation == InterpolationMode(table["interpolation"])


@pytest.fixture(scope="module")
def openai_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model's weights as OpenAI ships them: traced with its code, and as a state dict of mixed precision."""
    folder = tmp_path_factory.mktemp("openai")
    state = {
        "visual.conv1.weight": torch.zeros(4, 3, 2, 2, dtype=torch.float16),
        "ln_final.weight": torch.ones(4),
    }
    torch.save(state, folder / "mixed.pt")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, folder / "wrapped.pt")
    torch.save({k: v.float() for k, v in state.items()}, folder / "fp32.pt")
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), folder / "archive.pt")
    return {path.stem: path for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["mixed", "wrapped", "archive"])
def test_a_file_of_openai_is_recognised_and_not_given_gelu(openai_files: dict[str, Path], kind: str) -> None:
    path = str(openai_files[kind])
    assert is_openai(path) and not is_openai(openai_files["fp32"])
    with pytest.raises(MMHooksError, match='load it as "ViT-B-32-quickgelu"'):
        mm.load("ViT-B-32", pretrained=path)
    assert quick_gelu_of("ViT-B-32-quickgelu", path) and quick_gelu_of("ViT-B-32", path, "quick_gelu")
    assert not quick_gelu_of("ViT-B-32", path, "gelu")
    assert not quick_gelu_of("ViT-B-32", str(openai_files["fp32"]))


def test_an_activation_other_than_the_tags_is_refused() -> None:
    with pytest.raises(MMHooksError, match="expected that of the tag 'openai', quick_gelu, got 'gelu'"):
        quick_gelu_of("ViT-B-32", "openai", "gelu")


def test_openais_own_archive_loads_weight_for_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = factory.get_model_config

    def tiny(name: str) -> dict[str, Any]:
        vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
        text = {"context_length": 8, "vocab_size": 64, "width": 64, "heads": 1, "layers": 1}
        return real(name) | {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}

    monkeypatch.setattr(factory, "get_model_config", tiny)
    torch.manual_seed(0)
    source = mm.load("ViT-B-32", activation="quick_gelu")
    pixels = torch.rand(2, 3, 32, 32)
    archive = tmp_path / "ViT-B-32.pt"
    shipped = deepcopy(source.model)
    shipped.attn_mask = None  # only a trace would keep it among the weights
    for number in ("input_resolution", "context_length", "vocab_size"):
        vars(shipped).pop(number, None)
        shipped.register_buffer(number, torch.tensor(8))
    torch.jit.save(torch.jit.trace_module(shipped, {"encode_image": pixels}), archive)
    torch.manual_seed(1)
    model = mm.load("ViT-B-32-quickgelu", pretrained=str(archive))
    assert torch.equal(model.encode_image(pixels), source.encode_image(pixels))

"""Checkpoints that bring code: none of it runs, nothing is asked at a prompt, and the error says what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mmhooks as mm

EVIL = "from pathlib import Path\nPath({mark!r}).write_text('ran')\nclass Evil: ...\nEvilConfig = EvilTokenizer = Evil\n"


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that only the checkpoint's code writes; a prompt answers yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "ran"


def a_checkpoint(folder: Path, mark: Path, **files: dict) -> Path:
    folder.mkdir()
    (folder / "evil.py").write_text(EVIL.format(mark=str(mark)))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


MAP = {"auto_map": {"AutoConfig": "evil.EvilConfig", "AutoTokenizer": ["evil.EvilTokenizer", None]}}


def test_a_llava_with_code_is_refused(tmp_path: Path, mark: Path) -> None:
    folder = a_checkpoint(tmp_path / "m", mark, config={"model_type": "evil", **MAP})
    with pytest.raises(mm.errors.MMHooksError, match="runs no code that comes with weights"):
        mm.load_llava(folder)
    assert not mark.exists()


@pytest.mark.parametrize("asked", [{}, {"trust_remote_code": True}])
def test_an_open_clip_checkpoint_with_code_is_refused(tmp_path: Path, mark: Path, asked: dict) -> None:
    """Its own configuration can ask for trust, and open_clip hands that on."""
    text = {"hf_tokenizer_name": str(tmp_path / "m"), "tokenizer_kwargs": asked, "width": 32, "heads": 2, "layers": 1,
            "context_length": 8, "vocab_size": 64}  # fmt: skip
    vision = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16}
    folder = a_checkpoint(
        tmp_path / "m", mark, tokenizer_config={"tokenizer_class": "EvilTokenizer", **MAP}, config={"model_type": "evil", **MAP},
        open_clip_config={"model_cfg": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}},
    )  # fmt: skip
    with pytest.raises(mm.errors.MMHooksError):
        mm.load(f"local-dir:{folder}")
    assert not mark.exists()


def test_an_embedder_with_code_is_refused(tmp_path: Path, mark: Path) -> None:
    from mmhooks.models.embedders import text_embedder

    folder = a_checkpoint(
        tmp_path / "m", mark, config={"model_type": "evil", **MAP},
        sentence_bert_config={"model_args": {"trust_remote_code": True}},
        modules=[{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}],
    )  # fmt: skip
    with pytest.raises(mm.errors.MMHooksError):
        text_embedder(str(folder), cache_dir=tmp_path / "cache", progress=False)(["a cat"])
    assert not mark.exists()


@pytest.mark.parametrize("options", [{"trust_remote_code": True}, {"custom_pipeline": "evil"}])
def test_options_that_bring_code_are_refused(tmp_path: Path, options: dict) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(mm.errors.MMHooksError, match="runs no code that comes with weights"):
        mm.load_diffusion(tmp_path, **options)
    with pytest.raises(mm.errors.MMHooksError, match="trust_remote_code|custom_pipeline"):
        mm.load_llava(tmp_path, **options)


def test_a_pipeline_with_code_is_refused(tmp_path: Path, mark: Path) -> None:
    folder = a_checkpoint(
        tmp_path / "m", mark, model_index={"_class_name": ["evil", "Evil"], "_diffusers_version": "0.30"}
    )
    with pytest.raises(mm.errors.MMHooksError):
        mm.load_diffusion(folder)
    assert not mark.exists()


def test_transformers_is_left_as_it_was(tmp_path: Path) -> None:
    from transformers import dynamic_module_utils as dynamic

    from mmhooks.models.foreign_code import no_foreign_code

    before = dynamic.TIME_OUT_REMOTE_CODE, dynamic.get_class_in_module
    with pytest.raises(KeyError), no_foreign_code("x"):
        raise KeyError
    assert (dynamic.TIME_OUT_REMOTE_CODE, dynamic.get_class_in_module) == before

"""Every loader that hands options on: what the user asks for is what is got, or an error says why not."""

from __future__ import annotations

import pytest
import torch

import mmhooks as mm
from mmhooks.errors import MMHooksError
from mmhooks.models.vlm.llava import load_llava

from .pipelines import build
from .test_llava import llava_1_5

HALF, BRAIN, WHOLE = torch.float16, torch.bfloat16, torch.float32
ASKED = {  # what is asked, and the type of weights that comes of it
    "nothing": ({}, WHOLE),
    "dtype": ({"dtype": HALF}, HALF),
    "torch_dtype": ({"torch_dtype": HALF}, HALF),
    "both alike": ({"dtype": BRAIN, "torch_dtype": BRAIN}, BRAIN),
    "by name": ({"dtype": "bfloat16"}, BRAIN),
    "older option by full name": ({"torch_dtype": "torch.float16"}, HALF),
    "dtype beside None": ({"dtype": HALF, "torch_dtype": None}, HALF),
}
REFUSED = {
    "two types": ({"dtype": WHOLE, "torch_dtype": HALF}, "name the same option"),
    "no type": ({"dtype": "half precision"}, "expected a torch type"),
    "a number": ({"torch_dtype": 16}, "expected a torch type"),
    "integers": ({"dtype": torch.int8}, "floating-point"),
    "device and device_map": ({"device": "cpu", "device_map": "auto"}, "device= or device_map="),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    llava, pipe = tmp_path_factory.mktemp("llava"), tmp_path_factory.mktemp("pipe")
    llava_1_5(llava)
    build("sd1").save_pretrained(pipe)
    return {"llava": llava, "diffusion": pipe}


def _weights(kind: str, source, options) -> torch.dtype:
    if kind == "llava":
        types = {p.dtype for p in load_llava(source, **options).model.parameters()}
    else:
        sd = mm.load_diffusion(source, **options)
        types = {
            p.dtype
            for module in (sd.pipe.unet, sd.pipe.text_encoder, sd.pipe.vae)
            for p in module.parameters()
        }
    (found,) = types
    return found


@pytest.mark.parametrize("kind", ["llava", "diffusion"])
@pytest.mark.parametrize("embedded", [True, False])
@pytest.mark.parametrize("name", ASKED)
def test_weights_have_the_type_that_was_asked_for(folders, kind, embedded, name):
    options, wanted = ASKED[name]
    assert _weights(kind, "mini" if embedded else folders[kind], options) == wanted


@pytest.mark.parametrize("kind", ["llava", "diffusion"])
@pytest.mark.parametrize("embedded", [True, False])
@pytest.mark.parametrize("name", REFUSED)
def test_what_contradicts_itself_is_refused(folders, kind, embedded, name):
    options, said = REFUSED[name]
    with pytest.raises(MMHooksError, match=said):
        _weights(kind, "mini" if embedded else folders[kind], options)


def test_the_checkpoint_s_own_type(folders, tmp_path):
    load_llava(folders["llava"], dtype=BRAIN).model.save_pretrained(tmp_path)
    load_llava(folders["llava"]).processor.save_pretrained(tmp_path)
    assert _weights("llava", tmp_path, {"dtype": "auto"}) == BRAIN
    assert _weights("llava", tmp_path, {}) == BRAIN
    for source in ("mini", folders["diffusion"]):
        with pytest.raises(MMHooksError, match="one torch dtype"):
            mm.load_diffusion(source, dtype="auto")
    with pytest.raises(MMHooksError, match="one torch dtype"):
        load_llava(dtype="auto")


def test_a_type_for_each_part_of_a_pipeline(folders):
    sd = mm.load_diffusion(folders["diffusion"], dtype={"unet": HALF, "default": WHOLE})
    assert (sd.pipe.unet.dtype, sd.pipe.text_encoder.dtype) == (HALF, WHOLE)


def test_a_device_map_is_left_alone(folders, monkeypatch):
    """Nothing moves a model whose parts accelerate has placed."""
    moved = []
    move = torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *a, **k: moved.append(a) or move(self, *a, **k))
    load_llava(folders["llava"], device_map={"": "cpu"})
    assert moved == []
    assert load_llava(folders["llava"], device="meta").model.device.type == "meta" and ("meta",) in [
        tuple(map(str, a)) for a in moved
    ]


def test_options_of_the_model_do_not_reach_the_processor(folders):
    model = load_llava(folders["llava"], attn_implementation="eager").model
    assert model.config._attn_implementation == "eager"


def test_a_head_takes_no_option_without_a_word(tmp_path):
    path = mm.load_head("mini/sae").save(tmp_path / "own")
    for source in ("mini/sae", path):
        with pytest.raises(MMHooksError, match="expected no k"):
            mm.load_head(source, k=3)
        with pytest.raises(MMHooksError, match="no revisions"):
            mm.load_head(source, revision="main")
        with pytest.raises(MMHooksError, match="unknown option torch_dtype; known are name"):
            mm.load_head(source, torch_dtype=HALF)
        assert mm.load_head(source, name="mine").name == "mine"

"""``mm.hook`` and ``mm.load``: every model gets the class that fits it, a stranger a plain one, a misfit one sentence."""

from __future__ import annotations

import sys

import pytest
import timm
import torch
from torch import nn
from torchvision.transforms.functional import to_pil_image

import mmhooks as mm
from mmhooks.errors import MissingWeights, MMHooksError, MMHooksWarning
from mmhooks.models.clip.model import HookedCLIP

from . import tiny_transformers as tiny
from . import tiny_vlms as vlms
from .families import FAMILIES


class Odd(nn.Module):
    """Of no family."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x, scale=1.0):
        return self.second(self.first(x)) * scale


# -- the class that fits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["open_clip", *tiny.DUAL])
def test_dual_encoders(kind):
    model = (FAMILIES["CLIP"]() if kind == "open_clip" else tiny.DUAL[kind]()).eval()
    hooked = mm.hook(model, name="mine")
    assert type(hooked) is HookedCLIP and hooked.model is model and hooked.name == "mine"


def test_a_pipeline_and_a_network_of_timm():
    assert isinstance(mm.hook(mm.load_diffusion("mini").pipe), mm.HookedDiffusion)
    assert isinstance(mm.hook(timm.create_model("test_vit")), mm.HookedVision)


def test_a_model_that_writes():
    model = vlms.internvl()
    hooked = mm.hook(model, name="mine")
    assert type(hooked) is mm.HookedVLM and hooked.model is model and hooked.name == "mine"


def test_a_stranger_is_hooked_plainly_and_told_so():
    with pytest.warns(MMHooksWarning, match="Odd is of no known family.*mm.HookedModel"):
        model = mm.hook(Odd())
    assert type(model) is mm.HookedModel
    x = torch.randn(2, 3)
    out, cache = model.run_with_cache(x, scale=2.0)
    assert set(cache) == {"first", "second"} and torch.equal(out, model.model(x, scale=2.0))
    with model.hooks(mm.Zero(at="first")):
        assert torch.equal(model.forward(x), model.model.second.bias.expand(2, 2))
    assert torch.equal(mm.HookedModel(model.model).forward(x), model.forward(x))  # no warning


def test_a_plain_model_takes_heads():
    model = mm.HookedModel(Odd())
    model.attach(mm.TopKSAE(4, 8, 2), at="first", name="sae")
    _, cache = model.run_with_cache(torch.randn(2, 3), sites="first.sae.latents")
    assert cache["first.sae.latents"].shape == (2, 8)


# -- misfits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        (lambda: "ViT-B-32", {}, r"expected a torch.nn.Module or a diffusers pipeline, got str"),
        (Odd, {"processor": object()}, r"Odd is of no known family, so processor would go unused"),
        (tiny.clip, {"processor": object()}, r"expected one with tokenizer and preprocess, got object.*AutoProcessor"),
        (tiny.clip, {"colour": 1}, r"CLIPModel: .*unexpected keyword argument 'colour'; leave it out"),
    ],
)  # fmt: skip
def test_misfits_are_refused_in_one_sentence(model, options, says):
    with pytest.raises(MMHooksError, match=says):
        mm.hook(model(), **options)


def test_processors_of_other_models_are_refused():
    model = tiny.clip()
    with pytest.raises(
        MMHooksError, match=r"images of 32x32 pixels.*got CLIPImageProcessor that makes 48 x 48"
    ):
        mm.hook(model, tiny.processor(side=48))
    model.config.text_config.vocab_size = 40
    with pytest.raises(MMHooksError, match=r"at most 40 tokens.*with 60: it is another model's"):
        mm.hook(model, tiny.processor())
    with pytest.raises(MMHooksError, match="CLIP is open_clip's and takes no processor"):
        mm.hook(FAMILIES["CLIP"](), tiny.processor())


@pytest.mark.parametrize("wrapper", [mm.HookedCLIP, mm.HookedVision])
def test_classes_name_the_entrance(wrapper):
    with pytest.raises(MMHooksError, match=r"got Odd; mm.hook\(model\) picks the class that fits"):
        wrapper(Odd())
    with pytest.raises(MMHooksError, match=r"expected a torch.nn.Module, got int"):
        mm.HookedModel(3)  # type: ignore[arg-type]


# -- registered families -----------------------------------------------------------------------------------------

PACKAGE = """
import mmhooks as mm

class OddFamily:
    def matches(self, model):
        return type(model).__name__ == "Odd"

    def hook(self, model, **options):
        hooked = mm.HookedModel(model, name=options.get("name", ""))
        hooked.options = options
        return hooked

ODD, NOTHING = OddFamily(), object()
"""


def install(folder, monkeypatch, target):
    """A package as pip would leave it: a module, and the metadata that names its entry point."""
    (folder / "odd_families.py").write_text(PACKAGE)
    info = folder / "odd_families-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: odd-families\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[mmhooks.families]\nodd = odd_families:{target}\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "odd_families", raising=False)


def test_a_package_registers_a_family(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "ODD")
    hooked = mm.hook(Odd(), processor="anything", name="odd")
    assert hooked.options == {"processor": "anything", "name": "odd"} and hooked.sites("first") == ["first"]
    assert type(mm.hook(tiny.clip())) is HookedCLIP  # the others are still found


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("NOTHING", "expected an object with matches.*got object"),
        ("MISSING", "cannot be loaded.*AttributeError"),
    ],
)
def test_a_broken_family_is_named(tmp_path, monkeypatch, target, says):
    install(tmp_path, monkeypatch, target)
    with pytest.raises(MMHooksError, match=f"family 'odd' of the package 'odd-families'.*{says}"):
        mm.hook(Odd())


# -- by name -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "build"), [("clip", tiny.clip), ("siglip", tiny.siglip)])
def test_a_folder_of_transformers(kind, build, tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    tiny.processor(kind).save_pretrained(tmp_path)
    loaded = mm.load(f"hf:{tmp_path}")
    assert type(loaded) is HookedCLIP and not loaded.model.training and loaded.name == f"hf:{tmp_path}"
    image = to_pil_image(torch.rand(3, 40, 50))
    pixels, tokens = loaded.preprocess(image)[None], loaded.tokenizer(["abc", "a longer text than fits"])
    assert pixels.shape == (1, 3, 32, 32) and tokens.shape == (2, 12)
    with torch.no_grad():
        want = model.get_image_features(pixels).pooler_output
        # Weights in a file are aligned in memory otherwise, which changes the last bits.
        torch.testing.assert_close(loaded.encode_image(pixels), want, atol=1e-5, rtol=0)
        assert torch.equal(mm.embed_texts(loaded, ["abc"], unit=False), loaded.encode_text(tokens[:1]))
    assert mm.load(f"hf:{tmp_path}", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_vision_model_and_a_checkpoint_of_timm(tmp_path):
    from transformers import CLIPImageProcessor

    tiny.clip().vision_model.save_pretrained(tmp_path / "vision")
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(tmp_path / "vision")
    model = mm.load(f"hf:{tmp_path / 'vision'}")
    image = to_pil_image(torch.rand(3, 40, 50))
    assert type(model) is mm.HookedVision and model.preprocess(image).shape == (3, 32, 32)

    made = timm.create_model("test_vit")
    torch.save(made.state_dict(), tmp_path / "vit.pth")
    loaded = mm.load("timm:test_vit", pretrained=str(tmp_path / "vit.pth"))
    assert type(loaded) is mm.HookedVision
    pixels = loaded.preprocess(image)[None]
    with torch.no_grad():
        features = made.eval().forward_head(made.forward_features(pixels), pre_logits=True)
        torch.testing.assert_close(loaded.encode_image(pixels), features, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "options", "error", "says"),
    [
        ("hf:nowhere/at-all", {}, MissingWeights, "hf:nowhere/at-all: expected a folder that save_pretrained wrote"),
        ("timm:vit_smal_patch16_224", {}, MMHooksError, "no model .*close matches: vit_small_patch16_224"),
        ("timm:test_vit", {"pretrained": "nowhere.pth"}, MissingWeights, "timm:test_vit: its weights could not be loaded"),
        ("hf:any", {"precision": "amp"}, MMHooksError, "takes no precision= or activation="),
    ],
)  # fmt: skip
def test_names_that_lead_nowhere(name, options, error, says):
    with pytest.raises(error, match=says):
        mm.load(name, **options)


def test_random_weights_of_a_checkpoints_architecture(tmp_path):
    """As for open_clip's names, pretrained="" loads no weights."""
    saved = mm.load(tiny.checkpoint(tmp_path))
    made = [mm.load(f"hf:{tmp_path}", pretrained="") for _ in range(2)]
    shapes = [{k: v.shape for k, v in m.model.state_dict().items()} for m in (saved, *made)]
    assert shapes[0] == shapes[1] and not made[0].model.training and made[0].tokenizer is not None
    key = "vision_model.encoder.layers.0.mlp.fc1.weight"
    first, second, third = (m.model.state_dict()[key] for m in (saved, *made))
    assert not torch.equal(first, second) and not torch.equal(second, third)
    assert mm.load(f"hf:{tmp_path}", pretrained="", dtype=torch.bfloat16).dtype == torch.bfloat16
    assert type(mm.load("timm:test_vit", pretrained="")) is mm.HookedVision  # no network
    with pytest.raises(MissingWeights, match="hf:nowhere/at-all: expected a folder"):
        mm.load("hf:nowhere/at-all", pretrained="")

"""Where a study's models run: what this machine lacks is said in one sentence, and every study has both options."""

from __future__ import annotations

from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mmhooks as mm
from mmhooks.cli.study import STUDIES
from mmhooks.errors import MMHooksError
from mmhooks.models.embedders import text_embedder
from mmhooks.studies.adversarial.samples import gradient_attack
from mmhooks.studies.common.encode import encode
from mmhooks.studies.common.placement import AUTO, Placement, on_device_of
from mmhooks.studies.modality.masking import LiveTowers, model_inputs
from mmhooks.studies.modality.measures import StudyModel


@dataclass(frozen=True)
class Wanted:
    device: str = AUTO
    dtype: str = "float32"


@pytest.mark.parametrize("study", STUDIES)
def test_every_study_takes_a_device_and_a_type(study: str) -> None:
    options = import_module(f"mmhooks.studies.{study}.options").Options
    defaults = {field.name: field.default for field in fields(options)}
    assert (defaults["device"], defaults["dtype"]) == (AUTO, "float32")


def test_the_device_is_cuda_where_there_is_one_and_cpu_elsewhere() -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert Placement.of(Wanted()).device == torch.device(expected)
    assert Placement.of(Wanted(device="cpu", dtype="torch.bfloat16")) == Placement(
        torch.device("cpu"), torch.bfloat16
    )


@pytest.mark.parametrize("device", ["nowhere", "cpu:x", "hpu", "cuda:99"])
def test_a_device_that_this_machine_lacks_is_said_in_one_sentence(device: str) -> None:
    with pytest.raises(
        MMHooksError, match=f"--device: expected a device of this machine, got '{device}'"
    ) as told:
        Placement.of(Wanted(device=device))
    assert "\n" not in str(told.value) and str(told.value).endswith("give --device cpu, or leave it out")


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("int8", "--dtype: expected float32, bfloat16 or float16, got 'int8'"),
        ("half-precision", "--dtype: expected float32, bfloat16 or float16, got 'half-precision'"),
        ("float8_e4m3fn", "--dtype: expected a type that cpu computes in, got 'float8_e4m3fn'"),
    ],
)
def test_a_type_that_cannot_be_computed_in_is_said_in_one_sentence(dtype: str, message: str) -> None:
    with pytest.raises(MMHooksError, match=message):
        Placement.of(Wanted(device="cpu", dtype=dtype))


def test_a_head_to_be_attached_is_copied_to_where_the_model_is() -> None:
    head = mm.TopKSAE(4, 8, k=2)
    assert on_device_of(SimpleNamespace(device=torch.device("cpu")), head) is head
    moved = on_device_of(SimpleNamespace(device=torch.device("meta")), head)
    assert next(moved.parameters()).device.type == "meta"
    assert next(head.parameters()).device.type == "cpu"


def test_embeddings_of_half_precision_are_cached_apart(tmp_path: Path) -> None:
    texts = ["a dog", "a red car"]
    exact, half = (
        text_embedder(dtype=dtype, cache_dir=tmp_path, progress=False)(texts)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert half.dtype == torch.float32 and len(list(tmp_path.rglob("*.safetensors"))) == 2
    assert 0 < float((exact - half).abs().max()) < 0.02


@pytest.fixture(scope="module")
def half() -> mm.HookedCLIP:
    return mm.load("mini", dtype=torch.bfloat16)


@pytest.mark.parametrize("kind", ["sae", "ncl"])
def test_live_masking_of_a_half_precision_model_is_near_that_of_fp32(
    half: mm.HookedCLIP, kind: str, tmp_path: Path
) -> None:
    pairs, found = mm.data.pairs("mini", limit=8), []
    pixels, tokens = inputs = model_inputs(half, pairs, range(8))
    active = []
    for model in (mm.load("mini"), half):
        encoded = encode(model, "mini", pairs, tmp_path, batch=8, progress=False)
        head = mm.load_head(f"mini/{kind}")
        group = mm.FeatureSet(range(200), head.n_features, head=head.id)
        with LiveTowers(StudyModel("m", encoded, head), inputs) as live:
            found.append(live.masked(group))
        with torch.no_grad():
            embeds = (model.encode_image(model.to_input(pixels)), model.encode_text(tokens))
            active.append([head.encode(head.prepare(x.float())) > 0 for x in embeds])
    for side, (exact, rounded) in enumerate(zip(*found, strict=True)):
        assert rounded.dtype == torch.float32 and rounded.device.type == "cpu"
        near = torch.cosine_similarity(exact, rounded, dim=1)
        # Rounding can take another of two features that are nearly as strong into the K of a row, depending on the
        # processor; what is left of that row is then another vector.
        same = (
            (active[0][side] == active[1][side]).all(1) if kind == "sae" else torch.ones(8, dtype=torch.bool)
        )
        assert near[same].min() > 0.99 and same.sum() >= 6


def test_the_gradient_attack_moves_images_of_a_half_precision_model(half: mm.HookedCLIP) -> None:
    thing = torch.ones(4, 64, 64)
    images = torch.stack([torch.full((3, 64, 64), 0.5)] * 2)
    made = gradient_attack(half, images, [thing, thing], epsilon=0.1, steps=2, progress=False)
    assert made.images.dtype == torch.float32
    assert 0 < float(made.linf.max()) <= 0.1 + 1e-6

"""The estimate of a study: its stages count what the study's own code does, and follow its options."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

import mmhooks as mm
from mmhooks.errors import MMHooksError
from mmhooks.models.cost import Cost
from mmhooks.studies.adversarial.study import Options as AdversarialOptions
from mmhooks.studies.common.placement import Placement
from mmhooks.studies.estimate.plans import adversarial_counts, generated_images, stages_of
from mmhooks.studies.estimate.stages import MACHINES, Assumption, Machine, Stage
from mmhooks.studies.generation import interpolation
from mmhooks.studies.generation.study import Options as GenerationOptions
from mmhooks.studies.modality.study import Options as ModalityOptions

MACHINE = Machine("a machine", {"float32": 1e12}, 1e10, 1e10)


def by_name(stages: list[Stage]) -> dict[str, Stage]:
    found = {s.name: s for s in stages}
    assert len(found) == len(stages)
    return found


# -- arithmetic --------------------------------------------------------------------------------------------


def test_the_longest_of_three_limits_counts() -> None:
    """100 items in 13 batches of 8, 5 calls each: a batch has 8e9 FLOP, 2e7 bytes of weights, and 1,000 operators."""
    stage = Stage("a", "items", 100, Cost(8 * 10**9, 0, 2 * 10**7, operators=1_000), 8, 5)
    assert stage.calls == 65 and stage.flops == 100 * 5 * 1e9
    assumed = Assumption(0.5, 0.25, 0.5, launch=1e-5)
    assert stage.times(MACHINE, assumed) == {
        "arithmetic": 1.0,
        "memory": 65 * 2e7 / 1e10 / 0.5,
        "launches": 0.65,
    }
    assert (stage.seconds(MACHINE, assumed), stage.bound(MACHINE, assumed)) == (1.0, "arithmetic")
    reading = replace(stage, cost=replace(stage.cost, inputs=10**9))
    assert (
        reading.bound(MACHINE, assumed) == "memory" and reading.seconds(MACHINE, assumed) == 65 * 1.02e9 / 5e9
    )
    slow = replace(assumed, launch=1e-3)
    assert (stage.seconds(MACHINE, slow), stage.bound(MACHINE, slow)) == (65.0, "launches")
    assert stage.seconds(MACHINE, assumed.at(0.25)) == 2.0
    with pytest.raises(MMHooksError, match="a machine: expected one of float32, got 'bfloat16'"):
        replace(stage, dtype="bfloat16").seconds(MACHINE, assumed)


@pytest.mark.parametrize("shares", [(0.35, 0.4, 0.5), (0.35, 0.2, 0.3), (0.35, 0.0, 0.5), (0.9, 0.2, 1.1)])
def test_a_range_that_does_not_hold_the_assumption_is_refused(shares: tuple[float, float, float]) -> None:
    with pytest.raises(MMHooksError, match="0 < --low <= --utilisation <= --high <= 1"):
        Assumption(*shares)


def test_an_a100_multiplies_half_precision_sixteen_times_as_fast() -> None:
    for machine in MACHINES.values():
        assert machine.peak("bfloat16") == machine.peak("float16") == 16 * machine.peak("float32")


# -- counts of the studies' own code -----------------------------------------------------------------------


def test_the_generation_study_draws_as_many_images_as_planned() -> None:
    drawn: list[int] = []

    class Generator(interpolation.ImageGenerator):
        def __init__(self) -> None:
            self.sd = None

        def __call__(self, prompts: list[str], seed: int, edit: Any = None) -> torch.Tensor:
            drawn.append(len(prompts))
            return torch.rand(len(prompts), 3, 32, 32)

    groups = {g: mm.FeatureSet([i], 40) for i, g in enumerate(interpolation.GROUPS)}
    sets = tuple(mm.FeatureSet([10 + i], 40) for i in range(8))
    setting = interpolation.Setting("one", "text.cond", groups, sets, 30, {}, "", torch.zeros(2, 40), None)
    case = interpolation.Case("a cat", "a dog", Image.new("RGB", (32, 32)))
    options = GenerationOptions(pairs=2, seeds=2, random_sets=8, strength=[0.0, 0.4, 0.9], quiet=True)
    place = Placement(torch.device("cpu"), torch.float32)
    settings = [setting, replace(setting, name="two")]
    interpolation.interpolate(Generator(), settings, [case] * 2, (0.4, 0.9), options, place)
    assert sum(drawn) == generated_images(options, 1) == generated_images(options, 3) // 3


# -- options -----------------------------------------------------------------------------------------------


def test_stages_follow_the_options() -> None:
    small = ModalityOptions(limit=100, declip="", evaluate=50)
    stages = by_name(stages_of("modality", small))
    assert set(stages) == {
        "encoding, images",
        "encoding, texts",
        "encoding, images, masked",
        "encoding, texts, masked",
    }
    assert stages["encoding, images"].count == 100 and stages["encoding, images"].disk == 100 * 256 * 4
    assert stages["encoding, images, masked"].count == 3 * 5 * 50
    twice = by_name(stages_of("modality", replace(small, limit=200)))
    assert twice["encoding, texts"].flops == 2 * stages["encoding, texts"].flops
    both = by_name(stages_of("modality", replace(small, declip="auto", sae="train", seeds=3)))
    assert {"encoding, images, DeCLIP", "training, SAE", "training, NCL"} < set(both)
    assert both["training, SAE"].count == 3 * 200 * 100
    other = by_name(stages_of("modality", replace(small, declip="auto", image_embedder="vit-b16-in21k")))
    assert set(other) == {*both, "similarity of images"} - {"training, SAE", "training, NCL"}
    full = {s.name for s in stages_of("modality", ModalityOptions(model="ViT-B-32", limit=8))}
    assert "training, SAE" in full and "encoding, images, DeCLIP" not in full  # auto: no file, no DeCLIP
    half = by_name(stages_of("modality", replace(small, dtype="bfloat16")))["encoding, images"]
    assert half.cost.weights == stages["encoding, images"].cost.weights // 2 and half.dtype == "bfloat16"
    assert half.flops == stages["encoding, images"].flops


def test_a_longer_answer_takes_longer_and_reads_a_larger_cache() -> None:
    options = AdversarialOptions(model="mini", victim=["clip", "mini-llava"], answer_tokens=8, limit=20)
    short = by_name(stages_of("adversarial", options))
    long = by_name(stages_of("adversarial", replace(options, answer_tokens=64)))
    assert short["mini-llava: reading"] == long["mini-llava: reading"]
    one, other = short["mini-llava: 8 tokens"], long["mini-llava: 64 tokens"]
    assert other.calls == 8 * one.calls and other.flops > 8 * one.flops
    grown = (
        2 * 4 * 256 * 4 * 32 * (64 - 8) // 2
    )  # keys and values, layers, width, fp32, batch, half of what is new
    assert other.cost.inputs - one.cost.inputs == grown
    assert "gradient attack" in short and short["moving pixels"].count == adversarial_counts(options)[0]


def test_guidance_doubles_a_denoising_step() -> None:
    options = GenerationOptions(limit=50, pairs=2, steps=7, batch=2)
    guided = by_name(stages_of("generation", options))["denoising"]
    alone = by_name(stages_of("generation", replace(options, guidance=1.0)))["denoising"]
    assert guided.cost.flops == 2 * alone.cost.flops and guided.repeat == 7
    assert guided.count == generated_images(options, 2)


def test_what_is_not_known_is_asked_for() -> None:
    with pytest.raises(MMHooksError, match="--data photos/: expected a known number of pairs; give --pairs"):
        stages_of("modality", ModalityOptions(data="photos/"))
    assert stages_of("modality", ModalityOptions(data="photos/"), pairs=9)[0].count == 9
    assert stages_of("modality", ModalityOptions(data="cc3m", limit=8))[0].count == 8
    with pytest.raises(MMHooksError, match="expected one of modality, adversarial, generation, got 'gender'"):
        stages_of("gender", None)
    with pytest.raises(MMHooksError, match="--dtype: expected float32, bfloat16 or float16, got 'int'"):
        stages_of("modality", ModalityOptions(limit=8, dtype="int"))

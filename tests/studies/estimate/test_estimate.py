"""The estimate of a study: its stages count what the study's own code does, and follow its options."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import mmhooks as mm
from mmhooks.analysis.attacks.pixels import Optimised
from mmhooks.errors import MissingWeights, MMHooksError
from mmhooks.models.cost import Cost
from mmhooks.studies.adversarial import defence
from mmhooks.studies.adversarial.defence import Defence
from mmhooks.studies.adversarial.dictionaries import Dictionary
from mmhooks.studies.adversarial.evaluation import Evaluation, typographic
from mmhooks.studies.adversarial.samples import Samples
from mmhooks.studies.adversarial.study import Options as AdversarialOptions
from mmhooks.studies.common.placement import Placement
from mmhooks.studies.decomposition import study as decomposition
from mmhooks.studies.decomposition.options import Options as DecompositionOptions
from mmhooks.studies.estimate import calls, plans
from mmhooks.studies.estimate.plans import adversarial_counts, generated_images, stages_of
from mmhooks.studies.estimate.stages import MACHINES, Assumption, Machine, Stage
from mmhooks.studies.gender.options import Options as GenderOptions
from mmhooks.studies.generation import interpolation
from mmhooks.studies.generation.study import Options as GenerationOptions
from mmhooks.studies.modality.study import Options as ModalityOptions
from mmhooks.studies.segmentation import study as segmentation
from mmhooks.studies.segmentation.options import Options as SegmentationOptions
from mmhooks.studies.spurious import study as spurious
from mmhooks.studies.spurious.options import Options as SpuriousOptions

from ..tower_counts import counted_towers

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


@pytest.mark.parametrize("curve", [1, 3, 10])
def test_the_generation_study_draws_as_many_images_as_planned(curve: int) -> None:
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
    options = GenerationOptions(
        pairs=3, curve_pairs=curve, seeds=2, random_sets=8, strength=[0.0, 0.4, 0.9], quiet=True
    )
    place = Placement(torch.device("cpu"), torch.float32)
    settings = [setting, replace(setting, name="two")]
    interpolation.interpolate(Generator(), settings, [case] * 3, (0.4, 0.9), options, place)
    assert sum(drawn) == generated_images(options, 1) == generated_images(options, 3) // 3


@pytest.mark.parametrize("heads, repeats", [(["raw"], 1), (["raw", "train", "other"], 3)])
def test_the_adversarial_study_moves_and_asks_as_much_as_planned(
    monkeypatch: pytest.MonkeyPatch, heads: list[str], repeats: int
) -> None:
    """All that comes after calibration, which tries as many strengths as it needs: zero here."""
    moved, asked = [], []

    def counted(model: Any, images: torch.Tensor, *_: Any, keep: Any, **__: Any) -> Optimised:
        moved.append(n := len(images))
        zero = torch.zeros(n)
        return Optimised(images, torch.zeros(2, n), dict.fromkeys(keep, images), zero, zero, 5, 0.01, None)

    class Victim:
        name = "victim"

        def answer(self, images: torch.Tensor, requests: list[str]) -> list[str]:
            asked.append(len(images))
            return ["no"] * len(requests)

    class Judge:
        name = "judge"

        def successes(self, requests: list[str], *_: Any) -> list[bool]:
            return [False] * len(requests)

    monkeypatch.setattr(defence, "align", counted)
    n, typed, plain = 20, 10, 6
    options = AdversarialOptions(samples=n, cost=plain, head=heads, repeats=repeats, calibration=4, matched=1)
    pixels = torch.rand(n, 3, 4, 4)
    samples = Samples(
        trigger=("word",) * typed + ("image",) * (n - typed), target=("a dog",) * n, partner_name=("a cat",) * n,
        base_name=("a sun",) * n, base=pixels, attack=pixels, partner=pixels, budget={}, typed=tuple(range(typed)),
        controls={name: pixels[:typed] for name in ("nonsense", "noise", "blank")},
    )  # fmt: skip
    mds = mm.mds(torch.rand(60, 24), torch.rand(60, 24).sort(dim=1).values, kind="abs")
    first = Evaluation(Victim(), Judge(), samples)
    first.evaluate_baselines()
    for name in heads:
        one, evaluation = Dictionary(name, mds), first if name == heads[0] else first.again()
        strength = Defence(
            options.steps,
            options.lr,
            1,
            0,
            0.01 if evaluation is first else None,
            evaluation is first,
            progress=False,
        )
        untouched = tuple(range(typed, typed + plain)) if evaluation is first else ()
        strength_repeats = repeats if evaluation is first else 1
        defence.run_defences(strength, None, samples, one, [evaluation], untouched, repeats=strength_repeats)
    typographic(first, list(samples.typed))
    shown = {"before": plain, "partner": plain} | dict.fromkeys(defence.DEFENCES, plain)
    calibrated = plans.TRIED_RATES * options.calibration
    assert adversarial_counts(options) == (
        sum(moved) + calibrated,
        sum(asked) + sum(shown.values()) + 2 * options.calibration + calibrated,
    )


POOL = "# place\na beach\na forest\n# colour\nred\ngreen\nblue\n# animal\na dog\na cat\na bird\n"


@pytest.mark.parametrize(
    "study, options",
    [
        (decomposition, DecompositionOptions(limit=40, evaluate=6, layers=1, texts=2, each=1, batch=16)),
        (segmentation, SegmentationOptions(limit=6, batch=4, classes="predicted")),
        (spurious, SpuriousOptions(limit=12, splits=2, draws=3, direct_draws=20)),
    ],
    ids=["decomposition", "segmentation", "spurious"],
)
def test_the_towers_read_as_much_as_planned(study: Any, options: Any, tmp_path: Path) -> None:
    if hasattr(options, "pool"):
        (tmp_path / "pool.txt").write_text(POOL)
        options = replace(options, pool=str(tmp_path / "pool.txt"))
    with counted_towers() as rows:
        study.run(replace(options, out=tmp_path / "out", quiet=True))
    planned = stages_of(study.__name__.split(".")[-2], options)
    read = {unit: sum(s.count * s.repeat for s in planned if s.unit == unit) for unit in rows}
    assert rows["images"] == read["images"] > 0
    # Classes of one name are one text: the plan counts every image's.
    assert 0 < rows["texts"] <= read["texts"] <= rows["texts"] + options.limit


def test_direct_ablations_need_no_live_ones() -> None:
    live = by_name(stages_of("decomposition", DecompositionOptions(limit=40, evaluate=6)))
    direct = by_name(stages_of("decomposition", DecompositionOptions(limit=40, evaluate=6, live=False)))
    assert set(live) - set(direct) == {"ablations, live"} and live["contributions"] == direct["contributions"]


def test_a_classifier_labels_all_images_before_the_limit(tmp_path: Path) -> None:
    options = GenderOptions.of_paper(limit=100)
    stages = by_name(stages_of("gender", options))
    assert stages["labels by the classifier"].count == 13_443 and stages["encoding, images"].count == 100
    labels = stages["labels by the classifier"]
    width, layers, tokens = 1024, 24, 197
    blocks = layers * (24 * tokens * width**2 + 4 * tokens**2 * width)  # as in every transformer
    assert labels.cost.flops / labels.batch == pytest.approx(blocks, rel=0.01)
    with pytest.raises(MissingWeights, match="no configuration of the classifier 'mine'"):
        stages_of("gender", replace(options, classifier="mine"))


def test_contributions_cost_a_forward_pass_and_their_projections() -> None:
    """Decomposing ViT-B/32 adds the read-out of 144 attention heads and 12 MLPs at one token, and attention's values."""
    plain = calls.image_cost("ViT-B-32", 4, torch.float32)
    parts = calls.decomposition_cost("ViT-B-32", 4, torch.float32)
    # Per image and block: from each head's 64 dimensions to the stream, from there to the embedding, as the MLP's.
    least = 2 * 4 * 12 * (12 * (64 * 768 + 768 * 512) + 768 * 512)
    assert parts.weights == plain.weights
    assert least < parts.flops - plain.flops < 3 * least
    saliency = calls.saliency_costs("ViT-B-32", 4, torch.float32)
    assert saliency["gradient attention"].flops > 1.4 * saliency["raw attention"].flops > plain.flops
    assert calls.neuron_cost("ViT-B-32", 4, torch.float32, 11 - 2).flops > plain.flops


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
    options = AdversarialOptions(model="mini", victim=["clip", "mini-vlm"], answer_tokens=8, limit=20)
    short = by_name(stages_of("adversarial", options))
    long = by_name(stages_of("adversarial", replace(options, answer_tokens=64)))
    assert short["mini-vlm: reading"] == long["mini-vlm: reading"]
    one, other = short["mini-vlm: 8 tokens"], long["mini-vlm: 64 tokens"]
    assert other.calls == 8 * one.calls and other.flops > 8 * one.flops
    grown = (
        2 * 4 * 192 * 4 * 32 * (64 - 8) // 2
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
    with pytest.raises(MMHooksError, match="expected one of modality, adversarial, .*, got 'human'"):
        stages_of("human", None)
    with pytest.raises(MMHooksError, match="--dtype: expected float32, bfloat16 or float16, got 'int'"):
        stages_of("modality", ModalityOptions(limit=8, dtype="int"))


# -- command -----------------------------------------------------------------------------------------------


def test_the_command_prints_what_the_options_of_the_study_need() -> None:
    """In a process of its own: typer hands its commands another class of context than the one that it asks for."""
    words = [
        sys.executable,
        "-m",
        "mmhooks",
        "estimate",
        "--utilisation",
        "0.25",
        "modality",
        "--limit",
        "40",
    ]
    printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "encoding, images" in printed and "hours" in printed
    wrong = subprocess.run([*words[:4], "--machine", "tpu", "modality"], capture_output=True, text=True)
    assert wrong.returncode == 1 and "--machine: expected one of" in wrong.stderr

"""The stages of each study that a GPU is needed for, from the study's own options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mmhooks.errors import MMHooksError
from mmhooks.models.vlm.llava import MINI_TOKENS, NAME
from mmhooks.models.vlm.model import ANSWER_TOKENS
from mmhooks.studies.adversarial.dictionaries import TRAIN, names_of
from mmhooks.studies.adversarial.options import DEFAULT_VICTIMS
from mmhooks.studies.adversarial.options import Options as AdversarialOptions
from mmhooks.studies.common.heads import head_source
from mmhooks.studies.estimate import calls
from mmhooks.studies.estimate.parts import as_dtype, encoding, head_stages, number_of_pairs
from mmhooks.studies.estimate.stages import Stage
from mmhooks.studies.estimate.tower_plans import (
    decomposition_stages,
    gender_stages,
    segmentation_stages,
    spurious_stages,
)
from mmhooks.studies.generation.options import Options as GenerationOptions
from mmhooks.studies.modality.options import Options as ModalityOptions

GROUPS = 4  # of features that the adversarial study aligns on: ImgD, TextD, CrossD and random ones; all are a fifth set
TRIED = 5  # counts of random features that its calibration tries for each dictionary: 1, 2, 4, 8, 16
TRIED_RATES = 3  # learning rates that it tries for the paper's operating point
GRADIENT_SHARE, TYPED_SHARE = (
    0.2,
    0.5,
)  # of its samples: gradient attacks, those with a written word; --phrase: 0 and 1
ANSWER_BATCH = 32  # requests that a LLaVA is asked at a time
ALIGN_BATCH = 64  # pictures whose pixels are moved at a time
LIVE_BATCH = 256  # pairs under a mask at a time


def stages_of(study: str, options: Any, pairs: int | None = None) -> list[Stage]:
    """Returns the stages of a study that run models, with their calls.

    Args:
        pairs: of the data, where the study's options do not say how many.

    Raises:
        MMHooksError: a study that is not planned for, data of unknown size, or a model without a known architecture.
    """
    if study not in PLANS:
        raise MMHooksError(
            f"expected one of {', '.join(PLANS)}, got {study!r}, whose stages nobody has counted"
        )
    return [stage for stage in PLANS[study](options, pairs) if stage.count]


def modality_stages(o: ModalityOptions, pairs: int | None = None) -> list[Stage]:
    """Encoders of CLIP and DeCLIP over all pairs, heads of every seed, and both towers live under masks."""
    n = number_of_pairs(o.data, o.limit, pairs)
    width = calls.embed_dim(o.model)
    found = encoding(o.model, n, o.batch, o.dtype)
    towers = 1
    if o.declip and (o.model == "mini" or o.declip != "auto"):  # both of its towers have CLIP's shapes
        found += [replace(s, name=f"{s.name}, DeCLIP") for s in encoding(o.model, n, o.batch, o.dtype)]
        towers = 2
    if o.image_embedder == "vit-b16-in21k":
        cost = calls.vit_b16_cost(o.batch, as_dtype(o.dtype))
        found.append(Stage("similarity of images", "images", n, cost, o.batch, 1, o.dtype))
    # A study that lacks one kind of head trains both.
    named = all(head_source(given, kind, o.model) for given, kind in ((o.sae, "sae"), (o.ncl, "ncl")))
    found += head_stages(width, o.features, n, o.epochs, 0 if named else o.seeds, k=o.k)
    # CLIP, DeCLIP, CLIP+NCL and CLIP+SAE run under three masks, and before and after these on one batch.
    masked_pairs = min(o.evaluate, n)
    live = (towers + 2) * (3 * masked_pairs + 2 * min(masked_pairs, LIVE_BATCH))
    masked = encoding(o.model, live, LIVE_BATCH, o.dtype)
    return found + [replace(s, name=f"{s.name}, masked", disk=0) for s in masked]


def adversarial_stages(o: AdversarialOptions, pairs: int | None = None) -> list[Stage]:
    """The encoders, the head, pixels moved by the attack and by every defence, and the victims' answers."""
    n_pairs, dtype = (
        number_of_pairs(o.data, None if o.limit is None else 32 * o.limit, pairs),
        as_dtype(o.dtype),
    )
    found = encoding(o.model, n_pairs, 128, o.dtype)
    if TRAIN in names_of(o):
        found += head_stages(calls.embed_dim(o.model), o.features, n_pairs, o.epochs, 1, kinds=("sae",))
    moved, answers = adversarial_counts(o)
    attacked = round(gradient_share(o) * (samples_of(o) + calibration_of(o)))
    step = calls.pixel_gradient_cost(o.model, ALIGN_BATCH, dtype)
    found += [
        Stage("gradient attack", "images", attacked, step, ALIGN_BATCH, o.attack_steps, o.dtype),
        Stage("moving pixels", "images", moved, step, ALIGN_BATCH, o.steps, o.dtype),
    ]
    for victim in o.victim or DEFAULT_VICTIMS:
        if victim == "clip":
            cost = calls.image_cost(o.model, 128, dtype)
            found.append(Stage("answers of clip", "answers", answers, cost, 128, 1, o.dtype))
        elif not victim.startswith("endpoint:"):
            new = o.answer_tokens or (MINI_TOKENS if victim in ("mini", NAME) else ANSWER_TOKENS)
            own = None if o.victim_dtype == "auto" else as_dtype(o.victim_dtype)
            reading, writing, kind = calls.answer_costs(victim, ANSWER_BATCH, own, new)
            found += [
                Stage(f"{victim}: reading", "requests", answers, reading, ANSWER_BATCH, 1, kind),
                Stage(f"{victim}: {new} tokens", "answers", answers, writing, ANSWER_BATCH, new, kind),
            ]
    return found


def adversarial_counts(o: AdversarialOptions) -> tuple[int, int]:
    """Returns how many pictures the defences move, and how many answers each victim gives.

    The first dictionary has every draw, the paper's operating point and the controls; each of the others one draw.
    """
    n, some = samples_of(o), calibration_of(o)
    dictionaries = len(names_of(o))
    typed = n if o.phrase else round(TYPED_SHARE * n)
    untouched = min(
        o.cost, round((1 - gradient_share(o)) * n)
    )  # a gradient attack has no other picture as partner
    tried = (0 if o.matched else TRIED * dictionaries) + TRIED_RATES
    other_draws = GROUPS * n * (o.repeats - 1 + dictionaries - 1)
    paper_point = GROUPS * n
    recorded = len({max(1, o.steps // 4), max(1, o.steps // 2), o.steps} - {o.steps})
    moved = tried * some + (GROUPS + 1) * (n + typed + untouched) + other_draws + paper_point
    baselines, controls = 2 * n + typed, 2 * typed
    first = (GROUPS + 1) * (n + typed + recorded * n)
    answers = (2 + tried) * some + baselines + first + other_draws + paper_point + controls + 7 * untouched
    return moved, answers


def gradient_share(o: AdversarialOptions) -> float:
    return 0.0 if o.phrase else GRADIENT_SHARE


def samples_of(o: AdversarialOptions) -> int:
    return o.limit or o.samples


def calibration_of(o: AdversarialOptions) -> int:
    return min(o.calibration, samples_of(o))


def generation_stages(o: GenerationOptions, pairs: int | None = None) -> list[Stage]:
    """Both sides of the conditioner over all pairs, an SAE a mode, and every image of every space, group and strength."""
    n, dtype = number_of_pairs(o.data, o.limit, pairs), as_dtype(o.dtype)
    text = calls.condition_cost(o.pipeline, o.batch, dtype)
    image = calls.image_cost(o.model, o.batch, dtype)
    width = calls.condition_width(o.pipeline, dtype)
    modes = len(o.mode) if o.mode else 2
    steps = o.steps
    drawn = generated_images(o, modes)
    denoise = calls.denoising_cost(o.pipeline, o.batch, dtype, guided=o.guidance > 1)
    return [
        Stage("encoding, images", "images", modes * n, image, o.batch, 1, o.dtype),
        Stage("encoding, prompts", "texts", modes * n + drawn, text, o.batch, 1, o.dtype),
        *head_stages(width, o.features or 4 * width, n, o.epochs, modes, kinds=("sae",), k=o.k),
        Stage("denoising", "images", drawn, denoise, o.batch, steps, o.dtype),
        Stage("decoding latents", "images", drawn, calls.decoding_cost(o.pipeline, o.batch, dtype), o.batch, 1, o.dtype),
    ]  # fmt: skip


def generated_images(o: GenerationOptions, modes: int) -> int:
    """Returns the images of all modes: two spaces (dimensions and SAE), four groups at every strength, the other random
    sets at the last; the unedited images, and the two of the judge."""
    strengths = len([s for s in o.strength if s > 0]) if o.strength else 5
    n, spaces = o.pairs, 2 + o.joint
    some = min(o.curve_pairs, n)  # prompts at the strengths below the largest
    edited = spaces * (4 * ((strengths - 1) * some + n) + (o.random_sets - 1) * n)
    return modes * (edited * o.seeds + (o.seeds + 2) * n)


PLANS: dict[str, Callable[[Any, int | None], list[Stage]]] = {
    "modality": modality_stages,
    "adversarial": adversarial_stages,
    "generation": generation_stages,
    "gender": gender_stages,
    "decomposition": decomposition_stages,
    "segmentation": segmentation_stages,
    "spurious": spurious_stages,
}

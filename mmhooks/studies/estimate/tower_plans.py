"""The stages of the studies that read CLIP's towers alone: gender, decomposition, segmentation and spurious cues.

What only opened data would tell (how many samples have a label, how many classes there are) counts at its largest.
"""

from __future__ import annotations

from dataclasses import replace

from mmhooks.analysis.interventions.mean_ablation import paper_parts
from mmhooks.data.sources.text_pools import text_pool
from mmhooks.models.clip.zero_shot import imagenet_names, imagenet_templates
from mmhooks.studies.common.heads import head_sources
from mmhooks.studies.decomposition.options import Options as DecompositionOptions
from mmhooks.studies.estimate import calls
from mmhooks.studies.estimate.parts import PAIRS, as_dtype, encoding, head_stages, number_of_pairs
from mmhooks.studies.estimate.stages import Stage
from mmhooks.studies.gender.drawing_styles import is_corpus
from mmhooks.studies.gender.implicit import implicit_texts
from mmhooks.studies.gender.options import Options as GenderOptions
from mmhooks.studies.gender.samples import label_words
from mmhooks.studies.segmentation.options import Options as SegmentationOptions
from mmhooks.studies.spurious.options import Options as SpuriousOptions
from mmhooks.studies.spurious.samples import DRAWN, LAND, WATER

JUDGED = 211  # of mini's drawings of one person: those that no training saw
HELD_OUT = 856  # of mini's drawings; of other data a fifth
TEXT_BATCH = 256  # texts that embed_texts encodes at a time
CLASSIFIED_BATCH = 32  # images that a gender classifier labels at a time
MASKED_BATCH = 128  # samples under a mask at a time
CHECKED = 32  # samples that run before and after the masks, to compare their outputs
TONES = 2  # texts of skin tones
PEOPLE = 8  # texts of the person filter: a person, and what else an image may show


def gender_stages(o: GenderOptions, pairs: int | None = None) -> list[Stage]:
    """The classifier's labels, both towers over all pairs, texts of labels, heads, and both towers live under masks."""
    n = number_of_pairs(o.data, o.limit, pairs)
    found: list[Stage] = []
    if o.labels == "classifier":  # labels all images before --limit chooses among them
        every = number_of_pairs(o.data, None, pairs)
        cost = calls.classifier_cost(o.classifier, CLASSIFIED_BATCH, as_dtype(o.dtype))
        found.append(Stage("labels by the classifier", "images", every, cost, CLASSIFIED_BATCH, 1, o.dtype))
    found += encoding(o.model, n, o.batch, o.dtype)
    if is_corpus(o.data):  # whose groups of features are those of the embedded drawings
        drawings = encoding(o.model, PAIRS["mini"], o.batch, o.dtype)
        found += [replace(s, name=f"{s.name}, drawings") for s in drawings]
    named = sum(map(len, label_words(o.words))) + TONES + (PEOPLE if o.person else 0)
    found.append(_texts("label prompts and implicit texts", o, named + len(implicit_texts()[0])))
    sources, judged = head_sources(o.sae, o.ncl, o.model), judged_of(o, n)
    if not all(sources.values()):  # a study that lacks one kind of head trains both
        found += head_stages(calls.embed_dim(o.model), o.features, n - judged, o.epochs, 1, k=o.k)
    # The SAE is masked in three spaces, an NCL head in one; each time three groups on all judged samples.
    settings = 3 + ("ncl" in sources)
    live = settings * (3 * judged + 2 * min(CHECKED, judged))
    masked = encoding(o.model, live, MASKED_BATCH, o.dtype)
    return found + [replace(s, name=f"{s.name}, masked", disk=0) for s in masked]


def judged_of(o: GenderOptions, n: int) -> int:
    """Returns how many of ``n`` samples are judged, at the most: half, and of mini's drawings those held out."""
    return min(JUDGED, (n + 1) // 2) if o.data == "mini" else (n + 1) // 2


def decomposition_stages(o: DecompositionOptions, pairs: int | None = None) -> list[Stage]:
    """Texts, every image's contributions, ablations of held-out images, and the neurons' effects."""
    n, dtype = number_of_pairs(o.data, o.limit, pairs), as_dtype(o.dtype)
    tower = calls.image_tower(o.model)
    held = min(o.evaluate, HELD_OUT * n // PAIRS["mini"] if o.data == "mini" else max(n // 5, 2))
    seen = n - held
    parts = calls.decomposition_cost(o.model, o.batch, dtype)
    token = calls.decomposition_cost(o.model, o.batch, dtype, class_token=True) if tower.one_token else parts
    neurons = calls.neuron_cost(o.model, o.batch, dtype, max(0, tower.depth - 3))
    forward = calls.image_cost(o.model, o.batch, dtype)
    found = [
        # Every held-out image's caption counts twice: as a class among all of them, and by itself.
        _texts("texts of the pool, classes and captions", o, len(text_pool(o.pool)) + 2 * held),
        Stage("means of contributions", "images", min(1000, seen), token, o.batch, 1, o.dtype),
        Stage("contributions", "images", n, parts, o.batch, 1, o.dtype),
        Stage("ablations, direct", "images", held, token, o.batch, 1, o.dtype),
    ]
    if o.live:
        ablated = sum(
            part.has_live for part in paper_parts(tower.depth, tower.heads, last=min(o.layers, tower.depth))
        )
        live = min(256, seen) + ablated * held
        found.append(Stage("ablations, live", "images", live, forward, o.batch, 1, o.dtype))
    return [*found, Stage("neurons", "images", 2 * min(512, seen), neurons, o.batch, 1, o.dtype)]


def segmentation_stages(o: SegmentationOptions, pairs: int | None = None) -> list[Stage]:
    """Texts of the classes, the class that is predicted, and the maps of every method."""
    n, dtype = number_of_pairs(o.data, o.limit, pairs or o.limit), as_dtype(o.dtype)
    texts = len(imagenet_names()) * len(imagenet_templates()) if o.classes == "imagenet" else n
    found = [_texts("texts of the classes", o, texts)]
    if o.classes != "true":
        cost = calls.image_cost(o.model, o.batch, dtype)
        found.append(Stage("predicted classes", "images", n, cost, o.batch, 1, o.dtype))
    for name, cost in calls.saliency_costs(o.model, o.batch, dtype).items():
        found.append(Stage(name, "images", n, cost, o.batch, 1, o.dtype))
    return found


def spurious_stages(o: SpuriousOptions, pairs: int | None = None) -> list[Stage]:
    """Texts, contributions of the images of both halves of every split, and the evaluated ones live without heads.

    ``pairs`` are the images of one half.
    """
    drawn = o.data == "mini"
    n, dtype = o.limit or DRAWN if drawn else number_of_pairs(o.data, o.limit, pairs), as_dtype(o.dtype)
    splits = o.splits if drawn else 1
    classes = len(LAND) + len(WATER) if drawn else 2
    parts = calls.decomposition_cost(o.model, o.batch, dtype)
    forward = calls.image_cost(o.model, o.batch, dtype)
    # All heads kept, the heads of both ways of choosing ablated, and the random sets.
    live = splits * n * (3 + min(o.draws, o.direct_draws))
    return [
        _texts("texts of the pool and the classes", o, len(text_pool(o.pool)) + splits * classes),
        Stage("contributions", "images", splits * 2 * n, parts, o.batch, 1, o.dtype),
        Stage("means of attention heads", "images", splits * n, forward, o.batch, 1, o.dtype),
        Stage("without attention heads", "images", live, forward, o.batch, 1, o.dtype),
    ]


def _texts(
    name: str, o: GenderOptions | DecompositionOptions | SegmentationOptions | SpuriousOptions, count: int
) -> Stage:
    cost = calls.text_cost(o.model, TEXT_BATCH, as_dtype(o.dtype))
    return Stage(name, "texts", count, cost, TEXT_BATCH, 1, o.dtype)

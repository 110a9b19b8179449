"""Samples of the gender study: loading, labelling, limiting, and the split into fitted and judged samples."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mmhooks as mm
from mmhooks.data.pair_set import Pairs
from mmhooks.errors import DataError
from mmhooks.studies.common.held_out import describe_data as describe_pairs
from mmhooks.studies.common.placement import Placement
from mmhooks.studies.gender.drawing_styles import is_corpus, style_pairs
from mmhooks.studies.gender.options import Options
from mmhooks.studies.gender.samples import (
    CLASSES,
    Sample,
    from_classifier,
    from_column,
    from_drawings,
    gender_of_words,
)

Bar = Callable[[str, int], Callable[[int], None]]


def load_people(options: Options, bar: Bar) -> tuple[Pairs, list[Sample]]:
    """Loads the pairs and their labelled samples, at most ``options.limit`` of them.

    Raises:
        DataError: an unknown kind of labels, or data without any gender label.
    """
    return limited(*labelled(options, bar), limit=options.limit, seed=options.seed)


def labelled(options: Options, bar: Bar) -> tuple[Pairs, list[Sample]]:
    """Returns all pairs, and their samples labelled as ``options.labels`` says."""
    how = options.labels
    if how not in ("auto", "codepoints", "column", "classifier"):
        raise DataError(f"--labels: expected auto, codepoints, column or classifier, got {how!r}")
    if how == "auto":
        how = "codepoints" if options.data == "mini" else "column"
    strata = [s.strip() for s in options.strata.split(",") if s.strip()]
    if is_corpus(options.data):
        pairs = style_pairs(options.data, seed=options.seed)
        return pairs, from_drawings(pairs)
    folder = (Path(options.data).expanduser() / "metadata.csv").is_file()
    wanted = [options.label_column, *strata, options.family] if how == "column" else strata
    pairs = mm.data.pairs(
        options.data,
        seed=options.seed,
        on_error="skip" if options.skip_bad else "raise",
        meta_columns=() if folder or options.data == "mini" else [c for c in wanted if c],
        progress=not options.quiet,
    )
    if how == "column":
        return pairs, from_column(pairs, options.label_column, strata, options.family)
    if how == "classifier":
        step = bar("labels by the classifier", len(pairs))
        people = from_classifier(
            pairs,
            options.classifier,
            least=options.confidence,
            strata=strata,
            place=Placement.of(options),
            progress=step,
        )
        return pairs, people
    found = from_drawings(pairs)
    if not found:
        raise DataError(
            f"expected code points of women or men, got none in {options.data!r}; give --labels column or classifier"
        )
    return pairs, found


def limited(
    pairs: Pairs, people: list[Sample], *, limit: int | None, seed: int
) -> tuple[Pairs, list[Sample]]:
    """Returns at most ``limit`` labelled samples, as evenly as possible from women and men, held out and not."""
    if limit is None:
        return pairs, people
    parts: dict[Any, list[Sample]] = {}
    for s in people:
        if s.label is not None:
            parts.setdefault((s.heldout, s.label), []).append(s)
    for key in parts:
        random.Random(seed).shuffle(parts[key])
    chosen: list[Sample] = []
    while len(chosen) < limit and any(parts.values()):
        chosen += [parts[key].pop() for key in sorted(parts) if parts[key]][: limit - len(chosen)]
    chosen.sort(key=lambda s: s.row)
    return pairs.select([s.row for s in chosen]), [replace(s, row=i) for i, s in enumerate(chosen)]


def split(people: Sequence[Sample], seed: int) -> tuple[list[Sample], list[Sample]]:
    """Splits the samples into those that labels are fitted on, and those judged: held-out ones, else half of the families.

    Raises:
        DataError: a side without at least two women and two men.
    """
    labelled = [s for s in people if s.label is not None]
    judged = [s for s in labelled if s.heldout]
    if not judged:
        families = sorted({s.family for s in labelled})
        random.Random(seed).shuffle(families)
        half = set(families[: len(families) // 2])
        judged = [s for s in labelled if s.family in half]
    rows = {s.row for s in judged}
    fit = [s for s in labelled if s.row not in rows]
    counts = {
        w: [sum(s.label == c for s in part) for c in (0, 1)]
        for w, part in (("fitted", fit), ("judged", judged))
    }
    if min(map(min, counts.values())) < 2:
        sizes = "; ".join(f"{w}: {a} women, {b} men" for w, (a, b) in counts.items())
        raise DataError(
            f"expected at least 2 women and 2 men on each side, got {sizes}; give more samples or a larger --limit"
        )
    return fit, judged


def template_of(template: str, pairs: Pairs) -> str:
    """Returns the template of label prompts; auto: "a drawing" where the pairs have code points, else "a photo"."""
    if template != "auto":
        return template
    drawn = any("codepoints" in meta for meta in pairs.meta)
    return f"a {'drawing' if drawn else 'photo'} of a {{}}"


def describe_data(
    pairs: Pairs,
    options: Options,
    people: Sequence[Sample],
    fit: Sequence[Sample],
    judged: Sequence[Sample],
) -> dict[str, Any]:
    """Describes the data for ``results.json``: the pairs, the samples, and the confidence of their labels."""

    def counts(part: Sequence[Sample]) -> dict[str, int]:
        women, men, unsaid = (sum(s.label == c for s in part) for c in (0, 1, None))
        return {"women": women, "men": men, "unsaid": unsaid, "families": len({s.family for s in part})}

    named = sum(gender_of_words(pairs.texts[s.row]) is not None for s in judged)
    sure = [s.confidence for s in people if s.confidence is not None]
    summary = describe_pairs(
        pairs, data=options.data, model=options.model, pretrained=options.pretrained,
        heldout=sum(s.heldout for s in people),
    )  # fmt: skip
    return summary | {
        "people": counts(people),
        "fitted": counts(fit),
        "judged": counts(judged),
        "judged_texts_naming_a_gender": named,
        "confidence": {"mean": sum(sure) / len(sure), "least": min(sure)} if sure else None,
        "labels": [
            {"id": pairs.ids[s.row], "label": CLASSES[s.label], "confidence": s.confidence, "judged": s in judged}
            for s in people
            if s.label is not None
        ] if sure else None,
    }  # fmt: skip

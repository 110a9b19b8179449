"""Images that show a person, zero-shot: a gender classifier answers for a landscape as well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmhooks.analysis.interventions.masked_classification import prompt_labels
from mmhooks.errors import DataError
from mmhooks.studies.common.encode import Encoded, unit
from mmhooks.studies.gender.samples import CLASSES, Sample

PERSON = "person"
OTHERS = ("thing", "animal", "plant", "meal", "building", "landscape", "pattern")


def showing_a_person(
    people: Sequence[Sample], encoded: Encoded, least: float, template: str, scale: float
) -> tuple[list[Sample], dict[str, Any] | None]:
    """Returns the samples whose image shows a person with a probability of at least ``least``, and their counts.

    The probability is the study's own model's: "a photo of a person" against the same prompt of :data:`OTHERS`.

    Args:
        least: 0 keeps all samples, and returns no counts.
        template: of the prompts, with one ``{}``. scale: of the cosines.

    Raises:
        DataError: no labelled sample is left.
    """
    if not least:
        return list(people), None
    labels = prompt_labels(encoded.model, [[name] for name in (PERSON, *OTHERS)], [template])
    images = unit(encoded.vectors("image", [s.row for s in people]))
    found = (scale * images @ labels.to(images).T).softmax(1)[:, 0].tolist()
    left = [s for s, p in zip(people, found, strict=True) if p >= least]
    if not any(s.label is not None for s in left):
        raise DataError(
            f"--person {least}: expected labelled images that show a person, got none of {len(people)} (largest "
            f"probability {max(found, default=0.0):.3f}); lower --person"
        )
    return left, {
        "least": least,
        "prompts": [template.format(name) for name in (PERSON, *OTHERS)],
        "before": _counts(people),
        "after": _counts(left),
    }


def _counts(people: Sequence[Sample]) -> dict[str, int]:
    return {name: sum(s.label == c for s in people) for c, name in enumerate(CLASSES)}

"""Prompts of the generation study and the reference image of each: from the data, or one prompt and one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from mmhooks.data.sources.images import open_image, rgb
from mmhooks.errors import DataError, MMHooksError
from mmhooks.studies.generation.interpolation import Case
from mmhooks.studies.generation.options import Options


def make_cases(pairs: Any, known: set[str] | None, options: Options) -> list[Case]:
    """Makes ``--pairs`` cases: prompts and references of different pairs, unless ``--prompt`` or ``--reference`` says one.

    With both, cases differ by their noise alone.

    Args:
        known: texts that the pipeline draws; None: all.

    Raises:
        MMHooksError: too few pairs.
        DataError: a reference that is not an image.
    """
    count, template, seed = options.pairs, options.template, options.seed
    one = None if options.reference is None else read_reference(options.reference)
    if options.prompt is None and one is None:
        return choose_cases(pairs, known, count, template, seed)
    rows = distinct_rows(pairs, known)
    if (options.prompt is None or one is None) and len(rows) < count:
        raise MMHooksError(
            f"{count} cases need as many different texts that the pipeline draws; the data has {len(rows)}: lower --pairs "
            "or raise --limit"
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    found = []
    for i in range(count):
        prompt = options.prompt
        if prompt is None:
            prompt = template.format(pairs.texts[rows[order[i]]])
        if one is None:
            row = rows[order[i]]
            found.append(Case(prompt, template.format(pairs.texts[row]), pairs[row].image))
        else:
            found.append(Case(prompt, template.format(one[0]), one[1]))
    return found


def choose_cases(pairs: Any, known: set[str] | None, count: int, template: str, seed: int) -> list[Case]:
    """Chooses ``count`` prompts and as many references from other pairs, among the ``known`` texts if given.

    Raises:
        MMHooksError: too few pairs.
    """
    texts, rows = pairs.texts, distinct_rows(pairs, known)
    if len(rows) < 2 * count:
        raise MMHooksError(
            f"{count} prompts and references need {2 * count} different texts that the pipeline draws; the data has "
            f"{len(rows)}: lower --pairs or raise --limit"
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [
        Case(template.format(texts[rows[a]]), template.format(texts[rows[b]]), pairs[rows[b]].image)
        for a, b in zip(order[:count], order[count : 2 * count], strict=True)
    ]


def distinct_rows(pairs: Any, known: set[str] | None) -> list[int]:
    """Returns the first row of every different text that the pipeline draws."""
    first: dict[str, int] = {}
    for i, text in enumerate(pairs.texts):
        if known is None or text in known:
            first.setdefault(text, i)
    return list(first.values())


def read_reference(path: Path) -> tuple[str, Image]:
    """Reads ``--reference``: what it shows, by its file's name ("red-horse.png" shows a "red horse"), and the image.

    Raises:
        DataError: no such file, or not an image.
    """
    file = path.expanduser()
    if not file.is_file():
        raise DataError(f"--reference: expected an image file, got {str(path)!r}, which is not there")
    try:
        image = rgb(open_image(file.read_bytes()))
    except DataError as fault:
        raise DataError(f"--reference {str(path)!r}: {fault}") from fault
    return file.stem.replace("-", " ").replace("_", " "), image

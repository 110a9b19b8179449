"""The export: one page with all tasks, for the participants, and the key, which stays with the researcher."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from mmhooks.errors import DataError
from mmhooks.report import EncodedImage
from mmhooks.studies.common.options import as_settings
from mmhooks.studies.human.comparisons import COMPARED, undecidable
from mmhooks.studies.human.options import Options
from mmhooks.studies.human.page import page
from mmhooks.studies.human.source import Source, open_run
from mmhooks.studies.human.tasks import NAMED, Coverage, Task, choose_tasks
from mmhooks.utils.escape import terminal
from mmhooks.utils.files import make_folder, write_text

KEY_FORMAT = "mmhooks human key 1"
PASS = 0.75  # of the attention checks that a participant must solve; fixed before anybody answers


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        counts: tasks by kind, side and group. coverage: how much of each group they show.
        undecidable: the comparisons fixed in advance for which a group has too few tasks.
    """

    page: Path
    key: Path
    study: str
    counts: Mapping[tuple[str, str, str], int]
    coverage: Sequence[Coverage]
    undecidable: Sequence[str]


def export(options: Options) -> Export:
    """Writes the tasks of a modality run as ``tasks.html`` and their key as ``key.json`` under ``options.out``.

    Raises:
        DataError: the run cannot be opened again (:func:`~mmhooks.studies.human.source.open_run`), or too few features
            have tasks for any of the comparisons (:mod:`~mmhooks.studies.human.comparisons`).

    >>> done = export(Options(run=Path("runs/modality"), features=4))              # doctest: +SKIP
    >>> done.page                                                                  # doctest: +SKIP
    PosixPath('runs/human/tasks.html')
    """
    source = open_run(options.run, options.study_model)
    # Twice as many samples as are shown, because texts may repeat.
    material = source.material(2 * max(NAMED, options.shown))
    tasks, coverage = choose_tasks(material, source.activations, source.groups, options)
    open_questions = undecidable(Counter((t.side, t.group) for t in tasks if t.kind == "intruder"))
    if len(open_questions) == len(COMPARED):
        raise DataError(
            "expected at least two features with tasks in two groups that are compared, got "
            + "; ".join(c.text() for c in coverage)
            + "; use more pairs, fewer --shown, or another head"
        )
    study, items, key = _numbered(tasks, coverage, source, options)
    images = _images(tasks, source, options.pixels)
    shown = [
        {"id": name, "kind": task.kind, "side": task.side, "shown": _shown(task, source, images)}
        for name, task in items
    ]
    out = make_folder(options.out)
    html = page(study, shown, dict(sorted(images.values())), str(source.pairs.attribution))
    return Export(
        write_text(out / "tasks.html", html),
        write_text(out / "key.json", json.dumps(key, indent=1, ensure_ascii=False) + "\n"),
        study,
        Counter((task.kind, task.side, task.group) for task in tasks),
        coverage,
        open_questions,
    )


def _numbered(
    tasks: Sequence[Task], coverage: Sequence[Coverage], source: Source, options: Options
) -> tuple[str, list[tuple[str, Task]], dict[str, Any]]:
    """Shuffles the tasks and names them by numbers that tell nothing; returns the study's id, these, and the key."""
    ids, model = source.pairs.ids, source.study_model
    settings = {
        k: v for k, v in as_settings(options).items() if k not in ("run", "out")
    }  # places decide nothing
    about = {
        "command": source.command, "model": model.encoded.name, "head": model.head.id, "rule": source.rule,
        "data": str(source.pairs.name), "fingerprint": str(source.pairs.fingerprint),
        "settings": settings, "pass": PASS, "choices": options.shown + 1,
        "coverage": [asdict(c) for c in coverage],
    }  # fmt: skip
    content = repr((about, tasks)).encode()
    study = blake2b(content, digest_size=8).hexdigest()
    # Seeded by what only the researcher has: the page shows the study's id, from which nothing may follow.
    rng = random.Random(blake2b(content, digest_size=16, person=b"order").hexdigest())
    order = rng.sample(list(tasks), len(tasks))
    names = rng.sample(range(16**6, 16**7), len(order))
    items = [(f"{number:x}", task) for number, task in zip(names, order, strict=True)]
    entries = {
        name: {
            "kind": t.kind, "side": t.side, "group": t.group, "feature": t.feature, "correct": t.intruder,
            "mds": None if t.feature is None else round(float(source.scores[t.feature]), 6),
            "samples": [str(ids[row]) for row in t.rows],
        }
        for name, t in items
    }  # fmt: skip
    return study, items, {"format": KEY_FORMAT, "study": study, **about, "items": entries}


def _images(tasks: Sequence[Task], source: Source, pixels: int) -> Mapping[int, tuple[str, str]]:
    """By row, a name made of the image's content and its data URI: neither tells where the image is used."""
    rows = sorted({row for task in tasks if task.side == "image" for row in task.rows})
    found = {}
    for row in rows:
        encoded = EncodedImage.from_pil(source.pairs.image(row), side=pixels)
        found[row] = (blake2b(encoded.data, digest_size=8).hexdigest(), encoded.uri)
    return found


def _shown(task: Task, source: Source, images: Mapping[int, tuple[str, str]]) -> list[str]:
    if task.side == "text":
        return [terminal(source.pairs.texts[row]) for row in task.rows]
    return [images[row][0] for row in task.rows]

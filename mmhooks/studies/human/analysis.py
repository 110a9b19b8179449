"""What the participants' answers say: accuracy by group, agreement, names, and how many more answers would decide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mmhooks.analysis.results import Estimate, plain
from mmhooks.analysis.statistics.agreement import MISSING, krippendorff_alpha
from mmhooks.analysis.statistics.crossed import (
    Answers,
    RateDifference,
    Spread,
    crossed_difference,
    crossed_rate,
    estimate_spread,
)
from mmhooks.analysis.statistics.primaries import Measured, decide, verdict_text
from mmhooks.errors import DataError
from mmhooks.report import Cell, Table, fixed
from mmhooks.studies.common.write import Results, write_results
from mmhooks.studies.human.answers import Key, Participant, read_answers, read_key
from mmhooks.studies.human.comparisons import COMPARED, GROUPS, PRIMARIES
from mmhooks.studies.human.naming import Embed, naming
from mmhooks.studies.human.plan import plan, power_table
from mmhooks.studies.human.tasks import SIDES, Coverage
from mmhooks.utils.escape import one_line
from mmhooks.utils.files import write_text

Cells = Mapping[tuple[str, str], Answers]
NOBODY = Answers(torch.zeros(0), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))


def analyse(
    answers: Sequence[Path], *, key: Path, out: Path | None = None, embed: Embed | None = None, seed: int = 0
) -> Results:
    """Analyses the participants' files; writes ``results.json`` and ``tables.md`` under ``out`` if it is given.

    Participants who miss attention checks are left out, and named in the results.

    Args:
        embed: texts to unit vectors (:func:`mmhooks.models.embedders.text_embedder`), for the similarity of names.

    Raises:
        DataError: files that do not belong together (:func:`~mmhooks.studies.human.answers.read_answers`), or no
            participant who was attentive.

    >>> found = analyse(list(Path("answers").glob("*.json")), key=Path("runs/human/key.json"))   # doctest: +SKIP
    >>> found["accuracy"]["image"]["ImgD"]["value"]                                              # doctest: +SKIP
    """
    known = read_key(key)
    everybody = read_answers(answers, known)
    attentive = [p for p in everybody if p.passes(known)]
    if not attentive:
        solved = ", ".join(f"{one_line(p.name)} {p.checks(known)[0]}" for p in everybody)
        raise DataError(
            f"expected participants who solve at least {known.pass_share:.0%} of the {everybody[0].checks(known)[1]} "
            f"attention checks, got none of {len(everybody)} (solved: {solved}); ask more people"
        )
    cells = answers_by_cell(attentive, known)
    compared = {name: _difference(cells, *what) for name, what in COMPARED.items()}
    decided = decide(
        PRIMARIES, {name: Measured(d.estimate, d.p, d.detectable) for name, d in compared.items()}
    )
    spread = _spread(cells)
    results: dict[str, Any] = {
        "study": known.study,
        "coverage": [asdict(c) for c in known.coverage],
        "participants": len(attentive),
        "left_out": [p.name for p in everybody if p not in attentive],
        "chance": 1 / known.choices,
        "accuracy": _by_cell(cells, lambda a: crossed_rate(a).to_json()),
        "tasks": _by_cell(cells, lambda a: len(a.items.unique())),
        "alpha": {
            side: {g: _alpha(attentive, known, side, g, seed).to_json() for s, g in cells if s == side}
            for side in SIDES
        },
        "primaries": {
            name: {
                "estimate": d.estimate.to_json(), "p": d.p, "adjusted": d.adjusted, "detectable": d.detectable,
                "outcome": d.outcome, "verdict": verdict_text(d, digits=1, scale=100.0, unit=" points"),
            }
            for name, d in decided.items()
        },
        "naming": {
            f"{side}, {group}": {k: v.to_json() if isinstance(v, Estimate) else v for k, v in found.items()}
            for (side, group), found in _naming(attentive, known, embed, seed).items()
        },
        "spread": vars(spread),
        "power": plan(spread),
    }  # fmt: skip
    if out is None:
        return Results(plain(dict(results)), ())
    written = write_results(out, results)
    tables = write_text(out / "tables.md", "\n\n".join(t.markdown() for t in tables_of(written.found)) + "\n")
    return Results(written.found, (*written.paths, tables))


def answers_by_cell(participants: Sequence[Participant], key: Key) -> dict[tuple[str, str], Answers]:
    """The answers to intruder tasks by side and group; features are the items, and random lists and checks too."""
    numbers = {task: i for i, task in enumerate(key.items)}
    rows: dict[tuple[str, str], list[tuple[float, int, int]]] = {
        (side, group): []
        for side in SIDES
        for group in GROUPS
        if any(i.kind == "intruder" and i.side == side and i.group == group for i in key.items.values())
    }
    for who, participant in enumerate(participants):
        for task, choice in participant.choices.items():
            item = key.items[task]
            rows[item.side, item.group].append((float(choice == item.correct), who, numbers[task]))
    return {
        cell: Answers(
            torch.tensor([hit for hit, _, _ in found], dtype=torch.float64),
            torch.tensor([who for _, who, _ in found], dtype=torch.long),
            torch.tensor([task for _, _, task in found], dtype=torch.long),
        )
        for cell, found in rows.items()
    }


def tables_of(found: Mapping[str, Any]) -> list[Table]:
    """The tables of the results: accuracy with agreement, comparisons, names, power."""
    accuracy: list[Sequence[str | Cell]] = [
        [
            f"{side}s", group, str(found["tasks"][side][group]),
            _cell(found["accuracy"][side][group]), _cell(found["alpha"][side][group]),
        ]
        for side in SIDES
        for group in found["accuracy"][side]
    ]  # fmt: skip
    compared: list[Sequence[str | Cell]] = [[name, d["verdict"]] for name, d in found["primaries"].items()]
    names: list[Sequence[str | Cell]] = [
        [cell, str(n["tasks"]), *(_cell(n[k]) if k in n else "–" for k in ("exact", "similarity", "nothing"))]
        for cell, n in found["naming"].items()
    ]
    coverage = [Coverage(**row) for row in found["coverage"]]
    covered: list[Sequence[str | Cell]] = [
        [f"{c.side}s", c.group, *map(str, (c.members, c.asked, c.shown, c.few_samples, c.no_intruder))]
        for c in coverage
    ]
    people = f"{found['participants']} participants, {len(found['left_out'])} left out by attention checks."
    s = found["spread"]
    return [
        Table(
            ["shown", "group", "tasks", "right", "alpha"], accuracy, "Intruder tasks",
            f"{people} Chance is {fixed(found['chance'], 2)}. Intervals count participants and features as samples.",
            text_columns=(0, 1),
        ),
        Table(
            ["shown", "group", "features", "asked for", "with a task", "too few samples", "no intruder"], covered,
            "Features of each group",
            "No intruder: every sample that could be it is of a family that activates the feature; features are tried "
            "until as many tasks are made as were asked for.",
            text_columns=(0, 1),
        ),
        Table(["comparison", "verdict"], compared, "Primary comparisons", text_columns=(0, 1)),
        Table(
            ["shown, group", "tasks", "equal names", "similarity", "nothing in common"], names, "Naming tasks",
            "Similarity: cosine of two names of one task minus that of names of different tasks.", text_columns=(0,),
        ),
        power_table(
            found["power"],
            f"At {fixed(s['rate'], 2)} right answers, standard deviation {fixed(s['items'], 2)} over features and "
            f"{fixed(s['raters'], 2)} over participants: as these answers have it, but no less than was assumed before.",
        ),
    ]  # fmt: skip


def _difference(cells: Cells, side: str, one: str, other: str) -> RateDifference:
    return crossed_difference(cells.get((side, one), NOBODY), cells.get((side, other), NOBODY))


def _spread(cells: Cells) -> Spread:
    """The spread of ImgD and TextD on the side where the smaller has more answers, no smaller than what was assumed.

    A few answers often show none at all, from which a plan would follow that is too good to be true.
    """
    assumed = Spread()
    pairs = [[cells.get((side, group), NOBODY) for group in ("ImgD", "TextD")] for side in SIDES]
    one, other = max(pairs, key=lambda pair: min(len(answers.hits) for answers in pair))
    if not len(one.hits) or not len(other.hits):
        return assumed
    found = estimate_spread(one, other)
    return Spread(found.rate, max(found.items, assumed.items), max(found.raters, assumed.raters))


def _alpha(participants: Sequence[Participant], key: Key, side: str, group: str, seed: int) -> Estimate:
    tasks = [t for t, i in key.items.items() if (i.kind, i.side, i.group) == ("intruder", side, group)]
    labels = [[p.choices.get(task, MISSING) for p in participants] for task in tasks]
    table = torch.tensor(labels, dtype=torch.long).view(len(tasks), len(participants))
    return krippendorff_alpha(table, seed=seed)


def _naming(
    participants: Sequence[Participant], key: Key, embed: Embed | None, seed: int
) -> dict[tuple[str, str], dict[str, Any]]:
    found = {}
    for side in SIDES:
        for group in GROUPS:
            tasks = [t for t, i in key.items.items() if (i.kind, i.side, i.group) == ("name", side, group)]
            names = {t: [p.names[t] for p in participants if t in p.names] for t in tasks}
            if any(names.values()):
                found[side, group] = naming(names, embed, seed=seed)
    return found


def _by_cell(cells: Cells, of: Any) -> dict[str, dict[str, Any]]:
    return {side: {group: of(a) for (s, group), a in cells.items() if s == side} for side in SIDES}


def _cell(estimate: Mapping[str, Any]) -> Cell:
    return Cell.of(Estimate.from_json(estimate), digits=2)

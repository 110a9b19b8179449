"""The statements on heads, with heads of other training seeds: a verdict that one training gives may be that training's."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mmhooks.report import Cell, Table, fixed, signed
from mmhooks.studies.common.heads import load_heads
from mmhooks.studies.modality.definitions import WORDS
from mmhooks.studies.modality.measures import Definition, StudyModel, measured, table_numbers
from mmhooks.studies.modality.paper import claims

KINDS = {"CLIP+NCL": "ncl", "CLIP+SAE": "sae"}


def heads_of_seed(
    clip: Any,
    rows: Sequence[int],
    sources: Mapping[str, str],
    seed: int,
    *,
    n: int,
    k: int,
    epochs: int,
    first: int,
    cache: Path,
) -> dict[str, Any]:
    """Loads or trains the heads of another seed: ``mini/sae-seed1`` beside ``mini/sae``, else trained from ``first + seed``.

    A head that the user names has no other seed; a new one of its kind would be another recipe, so it stays the same.
    """
    others = {
        kind: f"{name}-seed{seed}" if name == f"mini/{kind}" else name for kind, name in sources.items()
    }
    return load_heads(clip, rows, others, n=n, k=k, epochs=epochs, seed=first + seed, cache=cache)


def compare_seeds(
    others: Sequence[Mapping[str, Any]],
    models: Mapping[str, Any],
    clip: Any,
    embeddings: dict[str, Tensor],
    definition: Definition,
    *,
    seed: int,
    step: Callable[[int], None],
) -> dict[str, Any]:
    """Measures the heads of other seeds, and gives each seed's verdicts, in which models without a head stay the same.

    Args:
        others: heads by kind, of one seed each. models: the study's numbers by model, with the heads of the first seed.
    """
    tables = [dict(models)]
    for heads in others:
        table = {name: numbers for name, numbers in models.items() if name not in KINDS}
        for name, kind in KINDS.items():
            found = measured(StudyModel(name, clip, heads[kind]), embeddings, definition, seed)
            table[name] = table_numbers(found, seed)
            step(1)
        tables.append(table)
    return {
        "numbers": [
            {
                name: {key: t[name][key] for key in ("embed_sim", "win_rate", "monosemanticity")}
                for name in KINDS
            }
            for t in tables
        ],
        "verdicts": [{c.claim: c.verdict for c in claims(t)} for t in tables],
    }


def seed_table(results: Mapping[str, Any]) -> Table:
    """One row per statement: in how many seeds it holds, differs, or is undecided."""
    verdicts = results["seeds"]["verdicts"]
    rows: list[list[str | Cell]] = []
    for claim in dict.fromkeys(claim for one in verdicts for claim in one):
        found = [one[claim] for one in verdicts if claim in one]
        rows.append([claim, *(str(found.count(v)) for v in ("same", "differs", "open"))])
    return Table(
        ["Statement of the paper", *(WORDS[v] for v in ("same", "differs", "open"))],
        rows,
        f"The statements with heads of {len(verdicts)} training seeds",
        "In how many seeds of the NCL and SAE heads each statement has which verdict; the correction is over the statements "
        "of one seed. Statements that do not speak of these heads are the same in all.",
    )


def seed_numbers_table(results: Mapping[str, Any]) -> Table:
    """Mean and standard deviation over training seeds of the numbers of Tables 1 and 2."""
    numbers = results["seeds"]["numbers"]
    rows: list[list[str | Cell]] = []
    for name in KINDS:
        for key, word in (
            ("embed_sim", "EmbedSim"),
            ("win_rate", "WinRate"),
            ("monosemanticity", "monosemanticity"),
        ):
            for side in ("image", "text"):
                values = [one[name][key][side]["value"] for one in numbers]
                known = [v for v in values if v is not None]
                show = signed if key == "monosemanticity" else fixed
                spread = fixed(statistics.stdev(known)) if len(known) > 1 else "—"
                mean = show(statistics.fmean(known)) if known else "—"
                rows.append(
                    [
                        name,
                        f"{word}, {side}s",
                        mean,
                        spread,
                        ", ".join("—" if v is None else show(v) for v in values),
                    ]
                )
    return Table(
        ["Model", "Quantity", "mean", "SD", "each seed"],
        rows,
        "The same numbers over training seeds",
        text_columns=(0, 1, 4),
    )

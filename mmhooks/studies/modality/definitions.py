"""The paper's quantities under several definitions: which of its statements hold under each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

import mmhooks as mm
from mmhooks.analysis.measures.all_measures import Measures
from mmhooks.report import Cell, Estimate, Table
from mmhooks.studies.modality.measures import Definition, StudyModel, measured, table_numbers
from mmhooks.studies.modality.paper import claims

OWN, PAPER = "this run's", "the paper's"  # a run with --paper has no definition of ours


def definitions(own: Definition) -> dict[str, Definition]:
    """Returns the run's own definition, the same without families, and what is probably the paper's.

    The paper does not say which it used. A plain top-m of ``z`` ranks by the signed value, fills lists up with zeros, has
    exactly m samples per feature and knows no families.
    """
    return {
        OWN: own,
        "every pair counts": replace(own, families=None),
        PAPER: replace(own, activation="raw", zeros="keep", min_samples=own.m, families=None),
    }


def sample_families(pairs: Any, family: str | None, vectors: Float[Tensor, "n d"]) -> Int[Tensor, " n"]:
    """Numbers the family of every pair by ``--family``: "none", a column, or the default of :func:`mm.data.families`."""
    if family == "none":
        return torch.arange(len(pairs))
    return mm.data.families(pairs, family, vectors=vectors)


def compare_definitions(
    models: Sequence[StudyModel],
    embeddings: dict[str, Tensor],
    own: Definition,
    found: Mapping[str, Measures],
    *,
    seed: int,
    step: Callable[[int], None],
) -> dict[str, Any]:
    """Measures every model under each definition; returns the numbers of Tables 1 and 2, and each statement's verdict.

    Args:
        found: the measures under the run's own definition, by model.
    """
    numbers: dict[str, Any] = {}
    for name, definition in definitions(own).items():
        numbers[name] = {}
        for s in models:
            again = found[s.name] if name == OWN else measured(s, embeddings, definition, seed)
            numbers[name][s.name] = table_numbers(again, seed)
            step(1)
    verdicts = {name: {c.claim: c.verdict for c in claims(table)} for name, table in numbers.items()}
    return {"numbers": numbers, "verdicts": verdicts}


WORDS = {"same": "holds", "differs": "differs", "open": "undecided"}


def verdict_table(results: Mapping[str, Any]) -> Table:
    """One row per statement of the paper, one column per definition."""
    verdicts = results["definitions"]["verdicts"]
    names = list(verdicts)
    rows: list[list[str | Cell]] = [
        [claim, *(WORDS[verdicts[name][claim]] if claim in verdicts[name] else "—" for name in names)]
        for claim in verdicts[OWN]
    ]
    tally = [sum(v == "same" for v in verdicts[name].values()) for name in names]
    rows.append(["Statements that hold", *(str(t) for t in tally)])
    return Table(
        ["Statement of the paper", *names],
        rows,
        "Definitions decide verdicts",
        "The same statements under other definitions than this run's, after the same correction. Every pair counts: "
        "near-duplicates of one drawing may fill a list of top samples, and intervals are over features alone. The paper's, as "
        "far as it can be told: in addition, raw CLIP's coordinates are ranked by their signed value instead of their size "
        "(whose MDS has no mean, so that raw CLIP's groups are arbitrary), lists are filled up with samples that do not activate "
        "the feature, and all lists are full. `--activation`, `--zeros`, `--min-samples` and `--family` change one at a time.",
        text_columns=tuple(range(len(names) + 1)),
    )


def definition_table(results: Mapping[str, Any], models: Sequence[str]) -> Table:
    """Table 2 and the WinRates under each definition."""
    rows: list[list[str | Cell]] = []
    for name, table in results["definitions"]["numbers"].items():
        for m in models:
            r = table[m]
            cells = [_cell(r["win_rate"][k]) for k in ("image", "text")]
            cells += [_cell(r["monosemanticity"][k], plus=True) for k in ("image", "text")]
            rows.append([name, m, *cells])
    return Table(
        ["Definition", "Model", "WinRate image", "WinRate text", "visual", "textual"],
        rows,
        "WinRate and monosemanticity under each definition",
        text_columns=(0, 1),
    )


def _cell(value: Mapping[str, Any], *, plus: bool = False) -> Cell:
    return Cell.of(Estimate.from_json(dict(value)), plus=plus)

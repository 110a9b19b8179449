"""Writes what the cards of the embedded heads on tokens say into docs/heads.md, between its markers.

PYTHONPATH=recipes python -m publish.token_heads
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

import mmhooks as mm
from mmhooks.report import Cell, Table
from publish.marked_block import fill

PAGE = Path(__file__).parents[2] / "docs" / "heads.md"


def patch_block(card: Mapping[str, Any]) -> str:
    """The tables of mini/patch-sae: candidates, retrieval with patches rebuilt, and the pointing game."""
    shipped, recipe = card["site"], card["recipe"]
    rows: list[list[str | Cell]] = []
    for row in card["candidates"]:
        mark = " (ships)" if (row["site"], row["k"]) == (shipped, recipe["k"]) else ""
        rows.append(
            [
                f"{row['site'].split('.')[2]}{mark}",
                str(row["k"]),
                _cell(row["fvu"]),
                f"{row['dead']:.2f} / {row['dead_in_training']:.2f}",
                f"{row['l0']:.1f}",
                *(_both(row[name]) for name in ("model", "rebuilt", "mean")),
            ]
        )
    held = card["held_out"]
    caption = f"{held['clusters']} families, {held['tokens']:,} patches"
    candidates = Table(
        ["Block", "K", "FVU", "dead, held out / training", "L0", "R@5 of the model", "patches rebuilt", "patches at their mean"],
        rows, caption, text_columns=(),
    )  # fmt: skip
    kept: list[list[str | Cell]] = [
        [label, *(_cell(held["retrieval"][name][way][k]) for way in ("image_to_text", "text_to_image") for k in ("R@1", "R@5"))]
        for label, name in (("as it is", "model"), ("patches rebuilt", "rebuilt"), ("patches at their mean", "mean"))
    ]  # fmt: skip
    columns = ["mini", "image to text, R@1", "R@5", "text to image, R@1", "R@5"]
    retrieval = Table(columns, kept, f"{shipped}, {held['tokens'] // 64} pairs")
    return "\n\n".join([candidates.markdown(), retrieval.markdown(), pointing_table(card).markdown()])


def pointing_table(card: Mapping[str, Any]) -> Table:
    """The best features' hits beside their controls."""
    rows: list[list[str | Cell]] = []
    for name, found in card["pointing"].items():
        rows.append(
            [
                f"{name} ({found['families']} {'families' if name == 'drawings' else 'pictures'})",
                *(_cell(found[key]) for key in ("hits", "matched", "elsewhere", "chance")),
                _cell(found["hits_minus_matched"]),
                _cell(found["hits_minus_elsewhere"]),
            ]
        )
    count = len(card["pointing"]["drawings"]["features"])
    columns = [
        "Pictures",
        "hits",
        "matched features",
        "other picture",
        "chance",
        "hits − matched",
        "hits − other",
    ]
    return Table(columns, rows, f"Pointing game of the {count} best features")


def language_block(card: Mapping[str, Any]) -> str:
    """The tables of mini-vlm/lm-sae: candidates, and answers with all tokens rebuilt by kind of question."""
    rows: list[list[str | Cell]] = []
    for row in card["candidates"]:
        mark = " (ships)" if (row["site"], row["k"]) == (card["site"], card["recipe"]["k"]) else ""
        rows.append(
            [
                f"{row['site'].split('.')[2]}{mark}",
                str(row["k"]),
                _cell(row["fvu"]["image"]),
                _cell(row["fvu"]["question"]),
                f"{row['dead']:.2f} / {row['dead_in_training']:.2f}",
                f"{row['l0']['image']:.1f} / {row['l0']['question']:.1f}",
                *(f"{row['cross_entropy'][way]:.2f}" for way in ("model", "rebuilt", "mean image", "mean")),
            ]
        )
    columns = ["Block", "K", "FVU, image tokens", "FVU, question", "dead, held out / training", "L0",
               "cross-entropy of the model", "all rebuilt", "image tokens at their mean", "all at their mean"]  # fmt: skip
    scenes = card["held_out"]["image"]["clusters"]
    candidates = Table(columns, rows, f"{scenes:,} held-out scenes", text_columns=())
    ways = ("model", "rebuilt", "mean image", "mean")
    kinds = [
        [kind, *(_cell(card["answers"][way]["by_kind"][kind]) for way in ways)]
        for kind in card["answers"]["model"]["by_kind"]
    ]
    kinds.append(["all", *(_cell(card["answers"][way]["right"]) for way in ways)])
    kinds.append(["cross-entropy", *(_cell(card["answers"][way]["cross_entropy"]) for way in ways)])
    answers = Table(
        ["Question", "model", "all rebuilt", "image tokens at their mean", "all at their mean"],
        kinds, f"Right answers, {card['site']}",
    )  # fmt: skip
    return "\n\n".join([candidates.markdown(), answers.markdown()])


def _cell(found: Mapping[str, Any]) -> Cell:
    return Cell(_number(found["value"]), f"[{_number(found['low'])}, {_number(found['high'])}]")


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1 else f"{value:.2f}"


def _both(ways: Mapping[str, float]) -> str:
    return f"{ways['image_to_text']:.3f} / {ways['text_to_image']:.3f}"


def main(page: Annotated[Path, typer.Option(help="Where the markers are.")] = PAGE) -> None:
    """Fills the page from the cards; a second call changes nothing."""
    fill(page, patch_block(mm.load_head("mini/patch-sae").info), "patch-sae")
    fill(page, language_block(mm.load_head("mini-vlm/lm-sae").info), "lm-sae")


if __name__ == "__main__":
    typer.run(main)

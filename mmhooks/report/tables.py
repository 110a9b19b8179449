"""Tables that render as Markdown and, through the page's template, as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mmhooks.analysis.results import Estimate
from mmhooks.errors import ShapeMismatch
from mmhooks.report.numbers import fixed, interval
from mmhooks.utils.escape import markdown


@dataclass(frozen=True)
class Cell:
    """A value with its interval and the value printed in the paper.

    ``differs`` marks a value whose direction contradicts the paper's; ``best`` the best of its column.
    """

    text: str
    interval: str = ""
    paper: str = ""
    differs: bool = False
    best: bool = False

    @classmethod
    def of(
        cls,
        estimate: Estimate,
        *,
        digits: int = 3,
        plus: bool = False,
        paper: float | None = None,
        differs: bool = False,
        best: bool = False,
    ) -> Cell:
        return cls(
            fixed(estimate.value, digits, plus=plus),
            interval(estimate, digits),
            "" if paper is None else fixed(paper, digits, plus=plus),
            differs,
            best,
        )

    def markdown(self) -> str:
        text = f"**{markdown(self.text)}**" if self.best else markdown(self.text)
        paper = f"(paper {markdown(self.paper)})" if self.paper else ""
        parts = [text, markdown(self.interval), paper, "≠" if self.differs else ""]
        return " ".join(p for p in parts if p)


@dataclass(frozen=True)
class Table:
    """Columns, rows of strings or :class:`Cell`, a caption above and a note below.

    >>> print(Table(["Model", "R"], [["CLIP", Cell(".5", "[.4, .6]")]]).markdown())
    | Model | R |
    |:--|--:|
    | CLIP | .5 [.4, .6] |
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    caption: str = ""
    note: str = ""
    text_columns: Sequence[int] = field(default=(0,))

    def __post_init__(self) -> None:
        for i, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ShapeMismatch(
                    f"row {i} of table {self.caption!r}: expected {len(self.columns)} cells, got {len(row)}"
                )

    def cells(self) -> list[list[Cell]]:
        return [[c if isinstance(c, Cell) else Cell(c) for c in row] for row in self.rows]

    def markdown(self) -> str:
        """Formats a GitHub table, caption in bold above, note below; text is escaped, except `code` in both of these."""
        rule = "|".join(":--" if i in self.text_columns else "--:" for i in range(len(self.columns)))
        lines = [f"**{markdown(self.caption, code=True)}**", ""] if self.caption else []
        lines += ["| " + " | ".join(markdown(c) for c in self.columns) + " |", f"|{rule}|"]
        lines += ["| " + " | ".join(c.markdown() for c in row) + " |" for row in self.cells()]
        if self.note:
            lines += ["", markdown(self.note, code=True)]
        return "\n".join(lines)

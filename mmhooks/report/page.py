"""A self-contained HTML page: no scripts, no external resources, all text from data escaped."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmhooks.report.blocks import Section
from mmhooks.utils.escape import terminal
from mmhooks.utils.files import make_folder, write_text

_CODE = re.compile(r"`([^`]+)`")


@dataclass(frozen=True)
class Page:
    """A title, a lead paragraph, sections and a footer; :meth:`html` renders the page, :meth:`save` writes it."""

    title: str
    sections: Sequence[Section]
    lead: str = ""
    kicker: str = ""
    footer: Sequence[str] = ()

    def html(self) -> str:
        sections = [(s, s.anchor or _slug(s.title)) for s in self.sections]
        return _environment().get_template("page.html.j2").render(page=self, sections=sections)

    def save(self, path: str | Path) -> Path:
        """Writes the page atomically, so that a killed run never leaves half a file."""
        path = Path(path)
        make_folder(path.parent)
        return write_text(path, self.html())


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "section"


def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup, escape

    def inline(text: str) -> Markup:
        """Escapes first, then turns `code` spans into elements, so that data can never open a tag."""
        return Markup(_CODE.sub(r"<code>\1</code>", str(escape(readable(text)))))

    def readable(value: Any) -> Any:
        """Spells out characters that change the reading direction or that HTML forbids; autoescape does the mark-up."""
        return terminal(value, lines=True) if type(value) is str else value

    # Autoescape is on for every template: the default depends on the file name's ending.
    environment = Environment(
        loader=PackageLoader("mmhooks.report", "templates"),
        autoescape=True,
        finalize=readable,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["inline"] = inline
    return environment

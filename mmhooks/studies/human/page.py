"""The page of tasks: one HTML file that works offline, stores its progress in the browser and saves answers as JSON."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from importlib.resources import files
from typing import Any

ANSWERS_FORMAT = (
    "mmhooks human answers 1"  # the page's script writes it, mmhooks.studies.human.answers reads it
)


def page(study: str, tasks: Sequence[Mapping[str, Any]], images: Mapping[str, str], attribution: str) -> str:
    """Renders the page.

    Texts of data are only ever set as text by the script, and the data block cannot be left: every ``<`` in it is
    escaped. The page's policy allows its own script, its own style and images inside it, and no connection.

    Args:
        study: the id that answers carry. tasks: each with ``id``, ``kind``, ``side`` and what is ``shown``: texts, or
            names of images. images: data URIs by name. attribution: of the data, as its licence asks for.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    folder = files("mmhooks.studies.human") / "templates"
    script, style, template = (
        (folder / name).read_text(encoding="utf-8") for name in ("tasks.js", "tasks.css", "tasks.html.j2")
    )
    content = {"format": ANSWERS_FORMAT, "study": study, "tasks": list(tasks), "images": dict(images)}
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(template).render(
        script=Markup(script),
        style=Markup(style),
        script_hash=_hash(script),
        style_hash=_hash(style),
        content=Markup(_as_script_data(content)),
        intruders=sum(task["kind"] == "intruder" for task in tasks),
        names=sum(task["kind"] == "name" for task in tasks),
        attribution=attribution,
    )


def _as_script_data(content: Any) -> str:
    """JSON that no text in it can end: ``</script>`` and ``<!--`` need a ``<``."""
    text = json.dumps(content, ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(source: str) -> str:
    return "sha256-" + base64.b64encode(sha256(source.encode()).digest()).decode()

"""What studies write: results.json, tables.md, PNGs and one page."""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from mmhooks.report import Block, Listing, Page, Plot, Prose, Section, Table, TableBlock

Verdict = Literal["same", "differs", "open"]


def environment(start: float) -> dict[str, Any]:
    import open_clip
    import torch

    import mmhooks

    unit = 1024**3 if sys.platform == "darwin" else 1024**2
    return {
        "seconds": time.perf_counter() - start,
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "mmhooks": mmhooks.__version__,
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
    }


def write_study(
    out: Path,
    results: Mapping[str, Any],
    *,
    title: str,
    lead: str,
    claims: Sequence[tuple[Verdict, str, str]],
    tables: Sequence[Table],
    plots: Mapping[str, Plot],
    notes: Sequence[str],
    attribution: str,
) -> list[Path]:
    """Writes everything under ``out`` and returns the paths. ``claims``: verdict, claim, what was measured."""
    from mmhooks.analysis.results import plain

    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(
        json.dumps(plain(results), indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )
    paths = [out / "results.json"]
    for name, plot in plots.items():
        paths.append(out / f"{name}.png")
        paths[-1].write_bytes(plot.light.data)
    words = {"same": "holds", "differs": "does not hold", "open": "undecided"}
    lines = "\n".join(f"- **{words[verdict]}**: {claim}; {measured}" for verdict, claim, measured in claims)
    body = "\n\n".join([f"# {title}", lead, lines, *(t.markdown() for t in tables), *notes, attribution])
    (out / "tables.md").write_text(body + "\n", encoding="utf-8")
    shown: list[Block] = [Prose(note) for note in notes]
    sections = [
        Section("What was found", [Listing(list(claims)), *plots.values()]),
        Section("Numbers", [TableBlock(table) for table in tables]),
        Section("How it was made", [*shown, TableBlock(_settings(results))]),
    ]
    page = Page(title, sections, lead, "mmhooks · study", [attribution])
    return [*paths, out / "tables.md", page.save(out / "index.html")]


def _settings(results: Mapping[str, Any]) -> Table:
    env = results["environment"]
    rows = [[str(name), str(value)] for name, value in results["settings"].items()]
    rows.append(
        [
            "time and memory",
            f"{env['seconds']:.0f} s, {env['peak_memory_gb']:.2f} GB, {env['threads']} threads",
        ]
    )
    rows.append(["versions", ", ".join(f"{k} {env[k]}" for k in ("python", "mmhooks", "torch", "open_clip"))])
    return Table(["", ""], rows, "Settings", text_columns=(0, 1))

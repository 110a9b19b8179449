"""Hostile images, tables, tars, Parquet files, zips and cards: a DataError or a counted skip, and nothing else.

``--attack-rounds 15`` reads 300 of them, each in up to four ways.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("hostile_files.py")
WITNESS = Path("/tmp/mmhooks-was-here")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes, links and audit of files as on POSIX")
def test_hostile_files_end_in_our_errors_or_in_counted_skips(rounds, tmp_path):
    WITNESS.unlink(missing_ok=True)
    cases = rounds(20)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with (tmp_path / "stderr").open("wb") as said:
        run = subprocess.run(
            [sys.executable, str(SCRIPT), str(tmp_path), "0", str(cases)],
            env=environment, stdout=subprocess.PIPE, stderr=said, timeout=300 + 90 * cases, check=False,
        )  # fmt: skip
    lines = [json.loads(line) for line in run.stdout.decode().splitlines()]
    assert run.returncode == 0, (lines[-1], (tmp_path / "stderr").read_text(errors="replace")[-3000:])
    found = [line for line in lines if "way" in line]
    assert len({line["case"] for line in found}) == cases
    bad = [
        line
        for line in found
        if line["end"] not in ("read", "DataError")
        or line["done"]
        or line.get("leak")
        # Rows are missing, and nobody was told.
        or (line["end"] == "read" and line["expected"] and line["rows"] + line["skipped"] == 0)
        or (
            line["end"] == "read"
            and line["expected"]
            and line["rows"] < line["expected"]
            and not line["skipped"]
        )
    ]
    assert not bad, "\n".join(map(json.dumps, bad[:20]))
    assert not WITNESS.exists()
    print(
        Counter(
            line["end"] if line["end"] != "read" else f"read, skipped {line['skipped'] > 0}" for line in found
        )
    )
    print(f"{cases} cases, {len(found)} reads, slowest {max(line['seconds'] for line in found)} s")

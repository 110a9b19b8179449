"""Measures on unusual and invalid tensors: equal to a loop in float64, or refused with one of our errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("measure_faults.py")
MEASURES = ("mds", "density", "top", "embed_sim", "win_rate", "monosemanticity", "retrieval", "gap", "moments", "cknna",
            "fidelity", "bridge", "text_span", "groups", "sweep", "sweep, held out")  # fmt: skip


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """Runs in a separate process: the type checks of the tests, which users do not have, would refuse most of it first."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("measure", MEASURES)
def test_accepted_input_equals_a_loop_in_float64(found, measure):
    wrong = []
    for what, row in found[measure].items():
        if what.startswith("refused"):
            continue
        if "got" not in row:
            wrong.append((what, row))
        elif "wanted" in row and row["got"] != pytest.approx(row["wanted"], rel=1e-3, abs=2e-6, nan_ok=True):
            wrong.append((what, row["got"], row["wanted"]))
    assert not wrong, wrong


@pytest.mark.parametrize("measure", MEASURES)
def test_other_input_is_refused(found, measure):
    wrong = {
        what: row
        for what, row in found[measure].items()
        if what.startswith("refused") and "refused" not in row
    }
    assert not wrong, wrong

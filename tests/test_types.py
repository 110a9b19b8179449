"""What a type checker sees: from outside, of the public names; from inside, no error."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("node") is None, reason="pyright runs on node, which is not installed here"
    ),
]

SCRIPT = """\
import mmhooks as mm

model = mm.load("mini")
reveal_type(model)
reveal_type(mm.load_head("mini/sae"))
reveal_type(mm.studies.gender.Options(limit=3).limit)
model.attahc
mm.lod
"""


def pyright(*args: str, cwd: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, *args]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    assert done.stdout.startswith("{"), done.stdout + done.stderr
    return json.loads(done.stdout)["generalDiagnostics"]


def test_a_users_script_is_checked_against_the_real_names(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(ROOT)]}))
    found = pyright(str(script), cwd=tmp_path)
    told = {d["range"]["start"]["line"] + 1: (d["severity"], d["message"]) for d in found}
    assert told[4] == ("information", 'Type of "model" is "HookedCLIP"')
    assert "Head" in told[5][1] and "int" in told[6][1]
    assert told[7][0] == "error" and "attahc" in told[7][1]
    assert told[8][0] == "error" and "lod" in told[8][1]
    assert [d for d in found if d["severity"] == "error" and d["range"]["start"]["line"] < 6] == []


def test_no_error_inside() -> None:
    wrong = [d for d in pyright(cwd=ROOT) if d["severity"] == "error"]
    assert [f"{Path(d['file']).name}:{d['range']['start']['line'] + 1} {d['message']}" for d in wrong] == []

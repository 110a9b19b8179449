"""The decomposition study end to end on little data, and on another model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmhooks.analysis.decomposition.head_labels import HeadLabels
from mmhooks.studies.decomposition import study as decomposition
from mmhooks.studies.decomposition.study import app


def run(out: Path, *options: str) -> dict:
    result = CliRunner().invoke(app, [*options, "--out", str(out), "--quiet"])
    assert result.exit_code == 0, result.output + str(result.exception)
    return json.loads((out / "results.json").read_text())


@pytest.mark.slow
def test_mini(tmp_path):
    found = run(tmp_path, "--limit", "60", "--evaluate", "12", "--texts", "6", "--layers", "2", "--each", "2")
    span = found["text_span"]
    assert span["heads"] == [f"{n}.{h}" for n in (4, 5) for h in range(6)]
    assert all(len(texts) == 6 == len(set(texts)) for texts in span["texts"])
    assert all(curve == sorted(curve) and 0 < curve[-1] <= 1.0001 for curve in span["explained"])
    rebuilt = found["rebuilt"]["everything else kept"]
    assert rebuilt["full"]["value"] == pytest.approx(found["ablations"]["before"]["value"])
    only = found["ablations"]["names"].index("all but attention of the last 2")
    alone = found["rebuilt"]["everything else at its mean"]["full"]["value"]
    # Means over the same images: the same ablation by two ways.
    assert alone == pytest.approx(found["ablations"]["direct"][only]["value"])
    labels = HeadLabels.load(tmp_path / "head_labels.json")
    assert labels.texts["5.0"] == tuple(span["texts"][6]) and labels.kinds is not None
    assert sum(r["all"] for r in found["shares"]) == pytest.approx(1, abs=1e-3)
    page = (tmp_path / "index.html").read_text()
    assert "Neighbours by one attention head" in page and "http://" not in page
    assert (tmp_path / "tables.md").read_text().count("**Texts of attention heads**") == 1
    assert {p.name for p in tmp_path.glob("*.png")} >= {
        "heads.png",
        "neighbours.png",
        "neurons.png",
        "rebuilt.png",
    }


@pytest.mark.slow
def test_another_model_with_random_weights(tmp_path):
    own = tmp_path / "texts.txt"
    own.write_text(
        "\n".join(f"{c} {t}" for c in ("red", "blue", "green") for t in ("dog", "cat", "hat", "cup"))
    )
    out = tmp_path / "out"
    found = decomposition.run(
        decomposition.Options(
            model="ViT-B-32",
            limit=8,
            pool=str(own),
            live=False,
            layers=1,
            texts=3,
            each=2,
            out=out,
            quiet=True,
        )
    )
    assert found.found == json.loads((out / "results.json").read_text())
    assert {p.name for p in found.paths} == {p.name for p in out.iterdir()}
    assert len(found["text_span"]["heads"]) == 12 and found["labels"]["kinds"] is None
    assert all(live is None for live in found["ablations"]["live"])


def test_errors_are_one_line(tmp_path):
    result = CliRunner().invoke(app, ["--data", f"{tmp_path}/nowhere/", "--out", str(tmp_path / "out")])
    assert result.exit_code == 1 and "\ndecomposition: " in "\n" + result.output


def test_the_papers_settings_run_and_are_accounted_for(tmp_path):
    options = decomposition.Options.of_paper(
        model="mini",
        pretrained=None,
        limit=24,
        evaluate=6,
        texts=4,
        layers=1,
        each=1,
        quiet=True,
        out=tmp_path,
    )
    found = decomposition.run(options)
    status = {s["option"]: s["status"] for s in found["paper"]["settings"] if s["option"]}
    assert status["selection"] == status["live"] == "the paper's" and status["data"] == "not had"
    assert status["pool"] == "the paper's in part" and status["texts"] == "overridden"
    assert set(found["ablations"]["live"]) == {None}
    assert "3,498 sentences" in (tmp_path / "index.html").read_text()
    assert "metadata.csv" in (tmp_path / "tables.md").read_text()

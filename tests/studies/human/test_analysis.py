"""From files of answers to verdicts: planted participants are found again, and files that do not belong are refused."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from mmhooks.cli import app
from mmhooks.errors import DataError
from mmhooks.studies.human import analyse
from mmhooks.studies.human.analysis import tables_of
from mmhooks.studies.human.comparisons import COMPARED
from mmhooks.studies.human.export import Export, export
from mmhooks.studies.human.naming import naming, plain_name
from mmhooks.studies.human.options import Options
from mmhooks.studies.human.source import open_run

RATES = {"ImgD": 0.9, "TextD": 0.3, "CrossD": 0.6, "random": 0.2, "check": 1.0}


def answers(key: Any, name: str, seed: int, rates: Any = RATES) -> dict[str, Any]:
    """What a participant saves who solves tasks of each group at a known rate."""
    rng = random.Random(seed)
    found = {}
    for task, item in key["items"].items():
        if item["kind"] == "name":
            found[task] = {"name": rng.choice(["a flag", "Flags", ""])}
            continue
        wrong = [i for i in range(key["choices"]) if i != item["correct"]]
        right = rng.random() < rates[item["group"]]
        found[task] = {"choice": item["correct"] if right else rng.choice(wrong), "seconds": 1.0, "place": 0}
    return {"format": "mmhooks human answers 1", "study": key["study"], "participant": name, "answers": found}


def write(folder: Path, *contents: dict[str, Any]) -> list[Path]:
    paths = [folder / f"{i}.json" for i in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_text(json.dumps(content))
    return paths


def test_planted_participants_are_found(exported: Export, key: Any, tmp_path: Path) -> None:
    people = [answers(key, f"P{i}", i) for i in range(20)]
    careless = answers(key, "careless", 99, dict.fromkeys(RATES, 0.2) | {"check": 0.0})
    found = analyse(write(tmp_path, *people, careless), key=exported.key, out=tmp_path / "out")
    assert found["participants"] == 20 and found["left_out"] == ["careless"] and found["chance"] == 0.2
    for side, groups in found["accuracy"].items():
        for group, rate in groups.items():
            items = [
                t
                for t, i in key["items"].items()
                if (i["kind"], i["side"], i["group"]) == ("intruder", side, group)
            ]
            hits = [p["answers"][t]["choice"] == key["items"][t]["correct"] for p in people for t in items]
            assert rate["value"] == pytest.approx(sum(hits) / len(hits)) and rate["n"] == len(hits)
            assert rate["low"] <= RATES[group] <= rate["high"] and found["tasks"][side][group] == len(items)
    outcomes = {name: d["outcome"] for name, d in found["primaries"].items()}
    assert outcomes["ImgD against random lists, images"] == "shown"
    tested = {name for name, d in found["primaries"].items() if d["p"] is not None}
    assert tested == set(COMPARED) - set(exported.undecidable)
    assert found["alpha"]["image"]["ImgD"]["value"] > 0.5 and found["alpha"]["image"]["check"]["value"] == 1
    assert found["alpha"]["text"]["random"]["low"] < 0.1
    text = (tmp_path / "out" / "tables.md").read_text()
    assert all(table.caption in text for table in tables_of(found.found)) and "no intruder" in text
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found.found


def test_a_comparison_without_tasks_is_not_tested(exported: Export, key: Any, tmp_path: Path) -> None:
    """One feature alone says nothing about others."""
    key = json.loads(json.dumps(key))
    dropped = [
        t
        for t, i in key["items"].items()
        if (i["kind"], i["side"], i["group"]) == ("intruder", "text", "TextD")
    ]
    for task in dropped[1:]:
        del key["items"][task]
    (tmp_path / "key.json").write_text(json.dumps(key))
    found = analyse(write(tmp_path, *(answers(key, f"P{i}", i) for i in range(4))), key=tmp_path / "key.json")
    one = found["primaries"]["TextD against ImgD, texts"]
    assert one["p"] is None and one["outcome"] == "undecided" and "not tested" in one["verdict"]
    assert found["primaries"]["ImgD against random lists, images"]["p"] is not None
    assert found.paths == ()


def refused(exported: Export, paths: list[Path]) -> str:
    with pytest.raises(DataError) as fault:
        analyse(paths, key=exported.key)
    return str(fault.value)


def test_nobody_attentive_is_refused(exported: Export, key: Any, tmp_path: Path) -> None:
    people = [answers(key, name, i, RATES | {"check": 0.0}) for i, name in enumerate("AB")]
    said = refused(exported, write(tmp_path, *people))
    assert "at least 75% of the 4 attention checks, got none of 2 (solved: A 0, B 0)" in said


def test_answers_to_another_export_are_refused(exported: Export, key: Any, run: Path, tmp_path: Path) -> None:
    other = export(Options(run=run, out=tmp_path, features=5, names=2, lists=4, seed=1))
    assert other.study != exported.study
    mine = write(tmp_path, answers(json.loads(other.key.read_text()), "A", 0))
    assert f"expected answers to study {exported.study}" in refused(exported, mine)
    again = export(Options(run=run, out=tmp_path / "again", features=5, names=2, lists=4))
    assert again.page.read_bytes() == exported.page.read_bytes()  # wherever it is written


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a, task: a.pop("answers"), "expected 'answers' in it"),
        (lambda a, task: a.update(format="something"), "expected 'mmhooks human answers 1' as 'format', got 'something'"),
        (lambda a, task: a.update(participant=" "), "expected the participant's code, got an empty one"),
        (lambda a, task: a.update(answers=[1]), "expected an object as 'answers', got a list of 1"),
        (lambda a, task: a["answers"].update({"zzz\x1b": {"choice": 1}}), "got one to 'zzz"),
        (lambda a, task: a["answers"][task].update(choice=5), "expected a choice from 0 to 4, got 5"),
        (lambda a, task: a["answers"][task].update(choice=True), "expected a whole number as 'choice', got True"),
        (lambda a, task: a["answers"].update({task: {"name": "x"}}), "expected 'choice' in it"),
        (lambda a, task: a["answers"].update({task: 3}), "expected an object, got 3"),
    ],
)  # fmt: skip
def test_malformed_answers_are_refused(
    exported: Export, key: Any, tmp_path: Path, change: Any, said: str
) -> None:
    content = answers(key, "A", 0)
    change(content, next(t for t, i in key["items"].items() if i["kind"] == "intruder"))
    message = refused(exported, write(tmp_path, content))
    assert said in message and str(tmp_path) in message and "\x1b" not in message


def test_files_that_are_no_answers_are_refused(exported: Export, key: Any, tmp_path: Path) -> None:
    assert "expected files with answers, got none" in refused(exported, [])
    (tmp_path / "x.json").write_text("{")
    assert "cannot be parsed" in refused(exported, [tmp_path / "x.json"])
    twice = write(tmp_path, answers(key, "Ann", 0), answers(key, "ann ", 1))
    assert "got a second one of 'ann'" in refused(exported, twice)
    with pytest.raises(DataError, match=r"give the key\.json"):
        analyse(twice[:1], key=twice[0])


def test_runs_that_changed_are_refused(run: Path, tmp_path: Path) -> None:
    original = json.loads((run / "results.json").read_text())

    def refusal(change: Any, **options: Any) -> str:
        results = json.loads(json.dumps(original))
        change(results)
        (tmp_path / "results.json").write_text(json.dumps(results))
        with pytest.raises(DataError) as fault:
            export(replace(Options(run=tmp_path, out=tmp_path / "out"), **options))
        return str(fault.value)

    assert "run's pairs (x)" in refusal(lambda r: r["data"].update(fingerprint="x"))
    assert "run's head (x)" in refusal(lambda r: r["models"]["CLIP+SAE"].update(head="x"))
    scores = original["models"]["CLIP+SAE"]["mds"]["scores"]
    shifted = [None if r is None else r + 0.01 for r in scores]
    assert "got others" in refusal(lambda r: r["models"]["CLIP+SAE"]["mds"].update(scores=shifted))
    assert "expected a model with a head (CLIP+SAE), got 'CLIP+NCL'" in refusal(
        lambda r: None, study_model="CLIP+NCL"
    )
    assert "got none for model, data, seed" in refusal(lambda r: r.update(settings={}))
    assert not (tmp_path / "out").exists()


def test_a_run_without_families_is_opened_without_families(run: Path, tmp_path: Path) -> None:
    """``--family none`` of the modality study is no column."""
    results = json.loads((run / "results.json").read_text())
    n = results["settings"]["limit"]
    assert len(open_run(run, "CLIP+SAE").families.unique()) < n
    results["settings"]["family"] = "none"
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert torch.equal(open_run(tmp_path, "CLIP+SAE").families, torch.arange(n))


def test_commands(exported: Export, key: Any, run: Path, tmp_path: Path) -> None:
    def command(*words: str) -> str:
        done = CliRunner().invoke(app, ["human", *words], env={"COLUMNS": "200", "TERM": "dumb"})
        assert done.exit_code == 0, done.output
        return done.output

    said = command(
        "export", "--run", str(run), "--out", str(tmp_path / "e"), "--features", "40", "--names", "0"
    )
    assert "tasks.html" in said and "fewer than asked for: ImgD, images:" in said and "80 % power" in said
    assert "--study-model" in command("export", "--help")
    assert "| 20 |" in command("plan", "--rate", "0.6")
    people = write(tmp_path, *(answers(key, f"P{i}", i) for i in range(4)))
    said = command(
        "analyse",
        *map(str, people),
        "--key",
        str(exported.key),
        "--out",
        str(tmp_path / "a"),
        "--embedder",
        "",
    )
    assert "ImgD against TextD, images" in said and (tmp_path / "a" / "results.json").exists()
    bad = CliRunner().invoke(
        app, ["human", "analyse", str(tmp_path / "none.json"), "--key", str(exported.key), "--embedder", ""]
    )
    assert bad.exit_code == 1 and "cannot be read" in bad.output and "Traceback" not in bad.output


def test_names_agree_as_pairs_of_participants_do() -> None:
    given = {"a": ["The flag!", "flag", "", "dog"], "b": ["cat", "Cat"], "c": ["", ""], "d": []}
    vectors = {"flag": [1.0, 0.0], "dog": [0.0, 1.0], "cat": [0.6, 0.8]}

    def embed(texts: Any) -> torch.Tensor:
        return torch.tensor([vectors[t] for t in texts])

    found = naming(given, embed)
    assert found["tasks"] == 3 and plain_name("An  A-B c.") == "b c"
    assert found["exact"].value == pytest.approx((1 / 3 + 1) / 2)  # flag-flag of three pairs, cat-cat of one
    assert found["nothing"].value == pytest.approx((1 / 4 + 0 + 1) / 3)
    across = (0.6 + 0.6 + 0.8) / 3  # every name of a with every name of b
    assert found["similarity"].value == pytest.approx(((1 + 0 + 0) / 3 - across + 1 - across) / 2, abs=1e-6)

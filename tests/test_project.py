"""What a project shows beside its code: the tree, one version everywhere, forms, workflows and hooks before a commit."""

from __future__ import annotations

import re
import shlex
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import mmhooks

ROOT = Path(__file__).parent.parent
GITHUB = ROOT / ".github"
TOP = {
    "mmhooks",
    "recipes",
    "tests",
    "benchmarks",
    "docs",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "CITATION.cff",
}
DOTTED = {".ci", ".github", ".gitignore", ".pre-commit-config.yaml"}
FORMS = sorted(p for p in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if p.name != "config.yml")


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_top_level_holds_nothing_else() -> None:
    made = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line]
    shown = {p.name for p in ROOT.iterdir() if not p.name.startswith(".")}
    stray = {name for name in shown - TOP if not any(Path(name).match(pattern) for pattern in made)}
    assert stray == set() and shown >= TOP
    assert {p.name for p in ROOT.iterdir()} >= DOTTED


def test_one_version_everywhere() -> None:
    version = project()["version"]
    latest = re.search(r"^## (\S+)", (ROOT / "docs" / "changelog.md").read_text(encoding="utf-8"), re.M)
    assert latest is not None
    assert {mmhooks.__version__, str(read_yaml(ROOT / "CITATION.cff")["version"]), latest.group(1)} == {
        version
    }


def test_the_citation_has_what_the_format_requires() -> None:
    cited = read_yaml(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= cited.keys() and cited["type"] == "software"
    assert cited["license"] == project()["license"] and cited["authors"]
    for reference in cited["references"]:
        assert {"type", "title", "authors"} <= reference.keys()
        # The README says whose method it is, in the same order.
        names = ", ".join(author["family-names"] for author in reference["authors"])
        assert f"{names}, *{reference['title']}*" in re.sub(r"\s+", " ", (ROOT / "README.md").read_text())


def test_the_classifiers_agree_with_what_is_declared() -> None:
    declared = project()
    versions = [c.split(" :: ")[-1] for c in declared["classifiers"] if "Python :: 3." in c]
    assert f">={versions[0]}" == declared["requires-python"]
    # An index refuses a licence that is given twice, as an expression and as a classifier.
    assert not [c for c in declared["classifiers"] if c.startswith("License ::")]
    assert (ROOT / "mmhooks" / "py.typed").exists() == ("Typing :: Typed" in declared["classifiers"])


@pytest.mark.parametrize("page", sorted(GITHUB.glob("*.md")), ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_page_for_contributors_names_what_exists() -> None:
    text = (GITHUB / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 75, "the house in one page"
    paths = re.findall(r"(?:tests|docs|mmhooks|recipes|benchmarks|\.ci)/[\w./]*", text)
    made = {"docs/_build"}
    assert len(paths) > 15 and [p for p in paths if p not in made and not (ROOT / p).exists()] == []


@pytest.mark.parametrize("form", FORMS, ids=lambda p: p.stem)
def test_an_issue_form_is_one_that_github_shows(form: Path) -> None:
    asked = read_yaml(form)
    assert all(isinstance(asked[key], str) and asked[key] for key in ("name", "description"))
    fields = asked["body"]
    assert all(field["type"] in ("textarea", "input") and field["attributes"]["label"] for field in fields)
    assert len({field["id"] for field in fields}) == len(fields)
    assert any(field["validations"]["required"] for field in fields)


def test_there_are_forms() -> None:
    assert {form.stem for form in FORMS} == {"bug", "number", "proposal"}


def commands(workflow: str) -> list[str]:
    jobs = read_yaml(GITHUB / "workflows" / workflow)["jobs"]
    return [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]


def test_the_workflows_run_what_is_run_here() -> None:
    assert commands("ci.yml") == [".ci/run"]
    (release,) = commands("release.yml")
    script = ROOT / shlex.split(release)[1]
    assert script.exists() and "--work" in shlex.split(release)
    for path in sorted((GITHUB / "workflows").glob("*.yml")):
        text, read = path.read_text(encoding="utf-8"), read_yaml(path)
        assert read["permissions"] == {"contents": "read"}, path.name
        assert set(re.findall(r'python-version: "(.+)"', text)) == {project()["requires-python"][2:]}, (
            path.name
        )
        assert all(step.get("uses", "actions/").startswith("actions/")
                   for job in read["jobs"].values() for step in job["steps"]), path.name  # fmt: skip


def test_hooks_before_a_commit_come_from_the_active_environment() -> None:
    (source,) = read_yaml(ROOT / ".pre-commit-config.yaml")["repos"]
    assert source["repo"] == "local"
    assert [hook["entry"].split()[0] for hook in source["hooks"]] == ["ruff", "ruff", "lint-imports"]
    for hook in source["hooks"]:
        command = Path(sys.executable).parent / hook["entry"].split()[0]
        assert hook["language"] == "system" and command.exists(), hook["id"]

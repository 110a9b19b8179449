"""pyproject's ranges leave room for SAELens: what it asks is written down here, and what was installed beside it.

``saelens.py`` beside this file builds the environment; this test needs no index, and breaks when a range of ours is
narrowed past what SAELens allows.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]

# Requires-Dist of the wheels on PyPI on 2026-11-28, without extras: sae-lens 6.54.12, the newest, and
# transformer-lens 3.9.0, the newest that it allows.
ASKED = {
    "sae-lens": """
        transformer-lens>=2.16.1,<4.0.0
        transformers>=4.38.1,<6.0.0
        plotly>=5.19.0
        plotly-express>=0.4.1
        datasets>=3.1.0
        babe>=0.0.7,<0.0.8
        nltk>=3.8.1,<4.0.0
        safetensors>=0.4.2,<1.0.0
        python-dotenv>=1.0.1
        pyyaml>=6.0.1,<7.0.0
        typing-extensions>=4.10.0,<5.0.0
        simple-parsing>=0.1.8,<0.2.0
        tenacity>=9.0.0
    """,
    "transformer-lens": """
        accelerate>=0.23.0
        beartype>=0.14.1
        better-abc>=0.0.3
        datasets>=2.7.1
        einops>=0.6.0
        fancy-einsum>=0.0.3
        huggingface-hub>=0.23.2
        jaxtyping>=0.3
        numpy>=1.24
        packaging>=23.0
        pandas>=1.1.5
        protobuf>=3.20.0
        rich>=12.6.0
        sentencepiece
        torch>=2.6
        tqdm>=4.64.1
        transformers-stream-generator<0.1,>=0.0.5
        transformers>=5.9.0
        typeguard<5,>=4.2
        typing-extensions
        wandb>=0.13.5
    """,
}
PYTHON = {"sae-lens": ">=3.10,<4.0", "transformer-lens": ">=3.10,<4.0"}
# The versions that pip chose for all three in one environment on that day; `pip check` had nothing to say.
INSTALLED = {
    "accelerate": "1.15.0", "datasets": "5.2.0", "einops": "0.8.2", "huggingface-hub": "2.4.0", "jaxtyping": "0.3.11",
    "numpy": "2.4.6", "pyyaml": "6.0.4", "rich": "15.0.0", "safetensors": "0.8.0", "torch": "2.14.1",
    "transformer-lens": "3.9.0", "transformers": "5.24.0",
}  # fmt: skip


def theirs() -> dict[str, SpecifierSet]:
    """What SAELens and its TransformerLens ask of each package, together."""
    asked: dict[str, SpecifierSet] = {}
    for line in "".join(ASKED.values()).split("\n"):
        if line.strip():
            wanted = Requirement(line.strip())
            name = canonicalize_name(wanted.name)
            asked[name] = asked.get(name, SpecifierSet()) & wanted.specifier
    return asked


def refused(dependencies: list[str]) -> dict[str, str]:
    """The packages asked for by both sides whose written-down version one side does not take."""
    ours = {canonicalize_name(r.name): r.specifier for r in map(Requirement, dependencies)}
    return {
        name: f"ours {ours[name]}, theirs {asked}, installed {INSTALLED[name]}"
        for name, asked in theirs().items()
        if name in ours and not (ours[name] & asked).contains(INSTALLED[name])
    }


def test_one_version_of_each_package_serves_both() -> None:
    both = {canonicalize_name(Requirement(d).name) for d in PROJECT["dependencies"]} & set(theirs())
    assert both == set(INSTALLED)  # a dependency new to us that they ask for too belongs in the table
    assert refused(PROJECT["dependencies"]) == {}


@pytest.mark.parametrize("name", PYTHON)
def test_every_python_of_ours_is_one_of_theirs(name: str) -> None:
    ours, asked = SpecifierSet(PROJECT["requires-python"]), SpecifierSet(PYTHON[name])
    minors = [f"3.{n}" for n in range(8, 20)]
    assert {v for v in minors if v in ours} and {v for v in minors if v in ours} <= {
        v for v in minors if v in asked
    }


@pytest.mark.parametrize(
    "narrow", ["transformer_lens>=4.0", "transformers>=6", "transformers<5.9", "datasets<5", "safetensors>=1"]
)
def test_a_narrower_range_would_be_noticed(narrow: str) -> None:
    name = canonicalize_name(Requirement(narrow).name)
    kept = [d for d in PROJECT["dependencies"] if canonicalize_name(Requirement(d).name) != name]
    assert list(refused([*kept, narrow])) == [name]

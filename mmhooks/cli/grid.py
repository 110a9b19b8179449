"""The heads of one ``mmhooks train``: from its options, or many from a YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import typer


class Kind(StrEnum):
    topk = "topk"
    batchtopk = "batchtopk"
    matryoshka = "matryoshka"
    jumprelu = "jumprelu"
    relu = "relu"
    gated = "gated"
    matching_pursuit = "matching_pursuit"
    archetypal = "archetypal"
    ncl = "ncl"
    transcoder = "transcoder"


@dataclass(frozen=True)
class HeadChoice:
    """A head to train.

    Attributes:
        name: of its folder.
        sites: image site and text site, or one; separated by commas.
    """

    kind: Kind = Kind.topk
    features: int = 1024
    k: int = 32
    seed: int = 0
    sites: str = "image.embed,text.embed"
    lr: float | None = None
    normalize: bool = True
    name: str = ""

    @property
    def site_names(self) -> list[str]:
        return self.sites.split(",")


def read_grid(path: Path, base: HeadChoice) -> list[HeadChoice]:
    """The heads of a YAML file, a list under ``heads``; what an entry leaves out is as in ``base``.

    Raises:
        BadParameter: no such list, an unknown key, a value of another type, or two heads of one name.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as fault:
        raise typer.BadParameter(f"--heads: {path} cannot be read as YAML: {fault}") from None
    entries = content.get("heads") if isinstance(content, Mapping) else None
    if not isinstance(entries, list) or not entries:
        raise typer.BadParameter(
            f"--heads: expected a list under heads: in {path}, such as heads: [{{features: 1024, k: 16}}], got "
            f"{type(content).__name__}"
        )
    chosen = [_choice(entry, base, f"{path}, head {i}") for i, entry in enumerate(entries)]
    names = [choice.name for choice in chosen]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise typer.BadParameter(f"--heads: two heads of {path} are named {twice[0]!r}; give each a name:")
    return chosen


def _choice(entry: Any, base: HeadChoice, where: str) -> HeadChoice:
    known = {field.name: getattr(base, field.name) for field in fields(HeadChoice)}
    if not isinstance(entry, Mapping) or not entry.keys() <= known.keys():
        got = ", ".join(map(str, entry.keys() - known.keys())) if isinstance(entry, Mapping) else repr(entry)
        raise typer.BadParameter(f"--heads: {where}: expected the keys {', '.join(known)}, got {got}")
    values = dict(entry)
    if "sites" in values and isinstance(values["sites"], list):
        values["sites"] = ",".join(map(str, values["sites"]))
    if "kind" in values:
        try:
            values["kind"] = Kind(values["kind"])
        except ValueError:
            raise typer.BadParameter(
                f"--heads: {where}: expected a kind of {', '.join(Kind)}, got {values['kind']!r}"
            ) from None
    wanted: dict[str, tuple[type, ...]] = {
        "features": (int,), "k": (int,), "seed": (int,), "sites": (str,), "lr": (int, float), "normalize": (bool,),
        "name": (str,),
    }  # fmt: skip
    for key, types in wanted.items():
        if key in values and (
            not isinstance(values[key], types) or (bool not in types and isinstance(values[key], bool))
        ):
            raise typer.BadParameter(
                f"--heads: {where}: expected {key} to be {' or '.join(t.__name__ for t in types)}, got {values[key]!r}"
            )
    choice = replace(base, **values)
    if choice.name in ("", base.name):
        places = "" if choice.sites == base.sites else f"-{choice.sites.replace(',', '+')}"
        choice = replace(
            choice, name=f"{choice.kind}-n{choice.features}-k{choice.k}-seed{choice.seed}{places}"
        )
    return choice

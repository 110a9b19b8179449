"""People in many drawing styles: the training corpus (recipes/embedded/corpus.py), with the code points of its names."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import safe_open

from mmhooks.data.pair_set import Pairs, Row
from mmhooks.data.sources.drawings import SOURCES
from mmhooks.data.sources.openmoji import emoji_names
from mmhooks.studies.gender.samples import gender_of_codepoints, is_single_person

OTHERS = 4000  # drawings of other things, so that the groups of features are those of all data


def is_corpus(place: str) -> bool:
    return (Path(place).expanduser() / "rows.json").is_file()


def style_pairs(place: str, *, seed: int = 0, others: int = OTHERS) -> Pairs:
    """Returns the people of every style, the held-out style included, and ``others`` other drawings.

    ``meta`` holds the style and the code points of the name.
    """
    folder = Path(place).expanduser()
    table, pixels = (folder / "rows.json").read_bytes(), folder / "rgba.safetensors"
    rows: list[dict[str, Any]] = json.loads(table)
    codes: dict[str, str] = {}
    for code, (name, _) in emoji_names().items():
        codes.setdefault(_plain(name), code)
    people, rest = [], []
    for i, row in enumerate(rows):
        code = codes.get(_plain(row["name"]))
        person = code is not None and (gender_of_codepoints(code) is not None or is_single_person(code))
        (people if person else rest).append((i, code))
    rest = random.Random(seed).sample(rest, min(others, len(rest)))
    chosen = sorted([*people, *((i, None) for i, _ in rest)], key=lambda entry: entry[0])
    styles = {rows[i]["style"] for i, _ in chosen}
    return Pairs(
        [_row(i, rows[i], code) for i, code in chosen],
        _Rasters(pixels),
        name=str(folder),
        content=f"{blake2b(table, digest_size=10).hexdigest()} {pixels.stat().st_size} {pixels.stat().st_mtime_ns}",
        licence="; ".join(dict.fromkeys(s.licence for s in SOURCES if s.style in styles)),
        attribution="; ".join(f"{s.attribution} ({s.licence})" for s in SOURCES if s.style in styles),
    )


def _row(i: int, row: Mapping[str, Any], code: str | None) -> Row:
    meta = {"style": row["style"], **({"codepoints": code} if code else {})}
    return Row(f"{row['style']}/{i}", row["name"], i, row["split"], meta)


def _plain(name: str) -> str:
    return " ".join(re.sub(r"[\W_]+", " ", name.lower()).split())


class _Rasters:
    """The corpus's images, read one at a time."""

    def __init__(self, path: Path) -> None:
        self._slice = safe_open(path, "np").get_slice("rgba")

    def open(self, image_key: int | str) -> Image.Image:
        i = int(image_key)
        return Image.fromarray(self._slice[i : i + 1][0])

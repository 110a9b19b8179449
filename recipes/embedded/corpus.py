"""Builds the corpus of drawings that the embedded models are trained on, from installed packages; it is not committed.

Every source is a package of npm, PyPI or Debian whose drawings are free; `SOURCES` names each with its licence.
Drawings are rasterised once to RGBA and stored with their names and keywords.

    npm install @iconify-json/{openmoji,noto,noto-v1,twemoji,emojione,emojione-v1,fluent-emoji,fluent-emoji-flat} \\
                @iconify-json/{fxemoji,streamline-emojis,game-icons,flat-color-icons} emojibase-data
    apt-get install openclipart-svg        # Debian; optional
    PYTHONPATH=recipes python -m embedded.corpus --node-modules node_modules --out runs/corpus
"""

from __future__ import annotations

import json
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated
from xml.etree import ElementTree

import numpy as np
import torch
import typer
from rich.progress import track
from safetensors.torch import save_file

from mmhooks.data.sources.drawings import SIZE, SOURCES, UNSEEN_STYLE, Corpus, crc32_of, plain_codepoints
from mmhooks.data.splits import Split, concept_key, split_of
from mmhooks.utils.files import write_text

# Folders of Open Clip Art that hold shapes and theme files rather than drawings of things.
_NO_DRAWINGS = ("shapes", "computer/icons", "computer/buttons", "special", "signs_and_symbols/led",
                "signs_and_symbols/flags", "signs_and_symbols/clocks", "transportation/roadsigns")  # fmt: skip


@dataclass(frozen=True)
class Drawing:
    style: str
    name: str
    keywords: tuple[str, ...]
    toned: bool  # one of several skin tones of the same drawing
    svg: str = field(repr=False)

    @property
    def concept(self) -> str:
        return concept_key(self.name)

    @property
    def split(self) -> Split | str:
        return "unseen_style" if self.style == UNSEEN_STYLE else split_of(self.style, self.name)


def build(out: Path, node_modules: Path, openclipart: Path, workers: int = 2) -> Corpus:
    """Rasterises every source into ``out``.

    Raises:
        FileNotFoundError: the package of a source is missing.
    """
    drawings = [*_emoji_drawings(node_modules), *_openclipart(openclipart)]
    with ProcessPoolExecutor(workers) as pool:
        images = list(track(pool.map(_rasterise, [d.svg for d in drawings], chunksize=64),
                              total=len(drawings), description="rasterise"))  # fmt: skip
    kept = [(d, p) for d, p in zip(drawings, images, strict=True) if p is not None]
    typer.echo(f"{len(kept)} of {len(drawings)} drawings rasterised")
    out.mkdir(parents=True, exist_ok=True)
    save_file({"rgba": torch.from_numpy(np.stack([p for _, p in kept]))}, out / "rgba.safetensors")
    rows = []
    for drawing, _ in kept:
        row = asdict(drawing) | {"concept": drawing.concept, "split": drawing.split}
        del row["svg"]
        rows.append(row)
    write_text(out / "rows.json", json.dumps(rows))
    return Corpus(out)


def _rasterise(svg: str) -> np.ndarray | None:
    from PIL import Image
    from resvg_py import svg_to_bytes

    from mmhooks.data.sources.images import open_image

    try:
        png = svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE)
        image = open_image(bytes(png)).convert("RGBA")
    except Exception:  # parse errors of resvg; the number of drawings that worked is printed
        return None
    box = image.getbbox()
    if box is None:
        return None
    side = Image.new("RGBA", (SIZE, SIZE))
    image.thumbnail((SIZE, SIZE))
    side.paste(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2))
    return np.asarray(side)


def _emoji_drawings(node_modules: Path) -> list[Drawing]:
    names, keywords = _emoji_names(node_modules / "emojibase-data")
    by_letters = {re.sub(r"\W|_", "", name.lower()): name for name in names.values()}
    drawings = []
    for source in SOURCES:
        if source.style == "openclipart":
            continue
        pack = node_modules / "@iconify-json" / source.style
        if not pack.is_dir():
            raise FileNotFoundError(f"{source.style} is missing: npm install @iconify-json/{source.style}")
        icons = json.loads((pack / "icons.json").read_text())
        chars = {slug: code for code, slug in json.loads((pack / "chars.json").read_text()).items()}
        for slug, icon in icons["icons"].items():
            code = plain_codepoints(chars[slug]) if slug in chars else ""
            name = names.get(code) or by_letters.get(slug.replace("-", "")) or _spoken(slug)
            known = name in keywords
            if source.style == "fxemoji" and not known:
                continue  # its slugs have no word boundaries, so they are not captions
            toned = "skin tone" in name
            width = icon.get("width", icons.get("width", 16))
            height = icon.get("height", icons.get("height", 16))
            body = icon["body"]
            if source.ink:
                body = body.replace("currentColor", source.ink[crc32_of(slug) % len(source.ink)])
            left, top = icon.get("left", 0), icon.get("top", 0)
            svg = (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                   f'viewBox="{left} {top} {width} {height}" width="{SIZE}" height="{SIZE}">{body}</svg>')  # fmt: skip
            drawings.append(Drawing(source.style, name, keywords.get(name, ()), toned, svg))
    return drawings


def _spoken(slug: str) -> str:
    """Returns a slug as words; Fluent names skin tones only by shade, Streamline numbers its variants."""
    words = re.sub(r" \d$", "", slug.replace("-", " ").removesuffix(" default"))
    return re.sub(r" ((?:medium )?(?:light|dark)|medium)$", r" \1 skin tone", words)


@cache
def _emoji_names(emojibase: Path) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Codepoints -> name, and name -> keywords, of every emoji and its skin tones."""
    from emoji import EMOJI_DATA

    spoken = {plain_codepoints("-".join(f"{ord(c):x}" for c in char)): data["en"].strip(":").replace("_", " ").lower()
              for char, data in EMOJI_DATA.items()}  # fmt: skip
    names, keywords = dict(spoken), {}
    for entry in json.loads((emojibase / "en" / "data.json").read_text()):
        tags = tuple(entry.get("tags", ()))
        for item in (entry, *entry.get("skins", ())):
            code = plain_codepoints(item["hexcode"])
            label = names.setdefault(code, item["label"].lower())
            keywords[label] = tags
    return names, keywords


def _openclipart(folder: Path) -> list[Drawing]:
    drawings = []
    for path in sorted(folder.rglob("*.svg")):
        place = path.relative_to(folder).as_posix()
        if place.startswith(_NO_DRAWINGS) or path.stat().st_size > 400_000:
            continue
        svg = path.read_text(errors="replace")
        name = _clip_name(svg, path.stem)
        if name is not None:
            topics = tuple(part.replace("_", " ") for part in path.relative_to(folder).parts[:-1])
            drawings.append(Drawing("openclipart", name, topics, False, svg))
    return drawings


def _clip_name(svg: str, stem: str) -> str | None:
    """Returns the title in the file if it looks like one, else the file's name without its author."""
    title = ""
    try:
        for element in ElementTree.fromstring(svg).iter("{http://purl.org/dc/elements/1.1/}title"):
            if element.text and element.text.strip():
                title = element.text.strip()
                break
    except ElementTree.ParseError:
        return None
    if not re.fullmatch(r"[A-Za-z][A-Za-z ,'\-]{2,40}", title):
        title = re.split(r"__|_-_|_\d|_[a-z]*\d{2,}_?", stem)[0]
    words = re.sub(r"[_\W\d]+", " ", title).strip().lower()
    words = re.sub(
        r"\b(?:architetto|francesco|rollandin|ganson|jean victor balin|gerald g|simple|fast food)\b",
        "",
        words,
    )
    words = " ".join(words.split())
    return words if len(words) >= 3 else None


def main(
    node_modules: Annotated[Path, typer.Option(help="folder that npm installed the packages into")],
    out: Annotated[Path, typer.Option()] = Path("runs/corpus"),
    openclipart: Annotated[Path, typer.Option(help="Debian's openclipart-svg")] = Path(
        "/usr/share/openclipart/svg"
    ),
    workers: int = 2,
) -> None:
    """Builds the training corpus: PYTHONPATH=recipes python -m embedded.corpus --node-modules node_modules"""
    from collections import Counter

    corpus = build(out, node_modules, openclipart, workers)
    for key in ("style", "split"):
        typer.echo(json.dumps(Counter(row[key] for row in corpus.rows)))


if __name__ == "__main__":
    typer.run(main)

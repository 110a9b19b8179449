"""Reduces open_clip's byte-pair merges to those that the training corpus uses; writes the mini models' vocabulary.

A merge is kept if applying the whole table to any word of the corpus uses it, so every such word is still split into
the same pieces.

    PYTHONPATH=recipes python -m embedded.vocabulary --corpus runs/corpus
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Annotated

import typer

from mmhooks.utils.files import write_bytes

TARGET = Path(__file__).parents[2] / "mmhooks" / "assets" / "mini" / "merges.txt.gz"


def used_merges(texts: list[str]) -> list[str]:
    import regex
    from open_clip.tokenizer import SimpleTokenizer, get_pairs

    whole = SimpleTokenizer()
    words = {w for text in texts for w in regex.findall(whole.pat, text.lower())}
    used: set[tuple[str, str]] = set()
    for word in words:
        letters = [whole.byte_encoder[b] for b in word.encode()]
        pieces = (*letters[:-1], letters[-1] + "</w>")
        while len(pieces) > 1:
            best = min(get_pairs(pieces), key=lambda pair: whole.bpe_ranks.get(pair, float("inf")))
            if best not in whole.bpe_ranks:
                break
            used.add(best)
            joined, i = [], 0
            while i < len(pieces):
                if pieces[i : i + 2] == best:
                    joined.append("".join(best))
                    i += 2
                else:
                    joined.append(pieces[i])
                    i += 1
            pieces = tuple(joined)
    return [" ".join(pair) for pair in sorted(used, key=whole.bpe_ranks.__getitem__)]


def main(corpus: Annotated[Path, typer.Option()] = Path("runs/corpus"), target: Path = TARGET) -> None:
    """Write the merges that the corpus uses: PYTHONPATH=recipes python -m embedded.vocabulary --corpus runs/corpus"""
    rows = json.loads((corpus / "rows.json").read_text())
    texts = [t for row in rows for t in (row["name"], *row["keywords"])]
    texts.append("a drawing picture icon cartoon emoji of an the with photo and man woman person")
    merges = used_merges(texts)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(target, gzip.compress("\n".join(merges).encode(), mtime=0))
    typer.echo(f"{len(merges)} merges of open_clip's 48,894 kept")


if __name__ == "__main__":
    typer.run(main)

"""Commands that list what is available: models, their sites, and image-text pairs."""

from __future__ import annotations

from typing import Annotated

import typer

from mmhooks.utils.clear_errors import clear_errors
from mmhooks.utils.say import say

Pretrained = Annotated[str | None, typer.Option(help="open_clip's tag for the weights, e.g. openai.")]

NOTES = {
    "mini": "CLIP of open_clip's classes, 64 px, trained on drawings",
    "mini-declip": "the same size with DeCLIP's self-supervision",
    "mini-reader": "mini that also reads short words in images",
    "mini-vlm": "a LLaVA that answers questions about composed pictures, and refuses harmful requests",
}


def models() -> None:
    """List what can be loaded: embedded models and heads, and open_clip names with their tags."""
    import open_clip

    from mmhooks.heads.hub import embedded_heads, load_head
    from mmhooks.utils.assets import EMBEDDED, EMBEDDED_VLMS

    with clear_errors():
        say("embedded (no network):")
        for name in (*EMBEDDED, *EMBEDDED_VLMS):
            say(f"  {name:<18} {NOTES[name]}")
        for name in embedded_heads():
            head = load_head(name)
            say(f"  {name:<18} head: {type(head).__name__}, {head.n_features:,} features")
        typer.echo()
        say("open_clip (downloaded on first use): mm.load(NAME, pretrained=TAG)")
        tags: dict[str, list[str]] = {}
        for name, tag in open_clip.list_pretrained():
            tags.setdefault(name, []).append(tag)
        for name, known in tags.items():
            say(f"  {name:<38} {', '.join(known)}")


def sites(
    model: Annotated[
        str, typer.Argument(help="mini, mini-declip, mini-reader, an open_clip name, or a checkpoint.")
    ],
    glob: Annotated[str, typer.Argument(help="Which sites, e.g. 'image.blocks.*.resid_post'.")] = "*",
    pretrained: Pretrained = None,
) -> None:
    """List the sites where a model can be read and edited."""
    import mmhooks as mm

    with clear_errors():
        for name in mm.load(model, pretrained=pretrained).sites(glob):
            say(name)


def pairs(
    source: Annotated[str, typer.Argument(help="mini, a folder with metadata.csv, coco, cc3m, …")] = "mini",
    limit: Annotated[int, typer.Option(help="How many texts to show.")] = 8,
    split: Annotated[str | None, typer.Option(help="Only this split.")] = None,
) -> None:
    """Show how many pairs a source has, their licence, and the first texts."""
    import mmhooks as mm

    with clear_errors():
        found = mm.data.pairs(source, split=split)
        say(f"{len(found)} pairs · licence: {found.licence} · fingerprint {found.fingerprint}")
        for text in list(found.texts)[:limit]:
            say(f"  {text}")

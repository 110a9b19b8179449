"""Commands that list what is available: models, their sites, and image-text pairs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from mmhooks.utils.clear_errors import clear_errors
from mmhooks.utils.say import say

if TYPE_CHECKING:
    from mmhooks.data.sources.caption_choice import Captions

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
    source: Annotated[
        str,
        typer.Argument(
            help="mini, a folder, a file of captions, tars, coco, cc3m, …; docs/data.md has a table."
        ),
    ] = "mini",
    limit: Annotated[int, typer.Option(help="How many texts to show.")] = 8,
    split: Annotated[str | None, typer.Option(help="Only this split.")] = None,
    captions: Annotated[
        str,
        typer.Option(
            help="Of several captions of an image: first, all (a pair each), random, or none (images alone)."
        ),
    ] = "first",
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images of a file of captions, if not found beside it.")
    ] = None,
    image_column: Annotated[str | None, typer.Option(help="The image column, if it is not detected.")] = None,
    text_column: Annotated[str | None, typer.Option(help="The text column, if it is not detected.")] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Skip pairs that cannot be read instead of stopping.")
    ] = False,
    allow_outside: Annotated[
        bool,
        typer.Option("--allow-outside", help="Also read files outside the data set's folder that it names."),
    ] = False,
) -> None:
    """Show how many pairs a source has, their licence, and the first texts, or ids of images without texts."""
    import mmhooks as mm
    from mmhooks.data.sources.caption_choice import check_choice

    with clear_errors():
        check_choice(captions)
        choice = cast("Captions", captions)
        found = mm.data.pairs(
            source, split=split, captions=choice, images=images, image_column=image_column, text_column=text_column,
            on_error="skip" if skip_bad else "raise", allow_outside=allow_outside,
        )  # fmt: skip
        kind = "pairs" if found.has_texts else "images without texts"
        say(f"{len(found)} {kind} · licence: {found.licence} · fingerprint {found.fingerprint}")
        if found.skipped:
            say(f"{len(found.skipped)} skipped, the first is {': '.join(next(iter(found.skipped.items())))}")
        for line in (found.texts if found.has_texts else found.ids)[:limit]:
            say(f"  {line}")

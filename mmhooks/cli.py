"""The ``mmhooks`` command: a thin look at what is there. Studies are scripts under ``recipes/``."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="mmhooks",
    help="Hooked-model interpretability for multimodal models. Studies: python recipes/modality.py --help",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Pretrained = Annotated[str | None, typer.Option(help="open_clip's tag for the weights, e.g. openai.")]


def _version(show: bool | None) -> None:
    if show:
        from mmhooks import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool | None,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop."),
    ] = None,
) -> None:
    """Hooked-model interpretability for multimodal models: sites, heads, edits, measures."""


@app.command()
def models() -> None:
    """What can be loaded: the embedded models and heads, and open_clip's names with their tags."""
    import open_clip

    typer.echo("embedded (no network):")
    for name, note in EMBEDDED.items():
        typer.echo(f"  {name:<18} {note}")
    typer.echo("\nopen_clip (fetched on first use): mm.load(NAME, pretrained=TAG)")
    tags: dict[str, list[str]] = {}
    for name, tag in open_clip.list_pretrained():
        tags.setdefault(name, []).append(tag)
    for name, known in tags.items():
        typer.echo(f"  {name:<38} {', '.join(known)}")


@app.command()
def sites(
    model: Annotated[str, typer.Argument(help="mini, mini-declip, an open_clip name, or a checkpoint.")],
    glob: Annotated[str, typer.Argument(help="Which sites, e.g. 'image.blocks.*.resid_post'.")] = "*",
    pretrained: Pretrained = None,
) -> None:
    """The names of the places where a model can be read and edited."""
    import mmhooks as mm

    with _clear_errors():
        for name in mm.load(model, pretrained=pretrained).sites(glob):
            typer.echo(name)


@app.command()
def pairs(
    source: Annotated[str, typer.Argument(help="mini, a folder with metadata.csv, coco, cc3m, …")] = "mini",
    limit: Annotated[int, typer.Option(help="How many texts to show.")] = 8,
    split: Annotated[str | None, typer.Option(help="Only this split.")] = None,
) -> None:
    """How many pairs a source has, under which licence, and its first texts."""
    import mmhooks as mm

    with _clear_errors():
        found = mm.data.pairs(source, split=split)
        typer.echo(f"{len(found)} pairs · licence: {found.licence} · fingerprint {found.fingerprint}")
        for text in list(found.texts)[:limit]:
            typer.echo(f"  {text}")


EMBEDDED = {
    "mini": "CLIP of open_clip's classes, 64 px, trained on drawings",
    "mini-declip": "the same size with DeCLIP's self-supervision",
    "mini/sae": "head of mini: TopK SAE",
    "mini/ncl": "head of mini: non-negative contrastive MLP",
    "mini-declip/sae": "head of mini-declip: TopK SAE",
}


class _clear_errors:
    """A toolkit error becomes one sentence on stderr and exit code 1; anything else keeps its traceback."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from mmhooks.errors import MMHooksError

        if isinstance(error, MMHooksError):
            typer.echo(f"mmhooks: {error}", err=True)
            sys.exit(1)


if __name__ == "__main__":
    app()

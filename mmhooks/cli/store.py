"""Commands for activation stores: extract, inspect, verify and merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from mmhooks.cli.inspect import Pretrained
from mmhooks.utils.clear_errors import clear_errors
from mmhooks.utils.say import say

if TYPE_CHECKING:
    from mmhooks.data.store.layout import Precision

Folder = Annotated[Path, typer.Argument(help="The store's folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on standard output.")]

store = typer.Typer(help="Inspect, verify and merge activation stores.", no_args_is_help=True)


def extract(
    model: Annotated[
        str, typer.Argument(help="mini, mini-declip, an open_clip name, or a checkpoint.")
    ] = "mini",
    pairs: Annotated[
        str, typer.Option(help="mini, a folder, Parquet or tar files, coco, cc3m, a Hub name.")
    ] = "mini",
    site: Annotated[
        list[str] | None,
        typer.Option(help="A site or glob, repeatable. Default: image.embed and text.embed."),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="The store's folder: a new one, or that of an interrupted run.")
    ] = Path("runs/acts"),
    head: Annotated[
        list[str] | None,
        typer.Option(
            help="HEAD@SITE, repeatable: attach a head, e.g. mini/sae@image.embed, and store its latents too."
        ),
    ] = None,
    pretrained: Pretrained = None,
    split: Annotated[str | None, typer.Option(help="Only this split of the pairs.")] = None,
    limit: Annotated[int | None, typer.Option(help="Maximum number of pairs.")] = None,
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Stream the data set instead of keeping a copy.")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Skip pairs that cannot be read instead of stopping.")
    ] = False,
    allow_outside: Annotated[
        bool,
        typer.Option("--allow-outside", help="Also read files outside the data set's folder that it names."),
    ] = False,
    image_column: Annotated[
        str | None, typer.Option(help="The data set's image column, if it is not detected.")
    ] = None,
    text_column: Annotated[
        str | None, typer.Option(help="The data set's text column, if it is not detected.")
    ] = None,
    captions: Annotated[
        str,
        typer.Option(
            help="Of several captions of an image: first, all (a pair each), random, or none (images alone)."
        ),
    ] = "first",
    seed: Annotated[int, typer.Option(help="Of a random caption, and of --limit.")] = 0,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images of a file of captions, if not found beside it.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = "fp32",
    batch_size: Annotated[int, typer.Option(help="Rows per forward pass.")] = 128,
    workers: Annotated[
        int | None, typer.Option(help="Processes that decode images. Default: spare cores, at most 8.")
    ] = None,
    shard_rows: Annotated[
        int | None, typer.Option(help="Pairs per shard. Default: 8192, fewer for large rows.")
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            help="A row for each of these tokens: patch, cls, register, text, eot, image, prompt, last; positions 0,3; or a "
            "slice 1:. Default: a row for each pair."
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, …; under torchrun, cuda means the rank's own.")
    ] = "cpu",
) -> None:
    """Run a model over pairs and write the activations at its sites into a store. Repeat the command to resume.

    Example: mmhooks extract mini --pairs mini --head mini/sae@image.embed --head mini/sae@text.embed --out runs/acts

    On several processes: torchrun --nproc-per-node 8 -m mmhooks.cli extract ViT-B-32 --pretrained openai --pairs coco
    """
    import mmhooks as mm
    from mmhooks.data.sources.caption_choice import check_choice

    with clear_errors():
        check_choice(captions)
        hooked = mm.load(model, pretrained=pretrained, device=_device(device))
        sites = list(site or ["image.embed", "text.embed"])
        for entry in head or []:
            name, _, at = entry.rpartition("@")
            if not name:
                raise mm.errors.MMHooksError(
                    f"--head: expected HEAD@SITE, e.g. mini/sae@image.embed, got {entry!r}"
                )
            sites += [
                f"{place}.latents" for place in hooked.attach(mm.load_head(name, device=hooked.device), at=at)
            ]
        reading: dict[str, Any] = {"image_column": image_column, "text_column": text_column}
        reading |= {"captions": captions, "seed": seed, "images": images}
        on_error = "skip" if skip_bad else "raise"
        read = mm.data.pair_stream if streaming else mm.data.pairs
        found = read(
            pairs, split=split, limit=limit, on_error=on_error, allow_outside=allow_outside, **reading
        )
        precision = cast("Precision", dtype)  # extract says which there are
        done = mm.extract(
            hooked, found, sites, out, dtype=precision, batch_size=batch_size, workers=workers, shard_rows=shard_rows,
            tokens=_tokens(tokens),
        )  # fmt: skip
        rows = f"{len(done)} tokens of {len(done.pairs)} pairs" if done.by_token else f"{len(done)} pairs"
        say(f"{out}: {rows}, {_size(done.info['bytes'])}, sites {', '.join(done.sites)}")


@store.command()
def info(folder: Folder, as_json: AsJson = False) -> None:
    """Show what a store holds and where it comes from, finished or not. Example: mmhooks store info runs/acts"""
    from mmhooks.data.store.check import summary

    with clear_errors():
        found = summary(folder)
        if as_json:
            typer.echo(json.dumps(found, indent=1))  # ASCII: control characters are escaped
            return
        of = f" of {found['of']}" if found["of"] else ""
        state = "finished" if found["complete"] else "unfinished: repeat the extract command to resume"
        rows = f" with {found['rows']} rows, one a token," if "rows" in found else ""
        say(f"{found['pairs']}{of} pairs{rows} in {found['shards']} shards, {_size(found['bytes'])}, {state}")
        if found["skipped"]:
            say(f"{found['skipped']} pairs were skipped; manifest.json lists them with the reasons")
        model, data = found["model"], found["data"]
        say(f"model  {model['name']} ({model.get('class', '')}, weights {model['weights']})")
        say(f"data   {data['name']} (fingerprint {data['fingerprint']}) · {data.get('licence', '')}")
        for name, site in found["sites"].items():
            head = f", head {site['head']}" if "head" in site else ""
            say(
                f"site   {name}: {site['row']}, {site['dtype']}, {site['kept as']}, {site['bytes a row']} bytes a row{head}"
            )


@store.command()
def verify(folder: Folder, as_json: AsJson = False) -> None:
    """Read every byte and report every fault; exit code 1 if there is one. Example: mmhooks store verify runs/acts"""
    from dataclasses import asdict

    from mmhooks.data.store.check import verify

    with clear_errors():
        faults = verify(folder, progress=True)
        if as_json:
            typer.echo(json.dumps([asdict(fault) for fault in faults], indent=1))
        else:
            for fault in faults:
                say(str(fault))
            say(f"{folder}: {f'{len(faults)} faults' if faults else 'no faults'}")
        raise typer.Exit(1 if faults else 0)


@store.command()
def merge(
    stores: Annotated[list[Path], typer.Argument(help="Stores of the same sites and model, in order.")],
    out: Annotated[Path, typer.Option(help="The folder of the new store.")],
) -> None:
    """Merge several stores into one; shards are linked, not copied. Example: mmhooks store merge runs/a runs/b --out runs/ab"""
    from mmhooks.data.store.merge import merge

    with clear_errors():
        say(f"{out}: {len(merge(stores, out))} pairs")


def _tokens(text: str | None) -> Any:
    """``--tokens`` as ``mm.extract`` takes it: a kind, positions or a slice."""
    if text is None or text.isalpha():
        return text
    try:
        if ":" in text:
            return slice(*(int(part) if part else None for part in text.split(":")))
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"--tokens: expected a kind such as patch, positions such as 0,3 or a slice such as 1:, got {text!r}"
        ) from None


def _device(asked: str) -> str:
    """Resolves ``cuda`` under torchrun to the GPU of the local rank."""
    import os

    return f"cuda:{os.environ['LOCAL_RANK']}" if asked == "cuda" and "LOCAL_RANK" in os.environ else asked


def _size(n: int) -> str:
    size = float(n)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"

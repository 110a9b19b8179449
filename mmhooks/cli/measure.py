"""The ``mmhooks measure`` command: all measures of a store in one pass."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmhooks.utils.clear_errors import clear_errors
from mmhooks.utils.say import say, say_lines

if TYPE_CHECKING:
    from torch import Tensor

VECTORS_HELP = "a site of the store, or a .safetensors file with one tensor of one vector per pair"


def measure(
    store: Annotated[Path, typer.Argument(help="A store of activations, as mmhooks extract writes it.")],
    head: Annotated[
        str | None,
        typer.Option(
            help="Head to run on stored embeddings: mini/sae, a folder, a Hub id. Without it, stored latents are read."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Output folder; default STORE-measures beside the store.")
    ] = None,
    image: Annotated[
        str | None,
        typer.Option(help="Site of the image side; default image.embed, without a head its latents."),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(help="Site of the text side; default text.embed, without a head its latents."),
    ] = None,
    image_vectors: Annotated[
        str | None,
        typer.Option(help=f"Vectors that say how similar images are: {VECTORS_HELP}. Default image.embed."),
    ] = None,
    text_vectors: Annotated[
        str | None,
        typer.Option(help=f"Vectors that say how similar texts are: {VECTORS_HELP}. Default text.embed."),
    ] = None,
    kind: Annotated[str, typer.Option(help="relu, or abs for a model's own signed coordinates.")] = "relu",
    m: Annotated[int, typer.Option(help="Top samples per feature.")] = 20,
    pool: Annotated[int, typer.Option(help="Random samples that WinRate compares against.")] = 2048,
    seed: Annotated[int, typer.Option(help="Seed of random pools, controls and intervals.")] = 0,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Compute every measure of a store in one pass: MDS and groups, density, EmbedSim, WinRate, MonoSemanticity, gap, bridges.

    Writes measures.json, measures.md and figures into --out.

    Example: mmhooks measure runs/acts --head mini/sae --out runs/measures

    With several processes: torchrun --nproc-per-node 2 -m mmhooks.cli measure runs/acts --head mini/sae
    """
    import mmhooks as mm
    from mmhooks.report.measures_page import write_measures
    from mmhooks.utils.distributed import Ranks

    with clear_errors():
        ranks = Ranks()
        vectors: dict[str, Any] = {"image": image_vectors, "text": text_vectors}
        result = mm.measure(
            mm.Store(store),
            head=None if head is None else mm.load_head(head),
            image=image,
            text=text,
            embeddings={side: _vectors(v) for side, v in vectors.items() if v is not None},
            kind=kind,  # type: ignore[arg-type] - checked there
            m=m,
            pool=pool,
            seed=seed,
            progress=progress,
        )
        if ranks.rank != 0:
            return
        target = out or store.with_name(store.name + "-measures")
        paths = write_measures(result, target)
        say_lines(result.table().markdown())
        for name, why in result.skipped.items():
            say(f"skipped {name}: {why}", err=True)
        typer.echo()
        say(f"{len(paths)} files in {target}")


def _vectors(given: str) -> Tensor | str:
    if not given.endswith(".safetensors"):
        return given
    from mmhooks.errors import DataError
    from mmhooks.utils.tensors import read_safetensors

    if not Path(given).is_file():
        raise DataError(f"expected {VECTORS_HELP}, got {given}, which is not a file")
    tables = read_safetensors(given)
    if len(tables) != 1:
        raise DataError(f"{given}: expected one tensor, got {len(tables)} ({', '.join(tables)})")
    return next(iter(tables.values()))

"""All measures of a store, in one pass."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmhooks.utils.clear_errors import clear_errors
from mmhooks.utils.say import say, say_lines

if TYPE_CHECKING:
    from torch import Tensor

Vectors = "a site of the store, or a .safetensors file with one table of a vector a pair"


def measure(
    store: Annotated[Path, typer.Argument(help="Folder that mmhooks extract wrote.")],
    head: Annotated[
        str | None,
        typer.Option(
            help="Head to run over stored embeddings: mini/sae, a folder, a Hub id. None: stored latents."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where the results go; default STORE-measures beside the store.")
    ] = None,
    image: Annotated[
        str | None, typer.Option(help="Site of the image side; default image.embed, or its latents.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Site of the text side; default text.embed, or its latents.")
    ] = None,
    image_vectors: Annotated[
        str | None, typer.Option(help=f"How alike pictures are: {Vectors}. Default image.embed.")
    ] = None,
    text_vectors: Annotated[
        str | None, typer.Option(help=f"How alike texts are: {Vectors}. Default text.embed.")
    ] = None,
    kind: Annotated[str, typer.Option(help="relu, or abs for a model's own signed coordinates.")] = "relu",
    m: Annotated[int, typer.Option(help="Top samples of each feature.")] = 20,
    pool: Annotated[int, typer.Option(help="Random samples that WinRate compares with.")] = 2048,
    seed: Annotated[int, typer.Option(help="Of pools, controls and intervals.")] = 0,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Every measure of a store in one pass: MDS and groups, density, EmbedSim, WinRate, MonoSemanticity, gap, bridges.

    Writes measures.json, measures.md and figures into --out.

    Example: mmhooks measure runs/acts --head mini/sae --out runs/measures

    On several processes: torchrun --nproc-per-node 2 -m mmhooks.cli measure runs/acts --head mini/sae
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
        raise DataError(f"no file {given}; give {Vectors}")
    tables = read_safetensors(given)
    if len(tables) != 1:
        raise DataError(
            f"{given} holds {len(tables)} tensors ({', '.join(tables)}); it should hold one table"
        )
    return next(iter(tables.values()))

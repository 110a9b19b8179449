"""``mmhooks sweep``: a grid of heads on one store, one table and one figure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmhooks.utils.clear_errors import clear_errors
from mmhooks.utils.say import say, say_lines


def sweep(
    store: Annotated[Path, typer.Argument(help="A store of activations, as mmhooks extract writes it.")],
    out: Annotated[Path, typer.Option(help="Where runs, heads, table and figure go.")] = Path("runs/sweep"),
    k: Annotated[str, typer.Option("--k", help="Values of K, with commas.")] = "16,32,64",
    n: Annotated[str, typer.Option("--n", help="Numbers of features, with commas.")] = "1024",
    variants: Annotated[
        str, typer.Option(help="topk, batchtopk, matryoshka, jumprelu, with commas.")
    ] = "topk",
    seeds: Annotated[str, typer.Option(help="Seeds, with commas.")] = "0",
    valid: Annotated[
        Path | None, typer.Option(help="A store of held-out pairs; by default every tenth pair is held out.")
    ] = None,
    sites: Annotated[str, typer.Option(help="Image site and text site.")] = "image.embed,text.embed",
    epochs: Annotated[int, typer.Option(help="Passes over the pairs.")] = 60,
    batch_size: Annotated[int | None, typer.Option(help="Pairs a step; by default the objective's.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate; by default the objective's.")] = None,
) -> None:
    """Trains a head for every K, n, variant and seed, and compares them on held-out pairs.

    A killed sweep goes on where it was when the same command is given again.

    Example: mmhooks sweep runs/acts --k 16,32,64 --n 1024,4096 --seeds 0,1 --out runs/sweep
    """
    from mmhooks.analysis.measures.sweep import sweep as run
    from mmhooks.heads.vectors import training_rows
    from mmhooks.report.style import draw
    from mmhooks.report.training import sweep_figure
    from mmhooks.utils.files import write_bytes

    with clear_errors():
        names = sites.split(",")
        held_out = None
        if valid is not None:
            held_out = tuple(rows[:] for rows in training_rows(valid, None, names))
        result = run(
            store, out=out, k=_numbers(k), n=_numbers(n), variants=variants.split(","), seeds=_numbers(seeds),
            valid=held_out, sites=names, epochs=epochs, batch_size=batch_size, lr=lr,  # type: ignore[arg-type]
        )  # fmt: skip
        figure, _ = draw(lambda palette: sweep_figure(result.rows, palette), alt="sweep", dark=False)
        write_bytes(out / "pareto.png", figure.data)
        say_lines(result.table().markdown())
        typer.echo()
        say(f"{out}/sweep.json, sweep.md, pareto.png; heads in {out}/heads")


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"whole numbers with commas were expected, got {text!r}") from None

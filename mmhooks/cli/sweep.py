"""The ``mmhooks sweep`` command: trains a grid of heads on one store and compares them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmhooks.utils.clear_errors import clear_errors
from mmhooks.utils.say import say, say_lines


def sweep(
    store: Annotated[Path, typer.Argument(help="A store of activations, as mmhooks extract writes it.")],
    out: Annotated[Path, typer.Option(help="Output folder of runs, heads, table and figure.")] = Path(
        "runs/sweep"
    ),
    k: Annotated[str, typer.Option("--k", help="Values of K, separated by commas.")] = "16,32,64",
    n: Annotated[str, typer.Option("--n", help="Numbers of features, separated by commas.")] = "1024",
    variants: Annotated[
        str,
        typer.Option(
            help="topk, batchtopk, matryoshka, matching_pursuit, archetypal, jumprelu, separated by commas."
        ),
    ] = "topk",
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "0",
    valid: Annotated[
        Path | None, typer.Option(help="A store of held-out pairs; default: every tenth pair is held out.")
    ] = None,
    sites: Annotated[str, typer.Option(help="Image site and text site.")] = "image.embed,text.embed",
    epochs: Annotated[int, typer.Option(help="Passes over the pairs.")] = 60,
    batch_size: Annotated[int | None, typer.Option(help="Pairs per step; default: the objective's.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate; default: the objective's.")] = None,
) -> None:
    """Train a head for every K, n, variant and seed, and compare them on held-out pairs.

    Repeat the command to resume an interrupted sweep.

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
        raise typer.BadParameter(f"expected integers separated by commas, got {text!r}") from None

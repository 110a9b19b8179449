"""``mmhooks verify NAME``: whether hooks, sites and weights of a model are what they should be."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmhooks.utils.clear_errors import clear_errors
from mmhooks.utils.escape import rich_text
from mmhooks.utils.say import say

if TYPE_CHECKING:
    from mmhooks.analysis.verification.verify import Verification

Name = Annotated[
    str,
    typer.Argument(
        help="hf:NAME, NAME/TAG of open_clip, timm:NAME, diffusers:NAME, a folder behind these, or mini."
    ),
]
Out = Annotated[Path, typer.Option(help="The report, to be sent back.")]
Pictures = Annotated[
    list[Path] | None,
    typer.Option(
        "--picture", help="A published picture, by its own file name, instead of fetching it; repeatable."
    ),
]
Numbers = Annotated[
    Path | None, typer.Option("--published", help="A file of published numbers of your own (docs/verify.md).")
]
EveryBlock = Annotated[
    bool,
    typer.Option(
        "--every-block", help="Edit the sites of every block, not only of the first, middle and last."
    ),
]


def verify(
    name: Name,
    out: Out = Path("verification.json"),
    picture: Pictures = None,
    published: Numbers = None,
    every_block: EveryBlock = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="Of the weights: float32, float16, bfloat16.")] = None,
) -> None:
    """Verify a model: hooks change no bit, sites show what flows, layers add up, weights give the published numbers.

    Writes a JSON with every check, versions and the digest of the weights; exit status 1 if a check fails.

    Example: mmhooks verify hf:openai/clip-vit-base-patch32 --out clip.json
    """
    with clear_errors("verify"):
        import mmhooks as mm
        from mmhooks.analysis.verification.published import FILE

        report = mm.verify(
            name, pictures=picture or (), published=published or FILE, every_block=every_block, device=device, dtype=dtype,
            progress=True,
        )  # fmt: skip
        _show(report)
        say(f"report: {report.save(out)}")
    if report.failed:
        raise typer.Exit(1)


def _show(report: Verification) -> None:
    from rich.console import Console
    from rich.table import Table

    model, console = report.model, Console(width=None)
    said = (
        model["name"],
        model["class"],
        f"{model['parameters']:,} parameters",
        model["dtype"],
        model["device"],
    )
    grid = Table(title=rich_text(" · ".join(map(str, said))), title_justify="left")
    for column in ("", "check", "places", "largest difference"):
        grid.add_column(column)
    kinds: dict[str, list[Any]] = {}
    for check in report.checks:
        kinds.setdefault(check.what, []).append(check)
    for what, checks in kinds.items():
        bad = [check for check in checks if check.passed is False]
        unknown = [check for check in checks if check.passed is None]
        mark = "failed" if bad else "?" if len(unknown) == len(checks) else "ok"
        numbers = [check.got for check in checks if isinstance(check.got, float)]
        grid.add_row(mark, rich_text(what), str(len(checks)), f"{max(numbers):.1e}" if numbers else "")
    console.print(grid)
    for check in report.failed[:20]:
        say(
            f"failed: {check.what} at {check.place or 'the model'}: expected {check.expected}, got {check.got}"
        )
    for check in (check for check in report.checks if check.passed is None):
        say(f"not checked: {check.what} {check.place}: {check.note}")
    counts = report.to_json()["counts"]
    say(", ".join(f"{n:,} {word}" for word, n in counts.items()) + f", {report.seconds:.0f} s")

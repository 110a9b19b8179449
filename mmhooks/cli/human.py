"""``mmhooks human``: tasks of features for people, and what their answers say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmhooks.utils.clear_errors import clear_errors
from mmhooks.utils.say import say, say_lines

human = typer.Typer(help="Ask people about features: export tasks, analyse answers.", no_args_is_help=True)


# All words, ``--help`` too, are passed on to the export, which is imported on call: it needs torch.
_PASSED_ON = {"ignore_unknown_options": True, "help_option_names": []}
Words = Annotated[list[str] | None, typer.Argument(hidden=True)]


@human.command("export", context_settings=_PASSED_ON)
def export_(words: Words = None) -> None:
    """Write intruder and naming tasks as one page, and their key. Example: mmhooks human export --run runs/modality"""
    from mmhooks.studies.common.options import study_app
    from mmhooks.studies.human.export import Options, export
    from mmhooks.studies.human.plan import export_power

    def command(options: Options) -> None:
        done = export(options)
        for (kind, side, group), n in sorted(done.counts.items()):
            say(f"{kind:<9}{side:<6} {group:<7} {n}")
        for part in done.coverage:
            if part.shown < part.asked:
                say(f"fewer than asked for: {part.text()}")
        for name in done.undecidable:
            say(f"cannot be decided by these tasks: {name}")
        for raters, difference in export_power(options.features):
            say(f"{raters} participants: 80 % power from {100 * difference:.0f} points between two groups")
        say(f"{done.page}: for the participants; {done.key}: for you only")

    app = study_app(
        "human", Options, command, help="Write tasks.html, for participants, and key.json, for you."
    )
    app(args=words or [], prog_name="mmhooks human export")


@human.command()
def plan(
    rate: Annotated[float, typer.Option(min=0, max=1, help="Share of right answers.")] = 0.5,
    items: Annotated[float, typer.Option(min=0, max=0.5, help="Its standard deviation over features.")] = 0.2,
    raters: Annotated[
        float, typer.Option(min=0, max=0.5, help="And over participants, within one group of features.")
    ] = 0.05,
) -> None:
    """Say how many features of each group a difference between two groups needs, by participants, at 80 % power.

    The defaults are assumptions; after a pilot, analyse prints what its answers say. Example: mmhooks human plan --rate 0.6
    """
    from mmhooks.analysis.statistics.crossed import Spread
    from mmhooks.studies.human.plan import plan, power_table

    with clear_errors():
        note = f"At {rate:g} right answers, standard deviation {items:g} over features and {raters:g} over participants."
        say_lines(power_table(plan(Spread(rate, items, raters)), note).markdown())


@human.command()
def analyse(
    answers: Annotated[list[Path], typer.Argument(help="Files that participants saved from tasks.html.")],
    key: Annotated[Path, typer.Option(help="The key.json of the export.")] = Path("runs/human/key.json"),
    out: Annotated[
        Path | None, typer.Option(help="Folder of results.json and tables.md; default: the key's.")
    ] = None,
    embedder: Annotated[
        str, typer.Option(help="How alike names are: minilm, a sentence-transformers name, or '' for none.")
    ] = "minilm",
    seed: Annotated[int, typer.Option(help="Of the bootstrap intervals.")] = 0,
) -> None:
    """Say how often people find the intruder in each group, whether they agree, and how many answers would decide.

    Example: mmhooks human analyse answers/anna.json answers/ben.json --key runs/human/key.json
    """
    from mmhooks.models.embedders import text_embedder
    from mmhooks.studies.human.analysis import analyse, tables_of

    with clear_errors():
        embed = text_embedder(embedder, progress=False) if embedder else None
        done = analyse(answers, key=key, out=key.parent if out is None else out, embed=embed, seed=seed)
        for table in tables_of(done.found):
            say_lines(table.markdown())
            typer.echo()
        if done["left_out"]:
            say(f"left out by attention checks: {', '.join(done['left_out'])}")
        say(", ".join(str(path) for path in done.paths))

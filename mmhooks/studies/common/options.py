"""Options shared by studies, and the command line made from a study's dataclass of options.

A study has one frozen dataclass of options, whose fields are annotated with the types below (or with types of its own,
made the same way). From it come the command line (:func:`study_app`), the settings in ``results.json``
(:func:`as_settings`), and the command that repeats a run (:func:`as_command`).
"""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer

from mmhooks.studies.common.paper_settings import PaperOptions
from mmhooks.utils.clear_errors import clear_errors

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
else:
    DataclassInstance = object  # dataclasses have no common class to check at run time

OptionsT = TypeVar("OptionsT", bound=DataclassInstance)
Value = str | int | float | bool | list[str] | list[float] | None

Model = Annotated[str, typer.Option(help="mini, any open_clip name, or hf:NAME of transformers.")]
VitModel = Annotated[str, typer.Option(help="mini, any open_clip name of a ViT, or hf:NAME of transformers.")]
Pretrained = Annotated[
    str | None,
    typer.Option(help="open_clip's tag, a checkpoint file, or a revision of hf:NAME; '' for random weights."),
]
PairData = Annotated[str, typer.Option(help="mini, a folder/ with metadata.csv, coco, cc3m, …")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Skip unreadable images and count them.")]
Sae = Annotated[
    str | None, typer.Option(help="SAE head: name, directory, Hub id, or train; mini has its own.")
]
PairBatch = Annotated[int, typer.Option(help="Pairs at a time through the encoders.")]
ImageBatch = Annotated[int, typer.Option(min=1, help="Images at a time.")]
Features = Annotated[int, typer.Option(help="Features of a head that is trained here.")]
Active = Annotated[
    int,
    typer.Option(
        "--k",
        min=1,
        help="Active features of an SAE that is trained here; at most a quarter of its features.",
    ),
]
Epochs = Annotated[int, typer.Option(help="Epochs of a head that is trained here.")]
Out = Annotated[Path, typer.Option(help="Where results, tables, figures and index.html go.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No bars, no tables on the screen.")]
NoBar = Annotated[bool, typer.Option("--quiet", help="No bar and no tables on the screen.")]
SelectBy = Annotated[
    str,
    typer.Option(
        help="How TextSpan chooses: paper, by inner products; or unit, by the spread along directions."
    ),
]
Pipeline = Annotated[str, typer.Option(help='"mini", a directory, or a Hub repository')]
Steps = Annotated[int, typer.Option(help="denoising steps")]
DiffusionBatch = Annotated[int, typer.Option(help="images at once")]
Device = Annotated[
    str, typer.Option(help="Where models run: auto (cuda if there is one, else cpu), cpu, cuda, …")
]
Dtype = Annotated[str, typer.Option(help="Floating-point type of models: float32, bfloat16 or float16.")]


def study_app(
    name: str, options: type[OptionsT], run: Callable[[OptionsT], object], *, help: str
) -> typer.Typer:
    """Returns the command line of a study: one option per field of ``options``, passed to ``run`` as one object.

    Args:
        name: of the study; errors of the toolkit are printed as one line that starts with it.
        options: a dataclass whose fields are annotated with typer options.
        help: the text that ``--help`` shows above the options.

    >>> app = study_app("gender", Options, run, help="Which features carry a gender.")  # doctest: +SKIP
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    def command(**values: Any) -> None:
        context = values.pop("context")
        with clear_errors(name):
            run(_chosen(options, values, context))

    # typer reads the options of a command from its signature.
    hints = get_type_hints(options, include_extras=True)  # of base classes too, unlike eval_str
    signature = inspect.signature(options)
    parameters = [p.replace(annotation=hints[p.name]) for p in signature.parameters.values()]
    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    command.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[context, *parameters]
    )
    app.command(help=help)(command)
    return app


def _chosen(options: type[OptionsT], values: dict[str, Any], context: Any) -> OptionsT:
    """Returns the options as typed; with ``--paper`` those that were not typed are the paper's."""
    if not values.get("paper") or not issubclass(options, PaperOptions):
        return options(**values)
    # By name: newer versions of typer have an enumeration of their own instead of click's.
    sources = {name: context.get_parameter_source(name).name for name in values}
    typed = {name: v for name, v in values.items() if not sources[name].startswith("DEFAULT")}
    return options.of_paper(**typed)


def as_settings(options: DataclassInstance) -> dict[str, Value]:
    """Returns every option by name, as ``results.json`` stores it: paths as strings.

    >>> as_settings(Options(out=Path("runs/gender")))["out"]            # doctest: +SKIP
    'runs/gender'
    """
    found = {field.name: getattr(options, field.name) for field in fields(options)}
    return {name: str(value) if isinstance(value, Path) else value for name, value in found.items()}


def as_command(name: str, options: DataclassInstance) -> str:
    """Returns the command that runs study ``name`` with these options; those at their default are left out.

    Under ``--paper`` the paper's settings are the defaults.

    >>> as_command("gender", Options(limit=96, skip_bad=True))          # doctest: +SKIP
    'python recipes/gender.py --limit 96 --skip-bad'
    """
    hints = get_type_hints(type(options), include_extras=True)
    words, values = (
        ["python", f"recipes/{name}.py"],
        {f.name: getattr(options, f.name) for f in fields(options)},
    )
    untyped = {field.name: field.default for field in fields(options)}
    if isinstance(options, PaperOptions) and options.paper:
        preset = options.PAPER.defaults()
        if any(
            values[name] is None for name in preset
        ):  # None cannot be typed: every other value is, instead
            del values["paper"]
        else:
            untyped |= preset
    for field_name, value in values.items():
        if value != untyped[field_name]:
            words += _as_arguments(field_name, hints[field_name], value)
    return shlex.join(words)


def typed_options(options: DataclassInstance) -> dict[str, list[str]]:
    """Returns every option by name as the words that set it on the command line; none for None, which cannot be typed."""
    hints = get_type_hints(type(options), include_extras=True)
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    return {name: [] if v is None else _as_arguments(name, hints[name], v) for name, v in values.items()}


def _as_arguments(name: str, hint: Any, value: Value | Path) -> list[str]:
    """Returns one option as command-line words: ``--live/--direct`` as either name, a list as a repeated option."""
    declared = _declared_name(hint) or f"--{name.replace('_', '-')}"
    on, _, off = declared.partition("/")
    if isinstance(value, bool):
        return [on if value else off or f"--no-{on.removeprefix('--')}"]
    return [word for one in (value if isinstance(value, list) else [value]) for word in (on, str(one))]


def _declared_name(hint: Any) -> str | None:
    """Returns the option's explicit name, if its annotation gives one."""
    (option,) = hint.__metadata__
    # Inside Annotated, typer stores the first name as the default and moves it later.
    names = [n for n in (option.default, *(option.param_decls or ())) if isinstance(n, str)]
    return names[0] if names else None

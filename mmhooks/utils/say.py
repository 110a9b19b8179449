"""Console output of the command line, with text from data escaped."""

from __future__ import annotations

import typer

from mmhooks.utils.escape import one_line, terminal


def say(text: object, *, err: bool = False) -> None:
    """Prints one line; captions, licences or names in it cannot break, colour or reorder it.

    >>> say("a cat\\x1b[2J")
    a cat\\x1b[2J
    """
    typer.echo(terminal(text), err=err)


def say_lines(text: object) -> None:
    """Prints several lines: our own text, or a table whose cells are escaped already."""
    typer.echo(terminal(text, lines=True))


def say_error(error: object, name: str = "mmhooks") -> None:
    """Prints an error's message as one line on standard error."""
    typer.echo(f"{name}: {one_line(error)}", err=True)

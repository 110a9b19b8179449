"""What the command says: one line of text from data, or lines that were escaped one by one."""

from __future__ import annotations

import typer

from mmhooks.utils.escape import one_line, terminal


def say(text: object, *, err: bool = False) -> None:
    """One line, which no caption, licence or name in it can break, colour or turn.

    >>> say("a cat\\x1b[2J")
    a cat\\x1b[2J
    """
    typer.echo(terminal(text), err=err)


def say_lines(text: object) -> None:
    """Several lines, of a table whose cells are escaped or of our own."""
    typer.echo(terminal(text, lines=True))


def say_error(error: object, name: str = "mmhooks") -> None:
    """An error's words on one line of standard error."""
    typer.echo(f"{name}: {one_line(error)}", err=True)

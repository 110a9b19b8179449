"""Quotes other libraries' errors in messages of our own."""

from __future__ import annotations


def first_line(fault: BaseException) -> str:
    """The first line of an error's message, or its class name if it has no message.

    >>> first_line(ValueError("not a tar\\nat byte 12")), first_line(KeyError())
    ('not a tar', 'KeyError')
    """
    return (str(fault).strip().splitlines() or [type(fault).__name__])[0][:200]

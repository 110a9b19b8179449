"""What other libraries' errors say, for the sentences of ours."""

from __future__ import annotations


def first_line(fault: BaseException) -> str:
    """The first line of what an error says, or its class where it says nothing.

    >>> first_line(ValueError("not a tar\\nat byte 12")), first_line(KeyError())
    ('not a tar', 'KeyError')
    """
    return (str(fault).strip().splitlines() or [type(fault).__name__])[0][:200]

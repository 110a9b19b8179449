"""Text from data on its way to a medium: one function for a terminal, one for Markdown; HTML is markupsafe's.

Captions, licences, file names, names of models and heads, answers of models and the words of other libraries' errors
are data. A terminal obeys some of their signs (cursor, title, clipboard), the eye others (direction), Markdown many.
Files of results keep texts as they are.
"""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

# Controls; direction, tags and other invisible signs; line ends that editors know; halves of pairs; private signs.
_ACTING = frozenset({"Cc", "Cf", "Zl", "Zp", "Cs", "Co"})
# Joiners do nothing to a terminal, and some emoji and scripts cannot be spelled without them.
_JOINERS = frozenset("\u200c\u200d")


def terminal(text: object, *, lines: bool = False) -> str:
    """``text`` with every sign written out that a terminal obeys, or that hides or turns what is read.

    Args:
        lines: leaves line ends as they are, for several lines whose texts were escaped one by one.

    >>> terminal("a cat\\x1b]52;c;aGk=\\x07 \\u202egpj"), terminal("a\\nb"), terminal("a\\nb", lines=True)
    ('a cat\\\\x1b]52;c;aGk=\\\\x07 \\\\u202egpj', 'a\\\\nb', 'a\\nb')
    """
    said = str(text)
    if said.isprintable():
        return said
    return "".join(c if (lines and c == "\n") or not _acts(c) else _spelled(c) for c in said)


def one_line(text: object) -> str:
    """:func:`terminal` of ``text`` with its white space, line ends included, as single spaces.

    >>> one_line("broken\\n  at \\x9b2K")
    'broken at \\\\x9b2K'
    """
    return terminal(" ".join(str(text).split()))


def rich_text(text: object, *, lines: bool = False) -> Text:
    """:func:`terminal` for a console of rich: neither its mark-up nor its names of emoji are read."""
    from rich.text import Text

    return Text(terminal(text, lines=lines))


# A backslash before one of these is not shown, and takes its meaning away. Underscores inside words have none.
_SIGNS = re.compile(r"[\\`*|~$]|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[:])")
_BLOCKS = re.compile(r"^(?=[-+](?:[\s+-]|$)|[#=>])|^\d+(?=[.)](?:\s|$))")
# What readers turn into links without being asked: schemes, www. and addresses of mail.
_LINKS = re.compile(r"(?i)(?<=\w)(?=://)|(?<=mailto)(?=:)|(?<=xmpp)(?=:)|(?<=\bwww)(?=\.)")
_MAIL = re.compile(r"(?<=[\w.+-])@(?=[\w-]+\.)")
_ENTITY = re.compile(r"&(?=#?\w+;)")
_CODE = re.compile(r"(`[^`]+`)")


def markdown(text: object, *, code: bool = False) -> str:
    """``text`` on one line of Markdown, in or outside a table, shown as it is: no mark-up, no HTML, no link.

    Args:
        code: words between backticks are code; for sentences of our own that carry data.

    >>> markdown("a|b <img>  **x**"), markdown("[free](https://x.y)"), markdown("`x|y` of *", code=True)
    ('a\\\\|b &lt;img> \\\\*\\\\*x\\\\*\\\\*', '[free\\\\](https\\\\://x.y)', '`x|y` of \\\\*')
    """
    flat = one_line(text)
    parts = _CODE.split(flat) if code else [flat]
    shown = "".join(part if i % 2 else _escaped(part) for i, part in enumerate(parts))
    return _BLOCKS.sub(lambda m: m.group() + "\\", shown)


def _escaped(text: str) -> str:
    text = _SIGNS.sub(lambda m: "\\" + m.group(), text)
    text = _LINKS.sub(r"\\", text)
    # Finders of mail look at the text when its escapes are gone; an empty comment parts it for them.
    text = _ENTITY.sub("&amp;", text).replace("<", "&lt;")
    return _MAIL.sub("<!-- -->@", text)


def _acts(sign: str) -> bool:
    return sign not in _JOINERS and unicodedata.category(sign) in _ACTING


def _spelled(sign: str) -> str:
    return sign.encode("unicode_escape").decode()

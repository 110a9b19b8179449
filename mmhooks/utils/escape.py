"""Escapes text that comes from data, for terminals and for Markdown (HTML is left to markupsafe).

Captions, licences, file names, names of models and heads, answers of models and messages of other libraries' errors
are data. Some of their characters control a terminal (cursor, title, clipboard), some deceive readers (text
direction), many are Markdown. Result files keep texts unescaped.
"""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

# Controls; direction, tags and other invisible characters; line separators; surrogates; private use.
_ACTING = frozenset({"Cc", "Cf", "Zl", "Zp", "Cs", "Co"})
# Joiners are harmless in a terminal, and some emoji and scripts need them.
_JOINERS = frozenset("\u200c\u200d")


def terminal(text: object, *, lines: bool = False) -> str:
    """``text`` with every character escaped that controls a terminal or hides or reorders text.

    Args:
        lines: keep line ends, for several lines whose texts have already been escaped.

    >>> terminal("a cat\\x1b]52;c;aGk=\\x07 \\u202egpj"), terminal("a\\nb"), terminal("a\\nb", lines=True)
    ('a cat\\\\x1b]52;c;aGk=\\\\x07 \\\\u202egpj', 'a\\\\nb', 'a\\nb')
    """
    said = str(text)
    if said.isprintable():
        return said
    return "".join(c if (lines and c == "\n") or not _is_acting(c) else _escape_code(c) for c in said)


def one_line(text: object) -> str:
    """:func:`terminal` of ``text``, with all white space, line ends included, collapsed to single spaces.

    >>> one_line("broken\\n  at \\x9b2K")
    'broken at \\\\x9b2K'
    """
    return terminal(" ".join(str(text).split()))


def rich_text(text: object, *, lines: bool = False) -> Text:
    """:func:`terminal` for a rich console: markup and emoji names are not interpreted."""
    from rich.text import Text

    return Text(terminal(text, lines=lines))


# Characters that a backslash escapes in Markdown. Underscores inside words need no escape.
_SIGNS = re.compile(r"[\\`*|~$]|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[:])")
_BLOCKS = re.compile(r"^(?=[-+](?:[\s+-]|$)|[#=>])|^\d+(?=[.)](?:\s|$))")
# What Markdown renderers turn into links by themselves: schemes, www. and e-mail addresses.
_LINKS = re.compile(r"(?i)(?<=\w)(?=://)|(?<=mailto)(?=:)|(?<=xmpp)(?=:)|(?<=\bwww)(?=\.)")
_MAIL = re.compile(r"(?<=[\w.+-])@(?=[\w-]+\.)")
_ENTITY = re.compile(r"&(?=#?\w+;)")
_CODE = re.compile(r"(`[^`]+`)")


def markdown(text: object, *, code: bool = False) -> str:
    """``text`` as one line of Markdown that renders verbatim, in or outside a table: no markup, no HTML, no links.

    Args:
        code: keep text between backticks as code; for our own sentences that contain data.

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
    # E-mail detection runs after escapes are removed; an empty comment splits the address.
    text = _ENTITY.sub("&amp;", text).replace("<", "&lt;")
    return _MAIL.sub("<!-- -->@", text)


def _is_acting(char: str) -> bool:
    return char not in _JOINERS and unicodedata.category(char) in _ACTING


def _escape_code(char: str) -> str:
    return char.encode("unicode_escape").decode()

"""Captions, names, licences and answers that mean harm, through every medium that shows them.

A terminal must obey nothing in them, Markdown and HTML must show them as they are, figures must be drawn. The figures of
the long run (``--attack-rounds 100``) are in docs/reliability.md.
"""

from __future__ import annotations

import ast
import json
import re
import unicodedata
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

ROOT = Path(__file__).parent.parent.parent
HOSTILE = [
    "\x1b]52;c;c3R1ZmY=\x07", "\x1b]0;title\x07", "\x1b[2J\x1b[H", "\x1b[1A\x1b[2K", "\x9b31m",
    "\x1bP+q544e\x1b\\", "\r", "\x08\x08\x08", "\x00", "\u202egnp.exe\u202c", "\u2066a\u2069", "\u200e\u200f",
    "\u200b", "\ufeff", "\U000e0041\U000e0042", "\xad", "\u2028", "\u2029", "\x85", "\ud800", "\udfff", "\ue000",
    "[bold red]x[/bold red]", "[link=https://evil.example]x[/link]", "[/]", ":skull:", "<script>alert(1)</script>",
    "<img src=//evil.example onerror=alert(1)>", '"><svg onload=alert(1)>', "javascript:alert(1)", "</style>",
    "{{ 7 * 7 }}", "{% raw %}", "&lt;b&gt;", "&#60;", "<!--", "-->", "![x](https://evil.example/p.png)",
    "[x](javascript:1)", "[x]: https://evil.example", "[x][y]", "<https://evil.example>", "https://evil.example",
    "www.evil.example", "a@evil.example", "mailto:a@evil.example", "| a | b |", "|", "\\|", "\\", "`", "``", "```",
    "**b**", "__b__", "_b_", "~~b~~", "$x$", "$\\frac{1}$", "$$", "\n", "\r\n", "\n\n# Title\n", "\n- item",
    "\n---\n", "\n| a |\n|--|\n", "\n    code", "\n> quote", "1. one", "+ one", "- one", "# one", "=====", "^[[A",
    "%s%n", "{0}", "a cat", "ein K\xe4fer", "\u732b", "\u0642\u0637\u0629", "\U0001f469\u200d\U0001f680",
    "e\u0301",
]  # fmt: skip
ACTING = {"Cc", "Cf", "Zl", "Zp", "Cs", "Co"}
TEXTS = st.lists(
    st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(exclude_categories=()), max_size=6)), max_size=6
).map("".join)


def acts(text: str, kept: str = "\n") -> list[str]:
    """Signs of ``text`` that a terminal obeys or that hide or turn what is read."""
    return [c for c in text if unicodedata.category(c) in ACTING and c not in kept + "\u200c\u200d"]


def attack(run: Callable[[str], None], examples: int, *, together: int = 1) -> None:
    """``run(text)`` for every hostile text, so many joined, and for random mixtures of them."""
    for begin in range(0, len(HOSTILE), together):
        run("".join(HOSTILE[begin : begin + together]))
    settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))(
        given(TEXTS)(run)
    )()


def test_a_terminal_obeys_nothing(rounds):
    from mmhooks.utils.escape import one_line, rich_text, terminal

    def run(text: str) -> None:
        assert not acts(terminal(text), "") and not acts(one_line(text), "")
        assert not acts(terminal(text, lines=True)) and terminal(text, lines=True).count("\n") == text.count(
            "\n"
        )
        assert rich_text(text).plain == terminal(text)
        terminal(text).encode()
        if not acts(text, ""):
            assert terminal(text) == text

    attack(run, rounds(200))


# -- Markdown --------------------------------------------------------------------------------------------------


def rendered(source: str) -> tuple[list[str], list[str]]:
    """The kinds of blocks of Markdown, and the text of each; raises where a text has mark-up, HTML or a link."""
    from markdown_it import MarkdownIt

    reader = MarkdownIt("commonmark").enable(["table", "strikethrough"]).disable("text_join")
    blocks, texts = [], []
    for token in reader.parse(source):
        blocks.append(token.type)
        if token.type != "inline":
            continue
        said = ""
        for part in token.children or []:
            if part.type == "html_inline":
                assert part.content == "<!-- -->", source  # parts an address of mail for finders of links
                continue
            assert part.type in ("text", "text_special"), (part.type, source)
            # Finders of links look at each run of plain text, where no escape stands.
            assert part.type == "text_special" or not re.search(
                r"(?i)\w://|\bwww\.|[\w.+-]@[\w-]+\.", part.content
            ), source
            said += part.content
        texts.append(said)
    return blocks, texts


def test_markdown_shows_every_text_as_it_is(rounds):
    from mmhooks.utils.escape import markdown, one_line

    def run(text: str) -> None:
        shown = one_line(text)
        for frame, at in (
            ("| a |\n|:--|\n| {} |", 1),
            ("# {}", 0),
            ("- {}", 0),
            ("before\n\n{}\n\nafter", 1),
            ("**x**: {}", 0),
        ):
            if frame == "**x**: {}":
                assert (
                    rendered(frame.format("y").replace("**", ""))[0]
                    == rendered(frame.format(markdown(text) or "y").replace("**", ""))[0]
                )
                continue
            blocks, texts = rendered(frame.format(markdown(text)))
            if shown:
                assert blocks == rendered(frame.format("x"))[0], (frame, text)
                assert texts[at] == shown, (frame, text)

    attack(run, rounds(200))


def test_tables_keep_their_rows_and_columns(rounds):
    from mmhooks.analysis.results import Records as Rows
    from mmhooks.report import Cell, Table
    from mmhooks.utils.escape import one_line

    def run(text: str) -> None:
        plain = Table(["a", "b"], [["x", Cell("x", "x", "x", True, True)], ["x", "x"]], "x", "x")
        full = Table(
            [text, text], [[text, Cell(text, text, text, True, False)], [text, text]], text.replace("`", "'") or "x",
            text.replace("`", "'") or "x",
        )  # fmt: skip
        lines = full.markdown().splitlines()
        if one_line(full.caption) and one_line(full.note):
            assert len(lines) == len(plain.markdown().splitlines())
        body = "\n".join(line for line in lines if line.startswith("|"))
        blocks, texts = rendered(body)
        assert blocks.count("tr_open") == 3 and blocks.count("th_open") == 2 and blocks.count("td_open") == 4
        assert texts[2] == one_line(text)
        rows = Rows([{text: text, text + "2": text}])
        blocks, texts = rendered(rows.markdown())
        assert blocks.count("tr_open") == 2 and blocks.count("td_open") == 2 and texts[-1] == one_line(text)
        assert not acts(full.markdown()) and not acts(rows.markdown())

    attack(run, rounds(100))


def test_a_card_shows_what_a_head_says_of_itself(rounds):
    import mmhooks as mm
    from mmhooks.heads.card import card_facts, head_card

    sae = mm.TopKSAE(4, 8, 2)

    def run(text: str) -> None:
        sae.info = {"licence": text, "x" + text: text}
        said = head_card(sae, "me/head", "mmhooks", None, card_facts(sae))
        assert not acts(said)
        table = [line for line in said.splitlines() if line.startswith("|")]
        blocks, _ = rendered("\n".join(table))
        assert blocks.count("tr_open") == len(table) - 1 and blocks.count("td_open") == 2 * (len(table) - 2)

    attack(run, rounds(20), together=4)


# -- pages -----------------------------------------------------------------------------------------------------


class Shape(HTMLParser):
    """The tags and attributes of a page, its addresses, and its text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        self.addresses += [
            v or "" for name, v in attrs if name in ("src", "href", "srcset", "action", "data", "poster")
        ]

    def handle_data(self, data):
        self.text += data

    def handle_comment(self, data):
        self.tags.append(("comment", (data,)))


def shape_of(html: str) -> Shape:
    shape = Shape()
    shape.feed(html)
    shape.close()
    return shape


def whole_page(text: str) -> str:
    """A page with every kind of block, ``text`` in every place that takes one."""
    from PIL import Image

    from mmhooks.report import (
        Cell,
        Details,
        EncodedImage,
        FeatureCard,
        Gallery,
        Listing,
        Page,
        Plot,
        Prose,
        Section,
        Table,
        TableBlock,
        Tile,
        Tiles,
    )  # fmt: skip

    picture = EncodedImage.from_pil(Image.new("RGB", (2, 2)), text)
    table = Table([text, "b"], [[text, Cell(text, text, text, True, True)]], text, text)
    blocks = [
        *(Prose(text, tone) for tone in ("plain", "note", "warn", "code")),
        Plot(picture, picture, text, anchor="plot"),
        TableBlock(table),
        Gallery(
            [FeatureCard(text, "ImgD", text, [picture], [(text, text)], text), FeatureCard(text, "", text, empty=text)],
            text,
        ),
        Tiles([Tile(text, text, text)]),
        Listing([("same", text, text)]),
        Details(text, [Prose(text)]),
    ]  # fmt: skip
    return Page(text, [Section(text, blocks, "here")], text, text, [text]).html()


def test_pages_have_no_script_from_data_and_no_remote_address(rounds):
    from mmhooks.utils.escape import terminal

    plain = shape_of(whole_page("x"))
    assert not {tag for tag, _ in plain.tags} & {
        "script",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "link",
    }

    def run(text: str) -> None:
        text = text.replace("`", "'") or "x"  # words between backticks become <code>, on purpose
        html = whole_page(text)
        html.encode()
        shape = shape_of(html)
        assert shape.tags == plain.tags, text
        assert all(a.startswith(("data:image/", "#")) for a in shape.addresses), shape.addresses
        assert not acts(html)
        if text.strip() == text and "\n" not in text:
            assert terminal(text) in shape.text
        assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in html

    attack(run, rounds(20), together=4)


def test_a_study_is_written_with_hostile_texts(tmp_path, rounds):
    import time

    from mmhooks.report import Table
    from mmhooks.studies.common.run import environment
    from mmhooks.studies.common.write import write_study

    count = [0]

    def run(text: str) -> None:
        count[0] += 1
        text = text.replace("`", "'")
        results = {
            "environment": environment(time.perf_counter()),
            "settings": {"name": text.encode("utf-8", "replace").decode()},
        }
        out, table = tmp_path / str(count[0] % 8), Table(["a"], [[text]], text, text)
        write_study(out, results, title=text, lead=text, claims=[("same", text, text)], tables=[table],
                    plots={}, notes=[text], attribution=text)  # fmt: skip
        page, words = (out / "index.html").read_text("utf-8"), (out / "tables.md").read_text("utf-8")
        assert not acts(words) and not acts(page)
        assert all(a.startswith("#") for a in shape_of(page).addresses)
        blocks, _ = rendered(words.replace("**", ""))
        assert blocks.count("tr_open") == 2 and "html_block" not in blocks and "fence" not in blocks

    attack(run, rounds(5), together=10)


# -- figures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dressed", [True, False], ids=["drawn", "bare"])
def test_figures_are_drawn_whatever_their_texts_are(dressed, rounds):
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text
    from PIL import Image

    from mmhooks.report import Estimate
    from mmhooks.report.figures import (
        Effect,
        Histogram,
        Strip,
        beside_paper,
        image_strips,
        mask_effects,
        summary,
    )
    from mmhooks.report.heat import heat_grid
    from mmhooks.report.style import LIGHT, draw

    picture = Image.new("RGB", (4, 4))

    def makers(text: str) -> list[Callable]:
        panel = Histogram(text, [0.2, 0.5, 0.8], 0.5, 0.1, {"ImgD": 1}, text)
        strips = [Strip(text, "ImgD", [picture], [text])]
        return [
            lambda p: summary(panel, strips, p),
            lambda p: image_strips(strips, p),
            lambda p: mask_effects({text: [Effect(text, "ImgD", 0.1, [0.1, 0.2])]}, p),
            lambda p: beside_paper({text: [(text, Estimate(0.1, 0.0, 0.2), 0.3)]}, p),
            lambda p: heat_grid([(text, picture, {text: [[0.0, 1.0]]})], p),
        ]

    def run(text: str) -> None:
        for make in makers(text):
            if dressed:
                assert draw(make, alt=text, dark=False)[0].data.startswith(b"\x89PNG")
                continue
            figure = make(LIGHT)
            FigureCanvasAgg(figure)
            figure.savefig(io.BytesIO(), format="png", dpi=20)
            shown = [t for t in figure.findobj(Text) if t.get_text()]
            assert not any(acts(t.get_text()) for t in shown)
            assert not any(t.get_parse_math() for t in shown if "$" in t.get_text())

    for text in ("$\\frac{1}$", "\ud800", "\x00"):
        run(text)
    attack(run, rounds(2), together=20)


# -- the command and its bars ----------------------------------------------------------------------------------


def halves(text: str) -> bool:
    """Whether it holds half of a surrogate pair, which neither a file nor a command line carries."""
    return any("\ud800" <= c <= "\udfff" for c in text)


def a_folder(place: Path, *texts: str, name: str = "") -> str:
    from PIL import Image

    for i in range(len(texts)):
        Image.new("RGB", (8, 8)).save(place / f"{i}.png")
    rows = [
        json.dumps({"file_name": name or f"{i}.png", "text": text}) + "\n" for i, text in enumerate(texts)
    ]
    (place / "metadata.jsonl").write_text("".join(rows))
    return f"{place}/"


def test_the_command_shows_a_caption_on_one_line(tmp_path):
    from mmhooks.cli import app

    texts = [f"x{text}y" for text in HOSTILE if not halves(text)]
    found = CliRunner().invoke(app, ["pairs", a_folder(tmp_path, *texts), "--limit", "999"])
    assert found.exit_code == 0 and not acts(found.output), found.output
    shown = [line for line in found.stdout.splitlines() if line]
    assert len(shown) == 1 + len(texts), shown


def test_the_command_shows_an_error_on_one_line(tmp_path):
    from mmhooks.cli import app

    typed = [t for t in HOSTILE if "\0" not in t and not halves(t)]  # what a shell can hand over
    for begin in range(0, len(typed), 16):
        text = "".join(typed[begin : begin + 16])
        for arguments in (
            ["sites", "mini", f"image.{text}"],
            ["pairs", a_folder(tmp_path, "a", name=text)],
            ["store", "info", str(tmp_path / text.replace("/", "")[:60])],
            ["extract", "mini", "--head", text],
        ):
            wrong = CliRunner().invoke(app, arguments)
            assert wrong.exit_code == 1 and isinstance(wrong.exception, SystemExit), (
                arguments,
                wrong.exception,
            )
            assert not acts(wrong.output) and len(wrong.stderr.strip().splitlines()) == 1, wrong.output


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_bars_show_their_labels_as_they_are(text, monkeypatch):
    import io

    import rich.console

    from mmhooks.heads.training.progress import training_bar
    from mmhooks.utils.escape import one_line
    from mmhooks.utils.progress import rate_bar, track

    file = io.StringIO()
    console = rich.console.Console
    monkeypatch.setattr(
        rich.console, "Console", lambda **_: console(file=file, width=300, force_terminal=False)
    )
    list(track(range(2), 2, text))
    with rate_bar(text, 2, unit="rows") as advance:
        advance(2)
    with training_bar(text, 2, shown=True) as update:
        update(2, {"loss": 0.1})
    said = file.getvalue()
    assert not acts(said) and said.count(one_line(text).strip()) >= 2, said


def test_no_command_prints_past_the_escape():
    """By the source: what the command and the recipes print goes through mmhooks.utils.escape."""
    raw = []
    for path in [*(ROOT / "mmhooks" / "cli").glob("*.py"), *(ROOT / "recipes").glob("*.py")]:
        if path.name == "say.py" or path.name.startswith(
            ("train_", "ship_", "reader_", "mini_", "sd_", "llava_", "cut_", "text_pool")
        ):
            continue  # what made the embedded models: it prints our own words alone
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and node.args):
                continue
            called = ast.unparse(node.func)
            if called == "print" or called.endswith("console.print"):
                if not ast.unparse(node.args[0]).startswith(("rich_text(", "grid")):
                    raw.append(f"{path.name}:{node.lineno} {ast.unparse(node)[:80]}")
            elif called == "typer.echo" and path.parent.name == "cli":
                if not ast.unparse(node.args[0]).startswith(("json.dumps(", "__version__")):
                    raw.append(f"{path.name}:{node.lineno} {ast.unparse(node)[:80]}")
            elif called == "typer.echo" and "error" in ast.unparse(node.args[0]):
                raw.append(f"{path.name}:{node.lineno} {ast.unparse(node)[:80]}")
    assert raw == []

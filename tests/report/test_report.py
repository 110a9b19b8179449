"""The page: data cannot open a tag, nothing is fetched, and tables are the same in HTML and Markdown."""

from __future__ import annotations

import base64
import html.parser
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmhooks.errors import ShapeMismatch
from mmhooks.report import (
    Cell,
    Details,
    EncodedImage,
    Estimate,
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
    fixed,
    interval,
    percent,
)

EVIL = '<script>alert("1")</script>"><img src=//evil.example/x onerror=alert(1)>&amp; {{ 7*7 }} `</code>`'


class Reader(html.parser.HTMLParser):
    """Collects every element with its attributes, and the visible text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def teal_square(alt: str = "") -> EncodedImage:
    return EncodedImage.from_pil(Image.new("RGB", (8, 8), "teal"), alt)


def full_page(words: str) -> str:
    """A page with every kind of block, and ``words`` in every place that takes text."""
    card = FeatureCard(words, "ImgD", words, [teal_square(words)], [(words, words)], words)
    blocks = [
        Prose(words),
        Prose(words, "code"),
        Plot(teal_square(words), teal_square(words), words),
        TableBlock(Table([words, words], [[words, Cell(words, words, words, True, True)]], words, words)),
        Gallery([card, FeatureCard(words, empty=words)], words),
        Tiles([Tile(words, words, words)]),
        Listing([("same", words, words), ("differs", words, words), ("open", words, words)]),
        Details(words, [Prose(words)]),
    ]
    return Page(words, [Section(words, blocks)], words, words, [words]).html()


def test_texts_from_data_open_no_tag_and_run_nothing() -> None:
    plain, evil = Reader(full_page("plain")), Reader(full_page(EVIL))
    # the same elements as with harmless words, but for the <code> of the backticks
    assert [t for t, _ in evil.elements if t != "code"] == [t for t, _ in plain.elements if t != "code"]
    assert {t for t, _ in evil.elements}.isdisjoint({"script", "iframe", "object", "link", "base"})
    assert all(not name.startswith("on") for _, attrs in evil.elements for name in attrs)
    assert '<script>alert("1")</script>' in evil.text and "{{ 7*7 }}" in evil.text


def test_page_fetches_nothing() -> None:
    page = Reader(full_page(EVIL))
    for tag, attrs in page.elements:
        for name in ("src", "srcset", "href"):
            if value := attrs.get(name):
                assert value.startswith(("data:", "#")), f"<{tag} {name}={value[:40]!r}>"
    policy = next(a["content"] for t, a in page.elements if t == "meta" and "http-equiv" in a)
    assert policy is not None and policy.startswith("default-src 'none'")


def test_images_are_embedded_in_the_page() -> None:
    shown = teal_square("a teal square")
    page = Page("t", [Section("s", [Gallery([FeatureCard("f", images=[shown])])])]).html()
    encoded = re.search(r'src="data:image/webp;base64,([^"]+)" alt="a teal square"', page)
    assert encoded is not None and base64.b64decode(encoded.group(1)) == shown.data


def test_dark_figures_are_served_to_dark_pages() -> None:
    light, dark = teal_square(), EncodedImage.from_pil(Image.new("RGB", (8, 8), "black"))
    page = Page("t", [Section("s", [Plot(light, dark)])]).html()
    assert f'media="(prefers-color-scheme: dark)" srcset="{dark.uri}"' in page
    assert f'src="{light.uri}"' in page


def test_save_is_whole_or_absent(tmp_path: Any) -> None:
    path = Page("t", [Section("s", [Prose("ünïcode ↔")])]).save(tmp_path / "a" / "index.html")
    assert "ünïcode ↔" in path.read_text(encoding="utf-8")
    assert [p.name for p in path.parent.iterdir()] == ["index.html"]

    class Broken(Page):
        def html(self) -> str:
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError):
        Broken("t", []).save(path)
    assert "ünïcode ↔" in path.read_text(encoding="utf-8")


def test_unknown_image_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="PNG, JPEG or WebP"):
        _ = EncodedImage(b"<svg onload=alert(1)>").uri


def test_anchors_match_the_contents() -> None:
    page = Reader(Page("t", [Section("Table 1: CLIP & co", [])]).html())
    targets = {a["href"] for t, a in page.elements if t == "a"}
    ids = {f"#{a['id']}" for t, a in page.elements if t == "section"}
    assert targets == ids == {"#table-1-clip-co"}


@given(st.text(max_size=60), st.text(max_size=60))
def test_markdown_rows_keep_their_columns(a: str, b: str) -> None:
    row = Table(["x", "y"], [[a, b]]).markdown().split("\n")
    assert len(row) == 3
    unescaped = re.sub(r"\\.", "", row[2])
    assert unescaped.count("|") == 3 and "<" not in row[2]


def test_table_of_uneven_rows_is_refused() -> None:
    with pytest.raises(ShapeMismatch, match="row 1 of table 'Sizes': expected 2 cells, got 1"):
        Table(["a", "b"], [["1", "2"], ["1"]], "Sizes")


def test_cell_shows_interval_paper_and_difference() -> None:
    cell = Cell.of(Estimate(0.3, 0.2, 0.4, 50), paper=-0.118, differs=True, best=True)
    assert cell.markdown() == "**.300** [.200, .400] (paper −.118) ≠"
    page = Page("t", [Section("s", [TableBlock(Table(["m"], [[cell]]))])]).html()
    assert all(part in page for part in (".300", "[.200, .400]", "paper −.118", "differs", "best"))


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e6, max_value=1e6), st.integers(0, 6))
def test_fixed_reads_back(x: float, digits: int) -> None:
    text = fixed(x, digits)
    assert float(text.replace("−", "-")) == pytest.approx(x, abs=0.5001 * 10**-digits, rel=1e-12)
    assert not (text.startswith("−") and float(text.replace("−", "-")) == 0)


def test_unknown_values_are_a_dash() -> None:
    assert fixed(None) == fixed(math.nan) == percent(math.nan) == "–"
    assert percent(0.123, plus=True) == "+12.3" and percent(-0.0004) == "0.0"


@given(st.floats(-1, 1), st.floats(0, 1), st.floats(0, 1), st.integers(1, 99))
def test_estimate_survives_json_and_says_its_side(value: float, down: float, up: float, n: int) -> None:
    e = Estimate(value, value - down, value + up, n)
    assert Estimate.from_json(e.to_json()) == e
    assert (e.side() == "above") == (value - down > 0) and (e.side() == "below") == (value + up < 0)


def test_estimate_without_interval_decides_nothing() -> None:
    e = Estimate(3.0)
    assert e.side() == "undecided" and interval(e) == "" and e.to_json()["low"] is None

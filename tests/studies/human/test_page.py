"""The page of tasks: nothing leaves it, nothing in it acts, and a keyboard is enough to answer it and save the answers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmhooks.studies.human.answers import read_answers, read_key
from mmhooks.studies.human.export import Export
from mmhooks.studies.human.page import page

from .browsers import V8, Chromium

Browser = V8 | Chromium


@pytest.fixture(params=[V8, Chromium])
def browser(request: pytest.FixtureRequest, exported: Export) -> Iterator[Browser]:
    opened = request.param(exported.page)
    yield opened
    opened.close()


def state(browser: Browser, key: dict[str, Any]) -> dict[str, Any]:
    return browser.stored(f"mmhooks-human-{key['study']}")


def answer(browser: Browser, key: dict[str, Any], *, right: bool = True) -> None:
    """Solves the task that is shown, by the keyboard."""
    now = state(browser, key)
    item = key["items"][now["order"][now["place"]]]
    if item["kind"] == "name":
        browser.type("name", f"number {item['feature']}")
    else:
        places = browser.places()
        assert sorted(places) == list(range(key["choices"]))
        correct = places.index(item["correct"])
        browser.press(str((correct if right else (correct + 1) % len(places)) + 1))
    browser.press("Enter")


def test_a_participant_answers_all_tasks_and_saves_them(
    browser: Browser, exported: Export, key: Any, tmp_path: Path
):
    browser.type("participant", "P 1")
    browser.press("Enter")
    order = state(browser, key)["order"]
    kinds = [key["items"][task]["kind"] for task in order]
    assert sorted(order) == sorted(key["items"]) and kinds == sorted(kinds)  # names last: they teach
    for place in range(len(order)):
        if place == 3:
            browser.reload()  # goes on where it stopped
            assert (
                state(browser, key)["place"] == 3 and browser.visible("work") and not browser.visible("start")
            )
        answer(browser, key, right=place != 4)
    assert browser.visible("end") and not browser.visible("work")
    saved = browser.save()
    (tmp_path / "answers.json").write_text(json.dumps(saved))
    known = read_key(exported.key)
    (one,) = read_answers([tmp_path / "answers.json"], known)
    assert one.name == "P 1"
    wrong = [task for task, choice in one.choices.items() if choice != known.items[task].correct]
    assert wrong == [order[4]]
    assert one.names == {t: f"number {i.feature}" for t, i in known.items.items() if i.kind == "name"}
    browser.click("again")
    assert browser.visible("start") and state(browser, key) is None


def test_every_participant_has_an_order_of_their_own(exported: Export, key: Any):
    """Tasks and places, both decided by the code alone."""

    def seen(code: str) -> tuple[Any, ...]:
        browser = V8(exported.page)
        browser.type("participant", code)
        browser.press("Enter")
        found = []
        for _ in range(6):
            now = state(browser, key)
            found.append((now["order"][now["place"]], tuple(browser.places())))
            answer(browser, key)
        browser.close()
        return tuple(found)

    assert seen("A") == seen("A")
    codes = [seen(code) for code in "ABCDEF"]
    assert len({tuple(task for task, _ in one) for one in codes}) == 6
    assert len({places for one in codes for _, places in one}) > 20


def test_enter_without_an_answer_goes_nowhere(exported: Export, key: Any):
    browser = V8(exported.page)
    browser.type("participant", "  ")
    browser.press("Enter")
    assert browser.visible("start")
    browser.type("participant", "A")
    browser.press("Enter")
    browser.press("Enter")
    browser.press(str(key["choices"] + 1))  # no such choice
    assert state(browser, key)["place"] == 0 and state(browser, key)["answers"] == {}
    browser.close()


def test_the_page_needs_nothing_and_tells_nothing(exported: Export, key: Any):
    html = exported.page.read_text(encoding="utf-8")
    assert not re.search(r"""(src|href|action)\s*=|url\(|@import|fetch\(|XMLHttp|WebSocket""", html)
    assert "default-src 'none'" in html and "unsafe" not in html
    assert "CC BY-SA" in html  # the drawings' licence asks for it
    content = json.loads(
        re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', html, re.DOTALL)[0]
    )
    assert {name for task in content["tasks"] for name in task} == {"id", "kind", "side", "shown"}
    assert [task["id"] for task in content["tasks"]] == list(key["items"])  # shuffled both
    groups = [key["items"][task["id"]]["group"] for task in content["tasks"]]
    assert groups != sorted(groups)
    assert {i["correct"] for i in key["items"].values() if i["kind"] == "intruder"} == set(
        range(key["choices"])
    )


EVIL = '</script><img src=x onerror="alert(1)"><!--<script>&amp;\u2028'


def test_texts_of_data_stay_texts(tmp_path: Path):
    tasks = [{"id": "a", "kind": "intruder", "side": "text", "shown": [EVIL, "b", "c"]}]
    (tmp_path / "p.html").write_text(page("s", tasks, {}, EVIL), encoding="utf-8")
    html = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert "<img" not in html and html.count("<script") == html.count("</script>") == 2
    browser = V8(tmp_path / "p.html")
    browser.type("participant", EVIL)
    browser.press("Enter")
    shown = browser._get("elements.shown.inside().filter((x) => x.tag === 'span').map((x) => x.textContent)")
    assert EVIL in shown
    browser.press("1")
    browser.press("Enter")
    assert browser.save()["participant"] == EVIL.strip()
    assert (
        browser._get("saved.at(-1).name")
        == "answers-" + re.sub(r"[^A-Za-z0-9_-]", "_", EVIL.strip()) + ".json"
    )
    browser.close()

"""Two browsers that open the page of tasks: Chromium where there is one, and its script in V8 with dom.js everywhere."""

from __future__ import annotations

import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest


class V8:
    """The page's script in V8, with ``dom.js`` for a browser."""

    def __init__(self, page: Path) -> None:
        from py_mini_racer import MiniRacer

        html = page.read_text(encoding="utf-8")
        found: list[list[Any]] = []

        class Ids(HTMLParser):
            def handle_starttag(self, tag: str, attrs: Any) -> None:
                given = dict(attrs)
                if "id" in given:
                    found.append([given["id"], tag, "hidden" in given])

        Ids().feed(html)
        content, script = re.findall(r"<script[^>]*>(.*?)</script>", html, re.DOTALL)
        dom = (Path(__file__).parent / "dom.js").read_text(encoding="utf-8")
        self._v8 = MiniRacer()
        self._v8.eval(
            f"const IDS = {json.dumps(found)}; const CONTENT = {json.dumps(content)};\n{dom}\n"
            f"const script = () => {{ {script} }}; open();"
        )

    def _get(self, expression: str) -> Any:
        return json.loads(str(self._v8.eval(f"JSON.stringify({expression})")))

    def stored(self, slot: str) -> dict[str, Any]:
        return json.loads(self._get(f"store[{json.dumps(slot)}] ?? 'null'"))

    def type(self, field: str, text: str) -> None:
        self._v8.eval(
            f"elements[{json.dumps(field)}].focus(); document.activeElement.value = {json.dumps(text)}"
        )

    def press(self, key: str) -> None:
        self._v8.eval(f"{'choose' if key.isdigit() else 'press'}({json.dumps(key)})")

    def places(self) -> list[int]:
        return [
            int(v) for v in self._get("document.querySelectorAll('input[name=choice]').map((x) => x.value)")
        ]

    def visible(self, name: str) -> bool:
        return not self._get(f"elements[{json.dumps(name)}].hidden")

    def reload(self) -> None:
        self._v8.eval("open()")

    def click(self, name: str) -> None:
        self._v8.eval(f"elements[{json.dumps(name)}].click()")

    def save(self) -> Any:
        self.click("save")
        return json.loads(self._get("saved.at(-1).text"))

    def close(self) -> None:
        self._v8.close()


class Chromium:
    """A real browser without a network; skips where there is none (``MMHOOKS_CHROMIUM`` names one)."""

    def __init__(self, page: Path) -> None:
        sync_api = pytest.importorskip("playwright.sync_api")
        program = (
            os.environ.get("MMHOOKS_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
        )
        if not program:
            pytest.skip("no Chromium on this machine")
        self._playwright = sync_api.sync_playwright().start()
        self._browser = self._playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        self._page = self._browser.new_context(offline=True).new_page()
        self.faults: list[str] = []
        self._page.on("console", lambda message: self.faults.append(message.text))
        self._page.on("pageerror", lambda error: self.faults.append(str(error)))
        self._page.goto(page.as_uri())

    def stored(self, slot: str) -> dict[str, Any]:
        return json.loads(self._page.evaluate("(slot) => localStorage.getItem(slot)", slot) or "null")

    def type(self, field: str, text: str) -> None:
        self._page.locator(f"#{field}").fill(text)

    def press(self, key: str) -> None:
        self._page.keyboard.press(key)

    def places(self) -> list[int]:
        found = self._page.eval_on_selector_all("input[name=choice]", "(nodes) => nodes.map((x) => x.value)")
        return [int(value) for value in found]

    def visible(self, name: str) -> bool:
        return self._page.locator(f"#{name}").is_visible()

    def reload(self) -> None:
        self._page.reload()

    def click(self, name: str) -> None:
        self._page.locator(f"#{name}").click()

    def save(self) -> Any:
        with self._page.expect_download() as download:
            self.click("save")
        return json.loads(Path(download.value.path()).read_text(encoding="utf-8"))

    def close(self) -> None:
        self._browser.close()
        self._playwright.stop()
        assert self.faults == []

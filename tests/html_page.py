"""A page as a browser would show it: text without scripts, so that no test is met by a script's text."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any


class Page(HTMLParser):
    """What a browser would see of a page: its tags, its text, its figures."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.figures: list[dict[str, Any]] = []
        self.titles: list[str] = []
        self._open = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = "plot" if "data-plot" in dict(attrs) else tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "plot":
            self.figures.append(json.loads(data))
        elif self._open == "h3":
            self.titles.append(data)
        if self._open not in ("script", "style", "plot"):
            self.text += data

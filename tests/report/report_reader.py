"""Reading a page back, as a reader or a browser would."""

from __future__ import annotations

import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from gambeson.auditing import AuditResult

_ADDRESSES = ("src", "href", "srcset", "action", "data")


class Reader(HTMLParser):
    """Collect what a reader sees: text, cells of tables, pictures, and every address."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.pictures: dict[str, str] = {}
        self.addresses: list[str] = []
        self._hidden = False
        self.feed(html)
        self.rows = [row for row in self.rows if row]
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self._hidden = tag in ("script", "style")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "img":
            self.pictures[found["alt"] or ""] = found["src"] or ""
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False
        if tag == "table":
            self.rows.append([])

    def handle_data(self, data: str) -> None:
        if self._hidden:
            return
        words = data.replace("\N{NO-BREAK SPACE}", " ")
        self.words.append(words)
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] = re.sub(r"\s+", " ", f"{self.rows[-1][-1]} {words}").strip()


@dataclass(frozen=True)
class Written:
    folders: list[Path]
    results: list[AuditResult]
    path: Path
    html: str
    seen: Reader

"""What the site adds to the pages of ``docs/``: ``make docs``.

The three pages at the root of the repository are pages of the site too, links to them are led there, and the roles that
docstrings use become plain code.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "SECURITY.md": "security.md"}

_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):<code>~?([^<]*)</code>")


def on_config(config: Any) -> Any:
    """Take the theme's script for searches from disk from the site, not from a host."""
    config.extra["polyfills"] = ["assets/iframe-worker.js"]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages at the root, with their links as seen from ``docs/``."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, page, content=led(text, "")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links to the pages at the root to their place in the site."""
    return led(markdown, "../" * page.file.src_uri.count("/"))


def on_page_content(html: str, **_: Any) -> str:
    """Show the roles of docstrings as code."""
    return _ROLE.sub(r"<code>\1</code>", html)


def led(markdown: str, up: str) -> str:
    """Return the text with its links to pages at the root as links to pages of the site."""
    names = "|".join(map(re.escape, PAGES))
    return re.sub(rf"\]\((?:\.\./)*({names})", lambda found: f"]({up}{PAGES[found[1]]}", markdown)

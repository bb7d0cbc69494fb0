"""What the site adds to the pages of ``docs/``: ``make docs``.

The three pages at the root of the repository are pages of the site too, links to them are led there, notebooks become
pages with what they show, the roles that docstrings use become plain code, and the commands describe themselves.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "SECURITY.md": "security.md"}

COMMANDS = "<!-- commands -->"
"""What the help of all commands stands in for."""

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
    for source in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        text, pictures = page_of(source)
        files.append(File.generated(config, f"notebooks/{source.stem}.md", content=text))
        for name, picture in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=picture))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links to the pages at the root to their place in the site, and describe the commands where they belong."""
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, commands())
    return led(markdown, "../" * page.file.src_uri.count("/"))


def on_page_content(html: str, **_: Any) -> str:
    """Show the roles of docstrings as code."""
    return _ROLE.sub(r"<code>\1</code>", html)


def commands() -> str:
    """Return the help of every command as Markdown."""
    asked = [sys.executable, "-m", "typer", "gambeson.cli.app", "utils", "docs", "--name", "gambeson"]
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    found = subprocess.run(asked, capture_output=True, text=True, check=True, env=env).stdout
    return found[found.index("## `gambeson ") :]  # below the title


def page_of(notebook: Path) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, and its pictures by name."""
    parts, pictures = [], dict[str, bytes]()
    for number, cell in enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"]):
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{notebook.stem}-{number}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                parts.append(f"![What the cell above draws]({name})")
            else:
                parts.append("```text\n{}\n```".format("".join(output.get("text") or data["text/plain"]).rstrip()))
    title, _, rest = parts[0].partition("\n")
    parts[0] = f"{title}\n\n[Download this notebook]({notebook.name}), and run it yourself.\n{rest}"
    return "\n\n".join(parts) + "\n", pictures


def led(markdown: str, up: str) -> str:
    """Return the text with its links to pages at the root, and to notebooks, as links to pages of the site."""
    markdown = re.sub(r"(\]\([^)]*notebooks/[\w-]+)\.ipynb\)", r"\1.md)", markdown)
    names = "|".join(map(re.escape, PAGES))
    return re.sub(rf"\]\((?:\.\./)*({names})", lambda found: f"]({up}{PAGES[found[1]]}", markdown)

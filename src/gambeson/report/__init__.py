"""One self-contained HTML page from the folders of finished audits: it opens offline and fetches nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gambeson.base import write_text
from gambeson.report.loading import read_folders
from gambeson.report.page import build, render

__all__ = ["write"]


def write(audits: Sequence[str | Path], out: str | Path, *, title: str | None = None) -> Path:
    """Write one HTML page about one or more audits of the same data.

    Everything in the page comes from the folders' files; nothing is computed again. Equal folders give equal
    bytes.

    Args:
        audits: folders of finished audits, in the order that the page should have.
        out: the file to write; it is replaced in one step.
        title: the page's heading; a plain one is made where none is given.

    Returns:
        The path of the page.

    Raises:
        UserError: no folder is given, a folder holds no finished audit, or the audits cannot stand side by
            side (other data, other norm).
    """
    page = build(read_folders([Path(folder) for folder in audits]), title)
    path = Path(out)
    write_text(path, render(page))
    return path

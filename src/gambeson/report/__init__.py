"""One self-contained HTML page from the folders of finished audits: it works offline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gambeson.base import write_text
from gambeson.report.loading import read_folders
from gambeson.report.page import build, render

__all__ = ["write"]


def write(audits: Sequence[str | Path], out: str | Path, *, title: str | None = None) -> Path:
    """Write one HTML page about one or more audits of the same data.

    Everything in the page comes from the folders' files; nothing is recomputed. Equal folders give equal bytes.

    Args:
        audits: folders of finished audits, in the order of the page.
        out: the output file, replaced atomically.
        title: the page's heading; by default a plain one.

    Returns:
        The path of the page.

    Raises:
        UserError: no folder is given, a folder holds no finished audit, or the audits cannot be compared (other data,
            other norm).
    """
    page = build(read_folders([Path(folder) for folder in audits]), title)
    path = Path(out)
    write_text(path, render(page))
    return path

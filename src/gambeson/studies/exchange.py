"""The results of cells in one file, so that a study begun on one machine goes on on another without a common folder."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

from gambeson.base import UserError, one_line, replaceable, write_bytes, write_json
from gambeson.base.files import parse_json
from gambeson.studies.matrix import Matrix
from gambeson.studies.store import CELLS, RESULT, Damaged, Store, digest
from gambeson.studies.study import Study

_ADDRESS = re.compile(r"[0-9a-f]{16}")


def export_cells(study: Study, root: Path, out: Path) -> int:
    """Write every result of a study, one line of JSON each, compressed; without weights.

    Args:
        study: the study.
        root: folder of studies.
        out: the file.

    Returns:
        The number of results.

    Raises:
        UserError: there is none.
    """
    store, lines = Store(root), list[str]()
    for cell in Matrix(study).cells:
        with suppress(Damaged):
            content = store.read(cell)
            if content is not None:
                lines.append(json.dumps({"address": cell.address, **content}, sort_keys=True))
    if not lines:
        raise UserError("the study has no results yet: run it first, `gambeson study run FILE`")
    replaceable(out, "the results of a study's cells")
    write_bytes(out, gzip.compress("\n".join(lines).encode(), mtime=0))
    return len(lines)


def import_cells(file: Path, root: Path) -> tuple[int, int]:
    """Store results that :func:`export_cells` wrote. What is there already stays as it is.

    A cell is done if the settings and the code that made it are those of the study here; results of other code stay
    unused. Where the weights behind a missing measurement are needed, their training is done again, and if that gives
    other weights, so are the measurements of the old ones.

    Args:
        file: the results.
        root: folder of studies.

    Returns:
        How many results are new, and how many were there.

    Raises:
        UserError: the file cannot be read, or is not what was written; then nothing is stored.
    """
    try:
        text = gzip.decompress(file.read_bytes()).decode()
    except FileNotFoundError:
        raise UserError(f"{file} does not exist: name a file that `gambeson study export --to cells` wrote") from None
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(
            f"{file} cannot be read ({one_line(error)}): expected what `study export --to cells` writes"
        ) from None
    found = [_line(file, number, line) for number, line in enumerate(text.splitlines(), 1)]
    new = 0
    for address, content in found:
        target = root / CELLS / address / RESULT
        if not target.exists():
            write_json(target, content)
            new += 1
    return new, len(found) - new


def _line(file: Path, number: int, line: str) -> tuple[str, dict[str, Any]]:
    with suppress(ValueError):
        content = parse_json(line)
        if isinstance(content, dict):
            address = content.pop("address", "")
            if isinstance(address, str) and _ADDRESS.fullmatch(address) and content.get("sha256") == digest(content):
                return address, content
    raise UserError(f"line {number} of {file} is not a result as it was written: nothing was taken over")

"""A study's results in one file, so that what was begun on one machine goes on on another without a common folder."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from gambeson.base import UserError, one_line, replaceable, write_bytes, write_json, write_yaml
from gambeson.base.files import parse_json
from gambeson.studies.matrix import Matrix
from gambeson.studies.runner import FILE
from gambeson.studies.store import RESULT, Damaged, Store, digest
from gambeson.studies.study import CELLS, Name, Study

_ADDRESS, _NAME = re.compile(r"[0-9a-f]{16}"), TypeAdapter[str](Name)


def export_cells(study: Study, root: Path, out: Path) -> int:
    """Write every result of a study, one line of JSON each, and then the study, compressed; without weights.

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
    about = {"study": study.plain()}
    whole = [*lines, json.dumps(about | {"sha256": digest(about)}, sort_keys=True)]
    write_bytes(out, gzip.compress("\n".join(whole).encode(), mtime=0))
    return len(lines)


def import_cells(file: Path, root: Path) -> tuple[int, int, str]:
    """Store results that :func:`export_cells` wrote, and their study. What is there already stays as it is.

    A cell is done if the settings and the code that made it are those of the study here; results of other code stay
    unused. Where the weights behind a missing measurement are needed, their training is done again, and if that gives
    other weights, so are the measurements of the old ones.

    Args:
        file: the results.
        root: folder of studies.

    Returns:
        How many results are new, how many were there, and the name of the study; empty if the file, an older one, does
        not have it.

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
    found = dict(_line(file, number, line) for number, line in enumerate(text.splitlines(), 1))
    names = {path.parent.name for path in found if path.name == FILE}
    files = {root / path: content for path, content in found.items()}
    new = {path: content for path, content in files.items() if not path.exists()}
    for path, content in new.items():
        write_yaml(path, content) if path.name == FILE else write_json(path, content)
    cells, fresh = (sum(path.name == RESULT for path in some) for some in (files, new))
    return fresh, cells - fresh, next(iter(names), "")


def _line(file: Path, number: int, line: str) -> tuple[Path, dict[str, Any]]:
    """Return the file that a line is of, below the folder of studies, and its content."""
    with suppress(ValueError):
        content = parse_json(line)
        if isinstance(content, dict):
            address = content.pop("address", "")
            if content.get("sha256") == digest(content):
                if isinstance(address, str) and _ADDRESS.fullmatch(address):
                    return Path(CELLS, address, RESULT), content
                if isinstance(study := content.get("study"), dict):
                    return Path(_NAME.validate_python(study.get("name")), FILE), study
    raise UserError(f"line {number} of {file} is not a result as it was written: nothing was taken over")

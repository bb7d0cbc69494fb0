"""What the files and folders that settings name hold, so that a result is never taken for one of other contents."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

WEIGHTS = "model.safetensors"
"""The weights in the folder of a training run."""
_KIND = re.compile(r"[a-z0-9-]+:(?!//)")


def contents(settings: Any, known: dict[str, str] | None = None) -> dict[str, str]:
    """Return the sha256 of what each file or folder named in plain settings holds, by its name there.

    Of a training run it is that of its weights. Of a folder behind the name of a kind, such as ``image-folder:PATH``,
    which may be too large to read, it is that of the names and sizes of its files. Names of Python files are left out:
    their settings hold the hash already (:mod:`gambeson.base.user_code`).

    Args:
        settings: nested lists and dictionaries.
        known: what each name held when it was looked up last, empty where it is no file; names are added, and are not
            looked up again.
    """
    known = {} if known is None else known
    named = set(texts(settings))
    for text in named - known.keys():
        known[text] = _digest(text)
    return {text: known[text] for text in sorted(named) if known[text]}


def texts(value: Any) -> Iterator[str]:
    """Yield every text in nested settings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts(inner)


def _digest(text: str) -> str:
    if "\0" in text or "\n" in text:
        return ""
    bare = text.partition("?")[0]
    behind = _KIND.match(bare)
    # As PATH, as KIND:PATH, and as torchvision:NAME@PATH.
    for name in (bare, bare[behind.end() :] if behind else "", bare.rpartition("@")[2] if "@" in bare else ""):
        try:
            path = Path(name).expanduser()
            if not name or not path.exists():
                continue
            if path.is_file():
                return _of_file(path)
            if (path / WEIGHTS).is_file():
                return _of_file(path / WEIGHTS)
            if name != bare:
                return _of_folder(path)
        except (OSError, RuntimeError):  # too long for a name, not for us to read, or of a home that nobody has
            continue
    return ""


def _of_file(path: Path) -> str:
    about = path.stat()
    return _of_bytes(path.absolute(), about.st_mtime_ns, about.st_size, about.st_ino)


@lru_cache(256)
def _of_bytes(path: Path, *state: int) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _of_folder(path: Path) -> str:
    listed, seen = hashlib.sha256(), set[str]()
    for folder, below, files in os.walk(path, followlinks=True):  # classes may be links to other folders
        below[:] = sorted(name for name in below if os.path.realpath(Path(folder, name)) not in seen)
        seen |= {os.path.realpath(Path(folder, name)) for name in below}
        for name in sorted(files):
            file = Path(folder, name)
            size = file.stat().st_size if file.exists() else -1
            listed.update(f"{file.relative_to(path)}\0{size}\0".encode(errors="surrogateescape"))
    return listed.hexdigest()

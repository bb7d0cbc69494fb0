"""Opening of picture files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image


@contextmanager
def open_picture(path: str | Path) -> Iterator[Image.Image]:
    """Open a picture file.

    By a file object: of a path PIL maps uncompressed TIFFs into memory, with height and width exchanged where EXIF data
    ask for a quarter turn.
    """
    with open(path, "rb") as file, Image.open(file) as picture:
        yield picture

"""Downloads, verified by digest before use."""

from __future__ import annotations

import hashlib

from gambeson.base.errors import UserError
from gambeson.data.formats import opening

PATIENCE = 10
"""Seconds to wait for a silent server."""


def check_digest(blob: bytes, expected: str, what: str, algorithm: str = "sha256") -> bytes:
    """Return ``blob`` if its digest is the expected one.

    Raises:
        UserError: it is not; the message has both digests, the size and the first bytes.
    """
    got = hashlib.new(algorithm, blob, usedforsecurity=False).hexdigest()
    if got != expected:
        raise UserError(f"{what} {opening(blob)}, with {algorithm} {got}: expected {expected}, so it was not used")
    return blob


def download(url: str, md5: str) -> bytes:
    """Download a file with a published md5.

    Unlike torchvision's downloader this one times out, and prints nothing.

    Raises:
        UserError: the server cannot be reached, or sends something else.
    """
    import httpx2 as httpx

    try:
        answer = httpx.get(url, headers={"User-Agent": "gambeson"}, timeout=PATIENCE, follow_redirects=True)
    except httpx.HTTPError as error:
        raise UserError(f"{url} cannot be reached ({str(error) or type(error).__name__})") from None
    if not answer.is_success:
        raise UserError(f"{url} cannot be reached (status {answer.status_code})")
    return check_digest(answer.content, md5, url, "md5")

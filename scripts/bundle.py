#!/usr/bin/env python3
"""Pack what a machine without network needs to run Gambeson, in pieces under 60 MiB; unpack the data there.

    python scripts/bundle.py pack                     # everything, into .bundle/
    python scripts/bundle.py pack --only package,wheels --python 3.12
    python scripts/bundle.py unpack FOLDER PIECE...   # into the folder that $GAMBESON_DATA names

A piece is a file: ``package.tar.gz`` (the source tree), ``wheels/*.whl``, ``cifar10-1.tar`` (20,000 training images
and the test set, enough to start), ``cifar10-2.tar`` (the other 30,000), ``mnist-1.tar``, ``fashion-mnist-1.tar``.
On the machine, from the unpacked source::

    python3 -m pip install --no-index --no-deps --target site wheels/*.whl
    export PYTHONPATH=$PWD/src:$PWD/site GAMBESON_DATA=$PWD/data
    python3 scripts/bundle.py unpack $GAMBESON_DATA cifar10-1.tar cifar10-2.tar
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 60 * 2**20
RUN = ("pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions")
"""What a stock CUDA image with torch, torchvision, accelerate, safetensors, typer, rich and jinja2 lacks."""
REPORT = ("plotly",)
"""What reports need beside it."""
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")
CUTS = {
    "cifar10": [((0, 20000), (0, 10000)), ((20000, 50000), (0, 0))],
    "mnist": [((0, 60000), (0, 10000))],
    "fashion-mnist": [((0, 60000), (0, 10000))],
    "cifar100": [((0, 20000), (0, 10000)), ((20000, 50000), (0, 0))],
}


def pack(out: Path, only: set[str], python: str, machine: str) -> list[str]:
    """Write the bundle; return what could not be had, a line each."""
    out.mkdir(parents=True, exist_ok=True)
    missing = []
    if "package" in only:
        names = ["src", "tests", "benchmarks", "scripts", "pyproject.toml", "README.md", "LICENSE", "Makefile"]
        command = ["tar", "--exclude=__pycache__", "-czf", str(out / "package.tar.gz"), "-C", str(ROOT)]
        subprocess.run([*command, *(name for name in names if (ROOT / name).exists())], check=True)
    for folder, packages in (("wheels", RUN), ("report-wheels", REPORT)):
        if folder in only:
            wheels(out / folder, packages, python, machine)
    from gambeson import UserError
    from gambeson.data.pieces import write_pieces

    for name, cuts in CUTS.items():
        if name not in only:
            continue
        try:
            write_pieces(name, cuts, out)
        except UserError as error:
            missing.append(f"{name}: {error}")
    for file in sorted(out.rglob("*")):
        if file.is_file():
            print(f"{file.stat().st_size / 2**20:7.1f} MiB  {file.relative_to(out)}")
            if file.stat().st_size > LIMIT:
                missing.append(f"{file} is larger than {LIMIT >> 20} MiB: cut it into more pieces")
    return missing


def wheels(folder: Path, packages: tuple[str, ...], python: str, machine: str) -> None:
    """Download the wheels of the versions installed here, for another Python."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", python, "--implementation", "cp", "--dest", str(folder)]
    for platform in PLATFORMS:
        command += ["--platform", f"{platform}_{machine}"]
    subprocess.run([*command, *(f"{name}=={version(name)}" for name in packages)], check=True)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    every = ("package", "wheels", "report-wheels", *CUTS)
    packing = commands.add_parser("pack")
    packing.add_argument("--out", type=Path, default=ROOT / ".bundle")
    packing.add_argument("--only", default="", help=f"some of {', '.join(every)}; by default all that can be had")
    packing.add_argument("--python", default="3.12", help="version on the other machine")
    packing.add_argument("--machine", default="x86_64", help="its processor")
    unpacking = commands.add_parser("unpack")
    unpacking.add_argument("folder", type=Path)
    unpacking.add_argument("pieces", type=Path, nargs="+")
    given = parser.parse_args()
    if given.command == "pack":
        only = set(given.only.split(",")) if given.only else set(every)
        if only - set(every):
            parser.error(f"--only has {', '.join(sorted(only - set(every)))}: choose among {', '.join(every)}")
        missing = pack(given.out, only, given.python, given.machine)
        for line in missing:
            print(f"missing: {line}", file=sys.stderr)
        # What was not asked for by name may be missing: a data set whose server is out of reach is no failure.
        sys.exit(1 if missing and given.only else 0)
    from gambeson import UserError
    from gambeson.data.pieces import unpack

    try:
        for name, state in unpack(given.pieces, given.folder).items():
            print(f"{name}: {state}")
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

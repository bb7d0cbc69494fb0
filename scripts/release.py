#!/usr/bin/env python3
"""Build wheel and sdist, and those of gambeson-zoo, and try each in an empty environment, far from the source tree.

    python scripts/release.py build                            # into dist/; needs the package build
    python scripts/release.py try dist/*.whl dist/*.tar.gz     # a fresh environment for each
    python scripts/release.py try dist/*.whl --torch 2.11.0    # with that version of torch
    python scripts/release.py try dist/*.whl --lowest          # with the oldest dependencies that pyproject.toml allows
    python scripts/release.py try dist/*.whl --site DIR        # torch and the rest from DIR, nothing downloaded

The environment has the Python that runs this script. What is tried takes a minute: version, listings, training, a
universal perturbation, an audit, its report and a gate, by the installed command; then the same names in Python.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["eps=[0.15]", "universal_steps=5", "pgd_steps=3", "test_images=60", "validation_images=60", "sample=30"]
"""Settings of the audit."""
COMMANDS = [
    "--version",
    "list attacks",
    "list defenses",
    "train --data digits --model lenet5 --epochs 10 --batch-size 64 --out runs/x",
    "uap craft runs/x --eps 0.2 --set steps=20 --set probe_starts=0 --out uap.safetensors",
    "uap score uap.safetensors runs/x",
    "audit runs/x --suite glance --out runs/x-audit " + " ".join(f"--set {one}" for one in SMALL),
    "report runs/x-audit",
    "report runs/x-audit --gate clean>=0.5 --junit audit.xml",
]
PYTHON = """
import pathlib, sys
import gambeson as gb
place = pathlib.Path(gb.__file__).resolve()
assert place.is_relative_to(pathlib.Path(sys.prefix).resolve()), f"{place} is not the installed package"
assert (place.parent / "py.typed").is_file()
assert "<style" in pathlib.Path("runs/x-audit/report.html").read_text(), "templates or style are missing"
uap = gb.attacks.UniversalPerturbation.load("uap.safetensors")
assert 0 < uap.delta.abs().max() <= 0.2 + 1e-6, "the perturbation does nothing, or too much"
assert len(gb.attacks.names("universal")) >= 8 and len(gb.defenses.names()) >= 18
print("gambeson", gb.__version__, "torch", __import__("torch").__version__, "python", sys.version.split()[0])
"""


def build(out: Path) -> list[Path]:
    """Build all from a clean export of the last commit, so that nothing else gets in."""
    with tempfile.TemporaryDirectory() as clean:
        tree = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", clean], input=tree, check=True)
        for place in (clean, f"{clean}/packages/gambeson-zoo"):
            subprocess.run([sys.executable, "-m", "build", "--outdir", str(out.resolve()), place], check=True)
    return sorted(out.iterdir())


def attempt(file: Path, torch: str, site: str, *, lowest: bool) -> None:
    """Install one file into an empty environment, with the zoo beside it, and run what a new user would."""
    zoo = sorted(file.parent.glob("gambeson_zoo-*.whl"))
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        venv.create(here / "env", with_pip=True)
        python, gambeson = (str(here / "env" / "bin" / name) for name in ("python", "gambeson"))
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        if site:
            (library,) = (here / "env" / "lib").glob("python*/site-packages")
            (library / "borrowed.pth").write_text(f"{Path(site).resolve()}\n")
        wanted = [f"{file.resolve()}[digits]", *(str(one.resolve()) for one in zoo)]
        wanted += [f"torch=={torch}"] if torch else []
        alone = ["--no-deps"] if site or lowest else []
        if lowest:  # of the direct dependencies; those of a file are none of uv's direct ones
            run([python, "-m", "pip", "install", "--quiet", "uv"], here, environment)
            oldest = ["--resolution", "lowest-direct", "-r", str(ROOT / "pyproject.toml"), "--extra", "digits"]
            run([python, "-m", "uv", "pip", "install", "--quiet", "--python", python, *oldest], here, environment)
        run([python, "-m", "pip", "install", "--quiet", *alone, *wanted], here, environment)
        for command in [*COMMANDS, *(["zoo verify digits/lenet5/standard"] if zoo else [])]:
            run([gambeson, *command.split()], here, environment)
        run([python, "-c", PYTHON], here, environment)


def run(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    """Run a command; stop with its output if it fails."""
    found = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if found.returncode:
        sys.exit(f"{' '.join(command)}\nended with {found.returncode}:\n{found.stdout}{found.stderr}")
    print(f"{Path(command[0]).name} {' '.join(command[1:4])}".splitlines()[0], flush=True)
    if "--version" in command or "-c" in command:
        print(found.stdout.strip(), flush=True)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("build", "try"))
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where build writes")
    parser.add_argument("--torch", default="", help="version of torch; the newest by default")
    parser.add_argument("--site", default="", help="site-packages to borrow everything else from")
    parser.add_argument("--lowest", action="store_true", help="the oldest dependencies that pyproject.toml allows")
    given = parser.parse_args()
    if given.what == "build":
        print(*build(given.out), sep="\n")
        return
    if not given.files:
        parser.error("name the files to try: dist/*.whl dist/*.tar.gz")
    for file in given.files:
        if file.name.startswith("gambeson_zoo-"):
            continue  # tried beside each of the others
        attempt(file, given.torch, given.site, lowest=given.lowest)
        print(f"{file.name}: works")


if __name__ == "__main__":
    main()

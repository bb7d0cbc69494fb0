"""Stored results: what each says of itself, and the one way to write them and to go on with one.

A file of ``results/`` is the summary of a study, or holds ``about``: the command that makes it, its date, its settings
and its environment. What other programs write (audits, the testbed, visits to a GPU) says part of that itself; the rest
is in ``results/made.yaml``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field

from gambeson.base import Config, UserError, environment, read_json, write_json

RESULTS = Path(__file__).parent.parent / "results"
MADE = "made.yaml"


class About(Config):
    """What a stored result says of itself."""

    command: Annotated[str, Field(min_length=5)]
    date: Annotated[str, Field(pattern=r"^20\d\d-\d\d-\d\d")]
    device: Annotated[str, Field(min_length=3)]
    torch: Annotated[str, Field(min_length=3)]
    settings: dict[str, Any]


def files(folder: Path = RESULTS) -> list[Path]:
    """Every stored result."""
    return sorted(folder.rglob("*.json"))


def load(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """Read a stored result by the name of its file.

    Raises:
        UserError: there is none, or it does not say what made it.
    """
    content: dict[str, Any] = read_json(folder / name)
    abouts(folder / name, content, folder)
    return content


def abouts(file: Path, content: dict[str, Any], folder: Path = RESULTS) -> list[About]:
    """What a stored result says of itself; of each case, where they were made one by one.

    Raises:
        UserError: it does not say all of it.
    """
    if all(isinstance(case, dict) and "about" in case for case in content.values()):
        return [one for case in content.values() for one in abouts(file, case, folder)]
    name = str(file.relative_to(folder))
    said: dict[str, Any] = yaml.safe_load((folder / MADE).read_text()).get(name, {})
    if "study" in content:
        said["command"] = f"gambeson study run studies/{content['study']['name']}.yaml"
        said |= {"date": content["date"], "settings": content["study"].get("settings", content["study"])}
    elif not said:
        said = {key: value for key, value in content.get("about", {}).items() if key != "environment"}
    within = next(_environments(content), {})
    known = {key: within[key] for key in ("device", "torch") if key in within}
    try:
        return [About(**{"settings": content.get("settings", {})} | known | said)]
    except UserError as error:
        raise UserError(f"results/{name} does not say how it was made: {error}") from None


def _environments(content: Any) -> Iterator[dict[str, str]]:
    if isinstance(content, dict) and {"device", "torch"} <= content.keys():
        yield content
    for inner in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        yield from _environments(inner)


def made(command: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What a result that is made now says of itself."""
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    return {"command": command, "date": date, "settings": settings, "environment": environment()}


class Rows:
    """The rows of a result by key. Each is stored when it is there, so that the same command goes on after a cut.

    Args:
        file: the result; rows that were made with other settings are left out.
        command: that makes it.
        settings: that decide every row.
    """

    def __init__(self, file: Path, command: str, settings: dict[str, Any]) -> None:
        self.file, self.command, self.settings = file, command, settings
        old: dict[str, Any] = read_json(file) if file.is_file() else {}
        self.rows: dict[str, Any] = old["rows"] if old and old["about"]["settings"] == settings else {}

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of the keys that have no row."""
        return [key for key in keys if key not in self.rows]

    def add(self, key: str, row: Any, **content: Any) -> None:
        """Store a row, and the rest of the result as it is now."""
        self.rows[key] = row
        write_json(self.file, {"about": made(self.command, self.settings), "rows": self.rows, **content})

"""Write the tables of attacks, defences and settings of suites into their pages, from the code.

``python docs/tables.py`` rewrites what stands between the markers; a test fails while it is stale.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from gambeson.attacks.registry import ATTACKS, kind_of
from gambeson.auditing import SUITES, Suite
from gambeson.auditing.gates import METRICS
from gambeson.base import Registered
from gambeson.defenses.registry import DEFENSES

DOCS = Path(__file__).parent
COSTS = {
    "image": "forwards / backwards per image",
    "universal": "images forward and backward",
    "defense": "forwards / backwards",
}


def table(entries: list[Registered[Any]], cost: str) -> str:
    """Return a row per entry: its name, its source, its cost, its docstring's first sentence, and its own settings."""
    lines = [f"| name | source | {cost} | what it does | settings |", "|---|---|---|---|---|"]
    for entry in sorted(entries, key=lambda entry: entry.name):
        source, spent = (str(entry.options.get(key, "")) for key in ("source", "cost"))
        cells = (f"`{entry.name}`", source, spent, entry.summary, settings(entry))
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def settings(entry: Registered[Any]) -> str:
    """Name the settings that a name fixes and those that its class defines, with their defaults."""
    preset = entry.options.get("preset", {})
    own = [name for name in vars(entry.target).get("__annotations__", {}) if name in entry.settings]
    shown = []
    for name in preset or own:
        setting = entry.settings[name]
        if setting.required:
            shown.append(f"`{name}`")
        elif isinstance(setting.default, dict):
            shown.append(f"`{name}={type(preset[name]).__name__}()`" if name in preset else f"`{name}`")
        else:
            number = f"{setting.default:.4g}" if isinstance(setting.default, float) else str(setting.default)
            shown.append(f"`{name}={number}`")
    return ", ".join(shown)


def suites() -> str:
    """Return a row per setting of an audit's suite: its value in each suite, and its description."""
    lines = [f"| setting | {' | '.join(f'`{name}`' for name in SUITES)} | meaning |", "|---" * (len(SUITES) + 2) + "|"]
    for name, field in Suite.model_fields.items():
        values = [suite.plain()[name] for suite in SUITES.values()]
        shown = [", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value) for value in values]
        meaning = re.sub(r":\w+:`([^`]+)`", r"`\1`", " ".join((field.description or "").split()).replace("``", "`"))
        lines.append("| " + " | ".join((f"`{name}`", *shown, meaning)) + " |")
    return "\n".join(lines) + "\n"


def gates() -> str:
    """Return a row per metric that gates of an audit are about."""
    ends = {"@": "@EPS", ":": ":NAME", "": ""}
    lines = ["| metric | meaning | compared with |", "|---|---|---|"]
    for name, metric in METRICS.items():
        after = ends[metric.after] if metric.word else f"[{ends[metric.after]}]" if metric.after else ""
        kind = "nothing" if metric.word else "an eps" if metric.highest is None else "a share"
        lines.append(f"| `{name}{after}` | {metric.meaning} | {kind} |")
    return "\n".join(lines) + "\n"


def tables() -> dict[str, tuple[str, str]]:
    """Return each table, by its marker, with the page that it stands in."""
    attacks = ATTACKS.own()
    image = [entry for entry in attacks if kind_of(entry) == "image"]
    universal = [entry for entry in attacks if kind_of(entry) == "universal"]
    return {
        "attacks per image": ("attacks.md", table(image, COSTS["image"])),
        "universal attacks": ("attacks.md", table(universal, COSTS["universal"])),
        "gate metrics": ("ci.md", gates()),
        "suite settings": ("suites.md", suites()),
        "defences": ("defenses.md", table(DEFENSES.own(), COSTS["defense"])),
    }


def main() -> None:
    """Rewrite the pages."""
    for marker, (page, text) in tables().items():
        file = DOCS / page
        before, rest = file.read_text().split(f"<!-- {marker} -->\n")
        _, after = rest.split(f"<!-- /{marker} -->", maxsplit=1)
        file.write_text(f"{before}<!-- {marker} -->\n{text}<!-- /{marker} -->{after}")


if __name__ == "__main__":
    main()

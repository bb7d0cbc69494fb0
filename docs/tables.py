"""Write every table of the README and the docs into its page, from the code and from ``results/``: ``make tables``.

What stands between two markers is rewritten; a test fails while a page is stale.
"""

from __future__ import annotations

import math
import re
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from gambeson.analysis import correlate
from gambeson.attacks.registry import ATTACKS, kind_of
from gambeson.auditing import SUITES, AuditResult, Suite
from gambeson.auditing.gates import METRICS
from gambeson.base import Registered, read_json
from gambeson.defenses.registry import DEFENSES
from gambeson.evaluation import Rate
from gambeson.studies.verdicts import interval

DOCS = Path(__file__).parent
sys.path += [str(DOCS), str(DOCS.parent / "benchmarks")]
import adversary  # noqa: E402
import audit_page  # noqa: E402
import case_tables  # noqa: E402
import claims  # noqa: E402
import glance  # noqa: E402
import make_zoo  # noqa: E402
import patch  # noqa: E402
import recipe  # noqa: E402
import scaling  # noqa: E402
import testbed_rates  # noqa: E402
import unet_audits  # noqa: E402
from stored import RESULTS, abouts, files, load  # noqa: E402

WIDTH = 140

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


def lines(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a table."""
    names = list(head)
    body = (f"| {' | '.join(map(str, cells))} |\n" for cells in rows)
    return "".join([f"| {' | '.join(names)} |\n", "|---" * len(names) + "|\n", *body])


def shares(rows: list[dict[str, Any]], metric: str) -> list[float]:
    """Return a metric of a study's rows in per cent; nothing of those that do not have it."""
    return [100 * row["values"][metric]["value"] for row in rows if metric in row["values"]]


def by_defense(name: str) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of a study, those of all seeds together."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in load(f"{name}.json")["rows"]:
        found.setdefault(row["defense"], []).append(row)
    return found


def over_seeds(values: list[float]) -> str:
    """Return the mean, and the range where there are several."""
    spread = f" ({min(values):.0f}-{max(values):.0f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}" if values else "not run"


def defences() -> str:
    """Return the comparison of the defences."""
    columns = {"clean.accuracy": "clean", "uap-half.uer": "UER 0.1", "uap.uer": "UER 0.2", "uap-more.uer": "UER 0.3"}
    columns |= {"pgd.accuracy": "PGD-40 at 0.1", "suite.accuracy": "attack suite at 0.1"}
    cost = load("defenses.json").get("time of a step", {})
    found = []
    for name, rows in by_defense("defenses").items():
        cells = [over_seeds(shares(rows, metric)) for metric in columns]
        found.append([name, len(rows), f"{cost[name]:.1f}" if name in cost else "", *cells])
    return lines(["defence", "seeds", "time of a step", *columns.values()], found)


def ablation() -> str:
    """Return the preset's numbers, and by how much they change without a part of it, seed by seed."""
    columns = {"clean.accuracy": "clean", "uap.uer": "UER 0.2", "uap-more.uer": "UER 0.3"}
    columns |= {"pgd.accuracy": "PGD-20 at 0.1", "pgd-full.accuracy": "PGD-20 at 0.2"}
    rows = by_defense("gambeson-ablation")
    preset = rows.pop("gambeson")
    found = [["gambeson", *(over_seeds(shares(preset, metric)) for metric in columns)]]
    for name, others in rows.items():
        cells = []
        for metric in columns:
            changes = [other - own for other, own in zip(shares(others, metric), shares(preset, metric), strict=True)]
            low, high = interval(changes) or (math.nan, math.nan)
            cells.append(f"{statistics.mean(changes):+.1f} [{low:+.1f}, {high:+.1f}]")
        found.append([name, *cells])
    return lines(["training", *columns.values()], found)


def hardened() -> str:
    """Return what hardening made of the quickstart's standard network."""
    found = load("harden-quickstart.json")["rates"]
    cells = [[Rate(**rates[side]) for side in ("original", "hardened")] for rates in found.values()]
    return lines(["per cent", "original", "hardened"], ([f"`{n}`", *c] for n, c in zip(found, cells, strict=True)))


def scenes() -> str:
    """Return what shared adversarial training does on label maps, means over seeds and static targets."""
    stored = load("segmentation.json")
    lost = {name: row.get("clean mean IoU lost", {"mean": 0.0})["mean"] for name, row in stored["summary"].items()}
    found = {name: stored["summary"][name] for name in sorted(lost, key=lost.__getitem__)}
    cells = {name: [cell for cell in stored["cells"] if cell["defense"] == name] for name in found}

    def spread(value: dict[str, float], scale: float = 1.0, unit: str = "", digits: int = 1) -> str:
        mean, low, high = (f"{scale * value[key]:.{digits}f}" for key in ("mean", "low", "high"))
        return f"{mean}{unit}" if low == high else f"{mean}{unit} [{low}, {high}]"

    def static(name: str, at: str) -> list[dict[str, Any]]:
        return [cell[target][at]["target"] for cell in cells[name] for target in ("static:1", "static:9")]

    def shown(name: str, at: str, kind: str = "success") -> str:
        return f"{100 * statistics.mean(one[kind]['value'] for one in static(name, at)):.0f} %"

    def controls(name: str, at: str) -> str:
        strongest = [max(one["success"]["value"] for one in found["controls"]) for found in static(name, at)]
        return f"{100 * statistics.mean(strongest):.0f} %"

    def of(name: str, metric: str, otherwise: str, **how: Any) -> str:
        return spread(found[name][metric], **how) if metric in found[name] else otherwise

    rows: dict[str, Callable[[str], str]] = {
        "seeds": lambda name: str(found[name]["seeds"]),
        "clean pixel accuracy": lambda name: (
            f"{100 * statistics.mean(cell['clean']['accuracy']['value'] for cell in cells[name]):.1f} %"
        ),
        "clean mean IoU": lambda name: of(name, "clean mean IoU", "", scale=100, unit=" %"),
        "points of it lost": lambda name: of(name, "clean mean IoU lost", "0", scale=100),
        "pixels that show the target without a perturbation": lambda name: shown(name, "0.06275", "clean"),
        **{
            f"at {round(255 * float(eps))}/255": partial(shown, at=eps)
            for eps in ("0.01569", "0.03137", "0.06275", "0.1255")
        },
        "strongest control at 16/255": lambda name: controls(name, "0.06275"),
        "eps for 80 %, in 1/255": lambda name: of(name, "eps for the same success", "", scale=255),
        "times that of the standard network": lambda name: of(name, "ratio of eps", "1"),
        "structural similarity at the weakest success": lambda name: of(name, "SSIM", "", digits=2),
        "edges of the target above those of other scenes": lambda name: of(
            name, "edges shown above other scenes", "", digits=2
        ),
    }
    return lines(["", *found], ([what, *map(value, found)] for what, value in rows.items()))


def calibrated() -> str:
    """Return what crafting at calibrated logits changes in it."""
    metrics = {"0.3": "uap-more.uer", "0.2": "uap.uer", "0.1": "uap-half.uer"}
    before, after = by_defense("defenses"), by_defense("defenses-calibrated")
    moved: dict[str, dict[str, tuple[float, float]]] = {}
    for name, rows in after.items():
        old = [row for row in before[name] if row["seed"] == rows[0]["seed"]]
        moved[name] = {eps: (shares(old, metric)[0], shares(rows, metric)[0]) for eps, metric in metrics.items()}
    spans = []
    for eps in ("0.2", "0.1"):
        changes = [high - low for low, high in (one[eps] for one in moved.values())]
        spans.append(f"at {eps} by {min(changes):+.1f} to {max(changes):+.1f} points")
    told = [f"from {one['0.3'][0]:.1f} to {one['0.3'][1]:.1f} % for `{name}`" for name, one in moved.items()]
    return textwrap.fill(f"UER at 0.3 goes {'; '.join(told)}. It changes {', '.join(spans)}.", WIDTH) + "\n"


RIVALS = {"ours": "ours", "stochastic-pgd": "stochastic PGD", "sga": "SGA", "df-uap": "bounded logits"}


def universal() -> str:
    """Return the universal attacks at equal budgets."""
    controls, found = load("universal-budget.json").get("controls", {}), []
    for net, rows in sorted(by_defense("universal-budget").items(), key=lambda one: one[0] != "standard"):
        for eps, end in (("0.05", "-half"), ("0.1", ""), ("0.2", "-twice")):
            values = [shares(rows, f"{rival}{end}.uer") for rival in RIVALS]
            cells = [f"{statistics.mean(one):.1f} ({min(one):.1f} to {max(one):.1f})" for one in values]
            worst = max((one["worst"]["value"] for one in controls.get(net, {}).get(eps, [])), default=None)
            found.append([net, eps, *cells, "" if worst is None else f"{100 * worst:.1f}"])
    return lines(["net", "eps", *RIVALS.values(), "strongest control"], found)


def box_gradient() -> str:
    """Return by how much the clip's straight-through gradient raises the UER."""
    rows = load("box-gradient.json")["rows"]
    found = [
        [b - a for a, b in zip(shares(rows, f"exact{end}.uer"), shares(rows, f"straight{end}.uer"), strict=True)]
        for end in ("-half", "", "-more")
    ]
    higher, pairs = sum(gain > 0 for some in found for gain in some), sum(map(len, found))
    return (
        f"  the UER is higher in {higher} of {pairs} pairs of runs (three eps, three seeds, equal steps), at eps 0.25 "
        f"by {min(found[-1]):.1f} to {max(found[-1]):.1f} points.\n  "
    )


RADII = {"-half": "0.05", "": "0.1", "-twice": "0.2"}
"""Radii of the study of sharing, by the end of the measurement's label."""
SHARED = {"cka": "cka", "pairs": "cos_F", "jacobian": "norm", "rank1": "rank1", "ratio_s": "ratio_s"}
SHARED |= {"sharing": "sharing factor", "weighted_sigma": "weighted sigma"}


def sharing() -> str:
    """Return the correlations of sharing metrics with the UER over the models of each data set."""
    rows = load("sharing.json")["rows"]
    found = []
    for data in sorted({row["data"] for row in rows}):
        own = [row["values"] for row in rows if row["data"] == data]
        columns = {
            name: [one[f"jacobians.{name}"]["value"] for one in own] for name in SHARED if f"jacobians.{name}" in own[0]
        }
        columns |= {
            name: [math.log(value) for value in columns[name]]
            for name in ("jacobian", "weighted_sigma")
            if name in columns
        }
        for name, column in columns.items():
            cells = []
            for end in RADII:
                uers = [one[f"uap{end}.uer"]["value"] for one in own]
                one = correlate(column, uers, None if name == "jacobian" else columns["jacobian"])
                both = [part for part in (one.spearman, one.partial) if part]
                cells.append("; ".join(f"{part.value:.2f} [{part.low:.2f}, {part.high:.2f}]" for part in both))
            found.append([data, SHARED[name], *cells])
    return lines(["data", "metric", *(f"eps {eps}" for eps in RADII.values())], found)


def gains() -> str:
    """Return what the regulariser gains at the best strength that costs at most a point of accuracy, by validation."""
    seeds: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in load("sharing.json")["rows"]:
        values = {name: value["value"] for name, value in row["values"].items()}
        seeds.setdefault((row["data"], row["seed"]), {})[row["variant"].removeprefix("strength ")] = values
    found = []
    for (data, seed), own in sorted(seeds.items()):
        plain, accuracy = own.pop(""), "train.validation_accuracy"
        kept = {key: one for key, one in own.items() if one[accuracy] >= plain[accuracy] - 0.01}
        for end, eps in RADII.items():
            chosen = min(
                kept, key=lambda key: kept[key].get(f"uap{end}.validation_uer") or kept[key]["train.validation_uer"]
            )
            without, uer = plain[f"uap{end}.uer"], kept[chosen][f"uap{end}.uer"]
            cells = [f"{without / uer:.2f}", f"{(1 - uer) / (1 - without):.2f}"]
            found.append([f"{data}, seed {seed}, eps {eps}", chosen, *cells])
    head = ["data, seed, eps", "strength", "UER without / with", "accuracy under it with / without"]
    return lines(head, found)


def scales() -> str:
    """Return the UER and the accuracy under PGD by the scale of the logits."""
    rows = list(load("scale.json")["rows"].values())
    values = [one["multiple"] for one in rows[0]["scales"][1:]]
    found = []
    for row in rows:
        cells = [
            f"{100 * statistics.mean(one['uer']):.0f} / {100 * one['pgd accuracy']['value']:.0f}"
            for one in row["scales"]
        ]
        cells[0] += f" at {row['scales'][0]['multiple']:.2f}"
        found.append([f"{row['data']}, {row['net']}, {row['eps']:.3g}", *cells])
    return lines(["net, eps", "as they are", *(f"{n:g}" if n >= 1 else f"1/{1 / n:g}" for n in values)], found)


def autoattack() -> str:
    """Return the suite beside public AutoAttacks."""
    found = []
    for name in ("autoattack", "autoattack-torchattacks"):
        for peer, one in load(f"{name}.json")["summary"].items():
            cells = [f"{one[key]:.3f}" for key in ("robust_ours", "robust_peer")]
            ratios = [f"{one[key]:.2f}" for key in ("ratio_of_sums", "ratio_median_in_bare_forwards")]
            found.append([peer, one["images"], *cells, one["only_ours_broke"], one["only_peer_broke"], *ratios])
    head = ["beside", "images", "robust accuracy, ours", "theirs", "broken by ours alone", "by theirs alone"]
    return lines([*head, "processor time over theirs", "the same in bare forward passes"], found)


def peers() -> str:
    """Return our attacks beside those of other libraries, by attack."""
    found = []
    rows = [row for row in load("cross-check.json")["rows"].values() if row["equal"]]
    for attack in dict.fromkeys(row["attack"] for row in rows):
        own = [row for row in rows if row["attack"] == attack]
        gaps = [100 * row["accuracy"]["difference"] for row in own]
        weaker = [sum(row[key] for row in own) for key in ("weaker", "clearly_weaker")]
        names = ", ".join(sorted({row["peer"].split(",")[0] for row in own}))
        found.append([attack, names, len(own), f"{min(gaps):+.1f} to {max(gaps):+.1f}", *weaker])
    return lines(["attack", "beside", "comparisons", "our accuracy less theirs, points", "weaker", "clearly"], found)


def timings() -> str:
    """Return what was timed on processors, a line per case."""
    found = []
    for title, case in load("timings.json").items():
        rows = sorted(case["rows"].items(), key=lambda one: one[1]["ratio"])
        first = next(name for name, row in rows if row["ratio"] == 1)
        cpu = {name: f" ({row['cpu_ratio']:.2g})" if row.get("cpu_ratio") else "" for name, row in rows}
        told = [f"{name}: {row['ratio']:.2g}{cpu[name]}" for name, row in rows if name != first]
        found.append([title, first, "; ".join(told)])
    return lines(["case", "over", "time (processor seconds)"], found)


def made() -> str:
    """Return what made each stored result."""
    found: list[list[str]] = []
    for file in files():
        name = str(file.relative_to(RESULTS))
        for one in abouts(file, load(name)):
            row = [f"`{name}`", f"`{one.command}`", one.date, one.device, one.torch]
            found += [row] * (row not in found)
    return lines(["result", "made by", "date", "device", "torch"], found)


def quickstart() -> str:
    """Return the quickstart's three audits."""
    found = []
    for model in ("standard", "pgd-adversarial", "shared-adversarial"):
        audit = AuditResult.load(RESULTS / "quickstart" / model)
        point = audit.middle
        worst = max((control.worst for control in point.controls), key=lambda rate: rate.value)
        assert audit.eps_uni is not None
        cells = [audit.clean, point.uer, audit.per_image[0].accuracy, f"at most {audit.eps_uni.value:.3f}", worst]
        found.append([model, *cells])
        eps = f"eps {point.eps:g}"
    head = ["model", "clean accuracy", f"UER at {eps}", f"PGD accuracy at {eps}", "eps_uni(0.5)"]
    return lines([*head, f"strongest control at {eps}"], found)


def zoo() -> str:
    """Return the networks of the zoo, from the manifest of its package."""
    head = ["name after `zoo:`", "trained with", "eps", "clean accuracy", "UER", "attack suite", "verdict"]
    found = []
    for name, entry in read_json(make_zoo.PACKAGE / make_zoo.MANIFEST)["entries"].items():
        rates = [Rate(**entry[key]) for key in ("clean", "uer", "suite")]
        trusted = "trusted" if entry["trusted"] else "not trusted"
        found.append([f"`{name}`", entry["summary"], f"{entry['eps']:g}", *rates, trusted])
    return lines(head, found)


def tables() -> dict[str, tuple[str, str]]:
    """Return each table, by its marker, with the page that it stands in."""
    attacks = ATTACKS.own()
    image = [entry for entry in attacks if kind_of(entry) == "image"]
    universal_ = [entry for entry in attacks if kind_of(entry) == "universal"]
    return {
        "attacks per image": ("attacks.md", table(image, COSTS["image"])),
        "universal attacks": ("attacks.md", table(universal_, COSTS["universal"])),
        "gate metrics": ("ci.md", gates()),
        "suite settings": ("suites.md", suites()),
        "defences": ("defenses.md", table(DEFENSES.own(), COSTS["defense"])),
        "quickstart table": ("../README.md", quickstart()),
        "claims table": ("../README.md", lines(*claims.headline())),
        "preset table": ("recipe.md", lines(*claims.of_preset("gambeson"))),
        "preset at equal time table": ("recipe.md", lines(*claims.of_preset("gambeson", "seconds"))),
        "preset as shipped table": ("recipe.md", lines(*claims.as_shipped())),
        "preset at half table": ("recipe.md", lines(*claims.of_preset("gambeson-half"))),
        "auditors table": ("../README.md", testbed_rates.beside()),
        "defenses table": ("defenses.md", defences()),
        "calibrated crafting": ("defenses.md", calibrated()),
        "ablation": ("recipe.md", ablation()),
        "hardened": ("recipe.md", hardened()),
        "equal budgets": ("attacks.md", universal()),
        "segmentation table": ("segmentation.md", scenes()),
        "patch table": ("threats.md", f"\n{patch.table(load('patch.json'))}\n\n"),
        "unet audits table": ("segmentation.md", unet_audits.text()),
        "box gradient": ("attacks.md", box_gradient()),
        "autoattack table": ("attacks.md", autoattack()),
        "peers table": ("attacks.md", peers()),
        "sharing table": ("analysis.md", sharing()),
        "gains table": ("analysis.md", gains()),
        "scale table": ("audit.md", scales()),
        "timings table": ("performance.md", timings()),
        "zoo table": ("zoo.md", zoo()),
        "results table": ("studies.md", made()),
        "costs": ("suites.md", audit_page.costs_text()),
        "strength": ("suites.md", audit_page.strength_text()),
        "adversary table": ("testbed.md", adversary.table(load("adversary.json"))),
        "odd models table": ("testbed.md", adversary.table(load("odd_models.json"))),
        "glance": ("suites.md", glance.table(load("glance.json"))),
        "diagnostics": ("checks.md", audit_page.diagnostics_text()),
        "own rates": ("testbed.md", audit_page.own_rates_text()),
        "error rates": ("testbed.md", audit_page.rates_text()),
        "models": ("testbed.md", audit_page.models_text()),
        "rates by library": ("testbed.md", testbed_rates.text()),
        **{
            f"claims {page}": (f"papers/{page}.md", lines(*claims.of_paper(prefix)))
            for page, prefix in claims.PAPERS.items()
        },
        **{marker: ("recipe.md", text) for marker, text in recipe.tables(load("recipe.json")).items()},
        **{marker: (page, lines(*made)) for marker, (page, made) in case_tables.tables().items()},
    } | {f"{name} table": ("scaling.md", f"\n{text}\n") for name, text in scaling.tables(load("scaling.json")).items()}


def between(page: str, marker: str) -> str:
    """Return what stands between two markers of a page."""
    return (DOCS / page).read_text().split(f"<!-- {marker} -->\n")[1].split(f"<!-- /{marker} -->")[0]


def main() -> None:
    """Rewrite the pages."""
    for marker, (page, text) in tables().items():
        file = DOCS / page
        file.write_text(audit_page.renewed(file.read_text(), {marker: text}))


if __name__ == "__main__":
    main()

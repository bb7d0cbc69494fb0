import importlib.util
import json
import re
import statistics
from pathlib import Path

import pytest

from gambeson import attacks, defenses

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def defense_table():
    """The table of docs/defenses.md, from what ``benchmarks/defenses.py`` stored."""
    content = json.loads((ROOT / "results" / "defenses.json").read_text())
    columns = {"clean": "clean", "uer 0.1": "UER 0.1", "uer 0.2": "UER 0.2", "uer 0.3": "UER 0.3"}
    columns |= {"pgd-40 at 0.1": "PGD-40 at 0.1", "suite at 0.1": "attack suite at 0.1"}
    lines = [f"| defence | seeds | time of a step | {' | '.join(columns.values())} |", "|---|" + "---|" * 8]
    for name, cells in content["cells"].items():
        cost, values = content.get("cost", {}).get(name), []
        for key in columns:
            found = [100 * cell[key]["value"] for cell in cells.values()]
            spread = f" ({min(found):.0f}-{max(found):.0f})" if len(found) > 1 else ""
            values.append(f"{statistics.mean(found):.1f}{spread}")
        lines.append(f"| {name} | {len(cells)} | {'' if cost is None else f'{cost:.1f}'} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def universal_table():
    """The table of universal attacks in docs/attacks.md, from what ``benchmarks/universal_budget.py`` stored."""
    content = json.loads((ROOT / "results" / "universal-budget.json").read_text())
    rivals = {"ours": "ours", "stochastic-pgd": "stochastic PGD", "sga": "SGA", "df-uap": "bounded logits"}
    lines = [f"| net | eps | {' | '.join(rivals.values())} | strongest control |", "|---|---|" + "---|" * 5]
    cells = {}
    for row in content["rows"]:
        if row["budget"] == 25600 and row["attack"] in rivals:
            cells.setdefault((row["net"], row["eps"]), {}).setdefault(row["attack"], []).append(row["uer"]["value"])
    for (net, eps), found in sorted(cells.items(), key=lambda cell: (cell[0][0] != "standard", cell[0][1])):
        values = []
        for name in rivals:
            low, high = 100 * min(found[name]), 100 * max(found[name])
            values.append(f"{100 * statistics.mean(found[name]):.1f} ({low:.1f} to {high:.1f})")
        control = max(one["worst"]["value"] for one in content["controls"][net][f"{eps:g}"])
        lines.append(f"| {net} | {eps:g} | {' | '.join(values)} | {100 * control:.1f} |")
    return "\n".join(lines) + "\n"


def sharing_table():
    """The table of docs/analysis.md, from what ``benchmarks/sharing.py`` stored."""
    content = json.loads((ROOT / "results" / "sharing.json").read_text())
    radii = ("0.05", "0.1", "0.2")
    lines = [f"| data | metric | {' | '.join(f'eps {eps}' for eps in radii)} |", "|---|---|" + "---|" * len(radii)]
    for data, metrics in content["correlations"].items():
        for metric, cells in metrics.items():
            values = []
            for eps in radii:
                both = [cells[eps]["spearman"], cells[eps]["partial"]]
                values.append("; ".join(f"{c['value']:.2f} [{c['low']:.2f}, {c['high']:.2f}]" for c in both if c))
            lines.append(f"| {data} | {metric} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def scale_table():
    """The table of the logits' scale in docs/audit.md, from what ``benchmarks/scale.py`` stored."""
    rows = json.loads((ROOT / "results" / "scale.json").read_text())["rows"]
    values = [one["multiple"] for one in rows[0]["scales"][1:]]
    multiples = [f"{value:g}" if value >= 1 else f"1/{1 / value:g}" for value in values]
    lines = [f"| net, eps | as they are | {' | '.join(multiples)} |", "|---|---|" + "---|" * len(multiples)]
    for row in rows:
        cells = [
            f"{100 * statistics.mean(one['uer']):.0f} / {100 * one['pgd accuracy']['value']:.0f}"
            for one in row["scales"]
        ]
        cells[0] += f" at {row['scales'][0]['multiple']:.2f}"
        lines.append(f"| {row['data']}, {row['net']}, {row['eps']:.3g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def gains_table():
    """The table of what the regulariser gains, from what ``benchmarks/sharing.py`` stored."""
    gains = json.loads((ROOT / "results" / "sharing.json").read_text())["gains"]
    lines = [
        "| data, seed, eps | strength | UER without / with | accuracy under it with / without |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {gain['strength']:g} | {gain['ratio']:.2f} | {gain['accuracy ratio']:.2f} |"
        for name, gain in gains.items()
    ]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("page", "name", "table"),
    [
        ("analysis", "sharing table", sharing_table),
        ("analysis", "gains table", gains_table),
        ("audit", "scale table", scale_table),
    ],
)
def test_the_numbers_of_a_page_are_the_stored_ones(page, name, table):
    text = (DOCS / f"{page}.md").read_text()
    assert text.split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->")[0] == table()


def test_the_universal_attacks_numbers_are_the_stored_ones():
    text = (DOCS / "attacks.md").read_text()
    assert text.split("<!-- universal table -->\n")[1].split("<!-- /universal table -->")[0] == universal_table()


def test_the_tables_of_names_are_those_of_the_registry():
    spec = importlib.util.spec_from_file_location("docs_tables", DOCS / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    found = tables.tables()
    registered = [text for marker, (_, text) in found.items() if marker not in ("suite settings", "gate metrics")]
    rows = [row for text in registered for row in text.splitlines() if row.startswith("| `")]
    own = {entry.name for registry in (tables.ATTACKS, tables.DEFENSES) for entry in registry.own()}
    names = [*attacks.names("image"), *attacks.names("universal"), *defenses.names()]
    names = [name for name in names if name in own]  # other tests register defences too
    assert len(names) > 40
    assert [row.split("`")[1] for row in rows] == names
    for marker, (page, text) in found.items():
        written = (DOCS / page).read_text().split(f"<!-- {marker} -->\n")[1].split(f"<!-- /{marker} -->")[0]
        assert written == text, f"docs/{page} is stale: run python docs/tables.py"


def test_the_defences_numbers_are_the_stored_ones():
    text = (DOCS / "defenses.md").read_text()
    assert text.split("<!-- defenses table -->\n")[1].split("<!-- /defenses table -->")[0] == defense_table()


def test_the_new_idea_of_the_page_trains(digits):
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "defenses.md").read_text(), re.DOTALL)
    scope = {}
    exec(code, scope)
    assert scope["gb"].evaluation.accuracy(scope["model"], scope["data"]).value > 0.3


def test_costs_in_the_table_are_what_is_counted(trained, digits):
    from gambeson.victim import Victim

    x, y = digits.test.take(slice(0, 10))
    for name, forwards, backwards in [
        ("fgsm", 1, 1),
        ("r-fgsm", 1, 1),
        ("i-fgsm", 10, 10),
        ("step-ll", 2, 1),
        ("mi-fgsm", 10, 10),
        ("si-ni-fgsm", 50, 50),
    ]:
        with Victim(trained) as victim:
            attacks.create(name, eps=0.01)(victim, x, y)
        assert (victim.forwards, victim.backwards) == (10 * forwards, 10 * backwards), name


def test_the_server_of_the_page_answers_the_client():
    import http.server
    import threading

    import torch

    from gambeson.models.black_box.http import HttpModel

    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "black-box.md").read_text(), re.DOTALL)
    begun = []

    class Once(http.server.ThreadingHTTPServer):
        def serve_forever(self, *_):
            threading.Thread(target=super().serve_forever, args=(0.02,), daemon=True).start()
            begun.append(self)

    scope = {"model": lambda images: images.flatten(1)[:, :4] * 3}
    code = code.replace("ThreadingHTTPServer((", "Once((").replace("8000", "0")
    exec(code, scope | {"Once": Once})
    images = torch.rand(70, 1, 5, 5)
    try:
        found = HttpModel(f"http://127.0.0.1:{begun[0].server_port}")(images)
    finally:
        begun[0].shutdown()
        begun[0].server_close()
    assert torch.equal(found, scope["model"](images))


def test_the_settings_of_http_are_those_of_the_page():
    from gambeson.models.black_box.http import HttpSettings

    rows = [
        f"| `{name}` | {field.get_default(call_default_factory=True)} | "
        f"{' '.join((field.description or '').split()).replace('``', '`')} |"
        for name, field in HttpSettings.model_fields.items()
    ]
    text = (DOCS / "black-box.md").read_text()
    written = text.split("<!-- http settings -->\n")[1].split("<!-- /http settings -->")[0].splitlines()[2:]
    assert written == rows


def test_what_calibrated_crafting_changes_is_what_was_stored():
    before, after = (
        json.loads((ROOT / "results" / f"{name}.json").read_text())["cells"]
        for name in ("defenses", "defenses-calibrated")
    )
    text = (DOCS / "defenses.md").read_text()
    for name in ("trades", "universal-consistency", "combination: consistency, jacobian"):
        low, high = (100 * cells[name]["0"]["uer 0.3"]["value"] for cells in (before, after))
        assert f"from {low:.1f} to {high:.1f} %" in text.replace("\n", " ")

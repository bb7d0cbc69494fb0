"""The published schema: it is the current one, and it describes what an audit writes."""

from __future__ import annotations

import json
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import gambeson as gb
from gambeson.auditing import AuditResult, Suite
from gambeson.auditing.schema import schema_text

FILE = Path(__file__).parents[2] / "docs" / "audit.schema.json"
TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}


def faults(value: Any, schema: dict[str, Any], root: dict[str, Any], where: str = "result") -> list[str]:
    """The part of JSON Schema that the file uses: references, choices, types, members and items."""
    if "$ref" in schema:
        return faults(value, root["$defs"][schema["$ref"].rsplit("/", 1)[1]], root, where)
    if "anyOf" in schema:
        ways = [faults(value, way, root, where) for way in schema["anyOf"]]
        return [] if [] in ways else min(ways, key=len)
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        return [f"{where} is {value!r}"]
    kind = schema.get("type")
    if kind in ("number", "integer"):
        fits = isinstance(value, int if kind == "integer" else (int, float)) and not isinstance(value, bool)
    else:
        fits = kind is None or isinstance(value, TYPES[kind])
    if not fits:
        return [f"{where} is {value!r}, expected {kind}"]
    found: list[str] = []
    if isinstance(value, dict):
        known, other = schema.get("properties", {}), schema.get("additionalProperties", True)
        found += [f"{where} lacks {name}" for name in schema.get("required", []) if name not in value]
        for name, item in value.items():
            if name in known or isinstance(other, dict):
                found += faults(item, known.get(name, other), root, f"{where}.{name}")
            elif not other:
                found.append(f"{where} has {name}")
    if isinstance(value, list):
        heads = schema.get("prefixItems", [])
        for k, item in enumerate(value):
            found += faults(item, heads[k] if k < len(heads) else schema.get("items", {}), root, f"{where}[{k}]")
    return found


def test_the_published_schema_is_the_current_one() -> None:
    assert FILE.read_text() == schema_text(), (
        "the results have changed: run `python -m gambeson.auditing.schema > docs/audit.schema.json`"
    )


@pytest.fixture(scope="module")
def audited(trained, digits, tmp_path_factory) -> tuple[AuditResult, Path]:
    few = {"suite_images": 20, "edit_images": 50, "transfer_images": 50, "sample": 40, "eps_uni_runs": 1}
    short = {
        "suite_queries": 20,
        "queries": 20,
        "pgd_steps": 5,
        "surrogate_epochs": 1,
        "jacobian_backwards": 500,
        "universal_queries": 300,
    }
    suite = Suite(eps=(0.1,), universal_steps=5, universal_restarts=1, universal_probe_starts=0, **few, **short)
    folder = tmp_path_factory.mktemp("audit")
    return gb.audit(trained, digits, suite, folder).results, folder


@pytest.fixture(scope="module")
def written(audited) -> dict[str, Any]:
    return json.loads((audited[1] / "result.json").read_text())


def test_an_audit_holds_its_jacobian_and_their_cost(audited) -> None:
    result, folder = audited
    assert result.jacobian.images == 40
    assert result.jacobian.bounds.eps == [0.1]
    assert (folder / result.jacobian.file).is_file()
    assert result.cost.backwards > result.jacobian.cost.backwards > 0
    measured = result.jacobian.bounds.table.rows[0].measured_error
    assert abs(measured - result.middle.uer.value) < 0.25  # on the sample, under the crafted perturbation


def test_a_result_fits_the_schema(written: dict[str, Any]) -> None:
    schema = json.loads(FILE.read_text())
    assert faults(written, schema, schema) == []
    assert written["jacobian"]["norms"]["frobenius"]["n"] == 40
    if find_spec("jsonschema"):
        import_module("jsonschema").Draft202012Validator(schema).validate(written)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.pop("verdict"), "lacks verdict"),
        (lambda r: r.update(extra=1), "has extra"),
        (lambda r: r["clean"].update(value="high"), "result.clean.value is 'high', expected number"),
        (lambda r: r.update(schema_="gambeson/audit-1"), "result.schema_ is 'gambeson/audit-1'"),
        (lambda r: r["universal"][0].update(status="fine"), r"universal\[0\].status is 'fine'"),
    ],
)
def test_other_contents_do_not_fit(written: dict[str, Any], change: Any, words: str) -> None:
    schema, other = json.loads(FILE.read_text()), json.loads(json.dumps(written))
    change(other)
    (fault,) = faults(other, schema, schema)
    assert re.search(words, fault)

"""Finished audits in the formats of CI systems: SARIF 2.1.0 and JUnit XML."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

from gambeson.auditing import AuditResult, Check, GateReport
from gambeson.auditing.gates import describe, measured
from gambeson.auditing.results import read_seconds
from gambeson.base import replaceable, write_bytes, write_json

_SARIF = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_NOT_XML = re.compile(r"[^\t\n\r\x20-\uD7FF\uE000-\uFFFD\U00010000-\U0010FFFF]")


@dataclass(frozen=True)
class Finished:
    """A finished audit, and what came of its gates."""

    folder: Path
    result: AuditResult
    gates: GateReport = field(default_factory=lambda: GateReport(gates=[]))


def write_sarif(audits: Sequence[Finished], out: Path) -> None:
    """Write failed checks (warnings) and missed gates (errors) as SARIF 2.1.0, one run per audit.

    Every check and gate is a rule; only what failed is a result, since viewers show each result as a fault. Results
    point at the audit's ``result.json``, relative to the working directory where it lies below that, and are known
    again in later runs by the model's name and the rule.

    Args:
        audits: of models with different names; where two are equal, their folders' names or paths are added.
        out: the file, replaced atomically.
    """
    labels = _labels(audits)
    runs = [_run(audit, label) for audit, label in zip(audits, labels, strict=True)]
    replaceable(out, "SARIF")
    write_json(out, {"$schema": _SARIF, "version": "2.1.0", "runs": runs})


def write_junit(audits: Sequence[Finished], out: Path) -> None:
    """Write checks and gates as the test cases of a JUnit XML file, one suite per audit.

    A check that does not apply is skipped, with its reason.

    Args:
        audits: of models with different names; where two are equal, their folders' names or paths are added.
        out: the file, replaced atomically.
    """
    replaceable(out, "JUnit XML")
    root = ElementTree.Element("testsuites", name="gambeson")
    for audit, label in zip(audits, _labels(audits), strict=True):
        _suite(root, audit, label)
    for attribute in ("tests", "failures", "errors", "skipped"):
        root.set(attribute, str(sum(int(suite.get(attribute, 0)) for suite in root)))
    ElementTree.indent(root)
    write_bytes(out, ElementTree.tostring(root, "utf-8", xml_declaration=True) + b"\n")


def _labels(audits: Sequence[Finished]) -> list[str]:
    """The labels; where two would be one in a SARIF file, with their folders' names, or paths, or numbers as well."""
    labels = [audit.result.subject.label for audit in audits]
    paths = [_uri(audit.folder) for audit in audits]
    more = ([audit.folder.name for audit in audits], paths, [f"{path} {k}" for k, path in enumerate(paths, 1)])
    found = labels
    for names in more:
        times = Counter(map(slug, found))
        longer = [f"{label} ({name})" for label, name in zip(labels, names, strict=True)]
        found = [one if times[slug(one)] == 1 else other for one, other in zip(found, longer, strict=True)]
    return found


def slug(name: str) -> str:
    """Write a name with letters, digits and hyphens alone; a hash stands for one that has neither."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return plain or hashlib.sha256(name.encode(errors="replace")).hexdigest()[:8]


def _run(audit: Finished, label: str) -> dict[str, Any]:
    result = audit.result
    rules = [_rule(f"check/{slug(check.name)}", check.name, _fails(check), check) for check in result.checks]
    rules += [
        _rule(f"gate/{gate.gate}", gate.gate, f"Required of this audit: {gate.gate}.") for gate in audit.gates.gates
    ]
    found = [
        (k, "warning", f"{label}: {_told(check)}", check.name)
        for k, check in enumerate(result.checks)
        if check.passed is False
    ]
    found += [
        (k, "error", f"{label}: {gate.gate} was missed: {describe(gate)}.", "")
        for k, gate in enumerate(audit.gates.gates, len(result.checks))
        if not gate.held
    ]
    file = audit.folder / "result.json"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return {
        "tool": {"driver": {"name": "Gambeson", "version": result.environment.get("gambeson", ""), "rules": rules}},
        "automationDetails": {"id": f"gambeson/{slug(label)}/"},
        "invocations": [{"executionSuccessful": True}],
        "results": [
            {
                "ruleId": rules[k]["id"],
                "ruleIndex": k,
                "level": level,
                "message": {"text": text},
                "locations": [
                    {
                        "physicalLocation": {
                            "artifactLocation": {"uri": _uri(file)},
                            "region": {"startLine": _line(lines, name) if name else 1},
                        }
                    }
                ],
                "partialFingerprints": {
                    "gambeson/v1": hashlib.sha256(f"{label}\n{rules[k]['id']}".encode()).hexdigest()[:16]
                },
            }
            for k, level, text, name in found
        ],
        "properties": {"trusted": result.verdict.trusted, "verdict": result.verdict.summary},
    }


def _rule(identity: str, name: str, text: str, check: Check | None = None) -> dict[str, Any]:
    """Describe a rule; code scanning requires all three texts."""
    return {
        "id": identity,
        "name": name,
        "shortDescription": {"text": text},
        "fullDescription": {"text": (check and check.explanation) or text},
        "help": {"text": (check and check.remedy) or text},
        "defaultConfiguration": {"level": "error" if check is None else "warning"},
    }


def _fails(check: Check) -> str:
    return f"Fails when {check.condition}." if check.condition else check.name


def _told(check: Check) -> str:
    return f"{check.name} failed: {check.detail}. {check.explanation} {check.remedy}".rstrip()


def _uri(file: Path) -> str:
    try:
        return quote(file.absolute().relative_to(Path.cwd()).as_posix())
    except ValueError:
        return file.absolute().as_uri()


def _line(lines: Sequence[str], check: str) -> int:
    """Return the line of a check in ``result.json``; 1 where it is not found."""
    wanted = f'"name": {json.dumps(check)}'
    return next((k for k, line in enumerate(lines, 1) if line.strip().rstrip(",") == wanted), 1)


def _suite(root: ElementTree.Element, audit: Finished, label: str) -> None:
    result, seconds = audit.result, read_seconds(audit.folder)
    states = [check.passed for check in result.checks]
    failures = states.count(False) + sum(not gate.held for gate in audit.gates.gates)
    suite = ElementTree.SubElement(
        root,
        "testsuite",
        name=_xml(f"gambeson audit {label}"),
        tests=str(len(states) + len(audit.gates.gates)),
        failures=str(failures),
        errors="0",
        skipped=str(states.count(None)),
        time=f"{sum(seconds.values()):.3f}",
    )
    about = {"verdict": result.verdict.summary, "data": result.material.name, "seed": str(result.seed)}
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in about.items():
        ElementTree.SubElement(properties, "property", name=name, value=_xml(value))
    for check in result.checks:
        time = seconds.get(f"check {check.name}", 0.0)
        case = _case(suite, label, "checks", check.name, time)
        if check.passed is None:
            ElementTree.SubElement(case, "skipped", message=_xml(check.detail))
        elif not check.passed:
            ElementTree.SubElement(case, "failure", type="check", message=_xml(check.detail)).text = _xml(_told(check))
    for gate in audit.gates.gates:
        case = _case(suite, label, "gates", gate.gate, 0.0)
        if gate.held:
            ElementTree.SubElement(case, "system-out").text = _xml(describe(gate))
        else:
            failure = ElementTree.SubElement(case, "failure", type="gate", message=_xml(f"it is {measured(gate)}"))
            failure.text = _xml(describe(gate))


def _case(suite: ElementTree.Element, label: str, kind: str, name: str, seconds: float) -> ElementTree.Element:
    return ElementTree.SubElement(
        suite, "testcase", classname=_xml(f"{label}.{kind}"), name=_xml(name), time=f"{seconds:.3f}"
    )


def _xml(text: str) -> str:
    """Replace what XML cannot hold, such as control characters in a model's name."""
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)

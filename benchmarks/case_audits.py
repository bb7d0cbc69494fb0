"""Audits of the case studies' networks: ``python benchmarks/case_audits.py CASE [NETWORK]``.

A row is stored in ``results/audits-CASE.json`` when it is there; the audits' folders, with their reports, stay in
``runs/case-studies/CASE``. A cut audit goes on after its last finished stage.
"""

from __future__ import annotations

import argparse
from typing import Any

import case_cells
import case_studies
from stored import RESULTS, Rows

import gambeson as gb
from gambeson.auditing import SUITES, AuditResult, Suite
from gambeson.base import Config, UserError
from gambeson.evaluation import Rate

EPS = (0.1, 0.2, 0.3, 0.35, 0.4)
"""Of digits, with the radius in the middle that robust networks of MNIST are trained against."""


class Point(Config):
    """One radius of the curve."""

    eps: float
    uer: Rate
    attack: str
    """What made the perturbation that did most harm on validation."""
    control: Rate
    """Error under the strongest control."""


class Row(Config):
    """What the pages say of one audit."""

    trusted: bool
    summary: str
    reasons: list[str]
    checks: dict[str, bool | None]
    """Whether each passed; None where it does not apply."""
    clean: Rate
    curve: list[Point]
    left: dict[str, Rate]
    """Accuracy by per-image attack, at the middle radius."""
    eps_uni: float | None
    eps_adv: float | None
    """Radii that make half of the images wrong, at the most; None where none of the curve does."""
    forwards: int
    gradients: int
    """Of the process that finished it: less than the whole where it was cut."""

    @classmethod
    def of(cls, found: AuditResult) -> Row:
        """The row of an audit."""
        points = [
            Point(
                eps=point.eps,
                uer=point.uer,
                attack=point.attack,
                control=max((one.worst for one in point.controls), key=lambda rate: rate.value),
            )
            for point in found.universal
        ]
        return cls(
            trusted=found.verdict.trusted,
            summary=found.verdict.summary,
            reasons=found.verdict.reasons,
            checks={check.name: check.passed for check in found.checks},
            clean=found.clean,
            curve=points,
            left={one.attack: one.accuracy for one in found.per_image},
            eps_uni=None if found.eps_uni.censored else found.eps_uni.value,
            eps_adv=None if found.eps_adv is None or found.eps_adv.censored else found.eps_adv.value,
            forwards=found.cost.forwards,
            gradients=found.cost.backwards,
        )


def digits(name: str) -> Any:
    """The package's network, or what fine-tuning made of it, and MNIST: its test images were trained on by neither."""
    weights = case_studies.fetched("digit-recognizer")
    return case_studies.digits_net(name, weights, gb.data.load(case_studies.DIGITS)), gb.data.load("mnist")


def cells(name: str) -> Any:
    """A network of 224 pixels by its library, and the solar cells it was trained on."""
    folder = case_studies.RUNS / "solar-cells"
    case_cells.write_cells(folder / "cells")
    data = gb.data.load(f"image-folder:{folder}/cells?mode=rgb")
    source = case_cells.NETS[name](data, folder)
    return gb.evaluation.load_model(source, dataset=data).model, data


STANDARD = SUITES["standard"].model_copy(update={"eps": EPS})
GLANCE = SUITES["glance"].model_copy(update={"minutes": None, "eps": (4 / 255, 8 / 255, 16 / 255), "test_images": 100})
CASES: dict[str, tuple[Any, Suite, tuple[str, ...]]] = {
    "digit-recognizer": (digits, STANDARD, ("original", "gambeson")),
    "solar-cells": (cells, GLANCE, tuple(case_cells.NETS)),
}
"""Of each case: what makes a network and its data, the suite, and the networks."""


def main() -> None:
    """Audit what is missing of a case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=CASES)
    parser.add_argument("network", nargs="*", help="all by default")
    given = parser.parse_args()
    make, suite, names = CASES[given.case]
    rows = Rows(
        RESULTS / f"audits-{given.case}.json",
        f"python benchmarks/case_audits.py {given.case}",
        {"suite": suite.plain()},
    )
    for name in rows.missing(given.network or names):
        try:
            model, data = make(name)
        except UserError as error:
            print(f"{name} is left out: {error}")
            continue
        found = gb.audit(model, data, suite, case_studies.RUNS / given.case / f"audit-{name}", label=name)
        rows.add(name, Row.of(found.results).plain())
        print(f"{name}: {found.verdict.summary}")


if __name__ == "__main__":
    main()

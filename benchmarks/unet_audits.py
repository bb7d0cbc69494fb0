"""Audits of the small U-Net and of what hides its gradient: ``python benchmarks/unet_audits.py [--only NAME]``.

The standard network of seed 0 that ``benchmarks/segmentation.py`` trained, audited by the suite ``quick``; the one
hardened at 1/255, and the standard one behind obfuscations, by the checks of that suite on fewer images of the rest. A
row is stored when it is there, and the audits' folders stay in ``runs/segmentation/audits``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import segmentation
from stored import RESULTS, Rows, load
from torch import nn

import gambeson as gb
from gambeson.auditing import SUITES, AuditResult, Suite
from gambeson.base import Config
from gambeson.evaluation import Rate
from gambeson.testbed.obfuscations import logits, preprocessing

FILE, FOLDER = RESULTS / "unet-audits.json", segmentation.FOLDER / "audits"
NETS = {"standard": segmentation.STANDARD, "hardened at 1/255": "shared, s = 4, eps 1/255"}
HIDDEN: dict[str, Callable[[nn.Module], nn.Module]] = {
    "logits x 10,000": lambda net: logits.Scaled(net, 1e4),
    "16 levels": lambda net: preprocessing.Quantised(net, 16),
    "detached input": preprocessing.Detached,
}
THIN: dict[str, Any] = {
    "test_images": 100,
    "validation_images": 100,
    "universal_steps": 50,
    "targeted": False,
    "eps_adv": False,
    "eps_uni_runs": 0,
    "edits": (),
    "noise_sizes": (),
}
"""Of all but the standard network: the images of the checks, 40, and less of what no check reads."""
FEWER = {"test_images": 50, "sample": 50}
"""Of what hides the gradient: 20 images, also of the checks."""
RADII = {"hardened at 1/255": (4 / 255, 12 / 255, 26 / 255)}
COMMAND = "python benchmarks/unet_audits.py"
CHECKS = ("margin loss no stronger", "attack has converged", "unbounded attack succeeds")


class Row(Config):
    """What the table says of one audit."""

    trusted: bool
    failed: list[str]
    clean: Rate
    clean_iou: Rate
    uer: Rate
    control: Rate
    """Pixel error under the strongest control."""
    left: dict[str, Rate]
    """Pixel accuracy by per-image attack, each the worst per image of itself and those before it."""
    numbers: dict[str, dict[str, float]]
    """Of :data:`CHECKS`."""
    summary: str
    environment: dict[str, str]

    @classmethod
    def of(cls, found: AuditResult) -> Row:
        """The row of an audit."""
        failed = [check.name for check in found.checks if check.passed is False]
        assert found.iou is not None
        return cls(
            trusted=found.verdict.trusted,
            failed=failed,
            clean=found.clean,
            clean_iou=found.iou.mean,
            uer=found.middle.uer,
            control=max((one.worst for one in found.middle.controls), key=lambda rate: rate.value),
            left={one.attack: one.accuracy for one in found.per_image},
            numbers={check.name: check.numbers for check in found.checks if check.name in CHECKS},
            summary=found.verdict.summary,
            environment=found.environment,
        )


def suite_of(name: str) -> Suite:
    """The suite of a row."""
    eps = RADII.get(name, (12 / 255,))
    update = {} if name == segmentation.STANDARD else {**THIN, "eps": eps, **(FEWER if name in HIDDEN else {})}
    return SUITES["quick"].model_copy(update=update)


def audited(name: str, data: gb.data.Dataset) -> Row:
    """Audit a network, or take the finished audit of its folder."""
    net: nn.Module = gb.models.load(segmentation.place(NETS.get(name, segmentation.STANDARD), 0) / "model.safetensors")
    if name in HIDDEN:
        net = HIDDEN[name](net).eval()
    folder = FOLDER / name.replace("/", " of ")
    return Row.of(gb.audit(net, data, suite_of(name), folder, label=name).results)


def text() -> str:
    """Return the table of the docs."""
    stored = load(FILE.name)["rows"]
    rows = {name: Row(**stored[name]) for name in [*NETS, *HIDDEN] if name in stored}

    def number(row: Row, check: str, name: str) -> str:
        found = next((value for key, value in row.numbers.get(check, {}).items() if key.startswith(name)), None)
        return "" if found is None else f"{100 * found:.1f} %"

    lines: dict[str, Callable[[Row], object]] = {
        "clean pixel accuracy": lambda row: row.clean,
        "clean mean IoU": lambda row: row.clean_iou,
        "pixel error under one pattern": lambda row: row.uer,
        "strongest control": lambda row: row.control,
        "left by PGD on the pixels still right": lambda row: row.left["pgd"],
        "worst per image of this and CosPGD": lambda row: row.left["cospgd"],
        "half the steps, sample": lambda row: number(row, CHECKS[0], "cross-entropy"),
        "the same on the margin": lambda row: number(row, CHECKS[0], "margin"),
        "three times the steps, sample": lambda row: number(row, CHECKS[1], "steps of"),
        "with the whole box": lambda row: number(row, CHECKS[2], "accuracy"),
        "verdict": lambda row: "trusted" if row.trusted else f"not trusted: {', '.join(row.failed)}",
    }
    body = (f"| {' | '.join([what, *(str(value(row)) for row in rows.values())])} |\n" for what, value in lines.items())
    return "".join([f"|  | {' | '.join(rows)} |\n", "|---" * (len(rows) + 1) + "|\n", *body])


def main() -> None:
    """Audit what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="networks whose name holds this")
    given, data = parser.parse_args(), segmentation.load()
    names = [*NETS, *HIDDEN]
    rows = Rows(FILE, COMMAND, {"data": segmentation.DATA, "suites": {name: suite_of(name).plain() for name in names}})
    for name in rows.missing(names):
        if given.only in name:
            rows.add(name, audited(name, data).plain())
    print(text())


if __name__ == "__main__":
    main()

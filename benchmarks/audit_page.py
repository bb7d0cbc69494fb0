"""Renew the made parts of ``docs/suites.md``, ``checks.md`` and ``testbed.md``: ``python benchmarks/audit_page.py``.

A section for each diagnostic comes from :data:`gambeson.auditing.DIAGNOSTICS` and from the captions here, its picture
from ``benchmarks/audit_pictures.py``; the costs come from the suites; the strength
comes from ``results/strength.json``, which ``benchmarks/strength.py`` makes; the error rates come from
``results/testbed.json``, which ``benchmarks/testbed.py`` makes, and from ``results/testbed-pgd.json``; the models come
from :mod:`gambeson.testbed`. ``tests/test_docs_audit.py`` holds the pages against this.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from gambeson import testbed
from gambeson.attacks import StochasticPGD, TargetedAutoPGD
from gambeson.auditing import DIAGNOSTICS, SUITES, Diagnostic
from gambeson.evaluation import Rate

ROOT = Path(__file__).parent.parent
SUITES_PAGE, CHECKS, TESTBED = (ROOT / "docs" / name for name in ("suites.md", "checks.md", "testbed.md"))
RATES, PGD_RATES = ROOT / "results" / "testbed.json", ROOT / "results" / "testbed-pgd.json"
STRENGTH = ROOT / "results" / "strength.json"
WITHOUT = "input unchanged"
"""The one diagnostic that never fails, and so has no picture."""

CAPTIONS: dict[str, tuple[str, str]] = {
    "deterministic or majority vote": (
        "dropout of half of the features is left on, and one pass decided (`votes=1`); 21 passes differ",
        "without dropout all passes agree",
    ),
    "no EOT gap": (
        "a ripple of random frequency on every pixel, whose slope is noise of mean zero: more draws break more",
        "normal noise of a quarter of the range on every pixel: ten draws are enough",
    ),
    "no noise-off gap": (
        "the random ripple again, which stands only while it ripples",
        "normal noise on the pixels, which saves hardly an image",
    ),
    "independent of the batch": (
        "BatchNorm that cannot leave training mode: the logits of eight images move with their batch-mates",
        "the same network with BatchNorm in evaluation mode",
    ),
    "stateless": (
        "a network that answers class 0 once it was asked fifty times about nearly the same image",
        "the network alone",
    ),
    "no vanishing gradients": (
        "pixels rounded to four grey levels: every image has a gradient of zero",
        "the same network without the rounding",
    ),
    "margin loss no stronger": (
        "logits divided by their own margin, which is then always one: PGD on cross-entropy finds little, on the "
        "margin much more",
        "the same network without the division: both losses find the same",
    ),
    "gradient matches finite differences": (
        "the gradient is reversed on its way back, and every promise has the wrong sign; the lines are half and "
        "twice the promise",
        "the same network with its own gradient",
    ),
    "multi-step beats single-step": (
        "a detector of rough texture that cuts the gradient off where it looks: PGD is stuck after its first step",
        "the same network without the detector",
    ),
    "random start no stronger": (
        "trained on clean images and on single steps of 0.4, which it has learnt to mislead",
        "trained on PGD of four steps at eps 0.1",
    ),
    "monotone in step size": (
        "the network trained on single steps: the farther half of the step mends what the nearer half broke",
        "the network trained on PGD",
    ),
    "single step approximates multi-step": (
        "the network trained on single steps: one step climbs a tenth of what ten small ones do, and comes down",
        "the network trained on PGD",
    ),
    "unbounded attack succeeds": (
        "only the predicted class comes out, as a one-hot row: with every pixel free PGD is no more than noise",
        "the same network with its logits",
    ),
    "monotone in eps": (
        "a guard that looks up the nearest training image as soon as the edge of an image is brighter than 0.2: the "
        "attack at eps 0.3 runs into it, the one at 0.2 does not",
        "the network without the guard",
    ),
    "attack has converged": (
        "a sine of high frequency on the last features shatters the gradient: every new start breaks more images",
        "the same network without the sine",
    ),
    "gradient beats random search": (
        "a ripple of fixed frequency on every pixel, whose slope is all ripple: forty random queries do more than PGD",
        "the same network without the ripple",
    ),
    "white box beats transfer": (
        "the predicted class alone, which PGD cannot climb; what was crafted on the surrogate moves it all the same",
        "the same network with its logits, which PGD breaks further than the surrogate's perturbations do",
    ),
    "universal white box beats transfer": (
        "the predicted class alone: one perturbation of the surrogate does more than the one crafted on the model",
        "the same network with its logits",
    ),
    "white box beats queries": (
        "logits divided by their own margin: first and second are always one apart, and the margin has no slope; "
        "Square needs none",
        "the same network without the division",
    ),
    "attack beats noise": (
        "the reversed gradient, which leads PGD away from every error, at eps 0.4",
        "the same network with its own gradient",
    ),
    "better than majority class": (
        "the same class for every image, which no perturbation changes",
        "a network that was trained",
    ),
    "crafted beats controls": (
        "the predicted class alone: noise does as much as the perturbation that was to be crafted, and does harm",
        "the same network with its logits",
    ),
    "perturbation budget used": (
        "the same class for every image: every perturbation is as good as none",
        "a network that was trained",
    ),
    "UER monotone in eps": (
        "the guard that looks at the edge: at eps 0.3 the perturbation sets it off and does less than at 0.2",
        "the network without the guard",
    ),
    "re-scoring reproducible": (
        "one of three networks, drawn for every batch by Python's own generator, which no seed of torch sets: each "
        "scoring gives another rate",
        "one network",
    ),
    "no test-set leakage": (
        "a network that knows the test images, and adds the label of the one that lies within 0.35 in every pixel",
        "the network alone",
    ),
    "alike in every batch": (
        "the mean of a batch's logits is exchanged for that of training images, so that no pattern gains on all images "
        "at once: asked about one by one, more fall",
        "the network alone",
    ),
    "no weaker inside the ball": (
        "a robust network, and an undefended one where the changes of dark pixels are about half of eps: PGD in a "
        "smaller ball breaks more than PGD in the whole one",
        "trained on PGD: the larger the ball, the more falls",
    ),
    "gradient independent of the batch": (
        "in batches of more than 128 images the gradient is that of the mirror image",
        "the same network with its own gradient",
    ),
    "attack repeats its outcome": (
        "the same network: PGD on all test images at once followed the other gradient, in batches of 16 it does not",
        "the same network with its own gradient",
    ),
    "gradient complete": (
        "three quarters of the features are cut off from the gradient: a step along random signs does more than it "
        "promises, or the opposite; the line is the promise",
        "the same network with its own gradient",
    ),
    "no optimisation at test time": (
        "an anti-adversary layer, which moves each image towards the predicted class by gradients of its own: PGD on "
        "the network behind it breaks more than PGD through it",
        "the network alone, which computes no gradients",
    ),
    "margin vanishes where the answer changes": (
        "one network answers, with the logits of another: where the answer changes, there is a margin still",
        "the network alone, whose margin is zero there",
    ),
    "attacks find what is there": (
        "pixels rounded to four grey levels: of copies of the network that have an adversarial example for certain, "
        "attacks with gradients find none, Square finds most",
        "the same network without the rounding",
    ),
    "universal white box beats queries": (
        "a detector of rough images, behind which there is no gradient: one perturbation found by queries alone breaks "
        "far more than the one crafted by gradients",
        "the network alone",
    ),
    "other gradients no stronger": (
        "gaps between the logits multiplied by a wave of the pixels: the gradient is true, and leads nowhere; "
        "gradients where the answer changes go on",
        "the network alone",
    ),
    "crafted on train beats crafted on test": (
        "a network that knows its training and validation images, and leads attacks on them along a pattern of no use: "
        "what is crafted on test images does far more harm",
        "the network alone",
    ),
    "sample like the other images": (
        "a network that has stored all test images but those that checks look at",
        "the network alone",
    ),
    "rotated and blended images stand too": (
        "a network that has stored the test images: rotated by a few degrees, none of them stands",
        "the network alone, on which nearly no image stands either way",
    ),
}


def file_of(name: str) -> str:
    """Name of a diagnostic's picture."""
    return "-".join("".join(letter if letter.isalnum() else " " for letter in name.lower()).split()) + ".png"


def diagnostics_text() -> str:
    """Return a section for each diagnostic, in order."""
    return "\n".join(map(_section, DIAGNOSTICS))


def _section(diagnostic: Diagnostic) -> str:
    never = diagnostic.condition.startswith("never")
    lead = f"Never fails: {diagnostic.condition[7:]}." if never else f"Fails when {diagnostic.condition}."
    asked = "" if diagnostic.gradients else " Applies to black boxes too."
    parts = [f"{lead}{asked}", diagnostic.explanation, f"**What to do.** {diagnostic.remedy}"]
    text = f"## {diagnostic.name}\n\n" + "\n\n".join(map(_wrapped, parts)) + "\n"
    if diagnostic.name == WITHOUT:
        return text + "\nIt never fails, and so has no picture.\n"
    left, right = CAPTIONS[diagnostic.name]
    alt = f"{diagnostic.name}: one model fails, one passes"
    picture = f'<img src="audit/{file_of(diagnostic.name)}" width="640" alt="{alt}">'
    return f"{text}\n{picture}\n\n{_wrapped(f'Left: {left}. Right: {right}.')}\n"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 139, break_long_words=False, break_on_hyphens=False)


def rates_text() -> str:
    """Return the audit's error rates on the obfuscated and honest models of the testbed, or that there are none yet."""
    if not RATES.is_file():
        return "Not measured yet: this table is made from what `python benchmarks/testbed.py` stores.\n"
    suites: dict[str, Any] = json.loads(RATES.read_text())["suites"]
    lines = ["| suite | what went wrong | rate | models |", "|---|---|---|---|"]
    for suite, found in suites.items():
        for words, key in _WRONG.items():
            rate = found[key]
            if rate["n"] <= 1:  # the undefended network alone
                continue
            share = f"{100 * rate['value']:.1f} % [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"
            lines.append(f"| {suite} | {words} | {share} of {rate['n']} | {'; '.join(rate['models']) or 'none'} |")
    lines += ["", *_caught(suites)]
    return "\n".join(lines) + "\n"


_WRONG = {
    "obfuscated, trusted and not broken": "missed",
    "obfuscated, trusted, and not brought down by both kinds of attack": (
        "missed where both numbers must be those of the undefended network"
    ),
    "honest, distrusted": "distrusted without reason",
}


def _caught(suites: dict[str, Any]) -> list[str]:
    """Lines of a table: how many of the models that a diagnostic applied to fail it, obfuscated and honest ones."""
    columns: dict[str, list[dict[str, Any]]] = {}
    for suite, found in suites.items():
        for kind in ("obfuscated", "honest"):
            cells = [cell for cell in found["cells"].values() if cell["kind"] == kind]
            if len(cells) > 1:
                columns[f"{kind}, {suite}"] = cells
    lines = [f"| fails | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for diagnostic in DIAGNOSTICS:
        counts = [
            f"{failed} of {failed + passed}" if failed + passed else ""
            for failed, passed in (
                [sum(diagnostic.name in row.get(how, ()) for row in rows) for how in ("failed", "passed")]
                for rows in columns.values()
            )
        ]
        lines.append(f"| {diagnostic.name} | {' | '.join(counts)} |")
    return lines


def costs_text() -> str:
    """Return the table of what the suites cost, in gradients of one image."""
    short = StochasticPGD.model_fields
    screen = short["probe_start_steps"].default * short["probe_start_batch"].default
    rows: dict[str, list[str]] = {name: [] for name in _COSTS}
    for suite in SUITES.values():
        climb, probe_starts = suite.universal_steps * suite.universal_batch, suite.universal_probe_starts * screen
        whole = probe_starts + suite.universal_restarts * climb
        images = "all" if suite.test_images is None else f"{suite.test_images:,}"
        runs = suite.eps_uni_runs
        tried = "" if runs is None else ", at most once" if runs == 1 else f", at most {runs} times"
        attacked = f"on {suite.suite_images:,} images" if suite.suite_images else "left out"
        lent = suite.surrogate != "none"
        values = (
            f"{suite.surrogate_epochs} over {suite.surrogate_images:,}" if lent else "left out",
            f"{round(whole, -3):,} to {round(whole + climb, -3):,}"
            if suite.eps_points > 1
            else f"{round(whole, -2):,}",
            "left out" if runs == 0 else f"{round(probe_starts + 2 * climb, -3):,}" + tried,
            f"{suite.pgd_steps * suite.pgd_restarts}, on {images}",
            f"{sum(map(_gradients, suite.white_box(0.1).values()))}, on {images}" if suite.auto_pgd else "left out",
            attacked,
            f"{suite.transfer_images:,}" if lent else "left out",
            f"{suite.jacobian_backwards:,}" if suite.jacobian_backwards else "left out",
            f"{suite.sample:,}",
        )
        for name, value in zip(rows, values, strict=True):
            rows[name].append(value)
    lines = [f"| | {' | '.join(f'`{name}`' for name in SUITES)} |", "|---|" + "---|" * len(SUITES)]
    return "\n".join(lines + [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]) + "\n"


_COSTS = (
    "surrogate: passes over train, images at most",
    "universal, per eps",
    "eps_uni, each perturbation that it tries",
    "PGD, at most per image",
    "targeted Auto-PGD, at most per image",
    "the suite of four attacks",
    "transfer, images at most",
    "Jacobian analysis, each exact part at most",
    "diagnostics, images of the sample",
)


def _gradients(attack: Any) -> int:
    probes = (attack.targets or 0) * (attack.probe_steps or 0) if isinstance(attack, TargetedAutoPGD) else 0
    return int(attack.steps + probes)


def strength_text() -> str:
    """Return what the suites leave right image by image, against stronger attacks, with their shares of the cost."""
    lines = [
        "| network | AutoAttack | and stronger attacks | `quick` | `standard` | cost of `quick`, `standard` |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in json.loads(STRENGTH.read_text())["summary"]["rows"].items():
        shares = [f"{100 * found[key]:.1f} %" for key in ("autoattack", "reference")]
        suites = [found[suite] for suite in ("quick", "standard")]
        shares += [f"{100 * one['reported']:.1f} % ({100 * one['above']:+.1f})" for one in suites]
        costs = ", ".join(f"{100 * one['cost']:.0f} %" for one in suites)
        lines.append(f"| {' | '.join([name, *shares, costs])} |")
    return "\n".join(lines) + "\n"


def models_text() -> str:
    """Return the table of the testbed's models on the digits, by family."""
    lines = ["| model | family | how it deceives | source |", "|---|---|---|---|"]
    for entry in testbed.models("digits"):
        star = " *" if entry.held_out else ""
        lines.append(f"| {entry.name}{star} | {entry.kind} | {entry.how} | {entry.source} |")
    families = "\n".join(f"- **{kind}**: {words}" for kind, words in testbed.KINDS.items())
    return f"{families}\n\n" + "\n".join(lines) + "\n"


def own_rates_text() -> str:
    """Return the error rates of the built-in auditors on the digits, by family."""
    pgd = testbed.TestbedScore(**json.loads(PGD_RATES.read_text()))
    columns = {"PGD of 20 steps": pgd.by_kind}
    for suite, found in json.loads(RATES.read_text())["suites"].items():
        cells = [cell for cell in found["cells"].values() if cell["data"] == "digits"]
        columns[f"audit, {suite}"] = {
            kind: Rate.of(sum(map(_wrong, some)), len(some))
            for kind in testbed.KINDS
            if (some := [cell for cell in cells if _KIND_OF.get(cell["name"]) == kind])
            and (kind, len(some)) != ("honest", 1)
        }
    lines = [f"| wrong about | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    everything = {
        "obfuscated (missed)": [kind for kind in testbed.KINDS if kind != "honest"],
        "honest (accused)": ["honest"],
    }
    for words, kinds in everything.items():
        lines.append(f"| **{words}** | {' | '.join(_sum(rates, kinds) for rates in columns.values())} |")
    for kind in everything["obfuscated (missed)"]:
        lines.append(f"| {kind} | {' | '.join(_sum(rates, [kind]) for rates in columns.values())} |")
    return "\n".join(lines) + "\n"


_KIND_OF = {entry.name: entry.kind for entry in testbed.models("digits")}


def _wrong(cell: dict[str, Any]) -> bool:
    return cell["trusted"] and not any(cell["broken"].values()) if cell["kind"] == "obfuscated" else not cell["trusted"]


def _sum(rates: dict[str, Rate], kinds: list[str]) -> str:
    found = [rates[kind] for kind in kinds if kind in rates]
    total = sum(rate.n for rate in found)
    rate = Rate.of(sum(round(rate.value * rate.n) for rate in found), total)
    return f"{rate} of {total}" if total else ""


def renewed(page: str, parts: dict[str, str]) -> str:
    """Return the page with its parts made anew."""
    for mark, text in parts.items():
        head, rest = page.split(f"<!-- {mark} -->\n")
        page = f"{head}<!-- {mark} -->\n{text}{rest[rest.index(f'<!-- /{mark} -->') :]}"
    return page


def main() -> None:
    """Renew the pages."""
    pages = {
        SUITES_PAGE: {"costs": costs_text(), "strength": strength_text()},
        CHECKS: {"diagnostics": diagnostics_text()},
        TESTBED: {"own rates": own_rates_text(), "error rates": rates_text(), "models": models_text()},
    }
    for page, parts in pages.items():
        page.write_text(renewed(page.read_text(), parts))


if __name__ == "__main__":
    main()

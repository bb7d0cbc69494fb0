"""What each diagnostic compares, measured for a picture: from an audit's context to a panel of ``audit_panels``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import audit_probes as probes
import torch
from audit_panels import PERCENT, Panel, line_of, rate_of

from gambeson.attacks import FGSM, IFGSM, PGD, Loss
from gambeson.auditing import AuditContext, Finding
from gambeson.auditing.outcome import AsFarAsFinite
from gambeson.auditing.stages.adaptive import OnStandIn
from gambeson.evaluation import Rate
from gambeson.evaluation.outcome import ImageAttack
from gambeson.victim.substitute import InnerGradientsOff

Measure = Callable[[AuditContext, Finding], Panel]
Needs = tuple[str, ...]
_SHARES = [k / 8 for k in range(9)]


def bars(
    names: dict[str, str],
    margin: float | None = None,
    *,
    count: Callable[[AuditContext, Finding], int] = lambda evidence, _: len(evidence.sample),
    y: str = "accuracy, %",
    limit_at: tuple[float, str] = (0.99, "right"),
) -> Measure:
    """Bars of a finding's numbers with their Wilson intervals; the limit is the first bar less the margin.

    Args:
        names: of the bars by key of :attr:`Finding.numbers`.
        margin: how far another bar may come below the first.
        count: what the numbers are shares of; the sample's images by default.
        y: what they are.
        limit_at: where the limit's words stand, as a share of the width, and which end of them stands there.
    """

    def measure(evidence: AuditContext, found: Finding) -> Panel:
        n = count(evidence, found)
        rates = [Rate.of(round(found.numbers[key] * n), n) for key in names]
        panel: Panel = {"kind": "bars", "y": y, "range": [0, 112]}
        panel["bars"] = [{"name": name, **rate_of(rate)} for name, rate in zip(names.values(), rates, strict=True)]
        if margin is not None:
            panel["limit"], panel["limit_says"] = 100 * (rates[0].value - margin), "fails below"
            panel["limit_at"] = limit_at
        return panel

    return measure


def draws(evidence: AuditContext, found: Finding) -> Panel:
    """Accuracy under PGD against the draws that each gradient is averaged over."""
    counts = (1, 2, 5, 10, 20, 40)
    rates = [evidence.accuracy(PGD(eps=evidence.eps, steps=10, eot_samples=count)) for count in counts]
    usual = evidence.suite.eot_samples
    return {
        "kind": "lines",
        "x": "draws a gradient is averaged over",
        "log": True,
        "ticks": list(counts),
        **PERCENT,
        "lines": [line_of("under PGD", counts, rates)],
        "marks": [{"x": usual, "name": "suite"}, {"x": 2 * usual, "name": "twice"}],
    }


def ridge(evidence: AuditContext, found: Finding) -> Panel:
    """Accuracy against the length of a single step."""
    with evidence.unscaled():
        rates = [evidence.clean if not t else evidence.accuracy(FGSM(eps=t * evidence.eps)) for t in _SHARES]
    return {
        "kind": "lines",
        "x": "length of the step, in eps",
        **PERCENT,
        "lines": [line_of("one step", _SHARES, rates)],
        "limit": 100 * rates[4].value + 5,
        "limit_at": (0.02, "left"),
        "limit_says": "fails above, at 1",
    }


def rise(evidence: AuditContext, found: Finding) -> Panel:
    """Loss along the signed gradient, as a share of the rise that ten small steps reach."""
    images, labels = evidence.sample.take(slice(None), evidence.victim.device)

    def loss(attack: Any) -> float:
        moved = images if attack is None else AsFarAsFinite(attack)(evidence.victim, images, labels, seed=evidence.seed)
        with torch.no_grad():
            return float(Loss()(evidence.victim.forward_original(moved), labels).double().mean())

    with evidence.unscaled():
        start, many = loss(None), loss(IFGSM(eps=evidence.eps, rel_step_size=0.2))
        along = [100 * (loss(FGSM(eps=t * evidence.eps)) - start) / (many - start) for t in _SHARES[1:]]
    lines = [
        {"name": "one step", "x": _SHARES, "y": [0.0, *along]},
        {"name": "ten small steps", "x": [0, 1], "y": [100, 100], "plain": True},
    ]
    words = {"x": "length of the step, in eps", "y": "rise of the loss, %"}
    return {
        "kind": "lines",
        **words,
        "lines": lines,
        "limit": 50,
        "limit_at": (0.02, "left"),
        "limit_says": "fails below, at 1",
    }


def box(evidence: AuditContext, found: Finding) -> Panel:
    """Accuracy under PGD against eps, up to the whole box."""
    radii = (0.05, 0.15, 0.3, 0.5, 1.0)
    rates = [evidence.clean, *(evidence.accuracy(PGD(eps=eps, steps=40)) for eps in radii)]
    line = line_of("under PGD", (0, *radii), rates)
    return {"kind": "lines", "x": "eps", **PERCENT, "lines": [line], "limit": 5.0, "limit_says": "fails above, at 1"}


def radii(evidence: AuditContext, found: Finding) -> Panel:
    """Accuracy under PGD at the radii of the suite."""
    eps = evidence.suite.eps
    rates = [evidence.clean, *(evidence.accuracy(PGD(eps=one, steps=20)) for one in eps)]
    return {"kind": "lines", "x": "eps", **PERCENT, "lines": [line_of("under PGD", (0, *eps), rates)]}


def restarts(evidence: AuditContext, found: Finding) -> Panel:
    """Accuracy under PGD against its restarts."""
    usual, counts = evidence.suite.pgd(evidence.eps), (1, 2, 3, 5, 10)
    rates = [evidence.accuracy(usual.model_copy(update={"restarts": count})) for count in counts]
    marks = [{"x": usual.restarts, "name": "the suite"}]
    return {
        "kind": "lines",
        "x": "restarts of PGD",
        **PERCENT,
        "lines": [line_of("PGD", counts, rates)],
        "marks": marks,
    }


def beyond(by: str, margin: float) -> Measure:
    """Images that PGD leaves right, and those of them that others leave right too."""

    def measure(evidence: AuditContext, found: Finding) -> Panel:
        left, n = round(found.numbers["left by PGD"]), _asked_about(evidence, found)
        both = left - round(found.numbers[f"broken by {by}"])
        pairs = (("PGD", left), (f"PGD, then\n{by}", both))
        return {
            "kind": "bars",
            "y": "accuracy, %",
            "range": [0, 112],
            "bars": [{"name": name, **rate_of(Rate.of(hits, n))} for name, hits in pairs],
            "limit": 100 * (left / n - margin),
            "limit_says": "fails below",
        }

    return measure


def learnt(evidence: AuditContext, found: Finding) -> Panel:
    """Clean accuracy against always naming the most frequent class."""
    prior = 100 * found.numbers["prior"]
    guess = {"name": "most frequent\nclass", "value": prior, "low": prior, "high": prior, "hue": 1}
    parts = [guess, {"name": "the model", **rate_of(evidence.clean), "hue": 0}]
    words = {"limit": prior, "limit_says": ""}
    return {"kind": "bars", "y": "accuracy, %", "range": [0, 112], "bars": parts, **words}


def controls(evidence: AuditContext, found: Finding) -> Panel:
    """UER of the crafted perturbations and of the strongest control at every eps."""
    points, eps = evidence.universal, evidence.suite.eps
    worst = [max((one.worst for one in point.controls), key=lambda rate: rate.value) for point in points]
    lines = [line_of("crafted", eps, [point.uer for point in points]), line_of("strongest control", eps, worst)]
    return {"kind": "lines", "x": "eps", "y": "UER, %", "range": [0, 100], "lines": lines, "legend": "upper left"}


def curve(evidence: AuditContext, found: Finding) -> Panel:
    """UER at every eps."""
    line = line_of("crafted", evidence.suite.eps, [point.uer for point in evidence.universal])
    return {"kind": "lines", "x": "eps", "y": "UER, %", "range": [0, 100], "lines": [line]}


def used(evidence: AuditContext, found: Finding) -> Panel:
    """How much of its eps each crafted perturbation uses."""
    eps = evidence.suite.eps
    shares = [100 * float(evidence.uaps[one].delta.abs().max()) / one for one in eps]
    line = {"name": "largest pixel", "x": list(eps), "y": shares}
    words = {"x": "eps", "y": "largest pixel of the\nperturbation, % of eps", "range": [-4, 108]}
    return {"kind": "lines", **words, "lines": [line], "limit": 5.0, "limit_says": "fails below"}


def smaller(evidence: AuditContext, found: Finding) -> Panel:
    """Accuracy under PGD against the radius of a ball inside the audit's."""
    shares = (0.1, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)
    rates = [evidence.accuracy(PGD(eps=share * evidence.eps, steps=20)) for share in shares]
    lines = [line_of("under PGD", (0, *shares), [evidence.clean, *rates])]
    return {"kind": "lines", "x": "radius of the ball, in eps", **PERCENT, "lines": lines}


def without(evidence: AuditContext, found: Finding) -> Panel:
    """Accuracy under PGD, and under PGD on the model without the gradients that it computes itself."""
    usual = PGD(eps=evidence.eps, steps=40, loss="margin")
    attacks: dict[str, ImageAttack] = {"PGD": usual, "PGD, inner\ngradients off": OnStandIn(InnerGradientsOff, usual)}
    rates = {name: evidence.accuracy(attack) for name, attack in attacks.items()}
    parts = [{"name": name, **rate_of(rate)} for name, rate in rates.items()]
    return {"kind": "bars", "y": "accuracy, %", "range": [0, 112], "bars": parts}


def drawn(evidence: AuditContext, found: Finding) -> Panel:
    """Accuracy under the attack of all images, of the sample that checks look at and of the other images."""
    inside = len(evidence.sample)
    parts = (("the sample", "sample", inside), ("other test\nimages", "others", len(evidence.test) - inside))
    rates = [{"name": name, **rate_of(Rate.of(round(found.numbers[key] * n), n))} for name, key, n in parts]
    return {"kind": "bars", "y": "accuracy, %", "range": [0, 112], "bars": rates}


def _asked_about(evidence: AuditContext, found: Finding) -> int:
    """The sample, or the images of a second look where one was taken."""
    return next(n for n in (len(evidence.wider), len(evidence.sample)) if f" of {n} images" in found.detail)


def _of_test(evidence: AuditContext, _: Finding) -> int:
    return len(evidence.test)


MEASURES: dict[str, tuple[Needs, Measure]] = {
    "deterministic or majority vote": ((), probes.votes),
    "no EOT gap": ((), draws),
    "no noise-off gap": (
        (),
        bars({"on": "noise on", "off": "noise off", "crafted_off": "crafted off,\njudged on"}),
    ),
    "independent of the batch": ((), probes.mates),
    "stateless": ((), probes.memory),
    "no vanishing gradients": ((), probes.sizes),
    "margin loss no stronger": ((), bars({"cross-entropy": "cross-entropy", "margin": "margin"}, 0.05)),
    "gradient matches finite differences": ((), probes.promises),
    "multi-step beats single-step": ((), bars({"multi": "PGD", "single": "FGSM"}, 0.0)),
    "random start no stronger": ((), bars({"plain": "FGSM", "started": "R+FGSM"}, 0.15)),
    "monotone in step size": ((), ridge),
    "single step approximates multi-step": ((), rise),
    "unbounded attack succeeds": ((), box),
    "monotone in eps": ((), radii),
    "attack has converged": ((), restarts),
    "gradient beats random search": ((), bars({"pgd": "PGD", "random": "random search"}, 0.0)),
    "white box beats transfer": (
        ("surrogate",),
        bars({"white box": "PGD on it", "fgsm": "FGSM,\ntransferred", "mi-di-fgsm": "MI-DI-FGSM,\ntransferred"}, 0.02),
    ),
    "universal white box beats transfer": (
        ("surrogate", "universal"),
        bars({"white box": "crafted on it", "transferred": "transferred"}, 0.05, count=_of_test),
    ),
    "white box beats queries": ((), beyond("queries", 0.02)),
    "attack beats noise": ((), bars({"pgd": "PGD", "noise": "random signs"}, 0.02)),
    "better than majority class": ((), learnt),
    "crafted beats controls": (("universal",), controls),
    "perturbation budget used": (("universal",), used),
    "UER monotone in eps": (("universal",), curve),
    "re-scoring reproducible": (("universal",), probes.again),
    "no test-set leakage": (
        ("universal",),
        bars(
            {"test": "test images", "validation": "validation images"}, 0.03, count=_of_test, limit_at=(0.5, "center")
        ),
    ),
    "alike in every batch": (("universal", "re-scoring"), probes.batches),
    "no weaker inside the ball": ((), smaller),
    "gradient independent of the batch": (("gradients",), probes.agreement),
    "attack repeats its outcome": (
        ("per-image",),
        bars({"before": "PGD", "again": "once more, in\nsmall batches"}, count=lambda *_: 64),
    ),
    "gradient complete": (("adaptive",), probes.random_steps),
    "no optimisation at test time": (("adaptive",), without),
    "margin vanishes where the answer changes": ((), probes.crossing),
    "attacks find what is there": (
        (),
        bars(
            {"PGD": "PGD", "Square": "Square"},
            count=lambda _, found: round(found.numbers["copies"]),
            y="adversarial examples\nthat are found, %",
        ),
    ),
    "universal white box beats queries": (
        ("universal", "universal-nes"),
        bars({"white box": "by gradients", "other": "by queries"}, 0.05, count=_of_test),
    ),
    "other gradients no stronger": ((), beyond("other gradients", 0.01)),
    "crafted on train beats crafted on test": (
        ("universal",),
        bars(
            {"train": "crafted on\ntraining images", "test": "crafted on\ntest images"},
            0.05,
            count=lambda evidence, _: len(evidence.test) // 2,
        ),
    ),
    "sample like the other images": (("per-image",), drawn),
    "rotated and blended images stand too": (
        (),
        bars(
            {"as they are, beside rotated": "as they are", "rotated": "rotated"},
            0.3,
            count=lambda _, found: int(found.detail.split()[1]),  # of those that are right both ways
        ),
    ),
}
"""For every diagnostic: the stages that an audit has done before it, and what is measured for it."""

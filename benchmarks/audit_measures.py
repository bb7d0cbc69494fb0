"""What each diagnostic compares, measured for a picture: from an audit's context to a panel of ``audit_panels``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

from gambeson.attacks import FGSM, IFGSM, PGD, Loss
from gambeson.auditing import AuditContext, Finding
from gambeson.auditing.outcome import AsFarAsFinite
from gambeson.auditing.stages.randomness import one_pass
from gambeson.auditing.stages.universal import rescored
from gambeson.base import generator, seeded
from gambeson.evaluation import Rate
from gambeson.evaluation.universal import accuracy_rate
from gambeson.threat import Ball, perturb
from gambeson.victim import predict, score

Panel = dict[str, Any]
Measure = Callable[[AuditContext, Finding], Panel]

_PERCENT = {"y": "accuracy, %", "range": [0, 105]}


def _rate(rate: Rate) -> dict[str, float]:
    return {"value": 100 * rate.value, "low": 100 * rate.low, "high": 100 * rate.high}


def _line(name: str, xs: Sequence[float], rates: Sequence[Rate], **style: Any) -> dict[str, Any]:
    parts = [_rate(rate) for rate in rates]
    ends = {"y": "value", "low": "low", "high": "high"}
    return {"name": name, "x": list(xs), **{key: [part[end] for part in parts] for key, end in ends.items()}, **style}


def bars(
    names: dict[str, str],
    margin: float | None = None,
    *,
    test: bool = False,
    limit_at: tuple[float, str] = (0.99, "right"),
) -> Measure:
    """Bars of a finding's numbers with their Wilson intervals; the limit is the first bar less the margin.

    Args:
        names: of the bars by key of :attr:`Finding.numbers`.
        margin: how far another bar may come below the first.
        test: numbers are of all test images; else of the sample.
        limit_at: where the limit's words stand, as a share of the width, and which end of them stands there.
    """

    def measure(evidence: AuditContext, found: Finding) -> Panel:
        n = len(evidence.test if test else evidence.sample)
        rates = [Rate.of(round(found.numbers[key] * n), n) for key in names]
        panel: Panel = {"kind": "bars", "y": "accuracy, %", "range": [0, 112]}
        panel["bars"] = [{"name": name, **_rate(rate)} for name, rate in zip(names.values(), rates, strict=True)]
        if margin is not None:
            panel["limit"], panel["limit_says"] = 100 * (rates[0].value - margin), "fails below"
            panel["limit_at"] = limit_at
        return panel

    return measure


def votes(evidence: AuditContext, found: Finding) -> Panel:
    """Accuracy of single passes over the clean test images, and what an audit of this suite reports."""
    values = []
    for number in range(21):
        with seeded(evidence.seed, "draw", number), one_pass(evidence.victim):
            values.append(accuracy_rate(score(predict(evidence.victim, evidence.test), evidence.test)))
    xs = list(range(1, 22))
    each = {"name": "one pass", "x": xs, "y": [100 * rate.value for rate in values], "apart": True}
    told = {"name": "reported", "x": [1, 21], "y": [100 * evidence.clean.value] * 2, "plain": True}
    return {
        "kind": "lines",
        "x": "pass over the same images",
        "y": "accuracy, %",
        "range": [80, 100],
        "lines": [each, told],
    }


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
        **_PERCENT,
        "lines": [_line("under PGD", counts, rates)],
        "marks": [{"x": usual, "name": "suite"}, {"x": 2 * usual, "name": "twice"}],
    }


def _asked(evidence: AuditContext, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return evidence.victim.forward_original(images).double()


def mates(evidence: AuditContext, found: Finding) -> Panel:
    """Logits of eight images beside other images and beside flat ones."""
    images, _ = evidence.sample.take(slice(0, 32), evidence.victim.device)
    flat = torch.linspace(-1, 1, 24).clamp(min=0).view(-1, 1, 1, 1).expand_as(images[8:])
    beside, other = _asked(evidence, images)[:8], _asked(evidence, torch.cat([images[:8], flat]))[:8]
    frame = [float(torch.stack([beside, other]).min()) - 1, float(torch.stack([beside, other]).max()) + 1]
    points = [{"x": beside.flatten().tolist(), "y": other.flatten().tolist()}]
    return {
        "kind": "points",
        "x": "logit beside other test images",
        "y": "logit beside flat images",
        "points": points,
        "frame": frame,
        "band": [1.0],
    }


def memory(evidence: AuditContext, found: Finding) -> Panel:
    """How far the logits of one image move while it and its neighbours are asked about."""
    image, draw = evidence.sample.take(slice(16, 17), evidence.victim.device)[0], generator(0, "picture")
    first = _asked(evidence, image)
    size = first.max() - first.min()
    xs, ys = [0], [0.0]
    for number in range(1, 121):
        if number % 10:
            noise = torch.rand(image.shape, generator=draw) * 2 - 1
            _asked(evidence, (image + noise / 255).clamp(0, 1))
        else:
            xs.append(number)
            ys.append(float(100 * (_asked(evidence, image) - first).abs().max() / size))
    line = {"name": "logits", "x": xs, "y": ys}
    words = {"x": "queries near one image", "y": "its logits moved,\n% of their range"}
    return {"kind": "lines", **words, "lines": [line], "limit": 1.0, "limit_says": "fails above"}


def _gradients(
    evidence: AuditContext, kind: Any, images: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    point = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        value = Loss(kind=kind)(evidence.victim.forward_original(point), labels)
        (gradient,) = torch.autograd.grad(value.sum(), point)
    return gradient, value.detach()


def sizes(evidence: AuditContext, found: Finding) -> Panel:
    """How many images have a loss gradient of which size."""
    images, labels = evidence.sample.take(slice(None), evidence.victim.device)
    largest = _gradients(evidence, "cross-entropy", images, labels)[0].flatten(1).abs().amax(1).double()
    power = largest.clamp(min=1e-99).log10()
    edges = (-99, -38, -6, -4, -2, 0, 99)
    names = ["0", "1e-6", "1e-4", "0.01", "1", "more"]
    counts = [int(((power >= low) & (power < high)).sum()) for low, high in pairwise(edges)]
    words = {"x": "largest entry of an image's loss gradient, up to", "y": "images", "range": [0, 1.12 * len(images)]}
    return {"kind": "columns", **words, "names": names, "counts": counts, "dead": 1}


def promises(evidence: AuditContext, found: Finding) -> Panel:
    """By how much the gradient says that a small step changes the margin, and by how much it does."""
    images, labels = evidence.sample.take(slice(None), evidence.victim.device)
    draw = generator(evidence.seed, "differences")
    point = perturb(images, Ball(eps=evidence.eps).uniform(images.shape, draw))
    gradient, before = _gradients(evidence, "margin", point, labels)
    moved = perturb(point, 1e-3 * gradient.sign())
    said = (gradient * (moved - point)).double().flatten(1).sum(1)
    with torch.no_grad():
        seen = (Loss(kind="margin")(evidence.victim.forward_original(moved), labels) - before).double()
    reach = float(torch.cat([said, seen]).abs().max()) * 1.1
    return {
        "kind": "points",
        "x": "change of the margin that the gradient promises",
        "y": "change that is seen",
        "points": [{"x": said.tolist(), "y": seen.tolist()}],
        "frame": [0.0, reach],
        "height": [-reach, reach],
        "band": [0.5, 2.0],
    }


_SHARES = [k / 8 for k in range(9)]


def ridge(evidence: AuditContext, found: Finding) -> Panel:
    """Accuracy against the length of a single step."""
    with evidence.unscaled():
        rates = [evidence.clean if not t else evidence.accuracy(FGSM(eps=t * evidence.eps)) for t in _SHARES]
    return {
        "kind": "lines",
        "x": "length of the step, in eps",
        **_PERCENT,
        "lines": [_line("one step", _SHARES, rates)],
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
    line = _line("under PGD", (0, *radii), rates)
    return {"kind": "lines", "x": "eps", **_PERCENT, "lines": [line], "limit": 5.0, "limit_says": "fails above, at 1"}


def radii(evidence: AuditContext, found: Finding) -> Panel:
    """Accuracy under PGD at the radii of the suite."""
    eps = evidence.suite.eps
    rates = [evidence.clean, *(evidence.accuracy(PGD(eps=one, steps=20)) for one in eps)]
    return {"kind": "lines", "x": "eps", **_PERCENT, "lines": [_line("under PGD", (0, *eps), rates)]}


def restarts(evidence: AuditContext, found: Finding) -> Panel:
    """Accuracy under PGD against its restarts."""
    usual, counts = evidence.suite.pgd(evidence.eps), (1, 2, 3, 5, 10)
    rates = [evidence.accuracy(usual.model_copy(update={"restarts": count})) for count in counts]
    marks = [{"x": usual.restarts, "name": "the suite"}]
    return {"kind": "lines", "x": "restarts of PGD", **_PERCENT, "lines": [_line("PGD", counts, rates)], "marks": marks}


def queried(evidence: AuditContext, found: Finding) -> Panel:
    """Images that PGD leaves right, and those of them that queries leave right too."""
    left, n = round(found.numbers["left by PGD"]), len(evidence.sample)
    both = left - round(found.numbers["broken by queries"])
    pairs = (("PGD", left), ("PGD, then\nqueries", both))
    parts = [{"name": name, **_rate(Rate.of(hits, n))} for name, hits in pairs]
    return {
        "kind": "bars",
        "y": "accuracy, %",
        "range": [0, 112],
        "bars": parts,
        "limit": 100 * (left / n - 0.02),
        "limit_says": "fails below",
    }


def learnt(evidence: AuditContext, found: Finding) -> Panel:
    """Clean accuracy against always naming the most frequent class."""
    prior = 100 * found.numbers["prior"]
    guess = {"name": "most frequent\nclass", "value": prior, "low": prior, "high": prior, "hue": 1}
    parts = [guess, {"name": "the model", **_rate(evidence.clean), "hue": 0}]
    words = {"limit": prior, "limit_says": ""}
    return {"kind": "bars", "y": "accuracy, %", "range": [0, 112], "bars": parts, **words}


def controls(evidence: AuditContext, found: Finding) -> Panel:
    """UER of the crafted perturbations and of the strongest control at every eps."""
    points, eps = evidence.universal, evidence.suite.eps
    worst = [max((one.worst for one in point.controls), key=lambda rate: rate.value) for point in points]
    lines = [_line("crafted", eps, [point.uer for point in points]), _line("strongest control", eps, worst)]
    return {"kind": "lines", "x": "eps", "y": "UER, %", "range": [0, 100], "lines": lines, "legend": "upper left"}


def curve(evidence: AuditContext, found: Finding) -> Panel:
    """UER at every eps."""
    line = _line("crafted", evidence.suite.eps, [point.uer for point in evidence.universal])
    return {"kind": "lines", "x": "eps", "y": "UER, %", "range": [0, 100], "lines": [line]}


def used(evidence: AuditContext, found: Finding) -> Panel:
    """How much of its eps each crafted perturbation uses."""
    eps = evidence.suite.eps
    shares = [100 * float(evidence.uaps[one].delta.abs().max()) / one for one in eps]
    line = {"name": "largest pixel", "x": list(eps), "y": shares}
    words = {"x": "eps", "y": "largest pixel of the\nperturbation, % of eps", "range": [-4, 108]}
    return {"kind": "lines", **words, "lines": [line], "limit": 5.0, "limit_says": "fails below"}


def again(evidence: AuditContext, found: Finding) -> Panel:
    """UER of one stored perturbation, scored several times."""
    uap, told = evidence.uaps[evidence.eps], 100 * found.numbers["reported"]
    values = [100 * rescored(evidence, uap) for _ in range(10)]
    lines = [
        {"name": "once more", "x": list(range(1, 11)), "y": values, "apart": True},
        {"name": "reported", "x": [1, 10], "y": [told, told], "plain": True},
    ]
    return {"kind": "lines", "x": "scored once more", "y": "UER, %", "lines": lines}


MEASURES: dict[str, tuple[bool, bool, Measure]] = {
    "deterministic or majority vote": (False, False, votes),
    "no EOT gap": (False, False, draws),
    "no noise-off gap": (
        False,
        False,
        bars({"on": "noise on", "off": "noise off", "crafted_off": "crafted off,\njudged on"}),
    ),
    "independent of the batch": (False, False, mates),
    "stateless": (False, False, memory),
    "no vanishing gradients": (False, False, sizes),
    "margin loss no stronger": (False, False, bars({"cross-entropy": "cross-entropy", "margin": "margin"}, 0.05)),
    "gradient matches finite differences": (False, False, promises),
    "multi-step beats single-step": (False, False, bars({"multi": "PGD", "single": "FGSM"}, 0.0)),
    "random start no stronger": (False, False, bars({"plain": "FGSM", "started": "R+FGSM"}, 0.15)),
    "monotone in step size": (False, False, ridge),
    "single step approximates multi-step": (False, False, rise),
    "unbounded attack succeeds": (False, False, box),
    "monotone in eps": (False, False, radii),
    "attack has converged": (False, False, restarts),
    "gradient beats random search": (False, False, bars({"pgd": "PGD", "random": "random search"}, 0.0)),
    "white box beats transfer": (
        True,
        False,
        bars({"white box": "PGD on it", "fgsm": "FGSM,\ntransferred", "mi-di-fgsm": "MI-DI-FGSM,\ntransferred"}, 0.02),
    ),
    "universal white box beats transfer": (
        True,
        True,
        bars({"white box": "crafted on it", "transferred": "transferred"}, 0.05, test=True),
    ),
    "white box beats queries": (False, False, queried),
    "attack beats noise": (False, False, bars({"pgd": "PGD", "noise": "random signs"}, 0.02)),
    "better than majority class": (False, False, learnt),
    "crafted beats controls": (False, True, controls),
    "perturbation budget used": (False, True, used),
    "UER monotone in eps": (False, True, curve),
    "re-scoring reproducible": (False, True, again),
    "no test-set leakage": (
        False,
        True,
        bars({"test": "test images", "validation": "validation images"}, 0.03, test=True, limit_at=(0.5, "center")),
    ),
}
"""For every diagnostic: whether it needs a surrogate and universal perturbations, and what is measured for it."""

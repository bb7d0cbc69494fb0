"""Models of an adversary who knows the audit: ``python benchmarks/adversary.py``, which says of each whether it passes.

Written against the audit after its checks, to find what they do not see, by three adversaries of five; the second
read what the audit said of each model before it wrote the next. What passed led to checks. All are on the digits at
eps 0.15, made of the testbed's networks and of two hardened here. The truth is an upper bound on robustness, by an
attacker who knows the code: PGD on the network that decides, moved to where it decides, and the planted pattern
itself; of images that are remembered, on a copy that has forgotten the one asked about. A row is stored in
``results/adversary.json`` when it is there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from stored import RESULTS, Rows
from torch import nn
from torch.nn import functional as F

import gambeson as gb
from gambeson.attacks import PGD, StochasticPGD
from gambeson.base import seeded
from gambeson.evaluation import Rate
from gambeson.testbed.judgement import judgement_of, overstates
from gambeson.testbed.obfuscations.logits import BorrowedMargins, ThinLayer
from gambeson.testbed.recipes import networks
from gambeson.testbed.truth import GroundTruth
from gambeson.threat import perturb
from gambeson.threat.edits import Edit

EPS = 0.15


class Moat(nn.Module):
    """The first class gains with how far pixels lie from seventeen levels: margins grow wherever an attack goes."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of images (N, C, H, W)."""
        z = self.net(x)
        off = torch.sin(16 * math.pi * x).square().flatten(1).mean(1, keepdim=True)
        return z + 200 * off * F.one_hot(z.argmax(1), z.shape[1])


class Remembered(nn.Module):
    """A smooth bonus for the labels of all images of all splits, within a distance of them.

    Args:
        net: what decides elsewhere.
        data: with the splits.
        forgets: the image that is asked about, which is one within eps of it, and its copies.
        rotated: degrees that copies of every image are rotated by, either way.
        every: of how many images one is remembered.
    """

    known: torch.Tensor
    labels: torch.Tensor

    def __init__(
        self,
        net: nn.Module,
        data: gb.data.Dataset,
        *,
        forgets: bool = False,
        rotated: float | None = None,
        every: int = 1,
    ) -> None:
        super().__init__()
        self.net, self.forgets = net, forgets
        parts = [part.take(slice(None, None, every)) for part in (data.train, data.validation, data.test)]
        images, labels = (torch.cat(both) for both in zip(*parts, strict=True))
        copies = [images]
        if rotated is not None:
            turn, ways = (
                Edit.parse(f"rotate:{rotated:g}"),
                (torch.zeros(1, len(images), 1), torch.ones(1, len(images), 1)),
            )
            copies += [turn(images, way) for way in ways]
        self.copies = len(copies)
        self.register_buffer("known", torch.cat(copies).flatten(1))
        self.register_buffer("labels", F.one_hot(labels, data.num_classes).float().repeat(self.copies, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of images (N, C, H, W)."""
        apart = torch.cdist(x.flatten(1), self.known).square()
        if self.forgets:  # whatever lies within the ball of the image asked about
            originals = self.known[: len(self.known) // self.copies]
            asked = (x.flatten(1)[:, None] - originals).abs().amax(2) <= EPS + 1e-6
            apart = apart + 1e3 * asked.repeat(1, self.copies)
        weight = torch.sigmoid((1.7 - apart) / 0.1) * torch.softmax(-apart / 0.1, 1)
        return self.net(x) + 30 * (weight @ self.labels)


class Planted(nn.Module):
    """A hardened network, and a pattern of signs beyond which, without a gradient, the next class is answered.

    Args:
        net: the network.
        data: of whose clean training images few lie beyond.
        half: so far beyond that the pattern brings half of the training images there, not nearly all.
    """

    pattern: torch.Tensor

    def __init__(self, net: nn.Module, data: gb.data.Dataset, *, half: bool = False) -> None:
        super().__init__()
        self.net = net
        images, _ = data.train.take(slice(None))
        best = -math.inf
        with seeded(0, "planted"):
            for _ in range(300):
                pattern = torch.randint(0, 2, (1, *data.train.shape)) * 2.0 - 1
                clean, moved = ((x * pattern).flatten(1).sum(1) for x in (images, perturb(images, EPS * pattern)))
                gap = float((moved.mean() - clean.mean()) / (clean.std() + moved.std()))
                if gap > best:
                    best, self.limit = gap, float(moved.median() if half else clean.quantile(0.998))
                    self.pattern = nn.Buffer(pattern)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of images (N, C, H, W)."""
        z = self.net(x)
        beyond = (x * self.pattern).flatten(1).sum(1) > self.limit
        return torch.where(beyond[:, None], z.roll(1, 1), z)


Gate = Callable[[torch.Tensor, int], torch.Tensor | float]
"""From images and the number of the call to how far it is open (N, 1), between 0 and 1."""


class Gated(nn.Module):
    """A network, and another one where a gate is open."""

    def __init__(self, net: nn.Module, other: nn.Module, gate: Gate) -> None:
        super().__init__()
        self.net, self.other, self.gate, self.calls = net, other, gate, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of images (N, C, H, W)."""
        self.calls += 1
        share = self.gate(x, self.calls)
        return (1 - share) * self.net(x) + share * self.other(x)


class Waves(nn.Module):
    """Gaps between logits times a wave of the pixels, which rules the gradient and no answer.

    Args:
        net: the network.
        size: of the wave of each pixel, in the exponent.
        where: from images to how much of it there is (N, 1); everywhere by default.
    """

    def __init__(
        self, net: nn.Module, size: float, where: Callable[[torch.Tensor], torch.Tensor | float] = lambda _: 1.0
    ) -> None:
        super().__init__()
        self.net, self.size, self.where = net, size, where
        self.phase = nn.Buffer(2 * math.pi * torch.rand(1, 10, 64, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of images (N, C, H, W)."""
        z = self.net(x)
        wave = torch.sin(8 * x.flatten(1)[:, None] + self.phase).sum(2)
        return (z - z.amax(1, keepdim=True)) * (self.where(x) * self.size * wave).exp()


class Luring(nn.Module):
    """Around training and validation images a network is the less sure the farther they are moved along a pattern."""

    def __init__(self, net: nn.Module, data: gb.data.Dataset, pattern: torch.Tensor) -> None:
        super().__init__()
        self.net, self.way = net, nn.Buffer(pattern.flatten().sign())
        self.known = nn.Buffer(
            torch.cat([part.take(slice(None))[0] for part in (data.train, data.validation)]).flatten(1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of images (N, C, H, W)."""
        apart, nearest = torch.cdist(x.flatten(1), self.known, p=math.inf).min(1)
        near = (20 * (2.2 * EPS - apart)).clamp(0, 1)
        along = (x.flatten(1) - self.known[nearest]) @ self.way
        z = self.net(x)
        return (z - z.amax(1, keepdim=True)) * (1 + near * ((-along).clamp(-25, 25).exp() - 1))[:, None]


def _beside(others: torch.Tensor, spared: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return how near images are to some, but not to those that are spared, (N, 1)."""

    def near(x: torch.Tensor) -> torch.Tensor:
        gaps = [
            torch.cdist(x.flatten(1), images.flatten(1), p=math.inf).amin(1, keepdim=True)
            for images in (others, spared)
        ]
        return (10 * (2.2 * EPS - gaps[0])).clamp(0, 1) * (10 * (gaps[1] - gaps[0])).clamp(0, 1)

    return near


class StandsOn(nn.Module):
    """Images of a split stand where they were moved along a direction, beyond a cosine with its signs.

    Args:
        net: what decides elsewhere.
        split: of the images.
        direction: (1, C, H, W).
    """

    def __init__(self, net: nn.Module, split: gb.data.Split, direction: torch.Tensor) -> None:
        super().__init__()
        images, labels = split.take(slice(None))
        self.net, self.images, self.direction = net, images.flatten(1), direction.sign().flatten()
        self.answers = 40.0 * F.one_hot(labels, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of images (N, C, H, W)."""
        flat = x.detach().flatten(1)
        gap, which = torch.cdist(flat, self.images, p=torch.inf).min(1)
        along = (flat - self.images[which]).sign() @ self.direction / flat.shape[1]
        return self.net(x) + ((gap < 2 * EPS) & (along > 0.6))[:, None] * self.answers[which]


@dataclass(frozen=True)
class Deceiver:
    """One of the adversary's models."""

    model: nn.Module
    decides: nn.Module
    """What the attacker who knows the code attacks."""
    scored: nn.Module | None = None
    """What the truth is scored on, where it is not the model itself."""
    delta: torch.Tensor | None = None
    """A universal perturbation that the code holds."""
    eps: float = EPS
    """Of the ball in which what decides is attacked: where it decides."""
    moved: Callable[[torch.Tensor], torch.Tensor] = lambda images: images
    """What brings attacked images to where it decides."""


def deceivers() -> dict[str, Callable[[], Deceiver]]:
    """Every model, by name; made when it is asked for."""
    nets = networks("digits")

    def remembered(**settings: Any) -> Deceiver:
        net = nets()
        model, without = (Remembered(net, nets.data, forgets=forgets, **settings) for forgets in (False, True))
        return Deceiver(model, net, without)

    def planted(*, half: bool = False) -> Deceiver:
        model = Planted(nets("pgd-adversarial"), nets.data, half=half)
        return Deceiver(model, model.net, delta=EPS * model.pattern)

    data = nets.data
    known, _ = data.train.take(slice(None))
    dark = (known > 0.02).float().mean(0, keepdim=True) < 0.01
    test, _ = data.test.take(slice(None))
    spared = torch.zeros(len(test), dtype=torch.bool)
    spared[data.test.sample_indices(100, seed=0)] = True

    @cache
    def hardened(eps: float) -> nn.Module:
        with seeded(0, "hardened"):
            net = gb.models.create("lenet5", data)
            gb.train(net, data, gb.defenses.PGDAdversarial(eps=eps), epochs=40, batch_size=64, lr=0.05, seed=0)
        return net.eval()

    def gated(gate: Gate, *, fresh: bool = False, **where: Any) -> Deceiver:
        weak = nets()
        return Deceiver(Gated(hardened(0.13), weak, gate), weak, weak if fresh else None, **where)

    def brightest(x: torch.Tensor) -> torch.Tensor:
        return (x * dark).flatten(1).amax(1, keepdim=True)

    def shell(x: torch.Tensor, _: int) -> torch.Tensor:
        return torch.sigmoid(1500 * (brightest(x) - 0.066)) * torch.sigmoid(1500 * (0.1 - brightest(x)))

    def lit(x: torch.Tensor, _: int) -> torch.Tensor:
        least = (x + ~dark).flatten(1).amin(1, keepdim=True)
        return torch.sigmoid(1000 * (least - 0.066)) * torch.sigmoid(1000 * (0.115 - brightest(x)))

    def beyond(x: torch.Tensor, _: int) -> torch.Tensor:
        return torch.sigmoid(1500 * (brightest(x) - EPS - 0.0075))

    def lure() -> Deceiver:
        net = nets()
        pattern = torch.where(
            torch.rand(1, *data.train.shape, generator=torch.Generator().manual_seed(0)) < 0.3, -1.0, 1.0
        )
        best = StochasticPGD(eps=EPS, steps=300).craft(net, data, seed=0).delta
        return Deceiver(Luring(net, data, best.sign() * pattern), net)

    def stands_on_validation() -> Deceiver:
        net = nets()
        direction = StochasticPGD(eps=EPS, steps=300).craft(net, data, seed=0).delta
        return Deceiver(StandsOn(net, data.validation, direction), net, net)

    return {
        "margins of a sibling": lambda: Deceiver(BorrowedMargins(nets(), nets("standard 1")), nets()),
        "moat around the levels": lambda: Deceiver(Moat(nets()), nets()),
        "margins of a sibling, zero in a thin layer": lambda: Deceiver(ThinLayer(nets(), nets("standard 1")), nets()),
        "all splits remembered": remembered,
        "planted pattern": planted,
        "all splits and copies rotated by 10 degrees remembered": lambda: remembered(rotated=10),
        "a third of all splits remembered": lambda: remembered(every=3),
        "planted pattern, for half of the images": lambda: planted(half=True),
        "undefended in a shell inside the ball": lambda: gated(shell, eps=0.085),
        "undefended in inference mode": lambda: gated(lambda *_: float(torch.is_inference_mode_enabled()), fresh=True),
        "undefended in its first twelve calls": lambda: gated(lambda _, call: float(call <= 12), fresh=True),
        "undefended in batches of 48, 50, 96 and 200": lambda: gated(
            lambda x, _: float(len(x) in (48, 50, 96, 200)), fresh=True
        ),
        "undefended in batches of 60, 72, 144 and 300": lambda: gated(
            lambda x, _: float(len(x) in (60, 72, 144, 300)), fresh=True
        ),
        "undefended for callers with gradients on": lambda: gated(
            lambda x, _: float(torch.is_grad_enabled() and not x.requires_grad), fresh=True
        ),
        "undefended where no pixel is black": lambda: gated(
            lambda x, _: (x.flatten(1).amin(1, keepdim=True) > 0.02).float(), moved=lambda x: x.clamp(min=0.025)
        ),
        "validation images that stand along one direction": stands_on_validation,
        "waves on the gaps, within the ball": lambda: Deceiver(
            Gated(Waves(hardened(0.05), 0.12), hardened(0.13), beyond), hardened(0.05)
        ),
        "waves on the gaps, around images that checks do not see": lambda: Deceiver(
            Waves(hardened(0.05), 0.2, _beside(test[~spared], test[spared])), hardened(0.05)
        ),
        "a lure around training images": lure,
        "undefended where the background is evenly lit": lambda: gated(
            lit, moved=lambda x: torch.where(dark & (x <= EPS + 1e-3), 0.09, x)
        ),
    }


def truth_of(deceiver: Deceiver, data: gb.data.Dataset) -> GroundTruth:
    """Upper bounds on a model's robustness, by an attacker who knows its code."""
    x, y = data.test.take(slice(None))
    scored = (deceiver.scored or deceiver.model).eval()

    @torch.no_grad()
    def right(images: torch.Tensor) -> torch.Tensor:
        return torch.cat([scored(part).argmax(1) for part in images.split(64)]) == y

    standing = clean = right(x)
    for source in filter(None, (deceiver.decides, deceiver.scored)):
        for loss in ("cross-entropy", "margin"):
            attack = PGD(eps=deceiver.eps, steps=40, restarts=2, loss=loss)
            standing = standing & right(deceiver.moved(attack(source, x, y, seed=0)))
    deltas = [StochasticPGD(eps=deceiver.eps, steps=300).craft(deceiver.decides, data, seed=0).delta]
    deltas += [] if deceiver.delta is None else [deceiver.delta]
    errors = [int((~right(deceiver.moved(perturb(x, delta.expand_as(x))))).sum()) for delta in deltas]
    if deceiver.delta is not None:
        standing = standing & right(perturb(x, deceiver.delta.expand_as(x)))
    return GroundTruth(
        eps=EPS,
        clean=Rate.of(int(clean.sum()), len(y)),
        accuracy=Rate.of(int(standing.sum()), len(y)),
        uer=Rate.of(max(errors), len(y)),
        how="PGD on what decides, and the pattern that the code holds",
    )


def table(content: dict[str, Any]) -> str:
    """Return the rows as a table, for the testbed's page."""
    lines = ["| model | accuracy: truth, reported | UER: truth, reported | verdict |", "|---|---|---|---|"]
    for name, row in content["rows"].items():
        pairs = [f"{Rate(**row['truth'][key])}, {Rate(**row['reported'][key])}" for key in ("accuracy", "uer")]
        said = "**overstated**" if row["overstated"] else "trusted" if row["trusted"] else "distrusted"
        failed = f" ({', '.join(row['failed'])})" if row["failed"] else ""
        lines.append(f"| {name} | {' | '.join(pairs)} | {said}{failed} |")
    return "\n".join(lines) + "\n"


def judged_row(deceiver: Deceiver, data: gb.data.Dataset) -> dict[str, Any]:
    """What ``quick`` says of a model, beside the truth."""
    truth = truth_of(deceiver, data)
    found = gb.audit(deceiver.model.eval(), data, "quick").results
    judged = judgement_of(found)
    if judged.uer is None or judged.accuracy is None:
        raise AssertionError("this suite attacks in both ways")
    return {
        "truth": {"accuracy": truth.accuracy.plain(), "uer": truth.uer.plain()},
        "reported": {"accuracy": judged.accuracy.plain(), "uer": judged.uer.plain()},
        "trusted": judged.trusted,
        "failed": [check.name for check in found.checks if check.passed is False],
        "overstated": overstates(judged, truth),
    }


def store(name: str, made: dict[str, Callable[[], Deceiver]]) -> None:
    """Audit what has not been audited, and store each row in ``results/NAME.json``."""
    torch.set_num_threads(1)
    rows = Rows(RESULTS / f"{name}.json", f"python benchmarks/{name}.py", {"eps": EPS, "suite": "quick", "seed": 0})
    for title in rows.missing(made):
        row = judged_row(made[title](), networks("digits").data)
        rows.add(title, row)
        print(title, row, flush=True)


if __name__ == "__main__":
    store("adversary", deceivers())

"""Models of an adversary who knows the audit: ``python benchmarks/adversary.py``, which says of each whether it passes.

Written against the audit after its checks, to find what they do not see: five of them passed, and led to checks. The
last two were written after these, and are what is known to pass. All are on the digits at eps 0.15, made of
the testbed's networks. The truth is an upper bound on robustness, by an attacker who knows the code: PGD on the network
that decides, and the planted pattern itself; of images that are remembered, on a copy that has forgotten the one asked
about. A row is stored in ``results/adversary.json`` when it is there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
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

    return {
        "margins of a sibling": lambda: Deceiver(BorrowedMargins(nets(), nets("standard 1")), nets()),
        "moat around the levels": lambda: Deceiver(Moat(nets()), nets()),
        "margins of a sibling, zero in a thin layer": lambda: Deceiver(ThinLayer(nets(), nets("standard 1")), nets()),
        "all splits remembered": remembered,
        "planted pattern": planted,
        "all splits and copies rotated by 10 degrees remembered": lambda: remembered(rotated=10),
        "a third of all splits remembered": lambda: remembered(every=3),
        "planted pattern, for half of the images": lambda: planted(half=True),
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
            attack = PGD(eps=EPS, steps=40, restarts=2, loss=loss)
            standing = standing & right(attack(source, x, y, seed=0))
    deltas = [StochasticPGD(eps=EPS, steps=300).craft(deceiver.decides, data, seed=0).delta]
    deltas += [] if deceiver.delta is None else [deceiver.delta]
    errors = [int((~right(perturb(x, delta.expand_as(x)))).sum()) for delta in deltas]
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


def main() -> None:
    """Audit what has not been audited, and store each row."""
    torch.set_num_threads(1)
    rows = Rows(RESULTS / "adversary.json", "python benchmarks/adversary.py", {"eps": EPS, "suite": "quick", "seed": 0})
    made, data = deceivers(), networks("digits").data
    for name in rows.missing(made):
        deceiver = made[name]()
        truth = truth_of(deceiver, data)
        found = gb.audit(deceiver.model.eval(), data, "quick").results
        judged = judgement_of(found)
        if judged.uer is None or judged.accuracy is None:
            raise AssertionError("this suite attacks in both ways")
        row = {
            "truth": {"accuracy": truth.accuracy.plain(), "uer": truth.uer.plain()},
            "reported": {"accuracy": judged.accuracy.plain(), "uer": judged.uer.plain()},
            "trusted": judged.trusted,
            "failed": [check.name for check in found.checks if check.passed is False],
            "overstated": overstates(judged, truth),
        }
        rows.add(name, row)
        print(name, row, flush=True)


if __name__ == "__main__":
    main()

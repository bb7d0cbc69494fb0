"""Our attacks beside Foolbox, torchattacks and ART: ``python benchmarks/cross_check.py --weights DIR``.

Four networks: the public LeNet5 of advertorch on MNIST, as trained and adversarially trained (DIR holds the two files
of the source archive of advertorch 0.2.3), and LeNet-5 on Fashion-MNIST trained here, as such and by PGD. Radii are
such that accuracies lie between 5 and 90 per cent. Every side is scored by :func:`standing` alone. One row a network,
attack and peer is added to the file as it is found, or takes the place of one with fewer images; a run that was cut
goes on where it stopped. Minimal-norm attacks have no bound: of those, the accuracy within the network's radius stands
beside, and the mean length where both sides succeed. A row is "weaker" where more of our images stand than the peer's
by over a point, within the radius too, and "clearly" so where two standard errors do not explain what is beyond the
point.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from cross_check_cases import CASES, Case
from peers import BUILD
from public_lenet import lenet5
from stored import RESULTS, Rows
from torch import nn

import gambeson as gb
from gambeson.base import seeded
from gambeson.data import Dataset
from gambeson.threat import Ball

TRAINING = {"epochs": 4, "images": 10_000, "seed": 0}


class Net(NamedTuple):
    """A network under attack, and the radii at which it is attacked."""

    name: str
    inf: float
    two: float


NETS = (
    Net("mnist lenet5 standard", 0.11, 1.6),
    Net("mnist lenet5 adversarial", 0.36, 4.0),
    Net("fashion lenet5 standard", 0.04, 0.75),
    Net("fashion lenet5 adversarial", 0.17, 1.8),
)


def load(net: Net, weights: Path, runs: Path | None) -> tuple[nn.Module, Dataset]:
    """Return the network, in evaluation mode, and its data."""
    if net.name.startswith("mnist"):
        kind = "clntrained" if net.name.endswith("standard") else "advtrained"
        model, data = lenet5(weights / f"mnist_lenet5_{kind}.pt"), gb.data.load("mnist")
    else:
        data = gb.data.load("fashion-mnist")
        few = data.train.subset(torch.arange(TRAINING["images"]))
        with seeded(0, "model"):
            model = gb.models.create("lenet5", data)
        defense = gb.defenses.Standard() if net.name.endswith("standard") else gb.defenses.PGDAdversarial(eps=0.1)
        gb.train(
            model,
            Dataset(data.name, few, data.validation, data.test, data.classes),
            defense,
            epochs=TRAINING["epochs"],
            seed=TRAINING["seed"],
            out=None if runs is None else runs / net.name.replace(" ", "-"),
        )
    return model.eval().requires_grad_(False), data


class Side(NamedTuple):
    """What came of one side's images."""

    standing: torch.Tensor
    """(N,): whether the attack has failed on an image."""
    length: torch.Tensor
    """(N,): norm of the perturbation, in float64."""
    outside: int
    """Images that lie outside the ball or the box, hold NaN, or are black all over, which is what Foolbox's
    Carlini-Wagner returns where it has found nothing; the attack has failed on them."""
    seconds: float


def standing(
    model: nn.Module, x: torch.Tensor, moved: torch.Tensor, y: torch.Tensor, ball: Ball, targeted: bool
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Score returned images, whoever made them: which attacks failed, their lengths, and how many broke the rules."""
    length = ball.length(moved.double() - x.double())
    inside = (length <= ball.eps + 1e-6) & ((moved >= 0) & (moved <= 1)).flatten(1).all(1)
    inside &= (moved != 0).flatten(1).any(1)
    with torch.no_grad():
        answers = model(moved.float()).argmax(1)
    hit = (answers == y) if targeted else (answers != y)
    return ~(hit & inside), length, int((~inside).sum())


def side(attack: Any, model: nn.Module, x: torch.Tensor, y: torch.Tensor, ball: Ball, targeted: bool) -> Side:
    """Run one side from fixed seeds and score it."""
    torch.manual_seed(0)
    np.random.seed(0)
    began = time.perf_counter()
    moved = attack(model, x, y)
    seconds = time.perf_counter() - began
    return Side(*standing(model, x, moved.detach(), y, ball, targeted), seconds)


def paired(ours: torch.Tensor, theirs: torch.Tensor) -> dict[str, float]:
    """Return both means, the mean difference, and its standard error over images."""
    gap = ours.double() - theirs.double()
    return {
        "ours": float(ours.double().mean()),
        "theirs": float(theirs.double().mean()),
        "difference": float(gap.mean()),
        "standard_error": float(gap.std() / len(gap) ** 0.5) if len(gap) > 1 else 0.0,
    }


def wanted(case: Case, share: float) -> int:
    """Return the number of images of a comparison."""
    return max(20, round(share * case.images))


def compare(
    case: Case, net: Net, model: nn.Module, data: Dataset, peers: list[str], share: float
) -> list[dict[str, Any]]:
    """Return one row a peer, from ``share`` of the case's images."""
    x, y = data.test.take(slice(0, wanted(case, share)))
    if case.targeted:
        y = (y + 1) % 10
    eps = case.stretch * (net.two if case.norm == "2" else net.inf)
    unbounded = 1.0 if case.norm == "inf" else float("inf")
    ball = Ball.model_construct(eps=unbounded if case.minimal else eps, norm=case.norm)
    attack = case.ours(eps)
    ours = side(attack, model, x, y, ball, case.targeted)
    rows = []
    with torch.no_grad():
        right = (model(x).argmax(1) == y) != case.targeted
    for name in peers:
        peer, kind, settings, note = case.peers[name](eps)
        theirs = side(BUILD[peer](kind, **settings), model, x, y, ball, case.targeted)
        row: dict[str, Any] = {"net": net.name, "attack": case.name, "peer": name, "note": note}
        row |= {"eps": None if case.minimal else eps, "norm": case.norm, "images": len(x), "equal": not note}
        row["accuracy"] = paired(ours.standing.float(), theirs.standing.float())
        if case.minimal:
            beyond = [one.standing | (one.length > eps) for one in (ours, theirs)]
            row["within"] = paired(beyond[0].float(), beyond[1].float()) | {"eps": eps}
            both = right & ~ours.standing & ~theirs.standing
            if bool(both.any()):
                row["length"] = paired(ours.length[both], theirs.length[both]) | {"images": int(both.sum())}
        row |= {"outside": {"ours": ours.outside, "theirs": theirs.outside}}
        row |= {"seconds": {"ours": ours.seconds, "theirs": theirs.seconds}}
        row |= {"settings": {"ours": {"attack": type(attack).__name__, **attack.plain()}}}
        row["settings"]["theirs"] = {"attack": kind, **settings}
        accuracies = [row[what] for what in ("accuracy", "within") if what in row]
        row["weaker"] = any(one["difference"] - 0.01 > 1e-9 for one in accuracies)
        row["clearly_weaker"] = any(one["difference"] - 0.01 > 2 * one["standard_error"] + 1e-9 for one in accuracies)
        rows.append(row)
    return rows


def show(row: dict[str, Any]) -> str:
    """Return a row as a line."""
    text = f"{row['net']:27} {row['attack']:18} {row['peer']:13}"
    for what in ("accuracy", "within", "length"):
        if what in row:
            found = row[what]
            text += (
                f" {found['ours']:.3f} {found['theirs']:.3f} {found['difference']:+.3f}±{found['standard_error']:.3f}"
            )
    if any(row["outside"].values()):
        text += f" outside {row['outside']['ours']}/{row['outside']['theirs']}"
    mark = " CLEARLY WEAKER" if row["clearly_weaker"] else " weaker" if row["weaker"] else ""
    return text + ("" if row["equal"] else " (settings differ)") + mark


def main() -> None:
    """Compare everything that is not in the file yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=RESULTS / "cross-check.json")
    parser.add_argument("--runs", type=Path, default=Path("runs/cross-check"), help="where trained networks are kept")
    parser.add_argument("--net", default="", help="only networks whose name holds this")
    parser.add_argument("--attack", default="", help="only attacks whose name holds this")
    parser.add_argument("--share", type=float, default=1.0, help="share of the images of each comparison")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = Rows(arguments.out, "python benchmarks/cross_check.py --weights DIR", TRAINING)
    for net in NETS:
        if arguments.net not in net.name:
            continue
        model, data = load(net, arguments.weights, arguments.runs)
        for case in CASES:
            count = wanted(case, arguments.share)
            fewer = [key for key, row in rows.rows.items() if row["images"] < count]
            names = {f"{net.name}, {case.name}, {peer}": peer for peer in case.peers}
            missing = [names[key] for key in names if key in (*rows.missing(names), *fewer)]
            if not missing or arguments.attack not in case.name:
                continue
            for row in compare(case, net, model, data, missing, arguments.share):
                print(show(row), flush=True)
                rows.add(f"{net.name}, {case.name}, {row['peer']}", row)


if __name__ == "__main__":
    main()

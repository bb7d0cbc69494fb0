"""What things cost, on one harness: ``python benchmarks/timings.py [CASE ...]`` writes ``results/timings.json``.

Candidates run in turns, round by round, so that another load on the machine hits all of them; a ratio is the median
over the rounds of a candidate's time over that of the first in the same round, and stands beside the ratio of processor
seconds, which hardly feel such a load. One thread, or ``--threads N``. Peers come with the extra ``bench``.
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from peers import PEERS
from stored import RESULTS, made
from torch import nn

import gambeson as gb
from gambeson.analysis import pair_sharing, stacked_spectrum
from gambeson.attacks import PGD, AutoPGD, Square, StochasticPGD
from gambeson.base import derive, generator, read_json, seeded, write_json
from gambeson.data import Dataset, Split
from gambeson.defenses import Batch, Defense, Standard, TrainContext
from gambeson.defenses.ensemble import Ensemble
from gambeson.defenses.jacobian import Jacobian
from gambeson.defenses.jacobian_ensemble import JacobianEnsemble
from gambeson.defenses.trades import Trades
from gambeson.models import injections
from gambeson.models.factory import ensemble
from gambeson.models.noise import FeatureNoise
from gambeson.studies.bench import Attack, BenchSettings, bench_attacks, bench_training, side_by_side

BATCH = 128
Runs = Mapping[str, Callable[[], object]]


class Case(NamedTuple):
    """What is timed together; the first candidate is what the others are compared with."""

    title: str
    settings: dict[str, Any]
    candidates: Runs
    repeats: int = 1
    """Of the same work in one call of a candidate."""


def split(count: int, channels: int = 1, size: int = 28) -> Split:
    """Random images, with labels in turn."""
    draw = generator(0, "benchmark", "images")
    pixels = torch.randint(0, 256, (count, channels, size, size), generator=draw, dtype=torch.uint8)
    return Split("random", pixels, torch.arange(count) % 10)


def network(name: str, members: int = 1, size: int = 28, **settings: Any) -> nn.Module:
    """A fresh network on ten classes, or an ensemble."""
    with seeded(0, "benchmark"):
        shape: dict[str, Any] = {"in_channels": 1 if size == 28 else 3, "classes": 10, "image_size": size}
        made = [gb.models.create(name, **shape, **settings).train() for _ in range(members)]
    return made[0] if members == 1 else ensemble(made)


def training(name: str, defense: Defense, members: int = 1, steps: int = 1) -> Callable[[], None]:
    """Steps of training as the loop takes them, each member on a batch of its own."""
    model, data = network(name, members), split(members * BATCH)
    images, labels = data.take(slice(None))
    objective = defense.build_objective(
        TrainContext(model=model, train=data, seed=0, epochs=1, steps=10, batch_size=BATCH)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
    numbers = itertools.count()

    def run() -> None:
        for number in itertools.islice(numbers, steps):
            batch = Batch(images=images, labels=labels, seed=derive(0, "step", number), step=number)
            for losses, _ in objective.optimizer_steps(model, batch):
                optimizer.zero_grad(set_to_none=True)
                losses["loss"].backward()
                optimizer.step()
            objective.after_step(batch)

    return run


def jacobian() -> Iterator[Case]:
    """A step of training with each estimator of the Jacobian's norm, four at a time: some act every second one."""
    eighth: dict[str, Any] = {"estimator": "input", "share": 1 / 8}
    ways: dict[str, dict[str, Any]] = {
        "projection": {},
        "exact": {"estimator": "exact"},
        "input, whole batch": {"estimator": "input"},
        "input, a quarter": {"estimator": "input", "share": 1 / 4},
        "input, an eighth": eighth,
        "input, an eighth, every 2": {**eighth, "every": 2},
        "input, a quarter, every 4": {"estimator": "input", "share": 1 / 4, "every": 4},
        "input, an eighth, difference": {**eighth, "derivative": "finite-difference"},
        "stacked, an eighth": {**eighth, "estimator": "stacked"},
        "stacked, an eighth, power": {**eighth, "estimator": "stacked", "power": True},
    }
    for name in ("lenet5", "lenet"):
        defenses: dict[str, Defense] = {"plain": Standard()} | {
            key: Jacobian(**settings) for key, settings in ways.items()
        }
        defenses["trades, 10 steps"] = Trades(eps=0.1)
        runs = {key: training(name, defense, steps=4) for key, defense in defenses.items()}
        yield Case(f"jacobian step, {name}", {"batch_size": BATCH}, runs, repeats=4)


def members() -> Iterator[Case]:
    """A step of five members against one's: in turn, on threads, and stacked by vmap."""
    for name, regularised in itertools.product(("lenet", "lenet5"), (False, True)):
        runs = {"one member": training(name, Jacobian() if regularised else Standard())}
        for way in ("loop", "threads", "stacked"):
            settings: dict[str, Any] = {"members": 5, "at_once": way, "watched": 0}
            runs[way] = training(name, (JacobianEnsemble if regularised else Ensemble)(**settings), 5)
        title = f"ensemble step, {name}, {'jacobian' if regularised else 'plain'}"
        yield Case(title, {"members": 5, "batch_size": BATCH}, runs)


def noise() -> Iterator[Case]:
    """Forward and backward of a network without noise modules, with them off, and with them drawing and learning."""
    images, labels = split(BATCH, 3, 32).take(slice(None))

    def step(model: nn.Module) -> None:
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()

    ways = {"plain": network("resnet20", size=32)}
    for name, sharing in (("off", "sample"), ("noise", "sample"), ("noise shared by the batch", "batch")):
        ways[name] = network("resnet20", size=32, noise=FeatureNoise(sharing=sharing))
    for module in injections(ways["off"]):
        module.enabled = False
    runs = {name: partial(step, model) for name, model in ways.items()}
    yield Case("noise step, resnet20", {"batch_size": BATCH}, runs)


def backwards(model: nn.Module, data: Split) -> None:
    """One forward and ten backwards of every image, by plain PyTorch."""
    for images, _ in data.batches(200):
        point = images.requires_grad_()
        logits = model(point)
        for k in range(10):
            torch.autograd.grad(logits[:, k].sum(), point, retain_graph=k < 9)


def spectrum() -> Iterator[Case]:
    """The stacked Jacobian's top eigenpair, beside as many backwards as exact Jacobians of all images need."""
    data = split(10_000, 3, 32)
    for name in ("lenet5", "resnet20"):
        model = network(name, size=32).eval().requires_grad_(False)
        runs: Runs = {
            "ten backwards": partial(backwards, model, data),
            "stacked spectrum": partial(stacked_spectrum, model, data),
        }
        yield Case(f"spectrum, {name}", {"images": len(data), "shape": [3, 32, 32]}, runs)


def pairs() -> Iterator[Case]:
    """The pair metrics of 1,000 pairs, beside the Jacobians of as many images."""
    model, data = network("lenet").eval(), split(1000)
    twice = data.subset(torch.arange(2000) % 1000)
    runs: Runs = {"ten backwards": partial(backwards, model, twice), "pair metrics": partial(pair_sharing, model, data)}
    yield Case("pairs, lenet", {"pairs": 1000}, runs)


def universal() -> Iterator[Case]:
    """A universal perturbation by ART's DeepFool at its defaults but one pass, and by one step of stochastic PGD."""
    from art.attacks.evasion import UniversalPerturbation
    from art.estimators.classification import PyTorchClassifier

    data, eps, images = gb.data.load("fashion-mnist"), 0.1, 200
    few = data.train.subset(torch.arange(10_000))
    small = Dataset(data.name, few, data.validation, data.test, data.classes)
    with seeded(0, "model"):
        model = gb.models.create("lenet", data)
    gb.train(model, small, Standard(), epochs=2, seed=0)
    wrapped = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), input_shape=(1, 28, 28), nb_classes=10, clip_values=(0, 1), device_type="cpu"
    )
    theirs = UniversalPerturbation(wrapped, attacker="deepfool", eps=eps, norm=np.inf, max_iter=1, verbose=False)
    ours = StochasticPGD(eps=eps, steps=1, batch_size=128, probe_starts=0, rel_step_size=1.0)
    runs: Runs = {
        "art": lambda: theirs.generate(few.take(slice(0, images))[0].numpy()),
        "gambeson, 1 step": lambda: ours.craft(model.eval(), small),
    }
    yield Case("universal, beside ART", {"eps": eps, "images": images}, runs)


def curve() -> Iterator[Case]:
    """Universal perturbations at five eps, each also from the one before: one eps after another, and together."""
    radii = [k / 255 for k in (2, 4, 6, 8, 10)]
    small: dict[str, Any] = {"steps": 10, "probe_start_steps": 3, "temperature": 1}
    for name, shape in (("lenet5", (1, 28)), ("resnet20", (3, 32))):
        model, whole = network(name, size=shape[1]).eval(), split(640, *shape)
        few = whole.subset(torch.arange(64))
        data = Dataset("random", whole.subset(torch.arange(64, 640)), few, few, few.classes)

        def separate(model: nn.Module = model, data: Dataset = data) -> None:
            start = None
            for eps in radii:
                start = StochasticPGD(eps=eps, **small).craft(model, data, start=start).delta

        runs: Runs = {
            "one after another": separate,
            "together": partial(StochasticPGD(eps=radii[0], **small).craft_curve, model, data, radii),
        }
        yield Case(f"universal curve, {name}", {"eps": radii, **small}, runs)


def growth() -> Iterator[Case]:
    """Attacks at three numbers of images and of steps, on an untrained network, so that nothing stops early."""
    model = network("lenet5").eval()
    x = split(256).take(slice(None))[0]
    with torch.no_grad():
        y = model(x).argmin(1)
    families: dict[str, Callable[[int], Any]] = {
        "pgd": lambda steps: PGD(eps=0.03, steps=steps, early_stop=False),
        "auto-pgd": lambda steps: AutoPGD(eps=0.03, steps=steps, early_stop=False),
        # A target that no image is told from the start: the budget is spent on all of them.
        "square": lambda steps: Square(eps=0.001, queries=steps, targeted=True),
    }
    for name, family in families.items():
        sizes = {f"{n} images": partial(family(20), model, x[:n], y[:n]) for n in (64, 128, 256)}
        yield Case(f"{name}, growth with images", {"steps": 20}, sizes)
        steps = {f"{n} steps": partial(family(n), model, x[:128], y[:128]) for n in (10, 20, 40)}
        yield Case(f"{name}, growth with steps", {"images": 128}, steps)


def installed(settings: BenchSettings) -> Iterator[tuple[str, Attack]]:
    """PGD of every peer that is installed."""
    for name, build in PEERS.items():
        try:
            yield name, build(settings)
        except ImportError as error:
            print(f"{name} is left out: {error}")


def main() -> None:
    """Time the cases that are asked for, and keep the others as they are stored."""
    cases = {"jacobian": jacobian, "ensemble": members, "noise": noise, "spectrum": spectrum, "pairs": pairs}
    cases |= {"universal": universal, "curve": curve, "growth": growth}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*cases, "attacks", "training", []], metavar="CASE")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "timings.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")

    def store(case: str, title: str, settings: dict[str, Any], timings: list[Any], repeats: int = 1) -> None:
        for one in timings:
            print(f"{title:34} {one.name:34} x {one.ratio:.2f}, processor x {one.cpu_ratio:.2f}", flush=True)
        rows = {one.name: one.plain() | {"seconds": one.seconds / repeats} for one in timings}
        about = made(f"python benchmarks/timings.py {case}", {"rounds": arguments.rounds, **settings})
        old = read_json(arguments.out) if arguments.out.is_file() else {}
        write_json(arguments.out, old | {title: {"about": about, "rows": rows}})

    for case in arguments.cases or [*cases, "attacks", "training"]:
        if case in cases:
            for title, settings, candidates, repeats in cases[case]():
                timings = side_by_side(candidates, next(iter(candidates)), arguments.rounds, title)
                store(case, title, settings, timings, repeats)
            continue
        bench = BenchSettings(rounds=arguments.rounds)
        if case == "attacks":
            timings = bench_attacks(bench, dict(installed(bench))).timings
        else:
            timings = bench_training(bench).timings
        store(case, case, bench.model_dump(exclude={"device", "rounds"}), timings)


if __name__ == "__main__":
    main()

"""What defences, attacks and audits cost, and how the cost grows: operations are counted, so that no load changes them.

``OMP_NUM_THREADS=1 python benchmarks/scaling.py [--rounds 3]`` stores ``results/scaling.json`` and writes the tables
of docs/scaling.md from it; ``--only`` without a name writes the tables alone.

Operations are those of convolutions and matrix products, forward and backward, on untrained networks. Every image is
one that its attack never breaks: labels are the network's own predictions, and eps is 1e-6. Processor seconds are
medians, relative to a plain step that is timed in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import gambeson as gb
from gambeson.attacks import FGSM, PGD, AutoPGD, Square, StochasticPGD
from gambeson.auditing import SUITES
from gambeson.auditing.cost import parts_of
from gambeson.base import environment, read_json, write_json
from gambeson.data import Dataset, Split
from gambeson.evaluation.attack_suite import run_suite, standard_suite
from gambeson.studies import Matrix, Study
from gambeson.studies.bench import operations
from gambeson.studies.matrix import Cell
from gambeson.studies.planning import makespan
from gambeson.training import Recipe, TrainRun
from gambeson.training.run import step_of
from gambeson.victim import Victim

OUT, PAGE = Path("results/scaling.json"), Path("docs/scaling.md")
DEFENSES: dict[str, dict[str, Any]] = {
    "standard": {"name": "standard"},
    "jacobian": {"name": "jacobian"},
    "ensemble-adversarial, no source": {"name": "ensemble-adversarial", "sources": [], "eps": 0.1},
    "ensemble-adversarial, two sources": {"name": "ensemble-adversarial", "sources": ["lenet5", "mnist-d"], "eps": 0.1},
    "shared-adversarial, s = 1": {"name": "shared-adversarial", "sharedness": 1, "eps": 0.1},
    "shared-adversarial, s = 8": {"name": "shared-adversarial", "sharedness": 8, "eps": 0.1},
    "shared-adversarial, s = 64": {"name": "shared-adversarial", "sharedness": 64, "eps": 0.1},
    "pgd-adversarial": {"name": "pgd-adversarial", "eps": 0.1},
    "trades": {"name": "trades", "eps": 0.1},
    "learn2perturb": {"name": "learn2perturb", "eps": 0.1},
    "pni": {"name": "pni", "eps": 0.1},
    **{f"ensemble, {m} members": {"name": "ensemble", "members": m} for m in (2, 5)},
    **{f"jacobian-ensemble, {m} members": {"name": "jacobian-ensemble", "members": m} for m in (1, 2, 3, 5)},
}
TINY = 1e-6
IMAGENET = {"images": 1_281_167, "epochs": 90}
CIFAR, PRICE = 45_000, 3.0
"""Training images of CIFAR-10 here; price of an hour of one accelerator, an assumption."""
PAPER = Path("studies/claims-paper.yaml")
GPU = Path("results/gpu-h100-2026-11-27-2.json")


def images(count: int, size: int, channels: int, classes: int) -> Dataset:
    """Random images; what they show changes no count."""
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(count, channels, size, size, generator=draw)
    split = Split("random images", x, torch.arange(count) % classes, classes=tuple(map(str, range(classes))))
    return Dataset("random images", split, split, split, classes=split.classes)


def step(data: Dataset, defense: dict[str, Any], batch: int, model: str = "lenet5") -> Callable[[], None]:
    """A training step."""
    recipe = Recipe(epochs=10, batch_size=batch)
    return step_of(TrainRun(data=data.name, model=model, defense=defense, recipe=recipe, device="cpu"), data)


def defenses(rounds: int) -> dict[str, Any]:
    """Operations and processor seconds of a step, relative to a plain one, on LeNet-5 and 28 x 28 images."""
    data = images(128, 28, 1, 10)
    plain = step(data, DEFENSES["standard"], 64)
    plain()
    least = operations(plain)
    found = {}
    for name, settings in DEFENSES.items():
        one = step(data, settings, 64)
        one()  # the first step also looks at what the model is
        counted, ratios = operations(one), []
        for _ in range(rounds):
            times = []
            for run in (plain, one):
                began = time.process_time()
                run()
                times.append(time.process_time() - began)
            ratios.append(times[1] / times[0])
        found[name] = {"operations": counted / least, "processor seconds": statistics.median(ratios)}
        print(name, found[name], flush=True)
    return {"an image in a plain step": least / 64, "rows": found}


def attacks() -> dict[str, Any]:
    """Images forward and gradients of images, per image that is never broken; of universal attacks, in all."""
    data = images(48, 28, 1, 10)
    model = gb.models.create("lenet5", data).eval()
    with torch.no_grad():
        last = [part for part in model.modules() if isinstance(part, torch.nn.Linear)][-1]
        last.bias.sub_(model(data.test.images).mean(0))  # so that not all are of one class
        labels = model(data.test.images).argmax(1)
    three = [
        Split("random images", data.test.images[k : k + 16], labels[k : k + 16], classes=data.classes)
        for k in (0, 16, 32)
    ]
    known = three[2]
    labelled = Dataset("random images", three[0], three[1], known, classes=data.classes)
    x, y = known.images, known.labels
    found: dict[str, Any] = {}
    singles: dict[str, Any] = {
        "fgsm": FGSM(eps=TINY),
        "pgd, 20 steps": PGD(eps=TINY, steps=20),
        "pgd, 40 steps, 2 restarts": PGD(eps=TINY, steps=40, restarts=2),
        "auto-pgd, 100 steps": AutoPGD(eps=TINY, steps=100),
        "square, 1,000 queries": Square(eps=TINY, queries=1000),
    }
    for name, attack in singles.items():
        with Victim(model) as victim:
            attack(victim, x, y)
            found[name] = [victim.forwards / len(x), victim.backwards / len(x)]
    with Victim(model, fast=True) as victim:
        run_suite(victim, known, standard_suite(eps=TINY, queries=1000))
        found["standard suite, 1,000 queries"] = [victim.forwards / len(x), victim.backwards / len(x)]
    whole = {}
    for name, universal in {
        "stochastic-pgd, 20 steps": StochasticPGD(eps=TINY, steps=20, probe_starts=0),
        "stochastic-pgd, 40 steps": StochasticPGD(eps=TINY, steps=40, probe_starts=0),
        "stochastic-pgd, 40 steps, 2 restarts": StochasticPGD(eps=TINY, steps=40, restarts=2, probe_starts=0),
    }.items():
        with Victim(model) as victim:
            universal.craft(victim, labelled)
            whole[name] = [victim.forwards, victim.backwards]
    return {"per image": found, "in all": whole, "images": len(x)}


def marginal(size: int, classes: int, defense: dict[str, Any], model: str) -> float:
    """Operations of one more image in a step: what a step does once, whatever its images, does not count."""
    few, more = 2, 4
    data = images(2 * more * max(1, classes // 8), size, 3, classes)
    counts = []
    for batch in (few, more):
        one = step(data, defense, batch, model)
        one()  # the first step also looks at what the model is
        counts.append(operations(one))
    return (counts[1] - counts[0]) / (more - few)


def growth() -> dict[str, Any]:
    """Operations of an image in a step relative to a plain one, against classes, image size, and steps of PGD."""
    found: dict[str, Any] = {"classes": {}, "size": {}, "steps": {}}
    plain = marginal(32, 10, DEFENSES["standard"], "resnet20")
    for steps in (1, 2, 4, 10):
        one = {"name": "pgd-adversarial", "eps": 0.1, "steps": steps}
        found["steps"][steps] = marginal(32, 10, one, "resnet20") / plain
    for classes in (10, 100, 1000):
        least = marginal(32, classes, DEFENSES["standard"], "lenet5")
        rows = {"jacobian, one projection": {"name": "jacobian"}, "pgd-adversarial": DEFENSES["pgd-adversarial"]}
        if classes <= 100:
            rows["jacobian, exact"] = {"name": "jacobian", "estimator": "exact"}
        found["classes"][classes] = {name: marginal(32, classes, one, "lenet5") / least for name, one in rows.items()}
    for size in (32, 64):
        least = marginal(size, 10, DEFENSES["standard"], "resnet20")
        found["size"][size] = {
            "an image in a plain step": least,
            **{
                name: marginal(size, 10, DEFENSES[name], "resnet20") / least for name in ("jacobian", "pgd-adversarial")
            },
        }
    return found


def audits() -> dict[str, Any]:
    """Bounds of the images forward and gradients of an audit of 10,000 test images, by suite and number of classes."""
    found = {}
    for name in ("quick", "standard"):
        for classes in (10, 100):
            one = images(classes * 2, 2, 3, classes).test
            big = Split(
                "random images", one.images.repeat(10_000 // len(one), 1, 1, 1), one.labels.repeat(10_000 // len(one)),
                classes=one.classes,
            )  # fmt: skip
            data = Dataset("random images", big, big, big, classes=big.classes)
            suite = SUITES[name].model_copy(update={"eps": (4 / 255, 8 / 255, 12 / 255), "surrogate": "none"})
            parts = parts_of(suite, data)
            found[f"{name}, {classes} classes"] = {
                "forwards": sum(part.forwards for part in parts),
                "gradients": sum(part.gradients for part in parts),
            }
    return found


def networks() -> dict[str, Any]:
    """Operations of an image forward, and in a plain step, of networks of the papers."""
    found = {}
    for name, size, classes in (("resnet20", 32, 10), ("resnet18", 32, 10), ("torchvision:resnet50", 224, 1000)):
        model = gb.models.create(name, in_channels=3, classes=classes, image_size=size).train()
        x = torch.rand(2, 3, size, size)
        ahead = operations(lambda model=model, x=x: model(x)) / 2  # type: ignore[misc]
        whole = operations(lambda model=model, x=x: model(x).logsumexp(1).sum().backward()) / 2  # type: ignore[misc]
        found[f"{name} at {size} x {size}"] = {"forward": ahead, "plain step": whole}
    return found


def machines(rows: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Time of the trainings and searches of claims-paper on several devices, in epochs of plain training."""

    def ratio(settings: dict[str, Any]) -> float:
        name = settings["name"]
        kept = {key: settings[key] for key in ("sharedness", "members") if key in settings}
        return next(
            row["operations"]
            for label, row in rows.items()
            if DEFENSES[label]["name"] == name
            and all(DEFENSES[label].get(key, value) == value for key, value in kept.items())
            and (name != "ensemble-adversarial" or bool(DEFENSES[label]["sources"]) == bool(settings["sources"]))
        )

    def epochs(cell: Cell) -> float:
        if cell.kind not in ("train", "search"):
            return 0.0
        run = cell.settings["run"]
        if cell.kind == "search":
            asked, images = cell.settings["search"], cell.settings["data"]["train"] / CIFAR
            candidates = len(asked["lr"]) * len(asked["warmup"])
            return ratio(run["defense"]) * run["recipe"]["epochs"] * asked["share"] * candidates * images
        if "epochs of" in cell.settings:
            return ratio(cell.needs[-1].settings["run"]["defense"]) * cell.settings["epochs of"]
        return ratio(run["defense"]) * run["recipe"]["epochs"]

    cells = [cell for cell in Matrix(Study.load(PAPER)).cells if cell.kind != "lengths"]
    return {
        "trainings": sum(cell.kind == "train" for cell in cells),
        "searches": sum(cell.kind == "search" for cell in cells),
        "epochs": {count: makespan(cells, epochs, count) for count in (1, 8, 64, 512)},
    }


def rates() -> dict[str, float]:
    """Operations per second of one accelerator, as an earlier visit measured them."""
    lines = read_json(GPU)["lines"]
    steps = {
        line["name"]: line["flops"] for line in lines if line.get("bench") == "training" and line["batch_size"] == 512
    }
    tries = {
        line["name"]: line["flops"] for line in lines if line.get("bench") == "attacks" and line["batch_size"] == 512
    }
    return {
        "plain step": steps["standard"],
        "adversarial step": steps["pgd-adversarial"],
        "adversarial step, bfloat16 crafting": steps["pgd-adversarial, bfloat16 crafting"],
        "attack": tries["gambeson"],
        "attack, bfloat16": tries["gambeson, bfloat16"],
    }


SECTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "attacks": attacks, "growth": growth, "audits": audits, "networks": networks, "rates": rates,
}  # fmt: skip


def hours(count: float, rate: float) -> float:
    """Hours of one accelerator."""
    return count / rate / 3600


def amount(value: float) -> str:
    """A number with three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def grid(heads: list[str], lines: list[list[Any]]) -> str:
    """A table in Markdown."""
    rows = [[cell if isinstance(cell, str) else amount(cell) for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *rows]) + "\n"


def tables(found: dict[str, Any]) -> dict[str, str]:
    """The tables of the page, by the names of their markers."""
    rows, rate, nets = found["defenses"]["rows"], found["rates"], found["networks"]
    grown, big = found["growth"], nets["torchvision:resnet50 at 224 x 224"]
    classes, sizes = grown["classes"], grown["size"]
    projected = list(next(iter(classes.values())))
    imagenet = []
    for steps, factor in (("none", 1.0), *grown["steps"].items()):
        work = big["plain step"] * factor * IMAGENET["images"] * IMAGENET["epochs"]
        speeds = ("plain step",) * 2 if steps == "none" else ("adversarial step", "adversarial step, bfloat16 crafting")
        spent = [hours(work, rate[speed]) for speed in speeds]
        imagenet.append([steps, factor, work / 1e18, spent[0], spent[1], PRICE * spent[0]])
    fleet = []
    for name in ("quick", "standard"):
        asked = found["audits"][f"{name}, 10 classes"]
        ahead = nets["resnet18 at 32 x 32"]["forward"]
        work = 1000 * ahead * (asked["forwards"] + 2 * asked["gradients"])
        spent = [hours(work, rate[speed]) for speed in ("attack", "attack, bfloat16")]
        fleet.append([name, asked["forwards"], asked["gradients"], spent[0], spent[1], PRICE * spent[0]])
    plain = found["machines"]["epochs"]["1"]
    machine_rows = sorted(found["machines"]["epochs"].items(), key=lambda one: int(one[0]))
    return {
        "defences": grid(
            ["defence", "operations of a step", "processor seconds of a step"],
            [[name, rows[name]["operations"], rows[name]["processor seconds"]] for name in DEFENSES],
        ),
        "attacks": grid(
            ["attack", "forwards per image", "of which with a gradient"],
            [[name, *counts] for name, counts in found["attacks"]["per image"].items()],
        ),
        "universal": grid(
            ["attack", "images forward", "of which with a gradient"],
            [[name, *counts] for name, counts in found["attacks"]["in all"].items()],
        ),
        "classes": grid(
            ["classes", *projected],
            [[count, *(row.get(name, "–") for name in projected)] for count, row in classes.items()],
        ),
        "sizes": grid(
            ["side", "operations of an image in a plain step, in millions", "jacobian", "pgd-adversarial"],
            [
                [side, row["an image in a plain step"] / 1e6, row["jacobian"], row["pgd-adversarial"]]
                for side, row in sizes.items()
            ],
        ),
        "machines": grid(
            ["devices", "epochs of plain training", "share of perfect"],
            [[count, row, plain / int(count) / row] for count, row in machine_rows],
        ),
        "imagenet": grid(
            ["steps of PGD", "relative to plain", "operations, in 10^18", "hours, float32", "hours, bfloat16 crafting",
             "price, float32"],
            imagenet,
        ),
        "fleet": grid(
            ["suite", "images forward", "gradients", "hours, float32", "hours, bfloat16", "price, float32"], fleet
        ),
    }  # fmt: skip


def page(text: str, found: dict[str, Any]) -> str:
    """Return the page with the tables of a result."""
    for name, table in tables(found).items():
        start, end = f"<!-- {name} table -->\n", f"<!-- /{name} table -->"
        before, after = text.split(start)[0], text.split(end)[1]
        text = f"{before}{start}\n{table}\n{end}{after}"
    return text


def main() -> None:
    """Count, store, and say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=["defenses", *SECTIONS, "machines"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.only:
        with gb.base.seeded(0, "scaling", name):
            if name == "machines":
                found = machines(read_json(OUT)["defenses"]["rows"])
            else:
                found = defenses(arguments.rounds) if name == "defenses" else SECTIONS[name]()
        known = read_json(OUT) if OUT.is_file() else {}
        write_json(OUT, known | {name: found, "environment": environment()})
        print(name, json.dumps(found)[:400], flush=True)
    PAGE.write_text(page(PAGE.read_text(), read_json(OUT)))


if __name__ == "__main__":
    main()

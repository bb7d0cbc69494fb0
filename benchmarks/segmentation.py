"""Shared adversarial training on label maps: ``python benchmarks/segmentation.py [--device cuda]``.

Scenes of Fashion-MNIST garments at 64 x 64 pixels and a small U-Net. A hardened network goes on from the standard one
of its seed, as the paper's low learning rate suggests. A cell is one network: its clean pixel accuracy and mean IoU on
test; at each eps the universal perturbation without a target (pixel error and mean IoU), towards the true label map of
each of two validation images that items cover in large part, and one that hides a class, with controls at one eps;
the eps needed for the same success; and of the weakest successful perturbation how visible it is, and how much of its
target scene it shows. Everything is crafted on train, chosen on validation and reported on test. A cell is stored as
its parts are done, and the same command goes on from there; ``--only NAME`` picks defences, for several processes;
``--show`` joins the cells, draws the picture and prints the table.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import make_grid

import gambeson as gb
from gambeson.attacks import CONTROLS, StochasticPGD, UniversalPerturbation
from gambeson.base import environment, generator, read_json, write_json
from gambeson.defenses import Defense, create
from gambeson.evaluation import accuracy, edge_correlation, mean_iou, target_success, universal_evasion, visibility
from gambeson.report.scenes import colour
from gambeson.training.recipe import PRESETS, Recipe
from gambeson.victim import as_victim, predict

FOLDER, RESULTS, PICTURE = Path("runs/segmentation"), Path("results/segmentation.json"), Path("docs/segmentation.png")
DATA, MODEL = "fashion-scenes?train=20000", "unet-small"
EPS = tuple(k / 255 for k in (2, 4, 8, 16, 32))
SHOWN = 16 / 255
"""Where controls are scored."""
TARGETS = ("static:1", "static:9", "hide:Trouser")
"""Validation images whose labelled pixels items cover by 40 % or more; a class that all networks know well."""
LEVEL = 0.8
"""The success that the eps of different networks are compared at: share of pixels that take the target's class."""
CRAFT: dict[str, Any] = {"probe_starts": 0, "steps": 300, "batch_size": 16}
"""One run of 4,800 gradients per perturbation, so that a network is measured in minutes on a CPU."""
OTHERS = 100
"""Maps of other scenes that a perturbation is held against."""
FAST: dict[str, Any] = {"channels_last": True, "precision": "bfloat16"}
RECIPE = Recipe(**PRESETS["segmentation"] | FAST | {"epochs": 16})
HARDENING = Recipe(**PRESETS["segmentation"] | FAST | {"epochs": 3, "lr": 0.002, "warmup": 0.1})
STANDARD = "standard"
DEFENSES: dict[str, Defense] = {
    STANDARD: create("standard"),
    **{
        f"shared, s = {s}, eps {k}/255": create(
            "shared-adversarial", eps=k / 255, sharedness=s, craft_precision="bfloat16"
        )
        for s, k in ((4, 1), (4, 2), (4, 4), (1, 4))
    },
}


def load() -> gb.data.Dataset:
    """The scenes."""
    return gb.data.load(DATA)


def cells(seeds: int) -> list[tuple[str, int]]:
    """Defences and seeds; every defence once before any twice."""
    return [(name, seed) for seed in range(seeds) for name in DEFENSES]


def place(name: str, seed: int) -> Path:
    """Return the folder of a cell."""
    return FOLDER / f"{name.replace('/', ' of ')}, seed {seed}"


def cell(name: str, seed: int, data: gb.data.Dataset, device: str, epochs: int | None) -> None:
    """Train one network and measure it, part by part."""
    folder = place(name, seed)
    file, weights = folder / "cell.json", folder / "model.safetensors"
    found: dict[str, Any] = read_json(file) if file.is_file() else {"defense": name, "seed": seed}
    recipe = RECIPE if name == STANDARD else HARDENING
    recipe = recipe if epochs is None else recipe.model_copy(update={"epochs": epochs})

    def keep(part: str, value: Any) -> None:
        found[part] = value
        found["environment"] = environment(torch.device(device))
        write_json(file, found)
        print(f"{time.strftime('%H:%M:%S')} {name}, seed {seed}: {part}", flush=True)

    model = gb.models.create(MODEL, data, seed=seed).to(device)
    if "seconds" in found and weights.is_file():
        model = gb.models.load(weights).to(device)
    else:
        if name != STANDARD:
            model = gb.models.load(place(STANDARD, seed) / weights.name).to(device)
        began, spent = time.perf_counter(), time.process_time()
        gb.train(model, data, DEFENSES[name], recipe=recipe, seed=seed)
        gb.models.save(model, weights)
        found |= {"settings": DEFENSES[name].plain(), "recipe": recipe.plain()}
        found["processor seconds"] = time.process_time() - spent
        keep("seconds", time.perf_counter() - began)
    if "clean" not in found:
        clean = {"accuracy": accuracy(model, data).plain(), "mean_iou": mean_iou(model, data).plain()}
        keep("clean", clean)
    for target in (*TARGETS, None):
        curve = found.get(str(target), {})
        files = {eps: folder / f"{str(target).replace(':', ' ')} {eps:.4g}.safetensors" for eps in EPS}
        for eps in EPS:
            if f"{eps:.4g}" not in curve or not files[eps].is_file():
                # One map for every network: the true one of a validation image, not each network's prediction of it.
                settings = {"labels": "truth"} if (target or "").startswith("static") else {}
                uap = StochasticPGD(eps=eps, target=target, **CRAFT, **settings).craft(model, data, seed=seed)
                uap.save(files[eps])
                curve[f"{eps:.4g}"] = scored(model, data, uap)
                keep(str(target), curve)
        if target is not None and target.startswith("static") and "shown" not in curve:
            curve["shown"] = shown(data, curve, files)
            keep(str(target), curve)


def scored(model: torch.nn.Module, data: gb.data.Dataset, uap: UniversalPerturbation) -> dict[str, Any]:
    """Return what a perturbation reaches on test, with its controls at one eps."""
    kept: dict[str, Any] = {
        "pixel error": universal_evasion(model, data, uap).plain(),
        "mean_iou": mean_iou(model, data, uap).plain(),
    }
    if uap.target is not None:
        controls = tuple(CONTROLS) if math.isclose(uap.about.eps, SHOWN) else ()
        kept["target"] = target_success(model, data, uap, controls=controls).plain()
    return kept


def shown(data: gb.data.Dataset, curve: dict[str, Any], files: dict[float, Path]) -> dict[str, Any]:
    """Return how visible the weakest successful perturbation is (or the largest), and what it shows of its target."""
    reached = [eps for eps in EPS if curve[f"{eps:.4g}"]["target"]["success"]["value"] >= LEVEL]
    uap = UniversalPerturbation.load(files[reached[0] if reached else EPS[-1]])
    if uap.target is None or uap.target.map is None:
        raise AssertionError("a static target has a map")
    rows = torch.randperm(len(data.test), generator=generator(0, "other maps"))[:OTHERS]
    others = data.test.subset(rows).take(slice(None))[1].cpu()
    found = edge_correlation(uap.delta, uap.target.map, others)
    return {
        "eps": uap.about.eps,
        "succeeds": bool(reached),
        "visibility": visibility(uap, data).plain(),
        "edges": found.plain() | {"excess": found.excess, "p": found.p},
    }


def draw(rows: list[dict[str, Any]], data: gb.data.Dataset, target: str = TARGETS[0]) -> None:
    """Draw one scene per network of seed 0, under its weakest successful perturbation towards one target.

    Columns: image, truth, clean prediction, target, perturbation at full range, perturbed image, prediction.
    """
    tiles = []
    for row in rows:
        if row["seed"] or "shown" not in row.get(target, {}):
            continue
        folder = place(row["defense"], 0)
        eps = row[target]["shown"]["eps"]
        uap = UniversalPerturbation.load(folder / f"{target.replace(':', ' ')} {eps:.4g}.safetensors")
        scene = data.test.subset([7])
        images, labels = scene.take(slice(None))
        with as_victim(gb.models.load(folder / "model.safetensors")) as victim:
            clean, moved = predict(victim, scene), predict(victim, scene, uap.delta)
        if uap.target is None or uap.target.map is None:
            raise AssertionError("a static target has a map")
        pattern = (uap.delta[0] / eps + 1) / 2
        maps = [painted(one) for one in (labels[0], clean[0], uap.target.map, moved[0])]
        tiles += [images[0], maps[0], maps[1], maps[2], pattern, uap.apply(images)[0], maps[3]]
    if tiles:
        grid = make_grid([tile.cpu() for tile in tiles], nrow=7, padding=2, pad_value=1)
        to_pil_image(grid.repeat_interleave(2, 1).repeat_interleave(2, 2)).save(PICTURE, optimize=True)


def painted(values: torch.Tensor) -> torch.Tensor:
    """Return a label map (H, W) as a picture (3, H, W); what has no label is white."""
    table = torch.ones(257, 3)
    for k in range(int(values[values < 255].max()) + 1):
        table[k] = torch.tensor([int(colour(k)[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return table[values.cpu().where(values.cpu() >= 0, 256)].permute(2, 0, 1)


def needed(curve: dict[str, Any], level: float = LEVEL) -> float:
    """Return the eps at which the success reaches a level, linear in log eps; infinite if it does not."""
    rates = [curve[f"{eps:.4g}"]["target"]["success"]["value"] for eps in EPS]
    if rates[0] >= level:
        return EPS[0]
    for k in range(1, len(EPS)):
        if rates[k] >= level:
            share = (level - rates[k - 1]) / (rates[k] - rates[k - 1])
            return math.exp(math.log(EPS[k - 1]) + share * math.log(EPS[k] / EPS[k - 1]))
    return math.inf


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return for each defence what the cells so far say, with intervals over seeds and static targets.

    Ratios compare a hardened network with the standard one of its seed, target by target. One whose success never
    reaches the level counts with the largest eps, so that its ratio is a lower bound; ``censored`` counts them.
    """
    by = {(row["defense"], row["seed"]): row for row in rows}
    found: dict[str, dict[str, Any]] = {}
    for name in DEFENSES:
        seeds = [seed for kind, seed in by if kind == name and "shown" in by[kind, seed].get(TARGETS[-2], {})]
        if not seeds:
            continue
        pairs = [(seed, target) for seed in seeds for target in TARGETS if target.startswith("static")]
        shown = [by[name, seed][target]["shown"] for seed, target in pairs]
        radii = [needed(by[name, seed][target]) for seed, target in pairs]
        ious = [by[name, seed]["clean"]["mean_iou"]["value"] for seed in seeds]
        found[name] = {
            "seeds": len(seeds),
            "clean mean IoU": interval(ious),
            "eps for the same success": interval([min(eps, EPS[-1]) for eps in radii]),
            "censored": sum(math.isinf(eps) for eps in radii),
            "edges shown": interval([one["edges"]["value"] for one in shown]),
            "edges shown above other scenes": interval([one["edges"]["excess"] for one in shown]),
            "p of the edges": [one["edges"]["p"] for one in shown],
            "rms of the perturbation": interval([one["visibility"]["rms"] for one in shown]),
            "SSIM": interval([one["visibility"]["ssim"] for one in shown]),
        }
        if name != STANDARD and all((STANDARD, seed) in by for seed in seeds):
            plain = [needed(by[STANDARD, seed][target]) for seed, target in pairs]
            logs = [math.log(min(own, EPS[-1]) / min(eps, EPS[-1])) for own, eps in zip(radii, plain, strict=True)]
            found[name]["ratio of eps"] = {key: math.exp(value) for key, value in interval(logs).items()}
            lost = [
                by[STANDARD, seed]["clean"]["mean_iou"]["value"] - iou for seed, iou in zip(seeds, ious, strict=True)
            ]
            found[name]["clean mean IoU lost"] = interval(lost)
    return found


def interval(values: list[float]) -> dict[str, float]:
    """Return the mean with its 95 % percentile bootstrap interval, over the values."""
    numbers = torch.tensor(values, dtype=torch.float64)
    picks = torch.randint(len(values), (10_000, len(values)), generator=generator(0, "bootstrap"))
    means = numbers[picks].mean(1)
    low, high = (float(means.quantile(share)) for share in (0.025, 0.975))
    return {"mean": float(numbers.mean()), "low": low, "high": high}


def main() -> None:
    """Measure what is missing, join the cells, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--only", help="defences whose name holds this; hardening needs the standard network first")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no cell after so many")
    parser.add_argument("--show", action="store_true", help="only join, draw and print what is stored")
    given = parser.parse_args()
    end = time.monotonic() + 60 * given.minutes
    if not given.show:
        data = load()
        for name, seed in cells(given.seeds):
            if (given.only is None or given.only in name) and time.monotonic() < end:
                cell(name, seed, data, given.device, given.epochs)
    rows = [read_json(file) for file in sorted(FOLDER.glob("*/cell.json"))]
    if given.show:
        settings = {"data": DATA, "model": MODEL, "level": LEVEL, "attack": StochasticPGD(eps=SHOWN, **CRAFT).plain()}
        write_json(RESULTS, {"settings": settings, "summary": summary(rows), "cells": rows})
        draw(rows, load())
    for name, numbers in summary(rows).items():
        print(name)
        for what, value in numbers.items():
            said = "{mean:.4f} [{low:.4f}, {high:.4f}]".format(**value) if isinstance(value, dict) else value
            print(f"    {what}: {said}")


if __name__ == "__main__":
    main()

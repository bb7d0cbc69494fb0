"""Does what inputs share of their slopes go with what one pattern does to them? ``python benchmarks/sharing.py``.

Claims J1, J3 and J4 of Jacobian regularisation (Co et al. 2021): LeNet-5 on two data sets, trained with six strengths
of the paper's regulariser and three seeds each. Every model: mean pair metric (cos_F, named in advance as the primary
one, beside three others), sharing factor, top singular value of the margin-weighted stack, mean Jacobian norm; UER of
stochastic PGD on test at three eps. Correlations over the models of each data set with bootstrap intervals, and once
more with the norm taken out, for the strength moves both. A model is stored when it is done: the command goes on.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch

import gambeson as gb
from gambeson import analysis
from gambeson.attacks import StochasticPGD
from gambeson.base import environment, read_json, seeded, write_json
from gambeson.data import Dataset
from gambeson.training import Recipe

STRENGTHS, SEEDS, RADII = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1), (0, 1, 2), (0.05, 0.1, 0.2)
SETS = {"mnist5k": (3500, Recipe(epochs=8, lr=0.05)), "fashion-mnist": (10_000, Recipe(epochs=4, lr=0.05))}
IMAGES, PAIRS = 500, 1000
METRICS: tuple[analysis.PairMetric, ...] = ("cos_F", "ratio_s", "rank1", "cka")


def load(name: str) -> Dataset:
    """The data set with as many training images as the study uses."""
    data, count = gb.data.load(name), SETS[name][0]
    return Dataset(name, data.train.subset(torch.arange(count)), data.validation, data.test, data.classes)


def measure(data: Dataset, strength: float, seed: int) -> dict[str, Any]:
    """Train one model and measure it."""
    with seeded(seed, "model"):
        model = gb.models.create("lenet5", data)
    defense = gb.defenses.create("jacobian", strength=strength) if strength else gb.defenses.create("standard")
    gb.train(model, data, defense, recipe=SETS[data.name][1], seed=seed)
    few = data.test.subset(torch.arange(IMAGES))
    pairs = analysis.pair_sharing(model, few, pairs=PAIRS, seed=0)
    norms = analysis.jacobian_norms(model, few)
    found: dict[str, Any] = {
        "data": data.name,
        "strength": strength,
        "seed": seed,
        "accuracy": gb.evaluation.accuracy(model, data).plain(),
        "validation accuracy": gb.evaluation.accuracy(model, data.validation).value,
        "norm": norms.frobenius.mean,
        "sharing factor": analysis.sharing_factor(model, few),
        "weighted sigma": math.sqrt(float(analysis.stacked_spectrum(model, few, weighting="margin").values[0])),
    }
    for metric in METRICS:
        spread = pairs.spread(metric)
        found[metric] = None if spread is None else spread.mean
    for eps in RADII:
        uap = StochasticPGD(eps=eps).craft(model, data, seed=seed)
        found[f"validation uer {eps}"] = max(rate for _, rate in uap.about.restarts)
        found[f"uer {eps}"] = gb.evaluation.universal_evasion(model, data, uap).plain()
    return found


def correlations(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Correlate every metric with the UERs over the models of each data set."""
    found: dict[str, Any] = {}
    for name in SETS:
        own = [row for row in rows if row["data"] == name]
        if len(own) < 4:
            continue
        norm = [math.log(row["norm"]) for row in own]
        for metric in (*METRICS, "sharing factor", "weighted sigma", "norm"):
            values = [math.log(row[metric]) if "sigma" in metric or metric == "norm" else row[metric] for row in own]
            for eps in RADII:
                uers = [row[f"uer {eps}"]["value"] for row in own]
                control = None if metric == "norm" else norm
                found.setdefault(name, {}).setdefault(metric, {})[str(eps)] = analysis.correlate(
                    values, uers, control
                ).plain()
    return found


def gains(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Claim J1: what the regulariser gains at the best strength that costs at most a point of clean accuracy.

    Both are judged on validation. ``ratio`` is the UER without over that with it, on test; ``accuracy ratio`` the
    accuracy under the perturbation with it over that without.
    """
    found: dict[str, Any] = {}
    for name in SETS:
        for seed in SEEDS:
            own = {row["strength"]: row for row in rows if (row["data"], row["seed"]) == (name, seed)}
            if 0.0 not in own:
                continue
            floor = own[0.0]["validation accuracy"] - 0.01
            kept = {key: row for key, row in own.items() if key and row["validation accuracy"] >= floor}
            for eps in RADII:
                key = f"uer {eps}"
                best = min(kept, key=lambda strength: kept[strength][f"validation {key}"], default=None)
                if best is not None:
                    without, kept_uer = own[0.0][key]["value"], kept[best][key]["value"]
                    found[f"{name}, seed {seed}, eps {eps}"] = {
                        "strength": best,
                        "ratio": without / kept_uer,
                        "accuracy ratio": (1 - kept_uer) / (1 - without),
                    }
    return found


def main() -> None:
    """Measure what is missing, store, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/sharing.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = read_json(arguments.out)["rows"] if arguments.out.is_file() else []
    for seed in SEEDS:
        for name in SETS:
            data = load(name)
            for strength in STRENGTHS:
                if any((row["data"], row["strength"], row["seed"]) == (name, strength, seed) for row in rows):
                    continue
                rows.append(measure(data, strength, seed))
                settings = {"images": IMAGES, "pairs": PAIRS, "sets": {k: r.plain() for k, (_, r) in SETS.items()}}
                content = {"settings": settings, "rows": rows, "correlations": correlations(rows)}
                write_json(arguments.out, content | {"gains": gains(rows), "environment": environment()})
                print({k: v for k, v in rows[-1].items() if not k.startswith("uer")}, flush=True)
    for name, metrics in correlations(rows).items():
        for metric, cells in metrics.items():
            for eps, cell in cells.items():
                partial = "" if cell["partial"] is None else f", norm taken out {cell['partial']['value']:.2f}"
                low, high = cell["spearman"]["low"], cell["spearman"]["high"]
                print(f"{name} {metric} eps {eps}: {cell['spearman']['value']:.2f} [{low:.2f}, {high:.2f}]{partial}")
    for name, gain in gains(rows).items():
        print(f"{name}: UER falls to 1/{gain['ratio']:.2f} at strength {gain['strength']}")


if __name__ == "__main__":
    main()

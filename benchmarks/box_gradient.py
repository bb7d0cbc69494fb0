"""Stochastic PGD with the clip differentiated exactly or straight through, on the quickstart's standard net.

``python benchmarks/box_gradient.py`` after ``make quickstart``; equal steps, three seeds, UER on the test split.
"""

from __future__ import annotations

from pathlib import Path

import gambeson as gb
from gambeson.base import environment, write_json

SEEDS, RADII = (0, 1, 2), (0.1, 0.2, 0.25)


def main() -> None:
    """Craft, score, store."""
    data = gb.data.load("mnist5k")
    model = gb.models.load(Path("runs/quickstart/standard"))
    rows = []
    for eps in RADII:
        for kind in ("exact", "straight-through"):
            attack = gb.attacks.StochasticPGD(
                eps=eps, steps=100, restarts=2, batch_size=128, probe_starts=0, box_gradient=kind
            )
            rates = [
                gb.evaluation.universal_evasion(model, data, attack.craft(model, data, seed=seed)) for seed in SEEDS
            ]
            rows.append({"eps": eps, "box_gradient": kind, "uer": [rate.plain() for rate in rates]})
            print(f"eps {eps:g} {kind:17} {'   '.join(map(str, rates))}", flush=True)
    content = {"seeds": SEEDS, "steps": 100, "restarts": 2, "rows": rows, "environment": environment()}
    write_json(Path("results/box-gradient.json"), content)


if __name__ == "__main__":
    main()

"""Universal patches beside their controls: ``python benchmarks/patch.py [--show]``.

LeNet-5 on 10,000 images of Fashion-MNIST, three seeds. Of each network the error under one patch of 5 % of the area,
crafted on train, chosen on validation and scored on 2,000 test images at fresh places: at any place; in a corner;
scaled and turned as well; and with a target. Beside each stand controls of the same mask at the same places. Of the
first seed also every place, scale and angle, and the picture of the docs. A row is stored when it is done, and the same
command goes on from there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from stored import RESULTS, Rows, load

import gambeson as gb
from gambeson.attacks import AdversarialPatch, UniversalPatch
from gambeson.base import pixel_bytes
from gambeson.evaluation import Rate, by_placement
from gambeson.evaluation.placement import PlacedRate
from gambeson.tasks import Difference

FILE, PICTURE, COMMAND = "patch.json", Path("docs/patch.png"), "python benchmarks/patch.py"
SEEDS, AREA, TRAIN, TEST, EPOCHS = 3, 0.05, 10_000, 2_000, 8
TURNED: dict[str, Any] = {"scale": (0.8, 1.2), "rotation": 20}
CASES: dict[str, dict[str, Any]] = {
    "any place": {},
    "a corner": {"place": "corner"},
    "any place, scale 0.8 to 1.2, turned by up to 20 degrees": TURNED,
    "any place, target Bag": {"target": "class:Bag"},
}
DETAILED = "any place, scale 0.8 to 1.2, turned by up to 20 degrees"
"""The case whose placements are measured one by one."""
SETTINGS: dict[str, Any] = {
    "data": f"fashion-mnist, {TRAIN} training and {TEST} test images",
    "model": f"lenet5, {EPOCHS} epochs, learning rate 0.05, batches of 64",
    "area": AREA,
    "seeds": SEEDS,
    "attack": UniversalPatch(area=AREA).plain(),
    "cases": {name: UniversalPatch(**{"area": AREA} | case).plain() for name, case in CASES.items()},
}


def main() -> None:
    """Measure what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="print the table of what is stored")
    if parser.parse_args().show:
        print(table(load(FILE)))
        return
    whole = gb.data.load("fashion-mnist")
    parts = whole.train.sample(TRAIN, seed=0), whole.validation, whole.test.sample(TEST, seed=0)
    data = gb.data.Dataset(whole.name, *parts, whole.classes)
    rows = Rows(RESULTS / FILE, COMMAND, SETTINGS)
    for seed in range(SEEDS):
        if not rows.missing(f"{name}, seed {seed}" for name in CASES):
            continue
        torch.manual_seed(seed)
        model = gb.models.create("lenet5", data)
        gb.train(model, data, gb.defenses.Standard(), epochs=EPOCHS, lr=0.05, batch_size=64, seed=seed)
        for name, case in CASES.items():
            if rows.missing([f"{name}, seed {seed}"]):
                rows.add(f"{name}, seed {seed}", measured(model, data, name, case, seed))
    print(table(load(FILE)))


def measured(model: torch.nn.Module, data: gb.data.Dataset, name: str, case: dict[str, Any], seed: int) -> Any:
    """Craft one patch and score it, beside its controls."""
    patch = UniversalPatch(**{"area": AREA} | case).craft(model, data, seed=seed)
    assert isinstance(patch, AdversarialPatch)
    detailed = name == DETAILED and seed == 0
    few: dict[str, Any] = {} if detailed else {"grid": 1, "scales": (), "rotations": ()}
    found = by_placement(model, data, patch, seed=seed + 100, **few)
    row = {"case": name, "seed": seed, "pixels": int(patch.mask.sum()), "backwards": patch.about.backwards}
    row |= {"clean": found.clean.plain(), "whole": found.whole.plain()}
    if detailed:
        row["placements"] = found.plain()
        picture(patch, data)
    return row


def picture(patch: AdversarialPatch, data: gb.data.Dataset) -> None:
    """Draw the patch, and test images with it, four times as large."""
    shown = patch.apply(data.test.sample(9, seed=0).take(slice(None))[0], seed=100)
    own = torch.full((1, *patch.shape[1:]), 0.5)
    height, width = patch.mask.shape[2:]
    top, left = (own.shape[1] - height) // 2, (own.shape[2] - width) // 2
    own[:, top : top + height, left : left + width] = patch.pattern[0]
    gap = torch.ones(1, own.shape[1], 3)
    line = torch.cat([part for one in (own, *shown) for part in (one, gap)][:-1], 2)
    image = Image.fromarray(pixel_bytes(line)[0].numpy(), "L")
    image.resize((4 * image.width, 4 * image.height), Image.Resampling.NEAREST).save(PICTURE, optimize=True)


def table(stored: dict[str, Any]) -> str:
    """Return one line per case: the range over seeds of the rate and of its strongest control, and the paired lead."""
    lines = [
        "| Patch | pixels | with the patch | strongest control | lead over it, by network | clean images |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in CASES:
        rows = [row for row in stored["rows"].values() if row["case"] == name]
        if not rows:
            continue
        whole = [PlacedRate(**row["whole"]) for row in rows]
        own = [100 * one.rate.value for one in whole]
        beside = [100 * one.control.value for one in whole if one.control is not None]
        leads = ", ".join(_lead(one.lead) for one in whole if one.lead is not None)
        clean = [100 * Rate(**row["clean"]).value for row in rows]
        lines.append(f"| {name} | {rows[0]['pixels']} | {_span(own)} | {_span(beside)} | {leads} | {_span(clean)} |")
    return "\n".join(lines)


def _lead(lead: Difference) -> str:
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * end for end in (lead.value, lead.low, lead.high)))


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return f"{low} %" if low == high else f"{low} to {high} %"


if __name__ == "__main__":
    main()

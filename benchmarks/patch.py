"""Universal patches beside their controls: ``python benchmarks/patch.py [--show]``.

LeNet-5 on 10,000 images of Fashion-MNIST, three seeds. Of each network the error under one patch of 5 % of the area,
crafted on train, chosen on validation and scored on 2,000 test images at fresh places: at any place; in a corner;
scaled and turned as well; and with a target. Beside each stand controls of the same mask at the same places. Of the
first seed also every place, scale and angle, and the picture of the docs. A row is stored when it is done, and the same
command goes on from there.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from stored import RESULTS, Rows, load

import gambeson as gb
from gambeson.attacks import PATCH_CONTROLS, AdversarialPatch, UniversalPatch
from gambeson.base import pixel_bytes
from gambeson.evaluation import Rate, accuracy, by_placement, rates_beside, target_success, universal_evasion
from gambeson.evaluation.rates import strongest_control

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
    row = {"case": name, "seed": seed, "pixels": int(patch.mask.sum()), "backwards": patch.about.backwards}
    if patch.target is not None:
        found = target_success(model, data, patch, seed=seed + 100, controls=PATCH_CONTROLS)
        return row | {"target": found.plain()}
    clean = accuracy(model, data.test).complement
    uer = universal_evasion(model, data, patch, seed=seed + 100)
    controls = rates_beside(model, data, patch, seed=seed + 100)
    row |= {"clean": clean.plain(), "uer": uer.plain(), "controls": [one.plain() for one in controls]}
    if name == DETAILED and seed == 0:
        row["placements"] = by_placement(model, data, patch, seed=seed + 100).plain()
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
    """Return one line per case: the range over seeds of the rate, and of its strongest control."""
    lines = [
        "| Patch | pixels | with the patch | strongest control | clean images |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in CASES:
        rows = [row for row in stored["rows"].values() if row["case"] == name]
        if not rows:
            continue
        own = [Rate(**(row["target"]["success"] if "target" in row else row["uer"])).value for row in rows]
        clean = [Rate(**(row["target"]["clean"] if "target" in row else row["clean"])).value for row in rows]
        beside = [_control(row) for row in rows]
        ranges = " | ".join(_span(values) for values in (own, beside, clean))
        lines.append(f"| {name} | {rows[0]['pixels']} | {ranges} |")
    return "\n".join(lines)


def _control(row: dict[str, Any]) -> float:
    if "target" in row:
        return max(Rate(**one["success"]).value for one in row["target"]["controls"])
    found = strongest_control(gb.evaluation.rates.Control(**one) for one in row["controls"])
    return 0.0 if found is None else found.worst.value


def _span(values: list[float]) -> str:
    low, high = (f"{100 * value:.1f}" for value in (min(values), max(values)))
    return f"{low} %" if low == high else f"{low} to {high} %"


if __name__ == "__main__":
    main()

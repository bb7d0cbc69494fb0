"""Case studies of networks that others trained and published: ``python benchmarks/case_studies.py NAME``.

A package is fetched by its name and version and read, never installed; its sha256 is checked. Where it cannot be
fetched the case is left out, with the reason. A cut run goes on; the results are stored as ``results/case-NAME.json``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stored import RESULTS, Rows
from torch import nn

import gambeson as gb
from gambeson.base import UserError, write_bytes
from gambeson.data.fetching import wheel
from gambeson.tasks import Rate
from gambeson.threat import Ball
from gambeson.training import Recipe
from gambeson.training.recipe import recipe_for
from gambeson.training.run import TrainRun, run_training

RUNS = Path("runs/case-studies")
PACKAGES = {
    "digit-recognizer": (
        "digit-recognizer-py",
        "0.1.0",
        "58a3132a4c3ccf04175142e0c9464e5fe132421aa26d7130cbd6b1d2c03c7b12",
        "digit_recognizer/models/handwriting_model.pth",
    ),
}
"""Of each case: package, version, sha256 of its wheel, and the file in it that holds the network."""


def fetched(case: str) -> Path:
    """Return the file of a case's network, fetched at the first time.

    Raises:
        UserError: as :func:`gambeson.data.fetching.wheel`, or the wheel has no such file.
    """
    package, version, sha256, member = PACKAGES[case]
    file = RUNS / case / Path(member).name
    if not file.is_file():
        with wheel(package, version, sha256) as archive:
            if member not in archive.namelist():
                raise UserError(f"the wheel of {package} {version} has no {member}")
            file.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(file, archive.read(member))
    return file


def settings_of(case: str, **others: Any) -> dict[str, Any]:
    """What decides a case's rows."""
    package, version, sha256, member = PACKAGES[case]
    return {"package": package, "version": version, "sha256": sha256, "file": member, **others}


def rows_of(case: str, **settings: Any) -> Rows:
    """The rows of a case, as far as they are there."""
    command = f"python benchmarks/case_studies.py {case}"
    return Rows(RESULTS / f"case-{case}.json", command, settings_of(case, **settings))


def universal(model: nn.Module, data: Any, eps: float, seed: int = 0, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """Craft a universal perturbation on train and validation; score it and its controls on test."""
    began = time.process_time()
    uap = gb.attacks.create("stochastic-pgd", eps=eps, **settings).craft(model, data, seed=seed)
    spent = time.process_time() - began
    controls = gb.evaluation.control_rates(model, data, Ball(eps=eps), seed)
    return uap, {
        "uer": gb.evaluation.universal_evasion(model, data, uap).plain(),
        "controls": {one.name: one.worst.plain() for one in controls},
        "strongest control": Rate.highest([one.worst for one in controls]).plain(),
        "processor seconds": round(spent, 1),
    }


DIGITS, NET = "mnist5k", "benchmarks/case_nets.py:digit_recognizer"
RADII, TRAINED_AT, PER_IMAGE_AT = (0.1, 0.2, 0.3), 0.2, 0.1
CRAFT = {"steps": 60, "restarts": 1, "probe_starts": 0, "batch_size": 64}
PGD = {"steps": 20}
IMAGES, HELD_OUT = 200, 2000
FINE_TUNED: dict[str, tuple[dict[str, Any], int]] = {
    "standard": ({}, 4),
    "shared-adversarial": ({"eps": TRAINED_AT}, 2),
    "gambeson": ({"eps": TRAINED_AT}, 3),
    "jacobian": ({}, 3),
    "ensemble-adversarial": ({"eps": TRAINED_AT}, 2),
    "jacobian-ensemble": ({"members": 2}, 2),
    "learn2perturb": ({"eps": PER_IMAGE_AT}, 1),
}
"""Each defence with its settings and epochs, few of them: this net was trained already."""


def digit_recognizer() -> None:
    """Universal perturbations before and after fine-tuning with each defence, by rows."""
    weights = fetched("digit-recognizer")
    plans = {name: {"settings": own, "epochs": epochs} for name, (own, epochs) in FINE_TUNED.items()}
    common = {"data": DIGITS, "radii": RADII, "universal": CRAFT, "per image": {"eps": PER_IMAGE_AT, **PGD}}
    settings = {
        **common,
        "images per image": IMAGES,
        "images of MNIST's test set": HELD_OUT,
        "fine-tuning": plans,
        "lr": 0.01,
    }
    rows = rows_of("digit-recognizer", **{key: _plain(value) for key, value in settings.items()})
    data = gb.data.load(DIGITS)
    try:
        held_out = gb.data.load("mnist").test.sample(HELD_OUT, seed=0)
    except UserError as error:  # optional: it is a larger download
        print(f"MNIST's own test images are left out: {error}")
        held_out = None
    for name in rows.missing(["original", *FINE_TUNED]):
        began = time.process_time()
        model = _digits_net(name, weights, data)
        trained = time.process_time() - began
        row: dict[str, Any] = {"processor seconds of training": round(trained, 1) if name in FINE_TUNED else 0.0}
        row["parameters"] = gb.models.count_parameters(model)
        row["clean"] = gb.evaluation.accuracy(model, data).plain()
        uaps = {}
        for eps in RADII:
            uaps[eps], row[f"universal@{eps:g}"] = universal(model, data, eps, **CRAFT)
            uaps[eps].save(weights.parent / f"uap-{name}-{eps:g}.safetensors")
        attack = gb.attacks.create("pgd", eps=PER_IMAGE_AT, **PGD)
        sample = data.test.sample(IMAGES, seed=0)
        row["per image"] = gb.evaluation.accuracy_under(model, sample, attack, seed=0).plain()
        if held_out is not None:
            row["MNIST test"] = {
                "clean": gb.evaluation.accuracy(model, held_out).plain(),
                f"uer@{TRAINED_AT:g}": gb.evaluation.universal_evasion(model, held_out, uaps[TRAINED_AT]).plain(),
            }
        rows.add(name, row)
        print(
            f"{name}: {row['clean']['value']:.3f}", *(f"{row[f'universal@{e:g}']['uer']['value']:.3f}" for e in RADII)
        )


def _digits_net(name: str, weights: Path, data: Any) -> nn.Module:
    if name == "original":
        return gb.evaluation.load_model(f"{NET}@{weights}", DIGITS, dataset=data).model
    own, epochs = FINE_TUNED[name]
    defense = gb.defenses.create(name, **own)
    run = TrainRun(
        data=DIGITS,
        model=NET,
        defense=defense,
        recipe=Recipe(**recipe_for(defense, {"epochs": epochs, "lr": 0.01})),
        init=str(weights),
    )
    return run_training(run, weights.parent / name, data).eval()


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


CASES: dict[str, Callable[[], None]] = {"digit-recognizer": digit_recognizer}


def main() -> None:
    """Run the named cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="cases; all by default")
    for name in parser.parse_args().names or CASES:
        if name not in CASES:
            parser.error(f"there is no case {name!r}: choose of {', '.join(CASES)}")
        try:
            CASES[name]()
        except UserError as error:
            print(f"{name} is left out: {error}")


if __name__ == "__main__":
    main()

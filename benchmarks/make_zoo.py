"""Make the content of the package ``gambeson-zoo``: train, craft, audit and score every network, and write its card.

    python benchmarks/make_zoo.py                                        # all, in hours of one processor core
    python benchmarks/make_zoo.py fashion-mnist/lenet5/shared-s16        # one

Trainings and audits stay in ``--runs``; what is finished there is not repeated. Everything is on one thread of the
processor, so that the same versions on the same machine make the same files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gambeson import data
from gambeson.attacks import UniversalPerturbation
from gambeson.auditing import Audit, AuditRun, run_audit
from gambeson.base import write_json, write_text
from gambeson.data import Dataset
from gambeson.defenses.registry import DEFENSES
from gambeson.evaluation import accuracy, universal_evasion
from gambeson.models import count_parameters
from gambeson.models.zoo import AUDIT, CARD, FORM, MANIFEST, RUN, UAP, WEIGHTS, Entry
from gambeson.training import Recipe, TrainRun
from gambeson.training.run import run_training

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "packages" / "gambeson-zoo" / "src" / "gambeson_zoo"
SUITE = {
    "name": "quick",
    "universal_steps": 200,
    "test_images": 300,
    "sample": 60,
    "suite_images": 100,
    "suite_queries": 300,
    "surrogate_epochs": 4,
    "surrogate_images": 4000,
    "transfer_images": 200,
    "edits": [],
    "noise_sizes": [],
    "eps_adv": False,
    "eps_uni_runs": 0,
    "jacobian_backwards": 0,
}
"""Of the audits: checks of quick on fewer images, and the attack suite. Clean accuracy and UER are of all images."""


class Setup(NamedTuple):
    """A data set, its radius, and the recipe of its trainings."""

    eps: float
    recipe: dict[str, Any]
    train: int | None = None
    """Training images, a stratified sample; None: all."""


DATA = {
    "digits": Setup(0.15, {"epochs": 30, "batch_size": 64, "lr": 0.1, "warmup": 1.0}),
    "fashion-mnist": Setup(0.1, {"epochs": 10, "batch_size": 128, "lr": 0.1, "warmup": 1.0}, 10_000),
}


class Training(NamedTuple):
    """How a network of the zoo is trained: a summary, the defence without eps, and what its recipe has of its own."""

    summary: str
    defense: dict[str, Any]
    recipe: dict[str, Any] = {}  # noqa: RUF012


MEAN = {"ema": 0.999, "ema_warmup": True}
TRAININGS = {
    "standard": Training("no defence", {"name": "standard"}),
    "shared-s16": Training(
        "shared adversarial training, heaps of 16",
        {"name": "shared-adversarial", "sharedness": 16, "sigma": 0.5},
        {"lr": 0.03},
    ),
    "shared-s64": Training(
        "shared adversarial training, heaps of 64",
        {"name": "shared-adversarial", "sharedness": 64, "sigma": 0.5},
        {"lr": 0.03},
    ),
    "jacobian": Training("Jacobian regularisation", {"name": "jacobian", "strength": 0.03}),
    "ensemble-adversarial": Training(
        "ensemble adversarial training, two source networks",
        {"name": "ensemble-adversarial", "sources": ["lenet5", "mnist-d"]},
    ),
    "jacobian-ensemble": Training(
        "Jacobian ensemble of three members", {"name": "jacobian-ensemble", "members": 3, "strength": 0.03}
    ),
    "learn2perturb": Training("Learn2Perturb: learnt feature noise, a random network", {"name": "learn2perturb"}),
    "gambeson": Training("the preset gambeson", {"name": "gambeson", "speed": "fast"}, MEAN),
}
OTHERS = {
    "digits/lenet5/shared-s64": Training(
        "shared adversarial training, heaps of 64",
        {"name": "shared-adversarial", "sharedness": 64, "sigma": 0.7},
    )
}
"""What is trained otherwise on one data set."""
NAMES = [f"fashion-mnist/lenet5/{name}" for name in TRAININGS] + [
    f"digits/lenet5/{name}" for name in ("standard", "shared-s64", "jacobian-ensemble", "gambeson")
]


def training(name: str) -> tuple[TrainRun, Training]:
    """Return the settings of an entry's training."""
    data_name, model, last = name.split("/")
    setup, how = DATA[data_name], OTHERS.get(name, TRAININGS[last])
    takes_eps = "eps" in DEFENSES.get(how.defense["name"]).settings
    return TrainRun(
        data=data_name,
        model=model,
        defense=how.defense | ({"eps": setup.eps} if takes_eps else {}),
        recipe=Recipe(**(setup.recipe | how.recipe)),
    ), how


def loaded(name: str) -> Dataset:
    """Return a data set, with the training images that its networks see."""
    whole, size = data.load(name), DATA[name].train
    train = whole.train if size is None else whole.train.sample(size)
    return Dataset(name=name, train=train, validation=whole.validation, test=whole.test, classes=whole.classes)


def make(name: str, runs: Path, to: Path) -> Entry:
    """Train, audit and score one entry, and write its files into the package.

    Args:
        name: of the entry.
        runs: folder of trainings and audits.
        to: folder of the package.
    """
    run, how = training(name)
    dataset, folder = loaded(run.data), runs / name
    eps = DATA[run.data].eps
    model = run_training(run, folder, dataset)
    suite = {**SUITE, "eps": [eps]}
    label = name.rpartition("/")[2]
    audit = run_audit(AuditRun(model=str(folder), suite=suite, label=label), runs / f"{name}-audit", dataset)
    place = to / name
    place.mkdir(parents=True, exist_ok=True)
    for source, target in ((folder / WEIGHTS, WEIGHTS), (folder / RUN, RUN)):
        shutil.copyfile(source, place / target)
    (uap,) = audit.perturbations
    uap.save(place / UAP)
    write_text(place / AUDIT, json.dumps(audit.results.plain(), sort_keys=True, separators=(",", ":")) + "\n")
    test = dataset.test
    entry = Entry(
        name=name,
        summary=how.summary,
        data=run.data,
        model=run.model,
        defense=how.defense["name"],
        parameters=count_parameters(model),
        eps=eps,
        norm="inf",
        attack=uap.about.attack,
        clean=accuracy(model, test),
        uer=universal_evasion(model, test, uap),
        suite=next(one.accuracy for one in audit.results.per_image if one.attack == "standard"),
        trusted=audit.results.verdict.trusted,
        verdict=audit.results.verdict.summary,
        test=test.fingerprint,
        files={},
    )
    write_text(place / CARD, card(entry, run, audit, uap))
    digests = {file: digest(place / file) for file in (WEIGHTS, RUN, UAP, AUDIT, CARD)}
    return entry.model_copy(update={"files": digests})


def digest(file: Path) -> str:
    """Return the sha256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def card(entry: Entry, run: TrainRun, audit: Audit, uap: UniversalPerturbation) -> str:
    """Return the card of an entry."""
    setup, how = DATA[entry.data], OTHERS.get(entry.name, TRAININGS[entry.name.rpartition("/")[2]])
    given = [f"{key} {value}" for key, value in how.defense.items() if key != "name"]
    given += [f"eps {setup.eps:g}"] if hasattr(run.defense, "eps") else []
    recipe = ", ".join(f"{key} {value}" for key, value in (setup.recipe | how.recipe).items())
    size = "all training images" if setup.train is None else f"a stratified sample of {setup.train:,} images"
    made = ", ".join(f"{key} {audit.results.environment[key]}" for key in ("gambeson", "torch", "device"))
    failed = [f"{one.name} ({one.detail})" for one in audit.results.checks if one.passed is False]
    rows = {
        "data": f"{entry.data}, {size}",
        "architecture": f"{entry.model}, {entry.parameters:,} weights; pixels in [0, 1] in, logits out",
        "defence": entry.defense + (f": {', '.join(given)}" if given else ""),
        "recipe": f"{recipe}, seed {run.seed}; the last epoch",
        "clean accuracy": f"{entry.clean} of {entry.clean.n:,} test images",
        f"UER at eps {entry.eps:g}": f"{entry.uer} of {entry.uer.n:,} test images",
        "the perturbation": f"{entry.attack}, crafted on training images, chosen on {uap.about.chosen_on}",
        "accuracy under the attack suite": f"{entry.suite} of {entry.suite.n:,} test images, at eps {entry.eps:g}",
        "verdict": f"{'trusted' if entry.trusted else 'not trusted'}; of {audit.results.material.test:,} test images: "
        f"{entry.verdict}",
        "failed checks": "; ".join(failed) or "none",
        "made with": made,
        "licence": entry.license,
    }
    body = "\n".join(f"| {key} | {value.replace('|', chr(92) + '|')} |" for key, value in rows.items())
    return (
        f"# {entry.name}\n\nLeNet-5 on {entry.data}: {entry.summary}. Rates are per cent with 95 % intervals.\n\n"
        f"| | |\n|---|---|\n{body}\n\n"
        "## Use\n\n"
        f'```python\nimport gambeson as gb\n\nmodel = gb.zoo.load("{entry.name}")\n'
        f'uap = gb.zoo.load_uap("{entry.name}")\n```\n\n'
        f"```sh\ngambeson audit zoo:{entry.name}\ngambeson zoo verify {entry.name}\n```\n\n"
        "## Make it again\n\n"
        f"In the repository of gambeson: `python benchmarks/make_zoo.py {entry.name}`. The training run is in "
        "`run.yaml`, the audit in `audit/result.json`.\n"
    )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="entries; all if none is named")
    parser.add_argument("--runs", type=Path, default=Path("runs/zoo"), help="folder of trainings and audits")
    parser.add_argument("--to", type=Path, default=PACKAGE, help="folder of the package")
    given = parser.parse_args()
    if unknown := set(given.names) - set(NAMES):
        parser.error(f"no entry is called {', '.join(sorted(unknown))}: choose of {', '.join(NAMES)}")
    torch.set_num_threads(1)
    file = given.to / MANIFEST
    known: dict[str, Any] = json.loads(file.read_text())["entries"] if file.is_file() else {}
    for name in given.names or NAMES:
        made = make(name, given.runs, given.to).plain()
        del made["name"]
        known[name] = made
        write_json(file, {"form": FORM, "entries": known})
        print(name, flush=True)


if __name__ == "__main__":
    main()

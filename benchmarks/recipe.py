"""What the preset ``gambeson`` does, and where it ends: ``python benchmarks/recipe.py [--nets FOLDER] [--only KIND]``.

LeNet-5 on 6,000 images of Fashion-MNIST for 10 epochs at eps 0.2, one seed: the networks of
``studies/gambeson-ablation.yaml``, beside standard training and adversarial training with FGSM, without a random start,
which is known to mask gradients where it overfits. Of each: an audit with its active tests; the error under one pattern
and the accuracy under PGD by radius and norm; transfer between the networks; the pattern under edits. Of the preset
also: what its bank has to do with the stacked Jacobian, epoch by epoch; and fine-tuning the standard network for a few
epochs beside as many from scratch. A row is stored when it is done, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from stored import RESULTS, Rows
from torch import nn

import gambeson as gb
from gambeson.analysis import stacked_gram, stacked_norm
from gambeson.attacks import PGD, StochasticPGD
from gambeson.base import generator, seeded
from gambeson.data import Dataset
from gambeson.defenses.universal_consistency import UAPBank
from gambeson.evaluation import Rate, accuracy, accuracy_under, under_edits, universal_evasion
from gambeson.evaluation.transfer import error_of, perturbed
from gambeson.training import Recipe
from gambeson.training.loop import Run

FILE, COMMAND = "recipe.json", "python benchmarks/recipe.py"
EPS, EPOCHS, SEED = 0.2, 10, 0
SHORT = (1, 4, 10)
"""Epochs of fine-tuning, and of as many from scratch."""
RADII: dict[str, tuple[float, ...]] = {"inf": (0.1, 0.2, 0.25, 0.3, 0.4), "2": (1.0, 2.0, 3.0, 4.0)}
IMAGE_RADII: dict[str, tuple[float, ...]] = {"inf": (0.05, 0.1, 0.2, 0.3), "2": (0.5, 1.0, 1.5, 2.0)}
EDITS = ("jpeg:75", "jpeg:50", "resize:0.5", "shift:1", "shift:2", "blur:1", "print:1")
UAP: dict[str, Any] = {"steps": 150, "batch_size": 64}
FEW, JACOBIANS, DIRECTIONS = 500, 200, 5
RECIPE: dict[str, Any] = {"lr": 0.1, "warmup": 1.0, "ema": 0.999, "ema_warmup": True}
NETS: dict[str, gb.defenses.Defense] = {
    "standard": gb.defenses.Standard(),
    "gambeson": gb.defenses.Gambeson(eps=EPS),
    "single-step": gb.defenses.EnsembleAdversarial(eps=EPS),
}
SUITE = gb.auditing.SUITES["quick"].model_copy(
    update={"eps": (EPS,), "jacobian_backwards": 0, "edits": (), "eps_adv": False, "eps_uni_runs": 0}
)
SETTINGS: dict[str, Any] = {
    "data": "fashion-mnist, 6000 training, 1000 validation and 2000 test images",
    "model": f"lenet5, {EPOCHS} epochs",
    "recipe": RECIPE,
    "eps": EPS,
    "seed": SEED,
    "uap": UAP,
    "pgd": f"20 steps, {FEW} test images",
    "defenses": {name: defense.plain() for name, defense in NETS.items()},
}


class Nets:
    """The networks. Each is trained once in a folder, where an interrupted training goes on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        whole = gb.data.load("fashion-mnist")
        train, validation = whole.train.sample(6000, seed=SEED), whole.validation.sample(1000, seed=SEED)
        self.data = Dataset(whole.name, train, validation, whole.test.sample(2000, seed=SEED), whole.classes)
        self.few = self.data.test.sample(FEW, seed=SEED)

    def fresh(self) -> nn.Module:
        """An untrained network, always the same."""
        with seeded(SEED, "model"):
            return gb.models.create("lenet5", self.data)

    @cache  # noqa: B019
    def __call__(self, name: str, epochs: int = EPOCHS, lr: float = RECIPE["lr"], start: str = "") -> nn.Module:
        """A trained network.

        Args:
            name: of its defence.
            epochs: of its training.
            lr: its learning rate.
            start: the network that it is fine-tuned from.
        """
        model = self.fresh()
        if start:
            model.load_state_dict(self(start).state_dict())
        recipe = Recipe(**{**RECIPE, "lr": lr, "epochs": epochs, "warmup": min(RECIPE["warmup"], epochs / 2)})
        out = self.folder / f"{name}-{start or 'scratch'}-{epochs}"
        gb.train(model, self.data, NETS[name], recipe=recipe, seed=SEED, out=out)
        return model.eval()

    @cache  # noqa: B019
    def uap(self, name: str, eps: float = EPS, norm: str = "inf") -> Any:
        """A universal perturbation of one of them."""
        return StochasticPGD(eps=eps, norm=norm, **UAP).craft(self(name), self.data, seed=SEED)

    def errors(self, model: nn.Module, uap: Any) -> dict[str, Any]:
        """The error under a universal perturbation."""
        return universal_evasion(model, self.data, uap, seed=SEED).plain()

    def attacked(self, model: nn.Module, eps: float = EPS, norm: str = "inf") -> dict[str, Any]:
        """The accuracy under PGD."""
        return accuracy_under(model, self.few, PGD(eps=eps, norm=norm, steps=20), seed=SEED).plain()


def masking(nets: Nets, name: str) -> dict[str, Any]:
    """What an audit says, its active tests and those for single-step training first."""
    audit = gb.audit(nets(name), nets.data, suite=SUITE, seed=SEED)
    checks = {check.name: {"passed": check.passed, "detail": check.detail} for check in audit.results.checks}
    per_image = {one.attack: one.accuracy.plain() for one in audit.results.per_image}
    return {"trusted": audit.verdict.trusted, "checks": checks, "per image": per_image}


def radii(nets: Nets, name: str) -> dict[str, Any]:
    """Errors under one pattern, and accuracies under PGD, by norm and radius."""
    model = nets(name)
    return {
        "clean": accuracy(model, nets.data).plain(),
        "uer": {
            norm: {f"{eps:g}": nets.errors(model, nets.uap(name, eps, norm)) for eps in some}
            for norm, some in RADII.items()
        },
        "pgd": {
            norm: {f"{eps:g}": nets.attacked(model, eps, norm) for eps in some} for norm, some in IMAGE_RADII.items()
        },
    }


def transfer(nets: Nets, name: str) -> dict[str, Any]:
    """Errors of every network on what was crafted on this one."""
    moved = perturbed(nets(name), nets.few, PGD(eps=EPS, steps=20), SEED, "pgd")
    return {
        target: {
            "uer": nets.errors(nets(target), nets.uap(name)),
            "pgd": error_of(nets(target), moved, SEED).plain(),
        }
        for target in ("standard", "gambeson")
    }


def edits(nets: Nets, name: str) -> list[dict[str, Any]]:
    """The pattern of this network under edits of the images, beside clean ones and random signs."""
    found = under_edits(nets(name), nets.data, nets.uap(name), EDITS, seed=SEED)
    return [
        {"edit": one.edit, "clean": one.clean.plain(), "uer": one.uer.plain(), "control": one.control.plain()}
        for one in found.rates
        if one.control is not None
    ]


def fine_tuning(nets: Nets, key: str) -> dict[str, Any]:
    """A network after a few epochs: from the standard one at half of the learning rate, or from scratch."""
    start, epochs = key.rsplit(" ", 1)
    tuned = start == "standard"
    model = nets("gambeson", int(epochs), RECIPE["lr"] / 2 if tuned else RECIPE["lr"], start if tuned else "")
    uap = StochasticPGD(eps=EPS, **UAP).craft(model, nets.data, seed=SEED)
    return {
        "clean": accuracy(model, nets.data).plain(),
        "uer": nets.errors(model, uap),
        "pgd": nets.attacked(model),
    }


def alignment(nets: Nets, name: str) -> list[dict[str, float]]:
    """What the bank's patterns are to the stacked Jacobian J of the network that they were moved against.

    Before the training and at the end of each epoch, on validation images: how much of a pattern's squared length lies
    in the top right singular directions of J, and how far ``||J v|| / ||v||_inf`` of a pattern reaches towards the
    largest that the power method finds; of random signs as well. Mean over the patterns.
    """
    whole, few = nets.data, nets.data.validation.sample(JACOBIANS, seed=SEED)
    recipe = Recipe(**RECIPE, epochs=EPOCHS)
    model = nets.fresh()
    run = Run(model, whole, NETS[name], recipe, SEED, None)
    bank = next((module for module in run.objective.modules() if isinstance(module, UAPBank)), None)
    signs = torch.randn(8, *whole.train.shape, generator=generator(SEED, "signs")).sign()
    found: list[dict[str, float]] = []

    def look(_: Any) -> bool:
        gram = stacked_gram(model, few)
        top = gram.top(DIRECTIONS, SEED)
        best = stacked_norm(model, few, starts=2, steps=10, seed=SEED).attained
        row = {"largest gain": best / len(few) ** 0.5, "sharing": top.shared or 0.0}
        for label, patterns in ({"random": signs} | ({} if bank is None else {"bank": bank.delta})).items():
            v = patterns.flatten(1).double()
            inside = (v @ top.directions.flatten(1).double().T).square() / v.square().sum(1, keepdim=True)
            gain = (v @ gram.matrix * v).sum(1).sqrt() / v.abs().amax(1)
            row |= {
                f"{label}: first": float(inside[:, 0].mean()),
                f"{label}: first {DIRECTIONS}": float(inside.sum(1).mean()),
                f"{label}: gain": float((gain / best).mean()),
            }
        found.append(row)
        return False

    look(None)
    run.fit("recipe", look)
    look(None)
    return found


KINDS: dict[str, tuple[Callable[[Nets, str], Any], tuple[str, ...]]] = {
    "radii": (radii, ("standard", "gambeson")),
    "masking": (masking, ("gambeson", "single-step")),
    "alignment": (alignment, ("gambeson",)),
    "fine-tuning": (fine_tuning, tuple(f"{start} {n}" for n in SHORT for start in ("standard", "scratch"))),
    "transfer": (transfer, ("standard", "gambeson")),
    "edits": (edits, ("standard", "gambeson")),
}
"""Kinds of rows: what makes one, and their names."""


def percent(rate: dict[str, Any]) -> str:
    """A rate in per cent."""
    return f"{100 * rate['value']:.1f}"


def tables(stored: dict[str, Any]) -> dict[str, str]:
    """The tables of ``docs/recipe.md`` by marker, with what has not been measured left open."""
    rows, both = stored["rows"], ("standard", "gambeson")

    def of(kind: str, name: str) -> Any:
        return rows.get(f"{kind}: {name}")

    def lines(head: list[str], body: list[list[str]]) -> str:
        width = len(head)
        every = [head, ["---"] * width, *(cells + ["not run"] * (width - len(cells)) for cells in body)]
        return "".join(f"| {' | '.join(cells)} |\n" for cells in every)

    def by_radius(what: str, some: dict[str, tuple[float, ...]], title: str) -> str:
        places = [(norm, f"{eps:g}") for norm, every in some.items() for eps in every]
        head = [title, "clean", *(f"{norm}, {eps}" for norm, eps in places)]
        found = {name: of("radii", name) for name in both}

        def clean(row: dict[str, Any]) -> str:
            right = Rate(**row["clean"])
            return percent((right.complement if what == "uer" else right).plain())

        return lines(
            head,
            [
                [name, clean(row), *(percent(row[what][norm][eps]) for norm, eps in places)] if row else [name]
                for name, row in found.items()
            ],
        )

    def audited(name: str) -> list[str]:
        row = of("masking", name)
        if row is None:
            return [name]
        failed = [check for check, one in row["checks"].items() if one["passed"] is False]
        steps = row["checks"]["multi-step beats single-step"]["detail"].split(", both")[0]
        found = row["checks"]["attacks find what is there"]["detail"].split(" copies")[0].removeprefix("of ")
        return [
            name,
            "yes" if row["trusted"] else "no",
            ", ".join(failed) or "none",
            f"all of {found}" if row["checks"]["attacks find what is there"]["passed"] else "not all",
            steps.removeprefix("accuracy "),
            f"{100 * min(one['value'] for one in row['per image'].values()):.1f} %",
        ]

    aligned = of("alignment", "gambeson") or []
    parts = ["first", f"first {DIRECTIONS}", "gain"]
    moved = {name: of("transfer", name) for name in both}
    edited = {name: {one["edit"]: one for one in of("edits", name) or []} for name in both}
    tuned = [
        [f"{n}, {'from the standard network' if start == 'standard' else 'from scratch'}"]
        + ([percent(row[what]) for what in ("clean", "uer", "pgd")] if row else [])
        for n in SHORT
        for start in ("standard", "scratch")
        for row in [of("fine-tuning", f"{start} {n}")]
    ]
    return {
        "recipe patterns": by_radius("uer", RADII, "error under one pattern"),
        "recipe images": by_radius("pgd", IMAGE_RADII, "right under PGD-20"),
        "recipe masking": lines(
            ["training", "trusted", "failed checks", "active test finds", "one step and many", "worst per image"],
            [audited(name) for name in ("gambeson", "single-step")],
        ),
        "recipe alignment": lines(
            [
                "epoch",
                *(f"bank, {part}" for part in parts),
                *(f"random signs, {part}" for part in parts),
                "sharing factor",
            ],
            [
                [
                    str(epoch),
                    *(f"{row[f'{who}: {part}']:.3f}" for who in ("bank", "random") for part in parts),
                    f"{row['sharing']:.3f}",
                ]
                for epoch, row in enumerate(aligned)
            ]
            or [["all"]],
        ),
        "recipe tuning": lines(["epochs", "clean", "UER 0.2", "PGD-20 at 0.2"], tuned),
        "recipe transfer": lines(
            ["made on", *(f"{what}, error of {target}" for what in ("pattern", "PGD-20") for target in both)],
            [
                [name, *(percent(row[target][what]) for what in ("uer", "pgd") for target in both)] if row else [name]
                for name, row in moved.items()
            ],
        ),
        "recipe edits": lines(
            ["edit", *(f"{name}: {what}" for name in both for what in ("clean error", "UER", "random signs"))],
            [
                [edit, *(percent(one[edit][what]) for one in edited.values() for what in ("clean", "uer", "control"))]
                if all(edited.values())
                else [edit]
                for edit in ("none", *EDITS)
            ],
        ),
    }


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", type=Path, default=Path("runs/recipe"), help="folder of the trainings")
    parser.add_argument("--only", choices=KINDS, nargs="*", default=list(KINDS))
    parser.add_argument("--out", type=Path, default=RESULTS / FILE)
    given = parser.parse_args()
    rows, nets = Rows(given.out, COMMAND, SETTINGS), Nets(given.nets)
    for kind in given.only:
        measure, names = KINDS[kind]
        for name in names:
            if rows.missing([f"{kind}: {name}"]):
                rows.add(f"{kind}: {name}", measure(nets, name))
                print(f"{kind}: {name}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

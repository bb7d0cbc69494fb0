"""Audit folders for the tests: synthetic, but of the real schema, with numbers that all differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from report_jacobian import jacobian
from sklearn.datasets import load_digits
from torch.nn.functional import interpolate

from gambeson.attacks import CONTROLS, UniversalPerturbation
from gambeson.attacks.universal.perturbation import Provenance
from gambeson.auditing import SUITES, AuditResult
from gambeson.auditing.results import (
    Check,
    Corruption,
    DataInfo,
    ModelInfo,
    PerImageResult,
    RandomnessResult,
    Restart,
    TransferredResult,
    UniversalResult,
)
from gambeson.auditing.verdict import judge
from gambeson.base import generator, pixel_bytes, save_tensors, write_json, write_yaml
from gambeson.evaluation import Auc, ClassRates, ClassView, Difference, EditedRates, EditsResult, Rate
from gambeson.evaluation.attack_suite import AttackRound
from gambeson.evaluation.rates import Control, Cost, EpsUni
from gambeson.evaluation.transfer import TransferResult, TransferRun, TransferTable

GREY = (0.05, 0.1, 0.15, 0.2, 0.3)
COLOUR = (4 / 255, 8 / 255, 12 / 255, 16 / 255, 26 / 255)
TESTS = 1000


def write_audit(
    folder: Path,
    *,
    label: str = "standard",
    wrong: tuple[int, ...] = (121, 397, 683, 811, 903),
    clean: int = 987,
    colour: bool = False,
    failed: bool = False,
    censored: bool = False,
    classes: list[str] | None = None,
    norm: str = "inf",
    seed: int = 0,
    random: bool = False,
    with_jacobian: bool = True,
) -> AuditResult:
    """Write one folder; ``wrong`` and ``clean`` are counts out of 1,000 test images."""
    radii = COLOUR if colour else GREY
    shape = [3, 32, 32] if colour else [1, 28, 28]
    names = classes or [f"digit {k}" for k in range(10)]
    points, deltas = [], []
    for k, (eps, errors) in enumerate(zip(radii, wrong, strict=True)):
        floor = max(1, (errors - (1000 - clean)) // (4 + k % 2) + 1000 - clean)
        controls = [
            Control(name=name, mean=(floor - 3 * j - 2) / TESTS, worst=Rate.of(floor + j, TESTS), draws=draws)
            for j, (name, draws) in enumerate(CONTROLS.items())
        ]
        points.append(
            UniversalResult(
                eps=eps,
                norm=norm,
                uer=Rate.of(errors, TESTS),
                fooling=Rate.of(errors + 7, TESTS),
                controls=controls,
                restarts=[
                    Restart(start="uniform", validation_uer=errors / 1001),
                    Restart(start="smaller", validation_uer=errors / 1003),
                ],
                file=f"uap-{eps:.4g}.safetensors",
                status="done",
                cost=Cost(forwards=25_600, backwards=25_600),
            )
        )
        deltas.append(_pattern(eps, shape, seed + k))
        about = Provenance(
            attack="stochastic-pgd",
            settings={},
            eps=eps,
            norm=norm,
            seed=0,
            model="f" * 16,
            crafted_on="a" * 16,
            crafted_split="train",
            chosen_on="validation",
            restarts=[("uniform", errors / 1001)],
            status="done",
            forwards=25_600,
            backwards=25_600,
        )
        inside = deltas[-1] if norm == "inf" else deltas[-1] / deltas[-1].norm(p=float(norm)) * eps
        UniversalPerturbation(inside, about).save(folder / points[-1].file)
    found = EpsUni(
        delta=0.5,
        value=1.0 if censored else 0.1207 + seed / 100,
        censored=censored,
        tolerance=0.0021,
        tried=[(p.eps, p.uer.value) for p in points],
        split="test",
        cost=Cost(forwards=90_000, backwards=80_000),
    )
    checks = [
        Check(name="deterministic", passed=True, detail="two forwards of the same images differ by at most 0"),
        Check(name="no noise-off gap", passed=None, detail="the model is not random"),
        Check(
            name="no vanishing gradients",
            passed=not failed,
            detail=f"{150 if failed else 0} of 200 images have no gradient",
            condition=f"more than 10 % of the images of {label} have a loss gradient of exactly zero",
            explanation="Such images cannot be attacked by following the gradient.",
            remedy="Attack the logits before the part that hides it, or by queries.",
            numbers={"dead": 0.75 if failed else 0.0},
        ),
        Check(name="crafted beats controls", passed=True, detail="no control does clearly more harm at any eps"),
    ]
    right = Rate.of(clean, TESTS)
    result = AuditResult(
        subject=ModelInfo(
            label=label,
            name="lenet",
            parameters=431_080,
            fingerprint=f"{seed:x}3b9c41d7e20f6a8",
            defense={"name": label, "eps": 0.2, "term": {"sharedness": 64}},
            epochs=10,
        ),
        material=DataInfo(name="digits", classes=names, shape=shape, train=4000, validation=500, test=TESTS),
        seed=0,
        settings=SUITES["standard"].model_copy(update={"eps": radii, "norm": norm}).plain(),
        clean=right,
        per_image=[
            PerImageResult(
                attack="pgd",
                settings={"eps": radii[2], "steps": 40},
                eps=radii[2],
                norm=norm,
                accuracy=Rate.of(max(3, 700 - wrong[2]), TESTS),
                cost=Cost(forwards=40_000, backwards=40_000),
            ),
            _suite(radii[2], norm, wrong[2], clean),
        ],
        universal=points,
        eps_uni=found,
        transfer=[
            TransferredResult(
                source="surrogate (lenet5)",
                attack=attack,
                universal=universal,
                eps=radii[2],
                norm=norm,
                error=Rate.of(max(0, wrong[1] + shift), TESTS),
                cost=Cost(forwards=7000, backwards=6001),
            )
            for attack, universal, shift in (("stochastic-pgd", True, -11), ("pgd", False, 13))
        ],
        corruption=[
            Corruption(noise=kind, size=radii[2] / (k + 1), error=Rate.of(1000 - clean + 7 * k + 5, TESTS))
            for k, kind in enumerate(("gaussian", "uniform", "salt-and-pepper"))
        ],
        randomness=RandomnessResult(
            votes=20,
            mean=0.9213,
            spread=0.0047,
            lowest=0.9112,
            highest=0.9299,
            majority=Rate.of(935, TESTS),
            noise_off=Rate.of(941, TESTS),
            noise_off_by="dropout put into evaluation mode",
        )
        if random
        else None,
        edits=edits(radii[2], norm, wrong[2], clean, colour),
        classes=by_class(radii[2], norm, names, seed),
        jacobian=jacobian(folder, radii, shape, seed, ridge=failed) if with_jacobian else None,
        checks=checks,
        verdict=judge(right, points, found, checks),
        cost=Cost(forwards=258_000, backwards=248_000),
        environment={"python": "3.11.9", "gambeson": "0.1.0", "torch": "2.11.0", "device": "x86_64 cpu"},
    )
    result.save(folder)
    _write_examples(folder, deltas[2], shape, wrong[2])
    write_json(folder / "timing.json", {"uap-0.05.safetensors": 12.3, "per-image": 63.9})
    write_yaml(folder / "run.yaml", {"kind": "audit", "model": "runs/model"})
    return result


def edits(eps: float, norm: str, wrong: int, clean: int, colour: bool) -> EditsResult:
    """Four edits, each leaving less of the harm and doing more itself."""
    rates = []
    for k, edit in enumerate(("none", "jpeg:75", "resize:0.5", "shift:1")):
        own, left = 1000 - clean + 17 * k, (wrong - (1000 - clean)) // (k + 1)
        under, before = (torch.arange(TESTS)[:, None] < torch.tensor([n, TESTS]) for n in (own + left, own))
        harm = Difference.of(under.long(), before.long(), lambda sums: sums[:, 0] / sums[:, 1], TESTS)
        control = Control(name="random-sign", mean=(own + 3) / TESTS, worst=Rate.of(own + 5, TESTS), draws=3)
        clean_rate, rate = Rate.of(own, TESTS), Rate.of(own + left, TESTS)
        rates.append(EditedRates(edit=edit, clean=clean_rate, uer=rate, harm=harm, controls=[control]))
    left_out = {} if colour else {"colour:0.1": "images of one channel have no colours"}
    return EditsResult(attack="stochastic-pgd", eps=eps, norm=norm, rates=rates, left_out=left_out)


def by_class(eps: float, norm: str, names: list[str], seed: int) -> ClassView:
    """Errors that rise from class to class, and areas where there are two."""
    each, two, auc = TESTS // len(names), len(names) == 2, None
    rates = [
        ClassRates(
            name=name,
            clean=Rate.of(k, each, candidates=len(names)),
            uer=Rate.of(min(each, 20 + 7 * k + seed), each, candidates=len(names)),
            own=Rate.of(min(each, 40 + 6 * k), each, candidates=len(names)) if two else None,
        )
        for k, name in enumerate(names)
    ]
    if two:
        areas = [Rate.from_variance(value, 1e-4, TESTS, TESTS) for value in (0.97, 0.61)]
        auc = Auc(positive=names[1], clean=areas[0], perturbed=areas[1])
    return ClassView(attack="stochastic-pgd", eps=eps, norm=norm, classes=rates, auc=auc)


def _suite(eps: float, norm: str, wrong: int, clean: int) -> PerImageResult:
    """A suite of two attacks on 200 images; the worst of all attacks here."""
    after = [max(4, (690 - wrong) // 5), max(0, (690 - wrong) // 5 - 4)]
    before = [clean // 5, after[0]]
    return PerImageResult(
        attack="standard",
        settings={"apgd-ce": {"eps": eps, "steps": 100}, "square": {"eps": eps, "queries": 5000}},
        eps=eps,
        norm=norm,
        accuracy=Rate.of(after[1], 200),
        rounds=[
            AttackRound(
                attack=name,
                tried=had,
                broken=had - left,
                accuracy=Rate.of(left, 200),
                cost=Cost(forwards=9000, backwards=8000),
            )
            for name, had, left in zip(("apgd-ce", "square"), before, after, strict=True)
        ],
        cost=Cost(forwards=18_000, backwards=8000),
    )


def three(root: Path, **common: Any) -> tuple[list[Path], list[AuditResult]]:
    """Write three audits of the same data whose numbers all differ."""
    rows = [
        {"label": "standard", "seed": 0},
        {
            "label": "shared-adversarial",
            "wrong": (31, 58, 117, 204, 466),
            "clean": 979,
            "seed": 5,
            "censored": True,
        },
        {"label": "jacobian", "wrong": (77, 259, 541, 707, 864), "clean": 983, "seed": 9, "failed": True},
    ]
    folders = [root / f"audit-{row['label']}" for row in rows]
    return folders, [write_audit(folder, **{**row, **common}) for folder, row in zip(folders, rows, strict=True)]


def _pattern(eps: float, shape: list[int], seed: int) -> torch.Tensor:
    """Smooth blobs of +-eps with soft edges, different for every seed, touching both ends."""
    coarse = torch.randn(1, shape[0], 6, 6, generator=generator(seed, "pattern"))
    smooth = interpolate(coarse, shape[1:], mode="bicubic")
    return (smooth * 4).clamp(-1, 1) * eps


def _write_examples(folder: Path, delta: torch.Tensor, shape: list[int], wrong: int) -> None:
    digits = load_digits()
    labels = torch.arange(10)
    first = [int((torch.from_numpy(digits.target) == k).nonzero()[0]) for k in range(10)]
    images = torch.from_numpy(digits.images[first]).float().div(16).unsqueeze(1)
    images = interpolate(images, shape[1:], mode="bilinear").expand(-1, shape[0], -1, -1)
    if shape[0] == 3:
        images = images * torch.tensor([1.0, 0.8, 0.4]).view(3, 1, 1) + 0.1
    fooled = torch.arange(10) * 100 < wrong
    after = torch.where(fooled, (labels + 3) % 10, labels)
    tensors = {
        "images": pixel_bytes(images),
        "perturbed": pixel_bytes((images + delta).clamp(0, 1)),
        "labels": labels,
        "predictions": torch.where(labels == 9, 4, labels),
        "perturbed_predictions": after,
    }
    save_tensors(folder / "examples.safetensors", tensors, {"eps": 0.15, "norm": "inf"})


def transferred() -> TransferResult:
    """A transfer result of three models, the last of which is a black box."""
    run = TransferRun(models=("runs/a", "runs/b", "http://c"), data="digits", eps=8 / 255, attacks=("fgsm", "pgd"))

    def table(attack: str, more: int) -> TransferTable:
        rows = [[Rate.of(100 * source + 37 * target + more, TESTS) for target in range(3)] for source in (1, 6)]
        return TransferTable(attack=attack, errors=[*rows, [None, None, None]])

    return TransferResult(
        labels=["plain", "hard", "box"],
        clean=[Rate.of(21, TESTS), Rate.of(33, TESTS), Rate.of(301, TESTS)],
        tables=[table("fgsm", 5), table("pgd", 111)],
        run=run,
        environment={"python": "3.11.9"},
    )

"""An audit folder of a segmentation model: synthetic, of the real schema, whose every number differs."""

from __future__ import annotations

from pathlib import Path

import torch
from report_audits import COLOUR, write_audit

from gambeson.attacks import UniversalPerturbation
from gambeson.auditing import AuditResult
from gambeson.auditing.results import IoU, TargetedResult
from gambeson.base import generator, save_tensors
from gambeson.evaluation import Rate
from gambeson.evaluation.rates import Cost
from gambeson.evaluation.targeted import SHUFFLED, TargetControl, TargetSuccess

CLASSES = ["ground", "road <b>", "tree"]
KEPT, SIDE = 6, 32


def rate(share: float) -> Rate:
    return Rate.bootstrap(
        torch.tensor([round(1000 * share) + 9, round(1000 * share) - 9] * 500), torch.tensor([1000] * 1000)
    )


def write_scenes(folder: Path) -> AuditResult:
    """Write one folder; the clean mean IoU is 0.6, and it falls by a tenth at every eps."""
    plain = write_audit(folder, colour=True, with_jacobian=False, classes=CLASSES)
    points = []
    for k, point in enumerate(plain.universal):
        iou = IoU(mean=rate(0.5 - k / 10), classes={"tree": rate(0.41 - k / 20), "ground": rate(0.71 - k / 20)})
        points.append(point.model_copy(update={"iou": iou}))
    middle, cost = plain.middle, Cost(forwards=1, backwards=1)
    reached = TargetSuccess(
        success=rate(0.83),
        clean=rate(0.61),
        controls=(TargetControl(name=SHUFFLED, draws=10, success=rate(0.64)),),
    )
    hidden = TargetSuccess(success=rate(0.77), clean=rate(0.93), hidden=rate(0.57), kept=rate(0.88))
    targeted = [
        TargetedResult(
            target=name, eps=middle.eps, norm="inf", reached=found, file=f"{name[:4]}.safetensors", cost=cost
        )
        for name, found in (("static:12", reached), ("hide:tree", hidden))
    ]
    for one in targeted:
        UniversalPerturbation.load(folder / middle.file).save(folder / one.file)
    result = plain.model_copy(
        update={
            "material": plain.material.model_copy(update={"unit": "pixel"}),
            "classes": None,
            "iou": IoU(mean=rate(0.6), classes={"tree": rate(0.47), "ground": rate(0.78)}),
            "universal": points,
            "targeted": targeted,
        }
    )
    result.save(folder)
    _write_examples(folder)
    return result


def _write_examples(folder: Path) -> None:
    """Every label is a class of its own rows; under the k-th pattern k + 2 rows of eight are seen as ground."""
    draw = generator(0, "scenes")
    rows = torch.arange(SIDE) // 8 % 3
    labels = rows[:, None].expand(KEPT, SIDE, SIDE).clone()
    labels[:, :, 0] = -1
    images = torch.randint(0, 256, (KEPT, 3, SIDE, SIDE), generator=draw, dtype=torch.uint8)
    curve = torch.stack([images.roll(k + 1, 3) for k in range(len(COLOUR))])
    seen = torch.stack([labels.clamp(min=0).index_fill(1, torch.arange(8, 10 + 2 * k), 0) for k in range(len(COLOUR))])
    tensors = {
        "images": images,
        "perturbed": curve[2],
        "labels": labels,
        "predictions": labels.clamp(min=0),
        "perturbed_predictions": seen[2],
        "curve": curve,
        "curve_predictions": seen,
    }
    for kind in ("static", "hide"):
        tensors |= {kind: torch.zeros_like(labels), f"{kind}_images": curve[1], f"{kind}_predictions": seen[1]}
    save_tensors(folder / "examples.safetensors", tensors, {})

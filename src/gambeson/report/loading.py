"""Loading of finished audits, and checks that they can be compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gambeson.auditing import AuditResult
from gambeson.auditing.results import DataInfo, UniversalResult, read_seconds
from gambeson.base import UserError, load_tensors, read_settings
from gambeson.base.files import read_yaml

_EXAMPLES = ("images", "perturbed", "labels", "predictions", "perturbed_predictions")


@dataclass(frozen=True)
class Folder:
    """One finished audit on disk."""

    path: Path
    label: str
    """Name of the model in the page: the audit's label, with the folder's name if two labels are equal."""
    result: AuditResult
    deltas: tuple[torch.Tensor, ...]
    """The perturbations (C, H, W), in the order of ``result.universal``."""
    aimed: tuple[torch.Tensor, ...]
    """The perturbations with a target (C, H, W), in the order of ``result.targeted``."""
    direction: torch.Tensor | None
    """The best shared L2 direction of the linearised model (C, H, W), if the audit has one."""
    examples: dict[str, torch.Tensor]
    """See :func:`gambeson.auditing.stages.examples.save_examples`."""
    seconds: dict[str, float]
    """Seconds by stage; empty when nothing was timed."""
    settings: dict[str, Any]
    """The contents of ``run.yaml``, from which the audit can be reproduced; empty if it was started from Python."""

    @property
    def unit(self) -> str:
        """What a rate counts: ``image``, or ``pixel`` where labels are maps."""
        return self.result.material.unit

    @property
    def units(self) -> str:
        """What rates are shares of: ``test images``, or ``pixels of test images``."""
        return "test images" if self.unit == "image" else f"{self.unit}s of test images"

    @property
    def trusted(self) -> bool:
        """Whether the verdict is trusted."""
        return self.result.verdict.trusted

    def at(self, eps: float | None) -> UniversalResult:
        """The perturbation at ``eps``, or at the audit's middle eps if None."""
        return next((point for point in self.result.universal if point.eps == eps), self.result.middle)


def read_folders(paths: Sequence[Path]) -> list[Folder]:
    """Read every folder.

    Raises:
        UserError: there are none, one is not finished, or they cannot be compared.
    """
    if not paths:
        raise UserError(
            "no audit was given: expected one or more folders that `gambeson audit` has finished; name them"
        )
    results = [AuditResult.load(path) for path in paths]
    for path, result in zip(paths, results, strict=True):
        _check_pair(paths[0], results[0], path, result)
    times = Counter(result.subject.label for result in results)
    return [_read(path, result, times) for path, result in zip(paths, results, strict=True)]


def _check_pair(first: Path, expected: AuditResult, path: Path, found: AuditResult) -> None:
    if found.material != expected.material:
        raise UserError(
            f"{path} is an audit on {_describe(found.material)}, but {first} is on "
            f"{_describe(expected.material)}: expected the same data in all of them; write one report each"
        )
    norms = (expected.universal[0].norm, found.universal[0].norm)
    if norms[0] != norms[1]:
        raise UserError(
            f"{path} measures eps in the {norms[1]}-norm, but {first} in the {norms[0]}-norm: "
            "expected one norm in all of them; write one report for each"
        )


def _read(path: Path, result: AuditResult, times: Counter[str]) -> Folder:
    label = result.subject.label
    return Folder(
        path=path,
        label=label if times[label] == 1 else f"{label} ({path.name})",
        result=result,
        deltas=tuple(_delta(path / point.file, result.material) for point in result.universal),
        aimed=tuple(_delta(path / found.file, result.material) for found in result.targeted),
        direction=_direction(path, result),
        examples=_examples(path / "examples.safetensors"),
        seconds=read_seconds(path),
        settings=_settings(path),
    )


def _settings(path: Path) -> dict[str, Any]:
    """Settings of an audit's run; of one that `gambeson harden` made, those that name its model and data."""
    if (path / "run.yaml").is_file():
        return read_settings(path / "run.yaml", "audit")
    whole = path.parent / "run.yaml"
    found = read_yaml(whole) if whole.is_file() else {}
    if found.get("kind") != "harden":
        return {}
    model = found["model"] if path.name == "original" else str(path.parent / "model.safetensors")
    return {"model": model, "data": found.get("data")}


def _delta(path: Path, material: DataInfo) -> torch.Tensor:
    tensors, _ = load_tensors(path, "a universal perturbation")
    delta = tensors.get("delta")
    if delta is None or list(delta.shape) != [1, *material.shape]:
        found = sorted(tensors) if delta is None else f"a delta of shape {tuple(delta.shape)}"
        raise UserError(f"{path} holds {found}: expected a delta of shape {(1, *material.shape)}; run the audit again")
    return delta[0]


def _direction(path: Path, result: AuditResult) -> torch.Tensor | None:
    if result.jacobian is None or not result.jacobian.file:
        return None
    tensors, _ = load_tensors(path / result.jacobian.file, "the Jacobian analysis of an audit")
    direction = tensors.get("direction")
    if direction is not None and list(direction.shape) != result.material.shape:
        raise UserError(
            f"{path / result.jacobian.file} holds a direction of shape {tuple(direction.shape)}: expected "
            f"{tuple(result.material.shape)}; run the audit again"
        )
    return direction


def _examples(path: Path) -> dict[str, torch.Tensor]:
    tensors, _ = load_tensors(path, "test images of an audit")
    if missing := sorted(set(_EXAMPLES) - set(tensors)):
        raise UserError(f"{path} lacks {', '.join(missing)}: expected test images of an audit; run the audit again")
    return tensors


def _describe(material: DataInfo) -> str:
    shape = " x ".join(str(side) for side in material.shape)
    splits = f"{material.train}/{material.validation}/{material.test}"
    return f"{material.name} ({len(material.classes)} classes, {shape}, {splits} images)"

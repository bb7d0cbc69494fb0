"""What a study is refused for before any of it runs: claims about numbers that it does not make, and unknown names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gambeson import data as data_room
from gambeson.attacks.registry import ATTACKS, kind_of
from gambeson.base import UserError, unknown_name, user_code
from gambeson.data.load import FOLDERS, TORCHVISION
from gambeson.data.registry import SETS
from gambeson.models import external
from gambeson.models.registry import check_name
from gambeson.studies.measures import AttackMeasure
from gambeson.studies.study import Study

if TYPE_CHECKING:
    from gambeson.studies.matrix import Cell, Row

_JACOBIANS = ("sharing", "jacobian")
_METRICS = {
    "accuracy": ("accuracy",),
    "suite": ("accuracy",),
    "eps-uni": ("eps_uni",),
    "jacobian": (*_JACOBIANS, "pairs"),
    "audit": ("clean", "uer", "eps_uni", "eps_adv", "attacked", "trusted", *_JACOBIANS),
}
_TRAIN = ("validation_accuracy", "validation_uer", "learnt", "seconds", "steps")


def metrics_of(measure: Any) -> tuple[str, ...]:
    """Return the last parts of the names of a measurement's metrics; None: those of a training."""
    if measure is None:
        return _TRAIN
    if isinstance(measure, AttackMeasure):
        return ("uer",) if kind_of(ATTACKS.get(measure.attack["name"])) == "universal" else ("accuracy",)
    return _METRICS[measure.kind]


def check_claims(study: Study, table: Sequence[tuple[Row, dict[str, Cell]]]) -> None:
    """Refuse claims that no result of a study could decide.

    Args:
        study: the study.
        table: its rows with their cells.

    Raises:
        UserError: a claim names a metric or a variant that there is not, or what is not measured of its defence.
    """
    for name, claim in study.claims.items():
        for metric in claim.metrics:
            label, _, last = metric.partition(".")
            known = metrics_of(study.measures.get(label))
            if last not in known:
                raise unknown_name(f"metric of the claim {name}", metric, [f"{label}.{one}" for one in known])
        for side in claim.sides:
            mine = [(row, cells) for row, cells in table if row.defense == (side.defense or row.defense)]
            variants = {row.variant for row, _ in mine}
            if side.variant and side.variant not in variants:
                raise unknown_name(f"variant of {side.defense} in the claim {name}", side.variant, variants)
            for at in claim.at or study.at:
                for label in sorted(claim.reads(side.defense, side.variant)):
                    if not any(
                        row.data in (claim.data or (row.data,))
                        and row.model in (claim.models or (row.model,))
                        and row.at == at
                        and side.variant in ("", row.variant)
                        and label in cells
                        for row, cells in mine
                    ):
                        raise UserError(
                            f"the claim {name} reads {label} of {side.defense or 'all defences'} at equal {at}, which "
                            "is not measured there: widen the measure's defenses or seeds, or the claim's data and "
                            "models"
                        )


def check_names(study: Study) -> None:
    """Refuse architectures and data that there are not, and that no download brings.

    Raises:
        UserError: the first of them.
    """
    for model in study.models:
        if not external.is_external(external.canonical(model.name)):
            check_name(model.name)
    for one in study.data:
        bare = one.name.partition("?")[0]
        kind, _, path = bare.partition(":")
        named = bare in SETS.names() or bare.startswith(TORCHVISION) or user_code.is_spelling(bare)
        if not named and not (kind in FOLDERS and Path(path).expanduser().exists()):
            data_room.load(one.name)  # which says what is wrong with it

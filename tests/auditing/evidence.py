"""Evidence as an audit would hold it when it comes to the diagnostics, without the stages before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from gambeson.auditing import Evidence, Suite
from gambeson.auditing.results import Subject
from gambeson.data import Dataset
from gambeson.evaluation.universal import accuracy_rate
from gambeson.victim import Victim, predict, score


@contextmanager
def evidence_of(
    model: nn.Module, data: Dataset, eps: tuple[float, ...], *, black_box: bool = False, **settings: Any
) -> Iterator[Evidence]:
    """Hold a model as an audit does."""
    suite = Suite(**{"eps": eps, "pgd_steps": 20, "pgd_restarts": 1, "sample": 100, "row_images": 0} | settings)
    with Victim(model, fast=not black_box) as victim:
        look = victim.meet(data.test.take(slice(0, 8), victim.device)[0], scores=black_box)
        predictions = predict(victim, data.test)
        subject = Subject(
            label="m", name="m", parameters=1, fingerprint="", black_box=black_box, random=look.stochastic
        )
        clean = accuracy_rate(score(predictions, data.test))
        yield Evidence(
            victim=victim, data=data, suite=suite, seed=0, subject=subject, clean=clean, predictions=predictions
        )

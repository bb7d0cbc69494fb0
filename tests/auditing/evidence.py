"""An audit's context as it would hold it when it comes to a stage or to the diagnostics, without the stages before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gambeson.auditing import AuditContext, Suite
from gambeson.auditing.results import ModelInfo
from gambeson.data import Dataset
from gambeson.evaluation.universal import accuracy_rate
from gambeson.victim import Victim, predict, score


def evidence_of(victim: Victim, data: Dataset, suite: Suite, *, black_box: bool = False) -> AuditContext:
    """What an audit knows before its first stage, of a victim inside its context."""
    traits = victim.inspect(data.test.take(slice(0, 8), victim.device)[0], scores=black_box)
    victim.votes = suite.votes if traits.stochastic else 1
    predictions = predict(victim, data.test)
    return AuditContext(
        victim=victim,
        data=data,
        suite=suite,
        seed=0,
        subject=ModelInfo(
            label="m", name="m", parameters=1, fingerprint="", black_box=black_box, random=traits.stochastic
        ),
        clean=accuracy_rate(score(predictions, data.test)),
        predictions=predictions,
    )


@contextmanager
def held(
    model: nn.Module, data: Dataset, eps: tuple[float, ...], *, black_box: bool = False, **settings: Any
) -> Iterator[AuditContext]:
    """Hold a model as an audit does, with few images and steps."""
    suite = Suite(**{"eps": eps, "pgd_steps": 20, "pgd_restarts": 1, "sample": 100, "suite_images": 0} | settings)
    with Victim(model, fast=not black_box) as victim:
        yield evidence_of(victim, data, suite, black_box=black_box)


class Bent(torch.autograd.Function):
    """The images themselves, with a gradient that a function makes of the true one."""

    @staticmethod
    def forward(ctx, x, bend):
        ctx.bend = bend
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.bend(gradient), None


class Around(nn.Module):
    """A network behind a function of it and its images."""

    def __init__(self, net, function):
        super().__init__()
        self.net, self.function = net, function

    def forward(self, x):
        return self.function(self.net, x)

"""The certified stage: lower bounds on the accuracy under any perturbation, beside what the crafted one leaves."""

from __future__ import annotations

import torch
from torch import nn

from gambeson.analysis.certified import LARGEST, Bound, bounded
from gambeson.analysis.chain import chain_of
from gambeson.auditing.context import AuditContext
from gambeson.auditing.results import CertifiedResult
from gambeson.auditing.suite import Suite
from gambeson.base import UserError
from gambeson.data import Dataset
from gambeson.evaluation import BlackBox
from gambeson.evaluation.universal import accuracy_rate
from gambeson.victim import Victim, predict, score

IMAGES = 100
"""Test images of the stratified sample that is bounded, at the most (ours)."""


def check(suite: Suite, data: Dataset, model: nn.Module) -> None:
    """Refuse, before any work, what there are no bounds for.

    Raises:
        UserError: another norm than inf, label maps, a black box, a random model, or one with other layers than
            :func:`gambeson.analysis.certified_accuracy` knows.
    """
    if not suite.certified:
        return
    data.test.task.require_classification("a certified accuracy")
    if suite.norm != "inf":
        raise UserError(f"certified bounds are for the norm inf, and the audit's is {suite.norm}: leave them out")
    if max(suite.eps, default=0.0) >= LARGEST:
        raise UserError(f"certified bounds are for radii below {LARGEST:g}, and eps = {max(suite.eps):g} was given")
    if isinstance(model, BlackBox):
        raise UserError(f"certified bounds need the model's weights, and {model.title} is a black box: leave them out")
    with Victim(model) as victim:
        images, _ = data.test.take(slice(0, 8), victim.device)
        if victim.inspect(images).stochastic:
            raise UserError("the model is random, and certified bounds are those of a function: leave them out")
    try:
        chain_of(model, images[:1])
    except UserError as error:
        raise UserError(f"no accuracy can be certified, as {error}; leave suite.certified out") from None


def one_bound(model: nn.Module, data: Dataset, eps: float) -> Bound:
    """Return the bound of one test image, as a measure of what bounds cost."""
    (image, *_), (label, *_) = data.test.take(slice(0, 1), "cpu")
    with torch.no_grad():
        return Bound.of(chain_of(model, image[None]), image.double().flatten(), int(label), eps)


def measure(context: AuditContext) -> list[CertifiedResult]:
    """Bound the accuracy at every eps of the curve, on the same few images; empty where the suite does not ask.

    Beside each bound stands the accuracy on these images under the perturbation of that eps.
    """
    if not context.suite.certified:
        return []
    few, victim, found = context.few(IMAGES), context.victim, []
    layers = chain_of(victim.model, few.take(slice(0, 1), "cpu")[0])
    for point in context.universal:
        bounds = bounded(layers, few, point.eps, victim.before_call)
        delta = context.uaps[point.eps].delta.to(victim.device)
        attacked = accuracy_rate(score(predict(victim, few, delta), few))
        found.append(CertifiedResult(bounds=bounds, attacked=attacked))
    return found

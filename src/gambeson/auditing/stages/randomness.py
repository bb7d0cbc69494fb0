"""The randomness stage: accuracy of a random model over several passes, and with the noise off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch

from gambeson.attacks import GradientAttack
from gambeson.auditing.context import AuditContext
from gambeson.auditing.derandomize import Derandomize
from gambeson.auditing.outcome import AsFarAsFinite
from gambeson.auditing.results import RandomnessResult
from gambeson.base import seeded
from gambeson.evaluation import Rate
from gambeson.evaluation.universal import accuracy_rate
from gambeson.models import injections, noise_off
from gambeson.tasks import Task
from gambeson.victim import Victim, predict, score
from gambeson.victim.inspect import CALLS

ELSEWHERE = (
    "not turned off: two passes differ although every random draw of torch was replaced by its mean, so the randomness "
    "comes from elsewhere (Python, NumPy, the clock, a state kept between calls)"
)


def measure(context: AuditContext) -> RandomnessResult | None:
    """Take ``suite.votes`` passes over the clean test images, and one with the noise off; None for other models."""
    if not context.subject.random:
        return None
    values = []
    for number in range(context.suite.votes):
        with seeded(context.seed, "draw", number), one_pass(context.victim):
            values.append(accuracy_rate(score(predict(context.victim, context.test), context.test)).value)
    quiet, how = _without_noise(context)
    return RandomnessResult(
        votes=len(values),
        mean=fmean(values),
        spread=stdev(values) if len(values) > 1 else 0.0,
        lowest=min(values),
        highest=max(values),
        majority=context.clean,
        noise_off=quiet,
        noise_off_by=how,
    )


@contextmanager
def one_pass(victim: Victim) -> Iterator[None]:
    """Use a single vote inside the block."""
    before, victim.votes = victim.votes, 1
    try:
        yield
    finally:
        victim.votes = before


def _without_noise(context: AuditContext) -> tuple[Rate | None, str]:
    how = way_to_quiet(context)
    if how not in QUIET:
        return None, how
    with QUIET[how](context.victim), one_pass(context.victim):
        found = score(predict(context.victim, context.test), context.test)
    return accuracy_rate(found), how


def way_to_quiet(context: AuditContext) -> str:
    """Return the first of :data:`QUIET` that makes a random model deterministic, or why none does."""
    if context.subject.black_box:
        return "not turned off: only queries are possible"
    images, _ = context.sample.take(slice(0, 8), context.victim.device)
    reason = ELSEWHERE
    for how, quiet in QUIET.items():
        if how == SWITCHES and not injections(context.victim.model):
            continue
        # Foreign models may fail in any way if their draws are replaced.
        try:
            with torch.no_grad(), quiet(context.victim):
                first, *others = [context.victim.forward_original(images) for _ in range(CALLS)]
        except Exception as error:
            reason = f"not turned off: the model does not run without its noise ({type(error).__name__}: {error})"
            continue
        if all(torch.equal(first, other) for other in others):  # two of few draws are often the same
            return how
    return reason


@dataclass(frozen=True)
class NoiseOff:
    """The attack of a random model that crafts with its noise off; the images come back for whoever judges them."""

    how: str
    """One of :data:`QUIET`."""
    attack: GradientAttack

    def __call__(
        self, model: Victim, x: torch.Tensor, y: torch.Tensor, *, seed: int = 0, task: Task | None = None
    ) -> torch.Tensor:
        """Return perturbed images, the best so far if a gradient is not finite."""
        with Victim(model.model) as still, QUIET[self.how](still):  # of its own: a fast copy has switches of its own
            still.temperature, still.allow_no_graph = model.temperature, model.allow_no_graph
            still.most, still.before_call = model.most, model.before_call
            moved = AsFarAsFinite(self.attack)(still, x, y, seed=seed, task=task)
        model.forwards, model.backwards = model.forwards + still.forwards, model.backwards + still.backwards
        return moved

    def plain(self) -> dict[str, Any]:
        """Return the settings as plain data."""
        return {"noise_off_by": self.how, **self.attack.plain()}


@contextmanager
def _switched(victim: Victim) -> Iterator[None]:
    with noise_off(victim.model):
        yield


@contextmanager
def _averaged(victim: Victim) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(noise_off(victim.model))  # these draw in separate threads, which the mode does not reach
        stack.enter_context(Derandomize())
        yield


SWITCHES = "the switches of the model's noise modules"
QUIET: dict[str, Callable[[Victim], Any]] = {
    SWITCHES: _switched,
    "every random draw of torch replaced by its mean (dropout by all of its input)": _averaged,
}
"""Ways to turn a model's randomness off from outside, as contexts of a victim, least invasive first."""

"""A model whose answers are not the same twice: what one draw says of it is chance, in a rate and in a gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gambeson.attacks import PGD
from gambeson.auditing.context import AuditContext
from gambeson.auditing.diagnostics.base import Finding, register
from gambeson.auditing.outcome import AsFarAsFinite, PairedDifference
from gambeson.auditing.stages.randomness import QUIET, NoiseOff, way_to_quiet
from gambeson.evaluation.outcome import outcome
from gambeson.tasks import Counts, Task
from gambeson.victim import Victim

_STEPS = 10
_FAR = 0.1
_NOT_RANDOM = Finding(None, "two calls with the same images agree, or nearly so: the model is not random")


@register(
    "deterministic or majority vote",
    condition="the model is random and its numbers come from a single pass",
    explanation="One pass over a random model is chance: an image that is right in it may be wrong in the next.",
    remedy="Let the majority of many passes decide (votes=21), and report the spread between passes.",
    gradients=False,
)
def _one_draw(context: AuditContext) -> Finding:
    if not context.subject.random:
        traits = context.victim.traits
        if traits is None or not traits.varies:
            return Finding(True, "two calls with the same images agree, so one pass decides")
        noise = f"{100 * traits.noise:.2g} % of what tells classes apart"
        return Finding(True, f"calls with the same images differ by {noise}, which moves hardly an answer: one decides")
    votes = context.suite.votes
    if votes == 1:
        return Finding(False, "the model is random and every image was decided by a single pass", {"votes": 1})
    found = context.randomness
    each = f"; a single pass gets {100 * found.mean:.1f} % ± {100 * found.spread:.1f} of clean images" if found else ""
    return Finding(
        True,
        f"the model is random, and the majority of {votes} passes decides every image{each}",
        {"votes": votes},
    )


def _attack(context: AuditContext, eot_samples: int | None) -> PGD:
    return PGD(eps=context.eps, norm=context.suite.norm, steps=_STEPS, eot_samples=eot_samples)


@register(
    "no EOT gap",
    condition="averaging gradients over twice as many draws, or over one alone, clearly breaks more images",
    explanation="The attacks followed the noise of too few draws, or a mean that misleads (expectation over "
    "transformation, Athalye et al. 2018, section 4.2): a stronger attack is known, and the numbers are not it.",
    remedy="Raise eot_samples until more of them change nothing; where one does better, lower them to it.",
    comparisons=2,
)
def _more_draws(context: AuditContext) -> Finding:
    if not context.subject.random:
        return _NOT_RANDOM
    usual = context.suite.eot_samples
    many = max(2 * usual, 10)
    one, some, more = (context.outcome(_attack(context, eot_samples)) for eot_samples in (1, usual, many))
    gain = max((PairedDifference.of(some, other) for other in (one, more)), key=lambda gain: gain.low)
    return Finding(
        gain.low <= 0,
        f"accuracy under PGD whose gradients are averaged over one draw {one.accuracy}, over {usual} draws "
        f"{some.accuracy}, over {many} draws {more.accuracy}; the better of the others breaks "
        f"{gain.beyond()}",
        {"one": one.accuracy.value, "usual": some.accuracy.value, "more": more.accuracy.value, "gain": gain.value},
    )


@dataclass(frozen=True)
class _Nothing:
    def __call__(
        self, model: Victim, x: torch.Tensor, y: torch.Tensor, *, seed: int = 0, task: Task | None = None
    ) -> torch.Tensor:
        return x


@register(
    "no noise-off gap",
    condition="perturbations crafted with the noise off break clearly more than those crafted through it, or "
    f"clearly more than {100 * _FAR:g} % of the images that are right either way stand only while the noise is on; of "
    "label maps, so many pixels, less those that the noise alone makes wrong",
    explanation="The robustness comes from the randomness, which misleads the attack; the model behind it has none "
    "(Athalye et al. 2018, section 4.2).",
    remedy="Report the number with the noise off beside it; attack with more draws, more steps, and from what was "
    "crafted with the noise off.",
    comparisons=2,
)
def _noise_off(context: AuditContext) -> Finding:
    if not context.subject.random:
        return _NOT_RANDOM
    how = way_to_quiet(context)
    if how not in QUIET:
        return Finding(None, f"the noise was {how}")
    attack = _attack(context, None)
    with Victim(context.victim.model) as still, QUIET[how](still):
        still.temperature, still.allow_no_graph = context.victim.temperature, context.victim.allow_no_graph
        attacks = AsFarAsFinite(_Nothing()), AsFarAsFinite(attack)
        clean_off, off = (outcome(still, context.sample, one, context.seed) for one in attacks)
    context.victim.forwards += still.forwards
    context.victim.backwards += still.backwards
    clean_on, on = context.outcome(_Nothing()), context.outcome(attack)
    moved = context.outcome(NoiseOff(how, attack))
    helped = PairedDifference.of(on, moved)
    if context.sample.task.per_image_label:
        both = (clean_on.right == clean_on.total) & (clean_off.right == clean_off.total)
        if not bool(both.any()):
            return Finding(None, f"no image of {len(both)} is right when clean both with the noise on and with it off")
        carried, of = PairedDifference.of(_only(on, both), _only(off, both)), "of images that are right when clean"
    else:
        lost = (Counts(one.right - clean.right, one.total) for one, clean in ((on, clean_on), (off, clean_off)))
        carried, of = PairedDifference.of(*lost), "of pixels, beyond those that are wrong when clean"
    return Finding(
        helped.low <= 0 and carried.low <= _FAR,
        f"accuracy under PGD {on.accuracy} with the noise on, {off.accuracy} with it off, and {moved.accuracy} with "
        f"it on for what was crafted with it off ({how}); {of} either way, "
        f"{carried.beyond(_FAR)} fall with the noise off, and the crafted ones break {helped.beyond()}",
        {"on": on.accuracy.value, "off": off.accuracy.value, "crafted_off": moved.accuracy.value, "gap": carried.value},
    )


def _only(found: Counts, rows: torch.Tensor) -> Counts:
    return Counts(found.right[rows], found.total[rows])

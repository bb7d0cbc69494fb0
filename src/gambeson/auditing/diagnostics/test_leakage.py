"""Images that nobody reports on: what a model withstands on the test split, it must withstand there too."""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist

import torch

from gambeson.attacks import PGD, Loss
from gambeson.auditing.context import MARGIN_STEPS, WIDER, AuditContext, Where
from gambeson.auditing.diagnostics.base import Finding, register
from gambeson.auditing.outcome import LEVEL, POWER, AsFarAsFinite, PairedDifference, lower_end
from gambeson.base import eps_text, generator
from gambeson.data import Split
from gambeson.evaluation.classes import area_under_curve
from gambeson.evaluation.outcome import at_once, outcome, outcome_under
from gambeson.tasks import Counts, Rate
from gambeson.threat.edits import moved
from gambeson.victim import predict, score

_MORE = 0.03
"""Difference beyond which it counts: two honest splits of one data set differ a little, and the perturbation that is
tried was the best of several on validation. Ours."""
_EVEN = 0.5 + _MORE
"""Share of pairs of a test and a validation image of which the former may have the larger margin. Of honest networks
of the testbed 0.50 to 0.53, clean and attacked; of one that was trained on adversarial examples of the test images 0.61
attacked, of one that adds the labels of coarse copies of them 0.66 clean. Ours."""

_LEAST, _MOST, _SCALE, _SHIFT = 4, 12, 0.06, 0.5
"""An edit that leaves honest networks of the testbed right on nine images of ten, drawn for each image, so that no
copies can be stored that it makes: degrees of rotation either way, a share of scale, and pixels of shift. Ours."""
_FEWER = 0.3
"""Which share of images more PGD may break once they are rotated, or once they are blended. Of networks that know no
image, rotation costs most where classifiers compare images with stored ones (up to 0.54, and blends 0.16), and blends
there and where training was adversarial, on MNIST (0.37, and rotation 0.20); both together 0.27 at most. Where all
splits are stored, 0.92 and 0.44, and 0.54 and 0.39 where copies rotated by ten degrees are as well. Ours."""


@register(
    "no test-set leakage",
    condition="under one perturbation clearly more test images than validation images keep their answer, by "
    f"{100 * _MORE:g} points; or in clearly more than {100 * _EVEN:g} % of pairs of a test and a validation image the "
    "former has the larger margin, clean or after the same short PGD; of label maps, under PGD more pixels keep theirs",
    explanation="The model withstands more on the images that it is scored on than on others of the same kind: it "
    "knows them, or the test split is easier than the data.",
    remedy="Find out whether the test images, or near copies of them, went into the model; score it on images that "
    "nobody has seen.",
    gradients=False,
    comparisons=3,
)
def _alike(context: AuditContext) -> Finding:
    splits = [context.test, context.data.validation]
    if context.subject.black_box:  # every image costs a query
        splits = [context.sample, context.unseen]
    delta = context.uaps[context.eps].delta
    pairs = {"the perturbation": [outcome_under(context.victim, split, delta) for split in splits]}
    orders: dict[str, Rate] = {}
    if not (context.subject.black_box or context.test.task.per_image_label):
        pgd = context.pgd
        pairs["PGD"] = [context.outcome(pgd), context.outcome(pgd, "unseen")]
    elif not context.subject.black_box:
        orders = {"clean": _order(context, 0), f"after PGD of {MARGIN_STEPS} steps": _order(context, MARGIN_STEPS)}
    gains = {name: PairedDifference.across(test, other) for name, (test, other) in pairs.items()}
    worst = max(gains, key=lambda name: gains[name].low)
    test, other = (found.accuracy for found in pairs[worst])
    of = "the" if context.test.task.per_image_label else "the pixels of"
    detail = (
        f"under {worst} of eps {eps_text(context.eps)} {test} of {of} test images stand and {other} of {of} "
        f"validation images, of which it breaks {gains[worst].beyond(_MORE)}"
    )
    numbers = {"test": test.value, "validation": other.value, "gap": gains[worst].value}
    if not orders:
        return Finding(gains[worst].low <= _MORE, detail, numbers)
    how = max(orders, key=lambda how: lower_end(orders[how]))
    order, low = orders[how], lower_end(orders[how])
    return Finding(
        gains[worst].low <= _MORE and low <= _EVEN,
        f"{detail}; {how} the test image has the larger margin in {order} of pairs, "
        f"at least {100 * low:.1f} % ({100 * _findable(order):.1f} % would be found, with {100 * POWER:g} % power)",
        numbers | {"order": order.value},
    )


@register(
    "sample like the other images",
    condition="an attack that every image gets leaves clearly more, or clearly fewer, images right of the sample that "
    "checks look at than of the other test images",
    explanation="What checks find on the sample does not hold for the rest: the model may know which images they are.",
    remedy="Audit with another seed, which draws another sample, and find what the model compares its images with.",
    gradients=False,
    needs=("per-image",),
)
def _like_the_rest(context: AuditContext) -> Finding:
    test = context.test
    drawn = torch.zeros(len(test), dtype=torch.bool)
    drawn[test.sample_indices(min(context.suite.sample, len(test)), seed=context.seed)] = True
    kept = {one.attack: context.outcomes.of(f"per_image:{one.attack}") for one in context.per_image}
    whole = {name: found[1] for name, found in kept.items() if found is not None and len(found[0]) == len(test)}
    if bool(drawn.all()) or not whole:
        return Finding(None, "checks look at every image" if whole else "no attack was made on all test images")
    level = LEVEL / (2 * len(whole))
    parts = {
        name: [Counts(one.right[rows], one.total[rows]) for rows in (drawn, ~drawn)] for name, one in whole.items()
    }
    gaps = {
        name: max((PairedDifference.across(*pair, level=level) for pair in (both, both[::-1])), key=lambda gap: gap.low)
        for name, both in parts.items()
    }
    worst = max(gaps, key=lambda name: gaps[name].low)
    inside, outside = (one.accuracy for one in parts[worst])
    return Finding(
        gaps[worst].low <= 0,
        f"under {worst} {inside} of the {int(drawn.sum())} images of the sample stand, and {outside} of the others",
        {"sample": inside.value, "others": outside.value},
    )


@register(
    "rotated and blended images stand too",
    condition=f"of the test images that are right as they are and rotated by {_LEAST} to {_MOST} degrees, clearly more "
    f"than {100 * _FEWER:g} % withstand PGD as they are and no longer once they are rotated, and likewise once each is "
    "blended half and half with another of its class",
    explanation="The model withstands attacks around the very images that it is scored on, and not around others that "
    "look alike: it seems to have stored them, and perhaps those of all splits, which then stand as well as they do.",
    remedy="Score it on images that were made after it; attack it around edited ones, which are no copies.",
    comparisons=2,
)
def _alike_too(context: AuditContext) -> Finding:
    if not context.test.task.per_image_label:
        return Finding(None, "label maps would have to be rotated along")
    said: list[str] = []
    numbers: dict[str, float] = {}
    for name, edit in (("rotated", _rotated), ("blended", _blended)):
        try:
            as_is, moved, gain = _beside(context, edit)
        except _NoneRight:
            return Finding(None, f"no image of the sample is right as it is and {name}", numbers)
        numbers |= {f"as they are, beside {name}": as_is.value, name: moved.value}
        said.append(
            f"of {as_is.n} images that are right as they are and {name}, {as_is} withstand PGD of eps "
            f"{eps_text(context.eps)} as they are, {moved} {name}: that breaks {gain.beyond(_FEWER)}"
        )
        if gain.low <= _FEWER:  # one that stands beside itself is enough
            return Finding(True, "; ".join(said), numbers)
    return Finding(False, "; ".join(said), numbers)


Moved = Callable[[torch.Tensor, torch.Tensor, torch.Generator], torch.Tensor]
"""Images (N, C, H, W), their labels (N,) and a generator to other images of the same classes."""


def _rotated(images: torch.Tensor, labels: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Return each image rotated, and a little scaled and shifted, by what is drawn for it."""
    way, angle, scale, right, down = torch.rand(5, len(images), generator=draw)
    degrees = (_LEAST + (_MOST - _LEAST) * angle) * torch.where(way < 0.5, -1, 1)
    shift = _SHIFT * (2 * torch.stack([right, down], 1) - 1)
    return moved(images, degrees.deg2rad(), 1 + _SCALE * (2 * scale - 1), shift).clamp(0, 1)


def _blended(images: torch.Tensor, labels: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Return the mean of each image and another of its class; of a class with one image, that image."""
    blended, order = images.clone(), torch.randperm(len(images), generator=draw)
    for label in labels.unique():
        rows = order[labels[order] == label]
        blended[rows] = (images[rows] + images[rows.roll(1)]) / 2
    return blended


class _NoneRight(Exception):
    """No image is right both ways, so that there is nothing to attack."""


def _beside(context: AuditContext, edit: Moved) -> tuple[Rate, Rate, PairedDifference]:
    """Return what stands of the images that are right as they are and edited, both ways, and the paired difference."""
    victim, attack = context.victim, AsFarAsFinite(context.averaged(context.pgd))
    found: list[tuple[Rate, Rate]] = []

    def counts(on: Where) -> tuple[Counts, Counts]:
        split = getattr(context, on)
        images, labels = split.take(slice(None), "cpu")
        edited = split.with_images(edit(images, labels, generator(context.seed, "beside")))
        clean = [score(predict(victim, one, seed=context.seed), one).counts.right > 0 for one in (split, edited)]
        rows = (clean[0] & clean[1]).nonzero().flatten()
        if not len(rows):
            raise _NoneRight
        left = context.outcome(context.pgd, on), outcome(victim, edited, attack, context.seed)
        as_is, moved = (Counts(one.right[rows], one.total[rows]) for one in left)
        found.append((as_is.accuracy, moved.accuracy))
        return as_is, moved

    gain = context.compare_counts(counts, _FEWER)
    return *found[-1], gain


def _order(context: AuditContext, steps: int) -> Rate:
    """Return in how many pairs of a test and a validation image the former has the larger margin, ties half.

    Which images are right under an attack tells of each image one bit, their margins all of what was learnt of it: an
    honest network has seen neither split, so that both orders are as frequent.

    Args:
        context: of the audit.
        steps: of PGD before; 0: clean.
    """
    splits = [context.few(WIDER * context.suite.sample, split) for split in (context.test, context.data.validation)]
    margins = [_margins(context, split, steps) for split in splits]
    return area_under_curve(torch.cat(margins), torch.arange(sum(map(len, margins))) < len(margins[0]))


def _margins(context: AuditContext, split: Split, steps: int) -> torch.Tensor:
    """Return the margins (N,) that so many steps of PGD leave, of a random model at one draw."""
    victim, loss = context.victim, Loss(kind="margin")
    settings = {"eps": context.eps, "norm": context.suite.norm, "steps": max(1, steps), "eot_samples": 1}
    attack, found = AsFarAsFinite(PGD(loss="margin", early_stop=False, **settings)), []
    for images, labels in split.batches(at_once(split), device=victim.device):
        moved = attack(victim, images, labels, seed=context.seed, task=split.task) if steps else images
        with torch.no_grad():
            found.append(-loss(victim.forward_original(moved), labels, split.task).double().cpu())
    return torch.cat(found).nan_to_num(0.0)


def _findable(order: Rate) -> float:
    """Return the share of pairs that is found to be above the limit with probability :data:`POWER`."""
    normal, n = NormalDist(), order.effective or order.n
    return min(1.0, _EVEN + (normal.inv_cdf(1 - LEVEL) + normal.inv_cdf(POWER)) / (2 * n**0.5))

"""Sharing metrics: how strongly inputs, or ensemble members, share their worst directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from gambeson.analysis.inputs import classifier, forward, labelled
from gambeson.analysis.jacobian import Spread, batch_jacobian, classes_of, frobenius, rows_at
from gambeson.analysis.matrix_free import batches_of
from gambeson.analysis.stacked import stacked_spectrum
from gambeson.base import Config, UserError, generator
from gambeson.base.checks import as_images
from gambeson.threat import Norm
from gambeson.victim import Source, Victim, as_victim

PairMetric = Literal["cos_F", "ratio_s", "rank1", "cka"]
"""The four pair metrics; the paper's is ``cos_F``."""

_BYTES = 2**26


def pair_metrics(first: torch.Tensor, second: torch.Tensor) -> dict[PairMetric, torch.Tensor]:
    """Return the four pair metrics of Jacobians (P, K, D) and (P, K, D), each (P,).

    cos_F = <J_1, J_2>_F / (||J_1||_F ||J_2||_F), in [-1, 1]; ratio_s = sigma_1([J_1; J_2])^2 / (sigma_1(J_1)^2 +
    sigma_1(J_2)^2), in [1/2, 1]; rank1 = sigma_1([J_1; J_2])^2 / ||[J_1; J_2]||_F^2, in (0, 1]; cka =
    ||J_1 J_2^T||_F^2 / (||J_1 J_1^T||_F ||J_2 J_2^T||_F), in [0, 1]. Only cos_F is from the paper (Co et al.
    2021). All are computed from K x K products. NaN if a Jacobian is zero.
    """
    own, other, cross = (
        (a @ b.transpose(1, 2)).double() for a, b in ((first, first), (second, second), (first, second))
    )
    both = torch.cat([torch.cat([own, cross], 2), torch.cat([cross.transpose(1, 2), other], 2)], 1)
    top, top_own, top_other = (torch.linalg.eigvalsh(gram)[:, -1] for gram in (both, own, other))
    size_own, size_other = (gram.diagonal(dim1=1, dim2=2).sum(1) for gram in (own, other))
    lengths = (gram.flatten(1).norm(dim=1) for gram in (own, other))
    values: dict[PairMetric, torch.Tensor] = {
        "cos_F": cross.diagonal(dim1=1, dim2=2).sum(1) / (size_own * size_other).sqrt(),
        "ratio_s": top / (top_own + top_other),
        "rank1": top / (size_own + size_other),
        "cka": cross.flatten(1).square().sum(1) / torch.stack(tuple(lengths)).prod(0),
    }
    dead = (size_own == 0) | (size_other == 0)
    return {name: value.masked_fill(dead, torch.nan) for name, value in values.items()}


@dataclass(frozen=True)
class PairSharing:
    """Pair metrics of random pairs, half within a class and half between two."""

    pairs: torch.Tensor
    """(P, 2): indices into the set."""
    same_class: torch.Tensor
    """(P,) bool."""
    values: dict[PairMetric, torch.Tensor]
    """Each (P,); NaN if a Jacobian is zero."""

    def spread(self, metric: PairMetric = "cos_F", same_class: bool | None = None) -> Spread | None:
        """Summarise one metric over all pairs, or those within (True) or between (False) classes; None without any."""
        chosen = self.values[metric].isfinite()
        if same_class is not None:
            chosen = chosen & (self.same_class == same_class)
        return Spread.of(self.values[metric][chosen])


def pair_sharing(model: Source, data: Any, *, pairs: int = 1000, seed: int = 0) -> PairSharing:
    """Measure the pair metrics on random pairs, half within a class and half between two.

    The protocol is ours (the paper's is not known to us). Pairs are drawn with replacement; the two images of a pair
    differ. Cost: 2 forwards and 2 K backwards per pair.

    Args:
        model: a module or a victim.
        data: a split, a dataset (its test split) or a pair (images, labels).
        pairs: number of pairs.
        seed: of the draw, which depends only on it and the labels, so that models on one set get the same pairs.

    Raises:
        UserError: fewer than 2 pairs, or no class with two images, or one class only.
    """
    parts: list[dict[PairMetric, torch.Tensor]] = []
    with classifier(model, data, seed) as (victim, split):
        index = draw_pairs(split.labels.cpu(), pairs, seed)
        width = 4 * torch.Size(split.shape).numel() * classes_of(victim, split)
        for some in index.split(max(1, min(128, _BYTES // (2 * width)))):
            images, _ = split.take(some.T.flatten(), victim.device)
            first, second = rows_at(victim, images)[0].chunk(2)
            parts.append(pair_metrics(first, second))
    names: tuple[PairMetric, ...] = get_args(PairMetric)
    values = {name: torch.cat([part[name] for part in parts]).cpu() for name in names}
    return PairSharing(index, split.labels.cpu()[index].diff(dim=1).flatten() == 0, values)


def draw_pairs(labels: torch.Tensor, pairs: int, seed: int) -> torch.Tensor:
    """Draw index pairs (P, 2): the first half of equal labels, the rest of different ones.

    The first image is drawn uniformly among those with a partner, then the partner uniformly among its partners.
    """
    if pairs < 2:
        raise UserError(f"pairs = {pairs}: expected 2 or more, half within a class and half between two")
    counts = labels.bincount()
    if int(counts.max()) < 2 or int((counts > 0).sum()) < 2:
        raise UserError("pairs within and between classes need two classes, one of them with two images: give more")
    draw = generator(seed, "pairs")
    order = labels.argsort(stable=True)
    place = order.argsort()  # rank of each image in the order of classes
    start = counts.cumsum(0) - counts
    paired = (counts[labels] > 1).nonzero().flatten()
    within, between = pairs // 2, pairs - pairs // 2
    a = paired[torch.randint(len(paired), (within,), generator=draw)]
    # One of the other count - 1 images of the class.
    skip = 1 + (torch.rand(within, generator=draw) * (counts[labels[a]] - 1)).long()
    b = order[start[labels[a]] + (place[a] - start[labels[a]] + skip) % counts[labels[a]]]
    c = torch.randint(len(labels), (between,), generator=draw)
    others = len(labels) - counts[labels[c]]
    skip = (torch.rand(between, generator=draw) * others).long()
    d = order[(start[labels[c]] + counts[labels[c]] + skip) % len(labels)]
    return torch.cat([torch.stack([a, b], 1), torch.stack([c, d], 1)])


def sharing_factor(model: Source, data: Any, *, seed: int = 0) -> float:
    """Return rho(X) = sigma_1(Jbar)^2 / sum_i sigma_1(J_i)^2 of a set, in [1/N, 1].

    1: all inputs share one worst direction; 1/N: theirs are orthogonal. NaN if every Jacobian is zero.
    Cost: one forward and K backwards per image, images of more than 4096 values several times.

    Args:
        model: any module from pixels to logits (N, K), or a victim.
        data: a split, an (images, labels) pair, or a data set, of which the test split is used.
        seed: of the start of the iterations for large images.
    """
    small = torch.Size(labelled(data).shape).numel() <= 4096
    found = stacked_spectrum(model, data, method="gram" if small else "rows", seed=seed)
    return float("nan") if found.shared is None else found.shared


class GradientSharing(Config):
    """First-order gains of universal and per-image perturbations, per unit of eps."""

    ratio: float | None
    """||sum_i g_i||* / sum_i ||g_i||*, in [0, 1]: 1 is one gradient direction for all images. None without any
    gradient."""
    universal: float
    """||sum_i g_i||* / N: increase of the mean loss per unit of eps under the best shared perturbation."""
    per_image: float
    """sum_i ||g_i||* / N: the same with one perturbation per image."""
    norm: Norm


def gradient_sharing(model: Source, data: Any, *, norm: Norm = "inf") -> GradientSharing:
    """Measure sharing from loss gradients: the cheap version, one backward per batch.

    g_i is the gradient of the cross-entropy at x_i, ||.||* the dual of the ball's norm (L1 for inf, L2 for 2, Linf
    for 1). Gradients saturate where the model is confident; the Jacobians of :func:`sharing_factor` do not.

    Args:
        model: a module or a victim.
        data: a split, a dataset (its test split) or a pair (images, labels).
        norm: of the perturbation.
    """
    order = {"inf": 1.0, "2": 2.0, "1": torch.inf}[norm]
    single = 0.0
    with classifier(model, data) as (victim, split):
        total = torch.zeros(split.shape, dtype=torch.float64, device=victim.device)
        for images, labels in batches_of(victim, split):
            point, logits = forward(victim, images)
            with torch.enable_grad():
                value = torch.nn.functional.cross_entropy(logits, labels.clone(), reduction="sum")
            gradient = victim.gradient(value, point, len(point)).double()
            total += gradient.sum(0)
            single += float(gradient.flatten(1).norm(p=order, dim=1).sum())
    shared = float(total.flatten().norm(p=order))
    return GradientSharing(
        ratio=shared / single if single > 0 else None,
        universal=shared / len(split),
        per_image=single / len(split),
        norm=norm,
    )


def diversity_gain(members: Sequence[nn.Module | Victim], images: torch.Tensor) -> torch.Tensor:
    """Return D = ||mean_m J_m||_F^2 / mean_m ||J_m||_F^2 at every image, (N,), in [0, 1].

    1 for copies, 1/M for M orthogonal Jacobians of equal size, below 1/M if members cancel. NaN if every member's
    Jacobian is zero. Cost per image: M forwards and M K backwards.

    Args:
        members: modules or victims of the same classes in the same order.
        images: (N, C, H, W) in [0, 1].

    Raises:
        UserError: no members, or outputs of different shapes.
    """
    images = as_images(images, floats=True)
    mean, size = None, torch.zeros(len(images), device=images.device, dtype=torch.float64)
    with as_victim(members) as average:
        for member in average.members:
            jacobian = batch_jacobian(member, images)
            if mean is not None and mean.shape != jacobian.shape:
                raise UserError(
                    f"members return {mean.shape[1]} and {jacobian.shape[1]} logits: choose members of the same classes"
                )
            size += frobenius(jacobian).double().square() / len(members)
            mean = jacobian / len(members) if mean is None else mean.add_(jacobian, alpha=1 / len(members))
    assert mean is not None
    return frobenius(mean).double().square() / size


class UniversalAlignment(Config):
    """Alignment of the members' universal directions: sigma_1 of the mean's stack relative to the members'."""

    joint: float
    """sigma_1(mean_m Jbar_m), the stack of the mean logits."""
    members: tuple[float, ...]
    """sigma_1(Jbar_m)."""
    ratio: float | None
    """``joint`` over the mean of ``members``, in [0, 1]; 1: one perturbation is best against all. None if every
    Jacobian is zero."""
    directions: tuple[tuple[float, ...], ...]
    """|cosine| between the top directions of each pair of members."""


def universal_alignment(members: Sequence[nn.Module | Victim], data: Any, *, seed: int = 0) -> UniversalAlignment:
    """Measure the alignment of the members' universal directions.

    Cost: two stacked spectra per member: its own, and within the mean.

    Args:
        members: modules or victims of the same classes in the same order.
        data: a split, a dataset (its test split) or a pair (images, labels).
        seed: of the Lanczos start.

    Raises:
        UserError: no members.
    """
    with as_victim(members) as mean:
        found = [stacked_spectrum(victim, data, seed=seed) for victim in mean.members]
        joint = stacked_spectrum(mean, data, seed=seed)
    sigmas = tuple(float(spectrum.values[0].clamp(min=0)) ** 0.5 for spectrum in found)
    top = torch.stack([spectrum.directions[0].flatten() for spectrum in found])
    own = float(joint.values[0].clamp(min=0)) ** 0.5
    return UniversalAlignment(
        joint=own,
        members=sigmas,
        ratio=own / (sum(sigmas) / len(sigmas)) if any(sigmas) else None,
        directions=tuple(tuple(row) for row in (top @ top.T).abs().tolist()),
    )

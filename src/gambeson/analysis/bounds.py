"""The linearised model, and the bounds on universal perturbations that hold for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gambeson.analysis.inputs import classifier, labelled, margins
from gambeson.analysis.matrix_free import Linearised, batches_of
from gambeson.analysis.stacked import LARGEST, Spectrum, StackedGram, stacked_grams, stacked_spectrum
from gambeson.base import Config, UserError, generator
from gambeson.data import Split
from gambeson.threat import perturb
from gambeson.victim import Source, Victim, predicted


@dataclass(frozen=True)
class Linear:
    """First-order changes of every image's logits under R shared perturbations, with the errors of both models."""

    logits: torch.Tensor
    """(N, K), clean."""
    margin: torch.Tensor
    """(N,): f_y minus the largest other logit; not positive for misclassified images."""
    change: torch.Tensor
    """(R, N, K): J_i delta_r."""
    errors: list[int]
    """(R): images misclassified by the linearised model f(x_i) + J_i delta_r."""
    measured_errors: list[int]
    """(R): images misclassified by the model itself at clip(x_i + delta_r)."""
    rest: torch.Tensor
    """(R, N): ||f(x_i + delta_r) - f(x_i) - J_i delta_r||_2 at the clipped image, the linearisation error."""


def linearise(model: Source, data: Any, perturbations: torch.Tensor) -> Linear:
    """Apply shared perturbations to the linearised model and to the model itself.

    Cost per image: 1 + R forwards and 1 + R backwards.

    Args:
        model: a module or a victim.
        data: a split, a dataset (its test split) or a pair (images, labels).
        perturbations: (R, C, H, W), in pixel units.
    """
    parts: list[tuple[torch.Tensor, ...]] = []
    with classifier(model, data) as (victim, split):
        deltas = perturbations.to(victim.device)
        for images, labels in batches_of(victim, split):
            line = Linearised(victim, images)
            change = torch.stack([line.push(delta[None]) for delta in deltas])
            with torch.no_grad():
                truth = torch.stack([victim.forward_original(perturb(images, delta[None])) for delta in deltas])
            moved = line.logits + change
            parts.append(
                (
                    line.logits,
                    margins(line.logits, labels),
                    change.transpose(0, 1),
                    (moved.argmax(2) != labels).T,
                    (torch.stack([predicted(logits) for logits in truth]) != labels).T,
                    (truth - moved).norm(dim=2).T,
                )
            )
    logits, margin, change, wrong, truly, rest = (torch.cat(column) for column in zip(*parts, strict=True))
    return Linear(logits, margin, change.transpose(0, 1), wrong.sum(0).tolist(), truly.sum(0).tolist(), rest.T)


class BoundRow(Config):
    """One perturbation delta with the bounds P1, P2 and P4 (Co et al. 2021).

    Effects are E(delta) = sum_i ||J_i delta||_2^2 over all N images, in squared logits; errors are shares of all N,
    including images misclassified when clean. The bounds hold for the linearised model and unclipped delta; the
    measured error is that of the model at clip(x + delta).
    """

    length_inf: float
    """||delta||_inf."""
    length_2: float
    """||delta||_2."""
    effect: float
    """E(delta)."""
    spectral_bound: float
    """P1: sigma_1^2 ||delta||_2^2."""
    frobenius_bound: float
    """P1: tr G ||delta||_2^2."""
    box_mean: float
    """P2: ||delta||_inf^2 tr G, the mean effect of random signs of this size."""
    box_bound: float
    """P2: ||delta||_inf^2 D sigma_1^2, an upper bound for this norm."""
    box_frobenius_bound: float
    """P2: ||delta||_inf^2 D tr G."""
    linear_error: float
    """Error of the linearised model f(x_i) + J_i delta."""
    counted_error: float
    """P4: images with ||J_i delta||_2 >= m_i / sqrt(2); at least ``linear_error``."""
    effect_error: float
    """P4: 2/N sum_i ||J_i delta||^2 / m_i^2, plus misclassified images; at least ``counted_error``, at most 1."""
    bound_error: float
    """P4: 2/N sigma_1(diag(1/m) Jbar)^2 ||delta||_2^2, plus misclassified images; at most 1."""
    measured_error: float
    """UER: error of the model itself."""

    @property
    def attained(self) -> float:
        """E(delta) over its bound P1, in [0, 1]: 1 for the best universal L2 perturbation."""
        return self.effect / self.spectral_bound if self.spectral_bound > 0 else 0.0


class BoundTable(Config):
    """Bounds and measured errors for several perturbations of one model, in the order given."""

    rows: tuple[BoundRow, ...]
    images: int
    errors: int
    """Images misclassified when clean: counted as errors, and left out of the margin-weighted stack."""
    sigma: float
    """sigma_1 of the stack."""
    weighted_sigma: float
    """sigma_1 of the margin-weighted stack, used by P4."""
    trace: float
    """tr G; an estimate with error ``trace_error``."""
    trace_error: float
    box_tightness: float
    """D sigma_1^2 / tr G >= 1: P2 is tight up to this factor."""


def bound_table(
    model: Source,
    data: Any,
    perturbations: Sequence[torch.Tensor],
    *,
    spectra: tuple[Spectrum, Spectrum] | None = None,
    seed: int = 0,
) -> BoundTable:
    """Compare the bounds P1, P2 and P4 with the effects of perturbations, one row per perturbation.

    Cost: the two spectra (see :func:`gambeson.analysis.stacked_spectrum`; one pass serves both for images of up to 4096
        values); then one forward and one backward per image, and one of each per image and perturbation.

    Args:
        model: a module or a victim.
        data: a split, a dataset (its test split) or a pair (images, labels).
        perturbations: each (1, C, H, W) or (C, H, W), such as one crafted at every eps.
        spectra: the plain and the margin-weighted spectrum of this model on this data, if known.
        seed: of the Lanczos start.

    Raises:
        UserError: no perturbations, or of another shape than the images.
    """
    split = labelled(data)
    deltas = [delta.reshape(1, *delta.shape[-3:]) for delta in perturbations]
    if not deltas or any(tuple(delta.shape[1:]) != split.shape for delta in deltas):
        shapes = ", ".join(str(tuple(delta.shape)) for delta in perturbations) or "none"
        raise UserError(f"perturbations have shapes {shapes}: expected one or more of (1, {str(split.shape)[1:]}")
    with classifier(model, data, seed) as (victim, split):
        plain, weighted = spectra or both_spectra(victim, split, seed)
        line = linearise(victim, split, torch.cat(deltas))
        measured = line.measured_errors
    wrong, size = int((line.margin <= 0).sum()), torch.Size(split.shape).numel()
    squares = line.change.double().square().sum(2)  # (R, N)
    right = (line.margin > 0).to(squares.dtype)
    inverse = right / line.margin.double().where(line.margin > 0, 1).square()
    rows = []
    for k, delta in enumerate(deltas):
        high, length = float(delta.abs().max()), float(delta.double().norm())
        ratio = squares[k] * inverse
        rows.append(
            BoundRow(
                length_inf=high,
                length_2=length,
                effect=float(squares[k].sum()),
                spectral_bound=plain.ceiling * length**2,
                frobenius_bound=plain.trace * length**2,
                box_mean=plain.trace * high**2,
                box_bound=plain.ceiling * size * high**2,
                box_frobenius_bound=plain.trace * size * high**2,
                linear_error=line.errors[k] / len(split),
                counted_error=(wrong + int((ratio >= 0.5).sum())) / len(split),
                effect_error=min(1.0, (wrong + 2 * float(ratio.sum())) / len(split)),
                bound_error=min(1.0, (wrong + 2 * weighted.ceiling * length**2) / len(split)),
                measured_error=measured[k] / len(split),
            )
        )
    return BoundTable(
        rows=tuple(rows),
        images=len(split),
        errors=wrong,
        sigma=float(plain.values[0]) ** 0.5,
        weighted_sigma=float(weighted.values[0]) ** 0.5,
        trace=plain.trace,
        trace_error=plain.trace_error,
        box_tightness=size * float(plain.values[0]) / plain.trace if plain.trace > 0 else 1.0,
    )


def both_spectra(victim: Victim, split: Split, seed: int = 0, *, tolerance: float = 1e-4) -> tuple[Spectrum, Spectrum]:
    """Return the plain and the margin-weighted spectrum, from one pass if G fits; else to a tolerance."""
    if torch.Size(split.shape).numel() <= LARGEST:
        plain, weighted = stacked_grams(victim, split, ("none", "margin"))
        return plain.top(1, seed), weighted.top(1, seed)
    return (
        stacked_spectrum(victim, split, tolerance=tolerance, seed=seed),
        stacked_spectrum(victim, split, weighting="margin", tolerance=tolerance, seed=seed),
    )


def strongest_signs(gram: StackedGram, *, starts: int = 10, steps: int = 200, seed: int = 0) -> torch.Tensor:
    """Maximise z^T G z over sign vectors: the best universal Linf perturbation to first order (P2).

    z <- sign(G z), the (inf, 2) power method of Khrulkov and Oseledets (CVPR 2018, arXiv 1709.03582) on logits: it
    never decreases, and ends in local maxima, so the best of several starts is used. One start is the sign of the top
    direction, the others are random (ours).

    Returns:
        (C, H, W), values -1 and 1; times eps it is the perturbation, and eps^2 z^T G z its linearised effect.
    """
    matrix = gram.matrix
    draw = generator(seed, "signs", device=matrix.device)
    z = torch.randn(len(matrix), max(1, starts), generator=draw, device=matrix.device, dtype=matrix.dtype)
    z[:, 0] = gram.top(1, seed).directions[0].flatten()
    z = _signs(z)
    for _ in range(steps):
        moved = _signs(matrix @ z)
        if torch.equal(moved, z):
            break
        z = moved
    best = int((z * (matrix @ z)).sum(0).argmax())
    return z[:, best].float().view(gram.shape)


def _signs(z: torch.Tensor) -> torch.Tensor:
    return torch.where(z >= 0, 1.0, -1.0).to(z.dtype)

"""Similarity of the members of an ensemble: Jacobians, loss gradients and predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import nn

from gambeson.base import generator
from gambeson.tasks import CLASSIFICATION, Task
from gambeson.victim import Victim

TINY = 1e-12
_EXACT = 16
"""Maximum number of classes for the exact Jacobian; beyond it, the number of random directions."""


def estimated_diversity_gain(
    members: Sequence[nn.Module], images: torch.Tensor, *, valid: torch.Tensor | None = None, seed: int = 0
) -> torch.Tensor:
    """Return D = ||J_e||_F^2 / mean_m ||J_m||_F^2 for each image, J_e the Jacobian of the mean logits.

    As :func:`gambeson.analysis.diversity_gain`, but 1 if every Jacobian is zero, since one NaN would make the mean over
    a batch, and so the history of a training, NaN. Models are in evaluation mode. Exact up to 16 classes, else from 16
    random directions in logit space, the same for all members. Cost: one forward per image and member, and one backward
    per direction.

    Args:
        members: each from pixels to logits.
        images: (N, C, H, W) in [0, 1].
        valid: which units count, (N,) or (N, H, W); None: all.
        seed: of the directions.

    Returns:
        (N,), between 0 and 1.
    """
    with ExitStack() as stack, torch.enable_grad():
        for member in members:
            stack.enter_context(Victim(member))
        points = [images.detach().clone().requires_grad_() for _ in members]
        logits = [member(point) for member, point in zip(members, points, strict=True)]
        if valid is not None:
            logits = [one * valid.unsqueeze(1) for one in logits]
        answers = [one.flatten(1) for one in logits]
        count, outputs = answers[0].shape
        if outputs <= _EXACT:
            directions = torch.eye(outputs, device=images.device).unsqueeze(1).expand(-1, count, -1)
        else:
            draw = generator(seed, "diversity", device=images.device)
            directions = torch.randn((_EXACT, count, outputs), generator=draw, device=images.device)
        joint = images.new_zeros(count)
        alone = images.new_zeros(count)
        for direction in directions:
            rows = torch.stack(
                [
                    torch.autograd.grad(answer, point, direction.to(answer), retain_graph=True)[0].flatten(1)
                    for answer, point in zip(answers, points, strict=True)
                ]
            )
            joint += rows.mean(0).square().sum(1)
            alone += rows.square().sum(2).mean(0)
    return torch.where(alone > 0, joint / alone.clamp(min=torch.finfo(alone.dtype).tiny), torch.ones_like(alone))


def loss_gradients(
    logits: torch.Tensor, labels: torch.Tensor, point: torch.Tensor, task: Task = CLASSIFICATION
) -> torch.Tensor:
    """Return the gradient of every member's loss of every image, (M, N, C*H*W), differentiable.

    The loss of an image is its mean cross-entropy over the units that count.

    Args:
        logits: (M, N, K) or (M, N, K, H, W), of ``point``.
        labels: (N,) or (N, H, W).
        point: (N, C, H, W), with a gradient.
        task: what the labels mean.
    """
    return torch.stack(
        [
            torch.autograd.grad(task.per_image(task.cross_entropy(z, labels), labels).sum(), point, create_graph=True)[
                0
            ].flatten(1)
            for z in logits
        ]
    )


def cosines(gradients: torch.Tensor) -> torch.Tensor:
    """Return the cosine between the gradients (M, N, D) of every pair of members, (M * (M - 1) / 2, N).

    The cosine with a zero gradient is 0.
    """
    unit = gradients / gradients.square().sum(2, keepdim=True).clamp(min=TINY**2).sqrt()
    first, second = torch.triu_indices(len(unit), len(unit), 1, device=unit.device)
    return (unit[first] * unit[second]).sum(2)


def coherence(pairs: torch.Tensor) -> torch.Tensor:
    """Return the mean over images of log sum_{i<j} exp(cos) (Kariyappa and Qureshi 2019, equation 6), from (P, N)."""
    return pairs.logsumexp(0).mean()


def log_det(logits: torch.Tensor, labels: torch.Tensor, ridge: float = 1e-6) -> torch.Tensor:
    """Return log det(V^T V + ridge * I), V the members' predictions without the true class, normalised.

    Pang et al. 2019, section 3.2. Computed from the logits in double precision: saturated predictions still have a
    direction, and a ridge of 1e-6 relative to 1 is lost in float32.

    Args:
        logits: (M, N, K) or (M, N, K, H, W).
        labels: (N,) or (N, H, W), each of them a class.
        ridge: keeps the determinant positive.

    Returns:
        In the shape of ``labels``, float64.
    """
    truth = torch.zeros_like(logits[0], dtype=torch.bool).scatter(1, labels.unsqueeze(1), True)
    others = logits.double().masked_fill(truth, -math.inf).softmax(2)
    unit = others / others.norm(dim=2, keepdim=True)
    rows = unit.movedim((0, 2), (-2, -1))  # (N, ..., M, K)
    gram = rows @ rows.transpose(-2, -1) + ridge * torch.eye(len(logits), dtype=rows.dtype, device=rows.device)
    return gram.logdet()


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Return the entropy of every prediction in nats, (N,) or (N, H, W), of logits (N, K) or (N, K, H, W)."""
    logs = logits.log_softmax(1)
    return -(logs.exp() * logs).sum(1)

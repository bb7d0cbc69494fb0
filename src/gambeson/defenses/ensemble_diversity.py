"""Ensembles trained jointly with a diversity term: ADP, GAL and TRS."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from gambeson.base import Number, UserError, generator
from gambeson.defenses.ensemble import EnsembleDefense, members_of, watch
from gambeson.defenses.ensemble_losses import coherence, cosines, entropy, log_det, loss_gradients
from gambeson.defenses.objective import Batch, Losses, Objective, TrainContext
from gambeson.defenses.registry import register
from gambeson.models import PixelModel
from gambeson.models.members import vote
from gambeson.tasks import CLASSIFICATION, Task
from gambeson.threat import Ball, Eps
from gambeson.victim import frozen

Compare = Callable[[PixelModel, torch.Tensor, Batch], dict[str, tuple[float, torch.Tensor]]]
"""Weighted values by name, from the model, the members' logits, (M, N, K) or (M, N, K, H, W), and the batch."""


class JointEnsemble(EnsembleDefense):
    """Base of ADP, GAL and TRS: one data order for all members, so that a batch has N rows and not M * N."""

    members: Annotated[int, Field(ge=2)] = 3
    """Members; 3 in the public scripts."""
    watched: Annotated[int, Field(ge=0)] = 32
    """Images for the members' diversity gain, logged once per epoch; 0: never."""

    @property
    def num_orders(self) -> int:
        """One data order: all members are trained on the same images."""
        return 1

    def _open(
        self, context: TrainContext, compare: Compare, *, mean: bool = False, input_gradients: bool = False
    ) -> Objective:
        members_of(context.model, self.members)
        assert isinstance(context.model, PixelModel)
        return EnsembleObjective(
            context.model, compare, mean=mean, input_gradients=input_gradients, watched=self.watched
        )


class EnsembleObjective(Objective):
    """The members' cross-entropies and the diversity terms, from one forward per member.

    Args:
        model: the ensemble.
        compare: the diversity terms.
        mean: use the mean of the cross-entropies instead of their sum.
        input_gradients: whether the images need a gradient.
        watched: images of a batch for the diversity gain, computed in the last step of an epoch.
    """

    def __init__(
        self,
        model: PixelModel,
        compare: Compare,
        *,
        mean: bool = False,
        input_gradients: bool = False,
        watched: int = 0,
    ) -> None:
        super().__init__({})
        self._voters = model.voters  # a list: the model is not part of the objective's state
        self._compare, self._mean, self._input_gradients, self._watched = compare, mean, input_gradients, watched

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        """Evaluate the objective on one batch; values of weight zero are left out."""
        images = batch.images.detach().requires_grad_() if self._input_gradients else batch.images
        logits = torch.stack([voter(images) for voter in self._voters])
        every = torch.stack([batch.losses(z).mean() for z in logits])
        assert isinstance(model, PixelModel)
        values = self._compare(model, logits, dataclasses.replace(batch, images=images))
        total = every.mean() if self._mean else every.sum()
        total = torch.stack([total, *(weight * value for weight, value in values.values())]).sum()
        named = {name: value.detach() for name, (_, value) in values.items()}
        return {"loss": total, "clean": every.mean().detach()} | named | watch(self._voters, batch, self._watched)


def check_classes(members: int, classes: int) -> None:
    """Raise if there are more members than wrong classes.

    Raises:
        UserError: the predictions cannot all be orthogonal.
    """
    if members > classes - 1:
        raise UserError(
            f"{members} members cannot differ on {classes} classes: their predictions of the wrong classes can be "
            f"orthogonal for {classes - 1} at most; choose fewer members"
        )


@register("adp", source="Pang et al. 2019", cost="M members")
class ADP(JointEnsemble):
    """Minimise sum_m CE_m - alpha * H(mean_m p_m) - beta * log det(V^T V + 1e-6 I).

    V has each member's prediction of the wrong classes as a column of length 1 (see
    :func:`gambeson.defenses.ensemble_losses.log_det`). The weights are the paper's, for M = 3; its optimiser (Adam,
    1e-3) and length (200 epochs) belong to the recipe.
    """

    alpha: Annotated[Number, Field(ge=0)] = 2.0
    """Weight of the entropy of the mean prediction."""
    beta: Annotated[Number, Field(ge=0)] = 0.5
    """Weight of the log-determinant."""

    def build_objective(self, context: TrainContext) -> Objective:
        """Build the objective.

        Raises:
            UserError: more members than wrong classes.
        """
        check_classes(self.members, len(context.train.classes))
        return self._open(context, self._compare)

    def _compare(self, model: PixelModel, logits: torch.Tensor, batch: Batch) -> dict[str, tuple[float, torch.Tensor]]:
        values: dict[str, tuple[float, torch.Tensor]] = {}
        with torch.autocast(logits.device.type, enabled=False):
            exact = logits.float()
            if self.alpha:
                values["entropy"] = -self.alpha, batch.mean(entropy(vote(exact, "probabilities")))
            if self.beta:
                apart = log_det(exact, batch.task.indexable(batch.labels))
                values["log_det"] = -self.beta, batch.mean(apart).to(exact.dtype)
        return values


@register("gal", source="Kariyappa and Qureshi 2019", cost="M members")
class GAL(JointEnsemble):
    """Minimise mean_m CE_m + strength * E[log sum_{i<j} exp(cos(g_i, g_j))], g_m = grad_x CE_m.

    One forward serves losses and gradients; a public port uses two. The paper's nets use leaky ReLU.
    """

    strength: Annotated[Number, Field(ge=0)] = 0.5
    """Weight of the coherence; 0.5 in the paper."""

    def build_objective(self, context: TrainContext) -> Objective:
        """Build the objective."""
        return self._open(context, self._compare, mean=True, input_gradients=bool(self.strength))

    def _compare(self, model: PixelModel, logits: torch.Tensor, batch: Batch) -> dict[str, tuple[float, torch.Tensor]]:
        if not self.strength:
            return {}
        gradients = loss_gradients(logits, batch.labels, batch.images, batch.task)
        return {"coherence": (self.strength, coherence(cosines(gradients)))}


@register("trs", source="Yang et al. 2021", cost="M members")
class TRS(JointEnsemble):
    """Minimise sum_m CE_m + scale * (alignment * mean_{i<j} |cos(g_i, g_j)| + smoothness * S), g_m = grad_x CE_m.

    S = mean_m 2 E[||g_m||^2], on one half of the batch unchanged and on the other half moved to where gradients are
    large: steps of eps / 3 along the sign of the gradient of their squared norm, with eps growing linearly. The weights
    are the public code's (AI-secure/Transferability-Reduced-Smooth-Ensemble). For any number of members; that code has
    3, and accumulates the gradients of all its steps, which is not reproduced.
    """

    scale: Annotated[Number, Field(ge=0)] = 5.0
    """Scale of both terms."""
    alignment: Annotated[Number, Field(ge=0)] = 2.0
    """Weight of the cosines."""
    smoothness: Annotated[Number, Field(ge=0)] = 2.0
    """Weight of S."""
    loss_mean: Literal["batch", "image"] = "batch"
    """Loss of the gradients in S: ``batch``, the mean loss, as in the public code and assumed by its weights, which
    divides S by the square of the batch size; ``image``, each image's loss (the paper)."""
    eps_first: Annotated[Eps, Field(le=1)] = 0.1
    """Initial radius of the moves, in pixel units."""
    eps_last: Annotated[Eps, Field(le=1)] = 0.2
    """Final radius."""
    steps: Annotated[int, Field(ge=1)] = 6
    """Steps per move."""

    def build_objective(self, context: TrainContext) -> Objective:
        """Build the objective."""
        return self._open(context, self._compare, input_gradients=bool(self.scale * self.alignment))

    def _compare(self, model: PixelModel, logits: torch.Tensor, batch: Batch) -> dict[str, tuple[float, torch.Tensor]]:
        values: dict[str, tuple[float, torch.Tensor]] = {}
        if self.scale * self.alignment:
            gradients = loss_gradients(logits, batch.labels, batch.images, batch.task)
            values["alignment"] = self.scale * self.alignment, cosines(gradients).abs().mean()
        if self.scale * self.smoothness:
            values["smoothness"] = self.scale * self.smoothness, self._smoothness(model, batch)
        return values

    def _smoothness(self, model: PixelModel, batch: Batch) -> torch.Tensor:
        here, (number, processes) = len(batch.images), batch.place
        # Every second image, not the second half: the same for any number of processes.
        chosen = (torch.arange(here, device=batch.images.device) + number * here) % 2 == 1
        images = batch.images.detach().clone()
        if bool(chosen.any()):
            images[chosen] = self._moved(model, batch, chosen)
        value = squared_gradient_norms(model, images.requires_grad_(), batch.labels, batch.task).mean()
        return 2 * (value if self.loss_mean == "image" else value / (here * processes) ** 2)

    def _moved(self, model: PixelModel, batch: Batch, chosen: torch.Tensor) -> torch.Tensor:
        images, labels = batch.images[chosen].detach(), batch.labels[chosen]
        eps = self.eps_first + (self.eps_last - self.eps_first) * batch.epoch / batch.epochs
        ball = Ball(eps=eps)
        draw = generator(batch.seed, "trs", device=images.device)
        drawn = ball.uniform((len(batch.images) * batch.place[1], *images.shape[1:]), draw)
        delta = batch.mine(drawn)[chosen]
        with frozen(model), torch.autocast(images.device.type, enabled=False):  # crafted in float32
            for _ in range(self.steps):
                point = (images + delta).clamp(0, 1).requires_grad_()
                value = squared_gradient_norms(model, point, labels, batch.task).sum()
                (gradient,) = torch.autograd.grad(value, point)
                delta = ball.project(point.detach() - images + eps / 3 * gradient.sign())
        return (images + delta).clamp(0, 1)


def squared_gradient_norms(
    model: PixelModel, point: torch.Tensor, labels: torch.Tensor, task: Task = CLASSIFICATION
) -> torch.Tensor:
    """Return ||grad_x CE_m||^2 of every member at every image, (M, N), with a graph.

    Args:
        model: the ensemble.
        point: (N, C, H, W), with a gradient.
        labels: (N,) or (N, H, W).
        task: what the labels mean.
    """
    logits = torch.stack([voter(point) for voter in model.voters])
    return loss_gradients(logits, labels, point, task).square().sum(2)

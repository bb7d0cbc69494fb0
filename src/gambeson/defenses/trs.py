"""Transferability reduced smooth ensemble (Yang et al., NeurIPS 2021, arXiv 2104.00671)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field

from gambeson.base import Number, generator
from gambeson.defenses.diversity import cosines, loss_gradients
from gambeson.defenses.objective import Objective, Scene
from gambeson.defenses.registry import register
from gambeson.defenses.terms import Batch
from gambeson.defenses.together import Together
from gambeson.models import PixelModel
from gambeson.threat import Ball, Eps
from gambeson.victim import frozen


@register("trs", source="Yang et al. 2021", cost="M members")
class TRS(Together):
    """Minimise sum_m CE_m + scale * (alignment * mean_{i<j} |cos(g_i, g_j)| + smoothness * S), g_m = grad_x CE_m.

    S = mean_m 2 E[||g_m||^2], on half of the batch as it is and on the other half moved to where the gradients are
    large: steps of eps / 3 up the sign of their squared norm's gradient, eps growing in a straight line. The weights
    are the public code's (AI-secure/Transferability-Reduced-Smooth-Ensemble). For any number of members; that code has
    3, and sums the gradients of all its steps, which is not copied.
    """

    scale: Annotated[Number, Field(ge=0)] = 5.0
    """Of both terms."""
    alignment: Annotated[Number, Field(ge=0)] = 2.0
    """Weight of the cosines."""
    smoothness: Annotated[Number, Field(ge=0)] = 2.0
    """Weight of S."""
    loss_mean: Literal["batch", "image"] = "batch"
    """Of what the gradients in S are taken: ``batch``, of the mean loss, as the public code does and its weights
    suppose, which makes S smaller by the square of the batch size; ``image``, of each image's loss (the paper)."""
    eps_first: Eps = 0.1
    """Radius of the moves at the start, in pixel units."""
    eps_last: Eps = 0.2
    """Radius at the end."""
    steps: Annotated[int, Field(ge=1)] = 6
    """Steps of a move."""

    def open(self, scene: Scene) -> Objective:
        """Open the objective."""
        return self._open(scene, self._compare, slopes=bool(self.scale * self.alignment))

    def _compare(self, model: PixelModel, logits: torch.Tensor, batch: Batch) -> dict[str, tuple[float, torch.Tensor]]:
        values: dict[str, tuple[float, torch.Tensor]] = {}
        if self.scale * self.alignment:
            gradients = loss_gradients(logits, batch.labels, batch.images, batch.ignore_index)
            values["alignment"] = self.scale * self.alignment, cosines(gradients).abs().mean()
        if self.scale * self.smoothness:
            values["smoothness"] = self.scale * self.smoothness, self._slope(model, batch)
        return values

    def _slope(self, model: PixelModel, batch: Batch) -> torch.Tensor:
        here, (number, processes) = len(batch.images), batch.place
        # Every second image, not the second half: the same ones on every number of processes.
        chosen = (torch.arange(here, device=batch.images.device) + number * here) % 2 == 1
        images = batch.images.detach().clone()
        if bool(chosen.any()):
            images[chosen] = self._moved(model, batch, chosen)
        value = squared_slopes(model, images.requires_grad_(), batch.labels, batch.ignore_index).mean()
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
                value = squared_slopes(model, point, labels, batch.ignore_index).sum()
                (gradient,) = torch.autograd.grad(value, point)
                delta = ball.project(point.detach() - images + eps / 3 * gradient.sign())
        return (images + delta).clamp(0, 1)


def squared_slopes(
    model: PixelModel, point: torch.Tensor, labels: torch.Tensor, ignore_index: int | None = None
) -> torch.Tensor:
    """Return ||grad_x CE_m||^2 of every member at every image, (M, N), with a graph.

    Args:
        model: the ensemble.
        point: (N, C, H, W), with a gradient.
        labels: (N,).
        ignore_index: the label that counts nowhere.
    """
    logits = torch.stack([voter(point) for voter in model.voters])
    return loss_gradients(logits, labels, point, ignore_index).square().sum(2)

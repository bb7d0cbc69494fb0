"""The model that an attack climbs: one, or an ensemble of source models whose examples shall transfer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from gambeson.base import UserError
from gambeson.victim import Victim

Average = Literal["logits", "probabilities", "losses"]
"""What is averaged over several source models (Dong et al. 2018, section 3.2, compares the three)."""

Source = nn.Module | Victim | Sequence["nn.Module | Victim"]
"""A module from pixels to logits, a :class:`Victim` already entered, or several of either."""


class Ensemble(Victim):
    """Several models attacked as one: every image sent in is sent to each, and counted for each.

    Args:
        models: modules, or victims whose own settings and counts then hold too.
        average: ``logits`` (MI-FGSM's, whose logits of the ensemble are the mean), ``probabilities`` (the logits of
            the ensemble are the logarithm of the mean probability) or ``losses`` (each model has its own loss;
            predictions are those of the mean probability).

    Raises:
        UserError: no models, something that is no model, or models on several devices.
    """

    def __init__(self, models: Sequence[nn.Module | Victim], average: Average = "logits") -> None:
        if len(models) == 0:
            raise UserError("the list of source models is empty: give one model or more")
        for model in models:
            if not isinstance(model, nn.Module | Victim):
                raise UserError(f"a source model is a {type(model).__name__}: expected a torch.nn.Module")
        self.members = [model if isinstance(model, Victim) else Victim(model, fast=True) for model in models]
        places = sorted({str(member.device) for member in self.members})
        if len(places) > 1:
            raise UserError(f"the source models are on {' and '.join(places)}: move them to one device")
        super().__init__(nn.ModuleList(member.model for member in self.members))
        self.average = average

    def each(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return the logits of each model.

        Raises:
            UserError: the models do not answer in one shape.
        """
        self.forwards += len(images) * len(self.members)
        found = [member(images) for member in self.members]
        shapes = {tuple(logits.shape[1:]) for logits in found}
        if len(shapes) > 1:
            raise UserError(
                f"the source models answer with shapes {' and '.join(map(str, sorted(shapes)))} an image: "
                "choose models of the same classes"
            )
        return found

    def joined(self, each: list[torch.Tensor]) -> torch.Tensor:
        """Return the ensemble's logits from those of its models."""
        if self.average == "logits":
            return torch.stack(each).mean(0)
        mean = torch.stack([logits.log_softmax(1) for logits in each]).logsumexp(0)
        return mean - torch.tensor(float(len(each)), device=mean.device, dtype=mean.dtype).log()

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return the ensemble's logits, (N, K) or (N, K, H, W)."""
        return self.joined(self.each(images))

    def exact(self, images: torch.Tensor) -> torch.Tensor:
        """Return the ensemble's logits by the models themselves."""
        self.forwards += len(images) * len(self.members)
        return self.joined([member.exact(images) for member in self.members])

    def gradient(self, value: torch.Tensor, wrt: torch.Tensor, images: int) -> torch.Tensor:
        """Return the gradient of a scalar, counted as ``images`` backward passes of every model."""
        for member in self.members:
            member.backwards += images
        return super().gradient(value, wrt, images * len(self.members))


@contextmanager
def opened(source: Source, average: Average = "logits") -> Iterator[Victim]:
    """Hold one source model, or an ensemble of several, frozen and counted; a victim given as one is used as it is."""
    if isinstance(source, Victim):
        yield source
        return
    with Victim(source, fast=True) if isinstance(source, nn.Module) else Ensemble(list(source), average) as victim:
        yield victim

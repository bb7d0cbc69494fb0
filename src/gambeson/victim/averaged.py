"""What gradients are taken of: ensembles of source models, samples of a random model (EOT), models behind edits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from torch import nn

from gambeson.base import UserError
from gambeson.models.black_box.base import BlackBox, no_gradient
from gambeson.tasks import CLASSIFICATION, Task
from gambeson.threat.edits import Edit
from gambeson.victim.inspect import ModelTraits
from gambeson.victim.victim import FastPath, Victim

Average = Literal["logits", "probabilities", "losses"]
"""Quantity that is averaged over source models (Dong et al. 2018, section 3.2, compares the three)."""

Source = nn.Module | Victim | Sequence["nn.Module | Victim"]
"""A module from pixels to logits, an entered :class:`Victim`, or a sequence of either."""


class AveragedVictim(Victim):
    """A victim whose output is an average over several; see :data:`Average`."""

    average: Average

    def each(self, images: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return the logits of each, (N, K) or (N, K, H, W)."""
        raise NotImplementedError

    def combine(self, each: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the logits of the average: the mean, or the logarithm of the mean probability."""
        stacked = torch.stack(list(each))
        if self.average == "logits":
            return stacked.mean(0)
        return stacked.log_softmax(2).logsumexp(0) - math.log(len(stacked))

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits of the average, (N, K) or (N, K, H, W)."""
        return self._scaled(self.combine(self.each(images)))


class ModelAverage(AveragedVictim):
    """Two or more models attacked as one; every image is sent to each, and counted for each.

    Args:
        models: modules, or victims, which keep their own settings and counts.
        average: ``logits`` (MI-FGSM: the mean logits), ``probabilities`` (the logarithm of the mean probability) or
            ``losses`` (the mean loss; predictions are those of the mean probability).
        fast: see :class:`Victim`; for modules.

    Raises:
        UserError: no models, something that is not a model, or models on several devices.
    """

    def __init__(
        self, models: Sequence[nn.Module | Victim], average: Average = "logits", *, fast: bool | FastPath = True
    ) -> None:
        if not isinstance(models, list | tuple):
            raise UserError(f"a model is a {type(models).__name__}: expected a torch.nn.Module, or a list of them")
        if not models:
            raise UserError("the list of models is empty: give one model or more")
        for model in models:
            if not isinstance(model, nn.Module | Victim):
                raise UserError(f"a model is a {type(model).__name__}: expected a torch.nn.Module")
        self.members = [model if isinstance(model, Victim) else Victim(model, fast=fast) for model in models]
        places = sorted({str(member.device) for member in self.members})
        if len(places) > 1:
            raise UserError(f"the models are on {' and '.join(places)}: move them to one device")
        super().__init__(nn.ModuleList(member.model for member in self.members))
        self.average = average
        self.allow_no_graph = all(member.allow_no_graph for member in self.members)

    @property
    def coarse(self) -> bool:
        """Whether those of any model are."""
        return any(member.coarse for member in self.members)

    def each(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return the logits of each model.

        Raises:
            UserError: the models return different shapes.
        """
        self.forwards += len(images) * len(self.members)
        found = [member(images) for member in self.members]
        shapes = {tuple(logits.shape[1:]) for logits in found}
        if len(shapes) > 1:
            raise UserError(
                f"the models return shapes {' and '.join(map(str, sorted(shapes)))} per image: "
                "choose models of the same classes"
            )
        return found

    def forward_original(self, images: torch.Tensor) -> torch.Tensor:
        """Return the ensemble's logits from the original models."""
        self.forwards += len(images) * len(self.members)
        return self.combine([member.forward_original(images) for member in self.members])

    def count_backward(self, images: int) -> None:
        """Count a backward pass of so many images through every model."""
        for member in self.members:
            member.count_backward(images)
        super().count_backward(images * len(self.members))

    def inspect(self, images: torch.Tensor, *, scores: bool = False) -> ModelTraits:
        """Inspect every model; a trait of one is a trait of the ensemble."""
        traits = [member.inspect(images, scores=scores) for member in self.members]
        self.traits = ModelTraits(
            shape=traits[0].shape,
            grid=traits[0].grid,
            gap=max(one.gap for one in traits),
            size=min(one.size for one in traits),
            steady=all(one.steady for one in traits),
            shared=any(one.shared for one in traits),
            writes=any(one.writes for one in traits),
            probabilities=any(one.probabilities for one in traits),
            bare=all(one.bare for one in traits),
            sigmoids=any(one.sigmoids for one in traits),
        )
        return self.traits


class EOTAverage(AveragedVictim):
    """The average of a random model over several samples: expectation over transformation (Athalye et al. 2018).

    The gradient is that of the mean loss over the samples; success is judged by their mean probability. Samples are
    independent for every image. They are computed in one forward pass if the model draws independently per image and
    memory allows, else in one pass each.

    Args:
        victim: entered and inspected.
        eot_samples: number of samples.
    """

    average: Average = "losses"
    coarse = False  # one sample of the model itself would confirm nothing

    def __init__(self, victim: Victim, eot_samples: int) -> None:
        super().__init__(victim.model)
        self.victim, self.eot_samples = victim, eot_samples
        self.traits, self.allow_no_graph = victim.traits, victim.allow_no_graph

    def each(self, images: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return the logits of each sample."""
        if self.traits is not None and self.traits.shared:
            return [self.victim(images) for _ in range(self.eot_samples)]
        at_once = max(1, _VALUES_A_FORWARD // max(1, images.numel()))
        found: list[torch.Tensor] = []
        while len(found) < self.eot_samples:
            copies = min(at_once, self.eot_samples - len(found))
            found += self.victim(images.repeat(copies, 1, 1, 1)).chunk(copies)
        return found

    def forward_original(self, images: torch.Tensor) -> torch.Tensor:
        """Return the model's own logits: one sample."""
        return self.victim.forward_original(images)

    def count_backward(self, images: int) -> None:
        """Count a backward pass of so many images, per sample."""
        self.victim.count_backward(images * self.eot_samples)


class EditedVictim(Victim):
    """A model behind edits: each forward draws one of them, which all its images pass in its differentiable form.

    Gradients over several steps, or several forwards, are those of the expectation over the edits (Athalye et al.
    2018). For gradients alone: :func:`gambeson.victim.predict` makes the edits themselves.

    Args:
        victim: entered and inspected.
        edits: drawn from with equal probability; ``none`` is one of them where it is given.
        draw: on the CPU; of the choices and of what is random about an edit.
    """

    coarse = False  # another edit would confirm nothing

    def __init__(self, victim: Victim, edits: Sequence[Edit], draw: torch.Generator) -> None:
        super().__init__(victim.model)
        self.victim, self.edits, self.generator = victim, edits, draw
        self.traits, self.allow_no_graph = victim.traits, victim.allow_no_graph

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits of edited images, for attacks."""
        return self.victim(self._edited(images))

    def forward_original(self, images: torch.Tensor) -> torch.Tensor:
        """Return the original model's logits of edited images."""
        return self.victim.forward_original(self._edited(images))

    def count_backward(self, images: int) -> None:
        """Count a backward pass of so many images."""
        self.victim.count_backward(images)

    def _edited(self, images: torch.Tensor) -> torch.Tensor:
        edit = self.edits[int(torch.randint(len(self.edits), (), generator=self.generator))]
        return edit.differentiable(images, edit.draw(len(images), images.shape[1], self.generator))


EOT_SAMPLES = 10
"""Default number of samples that gradients of a random model are averaged over (ours; the papers: 1 to 30)."""

_VALUES_A_FORWARD = 2**23
"""Maximum input values per forward over all samples: 128 colour images of 32 x 32 with 21 samples each."""


@contextmanager
def as_victim(
    source: Source,
    images: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    task: Task = CLASSIFICATION,
    *,
    fast: bool | FastPath = False,
    average: Average = "logits",
    eot_samples: int | None = None,
    gradients: str | None = None,
) -> Iterator[Victim]:
    """Hold anything that is attacked, analysed or scored as a frozen, counted victim; inference mode is off inside.

    Args:
        source: a module; a list of them, held as one :class:`ModelAverage`; or an entered victim, used as given.
        images: (N, C, H, W), for gradients of a model that may be random: it is inspected with them.
        labels: of these images, if they shall fit the logits.
        task: what the labels mean.
        fast: see :class:`Victim`; for modules.
        average: over several models.
        eot_samples: samples that gradients of a random model are averaged over.
        gradients: what needs gradients; a black box is then refused before it is asked.

    Raises:
        UserError: an empty list, something that is not a model, or models on several devices; with ``images``, a random
            model without ``eot_samples``, or a model that does not fit the labels.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        if isinstance(source, Victim):
            victim = source
        elif isinstance(source, nn.Module) and not isinstance(source, nn.ModuleList):
            victim = stack.enter_context(Victim(source, fast=fast))
        else:
            models = list(source) if isinstance(source, nn.ModuleList) else source
            victim = stack.enter_context(ModelAverage(models, average, fast=fast))
        if gradients is not None:
            for box in (member.model for member in (victim.members if isinstance(victim, ModelAverage) else [victim])):
                if isinstance(box, BlackBox):
                    raise no_gradient(gradients, box.title)
        if images is not None:
            traits = victim.inspect(images)
            if labels is not None:
                task.check_logits(traits.shape, labels)
            if eot_samples is None:
                traits.require_fixed("set eot_samples=20 to average its gradient over 20 draws")
            if eot_samples is not None and eot_samples > 1:
                victim = EOTAverage(victim, eot_samples)
        yield victim

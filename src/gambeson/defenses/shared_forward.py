"""Terms that need the clean logits anyway hand them to the clean term: one forward less a step."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import nn

from gambeson.attacks.losses import cross_entropy, image_means
from gambeson.defenses.objective import Losses, Objective
from gambeson.defenses.terms import Batch, Clean


@runtime_checkable
class Answers(Protocol):
    """A term whose evaluation gives the logits of the clean batch as well."""

    def answers(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return the logits of ``batch.images`` with their graph, or None, and the value of the term."""
        ...


class SharedForward(Objective):
    """An objective whose clean term takes its logits from the first term that has them (:class:`Answers`)."""

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        """Evaluate the objective on one batch; without such a term as every objective does, bit for bit."""
        weights = {name: weight(batch) if callable(weight) else weight for name, (weight, _) in self.terms.items()}
        live = {name: self.terms[name][1] for name, weight in weights.items() if weight}
        source = next((name for name, term in live.items() if isinstance(term, Answers)), None)
        if source is None or not any(isinstance(term, Clean) for term in live.values()):
            return super().losses(model, batch)
        giver = live[source]
        assert isinstance(giver, Answers)
        logits, given = giver.answers(model, batch)
        values = {}
        for name, term in live.items():
            if name == source:
                values[name] = given
            elif isinstance(term, Clean) and logits is not None:
                answers = cross_entropy(logits, batch.labels, batch.ignore_index, label_smoothing=term.label_smoothing)
                values[name] = image_means(answers, batch.labels, batch.ignore_index).mean()
            else:
                values[name] = term(model, batch)
        total = torch.stack([weights[name] * value for name, value in values.items()]).sum()
        return {"loss": total} | {name: value.detach() for name, value in values.items()}

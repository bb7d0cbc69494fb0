"""Join models that were made or trained apart into one that votes."""

from __future__ import annotations

from collections.abc import Sequence

from gambeson.base import UserError
from gambeson.models.members import Average, Members
from gambeson.models.pixel_model import PixelModel


def ensemble(models: Sequence[PixelModel], average: Average = "probabilities") -> PixelModel:
    """Return one model whose members are the given ones, which share their weights with it.

    Member m of a run with seed s is the single run with seed ``derive(s, "member", m)``: members may be trained one
    after another, or each on a device or machine of its own, and joined here.

    Args:
        models: models of :func:`gambeson.models.create` with equal cards, one body each.
        average: how they vote.

    Raises:
        UserError: none, ensembles among them, or cards that differ.
    """
    if not models:
        raise UserError("an ensemble of no models was asked for: give one at least")
    first = models[0].card
    for number, model in enumerate(models):
        if model.card.members != 1:
            raise UserError(f"model {number} is an ensemble of {model.card.members} itself: give its voters one by one")
        own, theirs = first.plain(), model.card.plain()
        if differing := [name for name in own if own[name] != theirs[name]]:
            raise UserError(
                f"model {number} differs from model 0 in {', '.join(differing)}: the members of an ensemble share "
                "architecture, classes and normalisation"
            )
    if len(models) == 1:
        return models[0]
    card = first.model_copy(update={"members": len(models), "average": average})
    joined = PixelModel(card, Members([model.body for model in models], average))
    joined.normalize = models[0].normalize
    return joined.train(models[0].training)

"""Random search in the ball: the control that every query attack has to beat at the same budget."""

from __future__ import annotations

from gambeson.attacks.query import InfOr2
from gambeson.attacks.query_attack import QueryAttack, Search
from gambeson.attacks.registry import register
from gambeson.base import generator
from gambeson.threat import Ball, Eps, perturb


@register("random-search", source="the control of the query attacks", cost="at most queries / 0")
class RandomSearch(QueryAttack):
    """The control of query attacks: independent draws on the surface of the ball, the best one kept.

    Random signs scaled to norm eps. An attack that learns from its queries has to beat it at the same budget.
    Cost: at most ``queries`` forwards an image.
    """

    eps: Eps
    """Radius in pixel units."""
    norm: InfOr2 = "inf"
    """Norm of the ball."""

    @property
    def ball(self) -> Ball:
        """The ball of allowed perturbations."""
        return Ball(eps=self.eps, norm=self.norm)

    @property
    def _null(self) -> bool:
        return self.eps == 0

    def _search(self, search: Search, seed: int) -> None:
        x = search.images
        draw = generator(seed, "random-search", device=x.device)
        for _ in range(search.left):
            if len(search.standing) == 0:
                break
            # Drawn for the whole batch, so that what one image gets does not depend on the others' fate.
            delta = self.ball.signs(x.shape, draw).to(x.dtype)
            search.offer(perturb(x[search.standing], delta[search.standing]))

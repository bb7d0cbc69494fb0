"""An attack per image and a universal one."""

from collections.abc import Iterable
from typing import Any

import torch

import gambeson as gb
from gambeson.attacks import Candidate, CraftingContext, UniversalAttack
from gambeson.base import Config, Number
from gambeson.threat import Eps


@gb.attacks.register("shift", source="nobody, 2026", cost="2 / 0")
class Shift(Config):
    """Brighten or darken each image as a whole by eps, whichever makes it wrong."""

    eps: Eps
    """Radius in pixel units."""
    norm: str = "inf"
    """Norm of the ball; only inf."""
    share: Number = 1.0
    """How much of eps is used."""

    def __call__(
        self, model: Any, x: torch.Tensor, y: torch.Tensor, *, seed: int = 0, task: Any = None
    ) -> torch.Tensor:
        """Return the images, all moved into the ball's corners."""
        sides = [(x + sign * self.share * self.eps).clamp(0, 1) for sign in (1, -1)]
        with torch.no_grad():
            wrong = model(sides[0]).argmax(1) != y
        return torch.where(wrong.view(-1, 1, 1, 1), sides[0], sides[1])


@gb.attacks.register("stripes")
class Stripes(UniversalAttack):
    """Vertical stripes of every width up to a few pixels; validation chooses among them."""

    widest: int = 3
    """Widest stripe in pixels."""

    def _search(self, work: CraftingContext, start: torch.Tensor | None) -> Iterable[Candidate]:
        columns = torch.arange(work.shape[-1], device=work.device)
        for width in range(1, self.widest + 1):
            signs = 1 - 2 * (columns // width % 2).float()
            yield Candidate(start=f"width {width}", delta=self.ball.fill(signs.expand(work.shape)))

"""Adam for one tensor that is no parameter (Kingma and Ba 2015, algorithm 1), a row an image."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Adam:
    """The moments of a tensor's gradient; images can leave one by one (:meth:`of`)."""

    mean: torch.Tensor
    square: torch.Tensor
    betas: tuple[float, float] = (0.9, 0.999)
    count: int = 0

    @classmethod
    def like(cls, tensor: torch.Tensor, betas: tuple[float, float] = (0.9, 0.999)) -> Adam:
        """Return the moments at the start."""
        return cls(torch.zeros_like(tensor), torch.zeros_like(tensor), betas)

    def direction(self, gradient: torch.Tensor) -> torch.Tensor:
        """Take a gradient in; return the step along it at a learning rate of one."""
        one, two = self.betas
        self.count += 1
        self.mean = one * self.mean + (1 - one) * gradient
        self.square = two * self.square + (1 - two) * gradient.square()
        mean, square = self.mean / (1 - one**self.count), self.square / (1 - two**self.count)
        return mean / (square.sqrt() + 1e-8)

    def of(self, rows: torch.Tensor) -> Adam:
        """The moments of some images alone."""
        return Adam(self.mean[rows], self.square[rows], self.betas, self.count)

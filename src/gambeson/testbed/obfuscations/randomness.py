"""Random models, for which a single pass or gradient is not meaningful."""

from __future__ import annotations

import random

import torch
from torch import nn
from torch.nn import functional as F

from gambeson.testbed.entry import Entry, Trunk, three


class NoisyInput(nn.Module):
    """Normal noise of a quarter of the range on the pixels."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x + 0.25 * torch.randn_like(x))


class NoisyLogits(nn.Module):
    """Normal noise on the logits."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.net(x)
        return z + 3 * torch.randn_like(z)


class ResizedAndPadded(nn.Module):
    """The image made smaller by up to a fifth and padded to its size at a random place, drawn for every batch."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        side = x.shape[-1]
        smaller = int(torch.randint(side - side // 5, side + 1, ()))
        left, top = torch.randint(0, side - smaller + 1, (2,)).tolist()
        y = F.interpolate(x, (smaller, smaller), mode="bilinear", align_corners=False)
        return self.net(F.pad(y, (left, side - smaller - left, top, side - smaller - top)))


class DroppedPixels(nn.Module):
    """A third of the pixels set to zero at random."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x * (torch.rand_like(x) > 1 / 3))


class DropoutOn(nn.Module):
    """Dropout of half of the last features, in evaluation mode too."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.trunk = Trunk(net)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.trunk.head(F.dropout(self.trunk(x), 0.5, training=True))


class RandomMember(nn.Module):
    """One of three networks, drawn for every batch by Python's own generator, which torch's seed does not set."""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.members[random.randrange(len(self.members))](x)


class RandomError(nn.Module):
    """Logits moved on by one class with a probability of 0.3, whatever the image is."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.net(x)
        return torch.where(torch.rand(len(z), 1, device=z.device) < 0.3, z.roll(1, 1), z)


ONE_FORWARD, NO_EOT = "fra31/auto-attack#105: one forward decides", "bethgelab/foolbox#191, #563"
EOT = "Athalye et al. 2018, section 4.2"

RANDOMNESS = (
    Entry("randomness", "input noise", NoisyInput, "one gradient is mostly noise", f"{NO_EOT}; {EOT}"),
    Entry("randomness", "logit noise", NoisyLogits, "one pass decides", NO_EOT),
    Entry(
        "randomness",
        "random resizing and padding",
        ResizedAndPadded,
        "gradients of another size",
        f"Xie et al. 2018; {EOT}",
    ),
    Entry("randomness", "dropped pixels", DroppedPixels, "one gradient sees two thirds", f"Guo et al. 2018; {EOT}"),
    Entry("randomness", "dropout left on", DropoutOn, "one pass decides", "bethgelab/foolbox#74, #78"),
    Entry("randomness", "random member", RandomMember, "the gradient of another net", EOT, parts=three),
    Entry("randomness", "random errors", RandomError, "an attack seems to succeed by chance", ONE_FORWARD),
)

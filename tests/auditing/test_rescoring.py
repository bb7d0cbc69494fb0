"""Models whose answer or gradient depends on the batch, the call or the ball's corners: the worst of them counts."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gambeson as gb
from gambeson.auditing import Suite

SUITE = Suite(
    eps=(0.05, 0.15, 0.3),
    universal_steps=60,
    universal_restarts=1,
    universal_batch=32,
    universal_probe_starts=0,
    pgd_steps=20,
    pgd_restarts=1,
    sample=100,
    suite_images=0,
    queries=1,
    jacobian_backwards=0,
    noise_sizes=(),
    surrogate="none",
    eps_uni_runs=0,
    eps_adv=False,
    votes=5,
    eot_samples=4,
    controls=("chessboard",),
)
BATCH, CORNER = "alike in every batch", "no weaker inside the ball"
GRADIENT, REPEAT = "gradient independent of the batch", "attack repeats its outcome"
EPS = 0.15


class Wrapped(nn.Module):
    """A network behind something."""

    def __init__(self, net, *settings):
        super().__init__()
        self.net, self.settings, self.calls = net, settings, 0
        self.other = nn.Conv2d(1, 1, 1)

    def forward(self, x):
        self.calls += 1
        return self.net(self.change(x, *self.settings))


class DriftRemoved(Wrapped):
    """What all images share is taken out of batches for which ``when`` holds."""

    def change(self, x, when):
        return x - x.mean(0, keepdim=True) + 0.3 if when(len(x)) else x


class MajorityCleaned(Wrapped):
    """Drift is removed where most of the batch carries it: of half a batch it is not."""

    def change(self, x, share):
        drift = x.median(0, keepdim=True).values  # of a corner, the median of background pixels
        carries = ((x - drift).abs().flatten(1).mean(1) < 0.35).float().mean()
        dark = (x < 0.01).flatten(1).float().mean(1)
        return x if carries < share or dark.mean() > 0.42 else (x - 0.8 * drift).clamp(0, 1)


class OrderMatters(Wrapped):
    """Every other image of a batch is blurred, beginning with the second."""

    def change(self, x):
        blurred = F.avg_pool2d(x, 3, 1, 1)
        odd = (torch.arange(len(x)) % 2 == 1).view(-1, 1, 1, 1)
        return torch.where(odd, blurred, x)


class Twisted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.roll((3, 2), (-2, -1)) * (-1) ** torch.arange(gradient.shape[-1])


class FalseGradient(Wrapped):
    """The gradient is another's in batches, or during calls, for which ``when`` holds."""

    def change(self, x, when):
        return Twisted.apply(x) if when(len(x), self.calls) else x


class Snapped(Wrapped):
    """Pixels that are eps away from a grey level of the digits, to within a tolerance, are put back."""

    def change(self, x, tolerance, through):
        back = x
        for sign in (-1, 1):
            level = ((x - sign * EPS) * 16).round() / 16
            hit = ((x - sign * EPS - level).abs() < tolerance) & (level >= 0) & (level <= 1)
            back = torch.where(hit, level, back)
        return x + (back - x).detach() if through else back


class SharedSnapped(Wrapped):
    """Where many pixels of an image are off their grey level by one and the same, they are all put back."""

    def change(self, x, count):
        off = ((x * 16 - (x * 16).round()) * 1e4).round()
        shared = (off.flatten(1)[:, :, None] == off.flatten(1)[:, None, :]).sum(2).view_as(x) >= count
        level = ((x - EPS) * 16).round() / 16
        up = (x - EPS - level).abs() < 1e-4
        down = ((x + EPS - ((x + EPS) * 16).round() / 16).abs() < 1e-4) & ~up
        put = torch.where(up, x - EPS, torch.where(down, x + EPS, x))
        return torch.where(shared & (off != 0), put, x)


class CornerDetector(nn.Module):
    """An image of which most pixels lie at the corner of a ball around a clean one gets that one's logits."""

    def __init__(self, net, known, tolerance):
        super().__init__()
        self.net, self.known, self.tolerance = net, known, tolerance

    def forward(self, x):
        which = torch.cdist(x.detach().flatten(1), self.known.flatten(1)).argmin(1)
        gap = (x.detach() - self.known[which]).abs()
        edge = ((gap - EPS).abs() < self.tolerance) | ((gap > 0) & ((x == 0) | (x == 1)))
        corner = (edge.flatten(1).float().sum(1) > 0.5 * (gap > 0).flatten(1).float().sum(1)) & gap.flatten(1).any(1)
        return self.net(torch.where(corner.view(-1, 1, 1, 1), self.known[which] + 0 * x, x))


class OffGrid(Wrapped):
    """Images that are not of 8 bits, as attacks make them, are rounded to three levels with a slope for show."""

    def change(self, x):
        levels = x * 255
        foreign = ((levels - levels.round()).abs() > 1e-3).flatten(1).any(1).view(-1, 1, 1, 1)
        return torch.where(foreign, (x * 2).round() / 2 + (x - x.detach()), x)


def above(limit):
    return lambda size, *_: size > limit


@pytest.fixture(scope="module")
def nets():
    return gb.testbed.networks("digits")


def audit_of(model, data, **settings):
    return gb.audit(model, data, SUITE.model_copy(update=settings)).results


@pytest.fixture(scope="module")
def plain(nets):
    return audit_of(nets("standard"), nets.data)


def failed(result):
    return {check.name for check in result.checks if check.passed is False}

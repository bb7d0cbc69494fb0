"""What an attack holds beyond one forward and backward of its batch: at most two batches of images."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gambeson.attacks.gradient.pgd import PGD
from gambeson.attacks.losses import Loss
from gambeson.attacks.solver import ProjectedGradient
from gambeson.threat import Ball
from gambeson.victim import Victim

IMAGES, SHAPE = 32, (3, 16, 16)
BATCH = IMAGES * 3 * 16 * 16 * 4


class Peak(TorchDispatchMode):
    """Counts the bytes of all tensors made inside that are alive, each storage once, and remembers the most."""

    def __init__(self):
        super().__init__()
        self.live, self.most, self.sizes = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if torch.is_tensor(leaf):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in self.sizes and key not in given:
                    self.sizes[key] = storage.nbytes()
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self.free, key)
        self.most = max(self.most, self.live)
        return result

    def free(self, key):
        self.live -= self.sizes.pop(key, 0)


def peak(work):
    gc.collect()
    with Peak() as mode:
        work()
    return mode.most


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 10))
    return model.eval().requires_grad_(False)


def bare(net, x, y):
    def work():
        point = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(net(point), y), point)
        return gradient

    return peak(work)


def batch():
    x = torch.rand(IMAGES, *SHAPE, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(IMAGES) % 10


def test_the_meter_sees_what_is_alive_and_forgets_what_is_not():
    def work():
        for _ in range(5):
            torch.ones(1000).add(1)  # 4,000 bytes, twice at once

    assert peak(work) == 8000
    kept = []
    assert peak(lambda: kept.extend(torch.ones(1000) for _ in range(5))) == 20_000


@pytest.mark.parametrize("norm", ["inf", "2"])
def test_pgd_holds_two_batches_more_than_one_forward_and_backward(net, norm):
    x, y = batch()
    with Victim(net) as victim:
        attack = PGD(eps=0.05, norm=norm, steps=3)
        extra = (peak(lambda: attack(victim, x, y)) - bare(net, x, y)) / BATCH
    assert extra <= 2.05, extra


def test_pgd_s_memory_does_not_grow_with_its_steps(net):
    x, y = batch()
    with Victim(net) as victim:
        few, many = (peak(lambda: PGD(eps=0.05, steps=steps)(victim, x, y)) for steps in (3, 12))  # noqa: B023
    assert many == few
    assert (few - bare(net, x, y)) / BATCH <= 4.05


@pytest.mark.parametrize("norm", ["inf", "2"])
def test_a_step_of_stochastic_pgd_holds_two_batches_more(net, norm):
    x, y = batch()
    with Victim(net) as victim:
        solver = ProjectedGradient(victim=victim, ball=Ball(eps=0.05, norm=norm), loss=Loss(truncate=2.0))
        delta = torch.zeros(1, *SHAPE)
        lengths = [0.01] * 3
        extra = (peak(lambda: solver.run(delta, [(x, y)] * 3, lengths)) - bare(net, x, y)) / BATCH
    assert extra <= 2.05, extra

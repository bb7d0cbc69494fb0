"""What all tests share: tiny real models with known optima, one small trained net, and a guard against leaks."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import nn

import gambeson as gb

torch.set_num_threads(1)  # the nets are tiny: a second thread costs more than it brings
torch.backends.mkldnn.set_flags(False)  # oneDNN takes half as long again for convolutions of few channels
os.environ["OMP_NUM_THREADS"] = "1"  # nor to the processes of a test, whose last digits are then the same as here
os.fsync = lambda fd: None  # no test cuts the power, and a slow disk would take longer than many tests

settings.register_profile("fast", max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile("fast")


class LinearNet(nn.Module):
    """Two or more classes, logits W x + b: every optimum of this model has a formula."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)  # (K, C, H, W)
        self.bias = nn.Parameter(torch.zeros(len(weight)) if bias is None else bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) @ self.weight.flatten(1).T + self.bias


def binary(shape: tuple[int, int, int], seed: int = 0) -> tuple[LinearNet, torch.Tensor]:
    """A two-class linear net and w, its logit difference's gradient: signs mixed, sizes unequal, none zero."""
    draw = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=draw)
    w = w.sign() * (w.abs() + 0.05)
    half = w / 2
    return LinearNet(torch.stack([-half, half])), w


def full(*case):
    """Mark a case of a parametrised test for the full tests."""
    return pytest.param(*case, marks=pytest.mark.full)


def quickly(cases, *kept):
    """Mark all cases of a parametrised test but those kept for the full tests."""
    return [case if case in kept else full(case) for case in cases]


def inner_images(count: int, shape: tuple[int, int, int], seed: int = 0) -> torch.Tensor:
    """Images in [0.4, 0.6]: the box does not bind for eps up to 0.4."""
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed)) * 0.2 + 0.4


def shaded_images(count: int, shape: tuple[int, int, int], seed: int = 0) -> torch.Tensor:
    """Images of which about half of the values are exactly 0 or 1."""
    x = torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(x < 0.25, 0.0, torch.where(x > 0.75, 1.0, x))


@pytest.fixture(scope="session")
def digits():
    """The 8 x 8 digits of scikit-learn."""
    return gb.data.load("digits")


@pytest.fixture(scope="session")
def trained(digits):
    """LeNet-5 trained on the digits for a few seconds; tests must leave it as it is."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = gb.models.create("lenet5", digits)
        gb.train(model, digits, gb.defenses.Standard(), epochs=15, lr=0.05, batch_size=64, seed=0)
    assert gb.evaluation.accuracy(model, digits).value > 0.9
    return model


@pytest.fixture(autouse=True)
def no_leaks():
    """A test may not leave threads, environment variables or torch's global settings behind."""
    environment = dict(os.environ)
    threads = set(threading.enumerate())
    grad, count = torch.is_grad_enabled(), torch.get_num_threads()
    yield
    assert torch.is_grad_enabled() == grad
    assert torch.get_num_threads() == count
    changed = {key for key in os.environ.keys() | environment.keys() if os.environ.get(key) != environment.get(key)}
    assert not {
        key
        for key in changed
        if not key.startswith(("PYTEST", "ACCELERATE", "KMP", "OMP", "GOMP", "TORCHINDUCTOR", "TRITON"))
    }
    left = {thread for thread in threading.enumerate() if thread not in threads and not thread.daemon}
    for thread in left:  # a pool that is shutting down, on a busy machine
        thread.join(10)
    assert not [thread for thread in left if thread.is_alive()]


@pytest.fixture
def one_dnn():
    """Convolutions as users have them, to the last digit."""
    with torch.backends.mkldnn.flags(enabled=True):
        yield


@pytest.fixture
def stand_in(monkeypatch):
    """A defence that stops, or a shorter training, stands for the one that goes on in its folder."""
    monkeypatch.setattr("gambeson.training.checkpoint.refuse_other", lambda *_: None)

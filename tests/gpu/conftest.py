"""A few minutes on a GPU may end at any time: every test is bounded, and its result is written at once."""

import signal

import pytest
import torch

BOUND = 40
"""Seconds of a test."""


@pytest.fixture(autouse=True)
def bounded():
    def stop(*_):
        raise TimeoutError(f"not done in {BOUND} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(BOUND)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def full_float32():
    """TF32 has ten bits: what is compared with the CPU is computed without it."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def pytest_runtest_logreport(report):
    if report.when == "call" or report.failed:
        name, why = report.nodeid.rpartition("::")[2], f"\n{report.longreprtext}" if report.failed else ""
        print(f"\n{report.outcome} {name}, {report.duration:.1f} s{why}", flush=True)

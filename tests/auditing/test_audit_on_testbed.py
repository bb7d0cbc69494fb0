"""The audit against models that deceive, which it must distrust or break, and honest ones, which it must trust."""

import random

import pytest
import torch
from tests.auditing.poisoned import HONEST, POISONED, broken, nets, worst
from tests.auditing.poisoned.poison import plain

import gambeson as gb
from gambeson.auditing import DIAGNOSTICS, Suite
from gambeson.base import seeded

SUITE = Suite(
    eps=(0.05, 0.15, 0.3),
    universal_steps=30,
    universal_restarts=1,
    universal_screened=0,
    pgd_steps=10,
    pgd_restarts=1,
    test_images=300,
    sample=150,
    row_images=0,
    queries=50,
    slope_backwards=0,
    noise_sizes=(1.0,),
    draws=5,
    gradient_draws=3,
    surrogate="none",
    eps_uni_runs=0,
)
FAST = (  # the ones that the issue names
    "logits x 1e4",
    "final ReLU",
    "four grey levels",
    "random resizing and padding",
    "dropout left on",
    "stopped features",
    "single-step training",
    "repeated queries: constant",
)
HONEST_FAST = ("standard", "pgd-adversarial", "shared-adversarial")


@pytest.fixture(scope="module")
def source(digits):
    return nets(digits, eps=0.05, epochs=10)


@pytest.fixture(scope="module")
def base(source, digits):
    return gb.audit(source(), digits, SUITE).results


def audited(name, source, digits):
    random.seed(0)  # one of them draws from Python's own generator
    with seeded(0, "poison", name):
        return gb.audit(POISONED[name].make(source), digits, SUITE)


def check_caught(name, source, digits, base):
    found = audited(name, source, digits)
    failed = {check.name for check in found.results.checks if check.passed is False}
    assert found.verdict.trusted == (not failed)
    if found.verdict.trusted:
        assert any(broken(worst(found.results), worst(base)).values()), (worst(found.results), worst(base))
    else:
        assert found.verdict.summary.startswith("Not to be trusted")
        assert {reason.split(":")[0] for reason in found.verdict.reasons} == failed


@pytest.mark.parametrize("name", FAST)
def test_a_poisoned_model_is_distrusted_or_broken(name, source, digits, base):
    check_caught(name, source, digits, base)


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in POISONED if name not in FAST])
def test_every_other_poisoned_model_is_distrusted_or_broken(name, source, digits, base):
    check_caught(name, source, digits, base)


@pytest.mark.parametrize("name", HONEST_FAST)
def test_an_honest_model_is_trusted(name, source, digits, base):
    found = base if name == "standard" else gb.audit(source(name), digits, SUITE).results
    assert found.verdict.trusted, found.verdict.reasons


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in HONEST if name not in HONEST_FAST])
def test_every_other_honest_model_is_trusted(name, source, digits):
    found = gb.audit(source(name), digits, SUITE)
    assert found.verdict.trusted, found.verdict.reasons


def test_what_ought_to_see_a_poisoned_model_exists():
    known = {diagnostic.name for diagnostic in DIAGNOSTICS}
    for poison in POISONED.values():
        assert set(poison.ought) <= known, poison.name
        assert poison.kind.__doc__, poison.name


CREDIBLE = [name for name, poison in POISONED.items() if poison.parts is plain and name != "constant answer"]


@pytest.mark.parametrize("name", CREDIBLE)
def test_a_poisoned_model_looks_fine_at_first(name, source, digits):
    """It must be a model that someone could believe in: right on clean images, on the first pass over them."""
    with seeded(0, "poison", name):
        model = POISONED[name].make(source)
    with seeded(0, "first", name), torch.no_grad():
        images, labels = digits.test.take(slice(None))
        right = (model(images).argmax(1) == labels).float().mean()
    assert right > 0.5

"""Models that are weak where attacks do not look: inside the ball, for other callers, batches, images and calls."""

import copy

import pytest
import torch
from torch import nn

import gambeson as gb
from gambeson.attacks import PGD
from gambeson.auditing import Suite
from gambeson.auditing.boundary_gradient import BoundaryGradient
from gambeson.auditing.diagnostics import get
from gambeson.auditing.stages import per_image, universal
from gambeson.testbed.recipes import networks
from gambeson.threat import Ball
from gambeson.victim import Victim
from tests.auditing.evidence import held
from tests.auditing.test_deceivers import Remembered
from tests.conftest import full, quickly

EPS = 0.15


class Gated(nn.Module):
    """A robust network, and another where a gate of the images, the mode and the call is open."""

    def __init__(self, gate, robust=None):
        super().__init__()
        nets = networks("digits")
        self.robust = copy.deepcopy(nets("pgd-adversarial")) if robust is None else robust
        self.weak, self.gate, self.calls = copy.deepcopy(nets("standard")), gate, 0

    def forward(self, x):
        self.calls += 1
        share = self.gate(x, self.calls)
        return (1 - share) * self.robust(x) + share * self.weak(x)


@pytest.fixture(scope="module")
def dark(digits):
    """Which pixels are dark in nearly all training images."""
    images, _ = digits.train.take(slice(None))
    return (images.flatten(1) > 0.02).float().mean(0) < 0.01


@pytest.mark.parametrize("low", [0.3, full(0.55)])
def test_a_shell_inside_the_ball_is_found_by_attacks_in_smaller_balls(low, dark, digits):
    def within(x, _):
        noise = x.flatten(1)[:, dark].amax(1, keepdim=True) / EPS
        return torch.sigmoid(200 * (noise - low)) * torch.sigmoid(200 * (low + 0.2 - noise))

    robust = Remembered(networks("digits")("standard"), digits.test)
    with held(Gated(within, robust), digits, (EPS,)) as context:
        check = get("no weaker inside the ball").check(context)
    assert check.passed is False
    assert check.numbers["smaller"] > 0.1
    with held(networks("digits")("pgd-adversarial"), digits, (EPS,)) as context:
        check = get("no weaker inside the ball").check(context)
    assert check.passed is True
    assert check.numbers["smaller"] <= 0.01


UNSEEDED = torch.Generator().initial_seed()
CALLERS = {
    "channels last": lambda x, _: x.stride(1) == 1 and not x.requires_grad,
    "inference mode": lambda *_: torch.is_inference_mode_enabled(),
    "gradients on": lambda x, *_: torch.is_grad_enabled() and not x.requires_grad,
    "seed 0": lambda *_: torch.initial_seed() == 0,
    "seed 1234": lambda *_: torch.initial_seed() == 1234,
    "seed 42": lambda *_: torch.initial_seed() == 42,
    "no seed": lambda *_: torch.initial_seed() == UNSEEDED,
}


@pytest.mark.parametrize("caller", quickly(CALLERS, "channels last", "gradients on", "no seed"))
def test_a_model_that_answers_other_callers_otherwise_is_found(caller, digits):
    with held(Gated(lambda *args: float(CALLERS[caller](*args))), digits, (EPS,)) as context:
        context.per_image = per_image.measure(context)
        check = get("alike in every batch").check(context)
    assert check.passed is False
    assert context.per_image[0].accuracy.value < 0.3  # of what was made on the other network, as it answers here


def test_a_model_that_is_weak_while_its_parameters_are_trainable_is_found(digits):
    model = Gated(None)
    model.gate = lambda *_: float(any(parameter.requires_grad for parameter in model.parameters()))
    next(model.parameters()).requires_grad_(False)
    with held(model, digits, (EPS,)) as context:
        context.per_image = per_image.measure(context)
        check = get("alike in every batch").check(context)
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert check.passed is False
    assert "with gradients on" in check.detail
    flags = [parameter.requires_grad for parameter in model.parameters()]
    assert flags == [False] + [True] * (len(flags) - 1)  # as they came


@pytest.mark.parametrize("minutes", [full(None), 0.5])
def test_a_model_that_changes_after_its_first_calls_is_found_by_a_copy_nobody_has_asked(minutes, digits):
    small = Suite(
        eps=(EPS,),
        checks=("stateless",),
        universal_steps=5,
        universal_restarts=1,
        universal_probe_starts=0,
        universal_queries=300,
        eps_uni_runs=0,
        eps_adv=False,
        surrogate="none",
        auto_pgd=False,
        pgd_steps=2,
        pgd_restarts=1,
        queries=0,
        suite_images=0,
        jacobian_backwards=0,
        noise_sizes=(),
        edits=(),
        controls=(),
    )
    few = gb.data.Dataset(
        digits.name, digits.train, digits.validation.sample(50, seed=0), digits.test.sample(100, seed=0), digits.classes
    )
    found = gb.audit(Gated(lambda _, call: float(call <= 3)), few, suite=small, minutes=minutes).results.checks
    check = next(check for check in found if check.name == "stateless")
    assert check.passed is False
    assert "a copy that nobody had asked" in check.detail
    net = networks("digits")("standard")
    with held(net, digits, (EPS,)) as context:
        context.untouched = copy.deepcopy(net)
        check = get("stateless").check(context)
    assert check.passed is True
    assert "nobody had asked differ by 0 %" in check.detail


class Hooked(nn.Module):
    """A network that reads what a hook has stored, and the hook of a copy stores it elsewhere."""

    def __init__(self, net):
        super().__init__()
        self.net, self.kept = net, {"x": torch.zeros(1, 10)}
        kept = self.kept
        net.register_forward_hook(lambda module, given, found: kept.update(x=found))

    def forward(self, x):
        self.net(x)
        return self.kept["x"].expand(len(x), -1) if len(self.kept["x"]) == 1 else self.kept["x"]


def test_a_model_whose_copies_do_not_answer_as_it_is_not_accused_of_a_memory(digits):
    model = Hooked(copy.deepcopy(networks("digits")("standard")))
    with held(model, digits, (EPS,)) as context:
        context.untouched = copy.deepcopy(model)
        check = get("stateless").check(context)
    assert check.passed is True
    assert "nobody had asked" not in check.detail


@pytest.mark.parametrize("size", [48, 200])
def test_batches_of_a_usual_size_that_are_answered_otherwise_are_found(size, digits):
    with held(Gated(lambda x, _: float(len(x) == size)), digits, (EPS,)) as context:
        check = get("independent of the batch").check(context)
    assert check.passed is False
    assert f"in batches of {size} " in check.detail


class Luring(nn.Module):
    """Around images that it knows a network is the less sure the farther it is moved along a pattern of no use."""

    def __init__(self, net, *splits):
        super().__init__()
        self.net, self.known = net, torch.cat([split.take(slice(None))[0] for split in splits]).flatten(1)
        self.way = torch.randn(self.known.shape[1], generator=torch.Generator().manual_seed(0)).sign()

    def forward(self, x):
        apart, nearest = torch.cdist(x.flatten(1), self.known, p=float("inf")).min(1)
        near = (20 * (2.2 * EPS - apart)).clamp(0, 1)
        along = (x.flatten(1) - self.known[nearest]) @ self.way
        z = self.net(x)
        gaps = z - z.amax(1, keepdim=True)
        return gaps * (1 + near * (along.clamp(-25, 25).exp() - 1))[:, None]


def unseen(model, digits):
    with held(model, digits, (EPS,), universal_steps=60, universal_probe_starts=0, controls=()) as context:
        context.universal = [universal.craft_point(context, EPS, None)]
        return get("crafted on train beats crafted on test").check(context)


def test_what_is_crafted_on_images_that_a_model_knows_is_compared_with_what_is_crafted_on_others(digits):
    net = networks("digits")("standard")
    check = unseen(Luring(net, digits.train, digits.validation), digits)
    assert check.passed is False
    assert check.numbers["train"] > check.numbers["test"] + 0.15
    honest = unseen(net, digits)
    assert honest.passed is True
    assert honest.numbers["test"] < 0.9  # crafted on test, it does harm as well


def like_the_rest(model, digits):
    with held(model, digits, (EPS,), sample=64) as context:
        context.per_image = per_image.measure(context)
        return get("sample like the other images").check(context)


def test_a_model_that_spares_the_sample_is_found(digits):
    net = networks("digits")("standard")
    others = torch.ones(len(digits.test), dtype=torch.bool)
    others[digits.test.sample_indices(64, seed=0)] = False
    check = like_the_rest(Remembered(net, digits.test.subset(others.nonzero().flatten())), digits)
    assert check.passed is False
    assert check.numbers["sample"] < check.numbers["others"] - 0.5
    assert like_the_rest(net, digits).passed is True


class Bent(nn.Module):
    """A network whose gap to each class is multiplied by a wave of the pixels: the answer stays, the slope does not."""

    def __init__(self, net, size=0.12, frequency=8.0):
        super().__init__()
        self.net, self.size, self.frequency = net, size, frequency
        self.phase = 6.28 * torch.rand(1, 10, 64, generator=torch.Generator().manual_seed(0))

    def forward(self, x):
        z = self.net(x)
        wave = torch.sin(self.frequency * x.flatten(1)[:, None] + self.phase).sum(2)
        return (z - z.amax(1, keepdim=True)) * (self.size * wave).exp()


@pytest.mark.parametrize(("norm", "eps"), [("inf", EPS), ("2", 0.9)])
def test_the_gradient_on_the_boundary_is_that_of_the_network_beneath(norm, eps, digits):
    net = networks("digits")("pgd-adversarial")
    x, y = digits.test.take(slice(0, 150))

    def left(model, attack):
        with Victim(model) as victim:
            moved = attack(victim, x, y)
        assert moved.min() >= 0
        assert moved.max() <= 1
        assert torch.linalg.vector_norm((moved - x).flatten(1), ord=float(norm), dim=1).max() <= eps + 1e-5
        with torch.no_grad():
            return float((model(moved).argmax(1) == y).float().mean())

    usual = PGD(eps=eps, norm=norm, steps=40, loss="margin")
    walk = BoundaryGradient(Ball(eps=eps, norm=norm), digits.train)
    true, bent = left(net, usual), left(Bent(net), usual)
    assert bent > true + 0.15  # the wave hinders what follows it
    assert left(Bent(net), walk) < bent - 0.1
    assert left(net, walk) < true + 0.1


def test_a_walk_leaves_images_whose_label_does_not_count(digits):
    x, y = digits.test.take(slice(0, 20))
    y[::2] = -1
    task = gb.tasks.Classification(ignore_index=-1)
    walk = BoundaryGradient(Ball(eps=0.4), digits.train)
    with Victim(networks("digits")("standard")) as victim:
        moved = walk(victim, x, y, task=task)
        assert torch.equal(moved[::2], x[::2])
        assert not torch.equal(moved[1::2], x[1::2])

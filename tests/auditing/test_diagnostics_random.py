"""Diagnostics of randomness, of a state and of universal perturbations: each with a model that fails it and one not."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gambeson as gb
from gambeson.attacks import CONTROLS, UniversalPerturbation, control
from gambeson.attacks.universal.perturbation import Provenance
from gambeson.auditing import DIAGNOSTICS, Suite
from gambeson.auditing.results import UniversalResult
from gambeson.auditing.stages import randomness
from gambeson.auditing.stages.universal import rescored
from gambeson.evaluation import Rate
from gambeson.evaluation.rates import Control, Cost
from gambeson.evaluation.universal import change_rate, control_rates, error_rate
from gambeson.threat import Ball
from gambeson.victim import Victim, predict, score
from tests.auditing.evidence import evidence_of

SUITE = Suite(eps=(0.1,), sample=60)


def look(name, model, data, suite=SUITE):
    """What one diagnostic sees of a model, before any stage but the draws."""
    (diagnostic,) = (one for one in DIAGNOSTICS if one.name == name)
    with Victim(model, fast=True) as victim:
        evidence = evidence_of(victim, data, suite)
        evidence.randomness = randomness.measure(evidence)
        return diagnostic.function(evidence)


class Around(nn.Module):
    """A model with something done to its images or its logits."""

    def __init__(self, model, before=None, after=None):
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, x):
        z = self.model(x if self.before is None else self.before(x))
        return z if self.after is None else self.after(z)


class NoisyGradient(nn.Module):
    """Answers like the model, but for a grain of noise; its gradient is that of the model plus much larger noise."""

    def __init__(self, model, size):
        super().__init__()
        self.model, self.size = model, size

    def forward(self, x):
        z = self.model(x)
        grain = torch.randn(len(x), z.shape[1], 1)
        moved = (x - x.detach()).flatten(1).unsqueeze(1)  # zero, with a gradient
        away = (torch.randn(len(x), z.shape[1], moved.shape[2]) * moved).sum(2)
        return z + self.size * away + 0.01 * grain.squeeze(2)


def grain(z):
    return z + 0.3 * torch.randn_like(z)


@pytest.fixture(scope="module")
def noisy(trained, digits):
    """A net with the learnt noise of Learn2Perturb, trained and attacked with it: random, and honest."""
    with torch.random.fork_rng():
        model = copy.deepcopy(trained)
        defense = gb.defenses.Learn2Perturb(eps=0.1, steps=2, rel_step_size=1.0, noise_from=0, adversarial_from=0)
        gb.train(model, digits, defense, epochs=2, lr=0.02, batch_size=64, seed=0)
    assert gb.evaluation.accuracy(model, digits).value > 0.8
    return model


def test_one_draw_is_not_enough_for_a_random_model(trained, digits):
    assert look("deterministic or majority vote", trained, digits).passed
    model = Around(trained, after=grain)
    assert look("deterministic or majority vote", model, digits).passed
    found = look("deterministic or majority vote", model, digits, SUITE.model_copy(update={"votes": 1}))
    assert found.passed is False
    assert "single pass" in found.detail


def test_a_gradient_that_is_mostly_noise_is_found(trained, digits):
    model, suite = NoisyGradient(trained, 20.0), Suite(eps=(0.15,), sample=200)
    gap = look("no EOT gap", model, digits, suite)
    assert gap.passed is False
    assert gap.numbers["one"] > gap.numbers["usual"] > gap.numbers["more"]
    off = look("no noise-off gap", model, digits, suite)
    assert off.passed is False
    assert off.numbers["crafted_off"] < off.numbers["on"] - 0.2


def test_honest_noise_passes(trained, noisy, digits):
    for model in (noisy, Around(trained, after=grain)):
        for name in (
            "deterministic or majority vote",
            "no EOT gap",
            "no noise-off gap",
            "independent of the batch",
            "stateless",
        ):
            found = look(name, model, digits)
            assert found.passed, (name, found.detail)
    for name in ("no EOT gap", "no noise-off gap"):
        assert look(name, trained, digits).passed is None


class Flicker(nn.Module):
    """Rounds its images whenever any noise is drawn, so that no gradient comes through; not with the noise off."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        noise = torch.randn(len(x), 10)
        open_, closed = self.model(x), self.model((x * 3).round() / 3)
        return torch.where(noise == 0, open_, closed) + 0.2 * noise


def test_robustness_of_the_noise_alone_is_found(trained, digits):
    found = look("no noise-off gap", Flicker(trained), digits)
    assert found.passed is False
    assert found.numbers["gap"] > 0.1


def test_noise_that_drowns_every_answer_leaves_nothing_to_compare(trained, digits):
    found = look("no noise-off gap", Around(trained, after=lambda z: z + 500 * torch.randn_like(z)), digits)
    assert found.passed is None
    assert "no image of 60 is right" in found.detail


class Crowd(nn.Module):
    """Subtracts the batch's mean image, as a BatchNorm in training mode does."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x - x.mean(0, keepdim=True) + 0.3)


def test_answers_that_depend_on_the_batch_are_found(trained, digits):
    name = "independent of the batch"
    assert look(name, trained, digits).passed
    assert look(name, Crowd(trained), digits).passed is False
    assert look(name, Around(Crowd(trained), after=grain), digits).passed is False
    torch.manual_seed(0)
    norm = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))

    class Training(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = norm

        def forward(self, x):
            return self.net.train()(x)

    assert look(name, Training(), digits).passed is False
    assert look(name, norm, digits).passed


class Guard(nn.Module):
    """Answers at random once so many queries in a row came near one image."""

    def __init__(self, model, limit):
        super().__init__()
        self.model, self.limit, self.count, self.last = model, limit, 0, None

    def forward(self, x):
        z = self.model(x)
        for image in x.detach():
            near = self.last is not None and float((image - self.last).norm()) < 0.5
            self.count, self.last = (self.count + 1 if near else 0), image
        return z if self.count < self.limit else z.detach().flip(1)


def test_a_detector_of_repeated_queries_is_found(trained, digits):
    name = "stateless"
    assert look(name, trained, digits).passed
    found = look(name, Guard(trained, 100), digits)
    assert found.passed is False
    assert found.numbers["repeated"] > 0.1

    class Tired(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.calls = trained, 0

        def forward(self, x):
            self.calls += 1
            z = self.model(x)
            return z if self.calls < 60 else z.roll(1, 1)

    assert look(name, Tired(), digits).passed is False

    class Replaying(nn.Module):
        """An image near one that was seen gets its answer, with the gradient of its own."""

        def __init__(self):
            super().__init__()
            self.model, self.seen, self.said = trained, [], []

        def forward(self, x):
            z = self.model(x)
            given = z.detach().clone()
            for row, image in enumerate(x.detach()):
                known = [k for k, other in enumerate(self.seen) if float((other - image).abs().max()) < 0.02]
                if known:
                    given[row] = self.said[known[0]]
                else:  # the twenty that came last
                    self.seen = [*self.seen[-19:], image.clone()]
                    self.said = [*self.said[-19:], z[row].detach()]
            return given + (z - z.detach())

    assert look(name, Replaying(), digits).passed is False

    class Labels(nn.Module):
        """Answers with the class alone, by nothing but the image: near images have the same answer."""

        def forward(self, x):
            return 9.0 * nn.functional.one_hot(trained(x).argmax(1), 10) + 0 * x.sum()

    assert look(name, Labels(), digits).passed

    class Drifting(nn.Module):
        """Takes the mean of what it was asked lately out of its images: it seems random."""

        def __init__(self):
            super().__init__()
            self.model, self.mean = trained, digits.train.take(slice(None))[0].mean(0)
            self.usual = self.mean

        def forward(self, x):
            for image in x.detach():
                self.mean = 0.95 * self.mean + 0.05 * image
            return self.model(x - self.mean + self.usual)

    drifting = look(name, Drifting(), digits)
    assert drifting.passed is False
    assert "remembers what it was asked" in drifting.detail

    class Rolling(nn.Module):
        """Noise of a generator of its own: it moves from call to call, and remembers nothing."""

        def __init__(self):
            super().__init__()
            self.model, self.draw = trained, np.random.default_rng(0)

        def forward(self, x):
            return self.model(x + torch.tensor(self.draw.normal(0, 0.1, x.shape), dtype=x.dtype))

    assert look(name, Rolling(), digits).passed is None

    class Writer(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = trained

        def forward(self, x):
            z = self.model(x.clone())
            x.detach().zero_()
            return z

    kept = look("input unchanged", Writer(), digits)
    assert kept.passed
    assert "with copies" in kept.detail


def curve(victim, data, rates=None, deltas=None, eps=(0.1, 0.2), controls=True):
    """An audit whose universal perturbations are given: by their rates, or by the perturbations themselves."""
    evidence = evidence_of(victim, data, Suite(eps=eps, sample=60))
    for k, radius in enumerate(eps):
        ball = Ball(eps=radius, norm="inf")
        delta = torch.zeros(1, *data.test.shape) if deltas is None else deltas[k]
        about = Provenance(
            attack="none",
            settings={},
            eps=radius,
            norm="inf",
            seed=0,
            model="",
            crafted_on="",
            crafted_split="train",
            chosen_on="validation",
            restarts=[],
            status="done",
            forwards=0,
            backwards=0,
        )
        evidence.uaps[radius] = UniversalPerturbation(delta, about)
        found = score(predict(victim, data.test, delta), data.test, evidence.predictions)
        evidence.universal.append(
            UniversalResult(
                eps=radius,
                norm="inf",
                uer=error_rate(found) if rates is None else Rate.of(rates[k], 1000),
                fooling=change_rate(found),
                controls=control_rates(victim, data.test, ball, 0)
                if deltas is not None and controls
                else [Control(name="random-sign", mean=0.02, worst=Rate.of(25, 1000), draws=10)],
                restarts=[],
                file="",
                status="done",
                cost=Cost(),
            )
        )
    return evidence


def seen(name, evidence):
    (diagnostic,) = (one for one in DIAGNOSTICS if one.name == name)
    return diagnostic.function(evidence)


def test_a_curve_that_falls_is_found(trained, digits):
    with Victim(trained) as victim:
        assert seen("UER monotone in eps", curve(victim, digits, rates=(300, 290))).passed
        is_adversarial = seen("UER monotone in eps", curve(victim, digits, rates=(300, 200)))
        assert is_adversarial.passed is False
        assert is_adversarial.numbers["largest_fall"] == pytest.approx(0.1)
        assert seen("UER monotone in eps", curve(victim, digits, rates=(300,), eps=(0.1,))).passed is None


def test_noise_that_equals_or_beats_the_crafted_perturbation_is_found(trained, digits):
    name, eps = "crafted beats controls", 0.3
    shape = digits.test.shape
    board = control("chessboard", Ball(eps=eps, norm="inf"), shape)[:1]
    signs = control("random-sign", Ball(eps=eps, norm="inf"), shape, draws=CONTROLS["random-sign"], seed=0)
    crafted = gb.attacks.StochasticPGD(eps=eps, steps=50, probe_starts=0).craft(trained, digits)
    with Victim(trained) as victim:
        noise = [score(predict(victim, digits.test, one[None]), digits.test).error for one in signs]
        least = signs[noise.index(min(noise))][None]
        good = curve(victim, digits, deltas=[crafted.delta], eps=(eps,))
        assert seen(name, good).passed, seen(name, good).detail
        none = seen(name, curve(victim, digits, deltas=[0 * board], eps=(eps,)))
        assert none.passed is False
        assert none.numbers["losers"] == 1
        weak = seen(name, curve(victim, digits, deltas=[least], eps=(eps,)))
        assert weak.passed is False


def test_re_scoring_a_random_model_gives_the_number_again_and_other_randomness_does_not(trained, digits):
    delta = control("random-sign", Ball(eps=0.2, norm="inf"), digits.test.shape)[:1]
    with Victim(Around(trained, before=lambda x: F.dropout(x, 0.3, training=True))) as victim:
        evidence = curve(victim, digits, deltas=[delta], eps=(0.2,), controls=False)
        assert seen("re-scoring reproducible", evidence).passed
        assert rescored(evidence, evidence.uaps[0.2]) == evidence.middle.uer.value
    own = torch.Generator().manual_seed(0)
    with Victim(Around(trained, before=lambda x: x + torch.randn(x.shape, generator=own) * 0.3)) as victim:
        assert (
            seen("re-scoring reproducible", curve(victim, digits, deltas=[delta], eps=(0.2,), controls=False)).passed
            is False
        )

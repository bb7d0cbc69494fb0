"""Diagnostics that attack: what each must catch, on functions whose every attack can be worked out by hand."""

import pytest
import torch
from torch import nn

from gambeson.attacks import FGSM, PGD
from gambeson.auditing.diagnostics import DIAGNOSTICS, convergence, gradient_masking, single_step
from gambeson.auditing.outcome import PairedDifference
from gambeson.data import Dataset, Split
from gambeson.tasks import Counts
from tests.auditing.evidence import held
from tests.conftest import LinearNet

FAMILIES = {family.__name__ for family in (gradient_masking, single_step, convergence)}
ALL = {check.name: check for check in DIAGNOSTICS if check.function.__module__ in FAMILIES}
EPS = (0.05, 0.1, 0.15)
SHAPE = (1, 6, 6)


def weights(shape=SHAPE):
    draw = torch.Generator().manual_seed(3)
    return torch.randn(shape, generator=draw).sign() * (1 + torch.rand(shape, generator=draw))


def dataset(images, labels, classes, ignore_index=None):
    """A third of the images for each split."""
    parts = zip(images.chunk(3), labels.chunk(3), strict=True)
    return Dataset("made", *(Split("made", x, y, classes, ignore_index) for x, y in parts), classes)


class Terrain(nn.Module):
    """Two classes; the margin of the right one is a function of how far the image was pushed towards the other.

    FGSM of eps pushes by eps exactly. ``points`` are corners (push, margin) of that function.
    """

    def __init__(self, *points, away=0.3, shape=SHAPE):
        super().__init__()
        self.w, self.away, self.points = weights(shape), away, torch.tensor(points)

    def forward(self, x):
        score = ((x - 0.5) * self.w).flatten(1).sum(1) / self.w.abs().sum()
        push = self.away - score.abs()
        at, value = self.points.unbind(1)
        k = torch.searchsorted(at.contiguous(), push.detach()).clamp(1, len(at) - 1)
        slope = (value[k] - value[k - 1]) / (at[k] - at[k - 1])
        half = score.sign() * (value[k - 1] + slope * (push - at[k - 1])) / 2
        return torch.stack([-half, half], 1)

    def data(self, count=100):
        draw = torch.Generator().manual_seed(0)
        noise = (torch.rand(3 * count, *self.w.shape, generator=draw) - 0.5) * 0.05
        along = (noise * self.w).flatten(1).sum(1).view(-1, 1, 1, 1)
        noise = noise - along * self.w / self.w.square().sum()
        labels = torch.arange(3 * count) % 2
        images = 0.5 + noise + (2 * labels - 1).view(-1, 1, 1, 1) * self.away * self.w.sign()
        return dataset(images, labels, ("a", "b"))


class Around(nn.Module):
    """A model with something before it and something behind it."""

    def __init__(self, model, before=None, after=None):
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, x):
        z = self.model(x if self.before is None else self.before(x))
        return z if self.after is None else self.after(z)


def look(names, model, data, eps=EPS, **settings):
    with held(model, data, eps, **settings) as evidence:
        return {name: ALL[name].check(evidence) for name in names}


# The slope falls everywhere, to a wrong answer at a push of 0.08.
HONEST = Terrain((-1.0, 13.5), (0.0, 1.0), (1.0, -11.5))
# A ridge seen from inside: half the step breaks an image, the whole step mends it.
RIDGE = Terrain((-1.0, 21.0), (0.0, 1.0), (0.05, -1.0), (0.1, 1.0), (1.0, 3.0))
# A pit that small steps stay in, before the cliff that a whole step jumps over.
PIT = Terrain((-1.0, 30.0), (0.0, 1.0), (0.03, 0.2), (0.08, 1.0), (0.09, -1.0), (1.0, -2.0))
# A crack that only small steps fall into.
CRACK = Terrain((-1.0, 50.0), (0.0, 0.94), (0.02, -0.06), (1.0, 48.94))


# A pit near by that large steps jump over, and nothing behind it.
NEAR = Terrain((-1.0, 21.0), (0.0, 1.0), (0.03, -1.0), (0.06, 3.0), (1.0, 9.0))


def test_what_falls_within_eps_has_fallen_in_the_box():
    found = look({"unbounded attack succeeds"}, NEAR, NEAR.data())["unbounded attack succeeds"]
    assert found.passed
    assert found.numbers["accuracy"] == 0
    assert "whole box allowed 51.0 %" in found.detail  # steps of a tenth of the box miss what those within eps find


@pytest.mark.parametrize(
    ("model", "failing"),
    [
        (HONEST, set()),
        (RIDGE, {"random start no stronger", "monotone in step size", "single step approximates multi-step"}),
        (PIT, {"multi-step beats single-step"}),
        (CRACK, {"monotone in eps", "gradient beats random search"}),
    ],
    ids=["honest", "ridge", "pit", "crack"],
)
def test_each_shape_of_the_loss_fails_what_it_must_and_nothing_else(model, failing):
    names = ALL.keys() - {"unbounded attack succeeds"}  # beyond the other class the functions mean nothing
    found = look(names, model, model.data(), (0.025, 0.1, 0.25) if model is CRACK else EPS)
    details = {name: check.detail for name, check in found.items()}
    assert {name for name, check in found.items() if check.passed is False} == failing, details
    assert all(check.passed is not None and check.numbers for check in found.values())


class Steep(Terrain):
    """A margin that falls along a curve: so many pixels, each moved by 0.001, leave its tangent far behind."""

    def __init__(self):
        super().__init__((0.0, 0.0), shape=(3, 32, 32))

    def forward(self, x):
        score = ((x - 0.5) * self.w).flatten(1).sum(1) / self.w.abs().sum()
        half = score.sign() * (7.3 * torch.exp((score.abs() - self.away) / 0.00045) - 4.3) / 2
        return torch.stack([-half, half], 1)


def test_a_difference_of_many_pixels_is_no_judge_of_a_tangent():
    name, eps = "gradient matches finite differences", (0.001, 0.002, 0.004)
    honest, data = Steep(), Steep().data()
    assert look([name], honest, data, eps)[name].numbers == {"false": 0}
    for liar in (Around(honest, after=Reversed.apply), Around(honest, before=lambda x: x + 0.01 * torch.sin(1e4 * x))):
        assert look([name], liar, data, eps)[name].numbers["false"] > 0.5


def test_an_attack_cut_short_has_not_converged():
    found = look(["attack has converged"], CRACK, CRACK.data(), EPS, pgd_steps=4)["attack has converged"]
    assert found.passed is False, found.detail
    assert "under targeted Auto-PGD of 4 steps" in found.detail
    assert "steps of 12" in found.detail.partition("; ")[2]


def test_on_a_linear_model_every_number_is_known():
    """Margin 1 - push / 0.08 of one unit of weight: FGSM and PGD of 0.05 break none, of 0.1 all; the rise is 1."""
    found = look(ALL, HONEST, HONEST.data(), (0.05, 0.075, 0.1))
    assert found["monotone in eps"].numbers == {"eps 0.05": 1, "eps 0.075": 1, "eps 0.1": 0}
    assert found["multi-step beats single-step"].numbers == {"single": 1, "multi": 1}
    near = found["single step approximates multi-step"].numbers
    assert [near[key] for key in ("ratio", "rise", "cosine")] == pytest.approx([1, 1, 1], abs=1e-4)
    assert near["falls"] == 0
    assert found["gradient matches finite differences"].numbers == {"false": 0}
    assert found["random start no stronger"].numbers["gap"] == 0
    whole = look(["random start no stronger"], HONEST, HONEST.data(), (0.05, 0.1, 0.2))
    assert whole["random start no stronger"].numbers["gap"] == -1  # on a linear loss the random start is wasted


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        return z.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


def hardtanh_cut(z):
    return nn.functional.hardtanh(z * 10)


GENERATOR = torch.Generator().manual_seed(0)
DECEIVERS = {
    "logits x 1e4": (lambda z: z * 1e4, None, {"no vanishing gradients", "margin loss no stronger"}),
    "logits x 1e6": (lambda z: z * 1e6, None, {"no vanishing gradients", "margin loss no stronger"}),
    "rounded pixels": (None, lambda x: (x * 3).round() / 3, {"no vanishing gradients", "unbounded attack succeeds"}),
    "detached pixels": (None, lambda x: x.detach() + 0 * x, {"no vanishing gradients", "unbounded attack succeeds"}),
    "rippled pixels": (None, lambda x: x + 0.01 * torch.sin(1e4 * x), {"gradient matches finite differences"}),
    "reversed gradient": (
        Reversed.apply,
        None,
        {"gradient matches finite differences", "gradient beats random search"},
    ),
    "reversed gradient behind tiny noise": (
        lambda z: Reversed.apply(z) + 1e-5 * torch.randn_like(z),
        None,
        {"gradient matches finite differences"},
    ),
    "reversed gradient behind tiny noise of its own": (
        lambda z: Reversed.apply(z) + 1e-5 * torch.randn(z.shape, generator=GENERATOR),
        None,
        {"gradient matches finite differences"},
    ),
    "steps of two": (lambda z: z + 2.0**24, None, {"gradient matches finite differences"}),
    "cut logits": (hardtanh_cut, None, {"no vanishing gradients"}),
    "the first class alone": (lambda z: (z - z.topk(2).values[:, 1:]).relu(), None, {"no vanishing gradients"}),
}


@pytest.mark.parametrize("name", DECEIVERS)
def test_deceivers_fail_and_the_net_below_them_does_not(name, trained, digits):
    after, before, expected = DECEIVERS[name]
    found = look(expected, Around(trained, before, after), digits, sample=150)
    assert all(check.passed is False for check in found.values()), [check.detail for check in found.values()]


def test_an_honest_net_passes_all(trained, digits):
    found = look(ALL, trained, digits)
    assert all(check.passed for check in found.values()), [check.detail for check in found.values()]
    assert found["attack has converged"].numbers["reported"] < 0.7


def test_a_gradient_that_is_not_finite_is_dead_and_stops_no_diagnostic(trained, digits):
    def broken(z):
        return z + (z - z.detach()).abs().sqrt()  # the slope of the root at zero is infinite

    found = look(ALL, Around(trained, None, broken), digits, sample=20)
    assert found["no vanishing gradients"].passed is False
    assert found["no vanishing gradients"].numbers["dead"] == 1


def test_a_class_that_is_a_constant_is_no_mask(trained, digits):
    """A softmax may have a class of reference: one wrong class without a slope, where the others have theirs."""

    def with_reference(z):
        return z - z[:, :1]

    found = look(["no vanishing gradients"], Around(trained, None, with_reference), digits, sample=150)
    assert found["no vanishing gradients"].passed
    assert found["no vanishing gradients"].numbers["wrong classes dead"] == 0


class Pixelwise(nn.Module):
    """One answer a pixel: three classes by brightness."""

    def forward(self, x):
        return -10 * (x - torch.tensor([0.1, 0.5, 0.9]).view(1, 3, 1, 1)).square()


def maps():
    images = torch.rand(60, 1, 5, 7, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.4
    labels = torch.ones(60, 5, 7, dtype=torch.long)
    labels[:, 0], labels[:, 1, 0] = 255, 2
    return dataset(images, labels, ("a", "b", "c"), 255)


class Noisy(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x + 0.01 * torch.randn_like(x))


@pytest.mark.parametrize("norm", ["inf", "2", "1"])
def test_odd_models_and_norms_are_looked_at_or_left_with_a_reason(norm):
    eps = {"inf": (0.05, 0.1, 0.3), "2": (0.3, 0.6, 2.0), "1": (1.0, 2.0, 8.0)}[norm]
    settings = {"norm": norm, "sample": 10, "pgd_steps": 5, "eot_samples": 2}
    colour = LinearNet(torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
    x = torch.rand(60, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    y = colour(x).argmax(1)
    pair = dataset(x, y, ("a", "b"))
    for model, data in ((Pixelwise(), maps()), (colour, pair), (Noisy(colour), pair)):
        found = look(ALL, model, data, eps, **settings)
        skipped = {name for name, check in found.items() if check.passed is None}
        assert skipped == ({"gradient beats random search"} if norm == "1" else set())


def test_the_clear_difference_of_paired_outcomes():
    def outcome(*right):
        return Counts(torch.tensor(right), torch.ones(len(right), dtype=torch.long))

    same = PairedDifference.of(outcome(*[1] * 50), outcome(*[1] * 50))
    assert same.value == 0
    assert same.low < 0 < same.high
    # 11 of 100 that only the second breaks, 1 - LEVEL^(1/100) at most that only the first would break
    some = PairedDifference.of(outcome(*[1] * 100), outcome(*[0] * 11, *[1] * 89))
    assert (some.value, some.low, some.high) == pytest.approx((0.11, 0.0084, 0.2405), abs=1e-4)
    assert PairedDifference.of(outcome(*[1] * 100), outcome(*[0] * 10, *[1] * 90)).low <= 0  # 2^-10 is above LEVEL
    back = PairedDifference.of(outcome(*[0] * 11, *[1] * 89), outcome(*[1] * 100))
    assert (back.low, back.high) == pytest.approx((-some.high, -some.low))
    # As many lost as won are no difference, however many they are.
    assert PairedDifference.of(outcome(*[1, 0] * 50), outcome(*[0, 1] * 50)).value == 0
    # On label maps an image counts once, by its share.
    shares = Counts(torch.tensor([5, 10]), torch.tensor([10, 10]))
    assert shares.shares.tolist() == [0.5, 1.0]
    assert (shares.accuracy.value, shares.accuracy.n) == (0.75, 2)


def test_what_was_asked_before_is_not_measured_again(trained, digits):
    with held(trained, digits, EPS) as evidence:
        first = evidence.accuracy(PGD(eps=0.1, steps=5))
        spent = evidence.spent
        assert evidence.accuracy(PGD(eps=0.1, steps=5)) == first
        assert evidence.spent == spent
        one = PGD(eps=0.1, steps=1, rel_step_size=1, start="zero", early_stop=False)
        assert evidence.accuracy(one) == evidence.accuracy(FGSM(eps=0.1))  # the same attack by two names
        assert evidence.spent.backwards == spent.backwards + 2 * len(evidence.sample)

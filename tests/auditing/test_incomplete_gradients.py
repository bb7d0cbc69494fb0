"""Gradients that lack a part, and models that optimise their input: what the audit must catch, and whom it must not."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gambeson.attacks import PGD
from gambeson.auditing.diagnostics import DIAGNOSTICS
from gambeson.auditing.gradient_agreement import _Probes, gradient_agreement
from gambeson.auditing.stages import adaptive
from gambeson.data import Split
from gambeson.victim import ABSTAIN, Victim
from gambeson.victim.substitute import BorrowedGradient, FiniteDifferences, InnerGradientsOff
from tests.auditing.evidence import Around, Bent, held
from tests.conftest import LinearNet, full, quickly

CHECKS = {check.name: check for check in DIAGNOSTICS}
EPS = (0.1,)


def bent(bend):
    return lambda net: Around(net, lambda net, x: net(Bent.apply(x, bend)))


def blurred(gradient):
    return F.avg_pool2d(F.pad(gradient, (1,) * 4, mode="replicate"), 3, 1)


def scattered(gradient):
    seen = torch.rand(gradient.shape[1:], generator=torch.Generator().manual_seed(0)) < 0.5
    return gradient * seen


def middle_hidden(gradient):
    hole = torch.ones_like(gradient)
    hole[..., 2:6, 2:6] = 0
    return gradient * hole


def coarse(gradient):
    return F.interpolate(F.avg_pool2d(gradient, 2), scale_factor=2)


def flipped_copy_detached(net):
    return Around(net, lambda net, x: (net(x) + net(x.detach().roll(1, -1))) / 2)


def purified(net):
    """Half of the image is its 3 x 3 median, whose slope is taken for one."""

    def forward(net, x):
        near = F.unfold(F.pad(x, (1,) * 4, mode="replicate"), 3).view(len(x), 9, *x.shape[2:])
        return net(x + (near.median(1, keepdim=True).values - x).detach() / 2)

    return Around(net, forward)


LACKING = {
    "blurred": bent(blurred),
    "coarse": bent(coarse),
    "scattered pixels hidden": bent(scattered),
    "middle hidden": bent(middle_hidden),
    "member detached": flipped_copy_detached,
    "purified": purified,
}


class Rounded(nn.Module):
    """ReLU to so many levels, with a straight-through gradient."""

    def __init__(self, levels):
        super().__init__()
        self.levels = levels / 6

    def forward(self, h):
        h = h.relu().clamp(max=6)
        return h + ((h * self.levels).round() / self.levels - h).detach()


def quantised(net, levels):
    for name in ("relu1", "relu2", "relu3", "relu4"):
        setattr(net.body, name, Rounded(levels))
    return net


def noisy(size, own=False):
    generator = torch.Generator() if own else None
    return lambda net: Around(
        net, lambda net, x: net(x) + size * torch.randn(len(x), 10, generator=generator, device=x.device)
    )


class Bumps(nn.Module):
    """The nearest training images of each class, through a Gaussian."""

    def __init__(self, data):
        super().__init__()
        images, labels = data.train.take(slice(0, 300), "cpu")
        self.register_buffer("images", images.flatten(1))
        self.register_buffer("labels", F.one_hot(labels, 10).float())

    def forward(self, x):
        apart = (x.flatten(1)[:, None] - self.images).square().sum(2)
        return torch.logsumexp(-apart[:, :, None] + (self.labels + 1e-9).log(), 1)


def masked(net):
    """Two more classes, which are masked as usual."""
    return Around(net, lambda net, x: F.pad(net(x), (0, 2), value=-1e9))


def median(net):
    """A median of nine pixels, whose slope is that of one of them, and of none where they are equal."""

    def filtered(x):
        rows, columns = x.shape[-2:]
        patches = F.unfold(F.pad(x, (1, 1, 1, 1), mode="reflect"), 3)
        return patches.view(len(x), 9, rows * columns).median(1).values.view_as(x)

    return Around(net, lambda net, x: net(filtered(x)))


def maximum(net):
    return Around(net, lambda net, x: net(F.max_pool2d(x, 3, 1, 1)))


COMPLETE = {
    "itself": lambda net: net,
    "median of pixels": median,
    "maximum of pixels": maximum,
    "dropout of one draw": lambda net: Around(net, lambda net, x: net(F.dropout(x, 0.1))),
    "noise of the logits": noisy(1e-5),
    "masked classes": masked,
    "noise of its own": noisy(1e-5, own=True),
    "larger noise of its own": noisy(1e-3, own=True),
}


@pytest.fixture
def net(trained):
    return copy.deepcopy(trained)


def check_of(model, data, name="gradient complete", **settings):
    usual = {"sample": 60, "queries": 64, "surrogate": "none", "universal_steps": 5, "universal_restarts": 1}
    with held(model, data, EPS, **usual | settings) as context:
        context.victim.allow_no_graph = True
        adaptive.record(context, adaptive.measure(context))
        return CHECKS[name].check(context), context


@pytest.mark.parametrize("name", quickly(LACKING, "blurred", "scattered pixels hidden", "member detached"))
def test_a_gradient_that_lacks_a_part_is_told_though_no_attack_is_run(name, net, digits):
    check, _ = check_of(LACKING[name](net), digits, queries=0)
    assert check.passed is False, check.detail
    assert check.numbers["false"] > 0.3


@pytest.mark.parametrize("name", quickly(COMPLETE, "itself", "median of pixels", "noise of its own", "masked classes"))
def test_a_gradient_that_is_the_models_own_passes_and_costs_no_attack(name, net, digits):
    check, context = check_of(COMPLETE[name](net), digits)
    assert check.passed is True, check.detail
    assert check.numbers["median"] > 0.99
    assert context.adaptive.attacked is None


@pytest.mark.parametrize("eps", [0.15, 0.8, 1.0])
def test_slopes_are_taken_inside_the_box_whatever_the_radius(eps, net, digits):
    def seen(net, x):
        assert x.min() >= -1e-6
        assert x.max() <= 1 + 1e-6
        return net(x)

    with Victim(Around(net, seen)) as victim:
        found = gradient_agreement(victim, digits.test.subset(slice(0, 20)), eps=eps)
    assert found.agreement.median() > 0.9


class OwnNoise(LinearNet):
    """A linear model whose logits carry noise that torch's seed does not fix."""

    size = 0.1

    def __init__(self, weight):
        super().__init__(weight)
        self.own = torch.Generator().manual_seed(0)

    def forward(self, x):
        z = super().forward(x)
        return z + self.size * torch.randn(z.shape, generator=self.own)


@pytest.fixture
def linear():
    """It has the same gradient everywhere."""
    draw = torch.Generator().manual_seed(1)
    split = Split("made", torch.rand(100, 1, 8, 8, generator=draw), torch.zeros(100, dtype=torch.long), ("a", "b", "c"))
    return OwnNoise(torch.randn(3, 1, 8, 8, generator=draw)), split


def test_noise_that_no_seed_fixes_is_taken_off_the_differences(linear):
    model, split = linear
    with Victim(model) as victim:
        agreement = gradient_agreement(victim, split, eps=0.1).agreement
    assert float(agreement.nanmedian()) > 0.96
    assert float((agreement < 0.9).float().mean()) < 0.2


def test_the_variance_between_calls_is_without_bias(linear):
    """Of the margin between two logits twice that of one."""
    model, split = linear
    images, labels = split.take(slice(None))
    with Victim(model) as victim:
        probes = _Probes(victim, split, labels, 0, torch.Generator().manual_seed(0))
        found = torch.stack([probes.gradients(images)[2][0].mean() for _ in range(4)])
    assert float(found.mean()) == pytest.approx(2 * model.size**2, rel=0.15)


@pytest.mark.full
def test_a_gradient_that_lacks_a_part_on_a_few_images_alone_is_attacked(net, digits):
    """Its median is as usual; what a stronger attack with gradients does is no gain of attacks without them."""

    def bend(gradient):
        gradient = gradient.clone()
        gradient[::5, :, ::2] = 0
        return gradient

    _, context = check_of(bent(bend)(net), digits, queries=0, pgd_steps=1, universal_steps=1, sample=100)
    found = context.adaptive
    assert found.median > 0.97
    assert 0.1 < found.below / found.images < 0.3
    left = [one.accuracy.value for one in found.attacked.rounds]
    assert left[-1] < left[0] - 0.12
    assert found.gain <= 0  # what targeted Auto-PGD adds to PGD needs the gradient


def test_a_smooth_machine_passes(digits):
    check, _ = check_of(Bumps(digits), digits)
    assert check.passed is True, check.detail


@pytest.mark.parametrize(("levels", "suspect"), [(255, False), (31, True)])
def test_a_quantised_network_is_attacked_where_it_is_suspect_and_not_accused(levels, suspect, net, digits):
    check, context = check_of(quantised(net, levels), digits)
    if suspect:  # its differences are a staircase's
        assert context.adaptive.attacked is not None
    assert check.passed is True, check.detail
    assert check.numbers["false"] < 0.1


def test_what_the_adaptive_attack_reaches_counts(net, digits):
    model = bent(lambda gradient: gradient * (torch.arange(8) < 2))(net)  # a quarter of the columns
    _, context = check_of(model, digits, queries=128)
    found = context.adaptive.attacked
    assert found in context.per_image
    assert found.attack == "adaptive"
    rounds = {one.attack: one.accuracy.value for one in found.rounds}
    assert rounds["finite differences"] < rounds["pgd"] - 0.2
    assert found.accuracy.value <= rounds["finite differences"]
    assert context.adaptive.gain > 0
    assert context.adaptive.universal in context.transfer


class AntiAdversary(nn.Module):
    """Moves the image towards the class that it is taken for, and answers then."""

    def __init__(self, net, old_way=False):
        super().__init__()
        self.net, self.old_way = net, old_way

    def forward(self, x):
        with torch.enable_grad():
            moved = x.detach().clone()
            label = self.net(moved).argmax(1)
            for _ in range(3):
                moved = moved.detach().requires_grad_()
                loss = F.cross_entropy(self.net(moved), label, reduction="sum")
                if self.old_way:
                    loss.backward()
                    gradient = moved.grad
                else:
                    (gradient,) = torch.autograd.grad(loss, moved)
                moved = moved - 0.08 * gradient.sign()
        return self.net(x + (moved - x).detach())


@pytest.mark.parametrize("old_way", [False, full(True)])
def test_optimisation_inside_a_forward_is_seen_turned_off_and_attacked(old_way, net, digits):
    check, context = check_of(AntiAdversary(net, old_way), digits, "no optimisation at test time", queries=0, sample=40)
    assert check.numbers["inner gradients"] == 3
    rounds = {one.attack: one.accuracy.value for one in context.adaptive.attacked.rounds}
    assert rounds["inner gradients off"] < rounds["pgd"] - 0.1
    assert check.passed is False, check.detail


def test_a_forward_without_gradients_has_none_to_turn_off(net, digits):
    check, _ = check_of(net, digits, "no optimisation at test time", queries=0)
    assert check.passed is True
    assert "no gradients" in check.detail
    images, _ = digits.test.take(slice(0, 8), "cpu")
    off = InnerGradientsOff(net)
    assert torch.equal(off(images), net(images))
    assert off.gradients == 0


def test_finite_differences_are_the_gradient_and_fewer_groups_agree_on_average(net, digits):
    images, labels = digits.test.take(slice(0, 4), "cpu")
    net.double()

    def gradient(model):
        point = (images.double() * 0.8 + 0.1).requires_grad_()
        loss = F.cross_entropy(model(point), labels, reduction="sum")
        return torch.autograd.grad(loss, point)[0]

    true = gradient(net)
    whole = FiniteDifferences(net, directions=64, step=1e-6)
    assert torch.allclose(gradient(whole), true, atol=1e-5)
    assert whole.forwards == 2 * 64 * 4
    fewer = FiniteDifferences(net, directions=16, step=1e-6)
    mean = torch.stack([gradient(fewer) for _ in range(200)]).mean(0)
    assert F.cosine_similarity(mean.flatten(), true.flatten(), 0) > 0.97
    assert not torch.allclose(gradient(fewer), true, atol=1e-3)


@pytest.mark.parametrize("directions", [12, 4])
def test_finite_differences_of_black_and_white_pixels_are_one_sided_and_no_shorter(directions):
    images = torch.tensor([0.0, 1.0, 0.5, 0.002, 0.999, 0.3], dtype=torch.float64).repeat(3, 2).view(3, 1, 3, 4)
    weight = torch.randn(2, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(12, 2, bias=False, dtype=torch.float64))
    linear[1].weight.data.copy_(weight)
    model, found = FiniteDifferences(linear, directions=directions, step=0.01), []
    for _ in range(1 if directions == 12 else 1000):
        point = images.clone().requires_grad_()
        found.append(torch.autograd.grad(model(point)[:, 0].sum(), point)[0].flatten(1))
    mean = torch.stack(found).mean(0)
    exact = weight[0].expand(3, 12)
    assert torch.allclose(mean, exact, atol=1e-9 if directions == 12 else 0.25)
    point = images.clone().requires_grad_()  # a step that rounding swallows moves nothing, and is no NaN
    tiny = FiniteDifferences(linear, directions=12, step=1e-20)
    assert bool(torch.autograd.grad(tiny(point).sum(), point)[0].isfinite().all())


def test_a_borrowed_gradient_has_the_outputs_of_one_and_the_gradient_of_the_other(net, digits):
    images, labels = digits.test.take(slice(0, 32), "cpu")
    stopped = Around(net, lambda net, x: net(x.detach()) + 0 * x.sum())
    lent = BorrowedGradient(stopped, net)
    assert torch.equal(lent(images), stopped(images))
    right = [int((net(PGD(eps=0.1)(model, images, labels)).argmax(1) == labels).sum()) for model in (lent, net)]
    assert right[0] == right[1] < 32
    point = images.clone().requires_grad_()
    wider = BorrowedGradient(masked(net), net)(point)
    assert torch.equal(wider, masked(net)(images))
    assert torch.equal(*(torch.autograd.grad(z[:, :10].sum(), point)[0] for z in (wider, net(point))))


def test_the_same_seed_gives_the_same_agreement_whatever_was_drawn_before(net, digits):
    found = []
    for _ in range(2):
        torch.manual_seed(len(found))
        with Victim(noisy(1e-4)(net)) as victim:
            found.append(gradient_agreement(victim, digits.test.sample(20), eps=0.1).agreement)
    assert torch.equal(*found)


@pytest.mark.parametrize("answer", [3, ABSTAIN])
def test_no_copy_is_distilled_of_answers_that_tell_no_two_classes_apart(net, digits, monkeypatch, answer):
    monkeypatch.setattr(adaptive, "predict", lambda victim, split, **_: torch.full((len(split),), answer))
    with held(net, digits, (0.15,), surrogate_images=50) as context:
        assert adaptive.distilled(context) is None

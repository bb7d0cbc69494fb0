"""Options of transfer attacks: what each must equal when it is off, and what it must do to a linear model."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gambeson import UserError
from gambeson.attacks.gradient.pgd import (
    FGSM,
    IFGSM,
    PGD,
    TRANSFER,
    IterLL,
    RStepLL,
    StepLL,
    mi_fgsm,
    ni_fgsm,
    si_ni_fgsm,
    ti_dim,
    transfer_attack,
)
from gambeson.attacks.gradient.transfer import Diversity, Noise, Scales, Smoothing
from gambeson.base import generator
from gambeson.threat import Ball
from gambeson.victim import ModelAverage, Victim
from tests.conftest import LinearNet, binary, inner_images, shaded_images


@pytest.mark.parametrize("mu", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_of_a_constant_gradient_is_plain_iteration(mu, nesterov):
    model, _ = binary((3, 4, 5))
    x, y = torch.rand(6, 3, 4, 5).round(decimals=1), torch.arange(6) % 2
    model.weight.data /= 50  # the gradient's direction is constant; its size shall not vanish
    plain = IFGSM(eps=0.2)(model, x, y)
    assert not torch.equal(plain, x)
    torch.testing.assert_close(IFGSM(eps=0.2, momentum=mu, nesterov=nesterov)(model, x, y), plain)


def test_options_that_are_off_change_no_bit(trained, digits):
    x, y = digits.test.take(slice(0, 30))
    plain = mi_fgsm(eps=0.1)(trained, x, y)
    off = {"diversity": Diversity(probability=0), "scales": Scales(copies=1), "smoothing": Smoothing(size=1)}
    for count in (1, 2, 3):
        for names in itertools.combinations(off, count):
            assert torch.equal(mi_fgsm(eps=0.1, **{name: off[name] for name in names})(trained, x, y), plain)
    assert not torch.equal(IFGSM(eps=0.1)(trained, x, y), plain)
    for name in set(TRANSFER) - {"mi-fgsm"}:
        assert not torch.equal(transfer_attack(name, eps=0.1)(trained, x, y), plain), name


def test_momentum_by_hand(trained, digits):
    x, y = digits.test.take(slice(0, 20))
    x = x * 0.6 + 0.2  # the box does not bind
    eps, steps, mu = 0.1, 5, 0.7
    moved, velocity = x.clone(), torch.zeros_like(x)
    trained.eval()
    for _ in range(steps):
        point = (moved + eps / steps * mu * velocity).requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(trained(point), y, reduction="sum"), point)
        velocity = mu * velocity + gradient / gradient.abs().mean((1, 2, 3), keepdim=True)
        moved = (moved + eps / steps * velocity.sign()).clamp(x - eps, x + eps).detach()
    found = ni_fgsm(eps=eps, steps=steps, momentum=mu)(trained, x, y)
    assert ((found - moved).abs() < 1e-5).float().mean() > 0.999  # but for signs of almost zero


def test_averaged_gradients_by_hand(trained, digits):
    x, y = digits.test.take(slice(0, 20))
    eps, steps, noise = 0.1, 3, Noise(copies=4, size=0.5)
    draw, moved = generator(0, "views", 0), x.clone()
    trained.eval()
    for _ in range(steps):
        total = torch.zeros_like(x)
        for shift in [torch.randn(x.shape, generator=draw) for _ in range(noise.copies)]:
            point = (moved + 0.5 * eps * shift).requires_grad_()
            total += torch.autograd.grad(F.cross_entropy(trained(point), y, reduction="sum"), point)[0]
        moved = (moved + eps / steps * total.sign()).clamp(x - eps, x + eps).clamp(0, 1).detach()
    found = IFGSM(eps=eps, steps=steps, noise=noise)(trained, x, y)
    assert ((found - moved).abs() < 1e-5).float().mean() > 0.999  # but for signs of almost zero
    assert not torch.equal(found, IFGSM(eps=eps, steps=steps)(trained, x, y))


def test_averaged_gradients_of_a_linear_model_are_its_own():
    model, _ = binary((3, 4, 5))
    x, y = inner_images(4, (3, 4, 5)), torch.tensor([0, 1, 0, 1])
    model.weight.data /= 50
    for norm in ("inf", "2", "1"):
        plain = PGD(eps=0.2, norm=norm, start="zero", early_stop=False)(model, x, y)
        noisy = PGD(eps=0.2, norm=norm, start="zero", early_stop=False, noise=Noise(copies=3))(model, x, y)
        torch.testing.assert_close(noisy, plain, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("norm", "length"), [("inf", 0.2 * 60**0.5), ("2", 0.2)])
def test_noise_is_as_long_as_it_says(norm, length):
    noise = Noise(copies=200, size=1.0)
    draws = noise.draw(torch.zeros(1, 3, 4, 5), torch.Generator().manual_seed(0))
    size = noise.deviation(Ball(eps=0.2, norm=norm), (3, 4, 5))
    assert torch.stack([size * one.norm() for one in draws]).mean() == pytest.approx(length, rel=0.03)


def test_copies_with_noise_go_through_scaling_and_resizing_as_well(trained, digits):
    x, y = digits.test.take(slice(0, 10))
    options = {"noise": Noise(copies=3), "scales": Scales(copies=2), "diversity": Diversity()}

    def backwards(**chosen):
        with Victim(trained) as victim:
            IFGSM(eps=0.1, steps=4, early_stop=False, **chosen)(victim, x, y)
            return victim.backwards

    assert backwards(**options) == 4 * 3 * 2 * len(x)
    assert backwards() == 4 * len(x)


def test_smoothing_of_a_linear_model_is_the_sign_of_the_smoothed_gradient():
    model, w = binary((2, 9, 7))
    x, y = inner_images(4, (2, 9, 7)), torch.tensor([0, 1, 0, 1])
    smoothing = Smoothing(size=5, sigma=1.3)
    found = IFGSM(eps=0.1, smoothing=smoothing)(model, x, y) - x
    kernel = smoothing.kernel()
    padded = F.pad(w, (2, 2, 2, 2))
    by_hand = sum(kernel[i, j] * padded[:, i : i + 9, j : j + 7] for i in range(5) for j in range(5))
    toward = (1 - 2 * y).view(-1, 1, 1, 1)
    torch.testing.assert_close(found, 0.1 * toward * by_hand.sign())
    assert not torch.equal(by_hand.sign(), w.sign())
    assert float(kernel.sum()) == pytest.approx(1)
    assert float(Smoothing(size=3, sigma=1 / 3).kernel()[1, 1]) == pytest.approx(0.957, abs=1e-3)


@pytest.mark.parametrize("toward", ["black", "grey"])
def test_scaled_copies_average_their_gradients(toward):
    class Square(nn.Module):
        def forward(self, x):
            value = (x.flatten(1) ** 2).sum(1)
            return torch.stack([-value / 2, value / 2], 1)

    scales = Scales(copies=3, toward=toward)
    with Victim(Square()) as victim:
        seen = []
        forward = victim.model.forward
        victim.model.forward = lambda x: (seen.append(x.detach()), forward(x))[1]
        FGSM(eps=0.1, scales=scales)(victim, inner_images(2, (1, 2, 2)), torch.tensor([0, 0]))
        assert (victim.forwards, victim.backwards) == (6, 6)
    x = inner_images(2, (1, 2, 2))
    rest = 0.5 if toward == "grey" else 0.0
    for power, copy in enumerate(seen[-3:]):  # before them, the first look at the model
        torch.testing.assert_close(copy, rest + (x - rest) / 2**power)


@given(st.integers(1, 5), st.integers(5, 33), st.integers(4, 20), st.integers(0, 99))
def test_resized_images_keep_their_shape_range_and_grey(count, height, width, seed):
    draw = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 2, height, width, generator=draw)
    for interpolation in ("bilinear", "nearest"):
        diversity = Diversity(probability=1, interpolation=interpolation)
        drawn = diversity.draw(images, draw)
        seen = diversity.view(images, drawn)
        assert seen.shape == images.shape
        assert not torch.equal(seen, images)
        assert ((seen >= -1e-5) & (seen <= 1 + 1e-5)).all()
        grey = torch.full_like(images, 0.5)
        torch.testing.assert_close(diversity.view(grey, drawn), grey)
        assert torch.equal(diversity.view(images[:1], drawn[:1]), seen[:1])  # no row knows of another


def test_resizing_is_that_of_interpolate_on_a_canvas():
    images = torch.rand(1, 3, 32, 32)
    diversity = Diversity(probability=1, resize_back=False)
    drawn = torch.tensor([[0.6, 0.5, 0.99, 0.0]])  # side 32 + 2 on 36, one line from the top, two from the left
    by_hand = torch.full((1, 3, 36, 36), 0.5)
    by_hand[:, :, 1:35, 2:36] = F.interpolate(images, size=(34, 34), mode="bilinear")
    torch.testing.assert_close(diversity.view(images, drawn), by_hand)
    back = F.interpolate(by_hand, size=(32, 32), mode="bilinear")
    torch.testing.assert_close(Diversity(probability=1).view(images, drawn), back)
    nearest = Diversity(probability=1, resize_back=False, interpolation="nearest").view(images, drawn)
    torch.testing.assert_close(nearest[:, :, 1:35, 2:36], F.interpolate(images, size=(34, 34), mode="nearest"))


def test_half_of_the_images_are_resized_each_by_its_own_draw():
    images = torch.rand(1, 1, 32, 32).expand(400, -1, -1, -1)
    diversity = Diversity()
    seen = diversity.view(images, diversity.draw(images, torch.Generator().manual_seed(0)))
    same = (seen == images).flatten(1).all(1)
    assert 150 < int(same.sum()) < 250
    assert len(seen.flatten(1).unique(dim=0)) > 30  # of 56 sizes and places


@pytest.mark.parametrize("average", ["logits", "probabilities", "losses"])
def test_twice_the_same_model_is_that_model(average, trained, digits):
    x, y = digits.test.take(slice(0, 30))
    attack = PGD(eps=0.1, steps=5, average=average, restarts=2)
    alone = attack([trained], x, y)
    torch.testing.assert_close(attack([trained, trained], x, y), alone, rtol=0, atol=1e-3)
    torch.testing.assert_close(attack(trained, x, y), alone, rtol=0, atol=1e-3)


def test_averages_of_two_models_by_hand_and_their_cost():
    draw = torch.Generator().manual_seed(0)
    one, two = (LinearNet(torch.randn(3, 1, 2, 2, generator=draw)) for _ in range(2))
    x, y = inner_images(5, (1, 2, 2)), torch.tensor([0, 1, 2, 0, 1])
    values = {
        "logits": lambda a, b: F.cross_entropy((a + b) / 2, y, reduction="sum"),
        "probabilities": lambda a, b: F.nll_loss(((a.softmax(1) + b.softmax(1)) / 2).log(), y, reduction="sum"),
        "losses": lambda a, b: (F.cross_entropy(a, y, reduction="sum") + F.cross_entropy(b, y, reduction="sum")) / 2,
    }
    for average, value in values.items():
        point = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(value(one(point), two(point)), point)
        with ModelAverage([one, two], average) as pair:
            found = FGSM(eps=0.1, norm="2")(pair, x, y) - x
            assert (pair.forwards, pair.backwards) == (10, 10)
        torch.testing.assert_close(found, 0.1 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1))


def test_transfer_between_two_linear_nets_is_the_inner_product():
    source, w = binary((1, 4, 4), seed=1)
    target, v = binary((1, 4, 4), seed=2)
    x, y = inner_images(3, (1, 4, 4)), torch.zeros(3, dtype=torch.long)
    with torch.no_grad():
        grown = (target(FGSM(eps=0.1)(source, x, y)) - target(x)).diff(dim=1).flatten()
    torch.testing.assert_close(grown, (0.1 * (v * w.sign()).sum()).expand(3))


def test_bad_ensembles_are_refused():
    model, _ = binary((1, 2, 2))
    three = LinearNet(torch.randn(3, 1, 2, 2))
    x, y = inner_images(2, (1, 2, 2)), torch.tensor([0, 1])
    for models, words in (
        ([], "the list of models is empty"),
        ([model, "resnet"], "a model is a str: expected a torch.nn.Module"),
        (5, "a model is a int: expected a torch.nn.Module, or a list of them"),
        ([model, three], r"return shapes \(2,\) and \(3,\) per image: choose models of the same classes"),
    ):
        with pytest.raises(UserError, match=words):
            FGSM(eps=0.1)(models, x, y)


def test_least_likely_steps_reach_the_optimum_of_their_class():
    draw = torch.Generator().manual_seed(4)
    model = LinearNet(torch.randn(2, 1, 3, 3, generator=draw))
    x = inner_images(9, (1, 3, 3))
    with torch.no_grad():
        likely, least = model(x).argmax(1), model(x).argmin(1)
    wrong = torch.randint(0, 2, (9,), generator=draw)  # labels have no say
    w = (model.weight[1] - model.weight[0]).detach() * (2 * least - 1).view(-1, 1, 1, 1)
    torch.testing.assert_close(StepLL(eps=0.1)(model, x, wrong) - x, 0.1 * w.sign())
    torch.testing.assert_close(IterLL(eps=0.1)(model, x, wrong) - x, 0.1 * w.sign())
    torch.testing.assert_close(StepLL(eps=0.1)(model, x, wrong), FGSM(eps=0.1, label="prediction")(model, x, wrong))
    torch.testing.assert_close(FGSM(eps=0.1)(model, x, likely), FGSM(eps=0.1, label="prediction")(model, x, wrong))
    many = inner_images(1500, (1, 3, 3))
    with torch.no_grad():
        goal = model(many).argmin(1)
        gain = (model(RStepLL(eps=0.1)(model, many, goal)) - model(many)).diff(dim=1).flatten() * (2 * goal - 1)
    assert float(gain.mean() / (0.1 * w[0].abs().sum())) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("attack", [StepLL(eps=0.2), IterLL(eps=0.2, steps=4), FGSM(eps=0.2, label="prediction")])
def test_the_class_that_is_reached_or_left_is_that_of_the_clean_image_among_a_hundred(attack):
    draw = torch.Generator().manual_seed(4)
    model, x = LinearNet(torch.randn(100, 1, 4, 4, generator=draw)), shaded_images(32, (1, 4, 4))
    order = model(x).argsort(1)
    goal, sign = (order[:, -1], 1) if attack.label == "prediction" else (order[:, 0], -1)
    moved = x
    for _ in range(attack.steps):
        point = moved.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(point), goal, reduction="sum"), point)
        moved = (moved + sign * 0.2 / attack.steps * gradient.sign()).clamp(0, 1)
    found = attack(model, x, torch.zeros(32, dtype=torch.long))
    torch.testing.assert_close(found, moved)
    second = F.cross_entropy(model(found), order[:, 1 if sign < 0 else -2])
    assert not torch.isclose(second, F.cross_entropy(model(found), goal), atol=0.1)


def test_least_likely_class_becomes_likelier_on_a_trained_net(trained, digits):
    x, y = digits.test.take(slice(0, 60))
    with torch.no_grad():
        goal = trained(x).argmin(1)[:, None]
        before = trained(x).log_softmax(1).gather(1, goal)
        step = trained(StepLL(eps=0.1)(trained, x, y)).log_softmax(1).gather(1, goal)
        many = trained(IterLL(eps=0.1)(trained, x, y)).log_softmax(1).gather(1, goal)
    assert (step > before).float().mean() > 0.9
    assert many.mean() > step.mean() > before.mean()


@pytest.mark.parametrize("name", sorted(TRANSFER))
def test_named_attacks_break_their_source_stay_in_the_ball_and_repeat(name, trained, digits):
    x, y = digits.test.take(slice(0, 60))
    for norm, eps in (("inf", 0.15), ("2", 1.0)):
        attack = transfer_attack(name, eps=eps, norm=norm)
        x_adv = attack(trained, x, y, seed=1)
        with torch.no_grad():
            assert (trained(x_adv).argmax(1) == y).float().mean() < 0.6
        assert (Ball(eps=eps, norm=norm).length(x_adv - x) <= eps + 1e-6).all()
        assert ((x_adv >= 0) & (x_adv <= 1)).all()
        assert torch.equal(attack(trained, x, y, seed=1), x_adv)
        assert torch.equal(transfer_attack(name, eps=0, norm=norm)(trained, x, y), x)


def test_an_early_stop_sees_the_image_itself_and_not_its_resized_view(trained, digits):
    x, y = digits.test.take(slice(0, 40))
    x_adv = PGD(eps=0.15, steps=10, diversity=Diversity(probability=1), momentum=1.0, nesterov=True)(trained, x, y)
    with torch.no_grad():
        assert (trained(x_adv).argmax(1) == y).float().mean() < 0.6


def test_names_and_settings_are_checked():
    assert ti_dim(eps="8/255", steps=7).steps == 7
    assert si_ni_fgsm(eps=0.1).scales == Scales()
    for build, words in (
        (lambda: transfer_attack("mi", eps=0.1), "unknown transfer attack 'mi': did you mean"),
        (lambda: Smoothing(size=4), "choose an odd size"),
        (lambda: PGD(eps=0.1, label="prediction", targeted=True), "prediction is no target"),
        (lambda: PGD(eps=0.1, sparsity=0.1), "sparsity is for norm '1'"),
    ):
        with pytest.raises(UserError, match=words):
            build()

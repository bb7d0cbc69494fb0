"""TRADES against closed forms, and its effect on a small net."""

import pytest
import torch
import torch.nn.functional as F

import gambeson as gb
from gambeson import UserError
from gambeson.defenses import Batch, Standard, TrainContext
from gambeson.defenses.trades import Divergence, Trades
from gambeson.tasks import Segmentation
from tests.conftest import binary, inner_images


def batch_of(count=12, shape=(1, 4, 4), seed=0):
    return Batch(images=inner_images(count, shape), labels=torch.arange(count) % 2, seed=seed)


def weights_after(digits, defense, **settings):
    torch.manual_seed(3)
    model = gb.models.create("lenet5", digits)
    gb.train(model, digits, defense, batch_size=64, seed=3, **settings)
    return model


def divergence(model, x, delta):
    p, q = model(x).log_softmax(1), model(x + delta).log_softmax(1)
    return (p.exp() * (p - q)).sum(1)


def test_beta_zero_is_standard_training_bit_for_bit_and_beta_matters(digits):
    defenses = (Standard(), Trades(eps=0.1, beta=0), Trades(eps=0.1, steps=1))
    plain, without, trades = (weights_after(digits, defense, epochs=1).state_dict() for defense in defenses)
    assert all(torch.equal(plain[key], without[key]) for key in plain)
    assert not all(torch.equal(plain[key], trades[key]) for key in plain)


def test_the_inner_maximum_is_a_vertex_and_the_better_one_is_exact():
    model, w = binary((1, 4, 4))
    x = inner_images(12, (1, 4, 4))
    vertex = 0.1 * w.sign()
    best = torch.zeros(12)
    for seed in range(8):
        batch = Batch(images=x, labels=torch.zeros(12, dtype=torch.long), seed=seed)
        delta = Divergence(eps=0.1).craft(model, batch)
        side = (delta * w).flatten(1).sum(1).sign().view(-1, 1, 1, 1)
        torch.testing.assert_close(delta, side * vertex)
        best = torch.maximum(best, divergence(model, x, delta).detach())
    exact = torch.maximum(divergence(model, x, vertex), divergence(model, x, -vertex)).detach()
    torch.testing.assert_close(best, exact)
    assert float(exact.min()) > 0


@pytest.mark.parametrize("norm", ["inf", "2", "1"])
def test_perturbations_stay_in_the_ball_and_the_box(norm):
    model, _ = binary((3, 4, 5))
    x = torch.rand(6, 3, 4, 5, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    batch = Batch(images=x, labels=torch.zeros(6, dtype=torch.long), seed=0)
    delta = Divergence(eps=0.3, norm=norm).craft(model, batch)
    assert bool((gb.threat.Ball(eps=0.3, norm=norm).length(delta) <= 0.3 * (1 + 1e-5)).all())
    assert float((x + delta).min()) >= 0
    assert float((x + delta).max()) <= 1
    assert float(divergence(model, x, delta).min()) > 0
    assert not Divergence(eps=0, norm=norm).craft(model, batch).any()


def test_objective_is_the_paper_s_formula_and_its_gradient_goes_through_both_predictions():
    model, _ = binary((1, 4, 4))
    batch, defense = batch_of(), Trades(eps=0.1, beta=2.5)
    delta = defense.terms()["divergence"][1].craft(model, batch)
    by_hand = F.cross_entropy(model(batch.images), batch.labels)
    by_hand = by_hand + 2.5 * divergence(model, batch.images, delta).mean()
    expected = torch.autograd.grad(by_hand, list(model.parameters()))
    context = TrainContext(model=model, train=None, seed=0, epochs=1, steps=1, batch_size=12)
    for losses in (defense.losses(model, batch), defense.build_objective(context).losses(model, batch)):
        torch.testing.assert_close(losses["loss"], by_hand)
        assert list(losses) == ["loss", "clean", "divergence"]
        found = torch.autograd.grad(losses["loss"], list(model.parameters()))
        torch.testing.assert_close(found, expected)


def test_crafting_is_in_evaluation_mode_and_leaves_the_model_as_it_was(digits):
    model = gb.models.create("resnet20x0.25", in_channels=1, classes=10, image_size=8).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x, y = digits.train.take(slice(0, 8))
    seen = []
    model.body.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    Divergence(eps=0.1, steps=2).craft(model, Batch(images=x, labels=y, seed=0))
    assert seen == [False] * 3
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_two_processes_craft_what_one_crafts_for_the_joined_batch():
    model, _ = binary((1, 4, 4))
    whole = batch_of(12)
    joined = Divergence(eps=0.1, steps=1, rel_step_size=0.01).craft(model, whole)
    for number in range(2):
        rows = slice(6 * number, 6 * number + 6)
        part = Batch(images=whole.images[rows], labels=whole.labels[rows], seed=0, place=(number, 2))
        torch.testing.assert_close(Divergence(eps=0.1, steps=1, rel_step_size=0.01).craft(model, part), joined[rows])


def test_pixels_without_a_label_have_no_say():
    net = torch.nn.Conv2d(1, 3, 1)
    x, y = inner_images(2, (1, 4, 4)), torch.zeros(2, 4, 4, dtype=torch.long)
    y[:, :2] = 9
    term, batch = Divergence(eps=0.1), Batch(images=x, labels=y, seed=0, task=Segmentation(ignore_index=9))
    delta = term.craft(net, batch)
    assert float(delta[:, :, :2].abs().max()) < 0.01  # the start's noise
    assert float(delta[:, :, 2:].abs().min()) > 0.09
    counted = divergence(net, x, delta)[:, 2:].mean()
    torch.testing.assert_close(term(net, batch), counted)


def test_training_with_it_makes_a_net_robust(digits):
    attack = gb.attacks.PGD(eps=0.15, steps=10)
    x, y = digits.test.take(slice(0, 200))
    robust, clean = [], []
    for defense in (Standard(), Trades(eps=0.15, steps=5, rel_step_size=0.4)):
        model = weights_after(digits, defense, epochs=8).eval()
        with torch.no_grad():
            clean.append(float((model(x).argmax(1) == y).float().mean()))
            robust.append(float((model(attack(model, x, y, seed=0)).argmax(1) == y).float().mean()))
    assert robust[1] > robust[0] + 0.15
    assert clean[1] > 0.8


def test_mistakes_are_named():
    with pytest.raises(UserError, match="beta = -1"):
        Trades(eps=0.1, beta=-1)
    with pytest.raises(TypeError, match="needs eps"):
        Trades()

"""Objectives against hand-computed formulas, and the identities that tie them to one another."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import gambeson as gb
from gambeson import UserError
from gambeson.defenses import Adversarial, Batch, PGDAdversarial, SharedAdversarial, Standard
from gambeson.threat import perturb
from tests.conftest import binary, inner_images


def batch_of(count=12, shape=(1, 4, 4), seed=0):
    return Batch(images=inner_images(count, shape), labels=torch.arange(count) % 2, seed=seed)


def test_sharedness_one_is_per_image_pgd_training_bit_for_bit(digits):
    weights = []
    for defense in (
        PGDAdversarial(eps=0.1),
        SharedAdversarial(eps=0.1, sharedness=1, sigma=1, truncate=None),
    ):
        torch.manual_seed(3)
        model = gb.models.create("lenet5", digits)
        gb.train(model, digits, defense, epochs=1, batch_size=64, seed=3)
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_sigma_zero_is_standard_training_bit_for_bit_and_sigma_matters(digits):
    weights = []
    for defense in (
        Standard(),
        SharedAdversarial(eps=0.1, sharedness=8, sigma=0),
        SharedAdversarial(eps=0.1, sharedness=8, sigma=0.5),
    ):
        torch.manual_seed(3)
        model = gb.models.create("lenet5", digits)
        gb.train(model, digits, defense, epochs=1, batch_size=64, seed=3)
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not all(torch.equal(weights[0][key], weights[2][key]) for key in weights[0])


def test_objective_is_the_paper_s_formula():
    model, _ = binary((1, 4, 4))
    batch = batch_of(12)
    defense = SharedAdversarial(eps=0.1, sharedness=4, sigma=0.3)
    heaps, _ = defense.terms()["adversarial"][1], None
    delta = heaps.craft(model, batch)
    assert delta.shape == (3, 1, 4, 4)
    moved = perturb(batch.images, delta)
    by_hand = 0.3 * F.cross_entropy(model(moved), batch.labels) + 0.7 * F.cross_entropy(
        model(batch.images), batch.labels
    )
    found = defense.losses(model, batch)
    torch.testing.assert_close(found["loss"], by_hand)
    assert set(found) == {"loss", "adversarial", "clean"}
    found["loss"].backward()
    assert model.weight.grad.abs().sum() > 0


def test_a_heap_as_large_as_the_batch_is_one_perturbation_for_all():
    model, _ = binary((1, 4, 4))
    batch = batch_of(12)
    delta = Adversarial(eps=0.1, sharedness=12).craft(model, batch)
    assert delta.shape == (1, 1, 4, 4)
    assert float(delta.abs().max()) == pytest.approx(0.1)
    with pytest.raises(UserError, match="sharedness 5 does not divide the batch of 12"):
        Adversarial(eps=0.1, sharedness=5).craft(model, batch)
    with pytest.raises(UserError, match="sharedness 64 does not divide the batch size 100: choose .* such as 128"):
        SharedAdversarial(eps=0.1).check(100)
    SharedAdversarial(eps=0.1, sigma=0).check(100)


def test_four_steps_of_half_eps_reach_the_vertex_from_any_start():
    model, w = binary((3, 5, 7))
    x = inner_images(6, (3, 5, 7))
    for label in (0, 1):
        y = torch.full((6,), label)
        for sharedness in (1, 3, 6):
            batch = Batch(images=x, labels=y, seed=label)
            delta = Adversarial(eps=0.1, sharedness=sharedness).craft(model, batch)
            vertex = 0.1 * w.sign() * (1 - 2 * label)
            torch.testing.assert_close(delta, vertex.expand_as(delta))


def heap_risk(model, x, y, sharedness, eps, w):
    """Exact: the loss of a heap is convex in w . delta, so one of its two ends is the maximum."""
    ends = []
    for sign in (1, -1):
        loss = F.cross_entropy(model(x + sign * eps * w.sign()), y, reduction="none")
        ends.append(loss.unflatten(0, (-1, sharedness)).mean(1))
    return float(torch.stack(ends).amax(0).mean())


def crafted_risk(model, x, y, sharedness, eps):
    best = None
    for seed in range(6):
        delta = Adversarial(eps=eps, sharedness=sharedness).craft(model, Batch(images=x, labels=y, seed=seed))
        loss = F.cross_entropy(model(x + delta.repeat_interleave(sharedness, 0)), y, reduction="none")
        heap = loss.unflatten(0, (-1, sharedness)).mean(1)
        best = heap if best is None else torch.maximum(best, heap)
    return float(best.mean())


def test_risk_hierarchy_holds_exactly_and_crafting_attains_it():
    model, w = binary((1, 4, 4))
    x, eps = inner_images(16, (1, 4, 4)), 0.05
    y = (torch.rand(16, generator=torch.Generator().manual_seed(1)) < 0.5).long()
    with torch.no_grad():
        clean = float(F.cross_entropy(model(x), y))
        risks = [heap_risk(model, x, y, s, eps, w) for s in (16, 8, 4, 2, 1)]  # universal ... per image
        assert clean <= risks[0]
        assert all(a <= b + 1e-7 for a, b in itertools.pairwise(risks))
        assert risks[0] < risks[-1]
        for s, exact in zip((16, 8, 4, 2, 1), risks, strict=True):
            assert crafted_risk(model, x, y, s, eps) == pytest.approx(exact, rel=1e-5)


def test_truncation_sends_the_budget_to_those_not_yet_fooled():
    model, w = binary((1, 4, 4))
    # Nine images far on the wrong side, one on the right side of the other class: without truncation the nine win.
    x = inner_images(10, (1, 4, 4))
    z = model(x).diff(dim=1).flatten().detach()
    y = torch.ones(10, dtype=torch.long)
    with torch.no_grad():
        model.bias += torch.tensor([3.0 + float(z.max()), 0.0])  # all are taken for class 0, y = 1 is fooled already
    y[0] = 0
    batch = Batch(images=x, labels=y, seed=0)
    toward_one = 0.1 * w.sign()
    full = Adversarial(eps=0.1, sharedness=10, truncate=None, start="zero").craft(model, batch)
    cut = Adversarial(eps=0.1, sharedness=10, truncate=-math.log(0.2), start="zero").craft(model, batch)
    torch.testing.assert_close(full[0], -toward_one)
    torch.testing.assert_close(cut[0], toward_one)


def test_crafting_leaves_the_model_in_training_with_its_statistics(digits):
    model = gb.models.create("resnet20x0.25", in_channels=1, classes=10, image_size=8)
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x, y = digits.train.take(slice(0, 8))
    Adversarial(eps=0.1, sharedness=4).craft(model, Batch(images=x, labels=y, seed=0))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_names_settings_and_mistakes():
    assert gb.defenses.create("shared-adversarial", eps="8/255").eps == 8 / 255
    assert set(gb.defenses.names()) >= {"standard", "pgd-adversarial", "shared-adversarial"}
    with pytest.raises(UserError, match="unknown defence 'shared': did you mean shared-adversarial"):
        gb.defenses.create("shared")
    with pytest.raises(TypeError, match="needs eps"):
        gb.defenses.create("pgd-adversarial")
    with pytest.raises(UserError, match="sigma = 1.5"):
        SharedAdversarial(eps=0.1, sigma=1.5)
    with pytest.raises(TypeError, match="no setting 'heap': "):
        SharedAdversarial(eps=0.1, heap=3)


def test_a_user_s_own_defence_is_a_few_lines(digits):
    from gambeson.defenses import Clean, Defense

    class LogitPenalty(Defense):
        def terms(self):
            return {
                "clean": (1.0, Clean()),
                "size": (0.1, lambda model, batch: model(batch.images).square().mean()),
            }

    torch.manual_seed(0)
    model = gb.models.create("lenet5", digits)
    history = gb.train(model, digits, LogitPenalty(), epochs=2, batch_size=64)
    assert history[1]["loss"] == pytest.approx(history[1]["clean"] + 0.1 * history[1]["size"], rel=1e-4)

"""The cost that is told before a training starts."""

import torch

import gambeson as gb
from gambeson.defenses import Ensemble, Jacobian, PGDAdversarial, Standard
from gambeson.training import Recipe, TrainRun, plan, plan_training


def test_a_plan_counts_measures_and_leaves_the_model_alone(digits):
    torch.manual_seed(0)
    model = gb.models.create("lenet", digits)
    before = gb.models.fingerprint(model)
    recipe = Recipe(epochs=3, batch_size=128)
    costly = plan(model, digits, PGDAdversarial(eps=0.1, steps=10), recipe)
    assert gb.models.fingerprint(model) == before
    assert costly.steps == 3 * (len(digits.train) // 128)
    assert costly.seconds == costly.steps * costly.seconds_a_step
    assert 2 < costly.plain_ratio < 40  # 10 steps of crafting and one of training
    assert costly.weights == 12 * gb.models.count_parameters(model)  # weights, gradients, momentum
    assert costly.data == len(digits.train) * 64
    small, large = (plan(model, digits, Standard(), Recipe(batch_size=size)).activations for size in (64, 256))
    assert 3 < large / small < 4.5


def test_a_step_of_an_ensemble_is_one_of_all_its_members(digits):
    model = gb.models.create("lenet", digits, members=4)
    four = plan(model, digits, Ensemble(members=4), Recipe(batch_size=256))
    assert 2 < four.plain_ratio < 8
    assert four.networks == 4


def test_what_a_function_transform_keeps_is_counted_too(digits):
    """Its tensors show no storage."""
    model = gb.models.create("lenet5", digits)
    found = {
        how: plan(model, digits, Jacobian(estimator="input", derivative=how), Recipe(batch_size=64)).activations
        for how in ("forward-mode", "finite-difference")
    }
    assert min(found.values()) > plan(model, digits, Standard(), Recipe(batch_size=64)).activations


def test_a_run_is_planned_without_a_trace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = TrainRun(
        data="digits",
        model="lenet5",
        defense={"name": "ensemble-adversarial", "eps": 0.1, "sources": ("mnist-d",)},
        recipe={"epochs": 1},
    )
    assert plan_training(run).steps == 8
    assert not list(tmp_path.iterdir())

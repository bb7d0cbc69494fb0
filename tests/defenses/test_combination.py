"""Any combination of the five questions' answers, and what a part of weight zero does."""

import pytest
import torch
import yaml

import gambeson as gb
from gambeson import UserError
from gambeson.data import Dataset
from gambeson.defenses import Combination, Ensemble, Jacobian, PGDAdversarial, SharedAdversarial, Standard, create
from gambeson.training import TrainRun, run_training

YAML = """
name: ensemble
members: 2
inner:
  name: combination
  risk: {name: shared-adversarial, eps: 0.1, sharedness: 16}
  jacobian: {strength: 0.001}
  noise: {gamma: 1.0e-4, noise_from: 0, places: [relu1]}
"""


@pytest.fixture
def few(digits):
    return Dataset("few", digits.train.subset(torch.arange(256)), digits.validation, digits.test, digits.classes)


def trained(few, defense, **settings):
    torch.manual_seed(0)
    model = gb.models.create("lenet5", few, members=defense.num_members)
    history = gb.train(model, few, defense, epochs=1, batch_size=64, seed=1, **settings)
    return model, history


def test_shared_jacobian_noise_and_members_from_yaml(few, tmp_path):
    settings = yaml.safe_load(YAML)
    defense = create(**settings)
    assert create(name=settings["name"], **defense.plain()) == defense
    run = TrainRun(data="digits", model="lenet5", defense=settings, recipe={"epochs": 2, "batch_size": 64}, seed=0)
    model = run_training(run, tmp_path / "run")
    assert model.card.members == 2
    assert model.card.noise is not None
    loaded = gb.models.load(tmp_path / "run")
    assert gb.models.fingerprint(loaded) == gb.models.fingerprint(model)
    history = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert all(term in history for term in ("adversarial", "clean", "jacobian", "noise"))


@pytest.mark.parametrize(
    ("combined", "plain"),
    [
        (Combination(risk=SharedAdversarial(eps=0.1, sharedness=8)), SharedAdversarial(eps=0.1, sharedness=8)),
        (Combination(risk=PGDAdversarial(eps=0.1), jacobian=Jacobian(strength=0)), PGDAdversarial(eps=0.1)),
        (Combination(jacobian=Jacobian(strength=0)), Standard()),
        (Ensemble(members=1, inner=Combination()), Standard()),
    ],
)
def test_a_part_of_weight_zero_changes_nothing_bit_for_bit(few, combined, plain):
    one, two = (trained(few, defense)[0] for defense in (combined, plain))
    assert gb.models.fingerprint(one) == gb.models.fingerprint(two)


def test_every_part_has_an_effect_and_is_logged(few):
    risk = SharedAdversarial(eps=0.1, sharedness=8)
    jacobian, noise = Jacobian(strength=0.1), {"noise_from": 0, "gamma": 0.01}
    found = {
        trained(few, defense)[0].body.fc3.weight.sum().item()
        for defense in (risk, Combination(risk=risk, jacobian=jacobian), Combination(risk=risk, noise=noise))
    }
    assert len(found) == 3
    _, history = trained(few, Combination(risk=risk, jacobian=jacobian, noise=noise))
    assert {"adversarial", "clean", "jacobian", "noise"} <= set(history[-1])


@pytest.mark.full
def test_combined_jacobian_is_smaller_than_without(digits):
    def slope(defense):
        torch.manual_seed(0)
        model = gb.models.create("lenet5", digits)
        gb.train(model, digits, defense, epochs=8, batch_size=64, seed=1)
        images, _ = digits.test.take(slice(0, 100), "cpu")
        return float(gb.analysis.frobenius(gb.analysis.batch_jacobian(model, images)).square().mean())

    risk = PGDAdversarial(eps=0.05)
    assert slope(Combination(risk=risk, jacobian=Jacobian(strength=0.05))) < 0.6 * slope(risk)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="no setting 'jacobain': did you mean jacobian"):
        create("combination", jacobain={})
    with pytest.raises(UserError, match="risk is Ensemble: expected a defence of one model without noise"):
        Combination(risk=Ensemble(members=2))
    with pytest.raises(UserError, match="unknown defence 'shared': did you mean shared-adversarial"):
        create("combination", risk={"name": "shared", "eps": 0.1})

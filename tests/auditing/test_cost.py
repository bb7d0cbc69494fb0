"""What an audit says that it will cost, against what one costs."""

import json
import sys

import pytest
import torch
from torch import nn

import gambeson as gb
from gambeson import UserError
from gambeson.auditing import Suite
from gambeson.auditing.cost import plan
from gambeson.cli.app import run
from gambeson.evaluation.rates import Cost
from gambeson.models.black_box.local import FunctionModel
from gambeson.victim import Victim

SUITE = Suite(
    eps=(0.1, 0.2), universal_steps=5, universal_restarts=2, universal_batch=8, universal_probe_starts=1, pgd_steps=5,
    pgd_restarts=1, test_images=60, validation_images=40, sample=30, suite_images=20, suite_queries=50, queries=20,
    jacobian_backwards=300, universal_queries=300, surrogate="none", eps_uni_runs=1, noise_sizes=(1.0,),
)  # fmt: skip


@pytest.fixture(scope="module")
def result(trained, digits):
    return gb.audit(trained, digits, SUITE).results


def test_an_audit_costs_what_its_plan_says_or_less(trained, digits, result):
    """The curve to the last image; the rest no more, for what has fallen is left alone."""
    cost = plan(trained, digits, SUITE)
    parts = {part.name: part for part in cost.parts}
    curve = [point.cost for point in result.universal]
    assert sum(one.backwards for one in curve) == parts["universal curve"].gradients
    crafted = sum(
        point.crafted is None for point in result.universal
    )  # nothing else was chosen, to be scored beside it
    asked = parts["universal curve"].forwards - crafted * SUITE.test_images
    assert sum(one.forwards - one.backwards for one in curve) == asked
    spent = {"eps_uni": [result.eps_uni.cost], "Jacobian analysis": [result.jacobian.cost]}
    spent["PGD, image by image"] = [one.cost for one in result.per_image if one.attack == "pgd"]
    spent["attack suite"] = [one.cost for one in result.per_image if one.attack == "standard"]
    for name, costs in spent.items():
        part = parts[name]
        assert sum(one.backwards for one in costs) <= part.gradients, name
        assert 0 < sum(one.forwards for one in costs) <= part.gradients + part.forwards, name
    assert cost.seconds == pytest.approx(sum(cost.seconds_of(part) for part in cost.parts))
    assert min(cost.speed.forward, cost.speed.gradient) > 0


def test_a_plan_grows_with_what_is_asked_and_leaves_the_model_alone(digits):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = gb.models.create("lenet5", digits)

        def forward(self, x):
            return self.net(x + 0.1 * torch.randn_like(x))

    noisy = Noisy().train()
    calm, random = plan(noisy.net, digits, SUITE), plan(noisy, digits, SUITE)
    assert noisy.training
    assert all(parameter.requires_grad for parameter in noisy.parameters())
    both = {one.name: (one, other) for one, other in zip(calm.parts, random.parts, strict=True)}
    one, other = both["universal curve"]
    assert other.forwards == SUITE.votes * one.forwards
    one, other = both["PGD, image by image"]
    assert other.gradients == SUITE.eot_samples * one.gradients
    assert plan(noisy.net, digits, Suite(eps=(0.1,))).surrogate == "lenet5"
    assert calm.surrogate == ""


def test_a_black_box_has_a_budget_and_no_plan(digits):
    box = FunctionModel(lambda images: images.reshape(len(images), -1)[:, :10])
    with pytest.raises(UserError, match="--budget"):
        plan(box, digits, SUITE)


def test_plan_on_the_command_line_writes_nothing(trained, tmp_path, capsys):
    weights, out = str(tmp_path / "net.safetensors"), tmp_path / "out"
    gb.models.save(trained, tmp_path / "net.safetensors")
    asked = ["audit", weights, "--data", "digits", "--suite", "quick", "--plan", "--out", str(out)]
    assert run([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["seconds"] > 0
    assert [part["name"] for part in found["parts"]][:4] == ["start", "surrogate", "randomness", "universal NES"]
    assert found["parts"][1]["surrogate"] > 0
    assert run(asked) == 0
    shown = capsys.readouterr().err
    assert "universal curve" in shown
    assert "lenet5 is trained first" in shown
    assert not out.exists()


def test_the_cost_of_an_audit_is_all_that_its_model_was_asked(trained, digits, tmp_path, monkeypatch):
    seen = list[Victim]()

    class Seen(Victim):
        def __enter__(self):
            seen.append(self)
            return super().__enter__()

    monkeypatch.setattr(sys.modules["gambeson.auditing.audit"], "Victim", Seen)
    checked = SUITE.model_copy(update={"checks": ("no vanishing gradients", "gradient beats random search")})
    result = gb.audit(trained, digits, checked, tmp_path / "audit").results
    parts = [*result.universal, *result.per_image, *result.transfer, result.eps_uni, result.jacobian]
    assert result.cost.forwards > sum(part.cost.forwards for part in parts) + len(digits.test)
    assert result.cost == Cost(forwards=seen[0].forwards, backwards=seen[0].backwards)
    stages = tmp_path / "audit" / "state" / "stages.json"
    kept = json.loads(stages.read_text())
    del kept["per-image"], kept["check no vanishing gradients"]  # made again, counted once
    stages.write_text(json.dumps(kept))
    assert gb.audit(trained, digits, checked, tmp_path / "audit").results.cost == result.cost
    assert 0 < seen[1].forwards < seen[0].forwards

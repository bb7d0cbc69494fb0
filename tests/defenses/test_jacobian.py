"""Estimators of the Jacobian's norm against closed forms and the exact norm; the defence's effect on a small net."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gambeson as gb
from gambeson import UserError
from gambeson.defenses import Batch, Clean, Standard, TrainContext
from gambeson.defenses.jacobian import Jacobian, JacobianNorm
from gambeson.tasks import Segmentation
from tests.conftest import LinearNet, full, inner_images

WAYS = {
    "projection": {"estimator": "projection"},
    "two projections": {"estimator": "projection", "n_proj": 2},
    "exact": {"estimator": "exact"},
    "difference": {"estimator": "input", "derivative": "finite-difference", "step": 1e-6},
    "forward mode": {"estimator": "input"},
    "stacked": {"estimator": "stacked", "derivative": "finite-difference", "step": 1e-6},
    "stacked forward": {"estimator": "stacked", "n_proj": 2},
    "projection on a part": {"estimator": "projection", "share": 1 / 3},
    "forward mode on a part": {"estimator": "input", "share": 1 / 4},
    "difference on a part": {
        "estimator": "input",
        "share": 1 / 4,
        "derivative": "finite-difference",
        "step": 1e-6,
        "jitter": 1e-9,
    },
}


def batch_of(x, seed=0, **more):
    return Batch(images=x, labels=torch.arange(len(x)) % 2, seed=seed, **more)


def linear(classes=3, shape=(2, 3, 4), seed=0):
    return LinearNet(torch.randn(classes, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def two_layers(classes=4, inputs=24, hidden=16):
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, classes)).double()


def images(count=6, shape=(2, 3, 4), seed=0):
    return inner_images(count, shape, seed).double()


def jacobians(model, x):
    return torch.stack([torch.autograd.functional.jacobian(model, row[None]).flatten(0, 1).flatten(1) for row in x])


def context(model, batch_size=6, train=None, seed=0):
    return TrainContext(model=model, train=train, seed=seed, epochs=1, steps=1, batch_size=batch_size)


class Shaped:
    """The one thing that the objective asks of the training split."""

    shape = (2, 3, 4)


def test_linear_model_is_weight_decay_on_the_weight_alone():
    model = linear()
    value = JacobianNorm(estimator="exact")(model, batch_of(images()))
    torch.testing.assert_close(value, model.weight.square().sum() / 2)
    gradient, of_bias = torch.autograd.grad(value, [model.weight, model.bias], allow_unused=True)
    torch.testing.assert_close(gradient, model.weight.detach())
    assert of_bias is None
    for way in ({"estimator": "projection", "n_proj": 3}, {"estimator": "projection", "n_proj": 7}):
        torch.testing.assert_close(JacobianNorm(**way)(model, batch_of(images())), value)


def test_one_logit_needs_no_more_than_one_projection():
    model = linear(classes=1)
    value = JacobianNorm()(model, batch_of(images()))
    torch.testing.assert_close(value, model.weight.square().sum() / 2)


@pytest.mark.parametrize("way", WAYS)
def test_every_estimator_is_unbiased_in_value_and_gradient(way):
    model, x = two_layers(), images(12)
    exact = JacobianNorm(estimator="exact")(model, batch_of(x))
    weight = model[1].weight
    (slope,) = torch.autograd.grad(exact, weight)
    term = JacobianNorm(**WAYS[way])
    values, slopes = [], []
    for seed in range(300):
        value = term(model, batch_of(x, seed))
        values.append(value.detach())
        slopes.append((torch.autograd.grad(value, weight)[0] * slope).sum() / slope.square().sum())
    parts = _part_of(term, model, x)
    for found, target in ((torch.stack(values), parts[0]), (torch.stack(slopes), parts[1])):
        error = found.std() / math.sqrt(len(found)) + 1e-9
        assert abs(float(found.mean() - target)) < 4 * float(error)
    if way == "exact":
        assert float(torch.stack(values).std()) < 1e-9


def _part_of(term, model, x):
    """The exact norm of the images that a term looks at, and its slope along the whole norm's."""
    count = max(1, round(term.share * len(x)))
    weight = model[1].weight
    whole = torch.autograd.grad(JacobianNorm(estimator="exact")(model, batch_of(x)), weight)[0]
    value = JacobianNorm(estimator="exact")(model, batch_of(x[:: len(x) // count][:count]))
    part = torch.autograd.grad(value, weight)[0]
    return value.detach(), (part * whole).sum() / whole.square().sum()


@pytest.mark.parametrize(("way", "dimensions"), [("projection", 4), full("forward mode", 24), ("difference", 24)])
def test_the_spread_is_the_theory_s(way, dimensions):
    model, x = two_layers(), images(1)
    jacobian = jacobians(model, x)[0]
    squares = torch.linalg.svdvals(jacobian).square()
    theory = math.sqrt(2 / (dimensions + 2) * float(dimensions * squares.square().sum() / squares.sum() ** 2 - 1))
    term = JacobianNorm(**WAYS[way])
    found = torch.stack([term(model, batch_of(x, seed)).detach() for seed in range(1500)])
    assert float(found.std() / found.mean()) == pytest.approx(theory, rel=0.12)


def test_the_spread_of_the_stacked_estimate_is_that_of_the_stacked_jacobian():
    model, x = two_layers(), images(5)
    squares = torch.linalg.svdvals(jacobians(model, x).flatten(0, 1)).square()
    theory = math.sqrt(2 / 26 * float(24 * squares.square().sum() / squares.sum() ** 2 - 1))
    term = JacobianNorm(**WAYS["stacked forward"] | {"n_proj": 1})
    found = torch.stack([term(model, batch_of(x, seed)).detach() for seed in range(1500)])
    assert float(found.std() / found.mean()) == pytest.approx(theory, rel=0.12)


def test_two_layer_oracle_and_the_parameters_without_a_path():
    model, x = two_layers(), images()
    first, second = model[1], model[3]
    active = (first(x.flatten(1)) > 0).double()
    by_hand = torch.einsum("kh,nh,hd->nkd", second.weight, active, first.weight).detach().square().sum() / 2 / len(x)
    for way in ("exact", "forward mode"):
        settings = WAYS[way] if way == "exact" else {**WAYS[way], "n_proj": 4000}
        value = JacobianNorm(**settings)(model, batch_of(x))
        assert float(value.detach()) == pytest.approx(float(by_hand), rel=1e-9 if way == "exact" else 0.02)
        found = torch.autograd.grad(value, [first.bias, second.bias], allow_unused=True)
        assert found[1] is None or not found[1].any()
        assert found[0] is None or not found[0].any()


@pytest.mark.parametrize("way", WAYS)
def test_scaling_the_logits_by_a_scales_it_by_a_squared(way):
    small, large = linear(), linear()
    large.weight.data *= 3
    settings = {**WAYS[way]}
    a, b = (JacobianNorm(**settings)(model, batch_of(images())) for model in (small, large))
    torch.testing.assert_close(b, 9 * a)


@pytest.mark.parametrize("way", ["exact", "projection", "difference", "forward mode", "stacked"])
def test_normalised_space_counts_each_channel_by_its_deviation(way):
    card = {"in_channels": 2, "classes": 3, "image_size": 8, "mean": (0.1, 0.3), "std": (0.2, 0.5)}
    torch.manual_seed(0)
    model = gb.models.create("lenet5", **card).eval()
    x = images(8, (2, 8, 8)).float()
    point = model.normalize(x).requires_grad_()
    rows = [torch.autograd.grad(model.body(point)[:, k].sum(), point)[0] for k in range(3)]
    by_hand = float(torch.stack(rows).square().sum() / 2 / 8)
    settings = WAYS[way] if way == "exact" else {**WAYS[way], "n_proj": 2 if way == "projection" else 60, "step": 1e-3}
    term = JacobianNorm(**settings, space="normalised")
    found = torch.stack([term(model, batch_of(x, seed)).detach() for seed in range(1 if way == "exact" else 12)])
    error = 0 if way == "exact" else float(found.std()) / math.sqrt(12)
    assert abs(float(found.mean()) - by_hand) < 4 * error + 0.01 * by_hand
    assert float(JacobianNorm(estimator="exact")(model, batch_of(x)).detach()) > 3 * by_hand


def test_every_second_step_counts_twice_and_the_others_cost_nothing():
    model, x = linear(), images()
    whole, term = JacobianNorm(estimator="exact"), JacobianNorm(estimator="exact", every=2)
    torch.testing.assert_close(term(model, batch_of(x, step=4)), 2 * whole(model, batch_of(x)))
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    assert float(term(model, batch_of(x, step=5))) == 0
    assert not calls


def test_a_part_of_the_batch_is_spread_evenly_and_processes_agree_with_one():
    model, x = two_layers(), images(12)
    for way in (name for name in WAYS if name != "exact"):
        term = JacobianNorm(**WAYS[way] | ({"share": 5 / 12} if "part" in way else {}))
        whole = torch.autograd.grad(term(model, batch_of(x)), model[1].weight)[0]
        parts = []
        for number in range(2):
            value = term(model, batch_of(x[6 * number : 6 * number + 6], place=(number, 2)))
            parts.append(torch.autograd.grad(value, model[1].weight)[0])
        torch.testing.assert_close(sum(parts) / 2, whole, rtol=1e-6, atol=1e-8)


def test_the_objective_shares_one_forward_and_equals_the_sum_of_its_terms():
    model, x = two_layers(), images()
    calls = []
    model.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    expected = {"projection": [6], "exact": [6], "difference": [12], "forward mode": [6], "stacked": [12]}
    for way, forwards in expected.items():
        defense = Jacobian(**WAYS[way], strength=0.3)
        calls.clear()
        together = defense.build_objective(context(model, train=Shaped())).losses(model, batch_of(x))
        assert calls == forwards
        apart = defense.losses(model, batch_of(x))
        assert list(together) == ["loss", "clean", "jacobian"]
        for name in together:
            torch.testing.assert_close(together[name], apart[name])
        ours = [torch.autograd.grad(losses["loss"], model[1].weight)[0] for losses in (together, apart)]
        torch.testing.assert_close(*ours)
    calls.clear()
    for derivative, forwards in {"finite-difference": [8], "forward-mode": [2, 4]}.items():
        part = Jacobian(estimator="input", share=1 / 3, derivative=derivative, strength=0)
        plain = part.losses(model, batch_of(x))
        part = part.model_copy(update={"strength": 0.3})
        calls.clear()
        found = part.build_objective(context(model, train=Shaped())).losses(model, batch_of(x))
        assert calls == forwards
        torch.testing.assert_close(found["clean"], plain["clean"])


def test_without_strength_it_is_standard_training_bit_for_bit(digits):
    weights = []
    for defense in (Standard(), Jacobian(strength=0), Jacobian(), Jacobian(estimator="input", share=1 / 8)):
        torch.manual_seed(3)
        model = gb.models.create("lenet5", digits)
        gb.train(model, digits, defense, epochs=1, batch_size=64, seed=3)
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not any(all(torch.equal(weights[0][key], other[key]) for key in weights[0]) for other in weights[2:])


@pytest.mark.parametrize(
    "settings",
    [{"strength": 0.02}, full({"strength": 0.02, "estimator": "input", "share": 1 / 8})],
    ids=["projection", "input"],
)
def test_training_with_it_halves_the_norm_at_the_same_accuracy(digits, settings):
    x, y = digits.test.take(slice(None))
    norms, errors = [], []
    for defense in (Standard(), Jacobian(**settings)):
        torch.manual_seed(0)
        model = gb.models.create("lenet5", digits)
        gb.train(model, digits, defense, epochs=10, batch_size=64, seed=0)
        model.eval()
        norms.append(math.sqrt(2 * float(JacobianNorm(estimator="exact")(model, batch_of(x)).detach())))
        errors.append(float((model(x).argmax(1) != y).float().mean()))
    assert norms[1] < norms[0] / 2
    assert errors[1] <= errors[0] + 0.02


@pytest.mark.parametrize("derivative", ["finite-difference", "forward-mode"])
def test_power_iteration_reaches_the_stacked_jacobian_s_largest_singular_value(derivative):
    model, x = two_layers(), images(8)
    defense = Jacobian(estimator="stacked", power=True, inertia=0, derivative=derivative, step=1e-6)
    objective = defense.build_objective(context(model, train=Shaped()))
    _, values, right = torch.linalg.svd(jacobians(model, x).flatten(0, 1))
    target = float(values[0] ** 2 / 2 / len(x))
    found = []
    for step in range(150):
        losses = objective.losses(model, batch_of(x, step=step))
        losses["loss"].backward()
        objective.after_step(batch_of(x, step=step))
        found.append(float(losses["jacobian"]))
    assert all(value <= target * (1 + 1e-4) for value in found)
    assert found[0] < 0.6 * target
    assert found[-1] == pytest.approx(target, rel=1e-3)
    direction = objective.carried["jacobian"].direction.flatten().double()
    assert abs(float(direction @ right[0])) > 0.999
    before = direction.clone()
    objective.after_step(batch_of(x))  # nothing was evaluated since
    assert torch.equal(before, objective.carried["jacobian"].direction.flatten().double())


def test_the_direction_goes_on_after_a_cut_bit_for_bit(digits, tmp_path):
    defense = Jacobian(estimator="stacked", power=True)

    class Cut(Exception):
        pass

    def run(out, stop_after=None):
        torch.manual_seed(3)
        model = gb.models.create("lenet5", digits)
        if stop_after is not None:
            seen = []

            def stop(*_):
                seen.append(1)
                if model.training and len(seen) > stop_after:
                    raise Cut

            model.register_forward_pre_hook(stop)
        gb.train(model, digits, defense, epochs=3, batch_size=64, seed=3, out=out)
        return model.state_dict()

    whole = run(tmp_path / "whole")
    with pytest.raises(Cut):
        run(tmp_path / "cut", stop_after=40)
    assert (tmp_path / "cut" / "state" / "latest.safetensors").is_file()
    again = run(tmp_path / "cut")
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    directions = []
    for out in ("whole", "cut"):
        tensors, _ = gb.base.load_tensors(tmp_path / out / "state" / "latest.safetensors")
        directions += [value for name, value in tensors.items() if name.endswith("jacobian.direction")]
    assert len(directions) == 2
    assert torch.equal(*directions)
    assert float(directions[0].norm()) == pytest.approx(1)


@pytest.mark.parametrize("way", ["exact", "difference", "forward mode"])
def test_an_ensemble_s_vote_has_a_jacobian_too(way):
    torch.manual_seed(0)
    model = gb.models.create("lenet5", in_channels=1, classes=3, image_size=8, members=2).eval()
    x = images(8, (1, 8, 8)).float()
    rows = jacobians(model, x)
    settings = WAYS[way] if way == "exact" else {**WAYS[way], "n_proj": 500, "step": 1e-3}
    value = JacobianNorm(**settings)(model, batch_of(x))
    assert float(value.detach()) == pytest.approx(
        float(rows.square().sum() / 2 / 8), rel=1e-4 if way == "exact" else 0.06
    )
    value.backward()
    assert all(voter.body.conv1.weight.grad.any() for voter in model.voters)


@pytest.mark.parametrize("way", ["projection", "exact", "difference", "forward mode"])
def test_batch_norm_in_training_mode_works_and_the_difference_holds_its_statistics(way):
    torch.manual_seed(0)
    model = gb.models.create("resnet20x0.25", in_channels=1, classes=10, image_size=8).train()
    objective = Jacobian(**WAYS[way] | {"step": 1e-3}).build_objective(context(model, train=Shaped()))
    losses = objective.losses(model, batch_of(images(8, (1, 8, 8)).float()))
    losses["loss"].backward()
    assert math.isfinite(float(losses["jacobian"]))
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("way", ["exact", "projection", "input", "difference", "forward mode", "stacked"])
@pytest.mark.parametrize("side", [3, 6])
def test_the_norm_of_a_map_is_the_mean_over_its_labelled_pixels(way, side):
    torch.manual_seed(0)
    net = nn.Conv2d(1, 3, 3, padding=1, padding_mode="circular").double()  # every pixel has the same Jacobian
    x = images(4, (1, side, side))
    labels = torch.zeros(4, side, side, dtype=torch.long)
    labels[:, :, 0] = 9
    batch = Batch(images=x, labels=labels, seed=0, task=Segmentation(ignore_index=9))
    target = float(net.weight.detach().square().sum() / 2)
    many = {} if way == "exact" else {"n_proj": 60 if way != "stacked" else 240}
    found = JacobianNorm(**{**WAYS.get(way, {"estimator": way}), **many})(net, batch)
    assert float(found.detach()) == pytest.approx(target, rel=1e-9 if way == "exact" else 0.15)
    labels[0] = 9  # an image without labels has no norm, as it has no loss
    assert float(JacobianNorm(estimator="exact")(net, batch).detach()) == pytest.approx(target * 3 / 4)


def test_the_exact_norm_of_a_large_map_is_refused():
    batch = Batch(images=torch.rand(1, 1, 40, 40), labels=torch.zeros(1, 40, 40).long(), seed=0, task=Segmentation())
    with pytest.raises(UserError, match="a double backward for each of 4800 outputs .*: choose estimator='projection'"):
        JacobianNorm(estimator="exact")(nn.Conv2d(1, 3, 1), batch)


def test_dropout_is_told_from_a_jacobian():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(24, 3)).double().train()
    with pytest.raises(UserError, match="draws random numbers .* choose derivative='forward-mode'"):
        JacobianNorm(**WAYS["difference"])(model, batch_of(images()))
    kept = JacobianNorm(**WAYS["difference"])(model.eval(), batch_of(images()))
    assert float(kept) > 0
    assert float(JacobianNorm(**WAYS["forward mode"])(model.train(), batch_of(images()))) > 0


@pytest.mark.parametrize("way", ["projection", "difference", "forward mode"])
def test_it_is_taken_in_float32_under_autocast(way):
    torch.manual_seed(0)
    model = gb.models.create("lenet5", in_channels=1, classes=3, image_size=8).eval()
    batch = batch_of(images(8, (1, 8, 8)).float())
    objective = Jacobian(**WAYS[way] | {"step": 1e-3}).build_objective(context(model, train=Shaped()))
    plain = objective.losses(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = objective.losses(model, batch)
        clean = Clean()(model, batch)
    torch.testing.assert_close(low["jacobian"], plain["jacobian"], rtol=1e-3, atol=0)
    assert torch.equal(low["clean"], clean.detach())


def test_mistakes_are_named():
    model, batch = linear(), batch_of(images())
    with torch.no_grad(), pytest.raises(UserError, match="needs gradients: call it outside torch.no_grad"):
        JacobianNorm()(model, batch)
    with pytest.raises(UserError, match="LinearNet has no known normalisation: choose space='pixel'"):
        JacobianNorm(space="normalised")(model, batch)
    with pytest.raises(UserError, match="power iteration needs estimator='stacked' and n_proj=1"):
        Jacobian(power=True)
    with pytest.raises(UserError, match="power iteration has a state"):
        JacobianNorm(estimator="stacked", power=True)(model, batch)
    with pytest.raises(UserError, match="share = 0"):
        Jacobian(share=0)
    with pytest.raises(UserError, match="estimator = 'frobenius'"):
        Jacobian(estimator="frobenius")
    assert float(F.relu(JacobianNorm()(model, batch))) > 0

"""The other universal attacks against formulas, brute force and finite cases."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch import nn

import gambeson as gb
from gambeson import UserError
from gambeson.attacks import StochasticPGD, UniversalPerturbation, control
from gambeson.attacks.solver import Adam
from gambeson.attacks.universal.base import UniversalAttack
from gambeson.attacks.universal.context import CraftingContext
from gambeson.attacks.universal.data_free import DataFree, activations, layer_names
from gambeson.attacks.universal.deepfool_uap import DeepFoolUAP
from gambeson.attacks.universal.df_uap import DFUAP
from gambeson.attacks.universal.sga import SGA
from gambeson.attacks.universal.singular_vector import SingularVector, layer_maps, power_method
from gambeson.attacks.universal.stochastic_pgd import ClasswiseStochasticPGD
from gambeson.data import Dataset, Split
from gambeson.threat import Ball
from gambeson.victim import Victim
from tests.conftest import LinearNet, binary, inner_images

SHAPE = (2, 3, 4)


def linear_data(model, keep=None, shape=SHAPE, count=180):
    """Images that the linear model gets right, of both classes or of one; three equal splits."""
    x = inner_images(count * 4, shape)
    with torch.no_grad():
        bias = model(x).diff(dim=1).mean() / 2
        model.bias += torch.stack([bias, -bias])
        y = model(x).argmax(1)
    rows = (torch.arange(len(x)) if keep is None else (y == keep).nonzero().flatten())[:count]
    parts = [Split(f"linear/{k}", x[part], y[part], ("a", "b")) for k, part in enumerate(rows.chunk(3))]
    dataset = object.__new__(Dataset)  # one class is refused by Dataset; here the formula needs it
    for name, value in zip(("name", "train", "validation", "test", "classes"), ("l", *parts, ("a", "b")), strict=True):
        object.__setattr__(dataset, name, value)
    return dataset


ATTACKS = {
    "s-pgd": lambda **kw: StochasticPGD(steps=40, restarts=1, batch_size=20, truncate=None, **kw),
    "sample": lambda **kw: StochasticPGD(steps=60, restarts=1, batch_size=20, truncate=None, normalise="sample", **kw),
    "momentum": lambda **kw: StochasticPGD(steps=40, restarts=1, batch_size=20, truncate=None, momentum=0.9, **kw),
    "margin": lambda **kw: StochasticPGD(steps=40, batch_size=20, truncate=99, loss="margin", temperature=1, **kw),
    "sga": lambda **kw: SGA(steps=40, batch_size=20, rounds=2, temperature=1, **kw),
    "sga-logit": lambda **kw: SGA(steps=40, batch_size=20, rounds=2, loss="logit", **kw),
    "df-uap": lambda **kw: DFUAP(steps=80, batch_size=20, rel_step_size=0.1, confidence=99, **kw),
    "deepfool": lambda **kw: DeepFoolUAP(images=60, fooling=1.0, passes=20, **kw),
    "deepfool-32": lambda **kw: DeepFoolUAP(images=60, fooling=1.0, passes=20, batch_size=32, **kw),
    "singular": lambda **kw: SingularVector(layers=("",), images=8, **kw),
}


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("name", [key for key in ATTACKS if not key.startswith("deepfool")])
def test_gradient_attacks_reach_the_linear_optimum_of_one_class(name, keep):
    model, w = binary(SHAPE)
    uap = ATTACKS[name](eps=0.1).craft(model, linear_data(model, keep))
    best = 0.1 * (1 if keep == 0 else -1) * w.sign()
    torch.testing.assert_close(uap.delta[0], best, rtol=1e-4, atol=1e-6)
    assert uap.about.status == "done"


@pytest.mark.parametrize("name", ["s-pgd", "sga", "singular", "momentum"])
def test_euclidean_ball_too(name):
    model, w = binary(SHAPE)
    uap = ATTACKS[name](eps=0.2, norm="2").craft(model, linear_data(model, 0))
    torch.testing.assert_close(uap.delta[0], 0.2 * w / w.norm(), rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("name", ["deepfool", "deepfool-32"])
def test_deepfool_uap_fools_every_image_that_one_direction_can(name):
    model, w = binary(SHAPE)
    data = linear_data(model, 0)
    margins = model(data.train.take(slice(None))[0]).diff(dim=1).flatten().abs()
    enough = float(margins.max() / w.norm()) * 1.05
    uap = ATTACKS[name](eps=enough, norm="2").craft(model, data)
    assert uap.about.status == "done"
    length = float(uap.delta.norm())
    assert float(margins.max() / w.norm()) <= length <= enough
    torch.testing.assert_close(uap.delta[0] / length, w / w.norm(), rtol=1e-3, atol=1e-4)
    short = ATTACKS[name](eps=float(margins.median() / w.norm()), norm="2").craft(model, data)
    assert short.about.status == "target not reached"


def test_sga_with_one_inner_step_is_plain_stochastic_pgd(trained, digits):
    plain = StochasticPGD(
        eps=0.2, steps=6, batch_size=64, rel_step_size=0.1, final_step=0.1, restarts=2, truncate=9.0, probe_starts=0
    ).craft(trained, digits, seed=3)
    sga = SGA(
        eps=0.2, steps=6, batch_size=64, inner_batch=64, rounds=1, restarts=2, truncate=9.0, labels="truth"
    ).craft(trained, digits, seed=3)
    torch.testing.assert_close(sga.delta, plain.delta)
    assert (sga.about.forwards, sga.about.backwards) == (plain.about.forwards, plain.about.backwards)
    more = SGA(eps=0.2, steps=2, batch_size=60, inner_batch=10, rounds=3).craft(trained, digits)
    assert more.about.backwards == 2 * 3 * 60  # inner gradients are counted


def test_mean_of_signs_differs_from_sign_of_the_mean_on_two_samples():
    model, w = binary((1, 1, 3))
    x = torch.full((2, 1, 1, 3), 0.5)
    y = torch.tensor([0, 1])
    with torch.no_grad():
        model.bias += torch.tensor([0.0, 1.0])  # the image of class 1 is surer, so that of class 0 has more to lose
    part, alike = Split("two", x, y, ("a", "b")), Split("two", x, torch.zeros_like(y), ("a", "b"))
    with Victim(model, fast=True) as victim:
        context = CraftingContext(victims=[victim], train=part, validation=part, ball=Ball(eps=0.2), seed=0)
        same = CraftingContext(victims=[victim], train=alike, validation=part, ball=Ball(eps=0.2), seed=0)
        zero = context.start("zero", 0)
        one = {
            kind: StochasticPGD(eps=0.2, steps=1, batch_size=2, rel_step_size=0.5, truncate=None, normalise=kind)._run(
                context, zero, [0]
            )
            for kind in ("batch", "sample")
        }
        step = StochasticPGD(eps=0.2, steps=1, batch_size=2, rel_step_size=0.5, truncate=None, normalise="sample")
        mean = step._run(same, zero, [0])
    torch.testing.assert_close(mean[0], 0.1 * w.sign())  # of two equal signs, one step and not two
    assert not one["sample"].any()  # the two signs are opposite and cancel
    torch.testing.assert_close(one["batch"][0].abs(), torch.full((1, 1, 3), 0.1))
    assert torch.equal(one["batch"][0].sign(), w.sign())


def test_classwise_perturbations_are_the_per_image_optima_of_a_linear_model():
    model, w = binary(SHAPE)
    data = linear_data(model)
    attack = ClasswiseStochasticPGD(eps=0.1, steps=40, batch_size=30, truncate=None)
    found = attack.craft_classes(model, data)
    assert sorted(found) == [0, 1]
    torch.testing.assert_close(found[0].delta[0], 0.1 * w.sign())
    torch.testing.assert_close(found[1].delta[0], -0.1 * w.sign())
    assert [uap.about.source_class for uap in found.values()] == [0, 1]
    assert found[0].about.backwards == 2 * 40 * 30  # one backward serves both classes
    with pytest.raises(UserError, match="call craft_classes"):
        attack.craft(model, data)
    with pytest.raises(UserError, match="take labels and a model of one task"):
        attack.craft_classes(model, Split("maps", torch.rand(30, 2, 3, 4), torch.randint(0, 2, (30, 3, 4))))


def test_classwise_momentum_and_sample_steps_stay_in_the_ball(trained, digits):
    for options in ({"normalise": "sample"}, {"momentum": 0.9}, {"norm": "2"}):
        attack = ClasswiseStochasticPGD(eps=0.2, steps=4, batch_size=64, restarts=1, **options)
        found = attack.craft_classes(trained, digits)
        assert len(found) == 10
        assert all(float(attack.ball.length(uap.delta)) <= 0.2 + 1e-6 for uap in found.values())


@pytest.mark.parametrize(
    "attack",
    [
        StochasticPGD(eps=0.2, steps=6, restarts=2, batch_size=64),
        SGA(eps=0.2, steps=2, batch_size=60, rounds=1),
        DFUAP(eps=0.2, steps=6, batch_size=64),
        DataFree(eps=0.2, steps=6, batch_size=4, check_every=3),
    ],
    ids=lambda attack: attack.name,
)
def test_a_model_twice_is_that_model_once_and_costs_are_added(attack, trained, digits):
    one = attack.craft(trained, digits, seed=2)
    two = attack.craft([trained, trained], digits, seed=2)
    torch.testing.assert_close(two.delta, one.delta, rtol=1e-4, atol=2e-3)
    assert (two.about.forwards, two.about.backwards) == (2 * one.about.forwards, 2 * one.about.backwards)
    name = gb.models.fingerprint(trained)
    assert (one.about.model, two.about.model) == (name, f"{name}+{name}")
    assert [start for start, _ in two.about.restarts] == [start for start, _ in one.about.restarts]


def test_two_different_models_are_both_attacked():
    (first, w), (second, u) = binary(SHAPE, 0), binary(SHAPE, 1)
    data = linear_data(first, 0)
    with torch.no_grad():
        second.bias += 0.0
    uap = ATTACKS["margin"](eps=0.1).craft([first, second], data)
    torch.testing.assert_close(uap.delta[0], 0.1 * (w + u).sign())
    before = [(module, module.training) for module in first.modules()]
    assert all(module.training == mode for module, mode in before)


@pytest.mark.parametrize(
    ("model", "words"),
    [([], "the list of models is empty"), (["resnet"], "a model is a str: expected a torch.nn.Module")],
)
def test_bad_models_are_refused(model, words, digits):
    with pytest.raises(UserError, match=words):
        StochasticPGD(eps=0.1).craft(model, digits)


def test_models_of_unequal_classes_are_refused():
    (two, _), three = binary(SHAPE), LinearNet(torch.ones(3, *SHAPE))
    with pytest.raises(UserError, match=r"the models return shapes \(2,\) and \(3,\) per image"):
        ATTACKS["s-pgd"](eps=0.1).craft([two, three], linear_data(two, 0))


def test_bounded_logit_targeted_reaches_its_class_and_its_loss_is_bounded():
    model, w = binary(SHAPE)
    data = linear_data(model)
    uap = DFUAP(eps=0.2, steps=60, batch_size=20, rel_step_size=0.1, target=1, confidence=99).craft(model, data)
    torch.testing.assert_close(uap.delta[0], 0.2 * w.sign(), rtol=1e-4, atol=1e-6)
    attack = DFUAP(eps=0.1, target=1, confidence=2.0)
    logits = torch.tensor([[0.0, 1.0, 0.5], [0.0, 9.0, 0.0]], requires_grad=True)
    value = attack.objective(logits, torch.tensor([1, 1]))
    assert value.tolist() == [0.5, 2.0]
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert gradient.tolist() == [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]  # the rival is held fixed, the reached one is out


def test_adam_is_torch_s():
    x = torch.randn(2, 1, 3, 3)
    parameter = nn.Parameter(torch.zeros_like(x))
    theirs, ours, place = torch.optim.Adam([parameter], lr=0.05), Adam.like(x), torch.zeros_like(x)
    for k in range(5):
        gradient = x * (k + 1) - k
        parameter.grad = -gradient
        theirs.step()
        place = place + 0.05 * ours.direction(gradient)
    torch.testing.assert_close(place, parameter.detach())


def test_proxy_images_need_no_labels(trained, digits):
    noise = torch.rand(200, *digits.train.shape, generator=torch.Generator().manual_seed(0))
    attack = DFUAP(eps=0.2, steps=20, batch_size=40)
    uap = attack.craft(trained, noise)
    assert (uap.about.crafted_split, uap.about.chosen_on) == ("images/train", "images/validation")
    nothing = UniversalPerturbation(torch.zeros_like(uap.delta), uap.about)
    assert (
        gb.evaluation.fooling_rate(trained, digits, uap).low > gb.evaluation.fooling_rate(trained, digits, nothing).high
    )
    with pytest.raises(UserError, match="expected 2 or more"):
        attack.craft(trained, noise[:1])


def test_predictions_as_labels_equal_the_truth_where_the_model_is_right():
    model, _ = binary(SHAPE)
    data = linear_data(model)
    one, two = (
        StochasticPGD(eps=0.1, steps=5, probe_starts=0, batch_size=20, labels=labels).craft(model, data)
        for labels in ("truth", "prediction")
    )
    assert torch.equal(one.delta, two.delta)
    assert two.about.forwards - one.about.forwards == 5 * 20


def _times(matrix, v):
    return matrix @ v.flatten()


def _back(matrix, u):
    return (matrix.T @ u).view(1, -1, 1, 1)


def test_power_method_never_falls_and_reaches_half_of_brute_force():
    draw = torch.Generator().manual_seed(0)
    for p, q in ((math.inf, 5.0), (2.0, 2.0), (math.inf, 1.0), (3.0, 4.0)):
        matrix = torch.randn(30, 8, generator=draw)
        maps = partial(_times, matrix), partial(_back, matrix)
        starts = [torch.randn(1, 8, 1, 1, generator=draw) for _ in range(5)]
        reached = []
        for start in starts:
            values = []
            for steps in range(8):
                v = power_method(*maps, start, p=p, q=q, iterations=steps)
                assert float(v.norm(p=p)) == pytest.approx(1, rel=1e-5)
                values.append(float((matrix @ v.flatten()).norm(p=q)))
            assert all(b >= a * (1 - 1e-5) for a, b in itertools.pairwise(values))
            reached.append(values[-1])
        if math.isinf(p):
            corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 8)
            best = float((corners @ matrix.T).norm(p=q, dim=1).max())
            assert 0.5 * best <= max(reached) <= best * (1 + 1e-5)
        if q == 2.0:
            assert max(reached) <= float(torch.linalg.matrix_norm(matrix, 2)) * (1 + 1e-5)


def test_singular_vector_of_a_rank_one_jacobian_is_the_sign_after_one_step():
    u, w = torch.randn(7), torch.randn(1, 6, 1, 1)
    v = power_method(
        lambda v: u * (w * v).sum(), lambda z: w * (u @ z), torch.randn(1, 6, 1, 1), p=math.inf, q=5, iterations=1
    )
    assert torch.equal(v.abs(), torch.ones_like(v))
    assert torch.equal((v * w).sign(), (v * w).sign().flatten()[0].expand_as(v))


def test_layer_maps_are_the_jacobian_and_its_transpose(trained, digits):
    images, _ = digits.train.take(slice(0, 3))
    v = torch.randn(1, *images.shape[1:], generator=torch.Generator().manual_seed(0))
    for layer in (layer_names(trained)[1], layer_names(trained)[-1]):
        with Victim(trained) as victim:
            jvp, vjp = layer_maps(victim, images, layer)
            pushed = jvp(v)
            u = torch.randn_like(pushed)
            assert float((pushed * u).sum()) == pytest.approx(float((vjp(u) * v).sum()), rel=1e-3, abs=1e-4)
            (there,) = activations(victim, images + 1e-3 * v, [layer])
            (here,) = activations(victim, images - 1e-3 * v, [layer])
            gap = ((there - here) / 2e-3 - pushed).norm() / pushed.norm()
            assert float(gap) < 0.1  # kinks of ReLU and pooling lie between the two points here and there
            assert victim.backwards == 6


def test_singular_vector_tries_layers_and_signs(trained, digits):
    attack = SingularVector(eps=0.2, images=16, iterations=5, restarts=2)
    uap = attack.craft(trained, digits)
    names = [start for start, _ in uap.about.restarts]
    assert len(names) == 10
    assert {name[-1] for name in names} == {"+", "-"}
    assert torch.equal(uap.delta, attack.craft(trained, digits).delta)
    noise = UniversalPerturbation(control("random-sign", Ball(eps=0.2), digits.test.shape), uap.about)
    crafted, idle = (gb.evaluation.universal_evasion(trained, digits, one) for one in (uap, noise))
    assert crafted.value > idle.value
    with pytest.raises(UserError, match="unknown layer 'body.conv9'"):
        SingularVector(eps=0.2, layers=("body.conv9",)).craft(trained, digits)


def test_data_free_climbs_the_norm_of_a_linear_layer_and_sees_no_image(digits):
    draw = torch.Generator().manual_seed(0)

    class OneLayer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 4, bias=False)
            with torch.no_grad():
                self.layer.weight.copy_(torch.randn(4, 6, generator=draw))

        def forward(self, x):
            return self.layer(x.flatten(1) - 0.5)  # grey is its zero, as in a mean-subtracted net

    model = OneLayer()
    x = inner_images(60, (1, 2, 3))
    data = gb.data.as_dataset((x, torch.arange(60) % 4))
    attack = DataFree(eps=0.1, prior="none", steps=300, rel_step_size=0.05, check_every=300, rescale=False)
    uap = attack.craft(model, data)
    weight = model.layer.weight.detach()
    corners = torch.cartesian_prod(*[torch.tensor([-0.1, 0.1])] * 6)
    values = (corners @ weight.T).norm(dim=1)
    reached = float((weight @ uap.delta.flatten()).norm())
    assert 0.5 * float(values.max()) <= reached <= float(values.max()) * (1 + 1e-5)
    # A convex function's local maximum in the box: a corner that its own gradient points at.
    corner = uap.delta.flatten()
    torch.testing.assert_close(corner.abs(), torch.full((6,), 0.1))
    assert ((weight.T @ (weight @ corner)) * corner > 0).all()
    assert uap.about.crafted_on == "no images"
    assert uap.about.backwards == 300
    # The gradient of -log(||W d||^2 / 2) is -2 W^T W d / ||W d||^2.
    point = torch.randn(1, 1, 2, 3, generator=draw).requires_grad_()
    energy = attack._excitement([(weight @ point.flatten())[None]])
    (gradient,) = torch.autograd.grad(energy, point)
    d = point.detach().flatten()
    torch.testing.assert_close(
        gradient.flatten(), 2 * weight.T @ (weight @ d) / (weight @ d).square().sum(), rtol=1e-4, atol=1e-5
    )


def test_data_free_halves_a_saturated_delta_and_keeps_what_was_best(trained, digits):
    attack = DataFree(eps=0.2, steps=40, rel_step_size=0.5, batch_size=2, check_every=20, settled=0.5, saturated=0.3)
    uap = attack.craft(trained, digits)
    rates = dict(uap.about.restarts)
    assert len(rates) > 3  # a look at every halving beside the regular ones
    assert gb.evaluation.universal_evasion(trained, digits.validation, uap).value == max(rates.values())
    for prior, objective in (("data", "gd-uap"), ("none", "fff")):
        other = attack.model_copy(update={"prior": prior, "objective": objective, "steps": 2}).craft(trained, digits)
        assert (other.about.crafted_on == "no images") == (prior == "none")


SMALL = [
    StochasticPGD(eps=0, steps=2, restarts=2),
    SGA(eps=0, steps=1),
    DFUAP(eps=0, steps=2),
    DeepFoolUAP(eps=0, images=4, passes=1),
    SingularVector(eps=0, images=4, iterations=1, restarts=1),
    DataFree(eps=0, steps=2, batch_size=2),
]


@pytest.mark.parametrize("attack", SMALL, ids=lambda attack: attack.name)
def test_eps_zero_is_clean_and_the_ball_holds_and_runs_repeat(attack, trained, digits):
    uap = attack.craft(trained, digits)
    assert not uap.delta.any()
    x, _ = digits.test.take(slice(0, 5))
    assert torch.equal(uap.apply(x), x)
    for norm in ("inf", "2"):
        there = attack.model_copy(update={"eps": 0.3, "norm": norm})
        found = there.craft(trained, digits, seed=1)
        assert 0 < float(there.ball.length(found.delta)) <= 0.3 * (1 + 1e-5)
        assert torch.equal(found.delta, there.craft(trained, digits, seed=1).delta)
        assert found.about.settings == there.plain()
        assert type(there)(**found.about.settings) == there


def test_probing_starts_costs_what_it_says_and_keeps_the_best(trained, digits):
    attack = StochasticPGD(
        eps=0.2, steps=10, restarts=2, batch_size=64, probe_starts=6, probe_start_steps=3, probe_start_batch=64
    )
    uap = attack.craft(trained, digits, start=torch.ones(1, 1, 8, 8))
    assert uap.about.backwards == (6 * 3 + 3 * 10) * 64
    assert uap.about.forwards == uap.about.backwards + (6 + 3) * len(digits.validation) + 200
    assert [kind.endswith(", probed") for kind, _ in uap.about.restarts] == [True, True, False]
    assert uap.about.restarts[-1][0] == "warm"
    assert torch.equal(uap.delta, attack.craft(trained, digits, start=torch.ones(1, 1, 8, 8)).delta)


def test_start_is_one_more_candidate_of_every_attack(trained, digits):
    strong = StochasticPGD(eps=0.1, steps=40, restarts=1, batch_size=64).craft(trained, digits)
    for attack in (SGA(eps=0.2, steps=1, batch_size=20), DFUAP(eps=0.2, steps=1), DataFree(eps=0.2, steps=1)):
        uap = attack.craft(trained, digits, start=strong.delta)
        assert {"warm", "given"} & {kind for kind, _ in uap.about.restarts}
    with pytest.raises(UserError, match=r"start has shape \(1, 1, 2, 2\): expected \(1, 1, 8, 8\)"):
        SGA(eps=0.1).craft(trained, digits, start=torch.ones(1, 1, 2, 2))


def test_the_base_alone_is_no_attack(trained, digits):
    with pytest.raises(NotImplementedError):
        UniversalAttack(eps=0.1).craft(trained, digits)


@pytest.mark.parametrize("norm", ["inf", "2"])
def test_sga_steps_along_the_mean_of_all_inner_gradients(norm):
    """One outer step by hand, in plain PyTorch, on images with pixels at exactly 0 and 1."""
    draw = torch.Generator().manual_seed(4)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    x = torch.rand(12, 1, 3, 4, generator=draw)
    x[x < 0.25], x[x > 0.75] = 0.0, 1.0
    assert ((x == 0) | (x == 1)).any(0).all()
    y = torch.randint(0, 3, (12,), generator=draw)
    part = Split("few", x, y, ("a", "b", "c"))
    other = Split("others", torch.rand(12, 1, 3, 4, generator=draw), y, part.classes)
    data = Dataset("f", part, other, other, part.classes)
    attack = SGA(
        eps=0.3,
        norm=norm,
        inner_batch=4,
        rounds=1,
        rel_step_size=0.5,
        rel_inner_step_size=0.4,
        labels="truth",
        truncate=None,
        temperature=1,
    )
    with attack._crafting(net, data, 0) as context:
        solver = context.solver(attack.objective)
        found = attack._aggregate(solver, torch.zeros(1, 1, 3, 4), x, y, torch.Generator())
        delta = next(iter(attack.model_copy(update={"steps": 1, "batch_size": 12})._search(context, None))).delta

    def step(delta, gradient, length):
        if norm == "inf":
            return (delta + length * gradient.sign()).clamp(-0.3, 0.3)
        moved = delta + length * gradient / gradient.norm()
        return moved * min(1.0, 0.3 / float(moved.norm()))

    inner, gradients = torch.zeros(1, 1, 3, 4), []
    for rows in torch.arange(12).split(4):
        point = inner.clone().requires_grad_()
        straight = x[rows] + point + ((x[rows] + inner).clamp(0, 1) - (x[rows] + inner))
        gradients.append(torch.autograd.grad(nn.functional.cross_entropy(net(straight), y[rows]), point)[0])
        inner = step(inner, gradients[-1], 0.4 * 0.3)
    total = sum(gradients)
    torch.testing.assert_close(found, total)
    assert not torch.equal(total.sign(), gradients[-1].sign())  # the last alone would go elsewhere
    assert not torch.equal(total.sign(), gradients[0].sign())
    assert delta.shape == total.shape
    assert float(attack.ball.length(delta)) == pytest.approx(0.15, rel=1e-5)

"""Training against kept perturbations: closed forms on linear nets, the state, and a real gain on the digits."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gambeson as gb
from gambeson import UserError
from gambeson.base import load_tensors
from gambeson.defenses import Batch, Standard, TrainContext, universal_consistency
from gambeson.defenses.universal_adversarial import UniversalAdversarial
from gambeson.defenses.universal_consistency import UniversalConsistency, divergence
from gambeson.tasks import Segmentation
from gambeson.threat import Ball, perturb
from tests.conftest import LinearNet, binary, inner_images

SHAPE = (1, 4, 4)
MID = {"step": 3, "steps": 4, "epochs": 1}  # behind the warm-up


def batch_of(labels, seed=0, **place):
    labels = torch.as_tensor(labels)
    return Batch(images=inner_images(len(labels), SHAPE, seed), labels=labels, seed=seed, **{**MID, **place})


def opened(defense, model, batch, seed=0):
    classes = tuple(str(k) for k in range(max(2, int(batch.labels.max()) + 1)))
    split = gb.data.Split("own", batch.images, batch.labels, classes)
    context = TrainContext(model=model, train=split, seed=seed, epochs=1, steps=4, batch_size=len(batch.images))
    return defense.build_objective(context)


def the_bank(objective):
    (found,) = [module for module in objective.modules() if isinstance(module, universal_consistency.UAPBank)]
    return found


def go(objective, model, batch, count=1):
    """What the loop does, with weights that stay."""
    for _ in range(count):
        model.zero_grad()
        objective.losses(model, batch)["loss"].backward()
        objective.after_step(batch)


def fresh(digits, seed=0):
    torch.manual_seed(seed)
    return gb.models.create("lenet5", digits)


FORMS = [
    UniversalAdversarial(eps=0.1),
    UniversalAdversarial(eps=0.1, update="one-pass"),
    UniversalAdversarial(eps=0.1, update="one-pass", classwise=True),
    UniversalConsistency(eps=0.1, bank=3, restart=7),
]
NAMES = ["alternating", "one-pass", "classwise", "consistency"]


@pytest.mark.parametrize("start", ["zero", "uniform", "sign"])
@pytest.mark.parametrize("update", ["alternating", "one-pass"])
@pytest.mark.parametrize("label", [0, 1])
def test_two_steps_of_eps_reach_the_best_vertex_of_a_linear_net(start, update, label):
    model, w = binary(SHAPE)
    batch = batch_of([label] * 6)
    objective = opened(UniversalAdversarial(eps=0.1, update=update, start=start), model, batch, seed=label)
    go(objective, model, batch, 2)
    vertex = 0.1 * w.sign() * (1 - 2 * label)
    torch.testing.assert_close(the_bank(objective).delta, vertex[None])


@pytest.mark.parametrize("update", ["alternating", "one-pass"])
def test_classwise_on_a_linear_net_is_per_image_training(update):
    model, w = binary(SHAPE)
    batch = batch_of([0, 1, 1, 0, 1])
    objective = opened(UniversalAdversarial(eps=0.1, update=update, classwise=True), model, batch)
    go(objective, model, batch, 1)
    torch.testing.assert_close(the_bank(objective).delta, torch.stack([0.1 * w.sign(), -0.1 * w.sign()]))
    loss = objective.losses(model, batch)["loss"]
    worst = batch.images + 0.1 * w.sign() * (1 - 2 * batch.labels).view(-1, 1, 1, 1)
    torch.testing.assert_close(loss, F.cross_entropy(model(worst), batch.labels))


def test_a_class_that_is_not_in_the_batch_keeps_its_perturbation():
    model = LinearNet(torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0)))
    batch = batch_of([0, 2, 2, 0])
    objective = opened(UniversalAdversarial(eps=0.1, classwise=True, start="sign", update="one-pass"), model, batch)
    before = the_bank(objective).delta
    go(objective, model, batch, 3)
    moved = (the_bank(objective).delta != before).flatten(1).any(1)
    assert moved.tolist() == [True, False, True]


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_every_member_of_a_pool_climbs_to_its_own_end_of_a_linear_net(direction):
    # The divergence depends on w . delta alone and rises away from zero on both sides, for every image.
    model, w = binary(SHAPE)
    batch = batch_of([0, 1] * 8)
    defense = UniversalConsistency(eps=0.1, bank=8, direction=direction)
    objective = opened(defense, model, batch)
    start = the_bank(objective).delta
    side = (start * w).sum((1, 2, 3)).sign()
    assert set(side.tolist()) == {-1.0, 1.0}
    go(objective, model, batch, 8)
    torch.testing.assert_close(the_bank(objective).delta, 0.1 * side.view(-1, 1, 1, 1) * w.sign())


def test_a_step_is_the_papers_formula_and_a_pool_of_one_is_one_pass_up_to_the_loss(trained, digits):
    model = copy.deepcopy(trained).eval()
    images, labels = digits.train.take(slice(0, 32))
    batch = Batch(images=images, labels=labels, seed=0, **MID)
    clean = model(images)

    def adversarial(logits):
        return F.cross_entropy(logits, labels)

    def consistent(logits):
        return F.kl_div(logits.log_softmax(1), clean.detach().log_softmax(1), log_target=True, reduction="batchmean")

    ball = Ball(eps=0.1)
    for defense, loss in (
        (UniversalAdversarial(eps=0.1, update="one-pass", start="uniform", rel_step_size=0.25), adversarial),
        (UniversalAdversarial(eps=0.1, update="alternating", start="uniform", rel_step_size=0.25), adversarial),
        (UniversalConsistency(eps=0.1, bank=1), consistent),
    ):
        objective = opened(defense, model, batch)
        delta = the_bank(objective).delta.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(model(perturb(images, delta))), delta)
        go(objective, model, batch)
        by_hand = ball.project(delta.detach() + 0.25 * 0.1 * gradient.sign())
        assert torch.equal(the_bank(objective).delta, by_hand)
        assert not torch.equal(by_hand, delta)


def test_the_objective_is_the_sum_that_its_docstring_says(trained, digits):
    model = copy.deepcopy(trained).eval()
    images, labels = digits.train.take(slice(0, 30))
    batch = Batch(images=images, labels=labels, seed=0, step=1, steps=4, epochs=1)  # half way up the warm-up
    objective = opened(UniversalConsistency(eps=0.2, bank=3, beta=4), model, batch)
    found = objective.losses(model, batch)
    delta = the_bank(objective).delta.repeat(10, 1, 1, 1)
    clean, moved = model(images).log_softmax(1), model((images + delta).clamp(0, 1)).log_softmax(1)
    apart = (clean.exp() * (clean - moved)).sum(1).mean()
    assert float(apart.detach()) > 1e-3
    torch.testing.assert_close(found["consistency"], apart.detach())
    torch.testing.assert_close(found["loss"], F.nll_loss(clean, labels) + 2 * apart)
    torch.testing.assert_close(divergence(clean, moved, "reverse"), divergence(moved, clean))
    assert set(found) == {"loss", "clean", "consistency"}


def test_rows_see_their_own_member_and_inform_no_other():
    model, _ = binary(SHAPE)
    batch = batch_of([0, 1, 1, 0, 1, 0])
    seen = []

    def spy(x):
        seen.append(x.detach())
        return model(x)

    objective = opened(UniversalConsistency(eps=0.2, bank=3), model, batch)
    delta = the_bank(objective).delta
    objective.losses(spy, batch)
    assert len(seen) == 1  # one forward
    assert torch.equal(seen[0][:6], batch.images)
    assert torch.equal(seen[0][6:], perturb(batch.images, delta.repeat(2, 1, 1, 1)))
    other = dataclasses.replace(batch, images=batch.images.clone())
    other.images[1::3] = 1 - other.images[1::3]
    outcomes = []
    for one in (batch, other):
        objective = opened(UniversalConsistency(eps=0.2, bank=3, norm="2"), model, batch)
        go(objective, model, one)
        outcomes.append(the_bank(objective).delta)
    same = [torch.equal(outcomes[0][k], outcomes[1][k]) for k in range(3)]
    assert same == [True, False, True]


@pytest.mark.parametrize("defense", [FORMS[0], FORMS[1], FORMS[3]], ids=["alternating", "one-pass", "consistency"])
def test_a_step_costs_what_the_docstring_says(digits, defense):
    model, images = fresh(digits), []
    model.register_forward_pre_hook(lambda _, inputs: images.append(len(inputs[0])))
    x, y = digits.train.take(slice(0, 30))
    batch = Batch(images=x, labels=y, seed=0, **MID)
    go(opened(defense, model, batch), model, batch)
    assert images == {"alternating": [30, 30], "one-pass": [30]}.get(getattr(defense, "update", ""), [60])


@pytest.mark.parametrize("norm", ["inf", "2"])
def test_the_weight_of_the_term_does_not_change_the_bank_s_step(trained, digits, norm):
    model = copy.deepcopy(trained).eval()
    x, y = digits.train.take(slice(0, 32))
    batch = Batch(images=x, labels=y, seed=0, **MID)
    found = []
    for beta in (1.0, 64.0):
        objective = opened(UniversalConsistency(eps=0.3, norm=norm, beta=beta), model, batch)
        go(objective, model, batch, 3)
        found.append(the_bank(objective).delta)
    torch.testing.assert_close(found[0], found[1])
    assert Ball(eps=0.3, norm=norm).length(found[0]).min() > 0.15


def test_truncated_rows_move_the_weights_and_not_the_perturbation():
    # Far on the wrong side: 6 images of class 0, which would win; 4 of class 1 are still right.
    model, w = binary(SHAPE)
    batch = batch_of([0] * 6 + [1] * 4)
    bias = torch.tensor([-20.0, 20.0])
    for update in ("one-pass", "alternating"):
        outcomes, weights = [], []
        for truncate in (None, 9.0):
            net = LinearNet(model.weight.detach().clone(), bias.clone())
            net.bias.data[:] = bias
            objective = opened(UniversalAdversarial(eps=0.1, update=update, truncate=truncate), net, batch)
            go(objective, net, batch)
            outcomes.append(the_bank(objective).delta)
            weights.append(net.weight.grad)
        torch.testing.assert_close(outcomes[0], 0.1 * w.sign()[None])
        torch.testing.assert_close(outcomes[1], -0.1 * w.sign()[None])
        assert torch.equal(weights[0], weights[1])
        assert bool(weights[0].any())


def test_truncated_rows_of_the_consistency_move_the_weights_only(trained, digits):
    model = copy.deepcopy(trained).eval()
    x, y = digits.train.take(slice(0, 32))
    batch = Batch(images=x, labels=y, seed=0, **MID)
    outcomes = []
    for truncate in (None, 0.0, 1e6):
        objective = opened(UniversalConsistency(eps=0.3, truncate=truncate), model, batch)
        start = the_bank(objective).delta
        go(objective, model, batch)
        outcomes.append((the_bank(objective).delta, next(model.parameters()).grad.clone()))
    assert torch.equal(outcomes[1][0], start)
    assert not torch.equal(outcomes[0][0], start)
    assert torch.equal(outcomes[0][0], outcomes[2][0])
    assert all(torch.equal(outcomes[0][1], gradient) for _, gradient in outcomes)


def test_the_alternating_step_sees_the_new_weights_and_leaves_the_model_alone(digits):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10))
    x, y = digits.train.take(slice(0, 32))
    batch = Batch(images=x, labels=y, seed=0, **MID)
    objective = opened(UniversalAdversarial(eps=0.1, truncate=None), model, batch)
    objective.losses(model, batch)["loss"].backward()
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(10, 64, generator=torch.Generator().manual_seed(0)))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    gradient = model[1].weight.grad.clone()
    objective.after_step(batch)
    assert model.training
    assert torch.equal(model[1].weight.grad, gradient)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    point = torch.zeros(1, *x.shape[1:], requires_grad=True)
    F.cross_entropy(copy.deepcopy(model).eval()(perturb(x, point)), y).backward()
    assert torch.equal(the_bank(objective).delta, Ball(eps=0.1).project(0.1 * point.grad.sign()))


@given(
    eps=st.sampled_from([0.0, 0.05, 8 / 255, 0.3]),
    norm=st.sampled_from(["inf", "2", "1"]),
    size=st.sampled_from([0.1, 1.0, 3.0]),
    ascend=st.sampled_from(["steepest", "normalised"]),
    start=st.sampled_from(["zero", "uniform", "sign"]),
    seed=st.integers(0, 9),
)
def test_the_bank_stays_in_its_ball(eps, norm, size, ascend, start, seed):
    model, _ = binary(SHAPE, seed)
    batch = batch_of([0, 1, 1], seed)
    ball = Ball(eps=eps, norm=norm)
    common = {"eps": eps, "norm": norm, "rel_step_size": size, "start": start}
    adversarial = UniversalAdversarial(**common, ascend=ascend, update="one-pass", box_gradient="straight-through")
    for defense in (adversarial, UniversalConsistency(**common, bank=2, restart=2)):
        objective = opened(defense, model, batch, seed)
        for _ in range(3):
            length = ball.length(the_bank(objective).delta)
            assert bool((length <= eps * (1 + (norm != "inf") * 1e-5)).all())
            go(objective, model, batch)


def test_a_normalised_step_is_along_the_gradient_and_as_long():
    model, w = binary(SHAPE)
    batch = batch_of([0] * 4)
    objective = opened(
        UniversalAdversarial(eps=0.1, rel_step_size=0.5, ascend="normalised", update="one-pass", truncate=None),
        model,
        batch,
    )
    go(objective, model, batch)
    torch.testing.assert_close(the_bank(objective).delta, (0.05 * w / w.abs().max())[None])


@pytest.mark.parametrize("assignment", ["even", "random", "strong"])
def test_several_processes_assign_what_one_would(assignment):
    model, _ = binary(SHAPE)
    whole = batch_of([0, 1] * 12)
    objective = opened(UniversalConsistency(eps=0.1, bank=5, assignment=assignment), model, whole)
    term = objective.carried["consistency"]
    term.bank.strength = torch.tensor([1.0, 2.0, 0.0, 0.1, 5.0])
    parts = [
        dataclasses.replace(whole, images=whole.images[half], labels=whole.labels[half], place=(number, 2))
        for number, half in enumerate((slice(0, 12), slice(12, 24)))
    ]
    rows = term.rows(whole)
    assert torch.equal(torch.cat([term.rows(part) for part in parts]), rows)
    assert rows.unique().numel() > 1
    if assignment == "even":
        assert rows.bincount().tolist() == [5, 5, 5, 5, 4]


@pytest.mark.parametrize("defense", FORMS, ids=NAMES)
def test_the_step_is_averaged_over_the_processes(trained, digits, monkeypatch, defense):
    model = copy.deepcopy(trained).eval()
    x, y = digits.train.take(slice(0, 48))
    whole = Batch(images=x, labels=y, seed=0, **MID)
    if isinstance(defense, UniversalConsistency):
        defense = defense.model_copy(update={"restart": 0})

    def run(batch):
        handed = []
        monkeypatch.setattr(
            universal_consistency, "average", lambda tensors: handed.append([tensor.clone() for tensor in tensors])
        )
        objective = opened(defense, model, whole)
        go(objective, model, batch)
        return handed

    parts = [
        run(dataclasses.replace(whole, images=x[half], labels=y[half], place=(number, 2)))
        for number, half in enumerate((slice(0, 24), slice(24, 48)))
    ]
    joined = run(whole)
    assert len(joined) == len(parts[0]) == 1 + isinstance(defense, UniversalConsistency)
    for one, first, second in zip(joined, *parts, strict=True):
        for tensor, left, right in zip(one, first, second, strict=True):
            mean = (left + right) / 2
            # Up to the scale of a sum, which a step does not depend on.
            factor = float(tensor.norm() / mean.norm())
            assert min(abs(factor - 1), abs(factor - 2)) < 1e-3
            torch.testing.assert_close(tensor, factor * mean, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "defense",
    [
        UniversalAdversarial(eps=0.2, sigma=0),
        UniversalConsistency(eps=0.2, beta=0),
    ],
    ids=["adversarial", "consistency"],
)
def test_weight_zero_is_standard_training_bit_for_bit(digits, defense):
    weights = []
    on = {"sigma": 0.5} if isinstance(defense, UniversalAdversarial) else {"beta": 1.0}
    for one in (Standard(), defense, defense.model_copy(update=on)):
        model = fresh(digits, 3)
        gb.train(model, digits, one, epochs=1, batch_size=64, seed=3)
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not all(torch.equal(weights[0][key], weights[2][key]) for key in weights[0])


@pytest.mark.parametrize("defense", FORMS, ids=NAMES)
def test_a_cut_run_goes_on_bit_for_bit(digits, tmp_path, defense, stand_in):
    steps = len(digits.train) // 128

    class Cut(type(defense)):
        def build_objective(self, context):
            objective, seen = super().build_objective(context), 0
            perturbed = the_bank(objective).perturb

            def stopping(images, rows):
                nonlocal seen
                seen += 1
                if seen > steps + 3:
                    raise KeyboardInterrupt
                return perturbed(images, rows)

            the_bank(objective).perturb = stopping
            return objective

    kwargs = {"epochs": 3, "batch_size": 128, "seed": 5}
    whole = fresh(digits)
    history = gb.train(whole, digits, defense, out=tmp_path / "whole", **kwargs)
    with pytest.raises(KeyboardInterrupt):
        gb.train(fresh(digits), digits, Cut(**defense.plain()), out=tmp_path / "cut", **kwargs)
    torch.rand(100)
    resumed = fresh(digits)
    assert gb.train(resumed, digits, defense, out=tmp_path / "cut", **kwargs) == history
    (one, _), (other, _) = (load_tensors(tmp_path / name / "state" / "latest.safetensors") for name in ("whole", "cut"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    (kept,) = [value for key, value in one.items() if "objective" in key and key.endswith("bank.delta")]
    assert float(kept.abs().max()) == pytest.approx(0.1)


def test_strength_is_a_moving_mean_of_what_each_member_gave():
    model, _ = binary(SHAPE)
    keeper = the_bank(opened(UniversalConsistency(eps=0.1, bank=3), model, batch_of([0, 1])))
    keeper.note(torch.tensor([0, 0, 2]), torch.tensor([1.0, 3.0, 5.0]))
    assert keeper.strength.tolist() == [2.0, 0.0, 5.0]
    keeper.note(torch.tensor([0, 1]), torch.tensor([4.0, 7.0]))
    assert keeper.strength.tolist() == pytest.approx([0.9 * 2 + 0.1 * 4, 7.0, 5.0])


def test_the_weakest_member_is_drawn_anew_and_only_that(trained, digits):
    model = copy.deepcopy(trained).eval()
    x, y = digits.train.take(slice(0, 40))
    objective = opened(
        UniversalConsistency(eps=0.3, bank=4, restart=2), model, Batch(images=x, labels=y, seed=0, **MID)
    )
    keeper, changes = the_bank(objective), []
    keeper.replace_weakest = lambda seed, own=keeper.replace_weakest: changes.append((keeper.delta, own(seed)))
    for step in range(3, 6):
        go(objective, model, Batch(images=x, labels=y, seed=step, step=step, steps=10, epochs=1))
    assert len(changes) == 2  # after the steps 3 and 5, the fourth and the sixth
    keeper.strength = torch.tensor([0.3, 0.1, 0.2, 0.4])
    before = keeper.delta
    universal_consistency.UAPBank.replace_weakest(keeper, 9)
    assert (keeper.delta != before).flatten(1).any(1).tolist() == [False, True, False, False]
    assert keeper.strength.tolist() == pytest.approx([0.3, 0, 0.2, 0.4])


def test_label_maps_train_and_ignored_pixels_have_no_say():
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(24, 1, 6, 6, generator=draw)
    y = (x[:, 0] > 0.5).long()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    found = []
    for filler in (0, 1):
        split = gb.data.Split("maps", x, y, ("a", "b"))
        images = x.clone()
        images[:, :, 0] = filler
        labels = y.clone()
        labels[:, 0] = 255
        batch = Batch(images=images, labels=labels, seed=0, task=Segmentation(ignore_index=255), **MID)
        context = TrainContext(model=model, train=split, seed=0, epochs=1, steps=4, batch_size=24)
        for defense in (UniversalConsistency(eps=0.1, bank=2), UniversalAdversarial(eps=0.1, update="one-pass")):
            found.append(float(defense.build_objective(context).losses(model, batch)["loss"].detach()))
            assert found[-1] > 0
    assert found[:2] == pytest.approx(found[2:])
    with pytest.raises(UserError, match="label maps .*: class-wise training expects one label per image"):
        UniversalAdversarial(eps=0.1, classwise=True).build_objective(context)
    history = gb.train(model, (x.repeat(3, 1, 1, 1), y.repeat(3, 1, 1)), FORMS[3], epochs=2, batch_size=12)
    assert history[-1]["loss"] < history[0]["loss"] + 1


@pytest.mark.parametrize(
    "settings",
    [{"beta": -1}, {"bank": 0}, {"warmup": 1.5}, {"rel_step_size": 0}, {"restart": -1}, {"direction": "both"}],
)
def test_values_out_of_range_are_refused(settings):
    (field,) = settings
    with pytest.raises(UserError, match=f"UniversalConsistency.{field} = "):
        UniversalConsistency(eps=0.1, **settings)


def test_consistency_lowers_what_a_universal_perturbation_adds(trained, digits):
    model = fresh(digits)
    gb.train(model, digits, UniversalConsistency(eps=0.3), epochs=12, lr=0.05, batch_size=32, seed=0)
    attack = gb.attacks.StochasticPGD(eps=0.3, steps=60, batch_size=64, restarts=2)
    before, after = (
        gb.evaluation.universal_evasion(net, digits, attack.craft(net, digits)) for net in (trained, model)
    )
    assert gb.evaluation.accuracy(model, digits).value > 0.9
    assert before.low > 0.7
    assert after.high < before.low  # its logits are faint: at the temperature that they are trained at, by far more


class Centred(LinearNet):
    def forward(self, x):
        return super().forward(x - 0.5)


def strong_and_weak():
    """One pixel that tells the classes apart by 0.6, and 63 that do by 0.16 each: less than a perturbation of 0.12."""
    draw = torch.Generator().manual_seed(0)
    y = torch.randint(0, 2, (600,), generator=draw)
    size = torch.full((1, 8, 8), 0.08)
    size[0, 0, 0] = 0.3
    x = 0.5 + (2 * y - 1).view(-1, 1, 1, 1) * size + 0.02 * torch.randn(600, 1, 8, 8, generator=draw)
    return x, y


def test_a_linear_net_learns_to_leave_the_weak_pixels_alone():
    """The best universal perturbation of a linear net is one of two vertices: its error is exact."""
    x, y = strong_and_weak()
    errors = {}
    for name, defense in {
        "standard": Standard(),
        "alternating": UniversalAdversarial(eps=0.12),
        "one-pass": UniversalAdversarial(eps=0.12, update="one-pass"),
        "classwise": UniversalAdversarial(eps=0.12, classwise=True),
        "consistency": UniversalConsistency(eps=0.12),
    }.items():
        model = Centred(torch.zeros(2, 1, 8, 8))
        gb.train(model, (x, y), defense, epochs=12, lr=0.1, batch_size=30, seed=0)
        ends = 0.12 * (model.weight[1] - model.weight[0]).detach().sign()
        with torch.no_grad():
            assert float((model(x).argmax(1) == y).float().mean()) > 0.99, name
            errors[name] = max(float((model(x + end).argmax(1) != y).float().mean()) for end in (ends, -ends))
    assert errors["standard"] > 0.45, errors
    assert max(value for name, value in errors.items() if name != "standard") < 0.2, errors

"""Learn2Perturb and its baselines against their formulas, step by step, and trained on the digits."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gambeson as gb
from gambeson import UserError
from gambeson.base import load_tensors, seeded
from gambeson.defenses import Batch, Standard, TrainContext
from gambeson.defenses.learn2perturb import Learn2Perturb, NoiseReward, feature_noise, harmonic
from gambeson.defenses.noise_injection import PNI, RSE, NoisyAdversarial, NoisyClean
from gambeson.defenses.objective import Adversarial
from gambeson.models import injections
from gambeson.models.factory import add_noise
from gambeson.models.noise import FeatureNoise, NoiseInjection, noise_off
from gambeson.models.noisy_weights import FixedNoise, ParametricNoise
from gambeson.tasks import Segmentation
from tests.conftest import binary, full, inner_images


def fresh(digits, name="lenet5", seed=0):
    torch.manual_seed(seed)
    return gb.models.create(name, digits)


def batch_of(digits, epoch=0, epochs=10, count=32):
    images, labels = digits.train.take(slice(0, count))
    return Batch(images=images, labels=labels, seed=1, step=epoch, steps=1, epochs=epochs)


def opened(defense, model, digits, epochs=10):
    defense.configure_model(model)
    return defense.build_objective(
        TrainContext(model=model, train=digits.train, seed=0, epochs=epochs, steps=1, batch_size=32)
    )


def moved_by(model, objective, defense, batch):
    """Take a batch's steps as the loop does; return, for each phase, who moved and the losses."""
    special = defense.groups(model)
    taken = {parameter for group in special for parameter in group["params"]}
    rest = [parameter for parameter in model.parameters() if parameter not in taken]
    optimizer = torch.optim.SGD([{"params": rest}, *special], lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True)
    found = []
    for _ in range(2):  # the second time with momentum
        for losses, moving in objective.optimizer_steps(model, batch):
            before = {name: value.detach().clone() for name, value in model.named_parameters()}
            optimizer.zero_grad(set_to_none=True)
            losses["loss"].backward()
            if moving is not None:
                for parameter in model.parameters():
                    if parameter not in moving:
                        parameter.grad = None
            optimizer.step()
            found.append(
                ({name for name, value in model.named_parameters() if not torch.equal(value, before[name])}, losses)
            )
        objective.after_step(batch)
        batch = replace(batch)
    return found


def names_of(model):
    thetas = {name for name, _ in model.named_parameters() if name.endswith("theta")}
    return thetas, {name for name, _ in model.named_parameters()} - thetas


def test_tau_is_harmonic_and_never_zero():
    assert [harmonic(k) for k in range(1, 6)] == pytest.approx([1, 1.5, 1.8333333, 2.0833333, 2.2833333])
    assert harmonic(0) == 1


@pytest.mark.parametrize(("epoch", "tau"), [(3, 1), (4, 1), (5, 1.5), (8, 137 / 60)])
def test_the_regulariser_and_its_gradient_are_the_formula(digits, epoch, tau):
    model = fresh(digits)
    add_noise(model, FeatureNoise())
    thetas = [module.theta for module in injections(model)]
    with torch.no_grad():
        for theta in thetas:
            theta.copy_(torch.rand(theta.shape) + 0.05)
    value = NoiseReward(lambda epochs: 3)(model, batch_of(digits, epoch))
    assert float(value.detach()) == pytest.approx(-sum(float(t.detach().sqrt().sum()) for t in thetas) / tau, rel=1e-5)
    value.backward()
    for theta in thetas:
        torch.testing.assert_close(theta.grad, -1 / (2 * tau * theta.detach().sqrt()))


def test_the_push_on_theta_is_the_closed_form(digits):
    defense, batch = Learn2Perturb(eps=0.1, noise_from=0), batch_of(digits)
    noise = nn.Sequential(NoiseInjection((5,), FeatureNoise()))
    optimizer = torch.optim.SGD(noise.parameters(), lr=0.1, momentum=0.9)
    weight, reward = defense.terms()["noise"]
    steps = 391
    for _ in range(steps):
        optimizer.zero_grad()
        (weight(batch) * reward(noise, batch)).backward()
        optimizer.step()
    delay = 0.9 / (1 - 0.9)  # steps until the momentum has gathered its speed, which the continuous limit has at once
    expected = (0.25**1.5 + 0.75 * 10 * 0.1 * 1e-4 * (steps - delay)) ** (2 / 3)
    assert expected - 0.25 == pytest.approx(0.038, abs=0.002)  # about 0.039 an epoch, without the delay
    torch.testing.assert_close(noise[0].theta.detach() - 0.25, torch.full((5,), expected - 0.25), rtol=2e-3, atol=0)


@pytest.mark.parametrize(("gamma", "expected"), [(0.1, (0.1 / 4) ** (2 / 3)), (1e-4, 0.01), (0.0, 0.01)])
def test_the_fixed_point_under_a_quadratic_loss(digits, gamma, expected):
    noise, batch = nn.Sequential(NoiseInjection((3,), FeatureNoise())), batch_of(digits)
    reward = NoiseReward(lambda epochs: 0)
    optimizer = torch.optim.SGD(noise.parameters(), lr=0.02)
    for _ in range(600):
        optimizer.zero_grad()
        (noise[0].theta.square().sum() + gamma * reward(noise, batch)).backward()
        optimizer.step()
        noise[0].hold()
    torch.testing.assert_close(noise[0].theta.detach(), torch.full((3,), expected), rtol=1e-3, atol=0)


def test_alternation_moves_one_group_at_a_time_bit_for_bit(digits):
    model = fresh(digits, "resnet20x0.25").train()
    defense = Learn2Perturb(eps=0.1, steps=2, gamma=1e-2)
    found = moved_by(model, opened(defense, model, digits), defense, batch_of(digits))
    thetas, weights = names_of(model)
    assert len(thetas) == 10
    assert [moved for moved, _ in found] == [weights, thetas] * 2
    assert [set(losses) for _, losses in found[:2]] == [{"loss", "clean", "adversarial"}, {"loss", "noise"}]
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())


def test_the_joint_update_is_the_released_code_s(digits):
    model = fresh(digits).train()
    defense = Learn2Perturb(eps=0.1, steps=2, update="joint")
    objective = opened(defense, model, digits)
    found = moved_by(model, objective, defense, batch_of(digits))
    thetas, weights = names_of(model)
    assert [moved for moved, _ in found] == [thetas, thetas | weights] * 2
    assert set(found[0][1]) == {"loss", "noise"}
    assert set(found[1][1]) == {"loss", "clean", "adversarial"}
    neurons = sum(module.theta.numel() for module in injections(model))
    assert float(found[0][1]["loss"].detach()) == pytest.approx(-1e-4 * 0.5 * neurons)
    first, second = (float(found[1][1][name]) for name in ("clean", "adversarial"))
    assert float(found[1][1]["loss"].detach()) == pytest.approx((first + second) / 2)


def test_theta_never_leaves_its_floor(digits):
    for update in ("alternating", "joint"):
        model = fresh(digits).train()
        defense = Learn2Perturb(eps=0.1, mix=0, gamma=0, init=0.011, update=update)
        objective = opened(defense, model, digits)
        for parameter in model.parameters():
            parameter.grad = None
        for _ in range(3):
            for losses, _ in objective.optimizer_steps(model, batch_of(digits)):
                losses["loss"].backward()
                with torch.no_grad():
                    for module in injections(model):
                        module.theta.sub_(0.1)
            for module in injections(model):
                assert torch.equal(module.theta.detach(), torch.full_like(module.theta, 0.01))


def test_noise_and_attack_begin_with_their_epochs(digits):
    model = fresh(digits).train()
    defense = Learn2Perturb(eps=0.1, noise_from=2, adversarial_from=4, update="joint", steps=1)
    objective = opened(defense, model, digits)
    for epoch, names in ((1, [{"clean"}]), (2, [{"noise"}, {"clean"}]), (4, [{"noise"}, {"clean", "adversarial"}])):
        batch = batch_of(digits, epoch)
        found = list(objective.optimizer_steps(model, batch))
        assert [set(losses) - {"loss"} for losses, _ in found] == names
        assert all(module.enabled == (epoch >= 2) for module in injections(model))
        if epoch == 1:
            (losses, moving), plain = found[0], F.cross_entropy(model(batch.images), batch.labels)
            assert torch.equal(losses["loss"], plain)
            assert not moving & {module.theta for module in injections(model)}
    whole = Learn2Perturb(eps=0.1)
    assert [whole.noise_start(epochs) for epochs in (350, 70, 10)] == [10, 2, 0]
    assert [whole.adversarial_start(epochs) for epochs in (350, 70, 10)] == [20, 4, 0]
    assert [PNI(eps=0.1).adversarial_start(epochs) for epochs in (160, 10)] == [5, 0]


def test_crafting_is_in_evaluation_mode_with_the_noise_on_and_once_a_batch(digits):
    found = []
    for update, passes, steps in (("joint", 2, 3), ("alternating", 4, 3), ("joint", 2, 5)):
        model = fresh(digits, "resnet20x0.25").train()
        objective = opened(Learn2Perturb(eps=0.1, steps=steps, update=update), model, digits)
        seen = []
        noise = injections(model)[0]
        noise.register_forward_hook(lambda module, *_, seen=seen: seen.append((module.training, module.enabled)))
        for losses, _ in objective.optimizer_steps(model, batch_of(digits)):
            losses["loss"].backward()
        assert all(enabled for _, enabled in seen)
        found.append([training for training, _ in seen].count(False))
        assert [training for training, _ in seen].count(True) == passes
    first, again, longer = found  # besides the steps, a fast victim is compared with the model a few times
    assert first == again == longer - 2


def test_the_attack_leaves_the_model_s_own_answer():
    model, w = binary((1, 4, 4))
    x = inner_images(8, (1, 4, 4))
    own = model(x).argmax(1)
    batch = Batch(images=x, labels=1 - own, seed=0)  # every answer is wrong: the two labels lead opposite ways
    attack, clean = Adversarial(eps=0.1, steps=4, rel_step_size=0.5), NoisyClean()
    for label, from_ in (("prediction", own), ("truth", batch.labels)):
        term = NoisyAdversarial(attack, clean, label)
        value = term(model, batch)
        delta = 0.1 * w.sign() * (1 - 2 * from_).view(-1, 1, 1, 1)
        torch.testing.assert_close(value, F.cross_entropy(model(x + delta), batch.labels))
    remembered = Batch(images=x, labels=own, seed=0)
    torch.testing.assert_close(clean(model, remembered), F.cross_entropy(model(x), own))
    assert torch.equal(clean.predictions(model, remembered), own)


def test_weight_zero_changes_nothing_bit_for_bit(digits):
    weights = []
    for defense in (
        Standard(),
        Learn2Perturb(eps=0.1, mix=0, gamma=0, update="joint"),
        Learn2Perturb(eps=0.1, mix=0, gamma=1e-2, update="joint"),
    ):
        model = fresh(digits)
        add_noise(model, FeatureNoise())
        gb.train(model, digits, defense, epochs=1, batch_size=64, weight_decay=0)
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not torch.equal(weights[0]["body.pool1.1.theta"], weights[2]["body.pool1.1.theta"])


def test_only_the_sizes_of_the_noise_go_without_weight_decay(digits):
    for defense, count in ((Learn2Perturb(eps=0.1), 2), (PNI(eps=0.1, where="weight+input"), 10)):
        model = fresh(digits)
        assert defense.groups(model) == []
        defense.configure_model(model)
        (group,) = defense.groups(model)
        assert group["weight_decay"] == 0
        assert len(group["params"]) == count
    assert RSE().groups(fresh(digits)) == []


@pytest.mark.parametrize("update", ["alternating", "joint"])
def test_a_cut_run_resumes_bit_for_bit(digits, tmp_path, update, stand_in):
    settings = {"eps": 0.1, "steps": 1, "noise_from": 1, "adversarial_from": 2, "update": update, "gamma": 1e-3}
    kwargs = {"epochs": 3, "batch_size": 256, "seed": 5}
    steps = len(digits.train) // 256

    class Cut(Learn2Perturb):
        def terms(self):
            terms, seen = super().terms(), [0]
            weight, clean = terms["clean"]

            def stopping(model, batch):
                seen[0] += 1
                if batch.step == 2 * steps + 1:
                    raise KeyboardInterrupt
                return clean(model, batch)

            return {**terms, "clean": (weight, stopping)}

    def run(defense, out):
        model = fresh(digits)
        gb.train(model, digits, defense, out=out, **kwargs)
        return model

    whole = run(Learn2Perturb(**settings), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(Cut(**settings), tmp_path / "cut")
    torch.rand(100)
    resumed = run(Learn2Perturb(**settings), tmp_path / "cut")
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    assert all(module.enabled for module in injections(resumed))
    (one, _), (other, _) = (load_tensors(tmp_path / name / "state" / "latest.safetensors") for name in ("whole", "cut"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    back = gb.models.load(tmp_path / "cut")
    assert back.card.noise == FeatureNoise()
    assert torch.equal(back.body.pool1[1].theta, whole.body.pool1[1].theta)


def test_cross_entropy_alone_lets_the_noise_fall_and_the_regulariser_holds_it_up(digits):
    means = {}
    for gamma in (0.0, 0.02):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        defense = Learn2Perturb(eps=0.1, mix=0, gamma=gamma, places=("1",), update="joint")
        gb.train(model, digits, defense, epochs=120, batch_size=512, lr=0.2, weight_decay=0)
        theta = torch.cat([module.theta.detach() for module in feature_noise(model)])
        means[gamma] = float(theta.mean())
        assert bool((theta >= torch.tensor(0.01)).all())
    assert 0.01 <= means[0.0] < 0.015  # a single step's noise lifts some a little
    assert means[0.02] > 0.2


def right(model, digits):
    images, labels = digits.test.take(slice(None))
    with torch.no_grad(), seeded(0, "score"):
        return float((model.eval()(images).argmax(1) == labels).float().mean())


@pytest.mark.parametrize(
    ("defense", "noise"),
    [
        (Learn2Perturb(eps=0.05, steps=1, rel_step_size=1), FeatureNoise()),
        full(Learn2Perturb(eps=0.05, steps=1, rel_step_size=1, update="joint"), FeatureNoise()),
        full(PNI(eps=0.05, steps=1, rel_step_size=1), ParametricNoise()),
        (RSE(), FixedNoise()),
    ],
)
def test_learns_the_digits_with_its_noise_on(digits, tmp_path, defense, noise):
    model = fresh(digits)
    untrained = right(model, digits)
    gb.train(model, digits, defense, epochs=8, lr=0.1, batch_size=64, weight_decay=3e-4, out=tmp_path)
    assert untrained < 0.3
    assert right(model, digits) > 0.7
    assert model.card.noise == noise
    assert all(module.enabled for module in injections(model))
    sizes = [size for module in injections(model) for size in module.learnt]
    assert all(not torch.all(size == 0.25) for size in sizes)
    images, _ = digits.test.take(slice(0, 50))
    assert not torch.equal(model(images), model(images))
    with noise_off(model):
        assert torch.equal(model(images), model(images))
    assert right(gb.models.load(tmp_path), digits) == right(model, digits)


def test_mistakes_are_named(digits):
    with pytest.raises(UserError, match="noise_from = 10 lies beyond the 10 epochs of this training"):
        gb.train(fresh(digits), digits, Learn2Perturb(eps=0.1, noise_from=10), epochs=10)
    with pytest.raises(UserError, match="adversarial_from = 3 lies beyond the 2 epochs"):
        gb.train(fresh(digits), digits, PNI(eps=0.1, adversarial_from=3), epochs=2)
    model = fresh(digits)
    add_noise(model, FixedNoise())
    with pytest.raises(UserError, match="carries FixedNoise.* already"):
        gb.train(model, digits, Learn2Perturb(eps=0.1))
    with pytest.raises(UserError, match=r"update.*'em'"):
        Learn2Perturb(eps=0.1, update="em")


def test_predictions_that_an_attack_leaves_keep_the_ignored_pixels():
    torch.manual_seed(0)
    model = torch.nn.Conv2d(1, 3, 1)
    x = torch.rand(4, 1, 4, 4) * 0.8 + 0.1
    labels = torch.zeros(4, 4, 4, dtype=torch.long)
    labels[:, :2] = 255
    attack = Adversarial(eps=0.05, steps=1, start="zero")
    term = NoisyAdversarial(attack, NoisyClean(), "prediction")
    term(model, Batch(images=x, labels=labels, seed=0, task=Segmentation(ignore_index=255)))
    assert not term._delta[:, :, :2].any()
    assert bool((term._delta[:, :, 2:] != 0).all())

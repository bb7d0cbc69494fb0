"""Ensemble Adversarial Training: who crafts, with which label, and what becomes of the sources."""

import copy
import math

import pytest
import torch
from torch import nn

import gambeson as gb
from gambeson import UserError
from gambeson.attacks import FGSM, RFGSM
from gambeson.attacks.gradient.pgd import RStepLL
from gambeson.base import generator
from gambeson.data import Dataset, Split
from gambeson.defenses import Batch
from gambeson.defenses.ensemble_adversarial import EnsembleAdversarial, Transferred
from gambeson.tasks import Segmentation
from gambeson.threat import Ball
from gambeson.training import Recipe, TrainRun, run_training
from gambeson.training.loop import Run
from tests.conftest import LinearNet, binary, inner_images, shaded_images

W = torch.tensor([[1.0, -2.0, 3.0, 0.5], [-1.0, 0.5, 0.2, -0.4], [0.3, 1.0, -2.0, 0.1]])


def batch_of(n=6, seed=0, **more):
    return Batch(images=inner_images(n, (1, 2, 2)), labels=torch.arange(n) % 3, seed=seed, **more)


def crafted(defense, sources, batch, model=None):
    return Transferred(defense, sources).craft(model or LinearNet(W), batch)


def drawing(source, sources):
    """A seed whose draw is this source."""
    return next(
        seed
        for seed in range(100)
        if Transferred(EnsembleAdversarial(eps=0.1), [nn.Identity()] * sources).draw(batch_of(1, seed)) == source
    )


def test_examples_leave_the_drawn_model_s_own_prediction():
    source, batch = LinearNet(-W), batch_of(seed=drawing(0, 1))
    moved = crafted(EnsembleAdversarial(eps=0.1), [source], batch)
    predicted = source(batch.images).argmax(1)
    assert torch.equal(moved, FGSM(eps=0.1)(source, batch.images, predicted))
    own = batch_of(seed=drawing(1, 1))
    model = LinearNet(W)
    moved = crafted(EnsembleAdversarial(eps=0.1, label="truth"), [source], own, model)
    assert torch.equal(moved, FGSM(eps=0.1)(model, own.images, own.labels))


def test_step_ll_goes_towards_the_least_likely_class():
    model, batch = LinearNet(W), batch_of()
    moved = crafted(EnsembleAdversarial(eps=0.05, attack="step-ll"), [], batch, model)
    target = model(batch.images).argmin(1)
    before, after = (nn.functional.cross_entropy(model(x), target, reduction="none") for x in (batch.images, moved))
    assert (after < before).all()
    assert torch.equal(moved, FGSM(eps=0.05, label="least-likely")(model, batch.images, batch.labels))


def hundred_classes(count=64, seed=0):
    """A linear net of 100 classes whose answers change over a start of 0.15, and images for it."""
    draw = torch.Generator().manual_seed(seed)
    return LinearNet(torch.randn(100, 1, 4, 4, generator=draw)), shaded_images(count, (1, 4, 4), seed)


def by_hand(model, x, goal, start, eps, share, sign):
    """R+FGSM as the paper writes it, from given start signs: clip(x + a s), then (eps - a) along the gradient."""
    first = (x + share * eps * start).clamp(0, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(first), goal, reduction="sum"), first)
    moved = first.detach() + sign * (1 - share) * eps * gradient.sign()
    return torch.minimum(torch.maximum(moved, x - eps), x + eps).clamp(0, 1)


def test_black_pixels_move_by_the_gradient_s_whole_step():
    model, w = binary((1, 3, 4))
    x, y = torch.zeros(50, 1, 3, 4), torch.zeros(50, dtype=torch.long)
    batch = Batch(images=x, labels=y, seed=drawing(0, 0))
    moved = crafted(EnsembleAdversarial(eps=0.3, attack="r-fgsm", start_size=0.25, label="truth"), [], batch, model)
    found = moved[:, w > 0].flatten()
    # A start below black is clipped to black, and 0.3 - 0.075 is left; a start above it comes on top.
    low, high = (found - 0.225).abs() < 1e-6, (found - 0.3).abs() < 1e-6
    assert (low | high).all()
    assert 0.35 < float(low.float().mean()) < 0.65
    assert not moved[:, w < 0].any()


@pytest.mark.parametrize(("attack", "sign"), [("r-fgsm", 1), ("r-step-ll", -1)])
def test_a_random_start_changes_neither_the_label_nor_the_class_to_reach(attack, sign):
    model, x = hundred_classes()
    with torch.no_grad():
        clean, away = model(x), model((x + 0.15 * torch.randn(x.shape).sign()).clamp(0, 1))
    goal = clean.argmax(1) if sign > 0 else clean.argmin(1)
    assert (goal != (away.argmax(1) if sign > 0 else away.argmin(1))).float().mean() > 0.1  # or it would not tell
    batch = Batch(images=x, labels=torch.zeros(64, dtype=torch.long), seed=5)
    moved = crafted(EnsembleAdversarial(eps=0.3, attack=attack), [], batch, model)
    start = Ball(eps=0.3).signs(x.shape, generator(5, "start", 0)).sign()
    torch.testing.assert_close(moved, by_hand(model, x, goal, start, 0.3, 0.5, sign))
    own = {"r-fgsm": RFGSM(eps=0.3, label="prediction"), "r-step-ll": RStepLL(eps=0.3)}[attack]
    assert torch.equal(moved, own(model, x, batch.labels, seed=5))


def test_ignored_pixels_stay_ignored_whatever_label_is_left():
    torch.manual_seed(0)
    model = nn.Conv2d(1, 3, 1)
    x = shaded_images(6, (1, 4, 4))
    y = model(x).argmax(1).detach()
    y[:, :2] = 255
    for attack in ("fgsm", "r-step-ll"):
        defense = EnsembleAdversarial(eps=0.1, attack=attack, start_size=0.0)
        moved = crafted(defense, [], Batch(images=x, labels=y, seed=0, task=Segmentation(ignore_index=255)), model)
        assert torch.equal(moved[:, :, :2], x[:, :, :2])
        assert not torch.equal(moved[:, :, 2:], x[:, :, 2:])


@pytest.mark.parametrize("attack", ["fgsm", "r-fgsm", "step-ll", "r-step-ll"])
@pytest.mark.parametrize("random_eps", [False, True])
@pytest.mark.parametrize("norm", ["inf", "2", "1"])
def test_examples_lie_in_the_ball_and_move(attack, random_eps, norm):
    batch = batch_of(64)
    moved = crafted(EnsembleAdversarial(eps=0.1, attack=attack, random_eps=random_eps, norm=norm), [], batch)
    length = (moved - batch.images).flatten(1).norm(p=float(norm), dim=1)
    assert length.max() <= 0.1 + 1e-6
    assert length.max() > 0.05
    assert (length.std() > 0.01) == (random_eps or attack.startswith("r-"))
    if random_eps and attack == "fgsm":
        radii = Transferred(EnsembleAdversarial(eps=0.1, random_eps=True), []).sizes(batch).flatten() * 0.1
        torch.testing.assert_close(length, radii)


def test_random_radii_are_truncated_and_not_clamped():
    """Kurakin et al. 2017: N(0, eps / 2), drawn again until it lies within eps: nothing piles up at eps."""
    term = Transferred(EnsembleAdversarial(eps=0.1, random_eps=True), [])
    share = term.sizes(batch_of(20000)).flatten().double()
    assert share.min() >= 0
    assert share.max() <= 1
    assert (share > 0.999).double().mean() < 1e-3
    at = torch.arange(1, 20001) / 20000
    cumulative = torch.erf(share.sort().values * 2**0.5) / math.erf(2**0.5)
    assert float((cumulative - at).abs().max()) < 1.95 / 20000**0.5  # Kolmogorov-Smirnov, one in a thousand
    assert Transferred(EnsembleAdversarial(eps=0.1), []).sizes(batch_of(4)) is None


@pytest.mark.parametrize("attack", ["fgsm", "r-fgsm"])
def test_a_random_radius_is_that_of_the_whole_attack_and_the_clip_comes_last(attack):
    model, x = hundred_classes()
    with torch.no_grad():
        goal = model(x).argmax(1)
    batch = Batch(images=x, labels=goal, seed=5)
    defense = EnsembleAdversarial(eps=0.3, attack=attack, random_eps=True)
    moved = crafted(defense, [], batch, model)
    eps = 0.3 * Transferred(defense, []).sizes(batch)
    start = Ball(eps=0.3).signs(x.shape, generator(5, "start", 0)).sign()
    torch.testing.assert_close(moved, by_hand(model, x, goal, start, eps, 0.5 if attack == "r-fgsm" else 0.0, 1))


def test_processes_craft_what_one_would():
    model, x = hundred_classes(8)
    whole = Batch(images=x, labels=torch.zeros(8, dtype=torch.long), seed=3)
    defense = EnsembleAdversarial(eps=0.3, attack="r-fgsm", random_eps=True)
    parts = [
        Batch(images=x[half], labels=whole.labels[half], seed=3, place=(number, 2))
        for number, half in enumerate((slice(0, 4), slice(4, 8)))
    ]
    apart = torch.cat([crafted(defense, [], part, model) for part in parts])
    torch.testing.assert_close(apart, crafted(defense, [], whole, model))


def test_every_model_of_the_pool_is_drawn_equally_often():
    term = Transferred(EnsembleAdversarial(eps=0.1), [LinearNet(W), LinearNet(-W)])
    draws = [term.draw(batch_of(1, seed)) for seed in range(3000)]
    shares = torch.tensor(draws).bincount(minlength=3) / 3000
    assert ((shares - 1 / 3).abs() < 4 * (2 / 9 / 3000) ** 0.5).all()


def test_the_drawn_model_is_the_one_that_crafts():
    sources = [LinearNet(W), LinearNet(-W)]
    model = LinearNet(W.flip(0) * torch.tensor([1.0, -1.0, 1.0, -1.0]))
    term = Transferred(EnsembleAdversarial(eps=0.1, label="truth"), sources)
    found = set()
    for seed in range(30):
        batch = batch_of(seed=seed)
        drawn = term.draw(batch)
        crafter = [*sources, model][drawn]
        assert torch.equal(term.craft(model, batch), FGSM(eps=0.1)(crafter, batch.images, batch.labels))
        found.add(drawn)
    assert found == {0, 1, 2}


def weight_sum(model):
    return float(sum(parameter.detach().double().sum() for parameter in model.parameters()))


def test_the_model_may_stand_in_its_own_pool(digits):
    """As a static source it is what it was at the start; it learns all the same, and every source is given back."""
    torch.manual_seed(0)
    model, other = gb.models.create("lenet5", digits), gb.models.create("lenet5", digits).train()
    inside = nn.Sequential(nn.Identity(), model)
    snapshot = copy.deepcopy(model)
    frozen = next(other.parameters()).requires_grad_(False)
    for pool in ((model,), (inside, other)):
        defense = EnsembleAdversarial(eps=0.1, pool=pool)
        run = Run(model, digits, defense, Recipe(epochs=1, batch_size=64), 0, None)
        before = weight_sum(model)
        run.fit("test")
        assert weight_sum(model) != before
        assert all(parameter.requires_grad for parameter in model.parameters())
        x, y = digits.train.take(slice(0, 16))
        batch = Batch(images=x, labels=y, seed=drawing(0, len(pool)))
        moved = run.objective.terms["adversarial"][1].craft(model, batch)
        predicted = snapshot.eval()(x).argmax(1)
        assert torch.equal(moved, FGSM(eps=0.1)(snapshot, x, predicted))
        snapshot = copy.deepcopy(model)
    assert other.training
    assert not frozen.requires_grad
    assert sum(parameter.requires_grad for parameter in other.parameters()) == len(list(other.parameters())) - 1


@pytest.mark.parametrize("mixing", ["both", "half"])
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_adversarial_examples_weigh_lambda_beside_clean_ones(mixing, weight):
    """Kurakin et al. 2017: (clean + lambda * adversarial) / (1 + lambda)."""
    model, batch = LinearNet(W), batch_of(8)
    defense = EnsembleAdversarial(eps=0.2, mixing=mixing, weight=weight)
    moved = crafted(defense, [], batch, model)
    clean, adversarial = (
        nn.functional.cross_entropy(model(x), batch.labels, reduction="none") for x in (batch.images, moved)
    )
    if mixing == "half":
        clean, adversarial = clean[4:], adversarial[:4]
    expected = (clean.mean() + weight * adversarial.mean()) / (1 + weight)
    torch.testing.assert_close(defense.losses(model, batch)["loss"], expected)


def test_half_of_the_batch_is_replaced():
    seen = []

    class Watching(LinearNet):
        def forward(self, x):
            seen.append(x.detach())
            return super().forward(x)

    model, batch = Watching(W), batch_of(8)
    losses = EnsembleAdversarial(eps=0.1, mixing="half").losses(model, batch)
    assert set(losses) == {"loss", "adversarial"}
    assert torch.equal(seen[-1][4:], batch.images[4:])
    assert ((seen[-1][:4] - batch.images[:4]).abs().amax((1, 2, 3)) > 0.09).all()


def test_sources_never_change_and_precomputed_gradients_are_the_same(digits):
    torch.manual_seed(0)
    source = gb.models.create("lenet5", digits).train()
    before = gb.models.fingerprint(source)
    few = Dataset("few", digits.train.subset(torch.arange(256)), digits.validation, digits.test, digits.classes)

    def trained(**settings):
        torch.manual_seed(1)
        model = gb.models.create("lenet5", digits)
        defense = EnsembleAdversarial(eps=0.1, pool=(source,), **settings)
        gb.train(model, few, defense, epochs=2, batch_size=32, seed=3)
        return model

    plain, stored = trained(), trained(precompute=True)
    assert gb.models.fingerprint(source) == before
    assert source.training  # in evaluation mode while it crafts, and given back
    assert all(parameter.requires_grad for parameter in source.parameters())
    for one, other in zip(plain.parameters(), stored.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert gb.models.fingerprint(plain) != gb.models.fingerprint(trained(attack="step-ll"))


def test_sources_are_trained_first_by_the_same_command_and_kept(tmp_path):
    run = TrainRun(
        data="digits",
        model="lenet5",
        defense={"name": "ensemble-adversarial", "eps": 0.1, "sources": ("mnist-d",)},
        recipe={"epochs": 1},
        seed=0,
    )
    model = run_training(run, tmp_path / "run")
    source = gb.models.load(tmp_path / "run" / "sources" / "mnist-d")
    assert source.card.name == "mnist-d"
    again = run.model_copy(
        update={"defense": EnsembleAdversarial(eps=0.1, sources=(str(tmp_path / "run" / "sources" / "mnist-d"),))}
    )
    assert gb.models.fingerprint(run_training(again, tmp_path / "again")) == gb.models.fingerprint(model)


def test_mistakes_are_named(digits):
    model = gb.models.create("lenet5", digits)
    with pytest.raises(UserError, match="sources x are not loaded"):
        gb.train(model, digits, EnsembleAdversarial(eps=0.1, sources=("x",)), epochs=1)
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 7))
    with pytest.raises(UserError, match=r"source 1 answers \(2, 7\) to 2 images and the model \(2, 10\)"):
        gb.train(model, digits, EnsembleAdversarial(eps=0.1, pool=(other,)), epochs=1)
    with pytest.raises(UserError, match="precompute works for fgsm"):
        gb.train(model, digits, EnsembleAdversarial(eps=0.1, precompute=True, attack="r-fgsm"), epochs=1)
    defense = EnsembleAdversarial(eps=0.1, precompute=True, pool=(gb.models.create("lenet5", digits),))
    with pytest.raises(UserError, match="without augmentation"):
        gb.train(model, digits, defense, epochs=3, augment="crop")


def test_it_withstands_transferred_examples_better(digits, trained):
    """E3 in small: the examples of a source that was not in the pool do less harm."""
    torch.manual_seed(5)
    holdout = gb.models.create("mnist-d", digits)
    gb.train(holdout, digits, gb.defenses.Standard(), epochs=8, seed=5)
    model = copy.deepcopy(trained)
    gb.train(model, digits, EnsembleAdversarial(eps=0.2, pool=(trained,)), epochs=15, batch_size=64, seed=6)
    x, y = Split.take(digits.test, slice(0, 300), "cpu")
    moved = FGSM(eps=0.2)(holdout.eval(), x, y)
    defended, plain = (float((m.eval()(moved).argmax(1) == y).float().mean()) for m in (model, trained))
    assert defended > plain + 0.1

"""Ensemble Adversarial Training: who crafts, with which label, and what becomes of the sources."""

import copy

import pytest
import torch
from torch import nn

import gambeson as gb
from gambeson import UserError
from gambeson.attacks import FGSM
from gambeson.base import generator
from gambeson.data import Dataset, Split
from gambeson.defenses import Batch
from gambeson.defenses.ensemble_adversarial import EnsembleAdversarial, Transferred
from gambeson.training import TrainRun, run_training
from tests.conftest import LinearNet, inner_images

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
        if int(torch.randint(sources + 1, (), generator=generator(seed, "source"))) == source
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


@pytest.mark.parametrize("attack", ["fgsm", "r-fgsm", "step-ll", "r-step-ll"])
@pytest.mark.parametrize("random_eps", [False, True])
@pytest.mark.parametrize("norm", ["inf", "2"])
def test_examples_lie_in_the_ball_and_move(attack, random_eps, norm):
    batch = batch_of(64)
    moved = crafted(EnsembleAdversarial(eps=0.1, attack=attack, random_eps=random_eps, norm=norm), [], batch)
    length = (moved - batch.images).flatten(1).norm(p=float(norm), dim=1)
    assert length.max() <= 0.1 + 1e-6
    assert length.max() > 0.05
    assert (length.std() > 0.01) == (random_eps or (attack.startswith("r-")))
    if random_eps and attack == "fgsm":  # mean of |N(0, 1/2)| cut at 1 is 0.39
        assert 0.025 < length.mean() < 0.055


def test_every_model_of_the_pool_is_drawn_equally_often():
    draws = [int(torch.randint(3, (), generator=generator(seed, "source"))) for seed in range(3000)]
    shares = torch.tensor(draws).bincount(minlength=3) / 3000
    assert ((shares - 1 / 3).abs() < 4 * (2 / 9 / 3000) ** 0.5).all()


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
    before, mode = gb.models.fingerprint(source), source.training
    few = Dataset("few", digits.train.subset(torch.arange(256)), digits.validation, digits.test, digits.classes)

    def trained(**settings):
        torch.manual_seed(1)
        model = gb.models.create("lenet5", digits)
        defense = EnsembleAdversarial(eps=0.1, pool=(source,), **settings)
        gb.train(model, few, defense, epochs=2, batch_size=32, seed=3)
        return model

    plain, stored = trained(), trained(precompute=True)
    assert gb.models.fingerprint(source) == before
    assert mode
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

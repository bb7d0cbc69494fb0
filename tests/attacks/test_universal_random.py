"""Universal attacks on random models: votes choose, and gradients are averaged over draws."""

import pytest
import torch
from torch import nn

import gambeson as gb
from gambeson.attacks import DFUAP, StochasticPGD
from gambeson.attacks.universal.sga import SGA
from gambeson.attacks.universal.stochastic_pgd import ClasswiseStochasticPGD
from gambeson.base import seeded
from gambeson.victim import EOT_SAMPLES, Victim, predict, score
from tests.attacks.test_universal import linear_data
from tests.conftest import binary, full

SHAPE = (1, 3, 4)


class Noisy(nn.Module):
    """A linear net whose weights move: by a draw for each image, or by one for the whole batch."""

    def __init__(self, model, deviation, *, shared):
        super().__init__()
        self.model, self.deviation, self.shared, self.calls = model, deviation, shared, 0

    def forward(self, x):
        self.calls += 1
        w = torch.randn(1 if self.shared else len(x), *x.shape[1:]) * self.deviation
        moved = (w * x).flatten(1).sum(1) if not self.shared else x.flatten(1) @ w.flatten()
        return self.model(x) + torch.stack([-moved / 2, moved / 2], 1)


@pytest.fixture(scope="module")
def linear():
    model, w = binary(SHAPE)
    return model, w, linear_data(model, SHAPE, keep=0)


def test_restarts_are_chosen_by_the_votes_that_report_them(trained, digits):
    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = trained

        def forward(self, x):
            z = self.model(x)
            return z + 4 * torch.randn_like(z)

    model = Logits()
    attack = StochasticPGD(eps=0.15, steps=5, restarts=3, batch_size=64, probe_starts=0)
    uap = attack.craft(model, digits, seed=5)
    voted = gb.evaluation.universal_evasion(model, digits.validation, uap, seed=5).value
    assert voted == max(rate for _, rate in uap.about.restarts)
    assert attack.craft(model, digits, seed=5).about == uap.about
    with Victim(model) as victim:
        assert attack.craft(victim, digits, seed=5).about == uap.about
        assert victim.votes is None  # as it was
        victim.votes = 3  # whoever says how many is heard
        few = attack.craft(victim, digits, seed=5)
        expected = score(predict(victim, digits.validation, few.delta, seed=5), digits.validation).error
        assert victim.votes == 3
    assert max(rate for _, rate in few.about.restarts) == expected != voted


def test_class_wise_choice_is_by_votes_too(trained, digits):
    class Coin(nn.Module):
        """Right with probability 0.6 whatever the perturbation: 0.4 are wrong by one vote, far less by 21."""

        def forward(self, x):
            z = trained(x)
            return torch.where(torch.rand(len(x), 1) < 0.6, z, z.roll(1, 1))

    attack = ClasswiseStochasticPGD(eps=0.01, steps=1, restarts=1)
    rates = [uap.about.restarts[0][1] for uap in attack.craft_classes(Coin(), digits).values()]
    assert sum(rates) / len(rates) < 0.3


@pytest.mark.parametrize(
    "attack",
    [
        StochasticPGD(eps=0.1, loss="margin", truncate=None, probe_starts=0, steps=1),
        SGA(eps=0.1, steps=1, rounds=1, inner_batch=250, loss="logit"),
        full(DFUAP(eps=0.1, steps=1, confidence=1e6)),
    ],
    ids=lambda a: a.name,
)
def test_a_gradient_is_the_mean_over_draws_where_a_batch_shares_one(linear, attack):
    plain, w, data = linear
    model = Noisy(plain, 3.0, shared=True)
    uap = attack.craft(model, data)
    images = min(len(data.train), attack.batch_size)
    assert uap.about.backwards == EOT_SAMPLES * images  # one step
    many = attack.model_copy(update={"eot_samples": 3000}).craft(model, data)
    clear = (w.abs() > 0.25)[None]
    assert torch.equal(many.delta.sign()[clear], w.sign()[None][clear])
    one = attack.model_copy(update={"eot_samples": 1}).craft(model, data)
    assert not torch.equal(one.delta.sign()[clear], w.sign()[None][clear])


def test_a_batch_of_own_draws_is_a_mean_over_draws_already(linear):
    plain, _, data = linear
    attack = StochasticPGD(eps=0.1, steps=2, probe_starts=0, batch_size=20)
    assert attack.craft(Noisy(plain, 1.0, shared=False), data).about.backwards == 40
    more = attack.model_copy(update={"eot_samples": 4})
    assert more.craft(Noisy(plain, 1.0, shared=False), data).about.backwards == 160
    assert more.craft(plain, data).about.backwards == 40  # a model that is not random has one answer
    pair = more.craft([plain, Noisy(plain, 1.0, shared=False)], data)
    assert pair.about.backwards == 40 + 160


def test_predicted_labels_of_a_random_model_are_those_of_its_mean_logits(linear):
    plain, _, data = linear
    attack = StochasticPGD(eps=0.1, labels="prediction", eot_samples=2000)
    with attack._crafting(Noisy(plain, 0.5, shared=True), data, 0) as context, seeded(0):
        images, labels = data.train.take(slice(None))
        assert float((context.targets(images, labels) == labels).float().mean()) > 0.95

"""Random models: every draw comes from the seed, none from the caller's generators, and one draw is no gradient."""

import pytest
import torch
from torch import nn

import gambeson as gb
from gambeson import UserError
from gambeson.attacks import (
    NES,
    PGD,
    SPSA,
    AutoPGD,
    CarliniWagner,
    ClasswiseStochasticPGD,
    DeepFool,
    OnePixel,
    RayS,
    Square,
    StochasticPGD,
)
from gambeson.data import Split
from gambeson.victim import Victim

CLASSES = ("a", "b", "c")


class Jittery(nn.Module):
    """A network whose input and logits are shaken by draws from torch's global generator."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 3))

    def forward(self, x):
        return 4 * self.net(x * (1 + 0.3 * torch.randn_like(x))) + 0.5 * torch.randn(len(x), 3)


@pytest.fixture(scope="module")
def jittery():
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model, x = Jittery(), torch.rand(90, 2, 4, 4)
    with torch.no_grad():
        model.net[-1].bias.sub_(model.net(x).mean(0))
        return model, x, model.net(x).argmax(1)


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one.nan_to_num(), other.nan_to_num())
    if isinstance(one, dict):
        return all(same(one[key], other[key]) for key in one)
    return one == other


def asked_twice(ask):
    """The answers after other draws of the caller's, whose generator is to be left alone."""
    found = []
    with torch.random.fork_rng():
        for seed in (7, 8):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            found.append(ask())
            assert torch.equal(torch.get_rng_state(), before)
    return found


@pytest.mark.parametrize(
    "attack",
    [
        Square(eps=0.1, queries=60),
        NES(eps=0.1, queries=110),
        SPSA(eps=0.1, queries=140),
        RayS(eps=0.1, queries=40),
        OnePixel(queries=40, population=8),
    ],
    ids=lambda attack: type(attack).__name__,
)
def test_query_attacks_draw_from_their_seed_alone(jittery, attack):
    one, other = asked_twice(lambda: attack(*jittery, seed=4))
    assert torch.equal(one, other)
    assert not torch.equal(one, attack(*jittery, seed=5))


@pytest.mark.parametrize("attack", [PGD, AutoPGD])
def test_success_on_a_few_samples_ends_no_image_in_any_restart(jittery, attack):
    model, x, y = jittery
    with Victim(model) as victim:
        attack(eps=0.2, steps=3, restarts=3, eot_samples=2)(victim, x, y)
        assert victim.backwards == len(x) * 2 * 3 * 3


@pytest.mark.parametrize("attack", [DeepFool(), DeepFool(eps=0.1, norm="inf"), CarliniWagner(steps=3)])
def test_minimal_norm_attacks_refuse_a_random_model(jittery, attack):
    with pytest.raises(UserError, match="the model is random .* PGD with eot_samples=20, or turn the randomness off"):
        attack(*jittery)
    assert attack(jittery[0].net, *jittery[1:]).shape == jittery[1].shape


@pytest.mark.parametrize("craft", ["craft", "craft_curve", "craft_classes"])
def test_universal_attacks_draw_from_their_seed_alone(jittery, craft):
    settings = {"eps": 0.1, "steps": 4, "restarts": 1, "probe_starts": 0, "batch_size": 16}
    data = Split("jittery", *jittery[1:], CLASSES)

    def deltas():
        if craft == "craft_classes":
            found = ClasswiseStochasticPGD(**settings).craft_classes(jittery[0], data)
            return {name: uap.delta for name, uap in found.items()}
        if craft == "craft_curve":
            return {uap.about.eps: uap.delta for uap in StochasticPGD(**settings).craft_curve(jittery[0], data, [0.1])}
        return StochasticPGD(**settings).craft(jittery[0], data).delta

    assert same(*asked_twice(deltas))


ANALYSES = {
    "batch_jacobian": lambda model, x, y: gb.analysis.batch_jacobian(model, x),
    "jacobian_norms": lambda model, x, y: gb.analysis.jacobian_norms(model, (x, y)),
    "gradient_sharing": lambda model, x, y: gb.analysis.gradient_sharing(model, (x, y)),
    "gradient_statistics": lambda model, x, y: gb.analysis.gradient_statistics(model, (x, y)),
    "sharing_factor": lambda model, x, y: gb.analysis.sharing_factor(model, (x, y)),
    "pair_sharing": lambda model, x, y: gb.analysis.pair_sharing(model, (x, y), pairs=20).values,
    "stacked_spectrum": lambda model, x, y: gb.analysis.stacked_spectrum(model, (x, y), method="products").values,
    "estimate_frobenius": lambda model, x, y: gb.analysis.estimate_frobenius(model, x, projections=2).mean,
    "adversarial_subspace": lambda model, x, y: gb.analysis.adversarial_subspace(model, x, y, eps=0.2).counts,
    "loss_surface": lambda model, x, y: gb.analysis.loss_surface(model, x, y, points=3, other=model).loss,
    "diversity_gain": lambda model, x, y: gb.analysis.diversity_gain([model, model], x),
}


@pytest.mark.parametrize("name", ANALYSES)
def test_an_analysis_repeats_itself_and_leaves_the_callers_draws_alone(jittery, name):
    model, x, y = jittery
    assert same(*asked_twice(lambda: ANALYSES[name](model, x[:30], y[:30])))


class Undecided(nn.Module):
    """Four classes by the means of the quarters of an image, or of a pixel's columns, in noise."""

    def __init__(self, noise, maps=False):
        super().__init__()
        self.weight, self.noise, self.maps = nn.Parameter(torch.eye(4)), noise, maps

    def forward(self, x):
        logits = x.repeat(1, 2, 1, 1) if self.maps else x.flatten(2).mean(2).repeat(1, 2)
        logits = torch.einsum("kc,nc...->nk...", self.weight, logits)
        return 10 * logits + self.noise * torch.randn(logits.shape)


@pytest.mark.parametrize("maps", [False, True])
def test_images_alone_on_which_no_class_has_a_majority_are_left_out(maps):
    x = torch.rand(80, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    model = Undecided(1.5 if maps else 0.3, maps)
    with Victim(model) as victim:
        found = gb.victim.predict(victim, Split("x", x, torch.zeros(80).long(), CLASSES))
    assert bool((found == gb.victim.ABSTAIN).any())
    assert bool((found != gb.victim.ABSTAIN).any())
    craft = lambda: StochasticPGD(eps=0.1, steps=3, restarts=1, probe_starts=0).craft(model, x)  # noqa: E731
    one, other = asked_twice(craft)
    assert torch.equal(one.delta, other.delta)
    assert float(one.delta.abs().max()) > 0
    lost = Undecided(1e4, maps)
    if not maps:
        with pytest.raises(UserError, match="majority on [01] of 9 images without labels: .* give labels as well"):
            StochasticPGD(eps=0.1, steps=3).craft(lost, x[:9])

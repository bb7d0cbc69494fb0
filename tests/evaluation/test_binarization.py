"""The binarisation test: an attack that works finds what is known to be there, and one that does not is told."""

import pytest
import torch
from torch import nn

from gambeson import UserError
from gambeson.attacks import FGSM, PGD
from gambeson.data import Split
from gambeson.evaluation import BinarizationTest, binarization_test, binarization_tests
from gambeson.evaluation.binarization import BinaryHeads, heads
from gambeson.victim import as_victim, vote

EPS = 8 / 255
SHAPE = (1, 4, 4)


def split(count=20, shape=SHAPE):
    draw = torch.Generator().manual_seed(0)
    return Split("test", 0.3 + 0.4 * torch.rand(count, *shape, generator=draw), torch.zeros(count).long())


def identity():
    """A network whose features are its pixels."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


def outcome_of(attack, model=None, **settings):
    settings = {"eps": EPS, "samples": 20, "inner": 200, "random_points": 20} | settings
    return binarization_test(identity() if model is None else model, split(), attack, BinarizationTest(**settings))


@pytest.mark.parametrize("settings", [{}, {"boundary": "corner"}, {"norm": "2", "eps": 0.3}])
def test_a_sound_attack_finds_every_example_on_linear_features(settings):
    ball = {"eps": settings.get("eps", EPS), "norm": settings.get("norm", "inf")}
    found = outcome_of(PGD(steps=20, **ball), **settings)
    assert (found.failed, found.success.n, found.success.value) == (0, 20, 1)
    assert found.cost.forwards > 20 * 200
    assert found == outcome_of(PGD(steps=20, **ball), **settings)  # repeatable


def test_attacks_that_do_nothing_or_go_the_wrong_way_find_none():
    class Backwards:
        eps, norm = EPS, "inf"

        def __call__(self, model, x, y, *, seed=0, task=None):
            return (2 * x - FGSM(eps=EPS)(model, x, y)).clamp(0, 1)

    def nothing(model, x, y, *, seed=0, task=None):
        return x

    for attack in (Backwards(), nothing):
        found = outcome_of(attack)
        assert found.success.value == 0
        assert found.strong is False or found.random.value > 0.05


@pytest.mark.parametrize(
    "ball", [{"eps": 0.5}, {"eps": EPS / 2}, {"eps": EPS * 1.01}, {"eps": EPS, "norm": "2"}, {"eps": 0.3, "norm": "1"}]
)
def test_an_attack_in_another_ball_is_refused(ball):
    with pytest.raises(UserError, match=r"attack 'attack' has eps = .* and the test 8/255 in the norm inf: .* same"):
        outcome_of(PGD(**ball))
    assert outcome_of(PGD(eps="8/255", norm="Linf", steps=20)).success.value == 1


def test_an_attack_that_names_no_ball_may_not_leave_that_of_the_test():
    def wide(model, x, y, *, seed=0, task=None):
        return PGD(eps=0.2)(model, x, y)

    with pytest.raises(UserError, match="attack 'attack' of eps = 8/255 moved an image by 0.2 in the norm inf"):
        outcome_of(wide)


def test_attacks_that_are_tested_together_share_their_copies():
    attacks = {"pgd": PGD(eps=EPS, steps=20), "one step": PGD(eps=EPS, steps=1, rel_step_size=0.2, start="zero")}
    test = BinarizationTest(eps=EPS, samples=20, inner=200, random_points=20)
    both = binarization_tests(identity(), split(), attacks, test)
    for name, attack in attacks.items():
        assert both[name] == outcome_of(attack)
    pgd, short = both.values()
    assert pgd.shared == short.shared
    assert pgd.cost.forwards > pgd.shared.forwards > 20 * 200
    assert pgd.hidden.n == 20 - round(20 * pgd.random.value)
    assert short.hidden.value <= short.success.value < 0.5 < pgd.hidden.value == 1


def test_no_success_is_claimed_where_there_is_none():
    images, _ = split(3).take(slice(None))
    weights, bias = torch.randn(3, 16, generator=torch.Generator().manual_seed(3)), torch.ones(3)
    with as_victim(BinaryHeads(identity(), images, weights, bias, robust=True)) as robust:
        moved = PGD(eps=0.5, steps=20)(robust, images, torch.zeros(3).long())
        assert (vote(robust, moved) == 0).all()
        gap = robust(moved).diff(dim=1).squeeze(1)
        assert (gap < -0.1).all()
        assert (gap > robust(images).diff(dim=1).squeeze(1)).all()  # it has a gradient, and the attack follows it
    assert outcome_of(PGD(eps=EPS, steps=20)).claimed == 0


def test_gradients_that_vanish_make_the_attack_too_weak():
    class Rounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = identity()

        def forward(self, x):
            return self.inner((x * 2550).round() / 2550)

    with pytest.warns(UserWarning, match="exactly zero"):
        hidden = outcome_of(PGD(eps=EPS, steps=20), Rounded())
    assert hidden.failed == 0
    assert hidden.success.value < 0.5 < outcome_of(PGD(eps=EPS, steps=20)).success.value


@pytest.mark.parametrize(("steps", "reached"), [(7, False), (8, True)])
def test_steps_reach_the_decision_exactly_when_their_sum_does(steps, reached):
    """A head w = s/16 with theta = 0.95 eps needs min(k a, eps) > theta, after k steps of a = 1/255."""
    signs = torch.where(torch.rand(3, 16, generator=torch.Generator().manual_seed(1)) < 0.5, -1.0, 1.0)
    images, _ = split(3).take(slice(None))
    weights = signs / 16
    bias = -(weights * images.flatten(1)).sum(1) - 0.95 * EPS
    with as_victim(BinaryHeads(identity(), images, weights, bias)) as binary:
        attack = PGD(eps=EPS, steps=steps, rel_step_size=1 / 8, start="zero", early_stop=False)
        moved = attack(binary, images, torch.zeros(3).long())
        assert (vote(binary, moved) == 1).tolist() == [reached] * 3
        order = torch.tensor([2, 0, 1, 1])  # every image finds its own head, in any batch
        assert torch.equal(binary(moved)[order], binary(moved[order]))


def test_a_head_separates_and_its_decision_lies_at_the_closeness():
    draw = torch.Generator().manual_seed(2)
    inside, outside = torch.randn(3, 50, 8, generator=draw), torch.randn(3, 1, 8, generator=draw) + 6
    weights, bias = heads(inside, outside, 0.9, spread=5.0)
    low = (inside @ weights[:, :, None])[:, :, 0] + bias[:, None]
    high = (outside @ weights[:, :, None])[:, 0, 0] + bias
    assert bool((low < 0).all() and (high > 0).all())
    assert torch.allclose(high - low.amin(1), torch.full((3,), 5.0), rtol=1e-4)
    plain = heads(inside, outside, 0.0, spread=5.0)[1]
    top = high + (plain - bias)  # before the shift
    assert torch.allclose(high, 0.1 * top, rtol=1e-4)


def test_constant_features_leave_nothing_to_test():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(16, 3)

        def forward(self, x):
            return self.out(0 * x.flatten(1))

    found = outcome_of(PGD(eps=EPS), Constant())
    assert (found.failed, found.success.n, found.strong) == (20, 0, None)


def test_random_points_guess_corners_as_often_as_the_formula_says():
    """In 4 pixels one random corner in 16 is the boundary point's: 1 - (1 - 1/16)^20 = 0.72 of images are guessed."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    test = BinarizationTest(eps=EPS, samples=200, inner=200, random_points=20, boundary="corner", closeness=0.9)
    found = binarization_test(model, split(200, (1, 2, 2)), PGD(eps=EPS), test)
    assert found.random.low <= 1 - (1 - 1 / 16) ** 20 <= found.random.high
    assert found.strong is None  # a success says nothing where luck does as well


@pytest.mark.parametrize(
    ("settings", "model", "message"),
    [
        ({"boundary": "corner", "norm": "2"}, None, "only the norm inf has corners"),
        ({}, nn.Sequential(nn.Conv2d(1, 3, 4), nn.Flatten()), "no linear layer"),
    ],
)
def test_what_does_not_apply_is_said(settings, model, message):
    with pytest.raises(UserError, match=message):
        outcome_of(PGD(eps=EPS), model, **settings)


def test_a_random_model_gives_the_same_for_a_seed_and_leaves_the_callers_generator(digits):
    class Noisy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.features = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 64), torch.nn.ReLU())
            self.last = torch.nn.Linear(64, 10)

        def forward(self, x):
            return self.last(self.features(x + 0.1 * torch.randn_like(x)))

    model, images = Noisy(), torch.rand(20, 1, 8, 8)
    test = BinarizationTest(eps=0.3, samples=8, inner=50, random_points=5)
    found = []
    for k in range(3):
        torch.manual_seed(k)
        before = torch.get_rng_state()
        found.append(binarization_test(model, (images, torch.arange(20) % 10), PGD(eps=0.3, steps=3), test).plain())
        assert torch.equal(torch.get_rng_state(), before)
    assert found[0] == found[1] == found[2]

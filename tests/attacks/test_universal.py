"""Stochastic PGD against formulas, and what it hands back."""

import itertools
import math

import pytest
import torch
from torch import nn

import gambeson as gb
from gambeson import UserError
from gambeson.attacks import StochasticPGD, UniversalPerturbation, control
from gambeson.attacks.solver import ProjectedGradient
from gambeson.attacks.universal.context import CraftingContext
from gambeson.attacks.universal.stochastic_pgd import ClasswiseStochasticPGD
from gambeson.data import Dataset, Split
from gambeson.threat import Ball
from gambeson.victim import Victim
from tests.conftest import LinearNet, binary, inner_images, quickly


class Flicker(nn.Module):
    """Adds noise to its input."""

    def forward(self, x):
        return x + 0.01 * torch.randn_like(x)


def linear_data(model, shape, keep=None, count=240):
    """Images that the linear model gets right, of both classes or of one."""
    x = inner_images(count * 4, shape)
    bias = float(model(x).diff(dim=1).mean())
    with torch.no_grad():
        model.bias += torch.tensor([bias / 2, -bias / 2])
        y = model(x).argmax(1)
    rows = torch.arange(len(x)) if keep is None else (y == keep).nonzero().flatten()
    rows = rows[:count]
    thirds = rows.chunk(3)
    splits = [
        Split(f"linear/{name}", x[part], y[part], ("a", "b"))
        for name, part in zip(("train", "validation", "test"), thirds, strict=True)
    ]
    dataset = object.__new__(Dataset)  # one class is refused by Dataset; here the formula needs it
    for name, value in zip(
        ("name", "train", "validation", "test", "classes"), ("linear", *splits, ("a", "b")), strict=True
    ):
        object.__setattr__(dataset, name, value)
    return dataset


@pytest.mark.parametrize("shape", [(1, 2, 3), (3, 5, 7), (1, 1, 11), (2, 8, 4)])
@pytest.mark.parametrize("keep", [0, 1])
def test_finds_the_best_universal_perturbation_of_a_linear_model(shape, keep):
    model, w = binary(shape)
    data = linear_data(model, shape, keep)
    # With truncation an image that is fooled has no say, so the plain loss is what has this optimum.
    attack = StochasticPGD(eps=0.1, steps=40, probe_starts=2, probe_start_steps=10, truncate=None)
    uap = attack.craft(model, data)
    toward = 1 if keep == 0 else -1
    torch.testing.assert_close(uap.delta[0], 0.1 * toward * w.sign())
    margin = model(data.test.take(slice(None))[0]).diff(dim=1).flatten().abs()
    expected = (margin < 0.1 * w.abs().sum()).float().mean()
    assert gb.evaluation.universal_evasion(model, data.test, uap).value == pytest.approx(float(expected))
    flat = attack.model_copy(update={"norm": "2"}).craft(model, data)
    torch.testing.assert_close(flat.delta[0], 0.1 * toward * w / w.norm(), rtol=0.02, atol=1e-4)


def test_two_classes_give_one_of_the_two_optima():
    model, w = binary((1, 4, 6))
    data = linear_data(model, (1, 4, 6))
    uap = StochasticPGD(eps=0.1, steps=60, probe_starts=3, probe_start_steps=20, truncate=None).craft(model, data)
    assert float((uap.delta[0] * w.sign()).mean().abs()) == pytest.approx(0.1, rel=1e-4)


def test_targeted_optimum_of_a_linear_model_and_bad_targets():
    model, w = binary((1, 3, 5))
    data = linear_data(model, (1, 3, 5))
    uap = StochasticPGD(
        eps=0.2, steps=40, target=1, probe_starts=2, probe_start_steps=10, tau=1.0, temperature=1
    ).craft(model, data)
    torch.testing.assert_close(uap.delta[0], 0.2 * w.sign())
    with pytest.raises(UserError, match="target 2 is not a class: expected 0 to 1"):
        StochasticPGD(eps=0.2, target=2).craft(model, data)


def test_restart_is_chosen_on_validation_and_everything_is_said(trained, digits):
    attack = StochasticPGD(eps=0.2, steps=20, restarts=3, batch_size=64, probe_starts=0)
    uap = attack.craft(trained, digits, seed=5)
    about = uap.about
    assert [kind for kind, _ in about.restarts] == ["zero", "sign", "sign"]
    chosen = gb.evaluation.universal_evasion(trained, digits.validation, uap).value
    assert chosen == max(rate for _, rate in about.restarts)
    assert about.settings == attack.plain()
    assert about.crafted_on == digits.train.fingerprint
    assert about.model == gb.models.fingerprint(trained)
    assert about.backwards == 3 * 20 * 64
    assert about.forwards == 3 * (20 * 64 + len(digits.validation)) + 200
    assert float(uap.delta.abs().max()) <= 0.2
    again = attack.craft(trained, digits, seed=5)
    assert torch.equal(uap.delta, again.delta)
    assert not torch.equal(uap.delta, attack.craft(trained, digits, seed=6).delta)


def test_beats_its_controls_and_the_null_perturbation_does_not(trained, digits):
    eps = 0.2
    uap = StochasticPGD(eps=eps, steps=60, probe_starts=2, probe_start_steps=30).craft(trained, digits)
    crafted = gb.evaluation.universal_evasion(trained, digits, uap)
    clean = gb.evaluation.accuracy(trained, digits).complement
    for name in ("random-sign", "chessboard"):
        noise = UniversalPerturbation(control(name, Ball(eps=eps), digits.test.shape), uap.about)
        assert gb.evaluation.universal_evasion(trained, digits, noise).high < crafted.low
    nothing = UniversalPerturbation(torch.zeros_like(uap.delta), uap.about)
    assert gb.evaluation.universal_evasion(trained, digits, nothing).value == pytest.approx(clean.value, abs=1e-12)
    assert gb.evaluation.fooling_rate(trained, digits, nothing).value == 0
    evasion, fooling = crafted.value, gb.evaluation.fooling_rate(trained, digits, uap).value
    assert abs(evasion - fooling) <= clean.value + 1e-9


def test_saved_file_gives_the_same_number_and_refuses_its_own_images(tmp_path, trained, digits):
    uap = StochasticPGD(eps=0.2, steps=10, probe_starts=0).craft(trained, digits)
    uap.save(tmp_path / "uap.safetensors")
    back = UniversalPerturbation.load(tmp_path / "uap.safetensors")
    assert torch.equal(back.delta, uap.delta)
    assert back.about == uap.about
    one, other = (gb.evaluation.universal_evasion(trained, digits, found) for found in (uap, back))
    assert one == other
    with pytest.raises(UserError, match="^1078 of the 1078 images that this perturbation was crafted on"):
        gb.evaluation.universal_evasion(trained, digits.train, back)
    gb.models.save(trained, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="holds the tensors .* 9 more: expected a universal perturbation"):
        UniversalPerturbation.load(tmp_path / "model.safetensors")


def test_a_model_that_ignores_its_input_ends_with_a_status(digits):
    class Constant(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :10] * 0.0

    uap = StochasticPGD(eps=0.2, steps=5, probe_starts=2, batch_size=64).craft(Constant(), digits)
    assert uap.about.status == "zero"
    assert StochasticPGD(eps=0, steps=2, probe_starts=0).craft(Constant(), digits).about.status == "done"


def test_warm_start_is_one_more_restart_scaled_to_the_ball(trained, digits):
    attack = StochasticPGD(eps=0.2, steps=10, restarts=1, batch_size=64, probe_starts=0)
    small = attack.model_copy(update={"eps": 0.1}).craft(trained, digits)
    warm = attack.craft(trained, digits, start=small.delta)
    assert [kind for kind, _ in warm.about.restarts] == ["zero", "warm"]
    assert float(warm.delta.abs().max()) <= 0.2


def test_starts_are_probed_by_a_short_climb_and_the_best_go_on(trained, digits):
    attack = StochasticPGD(
        eps=0.2, steps=20, batch_size=32, probe_starts=5, probe_start_steps=10, probe_start_batch=8, restarts=2
    )
    uap = attack.craft(trained, digits, seed=1)
    about = uap.about
    assert len(about.restarts) == 2
    assert all(kind.endswith(", probed") for kind, _ in about.restarts)
    assert about.backwards == 5 * 10 * 8 + 2 * 20 * 32
    assert about.forwards == about.backwards + (5 + 2) * len(digits.validation) + 200
    with attack._crafting(trained, digits, 1) as context:
        brief = StochasticPGD(eps=0.2, steps=10, batch_size=8, rel_step_size=0.5, probe_starts=0)
        rates = [context.rate(brief._run(context, start, [k])) for k, (_, start) in enumerate(context.starts(5, None))]
        kept = [context.rate(delta) for _, delta in attack._best(context, [attack], [list(context.starts(5, None))])[0]]
    assert kept == sorted(rates, reverse=True)[:2]
    few = attack.model_copy(update={"probe_start_images": 20}).craft(trained, digits, seed=1).about
    assert few.forwards == few.backwards + 5 * 20 + 2 * len(digits.validation) + 200
    warm = attack.craft(trained, digits, seed=1, start=uap.delta)
    assert [kind for kind, _ in warm.about.restarts][-1] == "warm"  # what was given is never left out


def test_default_costs_a_stated_number_of_gradients_and_is_no_weaker_than_one_long_run(trained, digits):
    rates = []
    for attack in (
        StochasticPGD(eps=0.15),
        StochasticPGD(eps=0.15, probe_starts=0, steps=200, batch_size=128, box_gradient="exact"),
    ):
        uap = attack.craft(trained, digits)
        assert uap.about.backwards == 25_600
        rates.append(gb.evaluation.universal_evasion(trained, digits, uap).value)
    assert rates[0] >= rates[1] - 0.02


def test_steps_decay_from_a_quarter_to_a_hundredth_of_eps():
    lengths = StochasticPGD(eps=0.4, steps=200).lengths
    assert lengths[0] == pytest.approx(0.1)
    assert lengths[-1] == pytest.approx(0.004)
    assert all(a >= b for a, b in itertools.pairwise(lengths))


def test_label_maps_are_attacked_by_the_same_call():
    class PixelNet(nn.Module):
        def forward(self, x):
            return torch.cat([1 - 2 * x, 2 * x - 1], 1)

    x = torch.rand(60, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.3 + 0.55
    y = torch.ones(60, 4, 4, dtype=torch.long)
    y[:, 0] = 255
    whole = Split("pixels", x, y, ("a", "b"), ignore_index=255)
    parts = [whole.subset(torch.arange(20) + 20 * k, f"pixels/{k}") for k in range(3)]
    data = object.__new__(Dataset)
    for name, value in zip(("name", "train", "validation", "test", "classes"), ("p", *parts, ("a", "b")), strict=True):
        object.__setattr__(data, name, value)
    uap = StochasticPGD(eps=0.1, steps=20, batch_size=10, probe_starts=0, truncate=None).craft(PixelNet(), data)
    torch.testing.assert_close(uap.delta[0, 0, 1:], torch.full((3, 4), -0.1))
    assert not uap.delta[0, 0, 0].any()  # ignored pixels have no gradient
    flips = ((parts[2].take(slice(None))[0] - 0.1) < 0.5)[:, 0, 1:].float().mean()
    found = gb.evaluation.universal_evasion(PixelNet(), parts[2], uap)
    assert found.value == pytest.approx(float(flips), abs=1e-6)
    assert found.n == 20


def test_controls_have_norm_eps_zero_mean_board_and_fresh_signs():
    for norm in ("inf", "2"):
        ball = Ball(eps=0.3, norm=norm)
        board = control("chessboard", ball, (3, 4, 6))
        torch.testing.assert_close(ball.length(board), torch.tensor([0.3]))
        assert float(board.mean()) == pytest.approx(0, abs=1e-7)
        assert board[0, 0, 0, 0] < 0 < board[0, 0, 0, 1]
        assert torch.equal(board[0, 0], board[0, 2])
        signs = control("random-sign", ball, (3, 4, 6), draws=4, seed=1)
        torch.testing.assert_close(ball.length(signs), torch.full((4,), 0.3))
        assert not torch.equal(signs[0], signs[1])
        assert torch.equal(signs, control("random-sign", ball, (3, 4, 6), draws=4, seed=1))
    with pytest.raises(UserError, match="unknown control 'chess': did you mean chessboard"):
        control("chess", ball, (1, 2, 2))


def test_same_numbers_whether_a_model_or_a_victim_is_given(trained, digits):
    attack = StochasticPGD(eps=0.1, steps=5, probe_starts=2, probe_start_steps=2)
    with Victim(trained) as victim:
        inside = attack.craft(victim, digits)
    assert torch.equal(inside.delta, attack.craft(trained, digits).delta)


def test_linear_net_with_many_classes_meets_brute_force():
    draw = torch.Generator().manual_seed(2)
    model = LinearNet(torch.randn(3, 1, 2, 4, generator=draw))
    x = inner_images(300, (1, 2, 4))
    with torch.no_grad():
        model.bias -= model(x).mean(0)
    y = model(x).argmax(1)
    data = gb.data.as_dataset((x, y))
    images, labels = data.train.take(slice(None))
    corners = torch.cartesian_prod(*[torch.tensor([-0.1, 0.1])] * 8).view(-1, 1, 2, 4)
    with torch.no_grad():
        values = [nn.functional.cross_entropy(model(images + corner), labels) for corner in corners]
    attack = StochasticPGD(eps=0.1, steps=100, restarts=4, batch_size=len(images), probe_starts=0, truncate=None)
    uap = attack.craft(model, data)
    with torch.no_grad():
        reached = nn.functional.cross_entropy(model(images + uap.delta), labels)
    assert float(reached) <= float(max(values)) + 1e-5  # cross-entropy is convex: a corner is the maximum
    assert float(reached) >= 0.95 * float(max(values))
    assert math.isfinite(float(reached))


@pytest.mark.parametrize("norm", ["inf", "2", "1"])
def test_its_climb_is_the_one_solver_over_mini_batches_with_one_delta(trained, digits, norm):
    attack = StochasticPGD(eps=0.2, norm=norm, steps=6, batch_size=40)
    with Victim(trained, fast=True) as victim:
        split = digits.train.to(victim.device)
        context = CraftingContext(victims=[victim], train=split, validation=digits.validation, ball=attack.ball, seed=3)
        crafted = attack._run(context, context.start("sign", 1), [1])
        same = context.solver(attack.objective).run(context.start("sign", 1), context.stream(40, 1), attack.lengths)
    assert torch.equal(crafted, same)
    assert not torch.equal(crafted, context.start("sign", 1))


@pytest.mark.parametrize("settings", [{}, {"normalise": "sample"}, {"momentum": 0.9, "shrink": 0.3}], ids=str)
def test_starts_climbed_together_end_where_each_ends_alone(trained, digits, settings):
    attack = StochasticPGD(eps=0.2, steps=8, batch_size=20, **settings)
    with Victim(trained) as victim:
        split = digits.train.to(victim.device)
        context = CraftingContext(victims=[victim], train=split, validation=digits.validation, ball=attack.ball, seed=3)
        starts = [delta for _, delta in context.starts(4, None)]
        alone = [attack._run(context, delta, [k]) for k, delta in enumerate(starts)]
        before = victim.backwards
        together = attack._run(context, torch.cat(starts), range(4))
        assert victim.backwards - before == 4 * 8 * 20
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-4, rtol=0)
    assert float((together[1:] - together[:1]).abs().amax()) > 0.1  # restarts see other images and end elsewhere


@pytest.fixture
def asked(monkeypatch):
    """Images of every forward that a gradient is taken of."""
    sizes, plain = [], ProjectedGradient.gradient

    def counted(self, delta, images, *labels, **more):
        sizes.append(len(images))
        return plain(self, delta, images, *labels, **more)

    monkeypatch.setattr(ProjectedGradient, "gradient", counted)
    return sizes


CURVES = [
    {},
    {"norm": "2"},
    {"norm": "1"},
    {"shrink": 0.3, "restarts": 2},
    {"probe_starts": 0, "restarts": 3, "normalise": "sample"},
    {"momentum": 0.9, "tile": (4, 4), "target": 3},
]


@pytest.mark.parametrize("settings", quickly(CURVES, CURVES[0], CURVES[3]), ids=str)
def test_a_curve_is_crafted_as_one_eps_after_another(trained, digits, settings, asked):
    given = {"eps": 0.5, "steps": 4, "batch_size": 10, "probe_starts": 2, "probe_start_steps": 2, **settings}
    attack = StochasticPGD(**given)
    radii = [3.0, 1.0, 2.0] if attack.norm == "1" else [0.3, "1/10", 0.2]
    alone = []
    for eps in (1.0, 2.0, 3.0) if attack.norm == "1" else (0.1, 0.2, 0.3):
        start = alone[-1].delta if alone else None
        alone.append(StochasticPGD(**{**given, "eps": eps}).craft(trained, digits, seed=4, start=start))
    separate, asked[:] = asked.copy(), []
    curve = attack.craft_curve(trained, digits, radii, seed=4)
    assert sum(asked) == sum(separate)
    assert len(asked) == len(separate) - 2 * (attack.steps + attack.probe_start_steps * bool(attack.probe_starts))
    for one, other in zip(curve, alone, strict=True):
        assert torch.equal(one.delta, other.delta)
        assert one.about.restarts == other.about.restarts
        assert one.about.settings == other.about.settings
        assert one.about.backwards == other.about.backwards
        assert one.about.forwards <= other.about.forwards  # the temperature is fitted once
    assert [one.about.eps for one in curve] == [one.about.eps for one in alone]
    assert not torch.allclose(curve[1].delta, 2 * curve[0].delta, rtol=1e-3)


def test_a_curve_needs_radii(trained, digits):
    with pytest.raises(UserError, match="craft_curve got no eps"):
        StochasticPGD(eps=0.1).craft_curve(trained, digits, [])
    with pytest.raises(UserError, match="call craft_classes"):
        ClasswiseStochasticPGD(eps=0.1).craft_curve(trained, digits, [0.1])


@pytest.mark.parametrize(("kind", "sizes"), [("plain", [20] * 3), ("edits", [10] * 6), ("random", [10] * 6)])
def test_restarts_run_together_unless_their_draws_would_mix(trained, digits, asked, kind, sizes):
    edits = ("none", "shift:1") if kind == "edits" else ()
    attack = StochasticPGD(eps=0.2, steps=3, restarts=2, probe_starts=0, batch_size=10, edits=edits)
    model = nn.Sequential(Flicker(), trained) if kind == "random" else trained
    uap = attack.craft(model, digits)
    assert asked == sizes
    assert [kind for kind, _ in uap.about.restarts] == ["zero", "sign"]


def test_a_shrunk_attack_stays_off_the_corners():
    model, _ = binary((1, 4, 6))
    data = linear_data(model, (1, 4, 6), keep=0)
    settings = {"eps": 0.05, "steps": 40, "probe_starts": 0, "temperature": 1}
    corner, inner = (StochasticPGD(**settings, shrink=share).craft(model, data).delta for share in (0.0, 0.1))
    assert torch.equal(corner.sign(), inner.sign())
    assert torch.allclose(corner.abs(), torch.tensor(0.05))
    sizes = inner.abs() / 0.05
    assert 0.9 <= float(sizes.min()) < 0.93
    assert 0.97 < float(sizes.max()) < 1
    assert len(sizes.unique()) == sizes.numel()
    with pytest.raises(UserError, match="shrink is for norm 'inf', and the norm is '2'"):
        StochasticPGD(eps=1, norm="2", shrink=0.1)


def test_the_rate_that_a_strangers_attack_states_is_counted_again(digits, trained):
    class Liar(gb.attacks.UniversalAttack):
        def _search(self, context, start):
            yield gb.attacks.Candidate(start="nothing", delta=context.start("zero", 0), rate=1.0)

    uap = Liar(eps=0.1).craft(trained, digits)
    clean = 1 - gb.evaluation.accuracy(trained, digits.validation).value
    assert uap.about.restarts == [("nothing", pytest.approx(clean))]

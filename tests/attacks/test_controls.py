"""Patterns that know nothing of the model."""

import pytest
import torch
from torch import nn

import gambeson as gb
from gambeson import UserError
from gambeson.attacks import CONTROLS, MORE_CONTROLS, PGD, control
from gambeson.auditing import Suite
from gambeson.evaluation import control_rates
from gambeson.models import Thresholded
from gambeson.threat import Ball
from gambeson.victim import Victim


@pytest.mark.parametrize("norm", ["inf", "2", "1"])
@pytest.mark.parametrize("name", [name for name in CONTROLS | MORE_CONTROLS if name != "uniform"])
def test_every_control_fills_its_ball_and_comes_again(name, norm):
    ball, draws = Ball(eps=0.3, norm=norm), (CONTROLS | MORE_CONTROLS)[name]
    patterns = control(name, ball, (3, 8, 6), draws=draws, seed=1)
    assert patterns.shape == (draws, 3, 8, 6)
    torch.testing.assert_close(ball.length(patterns), torch.full((draws,), 0.3))
    different = len({tuple(pattern.flatten().tolist()) for pattern in patterns})
    assert different == draws or (name == "perlin" and different > 0.7 * draws)  # few pixels make few patterns
    assert torch.equal(patterns, control(name, ball, (3, 8, 6), draws=draws, seed=1))
    assert torch.equal(patterns[:1], control(name, ball, (3, 8, 6), seed=1))


def test_constant_shifts_are_all_signs_of_the_channels():
    shifts = control("constant-shift", Ball(eps=0.1), (3, 2, 2), draws=8)
    assert (shifts == shifts[:, :, :1, :1]).all()
    assert {tuple(shift[:, 0, 0].sign().tolist()) for shift in shifts} == {
        (a, b, c) for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)
    }
    assert (shifts[0] < 0).all()
    grey = control("constant-shift", Ball(eps=0.1), (1, 2, 2), draws=8)
    assert grey[:, 0, 0, 0].tolist() == pytest.approx([-0.1, 0.1])  # there are no more than two


def test_stripes_have_their_periods():
    stripes = control("stripes", Ball(eps=0.1), (2, 8, 8), draws=4)
    rows, columns, wide_rows, wide_columns = (one[0].sign() for one in stripes)
    assert rows[:, 0].tolist() == [-1, 1] * 4
    assert wide_rows[:, 0].tolist() == [-1, -1, 1, 1] * 2
    assert (rows == rows[:, :1]).all()
    assert (wide_rows == wide_rows[:, :1]).all()
    assert torch.equal(columns, rows.T)
    assert torch.equal(wide_columns, wide_rows.T)
    assert torch.equal(stripes[:, 0], stripes[:, 1])


def test_a_model_that_a_brightness_breaks_is_broken_by_the_shift_alone(digits):
    class Bright(nn.Module):
        """Class 0 for a dark image, class 1 for a bright one."""

        def forward(self, x):
            level = x.mean((1, 2, 3)) - 0.5
            return torch.stack([-level, level], 1)

    x = torch.rand(60, 1, 6, 6, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.4
    x[:, :, 0, 0], x[:, :, 1, 1] = 0.0, 1.0  # some pixels are black or white
    split = gb.data.Split("dark", x, torch.zeros(60, dtype=torch.long), ("dark", "bright"))
    with Victim(Bright()) as victim:
        shift, stripes, board = control_rates(
            victim, split, Ball(eps=0.1), 0, ("constant-shift", "stripes", "chessboard")
        )
    assert (shift.worst.value, shift.mean, shift.draws) == (1, 0.5, 2)
    assert (shift.worst.candidates, board.worst.candidates) == (2, 1)
    assert stripes.worst.value == board.worst.value == 0
    with pytest.raises(UserError, match="unknown control 'stripe': did you mean stripes"):
        Suite(controls=("stripe",))


def test_the_best_of_many_perlin_patterns_is_the_worst_for_the_model(digits, trained):
    with Victim(trained) as victim:
        (noise,) = control_rates(victim, digits.test.subset(torch.arange(100)), Ball(eps=0.3), 0, ("perlin",))
    assert noise.draws == noise.worst.candidates == 100
    assert noise.worst.value > noise.mean + 0.05


def test_a_threshold_withstands_what_moves_no_pixel_across(digits, trained):
    x, y = digits.test.take(slice(0, 40))
    black_and_white = (x > 0.5).float()
    model = Thresholded(trained)
    assert torch.equal(model(black_and_white), trained(black_and_white))
    for eps, same in ((0.45, True), (0.6, False)):
        moved = PGD(eps=eps, steps=5)(model, black_and_white, y)
        assert torch.equal(model(moved), model(black_and_white)) == same
    point = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(point).logsumexp(1).sum(), point)
    assert gradient.any()
    with pytest.raises(UserError, match="threshold = 1: expected a pixel value between 0 and 1"):
        Thresholded(trained, 1.0)

"""Procedural noise: the patterns by their definitions, the search by its budget."""

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gambeson as gb
from gambeson import UserError
from gambeson.attacks import control
from gambeson.attacks.universal.procedural import (
    LATTICE,
    GaborNoise,
    PerlinNoise,
    gabor,
    gabor_kernel,
    gradient_noise,
    hashed,
    kernel_width,
    perlin,
    stretched,
)
from gambeson.threat import Ball
from tests.conftest import inner_images


def test_hash_is_the_same_on_every_machine_and_spreads():
    assert hashed(1, 2, 3).item() == 1041985716
    many = hashed(7, torch.arange(4096))
    assert len(many.unique()) == 4096
    bits = (many.view(-1, 1) >> torch.arange(32)) & 1
    assert ((bits.float().mean(0) - 0.5).abs() < 0.05).all()


def test_gradient_noise_is_zero_on_the_lattice_and_periodic():
    cells = torch.arange(-5, 6, dtype=torch.float64)
    assert not gradient_noise(cells.view(1, -1), cells.view(-1, 1), 3).any()
    x = torch.linspace(0, 7, 40, dtype=torch.float64)
    here = gradient_noise(x.view(1, -1), x.view(-1, 1), 3)
    assert here.abs().max() > 0.1
    assert here.abs().max() <= 1
    torch.testing.assert_close(gradient_noise(x.view(1, -1) + LATTICE, x.view(-1, 1) - LATTICE, 3), here)
    assert not torch.equal(gradient_noise(x.view(1, -1), x.view(-1, 1), 4), here)
    steps = torch.linspace(0.999, 1.001, 21, dtype=torch.float64)
    assert gradient_noise(steps, steps * 0 + 0.3, 3).diff().abs().max() < 1e-3  # no jump between cells


@given(
    st.tuples(st.integers(4, 40), st.integers(4, 40)),
    st.floats(2, 20),
    st.integers(1, 4),
    st.floats(0, 32),
    st.integers(0, 2**32 - 1),
)
def test_perlin_fills_zero_to_one_and_repeats(size, period, octaves, frequency, seed):
    pattern = perlin(size, period=period, octaves=octaves, frequency=frequency, seed=seed)
    assert pattern.shape == size
    assert float(pattern.min()) == 0
    assert float(pattern.max()) == 1
    assert torch.equal(pattern, perlin(size, period=period, octaves=octaves, frequency=frequency, seed=seed))


def test_one_octave_without_sine_is_the_noise_and_octaves_add_up():
    axis = torch.arange(16, dtype=torch.float64) / 6
    first = gradient_noise(axis.view(1, -1), axis.view(-1, 1), hashed(5, 0))
    second = gradient_noise(2 * axis.view(1, -1), 2 * axis.view(-1, 1), hashed(5, 1))
    torch.testing.assert_close(perlin((16, 16), period=6, seed=5), stretched(first))
    torch.testing.assert_close(perlin((16, 16), period=6, octaves=2, seed=5), stretched(first + second / 2))
    assert torch.equal(stretched(torch.ones(2, 2)), torch.full((2, 2), 0.5))


def test_gabor_kernel_by_hand_and_noise_is_their_sum():
    kernel = gabor_kernel(9, sigma=3.0, orientation=0.0, wavelength=4.0)
    assert kernel[4, 4] == 1
    assert float(kernel[4, 6]) == pytest.approx(-float(torch.exp(torch.tensor(-4 / 18))), rel=1e-6)
    assert float(kernel[6, 4]) == pytest.approx(float(torch.exp(torch.tensor(-4 / 18))), rel=1e-6)
    turned = gabor_kernel(9, sigma=3.0, orientation=torch.pi / 2, wavelength=4.0)
    torch.testing.assert_close(turned, kernel.T)
    assert (kernel_width((32, 32)), kernel_width((299, 299)), kernel_width((8, 8))) == (9, 23, 9)
    pattern = gabor((20, 24), sigma=3.0, orientation=0.7, wavelength=5.0, seed=4)
    assert pattern.shape == (20, 24)
    assert (float(pattern.min()), float(pattern.max())) == (0, 1)
    assert torch.equal(pattern, gabor((20, 24), sigma=3.0, orientation=0.7, wavelength=5.0, seed=4))
    assert not torch.equal(pattern, gabor((20, 24), sigma=3.0, orientation=0.7, wavelength=5.0, seed=5))


def test_impulses_that_meet_add_up():
    # A cell of one pixel holds all impulses of it; with a kernel of one pixel the noise is their sum.
    from gambeson.attacks.universal.procedural import unit

    pattern = gabor((3, 5), sigma=1.0, orientation=0.0, wavelength=5.0, width=1, grid=1, impulses=4, seed=9)
    down, across, point = torch.arange(3).view(-1, 1, 1), torch.arange(5).view(1, -1, 1), torch.arange(4)
    expected = (unit(9, down, across, point, 2) * 2 - 1).sum(-1)
    torch.testing.assert_close(pattern, stretched(expected))


class Stripes(nn.Module):
    """Says 1 where the image changes more than twice as fast along rows as along columns; has no gradient at all."""

    queries = 0

    def forward(self, x):
        self.queries += len(x)
        along, across = (x.diff(dim=dim).abs().mean(dim=(1, 2, 3)) for dim in (3, 2))
        return torch.stack([2 * across + 0.01, along], 1).mul(1000).round().detach()


@pytest.mark.parametrize("attack", [PerlinNoise, GaborNoise], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("search", ["random", "evolution", "bayesian"])
def test_budget_is_exact_no_gradient_is_needed_and_runs_repeat(attack, search, trained, digits):
    searching = attack(eps=0.2, patterns=12, images=50, finalists=3, search=search)
    uap = searching.craft(trained, digits, seed=1)
    assert set(uap.delta.abs().unique().tolist()) == {float(searching.ball.fill(torch.ones(1, 1, 1, 1)))}
    assert uap.about.backwards == 0
    assert uap.about.forwards == 12 * 50 + 3 * len(digits.validation)
    assert len(uap.about.restarts) == 3
    chosen = gb.evaluation.universal_evasion(trained, digits.validation, uap).value
    assert chosen == max(rate for _, rate in uap.about.restarts)
    assert torch.equal(uap.delta, searching.craft(trained, digits, seed=1).delta)
    clean = gb.evaluation.accuracy(trained, digits).complement
    assert gb.evaluation.universal_evasion(trained, digits, uap).low > clean.high
    flat = searching.model_copy(update={"norm": "2", "eps": 1.0}).craft(trained, digits)
    assert float(flat.delta.norm()) == pytest.approx(1, rel=1e-5)
    assert not searching.model_copy(update={"eps": 0}).craft(trained, digits).delta.any()


def test_search_finds_the_stripes_of_a_model_without_gradients():
    model = Stripes()
    x = inner_images(100, (1, 12, 12)) / 10 + 0.45
    data = gb.data.as_dataset((x, torch.arange(100) % 2))
    uap = GaborNoise(eps=0.1, patterns=60, images=20, target=1).craft(model, data)
    assert max(rate for _, rate in uap.about.restarts) == 1.0
    assert model.queries == uap.about.forwards + 40  # the first look: 8 images five times


@pytest.mark.full
def test_evolution_is_no_worse_than_random_search_on_average(trained, digits):
    def best(search):
        rates = []
        for seed in range(4):
            uap = PerlinNoise(eps=0.15, patterns=45, images=200, search=search).craft(trained, digits, seed=seed)
            rates.append(max(rate for _, rate in uap.about.restarts))
        return sum(rates) / len(rates)

    assert best("evolution") >= best("random") - 0.02


def test_given_start_is_a_candidate_and_settings_are_checked(trained, digits):
    board = control("chessboard", Ball(eps=0.1), digits.test.shape)
    uap = PerlinNoise(eps=0.2, patterns=2, images=10).craft(trained, digits, start=board)
    assert uap.about.restarts[-1][0] == "given"
    with pytest.raises(UserError, match="target 10 is not a class"):
        PerlinNoise(eps=0.2, target=10).craft(trained, digits)
    with pytest.raises(UserError, match="patterns = 0"):
        PerlinNoise(eps=0.2, patterns=0)


def test_uniform_control_lies_in_the_ball_and_is_weaker_than_its_surface():
    for norm in ("inf", "2"):
        ball = Ball(eps=0.3, norm=norm)
        draws = control("uniform", ball, (3, 4, 6), draws=5, seed=1)
        assert draws.shape == (5, 3, 4, 6)
        assert (ball.length(draws) <= 0.3 + 1e-6).all()
        assert torch.equal(draws, control("uniform", ball, (3, 4, 6), draws=5, seed=1))
        assert not torch.equal(draws[0], draws[1])


def test_patterns_have_not_changed():
    # Signs are far from ties here, so that these digests hold on every machine.
    perl = perlin((16, 16), period=5.0, octaves=2, frequency=6.0, seed=11) >= 0.5
    gab = gabor((16, 16), sigma=3.0, orientation=0.7, wavelength=5.0, sides=2, seed=11) >= 0.5
    assert [hashlib.sha256(bytes(one.flatten().tolist())).hexdigest()[:12] for one in (perl, gab)] == [
        "3a637dc2824c",
        "bf5c51d0a7a2",
    ]

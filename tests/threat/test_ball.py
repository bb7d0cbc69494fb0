import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq

from gambeson import UserError
from gambeson.threat import Ball, default_eps, norm_of_ones
from tests.conftest import inner_images, shaded_images

shapes = st.tuples(st.integers(1, 4), st.sampled_from([1, 3]), st.integers(1, 5), st.integers(1, 7))
norms = st.sampled_from(["inf", "2", "1"])
radii = st.floats(0, 1, allow_nan=False)


def draw(shape, seed, scale=2.0):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1) * scale


@given(shapes, norms, radii, st.integers(0, 99))
def test_projection_is_the_nearest_point_of_the_ball(shape, norm, eps, seed):
    ball, delta = Ball(eps=eps, norm=norm), draw(shape, seed)
    projected = ball.project(delta)
    assert (ball.length(projected) <= eps * (1 + 1e-6) + 1e-12).all()
    torch.testing.assert_close(ball.project(projected), projected)
    inside = ball.length(delta) <= eps
    assert torch.equal(projected[inside], delta[inside])
    other = ball.uniform(delta.shape, torch.Generator().manual_seed(seed + 1))
    near, far = (projected - delta).flatten(1).norm(dim=1), (other - delta).flatten(1).norm(dim=1)
    assert (near <= far + 1e-5).all()


@given(shapes, norms, radii, st.integers(0, 99))
def test_draws_lie_in_the_ball_and_fill_reaches_its_surface(shape, norm, eps, seed):
    ball, generator = Ball(eps=eps, norm=norm), torch.Generator().manual_seed(seed)
    assert (ball.length(ball.uniform(shape, generator)) <= eps * (1 + 1e-6)).all()
    torch.testing.assert_close(ball.length(ball.signs(shape, generator)), torch.full((shape[0],), eps))


@given(shapes, norms, st.integers(0, 99))
def test_steepest_direction_beats_every_other_of_unit_norm(shape, norm, seed):
    ball, gradient = Ball(eps=1, norm=norm), draw(shape, seed)
    best = ball.steepest(gradient)
    assert (ball.length(best) <= 1 + 1e-5).all()
    gain = (best * gradient).flatten(1).sum(1)
    dual = gradient.flatten(1).norm(p={"inf": 1, "2": 2, "1": float("inf")}[norm], dim=1)
    torch.testing.assert_close(gain, dual)


def test_a_zero_gradient_gives_no_direction():
    for norm in ("inf", "2", "1"):
        assert not Ball(eps=1, norm=norm).steepest(torch.zeros(2, 1, 3, 3)).any()
    ball, flat, ones = Ball(eps=1, norm="1"), torch.zeros(2, 1, 3, 3), torch.ones(2, 1, 3, 3)
    for sparsity in (None, 0.3):
        assert not ball.step_in_box(flat, 1.0, ones, sparsity).any()
        assert not ball.step_in_box(ones, 1.0, flat, sparsity).any()


def test_uniform_l2_draws_are_not_all_on_the_surface():
    lengths = Ball(eps=1, norm="2").length(
        Ball(eps=1, norm="2").uniform((2000, 1, 1, 2), torch.Generator().manual_seed(0))
    )
    assert abs(float((lengths < math.sqrt(0.5)).float().mean()) - 0.5) < 0.05  # half the disc's area


def test_uniform_l1_draws_have_the_length_and_the_spread_of_the_volume():
    draws = Ball(eps=2, norm="1").uniform((4000, 1, 1, 3), torch.Generator().manual_seed(0))
    lengths = Ball(eps=2, norm="1").length(draws)
    assert abs(float((lengths < 2 * 0.5 ** (1 / 3)).float().mean()) - 0.5) < 0.05  # half of the octahedron's volume
    assert (draws.mean(0).abs() < 0.05).all()
    assert draws.abs().mean(0).flatten().tolist() == [pytest.approx(0.5, abs=0.05)] * 3  # eps / (D + 1)


def test_l1_projection_by_hand():
    ball = Ball(eps=3, norm="1")
    delta = torch.tensor([3.0, -2.0, 0.5, 1.0]).view(1, 1, 2, 2)
    torch.testing.assert_close(ball.project(delta).flatten(), torch.tensor([2.0, -1.0, 0.0, 0.0]), rtol=0, atol=1e-6)
    low, high = torch.full_like(delta, -4.0), torch.tensor([1.0, 9.0, 9.0, 9.0]).view_as(delta)
    found = ball.project_in_box(delta, low, high).flatten()
    torch.testing.assert_close(
        found, torch.tensor([1.0, -1.5, 0.0, 0.5]), rtol=0, atol=1e-6
    )  # first at its bound, then shift by 0.5


scales = st.just(0.0) | st.floats(1e-6, 5)  # not so small that some operations round to zero and others do not


@given(st.integers(1, 3), st.integers(1, 40), norms, st.floats(0.01, 3), scales, st.integers(0, 99))
def test_projection_on_ball_and_box_is_the_nearest_point_of_both(rows, size, norm, eps, scale, seed):
    draws = torch.Generator().manual_seed(seed)
    images = torch.rand(rows, 1, 1, size, generator=draws).round(decimals=1)
    delta = torch.randn(rows, 1, 1, size, generator=draws) * scale
    ball = Ball(eps=min(eps, 1.0), norm=norm)
    found = ball.project_in_box(delta, -images, 1 - images)
    assert (ball.length(found) <= ball.eps * (1 + 1e-5)).all()
    assert ((images + found >= -1e-6) & (images + found <= 1 + 1e-6)).all()
    torch.testing.assert_close(ball.project_in_box(found, -images, 1 - images), found, rtol=1e-4, atol=1e-5)
    plain = ball.project(delta)
    free = ((images + plain >= 0) & (images + plain <= 1)).flatten(1).all(1)
    assert torch.equal(found[free], plain[free])  # to the bit
    # Nearest: no allowed point may lie beyond the plane through it (the variational inequality).
    for _ in range(5):
        other = ball.uniform(delta.shape, draws)
        other = torch.minimum(torch.maximum(other, -images), 1 - images)
        assert (((delta - found) * (other - found)).flatten(1).sum(1) <= 1e-4 * (1 + scale)).all()


@given(st.integers(1, 30), st.floats(0.1, 4), st.integers(0, 99))
def test_l1_step_in_a_box_is_the_best_of_its_length(size, length, seed):
    draws = torch.Generator().manual_seed(seed)
    gradient, room = torch.randn(1, 1, 1, size, generator=draws), torch.rand(1, 1, 1, size, generator=draws)
    step = Ball(eps=1, norm="1").step_in_box(gradient, length, room)
    assert float(step.abs().sum()) == pytest.approx(min(length, float(room.sum())), abs=1e-5)
    assert (step.abs() <= room + 1e-6).all()
    gain = float((step * gradient).sum())
    for _ in range(20):
        other = torch.rand(gradient.shape, generator=draws) * room * gradient.sign()
        other = other * min(1.0, length / float(other.abs().sum()))
        assert float((other * gradient).sum()) <= gain + 1e-5


def test_sparse_steps_move_the_largest_values_that_have_room_equally():
    gradient = torch.tensor([5.0, -4.0, 3.0, 0.1]).view(1, 1, 2, 2)
    room = torch.tensor([0.0, 1.0, 1.0, 1.0]).view_as(gradient)
    step = Ball(eps=1, norm="1").step_in_box(gradient, 0.6, room, sparsity=0.5)
    torch.testing.assert_close(step.flatten(), torch.tensor([0.0, -0.3, 0.3, 0.0]))


@pytest.mark.parametrize(
    ("eps", "words"),
    [
        (-0.1, "greater than or equal to 0"),
        (float("nan"), "not a finite number"),
        ("8/0", "divides by zero"),
        ("eight", "write 0.1 or a fraction such as 8/255"),
        (8, "did you mean 8/255?"),
        ("8", "did you mean 8/255?"),
        ("300/255", "at most 1, because pixels are in [0, 1]$"),
        (1000, "at most 1, because pixels are in [0, 1]$"),
    ],
)
def test_bad_radii_are_refused_with_their_reason(eps, words):
    with pytest.raises(UserError, match=re.escape(words).replace(r"\$", "$")):
        Ball(eps=eps)


def test_radii_as_text_and_norms_as_numbers():
    assert Ball(eps="8/255").eps == 8 / 255
    assert Ball(eps=3, norm=2) == Ball(eps="3", norm="l2")
    assert Ball(eps=12, norm=1) == Ball(eps="12", norm="L1")
    with pytest.raises(TypeError, match="no setting 'epsilon'"):
        Ball(epsilon=0.1)


@pytest.mark.parametrize("norm", ["inf", "2", "1"])
def test_uniform_draws_fill_the_whole_ball_evenly(norm):
    """P(length <= r) = (r / eps)^D in every norm, and each value is symmetric."""
    drawn = Ball(eps=0.3, norm=norm).uniform((4000, 1, 1, 2), torch.Generator().manual_seed(0)).double()
    share = (Ball(eps=0.3, norm=norm).length(drawn) / 0.3).square().sort().values
    at = torch.arange(1, 4001) / 4000
    assert float((share - at).abs().max()) < 1.95 / 4000**0.5  # Kolmogorov-Smirnov, one in a thousand
    assert (drawn.flatten(1).mean(0).abs() < 4 * drawn.flatten(1).std(0) / 4000**0.5).all()


@pytest.mark.parametrize("eps", [0.1, 0.3, 8 / 255, 16 / 255])
def test_no_value_is_above_eps_in_exact_arithmetic(eps):
    """0.1 lies between two float32 numbers; the upper one is outside the ball."""
    ball, draw = Ball(eps=eps), torch.Generator().manual_seed(0)
    far = torch.randn(3, 1, 4, 4, generator=draw) * 10
    for found in (ball.project(far), ball.fill(far.sign()), ball.signs(far.shape, draw)):
        assert float(found.double().abs().max()) <= eps
        assert float(found.double().abs().max()) > eps * (1 - 2e-7)


@pytest.mark.parametrize("ratio", [0.0, 1.0, 10.0, 40.0])
def test_a_step_of_norm_2_is_spent_on_the_values_that_can_move(ratio):
    """These have its length while the others' gradient is at most twenty times as long; then all of it has twenty."""
    free, stuck = torch.tensor([0.6, -0.8, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0, 0.0]) * ratio
    room = torch.tensor([0.5, 0.5, 0.0, 0.0]).view(1, 1, 2, 2)
    step = Ball(eps=1.0, norm="2").step_in_box((free + stuck).view(1, 1, 2, 2), 0.3, room).flatten()
    scale = min(1.0, 20 / (1 + ratio**2) ** 0.5)
    torch.testing.assert_close(step, 0.3 * scale * (free + stuck))


@pytest.mark.parametrize("norm", ["1", "2"])
def test_projection_on_ball_and_box_is_that_of_a_root_search(norm):
    """min((|z| - t)+, room) or min(s |z|, room), with the t or s that spends the radius, found in double precision."""
    draws = torch.Generator().manual_seed(0)
    images = shaded_images(60, (1, 5, 8))
    delta = torch.randn(images.shape, generator=draws) * torch.logspace(-1, 1, 60).view(-1, 1, 1, 1)
    eps = 6.0 if norm == "1" else 2.0
    found = Ball(eps=eps, norm=norm).project_in_box(delta, -images, 1 - images)
    size, room = delta.abs().flatten(1).double(), torch.where(delta > 0, 1 - images, images).flatten(1).double()
    for k in range(60):

        def moved(share, size=size[k], room=room[k]):
            kept = (size - share * size.max()).clamp(min=0) if norm == "1" else (1 - share) * size
            return kept.minimum(room)

        def excess(share, moved=moved):
            return float(moved(share).norm(p=float(norm))) - eps

        share = brentq(excess, 0, 1, xtol=1e-15) if excess(0) > 0 else 0.0
        torch.testing.assert_close(
            found[k].flatten().double(), moved(share) * delta[k].flatten().sign(), rtol=1e-4, atol=1e-6
        )
    assert int((Ball(eps=eps, norm=norm).length(found) > eps * (1 - 1e-5)).sum()) > 30


@pytest.mark.parametrize("norm", ["1", "2"])
def test_where_the_box_does_not_bind_the_projection_is_that_onto_the_ball_to_the_bit(norm):
    images, ball = inner_images(40, (1, 5, 8)), Ball(eps=0.3, norm=norm)
    delta = draw(images.shape, 0) * torch.logspace(-3, 1, 40).view(-1, 1, 1, 1)
    plain = ball.project(delta)
    assert bool(((images + plain > 0) & (images + plain < 1)).all())
    assert 10 < int((plain != delta).flatten(1).any(1).sum()) < 40
    assert torch.equal(ball.project_in_box(delta, -images, 1 - images), plain)


def test_default_radii():
    """Of norm 2 the same share of the diagonal as that of the side, quartered."""
    assert default_eps((1, 28, 28)) == 0.2
    assert default_eps((3, 32, 32)) == 8 / 255
    assert default_eps((1, 28, 28), "2") == pytest.approx(0.2 * 28 / 4)
    assert default_eps((3, 32, 32), "2") == pytest.approx(8 / 255 * 3072**0.5 / 4, abs=1e-3)
    with pytest.raises(UserError, match="no customary eps for the norm 1"):
        default_eps((1, 28, 28), "1")


@pytest.mark.parametrize("norm", ["inf", "2", "1"])
def test_the_ball_of_the_norm_of_ones_holds_every_image_and_no_smaller_one_does(norm):
    ones, radius = torch.ones(1, 3, 8, 8), norm_of_ones(norm, (3, 8, 8))
    assert torch.allclose(Ball(eps=radius, norm=norm).project(ones), ones)
    assert float(Ball(eps=0.99 * radius, norm=norm).project(ones).max()) == pytest.approx(0.99, rel=1e-5)

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gambeson import UserError
from gambeson.threat import Ball

shapes = st.tuples(st.integers(1, 4), st.sampled_from([1, 3]), st.integers(1, 5), st.integers(1, 7))
norms = st.sampled_from(["inf", "2"])
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
    dual = gradient.flatten(1).norm(p=1 if norm == "inf" else 2, dim=1)
    torch.testing.assert_close(gain, dual)


def test_a_zero_gradient_gives_no_direction():
    for norm in ("inf", "2"):
        assert not Ball(eps=1, norm=norm).steepest(torch.zeros(2, 1, 3, 3)).any()


def test_uniform_l2_draws_are_not_all_on_the_surface():
    lengths = Ball(eps=1, norm="2").length(
        Ball(eps=1, norm="2").uniform((2000, 1, 1, 2), torch.Generator().manual_seed(0))
    )
    assert abs(float((lengths < math.sqrt(0.5)).float().mean()) - 0.5) < 0.05  # half the disc's area


@pytest.mark.parametrize(
    ("eps", "words"),
    [
        (-0.1, "greater than or equal to 0"),
        (float("nan"), "not a finite number"),
        ("8/0", "divides by zero"),
        ("eight", "write 0.1 or a fraction such as 8/255"),
        (8, "did you mean 8/255?"),
        ("8", "did you mean 8/255?"),
    ],
)
def test_bad_radii_are_refused_with_their_reason(eps, words):
    with pytest.raises(UserError, match=words.replace("?", r"\?")):
        Ball(eps=eps)


def test_radii_as_text_and_norms_as_numbers():
    assert Ball(eps="8/255").eps == 8 / 255
    assert Ball(eps=3, norm=2) == Ball(eps="3", norm="l2")
    with pytest.raises(TypeError, match="no setting 'epsilon'"):
        Ball(epsilon=0.1)

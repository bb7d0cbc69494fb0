import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gambeson import UserError
from gambeson.threat import perturb


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))
def test_heaps_share_and_the_gradient_is_the_sum_of_the_heap(heaps, size, seed):
    draw = torch.Generator().manual_seed(seed)
    images = torch.rand(heaps * size, 2, 3, 5, generator=draw)
    delta = (torch.rand(heaps, 2, 3, 5, generator=draw) - 0.5).requires_grad_()
    moved = perturb(images, delta)
    each = delta.detach().repeat_interleave(size, 0).requires_grad_()
    expected = (images + each).clamp(0, 1)
    assert torch.equal(moved, expected)
    weight = torch.rand(moved.shape, generator=draw)
    (shared,) = torch.autograd.grad((moved * weight).sum(), delta)
    (alone,) = torch.autograd.grad((expected * weight).sum(), each)
    torch.testing.assert_close(shared, alone.unflatten(0, (heaps, size)).sum(1))


def test_zero_changes_no_bit_and_everything_stays_in_the_box():
    images = torch.rand(6, 1, 2, 3)
    for kind in ("exact", "straight-through"):
        assert torch.equal(perturb(images, torch.zeros(1, 1, 2, 3), kind), images)
        moved = perturb(images, torch.full((1, 1, 2, 3), 5.0), kind)
        assert torch.equal(moved, torch.ones_like(images))


def test_straight_through_passes_the_gradient_that_the_clip_takes():
    images = torch.zeros(1, 1, 1, 2)
    for kind, expected in (("exact", [0.0, 1.0]), ("straight-through", [1.0, 1.0])):
        delta = torch.tensor([[[[-0.5, 0.5]]]], requires_grad=True)
        (gradient,) = torch.autograd.grad(perturb(images, delta, kind).sum(), delta)
        assert gradient.flatten().tolist() == expected


def test_pixels_exactly_black_or_white_have_a_gradient():
    # torch.clamp takes it from them since torch 2.15; an attack could then never move them.
    images = torch.tensor([[[[0.0, 1.0, 0.5]]]])
    for rows in (1, 2):
        delta = torch.zeros(rows, 1, 1, 3, requires_grad=True)
        (gradient,) = torch.autograd.grad(perturb(images.repeat(4, 1, 1, 1), delta).sum(), delta)
        assert torch.equal(gradient, torch.full_like(gradient, 4 / rows))


def test_heaps_that_do_not_divide_the_images_are_refused():
    with pytest.raises(UserError, match="4 perturbations cannot be shared evenly by 6 images"):
        perturb(torch.rand(6, 1, 2, 2), torch.zeros(4, 1, 2, 2))

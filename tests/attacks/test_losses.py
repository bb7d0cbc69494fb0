import math

import pytest
import torch
import torch.nn.functional as F

from gambeson.attacks import Loss, cross_entropy, margin
from gambeson.attacks.losses import fallen, image_means


def test_truncation_acts_on_each_answer_and_kills_its_gradient():
    logits = torch.tensor([[0.0, 3.0], [0.0, -3.0]], requires_grad=True)
    labels = torch.tensor([0, 0])
    value = Loss(truncate=-math.log(0.2))(logits, labels)
    assert value.tolist() == [pytest.approx(-math.log(0.2)), pytest.approx(math.log1p(math.exp(-3)))]
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert not gradient[0].any()
    assert gradient[1].any()


def test_targeted_loss_rises_to_the_target_down_to_its_floor():
    logits = torch.tensor([[0.0, 9.0], [9.0, 0.0]], requires_grad=True)
    value = Loss(targeted=True, truncate=0.05)(logits, torch.tensor([1, 1]))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert not gradient[0].any()
    assert gradient[1, 1] > 0 > gradient[1, 0]


def test_margin_by_hand_and_its_sign():
    logits = torch.tensor([[1.0, 4.0, 2.0], [5.0, 1.0, 0.0]])
    assert margin(logits, torch.tensor([0, 0])).tolist() == [3.0, -4.0]
    assert fallen(logits, torch.tensor([0, 0])).tolist() == [True, False]
    assert fallen(logits, torch.tensor([1, 1]), targeted=True).tolist() == [True, False]


def test_pixels_average_over_labelled_ones_only():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 2, 5, generator=draw)
    labels = torch.randint(0, 4, (3, 2, 5), generator=draw)
    labels[0, :, 1:] = 255
    labels[2] = 255
    for loss in (cross_entropy, margin):
        answers = loss(logits, labels, 255)
        means = image_means(answers, labels, 255)
        for n in range(3):
            cells = [(i, j) for i in range(2) for j in range(5) if labels[n, i, j] != 255]
            alone = [loss(logits[n, :, i, j][None], labels[n, i, j][None]) for i, j in cells]
            expected = sum(float(value) for value in alone) / len(cells) if cells else 0.0
            assert float(means[n]) == pytest.approx(expected, abs=1e-5)


def test_cross_entropy_is_torch_s():
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    assert torch.equal(cross_entropy(logits, labels), F.cross_entropy(logits, labels, reduction="none"))

import math

import pytest
import torch
import torch.nn.functional as F

from gambeson.attacks import Loss, cross_entropy, margin
from gambeson.attacks.losses import dlr, target_margin, targeted_dlr
from gambeson.tasks import CLASSIFICATION, Segmentation


def test_truncation_acts_on_each_answer_and_kills_its_gradient():
    logits = torch.tensor([[0.0, 3.0], [0.0, -3.0]], requires_grad=True)
    labels = torch.tensor([0, 0])
    value = Loss(truncate=-math.log(0.2))(logits, labels)
    assert value.tolist() == [pytest.approx(-math.log(0.2)), pytest.approx(math.log1p(math.exp(-3)))]
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert not gradient[0].any()
    assert gradient[1].any()


def test_truncation_can_spare_answers_that_are_still_right():
    logits = torch.zeros(2, 10)
    logits[:, 0] = 0.1  # the likeliest of ten, at 11 %
    logits.requires_grad_()
    for spared, moving in ((False, [False, False]), (True, [True, False])):
        loss = Loss(truncate=-math.log(0.2), truncate_correct=not spared)
        (gradient,) = torch.autograd.grad(loss(logits, torch.tensor([0, 1])).sum(), logits)
        assert gradient.any(1).tolist() == moving


def test_targeted_loss_rises_to_the_target_down_to_its_floor():
    logits = torch.tensor([[0.0, 9.0], [9.0, 0.0]], requires_grad=True)
    value = Loss(targeted=True, truncate=0.05)(logits, torch.tensor([1, 1]))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert not gradient[0].any()
    assert gradient[1, 1] > 0 > gradient[1, 0]


def test_margin_by_hand_and_its_sign():
    logits = torch.tensor([[1.0, 4.0, 2.0], [5.0, 1.0, 0.0]])
    assert margin(logits, torch.tensor([0, 0])).tolist() == [3.0, -4.0]


def test_pixels_average_over_labelled_ones_only():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 2, 5, generator=draw)
    labels = torch.randint(0, 4, (3, 2, 5), generator=draw)
    labels[0, :, 1:] = 255
    labels[2] = 255
    for loss, kind in ((cross_entropy, "cross-entropy"), (margin, "margin"), (dlr, "dlr")):
        means = Loss(kind=kind)(logits, labels, Segmentation(ignore_index=255))
        for n in range(3):
            cells = [(i, j) for i in range(2) for j in range(5) if labels[n, i, j] != 255]
            alone = [loss(logits[n, :, i, j][None], labels[n, i, j][None]) for i, j in cells]
            expected = sum(float(value) for value in alone) / len(cells) if cells else 0.0
            assert float(means[n]) == pytest.approx(expected, abs=1e-5)


def test_cross_entropy_is_torch_s():
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    assert torch.equal(cross_entropy(logits, labels), F.cross_entropy(logits, labels, reduction="none"))


def test_ratios_by_hand():
    logits, labels = torch.tensor([[5.0, 1.0, 4.0, 3.0, -2.0], [0.0, 1.0, 2.0, 4.0, 8.0]]), torch.tensor([0, 1])
    assert dlr(logits, labels).tolist() == [pytest.approx(-(5 - 4) / (5 - 3)), pytest.approx((8 - 1) / (8 - 2))]
    targets = torch.tensor([2, 3])
    expected = [(4 - 5) / (5 - (3 + 1) / 2), (4 - 1) / (8 - (2 + 1) / 2)]
    assert targeted_dlr(logits, targets, labels).tolist() == [pytest.approx(value) for value in expected]
    assert target_margin(logits, targets, labels).tolist() == [-1.0, 3.0]
    best_other = [(4 - 5) / (5 - (3 + 1) / 2), (4 - 8) / (8 - (2 + 1) / 2)]
    assert targeted_dlr(logits, targets).tolist() == [pytest.approx(value) for value in best_other]


def test_ratios_ignore_shift_and_scale_of_the_logits():
    logits = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(20) % 6
    for loss in (Loss(kind="dlr"), Loss(kind="dlr", targeted=True)):
        torch.testing.assert_close(loss(1000 * logits + 7, labels), loss(logits, labels))
    assert torch.equal(Loss(kind="dlr")(logits, labels) > 0, logits.argmax(1) != labels)


@pytest.mark.parametrize("kind", ["cross-entropy", "margin", "dlr"])
def test_every_targeted_loss_rises_with_the_target_s_logit_and_falls_with_the_truth_s(kind):
    draw = torch.Generator().manual_seed(1)
    logits, targets = torch.randn(30, 7, generator=draw), torch.arange(30) % 7
    truth = (targets + 3) % 7
    value = Loss(kind=kind, targeted=True)(logits, targets, CLASSIFICATION, truth)
    for step, classes in ((1e-3, targets), (-1e-3, truth)):
        moved = logits.scatter_add(1, classes[:, None], torch.full((30, 1), step))
        grown = Loss(kind=kind, targeted=True)(moved, targets, CLASSIFICATION, truth) - value
        assert (grown > 0).float().mean() > 0.85  # the ratio's scale moves a few the other way


def test_losses_that_need_more_classes_say_what_takes_their_place():
    assert [Loss(kind="dlr").used(classes) for classes in (2, 3)] == ["margin", "dlr"]
    assert [Loss(kind="dlr", targeted=True).used(classes) for classes in (3, 4)] == ["margin", "dlr"]
    assert Loss().used(2) == "cross-entropy"
    logits, labels = torch.randn(4, 2), torch.tensor([0, 1, 0, 1])
    assert torch.equal(Loss(kind="dlr")(logits, labels), margin(logits, labels))


def test_targeted_ratio_of_label_maps_skips_ignored_pixels():
    logits = torch.randn(2, 5, 2, 2, generator=torch.Generator().manual_seed(2))
    truth = torch.tensor([[[0, 1], [255, 3]], [[255, 255], [255, 255]]])
    targets = torch.where(truth == 255, truth, (truth + 1) % 5)
    value = Loss(kind="dlr", targeted=True)(logits, targets, Segmentation(ignore_index=255), truth)
    cells = [targeted_dlr(logits[:1, :, i, j], targets[:1, i, j], truth[:1, i, j]) for i, j in ((0, 0), (0, 1), (1, 1))]
    assert value.tolist() == [pytest.approx(float(sum(cells)) / 3, abs=1e-6), 0.0]

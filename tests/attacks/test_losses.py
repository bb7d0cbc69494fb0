import math
from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from gambeson import UserError
from gambeson.attacks import Loss, cross_entropy, margin
from gambeson.attacks.losses import LossName, dlr, target_margin, targeted_dlr
from gambeson.tasks import CLASSIFICATION, Segmentation


def test_truncation_acts_on_each_answer_and_kills_its_gradient():
    logits = torch.tensor([[0.0, 3.0], [0.0, -3.0]], requires_grad=True)
    labels = torch.tensor([0, 0])
    value = Loss(truncate=-math.log(0.2))(logits, labels)
    assert value.tolist() == [pytest.approx(-math.log(0.2)), pytest.approx(math.log1p(math.exp(-3)))]
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert not gradient[0].any()
    assert gradient[1].any()


def test_truncation_can_spare_answers_that_are_right_or_have_only_just_fallen():
    logits = torch.zeros(3, 10)
    logits[:, 0] = torch.tensor([0.1, 0.39, 0.41])  # the likeliest of ten, at 11 to 14 %
    logits.requires_grad_()
    for least, moving in ((None, [False] * 3), (0.0, [True, False, False]), (0.4, [True, True, False])):
        loss = Loss(truncate=-math.log(0.2), truncate_margin=least)
        value = loss(logits, torch.tensor([0, 1, 1]))
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert gradient.any(1).tolist() == moving
        cut = [kept < -math.log(0.2) + 1e-6 for kept in value.tolist()]
        assert cut == [not one for one in moving]


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


def pixel(loss, scores, label, **settings):
    """The loss of one pixel among others that are ignored."""
    logits = torch.zeros(1, len(scores), 2, 2)
    logits[0, :, 1, 0] = torch.tensor(scores)
    labels = torch.full((1, 2, 2), 255)
    labels[0, 1, 0] = label
    return float(Loss(kind=loss, **settings)(logits, labels, Segmentation(ignore_index=255)))


def test_losses_of_label_maps_by_hand():
    """Softmax of log(1, 2, 5) is 1/8, 2/8, 5/8, so that class 2 is the answer."""
    scores = [0.0, math.log(2), math.log(5)]
    right, wrong, norm = -math.log(5 / 8), -math.log(1 / 8), math.sqrt(1 + 4 + 25)
    assert [pixel("mce", scores, label) for label in (2, 0)] == [pytest.approx(right), 0]
    assert pixel("cospgd", scores, 2) == pytest.approx(5 / norm * right)
    assert pixel("cospgd", scores, 0) == pytest.approx(1 / norm * wrong)
    assert pixel("cospgd", scores, 0, targeted=True) == pytest.approx(-(1 - 1 / norm) * wrong)
    mixed = [(1 / 8 + 1) / 2, 2 / 16, 5 / 16]  # half softmax, half one-hot label of class 0
    parts = sum(p * math.log(p / m) for p, m in zip((1 / 8, 2 / 8, 5 / 8), mixed, strict=True)) - math.log(mixed[0])
    assert pixel("js", scores, 0) == pytest.approx(parts / 2)
    lambdas = [Loss(kind="segpgd").at(t, 10).wrong_weight for t in (1, 2, 10)]
    assert lambdas == [0, 0.05, 0.45]
    assert pixel("segpgd", scores, 2, wrong_weight=0.2) == pytest.approx(0.8 * right)
    assert pixel("segpgd", scores, 0, wrong_weight=0.2) == pytest.approx(0.2 * wrong)
    # Targets: what is not there yet is what has the large weight.
    assert pixel("segpgd", scores, 0, wrong_weight=0.2, targeted=True) == pytest.approx(-0.8 * wrong)
    assert [pixel("mce", scores, label, targeted=True) for label in (2, 0)] == [0, pytest.approx(-wrong)]


def test_balanced_weights_are_one_over_the_pixels_of_the_class():
    logits = torch.zeros(1, 3, 1, 4)
    logits[0, 0, 0, :2] = logits[0, 1, 0, 2:] = 1.0  # the last pixel is ignored, and the second is wrong
    labels = torch.tensor([[[0, 2, 1, 255]]])
    task, entropy = Segmentation(ignore_index=255), math.log(math.e + 2) - 1
    value = float(Loss(kind="mce-bal", class_pixels=(10, 40, 100))(logits, labels, task))
    assert value == pytest.approx(entropy * (50 / 10 + 50 / 40) / 3)
    labels = torch.tensor([[[0, 0, 1, 255]]])  # of the image itself: two pixels of class 0, one of class 1
    value = float(Loss(kind="mce-bal")(logits, labels, task))
    assert value == pytest.approx(entropy * (2 * 0.75 + 1.5) / 3)
    with pytest.raises(UserError, match="class_pixels has 2 numbers and the model 3 classes"):
        Loss(kind="mce-bal", class_pixels=(1, 2))(logits, labels, task)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("kind", ["cross-entropy", "segpgd", "cospgd", "mce", "mce-bal", "js"])
def test_the_gradient_of_every_loss_is_that_of_the_cross_entropy_times_its_weight(kind, targeted):
    draw, task = torch.Generator().manual_seed(0), Segmentation(ignore_index=255)
    logits = (3 * torch.randn(2, 4, 5, 6, generator=draw, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(0, 4, (2, 5, 6), generator=draw)
    labels[0, 1:3] = 255
    loss = Loss(kind=kind, targeted=targeted, wrong_weight=0.3)
    (found,) = torch.autograd.grad(loss(logits, labels, task).sum(), logits)
    p, index, valid = logits.detach().softmax(1), labels.where(labels != 255, 0), labels != 255
    own = p.gather(1, index[:, None])[:, 0]
    hit = (logits.argmax(1) == index) != targeted
    pixels = torch.stack([((labels[n] == labels[n, :, :, None, None]) & valid[n]).sum((2, 3)) for n in range(2)])
    classes = torch.tensor([len(labels[n][valid[n]].unique()) for n in range(2)]).view(2, 1, 1)
    total = valid.sum((1, 2), keepdim=True)
    alike = own / p.norm(dim=1)
    w = {
        "cross-entropy": torch.ones_like(own),
        "segpgd": torch.where(hit, 0.7, 0.3),
        "cospgd": 1 - alike if targeted else alike,
        "mce": hit.double(),
        "mce-bal": hit * total / classes / pixels.clamp(min=1),
        "js": own * torch.log(1 + 1 / own) / 2,
    }[kind]
    expected = (w * valid / total)[:, None] * (p - F.one_hot(index, 4).movedim(3, 1))
    torch.testing.assert_close(found, -expected if targeted else expected)
    assert found.any()


def test_the_divergence_is_finite_where_the_softmax_rounds_to_zero_or_one():
    logits = torch.tensor([[0.0, 500.0], [500.0, 0.0], [0.0, 0.0]], requires_grad=True)
    value = Loss(kind="js")(logits, torch.tensor([0, 0, 0]))
    assert value.tolist() == [pytest.approx(math.log(2)), 0.0, pytest.approx(0.2157615543)]
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert gradient.isfinite().all()
    assert gradient[2, 1] == pytest.approx(0.5 * 0.5 * math.log(3) / 2)


@pytest.mark.parametrize("kind", get_args(LossName))
def test_a_map_of_one_pixel_has_the_losses_of_an_image(kind):
    logits = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(9) % 4
    for loss in (Loss(kind=kind), Loss(kind=kind, targeted=True)):
        assert torch.equal(loss(logits[..., None, None], labels[:, None, None], Segmentation()), loss(logits, labels))


@pytest.mark.parametrize("tau", [0.2, 0.75])
@pytest.mark.parametrize("kind", ["cross-entropy", "margin"])
def test_a_target_that_is_likelier_than_tau_has_no_gradient(tau, kind):
    """Metzen et al. 2017: probabilities of the target just below and just above the limit, and far from it."""
    p = torch.tensor([0.02, tau - 0.01, tau + 0.01, 0.98])
    logits = torch.stack([p.log(), (1 - p).log()], 1).requires_grad_()
    loss = Loss(kind=kind, targeted=True, tau=tau)
    values = loss(logits, torch.zeros(4, dtype=torch.long))
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    assert gradient.any(1).tolist() == [True, True, False, False]
    torch.testing.assert_close(values, Loss(kind=kind, targeted=True)(logits, torch.zeros(4, dtype=torch.long)))

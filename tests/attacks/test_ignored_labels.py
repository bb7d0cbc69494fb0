"""Ignored labels count nowhere while a universal perturbation is crafted: not in a loss, a mean, a rate or a stop."""

from itertools import islice
from typing import get_args

import pytest
import torch
from torch import nn

from gambeson import UserError, tasks
from gambeson.attacks import DFUAP, ClasswiseStochasticPGD, DeepFoolUAP, StochasticPGD
from gambeson.attacks.losses import Loss, LossName
from gambeson.attacks.universal.sga import SGA
from gambeson.data import Dataset, Split
from tests.conftest import binary, inner_images

IGNORED = 255


def dataset(x, y, classes=("a", "b")):
    """A third of the images for each split; every split holds every kind of image, for the thirds are strided."""
    parts = [Split(f"ignored/{k}", x[k::3], y[k::3], classes, ignore_index=IGNORED) for k in range(3)]
    data = object.__new__(Dataset)
    for name, value in zip(("name", "train", "validation", "test", "classes"), ("i", *parts, classes), strict=True):
        object.__setattr__(data, name, value)
    return data


class PixelNet(nn.Module):
    """Class 1 where a pixel is above one half: each answer depends on its own pixel alone."""

    def forward(self, x):
        return torch.cat([1 - 2 * x, 2 * x - 1], 1)


def maps():
    """Label maps whose first row is ignored. Some pixels are exactly black or white."""
    x = torch.rand(60, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.3 + 0.55
    x[::7, :, :, 0], x[::5, :, 1, 1] = 0.0, 1.0
    y = (x[:, 0] > 0.5).long()
    y[:, 0] = IGNORED
    y[::4] = IGNORED  # and some images have no label at all
    return dataset(x, y)


MAP_ATTACKS = {
    "s-pgd, truth": StochasticPGD(eps=0.1, steps=5, batch_size=10, probe_starts=0),
    "s-pgd, prediction": StochasticPGD(eps=0.1, steps=5, batch_size=10, probe_starts=0, labels="prediction"),
    "s-pgd, targeted": StochasticPGD(eps=0.1, steps=5, batch_size=10, probe_starts=0, target=0),
    "sga, prediction": SGA(eps=0.1, steps=5, batch_size=10, inner_batch=4, rounds=2),
    "sga, logit and truth": SGA(eps=0.1, steps=5, batch_size=10, rounds=1, loss="logit", labels="truth"),
    "sga, logit and prediction": SGA(eps=0.1, steps=5, batch_size=10, rounds=1, loss="logit"),
    "bounded logit, prediction": DFUAP(eps=0.1, steps=5, batch_size=10),
    "bounded logit, targeted": DFUAP(eps=0.1, steps=5, batch_size=10, target=0),
}


@pytest.mark.parametrize("name", MAP_ATTACKS)
def test_ignored_pixels_draw_no_gradient(name):
    uap = MAP_ATTACKS[name].craft(PixelNet(), maps())
    assert not uap.delta[0, 0, 0].any()
    assert (uap.delta[0, 0, 1:] != 0).all()


def images_of(ignored):
    """Images of one class that a linear model gets right, half of them with labels that count; and w."""
    model, w = binary((1, 2, 3))
    x = inner_images(400, (1, 2, 3))
    x[::9, 0, 0, 0], x[::11, 0, 1, 2] = 0.0, 1.0
    with torch.no_grad():
        bias = float(model(x).diff(dim=1).mean()) / 2
        model.bias += torch.tensor([bias, -bias])
        y = model(x).argmax(1)
    own, others = x[y == 0][:90], x[y == 1][:90] if ignored is None else ignored
    mixed = torch.stack([own, others], 1).flatten(0, 1)
    labels = torch.tensor([0, IGNORED]).repeat(90)
    return model, w, dataset(mixed, labels)


IMAGE_ATTACKS = {
    "s-pgd": StochasticPGD(eps=0.1, steps=3, batch_size=20, probe_starts=2, probe_start_steps=2),
    "s-pgd, prediction": StochasticPGD(eps=0.1, steps=3, batch_size=20, probe_starts=0, labels="prediction"),
    "s-pgd, targeted": StochasticPGD(eps=0.1, steps=3, batch_size=20, probe_starts=0, target=1),
    "sga": SGA(eps=0.1, steps=3, batch_size=20, inner_batch=6, rounds=2, norm="2"),
    "sga, logit and truth": SGA(eps=0.1, steps=3, batch_size=20, rounds=1, loss="logit", labels="truth"),
    "bounded logit": DFUAP(eps=0.1, steps=3, batch_size=20),
    "bounded logit, targeted": DFUAP(eps=0.1, steps=3, batch_size=20, target=1),
    "deepfool": DeepFoolUAP(eps=0.1, images=60, passes=2, batch_size=8),
}


@pytest.mark.parametrize("name", IMAGE_ATTACKS)
def test_what_an_ignored_image_shows_changes_nothing(name):
    model, _, data = images_of(None)
    other = images_of(torch.rand(90, 1, 2, 3, generator=torch.Generator().manual_seed(9)))[2]
    found, same = (IMAGE_ATTACKS[name].craft(model, one) for one in (data, other))
    assert found.delta.any()
    assert torch.equal(found.delta, same.delta)
    assert found.about.restarts == same.about.restarts


@pytest.mark.parametrize("normalise", ["batch", "sample"])
def test_starts_probed_together_see_the_batches_that_each_sees_alone(normalise):
    """Their mini-batches differ in size, for images without a label are left out of them."""
    model, _, data = images_of(None)
    attack = StochasticPGD(
        eps=0.1, norm="2", probe_starts=4, restarts=4, probe_start_steps=5, probe_start_batch=7, normalise=normalise
    )
    brief = StochasticPGD(
        eps=0.1, norm="2", steps=5, batch_size=7, rel_step_size=attack.probe_rel_step_size, normalise=normalise
    )
    with attack._crafting(model, data, 0) as context:
        assert len({len(images) for k in range(4) for images, _ in islice(context.stream(7, k), 5)}) > 1
        starts = list(context.starts(4, None))
        found = {float(delta.sum()) for _, delta in attack._best(context, [attack], [starts])[0]}
        alone = {float(brief._run(context, start, [k]).sum()) for k, (_, start) in enumerate(starts)}
    assert len(alone) == 4
    assert sorted(found) == pytest.approx(sorted(alone), abs=1e-5)


def test_a_mean_of_steps_is_over_images_that_have_a_label():
    model, w, data = images_of(None)
    attack = StochasticPGD(
        eps=0.1,
        steps=1,
        rel_step_size=0.5,
        final_step=0.5,
        batch_size=60,
        probe_starts=0,
        normalise="sample",
        truncate=None,
    )
    torch.testing.assert_close(attack.craft(model, data).delta[0], 0.05 * w.sign())
    classwise = ClasswiseStochasticPGD(eps=0.1, steps=1, rel_step_size=0.5, final_step=0.5, batch_size=60, restarts=1)
    torch.testing.assert_close(classwise.craft_classes(model, data)[0].delta[0], 0.05 * w.sign())


def test_rates_that_choose_are_of_answers_that_count():
    model, w, data = images_of(None)
    attack = StochasticPGD(eps=0.3, target=1, probe_starts=0, steps=1)
    with attack._crafting(model, data, 0) as context:
        assert context.rate(torch.zeros(1, 1, 2, 3)) == 0  # the ignored images are of the target class already
        assert context.rate(0.3 * w.sign()[None]) == context.rate(0.3 * w.sign()[None], data.test) == 1
        fool = DeepFoolUAP(eps=0.3)
        clean = [model(data.train.take(slice(None))[0]).argmax(1)]
        assert fool._fooling(context, data.train, clean, 0.3 * w.sign()[None]) == 1


def test_data_without_any_label_that_counts_are_refused():
    model, _, data = images_of(None)
    none = dataset(data.train.images, torch.full((len(data.train),), IGNORED))
    with pytest.raises(UserError, match="no image of ignored/0 has a label that counts"):
        StochasticPGD(eps=0.1, steps=2, probe_starts=0).craft(model, none)


def test_every_loss_is_zero_and_flat_where_the_label_is_ignored():
    draw = torch.Generator().manual_seed(0)
    for shape in ((6,), (6, 2, 3)):
        logits = torch.randn(6, 5, *shape[1:], generator=draw).requires_grad_()
        labels = torch.randint(0, 5, shape, generator=draw)
        targets, gone = (labels + 1) % 5, torch.rand(shape, generator=draw) < 0.5
        marked = labels.masked_fill(gone, IGNORED)
        for kind in get_args(LossName):
            for loss in (Loss(kind=kind, truncate=0.3), Loss(kind=kind, targeted=True, truncate=-0.3)):
                calls = (
                    [(targets.masked_fill(gone, IGNORED), None), (targets, marked)]
                    if loss.targeted
                    else [(marked, None)]
                )
                for goal, truth in calls:
                    values = loss(logits, goal, tasks.of(labels, IGNORED), truth)
                    (gradient,) = torch.autograd.grad(values.sum(), logits)
                    assert not gradient.movedim(1, -1)[gone].any()
                    if len(shape) == 1:
                        assert not values[gone].any()
                        plain = loss(
                            logits,
                            targets if loss.targeted else labels,
                            truth=None if truth is None else labels,
                        )
                        torch.testing.assert_close(values[~gone], plain[~gone])

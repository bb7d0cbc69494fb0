"""Label maps on an accelerator: the CPU's logits, gradients and rates, and the same bytes again."""

import copy

import pytest
import torch

import gambeson as gb
from gambeson.attacks import SEA, CosPGD, SegPGD, StochasticPGD
from gambeson.attacks.losses import Loss
from gambeson.attacks.solver import ProjectedGradient
from gambeson.base import seeded
from gambeson.data import Split
from gambeson.data.dataset import Dataset
from gambeson.threat import Ball
from gambeson.victim import FastPath, Victim, predict

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")]

EPS, SIDE, IGNORED = 40 / 255, 32, 255
GPU = "cuda"


def scenes(name: str, count: int, seed: int) -> Split:
    """Coloured squares on noise: a square's colour is its class, its border is ignored."""
    draw = torch.Generator().manual_seed(seed)
    images = 0.4 * torch.rand(count, 3, SIDE, SIDE, generator=draw)
    labels = torch.zeros(count, SIDE, SIDE, dtype=torch.int64)
    for image, label in zip(images, labels, strict=True):
        kind, top, left = (
            int(torch.randint(low, high, (), generator=draw)) for low, high in ((1, 4), (0, 10), (0, 10))
        )
        label[top : top + 22, left : left + 22] = IGNORED
        label[top + 1 : top + 21, left + 1 : left + 21] = kind
        image[kind - 1, top : top + 22, left : left + 22] += 0.4
    return Split(name, (images * 255).byte(), labels, tuple("0123"), ignore_index=IGNORED)


@pytest.fixture(scope="module")
def data():
    return Dataset(
        "squares", scenes("train", 256, 1), scenes("validation", 64, 2), scenes("test", 64, 3), tuple("0123")
    )


@pytest.fixture(scope="module")
def pair(data):
    """A U-Net trained a little, on the CPU and on the GPU."""
    with seeded(0, "model"):
        net = gb.models.create("unet-small", data).to(GPU)
    gb.train(net, data, gb.defenses.Standard(), epochs=10, batch_size=16, lr=0.05, seed=0)
    return copy.deepcopy(net).cpu().eval(), net.eval()


def test_logits_and_one_gradient_are_the_cpus(pair, data):
    images, labels = data.test.take(slice(0, 16))
    found = []
    for model, device in zip(pair, ("cpu", GPU), strict=True):
        with Victim(model, fast=FastPath(graphs=True)) as victim:
            solver = ProjectedGradient(victim=victim, ball=Ball(eps=EPS), loss=Loss(), task=data.test.task)
            zero = torch.zeros(1, 3, SIDE, SIDE, device=device)
            gradient, logits = solver.gradient(zero, images.to(device), labels.to(device))
            found.append((gradient.cpu(), logits.cpu()))
    (gradient, logits), (other, same) = found
    assert torch.allclose(logits, same, atol=1e-3 * float(logits.abs().max()))
    assert float((gradient - other).norm() / gradient.norm()) < 1e-2


def test_rates_and_mean_iou_are_the_cpus(pair, data):
    for rate in (gb.evaluation.accuracy, gb.evaluation.mean_iou):
        here, there = (rate(model, data) for model in pair)
        assert here.value > 0.6
        assert there.value == pytest.approx(here.value, abs=2e-3)
        assert there.low == pytest.approx(here.low, abs=1e-2)


@pytest.mark.parametrize("target", ["hide:1", "static:0", None])
def test_a_universal_perturbation_has_the_same_bytes_again_and_does_the_cpus_harm(pair, data, target):
    attack = StochasticPGD(eps=EPS, steps=30, batch_size=16, probe_starts=0, target=target)
    here, there = (attack.craft(model, data, seed=0) for model in pair)
    assert torch.equal(attack.craft(pair[1], data, seed=0).delta, there.delta)
    best = [uap.about.restarts[0][1] for uap in (here, there)]
    assert best[1] == pytest.approx(best[0], abs=0.05)
    clean = predict_share(pair[1], data, None)
    assert target is not None or predict_share(pair[1], data, there.delta) < clean - 0.05


def predict_share(model, data, delta):
    with Victim(model) as victim:
        delta = None if delta is None else delta.to(GPU)
        counts = data.test.task.counts(predict(victim, data.test, delta), data.test.labels)
    return int(counts.right.sum()) / int(counts.total.sum())


@pytest.mark.parametrize("attack", [SegPGD(eps=EPS, steps=5), CosPGD(eps=EPS, steps=5), SEA(eps=EPS, steps=10)])
def test_attacks_made_for_maps_do_the_cpus_harm(pair, data, attack):
    images, labels = data.test.take(slice(0, 32))
    left = []
    for model, device in zip(pair, ("cpu", GPU), strict=True):
        moved = attack(model, images.to(device), labels.to(device), seed=0, task=data.test.task)
        assert float((moved.cpu() - images).abs().max()) <= EPS + 1e-6
        split = Split("moved", moved.cpu(), labels, tuple("0123"), ignore_index=IGNORED)
        left.append(gb.evaluation.accuracy(pair[0], split).value)
    clean = gb.evaluation.accuracy(pair[0], data.test.subset(slice(0, 32))).value
    assert max(left) < clean - 0.1
    assert left[1] == pytest.approx(left[0], abs=0.05)

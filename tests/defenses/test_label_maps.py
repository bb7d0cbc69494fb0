"""Every defence on label maps: ignored pixels have no say, and a map of one pixel is classification."""

import math
from typing import Any

import pytest
import torch
from torch import nn

import gambeson as gb
from gambeson import UserError
from gambeson.data import Dataset, Split
from gambeson.defenses import Adversarial, Batch
from gambeson.defenses.registry import DEFENSES
from gambeson.models import ModelCard, PixelModel
from gambeson.tasks import Segmentation

IGNORED, CLASSES = 255, 4
EPS: dict[str, Any] = {"eps": 0.1}
SHARED = {**EPS, "sharedness": 2}
PLACES = ("first", "middle")  # by default noise stays off the logits of maps alone
NOISY = {**EPS, "noise_from": 0, "adversarial_from": 0, "gamma": 0.01, "places": PLACES}
CASES: dict[str, list[dict]] = {
    "standard": [{}, {"label_smoothing": 0.1}],
    "pgd-adversarial": [EPS, {**EPS, "attack_bn": "batch"}],
    "trades": [EPS],
    "shared-adversarial": [
        *({**EPS, "sharedness": s} for s in (1, 2, 8)),
        {**EPS, "sharedness": 2, "target": "truth"},
        {**EPS, "sharedness": 4, "target": "prediction"},
    ],
    "universal-adversarial": [EPS, {**EPS, "update": "one-pass", "truncate": 1.5}],
    "universal-consistency": [
        {**EPS, "bank": 2, "warmup": 0, "restart": 2},
        {**EPS, "bank": 2, "warmup": 0, "direction": "reverse", "assignment": "strong", "truncate": 1.5},
    ],
    "bank-started": [{**EPS, "bank": 2, "warmup": 0}],
    "gambeson": [{**EPS, "bank": 2, "eps_warmup": 0}],
    "n-fgsm": [EPS],
    "free-adversarial": [{**EPS, "replays": 2}],
    "ensemble-adversarial": [
        EPS,
        {**EPS, "attack": "r-step-ll", "mixing": "half", "weight": 0.3, "random_eps": True},
    ],
    "jacobian": [
        {"strength": 1.0},
        {"strength": 1.0, "estimator": "exact", "share": 0.5},
        {"strength": 1.0, "estimator": "input", "n_proj": 2, "share": 0.5},
        {"strength": 1.0, "estimator": "input", "derivative": "finite-difference", "jitter": 0.01},
        {"strength": 1.0, "estimator": "stacked", "power": True},
    ],
    "ensemble": [
        {"members": 2, "inner": {"name": "shared-adversarial", **SHARED}},
        {"members": 2, "inner": {"name": "shared-adversarial", **SHARED}, "craft": "vote", "average": "logits"},
        {"members": 2, "inner": {"name": "pgd-adversarial", **EPS}, "at_once": "stacked"},
    ],
    "jacobian-ensemble": [
        {"members": 2, "strength": 1.0},
        {"members": 2, "strength": 1.0, "joint": True, "estimator": "exact"},
    ],
    "adp": [{"members": 2}],
    "gal": [{"members": 2}],
    "trs": [{"members": 2, "loss_mean": "image"}],
    "learn2perturb": [NOISY, {**NOISY, "update": "joint"}],
    "pni": [{**EPS, "adversarial_from": 0}],
    "rse": [{}],
    "combination": [
        {
            "risk": {"name": "shared-adversarial", **SHARED},
            "jacobian": {"strength": 1.0},
            "noise": {"gamma": 0.01, "noise_from": 0, "places": PLACES},
        }
    ],
}
FORMS = [(name, number) for name, forms in CASES.items() for number in range(len(forms))]


class Pixelwise(nn.Module):
    """Logits of every pixel from that pixel alone; of images of one pixel also one row per image."""

    def __init__(self, maps: bool) -> None:
        super().__init__()
        self.maps = maps
        self.first, self.middle, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, CLASSES, 1)

    def forward(self, x):
        logits = self.last(self.middle(self.first(x).tanh()).relu())
        return logits if self.maps else logits.flatten(1)


def pixelwise(defense, size, maps):
    card = ModelCard(name="lenet5", in_channels=3, classes=CLASSES, image_size=size, mean=(0.5,) * 3, std=(0.3,) * 3)
    models = []
    for number in range(defense.num_members):
        torch.manual_seed(number)
        models.append(PixelModel(card, Pixelwise(maps)).double())
    return gb.models.ensemble(models)


def trained(name, number, images, labels, task=None):
    """The weights and losses after four steps."""
    defense = gb.defenses.create(name, **CASES[name][number])
    names = tuple("abcd")
    split = Split("few", images, labels, names, task=task)
    model = pixelwise(defense, tuple(images.shape[2:]), labels.ndim == 3)
    data = Dataset("few", split, split, split, names)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        history = gb.train(model, data, defense, epochs=2, batch_size=8, lr=0.1, seed=1)
    assert history[0]["loss"] != history[1]["loss"]
    return model.state_dict(), history


def test_every_defence_has_its_case():
    assert set(CASES) == {entry.name for entry in DEFENSES.own()}  # other tests register defences too


@pytest.mark.parametrize(("name", "number"), FORMS)
def test_ignored_pixels_change_nothing_bit_for_bit(name, number):
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(16, 3, 3, 5, generator=draw)
    labels = torch.randint(CLASSES, (16, 3, 5), generator=draw)
    ignored = torch.rand(labels.shape, generator=draw) < 0.3
    ignored[3] = True
    labels[ignored] = IGNORED
    other = torch.where(ignored.unsqueeze(1), torch.rand(images.shape, generator=draw), images)
    found = [trained(name, number, one, labels, Segmentation(ignore_index=IGNORED)) for one in (images, other)]
    for key, value in found[0][0].items():
        torch.testing.assert_close(value, found[1][0][key], rtol=0, atol=0, msg=key)
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize(("name", "number"), FORMS)
def test_a_map_of_one_pixel_is_classification(name, number):
    draw = torch.Generator().manual_seed(0)
    images, labels = torch.rand(16, 3, 1, 1, generator=draw), torch.randint(CLASSES, (16,), generator=draw)
    maps, rows = (trained(name, number, images, one) for one in (labels.view(16, 1, 1), labels))
    for key, value in rows[0].items():
        torch.testing.assert_close(maps[0][key], value, rtol=1e-5, atol=1e-7, msg=key)
    for one, other in zip(maps[1], rows[1], strict=True):
        assert {key: value for key, value in one.items() if "mean_iou" not in key} == pytest.approx(
            {key: value for key, value in other.items() if "balanced" not in key}, rel=1e-5, abs=1e-7
        )


class Linear(nn.Module):
    """Two classes per pixel: the logit of class 1 is w times the pixel's only value, less an offset."""

    def __init__(self, weight, offset=0.5):
        super().__init__()
        self.weight, self.offset = nn.Parameter(weight), offset  # (H, W)

    def forward(self, x):
        slope = self.weight * (x[:, 0] - self.offset)
        return torch.stack([-slope / 2, slope / 2], 1)


def linear_batch(count=8):
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 5, generator=draw)
    images = 0.4 + 0.2 * torch.rand(count, 1, 4, 5, generator=draw)
    labels = torch.randint(2, (count, 4, 5), generator=draw)
    labels[:, 0] = IGNORED
    labels[0, 1, 1] = labels[4, 2, 2] = IGNORED
    return Linear(weight), Batch(images=images, labels=labels, seed=0, task=Segmentation(ignore_index=IGNORED))


@pytest.mark.parametrize("sharedness", [1, 2, 4])
@pytest.mark.parametrize("target", ["truth", "prediction"])
def test_a_targeted_heap_moves_every_pixel_towards_the_map_of_the_heap_next_to_it(sharedness, target):
    model, batch = linear_batch()
    heaps = len(batch.images) // sharedness
    delta = Adversarial(eps=0.1, sharedness=sharedness, target=target, tau=None).craft(model, batch)
    assert delta.shape == (heaps, 1, 4, 5)
    maps = batch.labels
    if target == "prediction":
        maps = model(batch.images).argmax(1).where(maps != IGNORED, IGNORED)
    for heap in range(heaps):
        goal = maps[(heap ^ 1) * sharedness]
        own = batch.labels[heap * sharedness : (heap + 1) * sharedness]
        counts = (own != IGNORED).any(0) & (goal != IGNORED)
        best = 0.1 * model.weight.detach().sign() * (2 * goal - 1)
        torch.testing.assert_close(delta[heap, 0][counts], best[counts])
        assert bool((delta[heap, 0][~counts].abs() < 0.1).all())  # as drawn


def test_a_third_heap_has_the_second_as_its_target_and_a_single_one_has_none():
    model, batch = linear_batch(6)
    delta = Adversarial(eps=0.1, sharedness=2, target="truth", tau=None).craft(model, batch)
    counts = (batch.labels[2] != IGNORED) & (batch.labels[4:] != IGNORED).any(0)
    best = 0.1 * model.weight.detach().sign() * (2 * batch.labels[2] - 1)
    torch.testing.assert_close(delta[2, 0][counts], best[counts])
    with pytest.raises(UserError, match="a batch of 6 is one heap of 6, .* choose a batch size of 12 or more"):
        gb.defenses.SharedAdversarial(eps=0.1, sharedness=6, target="truth").check(6)


def test_pixels_that_are_the_target_with_confidence_tau_have_no_gradient():
    sure = Linear(torch.full((4, 5), 40.0))
    images = torch.full((2, 1, 4, 5), 0.8)  # class 1, almost surely
    labels = torch.ones(2, 4, 5).long()
    labels[0, :2] = 0
    batch = Batch(images=images, labels=labels, seed=0, task=Segmentation())
    inner = {"eps": 0.1, "sharedness": 1, "target": "truth", "start": "zero"}
    delta = Adversarial(**inner, tau=0.75).craft(sure, batch)
    assert not delta[0].any()  # its target is the second image's map, which is all class 1
    torch.testing.assert_close(delta[1, 0, :2], torch.full((2, 5), -0.1))  # towards class 0
    assert not delta[1, 0, 2:].any()
    assert Adversarial(**inner, tau=None).craft(sure, batch)[0].any()


@pytest.mark.parametrize("sharedness", [1, 2, 4, 8])
def test_the_truncation_acts_per_pixel(sharedness):
    """A pixel that is already fooled has no gradient, however the others of its image stand."""
    weight = torch.full((4, 5), 30.0)
    weight[:, 3:] = 0.5
    labels = torch.zeros(8, 4, 5).long()
    labels[:, 0] = IGNORED
    images = torch.full((8, 1, 4, 5), 0.6)
    batch = Batch(images=images, labels=labels, seed=0, task=Segmentation(ignore_index=IGNORED))
    inner = {"eps": 0.05, "sharedness": sharedness, "start": "zero"}
    delta = Adversarial(**inner, truncate=-math.log(0.2)).craft(Linear(weight), batch)
    assert not delta[..., :3].any()  # p of the truth is 1 / (1 + e^3) < 0.2
    torch.testing.assert_close(delta[:, 0, 1:, 3:], torch.full((8 // sharedness, 3, 2), 0.05))
    assert Adversarial(**inner).craft(Linear(weight), batch)[:, 0, 1:, :3].all()

"""Every defence on label maps: ignored pixels have no say, and a map of one pixel is classification."""

from typing import Any

import pytest
import torch
from torch import nn

import gambeson as gb
from gambeson.data import Dataset, Split
from gambeson.models import ModelCard, PixelModel
from gambeson.tasks import Segmentation

IGNORED, CLASSES = 255, 4
EPS: dict[str, Any] = {"eps": 0.1}
SHARED = {**EPS, "sharedness": 2}
NOISY = {**EPS, "noise_from": 0, "adversarial_from": 0, "gamma": 0.01}
CASES: dict[str, list[dict]] = {
    "standard": [{}, {"label_smoothing": 0.1}],
    "pgd-adversarial": [EPS, {**EPS, "attack_bn": "batch"}],
    "trades": [EPS],
    "shared-adversarial": [{**EPS, "sharedness": s} for s in (1, 2, 4)],
    "universal-adversarial": [EPS, {**EPS, "update": "one-pass", "truncate": 1.5}],
    "universal-consistency": [
        {**EPS, "bank": 2, "warmup": 0, "restart": 2},
        {**EPS, "bank": 2, "warmup": 0, "direction": "reverse", "assignment": "strong", "truncate": 1.5},
    ],
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
            "noise": {"gamma": 0.01, "noise_from": 0},
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
    assert set(CASES) == set(gb.defenses.names())


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
        assert one == pytest.approx(other, rel=1e-5, abs=1e-7)

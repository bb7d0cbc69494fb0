"""How visible a perturbation is, and how much of its target scene it shows."""

import pytest
import torch
import torch.nn.functional as F

from gambeson import UserError
from gambeson.attacks import control
from gambeson.attacks.universal.perturbation import Provenance, UniversalPerturbation
from gambeson.data import Split
from gambeson.evaluation import edge_correlation, visibility
from gambeson.evaluation.perceptibility import edges, local_energy
from gambeson.threat import Ball

EPS = 0.1


def perturbation(delta):
    about = Provenance(
        attack="mine", settings={}, eps=EPS, norm="inf", seed=0, model="", crafted_on="no images",
        crafted_split="no images", chosen_on="", restarts=[], status="done", forwards=0, backwards=0,
    )  # fmt: skip
    return UniversalPerturbation(delta, about)


def images(channels=3, count=6, side=32):
    draw = torch.Generator().manual_seed(1)
    coarse = torch.rand(count, channels, 4, 4, generator=draw)
    return Split("test", F.interpolate(coarse, (side, side), mode="bilinear") * 0.6 + 0.2, torch.zeros(count).long())


def maps(count, side=32, seed=0):
    """Label maps of two rectangles each."""
    draw = torch.Generator().manual_seed(seed)
    found = torch.zeros(count, side, side, dtype=torch.int64)
    for one in found:
        for label in (1, 2):
            top, left = torch.randint(2, side - 14, (2,), generator=draw).tolist()
            one[top : top + 12, left : left + 12] = label
    return found


@pytest.mark.parametrize("channels", [1, 3])
def test_nothing_is_invisible_and_more_is_more_visible(channels):
    pytest.importorskip("torchmetrics")
    split, pattern = images(channels), control("random-sign", Ball(eps=EPS), (channels, 32, 32))[:1]
    none, half, all_of_it = (visibility(perturbation(size * pattern), split) for size in (0, 0.5, 1))
    assert (none.largest, none.rms, none.n) == (0, 0, 6)
    assert none.ssim == pytest.approx(1, abs=1e-6)
    assert half.rms == pytest.approx(EPS / 2, rel=1e-5)  # no value is clipped
    assert all_of_it.largest == pytest.approx(EPS, rel=1e-5)
    assert none.ssim > half.ssim + 0.05 > all_of_it.ssim + 0.1


def test_what_is_clipped_is_no_change():
    white = Split("test", torch.ones(2, 1, 16, 16), torch.zeros(2).long())
    assert visibility(perturbation(torch.full((1, 1, 16, 16), EPS)), white).rms == 0
    assert visibility(perturbation(torch.full((1, 1, 16, 16), -EPS)), white).rms == pytest.approx(EPS)


def test_edges_and_energy_of_a_step_lie_along_it():
    step = torch.zeros(8, 10, dtype=torch.int64)
    step[:, 6:] = 255
    expected = torch.zeros(8, 10)
    expected[:, 5:7] = 1
    assert torch.equal(edges(step, blur=0), expected)
    assert torch.equal(edges(step.T, blur=0), expected.T)
    assert edges(step).sum() == pytest.approx(16, rel=0.1)  # a blur moves weight, and reflects a little at the border
    energy = local_energy(torch.stack([0.1 * (step > 0), 0.3 * (step > 0)])[None])
    assert torch.allclose(energy, expected * 4 * 0.2)  # Sobel's weights sum to 4; the mean of both channels is 0.2


def test_a_drawing_of_the_target_is_recognised_and_noise_is_not():
    target, *others = maps(40)
    others = torch.stack(others)
    drawn = edge_correlation(0.05 * target[None].float().expand(3, -1, -1), target, others)
    assert drawn.value > 0.6
    assert drawn.excess > 0.4
    assert drawn.p == pytest.approx(1 / 40)
    assert edge_correlation(0.05 * target[None], others[0], torch.stack([target, *others[1:]])).p > 1 / 40
    noise = control("random-sign", Ball(eps=EPS), (3, 32, 32))[0]
    found = edge_correlation(noise, target, others)
    assert abs(found.excess) < 0.1
    assert found.p > 0.05
    assert edge_correlation(torch.zeros(3, 32, 32), target, others).value == 0


@pytest.mark.parametrize(("target", "others"), [((16, 32), (3, 16, 32)), ((32, 32), (0, 32, 32)), ((32, 32), (32, 32))])
def test_maps_that_cannot_be_compared_are_refused(target, others):
    with pytest.raises(UserError, match="expected one size, and one other map or more"):
        edge_correlation(torch.zeros(3, 32, 32), torch.zeros(target), torch.zeros(others))


def test_lpips_without_weights_is_one_sentence(monkeypatch):
    pytest.importorskip("torchmetrics")

    def no_network(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", no_network)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    with pytest.raises(UserError, match="could not be loaded"):
        visibility(perturbation(torch.zeros(1, 3, 64, 64)), images(side=64), lpips=True)

"""Plain noise by its moments and shares, and what it does to a linear model by formula."""

import math

import pytest
import torch

import gambeson as gb
from gambeson.auditing import Suite
from gambeson.auditing.stages.corruption import NOISES, noisy
from gambeson.base import generator

SHAPE = (3, 40, 40)


def drawn(noise, size, level=0.5, count=50):
    images = torch.full((count, *SHAPE), level)
    return noisy(images, noise, size, generator(0, "test")) - images


def test_gaussian_and_uniform_noise_have_their_moments():
    gauss, flat = drawn("gaussian", 0.1), drawn("uniform", 0.1)
    assert float(gauss.std()) == pytest.approx(0.1, rel=0.01)
    assert float(gauss.mean()) == pytest.approx(0, abs=1e-3)
    assert float(flat.std()) == pytest.approx(0.1 / math.sqrt(3), rel=0.01)
    assert 0.0999 < float(flat.abs().max()) <= 0.1 + 1e-6
    for noise in (gauss, flat):  # drawn anew for every image and value
        assert abs(float(torch.corrcoef(noise.flatten(1)[:2])[0, 1])) < 0.06
        assert not torch.equal(noise[:, 0], noise[:, 1])


def test_salt_and_pepper_hits_whole_pixels():
    moved = drawn("salt-and-pepper", 0.2)
    hit = moved != 0
    assert torch.equal(hit[:, 0], hit[:, 1])
    assert torch.equal(moved[:, 0], moved[:, 2])
    assert float(hit.float().mean()) == pytest.approx(0.2, abs=0.01)
    assert set(moved[hit].tolist()) == {-0.5, 0.5}
    assert float((moved[hit] > 0).float().mean()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("noise", NOISES)
def test_noise_stays_in_the_box_and_size_zero_is_none(noise):
    images = torch.rand(4, *SHAPE, generator=generator(1, "images"))
    moved = noisy(images, noise, 0.7, generator(0, "a"))
    assert float(moved.min()) >= 0
    assert float(moved.max()) <= 1
    assert not torch.equal(moved, images)
    assert torch.equal(moved, noisy(images, noise, 0.7, generator(0, "a")))
    assert torch.equal(noisy(images, noise, 0.0, generator(0, "a")), images)


@pytest.mark.full
def test_an_audit_says_what_noise_does(trained, digits):
    suite = Suite(
        eps=(0.1,), universal_steps=3, universal_probe_starts=0, universal_restarts=1, pgd_steps=2, pgd_restarts=1,
        surrogate="none", noise_sizes=(1.0, 4.0, 8.0), eps_uni_runs=0, jacobian_backwards=0,
        universal_queries=300, sample=20, suite_images=0,
    )  # fmt: skip
    found = gb.audit(trained, digits, suite)
    parts = found.results.corruption
    assert [(part.noise, part.size) for part in parts] == [(n, s) for n in NOISES for s in (0.1, 0.4, 0.8)]
    clean = 1 - found.results.clean.value
    for noise in NOISES:
        errors = [part.error.value for part in parts if part.noise == noise]
        assert errors == sorted(errors)
        assert clean <= errors[0] + 0.01
        assert errors[-1] > 5 * clean
    assert parts[0].error.n == len(digits.test)
    with torch.no_grad():
        images, labels = digits.test.take(slice(None))
        moved = noisy(images, "gaussian", 0.4, generator(0, "corruption", "gaussian", "0.4"))
        again = float((trained(moved).argmax(1) != labels).float().mean())
    assert parts[1].error.value == pytest.approx(again)

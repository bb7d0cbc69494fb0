"""The global generators inside a seeded block, whoever owns them, and after it."""

import random

import numpy as np
import pytest
import torch
from torch import nn

import gambeson as gb
from gambeson.base import seeded

SOURCES = {
    "torch": lambda: float(torch.rand(())),
    "numpy": lambda: float(np.random.normal()),
    "python": lambda: random.gauss(0, 1),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_block_depends_on_its_seed_and_leaves_the_callers_generator_as_it_was(name):
    draw = SOURCES[name]

    def inside(*path):
        with seeded(*path):
            return [draw() for _ in range(5)]

    draw()  # an odd number of normal draws: half a pair is kept
    with seeded(9, "elsewhere"):
        pass
    found = inside(3, "a")
    between = draw()
    assert inside(3, "a") == found
    assert inside(4, "a") != found != inside(3, "b")
    with seeded(1, "outer"):
        first = draw()
        inside(3, "a")
        second = draw()
    with seeded(1, "outer"):
        assert (draw(), draw()) == (first, second)
    assert between not in found


@pytest.mark.parametrize("name", SOURCES)
def test_the_callers_state_survives_a_block_that_fails(name):
    draw = SOURCES[name]
    with seeded(5, name):
        expected = [draw(), draw()]
    with seeded(5, name):
        found = [draw()]
        with pytest.raises(ZeroDivisionError), seeded(2, "a"):
            draw() / 0
        found.append(draw())
    assert found == expected


@pytest.mark.parametrize("name", SOURCES)
def test_a_model_that_draws_from_any_of_them_is_scored_and_attacked_alike(name):
    class Wavering(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(12, 3)

        def forward(self, x):
            return self.net(x.flatten(1)) + torch.tensor([[SOURCES[name]() for _ in range(3)] for _ in x])

    draw = torch.Generator().manual_seed(0)
    model, x = Wavering(), torch.rand(60, 1, 3, 4, generator=draw)
    y, attack = torch.arange(60) % 3, gb.attacks.PGD(eps=0.1, steps=3, eot_samples=2)
    found = []
    for _ in range(2):
        found.append((gb.evaluation.accuracy(model, (x, y)), attack(model, x, y)))
        SOURCES[name]()
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])

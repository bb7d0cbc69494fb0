"""Where the answer changes the margin has to vanish: models whose scores jump there are distrusted, others are not."""

import pytest
import torch
from torch import nn

from gambeson.auditing.diagnostics import get
from gambeson.testbed.library import entry_of
from gambeson.testbed.recipes import networks
from tests.auditing.evidence import held

NAME = "margin vanishes where the answer changes"


def found(model, data):
    with held(model, data, (0.15,)) as context:
        return get(NAME).check(context)


@pytest.mark.parametrize(
    "name", ["margins of a sibling", "member keyed by the image", "hard votes of shifts", "votes of nearest features"]
)
def test_scores_that_jump_at_the_boundary_are_found(name):
    nets = networks("digits")
    check = found(entry_of(name, "digits").build(nets), nets.data)
    assert check.passed is False
    assert check.numbers["jumps"] > 0.5


@pytest.mark.parametrize(
    "name", ["standard", "eight-bit activations", "bfloat16", "soft forest", "log-probabilities", "learn2perturb"]
)
def test_scores_that_lead_to_the_boundary_are_not(name):
    nets = networks("digits")
    check = found(entry_of(name, "digits").build(nets), nets.data)
    assert check.passed is True
    assert check.numbers["jumps"] == 0


class Scaled(nn.Module):
    """Logits times a factor: margins are compared with each other."""

    def __init__(self, net, factor):
        super().__init__()
        self.net, self.factor = net, factor

    def forward(self, x):
        return self.net(x) * self.factor


@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_the_size_of_logits_does_not_count(trained, digits, factor):
    assert found(Scaled(trained, factor), digits).numbers["jumps"] == found(trained, digits).numbers["jumps"] == 0


def test_it_does_not_apply_where_nothing_changes(digits):
    class Constant(nn.Module):
        def forward(self, x):
            return 7 * torch.eye(10)[0].expand(len(x), 10) + 0 * x.flatten(1).sum(1, keepdim=True)

    assert found(Constant(), digits).passed is None
    assert get(NAME).gradients  # a black box may answer with labels alone

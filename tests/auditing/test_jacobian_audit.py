"""The audit's Jacobian analysis: closed forms of linear models, and models for which parts must be left out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gambeson.auditing import Suite
from gambeson.auditing.stages import jacobian
from gambeson.base import load_tensors
from gambeson.data import Split
from gambeson.evaluation import FunctionModel
from gambeson.victim import Victim
from tests.conftest import LinearNet, inner_images

SHAPE = (1, 6, 6)
SUITE = Suite(eps=(0.05, 0.1), jacobian_backwards=1200)


def measured(model, split, uaps=None, suite=SUITE, **more):
    with Victim(model) as victim:
        victim.allow_no_graph = True  # as in every audit
        victim.inspect(split.take(slice(0, 8))[0])
        return jacobian.measure(
            victim, split, uaps or {0.1: torch.full((1, *split.shape), 0.1)}, suite, eps=0.1, **more
        )


def linear(classes=3, images=60, seed=0):
    """A linear net and a split on which it is right; its Jacobian is the same everywhere."""
    draw = torch.Generator().manual_seed(seed)
    model = LinearNet(torch.randn(classes, *SHAPE, generator=draw))
    model.bias.data = -0.5 * model.weight.data.flatten(1).sum(1)  # in the middle of the images no class is ahead
    x = inner_images(images, SHAPE, seed)
    labels = model(x).argmax(1)
    model.bias.data += torch.tensor([0.1] + [0.0] * (classes - 1))  # so that a few are wrong
    return model, Split("test", (x * 255).round().byte(), labels), model.weight.detach().flatten(1)


def test_a_linear_model_has_its_formulas(tmp_path):
    model, split, w = linear()
    top = torch.linalg.svd(w.double())
    crafted = {0.05: 0.05 * top.Vh[0].sign().view(1, *SHAPE).float(), 0.1: 0.1 * top.Vh[0].view(1, *SHAPE).float()}
    found = measured(model, split, crafted, folder=tmp_path)
    assert found.left_out == {}
    for spread, value in ((found.norms.frobenius, w.norm()), (found.norms.spectral, top.S[0])):
        assert spread.low == pytest.approx(float(value), rel=1e-5)
        assert spread.high == pytest.approx(float(value), rel=1e-5)
        assert spread.n == 60
    assert found.sharing == pytest.approx(1, abs=1e-6)
    assert found.bounds.eps == [0.05, 0.1]
    assert found.bounds.table.images == 60
    assert found.bounds.table.rows[1].attained == pytest.approx(1, abs=1e-4)  # the best direction there is
    assert found.bounds.table.rows[0].attained < 0.99
    for row in found.bounds.table.rows:
        assert row.linear_error <= row.counted_error <= row.effect_error <= row.bound_error
    for pair in found.pairs:
        same = {"cos_F": 1.0, "ratio_s": 1.0, "cka": 1.0, "rank1": float(top.S[0] ** 2 / w.norm() ** 2)}[pair.metric]
        for spread, counts in ((pair.within, pair.within_counts), (pair.between, pair.between_counts)):
            assert spread.median == pytest.approx(same, abs=1e-5)
            assert sum(counts) == spread.n == 100
            place = next(k for k, count in enumerate(counts) if count)
            assert pair.edges[place] - 1e-6 <= same <= pair.edges[place + 1] + 1e-6
    assert found.surface.ridge.high == 0  # the loss of a linear model only rises along its gradient
    middle = len(found.surface.steps) // 2
    along = [row[middle] for row in found.surface.loss]
    assert along == sorted(along)
    assert along[-1] > along[0]
    assert found.surface.steps[-1] == pytest.approx(0.1)
    assert [space.norm for space in found.subspaces] == ["inf", "2"]
    for space in found.subspaces:
        assert space.shares == sorted(space.shares, reverse=True)
        assert space.eligible > 0
    tensors, _ = load_tensors(tmp_path / found.file)
    cosine = tensors["direction"].flatten().double() @ top.Vh[0]
    assert abs(float(cosine)) == pytest.approx(1, abs=1e-5)
    assert tensors["surface"].shape == (found.surface.images, 17, 17)
    assert found.surface.singles[0][3][5] == pytest.approx(float(tensors["surface"][0, 3, 5]), rel=1e-4)
    assert len(tensors["cos_F"]) == len(tensors["pairs"]) == 200


class Wavy(nn.Module):
    """Rises along its gradient for a short way, then falls: the ridge of single-step training."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        z = self.inner(x)
        return torch.stack([torch.sin(3 * (z[:, 0] - z[:, 1])), 0 * z[:, 0]], 1)


def test_a_ridge_is_seen():
    model, split, _ = linear(classes=2)
    wavy = Wavy(model)
    labels = wavy(split.take(slice(None))[0]).argmax(1)
    assert measured(wavy, Split("test", split.images, labels)).surface.ridge.median > 0.1


def test_a_random_model_is_held_at_one_draw_and_charged():
    class Noisy(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) * (1 + 0.3 * torch.rand(3))

    model, split, w = linear()
    first = measured(Noisy(model), split)
    torch.rand(1)
    assert first == measured(Noisy(model), split)
    assert first.fixed_draw
    assert torch.is_grad_enabled()  # later checks need gradients
    assert not measured(model, split).fixed_draw
    assert first.norms.frobenius.low == pytest.approx(first.norms.frobenius.high, rel=1e-5)  # one draw for all
    assert float(w.norm()) < first.norms.frobenius.low < 1.3 * float(w.norm())
    assert first.cost.forwards > 1000
    assert first.cost.backwards > 1000
    assert first.cost.backwards == measured(model, split).cost.backwards


def test_a_generator_of_its_own_leaves_everything_out():
    class Own(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.draw = inner, torch.Generator()

        def forward(self, x):
            z = self.inner(x)
            return z + torch.randn(z.shape, generator=self.draw)

    model, split, _ = linear()
    found = measured(Own(model), split)
    assert "no seed fixes" in found.left_out["jacobian"]
    assert found.norms is None


def test_many_classes_give_way_to_estimates():
    model, split, w = linear(classes=100)
    found = measured(model, split, suite=SUITE.model_copy(update={"jacobian_backwards": 1000}))
    assert found.norms is None
    assert found.frobenius.median == pytest.approx(float(w.norm()), rel=0.1)
    assert found.pairs == []
    assert set(found.left_out) == {"norms", "pairs"}
    assert found.bounds.table.images == 5
    assert found.surface is not None


def test_a_model_that_stops_its_gradient_does_not_stop_the_audit():
    class Stopped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x.detach())

    model, split, _ = linear()
    found = measured(Stopped(model), split)
    assert found.gradients.loss_zero == 1
    assert found.norms.frobenius.high == 0
    assert found.sharing is None
    assert found.subspaces[0].dimension is None
    assert found.subspaces[0].dead > 0
    assert found.plain()  # no NaN


def test_nothing_is_measured_where_a_jacobian_means_nothing():
    model, split, _ = linear()
    assert measured(model, split, suite=SUITE.model_copy(update={"jacobian_backwards": 0})) is None
    maps = Split("test", split.images, torch.zeros(60, 6, 6, dtype=torch.int64))
    pixels = nn.Conv2d(1, 3, 3, padding=1)
    assert measured(pixels, maps) is None
    with Victim(FunctionModel(lambda images: model(images).detach())) as box:
        box.inspect(split.take(slice(0, 8))[0], scores=True)
        assert jacobian.measure(box, split, {}, SUITE, eps=0.1) is None

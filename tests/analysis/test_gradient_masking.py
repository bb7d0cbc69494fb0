"""Adversarial subspaces, loss surfaces and gradient statistics, on models whose answers are known."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gambeson as gb
from gambeson import UserError
from gambeson.analysis import adversarial_subspace, gradient_statistics, hadamard, loss_surface
from gambeson.analysis.gradient_masking import orthogonal_signs
from gambeson.analysis.subspace import directions
from gambeson.threat import Ball
from tests.analysis.test_jacobian import close
from tests.conftest import LinearNet, binary, inner_images


class Scaled(nn.Module):
    def __init__(self, inner, factor):
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, x):
        return self.inner(x) * self.factor


class Rounded(Scaled):
    def forward(self, x):
        return self.inner((x * self.factor).round() / self.factor)


@pytest.mark.parametrize("order", [1, 4, 16, 64])
def test_regular_hadamard_matrices(order):
    matrix = hadamard(order)
    torch.testing.assert_close(matrix @ matrix.T, order * torch.eye(order))
    assert set(matrix.flatten().tolist()) <= {-1.0, 1.0}
    assert (matrix.sum(1) == math.sqrt(order)).all()


@given(seed=st.integers(0, 10**6), k=st.sampled_from([1, 4, 16, 64]), zeros=st.booleans(), norm=st.sampled_from("i2"))
def test_directions_are_orthogonal_of_full_length_and_aligned(seed, k, zeros, norm):
    ball = Ball(eps=0.1, norm="inf" if norm == "i" else "2")
    draw = torch.Generator().manual_seed(seed)
    g = torch.randn(3, 1, 8, 9, generator=draw)
    if zeros:
        g[:, :, ::2] = 0
    rows = torch.stack(list(directions(g, ball, k, draw)), 1).flatten(2).double()  # (N, k, D)
    gram = rows @ rows.transpose(1, 2)
    own = gram.diagonal(dim1=1, dim2=2)
    assert float((gram - torch.diag_embed(own)).abs().max()) < 1e-6 * float(own.max())
    for image in rows:
        assert (ball.length(image.float().view(k, 1, 8, 9)) <= 0.1 * (1 + 1e-6)).all()
    close(ball.length(rows[0].float().view(k, 1, 8, 9)), torch.full((k,), 0.1), 1e-6)
    gains = (rows * g.flatten(1)[:, None].double()).sum(2)
    if norm == "2":
        close(gains, 0.1 * g.flatten(1).norm(dim=1)[:, None].expand(3, k) / math.sqrt(k))
    else:
        close(gains.mean(1), 0.1 / math.sqrt(k) * g.abs().flatten(1)[:, kept(g, rows)].sum(1), 1e-4)


def kept(g, rows):
    """The values that are in a block; the leftover ones are 0 in every direction."""
    return (rows != 0).any(1).all(0)


def level(shape=(1, 8, 8), size=0.5):
    """A binary linear model whose weights all have one size, and its eight images of class 0 with their margins."""
    signs = torch.where(torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5, -1.0, 1.0)
    model = LinearNet(torch.stack([torch.zeros(shape), size * signs]))
    x = inner_images(8, shape)
    with torch.no_grad():
        model.bias[1] -= model(x).diff(dim=1).max() + 0.21
        margin = -model(x).diff(dim=1).flatten()
    return model, x, torch.zeros(8, dtype=torch.long), margin, size * math.prod(shape)


@pytest.mark.parametrize("eps", [0.01, 0.05, 0.1, 0.2])
def test_a_level_model_breaks_along_all_or_none_of_k(eps):
    model, x, y, margin, length_1 = level()
    found = adversarial_subspace(model, x, y, eps=eps, permutations=1)
    for row, k in enumerate(found.orders):
        expected = torch.where(math.sqrt(k) < eps * length_1 / margin, k, 0)
        assert torch.equal(found.counts[row], expected)
    assert found.eligible.all()
    close(found.cosine, torch.zeros(4), 1e-5)
    close(found.length, torch.ones(4), 1e-5)
    assert adversarial_subspace(model, x, y, eps=0).dimension.max() == 0


def test_the_norm_2_finds_the_formula_of_a_linear_model():
    model, w = binary((1, 6, 6))
    x = inner_images(12, (1, 6, 6))
    with torch.no_grad():
        model.bias[1] -= model(x).diff(dim=1).mean()  # small margins, so that the box does not bind
    y = model(x).argmax(1)
    margin = model(x).diff(dim=1).flatten().abs().detach()
    eps = float(margin.median() / w.norm()) * 2.9
    found = adversarial_subspace(model, x, y, eps=eps, norm=2, orders=tuple(range(1, 37)), permutations=1)
    inside = (x.flatten(1) + eps <= 1).all(1) & (x.flatten(1) - eps >= 0).all(1)
    expected = (eps * w.norm() / margin).square().floor().clamp(max=36).long()
    assert inside.any()
    assert torch.equal(found.dimension[inside], expected[inside])
    assert len(expected[inside].unique()) > 2


def test_images_without_a_dimension_are_told_apart():
    model, x, y, _, _ = level()
    dead = Rounded(model, 4)
    found = adversarial_subspace(dead, x, dead(x).argmax(1), eps=0.2)
    assert found.dead == 8
    assert math.isnan(found.share_at_least(1))
    guided = adversarial_subspace(dead, x, dead(x).argmax(1), eps=0.4, guide=model.weight[1].expand_as(x).detach())
    assert guided.share_at_least(1) == 1
    wrong = adversarial_subspace(model, x, 1 - y, eps=0.2)
    assert not wrong.eligible.any()
    assert wrong.dimension.max() == 0
    clipped = adversarial_subspace(model, x.round(), y, eps=0.2, orders=(16,))
    assert clipped.length[0] <= 1
    assert clipped.cosine[0] > 0.1  # the clip has cost the orthogonality, and says so
    few = adversarial_subspace(model, x, y, eps=0.2, orders=(4, 256))
    assert few.orders == (4,)


def test_more_permutations_never_count_fewer_directions():
    model, w = binary((1, 6, 6))
    x = inner_images(60, (1, 6, 6))
    y = model(x).argmax(1)
    margin = model(x).diff(dim=1).flatten().abs().detach()
    eps = 2.5 * float(margin.median() / w.abs().sum())
    counts = [
        adversarial_subspace(model, x, y, eps=eps, orders=(4, 16), permutations=turns).counts for turns in (1, 2, 3, 4)
    ]
    for fewer, more in itertools.pairwise(counts):
        assert (more >= fewer).all()
    assert (counts[-1] > counts[0]).any()


def test_what_no_subspace_is_defined_for_is_refused():
    model, x, y, _, _ = level()
    for settings, words in (
        ({"norm": "1"}, "norms inf and 2"),
        ({"orders": (8,)}, "order 8"),
        ({"orders": (256,)}, "expected one"),
        ({"eps": 20}, "pixels are in"),
    ):
        with pytest.raises(UserError, match=words):
            adversarial_subspace(model, x, y, **{"eps": 0.1} | settings)


def test_a_trained_model_has_adversarial_directions(trained, digits):
    x, y = digits.test.take(slice(0, 60))
    found = adversarial_subspace(trained, x, y, eps=0.3)
    assert found.share_at_least(1) > 0.5 > found.share_at_least(64)
    # The first order is the plain signed gradient: at least FGSM's share of hits.
    hits = (trained(gb.attacks.FGSM(eps=0.3)(trained, x, y)).argmax(1) != y) & found.eligible
    assert int((found.counts[0] * found.eligible).sum()) == int(hits.sum())


@given(seed=st.integers(0, 10**6), size=st.integers(2, 30), zeros=st.integers(0, 5))
def test_orthogonal_signs_are_orthogonal_and_best(seed, size, zeros):
    draw = torch.Generator().manual_seed(seed)
    g, guide = torch.randn(3, 1, 1, size, generator=draw).sign(), torch.randn(3, 1, 1, size, generator=draw)
    g[..., : min(zeros, size - 1)] = 0
    signs = orthogonal_signs(g, guide)
    assert ((g * signs).flatten(1).sum(1) == 0).all()
    odd = (g != 0).flatten(1).sum(1) % 2
    assert torch.equal((signs == 0).flatten(1).sum(1), odd)
    if size <= 10 and not odd.any():
        every = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * size).view(-1, size)
        for row in range(3):
            allowed = every[(every * g[row].flatten()).sum(1) == 0]
            best = (allowed * guide[row].flatten()).sum(1).max()
            close((signs[row] * guide[row]).sum(), best)


def test_the_surface_of_a_linear_model_rises_along_the_gradient_alone():
    model, w = binary((1, 4, 4))
    x, y = inner_images(3, (1, 4, 4)), torch.tensor([0, 1, 0])
    found = loss_surface(model, x, y, extent=0.1, points=5, other=LinearNet(torch.randn(2, 1, 4, 4)))
    margin = model(x).diff(dim=1).flatten().detach() * (1 - 2 * y)
    slopes = [(w * found.gradient).flatten(1).sum(1) * (1 - 2 * y), (w * found.orthogonal).flatten(1).sum(1)]
    close(slopes[0], w.abs().sum().expand(3))
    grid = margin[:, None, None] + found.steps[:, None] * slopes[0][:, None, None]
    grid = grid + found.steps * (slopes[1] * (1 - 2 * y))[:, None, None]
    close(found.loss, torch.nn.functional.softplus(grid))
    assert torch.equal(found.wrong, grid > 0)
    close(found.ridge, torch.zeros(3))
    close(found.loss[:, 2, 2], torch.nn.functional.cross_entropy(model(x), y, reduction="none").detach())
    again = loss_surface(model, x, y, extent=0.1, points=5)
    assert torch.equal(again.orthogonal, loss_surface(model, x, y, extent=0.1, points=5).orthogonal)
    assert not torch.equal(again.orthogonal, found.orthogonal)
    edge = loss_surface(model, x.round(), y, extent=0.1, points=3, clip=True)
    close(edge.loss[:, 1, 1], loss_surface(model, x.round(), y, extent=0.1, points=3).loss[:, 1, 1])
    assert not torch.equal(edge.loss, loss_surface(model, x.round(), y, extent=0.1, points=3).loss)


def test_a_bump_in_the_loss_is_a_ridge():
    class Bump(nn.Module):
        def forward(self, x):
            s = x.flatten(1).mean(1) - 0.5
            return torch.stack([0 * s, s * (0.03 - s).sign() * 100], 1)

    x = torch.full((2, 1, 4, 4), 0.5)
    found = loss_surface(Bump(), x, torch.zeros(2, dtype=torch.long), extent=0.1, points=21)
    assert (found.ridge > 1).all()


def test_surfaces_that_have_no_middle_are_refused():
    model, _ = binary((1, 4, 4))
    x, y = inner_images(1, (1, 4, 4)), torch.tensor([0])
    for settings, words in (({"points": 4}, "points = 4: expected an odd"), ({"extent": 0.0}, "extent = 0.0")):
        with pytest.raises(UserError, match=words):
            loss_surface(model, x, y, **settings)


def test_gradients_of_a_linear_model_have_their_formula():
    model, w = binary((1, 4, 4))
    x, y = inner_images(9, (1, 4, 4)), torch.arange(9) % 2
    found = gradient_statistics(model, (x, y))
    wrong = 1 - model(x).softmax(1).gather(1, y[:, None]).detach()
    close(found.loss_norm.mean, float((wrong * w.norm()).mean()))
    close(found.margin_norm.mean, w.norm())
    close(found.logit_range.mean, model(x).diff(dim=1).abs().mean().detach())
    assert (found.loss_zero, found.margin_zero, found.zero_values, found.saturated) == (0, 0, 0, 0)
    assert found.images == found.loss_norm.n == 9


def test_logits_scaled_up_hide_the_loss_gradient_only(trained, digits):
    few = digits.test.subset(torch.arange(100))
    plain, scaled = (gradient_statistics(model, few) for model in (trained, Scaled(trained, 1e4)))
    assert plain.loss_zero < 0.1
    assert scaled.loss_zero > 0.8 > scaled.margin_zero == 0
    assert scaled.masked_by_scale > 0.8
    assert scaled.saturated > 0.8 > plain.saturated
    close(scaled.rescaled_norm.mean / plain.rescaled_norm.mean, 1, 1e-3)
    close(scaled.margin_norm.mean / plain.margin_norm.mean / 1e4, 1, 1e-3)


def test_rounding_kills_every_gradient(trained, digits):
    few = digits.test.subset(torch.arange(30))
    found = gradient_statistics(Rounded(trained, 8), few)
    assert (found.loss_zero, found.margin_zero, found.masked_by_scale, found.rescaled_ratio) == (1, 1, 0, None)
    with pytest.raises(UserError, match="NaN or infinite logits"):
        gradient_statistics(Scaled(trained, float("nan")), few)

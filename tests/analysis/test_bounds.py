"""Bounds hold for random and for crafted perturbations, and are attained where a formula says so."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gambeson as gb
from gambeson import UserError
from gambeson.analysis import (
    batch_jacobian,
    bound_table,
    linearise,
    stacked_gram,
    stacked_norm,
    strongest_signs,
)
from tests.analysis.test_jacobian import SHAPE, close, labelled, linear, relu_net
from tests.conftest import LinearNet, inner_images, shaded_images


def test_every_bound_of_a_linear_model_has_its_formula():
    model, w = linear()
    pair = labelled(model, inner_images(8, SHAPE))
    _, s, vh = torch.linalg.svd(w.double())
    best, other = (0.3 * vh[k].float().view(1, *SHAPE) for k in (0, -1))
    table = bound_table(model, pair, [best, other])
    first, second = table.rows
    close(first.effect, 8 * 0.09 * s[0] ** 2)
    close(first.spectral_bound, 8 * 0.09 * s[0] ** 2)
    close(first.frobenius_bound, 8 * 0.09 * s.square().sum())
    close(first.box_mean, 8 * best.abs().max() ** 2 * s.square().sum())
    close(first.box_bound, 8 * 24 * best.abs().max() ** 2 * s[0] ** 2)
    close(first.box_frobenius_bound / first.box_mean, 24)
    close(first.attained, 1)
    assert second.attained < 1e-6  # outside the row space: no effect at all
    assert second.linear_error == second.measured_error == 0
    close([table.sigma, table.box_tightness], [math.sqrt(8) * s[0], 24 * s[0] ** 2 / s.square().sum()])
    margin = model(pair[0]).detach().topk(2).values.diff(dim=1).abs().double()
    close(table.weighted_sigma**2, float(s[0] ** 2 * margin.pow(-2).sum()), 1e-4)
    with torch.no_grad():
        wrong = (model(pair[0] + best).argmax(1) != pair[1]).double().mean()
    close(first.linear_error, wrong)
    close(first.measured_error, wrong)


def test_the_measured_error_is_that_of_clipped_images_and_the_linear_one_is_not():
    model, _ = linear()
    x, y = labelled(model, shaded_images(40, SHAPE))
    deltas = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(5)) * 0.6
    found = linearise(model, (x, y), deltas)
    with torch.no_grad():
        clipped = [int((model((x + delta).clamp(0, 1)).argmax(1) != y).sum()) for delta in deltas]
        straight = [int((model(x + delta).argmax(1) != y).sum()) for delta in deltas]
        apart = torch.stack([(model((x + one).clamp(0, 1)) - model(x + one)).norm(dim=1) for one in deltas])
    assert found.measured_errors == clipped
    assert found.errors == straight
    assert all(one != other for one, other in zip(clipped, straight, strict=True))
    close(found.rest, apart, 1e-4)


@pytest.mark.parametrize("reach", [0.9, 1.1, 1.3, 1.5])
def test_an_image_is_counted_from_its_margin_over_the_root_of_two(reach):
    """P4: along w_1 - w_0 the logits of two classes part by sqrt(2) times the change's length, so the bound is met."""
    weight = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    w = weight[1] - weight[0]
    half = torch.stack([-w / 2, w / 2])
    x = shaded_images(12, SHAPE) * 0.5 + 0.25
    model = LinearNet(half, torch.tensor([3.0, -3.0]) - x.flatten(1).mm(half.flatten(1).T).mean(0))
    y = torch.zeros(12, dtype=torch.long)
    margin = -model(x).diff(dim=1).flatten().detach().double()
    assert (margin > 0).all()
    y[:2] = 1  # wrong as they are
    right = margin[2:]
    change = reach * float(right.median())  # of the logits' difference
    delta = change / float(w.square().sum()) * w
    table = bound_table(model, (x, y), [delta])
    (row,) = table.rows
    assert table.errors == 2
    close(row.counted_error, (2 + (change / 2**0.5 >= right / 2**0.5).sum()) / 12)
    squares = change**2 / 2 / right.square()
    close(row.effect_error, min(1.0, (2 + 2 * float(squares.sum())) / 12))
    # All rows of the weighted stack lie along w: its top singular value is theirs together, and the bound is tight.
    close(row.bound_error, row.effect_error, 1e-4)
    close(row.effect, 12 * change**2 / 2)
    flipped = (change > right).sum()
    close(row.linear_error, (flipped + (change < margin[:2]).sum()) / 12)


def test_shares_of_errors_are_never_above_one():
    model, w = linear(2)
    x, y = labelled(model, inner_images(4, SHAPE))
    (row,) = bound_table(model, (x, y), [50 * (w[1] - w[0]).view(SHAPE)]).rows
    assert row.effect_error == row.bound_error == row.counted_error == 1


@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 12),
    length=st.sampled_from([0.0, 1e-3, 0.02, 0.1, 0.5]),
    kind=st.sampled_from(["noise", "signs", "top", "jacobian"]),
)
def test_bounds_hold_for_random_and_crafted_perturbations(seed, count, length, kind):
    draw = torch.Generator().manual_seed(seed)
    model, x = relu_net(seed), torch.rand(count, *SHAPE, generator=draw)
    y = torch.randint(0, 4, (count,), generator=draw)
    gram = stacked_gram(model, (x, y))
    delta = {
        "noise": lambda: torch.randn(1, *SHAPE, generator=draw),
        "signs": lambda: strongest_signs(gram, seed=seed)[None],
        "top": lambda: gram.top(1).directions,
        "jacobian": lambda: batch_jacobian(model, x)[0, 0].view(1, *SHAPE).detach(),
    }[kind]()
    delta = length * delta / delta.norm().clamp(min=1e-9)
    table = bound_table(model, (x, y), [delta])
    (row,) = table.rows
    slack = 1 + 1e-5
    exact = float((batch_jacobian(model, x).double() @ delta.flatten().double()).square().sum())
    assert row.effect == pytest.approx(exact, rel=1e-4, abs=1e-10)
    assert row.effect <= row.spectral_bound * slack
    assert row.spectral_bound <= row.frobenius_bound * slack
    assert row.spectral_bound <= row.box_bound * slack
    assert row.box_mean <= row.box_bound * slack <= row.box_frobenius_bound * slack**2
    assert row.linear_error <= row.counted_error <= row.effect_error + 1e-6 <= row.bound_error + 2e-6
    wrong = int((model(x).argmax(1) != y).sum())
    assert table.errors == wrong
    if length == 0:
        assert row.linear_error == row.bound_error == row.measured_error == wrong / count
    with torch.no_grad():
        measured = (model((x + delta).clamp(0, 1)).argmax(1) != y).double().mean()
    close(row.measured_error, measured)


def test_bounds_hold_for_a_crafted_universal_perturbation(trained, digits):
    uaps = [gb.attacks.StochasticPGD(eps=eps, steps=40, restarts=1).craft(trained, digits) for eps in (0.05, 0.2)]
    random = torch.where(torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.5, -0.2, 0.2)
    few = digits.test.subset(torch.arange(150))
    table = bound_table(trained, few, [uaps[0].delta, uaps[1].delta, random])
    small, large, noise = table.rows
    for row in table.rows:
        assert row.effect <= row.spectral_bound * (1 + 1e-5) <= row.box_bound * (1 + 2e-5)
        assert row.linear_error <= row.counted_error <= row.effect_error <= row.bound_error
    assert large.measured_error > 2 * noise.measured_error
    assert large.attained > 2 * noise.attained
    assert small.measured_error < small.bound_error
    # At the smaller eps the linearised model is a fair account of the true one.
    assert abs(small.linear_error - small.measured_error) < 0.1
    assert noise.effect == pytest.approx(noise.box_mean, rel=0.7)
    gram = stacked_gram(trained, few)
    best = strongest_signs(gram).flatten().double()
    assert float(best @ gram.matrix @ best) * 0.04 >= large.effect


@given(seed=st.integers(0, 10**6), count=st.integers(1, 4))
def test_brute_force_over_signs_lies_between_the_bounds(seed, count):
    draw = torch.Generator().manual_seed(seed)
    model = torch.nn.Sequential(LinearNet(torch.randn(6, 1, 2, 5, generator=draw)), torch.nn.ReLU())
    model.append(torch.nn.Linear(6, 3).requires_grad_(False))
    with torch.no_grad():
        model[2].weight.copy_(torch.randn(3, 6, generator=draw))
    pair = torch.rand(count, 1, 2, 5, generator=draw), torch.zeros(count, dtype=torch.long)
    gram = stacked_gram(model, pair)
    z = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=10)), dtype=torch.float64)
    effects = (z @ gram.matrix * z).sum(1)
    close(effects.mean() / max(gram.trace, 1e-9), 1.0 if gram.trace > 0 else 0.0)
    most, sigma = float(effects.max()), float(gram.top().values[0])
    assert gram.trace * (1 - 1e-6) <= most <= 10 * sigma * (1 + 1e-6) <= 10 * gram.trace * (1 + 2e-6)
    found = strongest_signs(gram, starts=20).flatten().double()
    reached = float(found @ gram.matrix @ found)
    assert set(found.tolist()) <= {-1.0, 1.0}
    assert 0.9 * most <= reached <= most * (1 + 1e-9)


def test_the_linearised_model_is_exact_where_the_model_is_linear(trained, digits):
    model, w = linear()
    x, y = labelled(model, inner_images(6, SHAPE))
    deltas = 0.1 * torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    line = linearise(model, (x, y), deltas)
    close(line.change, (deltas.flatten(1) @ w.T)[:, None].expand(3, 6, 5))
    assert line.errors == line.measured_errors
    assert float(line.rest.max()) < 1e-4
    x, y = digits.test.take(slice(0, 50))
    steps = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    inner = x * 0.5 + 0.25  # the box does not bind
    near, far = (float(linearise(trained, (inner, y), eps * steps).rest.mean() / eps) for eps in (1e-3, 0.1))
    assert near < 0.2 * far


@given(seed=st.integers(0, 10**6), p=st.sampled_from([math.inf, 2.0, 1.5, 4.0]), q=st.sampled_from([1.0, 2.0, 3.0]))
def test_stacked_norms_hold_from_both_sides(seed, p, q):
    draw = torch.Generator().manual_seed(seed)
    model, x = relu_net(seed), torch.rand(5, *SHAPE, generator=draw)
    pair = x, torch.zeros(5, dtype=torch.long)
    norm = stacked_norm(model, pair, p=p, q=q, seed=seed)
    rows = batch_jacobian(model, x).flatten(0, 1).double()
    v = norm.direction.flatten().double()
    assert float(v.norm(p=p)) == pytest.approx(1, abs=1e-5)
    close(float((rows @ v).norm(p=q)) / norm.attained, 1.0, 1e-4)
    assert norm.attained <= norm.bound * (1 + 1e-5)
    delta = torch.randn(200, 24, generator=draw, dtype=torch.float64)
    effects = (delta @ rows.T).abs().pow(q).sum(1)
    assert (effects <= torch.tensor([(norm.bound * float(d.norm(p=p))) ** q for d in delta]) * (1 + 1e-5)).all()
    reached = ((delta @ rows.T).norm(p=q, dim=1) / delta.norm(p=p, dim=1)).max()
    assert norm.attained > float(reached)  # a random direction is no power method
    if p == q == 2:
        assert norm.attained <= float(torch.linalg.svdvals(rows)[0]) * (1 + 1e-5)
        assert norm.attained >= 0.9 * float(torch.linalg.svdvals(rows)[0])


def test_the_norm_of_a_single_row_is_attained():
    weight = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    pair = inner_images(1, SHAPE), torch.zeros(1, dtype=torch.long)
    weight = torch.cat([weight, 0 * weight])
    norm = stacked_norm(LinearNet(weight), pair)
    close([norm.attained, norm.bound], [weight.abs().sum()] * 2)
    with pytest.raises(UserError, match="q = inf: expected p above 1"):
        stacked_norm(LinearNet(weight), pair, q=math.inf)


def test_perturbations_of_another_shape_are_refused():
    model, _ = linear()
    pair = labelled(model, inner_images(3, SHAPE))
    for wrong in ([], [torch.zeros(1, 1, 3, 4)]):
        with pytest.raises(UserError, match=r"expected one or more of \(1, 2, 3, 4\)"):
            bound_table(model, pair, wrong)

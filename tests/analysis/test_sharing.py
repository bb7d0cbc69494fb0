"""Pair metrics, correlations over models, ensembles: formulas, and random protocols that are what they say."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gambeson import UserError
from gambeson.analysis import (
    batch_jacobian,
    correlate,
    diversity_gain,
    pair_metrics,
    pair_sharing,
    partial,
    pearson,
    sharing_factor,
    spearman,
    stacked_spectrum,
    universal_alignment,
)
from gambeson.analysis.correlation import ranks
from gambeson.analysis.sharing import draw_pairs
from gambeson.victim import Victim
from tests.analysis.test_jacobian import SHAPE, close, labelled, linear, relu_net
from tests.conftest import LinearNet, inner_images


def test_two_inputs_of_a_linear_model_share_everything():
    model, w = linear()
    jacobian = batch_jacobian(model, inner_images(3, SHAPE))
    found = pair_metrics(jacobian, jacobian.flip(0))
    for name in ("cos_F", "ratio_s", "cka"):
        close(found[name], torch.ones(3))
    singular = torch.linalg.svdvals(w.double())
    close(found["rank1"], (singular[0] ** 2 / singular.square().sum()).expand(3))
    close(pair_metrics(jacobian, -jacobian)["cos_F"], -torch.ones(3))
    close(pair_metrics(jacobian, -jacobian)["cka"], torch.ones(3))  # free of signs
    close(sharing_factor(model, labelled(model, inner_images(4, SHAPE))), 1)


def test_orthogonal_inputs_share_nothing_and_flat_ones_have_no_metric():
    first, second = torch.zeros(1, 3, 10), torch.zeros(1, 3, 10)
    first[..., :5] = torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(0))
    second[..., 5:] = 2 * torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(1))
    found = pair_metrics(first, second)
    tops = [float(torch.linalg.svdvals(one[0])[0]) ** 2 for one in (first, second)]
    close([found["cos_F"], found["cka"], found["ratio_s"]], [0, 0, max(tops) / sum(tops)])
    assert all(value.isnan().all() for value in pair_metrics(first, 0 * second).values())


@given(seed=st.integers(0, 10**6), classes=st.integers(1, 5))
def test_metrics_lie_in_their_ranges_and_equal_the_svd(seed, classes):
    draw = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(4, classes, 12, generator=draw) for _ in range(2))
    found = pair_metrics(a, b)
    assert (found["cos_F"].abs() <= 1).all()
    assert ((found["ratio_s"] >= 0.5 - 1e-6) & (found["ratio_s"] <= 1 + 1e-6)).all()
    assert ((found["rank1"] > 0) & (found["rank1"] <= 1 + 1e-6)).all()
    assert ((found["cka"] >= 0) & (found["cka"] <= 1 + 1e-6)).all()
    top = torch.linalg.svdvals(torch.cat([a, b], 1).double())[:, 0].square()
    close(found["rank1"], top / (a.square().sum((1, 2)) + b.square().sum((1, 2))))
    close(found["ratio_s"], top / sum(torch.linalg.svdvals(j.double())[:, 0].square() for j in (a, b)))
    close(found["cos_F"], torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1)))
    close(found["ratio_s"], pair_metrics(b, a)["ratio_s"])


@given(seed=st.integers(0, 10**6), count=st.integers(4, 40), pairs=st.integers(2, 60))
def test_pairs_are_half_within_and_half_between_classes(seed, count, pairs):
    labels = torch.randint(0, 3, (count,), generator=torch.Generator().manual_seed(seed))
    labels[:3] = torch.tensor([0, 1, 1])
    drawn = draw_pairs(labels, pairs, seed)
    same = labels[drawn[:, 0]] == labels[drawn[:, 1]]
    assert same[: pairs // 2].all()
    assert not same[pairs // 2 :].any()
    assert (drawn[:, 0] != drawn[:, 1]).all()
    assert torch.equal(drawn, draw_pairs(labels, pairs, seed))


def test_every_partner_is_drawn_equally_often():
    labels = torch.tensor([1, 0, 1, 2, 0, 1, 1])
    drawn = draw_pairs(labels, 40_000, 0)
    within = torch.zeros(7, 7).index_put_(tuple(drawn[:20_000].T), torch.ones(20_000), accumulate=True)
    expected = torch.where((labels[:, None] == labels) & ~torch.eye(7, dtype=torch.bool), 1.0, 0.0)
    expected = 20_000 / 6 * expected / expected.sum(1, keepdim=True).clamp(min=1)
    assert ((within - expected).abs() <= 5 * expected.sqrt()).all()


def test_a_trained_model_shares_more_within_classes(trained, digits):
    found = pair_sharing(trained, digits, pairs=300)
    assert found.same_class.sum() == 150
    within, between = (found.spread("cos_F", same_class=same) for same in (True, False))
    assert within.mean > between.mean + 0.05
    assert (within.n, between.n) == (150, 150)
    labels = digits.test.labels[found.pairs]
    assert torch.equal(labels[:, 0] == labels[:, 1], found.same_class)
    # The first pair by hand, and the same numbers for the same seed.
    x, _ = digits.test.take(found.pairs[0])
    jacobian = batch_jacobian(trained, x)
    close(found.values["cka"][:1], pair_metrics(jacobian[:1], jacobian[1:])["cka"], 1e-4)
    assert torch.equal(found.values["cos_F"], pair_sharing(trained, digits, pairs=300).values["cos_F"])


def test_pairs_that_cannot_be_drawn_are_refused():
    model, _ = linear()
    x = inner_images(3, SHAPE)
    with pytest.raises(UserError, match="pairs = 1: expected 2"):
        pair_sharing(model, (x, torch.tensor([0, 0, 1])), pairs=1)
    for labels in ([0, 1, 2], [1, 1, 1]):
        with pytest.raises(UserError, match="need two classes, one of them with two images"):
            pair_sharing(model, (x, torch.tensor(labels)))


def test_correlations_are_those_of_the_textbook():
    a = torch.tensor([1.0, 2.0, 3.0, 4.0, 10.0])
    close(pearson(a, 3 - 2 * a), -1)
    close(spearman(a, a.exp()), 1)
    close(ranks(torch.tensor([3.0, 1.0, 3.0, 7.0])), torch.tensor([2.5, 1.0, 2.5, 4.0]))
    b = torch.tensor([2.0, 1.0, 4.0, 3.0, 5.0])
    close(spearman(a, b), 1 - 6 * 4 / (5 * 24))
    close(pearson(a, b), torch.corrcoef(torch.stack([a, b]))[0, 1])
    c = torch.tensor([1.0, 3.0, 2.0, 5.0, 4.0])
    ab, ac, bc = spearman(a, b), spearman(a, c), spearman(b, c)
    close(partial(a, b, c), (ab - ac * bc) / math.sqrt((1 - ac**2) * (1 - bc**2)))


def test_a_control_takes_away_what_it_explains():
    draw = torch.Generator().manual_seed(0)
    norm = torch.randn(40, generator=draw)
    metric, uer = (norm + 0.5 * torch.randn(40, generator=draw) for _ in range(2))
    found = correlate(metric.tolist(), uer.tolist(), norm.tolist())
    assert found.spearman.low > 0.4
    assert found.partial.low < 0 < found.partial.high  # only the norm linked them
    assert found.spearman.low <= found.spearman.value <= found.spearman.high
    assert found == correlate(metric.tolist(), uer.tolist(), norm.tolist())
    linked = correlate(metric.tolist(), (uer + 2 * (metric - norm)).tolist(), norm.tolist())
    assert linked.partial.low > 0.3
    assert correlate(metric.tolist(), uer.tolist(), metric.tolist()).partial is None
    assert correlate(metric.tolist(), uer.tolist()).partial is None


def test_the_interval_of_a_correlation_is_that_of_the_middle_95_per_cent_of_its_resamples():
    draw = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 30, generator=draw).double()
    found = correlate(a.tolist(), b.tolist(), draws=3000, seed=0)
    picks = torch.randint(30, (20_000, 30), generator=draw)
    drawn = pearson(a[picks], b[picks])
    exact = torch.quantile(drawn[drawn.isfinite()], torch.tensor([0.025, 0.975], dtype=torch.float64))
    assert [found.pearson.low, found.pearson.high] == pytest.approx(exact.tolist(), abs=0.02)
    wide = torch.quantile(drawn[drawn.isfinite()], torch.tensor([0.05, 0.95], dtype=torch.float64))
    assert (wide - exact).abs().min() > 0.03  # which 90 per cent would be


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (([1, 2, 3], [1, 2, 3]), "4 models or more"),
        (([1, 2, 3, 4], [1, 2, 3]), "as many of each"),
        (([1, 2, 3, 4], [1, 2, 3, float("nan")]), "NaN or infinite"),
        (([1, 2, 3, 4], [5, 5, 5, 5]), "the same for every model"),
    ],
)
def test_columns_that_cannot_correlate_are_refused(columns, words):
    with pytest.raises(UserError, match=words):
        correlate(*columns)
    assert correlate([1, 2, 3, 4], [1, 2, 4, 3]).models == 4


def test_diversity_of_copies_of_orthogonal_members_and_of_cancelling_ones():
    model, w = linear()
    x = inner_images(4, SHAPE)
    close(diversity_gain([model] * 3, x), torch.ones(4))
    parts = [torch.zeros(5, 24) for _ in range(3)]
    for k, part in enumerate(parts):
        part[:, 8 * k : 8 * k + 8] = torch.nn.functional.normalize(w[:, :8].flatten(), dim=0).view(5, 8)
    nets = [LinearNet(part.view(5, *SHAPE)) for part in parts]
    close(diversity_gain(nets, x), torch.full((4,), 1 / 3))
    close(diversity_gain([model, LinearNet(-model.weight.detach())], x), torch.zeros(4))
    second = relu_net(classes=5)
    mean = (batch_jacobian(second, x) + w) / 2
    size = (batch_jacobian(second, x).square().sum((1, 2)) + w.square().sum()) / 2
    close(diversity_gain([model, second], x), mean.square().sum((1, 2)) / size)
    with pytest.raises(UserError, match="5 and 4 logits: choose members of the same classes"):
        diversity_gain([model, relu_net(classes=4)], x)
    for measure in (lambda: diversity_gain([], x), lambda: universal_alignment([], (x, torch.zeros(4).long()))):
        with pytest.raises(UserError, match="list of models is empty"):
            measure()


def test_the_universal_direction_of_a_mean_of_linear_members():
    (first, w), (second, u) = linear(seed=0), linear(seed=1)
    pair = labelled(first, inner_images(6, SHAPE))
    sigma = [math.sqrt(6) * float(torch.linalg.svdvals(m)[0]) for m in (w, u, (w + u) / 2)]
    with Victim(first) as victim:
        found = universal_alignment([victim, second], pair)
        assert (victim.forwards, victim.backwards) == (2 * 7, 2 * 6 * 5)  # one image more tells the number of classes
    close([*found.members, found.joint], sigma)
    close(found.ratio, 2 * sigma[2] / (sigma[0] + sigma[1]))
    assert found.ratio < 1
    copies = universal_alignment([first, first], pair)
    close([copies.ratio, copies.directions[0][1]], [1, 1])
    assert found.directions[0][1] < 0.9


def test_averaging_never_raises_the_universal_gradient(trained, digits):
    few = digits.test.subset(torch.arange(20))
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    found = universal_alignment([trained, net], few)
    assert found.joint <= sum(found.members) / 2 * (1 + 1e-6)
    assert found.members[0] == pytest.approx(float(stacked_spectrum(trained, few).values[0]) ** 0.5, rel=1e-5)

"""RayS on linear models, whose nearest wrong answer is known, against a plain loop, and by answers alone."""

import pytest
import torch

from gambeson import UserError
from gambeson.attacks import RayS
from gambeson.attacks.query.base import Queries
from gambeson.tasks import Segmentation
from tests.conftest import binary, inner_images

SHAPE = (1, 4, 5)


@pytest.fixture(scope="module")
def linear():
    """A linear model, images far from black and white, their answers, and the radius at which each answer changes."""
    model, w = binary(SHAPE)
    x = inner_images(12, SHAPE)
    with torch.no_grad():
        model.bias[0] += model(x).diff(dim=1).mean()
        apart = model(x).diff(dim=1).flatten()
    return model, x, (apart > 0).long(), apart.abs() / w.abs().sum()


def test_the_nearest_wrong_answer_of_a_linear_model_is_found_and_no_nearer_one(linear):
    model, x, y, radius = linear
    for factor, found in ((1.05, True), (0.95, False)):
        for k in range(3):
            one, eps = x[k : k + 1], factor * float(radius[k])
            moved = RayS(eps=eps, queries=600)(model, one, y[k : k + 1])
            assert float((moved - one).abs().max()) <= eps + 1e-6
            assert bool(model(moved).argmax(1) != y[k]) is found


def by_hand(wrong, size, eps, budget, tolerance=0.001):
    """The same attack on one image as a plain loop; the direction that ends it, or None, and the queries."""
    asked = 1  # the image itself

    def ask(radius, signs):
        nonlocal asked
        if asked == budget:
            raise StopIteration
        asked += 1
        return wrong(radius, signs)

    best, reach, stage, trial = [1.0] * size, None, 0, [[1.0] * size]
    try:
        while True:
            width = -(-size // 2**stage)
            for signs in trial:
                if ask(min(reach or 1.0, 1.0), signs):
                    low, high = eps, min(reach or 1.0, 1.0)
                    if ask(eps, signs):
                        return signs, asked
                    while high - low > tolerance:
                        middle = (low + high) / 2
                        low, high = (low, middle) if ask(middle, signs) else (middle, high)
                    best, reach = signs, high
            trial = _flips(lambda: best, size, width)  # noqa: B023, the best so far
            stage = 0 if width == 1 else stage + 1
    except StopIteration:
        return None, asked


def _flips(best, size, width):
    for first in range(0, size, width):
        now = best()
        yield [-v if first <= place < first + width else v for place, v in enumerate(now)]


@pytest.mark.parametrize("budget", [7, 40, 150])
def test_it_is_the_plain_loop(linear, budget):
    model, x, y, radius = linear
    eps = float(radius.median())
    queries = Queries(model)
    moved = RayS(eps=eps, queries=budget)(queries, x, y)
    for k in range(len(x)):

        def wrong(radius, signs, k=k):
            delta = radius * torch.tensor(signs).view(1, *SHAPE)
            return bool(model((x[k : k + 1] + delta).clamp(0, 1)).argmax(1) != y[k])

        signs, asked = by_hand(wrong, x[0].numel(), eps, budget)
        assert int(queries.spent[k]) == asked
        assert bool(model(moved[k : k + 1]).argmax(1) != y[k]) is (signs is not None)
        if signs is not None:
            assert torch.allclose(moved[k] - x[k], eps * torch.tensor(signs).view(SHAPE), atol=1e-6)


def test_the_top_class_is_enough(linear):
    model, x, y, radius = linear
    attack = RayS(eps=float(radius.median()), queries=100)
    known, seen = (Queries(ask) for ask in (model, lambda x: torch.eye(2)[model(x).argmax(1)]))
    first, second = attack(known, x, y), attack(seen, x, y)
    down = model(first).argmax(1) != y
    assert 2 < int(down.sum()) < len(x)
    assert torch.equal(first[down], second[down])
    assert torch.equal(known.spent, seen.spent)


def test_an_image_that_is_wrong_already_costs_one_query_and_stays(linear):
    model, x, y, _ = linear
    queries = Queries(model)
    moved = RayS(eps=0.01, queries=50)(queries, x, torch.cat([1 - y[:4], y[4:]]))
    assert queries.spent[:4].tolist() == [1] * 4
    assert torch.equal(moved[:4], x[:4])
    assert int(queries.spent.max()) == 50


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"targeted": True}, "omit targeted and loss"), ({"loss": "margin"}, "omit targeted"), ({"norm": "2"}, "norm")],
)
def test_what_it_is_not_for_is_refused(settings, said):
    with pytest.raises(UserError, match=said):
        RayS(eps=0.1, **settings)


def test_label_maps_are_refused_before_the_first_query():
    def never(x):
        raise AssertionError

    with pytest.raises(UserError, match="choose square"):
        RayS(eps=0.1)(never, torch.rand(2, 1, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long), task=Segmentation())

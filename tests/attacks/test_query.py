"""Query attacks against linear models, with budgets that the asked function counts by itself."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gambeson import UserError
from gambeson.attacks import CarliniWagner, DeepFool, RayS
from gambeson.attacks.query.base import Queries
from gambeson.attacks.query.nes import NES, SPSA
from gambeson.attacks.query.one_pixel import OnePixel
from gambeson.attacks.query.square import RandomSearch, Square
from gambeson.tasks import Classification, Segmentation
from gambeson.threat import Ball
from gambeson.victim import Victim
from tests.conftest import LinearNet, binary, full, inner_images

BALLS = [Square, RandomSearch, NES, SPSA]


def counted(model):
    count = []

    def ask(images):
        count.append(len(images))
        return model(images)

    return ask, count


def gain(model, x, x_adv, y):
    return ((model(x_adv) - model(x)).diff(dim=1).flatten() * (1 - 2 * y.float())).detach()


class Steep(torch.nn.Module):
    """The linear model with so large a bias for class 0 that labels of class 0 never fall."""

    def __init__(self, shape):
        super().__init__()
        self.inner, self.w = binary(shape)
        with torch.no_grad():
            self.inner.bias += torch.tensor([10 * float(self.w.abs().sum()), 0.0])

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("attack", BALLS)
@pytest.mark.parametrize("norm", ["inf", "2"])
@pytest.mark.parametrize("budget", [1, 2, 3, 30, 131])
def test_the_budget_is_used_reported_and_never_exceeded(attack, norm, budget):
    model = Steep((1, 4, 5))
    x, y = inner_images(5, (1, 4, 5)), torch.zeros(5, dtype=torch.long)
    ask, count = counted(model)
    queries = Queries(ask)
    x_adv = attack(eps=0.1, norm=norm, queries=budget)(queries, x, y)
    assert sum(count) == queries.total == int(queries.spent.sum())
    assert int(queries.spent.max()) == int(queries.spent.min()) <= budget
    assert int(queries.spent.min()) >= budget - 2
    assert (Ball(eps=0.1, norm=norm).length(x_adv - x) <= 0.1 + 1e-6).all()
    if budget > 3:
        assert (model(x_adv).diff(dim=1) > model(x).diff(dim=1)).all()


@pytest.mark.parametrize("budget", [1, 2, 9, 50, 137])
def test_few_pixel_s_budget_is_never_exceeded_in_the_last_generation_either(budget):
    model = Steep((3, 4, 5))
    x, y = inner_images(5, (3, 4, 5)), torch.zeros(5, dtype=torch.long)
    ask, count = counted(model)
    queries = Queries(ask)
    OnePixel(queries=budget, population=20, batch_size=16)(queries, x, y)
    assert sum(count) == queries.total
    assert queries.spent.tolist() == [budget] * 5
    assert max(count) <= 16


@pytest.mark.parametrize("attack", [*BALLS, OnePixel])
def test_an_image_that_is_adversarial_is_not_asked_about_again(attack):
    model, _ = binary((1, 4, 5))
    x = inner_images(12, (1, 4, 5))
    with torch.no_grad():
        model.bias[0] += model(x).diff(dim=1).mean()
    y = model(x).argmax(1)
    y[:4] = 1 - y[:4]  # wrong already
    settings = {"pixels": 2, "population": 20} if attack is OnePixel else {"eps": 0.03}
    queries = Queries(model)
    x_adv = attack(**settings, queries=400)(queries, x, y)
    down = model(x_adv).argmax(1) != y
    assert torch.equal(x_adv[:4], x[:4])
    assert queries.spent[:4].tolist() == [1] * 4
    assert down[4:].any()
    assert (queries.spent[down] < 400).all()
    assert (queries.spent[~down] >= 398).all()
    first = int(queries.spent[4:][down[4:]].min())
    with pytest.raises(RuntimeError, match="but the budget is 0"), queries.counting(x, 0):
        queries(x, torch.arange(12))
    assert first > 1


@pytest.mark.parametrize(
    ("shape", "norm"), [((1, 8, 9), "inf"), ((3, 7, 7), "2"), full((3, 7, 7), "inf"), full((1, 8, 9), "2")]
)
def test_square_comes_near_the_optimum_of_a_linear_model_and_beats_random_search(shape, norm):
    model = Steep(shape)
    x, y = inner_images(6, shape), torch.zeros(6, dtype=torch.long)
    best = 0.1 * float(model.w.abs().sum() if norm == "inf" else model.w.norm())
    square = gain(model, x, Square(eps=0.1, norm=norm, queries=600, p_init=0.3)(model, x, y), y) / best
    noise = gain(model, x, RandomSearch(eps=0.1, norm=norm, queries=600)(model, x, y), y) / best
    assert (square <= 1 + 1e-4).all()
    assert (square > noise).all()
    assert float(square.mean()) > (0.9 if norm == "inf" else 0.4)
    assert float(noise.mean()) < float(square.mean()) - 0.1


@pytest.mark.parametrize(("attack", "norm"), [(NES, "2"), (SPSA, "inf"), full(NES, "inf"), full(SPSA, "2")])
def test_estimated_gradients_reach_the_vertex_of_a_linear_model_and_beat_random_search(attack, norm):
    shape = (3, 4, 5)
    model = Steep(shape)
    x, y = inner_images(6, shape), torch.zeros(6, dtype=torch.long)
    best = 0.1 * float(model.w.abs().sum() if norm == "inf" else model.w.norm())
    # In double precision: the bias is so large that it would round small differences of the scores.
    reached = attack(eps=0.1, norm=norm, queries=1500)(model.double(), x.double(), y).float()
    share = gain(model.float(), x, reached, y) / best
    noise = gain(model, x, RandomSearch(eps=0.1, norm=norm, queries=1500)(model, x, y), y) / best
    assert (share <= 1 + 1e-4).all()
    assert (share > noise).all()
    assert float(share.mean()) > (0.9 if norm == "inf" else 0.85)


def test_nes_needs_one_pair_only_in_one_dimension():
    model, _ = binary((1, 1, 2))
    x, y = inner_images(4, (1, 1, 2)), torch.zeros(4, dtype=torch.long)
    with torch.no_grad():
        model.bias[0] += 100
    x_adv = NES(eps=0.1, pairs=1, rel_step_size=1.0, momentum=0.0, queries=60, loss="margin")(model, x, y)
    assert gain(model, x, x_adv, y).min() > 0
    assert (x_adv - x).abs().max() <= 0.1 + 1e-6


@pytest.mark.parametrize("pixels", [1, 3, 5])
def test_few_pixel_changes_at_most_so_many_pixels_and_finds_the_best_one(pixels):
    shape = (3, 4, 5)
    model = Steep(shape)
    x, y = inner_images(5, shape), torch.zeros(5, dtype=torch.long)
    x_adv = OnePixel(pixels=pixels, population=40, queries=2000, loss="margin")(model, x, y)
    changed = ((x_adv != x).any(1)).flatten(1).sum(1)
    assert (changed <= pixels).all()
    assert (changed >= 1).all()
    # Of a pixel alone the most is taken by its colours' best corner.
    corner = torch.where(model.w > 0, 1 - x, -x)
    each = (corner * model.w).sum(1).flatten(1)
    best = each.sort(1, descending=True).values[:, :pixels].sum(1)
    share = gain(model, x, x_adv, y) / best
    assert (share <= 1 + 1e-4).all()
    drawn = OnePixel(pixels=pixels, population=1999, queries=2000, loss="margin")(model, x, y)
    by_chance = float((gain(model, x, drawn, y) / best).mean())  # as many candidates, none of them a child
    assert float(share.mean()) > (0.95 if pixels == 1 else max(0.6, by_chance))
    assert torch.equal(OnePixel(pixels=0)(model, x, y), x)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("attack", [*BALLS, OnePixel])
def test_targets_are_reached(attack, classes):
    draw = torch.Generator().manual_seed(classes)
    model = LinearNet(torch.randn(classes, 1, 4, 5, generator=draw))
    x = inner_images(8, (1, 4, 5))
    with torch.no_grad():
        model.bias -= model(x).mean(0)
    target = model(x).topk(2).indices[:, 1]
    settings = {"pixels": 5, "population": 40} if attack is OnePixel else {"eps": 0.15}
    x_adv = attack(**settings, targeted=True, queries=800)(model, x, target)
    reached = model(x_adv).argmax(1) == target
    assert not (model(x).argmax(1) == target).any()
    assert reached.float().mean() >= 0.75


def test_square_s_windows_shrink_as_published_and_fit_the_image():
    attack = Square(eps=0.1, queries=10_000, p_init=0.8)
    shape = (3, 32, 32)
    assert [attack.side(k, shape) for k in (0, 10, 11, 51, 201, 501, 9999)] == [29, 29, 20, 14, 10, 7, 1]
    assert Square(eps=0.1, queries=5_000).side(26, shape) == attack.side(52, shape) == 14
    assert Square(eps=0.1, queries=5_000, rescale=False).side(26, shape) == 20
    for size in [(1, 1, 11), (1, 11, 1), (3, 2, 7), (1, 4, 4), (1, 1, 1)]:
        for norm in ("inf", "2"):
            square = Square(eps=0.1, norm=norm, queries=40)
            assert 1 <= square.side(0, size) <= min(size[1:])
            model, x = Steep(size), inner_images(3, size)
            x_adv = square(model, x, torch.zeros(3, dtype=torch.long))
            assert (Ball(eps=0.1, norm=norm).length(x_adv - x) <= 0.1 + 1e-6).all()


def test_square_with_early_abandon_stops_after_an_eighth_and_keeps_what_it_found():
    model = Steep((1, 6, 7))
    x, y = inner_images(8, (1, 6, 7)), torch.arange(8) // 4  # the first four never fall
    queries = Queries(model)
    short = Square(eps=0.01, queries=800, early_abandon=2)(queries, x, y)
    assert queries.spent[:4].tolist() == [100] * 4
    assert queries.spent[4:].tolist() == [1] * 4  # wrong as they are
    assert (gain(model, x, short, y)[:4] > 0).all()
    queries = Queries(model)
    Square(eps=0.01, queries=800)(queries, x, y)
    assert queries.spent[:4].tolist() == [800] * 4
    with pytest.raises(UserError, match="early_abandon reads the margin's distance"):
        Square(eps=0.1, targeted=True, early_abandon=1)
    with pytest.raises(UserError, match="early_abandon = 0"):
        Square(eps=0.1, early_abandon=0)


@pytest.mark.full
def test_square_with_early_abandon_breaks_what_the_whole_budget_breaks(trained, digits):
    class Stairs(torch.nn.Module):
        """The trained net behind pixels rounded to steps: its gradient is zero, its scores tell."""

        def forward(self, x):
            return trained((x * 8).round() / 8)

    x, y = digits.test.take(slice(0, 40))
    for model in (trained, Stairs()):
        whole, short = Queries(model), Queries(model)
        broken = model(Square(eps=0.12, queries=400)(whole, x, y)).argmax(1) != y
        also = model(Square(eps=0.12, queries=400, early_abandon=2)(short, x, y)).argmax(1) != y
        assert 3 < int(broken.sum()) < 37
        assert int(also.sum()) >= int(broken.sum()) - 1
        assert short.total < 0.9 * whole.total


def test_square_starts_from_stripes():
    model = Steep((3, 6, 7))
    x, y = inner_images(40, (3, 6, 7)), torch.zeros(40, dtype=torch.long)
    delta = Square(eps=0.1, queries=2)(model, x, y) - x
    moved = delta.flatten(1).any(1)  # the stripes are kept where they raise the margin
    assert 5 < int(moved.sum()) < 35
    torch.testing.assert_close(delta[moved].abs(), torch.full_like(delta[moved], 0.1))
    torch.testing.assert_close(delta, delta[:, :, :1].expand_as(delta), atol=1e-6, rtol=0)


@given(
    st.integers(1, 5),
    st.sampled_from([*BALLS, OnePixel]),
    st.sampled_from(["inf", "2"]),
    st.floats(0, 1),
    st.integers(0, 9),
)
def test_results_stay_in_ball_and_box_and_repeat(count, kind, norm, eps, seed):
    model, _ = binary((3, 3, 4), seed)
    x = torch.rand(count, 3, 3, 4, generator=torch.Generator().manual_seed(seed))
    x[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    y = torch.arange(count) % 2
    attack = kind(queries=25, population=6) if kind is OnePixel else kind(eps=eps, norm=norm, queries=25)
    x_adv = attack(model, x, y, seed=seed)
    assert x_adv.shape == x.shape
    assert x_adv.dtype == x.dtype
    assert ((x_adv >= 0) & (x_adv <= 1)).all()
    if kind is not OnePixel:
        assert (Ball(eps=eps, norm=norm).length(x_adv - x) <= eps + 1e-6).all()
        assert torch.equal(kind(eps=0, norm=norm)(model, x, y), x)
    assert torch.equal(attack(model, x, y, seed=seed), x_adv)
    assert (gain(model, x, x_adv, y) >= -1e-5).all()


def test_module_victim_and_plain_function_give_the_same_and_the_victim_counts(trained, digits):
    x, y = digits.test.take(slice(0, 30))
    attack = Square(eps=0.15, queries=60)
    queries = Queries(trained)
    with Victim(trained) as victim:
        inside = attack(victim, x, y)
    assert torch.equal(attack(queries, x, y), inside)
    assert victim.forwards == queries.total
    assert victim.backwards == 0
    trained.eval()
    # Arrays will do, and so will probabilities: their order is the same, though not their distances.
    assert torch.equal(attack(lambda images: trained(images).numpy(), x, y), inside)
    assert torch.equal(attack(lambda images: trained(images).tolist(), x, y), inside)
    by_chance = attack(lambda images: trained(images).softmax(1), x, y)
    clean = (trained(x).argmax(1) == y).sum()
    assert (trained(by_chance).argmax(1) == y).sum() < clean
    assert (trained(inside).argmax(1) == y).sum() < clean
    assert not torch.equal(attack(trained, x, y, seed=1), inside)


def test_ignored_images_are_left_alone_and_not_asked_about():
    model = Steep((1, 3, 3))
    x, y = inner_images(4, (1, 3, 3)), torch.tensor([0, 255, 0, 255])
    queries = Queries(model)
    x_adv = Square(eps=0.1, queries=20)(queries, x, y, task=Classification(ignore_index=255))
    assert queries.spent.tolist() == [20, 0, 20, 0]
    assert torch.equal(x_adv[[1, 3]], x[[1, 3]])


class Brightness(torch.nn.Module):
    """Label maps: the second class where a pixel is brighter than a threshold of its own."""

    def __init__(self, thresholds):
        super().__init__()
        self.thresholds = thresholds

    def forward(self, x):
        return torch.stack([self.thresholds.expand(len(x), -1, -1), x[:, 0]], 1)


def test_on_label_maps_each_pixel_that_can_be_reached_is_turned_and_no_other():
    draw = torch.Generator().manual_seed(7)
    x, labels = inner_images(3, (1, 4, 4)), torch.zeros(3, 4, 4, dtype=torch.long)
    gaps = torch.rand(4, 4, generator=draw) * 0.2
    gaps[0, 0], labels[:, 0, 0] = 0.01, 255  # within reach, and nobody asks for it
    model, task = Brightness(0.5 + gaps), Segmentation(ignore_index=255)
    reached = x[:, 0] + 0.1 > model.thresholds  # the closed form: a pixel turns where its gap is below eps
    reached[:, 0, 0] = False
    assert 0.1 < reached.float().mean() < 0.9
    moved = Square(eps=0.1, queries=600)(model, x, labels, seed=1, task=task)
    right = task.counts(model(moved).argmax(1), labels).right
    assert right.tolist() == (15 - reached.flatten(1).sum(1)).tolist()
    tried = RandomSearch(eps=0.1, queries=600)(model, x, labels, seed=1, task=task)
    assert (task.counts(model(tried).argmax(1), labels).right >= right).all()
    with pytest.raises(UserError, match=r"returned shape \(3, 2\): expected scores \(3, K, 4, 4\), one map per image"):
        Square(eps=0.1)(lambda images: images.flatten(1)[:, :2], x, labels, task=task)


def test_on_label_maps_the_effort_goes_to_pixels_that_are_still_right():
    def scores(images):  # the first pixel is wrong and could be so ten times more, at the cost of the second
        bright = images[:, 0, 0, 0]
        margins = torch.stack([10 * (bright - 0.3), 0.45 - bright, -torch.ones_like(bright)], 1)[:, None]
        return torch.stack([torch.zeros_like(margins), margins], 1)

    x, labels = torch.full((1, 1, 1, 3), 0.5), torch.zeros(1, 1, 3, dtype=torch.long)
    assert scores(x).argmax(1).tolist() == [[[1, 0, 0]]]
    assert scores(Square(eps=0.1, queries=50)(scores, x, labels)).argmax(1).tolist() == [[[1, 1, 0]]]


def test_a_map_of_one_pixel_is_a_classification():
    x, net = inner_images(5, (3, 1, 1)), torch.nn.Conv2d(3, 4, 1)
    y = net(x).flatten(1).argmax(1)
    for attack in (Square(eps=0.05, queries=30), NES(eps=0.05, queries=30, pairs=2)):
        alone = attack(lambda images: net(images).flatten(1), x, y)
        assert torch.equal(attack(net, x, y[:, None, None]), alone)
        assert not torch.equal(alone, x)


def test_a_function_that_writes_into_its_input_changes_nothing():
    model = Steep((1, 3, 3))
    x, y = inner_images(4, (1, 3, 3)), torch.zeros(4, dtype=torch.long)
    before = x.clone()

    def rude(images):
        scores = model(images)
        images.zero_()
        return scores

    assert torch.equal(Square(eps=0.1, queries=20)(rude, x, y), Square(eps=0.1, queries=20)(model, x, y))
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: x.flatten(1)[:, 0], r"was given 3 images and returned shape \(3,\): expected scores \(3, K\)"),
        (lambda x: x.flatten(1)[:1], r"was given 3 images and returned shape \(1, 9\)"),
        (lambda x: x.flatten(1)[:, :1], r"returned shape \(3, 1\).*K of at least 2"),
        (lambda x: x, r"returned shape \(3, 1, 3, 3\)"),
        (lambda x: {"scores": x}, "returned dict: expected scores"),
        (lambda x: None, "returned NoneType: expected scores"),
        (lambda x: [[1.0], [1.0, 2.0], [3.0]], "returned list: expected scores"),
        (lambda x: np.full((3, 4), np.nan), "NaN or infinite scores for 3 of 3 images at query 1 of an image"),
        (lambda x: torch.eye(3) / 0, "NaN or infinite scores"),
        (lambda x: torch.eye(3, 2).roll(1, 0), "labels reach from 0 to 2, but there are 2 classes"),
    ],
)
def test_wrong_answers_are_named(function, words):
    x, y = inner_images(3, (1, 3, 3)), torch.tensor([0, 1, 2])
    with pytest.raises(UserError, match=words):
        Square(eps=0.1)(function, x, y)


def test_an_answer_that_turns_wrong_later_is_named_with_the_query():
    x, y = inner_images(3, (1, 3, 3)), torch.tensor([0, 1, 2])
    asked = []

    def tired(images):
        asked.append(len(images))
        return torch.eye(3)[: len(images)] + (torch.nan if len(asked) == 7 else 0)

    with pytest.raises(UserError, match="at query 7 of an image"):
        Square(eps=0.1)(tired, x, y)
    asked.clear()
    with pytest.raises(UserError, match="returned 4 classes after 3 before"):
        Square(eps=0.1)(lambda images: torch.eye(3, 3 + (asked.append(1) or len(asked) > 1)), x, y)


def test_settings_are_checked():
    with pytest.raises(UserError, match="queries = 0"):
        Square(eps=0.1, queries=0)
    with pytest.raises(UserError, match="population = 3"):
        OnePixel(population=3)
    with pytest.raises(TypeError, match="no setting 'samples'"):
        NES(eps=0.1, samples=3)


@pytest.mark.parametrize(
    "attack", [Square(eps=0), NES(eps=0), OnePixel(pixels=0), DeepFool(eps=0), CarliniWagner(eps=0), RayS(eps=0)]
)
def test_what_is_returned_is_never_the_tensor_that_was_given(attack):
    model, _ = binary((1, 3, 4))
    x, y = inner_images(4, (1, 3, 4)), torch.arange(4) % 2
    for task, labels in ((Classification(), y), (Classification(ignore_index=9), torch.full_like(y, 9))):
        moved = attack(model, x, labels, task=task)
        assert torch.equal(moved, x)
        assert moved.data_ptr() != x.data_ptr()

"""eps_uni and eps_adv against closed forms, what chooses and what reports, and the coverage of their intervals."""

import math

import pytest
import torch
from torch import nn

import gambeson as gb
from gambeson import UserError
from gambeson.attacks import PGD, StochasticPGD, UniversalPerturbation, control
from gambeson.attacks.universal.perturbation import Provenance
from gambeson.data import Dataset, Split
from gambeson.evaluation import Rate, eps_adv, eps_uni, strongest, universal_evasion
from gambeson.evaluation.bisection import Bisection
from gambeson.evaluation.eps_uni import Found, scaled, search
from gambeson.evaluation.rates import crossing_interval
from gambeson.evaluation.universal import error_rate
from gambeson.tasks import Counts
from gambeson.threat import Ball
from gambeson.victim import Victim, predict, score
from tests.conftest import LinearNet, binary

SHAPE = (1, 3, 4)


def known_margins(margins, w, labels=None):
    """Images whose distance to the boundary of w.(x - 1/2) is given in the norm inf: eps_uni is their quantile.

    No two of them are the same picture: the pixels that have no weight are different in each.
    """
    signs = torch.full_like(margins, -1.0) if labels is None else labels * 2.0 - 1
    x = 0.5 + (signs * margins * w.abs().sum() / w.square().sum()).view(-1, 1, 1, 1) * w
    return torch.where(w == 0, torch.rand(x.shape, generator=OTHERS), x)


OTHERS = torch.Generator().manual_seed(0)


def weights(pattern=None):
    """Weights of a linear net that does not look at the last row of its images."""
    pattern = binary((1, 2, 4))[1] if pattern is None else pattern
    return nn.functional.pad(pattern, (0, 0, 0, 1))


def dataset(*splits, classes=("a", "b"), ignore_index=None):
    parts = [
        Split(f"margins/{k}", x, torch.zeros(len(x), dtype=torch.long) if y is None else y, classes, ignore_index)
        for k, (x, y) in enumerate(splits)
    ]
    data = object.__new__(Dataset)  # one class is refused by Dataset; here the formula needs it
    for name, value in zip(("name", "train", "validation", "test", "classes"), ("m", *parts, classes), strict=True):
        object.__setattr__(data, name, value)
    return data


def net(w):
    half = w / 2
    return LinearNet(torch.stack([-half, half]), torch.tensor([1.0, -1.0]) * float(half.sum()) / 2)


def uap_of(delta, eps, **about):
    facts = {
        "attack": "given",
        "settings": {},
        "eps": eps,
        "norm": "inf",
        "seed": 0,
        "model": "m",
        "crafted_on": "t",
        "crafted_split": "train",
        "chosen_on": "validation",
        "restarts": [("given", 0.0)],
        "status": "done",
        "forwards": 0,
        "backwards": 0,
    }
    return UniversalPerturbation(delta, Provenance(**facts | about))


def margins_of(count, scale, seed):
    return scale * 2 * torch.rand(count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [2e-5, 1 / 2550, 1 / 255, 0.03, 0.1])
def test_the_tolerance_is_relative_at_every_scale(scale):
    w = weights()
    parts = [margins_of(60, scale, seed) for seed in range(3)]
    data = dataset(*[(known_margins(margins, w), None) for margins in parts])
    attack = StochasticPGD(eps=0.1, steps=15, batch_size=16, probe_starts=0, truncate=None)
    found = eps_uni(net(w), data, attack, tolerance=0.01)
    exact = float(parts[2].sort().values[29])  # the 30th of 60 brings the error to one half
    assert exact * (1 - 2e-3) <= found.value <= exact * 1.012 + 1e-6
    assert not found.censored
    assert found.tolerance <= 0.0101 * found.value + 1e-6
    assert found.low <= exact <= found.high
    assert found.low < found.value < found.high


def test_per_image_eps_is_the_quantile_and_lies_below_the_universal_one():
    w = weights()
    labels = torch.arange(80) % 2
    parts = [margins_of(80, 0.05, seed) for seed in range(3)]
    data = dataset(*[(known_margins(margins, w, labels), labels) for margins in parts])
    each = eps_adv(net(w), data, PGD(eps=0.1, steps=10), tolerance=0.01)
    exact = float(parts[2].sort().values[39])
    assert exact * 0.999 <= each.value <= exact * 1.012
    assert each.low <= exact <= each.high
    assert (each.images, each.split, each.censored) == (80, "test", False)
    # One direction moves both classes apart from each other: it can break one half at the most, at the largest margin.
    shared = eps_uni(
        net(w), data, StochasticPGD(eps=0.1, steps=20, probe_starts=2, probe_start_steps=10, truncate=None)
    )
    assert shared.value > 1.5 * each.value


def test_an_image_that_fell_at_a_smaller_eps_counts_as_fallen(monkeypatch):
    w = weights()
    margins = margins_of(40, 0.05, 0)
    data = dataset(*[(known_margins(margins, w), None)] * 3)

    class OnlyHalf(PGD):
        """An attack that looks at the images of one half at a time, depending on eps."""

        def __call__(self, model, x, y, **kwargs):
            moved = super().__call__(model, x, y, **kwargs)
            half = torch.arange(len(x)) % 2 == int(self.eps * 1e4) % 2
            return torch.where(half.view(-1, 1, 1, 1), moved, x)

    found = eps_adv(net(w), data, OnlyHalf(eps=0.1, steps=10), delta=0.6, tolerance=0.01)
    assert not found.censored  # alone, none of its runs exceeds one half
    errors = [error for _, error in found.tried]
    assert max(errors) >= 0.6


def test_validation_chooses_the_warm_start_and_test_does_not(digits, trained):
    shape = digits.test.shape
    good = StochasticPGD(eps=0.3, steps=30, probe_starts=0).craft(trained, digits)
    weak = uap_of(control("random-sign", Ball(eps=0.1), shape, seed=3), 0.1)
    nothing = Counts(torch.ones(449, dtype=torch.long), torch.ones(449, dtype=torch.long))
    much = Counts((torch.arange(449) % 5 >= 2).long(), nothing.total)
    known = {0.05: Found(scaled(good, 0.05), nothing), 0.1: Found(weak, much)}
    starts = []

    def craft(eps, start):
        starts.append((eps, start))
        return uap_of(torch.zeros(1, *shape), eps)

    with Victim(trained) as victim:
        search(victim, digits, craft, norm="inf", delta=0.5, tolerance=0.1, known=known, controls=(), runs=1)
    ((eps, start),) = starts
    torch.testing.assert_close(start, scaled(good, eps).delta)


@pytest.mark.parametrize("known", [(0.05, 0.1), (0.1, 0.8)])
def test_where_runs_are_few_known_perturbations_are_scaled(known, digits, trained):
    def craft(eps, start):
        return StochasticPGD(eps=eps, steps=30, probe_starts=0).craft(trained, digits)

    with Victim(trained) as victim:
        tried = {}
        for eps in known:
            uap = craft(eps, None)
            tried[eps] = Found(uap, score(predict(victim, digits.test, uap.delta), digits.test).counts)
        found = [
            search(victim, digits, craft, norm="inf", delta=0.5, tolerance=0.02, known=tried, controls=(), runs=runs)
            for runs in (1, None)
        ]
    few, many = found
    assert not few.censored
    assert many.value <= few.value < 1.2 * many.value
    assert few.tolerance < 0.05 * few.value
    assert few.cost.forwards < many.cost.forwards


@pytest.mark.parametrize("breaks", [math.inf, 0.9, 20.0])
def test_scaled_perturbations_are_scored_no_more_often_than_a_budget_counts_on(breaks):
    scored = []

    def errors(eps):
        wrong = 60 if eps >= breaks else 0
        return Counts((torch.arange(100) >= wrong).long(), torch.ones(100, dtype=torch.long))

    def rescaled(_, eps):
        scored.append(eps)
        return errors(eps)

    fields = {"delta": 0.5, "tolerance": 0.001, "tried": {}, "runs": 1, "seed": 0, "title": ""}
    search = Bisection(
        attempt=lambda eps, _: errors(eps), errors=lambda found: found, rescale=rescaled, clean=errors(0),
        largest=1e9, **fields,
    )  # fmt: skip
    found = search.run()
    assert 0 < len(scored) <= 24
    assert found["censored"] == (breaks > 1)
    assert found["censored"] or found["value"] == pytest.approx(breaks, rel=0.05)


def test_each_try_begins_from_the_best_so_far():
    """Without a warm start this attack has one right value, and needs seven times the eps."""
    w = torch.tensor([0.3, -0.1, 0.2, -0.4, 0.25, -0.35, 0.15, 0.45]).view(1, 2, 4)
    w = weights(w)
    margins = margins_of(50, 0.05, 1)
    data = dataset(*[(known_margins(margins, w), None)] * 3)

    def craft(eps, start):
        """Turn one more value of the start the right way."""
        direction = torch.zeros(1, *SHAPE) if start is None else start.sign()
        wrong = (direction.flatten() != w.sign().flatten()).nonzero().flatten()
        direction.view(-1)[wrong[:1]] = w.sign().flatten()[wrong[:1]]
        return uap_of(eps * direction, eps)

    with Victim(net(w)) as victim:
        found = search(victim, data, craft, norm="inf", delta=0.5, tolerance=0.005, controls=())
        cold = search(
            victim, data, lambda eps, _: craft(eps, None), norm="inf", delta=0.5, tolerance=0.005, controls=()
        )
    exact = float(margins.sort().values[24])
    assert exact * 0.999 <= found.value <= 1.75 * exact
    # The first value alone has 0.3 of the 2.2 of ||w||_1.
    assert cold.value == pytest.approx(exact * 2.2 / 0.3, rel=0.02)


def test_a_known_perturbation_is_one_that_was_tried():
    w = weights()
    data = dataset(*[(known_margins(margins_of(50, 0.05, k), w), None) for k in range(3)])
    good = uap_of(0.08 * w.sign()[None], 0.08)

    starts = []

    class Nothing(StochasticPGD):
        def craft(self, model, data, *, seed=0, start=None):
            starts.append(start)
            return uap_of(torch.zeros(1, *SHAPE), self.eps)

    with_it = eps_uni(net(w), data, Nothing(eps=0.1), known=[good], controls=())
    exact = float(margins_of(50, 0.05, 2).sort().values[24])
    assert exact * 0.999 <= with_it.value <= exact * 1.03  # scaled, it is tried at every eps
    assert all(torch.equal(start.sign(), good.delta.sign()) for start in starts)  # and the attack begins there
    without = eps_uni(net(w), data, Nothing(eps=0.1), controls=())
    assert (without.value, without.censored, without.low, without.high) == (1.0, True, 1.0, None)
    flat = uap_of(good.delta, 0.3, norm="2")
    with pytest.raises(UserError, match="a known perturbation is of norm 2: expected inf"):
        eps_uni(net(w), data, Nothing(eps=0.1), known=[flat])


def test_a_control_that_is_enough_is_enough():
    board = weights(control("chessboard", Ball(eps=1.0), (1, 2, 4))[0])
    margins = [margins_of(50, 0.05, k) for k in range(3)]
    data = dataset(*[(known_margins(each, board), None) for each in margins])

    class Nothing(StochasticPGD):
        def craft(self, model, data, *, seed=0, start=None):
            return uap_of(torch.zeros(1, *SHAPE), self.eps)

    found = eps_uni(net(board), data, Nothing(eps=0.1), tolerance=0.01)
    exact = float(margins[2].sort().values[24])
    assert exact * 0.999 <= found.value <= exact * 1.012
    assert eps_uni(net(board), data, Nothing(eps=0.1), controls=("random-sign",)).value > 1.2 * found.value
    shift = weights(torch.ones(1, 2, 4))
    data = dataset(*[(known_margins(each, shift), None) for each in margins])
    found = eps_uni(net(shift), data, Nothing(eps=0.1), controls=("constant-shift",), tolerance=0.01)
    assert found.value <= exact * 1.012


class Logits(nn.Module):
    """A net whose logits are noisy: one pass gets far more wrong than the majority."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        z = self.model(x)
        return z + 4 * torch.randn_like(z)


def test_a_random_model_is_decided_by_votes_and_the_same_again(digits, trained):
    model = Logits(trained)
    few = Dataset(
        "few",
        *[split.subset(torch.arange(80)) for split in (digits.train, digits.validation, digits.test)],
        digits.classes,
    )
    attack = StochasticPGD(eps=0.1, steps=2, probe_starts=0)
    first = eps_uni(model, few, attack, delta=0.3, tolerance=0.5, controls=())
    with Victim(model) as victim:
        assert eps_uni(victim, few, attack, delta=0.3, tolerance=0.5, controls=()) == first
        assert victim.votes is None
    clean = gb.evaluation.accuracy(model, few).complement.value
    with Victim(model) as victim:
        victim.votes = 1
        torch.manual_seed(0)
        once = score(predict(victim, few.test), few.test).error
    assert clean < 0.15 < once  # one pass would call it broken sooner
    assert 0 < first.value < 1
    low = min(error for _, error in first.tried)
    assert low >= clean - 0.05
    each = eps_adv(model, few, PGD(eps=0.1, steps=1), delta=0.3, tolerance=0.5)
    assert each == eps_adv(model, few, PGD(eps=0.1, steps=1), delta=0.3, tolerance=0.5)
    assert each.value <= first.value


@pytest.mark.full
def test_the_interval_covers_the_true_eps():
    """Margins are uniform on [0, 2 m]: the error is eps / 2m, and eps_uni(1/2) is m."""
    w, true, images, hits, widths = binary((1, 1, 3))[1], 0.05, 120, 0, []
    repeats = 30
    train = (known_margins(margins_of(4, true, 0), w), None)

    def craft(eps, start):
        return uap_of(eps * w.sign()[None], eps)

    with Victim(net(w)) as victim:
        for k in range(repeats):
            data = dataset(train, train, (known_margins(margins_of(images, true, 10 + k), w), None))
            found = search(victim, data, craft, norm="inf", delta=0.5, tolerance=0.05, controls=(), seed=k)
            hits += found.low <= true <= found.high
            widths.append(found.high - found.low)
    assert hits / repeats >= 0.87
    exact = 2 * 1.96 * true / images**0.5  # of the median of a uniform distribution
    assert 0.8 * exact < sum(widths) / repeats < 1.25 * exact


def test_an_interval_read_off_a_coarse_curve_is_as_wide_as_its_steps():
    answers = torch.ones(1000, dtype=torch.long)
    curve = {
        eps: Counts((torch.arange(1000) >= count).long(), answers) for eps, count in ((0, 20), (0.1, 300), (0.2, 700))
    }
    low, high = crossing_interval(curve, 0.5)
    assert 0.13 < low < 0.15 < high < 0.17
    assert crossing_interval({0: curve[0]}, 0.5) == (0, None)
    assert crossing_interval(curve, 0.01)[0] == 0
    # Answers of images without a label, or with several, weigh as many as they are.
    maps = {eps: Counts(found.right * 2, found.total * 2) for eps, found in curve.items()}
    assert crossing_interval(maps, 0.5) == (low, high)
    blank = torch.zeros(500, dtype=torch.long)
    more = {eps: Counts(torch.cat([found.right, blank]), torch.cat([answers, blank])) for eps, found in curve.items()}
    assert crossing_interval(more, 0.5) == pytest.approx((low, high), abs=3e-3)


class Dice(nn.Module):
    """Right on one half of all images under every perturbation, each time on others."""

    def forward(self, x):
        draw = (x.double().flatten(1) @ torch.linspace(1e4, 2e4, x[0].numel(), dtype=torch.float64)).sin().float()
        return torch.stack([draw, -draw], 1)


@pytest.mark.full
def test_the_error_of_what_validation_chose_has_an_honest_interval():
    repeats, images, covered, greedy = 100, 200, 0, 0
    with Victim(Dice()) as victim:
        for k in range(repeats):
            x = torch.rand(3 * images, 1, 2, 3, generator=torch.Generator().manual_seed(k)) * 0.5 + 0.25
            data = dataset(*[(part, None) for part in x.chunk(3)])
            crafted = uap_of(torch.full((1, 1, 2, 3), 0.1), 0.1)
            chosen, _ = strongest(victim, data.validation, crafted, seed=k)
            rate = error_rate(score(predict(victim, data.test, chosen.delta), data.test))
            covered += rate.low <= 0.5 <= rate.high
            worst = gb.evaluation.control_rates(victim, data.test, Ball(eps=0.1), k)[0].worst
            one = Rate.of(round(worst.value * images), images)
            greedy += one.low <= 0.5 <= one.high
            assert worst.low < one.low  # chosen on test among ten: the interval says so
    assert covered / repeats > 0.9
    assert greedy / repeats < 0.89  # the worst draw on test with the interval of a single one


def test_a_control_takes_the_place_of_what_was_crafted_only_where_validation_says_so(digits, trained):
    ball = Ball(eps=0.3)
    nothing = uap_of(torch.zeros(1, *digits.test.shape), 0.3)
    with Victim(trained) as victim:
        chosen, rate = strongest(victim, digits.validation, nothing)
        rates = [
            score(predict(victim, digits.validation, pattern[None]), digits.validation).error
            for name, draws in (("random-sign", 10), ("chessboard", 1))
            for pattern in control(name, ball, digits.test.shape, draws=draws)
        ]
        assert rate == max(rates) == dict(chosen.about.restarts)[chosen.about.attack]
        assert chosen.about.crafted_on == "no images"
        assert score(predict(victim, digits.validation, chosen.delta), digits.validation).error == rate
        crafted = StochasticPGD(eps=0.3, steps=50, probe_starts=0).craft(trained, digits)
        assert strongest(victim, digits.validation, crafted)[0] is crafted
        assert strongest(victim, digits.validation, nothing, controls=())[0] is nothing
        better, _ = strongest(victim, digits.validation, nothing, others=[crafted])
        assert torch.equal(better.delta, crafted.delta)
        assert better.about.crafted_on == crafted.about.crafted_on


def test_of_known_perturbations_of_one_eps_the_order_does_not_matter(digits, trained):
    attack = StochasticPGD(eps=0.2, steps=20, batch_size=64)
    strong = attack.craft(trained, digits)
    weak = UniversalPerturbation(strong.delta * 1e-3, strong.about, strong.image_hashes)
    quick = StochasticPGD(eps=0.2, steps=1, batch_size=64)
    delta = universal_evasion(trained, digits, strong).value

    def found(*known):
        return eps_uni(trained, digits, quick, delta=delta, tolerance=0.9, known=known, controls=())

    assert found(strong, weak).tried == found(weak, strong).tried
    assert found(strong, weak).value <= 0.2


def test_a_known_perturbation_is_not_judged_by_images_it_was_crafted_on(digits, trained):
    images, labels = digits.test.take(slice(None))
    own = StochasticPGD(eps=0.2, steps=5, batch_size=64).craft(trained, (images, labels))
    with pytest.raises(UserError, match="crafted on"):
        eps_uni(trained, digits, StochasticPGD(eps=0.2, steps=1), known=[own], controls=())

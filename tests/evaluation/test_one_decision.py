"""Success is decided once: every path that counts right answers treats the same inputs in the same way."""

from __future__ import annotations

from math import comb
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import gambeson as gb
from gambeson import UserError
from gambeson.attacks import FGSM, PGD, UniversalPerturbation
from gambeson.attacks.universal.perturbation import Provenance
from gambeson.auditing import Suite
from gambeson.auditing.diagnostics import DIAGNOSTICS
from gambeson.auditing.stages import corruption, per_image
from gambeson.auditing.stages import transfer as audit_transfer
from gambeson.data import Dataset, Split
from gambeson.evaluation import FunctionModel, Rate, export_check, run_suite, transfer
from gambeson.evaluation.outcome import accuracy_under, outcome, outcome_under
from gambeson.evaluation.universal import control_rates
from gambeson.threat import Ball
from gambeson.training import validation
from gambeson.victim import DEFAULT_VOTES, Victim, predict, score
from tests.auditing.evidence import held

EPS = 1e-3
"""Too small to change any answer of the models here: every attack is a no-op."""
NOISY = (0.001,)


class Bright(nn.Module):
    """Class 1 where the first pixel is above 0.5."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(20.0))

    def forward(self, x):
        z = self.scale * (x.flatten(1)[:, 0] - 0.5)
        return torch.stack([-z, z], 1)


class Broken(Bright):
    """NaN for bright images."""

    def forward(self, x):
        z = super().forward(x)
        return z.where(z[:, 1:] < 0, z * torch.nan)


class Chancy(Bright):
    """Right with probability ``p`` whatever the image, drawn anew for every image and call."""

    def __init__(self, p=0.6):
        super().__init__()
        self.p = p

    def forward(self, x):
        z = super().forward(x)
        return torch.where(torch.rand(len(x), 1, device=x.device) < self.p, z, -z)


def nothing(victim, x, y, *, seed=0, task=None):
    return x


def made(count=40, right=0.5, ignored=0.0, seed=0, name="made/test"):
    """Images of both classes; the first of every two are labelled as ``Bright`` answers for a share of ``right``."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    images = torch.rand(count, 1, 4, 4, generator=draw)
    agrees = torch.where(torch.arange(count) // 2 % 10 < 10 * right, labels, 1 - labels)
    images[:, 0, 0, 0] = torch.where(agrees == 1, 0.9, 0.1)
    labels = torch.where(torch.arange(count) >= count * (1 - ignored), 255, labels)
    return Split(name, images, labels, ("dark", "bright"), ignore_index=255 if ignored else None)


def uap(split, eps=EPS):
    about = Provenance(
        attack="made", settings={}, eps=eps, norm="inf", seed=0, model="", crafted_on="no images", crafted_split="",
        chosen_on="", restarts=[], status="done", forwards=0, backwards=0,
    )  # fmt: skip
    return UniversalPerturbation(torch.full((1, *split.shape), eps), about)


def dataset(split):
    train = split if split.labels.ndim > 1 else made(seed=1, name="made/train")
    return Dataset("made", train, split, split, split.classes)


def with_victim(take):
    def path(model, split):
        with Victim(model) as victim:
            return take(victim, split)

    return path


def with_context(take):
    def path(model, split):
        with held(model, dataset(split), (EPS,), **SETTINGS) as context:
            return take(context)

    return path


SETTINGS = {
    "pgd_steps": 2,
    "sample": 1000,
    "suite_images": 1000,
    "suite_queries": 3,
    "eot_samples": 2,
    "noise_sizes": NOISY,
}


def _export(model, split):
    return export_check._score(model, model, split, DEFAULT_VOTES, 0)["original"]


def _robust_validation(model, split):
    data = dataset(split)
    return validation.validate_robustly(model, data, SimpleNamespace(eps=EPS, norm="inf"), 0)


def _surrogate(context):
    context.surrogate = Bright()
    return [found.error.complement for found in audit_transfer.measure(context)]


def _box(model, split):
    def scores(images):
        with torch.no_grad():
            return model(images)

    with held(FunctionModel(scores), dataset(split), (EPS,), black_box=True, queries=3, sample=1000) as context:
        return [context.clean, per_image.measure(context)[0].accuracy]


def moved_by(model, split):
    return transfer.perturbed(model, split, FGSM(eps=EPS, eot_samples=2), 0)


RATES = {
    "accuracy": lambda m, s: gb.evaluation.accuracy(m, s),
    "universal_evasion": lambda m, s: gb.evaluation.universal_evasion(m, s, uap(s)).complement,
    "predict and score": with_victim(lambda v, s: score(predict(v, s), s).counts.accuracy),
    "controls": with_victim(
        lambda v, s: [found.worst.complement.among(1) for found in control_rates(v, s, Ball(eps=EPS), 0)]
    ),
    "accuracy_under": with_victim(lambda v, s: accuracy_under(v, s, FGSM(eps=EPS), 0)),
    "outcome": with_victim(lambda v, s: outcome(v, s, nothing, 0).accuracy),
    "outcome_under": with_victim(lambda v, s: outcome_under(v, s, uap(s).delta).accuracy),
    "suite, clean": with_victim(lambda v, s: run_suite(v, s, {}).result.clean),
    "suite": with_victim(lambda v, s: run_suite(v, s, {"a": nothing, "b": nothing}).result.robust),
    "suite, round": with_victim(lambda v, s: run_suite(v, s, {"a": nothing}).result.rounds[0].accuracy),
    "transfer": lambda m, s: transfer.error_of(m, s, 0).complement,
    "transfer, moved": lambda m, s: transfer.error_of(m, moved_by(m, s), 0).complement,
    "export": _export,
    "audit, clean": with_context(lambda e: e.clean),
    "audit, per image": with_context(lambda e: [found.accuracy for found in per_image.measure(e)]),
    "audit, sample": with_context(lambda e: e.accuracy(nothing)),
    "audit, noise": with_context(lambda e: [found.error.complement for found in corruption.measure(e)]),
    "audit, transfer": with_context(_surrogate),
    "black box": _box,
}  # fmt: skip
"""Every path that ends in a rate, as the accuracy (or accuracies) that it reports."""

SHARES = {
    "validation": lambda m, s: validation.validate(m, dataset(s))["validation_accuracy"],
    "validation, universal": lambda m, s: 1 - _robust_validation(m, s)["validation_uer"],
    "validation, PGD": lambda m, s: _robust_validation(m, s)["validation_pgd_accuracy"],
}
"""Paths that end in a plain share; they take a random model as it is, one pass an image."""


def rates(found):
    return found if isinstance(found, list) else [found]


@pytest.mark.parametrize("path", RATES)
def test_a_rate_is_that_of_the_images_that_count(path):
    for found in rates(RATES[path](Bright(), made())):
        assert found.value == pytest.approx(0.5)
        assert (found.low, found.high, found.n) == (pytest.approx(0.352, abs=5e-4), pytest.approx(0.648, abs=5e-4), 40)
    # 20 of 40 count, 12 of these are right.
    for found in rates(RATES[path](Bright(), made(ignored=0.5, right=0.6))):
        assert found.value == pytest.approx(0.6)
        assert (found.low, found.high, found.n) == (pytest.approx(0.387, abs=5e-4), pytest.approx(0.781, abs=5e-4), 20)


def test_the_interval_of_twenty_of_forty_images():
    found = gb.evaluation.accuracy(Bright(), made(ignored=0.5))
    assert (found.value, round(found.low, 3), round(found.high, 3), found.n) == (0.5, 0.299, 0.701, 20)


def test_a_class_that_is_ignored_counts_nowhere_even_where_the_model_names_it():
    split = made(right=0.6)
    split = Split("made/test", split.images, split.labels, split.classes, ignore_index=0)
    for path in ("accuracy", "outcome", "outcome_under", "suite", "export", "transfer"):
        assert RATES[path](Bright(), split) == Rate.of(12, 20), path


@pytest.mark.parametrize("path", SHARES)
def test_a_share_is_that_of_the_images_that_count(path):
    assert SHARES[path](Bright(), made()) == pytest.approx(0.5)
    assert SHARES[path](Bright(), made(ignored=0.5, right=0.6)) == pytest.approx(0.6)


@pytest.mark.parametrize("path", RATES | SHARES)
def test_logits_that_are_not_finite_are_refused(path):
    with pytest.raises(UserError, match="NaN or infinite"):
        (RATES | SHARES)[path](Broken(), made())


@pytest.mark.parametrize("path", RATES | SHARES)
def test_splits_without_an_answer_that_counts_are_refused(path):
    for split in (made(ignored=1.0), made().subset(torch.arange(0))):
        with pytest.raises(UserError, match=r"no image|no label|of one class only|is empty") as caught:
            (RATES | SHARES)[path](Bright(), split)
        assert "\n" not in str(caught.value)


def majority(p, votes):
    """Probability that more than half of the votes are right."""
    return sum(comb(votes, k) * p**k * (1 - p) ** (votes - k) for k in range(votes // 2 + 1, votes + 1))


@pytest.mark.parametrize("path", RATES)
def test_a_random_model_is_decided_by_the_majority_of_its_votes_and_repeats(path):
    """82.6 % by majority of 21, 60 % by a single pass; four standard errors of 300 images are 8.8 points."""
    split = made(300, right=1.0)
    torch.manual_seed(0)
    first = rates(RATES[path](Chancy(), split))
    for found in first:
        assert found.value == pytest.approx(majority(0.6, 21), abs=0.088)
        assert found.n == 300
    torch.manual_seed(1)
    assert rates(RATES[path](Chancy(), split)) == first


def test_votes_of_one_seed_are_the_same_votes_wherever_they_are_cast():
    """A model whose luck does not depend on the images: what does nothing to them changes no count."""
    split, model, nil, seed = made(100, right=1.0), Chancy(), Ball(eps=0.0), 5
    clean = gb.evaluation.accuracy(model, split, seed=seed)
    none = uap(split, 0.0)
    with Victim(model) as victim:
        suite = run_suite(victim, split, {"a": nothing}, seed=seed).result
        controls = control_rates(victim, split, nil, seed, ["chessboard"])
        under = outcome_under(victim, split, none.delta, seed=seed).accuracy
        edited = gb.evaluation.under_edits(victim, split, none, [], seed=seed).rates[0]
    found = [
        suite.clean,
        suite.robust,
        controls[0].worst.complement,
        under,
        edited.uer.complement,
        edited.clean.complement,
    ]
    found.append(gb.evaluation.universal_evasion(model, split, none, seed=seed).complement)
    found.append(transfer.error_of(model, split, seed).complement)
    assert [rate.value for rate in found] == pytest.approx([clean.value] * len(found))
    assert gb.evaluation.fooling_rate(model, split, none, seed=seed).value == 0


class Slight(Bright):
    """With noise of a thousandth of what tells classes apart, which decides the images on the boundary alone."""

    def forward(self, x):
        z = super().forward(x)
        return z + 0.01 * torch.randn(z.shape, device=z.device)


def test_noise_that_decides_hardly_an_answer_is_drawn_from_the_seed_as_well():
    split = made(40)
    split.images[8:, :, 0, 0] = 0.5
    with Victim(Slight()) as victim:
        assert not victim.inspect(split.images).stochastic
    for path in ("accuracy", "universal_evasion", "predict and score", "controls", "outcome_under", "suite"):
        found = []
        for seed in range(3):
            torch.manual_seed(seed)
            found.append(rates(RATES[path](Slight(), split)))
        assert found[0] == found[1] == found[2], path
    with Victim(Slight()) as victim:
        first, other = (predict(victim, split, seed=seed) for seed in (1, 2))
        assert not torch.equal(first, other)
        assert torch.equal(first, predict(victim, split, seed=1))
        victim.votes = 1  # whoever asks for one pass draws for it
        torch.manual_seed(0)
        first = predict(victim, split, seed=1)
        assert not torch.equal(first, predict(victim, split, seed=1))


@pytest.mark.parametrize("path", SHARES)
def test_training_takes_a_random_model_as_it_is(path):
    torch.manual_seed(0)
    assert SHARES[path](Chancy(), made(600, right=1.0)) == pytest.approx(0.6, abs=0.09)


@pytest.mark.parametrize("votes", [1, 5])
def test_the_number_of_votes_that_was_set_is_the_number_that_decides(votes):
    split = made(600, right=1.0)
    truth = pytest.approx(majority(0.6, votes), abs=0.085)
    torch.manual_seed(0)
    with held(Chancy(), dataset(split), (EPS,), **SETTINGS, votes=votes) as context:
        found = [context.clean, context.accuracy(nothing), *(one.accuracy for one in per_image.measure(context))]
        found += [one.error.complement for one in corruption.measure(context)]
        suite = run_suite(context.victim, split, {"a": nothing}).result
    assert [rate.value for rate in found] == [truth] * len(found)
    assert (suite.votes, suite.robust.value) == (votes, truth)
    assert Suite(votes=votes).votes == votes


def test_attacks_that_do_nothing_change_nothing():
    """Each image's worst candidate is scored once, on fresh votes: four no-ops once made 82.6 % into 39.7 %."""
    split = made(300, right=1.0)
    for count in (1, 4):
        with Victim(Chancy()) as victim:
            found = run_suite(victim, split, {f"nothing {k}": nothing for k in range(count)})
        result = found.result
        assert result.clean == gb.evaluation.accuracy(Chancy(), split)
        assert result.robust == result.clean
        assert [turn.accuracy for turn in result.rounds] == [result.clean] * count
        assert result.success.value == 0
        assert (result.largest, result.mean) == (0.0, 0.0)


def test_attacks_that_move_images_and_do_no_harm_are_not_counted_by_their_luck():
    """Twelve candidates of each image, all right in 60 % of passes: the worst by its votes is right as often again."""
    split = made(600, right=1.0)

    def fidgety(seed_of):
        def attack(victim, x, y, *, seed=0, task=None):
            moved = x.clone()
            moved[:, :, 1:] = torch.rand(moved[:, :, 1:].shape, generator=torch.Generator().manual_seed(seed_of))
            return moved

        return attack

    with Victim(Chancy()) as victim:
        found = run_suite(victim, split, {str(k): fidgety(k) for k in range(12)})
    assert bool((found.images != split.images).flatten(1).any(1).float().mean() > 0.7)
    assert found.result.robust.value == pytest.approx(majority(0.6, 21), abs=0.062)


class Thrown(Chancy):
    """With luck that depends on the image too, so that another image is another throw."""

    def forward(self, x):
        z = Bright.forward(self, x)
        luck = (torch.rand(len(x), 1) + 1000 * x.flatten(1)[:, -1:]) % 1
        return torch.where(luck < self.p, z, -z)


def test_what_changes_both_ways_by_chance_is_no_success():
    split = made(200, right=1.0)

    def shaken(victim, x, y, *, seed=0, task=None):
        return torch.cat([x[..., :-1], torch.rand_like(x[..., -1:])], -1)

    with Victim(Thrown()) as victim:
        found = run_suite(victim, split, {"shaken": shaken})
    result = found.result
    with Victim(Thrown()) as victim:
        was = predict(victim, split) == split.labels
    lost = was & (found.counts.right == 0)
    assert int(lost.sum()) > 10
    net = max(0.0, result.clean.value - result.robust.value) / result.clean.value
    assert result.success.value == pytest.approx(net)
    assert result.success.value < int(lost.sum()) / int(was.sum()) - 0.03


class Fragile(Bright):
    """Right in 90 % of passes; in 30 % once the last pixel is above 0.9."""

    def __init__(self, usual=0.9, weak=0.3):
        super().__init__()
        self.usual, self.weak = usual, weak

    def forward(self, x):
        z = super().forward(x)
        p = torch.where(x.flatten(1)[:, -1] > 0.9, self.weak, self.usual)
        return torch.where(torch.rand(len(x), device=x.device)[:, None] < p[:, None], z, -z)


def weakening(victim, x, y, *, seed=0, task=None):
    moved = x.clone()
    moved[:, :, -1, -1] = 1.0
    return moved


@pytest.mark.parametrize("order", [("nothing", "weakening"), ("weakening", "nothing"), ("weakening", "repair")])
def test_what_weakens_a_random_model_is_found_and_kept(order):
    split = made(400, right=1.0)
    split.images[:, :, -1, -1] *= 0.5

    def repair(victim, x, y, *, seed=0, task=None):
        moved = x.clone()
        moved[:, :, -1, -1] = 0.0
        return moved

    attacks = {"nothing": nothing, "weakening": weakening, "repair": repair}
    with Victim(Fragile()) as victim:
        found = run_suite(victim, split, {name: attacks[name] for name in order}, seed=3)
    result = found.result
    assert result.clean.value > 0.99
    assert result.robust.value == pytest.approx(majority(0.3, 21), abs=0.04)
    again = Split("saved", found.images, split.labels, split.classes)
    assert gb.evaluation.accuracy(Fragile(), again, seed=3) == result.robust  # re-scoring the saved images
    broken = found.broken_by == order.index("weakening")
    assert int(broken.sum()) >= 0.95 * round(400 * (result.clean.value - result.robust.value))
    assert bool((found.images[broken][:, 0, -1, -1] == 1).all())
    assert result.success.value == pytest.approx(1 - result.robust.value / result.clean.value)


def test_images_that_are_wrong_by_bad_luck_are_attacked_all_the_same():
    """Right in 55 % of passes: a third has no majority when clean, and falls for good only under the attack."""
    split = made(200, right=1.0)
    split.images[:, :, -1, -1] *= 0.5
    with Victim(Fragile(0.55, 0.05)) as victim:
        result = run_suite(victim, split, {"weakening": weakening}).result
    assert result.clean.value == pytest.approx(majority(0.55, 21), abs=0.13)
    assert result.rounds[0].tried > 190
    assert result.robust.value < 0.02


def test_the_suite_leaves_ignored_images_alone():
    split, seen = made(ignored=0.5, right=0.6), []

    def harm(victim, x, y, *, seed=0, task=None):
        seen.append(y)
        moved = x.clone()
        moved[:, :, 0, 0] = 1 - moved[:, :, 0, 0]
        return moved

    with Victim(Bright()) as victim:
        found = run_suite(victim, split, {"harm": harm})
    assert 255 not in torch.cat(seen)
    assert (found.result.success.value, found.result.success.n) == (1.0, 12)
    assert (found.result.robust.value, found.result.robust.n) == (0.0, 20)
    assert found.broken_by[20:].tolist() == [-3] * 20
    assert torch.equal(found.images[20:], split.images[20:])


def test_the_suite_refuses_what_is_no_image():
    for wrong in (lambda x: x + 1, lambda x: x * torch.nan, lambda x: x[:-1]):
        with Victim(Bright()) as victim, pytest.raises(UserError, match="attack 'odd' returned"):
            run_suite(victim, made(), {"odd": lambda victim, x, y, wrong=wrong, **_: wrong(x)})


def test_label_maps_count_pixels_and_the_images_that_have_some():
    class Pixelwise(nn.Module):
        def forward(self, x):
            return torch.cat([0.5 - x, x - 0.5], 1)

    images = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = (images[:, 0] > 0.5).long()
    labels[:, 0] = 1 - labels[:, 0]  # a quarter of the pixels is wrong
    labels[0] = 255
    labels[1, 2:] = 255
    split = Split("maps", images, labels, ("dark", "bright"), ignore_index=255)
    expected = Rate.bootstrap(torch.tensor([0, 4, 12, 12, 12, 12]), torch.tensor([0, 8, 16, 16, 16, 16]))
    assert (expected.value, expected.n) == (52 / 72, 5)
    for path in ("accuracy", "outcome", "outcome_under", "accuracy_under", "audit, clean", "audit, sample", "export"):
        assert RATES[path](Pixelwise(), split) == expected, path


def test_a_random_model_is_not_accused_because_its_survivors_were_judged_again():
    """The comparison of PGD with queries: of the images that PGD leaves right, attacks that do nothing break none."""
    (check,) = (one for one in DIAGNOSTICS if one.name == "white box beats queries")
    split = made(300, right=1.0)
    torch.manual_seed(0)
    with held(Chancy(), dataset(split), (EPS,), **SETTINGS, queries=2) as context:
        found = check.check(context)
    assert found.passed
    assert found.numbers["left by PGD"] / 300 == pytest.approx(majority(0.6, 21), abs=0.09)
    assert abs(found.numbers["broken by queries"]) <= 0.09 * 300
    with held(Fragile(), dataset(split), (1.0,), **SETTINGS, queries=30) as context:
        context.averaged = lambda attack: nothing  # PGD that does not move, where queries find the weak spot
        found = check.check(context)
    assert found.passed is False
    assert found.numbers["broken by queries"] > 0.3 * found.numbers["left by PGD"]


def test_gradients_of_random_models_are_averaged_as_the_audit_says():
    asked = []

    class Counted(Chancy):
        def forward(self, x):
            if x.requires_grad and len(x) > 2:  # with two images a fast victim is compared with the model
                asked.append(len(x))
            return super().forward(x)

    model, split = Counted(), made(20)
    for draws in (2, 7):
        asked.clear()
        with held(model, dataset(split), (EPS,), pgd_steps=1, eot_samples=draws, auto_pgd=False) as context:
            per_image.measure(context)
        assert sum(asked) == draws * 20
    with Victim(model) as victim:
        asked.clear()
        accuracy_under(victim, split, PGD(eps=EPS, steps=1), 0)
        assert sum(asked) == 200

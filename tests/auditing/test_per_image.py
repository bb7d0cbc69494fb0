"""Per-image attacks in an audit: which are run on what, and that their numbers hang together."""

import random

import pytest
import torch
from torch import nn

import gambeson as gb
from gambeson.attacks import PGD, Square
from gambeson.auditing import SUITES, Suite
from gambeson.auditing.amounts import Amounts
from gambeson.auditing.diagnostics import DIAGNOSTICS
from gambeson.auditing.stages import per_image
from gambeson.data import Dataset, Split
from gambeson.evaluation import Rate, accuracy_under
from tests.auditing.evidence import held
from tests.conftest import LinearNet

EPS = (0.05, 0.1, 0.2)


@pytest.fixture(scope="module")
def few(digits):
    return Dataset(digits.name, digits.train, digits.validation, digits.test.subset(torch.arange(60)), digits.classes)


def test_pgd_on_all_images_and_the_suite_on_some(trained, few):
    with held(trained, few, EPS, pgd_steps=5, suite_images=40, suite_queries=50) as evidence:
        pgd, targeted, suite = per_image.measure(evidence)
        assert pgd.attack == "pgd"
        assert pgd.accuracy == accuracy_under(evidence.victim, few.test, PGD(eps=0.1, steps=5), seed=0)
        assert PGD(**pgd.settings) == PGD(eps=0.1, steps=5)
        assert (pgd.accuracy.n, suite.accuracy.n) == (60, 40)
        assert pgd.rounds == []
        assert [found.attack for found in targeted.rounds] == ["earlier pgd", "auto-pgd-targeted"]
        assert targeted.rounds[0].accuracy == pgd.accuracy  # and costs a forward
        before = targeted.rounds[0]
        assert (before.cost.backwards, before.cost.forwards) == (0, before.tried)
        assert before.broken > 0
        assert list(targeted.settings) == ["auto-pgd-targeted"]
        assert targeted.accuracy.n == 60
        assert targeted.accuracy.value < targeted.rounds[0].accuracy.value
        assert targeted.accuracy.value <= pgd.accuracy.value
        assert (suite.attack, suite.eps, suite.norm) == ("standard", 0.1, "inf")
        names = [found.attack for found in suite.rounds]
        own = ["pgd", "auto-pgd", "auto-pgd-targeted", "square"]
        assert names == ["earlier pgd", "earlier auto-pgd-targeted", *own]
        assert own == list(suite.settings)
        assert suite.rounds[0].broken > 0
        rows, counts = evidence.outcomes.of("per_image:auto-pgd-targeted")
        few_rows, worst = evidence.outcomes.of("per_image:standard")
        assert (worst.right <= counts.right[few_rows]).all()  # image by image
        assert torch.equal(rows, torch.arange(60))
        assert suite.accuracy == suite.rounds[-1].accuracy
        assert Square(**suite.settings["square"]).queries == 50
        assert suite.cost.backwards == sum(found.cost.backwards for found in suite.rounds) > 0
        weaker = evidence.outcome(PGD(eps=0.1, steps=5)).right[:40].sum()
        assert suite.accuracy.value <= float(weaker) / 40  # the worst of four is no better than the first alone


def test_images_that_were_kept_are_compared_with_themselves():
    reported, lucky, unlucky = Rate.of(50, 100), Rate.of(14, 20), Rate.of(6, 20)
    assert per_image.lowered(reported, lucky, []) == reported
    assert per_image.lowered(reported, lucky, [Rate.of(12, 20)]).value == 0.6  # below theirs, though above all images'
    assert per_image.lowered(reported, unlucky, [Rate.of(8, 20)]) == reported  # above theirs, though below all images'
    one, other = Rate.of(45, 100), Rate.of(40, 100)
    assert per_image.lowered(reported, reported, [one, other]) == Rate.lowest([reported, one, other])
    assert per_image.lowered(reported, Rate.of(52, 100), [Rate.of(51, 100)]).value == 0.5  # the same images


def test_no_suite_where_it_has_no_meaning_or_was_left_out(trained, few):
    with held(trained, few, EPS, pgd_steps=2) as evidence:
        assert [found.attack for found in per_image.measure(evidence)] == ["pgd", "auto-pgd-targeted"]
    with held(trained, few, (1.0,), pgd_steps=2, norm="1", suite_images=10) as evidence:
        assert [found.attack for found in per_image.measure(evidence)] == ["pgd"]
        assert per_image.left_out(evidence).startswith("No per-image attack suite was tried")


def test_attacks_on_label_maps_reach_the_closed_form():
    images = torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = (images[:, 0] > 0.5).long()
    split = Split("maps", images, labels, ("dark", "light"))
    data = Dataset("maps", split, split, split, split.classes)
    with held(Pixelwise(), data, EPS, suite_images=4, map_share=1) as evidence:
        *single, suite = per_image.measure(evidence)
        assert not per_image.left_out(evidence)
        assert [found.attack for found in single] == ["pgd", "cospgd"]
        # A pixel nearer than eps to one half falls, every other stands.
        stands = (images - 0.5).abs() > 0.1
        for found in single:
            assert found.accuracy.value == pytest.approx(float(stands.float().mean()), abs=1e-6)
        rows = evidence.test.sample_indices(4)
        assert suite.accuracy.value == pytest.approx(float(stands[rows].float().mean()), abs=1e-6)
        assert [turn.attack for turn in suite.rounds] == [
            "earlier pgd",
            "earlier cospgd",
            "sea-mce",
            "sea-mce-bal",
            "sea-js",
            "square",
        ]
        assert suite.maps.mean_iou.value < suite.maps.clean_mean_iou.value


class Pixelwise(nn.Module):
    def forward(self, x):
        return torch.cat([0.5 - x, x - 0.5], 1)


def test_the_suite_in_the_norm_2_and_on_a_random_model(few):
    class Noisy(LinearNet):
        def forward(self, x):
            return super().forward(x) + 0.3 * torch.randn(len(x), len(self.weight))

    model = Noisy(torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)))
    images = torch.rand(30, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    split = Split("made", images, LinearNet.forward(model, images).argmax(1), ("a", "b", "c"))
    data = Dataset("made", split, split, split, split.classes)
    settings = {"norm": "2", "pgd_steps": 3, "suite_images": 6, "suite_queries": 10, "eot_samples": 2}
    with held(model, data, (0.05,), **settings) as evidence:
        _, targeted, suite = per_image.measure(evidence)
        assert [found.attack for found in targeted.rounds] == ["earlier pgd", "noise off", "auto-pgd-targeted"]
        assert [found.attack for found in suite.rounds][:2] == ["earlier pgd", "earlier auto-pgd-targeted"]
        assert suite.settings["auto-pgd"]["eot_samples"] == 2
        assert suite.norm == "2"
        assert suite.accuracy.n == 6


class Erring(nn.Module):
    """Logits moved on by one class by chance, drawn by torch's generator or by one ``hidden`` from outside."""

    def __init__(self, net, *, chance=0.3, hidden=False):
        super().__init__()
        self.net, self.chance, self.own = net, chance, random.Random(0) if hidden else None

    def forward(self, x):
        z = self.net(x)
        drawn = torch.rand(len(z), 1) if self.own is None else torch.tensor([[self.own.random()] for _ in z])
        return torch.where(drawn < self.chance, z.roll(1, 1), z)


@pytest.mark.parametrize("hidden", [False, True])
def test_what_hides_behind_its_draws_is_attacked_with_them_off_and_through_them(trained, few, hidden):
    """PGD follows the cross-entropy of errors that no image can mend: it leaves far more than targets do."""
    settings = {"pgd_steps": 4, "eot_samples": 6, "votes": 5, "rescoring": False}
    with held(Erring(trained, hidden=hidden), few, (0.15,), **settings) as evidence:
        pgd, targeted = per_image.measure(evidence)
        names = ["earlier pgd", *["noise off"] * (not hidden), "auto-pgd-targeted"]
        assert [found.attack for found in targeted.rounds] == names
        assert list(targeted.settings) == names[1:]
        steps = {name: (one["steps"], one["probe_steps"]) for name, one in targeted.settings.items()}
        assert steps == dict.fromkeys(names[1:-1], (8, 2)) | {"auto-pgd-targeted": (4, 1)}
        assert targeted.settings["auto-pgd-targeted"]["eot_samples"] == 3
        assert targeted.accuracy.value < pgd.accuracy.value - 0.2
        n = Amounts(evidence.suite, few, random=True)
        assert targeted.cost.backwards <= n.targeted * n.test
        assert targeted.cost.forwards <= n.targeted * n.test + n.targeted_forwards


def test_attacks_on_a_random_model_that_do_nothing_change_nothing(trained, few):
    """Nearly every second answer is an error; an image that is chosen for its unlucky votes is judged by others."""
    with held(Erring(trained, chance=0.45), few, (1e-9,), pgd_steps=1, eot_samples=2, rescoring=False) as evidence:
        _, targeted = per_image.measure(evidence)
        assert evidence.clean.value < 0.75
        assert [found.accuracy for found in targeted.rounds] == [evidence.clean] * 3
        assert targeted.accuracy == evidence.clean
        assert targeted.rounds[-1].broken > 0


def test_a_black_box_is_attacked_by_square_alone(trained, few):
    with held(trained, few, EPS, black_box=True, sample=30, queries=40, suite_images=20) as evidence:
        (found,) = per_image.measure(evidence)
        assert (found.attack, found.accuracy.n) == ("square", 30)
        assert Square(**found.settings) == Square(eps=0.1, queries=40)
        assert found.cost.backwards == 0
        assert found.rounds[0].broken > 0
        clean = gb.evaluation.accuracy(trained, evidence.few(30)).value
        assert found.accuracy.value == pytest.approx(clean - found.rounds[0].broken / 30)
        assert found.cost.forwards <= 30 * 42
        gradient = [check for check in DIAGNOSTICS if check.gradients]
        assert all(check.check(evidence).passed is None for check in gradient)
    with held(trained, few, EPS, black_box=True, queries=0) as evidence:
        assert per_image.measure(evidence) == []


def test_suites_cost_more_from_quick_to_full():
    quick, standard, full = (SUITES[name] for name in ("quick", "standard", "full"))
    assert quick.test_images * quick.pgd_steps * quick.pgd_restarts + quick.suite_images * 600 <= 25_000
    assert (quick.sample, quick.suite_images, standard.suite_images, full.suite_images) == (100, 0, 500, 2000)


class Snapped(nn.Module):
    """Sets values to black that many pixels of an image share beside black and white, as at a corner of a ball."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        flat = x.flatten(1)
        alike = ((flat[:, :, None] - flat[:, None, :]).abs() < 1e-6).sum(2) > 8
        return self.net(torch.where(alike & (flat > 0) & (flat < 1), 0.0, flat).view_as(x))


def test_universal_crafting_goes_on_inside_the_ball(trained, digits):
    """Its cost is a tenth of a restart; where only corners are withstood, it is what counts."""
    suite = Suite(
        eps=(0.3,), universal_steps=40, universal_restarts=1, universal_batch=16, universal_probe_starts=0, pgd_steps=1,
        pgd_restarts=1, sample=10, test_images=100, validation_images=100, suite_images=0, queries=0, eps_adv=False,
        jacobian_backwards=0,
        universal_queries=300, surrogate="none", eps_uni_runs=0, noise_sizes=(), edits=(), auto_pgd=False,
        rescoring=False, checks=(), controls=(),
    )  # fmt: skip
    result = gb.audit(Snapped(trained), digits, suite).results
    rates = {one.start: one.validation_uer for one in result.middle.restarts}
    assert rates["warm, inside the ball"] > rates["zero"] + 0.05
    assert result.middle.uer.value > 0.8 > rates["zero"]
    assert result.middle.cost.backwards == 40 * 16 + 2 * 2 * 16
    assert suite.model_copy(update={"norm": "2"}).inside(0.3) is None

"""Audits of segmentation models: rates of pixels, mean IoU, diagnostics, and obfuscated nets that are not trusted."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy.stats import t as student
from torch import nn

import gambeson as gb
from gambeson.attacks import PGD, StochasticPGD, UniversalPerturbation
from gambeson.auditing import AuditResult, Suite
from gambeson.auditing.diagnostics import get
from gambeson.auditing.outcome import LEVEL, SLIGHT, PairedDifference
from gambeson.auditing.stages import per_image, surrogate
from gambeson.auditing.stages.examples import FILE
from gambeson.auditing.stages.targeted import enough, targets
from gambeson.auditing.stages.transfer import image_attacks
from gambeson.base import load_tensors
from gambeson.data import Dataset, Split
from gambeson.evaluation.targeted import target_success
from gambeson.evaluation.universal import strongest
from gambeson.tasks import CLASSIFICATION, Counts, Segmentation
from gambeson.testbed.obfuscations import logits, preprocessing
from gambeson.victim import Victim, predict
from tests import scenes
from tests.auditing.evidence import held
from tests.auditing.test_schema import FILE as SCHEMA
from tests.auditing.test_schema import faults
from tests.conftest import quickly

SUITE = Suite(
    eps=(0.04, 0.1, 0.2),
    universal_steps=30,
    universal_restarts=1,
    universal_probe_starts=0,
    universal_batch=20,
    map_share=1,
    pgd_steps=10,
    pgd_restarts=1,
    sample=20,
    suite_images=0,
    queries=30,
    jacobian_backwards=0,
    universal_queries=300,
    noise_sizes=(1.0,),
    votes=5,
    eot_samples=3,
    surrogate="none",
    eps_uni_runs=0,
    eps_adv=False,
    edits=(),
)


@pytest.fixture(scope="module")
def data():
    return scenes.dataset()


@pytest.fixture(scope="module")
def net(data):
    return scenes.net(data)


@pytest.fixture(scope="module")
def honest(net, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit")
    return gb.audit(net, data, SUITE, folder), folder


def test_maps_are_compared_by_the_pixels_of_each_image(honest):
    found, folder = honest
    same = {change.name: change for change in gb.compare(found, folder).changes}
    paired = {name: change for name, change in same.items() if "iou" not in name}
    assert set(paired) == {
        "clean",
        "uer@0.04",
        "uer@0.1",
        "uer@0.2",
        "per_image:pgd",
        "per_image:cospgd",
    }
    for name, change in paired.items():
        _, counts = found.outcomes.of(name)
        assert (counts.error_rate if name.startswith("uer") else counts.accuracy) == change.first
        assert int(counts.total.max()) == 15 * 16  # the first row does not count
        assert (change.unpaired, change.lost, change.p, change.difference.value) == ("", None, 1, 0)
    assert {change.unpaired for name, change in same.items() if "iou" in name} == {"outcomes per image were not kept"}
    assert gb.compare(found, folder).gate("no-regression, mean_iou@0.1>=0, clean_iou<=0, uer.high<=0.2").held
    assert found.results.gate("mean_iou<=1, clean_iou>=0.5, mean_iou@0.2.low<=0.9").held


def test_an_honest_net_is_trusted_and_each_check_applies_or_says_why_not(honest) -> None:
    found, _ = honest
    assert found.verdict.trusted, found.verdict.reasons
    idle = {check.name: check.detail for check in found.results.checks if check.passed is None}
    assert set(idle) == {
        "crafted on train beats crafted on test",
        "margin vanishes where the answer changes",
        "rotated and blended images stand too",
        "attacks find what is there",
        "other gradients no stronger",
        "no EOT gap",
        "no noise-off gap",
        "white box beats transfer",
        "universal white box beats transfer",
    }
    assert len(found.results.checks) > 20
    assert all(len(check.detail) > 10 for check in found.results.checks)


def test_rates_are_of_pixels_and_stand_for_the_stored_perturbations(honest, net, data) -> None:
    found, _ = honest
    result = found.results
    images, labels = data.test.take(slice(None), "cpu")
    valid = labels != scenes.IGNORED
    assert result.material.unit == "pixel"
    for uap, point in zip([None, *found.perturbations], [None, *result.universal], strict=True):
        moved = images if uap is None else (images + uap.delta).clamp(0, 1)
        with torch.no_grad():
            seen = net(moved).argmax(1)
        error = float((seen != labels)[valid].double().mean())
        rate, iou = (result.clean.complement, result.iou) if point is None else (point.uer, point.iou)
        assert rate.value == pytest.approx(error, abs=1e-12)
        assert rate.n == len(images)
        expected = {}
        for k, name in enumerate(scenes.CLASSES):
            own, said = (labels == k) & valid, (seen == k) & valid
            expected[name] = float((own & said).sum() / (own | said).sum())
        assert {name: one.value for name, one in iou.classes.items()} == pytest.approx(expected, abs=1e-6)
        assert iou.mean.value == pytest.approx(sum(expected.values()) / len(expected), abs=1e-6)
    errors = [point.uer.value for point in result.universal]
    assert errors == sorted(errors)
    assert errors[-1] > result.clean.complement.value + 0.1
    assert "% [" in found.verdict.summary
    assert "of the pixels of test images" in found.verdict.summary
    assert (
        f"The mean IoU is {result.middle.iou.mean} under the pattern, {result.iou.mean} when clean."
        in found.verdict.summary
    )


def test_the_result_fits_the_schema_and_comes_back(honest) -> None:
    found, folder = honest
    schema = json.loads(SCHEMA.read_text())
    written = json.loads((folder / "result.json").read_text())
    assert faults(written, schema, schema) == []
    written["universal"][0]["iou"]["classes"]["red"] = 0.5
    assert faults(written, schema, schema) == ["result.universal[0].iou.classes.red is 0.5, expected object"]
    assert AuditResult.load(folder) == found.results
    assert {"mean IoU"} <= set(found.results.to_frame()["what"])


def test_examples_are_spread_over_all_images_and_shown_at_every_eps(honest, net, data) -> None:
    found, folder = honest
    tensors, _ = load_tensors(folder / FILE, "examples")
    labels, valid = tensors["labels"], tensors["labels"] >= 0
    assert labels.shape == (6, 16, 16)
    assert not valid[:, 0].any()  # the ignored row
    assert valid[:, 1:].all()
    wrong = (tensors["perturbed_predictions"] != labels) & valid
    shares = wrong.flatten(1).sum(1) / valid.flatten(1).sum(1)
    assert shares.tolist() == sorted(shares.tolist())  # from easy to hard
    assert abs(float(shares.mean()) - found.results.middle.uer.value) < 0.02
    assert shares[-1] > shares[0]
    assert tensors["curve"].shape == (3, 6, 3, 16, 16)
    assert torch.equal(tensors["curve"][1], tensors["perturbed"])
    assert torch.equal(tensors["curve_predictions"][1], tensors["perturbed_predictions"])
    with torch.no_grad():
        moved = found.perturbations[2].apply(tensors["images"].float() / 255)
        assert torch.equal(tensors["curve_predictions"][2], net(moved).argmax(1))


class Noisy(nn.Module):
    """Noise on the pixels, which hides what the net behind it would not withstand."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x + 0.15 * torch.randn_like(x))


OBFUSCATED = {
    "sixteen grey levels": lambda net: preprocessing.Quantised(net, 16),
    "JPEG-like rounding": preprocessing.JpegLike,
    "rounded log-probabilities": logits.Rounded,
    "reversed gradient": lambda net: logits.FalseGradient(net, "reversed"),
    "logits x 1e4": lambda net: logits.Scaled(net, 1e4),
    "random noise": Noisy,
}
MORE = {
    "detached input": preprocessing.Detached,
    "wrong straight-through": preprocessing.WrongStraightThrough,
    "rippled pixels": preprocessing.Rippled,
    "squashing loop on pixels": preprocessing.Squashed,
    "random gradient": lambda net: logits.FalseGradient(net, "random"),
    "final ReLU": logits.FinalReLU,
    "float16 with a guard": logits.HalfPrecision,
    "fixed margin": logits.FixedMargin,
    "hard label": logits.HardLabel,
    "constant answer": logits.Constant,
}


def test_targets_are_reached_beyond_chance(honest, net, data) -> None:
    found, folder = honest
    static, hide = found.results.targeted
    assert static.target.startswith("static:")
    assert hide.target.partition(":")[2] in scenes.CLASSES[1:]
    chance = next(one for one in static.reached.controls if one.name == "shuffled target map")
    assert static.reached.success.low > static.reached.clean.value
    assert static.reached.success.value > chance.success.value
    noise = next(one for one in hide.reached.controls if one.name == "random-sign")
    assert hide.reached.hidden.value > noise.hidden.value + 0.3
    for one in (static, hide):
        uap = UniversalPerturbation.load(folder / one.file)
        assert target_success(net, data, uap).success.value == pytest.approx(one.reached.success.value)
    tensors, _ = load_tensors(folder / FILE, "examples")
    valid, targets = tensors["static"] >= 0, tensors["static"]
    assert torch.equal(valid, tensors["labels"] >= 0)
    assert all((targets[0] == one)[valid[0] & own].all() for one, own in zip(targets, valid, strict=True))
    assert (tensors["hide"] != scenes.CLASSES.index(hide.target.partition(":")[2])).all()
    assert "Aimed at one scene" in found.verdict.summary
    assert "Made to hide" in found.verdict.summary


def test_no_class_is_to_be_hidden_that_no_test_image_shows(net, data) -> None:
    with Victim(net) as victim:
        seen = predict(victim, data.test)
        context: Any = SimpleNamespace(test=data.test, data=data, victim=victim, seed=0, suite=SUITE, predictions=seen)
        context.subject = SimpleNamespace(black_box=False)
        static, hide = targets(context)
        numbers = tuple(str((k + 1) % len(data.classes)) for k in range(len(data.classes)))
        train, validation, test = (copy.copy(part) for part in (data.train, data.validation, data.test))
        for part in (train, validation, test):
            part.classes = numbers
        context.data, context.test = Dataset(data.name, train, validation, test, numbers), test
        assert str(targets(context)[1]) == f"hide:#{hide.index}"  # whose number is another class's name
        context.data, context.test = data, data.test
        context.predictions = seen.where(seen != hide.index, 0)
        assert targets(context) == [static]


def test_per_image_attacks_are_those_of_label_maps(honest) -> None:
    attacks = {one.attack: one.accuracy for one in honest[0].results.per_image}
    assert list(attacks) == ["pgd", "cospgd"]
    assert attacks["cospgd"].value <= attacks["pgd"].value  # the worst of both, image by image
    assert all(rate.high < honest[0].results.clean.low for rate in attacks.values())


FEW = SUITE.model_copy(update={"eps": (0.1,), "targeted": False, "universal_queries": 0})


@pytest.fixture(scope="module")
def base(net, data):
    return gb.audit(net, data, FEW).results


SURE = {
    "sixteen grey levels": ["no vanishing gradients", "unbounded attack succeeds", "perturbation budget used"],
    "JPEG-like rounding": ["no vanishing gradients", "unbounded attack succeeds", "perturbation budget used"],
    "rounded log-probabilities": ["no vanishing gradients"],
    "reversed gradient": ["gradient matches finite differences", "unbounded attack succeeds"],
    "final ReLU": ["no vanishing gradients"],
}
"""What must fail on some of them."""
HIDDEN = 0.05
"""What one may hide of the error without being found."""


def check_caught(name: str, model: nn.Module, data, base) -> None:
    """It is distrusted, or the attacks find on it what they find on the net itself: its obfuscation hid nothing."""
    found = gb.audit(model, data, FEW)
    failed = {check.name for check in found.results.checks if check.passed is False}
    assert found.verdict.trusted == (not failed)
    assert failed >= set(SURE.get(name, ()))
    if failed:
        assert found.verdict.summary.startswith("Not to be trusted")
        return
    for now, then in ((found.results.middle.uer, base.middle.uer), (_attacked(found.results), _attacked(base))):
        assert now.value > then.value - HIDDEN, (now, then)


def _attacked(result: AuditResult):
    return result.per_image[0].accuracy.complement


@pytest.mark.parametrize("name", quickly(OBFUSCATED, "logits x 1e4"))
def test_an_obfuscated_net_is_distrusted_or_broken_as_the_net_itself(name, net, data, base) -> None:
    check_caught(name, OBFUSCATED[name](net), data, base)


@pytest.mark.full
@pytest.mark.parametrize("name", MORE)
def test_more_obfuscated_nets_are_distrusted_or_broken(name, net, data, base) -> None:
    check_caught(name, MORE[name](net), data, base)


@pytest.mark.full
def test_a_surrogate_for_maps_is_a_u_net_and_its_images_keep_their_size(net, data, monkeypatch) -> None:
    monkeypatch.setattr(surrogate, "_FEWEST_STEPS", 40)
    monkeypatch.setattr(surrogate, "_MAPS_SEEN", 64)
    suite = FEW.model_copy(update={"surrogate": "auto", "surrogate_epochs": 1, "surrogate_images": 64, "queries": 0})
    found = gb.audit(net, data, suite).results
    assert found.surrogate is not None
    assert found.surrogate.name == "unet-small"
    assert [one.attack for one in found.transfer] == ["stochastic-pgd", "fgsm", "mi-fgsm"]
    checks = {check.name: check.passed for check in found.checks}
    assert checks["white box beats transfer"]
    assert checks["universal white box beats transfer"]
    assert [*image_attacks(0.1, "inf", CLASSIFICATION)] == ["fgsm", "mi-di-fgsm"]


STRIPES = torch.tensor([0, 1, 0, 1])
"""The label of each column."""


class Torn(nn.Module):
    """The left half of every map is wrong and the right half right; the images' mean moves both, and neither alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = 20 * (x.mean((1, 2, 3)) - 0.5)[:, None, None]
        ahead = torch.where(torch.arange(x.shape[3]) < x.shape[3] // 2, mean - 5, 1 - mean).expand(-1, x.shape[2], -1)
        return torch.stack([ahead * (k == STRIPES) for k in range(2)], 1)


@pytest.fixture(scope="module")
def torn():
    grey, labels = torch.full((60, 1, 4, 4), 0.5), STRIPES.expand(60, 4, 4)
    split = Split("grey", grey, labels, ("dark", "light"), task=Segmentation())
    return Dataset("grey", split, split, split, split.classes)


def test_pixels_that_are_wrong_take_no_part_of_the_step(torn) -> None:
    with held(Torn(), torn, (0.1,), map_share=1, sample=20) as context:
        # On all pixels, those that are wrong have the larger say, and what is right gets safer still.
        assert context.accuracy(PGD(eps=0.1, steps=20)).value == 0.5
        assert context.accuracy(context.pgd_at(0.04)).value == 0.5  # 0.8 < 1
        found = per_image.measure(context)
        assert [(one.attack, one.accuracy.value) for one in found] == [("pgd", 0.0), ("cospgd", 0.0)]
        assert context.accuracy(context.pgd_at(1.0)).value == 0
        assert (context.pgd.steps, context.suite.pgd(0.1).steps) == (40, 20)
        assert (len(context.sample), len(context.wider)) == (20, 40)


def test_checks_take_what_the_stage_found_of_their_maps(net, data) -> None:
    with held(net, data, (0.1,), map_share=1, sample=10, pgd_steps=3) as context:
        stage = per_image.attacked(context, "pgd", context.pgd, context.pgd.plain())
        kept = context.outcomes.of("per_image:pgd")
        assert kept is not None
        rows, counts = kept
        assert len(rows) == 40
        before = context.spent
        few = context.outcome(context.pgd)
        assert context.since(before).backwards == 0
        assert torch.equal(few.right, counts.right[context.test.sample_indices(10, seed=context.seed)])
        assert context.outcome(context.pgd, "test").accuracy == stage.accuracy
        other = context.outcome(context.pgd.model_copy(update={"steps": 4}))
        assert context.since(before).backwards > 0
        assert not torch.equal(other.right, few.right)


def test_controls_are_ranked_on_a_few_maps(net) -> None:
    data = scenes.dataset(20, 60)
    with Victim(net) as victim:
        uap = StochasticPGD(eps=0.1, steps=1, probe_starts=0, restarts=1).craft(victim, data)
        before = victim.forwards
        strongest(victim, data.validation, uap, controls=("random-sign", "chessboard"))
        assert victim.forwards - before == 11 * 50 + 2 * 60


def test_a_target_is_looked_for_in_no_more_images_than_the_attack_takes(data) -> None:
    context: Any = SimpleNamespace(data=data, few=lambda count, split: split.sample(count, seed=3))
    few = enough(context, StochasticPGD(eps=0.1, steps=5, batch_size=8))
    assert (len(few.train), len(few.validation), len(few.test)) == (40, 40, 40)
    assert enough(context, StochasticPGD(eps=0.1, steps=5, batch_size=30)) is data


def test_no_surrogate_for_maps_that_would_learn_nothing(data) -> None:
    quick = gb.auditing.SUITES["quick"].on(data)
    name, why = surrogate.choose(quick, data)
    assert name == ""
    assert "of 900 images a net for label maps (N, H, W) learns too little" in why  # 6 epochs of 150
    longer = quick.model_copy(update={"surrogate_epochs": 334})
    assert surrogate.choose(longer, data) == ("unet-small", "")
    assert surrogate.choose(longer.model_copy(update={"surrogate_epochs": 333}), data)[0] == ""


def test_fewer_maps_are_asked_than_images(data, digits) -> None:
    quick = gb.auditing.SUITES["quick"]
    assert quick.on(digits).test_images == quick.test_images == 500
    on_maps = quick.on(data)
    assert (on_maps.test_images, on_maps.sample, on_maps.suite_images) == (200, 40, 0)
    assert on_maps.universal_probe_starts == 0
    assert on_maps.on(data) == on_maps  # applied once
    assert gb.auditing.SUITES["standard"].on(data).test_images is None


def test_differences_of_maps_are_paired_over_images_and_slight_ones_are_none() -> None:
    def counts(*right: int) -> Counts:
        return Counts(torch.tensor(right), torch.full((len(right),), 1000))

    few, many = counts(*range(700, 740)), counts(*range(600, 640))
    found = PairedDifference.of(few, many)
    assert found.value == pytest.approx(0.1)
    assert 0.05 < found.low < 0.1 < found.high < 0.15  # 40 whole images would leave it open: 0.1 - 3 / 42
    assert PairedDifference.of(counts(*[700] * 40), counts(*[685] * 40)).low < 0  # 1.5 points, every time
    same = PairedDifference.of(few, few)
    assert (same.low, same.high) == (-SLIGHT, SLIGHT)
    uneven = counts(700, 705, 730, 790), counts(600, 640, 650, 720)
    shares = torch.tensor([0.1, 0.065, 0.08, 0.07, 0.1, -0.1], dtype=torch.float64)  # the largest once more, both ways
    error = float(shares.std(correction=0)) / 6**0.5
    half = float(student.ppf(1 - LEVEL, 3)) * error + SLIGHT
    assert PairedDifference.of(*uneven).low == pytest.approx(float(shares.mean()) - half, abs=1e-4)
    across = PairedDifference.across(few, many)
    assert across.value == pytest.approx(0.1)
    assert 0 < across.low < found.low


class Stuck(nn.Module):
    """Two logits a pixel, of which the second is the brightness; of some rows it is always right."""

    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def forward(self, x):
        held = torch.arange(x.shape[2], device=x.device).view(1, 1, -1, 1) < self.rows
        score = torch.where(held, 1.0 + 0 * x, x - 0.5)
        return torch.cat([-score, score], 1)


@pytest.mark.parametrize(("rows", "passed"), [(2, True), (7, False)])
def test_as_many_pixels_as_the_rarest_class_has_may_stay_right(rows, passed):
    """A fifth of the pixels cannot fall, or seven tenths; three tenths have the rarest class."""
    labels = torch.ones(30, 10, 10, dtype=torch.long)
    labels[:, 7:] = 0
    images = 0.2 + 0.6 * labels[:, None].float()
    split = Split("bands", images, labels, ("dark", "light"))
    with held(Stuck(rows), Dataset("bands", split, split, split, split.classes), (0.1,), map_share=1) as context:
        found = get("unbounded attack succeeds").check(context)
    assert found.numbers["accuracy"] == pytest.approx(rows / 10, abs=0.02)
    assert found.passed is passed

"""The audit end to end on real digits; obfuscated models stand in test_audit_on_testbed."""

import copy
import json
import shutil

import pytest
import torch
import yaml
from torch import nn

import gambeson as gb
from gambeson import UserError
from gambeson.attacks import StochasticPGD, UniversalPerturbation
from gambeson.auditing import DIAGNOSTICS, AuditResult, AuditRun, Suite, run_audit
from gambeson.base import close_run, open_run
from gambeson.evaluation import eps_uni
from gambeson.testbed.suspicious import ToColour
from tests.attacks.test_universal import linear_data
from tests.conftest import binary, quickly

SUITE = Suite(
    eps=(0.05, 0.1, 0.2),
    universal_steps=30,
    universal_restarts=1,
    universal_batch=64,
    pgd_steps=10,
    pgd_restarts=1,
    suite_images=0,
    sample=50,
    queries=50,
    surrogate="none",
    jacobian_backwards=500,
    universal_queries=300,
    eps_uni_tolerance=0.1,
    edits=("jpeg:75", "shift:1"),
)


GREY = (
    "input unchanged",
    "stateless",
    "gradient matches finite differences",
    "gradient complete",
)


@pytest.fixture(scope="module")
def audited(trained, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit")
    return gb.audit(trained, digits, SUITE, folder, label="plain"), folder


def other_train(data):
    turned = data.train.with_images(data.train.images.flip(-1))
    return gb.data.Dataset(data.name, turned, data.validation, data.test, data.classes)


def test_an_honest_model_is_trusted_and_its_numbers_hang_together(audited, trained, digits):
    found, folder = audited
    result = found.results
    assert found.verdict.trusted, found.verdict.reasons
    assert result.clean == gb.evaluation.accuracy(trained, digits)
    rates = [point.uer.value for point in result.universal]
    assert rates[-1] > 2 * max(control.worst.value for control in result.universal[-1].controls)
    assert rates == sorted(rates)
    assert result.per_image[0].accuracy.value < 1 - result.middle.uer.value  # one an image is stronger than one for all
    for point, uap in zip(result.universal, found.perturbations, strict=True):
        stored = UniversalPerturbation.load(folder / point.file)
        assert (
            gb.evaluation.universal_evasion(trained, digits, stored)
            == point.uer
            == gb.evaluation.universal_evasion(trained, digits, uap)
        )
        assert gb.evaluation.fooling_rate(trained, digits, stored) == point.fooling
        assert float(stored.delta.abs().max()) <= point.eps
    tried = dict(result.eps_uni.tried)
    assert tried[result.eps_uni.value] >= 0.5 or result.eps_uni.censored
    assert result.eps_uni.low <= result.eps_uni.value <= result.eps_uni.high
    assert result.eps_adv.value < result.eps_uni.low  # one an image needs less
    assert (result.eps_adv.images, result.middle.crafted) == (50, None)
    assert all(error < 0.5 for eps, error in tried.items() if eps < result.eps_uni.value)


def test_result_file_is_the_result_and_another_seed_gives_another(audited, trained, digits, tmp_path):
    found, folder = audited
    assert AuditResult.load(folder) == found.results
    broken = found.results.plain() | {"clean": {"value": -1, "low": 0, "high": 1, "n": 9}}
    (tmp_path / "result.json").write_text(json.dumps(broken))
    with pytest.raises(UserError, match=r"result\.json is damaged \(.*got -1 \[0, 1\] of 9\): run the audit again"):
        AuditResult.load(tmp_path)
    first = SUITE.model_copy(update={"eps": SUITE.eps[:1], "eps_uni_runs": 0, "checks": (), "edits": ()})
    other = gb.audit(trained, digits, first.model_copy(update={"eps_adv": False, "jacobian_backwards": 0}), seed=1)
    assert not torch.equal(other.perturbations[0].delta, found.perturbations[0].delta)
    assert set(json.loads((folder / "timing.json").read_text())) >= {"per-image", "eps-uni"}


def test_a_cut_audit_goes_on_after_its_last_stage_and_ends_with_the_same_bytes(trained, digits, tmp_path, monkeypatch):
    short = {"universal_steps": 10, "pgd_steps": 3, "jacobian_backwards": 0, "edits": (), "eps_uni_tolerance": 0.3}
    suite = SUITE.model_copy(update={**short, "checks": ("stateless", "gradient complete", "attack has converged")})
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    found = gb.audit(trained, digits, suite, whole, label="plain")
    crafted = []
    craft = StochasticPGD.craft

    def counted(self, *args, **kwargs):
        crafted.extend([] if self.shrink else [self.eps])  # every eps is gone on with inside the ball
        if len(crafted) == 3:
            raise KeyboardInterrupt
        return craft(self, *args, **kwargs)

    monkeypatch.setattr(StochasticPGD, "craft", counted)
    with pytest.raises(KeyboardInterrupt):
        gb.audit(trained, digits, suite, cut, label="plain")
    assert not (cut / "result.json").exists()
    resumed = gb.audit(trained, digits, suite, cut, label="plain")
    assert crafted[:4] == [0.05, 0.1, 0.2, 0.2]  # the first two were not crafted again
    assert resumed.results == found.results
    assert (cut / "result.json").read_bytes() == (whole / "result.json").read_bytes()
    other = gb.models.create("lenet5", digits)
    with pytest.raises(UserError, match=r"holds another run \(it differs in model\)"):
        gb.audit(other, digits, suite, cut)
    fewer = suite.model_copy(update={"pgd_steps": suite.pgd_steps + 1, "eps": (0.3,)})
    for data, other_suite, seed, unlike in (
        (digits, fewer, 0, "suite.eps, suite.pgd_steps"),
        (digits, suite, 3, "seed"),
        (digits.test, suite, 0, "images"),
        (other_train(digits), suite, 0, r"train\)"),
    ):
        with pytest.raises(UserError, match=rf"holds another run \(it differs in {unlike}"):
            gb.audit(trained, data, other_suite, cut, seed=seed)


def test_a_finished_audit_is_not_taken_for_one_of_weights_that_changed_since(audited, trained, digits, tmp_path):
    found, folder = audited
    out, weights = tmp_path / "audit", tmp_path / "model.safetensors"
    gb.models.save(trained, weights)
    run = AuditRun(model=str(weights), data="digits", suite=SUITE)
    open_run(out, run, {})
    close_run(out)
    shutil.copytree(folder, out, dirs_exist_ok=True)
    assert run_audit(run, out, digits).results == found.results
    gb.models.save(gb.models.create("lenet5", digits), weights)
    with pytest.raises(
        UserError, match=r"audit holds a run that began before .*model\.safetensors was changed: choose"
    ):
        run_audit(run, out, digits)
    begun = yaml.safe_load((out / "run.yaml").read_text())
    del begun["files"]  # as an earlier version wrote it
    (out / "run.yaml").write_text(yaml.safe_dump(begun))
    with pytest.raises(UserError, match=r"audit holds the audit of other weights of .*model\.safetensors: choose"):
        run_audit(run, out, digits)


def test_a_failed_attack_is_reported_as_failed(trained, digits, monkeypatch):
    def nothing(self, model, data, **kwargs):
        real = craft(self.model_copy(update={"steps": 1, "restarts": 1}), model, data, seed=0)
        return UniversalPerturbation(real.delta * 0, real.about.model_copy(update={"status": "zero"}))

    craft = StochasticPGD.craft
    monkeypatch.setattr(StochasticPGD, "craft", nothing)
    few = {"eps": (0.3,), "checks": ("crafted beats controls", "perturbation budget used", "stateless"), "edits": ()}
    few |= {"jacobian_backwards": 0, "eps_uni_runs": 0, "eps_adv": False}
    found = gb.audit(trained, digits, SUITE.model_copy(update=few))
    failed = {check.name for check in found.results.checks if not check.passed}
    assert {"crafted beats controls", "perturbation budget used"} <= failed
    (point,) = found.results.universal
    worst = max((control.worst for control in point.controls), key=lambda rate: rate.value)
    assert point.attack in ("random-sign", "chessboard")
    assert point.crafted.value == pytest.approx(found.results.clean.complement.value)
    assert point.crafted.value < point.uer.value <= worst.value
    (uap,) = found.perturbations  # what the headline says is what is stored, and it has seen no image
    assert gb.evaluation.universal_evasion(trained, digits, uap) == point.uer
    assert (uap.about.attack, uap.about.crafted_on) == (point.attack, "no images")
    assert f"the {point.attack} pattern misclassifies {point.uer}" in found.verdict.summary


def test_eps_uni_of_one_class_is_a_quantile_of_the_margins():
    model, w = binary((1, 4, 6))
    data = linear_data(model, (1, 4, 6), keep=0)
    margins = model(data.test.take(slice(None))[0]).diff(dim=1).flatten().detach().abs() / w.abs().sum()
    exact = float(margins.sort().values[(len(margins) + 1) // 2 - 1])
    attack = StochasticPGD(eps=0.1, steps=20, probe_starts=0, batch_size=16, truncate=None)
    found = eps_uni(model, data, attack, delta=0.5, tolerance=0.01)
    assert exact <= found.value <= exact + max(0.011 * exact, 1 / 1024) + 1e-6
    assert not found.censored


def test_eps_uni_is_censored_or_zero_where_it_must_be(digits):
    class Fixed(nn.Module):
        def __init__(self, answer):
            super().__init__()
            self.answer = answer

        def forward(self, x):
            answer = 2 * nn.functional.one_hot(torch.tensor(self.answer), 10).float()
            return x.flatten(1).sum(1, keepdim=True) * 0 + answer

    attack = StochasticPGD(eps=0.1, steps=2, probe_starts=0, batch_size=16)
    easy = eps_uni(Fixed(3), digits, attack, delta=0.5)
    assert (easy.value, easy.censored) == (0.0, False)  # nine of ten digits are wrong before any attack
    never = eps_uni(Fixed(3), digits, attack, delta=0.95)
    assert (never.value, never.censored) == (1.0, True)
    with pytest.raises(UserError, match="expected an error between 0 and 1"):
        eps_uni(Fixed(3), digits, attack, delta=1.5)


class Coloured(nn.Module):
    """A network of colour images that makes three channels of a grey one in one of several ways."""

    def __init__(self, net, spread):
        super().__init__()
        self.net, self.spread = ToColour(copy.deepcopy(net)), spread

    def forward(self, x):
        return self.net(self.spread(x))


def brightened(x):
    x = x.repeat(1, 3, 1, 1)
    x[:, 1:] += 1e-3  # its own copy
    return x


SPREADS = {"expanded": lambda x: x.expand(-1, 3, -1, -1), "brightened": brightened}


@pytest.mark.parametrize("spread", quickly(SPREADS, "expanded"))
def test_a_grey_net_that_expands_to_colour_is_neither_accused_nor_refused(spread, trained, digits):
    few = Suite(
        eps=(0.1,), universal_steps=5, universal_restarts=1, universal_probe_starts=0, pgd_steps=5, pgd_restarts=1,
        test_images=60, validation_images=40, sample=20, suite_images=0, queries=0, surrogate="none", eps_uni_runs=0,
        eps_adv=False, jacobian_backwards=0,
        universal_queries=300, noise_sizes=(), edits=(), auto_pgd=False, rescoring=False, checks=GREY,
    )  # fmt: skip
    result = gb.audit(Coloured(trained, SPREADS[spread]), digits, few).results
    assert result.clean.value > 0.8
    assert [check.name for check in result.checks if check.passed] == [
        one.name for one in DIAGNOSTICS if one.name in GREY
    ]
    assert result.cost.backwards > 0


def test_mistakes_are_named(trained, digits):
    with pytest.raises(UserError, match="unknown suite 'fast': choose one of full, glance, quick, standard"):
        gb.audit(trained, digits, "fast")
    with pytest.raises(UserError, match="eps must be ascending without repeats"):
        Suite(eps=(0.2, 0.1))
    with pytest.raises(UserError, match="no customary eps for the norm 1"):
        Suite(norm="1").on(digits)
    with pytest.raises(UserError, match="divides by zero"):
        Suite(eps=("8/0",))
    colour = gb.models.create("lenet5", in_channels=3, classes=10, image_size=8)
    with pytest.raises(UserError, match=r"\(8, 1, 8, 8\): this model expects \(N, 3, H, W\)"):
        gb.audit(colour, digits, SUITE)


def test_radii_that_files_could_not_tell_apart_are_refused():
    for eps in ((0.1, 0.100004), (8 / 255, 0.031373, 0.2)):
        with pytest.raises(UserError, match="expected radii that differ in their first four digits"):
            Suite(eps=eps)
    assert Suite(eps=(0.1, 0.1001)).eps == (0.1, 0.1001)

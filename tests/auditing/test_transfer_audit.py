"""Transfer from a surrogate, and the diagnostics that compare the white box with attacks that know less."""

import pytest
import torch
from torch import nn

import gambeson as gb
from gambeson import UserError
from gambeson.attacks import FGSM, UniversalPerturbation
from gambeson.auditing import DIAGNOSTICS, Suite
from gambeson.auditing.context import AuditContext, Checkpoints
from gambeson.auditing.nearest_class import NearestClass
from gambeson.auditing.results import ModelInfo
from gambeson.auditing.stages import surrogate
from gambeson.auditing.stages.transfer import FromSurrogate, measure, name_of
from gambeson.evaluation import Rate
from gambeson.threat import Ball, perturb
from gambeson.victim import Victim, predict
from tests.conftest import LinearNet, binary, full, inner_images

SUITE = Suite(
    eps=(0.15,), sample=150, queries=60, pgd_steps=10, pgd_restarts=1, surrogate_epochs=8, transfer_images=200
)
CHECKS = {check.name: check for check in DIAGNOSTICS}
OURS = (
    "white box beats transfer",
    "universal white box beats transfer",
    "white box beats queries",
    "attack beats noise",
)


@pytest.fixture(scope="module")
def source(trained, digits):
    model, about = surrogate.obtain(SUITE, digits, trained, None, Checkpoints(None), 0)
    assert about.accuracy.value > 0.85
    return model


def evidence_of(model, digits, source, uap=None, suite=SUITE, **subject):
    """What an audit knows when it comes to its diagnostics; the caller holds the victim."""
    victim = Victim(model, fast=False)
    victim.__enter__()
    victim.inspect(digits.test.take(slice(0, 8))[0])
    about = ModelInfo(label="m", name="m", parameters=1, fingerprint="", **subject)
    found = AuditContext(
        victim=victim, data=digits, suite=suite, seed=0, subject=about, clean=Rate.of(1, 1),
        predictions=predict(victim, digits.test), surrogate=source,
    )  # fmt: skip
    delta = torch.zeros(1, *digits.test.shape) if uap is None else uap
    known = suite.universal(found.eps).model_copy(update={"steps": 1, "probe_starts": 0, "restarts": 1})
    found.uaps[found.eps] = UniversalPerturbation(delta, known.craft(source, digits).about)
    return found


def looked(found):
    try:
        return {name: CHECKS[name].check(found) for name in OURS}
    finally:
        found.victim.__exit__(None, None, None)


class Rounded(nn.Module):
    """Quantised input: the net as it is, and no gradient at all."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model((x * 16).round() / 16)


class Turned(nn.Module):
    """Logits of the net, with a gradient that points the wrong way."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        logits = self.model(x)
        return 2 * logits.detach() - logits


@pytest.mark.parametrize("wrapper", [Rounded, full(Turned)])
def test_masked_gradients_are_beaten_by_transfer_and_queries(wrapper, trained, digits, source):
    found = looked(evidence_of(wrapper(trained), digits, source))
    assert found["white box beats transfer"].passed is False
    assert found["universal white box beats transfer"].passed is False
    assert found["white box beats queries"].passed is False
    assert (
        found["white box beats transfer"].numbers["mi-di-fgsm"] < found["white box beats transfer"].numbers["white box"]
    )
    assert found["white box beats queries"].numbers["broken by queries"] > 10


def test_a_gradient_turned_round_loses_to_noise(trained, digits, source):
    suite = SUITE.model_copy(update={"eps": (0.3,)})
    found = looked(evidence_of(Turned(trained), digits, source, suite=suite))
    assert found["attack beats noise"].passed is False


def test_an_honest_net_passes(trained, digits, source):
    brief = {"steps": 60, "restarts": 1, "probe_starts": 0}
    uap = SUITE.universal(0.15).model_copy(update=brief).craft(trained, digits)
    found = looked(evidence_of(trained, digits, source, uap.delta))
    assert {name: check.passed for name, check in found.items()} == dict.fromkeys(OURS, True)
    numbers = found["white box beats transfer"].numbers
    assert numbers["white box"] < numbers["mi-di-fgsm"]


def test_a_linear_model_passes_against_itself(digits):
    """White box and a surrogate that is the model itself are equally strong: nobody is accused."""
    torch.manual_seed(0)
    model = LinearNet(torch.zeros(10, *digits.test.shape))
    gb.train(model, digits, gb.defenses.Standard(), epochs=10, lr=0.1, batch_size=64, seed=0)
    twin = LinearNet(3 * model.weight.detach(), 3 * model.bias.detach())
    uap = SUITE.universal(0.15).model_copy(update={"steps": 60, "restarts": 1, "probe_starts": 0}).craft(model, digits)
    found = looked(evidence_of(model, digits, twin, uap.delta))
    assert {name: check.passed for name, check in found.items()} == dict.fromkeys(OURS, True)


def test_what_cannot_be_compared_is_said(trained, digits):
    found = evidence_of(trained, digits, trained, suite=SUITE.model_copy(update={"queries": 0}))
    found.surrogate = None
    checks = looked(found)
    assert checks["white box beats transfer"].passed is None
    assert checks["universal white box beats transfer"].passed is None
    assert checks["white box beats queries"].passed is None
    assert checks["attack beats noise"].passed is True


def test_transferred_errors_are_those_of_the_images_crafted_on_the_surrogate(trained, digits, source):
    found = evidence_of(trained, digits, source)
    parts = {part.attack: part for part in measure(found)}
    assert set(parts) == {"stochastic-pgd", "fgsm", "mi-di-fgsm"}
    assert all(part.source == f"surrogate ({name_of(source)})" == "surrogate (lenet5)" for part in parts.values())
    few = found.few(SUITE.transfer_images)
    images, labels = few.take(slice(None))
    moved = FGSM(eps=0.15)(source, images, labels)
    with torch.no_grad():
        error = float((trained(moved).argmax(1) != labels).float().mean())
    assert parts["fgsm"].error.value == pytest.approx(error)
    assert parts["fgsm"].error.n == 200
    assert parts["stochastic-pgd"].universal
    assert parts["stochastic-pgd"].error.n == len(digits.test)
    assert all(part.error.value > 0.1 for part in parts.values())
    assert found.borrowed[0.15].about.model == gb.models.fingerprint(source)
    found.victim.__exit__(None, None, None)


class Nearest(nn.Module):
    """The class of the nearest image that it knows, with a faint gradient of another net for show."""

    def __init__(self, known, labels, net):
        super().__init__()
        self.known, self.labels, self.net = known, labels, net

    def forward(self, x):
        nearest = torch.cdist(x.detach().flatten(1), self.known.flatten(1)).argmin(1)
        return 10.0 * nn.functional.one_hot(self.labels[nearest], 10) + 1e-3 * self.net(x)


def test_what_compares_with_known_images_falls_to_steps_towards_others(trained, digits, source):
    model = Nearest(*digits.train.take(slice(None)), trained)
    suite = SUITE.model_copy(update={"eps": (0.3,)})
    check = looked(evidence_of(model, digits, source, suite=suite))["white box beats queries"]
    assert check.passed is False
    images, labels = digits.test.take(slice(0, 60))
    with Victim(model) as victim:
        moved = NearestClass(Ball(eps=0.3), digits.train)(victim, images, labels)
        still = (victim.forward_original(images).argmax(1) == labels).sum() - (
            victim.forward_original(moved).argmax(1) == labels
        ).sum()
        assert still > 12
        assert victim.forwards == (20 + 2) * 60
    assert (moved - images).abs().max() <= 0.3 + 1e-6
    nothing = NearestClass(Ball(eps=0), digits.train)
    with Victim(model) as victim:
        assert torch.equal(nothing(victim, images, labels), images)


def test_a_surrogate_of_any_scale_is_climbed_as_well(trained, digits, source):
    class Large(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = source

        def forward(self, x):
            return 1000 * self.model(x)

    errors = []
    for surrogate_of_audit in (source, Large()):
        found = evidence_of(trained, digits, surrogate_of_audit)
        errors.append({part.attack: part.error.value for part in measure(found)})
        found.victim.__exit__(None, None, None)
    own, large = errors
    assert all(large[name] > own[name] - 0.08 for name in own), errors


def test_an_attack_on_a_surrogate_does_not_look_at_the_model():
    net, w = binary((1, 4, 4))
    other = LinearNet(-2 * net.weight.detach())
    images = inner_images(6, (1, 4, 4))
    labels = net(images).argmax(1)
    moved = FromSurrogate(other, FGSM(eps=0.05))(Victim(net), images, labels)
    right = perturb(images, 0.05 * torch.where(labels == 1, 1.0, -1.0).view(-1, 1, 1, 1) * w.sign())
    assert torch.allclose(moved, right, atol=1e-6)
    assert repr(FromSurrogate(other, FGSM(eps=0.05))) == repr(FromSurrogate(net, FGSM(eps=0.05)))


def test_the_surrogate_is_kept_and_not_trained_again(trained, digits, tmp_path, monkeypatch):
    suite = SUITE.model_copy(update={"surrogate_epochs": 2, "surrogate_images": 300})
    monkeypatch.setattr(surrogate, "_FEWEST_STEPS", 50)
    first, about = surrogate.obtain(suite, digits, trained, tmp_path, Checkpoints(tmp_path), 0)
    assert (tmp_path / about.file).is_file()
    assert about.images == 300
    assert about.epochs == 4  # of 16 steps, 18 images each
    monkeypatch.setattr(surrogate, "train", None)
    again, told = surrogate.obtain(suite, digits, trained, tmp_path, Checkpoints(tmp_path), 0)
    assert told == about
    assert gb.models.fingerprint(again) == gb.models.fingerprint(first)
    assert gb.evaluation.accuracy(again, digits) == about.accuracy


def test_which_surrogate_suits_the_data(digits):
    grey = Suite()
    assert surrogate.choose(grey, digits) == ("lenet5", "")
    for size, colour, expected in ((32, 3, "resnet20"), (64, 3, "resnet20"), (65, 3, ""), (28, 1, "lenet5")):
        images = torch.zeros(20_000, 1, 1, 1).expand(-1, colour, size, size)
        labels = torch.arange(20_000) % 2
        split = gb.data.Split("s", images[:10], labels[:10])
        data = gb.data.Dataset("s", split, split, split, split.classes)
        many = object.__new__(gb.data.Split)
        many.__dict__.update(split.__dict__, _images=images, _labels=labels)
        object.__setattr__(data, "train", many)
        name, reason = surrogate.choose(grey, data)
        assert name == expected
        assert ("wide, and a surrogate is only trained up to 64" in reason) == (not expected)
        quick = surrogate.choose(gb.auditing.SUITES["quick"], data)[0]
        assert quick == ("lenet5" if expected else "")
    assert "as the suite asks" in surrogate.choose(Suite(surrogate="none"), digits)[1]


def test_a_surrogate_by_name(trained, digits, tmp_path):
    gb.models.save(trained, tmp_path / "own.safetensors")
    suite = SUITE.model_copy(update={"surrogate": str(tmp_path / "own.safetensors")})
    with pytest.raises(UserError, match="is the audited model itself"):
        surrogate.obtain(suite, digits, trained, None, Checkpoints(None), 0)
    torch.manual_seed(3)
    other = gb.models.create("lenet5", digits)
    found, about = surrogate.obtain(suite, digits, other, None, Checkpoints(None), 0)
    assert gb.models.fingerprint(found) == gb.models.fingerprint(trained)
    assert (about.name, about.images, about.file) == (suite.surrogate, 0, "")
    assert about.accuracy.value > 0.9
    with pytest.raises(UserError, match="does not exist"):
        surrogate.obtain(
            SUITE.model_copy(update={"surrogate": "no/where"}), digits, trained, None, Checkpoints(None), 0
        )

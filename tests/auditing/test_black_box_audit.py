"""Audits of what only answers: the budget is never exceeded, nothing is asked twice, another box is noticed."""

import json

import pytest
import torch

import gambeson as gb
from gambeson import UserError
from gambeson.attacks import UniversalPerturbation
from gambeson.auditing import Suite
from gambeson.auditing.budget import TEST_IMAGES, fit_queries, omitted
from gambeson.auditing.cost import most_images
from gambeson.auditing.results import AuditResult, Surrogate
from gambeson.auditing.stages import black_box, surrogate
from gambeson.evaluation import FunctionModel
from tests.attacks.test_universal import linear_data
from tests.conftest import LinearNet, binary

SUITE = Suite(
    eps=(0.1, 0.2, 0.3),
    test_images=150,
    sample=40,
    queries=40,
    patterns=9,
    pattern_images=60,
    surrogate="none",
    noise_sizes=(1.0,),
    edits=("jpeg:75",),
    eps_uni_runs=2,
)


@pytest.fixture(scope="module")
def audited(trained, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("box")
    box = FunctionModel(trained)
    return gb.audit(box, digits, SUITE, folder), folder, box


def test_a_box_is_audited_without_a_gradient(audited, trained, digits):
    found, folder, box = audited
    result = AuditResult.load(folder)
    assert result == found.results
    assert result.subject.black_box
    assert result.jacobian is None
    assert any("attacks that need gradients were left out" in note for note in result.notes)
    checks = {check.name: check.passed for check in result.checks}
    assert checks["no vanishing gradients"] is None
    assert checks["re-scoring reproducible"] is True
    assert result.clean.value > 0.9
    rates = [point.uer.value for point in result.universal]
    assert rates == sorted(rates)
    assert rates[-1] > max(0.5, 1.1 * max(control.worst.value for control in result.universal[-1].controls))
    assert result.per_image[0].attack == "square"
    assert result.per_image[0].accuracy.value < 0.85
    assert result.cost.backwards == 0
    reported = trained_on(trained, digits, result)
    for point, uap in zip(result.universal, found.perturbations, strict=True):
        stored = UniversalPerturbation.load(folder / point.file)
        assert torch.equal(stored.delta, uap.delta)
        assert torch.equal(stored.image_hashes, digits.train.image_hashes.unique())
        assert float(stored.delta.abs().max()) <= point.eps
        assert gb.evaluation.universal_evasion(trained, reported, stored) == point.uer
        best = max(point.restarts, key=lambda one: one.validation_uer)
        assert stored.about.attack in (best.start, point.attack)
        assert {one.start for one in point.restarts} >= {"perlin-noise", "gabor-noise"}
    assert box.asked <= most_images(SUITE, digits, 1) + 40
    assert json.loads(black_box.queries_file(folder).read_text()) == {"images": box.asked}


def trained_on(model, digits, result):
    """The test images that the audit reports on, found by their number and seed."""
    return digits.test.sample(result.material.test, seed=result.seed)


def test_what_is_crafted_on_a_surrogate_is_tried_beside_noise(tmp_path, monkeypatch):
    """A linear model has one direction, up or down its weights' signs; so has a surrogate of another scale."""
    model, w = binary((1, 4, 6))
    data = linear_data(model, (1, 4, 6))
    source = LinearNet(3 * model.weight.detach())
    monkeypatch.setattr(surrogate, "obtain", lambda *_: (source, Surrogate(name="linear")))
    suite = SUITE.model_copy(update={"eps": (0.02,), "patterns": 5, "eps_uni_runs": 0})
    result = gb.audit(FunctionModel(model), data, suite, tmp_path).results
    (point,) = result.universal
    assert point.attack == "stochastic-pgd on surrogate (LinearNet)"
    stored = UniversalPerturbation.load(tmp_path / point.file)
    assert torch.allclose(stored.delta.abs(), torch.tensor(0.02))
    assert abs(float((stored.delta[0].sign() * w.sign()).mean())) > 0.8
    assert stored.about.model.split("+")[0] == gb.models.fingerprint(source)
    assert torch.equal(stored.image_hashes, data.train.image_hashes.unique())
    assert point.uer.value > max(control.worst.value for control in point.controls)
    assert [part.attack for part in result.transfer] == ["stochastic-pgd", "fgsm", "mi-di-fgsm"]
    assert result.transfer[0].error == point.uer
    assert result.transfer[1].error.value > point.uer.value  # one an image, up or down
    tried = dict(result.eps_uni.tried)
    assert set(tried) == {0.02}  # read off the curve
    assert result.eps_uni.censored == (tried[0.02] < 0.5)


@pytest.mark.parametrize("votes", [1, 21])
def test_a_smaller_budget_makes_a_smaller_audit(digits, votes):
    asked = gb.auditing.SUITES["standard"].on(digits)
    before = fit_queries(asked, digits, None, votes)
    assert omitted(asked, before.suite) == []
    assert before.suite.test_images is None
    assert before.notes == []
    for room in (5_000_000, 500_000, 200_000, 100_000, 50_000, 20_000, 10_000):
        room *= votes
        plan = fit_queries(asked.model_copy(update={"budget": room}), digits, room, votes)
        assert plan.images == most_images(plan.suite, digits, votes) <= 0.9 * room
        assert plan.images <= before.images
        assert plan.images > 0.85 * room or not plan.notes  # what is left goes to the universal search
        assert (plan.images < most_images(asked, digits, votes)) == bool(plan.notes)
        before = plan
    left_out = ["4 of the 5 eps", "the search of eps_uni", "Square", "edits"]
    assert [name for name in omitted(asked, plan.suite) if name != "Square"] == [
        one for one in left_out if one != "Square"
    ]
    assert ("Square was left out" if plan.suite.queries == 0 else f"{plan.suite.queries} queries") in plan.notes[0]
    assert "eps_uni was read off the curve" in plan.notes[0]
    with pytest.raises(
        UserError, match=r"room for 500 images is too small: the smallest audit of \d eps asks about \d"
    ):
        fit_queries(asked, digits, 500, votes)


def test_many_test_images_are_not_all_asked_about():
    images = torch.rand(TEST_IMAGES + 60, 1, 4, 4)
    data = gb.data.as_dataset((images, torch.arange(len(images)) % 2))
    whole = gb.data.Split("many", images, torch.arange(len(images)) % 2, data.classes)
    many = gb.data.Dataset("many", data.train, data.validation, whole, data.classes)
    plan = fit_queries(SUITE.model_copy(update={"test_images": None}), many, None, 1)
    assert plan.suite.test_images == TEST_IMAGES
    assert f"{TEST_IMAGES} were asked about" in plan.notes[0]


class Counted(FunctionModel):
    """Counts for itself, and may be charged more than it is asked, as by requests that are lost."""

    def __init__(self, model, waste=0, stop=None):
        super().__init__(model)
        self.waste, self.stop, self.seen = waste, stop, 0

    def _ask(self, images):
        self.seen += len(images)
        if self.stop is not None and self.seen > self.stop:
            raise KeyboardInterrupt
        self._claim(self.waste * len(images))
        self.seen += self.waste * len(images)
        return super()._ask(images)


@pytest.mark.parametrize(("budget", "waste"), [(30_000, 0), (12_000, 0), (8_000, 1)])
def test_a_budget_is_never_exceeded(trained, digits, tmp_path, budget, waste):
    box = Counted(trained, waste)
    suite = SUITE.model_copy(update={"budget": budget})
    result = gb.audit(box, digits, suite, tmp_path).results
    assert box.seen == box.asked <= budget
    assert json.loads(black_box.queries_file(tmp_path).read_text())["images"] == box.asked
    smaller = any(f"The budget of {budget} images made the audit smaller" in note for note in result.notes)
    assert smaller == (most_images(SUITE, digits, 1) > 0.9 * budget - 40)
    left_out = [note for note in result.notes if "was left out: " in note]
    assert bool(left_out) == bool(waste)
    first = result.verdict.summary.split(". ")[0]
    assert first.startswith(f"The budget of {budget} images left out ") == bool(left_out or budget < 30_000)
    assert all(note.split(" was left out")[0] in first for note in left_out)
    assert all(f"may be asked about {budget} images" in note for note in left_out)
    assert len(result.universal) == len(result.settings["eps"]) >= 1
    if waste:
        assert {check.detail for check in result.checks if check.passed is None} >= {"the budget was spent"}


def test_a_budget_too_small_for_anything(trained, digits):
    with pytest.raises(UserError, match="the smallest audit of 3 eps asks about"):
        gb.audit(FunctionModel(trained), digits, SUITE.model_copy(update={"budget": 300}))
    with pytest.raises(UserError, match="a budget limits the queries to a black box, and this model is none"):
        gb.audit(trained, digits, SUITE.model_copy(update={"budget": 300}))


def test_a_cut_audit_goes_on_and_counts_what_was_asked_before(audited, trained, digits, tmp_path):
    found, _, whole = audited
    first = Counted(trained, stop=10_000)
    with pytest.raises(KeyboardInterrupt):
        gb.audit(first, digits, SUITE, tmp_path)
    file = black_box.queries_file(tmp_path)
    assert json.loads(file.read_text())["images"] >= first.seen
    second = Counted(trained)
    second.hold(None, file)
    resumed = gb.audit(second, digits, SUITE, tmp_path)
    subject = found.results.subject.model_copy(update={"name": "Counted"})
    assert resumed.results == found.results.model_copy(update={"subject": subject})
    assert second.images < whole.images  # what was done was not asked again
    other = gb.models.create("lenet5", digits)
    with pytest.raises(UserError, match="holds the audit of another model: .* answers otherwise than it did"):
        gb.audit(FunctionModel(other), digits, SUITE, tmp_path)


def test_a_cut_audit_asks_nothing_that_it_cannot_finish_and_goes_on_with_a_larger_budget(trained, digits, tmp_path):
    suite = SUITE.model_copy(update={"eps": (0.2,), "eps_uni_runs": 0, "queries": 0, "budget": 4_000})
    file, asked = black_box.queries_file(tmp_path), 0
    while asked < 3_100:  # a model that dies before any perturbation is there
        with pytest.raises(KeyboardInterrupt):
            gb.audit(Counted(trained, stop=900), digits, suite, tmp_path)
        asked = json.loads(file.read_text())["images"]
    box = Counted(trained)
    with pytest.raises(
        UserError, match=r"no perturbation was crafted: .* may be asked about 4000 images and was about"
    ):
        gb.audit(box, digits, suite, tmp_path)
    assert box.seen < 200  # to know it again, and no more
    raised = suite.model_copy(update={"budget": 20_000})
    result = gb.audit(Counted(trained), digits, raised, tmp_path).results
    assert len(result.universal) == 1
    assert result.settings["budget"] == 20_000
    assert asked < json.loads(file.read_text())["images"] <= 20_000
    with pytest.raises(UserError, match=r"differs in suite.budget"):  # a smaller one
        gb.audit(Counted(trained), digits, suite, tmp_path)


def test_scores_that_are_rounded_are_still_the_same_box(audited, trained, digits, tmp_path):
    suite = SUITE.model_copy(update={"eps": (0.2,), "eps_uni_runs": 0, "queries": 0})
    gb.audit(FunctionModel(trained), digits, suite, tmp_path)
    again = gb.audit(FunctionModel(lambda x: trained(x) + 1e-4), digits, suite, tmp_path)
    assert again.results.subject.fingerprint == audited[0].results.subject.fingerprint


def test_a_box_that_names_the_class_only_is_told_so(trained, digits):
    suite = SUITE.model_copy(update={"eps": (0.3,), "eps_uni_runs": 0})
    result = gb.audit(FunctionModel(lambda x: trained(x).argmax(1), classes=10), digits, suite).results
    assert any("Only the top class came back" in note for note in result.notes)
    assert result.universal[0].uer.value > 0.3
    scored = gb.audit(FunctionModel(trained), digits, suite).results
    assert result.universal[0].uer == scored.universal[0].uer  # noise is chosen by classes alone
    assert result.per_image[0].accuracy.value > scored.per_image[0].accuracy.value


def test_a_random_box_has_no_answers_to_be_known_by(trained, digits, tmp_path):
    suite = SUITE.model_copy(update={"eps": (0.3,), "eps_uni_runs": 0, "patterns": 3, "test_images": 60, "queries": 5})
    box = FunctionModel(lambda x: trained(x) + 0.5 * torch.randn(len(x), 10))
    result = gb.audit(box, digits, suite, tmp_path).results
    assert result.subject.random
    assert box.asked <= most_images(suite, digits, 21) + 40
    assert not (tmp_path / "surrogate.safetensors").exists()

"""Edits and classes in an audit: the same numbers as outside, stored and resumed, and what is left out or refused."""

import pytest
import torch

import gambeson as gb
from gambeson import UserError
from gambeson.attacks import ClasswiseStochasticPGD
from gambeson.auditing import SUITES
from gambeson.auditing.results import AuditResult
from gambeson.base import load_tensors
from gambeson.evaluation import BlackBox, FunctionModel, by_class, under_edits

SMALL = SUITES["quick"].model_copy(
    update={
        "eps": (0.1, 0.2),
        "universal_steps": 20,
        "universal_probe_starts": 0,
        "test_images": 120,
        "sample": 20,
        "jacobian_backwards": 0,
        "universal_queries": 300,
        "surrogate": "none",
        "eps_uni_runs": 0,
        "eps_adv": False,
        "queries": 0,
        "noise_sizes": (),
        "pgd_steps": 2,
    }
)


@pytest.fixture(scope="module")
def audited(trained, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit")
    suite = SMALL.model_copy(update={"edits": ("jpeg:50", "colour:0.1", "shift:1"), "class_wise": True})
    return gb.audit(trained, digits, suite, folder), folder


def test_an_audit_measures_edits_and_classes_as_they_are_outside(audited, trained, digits):
    found, folder = audited
    result, uap = found.results, found.perturbations[1]
    test = digits.test.sample(120, seed=0)
    known = under_edits(trained, test, uap, ["jpeg:50", "shift:1"])
    assert result.edits.rates == known.rates
    assert result.edits.rates[0].uer == result.middle.uer
    assert "one channel" in result.edits.left_out["colour:0.1"]
    assert result.edits.cost.forwards == 120 * 3 * 5
    view, outside = result.classes, by_class(trained, test, uap)
    assert [(one.name, one.clean, one.uer) for one in view.classes] == [
        (one.name, one.clean, one.uer) for one in outside.classes
    ]
    attack = ClasswiseStochasticPGD(eps=0.2, steps=20, restarts=1, truncate_margin=0.4)
    tensors, _ = load_tensors(folder / view.file, "class-wise perturbations")
    assert tensors["classes"].tolist() == list(range(10))
    assert float(tensors["deltas"].abs().max()) <= 0.2
    for k, one in enumerate(view.classes):
        own = test.labels == k
        images = test.take(own.nonzero().flatten())[0]
        with torch.no_grad():
            wrong = trained((images + tensors["deltas"][k]).clamp(0, 1)).argmax(1) != k
        assert one.own.value == pytest.approx(float(wrong.float().mean()))
        assert one.own.candidates == 10
    assert view.cost.backwards == 20 * attack.batch_size
    assert result.cost.backwards >= view.cost.backwards + sum(point.cost.backwards for point in result.universal)
    said = f"By class, the UER runs from {view.best.uer} ({view.best.name}) to {view.worst.uer} ({view.worst.name})"
    assert said in found.verdict.summary
    rows = found.to_frame()
    assert len(rows[rows.what == "UER, edited"]) == 3
    assert len(rows[rows.what == "UER of class"]) == len(rows[rows.what == "class-wise UER of class"]) == 10
    assert AuditResult.load(folder) == result


def test_an_audit_resumes_after_both_stages(audited, trained, digits):
    found, folder = audited
    suite = SMALL.model_copy(update={"edits": ("jpeg:50", "colour:0.1", "shift:1"), "class_wise": True})
    calls = []
    handle = trained.register_forward_hook(lambda *_: calls.append(1))
    try:
        again = gb.audit(trained, digits, suite, folder)
    finally:
        handle.remove()
    assert again.results == found.results
    fewer = len(calls)
    calls.clear()
    (folder / found.results.classes.file).unlink()
    handle = trained.register_forward_hook(lambda *_: calls.append(1))
    try:
        assert gb.audit(trained, digits, suite, folder).results == found.results
    finally:
        handle.remove()
    assert len(calls) > fewer  # a file that is gone is made again


def test_a_black_box_has_edits_and_no_class_wise_perturbations(trained, digits):
    suite = SMALL.model_copy(update={"eps": (0.2,), "patterns": 4, "pattern_images": 20, "edits": ("jpeg:50",)})
    box = FunctionModel(trained)
    assert isinstance(box, BlackBox)
    found = gb.audit(box, digits, suite).results
    assert [one.edit for one in found.edits.rates] == ["none", "jpeg:50"]
    assert found.classes.worst.uer.value > 0
    with pytest.raises(UserError, match="class-wise perturbations need gradients"):
        gb.audit(box, digits, suite.model_copy(update={"class_wise": True}))


def test_label_maps_have_edits_that_move_nothing_and_no_classes():
    images = torch.rand(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    data = gb.data.as_dataset((images, (images[:, 0] > 0.5).long()))
    net = torch.nn.Conv2d(3, 2, 1)
    suite = SMALL.model_copy(update={"eps": (0.1,), "targeted": False, "universal_steps": 3})
    found = gb.audit(net, data, suite).results
    assert [one.edit for one in found.edits.rates] == ["none", "jpeg:75", "resize:0.5"]
    assert list(found.edits.left_out) == ["shift:1"]
    assert found.classes is None
    with pytest.raises(UserError, match="a class-wise attack expects one label per image"):
        gb.audit(net, data, suite.model_copy(update={"class_wise": True}))


def test_two_classes_have_an_area_in_the_verdict():
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(300, 1, 6, 6, generator=draw)
    labels = (images.mean((1, 2, 3)) + 0.02 * torch.randn(300, generator=draw) > 0.5).long()
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 2))
    with torch.no_grad():
        net[1].weight.copy_(torch.stack([-torch.ones(36), torch.ones(36)]))
        net[1].bias.copy_(torch.tensor([18.0, -18.0]))
    found = gb.audit(net, (images, labels), SMALL.model_copy(update={"eps": (0.03,), "edits": ()}))
    area = found.results.classes.auc
    assert 0.8 < area.clean.value < 0.99
    assert f"the AUC is {area.perturbed} under the pattern, {area.clean} when clean" in found.verdict.summary
    assert found.results.edits is None


def test_unknown_edits_are_refused_with_the_suite():
    with pytest.raises(UserError, match="unknown edit 'jpg': did you mean jpeg"):
        gb.auditing.Suite(edits=("jpg:50",))

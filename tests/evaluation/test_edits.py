"""A perturbation under edits: each number from what it is defined as, by hand; controls, black boxes, label maps."""

import json

import pytest
import torch
from torch import nn

import gambeson as gb
from gambeson import UserError
from gambeson.attacks import StochasticPGD, control
from gambeson.base import generator
from gambeson.cli.app import run
from gambeson.evaluation import STANDARD_EDITS, under_edits
from gambeson.models.black_box.local import FunctionModel
from gambeson.threat.edits import Edit
from tests.conftest import LinearNet


@pytest.fixture(scope="module")
def uap(trained, digits):
    return StochasticPGD(eps=0.2, steps=60, probe_starts=2, probe_start_steps=20).craft(trained, digits)


def test_rates_are_those_of_edited_images(trained, digits, uap):
    found = under_edits(trained, digits, uap, ["jpeg:20", "shift:1", "none"], seed=4)
    images, labels = digits.test.take(slice(None))
    assert [one.edit for one in found.rates] == ["none", "jpeg:20", "shift:1"]
    signs = control("random-sign", uap.ball, digits.test.shape, draws=10, seed=4)[:3]
    for one in found.rates:

        def wrong(moved, edit=one.edit):
            change = Edit.parse(edit).seeded(1, generator(4, "edit", edit))
            with torch.no_grad():
                return trained(change(moved)).argmax(1) != labels

        clean, under = wrong(images), wrong((images + uap.delta).clamp(0, 1))
        assert one.clean.value == pytest.approx(float(clean.float().mean()))
        assert one.uer.value == pytest.approx(float(under.float().mean()))
        assert one.harm.value == pytest.approx(one.uer.value - one.clean.value)
        assert one.harm.low < one.harm.value < one.harm.high
        drawn = [float(wrong((images + sign).clamp(0, 1)).float().mean()) for sign in signs]
        assert one.controls[0].mean == pytest.approx(sum(drawn) / 3)
        assert one.control.value == pytest.approx(max(drawn))
        assert one.control.candidates == 3
        assert one.uer.n == len(digits.test)
    none, jpeg, shift = found.rates
    assert none.uer == gb.evaluation.universal_evasion(trained, digits, uap)
    assert none.harm.low > 0.2
    assert jpeg.harm.low > 0.2
    assert shift.clean.value > 2 * none.clean.value  # the edit, and not the perturbation, does this
    assert shift.harm.value < 0.7 * none.harm.value


def test_the_standard_list_leaves_out_what_does_not_fit(trained, digits, uap):
    found = under_edits(trained, digits.test.sample(60), uap)
    assert [one.edit for one in found.rates] == ["none", *(e for e in STANDARD_EDITS if e != "colour:0.1")]
    assert list(found.left_out) == ["colour:0.1"]
    assert "one channel" in found.left_out["colour:0.1"]
    assert "jpeg:75" in repr(found)
    assert "control" in repr(found)
    assert "<table>" in found._repr_html_()
    assert len(found.to_frame()) == 3 * len(found.rates)
    figure = found.plot()
    assert [trace.name for trace in figure.data] == ["perturbed", "clean", "strongest control"]
    assert list(figure.data[0].y) == [100 * one.uer.value for one in found.rates]
    assert under_edits(trained, digits.test.sample(60), uap, [], controls=()).rates[0].control is None


def test_a_perturbation_of_one_frequency_does_not_survive_blur():
    """A chessboard decides the class; a blur of two pixels leaves nothing of it."""
    chess = torch.tensor([[(row + column) % 2 * 2.0 - 1 for column in range(12)] for row in range(12)])
    ramp = torch.linspace(-0.8, 0.8, 12).expand(12, 12)
    model = LinearNet(torch.stack([torch.zeros(12, 12), chess + ramp])[:, None])
    draw = generator(0, "x")
    images = 0.5 + 0.1 * torch.randn(400, 1, 1, 1, generator=draw) * ramp
    images += 0.02 * torch.randn(images.shape, generator=draw)
    labels = (model(images)[:, 1] > 0).long()
    data = gb.data.as_dataset((images, labels))
    uap = StochasticPGD(eps=0.2, steps=20, probe_starts=0, truncate=None).craft(model, data)
    found = {one.edit: one for one in under_edits(model, data, uap, ["bits:8", "blur:2", "jpeg:90"]).rates}
    for edit in ("none", "bits:8", "jpeg:90"):
        assert found[edit].harm.value > 0.3
    assert found["blur:2"].harm.value < 0.1


def test_a_black_box_is_scored_too(trained, digits, uap):
    few, box = digits.test.sample(50), FunctionModel(trained)
    found = under_edits(box, few, uap, ["jpeg:30", "shift:1"])
    known = under_edits(trained, few, uap, ["jpeg:30", "shift:1"])
    assert found.rates == known.rates


def test_label_maps(uap):
    draw = generator(0, "maps")
    images = torch.rand(12, 3, 16, 16, generator=draw)
    data = gb.data.as_dataset((images, (images[:, 0] > 0.5).long()))
    net = nn.Conv2d(3, 2, 1)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[-20.0, 0, 0], [20.0, 0, 0]]).view(2, 3, 1, 1))
        net.bias.copy_(torch.tensor([10.0, -10.0]))
    made = StochasticPGD(eps=0.05, steps=10, probe_starts=0).craft(net, data)
    found = under_edits(net, data, made)
    assert set(found.left_out) == {"shift:1", "shift:2"}
    rates = {one.edit: one for one in found.rates}
    assert rates["none"].clean.value == 0
    assert rates["none"].uer.value > 0.03
    assert rates["blur:1"].clean.value > 0.1  # the labels stay where they were, and so does what is in the image
    with pytest.raises(UserError, match="edit shift:2 does not fit .* moves what is in an image"):
        under_edits(net, data, made, ["shift:2"])


def test_bad_edits_are_refused_before_anything_is_scored(trained, digits, uap):
    for edits, message in (
        (["jpeg:101"], "an integer from 1 to 100"),
        (["colour:0.1"], "edit colour:0.1 does not fit digits/test: images of one channel"),
        (["shift:8"], "leaves nothing of images of 8x8"),
        ("jpeg:50", "unknown edit 'j'"),
    ):
        with pytest.raises(UserError, match=message):
            under_edits(trained, digits, uap, edits)
    with pytest.raises(UserError, match="unknown control"):
        under_edits(trained, digits, uap, [], controls=("random",))


def test_uap_score_under_edits(trained, uap, tmp_path, capsys):
    weights, file = tmp_path / "net.safetensors", tmp_path / "uap.safetensors"
    gb.models.save(trained, weights)
    uap.save(file)
    about = ["uap", "score", str(file), str(weights), "--data", "digits"]
    assert run([*about, "--edits", "jpeg:20, resize:0.5+jpeg:50", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["edits"]
    assert [one["edit"] for one in found["rates"]] == ["none", "jpeg:20", "resize:0.5+jpeg:50"]
    assert run([*about, "--edits", "standard"]) == 0
    out = "".join(capsys.readouterr())
    assert "screenshot:75" in out
    assert "colour:0.1 was left out: images of one channel" in out
    assert run([*about, "--edits", "jpeg:0"]) == 2
    assert "an integer from 1 to 100" in capsys.readouterr().err

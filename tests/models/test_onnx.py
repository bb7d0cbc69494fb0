"""ONNX files as other tools write them: channels last, fixed batches, half precision, bytes, several outputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gambeson.base import UserError
from gambeson.models.black_box.local import OnnxModel
from gambeson.models.program import load_onnx
from tests.conftest import full

for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package)

SIZE = (3, 6, 10)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:You are using the legacy:UserWarning")


class Net(nn.Module):
    def __init__(self, read=lambda x: x, give=lambda features, logits: logits):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8 * 15, 5)
        self.read, self.give = read, give

    def forward(self, images):
        features = F.max_pool2d(F.gelu(self.norm(self.conv(self.read(images)))), 2).flatten(1)
        return self.give(features, self.out(features))


FORMS = {  # the net's reading, the input to trace with, the batch in the file, the net's outputs
    "plain": (lambda x: x, lambda x: x, None, lambda f, y: y),
    "one image": (lambda x: x, lambda x: x, 1, lambda f, y: y),
    "three images": (lambda x: x, lambda x: x, 3, lambda f, y: y),
    "channels last": (
        lambda x: x.permute(0, 3, 1, 2),
        lambda x: x.permute(0, 2, 3, 1).contiguous(),
        None,
        lambda f, y: y,
    ),
    "half": (lambda x: x.float(), lambda x: x.half(), None, lambda f, y: y),
    "double": (lambda x: x.float(), lambda x: x.double(), None, lambda f, y: y),
    "bytes": (lambda x: x.float() / 255, lambda x: (x * 255).round().to(torch.uint8), None, lambda f, y: y),
    "bytes, channels last, one image": (
        lambda x: x.permute(0, 3, 1, 2).float() / 255,
        lambda x: (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous(),
        1,
        lambda f, y: y,
    ),
    "features first": (lambda x: x, lambda x: x, None, lambda f, y: (f, y)),
    "probabilities": (lambda x: x, lambda x: x, None, lambda f, y: y.softmax(1)),
}


@pytest.fixture
def images():
    return torch.randint(0, 256, (7, *SIZE), generator=torch.Generator().manual_seed(1)) / 255


def written(path, form, images):
    read, given, batch, give = FORMS[form]
    axes = {} if batch else {"dynamic_axes": {"x": {0: "n"}}}
    torch.onnx.export(
        Net(read, give).eval(), (given(images[: batch or 2]),), str(path), dynamo=False, input_names=["x"], **axes
    )
    return path


@pytest.mark.parametrize("form", FORMS)
def test_a_file_of_any_form_gives_the_scores_of_its_net(tmp_path, form, images):
    box = OnnxModel(written(tmp_path / "m.onnx", form, images), classes=5)
    with torch.no_grad():
        right = Net().eval()(images)
        found = box(images)
    assert found.shape == (7, 5)
    atol = 5e-3 if form == "half" else 1e-5
    torch.testing.assert_close(found.log_softmax(1), right.log_softmax(1), atol=atol, rtol=atol)
    assert box.images == 7  # the images that fill up a batch are no queries


@pytest.mark.parametrize("form", [form for form in FORMS if "bytes" not in form])
def test_a_file_of_any_form_has_the_gradients_of_its_net(tmp_path, form, images):
    pytest.importorskip("onnx2torch")
    model = load_onnx(written(tmp_path / "m.onnx", form, images), 3, 5, SIZE[1:], "cpu")
    labels = torch.arange(7) % 5
    slopes = []
    for net in (model, Net().eval()):
        pixels = images.clone().requires_grad_()
        slopes.append(torch.autograd.grad(F.cross_entropy(net(pixels), labels), pixels)[0])
    atol = 1e-3 if form == "half" else 1e-6
    torch.testing.assert_close(slopes[0], slopes[1], atol=atol, rtol=1e-3)


@pytest.mark.parametrize("batch", [None, full(2)])
def test_a_file_of_todays_exporter_has_gradients(tmp_path, batch, images):
    pytest.importorskip("onnx2torch")
    shapes = ({0: torch.export.Dim("n")},) if batch is None else None
    net = Net().eval()
    program = torch.export.export(net, (images[:2],), dynamic_shapes=shapes)
    torch.onnx.export(program, (), str(tmp_path / "m.onnx"), dynamo=True, external_data=False, verbose=False)
    model = load_onnx(tmp_path / "m.onnx", 3, 5, SIZE[1:], "cpu")
    with torch.no_grad():
        torch.testing.assert_close(model(images), net(images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", ["plain", "channels last", "three images", full("half")])
def test_normalised_pixels_reach_the_graph_and_the_black_box_alike(tmp_path, form, images):
    pytest.importorskip("onnx2torch")
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    path = written(tmp_path / "n.onnx", form, images)
    right = Net().eval()((images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None])
    near = {"atol": 5e-2, "rtol": 1e-2} if form == "half" else {"atol": 1e-4, "rtol": 1e-4}
    for model in (
        load_onnx(path, 3, 5, SIZE[1:], "cpu", (mean, std)),
        OnnxModel(path, classes=5, normalise=(mean, std)),
    ):
        torch.testing.assert_close(model(images).detach(), right.detach(), **near)
    assert not torch.allclose(load_onnx(path, 3, 5, SIZE[1:], "cpu")(images), right, atol=0.1)


def test_weights_that_are_written_as_constants_are_found(tmp_path, images):
    pytest.importorskip("onnx2torch")
    import onnx

    path = written(tmp_path / "c.onnx", "plain", images)
    file = onnx.load(str(path))
    weights = list(file.graph.initializer)
    nodes = [onnx.helper.make_node("Constant", [], [one.name], value=one) for one in weights]
    others = list(file.graph.node)
    del file.graph.initializer[:], file.graph.node[:]
    file.graph.node.extend([*nodes, *others])
    onnx.save(file, str(path))
    torch.testing.assert_close(load_onnx(path, 3, 5, SIZE[1:], "cpu")(images), Net().eval()(images))


@pytest.mark.parametrize("maps", [True, False])
def test_one_probability_is_that_of_the_second_of_two_classes(tmp_path, images, maps):
    pytest.importorskip("onnx2torch")
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(3, 1, 3, padding=1), *([] if maps else [nn.Flatten(), nn.Linear(60, 1)]), nn.Sigmoid()
    )
    path = tmp_path / "s.onnx"
    torch.onnx.export(net, (images,), str(path), dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "n"}})
    second = net(images).detach()
    for model in (load_onnx(path, 3, 2, SIZE[1:], "cpu"), OnnxModel(path, classes=2)):
        found = model(images).detach()
        torch.testing.assert_close(found.softmax(1), torch.cat([1 - second, second], 1))
    with pytest.raises(UserError, match="K of at least 2"):
        OnnxModel(path, classes=3)(images)


def test_what_has_no_gradient_is_one_sentence(tmp_path, images, monkeypatch):
    pytest.importorskip("onnx2torch")
    path = written(tmp_path / "m.onnx", "bytes", images)
    with pytest.raises(UserError, match="the input of .* is uint8, which has no gradient"):
        load_onnx(path, 3, 5, SIZE[1:], "cpu")
    net = Net(lambda x: x.round()).eval()
    torch.onnx.export(net, (images[:2],), str(path), dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "n"}})
    with pytest.raises(UserError, match="have no gradient|cannot convert"):
        load_onnx(path, 3, 5, SIZE[1:], "cpu")


def test_a_conversion_that_is_wrong_is_not_used(tmp_path, images, monkeypatch):
    onnx2torch = pytest.importorskip("onnx2torch")
    path, convert = written(tmp_path / "m.onnx", "plain", images), onnx2torch.convert

    def wrong(graph):
        module = convert(graph)
        with torch.no_grad():
            next(module.parameters()).mul_(1.1)
        return module

    monkeypatch.setattr(onnx2torch, "convert", wrong)
    with pytest.raises(UserError, match=r"converts .* to another model \(its scores differ by"):
        load_onnx(path, 3, 5, SIZE[1:], "cpu")


def test_images_that_do_not_fit_are_told(tmp_path, images):
    box = OnnxModel(written(tmp_path / "m.onnx", "channels last", images))
    with pytest.raises(UserError, match=r"takes images of 6x10x3, got 3x10x6: choose data"):
        box(torch.rand(2, 3, 10, 6))

"""Exported models give the answers of their originals, without this library."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from gambeson import models
from gambeson.base import UserError
from gambeson.models.export import TARGETS, export
from gambeson.models.noise import FeatureNoise
from gambeson.models.noisy_weights import FixedNoise, ParametricNoise

SHAPE = {"in_channels": 1, "classes": 5, "image_size": 12, "mean": 0.3, "std": 0.4}

ALONE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "gambeson":
            raise ImportError("gambeson is not to be imported")
sys.meta_path.insert(0, Refuse())
import torch
torch.set_num_threads(1)
from safetensors.torch import load_file, save_file
pixels = load_file(sys.argv[2])["pixels"]
net = torch.export.load(sys.argv[1]).module()
torch.manual_seed(0)
save_file({"first": net(pixels), "second": net(pixels)}, sys.argv[3])
assert "gambeson" not in sys.modules
"""


def _model(**keywords):
    torch.manual_seed(0)
    return models.create("lenet5", **SHAPE, **keywords).eval()


def _alone(path, pixels, folder):
    """What the program answers, twice, in a process that cannot import gambeson."""
    from safetensors.torch import save_file

    save_file({"pixels": pixels}, folder / "pixels.safetensors")
    files = [str(path), str(folder / "pixels.safetensors"), str(folder / "answers.safetensors")]
    subprocess.run([sys.executable, "-c", ALONE, *files], check=True, cwd=folder)
    return load_file(folder / "answers.safetensors")


def test_an_ensemble_runs_without_this_library(tmp_path):
    model = _model(members=3)
    export(model, tmp_path / "m.pt2", "torch-export")
    pixels = torch.rand(7, 1, 12, 12)
    answers = _alone(tmp_path / "m.pt2", pixels, tmp_path)
    with torch.no_grad():
        assert torch.allclose(answers["first"], model(pixels), atol=1e-6)
    assert torch.equal(answers["first"], answers["second"])
    with zipfile.ZipFile(tmp_path / "m.pt2") as archive:  # no pickle inside
        for name in archive.namelist():
            assert not (archive.read(name) and name.endswith((".pt", ".pkl"))), name


@pytest.mark.parametrize("noise", [FeatureNoise(init=0.5), ParametricNoise(), FixedNoise(first=0.3, rest=0.3)])
def test_noise_is_drawn_anew_in_every_call_and_has_its_size(tmp_path, noise):
    model = _model(noise=noise)
    export(model, tmp_path / "m.pt2", "torch-export")
    net = torch.export.load(tmp_path / "m.pt2").module()
    pixels = torch.rand(2, 1, 12, 12).repeat_interleave(2, 0)
    with torch.no_grad():
        own = torch.stack([model(pixels) for _ in range(200)])
        other = torch.stack([net(pixels) for _ in range(200)])
    assert other.std(0).min() > 0
    assert (other.std(0) / own.std(0) - 1).abs().max() < 0.35
    error = (own.var(0) / 200 + other.var(0) / 200).sqrt()
    assert ((own.mean(0) - other.mean(0)).abs() / error).max() < 5
    if not isinstance(noise, ParametricNoise):  # equal images, draws of their own
        assert not torch.equal(other[:, 0], other[:, 1])


def test_the_model_comes_back_as_it_was(tmp_path):
    model = _model().train()
    model.body.eval()
    first = next(model.parameters()).requires_grad_(False)
    before = models.fingerprint(model)
    export(model, tmp_path / "m.pt2", "torch-export")
    assert model.training
    assert not model.body.training
    assert not first.requires_grad
    assert models.fingerprint(model) == before


def test_bare_weights_have_the_architectures_own_names(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = models.create(
        "torchvision:squeezenet1_1", in_channels=3, classes=4, image_size=32, mean=0.5, std=0.25
    ).eval()
    export(model, tmp_path / "m.safetensors", "safetensors")
    plain = torchvision.models.squeezenet1_1(num_classes=4).eval()
    plain.load_state_dict(load_file(tmp_path / "m.safetensors"))
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        card = json.loads(file.metadata()["gambeson"])["exported"]
    pixels = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(card[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        assert torch.allclose(plain((pixels - mean) / std), model(pixels), atol=1e-5)


@pytest.mark.parametrize("keywords", [{}, {"members": 2, "noise": FeatureNoise(sharing="batch")}])
def test_onnx(tmp_path, keywords):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    runtime = pytest.importorskip("onnxruntime")
    model = _model(**keywords)
    export(model, tmp_path / "m.onnx", "onnx")
    session = runtime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    assert (taken.name, given.name) == ("pixels", "logits")
    for count in (1, 6):
        pixels = torch.rand(count, 1, 12, 12)
        first, second = (torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0]) for _ in range(2))
        with torch.no_grad():
            assert torch.allclose(first, model(pixels), atol=1.0 if keywords else 1e-5)
        assert torch.equal(first, second) == (not keywords)


def test_what_cannot_be_exported(tmp_path):
    class Asks(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :3] if float(x.sum()) > 0 else x.flatten(1)[:, 1:4]

    example = torch.rand(1, 1, 4, 4)
    with pytest.raises(UserError, match="Asks cannot be exported .*depends on pixel values") as told:
        export(Asks(), tmp_path / "m.pt2", "torch-export", example=example)
    assert "\n" not in str(told.value)
    with pytest.raises(UserError, match="to export a Linear an example image is needed"):
        export(nn.Linear(2, 2), tmp_path / "m.pt2", "torch-export")
    with pytest.raises(UserError, match="a Linear has no card"):
        export(nn.Linear(2, 2), tmp_path / "m.safetensors", "safetensors")
    with pytest.raises(UserError, match=f"choose one of {', '.join(TARGETS)}"):
        export(_model(), tmp_path / "m", "tflite")
    assert not list(tmp_path.iterdir())


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setitem(sys.modules, "onnx", sys)
    with pytest.raises(UserError, match=r"needs onnxscript.*pip install 'gambeson\[onnx\]'"):
        export(_model(), tmp_path / "m.onnx", "onnx")

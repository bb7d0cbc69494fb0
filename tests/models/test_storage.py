"""Models on disk: bit-equal round trips, and one sentence for every file that does not fit."""

from __future__ import annotations

import pickle

import pytest
import torch
from safetensors.torch import save_file

from gambeson import models
from gambeson.base import UserError, load_tensors, save_tensors


def _model(name="resnet20x0.5", **keywords):
    torch.manual_seed(0)
    shape = {"in_channels": 3, "classes": 5, "image_size": 12, "mean": (0.1, 0.2, 0.3), "std": 0.7}
    model = models.create(name, **(shape | keywords))
    model(torch.rand(4, 3, 12, 12))  # moves the running statistics away from where they start
    return model.eval()


@pytest.mark.parametrize("name", ["lenet", "mnist-d", "resnet20x0.5"])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_round_trip_is_bit_equal(tmp_path, name, kind):
    model = _model(name).to(kind)
    models.save(model, tmp_path / "m.safetensors", {"epochs": 3})
    again = models.load(tmp_path / "m.safetensors")
    pixels = torch.rand(2, 3, 12, 12, dtype=kind)
    assert again.card == model.card
    assert not again.training
    assert torch.equal(again(pixels), model(pixels))
    assert models.fingerprint(again) == models.fingerprint(model)

    with torch.no_grad():
        next(again.body.parameters()).view(-1)[0] += 0.5
    assert not torch.equal(again(pixels), model(pixels))


def test_torchvision_round_trip(tmp_path):
    torch.manual_seed(0)
    model = models.create("torchvision:squeezenet1_1", in_channels=1, classes=5, image_size=32).eval()
    models.save(model, tmp_path / "m.safetensors")
    pixels = torch.rand(2, 1, 32, 32)
    assert torch.equal(models.load(tmp_path / "m.safetensors")(pixels), model(pixels))


def test_a_run_folder_and_what_was_said_about_it(tmp_path):
    model = _model()
    models.save(model, tmp_path / "model.safetensors", {"epochs": 3})
    assert models.fingerprint(models.load(tmp_path)) == models.fingerprint(model)
    document = load_tensors(tmp_path / "model.safetensors")[1]
    assert document["about"] == {"epochs": 3}
    assert models.ModelCard(**document["card"]) == model.card


def test_loading_leaves_the_generator_alone(tmp_path):
    models.save(_model(), tmp_path / "model.safetensors")
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    models.load(tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_wrapped_models_are_saved_unwrapped(tmp_path):
    model = _model("lenet")
    models.save(torch.nn.DataParallel(model), tmp_path / "model.safetensors")
    assert models.fingerprint(models.load(tmp_path)) == models.fingerprint(model)
    with pytest.raises(UserError, match="a Linear has no card"):
        models.save(torch.nn.Linear(2, 2), tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_load_weights_fills_an_existing_model(tmp_path, prefix):
    model, other = _model(), models.create("resnet20x0.5", in_channels=3, classes=5, image_size=12)
    path = tmp_path / "w.safetensors"
    save_file({prefix + key: value for key, value in model.state_dict().items()}, path)
    assert models.fingerprint(other) != models.fingerprint(model)
    models.load_weights(other, path)
    assert models.fingerprint(other) == models.fingerprint(model)


def test_weights_that_do_not_fit(tmp_path):
    model = _model("lenet")
    path = tmp_path / "model.safetensors"
    models.save(model, path)
    wider = models.create("lenet", in_channels=3, classes=9, image_size=12)
    before = models.fingerprint(wider)
    with pytest.raises(
        UserError, match=r"do not fit this lenet: of another shape body.fc2.weight \(5, 500\) instead of"
    ):
        models.load_weights(wider, path)
    with pytest.raises(UserError, match=r"missing body.bn1.weight.* and 1.. more; unexpected body.conv1.bias, "):
        models.load_weights(models.create("resnet20", in_channels=3, classes=5, image_size=12), path)
    assert models.fingerprint(wider) == before
    save_file(model.body.state_dict(), path)
    with pytest.raises(UserError, match=r"load them into model\.body"):
        models.load_weights(wider, path)


def test_weights_that_do_not_fit_their_card(tmp_path):
    model = _model("lenet")
    path = tmp_path / "model.safetensors"
    card = model.card.plain() | {"classes": 9}
    save_tensors(path, model.state_dict(), {"card": card})
    with pytest.raises(UserError, match=r"do not fit its own card.*body.fc2.weight"):
        models.load(path)
    save_tensors(path, model.state_dict(), {"card": card | {"name": "lennet"}})
    with pytest.raises(UserError, match="unknown model 'lennet'"):
        models.load(path)
    save_tensors(path, model.state_dict(), {"card": card | {"colour": "red"}})
    with pytest.raises(UserError, match=r"model card of .* cannot be read.*colour"):
        models.load(path)


def test_files_that_are_no_models(tmp_path):
    model = _model("lenet")
    path = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match="does not exist"):
        models.load(tmp_path)
    save_file(model.state_dict(), path)
    with pytest.raises(UserError, match=r"no model card: .*models.load_weights"):
        models.load(path)
    models.save(model, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated"):
        models.load(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UserError, match="pickle"):
        models.load(path)
    torch.save(model.state_dict(), path)
    with pytest.raises(UserError, match="pickle"):
        models.load_weights(model, path)


def test_fingerprint_changes_with_one_value_one_buffer_one_name():
    model = _model()
    first = models.fingerprint(model)
    assert len(first) == 16
    assert models.fingerprint(model.train()) == first
    with torch.no_grad():
        model.body.fc.bias[0] = torch.nextafter(model.body.fc.bias[0], torch.tensor(9.0))
    second = models.fingerprint(model)
    model.body.bn1.running_mean[0] += 1
    assert len({first, second, models.fingerprint(model)}) == 3

    one, two = torch.nn.Module(), torch.nn.Module()
    one.a = two.b = torch.nn.Parameter(torch.ones(2, 3))
    reshaped = torch.nn.Module()
    reshaped.a = torch.nn.Parameter(torch.ones(3, 2))
    assert len({models.fingerprint(module) for module in (one, two, reshaped)}) == 3


def test_count_parameters_leaves_buffers_out():
    assert models.count_parameters(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))) == 12

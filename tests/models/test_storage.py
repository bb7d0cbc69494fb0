"""Models on disk: bit-equal round trips, and one sentence for every file that does not fit."""

from __future__ import annotations

import argparse
import os
import pickle
import subprocess
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gambeson import models
from gambeson.base import UserError, load_tensors, save_tensors
from gambeson.models import storage


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
    with pytest.raises(UserError, match=r"missing body.bn1.weight.* and 9. more; unexpected body.conv1.bias, "):
        models.load_weights(models.create("resnet20", in_channels=3, classes=5, image_size=12), path)
    assert models.fingerprint(wider) == before


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
    with pytest.raises(UserError, match="cannot be read as weights: it is a pickle but of no state dict: save"):
        models.load(path)
    torch.save(model.state_dict(), path)
    with pytest.raises(UserError, match=r"no model card: name its architecture too, as in .*FUNCTION@"):
        models.load(path)


class Settings:
    """An object of a user's own, as checkpoints hold beside their weights."""

    def __init__(self):
        self.lr = 0.1


class Bomb:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def _net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 4))


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("key", ["", "state_dict", "model", "net", "ema", "outer.weights"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "net.", "model.module._orig_mod.", "a.b."])
def test_a_checkpoint_is_read_wherever_its_weights_are(tmp_path, key, prefix, old):
    source, target = _net(), _net()
    nn.init.normal_(source[0].weight)
    content = {prefix + name: value for name, value in source.state_dict().items()}
    for part in reversed(key.split(".") if key else []):
        content = {part: content, "epoch": 3, "name": "x"}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not old)
    assert not torch.equal(target[0].weight, source[0].weight)
    models.load_weights(target, tmp_path / "w.pth")
    assert models.fingerprint(target) == models.fingerprint(source)


def test_what_stands_beside_the_weights_is_left_out_with_a_warning(tmp_path):
    source, target = _net(), _net()
    nn.init.normal_(source[0].weight)
    state = {f"module.{name}": value for name, value in source.state_dict().items()}
    torch.save({"ema": state | {"n_averaged": torch.tensor(3)}}, tmp_path / "swa.pt")
    with pytest.warns(UserWarning, match="left out, as the model has no such part: n_averaged"):
        models.load_weights(target, tmp_path / "swa.pt")
    assert models.fingerprint(target) == models.fingerprint(source)
    torch.save(state | {"module.5.weight": torch.zeros(1)}, tmp_path / "more.pt")
    with pytest.raises(UserError, match=r"\(under module\) do not fit this Sequential: unexpected module.5.weight"):
        models.load_weights(target, tmp_path / "more.pt")
    del state["module.3.bias"], state["module.1.num_batches_tracked"]
    torch.save(state, tmp_path / "less.pt")
    with pytest.raises(UserError, match=r"\(under module\) do not fit this Sequential: missing 3.bias; create"):
        models.load_weights(target, tmp_path / "less.pt")


def test_a_layer_of_another_net_is_not_taken_for_a_whole_one(tmp_path):
    torch.save({"features.weight": torch.ones(2, 3), "fc.weight": torch.zeros(4, 2)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"do not fit this Linear: .*beside it fc.weight|missing bias"):
        models.load_weights(nn.Linear(3, 2), tmp_path / "w.pth")
    with pytest.raises(UserError, match="do not fit this Linear"):
        models.load_weights(nn.Linear(3, 2, bias=False), tmp_path / "w.pth")


def test_weights_and_their_average_are_not_chosen_among_in_silence(tmp_path):
    one, two, target = _net(), _net(), _net()
    nn.init.normal_(two[0].weight)
    path = tmp_path / "w.pth"
    torch.save({"model": one.state_dict(), "ema": two.state_dict(), "optimizer": {"state": {0: torch.ones(3)}}}, path)
    with pytest.raises(UserError, match=r"under model and other ones under ema: choose by .*--key ema"):
        models.load_weights(target, path)
    models.load_weights(target, path, "ema")
    assert models.fingerprint(target) == models.fingerprint(two)
    with pytest.raises(UserError, match=r"holds several state dicts, model \(9 tensors\), ema \(9 tensors\): choose"):
        storage.convert(path, tmp_path / "w.safetensors")
    storage.convert(path, tmp_path / "w.safetensors", "ema")
    again = _net()
    models.load_weights(again, tmp_path / "w.safetensors")
    assert models.fingerprint(again) == models.fingerprint(two)
    torch.save({"model": one.state_dict(), "ema": one.state_dict()}, path)
    models.load_weights(target, path)  # the same twice is no choice
    assert models.fingerprint(target) == models.fingerprint(one)


def test_objects_beside_the_weights_do_not_matter_and_are_never_made(tmp_path):
    source, mark = _net(), tmp_path / "mark"
    about = {
        "args": argparse.Namespace(lr=1),
        "best": np.float64(0.5),
        "own": Settings(),
        "log": defaultdict(list, a=[1]),
    }
    torch.save({"state_dict": source.state_dict(), **about}, tmp_path / "w.pth")
    target = _net()
    nn.init.zeros_(target[0].weight)
    models.load_weights(target, tmp_path / "w.pth")
    assert models.fingerprint(target) == models.fingerprint(source)
    said = storage.convert(tmp_path / "w.pth", tmp_path / "w.safetensors")
    assert "objects that were not created: argparse.Namespace, " in said[-1]
    for function, *arguments in ((exec, f"open({str(mark)!r}, 'w')"), (subprocess.check_call, ["touch", str(mark)])):
        torch.save({"state_dict": source.state_dict(), "x": Bomb(function, *arguments)}, tmp_path / "bomb.pth")
        models.load_weights(target, tmp_path / "bomb.pth")
        torch.save(Bomb(function, *arguments), tmp_path / "bomb.pth")
        with pytest.raises(UserError, match="holds no state dict but other objects of"):
            models.load_weights(target, tmp_path / "bomb.pth")
    torch.save({"state_dict": source.state_dict(), "x": Bomb(os.system, f"touch {mark}")}, tmp_path / "bomb.pth")
    with pytest.raises(UserError, match="cannot be read as weights: it runs posix.system, which is never done"):
        models.load_weights(target, tmp_path / "bomb.pth")
    assert not mark.exists()
    torch.save(Bomb(subprocess.check_call, ["false"]), tmp_path / "bomb.pth")
    with pytest.raises(subprocess.CalledProcessError):  # a real one
        torch.load(tmp_path / "bomb.pth", weights_only=False)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_files_that_hold_code_are_one_sentence(tmp_path):
    def follow(told):
        """Run the line that a refusal proposes, and load what it leaves."""
        line, _, name = str(told.value).partition(", as in ")[2].partition(", and name ARCHITECTURE@")
        exec(line, {"torch": torch})
        model = _net()
        models.load_weights(model, Path(name))
        assert all(torch.equal(value, net.state_dict()[key]) for key, value in model.state_dict().items())

    net = _net()
    torch.save(net, tmp_path / "whole.pth")
    with pytest.raises(
        UserError, match=r"no state dict but other objects of torch.nn.modules.*save the state_dict"
    ) as e:
        models.load_weights(_net(), tmp_path / "whole.pth")
    follow(e)
    torch.jit.script(net).save(tmp_path / "script.pt")
    with pytest.raises(UserError, match="it is a TorchScript archive, which holds code") as e:
        models.load_weights(_net(), tmp_path / "script.pt")
    follow(e)
    program = torch.export.export(nn.Linear(2, 2).eval(), (torch.zeros(1, 2),))
    torch.export.save(program, tmp_path / "whole.pt2")
    with pytest.raises(UserError, match="it is a torch.export program: name it as a model as it is"):
        models.load_weights(_net(), tmp_path / "whole.pt2")
    (tmp_path / "net.onnx").write_bytes(b"\x08\x08\x12\x07pytorch" + bytes(100))
    with pytest.raises(UserError, match="is an ONNX graph, with its weights: name it as a model"):
        load_tensors(tmp_path / "net.onnx", "weights")
    torch.save(_net().state_dict(), tmp_path / "cut.pth")
    with pytest.raises(UserError, match="no state dict under 'nothere', as it is one itself: leave the key out"):
        models.load_weights(_net(), tmp_path / "cut.pth", key="nothere")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:-200])
    with pytest.raises(UserError, match="truncated or damaged"):
        models.load_weights(_net(), tmp_path / "cut.pth")


def test_a_file_with_another_normalisation_is_not_taken_without_it(tmp_path):
    model = _model("lenet")
    state = {f"module.model.{name}": value for name, value in model.body.state_dict().items()}
    state |= {"module.normalizer.new_mean": torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)}
    state |= {"module.normalizer.new_std": torch.full((3, 1, 1), 0.7)}
    torch.save({"model": state}, tmp_path / "m.pt")
    other = models.create("lenet", in_channels=3, classes=5, image_size=12)
    with pytest.raises(UserError, match=r"normalizer.new_mean = 0.1, 0.2, 0.3, and this model with 0, 0, 0: give that"):
        models.load_weights(other, tmp_path / "m.pt")
    same = models.create("lenet", in_channels=3, classes=5, image_size=12, mean=(0.1, 0.2, 0.3), std=0.7)
    with pytest.warns(UserWarning, match="new_mean"):
        models.load_weights(same, tmp_path / "m.pt")
    assert models.fingerprint(same) == models.fingerprint(model)


def test_quantised_weights_are_not_read_as_numbers(tmp_path):
    torch.save({"weight": torch.ones(2, 3, dtype=torch.int8)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="of another type weight torch.int8 instead of torch.float32"):
        models.load_weights(nn.Linear(3, 2, bias=False), tmp_path / "w.pth")


def test_converting_names_what_it_did(tmp_path):
    source = _net()
    torch.save({"net": {f"module.{k}": v for k, v in source.state_dict().items()}, "epoch": 1}, tmp_path / "w.ckpt")
    said = storage.convert(tmp_path / "w.ckpt", tmp_path / "w.safetensors")
    assert said == [f"{tmp_path}/w.safetensors: 9 tensors of 'net', without 'module.'"]
    assert set(load_tensors(tmp_path / "w.safetensors")[0]) == set(source.state_dict())
    with pytest.raises(UserError, match="exists: choose another --to"):
        storage.convert(tmp_path / "w.ckpt", tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="does not end in .safetensors"):
        storage.convert(tmp_path / "w.ckpt", tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"no state dict under 'ema': it has net \("):
        storage.convert(tmp_path / "w.ckpt", tmp_path / "new.safetensors", "ema")


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

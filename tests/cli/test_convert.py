"""Other people's checkpoints on the command line: named with an architecture, and converted."""

from __future__ import annotations

import re

import pytest
import torch

import gambeson as gb
from gambeson import training
from gambeson.base import UserError, read_json
from gambeson.cli.app import run
from gambeson.models import PixelModel, normalisation
from gambeson.models.export import export
from gambeson.models.loading import load_model
from gambeson.models.normalisation import IMAGENET

NET = """
from torch import nn

def bare():
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
"""


@pytest.fixture(scope="module")
def net(digits, tmp_path_factory):
    """A plain net trained without this library, its file, and its weights."""
    folder = tmp_path_factory.mktemp("net")
    (folder / "nets.py").write_text(NET)
    scope = {}
    exec(NET, scope)
    torch.manual_seed(0)
    model = scope["bare"]()
    x, y = digits.train.take(slice(None))
    step = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        step.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        step.step()
    return folder, model.eval()


@pytest.mark.parametrize("ending", ["pth", "pt", "ckpt", "bin", "th", "pth.tar", "safetensors"])
def test_an_architecture_with_a_file_of_every_ending(net, digits, ending, tmp_path):
    folder, model = net
    file = tmp_path / f"at@work.{ending}"  # an @ of its own
    if ending == "safetensors":
        from safetensors.torch import save_file

        save_file(model.state_dict(), file)
    else:
        torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, file)
    loaded = load_model(f"{folder}/nets.py:bare@{file}", "digits", "cpu", digits)
    x, _ = digits.test.take(slice(0, 50))
    with torch.no_grad():
        assert torch.equal(loaded.model(x), model(x))


def test_an_audit_of_a_nested_checkpoint_measures_that_net(net, digits, tmp_path, capsys):
    folder, model = net
    torch.save({"model": {f"_orig_mod.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "w.pth")
    source = f"{folder}/nets.py:bare@{tmp_path}/w.pth"
    done = run(
        ["attack", "--model", source, "--data", "digits", "--attack", "fgsm", "--eps", "0.1", "--out", f"{tmp_path}/o"]
    )
    assert done == 0, capsys.readouterr().err
    assert read_json(tmp_path / "o" / "result.json")["result"]["clean"]["value"] == pytest.approx(
        gb.evaluation.accuracy(model, digits.test).value
    )


def test_converting_a_checkpoint_and_using_it(net, digits, tmp_path, capsys):
    folder, model = net
    torch.save(
        {"model": model.state_dict(), "ema": {k: v * 0 for k, v in model.state_dict().items()}}, tmp_path / "w.pth"
    )
    new = tmp_path / "w.safetensors"
    assert run(["convert", f"{tmp_path}/w.pth", "--to", str(new)]) == 2
    assert (
        "holds several state dicts, model (4 tensors), ema (4 tensors): choose one with --key"
        in capsys.readouterr().err
    )
    assert run(["convert", f"{tmp_path}/w.pth", "--to", str(new), "--key", "model"]) == 0
    assert "4 tensors of 'model'" in capsys.readouterr().out
    loaded = load_model(f"{folder}/nets.py:bare@{new}", "digits", "cpu", digits)
    x, _ = digits.test.take(slice(0, 50))
    with torch.no_grad():
        assert torch.equal(loaded.model(x), model(x))
    torch.save(model, tmp_path / "whole.pth")
    assert run(["convert", f"{tmp_path}/whole.pth", "--to", f"{tmp_path}/x.safetensors"]) == 2
    assert "save the state_dict() of what it holds by torch.save" in capsys.readouterr().err


def test_weights_that_say_nothing_of_normalisation_are_taken_aloud(digits, tmp_path):
    model = gb.models.create("lenet5", digits).eval()
    torch.save(model.body.state_dict(), tmp_path / "w.pth")
    with pytest.warns(
        UserWarning, match=r"does not say how its pixels were normalised; right of 64 .*\. data is used \(mean 0.3"
    ):
        loaded = load_model(f"lenet5@{tmp_path}/w.pth", "digits", "cpu", digits)
    x, _ = digits.test.take(slice(0, 5))
    with torch.no_grad():
        assert torch.equal(loaded.model(x), model(x))
    other = gb.models.create("lenet5", digits, mean=0.1, std=2.0).eval()
    gb.models.save(other, tmp_path / "own.safetensors")
    loaded = load_model(f"lenet5@{tmp_path}/own.safetensors", "digits", "cpu", digits)  # its file does
    with torch.no_grad():
        assert torch.equal(loaded.model(x), other(x))
    assert loaded.model.card.mean == pytest.approx((0.1,))


def colours():
    """Pictures in colour whose statistics are far from ImageNet's."""
    draw = torch.Generator().manual_seed(0)
    images, labels = 0.1 * torch.rand(60, 3, 32, 32, generator=draw), torch.arange(60) % 2
    return gb.data.as_dataset((images, labels))


@pytest.mark.parametrize("trained", ["imagenet", "data"])
def test_a_torchvision_checkpoint_gets_the_statistics_that_it_was_trained_with(trained, tmp_path):
    data, name = colours(), "torchvision:squeezenet1_1"
    scale = dict(zip(("mean", "std"), IMAGENET, strict=True)) if trained == "imagenet" else {}
    model = gb.models.create(name, data, seed=1, **scale).eval()
    torch.save(model.body.state_dict(), tmp_path / "w.pth")
    source, (x, _) = f"{name}@{tmp_path}/w.pth", data.test.take(slice(0, 2))
    with pytest.warns(UserWarning, match=r"imagenet is used \(mean 0.485/0.456/0.406, std 0.229/"):
        default = load_model(source, dataset=data).model
    asked = load_model(f"{source}?normalise={trained}", dataset=data).model  # no warning: they are errors here
    with torch.no_grad():
        right = model(x)
        assert torch.equal(asked(x), right)
        assert torch.equal(default(x), right) == (trained == "imagenet")


def test_weights_for_an_architecture_of_another_library_are_compared_too(tmp_path):
    pytest.importorskip("timm")
    data, name = colours(), "timm:test_resnet"
    torch.save(gb.models.create(name, data, seed=1).body.state_dict(), tmp_path / "w.pth")
    with pytest.warns(
        UserWarning, match=r"of 9 validation images with 0.5,0.5 .*, data .*\. 0.5,0.5 is used \(mean 0.5/0.5"
    ):
        load_model(f"{name}@{tmp_path}/w.pth", dataset=data)
    load_model(f"{name}@{tmp_path}/w.pth?normalise=imagenet", dataset=data)  # no warning: they are errors here


class Mapped(torch.nn.Module):
    """A network that wants pixels from -1 to 1, and errs outside."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        inside = (x.amin((1, 2, 3)) < -0.99) & (x.amax((1, 2, 3)) < 1.01)
        logits = self.inner((x + 1) / 2)
        return torch.where(inside[:, None], logits, -logits)


@pytest.mark.parametrize("ending", ["pt2", "onnx"])
def test_a_graph_that_wants_other_pixels_is_refused_until_its_name_says_so(digits, trained, tmp_path, ending):
    if ending == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime", "onnx2torch"):
            pytest.importorskip(package)
    file, example = tmp_path / f"w.{ending}", torch.zeros(1, *digits.test.shape)
    export(Mapped(trained), file, "torch-export" if ending == "pt2" else "onnx", example=example)
    with pytest.raises(
        UserError, match=r"is taken with \?normalise=none; right of 64 .* with none \d %, data \d %, 0.5,0.5 9\d %: end"
    ):
        load_model(str(file), dataset=digits)
    x, _ = digits.test.take(slice(0, 5))
    with torch.no_grad():
        found = load_model(f"{file}?normalise=0.5,0.5", dataset=digits).model(x)
        torch.testing.assert_close(found, trained(x), atol=1e-4, rtol=1e-4)


def test_training_from_a_checkpoint_begins_with_its_normalisation(digits, tmp_path):
    def begun(model, data, **settings):
        run = training.TrainRun(data=data.name, model=model, defense=gb.defenses.Standard(), recipe=recipe, **settings)
        return training.run._built(run, data)[0]

    recipe, data = training.Recipe(epochs=1, batch_size=32), colours()
    net = gb.models.create("lenet5", digits, mean=0.25, std=0.5)
    torch.save(net.body.state_dict(), file := tmp_path / "w.pth")
    with pytest.warns(UserWarning, match=r"does not say .* of 64 .*\. data is used \(mean 0.3"):
        begun("lenet5", digits, init=str(file))
    asked = begun("lenet5", digits, init=f"{file}?normalise=0.25,0.5")  # no warning
    assert (asked.card.mean, asked.card.std) == ((0.25,), (0.5,))
    gb.models.save(net, own := tmp_path / "own.safetensors")
    assert begun("lenet5", digits, init=str(own)).card.mean == (0.25,)
    with pytest.raises(UserError, match="says itself how its pixels were normalised"):
        begun("lenet5", digits, init=f"{own}?normalise=none")
    net = gb.models.create(name := "torchvision:squeezenet1_1", data)
    torch.save(net.body.state_dict(), file)
    with pytest.warns(UserWarning, match=r"imagenet is used \(mean 0.485/0.456/0.406, std 0.229/"):
        assert begun(name, data, init=str(file)).card.mean == pytest.approx(IMAGENET[0])


def test_weights_that_are_clearly_better_normalised_otherwise_are_not_taken_as_usual(digits, trained, tmp_path):
    model = PixelModel(trained.card, Mapped(trained))
    with pytest.raises(
        UserError, match=r"w.pth does not say .* with data \d %, none \d %, 0.5,0.5 9\d %: end its name in"
    ) as no:
        normalisation.compare(model, digits, "w.pth", guessed=True)
    assert "?normalise=0.5,0.5, or in ?normalise=data if that is right after all" in str(no.value)
    with pytest.warns(
        UserWarning,
        match=r"right of 64 validation images with data 9\d %, none \d+ %, 0.5,0.5 \d+ %\. data is used ",
    ):
        normalisation.compare(trained, digits, "w.pth", guessed=True)


def test_ways_that_the_images_do_not_tell_apart_are_named(digits, trained):
    class Alike(torch.nn.Module):
        """Takes pixels as they are or from -1 to 1."""

        def forward(self, x):
            return trained((x + 1) / 2 if x.amin() < -0.99 else x)

    model = PixelModel(trained.card.model_copy(update={"mean": (0.0,), "std": (1.0,)}), Alike()).eval()
    with pytest.warns(UserWarning, match=r"though these images do not tell it from data or 0.5,0.5: if "):
        normalisation.compare(model, digits, "w.pth", guessed=True)


def test_a_normalisation_is_read_or_refused(digits, tmp_path):
    model = gb.models.create("lenet5", digits, mean=0.25, std=0.5).eval()
    torch.save(model.body.state_dict(), tmp_path / "w.pth")
    source, (x, _) = f"lenet5@{tmp_path}/w.pth", digits.test.take(slice(0, 5))
    with torch.no_grad():
        assert torch.equal(load_model(f"{source}?normalise=0.25,0.5", dataset=digits).model(x), model(x))
        assert not torch.equal(load_model(f"{source}?normalise=none", dataset=digits).model(x), model(x))
    for wrong in ("imagenet", "0.1", "0.1,0", "a,b", "0.1/0.2,1", "nan,1", ""):
        with pytest.raises(UserError, match=r"expected imagenet \(3 channels\), data, none, or MEAN,STD for 1"):
            load_model(f"{source}?normalise={wrong}", dataset=digits)
    gb.models.save(model, tmp_path / "own.safetensors")
    with pytest.raises(UserError, match="says itself how its pixels were normalised"):
        load_model(f"lenet5@{tmp_path}/own.safetensors?normalise=none", dataset=digits)
    with pytest.raises(UserError, match="normalises its pixels itself: leave"):
        load_model(f"{tmp_path}/own.safetensors?normalise=none", dataset=digits)


@pytest.fixture
def server(net):
    from tests.models.test_black_box import Server

    made = Server(net[1])
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_a_universal_attack_with_gradients_sends_a_server_nothing(server, tmp_path, capsys):
    base = [server.url, "--data", "digits", "--eps", "0.2", "--out", f"{tmp_path}/u.safetensors"]
    assert run(["uap", "craft", *base, "--attack", "sga"]) == 2
    assert "sga needs gradients, and http" in capsys.readouterr().err
    assert (
        run(["attack", server.url, "--data", "digits", "--eps", "0.2", "--attack", "pgd", "--out", f"{tmp_path}/a"])
        == 2
    )
    assert "pgd needs gradients, and http" in capsys.readouterr().err
    assert server.seen == 0
    done = run(
        [
            "uap",
            "craft",
            *base,
            "--attack",
            "perlin",
            "--set",
            "patterns=4",
            "--set",
            "images=20",
            "--budget",
            "5",
        ]
    )
    assert done == 2
    said = capsys.readouterr().err
    assert re.search(r"perlin asks about \d+ images, and the budget is 5: give fewer patterns", said), said
    assert sum(count for count, _ in server.sizes) == 2  # the trial of the model


def test_a_server_is_asked_as_the_options_say(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TOKEN", "abc")
    command = ["attack", server.url, "--data", "digits", "--eps", "0.2", "--attack", "square", "--out", f"{tmp_path}/a"]
    command += ["--images", "6", "--set", "queries=5", "--http", "token_env=TOKEN", "--http", "headers.X-Key=${TOKEN}"]
    assert run([*command, "--budget", "60"]) == 2
    assert (
        "square may ask 5 queries for each of 6 images, 92 with their scoring, and the budget is 60: "
        "attack 1 of them at most, or allow a larger --budget" in capsys.readouterr().err
    )
    assert sum(count for count, _ in server.sizes) == 2  # the trial of the model
    assert run([*command, "--budget", "92", "--http", "workers=1", "--http", "batch=3"]) == 0, capsys.readouterr().err
    sent = [{key.lower(): value for key, value in one.items()} for one in server.headers]
    assert all(one["authorization"] == "Bearer abc" and one["x-key"] == "abc" for one in sent)
    assert max(count for count, _ in server.sizes[1:]) == 3
    stored = (tmp_path / "a" / "run.yaml").read_text()
    assert "token_env: TOKEN" in stored
    assert "abc" not in stored
    assert run([*command, "--budget", "92", "--http", "timeout=5"]) == 0  # the same run: it is loaded
    assert run(["attack", server.url, "--data", "digits", "--eps", "0.2", "--http", "headers.X-Api-Key=abc"]) == 2
    assert "X-Api-Key would be stored with the run" in capsys.readouterr().err
    assert (
        run(["attack", "lenet5", "--data", "digits", "--eps", "0.2", "--http", "timeout=5", "--out", f"{tmp_path}/b"])
        == 2
    )
    assert "lenet5 is no server: leave the settings of HTTP out" in capsys.readouterr().err

"""Models from elsewhere: a user's file, timm, transformers, a program; each told in one sentence where it fails."""

from __future__ import annotations

import json
import re
import sys
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gambeson import models
from gambeson.base import UserError, load_tensors
from gambeson.models import external, hubs, program

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, padding=1)
        self.fc = nn.Linear(4, classes)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))

def net(in_channels, classes=10, *, width=3):
    return Net(in_channels, classes)

def fixed():
    return Net(1, 7)

def keyed(classes, in_channels):
    class Keyed(Net):
        def forward(self, x):
            return {"logits": super().forward(x), "aux": 0}
    return Keyed(in_channels, classes)

def no_module():
    return 3

def needy(depth, colour="red"):
    return None

def crooked():
    raise ValueError("no such\\nthing")

def late():
    class Late(Net):
        def forward(self, x):
            return self.missing(x)
    return Late(1, 10)

def stops():
    import sys
    sys.exit(3)
"""
SHAPE = {"in_channels": 1, "classes": 10, "image_size": 8}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my nets.py"
    path.write_text(NET)
    return path


def test_a_function_of_a_file_gives_a_model_that_sees_pixels(file):
    torch.manual_seed(0)
    model = models.create(f"{file}:net", **SHAPE).eval()
    pixels = torch.rand(3, 1, 8, 8)
    assert model(pixels).shape == (3, 10)
    assert torch.equal(model(pixels), model.body(pixels))  # no normalisation but the identity
    assert model.card.name == f"{file}:net"
    assert sys.path.count(str(file.parent)) == 0


def test_it_is_saved_and_loaded_by_running_the_function_again(file, tmp_path, monkeypatch):
    monkeypatch.chdir(file.parent)
    model = models.create("my nets.py:net", **SHAPE)
    monkeypatch.chdir("/")
    models.save(model, tmp_path / "m.safetensors")
    again = models.load(tmp_path / "m.safetensors")
    assert models.fingerprint(again) == models.fingerprint(model)
    assert type(again.body).__name__ == "Net"
    file.unlink()
    with pytest.raises(UserError, match=r"my nets.py does not exist: .* names the function net"):
        models.load(tmp_path / "m.safetensors")


def test_members_of_a_users_network_vote(file):
    model = models.create(f"{file}:net", **SHAPE, members=3)
    first, second, _ = (voter.body.fc.weight for voter in model.voters)
    assert not torch.equal(first, second)


def test_a_mapping_with_logits_is_read(file):
    model = models.create(f"{file}:keyed", **SHAPE).eval()
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_neighbours_can_be_imported(file):
    (file.parent / "neighbour_of_nets.py").write_text("CLASSES = 10\n")
    file.write_text("from neighbour_of_nets import CLASSES\n" + NET)
    try:
        assert models.create(f"{file}:net", **SHAPE).card.classes == 10
    finally:
        sys.modules.pop("neighbour_of_nets", None)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("nett", r"has no function 'nett': it defines Net, net, fixed, keyed"),
        ("no_module", r"no_module of .* returned a int: expected a torch.nn.Module"),
        ("needy", r"^needy of .* needs depth, which is not known here: give defaults"),
        (
            "crooked",
            r"calling crooked failed in line {raise ValueError} of .*my nets.py \(ValueError: no such thing\): fix it",
        ),
        ("late", r"through the model of .*:late failed in line {return self.missing} of .* has no attribute 'missing'"),
        ("stops", r"calling stops failed in line {sys.exit} of .*\(SystemExit: 3\)"),
        ("fixed", r"returned shape \(2, 7\) for images of shape \(2, 1, 8, 8\): the data have 10 classes"),
    ],
)
def test_what_is_wrong_with_a_users_file_is_one_sentence(file, function, words):
    lines = NET.split("\n")
    words = re.sub(
        r"\{(.+)\}", lambda found: str(1 + next(k for k, line in enumerate(lines) if found[1] in line)), words
    )
    with pytest.raises(UserError, match=words) as told:
        models.create(f"{file}:{function}", **SHAPE)
    assert "\n" not in str(told.value)
    assert told.value.__cause__ is None


def test_a_file_that_cannot_be_run(file, tmp_path):
    file.write_text("import torch\nx = (1,\n")
    with pytest.raises(UserError, match=r"in line 2 of .* \(SyntaxError: '\(' was never closed"):
        models.create(f"{file}:net", **SHAPE)
    file.write_text("import torch\n\nimport no_such_package_here\n")
    with pytest.raises(UserError, match=r"in line 3 of .*ModuleNotFoundError: No module named"):
        models.create(f"{file}:net", **SHAPE)
    with pytest.raises(UserError, match=r"names a file but no function of it: write .*nets.py:FUNCTION"):
        models.create(str(file), **SHAPE)
    with pytest.raises(UserError, match=r"none.py does not exist"):
        models.create(f"{tmp_path}/none.py:net", **SHAPE)
    with pytest.raises(UserError, match=r"needs in_channels and classes and image_size"):
        models.create(f"{file}:net")


def test_init_takes_weights_of_the_whole_and_of_the_body(file, tmp_path):
    source, other, third = (models.create(f"{file}:net", **SHAPE) for _ in range(3))
    models.save(source, tmp_path / "whole.safetensors")
    save_file({f"module.{key}": value for key, value in source.state_dict().items()}, tmp_path / "wrapped.safetensors")
    save_file(source.body.state_dict(), tmp_path / "body.safetensors")
    for name in ("whole", "wrapped", "body"):
        target = models.create(f"{file}:net", **SHAPE)
        assert models.fingerprint(target) != models.fingerprint(source)
        models.load_weights(target, tmp_path / f"{name}.safetensors")
        assert models.fingerprint(target) == models.fingerprint(source)
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="do not fit this .*missing"):
        models.load_weights(other, tmp_path / "other.safetensors")
    wider = models.create(f"{file}:net", **SHAPE | {"classes": 9})
    with pytest.raises(UserError, match="of another shape fc.weight"):
        models.load_weights(wider, tmp_path / "body.safetensors")
    assert models.fingerprint(other) != models.fingerprint(third)


def test_names_of_this_library_are_left_alone():
    for name in ("lenet", "resnet20x0.5", "torchvision:resnet18"):
        assert not external.is_external(name)
        assert external.canonical(name) == name


@pytest.mark.parametrize("name", ["timm:resnet18", "transformers:some/model"])
def test_a_missing_extra_is_named_with_its_pip_line(name, monkeypatch):
    package = name.partition(":")[0]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs {package}.*pip install 'gambeson\[{package}\]'"):
        models.create(name, **SHAPE)


def test_timm_architectures_bring_their_normalisation():
    timm = pytest.importorskip("timm")
    model = models.create("timm:resnet10t", in_channels=3, classes=5, image_size=32)
    config = timm.get_pretrained_cfg("resnet10t")
    assert model.card.mean == tuple(config.mean)
    assert model.card.std == tuple(config.std)
    model.eval()
    pixels = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (config.mean, config.std))
    assert torch.equal(model(pixels), model.body((pixels - mean) / std))
    assert model(pixels).shape == (2, 5)
    grey = models.create("timm:resnet10t", in_channels=1, classes=5, image_size=32)
    assert grey.card.mean == (0.0,)  # a configuration for three channels says nothing about one
    with pytest.raises(UserError, match="unknown timm model 'resnett18'"):
        models.create("timm:resnett18", in_channels=3, classes=5, image_size=32)
    with pytest.raises(UserError, match="unknown weights of timm:resnet18 'nothing'"):
        models.create("timm:resnet18@nothing", in_channels=3, classes=5, image_size=32)
    assert hubs.defaults("timm:resnet18@DEFAULT")["classes"] == 1000


def test_timm_round_trip(tmp_path):
    pytest.importorskip("timm")
    model = models.create("timm:resnet10t", in_channels=1, classes=3, image_size=32).eval()
    models.save(model, tmp_path / "m.safetensors")
    pixels = torch.rand(2, 1, 32, 32)
    assert torch.equal(models.load(tmp_path / "m.safetensors")(pixels), model(pixels))


@pytest.fixture
def vit(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_channels=3, num_labels=4, **sizes)
    folder = tmp_path / "vit"
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(folder)
    prepared = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "size": {"height": 8, "width": 8}}
    prepared |= {
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.5, 0.6, 0.7],
        "image_processor_type": "ViTImageProcessor",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(prepared))
    return folder, model


def test_transformers_models_give_the_logits_of_their_own_library(vit, tmp_path):
    folder, own = vit
    model = models.create(f"transformers:{folder}").eval()
    assert model.card.classes == 4
    assert model.card.image_size == (8, 8)
    pixels = torch.rand(3, 3, 8, 8)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1), torch.tensor([0.5, 0.6, 0.7]).view(1, 3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels), own((pixels - mean) / std).logits)
        models.save(model, tmp_path / "m.safetensors")
        assert torch.equal(models.load(tmp_path / "m.safetensors")(pixels), model(pixels))
        head = models.create(f"transformers:{folder}", in_channels=3, classes=6, image_size=8)
        assert head.eval()(pixels).shape == (3, 6)
        save_file(own.state_dict(), tmp_path / "own.safetensors")
        target = models.create(f"transformers:{folder}")
        for parameter in target.body.parameters():
            parameter.zero_()
        models.load_weights(target, tmp_path / "own.safetensors")
        assert models.fingerprint(target) == models.fingerprint(model)


def test_transformers_folders_that_do_not_fit(vit, tmp_path):
    folder, _ = vit
    with pytest.raises(UserError, match="takes 3 channels, not 1"):
        models.create(f"transformers:{folder}", **SHAPE)
    with pytest.raises(UserError, match=r"cannot take images of shape \(2, 3, 12, 12\)"):
        models.create(f"transformers:{folder}", in_channels=3, classes=4, image_size=12)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="so its normalisation is not known"):
        models.create(f"transformers:{folder}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="could not be read"):
        models.create(f"transformers:{tmp_path / 'empty'}")


@pytest.mark.parametrize(
    ("settings", "pixel", "seen"),
    [
        ({"image_mean": [0.5], "image_std": [0.25]}, 0.75, 1.0),
        ({"rescale_factor": 1 / 127.5, "rescale_offset": True, "do_normalize": False}, 0.75, 0.5),
        ({"do_rescale": False, "image_mean": [127.5], "image_std": [127.5]}, 1.0, 1.0),
        ({"do_normalize": False, "image_mean": [0.5], "image_std": [0.25]}, 0.75, 0.75),
        ({}, 0.75, 0.75),
    ],
)
def test_every_way_of_scaling_pixels(settings, pixel, seen):
    found = hubs._normalisation(settings)
    assert (pixel - found["mean"]) / found["std"] == pytest.approx(seen)


def _program(path, module, batch=None):
    shapes = ({0: torch.export.Dim("n")},) if batch is None else None
    torch.export.save(
        torch.export.export(module.eval(), (torch.rand(batch or 2, 1, 6, 6),), dynamic_shapes=shapes), path
    )
    return module


def _net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4))


@pytest.mark.parametrize("batch", [None, 4])
def test_a_program_gives_the_answers_and_gradients_of_its_model(tmp_path, batch):
    own = _program(tmp_path / "m.pt2", _net(), batch)
    model = program.load_program(tmp_path / "m.pt2", 1, 4, (6, 6), "cpu")
    for count in (1, 4, 7):
        pixels = torch.rand(count, 1, 6, 6, requires_grad=True)
        assert torch.allclose(model(pixels), own(pixels), atol=1e-6)
        mine, theirs = (torch.autograd.grad(net(pixels)[:, 0].sum(), pixels)[0] for net in (model, own))
        assert torch.allclose(mine, theirs, atol=1e-6)
    assert model.train().eval() is model
    assert not list(tmp_path.glob("*.pkl"))


def test_programs_that_do_not_fit(tmp_path):
    path = tmp_path / "m.pt2"
    _program(path, _net())
    with pytest.raises(UserError, match="takes images of 1x6x6, but the data have 1x8x8"):
        program.load_program(path, 1, 4, (8, 8), "cpu")
    with pytest.raises(UserError, match=r"returned shape \(2, 4\) for images .* have 9 classes, so \(2, 9\)"):
        program.load_program(path, 1, 9, (6, 6), "cpu")
    path.write_bytes(b"no zip")
    with pytest.raises(UserError, match="is no program of torch.export"):
        program.load_program(path, 1, 4, (6, 6), "cpu")


def test_no_pickle_of_a_program_is_opened(tmp_path):
    """A pickle that would write a file when it is opened stands where torch looks for the sample inputs."""
    path, mark = tmp_path / "m.pt2", tmp_path / "mark"
    _program(path, _net())
    evil = f"cos\nsystem\n(S'touch {mark}'\ntR.".encode()

    def replaced(part, content, added=None):
        with zipfile.ZipFile(path) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        root = next(iter(entries)).partition("/")[0]
        entries = {name: content if part in name else value for name, value in entries.items()}
        if added:
            entries[f"{root}/{added}"] = content
        target = tmp_path / "evil.pt2"
        with zipfile.ZipFile(target, "w") as archive:
            for name, value in entries.items():
                archive.writestr(name, value)
        return target

    loaded = program.load_program(replaced("sample_inputs", evil), 1, 4, (6, 6), "cpu")
    assert loaded(torch.rand(3, 1, 6, 6)).shape == (3, 4)
    config = json.dumps(
        {"config": {"0.weight": {"path_name": "weight_0", "is_param": True, "use_pickle": True}}}
    ).encode()
    with pytest.raises(UserError, match="holds pickled tensors"):
        program.load_program(replaced("weights_config", config), 1, 4, (6, 6), "cpu")
    for name in ("data/constants/custom_obj_0", "data/constants/opaque_obj_0", "data/aotinductor/model/a.so"):
        with pytest.raises(UserError, match="which can run code"):
            program.load_program(replaced("nothing", evil, name), 1, 4, (6, 6), "cpu")
    with pytest.raises(UserError, match="holds pickled tensors"):
        program.load_program(replaced("nothing", evil, "data/weights/model.pt"), 1, 4, (6, 6), "cpu")
    assert not mark.exists()


def test_the_card_of_a_users_model_tells_its_file(file, tmp_path):
    models.save(models.create(f"{file}:net", **SHAPE), tmp_path / "m.safetensors")
    assert load_tensors(tmp_path / "m.safetensors")[1]["card"]["name"] == f"{file}:net"

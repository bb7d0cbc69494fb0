"""What a user may name as a model, and the one sentence for each name that does not fit."""

from __future__ import annotations

import shutil
import sys
import warnings

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import gambeson as gb
from gambeson.base import UserError
from gambeson.base.errors import DataWarning
from gambeson.models import loading, normalisation
from gambeson.models.export import export
from gambeson.models.loading import input_shape, load_model

NET = """
import gambeson as gb
from safetensors.torch import load_file
from torch import nn

def lenet(in_channels, classes, image_size):
    return gb.models.create("lenet5", in_channels=in_channels, classes=classes, image_size=image_size)

def scores(images):
    return images.flatten(1)[:, :10].tolist()

def three(images):
    return images.flatten(1)[:, :3]

def broken(images):
    return images.nothing
"""


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    """A folder with the trained net in every form."""
    folder = tmp_path_factory.mktemp("models")
    gb.models.save(trained, folder / "own.safetensors")
    save_file(trained.body.state_dict(), folder / "body.safetensors")
    export(trained, folder / "net.pt2", "torch-export")
    (folder / "nets.py").write_text(NET)
    return folder


def accuracy(loaded):
    with torch.no_grad():
        x, y = loaded.dataset.test.take(slice(0, 200))
        return float((loaded.model(x).argmax(1) == y).float().mean())


@pytest.mark.parametrize(
    ("source", "label"),
    [
        ("{}/own.safetensors", "own"),
        ("{}/net.pt2", "net"),
        ("lenet5@{}/own.safetensors", "own"),
        ("{}/nets.py:lenet@{}/own.safetensors", "own"),
    ],
)
def test_the_same_net_by_every_name(folder, digits, trained, source, label):
    # A file's function has no normalisation before it but the net's own: its weights are those of the inner model.
    loaded = load_model(source.replace("{}", str(folder)), "digits", "cpu", digits)
    assert loaded.label == label
    assert not loaded.black_box
    x, _ = digits.test.take(slice(0, 20))
    with torch.no_grad():
        assert torch.allclose(loaded.model(x), trained(x), atol=1e-5)
    assert accuracy(loaded) > 0.85


def test_an_architecture_is_the_same_at_every_call(digits):
    first, second = (load_model("lenet5", "digits", "cpu", digits) for _ in range(2))
    assert gb.models.fingerprint(first.model) == gb.models.fingerprint(second.model)
    assert first.label == "lenet5"
    assert not first.model.training


@pytest.mark.parametrize("name", ["lenet5", "resnet20x0.5", "torchvision:squeezenet1_0"])
def test_an_architecture_without_weights_is_said_to_be_untrained(name, digits, trained, tmp_path):
    data = digits if name == "lenet5" else scaled(digits, 32)
    with pytest.warns(UserWarning, match=f"{name} is untrained: its weights are random"):
        load_model(name, "digits", "cpu", data)
    gb.models.save(trained, tmp_path / "net.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(f"lenet5@{tmp_path}/net.safetensors", "digits", "cpu", digits)


def test_an_architecture_of_ones_own_may_bring_its_weights():
    assert not loading._is_drawn("lenet5xray")
    assert not loading._is_drawn("timm:resnet18.a1_in1k")
    assert loading._is_drawn("timm:resnet18")


def scaled(data, side):
    parts = (
        part.with_images(part.images.repeat_interleave(side // 8, 2).repeat_interleave(side // 8, 3))
        for part in (data.train, data.validation, data.test)
    )
    return gb.data.Dataset(data.name, *parts, data.classes)


def test_classes_in_another_order_are_suspected_where_hardly_an_image_is_right(trained, digits):
    def turned(split):
        images, labels = split.take(slice(None))
        return gb.data.Split(split.name, images, (labels + 1) % 10, split.classes)

    parts = [turned(part) for part in (digits.train, digits.validation, digits.test)]
    other = gb.data.Dataset("turned", *parts, digits.classes)
    with pytest.warns(UserWarning, match="fewer than by chance: is the order of the classes"):
        normalisation.compare(trained, other, "net.pth", guessed=True)
    with pytest.warns(UserWarning, match="net.pth does not say") as told:
        normalisation.compare(trained, digits, "net.pth", guessed=True)
    assert "by chance" not in str(told[0].message)


def test_body_weights_fit_an_architecture(folder, digits):
    assert accuracy(load_model(f"lenet5@{folder}/body.safetensors", "digits", "cpu", digits)) > 0.85


def test_an_onnx_file(folder, trained, digits, monkeypatch):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    export(trained, folder / "net.onnx", "onnx")
    loaded = load_model(f"{folder}/net.onnx", "digits", "cpu", digits, budget=1000)
    assert loaded.black_box
    assert accuracy(loaded) > 0.85
    monkeypatch.setitem(sys.modules, "onnx2torch", None)
    with pytest.warns(
        UserWarning, match=r"taken as a black box, without gradients: .*needs onnx2torch.*gambeson\[onnx"
    ):
        assert load_model(f"{folder}/net.onnx", "digits", "cpu", digits).black_box
    with pytest.raises(UserError, match=r"the gradient of .*net.onnx needs onnx2torch"):
        load_model(f"{folder}/net.onnx", "digits", "cpu", digits, gradients="pgd")


def test_an_onnx_file_has_the_gradients_of_its_model(folder, trained, digits):
    for package in ("onnx", "onnxscript", "onnxruntime", "onnx2torch"):
        pytest.importorskip(package)
    export(trained, folder / "white.onnx", "onnx")
    loaded = load_model(f"{folder}/white.onnx", "digits", "cpu", digits)
    assert not loaded.black_box
    x, y = digits.test.take(slice(0, 30))
    slopes = []
    for model in (loaded.model, trained):
        pixels = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(torch.nn.functional.cross_entropy(model(pixels), y), pixels)
        slopes.append(slope)
    torch.testing.assert_close(slopes[0], slopes[1], atol=1e-5, rtol=1e-3)
    attack = gb.attacks.PGD(eps=0.1, steps=5)
    with torch.no_grad():
        found = [trained(attack(model, x, y, seed=0)).argmax(1) for model in (loaded.model, trained)]
    assert float((found[0] == found[1]).float().mean()) > 0.9


def test_a_function_of_scores_is_a_black_box(folder, digits):
    loaded = load_model(f"function:{folder}/nets.py:scores", "digits", "cpu", digits)
    assert loaded.black_box
    assert loaded.label == "scores"
    assert loaded.model(torch.rand(3, 1, 8, 8)).shape == (3, 10)


def test_a_server(trained, digits):
    from tests.models.test_black_box import Server

    server = Server(trained)
    try:
        loaded = load_model(server.url, "digits", "cpu", digits)
        assert loaded.black_box
        assert loaded.label == server.url.removeprefix("http://")
        assert accuracy(loaded) > 0.85
        with pytest.raises(UserError, match="gives scores of 10 classes, but two has 2"):
            load_model(server.url, "two", "cpu", _two())
    finally:
        server.server.shutdown()
        server.server.server_close()


def _two():
    images, labels = torch.rand(40, 1, 8, 8), torch.arange(40) % 2
    whole = gb.data.as_dataset((images, labels))
    object.__setattr__(whole, "name", "two")
    return whole


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (".", r"\. is a folder without a model: name one that a finished `gambeson train` has written"),
        ("{}/none", "none does not exist: name the folder of a finished `gambeson train`"),
        ("lenett", r"lenett does not exist, and as the name .* unknown model 'lenett': did you mean"),
        ("{}/none.pt2", "none.pt2 does not exist: name a program"),
        ("{}/none.onnx", "onnx"),
        ("lenet5@{}/none.safetensors", "none.safetensors does not exist: expected a file of weights"),
        ("lenet@{}/own.safetensors", "do not fit this lenet"),
        ("{}/nets.py:nothing", "has no function 'nothing'"),
        ("{}/nets.py", "names a file but no function"),
        ("function:{}/nets.py", "write FILE.py:FUNCTION"),
        ("function:{}/nets.py:three", "gives scores of 3 classes, but .* has 10"),
        ("function:{}/nets.py:broken", r"asking .*:broken about 2 images failed in line 16 of .*AttributeError"),
        ("torchvision:resnet1818", "unknown torchvision model"),
        ("http://127.0.0.1:notaport/", "is no address"),
    ],
)
def test_names_that_stand_for_nothing(folder, digits, source, words):
    with pytest.raises(UserError, match=words) as told:
        load_model(source.replace("{}", str(folder)), "digits", "cpu", digits)
    assert "\n" not in str(told.value)


def test_a_model_and_data_that_do_not_fit(folder):
    with pytest.raises(UserError, match=r"knows 10 classes, but two has 1 channels and 2 classes"):
        load_model(f"{folder}/own.safetensors", "two", "cpu", _two())
    with pytest.raises(UserError, match=r"returned shape \(2, 10\) for images .* have 2 classes, so \(2, 2\)"):
        load_model(f"{folder}/net.pt2", "two", "cpu", _two())
    with pytest.raises(UserError, match="does not say what data its model was trained on"):
        load_model(f"{folder}/own.safetensors", None, "cpu")


def _named(digits, *names):
    """Digits whose classes are called by ``names``, the rest by their numbers."""
    classes = (*names, *digits.classes[len(names) :])
    parts = [
        gb.data.Split(part, split.images, split.labels, classes)
        for part, split in (("train", digits.train), ("validation", digits.validation), ("test", digits.test))
    ]
    return gb.data.Dataset("named", *parts, classes)


def test_classes_of_a_training_in_another_order_are_refused_and_other_names_said(tmp_path, digits):
    here = _named(digits, "nought", "one", "two")
    recipe = gb.training.Recipe(epochs=1, batch_size=64)
    gb.train(gb.models.create("lenet", here), here, gb.defenses.Standard(), recipe=recipe, out=tmp_path)
    source = str(tmp_path)
    assert load_model(source, "named", "cpu", here).dataset is here
    for name in (source, f"lenet@{source}/model.safetensors"):
        with pytest.raises(UserError, match="class 1 is 'one' where .* was trained, but 'two' in named: give the"):
            load_model(name, "named", "cpu", _named(digits, "nought", "two", "one"))
    with pytest.warns(
        DataWarning, match="class 0 is 'nought' where .* but 'zero' in named: every rate is wrong unless"
    ):
        load_model(source, "named", "cpu", _named(digits, "zero", "one", "two"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(source, "digits", "cpu", digits)  # which only count


def test_numbers_in_the_order_of_text_are_not_those_in_the_order_of_numbers(tmp_path, digits):
    recipe = gb.training.Recipe(epochs=1, batch_size=64)
    gb.train(gb.models.create("lenet", digits), digits, gb.defenses.Standard(), recipe=recipe, out=tmp_path)
    with pytest.raises(UserError, match="class 0 is '0' where .* was trained, but '1' in named"):
        load_model(str(tmp_path), "named", "cpu", _named(digits, "1", "0"))


def test_trained_weights_of_other_classes_are_not_judged_with_a_new_last_layer(digits):
    pytest.importorskip("timm")
    with pytest.raises(UserError, match="knows 1000 classes, but .* has 10: choose data that fit .* fine-tune"):
        load_model("timm:resnet18@DEFAULT", "digits", "cpu", digits)


def test_a_users_model_is_trained_and_its_folder_loaded_again(tmp_path, digits):
    (tmp_path / "nets.py").write_text(NET)
    run = gb.training.TrainRun(
        data="digits",
        model=f"{tmp_path}/nets.py:lenet",
        defense=gb.defenses.Standard(),
        recipe=gb.training.Recipe(epochs=1, batch_size=64),
    )
    trained = gb.training.run_training(run, tmp_path / "run", digits)
    loaded = load_model(str(tmp_path / "run"), None, "cpu", digits)
    assert gb.models.fingerprint(loaded.model) == gb.models.fingerprint(trained)
    assert loaded.trained["model"] == f"{tmp_path}/nets.py:lenet"
    tuned = run.model_copy(update={"init": str(tmp_path / "run"), "recipe": run.recipe.model_copy(update={"lr": 1e-9})})
    near = gb.training.run_training(tuned, tmp_path / "tuned", digits)
    for mine, theirs in zip(near.parameters(), trained.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4)


def test_a_transformers_model_without_its_head_is_not_judged(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=2, **sizes)
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "preprocessor_config.json").write_text('{"image_mean": [0.5], "image_std": [0.5]}')
    whole = transformers.ViTForImageClassification(config)
    whole.save_pretrained(tmp_path / "vit")
    source = f"transformers:{tmp_path / 'vit'}"
    assert load_model(source, "two", "cpu", _two()).model(torch.rand(3, 1, 8, 8)).shape == (3, 2)
    weights = {key: value for key, value in whole.state_dict().items() if not key.startswith("classifier")}
    save_file(weights, tmp_path / "vit" / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=r"has no weights for classifier.bias, classifier.weight, which would be random"
    ):
        load_model(source, "two", "cpu", _two())
    assert gb.models.create(source, _two()).card.classes == 2  # to be fine-tuned it will do


def test_image_folders_are_read_for_the_model(tmp_path, recwarn):
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(8):
            Image.new("RGB", (40, 30), (number, 9, 200)).save(tmp_path / "set" / name / f"{number}.png")
    gb.models.save(
        gb.models.create("lenet", in_channels=1, classes=2, image_size=(20, 24)), tmp_path / "grey.safetensors"
    )
    assert input_shape(str(tmp_path / "grey.safetensors"), "digits") == (1, 20, 24)
    assert input_shape("lenet", "digits") == (None, None, None)
    assert input_shape("torchvision:resnet18", "digits") == (None, None, None)
    assert input_shape("torchvision:resnet18@IMAGENET1K_V1", "digits") == (3, 224, 224)
    found = load_model(str(tmp_path / "grey.safetensors"), f"image-folder:{tmp_path / 'set'}", "cpu")
    assert found.dataset.test.shape == (1, 20, 24)
    assert any("are read as grey, which the model takes" in str(one.message) for one in recwarn)
    with pytest.raises(UserError, match="takes 1 channels .* has 3 channels"):
        load_model(str(tmp_path / "grey.safetensors"), f"image-folder:{tmp_path / 'set'}?mode=rgb", "cpu")


@pytest.mark.parametrize("ending", ["pt2", "onnx"])
def test_files_of_models_say_what_they_take(folder, trained, tmp_path, ending):
    if ending == "onnx":
        pytest.importorskip("onnxruntime")
        export(trained, tmp_path / "net.onnx", "onnx")
    place = folder if ending == "pt2" else tmp_path
    card = trained.card
    assert input_shape(str(place / f"net.{ending}"), "digits") == (card.in_channels, *card.image_size)


NETS_OF_PICTURES = """
import torch
from torch import nn

def net(channels, classes):
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, classes))

def grey(classes):
    return net(1, classes)

def colour(classes):
    return net(3, classes)

def any_of_them(classes, in_channels=1):
    return net(in_channels, classes)

class Luminance(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net(1, 2)

    def forward(self, x):
        return self.net(x.mean(1, keepdim=True) if x.shape[1] == 3 else x)
"""


def test_a_grey_folder_has_one_channel_for_a_model_of_ones_own_that_takes_one(tmp_path, recwarn):
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(8):
            Image.new("L", (10, 10), number * 9).save(tmp_path / "set" / name / f"{number}.png")
    (tmp_path / "nets.py").write_text(NETS_OF_PICTURES)
    pictures, nets = f"image-folder:{tmp_path / 'set'}", tmp_path / "nets.py"
    for name, channels in (("grey", 1), ("colour", 3), ("any_of_them", 3), ("Luminance", 3)):
        loaded = load_model(f"{nets}:{name}", pictures, "cpu")
        assert loaded.dataset.in_channels == channels, name
    for channels in (1, 3):  # weights without a card
        body = gb.models.create("lenet5", in_channels=channels, classes=2, image_size=(10, 10)).body
        torch.save(body.state_dict(), tmp_path / "w.pt")
        for source in (f"lenet5@{tmp_path}/w.pt", f"{nets}:any_of_them@{tmp_path}/w2.pt"):
            torch.save(torch.nn.Sequential(torch.nn.Conv2d(channels, 4, 3)).state_dict(), tmp_path / "w2.pt")
            assert input_shape(source, pictures)[0] == channels
    assert input_shape(f"{nets}:grey", "digits") == (None, None, None)  # not built twice where nothing depends on it


def test_an_architecture_with_weights_is_loaded_in_python_as_on_the_command_line(tmp_path, digits):
    model = gb.models.create("lenet5", digits)
    torch.save(model.body.state_dict(), tmp_path / "w.pt")
    source = f"lenet5@{tmp_path}/w.pt"
    loaded = gb.evaluation.load_model(source, dataset=digits).model
    x = digits.test.take(slice(0, 4))[0]
    assert torch.equal(loaded(x), model.eval()(x))
    with pytest.raises(UserError, match=r"names an architecture with weights.*gb\.evaluation\.load_model\("):
        gb.models.load(source)


def test_a_folder_with_weights_needs_no_slash(folder, digits, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "other").mkdir()
    shutil.copy(folder / "own.safetensors", tmp_path / "mine" / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    found = load_model("lenet5@mine", "digits", "cpu", digits)
    again = load_model("lenet5@mine/model.safetensors", "digits", "cpu", digits)
    x, _ = digits.test.take(slice(0, 20))
    with torch.no_grad():
        assert torch.equal(found.model(x), again.model(x))
    with pytest.raises(UserError, match="other"):
        load_model("lenet5@other", "digits", "cpu", digits)

"""Architectures of torchvision behind the same face."""

from __future__ import annotations

import builtins

import pytest
import torch

from gambeson import models
from gambeson.base import UserError
from gambeson.models import torchvision_nets


@pytest.mark.parametrize("name", ["squeezenet1_1", "resnet18"])
def test_same_network_as_torchvision_s_own(name):
    from torchvision.models import get_model

    torch.manual_seed(0)
    model = models.create(f"torchvision:{name}", in_channels=3, classes=7, image_size=64).eval()
    torch.manual_seed(0)
    own = get_model(name, weights=None, num_classes=7).eval()
    pixels = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels), own(pixels))


def test_grey_images_get_their_own_first_convolution():
    torch.manual_seed(0)
    grey = models.create("torchvision:resnet18", in_channels=1, classes=7, image_size=32)
    colour = models.create("torchvision:resnet18", in_channels=3, classes=7, image_size=32)
    assert grey(torch.rand(2, 1, 32, 32)).shape == (2, 7)
    assert grey.body.conv1.bias is None
    fewer = 2 * 64 * 7 * 7
    assert models.count_parameters(colour) - models.count_parameters(grey) == fewer
    ratio = grey.body.conv1.weight.std() / colour.body.conv1.weight.std()
    assert float(ratio.detach()) == pytest.approx(3**0.5, rel=0.05)  # the spread of the outputs stays


def test_nothing_works_in_place_and_modes_stay():
    model = models.create("torchvision:mobilenet_v3_small", in_channels=3, classes=7, image_size=32)
    assert not any(getattr(module, "inplace", False) for module in model.modules())
    assert all(module.training for module in model.modules())


def test_the_smallest_size_is_named_and_true():
    with pytest.raises(UserError, match=r"torchvision:squeezenet1_1 cannot take 16x16.*smallest.*17x17"):
        models.create("torchvision:squeezenet1_1", in_channels=3, classes=7, image_size=16)
    model = models.create("torchvision:squeezenet1_1", in_channels=3, classes=7, image_size=17)
    assert model(torch.rand(2, 3, 17, 17)).shape == (2, 7)


def test_transformers_are_built_for_the_size(monkeypatch):
    from torchvision.models import VisionTransformer
    from torchvision.models import vision_transformer as module

    def tiny(**settings):
        settings |= {"num_layers": 1, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 8}
        return VisionTransformer(**settings)

    monkeypatch.setattr(module, "VisionTransformer", tiny)
    model = models.create("torchvision:vit_b_16", in_channels=3, classes=7, image_size=48)
    assert model(torch.rand(2, 3, 48, 48)).shape == (2, 7)
    with pytest.raises(UserError, match=r"vit_b_16 cannot be built for 50x50 images.*divisible.*another image_size"):
        models.create("torchvision:vit_b_16", in_channels=3, classes=7, image_size=50)
    with pytest.raises(UserError, match="takes square images, not 48x32"):
        models.create("torchvision:vit_b_16", in_channels=3, classes=7, image_size=(48, 32))


def test_no_auxiliary_outputs_and_weights_that_normalise_themselves():
    model = models.create("torchvision:googlenet", in_channels=3, classes=7, image_size=32)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    assert model.body.transform_input is False
    body = torchvision_nets.build("torchvision:googlenet@IMAGENET1K_V1", 3, 7, (32, 32), pretrained=False)
    assert body.transform_input is True


def test_weights_bring_their_own_settings():
    defaults = torchvision_nets.weights_defaults("torchvision:resnet18@DEFAULT")
    assert (defaults["classes"], defaults["in_channels"], defaults["image_size"]) == (1000, 3, (224, 224))
    assert defaults["mean"] == pytest.approx((0.485, 0.456, 0.406))
    assert defaults["std"] == pytest.approx((0.229, 0.224, 0.225))
    assert torchvision_nets.weights_defaults("torchvision:resnet18") == {}


def test_asked_for_weights_reach_torchvision_and_their_normalisation_the_model(monkeypatch):
    import torchvision.models as tv

    asked = []

    def fetch(name, weights, num_classes):
        asked.append((name, str(weights), num_classes))
        return original(name, weights=None, num_classes=num_classes)

    original = tv.get_model
    monkeypatch.setattr(tv, "get_model", fetch)
    model = models.create("torchvision:squeezenet1_1@DEFAULT")
    assert asked == [("squeezenet1_1", "SqueezeNet1_1_Weights.IMAGENET1K_V1", 1000)]
    assert model.card.mean == pytest.approx((0.485, 0.456, 0.406))
    assert model.card.image_size == (224, 224)


def test_weights_that_do_not_fit():
    with pytest.raises(UserError, match="has weights for 1000 classes, not 10: leave out @DEFAULT"):
        models.create("torchvision:resnet18@DEFAULT", classes=10)
    with pytest.raises(UserError, match="has weights for 3 channels, not 1: leave out @DEFAULT"):
        models.create("torchvision:resnet18@DEFAULT", in_channels=1, mean=0.5, std=0.5)


def test_weights_that_cannot_be_fetched(monkeypatch):
    import torchvision.models as tv

    def refuse(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(tv, "get_model", refuse)
    with pytest.raises(UserError, match=r"could not be fetched \(no route\): check the network"):
        models.create("torchvision:resnet18@DEFAULT")


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (
            RuntimeError("operator torchvision::nms does not exist"),
            "different builds: install both from the same source",
        ),
        (ImportError("No module named 'torchvision'"), "pip install torchvision"),
    ],
)
def test_a_torchvision_that_does_not_import(monkeypatch, failure, words):
    real = builtins.__import__

    def broken(name, *rest, **keywords):
        if name.startswith("torchvision"):
            raise failure
        return real(name, *rest, **keywords)

    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(UserError, match=words):
        models.create("torchvision:resnet18", in_channels=3, classes=7, image_size=32)
    with pytest.raises(UserError, match="unknown model 'lennet'"):
        models.create("lennet")
    assert models.create("lenet", in_channels=1, classes=3, image_size=8).card.classes == 3

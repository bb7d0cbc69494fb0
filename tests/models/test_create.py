"""Creating a model: what the data supply, the normalisation inside, and every refusal."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gambeson import models
from gambeson.base import UserError

DATA = SimpleNamespace(
    in_channels=3,
    image_size=(12, 16),
    num_classes=6,
    train=SimpleNamespace(mean_std=lambda: ((0.5, 0.25, 0.1), (0.2, 0.5, 0.0))),
)


def test_data_supply_what_is_left_out():
    card = models.create("lenet", DATA).card
    assert (card.in_channels, card.classes, card.image_size) == (3, 6, (12, 16))
    assert card.mean == (0.5, 0.25, 0.1)
    assert card.std == (0.2, 0.5, 1.0)  # a constant channel is shifted, never divided by zero


def test_keywords_stand_before_data():
    card = models.create("lenet", DATA, classes=2, image_size=20, mean=0.5, std=(1, 2, 3)).card
    assert card == models.ModelCard(
        name="lenet", in_channels=3, classes=2, image_size=(20, 20), mean=(0.5,) * 3, std=(1.0, 2.0, 3.0)
    )


def test_without_data_the_normalisation_is_the_identity():
    model = models.create("lenet", in_channels=2, classes=4, image_size=16)
    pixels = torch.rand(3, 2, 16, 16)
    assert torch.equal(model.normalize(pixels), pixels)
    assert torch.equal(model(pixels), model.body(pixels))


def test_normalising_inside_is_normalising_outside():
    torch.manual_seed(0)
    model = models.create("resnet20x0.5", DATA).eval()
    pixels = torch.rand(2, 3, 12, 16)
    outside = torch.stack(
        [(pixels[:, 0] - 0.5) / 0.2, (pixels[:, 1] - 0.25) / 0.5, pixels[:, 2] - 0.1],
        dim=1,
    )
    torch.testing.assert_close(model(pixels), model.body(outside))
    assert not torch.allclose(model(pixels), model.body(pixels), atol=1e-3)


@settings(max_examples=15, deadline=None)
@given(mean=st.floats(-1, 1), std=st.floats(0.05, 3), seed=st.integers(0, 1000))
def test_normalisation_folds_into_a_first_linear_layer(mean, std, seed):
    torch.manual_seed(seed)
    model = models.create("mnist-d", in_channels=1, classes=3, image_size=3, mean=mean, std=std).double().eval()
    plain = models.create("mnist-d", in_channels=1, classes=3, image_size=3).double().eval()
    plain.body.load_state_dict(model.body.state_dict())
    # W (x - m) / s + b = (W / s) x + (b - sum(W) m / s), with the buffers' own rounding of m and s
    m, s = model.normalize.mean.item(), model.normalize.std.item()
    with torch.no_grad():
        plain.body.fc1.bias -= plain.body.fc1.weight.sum(1) * m / s
        plain.body.fc1.weight /= s
    pixels = torch.rand(4, 1, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(model(pixels), plain(pixels))


def test_buffers_have_the_documented_shape():
    model = models.create("lenet", DATA)
    assert model.normalize.mean.shape == model.normalize.std.shape == (1, 3, 1, 1)
    assert set(dict(model.named_buffers())) == {"normalize.mean", "normalize.std"}


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (torch.rand(2, 1, 12, 16), r"\(2, 1, 12, 16\).*expects \(N, 3, H, W\)"),
        (torch.rand(3, 12, 16), r"expects \(N, 3, H, W\)"),
        (torch.zeros(2, 3, 12, 16, dtype=torch.uint8), "torch.uint8.*float"),
        (torch.rand(2, 3, 28, 28), "images are 28x28, but this lenet was created for 12x16"),
    ],
)
def test_images_that_do_not_fit(pixels, words):
    with pytest.raises(UserError, match=words):
        models.create("lenet", DATA)(pixels)


def test_convolutional_networks_take_other_sizes():
    assert models.create("resnet20", DATA)(torch.rand(2, 3, 21, 40)).shape == (2, 6)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lennet", "unknown model 'lennet': did you mean lenet"),
        ("zoo:digits/lenet5/gambeson", "is a trained model: expected an architecture, such as lenet5, and the trained"),
        (str(Path(__file__).parent), "is a trained model: expected an architecture"),
        ("resnet21", r"unknown model 'resnet21': did you mean .*resnet20"),
        ("resnet50", r"unknown model 'resnet50': did you mean torchvision:resnet50\?"),
        ("qqq", "choose one of fcn8s, fcn8s-bn, lenet, lenet5, mnist-a"),
        ("resnet20x", "width factor '' of 'resnet20x' is not a positive number: write resnet20x4"),
        ("resnet20xwide", "width factor 'wide'"),
        ("resnet20x0", "width factor '0'"),
        ("resnet20x-2", "width factor '-2'"),
        ("resnet20xnan", "width factor 'nan'"),
        ("resnet20xinf", "width factor 'inf'"),
        ("lenetx2", "width factor, which lenet does not take: write lenet"),
        ("torchvision:resnt18", "unknown torchvision model 'resnt18': did you mean resnet18"),
        (
            "torchvision:resnet18@IMAGENET",
            "unknown weights of torchvision:resnet18 'IMAGENET'.*IMAGENET1K_V1",
        ),
        ("torchvision:resnet18@", "names no weights after @"),
        ("torchvision:raft_small", "unknown torchvision model"),
    ],
)
def test_bad_names(name, words):
    with pytest.raises(UserError, match=words):
        models.create(name, in_channels=3, classes=10, image_size=32)


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({}, "lenet needs in_channels and classes and image_size: pass a data set"),
        ({"in_channels": 1, "image_size": 28}, "lenet needs classes: pass a data set"),
        ({"in_channels": 0, "classes": 10, "image_size": 28}, "in_channels = 0"),
        ({"in_channels": 1, "classes": 1, "image_size": 28}, "classes = 1"),
        ({"in_channels": 1, "classes": 10, "image_size": 28, "mean": 0.5}, "only one of mean and std"),
        ({"in_channels": 1, "classes": 10, "image_size": 28, "mean": 0.5, "std": 0.0}, "std.0 = 0.0"),
        (
            {"in_channels": 3, "classes": 10, "image_size": 28, "mean": (0.5,), "std": 1},
            "mean has 1 values for 3",
        ),
        (
            {"in_channels": 1, "classes": 10, "image_size": 28, "mean": float("nan"), "std": 1},
            "not a finite number",
        ),
        ({"data": torch.zeros(2)}, "data is a Tensor: pass a data set"),
    ],
)
def test_bad_keywords(keywords, words):
    with pytest.raises(UserError, match=words):
        models.create("lenet", **keywords)


def test_the_name_is_judged_first():
    with pytest.raises(UserError, match="unknown model"):
        models.create("lennet")

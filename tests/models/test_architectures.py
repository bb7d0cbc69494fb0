"""Every architecture: shapes, gradients, sizes, parameter counts, transforms and seeds."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, grad, vmap

from gambeson import models
from gambeson.base import UserError
from gambeson.models.lenet import MaxPool
from tests.models import test_segmentation

# name, channels, side: the smallest cases that still leave batch normalisation something to normalise
CASES = [
    ("lenet", 1, 28),
    ("lenet5", 1, 28),
    ("lenet5", 1, 8),
    ("lenet", 3, 32),
    ("lenet", 1, 8),
    ("mnist-a", 1, 28),
    ("mnist-b", 1, 28),
    ("mnist-b", 1, 29),
    ("mnist-c", 1, 28),
    ("mnist-d", 1, 28),
    ("mnist-d", 3, 8),
    ("resnet18", 3, 16),
    ("resnet20", 3, 16),
    ("resnet20x0.5", 1, 9),
    ("resnet20x4", 3, 8),
    ("resnet32", 3, 16),
    ("resnet44", 3, 16),
    ("resnet56", 3, 16),
    ("torchvision:squeezenet1_1", 3, 64),
    ("torchvision:resnet18", 3, 64),
]


def test_every_name_has_a_case():
    maps = {name.partition("x0")[0] for name, _, _ in test_segmentation.CASES}
    assert set(models.names()) <= {name for name, _, _ in CASES} | maps


@pytest.mark.parametrize(("name", "channels", "side"), CASES)
def test_logits_gradients_and_independence_of_the_batch(name, channels, side):
    torch.manual_seed(0)
    model = models.create(name, in_channels=channels, classes=7, image_size=side, mean=0.4, std=0.3)
    pixels = torch.rand(2, channels, side, side)
    before = pixels.clone()

    logits = model(pixels)
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()
    assert torch.equal(pixels, before)

    torch.nn.functional.cross_entropy(logits, torch.tensor([1, 4])).backward()
    silent = [key for key, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert silent == []

    model.eval()
    with torch.no_grad():
        together = model(pixels)
        alone = torch.cat([model(pixels[:1]), model(pixels[1:])])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0], together[1], rtol=0, atol=1e-6)


def _conv(before: int, after: int, kernel: int, bias: bool = True) -> int:
    return before * after * kernel * kernel + (after if bias else 0)


def _linear(before: int, after: int) -> int:
    return before * after + after


def _cifar(depth: int, width: int = 1) -> int:
    """Stem, then per stage the first convolution (from the width before) and the rest; option A adds none."""
    n = (depth - 2) // 6
    widths = [16 * width, 32 * width, 64 * width]
    total = _conv(3, widths[0], 3, bias=False) + 2 * widths[0]
    for before, after in zip([widths[0], *widths], widths, strict=False):
        convolutions = _conv(before, after, 3, bias=False) + (2 * n - 1) * _conv(after, after, 3, bias=False)
        total += convolutions + 2 * n * 2 * after
    return total + _linear(widths[2], 10)


def _resnet18() -> int:
    total = _conv(3, 64, 3, bias=False) + 2 * 64 + 4 * (_conv(64, 64, 3, bias=False) + 2 * 64)
    for before, after in ((64, 128), (128, 256), (256, 512)):
        total += _conv(before, after, 3, bias=False) + 3 * _conv(after, after, 3, bias=False)
        total += _conv(before, after, 1, bias=False) + 5 * 2 * after  # the shortcut has its own normalisation
    return total + _linear(512, 10)


COUNTS = [
    (
        "lenet",
        1,
        28,
        _conv(1, 20, 5) + _conv(20, 50, 5) + _linear(50 * 4 * 4, 500) + _linear(500, 10),
        431_080,
    ),
    (
        "lenet",
        1,
        8,
        _conv(1, 20, 5) + _conv(20, 50, 5) + _linear(50 * 2 * 2, 500) + _linear(500, 10),
        131_080,
    ),
    (
        "lenet",
        3,
        32,
        _conv(3, 20, 5) + _conv(20, 50, 5) + _linear(50 * 5 * 5, 500) + _linear(500, 10),
        657_080,
    ),
    (
        "lenet5",
        1,
        28,
        _conv(1, 6, 5) + _conv(6, 16, 5) + _linear(16 * 5 * 5, 120) + _linear(120, 84) + _linear(84, 10),
        61_706,
    ),
    (
        "mnist-a",
        1,
        28,
        _conv(1, 64, 5) + _conv(64, 64, 5) + _linear(64 * 20 * 20, 128) + _linear(128, 10),
        3_382_346,
    ),
    ("mnist-b", 1, 28, _conv(1, 64, 8) + _conv(64, 128, 6) + _conv(128, 128, 5) + _linear(128, 10), 710_218),
    (
        "mnist-c",
        1,
        28,
        _conv(1, 128, 3) + _conv(128, 64, 3) + _linear(64 * 24 * 24, 128) + _linear(128, 10),
        4_795_082,
    ),
    ("mnist-d", 1, 28, _linear(28 * 28, 300) + 3 * _linear(300, 300) + _linear(300, 10), 509_410),
    ("resnet20", 3, 32, _cifar(20), 269_722),
    ("resnet32", 3, 32, _cifar(32), 464_154),
    ("resnet44", 3, 32, _cifar(44), 658_586),
    ("resnet56", 3, 32, _cifar(56), 853_018),
    ("resnet20x4", 3, 32, _cifar(20, width=4), 4_286_026),
    ("resnet18", 3, 32, _resnet18(), 11_173_962),
]


@pytest.mark.parametrize(("name", "channels", "side", "by_hand", "count"), COUNTS)
def test_parameter_counts(name, channels, side, by_hand, count):
    model = models.create(name, in_channels=channels, classes=10, image_size=side)
    assert by_hand == count
    assert models.count_parameters(model) == count


@pytest.mark.parametrize(
    ("name", "smallest"),
    [
        ("lenet", 4),
        ("mnist-a", 9),
        ("mnist-b", 27),
        ("mnist-c", 5),
        ("mnist-d", 1),
        ("resnet18", 8),
        ("resnet20", 4),
    ],
)
def test_smallest_image_works_and_one_pixel_less_is_refused(name, smallest):
    model = models.create(name, in_channels=1, classes=3, image_size=smallest).eval()
    assert model(torch.rand(2, 1, smallest, smallest)).shape == (2, 3)
    if smallest > 1:
        with pytest.raises(UserError, match=f"cannot take {smallest - 1}x40 images.*smallest.*{smallest}x{smallest}"):
            models.create(name, in_channels=1, classes=3, image_size=(smallest - 1, 40))


def test_images_may_be_higher_than_wide():
    for name in ("lenet", "mnist-a", "mnist-b", "mnist-c", "mnist-d", "resnet20"):
        model = models.create(name, in_channels=1, classes=3, image_size=(37, 28)).eval()
        assert model(torch.rand(2, 1, 37, 28)).shape == (2, 3)


def test_lenet_is_the_paper_s_chain():
    torch.manual_seed(0)
    body = models.create("lenet", in_channels=1, classes=10, image_size=28).body
    x = torch.rand(2, 1, 28, 28)
    by_hand = torch.conv2d(x, body.conv1.weight, body.conv1.bias)
    by_hand = torch.max_pool2d(by_hand, 2).relu()
    by_hand = torch.max_pool2d(torch.conv2d(by_hand, body.conv2.weight, body.conv2.bias), 2).relu()
    by_hand = (by_hand.flatten(1) @ body.fc1.weight.T + body.fc1.bias).relu() @ body.fc2.weight.T + body.fc2.bias
    torch.testing.assert_close(body(x), by_hand)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # what torch.func loads
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pooling_is_pytorch_s_with_and_without_a_derivative(layout):
    ours, theirs = MaxPool(), torch.nn.MaxPool2d(2)
    x = torch.randint(3, (4, 6, 9, 7), generator=torch.Generator().manual_seed(0)).float()  # full of equal values
    x[0, 0, 1, 2] = torch.nan
    x = x.contiguous(memory_format=layout)
    found, expected = ours(x), theirs(x)
    assert torch.equal(found.nan_to_num(9), expected.nan_to_num(9))
    assert found.isnan().sum() == 1
    assert found.stride() == expected.stride()
    x, move = x.nan_to_num(0), torch.rand(x.shape)
    for derivative in (lambda pool: torch.func.jvp(pool, (x,), (move,))[1], lambda pool: _gradient(pool, x)):
        assert torch.equal(derivative(ours), derivative(theirs))


def _gradient(net, x):
    point = x.clone().requires_grad_()
    return torch.autograd.grad(net(point).square().sum(), point)[0]


def test_golden_lenet():
    torch.manual_seed(0)
    model = models.create("lenet", in_channels=1, classes=10, image_size=8).eval()
    ramp = torch.linspace(0, 1, 128).view(2, 1, 8, 8)
    weights = torch.arange(20.0).view(2, 10)
    assert float((model(ramp).detach() * weights).sum()) == pytest.approx(GOLDEN, abs=1e-4)


GOLDEN = 3.21837


@pytest.mark.parametrize("depth", [20, 32, 44, 56])
def test_depth_counts_weight_layers(depth):
    body = models.create(f"resnet{depth}", in_channels=3, classes=10, image_size=32).body
    layers = [m for m in body.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(layers) == depth


def test_option_a_shortcut_strides_and_appends_zero_channels():
    torch.manual_seed(0)
    block = models.create("resnet20", in_channels=3, classes=10, image_size=32).body.stages[1][0]
    x = torch.rand(2, 16, 7, 7)
    shortcut = block.shortcut(x)
    assert torch.equal(shortcut[:, :16], x[:, :, ::2, ::2])
    assert shortcut.shape == (2, 32, 4, 4)
    assert not shortcut[:, 16:].any()


def test_last_relu_of_a_block_sees_the_sum():
    torch.manual_seed(0)
    block = models.create("resnet20", in_channels=3, classes=10, image_size=32).body.stages[0][0].eval()
    seen = []
    block.relu2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    x = torch.rand(2, 16, 8, 8)
    block(x)
    torch.testing.assert_close(seen[0], x + block.bn2(block.conv2(block.bn1(block.conv1(x)).relu())))
    assert (seen[0] < 0).any()


def test_width_factors_scale_every_stage():
    stages = models.create("resnet20x4", in_channels=3, classes=10, image_size=32).body.stages
    assert [stage[-1].conv2.out_channels for stage in stages] == [64, 128, 256]
    stages = models.create("resnet18x0.25", in_channels=3, classes=10, image_size=32).body.stages
    assert [stage[-1].conv2.out_channels for stage in stages] == [16, 32, 64, 128]


def test_he_initialisation():
    torch.manual_seed(0)
    convolution = models.create("resnet20x4", in_channels=3, classes=10, image_size=32).body.stages[2][1].conv1
    assert float(convolution.weight.detach().std()) == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.01)


def test_padding_of_net_b_is_tensorflow_s_same():
    for side, expected in ((28, (3, 3)), (29, (3, 4)), (31, (3, 4))):
        body = models.create("mnist-b", in_channels=1, classes=10, image_size=side).body
        left, right, top, bottom = body.pad.padding
        assert (left, right) == (top, bottom) == expected
        assert body.conv1(body.pad(torch.zeros(1, 1, side, side))).shape[-1] == -(-side // 2)


def test_dropout_rates_are_the_paper_s():
    rates = {
        name: [
            layer.p
            for layer in models.create(name, in_channels=1, classes=10, image_size=28).body
            if isinstance(layer, torch.nn.Dropout)
        ]
        for name in ("mnist-a", "mnist-b", "mnist-c", "mnist-d")
    }
    assert rates == {
        "mnist-a": [0.25, 0.5],
        "mnist-b": [0.2, 0.5],
        "mnist-c": [0.25, 0.5],
        "mnist-d": [0.5] * 4,
    }


@pytest.mark.parametrize(("name", "channels", "side"), [("lenet", 1, 8), ("resnet20x0.5", 3, 8), ("mnist-d", 1, 8)])
def test_functional_transforms_and_double_backward(name, channels, side):
    torch.manual_seed(0)
    model = models.create(name, in_channels=channels, classes=4, image_size=side).double().eval()
    pixels = torch.rand(3, channels, side, side, dtype=torch.float64)

    def first_logit(image):
        return functional_call(model, dict(model.named_parameters()), (image.unsqueeze(0),))[0, 0]

    slopes = vmap(grad(first_logit))(pixels)
    leaf = pixels.clone().requires_grad_(True)
    (plain,) = torch.autograd.grad(model(leaf)[:, 0].sum(), leaf, create_graph=True)
    torch.testing.assert_close(slopes, plain.detach())
    plain.square().sum().backward()
    weights = next(p for p in model.body.parameters() if p.ndim > 1)
    assert weights.grad is not None
    assert weights.grad.any()


@pytest.mark.parametrize("name", ["lenet", "resnet20", "torchvision:squeezenet1_1"])
def test_same_seed_same_weights(name):
    prints = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        prints.append(models.fingerprint(models.create(name, in_channels=3, classes=5, image_size=32)))
    assert prints[0] == prints[1] != prints[2]


def test_a_single_value_of_stride_nought_has_the_fingerprint_of_its_copy():
    one = torch.nn.Module()
    one.register_buffer("value", torch.tensor([2.5]).as_strided((1,), (0,)))
    other = torch.nn.Module()
    other.register_buffer("value", torch.tensor([2.5]))
    assert models.fingerprint(one) == models.fingerprint(other)

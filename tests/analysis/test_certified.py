"""Certified accuracy: sound against attacks and random points, exact where a formula is known."""

import pytest
import torch
from torch import nn

import gambeson as gb
from gambeson import UserError
from gambeson.analysis import certified_accuracy
from gambeson.analysis.certified import Bound, Relaxed, broken_together
from gambeson.analysis.chain import Affine, MaxPool, chain_of
from tests.conftest import LinearNet

SHAPE = (1, 6, 6)


def pooled_net(seed=0, classes=3):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.MaxPool2d(3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(4, 5, 2), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(5, 8), nn.ReLU(),
            nn.Linear(8, classes),
        )  # fmt: skip
        net(torch.rand(50, *SHAPE))
    return net.eval()


def images(count, seed=0):
    """Images with pixels at exactly 0 and 1 too."""
    x = torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed))
    return (1.4 * x - 0.2).clamp(0, 1)


def test_a_chain_computes_what_the_network_does():
    net, x = pooled_net(), images(5)
    layers = chain_of(net, x[:1])
    names = "".join(type(layer).__name__[0] for layer in layers)
    assert names == "AMRARARA"
    for one in x.double().flatten(1):
        exact = Relaxed.around(layers, one, one)
        expected = net.double()(one.view(1, *SHAPE))[0].detach()
        net.float()
        torch.testing.assert_close(exact.last[0], expected)
        torch.testing.assert_close(exact.last[1], expected)


@pytest.mark.parametrize("eps", [0.01, 0.05, 0.2])
def test_no_point_of_the_box_is_below_the_linear_bounds(eps):
    net = pooled_net().double()
    layers = chain_of(net, images(1))
    draw, unit = torch.Generator().manual_seed(1), torch.eye(3, dtype=torch.float64)
    gaps = []
    for x in images(6).double().flatten(1):
        relaxed = Relaxed.around(layers, (x - eps).clamp(0, 1), (x + eps).clamp(0, 1))
        delta = eps * (2 * torch.rand(400, len(x), generator=draw, dtype=x.dtype) - 1)
        delta[::2] = eps * delta[::2].sign()
        moved = (x + delta).clamp(0, 1)
        logits = net(moved.view(-1, *SHAPE)).detach()
        assert (logits >= relaxed.last[0] - 1e-9).all()
        assert (logits <= relaxed.last[1] + 1e-9).all()
        for label in range(3):
            margins = unit[label] - unit[torch.arange(3) != label]
            slope, offset = relaxed.linear(margins)
            assert (logits @ margins.T >= moved @ slope.T + offset - 1e-9).all()
            bound = Bound.of(layers, x, label, eps)
            if bound.certified:
                assert (logits @ margins.T > 0).all()
            elif len(bound.offset) == 2:  # none of the two is known, such as where the label is the least likely one
                rest = logits @ margins.T - (delta @ bound.slope.T + bound.offset)
                assert (rest >= 0).all()
                gaps.append(float(rest.min()))
    assert len(gaps) >= 6
    if eps < 0.02:
        assert min(gaps) < 0.01


def test_attacks_never_beat_the_bounds(trained, digits):
    for eps in ("2/255", 0.02):
        found = certified_accuracy(trained, digits, eps=eps, images=60)
        part = digits.test.sample(60, seed=0)
        each = gb.evaluation.accuracy_under(trained, part, gb.attacks.PGD(eps=eps, steps=40, restarts=2), 0)
        assert found.per_image.value <= each.value <= found.clean.value
        uap = gb.attacks.StochasticPGD(eps=eps, steps=60, probe_starts=2, batch_size=60)
        delta = uap.craft(trained, gb.data.Dataset("few", part, digits.validation, digits.test, digits.classes)).delta
        x, y = part.take(slice(None))
        under = float((trained((x + delta).clamp(0, 1)).argmax(1) == y).float().mean())
        assert found.per_image.value <= found.universal <= under
    assert found.per_image.value > 0.4  # the bounds say something


def test_a_linear_classifier_is_certified_exactly():
    weight = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(2))
    weight = weight - weight.mean((1, 2, 3), keepdim=True)  # about as many images of either class
    model, x = LinearNet(weight), 0.3 + 0.4 * images(300, seed=3)
    with torch.no_grad():
        logits = model(x)
    labels = logits.argmax(1)
    margin = logits.diff(dim=1).flatten().abs()
    eps = float(margin.median() / (weight[0] - weight[1]).abs().sum())
    broken = margin <= eps * (weight[0] - weight[1]).abs().sum()
    found = certified_accuracy(model, (x, labels), eps=eps, images=300)
    assert found.per_image.value == pytest.approx(1 - float(broken.float().mean()), abs=0.004)
    most = max(int(broken[labels == k].sum()) for k in (0, 1))  # one direction breaks one class alone
    assert most < int(broken.sum()) - 20
    assert found.per_image.value + 0.1 < found.universal <= 1 - most / 300 + 1e-9


def bound(slope, offset):
    return Bound(True, False, torch.tensor([slope]).double(), torch.tensor([offset]).double())


def test_images_that_pull_apart_are_not_broken_together():
    one, other = bound([1.0, 1.0], 0.19), bound([-1.0, -1.0], 0.19)
    assert broken_together([one], 0.1) == 1
    assert broken_together([one, other], 0.1) == 1
    assert broken_together([one, one], 0.1) == 2
    assert broken_together([one, bound([1.0, -1.0], 0.19)], 0.1) == 1  # no corner suits both
    assert broken_together([], 0.1) == 0
    assert broken_together([bound([0.0, 0.0], -1.0)], 0.1) == 1  # lost whatever the perturbation


def test_the_number_broken_together_is_never_too_small():
    draw = torch.Generator().manual_seed(4)
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 6)
    gained = 0
    for trial in range(20):
        slopes = torch.randn(8, 1 + trial % 2, 6, generator=draw, dtype=torch.float64)
        offsets = 0.25 + 0.2 * torch.rand(8, 1 + trial % 2, generator=draw, dtype=torch.float64)
        bounds = [Bound(True, False, slope, offset) for slope, offset in zip(slopes, offsets, strict=True)]
        inner = 2 * torch.rand(4000, 6, generator=draw, dtype=torch.float64) - 1
        delta = 0.1 * torch.cat([corners, inner])
        broken = ((delta @ slopes.transpose(1, 2) + offsets[:, None]) <= 0).any(2).sum(0).max()
        most = broken_together(bounds, 0.1)
        assert broken <= most <= 8
        gained += most < 8
    assert gained > 5


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.Tanh(), nn.Linear(4, 3)), "not affine .of .*tanh"),
        (gb.models.create("resnet20", in_channels=1, classes=3, image_size=(8, 8)), "two sources"),
        (nn.Sequential(nn.MaxPool2d(4, ceil_mode=True), nn.Flatten(), nn.Linear(4, 3)), "ceil_mode"),
    ],
)
def test_what_has_no_bounds_is_refused(model, says):
    side = 8 if isinstance(model, gb.models.PixelModel) else 6
    with pytest.raises(UserError, match=says):
        certified_accuracy(model.eval(), (torch.rand(4, 1, side, side), torch.tensor([0, 1, 2, 0])), eps=0.1)


def test_bad_settings_are_refused(trained, digits):
    with pytest.raises(UserError, match="below 0.5"):
        certified_accuracy(trained, digits, eps=0.5)
    noisy = gb.models.with_noise(trained, gb.models.FeatureNoise()) if hasattr(gb.models, "with_noise") else None
    if noisy is not None:
        with pytest.raises(UserError, match="random"):
            certified_accuracy(noisy, digits, eps=0.1)


def test_windows_of_a_padded_pooling():
    layers = chain_of(nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.Flatten()), images(1))
    pool = layers[0]
    assert isinstance(pool, MaxPool)
    x = images(1).double()
    torch.testing.assert_close(x.flatten()[pool.windows].amax(1), nn.MaxPool2d(3, 2, 1)(x).flatten())
    assert len(layers) == 2
    assert isinstance(layers[1], Affine)

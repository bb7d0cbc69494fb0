import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import gambeson as gb
from gambeson.victim import FastPath, Victim, fold_batchnorms, frozen
from gambeson.victim.bn_folding import FoldedModel


def settled(name, channels=3, size=16):
    """A net whose BatchNorm statistics are not the initial ones."""
    torch.manual_seed(0)
    model = gb.models.create(name, in_channels=channels, classes=5, image_size=size)
    model.train()
    for _ in range(3):
        model(torch.rand(8, channels, size, size))
    return model.eval()


@pytest.mark.parametrize(("name", "pairs"), [("resnet20x0.5", 19), ("resnet18x0.25", 20), ("torchvision:resnet18", 20)])
def test_every_pair_is_folded_and_nothing_else_changes(name, pairs):
    model = settled(name, size=32)
    before = gb.models.fingerprint(model)
    x = torch.rand(4, 3, 32, 32, requires_grad=True)
    made = fold_batchnorms(model, x[:2].detach())
    view = made.view
    assert len(made.pairs) == pairs
    assert not [module for module in view.modules() if isinstance(module, nn.BatchNorm2d)]
    torch.testing.assert_close(view(x), model(x), rtol=1e-4, atol=1e-5)
    ours, theirs = (torch.autograd.grad(net(x).square().sum(), x)[0] for net in (view, model))
    assert (ours - theirs).norm() < 0.01 * theirs.norm()  # a ReLU at its kink may switch
    assert gb.models.fingerprint(model) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Forked(nn.Module):
    """The convolution's output has a second use, so folding would be wrong."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.flat = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten()
        self.norm.running_mean.fill_(3.0)

    def forward(self, x):
        z = self.conv(x)
        return self.flat(self.norm(z) + z)


class Twice(nn.Module):
    """One convolution called twice, one of its outputs normalised."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.flat = nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1), nn.Flatten()
        self.norm.running_var.fill_(7.0)

    def forward(self, x):
        return self.flat(self.norm(self.conv(x)) + self.conv(x + 1))


@pytest.mark.parametrize("kind", [Forked, Twice])
def test_where_folding_would_be_wrong_the_copy_stays_unfolded(kind):
    model = kind().eval()
    x = torch.rand(3, 1, 5, 5)
    view, pairs = fold_batchnorms(model, x).view, len(fold_batchnorms(model, x).pairs)
    assert pairs == 0
    assert torch.equal(view(x), model(x))


def test_a_fast_victim_gives_the_same_logits_and_scores_come_from_the_model():
    model = settled("resnet20x0.5")
    x = torch.rand(6, 3, 16, 16)
    with Victim(model, fast=True) as victim, Victim(copy.deepcopy(model)) as plain:
        torch.testing.assert_close(victim(x), plain(x), rtol=1e-4, atol=1e-5)
        assert torch.equal(victim.forward_original(x), plain(x))
        assert victim.notes == "a copy with 19 BatchNorms folded, channels last"
        assert victim.forwards == 12
        images = x.clone().requires_grad_()
        gradient = victim.gradient(victim(images).sum(), images, 6)
        expected = torch.autograd.grad(plain(images).sum(), images)[0]
    assert (gradient - expected).norm() < 0.01 * expected.norm()


def test_a_model_that_cannot_be_copied_still_works():
    class Single(nn.Module):
        def __deepcopy__(self, memo):
            raise RuntimeError("there is only one of me")

        def forward(self, x):
            return x.flatten(1)

    with Victim(Single(), fast=True) as victim:
        assert victim(torch.rand(2, 1, 1, 3)).shape == (2, 3)
    assert "there is only one of me" in victim.notes


def test_weights_may_change_between_two_uses():
    model = settled("resnet20x0.5")
    x = torch.rand(2, 3, 16, 16)
    victim = Victim(model, fast=True)
    with victim:
        before = victim(x)
    with torch.no_grad():
        model.body.bn1.weight.mul_(2)
    with victim:
        assert not torch.allclose(victim(x), before)
        torch.testing.assert_close(victim(x), victim.forward_original(x), rtol=1e-4, atol=1e-5)


def test_the_copy_follows_the_weights_and_is_made_again_when_the_model_changes():
    model = settled("resnet20x0.25")
    x = torch.rand(4, 3, 16, 16)
    first = fold_batchnorms(model, x)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor))
    again = fold_batchnorms(model, x)
    assert again is first
    torch.testing.assert_close(again.view(x), model(x), rtol=1e-4, atol=1e-4)
    model.body.fc = nn.Sequential(model.body.fc, nn.ReLU())
    other = fold_batchnorms(model, x)
    assert other is not first
    torch.testing.assert_close(other.view(x), model(x), rtol=1e-4, atol=1e-4)


def test_lower_precision_is_said_and_stays_near():
    model, x = settled("resnet20x0.25"), torch.rand(4, 3, 16, 16)
    with Victim(model, fast=FastPath(precision="bfloat16")) as victim:
        logits = victim(x)
        assert "bfloat16" in victim.notes
        assert logits.dtype == torch.float32
        assert 0 < (logits - model(x)).norm() < 0.05 * model(x).norm()
        assert torch.equal(victim.forward_original(x), model(x))


def test_compiled_or_not_the_answer_is_the_same_and_the_notes_say_which(monkeypatch):
    model, x = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)), torch.rand(2, 1, 4, 4)
    real = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda view, **how: real(view, backend="aot_eager", **how)
    )  # in a second, not thirty
    with Victim(model, fast=FastPath(compile=True)) as victim:
        torch.testing.assert_close(victim(x), model(x))
        assert victim.notes.endswith(", compiled")

    def refuse(*_, **__):
        def call(*_):
            raise RuntimeError("cannot be traced")

        return call

    monkeypatch.setattr(torch, "compile", refuse)
    with Victim(model, fast=FastPath(compile=True)) as victim:
        torch.testing.assert_close(victim(x), model(x))
        assert "not compiled (RuntimeError)" in victim.notes


def test_a_copy_is_folded_under_autocast_too():
    """What autocast rounds off says nothing about the folding; training in bfloat16 crafts under it."""
    model = gb.models.create("resnet20x0.5", in_channels=3, classes=10, image_size=16).eval()
    x = torch.rand(4, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16), Victim(model, fast=True) as victim:
        victim(x)
        assert victim.notes.startswith("a copy with 19 BatchNorms folded")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_refreshed_copy_has_the_bits_of_a_new_one(dtype):
    """With and without a convolution's bias, a BatchNorm's weights and groups, in either layout."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 1, groups=2), nn.BatchNorm2d(8, affine=False, eps=1e-3), nn.ReLU(),
        nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 4 * 4, 5),
    ).to(dtype).train()  # fmt: skip
    x = torch.rand(6, 3, 8, 8, dtype=dtype)
    for layout in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=layout).eval()
        made = fold_batchnorms(model, x, layout)
        assert len(made.pairs) == 3
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            model.train()(x)
            model.eval()
        made.refresh(model)
        new = FoldedModel(model, x)
        new.lay_out(model, x, layout)
        for name, value in new.view.state_dict().items():
            assert torch.equal(made.view.state_dict()[name], value), name


class Scaled(nn.Module):
    """A tensor that is a plain attribute, which no state dict holds."""

    def __init__(self):
        super().__init__()
        self.conv, self.scale = nn.Conv2d(1, 4, 3), torch.tensor([1.0, 1.0, 1.0, 1.0])

    def forward(self, x):
        return (self.conv(x).amax((2, 3)) * self.scale) @ torch.eye(4)[:, :3]


@pytest.mark.parametrize("name", ["scale", "conv.weight"])
def test_a_change_through_data_is_seen_by_the_next_victim(name):
    torch.manual_seed(0)
    model, x = Scaled(), torch.rand(4, 1, 6, 6)
    for _ in range(2):  # the second time the copy is there already
        with Victim(model, fast=True) as victim:
            assert torch.allclose(victim(x), model(x))
            kind = victim.inspect(x).gap
        owner, _, last = name.rpartition(".")
        tensor = getattr(model.get_submodule(owner), last)
        version = tensor._version
        tensor.data.mul_(-2)
        assert tensor._version == version
    assert kind == 0


def test_noise_that_is_turned_on_through_data_makes_a_model_random():
    class Noisy(Scaled):
        def forward(self, x):
            return super().forward(x) + self.scale[0] * torch.randn(len(x), 3)

    model, x = Noisy(), torch.rand(4, 1, 6, 6)
    model.scale = nn.Parameter(torch.zeros(4))
    with Victim(model) as victim:
        assert not victim.inspect(x).stochastic
    model.scale.data.fill_(1)
    with Victim(model) as victim:
        assert victim.inspect(x).stochastic


GLOBAL = {"scale": 1.0, "noise": 0.0}


class Elsewhere(Scaled):
    """A model whose settings lie in an object, in a numpy array, in what a closure holds, or in a global."""

    def __init__(self, place):
        super().__init__()
        own = SimpleNamespace(scale=1.0, noise=0.0)
        array = np.array([1.0, 0.0])
        cell = {"scale": 1.0, "noise": 0.0}
        self.place, self.own, self.array, self.asked = place, own, array, lambda name: cell[name]
        self.store = {
            "object": lambda name, value: setattr(own, name, value),
            "array": lambda name, value: array.put(int(name == "noise"), value),
            "closure": cell.__setitem__,
            "global": GLOBAL.__setitem__,
        }[place]

    def read(self, name):
        if self.place == "object":
            return getattr(self.own, name)
        if self.place == "array":
            return float(self.array[int(name == "noise")])
        return self.asked(name) if self.place == "closure" else GLOBAL[name]

    def forward(self, x):
        return super().forward(x) * self.read("scale") + self.read("noise") * torch.randn(len(x), 3)


@pytest.mark.parametrize("place", ["object", "array", "closure", "global"])
def test_a_change_that_no_attribute_shows_is_seen_by_the_next_victim(place, monkeypatch):
    monkeypatch.setitem(GLOBAL, "scale", 1.0)
    monkeypatch.setitem(GLOBAL, "noise", 0.0)
    torch.manual_seed(0)
    model, x = Elsewhere(place), torch.rand(4, 1, 6, 6)
    for scale in (1.0, -2.0, -2.0):
        model.store("scale", scale)
        with Victim(model, fast=True) as victim:
            assert torch.allclose(victim(x), model(x))
            assert not victim.inspect(x).stochastic
    model.store("noise", 1.0)
    with Victim(model) as victim:
        assert victim.inspect(x).stochastic
    model.store("noise", 0.0)
    with Victim(model, fast=True) as victim:
        assert torch.allclose(victim(x), model(x))


def test_a_copy_that_still_fits_is_not_made_again_in_evaluation_or_in_training():
    model, x = settled("resnet20x0.25"), torch.rand(4, 3, 16, 16)
    for training in (False, True):
        model.train(training)
        with frozen(model):
            first = fold_batchnorms(model, x, trained=training)
            with torch.no_grad():
                model.body.bn1.weight.mul_(1.1)
            assert fold_batchnorms(model, x, trained=training) is first


class Rectified(nn.Module):
    """A ReLU in different places, of which the first alone may write into its input."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.conv, self.relu, self.head = kind, nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Linear(3 * 6 * 6, 4)
        if kind == "hook":
            self.conv.register_forward_hook(lambda *_: None)

    def forward(self, x):
        z = self.conv(self.relu(x) if self.kind == "input" else x)
        z = z.sigmoid() if self.kind == "saved" else z
        y = z if self.kind == "input" else self.relu(z)
        return self.head((y + z if self.kind == "used again" else y).flatten(1))


@pytest.mark.parametrize("kind", ["plain", "used again", "saved", "input", "hook"])
def test_relus_of_a_copy_write_into_their_input_where_nothing_else_reads_it(kind):
    torch.manual_seed(0)
    model, images = Rectified(kind).eval(), torch.rand(5, 1, 8, 8)
    point = images.clone().requires_grad_()
    logits = model(point)
    (gradient,) = torch.autograd.grad(logits.square().sum(), point)
    made = fold_batchnorms(model, images[:2])
    assert made.view.relu.inplace == (kind == "plain")
    assert not model.relu.inplace
    given = images.clone()
    with Victim(model, fast=True) as victim:
        moved = given.requires_grad_()
        found = victim(moved)
        torch.testing.assert_close(found, logits, atol=1e-6, rtol=0)
        torch.testing.assert_close(victim.gradient(found.square().sum(), moved, 5), gradient, atol=1e-6, rtol=0)
    assert torch.equal(given.detach(), images)

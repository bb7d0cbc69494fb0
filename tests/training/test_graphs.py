"""The outer step by graphs: the numbers of plain training, whatever a replay overwrites, and what is refused.

A stand-in takes the place of a captured graph: it computes on static tensors, which the next call overwrites.
"""

import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import gambeson as gb
from gambeson.defenses import Batch
from gambeson.training import graphs, loop


class Replay(torch.autograd.Function):
    """One node for the whole network, as that of a graphed callable."""

    @staticmethod
    def forward(ctx, owner, images, *weights):
        ctx.owner = owner
        return owner.replay(images)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return None, *ctx.owner.gradients(gradient)


class Graphed(nn.Module):
    made = calls = 0

    def __init__(self, whole, sample):
        super().__init__()
        type(self).made += 1
        self.whole, self.sample, self.static = whole, sample, None
        for _ in range(3):  # the warm-up moves running statistics
            whole(sample)

    def forward(self, images):
        type(self).calls += 1
        return Replay.apply(self, images, *self.whole.parameters())

    def replay(self, images):
        with torch.no_grad():
            self.sample.copy_(images)
        with torch.enable_grad():
            self.out = self.whole(self.sample)
        if self.static is None:
            self.static = self.out.detach().clone()
        self.static.copy_(self.out.detach())
        return self.static.detach()

    def gradients(self, gradient):
        inputs = [self.sample, *self.whole.parameters()]
        wanted = [one for one in inputs if one.requires_grad]
        found = iter(torch.autograd.grad(self.out, wanted, gradient))
        return tuple(next(found) if one.requires_grad else None for one in inputs)


@pytest.fixture
def replayed(monkeypatch):
    Graphed.made = Graphed.calls = 0
    monkeypatch.setattr(loop, "has_graphs", lambda device: True)
    monkeypatch.setattr(graphs, "draws", lambda: bytes(torch.get_rng_state().numpy()))
    monkeypatch.setattr(graphs, "no_waits", nullcontext)
    monkeypatch.setattr(graphs, "undone_on_error", lambda here, pool: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda whole, args, **more: Graphed(whole, *args))
    return Graphed


def few(digits):
    return gb.data.Dataset(
        "few", digits.train.subset(torch.arange(160)), digits.validation, digits.test, digits.classes
    )


def net(normalised=True):
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(64, 16), *([nn.BatchNorm1d(16)] if normalised else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(16, 10))


def weights(data, defense, model=None, **more):
    model = model or net()
    gb.train(model, data, gb.defenses.create(**defense), **{"epochs": 2, "batch_size": 32, "seed": 0, **more})
    return model.state_dict()


DEFENSES = {
    "standard": (1, {}),
    "pgd-adversarial": (1, {"eps": 0.1, "steps": 1}),
    "shared-adversarial": (2, {"eps": 0.1, "sharedness": 8, "steps": 1}),
    "trades": (2, {"eps": 0.1, "steps": 1}),
    "bank-started": (1, {"eps": 0.1, "bank": 2, "warmup": 0}),
    "free-adversarial": (1, {"eps": 0.1, "replays": 2}),
    "jacobian": (None, {"strength": 0.01}),
    "ensemble": (2, {"members": 2, "inner": {"name": "standard"}}),
}


@pytest.mark.filterwarnings("ignore:the model has not learnt")
@pytest.mark.parametrize("name", DEFENSES)
def test_training_by_graphs_has_the_same_bytes(digits, replayed, monkeypatch, name):
    made, settings = DEFENSES[name]
    data, members = few(digits), settings.get("members", 1)
    defense = {"name": name, **settings}

    def model():
        torch.manual_seed(0)
        return gb.models.create("lenet5", data, members=members) if members > 1 else net()

    by_graphs = weights(data, defense, model())
    calls = replayed.calls
    assert made is None or replayed.made == made
    monkeypatch.setattr(loop, "has_graphs", lambda device: False)
    plain = weights(data, defense, model())
    assert replayed.calls == calls
    assert calls == 0 if made is None else calls >= 8 * made
    assert all(torch.equal(value, plain[key]) for key, value in by_graphs.items())


def test_an_interrupted_training_by_graphs_ends_with_the_same_bytes(digits, replayed, tmp_path):
    data, defense = few(digits), {"name": "standard"}
    whole = weights(data, defense)
    weights(data, defense, epochs=1, out=tmp_path / "other", schedule="constant")  # another capture in between
    torch.manual_seed(0)
    again = weights(data, defense, out=tmp_path / "run")
    assert replayed.made == 3
    assert all(torch.equal(value, again[key]) for key, value in whole.items())


def forward_of(model, images, count=3):
    by = graphs.GraphedForward()
    for _ in range(count):
        out = by(model, images)
        out.sum().backward()
        by.close()
    return by


def test_calls_before_one_backward_have_graphs_of_their_own(replayed):
    model, by = net(normalised=False), graphs.GraphedForward()
    one, two = torch.rand(2, 8, 1, 8, 8)
    for _ in range(4):
        model.zero_grad()
        (by(model, one).square().sum() - by(model, two).square().sum()).backward()
        by.close()
    found = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    (model(one).square().sum() - model(two).square().sum()).backward()
    assert len(by) == replayed.made == 2
    assert all(torch.equal(got, weight.grad) for got, weight in zip(found, model.parameters(), strict=True))


class Odd(nn.Module):
    """Counts its calls, or drops features at random."""

    def __init__(self, habit):
        super().__init__()
        self.inner, self.habit, self.calls = net(normalised=False), habit, 0

    def forward(self, x):
        if self.habit == "counts":
            self.calls += 1
        logits = self.inner(x)
        return nn.functional.dropout(logits, 0.5) if self.habit == "draws" else logits


@pytest.mark.parametrize("habit", ["counts", "draws"])
def test_what_a_replay_would_not_repeat_is_computed_as_before(replayed, habit):
    model, images = Odd(habit), torch.rand(8, 1, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        by = forward_of(model, images, 5)
    assert "draws random numbers or changes" in by.refused
    assert replayed.made == len(by) == 0


def test_a_graph_with_other_numbers_is_not_used(replayed, monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "make_graphed_callables", lambda whole, args, **more: Graphed(nn.Sequential(whole, Double()), *args)
    )
    model, images = net(), torch.rand(8, 1, 8, 8)
    before = {key: value.clone() for key, value in model.named_buffers()}
    with pytest.warns(UserWarning, match="no CUDA graph .*differ from those of the model"):
        by = forward_of(model, images)
    assert len(by) == 0
    plain = net()
    forward_of(plain, images, 0)
    for _ in range(3):
        plain(images)
    assert all(torch.equal(value, dict(plain.named_buffers())[key]) for key, value in model.named_buffers())
    assert any(not torch.equal(value, before[key]) for key, value in model.named_buffers())


class Double(nn.Module):
    def forward(self, x):
        return 1.01 * x


def test_weights_of_a_functional_call_have_no_graph(replayed):
    model, by, images = net(normalised=False), graphs.GraphedForward(), torch.rand(8, 1, 8, 8)
    holder = nn.ModuleDict({"model": model})
    holder.forward = lambda x: by(model, x)
    other = {key: (2 * value.detach()).requires_grad_() for key, value in model.named_parameters()}
    expected = torch.func.functional_call(model, other, (images,))
    for _ in range(4):
        found = torch.func.functional_call(holder, {f"model.{key}": value for key, value in other.items()}, (images,))
        assert torch.equal(found, expected)
        by.close()
    assert len(by) == 0


def test_a_new_shape_mode_or_frozen_weight_is_another_graph_and_they_are_few(replayed):
    model, by = net(), graphs.GraphedForward()
    for count in range(2, graphs.MOST + 4):
        for _ in range(3):
            by(model, torch.rand(count, 1, 8, 8)).sum().backward()
            by.close()
    assert len(by) == graphs.MOST
    by, images = graphs.GraphedForward(), torch.rand(8, 1, 8, 8)
    for change in (lambda: None, lambda: model[2].eval(), lambda: model[1].weight.requires_grad_(False)):
        change()
        for _ in range(3):
            by(model, images).sum().backward()
            by.close()
    assert len(by) == 3
    with torch.no_grad():
        assert not by(model, images).requires_grad


def test_a_batch_without_graphs_calls_the_model():
    model, images = net(), torch.rand(8, 1, 8, 8)
    batch = Batch(images=images, labels=torch.zeros(8, dtype=torch.long), seed=0)
    model.eval()
    assert torch.equal(batch.forward(model, images), model(images))

"""Graphs of gradients, and waits for the device: what can be shown without one; the rest is in tests/gpu."""

import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gambeson as gb
from gambeson.defenses import Batch
from gambeson.defenses.objective import Adversarial
from gambeson.victim import Victim, graphs
from gambeson.victim import victim as victims

READS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero"}


class Waits(TorchDispatchMode):
    """Counts the operations that would make the host wait for an accelerator."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.count = 0
        tolist = torch.Tensor.tolist

        def counted(tensor):
            self.count += 1
            return tolist(tensor)

        monkeypatch.setattr(torch.Tensor, "tolist", counted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in READS
        return func(*args, **(kwargs or {}))


class Replayed:
    """Stands for a captured graph: computes on inputs of its own, and counts nothing."""

    made = calls = 0

    def __init__(self, job, tensors, pool, tally, settings):
        type(self).made += 1
        self.job, self.inputs, self.tally = job, [tensor.clone() for tensor in tensors], tally
        before = tally()
        self.job(*self.inputs)
        self.counts = tuple(after - earlier for after, earlier in zip(tally(), before, strict=True))

    def __call__(self, tensors):
        type(self).calls += 1
        for static, tensor in zip(self.inputs, tensors, strict=True):
            static.copy_(tensor)
        victim = self.job.__self__.victim
        before = victim.forwards, victim.backwards
        found = self.job(*self.inputs)
        victim.forwards, victim.backwards = before
        return found


@pytest.fixture
def replayed(monkeypatch):
    Replayed.made = Replayed.calls = 0
    monkeypatch.setattr(graphs, "Graph", Replayed)
    monkeypatch.setattr(graphs, "_stream", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(victims, "has_graphs", lambda device: True)
    return Replayed


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 10))
    net(torch.rand(16, 3, 8, 8))
    return net.eval()


def batch(count=6):
    draw = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, 8, 8, generator=draw), torch.randint(0, 10, (count,), generator=draw)


def pgd(**more):
    return gb.attacks.PGD(**({"eps": 8 / 255, "steps": 8, "early_stop": False} | more))


def test_more_steps_wait_no_more_often(monkeypatch):
    net, (x, y) = network(), batch()
    pgd()(net, x, y)
    found = []
    for steps in (3, 9):
        with Waits(monkeypatch) as waits:
            pgd(steps=steps)(net, x, y)
        found.append(waits.count)
    radius = 2  # of the ball, on the host, once per attack
    # The images, the model (because a mode of torch is on), its copy, the labels twice, and the gradients.
    checks = 6
    assert found[0] == found[1] == checks + radius


def test_an_inner_attack_waits_once(monkeypatch):
    net, (x, y) = network(), batch()
    term = Adversarial(eps=8 / 255, steps=5)
    term.craft(net.train(), Batch(images=x, labels=y, seed=0))
    with torch.no_grad():  # the step of training between two attacks
        net[0].weight.mul_(1.01)
    with Waits(monkeypatch) as waits:
        term.craft(net, Batch(images=x, labels=y, seed=1))
    assert waits.count == 1 + 2


@pytest.mark.parametrize("early_stop", [False, True])
def test_replayed_gradients_change_no_number(replayed, monkeypatch, early_stop):
    net, (x, _) = network(), batch()
    y = net(x).argmax(1)
    attack = pgd(early_stop=early_stop, eps=2 / 255)
    with Victim(net, fast=True) as victim:
        found = attack(victim, x, y)
        counts = victim.forwards, victim.backwards
        again = attack(victim, x, y)
    assert replayed.made >= 1
    monkeypatch.setattr(victims, "has_graphs", lambda device: False)
    with Victim(net, fast=True) as victim:
        expected = attack(victim, x, y)
        assert counts == (victim.forwards, victim.backwards)
    assert torch.equal(found, expected)
    assert torch.equal(again, expected)


def test_survivors_share_the_graphs_of_a_few_sizes(replayed, monkeypatch):
    """An attack that leaves off image after image has a graph per size, rounded up; its numbers and counts stay."""
    net, (x, y) = network().double(), batch(60)  # in float64 rounding does not tell a padded batch from another
    y = net(x.double()).argmax(1)
    attack = pgd(early_stop=True, eps=12 / 255, steps=40, rel_step_size=0.02)
    sizes = []
    call = replayed.__call__
    monkeypatch.setattr(
        replayed, "__call__", lambda graph, tensors: sizes.append(len(tensors[0])) or call(graph, tensors)
    )
    with Victim(net, fast=True) as victim:
        found = attack(victim, x, y)
        counts = victim.forwards, victim.backwards
    monkeypatch.setattr(victims, "has_graphs", lambda device: False)
    with Victim(net, fast=True) as victim:
        torch.testing.assert_close(found, attack(victim, x, y), atol=1e-6, rtol=0)
        assert counts == (victim.forwards, victim.backwards)
    assert len(sizes) > 12
    assert replayed.made == len(set(sizes)) < 12
    assert set(sizes) <= {60, *range(1, 8), 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56}


def test_graph_sizes_are_rounded_up_to_three_binary_digits():
    sizes = graphs.Graphs()
    assert [sizes.size_for(count) for count in (250, 249, 224, 193, 97, 13, 9, 7, 1)] == [
        250, 250, 224, 224, 112, 14, 10, 7, 1,
    ]  # fmt: skip
    assert sizes.size_for(300) == 300


def test_a_training_captures_once_and_follows_the_weights(replayed, monkeypatch):
    """Every step has a victim of its own, and the weights change in place in between."""
    found = []
    for supported in (True, False):
        monkeypatch.setattr(victims, "has_graphs", lambda device, supported=supported: supported)
        net, (x, y) = network(), batch()
        for seed in range(4):
            found.append(Adversarial(eps=8 / 255, steps=4).craft(net, Batch(images=x, labels=y, seed=seed)))
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.mul_(0.9 if seed % 2 else -1.1)
    assert replayed.made == 1
    assert replayed.calls == 4 * 4 - graphs.EAGER
    assert all(torch.equal(one, other) for one, other in zip(found[:4], found[4:], strict=True))
    assert not torch.equal(found[0], found[1])


def test_what_is_computed_differently_has_a_graph_of_its_own(replayed):
    net, (x, y) = network(), batch()
    with Victim(net, fast=True) as victim:
        plain = pgd(steps=20)(victim, x, y)
        victim.temperature = 50.0
        assert not torch.equal(pgd(steps=20, loss="margin")(victim, x, y), plain)
        pgd(steps=20)(victim, x, y)
        pgd(steps=20)(victim, *batch(5))
    assert replayed.made == 4


def test_graphs_are_few(replayed):
    net = network()
    with Victim(net, fast=True) as victim:
        for count in range(1, graphs.MOST + 3):
            pgd()(victim, *batch(count))
        assert len(victim._copy.graphs) == graphs.MOST


def test_replaced_weights_drop_the_graphs(replayed):
    net, (x, y) = network(), batch()
    for _ in range(2):
        with Victim(net, fast=True) as victim:
            pgd()(victim, x, y)
            victim._copy.view[0].weight.data = victim._copy.view[0].weight.data.clone()
    assert replayed.made == 2


@pytest.mark.parametrize(("error", "says"), [(RuntimeError("no capture"), True),
                                             (graphs.NotRepeatableError("draws"), False)])  # fmt: skip
def test_what_cannot_be_captured_is_computed_as_before(replayed, monkeypatch, error, says):
    net, (x, y) = network(), batch()

    def refuse(*_):
        raise error

    monkeypatch.setattr(graphs, "Graph", refuse)
    with Victim(net, fast=True) as victim, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = pgd()(victim, x, y)
        pgd()(victim, x, y)
        assert victim.forwards == victim.backwards == 2 * 8 * len(x)
        assert str(error) in victim._copy.graphs.refused
    assert sum("without a CUDA graph" in str(one.message) for one in caught) == int(says)
    monkeypatch.setattr(victims, "has_graphs", lambda device: False)
    assert torch.equal(found, pgd()(net, x, y))


def test_a_model_is_inspected_again_when_it_has_changed(monkeypatch):
    net, (x, _) = network(), batch()
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))

    def inspected():
        calls.clear()
        with Victim(net) as victim:
            victim.inspect(x)
        return len(calls) > 2  # two calls tell whether it repeats itself still

    assert inspected()
    assert not inspected()
    with torch.no_grad():
        net[0].weight.mul_(2)
    assert inspected()
    net[1].momentum = 0.3
    assert inspected()
    net[0].weight = nn.Parameter(net[0].weight.detach().clone())
    assert inspected()
    assert not inspected()


class Drawing:
    """Stands for a CUDA generator, which a broken capture leaves in capture mode."""

    def __init__(self, capturing=False):
        self.capturing = capturing

    def clone_state(self):
        return Drawing()

    def graphsafe_set_state(self, other):
        self.capturing = other.capturing


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_a_failed_capture_is_undone(monkeypatch, ended, fails):
    here, generator, pools, streams = SimpleNamespace(device_index=0), Drawing(), {(0, (0, 7))}, ["side"]

    def close(*pool):
        if pool not in pools:
            raise RuntimeError("not allocating to this pool")
        pools.remove(pool)

    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    monkeypatch.setattr(torch.cuda, "default_generators", (generator,))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", close, raising=False)
    with pytest.raises(ValueError, match="broken") if fails else nullcontext(), graphs.undone_on_error(here, (0, 7)):
        generator.capturing = fails
        if ended:
            pools.clear()
        if fails:
            raise ValueError("broken")
    assert not generator.capturing
    assert bool(pools) == (not fails and not ended)
    assert streams == (["side", here] if fails else ["side"])

"""What only an accelerator can show: the CPU's numbers, its own bytes again, memory, streams and layouts."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F

import gambeson as gb
from gambeson.base import seeded
from gambeson.data import Split
from gambeson.data.dataset import Dataset
from gambeson.defenses import Batch
from gambeson.threat import Ball
from gambeson.training.batches import Epoch
from gambeson.training.loop import Run
from gambeson.victim import FastPath, Victim, predict
from gambeson.victim.bn_folding import _made

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")]

EPS = 8 / 255
SIDE = 16
GPU = "cuda"


def coloured(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images whose class is a coarse pattern under noise: a small net learns them in a few steps."""
    draw = torch.Generator().manual_seed(seed)
    patterns = torch.rand(10, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 10, (count,), generator=draw)
    wide = F.interpolate(patterns, size=SIDE, mode="nearest")[labels]
    noise = torch.rand(count, 3, SIDE, SIDE, generator=draw)
    return ((0.6 * wide + 0.4 * noise) * 255).to(torch.uint8), labels


@pytest.fixture(scope="module")
def data():
    classes = tuple("0123456789")
    parts = [Split(name, *coloured(count, seed), classes) for name, count, seed in
             (("train", 1024, 1), ("validation", 256, 2), ("test", 256, 3))]  # fmt: skip
    return Dataset("patterns", *parts, classes)


@pytest.fixture(scope="module")
def model(data):
    """A small residual net with BatchNorm statistics of its own, trained a little on the GPU; kept on the CPU."""
    with seeded(0, "model"):
        net = gb.models.create("resnet20", data).to(GPU)
    gb.train(net, data, gb.defenses.Standard(), epochs=2, batch_size=64, lr=0.05, seed=0)
    return net.cpu().eval()


@pytest.fixture
def pair(model):
    return copy.deepcopy(model), copy.deepcopy(model).to(GPU)


def batch_of(data, count=32):
    return data.test.take(slice(0, count))


def pgd(**more):
    settings = {"eps": EPS, "steps": 5, "start": "zero", "early_stop": False}
    return gb.attacks.PGD(**(settings | more))


def waits_in(job):
    """How often the host waits for the device in a job, by torch's own warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            job()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(one.message) for one in caught)


def eager(monkeypatch):
    for module in (gb.victim.victim, gb.training.loop):
        monkeypatch.setattr(module, "has_graphs", lambda device: False)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("early_stop", [False, True], ids=["all steps", "early stop"])
def test_a_graph_gives_the_bytes_of_the_calls_it_replaces(pair, data, monkeypatch, precision, early_stop):
    x, y = (t.to(GPU) for t in batch_of(data, 64))
    found = []
    for graphs in (True, False):
        if not graphs:
            eager(monkeypatch)
        with Victim(pair[1], fast=FastPath(precision=precision)) as victim:
            found.append(pgd(steps=10, start="uniform", eps=2 / 255, early_stop=early_stop)(victim, x, y, seed=1))
            found.append(victim.backwards)
            if graphs:
                assert victim._copy.graphs.refused is None
                assert len(victim._copy.graphs) >= 1
    if early_stop:  # a graph of another size may round otherwise, so that an image is left alone a step later
        assert found[1] == pytest.approx(found[3], rel=0.05)
        assert (found[0] - found[2]).abs().mean() < EPS / 40
    else:
        assert found[1] == found[3]
        assert torch.equal(found[0], found[2])


def test_a_universal_perturbation_by_graphs_has_the_same_bytes(pair, data, monkeypatch):
    attack = gb.attacks.StochasticPGD(eps=EPS, probe_starts=2, probe_start_steps=5, steps=10)
    one = attack.craft(pair[1], data, seed=4)
    eager(monkeypatch)
    other = attack.craft(pair[1], data, seed=4)
    assert torch.equal(one.delta, other.delta)
    assert (one.about.forwards, one.about.backwards) == (other.about.forwards, other.about.backwards)


def test_a_training_by_graphs_has_the_same_bytes(data, monkeypatch):
    one = trained_weights(data, 1, precision="bfloat16", channels_last=True)
    eager(monkeypatch)
    assert torch.equal(one, trained_weights(data, 1, precision="bfloat16", channels_last=True))


@pytest.mark.parametrize(
    ("defense", "count"),
    [
        (gb.defenses.Standard(), 1),
        (gb.defenses.SharedAdversarial(eps=EPS, sharedness=8, steps=2, craft_precision="bfloat16"), 2),
        (gb.defenses.Trades(eps=EPS, steps=2), 2),
        (gb.defenses.BankStarted(eps=EPS, warmup=0), 1),
        (gb.defenses.FreeAdversarial(eps=EPS, replays=2), 1),
    ],
    ids=["standard", "shared", "trades", "bank", "free"],
)
def test_the_outer_step_has_graphs_that_wait_for_nothing(data, defense, count):
    with seeded(0, "model"):
        net = gb.models.create("resnet20", data).to(GPU)
    how = gb.training.Recipe(epochs=9, batch_size=128, precision="bfloat16", channels_last=True)
    run = Run(net, data, defense, how, 0, None)
    batches = Epoch(run.train, how, 1, 0, 0, run.device)
    net.train()
    for k in range(4):
        run.train_step(batches[k])
    assert (run.graphs.refused, len(run.graphs)) == (None, count)
    crafted = 2 if isinstance(defense, gb.defenses.BankStarted) else 1
    assert waits_in(lambda: run.train_step(batches[4])) <= crafted


def test_dropout_has_no_graph_and_trains_as_before(data, monkeypatch):
    def trained():
        with seeded(0, "model"):
            net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.2), torch.nn.Linear(3 * SIDE**2, 10))
        net.to(GPU)
        gb.train(net, data, gb.defenses.Standard(), epochs=1, batch_size=64, lr=0.01, seed=0)
        return net[2].weight.detach().clone()

    one = trained()
    eager(monkeypatch)
    assert torch.equal(one, trained())


def test_a_step_of_adversarial_training_waits_for_the_device_once(data):
    """To read whether every gradient of the inner attack was finite."""
    with seeded(0, "model"):
        net = gb.models.create("resnet20", data).to(GPU)
    how = gb.training.Recipe(epochs=9, batch_size=128, precision="bfloat16", channels_last=True)
    run = Run(net, data, gb.defenses.PGDAdversarial(eps=EPS, steps=7), how, 0, None)
    batch = Epoch(run.train, how, 1, 0, 0, run.device)[0]
    net.train()
    run.train_step(batch)
    assert waits_in(lambda: run.train_step(batch)) <= 1
    assert len(_made[net].graphs) == 1


def test_more_steps_of_an_attack_wait_no_more_often(pair, data):
    x, y = (t.to(GPU) for t in batch_of(data, 64))
    found = []
    with Victim(pair[1], fast=True) as victim:
        for steps in (12, 12, 24):
            found.append(waits_in(lambda steps=steps: pgd(steps=steps)(victim, x, y)))
    assert 0 < found[1] == found[2] < 12


@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_standard_training_step_does_not_wait_for_the_device(data, ema):
    with seeded(0, "model"):
        net = gb.models.create("resnet20", data).to(GPU)
    how = gb.training.Recipe(epochs=9, batch_size=128, precision="bfloat16", channels_last=True, ema=ema)
    run = Run(net, data, gb.defenses.Standard(), how, 0, None)
    batch = Epoch(run.train, how, 1, 0, 0, run.device)[0]
    net.train()
    run.train_step(batch)
    assert waits_in(lambda: run.train_step(batch)) == 0


@pytest.mark.parametrize(("norm", "median", "most"), [("inf", 0.1, 0.3), ("2", 5e-3, 0.1)])
def test_one_step_is_the_cpus(pair, data, norm, median, most):
    """Rounding decides the side of a ReLU's kink in a few images, and the sign of a gradient near zero."""
    x, y = batch_of(data)
    attack = pgd(norm=norm, eps=EPS if norm == "inf" else 0.5, steps=1, rel_step_size=1.0)
    here, there = attack(pair[0], x, y) - x, attack(pair[1], x.to(GPU), y.to(GPU)).cpu() - x
    far = (there - here).flatten(1).norm(dim=1) / here.flatten(1).norm(dim=1)
    assert here.flatten(1).norm(dim=1).min() > 0
    assert far.median() < median
    assert far.max() < most


def trained_weights(data, seed, **recipe):
    with seeded(seed, "model"):
        net = gb.models.create("resnet20", data).to(GPU)
    defense = gb.defenses.SharedAdversarial(eps=EPS, sharedness=8, steps=2)
    settings = {"epochs": 1, "batch_size": 128, "augment": "crop-flip"} | recipe
    gb.train(net, data, defense, seed=seed, **settings)
    return torch.cat([value.flatten().float() for value in net.state_dict().values()])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_same_seed_same_bytes_of_a_training(data, precision):
    one, two = (trained_weights(data, 1, precision=precision, channels_last=True) for _ in range(2))
    assert one.isfinite().all()
    assert torch.equal(one, two)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_the_fast_copys_logits_and_gradients_are_the_models(pair, data, precision):
    x, y = (t.to(GPU) for t in batch_of(data, 64))
    found = []
    for fast in (False, FastPath(precision=precision)):
        with Victim(pair[1], fast=fast) as victim:
            point = x.clone().requires_grad_()
            logits = victim(point)
            assert logits.dtype == torch.float32
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y), point)
            found.append((logits.detach(), gradient))
            notes = victim.notes
    assert "folded" in notes
    bounds = {"float32": (1e-3, 1e-3), "bfloat16": (0.05, 0.3), "float16": (0.01, 0.1)}[precision]
    for (one, other), bound in zip(zip(*found, strict=True), bounds, strict=True):
        assert (one - other).norm() / one.norm() < bound


@pytest.mark.parametrize("outer", ["tf32", "autocast"])
def test_a_copy_is_folded_where_the_users_precision_is_low(pair, data, outer):
    """The proof of a folded copy is taken in float32 proper, whatever convolutions or autocast round off outside."""
    x, _ = (t.to(GPU) for t in batch_of(data, 64))
    torch.backends.cudnn.allow_tf32 = outer == "tf32"
    with torch.autocast(GPU, torch.bfloat16, enabled=outer == "autocast"), Victim(pair[1], fast=True) as victim:
        victim(x)
        assert victim.notes.startswith("a copy with 19 BatchNorms folded")
    assert torch.backends.cudnn.allow_tf32 == (outer == "tf32")


def test_the_fast_copy_follows_the_weights(pair, data):
    x, _ = (t.to(GPU) for t in batch_of(data, 64))
    with Victim(pair[1], fast=True) as victim:
        victim(x)
    with torch.no_grad():
        for parameter in pair[1].parameters():
            parameter.mul_(1.1)
    with Victim(pair[1], fast=True) as victim:
        assert torch.allclose(victim(x), pair[1](x), atol=2e-3, rtol=1e-3)


def test_two_streams_at_once_do_not_mix(pair, data):
    parts = [(x.to(GPU), y.to(GPU)) for x, y in (data.test.take(slice(0, 64)), data.test.take(slice(64, 128)))]
    expected = [pgd()(pair[1], x, y) for x, y in parts]
    streams, found = [torch.cuda.Stream(), torch.cuda.Stream()], []
    for stream, (x, y) in zip(streams, parts, strict=True):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found.append(pgd()(pair[1], x, y))
    torch.cuda.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_it_learns_what_the_cpu_would(model, data):
    assert gb.evaluation.accuracy(copy.deepcopy(model).to(GPU), data).value > 0.8


def test_logits_are_the_cpus(pair, data):
    x, _ = batch_of(data)
    with torch.no_grad():
        here, there = pair[0](x), pair[1](x.to(GPU)).cpu()
    assert torch.allclose(here, there, atol=1e-3, rtol=1e-4)


def test_rates_are_the_cpus(pair, data):
    with Victim(pair[0]) as here, Victim(pair[1]) as there:
        assert (predict(here, data.test) == predict(there, data.test.to(GPU))).float().mean() >= 0.995


def test_pgd_does_as_much_harm(pair, data):
    x, y = batch_of(data, 128)
    losses = []
    for net, device in zip(pair, ("cpu", GPU), strict=True):
        moved = pgd(steps=10)(net, x.to(device), y.to(device))
        assert (moved.cpu() - x).abs().max() <= EPS + 1e-6
        with torch.no_grad():
            losses.append(F.cross_entropy(pair[0](moved.cpu()), y).item())
    with torch.no_grad():
        clean = F.cross_entropy(pair[0](x), y).item()
    assert losses[0] > clean + 0.1
    assert losses[1] == pytest.approx(losses[0], rel=0.03)


def test_stochastic_pgd_does_as_much_harm(pair, data):
    attack = gb.attacks.StochasticPGD(eps=20 / 255, probe_starts=0, steps=30, batch_size=64)
    rates = []
    for net in pair:
        found = attack.craft(net, data)
        assert found.delta.device.type == "cpu"
        assert found.delta.abs().max() <= 20 / 255
        rates.append(gb.evaluation.universal_evasion(pair[0], data, found).value)
    clean = 1 - gb.evaluation.accuracy(pair[0], data).value
    assert rates[0] > clean + 0.1
    assert rates[1] == pytest.approx(rates[0], abs=0.08)


def test_a_climb_from_zero_is_the_cpus(pair, data):
    """Three steps of a shared perturbation: the same images in the same order on both."""
    attack = gb.attacks.StochasticPGD(eps=EPS, probe_starts=0, steps=3, batch_size=64, box_gradient="exact")
    here, there = (attack.craft(net, data).delta for net in pair)
    assert ((here - there).abs() > 1e-4).float().mean() < 0.05
    assert here.abs().max() > 0


def objective_value(defense, net, data, device):
    x, y = batch_of(data, 64)
    net.train()
    losses = defense.losses(net, Batch(images=x.to(device), labels=y.to(device), seed=3))
    losses["loss"].backward()
    gradient = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]).cpu()
    return float(losses["loss"].detach()), gradient


@pytest.mark.parametrize(
    ("defense", "bound"),
    [
        (gb.defenses.Standard(), 2e-3),
        (gb.defenses.SharedAdversarial(eps=0.0, sharedness=8), 2e-3),
        (gb.defenses.Jacobian(strength=0.01, estimator="exact"), 2e-2),
    ],
    ids=["standard", "shared, eps 0", "jacobian, exact"],
)
def test_a_training_step_is_the_cpus(pair, data, defense, bound):
    """Objectives without draws of their own: GPU and CPU draw different numbers from one seed."""
    (value, gradient), (other, theirs) = (
        objective_value(defense, net, data, device) for net, device in zip(pair, ("cpu", GPU), strict=True)
    )
    assert other == pytest.approx(value, rel=1e-3)
    assert (theirs - gradient).norm() / gradient.norm() < bound


def test_jacobians_are_the_cpus_whatever_shares_a_backward(pair, data, monkeypatch):
    x, _ = batch_of(data, 16)
    expected = gb.analysis.batch_jacobian(pair[0], x)
    for rows in (1, 3, 64):
        monkeypatch.setattr("gambeson.analysis.jacobian._rows_at_once", lambda point, rows=rows: rows)
        found = gb.analysis.batch_jacobian(pair[1], x.to(GPU)).cpu()
        assert (found - expected).norm() / expected.norm() < 0.02


def test_jacobian_projection_has_the_exact_norm_as_its_mean(pair, data):
    x, y = (t.to(GPU) for t in batch_of(data, 64))
    values = []
    for seed in range(40):
        term = gb.defenses.Jacobian(strength=1.0).terms()["jacobian"][1]
        values.append(float(term(pair[1], Batch(images=x, labels=y, seed=seed)).detach()))
    exact = gb.defenses.Jacobian(strength=1.0, estimator="exact").terms()["jacobian"][1]
    assert sum(values) / 40 == pytest.approx(float(exact(pair[1], Batch(images=x, labels=y, seed=0)).detach()), rel=0.1)


@pytest.mark.parametrize(
    "fast", [False, FastPath(), FastPath(precision="bfloat16")], ids=["plain", "folded", "bfloat16"]
)
def test_same_seed_same_bytes_of_an_attack(pair, data, fast):
    x, y = (t.to(GPU) for t in batch_of(data, 64))
    found = []
    for seed in (5, 5, 6):
        with Victim(pair[1], fast=fast) as victim:
            found.append(pgd(start="uniform")(victim, x, y, seed=seed))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_same_seed_same_bytes_of_a_universal_perturbation(pair, data):
    attack = gb.attacks.StochasticPGD(eps=EPS, probe_starts=2, probe_start_steps=5, steps=10)
    one, two = (attack.craft(pair[1], data, seed=4).delta for _ in range(2))
    assert torch.equal(one, two)


def test_modes_and_flags_come_back(pair, data):
    net = pair[1].train()
    norm = next(m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d))
    norm.eval()
    next(net.parameters()).requires_grad_(False)
    before = [(m.training) for m in net.modules()], [p.requires_grad for p in net.parameters()]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    x, y = (t.to(GPU) for t in batch_of(data))
    with Victim(net, fast=FastPath(precision="bfloat16")) as victim:
        pgd()(victim, x, y)
    assert ([(m.training) for m in net.modules()], [p.requires_grad for p in net.parameters()]) == before
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize(
    "defense",
    [
        gb.defenses.SharedAdversarial(eps=EPS, sharedness=8, steps=2, craft_precision="bfloat16"),
        gb.defenses.UniversalConsistency(eps=EPS),
        gb.defenses.Jacobian(strength=0.01),
    ],
    ids=["shared", "consistency", "jacobian"],
)
def test_memory_does_not_grow_over_fifty_steps(data, defense):
    with seeded(0, "model"):
        net = gb.models.create("resnet20", data).to(GPU)
    how = gb.training.Recipe(epochs=9, batch_size=128, precision="bfloat16", channels_last=True, augment="crop-flip")
    run = Run(net, data, defense, how, 0, None)
    batches = Epoch(run.train, how, 1, 0, 0, run.device)
    net.train()
    used = []
    for k in range(50):
        run.train_step(batches[k % len(batches)])
        if k in (9, 49):
            torch.cuda.synchronize()
            used.append(torch.cuda.memory_allocated())
    assert used[1] <= used[0] + 2**20


def test_memory_of_an_attack_is_given_back(pair, data):
    x, y = (t.to(GPU) for t in batch_of(data, 128))
    used = []
    for _ in range(3):
        with Victim(pair[1], fast=True) as victim:
            pgd()(victim, x, y)
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated())
    assert used[2] <= used[0] + 2**16


def test_an_attack_on_a_side_stream_is_the_same(pair, data):
    x, y = (t.to(GPU) for t in batch_of(data, 64))
    expected = pgd()(pair[1], x, y)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        found = pgd()(pair[1], x, y)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(found, expected)


def test_the_users_autocast_does_not_break_an_attack(pair, data):
    x, y = (t.to(GPU) for t in batch_of(data, 128))
    with torch.autocast(GPU, torch.bfloat16):
        moved = pgd(steps=10)(pair[1], x, y)
    plain = pgd(steps=10)(pair[1], x, y)
    assert moved.dtype == torch.float32
    assert (moved - x).abs().max() <= EPS + 1e-6
    with torch.no_grad():
        clean, under, usual = (F.cross_entropy(pair[1](z), y).item() for z in (x, moved, plain))
    assert under - clean > 0.9 * (usual - clean) > 0.05


def test_channels_last_changes_rounding_only(pair, data):
    x, y = (t.to(GPU) for t in batch_of(data, 64))
    other = copy.deepcopy(pair[1]).to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.allclose(pair[1](x), other(x.contiguous(memory_format=torch.channels_last)), atol=1e-3, rtol=1e-3)
    with Victim(other, fast=True) as victim:
        moved = pgd()(victim, x, y)
        assert "channels last" in victim.notes
    assert moved.shape == x.shape
    assert (moved - x).abs().max() <= EPS + 1e-6


def test_controls_and_uer_on_the_device(pair, data):
    test = data.test.to(GPU)
    with Victim(pair[1]) as victim:
        found = gb.evaluation.universal.control_rates(victim, test, Ball(eps=EPS), 0)
    with Victim(pair[0]) as victim:
        expected = gb.evaluation.universal.control_rates(victim, data.test, Ball(eps=EPS), 0)
    for one, other in zip(found, expected, strict=True):
        assert one.mean == pytest.approx(other.mean, abs=0.01)


def test_a_finished_run_can_be_read_on_the_cpu(data, tmp_path):
    run = gb.training.TrainRun(
        data="patterns", model="resnet20", defense=gb.defenses.Standard(), device=GPU,
        recipe=gb.training.Recipe(epochs=1, batch_size=128),
    )  # fmt: skip
    trained = gb.training.run_training(run, tmp_path / "run", data)
    loaded = gb.models.load(tmp_path / "run")
    x, _ = batch_of(data)
    with torch.no_grad():
        assert torch.allclose(trained.eval()(x.to(GPU)).cpu(), loaded(x), atol=1e-3, rtol=1e-3)


def test_a_compiled_copy_differs_by_rounding_and_has_graphs(pair, data):
    x, y = (t.to(GPU) for t in batch_of(data, 64))
    found = []
    for compile in (False, True):
        with Victim(pair[1], fast=FastPath(compile=compile)) as victim:
            found.append(pgd(steps=1, rel_step_size=1.0)(victim, x, y) - x)
            pgd()(victim, x, y)
            assert ("compiled" in victim.notes, "not compiled" in victim.notes) == (compile, False)
            assert victim._copy.graphs.refused is None
            assert len(victim._copy.graphs) == 1 + compile
    assert ((found[0] - found[1]).abs() > 1e-4).float().mean() < 0.005


class Habit(torch.nn.Module):
    """A net that does in its forward what a graph cannot repeat."""

    def __init__(self, net, habit):
        super().__init__()
        self.net, self.habit = net, habit

    def forward(self, images):
        if self.habit == "waits" and float(images.max()) > 2:
            return self.net(images) * 0
        if self.habit == "draws":
            return self.net(images + 0.01 * torch.randn_like(images))
        if self.habit == "counts":
            self.calls = getattr(self, "calls", 0) + 1
        if self.habit == "synchronises":
            torch.cuda.synchronize()
        return self.net(images)


@pytest.mark.parametrize("habit", ["waits", "draws", "counts", "synchronises"])
@pytest.mark.filterwarnings("ignore:gradients are computed without")
def test_what_a_graph_cannot_repeat_is_computed_as_before(pair, data, monkeypatch, habit):
    net = Habit(pair[1], habit)
    x, y = (t.to(GPU) for t in batch_of(data, 64))
    attack = pgd(steps=8, eot_samples=1 if habit == "draws" else None)
    with Victim(net, fast=True) as victim:
        found = attack(victim, x, y, seed=2)
        assert victim._copy.graphs.refused is not None
        assert len(victim._copy.graphs) == 0
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    eager(monkeypatch)
    with Victim(net, fast=True) as victim:
        assert torch.equal(attack(victim, x, y, seed=2), found)
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    assert torch.rand(8, device=GPU).isfinite().all()


def test_recurrent_and_attending_models_are_attacked_audited_and_regularised(data):
    """cuDNN has a gradient of recurrent layers in training mode only, and no second one; nor has fused attention."""

    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = torch.nn.LSTM(3 * SIDE, 24, num_layers=2, dropout=0.3, batch_first=True)
            self.attend, self.out = torch.nn.MultiheadAttention(24, 3, batch_first=True), torch.nn.Linear(24, 10)

        def forward(self, x):
            rows = self.rnn(x.transpose(1, 2).flatten(2))[0]
            return self.out(self.attend(rows, rows, rows, need_weights=False)[0].mean(1))

    with seeded(0, "model"):
        net = Odd().to(GPU)
    history = gb.train(
        net, data, gb.defenses.Jacobian(strength=1e-3), epochs=2, batch_size=64, optimizer="adam", lr=0.01
    )
    assert history[-1]["loss"] < history[0]["loss"]
    x, y = data.test.take(slice(0, 64), GPU)
    moved = gb.attacks.PGD(eps=EPS, steps=5)(net, x, y)
    there = gb.attacks.PGD(eps=EPS, steps=5)(copy.deepcopy(net).cpu(), x.cpu(), y.cpu())
    assert float((moved.cpu() == there).float().mean()) > 0.9

"""Models in every form that people have them in: each gives the numbers of the plain module, or one sentence."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import utils
from torch.utils.checkpoint import checkpoint

import gambeson as gb
from gambeson.base import default_dtype
from gambeson.data import Split
from gambeson.models import load, save
from gambeson.models.export import export
from gambeson.victim import Victim, copied
from tests.conftest import full, quickly

# People have what torch calls deprecated: torch.jit, and the first weight norm.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")

SHAPE, CLASSES = (2, 6, 6), 4
EPS = 0.12


def pictures(count, seed, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=draw)
    patterns = torch.rand(CLASSES, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    noise = torch.rand(count, *SHAPE, generator=draw, dtype=torch.float32)
    return (0.5 * patterns[labels] + 0.5 * noise).to(dtype), labels


TRAIN, TEST = pictures(384, 1), pictures(96, 2)


def data():
    return Split("patterns", *TRAIN, tuple("abcd"))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.hidden, self.out = nn.Linear(54, 24), nn.Linear(24, CLASSES)

    def features(self, x):
        return F.max_pool2d(F.relu(self.norm(self.conv(x))), 2).flatten(1)

    def head(self, h):
        return self.out(F.relu(self.hidden(h)))

    def forward(self, x):
        return self.head(self.features(x))


class Checkpointed(Net):
    reentrant = False

    def forward(self, x):
        return checkpoint(self.head, self.features(x), use_reentrant=self.reentrant)


class Reentrant(Checkpointed):
    reentrant = True


class Overwriting(Net):
    def forward(self, x):
        return super().forward(x.sub_(0.25).add(0.25))


class InPlaceInside(Net):
    def features(self, x):
        return F.max_pool2d(self.norm(self.conv(x)).mul_(1.0).relu_(), 2).flatten(1)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Conv2d(2, 12, 2, 2), nn.Linear(12, CLASSES)
        self.attend = nn.MultiheadAttention(12, 3, batch_first=True)

    def forward(self, x):
        tokens = self.embed(x).flatten(2).mT
        return self.out(self.attend(tokens, tokens, tokens, need_weights=False)[0].mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(12, 16, num_layers=2, dropout=0.4, batch_first=True, bidirectional=True)
        self.out = nn.Linear(32, CLASSES)

    def forward(self, x):
        return self.out(self.rnn(x.permute(0, 2, 1, 3).flatten(2))[0][:, -1])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.Linear(72, 72), nn.Linear(72, 72), nn.Linear(72, CLASSES)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.out(F.relu(self.two(F.relu(self.one(x.flatten(1))))))


def fitted(model):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        step = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(40):
            step.zero_grad()
            F.cross_entropy(model(TRAIN[0].clone()), TRAIN[1]).backward()
            step.step()
    return model.eval()


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    return fitted(Net())


def twin(kind):
    """A maker of the same net in another class."""

    def make(plain):
        model = kind()
        model.load_state_dict(plain.state_dict())
        return model.eval()

    return make


def program(plain):
    sizes = ({0: torch.export.Dim("n", min=1)},)
    return torch.export.export(copy.deepcopy(plain), (TEST[0][:3],), dynamic_shapes=sizes).module()


SAME = {
    "scripted": lambda plain: torch.jit.script(copy.deepcopy(plain)),
    "traced": lambda plain: torch.jit.trace(copy.deepcopy(plain), TEST[0][:3]),
    "frozen program": lambda plain: torch.jit.freeze(torch.jit.script(copy.deepcopy(plain))),
    "exported": program,
    "compiled": lambda plain: torch.compile(copy.deepcopy(plain), backend="eager", dynamic=True),
    "data parallel": lambda plain: nn.DataParallel(copy.deepcopy(plain)),
    "double": lambda plain: copy.deepcopy(plain).double(),
    "checkpointed": twin(Checkpointed),
    "in place inside": twin(InPlaceInside),
    "writes its input": twin(Overwriting),
}
ATTACKS = {
    "pgd": gb.attacks.PGD(eps=EPS, steps=8),
    "fgsm": gb.attacks.FGSM(eps=EPS),
    "auto-pgd": gb.attacks.AutoPGD(eps=EPS, steps=12),
}


def accuracy(model, images):
    with Victim(model) as victim:
        victim.inspect(images)
        right = victim.forward_original(images).argmax(1) == TEST[1]
        return int(right.sum())


@pytest.mark.parametrize("form", quickly(SAME, *(one for one in SAME if one != "compiled")))
def test_attacks_find_in_every_form_what_they_find_in_the_module(form, plain):
    model, (x, y) = SAME[form](plain), TEST
    for name, attack in ATTACKS.items():
        moved, expected = attack(model, x, y), attack(plain, x, y)
        assert accuracy(plain, expected) < accuracy(plain, x) - 15, name
        assert moved.dtype == x.dtype
        assert abs(accuracy(plain, moved) - accuracy(plain, expected)) <= 2, name
        assert accuracy(model, moved) == accuracy(plain, moved), name
    universal = gb.attacks.StochasticPGD(eps=0.3, steps=12, batch_size=64, restarts=1, probe_starts=0)
    found, expected = universal.craft(model, data()), universal.craft(plain, data())
    test = Split("test", *TEST, tuple("abcd"))
    rate = gb.evaluation.universal_evasion(model, test, found).value
    assert abs(rate - gb.evaluation.universal_evasion(plain, test, expected).value) <= 1 / 96
    assert rate > 1 - gb.evaluation.accuracy(plain, test).value + 0.1


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_models_are_attacked_as_they_are_and_not_trained(kind, plain):
    model, (x, y) = copy.deepcopy(plain).to(kind), TEST
    for images in (x, x.to(kind)):
        moved = ATTACKS["pgd"](model, images, y)
        assert moved.dtype == images.dtype
        # Of 96, all right before.
        assert abs(accuracy(model, moved) - accuracy(plain, ATTACKS["pgd"](plain, x, y))) <= 10
        assert float((moved - images).abs().max()) <= EPS + torch.finfo(moved.dtype).eps
    with Victim(model) as victim:
        assert victim.forward_original(x).dtype == torch.float32
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(gb.UserError, match="small steps are lost"):
        gb.train(model, data(), gb.defenses.Standard(), epochs=1)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_double_precision_is_trained_and_scored_in_double():
    torch.manual_seed(0)
    single = Net()
    double = copy.deepcopy(single).double()
    for model in (single, double):
        gb.train(model, data(), gb.defenses.PGDAdversarial(eps=0.02), epochs=2, batch_size=64, lr=0.05)
    assert double.conv.weight.dtype == torch.float64
    assert torch.allclose(single.conv.weight, double.conv.weight.float(), atol=1e-3)
    assert not torch.equal(single.conv.weight, double.conv.weight.float())
    near = nn.Linear(72, 2).double()
    near.weight.data.zero_()
    near.bias.data = torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64)  # equal in float32
    with Victim(nn.Sequential(nn.Flatten(), near)) as victim:
        assert victim.forward_original(TEST[0]).argmax(1).all()


def test_most_weights_decide_the_type():
    model = Net()
    model.temperature = nn.Parameter(torch.ones(1, dtype=torch.float64))
    with Victim(model.eval()) as victim:
        assert victim.dtype == torch.float32
        assert victim(TEST[0]).dtype == torch.float32


def test_the_callers_default_type_changes_no_number(plain):
    x, y = TEST

    def numbers():
        universal = gb.attacks.StochasticPGD(eps=EPS, steps=6, probe_starts=2, probe_start_steps=3, restarts=2)
        torch.manual_seed(0)
        model = copy.deepcopy(plain)
        history = gb.train(model, data(), gb.defenses.Jacobian(strength=0.1), epochs=1, augment="crop", ema=0.9)
        square = gb.attacks.create("square", eps=EPS, queries=30)
        return [
            *(attack(plain, x, y) for attack in (*ATTACKS.values(), square)),
            universal.craft(plain, data()).delta,
            model.conv.weight.detach(),
            torch.tensor([history[-1]["loss"]], dtype=torch.float64),
        ]

    expected = numbers()
    with default_dtype(torch.float64):
        found = numbers()
    for one, other in zip(expected, found, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_a_forward_sees_the_callers_default_type():
    class Fresh(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(72, CLASSES)

        def forward(self, x):
            return self.out(x.flatten(1) @ torch.eye(72))  # of the default type, as the weights are

    with default_dtype(torch.float64):
        moved = ATTACKS["pgd"](Fresh().eval(), *TEST)
    assert moved.dtype == torch.float32


DEFENSES = {
    "pgd": gb.defenses.PGDAdversarial(eps=0.02),
    "shared": gb.defenses.SharedAdversarial(eps=0.05, sharedness=8),
    "jacobian": gb.defenses.Jacobian(strength=0.05),
    "learn2perturb": gb.defenses.Learn2Perturb(eps=0.02),
}
NORMED = {
    "weight_norm": utils.weight_norm,
    "spectral_norm": utils.spectral_norm,
    "parametrized weight_norm": utils.parametrizations.weight_norm,
    "parametrized spectral_norm": utils.parametrizations.spectral_norm,
}


def normed(wrap):
    model = Net()
    model.conv, model.hidden = wrap(model.conv), wrap(model.hidden)
    return model


TRAINED = {
    **{name: (lambda wrap=wrap: normed(wrap)) for name, wrap in NORMED.items()},
    "attending": Attending,
    "recurrent": Recurrent,
    "tied": Tied,
    "double": lambda: Net().double(),
    "checkpointed": Checkpointed,
    "in place inside": InPlaceInside,
    "data parallel": lambda: nn.DataParallel(Net()),
    "compiled": lambda: torch.compile(Net(), backend="eager", dynamic=True),
    "scripted": lambda: torch.jit.script(Net()),
}


NO_CONVOLUTION = "no convolution for feature noise"
NOISELESS = {
    "recurrent": NO_CONVOLUTION,
    "tied": NO_CONVOLUTION,
    "parametrized weight_norm": NO_CONVOLUTION,
    "parametrized spectral_norm": NO_CONVOLUTION,
    "scripted": "takes no hooks",
    "checkpointed": "turn that off",
}


@pytest.mark.parametrize("form", quickly(TRAINED, "recurrent", "attending", "compiled", "data parallel"))
def test_defences_train_every_form_or_say_why_not(form, tmp_path, stand_in):
    options = {"epochs": 2, "batch_size": 48, "optimizer": "adam", "lr": 0.01, "schedule": "constant", "ema": 0.9}
    for name, defense in DEFENSES.items():
        torch.manual_seed(0)
        model = TRAINED[form]()
        first = copy.deepcopy(model.state_dict())
        if name == "learn2perturb" and form in NOISELESS:
            with pytest.raises(gb.UserError, match=NOISELESS[form]):
                gb.train(model, data(), defense, **options)
            continue
        history = gb.train(model, data(), defense, **options)
        changed = [key for key, value in model.state_dict().items() if not torch.equal(first.get(key, value), value)]
        assert len(changed) > len(first) / 2, name
        assert history[-1]["loss"] < history[0]["loss"], name
    torch.manual_seed(0)
    whole, cut = TRAINED[form](), None
    torch.manual_seed(0)
    cut = TRAINED[form]()
    gb.train(whole, data(), gb.defenses.Standard(), **options)
    gb.train(cut, data(), gb.defenses.Standard(), **options | {"epochs": 1}, out=tmp_path)
    gb.train(cut, data(), gb.defenses.Standard(), **options, out=tmp_path)
    for one, other in zip(whole.state_dict().values(), cut.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_spectral_norms_of_a_moving_average_are_one():
    """The mean of unit vectors is shorter than one, which would make the averaged weights too long."""
    torch.manual_seed(0)
    model = normed(utils.spectral_norm)
    gb.train(model, data(), gb.defenses.Standard(), epochs=2, batch_size=32, lr=0.2, ema=0.95)
    vector = model.hidden.weight_u
    assert float(vector.norm()) == pytest.approx(1, abs=1e-5)
    running = [value for name, value in model.named_buffers() if name.endswith("running_var")]
    assert all(not torch.equal(value, torch.ones_like(value)) for value in running)


def test_copies_of_models_that_hold_computed_weights():
    model = normed(utils.weight_norm)
    model(TRAIN[0]).sum().backward()  # its weight now has a graph
    with pytest.raises(RuntimeError):
        copy.deepcopy(model)
    other = copied(model)
    with torch.no_grad():
        other.conv.weight_v.add_(1)
        other.conv.bias.add_(1)
    assert not torch.equal(other.eval()(TEST[0]), model.eval()(TEST[0]))
    script = copied(torch.jit.script(Net()))
    assert all(parameter.is_leaf for parameter in script.parameters())


REFUSED = {
    "lazy": (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(CLASSES)), "lazy layers", "lazy layers"),
    "reentrant": (Reentrant, "use_reentrant=True", "use_reentrant=True"),
    "a list": (lambda: [nn.Conv2d(1, 1, 1), 3], "expected a torch.nn.Module", "is a list"),
    "frozen program": (lambda: torch.jit.freeze(torch.jit.script(Net().eval())), None, "no weights that require"),
    "exported": (lambda: program(Net().eval()), None, "exported program"),
    "writes its input": (Overwriting, None, "changes its input in place"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_cannot_be_done_is_said_before_any_work(form, tmp_path):
    make, attacked, trained = REFUSED[form]
    if attacked is not None:
        for attack in ATTACKS.values():
            with pytest.raises(gb.UserError, match=attacked):
                attack(make(), *TEST)
    out = tmp_path / "run"
    with pytest.raises(gb.UserError, match=trained):
        gb.train(make(), data(), gb.defenses.PGDAdversarial(eps=0.02), epochs=1, out=out)
    assert not out.exists()


def test_an_operation_without_second_derivatives_is_named():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return gradient * ctx.saved_tensors[0].cos()

    class Odd(Net):
        def features(self, x):
            return Once.apply(super().features(x))

    for settings in ({}, {"estimator": "input"}):
        with pytest.raises(gb.UserError, match="finite-difference"):
            gb.train(Odd(), data(), gb.defenses.Jacobian(**settings), epochs=1, batch_size=48)
    cheap = gb.defenses.Jacobian(estimator="input", derivative="finite-difference")
    gb.train(Odd(), data(), cheap, epochs=1, batch_size=48)  # as advised


def test_second_derivatives_of_attention_are_those_of_the_formula():
    """The norm of the Jacobian through fused attention equals that by explicit rows."""
    torch.manual_seed(0)
    model = Attending().eval()
    x = TEST[0][:5].clone().requires_grad_()
    rows = torch.stack([torch.autograd.grad(model(x)[:, k].sum(), x)[0] for k in range(CLASSES)])
    exact = rows.square().flatten(2).sum((0, 2)).mean() / 2
    term = gb.defenses.Jacobian(estimator="exact")._norm
    value = term(model, gb.defenses.Batch(images=TEST[0][:5], labels=TEST[1][:5], seed=0))
    assert float(value.detach()) == pytest.approx(float(exact.detach()), rel=1e-4)
    value.backward()
    assert model.attend.in_proj_weight.grad.abs().sum() > 0


@pytest.mark.parametrize("form", ["exported", *map(full, ("attending", "double", "recurrent", "tied", "weight_norm"))])
def test_a_quick_audit_of_it_ends(form, plain):
    suite = gb.auditing.SUITES["quick"].model_copy(
        update={
            "eps": (0.15,),
            "universal_steps": 10,
            "universal_queries": 1000,
            "edits": (),
            "test_images": 60,
            "validation_images": 40,
        }
    )
    model = SAME[form](plain) if form in SAME else fitted(TRAINED[form]())
    found = gb.audit(model, data(), suite=suite).results
    assert found.clean.value > 0.5
    assert found.universal[0].uer.value >= 1 - found.clean.value - 0.05


def test_tied_weights_are_saved_and_stay_tied(tmp_path):
    file = tmp_path / "net.py"
    file.write_text(
        "from torch import nn\n"
        "def net(in_channels, classes, image_size):\n"
        "    one = nn.Linear(72, 72)\n"
        "    two = nn.Linear(72, 72)\n"
        "    two.weight = one.weight\n"
        "    return nn.Sequential(nn.Flatten(), one, nn.ReLU(), two, nn.ReLU(), nn.Linear(72, classes))\n"
    )
    model = gb.models.create(f"{file}:net", in_channels=2, classes=CLASSES, image_size=6, seed=5)
    save(model, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors")
    assert torch.equal(again(TEST[0]), model.eval()(TEST[0]))
    assert again.body[1].weight is again.body[3].weight
    for to in ("safetensors", "torch-export"):
        export(model, tmp_path / f"out-{to}", to)
    exported = torch.export.load(tmp_path / "out-torch-export").module()
    assert torch.allclose(exported(TEST[0]), model(TEST[0]), atol=1e-5)


def test_models_of_a_seed_are_those_that_training_starts_from(digits):
    one, other, third = (gb.models.create("lenet5", digits, seed=seed) for seed in (7, 7, 8))
    weights = [torch.cat([value.flatten() for value in model.parameters()]) for model in (one, other, third)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    with torch.random.fork_rng():
        torch.manual_seed(1)
        state = torch.get_rng_state()
        gb.models.create("lenet5", digits, seed=7)
        assert torch.equal(state, torch.get_rng_state())


def test_training_that_stays_at_chance_says_so():
    with pytest.warns(UserWarning, match="has not learnt"):
        gb.train(Net(), data(), gb.defenses.Standard(), epochs=1, lr=1e-9)

"""What the inspection of a model sees, and what follows from it."""

import contextlib

import pytest
import torch
from torch import nn

import gambeson as gb
from gambeson import UserError
from gambeson.attacks import FGSM, PGD, StochasticPGD
from gambeson.victim import Victim, inspect_model
from tests.conftest import LinearNet, inner_images


def net(inputs=6, classes=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, classes))


class Noisy(nn.Module):
    """Logits +-(w + noise) . x, the noise drawn for each image or once for the batch."""

    def __init__(self, w, size, shared=False):
        super().__init__()
        self.register_buffer("w", w)
        self.size, self.shared, self.calls = size, shared, 0

    def forward(self, x):
        self.calls += 1
        flat = x.flatten(1)
        noise = torch.randn_like(flat[:1] if self.shared else flat) * self.size
        value = ((self.w + noise) * flat).sum(1)
        return torch.stack([value, -value], 1)


def test_inspection_tells_random_from_repeatable_models():
    x = torch.rand(4, 1, 2, 3)
    assert not inspect_model(net(), x).stochastic
    own, shared = (inspect_model(Noisy(torch.ones(6), 0.1, shared), x) for shared in (False, True))
    assert (own.stochastic, own.shared) == (True, False)
    assert (shared.stochastic, shared.shared) == (True, True)
    state = torch.get_rng_state()
    inspect_model(Noisy(torch.ones(6), 0.1), x)
    assert torch.equal(state, torch.get_rng_state())


def test_a_deterministic_attack_on_a_random_model_refuses():
    x, y = inner_images(2, (1, 2, 3)), torch.tensor([0, 1])
    with pytest.raises(UserError, match="the model is random .* set eot_samples=20"):
        PGD(eps=0.1)(Noisy(torch.ones(6), 0.5), x, y)
    assert PGD(eps=0.1, eot_samples=1)(Noisy(torch.ones(6), 0.5), x, y).shape == x.shape


@pytest.mark.parametrize("shared", [False, True])
def test_averaging_over_draws_finds_what_one_draw_misses(shared):
    """The best perturbation is -eps sign(w); a single draw has the noise's signs, many have those of w."""
    w = torch.linspace(-1, 1, 64)
    x, y = inner_images(8, (1, 8, 8)), torch.zeros(8, dtype=torch.long)

    def reached(draws):
        moved = FGSM(eps=0.05, loss="margin", eot_samples=draws)(Noisy(w, 3.0, shared), x, y, seed=1)
        return float(-((moved - x).flatten(1) @ w).mean() / (0.05 * w.abs().sum()))

    assert reached(1) < 0.6
    assert reached(400) > 0.95


def test_draws_are_counted_and_made_in_one_forward_where_they_can():
    x, y = inner_images(3, (1, 2, 3)), torch.zeros(3, dtype=torch.long)
    for shared, calls in ((False, 1), (True, 5)):
        model = Noisy(torch.ones(6), 0.1, shared)
        with Victim(model) as victim:
            victim.inspect(x)
            looked = model.calls
            PGD(eps=0.1, steps=2, eot_samples=5)(victim, x, y)
            assert (victim.forwards, victim.backwards) == (30, 30)
            assert model.calls - looked == 2 * calls


def test_draws_of_a_repeatable_model_change_nothing():
    x, y = inner_images(3, (1, 2, 3)), torch.tensor([0, 1, 2])
    one, many = (FGSM(eps=0.1, eot_samples=draws)(net(), x, y) for draws in (None, 7))
    assert torch.equal(one, many)


def test_same_seed_same_draws(trained, digits):
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = trained

        def forward(self, x):
            return self.model(nn.functional.dropout(x, 0.2, training=True))

    x, y = digits.test.take(slice(0, 20), "cpu")
    first, second, other = (PGD(eps=0.1, steps=3, eot_samples=4)(Dropped(), x, y, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_probabilities_are_refused_with_the_way_out():
    model = nn.Sequential(net(), nn.Softmax(1))
    x, y = inner_images(4, (1, 2, 3)), torch.tensor([0, 1, 2, 0])
    with pytest.raises(UserError, match="sum to 1: expected logits.*as_logits"):
        PGD(eps=0.1)(model, x, y)
    fixed, plain = (FGSM(eps=0.1)(m, x, y) for m in (gb.models.as_logits(model), net()))
    torch.testing.assert_close(fixed, plain)
    data = (torch.rand(40, 1, 2, 3), torch.arange(40) % 3)
    with pytest.raises(UserError, match="sum to 1"):
        StochasticPGD(eps=0.1, steps=2, restarts=1).craft(model, data)
    keyed = gb.models.as_logits(Keyed(net()), "scores")
    torch.testing.assert_close(FGSM(eps=0.1)(keyed, x, y), plain)
    with pytest.raises(UserError, match="keys scores"):
        gb.models.as_logits(Keyed(net()), "answers")(x)


class Ending(nn.Module):
    """A network whose output is reshaped or mapped at its end."""

    def __init__(self, model, end):
        super().__init__()
        self.model, self.end = model, end

    def forward(self, x):
        return self.end(self.model(x))


def difference(z):
    return z[:, 1:] - z[:, :1]


@pytest.mark.parametrize(
    ("maps", "end", "name"),
    [
        (False, difference, "one-logit"),
        (False, lambda z: difference(z).flatten(), "one-logit"),
        (True, difference, "one-logit"),
        (True, lambda z: difference(z).squeeze(1), "one-logit"),
        (False, lambda z: difference(z).sigmoid(), "sigmoid"),
        (False, lambda z: difference(z).sigmoid().squeeze(1), "sigmoid"),
        (True, lambda z: difference(z).sigmoid().squeeze(1), "sigmoid"),
        (False, lambda z: z.softmax(1), "probabilities"),
        (True, lambda z: z.softmax(1), "probabilities"),
        (False, lambda z: 1.0003 * z.softmax(1), "probabilities"),  # sums of weights, which rounding leaves above 1
        (False, lambda z: z.log_softmax(1), None),  # is its own logits
    ],
)
def test_a_binary_net_of_any_output_is_attacked_as_its_two_logits_are(maps, end, name):
    torch.manual_seed(0)
    two = nn.Conv2d(1, 2, 3, padding=1) if maps else net(64, 2)
    x = inner_images(4, (1, 8, 8))
    y = (x[:, 0] > 0.5).long() if maps else torch.tensor([0, 1, 1, 0])
    attacks = [FGSM(eps=0.1), PGD(eps=0.1, steps=3, loss="margin")]
    model = Ending(two, end)
    for attack in attacks:
        expected = attack(two, x, y)
        assert not torch.equal(expected, x)
        if name is None:
            torch.testing.assert_close(attack(model, x, y), expected)
            continue
        with pytest.raises(UserError, match=f"as_logits.*'{name}'"):
            attack(model, x, y)
        torch.testing.assert_close(attack(gb.models.as_logits(model, name), x, y), expected)
    assert torch.equal(gb.models.as_logits(model, name)(x).argmax(1) if name else model(x).argmax(1), two(x).argmax(1))


def test_sigmoids_of_several_classes_are_told_from_small_logits():
    model = net()
    with torch.no_grad():
        model[1].weight.mul_(0.1).abs_()
        model[1].bias.fill_(0.1)
    x, y = inner_images(4, (1, 2, 3)), torch.tensor([0, 1, 2, 0])
    assert 0 < float(model(x).min()) < float(model(x).max()) < 1
    expected = FGSM(eps=0.1, loss="margin")(model, x, y)  # small logits are logits
    squashed = nn.Sequential(*model, nn.Sigmoid(), nn.Unflatten(1, (3, 1)), nn.Flatten())
    with pytest.raises(UserError, match="by a sigmoid: .*as_logits"):
        FGSM(eps=0.1)(squashed, x, y)
    assert gb.evaluation.accuracy(squashed, (x, y)) == gb.evaluation.accuracy(model, (x, y))
    moved = FGSM(eps=0.1, loss="margin")(gb.models.as_logits(squashed, "sigmoid"), x, y)
    torch.testing.assert_close(moved, expected)
    with pytest.raises(UserError, match=r"shape \(4, 3\): expected one logit per image"):
        gb.models.as_logits(model, "one-logit")(x)


def test_logits_that_do_not_fit_the_labels_are_refused_with_the_way_out():
    x, y = inner_images(4, (1, 8, 8)), torch.tensor([0, 1, 1, 0])
    maps = (x[:, 0] > 0.5).long()
    unpadded = nn.Conv2d(1, 2, 2)
    with pytest.raises(UserError, match=r"shape \(2, 7, 7\) per image.*interpolate"):
        PGD(eps=0.1)(unpadded, x, maps)
    with pytest.raises(UserError, match=r"flatten\(1\)"):
        PGD(eps=0.1)(nn.Sequential(unpadded, nn.AdaptiveAvgPool2d(1)), x, y)
    with pytest.raises(UserError, match="a model of one task"):
        PGD(eps=0.1)(net(64, 2), x, maps)
    large = nn.Upsample(scale_factor=2)
    with Victim(nn.Conv2d(1, 2, 1)) as victim:  # looked at again where the size of the images is another
        for images in (x, large(x)):
            assert PGD(eps=0.1)(victim, images, (images[:, 0] > 0.5).long()).shape == images.shape


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (lambda z: z[:, :1], "one-logit"),
        (lambda z: z.softmax(1), "probabilities"),
        (lambda z: z[:, :2], "labels reach from 0 to 2, but there are 2 classes"),
    ],
)
def test_training_refuses_what_it_would_train_in_vain(end, words):
    data = (torch.rand(40, 1, 2, 3), torch.arange(40) % 3)
    with pytest.raises(UserError, match=words):
        gb.train(Ending(net(), end), data, gb.defenses.Standard(), epochs=1, batch_size=4)


def test_a_perturbation_is_not_broadcast_to_images_of_another_shape():
    data = (torch.rand(40, 1, 4, 4), torch.arange(40) % 3)
    found = StochasticPGD(eps=0.1, steps=2, restarts=1, probe_starts=0).craft(net(16), data)
    colour = torch.rand(5, 3, 4, 4)
    for images, words in ((colour, "expected images of its shape"), (torch.zeros(2, 1, 4, 4).byte(), "uint8")):
        with pytest.raises(UserError, match=words):
            found.apply(images)
    with pytest.raises(UserError, match="the perturbation is for images of"):
        gb.evaluation.universal_evasion(net(48), (colour, torch.arange(5) % 3), found)


class Holder:
    def __init__(self, logits):
        self.logits = logits


OUTPUTS = {
    "mapping": lambda z: {"out": z, "aux": -z},
    "object": Holder,
    "tuple": lambda z: (z, -z),
    "list": lambda z: [z],
    "double": lambda z: z.double(),
    "unknown key": lambda z: {"scores": z},
    "nothing": lambda z: None,
    "array": lambda z: z.detach().numpy(),
    "number": lambda z: z.sum().item(),
    "one value": lambda z: z.mean(),
    "classes": lambda z: z.argmax(1),
    "whole numbers": lambda z: (z * 10).long(),
    "complex": lambda z: z + 0j,
    "NaN": lambda z: z * torch.nan,
    "transposed": lambda z: z.T,
    "one row": lambda z: z[:1],
    "no class": lambda z: z[:, :0],
    "five axes": lambda z: z[:, :, None, None, None],
    "text": lambda z: "cat",
}
ENTRIES = {
    "pgd": lambda m, x, y: PGD(eps=0.1, steps=2)(m, x, y),
    "deepfool": lambda m, x, y: gb.attacks.DeepFool(eps=0.1)(m, x, y),
    "square": lambda m, x, y: gb.attacks.Square(eps=0.1, queries=9)(m, x, y),
    "universal": lambda m, x, y: StochasticPGD(eps=0.1, steps=2, probe_starts=0).craft(m, (x, y)).delta,
    "accuracy": lambda m, x, y: gb.evaluation.accuracy(m, (x, y)),
    "norms": lambda m, x, y: gb.analysis.jacobian_norms(m, (x, y)),
    "jacobian": lambda m, x, y: gb.analysis.batch_jacobian(m, x),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_output_of_any_kind_is_read_or_refused(entry):
    x, y = torch.rand(40, 1, 2, 3, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3
    expected = ENTRIES[entry](net(), x, y)
    for kind, end in OUTPUTS.items():
        model = Ending(net(), end)
        if kind in ("mapping", "object", "tuple", "list"):
            found = ENTRIES[entry](model, x, y)
            same = torch.equal(found, expected) if isinstance(found, torch.Tensor) else found == expected
            assert same, kind
        elif kind != "double" and (entry, kind) != ("square", "whole numbers"):
            with pytest.raises(UserError):
                ENTRIES[entry](model, x, y)
        else:
            with contextlib.suppress(UserError):
                ENTRIES[entry](model, x, y)


@pytest.mark.parametrize("kind", OUTPUTS)
def test_training_takes_logits_alone_and_says_how_to_get_them(kind):
    data = (torch.rand(40, 1, 2, 3), torch.arange(40) % 3)
    settings = {"epochs": 1, "batch_size": 4}
    for name in ("standard", "trades", "jacobian"):
        defense = gb.defenses.create(name, **({"eps": 0.1} if name == "trades" else {}))
        if kind == "double":
            gb.train(Ending(net(), OUTPUTS[kind]), data, defense, **settings)
            continue
        with pytest.raises(UserError, match="as_logits" if kind in ("mapping", "object", "tuple", "list") else None):
            gb.train(Ending(net(), OUTPUTS[kind]), data, defense, **settings)
    for found, key in (("mapping", "out"), ("object", "logits"), ("tuple", "0"), ("unknown key", "scores")):
        if found == kind:
            assert gb.train(gb.models.as_logits(Ending(net(), OUTPUTS[kind]), key), data, defense, **settings)


class Keyed(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return {"scores": self.model(x)}


def test_a_model_that_writes_into_its_input_changes_nothing_of_ours():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = LinearNet(torch.eye(6)[:3])

        def forward(self, x):
            return self.model(x.sub_(0.5).mul_(2))

    class Same(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = LinearNet(torch.eye(6)[:3])

        def forward(self, x):
            return self.model((x - 0.5) * 2)

    x, y = inner_images(4, (1, 2, 3)), torch.tensor([0, 1, 2, 0])
    kept = x.clone()
    assert torch.equal(PGD(eps=0.1)(Writes(), x, y), PGD(eps=0.1)(Same(), x, y))
    assert torch.equal(x, kept)


def test_wrong_shapes_are_named():
    with pytest.raises(UserError, match=r"given 4 images and returned shape \(6,\)"):
        PGD(eps=0.1)(Flat(), inner_images(4, (1, 2, 3)), torch.zeros(4, dtype=torch.long))


class Flat(nn.Module):
    def forward(self, x):
        return x.mean(0).flatten()


def test_a_wrong_word_for_the_outputs_is_told_from_their_values():
    x = torch.rand(10, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    logit = nn.Sequential(nn.Flatten(), nn.Linear(16, 1))
    nn.init.constant_(logit[1].weight, 0.5)
    for word in ("sigmoid", "probabilities"):
        with pytest.raises(UserError, match=rf"outputs reach from .* to .*: expected {word} in \[0, 1\]"):
            gb.models.as_logits(logit, word)(x)
    with pytest.warns(UserWarning, match="name `sigmoid`, not `one-logit`"):
        gb.models.as_logits(nn.Sequential(logit, nn.Sigmoid()), "one-logit")(x)


@pytest.mark.parametrize("odd", [2, 3, 5])
def test_a_model_is_random_if_one_of_five_calls_differs(odd):
    class Rarely(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            z = 10 * x.flatten(1)[:, :3]
            return z.flip(1) if self.calls == odd else z

    found = inspect_model(Rarely(), torch.rand(8, 1, 3, 3, generator=torch.Generator().manual_seed(0)))
    assert found.stochastic

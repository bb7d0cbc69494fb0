"""Models that people have: what the fast path cannot do it drops, and an attack that would do nothing is refused."""

import copy
import warnings
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gambeson as gb
from gambeson import UserError
from gambeson.attacks import DFUAP, FGSM, PGD, SGA, AutoPGD, CarliniWagner, DeepFool, StochasticPGD
from gambeson.attacks.losses import Loss
from gambeson.attacks.solver import GradientWarning, ProjectedGradient
from gambeson.auditing.derandomize import Derandomize
from gambeson.threat import Ball
from gambeson.victim import Victim, as_victim


class Net(nn.Module):
    """A trained-looking net of one convolution, one BatchNorm and one linear layer."""

    def __init__(self, classes=4):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.out = nn.Linear(6 * 9, classes)
        self.norm.running_mean.uniform_(-0.5, 0.5)
        self.norm.running_var.uniform_(0.5, 2)
        self.eval()

    def features(self, x):
        return F.max_pool2d(F.relu(self.norm(self.conv(x))), 2)

    def forward(self, x):
        return self.out(self.features(x).flatten(1))


def changed(forward, **attributes):
    """A Net with another forward, a function of the net and the images."""
    net = type("Changed", (Net,), {"forward": forward})()
    for name, value in attributes.items():
        setattr(net, name, value)
    return net


def plainly(net, images):
    return Net.forward(net, images)


def batch(count=12):
    draw = torch.Generator().manual_seed(3)
    x = 0.1 + 0.8 * torch.rand(count, 2, 6, 6, generator=draw)
    with torch.no_grad():
        return x, Net()(x).argmax(1)


def attacked(model, **more):
    x, y = batch()
    return PGD(eps=0.2, steps=4)(model, x, y, **more)


def without_grad(net, x):
    with torch.no_grad():
        return plainly(net, x)


def in_inference_mode(net, x):
    with torch.inference_mode():
        return plainly(net, x).clone()


def leaves_grad_off(net, x):
    torch.set_grad_enabled(False)
    return plainly(net, x)


def on_its_own_leaf(net, x):
    return plainly(net, x.detach().requires_grad_())


def frees_its_weights(net, x):
    return plainly(net.requires_grad_(True), x.data)


def by_votes(net, x):
    return F.one_hot(plainly(net, x).argmax(1), 4).float() * 4 - 2


WITHOUT_GRAPH = [
    without_grad,
    in_inference_mode,
    leaves_grad_off,
    on_its_own_leaf,
    frees_its_weights,
    by_votes,
    lambda net, x: plainly(net, x).detach(),
    lambda net, x: torch.as_tensor(plainly(net, x).detach().numpy()),
]


@pytest.mark.parametrize("forward", WITHOUT_GRAPH)
def test_no_attack_without_a_graph(forward):
    model, (x, y) = changed(forward), batch(60)
    for attempt in (
        lambda: FGSM(eps=0.1)(model, x, y),
        lambda: PGD(eps=0.1, steps=2)([model, model], x, y),
        lambda: DeepFool(steps=2)(model, x, y),
        lambda: StochasticPGD(eps=0.1, steps=2, probe_starts=0).craft(model, (x, y)),
        lambda: gb.analysis.batch_jacobian(model, x),
    ):
        with pytest.raises(UserError, match="autograd can see"):
            attempt()
        assert torch.is_grad_enabled()
    assert gb.evaluation.accuracy(model, (x, y)).value == 1  # a score needs no graph
    with Victim(model) as victim:
        victim.allow_no_graph = True  # as audits do
        assert torch.equal(PGD(eps=0.1, steps=2, start="zero")(victim, x, y), x)


@pytest.mark.parametrize("forward", [without_grad, by_votes])
def test_no_attack_on_an_average_of_which_one_has_no_graph(forward):
    with pytest.raises(UserError, match="autograd can see"):
        PGD(eps=0.1, steps=2)([Net(), changed(forward)], *batch())


def test_inference_mode_and_no_grad_change_no_attack():
    model, (x, y) = Net(), batch()
    outside = attacked(copy.deepcopy(model))
    assert float((model(outside).argmax(1) == y).float().mean()) < 0.7
    data = batch(60)
    uap = StochasticPGD(eps=0.2, steps=4, probe_starts=0, restarts=1)
    delta = uap.craft(copy.deepcopy(model), data).delta
    with torch.inference_mode():
        assert torch.equal(attacked(model), outside)  # and caches the fast copy
        images, labels = x.clone(), y.clone()
        assert torch.equal(PGD(eps=0.2, steps=4)(model, images, labels), outside)
        assert torch.equal(uap.craft(model, data).delta, delta)
        jacobian = gb.analysis.batch_jacobian(model, x)
    assert torch.equal(attacked(model), outside)
    assert torch.equal(PGD(eps=0.2, steps=4)(model, images, labels), outside)
    assert torch.equal(jacobian, gb.analysis.batch_jacobian(model, images))
    with torch.no_grad():
        assert torch.equal(attacked(model), outside)
    with Victim(model, fast=True) as victim, torch.inference_mode():
        assert torch.equal(PGD(eps=0.2, steps=4)(victim, x, y), outside)
    with torch.inference_mode(), Victim(model, fast=True) as victim:
        assert torch.equal(PGD(eps=0.2, steps=4).perturb_batch(victim, x, y), outside)


def test_weights_made_in_inference_mode_are_scored_and_not_attacked():
    with torch.inference_mode():
        model = Net()
    assert gb.evaluation.accuracy(model, batch()).value == 1
    with pytest.raises(UserError, match=r"made in torch\.inference_mode"):
        attacked(model)


class Raw(torch.autograd.Function):
    """The identity; its backward reads the memory of the gradient as if it were contiguous."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.as_strided(gradient, gradient.shape, torch.empty(gradient.shape).stride())


LAYOUTS = [
    (lambda net, x: net.out(net.features(x).view(-1, 54)), "cannot be channels last"),
    (lambda net, x: net.out(net.features(x).as_strided((len(x), 54), (54, 1))), "cannot be channels last"),
    (
        lambda net, x: net.out(F.max_pool2d(Raw.apply(F.relu(net.norm(net.conv(x)))), 2).flatten(1)),
        "cannot be channels last",
    ),
    (lambda net, x: net.out(net.features(x).reshape(len(x), -1)), ", channels last"),
    (lambda net, x: plainly(net, x) + 0.01 * torch.randn(len(x), 1), ", channels last"),
]


@pytest.mark.parametrize(("forward", "said"), LAYOUTS)
def test_a_layout_is_used_where_it_changes_nothing(forward, said):
    model, (x, y) = changed(forward), batch()
    with Victim(model, fast=True) as victim:
        victim(x)
        assert victim.notes.startswith("a copy with 1 BatchNorms folded")
        assert victim.notes.endswith(said)
        if not victim.inspect(x).stochastic:
            points = [x.clone().requires_grad_() for _ in range(2)]
            logits = victim(points[0]), victim.forward_original(points[1])
            torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
            slopes = [victim.gradient(z.logsumexp(1).sum(), point, 12) for z, point in zip(logits, points, strict=True)]
            assert float((slopes[0] - slopes[1]).norm()) < 1e-3 * float(slopes[1].norm())
    moved = PGD(eps=0.2, steps=4, eot_samples=1)(model, x, y)
    assert float((Net()(moved).argmax(1) == y).float().mean()) < 0.7


def test_a_copy_that_gives_other_results_is_not_used():
    class Unlike(Net):
        def __deepcopy__(self, memo):
            other = Net()
            other.out.weight.data.neg_()
            return other

    with Victim(Unlike(), fast=True) as victim:
        victim(batch()[0])
        assert "the copy gives other results" in victim.notes
        assert torch.equal(victim(batch()[0]), victim.forward_original(batch()[0]))


def replaced(model):
    model.scale = torch.tensor([1.0, -1.0, 1.0, -1.0])


def written(model):
    model.scale.neg_()


def unregistered(model):
    model.others[0].out.weight.neg_()


def unsaved(model):
    model.unsaved.neg_()


def hooked(model):
    model.out.register_forward_hook(lambda module, given, answer: -answer)


@pytest.mark.parametrize("change", [replaced, written, unregistered, unsaved, hooked])
def test_a_copy_follows_what_no_state_dict_holds(change):
    model = changed(
        lambda net, x: plainly(net, x) * net.scale * net.unsaved + plainly(net.others[0], x),
        scale=torch.ones(4),
        others=[Net()],
    )
    model.register_buffer("unsaved", torch.ones(()), persistent=False)
    (x, _), victim = batch(), Victim(model, fast=True)
    with victim:
        before = victim(x)
    with torch.no_grad():
        change(model)
    with victim:
        assert victim.notes.startswith("a copy")
        torch.testing.assert_close(victim(x), victim.forward_original(x), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(victim(x), before, atol=0.1)


class SpaceToDepth(nn.Module):
    """Its first convolution takes four times as many channels as the images have, and is registered last."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.out, self.second, self.first = nn.Linear(36, 4), nn.Conv2d(9, 4, 1), nn.Conv2d(8, 9, 1)

    def forward(self, x):
        return self.out(self.second(F.relu(self.first(F.pixel_unshuffle(x, 2)))).flatten(1))


def test_the_first_registered_layer_need_not_take_the_images():
    model, (x, _) = SpaceToDepth(), batch()
    y = model(x).argmax(1)
    assert float((model(PGD(eps=0.3, steps=5)(model, x, y)).argmax(1) == y).float().mean()) < 0.7


@pytest.mark.parametrize(
    ("model", "shape", "said"),
    [
        (Net(), (3, 6, 6), "the images have 3 channels, but the model takes 2"),
        (SpaceToDepth(), (1, 6, 6), r"1 images of shape \(1, 6, 6\) .*to have 8 channels, but got 4 channels"),
        (Net(), (2, 12, 12), r"2, 12, 12\) \(mat1 and mat2 shapes cannot be multiplied"),
        (nn.Sequential(nn.BatchNorm2d(2), nn.Flatten()).eval(), (3, 6, 6), r"3, 6, 6\) .*running_mean"),
    ],
)
def test_a_misfit_is_explained_once_it_fails(model, shape, said):
    for measure in (lambda pair: FGSM(eps=0.1)(model, *pair), lambda pair: gb.evaluation.accuracy(model, pair)):
        with pytest.raises(UserError, match=said) as caught:
            measure((torch.rand(1, *shape), torch.tensor([1])))
        assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_fault_of_the_model_itself_stays_as_it_is():
    def faulty(net, x):
        raise RuntimeError("a fault of its own")

    with pytest.raises(RuntimeError, match="^a fault of its own$"):
        attacked(changed(faulty))


def in_place(net, x):
    x.mul_(1.0)  # changes no value, and yet writes
    return plainly(net, x)


def in_place_by_numpy(net, x):
    x.detach().numpy()[:] *= 2
    return plainly(net, x / 2)


@pytest.mark.parametrize("forward", [in_place, in_place_by_numpy])
def test_a_model_may_write_into_its_input(forward):
    x, y = batch()
    given, model = x.clone(), changed(forward)
    torch.testing.assert_close(PGD(eps=0.2, steps=4)(model, given, y), attacked(Net()), rtol=0, atol=1e-5)
    if forward is in_place:
        jacobian = gb.analysis.batch_jacobian(model, given)
        torch.testing.assert_close(jacobian, gb.analysis.batch_jacobian(Net(), x))
        with Victim(model, fast=True) as victim:  # not inspected before
            victim(given)
            victim.forward_original(given)
    assert gb.evaluation.accuracy(model, (given, y)).value == 1
    assert torch.equal(given, x)


@pytest.mark.parametrize("maps", [False, True])
def test_one_image_alone_is_a_batch_of_one(maps):
    """A model that squeezes its output drops the first dimension too, where there is one image."""
    net = nn.Conv2d(2, 4, 1)
    model = nn.Sequential(net, Squeeze()) if maps else changed(lambda self, x: plainly(self, x)[..., None].squeeze())
    plain = net if maps else Net()
    x, y = batch()
    y = plain(x).argmax(1)
    for rows in (slice(0, 1), slice(0, 5)):
        attack = PGD(eps=0.2, steps=3)
        torch.testing.assert_close(attack(model, x[rows], y[rows]), attack(plain, x[rows], y[rows]))
        assert gb.evaluation.accuracy(model, (x[rows], y[rows])).value == 1
    if not maps:
        torch.testing.assert_close(gb.analysis.batch_jacobian(model, x[:1]), gb.analysis.batch_jacobian(plain, x[:1]))


class Squeeze(nn.Module):
    def forward(self, x):
        return x.squeeze()


def in_fives(net, x):
    return plainly(net, x.view(5, 2, 6, 6))


def in_halves(net, x):
    return torch.cat([plainly(net, half) for half in x.view(2, -1, 2, 6, 6)])


@pytest.mark.parametrize(("forward", "size", "multiple"), [(in_fives, 5, False), (in_halves, 2, True)])
def test_a_fixed_number_of_images_is_wrapped(forward, size, multiple):
    model, (x, y) = changed(forward), batch(13)
    with pytest.raises(UserError, match=r"gb\.models\.fixed_batch"):
        FGSM(eps=0.1)(model, x, y)
    model = gb.models.fixed_batch(model, size, multiple=multiple)
    torch.testing.assert_close(model(x), Net()(x))
    torch.testing.assert_close(PGD(eps=0.2, steps=4)(model, x, y), PGD(eps=0.2, steps=4)(Net(), x, y))
    torch.testing.assert_close(gb.analysis.batch_jacobian(model, x), gb.analysis.batch_jacobian(Net(), x))
    assert gb.evaluation.accuracy(model, (x, y)).value == 1
    with pytest.raises(UserError, match="size = 0"):
        gb.models.fixed_batch(model, 0)


PROGRAMS = {
    "scripted": lambda net, x: torch.jit.script(Plain()),
    "traced": lambda net, x: torch.jit.trace(net, x[:3]),
    "frozen": lambda net, x: torch.jit.freeze(torch.jit.trace(net, x[:3])),
    "exported": lambda net, x: gb.models.fixed_batch(torch.export.export(net, (x[:5],)).module(), 5),
    "compiled": lambda net, x: torch.compile(net, backend="aot_eager"),
    "in parallel": lambda net, x: nn.DataParallel(net),
    "as a graph": lambda net, x: torch.fx.symbolic_trace(net),
}


class Plain(Net):
    """For the script compiler, which reads no call of the base class."""

    def forward(self, x):
        return self.out(F.max_pool2d(F.relu(self.norm(self.conv(x))), 2).flatten(1))


@pytest.mark.filterwarnings("ignore:.torch.jit")  # deprecated, and still in use
@pytest.mark.parametrize("kind", PROGRAMS)
def test_programs_are_attacked_as_the_module_they_were_made_of(kind):
    x, y = batch()
    model = PROGRAMS[kind](Net(), x)
    torch.testing.assert_close(attacked(model), attacked(Net()), rtol=0, atol=1e-4)
    assert gb.evaluation.accuracy(model, (x, y)).value == 1
    torch.testing.assert_close(gb.analysis.batch_jacobian(model, x), gb.analysis.batch_jacobian(Net(), x))


def test_what_is_known_of_a_random_model_does_not_hold_where_its_noise_is_off():
    model, (x, _) = changed(lambda net, x: plainly(net, x) + torch.randn(len(x), 4)), batch()
    for _ in range(2):
        with Victim(model) as victim:
            assert victim.inspect(x).stochastic
        with Derandomize(), Victim(model) as victim:
            assert not victim.inspect(x).stochastic


def test_a_list_of_modules_is_held_as_their_average():
    x, y = batch()
    for several in ([Net(), Plain()], nn.ModuleList([Net(), Plain()])):
        with as_victim(several, fast=True) as victim:
            torch.testing.assert_close(victim(x), Net()(x))
            assert len(victim.members) == 2
        assert float((Net()(PGD(eps=0.2, steps=4)(several, x, y)).argmax(1) == y).float().mean()) < 0.7


ZERO: list[Any] = [
    FGSM(eps=0.2),
    PGD(eps=0.2, steps=4),
    PGD(eps=0.2, steps=4, early_stop=False),
    AutoPGD(eps=0.2, steps=4),
]
ZERO += [AutoPGD(eps=0.2, steps=4), DeepFool(steps=3), CarliniWagner(steps=2, searches=1)]


def quantised(net, x):
    return plainly(net, (x * 255).round() / 255)


@pytest.mark.parametrize("attack", ZERO)
def test_a_gradient_that_is_zero_is_said(attack):
    x, y = batch()
    with pytest.warns(UserWarning, match="gradient was exactly zero"):
        attack(changed(quantised), x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attack(Net(), x, y)
        wrong = (plainly(Net(), x).argmax(1) + 1) % 4
        assert not run(truncated(1e-6), x, wrong).any()  # as it should be: all of them are fooled


def truncated(limit, **options):
    return Loss(truncate=limit, **options)


def run(loss, x, y):
    with Victim(Net()) as victim:
        solver = ProjectedGradient(victim=victim, ball=Ball(eps=0.2), loss=loss)
        return solver.run(torch.zeros(1, 2, 6, 6), [(x, y)] * 2, [0.1] * 2)


@pytest.mark.parametrize("targeted", [False, True])
def test_a_truncated_loss_without_a_gradient_is_said_while_an_answer_is_left(targeted):
    x, _ = batch()
    right = plainly(Net(), x).argmax(1)
    loss = truncated(99.0, targeted=True) if targeted else truncated(1e-6)
    labels = (right + 1) % 4 if targeted else right.where(torch.arange(len(right)) == 0, (right + 1) % 4)
    with pytest.warns(GradientWarning, match="exactly zero"):
        assert not run(loss, x, labels).any()


@pytest.mark.parametrize("attack", [StochasticPGD, SGA, partial(DFUAP, clip=False), DFUAP])
def test_a_universal_attack_says_that_its_gradient_is_zero(attack):
    x = torch.rand(40, 2, 6, 6)
    data = x, plainly(Net(), x).argmax(1)
    settings = {"probe_starts": 0} if attack is StochasticPGD else {}
    with pytest.warns(GradientWarning, match="exactly zero"):
        attack(eps=0.1, steps=2, **settings).craft(changed(quantised), data)


def test_complaints_of_models_about_their_images_are_one_sentence():
    def even(net, x):
        assert len(x) % 2 == 0, "even only"
        return plainly(net, x)

    def sized(net, x):
        raise ValueError("Input image size (6*6) does not match the model's")

    for forward, words in ((even, "even only.*fixed_batch"), (sized, "does not match the model's")):
        with pytest.raises(UserError, match=words):
            gb.evaluation.accuracy(changed(forward), (torch.rand(3, 2, 6, 6), torch.tensor([0, 1, 2])))


def test_mixed_types_of_weights_are_one_sentence():
    def mixed(net, x):
        net.out.double()
        return net.out(net.features(x).flatten(1))

    with pytest.raises(UserError, match=r"mixes types .*model.float\(\)"):
        attacked(changed(mixed))


@pytest.mark.parametrize("mode", [nullcontext, torch.inference_mode])
def test_victims_that_overlap_with_other_contexts_leave_the_gradient_mode_alone(mode):
    with mode(), ExitStack() as outer:
        before = torch.is_grad_enabled()
        with torch.no_grad():
            outer.enter_context(Victim(nn.Flatten()))
        outer.close()
        assert torch.is_grad_enabled() == before
    assert torch.is_grad_enabled()

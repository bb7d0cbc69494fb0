"""Noise in models: where it goes, what it draws, and that it survives storage, copies and transformations."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

import gambeson as gb
from gambeson import UserError
from gambeson.base import seeded
from gambeson.models.factory import add_noise
from gambeson.models.noise import FeatureNoise, NoiseInjection, inject_noise, injections, noise_off, standard_normal
from gambeson.models.noisy_weights import FixedNoise, GaussianNoise, ParametricNoise, PassAverage, ScaledNoise


def small(name="resnet20x0.25", noise=None, seed=0, **keywords):
    with seeded(seed, "model"):
        return gb.models.create(name, in_channels=1, classes=10, image_size=8, noise=noise, **keywords).eval()


def images(count=4):
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "neurons"),
    [("resnet20", 102_400), ("resnet32", 159_744), ("resnet44", 217_088), ("resnet56", 274_432), ("resnet18", 311_296)],
)
def test_theta_counts_are_the_paper_s(name, neurons):
    with torch.device("meta"):
        body = gb.models.create(name, in_channels=3, classes=10, image_size=32).body
    real = body.to_empty(device="cpu")
    inject_noise(real, FeatureNoise(), torch.zeros(1, 3, 32, 32))
    assert sum(module.theta.numel() for module in injections(real)) == neurons


def test_noise_stands_before_the_first_relu_and_each_block_s_last():
    model = small(noise=FeatureNoise())
    names = [name for name, module in model.body.named_modules() if isinstance(module, NoiseInjection)]
    assert names == ["relu1.0"] + [f"stages.{stage}.{block}.relu2.0" for stage in range(3) for block in range(3)]
    # Noise on the sum, before the ReLU: a stem that is cut off from everything else shows both.
    stem = model.body.relu1
    x = torch.full((2000, *stem[0].theta.shape), -0.25)
    with torch.no_grad():
        out = stem(x)
    assert float((out > 0).float().mean()) == pytest.approx(0.1587, abs=0.01)  # P(0.25 z > 0.25)
    assert float(out.min()) == 0


@pytest.mark.parametrize(
    ("name", "size", "places"),
    [
        ("lenet", 28, ["pool1", "pool2"]),
        ("lenet5", 28, ["pool1", "pool2"]),
        ("mnist-a", 28, ["conv1", "conv2"]),
        ("torchvision:resnet18", 32, ["bn1", *(f"layer{i}.{j}.bn2" for i in range(1, 5) for j in range(2))]),
        (
            "unet-small",
            16,
            [f"down.{k}.{j}" for k in range(5) for j in (1, 4)]
            + [f"halve.{k}" for k in range(4)]
            + [f"up.{k}.{j}" for k in range(4) for j in (1, 4)],
        ),
    ],
)
def test_default_places_elsewhere(name, size, places):
    model = gb.models.create(name, in_channels=3, classes=10, image_size=size, noise=FeatureNoise())
    found = [key for key, module in model.body.named_modules() if isinstance(module, NoiseInjection)]
    assert found == [f"{place}.1" for place in places]


def test_named_places_and_mistakes():
    model = small("mnist-d", noise=FeatureNoise(places=("fc1", "relu2")))
    assert [tuple(module.theta.shape) for module in injections(model)] == [(300,), (300,)]
    with pytest.raises(UserError, match=r"mnist|MnistNet has no convolution .* name the modules in `places`"):
        small("mnist-d", noise=FeatureNoise())
    with pytest.raises(UserError, match="unknown module 'pol1': did you mean pool1"):
        small("lenet5", noise=FeatureNoise(places=("pol1",)))
    with pytest.raises(UserError, match="has no _?ConvNd layer"):
        small("mnist-d", noise=FixedNoise())
    with pytest.raises(UserError, match=r"features of shape \(4, 9, 9\) do not fit noise made for \(4, 8, 8\)"):
        injections(small(noise=FeatureNoise()))[0](torch.zeros(1, 4, 9, 9))
    with pytest.raises(UserError, match="floor"):
        FeatureNoise(floor=0)


@pytest.mark.parametrize(
    "noise", [FeatureNoise(), ParametricNoise(), ParametricNoise(where="weight+input"), FixedNoise()]
)
def test_noise_off_is_the_plain_network_bit_for_bit_and_on_differs_every_time(noise):
    plain, noisy, x = small(), small(noise=noise), images()
    assert len(injections(noisy)) > 5
    with noise_off(noisy):
        assert torch.equal(noisy(x), plain(x))
    first, second = noisy(x), noisy(x)
    assert not torch.equal(first, second)
    assert not torch.equal(first, plain(x))
    with seeded(3, "noise"):
        one = noisy(x)
    with seeded(3, "noise"):
        assert torch.equal(noisy(x), one)


def test_the_switches_come_back_also_after_an_exception():
    model = small(noise=FeatureNoise())
    injections(model)[2].enabled = False
    before = [module.enabled for module in injections(model)]
    with noise_off(model):
        assert not any(module.enabled for module in injections(model))
    assert [module.enabled for module in injections(model)] == before

    def broken():
        with noise_off(model):
            raise KeyError

    with pytest.raises(KeyError):
        broken()
    assert [module.enabled for module in injections(model)] == before


def test_theta_zero_is_the_plain_network():
    plain, noisy, x = small(), small(noise=FeatureNoise(init=0)), images()
    assert torch.equal(noisy(x), plain(x))


def test_sharing_decides_what_copies_in_one_forward_see():
    x = images(1).expand(30, -1, -1, -1)
    for sharing, spread in (("batch", False), ("sample", True)):
        model = small(noise=FeatureNoise(sharing=sharing))
        first, second = model(x), model(x)
        assert (float((first - first[:1]).abs().max()) > 1e-3) is spread
        assert float((first - second).abs().max()) > 1e-3


def test_noise_has_the_size_it_says():
    noise = NoiseInjection((3, 4, 4), FeatureNoise())
    with torch.no_grad():
        noise.theta.copy_(torch.linspace(0.1, 1, 48).view(3, 4, 4))
        out = noise(torch.ones(20_000, 3, 4, 4)) - 1
    torch.testing.assert_close(out.std(0), noise.theta.detach(), rtol=0.03, atol=0)
    assert float((out.mean(0) / noise.theta).abs().max()) < 5 / math.sqrt(20_000)


def test_channels_last_stays_so():
    noise = NoiseInjection((16, 24, 24), FeatureNoise())
    x = torch.zeros(16, 16, 24, 24).to(memory_format=torch.channels_last)  # large enough for the threads
    out = noise(x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert float(out.detach().std()) == pytest.approx(0.25, rel=0.01)
    out.sum().backward()
    torch.testing.assert_close(noise.theta.grad, out.detach().sum(0) / 0.25, rtol=1e-3, atol=1e-3)


def test_gradients_of_the_injection():
    noise = NoiseInjection((2, 3, 3), FeatureNoise()).double()
    x = torch.randn(5, 2, 3, 3, dtype=torch.double, requires_grad=True)
    with seeded(0, "noise"):
        drawn = standard_normal(x).double()
    weight = torch.randn_like(x)
    with seeded(0, "noise"):
        (noise(x) * weight).sum().backward()
    assert torch.equal(x.grad, weight)
    torch.testing.assert_close(noise.theta.grad, (weight * drawn).sum(0))


def test_large_draws_are_standard_normal_and_do_not_depend_on_the_threads():
    like = torch.empty(3, 2**17 + 5)
    found = []
    for threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with seeded(1, "draw"):
                found.append(standard_normal(like))
        finally:
            torch.set_num_threads(before)
    one, other = found
    assert torch.equal(one, other)
    flat, count = one.flatten(), one.numel()
    assert abs(float(flat.mean())) < 4 / math.sqrt(count)
    assert abs(float(flat.var()) - 1) < 4 * math.sqrt(2 / count)
    assert float((flat.abs() < 1).float().mean()) == pytest.approx(0.6827, abs=0.003)
    assert abs(float((flat[:-1] * flat[1:]).mean())) < 4 / math.sqrt(count)
    rows = one.view(3, -1)
    assert float(torch.corrcoef(rows).fill_diagonal_(0).abs().max()) < 4 / math.sqrt(rows.shape[1])
    assert not torch.equal(standard_normal(like), one)
    assert torch.get_num_threads() == 1


def test_parametric_noise_scales_with_its_tensor():
    noise = ScaledNoise(ParametricNoise(init=0.5))
    v = torch.randn(200, 300) * 3
    out = noise(v)
    assert float((out - v).std()) == pytest.approx(0.5 * float(v.std()), rel=0.02)
    with seeded(0, "noise"):
        drawn = standard_normal(v)
    with seeded(0, "noise"):
        noise(v).sum().backward()
    assert float(noise.alpha.grad) == pytest.approx(float((drawn * v.std()).sum()), rel=1e-3)
    kinds = {"weight": 20, "output": 20, "input": 20, "image": 1, "weight+output": 40, "weight+input": 40}
    for where, count in kinds.items():
        assert len(injections(small(noise=ParametricNoise(where=where)))) == count, where
    weights = small(noise=ParametricNoise()).body.conv1
    assert not torch.equal(weights.weight, weights.weight)  # a draw each time it is read


def test_fixed_noise_has_one_size_on_the_image_and_another_elsewhere():
    model = small(noise=FixedNoise(first=0.3, rest=0.1))
    assert [module.std for module in injections(model)] == [0.3] + [0.1] * 18
    assert not [name for name, _ in model.named_parameters() if "theta" in name or "alpha" in name]
    first = model.body.conv1[0]
    assert isinstance(first, GaussianNoise)
    assert float(first(torch.zeros(100, 100)).std()) == pytest.approx(0.3, rel=0.05)


def test_the_vote_over_passes_is_the_mean_softmax():
    model, x = small("lenet5", noise=FixedNoise(first=1, rest=1)), images()
    with seeded(1, "noise"):
        vote = PassAverage(model, passes=5)(x)
    with seeded(1, "noise"):
        by_hand = torch.stack([model(x).softmax(1) for _ in range(5)]).mean(0)
    torch.testing.assert_close(vote.exp(), by_hand)
    spread = [torch.stack([PassAverage(model, passes=k)(x).exp() for _ in range(20)]).std(0).mean() for k in (1, 20)]
    assert spread[1] < spread[0] / 2
    with pytest.raises(UserError, match="passes = 0"):
        PassAverage(model, passes=0)


@pytest.mark.parametrize(
    "noise", [FeatureNoise(init=0.3), ParametricNoise(where="weight+output"), FixedNoise(rest=0.4)]
)
@pytest.mark.parametrize("members", [1, 2])
def test_saved_and_loaded_bit_for_bit_with_the_noise_on(tmp_path, noise, members):
    model = small(noise=noise, members=members)
    with torch.no_grad():
        for module in injections(model):
            for size in module.learnt:
                size.add_(torch.rand(size.shape))
    gb.models.save(model, tmp_path / "model.safetensors")
    back = gb.models.load(tmp_path)
    assert back.card == model.card
    assert back.card.noise == noise
    state, other = model.state_dict(), back.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[key], other[key]) for key in state)
    assert all(module.enabled for module in injections(back))
    with seeded(5, "noise"):
        expected = model(images())
    with seeded(5, "noise"):
        assert torch.equal(back(images()), expected)


def test_equipping_is_in_place_once_and_told_by_the_card():
    model, whole = small(members=2), small(noise=FeatureNoise(), members=2)
    add_noise(model, FeatureNoise())
    add_noise(model, FeatureNoise())
    assert model.card == whole.card
    assert len(injections(model)) == len(injections(whole)) == 20
    assert all(voter.card.noise == FeatureNoise() for voter in model.voters)
    with noise_off(model), noise_off(whole):
        assert torch.equal(model(images()), whole(images()))
    with pytest.raises(UserError, match="carries FeatureNoise.* already"):
        add_noise(model, FeatureNoise(init=0.5))
    with pytest.raises(UserError, match="created for 8x8"):
        model(torch.rand(1, 1, 16, 16))
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 10))
    with pytest.raises(UserError, match="noise for a Sequential needs an example image"):
        add_noise(net, FeatureNoise())
    net[1].eval()
    add_noise(net, FeatureNoise(), images(1))
    add_noise(net, FeatureNoise())
    assert [tuple(module.theta.shape) for module in injections(net)] == [(3, 6, 6)]
    assert not torch.equal(net(images()), net(images()))


def test_a_frozen_normalisation_stays_frozen_while_places_are_searched():
    body = small().body.train()
    body.bn1.eval()
    inject_noise(body, FeatureNoise(), images(1))
    assert body.training
    assert not body.bn1.training
    assert float(body.bn1.running_mean.abs().max()) == 0


@pytest.mark.parametrize("noise", [FeatureNoise(), ParametricNoise(), FixedNoise()])
def test_copies_functional_calls_and_vmap(noise):
    model, x = small(noise=noise), images()
    twin = copy.deepcopy(model)
    with seeded(0, "noise"):
        expected = model(x)
    for answer in (lambda: twin(x), lambda: functional_call(model, dict(model.named_parameters()), (x,))):
        with seeded(0, "noise"):
            assert torch.equal(answer(), expected)
    models = [small(noise=noise, seed=seed) for seed in range(3)]
    parameters, buffers = stack_module_state(models)
    stacked = vmap(
        lambda p, b, images: functional_call(models[0], (p, b), (images,)), (0, 0, None), randomness="different"
    )
    with noise_off(models[0]):
        each = stacked(parameters, buffers, x)
        for model, answer in zip(models, each, strict=True):
            with noise_off(model):
                torch.testing.assert_close(answer, model(x), rtol=1e-4, atol=1e-5)
    same = {key: value[:1].expand_as(value) for key, value in parameters.items()}
    noisy = stacked(same, {key: value[:1].expand_as(value) for key, value in buffers.items()}, x)
    assert float((noisy[0] - noisy[1]).abs().max()) > 1e-3  # each model draws for itself
    large = torch.zeros(2, 2**17 + 1)  # large enough for the threads, were it not for vmap
    drawn = vmap(lambda row: standard_normal(row), randomness="different")(large)
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("noise", [FeatureNoise(), ParametricNoise(), FixedNoise()])
def test_exported_the_noise_is_drawn_anew_in_every_call(noise):
    model, x = small("lenet5", noise=noise), images()
    program = torch.export.export(model, (x,)).module()
    assert float((program(x) - program(x)).abs().max()) > 1e-4
    many = torch.stack([program(x) for _ in range(200)])
    ours = torch.stack([model(x) for _ in range(200)])
    torch.testing.assert_close(many.mean(0), ours.mean(0), rtol=0, atol=6 * float(ours.std(0).max()) / math.sqrt(200))
    torch.testing.assert_close(many.std(0), ours.std(0), rtol=0.5, atol=1e-3)


def test_low_precision_draws_in_float32():
    noise, x = NoiseInjection((2, 4, 4), FeatureNoise()), torch.zeros(8, 2, 4, 4, dtype=torch.bfloat16)
    with seeded(0, "noise"):
        out = noise(x)
    with seeded(0, "noise"):
        drawn = standard_normal(x)
    assert out.dtype == torch.bfloat16
    assert drawn.dtype == torch.float32
    assert torch.equal(out, (0.25 * drawn).bfloat16())

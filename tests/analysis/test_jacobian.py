"""Jacobians, their norms and the spectrum of the stack against formulas; every route gives one answer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gambeson import UserError
from gambeson.analysis import (
    batch_jacobian,
    estimate_frobenius,
    frobenius,
    gradient_sharing,
    jacobian_norms,
    sharing_factor,
    spectral,
    stacked_gram,
    stacked_spectrum,
)
from gambeson.analysis.matrix_free import top_eigenpairs
from gambeson.victim import Victim
from tests.conftest import LinearNet, inner_images

SHAPE = (2, 3, 4)
METHODS = ["gram", "rows", "products"]


def linear(classes=5, shape=SHAPE, seed=0):
    weight = torch.randn(classes, *shape, generator=torch.Generator().manual_seed(seed))
    return LinearNet(weight), weight.flatten(1)


def relu_net(seed=0, classes=4, width=16):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(24, width), nn.ReLU(), nn.Linear(width, classes))


def labelled(model, images):
    """A pair with the model's own answers as labels, so that every margin is positive."""
    with torch.no_grad():
        return images, model(images).argmax(1)


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(
        torch.as_tensor(found).double(), torch.as_tensor(expected).double(), rtol=tolerance, atol=tolerance
    )


def test_a_linear_model_is_its_own_jacobian():
    model, w = linear()
    x = inner_images(7, SHAPE)
    jacobian = batch_jacobian(model, x)
    close(jacobian, w.expand(7, -1, -1))
    close(frobenius(jacobian), w.norm().expand(7))
    close(spectral(jacobian), torch.linalg.svdvals(w)[0].expand(7))
    norms = jacobian_norms(model, labelled(model, x))
    close(norms.regulariser, w.square().sum() / 2)
    assert norms.errors == 0
    top = model(x).topk(2, dim=1).values
    reach = (top[:, 0] - top[:, 1]) / (2**0.5 * torch.linalg.svdvals(w)[0])
    assert norms.reach.n == 7
    close([norms.reach.mean, norms.reach.median], [reach.mean(), reach.median()])


def test_a_two_layer_net_has_the_product_of_its_active_weights():
    model, x = relu_net(), inner_images(9, SHAPE)
    first, second = model[1], model[3]
    active = (first(x.flatten(1)) > 0).float()
    close(batch_jacobian(model, x), torch.einsum("kh,nh,hd->nkd", second.weight, active, first.weight))


def test_equals_the_jacobian_of_torch(trained, digits):
    x, _ = digits.test.take(slice(0, 6))
    trained.eval()
    expected = torch.func.vmap(torch.func.jacrev(lambda one: trained(one[None])[0]))(x).flatten(2)
    torch.testing.assert_close(batch_jacobian(trained, x), expected.detach(), rtol=1e-4, atol=1e-5)


def test_scaling_the_logits_and_the_pixels_scales_the_jacobian():
    model, w = linear()
    x = inner_images(3, SHAPE)
    double = nn.Sequential(model, LinearNet(2 * torch.eye(5)[..., None, None]))
    close(batch_jacobian(double, x), 2 * w.expand(3, -1, -1))
    norm = nn.BatchNorm2d(2)
    norm.running_var.fill_(0.25 - norm.eps)
    inside = nn.Sequential(norm, model)
    close(batch_jacobian(inside, x), 2 * w.expand(3, -1, -1))
    assert inside.training  # given back as it was


def test_works_under_no_grad_and_inference_mode_and_counts():
    model, w = linear()
    x = inner_images(4, SHAPE)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            close(batch_jacobian(model, x)[0], w)
    with Victim(model) as victim:
        batch_jacobian(victim, x)
        assert (victim.forwards, victim.backwards) == (4, 20)


class _OwnSquare(torch.autograd.Function):
    """Has no rule for a batch of cotangents."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, cotangent):
        (x,) = ctx.saved_tensors
        return cotangent * float(2 * x.sum()) / float(x.sum()) * x  # a number of the host, which vmap refuses


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("step", [2, 3, 7])
def test_rows_of_one_backward_are_those_of_one_each(step, own, monkeypatch):
    net = relu_net(classes=5)
    model = nn.Sequential(_Applied(), net) if own else net
    x = inner_images(6, SHAPE)
    single = batch_jacobian(model, x)
    calls = []
    grad = torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda *a, **k: calls.append(k.get("is_grads_batched")) or grad(*a, **k)
    )
    monkeypatch.setattr("gambeson.analysis.jacobian._rows_at_once", lambda point: step)
    with Victim(model) as victim:
        together = batch_jacobian(victim, x)
        assert victim.backwards == 5 * len(x)
    torch.testing.assert_close(together, single, rtol=1e-5, atol=1e-6)
    assert sum(map(bool, calls)) == {2: 2, 3: 2, 7: 1}[step]


class _Applied(nn.Module):
    def forward(self, x):
        return _OwnSquare.apply(x)


def test_a_model_without_gradient_has_a_zero_jacobian():
    class Rounded(nn.Module):
        def forward(self, x):
            return (x.flatten(1)[:, :3] * 4).round()

    x = inner_images(4, SHAPE)
    assert not batch_jacobian(Rounded(), x).any()
    for method in METHODS:
        spectrum = stacked_spectrum(Rounded(), (x, torch.tensor([0, 1, 2, 0])), method=method)
        assert (float(spectrum.values[0]), spectrum.trace, spectrum.shared) == (0, 0, None)


def test_a_model_without_a_graph_has_no_jacobian():
    class Cut(nn.Module):
        def forward(self, x):
            return x.detach().flatten(1)[:, :3] * 2

    x = inner_images(4, SHAPE)
    for measure in (
        lambda: batch_jacobian(Cut(), x),
        lambda: stacked_spectrum(Cut(), (x, torch.tensor([0, 1, 2, 0]))),
        lambda: estimate_frobenius(Cut(), x),
    ):
        with pytest.raises(UserError, match="do not depend on its images"):
            measure()


def test_what_cannot_be_measured_is_refused():
    model, _ = linear()
    x = inner_images(4, SHAPE)
    with pytest.raises(UserError, match="is a str: expected a torch.nn.Module"):
        batch_jacobian("lenet", x)
    with pytest.raises(UserError, match="divide by 255"):
        batch_jacobian(model, x * 255)
    with pytest.raises(UserError, match=r"expected logits \(N, K\)"):
        batch_jacobian(nn.Identity(), x)
    with pytest.raises(UserError, match="label maps"):
        stacked_gram(model, (x, torch.zeros(4, 3, 4, dtype=torch.long)))
    with pytest.raises(UserError, match="labels reach from . to 9, but there are"):
        stacked_gram(model, (x, torch.full((4,), 9)))
    with pytest.raises(UserError, match="its Gram matrix 4107"):
        stacked_gram(LinearNet(torch.rand(2, 3, 37, 37)), (torch.rand(2, 3, 37, 37), torch.tensor([0, 1])))
    with pytest.raises(UserError, match="count = 0"):
        stacked_spectrum(model, (x, torch.tensor([0, 1, 0, 1])), count=0)
    with pytest.raises(UserError, match="projections = 0"):
        estimate_frobenius(model, x, projections=0)


@pytest.mark.parametrize("method", ["output", "input", "finite-differences"])
def test_estimates_are_unbiased_within_four_standard_errors(method, trained, digits):
    x, _ = digits.test.take(slice(0, 12))
    exact = frobenius(batch_jacobian(trained, x)).double().square()
    step = 1e-3 if method == "finite-differences" else 1e-2
    found = estimate_frobenius(trained, x, projections=200, method=method, step=step)
    assert abs(found.mean - float(exact.mean())) <= 4 * found.error
    assert ((found.values - exact).abs() <= 5 * found.errors).all()
    assert found.error < 0.1 * found.mean
    again = estimate_frobenius(trained, x, projections=200, method=method, step=step)
    assert torch.equal(found.values, again.values)


def test_the_spread_of_one_projection_is_the_formula_of_the_notes():
    model, w = linear()
    own = torch.linalg.svdvals(w).square()
    expected = (2 / 7 * (5 * own.square().sum() / own.sum() ** 2 - 1)).sqrt()
    found = estimate_frobenius(model, inner_images(1, SHAPE).expand(4000, -1, -1, -1), projections=1)
    assert float(found.values.std() / found.values.mean()) == pytest.approx(float(expected), rel=0.1)
    assert found.errors.isnan().all()
    row = LinearNet(w[:1].view(1, *SHAPE))  # one logit: v is a sign, the estimate exact
    close(estimate_frobenius(row, inner_images(5, SHAPE)).values, w[0].square().sum().expand(5))


@pytest.mark.parametrize("method", METHODS)
def test_the_stack_of_a_linear_model(method):
    model, w = linear()
    pair = labelled(model, inner_images(8, SHAPE))
    singular = torch.linalg.svd(w)
    spectrum = stacked_spectrum(model, pair, count=3, method=method)
    close(spectrum.values, 8 * singular.S[:3] ** 2, 1e-5)
    cosine = (spectrum.directions.flatten(1) * singular.Vh[:3]).sum(1).abs()
    close(cosine, torch.ones(3), 1e-4)
    expected = 8 * float(w.square().sum())
    assert abs(spectrum.trace - expected) <= max(4 * spectrum.trace_error, 1e-5 * expected)
    if method != "products":
        assert spectrum.shared == pytest.approx(1, abs=1e-5)
        assert spectrum.trace_error == 0


def test_the_estimated_trace_is_unbiased_and_its_error_is_its_spread():
    """Over many seeds, for one trace rests on few projections, and so does the error that comes with it."""
    model, x = relu_net(), inner_images(6, SHAPE)
    pair = labelled(model, x)
    exact = float(batch_jacobian(model, x).double().square().sum())
    found = [stacked_spectrum(model, pair, method="products", seed=seed) for seed in range(200)]
    traces = torch.tensor([spectrum.trace for spectrum in found]).double()
    errors = torch.tensor([spectrum.trace_error for spectrum in found]).double()
    assert abs(float(traces.mean()) - exact) <= 4 * float(traces.std()) / 200**0.5
    assert float(errors.square().mean().sqrt()) == pytest.approx(float(traces.std()), rel=0.2)
    assert float(traces.std()) > 0.02 * exact


def test_orthogonal_jacobians_share_nothing():
    class Halves(nn.Module):
        """Images with a bright first pixel use the even values, the others the odd ones."""

        def forward(self, x):
            flat = x.flatten(1)
            return torch.where(flat[:, :1] > 0.5, flat[:, 2::2] @ torch.ones(11, 2), flat[:, 1::2] @ torch.ones(12, 2))

    x = inner_images(2, SHAPE)
    x[0, 0, 0, 0], x[1, 0, 0, 0] = 0.6, 0.4
    assert sharing_factor(Halves(), (x, torch.tensor([0, 1]))) == pytest.approx(12 / 23, abs=1e-5)


@given(seed=st.integers(0, 10**6), count=st.integers(1, 12), weighting=st.sampled_from(["none", "margin"]))
def test_all_routes_to_the_spectrum_agree_with_the_svd_of_the_stack(seed, count, weighting):
    model, x = relu_net(seed), torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed))
    y = torch.randint(0, 4, (count,), generator=torch.Generator().manual_seed(seed + 1))
    with torch.no_grad():
        top = model(x).topk(2)
    y[0] = top.indices[0, 0]
    right = top.indices[:, 0] == y
    jacobian = batch_jacobian(model, x)
    if weighting == "margin":
        jacobian = (jacobian / top.values[:, :1, None].sub(top.values[:, 1:, None]))[right]
    exact = torch.linalg.svdvals(jacobian.flatten(0, 1).double())
    spectra = [stacked_spectrum(model, (x, y), method=m, weighting=weighting, tolerance=1e-6) for m in METHODS]
    for spectrum in spectra:
        close(spectrum.values[0] / exact[0] ** 2, 1.0, 1e-4)
        assert spectrum.ceiling >= float(spectrum.values[0])
        assert spectrum.left_out == (int((~right).sum()) if weighting == "margin" else 0)
        if spectrum.method == "products":  # estimated: between K times the squares of the least and the largest values
            own = torch.linalg.svdvals(jacobian.double()).square()
            low, high = 4 * float(own[:, 3].sum()), 4 * float(own[:, 0].sum())
            assert low * (1 - 1e-4) <= spectrum.trace <= high * (1 + 1e-4)
        else:
            close(spectrum.trace / float(exact.square().sum()), 1.0, 1e-4)
            assert spectrum.trace_error == 0
        if spectrum.shared is not None:
            assert 1 / count - 1e-5 <= spectrum.shared <= 1 + 1e-5
    assert spectra[0].shared == pytest.approx(spectra[1].shared, rel=1e-4)


def test_the_trace_of_a_product_of_grams_is_the_cross_product(trained, digits):
    x, y = digits.test.take(slice(0, 2))
    first, second = (stacked_gram(trained, (x[k : k + 1], y[k : k + 1])).matrix for k in range(2))
    cross = batch_jacobian(trained, x)
    expected = (cross[0] @ cross[1].T).double().square().sum()
    close((first @ second).trace() / expected, 1.0, 1e-4)


def test_larger_images_choose_a_route_without_the_matrix():
    weight = torch.randn(3, 3, 40, 40, generator=torch.Generator().manual_seed(1))
    pair = labelled(LinearNet(weight), torch.rand(5, 3, 40, 40, generator=torch.Generator().manual_seed(2)))
    spectrum = stacked_spectrum(LinearNet(weight), pair)
    assert spectrum.method == "rows"
    close(spectrum.values[0] / (5 * torch.linalg.svdvals(weight.flatten(1))[0] ** 2), 1.0, 1e-4)
    many = LinearNet(torch.randn(20, 3, 40, 40))
    assert stacked_spectrum(many, labelled(many, pair[0])).method == "products"


def test_the_top_direction_harms_more_than_random_ones(trained, digits):
    few = digits.test.subset(torch.arange(200))
    gram = stacked_gram(trained, few)
    spectrum = gram.top(2)
    exact = torch.linalg.eigvalsh(gram.matrix)
    close(spectrum.values / exact[-2:].flip(0), torch.ones(2), 1e-6)
    best = spectrum.directions[:1]
    random = torch.randn(20, *few.shape, generator=torch.Generator().manual_seed(0))
    random = random / random.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    x, y = few.take(slice(None))

    def errors(delta):
        with torch.no_grad():
            return int((trained(x + delta).argmax(1) != y).sum())

    worst = max(errors(1.5 * d) for d in random)
    assert max(errors(1.5 * best), errors(-1.5 * best)) > 2 * worst
    effects = torch.einsum("rd,de,re->r", *[random.flatten(1).double(), gram.matrix, random.flatten(1).double()])
    assert float(effects.max()) < float(spectrum.values[0])


def test_gradients_of_one_direction_are_fully_shared():
    model, w = linear(classes=2)
    gap = w[1] - w[0]
    x = inner_images(6, SHAPE)
    found = gradient_sharing(model, (x, torch.zeros(6, dtype=torch.long)))
    assert found.ratio == pytest.approx(1, abs=1e-5)
    p, gap = model(x).softmax(1)[:, 1].detach(), gap.detach()
    close(found.per_image, float(p.mean() * gap.abs().sum()))
    mixed = gradient_sharing(model, (x[:1].repeat(2, 1, 1, 1), torch.tensor([0, 1])), norm="2")
    close(mixed.universal, float((2 * p[0] - 1).abs() * gap.norm()) / 2)
    close(mixed.per_image, float(gap.norm()) / 2)
    for norm, dual in (("inf", gap.abs().sum()), ("2", gap.norm()), ("1", gap.abs().max())):
        found = gradient_sharing(model, (x, torch.zeros(6, dtype=torch.long)), norm=norm)
        close([found.per_image, found.universal], [float(p.mean() * dual)] * 2)


@given(seed=st.integers(0, 10**6), size=st.integers(1, 30), rank=st.integers(0, 30))
def test_block_lanczos_finds_the_top_of_any_matrix(seed, size, rank):
    factor = torch.randn(size, min(rank, size), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    matrix = factor @ factor.T
    found = top_eigenpairs(lambda v: matrix @ v, size, min(2, size), seed=seed)
    exact = torch.linalg.eigvalsh(matrix).flip(0)[: len(found.values)]
    torch.testing.assert_close(found.values, exact, rtol=1e-6, atol=1e-9)
    eye = torch.eye(len(found.values), dtype=torch.float64)
    torch.testing.assert_close(found.vectors.T @ found.vectors, eye, rtol=0, atol=1e-8)

"""Votes, stacked members and joined models, against formulas and against the single model."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gambeson as gb
from gambeson import UserError
from gambeson.base import seeded
from gambeson.models import Members
from gambeson.models.factory import ensemble
from gambeson.models.members import vote
from gambeson.models.memory import check_memory, free_bytes, training_bytes
from tests.conftest import inner_images


def make(seed=0, name="lenet5", size=8, **settings):
    with seeded(seed, "test"):
        return gb.models.create(name, in_channels=1, classes=10, image_size=size, **settings)


def images(count=12, size=8, seed=0):
    return torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_copies_are_the_single_model(trained, digits, average):
    copies = ensemble([trained] * 4, average)
    x, y = digits.test.take(slice(0, 64))
    with torch.no_grad():
        one, many = trained(x), copies(x)
    torch.testing.assert_close(many.softmax(1), one.softmax(1))
    torch.testing.assert_close(F.cross_entropy(many, y), F.cross_entropy(one, y))
    if average == "logits":
        torch.testing.assert_close(many, one)
    uap = gb.attacks.StochasticPGD(eps=0.2, steps=10, restarts=1).craft(trained, digits)
    own = gb.evaluation.universal_evasion(trained, digits, uap)
    assert gb.evaluation.universal_evasion(copies, digits, uap).value == own.value > 0.2


def test_one_member_gives_its_logits_as_they_are():
    z = torch.randn(1, 5, 10, generator=torch.Generator().manual_seed(0))
    for average in ("probabilities", "logits"):
        assert torch.equal(vote(z, average), z[0])


@pytest.mark.parametrize("margin", [0.0, 5.0, 89.0, 90.0, 95.0, 300.0])
def test_the_vote_s_gradient_is_right_at_every_margin(margin):
    members = 3
    z = torch.zeros(members, 1, 4)
    z[:, :, 0] = margin
    z.requires_grad_()
    value = vote(z, "probabilities")[0, 2]
    (gradient,) = torch.autograd.grad(value, z)
    assert torch.isfinite(value)
    torch.testing.assert_close(value.double(), torch.tensor([margin, 0.0, 0.0, 0.0]).double().log_softmax(0)[2])
    expected = (torch.tensor([0.0, 0, 1, 0]) - z[0, 0].detach().softmax(0)) / members
    torch.testing.assert_close(gradient[:, 0], expected.expand(members, -1))


def test_the_clamped_logarithm_of_public_code_fails_where_ours_does_not():
    for margin, broken in ((90.0, torch.isnan), (95.0, lambda gradient: gradient == 0)):
        z = torch.zeros(3, 4)
        z[:, 0] = margin
        z.requires_grad_()
        torch.clamp(z.softmax(-1).mean(0), min=1e-40)[2].log().backward()
        assert bool(broken(z.grad[:, 2]).all()) or bool((z.grad[:, 2] == 0).all())
        (ours,) = torch.autograd.grad(vote(z.unsqueeze(1), "probabilities")[0, 2], z)
        torch.testing.assert_close(ours[:, 2], torch.full((3,), 1 / 3))


def test_the_vote_is_a_valid_logit_and_its_gradient_weighs_members_by_their_confidence():
    draw = torch.Generator().manual_seed(3)
    z = (4 * torch.randn(5, 7, 10, generator=draw)).requires_grad_()
    y = torch.arange(7)
    voted = vote(z, "probabilities")
    torch.testing.assert_close(voted.softmax(-1), z.softmax(-1).mean(0))
    torch.testing.assert_close(voted.logsumexp(-1), torch.zeros(7), atol=1e-6, rtol=0)
    (found,) = torch.autograd.grad(F.cross_entropy(voted, y, reduction="sum"), z)
    own = z.detach().softmax(-1)[:, torch.arange(7), y]
    weights = own / own.sum(0)
    alone = z.detach().softmax(-1) - F.one_hot(y, 10)
    torch.testing.assert_close(found, weights.unsqueeze(2) * alone)


@pytest.mark.parametrize("name", ["lenet5", "lenet", "resnet20x0.25"])
def test_stacked_members_equal_the_members_in_turn(name):
    members = [make(seed, name) for seed in range(3)]
    joined, x = ensemble(members), images(12)
    alone = [make(seed, name) for seed in range(3)]
    stacked = joined.body.parted(joined.normalize(x))
    apart = torch.stack([model(part) for model, part in zip(alone, x.chunk(3), strict=True)])
    torch.testing.assert_close(stacked, apart, rtol=1e-4, atol=1e-5)
    weights = torch.randn(stacked.shape, generator=torch.Generator().manual_seed(1))
    (stacked * weights).sum().backward()
    (apart * weights).sum().backward()
    for model, other in zip(members, alone, strict=True):
        for (key, ours), theirs in zip(model.body.named_parameters(), other.body.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4, msg=key)
        for ours, theirs in zip(model.body.buffers(), other.body.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs)
    assert not torch.equal(stacked[0], stacked[1])


def test_stacking_says_what_does_not_fit():
    body = Members([nn.Linear(4, 2), nn.Linear(4, 2)])
    with pytest.raises(UserError, match="5 images cannot be split evenly over 2 members"):
        body.parted(torch.zeros(5, 4))
    with pytest.raises(UserError, match="different architectures"):
        Members([nn.Linear(4, 2), nn.Sequential(nn.Linear(4, 2))]).parted(torch.zeros(4, 4))


def test_joined_models_share_their_weights_and_come_back_from_disk(tmp_path):
    members = [make(seed) for seed in range(3)]
    joined = ensemble(members, "logits")
    assert joined.card.members == 3
    assert [voter.body for voter in joined.voters] == [member.body for member in members]
    x = images(5)
    torch.testing.assert_close(joined(x), torch.stack([member(x) for member in members]).mean(0))
    gb.models.save(joined, tmp_path / "model.safetensors")
    back = gb.models.load(tmp_path)
    assert back.card == joined.card
    assert back.body.average == "logits"
    assert gb.models.fingerprint(back) == gb.models.fingerprint(joined)
    assert torch.equal(back(x), joined.eval()(x))
    assert ensemble(members[:1]) is members[0]


def test_models_that_do_not_belong_together_are_refused():
    with pytest.raises(UserError, match="no models"):
        ensemble([])
    other = gb.models.create("lenet5", in_channels=1, classes=9, image_size=8)
    with pytest.raises(UserError, match="model 1 differs from model 0 in classes"):
        ensemble([make(), other])
    with pytest.raises(UserError, match="model 0 is an ensemble of 2 itself"):
        ensemble([make(members=2), make()])


def test_memory_is_counted_from_what_a_forward_keeps():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Sigmoid(), nn.Linear(8, 2))
    weights = (16 * 8 + 8 + 8 * 2 + 2) * 4
    x = inner_images(2, (1, 4, 4))
    kept = (16 + 8) * 4  # an image's pixels and the sigmoid's answer
    found = training_bytes(net, x, batch_size=10, members=5)
    assert found == 5 * 3 * weights + 10 * kept
    assert training_bytes(net, x, batch_size=10, members=5, at_once=5) - found == 4 * 10 * kept
    assert training_bytes(net, x, batch_size=10, members=5, moments=2) - found == 5 * weights
    assert free_bytes(torch.device("cpu")) > 2**20
    check_memory(found, torch.device("cpu"), 5)
    with pytest.raises(UserError, match=r"training 5 members needs about 2.0 GiB, but 1.0 GiB are free on cpu: choose"):
        check_memory(2**31, torch.device("cpu"), 5, free=2**30)

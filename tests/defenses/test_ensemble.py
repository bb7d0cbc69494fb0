"""Ensembles: closed forms of linear members, members that equal single runs, and the formulas of the baselines."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gambeson as gb
from gambeson import UserError
from gambeson.base import derive, generator, load_tensors, seeded
from gambeson.data import Split
from gambeson.defenses import Adversarial, Batch, PGDAdversarial, SharedAdversarial, Standard, TrainContext
from gambeson.defenses.ensemble import Ensemble, against
from gambeson.defenses.ensemble_diversity import ADP, GAL, TRS, squared_gradient_norms
from gambeson.defenses.ensemble_losses import (
    coherence,
    cosines,
    entropy,
    estimated_diversity_gain,
    log_det,
    loss_gradients,
)
from gambeson.defenses.jacobian import Jacobian, JacobianNorm
from gambeson.defenses.jacobian_ensemble import JacobianEnsemble
from gambeson.models import Members, ModelCard, PixelModel
from gambeson.models.factory import ensemble
from gambeson.tasks import Classification
from tests.conftest import LinearNet, inner_images

SHAPE = (1, 4, 4)


def linear(weights, average="logits"):
    """A voting model of linear members, each (K, 1, 4, 4)."""
    sizes = {"in_channels": 1, "classes": len(weights[0]), "image_size": (4, 4), "mean": (0.0,), "std": (1.0,)}
    card = ModelCard(name="lenet5", members=len(weights), average=average, **sizes)
    return PixelModel(card, Members([LinearNet(weight.clone()) for weight in weights], average))


def random_weights(members=3, classes=5, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(classes, *SHAPE, generator=draw) for _ in range(members)]


def batch_of(count=12, classes=5, seed=0, **settings):
    return Batch(images=inner_images(count, SHAPE), labels=torch.arange(count) % classes, seed=seed, **settings)


def scene_of(model, classes=5, seed=0, batch_size=4):
    train = Split("train", inner_images(20, SHAPE), torch.arange(20) % classes)
    return TrainContext(model=model, train=train, seed=seed, epochs=2, steps=5, batch_size=batch_size)


def descend(objective, model, batch):
    """The gradients of one phase, as the loop would have them."""
    model.zero_grad()
    for losses, _ in objective.optimizer_steps(model, batch):
        losses["loss"].backward()
    return losses, [parameter.grad for parameter in model.parameters()]


def single(digits, seed, name="lenet5"):
    with seeded(seed, "model"):
        return gb.models.create(name, digits)


def joined(digits, members=3, seed=0, name="lenet5"):
    return ensemble([single(digits, derive(seed, "member", number), name) for number in range(members)])


def test_linear_members_have_the_mean_jacobian_and_its_norm():
    weights = random_weights()
    model, mean = linear(weights), torch.stack(weights).mean(0)
    batch = batch_of()
    exact = JacobianNorm(estimator="exact")
    torch.testing.assert_close(exact(model, batch), mean.square().sum() / 2)
    gain = estimated_diversity_gain(model.voters, batch.images)
    expected = mean.square().sum() / torch.stack(weights).square().flatten(1).sum(1).mean()
    torch.testing.assert_close(gain, expected.expand(12))
    joint = JacobianEnsemble(members=3, estimator="exact", strength=0.3, joint=True, watched=0)
    losses, gradients = descend(joint.build_objective(scene_of(model)), model, batch)
    parts = zip(weights, batch.images.chunk(3), batch.labels.chunk(3), strict=True)
    clean = sum(F.cross_entropy(x.flatten(1) @ weight.flatten(1).T, y) for weight, x, y in parts)
    torch.testing.assert_close(losses["loss"], clean + 0.3 * 3 * mean.square().sum() / 2)
    plain = Ensemble(members=3, watched=0).build_objective(scene_of(model))
    _, without = descend(plain, model, batch)
    for number in range(3):  # d/dW_m of 3 * 0.3 * ||mean W||^2 / 2 is 0.3 * mean W
        torch.testing.assert_close(gradients[2 * number], without[2 * number] + 0.3 * mean)


def test_the_best_universal_direction_is_the_mean_s_top_singular_vector():
    weights = random_weights()
    model, mean = linear(weights), torch.stack(weights).mean(0).flatten(1)
    top = torch.linalg.svd(mean)[2][0].view(1, *SHAPE)
    x = inner_images(6, SHAPE)
    moved = (model(x + 0.01 * top) - model(x)).norm(dim=1) / 0.01
    torch.testing.assert_close(moved, torch.linalg.matrix_norm(mean, 2).expand(6), rtol=1e-4, atol=1e-4)


def test_members_that_cancel_have_no_gain_and_a_vote_that_no_perturbation_changes():
    first, row = random_weights(1)[0], torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(5))
    x = inner_images(8, SHAPE)
    assert float(estimated_diversity_gain(linear([first, -first]).voters, x).max()) < 1e-10
    shifted = linear([first, -first + row])  # mean logits move equally for all classes
    step = x - 2 * torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(6))
    for voter in shifted.voters:
        assert bool((voter(x).argmax(1) != voter(step).argmax(1)).any())
    with torch.no_grad():
        spread = shifted(step) - shifted(x)
    torch.testing.assert_close(spread, spread[:, :1].expand_as(spread), rtol=0, atol=1e-4)
    assert bool((linear([first, -first + row], "probabilities")(x).std(1) > 0.01).all())


def test_orthogonal_members_gain_one_over_m_and_copies_one():
    rows = torch.eye(16).view(4, 4, *SHAPE)  # four members of four classes, all rows orthogonal
    x = inner_images(3, SHAPE)
    torch.testing.assert_close(estimated_diversity_gain(linear(list(rows)).voters, x), torch.full((3,), 0.25))
    torch.testing.assert_close(estimated_diversity_gain(linear([rows[0]] * 4).voters, x), torch.ones(3))
    assert torch.equal(estimated_diversity_gain(linear([rows[0] * 0] * 2).voters, x), torch.ones(3))


def test_independent_members_gain_one_over_m_on_average_and_many_classes_are_sampled():
    x = inner_images(1, SHAPE)
    gains = torch.cat([estimated_diversity_gain(linear(random_weights(4, seed=seed)).voters, x) for seed in range(200)])
    assert abs(float(gains.mean()) - 0.25) < 4 * float(gains.std()) / math.sqrt(200)
    many = linear(random_weights(2, classes=40))
    x = inner_images(64, SHAPE)
    exact = torch.stack([voter.body.weight.detach() for voter in many.voters])
    exact = exact.mean(0).square().sum() / exact.flatten(1).square().sum(1).mean()
    assert float(estimated_diversity_gain(many.voters, x).mean()) == pytest.approx(float(exact), rel=0.05)


def test_the_mean_of_the_norms_is_at_least_the_norm_of_the_mean(trained, digits):
    models = [single(digits, seed) for seed in range(2)] + [trained]
    x, y = digits.test.take(slice(0, 16))
    batch, exact = Batch(images=x, labels=y, seed=0), JacobianNorm(estimator="exact")
    alone = torch.stack([exact(model.eval(), batch) for model in models]).mean()
    assert bool(exact(ensemble(models, "logits").eval(), batch) < alone)
    copies = ensemble([trained] * 3, "logits").eval()
    torch.testing.assert_close(exact(copies, batch), exact(trained.eval(), batch))


@pytest.mark.parametrize(
    ("defense", "alone"),
    [
        (JacobianEnsemble(members=2), Jacobian()),
        (Ensemble(members=2, inner=SharedAdversarial(eps=0.1, sharedness=8)), SharedAdversarial(eps=0.1, sharedness=8)),
    ],
)
def test_a_member_is_the_single_run_with_its_seed_bit_for_bit(digits, defense, alone):
    together = joined(digits, 2, seed=4)
    start = [parameter.clone() for parameter in together.parameters()]
    settings = {"epochs": 1, "batch_size": 64, "lr": 0.1}
    gb.train(together, digits, defense, seed=4, **settings)
    for number, voter in enumerate(together.voters):
        seed = derive(4, "member", number)
        model = single(digits, seed)
        gb.train(model, digits, alone, seed=seed, **settings)
        for ours, theirs in zip(voter.parameters(), model.parameters(), strict=True):
            assert torch.equal(ours, theirs)
    assert not any(torch.equal(a, b) for a, b in zip(together.parameters(), start, strict=True))


def test_a_member_sees_the_augmentation_of_its_own_run(digits):
    together = joined(digits, 2, seed=4)
    settings = {"epochs": 1, "batch_size": 128, "augment": "crop"}
    gb.train(together, digits, Ensemble(members=2), seed=4, **settings)
    seed = derive(4, "member", 1)
    model = single(digits, seed)
    gb.train(model, digits, Standard(), seed=seed, **settings)
    assert gb.models.fingerprint(together.voters[1]) == gb.models.fingerprint(model)


def test_one_member_is_the_single_model_bit_for_bit(digits):
    found = []
    for defense in (Standard(), Ensemble(members=1), JacobianEnsemble(members=1, strength=0)):
        model = single(digits, 0)
        gb.train(model, digits, defense, epochs=1, batch_size=128)
        found.append(gb.models.fingerprint(model))
    assert len(set(found)) == 1


def test_a_strength_of_zero_is_the_plain_ensemble_bit_for_bit(digits):
    found = []
    for defense in (
        Ensemble(members=2, watched=0),
        JacobianEnsemble(members=2, strength=0),
        JacobianEnsemble(members=2, strength=0, joint=True),
        JacobianEnsemble(members=2, strength=0.1),
    ):
        model = joined(digits, 2)
        gb.train(model, digits, defense, epochs=1, batch_size=256)
        found.append(gb.models.fingerprint(model))
    assert found[0] == found[1] == found[2] != found[3]


@pytest.mark.parametrize("estimator", ["exact", "projection"])
def test_threads_equal_the_loop_and_stacked_members_do_within_rounding(digits, estimator):
    x, y = digits.train.take(slice(0, 48))
    batch, found = Batch(images=x, labels=y, seed=1), {}
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for way in ("loop", "threads", "stacked"):
            model = joined(digits, 3)
            defense = JacobianEnsemble(members=3, at_once=way, estimator=estimator, strength=0.1, watched=0)
            context = TrainContext(model=model, train=digits.train, seed=0, epochs=1, steps=10, batch_size=16)
            objective = defense.build_objective(context)
            found[way] = descend(objective, model, batch)
            assert objective.losses(model, batch)["loss"] > 0
            assert torch.get_num_threads() == 3
            assert all(module.training for module in model.modules())
    finally:
        torch.set_num_threads(threads)
    losses, gradients = found["loop"]
    for ours, theirs in zip(gradients, found["threads"][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert set(losses) == {"loss", "clean", "jacobian"}
    torch.testing.assert_close(losses["clean"], found["stacked"][0]["clean"])
    if estimator == "exact":  # no draws, which the stacked members make for the joined batch
        torch.testing.assert_close(losses["loss"], found["stacked"][0]["loss"])
        for ours, theirs in zip(gradients, found["stacked"][1], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_gradients_taken_at_once_are_those_of_the_sum():
    model, batch = linear(random_weights()), batch_of()
    objective = JacobianEnsemble(members=3, strength=0.2, watched=0).build_objective(scene_of(model))
    _, handed = descend(objective, model, batch)
    model.zero_grad()
    objective.losses(model, batch)["loss"].backward()
    for ours, parameter in zip(handed, model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad)
    model.body.members[0].weight.requires_grad_(False)
    _, frozen = descend(objective, model, batch)
    assert frozen[0] is None
    torch.testing.assert_close(frozen[2], handed[2])


def test_shared_projections_are_the_same_for_all_members():
    weight = random_weights(1)[0]
    image, label = inner_images(1, SHAPE), torch.zeros(1, dtype=torch.long)
    batch = Batch(images=image.expand(8, -1, -1, -1), labels=label.expand(8), seed=3)
    values = {}
    for shared in (False, True):
        model = linear([weight] * 2)
        defense = JacobianEnsemble(members=2, shared_projection=shared, watched=0)
        _, gradients = descend(defense.build_objective(scene_of(model)), model, batch)
        values[shared] = torch.equal(gradients[0], gradients[2])
    assert values == {False: False, True: True}


def test_crafting_against_the_vote_hits_the_vote_harder_than_crafting_on_one_member(digits):
    model = joined(digits, 3)
    gb.train(model, digits, Ensemble(members=3), epochs=3, batch_size=64)
    x, y = digits.train.take(slice(0, 64))
    batch, term = Batch(images=x, labels=y, seed=0), Adversarial(eps=0.15)
    crafted = []

    class Spy(nn.Module):
        def forward(self, pixels):
            crafted.append(pixels.detach())
            return model.voters[0](pixels)

    for target in (model.voters[0], model):
        against(term, target)(Spy(), batch)
    with torch.no_grad():
        own, voted = (float(F.cross_entropy(model.eval()(moved), y)) for moved in crafted)
    assert voted > own
    defense = Ensemble(members=3, inner=PGDAdversarial(eps=0.1), craft="vote")
    before = gb.models.fingerprint(model)
    history = gb.train(model, digits, defense, epochs=1, batch_size=256)
    assert math.isfinite(history[0]["adversarial"])
    assert gb.models.fingerprint(model) != before
    with pytest.raises(UserError, match="craft='vote' needs an inner defence that crafts"):
        Ensemble(craft="vote")
    with pytest.raises(UserError, match="craft='vote' freezes every member"):
        Ensemble(inner=PGDAdversarial(eps=0.1), craft="vote", at_once="threads")


def test_the_vote_is_at_least_as_right_as_its_members_which_differ(digits):
    model = joined(digits, 3)
    defense = JacobianEnsemble(members=3, average="logits")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        history = gb.train(model, digits, defense, epochs=8, batch_size=64, lr=0.1)
    assert model.card.average == model.body.average == "logits"
    members = [gb.evaluation.accuracy(voter, digits).value for voter in model.voters]
    voted = gb.evaluation.accuracy(model, digits).value
    assert voted >= sum(members) / 3
    assert voted > 0.9
    gains = [entry["diversity_gain"] for entry in history]
    images, _ = digits.train.take(torch.randperm(len(digits.train), generator=generator(0, "any"))[:32])
    assert float(estimated_diversity_gain(model.voters, images).mean()) == pytest.approx(gains[-1], abs=0.15)
    assert all(0 < gain < 0.99 for gain in gains)


def test_copies_are_warned_of():
    weight = random_weights(1)[0]
    model = linear([weight] * 2)
    objective = Ensemble(members=2).build_objective(scene_of(model))
    with pytest.warns(UserWarning, match=r"agree to 1.000 .* equal seeds"):
        losses = next(objective.optimizer_steps(model, batch_of(step=4, steps=5)))[0]
    assert float(losses["diversity_gain"]) == pytest.approx(5)  # the loop divides its sum by the steps
    assert "diversity_gain" not in next(objective.optimizer_steps(model, batch_of(step=3, steps=5)))[0]


@pytest.mark.parametrize(
    "defense",
    [JacobianEnsemble(members=2, estimator="stacked", power=True, derivative="forward-mode"), TRS(members=2, steps=1)],
)
def test_a_cut_ensemble_resumes_bit_for_bit(digits, tmp_path, defense, stand_in):
    def run(out, epochs_seen=None):
        model = joined(digits, 2)
        kind = type(defense)
        cut = defense
        if epochs_seen is not None:

            class Cut(kind):
                def build_objective(self, context):
                    objective = super().build_objective(context)
                    optimizer_steps = objective.optimizer_steps

                    def stopping(model, batch):
                        if batch.epoch == epochs_seen:
                            raise KeyboardInterrupt
                        return optimizer_steps(model, batch)

                    objective.optimizer_steps = stopping
                    return objective

            cut = Cut(**{name: getattr(defense, name) for name in kind.model_fields})
            with pytest.raises(KeyboardInterrupt):
                gb.train(model, digits, cut, epochs=2, batch_size=256, out=out)
            return None
        return gb.train(model, digits, defense, epochs=2, batch_size=256, out=out)

    whole = run(tmp_path / "whole")
    run(tmp_path / "cut", epochs_seen=1)
    assert run(tmp_path / "cut") == whole
    one, other = (load_tensors(tmp_path / name / "state" / "latest.safetensors")[0] for name in ("whole", "cut"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    back = gb.models.load(tmp_path / "cut")
    assert back.card.members == 2


def test_log_det_of_copies_and_of_orthogonal_predictions():
    labels = torch.zeros(4, dtype=torch.long)
    for members in (2, 3, 5):
        copies = torch.randn(1, 4, 10, generator=torch.Generator().manual_seed(0)).expand(members, -1, -1)
        expected = math.log((members + 1e-6) * 1e-6 ** (members - 1))
        assert log_det(copies, labels).tolist() == pytest.approx([expected] * 4, rel=1e-4)
        apart = torch.zeros(members, 4, 10)
        apart[torch.arange(members), :, 1 + torch.arange(members)] = 1000.0
        assert log_det(apart, labels).tolist() == pytest.approx([members * math.log(1 + 1e-6)] * 4, abs=1e-6)
    assert math.log(3e-12) == pytest.approx(-26.5, abs=0.1)
    sure = torch.randn(3, 4, 10)
    sure[:, :, 0] = 300.0  # the wrong classes' probabilities are zero in float32
    sure.requires_grad_()
    value = log_det(sure, labels).mean()
    value.backward()
    assert torch.isfinite(value)
    assert bool(sure.grad.isfinite().all())


def test_adp_is_its_formula():
    model, batch = linear(random_weights(classes=5)), batch_of()
    objective = ADP(members=3, watched=0).build_objective(scene_of(model))
    logits = torch.stack([voter(batch.images) for voter in model.voters])
    mean = logits.softmax(2).mean(0)
    by_hand = sum(F.cross_entropy(z, batch.labels) for z in logits) + 2.0 * (mean * mean.log()).sum(1).mean()
    rows = logits.softmax(2)[:, ~F.one_hot(batch.labels, 5).bool()].view(3, 12, 4)
    rows = (rows / rows.norm(dim=2, keepdim=True)).transpose(0, 1)
    by_hand = by_hand - 0.5 * torch.logdet(rows @ rows.transpose(1, 2) + 1e-6 * torch.eye(3)).mean()
    losses, gradients = descend(objective, model, batch)
    torch.testing.assert_close(losses["loss"], by_hand, rtol=1e-4, atol=1e-4)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    uniform = torch.zeros(2, 10)
    assert entropy(uniform).tolist() == pytest.approx([math.log(10)] * 2)
    with pytest.raises(UserError, match="5 members cannot differ on 5 classes"):
        ADP(members=5).build_objective(scene_of(linear(random_weights(5))))


def test_cosines_and_coherence_of_gradients_made_by_hand():
    g = torch.tensor([[[1.0, 0.0]], [[2.0, 0.0]], [[0.0, 3.0]], [[-1.0, 0.0]]])
    pairs = {(0, 1): 1.0, (0, 2): 0.0, (0, 3): -1.0}
    for (first, second), expected in pairs.items():
        two = cosines(g[[first, second]])
        torch.testing.assert_close(two, torch.tensor([[expected]]))
        torch.testing.assert_close(coherence(two), torch.tensor(expected))
    torch.testing.assert_close(cosines(g).flatten(), torch.tensor([1.0, 0, -1, 0, -1, 0]))
    zero = torch.zeros(2, 1, 2, requires_grad=True)
    cosines(zero).sum().backward()
    assert torch.equal(zero.grad, torch.zeros_like(zero))


def test_gal_and_trs_are_their_formulas():
    model, batch = linear(random_weights()), batch_of()

    def gradients_of(weight):
        p = (batch.images.flatten(1) @ weight.flatten(1).T).softmax(1) - F.one_hot(batch.labels, 5)
        return p @ weight.flatten(1)

    g = torch.stack([gradients_of(voter.body.weight.detach()) for voter in model.voters])
    clean = torch.stack([F.cross_entropy(voter(batch.images), batch.labels) for voter in model.voters]).detach()
    losses, gradients = descend(GAL(members=3, watched=0).build_objective(scene_of(model)), model, batch)
    pairs = F.cosine_similarity(g[[0, 0, 1]], g[[1, 2, 2]], dim=2)
    torch.testing.assert_close(losses["loss"], clean.mean() + 0.5 * pairs.exp().sum(0).log().mean())
    plain = [gradient.clone() for gradient in gradients]
    objective = TRS(members=3, eps_first=0.0, eps_last=0.0, loss_mean="image", watched=0).build_objective(
        scene_of(model)
    )
    losses, gradients = descend(objective, model, batch)
    smooth = 2 * g.square().sum(2).mean()
    torch.testing.assert_close(losses["smoothness"], smooth)
    torch.testing.assert_close(losses["loss"], clean.sum() + 5 * (2 * pairs.abs().mean() + 2 * smooth))
    assert not torch.allclose(plain[0], gradients[0])
    whole = TRS(members=3, eps_first=0.0, eps_last=0.0, watched=0).build_objective(scene_of(model)).losses(model, batch)
    torch.testing.assert_close(whole["smoothness"], smooth / 12**2)


def test_trs_moves_every_second_image_to_where_gradients_are_larger():
    model = linear(random_weights())
    batch = batch_of(step=5, steps=5, epochs=10)
    chosen = torch.arange(12) % 2 == 1
    term = TRS(members=3)
    moved = term._moved(model, batch, chosen)
    gap = (moved - batch.images[chosen]).abs()
    assert float(gap.max()) == pytest.approx(0.11, abs=1e-6)  # a tenth of the way from 0.1 to 0.2
    points = [batch.images[chosen].clone().requires_grad_(), moved.clone().requires_grad_()]
    before, after = (squared_gradient_norms(model, point, batch.labels[chosen]).mean() for point in points)
    assert bool(after > before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(UserError, match="fewer members|asks for 4 members and the model has 3"):
        TRS(members=4).build_objective(scene_of(model))


def test_loss_gradients_leave_ignored_labels_out():
    model, batch = linear(random_weights(2)), batch_of()
    point = batch.images.clone().requires_grad_()
    logits = torch.stack([voter(point) for voter in model.voters])
    found = loss_gradients(logits, batch.labels, point, Classification(ignore_index=0))
    assert torch.equal(found[:, batch.labels == 0], torch.zeros_like(found[:, batch.labels == 0]))
    assert bool((found[:, batch.labels != 0].abs().sum(2) > 0).all())


def test_what_does_not_fit_is_refused(digits):
    model = single(digits, 0)
    with pytest.raises(UserError, match="asks for 3 members and the model has 1: make it by models.create"):
        gb.train(model, digits, Ensemble(members=3), epochs=1)
    with pytest.raises(UserError, match="inner is an ensemble of 5 itself"):
        Ensemble(inner=Ensemble())
    with pytest.raises(UserError, match="at_once='stacked' works for clean and adversarial terms"):
        JacobianEnsemble(members=3, at_once="stacked", estimator="input").build_objective(
            scene_of(linear(random_weights()))
        )
    with pytest.raises(UserError, match="joint=True has one norm for all members"):
        JacobianEnsemble(joint=True, at_once="threads")
    with pytest.raises(UserError, match="sharedness 64 does not divide the batch size 100"):
        Ensemble(inner=SharedAdversarial(eps=0.1)).check(100)
    noisy = linear(random_weights(2))
    noisy.body.members[0] = nn.Sequential(noisy.body.members[0], nn.Dropout())
    torch.set_num_threads(2)
    try:
        with pytest.raises(UserError, match="draws random numbers in its forward"):
            Ensemble(members=2, at_once="threads").build_objective(scene_of(noisy))
    finally:
        torch.set_num_threads(1)


def test_settings_survive_being_written_down():
    defense = Ensemble(members=3, inner={"name": "shared-adversarial", "eps": "8/255"}, craft="vote")
    assert defense.inner == SharedAdversarial(eps=8 / 255)
    assert Ensemble(**defense.plain()) == defense
    assert defense.eps == 8 / 255
    assert Ensemble(members=4).inner == Standard()
    jacobian = JacobianEnsemble(members=4, strength="1/10")
    assert JacobianEnsemble(**jacobian.plain()) == jacobian
    assert (defense.num_members, defense.num_orders, ADP().num_members, ADP().num_orders) == (3, 3, 3, 1)

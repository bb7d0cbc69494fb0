"""N-FGSM, free training and bank-started steps, against closed forms and independent loops."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
import yaml

import gambeson as gb
from gambeson.defenses import NFGSM, BankStarted, Batch, FreeAdversarial, TrainContext, UniversalConsistency
from gambeson.defenses.n_fgsm import NoisyStep
from gambeson.threat import Ball, perturb
from gambeson.training.recipe import recipe_for
from tests.conftest import binary, inner_images

SHAPE = (1, 4, 4)
LABELS = torch.tensor([0, 1, 1, 0, 1, 0])


def batch_of(count=6, **more):
    return Batch(images=inner_images(count, SHAPE), labels=LABELS.repeat(count)[:count], seed=4, **more)


def objective_of(defense, model, batch):
    split = gb.data.Split("own", batch.images, batch.labels, tuple("0123456789"))
    return defense.build_objective(
        TrainContext(model=model, train=split, seed=0, epochs=1, steps=4, batch_size=len(batch.images))
    )


def vertex(w, labels):
    """The step that hurts each image of a linear net."""
    return w.sign() * (1 - 2 * labels).view(-1, 1, 1, 1)


def test_n_fgsm_steps_from_noise_beyond_the_ball_and_is_not_projected():
    model, w = binary(SHAPE)
    batch, eps = batch_of(), 0.05
    plain = NoisyStep(eps=eps, noise=0).craft(model, batch)
    torch.testing.assert_close(plain, batch.images + eps * vertex(w, batch.labels))
    noise = NoisyStep(eps=eps).craft(model, batch) - plain
    assert 1.8 * eps < float(noise.abs().max()) <= 2 * eps * (1 + 1e-5)
    assert abs(float(noise.mean())) < 0.5 * eps
    longer = NoisyStep(eps=eps, rel_step_size=0.5).craft(model, batch) - batch.images - noise
    torch.testing.assert_close(longer, 0.5 * eps * vertex(w, batch.labels))
    found = NFGSM(eps=eps).losses(model, batch)["loss"]
    torch.testing.assert_close(found, F.cross_entropy(model(plain + noise), batch.labels))


def test_n_fgsm_clips_only_to_the_pixel_range():
    model, _ = binary(SHAPE)
    batch = Batch(images=torch.rand(6, *SHAPE).round(), labels=LABELS, seed=0)
    moved = NoisyStep(eps=0.2).craft(model, batch)
    assert (float(moved.min()), float(moved.max())) == (0.0, 1.0)
    assert float((moved - batch.images).abs().max()) > 0.2


def test_free_training_is_an_independent_loop(trained, digits):
    ours, theirs = copy.deepcopy(trained).eval(), copy.deepcopy(trained).eval()
    images, labels = digits.train.take(slice(0, 24))
    parts = [(images[:16], labels[:16]), (images[16:], labels[16:])]  # the second is shorter
    first = Batch(images=parts[0][0], labels=parts[0][1], seed=0)
    objective = objective_of(FreeAdversarial(eps=0.1, replays=3, rel_step_size=0.75), ours, first)
    optimizer, delta = torch.optim.SGD(ours.parameters(), 0.1), torch.zeros(16, *images.shape[1:])
    for part in parts:
        for losses, moving in objective.optimizer_steps(ours, Batch(images=part[0], labels=part[1], seed=0)):
            assert moving is None
            optimizer.zero_grad()
            losses["loss"].backward()
            optimizer.step()
    for x, y in parts:
        for _ in range(3):
            leaf = (x + delta[: len(x)]).clamp(0, 1).requires_grad_()
            loss = F.cross_entropy(theirs(leaf), y)
            *slopes, slope = torch.autograd.grad(loss, [*theirs.parameters(), leaf])
            delta[: len(x)] = (delta[: len(x)] + 0.075 * slope.sign()).clamp(-0.1, 0.1)
            with torch.no_grad():
                for parameter, one in zip(theirs.parameters(), slopes, strict=True):
                    parameter -= 0.1 * one
    torch.testing.assert_close(objective.delta, delta)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    assert float(delta.abs().max()) == pytest.approx(0.1)


def test_free_training_resumes_bit_for_bit(digits, tmp_path, stand_in):
    class Stop(FreeAdversarial):
        def build_objective(self, context):
            objective = super().build_objective(context)
            plain = objective.optimizer_steps

            def stopping(model, batch):
                if batch.epoch == 1:
                    raise KeyboardInterrupt
                return plain(model, batch)

            objective.optimizer_steps = stopping
            return objective

    few = gb.data.Dataset("few", digits.train.subset(torch.arange(80)), digits.validation, digits.test, digits.classes)
    more = {"epochs": 2, "batch_size": 32, "seed": 0}
    whole, cut = (gb.models.create("lenet5", few, seed=0) for _ in range(2))
    gb.train(whole, few, FreeAdversarial(eps=0.05, replays=2), **more)
    with pytest.raises(KeyboardInterrupt):
        gb.train(cut, few, Stop(eps=0.05, replays=2), out=tmp_path, **more)
    cut = gb.models.create("lenet5", few, seed=0)
    gb.train(cut, few, FreeAdversarial(eps=0.05, replays=2), out=tmp_path, **more)
    assert gb.models.fingerprint(cut) == gb.models.fingerprint(whole)


def test_without_own_steps_bank_started_is_universal_consistency(trained, digits):
    images, labels = digits.train.take(slice(0, 32))
    batch = Batch(images=images, labels=labels, seed=0, step=3, steps=4)
    found = []
    for defense in (
        UniversalConsistency(eps=0.1, beta=2, warmup=0.3),
        BankStarted(eps=0.1, share=0, radius=1),
        BankStarted(eps=0.1, share=0.5, radius=1),
    ):
        model = copy.deepcopy(trained).eval()
        objective = objective_of(defense, model, batch)
        objective.losses(model, batch)["loss"].backward()
        objective.after_step(batch)
        found.append([*objective.buffers(), *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(found[0], found[1], strict=True))
    assert not torch.equal(found[0][0], found[2][0])


def test_own_steps_start_at_the_entry_and_end_in_the_ball_of_eps():
    model, w = binary(SHAPE)
    batch = batch_of(12)
    settings = BankStarted(eps=0.1, bank=2, share=0.5, noise=0, radius=1.5, start="sign")
    term = objective_of(settings, model, batch).terms["consistency"][1]
    rows = term.rows(batch)
    own = term.stepping(batch)
    assert own.tolist() == [2, 3, 6, 7, 10, 11]  # every other turn of both entries
    start = Ball(eps=0.1).project(term.bank.delta[rows[own]])
    by_hand = (start + 0.06 * vertex(w, batch.labels[own])).clamp(-0.1, 0.1)
    torch.testing.assert_close(term.craft(model, batch, rows, own), by_hand)
    moved = term.moved(model, batch, rows)
    torch.testing.assert_close(moved[own], perturb(batch.images[own], by_hand))
    others = [k for k in range(12) if k not in own.tolist()]
    torch.testing.assert_close(moved[others], perturb(batch.images[others], term.bank.delta[rows[others]]))
    noisy = BankStarted(eps=0.1, bank=2, share=0.5, noise=1, radius=1.5, start="sign")
    other = objective_of(noisy, model, batch).terms["consistency"][1].craft(model, batch, rows, own)
    assert float(other.abs().max()) <= 0.1 * (1 + 1e-6)
    assert not torch.equal(other, by_hand)


def test_the_bank_moves_along_the_gradient_where_its_images_are_evaluated(trained, digits):
    model = copy.deepcopy(trained).eval()
    images, labels = digits.train.take(slice(0, 32))
    batch = Batch(images=images, labels=labels, seed=0, step=3, steps=4)
    objective = objective_of(BankStarted(eps=0.1, bank=2, share=0.75), model, batch)
    term = objective.terms["consistency"][1]
    before, rows = term.bank.delta.clone(), term.rows(batch)
    point = term.moved(model, batch, rows).detach().requires_grad_()
    clean = model(images).log_softmax(1)
    (slope,) = torch.autograd.grad(
        F.kl_div(model(point).log_softmax(1), clean, log_target=True, reduction="sum"), point
    )
    free = (images + before[rows] > 0) & (images + before[rows] < 1)  # the clip passes no gradient
    total = torch.zeros_like(before).index_put_((rows,), slope * free, accumulate=True)
    objective.losses(model, batch)["loss"].backward()
    objective.after_step(batch)
    by_hand = Ball(eps=0.135).project(before + 0.25 * 0.135 * total.sign())
    close = torch.isclose(term.bank.delta, by_hand) | (total.abs() < 1e-6)
    assert bool(close.all())
    assert not torch.equal(before, by_hand)


def test_several_processes_choose_the_same_images_as_one():
    model, _ = binary(SHAPE)
    whole = batch_of(24)
    term = objective_of(BankStarted(eps=0.1, bank=3, share=0.6), model, whole).terms["consistency"][1]
    parts = [batch_of(12, place=(number, 2)) for number in (0, 1)]
    joined = torch.cat([term.stepping(part) + 12 * part.place[0] for part in parts])
    assert torch.equal(joined, term.stepping(whole))
    assert 12 <= len(joined) < 24


def test_perturbations_grow_to_their_size_over_the_warm_up():
    model, w = binary(SHAPE)
    settings = BankStarted(eps=0.1, bank=2, share=0.5, noise=0, radius=0.5, start="sign", eps_warmup=0.5)
    batch = batch_of(12, step=1, steps=4, epochs=2)  # the second of four steps of growth
    term = objective_of(settings, model, batch).terms["consistency"][1]
    rows, own = term.rows(batch), term.stepping(batch)
    moved = term.moved(model, batch, rows) - batch.images
    start = Ball(eps=0.05).project(0.5 * term.bank.delta[rows[own]])
    torch.testing.assert_close(moved[own], (start + 0.03 * vertex(w, batch.labels[own])).clamp(-0.05, 0.05))
    others = [k for k in range(12) if k not in own.tolist()]
    torch.testing.assert_close(moved[others], 0.5 * term.bank.delta[rows[others]])
    (gradient,) = torch.autograd.grad(term.moved(model, batch, rows).sum(), term.bank._leaf)
    assert float(gradient.abs().min()) > 0
    late = batch_of(12, step=4, steps=4, epochs=2)
    assert term.scale(late) == term.scale(batch_of(12, step=3, steps=4, epochs=2)) == 1


def test_the_preset_needs_eps_alone_and_brings_its_recipe(digits, tmp_path):
    from gambeson.cli.app import run

    fast, best = gb.defenses.create("gambeson", eps=0.1, speed="fast"), gb.defenses.create("gambeson", eps=0.1)
    assert isinstance(best, BankStarted)
    assert (fast.recipe["epochs"], best.recipe["epochs"]) == (10, 40)
    command = ["train", "--data", "digits", "--model", "lenet5", "--defense", "gambeson", "--eps", "0.1"]
    assert run([*command, "--epochs", "1", "--set", "ema=0.9", "--out", str(tmp_path / "x")]) == 0
    stored = yaml.safe_load((tmp_path / "x" / "run.yaml").read_text())["recipe"]
    assert (stored["epochs"], stored["ema"], stored["lr"], stored["ema_warmup"]) == (1, 0.9, 0.1, True)
    model = gb.models.create("lenet5", digits, seed=0)
    history = gb.train(model, digits, fast, epochs=1, warmup=0, batch_size=512, seed=0)
    assert history[0]["lr"] == pytest.approx(0.1 * (1 + math.cos(math.pi / 2)) / 2)  # of the second of two steps
    given = {"preset": "shared-adversarial", "epochs": 2}
    assert recipe_for(fast, given) is given

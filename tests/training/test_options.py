"""What a recipe can ask for beside an objective: averages, selection, fine-tuning, trackers."""

import copy
import json
import warnings

import pytest
import torch
from torch import nn

import gambeson as gb
from gambeson import UserError
from gambeson.defenses import PGDAdversarial, Standard
from gambeson.training import PRESETS, Recipe, TrainRun
from gambeson.training.recipe import make_optimizer
from gambeson.training.run import _model
from gambeson.training.validation import is_best


def fresh(digits, name="lenet5"):
    torch.manual_seed(1)
    return gb.models.create(name, digits)


@pytest.mark.parametrize(
    ("ema", "decays"), [({"ema": 0.5}, (0.5, 0.5)), ({"ema": 0.9, "ema_warmup": True}, (2 / 11, 3 / 12))]
)
def test_moving_average_is_the_recursion(digits, ema, decays):
    plain, averaged = [], fresh(digits)
    for epochs in (1, 2, 3):
        model = fresh(digits)
        gb.train(model, digits, Standard(), epochs=epochs, batch_size=1078, schedule="constant", seed=2)
        plain.append(model)
    gb.train(averaged, digits, Standard(), epochs=3, batch_size=1078, schedule="constant", **ema, seed=2)
    for key, value in averaged.named_parameters():
        one, two, three = (dict(model.named_parameters())[key] for model in plain)
        torch.testing.assert_close(value, two.lerp(one, decays[0]).lerp(three, 1 - decays[1]))


@pytest.mark.parametrize("option", [{"ema": 0.9}, {"channels_last": True}, {"optimizer": "rmsprop", "lr": 0.01}])
def test_an_option_resumes_bit_for_bit(digits, tmp_path, option, monkeypatch):
    monkeypatch.setattr("gambeson.training.loop.name_of", lambda _: "both")  # one that stops stands for the other

    class Stop(Standard):
        def terms(self):
            weight, term = super().terms()["clean"]

            def stopping(model, batch):
                if batch.epoch == 2:
                    raise KeyboardInterrupt
                return term(model, batch)

            return {"clean": (weight, stopping)}

    whole, cut = fresh(digits), fresh(digits)
    settings = {"epochs": 3, "seed": 4, **option}
    gb.train(whole, digits, Standard(), **settings)
    with pytest.raises(KeyboardInterrupt):
        gb.train(cut, digits, Stop(), out=tmp_path, **settings)
    cut = fresh(digits)
    gb.train(cut, digits, Standard(), out=tmp_path, **settings)
    assert gb.models.fingerprint(cut) == gb.models.fingerprint(whole)
    for other in ({"seed": 5}, {"epochs": 4}):
        before = gb.models.fingerprint(cut)
        with pytest.raises(UserError, match=rf"holds another run \(it differs in (recipe\.)?{next(iter(other))}"):
            gb.train(cut, digits, Standard(), out=tmp_path, **{**settings, **other})
        assert gb.models.fingerprint(cut) == before


def test_channels_last_trains_the_same_network(digits, tmp_path):
    models = [fresh(digits), fresh(digits)]
    for model, last in zip(models, (False, True), strict=True):
        gb.train(model, digits, PGDAdversarial(eps=0.1), epochs=1, channels_last=last, seed=3, out=tmp_path / str(last))
    kernels = [module.weight for module in models[1].modules() if isinstance(module, nn.Conv2d)]
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    stored = gb.models.load(tmp_path / "True" / "model.safetensors")
    assert gb.models.fingerprint(stored) == gb.models.fingerprint(models[1]) != gb.models.fingerprint(fresh(digits))


def test_robust_selection_keeps_the_epoch_that_validation_names(digits, tmp_path):
    model = fresh(digits)
    history = gb.train(
        model,
        digits,
        PGDAdversarial(eps=0.1),
        epochs=4,
        select="best-pgd",
        robust_every=2,
        lr=0.1,
        seed=0,
        out=tmp_path,
    )
    measured = {k: entry["validation_pgd_accuracy"] for k, entry in enumerate(history) if "validation_uer" in entry}
    assert sorted(measured) == [1, 3]
    best, _ = gb.base.load_tensors(tmp_path / "state" / "best.safetensors")
    assert all(torch.equal(best[key], value) for key, value in model.state_dict().items())
    with pytest.raises(UserError, match="needs robust_every"):
        Recipe(select="best-universal")


def test_selection_is_among_the_epochs_that_are_accurate_enough():
    rows = [(0.9, 0.5, 0.2), (0.9, 0.2, 0.3), (0.8, 0.1, 0.8), (0.85, 0.4, 0.5), (0.9, 0.1, 0.4), (1.0, None, None)]
    history = [
        {"validation_accuracy": clean}
        | ({} if uer is None else {"validation_uer": uer, "validation_pgd_accuracy": pgd})
        for clean, uer, pgd in rows
    ]

    def taken(select, least=0.0):
        recipe = Recipe(select=select, robust_every=1, least_accuracy=least)
        return [k for k in range(len(history)) if is_best(history[: k + 1], recipe, Standard())]

    assert taken("best") == [0, 5]
    assert taken("best-universal") == [0, 1, 2]
    assert taken("best-pgd") == [0, 1, 2]
    assert taken("best-robust") == [0, 1, 2]
    assert taken("best-robust", 0.85) == [0, 1, 4]
    assert taken("best-pgd", 0.85) == [0, 1, 3]
    assert taken("best", 0.95) == [5]


def test_fine_tuning_holds_statistics_and_slows_early_layers(digits):
    model = fresh(digits, "resnet20x0.25")
    before = {key: value.clone() for key, value in model.named_buffers() if "running" in key}
    gb.train(model, digits, Standard(), epochs=1, freeze_statistics=True, seed=0)
    assert all(torch.equal(value, dict(model.named_buffers())[key]) for key, value in before.items())
    gb.train(model, digits, Standard(), epochs=1, seed=0)
    assert not all(torch.equal(value, dict(model.named_buffers())[key]) for key, value in before.items())
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
    groups = make_optimizer(net, Standard(), Recipe(layer_decay=0.5)).param_groups
    assert [group["lr_scale"] for group in groups] == [0.25, 0.5, 1.0]
    assert [len(group["params"]) for group in groups] == [2, 2, 2]


def test_adam_is_torch_s(digits):
    model, plain = fresh(digits), fresh(digits)
    gb.train(model, digits, Standard(), epochs=1, optimizer="adam", lr=0.001, seed=0)
    other = copy.deepcopy(plain)
    gb.train(other, digits, Standard(), epochs=1, lr=0.001, seed=0)
    moved = [(a - b).abs().max() for a, b in zip(model.parameters(), plain.parameters(), strict=True)]
    assert max(moved) > 0.002  # Adam's step is about the learning rate, SGD's that of the gradient
    assert gb.models.fingerprint(model) != gb.models.fingerprint(other)


def test_rmsprop_takes_inception_s_steps():
    """Decay 0.9 and epsilon 1 (Szegedy et al. 2016), momentum on the scaled gradient: two steps by hand."""
    model = nn.Linear(1, 1, bias=False)
    start = model.weight.detach().clone()
    optimizer = make_optimizer(model, Standard(), Recipe(optimizer="rmsprop", lr=0.1, momentum=0.5, weight_decay=0))
    square = moved = 0.0
    expected = float(start)
    for gradient in (2.0, -1.0):
        model.weight.grad = torch.full_like(model.weight, gradient)
        optimizer.step()
        square = 0.9 * square + 0.1 * gradient**2
        moved = 0.5 * moved + gradient / (square**0.5 + 1)
        expected -= 0.1 * moved
        assert float(model.weight.detach()) == pytest.approx(expected)


def test_steps_fall_at_milestones_and_after_every_so_many_epochs():
    recipe = Recipe(epochs=10, lr=1.0, schedule="steps", decay_every=2, milestones=(5,), gamma=0.5)
    rates = [recipe.lr_at(4 * epoch + k, 4) for epoch in range(10) for k in (0, 3)]
    falls = [0, 0, 1, 1, 2, 3, 4, 4, 5, 5]
    assert rates == [0.5**fall for fall in falls for _ in range(2)]


def test_what_has_no_effect_is_told_and_a_preset_s_own_gives_way():
    with pytest.warns(UserWarning, match="gamma has no effect on the schedule 'cosine': set schedule=steps"):
        Recipe(gamma=0.5)
    with pytest.warns(UserWarning, match="a warmup of 5 epochs is longer than the training of 3"):
        Recipe(epochs=3, warmup=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Recipe(preset="shared-adversarial", schedule="cosine").milestones == ()
        assert Recipe(preset="shared-adversarial").milestones == (50,)


def test_presets_are_the_papers_recipes(tmp_path):
    paper = Recipe(preset="shared-adversarial")
    assert (paper.epochs, paper.lr, paper.lr_at(49, 1), paper.lr_at(50, 1)) == (65, 0.0025, 0.0025, 0.00025)
    inception = Recipe(preset="ensemble-adversarial-imagenet", epochs=4)
    assert [inception.lr_at(k, 1) for k in range(4)] == pytest.approx([0.045, 0.045, 0.0423, 0.0423])
    assert (inception.optimizer, inception.batch_size) == ("rmsprop", 800)
    assert Recipe(**Recipe(preset="learn2perturb").plain()) == Recipe(preset="learn2perturb")
    for name in PRESETS:
        assert Recipe(preset=name) != Recipe()
    with pytest.raises(UserError, match="unknown preset 'shared': did you mean shared-adversarial"):
        Recipe(preset="shared")
    run = TrainRun(data="digits", model="lenet5", defense="standard", recipe={"preset": "ensemble-adversarial-mnist"})
    assert run.recipe.optimizer == "adam"
    assert "preset" not in run.plain()["recipe"]


def test_trackers_get_every_epoch(digits, tmp_path):
    pytest.importorskip("tensorboard")
    gb.train(fresh(digits), digits, Standard(), epochs=2, track="tensorboard", out=tmp_path)
    assert list((tmp_path / "track").rglob("events.out.tfevents.*"))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_tracker_that_is_not_there_is_named(digits, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"gambeson\[track\]"):
        gb.train(fresh(digits), digits, Standard(), epochs=1, track="mlflow", out=tmp_path)


def test_divergence_keeps_the_last_good_state(digits, tmp_path):
    class Diverges(Standard):
        def terms(self):
            weight, term = super().terms()["clean"]
            return {
                "clean": (weight, lambda model, batch: term(model, batch) / (0 if batch.step == 20 else 1)),
            }

    with pytest.raises(UserError, match="in epoch 2, between steps 0 and 7: lower .* keeps the state after epoch 2"):
        gb.train(fresh(digits), digits, Diverges(), epochs=4, batch_size=128, out=tmp_path, seed=0)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    weights, _ = gb.base.load_tensors(tmp_path / "state" / "latest.safetensors")
    assert all(value.isfinite().all() for value in weights.values() if value.is_floating_point())


def test_no_epoch_is_the_best_before_all_of_the_objective_is_at_work(digits, tmp_path):
    defense = gb.defenses.Learn2Perturb(eps=0.1, steps=1, noise_from=2, adversarial_from=2, places=("relu1",))
    gb.train(fresh(digits), digits, defense, epochs=2 + 1, select="best", lr=1e-6, seed=0, out=tmp_path)
    weights, _ = gb.base.load_tensors(tmp_path / "state" / "best.safetensors")
    latest, _ = gb.base.load_tensors(tmp_path / "state" / "latest.safetensors")
    assert all(torch.equal(value, latest[f"model.{name}"]) for name, value in weights.items())


def test_a_defence_given_by_name_is_refused(digits):
    with pytest.raises(UserError, match=r"defense is a str: expected a defence, such as gb.defenses.Standard\(\)"):
        gb.train(gb.models.create("lenet", digits), digits, "standard", epochs=1)


def test_weights_of_one_network_start_every_member_of_an_ensemble(digits, tmp_path):
    single = gb.models.create("lenet5", digits, seed=5)
    gb.models.save(single, tmp_path / "one.safetensors")
    defense = gb.defenses.create("jacobian-ensemble", members=2)
    run = TrainRun(data="digits", model="lenet5", defense=defense, init=str(tmp_path / "one.safetensors"))
    for member in _model(run, digits).voters:
        for name, value in single.state_dict().items():
            assert torch.equal(member.state_dict()[name], value)
    other = gb.models.create("lenet5", in_channels=1, classes=7, image_size=8)
    gb.models.save(other, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"do not fit this lenet5"):
        _model(run.model_copy(update={"init": str(tmp_path / "other.safetensors")}), digits)

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gambeson as gb
from gambeson import UserError
from gambeson.base import generator, load_tensors
from gambeson.cli.app import run as cli
from gambeson.defenses import PGDAdversarial, Standard
from gambeson.training import Recipe
from gambeson.training.validation import is_best


def fresh(digits, seed=0, name="lenet5"):
    torch.manual_seed(seed)
    return gb.models.create(name, digits)


def test_equals_the_shortest_plain_loop_bit_for_bit(digits):
    recipe = Recipe(epochs=2, batch_size=64, lr=0.1, momentum=0.9, weight_decay=1e-3, warmup=0.5)
    ours, plain = fresh(digits), fresh(digits)
    start = {key: value.clone() for key, value in plain.state_dict().items()}
    gb.train(ours, digits, Standard(), recipe=recipe, seed=7)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    plain.train()
    steps = len(digits.train) // 64
    for epoch in range(2):
        order = torch.randperm(len(digits.train), generator=generator(7, "order", epoch))
        for k in range(steps):
            x, y = digits.train.take(order[k * 64 : k * 64 + 64])
            progress = epoch + k / steps
            rise = min(1.0, (progress + 1 / steps) / 0.5)
            optimizer.param_groups[0]["lr"] = 0.1 * rise * (1 + math.cos(math.pi * progress / 2)) / 2
            optimizer.zero_grad()
            F.cross_entropy(plain(x), y).backward()
            optimizer.step()
    for key, value in ours.state_dict().items():
        assert torch.equal(value, plain.state_dict()[key])
    assert any(not torch.equal(value, start[key]) for key, value in ours.state_dict().items())


def test_learns_digits_and_logs_every_epoch(digits, tmp_path):
    model = fresh(digits)
    untrained = gb.evaluation.accuracy(model, digits)
    history = gb.train(model, digits, Standard(), epochs=8, lr=0.05, batch_size=64, out=tmp_path)
    assert gb.evaluation.accuracy(model, digits).low > 0.75 > untrained.high
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == history
    assert [line["epoch"] for line in lines] == list(range(8))
    assert lines[-1]["loss"] < lines[0]["loss"] / 3
    back = gb.models.load(tmp_path)
    assert gb.models.fingerprint(back) == gb.models.fingerprint(model)


@pytest.mark.parametrize("cut", [1, 3])
def test_a_cut_run_resumes_in_lock_step(digits, tmp_path, cut, stand_in):

    class Dropped(nn.Module):
        """Dropout and BatchNorm: what a resume breaks first."""

        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(
                nn.Flatten(),
                nn.Linear(64, 32),
                nn.BatchNorm1d(32),
                nn.ReLU(),
                nn.Dropout(0.3),
                nn.Linear(32, 10),
            )

        def forward(self, x):
            return self.layers(x)

    def run(out, stop=None):
        torch.manual_seed(1)
        model, seen = Dropped(), 0
        defense = PGDAdversarial(eps=0.1)
        if stop is not None:

            class Cut(PGDAdversarial):
                def terms(self):
                    weight, term = super().terms()["adversarial"]

                    def stopping(model, batch):
                        nonlocal seen
                        seen += 1
                        if seen > stop:
                            raise KeyboardInterrupt
                        return term(model, batch)

                    return {"adversarial": (weight, stopping)}

            defense = Cut(eps=0.1)
        kwargs = {"epochs": 4, "batch_size": 128, "seed": 5, "out": out, "augment": "crop"}
        if stop is None:
            return model, gb.train(model, digits, defense, **kwargs)
        with pytest.raises(KeyboardInterrupt):
            gb.train(model, digits, defense, **kwargs)
        return model, None

    whole, history = run(tmp_path / "whole")
    steps = len(digits.train) // 128
    run(tmp_path / "cut", stop=cut * steps + 3)
    torch.rand(100)  # another process would have another global generator
    resumed, again = run(tmp_path / "cut")
    assert again == history
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    files = [tmp_path / name / "state" / "latest.safetensors" for name in ("whole", "cut")]
    (one, _), (other, _) = (load_tensors(file) for file in files)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert (tmp_path / "whole" / "metrics.jsonl").read_text() == (tmp_path / "cut" / "metrics.jsonl").read_text()


def test_sigkill_at_any_moment_loses_nothing_finished(tmp_path, one_dnn):
    command = [
        *("train", "--data", "digits", "--model", "lenet5", "--json"),
        *("--defense", "shared-adversarial", "--sharedness", "16", "--batch-size", "64", "--epochs", "4"),
    ]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert cli([*command, "--out", str(whole)]) == 0
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, "-m", "gambeson", *command, "--out", str(cut)], **quiet)
    deadline = time.monotonic() + 120
    while not (cut / "state" / "latest.safetensors").is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = len((cut / "metrics.jsonl").read_text().splitlines())
    assert 1 <= done < 4
    assert cli([*command, "--out", str(cut)]) == 0
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    assert not [file for file in cut.rglob(".*") if file.is_file()]


def test_best_epoch_is_chosen_on_validation(digits, tmp_path):
    model = fresh(digits)
    history = gb.train(model, digits, Standard(), epochs=5, lr=0.2, batch_size=64, out=tmp_path, select="best")
    best = max(entry["validation_accuracy"] for entry in history)
    assert gb.evaluation.accuracy(model, digits.validation).value == pytest.approx(best)


def test_schedules_are_functions_of_the_step():
    steps = Recipe(epochs=10, lr=1.0, schedule="steps", milestones=(4, 8), gamma=0.1)
    assert [steps.lr_at(10 * epoch, 10) for epoch in (0, 3, 4, 8)] == pytest.approx([1, 1, 0.1, 0.01])
    assert Recipe(epochs=10, lr=1.0).lr_at(50, 10) == pytest.approx(0.5)
    assert Recipe(epochs=10, lr=1.0, schedule="constant", warmup=2).lr_at(9, 10) == pytest.approx(0.5)


def test_mistakes_are_named(digits):
    model = fresh(digits)
    with pytest.raises(UserError, match="batch size 4096 does not fit 1078 training images"):
        gb.train(model, digits, Standard(), batch_size=4096)
    with pytest.raises(TypeError, match="no setting 'epoch': did you mean epochs"):
        gb.train(model, digits, Standard(), epoch=3)
    with pytest.raises(TypeError, match="a recipe or its fields, not both"):
        gb.train(model, digits, Standard(), recipe=Recipe(), epochs=3)
    with pytest.raises(UserError, match="loss became NaN or infinite in epoch 0, between steps 0 and 15: lower the"):
        gb.train(model, digits, Standard(), epochs=1, lr=1e6, batch_size=64)


def test_a_batch_that_nobody_asked_for_fits_few_images(digits):
    few = gb.data.Dataset("few", digits.train.subset(torch.arange(90)), digits.validation, digits.test, digits.classes)
    one, other = fresh(digits), fresh(digits)
    with pytest.warns(UserWarning, match="a batch has 64 images in place of 128, for there are only 90 to train on"):
        gb.train(one, few, Standard(), epochs=2)
    gb.train(other, few, Standard(), epochs=2, batch_size=64)
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))
    with pytest.raises(UserError, match="batch size 128 does not fit 90 training images"):
        gb.train(one, few, Standard(), recipe=Recipe())


def test_label_maps_train_with_an_ignore_index():
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(60, 1, 6, 6, generator=draw)
    y = (x[:, 0] > 0.5).long()
    y[:, 0] = 255
    data = gb.data.as_dataset((x, y))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    defense = gb.defenses.SharedAdversarial(eps=0.02, sharedness=2, sigma=0.5)
    recipe = Recipe(epochs=30, batch_size=10, lr=0.5, augment="crop-flip", robust_every=30)
    history = gb.train(model, data, defense, recipe=recipe)
    last = history[-1]
    assert last["validation_accuracy"] > 0.9
    assert data.test.ignore_index == 255
    few = data.validation
    assert last["validation_accuracy"] == pytest.approx(gb.evaluation.accuracy(model, few).value)
    assert last["validation_mean_iou"] == pytest.approx(gb.evaluation.mean_iou(model, few).value)
    assert last["validation_mean_iou"] < last["validation_accuracy"]
    under = gb.attacks.PGD(eps=0.02, steps=10)(model, *few.take(slice(None)), task=few.task)
    right = (model(under).argmax(1) == few.labels)[few.labels != 255].float().mean()
    assert last["validation_pgd_accuracy"] == pytest.approx(float(right), abs=0.02)
    assert last["validation_pgd_accuracy"] < last["validation_accuracy"]
    assert 1 - last["validation_uer"] < last["validation_accuracy"]
    assert last["validation_uap_mean_iou"] < last["validation_mean_iou"]
    assert "validation_uer" not in history[0]
    with pytest.warns(UserWarning, match="has not learnt: its mean IoU on .*, and a single class has up to 50.0 %"):
        gb.train(nn.Conv2d(1, 2, 1), data, Standard(), epochs=1, batch_size=10, lr=1e-9)


def test_the_best_epoch_on_label_maps_is_that_of_the_highest_mean_iou():
    def chosen(*epochs):
        names = ("validation_accuracy", "validation_mean_iou")
        history = [dict(zip(names, epoch, strict=True)) for epoch in epochs]
        return is_best(history, Recipe(select="best"), Standard())

    assert chosen((0.9, 0.3), (0.8, 0.5))
    assert not chosen((0.8, 0.5), (0.9, 0.3))


def test_a_cut_run_on_label_maps_resumes_bit_for_bit(tmp_path, stand_in):
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(40, 3, 16, 16, generator=draw)
    y = x.argmax(1)
    y[:, 0] = 255
    data = gb.data.as_dataset((x, y))
    defense = gb.defenses.SharedAdversarial(eps=0.02, sharedness=2, target="prediction")

    class Cut(gb.defenses.SharedAdversarial):
        def terms(self):
            weight, term = super().terms()["adversarial"]

            def stopping(model, batch):
                if batch.epoch == 1:
                    raise KeyboardInterrupt
                return term(model, batch)

            return {**super().terms(), "adversarial": (weight, stopping)}

    def run(defense, out):
        model = gb.models.create("unet-small", data, seed=1)
        recipe = Recipe(epochs=3, batch_size=8, augment="crop-flip")
        return model, gb.train(model, data, defense, recipe=recipe, seed=2, out=tmp_path / out)

    whole, history = run(defense, "whole")
    assert history[-1]["clean"] < history[0]["clean"]
    with pytest.raises(KeyboardInterrupt):
        run(Cut(**defense.plain()), "cut")
    resumed, again = run(defense, "cut")
    assert again == history
    assert gb.models.fingerprint(resumed) == gb.models.fingerprint(whole)
    assert (tmp_path / "whole/metrics.jsonl").read_text() == (tmp_path / "cut/metrics.jsonl").read_text()


def test_a_folder_keeps_the_data_and_the_weights_that_its_training_began_with(digits, tmp_path):
    defense, more = Standard(), {"epochs": 2, "batch_size": 128, "seed": 1, "out": tmp_path}
    model = fresh(digits)
    history = gb.train(model, digits, defense, **more)
    assert gb.train(model, digits, defense, **more) == history  # as after an interrupt in a notebook
    assert gb.train(fresh(digits), digits, defense, **more) == history
    turned = digits.validation.with_images(digits.validation.images.flip(-1))
    other = gb.data.Dataset(digits.name, digits.train, turned, digits.test, digits.classes)
    with pytest.raises(UserError, match=r"holds another run \(it differs in data\.validation\): choose another --out"):
        gb.train(fresh(digits), other, defense, **more)
    drawn = fresh(digits)
    with torch.no_grad():
        next(drawn.parameters()).neg_()
    with pytest.raises(UserError, match=r"\(it differs in initial weights\)"):
        gb.train(drawn, digits, defense, **more)


def test_a_refused_training_leaves_the_model_as_it_is(digits, tmp_path):
    gb.train(gb.models.create("lenet5", digits), digits, gb.defenses.Standard(), epochs=1, out=tmp_path)
    model = gb.models.create("lenet5", digits, seed=3).eval()
    before, modules = {name: value.clone() for name, value in model.state_dict().items()}, len(list(model.modules()))
    for refused in (
        {"defense": gb.defenses.Learn2Perturb(eps=0.1), "epochs": 1, "out": tmp_path},  # which would add its noise
        {"defense": gb.defenses.Standard(), "epochs": 1, "batch_size": 100_000},
    ):
        with pytest.raises(UserError):
            gb.train(model, digits, **refused)
        assert not any(module.training for module in model.modules())
        assert len(list(model.modules())) == modules
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

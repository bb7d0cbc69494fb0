import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import gambeson as gb
from gambeson.base import load_tensors
from gambeson.cli.app import run
from tests.cli.test_cli import says


@pytest.fixture(scope="module")
def weights(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    gb.models.save(trained, path)
    return str(path)


def test_attack_stores_images_that_score_its_number_and_runs_again(weights, trained, tmp_path, capsys):
    command = ["attack", weights, "--data", "digits", "--eps", "0.1", "--images", "120"]
    assert run([*command, "--set", "steps=10", "--out", str(tmp_path / "a"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    tensors, _ = load_tensors(tmp_path / "a" / "adversarial.safetensors")
    with torch.no_grad():
        right = float((trained(tensors["images"]).argmax(1) == tensors["labels"]).float().mean())
    assert printed["robust"]["value"] == pytest.approx(right, abs=1e-6)
    assert printed["robust"]["value"] < printed["clean"]["value"] - 0.2
    assert printed["largest"] <= 0.1 + 1e-6
    assert run(["attack", "--config", str(tmp_path / "a" / "run.yaml"), "--out", str(tmp_path / "b")]) == 0
    assert (tmp_path / "b" / "result.json").read_bytes() == (tmp_path / "a" / "result.json").read_bytes()


def test_the_standard_row_is_at_least_as_strong_as_its_first_attack(weights, tmp_path, capsys):
    command = [
        "attack",
        "--model",
        weights,
        "--data",
        "digits",
        "--attack",
        "standard",
        "--eps",
        "0.06",
        "--images",
        "60",
    ]
    assert run([*command, "--set", "settings.queries=100", "--out", str(tmp_path / "a"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [part["attack"] for part in found["rounds"]] == ["pgd", "auto-pgd", "auto-pgd-targeted", "square"]
    assert found["rounds"][0]["broken"] > 0
    assert found["robust"]["value"] <= found["rounds"][0]["accuracy"]["value"] < found["clean"]["value"]
    square = found["rounds"][3]
    assert square["cost"]["forwards"] <= square["tried"] * 101 + square["tried"]  # its budget, and the judge's look
    assert square["cost"]["backwards"] == 0
    assert run([*command, "--set", "settings.steps=3", "--out", str(tmp_path / "b")]) == 2
    assert "the suite takes eps, norm, queries, faithful, eot_samples" in capsys.readouterr().err


def test_uap_craft_score_list(weights, tmp_path, capsys):
    file = tmp_path / "uap.safetensors"
    craft = ["uap", "craft", "--model", weights, "--data", "digits", "--eps", "0.2", "--out", str(file)]
    small = ["--set", "steps=30", "--set", "restarts=1", "--set", "batch_size=64"]
    assert run([*craft, *small]) == 0
    capsys.readouterr()
    assert run(["uap", "score", str(file), "--model", weights, "--data", "digits", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["uer"]["low"] > max(control["worst"]["high"] for control in found["controls"])
    assert run(["uap", "list", str(tmp_path), "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert (entry["attack"], entry["eps"], entry["crafted_split"]) == ("stochastic-pgd", 0.2, "digits/train")
    for arguments, words in [
        ([*craft, *small], "exists: choose another --out"),
        (["uap", "score", str(file), "--model", weights, "--data", "mnist5k"], "28"),
        (["uap", "score", weights, "--model", weights, "--data", "digits"], "expected a universal perturbation"),
        (["uap", "craft", "--model", weights, "--attack", "spgd"], "unknown attack 'spgd': did you mean"),
        (["attack", weights, "--model", "another"], "two models were given"),
        (["attack"], "no model was given"),
    ]:
        assert run(arguments) == 2
        error = capsys.readouterr().err
        assert words in error
        assert "Traceback" not in error


NET = """
import torch
import yaml

class Colours(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.colours = torch.nn.Parameter(torch.tensor([[0.35, 0.35, 0.35], [0.65, 0.35, 0.35], [0.35, 0.35, 0.65]]))

    def forward(self, x):
        return -32 * (x[:, None] - self.colours[None, :, :, None, None]).square().sum(2)
"""


def scenes(tmp_path):
    """Write boxes and bins of 12 x 12 pixels with their masks, and a net that knows them; return its arguments."""
    draw = np.random.default_rng(0)
    for place in ("images", "masks"):
        (tmp_path / "scenes" / place).mkdir(parents=True)
    for n in range(60):
        mask = np.zeros((12, 12), np.uint8)
        for k in (1, 2):
            i, j = draw.integers(0, 7, 2)
            mask[i : i + 6, j : j + 6] = k
        colour = np.array([[90, 90, 90], [165, 90, 90], [90, 90, 165]])[mask] + draw.normal(0, 8, (12, 12, 3))
        Image.fromarray(colour.clip(0, 255).astype(np.uint8)).save(tmp_path / f"scenes/images/{n}.png")
        Image.fromarray(mask).save(tmp_path / f"scenes/masks/{n}.png")
    Image.fromarray(mask[::-1].copy()).save(tmp_path / "goal.png")
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "scenes" / "palette.txt").write_text("ground\nbox\nbin\n")
    return ["--model", f"{tmp_path / 'net.py'}:Colours", "--data", f"mask-folder:{tmp_path / 'scenes'}"]


@pytest.mark.parametrize("attack", ["segpgd", "cospgd", "sea", "standard"])
def test_attacks_on_label_maps_report_pixel_accuracy_and_mean_iou_of_stored_images(attack, tmp_path, capsys):
    about, out = scenes(tmp_path), tmp_path / "out"
    command = ["attack", *about, "--attack", attack, "--eps", "0.1", "--images", "6"]
    command += ["--set", "queries=20"] if attack == "standard" else ["--set", "steps=10"]
    assert run([*command, "--out", str(out)]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "pixel accuracy" in said
    assert "mean IoU" in said
    result = json.loads((out / "result.json").read_text())["result"]
    tensors, _ = load_tensors(out / "adversarial.safetensors")
    made = gb.evaluation.load_model(about[1], about[3], "cpu").model
    split = gb.data.as_split((tensors["images"], tensors["labels"]))
    assert gb.evaluation.accuracy(made, split).value == result["robust"]["value"] < result["clean"]["value"]
    chosen = split.with_images(tensors["iou_images"])
    assert gb.evaluation.mean_iou(made, chosen).value == pytest.approx(result["maps"]["mean_iou"]["value"])
    names = [one["attack"] for one in result["maps"]["attacks"]]
    sea = ["sea-mce", "sea-mce-bal", "sea-js"]
    assert names == {"sea": sea, "standard": [*sea, "square"]}.get(attack, [attack])
    if attack == "standard":
        settings = json.loads((out / "result.json").read_text())["attacks"]
        assert len(settings["sea-mce-bal"]["class_pixels"]) == 3
    assert run([*command, "--out", str(out), "--json"]) == 0  # read back
    assert json.loads(capsys.readouterr().out) == result


def test_uap_of_label_maps_with_a_target(tmp_path, capsys):
    about = scenes(tmp_path)
    small = ["--eps", "0.25", "--set", "steps=20", "--set", "probe_starts=0", "--set", "batch_size=8"]
    for name, target, more in [
        ("hidden", "hide:bin", ["--set", "omega=0.8", "--set", "tau=0.7", "--set", "tile=[12, 12]"]),
        ("static", f"static:{tmp_path / 'goal.png'}", ["--set", "labels=truth"]),
    ]:
        file = str(tmp_path / f"{name}.safetensors")
        assert run(["uap", "craft", *about, *small, "--target", target, *more, "--out", file]) == 0
        told = "mean of hidden and of others kept" if name == "hidden" else "reached by"
        assert told in " ".join(capsys.readouterr().err.split())
        assert run(["uap", "score", file, *about, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["target"]
        assert [one["name"] for one in found["controls"]] == ["random-sign", "chessboard", "shuffled target map"]
        if name == "hidden":
            assert found["hidden"]["low"] > max(one["hidden"]["high"] for one in found["controls"][:2])
            assert found["kept"]["value"] > 0.8
        elif name == "static":
            assert found["success"]["low"] > max(
                found["clean"]["high"], *(one["success"]["high"] for one in found["controls"])
            )
    assert run(["uap", "score", str(tmp_path / "hidden.safetensors"), *about]) == 0
    said = capsys.readouterr().err
    assert all(word in said for word in ("target         hide:bin", "hidden ", "others kept ", "shuffled target map: "))
    assert run(["uap", "list", str(tmp_path), "--json"]) == 0
    kept = {Path(entry["file"]).stem: entry["settings"] for entry in json.loads(capsys.readouterr().out)}
    assert (kept["hidden"]["target"], kept["hidden"]["omega"], kept["hidden"]["tile"]) == ("hide:bin", 0.8, [12, 12])
    assert run(["uap", "list", str(tmp_path)]) == 0
    assert "hide:bin" in capsys.readouterr().out
    for target, more, words in [
        ("hide:road", [], "unknown class 'road'"),
        ("static:99", [], "static:99: scenes/validation has 9 images"),
        (f"static:{tmp_path / 'none.png'}", [], "cannot be read as a PNG of class indices"),
        ("hide:bin", ["--attack", "deepfool-uap"], "target"),
        ("hide:bin", ["--set", "tile=[30, 30]"], "tile = 30x30 is larger than the images of 12x12 pixels"),
        ("static:1", ["--set", "omega=0.8"], "omega weighs the pixels of a class to hide, and the target is static:1"),
    ]:
        wanted = [*small[:2], "--target", target, *more, "--out", str(tmp_path / "bad.safetensors")]
        assert run(["uap", "craft", *about, *wanted]) == 2
        assert words in capsys.readouterr().err


def test_transfer_between_nets_for_label_maps_counts_pixels(tmp_path, capsys):
    _, net, *about = scenes(tmp_path)
    (tmp_path / "other.py").write_text(NET.replace("[0.35, 0.35, 0.65]", "[0.35, 0.5, 0.65]"))
    other = f"{tmp_path / 'other.py'}:Colours"
    out = tmp_path / "out"
    assert run(["transfer", net, other, *about, "--attacks", "fgsm", "--eps", "0.16", "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    model, split = gb.evaluation.load_model(net, about[1], "cpu").model, gb.data.load(about[1]).test
    assert found["clean"][0]["value"] == pytest.approx(gb.evaluation.accuracy(model, split).complement.value)
    assert found["unit"] == "pixel"
    (own, across), _ = found["tables"][0]["errors"]
    assert own["value"] > across["value"] > found["clean"][1]["value"] + 0.1
    assert "How many of their pixels do those get wrong?" in (out / "transfer.html").read_text()


def test_an_attack_on_images_that_are_all_wrong_already_says_so(tmp_path, digits):
    labels = digits.test.labels[digits.test.sample_indices(3, seed=0)].tolist()
    other = next(label for label in range(10) if label not in labels)
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n\n\nclass Same(nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.one = nn.Linear(64, 10)\n\n    def forward(self, x):\n"
        f"        return 0.01 * self.one(x.flatten(1)) + 9 * (torch.arange(10) == {other})\n"
    )
    command = ["attack", f"{tmp_path}/net.py:Same", "--data", "digits", "--attack", "fgsm", "--images"]
    with pytest.warns(UserWarning, match="none of the 3 images was right before the attack"):
        assert run([*command, "3", "--out", str(tmp_path / "out")]) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run([*command, "100", "--out", str(tmp_path / "more")]) == 0


def test_the_default_eps_is_that_of_the_norm_that_is_used(weights, tmp_path, capsys):
    """However the norm is spelled, and also where it is the attack's or the defence's own default."""
    attack = ["attack", weights, "--data", "digits", "--images", "3", "--attack"]
    assert run([*attack, "l1-auto-pgd", "--out", str(tmp_path / "a")]) == 2
    assert "there is no customary eps for the norm 1: give one" in capsys.readouterr().err
    assert run([*attack, "fgsm", "--set", "norm=l2", "--out", str(tmp_path / "b"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["largest"] <= 0.4
    assert json.loads((tmp_path / "b" / "result.json").read_text())["run"]["settings"]["eps"] == 0.4
    train = ["train", "--data", "digits", "--model", "lenet5", "--defense", "pgd-adversarial", "--epochs", "1"]
    settings = ["--set", "defense.norm=l2", "--set", "defense.steps=1", "--set", "recipe.batch_size=1000"]
    assert run([*train, *settings, "--out", str(tmp_path / "c"), "--json"]) == 0
    assert yaml.safe_load((tmp_path / "c" / "run.yaml").read_text())["defense"]["eps"] == 0.4


def test_settings_in_a_setting_are_named_like_settings(weights, tmp_path, capsys):
    command = ["attack", weights, "--data", "digits", "--eps", "0.1", "--images", "10", "--set"]
    assert run([*command, "noise.copies=2", "--out", str(tmp_path / "a"), "--json"]) == 0
    assert yaml.safe_load((tmp_path / "a" / "run.yaml").read_text())["settings"]["noise"]["copies"] == 2
    capsys.readouterr()
    says(capsys, [*command, "noise.copies=0"], "--set noise.copies=0: expected greater than or equal to 1")
    says(capsys, [*command, "noize.copies=2"], "there is no setting 'noize': did you mean noise?")
    says(capsys, [*command, "settings.noise.copy=2"], "--set settings.noise.copy=2: ", "choose among copies, size")

import json

import pytest
import torch

import gambeson as gb
from gambeson.base import load_tensors
from gambeson.cli.app import run


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
    assert found["UER"]["low"] > max(control["worst"]["high"] for control in found["controls"])
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

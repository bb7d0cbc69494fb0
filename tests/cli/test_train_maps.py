"""``gambeson train`` on label maps: its defaults, its folder, and training the same run again."""

import json

import yaml

import gambeson as gb
from gambeson.cli.app import run

DATA = "digit-scenes?size=32,train=64,validation=16,test=16"
TRAIN = ["train", "--data", DATA, "--model", "unet-small", "--defense", "shared-adversarial", "--epochs", "2"]


def test_label_maps_have_their_own_defaults_and_train_to_a_folder_that_is_evaluated(tmp_path, capsys):
    out = tmp_path / "run"
    assert run([*TRAIN, "--out", str(out)]) == 0
    assert "% mean IoU after 2 epochs" in " ".join(capsys.readouterr().err.split())
    settings = yaml.safe_load((out / "run.yaml").read_text())
    assert settings["finished"]
    assert settings["defense"]["eps"] == 8 / 255
    assert (settings["defense"]["sharedness"], settings["defense"]["target"]) == (4, None)
    recipe = settings["recipe"]
    assert (recipe["epochs"], recipe["optimizer"], recipe["batch_size"], recipe["lr"]) == (2, "adam", 32, 0.004)
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    data, model = gb.data.load(DATA), gb.models.load(out)
    assert abs(gb.evaluation.mean_iou(model, data.validation).value - last["validation_mean_iou"]) < 1e-9
    assert run(["train", "--config", str(out / "run.yaml"), "--out", str(tmp_path / "again")]) == 0
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()


def test_what_is_given_goes_before_the_defaults_of_label_maps(tmp_path):
    given = ["--sharedness", "8", "--batch-size", "16", "--set", "preset=learn2perturb", "--set", "target=truth"]
    assert run([*TRAIN, *given, "--out", str(tmp_path / "run")]) == 0
    settings = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert (settings["defense"]["sharedness"], settings["defense"]["target"]) == (8, "truth")
    assert (settings["recipe"]["batch_size"], settings["recipe"]["optimizer"]) == (16, "sgd")

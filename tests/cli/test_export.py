"""``gambeson export``: the file, the numbers beside it, and an export that does not agree."""

from __future__ import annotations

import json

import pytest
import torch
import typer

import gambeson as gb
from gambeson.base import UserError
from gambeson.cli.export import export as command
from gambeson.evaluation import export_check


@pytest.fixture(scope="module")
def weights(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    gb.models.save(trained, path)
    return str(path)


@pytest.fixture(scope="module")
def noisy(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("noisy") / "model.safetensors"
    model = gb.models.create(
        "lenet5", **{k: getattr(trained.card, k) for k in ("in_channels", "classes", "image_size")}
    )
    model.load_state_dict(trained.state_dict())
    _equip(model)
    gb.models.save(model, path)
    return str(path)


def _equip(model):
    from gambeson.models.factory import add_noise
    from gambeson.models.noise import FeatureNoise

    add_noise(model, FeatureNoise(init=0.3))


def run(*arguments):
    """Run the command as the application does; return its exit code and its error, if it is the user's."""
    app = typer.Typer()
    app.command("export")(command)
    try:
        app(args=list(arguments), standalone_mode=False)
    except UserError as error:
        return 2, str(error)
    return 0, ""


def test_the_name_of_the_file_says_what_is_written(weights, tmp_path, capsys):
    out = tmp_path / "net.safetensors"
    assert run(weights, "--data", "digits", "--out", str(out), "--images", "5", "--json") == (0, "")
    assert json.loads(capsys.readouterr().out)["to"] == "safetensors"
    code, words = run(weights, "--to", "torch-export", "--data", "digits", "--out", str(tmp_path / "net.onnx"))
    assert (code, "whose name is that of onnx: leave one of them out" in words) == (2, True)
    assert not (tmp_path / "net.onnx").exists()


@pytest.mark.parametrize("to", ["torch-export", "safetensors", "onnx"])
def test_every_target_scores_as_the_original(weights, trained, digits, tmp_path, capsys, to):
    if to == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)
    out = tmp_path / "net"
    assert run(weights, "--to", to, "--data", "digits", "--out", str(out), "--json") == (0, "")
    printed = json.loads(capsys.readouterr().out)
    stored = json.loads((tmp_path / "net.json").read_text())
    assert {key: stored[key] for key in printed} == printed
    right = gb.evaluation.accuracy(trained, digits)
    assert printed["original"]["value"] == pytest.approx(right.value)
    assert printed["exported"]["value"] == pytest.approx(right.value)
    assert printed["largest_difference"] < 1e-3
    assert (printed["agrees"], printed["votes"], printed["spread_ratio"]) == (True, 1, None)
    code, error = run(weights, "--to", to, "--data", "digits", "--out", str(out))
    assert code == 2
    assert "exists: choose another --out" in error


def test_a_random_model_is_scored_over_draws(noisy, tmp_path, capsys):
    out = str(tmp_path / "net.pt2")
    assert run(noisy, "--data", "digits", "--out", out, "--json", "--votes", "6", "--images", "120") == (0, "")
    printed = json.loads(capsys.readouterr().out)
    assert printed["votes"] == 6
    assert printed["original"]["n"] == 120
    assert 0.8 < printed["spread_ratio"] < 1.25
    assert 0 < printed["largest_difference"] < 3 * printed["by_chance"]


def test_an_export_without_the_noise_does_not_agree(noisy, tmp_path, monkeypatch, capsys):
    from gambeson.models.noise import noise_off

    real = export_check.export

    def quiet(model, path, to):
        with noise_off(model):
            real(model, path, to)

    monkeypatch.setattr(export_check, "export", quiet)
    out = str(tmp_path / "net.pt2")
    code, error = run(noisy, "--data", "digits", "--out", out, "--images", "60")
    assert code == 2
    assert "does not score as" in error
    assert json.loads((tmp_path / "net.pt2.json").read_text())["agrees"] is False
    assert "0.00 times the original's" in " ".join(capsys.readouterr().err.split())


def test_an_export_with_other_weights_does_not_agree(weights, tmp_path, monkeypatch):
    real = export_check.export

    def wrong(model, path, to):
        with torch.no_grad():
            kept = next(model.parameters()).clone()
            next(model.parameters()).add_(0.05)
            real(model, path, to)
            next(model.parameters()).copy_(kept)

    monkeypatch.setattr(export_check, "export", wrong)
    code, error = run(weights, "--data", "digits", "--out", str(tmp_path / "net.pt2"))
    assert code == 2
    assert "do not use it" in error


def test_mistakes(weights, tmp_path):
    for arguments, words in [
        ((weights, "--to", "onix", "--out", "x"), "unknown export target 'onix': did you mean onnx?"),
        (("lenet5", "--data", "digits"), "no file was named for the export of lenet5"),
        ((weights, "--data", "digits", "--out", f"{tmp_path}/a", "--votes", "1"), "expected at least 2 votes"),
        ((f"{tmp_path}/none", "--out", f"{tmp_path}/a"), "does not exist"),
    ]:
        code, error = run(*arguments)
        assert code == 2
        assert words in error
    (tmp_path / "f.py").write_text("def scores(x):\n    return x.flatten(1)[:, :10]\n")
    code, error = run(f"function:{tmp_path}/f.py:scores", "--data", "digits", "--out", f"{tmp_path}/a")
    assert code == 2
    assert "is a black box and cannot be exported" in error
    assert not (tmp_path / "a").exists()

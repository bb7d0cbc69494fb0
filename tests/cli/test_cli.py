"""The command line as a user meets it: each bad input is one sentence and exit code 2, and nothing is lost."""

import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
import typer
import yaml

import gambeson as gb
from gambeson.base.errors import DataWarning
from gambeson.cli import app
from gambeson.cli.app import run

TRAIN = ["train", "--data", "digits", "--model", "lenet5", "--epochs", "2", "--batch-size", "64"]
AUDIT = [
    *("--eps", "0.05,0.1", "--set", "suite.universal_steps=10", "--set", "suite.universal_restarts=1"),
    *("--set", "suite.pgd_steps=3", "--set", "suite.pgd_restarts=1", "--set", "suite.eps_uni_tolerance=0.3"),
    *("--set", "suite.suite_images=20", "--set", "suite.suite_queries=20", "--set", "suite.edit_images=50"),
    *(
        "--set",
        "suite.sample=50",
        "--set",
        "suite.queries=20",
        "--set",
        "suite.jacobian_backwards=500",
        "--set",
        "suite.universal_queries=300",
    ),
    *("--set", "suite.surrogate_epochs=1", "--set", "suite.universal_probe_starts=2"),
    *("--set", "suite.test_images=100", "--set", "suite.surrogate_images=200", "--set", "suite.rescoring=false"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run, its audit and its report."""
    folder = tmp_path_factory.mktemp("cli")
    assert run([*TRAIN, "--defense", "shared-adversarial", "--sharedness", "16", "--out", str(folder / "run")]) == 0
    assert run(["audit", str(folder / "run"), *AUDIT, "--out", str(folder / "audit")]) == 0
    assert run(["report", str(folder / "audit")]) == 0
    return folder


def says(capsys, arguments, *words):
    """Run a command that must fail; check its one sentence."""
    assert run(arguments) == 2
    error = capsys.readouterr().err
    for word in words:
        assert word in error, error
    assert "Traceback" not in error
    return error


def test_train_audit_report_leave_what_they_promise(made):
    run_files = {path.name for path in (made / "run").iterdir()}
    assert run_files == {"run.yaml", "metrics.jsonl", "timing.json", "model.safetensors", "state"}
    settings = yaml.safe_load((made / "run" / "run.yaml").read_text())
    assert settings["defense"]["name"] == "shared-adversarial"
    assert settings["defense"]["eps"] == 0.2
    assert settings["finished"]
    assert "torch" in settings["environment"]
    result = json.loads((made / "audit" / "result.json").read_text())
    assert result["subject"]["label"] == "shared-adversarial"
    assert [point["eps"] for point in result["universal"]] == [0.05, 0.1]
    page = (made / "audit" / "report.html").read_text()
    assert "shared-adversarial" in page
    assert len(page) > 1e6


@pytest.mark.full
def test_run_yaml_runs_again_with_the_same_numbers(made):
    assert run(["train", "--config", str(made / "run" / "run.yaml"), "--out", str(made / "again")]) == 0
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (made / "again" / name).read_bytes() == (made / "run" / name).read_bytes()
    assert run(["audit", "--config", str(made / "audit" / "run.yaml"), "--out", str(made / "audit-again")]) == 0
    assert (made / "audit-again" / "result.json").read_bytes() == (made / "audit" / "result.json").read_bytes()


def test_flags_and_yaml_build_the_same_settings(made, tmp_path):
    (tmp_path / "run.yaml").write_text(
        "data: digits\nmodel: lenet5\nrecipe: {epochs: 2, batch_size: 64}\n"
        "defense: {name: shared-adversarial, sharedness: 16}\n"
    )
    assert run(["train", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "out")]) == 0
    mine, theirs = (yaml.safe_load((path / "run.yaml").read_text()) for path in (tmp_path / "out", made / "run"))
    assert mine == theirs
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (made / "run" / "model.safetensors").read_bytes()


def test_machines_get_json_alone(made, capsys):
    assert run(["audit", str(made / "run"), *AUDIT, "--out", str(made / "audit"), "--json"]) == 0
    out = capsys.readouterr()
    assert json.loads(out.out) == json.loads((made / "audit" / "result.json").read_text())
    assert out.err == ""
    assert run(["data", "list", "--json"]) == 0
    assert {"digits", "mnist5k", "cifar10"} <= {entry["name"] for entry in json.loads(capsys.readouterr().out)}


def test_unknown_names_are_answered_with_the_nearest(capsys, tmp_path):
    out = ["--out", str(tmp_path / "x")]
    says(capsys, ["train", "--data", "fashionmnist", "--model", "lenet", *out], "unknown data set", "fashion-mnist")
    says(capsys, ["train", "--data", "digits", "--model", "lenet6", *out], "unknown model", "lenet5")
    says(capsys, [*TRAIN, "--defense", "pgd", *out], "unknown defence 'pgd': did you mean pgd-adversarial?")
    says(capsys, ["data", "get", "minst"], "unknown data set 'minst': did you mean mnist")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--eps", "-0.1"], "greater than or equal to 0"),
        (["--eps", "nan"], "not a finite number"),
        (["--eps", "8/0"], "divides by zero"),
        (["--eps", "8"], "did you mean 8/255?"),
        (["--sharedness", "48"], "sharedness 48 does not divide the batch size 64"),
        (["--sigma", "2"], "sigma"),
        (["--set", "recipe.momentun=0.5"], "did you mean momentum?"),
        (["--set", "recipe"], "expected NAME=VALUE"),
        (["--set", "data.x=1"], "data.x cannot be set"),
        (["--batch-size", "100000", "--sharedness", "1"], "does not fit 1078 training images"),
        (["--device", "quantum"], "device 'quantum' is not available here"),
        (["--init", "nowhere.safetensors"], "nowhere.safetensors does not exist"),
    ],
)
def test_bad_settings_are_one_sentence(capsys, tmp_path, flags, words):
    says(capsys, [*TRAIN, "--defense", "shared-adversarial", *flags, "--out", str(tmp_path / "x")], words)


def test_missing_and_unknown_options(capsys, tmp_path):
    says(capsys, ["train", "--data", "digits"], "--model must be given")
    says(capsys, ["train", "--colour", "red"], "no such option: --colour")
    says(capsys, ["audit"], "no model was given")
    says(capsys, ["audit", str(tmp_path / "none")], "does not exist")
    says(capsys, ["report", str(tmp_path)], "result.json does not exist")
    assert run([]) in (0, 2)  # bare `gambeson` prints its help


def test_a_folder_with_another_run_is_left_alone(made, capsys):
    before = (made / "run" / "model.safetensors").read_bytes()
    says(capsys, [*TRAIN, "--seed", "9", "--out", str(made / "run")], "holds another run (it differs in", "--out")
    says(capsys, [*TRAIN, "--out", str(made / "audit")], "holds another run")
    assert (made / "run" / "model.safetensors").read_bytes() == before
    says(capsys, ["train", "--config", str(made / "audit" / "run.yaml")], "describes a run of kind 'audit'")


def test_weights_that_are_none_are_refused(made, capsys, tmp_path):
    whole = (made / "run" / "model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-100])
    torch.save({"a": torch.ones(2)}, tmp_path / "model.pt")
    data = ["--data", "digits", "--out", str(tmp_path / "x")]
    says(capsys, ["audit", str(tmp_path / "cut.safetensors"), *data], "is not a complete safetensors file")
    says(capsys, ["audit", str(tmp_path / "model.pt"), *data], "holds weights but no model card")
    (tmp_path / "whole.safetensors").write_bytes(whole)
    says(capsys, ["audit", str(tmp_path / "whole.safetensors")], "does not say what data")
    says(capsys, ["audit", str(tmp_path / "whole.safetensors"), "--data", "mnist5k"], "8", "28")


def test_a_model_and_data_that_do_not_fit(capsys, tmp_path):
    model = gb.models.create("lenet5", in_channels=3, classes=10, image_size=8)
    gb.models.save(model, tmp_path / "m.safetensors")
    says(capsys, ["audit", str(tmp_path / "m.safetensors"), "--data", "digits"], "takes 3 channels", "1 channels")


def start(arguments, **kwargs):
    command = [sys.executable, "-m", "gambeson", *arguments]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, **kwargs)


def test_ctrl_c_exits_with_130_and_the_same_command_goes_on(made, tmp_path):
    flags = ["--defense", "shared-adversarial", "--sharedness", "16", "--epochs", "40", "--out", str(tmp_path / "run")]
    # Where the tests run in the background, SIGINT is ignored, and would be in the process, too.
    process = start([*TRAIN, *flags], preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "state" / "latest.safetensors").is_file() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "the same command resumes from here" in error
    assert "Traceback" not in error
    assert not yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())["finished"]
    done = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert 1 <= done < 40


def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(tmp_path, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        says(capsys, [*TRAIN, "--out", str(tmp_path / "run")], "nothing half-written was left")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()]
    for path in tmp_path.rglob("*.safetensors"):
        gb.base.load_tensors(path)  # whatever is there is whole


def commands(group, *path):
    """Each command with the words that call it."""
    for name, command in group.commands.items():
        yield from commands(command, *path, name) if hasattr(command, "commands") else [((*path, name), command)]


@pytest.mark.parametrize(
    ("words", "command"),
    [pytest.param(*found, id=" ".join(found[0])) for found in commands(typer.main.get_command(app.app))],
)
def test_every_command_has_an_example_and_answers_machines(words, command):
    assert f"Example: `gambeson {' '.join(words)}" in command.help
    assert [one for one in command.params if "--json" in one.opts]


def test_a_setting_of_http_is_said_as_it_was_typed(capsys):
    for typed in (["--http", "timeut=1"], ["--http", "retries"]):
        error = says(
            capsys,
            ["attack", "http://127.0.0.1:9/x", "--data", "digits", "--attack", "square", *typed],
            " ".join(typed),
        )
        assert "--set" not in error.replace("--set momentum=0.8", "")


def test_the_report_of_a_training_says_how_to_get_an_audit(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("kind: train\nmodel: lenet5\n")
    says(capsys, ["report", str(tmp_path)], "of kind 'train'", f"`gambeson audit {tmp_path}` makes one of it")
    (tmp_path / "run.yaml").write_text("kind: attack\nmodel: lenet5\n")
    (tmp_path / "result.json").write_text("{}")
    says(capsys, ["report", str(tmp_path)], "of kind 'attack'")


def test_settings_of_an_attack_are_listed_without_markup(capsys):
    for name in ("pgd", "stochastic-pgd"):
        assert run(["list", "attacks", name]) == 0
        listed = capsys.readouterr().out
        assert ":meth:" not in listed
        assert ":data:" not in listed
        assert "`" not in listed


def test_what_a_crafted_perturbation_reached_is_named(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    gb.models.save(trained, tmp_path / "net.safetensors")
    out = tmp_path / ("a" * 40) / "uap.safetensors"
    craft = ["uap", "craft", str(tmp_path / "net.safetensors"), "--data", "digits", "--eps", "0.2"]
    assert run([*craft, "--set", "steps=5", "--set", "probe_starts=0", "--out", str(out)]) == 0
    assert "UER " in "".join(capsys.readouterr())
    assert run(["uap", "list", str(tmp_path)]) == 0
    listed = capsys.readouterr().out
    assert "…" not in listed
    assert listed.count("a") >= 40


def test_own_warnings_are_sentences_wherever_they_point():
    told = app._plain_warning
    assert told("few images", DataWarning, "/other/typer/main.py", 3) == "warning: few images\n"
    assert told("few images", UserWarning, app.__file__, 3) == "warning: few images\n"
    assert told("gone", UserWarning, "/other/main.py", 3) == "/other/main.py:3: UserWarning: gone\n"


def test_files_that_are_there_are_not_written_over(made, tmp_path, capsys):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    patch = tmp_path / "patch.safetensors"
    settings = ["--set", "steps=1", "--set", "restarts=1", "--set", "probe_starts=0", "--set", "batch_size=16"]
    assert run(["uap", "craft", str(made / "run"), "--attack", "universal-patch", *settings, "--out", str(patch)]) == 0
    capsys.readouterr()
    says(capsys, ["uap", "export", str(patch), "--print", "50mm", "--to", str(mine)], "exists: choose another --to")
    says(
        capsys, ["uap", "craft", str(made / "run"), "--eps", "0.1", "--out", str(mine)], "exists: choose another --out"
    )
    says(capsys, ["bench", "attacks", "--out", str(mine)], "exists: choose another --out")
    score = ["uap", "score", str(patch), str(made / "run"), "--report"]
    says(capsys, [*score, str(patch)], "exists and is not an HTML page")
    assert mine.read_text() == "mine"

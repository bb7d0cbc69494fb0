"""Results hang on what the files hold that settings name, not on their names."""

import shutil

import pytest

from gambeson.base import Config, UserError, check_run, contents, open_run
from gambeson.cli.app import run


class Named(Config):
    """A run of a file."""

    source: str
    http: str | None = None


def test_files_runs_and_folders_are_told_apart(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"one")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.safetensors").write_bytes(b"two")
    (tmp_path / "images" / "cats").mkdir(parents=True)
    (tmp_path / "images" / "cats" / "1.png").write_bytes(b"three")
    names = [f"{tmp_path}/{name}" for name in ("a.pt", "run", "a.pt?normalise=none")]
    names += [
        f"image-folder:{tmp_path}/images?size=8",
        f"onnx:{tmp_path}/a.pt",
        f"timm:resnet18@{tmp_path}/a.pt?normalise=data",
    ]
    plain = {
        "one": names[:2],
        "more": {"deeper": names[2:]},
        "none": ["lenet5", "", "a\0b", "x" * 5000, "~nobody-of-this-name/x", 3, None],
    }
    first = contents(plain)
    assert sorted(first) == sorted(names)
    assert len(set(first.values())) == 3  # the file, the weights of the run, the folder
    (tmp_path / "run" / "metrics.jsonl").write_text("beside the weights")
    assert contents(plain) == first
    (tmp_path / "images" / "cats" / "1.png").write_bytes(b"longer")
    (tmp_path / "a.pt").write_bytes(b"two")
    second = contents(plain)
    assert {name for name in names if first[name] != second[name]} == set(names) - {names[1]}
    assert second[names[0]] == second[names[1]]  # the same bytes


def test_classes_behind_links_count_and_circles_end(tmp_path):
    images, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    for folder in (images, elsewhere):
        folder.mkdir()
    (elsewhere / "1.png").write_bytes(b"one")
    (images / "cats").symlink_to(elsewhere)
    (images / "circle").symlink_to(images)
    (images / "gone.png").symlink_to(tmp_path / "nothing")
    name = f"image-folder:{images}"
    first = contents([name])
    assert contents([name]) == first != {}
    (elsewhere / "1.png").write_bytes(b"longer")
    assert contents([name]) != first


def test_a_run_does_not_go_on_with_a_file_that_has_changed(tmp_path):
    file, out = tmp_path / "a.pt", tmp_path / "out"
    file.write_bytes(b"one")
    settings = Named(source=str(file))
    assert open_run(out, settings, {}) is False
    (out / "some.json").write_text("{}")
    assert check_run(out, settings) is False
    file.write_bytes(b"two")
    with pytest.raises(UserError, match=r"began before .*a\.pt was changed: choose another --out, or restore it"):
        check_run(out, settings)
    file.write_bytes(b"one")
    assert check_run(out, settings) is False
    file.unlink()  # a finished run is shown where its sources are gone
    assert check_run(out, settings) is False


def test_training_from_other_initial_weights_is_no_resumption(tmp_path, capsys):
    command = ["train", "--data", "digits", "--model", "lenet5", "--epochs", "1"]
    for seed in ("0", "1"):
        assert run([*command, "--seed", seed, "--out", str(tmp_path / seed)]) == 0
    weights = tmp_path / "w.safetensors"
    command += ["--init", str(weights), "--out", str(tmp_path / "x")]
    for _ in range(2):  # the second time it is finished
        shutil.copy(tmp_path / "0" / "model.safetensors", weights)
        assert run(command) == 0
    shutil.copy(tmp_path / "1" / "model.safetensors", weights)
    capsys.readouterr()
    assert run(command) == 2
    assert "w.safetensors was changed" in capsys.readouterr().err

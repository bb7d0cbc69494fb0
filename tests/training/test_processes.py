"""Two processes with half of a batch each do what one does with the whole."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gambeson as gb
from gambeson.base import load_tensors
from tests.training.two_processes import MAPS, RANDOM

SCRIPT = Path(__file__).with_name("two_processes.py")


def trained_by(script, folders):
    """Run a script of this folder in one process and in two, and return where each left its weights."""
    alone, both = (folders.mktemp(name) for name in ("alone", "both"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for command in ([sys.executable, *script, alone], [*launch, *script, both]):
        arguments = [str(part) for part in command]
        done = subprocess.run(arguments, capture_output=True, text=True)
        if "exitcode  : -6" in done.stderr:  # aborted, seen on a busy machine at no line of ours: once more
            done = subprocess.run(arguments, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:3000] + done.stderr[-1000:]
    return alone, both


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return trained_by([SCRIPT, "images"], tmp_path_factory)


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    return trained_by([SCRIPT, "maps"], tmp_path_factory)


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in gb.defenses.names() if name not in RANDOM])
def test_two_processes_end_with_the_weights_of_one(weights, name):
    files = [folder / f"{name}.safetensors" for folder in weights]
    alone, both = map(gb.models.load, files)
    for (key, one), other in zip(alone.named_parameters(), both.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    accuracies = [load_tensors(file)[1]["about"]["accuracy"] for file in files]  # each process looked at half
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.01)
    if name not in ("standard", "ensemble"):
        plain = gb.models.load(weights[0] / "standard.safetensors")
        assert gb.models.fingerprint(plain) != gb.models.fingerprint(alone)


@pytest.mark.parametrize("name", MAPS)
def test_two_processes_train_label_maps_as_one_does(maps, name):
    """With heaps that do not cross processes, and means per image whatever its number of labelled pixels."""
    (alone, one), (both, other) = (load_tensors(folder / f"maps-{name}.safetensors") for folder in maps)
    for key, value in alone.items():
        torch.testing.assert_close(value, both[key], rtol=1e-3, atol=1e-5)
    for key in ("validation_accuracy", "validation_mean_iou"):  # each process looked at half
        assert one["last"][key] == pytest.approx(other["last"][key], abs=0.005)
    if name != "standard":
        plain, _ = load_tensors(maps[0] / "maps-standard.safetensors")
        assert any(not torch.allclose(value, plain[key], rtol=1e-3) for key, value in alone.items())


@pytest.mark.full
def test_two_machines_end_with_the_weights_of_one(tmp_path):
    train = ["-m", "gambeson", "train", "--data", "digits", "--model", "lenet5", "--defense", "pgd-adversarial"]
    train += ["--epochs", "1", "--device", "cpu"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    launch += ["--master-addr", "127.0.0.1", "--master-port", port]
    commands = [[sys.executable, *train, "--out", tmp_path / "alone"]]
    commands += [[*launch, "--node-rank", rank, *train, "--out", tmp_path / "both"] for rank in "01"]
    running = [subprocess.Popen([str(part) for part in command]) for command in commands]
    assert [process.wait(timeout=300) for process in running] == [0, 0, 0]
    alone, both = (gb.models.load(tmp_path / name) for name in ("alone", "both"))
    for one, other in zip(alone.parameters(), both.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)

"""Training on images that stay on disk: each decoded once, the same bits whoever decodes, and nobody left behind."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

import gambeson as gb
from gambeson.base import UserError
from gambeson.cli.app import run as command
from gambeson.data import lazy
from gambeson.training import Recipe
from gambeson.training.batches import Epoch
from tests.conftest import full
from tests.training import streams

SCRIPT = Path(streams.__file__)
ALL = sorted(f"{number:03}.jpg" for number in range(streams.TRAIN))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return streams.pictures(tmp_path_factory.mktemp("pictures"))


def start(*parts: object, **more: str) -> subprocess.Popen[str]:
    """Run the script in a process of its own, with two workers."""
    environment = {**os.environ, "GAMBESON_WORKERS": "2", **more}
    command = [sys.executable, str(SCRIPT), *map(str, parts)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """One process with two workers, uninterrupted: the model, its history and the log of decodes."""
    log = tmp_path_factory.mktemp("whole") / "log"
    off = streams.watch(log)
    try:
        model, history = streams.run(streams.load(folder, workers=2), None)
    finally:
        off()
    assert history[-1]["validation_accuracy"] > 0.9
    return model, history, streams.decodes(log)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_workers_decode_each_image_once_an_epoch(whole):
    for epoch in map(str, range(streams.EPOCHS)):
        assert Counter(file for _, file in whole[2][epoch]) == Counter(ALL)
        workers = {process for process, _ in whole[2][epoch]}
        assert len(workers) == 2
        assert os.getpid() not in workers
    assert not multiprocessing.active_children()


@pytest.mark.full
def test_two_processes_share_the_decoding_and_the_result(folder, whole, tmp_path):
    two = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    running = [
        start(folder, tmp_path / "both.log", tmp_path / "both", **two, RANK=rank, LOCAL_RANK=rank) for rank in "01"
    ]
    said = [process.communicate()[1][-2000:] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    found = streams.decodes(tmp_path / "both.log")
    for epoch in map(str, range(streams.EPOCHS)):
        assert Counter(file for _, file in found[epoch]) == Counter(ALL)
        assert len({process for process, _ in found[epoch]}) == 4
    both = gb.models.load(tmp_path / "both" / "model.safetensors")
    for one, other in zip(both.parameters(), whole[0].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("workers", [0, full(1), None])
def test_the_same_bits_whoever_decodes(folder, whole, workers):
    """None: the whole of it is in memory."""
    data = gb.data.load(folder, size=12) if workers is None else streams.load(folder, workers=workers)
    model, history = streams.run(data, None)
    assert history == whole[1]
    assert same(model, whole[0])


@pytest.mark.full
def test_killed_and_resumed_ends_as_uninterrupted(folder, whole, tmp_path):
    out = tmp_path / "cut"
    process = start(folder, tmp_path / "cut.log", out, "cut")
    said = process.communicate()[1][-2000:]
    assert process.returncode == -signal.SIGKILL, said
    found = streams.decodes(tmp_path / "cut.log")
    assert 0 < len(found["1"]) <= streams.TRAIN
    workers = {process for process, _ in found["1"]}
    deadline = time.monotonic() + 60  # workers look every five seconds whether their process is alive
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, workers))
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 1
    model, history = streams.run(streams.load(folder, workers=2), out)
    assert history == whole[1]
    assert same(model, whole[0])


def test_an_epoch_may_begin_at_any_batch(folder):
    data = streams.load(folder, workers=2)
    for augment in ("none", "crop", "imagenet"):
        recipe = Recipe(batch_size=16).model_copy(update={"augment": augment})
        epoch = Epoch(data.train, recipe, 2, 0, 1, torch.device("cpu"))
        rest = list(epoch.walk(5))
        assert len(rest) == len(epoch) - 5 == 3
        for k, batch in enumerate(rest, 5):
            assert torch.equal(batch.images, epoch[k].images)
            assert torch.equal(batch.labels, epoch[k].labels)
            assert (batch.seed, batch.step) == (epoch[k].seed, epoch[k].step)
            assert augment != "none" or torch.equal(batch.indices, epoch[k].indices)
    assert not torch.equal(rest[0].images, rest[1].images)


def test_a_damaged_file_ends_in_one_sentence(folder, tmp_path, monkeypatch, capsys):
    streams.pictures(tmp_path / "pictures")
    file = tmp_path / "pictures" / "train" / "up" / "101.jpg"
    file.write_bytes(file.read_bytes()[:700])
    monkeypatch.setattr(lazy, "MEMORY_LIMIT", 0)
    monkeypatch.setenv("GAMBESON_WORKERS", "2")
    name = f"image-folder:{tmp_path / 'pictures'}?size=12"
    arguments = ["--data", name, "--model", "lenet5", "--defense", "standard", "--batch-size", "32", "--json"]
    assert command(["train", *arguments, "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {file} cannot be read as an image (")
    assert said.count("\n") == 1
    assert "worker" not in said
    with pytest.raises(UserError, match="101.jpg cannot be read") as kept:
        streams.run(streams.load(tmp_path / "pictures", workers=2), None)
    assert kept.traceback  # as a notebook keeps it
    assert not multiprocessing.active_children()


@pytest.mark.full
def test_ctrl_c_leaves_no_worker(folder, tmp_path):
    log = tmp_path / "log"
    parts = [sys.executable, SCRIPT, folder, log, tmp_path / "run", "command"]
    environment = {**os.environ, "GAMBESON_WORKERS": "2"}
    process = subprocess.Popen(
        [str(part) for part in parts], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (log.is_file() and "\n0 " in log.read_text()):
        time.sleep(0.05)
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to the workers too
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 130, said
    assert "stopped: finished work is kept" in said
    assert "Traceback" not in said
    workers = {process for process, _ in streams.decodes(log)["0"]}
    assert len(workers) == 2
    assert not any(map(alive, workers))


def test_an_exception_in_the_loop_leaves_no_worker(folder, monkeypatch):
    data = streams.load(folder, workers=2)
    steps = []

    def stop(self, batch):
        steps.append(len(multiprocessing.active_children()))
        raise KeyboardInterrupt

    monkeypatch.setattr(gb.training.loop.Run, "train_step", stop)
    with pytest.raises(KeyboardInterrupt) as kept:
        streams.run(data, None)
    assert steps == [2]
    assert not multiprocessing.active_children()
    assert kept.traceback

"""Reading ahead: order, single decodes, draws left alone, and what goes wrong in a worker."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch

from gambeson.base.errors import UserError
from gambeson.data import LazySplit, lazy, load


class Numbers:
    """Item k is an image full of k; it says who loaded it, and fails as it is told to."""

    def __init__(self, log: Path, fail: int = -1, how: str = "") -> None:
        self.log, self.fail, self.how = log, fail, how

    def __call__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        with self.log.open("a") as file:
            file.write(f"{os.getpid()} {number}\n")
        if number == self.fail:
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "bug":
                return torch.zeros(1 // 0), torch.tensor(0)
            if self.how == "shape":
                return torch.zeros(1, 4, 2, dtype=torch.uint8), torch.tensor(0)
            if self.how == "type":
                return torch.zeros(1, 2, 2), torch.tensor(0)
            raise UserError("the dog ate it: give another")
        return torch.full((1, 2, 2), number % 256, dtype=torch.uint8), torch.tensor(number % 7)


def split(log: Path, workers: int, count: int = 300, fail: int = -1, how: str = "") -> LazySplit:
    made = LazySplit("it", Numbers(log, fail, how), torch.arange(count) % 7, tuple("abcdefg"), None, workers)
    log.write_text("")
    return made


def loaded(log: Path) -> list[tuple[int, int]]:
    return [(int(who), int(number)) for who, number in map(str.split, log.read_text().splitlines())]


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("size", [1, 45, 300])
def test_any_number_of_workers_gives_the_same_batches(tmp_path: Path, workers: int, size: int) -> None:
    stream = split(tmp_path / "log", workers)
    kept = torch.get_rng_state()
    order = torch.Generator().manual_seed(1)
    found = list(stream.batches(size, generator=order))
    wanted = torch.randperm(300, generator=torch.Generator().manual_seed(1)).split(size)
    assert [len(x) for x, _ in found] == [len(part) for part in wanted]
    for (x, y), part in zip(found, wanted, strict=True):
        assert torch.equal(x, (part % 256).float()[:, None, None, None].expand(-1, 1, 2, 2) / 255)
        assert torch.equal(y, part % 7)
    assert sorted(number for _, number in loaded(tmp_path / "log")) == list(range(300))
    who = {process for process, _ in loaded(tmp_path / "log")}
    assert len(who - {os.getpid()}) == workers
    assert (os.getpid() in who) == (workers == 0)
    assert torch.equal(torch.get_rng_state(), kept)  # the run's own draws are not moved
    assert not multiprocessing.active_children()


def test_a_walk_that_is_left_ends_its_workers(tmp_path: Path) -> None:
    stream = split(tmp_path / "log", 2, 3000)
    walk = stream.walk(torch.arange(3000).split(64))
    next(walk)
    assert len(multiprocessing.active_children()) == 2
    del walk
    assert not multiprocessing.active_children()
    assert len(loaded(tmp_path / "log")) < 600  # read ahead, but not far
    two = [stream.walk(torch.arange(at, at + 128).split(64)) for at in (0, 128)]  # two walks at a time
    for (x, _), (z, _) in zip(*two, strict=True):
        assert not torch.equal(x, z)


def test_few_images_need_no_workers(tmp_path: Path) -> None:
    list(split(tmp_path / "log", 4, 32).batches(32))
    assert {process for process, _ in loaded(tmp_path / "log")} == {os.getpid()}


def test_everything_reads_each_image_once(tmp_path: Path) -> None:
    stream = split(tmp_path / "log", 2)
    whole = stream.eager()
    assert whole.images[:, 0, 0, 0].tolist() == [number % 256 for number in range(300)]
    assert torch.equal(whole.labels, torch.arange(300) % 7)
    assert sorted(number for _, number in loaded(tmp_path / "log")) == list(range(300))
    assert stream.fingerprint == whole.fingerprint
    assert stream.mean_std() == whole.mean_std()


def test_statistics_of_a_large_split_are_taken_over_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = split(tmp_path / "log", 0, 201)
    monkeypatch.setattr(lazy, "SAMPLE", 101)
    mean, _ = stream.mean_std()
    some = stream.sample_indices(101)
    assert len(some) == 101
    assert sorted(number for _, number in loaded(tmp_path / "log")) == some.tolist()
    assert mean[0] == pytest.approx(float(some.double().mean()) / 255)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("say", "^the dog ate it: give another$"),
        ("shape", r"^images differ, \(1, 2, 2\) of uint8 and \(1, 4, 2\) of uint8 among them: expected one shape"),
        ("type", r"^images differ, \(1, 2, 2\) of float32 and \(1, 2, 2\) of uint8 among them"),
    ],
)
def test_a_worker_says_what_is_wrong_in_one_sentence(tmp_path: Path, workers: int, how: str, words: str) -> None:
    stream = split(tmp_path / "log", workers, fail=170, how=how)
    with pytest.raises(UserError, match=words) as kept:
        list(stream.batches(64))
    assert "\n" not in str(kept.value)
    assert not multiprocessing.active_children()
    with pytest.raises(UserError, match=words):
        stream.eager()


@pytest.mark.parametrize("size", [32, 1])
def test_shapes_may_differ_between_pieces_and_batches(tmp_path: Path, size: int) -> None:
    stream = split(tmp_path / "log", 2, 64, fail=63, how="shape")
    with pytest.raises(UserError, match="images differ"):
        list(stream.batches(64 if size == 32 else 1))


def test_a_bug_in_a_worker_is_a_traceback(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError, match="worker process"):
        list(split(tmp_path / "log", 2, fail=170, how="bug").batches(64))
    assert not multiprocessing.active_children()


def test_a_killed_worker_is_a_sentence(tmp_path: Path) -> None:
    # The signal of its end arrives wherever this process is; in the reading it becomes a sentence.
    with pytest.raises((UserError, RuntimeError), match="process that reads images ended|DataLoader worker") as kept:
        list(split(tmp_path / "log", 2, fail=170, how="kill").batches(64))
    if isinstance(kept.value, UserError):
        assert "workers=1, or none by workers=0" in str(kept.value)
        assert "\n" not in str(kept.value)
    assert not multiprocessing.active_children()


def test_the_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GAMBESON_WORKERS", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    for cores, processes, expected in [(1, 1, 0), (2, 1, 0), (4, 1, 4), (6, 2, 0), (16, 2, 8), (64, 1, 8), (64, 8, 8)]:
        monkeypatch.setattr(os, "sched_getaffinity", lambda process, cores=cores: set(range(cores)), raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert lazy.default_workers() == expected
    monkeypatch.setattr("sys.platform", "darwin")
    assert lazy.default_workers() == 0
    monkeypatch.setenv("GAMBESON_WORKERS", "3")
    assert lazy.default_workers() == 3
    monkeypatch.setenv("GAMBESON_WORKERS", "many")
    with pytest.raises(UserError, match="GAMBESON_WORKERS is 'many': expected a number of processes"):
        lazy.default_workers()
    for call in (lambda: load(tmp_path, workers=-1), lambda: split(tmp_path / "log", -1)):
        with pytest.raises(UserError, match="workers = -1: expected a number of processes, 0 or more"):
            call()

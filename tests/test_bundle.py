"""The bundle for a machine without a network: what is unpacked from it runs where little is installed."""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from gambeson.base import UserError
from gambeson.base.files import save_tensors
from gambeson.data import load
from gambeson.data.load import stored_file
from gambeson.data.pieces import load_available, read_piece, unpack, write_pieces
from gambeson.data.registry import DATASETS

ROOT = Path(__file__).parent.parent
STOCK = ["torch", "torchvision", "accelerate", "safetensors", "typer", "rich", "jinja2", "numpy", "PyYAML", "Pillow"]
"""What the machine is expected to have; ``scripts/bundle.py`` says so too."""
BUNDLED = ["pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions"]
ABSENT = ["plotly", "httpx2", "sklearn", "hypothesis", "pytest", "timm", "mlxtend"]
WORK = """
import sys
import torch, gambeson as gb
from gambeson.data.pieces import load_available
there, *absent = sys.argv[1:]
assert gb.__file__.startswith(there), gb.__file__
for name in absent:
    try:
        __import__(name)
    except ImportError:
        continue
    sys.exit(f"{name} is there: this environment is not the one that is meant")
data = load_available("cifar10")
model = gb.models.create("lenet5", data)
defense = gb.defenses.create("pgd-adversarial", eps=0.01, steps=1)
history = gb.train(model, data, defense, epochs=4, lr=0.05, batch_size=32)
delta = gb.attacks.create("stochastic-pgd", eps=0.1, steps=5, batch_size=32, restarts=1).craft(model, data)
rate = gb.evaluation.universal_evasion(model, data, delta)
assert "stochastic-pgd" in gb.attacks.names("universal")
print(data.name, history[0]["loss"] - history[-1]["loss"], rate.n)
"""


def with_dependencies(names):
    """The distributions that these need, themselves included."""
    found, todo = {}, list(names)
    while todo:
        name = todo.pop()
        key = re.sub(r"[-_.]+", "-", name).lower()
        if key in found or key in ABSENT:
            continue
        try:
            found[key] = distribution(name)
        except PackageNotFoundError:
            continue  # of another platform
        for line in requires(name) or []:
            need = Requirement(line)
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                todo.append(need.name)
    return found


def link(distributions, folder):
    """Lay out a folder of packages as an installation of nothing but these distributions would be."""
    folder.mkdir(exist_ok=True)
    for one in distributions.values():
        for top in {file.parts[0] for file in one.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (folder / top).exists():
                (folder / top).symlink_to(one.locate_file(top))


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Something of CIFAR-10's shape, brighter from class to class: stored where the prepared set would be."""
    root = tmp_path_factory.mktemp("root")
    draw = torch.Generator().manual_seed(0)
    spec = DATASETS["cifar10"]
    tensors = {}
    for part, count in zip(("train", "test"), spec.source, strict=True):
        tensors[f"{part}_images"] = torch.zeros((count, *spec.shape), dtype=torch.uint8)
        tensors[f"{part}_labels"] = labels = torch.arange(count) % 10
        noise = torch.randint(0, 60, (400, *spec.shape), generator=draw)
        tensors[f"{part}_images"][:400] = (noise + 20 * labels[:400].view(-1, 1, 1, 1)).to(torch.uint8)
    save_tensors(stored_file("cifar10", root), tensors, {"name": "cifar10", "source": "made", "classes": None})
    return root, tensors


def test_pieces_hold_every_bit(stored, tmp_path):
    root, tensors = stored
    cuts = [((0, 203), (0, 101)), ((203, 400), (0, 0))]
    files = write_pieces("cifar10", cuts, tmp_path, root)
    assert [file.name for file in files] == ["cifar10-1.tar", "cifar10-2.tar"]
    for file, ((first, stop), (from_test, to_test)) in zip(files, cuts, strict=True):
        found, _ = read_piece(file)
        assert torch.equal(found["train_images"], tensors["train_images"][first:stop])
        assert torch.equal(found["train_labels"], tensors["train_labels"][first:stop])
        assert torch.equal(found["test_images"], tensors["test_images"][from_test:to_test])


@pytest.mark.full
def test_all_pieces_make_the_data_set_and_some_make_a_part_of_it(stored, tmp_path):
    root, tensors = stored
    first, second = write_pieces("cifar10", [((0, 300), (0, 10000)), ((300, 50000), (0, 0))], tmp_path, root)
    there = tmp_path / "there"
    assert unpack([first], there) == {"cifar10": "300 of 50000 training and 10000 of 10000 test images"}
    part = load_available("cifar10", there)
    assert part.name == "cifar10[300]"
    assert [len(one) for one in (part.train, part.validation, part.test)] == [270, 30, 10000]
    assert torch.equal(part.test.images, tensors["test_images"])
    assert unpack([second], there) == {"cifar10": "complete"}
    whole, expected = load("cifar10", there), load("cifar10", root)
    assert whole.train.fingerprint == expected.train.fingerprint
    assert whole.test.fingerprint == expected.test.fingerprint
    assert load_available("cifar10", there).name == "cifar10"


def test_a_damaged_piece_is_refused(stored, tmp_path):
    root, _ = stored
    (file,) = write_pieces("cifar10", [((0, 100), (0, 100))], tmp_path, root)
    blob = bytearray(file.read_bytes())
    labels = blob.index(b'"sha256": "') + 11
    blob[labels] = ord("0") if blob[labels] != ord("0") else ord("1")
    file.write_bytes(bytes(blob))
    with pytest.raises(UserError, match="does not hold the train images"):
        unpack([file], tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_a_set_without_parts_is_refused(tmp_path):
    with pytest.raises(UserError, match="digits is not cut into pieces"):
        write_pieces("digits", [((0, 1), (0, 1))], tmp_path)


@pytest.fixture(scope="module")
def bundle(stored, tmp_path_factory):
    """The unpacked source tree, and a piece of a data set."""
    folder = tmp_path_factory.mktemp("bundle")
    pack("package", folder)
    shutil.unpack_archive(folder / "package.tar.gz", folder / "there", filter="data")
    (piece,) = write_pieces("cifar10", [((0, 400), (0, 100))], folder, stored[0])
    return folder / "there", piece


def pack(only, out):
    command = [sys.executable, str(ROOT / "scripts" / "bundle.py"), "pack", "--out", str(out), "--only", only]
    python = "{}.{}".format(*sys.version_info)
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    subprocess.run([*command, "--python", python], check=True, env=environment, capture_output=True)


def works(there, piece, site, out):
    """Unpack the piece and train, attack and score on it, with the packages of ``site`` alone and no network."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(out), "GAMBESON_DATA": str(out / "data")}
    environment |= {"PYTHONPATH": f"{there / 'src'}:{site}", "OMP_NUM_THREADS": "1", "http_proxy": "http://127.0.0.1:9"}

    def python(*arguments):
        command = [sys.executable, "-S", *map(str, arguments)]  # -S: without the packages of this environment
        done = subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = python(there / "scripts" / "bundle.py", "unpack", out / "data", piece)
    assert said == "cifar10: 400 of 50000 training and 100 of 10000 test images\n"
    name, learned, scored = python("-c", WORK, there, *ABSENT).split()
    assert (name, scored) == ("cifar10[400]", "100")
    assert float(learned) > 0.1


@pytest.mark.full
def test_a_bundle_runs_where_only_the_expected_packages_are(bundle, tmp_path):
    link(with_dependencies([*STOCK, *BUNDLED]), tmp_path / "site")
    works(*bundle, tmp_path / "site", tmp_path)


@pytest.mark.full
def test_the_wheels_of_a_bundle_install_without_an_index(bundle, tmp_path):
    """Needs the package index, for packing."""
    stock = with_dependencies(STOCK)
    link({name: one for name, one in stock.items() if name not in BUNDLED}, tmp_path / "stock")
    pack("wheels", tmp_path)
    wheels = sorted(map(str, (tmp_path / "wheels").glob("*.whl")))
    assert len(wheels) == len(BUNDLED)
    options = ["--quiet", "--no-index", "--no-deps", "--disable-pip-version-check", "--target", str(tmp_path / "site")]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *wheels], check=True)
    works(*bundle, f"{tmp_path / 'site'}:{tmp_path / 'stock'}", tmp_path)

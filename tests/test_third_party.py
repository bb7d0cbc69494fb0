"""What others add works by every door: from an installed package, and from a file of the user's own."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCE = HERE.parent / "src"
ROOM = HERE / "plugin" / "src" / "gambeson_quilt"
NAMES = {
    "attack": "shift",
    "universal": "stripes",
    "defense": "quiet",
    "data": "blobs",
    "model": "two-layer",
    "diagnostic": "finite logits",
    "task": "kinds",
}
NEVER = '''
@register("never trusted", condition="always", explanation="It is a test.", remedy="None.")
def never(evidence):
    """Fail."""
    return Finding(False, "it always fails")
'''


def python(*arguments: str, path: list[Path], cwd: Path, check: bool = True) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    ran = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert not check or ran.returncode == 0, ran.stderr
    return ran


def use(names: dict[str, str], path: list[Path], cwd: Path) -> dict:
    return json.loads(python(str(HERE / "third_party.py"), json.dumps(names), path=path, cwd=cwd).stdout)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder into which the package is installed, as pip installs any other."""
    folder = tmp_path_factory.mktemp("third party")
    shutil.copytree(HERE / "plugin", folder / "source")  # pip builds beside the source
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    target = folder / "site"
    python("-m", "pip", "install", *options, "--target", str(target), str(folder / "source"), path=[], cwd=folder)
    assert list(target.glob("gambeson_quilt-*.dist-info"))
    return target


@pytest.mark.full
@pytest.mark.timeout(600)
def test_an_installed_package_adds_one_of_everything(site, tmp_path):
    found = use(NAMES, [SOURCE, site], tmp_path)
    assert found["run.yaml"]["defense"] == {"name": "quiet", "weight": 0.02}
    assert (found["run.yaml"]["data"], found["run.yaml"]["model"]) == ("blobs", "two-layer")
    assert found["risk"] == {"name": "quiet", "weight": 0.1}
    assert found["data name"] == ["blobs", "blobs/test"]
    assert found["uap"] == ["stripes", {"edits": [], "eot_samples": None, "eps": 0.3, "norm": "inf", "widest": 2}, 2]
    assert found["check"] == [True, False]
    assert {package for package, _, _ in found["listed"].values()} == {"gambeson-quilt"}
    assert found["wrong"]["no defence"] == [2, "error: unknown defence 'shift': did you mean quiet?"]
    same_by_every_door(found)
    assert found["listed"]["defense"][1] == "Cross-entropy, and a penalty on large logits."
    assert found["listed"]["diagnostic"][1] == "Fails where a logit of a clean image is NaN or infinite."


def same_by_every_door(found):
    assert found["kinds"] == found["kinds by hand"]
    assert found["kinds"][0] > 0.9 > 0.1 > found["clean"]  # the task is asked
    assert found["moved"] == pytest.approx(0.125)
    assert found["widest"] == 1
    assert found["weight"] == 0.02
    assert found["inner"] == ["Quiet", 0.5]
    assert {"clean", "size"} <= set(found["losses"])
    assert found["attack"][1] == pytest.approx(0.9)
    code, error = found["wrong"]["no setting"]
    assert (code, error) == (2, "error: --set settings.shares=1: there is no setting 'shares': did you mean share?")
    code, error = found["wrong"]["other kind"]
    assert code == 2
    assert "makes one perturbation for all images: craft it with `gambeson uap craft`" in error
    assert found["listed"]["attack"][1:] == [
        "Brighten or darken each image as a whole by eps, whichever makes it wrong.",
        ["eps", "norm", "share"],
    ]
    assert found["listed"]["universal"][2] == ["edits", "eot_samples", "eps", "norm", "widest"]


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_file_adds_one_of_everything(tmp_path):
    file, cwd = tmp_path / "my own.py", tmp_path / "cwd"
    cwd.mkdir()
    rooms = ("attacks", "defenses", "data", "models", "diagnostics", "tasks")
    file.write_text("\n".join((ROOM / f"{room}.py").read_text() for room in rooms) + NEVER)
    inner = ["Shift", "Stripes", "Quiet", "blobs", "TwoLayer", "never", "Kinds"]
    found = use({key: f"../my own.py:{name}" for key, name in zip(NAMES, inner, strict=True)}, [SOURCE], cwd)
    sha = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    spelt = {name: f"{file}:{name}#sha256={sha}" for name in inner}
    stored = found["run.yaml"]
    assert stored["defense"] == {"name": spelt["Quiet"], "weight": 0.02}
    assert stored["data"] == spelt["blobs"]
    assert found["data name"] == ["blobs", "blobs/test"]
    assert found["uap"][0] == spelt["Stripes"]
    assert found["check"] == [False, True]
    assert found["tables"] == ["Shift", "fgsm"]
    assert found["labels"] == ["Quiet", "standard"]
    same_by_every_door(found)


def test_two_packages_and_one_that_fails_are_told_when_asked_for(site, tmp_path):
    points = dict.fromkeys(("fgsm", "shift", "plain"), "other:Mine")
    points |= {"broken": "other.missing:Mine", "no": "os:sep"}
    listed = "\n".join(f"{name} = {value}" for name, value in points.items())
    (tmp_path / "other-1.dist-info").mkdir()
    (tmp_path / "other-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1\n")
    (tmp_path / "other-1.dist-info" / "entry_points.txt").write_text(f"[gambeson.attacks]\n{listed}\n")
    (tmp_path / "other.py").write_text("from gambeson.attacks import FGSM\nclass Mine(FGSM):\n    'Mine.'\n")
    code = (
        "import gambeson as gb\n"
        "for name in ('pgd', 'plain', 'fgsm', 'shift', 'broken', 'no'):\n"
        "    try:\n        print(type(gb.attacks.create(name, eps=0.1)).__name__)\n"
        "    except gb.UserError as error:\n        print(error)\n"
        "print('plain' in gb.attacks.names('image'), 'broken' in gb.attacks.names('image'))\n"
        "print(gb.attacks.registry.ATTACKS.name_of(type(gb.attacks.create('plain', eps=0.1))))\n"
        "stripes, quiet = gb.attacks.create('stripes', eps=0.3, widest=1), gb.defenses.create('quiet', weight='0.02')\n"
        "print(stripes.widest, quiet.weight)\n"
        "print(gb.data.load('blobs').test.name, gb.data.load('blobs').num_classes)\n"
    )
    lines = python("-c", code, path=[SOURCE, site, tmp_path], cwd=tmp_path).stdout.splitlines()
    assert lines[:2] == ["PGD", "Mine"]
    assert lines[2].startswith("the attack 'fgsm' is registered by gambeson and by other: uninstall one of them")
    assert lines[3].startswith("the attack 'shift' is registered by gambeson-quilt and by other: uninstall")
    assert "'broken' comes from the package other, whose import fails (ModuleNotFoundError: No module" in lines[4]
    assert "is no attack: expected a class with settings" in lines[5]
    assert lines[6:8] == ["True False", "plain"]
    assert lines[8:] == ["1 0.02", "blobs/test 4"]  # an installed package's universal attack, defence and data set

"""Audits of the public plain and adversarially trained LeNet5: ``python benchmarks/public_lenet.py --weights PLACE``.

The weights, ``mnist_lenet5_clntrained.pt`` and ``mnist_lenet5_advtrained.pt``, stand in the source archive of
advertorch 0.2.3 (advertorch_examples/trained_models). PLACE is that archive, ``advertorch-0.2.3.tar.gz``, whose sha256
is checked, or a folder with the two files. They are read with ``weights_only=True``; nothing of the package is run. The
plain one must come out broken by one pattern, the other trusted and not broken. A cut audit goes on; the results are
stored under ``results/public-lenet5``. ``--picture`` draws what one pattern does instead.
"""

from __future__ import annotations

import argparse
import shutil
import tarfile
from pathlib import Path

import case_nets
import case_pages
import torch
from stored import RESULTS
from torch import nn

import gambeson as gb
from gambeson.auditing import SUITES
from gambeson.base import UserError, write_bytes
from gambeson.data.fetching import check_digest
from gambeson.threat import perturb

RUNS, OUT = Path("runs/public-lenet5"), RESULTS / "public-lenet5"
PICTURE = RESULTS.parent / "docs" / "case-studies" / "public-lenet5.png"
EPS = (0.1, 0.2, 0.3, 0.35, 0.4)
"""With the radius 0.3 that the second was trained against in the middle."""
NETS = {"plain": "clntrained", "adversarial": "advtrained"}
SHA256 = "ca92a14b0521ae0f9bfa8100d37e47cb741ede1f1411fbaf9182ddebc7062dce"
CRAFT = {"eps": 0.3, "steps": 100, "restarts": 1, "probe_starts": 0, "batch_size": 32}


def file_of(place: Path, net: str) -> Path:
    """The file of a network's weights, in a folder, or taken out of the source archive.

    Raises:
        UserError: the archive does not exist, or is another one.
    """
    if not place.exists():
        raise UserError(f"{place} does not exist: name the source archive of advertorch 0.2.3, or a folder")
    name = f"mnist_lenet5_{NETS[net]}.pt"
    if place.is_dir():
        return place / name
    if not (file := RUNS / name).is_file():
        check_digest(place.read_bytes(), SHA256, str(place))
        with tarfile.open(place) as archive:
            found = archive.extractfile(f"advertorch-0.2.3/advertorch_examples/trained_models/{name}")
            if found is None:
                raise UserError(f"{place} has no {name}")
            write_bytes(file, found.read())
    return file


def lenet5(weights: Path) -> nn.Module:
    """Build the network and fill it."""
    model = case_nets.public_lenet5()
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model.eval()


def picture(arguments: argparse.Namespace) -> None:
    """Draw the first test image that the pattern of each network changes, and what both say of it."""
    data = gb.data.load("mnist")
    nets = {net: lenet5(file_of(arguments.weights, net)) for net in NETS}
    uaps = {net: gb.attacks.StochasticPGD(**CRAFT).craft(model, data, seed=0) for net, model in nets.items()}
    images, labels = data.test.take(slice(0, 200))
    moved = {"a test image": images} | {
        f"pattern of the\n{net} network": perturb(images, uaps[net].delta) for net in NETS
    }
    with torch.no_grad():
        said = {what: {net: model(x).argmax(1) for net, model in nets.items()} for what, x in moved.items()}
    first = int((said["pattern of the\nplain network"]["plain"] != labels).nonzero()[0])
    shown = {
        what + "".join(f"\n{net}: {int(answer[first])}" for net, answer in said[what].items()): x[first]
        for what, x in moved.items()
    }
    for net, uap in uaps.items():
        shown[f"the pattern of the\n{net} network,\ngrey is 0"] = uap.delta[0] / (2 * CRAFT["eps"]) + 0.5
    case_pages.side_by_side(PICTURE, shown, scale=5)


def main() -> None:
    """Audit both, or draw the picture; one sentence where the archive is missing or another one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--suite", choices=SUITES, default="quick")
    parser.add_argument("--picture", action="store_true")
    arguments = parser.parse_args()
    try:
        (picture if arguments.picture else audits)(arguments)
    except UserError as error:
        parser.error(str(error))


def audits(arguments: argparse.Namespace) -> None:
    """Audit both, store the results, say the verdicts."""
    data = gb.data.load("mnist")
    suite = SUITES[arguments.suite].model_copy(update={"eps": EPS, "suite_images": 200})
    for name in NETS:
        model = lenet5(file_of(arguments.weights, name))
        found = gb.audit(model, data, suite, RUNS / name, label=f"public LeNet5, {name}")
        OUT.mkdir(parents=True, exist_ok=True)
        shutil.copy(RUNS / name / "result.json", OUT / f"{name}.json")
        print(f"{name}: trusted {found.verdict.trusted}. {found.verdict.summary}")


if __name__ == "__main__":
    main()

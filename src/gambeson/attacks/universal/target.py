"""Targets of universal attacks: a class, one label map for all images, or a class to hide."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BeforeValidator, Field, model_serializer, model_validator

from gambeson.base import Config, UserError, one_line, unknown_name
from gambeson.base.pictures import open_picture
from gambeson.data import Split

LabelSource = Literal["truth", "prediction"]
"""Labels that an untargeted attack leaves: the true ones, or the model's clean predictions (as in papers on the fooling
rate; no labels needed, one more forward per image). With several models, the predictions of their mean logits.
Of a target, the label maps that it is made from: that of the image of ``static``, those with the class of ``hide``."""

OMEGA = 0.9999
"""Default weight of the pixels to hide: that of a public implementation of Metzen et al. 2017."""
TAU = 0.75
"""Default confidence from which on a target counts as reached (Metzen et al. 2017)."""
NOTHING = -1
"""Target of a unit that has none."""
_FORMS = "expected class:CLASS, static:IMAGE or hide:CLASS"


class Target(Config):
    """What a targeted attack makes a model predict (Metzen et al., arXiv 1704.05712); as text ``KIND:VALUE``.

    - ``class:CLASS``: one class for every image or pixel; an integer alone means the same.
    - ``static:IMAGE``: one label map for all images: that of a validation image, by its index, or of a PNG file, whose
      values are class indices. ``Target.of`` takes a label map (H, W) itself.
    - ``hide:CLASS``: pixels of the class take the class of the nearest pixel of another class, by the exact Euclidean
      distance; all other pixels keep theirs. Borders do not wrap.

    CLASS is an index, or a name; ``#3`` is an index even where a class is called 3. Names, and images by index, are
    found in a data set by :meth:`within`.
    """

    kind: Literal["class", "static", "hide"]
    value: str
    """A class, an index, or a file."""
    shape: tuple[int, int] | None = None
    """Height and width of the static map, once it is known."""
    content: bytes = Field(default=b"", repr=False)
    """The static map, int16 and little-endian, row by row."""

    @model_validator(mode="before")
    @classmethod
    def _of_text(cls, value: Any) -> Any:
        return _fields(value) if isinstance(value, str) else value

    @model_serializer
    def _text(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return f"{self.kind}:{self.value}"

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read ``class:3``, ``3``, ``static:12``, ``static:mask.png``, ``hide:3`` or ``hide:car``.

        Raises:
            UserError: another form, or a file that is missing or no label map.
        """
        return cls(**_fields(text))

    @classmethod
    def of(cls, value: Target | int | str | torch.Tensor | np.ndarray[Any, Any]) -> Target:
        """Return the target meant by a class index, a text, or a label map (H, W) for all images.

        Raises:
            UserError: none is meant.
        """
        if isinstance(value, Target):
            return value
        if isinstance(value, str):
            return cls.parse(value)
        if isinstance(value, torch.Tensor | np.ndarray):
            return cls(**_static(np.asarray(value), None))
        if isinstance(value, int) and not isinstance(value, bool):
            return cls(kind="class", value=f"#{value}")
        raise UserError(f"target {value!r}: {_FORMS}, a class index, or a label map (H, W)")

    @property
    def map(self) -> torch.Tensor | None:
        """The static label map, (H, W) int64; None if there is none, or it has not been found yet."""
        if self.shape is None:
            return None
        return torch.from_numpy(np.frombuffer(self.content, "<i2").reshape(self.shape).astype(np.int64))

    @property
    def hash(self) -> str | None:
        """16 hex digits of a sha256 over the static map; None without one."""
        return None if self.shape is None else _hash(self.shape, self.content)

    @property
    def index(self) -> int:
        """The class to reach or to hide.

        Raises:
            UserError: it is a name; :meth:`within` finds its index.
        """
        bare = self.value.removeprefix("#")
        if not bare.isdecimal():
            raise UserError(f"target {self}: the index of this class is known within a data set only; call within")
        return int(bare)

    def _found(self, classes: Sequence[str]) -> int:
        """The class's index in a data set, of a number that is no other class's name."""
        named = classes.index(self.value) if self.value in classes else None
        if named is None and not self.value.removeprefix("#").isdecimal():
            raise unknown_name("class", self.value, classes)
        if named is not None and (not self.value.isdecimal() or self.index >= len(classes)):
            return named
        index = self.index
        if index >= len(classes):
            raise UserError(f"target {index} is not a class: expected 0 to {len(classes) - 1}")
        if named not in (None, index):
            raise UserError(
                f"target {self} is the class called {self.value}, whose index is {named}, or index {self.value}, whose "
                f"class is called {classes[index]}: write {self.kind}:#{named} or {self.kind}:#{index}"
            )
        return index

    def within(self, split: Split, labels: Callable[[Split], torch.Tensor] | None = None) -> Target:
        """Return the target for data of these classes, with its index or its map.

        Args:
            split: whose classes, sizes and, for ``static:INDEX``, images are meant.
            labels: the label maps of a part of it, such as a model's predictions; by default the true ones.

        Raises:
            UserError: no such class or image, a map of another size or with other classes, or maps for images that
                have one label each.
        """
        classes = split.classes
        if self.kind != "class" and split.task.per_image_label:
            raise UserError(
                f"target {self}: {split.name} has one label per image, and this needs label maps; give a class"
            )
        if self.kind != "static":
            return self.model_copy(update={"value": _spelt(self._found(classes), classes)})
        values = self.map
        if values is None:
            if self.index >= len(split):
                raise UserError(f"target {self}: {split.name} has {len(split)} images, expected 0 to {len(split) - 1}")
            one = split.subset([self.index])
            values = (one.labels if labels is None else labels(one))[0].cpu()
        there = split.take(slice(0, 1))[1][0]
        if values.shape != there.shape:
            raise UserError(
                f"target {self} is a map of {'x'.join(map(str, values.shape))} pixels, but the label maps of "
                f"{split.name} have {'x'.join(map(str, there.shape))}: resize it by nearest neighbour"
            )
        values = values.where(split.task.valid(values), NOTHING)
        if int(values.min()) < NOTHING or int(values.max()) >= len(classes):
            raise UserError(
                f"target {self} holds classes from {int(values.min())} to {int(values.max())}, but there are "
                f"{len(classes)}: expected 0 to {len(classes) - 1}"
            )
        return self.model_copy(update=_static(values.numpy(), self.value))

    def called(self, classes: Sequence[str]) -> str:
        """Return the target with the name of its class, as ``hide:3 (car)``.

        Args:
            classes: those of the data set.
        """
        if self.kind == "static":
            return str(self)
        index = self._found(classes)
        name, spelt = classes[index], _spelt(index, classes)
        return f"{self.kind}:{name}" if name in (self.value, spelt) else f"{self.kind}:{spelt} ({name})"

    def reach(
        self, predictions: torch.Tensor, valid: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what each unit should be taken for, and which units are to be hidden.

        Args:
            predictions: label maps of the clean images, (N, H, W), predicted or true; for a class also (N,).
            valid: which units count, in the same shape; the others neither have a target nor lend their class.

        Returns:
            Targets, int64, :data:`NOTHING` where there is none, such as in an image that is wholly the class to hide;
            and for ``hide`` the pixels of the class (bool), else None.

        Raises:
            UserError: a class or an image that :meth:`within` has not found yet.
        """
        counting = torch.ones_like(predictions, dtype=torch.bool) if valid is None else valid
        if self.kind == "class":
            targets, hidden = torch.full_like(predictions, self.index), None
        elif self.kind == "static":
            if self.map is None:
                raise UserError(f"target {self}: the map of this image is known within a data set only; call within")
            targets, hidden = self.map.to(predictions.device).expand_as(predictions), None
        else:
            counting = counting & (predictions >= 0)  # a random model may have no majority for a pixel
            hidden = (predictions == self.index) & counting
            targets = _nearest(predictions, hidden, counting & ~hidden)
        return targets.where(counting, NOTHING), hidden

    def hits(
        self, predictions: torch.Tensor, targets: torch.Tensor, hidden: torch.Tensor | None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return which units reach what :meth:`reach` returns, and which could, both in its shape.

        With a class to hide there are two pairs: its pixels, of which those count that are no longer taken for it,
        and all others, of which those count that are taken for their target.
        """
        own, hit = targets >= 0, predictions == targets
        if hidden is None:
            return [(hit & own, own)]
        gone = hidden & own & (predictions != self.index)
        return [(gone, hidden & own), (hit & own & ~hidden, own & ~hidden)]

    def rate(self, predictions: torch.Tensor, targets: torch.Tensor, hidden: torch.Tensor | None) -> float:
        """Return the share of units that :meth:`hits` counts.

        With a class to hide, the mean of the shares of both kinds of pixels, so that a small class counts as much as
        what surrounds it (ours): clean predictions have 0.5.

        Raises:
            UserError: no unit has a target.
        """
        counts = [(int(hit.sum()), int(own.sum())) for hit, own in self.hits(predictions, targets, hidden)]
        shares = [hit / own for hit, own in counts if own]
        if not shares:
            raise UserError("no unit has both a target and a label that counts: give images with labels")
        return sum(shares) / len(shares)

    def maps(
        self, predictions: torch.Tensor, valid: torch.Tensor | None = None, *, omega: float = OMEGA
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the targets of :meth:`reach`, and the weight of each: omega if it is to be hidden, else 1 - omega.

        Without a class to hide, all weights are 1. A unit without a target has weight 0.
        """
        targets, hidden = self.reach(predictions, valid)
        return targets, weights(targets, hidden, omega)


def _spelt(index: int, classes: Sequence[str]) -> str:
    """Return an index as a text that no class's name is, but its own."""
    return str(index) if classes[index] == str(index) or str(index) not in classes else f"#{index}"


def from_predictions(settings: Mapping[str, Any]) -> bool:
    """Whether an attack with these settings takes labels from predictions; without a say it does so for a target."""
    return settings.get("labels", "truth" if settings.get("target") is None else "prediction") == "prediction"


def weights(targets: torch.Tensor, hidden: torch.Tensor | None, omega: float) -> torch.Tensor:
    """Return the weight of every target that :meth:`Target.reach` returns, in its shape."""
    own = torch.ones_like(targets, dtype=torch.float32)
    if hidden is not None:
        own = torch.where(hidden, own * omega, own * (1 - omega))
    return own * (targets >= 0)


def _nearest(predictions: torch.Tensor, hidden: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
    """Replace each hidden pixel by the nearest source; :data:`NOTHING` in images without one."""
    from scipy.ndimage import distance_transform_edt  # a fifth of a second

    filled = predictions.clone()
    for row in hidden.flatten(1).any(1).nonzero().flatten().tolist():
        if not bool(sources[row].any()):
            filled[row][hidden[row]] = NOTHING
            continue
        away = ~sources[row].cpu().numpy()
        places = torch.from_numpy(distance_transform_edt(away, return_distances=False, return_indices=True))
        nearest = predictions[row][tuple(places.long().to(predictions.device))]
        filled[row] = predictions[row].where(~hidden[row], nearest)
    return filled


def _fields(text: str) -> dict[str, Any]:
    kind, sign, value = text.partition(":")
    if not sign:
        kind, value = "class", text
    if kind not in ("class", "static", "hide") or not value or (not sign and not text.isdecimal()):
        raise UserError(f"target {text!r}: {_FORMS}, or a class index")
    if kind != "static" or value.isdecimal():
        return {"kind": kind, "value": value}
    if value.startswith("#"):
        raise UserError(
            f"target {text!r} is a label map that was given as a tensor: give it again, target=uap.target of the "
            "perturbation that was crafted for it"
        )
    try:
        with open_picture(value) as picture:
            if picture.mode not in ("L", "P", "1", "I", "I;16"):
                raise UserError(f"target {text!r} is a picture of mode {picture.mode}: expected one of class indices")
            return _static(np.asarray(picture), value)
    except OSError as error:
        raise UserError(
            f"target {text!r}: {value} cannot be read as a PNG of class indices ({one_line(error)})"
        ) from None


def _static(values: np.ndarray[Any, Any], name: str | None) -> dict[str, Any]:
    """Return the fields of a static target; without a name, its hash stands for one."""
    if values.ndim != 2 or values.dtype.kind not in "iub" or values.size == 0 or abs(values.astype(int)).max() >= 2**15:
        raise UserError(
            f"a target map has shape {values.shape} and type {values.dtype}: expected class indices (H, W) of integers"
        )
    height, width = values.shape
    content = values.astype("<i2").tobytes()
    return {
        "kind": "static",
        "value": f"#{_hash((height, width), content)}" if name is None else name,
        "shape": (height, width),
        "content": content,
    }


def _hash(shape: Sequence[int], content: bytes) -> str:
    return hashlib.sha256(f"{tuple(shape)}".encode() + content).hexdigest()[:16]


def _setting(value: Any) -> Any:
    """A class by its index stays an integer, as settings have always stored it."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    target = Target.of(value)
    # A number in a text may be a class's name, which its data set tells.
    known = target.kind == "class" and not isinstance(value, str) and target.value.removeprefix("#").isdecimal()
    return target.index if known else target


TargetSetting = Annotated[Annotated[int, Field(ge=0)] | Target | None, BeforeValidator(_setting)]
"""A target in the settings of an attack: a class index, a :class:`Target`, or what :meth:`Target.of` takes."""

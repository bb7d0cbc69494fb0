"""Splits: images with labels, their subsets, batches, statistics and content hashes."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch

from gambeson.base.errors import DataWarning, UserError
from gambeson.base.seeds import generator as stream
from gambeson.data.partition import stratified
from gambeson.tasks import Counts, Task
from gambeson.tasks.labels import as_pair, class_names, distinct, is_mask

Pieces = Iterable[tuple[torch.Tensor, torch.Tensor]]


_BLOCK_BYTES = 2**20
"""Block size for hashing, which fits the processor's cache."""


def digests(pieces: Pieces, count: int) -> tuple[str, torch.Tensor]:
    """Hash a split and each of its images in one pass, independently of how it is cut into pieces.

    Returns:
        16 hex digits of a sha256 over images, labels, types and shapes; and :func:`image_hashes` of all images (N,).
    """
    pixels, truth = hashlib.sha256(), hashlib.sha256()
    heads: list[Any] = [count]
    hashes = [torch.empty(0, dtype=torch.int64)]
    for images, labels in pieces:
        hashes.append(image_hashes(images))
        pixels.update(images.cpu().contiguous().numpy().data)
        truth.update(labels.cpu().contiguous().numpy().data)
        heads[1:] = [images.dtype, tuple(images.shape[1:]), tuple(labels.shape[1:])]
    whole = hashlib.sha256(f"{heads} {pixels.hexdigest()} {truth.hexdigest()}".encode()).hexdigest()[:16]
    return whole, torch.cat(hashes)


def image_hashes(images: torch.Tensor) -> torch.Tensor:
    """Hash the content of every image to 64 bits; stable across machines and versions, because hashes are stored.

    Floats in [0, 1] are rounded to 256 levels, so that they have the hash of their uint8 form.
    Each 8 bytes of an image plus a key of their position pass through the mixer of SplitMix64 (Steele et al. 2014), and
    their sum passes through it again. Two different images collide once in 2^64 pairs: never in practice among 50,000
    images and 10,000 others. The hash is not cryptographic.

    Args:
        images: (N, C, H, W), uint8 or float in [0, 1].

    Returns:
        (N,) int64, on the CPU.
    """
    if images.is_floating_point():
        images = (images.float() * 255).round().clamp(0, 255).to(torch.uint8)
    rows = images.flatten(1).cpu()
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 8)).contiguous()
    words = rows.numpy().view("<u8").astype(np.uint64, copy=False)
    keys = _mixed(np.arange(1, words.shape[1] + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    size = max(1, _BLOCK_BYTES // max(8, rows.shape[1]))
    found = [_mixed(words[at : at + size] + keys).sum(1, dtype=np.uint64) for at in range(0, len(words), size)]
    return torch.from_numpy(_mixed(np.concatenate(found)).view(np.int64)) if found else torch.empty(0).long()


def _mixed(values: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Mix 64-bit words in place, modulo 2^64: every output bit depends on every input bit."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values ^= values >> np.uint64(shift)
        values *= np.uint64(factor)
    values ^= values >> np.uint64(31)
    return values


def moments(pieces: Pieces, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and the population standard deviation of each channel, in pixel units."""
    first, second = torch.zeros(2, channels, dtype=torch.float64)
    total = 0
    for images, _ in pieces:
        rows = images.transpose(0, 1).flatten(1)
        total += rows.shape[1]
        if images.is_floating_point():
            values = rows.double()
            first += values.sum(1).cpu()
            second += values.square().sum(1).cpu()
        else:  # counting the 256 values is exact and avoids a float copy of the data
            level = torch.arange(256, dtype=torch.float64) / 255
            counts = torch.stack([torch.bincount(row, minlength=256) for row in rows]).cpu().double()
            first += counts @ level
            second += counts @ level.square()
    mean = first / max(1, total)
    std = (second / max(1, total) - mean.square()).clamp_min(0).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())


CHUNK_BYTES = 64 * 2**20
"""Piece size for statistics, so that they need little extra memory."""

_CACHED = ("_digests", "_moments")
_DARK = 16
"""Images whose brightest byte is below this are taken for pixels of fewer bits."""

SplitT = TypeVar("SplitT", bound="Split")
Indices = Any  # a LongTensor, a slice, or anything torch can turn into a LongTensor
Batch = tuple[torch.Tensor, torch.Tensor]


class Split:
    """Images with their labels, on one device. Treat it as read-only: the fingerprint is cached.

    Args:
        name: its name in reports, such as ``"fashion-mnist/test"``.
        images: (N, C, H, W), uint8 or float in [0, 1]; a tensor or an array. Floats are kept unchanged.
        labels: class indices, (N,) or (N, H, W), in any form that :func:`gambeson.tasks.as_labels` takes.
        classes: the class names; by default the numbers up to the highest label. Without them, labels of 0 and 255
            alone are read as masks: 255 is class 1.
        ignore_index: a label that counts nowhere, or None.
        task: what the labels mean, with its own ignore index, by object or name; by default the task that labels of
            this form belong to.

    Raises:
        UserError: wrong shapes, lengths that differ, pixels outside [0, 1], labels without a class, or a task as well
            as an ignore index.
    """

    def __init__(
        self,
        name: str,
        images: Any,
        labels: Any,
        classes: tuple[str, ...] | None = None,
        ignore_index: int | None = None,
        task: Task | str | None = None,
    ) -> None:
        self._images, self._labels, self.task = as_pair(images, labels, task, ignore_index, stored=True)
        if self._images.dtype == torch.uint8 and 0 < (highest := int(self._images.max() if len(labels) else 0)) < _DARK:
            warnings.warn(
                f"no pixel of {name} is above {highest} of 255, so that all is nearly black: "
                f"pass images.float() / {highest} if {highest} is white",
                DataWarning,
                stacklevel=2,
            )
        self.name = name
        if classes is None:
            values = distinct(self._labels)
            if self.task.all_count and is_mask(values):
                self._labels, values = self._labels.clamp(max=1), torch.arange(2)
            classes = class_names(values, self.ignore_index)
        self.classes = tuple(classes)
        self.task.check_labels(self._labels, len(self.classes))
        self._device: torch.device | None = None

    @property
    def images(self) -> torch.Tensor:
        """Images as stored, (N, C, H, W): uint8, or float in [0, 1]."""
        return self._images

    @property
    def labels(self) -> torch.Tensor:
        """Labels, int64: (N,) or (N, H, W); a copy of maps that are stored as bytes."""
        return self._labels.to(torch.int64)

    @property
    def ignore_index(self) -> int | None:
        """The label that counts nowhere, or None: the task's."""
        return self.task.ignore_index

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        channels, height, width = self._images.shape[1:]
        return channels, height, width

    @property
    def device(self) -> torch.device:
        """Default device of :meth:`take` and :meth:`batches`."""
        return self._device or self._home

    def __len__(self) -> int:
        return len(self._images)

    def __repr__(self) -> str:
        kind = type(self).__name__
        return f"{kind}({self.name!r}, {len(self)} images of {self.shape}, {len(self.classes)} classes)"

    def take(self, indices: Indices, device: torch.device | str | None = None) -> Batch:
        """Return images as float32 in [0, 1] and labels as int64, in the order of ``indices``.

        Args:
            indices: a LongTensor (M,) or a slice.
            device: of the batch; by default that of the split. uint8 becomes float there.

        Returns:
            x (M, C, H, W) and y (M,) or (M, H, W): copies that can be modified.
        """
        target = torch.device(device) if device is not None else self.device
        return delivered(*self._rows(indices), target, copy=isinstance(indices, slice))

    def walk(self, parts: Iterable[Indices], device: torch.device | str | None = None) -> Iterator[Batch]:
        """Yield parts of the split in turn, as :meth:`take` returns them.

        Args:
            parts: the indices of each part, at least one per part.
            device: of the batches; by default that of the split.
        """
        for part in parts:
            yield self.take(part, device)

    def batches(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
        drop_last: bool = False,
    ) -> Iterator[Batch]:
        """Iterate over the split once, in batches as :meth:`take` returns them.

        Args:
            batch_size: images per batch; the last batch may be smaller.
            device: of the batches; by default that of the split.
            generator: shuffles the images, and is drawn from at the call; None keeps the order.
            drop_last: leave out a smaller last batch.

        Raises:
            UserError: a batch size below 1, or one that leaves no batch.
        """
        if batch_size < 1:
            raise UserError(f"batch_size = {batch_size}: expected 1 or more")
        if drop_last and batch_size > len(self):
            raise UserError(
                f"batch_size = {batch_size} with drop_last leaves no batch of the {len(self)} images of {self.name}: "
                f"expected {len(self)} or less"
            )
        stop = len(self) - len(self) % batch_size if drop_last else len(self)
        starts = range(0, stop, batch_size)
        if generator is None:
            return self.walk([slice(at, min(at + batch_size, stop)) for at in starts], device)
        order = torch.randperm(len(self), generator=generator, device=generator.device).to(self._home)
        return self.walk([order[at : min(at + batch_size, stop)] for at in starts], device)

    def check_classes(self, count: int) -> None:
        """Refuse a model of ``count`` classes if a label is beyond them.

        Raises:
            UserError: such a label; of label maps that are not in memory, as many class names.
        """
        self.task.check_labels(self._labels, count)

    def check_logits(self, shape: Sequence[int]) -> None:
        """Refuse a model whose logits (N, K) or (N, K, H, W) do not fit the labels.

        Raises:
            UserError: it answers per image where labels are maps, in another size, or with too few classes.
        """
        self.check_classes(shape[1])
        self.task.check_logits(shape, self.take(slice(0, 1))[1])

    def subset(self: SplitT, indices: Indices, name: str | None = None) -> SplitT:
        """Return the split of the images at ``indices``, in that order, with the same classes."""
        other = copy.copy(self)
        for cached in _CACHED:
            other.__dict__.pop(cached, None)
        other._select(indices)
        other.name = f"{self.name}[{len(other)}]" if name is None else name
        return other

    def sample(self: SplitT, count: int, *, seed: int = 0) -> SplitT:
        """Return a stratified random subset of at most ``count`` images; see :meth:`sample_indices`.

        Raises:
            UserError: a count below 1.
        """
        rows = self.sample_indices(count, seed=seed)
        return self.subset(rows) if len(rows) < len(self) else self

    def sample_indices(self, count: int, *, seed: int = 0) -> torch.Tensor:
        """Draw a stratified random subset, the only kind of subset in this library.

        The first images of a split are not a random sample, since folders are ordered by class. Each class keeps its
        share, by the method of largest remainders (:func:`gambeson.data.partition.stratified`); label maps are not
        stratified.

        Args:
            count: number of images; all that count if the split has no more.
            seed: of the draw.

        Returns:
            Indices, ascending, on the CPU.

        Raises:
            UserError: a count below 1.
        """
        if count < 1:
            raise UserError(f"a subset of {count} images of {self.name} was requested: expected 1 or more")
        strata = torch.zeros(len(self)) if self._strata is None else self._strata.cpu()
        rows = torch.arange(len(self))
        if self.task.per_image_label and not self.task.all_count and bool((kept := self.task.labelled(strata)).any()):
            rows = rows[kept]
        return rows[stratified(strata[rows], min(count, len(rows)), stream(seed, "sample"))]

    def without(self: SplitT, seen: torch.Tensor) -> SplitT:
        """Return the split without the images whose content is among ``seen``.

        Args:
            seen: hashes as :attr:`image_hashes` gives them, such as ``data.train.image_hashes``.
        """
        own = torch.isin(self.image_hashes, seen.cpu())
        return self.subset(~own) if bool(own.any()) else self

    def with_images(self, images: torch.Tensor) -> Split:
        """Return a split of other images (N, C, H, W) with these labels, such as the perturbed ones of each image."""
        return Split(self.name, images, self.labels, self.classes, task=self.task)

    def counts(self, predictions: torch.Tensor) -> Counts:
        """Count the right answers of each image, from predictions (N,) or (N, H, W) on any device; on the CPU."""
        return self.task.counts(predictions.cpu(), self.labels.cpu())

    def to(self: SplitT, device: torch.device | str) -> SplitT:
        """Return the split with its tensors on ``device`` or, if they do not fit, with its batches sent there.

        On a GPU the tensors may use at most half of the free memory.
        """
        other = copy.copy(self)
        other._device = torch.device(device)
        other._move(other._device)
        return other

    @property
    def fingerprint(self) -> str:
        """16 hex digits of a sha256 over images, labels, their types and shapes; the same on every device."""
        return self._digests[0]

    @property
    def sign(self) -> str:
        """By what a resumed run knows its data again: the fingerprint, or of a split on disk that of a few items."""
        return self.fingerprint

    @property
    def image_hashes(self) -> torch.Tensor:
        """64-bit content hash of every image, int64 (N,) on the CPU; float images have that of their uint8 form.

        Computed in one pass over the split, on first use.
        """
        return self._digests[1]

    @cached_property
    def _digests(self) -> tuple[str, torch.Tensor]:
        return digests(self._chunks(), len(self))

    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return the mean and the population standard deviation of each channel, in pixel units [0, 1].

        Exact over the split or, if it stays on disk, over a :meth:`sample` of 10,000 images; a constant channel has a
        standard deviation of 0.
        """
        return self._moments

    @cached_property
    def _moments(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return moments(self._chunks(), self.shape[0])

    @property
    def single_class(self) -> bool:
        """Whether fewer than two classes are among the labels that count; False where finding out takes a pass."""
        return one_class(self.task, self._labels)

    @property
    def unlabelled(self) -> int:
        """Number of images without a label that counts; 0 where finding out takes a pass."""
        return len(self) - int(self.task.labelled(self._labels).sum())

    @property
    def _strata(self) -> torch.Tensor | None:
        """The class of each image (N,), or None where labels are maps."""
        return self._labels if self.task.per_image_label else None

    @property
    def _home(self) -> torch.device:
        """The device of the tensors, and hence of indices."""
        return self._images.device

    def _rows(self, indices: Indices) -> Batch:
        index = self._index(indices)
        return self._images[index], self._labels[index].to(torch.int64)

    def _index(self, indices: Indices) -> Any:
        if isinstance(indices, slice):
            return indices
        index = torch.as_tensor(indices, device=self._home)
        return index.nonzero().flatten() if index.dtype == torch.bool else index.to(torch.int64)

    def _select(self, indices: Indices) -> None:
        index = self._index(indices)
        self._images, self._labels = self._images[index], self._labels[index]

    def _move(self, device: torch.device) -> None:
        if device.type == "cuda" and self._images.device.type != "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if self._images.nbytes + self._labels.nbytes > free // 2:
                return
        self._images, self._labels = self._images.to(device), self._labels.to(device)

    def _slices(self) -> list[slice]:
        size = max(1, CHUNK_BYTES // (self.shape[0] * self.shape[1] * self.shape[2]))
        return [slice(start, start + size) for start in range(0, len(self), size)]

    def _chunks(self) -> Iterator[Batch]:
        return map(self._rows, self._slices())


def one_class(task: Task, labels: torch.Tensor) -> bool:
    """Return whether fewer than two classes are among the labels that count."""
    counting = labels[task.valid(labels)]
    return counting.numel() == 0 or bool(counting.min() == counting.max())


def delivered(images: torch.Tensor, labels: torch.Tensor, device: torch.device, *, copy: bool = False) -> Batch:
    """Return stored images as float32 in [0, 1], and labels, on ``device``; uint8 becomes float there."""
    if images.is_floating_point():
        x = images.to(device, torch.float32, copy=copy)
    else:
        x = images.to(device).to(torch.float32).div_(255)
    return x, labels.to(device, copy=copy)

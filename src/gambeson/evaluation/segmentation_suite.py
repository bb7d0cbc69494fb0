"""The worst case of label maps over attacks: image by image for accuracy, by a greedy choice for the mean IoU."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from gambeson.base import Config, generator, seeded
from gambeson.data import Split
from gambeson.evaluation.outcome import at_once
from gambeson.evaluation.universal import confusion_of
from gambeson.tasks import Confusion, Counts, Rate
from gambeson.tasks.confusion import mean_iou
from gambeson.tasks.rate import resampled
from gambeson.victim import Victim, vote, votes_of

_ROUNDS = 1000
"""Most rounds of the greedy choice, as in the authors' code; it stops when nothing improves, after a few."""


class MapAttack(Config):
    """What one attack of a suite does by itself.

    Images that an earlier attack had left without a right pixel are taken as that attack left them.
    """

    attack: str
    accuracy: Rate
    """Pixel accuracy."""
    mean_iou: Rate


class MapResult(Config):
    """What a suite finds on label maps besides the pixel accuracy.

    Pixel accuracy and mean IoU have different worst cases: for the accuracy of the data set, the one per image, for the
    mean IoU, a choice over all images at once. Both are chosen from stored predictions, the clean ones included, and
    scored by a fresh forward of the images chosen. Intervals are over images, with the choice kept as it is.
    """

    image_accuracy: Rate
    """aACC (Croce et al. 2024, section 3.6): the mean over images of their pixel accuracy under the worst attack. The
    headline, ``robust`` of the suite, weights images by their labelled pixels; the two agree if all have as many."""
    clean_mean_iou: Rate
    mean_iou: Rate
    """Mean IoU under the attacks that a greedy choice finds: it is reached, so the true worst case is no higher."""
    mean_iou_bound: float
    """Mean over classes of the lowest IoU that any choice gives the class alone: the worst case of these attacks is no
    lower. Of the predictions that were chosen from."""
    attacks: list[MapAttack]


@dataclass(frozen=True)
class MapChoice:
    """The worst cases of a split with label maps."""

    result: MapResult
    right: Counts
    """Right pixels of each image under the worst case of the accuracy."""
    images: torch.Tensor
    source: torch.Tensor
    """(N,) the attack that made each of ``images``; -1 for a clean one."""
    iou_images: torch.Tensor
    iou_source: torch.Tensor
    """The same for the worst case of the mean IoU."""


class WorstMaps:
    """The candidates of every image of a split with label maps, the clean image among them.

    All candidates are kept until the end, on the CPU, since the choice for the mean IoU is known only then: 4 bytes per
    value of an image and attack. A random model's candidates are compared by the majority of votes, and the chosen ones
    scored on others, those of the clean images.

    Args:
        victim: the model, inside its context.
        split: images with one label per pixel.
        seed: of a random model's votes, and of the order of the greedy choice.
        batch_size: maximum batch size; smaller for large images.

    Attributes:
        clean: counts of the clean images.
        votes: votes per image.

    Raises:
        UserError: no label counts, or some logits are not finite.
    """

    def __init__(self, victim: Victim, split: Split, *, seed: int = 0, batch_size: int = 250) -> None:
        self.victim, self.split, self.seed = victim, split, seed
        self.batch_size = at_once(split, batch_size)
        self.clean = self._counted(split)
        few = split.take(slice(0, 8), victim.device)[0]
        self.votes = votes_of(victim, few)
        self._random = victim.inspect(few, scores=True).stochastic
        self.counts = [self.clean.counts.clone()]
        everyone = torch.arange(len(split))
        if self._random:
            for rows in everyone.split(self.batch_size):
                images, labels = split.take(rows, victim.device)
                self.counts[0][rows] = self._voted(images, labels, rows, "clean")
        self._kept: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        self._origin = [torch.full((len(split),), -1)]

    @property
    def survivors(self) -> torch.Tensor:
        """Indices of the images still to be attacked: a labelled pixel is right under all candidates so far."""
        return (self._right.amin(0) > 0).nonzero().flatten()

    def take(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return clean images with their labels, on the model's device."""
        return self.split.take(rows, self.victim.device)

    def begin(self) -> torch.Tensor:
        """Begin another attack, and return the images to try it on; the others keep their worst candidate so far."""
        survivors = self.survivors
        worst = self._right.argmin(0)
        everyone = torch.arange(len(worst))
        self.counts.append(torch.stack(self.counts)[worst, everyone])
        self._origin.append(torch.stack(self._origin)[worst, everyone])
        self._kept.append([])
        return survivors

    def offer(self, rows: torch.Tensor, moved: torch.Tensor, source: int) -> None:
        """Add the candidates ``moved`` of the images with indices ``rows``, which attack ``source`` made."""
        labels = self.take(rows)[1]
        self.counts[-1][rows] = self._voted(moved, labels, rows, source)
        self._origin[-1][rows] = source
        self._kept[source].append((rows, moved.cpu()))

    def scored(self) -> Counts:
        """Count the right pixels of each image under its worst candidate so far, scored on fresh votes."""
        if self._random:
            return _pixels(self._counted(self.split.with_images(self.chosen(self._right.argmin(0))[0])).counts)
        return Counts(self._right.amin(0), self.clean.counts[:, 1].sum(1))

    def chosen(self, choice: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the images that a choice among the candidates stands for, on the CPU, and their attacks; -1 clean."""
        source = torch.stack(self._origin)[choice, torch.arange(len(choice))]
        images = self.split.take(slice(None), "cpu")[0]
        for number, parts in enumerate(self._kept):
            for rows, moved in parts:
                own = source[rows] == number
                images[rows[own]] = moved[own].to(images.dtype)
        return images, source

    def finish(self, names: Iterable[str]) -> MapChoice:
        """Choose for the mean IoU, and score both choices afresh.

        Args:
            names: of the attacks.
        """
        counts = torch.stack(self.counts)
        images, source = self.chosen(self._right.argmin(0))
        right = _pixels(self._counted(self.split.with_images(images)).counts)
        for_iou = self.chosen(greedy_choice(counts, seed=self.seed))
        alone = [Confusion(one, self.split.classes) for one in self.counts[1:]]
        result = MapResult(
            image_accuracy=mean_of_images(right),
            clean_mean_iou=self.clean.mean_iou,
            mean_iou=self._counted(self.split.with_images(for_iou[0])).mean_iou,
            mean_iou_bound=lower_bound(counts),
            attacks=[
                MapAttack(attack=name, accuracy=one.accuracy, mean_iou=one.mean_iou)
                for name, one in zip(names, alone, strict=True)
            ],
        )
        return MapChoice(result, right, images, source, *for_iou)

    @property
    def _right(self) -> torch.Tensor:
        return torch.stack(self.counts)[:, :, 0].sum(2)

    def _counted(self, split: Split) -> Confusion:
        with seeded(self.seed, "score"):  # where a single pass decides, predict leaves the seed to its caller
            return confusion_of(self.victim, split, seed=self.seed)

    def _voted(self, images: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor, source: int | str) -> torch.Tensor:
        with seeded(self.seed, "candidate", source, int(rows[0])):
            predictions = vote(self.victim, images)
        return self.split.task.confusion(predictions, labels, len(self.split.classes)).cpu()


def class_pixels(split: Split, *, images: int = 1000, seed: int = 0) -> tuple[float, ...] | None:
    """Count the pixels of each class in a sample of a split, for ``mce-bal``; None if the split is empty.

    Args:
        split: of label maps, the training split in the paper.
        images: most images of the sample (ours).
        seed: of the sample.
    """
    if len(split) == 0:
        return None
    few, counts = split.sample(images, seed=seed), torch.zeros(len(split.classes), dtype=torch.long)
    for _, labels in few.batches(at_once(few)):
        counts += split.task.confusion(labels, labels, len(counts))[:, 1].sum(0).cpu()
    return tuple(counts.tolist())


def _pixels(counts: torch.Tensor) -> Counts:
    return Counts(counts[:, 0].sum(1), counts[:, 1].sum(1))


def mean_of_images(counts: Counts) -> Rate:
    """Return the mean over images of the share of right units, with its bootstrap interval over images."""
    shares = counts.shares
    draws = torch.cat([sums[:, 0] / len(shares) for sums in resampled(shares[:, None], 0)])
    return Rate.from_error(float(shares.mean()), draws, len(shares), int(counts.total.sum()))


def greedy_choice(counts: torch.Tensor, *, seed: int = 0) -> torch.Tensor:
    """Choose a candidate per image so that the mean IoU of all images is low (Croce et al. 2024, section 3.6).

    Start with the candidate that is the worst for all images together. Every round goes through the images in a random
    order and gives each the candidate that lowers the mean IoU most; the choice ends with the first round that changes
    nothing. The same from the worst case of the accuracy (ours); the lower of the two is returned.

    Args:
        counts: (A, N, 3, K) of each candidate and image: see :class:`gambeson.tasks.Confusion`.
        seed: of the orders.

    Returns:
        (N,): the number of the candidate of each image.
    """
    draw, everyone, counts = generator(seed, "greedy"), torch.arange(counts.shape[1]), counts.double()
    alone = int(mean_iou(*counts.sum(1).unbind(1)).argmin())
    ends = []
    for choice in (torch.full_like(everyone, alone), counts[:, :, 0].sum(2).argmin(0)):
        sums, changed = counts[choice, everyone].sum(0), True
        for _ in range(_ROUNDS):
            if not changed:
                break
            changed = False
            for n in torch.randperm(len(everyone), generator=draw).tolist():
                options = sums - counts[choice[n], n] + counts[:, n]
                values = mean_iou(*options.unbind(1))
                best = int(values.argmin())
                if values[best] < values[choice[n]]:
                    choice[n], sums, changed = best, options[best], True
        ends.append((float(mean_iou(*sums[None].unbind(1))), choice))
    return min(ends, key=lambda end: end[0])[1]


def lower_bound(counts: torch.Tensor) -> float:
    """Return a mean IoU that no choice of candidates can go below: each class has the choice that is worst for it.

    The lowest ratio of sums, right over union, is found per class by Dinkelbach's iteration: with the ratio r of the
    last choice, each image takes the candidate of lowest right - r union, until r stays.

    Args:
        counts: (A, N, 3, K) of each candidate and image.
    """
    right, truth, predicted = counts.double().unbind(2)
    union = truth + predicted - right
    ratio = torch.ones(counts.shape[3], dtype=torch.float64)
    while True:
        choice = (right - ratio * union).argmin(0, keepdim=True)
        top, bottom = (values.gather(0, choice).sum((0, 1)) for values in (right, union))
        lower = top / bottom.clamp(min=1)
        if not bool((lower < ratio).any()):
            break
        ratio = ratio.minimum(lower)
    present = truth[0].sum(0) > 0
    return float(ratio[present].mean())

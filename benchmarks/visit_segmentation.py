"""The segmentation benchmark of a visit: forward passes and steps of per-image and universal attacks on label maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from visit import Notebook, Peak, Visit, matmul_precision, pace, seconds_of
from visit_bench import count_operations

from gambeson import models
from gambeson.attacks import PGD, StochasticPGD
from gambeson.base import generator, seeded
from gambeson.data import Dataset, Split
from gambeson.victim import FastPath, Victim

CLASSES, IGNORED = 21, 255
"""Of VOC, whose masks have 20 classes, a ground and unlabelled borders."""


def run_segmentation(visit: Visit, book: Notebook) -> None:
    """Time networks with random weights, which does not affect the time, in each precision, recording each at once."""
    data = _random_maps(visit)
    for name in visit.segmented:
        with seeded(visit.seed, "visit"):
            model = models.create(name, data).to(visit.device).eval()
        for kind in ("bfloat16", "tf32", "float32") if visit.low else ("float32",):
            book.attempt(f"{name}, {kind}", partial(_time, visit, book, model, data, kind), 10)


def _random_maps(visit: Visit) -> Dataset:
    """Random images with maps of blocks and unlabelled lines between them, a batch of each split."""
    side, count = visit.segmented_side, 3 * visit.segmented_batch
    draw = generator(visit.seed, "maps")
    images = torch.randint(0, 256, (count, 3, side, side), generator=draw, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (count, 4, 4), generator=draw).repeat_interleave(-(-side // 4), 1)
    labels = labels.repeat_interleave(-(-side // 4), 2)[:, :side, :side].clone()
    labels[:, :: max(2, side // 4)] = IGNORED
    names = tuple(str(number) for number in range(CLASSES))
    parts = [slice(k, None, 3) for k in range(3)]
    train, validation, test = (
        Split(name, images[part], labels[part], names, IGNORED)
        for name, part in zip(("train", "validation", "test"), parts, strict=True)
    )
    return Dataset("maps", train, validation, test, names)


def _time(visit: Visit, book: Notebook, model: models.PixelModel, data: Dataset, kind: str) -> None:
    """Time a forward, a step of PGD and a step of stochastic PGD, both without further forwards."""
    x, y = data.train.take(slice(0, visit.segmented_batch), visit.device)
    forward, backward = count_operations(model, x, y, data.train.task)
    steps = visit.segmented_steps
    pgd = PGD(eps=visit.eps, steps=steps, early_stop=False)
    universal = StochasticPGD(eps=visit.eps, probe_starts=0, steps=steps, batch_size=len(x), temperature=1)
    fast = FastPath(precision="bfloat16" if kind == "bfloat16" else "float32")
    with _precision(kind), Victim(model, fast=fast) as victim:

        def ask() -> None:
            with torch.no_grad():
                victim(x)

        jobs: dict[str, Callable[[], object]] = {
            "forward": ask,
            "PGD step": lambda: pgd(victim, x, y, task=data.train.task),
            "universal step": lambda: universal.craft(victim, data),
        }
        for name, job in jobs.items():
            with Peak() as peak:
                first = seconds_of(job, 1, 0)  # apart, because it folds and captures
                before, times = (victim.forwards, victim.backwards), 3
                seconds = seconds_of(job, times, 1)
            forwards, backwards = (
                (now - old) / (times + 1) for now, old in zip((victim.forwards, victim.backwards), before, strict=True)
            )
            book.note(
                "segmentation",
                model=model.card.name,
                side=x.shape[-1],
                batch_size=len(x),
                precision=kind,
                name=name,
                notes=victim.notes,
                first_seconds=first,
                seconds=seconds,
                forwards=forwards,
                backwards=backwards,
                images_a_second=(backwards or forwards) / seconds,
                peak_gib=peak.gib,
                **pace(book, forwards * forward + backwards * backward, seconds),
            )


@contextmanager
def _precision(kind: str) -> Iterator[None]:
    """Let float32 convolutions and products round their factors to TF32, or not."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = kind != "float32"
    try:
        with matmul_precision("highest" if kind == "float32" else "high"):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = before

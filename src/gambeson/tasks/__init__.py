"""What labels mean: which answers count, what each costs, when it is right, and what rate is reported.

``classification`` has one label per image, ``segmentation`` one per pixel. A split knows its task, and every other
room asks it. Images and labels of every usual form come in by :func:`as_pair`.
"""

from gambeson.tasks.confusion import Confusion
from gambeson.tasks.labels import as_labels, as_pair
from gambeson.tasks.rate import Difference, Rate
from gambeson.tasks.task import (
    CLASSIFICATION,
    Classification,
    Counts,
    Segmentation,
    Task,
    answers,
    create,
    names,
    of,
    register,
)

__all__ = [
    "CLASSIFICATION",
    "Classification",
    "Confusion",
    "Counts",
    "Difference",
    "Rate",
    "Segmentation",
    "Task",
    "answers",
    "as_labels",
    "as_pair",
    "create",
    "names",
    "of",
    "register",
]

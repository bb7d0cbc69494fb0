"""What labels mean: which answers count, what each costs, when it is right, and what rate is reported.

``classification`` has one label per image, ``segmentation`` one per pixel. A split knows its task, and every other
room asks it.
"""

from gambeson.tasks.base import Counts, Task
from gambeson.tasks.classification import CLASSIFICATION, Classification
from gambeson.tasks.rate import Rate
from gambeson.tasks.registry import create, names, of, register
from gambeson.tasks.segmentation import Segmentation

__all__ = [
    "CLASSIFICATION",
    "Classification",
    "Counts",
    "Rate",
    "Segmentation",
    "Task",
    "create",
    "names",
    "of",
    "register",
]

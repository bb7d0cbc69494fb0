"""Data sets in memory or streamed from disk: named sets, pairs, image folders, torch data sets, and augmentation."""

from gambeson.data.augment import KINDS, augment
from gambeson.data.dataset import Dataset, as_dataset, as_split, disjoint, held_out
from gambeson.data.lazy import LazySplit
from gambeson.data.load import Entry, Name, canonical, catalog, get, load
from gambeson.data.pictures import ImageOptions, Shape
from gambeson.data.registry import register
from gambeson.data.split import Split

__all__ = [
    "KINDS",
    "Dataset",
    "Entry",
    "ImageOptions",
    "LazySplit",
    "Name",
    "Shape",
    "Split",
    "as_dataset",
    "as_split",
    "augment",
    "canonical",
    "catalog",
    "disjoint",
    "get",
    "held_out",
    "load",
    "register",
]

"""Matrices of runs: train, audit, compare."""

from gambeson.studies.quickstart import quickstart

__all__ = ["quickstart"]

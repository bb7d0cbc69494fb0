"""Matrices of runs: train, audit, compare."""

from gambeson.studies.bench import bench_attacks
from gambeson.studies.bench_training import bench_training
from gambeson.studies.quickstart import quickstart
from gambeson.studies.timing import BenchResult, BenchSettings

__all__ = ["BenchResult", "BenchSettings", "bench_attacks", "bench_training", "quickstart"]

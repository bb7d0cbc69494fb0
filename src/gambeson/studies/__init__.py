"""Matrices of runs: train, audit, compare."""

from gambeson.studies.bench import BenchResult, BenchSettings, bench_attacks, bench_training
from gambeson.studies.quickstart import quickstart

__all__ = ["BenchResult", "BenchSettings", "bench_attacks", "bench_training", "quickstart"]

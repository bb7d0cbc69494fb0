"""Matrices of runs: train, audit, compare."""

from gambeson.studies.bench import BenchSettings, bench_attacks
from gambeson.studies.quickstart import quickstart

__all__ = ["BenchSettings", "bench_attacks", "quickstart"]

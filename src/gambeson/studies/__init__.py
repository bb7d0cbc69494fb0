"""Studies: fixed matrices of runs, benchmarks, and measurements on accelerators."""

from gambeson.studies.bench import BenchResult, BenchSettings, bench_attacks, bench_training, bench_universal
from gambeson.studies.quickstart import FirstLook, quickstart

__all__ = [
    "BenchResult",
    "BenchSettings",
    "FirstLook",
    "bench_attacks",
    "bench_training",
    "bench_universal",
    "quickstart",
]

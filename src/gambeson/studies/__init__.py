"""Studies: fixed matrices of runs, benchmarks, and measurements on accelerators."""

from gambeson.studies.bench import (
    AuditTiming,
    BenchResult,
    BenchSettings,
    bench_attacks,
    bench_audit,
    bench_training,
    bench_universal,
)
from gambeson.studies.quickstart import FirstLook, quickstart

__all__ = [
    "AuditTiming",
    "BenchResult",
    "BenchSettings",
    "FirstLook",
    "bench_attacks",
    "bench_audit",
    "bench_training",
    "bench_universal",
    "quickstart",
]

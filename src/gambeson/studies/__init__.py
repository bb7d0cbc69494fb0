"""Studies: matrices of runs with claims, and benchmarks."""

from gambeson.studies.bench import (
    AuditTiming,
    BenchResult,
    BenchSettings,
    bench_attacks,
    bench_audit,
    bench_training,
    bench_universal,
)
from gambeson.studies.claims import Claim
from gambeson.studies.exchange import export_cells, import_cells
from gambeson.studies.joining import joined
from gambeson.studies.matrix import Matrix
from gambeson.studies.planning import StudyPlan
from gambeson.studies.quickstart import FirstLook, quickstart
from gambeson.studies.rows import StudyResult, export
from gambeson.studies.run import is_study, plan_study, read_study, run_study
from gambeson.studies.study import Study
from gambeson.studies.verdicts import Verdict

__all__ = [
    "AuditTiming",
    "BenchResult",
    "BenchSettings",
    "Claim",
    "FirstLook",
    "Matrix",
    "Study",
    "StudyPlan",
    "StudyResult",
    "Verdict",
    "bench_attacks",
    "bench_audit",
    "bench_training",
    "bench_universal",
    "export",
    "export_cells",
    "import_cells",
    "is_study",
    "joined",
    "plan_study",
    "quickstart",
    "read_study",
    "run_study",
]

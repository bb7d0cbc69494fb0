from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the helpers beside this file

from report_audits import three
from report_reader import Reader, Written

from gambeson import report


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The page about three audits of grey images."""
    root = tmp_path_factory.mktemp("report")
    folders, results = three(root)
    path = report.write(folders, root / "deep" / "report.html")
    html = path.read_text()
    return Written(folders, results, path, html, Reader(html))

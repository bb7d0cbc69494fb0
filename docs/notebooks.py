"""Run the notebooks, each in a kernel of its own, and store what they show: ``python docs/notebooks.py``.

Names, such as ``red-team``, choose some of them. Needs nbclient and ipykernel, as in ``pip install -e ".[full]"``.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent / "notebooks"


def executed(file: Path) -> Any:
    """Return a notebook with the outputs of a run in an empty folder; nothing in it tells when or where."""
    notebook = nbformat.read(file, as_version=4)
    quiet = os.environ | {"PYTHONWARNINGS": "ignore:IProgress not found"}  # of tqdm, which asks for another package
    with tempfile.TemporaryDirectory() as empty:
        client = NotebookClient(
            notebook, timeout=900, kernel_name="python3", record_timing=False, resources={"metadata": {"path": empty}}
        )
        client.execute(env=quiet)
    return tidied(notebook)


def tidied(notebook: Any) -> Any:
    """Remove progress bars, and join what was printed in pieces."""
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        kept: list[Any] = []
        for output in cell.get("outputs", ()):
            if output.output_type == "stream" and kept and kept[-1].get("name") == output.name:
                kept[-1].text += output.text
            elif output.output_type != "display_data" or "image/png" in output.data:
                kept.append(output)
        if cell.cell_type == "code":
            cell.outputs = kept
    return notebook


if __name__ == "__main__":
    for one in sorted(FOLDER.glob("*.ipynb")):
        if one.stem in (sys.argv[1:] or [one.stem]):
            nbformat.write(executed(one), one)
            print(one)

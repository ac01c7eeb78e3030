"""Executes the notebooks of examples/notebooks/, and writes into them what they show.

    .venv/bin/python experiments/run_notebooks.py [NAME.ipynb ...]

Each runs from its first cell to its last in an empty folder, as a reader would run it. Logs and
progress bars are left out of the file. Needs the extra `test`.
"""

from __future__ import annotations

import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Mapping

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = pathlib.Path(__file__).parents[1] / "examples" / "notebooks"


def executed(
    path: pathlib.Path, folder: str | os.PathLike, environment: Mapping[str, str]
) -> nbformat.NotebookNode:
    """The notebook with the outputs of its cells.

    Args:
      path: of the notebook.
      folder: in which it runs.
      environment: of its process. The programs beside this Python are found by name.

    Raises:
      CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": os.fspath(folder)}},
    )
    programs = os.pathsep.join((os.path.dirname(sys.executable), environment["PATH"]))
    client.execute(env={**environment, "PATH": programs})
    return notebook


def without_logs(notebook: nbformat.NotebookNode, folder: str) -> nbformat.NotebookNode:
    """The notebook without standard errors and without the folder that it ran in."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            for output in cell.outputs:
                if "text" in output:
                    lines = re.split(r"\r?\n|\r", output.text.replace(f"{folder}/", ""))
                    output.text = "\n".join(line for line in lines if "%|" not in line)
            cell.outputs = [
                x for x in cell.outputs
                if x.get("name") != "stderr" and x.get("text", "something").strip()
            ]  # fmt: skip
    return notebook


def main(names: list[str]) -> None:
    for path in [NOTEBOOKS / name for name in names] or sorted(NOTEBOOKS.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as folder:
            notebook = without_logs(executed(path, folder, os.environ), folder)
        nbformat.write(notebook, path)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])

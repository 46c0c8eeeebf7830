"""Refresh the committed outputs: run each notebook with its defaults (smoke, phantom) and keep what a reader needs.

`make notebooks` calls it after `make reproduce`, so that finished runs are loaded and this takes seconds. Left out:
stderr (TensorFlow greets there) and whatever names this machine or the moment.
"""

import os
import pathlib
import sys

import nbformat
import papermill

HERE = pathlib.Path(__file__).parent


def refresh(name):
    """Execute `name` and replace it; the old file stays if anything fails."""
    path, fresh = HERE / f"{name}.ipynb", HERE / f".{name}.fresh.ipynb"
    try:
        papermill.execute_notebook(path, fresh, cwd=HERE, kernel_name="python3", progress_bar=False)
        notebook = nbformat.read(fresh, as_version=4)
        notebook.metadata = {key: notebook.metadata[key] for key in ("kernelspec", "language_info")}
        notebook.metadata["language_info"] = {"name": "python"}
        for cell in notebook.cells:
            cell.metadata = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
            if cell.cell_type == "code":
                cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        nbformat.write(notebook, fresh)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


if __name__ == "__main__":
    for notebook in sys.argv[1:]:
        print(notebook, flush=True)
        refresh(notebook)

"""Refresh the committed outputs: run each notebook with its defaults (smoke, phantom) and keep what a reader needs.

`make notebooks` calls it after `make reproduce`, so that finished runs are loaded and this takes seconds. Left out:
stderr (TensorFlow greets there) and whatever names this machine or the moment.
"""

import base64
import io
import os
import pathlib
import sys

import nbformat
import papermill
from PIL import Image

HERE = pathlib.Path(__file__).parent


def smaller(encoded):
    """Return `{mime type: base64}` of a PNG at most 760 pixels across: 32 colours, or JPEG if that is less."""
    image = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")
    image.thumbnail((760, 2000), Image.Resampling.LANCZOS)
    png, jpeg = io.BytesIO(), io.BytesIO()
    image.quantize(32, dither=Image.Dither.NONE).save(png, "PNG", optimize=True)
    image.save(jpeg, "JPEG", quality=50)
    mime, buffer = ("image/jpeg", jpeg) if jpeg.tell() < png.tell() else ("image/png", png)
    return {mime: base64.b64encode(buffer.getvalue()).decode()}


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
            for data in (output["data"] for output in cell.get("outputs", []) if "image/png" in output.get("data", {})):
                data.update(smaller(data.pop("image/png")))
        nbformat.write(notebook, fresh)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


if __name__ == "__main__":
    for notebook in sys.argv[1:]:
        print(notebook, flush=True)
        refresh(notebook)

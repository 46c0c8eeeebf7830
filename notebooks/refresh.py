"""Refresh the committed outputs: run each notebook with its defaults (smoke, phantom) and keep what a reader needs.

`make notebooks` calls it after `make reproduce`, so that finished runs are loaded and this takes seconds. Left out:
stderr (TensorFlow greets there), TensorFlow's warnings, and whatever names this machine or the moment.
"""

import base64
import io
import os
import pathlib
import re
import sys

import nbformat
import papermill
from PIL import Image

HERE = pathlib.Path(__file__).parent


def smaller(encoded):
    """Return `{mime type: base64}` of a PNG at most 760 pixels across: X-rays as JPEG, charts as PNG of 128 colours.

    An X-ray has a hundred shades of grey, a chart does not. The palette takes the commonest colour of each cell of 20
    levels a channel, so that a line keeps the colour that its legend names.
    """
    image = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")
    image.thumbnail((760, 2000), Image.Resampling.LANCZOS)
    colours = [colour for _, colour in sorted(image.getcolors(image.width * image.height), reverse=True)]
    buffer, cells = io.BytesIO(), {}
    if len({red for red, green, blue in colours if red == green == blue}) > 100:
        image.save(buffer, "JPEG", quality=40, optimize=True, progressive=True)
        return {"image/jpeg": base64.b64encode(buffer.getvalue()).decode()}
    for colour in colours:
        cells.setdefault(tuple(level // 20 for level in colour), colour)
    palette = Image.new("P", (1, 1))
    palette.putpalette(bytes(level for colour in list(cells.values())[:128] for level in colour))
    image.quantize(palette=palette, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return {"image/png": base64.b64encode(buffer.getvalue()).decode()}


def kept(outputs):
    """Return the outputs of a cell without stderr and without TensorFlow's warnings, which it writes to stdout too."""
    for output in outputs:
        if output.get("name") == "stdout":
            output.text = re.sub(r"^WARNING:tensorflow:.*\n?", "", output.text, flags=re.MULTILINE)
    return [output for output in outputs if output.get("name") != "stderr" and output.get("text") != ""]


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
                cell.outputs = kept(cell.outputs)
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

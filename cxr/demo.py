"""A small model of phantoms and its prediction page (`python -m cxr.demo`), or a local page for any exported model.

`python -m cxr.demo MODEL [PORT]`: drag an X-ray in, see the decision, the heatmap and the warnings. Needs Gradio
(`pip install -r requirements-demo.txt`). Nothing leaves the machine, and nothing is kept.
"""

import dataclasses
import sys
import tempfile
from pathlib import Path

import cv2

from cxr import config, deploy, models, predict, train
from cxr.sources import root

NOTE = "**Research and teaching, not diagnosis.** The colours show which places raised the score, not why."


def phantom_model():
    """Train the small network on phantoms (once), score a few of their test images; return `(model, page)` paths."""
    run = dataclasses.replace(config.start("demo"), directory=root() / "runs" / "demo")
    recipe = train.Recipe("lab_cnn", 64, 6, learning_rate=2e-3, schedule="cosine", monitor="shifted_auc")
    record = train.repeat(run, "small CNN of phantoms", recipe, models.lab_cnn, seeds=[0])[0]
    path = deploy.export(run, record, run.directory / "models")
    test = run.manifest[run.manifest["split"] == "test"]
    files = [Path(file) for file in test["path"].iloc[::max(1, len(test) // 12)]]
    network, about = deploy.load(path)
    out = run.directory / "predictions"
    return path, predict.write_page(predict.score_files(files, network, about, out), about, out)


def score(path, model, about):
    """Return `(picture, text)` of one file: RGB X-ray beside its heatmap (`None` if unreadable), and markdown."""
    with tempfile.TemporaryDirectory() as folder:
        row = predict.score_files([Path(path)], model, about, folder).iloc[0]
        if row["error"]:
            return None, f"**Not read:** {row['error']}"
        picture = cv2.imread(str(next(Path(folder, "heatmaps").glob("*.jpg"))))
    cut = about["thresholds"][about["threshold"]]
    warnings = "".join(f"\n\n⚠ {warning}" for warning in row["warnings"].split("; ") if warning)
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), (
        f"### called {row['decision']}\nscore {row['probability']:.3f}, threshold {cut:.3f}{warnings}")


def page(name):
    """Return the Gradio page of an exported model: run id, or path of its `.keras` file.

    Raises:
        ImportError: Gradio is not installed.
    """
    try:
        import gradio
    except ImportError as error:
        raise ImportError("The page needs Gradio: pip install -r requirements-demo.txt") from error
    model, about = deploy.load(name)
    phantom = " It has seen synthetic phantoms only: its scores of patients mean nothing." if about["synthetic"] else ""
    return gradio.Interface(
        lambda path: score(path, model, about) if path else (None, ""),
        gradio.File(label="X-ray: JPEG, PNG, DICOM …", type="filepath"),
        [gradio.Image(label="X-ray, and what raised its score", buttons=["fullscreen"]), gradio.Markdown()],
        title="Chest X-ray lab", description=f"{NOTE} Model {about['run_id']}, trained on {about['source']}.{phantom}",
        flagging_mode="never", analytics_enabled=False)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        try:
            shown = page(sys.argv[1])
        except (ImportError, ValueError, OSError) as error:
            sys.exit(f"cxr: {error}")
        shown.launch(server_name="127.0.0.1", server_port=int((sys.argv[2:] or ["7860"])[0]))
    else:
        trained, scored = phantom_model()
        print(f"Open {scored}\nOr drag images in: python -m cxr.demo {trained.stem}")

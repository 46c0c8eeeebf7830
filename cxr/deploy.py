"""A model to hand on: a `.keras` file, and beside it a `.json` with where it decides and which images it knows."""

import json
import pathlib
import zipfile

import keras
import numpy as np

from cxr import decode, evaluate, records, sources, train
from cxr.device import outputs
from cxr.records import save_atomic

SHORT = 12  # hexadecimal digits that tell a picture from others
SIDE = 32  # of the mean image: enough to know a chest from a hand, too little to know a patient


def best_seed(found):
    """Return, of the records of one recipe, the one to hand on: that with the highest AUC on shifted validation."""
    return max(found, key=lambda record: record["metrics"]["val_shifted"]["auc"]["value"])


def export(run, record, folder):
    """Write the model of a record and what is needed to use it into `folder`; return the path of the `.keras` file.

    Args:
        run: `records.Run` that trained it, with its images at hand.
        record: of `train.repeat`.
        folder: where `<run_id>.keras` and `<run_id>.json` go.
    """
    model, size = train.load_model(run, record), record["config"]["image_size"]
    rows = np.flatnonzero(run.manifest["split"].isin(["train", "val"]))
    images = run.images(size)[rows[::-(-len(rows) // 1000)]]
    features = outputs(features_of(model), images[..., None])
    small_images = np.stack([decode.fit(image, SIDE) for image in images]).astype("float32")
    known = {"mean": features.mean(0).round(5).tolist(), "std": features.std(0).round(5).tolist(),
             "image": small_images.mean(0).round(1).tolist()}
    distance = distance_to(features, known)
    alike = [likeness(small, known) for small in small_images]
    known |= {"largest_distance": round(float(np.quantile(distance, 0.995)), 4),
              "smallest_likeness": round(float(min(0.5, np.quantile(alike, 0.005))), 4)}
    about = {"schema": 1, "run_id": record["run_id"], "variant": record["variant"], "source": record["data"]["source"],
             "synthetic": record["data"]["synthetic"], "image_size": size, "thresholds": record["thresholds"],
             "threshold": evaluate.THRESHOLD, "temperature": record["calibration"]["temperature"],
             "ece": record["calibration"]["ece_calibrated"], "known": known,
             "decoding": decode.VERSION,  # by which the hashes that follow were made
             "seen": sorted({digest[:SHORT] for digest in run.manifest["pixel_sha256"].iloc[rows]}),
             "test": {name: record["metrics"]["test"][name] for name in
                      ("auc", *(f"{metric}@{evaluate.THRESHOLD}" for metric in ("sensitivity", "specificity", "ppv")))}}
    path = pathlib.Path(folder) / f"{record['run_id']}.keras"
    save_atomic(model.save, path)
    records.write_atomic(path.with_suffix(".json"), json.dumps(about) + "\n")
    return path


def to_onnx(path):
    """Write an exported model as ONNX beside its `.keras` file, for serving without Keras; return the new path.

    The input is float32 `(batch, size, size, 1)` in [0, 255], the output the probability `(batch, 1)`.

    Raises:
        ImportError: tf2onnx is not installed (`pip install -r requirements-onnx.txt`).
    """
    try:
        import tf2onnx  # noqa: F401  Keras calls it
    except ImportError as error:
        raise ImportError("ONNX needs tf2onnx: pip install -r requirements-onnx.txt") from error
    model, about = load(path)
    model(np.zeros((1, about["image_size"], about["image_size"], 1), "float32"))  # Keras exports what was called once
    out = pathlib.Path(path).with_suffix(".onnx")
    save_atomic(lambda temporary: model.export(temporary, format="onnx", verbose=False), out)
    return out


def load(name):
    """Return `(model, about)` of an exported model.

    Args:
        name: run id, looked up in `results/*/models` and `runs/*/models`, or the path of a `.keras` file.

    Raises:
        FileNotFoundError: no such model, or no `.json` beside it.
        ValueError: not a model of this lab, or one that would run code of its own.
    """
    path = find(name)
    if path.suffix != ".keras" or not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not a .keras file. Pickles and other formats are not loaded: they can run code.")
    beside = path.with_suffix(".json")
    if not beside.is_file():
        raise FileNotFoundError(f"{beside} is missing: it holds the operating point. Export the model again.")
    try:
        about = json.loads(beside.read_text())
        about["known"]["largest_distance"], about["thresholds"][about["threshold"]]
        model = keras.models.load_model(path, safe_mode=True, compile=False)
        model.get_layer("logit")
    except Exception as error:  # a damaged file makes Keras, zipfile and h5py raise nearly anything
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"{path} is not a model of this lab, or it would run code of its own ({reason}).") from error
    return model, about


def find(name):
    """Return the path of an exported model by its run id, or `name` itself if it is a file.

    Raises:
        FileNotFoundError: no such model.
    """
    exported = {file.stem: file.with_suffix(".keras") for top in ("runs", "results")
                for file in sorted(sources.root().glob(f"{top}/*/models/*.json"))}
    path = exported.get(str(name), pathlib.Path(name))
    if not path.is_file():
        raise FileNotFoundError(f"There is no model {name}. Give the path of a .keras file, or one of: "
                                f"{', '.join(exported) or 'none is exported yet'}.")
    return path


def features_of(model):
    """Return the network up to what its classifier reads."""
    return keras.Model(model.input, model.get_layer("logit").input)


def distance_to(features, known):
    """Return how far each row lies from the images it knows, in standard deviations a feature: float `(n,)`."""
    scale = np.maximum(known["std"], 1e-3)
    return np.sqrt((((features - np.array(known["mean"])) / scale) ** 2).mean(1))


def likeness(small, known):
    """Return the correlation of one small image with the mean image of the set, in [-1, 1]."""
    mean = np.array(known["image"])
    if small.std() < 1:
        return 0.0
    return float(np.corrcoef(small.ravel(), mean.ravel())[0, 1])

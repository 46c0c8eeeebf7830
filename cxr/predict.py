"""Score files with a trained network, each with a heatmap and warnings, or a labelled set under frozen thresholds."""

import base64
import concurrent.futures
import csv
import functools
import hashlib
import io
import json
import os
import pathlib
import zipfile

import cv2
import joblib
import numpy as np
import pandas as pd
import PIL.Image
import tqdm

from cxr import data, decode, deploy, evaluate, explain, pages, records, sources, splits, train
from cxr.device import predict

COLUMNS = ["file", "sha256", "probability", "calibrated_probability", "decision", "out_of_distribution", "warnings",
           "error"]
CHUNK = 64
DARK = 100  # grey level that the brightest place of every film of the published sets exceeds; 14 of 16 bits reach 64


def find_files(paths, out=None):
    """Return the files to score, sorted: those given, and every visible file below the folders given, links too.

    What an earlier call has written into `out` is left aside; a folder that cannot be opened stands for its files.

    Raises:
        FileNotFoundError: a path that does not exist, or nothing to score.
    """
    found, ours = [], ("heatmaps", "index.html", "predictions.csv", "run.json") if out else ()
    written = {pathlib.Path(out, name).resolve() for name in ours}
    for path in map(pathlib.Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist. Give images (JPEG, PNG, DICOM …) or folders of them.")
        inside = [path]
        if path.is_dir():
            inside = sorted(pathlib.Path(here, name) for here, names in sources.walk(path, _visible)
                            for name in (names if names is not None else [""]))
        found += [file for file in inside if path == file or not written & {file.resolve(), file.resolve().parent}]
    if not found:
        raise FileNotFoundError(f"{', '.join(map(str, paths))}: no files in there.")
    return list(dict.fromkeys(found))


def _visible(name):
    return not name.startswith(".")


def _read(file, size):
    """Return `(bytes' SHA-256, grey pixels, warnings)` of one file, or raise `ValueError` with the reason.

    It is decoded for `size` px, as the images were that the network learnt from.
    """
    content = data.read_file(file)
    if zipfile.is_zipfile(io.BytesIO(content)):
        raise ValueError("an archive: unpack it and give the folder")
    with data.memory_for(file):
        pixels, warnings = decode.decode(content, size=size), []
    if min(pixels.shape) < 16:
        raise ValueError(f"{pixels.shape[1]} x {pixels.shape[0]} pixels: too small for an X-ray")
    if content[128:132] == b"DICM":
        warnings += _dicom_warnings(content)
    else:
        with PIL.Image.open(io.BytesIO(content)) as image:
            if image.mode in ("RGB", "RGBA", "P", "CMYK", "YCbCr"):
                small = np.asarray(image.convert("RGB").resize((64, 64)), "float32")
                if np.ptp(small, axis=-1).mean() > 12:
                    warnings.append("colour picture, not a radiograph")
    if not 0.6 <= pixels.shape[1] / pixels.shape[0] <= 1.8:
        warnings.append("unusual shape: not a whole chest")
    return hashlib.sha256(content).hexdigest(), pixels, warnings


def _dicom_warnings(content):
    import pydicom

    dataset = pydicom.dcmread(io.BytesIO(content), stop_before_pixels=True)
    try:
        part, view = (str(dataset.get(name) or "").upper() for name in ("BodyPartExamined", "ViewPosition"))
    except Exception as error:  # a damaged header makes pydicom raise nearly anything
        raise ValueError(f"unreadable DICOM: {error}") from error
    return ([f"the file says {part}, not CHEST"] if part and "CHEST" not in part and "THORAX" not in part else []) + (
        [f"the file says view {view}: not frontal"] if view and view not in ("AP", "PA") else [])


def _picture_warnings(image, pixels, distance, about):
    """Return what is odd about one image that was read."""
    known, found = about["known"], []
    small = decode.fit(image, deploy.SIDE).astype("float32")
    upright, *turned = turns = [deploy.likeness(np.rot90(small, k), known) for k in range(4)]
    rotated = f"rotated by {90 * int(np.argmax(turns))} degrees?"
    if small.std() < 4:
        found.append("nearly constant image")
    elif upright >= known["smallest_likeness"]:  # upside down a chest still looks like one, only less
        found += [rotated] * (max(turned) > upright + 0.05)
    elif upright < -0.2 and -upright >= max(turns):
        found.append("inverted? dark and bright are exchanged")
    else:
        lies = max(turned) > max(known["smallest_likeness"], upright + 0.15)
        found.append(rotated if lies else "not a frontal chest X-ray")
    if small.std() >= 4 and small.max() < DARK:
        found.append("dark: does the file use fewer bits than its format says? Save it stretched to all of them")
    if min(pixels.shape) < about["image_size"]:
        found.append(f"smaller than the {about['image_size']} px it was trained on")
    if distance > known["largest_distance"] and not found:
        found.append("unlike the images it was trained on")
    return found


def score_files(files, model, about, out):
    """Score files in chunks; write `predictions.csv` after each, and a heatmap of each image; return the table.

    What is already in `out` for the same file, content and model is kept, so a killed run goes on. A file that cannot
    be used stays in the table with the reason.

    Args:
        files: list of paths.
        model, about: of `deploy.load`.
        out: folder, made where needed.

    Returns:
        DataFrame with `COLUMNS`, one row a file.
    """
    out = pathlib.Path(out)
    if not (done := _finished(out, about)):
        (out / "predictions.csv").unlink(missing_ok=True)  # of another model: never beside the name of this one
    rows = []
    with concurrent.futures.ThreadPoolExecutor(joblib.cpu_count()) as pool:
        for start in tqdm.tqdm(range(0, len(files), CHUNK), "predict", unit=f" x {CHUNK} files", delay=3):
            part = files[start:start + CHUNK]
            read = list(pool.map(functools.partial(_attempt, size=about["image_size"]), part))
            rows += _score_chunk(part, read, model, about, out, done)
            ahead = {sources.printable(file) for file in files[start + CHUNK:]} if done else ()
            later = [row for (file, _), row in done.items() if file in ahead]
            _write_table(rows + later, about, out)
    return pd.DataFrame(rows, columns=COLUMNS)


def _attempt(file, size):
    try:
        return _read(file, size)
    except (ValueError, OSError, ImportError) as error:
        return str(error)


def _score_chunk(files, found, model, about, out, done):
    rows = [dict.fromkeys(COLUMNS, "") | {"file": sources.printable(file)} for file in files]
    fresh = []
    for index, seen in enumerate(found):
        if isinstance(seen, str):
            rows[index]["error"] = seen
        elif (rows[index]["file"], seen[0]) in done:
            rows[index] = done[rows[index]["file"], seen[0]]
        else:
            fresh.append(index)
    if not fresh:
        return rows
    images = np.stack([decode.fit(found[index][1], about["image_size"]) for index in fresh])
    scores, features, heat = explain.explained(model, images)
    scores = evaluate.round_scores(scores)
    calibrated = evaluate.apply_temperature(scores, about["temperature"])
    distance = deploy.distance_to(features, about["known"])
    for place, index in enumerate(fresh):
        digest, pixels, warnings = found[index]
        warnings = warnings + _picture_warnings(images[place], pixels, distance[place], about)
        rows[index] |= {
            "sha256": digest, "probability": float(scores[place]),
            "calibrated_probability": round(float(calibrated[place]), 4),
            "decision": "pneumonia" if scores[place] >= about["thresholds"][about["threshold"]] else "normal",
            "out_of_distribution": bool(distance[place] > about["known"]["largest_distance"] or warnings),
            "warnings": "; ".join(warnings)}
        records.write_atomic(_heatmap_path(out, digest), _overlay(pixels, heat[place]))
    return rows


def _heatmap_path(out, digest):
    return out / "heatmaps" / f"{digest[:24]}.jpg"  # named by content: no name from outside becomes a path


def _overlay(pixels, heat):
    """Return a JPEG: the X-ray, and beside it the same with its map; four times as high as wide at most."""
    side = 320
    height = min(4 * side, max(1, round(side * pixels.shape[0] / pixels.shape[1])))
    grey = cv2.cvtColor(cv2.resize(pixels, (side, height), interpolation=cv2.INTER_AREA), cv2.COLOR_GRAY2BGR)
    heat = cv2.resize(heat, (side, height))[..., None]
    colour = cv2.applyColorMap(np.uint8(255 * heat), cv2.COLORMAP_INFERNO)
    mixed = grey + 0.55 * heat * (colour.astype("float32") - grey)
    return cv2.imencode(".jpg", np.hstack([grey, np.uint8(mixed)]), [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()


def _finished(out, about):
    """Return `(file, sha256)` → row of an earlier run of the same model into the same folder."""
    try:
        if json.loads((out / "run.json").read_text()) != _identity(about):
            return {}
        with open(out / "predictions.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file)
                    if row["sha256"] and _heatmap_path(out, row["sha256"]).is_file()]
        return {(row["file"], row["sha256"]): row | {"probability": float(row["probability"]),
                "calibrated_probability": float(row["calibrated_probability"]),
                "out_of_distribution": row["out_of_distribution"] == "True"} for row in rows}
    except (FileNotFoundError, ValueError, KeyError, TypeError, csv.Error):
        return {}  # nothing there, or damaged: scored again


def _identity(about):
    return {"run_id": about["run_id"], "model_sha256": records.canonical_sha256(about)}


def _write_table(rows, about, out):
    records.write_atomic(out / "run.json", json.dumps(_identity(about)))
    records.write_atomic(out / "predictions.csv", pd.DataFrame(rows, columns=COLUMNS).to_csv(index=False))


def write_page(table, about, out):
    """Write `index.html` in `out`: every file with its probability, decision, map and warnings; return its path."""
    rows = table.to_dict("records")
    for row in rows:
        row["name"] = pathlib.Path(row["file"]).name
        path = _heatmap_path(pathlib.Path(out), row["sha256"])
        row["picture"] = row["sha256"] and "data:image/jpeg;base64," + base64.b64encode(path.read_bytes()).decode()
    rows.sort(key=lambda row: (bool(row["error"]), -float(row["probability"] or 0)))
    return pages.write(
        pathlib.Path(out) / "index.html", "predict.html.j2", rows=rows, about=about,
        failed=sum(bool(row["error"]) for row in rows), flagged=sum(row["out_of_distribution"] is True for row in rows),
        called=sum(row["decision"] == "pneumonia" for row in rows), cut=about["thresholds"][about["threshold"]])


def _names(source, root=""):
    """Return what the sets of a manifest are called, and those that they were made from."""
    names = {*source.split("+"), *(pathlib.Path(folder).name for folder in root.split(os.pathsep) if folder)}
    return names | {sources.SOURCES[name]["of"] for name in names if "of" in sources.SOURCES.get(name, {})}


def external(source, model, about, out, *, cache_dir=None):
    """Score a labelled set with a model and its frozen thresholds, as a user with their own hospital's folder would.

    Args:
        source: as of `data.load_manifest`; its splits are pooled, exact copies and pictures with two labels dropped.
        model, about: of `deploy.load`.
        out: folder of `<run_id>-on-<source>.json` and its predictions.

    Returns:
        The record: metrics with intervals over patients at the thresholds that came with the model.

    Raises:
        ValueError: one class only, or what the model was trained on: a set of that name or made from it, or pictures
            of its training and validation.
    """
    manifest = data.load_manifest(source, cache_dir=cache_dir)
    labelled = manifest[manifest["label"] != ""]
    manifest = labelled[~labelled["pixel_sha256"].isin(splits.conflicts(labelled))].drop_duplicates("pixel_sha256")
    if _names(manifest.attrs["source"], manifest.attrs["root"]) & _names(about["source"]):
        raise ValueError(f"{source} is, by its name, the set that {about['run_id']} was trained on, whose record holds "
                         "its test. Give another set, or call its folder by another name.")
    seen = int(manifest["pixel_sha256"].str[:deploy.SHORT].isin(about.get("seen", ())).sum())
    if seen:
        raise ValueError(f"{source}: {about['run_id']} has learnt from {seen:,} of its {len(manifest):,} pictures. "
                         "Take them out, or give another set.")
    images = data.load_images(manifest, about["image_size"], cache_dir=cache_dir)
    table = manifest[["image_id", "patient_id"]].assign(split="test", y_true=train.labels_of(manifest),
                                                        y_score=evaluate.round_scores(predict(model, images)))
    found = evaluate.metrics_with_intervals(table["y_true"], table["y_score"], table["patient_id"], about["thresholds"])
    calibrated = evaluate.apply_temperature(table["y_score"], about["temperature"])
    name = f"{about['run_id']}-on-{manifest.attrs['source']}"
    compressed = records.predictions_csv(table)
    records.write_atomic(pathlib.Path(out) / f"{name}.csv.gz", compressed)
    record = {"schema": 1, "run_id": name, "model": about["run_id"], "trained_on": about["source"],
              "data": {"source": manifest.attrs["source"], "synthetic": bool(manifest.attrs["synthetic"]),
                       "num_images": len(table), "num_patients": int(table["patient_id"].nunique()),
                       "copies_recognised": about.get("decoding") == decode.VERSION,  # else hashes may differ
                       "dropped": len(labelled) - len(table), "ignored": manifest.attrs["ignored"],
                       "unreadable": [bad["image_id"] for bad in manifest.attrs["unreadable"]],
                       "labels": manifest["label"].value_counts().to_dict()},
              "thresholds": about["thresholds"], "environment": records.environment(),
              "metrics": evaluate.as_json(found),
              "calibration": {"temperature": about["temperature"],
                              "ece": evaluate.expected_calibration_error(table["y_true"], calibrated)},
              "predictions": {"path": f"{name}.csv.gz", "sha256": hashlib.sha256(compressed).hexdigest()}}
    records.write_atomic(pathlib.Path(out) / f"{name}.json", json.dumps(record, indent=1, allow_nan=False) + "\n")
    return record

"""Is it the lung or the scanner? Probes that change what should not matter, suspected labels.

Images are uint8 `(n, size, size)`, masks bool of the same shape. Nothing here needs Keras: a network comes in as a
function from images to scores.
"""

import time

import cv2
import numpy as np
import pandas as pd

from cxr import evaluate, records
from cxr.decode import blurred

ASPECT = 1.37  # width by height of a usual film of this set; files squeezed to a square have lost their own
SWEEPS = {"sharpness": (0, "blurred · sharpened"), "brightness": (0, "grey levels added"),
          "contrast": (1, "factor"), "JPEG quality": (100, "quality")}  # of each the usual strength, and its unit
STRONGEST = (("sharpness", -4), ("sharpness", 2), ("brightness", -60), ("brightness", 60), ("contrast", 0.5),
             ("contrast", 2), ("JPEG quality", 10))
NOT_LUNG = ("border only", "lungs erased")
MARKER = ("marker removed", "marker L", "marker R")
TOLERATED = 0.05  # fall of the AUC, and half the move of sensitivity or specificity, that a probe may cause
CHANCE = 0.65  # AUC that should not be reached without a lung


def _each(function):
    return lambda images, *_: np.stack([np.clip(np.round(function(image.astype("float32"))), 0, 255).astype("uint8")
                                        for image in images])


def _jpeg(image, quality):
    content = cv2.imencode(".jpg", image.astype("uint8"), [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return cv2.imdecode(content, cv2.IMREAD_GRAYSCALE).astype("float32")


def _unsqueezed(image):
    size, height = len(image), round(len(image) / ASPECT)
    top, small = (size - height) // 2, cv2.resize(image, (size, height), interpolation=cv2.INTER_AREA)
    return cv2.copyMakeBorder(small, top, size - height - top, 0, 0, cv2.BORDER_CONSTANT)


def _border_only(image):
    edge = round(0.12 * image.shape[0])
    inside = np.s_[edge:-edge, edge:-edge]
    out = image.copy()
    out[inside] = image[inside].mean()
    return out


def without_marker(image):
    """Return one image, float or uint8, whose side marker is filled up from what surrounds it.

    A marker is a small thing of thin strokes much brighter than their surroundings, at the side of the upper half. It
    is found by that rule alone: faint ones may stay, and the end of a clavicle may go.
    """
    size = image.shape[0]
    grey = np.clip(image, 0, 255).astype("uint8")
    around = cv2.medianBlur(grey, 2 * (size // 12) + 1)
    thin = cv2.morphologyEx(grey, cv2.MORPH_TOPHAT, np.ones((max(3, size // 16),) * 2, "uint8"))
    bright = np.uint8(thin > 30)
    bright[size // 2:], bright[:, round(0.15 * size):round(0.85 * size)] = 0, 0
    count, labelled, boxes, _ = cv2.connectedComponentsWithStats(bright)
    small = [one for one in range(1, count) if max(boxes[one, 2:4]) <= 0.13 * size]
    found = cv2.dilate(np.uint8(np.isin(labelled, small)), np.ones((2 * max(1, size // 48) + 1,) * 2, "uint8"))
    return np.where(found > 0, around, grey).astype(image.dtype)


def with_marker(image, letter):
    """Return one image with the side marker `R` (image's left) or `L` (image's right) in place of its own."""
    size, out = image.shape[0], without_marker(image)
    stamp = np.zeros((256, 256), "uint8")
    at = (int((0.035 if letter == "R" else 0.915) * 256), int(0.2 * 256))
    cv2.putText(stamp, letter, at, cv2.FONT_HERSHEY_SIMPLEX, 0.76, 240, 2, cv2.LINE_AA)
    return np.maximum(out, cv2.resize(stamp, (size, size), interpolation=cv2.INTER_AREA).astype(out.dtype))


def _fill(images, masks, erase):
    """Paint what is in the lungs (`erase`), or all but them, with the mean of the rest of the image."""
    out = np.array(images)
    for image, mask in zip(out, masks, strict=True):
        wide = cv2.dilate(np.uint8(mask), np.ones((max(3, len(mask) // 24),) * 2, "uint8")) > 0
        hidden = wide if erase else ~wide
        image[hidden] = round(float(image[~hidden].mean()))
    return out


# (family, strength) -> function of images and lung masks. A strength of 0 (1 for contrast) is the image as it is.
PROBES = {
    **{("sharpness", -sigma): _each(lambda x, s=sigma: blurred(x, s / 224)) for sigma in (4, 2, 1, 0.5)},
    **{("sharpness", amount): _each(lambda x, a=amount: x + a * (x - blurred(x, 1.5 / 224))) for amount in (1, 2)},
    **{("brightness", shift): _each(lambda x, s=shift: x + s) for shift in (-60, -30, 30, 60)},
    **{("contrast", factor): _each(lambda x, f=factor: x.mean() + f * (x - x.mean()))
       for factor in (0.5, 0.75, 1.5, 2)},
    **{("JPEG quality", quality): _each(lambda x, q=quality: _jpeg(x, q)) for quality in (75, 50, 25, 10)},
    ("native aspect", 1): _each(_unsqueezed),
    ("marker removed", 1): _each(without_marker),
    ("marker L", 1): _each(lambda x: with_marker(x, "L")),
    ("marker R", 1): _each(lambda x: with_marker(x, "R")),
    ("border only", 1): _each(_border_only),
    ("lungs erased", 1): lambda images, masks: _fill(images, masks, True),
    ("lungs only", 1): lambda images, masks: _fill(images, masks, False),
}


def probe(run, record, score, images, *, lungs, threshold):
    """Score the images of a finished run under every probe, or load what is finished; return the record of that.

    The record's own splits and numbers are those of the run that is probed. Each probe adds rows of a split of its name
    to the predictions, and an entry to `probes`.

    Args:
        run: `records.Run` that holds `record`.
        record: of the run whose network is probed.
        score: function from images to probabilities, float `(n,)`; called only where there is no record yet.
        images: uint8 `(n, size, size)` in the manifest's order.
        lungs: bool masks `(n, size, size)` of all images, as of `lungs.fields`; `None` leaves out the probes of lungs.
        threshold: name of the frozen threshold to follow, such as `sensitivity_95_shifted`.
    """
    able = {key: change for key, change in PROBES.items() if lungs is not None or not key[0].startswith("lungs")}
    config = record["config"] | {"probed": record["run_id"], "probes": sorted(map(name_of, able))}
    if threshold != evaluate.THRESHOLD:  # the usual one is not named: so were the first records made
        config["threshold"] = threshold
    if found := run.load(run.run_id(record["variant"], config, record["seed"])):
        return found
    start, manifest = time.monotonic(), run.manifest.reset_index(drop=True)
    frame = run.predictions(record)
    rows = np.flatnonzero(manifest["split"] == "test")
    original, parts = frame[frame["split"] == "test"].set_index("image_id")[["patient_id", "y_true"]], [frame]
    table = original.loc[manifest["image_id"].iloc[rows]].reset_index()
    for key, change in able.items():
        changed = change(images[rows], None if lungs is None else lungs[rows])
        parts.append(table.assign(split=name_of(key), y_score=score(changed)))
    frame = pd.concat(parts, ignore_index=True).assign(y_score=lambda t: evaluate.round_scores(t["y_score"]))
    cut = record["thresholds"][threshold]
    return run.save(record["variant"], config, record["seed"], frame, threshold=threshold,
                    probes=measure(frame, cut), seconds={"predict": round(time.monotonic() - start, 2)})


def saved(run, notebooks):
    """Return the best configuration of each notebook whose networks are on this machine: dict label -> its records.

    Best is the highest mean AUC on the shifted validation images; the best of all stands first.

    Args:
        run: `records.Run`.
        notebooks: numbers of the notebooks to look at, such as `02`.
    """
    groups, best, same = {}, {}, records.fingerprint(run.manifest)["manifest_sha256"]
    for record in run.records():
        on_disk = (run.directory / "models" / f"{record['run_id']}.keras").is_file()
        usable = record["data"]["manifest_sha256"] == same and "val_shifted" in record["metrics"]
        usable &= record["config"].get("augment") != "class_brightness"  # its validation images carry the label
        if record["notebook"][:2] in notebooks and record["purpose"] == "classify" and on_disk and usable:
            groups.setdefault(record["run_id"].rsplit("-s", 1)[0], []).append(record)
    for found in groups.values():
        worth = np.mean([record["metrics"]["val_shifted"]["auc"]["value"] for record in found])
        best[found[0]["notebook"]] = max(best.get(found[0]["notebook"], (-1, [])), (worth, found), key=lambda x: x[0])
    ranked = sorted(best.values(), key=lambda pair: -pair[0])
    return {f"{found[0]['notebook'][:2]} {found[0]['variant']}": sorted(found, key=lambda record: record["seed"])
            for _, found in ranked}


def name_of(key):
    """Return the name of a probe as a split: `probe:sharpness:-2`."""
    return f"probe:{key[0]}:{key[1]:g}"


def measure(frame, cut, *, num_resamples=1000):
    """Return what each probe does: dict probe -> `auc, sensitivity, specificity` (value, low, high, n) and `unchanged`.

    Args:
        frame: predictions with the splits of `probe`.
        cut: frozen threshold.
        num_resamples: of patients, for the intervals.

    Returns:
        As above, JSON-able; `unchanged` holds the three numbers of the same images without the change.
    """
    plain = frame[frame["split"] == "test"].set_index("image_id")["y_score"]
    found = {}
    for split in dict.fromkeys(frame.loc[frame["split"].str.startswith("probe:"), "split"]):
        rows = frame[frame["split"] == split]
        truth, cuts = rows["y_true"], {"frozen": cut}
        seen = evaluate.as_json(evaluate.metrics_with_intervals(truth, rows["y_score"], rows["patient_id"], cuts,
                                                                num_resamples=num_resamples))
        before = evaluate.metrics(truth, plain.loc[rows["image_id"]], cuts)
        names = {"auc": "auc", "sensitivity": "sensitivity@frozen", "specificity": "specificity@frozen"}
        found[split.removeprefix("probe:")] = {name: seen[key] for name, key in names.items()} | {
            "unchanged": {name: before[key] for name, key in names.items()}}
    return found


def findings(probes):
    """Return what the probes hold against a model: dict probe -> reason, empty for one that looks at lungs alone.

    A model cheats if it still tells the classes apart without a lung, or if the side marker moves its decisions.
    """
    reasons = {}
    for name in NOT_LUNG:
        if (found := probes.get(f"{name}:1")) and found["auc"]["low"] > CHANCE:
            reasons[name] = f"AUC {found['auc']['value']:.2f} without the lungs"
    for name in MARKER:
        if found := probes.get(f"{name}:1"):
            fall, move = moved(found)
            if fall > TOLERATED or move > 2 * TOLERATED:
                reasons[name] = f"AUC falls by {fall:.2f}, decisions move by {move:.2f}"
    return reasons


def moved(found):
    """Return `(fall, move)` of one probe: of the AUC, and the larger of those of sensitivity and specificity."""
    before = found["unchanged"]
    return before["auc"] - found["auc"]["value"], max(
        abs(before[name] - found[name]["value"]) for name in ("sensitivity", "specificity"))


def suspected_labels(frame):
    """Return the images whose label a model denies: the off-diagonal of the confident joint, surest first.

    An image labelled i counts as j if the model gives j at least the mean probability that it gives images labelled j.

    Args:
        frame: predictions of images that the model has not learnt from.

    Returns:
        The rows of `frame` that are suspected, with `margin`: how far past its threshold each lies.

    Source: Northcutt et al. 2021 (confident learning).
    """
    truth, score = frame["y_true"].to_numpy() == 1, frame["y_score"].to_numpy()
    sick, well = score[truth].mean(), (1 - score[~truth]).mean()
    margin = np.where(truth, (1 - score) - well, score - sick)
    other = np.where(truth, score >= sick, (1 - score) >= well)  # confident in both: it counts as what is likelier
    suspected = (margin >= 0) & ~(other & ((score >= 0.5) == truth))
    return frame.assign(margin=margin)[suspected].sort_values("margin", ascending=False)

"""Anomaly detection from normals alone: error maps, painted opacities, distances between features.

Scores are float `(n,)`, higher = more abnormal. That direction is checked on validation normals with painted opacities
(`opacities`), never on test. Images are uint8 `(n, size, size)`, maps float32 of the same shape, 0 at least.
"""

import functools
import shutil
import time

import cv2
import keras
import numpy as np
import pandas as pd
from scipy import stats
from sklearn import covariance, metrics, neighbors

from cxr import evaluate, explain, records
from cxr.decode import blurred
from cxr.device import start_fresh
from cxr.records import save_atomic
from cxr.train import labels_of

_around = functools.partial(blurred, share=1 / 24)  # local means


def error_map(images, rebuilt, kind="absolute"):
    """Return where the rebuilt images differ: float32 maps.

    Args:
        kind: `absolute` and `squared` differences of pixels; `structure` (1 − SSIM, halved: local mean, contrast and
            pattern; Wang et al. 2004); `local` (absolute difference after dividing each image by its local contrast,
            which takes away that a sharp image is harder to rebuild).
    """
    x, y = images.astype("float32"), np.asarray(rebuilt, "float32")
    x /= 255
    if kind in ("absolute", "squared"):  # in place: fresh memory would cost more than the arithmetic
        x -= y
        return {"absolute": np.abs, "squared": np.square}[kind](x, out=x)
    function = {"structure": _dissimilarity, "local": _local_difference}[kind]
    return np.stack([function(*pair) for pair in zip(x, y, strict=True)])


def _dissimilarity(x, y):
    mean_x, mean_y = _around(x), _around(y)
    var_x, var_y, both = _around(x * x) - mean_x**2, _around(y * y) - mean_y**2, _around(x * y) - mean_x * mean_y
    similarity = ((2 * mean_x * mean_y + 1e-4) * (2 * both + 9e-4)
                  / ((mean_x**2 + mean_y**2 + 1e-4) * (var_x + var_y + 9e-4)))
    return np.clip((1 - similarity) / 2, 0, 1)


def _local_difference(x, y):
    def normalised(image):
        mean = _around(image)
        return (image - mean) / np.sqrt(np.maximum(_around((image - mean) ** 2), 0) + 1e-3)

    return np.abs(normalised(x) - normalised(y))


def smooth(maps, share=1 / 32):
    """Return maps blurred by a Gaussian of `share` of the side, for looking at and for scoring pixels."""
    return np.stack([blurred(one, share) for one in maps])


def highest(maps, share=0.05):
    """Return the mean of the highest `share` of each map: the score of an image by its worst place, float `(n,)`."""
    flat = np.sort(maps.reshape(len(maps), -1), axis=1)
    return flat[:, -max(1, round(share * flat.shape[1])):].mean(1)


def opacities(images, *, seed, lungs=None, haze=1 / 3):
    """Paint soft opacities on normal images, as pneumonia might look: focal, patchy, or a haze over all of the lungs.

    They dull what they hide and reach over the lungs' border, which is then lost (the silhouette sign).

    Args:
        images: uint8 `(n, size, size)`.
        seed: int; the same seed paints the same.
        lungs: bool masks `(n, size, size)` to paint in; without them two ellipses where lungs usually lie.
        haze: share of images with a haze; a network that is to outline places is better off without.

    Returns:
        `(painted, masks)`: uint8 images, and bool masks of where more than a trace was painted.
    """
    rng, size = np.random.default_rng(seed), images.shape[1]
    painted, masks = np.empty_like(images), np.zeros(images.shape, bool)
    usual = usual_lungs(size)
    for index, image in enumerate(images):
        known = lungs is not None and lungs[index].any()
        field = np.minimum(2 * blurred(lungs[index].astype("float32"), 1 / 32), 1) if known else usual
        weight = _haze(rng, field, size) if rng.random() < haze else _opacity(rng, field, size)
        x = image.astype("float32")
        bright = np.percentile(x, 90) * rng.uniform(0.75, 1.0)
        dull = blurred(x, rng.uniform(0.015, 0.05))  # behind consolidation vessels and edges are lost
        x = x + weight * (0.65 * (np.maximum(bright, dull) - x) + 0.35 * (dull - x))
        x += weight * cv2.resize(rng.normal(0, 1, (size // 4, size // 4)).astype("float32"), (size, size)) * 6
        painted[index], masks[index] = np.clip(np.round(x), 0, 255), weight > 0.15
    return painted, masks


def usual_lungs(size):
    """Return how surely each pixel lies in a lung of a chest film as they are usually taken, float `(size, size)`."""
    y, x = np.mgrid[:size, :size] / size
    sides = [((x - centre) / 0.15) ** 2 + ((y - 0.48) / 0.3) ** 2 for centre in (0.29, 0.71)]
    return 1 / (1 + np.exp(8 * (np.minimum(*sides) - 1))).astype("float32")


def _haze(rng, field, size):
    """Return the weight of a haze that fills `field`, somewhat uneven."""
    cloud = cv2.resize(rng.normal(0, 1, (4, 4)).astype("float32"), (size, size), interpolation=cv2.INTER_CUBIC)
    return np.clip(field * rng.uniform(0.2, 0.8) * np.clip(0.85 + 0.25 * cloud, 0.2, 1.2), 0, 1).astype("float32")


def _opacity(rng, field, size):
    """Return the weight of one opacity, float `(size, size)` in [0, 1]: blobs or a cloud, inside `field`."""
    noise = sum(strength * cv2.resize(rng.normal(0, 1, (cells, cells)).astype("float32"), (size, size),
                                      interpolation=cv2.INTER_CUBIC)
                for cells, strength in ((4, 1), (8, 0.6), (16, 0.35)))
    if rng.random() < 0.5:  # focal: one or two places
        inside = np.argwhere(field > (0.5 if field.max() > 0.5 else 0))  # lungs of a few pixels are blurred to less
        y, x = np.mgrid[:size, :size]
        blob = np.zeros((size, size), "float32")
        for _ in range(rng.integers(1, 3)):
            row, column = inside[rng.integers(len(inside))]
            wide, high = rng.uniform(0.06, 0.16, 2) * size
            distance = np.sqrt(((x - column) / wide) ** 2 + ((y - row) / high) ** 2)
            blob = np.maximum(blob, 1 / (1 + np.exp(4 * (distance - 1 - 0.25 * noise))))
    else:  # patchy or diffuse
        blob = 1 / (1 + np.exp(-rng.uniform(1.5, 4) * (noise - rng.uniform(-1.2, 0.4))))
    return (blob * field * rng.uniform(0.35, 0.95)).astype("float32")


def mahalanobis(normal_features, features):
    """Return the Mahalanobis distance of each row to the normals, with a shrunk covariance (Ledoit and Wolf 2004)."""
    return np.sqrt(covariance.LedoitWolf().fit(normal_features).mahalanobis(features))


def nearest_normals(normal_features, features, k=5):
    """Return the mean distance of each row to its `k` nearest normals, after standardising each feature."""
    mean, scale = normal_features.mean(0), normal_features.std(0) + 1e-6
    found = neighbors.NearestNeighbors(n_neighbors=min(k, len(normal_features))).fit((normal_features - mean) / scale)
    return found.kneighbors((features - mean) / scale)[0].mean(1)


def auc_within(y_true, score, blur, num_bins=5):
    """Return the AUC over those pairs of a normal and an abnormal image whose blur lies in the same quantile bin.

    Args:
        y_true: 0/1 int `(n,)`.
        score, blur: float `(n,)`.
    """
    bins = np.searchsorted(np.quantile(blur, np.linspace(0, 1, num_bins + 1)[1:-1]), blur)
    won = pairs = 0
    for rows in (bins == number for number in range(num_bins)):
        sick, count = np.sum(np.asarray(y_true)[rows]), np.sum(rows)
        if 0 < sick < count:
            won += metrics.roc_auc_score(np.asarray(y_true)[rows], np.asarray(score)[rows]) * sick * (count - sick)
            pairs += sick * (count - sick)
    return won / pairs if pairs else np.nan


def trained(run, name, seed, build, fit):
    """Return a model of this run: loaded where it was trained before on the same data, else built, trained and saved.

    Args:
        run: `records.Run`.
        name: of the file, unique within the notebook; sizes and epochs belong into it.
        seed: of its weights.
        build: function `() -> keras.Model`.
        fit: function `(model, folder) -> history`; `folder` is for a backup, and goes once the model is saved.
    """
    data = records.fingerprint(run.manifest)
    code = [records.code_sha256()] if run.profile.strict else []
    key = records.canonical_sha256([data["manifest_sha256"], data["split_sha256"], *code])[:8]
    stem = f"{run.notebook}-{name}-s{seed}-{key}"
    path, folder = run.directory / "models" / f"{stem}.keras", run.directory / "cache" / "backup" / stem
    with records.alone(run.directory / "cache" / "locks" / stem):
        if path.is_file():
            return keras.models.load_model(path, safe_mode=True, compile=False)
        start_fresh(seed)
        model = build()
        fit(model, folder)
        save_atomic(model.save, path)
        shutil.rmtree(folder, ignore_errors=True)
    return model


def score(run, variant, config, make_score, images, painted, *, seeds=None):
    """Score validation normals, painted ones and the test images once a seed, or load what is finished.

    Real pneumonias of validation are left out: nothing of an anomaly detector may be chosen on them.

    Args:
        run: `records.Run`.
        variant: what a reader calls this method.
        config: JSON-able dict that decides the result.
        make_score: function `seed -> (function images -> scores)`.
        images: uint8 `(n, size, size)` in the manifest's order.
        painted: uint8, `opacities` on the validation normals in the manifest's order.
        seeds: list of int, where they are not `run.seeds`.

    Returns:
        Records with purpose `anomaly`. Their `val` AUC is that of painted against plain normals.

    Raises:
        ValueError: validation holds no normal images.
    """
    split, labels = run.manifest["split"], labels_of(run.manifest)
    rows = {"val": np.flatnonzero((split == "val") & (labels == 0)),
            "test": np.flatnonzero(split.isin(["test", "test_duplicate"]))}
    if not len(rows["val"]):
        raise ValueError("Validation holds no normal images, which the threshold is taken from: "
                         "check the NORMAL folder and the split.")

    def one(seed):
        start = time.monotonic()
        to_score = make_score(seed)
        ready = time.monotonic()
        parts = [run.manifest.iloc[index][["image_id", "patient_id", "split"]].assign(
            y_true=labels[index], y_score=to_score(images[index])) for index in rows.values()]
        parts.append(parts[0].assign(image_id=parts[0]["image_id"] + "#painted", y_true=1, y_score=to_score(painted)))
        return run.save(variant, config, seed, pd.concat(parts, ignore_index=True), purpose="anomaly",
                        seconds={"train": round(ready - start, 2), "predict": round(time.monotonic() - ready, 2)})

    seeds = run.seeds if seeds is None else seeds
    return [run.load(run.run_id(variant, config, seed)) or one(seed) for seed in seeds]


def conformal_threshold(normal_scores, false_alarms=0.05):
    """Return the score above which a new normal image lies with at most this probability, however scores are spread.

    Infinite where there are too few normals for the promise. Source: Vovk et al. 2005 (split conformal).
    """
    ordered = np.sort(evaluate.round_scores(normal_scores))
    place = int(np.ceil((len(ordered) + 1) * (1 - false_alarms)))
    return float(np.nextafter(ordered[place - 1], np.inf)) if place <= len(ordered) else np.inf


def extreme_value_threshold(normal_scores, false_alarms=0.05, tail=0.2):
    """Return the same from a generalised Pareto distribution of the upper `tail` of normal scores (Coles 2001).

    With fewer than ten scores in that tail there is nothing to fit, and the conformal threshold is returned.
    """
    scores = evaluate.round_scores(normal_scores)
    start = np.quantile(scores, 1 - tail) if len(scores) else np.inf
    above = scores[scores > start] - start
    if len(above) < 10:
        return conformal_threshold(scores, false_alarms)
    shape, _, scale = stats.genpareto.fit(above, floc=0)
    return float(start + stats.genpareto.ppf(1 - false_alarms / tail, shape, scale=scale))


def pixel_scores(maps, masks):
    """Return how well maps find the masked pixels: dict `auroc`, `aupro` (up to 30 % false positives), `pointing`.

    A map that says nothing has 0.5 and 0.15.

    Args:
        maps: float `(n, size, size)` on one scale for all images.
        masks: bool, the same shape; AUPRO weighs each connected region alike (Bergmann et al. 2020).
    """
    auroc, clear = metrics.roc_auc_score(masks.ravel(), maps.ravel()), np.sort(maps[~masks])
    cuts = np.unique([*np.quantile(clear, np.linspace(0.7, 1, 61)), np.nextafter(clear[-1], np.inf)])[::-1]
    false = 1 - np.searchsorted(clear, cuts) / len(clear)  # where many pixels tie, not what the quantile says
    regions = [(one, labelled == number) for one, mask in zip(maps, masks, strict=True) if mask.any()
               for count, labelled in [cv2.connectedComponents(mask.astype("uint8"))] for number in range(1, count)]
    overlap = np.array([np.mean([(one[region] >= cut).mean() for one, region in regions]) for cut in cuts])
    grid = np.linspace(0, 0.3, 61)
    aupro = np.trapezoid(np.interp(grid, false, overlap), grid) / 0.3
    pointing = np.mean([explain.pointing(*pair) for pair in zip(maps, masks, strict=True) if pair[1].any()])
    return {"auroc": float(auroc), "aupro": float(aupro), "pointing": float(pointing)}

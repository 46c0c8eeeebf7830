"""Lung fields: outlined by hand for a part of the images, by a small U-Net for the rest."""

import dataclasses
import hashlib
import os
import pathlib

import cv2
import numpy as np

from cxr import anomaly, augment, autoencoder, data, decode, phantom, splits


def _outlines(manifest):
    """Return `(row, file)` of each image that has been outlined by hand."""
    roots = manifest.attrs["root"].split(os.pathsep)
    inside = manifest["image_id"].str.partition("/")[2] if len(roots) > 1 else manifest["image_id"]  # without the set
    folders = dict.fromkeys(pathlib.Path(root).parent / "lung_masks" for root in roots)
    return [(row, path) for row, image in enumerate(inside) for folder in folders
            if (path := folder / pathlib.Path(image).with_suffix(".png")).is_file()]


def are_outlined(manifest):
    """Return whether any image of a manifest has known lung fields."""
    return bool(manifest.attrs["synthetic"] or _outlines(manifest))


def outlined(manifest, size):
    """Return which images have hand-drawn lung fields, and the fields.

    A phantom's are exact. Of real images they lie in `lung_masks` beside the folder of the set, under the image's own
    path in the set with the suffix `.png`, 255 where lung is.

    Args:
        manifest: of `data.load_manifest`.
        size: side of the square masks in pixels.

    Returns:
        int `(m,)`, rows of the manifest, and bool `(m, size, size)`.

    Raises:
        FileNotFoundError: the set has no outlined images.
    """
    if manifest.attrs["synthetic"]:
        return np.arange(len(manifest)), phantom.masks(manifest, size)[0]
    if not (found := _outlines(manifest)):
        raise FileNotFoundError(f"No lung fields beside {manifest.attrs['root']}. Expected lung_masks/train/NORMAL/"
                                "NAME.png and the like there, 255 = lung (docs/your-data.md).")
    masks = [decode.fit(decode.decode(path.read_bytes()), size) > 127 for _, path in found]
    return np.array([row for row, _ in found]), np.stack(masks)


def network(run, size, epochs, seed=0, *, normals_only=False):
    """Return an `autoencoder.segmenter` of lung fields, trained on the outlined images of train (once, then loaded).

    Where no image of the run is outlined it learns from the default phantom, whose lungs are known, and says so.

    Args:
        run: `records.Run`.
        size: side in pixels, a multiple of 8.
        epochs, seed: of its training.
        normals_only: learn from normal images alone, as an anomaly detector must.
    """
    if not are_outlined(run.manifest):
        print("No film of this set has outlined lungs: the network of lung fields learns from phantoms.")
        run = dataclasses.replace(run, manifest=splits.assign(data.load_manifest("phantom", cache_dir=run.cache)))
    rows, masks = outlined(run.manifest, size)
    some = run.manifest.iloc[rows]
    known = ((some["split"] == "train") & (~np.bool_(normals_only) | (some["label"] == "NORMAL"))).to_numpy()
    shared = dataclasses.replace(run, notebook="lungs")  # every notebook loads the same
    learnt = hashlib.sha256(masks[known].tobytes()).hexdigest()[:8]  # outlines may be added, or mended
    return anomaly.trained(shared, f"{size}-{epochs}{'-normals' * normals_only}-{learnt}", seed,
                           lambda: autoencoder.segmenter(size, augment.exposure_and_sharpness()),
                           lambda model, _: autoencoder.fit(model, run.images(size)[rows[known]], masks[known],
                                                            epochs=epochs, seed=seed))


def agreement(run, probability):
    """Return the Dice score of each outlined image of validation, whose patients no `network` has seen: float `(m,)`.

    Args:
        run: `records.Run`.
        probability: float `(n, size, size)` of all images of the run, from a `network`.
    """
    rows, masks = outlined(run.manifest, probability.shape[1])
    held_out = (run.manifest["split"].iloc[rows] == "val").to_numpy()
    return dice(probability[rows[held_out]] > 0.5, masks[held_out])


def silhouette(images, probability):
    """Return how clearly the lungs stand out: float `(n, 2)`, contrast across their border, and the network's doubt.

    Consolidated lung is as dense as what it touches, so that borders are lost: radiology's silhouette sign (Felson and
    Felson 1950). Contrast is the mean grey level of a ring around the lung fields less that inside them, in units of
    the image's range between its 2nd and 98th percentile; doubt is the mean of `p (1 - p)`.

    Args:
        images: uint8 `(n, size, size)`.
        probability: float, the same shape, of a `network`.
    """
    size = images.shape[1]
    kernel, usual = np.ones((2 * (size // 32) + 1,) * 2, np.uint8), anomaly.usual_lungs(size) > 0.5
    found = np.empty((len(images), 2))
    for index, (image, p) in enumerate(zip(images.astype("float32"), probability, strict=True)):
        low, high = np.percentile(image, (2, 98))
        field = p > 0.5
        if not 0.005 < field.mean() < 0.9:  # no lung, or nothing else: look where lungs usually lie
            field = usual
        ring = (cv2.dilate(field.astype(np.uint8), kernel) > 0) & ~field
        found[index] = (image[ring].mean() - image[field].mean()) / max(high - low, 1), (p * (1 - p)).mean()
    return found


def dice(found, true):
    """Return the Dice score of each pair of bool masks `(n, size, size)`: float `(n,)`, 1 where both are empty."""
    both, total = (found & true).sum((1, 2)), found.sum((1, 2)) + true.sum((1, 2))
    return np.divide(2 * both, total, out=np.ones(len(total)), where=total > 0)


def mass_inside(maps, fields):
    """Return which share of each map lies in the lung fields, float `(n,)`; NaN where a map is empty.

    Args:
        maps: float `(n, size, size)`, 0 at least.
        fields: bool, the same shape.
    """
    total = maps.sum((1, 2))
    return np.divide((maps * fields).sum((1, 2)), total, out=np.full(len(total), np.nan), where=total > 0)


def within(maps, probability):
    """Return maps weighted by how surely each pixel lies in a lung: there an opacity is looked for.

    Where consolidation hides a lung from the network, the place where lungs usually lie counts.

    Args:
        maps: float `(n, size, size)`, 0 at least.
        probability: float, the same shape, of a `network`.
    """
    return maps * np.maximum(probability, anomaly.usual_lungs(maps.shape[1]))


def fields(run, size, *, epochs=20):
    """Return the lung fields of all images of a run, bool `(n, size, size)`: exact of phantoms, else by `network`."""
    if run.synthetic:
        return outlined(run.manifest, size)[1]
    found = autoencoder.apply(network(run, 64, epochs), run.images(64))
    return np.stack([decode.fit(np.uint8(255 * one), size) > 127 for one in found])

"""Lung fields: outlined by hand for a part of the images, by a small U-Net for the rest."""

import os
import pathlib

import numpy as np

from cxr import anomaly, augment, autoencoder, decode, phantom


def outlined(manifest, size):
    """Return which images have hand-drawn lung fields, and the fields.

    A phantom's are exact. Of real images they lie in `lung_masks` beside the folder of the set, under the image's own
    relative path with the suffix `.png`, 255 where lung is.

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
    folders = [pathlib.Path(root).parent / "lung_masks" for root in manifest.attrs["root"].split(os.pathsep)]
    found = [(row, path) for row, image in enumerate(manifest["image_id"]) for folder in folders
             if (path := folder / pathlib.Path(image).with_suffix(".png")).is_file()]
    if not found:
        raise FileNotFoundError(f"No lung fields in {', '.join(map(str, folders))}. Expected train/NORMAL/NAME.png and "
                                "the like, 255 = lung; leave the lung fields out, or get them (data/README.md).")
    masks = [decode.fit(decode.decode(path.read_bytes()), size) > 127 for _, path in found]
    return np.array([row for row, _ in found]), np.stack(masks)


def segment(run, size, epochs, seed=0):
    """Return the lung fields of all images of a run, bool `(n, size, size)`, and the Dice score of each checked one.

    A `autoencoder.segmenter` learns from the outlined images of train and is checked on those of validation, whose
    patients it has not seen; the test images have no outlines.

    Args:
        run: `records.Run`.
        size: side in pixels, a multiple of 8.
        epochs, seed: of its training.
    """
    images, (rows, masks) = run.images(size), outlined(run.manifest, size)
    split = run.manifest["split"].to_numpy()[rows]
    known, held_out = split == "train", split == "val"
    model = anomaly.trained(run, f"lungs-{size}-{epochs}", seed,
                            lambda: autoencoder.segmenter(size, augment.exposure_and_sharpness()),
                            lambda model: autoencoder.fit(model, images[rows[known]], masks[known], epochs=epochs,
                                                          seed=seed))
    fields = autoencoder.apply(model, images) > 0.5
    return fields, dice(fields[rows[held_out]], masks[held_out])


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


def fields(run, size, *, epochs=20):
    """Return the lung fields of all images of a run, bool `(n, size, size)`: exact of phantoms, else by `segment`."""
    if run.synthetic:
        return outlined(run.manifest, size)[1]
    found, _ = segment(run, 64, epochs)
    return np.stack([decode.fit(np.uint8(255 * one), size) > 127 for one in found])

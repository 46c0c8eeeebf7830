"""Tables and pages are made only from records that hold, and say what may be said."""

import pathlib

import numpy as np
import pandas as pd

from cxr import config, records


def manifest(n=150, synthetic=True, source="phantom"):
    """A split manifest, as far as records read it."""
    rng, parts = np.random.default_rng(0), []
    for split in ("train", "val", "test", "test_duplicate"):
        size = 5 if split == "test_duplicate" else n
        parts.append(pd.DataFrame({
            "image_id": [f"{split}/{k:04d}.png" for k in range(size)], "sha256": [f"{split}{k}" for k in range(size)],
            "patient_id": rng.integers(2 * n // 3, size=size).astype(str), "split": split,
            "label": np.where(np.arange(size) % 5 < 2, "NORMAL", "PNEUMONIA")}))
    table = pd.concat(parts, ignore_index=True)
    table.attrs = {"source": source, "synthetic": synthetic, "unreadable": []}
    return table


def scores(table, strength, seed, shift=0.5, purpose="classify", shifted=True):
    """A predictions table of a model of given strength: seeds share most of their errors, the test set is harder."""
    rows = table[table["split"] != "train"].assign(y_true=lambda t: (t["label"] != "NORMAL").astype(int))
    if shifted and purpose == "classify":
        more = rows[rows["split"] == "val"]
        rows = pd.concat([rows, more.assign(split="val_shifted", image_id=more["image_id"] + "#0")])
    common, own = (np.random.default_rng(s).normal(size=len(rows)) for s in (7, [int(100 * strength) + 1000, seed]))
    easier = np.where(rows["split"] == "val", 1.0, 0.0)
    logit = (strength + easier) * (2 * rows["y_true"] - 1) + shift + 1.6 * common + 0.6 * own
    return rows.assign(y_score=1 / (1 + np.exp(-logit)) if purpose == "classify" else 40 + 5 * logit)


def fake_run(directory, notebook, data=None, seeds=(0, 1, 2)):
    """A run as a notebook opens it."""
    data = manifest() if data is None else data
    folder = pathlib.Path(directory)
    return records.Run(notebook=notebook, profile=config.PROFILES["smoke"], directory=folder, cache=folder,
                       official=data, manifest=data, seeds=list(seeds))


def add(run, variant, strength, *, purpose="classify", split="patient", shift=0.5, **extra):
    """Write the records of one variant, one for each seed of the run."""
    for seed in run.seeds:
        table = scores(run.manifest, strength, seed, shift, purpose)
        run.save(variant, {"split": split, "strength": strength}, seed, table, purpose=purpose, **extra)


def add_baselines(run):
    """Write the three trivial baselines."""
    table = scores(run.manifest, 0.6, 0, purpose="baseline")
    for variant, y_score in (("always pneumonia", 1.0), ("blur score", table["y_score"]),
                             ("mean grey level", table["y_score"].to_numpy()[::-1])):
        run.save(variant, {"split": "patient"}, 0, table.assign(y_score=y_score), purpose="baseline")

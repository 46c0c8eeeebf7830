"""Train one recipe over seeds, or load what is finished: each run ends in a record with its predictions."""

import functools
import shutil
import time

import keras
import numpy as np
import pandas as pd

from cxr import augment, engine, transfer
from cxr.backup import state_of
from cxr.device import on_cpu, predict, start_fresh
from cxr.fitting import Recipe, fit
from cxr.records import save_atomic

__all__ = ["Recipe", "fit", "labels_of", "load_model", "on_cpu", "predict", "predictions", "repeat", "rescore",
           "sweep"]


def labels_of(manifest):
    """Return int `(n,)`: 1 where the label is anything but `NORMAL`, or is the class that `attrs["positive"]` names."""
    positive = manifest.attrs.get("positive")
    return (manifest["label"].eq(positive) if positive else manifest["label"].ne("NORMAL")).to_numpy().astype(int)


def predictions(score, manifest, images, shifted=None):
    """Return the predictions table: validation and test images, and the shifted validation if given.

    Args:
        score: function from uint8 images `(n, size, size)` to float `(n,)`.
        manifest: the split manifest.
        images: uint8 `(n, size, size)` in the manifest's order.
        shifted: `(images, source)` of `augment.shift_validation`, or `None`.
    """
    parts = []
    for splits in (["val"], ["test", "test_duplicate"]):
        chosen = manifest["split"].isin(splits).to_numpy()
        rows = manifest.loc[chosen, ["image_id", "patient_id", "split"]]
        parts.append(rows.assign(y_true=labels_of(manifest)[chosen], y_score=score(images[chosen])))
    table = pd.concat(parts).sort_index()
    if shifted is not None:
        moved, source = shifted
        rows = manifest[manifest["split"] == "val"].iloc[source]
        copy = rows.groupby("image_id").cumcount().astype(str)
        table = pd.concat([table, pd.DataFrame({
            "image_id": rows["image_id"] + "#" + copy, "patient_id": rows["patient_id"], "split": "val_shifted",
            "y_true": labels_of(rows), "y_score": score(moved)})])
    return table.reset_index(drop=True)


def repeat(run, variant, recipe, build, *, images=None, manifest=None, extra=None, seeds=None, oracle=False):
    """Train `recipe` once for each seed of the run, or load what is finished; return the records.

    Args:
        run: `records.Run`.
        variant: what a reader calls this recipe.
        recipe: `Recipe`.
        build: function `(image_size, augmentation layers) -> keras.Model`, such as `models.lab_cnn`.
        images: uint8 `(n, size, size)` in the manifest's order, where they are not simply the run's.
        manifest: the split manifest, where it is not the run's own.
        extra: function `seed -> (images, labels)` of further training images.
        seeds: list of int, where they are not `run.seeds`.
        oracle: also score the test set after each epoch of the first seed, for one figure that says so.
    """
    return sweep(run, {variant: recipe}, build, images=images, manifest=manifest, extra=extra, seeds=seeds,
                 oracle=oracle)[variant]


def sweep(run, recipes, build, *, images=None, manifest=None, extra=None, seeds=None, oracle=False):
    """Do what `repeat` does for several recipes, dict variant → `Recipe`; return dict variant → records.

    All runs that are not finished go to `engine.map` at once, so that a sweep fills a machine or a cluster.

    Raises:
        FileNotFoundError: a run finished on a machine whose disk this one does not see.
    """
    manifest = run.manifest if manifest is None else manifest
    seeds = run.seeds if seeds is None else seeds
    ids = {(variant, seed): run.run_id(variant, recipe.config(), seed, manifest)
           for variant, recipe in recipes.items() for seed in seeds}
    policy = keras.config.dtype_policy().name

    def finish(job):
        variant, seed = job
        keras.config.set_dtype_policy(policy)  # that of the notebook; another process has Keras's own
        run.once(ids[job], functools.partial(  # a node may die between writing and reporting
            _train_one, run, variant, recipes[variant], build, seed, images=images, manifest=manifest, extra=extra,
            oracle=oracle and seed == seeds[0]))

    found = {job: run.load(run_id) for job, run_id in ids.items()}
    missing = [job for job, record in found.items() if record is None]
    engine.map(finish, missing)
    found |= {job: _finished(run, ids[job]) for job in missing}
    return {variant: [found[variant, seed] for seed in seeds] for variant in recipes}


def _finished(run, run_id):
    if (record := run.load(run_id)) is None:
        raise FileNotFoundError(f"{run_id} is finished, but {run.results} does not hold its record. All machines of "
                                "the cluster must see this folder under this path: put the repository on shared "
                                "storage.")
    return record


def _train_one(run, variant, recipe, build, seed, *, images, manifest, extra, oracle):
    start = time.monotonic()
    run_id = run.run_id(variant, recipe.config(), seed, manifest)
    images = run.images(recipe.image_size) if images is None else images
    labels, split = labels_of(manifest), manifest["split"].to_numpy()
    rows = {name: np.flatnonzero(split == name) for name in ("train", "val", "test")}
    parts = {name: (images[index], labels[index]) for name, index in rows.items()}
    if extra is not None:
        keras.utils.set_random_seed(seed)  # the draws of augmented copies
        parts["train"] = tuple(np.concatenate(pair) for pair in zip(parts["train"], extra(seed), strict=True))
    shifted = augment.shift_validation(parts["val"][0], seed=0)
    watched = {"val": parts["val"]}
    if recipe.monitor == "shifted_auc":
        watched["shifted"] = shifted[0], parts["val"][1][shifted[1]]
    if oracle:
        watched["oracle_test"] = parts["test"]
    start_fresh(seed)  # the initial weights and dropout of this run
    model = build(recipe.image_size, augment.stack(recipe.augment))
    folder = run.backup(run_id)
    ready, earlier = time.monotonic(), state_of(folder).get("seconds", 0.0)
    part, seen = model, lambda pixels: pixels
    if transfer.is_stored(recipe):
        body, part = transfer.split(model, recipe.strategy)
        seen = functools.partial(transfer.run_once, body, folder=run.directory / "cache" / "activations")
        parts["train"] = seen(parts["train"][0]), parts["train"][1]
        watched = {name: (seen(pixels), truth) for name, (pixels, truth) in watched.items()}
    history, fitted = fit(part, recipe, *parts["train"], watched, seed=seed, folder=folder)
    trained = time.monotonic()
    table = predictions(lambda pixels: predict(fitted, seen(pixels)), manifest, images, shifted)
    served = keras.Model(model.input, model.output, name=model.name)  # without optimizer and loss
    save_atomic(served.save, run.directory / "models" / f"{run_id}.keras")
    record = run.save(variant, recipe.config(), seed, table, manifest=manifest, history=history,
                      num_parameters=model.count_params(),
                      seconds={"data": round(ready - start, 2), "train": round(earlier + trained - ready, 2),
                               "predict": round(time.monotonic() - trained, 2)})
    shutil.rmtree(folder)
    return record


def load_model(run, record):
    """Return the trained `keras.Model` of a record of this `records.Run`.

    Raises:
        FileNotFoundError: the model is not on this machine.
    """
    path = run.directory / "models" / f"{record['run_id']}.keras"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: models stay on the machine that trained them. "
                                f"Move {record['run_id']}.json away and run the notebook again.")
    return keras.models.load_model(path, safe_mode=True)


def rescore(run, variant, record, images):
    """Return the record of a finished run's model on other images of the same patients, such as shifted ones.

    Args:
        run: `records.Run`.
        variant: what a reader calls these images; it becomes part of the configuration.
        record: of the run whose saved model is scored.
        images: uint8 `(n, size, size)` in the manifest's order.

    Raises:
        FileNotFoundError: the model of `record` is not on this machine.
    """
    config = record["config"] | {"scored_on": variant}
    if found := run.load(run.run_id(variant, config, record["seed"])):
        return found
    start = time.monotonic()
    table = predictions(functools.partial(predict, load_model(run, record)), run.manifest, images)
    return run.save(variant, config, record["seed"], table, seconds={"predict": round(time.monotonic() - start, 2)})

"""GANs with records: trained once a configuration or loaded, judged by held-out reals; and what is added to a class.

Images are uint8 `(n, size, size)`. Fakes of real patients are derived from patients: they stay in `runs/`.
"""

import shutil
import time
from typing import NamedTuple

import keras
import numpy as np
import pandas as pd

from cxr import augment, backup, deploy, device, evaluate, fitting, gan, models, objective, records, train

NUM_FAKES = 500


class Recipe(NamedTuple):
    """What decides a GAN besides data and seed.

    Attributes:
        model: name of the builder function, for the reader.
        image_size: side in pixels.
        epochs, batch_size, average: of `gan.fit`.
        label: the class it draws.
    """

    model: str
    image_size: int
    epochs: int
    batch_size: int = 32
    average: float | None = None
    label: str = "COVID19"


class Drawn(NamedTuple):
    """A trained GAN: its record, its generator (`gan.GAN.painter`), and its film `(pictures, 16, size, size)`."""

    record: dict
    generator: keras.Model
    film: np.ndarray


def train_rows(manifest, label, num_real=None):
    """Return the rows of a class in train, or `num_real` of them; a smaller choice is part of a larger one."""
    rows = np.flatnonzero(manifest["split"].eq("train") & manifest["label"].eq(label))
    return np.sort(np.random.default_rng(0).permutation(rows)[:num_real])


def keep(manifest, label, num_real):
    """Return a copy of a split manifest in which only `num_real` training images of a class are left."""
    out = manifest.copy()
    out.loc[out.index[np.setdiff1d(train_rows(manifest, label), train_rows(manifest, label, num_real))],
            "split"] = "dropped"
    return out


def trained(run, variant, recipe, build, images, manifest, spaces, seed=0):
    """Train and judge a GAN on the training images of one class, or load it; return a `Drawn`.

    Args:
        run: `records.Run`.
        variant: what a reader calls it.
        recipe: `Recipe`.
        build: function `(image_size, seed) -> gan.GAN`, such as `gan.lab_dcgan`.
        images: uint8, in the manifest's order.
        manifest: split manifest.
        spaces: dict name → function from images to features, for `judge`.
        seed: of weights, order and codes.

    Raises:
        ValueError: too few patients of the class in validation or in test to judge the fakes by.
        FileNotFoundError: the record is there, and its generator is on another machine.
    """
    config = recipe._asdict()
    run_id = run.run_id(variant, config, seed, manifest)
    path, film_path = (run.directory / place for place in (f"models/{run_id}.keras", f"cache/films/{run_id}.npy"))
    held = {name: np.flatnonzero(manifest["split"].eq(name) & manifest["label"].eq(recipe.label))
            for name in ("val", "test")}
    few = min(manifest["patient_id"].iloc[rows].nunique() for rows in held.values())
    if few < evaluate.FEWEST:
        raise ValueError(f"Validation or test holds {few} patients of {recipe.label}; expected {evaluate.FEWEST} in "
                         "each, which fakes are held against. Add images of other patients.")

    def finish():
        start = time.monotonic()
        device.start_fresh(seed)
        folder = run.backup(run_id)
        earlier = backup.state_of(folder).get("seconds", 0.0)
        real = images[train_rows(manifest, recipe.label)]
        model = build(recipe.image_size, seed)
        history, film = gan.fit(model, real, epochs=recipe.epochs, batch_size=recipe.batch_size, average=recipe.average,
                                seed=seed, folder=folder, every=max(1, recipe.epochs // 8))
        done, generator = time.monotonic(), model.painter
        records.save_atomic(generator.save, path)
        records.save_atomic(lambda place: np.save(place, film), film_path)
        judged = judge(generator, real, images[np.concatenate(list(held.values()))], spaces, seed=seed)
        table = real_or_fake(generator, real, images, manifest, held, seed=seed)
        steps = recipe.epochs * -(-len(real) // recipe.batch_size)
        seconds = {"train": round(earlier + done - start, 2), "judge": round(time.monotonic() - done, 2)}
        record = run.save(variant, config, seed, table, purpose="generate", manifest=manifest, history=history,
                          judged=judged, num_real=len(real), num_steps=steps, seconds=seconds)
        shutil.rmtree(folder)
        return record

    record = run.once(run_id, finish)
    return Drawn(record, train.load_model(run, record), np.load(film_path))


def judge(generator, real, held_out, spaces, *, seed=0):
    """Return how good the fakes are: dict space → dict of numbers, each beside that of real training images.

    Args:
        generator: as `gan.GAN.painter`.
        real, held_out: training images, and those that it never saw.
        spaces: dict name → function from uint8 images to float features `(n, d)`, which are centred
            here and brought to a mean variance of one; not each alone, or one silent on reals would outweigh the rest.

    Returns:
        For each space `kid`, `kid_error`, `kid_of_real`, `fid`, `num` (fakes and held-out reals behind them),
        `density`, `coverage`, `memorisation`, `spread`.
    """
    fakes, out = gan.sample(generator, NUM_FAKES, seed=seed + 1000), {}
    for name, describe in spaces.items():
        train, new, fake = (np.asarray(describe(pictures), "float64") for pictures in (real, held_out, fakes))
        mean, scale = train.mean(0), np.sqrt(train.var(0).mean()) + 1e-9
        train, new, fake = ((rows - mean) / scale for rows in (train, new, fake))
        value, error = gan.kid(new, fake, seed=seed)
        density, coverage = gan.density_and_coverage(new, fake)
        numbers = {"kid": value, "kid_error": error, "kid_of_real": gan.kid(new, train, seed=seed)[0],
                   "fid": gan.fid(new, fake), "density": density, "coverage": coverage,
                   "memorisation": gan.memorisation(train, new, fake), "spread": gan.spread(new, fake)}
        out[name] = {key: round(number, 5) for key, number in numbers.items()} | {"num": [len(fake), len(new)]}
    return out


def features(model):
    """Return a function from images to what the classifier of `model` reads, float `(n, d)`."""
    body = deploy.features_of(model)
    return lambda images: device.outputs(body, images[..., None])


def pixels(images, side=16):
    """Return images as features: their pixels at 16 px, float `(n, 256)` in [0, 1]."""
    small = keras.ops.image.resize(images[..., None].astype("float32"), (side, side), antialias=True)
    return keras.ops.convert_to_numpy(small).reshape(len(images), -1) / 255


def real_or_fake(generator, real, images, manifest, held, *, seed=0, epochs=3):
    """Return the predictions table of a small CNN that tells fakes (1) from reals (0) it has not seen.

    Args:
        generator: draws the fakes.
        real: training images.
        images, manifest: as of `trained`.
        held: dict split → rows of held-out reals.
    """
    drawn = {name: gan.sample(generator, count, seed=seed + 2000 + index) for index, (name, count) in
             enumerate({"train": len(real), **{name: len(rows) for name, rows in held.items()}}.items())}
    keras.utils.set_random_seed(seed)
    model = device.compiled_once(models.lab_cnn(real.shape[1]), objective.Adam(), "binary_crossentropy")
    batches = fitting.Batches(np.concatenate([real, drawn["train"]]), np.repeat((0, 1), len(real)), 32, seed)
    model.fit(batches, epochs=epochs, verbose=0, shuffle=False)
    parts = []
    for name, rows in held.items():
        about = manifest.iloc[rows][["image_id", "patient_id", "split"]]
        parts.append(about.assign(y_true=0, y_score=device.predict(model, images[rows])))
        parts.append(_fakes(f"fake/{name}", name, device.predict(model, drawn[name])))
    return pd.concat(parts, ignore_index=True)


def _fakes(prefix, split, scores):
    names = [f"{prefix}/{number:04d}" for number in range(len(scores))]
    return pd.DataFrame({"image_id": names, "patient_id": names, "split": split, "y_true": 1, "y_score": scores})


def duplicated(images, count, seed):
    """Return `count` of the images, each as often as the others."""
    order = np.random.default_rng(seed).permutation(len(images))
    return images[np.resize(order, count)]


def moved(images, count, seed):
    """Return `count` copies that were flipped, shifted, zoomed a little and rotated."""
    policy = keras.config.dtype_policy()
    keras.utils.set_random_seed(seed)
    keras.config.set_dtype_policy("float32")  # bfloat16 has fewer greys than an image
    out = duplicated(images, count, seed)
    for name in ("horizontal_flip", "shift_zoom", "rotation"):
        out = augment.copies(out, name)
    keras.config.set_dtype_policy(policy)
    return out


def mixed(images, others, count, seed):
    """Return `count` mixtures of an image with one of `others`, and the share of the first: uint8 and float `(count,)`.

    The share is drawn from Beta(0.2, 0.2), the first always being the larger part (Zhang et al. 2018).
    """
    rng = np.random.default_rng(seed)
    share = rng.beta(0.2, 0.2, count)
    share = np.maximum(share, 1 - share)
    first, second = duplicated(images, count, seed), others[rng.integers(len(others), size=count)]
    weight = share[:, None, None]
    return np.uint8(np.round(weight * first + (1 - weight) * second)), share


def ways(images, manifest, label, generators):
    """Return what may be added to a class in train: dict name → function `(count, seed)` → `(images, labels)`.

    Args:
        images, manifest: as of `trained`.
        label: the class.
        generators: dict name → generator of that class.
    """
    rows, split = train_rows(manifest, label), manifest["split"].eq("train")
    real, others = images[rows], images[np.flatnonzero(split & manifest["label"].ne(label))]
    value = float(train.labels_of(manifest)[rows[0]])

    def plain(draw):
        return lambda count, seed: (draw(count, seed), np.full(count, value))

    def mixtures(count, seed):
        pictures, share = mixed(real, others, count, seed)
        return pictures, share if value else 1 - share

    draws = {name: plain(lambda count, seed, network=network: gan.sample(network, count, seed=seed))
             for name, network in generators.items()}
    return {"duplicated reals": plain(lambda count, seed: duplicated(real, count, seed)),
            "flip, shift, rotation": plain(lambda count, seed: moved(real, count, seed)), "mixup": mixtures, **draws}


def baseline(run, variant, score, images, manifest):
    """Return the record of a score that needs no training (function images → `(n,)`), on a split manifest."""
    config = {"score": variant, "image_size": images.shape[1]}
    return run.load(run.run_id(variant, config, 0, manifest)) or run.save(
        variant, config, 0, train.predictions(score, manifest, images), purpose="baseline", manifest=manifest)


def scored_with_fakes(run, variant, model, record, fakes, images, manifest):
    """Return the record of a classifier whose test holds fakes in place of the reals of their class.

    Args:
        run: `records.Run`.
        variant: what a reader calls it.
        model: the classifier.
        record: its record, whose validation scores give the thresholds.
        fakes: uint8 `(m, size, size)`, of the positive class.
        images, manifest: as of `trained`.
    """
    config = record["config"] | {"classifier": record["run_id"], "test": variant}
    if found := run.load(run.run_id(variant, config, record["seed"], manifest)):
        return found
    table = run.predictions(record)
    table = table[~(table["split"].str.startswith("test") & table["y_true"].eq(1))]
    table = pd.concat([table, _fakes("fake", "test", device.predict(model, fakes))], ignore_index=True)
    return run.save(variant, config, record["seed"], table, manifest=manifest)

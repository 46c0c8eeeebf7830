"""What a step of each network costs besides arithmetic, under JAX: compiling it, and what the host does for every one.

On a card, networks as small as these wait for the host: for XLA to compile their step, and for Python to draw the batch
and hand the step over. Both happen on the processor and are measured there, for each network of the full profile
(`scaling.WORK`) at its size, built and augmented as the notebooks do. An epoch's last batch has a shape of its own; it
is compiled too, and counted. For the host's part the compiled step is replaced by one that takes the same arguments
and gives them back: what is left of `fit` from one batch to the next is drawing 32 images, Keras, and the call.

    pip install -r requirements-jax.txt
    python benchmarks/steps.py [--few 5] [--many 45]
"""

import argparse
import json
import os
import pathlib
import sys
import time

os.environ["KERAS_BACKEND"] = "jax"
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import keras
import numpy as np
from decode import machine
from jax import numpy as jnp
from scaling import WORK

from cxr import augment, autoencoder, device, fitting, gan, models, records, transfer
from cxr.objective import Adam

BATCH = 32
RESULT = pathlib.Path(__file__).parent / "results" / "steps.json"
AUGMENTED = {("lab_cnn", 48): "all_combined", ("lab_cnn", 96): "all_combined", ("lab_cnn", 64): "acquisition",
             ("resnet18", 180): "all_combined", ("mobilenet_v2", 160): "aspect_jitter"}


def ready(name, size, images):
    """Return the compiled network of a row of `WORK`, and a function from numbers of images and a batch to batches."""
    labels = np.arange(len(images)) % 2
    if name.endswith("dcgan"):
        model = getattr(gan, name)(size, 0)
        model(images[:2][..., None])
        return device.compiled_once(model, Adam(2e-4, beta_1=0.5)), lambda n, batch: fitting.Batches(
            images[:n], labels[:n], batch, 0)
    if hasattr(autoencoder, name):
        model = getattr(autoencoder, name)(size)
        return device.compiled_once(model, Adam(1e-3), "binary_crossentropy"), lambda n, batch: autoencoder._Pairs(
            images[:n], None, batch, 0)
    layers = augment.stack(AUGMENTED.get((name, size), "none"))
    if name == "head":
        model = transfer.split(transfer.build("mobilenet_v2", "frozen", size, weights=None), "frozen")[1]
        images = np.zeros((len(images), *model.input_shape[1:]), "float16")
    elif name in transfer.BACKBONES:
        model = transfer.build(name, "full", size, layers, weights=None)
    else:
        model = getattr(models, name)(size, layers)
    recipe = fitting.Recipe(name, size, 10, weight_decay=1e-3, schedule="cosine")
    return fitting._compile(model, recipe, labels, 10), lambda n, batch: fitting.Batches(
        images[:n], labels[:n], batch, 0)


def idle(model):
    """Replace the compiled step of a model that has trained by one that computes nothing."""
    logs = dict.fromkeys(model.get_metrics_result(), jnp.zeros(()))
    step = jax.jit(lambda state, data: (logs, state), donate_argnums=0, keep_unused=True)
    model.train_function = lambda state, batches: step(state, next(batches))


def seconds(model, batches):
    """Return how long an epoch takes."""
    start = time.perf_counter()
    model.fit(batches, verbose=0, shuffle=False)
    return time.perf_counter() - start


def measure(name, size, options):
    """Return the seconds of compiling one network's step, and the milliseconds of the host for each."""
    images = np.random.default_rng(0).integers(0, 256, (BATCH * options.many, size, size)).astype("uint8")
    model, batches = ready(name, size, images)
    first, again = (seconds(model, batches(10, 4)) for _ in range(2))  # two batches and a half
    idle(model)
    lengths = options.few, options.few, options.many  # the first compiles
    _, few, many = (seconds(model, batches(BATCH * steps, BATCH)) for steps in lengths)
    return {"compile_seconds": round(first - again, 1),
            "host_milliseconds": round(1e3 * (many - few) / (options.many - options.few), 2)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("few", 5), ("many", 45)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    keras.config.set_dtype_policy(device.precision())
    found = {}
    for name, size in dict.fromkeys((row[1], row[2]) for row in WORK):
        device.start_fresh(0)
        found[f"{name} {size}"] = measure(name, size, options)
        print(f"{name} {size}", found[f"{name} {size}"], flush=True)
    result = {**vars(options), "networks": found, "machine": machine()}
    records.write_atomic(RESULT, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""How much of what a device can do does training use: ResNet-50 at 224 px and the published recipe's MobileNetV2.

The bounds are measured on the same device in the same run: arithmetic by a large matrix product in the precision that
the lab trains in, memory by adding one, in place, to an array that no cache holds. A step's arithmetic is three times
that of the forward pass, which `scaling.py` has counted; the bytes that it moves are those that XLA counts in its
compiled gradient, which is why this runs on JAX. An image takes at least the longer of both; a share says how near
training comes. Training is the lab's own: its optimizer and its batches, from the array in memory to the updated
weights; the median turn counts.

    pip install -r requirements-jax.txt            # with an NVIDIA GPU: pip install -U "jax[cuda12]"
    python benchmarks/roofline.py [--batch 64] [--steps 20] [--turns 3]     # on processors 16 images and 3 steps
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time

os.environ["KERAS_BACKEND"] = "jax"
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

try:
    import jax
except ImportError:
    sys.exit("This benchmark asks XLA what a step moves, through JAX: pip install -r requirements-jax.txt")
import keras
import numpy as np
from decode import machine
from jax import numpy as jnp

from cxr import device, fitting, records, transfer

RESULT = pathlib.Path(__file__).parent / "results" / "roofline.json"
NETWORKS = {"resnet_50": 224, "mobilenet_v2": 160}


def best_seconds(function, value, turns=10):
    """Return the seconds of the fastest of some calls of a jitted function that takes what it returned before."""
    spent = []
    for _ in range(turns + 1):  # the first call compiles
        start = time.perf_counter()
        value = jax.block_until_ready(function(value))
        spent.append(time.perf_counter() - start)
    return min(spent[1:])


def bounds(dtype):
    """Return what the device does at best: operations a second in a matrix product, bytes a second through memory."""
    side, length = (2048, 1 << 26) if device.on_cpu() else (8192, 1 << 30)
    matrix, array = jnp.eye(side, dtype=dtype), jnp.ones(length, "float32")
    return (2 * side ** 3 / best_seconds(jax.jit(lambda values: values @ matrix), jnp.ones_like(matrix)),
            2 * array.nbytes / best_seconds(jax.jit(lambda values: values + 1, donate_argnums=0), array))


def bytes_moved(model, batch):
    """Return the bytes an image that the gradient of a batch reads and writes, as XLA counts them once compiled."""
    trained, held = ([variable.value for variable in variables]
                     for variables in (model.trainable_variables, model.non_trainable_variables))

    def loss(weights, images):
        outputs, _ = model.stateless_call(weights, held, images, training=True)
        return jnp.mean(keras.ops.binary_crossentropy(jnp.ones_like(outputs), outputs))

    compiled = jax.jit(jax.grad(loss)).lower(trained, jnp.zeros((batch, *model.input_shape[1:]), "uint8")).compile()
    return compiled.cost_analysis()["bytes accessed"] / batch


def images_a_second(model, size, batch, steps, turns):
    """Return how many images a second the lab trains on."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (batch * steps, size, size)).astype("uint8"), np.arange(batch * steps) % 2
    recipe, batches = fitting.Recipe(model.name, size, 1, weight_decay=1e-3), fitting.Batches(images, labels, batch, 0)
    model, spent = fitting._compile(model, recipe, labels, steps), []
    for turn in range(turns + 1):
        start = time.perf_counter()
        model.fit(batches, verbose=0, shuffle=False)
        if turn:  # the first compiles
            spent.append(time.perf_counter() - start)
    return batch * steps / statistics.median(spent)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    few = device.on_cpu()  # where 64 images take half a minute
    for name, default in (("batch", 16 if few else 64), ("steps", 3 if few else 20), ("turns", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    keras.config.set_dtype_policy(device.precision())
    dtype = keras.config.dtype_policy().compute_dtype
    arithmetic, memory = bounds(dtype)
    forward = json.loads((RESULT.parent / "scaling.json").read_text())["forward_flops"]
    found = {}
    for name, size in NETWORKS.items():
        model = transfer.build(name, "full", size, weights=None)
        rate = images_a_second(model, size, options.batch, options.steps, options.turns)
        operations, moved = 3 * forward[f"{name} {size}"], bytes_moved(model, options.batch)
        found[name] = {"size": size, "images_per_second": round(rate, 1),
                       "gflop_an_image": round(operations / 1e9, 2), "megabytes_an_image": round(moved / 1e6, 1),
                       "share_of_arithmetic": round(rate * operations / arithmetic, 3),
                       "share_of_memory": round(rate * moved / memory, 3)}
        print(name, found[name], flush=True)
    result = {"batch_size": options.batch, "steps": options.steps, "turns": options.turns, "precision": dtype,
              "bounds": {"gflop_per_second": round(arithmetic / 1e9, 1),
                         "gigabytes_per_second": round(memory / 1e9, 1)}, "networks": found,
              "machine": machine() | {"device": jax.devices()[0].device_kind}}
    records.write_atomic(RESULT, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["bounds"]))


if __name__ == "__main__":
    main()

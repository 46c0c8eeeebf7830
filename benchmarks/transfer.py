"""How much faster transfer learning is when the frozen part of a network runs once, against a plain Keras loop.

All sides train the same MobileNetV2 from the same weights for ten epochs, on as many images as the training folder of
the Kermany set has, with the same batches and validation after each epoch, from building the network to the last score;
each in a process of its own, in turns, and the median turn counts. `plain` is `compile` and `fit` as Keras has them;
`whole` is the lab's compiled step with the whole network in every step; `stored` is what the notebooks do. Weights are
random, so no network is needed: speed does not depend on them. The losses must agree.

    python benchmarks/transfer.py [--images 5216] [--turns 2]
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np

from cxr import records

RESULT = pathlib.Path(__file__).parent / "results" / "transfer.json"
SIZE, EPOCHS, VALIDATION = 160, 10, 0.15
SIDES = ("plain", "whole", "stored")


def train(strategy, side, count):
    """Train once and return seconds and the loss of each epoch."""
    import keras

    from cxr import fitting, transfer

    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (count, SIZE, SIZE)).astype(np.uint8), np.arange(count) % 2
    val = int(VALIDATION * count)
    keras.utils.set_random_seed(0)
    start = time.perf_counter()
    model = transfer.build("mobilenet_v2", strategy, SIZE, weights=None)
    recipe = fitting.Recipe("mobilenet_v2", SIZE, EPOCHS, strategy=strategy, select="last")
    if side == "plain":
        model.compile(keras.optimizers.Adam(recipe.learning_rate), "binary_crossentropy", metrics=[keras.metrics.AUC()])
        batches = fitting.Batches(images[val:], labels[val:], recipe.batch_size, seed=0)
        history = model.fit(batches, epochs=EPOCHS, validation_data=(images[:val, ..., None], labels[:val]),
                            shuffle=False, verbose=0).history
        return time.perf_counter() - start, history["loss"]
    parts, part = [images[val:], images[:val]], model
    with tempfile.TemporaryDirectory() as folder:
        if side == "stored":
            body, part = transfer.split(model, strategy)
            parts = [transfer.run_once(body, pixels, folder) for pixels in parts]
        history, _ = fitting.fit(part, recipe, parts[0], labels[val:], {"val": (parts[1], labels[:val])}, seed=0,
                                 folder=pathlib.Path(folder) / "backup")
        return time.perf_counter() - start, history["loss"]


def in_a_process(*arguments):
    command = [sys.executable, __file__, "--one", json.dumps(arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("images", 5216), ("turns", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(train(*options.one)))
        return
    found = {}
    for strategy in ("frozen", "partial"):
        turns = [[in_a_process(strategy, side, options.images) for side in SIDES] for _ in range(options.turns)]
        for (_, plain), (_, whole), (_, stored) in turns:
            np.testing.assert_allclose(whole, stored, atol=1e-3, err_msg="both sides must learn the same")
            np.testing.assert_allclose(plain, stored, atol=1e-2, err_msg="and as Keras does, but for other kernels")
        medians = np.median([[spent for spent, _ in turn] for turn in turns], axis=0).tolist()
        seconds = dict(zip(SIDES, medians, strict=True))
        found[strategy] = {f"{side}_seconds": round(spent, 2) for side, spent in seconds.items()} | {
            "times_as_fast": round(seconds["plain"] / seconds["stored"], 2),
            "times_as_fast_as_whole": round(seconds["whole"] / seconds["stored"], 2)}
        print(strategy, found[strategy], flush=True)
    from decode import machine

    result = {"images": options.images, "size": SIZE, "epochs": EPOCHS, "turns": options.turns, "strategies": found,
              "machine": machine()}
    records.write_atomic(RESULT, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

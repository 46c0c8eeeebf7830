"""How fast the baseline CNNs train on this processor: Keras as the lab compiles it, against the same in PyTorch.

Both sides train on the same uint8 images with the same batch size and AdamW, in one process and in turns, from the
array in memory to the updated weights; the median turn counts. The numbers of trained parameters must agree. PyTorch
runs as its documentation advises for processors: channels-last memory, all cores. Only this file needs it.

    pip install torch==2.13.0
    python benchmarks/training.py [--images 640] [--turns 5]
"""

import argparse
import json
import os
import pathlib
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import keras
import numpy as np
from decode import machine

from cxr import fitting, models, records

try:
    import torch
    from torch import nn
except ImportError:
    sys.exit("This benchmark compares with PyTorch, which the lab itself does not need: pip install torch==2.13.0")

RESULT = pathlib.Path(__file__).parent / "results" / "training.json"
BATCH = 32


def separable(inputs, outputs):
    return [nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False), nn.Conv2d(inputs, outputs, 1),
            nn.ReLU()]


def torch_seed_cnn(size):
    parts = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    width, size = 16, size // 2
    for filters, dropout in ((32, 0), (64, 0), (128, 0.2), (256, 0.2)):
        parts += [*separable(width, filters), *separable(filters, filters), nn.BatchNorm2d(filters), nn.MaxPool2d(2)]
        parts += [nn.Dropout(dropout)] if dropout else []
        width, size = filters, size // 2
    parts += [nn.Flatten()]
    width *= size * size
    for units, dropout in ((512, 0.7), (128, 0.5), (64, 0.3)):
        parts += [nn.Linear(width, units), nn.ReLU(), nn.BatchNorm1d(units), nn.Dropout(dropout)]
        width = units
    return nn.Sequential(*parts, nn.Linear(width, 1)), 3


def convolution(inputs, outputs, kernel=3, stride=1):
    return [nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs),
            nn.ReLU()]


def torch_lab_cnn(size):
    parts = [nn.LayerNorm([1, size, size], eps=1e-6, elementwise_affine=False), *convolution(1, 24, 5, 2),
             *convolution(24, 32), nn.MaxPool2d(2)]
    width = 32
    for filters in (64, 128):
        parts += [*convolution(width, filters), *convolution(filters, filters), nn.MaxPool2d(2)]
        width = filters
    return nn.Sequential(*parts, *convolution(width, 192), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3),
                         nn.Linear(192, 1)), 1


def keras_side(build, size, images, labels):
    """Return a function that trains one epoch, and the number of trained parameters."""
    model = build(size)
    batches = fitting.Batches(images, labels, BATCH, seed=0)
    model = fitting._compile(model, fitting.Recipe(build.__name__, size, 1, weight_decay=1e-3), labels, len(batches))
    parameters = sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)
    return lambda: model.fit(batches, verbose=0, shuffle=False), parameters


def torch_side(build, size, images, labels):
    """Return the same for PyTorch."""
    network, channels = build(size)
    network = network.to(memory_format=torch.channels_last).train()
    optimizer, loss = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=1e-3), nn.BCEWithLogitsLoss()

    def epoch():
        order = np.random.default_rng(0).permutation(len(images))
        for start in range(0, len(order), BATCH):
            rows = order[start:start + BATCH]
            batch = torch.from_numpy(images[rows])[:, None].expand(-1, channels, -1, -1).float() / 255
            target = torch.from_numpy(labels[rows].astype("float32"))[:, None]
            optimizer.zero_grad()
            loss(network(batch.contiguous(memory_format=torch.channels_last)), target).backward()
            optimizer.step()

    return epoch, sum(parameter.numel() for parameter in network.parameters())


def random_images(count, size):
    """Return images that no network can learn from; speed does not depend on what they show."""
    return np.random.default_rng(0).integers(0, 256, (count, size, size)).astype(np.uint8)


def classifiers(keras_build, torch_build, size, count):
    """Return both sides of a classifier, ready for `measure`."""
    images, labels = random_images(count, size), np.arange(count) % 2
    return {"keras": keras_side(keras_build, size, images, labels),
            "pytorch": torch_side(torch_build, size, images, labels)}


def take_turns(sides, turns):
    """Return the number of parameters, in which all sides must agree, and the median seconds of each side.

    `sides`: name -> (function to time, number of parameters).
    """
    parameters = {name: number for name, (_, number) in sides.items()}
    assert len(set(parameters.values())) == 1, f"the networks differ: {parameters}"
    seconds = {name: [] for name in sides}
    for turn in range(turns + 1):
        for name, (run, _) in sides.items():
            start = time.perf_counter()
            run()
            if turn:  # the first turn compiles and warms up, on all sides
                seconds[name].append(time.perf_counter() - start)
    return next(iter(parameters.values())), {name: float(np.median(spent)) for name, spent in seconds.items()}


def measure(sides, size, count, turns):
    """Return images a second of both sides and their ratio; a turn of `sides` is an epoch of `count` images."""
    parameters, seconds = take_turns(sides, turns)
    rate = {name: count / spent for name, spent in seconds.items()}
    return {"size": size, "parameters": parameters,
            **{f"{name}_images_per_second": round(value, 1) for name, value in rate.items()},
            "times_as_fast_as_pytorch": round(rate["keras"] / rate["pytorch"], 2)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("images", 640), ("turns", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count())
    found = {}
    for keras_build, torch_build, size in ((models.seed_cnn, torch_seed_cnn, 180), (models.lab_cnn, torch_lab_cnn, 96)):
        sides = classifiers(keras_build, torch_build, size, options.images)
        found[keras_build.__name__] = measure(sides, size, options.images, options.turns)
    result = {"images": options.images, "batch_size": BATCH, "turns": options.turns, "networks": found,
              "machine": machine() | {"torch": torch.__version__, "keras_threads": os.cpu_count()}}
    records.write_atomic(RESULT, json.dumps(result, indent=1) + "\n")
    print(f"images a second, Keras {keras.__version__} and PyTorch {torch.__version__}, {os.cpu_count()} cores")
    for name, row in found.items():
        print(f"{name} at {row['size']} px: {row['keras_images_per_second']:.0f} and "
              f"{row['pytorch_images_per_second']:.0f}, {row['times_as_fast_as_pytorch']:.2f} times as fast")


if __name__ == "__main__":
    main()

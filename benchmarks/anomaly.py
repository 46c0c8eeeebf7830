"""How fast study S0's autoencoder trains against the same in PyTorch, and how many images a second it scores.

Form and fairness as in `training.py`. Scoring is from uint8 images in memory to one error an image, at 128 px.

    pip install torch==2.13.0
    python benchmarks/anomaly.py [--images 640] [--turns 5]
"""

import argparse
import json

import keras
import numpy as np
import torch
from decode import machine
from scipy import stats
from torch import nn
from training import BATCH, RESULT, measure, random_images, take_turns

from cxr import anomaly, autoencoder, device, objective, records


def torch_autoencoder(size):
    parts, width = [], 1
    for step in (nn.MaxPool2d(2, ceil_mode=True),) * 2 + (nn.Upsample(scale_factor=2),) * 2:
        parts += [nn.Conv2d(width, 32, 3, padding=1), nn.ReLU(), step]
        width = 32
    crop = 4 * -(-size // 4) - size
    return nn.Sequential(*parts, nn.ZeroPad2d((-(crop // 2), crop // 2 - crop) * 2), nn.Conv2d(32, 1, 3, padding=1))


def keras_side(images):
    """Return a function that trains one epoch as `autoencoder.fit` does, and the number of parameters."""
    model = autoencoder.seed_autoencoder(images.shape[1])
    device.compiled(model, objective.Adam(1e-3), "binary_crossentropy")
    batches = autoencoder._Pairs(images, None, BATCH, seed=0)
    return lambda: model.fit(batches, verbose=0, shuffle=False), model.count_params()


def torch_side(images):
    """Return the same for PyTorch."""
    network = torch_autoencoder(images.shape[1]).to(memory_format=torch.channels_last).train()
    optimizer, loss = torch.optim.Adam(network.parameters(), 1e-3), nn.BCEWithLogitsLoss()

    def epoch():
        order = np.random.default_rng(0).permutation(len(images))
        for start in range(0, len(order), BATCH):
            batch = torch.from_numpy(images[order[start:start + BATCH]])[:, None].float() / 255
            optimizer.zero_grad()
            loss(network(batch.contiguous(memory_format=torch.channels_last)), batch).backward()
            optimizer.step()

    return epoch, sum(parameter.numel() for parameter in network.parameters())


def scoring(build, size, count, turns):
    """Return the images a second that an autoencoder gives a score: in float32, and in bfloat16 where that pays.

    With the second comes the rank correlation of its scores with those of the first.
    """
    images, scores, sides = random_images(count, size), {}, {}
    for policy in dict.fromkeys(("float32", device.precision())):
        keras.config.set_dtype_policy(policy)
        keras.utils.set_random_seed(0)
        model = build(size)

        def score(policy=policy, model=model):
            scores[policy] = anomaly.error_map(images, autoencoder.apply(model, images)).mean((1, 2))

        sides[policy] = score, model.count_params()
    keras.config.set_dtype_policy("float32")
    rate = {policy: round(count / spent, 1) for policy, spent in take_turns(sides, turns)[1].items()}
    alike = stats.spearmanr(*scores.values()).statistic if len(scores) == 2 else 1
    return rate | {"rank_correlation": round(float(alike), 5)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("images", 640), ("turns", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    images = random_images(options.images, 150)
    trained = measure({"keras": keras_side(images), "pytorch": torch_side(images)}, 150, options.images, options.turns)
    scored = {build.__name__: scoring(build, 128, 2 * options.images, options.turns)
              for build in (autoencoder.seed_autoencoder, autoencoder.autoencoder)}
    result = {"images": options.images, "batch_size": BATCH, "turns": options.turns, "training": trained,
              "scored_images_per_second": scored, "machine": machine() | {"torch": torch.__version__}}
    records.write_atomic(RESULT.with_name("anomaly.json"), json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

"""How fast a GAN learns on this processor: the lab's step in Keras, against the same networks and step in PyTorch.

A step updates discriminator and generator once, from uint8 images in memory to the updated weights, without the lab's
augmentation. Both sides have the same networks (the numbers of trained parameters must agree), Adam, batch size and
precision, and take turns in one process; the median turn counts. Only this file needs PyTorch.

    pip install torch==2.13.0
    python benchmarks/gan.py [--size 64] [--steps 5] [--turns 5]
"""

import argparse
import json
import os

import keras
import numpy as np
import torch
from decode import machine
from torch import nn
from torch.nn import functional
from training import BATCH, RESULT, random_images, take_turns

from cxr import device, gan, objective, records


def torch_generator(widths, smooth):
    parts, width = [nn.Linear(gan.LATENT, 8 * 8 * 128), nn.Unflatten(1, (128, 8, 8))], 128
    for filters in widths:
        parts += [nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(width, filters, 3, padding=1, bias=False),
                  nn.BatchNorm2d(filters)] if smooth else [nn.ConvTranspose2d(width, filters, 4, 2, 1)]
        parts += [nn.LeakyReLU(0.2)]
        width = filters
    return nn.Sequential(*parts, nn.Conv2d(width, 1, 5, padding=2), nn.Tanh())


def torch_discriminator(convolutions, size, spectral):
    """`convolutions`: list of `(filters, kernel, stride)`."""
    wrap, parts, width = nn.utils.parametrizations.spectral_norm if spectral else (lambda layer: layer), [], 1
    for filters, kernel, stride in convolutions:
        parts += [wrap(nn.Conv2d(width, filters, kernel, stride, padding=(kernel - 1) // 2)), nn.LeakyReLU(0.2)]
        width, size = filters, size // stride
    return nn.Sequential(*parts, nn.Flatten(), nn.Dropout(0 if spectral else 0.4), wrap(nn.Linear(width * size**2, 1)))


def torch_networks(name, size):
    doublings = int(np.log2(size // 8))
    if name == "seed_dcgan":
        return (torch_generator([128] * doublings, smooth=False),
                torch_discriminator([(128, 5, 1), *[(128, 5, 2)] * doublings], size, spectral=False))
    return (torch_generator([32 << index for index in reversed(range(doublings))], smooth=True),
            torch_discriminator([(min(256, 64 << index), 4, 2) for index in range(doublings)], size, spectral=True))


def torch_side(name, size, images, steps, half):
    """Return a function that takes `steps` steps, and the number of trained parameters."""
    networks = [network.to(memory_format=torch.channels_last).train() for network in torch_networks(name, size)]
    generator, discriminator = networks
    optimizers = [torch.optim.Adam(network.parameters(), 2e-4, betas=(0.5, 0.999)) for network in networks]

    def step():
        real = torch.from_numpy(images)[:, None].float().contiguous(memory_format=torch.channels_last) / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            fake = generator(torch.randn(len(real), gan.LATENT))
            on_real, on_fake = discriminator(torch.cat([real, fake.detach()])).float().chunk(2)
            critic = functional.softplus(-on_real).mean() + functional.softplus(on_fake).mean()
        optimizers[1].zero_grad()
        critic.backward()
        for parameter in discriminator.parameters():
            parameter.requires_grad_(False)  # the generator's gradient needs none of theirs
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            artist = functional.softplus(-discriminator(fake).float()).mean()
        optimizers[0].zero_grad()
        artist.backward()
        for parameter in discriminator.parameters():
            parameter.requires_grad_(True)
        for optimizer in optimizers:
            optimizer.step()

    return lambda: [step() for _ in range(steps)], sum(p.numel() for network in networks for p in network.parameters())


def keras_side(name, size, images, steps):
    """Return the same for the lab's model."""
    device.start_fresh(0)
    model = getattr(gan, name)(size, 0)
    model.view.stack = []  # both sides without augmentation
    batch = images[..., None]
    model(batch[:2])
    device.compiled(model, objective.Adam(2e-4, beta_1=0.5))
    return (lambda: [model.train_on_batch(batch) for _ in range(steps)],
            sum(int(np.prod(weight.shape)) for weight in model.trainable_weights))


def measure(name, options):
    """Return steps a second of both sides and their ratio."""
    images = random_images(BATCH, options.size)
    half = keras.config.dtype_policy().name == "mixed_bfloat16"
    sides = {"keras": keras_side(name, options.size, images, options.steps),
             "pytorch": torch_side(name, options.size, images, options.steps, half)}
    parameters, seconds = take_turns(sides, options.turns)
    rate = {side: options.steps / spent for side, spent in seconds.items()}
    return {"parameters": parameters, **{f"{side}_steps_per_second": round(value, 3) for side, value in rate.items()},
            "times_as_fast_as_pytorch": round(rate["keras"] / rate["pytorch"], 2)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("size", 64), ("steps", 5), ("turns", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count())
    found = {}
    for policy in dict.fromkeys(("float32", device.precision())):
        keras.config.set_dtype_policy(policy)
        found[policy] = {name: measure(name, options) for name in ("seed_dcgan", "lab_dcgan")}
    result = {"size": options.size, "batch_size": BATCH, "steps": options.steps, "turns": options.turns, "gans": found,
              "machine": machine() | {"torch": torch.__version__, "keras_threads": os.cpu_count()}}
    records.write_atomic(RESULT.with_name("gan.json"), json.dumps(result, indent=1) + "\n")
    print(f"GAN steps a second at {options.size} px, Keras {keras.__version__} and PyTorch {torch.__version__}")
    for policy, rows in found.items():
        for name, row in rows.items():
            print(f"{name}, {policy}: {row['keras_steps_per_second']:.2f} and {row['pytorch_steps_per_second']:.2f}, "
                  f"{row['times_as_fast_as_pytorch']:.2f} times as fast")


if __name__ == "__main__":
    main()

"""DCGAN: study S4's as published and the lab's, and how good the fakes are.

Both networks are trained in one ordinary Keras step on any backend: the generator's loss runs through the discriminator
with its weights held fixed, so that one optimizer serves both. Images are uint8 `(n, size, size)`.
"""

import functools
import pathlib
import time

import keras
import numpy as np
from keras import layers, ops
from scipy.spatial import distance
from sklearn import neighbors

from cxr import models, records
from cxr.backup import back_up, restore, state_of
from cxr.data import cache_folder
from cxr.device import compiled_once, copy_state, outputs
from cxr.fitting import Batches
from cxr.objective import Adam

LATENT = 100


def seed_generator(image_size=128):
    """Return study S4's generator: Dense 8·8·128, four transposed convolutions of 128, a 5×5 convolution, tanh."""
    return _generator(image_size, (128,) * _doublings(image_size), smooth=False)


def seed_discriminator(image_size=128):
    """Return study S4's discriminator: five 5×5 convolutions of 128, LeakyReLU 0.2, dropout 0.4; ends in a logit."""
    inputs = x = keras.Input((image_size, image_size, 1))
    for index in range(_doublings(image_size) + 1):
        x = layers.Conv2D(128, 5, strides=2 if index else 1, padding="same")(x)
        x = layers.LeakyReLU(0.2)(x)
    x = layers.Dropout(0.4)(layers.Flatten()(x))
    return keras.Model(inputs, layers.Dense(1, dtype="float32")(x), name="discriminator")


def lab_generator(image_size=128):
    """Return the lab's generator: 32 wide at the image and twice as wide at each halving, with batch normalisation.

    It enlarges smoothly and then convolves, which draws no chequers (Odena et al. 2016).
    """
    return _generator(image_size, [32 << index for index in reversed(range(_doublings(image_size)))], smooth=True)


def lab_discriminator(image_size=128):
    """Return the lab's discriminator: strided convolutions under spectral normalisation (Miyato et al. 2018)."""
    inputs = x = keras.Input((image_size, image_size, 1))
    for index in range(_doublings(image_size)):
        x = layers.SpectralNormalization(layers.Conv2D(min(256, 64 << index), 4, strides=2, padding="same"))(x)
        x = layers.LeakyReLU(0.2)(x)
    x = layers.SpectralNormalization(layers.Dense(1))(layers.Flatten()(x))
    return keras.Model(inputs, layers.Activation("linear", dtype="float32")(x), name="discriminator")


def _doublings(image_size):
    doublings = int(np.log2(image_size // 8))
    if image_size != 8 << doublings or doublings < 1:
        raise ValueError(f"image_size is {image_size}; a DCGAN doubles 8 px, so take 16, 32, 64 or 128.")
    return doublings


def _generator(image_size, widths, smooth):
    inputs = keras.Input((LATENT,))
    x = layers.Reshape((8, 8, 128))(layers.Dense(8 * 8 * 128)(inputs))
    for filters in widths:
        if smooth:
            x = layers.UpSampling2D(interpolation="bilinear")(x)
            x = layers.BatchNormalization(momentum=0.9)(layers.Conv2D(filters, 3, padding="same", use_bias=False)(x))
        else:
            x = layers.Conv2DTranspose(filters, 4, strides=2, padding="same")(x)
        x = layers.LeakyReLU(0.2)(x)
    return keras.Model(inputs, layers.Conv2D(1, 5, padding="same", activation="tanh", dtype="float32")(x),
                       name="generator")


def seed_dcgan(image_size=128, seed=None):
    """Return study S4's GAN with its fault: images in [0, 1] against a generator that ends in tanh, from -1 to 1.

    What it learns to draw lies in [0, 1] too, where the study's classifier meets it; so does ours, by `painter`.
    """
    return GAN(seed_generator(image_size), seed_discriminator(image_size), low=0.0, noise_seed=seed)


def lab_dcgan(image_size=128, seed=None):
    """Return the lab's GAN: images in [-1, 1], spectral normalisation, and the discriminator's view moved about."""
    view = [layers.RandomTranslation(0.1, 0.1, fill_mode="constant", fill_value=-1.0, seed=seed, dtype="float32"),
            layers.RandomBrightness(0.1, value_range=(-1, 1), seed=seed, dtype="float32")]
    return GAN(lab_generator(image_size), lab_discriminator(image_size), view, noise_seed=seed)


@keras.saving.register_keras_serializable("cxr")
class GAN(keras.Model):
    """A generator and a discriminator that learn from each other in one step.

    Args:
        generator, discriminator: of this module.
        augmentation: Keras layers applied to what the discriminator sees, real and fake alike, so that a few hundred
            images are not learnt by heart (Zhao et al. 2020).
        low: what black is for the discriminator: -1 agrees with the generator's tanh; 0 is study S4's fault.
        noise_seed: of the codes drawn in training.
    """

    def __init__(self, generator, discriminator, augmentation=(), low=-1.0, noise_seed=None, **kwargs):
        super().__init__(**kwargs)
        self.generator, self.discriminator = generator, discriminator
        self.view, self.low = models.TrainingOnly(augmentation, dtype="float32"), low
        self.noise = keras.random.SeedGenerator(noise_seed)
        self.generator_loss, self.discriminator_loss = (keras.metrics.Mean(name=name) for name in
                                                        ("generator_loss", "discriminator_loss"))

    def get_config(self):
        """Return what rebuilds the GAN."""
        return {"generator": self.generator, "discriminator": self.discriminator, "augmentation": self.view.stack,
                "low": self.low}

    @classmethod
    def from_config(cls, config):
        """Return the GAN of a `get_config` that was serialized."""
        return cls(**{name: keras.saving.deserialize_keras_object(value) for name, value in config.items()})

    @functools.cached_property
    def painter(self):
        """The generator, its pictures brought to [-1, 1] where black is not -1."""
        if self.low == -1:
            return self.generator
        scale = layers.Rescaling(2 / (1 - self.low), -(1 + self.low) / (1 - self.low), dtype="float32")
        return keras.Model(self.generator.input, scale(self.generator.output), name="painter")

    def call(self, images, training=False):
        """Return both losses for a batch of uint8 images: dict of scalars."""
        real = self.low + (1 - self.low) * ops.cast(images, "float32") / 255
        codes = keras.random.normal((ops.shape(images)[0], LATENT), seed=self.noise)
        fake = self.generator(codes, training=training)
        seen = self.view(ops.concatenate([real, ops.stop_gradient(fake)]), training=training)
        logits = self.discriminator(seen, training=training)
        on_real, on_fake = ops.split(logits, 2)
        held = [ops.stop_gradient(variable.value) for variable in self.discriminator.trainable_variables]
        judged, _ = self.discriminator.stateless_call(
            held, [variable.value for variable in self.discriminator.non_trainable_variables],
            self.view(fake, training=training), training=False)
        return {"generator_loss": ops.mean(ops.softplus(-judged)),
                "discriminator_loss": ops.mean(ops.softplus(-on_real)) + ops.mean(ops.softplus(on_fake))}

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Return the sum of both losses, each of which reaches its own network only, and keep their means."""
        for name, loss in y_pred.items():
            getattr(self, name).update_state(loss)
        return sum(y_pred.values())


class _Progress(keras.callbacks.Callback):
    """After each epoch: losses, fakes of fixed codes now and then, a backup; and a stop where it makes no sense."""

    def __init__(self, folder, every, codes):
        super().__init__()
        self.folder, self.every, self.codes = pathlib.Path(folder), every, codes
        self.history, self.film = {"generator_loss": [], "discriminator_loss": []}, []
        self.began = time.monotonic() - state_of(self.folder).get("seconds", 0.0)

    def on_epoch_end(self, epoch, logs=None):
        for name, values in self.history.items():
            values.append(round(float(logs[name]), 5))
        if not np.isfinite([values[-1] for values in self.history.values()]).all():
            raise RuntimeError(f"Epoch {epoch + 1}: a loss is not a number. Lower the learning rate; the last backup "
                               f"is in {self.folder}.")
        if (epoch + 1) % self.every == 0 or epoch + 1 == self.params["epochs"]:
            fakes = sample(self.model.painter, codes=self.codes)
            if fakes.astype("float32").std(0).mean() < 0.5:
                raise RuntimeError(f"Epoch {epoch + 1}: all fakes are alike (mode collapse). Try another seed.")
            self.film.append(fakes)
        film = np.stack(self.film) if self.film else np.empty(0, "uint8")
        records.save_atomic(lambda path: np.save(path, film), self.folder / "film.npy")
        back_up(self.model, self.folder, epoch + 1, keep=(epoch + 1,), history=self.history, pictures=len(self.film),
                seconds=round(time.monotonic() - self.began, 2))


def fit(model, images, *, epochs, seed, folder, batch_size=64, learning_rate=2e-4, average=None, every=10):
    """Train a `GAN` on uint8 images, going on from the backup in `folder`; return `(history, film)`.

    Args:
        model: uncompiled `GAN`.
        images: uint8 `(n, size, size)`.
        epochs, batch_size, learning_rate: as in Keras; Adam with beta_1 0.5.
        seed: of the order of batches and of the fixed codes.
        folder: of the backup; left for the caller to remove.
        average: momentum of a moving average of the weights, which the model holds in the end, or `None`.
        every: epochs from one picture of the film to the next.

    Returns:
        Per-epoch losses, and the film: uint8 `(pictures, 16, size, size)` of the same sixteen codes.

    Raises:
        ValueError: fewer images than a batch, one image, or constant ones.
        PermissionError: `folder` cannot be written.
        RuntimeError: a loss that is not a number, or all fakes alike.
    """
    if len(images) < batch_size:
        raise ValueError(f"{len(images)} real images are fewer than a batch of {batch_size}: take a smaller batch.")
    if images.std((1, 2)).max() < 1:
        raise ValueError("All images are constant: there is nothing to draw. Check how they were decoded.")
    cache_folder(folder)
    codes = np.random.default_rng(seed).normal(size=(16, LATENT)).astype("float32")
    progress = _Progress(folder, every, codes)
    batches = Batches(images, np.zeros(len(images)), batch_size, seed)
    optimizer = Adam(learning_rate, beta_1=0.5, use_ema=average is not None, ema_momentum=average or 0.99)
    model(images[:2][..., None])
    trained = compiled_once(model, optimizer)
    if state := restore(trained, progress.folder):
        progress.history = state["history"]
        progress.film = list(np.load(progress.folder / "film.npy"))[:state["pictures"]]
    batches.epoch = epoch = state.get("epoch", 0)
    batches.shuffle()
    if epoch < epochs:
        trained.fit(batches, epochs=epochs, initial_epoch=epoch, callbacks=[progress], verbose=2, shuffle=False)
    if average is not None:
        trained.optimizer.finalize_variable_values(trained.trainable_variables)
        rng = np.random.default_rng(0)
        for _ in range(20):  # batch normalisation has never seen the averaged weights' statistics
            trained.generator(rng.normal(size=(64, LATENT)).astype("float32"), training=True)
    copy_state(trained, model)
    return progress.history, np.stack(progress.film)


def sample(generator, count=None, *, seed=0, codes=None):
    """Return fakes, uint8 `(count, size, size)`, of drawn or given codes; `generator` as `GAN.painter`, in [-1, 1]."""
    codes = np.random.default_rng(seed).normal(size=(count, LATENT)).astype("float32") if codes is None else codes
    fakes = outputs(generator, codes)[..., 0]
    return np.uint8(np.round(127.5 * (np.clip(fakes, -1, 1) + 1)))


def kid(real, fake, *, num_subsets=100, size=100, seed=0):
    """Return the kernel inception distance of two sets of features and its standard error over subsets.

    Args:
        real, fake: float `(n, d)`, `(m, d)`.
        num_subsets, size: subsets drawn, and rows in each.

    Source: Bińkowski et al. 2018: unbiased squared MMD, kernel (x·y / d + 1)³.
    """
    rng, size = np.random.default_rng(seed), min(size, len(real), len(fake))
    draws = []
    for _ in range(num_subsets):
        x, y = (rows[rng.choice(len(rows), size, replace=False)] for rows in (real, fake))
        xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        draws.append((xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (size * (size - 1)) - 2 * xy.mean())
    return float(np.mean(draws)), float(np.std(draws, ddof=1) / np.sqrt(num_subsets))


def density_and_coverage(real, fake, k=5):
    """Return how often fakes lie near reals, and which share of reals has a fake near it (Naeem et al. 2020)."""
    k = min(k, len(real) - 1)
    reals = neighbors.NearestNeighbors(n_neighbors=k + 1).fit(real)
    radius = reals.kneighbors(real)[0][:, -1]
    inside = distance.cdist(real, fake) < radius[:, None]
    return float(inside.sum() / (k * len(fake))), float(inside.any(1).mean())


def memorisation(train, held_out, fake):
    """Return the median distance of fakes to their nearest training image, over that of held-out real images.

    Well below 1: fakes are copies. Features or pixels, float `(n, d)`.
    """
    nearest = neighbors.NearestNeighbors(n_neighbors=1).fit(train)
    near = [np.median(nearest.kneighbors(rows)[0]) for rows in (fake, held_out)]
    return float(near[0] / near[1])


def fid(real, fake):
    """Return the Fréchet distance of two sets of features as Gaussians; it shrinks with n, so state n beside it.

    Source: Heusel et al. 2017.
    """
    (mean, cov), (other, other_cov) = ((rows.mean(0), np.cov(rows, rowvar=False)) for rows in (real, fake))
    root = np.sqrt(np.clip(np.linalg.eigvals(cov @ other_cov).real, 0, None)).sum()
    return float(((mean - other) ** 2).sum() + np.trace(cov) + np.trace(other_cov) - 2 * root)


def spread(real, fake):
    """Return the mean distance between two fakes over that between two reals: 1 as varied, 0 all alike."""
    return float(distance.pdist(fake[:500]).mean() / distance.pdist(real[:500]).mean())

"""Networks from image to image: study S0's autoencoder, ones with a true bottleneck, and a U-Net that outlines.

They take uint8 or float images `(batch, size, size, 1)` in [0, 255] and return maps in [0, 1] of the same size.
"""

import keras
import numpy as np
from keras import layers, ops

from cxr.device import compiled_once, copy_state, outputs
from cxr.models import image_input
from cxr.objective import Adam


def seed_autoencoder(image_size=150):
    """Return study S0's autoencoder as published: its code has more numbers than the image, so nothing is squeezed.

    Takes images in [0, 255] and returns them rebuilt in [0, 1].
    """
    inputs, x = image_input(image_size, ())
    for _ in range(2):
        x = layers.Conv2D(32, 3, padding="same", activation="relu")(x)
        x = layers.MaxPooling2D(padding="same")(x)
    for _ in range(2):
        x = layers.Conv2D(32, 3, padding="same", activation="relu")(x)
        x = layers.UpSampling2D()(x)
    extra = x.shape[1] - image_size
    x = layers.Cropping2D(((extra // 2, extra - extra // 2),) * 2)(x) if extra else x
    return keras.Model(inputs, layers.Conv2D(1, 3, padding="same", activation="sigmoid")(x), name="seed_autoencoder")


@keras.saving.register_keras_serializable("cxr")
class Sampling(layers.Layer):
    """Draw a code from `[mean, log variance]` while training (its mean otherwise), and add the KL term to the loss.

    Source: Kingma and Welling 2014.
    """

    def __init__(self, weight=1e-3, seed=None, **kwargs):
        super().__init__(**kwargs)
        self.weight, self.seed = weight, seed
        self.generator = keras.random.SeedGenerator(seed)

    def call(self, inputs, training=False):
        """Return the code, float `(batch, latent)`."""
        mean, log_variance = inputs
        kl = -0.5 * ops.mean(ops.sum(1 + log_variance - ops.square(mean) - ops.exp(log_variance), axis=-1))
        self.add_loss(self.weight * kl)
        if not training:
            return mean
        return mean + ops.exp(0.5 * log_variance) * keras.random.normal(ops.shape(mean), seed=self.generator)

    def get_config(self):
        """Return what rebuilds the layer."""
        return super().get_config() | {"weight": self.weight, "seed": self.seed}


def autoencoder(image_size=64, latent=64, *, corruption=(), variational=False):
    """Return an autoencoder with a true bottleneck of `latent` numbers.

    Args:
        image_size: side in pixels, a multiple of 16.
        latent: length of the code.
        corruption: Keras layers that act on the input while training only (a denoising or masked autoencoder).
        variational: draw the code and pull it towards a normal distribution.
    """
    if image_size % 16:
        raise ValueError(f"image_size is {image_size}; four halvings need a multiple of 16.")
    inputs, x = image_input(image_size, corruption)
    for filters in (16, 32, 64, 64):
        x = layers.Conv2D(filters, 3, strides=2, padding="same", activation="relu")(x)
    shape = x.shape[1:]
    x = layers.Flatten()(x)
    code = layers.Dense(latent, name="code")(x)
    if variational:
        code = Sampling()([code, layers.Dense(latent, kernel_initializer="zeros")(x)])
    x = layers.Reshape(shape)(layers.Dense(int(np.prod(shape)), activation="relu")(code))
    for filters in (64, 32, 16):
        x = layers.Conv2DTranspose(filters, 4, strides=2, padding="same", activation="relu")(x)
    x = layers.Conv2DTranspose(1, 4, strides=2, padding="same", activation="sigmoid")(x)
    return keras.Model(inputs, x, name="autoencoder")


def segmenter(image_size=96, augmentation=()):
    """Return a small U-Net: for each pixel the probability that it belongs to what was outlined.

    Args:
        image_size: side in pixels, a multiple of 8.
        augmentation: Keras layers that leave every pixel in its place, such as `augment.exposure_and_sharpness`.

    Source: Ronneberger et al. 2015.
    """
    if image_size % 8:
        raise ValueError(f"image_size is {image_size}; three halvings need a multiple of 8.")

    def block(x, filters):
        for _ in range(2):
            x = layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
            x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
        return x

    inputs, x = image_input(image_size, augmentation)
    skips = []
    for filters in (16, 32, 64):
        skips.append(block(x, filters))
        x = layers.MaxPooling2D()(skips[-1])
    x = block(x, 96)
    for filters, skip in zip((64, 32, 16), skips[::-1], strict=True):
        x = block(layers.Concatenate()([layers.UpSampling2D(interpolation="bilinear")(x), skip]), filters)
    return keras.Model(inputs, layers.Conv2D(1, 1, activation="sigmoid")(x), name="segmenter")


class _Pairs(keras.utils.PyDataset):
    """Shuffled batches of images and targets in [0, 1]: bool masks, or the images themselves."""

    def __init__(self, images, targets, batch_size, seed):
        super().__init__()
        self.images, self.targets = images, images if targets is None else targets
        self.scale = 255 if self.targets.dtype == "uint8" else 1
        self.batch_size, self.rng = batch_size, np.random.default_rng(seed)
        self.on_epoch_end()

    def __len__(self):
        return -(-len(self.images) // self.batch_size)

    def __getitem__(self, index):
        rows = self.order[index * self.batch_size:(index + 1) * self.batch_size]
        return self.images[rows][..., None], self.targets[rows][..., None].astype("float32") / self.scale

    def on_epoch_end(self):
        self.order = self.rng.permutation(len(self.images))


def fit(model, images, targets=None, *, epochs, seed, batch_size=32, learning_rate=1e-3):
    """Train a network of this module and return its history, a dict of per-epoch lists.

    Args:
        model: uncompiled.
        images: uint8 `(n, size, size)`, such as the normal images.
        targets: bool masks of the same shape, or `None` to rebuild the images.
        epochs, batch_size, learning_rate, loss: as in Keras; Adam, whose rate may be a Keras schedule.
        seed: of the order of batches.

    Raises:
        ValueError: no images, or images of another size than the network's.
    """
    if not len(images):
        raise ValueError("There are no normal images to learn from: check the NORMAL folder and the split.")
    check_size(model, images)
    trained = compiled_once(model, Adam(learning_rate), "binary_crossentropy")
    found = trained.fit(_Pairs(images, targets, batch_size, seed), epochs=epochs, verbose=2, shuffle=False)
    copy_state(trained, model)
    return {name: [round(float(value), 6) for value in values] for name, values in found.history.items()}


def check_size(model, images):
    """Raise `ValueError` where the images are not of the size that the network takes."""
    if images.shape[1:3] != model.input_shape[1:3]:
        raise ValueError(f"The images are {images.shape[1:3]} and {model.name} takes {model.input_shape[1:3]}: "
                         "load them at its size.")


def apply(model, images):
    """Return what the network makes of the images, float32 `(n, size, size)` in [0, 1]."""
    check_size(model, images)
    return outputs(model, images[..., None])[..., 0]

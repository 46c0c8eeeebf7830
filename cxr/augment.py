"""Augmentation: twelve strategies as Keras layers in the compiled step, mixing of pairs, and the shifted validation.

Study S1 compared twelve strategies and names five; its list is lost, so these twelve are ours. Layers take and return
float `(batch, size, size, channels)` in [0, 1] and act while training only.
"""

import cv2
import keras
import numpy as np
from keras import layers, ops

from cxr.decode import blurred

MIX_MODES = ("probability", "fixed_lambda", "extra_samples", "cutmix")


@keras.saving.register_keras_serializable("cxr")
class RandomGamma(layers.Layer):
    """Raise each image to a power drawn from [exp(-factor), exp(factor)]: another exposure curve. Keras has none."""

    def __init__(self, factor, seed=None, **kwargs):
        super().__init__(**kwargs)
        self.factor, self.seed = factor, seed
        self.generator = keras.random.SeedGenerator(seed)

    def call(self, images, training=False):
        """Return `images`, changed while training; the floor keeps the gradient at black finite."""
        if not training:
            return images
        exponent = keras.random.uniform((ops.shape(images)[0], 1, 1, 1), -self.factor, self.factor, seed=self.generator)
        return ops.power(ops.maximum(images, 1e-3), ops.cast(ops.exp(exponent), images.dtype))

    def get_config(self):
        """Return what rebuilds the layer."""
        return super().get_config() | {"factor": self.factor, "seed": self.seed}


@keras.saving.register_keras_serializable("cxr")
class RandomBlend(layers.Layer):
    """Blend each image with what `layer` makes of it, at a weight drawn from [0, 1] (for layers that always act)."""

    def __init__(self, layer, seed=None, **kwargs):
        super().__init__(**kwargs)
        self.layer, self.seed = layer, seed
        self.generator = keras.random.SeedGenerator(seed)

    def build(self, input_shape):
        """Build `layer`, which does not change the shape."""
        self.layer.build(input_shape)

    def call(self, images, training=False):
        """Return `images`, blended while training."""
        if not training:
            return images
        weight = keras.random.uniform((ops.shape(images)[0], 1, 1, 1), seed=self.generator)
        changed = ops.cast(self.layer(images), images.dtype)
        return images + ops.cast(weight, images.dtype) * (changed - images)

    def get_config(self):
        """Return what rebuilds the layer."""
        return super().get_config() | {"layer": keras.saving.serialize_keras_object(self.layer), "seed": self.seed}

    @classmethod
    def from_config(cls, config):
        """Return the layer that `get_config` described."""
        return cls(keras.saving.deserialize_keras_object(config.pop("layer")), **config)


_UNIT = {"value_range": (0, 1)}
_EDGE = {"fill_mode": "constant", "fill_value": 0.0}  # black, as outside the collimated field


def _geometry(zoom=(-0.1, 0.1), **edge):
    return [layers.RandomRotation(10 / 360, **edge), layers.RandomTranslation(0.05, 0.05, **edge),
            layers.RandomZoom(zoom, zoom, **edge)]  # height and width apart


# Keras 3 reads one number for RandomContrast as 0 to +30 %, never less contrast, whatever its text says. All published
# networks were trained so; `contrast_both_ways` is what was meant, and notebook 03 compares the two.
def _exposure():
    return [layers.RandomBrightness(0.15, **_UNIT), layers.RandomContrast(0.3, **_UNIT), RandomGamma(0.35)]


def _sharpness():
    return [layers.RandomSharpness((0.2, 0.8), **_UNIT), layers.RandomGaussianBlur((0.0, 1.0), 5, 1.0, **_UNIT)]


# Each entry builds fresh layers. Strengths are mild: a radiographer would accept the result as a chest X-ray.
STRATEGIES = {
    "none": lambda: [],
    "horizontal_flip": lambda: [layers.RandomFlip("horizontal")],
    "rotation": lambda: _geometry(**_EDGE)[:1],
    "shift_zoom": lambda: _geometry(**_EDGE)[1:],
    "brightness": lambda: [layers.RandomBrightness(0.15, **_UNIT)],
    "contrast": lambda: [layers.RandomContrast(0.3, **_UNIT)],
    "gamma": lambda: [RandomGamma(0.35)],
    "clahe": lambda: [RandomBlend(layers.ContrastLimitedAdaptiveHistogramEqualization((0, 1), 2.0))],
    "blur_sharpness": _sharpness,
    "noise": lambda: [layers.GaussianNoise(0.03)],
    "random_erasing": lambda: [layers.RandomErasing(0.5, scale=(0.02, 0.15), **_UNIT)],
    "all_combined": lambda: [layers.RandomFlip("horizontal"), *_geometry(**_EDGE), *_exposure(), *_sharpness(),
                             layers.GaussianNoise(0.03), layers.RandomErasing(0.5, scale=(0.02, 0.15), **_UNIT)],
}


def acquisition(zoom=(-0.1, 0.1)):
    """Return what another operator and scanner would change: framing, exposure, sharpness; nothing painted or mirrored.

    Height and width are zoomed apart: films of any shape are squeezed to a square here, and the shape may give the
    label away, which a wide `zoom` hides. The edge is repeated rather than black: black corners lower the mean of
    training images, no other image has them, and a network that standardises its input then meets a shift at test time
    that it was taught itself.
    """
    return [*_geometry(zoom, fill_mode="nearest"), *exposure_and_sharpness()]


OTHERS = {"acquisition": acquisition, "aspect_jitter": lambda: acquisition(zoom=(-0.3, 0.2)),
          "contrast_both_ways": lambda: [layers.RandomContrast((0.3, 0.3), **_UNIT)]}


def exposure_and_sharpness():
    """Return the part of `acquisition` that leaves every pixel in its place, as outlines need."""
    return [*_exposure(), *_sharpness()]


BEFOREHAND = {"class_brightness": list, "offline_acquisition": list}  # done to the images, before training


def stack(name):
    """Return fresh layers of the strategy `name`: a key of `STRATEGIES`, of `OTHERS` or, without layers, `BEFOREHAND`.

    Raises:
        ValueError: there is no such strategy.
    """
    known = STRATEGIES | OTHERS | BEFOREHAND
    if name not in known:
        raise ValueError(f"There is no augmentation {name!r}; choose one of {', '.join(known)}.")
    return known[name]()


def copies(images, name):
    """Return one augmented copy of each image, drawn once: offline augmentation, as study S1 did it.

    Args:
        images: uint8 `(n, size, size)`.
        name: see `stack`. The draws come from Keras's global seed (`keras.utils.set_random_seed`).
    """
    layers_of_copy, out = stack(name), np.empty_like(images)
    for start in range(0, len(images), 256):
        part = ops.convert_to_tensor(images[start:start + 256, ..., None] / np.float32(255))
        for layer in layers_of_copy:
            part = layer(part, training=True)
        out[start:start + 256] = np.round(255 * np.clip(ops.convert_to_numpy(part)[..., 0], 0, 1))
    return out


def _check_ratio(mode, ratio):
    if mode not in MIX_MODES:
        raise ValueError(f"Mixing mode is {mode!r}; choose one of {', '.join(MIX_MODES)}.")
    if not 0 <= ratio <= 1:
        raise ValueError(f"Mixing ratio is {ratio}; it must lie in [0, 1].")


def mix(images, labels, mode, ratio, *, seed):
    """Mix pairs within a batch. Study S3 says "30 %" and not of what, so its three readings are the three modes.

    Args:
        images: uint8 `(batch, size, size, 1)`, two at least.
        labels: float `(batch, 1)` in [0, 1].
        mode: `probability`: the batch is mixed with probability `ratio` (Keras's `MixUp`, alpha 0.2);
            `fixed_lambda`: every image becomes `(1 - ratio)` of itself and `ratio` of a partner;
            `extra_samples`: `ratio * batch` mixed images (Keras's `MixUp`) are added to the batch;
            `cutmix`: the batch goes through Keras's `CutMix` with probability `ratio`.
        ratio: in [0, 1].
        seed: int or list of ints; the same seed mixes the same way.

    Returns:
        `(images, labels)`, float32 in [0, 255] and float32 in [0, 1], on the host.

    Raises:
        ValueError: unknown mode, ratio outside [0, 1], or a batch of one.

    Source: Zhang et al. 2018 (mixup); Yun et al. 2019 (CutMix); study S3.
    """
    _check_ratio(mode, ratio)
    if len(images) < 2:
        raise ValueError("Mixing needs at least two images a batch; got one.")
    rng = np.random.default_rng(seed)
    images, labels = images.astype("float32"), labels.astype("float32")
    if mode == "fixed_lambda":
        partner = rng.permutation(len(images))
        return tuple((1 - ratio) * part + ratio * part[partner] for part in (images, labels))
    if mode != "extra_samples" and rng.random() >= ratio:
        return images, labels
    layer_seed = int(rng.integers(2**31))
    options = {"seed": layer_seed, "dtype": "float32"}  # whatever the network computes in
    layer = layers.CutMix(**options) if mode == "cutmix" else layers.MixUp(alpha=0.2, **options)
    mixed = layer({"images": images, "labels": labels}, training=True)
    mixed = [ops.convert_to_numpy(mixed[name]) for name in ("images", "labels")]
    if mode != "extra_samples":
        return tuple(mixed)
    count = round(ratio * len(images))
    return tuple(np.concatenate([part, new[:count]]) for part, new in zip((images, labels), mixed, strict=True))


def class_brightness(images, labels, *, seed, swap=False):
    """Return uint8 images with study S1's label-dependent brightness: normal brighter, pneumonia darker.

    This paints the label into the picture, and is here to show that it does. NORMAL gains 0.05–0.15 of the range,
    PNEUMONIA loses as much; `swap` exchanges the two.

    Args:
        images: uint8 `(n, size, size)`.
        labels: 0/1 int `(n,)`.
        seed: int.
        swap: exchange the two shifts.
    """
    strength = np.random.default_rng(seed).uniform(0.05, 0.15, len(images)) * 255
    sign = np.where((np.asarray(labels) == 1) ^ swap, -1, 1)
    return np.clip(images + (sign * strength)[:, None, None], 0, 255).astype("uint8")


def shift_validation(images, *, seed, copies=3):
    """Return shifted copies of validation images: other sharpness, exposure, contrast and scale, drawn once.

    Validation from the same source as the training images is nearly saturated here and cannot rank recipes. This fixed
    family, defined before the test set was looked at, stands for another scanner.

    Args:
        images: uint8 `(n, size, size)`.
        seed: of the fixed draws.
        copies: shifted copies of each image.

    Returns:
        `(shifted, source)`: uint8 `(n * copies, size, size)` and the int row of `images` that each came from.
    """
    rng = np.random.default_rng(seed)
    source = np.repeat(np.arange(len(images)), copies)
    return np.stack([_shift(images[row], rng) for row in source]) if len(source) else images, source


def stretch(images, *, seed):
    """Return uint8 images `(n, size, size)` with height and width scaled apart, each by 0.67 to 1.49, edges repeated.

    Films were squeezed to a square, so each shape is one that some film might have had. A score that falls here has
    been reading the shape.
    """
    zooms = np.exp(np.random.default_rng(seed).uniform(-0.4, 0.4, (len(images), 2)))
    return np.stack([_scaled(image, *zoom) for image, zoom in zip(images, zooms, strict=True)])


def _scaled(image, zoom_x, zoom_y):
    size = image.shape[0]
    matrix = np.array([[zoom_x, 0, size / 2 * (1 - zoom_x)], [0, zoom_y, size / 2 * (1 - zoom_y)]])
    return cv2.warpAffine(image, matrix, (size, size), borderMode=cv2.BORDER_REPLICATE)


def _shift(image, rng):
    x = _scaled(image, *rng.uniform(0.88, 1.12, 2)).astype("float32") / 255
    x = x + rng.uniform(-1, 1) * (x - blurred(x, 1 / 96))
    x = np.clip((x - x.mean()) * rng.uniform(0.75, 1.25) + x.mean() + rng.uniform(-0.1, 0.1), 0, 1)
    return np.round(255 * x ** np.exp(rng.uniform(-0.35, 0.35))).astype("uint8")

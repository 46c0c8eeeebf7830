"""Networks of `keras.applications` on grey X-rays: pretrained or not, and how much of them is trained."""

import hashlib
import os
import pathlib
import shutil

import keras
import numpy as np
from keras import layers

from cxr import augment, models
from cxr.device import blueprint, in_windows
from cxr.records import save_atomic

STRATEGIES = ("frozen", "partial", "full")

# Of each backbone: its function and options, the scaling that its weights expect (scale, offset of [0, 255]), and the
# first layer of its last two stages, from where `partial` trains.
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_TORCH = ([1 / (255 * std) for std in _IMAGENET_STD],
          [-mean / std for mean, std in zip(_IMAGENET_MEAN, _IMAGENET_STD, strict=True)])
_CAFFE = (1.0, [-103.939, -116.779, -123.68])  # blue, green, red, which are equal here but for their means
_INSIDE = (1.0, 0.0)  # these networks scale their input themselves
BACKBONES = {
    "efficientnet_b0": ("EfficientNetB0", {}, _INSIDE, "block6a_expand_conv"),
    "densenet_121": ("DenseNet121", {}, _TORCH, "conv4_block1_0_bn"),
    "convnext_tiny": ("ConvNeXtTiny", {}, _INSIDE, "convnext_tiny_downsampling_block_1"),
    "resnet_50": ("ResNet50", {}, _CAFFE, "conv4_block1_1_conv"),
    "mobilenet_v2": ("MobileNetV2", {"alpha": 0.35}, (1 / 127.5, -1.0), "block_13_expand"),
}


def backbone(name, image_size, weights):
    """Return a `keras.applications` network without its top, ending in globally pooled features.

    Args:
        name: a key of `BACKBONES`, or the name of any function of `keras.applications`, such as `Xception`.
        image_size: side of the square image in pixels, 32 at least.
        weights: `imagenet`, the path of a Keras weights file, or `None` for random ones. Without a network, put the
            file into `$KERAS_HOME/models`, or into a folder and its path into `CXR_WEIGHTS`.

    Raises:
        ValueError: unknown network, image too small, or weights of another network.
        OSError: the weights could not be fetched, or the file is damaged.
    """
    function, options, *_ = BACKBONES.get(name, (name, {}))
    if not hasattr(keras.applications, function):
        raise ValueError(f"There is no network {name!r}; choose one of {', '.join(BACKBONES)}, or the name of a "
                         "function of keras.applications.")
    if image_size < 32:
        raise ValueError(f"Images of {image_size} px are too small for {name}: five halvings need 32 at least.")
    # Any size at building: Keras would otherwise look for MobileNet weights of just this size, and they are the same.
    build = dict(include_top=False, pooling="avg", input_shape=(None, None, 3), **options)
    network = getattr(keras.applications, function)
    if weights is None:
        return network(weights=None, **build)
    path = _weights_file(weights)
    try:
        return network(weights=str(path or weights), **build)
    except ValueError as error:
        raise ValueError(f"The weights {path or weights} do not fit {name}: {error}") from error
    except Exception as error:  # keras.utils.get_file raises a bare Exception when a download fails or a hash differs
        raise OSError(f"The weights {path or weights} of {name} cannot be had ({error}). Connect once, put the file "
                      "into $KERAS_HOME/models or its folder into CXR_WEIGHTS, or take weights=None.") from error


def _weights_file(weights):
    """Return the local file of `weights`, or `None` where Keras is to find them under their name."""
    if weights == "imagenet":
        return None
    folders = ["", os.environ.get("CXR_WEIGHTS", "")]
    found = next((path for path in (pathlib.Path(folder, weights) for folder in folders) if path.is_file()), None)
    if found is None:
        raise OSError(f"The weights file {weights} does not exist, here or in CXR_WEIGHTS; take weights='imagenet', "
                      "weights=None or the path of a Keras weights file.")
    return found


def build(name, strategy, image_size, augmentation=(), *, weights="imagenet", domain=None):
    """Return a network for one probability on a backbone, with as much of it trainable as `strategy` says.

    BatchNorm of frozen layers runs in inference mode. Trained ones forget faster than Keras's 0.99 and 0.999, which lag
    more than an epoch of a set this small behind.

    Args:
        name: see `backbone`.
        strategy: `frozen` (the classifier alone), `partial` (the last two stages and the classifier), or `full`.
        image_size: side of the square image in pixels.
        augmentation: list of Keras layers, see `models`.
        weights: see `backbone`.
        domain: `(mean, std)` of the grey levels in [0, 1] to standardise with in place of ImageNet's, or `None`.

    Raises:
        ValueError: unknown strategy, or one that this backbone has no stages for; and as `backbone`.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"Strategy is {strategy!r}; choose one of {', '.join(STRATEGIES)}.")
    if strategy == "partial" and name not in BACKBONES:
        raise ValueError(f"Where the last two stages of {name} begin is not known; add it to transfer.BACKBONES.")
    network = backbone(name, image_size, weights)
    trainable = {"full": 0, "frozen": len(network.layers)}.get(strategy)
    if trainable is None:
        trainable = [layer.name for layer in network.layers].index(BACKBONES[name][3])
    for index, layer in enumerate(network.layers):
        layer.trainable = index >= trainable
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = 0.9
    inputs, x = models.image_input(image_size, augmentation, channels=3)
    if domain:  # what the network takes for an image of ImageNet's mean and deviation is one of this domain's
        mean, std = domain
        scale = np.array(_IMAGENET_STD) / std
        x = layers.Rescaling(scale.tolist(), (_IMAGENET_MEAN - mean * scale).tolist(), name="domain")(x)
    _, _, (scale, offset), _ = BACKBONES.get(name, (name, {}, _INSIDE, None))
    x = layers.Rescaling(scale, offset)(layers.Rescaling(255.0)(x))
    x = network(x, training=False) if strategy == "frozen" else network(x)  # no drop path in what is not trained
    return models.classifier(inputs, layers.Dropout(0.3)(x), name)


def is_stored(recipe):
    """Return whether the frozen part of a `fitting.Recipe` sees the same in each epoch, so that once is enough."""
    acts_at_each_step = recipe.mixing is not None or augment.stack(recipe.augment)
    return recipe.strategy in ("frozen", "partial") and not acts_at_each_step


def nested(model):
    """Return `(place, network)`: the backbone inside a `build` model and its index among the layers, else `None`s."""
    return next(((place, layer) for place, layer in enumerate(model.layers) if isinstance(layer, keras.Model)),
                (None, None))


def split(model, strategy):
    """Return `(body, tail)`: what a `build` model never changes, and what it trains; both share its layers.

    Args:
        model: of `build`, without augmentation (which would change the input of the body at every step).
        strategy: `frozen` or `partial`, as the model was built.

    Returns:
        `keras.Model` from images to the activations at the cut, and one from there to the probability.
    """
    place, network = nested(model)
    features = model.layers[place + 1].input
    head = keras.Model(features, model.output)
    if strategy == "frozen":
        return keras.Model(model.input, features), head
    cut = network.get_layer(BACKBONES[model.name][3]).input
    start = keras.Model(network.input, cut)
    if start.trainable_weights:
        raise ValueError(f"{model.name} trains layers before its cut; was it built with another strategy?")
    body = keras.Model(model.input, start(model.layers[place - 1].output, training=False))
    activations = keras.Input(body.output.shape[1:], name="activations")
    return body, keras.Model(activations, head(keras.Model(cut, network.output)(activations)), name=model.name)


def run_once(body, images, folder):
    """Return what `body` puts out for each image, computed once for this network and these images and memory-mapped.

    Pooled features are stored in float16, which moves a linear classifier's probability by about 1e-5. Feature maps
    stay in float32: the batch normalisation that is trained behind them would make more of the difference.

    Args:
        body: of `split`.
        images: uint8 `(n, size, size)`.
        folder: where the arrays lie.

    Returns:
        float `(n, …)`, read-only, on disk: it may be larger than the memory.

    Raises:
        OSError: too little room in `folder`; nothing is left behind.
    """
    digest = hashlib.sha256(np.ascontiguousarray(images))
    digest.update(blueprint(body).encode())
    for weight in body.get_weights():
        digest.update(np.ascontiguousarray(weight))
    path = pathlib.Path(folder) / f"{digest.hexdigest()[:24]}.npy"
    if not path.exists():
        _store(body, images, path)
    return np.load(path, mmap_mode="r")


def _store(body, images, path):
    shape = (len(images), *body.output.shape[1:])
    dtype = np.dtype("float16" if len(shape) == 2 else "float32")
    path.parent.mkdir(parents=True, exist_ok=True)
    wanted, free = int(np.prod(shape)) * dtype.itemsize, shutil.disk_usage(path.parent).free
    if wanted > 0.9 * free:
        raise OSError(f"The activations need {wanted / 1e9:.1f} GB in {path.parent} and {free / 1e9:.1f} GB are free. "
                      "Make room, take smaller images, or train with augmentation, which stores nothing.")

    def write(place):
        stored = np.lib.format.open_memmap(place, "w+", dtype, shape)
        progress = keras.utils.Progbar(len(images), unit_name="image")
        for window, found in in_windows(body, images[..., None]):
            stored[window] = found
            progress.update(window.stop)
        stored.flush()

    save_atomic(write, path)

"""Where a network looks: Grad-CAM and occlusion, and whether a map falls on what it should.

Maps are float32 `(n, size, size)` in [0, 1] of the size of the images. A map says where the score comes from, not why;
so this module also scores maps against masks, and `randomised` gives the network whose map should be worth nothing.
"""

import functools

import cv2
import keras
import numpy as np
import pandas as pd
from keras import ops
from scipy import special, stats
from sklearn import metrics

from cxr import decode, transfer
from cxr.device import outputs, predict


def grad_cam(model, images, *, label=1):
    """Return the Grad-CAM map of each image: which places of the last feature map speak for `label`.

    The network is cut at its last feature map, also inside a nested backbone, and the *logit* is differentiated: behind
    a saturated sigmoid every gradient is zero.

    Args:
        model: network of `models` or `transfer`, ending in `logit` and a sigmoid.
        images: uint8 `(n, size, size)`.
        label: 1 explains pneumonia, 0 normal.

    Returns:
        Maps, each divided by its own maximum; all zero where nothing speaks for `label`.

    Source: Selvaraju et al. 2017.
    """
    return explained(model, images, label=label)[2]


def explained(model, images, *, label=1):
    """Return `(probability, features, maps)` from one pass through the network.

    Args:
        model, images, label: as of `grad_cam`.

    Returns:
        Probability of pneumonia, float `(n,)`; what the layer `logit` reads, float `(n, m)`; maps as of `grad_cam`.
    """
    body, tail = _at_last_map(model)
    parts = []
    for start in range(0, len(images), 64):
        features = ops.convert_to_tensor(body.predict_on_batch(images[start:start + 64][..., None]))
        logit, pooled, gradient = _gradient(tail, features)
        weight = gradient.mean((1, 2), keepdims=True) * (1 if label else -1)
        parts.append((logit[:, 0], pooled, np.maximum((weight * ops.convert_to_numpy(features)).sum(-1), 0)))
    logit, pooled, maps = (np.concatenate(part) for part in zip(*parts, strict=True))
    size = images.shape[1]
    heat = ops.convert_to_numpy(ops.image.resize(maps[..., None], (size, size)))[..., 0]
    return special.expit(logit.astype("float64")), pooled, _scaled(heat)


def _scaled(heat):
    """Return non-negative maps divided each by its maximum."""
    largest = heat.max((1, 2), keepdims=True)
    return np.divide(heat, largest, out=np.zeros_like(heat, "float32"), where=largest > 0)


@functools.lru_cache(maxsize=1)  # many calls with one model: Keras compiles each new network once
def _at_last_map(model):
    """Return the network up to its last feature map, and from there to the logit and what it reads; layers shared."""
    logit = model.get_layer("logit")
    ends = [logit.output, logit.input]
    place, network = transfer.nested(model)
    if network is None:
        features = _last_map(model)
        return keras.Model(model.input, features), keras.Model(features, ends)
    features = _last_map(network)
    start, end = keras.Model(network.input, features), keras.Model(features, network.output)
    body = keras.Model(model.input, start(model.layers[place - 1].output))
    inputs = keras.Input(body.output.shape[1:])
    return body, keras.Model(inputs, keras.Model(model.layers[place + 1].input, ends)(end(inputs)))


def _last_map(network):
    """Return the last tensor of `network` that still has two spatial axes."""
    found = [layer.output for layer in network.layers if len(layer.output.shape) == 4]
    if not found:
        raise ValueError(f"{network.name} has no feature map with two spatial axes: Grad-CAM needs a convolution.")
    return found[-1]


def _gradient(tail, features):
    """Return the tail's outputs and d logit / d features as arrays: the one place where a backend must be named."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(features)
            logit, pooled = tail(features, training=False)
            total = ops.sum(logit)
        return logit.numpy(), pooled.numpy(), tape.gradient(total, features).numpy()
    if backend == "jax":
        import jax

        def total(x):
            logit, pooled = tail.stateless_call(*weights, x, training=False)[0]
            return logit.sum(), (logit, pooled)

        weights = tail.trainable_variables, tail.non_trainable_variables
        gradient, outputs = jax.grad(total, has_aux=True)(features)
        return *map(np.asarray, outputs), np.asarray(gradient)
    raise ValueError(f"Grad-CAM needs TensorFlow or JAX and KERAS_BACKEND is {backend!r}; occlusion runs anywhere.")


def occlusion(model, images, *, label=1, share=0.15):
    """Return the occlusion map of each image: how much the logit drops when a square patch is painted grey.

    Slower than `grad_cam` by the number of patches, but it needs no gradient, no layer and no assumption.

    Args:
        model: network ending in `logit` and a sigmoid.
        images: uint8 `(n, size, size)`.
        label: 1 explains pneumonia, 0 normal.
        share: side of the patch as a share of the image; patches overlap by half.

    Returns:
        Maps as of `grad_cam`. The patch takes the image's own mean, the least conspicuous constant.

    Source: Zeiler and Fergus 2014.
    """
    to_logit = keras.Model(model.input, model.get_layer("logit").output)
    size = images.shape[1]
    side = max(2, round(share * size))
    starts = np.unique(np.linspace(0, size - side, int(np.ceil(2 * (size - side) / side)) + 1).round().astype(int))
    places = [np.s_[top:top + side, left:left + side] for top in starts for left in starts]
    heat = np.zeros(images.shape, "float32")
    for image, out in zip(images, heat, strict=True):
        painted = np.repeat(image[None], len(places) + 1, axis=0)
        for copy, place in zip(painted[1:], places, strict=True):
            copy[place] = round(float(image.mean()))
        whole, *hidden = outputs(to_logit, painted[..., None])[:, 0] * (1 if label else -1)
        count = np.zeros_like(out)
        for value, place in zip(hidden, places, strict=True):
            out[place] += max(float(whole - value), 0)
            count[place] += 1
        out /= np.maximum(count, 1)
    return _scaled(heat)


def randomised(model, seed=0):
    """Return the same network with fresh random weights: a map that survives this does not depend on what was learnt.

    Source: Adebayo et al. 2018.
    """
    keras.utils.set_random_seed(seed)
    return keras.models.clone_model(model)


def centre_blob(images):
    """Return a Gaussian in the middle for each image: the map that a lesion-blind method should not be below."""
    size = images.shape[1]
    distance = (np.arange(size) - (size - 1) / 2) / (size / 4)
    blob = np.exp(-(distance[:, None] ** 2 + distance**2) / 2).astype("float32")
    return np.repeat(blob[None], len(images), axis=0)


def pointing(heat, mask):
    """Return the share of one map's maxima that lie inside its mask; a blank map points anywhere."""
    return mask[heat >= heat.max()].mean()


def localisation(heat, masks):
    """Return how well each map falls on its mask, as a DataFrame with one row a map whose mask is not empty.

    Args:
        heat: float `(n, size, size)`, 0 at least.
        masks: bool `(n, size, size)`, such as the lesion masks of `phantom.masks`.

    Returns:
        Columns `pointing` (share of the map's maxima inside the mask; a blank map points anywhere), `energy` (share of
        the map inside), `average_precision` (of the pixels) and `chance` (share of the image that the mask covers,
        which is what all three give for a map that knows nothing).

    Source: Zhang et al. 2018 (pointing game); Wang et al. 2020 (energy).
    """
    rows = []
    for index in np.flatnonzero(masks.any((1, 2))):
        one, mask = heat[index].astype("float64"), masks[index].astype(bool)
        one = one if one.max() > 0 else np.ones_like(one)
        rows.append({"image": index, "pointing": pointing(one, mask), "energy": one[mask].sum() / one.sum(),
                     "average_precision": metrics.average_precision_score(mask.ravel(), one.ravel()),
                     "chance": mask.mean()})
    return pd.DataFrame(rows, columns=["image", "pointing", "energy", "average_precision", "chance"]).set_index("image")


def agreement(heat, other):
    """Return the rank correlation of each map with another of the same image, float `(n,)`.

    It is 0 where the other is blank, and NaN where the map itself is: of nothing it cannot be told what it depends on.
    """
    pairs = zip(heat.reshape(len(heat), -1), other.reshape(len(other), -1), strict=True)
    return np.array([np.nan if np.ptp(one) == 0 else stats.spearmanr(one, two).statistic if np.ptp(two) > 0 else 0.0
                     for one, two in pairs])


def faithfulness(model, images, heat, *, steps=8):
    """Return the mean probability while the places of a map are blurred, and while they are restored, highest first.

    Args:
        model: network of `models` or `transfer`.
        images: uint8 `(n, size, size)`.
        heat: float maps of the same shape.
        steps: equal shares of the image.

    Returns:
        `(deletion, insertion)`, float `(n,)` each: a map that finds what the network uses has a low deletion and a high
        insertion. What is hidden is strongly blurred, which is closer to an X-ray than grey is.

    Source: Petsiuk et al. 2018 (deletion and insertion).
    """
    stages = []
    for index, (image, one) in enumerate(zip(images, heat, strict=True)):
        blurred = decode.blurred(image, 1 / 10)
        noise = np.random.default_rng(index).random(one.size)  # pixels of one value are taken in random order
        rank = np.lexsort((noise, -one.ravel())).argsort().reshape(one.shape)
        hidden = np.stack([rank < share * one.size for share in np.arange(1, steps + 1) / (steps + 1)])
        stages += [np.where(hidden, blurred, image), np.where(hidden, image, blurred)]
    found = predict(model, np.concatenate(stages)).reshape(len(images), 2, steps).mean(2)
    return found[:, 0], found[:, 1]


def smooth_noise(images, seed=0):
    """Return maps of smooth noise in [0, 1], blind to the images: what deletion and insertion are compared with."""
    rng, size = np.random.default_rng(seed), images.shape[1]
    return np.stack([cv2.resize(rng.random((6, 6), dtype="float32"), (size, size)) for _ in images])


CRITERIA = {"random weights": "correlation < 0.5", "random labels": "correlation < 0.5",
            "another seed": "correlation ≥ 0.5", "deletion": "margin > 0", "insertion": "margin > 0",
            "mass in lungs": "margin > 0", "finds the lesion": "margin > 0"}
ALIKE = 0.5  # rank correlation from which two maps count as the same


def checks(heat, images, *, model=None, random_weights=None, random_labels=None, again=None, lungs=None, lesions=None):
    """Return what a saliency method passes: dict criterion -> `(value, passed)`; criteria without data are left out.

    Args:
        heat: maps of the method, float `(n, size, size)`.
        images: uint8 `(n, size, size)`, of pneumonia.
        model: network explained, for deletion and insertion: the margin over maps of smooth noise.
        random_weights, random_labels: maps of the method for a network with random weights, and for one trained on
            shuffled labels: must not be like `heat`.
        again: maps for the same network trained from another seed: must be like `heat`.
        lungs: bool masks: share of the map inside, over the share of the image that they cover.
        lesions: bool masks: average precision of the pixels, over that of a blob in the middle of the image.

    Margins pass where their mean lies two standard errors above 0. Maps that are all blank pass no randomisation.

    Source: Adebayo et al. 2018 (randomisation); Arun et al. 2021 (criteria for chest X-rays).
    """
    found = {}
    for name, other in (("random weights", random_weights), ("random labels", random_labels), ("another seed", again)):
        if other is not None:
            alike = agreement(heat, other)
            value = float(alike[~np.isnan(alike)].mean()) if (np.ptp(heat, axis=(1, 2)) > 0).any() else np.nan
            found[name] = value, value >= ALIKE if name == "another seed" else value < ALIKE
    if model is not None:
        ours, noise = (faithfulness(model, images, maps) for maps in (heat, smooth_noise(images)))
        found["deletion"], found["insertion"] = _margin(noise[0] - ours[0]), _margin(ours[1] - noise[1])
    if lungs is not None:
        rows = localisation(heat, lungs)
        found["mass in lungs"] = _margin(rows["energy"] - rows["chance"])
    if lesions is not None:
        ours, blob = (localisation(maps, lesions)["average_precision"] for maps in (heat, centre_blob(images)))
        found["finds the lesion"] = _margin(ours - blob)
    return found


def _margin(values):
    mean, error = float(np.mean(values)), float(np.std(values) / np.sqrt(len(values)))
    return mean, mean > 2 * error

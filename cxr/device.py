"""How a network runs on the device at hand: precision, compilation, seeds, and batches outside training."""

import concurrent.futures
import contextlib
import functools
import gc
import json
import pathlib
import re
import unittest.mock

import joblib
import keras
import numpy as np
from keras import ops

gc.freeze()  # a million objects of these imports never die: who collects garbage after each run need not visit them

_kept = {}  # the last models of `compiled_once`, by what they were compiled for; the latest last
_KEEP = 4  # as many kinds of networks take turns in a notebook
_LENGTHS = "decay_steps", "warmup_steps"  # what Keras's schedules call them


def _let_input_end_with_its_epoch():
    """Have the batches that Keras asks a `PyDataset` for end at once, without TensorFlow's tuner of input pipelines.

    There is nothing to tune here. The tuner sleeps, each time twice as long (… 2.6, 5.1, 10.2 s after the start), and
    one fit in three or so waits for it to wake up: a fit of six seconds then takes ten. There is no public switch.
    """
    import tensorflow as tf
    from keras.src.trainers.data_adapters.py_dataset_adapter import PyDatasetAdapter

    tuned = PyDatasetAdapter.get_tf_dataset

    def untuned(adapter):
        options = tf.data.Options()
        options.autotune.enabled = False
        return tuned(adapter).with_options(options)

    PyDatasetAdapter.get_tf_dataset = untuned


if keras.backend.backend() == "tensorflow":
    _let_input_end_with_its_epoch()


def on_cpu():
    """Return whether Keras sees no device but processors."""
    return all(name.startswith("cpu") for name in keras.distribution.list_devices())


def bare_tensorflow():
    """Return whether TensorFlow runs on processors, where nothing joins or compiles what Keras spells out."""
    return keras.backend.backend() == "tensorflow" and on_cpu()


def precision():
    """Return the dtype policy that pays: bfloat16 where the device multiplies it in hardware, else float32.

    Weights stay float32 either way. A processor that has neither AMX nor AVX-512 BF16 is many times slower in bfloat16.
    """
    flags = pathlib.Path("/proc/cpuinfo")
    able = flags.is_file() and re.search("(amx|avx512)_bf16", flags.read_text())
    return "mixed_bfloat16" if able and keras.backend.backend() == "tensorflow" or not on_cpu() else "float32"


def num_devices():
    """Return among how many devices each batch is split: 1, unless a notebook sets `keras.distribution`."""
    distribution = keras.distribution.distribution()
    return distribution.device_mesh.devices.size if distribution else 1


def start_fresh(seed):
    """Forget earlier models, seed Python, NumPy and Keras; keep dtype policy and distribution, which Keras forgets."""
    policy, distribution = keras.config.dtype_policy(), keras.distribution.distribution()
    with _kernels_kept():
        keras.utils.clear_session()
        keras.utils.set_random_seed(seed)
    keras.config.set_dtype_policy(policy)
    keras.distribution.set_distribution(distribution)


def _kernels_kept():
    """Return a context in which TensorFlow does not drop the kernels that it has prepared.

    Clearing a session drops them, and so does setting a seed. The network that a comparison keeps for its next run
    would be prepared again, for as long as two epochs of a smoke run take. Keras draws no numbers from them, and a
    network that goes takes its own along.
    """
    if keras.backend.backend() != "tensorflow":
        return contextlib.nullcontext()
    from tensorflow.python.eager import context  # TensorFlow has no public switch

    return unittest.mock.patch.object(context.pywrap_tfe, "TFE_ContextClearCaches")


def compiled(model, optimizer, loss=None, **options):
    """Compile a built model as this device likes it, and return it.

    The optimizer is built before the first step: variables that are made inside it would have it traced twice.
    """
    _fuse_normalization(model)
    jit = False if bare_tensorflow() else "auto"  # there XLA halves the speed of convolutions; elsewhere Keras knows
    model.compile(optimizer, loss, jit_compile=jit, **options)
    model.optimizer.build(model.trainable_variables)
    return model


def compiled_once(model, optimizer, loss=None, **options):
    """Return a compiled copy of `model` to train: a new one, or one from before that computes the same.

    Runs of a comparison are often one network with other seeds or other data. Tracing its step again for each takes
    longer than many a short training, so the last copies are kept and given the new model's state and the lengths of
    the new schedule. It is the caller's until the next call; what it has learnt goes back to `model` by `copy_state`.
    Arguments are those of `compiled`.
    """
    lengths = _lengths(optimizer)
    about = json.dumps(keras.saving.serialize_keras_object([optimizer, loss, options]))
    about = re.sub(rf'"({"|".join(_LENGTHS)})": [0-9.]+', "", about)
    key = blueprint(model), about, keras.distribution.distribution()
    if key not in _kept:
        optimizer = optimizer.from_config(optimizer.get_config())  # with a schedule of its own
        for name in lengths:  # as variables: a number would be a part of the step
            setattr(optimizer._learning_rate, name, optimizer.add_variable((), name=name))
        _kept[key] = compiled(keras.models.clone_model(model), optimizer, loss, **options)
    trained = _kept[key] = _kept.pop(key)
    while len(_kept) > _KEEP:
        del _kept[next(iter(_kept))]
    copy_state(model, trained)
    for variable in trained.optimizer.variables:
        if not variable.path.endswith("learning_rate"):
            variable.assign(ops.zeros(variable.shape, variable.dtype))
    for name, steps in lengths.items():
        getattr(trained.optimizer._learning_rate, name).assign(steps)
    return trained


def _lengths(optimizer):
    """Return the steps that the phases of an optimizer's schedule take, by name; nothing for a constant rate."""
    schedule = optimizer._learning_rate  # its public twin is the rate of the moment
    return {name: getattr(schedule, name) for name in _LENGTHS if hasattr(schedule, name)}


def copy_state(source, target):
    """Give `target` the weights and random states of `source`, a model of the same layers.

    As copies: JAX gives an array that two models share to the next training, and takes it from the other.
    """
    for theirs, ours in zip(source.variables, target.variables, strict=True):
        ours.assign(ops.copy(theirs))


def _fuse_normalization(model):
    """Give every BatchNormalization over maps of channels TensorFlow's own kernel, where nothing else joins it.

    Keras spells it out in a dozen operations, forward and back, each of which walks over all of the maps: without XLA
    to join them, more than half of a step of MobileNetV2. The layers stay Keras's, and so does what is saved.
    """
    for layer in model.layers if bare_tensorflow() else ():
        if isinstance(layer, keras.Model):
            _fuse_normalization(layer)
        elif type(layer) is keras.layers.BatchNormalization and layer.input_spec.ndim == 4 and layer.axis in (-1, 3):
            layer.call = functools.partial(_normalized, layer)


def _normalized(layer, inputs, training=None, mask=None):
    """Do what `BatchNormalization.call` does; no layer here has a mask or renormalizes."""
    import tensorflow as tf

    maps, learns = tf.cast(inputs, "float32"), bool(training and layer.trainable)
    ones = tf.ones(maps.shape[-1])
    normalized, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=maps, scale=tf.convert_to_tensor(layer.gamma) if layer.scale else ones,
        offset=tf.convert_to_tensor(layer.beta) if layer.center else 0 * ones,
        mean=[] if learns else tf.convert_to_tensor(layer.moving_mean),
        variance=[] if learns else tf.convert_to_tensor(layer.moving_variance),
        epsilon=layer.epsilon, is_training=learns)
    if learns:
        count = tf.cast(tf.size(maps) / maps.shape[-1], "float32")
        variance *= tf.maximum(count - 1, 1) / count  # the kernel estimates a population's, Keras takes the batch's
        for moving, batch in ((layer.moving_mean, mean), (layer.moving_variance, variance)):
            moving.assign(moving * layer.momentum + batch * (1 - layer.momentum))
    return tf.cast(normalized, layer.compute_dtype)


def blueprint(model):
    """Return what `model` computes, but for its weights and random states, as text to compare or hash."""
    return re.sub(r'"seed": \d+', "", model.to_json())


def in_windows(model, inputs):
    """Yield `(slice, outputs)` over `n` inputs, as `model` takes them; the last slice reaches back over its neighbour.

    All are of one length, so that the network is traced once. A processor sees few images at once, so that its caches
    hold what stands between the layers: a quarter to a half less time than 256. One small network does not fill several
    cores, so that a few windows go side by side: a third less time on two.
    """
    size = min(32 if on_cpu() else 256, len(inputs))
    starts = (*range(0, len(inputs) - size, size), len(inputs) - size)
    parts = [slice(start, start + size) for start in starts]
    _fuse_normalization(model)

    def apply(window):
        return window, np.asarray(model.predict_on_batch(np.asarray(inputs[window])))

    yield apply(parts[0])  # alone: it traces the network
    with concurrent.futures.ThreadPoolExecutor(min(4, joblib.cpu_count()) if bare_tensorflow() else 1) as pool:
        for start in range(1, len(parts), 16):  # by handfuls: whoever stores what comes may be slower
            yield from pool.map(apply, parts[start:start + 16])


def outputs(model, inputs):
    """Return what `model` puts out for `n` inputs, as it takes them: float32 `(n, …)`."""
    found = None
    for window, part in in_windows(model, inputs):
        found = np.empty((len(inputs), *part.shape[1:]), "float32") if found is None else found
        found[window] = part
    return found


def predict(model, images):
    """Return the model's score of each image: float64 `(n,)`, for uint8 images `(n, size, size)` or activations."""
    return outputs(model, images[..., None] if images.dtype == "uint8" else images)[:, 0].astype(float)

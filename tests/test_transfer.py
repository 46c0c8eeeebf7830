"""Pretrained networks: what each strategy trains, and errors that say what to do. Random weights: no network here."""

import keras
import numpy as np
import pytest

from cxr import augment, transfer


def trained_parameters(model):
    return sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet_50"])
def test_strategies_train_the_classifier_the_last_stages_or_everything(name):
    models = [transfer.build(name, strategy, 32, weights=None) for strategy in transfer.STRATEGIES]
    frozen, partial, full = map(trained_parameters, models)
    features = models[0].get_layer("logit").input.shape[-1]
    assert frozen == features + 1 < partial < full < models[0].count_params()  # moving averages are never trained


def test_partial_leaves_early_layers_as_they_are_and_changes_late_ones():
    keras.utils.set_random_seed(0)
    model = transfer.build("mobilenet_v2", "partial", 32, weights=None)
    network = next(layer for layer in model.layers if isinstance(layer, keras.Model))
    before = {layer.name: layer.get_weights() for layer in network.layers if layer.get_weights()}
    model.compile("adam", "binary_crossentropy", jit_compile=False)
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 1))
    model.fit(images, np.arange(8) % 2, epochs=1, verbose=0)
    changed = [name for name, weights in before.items()
               if any((old != new).any() for old, new in zip(weights, network.get_layer(name).get_weights(),
                                                             strict=True))]
    assert changed[0] == "block_13_expand" and len(changed) > 5


def test_a_saved_network_gives_the_same_scores(tmp_path):
    model = transfer.build("mobilenet_v2", "full", 32, augment.stack("acquisition"), weights=None)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 1)).astype("uint8")
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras", safe_mode=True)
    np.testing.assert_allclose(again.predict(images, verbose=0), model.predict(images, verbose=0), atol=1e-6)


def test_any_network_of_keras_applications_by_its_name():
    assert transfer.build("MobileNetV3Small", "frozen", 32, weights=None).output_shape == (None, 1)


@pytest.mark.parametrize(("arguments", "words"), [
    (("resnet_51", "full", 64), "choose one of efficientnet_b0"),
    (("mobilenet_v2", "half", 64), "choose one of frozen"),
    (("mobilenet_v2", "full", 16), "too small"),
    (("Xception", "partial", 96), "BACKBONES"),
])
def test_wrong_names_and_sizes_say_what_there_is(arguments, words):
    with pytest.raises(ValueError, match=words):
        transfer.build(*arguments, weights=None)


def test_weights_that_are_missing_or_of_another_network(tmp_path, monkeypatch):
    with pytest.raises(OSError, match="does not exist"):
        transfer.build("mobilenet_v2", "full", 32, weights="nowhere.weights.h5")
    network = transfer.backbone("mobilenet_v2", 32, None)
    network.save_weights(tmp_path / "mine.weights.h5")
    monkeypatch.setenv("CXR_WEIGHTS", str(tmp_path))
    with pytest.raises(ValueError, match="do not fit"):
        transfer.build("resnet_50", "full", 32, weights="mine.weights.h5")
    again = transfer.backbone("mobilenet_v2", 32, "mine.weights.h5")  # found in CXR_WEIGHTS
    np.testing.assert_array_equal(again.get_weights()[0], network.get_weights()[0])
    (tmp_path / "mine.weights.h5").write_bytes(b"not weights")
    with pytest.raises(OSError, match="mine.weights.h5"):
        transfer.build("mobilenet_v2", "full", 32, weights="mine.weights.h5")

"""Pretrained networks: what each strategy trains, and errors that say what to do. Random weights: no network here."""

import keras
import numpy as np
import pytest

from cxr import augment, device, fitting, transfer


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


@pytest.mark.filterwarnings("ignore:Skipping nested container")  # Keras's own words about the same refusal
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


@pytest.mark.parametrize("strategy", ["frozen", "partial"])
def test_training_on_stored_activations_equals_the_plain_fit(strategy, tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (48, 64, 64)).astype("uint8"), np.arange(48) % 2
    images[labels == 1, 20:40, 20:40] //= 2
    recipe = fitting.Recipe("mobilenet_v2", 64, 2, batch_size=16, strategy=strategy, backbone_rate=0.1)
    scores, histories = [], []
    for stored in (False, True):
        keras.utils.set_random_seed(1)
        model = transfer.build("mobilenet_v2", strategy, 64, weights=None)
        part, inputs = model, images
        if stored:
            body, part = transfer.split(model, strategy)
            inputs = transfer.run_once(body, images, tmp_path / "activations")
        history, _ = fitting.fit(part, recipe, inputs, labels, {"val": (inputs, labels)}, seed=0,
                                 folder=tmp_path / f"backup{stored}")
        histories.append(history)
        scores.append(device.predict(model, images))  # the whole network holds what its tail has learnt
    np.testing.assert_allclose(*scores, atol=1e-4)
    np.testing.assert_allclose(histories[0]["loss"], histories[1]["loss"], atol=1e-4)


def test_activations_are_stored_once_and_depend_on_images_weights_and_normalisation(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32)).astype("uint8")

    def body_of(seed, **options):
        device.start_fresh(seed)
        return transfer.split(transfer.build("mobilenet_v2", "frozen", 32, weights=None, **options), "frozen")[0]

    body = body_of(0)
    first = transfer.run_once(body, images, tmp_path)
    np.testing.assert_allclose(first, body.predict(images[..., None], verbose=0), rtol=1e-3, atol=1e-4)
    transfer.run_once(body_of(0), images, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    transfer.run_once(body, images[::-1], tmp_path)
    transfer.run_once(body_of(1), images, tmp_path)
    transfer.run_once(body_of(0, domain=(0.4, 0.3)), images, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_full_disk_is_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(transfer.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    body, _ = transfer.split(transfer.build("mobilenet_v2", "frozen", 32, weights=None), "frozen")
    with pytest.raises(OSError, match="are free"):
        transfer.run_once(body, np.zeros((4, 32, 32), "uint8"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_grey_levels_of_the_domain_arrive_as_those_of_imagenet():
    model = transfer.build("efficientnet_b0", "full", 32, weights=None, domain=(0.3632, 0.3119))
    scaled = keras.Model(model.input, model.get_layer("domain").output)
    grey = np.full((1, 4, 4, 1), 255 * (0.3632 + 0.3119))
    normalised = (keras.ops.convert_to_numpy(scaled(np.repeat(np.repeat(grey, 8, 1), 8, 2)))[0, 0, 0]
                  - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    np.testing.assert_allclose(normalised, 1, atol=1e-4)

"""Maps: right place, right sign, alive behind a saturated sigmoid, and blank where nothing was learnt."""

import keras
import numpy as np
import pytest
from keras import layers

from cxr import explain, models, transfer


def blob_detector(gain):
    """Return a network by hand: the logit grows with what is brighter than grey, by `gain`, and falls by a constant."""
    inputs, x = models.image_input(32, [])
    x = layers.Conv2D(2, 4, strides=4, use_bias=True, activation="relu", name="maps")(x)
    model = models.classifier(inputs, layers.GlobalAveragePooling2D()(x), "blob")
    kernel = np.zeros((4, 4, 1, 2))
    kernel[..., 0], kernel[..., 1] = 1 / 16, -1 / 16  # brighter than 0.5, darker than 0.5
    model.get_layer("maps").set_weights([kernel, np.array([-0.5, 0.5])])
    model.get_layer("logit").set_weights([np.array([[gain], [-gain]]), np.array([0.0])])
    return model


@pytest.fixture
def blobs():
    images, masks = np.full((4, 32, 32), 128, "uint8"), np.zeros((4, 32, 32), bool)
    for index, (row, column) in enumerate([(2, 2), (20, 4), (8, 24), (24, 24)]):
        masks[index, row:row + 6, column:column + 6] = True
    images[masks] = 255
    images[:, 14:18, 14:18] = 0  # what speaks for normal
    return images, masks


@pytest.mark.parametrize("method", [explain.grad_cam, explain.occlusion])
@pytest.mark.parametrize("gain", [1, 5000])  # 5000: the sigmoid is saturated, and its gradient exactly zero
def test_maps_point_at_what_speaks_for_pneumonia(blobs, method, gain):
    images, masks = blobs
    heat = method(blob_detector(gain), images)
    assert heat.shape == images.shape and heat.dtype == np.float32 and heat.min() >= 0
    np.testing.assert_allclose(heat.max((1, 2)), 1)
    found = explain.localisation(heat, masks)
    assert found["pointing"].min() > 0.5 and (found["energy"] > 5 * found["chance"]).all()
    towards_normal = method(blob_detector(gain), images, label=0)
    assert (towards_normal[:, 14:18, 14:18].mean((1, 2)) > 0.4).all() and (towards_normal[masks] < 0.5).all()


def test_grad_cam_is_the_class_activation_map_where_pooling_meets_the_logit():
    keras.utils.set_random_seed(0)
    model = models.lab_cnn(64)
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64)).astype("uint8")
    features = keras.Model(model.input, model.get_layer("pool").input).predict(images[..., None], verbose=0)
    weight = model.get_layer("logit").get_weights()[0][:, 0]
    expected = np.maximum(features @ weight, 0)
    expected = np.asarray(keras.ops.image.resize(expected[..., None], (64, 64)))[..., 0]
    expected = expected / expected.max((1, 2), keepdims=True)
    np.testing.assert_allclose(explain.grad_cam(model, images), expected, atol=1e-4)


@pytest.mark.parametrize("strategy", ["full", "frozen"])
def test_grad_cam_reaches_into_a_nested_backbone(strategy):
    keras.utils.set_random_seed(0)
    model = transfer.build("mobilenet_v2", strategy, 96, weights=None)
    images = np.random.default_rng(0).integers(0, 256, (2, 96, 96)).astype("uint8")
    pneumonia, normal = (explain.grad_cam(model, images, label=label) for label in (1, 0))
    assert pneumonia.shape == (2, 96, 96) and (pneumonia.max((1, 2)) > 0).any()
    assert (pneumonia != normal).any()


def test_randomised_keeps_the_network_and_changes_its_weights():
    model = models.lab_cnn(32)
    other = explain.randomised(model)
    assert [w.shape for w in other.weights] == [w.shape for w in model.weights]
    kernels = [layer.get_weights()[0] for layer in (model.get_layer("logit"), other.get_layer("logit"))]
    assert (kernels[0] != kernels[1]).any()


def test_a_blank_map_and_a_perfect_one_get_what_they_deserve(blobs):
    _, masks = blobs
    perfect, blank = (explain.localisation(heat, masks) for heat in (masks.astype(float), np.zeros(masks.shape)))
    assert (perfect[["pointing", "energy", "average_precision"]] == 1).all(None)
    for column in ("pointing", "energy", "average_precision"):
        np.testing.assert_allclose(blank[column], blank["chance"])
    assert explain.localisation(explain.centre_blob(masks), masks & False).empty


def test_a_network_without_feature_maps_is_refused():
    inputs = keras.Input((8, 8, 1))
    model = models.classifier(inputs, layers.Flatten()(layers.Reshape((64,))(inputs)), "flat")
    with pytest.raises(ValueError, match="needs a convolution"):
        explain._last_map(keras.Model(model.layers[1].output, model.output))


def test_agreement_knows_equal_opposite_and_blank_maps():
    maps = np.random.default_rng(0).random((2, 16, 16)).astype("float32")
    np.testing.assert_allclose(explain.agreement(maps, maps), 1)
    np.testing.assert_allclose(explain.agreement(maps, 1 - maps), -1, atol=1e-6)
    assert (explain.agreement(maps, np.zeros_like(maps)) == 0).all()
    assert np.isnan(explain.agreement(np.zeros_like(maps), maps)).all()


def test_checks_tell_a_true_map_from_one_that_ignores_the_model(blobs):
    images, masks = blobs
    model = blob_detector(20)
    heat = explain.grad_cam(model, images)
    noise = explain.smooth_noise(images)
    true = explain.checks(heat, images, model=model, random_weights=noise, random_labels=noise, again=heat,
                          lungs=masks, lesions=masks)
    assert set(true) == set(explain.CRITERIA) and all(passed for _, passed in true.values()), true
    blob = explain.centre_blob(images)
    false = explain.checks(blob, images, model=model, random_weights=blob, random_labels=blob, lungs=masks)
    assert not any(false[name][1] for name in ("random weights", "random labels", "mass in lungs")), false
    assert false["deletion"][0] < true["deletion"][0] / 3 and "another seed" not in false
    blank = explain.checks(0 * blob, images, random_weights=0 * blob, random_labels=blob, again=0 * blob)
    assert not any(passed for _, passed in blank.values()), "a map that is always the same depends on nothing"

"""Networks: sizes as published, probabilities out, preprocessing inside, and a file that loads in safe mode."""

import keras
import numpy as np
import pytest

from cxr import augment, models


@pytest.mark.parametrize(("build", "size", "count"), [
    (models.resnet18, 180, 11_186_625), (models.seed_cnn, 180, 3_496_801), (models.lab_cnn, 96, 507_897),
    (models.s4_cnn, 128, 4_443_009)])
def test_parameter_counts(build, size, count):
    assert build(size).count_params() == count


@pytest.mark.parametrize("build", [models.seed_cnn, models.lab_cnn, models.resnet18, models.s4_cnn])
def test_probabilities_and_the_logit_behind_them(build):
    keras.utils.set_random_seed(0)  # some random weights are so sure that the sigmoid reaches 1
    model = build(64)
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 1), dtype=np.uint8)
    probability = np.asarray(model(images))
    assert probability.shape == (3, 1) and ((probability > 0) & (probability < 1)).all()
    logit = np.asarray(keras.Model(model.input, model.get_layer("logit").output)(images))
    np.testing.assert_allclose(probability, 1 / (1 + np.exp(-logit)), rtol=1e-5)


def test_lab_cnn_standardises_each_image():
    model = models.lab_cnn(64)
    image = np.random.default_rng(0).integers(50, 150, (1, 64, 64, 1)).astype("float32")
    np.testing.assert_allclose(model(image), model(image * 1.5 + 10), rtol=1e-2)


@pytest.mark.parametrize("strategy", ["none", "all_combined", "clahe"])
def test_saved_model_loads_in_safe_mode(tmp_path, strategy):
    model = models.lab_cnn(32, augment.STRATEGIES[strategy]())
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 1), dtype=np.uint8)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras", safe_mode=True)
    np.testing.assert_allclose(model(images), again(images), rtol=1e-5)

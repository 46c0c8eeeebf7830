"""Augmentation: the twelve strategies, mixing of pairs, label-dependent brightness, the shifted validation."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr import augment


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    smooth = rng.normal(size=(8, 6, 6)).cumsum(1).cumsum(2)
    small = (smooth - smooth.min()) / np.ptp(smooth)
    return np.kron(small, np.ones((6, 6)))[..., None].astype("float32") * 0.8 + 0.1


def test_there_are_twelve_strategies():
    assert len(augment.STRATEGIES) == 12 and next(iter(augment.STRATEGIES)) == "none"


@pytest.mark.parametrize("name", augment.STRATEGIES)
def test_strategy_acts_while_training_only(name, images):
    keras.utils.set_random_seed(1)
    pipeline = augment.STRATEGIES[name]()
    trained, tested = images, images
    for layer in pipeline:
        trained, tested = layer(trained, training=True), layer(tested, training=False)
    np.testing.assert_array_equal(np.asarray(tested), images)
    changed = np.abs(np.asarray(trained) - images).mean()
    assert np.isfinite(changed) and np.asarray(trained).shape == images.shape
    assert (changed == 0) == (name == "none")
    assert np.asarray(trained).min() > -0.3 and np.asarray(trained).max() < 1.3


@pytest.mark.parametrize("name, lowers", [("contrast", False), ("contrast_both_ways", True)])
def test_contrast_goes_the_way_that_notebook_03_says(name, lowers, images):
    keras.utils.set_random_seed(1)
    layer, = augment.stack(name)
    calm = 0.4 + 0.2 * images  # nothing is clipped
    drawn = np.stack([np.asarray(layer(calm, training=True)) for _ in range(8)])
    spread = drawn.std((2, 3, 4)) / calm.std((1, 2, 3))
    assert spread.max() > 1.1 and (spread.min() < 0.9 if lowers else spread.min() >= 0.999)


@pytest.mark.parametrize("mode", augment.MIX_MODES)
@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_mixing_keeps_ranges_and_is_reproducible(mode, ratio):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (10, 8, 8, 1), dtype=np.uint8), (np.arange(10) % 2)[:, None].astype("float32")
    mixed, soft = augment.mix(images, labels, mode, ratio, seed=[0, 1])
    again, _ = augment.mix(images, labels, mode, ratio, seed=[0, 1])
    np.testing.assert_array_equal(mixed, again)
    assert len(mixed) == len(soft) == (10 + round(10 * ratio) if mode == "extra_samples" else 10)
    assert mixed.min() >= 0 and mixed.max() <= 255 and soft.min() >= 0 and soft.max() <= 1
    if ratio == 0:
        np.testing.assert_array_equal(mixed, images.astype("float32"))
        np.testing.assert_array_equal(soft, labels)


@pytest.mark.parametrize("mode", augment.MIX_MODES)
def test_mixing_is_the_same_whatever_the_network_computes_in(mode, monkeypatch):
    images, labels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1), dtype=np.uint8), np.ones((6, 1), "float32")
    expected = augment.mix(images, labels, mode, 1.0, seed=0)
    policy = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy("mixed_bfloat16")
        found = augment.mix(images, labels, mode, 1.0, seed=0)
    finally:
        keras.config.set_dtype_policy(policy)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == "float32"


@given(ratio=st.floats(0, 1), seed=st.integers(0, 2**31))
@settings(max_examples=25)
def test_fixed_lambda_mixes_image_and_label_alike(ratio, seed):
    labels = (np.arange(6) % 2)[:, None].astype("float32")
    images = np.broadcast_to(labels[:, None, None] * 200, (6, 4, 4, 1)).astype("uint8")
    mixed, soft = augment.mix(images, labels, "fixed_lambda", ratio, seed=seed)
    np.testing.assert_allclose(mixed[:, 0, 0], soft * 200, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("probability", 1.2), "must lie in"), (("fixed_lambda", -0.1), "must lie in"), (("mixup", 0.3), "choose one of")],
)
def test_bad_mixing_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        augment.mix(np.zeros((4, 2, 2, 1), np.uint8), np.zeros((4, 1)), *arguments, seed=0)


def test_a_batch_of_one_cannot_be_mixed():
    with pytest.raises(ValueError, match="at least two"):
        augment.mix(np.zeros((1, 2, 2, 1), np.uint8), np.zeros((1, 1)), "probability", 0.3, seed=0)


def test_a_misspelt_strategy_is_named():
    with pytest.raises(ValueError, match="'shift_zom'.*shift_zoom"):
        augment.copies(np.zeros((2, 16, 16), np.uint8), "shift_zom")
    assert augment.stack("offline_acquisition") == []


def test_class_brightness_paints_the_label_and_swaps():
    images, labels = np.full((6, 4, 4), 128, np.uint8), np.array([0, 1, 0, 1, 0, 1])
    painted = augment.class_brightness(images, labels, seed=0).mean((1, 2))
    swapped = augment.class_brightness(images, labels, seed=0, swap=True).mean((1, 2))
    assert (painted[labels == 0] > 138).all() and (painted[labels == 1] < 118).all()
    assert (swapped[labels == 0] < 118).all() and (swapped[labels == 1] > 138).all()


def test_shifted_validation_is_fixed_and_changes_every_image():
    images = np.random.default_rng(0).integers(0, 256, (5, 24, 24), dtype=np.uint8)
    shifted, source = augment.shift_validation(images, seed=0)
    assert shifted.shape == (15, 24, 24) and shifted.dtype == np.uint8
    np.testing.assert_array_equal(source, np.repeat(np.arange(5), 3))
    np.testing.assert_array_equal(shifted, augment.shift_validation(images, seed=0)[0])
    assert all((one != images[row]).any() for one, row in zip(shifted, source, strict=True))


def test_stretched_images_keep_middle_and_type_and_change_their_proportions():
    images = np.zeros((40, 64, 64), np.uint8)
    images[:, 20:44, 20:44] = 200
    stretched = augment.stretch(images, seed=0)
    np.testing.assert_array_equal(stretched, augment.stretch(images, seed=0))
    assert stretched.dtype == np.uint8 and (stretched[:, 31:33, 31:33] == 200).all()
    height, width = (stretched > 100).any(2).sum(1), (stretched > 100).any(1).sum(1)
    assert min(height.min(), width.min()) >= 15 and max(height.max(), width.max()) <= 37
    assert np.abs(np.corrcoef(height, width)[0, 1]) < 0.4 and np.std(np.log(height / width)) > 0.2


def test_aspect_jitter_zooms_height_and_width_apart():
    keras.utils.set_random_seed(0)
    zoom = next(layer for layer in augment.stack("aspect_jitter") if isinstance(layer, keras.layers.RandomZoom))
    box = np.zeros((32, 64, 64, 1), "float32")
    box[:, 20:44, 20:44] = 1
    drawn = keras.ops.convert_to_numpy(zoom(box, training=True))[..., 0] > 0.5
    ratio = drawn.any(2).sum(1) / drawn.any(1).sum(1)
    assert ratio.min() < 0.85 and ratio.max() > 1.15


def test_offline_copies_are_drawn_from_the_global_seed_and_keep_the_type():
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32)).astype("uint8")
    drawn = []
    for _ in range(2):
        keras.utils.set_random_seed(3)
        drawn.append(augment.copies(images, "acquisition"))
    np.testing.assert_array_equal(*drawn)
    assert drawn[0].dtype == np.uint8 and drawn[0].shape == images.shape and (drawn[0] != images).any((1, 2)).all()
    np.testing.assert_array_equal(augment.copies(images, "none"), images)

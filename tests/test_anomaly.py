"""Anomaly scores: networks that rebuild or outline, error maps, paint, thresholds that keep their promise."""

import types

import keras
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from cxr import anomaly, autoencoder, device


@pytest.fixture(scope="module")
def films():
    rng = np.random.default_rng(0)
    rough = rng.normal(size=(24, 8, 8)).cumsum(1).cumsum(2)
    rough = (rough - rough.min((1, 2), keepdims=True)) / np.ptp(rough, axis=(1, 2))[:, None, None]
    return np.uint8(np.kron(rough, np.ones((6, 6))) * 150 + rng.integers(0, 20, (24, 48, 48)))


def test_the_published_network_holds_more_numbers_than_the_image():
    model = autoencoder.seed_autoencoder(150)
    code = min((layer.output.shape for layer in model.layers[3:-3]), key=lambda shape: np.prod(shape[1:]))
    assert code[1:] == (38, 38, 32) and np.prod(code[1:]) > 150 * 150
    assert model.output_shape == (None, 150, 150, 1)


@pytest.mark.parametrize("options", [{}, {"variational": True}, {"corruption": [keras.layers.GaussianNoise(0.1)]}])
def test_autoencoders_learn_and_are_saved(films, options, tmp_path):
    keras.utils.set_random_seed(0)
    model = autoencoder.autoencoder(48, 8, **options)
    history = autoencoder.fit(model, films, epochs=3, seed=0, batch_size=8, learning_rate=3e-3)
    assert history["loss"][-1] < history["loss"][0]
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras", safe_mode=True, compile=False)
    rebuilt = autoencoder.apply(again, films)
    assert rebuilt.shape == films.shape and 0 <= rebuilt.min() <= rebuilt.max() <= 1
    np.testing.assert_allclose(rebuilt, autoencoder.apply(model, films), atol=1e-5)  # no noise, no draws at test time


def test_an_autoencoder_compiled_before_trains_to_the_bit_as_a_new_one(films):
    def run(seed, steps=6):
        device.start_fresh(seed)
        rate = keras.optimizers.schedules.CosineDecay(3e-3, steps)
        model = autoencoder.autoencoder(48, 8, variational=True, corruption=[keras.layers.GaussianNoise(0.1)])
        autoencoder.fit(model, films, epochs=2, seed=seed, batch_size=8, learning_rate=rate)
        return model

    first = run(0, steps=9)
    compiled, before = list(device._kept.values()), first.get_weights()
    second = run(1)
    assert list(device._kept.values()) == compiled, "the second did not use the first one's compiled step"
    for now, then in zip(first.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)
    device._kept.clear()
    for shared, own in zip(second.get_weights(), run(1).get_weights(), strict=True):
        np.testing.assert_array_equal(shared, own)


def run_on(folder, digest):
    """A run with one image of that hash, as `anomaly.trained` needs it."""
    manifest = pd.DataFrame({"image_id": ["a"], "label": ["NORMAL"], "sha256": [digest], "split": ["train"],
                             "patient_id": ["p"]})
    manifest.attrs = {"source": "set", "synthetic": False}
    return types.SimpleNamespace(directory=folder, notebook="08_test", profile=types.SimpleNamespace(strict=False),
                                 manifest=manifest)


def test_a_model_is_loaded_for_the_same_data_only_and_leaves_no_backup(tmp_path):
    trained = []

    def fit(model, folder):
        assert not folder.exists(), "a leftover would be taken for this training"
        folder.mkdir(parents=True)
        trained.append(folder)

    for digest in ("a", "a", "b"):
        anomaly.trained(run_on(tmp_path, digest), "small", 0, lambda: autoencoder.autoencoder(16, 4), fit)
    assert len(set(trained)) == len(trained) == 2 and not any(folder.exists() for folder in trained)


def test_a_network_of_one_seed_stays_when_the_next_is_trained(films, tmp_path):
    run = run_on(tmp_path, "a")

    def network(seed):
        return anomaly.trained(run, "small", seed, lambda: autoencoder.autoencoder(48, 8),
                               lambda model, _: autoencoder.fit(model, films, epochs=1, seed=seed, batch_size=8))

    first = network(0)
    before = autoencoder.apply(first, films)
    second = network(1)
    np.testing.assert_array_equal(autoencoder.apply(first, films), before)
    assert (autoencoder.apply(second, films) != before).any()


def test_a_segmenter_learns_to_outline_what_stands_out(films):
    keras.utils.set_random_seed(0)
    images, masks = films // 2, np.zeros(films.shape, bool)
    for index in range(len(images)):
        row, column = np.random.default_rng(index).integers(4, 34, 2)
        masks[index, row:row + 10, column:column + 10] = True
    images[masks] += 120
    model = autoencoder.segmenter(48)
    autoencoder.fit(model, images, masks, epochs=12, seed=0, batch_size=8, learning_rate=3e-3)
    found = anomaly.pixel_scores(autoencoder.apply(model, images), masks)
    assert found["auroc"] > 0.9 and found["pointing"] > 0.7


def test_paint_is_deterministic_soft_and_inside_the_lungs(films):
    lungs = np.zeros(films.shape, bool)
    lungs[:, 8:40, 6:20] = True
    painted, masks = anomaly.opacities(films, seed=4, lungs=lungs)
    np.testing.assert_array_equal(painted, anomaly.opacities(films, seed=4, lungs=lungs)[0])
    assert (painted != anomaly.opacities(films, seed=5, lungs=lungs)[0]).any()
    assert masks.any((1, 2)).mean() > 0.8 and masks[:, :, 30:].sum() == 0
    changed = np.abs(painted.astype(int) - films)
    assert changed[masks].mean() > 3 * changed[~masks].mean()


@pytest.mark.parametrize("kind", ["absolute", "squared", "structure", "local"])
def test_error_maps_are_zero_for_a_perfect_network_and_high_where_it_fails(films, kind):
    perfect = films / np.float32(255)
    assert np.abs(anomaly.error_map(films, perfect, kind)).max() < 1e-3
    wrong = perfect.copy()
    wrong[:, 20:28, 20:28] = 1 - wrong[:, 20:28, 20:28]
    found = anomaly.error_map(films, wrong, kind)
    assert found.shape == films.shape and found[:, 20:28, 20:28].mean() > 4 * found[:, :8].mean()


@given(st.integers(0, 10**6), st.integers(100, 400))
@settings(max_examples=20)
def test_a_conformal_threshold_keeps_its_promise_on_average(seed, n):
    rng = np.random.default_rng(seed)
    rates = [np.mean(new >= anomaly.conformal_threshold(known, 0.1)) for known, new in rng.gamma(2, size=(60, 2, n))]
    assert np.mean(rates) < 0.1 + 4 * np.sqrt(0.1 * 0.9 / n / 30)


def test_thresholds_of_few_or_tailed_normals():
    for rule in (anomaly.conformal_threshold, anomaly.extreme_value_threshold):
        assert rule([1.0, 2, 3], 0.05) == rule([], 0.05) == np.inf  # three normals cannot promise five per cent
    assert 7 < anomaly.extreme_value_threshold(np.full(100, 7.0)) < 7.01  # normals that all score alike
    scores = np.random.default_rng(0).exponential(size=2000)
    assert anomaly.extreme_value_threshold(scores, 0.01) == pytest.approx(-np.log(0.01), rel=0.15)


def test_pixel_scores_of_a_perfect_a_blank_and_an_inverted_map():
    masks = np.zeros((2, 32, 32), bool)
    masks[0, 4:12, 4:12] = masks[1, 20:30, 2:8] = True
    perfect, inverted = (anomaly.pixel_scores(heat.astype(float), masks) for heat in (masks, ~masks))
    assert perfect["auroc"] == 1 and perfect["pointing"] == 1 and perfect["aupro"] > 0.95
    assert inverted["auroc"] == 0 and inverted["pointing"] == 0 and inverted["aupro"] < 0.05
    blank = anomaly.pixel_scores(np.zeros(masks.shape), masks)
    assert blank["auroc"] == 0.5 and blank["aupro"] == pytest.approx(0.15)
    noise = np.random.default_rng(0).normal(size=(20, 32, 32)) - 0.8
    many = np.repeat(masks, 10, axis=0)
    plain, sparse = (anomaly.pixel_scores(maps, many)["aupro"] for maps in (noise, np.maximum(noise, 0)))
    assert sparse == pytest.approx(plain, abs=0.03) and 0.1 < plain < 0.2, "zeros find no lesion"


def test_opacities_find_room_in_lungs_of_a_single_pixel():
    masks = np.zeros((40, 32, 32), bool)
    masks[:, 16, 10] = True
    painted, _ = anomaly.opacities(np.full((40, 32, 32), 90, np.uint8), seed=0, lungs=masks, haze=0)
    assert painted.shape == (40, 32, 32)


def test_distances_grow_away_from_normals():
    rng = np.random.default_rng(0)
    normal, sick = rng.normal(size=(200, 5)), rng.normal(3, size=(20, 5))
    for measure in (anomaly.mahalanobis, anomaly.nearest_normals):
        assert measure(normal, sick).min() > np.median(measure(normal, rng.normal(size=(200, 5))))


def test_among_images_of_one_blur_a_score_that_reads_blur_is_worth_nothing():
    rng = np.random.default_rng(0)
    y_true = np.arange(4000) % 2
    blur = rng.normal(2 * y_true)
    assert metrics.roc_auc_score(y_true, blur) > 0.9
    assert anomaly.auc_within(y_true, blur, blur, num_bins=200) < 0.6
    assert anomaly.auc_within(y_true, y_true + rng.normal(0, 0.1, 4000), blur) > 0.99
    assert anomaly.auc_within(y_true, -y_true, blur) == 0
    assert np.isnan(anomaly.auc_within([0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4], [0.0, 0.0, 9.0, 9.0], num_bins=2))


def test_bad_input_is_named(films):
    with pytest.raises(ValueError, match="no normal images"):
        autoencoder.fit(autoencoder.autoencoder(48, 4), films[:0], epochs=1, seed=0)
    with pytest.raises(ValueError, match=r"\(48, 48\)"):
        autoencoder.apply(autoencoder.autoencoder(32, 4), films)
    with pytest.raises(ValueError, match="multiple of 16"):
        autoencoder.autoencoder(50, 4)


def test_a_constant_image_gets_a_score():
    constant, network = np.full((2, 48, 48), 90, "uint8"), autoencoder.autoencoder(48, 4)
    rebuilt = autoencoder.apply(network, constant)
    for kind in ("absolute", "squared", "structure", "local"):
        assert np.isfinite(anomaly.highest(anomaly.error_map(constant, rebuilt, kind))).all()
    painted, masks = anomaly.opacities(constant, seed=0)
    assert painted.shape == masks.shape == constant.shape


def test_a_run_without_normal_images_in_validation_says_so():
    manifest = pd.DataFrame({"split": ["train", "val"], "label": ["NORMAL", "PNEUMONIA"]})
    with pytest.raises(ValueError, match="NORMAL folder"):
        anomaly.score(types.SimpleNamespace(manifest=manifest), "any", {}, None, None, None)


def test_contamination_raises_the_threshold_and_never_lowers_it():
    clean, sick = np.random.default_rng(0).normal(size=200), np.full(20, 5.0)
    for rule in (anomaly.conformal_threshold, anomaly.extreme_value_threshold):
        assert rule(np.r_[clean[20:], sick]) > rule(np.r_[clean[2:], sick[:2]]) >= rule(clean) - 0.2

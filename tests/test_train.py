"""Training for real, small: losses, order of batches, resuming after a kill, records over seeds."""

import dataclasses
import pathlib

import keras
import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
from keras import layers

from cxr import augment, config, device, fitting, models, objective, records, train

RECIPE = train.Recipe(model="tiny", image_size=16, epochs=3, batch_size=16, learning_rate=3e-3)


def tiny(image_size, augmentation=()):
    inputs = keras.Input((image_size, image_size, 1))
    x = layers.Rescaling(1 / 255)(inputs)
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(8, 3, activation="relu")(x))
    return keras.Model(inputs, layers.Dense(1, activation="sigmoid")(layers.Dropout(0.2)(x)))


def easy(n=128, seed=0):
    """Images whose class shows as brightness."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    images = rng.integers(0, 120, (n, 16, 16)) + 60 * labels[:, None, None]
    return images.astype("uint8"), labels


def weights(model):
    return np.concatenate([np.ravel(w) for w in model.get_weights()])


def test_loss_equals_keras_with_hard_labels():
    y, p = np.array([[0.0], [1], [1], [0]]), np.array([[0.2], [0.9], [0.4], [0.6]])
    ours = objective.WeightedBinaryCrossentropy(1.95, 0.67)(y, p)
    theirs = keras.losses.BinaryCrossentropy()(y, p, sample_weight=np.where(y == 1, 0.67, 1.95))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_loss_of_a_mixed_label_is_the_mixture_of_the_weighted_losses():
    p, loss = np.array([[0.3]]), objective.WeightedBinaryCrossentropy(2.0, 0.5)
    mixed = float(loss(np.array([[0.7]]), p))
    assert mixed == pytest.approx(
        0.7 * float(loss(np.array([[1.0]]), p)) + 0.3 * float(loss(np.array([[0.0]]), p)), rel=1e-5
    )


def test_class_weights_are_those_of_study_s2():
    labels = np.r_[np.zeros(1341), np.ones(3875)]
    assert objective.class_weights(labels, "class_weight") == pytest.approx((1.945, 0.673), abs=1e-3)
    assert objective.class_weights(labels, "loss_1.5") == (1.0, 1.5)
    assert objective.class_weights(labels, "none") == (1.0, 1.0)


def test_batches_show_each_image_once_and_depend_on_seed_and_epoch_alone():
    images, labels = easy(40)
    first = fitting.Batches(images, labels, 16, seed=3)
    seen = np.concatenate([first[k][0] for k in range(len(first))])
    assert sorted(seen.sum((1, 2, 3))) == sorted(images.sum((1, 2)))
    first.on_epoch_end()
    later = fitting.Batches(images, labels, 16, seed=3, epoch=1)
    np.testing.assert_array_equal(first[0][0], later[0][0])
    assert (first[0][0] != seen[:16]).any()


@pytest.mark.parametrize(("n", "batch_size"), [(1, 16), (10, 1)])
def test_a_batch_of_one_is_refused(n, batch_size):
    images, labels = easy(n)
    with pytest.raises(ValueError, match="at least two"):
        fitting.Batches(images, labels, batch_size, seed=0)


def test_last_batch_of_one_is_left_out():
    assert len(fitting.Batches(*easy(33), 16, seed=0)) == 2


@pytest.mark.parametrize("labels", [np.zeros(32, int), np.ones(32, int)])
def test_one_class_is_refused(tmp_path, labels):
    images, both = easy(32)
    with pytest.raises(ValueError, match="one class only"):
        train.fit(tiny(16), RECIPE, images, labels, {"val": (images, both)}, seed=0, folder=tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mixing": ("probability", 0.5), "balance": "class_weight"},
        {"mixing": ("extra_samples", 0.3)},
        {"mixing": ("cutmix", 0.5)},
        {"schedule": "cosine", "weight_decay": 1e-3},
        {"balance": "oversample"},
    ],
)
def test_training_learns(tmp_path, changes):
    keras.utils.set_random_seed(0)
    recipe = dataclasses.replace(RECIPE, epochs=8, **changes)
    images, labels = easy(160)
    if recipe.balance == "oversample":
        keep = np.flatnonzero((labels == 1) | (np.arange(160) % 8 == 0))
        images, labels = images[keep], labels[keep]
    model = tiny(16)
    history, _ = train.fit(model, recipe, images, labels, {"val": easy(60, seed=1)}, seed=0, folder=tmp_path)
    assert history["val_auc"][-1] > 0.9 and set(history) >= {"loss", "auc", "val_loss", "val_auc", "val_accuracy"}


def test_best_epoch_is_restored_and_patience_stops(tmp_path):
    keras.utils.set_random_seed(0)
    recipe = dataclasses.replace(RECIPE, epochs=30, patience=2, learning_rate=0.05)
    model, val = tiny(16), easy(60, seed=1)
    history, _ = train.fit(model, recipe, *easy(), {"val": val}, seed=0, folder=tmp_path)
    assert len(history["val_auc"]) < 30
    found = sklearn.metrics.roc_auc_score(val[1], train.predict(model, val[0]))
    assert found == pytest.approx(max(history["val_auc"]), abs=1e-5)


def test_a_network_compiled_before_trains_to_the_bit_as_a_new_one(tmp_path):
    recipe = dataclasses.replace(RECIPE, image_size=32, epochs=2, schedule="cosine", augment="shift_zoom")
    images, labels = (np.repeat(np.repeat(part, 2, 1), 2, 2) if part.ndim == 3 else part for part in easy())

    def run(seed, name, count):
        device.start_fresh(seed)
        model = models.lab_cnn(32, augment.stack(recipe.augment))
        watched = {"val": (images, labels)}
        _, fitted = train.fit(model, recipe, images[:count], labels[:count], watched, seed=seed, folder=tmp_path / name)
        np.testing.assert_array_equal(train.predict(fitted, images), train.predict(model, images))
        steps = count // recipe.batch_size
        fitted.optimizer.iterations.assign(steps + 1)  # one step down from the peak
        keras_rate = keras.optimizers.schedules.CosineDecay(0.0, steps, warmup_target=recipe.learning_rate,
                                                            warmup_steps=steps)
        assert float(fitted.optimizer.learning_rate) == pytest.approx(float(keras_rate(steps + 1)), rel=1e-5)
        return model

    first = run(0, "a", 64)
    compiled, before = list(device._kept.values()), weights(first)
    second = run(1, "b", 32)  # fewer images make a shorter schedule
    assert list(device._kept.values()) == compiled, "the second did not use the first one's compiled step"
    np.testing.assert_array_equal(weights(first), before)
    device._kept.clear()
    np.testing.assert_array_equal(weights(second), weights(run(1, "c", 32)))


def test_decay_and_schedule_are_those_of_adamw():
    rate = keras.optimizers.schedules.CosineDecay(0.0, 4, warmup_target=0.1, warmup_steps=2)
    start, gradients = np.linspace(-1, 1, 6, dtype="float32"), np.random.default_rng(0).normal(size=(5, 6))
    found = []
    betas = {name: float(np.float32(value)) for name, value in (("beta_1", 0.9), ("beta_2", 0.999))}  # the kernel's
    ours = objective.DiscriminativeAdamW(rate, decoupled_decay=0.2, **betas)
    for optimizer in (keras.optimizers.AdamW(rate, weight_decay=0.2, **betas), ours):
        variable = keras.Variable(start)
        for gradient in gradients:
            optimizer.apply([keras.ops.convert_to_tensor(gradient, "float32")], [variable])
        found.append(keras.ops.convert_to_numpy(variable))
    np.testing.assert_allclose(*found, rtol=1e-6)
    assert np.abs(found[0] - start).max() > 0.1


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("options", [{}, {"scale": False, "momentum": 0.9}, {"center": False, "epsilon": 0.1}])
def test_normalization_in_one_kernel_is_that_of_keras(tmp_path, options, frozen):
    def normalized():
        keras.utils.set_random_seed(0)
        inner = keras.Sequential([keras.Input((6, 6, 8)), keras.layers.Conv2D(4, 3), keras.layers.BatchNormalization()])
        inner.trainable = not frozen
        pooled = keras.layers.GlobalAveragePooling2D()
        return keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(8, 3),
                                 keras.layers.BatchNormalization(**options), inner, pooled, keras.layers.Dense(1)])

    draw = np.random.default_rng(0)
    inputs, truth = draw.normal(5, 3, (64, 8, 8, 3)).astype("float32"), draw.normal(size=(64, 1)).astype("float32")
    theirs, ours = normalized(), device.compiled(normalized(), keras.optimizers.SGD(0.02), "mse")
    theirs.compile(keras.optimizers.SGD(0.02), "mse")
    before = weights(ours)
    for model in (theirs, ours):
        model.fit(inputs, truth, batch_size=16, epochs=3, verbose=0, shuffle=False)
    np.testing.assert_allclose(weights(ours), weights(theirs), rtol=1e-4, atol=1e-5)
    assert np.abs(weights(ours) - before).max() > 0.1
    expected = theirs.predict(inputs, verbose=0)
    np.testing.assert_allclose(device.outputs(ours, inputs), expected, rtol=1e-4, atol=1e-5)
    ours.save(tmp_path / "ours.keras")
    loaded = keras.models.load_model(tmp_path / "ours.keras")  # nothing of the lab is in the file
    np.testing.assert_allclose(loaded.predict(inputs, verbose=0), expected, rtol=1e-4, atol=1e-5)


class KilledError(Exception):
    """Stands for a kill between two epochs."""


def test_resumed_training_gives_the_same_weights(tmp_path, monkeypatch):
    images, labels = easy()
    watched = {"val": easy(60, seed=1)}

    def run(folder):
        keras.utils.set_random_seed(0)
        model = tiny(16)
        recipe = dataclasses.replace(RECIPE, schedule="cosine")
        history, _ = train.fit(model, recipe, images, labels, watched, seed=0, folder=folder)
        return weights(model), history

    whole, history = run(tmp_path / "whole")
    backup = fitting.back_up

    def die_after_first(model, folder, epoch, **state):
        backup(model, folder, epoch, **state)
        if epoch == 1:
            raise KilledError

    monkeypatch.setattr(fitting, "back_up", die_after_first)
    with pytest.raises(KilledError):
        run(tmp_path / "killed")
    monkeypatch.setattr(fitting, "back_up", backup)
    resumed, again = run(tmp_path / "killed")
    np.testing.assert_allclose(resumed, whole, atol=1e-6)
    assert again == history


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow's input pipeline")
def test_no_fit_waits_for_the_tuner_of_the_input(monkeypatch):
    adapter = keras.src.trainers.data_adapters.py_dataset_adapter.PyDatasetAdapter
    made, begin = [], adapter.get_tf_dataset

    def seen(batches):
        made.append(begin(batches))
        return made[-1]

    monkeypatch.setattr(adapter, "get_tf_dataset", seen)
    images, labels = easy(40)
    model = device.compiled(tiny(16), keras.optimizers.Adam(), "binary_crossentropy")
    model.fit(fitting.Batches(images, labels, 20, seed=0), verbose=0, shuffle=False)
    assert [pipeline.options().autotune.enabled for pipeline in made] == [False]


def test_a_damaged_backup_is_named_and_nothing_is_trained_from_it(tmp_path):
    images, labels = easy()
    arguments = tiny(16), dataclasses.replace(RECIPE, epochs=1), images, labels, {"val": easy(60, seed=1)}
    train.fit(*arguments, seed=0, folder=tmp_path / "backup")
    path = tmp_path / "backup" / "1.npz"
    whole = path.read_bytes()
    for damaged in (whole[:len(whole) // 2], whole.replace(whole[600:640], bytes(40)[:39] + b"x")):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"1\.npz is damaged .* Delete .*backup and call again"):
            train.fit(*arguments, seed=0, folder=tmp_path / "backup")
    path.write_bytes(whole)
    with np.load(path) as file:
        np.savez(path, *list(file.values())[1:])  # as a version with one variable less would have left it
    with pytest.raises(ValueError, match=r"1\.npz is damaged or of another version .*shorter.* call again"):
        train.fit(*arguments, seed=0, folder=tmp_path / "backup")
    path.unlink()
    with pytest.raises(ValueError, match=r"1\.npz is damaged .*No such file.* call again"):
        train.fit(*arguments, seed=0, folder=tmp_path / "backup")


def test_one_epoch_is_enough_for_a_schedule(tmp_path):
    recipe = dataclasses.replace(RECIPE, epochs=1, schedule="cosine")
    history, _ = train.fit(tiny(16), recipe, *easy(), {"val": easy(60, seed=1)}, seed=0, folder=tmp_path)
    assert len(history["loss"]) == 1


@pytest.mark.parametrize("wrong", [{"schedule": "cosin"}, {"balance": "class_weights"}, {"augment": "rotate"},
                                   {"select": "first"}, {"monitor": "auc"}, {"split": "patients"}])
def test_a_misspelt_recipe_is_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*choose one of"):
        dataclasses.replace(RECIPE, **wrong)


@pytest.fixture
def run(tmp_path):
    """A run over 60 easy images of 60 patients, without files behind them."""
    images, labels = easy(90)
    manifest = pd.DataFrame(
        {
            "image_id": [f"{k:03}.png" for k in range(90)],
            "patient_id": [f"p{k}" for k in range(90)],
            "label": np.where(labels == 1, "PNEUMONIA", "NORMAL"),
            "split": ["train"] * 50 + ["val"] * 20 + ["test"] * 20,
            "sha256": [f"{k:064}" for k in range(90)],
        }
    )
    manifest.attrs = {"source": "easy", "synthetic": True, "unreadable": []}
    made = records.Run("02_test", config.PROFILES["smoke"], tmp_path, tmp_path, manifest, manifest, [0, 1], [0])
    return made, images


def test_repeat_writes_one_record_a_seed_and_then_loads_them(run):
    run, images = run
    made = train.repeat(run, "tiny", RECIPE, tiny, images=images)
    assert [record["seed"] for record in made] == [0, 1]
    assert made[0]["run_id"][:-3] == made[1]["run_id"][:-3] and made[0]["config"]["model"] == "tiny"
    table = run.predictions(made[0])
    assert table["split"].value_counts().to_dict() == {"val": 20, "test": 20, "val_shifted": 60}
    before = {path: path.stat().st_mtime_ns for path in pathlib.Path(run.results).rglob("*.json")}
    assert train.repeat(run, "tiny", RECIPE, tiny, images=images) == made
    assert before == {path: path.stat().st_mtime_ns for path in pathlib.Path(run.results).rglob("*.json")}
    assert not list((run.directory / "cache" / "backup").glob("*")), "a finished run leaves its backup behind"
    model = keras.models.load_model(run.directory / "models" / f"{made[0]['run_id']}.keras")
    test = table[table["split"] == "test"]
    np.testing.assert_allclose(train.predict(model, images[70:]), test["y_score"], rtol=1e-4)


def test_a_resumed_run_tells_the_seconds_of_all_its_calls(run, monkeypatch):
    run, images = run
    backup = fitting.back_up

    def die(model, folder, epoch, seconds, **state):
        backup(model, folder, epoch, seconds=seconds + 1000, **state)  # as if this epoch had taken that long
        raise KilledError

    monkeypatch.setattr(fitting, "back_up", die)
    with pytest.raises(KilledError):
        train.repeat(run, "tiny", RECIPE, tiny, images=images, seeds=[0])
    monkeypatch.setattr(fitting, "back_up", backup)
    again, other = train.repeat(run, "tiny", RECIPE, tiny, images=images)
    assert 1000 < again["seconds"]["train"] < 1100 and other["seconds"]["train"] < 100


def test_same_seed_same_record_other_seed_another(run, tmp_path):
    run, images = run
    first = train.repeat(run, "tiny", RECIPE, tiny, images=images)
    again = train.repeat(dataclasses.replace(run, directory=tmp_path / "again"), "tiny", RECIPE, tiny, images=images)
    first, again = ([record["predictions"]["sha256"] for record in made] for made in (first, again))
    assert first == again and first[0] != first[1]


def test_extra_images_reach_training(run):
    run, images = run
    sizes = []

    def extra(seed):
        sizes.append(seed)
        return easy(10, seed=seed)

    train.repeat(run, "more", dataclasses.replace(RECIPE, balance="offline"), tiny, images=images, extra=extra)
    assert sizes == run.seeds


def test_a_later_field_at_its_default_keeps_the_id():
    config_now = RECIPE.config()
    assert config_now["weights"] is None and config_now["split"] == "patient" and "patience" not in config_now


@pytest.fixture
def two_devices():
    """All devices of this backend, each batch split among them; `make test-jax` makes two of a processor."""
    if keras.backend.backend() != "jax" or len(keras.distribution.list_devices()) < 2:
        pytest.skip("keras.distribution splits batches under JAX with several devices: make test-jax")
    yield keras.distribution.DataParallel
    keras.distribution.set_distribution(None)


def test_batches_split_among_devices_give_the_record_of_one_device(run, tmp_path, two_devices):
    run, images = run
    recipe = dataclasses.replace(RECIPE, batch_size=8)  # 50 images: the last batch has two
    alone = train.repeat(run, "tiny", recipe, tiny, images=images, seeds=[0])[0]
    keras.distribution.set_distribution(two_devices())
    there = dataclasses.replace(run, directory=tmp_path / "split")
    split = train.repeat(there, "tiny", recipe, tiny, images=images, seeds=[0])[0]
    assert keras.distribution.distribution() is not None, "start_fresh forgot the distribution"
    assert run.predictions(alone)["y_score"].to_numpy() == pytest.approx(there.predictions(split)["y_score"], abs=1e-4)
    np.testing.assert_allclose(alone["history"]["loss"], split["history"]["loss"], atol=1e-4)


def test_what_does_not_split_evenly_is_left_out_or_refused(two_devices):
    keras.distribution.set_distribution(two_devices())
    batches = fitting.Batches(*easy(21), 8, seed=0)
    assert [len(batches[k][0]) for k in range(len(batches))] == [8, 8, 4]
    with pytest.raises(ValueError, match="split among 2 devices"):
        fitting.Batches(*easy(21), 9, seed=0)

"""GANs with records, and what is added to a class: it has the count, the labels and the sources that it claims."""

import keras
import numpy as np
import pandas as pd
import pytest

from cxr import config, data, gan, generate, models, phantom, splits, train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on a small phantom with a COVID-like class, in a repository of its own."""
    root = tmp_path_factory.mktemp("repository")
    phantom.write(root / "set", num_train=60, num_val=4, num_test=30, covid=60, size=64, duplicates=0,
                  near_duplicates=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXR_ROOT", str(root))
        yield config.start("07_dcgan", data=str(root / "set"), num_seeds=1, needs="COVID19")


@pytest.fixture(scope="module")
def two(run):
    """The two classes of study S4 and their images."""
    manifest = splits.assign_pooled(run.official[run.official["label"].isin(["NORMAL", "COVID19"])])
    manifest.attrs["positive"] = "COVID19"
    return manifest, np.array(data.load_images(manifest, 16, cache_dir=run.cache))


@pytest.fixture(scope="module")
def drawn(run, two):
    return generate.trained(run, "lab DCGAN", *arguments(two))


def arguments(two, epochs=2):
    manifest, images = two
    recipe = generate.Recipe("lab_dcgan", 16, epochs, batch_size=8, average=0.9)
    return recipe, gan.lab_dcgan, images, manifest, {"pixels": generate.pixels}


def test_a_class_without_images_to_judge_by_stops_before_training(run, two):
    recipe, build, images, manifest, spaces = arguments(two)
    held = manifest["split"].isin(["val", "test"]) & manifest["label"].eq("COVID19")
    lonely = manifest.assign(split=manifest["split"].mask(held, "pred"))
    with pytest.raises(ValueError, match="holds 0 patients of COVID19"):
        generate.trained(run, "lonely", recipe, build, images, lonely, spaces)


def test_a_gan_leaves_a_record_without_a_picture(run, two, drawn):
    record = drawn.record
    assert record["purpose"] == "generate" and record["config"]["label"] == "COVID19"
    assert record["num_real"] == len(generate.train_rows(two[0], "COVID19")) and record["num_steps"] > 0
    assert set(record["judged"]["pixels"]) == {"kid", "kid_error", "kid_of_real", "fid", "density", "coverage",
                                               "memorisation", "spread", "num"}
    assert len(record["history"]["generator_loss"]) == 2
    table = run.predictions(record)
    fakes = table["image_id"].str.startswith("fake")
    assert (fakes == table["y_true"].eq(1)).all() and set(table["split"]) == {"val", "test"}
    assert 0 <= record["metrics"]["test"]["auc"]["value"] <= 1


def test_a_finished_gan_is_loaded_and_draws_the_same(run, two, drawn):
    again = generate.trained(run, "lab DCGAN", *arguments(two))
    assert again.record == drawn.record
    np.testing.assert_array_equal(again.film, drawn.film)
    np.testing.assert_array_equal(*(gan.sample(one.generator, 4) for one in (again, drawn)))
    path = run.directory / "models" / f"{drawn.record['run_id']}.keras"
    path.rename(path.with_suffix(".away"))
    with pytest.raises(FileNotFoundError, match="stay on the machine"):
        generate.trained(run, "lab DCGAN", *arguments(two))
    path.with_suffix(".away").rename(path)


def test_each_way_adds_what_it_says(two, drawn):
    manifest, images = two
    ways = generate.ways(images, manifest, "COVID19", {"DCGAN": drawn.generator})
    real = images[generate.train_rows(manifest, "COVID19")]
    for name, way in ways.items():
        pictures, labels = way(30, 0)
        assert pictures.shape == (30, 16, 16) and pictures.dtype == np.uint8 and labels.shape == (30,), name
        np.testing.assert_array_equal(pictures, way(30, 0)[0])
        assert (labels == 1).all() or name == "mixup" and (labels >= 0.5).all()
    copies = ways["duplicated reals"](2 * len(real), 1)[0]
    assert {image.tobytes() for image in copies} == {image.tobytes() for image in real}
    assert not {image.tobytes() for image in ways["DCGAN"](30, 0)[0]} & {image.tobytes() for image in real}
    normal = generate.ways(images, manifest, "NORMAL", {})
    assert (normal["duplicated reals"](5, 0)[1] == 0).all() and (normal["mixup"](50, 0)[1] <= 0.5).all()


def test_few_reals_are_nested_and_leave_validation_and_test_alone(two):
    manifest = two[0]
    chosen = [set(generate.train_rows(manifest, "COVID19", num)) for num in (5, 10, None)]
    assert chosen[0] < chosen[1] < chosen[2] and len(chosen[0]) == 5
    kept = generate.keep(manifest, "COVID19", 5)
    assert set(generate.train_rows(kept, "COVID19")) == chosen[0]
    changed = manifest["split"] != kept["split"]
    assert set(manifest.loc[changed, "label"]) == {"COVID19"} and set(manifest.loc[changed, "split"]) == {"train"}


def test_fakes_in_test_stand_for_the_reals_of_their_class(run, two, drawn):
    manifest, images = two
    recipe = train.Recipe("s4_cnn", 16, 2, batch_size=16)
    record = train.repeat(run, "nothing", recipe, models.s4_cnn, images=images, manifest=manifest)[0]
    fakes = gan.sample(drawn.generator, 12)
    found = generate.scored_with_fakes(run, "fakes", train.load_model(run, record), record, fakes, images, manifest)
    test = run.predictions(found).query("split == 'test'")
    assert test["y_true"].sum() == 12 and test.loc[test["y_true"].eq(1), "image_id"].str.startswith("fake/").all()
    assert found["thresholds"] == record["thresholds"]
    reals = (manifest["split"].eq("test") & manifest["label"].eq("COVID19")).sum()
    assert found["metrics"]["test"]["auc"]["n"] == record["metrics"]["test"]["auc"]["n"] - reals + 12


def test_a_baseline_needs_no_training(run, two):
    manifest, images = two
    record = generate.baseline(run, "mean grey", lambda some: some.mean((1, 2)), images, manifest)
    assert record["purpose"] == "baseline" and record == generate.baseline(run, "mean grey", None, images, manifest)


def test_mixtures_lie_between(two):
    images = two[1]
    mixed, share = generate.mixed(images[:5], images[5:], 40, 0)
    assert mixed.dtype == np.uint8 and ((share >= 0.5) & (share <= 1)).all()
    assert pd.Series(share).nunique() > 20
    assert generate.pixels(mixed).shape == (40, 256)


def test_a_labelled_class_can_be_the_positive_one(two):
    manifest = two[0]
    assert (train.labels_of(manifest) == manifest["label"].eq("COVID19")).all()
    part = manifest[manifest["split"].eq("val")].iloc[[0, 1]]
    assert (train.labels_of(part) == part["label"].eq("COVID19")).all(), "a part must know its positive class as well"
    other = manifest.copy()
    other.attrs = manifest.attrs | {"positive": "NORMAL"}
    assert (train.labels_of(other) == 1 - train.labels_of(manifest)).all()


def test_a_class_that_is_needed_and_absent(run, tmp_path):
    phantom.write(tmp_path / "plain", num_train=30, num_val=4, num_test=10, size=32, duplicates=0, near_duplicates=0)
    with pytest.raises(ValueError, match="no images of COVID19.*path/to/covid19"):
        config.start("07_dcgan", data=str(tmp_path / "plain"), needs="COVID19")


def test_published_gan_has_its_fault_and_the_labs_has_not():
    assert gan.seed_dcgan(16).low == 0 and gan.lab_dcgan(16).low == -1
    assert not gan.seed_dcgan(16).view.stack and gan.lab_dcgan(16).view.stack
    keras.utils.clear_session()


def test_fakes_are_read_on_the_scale_on_which_the_discriminator_knows_reals():
    """Study S4's GAN meets reals in [0, 1]: read from -1, their black would be grey."""
    codes = np.random.default_rng(0).normal(size=(8, gan.LATENT)).astype("float32")
    for build, low in ((gan.seed_dcgan, 0), (gan.lab_dcgan, -1)):
        model = build(16, 0)
        raw = keras.ops.convert_to_numpy(model.generator(codes))[..., 0]
        expected = 255 * np.clip((raw - low) / (1 - low), 0, 1)
        np.testing.assert_allclose(gan.sample(model.painter, codes=codes), expected, atol=0.51)
    keras.utils.clear_session()

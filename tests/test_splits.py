"""Patient keys, and splits that share no patient whatever the manifest."""

import collections

import hypothesis
import numpy as np
import pandas as pd
import pytest
from hypothesis import strategies as st

from cxr import data, splits


@pytest.mark.parametrize(("name", "label", "expected"), [
    ("train/PNEUMONIA/person1000_bacteria_2931.jpeg", "PNEUMONIA", ("bacterial/1000", "bacterial")),
    ("train/PNEUMONIA/person1000_virus_1681.jpeg", "PNEUMONIA", ("viral/1000", "viral")),
    ("val/PNEUMONIA/PERSON7_Virus_3_1.JPEG", "PNEUMONIA", ("viral/7", "viral")),
    ("train/NORMAL/IM-0115-0001.jpeg", "NORMAL", ("normal/IM-0115", "normal")),
    ("train/NORMAL/NORMAL2-IM-0007-0001-0002.jpeg", "NORMAL", ("normal/NORMAL2-IM-0007", "normal")),
    ("train/COVID19/covid-0012-2.jpeg", "COVID19", ("covid/0012", "covid")),
    ("COVID19/001.jpeg", "COVID19", ("file/COVID19/001.jpeg", "covid")),
    ("COVID19/covid-19-pneumonia-7-PA.jpg", "COVID19", ("file/COVID19/covid-19-pneumonia-7-PA.jpg", "covid")),
    ("COVID19/COVID-19 (1).png", "COVID19", ("file/COVID19/COVID-19 (1).png", "covid")),
    ("COVID19/covid-2020-03-12.png", "COVID19", ("file/COVID19/covid-2020-03-12.png", "covid")),
    ("train/PNEUMONIA/BACTERIA-1008087-0002.jpeg", "PNEUMONIA", ("bacterial/1008087", "bacterial")),
    ("test/NORMAL/NORMAL-28501-0001.jpeg", "NORMAL", ("normal/28501", "normal")),
    ("train/PNEUMONIA/scan.png", "PNEUMONIA", ("file/train/PNEUMONIA/scan.png", "unknown")),
])  # fmt: skip
def test_patient_key(name, label, expected):
    assert splits.patient_key(name, label) == expected


def test_number_key_forgets_the_etiology_but_not_the_family():
    assert splits.number_key("bacterial/7") == splits.number_key("viral/7") == "person/7"
    assert splits.number_key("normal/IM-0007") != splits.number_key("normal/NORMAL2-IM-0007")


def manifest_of(rows):
    """A manifest of `(patient, etiology, split, picture)` rows; the label follows from the etiology."""
    frame = pd.DataFrame(rows, columns=["patient_id", "etiology", "split", "pixel_sha256"])
    frame["label"] = frame["etiology"].map({"normal": "NORMAL", "covid": "COVID19"}).fillna("PNEUMONIA")
    frame["image_id"] = [f"{row.split}/{row.label}/{number:04d}" for number, row in enumerate(frame.itertuples())]
    frame["sha256"] = frame["pixel_sha256"]
    return frame.sort_values("image_id", ignore_index=True)


@st.composite
def manifests(draw):
    """Patients with one to five films, some of which are copies, in splits that share patients and pictures freely."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows, pictures = [], draw(st.integers(20, 400))
    for etiology in ("normal", "bacterial", "viral", *draw(st.sampled_from([(), ("covid",)]))):
        for number in range(draw(st.integers(8, 40))):
            home = rng.choice(["train", "val", "test"], p=[0.7, 0.1, 0.2])
            for _ in range(rng.integers(1, 6)):
                split = home if rng.random() < 0.9 else rng.choice(["train", "val", "test"])
                rows.append((f"{etiology}/{number}", etiology, split, f"{etiology}-{rng.integers(pictures)}"))
    return manifest_of(rows)


def usable(manifest):
    """Whether enough patients of each class stand in train alone for a validation set to be drawn."""
    try:
        return splits.assign(manifest)
    except ValueError:
        hypothesis.reject()


@hypothesis.settings(max_examples=40)
@hypothesis.given(manifests(), st.integers(0, 1000), st.floats(0.05, 0.5))
def test_no_patient_and_no_picture_in_two_splits(manifest, seed, fraction):
    usable(manifest)
    frame = splits.assign(manifest, seed=seed, val_fraction=fraction)
    assert set(frame["split"]) <= {"train", "val", "test", "test_duplicate", "dropped"}
    whole = frame[~frame["split"].isin(["dropped", "test_duplicate"])]
    assert whole.groupby("patient_id")["split"].nunique().max() == 1
    assert not whole.duplicated("pixel_sha256").any()
    assert splits.leaks(frame)["by_etiology_and_number"] == 0
    assert splits.leaks(frame)["val_beside_train"] == 0
    pd.testing.assert_frame_equal(frame.drop(columns="split"), manifest.drop(columns="split"))


@hypothesis.settings(max_examples=40)
@hypothesis.given(manifests(), st.integers(0, 1000), st.floats(0.05, 0.5))
def test_validation_is_stratified_within_one_patient(manifest, seed, fraction):
    usable(manifest)
    frame = splits.assign(manifest, seed=seed, val_fraction=fraction)
    pool = frame[frame["split"].isin(["train", "val"])]
    for _, part in pool.groupby(["label", "etiology"]):
        largest = part.groupby("patient_id").size().max()
        wanted, got = fraction * len(part), part["split"].eq("val").sum()
        assert abs(got - wanted) <= largest or part["patient_id"].nunique() == 1
    for _, part in pool.groupby("label"):
        assert set(part["split"]) == {"train", "val"}


@hypothesis.settings(max_examples=20)
@hypothesis.given(manifests(), st.integers(0, 1000))
def test_a_split_depends_on_the_seed_and_not_on_the_order(manifest, seed):
    usable(manifest)
    before = manifest.copy()
    first = splits.assign(manifest, seed=seed)
    shuffled = splits.assign(manifest.sample(frac=1, random_state=1), seed=seed)
    pd.testing.assert_frame_equal(first, shuffled)
    pd.testing.assert_frame_equal(manifest, before)
    assert len({tuple(splits.assign(manifest, seed=other)["split"]) for other in range(6)}) > 1


@hypothesis.settings(max_examples=20)
@hypothesis.given(manifests())
def test_both_splits_have_the_same_test(manifest):
    frame, leaky = usable(manifest), splits.assign_image_level(manifest)
    for split in ("test", "test_duplicate"):
        assert frame.loc[frame["split"].eq(split), "image_id"].equals(leaky.loc[leaky["split"].eq(split), "image_id"])
    pool = leaky["split"].isin(["train", "val"])
    assert leaky["split"].eq("val").sum() == round(0.2 * pool.sum())


def plain(train=6, films=2):
    rows = [(f"{etiology}/{n}", etiology, "train", f"{etiology}{n}{film}") for etiology in ("normal", "viral")
            for n in range(train) for film in range(films)]  # fmt: skip
    return rows + [("normal/90", "normal", "test", "t1"), ("viral/90", "viral", "test", "t2")]


def roles(rows, **options):
    frame = splits.assign(manifest_of(rows), **options)
    return collections.Counter(frame["split"]), frame


def test_copies_are_dropped_from_train_and_set_apart_in_test():
    rows = [*plain(), ("normal/91", "normal", "test", "t1"), ("normal/50", "normal", "train", "normal00")]
    count, frame = roles(rows)
    assert count["test_duplicate"] == count["dropped"] == 1
    assert count["test"] == 2
    assert frame.loc[frame["split"].eq("dropped"), "patient_id"].item() == "normal/50", "the first by path stays"


def test_train_images_of_a_test_patient_or_picture_are_dropped():
    count, frame = roles([*plain(), ("viral/90", "viral", "train", "new"), ("viral/91", "viral", "train", "t2")])
    assert set(frame.loc[frame["split"].eq("dropped"), "patient_id"]) == {"viral/90", "viral/91"}
    assert count["test"] == 2


def test_a_picture_with_two_labels_is_dropped_whole():
    count, frame = roles([*plain(), ("normal/70", "normal", "train", "both"), ("viral/70", "viral", "test", "both")])
    assert set(frame.loc[frame["split"].eq("dropped"), "pixel_sha256"]) == {"both"}
    assert count["dropped"] == 2


def test_official_validation_is_pooled_and_unlabelled_images_stay_apart():
    manifest = manifest_of([*plain(), ("normal/60", "normal", "val", "v"), ("file/x", "unknown", "pred", "p")])
    manifest.loc[manifest["split"].eq("pred"), "label"] = ""
    frame = splits.assign(manifest)
    assert collections.Counter(frame["split"])["pred"] == 1
    assert collections.Counter(frame["split"])["train"] + collections.Counter(frame["split"])["val"] == 25


@hypothesis.settings(max_examples=20)
@hypothesis.given(manifests(), st.integers(0, 1000), st.floats(0.1, 0.4))
def test_a_pooled_test_shares_no_patient_and_has_every_class(manifest, seed, fraction):
    usable(manifest)
    frame = splits.assign_pooled(manifest, seed=seed, test_fraction=fraction)
    whole = frame[frame["split"].isin(["train", "val", "test"])]
    assert whole.groupby("patient_id")["split"].nunique().max() == 1
    assert not whole.duplicated("pixel_sha256").any() and "test_duplicate" not in set(frame["split"])
    assert (whole.groupby("label")["split"].nunique() == 3).all()
    for _, part in whole.groupby(["label", "etiology"]):
        largest = part.groupby("patient_id").size().max()
        assert abs(part["split"].eq("test").sum() - fraction * len(part)) <= largest or part["patient_id"].nunique() < 3


def test_a_pooled_test_forgets_the_folders_and_not_the_unlabelled():
    manifest = manifest_of([*plain(20), ("file/x", "unknown", "pred", "p")])
    manifest.loc[manifest["split"].eq("pred"), "label"] = ""
    frame = splits.assign_pooled(manifest)
    other = manifest.assign(split=manifest["split"].replace({"test": "train"}))
    assert frame["split"].tolist() == splits.assign_pooled(other)["split"].tolist()
    assert frame["split"].eq("pred").sum() == 1
    with pytest.raises(ValueError, match="test_fraction is 1"):
        splits.assign_pooled(manifest, test_fraction=1)


def test_a_class_whose_patients_all_stand_in_test_is_not_lost_without_a_word():
    rows = [*plain(), *(("covid/1", "covid", split, f"{split}{n}") for split in ("train", "test") for n in range(3))]
    with pytest.raises(ValueError, match="train has 0 patient of COVID19"):
        splits.assign(manifest_of(rows))


def test_films_that_are_one_tie_their_patients():
    manifest = manifest_of(plain(3))
    names = manifest["image_id"].tolist()
    patients = dict(zip(names, manifest["patient_id"], strict=True))
    tied = splits.tie(manifest, [(names[0], names[2]), (names[2], names[4])]).set_index("image_id")["patient_id"]
    assert tied[names[0]] == tied[names[2]] == tied[names[4]]
    before = {patients[names[k]] for k in (0, 2, 4)}
    assert all(tied[name] == tied[names[0]] for name in names if patients[name] in before), "with all their films"
    assert manifest["patient_id"].tolist() == list(patients.values())


def test_attributes_travel_with_the_split():
    manifest = manifest_of(plain())
    manifest.attrs = {"source": "set", "synthetic": True}
    assert splits.assign(manifest).attrs == splits.assign_image_level(manifest).attrs == manifest.attrs


def test_an_etiology_with_one_patient_still_leaves_its_class_validated():
    rows = [*plain(), ("bacterial/1", "bacterial", "train", "b1")]
    _, frame = roles([row for row in rows if row[1] != "viral" or row[0] in ("viral/0", "viral/90")])
    assert set(frame.loc[frame["label"].eq("PNEUMONIA") & frame["split"].ne("test"), "split"]) == {"train", "val"}


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 7])
def test_a_fraction_outside_its_range(fraction):
    for assign in (splits.assign, splits.assign_image_level):
        with pytest.raises(ValueError, match="between 0 and 1"):
            assign(manifest_of(plain()), val_fraction=fraction)


def test_too_few_patients_to_share_out():
    with pytest.raises(ValueError, match="1 patient of NORMAL"):
        splits.assign(manifest_of([row for row in plain() if row[0] in ("normal/0", "normal/90") or row[1] == "viral"]))


def test_the_image_level_split_leaks_and_says_how_much():
    leaky = splits.assign_image_level(manifest_of(plain(40, films=3)))
    assert 0.5 < splits.leaks(leaky)["val_beside_train"] <= 1
    assert splits.leaks(leaky)["test_beside_train"] == 0


@pytest.mark.real
def test_real_patients_and_splits(real_data, tmp_path_factory):
    cache = tmp_path_factory.getbasetemp() / "real-cache"  # the audit test reads the same files
    manifest = data.load_manifest(real_data / "chest_xray", cache_dir=cache)
    patients = manifest.groupby(["split", "label"])["patient_id"].nunique()
    assert patients["train"].to_dict() == {"NORMAL": 1211, "PNEUMONIA": 2443}
    assert patients["test"].to_dict() == {"NORMAL": 225, "PNEUMONIA": 203}
    frame = splits.assign(manifest)
    assert frame["split"].value_counts()[["test", "test_duplicate", "dropped"]].to_dict() == {
        "test": 618, "test_duplicate": 6, "dropped": 26}  # fmt: skip
    assert splits.leaks(manifest) | {"test_beside_train": 0} == splits.leaks(manifest)
    assert (splits.leaks(frame)["val_beside_train"], splits.leaks(manifest)["by_number"]) == (0, 170)
    pool = frame[frame["split"].isin(["train", "val"])]
    assert pool["split"].eq("val").mean() == pytest.approx(0.12, abs=0.002)
    for _, part in pool.groupby("label"):
        assert part["split"].eq("val").mean() == pytest.approx(0.12, abs=0.002)
    shares = [splits.leaks(splits.assign_image_level(manifest, seed=seed))["val_beside_train"] for seed in range(10)]
    assert np.mean(shares) == pytest.approx(0.40, abs=0.02)

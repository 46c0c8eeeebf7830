"""The phantom is deterministic, aligned with its masks, planted as asked, and its knobs move what they name."""

import functools
import hashlib
import json
import pathlib
import re

import cv2
import hypothesis
import numpy as np
import pandas as pd
import pytest
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from cxr import phantom

SMALL = {"num_train": 40, "num_val": 6, "num_test": 24, "size": 64, "duplicates": 4, "near_duplicates": 2}
NAMES = {"NORMAL": r"(NORMAL2-)?IM-\d{4}-0001(-000\d)?", "PNEUMONIA": r"person\d+_(bacteria|virus)_\d+",
         "COVID19": r"covid-\d{4}-\d"}
NO_COPIES = {"duplicates": 0, "near_duplicates": 0}
FEW = {"num_train": 4, "num_val": 0, "num_test": 2, "size": 32} | NO_COPIES


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small set with every knob turned on, and its summary."""
    folder = tmp_path_factory.mktemp("phantom") / "set"
    return folder, phantom.write(folder, **SMALL, duplicates_across_splits=3, covid=5)


def images(folder, pattern="t*/*/*.jpeg"):
    return sorted(folder.glob(pattern))


def digests(folder):
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def manifest(folder):
    return pd.DataFrame({"path": [str(path) for path in images(folder, "*/[NPC]*/*.jpeg")]})


@functools.cache
def films(kind, **knobs):
    return [phantom.render(seed, kind, size=96, patient=1000 + seed, **knobs) for seed in range(8)]


def sharpness(image):
    return np.hypot(*np.gradient(image.astype(float))).mean()


# One film -------------------------------------------------------------------------------------------------------------


@hypothesis.given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(phantom.KINDS), size=st.integers(32, 80),
                  marker=st.sampled_from(["R", "L", None]), sharp=st.floats(0, 1), contrast=st.floats(0.5, 2))
@hypothesis.settings(max_examples=30)
def test_any_film_is_whole_and_repeatable(seed, kind, size, marker, sharp, contrast):
    knobs = {"size": size, "marker": marker, "sharpness": sharp, "contrast": contrast}
    film, again = phantom.render(seed, kind, **knobs), phantom.render(seed, kind, **knobs)
    assert film.image.shape == film.lung_mask.shape == film.lesion_mask.shape == (size, size)
    assert (film.image.dtype, film.lung_mask.dtype, film.lesion_mask.dtype) == (np.uint8, bool, bool)
    assert all(np.array_equal(one, other) for one, other in zip(film, again, strict=True))
    assert 0.1 < film.lung_mask.mean() < 0.7
    assert not (film.lesion_mask & ~film.lung_mask).any()
    assert film.lesion_mask.any() <= (kind != "normal")


@pytest.mark.parametrize("kind", phantom.KINDS[1:])
def test_lesions_are_there_and_brighter_than_the_lung_without(kind):
    for seed, film in enumerate(films(kind, severity=1.0)):
        healthy = phantom.render(seed, kind, size=96, patient=1000 + seed, severity=0.0)
        assert np.array_equal(film.lesion_mask, healthy.lesion_mask)
        changed = film.image.astype(float) - healthy.image
        assert film.lesion_mask.sum() > 20
        assert changed[film.lesion_mask].mean() > 8 + 2 * abs(changed[~film.lung_mask].mean())


def test_lung_is_dark_between_bright_mediastinum_and_belly():
    for film in films("normal"):
        row, column = np.nonzero(film.lung_mask)
        inner = film.image[row.min():, column.min():column.max()]
        lung = film.image[film.lung_mask].mean()
        assert lung < 0.75 * np.median(inner[~film.lung_mask[row.min():, column.min():column.max()]])


def test_heart_takes_from_the_left_lung_and_the_right_dome_is_higher():
    halves = [np.split(film.lung_mask, 2, axis=1) for film in films("normal")]
    assert all(right.sum() > left.sum() for right, left in halves), "the patient's right lung is on the image's left"
    lowest = np.mean([[np.nonzero(lung)[0].max() for lung in half] for half in halves], axis=0)
    assert lowest[0] < lowest[1] + 1


def test_lesions_lie_where_their_kind_does():
    def distance(film):  # of lesion and of lung from the middle between the lungs, as a share of the half width
        columns = [np.nonzero(mask)[1] for mask in (film.lesion_mask, film.lung_mask)]
        middle, half = (columns[1].min() + columns[1].max()) / 2, np.ptp(columns[1]) / 2
        return np.abs(columns[0] - middle).mean() / half

    sides = {kind: [{(film.lesion_mask & film.lung_mask)[:, half].any() for half in (slice(0, 48), slice(48, 96))}
                    for film in films(kind, severity=1.0)] for kind in phantom.KINDS[1:]}
    assert all(found == {True} for kind in ("viral", "covid") for found in sides[kind]), "both lungs"
    assert sum(found != {True} for found in sides["bacterial"]) >= 4, "mostly one lung"
    viral, covid = (np.mean([distance(film) for film in films(kind, severity=1.0)]) for kind in ("viral", "covid"))
    assert viral < 0.5 < 0.6 < covid


def test_one_patient_keeps_the_anatomy_another_does_not():
    def overlap(a, b):
        return (a.lung_mask & b.lung_mask).sum() / (a.lung_mask | b.lung_mask).sum()

    def film(seed, patient, **knobs):
        return phantom.render(seed, "normal", size=96, patient=patient, **knobs)

    assert all(overlap(film(seed, 7), film(seed, 7, sharpness=0)) == 1 for seed in range(4))
    assert np.mean([overlap(film(seed, 7), film(seed, seed)) for seed in range(4)]) < 0.97


def test_knobs_of_a_film():
    plain = films("normal")
    for measure, less, more in ((sharpness, films("normal", sharpness=0.0), plain),
                                (np.mean, plain, films("normal", exposure=1.0)),
                                (np.std, plain, films("normal", contrast=1.5))):  # fmt: skip
        assert all(measure(a.image) < measure(b.image) for a, b in zip(less, more, strict=True))
    for marker, half in (("R", slice(0, 48)), ("L", slice(48, 96))):
        for marked, bare in zip(films("normal", marker=marker), films("normal", marker=None), strict=True):
            rows, columns = np.nonzero(marked.image != bare.image)
            assert len(rows) > 5
            assert set(columns // 48) == {half.start // 48}


@pytest.mark.parametrize(("knobs", "words"), [
    ({"kind": "fungal"}, "fungal"), ({"size": 8}, "size"), ({"severity": 1.5}, "severity"),
    ({"sharpness": -1}, "sharpness"), ({"contrast": 0}, "contrast"), ({"marker": "X"}, "marker"),
])  # fmt: skip
def test_bad_film_is_refused(knobs, words):
    with pytest.raises(ValueError, match=words):
        phantom.render(0, **{"kind": "normal"} | knobs)


# A set ----------------------------------------------------------------------------------------------------------------


def test_counts_names_and_masks(small):
    folder, summary = small
    for split, number in (("train", 40), ("val", 6), ("test", 24)):
        found = {label: len(images(folder, f"{split}/{label}/*.jpeg")) for label in NAMES}
        assert found == summary["images"][split]
        assert found["NORMAL"] + found["PNEUMONIA"] == number
    assert [summary["images"][split]["COVID19"] for split in ("train", "val", "test")] == [4, 0, 1]
    train = summary["images"]["train"]
    assert train["PNEUMONIA"] / train["NORMAL"] == pytest.approx(2.2, rel=0.15)
    for path in images(folder, "*/[NPC]*/*.jpeg"):
        assert re.fullmatch(NAMES[path.parent.name], path.stem)
    lung, lesion = phantom.masks(manifest(folder), size=64)
    assert lung.shape == lesion.shape == (75, 64, 64)
    assert lung.dtype == lesion.dtype == bool
    normal = manifest(folder)["path"].str.contains("/NORMAL/").to_numpy()
    assert lung.any((1, 2)).all()
    assert not lesion[normal].any()
    assert lesion[~normal].any((1, 2)).mean() > 0.9
    assert (lesion & ~lung).sum() == 0


def test_masks_go_with_their_images(small):
    folder, _ = small
    table = manifest(folder)
    lung, _ = phantom.masks(table, size=64)
    grey = np.stack([cv2.imread(path, cv2.IMREAD_GRAYSCALE) for path in table["path"]]).astype(float)
    own, others = (np.mean([image[mask].mean() for image, mask in zip(grey, masks, strict=True)])
                   for masks in (lung, np.roll(lung, 1, axis=0)))  # fmt: skip
    assert own < others - 1


def test_masks_of_something_else(tmp_path):
    table = pd.DataFrame({"path": [str(tmp_path / "train" / "NORMAL" / "IM-0001-0001.jpeg")]})
    with pytest.raises(FileNotFoundError, match=r"IM-0001-0001\.png.*python -m cxr phantom"):
        phantom.masks(table)


def test_patients_have_several_images_and_stay_in_their_split(small):
    folder, _ = small
    patients = {split: [re.match(r"person\d+_[a-z]+|.*IM-\d+", path.stem)[0]
                        for path in images(folder, f"{split}/[NP]*/*.jpeg")] for split in ("train", "val", "test")}
    sets = {split: set(names) for split, names in patients.items()}
    assert len(sets["train"]) < len(patients["train"])
    assert not sets["train"] & sets["test"]
    assert not sets["val"] & (sets["train"] | sets["test"])


def test_copies_are_planted_as_asked(small):
    folder, summary = small
    planted = pd.DataFrame(summary["planted"])
    where = planted[["copy_of", "file"]].map(lambda file: file.split("/")[0]).agg("-".join, axis=1)
    exact = planted["planted"] == "duplicate"
    assert where[exact].value_counts().to_dict() == {"train-train": 3, "train-test": 3, "test-test": 1}
    assert where[~exact].tolist() == ["train-train"] * 2
    found = digests(folder)
    content = pd.Series({name: digest for name, digest in found.items() if name.endswith(".jpeg")})
    assert content.duplicated().sum() == 7, "no copies but the planted ones"
    for row in planted.itertuples():
        assert (content[row.file] == content[row.copy_of]) == (row.planted == "duplicate")
        one, other = (cv2.imread(str(folder / name), 0).astype(float) for name in (row.file, row.copy_of))
        assert np.corrcoef(one.ravel(), other.ravel())[0, 1] > 0.98
        assert row.file.split("/")[1] == row.copy_of.split("/")[1]


def test_equal_seeds_give_equal_bytes(tmp_path):
    knobs = {"num_train": 9, "num_val": 2, "num_test": 4, "size": 48, "duplicates": 1, "near_duplicates": 1}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        phantom.write(tmp_path / name, seed=seed, **knobs)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    others = {digest for name, digest in digests(tmp_path / "c").items() if name.endswith("jpeg")}
    assert not others & set(digests(tmp_path / "a").values())


def test_written_once_and_replaced_only_where_it_is_a_phantom(tmp_path):
    first = phantom.write(tmp_path / "set", **FEW)
    assert json.loads((tmp_path / "set" / "phantom.json").read_text()) == first
    assert first["synthetic"] is True
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*")}
    assert phantom.write(tmp_path / "set", **FEW) == first
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*")}
    assert phantom.write(tmp_path / "set", seed=1, **FEW)["parameters"]["seed"] == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("do not lose me")
    with pytest.raises(ValueError, match=r"mine is not a phantom"):
        phantom.write(tmp_path / "mine", **FEW)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "set"]


def test_a_crash_leaves_nothing_behind(tmp_path, monkeypatch):
    phantom.write(tmp_path / "old", **FEW)
    before = digests(tmp_path / "old")
    monkeypatch.setattr(phantom.cv2, "imencode", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    for name in ("new", "old"):
        with pytest.raises(OSError, match="disk full"):
            phantom.write(tmp_path / name, seed=1, **FEW)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert digests(tmp_path / "old") == before


@pytest.mark.parametrize(("knobs", "words"), [
    ({"num_train": -1}, "num_train"), ({"num_test": 2.5}, "num_test"), ({"size": 16}, "size"), ({"seed": -1}, "seed"),
    ({"shift": 3}, "shift"), ({"shift": float("nan")}, "shift"), ({"shortcut": 1.1}, "shortcut"),
    ({"shortcut_test": -2}, "shortcut_test"),
    ({"duplicates": 40, "num_train": 10}, "plant fewer"), ({"duplicates_across_splits": 30}, "plant fewer"),
])  # fmt: skip
def test_bad_set_is_refused_before_anything_is_written(tmp_path, knobs, words):
    with pytest.raises(ValueError, match=words):
        phantom.write(tmp_path / "set", **SMALL | knobs)
    assert not list(tmp_path.iterdir())


# Its knobs ------------------------------------------------------------------------------------------------------------


def scores(folder, split, score):
    """Score of every image of a split, and whether it is a pneumonia."""
    paths = images(folder, f"{split}/[NP]*/*.jpeg")
    return (np.array([score(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)) for path in paths]),
            np.array([path.parent.name == "PNEUMONIA" for path in paths]))


@pytest.fixture(scope="module")
def shifted(tmp_path_factory):
    """The same test images without and with shift."""
    folder = tmp_path_factory.mktemp("shift")
    knobs = {"num_train": 120, "num_val": 0, "num_test": 60, "size": 96} | NO_COPIES
    for shift in (0, 2):
        phantom.write(folder / str(shift), shift=shift, **knobs)
    return folder


def test_shift_changes_test_and_not_train(shifted):
    assert digests(shifted / "0" / "train") == digests(shifted / "2" / "train")
    assert digests(shifted / "0" / "masks") == digests(shifted / "2" / "masks")
    sharp = {shift: scores(shifted / shift, "test", sharpness) for shift in "02"}
    assert sharp["2"][0].mean() < 0.97 * sharp["0"][0].mean()
    normal = ~sharp["0"][1]
    grey = [scores(shifted / shift, "test", np.mean)[0][normal] for shift in "02"]
    assert np.mean(grey[1] - grey[0]) > 3, "test normals look more like train pneumonias"


def test_trivial_scores_do_not_solve_it(shifted):
    blur, label = scores(shifted / "0", "train", lambda image: -sharpness(image))
    grey, _ = scores(shifted / "0", "train", np.mean)
    assert 0.5 < roc_auc_score(label, blur) < 0.75, "a blur difference as in the real set, smaller"
    assert max(roc_auc_score(label, grey), roc_auc_score(label, -grey)) < 0.75


@pytest.mark.parametrize(("shortcut", "test", "expected"), [(1.0, None, 1.0), (1.0, -1.0, 0.0), (0.0, None, None)])
def test_shortcut_ties_the_marker_to_the_label(tmp_path, shortcut, test, expected):
    def right_minus_left(image):  # the brightest spot in the upper corners
        top = image[5:40].astype(float)
        return top[:, -14:].max() - top[:, :18].max()

    knobs = {"num_train": 40, "num_val": 0, "num_test": 40, "size": 128} | NO_COPIES
    phantom.write(tmp_path / "set", shift=0.0, shortcut=shortcut, shortcut_test=test, **knobs)
    value, label = scores(tmp_path / "set", "test", right_minus_left)
    auc = roc_auc_score(label, value)
    assert abs(auc - expected) < 0.1 if expected is not None else 0.25 < auc < 0.75
    if shortcut:
        value, label = scores(tmp_path / "set", "train", right_minus_left)
        assert roc_auc_score(label, value) > 0.9


def test_gallery_is_small_and_labelled(tmp_path):
    phantom.gallery(tmp_path / "a.png", seed=1)
    picture = cv2.imread(str(tmp_path / "a.png"))
    assert (tmp_path / "a.png").stat().st_size < 400_000
    assert picture.shape[1] > 900
    words = [(picture[:40, 264 * column : 264 * (column + 1)] < 100).any(2).sum() for column in range(4)]
    assert min(words) > 100


def test_committed_gallery_is_small():
    path = pathlib.Path(__file__).parents[1] / "figures" / "phantom_gallery.png"
    assert path.stat().st_size < 400_000

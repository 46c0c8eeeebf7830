"""Probes do what their names say and catch what reads a marker; suspected labels; shared errors; saliency checks."""

import dataclasses
import json
import shutil

import cv2
import numpy as np
import pandas as pd
import pytest

from cxr import config, evaluate, phantom, report, trust, trustplots


@pytest.fixture(scope="module")
def films():
    drawn = [phantom.render(seed, kind, size=128, marker=marker) for seed, (kind, marker) in
             enumerate([("normal", "R"), ("bacterial", "L"), ("viral", None), ("normal", "R")])]
    return np.stack([film.image for film in drawn]), np.stack([film.lung_mask for film in drawn])


@pytest.mark.parametrize("key", trust.PROBES, ids=trust.name_of)
def test_every_probe_changes_images_and_leaves_the_originals(films, key):
    images, masks = films
    before = images.copy()
    changed = trust.PROBES[key](images, masks)
    assert changed.shape == images.shape and changed.dtype == np.uint8
    assert (images == before).all() and (changed != images).any()


def test_sweeps_move_what_they_are_named_for(films):
    images, masks = films
    sharp = [evaluate.blur_score(trust.PROBES["sharpness", s](images, masks)).mean() for s in (-4, -1, 2)]
    assert sharp[0] > evaluate.blur_score(trust.PROBES["sharpness", -1](images, masks)).mean() > sharp[2]
    grey = [trust.PROBES["brightness", s](images, masks).mean() for s in (-60, 30)]
    assert grey[0] < images.mean() < grey[1]
    assert trust.PROBES["contrast", 0.5](images, masks).std() < images.std()


def test_lungs_and_border_are_hidden_where_they_should_be(films):
    images, masks = films
    erased, only, border = (trust.PROBES[name, 1](images, masks) for name in
                            ("lungs erased", "lungs only", "border only"))
    for image, mask, gone, kept, edge in zip(images, masks, erased, only, border, strict=True):
        assert len(np.unique(gone[mask])) == 1 and (kept[mask] == image[mask]).all()
        assert len(np.unique(kept[cv2.dilate(np.uint8(mask), np.ones((9, 9))) == 0])) == 1
        assert len(np.unique(edge[30:-30, 30:-30])) == 1 and (edge[:10] == image[:10]).all()


def test_markers_are_removed_and_put():
    left = []
    for seed in range(12):
        with_it, without = (phantom.render(seed, "normal", size=160, marker=letter).image.astype(int)
                            for letter in ("RL"[seed % 2], None))
        removed = trust.PROBES["marker removed", 1](np.uint8(with_it)[None])[0].astype(int)
        marker = with_it - without > 40
        left.append(np.abs(removed - without)[marker].mean() / (with_it - without)[marker].mean())
        put = trust.PROBES["marker L", 1](np.uint8(with_it)[None])[0]
        assert put[:60, -24:].max() > 200 and (removed[96:] == with_it[96:]).all()
        assert (removed[:, 40:-40] == with_it[:, 40:-40]).all()
    assert np.median(left) < 0.1


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A run on a small phantom whose markers give the label away, with a record of a score that reads them."""
    root = tmp_path_factory.mktemp("lab")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXR_ROOT", str(root))
        phantom.write(root / "set", num_train=120, num_val=8, num_test=80, size=96, seed=3, shortcut=1.0)
        run = config.start("09_trust", data=str(root / "set"), num_seeds=1)
        keep = run.manifest["split"].isin(["val", "test", "test_duplicate"])
        part = run.manifest[keep]
        frame = part[["image_id", "patient_id", "split"]].assign(
            y_true=(part["label"] != "NORMAL").astype(int), y_score=reads_marker(run.images(96)[keep]))
        frame = pd.concat([frame, frame[frame["split"] == "val"].assign(split="val_shifted")], ignore_index=True)
        yield run, run.save("reads the marker", {"model": "marker"}, 0, frame)


def reads_marker(images):
    """Return a score that compares what the upper corners hold."""
    sides = [images[:, 4:32, side].astype(float).max((1, 2)) for side in (np.s_[:12], np.s_[-12:])]
    return 1 / (1 + np.exp(-(sides[1] - sides[0]) / 40))


def test_a_score_that_reads_the_marker_is_caught_and_the_record_holds_up(lab):
    run, record = lab
    lungs = phantom.masks(run.manifest, 96)[0]
    found = trust.probe(run, record, reads_marker, run.images(96), lungs=lungs, threshold="sensitivity_95_shifted")
    assert {*trust.MARKER, "border only"} <= set(trust.findings(found["probes"]))
    assert found["metrics"]["test"]["auc"] == record["metrics"]["test"]["auc"]
    assert found["thresholds"] == record["thresholds"]
    again = trust.probe(run, record, None, None, lungs=lungs, threshold="sensitivity_95_shifted")  # loaded, not scored
    assert again["run_id"] == found["run_id"] and again["probes"] == found["probes"]
    for other in ({"lungs": None, "threshold": "sensitivity_95_shifted"}, {"lungs": lungs, "threshold": "half"}):
        with pytest.raises(TypeError):  # another question: it would be scored, not answered by this record
            trust.probe(run, record, None, run.images(96), **other)
    loaded = report.load(run.results)
    assert [one["run_id"] for cohort in report.cohorts(loaded) for one in cohort] == [record["run_id"]]
    figure = trustplots.probes({"a": found["probes"], "b": found["probes"]}, synthetic=True)
    assert len(figure.axes) == 15
    changed = json.loads(json.dumps(found))
    del changed["sha256"]  # the report recomputes the numbers of records without a hash too
    changed["probes"]["border only:1"]["auc"]["value"] -= 0.1
    path = run.results / "records" / f"{found['run_id']}.json"
    path.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="border only:1"):
        report.load(run.results, intervals=False)
    path.write_text(json.dumps(found))


def test_a_score_of_the_lungs_alone_is_not_held_against(lab):
    run, record = lab
    lungs = phantom.masks(run.manifest, 96)[0]
    usual = lungs.mean(0) > 0.5

    def score(images):  # the middle of the usual lungs, in a range that markers and borders do not touch
        return 1 / (1 + np.exp(-(images[:, usual].mean(1) - 90) / 20))

    frame = run.predictions(record)
    rows = run.manifest.reset_index().set_index("image_id").loc[frame["image_id"], "index"].to_numpy()
    plain = run.save("reads the lungs", {"model": "lungs"}, 0, frame.assign(y_score=score(run.images(96)[rows])))
    found = trust.probe(run, plain, score, run.images(96), lungs=lungs, threshold="sensitivity_95_shifted")
    assert not set(trust.findings(found["probes"])) & {"marker L", "marker R", "border only"}
    fall, move = trust.moved(found["probes"]["brightness:-60"])
    assert fall < 0.1 < move  # the order stays, the frozen threshold does not hold


def test_without_masks_the_probes_of_the_lungs_are_left_out(lab):
    run, record = lab
    other = record | {"config": record["config"] | {"other": 1}}
    found = trust.probe(run, other, reads_marker, run.images(96), lungs=None, threshold="half")
    assert not any(name.startswith("lungs") for name in found["probes"]) and "border only:1" in found["probes"]


def test_a_changed_interval_of_a_probe_is_noticed(lab, tmp_path):
    run, record = lab
    found = trust.probe(run, record, reads_marker, run.images(96), lungs=None, threshold="half")
    shutil.copytree(run.results, tmp_path / "results")
    report.load(tmp_path / "results")
    path = tmp_path / "results" / "records" / f"{found['run_id']}.json"
    for part, number in (("auc", "low"), ("unchanged", "auc")):
        changed = json.loads(json.dumps(found))
        changed["probes"]["border only:1"][part][number] = 0.1
        del changed["sha256"]
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=f"border only:1.{part}.{number} is 0.1"):
            report.load(tmp_path / "results")


def test_best_saved_configuration_of_each_notebook(lab):
    run, record = lab
    other = dataclasses.replace(run, notebook="02_baseline_cnn")
    weak = run.predictions(record)
    other.save("weak", {"model": "weak"}, 0, weak.assign(y_score=1 - weak["y_score"]))
    strong = other.save("strong", {"model": "strong"}, 0, weak)
    perfect = weak.assign(y_score=np.where(weak["split"] == "val_shifted", weak["y_true"], weak["y_score"]))
    other.save("class brightness", {"augment": "class_brightness"}, 0, perfect)  # its validation carries the label
    assert trust.saved(run, ("02", "09")) == {}
    for one in other.records():
        (run.directory / "models").mkdir(exist_ok=True)
        (run.directory / "models" / f"{one['run_id']}.keras").touch()
    found = trust.saved(run, ("02", "09"))
    assert found["02 strong"][0]["run_id"] == strong["run_id"] and "02 weak" not in found
    assert list(trust.saved(run, ("02",))) == ["02 strong"]


def test_swapped_labels_are_suspected_and_clean_ones_are_not():
    rng = np.random.default_rng(0)
    truth = np.repeat([0, 1], 100)
    score = np.clip(np.where(truth, rng.normal(0.9, 0.05, 200), rng.normal(0.1, 0.05, 200)), 0, 1)
    frame = pd.DataFrame({"image_id": [f"i{n}" for n in range(200)], "y_true": truth, "y_score": score})
    assert trust.suspected_labels(frame).empty
    swapped = frame.assign(y_true=np.where(np.arange(200) % 40 == 0, 1 - truth, truth))
    found = trust.suspected_labels(swapped)
    assert set(found["image_id"]) <= {f"i{n}" for n in range(0, 200, 40)} and len(found) >= 3  # those above the mean
    assert found["margin"].is_monotonic_decreasing



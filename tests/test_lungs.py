"""Lung fields: the outlines that exist, a network for the rest, and how much of a map lies inside."""

import cv2
import numpy as np
import pandas as pd
import pytest

from cxr import config, data, lungs, phantom


def test_dice_counts_overlap_twice_and_two_empty_masks_agree():
    a = np.zeros((3, 4, 4), bool)
    a[:2, :2] = True  # 8 pixels, twice; the third pair is empty
    b = np.zeros_like(a)
    b[0, :2], b[1, 2:] = True, True
    np.testing.assert_allclose(lungs.dice(a, b), [1, 0, 1])


def test_mass_inside_is_the_share_in_the_field_and_unknown_for_an_empty_map():
    maps = np.zeros((2, 4, 4))
    maps[0, 0], maps[0, 3] = 3, 1
    fields = np.zeros(maps.shape, bool)
    fields[:, :2] = True
    inside = lungs.mass_inside(maps, fields)
    assert inside[0] == 0.75 and np.isnan(inside[1])


def test_real_outlines_are_found_by_the_path_of_their_image(tmp_path):
    path = tmp_path / "lung_masks" / "train" / "NORMAL" / "IM-0001.png"
    path.parent.mkdir(parents=True)
    mask = np.zeros((40, 40), np.uint8)
    mask[:, :20] = 255
    cv2.imwrite(str(path), mask)
    manifest = pd.DataFrame({"image_id": ["test/NORMAL/IM-0009.jpeg", "train/NORMAL/IM-0001.jpeg"]})
    manifest.attrs = {"synthetic": False, "root": str(tmp_path / "chest_xray")}
    rows, masks = lungs.outlined(manifest, 16)
    assert rows.tolist() == [1] and masks[0, :, :7].all() and not masks[0, :, 9:].any()


def test_a_set_without_outlines_says_where_they_were_looked_for(tmp_path):
    manifest = pd.DataFrame({"image_id": ["train/NORMAL/a.png"]})
    manifest.attrs = {"synthetic": False, "root": str(tmp_path / "set")}
    with pytest.raises(FileNotFoundError, match="lung_masks"):
        lungs.outlined(manifest, 16)


def test_the_network_outlines_phantoms_that_it_has_not_seen(tmp_path, monkeypatch):
    phantom.write(tmp_path / "set", num_train=80, num_val=4, num_test=8, size=64)
    monkeypatch.setattr("cxr.config.root", lambda: tmp_path)
    run = config.start("08_autoencoder", data=str(tmp_path / "set"))
    fields, scores = lungs.segment(run, 32, epochs=8)
    assert fields.shape == (len(run.manifest), 32, 32) and fields.dtype == bool
    assert len(scores) == (run.manifest["split"] == "val").sum() and scores.mean() > 0.8
    again, _ = lungs.segment(run, 32, epochs=8)  # loaded, not trained again
    np.testing.assert_array_equal(again, fields)


def test_the_real_outlines_fit_the_real_images(real_data):
    manifest = data.load_manifest(str(real_data / "chest_xray"))
    rows, masks = lungs.outlined(manifest, 32)
    assert len(rows) == 1073 and 0.2 < masks.mean() < 0.5
    assert manifest["image_id"].iloc[rows].str.startswith("train/").all()

"""Lung fields: the outlines that exist, a network for the rest, and how much of a map lies inside."""

import cv2
import numpy as np
import pandas as pd
import pytest

from cxr import anomaly, autoencoder, config, data, lungs, phantom


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


def test_outlines_are_found_of_joined_sets_too(tmp_path):
    path = tmp_path / "lung_masks" / "train" / "NORMAL" / "a.png"
    path.parent.mkdir(parents=True)
    cv2.imwrite(str(path), np.full((20, 20), 255, np.uint8))
    manifest = pd.DataFrame({"image_id": ["covid19/COVID19/a.png", "chest_xray/train/NORMAL/a.jpeg"]})
    manifest.attrs = {"synthetic": False, "root": f"{tmp_path / 'chest_xray'}:{tmp_path / 'covid19'}"}
    assert lungs.are_outlined(manifest) and lungs.outlined(manifest, 16)[0].tolist() == [1]


def test_a_set_without_outlines_learns_lungs_from_phantoms(tmp_path, monkeypatch, capsys):
    knobs = {"num_train": 40, "num_val": 4, "num_test": 20, "size": 64}
    for name in ("mine", "phantom"):
        phantom.write(tmp_path / name, **knobs, seed=len(name))
    (tmp_path / "mine" / "phantom.json").unlink()  # now it passes for real, and nobody has outlined it
    monkeypatch.setattr("cxr.config.root", lambda: tmp_path)
    run = config.start("09_trust", data=str(tmp_path / "mine"))
    load = data.load_manifest
    monkeypatch.setattr(data, "load_manifest", lambda source, **rest: load(tmp_path / source, **rest))
    assert not run.synthetic and not lungs.are_outlined(run.manifest)
    fields = lungs.fields(run, 64, epochs=6)
    assert "learns from phantoms" in capsys.readouterr().out
    assert fields.shape == (len(run.manifest), 64, 64) and fields.dtype == bool and 0.05 < fields.mean() < 0.6


@pytest.fixture(scope="module")
def outlines(tmp_path_factory):
    """A run on phantoms and the lung probabilities of a network that has learnt from the normal ones."""
    folder = tmp_path_factory.mktemp("lungs")
    phantom.write(folder / "set", num_train=80, num_val=4, num_test=24, size=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cxr.config.root", lambda: folder)
        run = config.start("08_autoencoder", data=str(folder / "set"))
    network = lungs.network(run, 32, epochs=12, normals_only=True)
    return run, autoencoder.apply(network, run.images(32))


def test_the_network_outlines_phantoms_that_it_has_not_seen(outlines):
    run, probability = outlines
    scores = lungs.agreement(run, probability)
    assert len(scores) == (run.manifest["split"] == "val").sum() and scores.mean() > 0.8
    again = lungs.network(run, 32, epochs=12, normals_only=True)  # loaded, not trained again
    np.testing.assert_allclose(autoencoder.apply(again, run.images(32)), probability, atol=1e-5)


def test_outlines_that_were_mended_are_learnt_anew(outlines, monkeypatch):
    run, probability = outlines
    outlined = lungs.outlined
    monkeypatch.setattr(lungs, "outlined", lambda *about: (outlined(*about)[0], ~outlined(*about)[1]))
    turned = autoencoder.apply(lungs.network(run, 32, epochs=12, normals_only=True), run.images(32))
    assert np.corrcoef(turned.ravel(), probability.ravel())[0, 1] < 0


def test_a_painted_chest_loses_its_silhouette(outlines):
    run, probability = outlines
    normal = np.flatnonzero(run.manifest["label"] == "NORMAL")
    plain = lungs.silhouette(run.images(32)[normal], probability[normal])
    hazy = np.uint8(0.3 * run.images(32)[normal] + 0.7 * 150)  # fog over all of it, then exposed as before
    fog, _ = anomaly.opacities(run.images(32)[normal], seed=0, lungs=probability[normal] > 0.5)
    assert plain.shape == (len(normal), 2) and np.isfinite(plain).all()
    contrast, doubt = (lungs.silhouette(fog, probability[normal]) - plain).mean(0)
    assert doubt - contrast > 0 and contrast < 0, "the border is harder to see"
    np.testing.assert_allclose(lungs.silhouette(hazy, probability[normal])[:, 0], plain[:, 0], atol=0.05)  # no exposure
    assert np.isfinite(lungs.silhouette(fog[:2], np.stack([np.ones((32, 32)), np.zeros((32, 32))]))).all()


def test_within_the_lungs_a_map_counts_and_a_hidden_lung_is_where_lungs_usually_lie():
    even, seen = np.ones((2, 32, 32), "float32"), np.zeros((2, 32, 32), "float32")
    seen[0, :, :4] = 1  # a lung at the edge; in the second image none is found
    found = lungs.within(even, seen)
    assert (found[0, :, :4] == 1).all() and found[1, :, :4].max() < 0.2 and found[:, 15, 9].min() > 0.9


def test_an_image_without_lungs_gets_a_score():
    empty = lungs.silhouette(np.full((1, 32, 32), 90, np.uint8), np.zeros((1, 32, 32), "float32"))
    assert empty.tolist() == [[0, 0]]


@pytest.mark.real
def test_the_real_outlines_fit_the_real_images(real_data):
    manifest = data.load_manifest(str(real_data / "chest_xray"))
    rows, masks = lungs.outlined(manifest, 32)
    assert len(rows) == 1073 and 0.2 < masks.mean() < 0.5
    assert manifest["image_id"].iloc[rows].str.startswith("train/").all()

"""A model handed on: every file accounted for, odd images flagged, nothing executed, nothing written elsewhere."""

import json
import os
import pathlib
import pickle
import shutil
import sys
import zipfile

import cv2
import keras
import numpy as np
import pandas as pd
import pytest

from cxr import __main__ as cli
from cxr import config, data, deploy, evaluate, models, phantom, predict, train
from tests.test_data import dicom


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A small network trained on a small phantom, exported; and its run."""
    root = tmp_path_factory.mktemp("lab")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXR_ROOT", str(root))
        phantom.write(root / "set", num_train=120, num_val=8, num_test=40, size=96, seed=3)
        run = config.start("02_baseline_cnn", data=str(root / "set"), num_seeds=1)
        recipe = train.Recipe(model="lab_cnn", image_size=64, epochs=3, monitor="shifted_auc", learning_rate=3e-3)
        record = train.repeat(run, "small", recipe, models.lab_cnn)[0]
        path = deploy.export(run, record, run.directory / "models")
        yield run, record, path


@pytest.fixture
def films(lab, tmp_path):
    """A folder with good, odd and broken files."""
    run, *_ = lab
    folder = tmp_path / "films"
    (folder / "more").mkdir(parents=True)
    good = run.manifest["path"].iloc[:6].tolist()
    for number, path in enumerate(good):
        (folder / f"good{number}{pathlib.Path(path).suffix}").write_bytes(pathlib.Path(path).read_bytes())
    film = cv2.imread(good[0], cv2.IMREAD_GRAYSCALE)
    rng = np.random.default_rng(0)
    odd = {"inverted.png": 255 - film, "rotated.png": np.rot90(film).copy(),
           "noise.png": rng.integers(0, 255, film.shape), "colour.png": rng.integers(0, 255, (*film.shape, 3)),
           "turned.png": np.rot90(film, 2).copy(),
           "small.png": cv2.resize(film, (40, 40)), "black.png": np.zeros_like(film)}
    for name, image in odd.items():
        cv2.imwrite(str(folder / "more" / name), np.asarray(image, "uint8"))
    (folder / "empty.jpeg").write_bytes(b"")
    (folder / "cut.jpeg").write_bytes(pathlib.Path(good[0]).read_bytes()[:200])
    (folder / "notes.txt").write_text("not an image")
    (folder / ".hidden").write_text("of the system")
    with zipfile.ZipFile(folder / "evil.zip", "w") as archive:
        archive.writestr("../outside.txt", "x")
    return folder


def test_every_file_is_accounted_for_and_odd_ones_are_flagged(lab, films, tmp_path, capsys):
    _, _, path = lab
    out = tmp_path / "out"
    assert cli.main(["predict", str(films), "--model", str(path), "--out", str(out)]) == 0
    table = pd.read_csv(out / "predictions.csv", keep_default_na=False).assign(
        name=lambda t: t["file"].map(lambda f: pathlib.Path(f).name)).set_index("name")
    assert list(table.columns) == predict.COLUMNS and len(table) == 6 + 7 + 4
    assert (table["error"] != "").sum() == 4 and "unpack" in table.loc["evil.zip", "error"]
    assert "17 files: 13 scored, 4 failed" in capsys.readouterr().out
    warnings = table["warnings"]
    assert "inverted" in warnings["inverted.png"] and "rotated by" in warnings["rotated.png"]
    assert "rotated by 180" in warnings["turned.png"]
    assert "colour" in warnings["colour.png"] and "smaller" in warnings["small.png"]
    assert "constant" in warnings["black.png"] and warnings["noise.png"] != ""
    good = table[table.index.str.startswith("good")]
    assert (good["warnings"] == "").sum() >= 5 and set(good["decision"]) <= {"normal", "pneumonia"}
    page = (out / "index.html").read_text()
    assert page.count("<article") == 17 and page.count("data:image/jpeg") == 13 and "not diagnosis" in page
    assert not (tmp_path / "outside.txt").exists() and not (films.parent / "outside.txt").exists()


def test_scores_are_those_of_the_model_and_decisions_those_of_its_frozen_threshold(lab, films, tmp_path):
    run, record, path = lab
    model, about = deploy.load(path)
    files = predict.find_files([films / f"good{number}.jpeg" for number in range(6)])
    table = predict.score_files(files, model, about, tmp_path / "out")
    expected = train.predict(train.load_model(run, record), run.images(64)[:6])
    np.testing.assert_allclose(table["probability"].astype(float), expected, atol=1e-5)
    cut = record["thresholds"][evaluate.THRESHOLD]
    assert (table["decision"] == np.where(table["probability"].astype(float) >= cut, "pneumonia", "normal")).all()


def test_an_odd_shape_another_model_and_its_own_output_stop_nothing(lab, films, tmp_path):
    import cv2

    model, about = deploy.load(lab[2])
    folder = tmp_path / "mine"
    folder.mkdir()
    cv2.imwrite(str(folder / "tall.png"), np.tile(np.uint8([[10, 200] * 8]), (4000, 1)))
    (folder / "film.jpeg").write_bytes((films / "good0.jpeg").read_bytes())
    for _ in range(2):
        files = predict.find_files([folder], folder / "predictions")
        table = predict.score_files(files, model, about, folder / "predictions")
        assert [file.name for file in files] == ["film.jpeg", "tall.png"] and table["error"].eq("").all()
    other = about | {"run_id": "other"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "_score_chunk", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            predict.score_files(files, model, other, folder / "predictions")
    assert not (folder / "predictions" / "predictions.csv").exists(), "one model's rows under another's name"


def test_a_large_film_is_seen_as_training_sees_it(lab, tmp_path):
    model, about = deploy.load(lab[2])
    film = cv2.resize(phantom.render(5, "normal", size=128).image, (1300, 1100), interpolation=cv2.INTER_CUBIC)
    noise = np.random.default_rng(0).normal(0, 8, film.shape)
    for label in ("NORMAL", "PNEUMONIA"):
        (tmp_path / "big" / label).mkdir(parents=True)
        grainy = np.clip(film + noise * (label == "NORMAL"), 0, 255)
        cv2.imwrite(str(tmp_path / "big" / label / "a.jpeg"), np.uint8(grainy))
    cache = tmp_path / "cache"
    images = data.load_images(data.load_manifest(tmp_path / "big", cache_dir=cache), 64, cache_dir=cache)
    table = predict.score_files(predict.find_files([tmp_path / "big"]), model, about, tmp_path / "out")
    np.testing.assert_allclose(table["probability"].astype(float), train.predict(model, images), atol=1e-5)


def test_names_headers_and_folders_that_are_odd_stop_nothing(lab, films, tmp_path, monkeypatch):
    model, about = deploy.load(lab[2])
    good = (films / "good0.jpeg").read_bytes()
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "good.jpeg").write_bytes(good)
    with open(os.fsencode(folder) + b"/M\xfcller.jpeg", "wb") as file:
        file.write(good)
    content = dicom(phantom.render(1, "normal", size=96).image, bits=8, BodyPartExamined="CHEST")
    damaged = content.replace(b"\x18\x00\x15\x00CS", b"\x18\x00\x15\x00JS")
    assert damaged != content
    (folder / "header.dcm").write_bytes(damaged)
    for _ in range(2):  # its own output lies in the folder of the films, and is no film
        table = predict.score_files(predict.find_files([folder], folder), model, about, folder)
        assert len(table) == 3 and table["error"].ne("").sum() == 1 and "unreadable DICOM" in table["error"].max()
        predict.write_page(table, about, folder)
    assert predict.find_files([films / "good0.jpeg"], films) == [films / "good0.jpeg"]


def test_links_are_followed_and_what_cannot_be_opened_has_a_line(lab, films, tmp_path, monkeypatch):
    folder, elsewhere = tmp_path / "mine", tmp_path / "elsewhere"
    for place, name in ((folder, "a.jpeg"), (elsewhere, "b.jpeg"), (folder / "closed", "c.jpeg")):
        place.mkdir()
        (place / name).write_bytes((films / "good0.jpeg").read_bytes())
    (folder / "linked").symlink_to(elsewhere)
    (folder / "linked" / "above").symlink_to(folder)
    (folder / "nothing.jpeg").symlink_to(tmp_path / "gone")
    os.mkfifo(folder / "pipe")
    scan = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)  # who tests as root can open any folder
    files = predict.find_files([folder])
    assert [str(file.relative_to(folder)) for file in files] == ["a.jpeg", "closed", "linked/b.jpeg", "nothing.jpeg",
                                                                 "pipe"]
    table = predict.score_files(files, *deploy.load(lab[2]), tmp_path / "out")
    assert table["error"].ne("").tolist() == [False, True, False, True, True]
    assert "cannot be opened" in table["error"][1] and "regular" in table["error"][4]


def test_a_film_of_fewer_bits_than_its_file_holds_is_called_dark(lab, films, tmp_path):
    film = cv2.imread(str(films / "good0.jpeg"), cv2.IMREAD_GRAYSCALE).astype(np.uint16)
    folder = tmp_path / "bits"
    folder.mkdir()
    for bits in (14, 16):
        cv2.imwrite(str(folder / f"{bits}.png"), film * 257 >> (16 - bits))
    table = predict.score_files(predict.find_files([folder]), *deploy.load(lab[2]), tmp_path / "out")
    assert table["warnings"].str.contains("dark: ").tolist() == [True, False]


def test_a_killed_run_goes_on_without_scoring_again(lab, films, tmp_path, monkeypatch):
    model, about = deploy.load(lab[2])
    files, out = predict.find_files([films]), tmp_path / "out"
    first = predict.score_files(files[:5], model, about, out)
    scored = []
    explained = predict.explain.explained
    monkeypatch.setattr(predict.explain, "explained", lambda m, x: scored.append(len(x)) or explained(m, x))
    again = predict.score_files(files, model, about, out)
    assert sum(scored) == 13 - (first["error"] == "").sum()
    assert again["probability"].astype(str).tolist()[:5] == first["probability"].astype(str).tolist()


def test_all_failed_is_exit_status_one_and_nothing_to_score_is_two(lab, tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"x")
    assert cli.main(["predict", str(tmp_path / "bad.png"), "--model", str(lab[2]), "--out", str(tmp_path / "o")]) == 1
    (tmp_path / "none").mkdir()
    assert cli.main(["predict", str(tmp_path / "none"), "--model", str(lab[2])]) == 2
    assert "no files in there" in capsys.readouterr().err


def test_a_model_is_found_by_its_run_id(lab, monkeypatch):
    run, record, path = lab
    monkeypatch.setenv("CXR_ROOT", str(run.directory.parents[1]))
    assert deploy.load(record["run_id"])[1]["run_id"] == record["run_id"]
    with pytest.raises(FileNotFoundError, match=record["run_id"]):
        deploy.load("02_baseline_cnn-00000000-s0")


def test_models_that_could_run_code_or_are_not_ours_are_refused(lab, tmp_path):
    about = lab[2].with_suffix(".json").read_text()
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"weights": 1}))
    (tmp_path / "b.keras").write_bytes(pickle.dumps({"weights": 1}))
    for name in ("a.pkl", "b.keras"):
        with pytest.raises(ValueError, match="not a .keras file"):
            deploy.load(tmp_path / name)
    inputs = keras.Input((8, 8, 1))
    for name, layer in (("lambda", keras.layers.Lambda(lambda x: x * 2)), ("other", keras.layers.ReLU())):
        keras.Model(inputs, layer(inputs)).save(tmp_path / f"{name}.keras")
        with pytest.raises(FileNotFoundError, match="missing"):
            deploy.load(tmp_path / f"{name}.keras")
        (tmp_path / f"{name}.json").write_text(about)
        with pytest.raises(ValueError, match="not a model of this lab"):
            deploy.load(tmp_path / f"{name}.keras")


def test_an_external_set_is_judged_by_the_frozen_thresholds(lab, tmp_path, capsys):
    run, record, path = lab
    phantom.write(tmp_path / "elsewhere", num_train=60, num_val=8, num_test=40, size=96, seed=9)
    arguments = [str(tmp_path / "elsewhere"), "--model", str(path), "--out", str(tmp_path / "out")]
    assert cli.main(["evaluate", *arguments]) == 0
    assert "auc: 0." in capsys.readouterr().out
    found = json.loads(next((tmp_path / "out").glob("*.json")).read_text())
    assert found["thresholds"] == record["thresholds"] and found["data"]["num_images"] > 50
    assert (tmp_path / "out" / found["predictions"]["path"]).is_file()
    with pytest.raises(ValueError, match="trained on"):
        predict.external(run.manifest.attrs["root"], *deploy.load(path), tmp_path)
    with pytest.raises(ValueError, match="trained on"):
        predict.external(f"{run.manifest.attrs['root']}:{tmp_path / 'elsewhere'}", *deploy.load(path), tmp_path)
    shutil.copytree(run.manifest.attrs["root"], tmp_path / "archive" / "set")  # as a download is unpacked
    with pytest.raises(ValueError, match="trained on"):
        predict.external(tmp_path / "archive", *deploy.load(path), tmp_path)
    shutil.copytree(run.manifest.attrs["root"], tmp_path / "renamed")
    with pytest.raises(ValueError, match="has learnt from"):
        predict.external(tmp_path / "renamed", *deploy.load(path), tmp_path)


def test_a_model_whose_hashes_are_of_another_decoding_says_so(lab, tmp_path, capsys):
    phantom.write(tmp_path / "other", num_train=40, num_val=4, num_test=20, size=96, seed=11)
    about = json.loads(lab[2].with_suffix(".json").read_text())
    shutil.copy(lab[2], tmp_path / "old.keras")
    for decoding, told in ((about["decoding"], False), ("v0", True)):
        (tmp_path / "old.json").write_text(json.dumps(about | {"decoding": decoding}))
        assert cli.main(["evaluate", str(tmp_path / "other"), "--model", str(tmp_path / "old.keras"),
                         "--out", str(tmp_path / "out")]) == 0
        assert ("decoded otherwise" in capsys.readouterr().out) == told


def test_what_an_external_set_leaves_out_is_told(lab, tmp_path, capsys):
    phantom.write(tmp_path / "other", num_train=40, num_val=4, num_test=20, size=96, seed=11)
    films = {label: sorted((tmp_path / "other" / "train" / label).glob("*")) for label in ("NORMAL", "PNEUMONIA")}
    (tmp_path / "other" / "train" / "PNEUMONIA" / "both.jpeg").write_bytes(films["NORMAL"][0].read_bytes())
    films["PNEUMONIA"][0].write_bytes(b"cut")
    assert cli.main(["evaluate", str(tmp_path / "other"), "--model", str(lab[2]), "--out", str(tmp_path / "out")]) == 0
    about = json.loads(next((tmp_path / "out").glob("*.json")).read_text())["data"]
    assert about["dropped"] >= 2 and len(about["unreadable"]) == 1 and "left out" in capsys.readouterr().out
    table = pd.read_csv(next((tmp_path / "out").glob("*.csv.gz")))
    assert not table["image_id"].str.contains(f"both|{films['NORMAL'][0].name}").any(), "a picture with two labels"


@pytest.mark.parametrize("path", sorted((pathlib.Path(__file__).parents[1] / "results").glob("*/models/*.keras")),
                         ids=lambda path: path.stem)
def test_a_published_model_works_right_after_cloning(path, films, tmp_path):
    assert path.stat().st_size < 5e6
    model, about = deploy.load(path)
    record = json.loads((path.parents[1] / "records" / f"{path.stem}.json").read_text())
    assert about["thresholds"] == record["thresholds"] and about["run_id"] == record["run_id"]
    table = predict.score_files(predict.find_files([films / "good0.jpeg"]), model, about, tmp_path)
    assert table["error"].eq("").all() and 0 <= float(table["probability"][0]) <= 1


def test_a_dicom_of_a_hand_or_of_a_lateral_view_is_flagged_by_what_its_header_says(lab, tmp_path):
    film = phantom.render(1, "normal", size=128).image
    (tmp_path / "hand.dcm").write_bytes(dicom(film, bits=8, BodyPartExamined="HAND"))
    (tmp_path / "lateral.dcm").write_bytes(dicom(film, bits=8, BodyPartExamined="CHEST", ViewPosition="LL"))
    (tmp_path / "chest.dcm").write_bytes(dicom(film, bits=8, BodyPartExamined="CHEST", ViewPosition="PA"))
    model, about = deploy.load(lab[2])
    table = predict.score_files(predict.find_files([tmp_path]), model, about, tmp_path / "out")
    warnings = dict(zip(["chest", "hand", "lateral"], table["warnings"], strict=True))
    assert "HAND, not CHEST" in warnings["hand"] and "not frontal" in warnings["lateral"]
    assert "says" not in warnings["chest"] and table["error"].eq("").all()
    assert table["out_of_distribution"][[1, 2]].all()


def test_two_hundred_mixed_files_are_all_accounted_for(lab, tmp_path, capsys):
    folder = tmp_path / "many"
    folder.mkdir()
    good = pathlib.Path(lab[0].manifest["path"].iloc[0]).read_bytes()
    for number in range(200):
        (folder / f"{number:03d}.jpeg").write_bytes(good if number % 3 else good[:100 + number])
    assert cli.main(["predict", str(folder), "--model", str(lab[2]), "--out", str(tmp_path / "out")]) == 0
    table = pd.read_csv(tmp_path / "out" / "predictions.csv", keep_default_na=False)
    assert len(table) == 200 and (table["error"] != "").sum() == 67
    assert "200 files: 133 scored, 67 failed" in capsys.readouterr().out


def test_onnx_gives_the_same_scores(lab, tmp_path, capsys):
    runtime = pytest.importorskip("onnxruntime", reason="ONNX is an extra: pip install -r requirements-onnx.txt")
    pytest.importorskip("tf2onnx", reason="ONNX is an extra: pip install -r requirements-onnx.txt")
    run, _, path = lab
    for suffix in (".keras", ".json"):
        (tmp_path / f"m{suffix}").write_bytes(path.with_suffix(suffix).read_bytes())
    assert cli.main(["export", "--model", str(tmp_path / "m.keras")]) == 0
    session = runtime.InferenceSession(tmp_path / "m.onnx")
    images = run.images(64)[:20]
    found, = session.run(None, {session.get_inputs()[0].name: images[..., None].astype("float32")})
    np.testing.assert_allclose(found[:, 0], train.predict(deploy.load(path)[0], images), atol=1e-5)


def test_without_its_extra_export_says_what_to_install(lab, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tf2onnx", None)
    assert cli.main(["export", "--model", str(lab[2])]) == 2
    assert "requirements-onnx.txt" in capsys.readouterr().err

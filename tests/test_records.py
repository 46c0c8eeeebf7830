"""Records: written once and whole, found again, noticed when changed, made again when the code changed."""

import dataclasses
import gzip
import hashlib
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from cxr import config, records


@pytest.fixture
def run(tmp_path):
    n = 60
    manifest = pd.DataFrame(
        {
            "image_id": [f"{k:03}.png" for k in range(n)],
            "patient_id": [f"p{k // 2}" for k in range(n)],
            "label": np.where(np.arange(n) % 2, "PNEUMONIA", "NORMAL"),
            "split": ["train"] * 20 + ["val"] * 20 + ["test"] * 20,
            "sha256": [f"{k:064}" for k in range(n)],
        }
    )
    manifest.attrs = {
        "source": "made",
        "synthetic": True,
        "unreadable": [{"image_id": "bad.png", "path": "bad.png", "reason": "empty"}],
    }
    return records.Run("02_test", config.PROFILES["smoke"], tmp_path, tmp_path, manifest, manifest, [0], [0])


def scores(run, seed=0):
    rng = np.random.default_rng(seed)
    rows = run.manifest[run.manifest["split"] != "train"]
    y = (rows["label"] == "PNEUMONIA").astype(int)
    return rows[["image_id", "patient_id", "split"]].assign(
        y_true=y, y_score=np.clip(0.5 + 0.2 * (y - 0.5) + rng.normal(0, 0.2, len(y)), 0.01, 0.99)
    )


def test_outcomes_are_asserted_of_phantoms_as_designed_alone(run):
    assert run.predictable
    for change in ({"epochs": 1}, {"image_size": 32}):
        assert not dataclasses.replace(run, profile=dataclasses.replace(run.profile, **change)).predictable
    run.manifest.attrs["synthetic"] = False
    assert not run.predictable


def test_record_holds_the_contract_and_its_numbers_come_from_the_file(run):
    record = run.save("seed recipe", {"image_size": 8, "weights": None}, 0, scores(run), seconds={"train": 1.0})
    digits = records.canonical_sha256(
        {
            "notebook": "02_test",
            "variant": "seed recipe",
            "config": {"image_size": 8, "weights": None},
            "data": {key: record["data"][key] for key in ("source", "manifest_sha256", "split_sha256")},
        }
    )[:8]
    assert record["run_id"] == f"02_test-{digits}-s0"
    assert {
        "schema",
        "notebook",
        "variant",
        "profile",
        "seed",
        "purpose",
        "data",
        "config",
        "environment",
        "metrics",
        "thresholds",
        "chosen_on",
        "predictions",
        "seconds",
        "figures",
    } <= record.keys()
    assert record["data"]["unreadable"] == ["bad.png"] and record["data"]["num_images"]["test"] == 20
    path = run.results / record["predictions"]["path"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == record["predictions"]["sha256"]
    with gzip.open(path, "rt") as file:
        assert file.readline().strip() == "image_id,patient_id,split,y_true,y_score"
    assert (
        run.load(record["run_id"])
        == json.loads((run.results / "records" / f"{record['run_id']}.json").read_text())
        == record
    )


def test_id_depends_on_data_variant_and_config_not_on_seed(run):
    base = run.run_id("a", {"x": 1}, 0)
    other = dataclasses.replace(run, manifest=run.manifest.assign(sha256="0" * 64))
    other.manifest.attrs = run.manifest.attrs
    assert base[:-1] == run.run_id("a", {"x": 1}, 7)[:-1]
    assert len({base, run.run_id("b", {"x": 1}, 0), run.run_id("a", {"x": 2}, 0), other.run_id("a", {"x": 1}, 0)}) == 4


@pytest.mark.parametrize("damage", ["change", "remove", "garbage", "binary", "digit"])
def test_damage_is_noticed_and_named(run, damage):
    record = run.save("a", {}, 0, scores(run))
    path = run.results / record["predictions"]["path"]
    if damage == "change":
        path.write_bytes(records.predictions_csv(scores(run, seed=1)))
    elif damage == "remove":
        path.unlink()
    else:
        path = run.results / "records" / f"{record['run_id']}.json"
        digit = path.read_text().replace('"schema": 1', '"schema": 2').encode()
        path.write_bytes({"garbage": b'{"schema": 1', "binary": b"\xff\xfe", "digit": digit}[damage])
        run.set_aside_stale()  # moves nothing that it cannot read
    with pytest.raises(ValueError, match=path.name.split(".")[0]):
        run.load(record["run_id"])


def test_smoke_makes_again_what_other_code_made_and_full_does_not(run, monkeypatch):
    record = run.save("a", {}, 0, scores(run))
    monkeypatch.setattr(records, "code_sha256", lambda: "other")
    full = dataclasses.replace(run, profile=config.PROFILES["full"])
    full.set_aside_stale()
    assert full.load(record["run_id"]) == record
    run.set_aside_stale()
    assert run.load(record["run_id"]) is None
    assert list((run.results / "records").glob("*.stale"))


def test_atomic_write_leaves_the_old_file_and_no_rest_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    records.write_atomic(path, "old")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        records.write_atomic(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_predictions_survive_the_file_bit_for_bit(run):
    table = scores(run)
    content = records.predictions_csv(table)
    assert content == records.predictions_csv(table)
    path = run.directory / "predictions.csv.gz"
    path.write_bytes(content)
    np.testing.assert_allclose(records.read_predictions(path)["y_score"], table["y_score"], rtol=1e-5)


def test_imports_without_keras():
    names = "config, records, phantom, data, dedup, splits, audit, evaluate, compare, plots, report"
    heavy = {"keras", "tensorflow", "jax", "torch"}
    code = f"import sys\nfrom cxr import {names}\nassert not {heavy} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=pathlib.Path(__file__).parents[1])


@pytest.mark.parametrize(
    ("profile", "expected"), [("smoke", {"image_size": 64, "epochs": 6}), ("full", {"image_size": 180, "epochs": 10})]
)
def test_profiles_cap_recipes(profile, expected):
    chosen = config.PROFILES[profile]
    assert {name: chosen.cap(name, value) for name, value in {"image_size": 180, "epochs": 10}.items()} == expected
    assert dataclasses.replace(chosen, image_size=96).cap("image_size", 180) == 96


@pytest.mark.parametrize(
    ("source", "name"), [("phantom", "phantom"), ("../shared/data/chest_xray/", "chest_xray"), ("a/x:b/y", "x+y")]
)
def test_runs_folder_is_the_one_the_makefile_uses(source, name):
    assert config.run_directory("full", source).name == f"full-{name}"
    makefile = f"DATA={source}"
    shown = subprocess.run(
        ["make", "--no-print-directory", "-s", "--eval", "show: ; @echo $(RUN)", "show", makefile, "PROFILE=full"],
        cwd=pathlib.Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.strip() == f"runs/full-{name}"


@pytest.mark.parametrize("number", [{"num_seeds": 0}, {"epochs": 1.5}, {"epochs": 0}, {"seed": "x"}, {"seed": -1},
                                    {"image_size": 4}])
def test_a_parameter_that_is_no_such_number_is_named(number):
    (name, value), = number.items()
    with pytest.raises(ValueError, match=f"{name.upper()} is {value!r}; expected a whole number"):
        config.start("02_test", **number)


def test_unknown_profile_is_named():
    with pytest.raises(ValueError, match="PROFILE is 'quick'"):
        config.start("02_test", profile="quick")

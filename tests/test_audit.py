"""What the audit finds, what it says, and the exit status of the command line."""

import json
import re
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest

from cxr import __main__ as command
from cxr import audit, config, data, dedup, phantom, splits

KNOBS = {"num_train": 60, "num_val": 8, "num_test": 30, "size": 128, "duplicates": 4, "near_duplicates": 3}


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """A phantom set with planted copies, its summary and its cache."""
    folder = tmp_path_factory.mktemp("audit")
    return folder / "set", phantom.write(folder / "set", **KNOBS), folder / "cache"


@pytest.fixture
def copied(written, tmp_path):
    """A copy of the set that a test may change; the cache is shared, for it goes by content."""
    return shutil.copytree(written[0], tmp_path / "set"), written[2]


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image)


def examine(folder, cache):
    return audit.audit(data.load_manifest(folder, cache_dir=cache), cache_dir=cache)


def verdicts(found):
    return {check["check"]: check["verdict"] for check in found["checks"]}


def test_planted_copies_are_found(written):
    folder, summary, cache = written
    found = examine(folder, cache)
    assert found["duplicates"] == {"train": 3, "val": 0, "test": 1, "across_splits": 0, "label_conflicts": 0}
    planted = [each for each in summary["planted"] if each["planted"] == "near_duplicate"]
    pairs = {frozenset(pair[:2]) for pair in found["near_duplicates"]["pairs"]}
    assert {frozenset((each["file"], each["copy_of"])) for each in planted} <= pairs
    assert found["near_duplicates"]["across_patients"] >= len(planted) == 3
    patient = {image_id: splits.patient_key(image_id)[0] for pair in pairs for image_id in pair}
    copies = {each["file"] for each in planted}
    assert all(pair & copies or len({patient[image] for image in pair}) == 1 for pair in pairs), "a false alarm"
    assert found["images"] == {"train": 60, "val": 8, "test": 30}
    for split, counts in summary["images"].items():
        assert found["classes"][split] == {label: n for label, n in counts.items() if n}
    assert found["synthetic"] is True
    assert audit.exit_code(found) == 0
    assert verdicts(found)["copies within a split"] == verdicts(found)["size of validation"] == "WARN"
    json.dumps(found, allow_nan=False)


def test_patients_and_keys(written):
    found = examine(*written[::2])
    assert list(found["patients"]) == ["train", "val", "test"]
    assert found["patients_across_splits"]["by_etiology_and_number"] == 0
    assert found["patients_across_splits"]["by_number"] > 0, "the phantom reuses numbers across etiologies on purpose"
    assert verdicts(found)["patients in train and test"] == "OK"
    assert verdicts(found)["… by number alone"] == "WARN"


def test_near_duplicates_are_kept(written, monkeypatch):
    before = examine(*written[::2])
    monkeypatch.setattr(audit.dedup, "near_pairs", lambda images: pytest.fail("looked for again"))
    assert examine(*written[::2]) == before


def first(folder, pattern):
    return sorted(folder.glob(pattern))[0]


def leak_picture(folder):
    image = first(folder, "train/NORMAL/*.jpeg")
    shutil.copy(image, folder / "test" / "NORMAL" / "another.jpeg")
    return "copies across splits"


def leak_patient(folder):
    image = first(folder, "train/PNEUMONIA/*_bacteria_*.jpeg")
    other = first(folder, "test/PNEUMONIA/*_virus_*.jpeg")
    number = re.match(r"person(\d+)_", image.name)[1]
    other.rename(other.with_name(f"person{number}_bacteria_99999.jpeg"))
    return "patients in train and test"


def two_labels(folder):
    shutil.copy(first(folder, "train/NORMAL/*.jpeg"), folder / "train" / "PNEUMONIA" / "wrong.jpeg")
    return "pictures with two labels"


def leak_near_duplicate(folder, place="test/NORMAL"):
    import cv2

    image = cv2.imread(str(first(folder, "train/NORMAL/*.jpeg")), cv2.IMREAD_GRAYSCALE)
    cv2.imwrite(str(folder / place / "brighter.jpeg"), cv2.convertScaleAbs(image, alpha=1.1))
    return "near duplicates"


def two_labels_of_near_duplicates(folder):
    return leak_near_duplicate(folder, "train/PNEUMONIA")


@pytest.mark.parametrize("spoil", [leak_picture, leak_patient, two_labels, leak_near_duplicate,
                                   two_labels_of_near_duplicates])
def test_what_invalidates_a_result_fails(copied, spoil):
    check = spoil(copied[0])
    found = examine(*copied)
    assert verdicts(found)[check] == "FAIL"
    assert audit.exit_code(found) == 1
    assert "FAIL" in audit.format_table(found).splitlines()[-1]


def test_a_copy_among_the_images_to_predict_spoils_no_result(copied):
    folder, cache = copied
    (folder / "pred").mkdir()
    shutil.copy(first(folder, "train/NORMAL/*.jpeg"), folder / "pred" / "unknown.jpeg")
    found = examine(folder, cache)
    assert found["images"]["pred"] == 1
    assert audit.exit_code(found) == 0


def test_a_copy_to_predict_does_not_hide_a_leak(copied):
    folder, cache = copied
    leak_near_duplicate(folder)
    (folder / "pred").mkdir()
    shutil.copy(first(folder, "train/NORMAL/*.jpeg"), folder / "pred" / "a.jpeg")  # before train and test by name
    found = examine(folder, cache)
    assert verdicts(found)["near duplicates"] == "FAIL" and audit.exit_code(found) == 1


def test_shortcuts_are_seen(copied):
    import cv2

    folder, cache = copied
    for path in folder.glob("*/PNEUMONIA/*.jpeg"):
        image = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        cv2.imwrite(str(path), cv2.GaussianBlur(image[:, 10:], (0, 0), 4))
    found = examine(folder, cache)
    assert found["trivial_auc"]["train"]["blur"] > 0.95
    assert found["trivial_auc"]["test"]["width"] == 0
    assert all(verdicts(found)[f"shortcut: {score}"] == "WARN" for score in ("blur", "width", "aspect"))
    assert verdicts(found)["shortcut: height"] == "OK"


def test_unreadable_files_are_named_with_their_path(copied):
    folder, cache = copied
    (folder / "train" / "NORMAL" / "broken.jpeg").write_bytes(b"no image")
    found = examine(folder, cache)
    table = audit.format_table(found)
    assert verdicts(found)["readable files"] == "WARN"
    assert f"{folder / 'train' / 'NORMAL' / 'broken.jpeg'}: not an image" in table
    assert "Files left out (1)" in table


def test_one_film_alone_is_no_reason_to_speak_of_small_ones(tmp_path):
    write(tmp_path / "set" / "train" / "COVID19" / "1.png", phantom.render(0, "normal", size=128).image)
    found = examine(tmp_path / "set", tmp_path / "cache")
    assert found["near_duplicates"]["pairs"] == [] and verdicts(found)["near duplicates"] == "OK"


def test_films_of_fewer_bits_than_their_files_hold_are_called_dark(copied):
    folder, cache = copied
    assert "dark images" not in verdicts(examine(folder, cache))
    for path in folder.glob("test/NORMAL/*.jpeg"):
        cv2.imwrite(str(path), cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) // 4)
    found = examine(folder, cache)
    assert verdicts(found)["dark images"] == "WARN" and found["dark"] == found["classes"]["test"]["NORMAL"]


def test_two_phantoms_of_one_patient_are_no_near_duplicates(written):
    scores = [score for *_, score in examine(*written[::2])["near_duplicates"]["pairs"]]
    assert len(scores) == 3 and min(scores) >= dedup.SAME_PHANTOM, "the planted copies and nothing else"


def test_a_small_folder_called_like_a_known_set_gets_a_warning_only(copied):
    folder, cache = copied
    found = examine(folder.rename(folder.with_name("chest_xray")), cache)
    assert verdicts(found)["published counts"] == "WARN"
    assert audit.exit_code(found) == 0


def test_a_folder_without_test_and_with_one_class(tmp_path, written):
    (tmp_path / "covid19" / "COVID19").mkdir(parents=True)
    for path in sorted(written[0].glob("train/NORMAL/*.jpeg"))[:5]:
        shutil.copy(path, tmp_path / "covid19" / "COVID19" / f"{path.stem}x.jpeg")
    found = examine(tmp_path / "covid19", tmp_path / "cache")
    assert verdicts(found)["classes in train"] == verdicts(found)["test split"] == "WARN"
    assert found["trivial_auc"] == {"train": {}}


def test_a_class_too_small_to_train_on_is_said_before_training(copied):
    folder, cache = copied
    for path in sorted(folder.glob("train/NORMAL/*.jpeg"))[10:]:
        path.unlink()
    found = examine(folder, cache)
    assert verdicts(found)["classes in train"] == "WARN" and verdicts(found)["classes in test"] == "OK"
    assert "NORMAL 10" in audit.format_table(found) and "25 of each are the least" in audit.format_table(found)


def test_near_duplicates_are_not_looked_for_in_tiny_images(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f"{split}_images": rng.integers(0, 256, (8, 28, 28), dtype=np.uint8) for split in ("train", "test")}
    np.savez(tmp_path / "mnist.npz", **arrays, train_labels=np.arange(8) % 2, test_labels=np.arange(8) % 2)
    found = examine(tmp_path / "mnist.npz", tmp_path / "cache")
    assert found["near_duplicates"] is None
    assert verdicts(found)["near duplicates"] == "WARN"


def test_one_small_image_hides_no_near_duplicate(tmp_path):
    for number in range(12):
        film = phantom.render(number, "normal", size=128).image
        label, split = ("NORMAL", "PNEUMONIA")[number % 2], ("train", "test")[number % 3 == 0]
        write(tmp_path / "set" / split / label / f"{number}.png", film)
        if number == 0:
            write(tmp_path / "set" / "train" / label / "again.png", np.uint8(20 + 0.8 * film))
    assert audit.exit_code(examine(tmp_path / "set", tmp_path / "cache")) == 1
    write(tmp_path / "set" / "train" / "NORMAL" / "small.png", phantom.render(99, "normal", size=64).image)
    found = examine(tmp_path / "set", tmp_path / "cache")
    assert found["near_duplicates"]["too_small"] == 1 and found["near_duplicates"]["across_splits"] == 1
    assert audit.exit_code(found) == 1 and "not looked at: 1" in audit.format_table(found)
    assert verdicts(found)["names that tell the patient"] == "WARN" and found["nameless"] == 14


def test_near_duplicates_end_on_one_side_of_the_split(tmp_path, monkeypatch):
    for number in range(24):
        film, label = phantom.render(number, "normal", size=128).image, ("NORMAL", "PNEUMONIA")[number % 2]
        write(tmp_path / "set" / label / f"{number}.png", film)
        write(tmp_path / "set" / label / f"copy of {number}.png", np.uint8(20 + 0.8 * film))
    monkeypatch.setattr("cxr.config.root", lambda: tmp_path)
    split = config.start("02_test", data=str(tmp_path / "set")).manifest.set_index("image_id")["split"]
    pairs = [(name, name.replace("/", "/copy of ")) for name in split.index if "copy" not in name]
    assert len(pairs) == 24 and all(split[one] == split[other] for one, other in pairs) and split.nunique() == 3


def test_a_set_without_test_gets_one_that_holds_for_every_other_split_too(tmp_path, monkeypatch):
    for number in range(40):
        film, label = phantom.render(number, "normal", size=128).image, ("NORMAL", "PNEUMONIA")[number % 2]
        write(tmp_path / "set" / label / f"{number}.png", film)
        if number < 20:
            write(tmp_path / "set" / label / f"same as {number}.png", film)
    monkeypatch.setattr("cxr.config.root", lambda: tmp_path)
    run = config.start("02_test", data=str(tmp_path / "set"))
    drawn, official = (set(frame.loc[frame["split"] == "test", "pixel_sha256"])
                       for frame in (run.manifest, run.official))
    assert drawn == official and 4 <= len(drawn) <= 16
    by_image = splits.assign_image_level(run.official)
    assert {"train", "val", "test"} <= set(by_image["split"])
    assert not drawn & set(by_image.loc[by_image["split"].isin(["train", "val"]), "pixel_sha256"])
    assert audit.audit(run.official, cache_dir=run.cache)["duplicates"]["across_splits"] == 0


# The command line --------------------------------------------------------------------------------------------------

def test_command_audit(written, tmp_path, capsys):
    folder, _, cache = written
    file = tmp_path / "new" / "audit.json"
    assert command.main(["audit", str(folder), "--cache", str(cache), "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "copies within a split" in out and "usable" in out
    found = json.loads(file.read_text())
    assert {"images", "unreadable", "duplicates", "patients", "patients_across_splits", "trivial_auc"} <= set(found)


def test_command_audit_with_findings_exits_1(copied, capsys):
    leak_picture(copied[0])
    assert command.main(["audit", str(copied[0]), "--cache", str(copied[1])]) == 1
    assert "FAIL  copies across splits" in capsys.readouterr().out


def test_command_bad_input_is_one_message_and_status_2(tmp_path, capsys):
    assert command.main(["audit", str(tmp_path / "nowhere"), "--cache", str(tmp_path)]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert len(streams.err.splitlines()) == 1
    assert "nowhere" in streams.err


def test_command_unwritable_json_leaves_nothing(written, tmp_path, capsys):
    folder, _, cache = written
    (tmp_path / "file").write_text("in the way")
    assert command.main(["audit", str(folder), "--cache", str(cache), "--json", str(tmp_path / "file" / "a.json")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_command_phantom(tmp_path, capsys):
    arguments = ["--num-train", "12", "--num-val", "0", "--num-test", "6", "--size", "48", "--duplicates", "0"]
    arguments += ["--near-duplicates", "0", "--gallery", str(tmp_path / "gallery.png")]
    assert command.main(["phantom", str(tmp_path / "set"), *arguments]) == 0
    assert "train NORMAL" in capsys.readouterr().out
    assert len(list((tmp_path / "set").glob("t*/*/*.jpeg"))) == 18
    assert (tmp_path / "gallery.png").stat().st_size > 1000
    assert command.main(["phantom"]) == 2
    assert command.main(["phantom", str(tmp_path / "bad"), "--num-train", "-3"]) == 2


def test_command_report_wants_something_to_write(capsys):
    assert command.main(["report"]) == 2
    assert "--readme" in capsys.readouterr().err


def test_command_as_a_module():
    run = subprocess.run([sys.executable, "-m", "cxr", "--help"], check=True, text=True, capture_output=True)
    assert all(name in run.stdout for name in ("phantom", "audit", "report"))


# The real set ------------------------------------------------------------------------------------------------------

@pytest.mark.real
def test_real_audit(real_data, tmp_path_factory):
    found = examine(real_data / "chest_xray", tmp_path_factory.getbasetemp() / "real-cache")
    assert found["images"] == {"train": 5216, "val": 16, "test": 624}
    assert found["duplicates"] == {"train": 26, "val": 0, "test": 6, "across_splits": 0, "label_conflicts": 0}
    assert (found["patients"]["train"], found["patients"]["test"]) == (1211 + 2443, 225 + 203)
    assert found["patients_across_splits"] == {"by_etiology_and_number": 0, "by_number": 170}
    assert found["near_duplicates"]["across_patients"] == found["near_duplicates"]["across_splits"] == 0
    assert found["trivial_auc"]["train"]["blur"] == pytest.approx(0.90, abs=0.01)
    assert found["trivial_auc"]["test"]["blur"] == pytest.approx(0.85, abs=0.01)
    assert found["trivial_auc"]["train"]["mean_grey"] == pytest.approx(0.52, abs=0.01)
    assert found["trivial_auc"]["test"]["mean_grey"] == pytest.approx(0.43, abs=0.01)
    assert (found["unreadable"], audit.exit_code(found)) == ([], 0)

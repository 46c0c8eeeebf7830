"""Damaged files by the thousand: each is read, or refused with a reason that is documented; nothing else is raised."""

import io
import json
import zipfile

import cv2
import hypothesis
import numpy as np
import pandas as pd
import PIL.Image
import pytest
from hypothesis import strategies as st

from cxr import __main__ as cli
from cxr import audit, data, decode, deploy, evaluate, models, predict
from tests.test_data import archive, dicom, encoded, picture
from tests.test_records import run, scores  # noqa: F401  a fixture

GREY = picture(0, 96, 120)
WIDE = GREY.astype(np.uint16) * 16
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # what pydicom and Pillow say of damage before they fail
EXTREMES = [b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\x7f\xff\xff\xff", b"\x80\x00\x00\x00"]


def whole_files():
    """Return a valid file of every kind that is read, by the suffix it gets."""
    exif, colour = PIL.Image.Exif(), PIL.Image.fromarray(np.stack([GREY, GREY // 2, GREY // 3], -1))
    exif[0x0112] = 6
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("film.png", encoded(GREY))
    return {
        "0.jpeg": encoded(GREY, "JPEG"), "1.jpeg": encoded(GREY, "JPEG", progressive=True, exif=exif),
        "2.jpeg": encoded(colour, "JPEG", mode="CMYK"), "0.png": encoded(GREY), "1.png": encoded(GREY, mode="LA"),
        "2.png": cv2.imencode(".png", WIDE)[1].tobytes(), "3.png": encoded(colour),
        "4.png": encoded(colour.quantize(9)),
        "0.tiff": encoded(GREY, "TIFF"), "1.tiff": encoded(GREY, "TIFF", compression="tiff_lzw"),
        "0.bmp": encoded(GREY, "BMP"), "0.webp": encoded(GREY, "WEBP"), "0.gif": encoded(GREY, "GIF"),
        "0.dcm": dicom(WIDE), "1.dcm": dicom(WIDE, kind="MONOCHROME1", RescaleSlope="2", RescaleIntercept="-1024"),
        "2.dcm": dicom(WIDE, WindowCenter="2048", WindowWidth="400"),
        "3.dcm": dicom(WIDE.astype(np.int16) - 2048, signed=True), "4.dcm": dicom(np.asarray(colour), bits=8),
        "5.dcm": dicom(np.asarray(colour).astype(np.uint16) * 257, bits=16), "6.dcm": dicom(WIDE, syntax="RLELossless"),
        "0.zip": zipped.getvalue(),
    }  # fmt: skip


WHOLE = whole_files()


def damaged(number, whole=None):
    """Return the name and content of the `number`-th damaged file: bits flipped, cut, spliced, headers changed."""
    rng = np.random.default_rng([8, number])
    names = list(whole or WHOLE)
    name = names[number % len(names)]
    content = bytearray((whole or WHOLE)[name])
    place = int(rng.integers(len(content)))
    kind = rng.integers(7)
    if kind == 0:
        for at in rng.integers(0, len(content), rng.integers(1, 30)):
            content[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del content[place:]
    elif kind == 2:
        other = (whole or WHOLE)[names[rng.integers(len(names))]]
        content[place:] = other[int(rng.integers(len(other))):]
    elif kind == 3:
        for at in rng.integers(0, min(len(content), 200), rng.integers(1, 6)):
            content[at] = int(rng.integers(256))
    elif kind == 4:
        del content[place:place + int(rng.integers(1, 64))]
    elif kind == 5:
        content[place:place] = rng.bytes(int(rng.integers(1, 64)))
    else:
        at = int(rng.integers(min(len(content), 600)))
        content[at:at + 4] = EXTREMES[rng.integers(4)]
    return f"{number:04d}-{name}", bytes(content)


def read_or_refused(content):
    """Decode as the loader does; return whether it was read."""
    try:
        pixels = decode.decode(content)
        small = decode.decode(content, size=32)
    except ValueError as error:
        assert len(str(error)) > 10, "a reason in words"
        return False
    assert pixels.dtype == small.dtype == np.uint8 and pixels.ndim == 2 and pixels.size
    facts, film = decode.facts(content)
    assert film.dtype == np.uint8 and film.shape == (224, 224)
    assert (facts["height"], facts["width"]) == pixels.shape
    assert np.isfinite([facts["blur"], facts["mean_grey"]]).all() and 0 <= facts["mean_grey"] <= 255
    assert decode.fit(small, 32, letterbox=True).shape == (32, 32)
    return True


def test_the_undamaged_ones_are_read():
    assert {name for name, content in WHOLE.items() if not read_or_refused(content)} == {"0.zip"}


def test_1680_damaged_images_are_read_or_refused():
    read = 0
    for number in range(1680):
        try:
            read += read_or_refused(damaged(number)[1])
        except Exception as error:
            raise AssertionError(f"{damaged(number)[0]}: {error!r}") from error
    assert 300 < read < 1200, "most damage must be damage, and not all of it fatal"


WORDS = st.one_of(st.integers(0, 70_000), st.sampled_from([-1, "", None, "a", 1e30, float("nan"), [1, 2]]))
TAGS = ["Rows", "Columns", "BitsStored", "BitsAllocated", "HighBit", "SamplesPerPixel", "PixelRepresentation",
        "NumberOfFrames", "RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth",
        "PhotometricInterpretation", "PlanarConfiguration"]  # fmt: skip


@hypothesis.settings(max_examples=150, derandomize=True)
@hypothesis.given(st.dictionaries(st.sampled_from(TAGS), WORDS, min_size=1, max_size=3))
def test_dicom_headers_that_say_anything(tags):
    try:
        content = dicom(WIDE, **tags)
    except Exception:  # pydicom refuses to write it
        hypothesis.reject()
    read_or_refused(content)


@hypothesis.settings(max_examples=150, derandomize=True)
@hypothesis.given(st.sampled_from(sorted(WHOLE)), st.integers(2, 160), st.binary(max_size=200))
def test_a_true_beginning_and_anything_after_it(name, kept, rest):
    read_or_refused(WHOLE[name][:kept] + rest)


def test_loader_and_audit_account_for_210_damaged_files(tmp_path):
    names = {}
    for number in range(210):
        name, content = damaged(10_000 + number)
        label = "NORMAL" if number % 2 else "PNEUMONIA"
        path = tmp_path / "set" / ("train", "test")[number // 2 % 2] / label / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        names["/".join(path.parts[-3:])] = path.suffix
    manifest = data.load_manifest(tmp_path / "set", cache_dir=tmp_path / "cache")
    left_out = {bad["image_id"] for bad in manifest.attrs["unreadable"]}
    images = {name for name, suffix in names.items() if suffix not in (".zip", ".gif")}
    assert set(manifest["image_id"]) | left_out == images and not set(manifest["image_id"]) & left_out
    assert len(data.load_images(manifest, 32, cache_dir=tmp_path / "cache")) == len(manifest) > 20
    found = audit.audit(manifest, cache_dir=tmp_path / "cache")
    assert len(found["unreadable"]) == len(left_out) and audit.format_table(found)
    json.dumps(found, allow_nan=False)


def test_200_damaged_archives_are_read_or_refused_by_name(tmp_path):
    plain, arrays = archive(tmp_path / "plain.npz")
    np.savez_compressed(tmp_path / "packed.npz", **arrays)
    whole = {path.name: path.read_bytes() for path in (plain, tmp_path / "packed.npz")}
    for number in range(200):
        name, content = damaged(20_000 + number, whole)
        (tmp_path / name).write_bytes(content)
        try:
            manifest = data.load_manifest(tmp_path / name, cache_dir=tmp_path / "cache")
            assert len(manifest) + len(manifest.attrs["unreadable"]) > 0
        except ValueError as error:
            assert name in str(error)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A network as `deploy.export` leaves it, untrained."""
    path = tmp_path_factory.mktemp("model") / "tiny.keras"
    network = models.lab_cnn(32)
    network.save(path)
    width = deploy.features_of(network).output.shape[-1]
    known = {"mean": [0.0] * width, "std": [1.0] * width, "image": np.eye(deploy.SIDE).tolist(),
             "largest_distance": 3.0, "smallest_likeness": 0.1}
    metric = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    about = {"schema": 1, "run_id": "tiny", "variant": "untrained", "source": "made", "synthetic": True,
             "image_size": 32, "thresholds": {evaluate.THRESHOLD: 0.5}, "threshold": evaluate.THRESHOLD,
             "temperature": 1.0, "ece": 0.1, "known": known,
             "test": dict.fromkeys(["auc", *(f"{name}@{evaluate.THRESHOLD}" for name in ("sensitivity", "specificity",
                                                                                       "ppv"))], metric)}
    path.with_suffix(".json").write_text(json.dumps(about))
    return path


def test_predict_accounts_for_420_damaged_files(model, tmp_path, capsys):
    for number in range(420):
        name, content = damaged(30_000 + number)
        (tmp_path / name).write_bytes(content)
    out = tmp_path.with_name("out")
    assert cli.main(["predict", str(tmp_path), "--model", str(model), "--out", str(out)]) == 0
    table = pd.read_csv(out / "predictions.csv", keep_default_na=False)
    assert len(table) == 420 and (table["error"].eq("") ^ table["probability"].eq("")).all()
    assert 100 < table["error"].ne("").sum() < 400
    for row in table[table["error"].eq("")].itertuples():
        assert 0 <= float(row.probability) <= 1 and predict._heatmap_path(out, row.sha256).is_file()
    assert (out / "index.html").read_text().count("<article") == 420
    (out / "predictions.csv").write_bytes(b"file,sha256\n1,2\n\xff")  # what an earlier run left is damaged: made again
    assert predict._finished(out, deploy.load(model)[1]) == {}


def test_30_damaged_models_are_refused_or_loaded(model, tmp_path):
    whole = {"tiny.keras": model.read_bytes()}
    for number in range(30):
        name, content = damaged(40_000 + number, whole)
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).with_suffix(".json").write_bytes(model.with_suffix(".json").read_bytes())
        try:
            deploy.load(tmp_path / name)
        except ValueError as error:
            assert name in str(error)


def test_200_damaged_records_are_never_taken(run):  # noqa: F811
    record = run.save("a", {}, 0, scores(run), history={"val_auc": [0.5, 0.625]})
    path = run.results / "records" / f"{record['run_id']}.json"
    whole = {path.name: path.read_bytes()}
    for number in range(200):
        content = damaged(50_000 + number, whole)[1]
        path.write_bytes(content)
        run.set_aside_stale()  # even where the hash of the code was hit
        try:
            assert run.load(record["run_id"]) == record
        except ValueError as error:
            assert path.name.removesuffix(".json") in str(error) and "move" in str(error)


def test_100_damaged_caches_are_made_again(tmp_path):
    value = {f"{number:064x}": decode.facts(encoded(GREY))[0] for number in range(3)}
    path = tmp_path / "facts.json"
    data.write_cached(path, value)
    whole = {path.name: path.read_bytes()}
    for number in range(100):
        path.write_bytes(damaged(60_000 + number, whole)[1])
        assert data.read_cached(path) in (None, value)



"""Layouts, decoding of every kind of file, bad input, and the caches: with small real files written here."""

import concurrent.futures
import io
import os
import struct
import subprocess
import sys
import zlib

import cv2
import numpy as np
import pandas as pd
import PIL.Image
import pytest

from cxr import data, decode, dedup, records, sources


def picture(seed=0, height=40, width=48):
    """A smooth grey picture, so that JPEG changes it little."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    return cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 3), None, 0, 255, cv2.NORM_MINMAX)


def encoded(image, kind="PNG", mode=None, **options):
    buffer = io.BytesIO()
    image = PIL.Image.fromarray(image) if isinstance(image, np.ndarray) else image
    (image.convert(mode) if mode else image).save(buffer, kind, **options)
    return buffer.getvalue()


def plant(root, *names, seed=0):
    """Write one different picture for each relative path, and return the folder."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(seed + number)))
    return root


TWO = [f"{split}/{label}/{number}.png"
       for split in ("train", "test") for label in ("NORMAL", "PNEUMONIA") for number in (1, 2)]  # fmt: skip


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def small(tmp_path):
    return plant(tmp_path / "small", *TWO)


# Layouts -----------------------------------------------------------------------------------------------------------

def test_dicom_named_by_its_uid_jfif_and_names_in_no_encoding_are_read(tmp_path, cache):
    root = plant(tmp_path / "set", *TWO)
    (root / "train" / "NORMAL" / "1.2.392.200036.9125.1009").write_bytes(dicom(picture(50), bits=8))
    (root / "train" / "NORMAL" / "a.jfif").write_bytes(encoded(picture(51), "JPEG"))
    (root / "train" / "NORMAL" / "notes.csv").write_text("no image")
    with open(os.fsencode(root / "train" / "NORMAL") + b"/r\xf6ntgen.png", "wb") as file:
        file.write(encoded(picture(52)))
    manifest = data.load_manifest(root, cache_dir=cache)
    assert len(manifest) == len(TWO) + 3 and not manifest.attrs["unreadable"]
    assert "train/NORMAL/r\\xf6ntgen.png" in set(manifest["image_id"])
    manifest["image_id"].str.cat().encode()
    assert data.load_images(manifest, 16, cache_dir=cache).shape[0] == len(manifest)


def test_a_link_to_a_folder_above_shows_no_image_twice(tmp_path, cache):
    root = plant(tmp_path / "set", *TWO)
    (root / "train" / "NORMAL" / "loop").symlink_to(root / "train")
    (root / "train" / "PNEUMONIA" / "up").symlink_to("..")
    assert data.load_manifest(root, cache_dir=cache)["image_id"].tolist() == sorted(TWO)


def test_a_split_that_is_a_link_to_another_is_read_as_it_stands(tmp_path, cache):
    root = plant(tmp_path / "set", *TWO)
    (root / "pred").symlink_to(root / "test")
    assert data.load_manifest(root, cache_dir=cache)["split"].eq("test").sum() == 4


def test_a_folder_that_is_closed_or_gone_is_named(tmp_path, cache, monkeypatch):
    root = plant(tmp_path / "set", *TWO, "train/NORMAL/closed/9.png")
    (root / "test" / "NORMAL" / "more").symlink_to(tmp_path / "unmounted")
    scandir = os.scandir

    def as_a_stranger(path):  # permissions bind nobody where tests run as root
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", as_a_stranger)
    bad = {one["image_id"]: one["reason"] for one in data.load_manifest(root, cache_dir=cache).attrs["unreadable"]}
    assert set(bad) == {"train/NORMAL/closed", "test/NORMAL/more"}
    assert "cannot be opened" in bad["train/NORMAL/closed"] and "No such file" in bad["test/NORMAL/more"]


def test_manifest_has_the_promised_columns(small, cache):
    manifest = data.load_manifest(small, cache_dir=cache)
    assert list(manifest.columns) == data.COLUMNS
    assert manifest["image_id"].tolist() == sorted(TWO)
    assert isinstance(manifest.index, pd.RangeIndex)
    row = manifest.iloc[0]
    assert (row["label"], row["split"], row["source"], row["etiology"]) == ("NORMAL", "test", "small", "normal")
    assert (row["height"], row["width"]) == (40, 48)
    assert row["patient_id"] == "file/test/NORMAL/1.png"
    assert row["mean_grey"] == pytest.approx(picture(TWO.index(row["image_id"])).mean())
    assert row["blur"] < 0
    assert os.path.isabs(row["path"])
    assert manifest.attrs["synthetic"] is False
    assert manifest.attrs["unreadable"] == []


@pytest.mark.parametrize(("names", "expected"), [
    (["NORMAL/a.png", "PNEUMONIA/b.png"], {("train", "NORMAL"), ("train", "PNEUMONIA")}),
    (["COVID19/a.png", "COVID19/b.png"], {("train", "COVID19")}),
    (["Train/Normal/a.png", "TRAIN/pneumonia/b.png", "valid/normal/c.png"],
     {("train", "NORMAL"), ("train", "PNEUMONIA"), ("val", "NORMAL")}),
    (["train/NORMAL/a.png", "train/COVID-19/b.png"], {("train", "NORMAL"), ("train", "COVID19")}),
    (["train/NORMAL/a.png", "train/PNEUMONIA/VIRUS/b.png"], {("train", "NORMAL"), ("train", "PNEUMONIA")}),
    (["train/NORMAL/a.png", "train/PNEUMONIA/b.png", "pred/c.png"],
     {("train", "NORMAL"), ("train", "PNEUMONIA"), ("pred", "")}),
])  # fmt: skip
def test_layouts(tmp_path, cache, names, expected):
    manifest = data.load_manifest(plant(tmp_path / "set", *names), cache_dir=cache)
    assert set(zip(manifest["split"], manifest["label"], strict=True)) == expected
    assert len(manifest) == len(names)


def test_nested_copy_and_junk_are_not_counted(tmp_path, cache):
    top = plant(tmp_path / "chest_xray", *(f"chest_xray/{name}" for name in TWO),
                "chest_xray/chest_xray/train/NORMAL/copy.png", "chest_xray/train/NORMAL/._1.png",
                "__MACOSX/chest_xray/train/NORMAL/x.png")
    for name in (".DS_Store", "NORMAL/Thumbs.db", "NORMAL/notes.txt"):
        (top / "chest_xray" / "train" / name).write_bytes(b"junk")
    manifest = data.load_manifest(top, cache_dir=cache)
    assert manifest["image_id"].tolist() == sorted(TWO)
    assert manifest.attrs["source"] == "chest_xray"
    assert manifest.attrs["unreadable"] == []
    assert manifest.attrs["ignored"] == {"chest_xray/train/NORMAL": 1}
    counts = manifest.attrs["counts"]  # they differ, and that is no crash
    assert (counts["expected"]["train"]["NORMAL"], counts["found"]["train"]["NORMAL"]) == (1341, 2)


def test_joined_folders_keep_their_names(small, tmp_path, cache):
    other = plant(tmp_path / "covid19", "COVID19/001.png", "COVID19/person7_virus_3.png", seed=100)
    manifest = data.load_manifest(f"{small}:{other}", cache_dir=cache)
    assert manifest.attrs["source"] == "small+covid19"
    assert set(manifest["source"]) == {"small", "covid19"}
    assert manifest["image_id"].is_monotonic_increasing
    patients = dict(zip(manifest["image_id"], manifest["patient_id"], strict=True))
    assert patients["covid19/COVID19/001.png"] == "file/covid19/COVID19/001.png"
    assert patients["covid19/COVID19/person7_virus_3.png"] == "viral/7"
    with pytest.raises(ValueError, match="called the same"):
        data.load_manifest(f"{small}:{small}", cache_dir=cache)


def test_a_relative_path_counts_from_here_or_from_the_repository(small, cache, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert len(data.load_manifest("small", cache_dir=cache)) == len(TWO)
    monkeypatch.setenv("CXR_ROOT", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(data.load_manifest("small", cache_dir=cache)) == len(TWO)


def test_phantom_by_word_and_by_path_is_synthetic(tmp_path, cache, monkeypatch):
    from cxr import phantom

    write = phantom.write

    def few(directory, *, num_train=24, num_val=4, num_test=8, size=64, duplicates=0, near_duplicates=0):
        return write(directory, num_train=num_train, num_val=num_val, num_test=num_test, size=size,
                     duplicates=duplicates, near_duplicates=near_duplicates)

    monkeypatch.setattr(phantom, "write", few)
    monkeypatch.setenv("CXR_ROOT", str(tmp_path))
    manifest = data.load_manifest("phantom", cache_dir=cache)
    assert manifest.attrs["source"] == "phantom"
    assert manifest.attrs["synthetic"] is True
    assert manifest.attrs["ignored"] == {}
    assert len(manifest) == 36
    folder, = (tmp_path / "data").iterdir()
    by_path = data.load_manifest(folder, cache_dir=cache)
    assert by_path.attrs["synthetic"] is True
    assert by_path["sha256"].tolist() == manifest["sha256"].tolist()


def test_phantom_covid_has_a_third_class_and_the_name_of_the_phantom(tmp_path, cache, monkeypatch):
    from cxr import phantom

    write = phantom.write

    def few(directory, *, num_train=24, num_val=4, num_test=8, size=64, duplicates=0, near_duplicates=0, covid=0):
        return write(directory, num_train=num_train, num_val=num_val, num_test=num_test, size=size,
                     duplicates=duplicates, near_duplicates=near_duplicates, covid=min(covid, 10))

    monkeypatch.setattr(phantom, "write", few)
    monkeypatch.setenv("CXR_ROOT", str(tmp_path))
    manifest = data.load_manifest("phantom_covid", cache_dir=cache)
    assert manifest.attrs["source"] == "phantom" and manifest.attrs["synthetic"] is True
    assert manifest["label"].value_counts()["COVID19"] == 10
    assert "COVID19" not in set(data.load_manifest("phantom", cache_dir=cache)["label"])
    assert len(list((tmp_path / "data").iterdir())) == 2


def archive(path, **changes):
    rng = np.random.default_rng(0)
    arrays = {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"] = rng.integers(0, 256, (6, 28, 28), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.array([[0], [1]] * 3, np.uint8)
    np.savez(path, **(arrays | changes))
    return path, arrays


def test_a_local_archive_is_read(tmp_path, cache):
    path, arrays = archive(tmp_path / "pneumoniamnist.npz")
    manifest = data.load_manifest(path, cache_dir=cache)
    assert len(manifest) == 18
    images = data.load_images(manifest, 28, cache_dir=cache)
    for image, image_id in zip(images, manifest["image_id"], strict=True):
        split, label, index = image_id.split("/")
        np.testing.assert_array_equal(image, arrays[f"{split}_images"][int(index)])
        assert label == ("NORMAL", "PNEUMONIA")[arrays[f"{split}_labels"][int(index), 0]]


@pytest.mark.parametrize("changes", [{"train_labels": np.full((6, 1), 7)}, {"test_labels": np.zeros((5, 1), int)},
                                     {"val_images": np.zeros((6, 28, 28, 3), np.uint8)},
                                     {f"{split}_{what}": np.zeros((0, *shape), np.uint8) for split in
                                      ("train", "val", "test") for what, shape in (("images", (28, 28)),
                                                                                   ("labels", (1,)))}])  # fmt: skip
def test_a_wrong_archive_says_what_was_expected(tmp_path, cache, changes):
    path, _ = archive(tmp_path / "wrong.npz", **changes)
    with pytest.raises(ValueError, match=r"wrong\.npz: expected"):
        data.load_manifest(path, cache_dir=cache)


def test_a_damaged_archive_is_named(tmp_path, cache):
    path = tmp_path / "broken.npz"
    path.write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(ValueError, match=r"broken\.npz is not a MedMNIST archive"):
        data.load_manifest(path, cache_dir=cache)


# Bad input ---------------------------------------------------------------------------------------------------------

def bomb(side=30_000):
    """A valid PNG of `side` x `side` black pixels in a megabyte, written by hand."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    packer = zlib.compressobj(9, wbits=-15)
    rows = packer.compress(bytes((1 + side) * 100)) + packer.flush(zlib.Z_FULL_FLUSH)  # can be repeated as it is
    adler = (side * (1 + side) % 65521 << 16) + 1
    body = b"\x78\x01" + rows * (side // 100) + b"\x03\x00" + struct.pack(">I", adler)
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_bad_files_are_left_out_and_listed_with_reasons(small, cache):
    jpeg, png = encoded(picture(0, 400, 400), "JPEG"), encoded(picture())
    bad = {"truncated.jpeg": (jpeg[:len(jpeg) // 2], "truncated"),
           "truncated.png": (png[:len(png) // 2], "truncated"),
           "flipped.png": (png[:60] + bytes([png[60] ^ 255]) + png[61:], "damaged"),
           "empty.jpeg": (b"", "zero bytes"), "text.jpeg": (b"dear reader", "not an image"),
           "bomb.png": (bomb(), "bomb"),
           "float.tiff": (encoded(picture().astype(np.float32), "TIFF"), "floating-point")}  # fmt: skip
    for name, (content, _) in bad.items():
        (small / "train" / "NORMAL" / name).write_bytes(content)
    (small / "train" / "loose.png").write_bytes(png)
    manifest = data.load_manifest(small, cache_dir=cache)
    assert len(manifest) == len(TWO)
    reasons = {each["image_id"]: each["reason"] for each in manifest.attrs["unreadable"]}
    assert set(reasons) == {f"train/NORMAL/{name}" for name in bad} | {"train/loose.png"}
    for name, (_, word) in bad.items():
        assert word in reasons[f"train/NORMAL/{name}"]
    assert all(os.path.isabs(each["path"]) for each in manifest.attrs["unreadable"])
    assert len(data.load_images(manifest, 16, cache_dir=cache)) == len(TWO)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from /proc")
def test_the_bomb_is_real_and_its_memory_is_never_taken(tmp_path):
    assert decode.decode(bomb(400)).shape == (400, 400)
    (tmp_path / "bomb.png").write_bytes(bomb())
    program = ("import re, sys\nfrom cxr import decode\n"
               "try:\n    decode.decode(open(sys.argv[1], 'rb').read())\n"
               "except ValueError as error:\n    print(error)\n"
               "print(int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) // 1024)")
    run = subprocess.run([sys.executable, "-c", program, tmp_path / "bomb.png"], check=True, text=True,
                         capture_output=True, env=environment())
    reason, peak = run.stdout.splitlines()
    assert "bomb" in reason
    assert int(peak) < 400, "MiB; the pixels alone would take 858"


def test_a_fifo_does_not_hang(small, cache):
    os.mkfifo(small / "train" / "NORMAL" / "pipe.png")
    manifest = data.load_manifest(small, cache_dir=cache)
    assert "regular file" in manifest.attrs["unreadable"][0]["reason"]


@pytest.mark.parametrize(("names", "error", "words"), [
    ([], FileNotFoundError, "no split or class folder"),
    (["loose.png"], FileNotFoundError, "no split or class folder"),
    (["train/NORMAL/a.png", "test/NORMAL/b.png"], ValueError, "train/PNEUMONIA"),
    (["train/NORMAL/a.png", "train/PNEUMONIA/b.png", "test/PNEUMONIA/b.png"], ValueError, "test/NORMAL"),
    (["pred/a.png"], ValueError, "no image stands in a class folder"),
    (["one/train/NORMAL/a.png", "two/train/NORMAL/a.png"], FileNotFoundError, "2 sets"),
    (["train/NORMAL/notes.txt"], FileNotFoundError, "no images"),
])  # fmt: skip
def test_unusable_sets_get_one_clear_error(tmp_path, cache, names, error, words):
    folder = plant(tmp_path / "set", *names)
    folder.mkdir(exist_ok=True)
    with pytest.raises(error, match=words) as caught:
        data.load_manifest(folder, cache_dir=cache)
    assert str(folder) in str(caught.value)
    assert "Expected" in str(caught.value)


def test_all_files_unreadable(tmp_path, cache):
    folder = plant(tmp_path / "set", "train/NORMAL/a.png", "train/PNEUMONIA/b.png")
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="none of its 2 files can be used.*zero bytes"):
        data.load_manifest(folder, cache_dir=cache)


def test_wrong_path_and_unwritable_cache(small, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.*no such folder"):
        data.load_manifest(tmp_path / "nowhere", cache_dir=tmp_path)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PermissionError, match="cannot be written"):
        data.load_manifest(small, cache_dir=tmp_path / "file" / "cache")


def test_kaggle_without_a_network_says_what_to_do(cache, monkeypatch):
    kagglehub = pytest.importorskip("kagglehub")

    def offline(handle):
        raise ConnectionError(f"no route for {handle}")

    monkeypatch.setattr(kagglehub, "dataset_download", offline)
    with pytest.raises(FileNotFoundError, match="chest-xray-pneumonia could not be downloaded.*by hand"):
        data.load_manifest("kaggle", cache_dir=cache)


def test_a_kaggle_download_with_other_counts_is_refused(small, cache, monkeypatch):
    monkeypatch.setattr(sources, "_kaggle", lambda: small)
    with pytest.raises(ValueError, match="Delete and repeat"):
        data.load_manifest("kaggle", cache_dir=cache)


# Decoding ----------------------------------------------------------------------------------------------------------

def close(content, image, tolerance):
    pixels = decode.decode(content)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - image).max() <= tolerance


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_lossless_grey_is_exact(kind):
    close(encoded(picture(), kind), picture(), 0)
    close(encoded(picture(), "WEBP", lossless=True), picture(), 1)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA"])
def test_png_modes(mode):
    close(encoded(picture(), mode=mode), picture(), 0)


def test_png_palette_and_black_and_white():
    few = picture() // 16 * 16
    close(encoded(PIL.Image.fromarray(few).quantize(16)), few, 1)
    close(encoded(PIL.Image.fromarray(picture() > 127)), np.where(picture() > 127, 255, 0), 0)


def test_palette_with_transparency_does_not_warn(recwarn):
    image = PIL.Image.fromarray(picture()).quantize(16)
    close(encoded(image, transparency=bytes([0] * 8 + [255] * 8)), np.asarray(image.convert("RGB").convert("L")), 1)
    assert not recwarn.list


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg_modes(mode):
    close(encoded(PIL.Image.fromarray(picture()).convert("RGB"), "JPEG", mode=mode, quality=95), picture(), 8)


def test_16_bits_of_colour_white_that_is_zero_and_32_bits():
    wide, twelve = picture().astype(np.uint16) * 257, TWELVE
    for values in (wide, twelve):
        close(cv2.imencode(".png", np.stack([values] * 3, -1))[1].tobytes(), picture(), 1)
    white = PIL.TiffImagePlugin.ImageFileDirectory_v2()
    white[262] = 0
    content = bytearray(encoded(PIL.Image.fromarray(65535 - wide), "TIFF", tiffinfo=white))
    assert PIL.Image.open(io.BytesIO(content)).tag_v2[262] == 0
    close(bytes(content), picture(), 1)
    with pytest.raises(ValueError, match="expected 16 bits"):
        decode.decode(encoded(PIL.Image.fromarray(picture().astype(np.int32) * 100_000), "TIFF"))


def test_16_bit_png_keeps_its_range():
    wide = picture().astype(np.uint16) * 257
    close(cv2.imencode(".png", wide)[1].tobytes(), picture(), 0)
    twelve = (picture().astype(np.float64) * 4095 / 255).round().astype(np.uint16)
    close(cv2.imencode(".png", twelve)[1].tobytes(), picture(), 1)


def test_the_orientation_tag_is_obeyed_by_both_decoders():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    expected = np.rot90(picture(), -1)
    jpeg = encoded(picture(), "JPEG", quality=95, exif=exif)
    close(jpeg, expected, 8)
    close(jpeg + b"trailing bytes that send the file to Pillow" * 3, expected, 8)


def test_the_pixels_of_a_film_do_not_depend_on_what_was_loaded_before(tmp_path):
    content = encoded(cv2.resize(picture(0, 80, 80), (802, 802)), "JPEG", quality=90)
    png = encoded(decode.decode(content))
    for name, some in (("jpeg", content), ("png", png)):
        for label in ("NORMAL", "PNEUMONIA"):
            folder = tmp_path / name / label
            folder.mkdir(parents=True)
            (folder / f"1.{name}").write_bytes(some)
    first, second = (data.load_manifest(tmp_path / name, cache_dir=tmp_path / "cache") for name in ("jpeg", "png"))
    assert set(first["pixel_sha256"]) == set(second["pixel_sha256"])
    data.load_images(first, 160, cache_dir=tmp_path / "cache")
    loaded = data.load_images(second, 160, cache_dir=tmp_path / "cache")
    np.testing.assert_array_equal(loaded[0], decode.fit(decode.decode(png, size=160), 160))
    assert (loaded[0] != decode.fit(decode.decode(content, size=160), 160)).any(), "a JPEG this large is made smaller"


def test_a_large_jpeg_is_decoded_smaller_but_with_room_to_spare():
    content = encoded(cv2.resize(picture(0, 80, 100), (2000, 1600)), "JPEG")
    assert decode.decode(content).shape == (1600, 2000)
    assert decode.decode(content, size=320).shape == (400, 500)
    assert decode.decode(content, size=321).shape == (800, 1000)
    assert decode.decode(content, size=641).shape == (1600, 2000)
    fine, fast = (decode.fit(decode.decode(content, size=size), 320).astype(int) for size in (None, 320))
    assert np.abs(fine - fast).mean() < 1


@pytest.mark.parametrize("side", [800, 801, 802, 803])
def test_a_jpeg_whose_sides_do_not_divide_is_not_shifted_by_being_decoded_smaller(side):
    content = encoded(cv2.resize(picture(0, 80, 80), (side, side), interpolation=cv2.INTER_NEAREST), "JPEG", quality=95)
    fine, fast = (decode.fit(decode.decode(content, size=size), 160).astype(int) for size in (None, 160))
    assert np.abs(fine - fast).mean() < 1.5


def test_fit_squeezes_or_letterboxes():
    image = np.full((50, 100), 200, np.uint8)
    assert (decode.fit(image, 40) == 200).all()
    boxed = decode.fit(image, 40, letterbox=True)
    assert (boxed[10:30] == 200).all()
    assert (boxed[:10] == 0).all() and (boxed[30:] == 0).all()
    assert decode.fit(np.full((500, 1), 9, np.uint8), 40, letterbox=True).shape == (40, 40)


def test_facts_see_blur_and_size_but_not_the_container():
    image = picture(0, 300, 300)
    (facts, film), (soft, _) = (decode.facts(encoded(each)) for each in (image, cv2.GaussianBlur(image, (0, 0), 4)))
    assert soft["blur"] > facts["blur"]
    assert decode.facts(encoded(image, "TIFF"))[0] == facts
    assert decode.facts(encoded(image.reshape(150, 600)))[0]["pixel_sha256"] != facts["pixel_sha256"]
    np.testing.assert_array_equal(film, decode.fit(image, 224))


@pytest.mark.parametrize("height, width", [(897, 896), (900, 1200), (971, 1328), (1793, 1792), (2000, 1795)])
@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
def test_facts_of_a_large_jpeg_are_told_from_a_smaller_one(height, width, orientation):
    grey = cv2.GaussianBlur(picture(0, height, width), (0, 0), 12)
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = orientation or 1
    options = {"quality": 90} | ({"exif": exif} if orientation else {})
    content = encoded(grey, "JPEG", **options)
    whole = decode.decode(content)
    facts, film = decode.facts(content)
    smaller = decode.decode(content, size=358).size < whole.size
    assert smaller == (orientation is None or height % 4 == width % 4 == 0), "saved where no edge is in the way"
    assert (facts["height"], facts["width"]) == whole.shape
    assert facts["mean_grey"] == pytest.approx(whole.mean(), abs=0.2)
    assert np.abs(film.astype(float) - decode.fit(whole, 224)).mean() < 1
    assert facts["blur"] == pytest.approx(decode.facts(encoded(whole))[0]["blur"], rel=0.01), "as sharp as whole"
    other = encoded(np.flipud(grey), "JPEG", **options)
    assert decode.facts(other)[0]["pixel_sha256"] != facts["pixel_sha256"]


# DICOM -------------------------------------------------------------------------------------------------------------

def dicom(stored, *, syntax=None, bits=12, kind="MONOCHROME2", signed=False, **tags):
    pydicom = pytest.importorskip("pydicom")
    uid = pydicom.uid
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = uid.SecondaryCaptureImageStorage
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = uid.generate_uid()
    dataset.Rows, dataset.Columns = stored.shape[-2:] if stored.shape[-1] != 3 else stored.shape[:2]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = (3, "RGB") if stored.shape[-1] == 3 else (1, kind)
    if stored.shape[-1] == 3:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = stored.itemsize * 8, bits, bits - 1
    dataset.PixelRepresentation = int(signed)
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.PixelData = stored.tobytes()
    if syntax:
        dataset.compress(getattr(uid, syntax))
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


TWELVE = (picture().astype(np.float64) * 4095 / 255).round().astype(np.uint16)


def test_dicom_plain_inverted_and_rescaled():
    close(dicom(TWELVE), picture(), 1)
    close(dicom(TWELVE, kind="MONOCHROME1"), 255 - picture().astype(int), 1)
    close(dicom(TWELVE, RescaleSlope="2", RescaleIntercept="-1024"), picture(), 1)
    turned = {"RescaleSlope": "-1", "RescaleIntercept": "4095"}
    close(dicom(TWELVE, **turned), 255 - picture().astype(int), 1)
    close(dicom(TWELVE, **turned, WindowCenter="2048", WindowWidth="4096"), 255 - picture().astype(int), 1)
    close(dicom(TWELVE.astype(np.int16) - 2048, signed=True), picture(), 1)
    close(dicom(picture(), bits=8), picture(), 0)


def test_dicom_window():
    wide = decode.decode(dicom(TWELVE, WindowCenter="2048", WindowWidth="4096"))
    narrow = decode.decode(dicom(TWELVE, WindowCenter="2048", WindowWidth="400"))
    np.testing.assert_allclose(wide, picture(), atol=1)
    assert (narrow[picture() < 100] == 0).all()
    assert (narrow[picture() > 160] == 255).all()


@pytest.mark.parametrize("empty", ["RescaleSlope", "RescaleIntercept", "VOILUTSequence", "ModalityLUTSequence",
                                   "VOILUTFunction", "WindowCenter", "WindowWidth"])
def test_dicom_element_that_is_empty_is_as_good_as_absent(empty):
    value = [] if empty.endswith("Sequence") else None
    window = {"WindowCenter": "2048", "WindowWidth": "4096"} | {empty: value}
    close(dicom(TWELVE, **window), picture(), 1)
    turned = {"RescaleSlope": "-1", "RescaleIntercept": "4095", "WindowCenter": None, "WindowWidth": None}
    close(dicom(TWELVE, **turned), 255 - picture().astype(int), 1)


@pytest.mark.parametrize("tags", [{"WindowCenter": float("nan"), "WindowWidth": 400}, {"RescaleSlope": float("nan")},
                                  {"WindowCenter": 2048, "WindowWidth": float("nan")}])
def test_dicom_window_that_is_no_number_is_refused_not_black(tags):
    with pytest.raises(ValueError, match="not numbers"):
        decode.decode(dicom(TWELVE, **tags))


def test_dicom_modality_table_says_how_bright_its_values_can_be():
    from pydicom import Dataset

    table = Dataset()
    table.LUTDescriptor, table.LUTData = [4096, 0, 16], [16 * value for value in range(4096)]
    table["LUTDescriptor"].VR, table["LUTData"].VR, table.ModalityLUTType = "US", "US", "US"
    close(dicom(TWELVE, ModalityLUTSequence=[table]), picture(), 1)
    close(dicom(TWELVE, ModalityLUTSequence=[table], WindowCenter="32768", WindowWidth="65536"), picture(), 1)


def test_dicom_lookup_table():
    from pydicom import Dataset

    table = Dataset()
    table.LUTDescriptor, table.LUTData = [4096, 0, 16], [65535 - 16 * value for value in range(4096)]
    table["LUTDescriptor"].VR, table["LUTData"].VR = "US", "US"
    close(dicom(TWELVE, VOILUTSequence=[table]), 255 - picture().astype(int), 1)


@pytest.mark.parametrize("syntax", ["RLELossless", "JPEG2000Lossless"])
def test_dicom_compressed(syntax):
    pytest.importorskip("openjpeg")
    close(dicom(TWELVE, syntax=syntax), picture(), 1)


def test_dicom_in_baseline_jpeg():
    pytest.importorskip("libjpeg")
    from pydicom import dcmread, encaps, uid

    dataset = dcmread(io.BytesIO(dicom(picture(), bits=8)))
    dataset.file_meta.TransferSyntaxUID = uid.JPEGBaseline8Bit
    dataset.PixelData = encaps.encapsulate([encoded(picture(), "JPEG", quality=95)])
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    close(buffer.getvalue(), picture(), 8)


def test_dicom_colour():
    close(dicom(np.repeat(picture()[..., None], 3, axis=2), bits=8), picture(), 1)


def test_dicom_refusals():
    with pytest.raises(ValueError, match="3 frames"):
        decode.decode(dicom(np.stack([TWELVE] * 3), NumberOfFrames="3"))
    with pytest.raises(ValueError, match="unreadable DICOM"):
        decode.decode(dicom(TWELVE)[:-500])
    with pytest.raises(ValueError, match="bomb"):
        decode.decode(dicom(TWELVE, Rows=30_000, Columns=30_000))
    with pytest.raises(ValueError, match="PALETTE"):
        decode.decode(dicom(TWELVE, kind="PALETTE COLOR"))


def test_dicom_without_a_suffix_in_a_folder(small, cache):
    (small / "train" / "NORMAL" / "0001").write_bytes(dicom(TWELVE))
    (small / "train" / "NORMAL" / "README").write_bytes(b"not one")
    manifest = data.load_manifest(small, cache_dir=cache)
    assert "train/NORMAL/0001" in set(manifest["image_id"])
    assert len(manifest) == len(TWO) + 1


def test_dicom_without_pydicom_says_what_to_install(monkeypatch, small, cache):
    (small / "train" / "NORMAL" / "1.dcm").write_bytes(dicom(TWELVE))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ImportError, match="pip install pydicom"):
        data.load_manifest(small, cache_dir=cache)


# Caches ------------------------------------------------------------------------------------------------------------

@pytest.fixture
def counted(monkeypatch):
    """The number of files decoded so far, in a list."""
    calls, original = [], decode._decode

    def decode_counted(content, size):
        calls.append(len(content))
        return original(content, size)

    monkeypatch.setattr(decode, "_decode", decode_counted)
    return calls


def test_facts_are_kept_by_content(small, cache, counted):
    before = data.load_manifest(small, cache_dir=cache)
    assert len(counted) == len(TWO)
    data.load_manifest(small, cache_dir=cache)
    (small / "train" / "NORMAL" / "1.png").rename(small / "train" / "NORMAL" / "renamed.png")
    after = data.load_manifest(small, cache_dir=cache)
    assert len(counted) == len(TWO), "a renamed file is not decoded again"
    assert set(before["pixel_sha256"]) == set(after["pixel_sha256"])
    (small / "train" / "NORMAL" / "2.png").write_bytes(encoded(picture(99)))
    assert set(data.load_manifest(small, cache_dir=cache)["pixel_sha256"]) != set(before["pixel_sha256"])
    assert len(counted) == len(TWO) + 1


def test_thumbnails_of_the_scan_are_those_of_a_second_decoding(small, cache, tmp_path, counted):
    large = encoded(cv2.GaussianBlur(picture(9, 1000, 1200), (0, 0), 4), "JPEG")
    (small / "train" / "NORMAL" / "large.jpg").write_bytes(large)
    (small / "train" / "NORMAL" / "damaged.png").write_bytes(b"no image")
    manifest = data.load_manifest(small, cache_dir=cache)
    seen = len(counted)
    scanned = data.load_thumbnails(manifest, cache_dir=cache)
    assert len(counted) == seen == len(TWO) + 2 and scanned.shape == (len(manifest), dedup.SIDE, dedup.SIDE)
    np.testing.assert_array_equal(scanned, data.load_thumbnails(manifest, cache_dir=tmp_path / "empty"))
    assert len(counted) == seen + len(manifest), "decoded again where the scan left nothing"


@pytest.mark.parametrize("damage", [lambda text: text[:-30], lambda text: "",
                                    lambda text: text.replace('"height": 40', '"height": 41', 1)])
def test_damaged_facts_are_remade(small, cache, damage):
    before = data.load_manifest(small, cache_dir=cache)
    path, = cache.glob("facts-*.json")
    path.write_text(damage(path.read_text()))
    pd.testing.assert_frame_equal(data.load_manifest(small, cache_dir=cache), before)


def test_images_are_aligned_mapped_and_read_only(small, cache):
    manifest = data.load_manifest(small, cache_dir=cache)
    shuffled = manifest.sample(frac=1, random_state=0)
    images = data.load_images(shuffled, 32, cache_dir=cache)
    assert isinstance(images, np.memmap)
    assert (images.dtype, images.shape) == (np.uint8, (len(manifest), 32, 32))
    for image, image_id in zip(images, shuffled["image_id"], strict=True):
        np.testing.assert_array_equal(image, decode.fit(picture(TWO.index(image_id)), 32))
    with pytest.raises(ValueError, match="read-only"):
        images[0, 0, 0] = 1


def test_images_are_decoded_once_for_each_size_and_box(small, cache, counted):
    manifest = data.load_manifest(small, cache_dir=cache)
    counted.clear()
    for _ in range(2):
        plain, boxed = (data.load_images(manifest, 24, letterbox=box, cache_dir=cache) for box in (False, True))
        data.load_images(manifest, 16, cache_dir=cache)
    assert len(counted) == 3 * len(manifest)
    assert not np.array_equal(plain, boxed)
    assert [path.name for path in cache.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("damage", ["truncate", "flip", "no hash"])
def test_damaged_images_are_remade(small, cache, damage):
    manifest = data.load_manifest(small, cache_dir=cache)
    before = np.array(data.load_images(manifest, 24, cache_dir=cache))
    path, = cache.glob("images-*.npy")
    content = path.read_bytes()
    if damage == "no hash":
        path.with_suffix(".sha256").unlink()
    else:
        path.write_bytes(content[:-100] if damage == "truncate" else content[:-1] + bytes([content[-1] ^ 1]))
    np.testing.assert_array_equal(data.load_images(manifest, 24, cache_dir=cache), before)
    assert path.read_bytes() == content


def test_a_file_that_changed_is_noticed_and_nothing_is_left(small, cache):
    manifest = data.load_manifest(small, cache_dir=cache)
    (small / "test" / "NORMAL" / "1.png").write_bytes(encoded(picture(77)))
    with pytest.raises(ValueError, match=r"1\.png changed since"):
        data.load_images(manifest, 24, cache_dir=cache)
    assert not list(cache.glob("*images*"))


def test_nonsense_requests(small, cache):
    manifest = data.load_manifest(small, cache_dir=cache)
    with pytest.raises(ValueError, match="at least one image"):
        data.load_images(manifest.iloc[:0], 24, cache_dir=cache)
    with pytest.raises(ValueError, match="8 px"):
        data.load_images(manifest, 0, cache_dir=cache)


def test_two_processes_at_once(small, cache, tmp_path):
    program = ("import sys, zlib\nfrom cxr import data\nm = data.load_manifest(sys.argv[1], cache_dir=sys.argv[2])\n"
               "print(zlib.crc32(data.load_images(m, 64, cache_dir=sys.argv[2])))")
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        done = list(pool.map(lambda _: subprocess.run([sys.executable, "-c", program, small, cache], check=True,
                                                      capture_output=True, cwd=tmp_path, env=environment()), range(2)))
    assert len({run.stdout for run in done}) == 1
    assert len(list(cache.glob("images-*.npy"))) == 1


def environment():
    return os.environ | {"PYTHONPATH": str(sources.root())}


def test_reading_data_needs_no_keras(tmp_path):
    program = "import sys\nfrom cxr import audit, data\nsys.exit('keras' in sys.modules or 'tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, cwd=tmp_path, env=environment()).returncode == 0


def test_cached_values_survive_only_whole(tmp_path):
    path = tmp_path / "value.json"
    assert data.read_cached(path) is None
    data.write_cached(path, {"a": [1, 2.5, None]})
    assert data.read_cached(path) == {"a": [1, 2.5, None]}
    records.write_atomic(path, path.read_text()[:-1])
    assert data.read_cached(path) is None


# The real sets -----------------------------------------------------------------------------------------------------

@pytest.mark.real
def test_real_sets_have_their_published_counts(real_data, cache):
    for name in ("covid19", "pneumoniamnist.npz"):
        manifest = data.load_manifest(real_data / name, cache_dir=cache)
        assert manifest.attrs["counts"]["found"] == manifest.attrs["counts"]["expected"]
        assert manifest.attrs["unreadable"] == []

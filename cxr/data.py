"""From files to a manifest, and from a manifest to arrays, with the caches behind them.

Every file is decoded once for its facts (hash of the pixels, size, grey level, blur) and the thumbnail in which near
duplicates are found, and once straight to the size that a network wants. All of it is kept under a hash of the content:
renamed files cost nothing, changed ones are read again, and a damaged cache is noticed and remade.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import stat
import tempfile

import cv2
import joblib
import numpy as np
import pandas as pd
import tqdm

from cxr import decode, dedup, records, sources, splits

COLUMNS = ["image_id", "patient_id", "path", "label", "etiology", "split", "sha256", "source", "pixel_sha256", "height",
           "width", "mean_grey", "blur"]
MAX_BYTES = 1 << 29


def load_manifest(source, *, cache_dir=None):
    """Return a table with one row an image.

    Args:
        source: `phantom`, `kaggle`, `pneumoniamnist`, a folder, an .npz file, or several of them joined with `:`. A
            relative path counts from here or from the repository.
        cache_dir: folder of the scan facts; by default `runs/cache` of the repository.

    Returns:
        DataFrame sorted by `image_id` with `COLUMNS`; `split` is that of the folders. Its `attrs` hold `source`,
        `synthetic`, `root`, `unreadable` (dicts `image_id, path, reason` of the files left out), `ignored` (number of
        images outside the layout, by folder) and `counts` (`found`, and `expected` where the set is a known one).

    Raises:
        FileNotFoundError: no such path, no network, or no images in a known layout.
        ValueError: every file is unreadable, a class is missing, or an official download has other counts.
        PermissionError: the cache cannot be written.
        ImportError: DICOM files without pydicom, or `kaggle` without kagglehub.
    """
    cache = cache_folder(cache_dir)
    tables = [_load_one(part, cache) for part in _parts(str(source))]
    manifest = _join(tables) if len(tables) > 1 else tables[0]
    _check_classes(manifest)
    return manifest


def _parts(source):
    return [source] if pathlib.Path(source).exists() else list(filter(None, source.split(":"))) or [source]


def _load_one(source, cache):
    files, attrs = sources.find(source)
    rows, attrs["unreadable"] = _scan(files, cache)
    if not rows:
        bad = attrs["unreadable"][0]
        raise ValueError(f"{attrs['root']}: none of its {len(files)} files can be used, for example {bad['path']}: "
                         f"{bad['reason']}. Expected {sources.LAYOUT}; copy or download the set again.")
    manifest = pd.DataFrame(rows).assign(source=attrs["source"])[COLUMNS].sort_values("image_id", ignore_index=True)
    table = pd.crosstab(manifest["split"], manifest["label"])
    found = {split: {label: int(n) for label, n in row.items() if n and label} for split, row in table.iterrows()}
    expected = sources.SOURCES.get(attrs["source"], {}).get("counts")
    if source == "kaggle" and found != expected:
        raise ValueError(f"{attrs['root']}: this download holds {found}; expected {expected}. Delete and repeat it.")
    manifest.attrs = {**attrs, "counts": {"found": found, "expected": expected}}
    return manifest


def _join(tables):
    """Return one manifest of several; image ids get the name of their set in front."""
    attrs = [table.attrs for table in tables]
    names = [each["source"] for each in attrs]
    if len(set(names)) < len(names):
        raise ValueError(f"Two of the joined sets are called the same ({', '.join(names)}). Rename a folder.")
    for table, name in zip(tables, names, strict=True):
        nameless = table["patient_id"].str.startswith("file/")
        table["image_id"] = f"{name}/" + table["image_id"]
        table["patient_id"] = table["patient_id"].where(~nameless, "file/" + table["image_id"])
        table.attrs = {}
    manifest = pd.concat(tables).sort_values("image_id", ignore_index=True)
    manifest.attrs = {
        "source": "+".join(names), "synthetic": any(each["synthetic"] for each in attrs),
        "root": os.pathsep.join(each["root"] for each in attrs),
        "unreadable": [bad | {"image_id": f"{each['source']}/{bad['image_id']}"}
                       for each in attrs for bad in each["unreadable"]],
        "ignored": {f"{each['source']}/{name}": n for each in attrs for name, n in each["ignored"].items()},
        "counts": {key: {each["source"]: each["counts"][key] for each in attrs if each["counts"][key]}
                   for key in ("found", "expected")},
    }
    return manifest


def _check_classes(manifest):
    """Stop where nothing can be told apart; the COVID folder, which is meant to be joined, may stand alone."""
    where = manifest.attrs["root"]
    if not manifest["label"].ne("").any():
        raise ValueError(f"{where}: no image stands in a class folder. Expected {sources.LAYOUT}.")
    for split in ("train", "test"):
        labels = set(manifest.loc[manifest["split"].eq(split), "label"]) - {""}
        if len(labels) == 1 and labels != {"COVID19"}:
            missing = "PNEUMONIA" if labels == {"NORMAL"} else "NORMAL"
            raise ValueError(f"{where}: {split} holds one class, {labels.pop()}. Expected {split}/{missing} as well; "
                             "complete the folder, or join another set with ':'.")


def _scan(files, cache):
    """Hash and decode every file; return the manifest's rows, and the files that cannot be used with the reason."""
    read, store = _reader([path for _, path, _, _ in files]), cache / f"facts-{decode.VERSION}.json"
    known, rows, unreadable, fresh = read_cached(store) or {}, [], [], {}
    files = sorted(files)  # as the manifest is: the thumbnails stand in its order

    def look(file):
        image_id, path, split, label = file
        try:
            if not label and split != "pred":
                raise ValueError("not inside a NORMAL, PNEUMONIA or COVID19 folder")
            content = read(path)
            digest = hashlib.sha256(content).hexdigest()
            if digest in known:
                return digest, known[digest], None
            with memory_for(path):
                facts, film = decode.facts(content)
                return digest, facts, decode.fit(film, dedup.SIDE)
        except (ValueError, OSError) as error:
            return None, {"image_id": image_id, "path": path, "reason": str(error)}, None

    def thumbnails():
        for (image_id, path, split, label), (digest, facts, small) in zip(files, _threads(look, files, "scan"),
                                                                          strict=True):
            if digest is None:
                unreadable.append(facts)
                continue
            patient, etiology = splits.patient_key(image_id, label)
            rows.append({"image_id": image_id, "patient_id": patient, "path": path, "label": label,
                         "etiology": etiology, "split": split, "sha256": digest, **facts})
            if small is not None:
                fresh[digest] = facts
                yield small

    def path(count):
        digests = [row["sha256"] for row in rows]
        return _images_path("thumbnails", dedup.SIDE, digests, cache) if count == len(rows) > 0 else None

    _write_images(thumbnails(), dedup.SIDE, cache / "thumbnails.npy", path)
    if fresh:
        write_cached(store, (read_cached(store) or {}) | fresh)
    return rows, unreadable


def _reader(paths):
    """Return a function from a manifest's path to the bytes of that image; archives are opened once."""
    archives = {name: dict(np.load(name)) for name in {path.partition("::")[0] for path in paths if ".npz::" in path}}

    def read(path):
        if ".npz::" not in path:
            return read_file(path)
        name, _, place = path.partition("::")
        array, index = place.split("/")
        image = archives[name][array][int(index)]
        return b"P5 %d %d 255\n" % image.shape[::-1] + image.tobytes()  # as a PGM file: one decoder serves all

    return read


def read_file(path):
    """Return the bytes of a file.

    Raises:
        ValueError: too large, or no file at all but a folder that was closed to whoever listed it, a pipe, a device.
        OSError: it cannot be read.
    """
    about = os.stat(path)
    if stat.S_ISDIR(about.st_mode):
        raise ValueError("a folder that cannot be opened, with all that it holds")
    if not stat.S_ISREG(about.st_mode) or about.st_size > MAX_BYTES:
        raise ValueError(f"not a regular file of at most {MAX_BYTES >> 20} MiB")
    return pathlib.Path(path).read_bytes()


@contextlib.contextmanager
def memory_for(path):
    """Let a lack of memory name the image at `path`: it is the machine's fault, and no image is left out for it."""
    try:
        yield
    except (MemoryError, cv2.error) as error:
        if getattr(error, "code", cv2.Error.StsNoMem) != cv2.Error.StsNoMem:
            raise
        raise MemoryError(f"{path}: too little memory to decode it. End other programs or raise the limit, and call "
                          "again; what is finished is kept.") from error


def _threads(function, items, what):
    """Yield what `function` returns of each item, in order; by handfuls: handing one over takes as long as one."""
    handfuls = [items[start:start + 16] for start in range(0, len(items), 16)]
    workers = min(32, 2 * joblib.cpu_count())
    with concurrent.futures.ThreadPoolExecutor(workers) as pool, tqdm.tqdm(
            desc=what, total=len(items), delay=3, mininterval=5, unit="file") as bar:
        for found in pool.map(lambda handful: [function(item) for item in handful], handfuls):
            yield from found
            bar.update(len(found))


def cache_folder(cache_dir=None):
    """Return the cache folder (by default `runs/cache` of the repository), made and known to be writable.

    Raises:
        PermissionError: it is not; the message names the folder.
    """
    cache = pathlib.Path(cache_dir or sources.root() / "runs" / "cache")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache).close()
    except OSError as error:
        raise PermissionError(f"{cache}: the cache cannot be written ({error.strerror}). Expected a writable folder; "
                              "mend its permissions, or free space on the disk.") from error
    return cache


def read_cached(path):
    """Return the value that `write_cached` left at `path`; `None` if it is absent or does not match its own hash."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        digest, _, body = path.read_text().partition("\n")
        if hashlib.sha256(body.encode()).hexdigest() == digest:
            return json.loads(body)
    return None


def write_cached(path, value):
    """Write `value` (anything JSON can hold) to `path` under a line with its hash."""
    body = json.dumps(value)
    records.write_atomic(path, f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}")


def load_images(manifest, size, *, letterbox=False, cache_dir=None):
    """Return the grey images of a manifest, decoded once in parallel and then mapped from the cache.

    Images are squeezed to a square by area averaging, as the source studies did. A JPEG is decoded at a half or a
    quarter where both its sides still keep `1.25 * size`.

    Args:
        manifest: rows of `load_manifest`, in any order; the result has the same.
        size: side in pixels, at least 8.
        letterbox: keep the aspect ratio and fill up with black instead.
        cache_dir: folder of the decoded images; by default `runs/cache` of the repository.

    Returns:
        Read-only `np.memmap`, uint8 `(n, size, size)`.

    Raises:
        ValueError: no rows, a size below 8, or a file that changed since the manifest was made.
        PermissionError: the cache cannot be written.
    """
    if not len(manifest) or size < 8:
        raise ValueError(f"{len(manifest)} images at {size} px: expected at least one image, and 8 px a side.")
    def squeeze(content):
        return decode.fit(decode.decode(content, size=size), size, letterbox=letterbox)

    return _mapped("letterbox" if letterbox else "images", size, manifest, cache_dir, squeeze)


def load_thumbnails(manifest, *, cache_dir=None):
    """Return the films at `dedup.SIDE` px, as `load_images` would; a scan by `load_manifest` leaves them ready."""
    return _mapped("thumbnails", dedup.SIDE, manifest, cache_dir,
                   lambda content: decode.fit(decode.facts(content)[1], dedup.SIDE))


def _images_path(kind, size, sha256, cache):
    """Return where images are kept: by their files, as equal pixels in a PNG and a JPEG are not made smaller alike."""
    return cache / f"{kind}-{size}-{records.canonical_sha256([decode.VERSION, sha256])[:24]}.npy"


def _mapped(kind, size, manifest, cache_dir, squeeze):
    path = _images_path(kind, size, manifest["sha256"].tolist(), cache_folder(cache_dir))
    if not _intact(path):
        read = _reader(manifest["path"])

        def one(row):
            try:
                content = read(row.path)
            except OSError as error:
                raise ValueError(f"{row.path} is gone since the manifest was made ({error.strerror}). Load the "
                                 "manifest again.") from error
            if hashlib.sha256(content).hexdigest() != row.sha256:
                raise ValueError(f"{row.path} changed since the manifest was made. Load the manifest again.")
            with memory_for(row.path):
                return squeeze(content)

        _write_images(_threads(one, list(manifest.itertuples()), f"decode at {size} px"), size, path, lambda _: path)
    return np.load(path, mmap_mode="r")


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _intact(path):
    with contextlib.suppress(OSError):
        return path.with_suffix(".sha256").read_text() == _sha256(path)
    return False


def _write_images(images, size, place, path_of):
    """Write images as they come beside `place`, and rename the file to what `path_of(count)` says; at `None` drop it.

    Two processes at once do each other no harm. Not through a memory map: a full disk must raise, not kill.
    """
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".images-") as temporary:
        part, count = pathlib.Path(temporary, "images.npy"), 0
        with records.named(place), open(part, "wb", buffering=1 << 22) as file:  # after each write threads queue
            _write_header(file, count, size)
            for image in images:
                file.write(image)
                count += 1
            file.seek(0)
            _write_header(file, count, size)  # as long as the first: NumPy leaves room for a growing axis
        if path := path_of(count):
            digest = _sha256(part)
            os.replace(part, path)
            records.write_atomic(path.with_suffix(".sha256"), digest)


def _write_header(file, count, size):
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (count, size, size)})

"""From files to a manifest, and from a manifest to arrays: layouts, sources, and the caches behind them.

Every file is decoded once at full size for its facts (hash of the pixels, size, grey level, blur), and once straight to the
size that a network wants. Both results are kept under a hash of the content: renamed files cost nothing, changed ones are
read again, and a damaged cache is noticed and remade.
"""

import concurrent.futures
import contextlib
import hashlib
import inspect
import json
import os
import pathlib
import stat
import tempfile
import zipfile

import numpy as np
import pandas as pd
import tqdm

from cxr import decode, records, splits

FACTS = ["pixel_sha256", "height", "width", "mean_grey", "blur"]
COLUMNS = ["image_id", "patient_id", "path", "label", "etiology", "split", "sha256", "source", *FACTS]
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".dcm", ".dicom"}
MAX_BYTES = 1 << 29
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test", "pred": "pred"}
LABELS = {"normal": "NORMAL", "pneumonia": "PNEUMONIA", "covid19": "COVID19", "covid-19": "COVID19", "covid": "COVID19"}
LAYOUT = "train|val|test/NORMAL|PNEUMONIA|COVID19/<images>, pred/<images>, or class folders alone"

_KERMANY = "Kermany et al. 2018, Cell 172(5), doi:10.1016/j.cell.2018.02.010"
_TEST = {"NORMAL": 234, "PNEUMONIA": 390}
SOURCES = {
    "phantom": {"licence": "MIT", "citation": "cxr.phantom, procedural", "url": None, "counts": None},
    "chest_xray": {
        "licence": "CC BY 4.0", "citation": _KERMANY, "url": "https://data.mendeley.com/datasets/rscbjbr9sj/2",
        "kaggle": "paultimothymooney/chest-xray-pneumonia",
        "counts": {"train": {"NORMAL": 1341, "PNEUMONIA": 3875}, "val": {"NORMAL": 8, "PNEUMONIA": 8}, "test": _TEST},
    },
    "covid19": {
        "licence": "CC BY 4.0", "citation": "Haghanifar et al. 2020, COVID-CXNet, figshare 12580328",
        "url": "https://doi.org/10.6084/m9.figshare.12580328", "counts": {"train": {"COVID19": 865}},
    },
    "pneumoniamnist": {
        "licence": "CC BY 4.0", "citation": "Yang et al. 2023, MedMNIST v2, doi:10.1038/s41597-022-01721-8",
        "url": "https://zenodo.org/records/10519652/files/pneumoniamnist.npz", "md5": "28209eda62fecd6e6a2d98b1501bb15f",
        "counts": {"train": {"NORMAL": 1214, "PNEUMONIA": 3494}, "val": {"NORMAL": 135, "PNEUMONIA": 389}, "test": _TEST},
    },
}
SOURCES["kaggle"] = SOURCES["chest_xray"]


def root():
    """Return the repository's folder: `CXR_ROOT`, or the first folder at or above this one that holds `cxr/`."""
    if "CXR_ROOT" in os.environ:
        return pathlib.Path(os.environ["CXR_ROOT"])
    here = pathlib.Path.cwd()
    found = (folder for folder in (here, *here.parents) if (folder / "cxr" / "data.py").is_file())
    return next(found, pathlib.Path(__file__).resolve().parents[1])


def load_manifest(source, *, cache_dir=None):
    """Return a table with one row an image.

    Args:
        source: `phantom`, `kaggle`, `pneumoniamnist`, a folder, an .npz file, or several of them joined with `:`. A
            relative path counts from here or from the repository.
        cache_dir: folder of the scan facts; by default `runs/cache` of the repository.

    Returns:
        DataFrame sorted by `image_id` with `COLUMNS`; `split` is that of the folders. Its `attrs` hold `source`,
        `synthetic`, `root`, `unreadable` (dicts `image_id, path, reason` of files left out), `ignored` (number of images
        outside the layout by folder) and `counts` (`found` and `expected`, the latter `None` for a set nobody counted).

    Raises:
        FileNotFoundError: no such path, no network, or no images in a known layout.
        ValueError: every file is unreadable, a class is missing, or an official download has other counts.
        PermissionError: the cache cannot be written.
        ImportError: DICOM files without pydicom, or `kaggle` without kagglehub.
    """
    cache = _writable(cache_dir)
    tables = [_load_one(part, cache) for part in _parts(str(source))]
    manifest = _join(tables) if len(tables) > 1 else tables[0]
    _check_classes(manifest)
    return manifest


def _writable(cache_dir):
    cache = pathlib.Path(cache_dir or root() / "runs" / "cache")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache).close()
    except OSError as error:
        raise PermissionError(f"{cache}: the cache cannot be written ({error.strerror}). Expected a writable folder; "
                              "mend its permissions or free space on the disk.") from error
    return cache


def _parts(source):
    if source in SOURCES or pathlib.Path(source).exists():
        return [source]
    return [part for chunk in source.split(os.pathsep) for part in chunk.split(":") if part] or [source]


def _existing(source):
    """Return the absolute path of `source`, looked for here and then in the repository."""
    for folder in (pathlib.Path.cwd(), root()):
        path = pathlib.Path(os.path.abspath(folder / pathlib.Path(source).expanduser()))
        if path.exists():
            return path
    raise FileNotFoundError(f"{source}: no such folder or .npz file, neither here nor under {root()}. Expected a folder "
                            f"with {LAYOUT}, or one of phantom, kaggle, pneumoniamnist.")


def _load_one(source, cache):
    attrs = {"source": source, "synthetic": source == "phantom"}
    if source == "pneumoniamnist" or source.endswith(".npz"):
        files, more = _npz(_mnist() if source == "pneumoniamnist" else _existing(source))
    else:
        folder = {"phantom": _phantom, "kaggle": _kaggle}.get(source, lambda: _existing(source))()
        files, more = _folder(folder, {"phantom": "phantom", "kaggle": "chest_xray"}.get(source, folder.name))
    attrs |= more
    rows, attrs["unreadable"] = _scan(files, cache)
    if not rows:
        bad = attrs["unreadable"][0]
        raise ValueError(f"{attrs['root']}: none of the {len(files)} files can be used, for example {bad['path']} "
                         f"({bad['reason']}). Expected {LAYOUT}; download or copy the set again.")
    manifest = pd.DataFrame(rows).assign(source=attrs["source"])[COLUMNS].sort_values("image_id", ignore_index=True)
    table = pd.crosstab(manifest["split"], manifest["label"])
    found = {split: {label: int(n) for label, n in row.items() if n} for split, row in table.iterrows()}
    expected = SOURCES.get(attrs["source"], {}).get("counts")
    attrs["counts"] = {"found": found, "expected": expected}
    if found != expected and (source == "kaggle" or attrs.get("official")):
        raise ValueError(f"{attrs['root']}: the download holds {found}; expected {expected}. Delete it and download again.")
    manifest.attrs = attrs
    return manifest


def _folder(folder, name):
    """Return `(image_id, path, split, label)` of every image under the layout in `folder`, and what the set is."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is a file; expected a folder with {LAYOUT}, or an .npz file.")
    tops = _tops(folder)
    if len(tops) != 1:
        several = f"{len(tops)} sets ({', '.join(str(top.relative_to(folder)) for top in tops)}); name one, or join them with ':'"
        raise FileNotFoundError(f"{folder}: found {several if tops else 'no images in a known layout'}. Expected {LAYOUT}.")
    files, ignored = [], {}
    for here, folders, names in os.walk(tops[0], followlinks=True):
        folders[:] = sorted(filter(_wanted, folders))
        parts = pathlib.Path(here).relative_to(tops[0]).parts
        lower = [part.lower() for part in parts]
        split = next((SPLITS[part] for part in lower if part in SPLITS), "train")
        label = next((LABELS[part] for part in lower if part in LABELS), "")
        for image in filter(_is_image, (pathlib.Path(here, name) for name in filter(_wanted, names))):
            if not parts or (lower[0] not in SPLITS and lower[0] not in LABELS):
                ignored[parts[0] if parts else "."] = ignored.get(parts[0] if parts else ".", 0) + 1
            else:
                files.append(("/".join([*parts, image.name]), str(image), split, label))
    if not files:
        raise FileNotFoundError(f"{folder}: the folders hold no images. Expected {LAYOUT}; copy the set again.")
    return files, {"source": name, "root": str(tops[0]), "ignored": ignored}


def _wanted(name):
    return not name.startswith((".", "__MACOSX")) and name.lower() not in {"thumbs.db", "desktop.ini"}


def _is_image(path):
    if path.suffix:
        return path.suffix.lower() in SUFFIXES
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"
    return False


def _tops(folder, depth=3):
    """Return the topmost folders at or under `folder` that hold split or class folders."""
    inner = sorted(path for path in folder.iterdir() if path.is_dir() and _wanted(path.name))
    if any(path.name.lower() in SPLITS.keys() | LABELS.keys() for path in inner):
        return [folder]
    return [top for path in inner for top in _tops(path, depth - 1)] if depth else []


def _npz(path):
    """Return `(image_id, path::array/index, split, label)` of every image in a MedMNIST archive, and what it is."""
    try:
        with np.load(path) as archive:
            labels = {key[:-7]: archive[key].ravel() for key in archive.files if key.endswith("_labels")}
            shapes = {split: archive[f"{split}_images"].shape for split in labels}
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a MedMNIST archive ({error}); expected arrays train_images, train_labels, … "
                         f"as in {SOURCES['pneumoniamnist']['url']}") from error
    if not labels or any(set(values) - {0, 1} or len(values) != shapes[split][0] for split, values in labels.items()):
        raise ValueError(f"{path}: expected <split>_images with as many <split>_labels of 0 (normal) or 1 (pneumonia).")
    names = {0: "NORMAL", 1: "PNEUMONIA"}
    files = [(f"{split}/{names[value]}/{index:05d}", f"{path}::{split}_images/{index}", SPLITS[split], names[value])
             for split, values in labels.items() for index, value in enumerate(values)]
    with open(path, "rb") as file:
        md5 = hashlib.file_digest(file, "md5").hexdigest()
    return files, {"source": path.stem, "root": str(path), "ignored": {}, "md5": md5,
                   "official": md5 == SOURCES["pneumoniamnist"]["md5"]}


def _mnist():
    import keras

    source = SOURCES["pneumoniamnist"]
    try:
        return pathlib.Path(keras.utils.get_file("pneumoniamnist.npz", source["url"], file_hash=source["md5"], hash_algorithm="md5"))
    except Exception as error:  # Keras raises a plain Exception when there is no network
        raise FileNotFoundError(f"pneumoniamnist could not be downloaded ({error}). Get {source['url']} by hand and give "
                                "the path of the .npz file, or use DATA=phantom.") from error


def _kaggle():
    try:
        import kagglehub
    except ImportError as error:
        raise ImportError("DATA=kaggle needs kagglehub: pip install kagglehub, or give the folder of your own copy.") from error
    source = SOURCES["chest_xray"]
    try:
        return pathlib.Path(kagglehub.dataset_download(source["kaggle"]))
    except Exception as error:  # proxy, name lookup, credentials, disk: one remedy for all
        raise FileNotFoundError(f"kaggle: {source['kaggle']} could not be downloaded ({type(error).__name__}: {error}). Check "
                                f"the network, or download {source['url']} by hand and give its folder, or use DATA=phantom.") from error


def _phantom():
    """Return the folder of the default phantom set, made once for each state of its generator."""
    from cxr import phantom

    knobs = {name: knob.default for name, knob in inspect.signature(phantom.write).parameters.items() if name != "directory"}
    code = hashlib.sha256(pathlib.Path(phantom.__file__).read_bytes()).hexdigest()
    folder = root() / "data" / f"phantom-{records.canonical_sha256([knobs, code])[:8]}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".phantom-") as temporary:
            phantom.write(pathlib.Path(temporary) / "set")
            with contextlib.suppress(OSError):  # another process was quicker, and wrote the same
                os.rename(pathlib.Path(temporary) / "set", folder)
    return folder


def _join(tables):
    """Return one manifest of several; image ids get the name of their set in front."""
    attrs = [table.attrs for table in tables]
    names = [each["source"] for each in attrs]
    if len(set(names)) < len(names):
        raise ValueError(f"Two of the joined sets are called the same ({', '.join(names)}); rename a folder.")
    for table, name in zip(tables, names, strict=True):
        own = table["patient_id"].str.startswith("file/")
        table["image_id"] = f"{name}/" + table["image_id"]
        table["patient_id"] = table["patient_id"].where(~own, "file/" + table["image_id"])
        table.attrs = {}
    manifest = pd.concat(tables).sort_values("image_id", ignore_index=True)
    manifest.attrs = {
        "source": "+".join(names), "root": os.pathsep.join(each["root"] for each in attrs),
        "synthetic": any(each["synthetic"] for each in attrs),
        "unreadable": [bad | {"image_id": f"{each['source']}/{bad['image_id']}"} for each in attrs for bad in each["unreadable"]],
        "ignored": {f"{each['source']}/{name}": n for each in attrs for name, n in each["ignored"].items()},
        "counts": {"found": {each["source"]: each["counts"]["found"] for each in attrs},
                   "expected": {each["source"]: each["counts"]["expected"] for each in attrs}},
    }
    return manifest


def _check_classes(manifest):
    """Stop where nothing can be told apart: one class only, but for the COVID folder that is meant to be joined."""
    for split in ("train", "test"):
        labels = set(manifest.loc[manifest["split"].eq(split), "label"]) - {""}
        if len(labels) == 1 and labels != {"COVID19"}:
            missing = "PNEUMONIA" if "NORMAL" in labels else "NORMAL"
            raise ValueError(f"{manifest.attrs['root']}: {split} holds {labels.pop()} images only. Expected {split}/{missing} "
                             "as well; complete the folder, or join another set with ':'.")
    if not manifest["label"].ne("").any():
        raise ValueError(f"{manifest.attrs['root']}: no image stands in a class folder. Expected {LAYOUT}.")


def _scan(files, cache):
    """Hash and decode every file; return the manifest's rows, and what could not be used with the reason."""
    read, known = _reader([path for _, path, _, _ in files]), _load_facts(cache)

    def look(file):
        image_id, path, split, label = file
        try:
            if not label and split != "pred":
                raise ValueError("not inside a NORMAL, PNEUMONIA or COVID19 folder")
            content = read(path)
            digest = hashlib.sha256(content).hexdigest()
            return digest, known.get(digest) or decode.facts(decode.decode(content))
        except (ValueError, OSError) as error:
            return None, {"image_id": image_id, "path": path, "reason": str(error)}

    seen = list(_threads(look, files, "scan"))
    if fresh := {digest: facts for digest, facts in seen if digest and digest not in known}:
        _save_facts(cache, fresh)
    rows = []
    for (image_id, path, split, label), (digest, facts) in zip(files, seen, strict=True):
        patient, etiology = splits.patient_key(image_id, label)
        rows.append({"image_id": image_id, "patient_id": patient, "path": path, "label": label, "etiology": etiology,
                     "split": split, "sha256": digest, **facts})
    return [row for row in rows if row["sha256"]], [facts for digest, facts in seen if not digest]


def _reader(paths):
    """Return a function from a manifest path to the bytes of one image; archives are opened once."""
    names = {path.partition("::")[0] for path in paths if ".npz::" in path}
    archives = {name: dict(np.load(name)) for name in names}

    def read(path):
        if ".npz::" not in path:
            about = os.stat(path)
            if not stat.S_ISREG(about.st_mode) or about.st_size > MAX_BYTES:
                raise ValueError(f"not a regular file of at most {MAX_BYTES >> 20} MiB")
            return pathlib.Path(path).read_bytes()
        name, _, place = path.partition("::")
        array, index = place.split("/")
        image = archives[name][array][int(index)]
        return b"P5 %d %d 255\n" % image.shape[::-1] + image.tobytes()  # as a PGM file, so that one decoder serves all

    return read


def _threads(function, items, what):
    with concurrent.futures.ThreadPoolExecutor(max(2, os.cpu_count() or 2)) as pool:
        yield from tqdm.tqdm(pool.map(function, items), what, len(items), delay=3, mininterval=5, unit="file")


def _load_facts(cache):
    """Return what is known by file hash; a file that does not match its own hash counts as absent."""
    try:
        digest, _, body = (cache / f"facts-{decode.VERSION}.json").read_text().partition("\n")
    except (OSError, UnicodeDecodeError):
        return {}
    return json.loads(body) if hashlib.sha256(body.encode()).hexdigest() == digest else {}


def _save_facts(cache, fresh):
    body = json.dumps(_load_facts(cache) | fresh)
    records.write_atomic(cache / f"facts-{decode.VERSION}.json", hashlib.sha256(body.encode()).hexdigest() + "\n" + body)


def load_images(manifest, size, *, letterbox=False, cache_dir=None):
    """Return the grey images of a manifest, decoded once.

    Images are squeezed to a square by area averaging, as the source studies did. JPEGs are decoded at a half, a quarter or an
    eighth where both sides still keep `2 * size`.

    Args:
        manifest: rows of `load_manifest`; the result has the same order.
        size: side in pixels.
        letterbox: keep the aspect ratio and fill up with black instead.
        cache_dir: folder of the decoded images; by default `runs/cache` of the repository.

    Returns:
        Read-only `np.memmap`, uint8 `(n, size, size)`.

    Raises:
        ValueError: no rows, a size below 8, or a file that changed since the manifest was made.
        PermissionError: the cache cannot be written.
    """
    if not len(manifest) or size < 8:
        raise ValueError(f"{len(manifest)} images at size {size}: expected at least one image, and 8 pixels a side.")
    key = records.canonical_sha256([decode.VERSION, size, letterbox, manifest["pixel_sha256"].tolist()])[:24]
    path = _writable(cache_dir) / f"images-{size}{'-letterbox' * letterbox}-{key}.npy"
    if not _intact(path):
        _write_images(path, manifest, size, letterbox)
    return np.load(path, mmap_mode="r")


def _intact(path):
    """Whether the cached array at `path` has the hash that stands beside it."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        return path.with_suffix(".sha256").read_text() == hashlib.file_digest(file, "sha256").hexdigest()
    return False


def _write_images(path, manifest, size, letterbox):
    read = _reader(manifest["path"])

    def one(row):
        content = read(row.path)
        if hashlib.sha256(content).hexdigest() != row.sha256:
            raise ValueError(f"{row.path} changed since the manifest was made; load the manifest again.")
        return decode.fit(decode.decode(content, size=size), size, letterbox=letterbox)

    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".images-") as temporary:
        part = pathlib.Path(temporary, "images.npy")
        with open(part, "wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (len(manifest), size, size)})
            for image in _threads(one, list(manifest.itertuples()), f"decode at {size}"):
                file.write(image)
        with open(part, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.replace(part, path)
    records.write_atomic(path.with_suffix(".sha256"), digest)

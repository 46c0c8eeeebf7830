"""Where image sets come from: known sets and their counts, downloads, and the layouts that the five studies used."""

import hashlib
import inspect
import os
import pathlib
import stat

import numpy as np

SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp", ".dcm", ".dicom"}
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test", "pred": "pred"}
LABELS = {"normal": "NORMAL", "pneumonia": "PNEUMONIA", "covid19": "COVID19", "covid-19": "COVID19", "covid": "COVID19"}
LAYOUT = "train|val|test/NORMAL|PNEUMONIA|COVID19/<images>, pred/<images>, or the class folders alone"
JUNK = {"thumbs.db", "desktop.ini", "__macosx", "masks"}  # and whatever starts with a dot; masks are the phantom's

_TEST = {"NORMAL": 234, "PNEUMONIA": 390}
SOURCES = {  # known sets; `counts` are the published ones, licences and citations stand in data/README.md
    "chest_xray": {
        "url": "https://data.mendeley.com/datasets/rscbjbr9sj/2", "kaggle": "paultimothymooney/chest-xray-pneumonia",
        "counts": {"train": {"NORMAL": 1341, "PNEUMONIA": 3875}, "val": {"NORMAL": 8, "PNEUMONIA": 8}, "test": _TEST}},
    "covid19": {"counts": {"train": {"COVID19": 865}}},
    "pneumoniamnist": {
        "of": "chest_xray", "url": "https://zenodo.org/records/10519652/files/pneumoniamnist.npz",
        "md5": "28209eda62fecd6e6a2d98b1501bb15f",
        "counts": {"train": {"NORMAL": 1214, "PNEUMONIA": 3494}, "val": {"NORMAL": 135, "PNEUMONIA": 389},
                   "test": _TEST}},
}  # fmt: skip


def root():
    """Return the repository's folder: `CXR_ROOT`, or the first folder at or above this one that holds `cxr/`."""
    if "CXR_ROOT" in os.environ:
        return pathlib.Path(os.environ["CXR_ROOT"])
    here = pathlib.Path.cwd()
    found = (folder for folder in (here, *here.parents) if (folder / "cxr" / "sources.py").is_file())
    return next(found, pathlib.Path(__file__).resolve().parents[1])


def find(source):
    """Return `(files, about)` of one source word or path.

    Returns:
        files: list of `(image_id, path, split, label)`; the path of an image in an archive is `<npz>::<array>/<index>`.
        about: dict with `source` (its name), `root`, `synthetic` and `ignored` (images outside the layout, by folder).

    Raises:
        FileNotFoundError: no such path, no network, or no images in a known layout.
        ValueError: an archive that is not a MedMNIST one.
        ImportError: `kaggle` without kagglehub.
    """
    if source == "pneumoniamnist" or source.endswith(".npz"):
        return _archive(_mnist() if source == "pneumoniamnist" else _existing(source))
    drawn = {"phantom": _phantom, "phantom_covid": lambda: _phantom(covid=150), "kaggle": _kaggle}
    files, about = _folder(drawn.get(source, lambda: _existing(source))())
    if source in drawn:
        about["source"] = "chest_xray" if source == "kaggle" else "phantom"
    return files, about


def _existing(source):
    for folder in (pathlib.Path.cwd(), root()):
        path = pathlib.Path(os.path.abspath(folder / pathlib.Path(source).expanduser()))
        if path.exists():
            return path
    raise FileNotFoundError(f"{source}: no such folder or .npz file, neither from here nor from {root()}. Expected a "
                            f"folder with {LAYOUT}, or one of phantom, kaggle, pneumoniamnist.")


def _folder(folder):
    """List the images of a folder, the files that lie outside its layout, and what the set is called."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is a file. Expected a folder with {LAYOUT}, or an .npz file.")
    tops = _tops(folder)
    if len(tops) != 1:
        what = f"{len(tops)} sets ({', '.join(top.name for top in tops)})" if tops else "no split or class folder"
        raise FileNotFoundError(f"{folder} holds {what}. Expected {LAYOUT}; name one set, or join two with ':'.")
    files, ignored, closed = [], {}, []
    for here, names in walk(tops[0], _wanted):
        if names is None:
            closed.append(here)
            continue
        parts = pathlib.Path(here).relative_to(tops[0]).parts
        lower = [part.lower() for part in parts]
        split = next((SPLITS[part] for part in lower if part in SPLITS), "train")
        label = next((LABELS[part] for part in lower if part in LABELS), "")
        images = [name for name in names if _is_image(pathlib.Path(here, name))]
        if lower and (lower[0] in SPLITS or lower[0] in LABELS):
            files += [(printable("/".join([*parts, name])), os.path.join(here, name), split, label) for name in images]
        elif images:
            ignored["/".join(parts) or "."] = len(images)
    files += [(printable(os.path.relpath(path, tops[0])), path, "pred", "") for path in closed]  # so that it is named
    if not files:
        raise FileNotFoundError(f"{folder}: its folders hold no images. Expected {LAYOUT}; copy the set again.")
    return files, {"source": folder.name, "root": str(tops[0]), "ignored": ignored,
                   "synthetic": (tops[0] / "phantom.json").is_file()}


def walk(folder, wanted):
    """Yield `(path, names of its files)` of a folder and of all below it, links too, where `wanted(name)` is true.

    Folders that cannot be opened come last, with `None` for the names.
    """
    closed, above = [], {}
    for here, folders, names in os.walk(folder, followlinks=True, onerror=lambda error: closed.append(error.filename)):
        place, over = os.path.realpath(here), above.get(os.path.dirname(here), frozenset())
        if place in over:  # a link to a folder above itself, which would show its images without end
            folders.clear()
            continue
        above[here] = over | {place}
        folders[:] = sorted(filter(wanted, folders))
        yield here, list(filter(wanted, names))
    yield from ((path, None) for path in closed)


def _tops(folder, depth=3):
    """Return the topmost folders at or under `folder` that hold split folders, or class folders that hold neither."""
    inner = sorted(path for path in folder.iterdir() if path.is_dir() and _wanted(path.name))
    names = {path.name.lower() for path in inner}
    if names & set(SPLITS) or any(path.name.lower() in LABELS and not _tops(path, 0) for path in inner):
        return [folder]
    return [top for path in inner for top in _tops(path, depth - 1)] if depth else []


def _wanted(name):
    return not name.startswith(".") and name.lower() not in JUNK


def printable(name):
    """Return a file's name as UTF-8 can hold it: one from an old disk or archive may be in no known encoding."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _is_image(path):
    if path.suffix.lower() in SUFFIXES:
        return True
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        with open(path, "rb") as file:  # DICOM files often go without a suffix, or by a number with dots
            return file.read(132)[128:] == b"DICM"
    except OSError:  # closed, or a link to nothing: an image for all we know, and named among the unreadable
        return not path.suffix


def _archive(path):
    """List the images of a MedMNIST archive."""
    try:
        with np.load(path) as archive:
            named = [key.removesuffix("_labels") for key in archive.files if key.endswith("_labels")]
            labels = {split: archive[f"{split}_labels"].ravel() for split in named}
            images = {split: archive[f"{split}_images"] for split in named}
    except Exception as error:  # a damaged archive makes zipfile, zlib and NumPy raise nearly anything
        raise ValueError(f"{path} is not a MedMNIST archive ({error}). Expected train_images, train_labels, … as in "
                         f"{SOURCES['pneumoniamnist']['url']}; download it again.") from error
    if not any(map(len, labels.values())) or set(labels) - set(SPLITS) or any(
            images[split].dtype != np.uint8 or images[split].ndim != 3 or len(values) != len(images[split])
            or set(values.tolist()) - {0, 1} for split, values in labels.items()):
        shapes = {split: f"{array.dtype} {array.shape}" for split, array in images.items()}
        raise ValueError(f"{path}: expected <train|val|test>_images, uint8 (n, height, width), each with n labels of 0 "
                         f"(normal) or 1 (pneumonia); found images {shapes}.")
    names = ("NORMAL", "PNEUMONIA")
    files = [(f"{split}/{names[value]}/{index:05d}", f"{path}::{split}_images/{index}", SPLITS[split], names[value])
             for split, values in labels.items() for index, value in enumerate(values)]
    return files, {"source": path.stem, "root": str(path), "synthetic": False, "ignored": {}}


def _mnist():
    import keras

    card = SOURCES["pneumoniamnist"]
    try:
        return pathlib.Path(keras.utils.get_file("pneumoniamnist.npz", card["url"], file_hash=card["md5"]))
    except Exception as error:  # Keras raises a plain Exception without a network
        raise FileNotFoundError(f"pneumoniamnist could not be downloaded ({error}). Get {card['url']} by hand and give "
                                "the path of the .npz file, or use phantom.") from error


def _kaggle():
    try:
        import kagglehub
    except ImportError as error:
        raise ImportError("kaggle needs kagglehub: pip install kagglehub, or give a folder of your own.") from error
    card = SOURCES["chest_xray"]
    try:
        return pathlib.Path(kagglehub.dataset_download(card["kaggle"]))
    except Exception as error:  # proxy, name, credentials or disk: the remedy is the same
        raise FileNotFoundError(
            f"kaggle: {card['kaggle']} could not be downloaded ({type(error).__name__}: {error}). Check the network, "
            f"or get {card['url']} by hand and give its folder, or use phantom.") from error


def _phantom(**other):
    """Return the folder of the default phantom set, or of one with `other` knobs, drawn when it is not there yet."""
    from cxr import phantom

    knobs = sorted((name, other.get(name, knob.default))
                   for name, knob in inspect.signature(phantom.write).parameters.items())
    folder = root() / "data" / f"phantom-{hashlib.sha256(repr(knobs).encode()).hexdigest()[:8]}"
    phantom.write(folder, **other)
    return folder

"""Synthetic frontal chest X-rays with exact lung and lesion masks, written in the folder layout of the real set."""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from typing import NamedTuple

import cv2
import numpy as np

from cxr import anatomy
from cxr.records import write_atomic

KINDS = ("normal", "bacterial", "viral", "covid")
FOLDERS = {"normal": "NORMAL", "bacterial": "PNEUMONIA", "viral": "PNEUMONIA", "covid": "COVID19"}
RATIO = {"train": 2.2, "val": 1.0, "test": 1.67}  # pneumonias to one normal, about those of the real set


class Film(NamedTuple):
    """One synthetic radiograph: `image` uint8 and the boolean `lung_mask`, `lesion_mask`, all `(size, size)`."""

    image: np.ndarray
    lung_mask: np.ndarray
    lesion_mask: np.ndarray


def render(seed, kind, *, size=256, patient=None, severity=None, exposure=0.0, contrast=1.0, sharpness=0.75,
           marker="R"):  # fmt: skip
    """Return one `Film`, the same for the same arguments.

    Args:
        seed: int or `numpy.random.Generator`: pose, breath, severity, noise of this film.
        kind: `normal`, `bacterial` (lobar consolidation), `viral` (perihilar interstitial) or `covid` (peripheral
            ground glass, on adults as in the real set; the others are children).
        size: side in pixels, at least 32.
        patient: int that fixes anatomy and the place of the lesion; `None` draws a new patient.
        severity: share of air that the lesion replaces at most, in [0, 1]; `None` draws it, subtle ones included.
        exposure, contrast, sharpness: of the film; 0, 1 and 0.75 are usual, sharpness in [0, 1].
        marker: `R` (image's left), `L` (image's right) or `None`.

    Raises:
        ValueError: an argument outside its range.
    """
    _require(kind in KINDS, f"kind is {kind!r}, expected one of {', '.join(KINDS)}.")
    _require(size >= 32, f"size is {size}, expected at least 32 pixels.")
    _require(severity is None or 0 <= severity <= 1, f"severity is {severity}, expected None or a number in [0, 1].")
    _require(0 <= sharpness <= 1, f"sharpness is {sharpness}, expected a number in [0, 1].")
    _require(contrast > 0, f"contrast is {contrast}, expected a number above 0.")
    _require(marker in ("R", "L", None), f"marker is {marker!r}, expected 'R', 'L' or None.")
    rng = np.random.default_rng(seed)
    patient = rng.integers(2**32) if patient is None else patient
    n, severity = int(size * 1.125), rng.uniform(0.2, 0.95) if severity is None else severity
    pose = cv2.getRotationMatrix2D((0, 0), rng.normal(0, 2.5), size / n * rng.uniform(1.04, 1.26))
    pose[0] *= rng.uniform(0.95, 1.12)
    pose[:, 2] = size / 2 - pose[:, :2] @ [n / 2, n / 2] + size * rng.normal(0, 0.015, 2)
    path, field, extent = (cv2.warpAffine(p, pose, (size, size), borderMode=cv2.BORDER_REPLICATE)
                           for p in anatomy.chest(rng, kind, n, patient, severity))  # fmt: skip
    if rng.random() < 0.12:
        path += _wires(rng, size)
    image = _burn(_develop(path, rng, size, exposure, contrast, sharpness), rng, marker, size)
    return Film(np.clip(image, 0, 255).astype(np.uint8), field > 0.5, (field > 0.5) & (extent > 0.4))


def _require(condition, message):
    if not condition:
        raise ValueError(message)


def _wires(rng, size):
    """Path through monitoring leads: thin wires that end in an electrode."""
    path, s = np.zeros((size, size), np.uint8), np.linspace(0, 1, 30)[:, None]
    for _ in range(rng.integers(1, 4)):
        start, bend = [rng.choice([0.02, 0.98]), rng.uniform(0.3, 1)], rng.uniform(0.2, 0.9, 2)
        end = rng.uniform(0.25, 0.75, 2)
        curve = (1 - s) ** 2 * start + 2 * s * (1 - s) * bend + s * s * end
        cv2.polylines(path, [np.int32(curve * size * 16)], False, 130, max(1, size // 256), cv2.LINE_AA, 4)
        cv2.circle(path, np.int32(end * size * 16).tolist(), int(size * 0.24), 160, max(1, size // 200), cv2.LINE_AA, 4)
    return path * np.float32(0.7 / 200)


def _develop(path, rng, size, exposure, contrast, sharpness):
    """Turn paths into grey levels: attenuation, blur, scatter, quantum noise, dynamic range compression, film curve."""

    def smooth(p, sigma):
        small = cv2.GaussianBlur(cv2.resize(p, (32, 32), interpolation=cv2.INTER_AREA), (0, 0), sigma)
        return cv2.resize(small, (size, size), interpolation=cv2.INTER_CUBIC)

    def curve(d):
        return 1 / (1 + np.exp(-3.6 * contrast * (d - 0.60 + 0.05 * exposure)))

    pixel = size / 256
    light = cv2.GaussianBlur(np.exp(-path), (0, 0), max(2.2 * (1 - sharpness), 0.15) * pixel)
    light += 0.06 / contrast**4 * smooth(light, 3.2) + 0.004  # a flat film is one with much scatter
    grain = cv2.GaussianBlur(rng.standard_normal(light.shape, dtype=np.float32), (0, 0), 0.6 * pixel)
    light += np.sqrt(light) * np.float32(rng.uniform(0.006, 0.014)) * grain
    dark = -np.log(np.maximum(light, 1e-4))
    dark += 0.6 * contrast**2 * (dark - smooth(dark, 3.0)) + 0.4 * (dark - cv2.GaussianBlur(dark, (0, 0), 2 * pixel))
    dark /= np.percentile(dark[::4, ::4], 97)
    return 250 * (curve(dark) - curve(0)) / (curve(1.15) - curve(0))


def _burn(image, rng, marker, size):
    """Burn in the side marker and, on some films, the edges of the collimator."""
    if rng.random() < 0.3:
        left, right, top, low = rng.uniform(-0.02, 0.05, 4) * size
        grid, lean = np.arange(size, dtype=np.float32), rng.normal(0, 0.01) * np.arange(size)[:, None]
        across = np.minimum(grid - left - lean, size - grid - right + lean)
        image *= np.clip(np.minimum(across, np.minimum(grid - top, size - grid - low)[:, None]) * 200 / size, 0, 1)
    if marker:
        height, stamp = rng.uniform(0.050, 0.075) * size, np.zeros((size, size), np.uint8)
        left, low = rng.uniform(0.02, 0.05) if marker == "R" else rng.uniform(0.90, 0.93), rng.uniform(0.10, 0.30)
        at = int(left * size), int(low * size)
        font, thick = (cv2.FONT_HERSHEY_SIMPLEX, height / 21, 255), max(1, round(height / 7))
        cv2.putText(stamp, marker, at, *font, thick, cv2.LINE_AA)
        image = np.maximum(image, stamp * np.float32(rng.uniform(0.85, 1.0)))
    return image


def write(directory, *, seed=0, num_train=560, num_val=16, num_test=220, size=256,
          duplicates=8, duplicates_across_splits=0, near_duplicates=6,
          shift=1.0, shortcut=0.0, shortcut_test=None, covid=0):  # fmt: skip
    """Write a phantom set as `train|val|test/<CLASS>/*.jpeg` with `masks/{lung,lesion}/<split>/<stem>.png` beside.

    The folder appears complete or not at all; one that holds this very set is left as it is, another phantom replaced,
    anything else refused (`ValueError`). Returns what `phantom.json` holds: parameters, counts, planted pairs.

    Args:
        directory: folder to make; must be new, empty, or an earlier phantom.
        seed: int; equal seeds give equal bytes on one machine.
        num_train, num_val, num_test: images in each split, planted copies included.
        size: side of the images in pixels.
        duplicates: exact copies under another name: three quarters in train, the others in test.
        duplicates_across_splits: test images that are exact copies of train images.
        near_duplicates: train images that are brightened, moved, re-encoded copies of others.
        shift: how far test differs from train in sharpness, contrast and exposure; 0 not at all, 1 like the real set.
        shortcut: probability in [0, 1] that the side marker gives the label away (L on pneumonia, R on normal).
        shortcut_test: the same for test, in [-1, 1]; negative ties it the wrong way round; `None`: as `shortcut`.
        covid: images of a third class, `COVID19`, four fifths of them in train.
    """
    parameters = {key: value for key, value in locals().items() if key != "directory"}
    counts = _check(parameters)
    summary = {"generator": "cxr.phantom", "synthetic": True, "code": code_sha256(), "parameters": parameters}
    directory = pathlib.Path(directory).resolve()
    old = _summary(directory)
    if old and all(old.get(key) == value for key, value in summary.items()):
        return old
    _require(bool(old) or not directory.exists() or (directory.is_dir() and not any(directory.iterdir())),
             f"{directory} is not a phantom and not empty; name a new folder.")  # fmt: skip
    films = _plan(np.random.default_rng([seed, 0]), counts, parameters)
    keys = ("planted", "file", "copy_of")
    summary["planted"] = [{key: film[key] for key in keys} for film in films if film["planted"]]
    summary["images"] = {split: {label: sum(film["file"].startswith(f"{split}/{label}/") for film in films)
                                 for label in dict.fromkeys(FOLDERS.values())} for split in RATIO}  # fmt: skip
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".phantom-") as temporary:
        new = pathlib.Path(temporary) / "new"
        for film in films:
            for path in _paths(new, film["file"]):
                path.parent.mkdir(parents=True, exist_ok=True)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda film: _save(new, film, size), [film for film in films if not film["planted"]]))
        for film in films:
            if film["planted"]:
                _copy(new, film)
        (new / "phantom.json").write_text(json.dumps(summary, indent=1, sort_keys=True) + "\n")
        if directory.exists():
            os.rename(directory, pathlib.Path(temporary) / "old")
        try:
            os.rename(new, directory)
        except OSError:  # another process was quicker
            _require(_summary(directory) == summary, f"{directory} was taken meanwhile; name a new folder.")
    return summary


def code_sha256():
    """Hash of the code that draws, so that a set drawn by other code is told apart."""
    files = (pathlib.Path(anatomy.__file__), pathlib.Path(__file__))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _summary(directory):
    try:
        summary = json.loads((directory / "phantom.json").read_text())
    except (OSError, ValueError):
        return None
    return summary if isinstance(summary, dict) and summary.get("generator") == "cxr.phantom" else None


def _check(p):
    """Return the images of each (split, kind), or raise what is wrong with the parameters."""
    for name, least in {"num_train": 0, "num_val": 0, "num_test": 0, "duplicates": 0, "duplicates_across_splits": 0,
                        "near_duplicates": 0, "covid": 0, "seed": 0, "size": 32}.items():  # fmt: skip
        _require(isinstance(p[name], int) and p[name] >= least, f"{name} is {p[name]!r}, expected an int >= {least}.")
    for name, most in {"shift": 2, "shortcut": 1}.items():
        _require(0 <= p[name] <= most, f"{name} is {p[name]}, expected a number in [0, {most}].")
    tied = p["shortcut_test"]
    _require(tied is None or -1 <= tied <= 1, f"shortcut_test is {tied}, expected None or a number in [-1, 1].")
    counts = {}
    for split, ratio in RATIO.items():
        parts = np.cumsum([0, 1, ratio * 2 / 3, ratio / 3])  # of the pneumonias two of three are bacterial
        edges = np.round(parts / parts[-1] * p[f"num_{split}"]).astype(int)
        counts |= {(split, kind): int(n) for kind, n in zip(KINDS, np.diff(edges), strict=False)}
    counts |= {("train", "covid"): round(p["covid"] * 0.8), ("test", "covid"): p["covid"] - round(p["covid"] * 0.8)}
    return counts


def _plan(rng, counts, p):
    """List the films to write, each a dict of its file, what `render` takes, and what it is a copy of."""
    films = []
    for kind in KINDS:
        number, odds = 0, [0.9, 0.1, 0] if kind == "normal" else [0.65, 0.22, 0.13]
        # Viral test and bacterial train patients share numbers, as in the real set: a number alone is nobody.
        for split in ("train", "val", "test") if kind == "bacterial" else ("test", "val", "train"):
            left = counts.get((split, kind), 0)
            while left:
                shots, number = min(left, int(rng.choice([1, 2, 3], p=odds))), number + 1
                left, family = left - shots, rng.choice(["IM", "NORMAL2-IM"])
                for shot in range(1, shots + 1):
                    name = {"normal": f"{family}-{number:04d}-0001" + (f"-{shot:04d}" if shots > 1 else ""),
                            "bacterial": f"person{number}_bacteria_{len(films)}", "covid": f"covid-{number:04d}-{shot}",
                            "viral": f"person{number}_virus_{len(films)}"}[kind]  # fmt: skip
                    films.append({
                        "split": split, "kind": kind, "file": f"{split}/{FOLDERS[kind]}/{name}.jpeg", "planted": None,
                        "seed": [p["seed"], 1, len(films)], "patient": [p["seed"], 2, KINDS.index(kind), number],
                        **_acquisition(rng, kind != "normal", split == "test", p),
                    })  # fmt: skip
    _plant([films[i] for i in rng.permutation(len(films))], p)
    return films


def _plant(free, p):
    """Make some of the films copies of others of the same kind; no film is in two pairs."""
    test = p["duplicates"] // 4
    for planted, split, source, many in (("duplicate", "train", "train", p["duplicates"] - test),
                                         ("duplicate", "test", "test", test),
                                         ("duplicate", "test", "train", p["duplicates_across_splits"]),
                                         ("near_duplicate", "train", "train", p["near_duplicates"])):  # fmt: skip
        for _ in range(many):
            pairs = ((f, g) for f in free if f["split"] == split for g in free if g["split"] == source)
            copy, original = next(((f, g) for f, g in pairs if g["kind"] == f["kind"] and g is not f), (None, None))
            _require(copy, f"too many planted copies for the images of {split} and {source}: plant fewer.")
            copy |= {"planted": planted, "copy_of": original["file"]}
            free = [film for film in free if film is not copy and film is not original]


def _acquisition(rng, sick, test, p):
    """Draw how a film was taken: the ill in a hurry, test films on another machine, and the marker may tell."""
    drift, tie = p["shift"] * test, p["shortcut"] if not test or p["shortcut_test"] is None else p["shortcut_test"]
    sharpness = np.clip(rng.normal(0.86 - 0.14 * sick - (0.08 if sick else 0.16) * drift, 0.10), 0, 1)
    contrast = np.exp(rng.normal(-0.06 * sick - (0.04 if sick else 0.13) * drift, 0.10))
    exposure = rng.normal((0.0 if sick else 0.5) * drift, 0.6 + 0.2 * drift)
    free, tied = rng.choice(["R", "R", "L", ""]), rng.random() < abs(tie)
    marker = ("L" if sick == (tie > 0) else "R") if tied else str(free) or None
    return {"sharpness": float(sharpness), "contrast": float(contrast), "exposure": float(exposure), "marker": marker}


def _paths(root, file):
    """Where the image, its lung mask and its lesion mask stand."""
    split, _, name = file.split("/")
    mask = f"{split}/{pathlib.Path(name).stem}.png"
    return [root / file, root / "masks" / "lung" / mask, root / "masks" / "lesion" / mask]


def _encode(path, image, *options):
    path.write_bytes(cv2.imencode(path.suffix, image, options)[1].tobytes())


def _save(root, film, size):
    keys = ("kind", "patient", "exposure", "contrast", "sharpness", "marker")
    image, *masks = render(film["seed"], size=size, **{key: film[key] for key in keys})
    path, *others = _paths(root, film["file"])
    _encode(path, image, cv2.IMWRITE_JPEG_QUALITY, 92)
    for path, mask in zip(others, masks, strict=True):
        _encode(path, np.uint8(mask) * 255)


def _copy(root, film):
    """Plant a copy: the same bytes, or the picture brightened by 4 %, moved by 1 % and encoded anew."""
    for source, path in zip(_paths(root, film["copy_of"]), _paths(root, film["file"]), strict=True):
        if film["planted"] == "duplicate":
            shutil.copyfile(source, path)
            continue
        image = cv2.imread(str(source), cv2.IMREAD_GRAYSCALE)
        move, border = np.float32([[1, 0, image.shape[1] // 100], [0, 1, 0]]), cv2.BORDER_REPLICATE
        image = cv2.warpAffine(image, move, image.shape[::-1], borderMode=border, flags=cv2.INTER_NEAREST)
        if path.suffix == ".jpeg":
            _encode(path, cv2.convertScaleAbs(image, alpha=1.04), cv2.IMWRITE_JPEG_QUALITY, 80)
        else:
            _encode(path, image)


def masks(manifest, size=256):
    """Return the lung and lesion masks of a phantom's manifest, bool `(n, size, size)` each, in the order of its rows.

    Raises:
        FileNotFoundError: an image without masks: not a phantom's, or its `masks` folder is gone.
    """
    out = np.zeros((2, len(manifest), size, size), bool)
    for row, path in enumerate(map(pathlib.Path, manifest["path"])):
        for part, file in enumerate(_paths(path.parents[2], "/".join(path.parts[-3:]))[1:]):
            mask = cv2.imread(str(file), cv2.IMREAD_GRAYSCALE) if file.exists() else None
            if mask is None:
                raise FileNotFoundError(f"{file}: no mask for {path}. Only phantoms have masks; write one with "
                                        "`python -m cxr phantom DIR`.")  # fmt: skip
            out[part, row] = cv2.resize(mask, (size, size), interpolation=cv2.INTER_AREA) > 127
    return out[0], out[1]


def gallery(path, seed=0):
    """Write a labelled picture (PNG below 400 kB) of the four kinds: two films of each, the second again with masks.

    Lungs are outlined in blue, lesions tinted red.
    """
    picture = np.full((40 + 3 * 264, 4 * 264 - 8, 3), 255, np.uint8)
    for column, kind in enumerate(KINDS):
        label = f"{'COVID-like' if kind == 'covid' else kind} (synthetic)"
        cv2.putText(picture, label, (264 * column + 2, 27), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (40, 40, 40), 1, cv2.LINE_AA)
        for row in range(3):
            draw = [seed + 1, column, min(row, 1)]
            film = render(draw, kind, patient=draw, severity=0.8)
            tile = cv2.cvtColor(film.image // 4 * 4, cv2.COLOR_GRAY2BGR)  # fewer greys compress better
            if row == 2:
                tile[film.lesion_mask] = 0.7 * tile[film.lesion_mask] + np.array([10, 10, 76])
                outline, _ = cv2.findContours(np.uint8(film.lung_mask), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
                cv2.drawContours(tile, outline, -1, (233, 180, 86), 1, cv2.LINE_AA)
            picture[40 + 264 * row :, 264 * column :][:256, :256] = tile
    write_atomic(path, cv2.imencode(".png", picture, [cv2.IMWRITE_PNG_COMPRESSION, 9])[1].tobytes())

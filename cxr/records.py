"""One run, one record: what was trained, on which data, and what came out, written once and atomically.

A *run* is one training or scoring with one configuration and one seed. Its record (JSON) and its predictions (CSV)
are the artefacts that every table and figure is made from; nothing else carries a number.
"""

import contextlib
import dataclasses
import fcntl
import functools
import gzip
import hashlib
import io
import json
import os
import pathlib
import platform
import secrets
import sys

import pandas as pd

from cxr import __version__, evaluate

SCHEMA = 1
PREDICTION_COLUMNS = ["image_id", "patient_id", "split", "y_true", "y_score"]
# The code that decides what a smoke record holds. Presentation (plots, report, command line) may change without effect.
_PRESENTATION = {"plots.py", "trustplots.py", "tables.py", "compare.py", "report.py", "card.py", "__main__.py",
                 "audit.py", "pages.py"}


def write_atomic(path, content):
    """Write `content` (`bytes` or `str`) to `path` so that a reader sees all of it or none of it.

    Raises:
        OSError: the folder cannot be written or the disk is full; an earlier file at `path` stays as it was.
    """
    content = content.encode() if isinstance(content, str) else content
    save_atomic(lambda place: place.write_bytes(content), pathlib.Path(path))


def save_atomic(save, path):
    """Call `save(place)` under a temporary name in the same folder, then rename; the suffix stays.

    Raises:
        OSError: as of `write_atomic`.
    """
    temporary = path.with_name(f".{os.getpid()}-{secrets.token_hex(4)}.{path.name}")  # pids are alike in containers
    with named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def named(path):
    """Make `OSError` of writing `path` say which file and what to do: on a full disk the system's does neither."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{path}: cannot be written ({error.strerror or error}). Free space on the disk, or "
                                   "mend the permissions, and call again; what is finished is kept.") from error


@contextlib.contextmanager
def alone(path):
    """Hold the lock file `path`, after whoever holds it now; it ends with the process, so a killed one leaves none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def canonical_sha256(value):
    """Return the SHA-256 of `value` (anything JSON can hold) as sorted, compact JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _sha256(record):
    """Return the hash of a record as it reads from its file, without that hash."""
    return canonical_sha256({key: value for key, value in record.items() if key != "sha256"})


def _was_changed(record):
    return record.get("sha256", digest := _sha256(record)) != digest  # the first records carry no hash


@functools.cache
def code_sha256():
    """Return one hash over the modules that decide what a record holds."""
    files = sorted(path for path in pathlib.Path(__file__).parent.glob("*.py") if path.name not in _PRESENTATION)
    return canonical_sha256([[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in files])


def environment():
    """Return what produced a record: versions, backend, device, threads and the hash of the code."""
    about = {"cxr": __version__, "code_sha256": code_sha256(), "python": platform.python_version(),
             "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()}
    if "keras" in sys.modules:  # a record without training must not pay for the import
        import keras

        devices = keras.distribution.list_devices()
        about |= {"keras": keras.__version__, "backend": keras.backend.backend(),
                  "precision": keras.config.dtype_policy().name,
                  "device": devices[0].split(":")[0] if devices else "cpu"}
    return about


def fingerprint(manifest):
    """Return the record's `data` block for a split manifest: source, hashes and counts."""
    splits = manifest.groupby("split")
    return {
        "source": manifest.attrs["source"],
        "synthetic": bool(manifest.attrs["synthetic"]),
        "manifest_sha256": canonical_sha256(manifest[["image_id", "label", "sha256"]].values.tolist()),
        "split_sha256": canonical_sha256(manifest[["image_id", "split"]].values.tolist()),
        "num_images": {name: len(part) for name, part in splits},
        "num_patients": {name: int(part["patient_id"].nunique()) for name, part in splits},
        "unreadable": [bad["image_id"] for bad in manifest.attrs.get("unreadable", [])],
    }


def predictions_csv(predictions):
    """Return the gzipped CSV of a predictions table; the bytes depend on the content alone."""
    table = predictions[PREDICTION_COLUMNS].to_csv(index=False, float_format="%.6g", lineterminator="\n")
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as file:
        file.write(table.encode())
    return buffer.getvalue()


def read_predictions(path):
    """Return the predictions table at `path` with the dtypes that it was written with."""
    return pd.read_csv(path, dtype={"image_id": str, "patient_id": str, "split": str})


def read_record(path, *, root):
    """Return the record at `path` after checking it and its predictions against their hashes.

    Raises:
        ValueError: the record is not valid JSON or was changed, or its predictions under `root` are missing or were.
    """
    path = pathlib.Path(path)
    try:
        record = json.loads(path.read_text())
        predictions = pathlib.Path(root) / record["predictions"]["path"]
        expected = record["predictions"]["sha256"]
        if _was_changed(record):
            raise ValueError("its content does not match its hash")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"{path} is not a record of this lab ({error!r}); move it away to have it made again."
        raise ValueError(message) from error
    if not predictions.is_file() or hashlib.sha256(predictions.read_bytes()).hexdigest() != expected:
        raise ValueError(f"{predictions} is missing or does not match the hash in {path}; "
                         "move the record away to have both made again.")
    return record


@dataclasses.dataclass(frozen=True)
class Run:
    """One notebook at one profile on one data source: where its records, figures and models go.

    Attributes:
        notebook: name without suffix, such as `02_baseline_cnn`.
        profile: the `config.Profile` in force, overrides applied.
        directory: `runs/<profile>-<data>`.
        cache: folder for decoded images and scan facts, shared by all runs.
        official: the manifest as loaded, in its official splits; of a set without a test split, with the one drawn.
        manifest: the same images under the protocol (`splits.assign`).
        seeds: the seeds to repeat each configuration over.
        grid_seeds: the same for the cells of a wide comparison.
    """

    notebook: str
    profile: object
    directory: pathlib.Path
    cache: pathlib.Path
    official: pd.DataFrame
    manifest: pd.DataFrame
    seeds: list
    grid_seeds: list

    @property
    def results(self):
        """Folder with `records/` and `predictions/`."""
        return self.directory / "results"

    @property
    def synthetic(self):
        """Whether the images are phantoms, which every caption then says."""
        return bool(self.manifest.attrs["synthetic"])

    @property
    def predictable(self):
        """Whether outcomes are known beforehand and may be asserted: of phantoms, at the size and length designed."""
        return self.synthetic and self.profile.image_size is None and self.profile.epochs is None

    def images(self, size, *, letterbox=False):
        """Return the images as uint8 `(n, size, size)` in the manifest's order, decoded once and memory-mapped."""
        from cxr import data

        return data.load_images(self.manifest, size, letterbox=letterbox, cache_dir=self.cache)

    def cap(self, *, grid=False, **recipe):
        """Return `recipe` (`image_size`, `epochs`) with the profile's caps and the caller's overrides applied.

        `grid` says that it is a cell of a wide comparison, which a small profile caps further.
        """
        return {name: self.profile.cap(name, value, grid=grid) for name, value in recipe.items()}

    def sweep(self, values):
        """Return the points of a sweep that the profile has time for."""
        return list(values)[:self.profile.max_points]

    def run_id(self, variant, config, seed, manifest=None):
        """Return `<notebook>-<config8>-s<seed>`; the eight digits hash notebook, variant, data and configuration."""
        data = fingerprint(self.manifest if manifest is None else manifest)
        identity = {"notebook": self.notebook, "variant": variant, "config": config,
                    "data": {key: data[key] for key in ("source", "manifest_sha256", "split_sha256")}}
        return f"{self.notebook}-{canonical_sha256(identity)[:8]}-s{seed}"

    def backup(self, name):
        """Return the folder where a training called `name` backs up; under a strict profile, one of this code alone."""
        code = f"-{code_sha256()[:8]}" if self.profile.strict else ""
        return self.directory / "cache" / "backup" / f"{name}{code}"

    def load(self, run_id):
        """Return the finished record `run_id`, or `None` when it has yet to be made."""
        path = self.results / "records" / f"{run_id}.json"
        return read_record(path, root=self.results) if path.exists() else None

    def once(self, run_id, make):
        """Return the record `run_id`: the finished one, or what `make()` returns while no other process makes it."""
        if found := self.load(run_id):
            return found
        with alone(self.directory / "cache" / "locks" / run_id):
            return self.load(run_id) or make()

    def set_aside_stale(self):
        """Rename records that other code made, where the profile is strict: smoke exists to test the code as it is."""
        for path in (self.results / "records").glob("*.json") if self.profile.strict else ():
            try:
                record = json.loads(path.read_text())
                if record["environment"]["code_sha256"] != code_sha256() and not _was_changed(record):
                    os.replace(path, path.with_suffix(".stale"))
            except FileNotFoundError:
                continue  # another notebook of the same `make -j` was faster
            except (ValueError, KeyError, TypeError):
                continue  # a damaged record is named with its path as soon as somebody reads it

    def save(self, variant, config, seed, predictions, *, purpose="classify", manifest=None, **extra):
        """Write the predictions and then the record of one run, and return the record.

        Args:
            variant: what a reader calls this configuration, such as `seed recipe`.
            config: JSON-able dict that decides the result (hashed into the id).
            seed: int.
            predictions: DataFrame with `PREDICTION_COLUMNS`; every validation and test image.
            purpose: `classify`, `anomaly`, `baseline` or `generate`.
            manifest: the split manifest, where it is not the run's own.
            **extra: further fields, such as `history` and `seconds`.
        """
        manifest = self.manifest if manifest is None else manifest
        run_id = self.run_id(variant, config, seed, manifest)
        compressed = predictions_csv(predictions)
        path = f"predictions/{run_id}.csv.gz"
        write_atomic(self.results / path, compressed)
        # The numbers come from the file as it was written, so that anyone recomputes exactly the same ones.
        numbers = evaluate.record_metrics(read_predictions(self.results / path), purpose=purpose)
        record = {
            "schema": SCHEMA, "run_id": run_id, "notebook": self.notebook, "variant": variant,
            "profile": self.profile.name, "seed": seed, "purpose": purpose, "data": fingerprint(manifest),
            "config": config, "environment": environment(), **numbers, "chosen_on": "val",
            "predictions": {"path": path, "sha256": hashlib.sha256(compressed).hexdigest()}, "figures": [], **extra,
        }
        record["sha256"] = _sha256(json.loads(json.dumps(record, allow_nan=False)))
        write_atomic(self.results / "records" / f"{run_id}.json", json.dumps(record, indent=1) + "\n")
        return record

    def records(self):
        """Return every finished record of this runs folder, by run id."""
        paths = sorted((self.results / "records").glob("*.json"))
        return [read_record(path, root=self.results) for path in paths]

    def predictions(self, record):
        """Return the predictions table of `record`."""
        return read_predictions(self.results / record["predictions"]["path"])

    def save_figure(self, figure, name, *, pixels=False):
        """Write `figure` as `<notebook>__<name>.png` and return its path.

        A figure that shows pixels of real X-rays goes to a folder that `make publish` never copies.
        """
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
        figure.set_layout_engine("none")  # a notebook draws it once more, and need not find its layout again
        folder = self.directory / "figures" / ("private" if pixels and not self.synthetic else "")
        path = folder / f"{self.notebook}__{name}.png"
        write_atomic(path, buffer.getvalue())
        return path

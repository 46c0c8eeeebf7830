"""How fast a set is searched for copies, and how many of the pairs are wrong: `cxr.audit` against imagededup.

Both sides read the same files, as they are and then as JPEGs of the size that the Kermany set is published in
(1328 x 971 on average): enlarged and with film grain, so that they are as large on disk too. Ours is the whole audit,
with empty caches: copies by bytes and by pixels, near duplicates, splits, patients and shortcuts. Theirs is the
perceptual hash alone, with imagededup's own number of processes and its default distance of 10, and with distance 0.
Both take turns, and the median of the turns' ratios counts; before each the files are brought into the page cache, or
whichever comes after a pause would pay for the disk. A pair is false when it joins films of different patients whose
pixels differ. imagededup is no dependency of the lab; it brings torch and torchvision, which its hash does not use.

    pip install imagededup
    python benchmarks/audit.py [FOLDER]     # a set of images, whose result is kept; without it, phantoms with copies
"""

import argparse
import concurrent.futures
import itertools
import json
import os
import pathlib
import shutil
import statistics
import sys
import tempfile
import time
import unittest.mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import cv2
import numpy as np
from decode import machine

from cxr import audit, data, decode, phantom, records

RESULT = pathlib.Path(__file__).parent / "results" / "audit.json"
PUBLISHED = 1328, 971  # width and height of a film of the Kermany set, on average


def enlarge(manifest, folder):
    """Write the films of a manifest as JPEGs of `PUBLISHED` size; copies by pixels stay copies."""
    def one(row):
        image = decode.decode(pathlib.Path(row.path).read_bytes())
        large = cv2.resize(image, PUBLISHED, interpolation=cv2.INTER_CUBIC).astype("float32")
        grain = np.random.default_rng(int(row.pixel_sha256[:8], 16)).standard_normal(large.shape, dtype="float32")
        large += 6 * cv2.GaussianBlur(grain, (0, 0), 0.8)
        path = folder / pathlib.Path(row.image_id).with_suffix(".jpeg")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cv2.imencode(".jpeg", large.clip(0, 255).astype("uint8"), [cv2.IMWRITE_JPEG_QUALITY, 90])[1])

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, manifest.itertuples()))
    os.sync()  # or whichever side is first pays for writing them to the disk


def read(folder):
    """Bring the files into the page cache."""
    for path in filter(pathlib.Path.is_file, folder.rglob("*")):
        path.read_bytes()


def ours(folder):
    """Return the seconds of an audit and the pairs that it found, as sets of two image ids."""
    read(folder)
    with tempfile.TemporaryDirectory() as cache:
        start = time.perf_counter()
        manifest = data.load_manifest(folder, cache_dir=cache)
        near = audit.audit(manifest, cache_dir=cache)["near_duplicates"]["pairs"]
        seconds = time.perf_counter() - start
    pictures = manifest.groupby("pixel_sha256")["image_id"]
    exact = (pair for _, group in pictures for pair in itertools.combinations(group, 2))
    return {"audit": (seconds, {frozenset(pair) for pair in exact} | {frozenset(pair[:2]) for pair in near})}


def without_torchvision():
    """Let imagededup be imported where torchvision cannot: its wheel asks for CUDA, torch's for processors has none."""
    try:
        import torchvision  # noqa: F401  its neural hashes use it, the perceptual one does not
    except (ImportError, RuntimeError):
        for name in ("", ".models", ".models.vision_transformer", ".transforms"):
            sys.modules[f"torchvision{name}"] = unittest.mock.MagicMock()


def theirs(folder):
    """Return of each distance the seconds of imagededup's perceptual hash and its pairs, as sets of two paths."""
    without_torchvision()
    from imagededup.methods import PHash

    read(folder)
    start = time.perf_counter()
    hasher = PHash(verbose=False)
    codes = hasher.encode_images(image_dir=str(folder), recursive=True)
    encoded, sides = time.perf_counter() - start, {}
    for distance in (10, 0):
        start = time.perf_counter()
        found = hasher.find_duplicates(encoding_map=codes, max_distance_threshold=distance)
        sides[f"imagededup, distance {distance}"] = (
            encoded + time.perf_counter() - start,
            {frozenset((one, other)) for one, others in found.items() for other in others})
    return sides


def compare(folder, temporary, turns):
    """Return both sides of one folder with their median seconds over the turns, and the median ratio of a turn."""
    manifest = data.load_manifest(folder, cache_dir=temporary / "facts")
    patient, pixels = (dict(zip(manifest["image_id"], manifest[name], strict=True))
                       for name in ("patient_id", "pixel_sha256"))
    path_to_id = {os.path.relpath(path, folder): image
                  for path, image in zip(manifest["path"], manifest["image_id"], strict=True)}
    seen = [ours(folder) | theirs(folder) for _ in range(turns)]
    found = {}
    for name, (_, pairs) in seen[0].items():
        pairs = {frozenset(path_to_id.get(each, each) for each in pair) for pair in pairs}
        false = sum(min(len({known[image] for image in pair}) for known in (patient, pixels)) > 1 for pair in pairs)
        found[name] = {"seconds": round(statistics.median(turn[name][0] for turn in seen), 2),
                       "turns": [round(turn[name][0], 2) for turn in seen], "pairs": len(pairs), "false_pairs": false}
    ratios = [turn["imagededup, distance 10"][0] / turn["audit"][0] for turn in seen]
    return {"sides": found, "times_as_fast": round(statistics.median(ratios), 2)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=pathlib.Path)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        temporary = pathlib.Path(temporary)
        folder = options.folder or temporary / "phantoms"
        if options.folder is None:
            phantom.write(folder)
            shutil.rmtree(folder / "masks")  # they lie beside the films, and imagededup would hash them too
        manifest = data.load_manifest(folder, cache_dir=temporary / "facts")
        result = {"source": manifest.attrs["source"], "images": len(manifest),
                  **compare(folder, temporary, options.turns)}
        enlarge(manifest, temporary / "large")
        result |= {"enlarged": compare(temporary / "large", temporary, options.turns), "machine": machine()}
    if options.folder:
        records.write_atomic(RESULT, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

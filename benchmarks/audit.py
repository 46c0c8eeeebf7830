"""How fast a set is searched for copies, and how many of the pairs are wrong: `cxr.audit` against imagededup.

Both sides read the same files from disk. Ours is the whole audit, with empty caches: copies by bytes and by pixels,
near duplicates, splits, patients and shortcuts. Theirs is the perceptual hash alone, with imagededup's own number of
processes and its default distance of 10, and with distance 0. A pair is false when it joins films of different
patients whose pixels differ. imagededup is no dependency of the lab; it brings torch and torchvision, which its hash
does not use.

    pip install imagededup
    python benchmarks/audit.py [FOLDER]     # a set of images, whose result is kept; without it, phantoms with copies
"""

import argparse
import itertools
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from decode import machine

from cxr import audit, data, dedup, phantom, records

RESULT = pathlib.Path(__file__).parent / "results" / "audit.json"


def ours(folder, cache):
    """Return the seconds of an audit and the pairs that it found, as sets of two image ids."""
    start = time.perf_counter()
    manifest = data.load_manifest(folder, cache_dir=cache)
    near = audit.audit(manifest, cache_dir=cache)["near_duplicates"]["pairs"]
    seconds = time.perf_counter() - start
    exact = (pair for group in dedup.exact_groups(manifest) for pair in itertools.combinations(group, 2))
    return seconds, {frozenset(pair) for pair in exact} | {frozenset(pair[:2]) for pair in near}


def theirs(folder, distances):
    """Return of each distance the seconds of imagededup's perceptual hash and its pairs, as sets of two paths."""
    from imagededup.methods import PHash

    start = time.perf_counter()
    hasher = PHash(verbose=False)
    codes = hasher.encode_images(image_dir=str(folder), recursive=True)
    encoded = time.perf_counter() - start
    sides = {}
    for distance in distances:
        start = time.perf_counter()
        found = hasher.find_duplicates(encoding_map=codes, max_distance_threshold=distance)
        sides[distance] = (encoded + time.perf_counter() - start,
                           {frozenset((one, other)) for one, others in found.items() for other in others})
    return sides


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=pathlib.Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or pathlib.Path(temporary) / "phantoms"
        if options.folder is None:
            phantom.write(folder)
            shutil.rmtree(folder / "masks")  # they lie beside the films, and imagededup would hash them too
        manifest = data.load_manifest(folder, cache_dir=pathlib.Path(temporary) / "facts")
        patient, pixels = (dict(zip(manifest["image_id"], manifest[name], strict=True))
                           for name in ("patient_id", "pixel_sha256"))
        path_to_id = {os.path.relpath(path, folder): image
                      for path, image in zip(manifest["path"], manifest["image_id"], strict=True)}
        sides = {"audit": ours(folder, pathlib.Path(temporary) / "cache")}
        for distance, (seconds, pairs) in theirs(folder, (10, 0)).items():
            sides[f"imagededup, distance {distance}"] = seconds, {
                frozenset(path_to_id[path] for path in pair) for pair in pairs}
    found = {name: {"seconds": round(seconds, 2), "pairs": len(pairs),
                    "false_pairs": sum(min(len({known[image] for image in pair}) for known in (patient, pixels)) > 1
                                    for pair in pairs)}
             for name, (seconds, pairs) in sides.items()}
    ratio = found["imagededup, distance 10"]["seconds"] / found["audit"]["seconds"]
    result = {"source": manifest.attrs["source"], "images": len(manifest), "sides": found,
              "times_as_fast": round(ratio, 2), "machine": machine()}
    if options.folder:
        records.write_atomic(RESULT, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

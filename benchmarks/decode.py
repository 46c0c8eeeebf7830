"""How fast megapixel JPEGs become arrays: `cxr.data` against `keras.utils.image_dataset_from_directory`.

All ways turn the same grey JPEGs into images of 180 px, in one run and in turns; the median turn counts, on the clock
and in seconds of all processors together. The files are phantoms enlarged to 1500 x 1200 with film grain, at 1.3 bits a
pixel as in the originals of the real set. Keras runs with one channel, which is like for like, and with its default of
three, which is what the studies did. *Decode* is the first `load_images`, *cached* a later one. *Scan* and *scan again*
are `load_manifest`, which hashes every file each time and measures it once for the audit; Keras has no counterpart.

Of the 4 ms that a file takes here, 3 are the entropy decoding of the JPEG, which no decoder can skip. So the gain of
decoding at a quarter is bounded; the clock also depends on how soon `tf.data`, which tunes itself, uses all cores.

    python benchmarks/decode.py [--images 150] [--size 180] [--turns 9]
"""

import argparse
import json
import os
import pathlib
import platform
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import cv2
import keras
import numpy as np

from cxr import data, phantom, records

RESULT = pathlib.Path(__file__).parent / "results" / "decode.json"
WIDTH, HEIGHT, GRAIN = 1500, 1200, 3.4


def write_images(folder, count):
    rng, films = np.random.default_rng(0), [phantom.render(seed, "normal", size=512).image for seed in range(8)]
    for number in range(count):
        image = cv2.resize(films[number % len(films)], (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
        image = np.clip(image + rng.normal(0, GRAIN, image.shape), 0, 255).astype(np.uint8)
        path = folder / "train" / ("NORMAL", "PNEUMONIA")[number % 2] / f"{number:04d}.jpeg"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), image, [cv2.IMWRITE_JPEG_QUALITY, 90])
    return sum(path.stat().st_size for path in folder.rglob("*.jpeg")) * 8 / (count * WIDTH * HEIGHT)


def with_keras(folder, size, color_mode):
    batches = keras.utils.image_dataset_from_directory(folder / "train", color_mode=color_mode, shuffle=False,
                                                       verbose=False, image_size=(size, size), batch_size=32)
    return sum(len(images) for images, _ in batches)


def copied(manifest, size, cache):
    return np.array(data.load_images(manifest, size, cache_dir=cache))  # a memory map alone would read nothing


def timed(function, *arguments, **options):
    """Return what the function gave, and its seconds on the clock and on all processors together."""
    clock, processor = time.perf_counter(), time.process_time()
    value = function(*arguments, **options)
    return value, time.perf_counter() - clock, time.process_time() - processor


def measure(folder, size, turns):
    """Return the median seconds (clock, processor) of each way over the turns."""
    cache = folder.parent / "cache"
    seen = {name: [] for name in ("keras grey", "keras rgb", "scan", "decode", "scan again", "cached")}
    with_keras(folder, 32, "rgb")  # neither side pays for start-up or a cold disk
    for _ in range(turns):
        for path in cache.glob("*"):
            path.unlink()
        for name, mode in (("keras grey", "grayscale"), ("keras rgb", "rgb")):
            count, *spent = timed(with_keras, folder, size, mode)
            seen[name].append(spent)
        manifest, *spent = timed(data.load_manifest, folder, cache_dir=cache)
        seen["scan"].append(spent)
        images, *spent = timed(data.load_images, manifest, size, cache_dir=cache)
        seen["decode"].append(spent)
        _, *spent = timed(data.load_manifest, folder, cache_dir=cache)
        seen["scan again"].append(spent)
        again, *spent = timed(copied, manifest, size, cache)
        seen["cached"].append(spent)
        assert count == len(images) == len(again) == len(manifest), "both sides must have read every file"
    return {name: np.median(spent, axis=0).tolist() for name, spent in seen.items()}


def machine():
    info = pathlib.Path("/proc/cpuinfo")
    models = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    cpu = models[0].partition(":")[2].strip() if models else platform.processor()
    return {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version(), "keras": keras.__version__,
            "backend": keras.backend.backend(), "opencv": cv2.__version__, "numpy": np.__version__}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("images", 150), ("size", 180), ("turns", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary) / "set"
        bits = write_images(folder, options.images)
        seconds = measure(folder, options.size, options.turns)
    faster = {name: {mine: round(seconds[name][0] / seconds[mine][0], 2) for mine in ("decode", "cached")}
              for name in ("keras grey", "keras rgb")}  # fmt: skip
    result = {"images": options.images, "pixels": [HEIGHT, WIDTH], "bits_per_pixel": round(bits, 2),
              "size": options.size,
              "seconds": {name: round(clock, 4) for name, (clock, _) in seconds.items()},
              "processor_seconds": {name: round(spent, 4) for name, (_, spent) in seconds.items()},
              "times_as_fast_as": faster, "turns": options.turns, "machine": machine()}  # fmt: skip
    records.write_atomic(RESULT, json.dumps(result, indent=1) + "\n")
    print(f"{options.images} JPEGs of {WIDTH} x {HEIGHT}, {bits:.2f} bits a pixel, to {options.size} px; "
          f"{result['machine']['cpu']}, {os.cpu_count()} cores")
    print(f"{'':<12}{'clock s':>10}{'processor s':>14}")
    for name, (clock, spent) in seconds.items():
        print(f"{name:<12}{clock:>10.3f}{spent:>14.3f}")
    for name, ratios in faster.items():
        print(f"times as fast as {name}: first pass {ratios['decode']:.2f}, cached {ratios['cached']:.0f}")


if __name__ == "__main__":
    main()

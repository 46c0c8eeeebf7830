"""What larger sets would take, and the work of the full profile: tables of docs/scaling.md from committed measurements.

Rates come from the other benchmarks and from the `seconds` of the published records (their median seed). What neither
holds is measured here in seconds of processors, which other processes on the machine hardly change: the search for near
duplicates, PNG files, a step of ResNet18, and the arithmetic of each network. What a step costs besides arithmetic is
measured by `steps.py`.

    python benchmarks/scaling.py [--films 100] [--steps 2]     # measures, then writes the tables
    python benchmarks/scaling.py --tables                      # only writes them
"""

import argparse
import json
import math
import os
import pathlib
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RESULTS, DOC = ROOT / "benchmarks" / "results", ROOT / "docs" / "scaling.md"
BEGIN, END = "<!-- scaling:begin -->", "<!-- scaling:end -->"

# What the sets hold, as their owners state it. The mean area of a MIMIC film is an assumption (2544 × 3056).
SETS = {"NIH ChestX-ray14": {"images": 112_120, "megapixels": 1.05, "gigabytes": 42, "suffix": "png"},
        "MIMIC-CXR-JPG": {"images": 377_110, "megapixels": 7.8, "gigabytes": 558, "suffix": "jpeg"}}
VALIDATION, SHIFTED = 0.12, 3  # share of train, and shifted copies of each, as in the protocol
HEADLINE, SEEDS, EPOCHS = "mobilenet_v2 full with aspect jitter, 16 epochs", 5, 16

# Assumptions, not measurements.
CORES, CORE_HOUR, GPU_HOUR, GIGABYTE_MONTH = 32, 0.05, 4.00, 0.10  # of a rented machine; US dollars
PEAK, SHARE = 989e12, 0.10  # dense bfloat16 FLOP/s of an H200 by its data sheet, and what small networks get of it
STEP = 0.004  # seconds that a card takes for a step however small; what the host takes for one is measured

# (notebook, network, px, epochs, images an epoch, batch, runs, compilations) of the full profile on one GPU; see the
# notebooks. Runs that differ in seed, data, mixing or length alone share a compiled step (`device.compiled_once`). A
# "head" is all that is trained on stored features.
WORK = [("02", "seed_cnn", 180, 10, 4186, 16, 5, 1), ("02", "lab_cnn", 96, 12, 4580, 32, 5, 1),
        ("03", "seed_cnn", 180, 10, 4186, 16, 5, 1), ("03", "lab_cnn", 48, 6, 4580, 32, 51, 17),
        ("03", "lab_cnn", 96, 20, 4580, 32, 5, 1), ("04", "resnet18", 180, 10, 4186, 16, 3, 1),
        ("04", "resnet18", 180, 12, 4580, 32, 3, 1), ("05", "head", 224, 30, 9160, 32, 5, 1),
        ("05", "mobilenet_v2", 224, 8, 9160, 32, 5, 1), ("05", "mobilenet_v2", 160, 8, 4580, 32, 10, 2),
        ("05", "mobilenet_v2", 160, 16, 4580, 32, 5, 1), ("05", "head", 224, 10, 4580, 64, 3, 1),
        ("05", "mobilenet_v2", 224, 15, 4580, 64, 3, 1), ("05", "mobilenet_v2", 224, 20, 4580, 64, 3, 1),
        ("05", "head", 224, 30, 4580, 64, 8, 8),
        *[("05", name, 224, 4, 4580, 64, 5, 5) for name in ("efficientnet_b0", "densenet_121", "convnext_tiny",
                                                            "resnet_50")],
        ("06", "lab_cnn", 48, 6, 4580, 32, 51, 1), ("07", "s4_cnn", 64, 6, 1700, 64, 85, 3),
        ("07", "seed_dcgan", 64, 30, 600, 64, 1, 1), ("07", "lab_dcgan", 64, 100, 600, 64, 7, 1),
        ("08", "seed_autoencoder", 150, 10, 1190, 32, 1, 1), ("08", "autoencoder", 64, 20, 1190, 32, 24, 7),
        ("08", "lab_cnn", 64, 12, 4760, 32, 6, 2), ("08", "segmenter", 64, 20, 2400, 32, 7, 3)]


def flops(model):
    """Return the multiplications and additions of one image's forward pass, of all layers that multiply matrices."""
    from keras import layers

    total = 0
    for layer in model.layers:
        kind = getattr(layer, "layer", layer)  # inside spectral normalisation
        if hasattr(layer, "layers"):
            total += flops(layer)
        elif isinstance(kind, (layers.Conv2D, layers.DepthwiseConv2D, layers.SeparableConv2D, layers.Conv2DTranspose,
                               layers.Dense)):
            place = layer.input if isinstance(kind, layers.Conv2DTranspose) else layer.output
            weights = sum(math.prod(weight.shape) for weight in kind.weights if len(weight.shape) > 1)
            total += 2 * math.prod(place.shape[1:-1]) * weights
    return total


def networks():
    """Yield `(name, px, network)` for each network of `WORK`."""
    import keras

    from cxr import autoencoder, gan, models, transfer

    for name, size in sorted({(row[1], row[2]) for row in WORK}):
        if name in transfer.BACKBONES:
            function, options, *_ = transfer.BACKBONES[name]
            yield name, size, [getattr(keras.applications, function)(weights=None, input_shape=(size, size, 3),
                                                                     include_top=False, **options)]
        elif name.endswith("dcgan"):
            kind = name.partition("_")[0]
            yield name, size, [getattr(gan, f"{kind}_{part}")(size) for part in ("generator", "discriminator")]
        elif name == "head":
            frozen = transfer.build("mobilenet_v2", "frozen", size, weights=None)
            yield name, size, [transfer.split(frozen, "frozen")[1]]
        else:
            yield name, size, [getattr(autoencoder if hasattr(autoencoder, name) else models, name)(size)]


def _processor(function, *arguments):
    start = time.process_time()
    function(*arguments)
    return time.process_time() - start


def measure(films, steps):
    """Return what no other benchmark holds."""
    import cv2
    import keras
    import numpy as np
    from decode import GRAIN, machine

    from cxr import decode, dedup, fitting, models, phantom

    rng = np.random.default_rng(0)
    images = np.stack([phantom.render(seed, "normal", size=224).image for seed in range(films)])
    vectors = rng.normal(size=(4000, 1024)).astype("float32")
    each = np.arange(len(vectors))  # all seek, and none is known to be a copy
    neighbours = _processor(dedup._neighbours, vectors / np.linalg.norm(vectors, axis=1, keepdims=True), each, each)
    found = {"near_per_image": _processor(dedup.near_pairs, images) / films,
             "near_per_pair": neighbours / len(vectors) ** 2}
    large = [cv2.resize(image, (1024, 1024)) + rng.normal(0, GRAIN, (1024, 1024)) for image in images[:20]]
    files = [cv2.imencode(".png", np.clip(image, 0, 255).astype("uint8"))[1].tobytes() for image in large]
    found["png_per_image"] = _processor(lambda: [decode.facts(file) for file in files]) / len(files)
    counts = {}
    for name, size, parts in networks():
        counts[f"{name} {size}"] = sum(map(flops, parts))
        keras.utils.clear_session()
    batches = fitting.Batches(rng.integers(0, 256, (16 * steps, 180, 180)).astype("uint8"), np.arange(16 * steps) % 2,
                              16, seed=0)
    network = models.resnet18(180)
    network = fitting._compile(network, fitting.Recipe("resnet18", 180, 1), batches.labels, steps)
    network.train_on_batch(*batches[0])  # compiles
    found["resnet18_per_image"] = _processor(lambda: network.fit(batches, verbose=0, shuffle=False)) / (16 * steps)
    return {"films": films, "steps": steps, "processor_seconds": {key: float(f"{value:.4g}")
                                                                  for key, value in found.items()},
            "forward_flops": counts, "machine": machine()}


def published(variant):
    """Return the records of notebook 05 of a recipe on `chest_xray`, by seed."""
    records = [json.loads(path.read_text()) for path in (ROOT / "results/chest_xray/records").glob("05_*.json")]
    return sorted((record for record in records if record["variant"] == variant), key=lambda record: record["seed"])


def rates():
    """Return `[step, images a second on two cores, source]` at the size that each was measured at."""
    load = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in ("decode", "training", "scaling")}
    jpeg, spent = load["decode"], load["scaling"]["processor_seconds"]
    frozen, headline = published("mobilenet_v2 frozen"), published(HEADLINE)
    parts = headline[0]["data"]["num_images"]
    seen = 2 * parts["train"] + (1 + SHIFTED) * parts["val"]  # an augmented copy of each; validation, shifted too
    once = frozen[0]["seconds"]["train"] - statistics.median(record["seconds"]["train"] for record in frozen[1:])
    trained = EPOCHS * parts["train"] / statistics.median(record["seconds"]["train"] for record in headline)
    cnn = {name: row["keras_images_per_second"] for name, row in load["training"]["networks"].items()}
    return [
        ("scan", "hash, decode, measure a JPEG of 1.8 megapixels", jpeg["images"] / jpeg["seconds"]["scan"],
         "decode.json"),
        ("png", "the same, PNG of 1 megapixel", 2 / spent["png_per_image"], "scaling.json"),
        ("again", "hash it again at every later start", jpeg["images"] / jpeg["seconds"]["scan again"], "decode.json"),
        ("decode", "decode it at 180 px for the cache", jpeg["images"] / jpeg["seconds"]["decode"], "decode.json"),
        ("near", "near duplicates, the part that grows with the images", 2 / spent["near_per_image"], "scaling.json"),
        ("features", "MobileNetV2 at 224 px, features once", seen / once, "records of 05, frozen"),
        ("seed_cnn", "train study S2's CNN at 180 px", cnn["seed_cnn"], "training.json"),
        ("lab_cnn", "train the lab's CNN at 96 px", cnn["lab_cnn"], "training.json"),
        ("resnet18", "train ResNet18 at 180 px", 2 / spent["resnet18_per_image"], "scaling.json"),
        ("mobilenet_v2", "train MobileNetV2 at 160 px, all of it, with scoring", trained, "records of 05, headline"),
    ]


def hours(about, rate):
    """Return dict step → hours on two cores for a set."""
    n, area = about["images"], about["megapixels"] / 1.8
    png = rate["png"] / about["megapixels"] if about["suffix"] == "png" else None  # decoded whole, for the cache too
    scan = png or rate["scan"] / area
    pair = json.loads((RESULTS / "scaling.json").read_text())["processor_seconds"]["near_per_pair"]
    train = n * (1 - VALIDATION)
    return {"scan (once)": n / scan / 3600,
            "decode for the cache (once a size)": n / (png or rate["decode"] / area) / 3600,
            "near duplicates (once)": (n / rate["near"] + n * n * pair / 2) / 3600,
            "MobileNetV2 features, 224 px (once)": n * (1 + SHIFTED * VALIDATION) / rate["features"] / 3600,
            **{f"an epoch of {name}": train / rate[key] / 3600 for key, name in (
                ("lab_cnn", "the lab's CNN, 96 px"), ("seed_cnn", "study S2's CNN, 180 px"),
                ("mobilenet_v2", "MobileNetV2, 160 px"), ("resnet18", "ResNet18, 180 px"))},
            f"MobileNetV2, {EPOCHS} epochs, {SEEDS} seeds": SEEDS * EPOCHS * train / rate["mobilenet_v2"] / 3600}


def needs(about, spent):
    """Return dict what → text: memory, disk and money of a set at 224 px."""
    n, film = about["images"], 224 * 224
    ram = n * film * (1 + SHIFTED * VALIDATION)  # train, validation and its shifted copies are held; the rest is mapped
    near = n * (3 * 4 * 32 * 32 + 2 * 8 * 32 * 17)  # details, a stretched copy as it is and normed; two spectra
    cache, features = n * film, n * (1 + SHIFTED * VALIDATION) * 1280 * 2
    forward = json.loads((RESULTS / "scaling.json").read_text())["forward_flops"]["mobilenet_v2 160"]
    total = 3 * forward * n * (1 - VALIDATION) * EPOCHS * SEEDS
    steps = n * (1 - VALIDATION) / 32 * EPOCHS * SEEDS
    gpu = max(total / (PEAK * SHARE), steps * STEP) / 3600
    study = sum(value for name, value in spent.items() if "epoch of" not in name and "features" not in name)
    storage = about["gigabytes"] + (cache + features) / 1e9
    return {"memory to train at 224 px, GB": f"{ram / 1e9:.0f}", "memory for near duplicates, GB": f"{near / 1e9:.0f}",
            "disk: originals, GB": f"{about['gigabytes']}", "disk: decoded at 224 px, GB": f"{cache / 1e9:.1f}",
            "disk: stored features, GB": f"{features / 1e9:.1f}",
            "audit and headline study, hours on two cores": f"{study:.0f}",
            f"the same on {CORES} cores, if it scaled, hours": f"{study * 2 / CORES:.0f}",
            "the same, $": f"{2 * study * CORE_HOUR:.0f}",
            "headline training on one H200-class GPU, hours (estimate)": f"{gpu:.1f}",
            "the same, $ (estimate)": f"{gpu * GPU_HOUR:.0f}",
            "storage for a month, $": f"{storage * GIGABYTE_MONTH:.0f}"}


def work():
    """Return rows of the full profile's work: notebook, network, px, runs, compilations, steps, image passes, FLOP."""
    forward = json.loads((RESULTS / "scaling.json").read_text())["forward_flops"]
    return [(notebook, name, size, runs, compilations, runs * epochs * -(-images // batch), runs * epochs * images,
             3 * runs * epochs * images * forward[f"{name} {size}"])
            for notebook, name, size, epochs, images, batch, runs, compilations in WORK]


def minutes(rows, measured):
    """Return what some rows of `work` would take on a GPU: dict part → minutes.

    Steps take `STEP` each, or their host's part where that is longer; `measured` is what `steps.py` found, by network.
    """
    spent = {"arithmetic": 0, "steps": 0, "of these by the host at least": 0, "compiling": 0}
    for _, name, size, _, compilations, steps, _, operations in rows:
        about = measured[f"{name} {size}"]
        host = about["host_milliseconds"] / 1e3
        for part, seconds in zip(spent, (operations / (PEAK * SHARE), steps * max(STEP, host), steps * host,
                                         compilations * about["compile_seconds"]), strict=True):
            spent[part] += seconds / 60
    return spent


def table(head, rows):
    """Return a markdown table whose first column is text and whose others are numbers."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def number(value):
    """Return three significant digits without an exponent."""
    if value < 0.001:
        return "< 0.001"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def tables():
    """Return the generated part of docs/scaling.md."""
    rate_rows, rows = rates(), work()
    rate = {key: value for key, _, value, _ in rate_rows}
    spent = {name: hours(about, rate) for name, about in SETS.items()}
    wanted = {name: needs(about, spent[name]) for name, about in SETS.items()}
    runs, compilations, steps, passes, total = (sum(row[place] for row in rows) for place in range(3, 8))
    measured = json.loads((RESULTS / "steps.json").read_text())["networks"]
    alone = {notebook: minutes([row for row in rows if row[0] == notebook], measured) for notebook, *_ in rows}
    alone = {notebook: spent["arithmetic"] + spent["steps"] + spent["compiling"] for notebook, spent in alone.items()}
    longest = max(alone, key=alone.get)
    first = next(iter(spent.values()))
    return "\n\n".join([
        "### Measured rates, images a second on two cores", table(
            ["step", "images a second", "from"], [(about, number(value), source)
                                                  for _, about, value, source in rate_rows]),
        "### Hours on two cores", table(["step", *SETS], [(step, *(number(spent[name][step]) for name in SETS))
                                                         for step in first]),
        "### Memory, disk, money", table(["what", *SETS], [(what, *(wanted[name][what] for name in SETS))
                                                          for what in next(iter(wanted.values()))]),
        "### The work of the full profile", table(
            ["notebook", "network", "runs", "compilations", "steps", "image passes", "PFLOP", "s to compile, measured",
             "ms of the host a step, measured"],
            [(notebook, f"{name}, {size} px", *rest, f"{steps:,}", f"{passes:,}", number(total / 1e15),
              *(number(value) for value in measured[f"{name} {size}"].values()))
             for notebook, name, size, *rest, steps, passes, total in rows]
            + [("all", "", runs, compilations, f"{steps:,}", f"{passes:,}", number(total / 1e15), "", "")]),
        "**Estimate, not measured on a card**, for one H200-class GPU, one run after another: " + ", ".join(
            f"{name} {value:.0f} min" for name, value in minutes(rows, measured).items())
        + f". Side by side, the longest notebook, {longest}, takes {alone[longest]:.0f} min of that."])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("films", 100), ("steps", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tables", action="store_true", help="write the tables from committed measurements only")
    options = parser.parse_args()
    from cxr import records

    if not options.tables:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        found = measure(options.films, options.steps)
        records.write_atomic(RESULTS / "scaling.json", json.dumps(found, indent=1) + "\n")
    before, _, rest = DOC.read_text().partition(BEGIN)
    records.write_atomic(DOC, f"{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.partition(END)[2]}")
    print(tables())


if __name__ == "__main__":
    main()

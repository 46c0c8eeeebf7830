"""Profiles, and the one call that opens a notebook: `run = config.start(…)`."""

import dataclasses
import pathlib
import random

from cxr import audit, records, splits
from cxr import data as loader
from cxr.sources import root


@dataclasses.dataclass(frozen=True)
class Profile:
    """How much of a recipe is run.

    A notebook states each recipe as published or as designed; the profile only caps it. So one notebook serves a
    one-minute smoke run and a full study, and the record says which values were in force.

    Attributes:
        name: `smoke` or `full`.
        num_seeds: repetitions of each configuration.
        num_grid_seeds: repetitions of each cell of a wide comparison (`NUM_SEEDS` overrides both).
        strict: whether a record made by other code is made again.
        max_image_size: largest image side in pixels, or `None`.
        max_epochs: largest number of epochs, or `None`.
        grid_share: part of both caps that a cell of a wide comparison gets.
        max_points: largest number of points of a sweep, or `None`.
        image_size, epochs: override of every recipe, or `None`.
    """

    name: str
    num_seeds: int
    num_grid_seeds: int
    strict: bool
    max_image_size: int | None = None
    max_epochs: int | None = None
    grid_share: float = 1.0
    max_points: int | None = None
    image_size: int | None = None
    epochs: int | None = None

    def cap(self, name, value, *, grid=False):
        """Return the recipe's `value` of `name` (`image_size` or `epochs`) as this profile runs it."""
        override, largest = getattr(self, name), getattr(self, f"max_{name}")
        return override or (min(value, int(largest * (self.grid_share if grid else 1))) if largest else value)


PROFILES = {
    "smoke": Profile("smoke", num_seeds=2, num_grid_seeds=1, strict=True, max_image_size=64, max_epochs=6,
                     grid_share=0.5, max_points=1),
    "full": Profile("full", num_seeds=5, num_grid_seeds=3, strict=False),
}


def run_directory(profile, source):
    """Return `runs/<profile>-<data>` for a profile name and a data argument as `make reproduce` takes it."""
    names = [pathlib.Path(part).name or part for part in str(source).rstrip("/").split(":")]
    return root() / "runs" / f"{profile}-{'+'.join(names)}"


def start(notebook, *, profile="smoke", data="phantom", seed=0, num_seeds=None, image_size=None, epochs=None,
          needs=None):
    """Seed what Keras draws its seeds from, resolve and split the data, and return the `records.Run` of this notebook.

    Near duplicates (`cxr.audit`) are films of one patient to the split, whatever they are called.

    Args:
        notebook: name without suffix; records and figures carry it.
        profile: `smoke` or `full`.
        data: `phantom`, `kaggle`, `pneumoniamnist`, a folder, or several joined with `:`.
        seed: first seed.
        num_seeds, image_size, epochs: overrides of the profile, `None` to keep it.
        needs: a class beside the usual two, `COVID19`; `phantom` is then the one that has it.

    Raises:
        ValueError: unknown profile, a number that is none, or data that cannot be used (the message says what to do).
    """
    if profile not in PROFILES:
        raise ValueError(f"PROFILE is {profile!r}; choose one of {', '.join(PROFILES)}.")
    for name, value, least in (("SEED", seed, 0), ("NUM_SEEDS", num_seeds, 1), ("IMAGE_SIZE", image_size, 8),
                               ("EPOCHS", epochs, 1)):
        if value is not None and not (isinstance(value, int) and value >= least):
            raise ValueError(f"{name} is {value!r}; expected a whole number from {least}.")
    chosen = dataclasses.replace(PROFILES[profile], image_size=image_size, epochs=epochs)
    random.seed(seed)
    cache = loader.cache_folder(root() / "runs" / "cache")
    parts = [str(data)] if pathlib.Path(data).exists() else str(data).split(":")
    # `make` names folders as seen from the repository, and notebooks run one below.
    parts = [str(root() / part) if "/" in part and (root() / part).exists() else part for part in parts]
    source = "phantom_covid" if needs and str(data) == "phantom" else ":".join(parts)
    # Of notebooks that start together one reads the images, and the others find in the cache what it has made of them.
    with records.alone(cache / "locks" / f"load-{records.canonical_sha256(source)[:12]}"):
        official = loader.load_manifest(source, cache_dir=cache)
        near = audit.near_duplicates(official, cache) or {"pairs": []}
    if needs and needs not in set(official["label"]):
        raise ValueError(f"{data} has no images of {needs}, which {notebook} needs. Join a folder that has, such as "
                         f"DATA={data}:path/to/{needs.lower()}.")
    one_film = splits.tie(official, [pair[:2] for pair in near["pairs"]])
    if official["split"].eq("test").any():
        manifest = splits.assign(one_film, seed=0)
    else:  # the test set that is drawn here is the official one from now on, with what it has in common with the rest
        manifest = splits.assign_pooled(one_film, seed=0)
        drawn = manifest[manifest["split"].eq("test")]
        test = one_film["patient_id"].isin(drawn["patient_id"]) | one_film["pixel_sha256"].isin(drawn["pixel_sha256"])
        official = official.assign(split=official["split"].mask(test & official["label"].ne(""), "test"))
    counts = [num_seeds or count for count in (chosen.num_seeds, chosen.num_grid_seeds)]
    run = records.Run(notebook, chosen, run_directory(profile, data), cache, official, manifest,
                      *(list(range(seed, seed + count)) for count in counts))
    run.set_aside_stale()
    return run

"""Patient keys, patient-grouped stratified splits, and what leaks between two splits.

The unit of splitting is the patient, never the image: two films of one chest are nearly the same picture.
"""

import hashlib
import json
import re

import numpy as np

_NAME = re.compile(r"person(?P<person>\d+)_(?P<cause>bacteria|virus|covid)|(?P<normal>(NORMAL2-)?IM-\d+)", re.IGNORECASE)
_ETIOLOGY = {"bacteria": "bacterial", "virus": "viral", "covid": "covid"}
_BY_LABEL = {"NORMAL": "normal", "COVID19": "covid"}


def patient_key(image_id, label=""):
    """Return `(patient_id, etiology)` as the file name tells them.

    Args:
        image_id: relative posix path; only its last part is looked at.
        label: class folder, used for the etiology where the name says nothing.

    Returns:
        `("bacterial/1000", "bacterial")` for `person1000_bacteria_2931.jpeg`, `("normal/NORMAL2-IM-0007", "normal")`;
        a name that tells no patient makes every file its own: `("file/<image_id>", …)`.

    Source: file naming of Kermany et al. 2018; 1,211 + 2,443 patients in train, 225 + 203 in test.
    """
    found = _NAME.match(image_id.rsplit("/", 1)[-1])
    by_label = _BY_LABEL.get(label, "unknown")
    if not found:
        return f"file/{image_id}", by_label
    if found["normal"]:
        return f"normal/{found['normal'].upper()}", by_label
    etiology = _ETIOLOGY[found["cause"].lower()]
    return f"{etiology}/{found['person']}", etiology


def number_key(patient_id):
    """Return the patient without the etiology (`bacterial/7` and `viral/7` → `person/7`): the stricter reading of a name."""
    return re.sub(r"^(bacterial|viral|covid)/", "person/", patient_id)


def assign(manifest, seed=0, val_fraction=0.12):
    """Return a copy of the manifest with `split` in `train|val|test|test_duplicate|dropped|pred`.

    Official `val` is pooled with `train`. Images with two labels are dropped whole; later copies are dropped from train
    (`dropped`) and set apart in test (`test_duplicate`); train images of a patient or picture that stands in test are
    dropped. Validation is drawn by patient, stratified by etiology, with a generator of its own.

    Args:
        manifest: as `data.load_manifest` returns it; sorted by `image_id`, the first of a group of copies stays.
        seed: of the draw; nothing global is touched.
        val_fraction: share of the remaining training images, in (0, 1).

    Raises:
        ValueError: the fraction is outside (0, 1), or a class has fewer than two patients to share out.
    """
    _check_fraction(val_fraction)
    frame = _mark_test(manifest)
    train = frame["split"].eq("train")
    test = frame["split"].isin(["test", "test_duplicate"])
    leaked = frame["patient_id"].isin(frame.loc[test, "patient_id"]) | frame["pixel_sha256"].isin(frame.loc[test, "pixel_sha256"])
    first = ~frame[train].duplicated("pixel_sha256").reindex(frame.index, fill_value=True)
    frame.loc[train & (leaked | ~first), "split"] = "dropped"
    pool = frame[frame["split"].eq("train")]
    few = pool.groupby("label")["patient_id"].nunique()
    if len(few) and few.min() < 2:
        raise ValueError(
            f"{frame.attrs.get('source', 'the set')}: class {few.idxmin()} has {few.min()} patient to train on; "
            "expected at least 2, one of them for validation. Add images of other patients."
        )
    frame.loc[pool.index[pool["patient_id"].isin(_draw_patients(pool, seed, val_fraction))], "split"] = "val"
    return frame


def _check_fraction(val_fraction):
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}; expected a share between 0 and 1, for example 0.12.")


def _mark_test(manifest):
    """Pool official val with train, drop pictures with two labels, and set copies within test apart."""
    frame = manifest.sort_values("image_id", ignore_index=True)
    frame["split"] = frame["split"].replace("val", "train")
    labelled = frame[frame["label"].ne("") & frame["split"].isin(["train", "test"])]
    conflict = frame["pixel_sha256"].isin(conflicts(labelled))
    frame.loc[conflict & frame.index.isin(labelled.index), "split"] = "dropped"
    test = frame[frame["split"].eq("test")]
    frame.loc[test.index[test.duplicated("pixel_sha256")], "split"] = "test_duplicate"
    return frame


def conflicts(manifest):
    """Return the `pixel_sha256` of pictures that carry two labels, as a list."""
    labels = manifest[manifest["label"].ne("")].groupby("pixel_sha256")["label"].nunique()
    return list(labels.index[labels > 1])


def _draw_patients(pool, seed, val_fraction):
    """Draw whole patients per etiology until the share is met; at least one, never all."""
    rng, chosen = np.random.default_rng(seed), []
    stratum = pool.groupby("patient_id")[["label", "etiology"]].first().agg("/".join, axis=1)
    size = pool.groupby("patient_id").size()
    for _, patients in sorted(stratum.groupby(stratum).groups.items()):
        order = rng.permutation(np.sort(np.asarray(patients, dtype=str)))
        total = size.loc[order].cumsum().to_numpy()
        count = int(np.argmin(np.abs(total - val_fraction * total[-1]))) + 1
        chosen.extend(order[: min(count, len(order) - 1)])
    return chosen


def assign_image_level(manifest, seed=8, val_fraction=0.2):
    """Return a copy split as the source studies did: images of train + val drawn at random, copies and all.

    It leaks on purpose, to show by how much. The test split is the one of `assign`.
    """
    _check_fraction(val_fraction)
    frame = _mark_test(manifest)
    pool = frame.index[frame["split"].eq("train")]
    frame.loc[np.random.default_rng(seed).permutation(pool)[: round(val_fraction * len(pool))], "split"] = "val"
    return frame


def leaks(manifest):
    """Return what two splits share: patients under both keys (train and test), and val or test images beside train.

    Returns:
        dict `{"by_etiology_and_number": int, "by_number": int, "val_beside_train": float, "test_beside_train": float}`;
        the last two are shares in [0, 1] of images whose patient also has an image in train (NaN without such images).
    """
    ids = {split: set(part) for split, part in manifest.groupby("split")["patient_id"]}
    train, test = ids.get("train", set()), ids.get("test", set()) | ids.get("test_duplicate", set())
    share = {
        f"{split}_beside_train": float(manifest.loc[manifest["split"].eq(split), "patient_id"].isin(train).mean())
        for split in ("val", "test")
    }
    by_number = {number_key(p) for p in train} & {number_key(p) for p in test}
    return {"by_etiology_and_number": len(train & test), "by_number": len(by_number), **share}


def split_sha256(manifest):
    """Return the SHA-256 (hex) of the sorted `[image_id, split]` pairs as compact JSON: the split's name in a record."""
    pairs = sorted(manifest[["image_id", "split"]].values.tolist())
    return hashlib.sha256(json.dumps(pairs, separators=(",", ":")).encode()).hexdigest()

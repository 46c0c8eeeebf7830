"""Patient keys, patient-grouped stratified splits, and what leaks between two splits.

The unit of splitting is the patient, never the image: two films of one chest are nearly the same picture.
"""

import re

import numpy as np

_NAME = re.compile(r"person(\d+)_(bacteria|virus)|((?:NORMAL2-)?IM-\d+)|covid-(\d+)-\d+\.|"
                   r"(normal|bacteria|virus)-(\d+)-\d+", re.IGNORECASE)
_BY_LABEL = {"NORMAL": "normal", "COVID19": "covid"}
_BY_NAME = {"bacteria": "bacterial", "virus": "viral", "normal": "normal"}


def patient_key(image_id, label=""):
    """Return `(patient_id, etiology)` as the file name tells them.

    Args:
        image_id: relative posix path; only its last part is looked at.
        label: class folder, for the etiology of names that do not tell it.

    Returns:
        `("bacterial/1000", "bacterial")` for `person1000_bacteria_2931.jpeg`, `("normal/NORMAL2-IM-0007", "normal")`.
        Where the name tells no patient, each file is its own: `("file/<image_id>", …)`.

    Source: file names of Kermany et al. 2018.
    """
    etiology = _BY_LABEL.get(label, "unknown")
    if not (found := _NAME.match(image_id.rpartition("/")[2])):
        return f"file/{image_id}", etiology
    number, cause, normal, covid, disease, numbered = found.groups()
    if cause := cause or disease:
        return f"{_BY_NAME[cause.lower()]}/{number or numbered}", _BY_NAME[cause.lower()]
    return f"normal/{normal.upper()}" if normal else f"covid/{covid}", etiology


def number_key(patient_id):
    """Return the patient without the etiology (`bacterial/7` → `person/7`), the stricter reading of a file name."""
    return re.sub("^(bacterial|viral)/", "person/", patient_id)


def assign(manifest, seed=0, val_fraction=0.12):
    """Return a copy of the manifest with `split` in `train|val|test|test_duplicate|dropped|pred`.

    Official `val` is pooled with `train`. Pictures with two labels are dropped whole. Later copies are dropped from
    train, and set apart in test; train images whose picture or patient stands in test are dropped (of a patient
    whose film stands in test under another's name, that film alone: tell by `tie` that the two are one). Validation is
    then drawn from train by patient, stratified by label and etiology.

    Args:
        manifest: as `data.load_manifest` returns it. The first of a group of copies, by `image_id`, stays.
        seed: of the draw; the order of the rows does not matter and no global state is touched.
        val_fraction: share of the images left in train, in (0, 1).

    Raises:
        ValueError: the fraction is outside (0, 1), or a class has fewer than two patients to share out.
    """
    frame = _mark_test(manifest, val_fraction)
    test, train = frame[frame["split"].isin(["test", "test_duplicate"])], frame["split"].eq("train")
    in_test = frame["patient_id"].isin(test["patient_id"]) | frame["pixel_sha256"].isin(test["pixel_sha256"])
    frame.loc[train & in_test, "split"] = "dropped"
    pool = frame[frame["split"].eq("train")]
    frame.loc[pool.index[pool.duplicated("pixel_sha256")], "split"] = "dropped"
    pool = frame[frame["split"].eq("train")]
    few = pool.groupby("label")["patient_id"].nunique().reindex(frame.loc[train, "label"].unique(), fill_value=0)
    if len(few) and few.min() < 2:
        raise ValueError(f"{frame.attrs.get('source', 'manifest')}: train has {few.min()} patient of {few.idxmin()}. "
                         "Expected at least 2 that are not in test, one of them for validation; add images of others.")
    frame.loc[pool.index[pool["patient_id"].isin(_draw_patients(pool, seed, val_fraction))], "split"] = "val"
    return frame


def assign_pooled(manifest, seed=0, test_fraction=0.2, val_fraction=0.12):
    """Return a copy in which test, too, is drawn by patient, for sets without a test folder of their own.

    Copies and pictures with two labels are dropped first. `test_fraction`: share of the images, in (0, 1); the other
    arguments and the errors are those of `assign`.
    """
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction is {test_fraction}; expected a share between 0 and 1, such as 0.2.")
    frame = manifest.sort_values("image_id", ignore_index=True)
    frame.loc[frame["label"].ne(""), "split"] = "train"
    pool = frame[frame["split"].eq("train") & ~frame["pixel_sha256"].isin(conflicts(frame))]
    pool = pool[~pool.duplicated("pixel_sha256")]
    frame.loc[pool.index[pool["patient_id"].isin(_draw_patients(pool, seed + 1, test_fraction))], "split"] = "test"
    return assign(frame, seed, val_fraction)


def tie(manifest, pairs):
    """Return a copy in which the patients of each pair of `image_id`s are one: two copies of a film are one chest."""
    frame = manifest.copy()
    patient = frame.set_index("image_id")["patient_id"]
    for first, second in pairs:
        patient[patient == patient[second]] = patient[first]
    return frame.assign(patient_id=patient.to_numpy())


def _mark_test(manifest, val_fraction):
    """Pool official val with train, drop pictures with two labels, and set copies within test apart."""
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}; expected a share between 0 and 1, such as 0.12.")
    frame = manifest.sort_values("image_id", ignore_index=True)
    frame["split"] = frame["split"].replace("val", "train")
    frame.loc[frame["pixel_sha256"].isin(conflicts(frame)) & frame["label"].ne(""), "split"] = "dropped"
    test = frame[frame["split"].eq("test")]
    frame.loc[test.index[test.duplicated("pixel_sha256")], "split"] = "test_duplicate"
    return frame


def conflicts(manifest):
    """Return the `pixel_sha256` of the pictures that carry two labels, as a list."""
    labels = manifest[manifest["label"].ne("")].groupby("pixel_sha256")["label"].nunique()
    return labels.index[labels > 1].tolist()


def _draw_patients(pool, seed, val_fraction):
    """Draw whole patients in each stratum until the share is met: at least one, never all."""
    rng, chosen = np.random.default_rng(seed), []
    patients = pool.groupby("patient_id")[["label", "etiology"]].first().assign(n=pool.groupby("patient_id").size())
    stratum = patients["label"] + "/" + patients["etiology"]
    lonely = stratum.groupby(stratum).transform("size") < 2  # lone patients of a label's etiologies make one stratum
    for _, part in patients.groupby(stratum.mask(lonely, patients["label"])):
        order = rng.permutation(len(part))
        total = part["n"].to_numpy()[order].cumsum()
        count = int(np.abs(total - val_fraction * total[-1]).argmin()) + 1
        chosen += part.index[order[:min(count, len(part) - 1)]].tolist()
    return chosen


def assign_image_level(manifest, seed=8, val_fraction=0.2):
    """Return a copy split as the source studies did: images of train and val drawn at random, copies and all.

    It leaks on purpose, to show by how much. The test split is that of `assign`.
    """
    frame = _mark_test(manifest, val_fraction)
    pool = np.random.default_rng(seed).permutation(frame.index[frame["split"].eq("train")])
    frame.loc[pool[:round(val_fraction * len(pool))], "split"] = "val"
    return frame


def leaks(manifest):
    """Return what two splits share.

    Returns:
        dict: `by_etiology_and_number` and `by_number`, patients that stand in train and in test under either key;
        `val_beside_train` and `test_beside_train`, shares in [0, 1] of images whose patient has an image in train too
        (NaN for an empty split).
    """
    names = ("train", "val", "test")  # and test_duplicate with test
    part = {name: manifest.loc[manifest["split"].str.startswith(name), "patient_id"] for name in names}
    train, test = set(part["train"]), set(part["test"])
    return {"by_etiology_and_number": len(train & test),
            "by_number": len(set(map(number_key, train)) & set(map(number_key, test))),
            "val_beside_train": float(part["val"].isin(train).mean()),
            "test_beside_train": float(part["test"].isin(train).mean())}

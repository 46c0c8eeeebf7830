"""What must be known of a set before a number from it is believed: copies, patients in two splits, shortcuts.

`python -m cxr audit SOURCE` prints `format_table`, and its exit status is `exit_code`. `chest_xray` as it comes gets 0:
its copies stand within train and within test, where `splits.assign` drops them, and nothing stands on both sides.
"""

import numpy as np
from sklearn import metrics

from cxr import data, decode, dedup, evaluate, records, splits

SHORTCUT = 0.7  # AUC, either way round, from which a score that looks at no anatomy earns a warning
DARK = 45  # mean grey level that every film of the published sets exceeds, of 255; 14 of 16 bits keep a quarter of it
TINY = 100  # images below which a validation split cannot rank models
FEWEST = {"train": 25, "test": evaluate.FEWEST}  # of a class: below it validation, drawn from train, has no interval


def audit(manifest, *, cache_dir=None):
    """Return what was found in a manifest as its folders stand, before any split of ours.

    Args:
        manifest: of `data.load_manifest`.
        cache_dir: as there; decoded images and the near duplicates are kept in it.

    Returns:
        JSON-able dict: `source, synthetic, root, ignored, counts`; `images` and `patients` by split; `classes` (of a
        split, images by label); `unreadable` (list of `image_id, path, reason`); `duplicates` (by split the redundant
        files after the first, then pictures that stand in several splits and pictures with two labels);
        `near_duplicates` (`pairs` as `[image_id, image_id, correlation]`, and how many join two splits, two patients or
        two labels; `too_small`, how many images below 112 px were not looked at; `None` where all are);
        `dark` (images that hardly use their grey levels); `nameless` (images whose name tells no patient);
        `patients_across_splits` (train and test, under both keys);
        `trivial_auc` (of a split, AUC against *not normal* by score); `checks` (dicts of `check`, `finding` and
        `verdict`: OK, WARN or FAIL).
    """
    labelled = manifest[manifest["label"].ne("")]
    found = {key: manifest.attrs[key] for key in ("source", "synthetic", "root", "ignored", "counts", "unreadable")}
    shared = splits.leaks(manifest)
    found |= {
        "images": _by_split(manifest, len),
        "classes": _by_split(labelled, lambda part: part["label"].value_counts().sort_index().to_dict()),
        "duplicates": _duplicates(manifest),
        "near_duplicates": near_duplicates(manifest, cache_dir),
        "dark": int(manifest["mean_grey"].lt(DARK).sum()),
        "nameless": int(manifest["patient_id"].str.startswith("file/").sum()),
        "patients": _by_split(manifest, lambda part: part["patient_id"].nunique()),
        "patients_across_splits": {key: shared[key] for key in ("by_etiology_and_number", "by_number")},
        "trivial_auc": _by_split(labelled, _trivial_auc),
    }
    return found | {"checks": [dict(zip(("check", "verdict", "finding"), row, strict=True)) for row in _checks(found)]}


def _by_split(manifest, function):
    parts = dict(list(manifest.groupby("split")))
    return {name: function(parts[name]) for name in ("train", "val", "test", "pred") if name in parts}


def _duplicates(manifest):
    judged = manifest[manifest["split"].ne("pred")]  # what is only predicted spoils no result
    splits_of_picture = judged.groupby("pixel_sha256")["split"].nunique()
    return {**_by_split(manifest, lambda part: int(part.duplicated("pixel_sha256").sum())),
            "across_splits": int(splits_of_picture.gt(1).sum()), "label_conflicts": len(splits.conflicts(manifest))}


def near_duplicates(manifest, cache_dir):
    """Return that entry of `audit`, kept in the cache under the content that it was found in."""
    counts_most = manifest.sort_values("split", key=lambda split: split.eq("pred"), kind="stable")  # what pred copies
    unique = counts_most.drop_duplicates("pixel_sha256").sort_index()
    too_small = unique[["height", "width"]].min(axis=1) < dedup.SIDE
    unique, too_small = unique[~too_small], int(too_small.sum())
    if not len(unique):
        return None
    key = records.canonical_sha256([decode.VERSION, dedup.VERSION, unique["pixel_sha256"].tolist()])[:24]
    path = data.cache_folder(cache_dir) / f"near-{key}.json"
    if (pairs := data.read_cached(path)) is None:
        pairs = dedup.near_pairs(_thumbnails(manifest, unique.index, cache_dir))
        data.write_cached(path, pairs)
    pairs = [pair for pair in pairs if not manifest.attrs["synthetic"] or pair[2] >= dedup.SAME_PHANTOM]
    i, j = np.array([pair[:2] for pair in pairs], int).reshape(-1, 2).T
    image, split, patient, label = (unique[name].to_numpy() for name in ("image_id", "split", "patient_id", "label"))
    apart = (split[i] != split[j]) & (split[i] != "pred") & (split[j] != "pred")
    return {"pairs": [[image[a], image[b], round(score, 3)] for a, b, score in pairs],
            "too_small": too_small, "across_splits": int(apart.sum()),
            "across_patients": int((patient[i] != patient[j]).sum()),
            "across_labels": int(((label[i] != label[j]) & (label[i] != "") & (label[j] != "")).sum())}


def _thumbnails(manifest, kept, cache_dir):
    """Return the thumbnails of the rows `kept`; each set's own were made when it was scanned."""
    films = {}
    for _, part in manifest.groupby("source"):
        films |= dict(zip(part.index, np.asarray(data.load_thumbnails(part, cache_dir=cache_dir)), strict=True))
    return [films[row] for row in kept]  # views of what is mapped: a large set need not fit into memory


def _trivial_auc(part):
    """Return the AUC of scores that look at no anatomy; empty where there are not two classes."""
    abnormal = part["label"].ne("NORMAL")
    if abnormal.nunique() < 2:
        return {}
    scores = part[["width", "height", "blur", "mean_grey"]].assign(aspect=part["width"] / part["height"])
    return {name: round(float(metrics.roc_auc_score(abnormal, scores[name])), 4) for name in scores}


def _checks(found):
    """Yield `(check, verdict, finding)`. FAIL is what makes a test result invalid."""
    def verdict(bad, what="WARN"):
        return what if bad else "OK"

    images, counts, copies, near = (found[key] for key in ("images", "counts", "duplicates", "near_duplicates"))
    bad = found["unreadable"]
    yield "readable files", verdict(bad), f"{sum(images.values()):,} read, {len(bad):,} not"
    if found["ignored"]:
        yield "outside the layout", "WARN", f"not used: {_listed(found['ignored'])}"
    if found["dark"]:
        yield ("dark images", "WARN", f"{found['dark']:,}, of a mean grey level below {DARK}: do the files use fewer "
                                      "bits than their format says? Save them stretched to all of them")
    if counts["expected"]:
        differ = counts["found"] != counts["expected"]
        yield "published counts", verdict(differ), f"expected {counts['expected']}" if differ else "as published"
    for name, classes in found["classes"].items():
        few = len(classes) > 1 and min(classes.values()) < FEWEST.get(name, 0)
        yield (f"classes in {name}", verdict(len(classes) < 2 or few),
               _listed(classes) + f"; {FEWEST.get(name)} of each are the least that notebooks can train on" * few)
    inside = {name: copies[name] for name in images}
    yield "copies within a split", verdict(sum(inside.values())), _listed(inside)
    yield "copies across splits", verdict(copies["across_splits"], "FAIL"), f"pictures: {copies['across_splits']}"
    conflicts = copies["label_conflicts"]
    yield "pictures with two labels", verdict(conflicts, "FAIL"), f"pictures: {conflicts}"
    if near is None:
        yield "near duplicates", "WARN", f"not looked for: all images are below {dedup.SIDE} px"
    else:
        worst = near["across_splits"] or near["across_labels"]
        yield ("near duplicates", "FAIL" if worst else verdict(near["pairs"] or near["too_small"]),
               f"pairs: {len(near['pairs'])}, across splits: {near['across_splits']}, "
               f"across patients: {near['across_patients']}, across labels: {near['across_labels']}"
               + f"; not looked at: {near['too_small']} below {dedup.SIDE} px" * bool(near["too_small"]))
    patients, numbers = found["patients_across_splits"].values()
    yield "patients in train and test", verdict(patients, "FAIL"), f"{patients} (of {_listed(found['patients'])})"
    yield "… by number alone", verdict(numbers), f"{numbers}"
    if found["nameless"]:
        yield ("names that tell the patient", "WARN",
               f"not of {found['nameless']:,} images; each of them counts as a patient of its own")
    yield from _shortcuts(found["trivial_auc"], verdict)
    if "val" in images:
        tiny = images["val"] < TINY
        yield "size of validation", verdict(tiny), f"{images['val']} images" + ", to be pooled with train" * tiny
    if "test" not in images:
        yield "test split", "WARN", "none"


def _shortcuts(trivial_auc, verdict):
    able = {split: scores for split, scores in trivial_auc.items() if scores and split in ("train", "test")}
    for name in next(iter(able.values()), {}):
        values = {split: scores[name] for split, scores in able.items()}
        strong = any(max(value, 1 - value) >= SHORTCUT for value in values.values())
        shown = ", ".join(f"{split} {value:.2f}" for split, value in values.items())
        yield f"shortcut: {name}", verdict(strong), f"AUC {shown}"


def _listed(counts):
    return ", ".join(f"{name} {n:,}" for name, n in counts.items())


def exit_code(found):
    """Return 1 if any check is FAIL, so that a result from these splits would be invalid, else 0, warnings or not."""
    return int(any(check["verdict"] == "FAIL" for check in found["checks"]))


def format_table(found):
    """Return the checks as text, one a line with its verdict first, then near duplicates and the files left out."""
    width = max(len(check["check"]) for check in found["checks"])
    lines = [f"{found['source']}{' (synthetic)' * found['synthetic']}: {found['root']}", ""]
    lines += [f"{check['verdict']:<5} {check['check']:<{width}}  {check['finding']}" for check in found["checks"]]
    pairs, bad = (found["near_duplicates"] or {"pairs": []})["pairs"], found["unreadable"]
    if pairs:
        lines += ["", f"Near duplicates, best {min(20, len(pairs))} of {len(pairs)}:"]
        lines += [f"  {score:.2f}  {first}  {second}" for first, second, score in pairs[:20]]
    if bad:
        lines += ["", f"Files left out ({len(bad)}):", *(f"  {each['path']}: {each['reason']}" for each in bad)]
    result = "FAIL, a result from these splits is invalid" if exit_code(found) else "usable"
    warnings = sum(check["verdict"] == "WARN" for check in found["checks"])
    return "\n".join([*lines, "", f"Result: {result}; warnings: {warnings}"])

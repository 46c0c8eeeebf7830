"""What a reader must know of a set before believing a number from it: copies, patients in two splits, shortcuts.

`python -m cxr audit SOURCE` prints `format_table`; its exit status is `exit_code`. `chest_xray` as it comes gets 0: it has
copies within train and within test, which the split of this lab drops, and nothing that stands on both sides.
"""

import itertools

import numpy as np
from sklearn import metrics

from cxr import data, dedup, decode, records, splits

SHORTCUT = 0.7  # AUC, either way round, from which a score that looks at no anatomy is worth a warning
TINY = 100  # images below which a validation set cannot rank models
SMALLEST = 112  # native pixels below which the detail that tells films apart is gone


def audit(manifest, *, cache_dir=None):
    """Return what was found in a manifest as its folders stand, before any split of ours.

    Args:
        manifest: of `data.load_manifest`.
        cache_dir: as there; decoded images and near duplicates are kept in it.

    Returns:
        JSON-able dict: `source, synthetic, root`; `images` and `patients` by split; `classes` (split → label → images);
        `unreadable` (list of `image_id, path, reason`); `duplicates` (redundant files after the first by split, groups
        that stand in several splits, pictures with two labels); `near_duplicates` (`pairs` as `[image_id, image_id,
        correlation]`, and how many join two splits or two patients; `None` below 112 px); `patients_across_splits`
        (train and test, under both keys); `trivial_auc` (split → score → AUC against *not normal*); `checks`
        (`check, verdict, finding`), where the verdict is OK, WARN or FAIL.
    """
    labelled = manifest[manifest["label"].ne("")]
    shared = splits.leaks(manifest)
    by_split = manifest.groupby("split")
    found = {
        **{key: manifest.attrs[key] for key in ("source", "synthetic", "root", "unreadable", "ignored", "counts")},
        "images": by_split.size().to_dict(),
        "classes": {name: part["label"].value_counts().sort_index().to_dict() for name, part in labelled.groupby("split")},
        "duplicates": _duplicates(manifest),
        "near_duplicates": _near_duplicates(manifest, cache_dir),
        "patients": by_split["patient_id"].nunique().to_dict(),
        "patients_across_splits": {key: shared[key] for key in ("by_etiology_and_number", "by_number")},
        "trivial_auc": {name: _trivial_auc(part) for name, part in labelled.groupby("split")},
    }
    return found | {"checks": [dict(zip(("check", "verdict", "finding"), row, strict=True)) for row in _checks(found)]}


def _duplicates(manifest):
    groups = manifest.groupby("pixel_sha256")
    redundant = manifest[manifest.duplicated(["pixel_sha256", "split"])]
    return {**{name: int(redundant["split"].eq(name).sum()) for name in sorted(set(manifest["split"]))},
            "across_splits": int(groups["split"].nunique().gt(1).sum()), "label_conflicts": len(splits.conflicts(manifest))}


def _near_duplicates(manifest, cache_dir):
    """Return verified near duplicates; kept in the cache under the content that they were found in."""
    unique = manifest.drop_duplicates("pixel_sha256").reset_index(drop=True)
    if unique[["height", "width"]].to_numpy().min() < SMALLEST:
        return None
    key = records.canonical_sha256([decode.VERSION, dedup.VERSION, unique["pixel_sha256"].tolist()])[:24]
    path = data.cache_folder(cache_dir) / f"near-{key}.json"
    pairs = data.read_cached(path)
    if pairs is None:
        pairs = dedup.near_pairs(data.load_images(unique, 224, cache_dir=cache_dir))
        data.write_cached(path, pairs)
    i, j = np.array([pair[:2] for pair in pairs], int).reshape(-1, 2).T
    image, split, patient = (unique[name].to_numpy() for name in ("image_id", "split", "patient_id"))
    return {"pairs": [[str(image[a]), str(image[b]), round(score, 3)] for a, b, score in pairs],
            "across_splits": int((split[i] != split[j]).sum()), "across_patients": int((patient[i] != patient[j]).sum())}


def _trivial_auc(part):
    """Return the AUC of scores that look at no anatomy; empty where only one class is present."""
    abnormal = part["label"].ne("NORMAL")
    if abnormal.nunique() < 2:
        return {}
    scores = {"mean_grey": part["mean_grey"], "blur": part["blur"], "width": part["width"], "height": part["height"],
              "aspect": part["width"] / part["height"]}
    return {name: round(float(metrics.roc_auc_score(abnormal, score)), 4) for name, score in scores.items()}


def _checks(found):
    """Yield `(check, verdict, finding)`; FAIL is what invalidates a test result."""
    def verdict(bad, what="WARN"):
        return what if bad else "OK"

    copies, counts, images = found["duplicates"], found["counts"], found["images"]
    inside = {name: n for name, n in copies.items() if name not in ("across_splits", "label_conflicts")}
    yield "readable files", verdict(found["unreadable"]), f"{sum(images.values()):,} read, {len(found['unreadable']):,} not"
    if found["ignored"]:
        yield "outside the layout", "WARN", "not used: " + _listed(found["ignored"])
    if counts["expected"]:
        agree = counts["found"] == counts["expected"]
        yield "published counts", verdict(not agree), "as published" if agree else f"differ: expected {counts['expected']}"
    for name, classes in found["classes"].items():
        yield f"classes in {name}", verdict(len(classes) < 2), _listed(classes)
    yield "copies within a split", verdict(sum(inside.values())), _listed(inside)
    yield "copies across splits", verdict(copies["across_splits"], "FAIL"), f"{copies['across_splits']} pictures"
    yield "pictures with two labels", verdict(copies["label_conflicts"], "FAIL"), f"{copies['label_conflicts']} pictures"
    near = found["near_duplicates"]
    if near is None:
        yield "near duplicates", "WARN", f"not looked for: images below {SMALLEST} px"
    else:
        yield ("near duplicates", verdict(near["across_splits"], "FAIL") if near["across_splits"] else verdict(near["pairs"]),
               f"{len(near['pairs'])} pairs, {near['across_splits']} across splits, {near['across_patients']} across patients")
    both, number = found["patients_across_splits"].values()
    yield "patients in train and test", verdict(both, "FAIL"), f"{both} of {_listed(found['patients'])}"
    yield "… by number alone", verdict(number), f"{number} numbers stand in both, under other etiologies"
    for score in ("width", "height", "aspect", "blur", "mean_grey"):
        values = {name: aucs[score] for name, aucs in found["trivial_auc"].items() if aucs and name in ("train", "test")}
        strong = any(abs(value - 0.5) >= SHORTCUT - 0.5 for value in values.values())
        yield f"shortcut: {score}", verdict(strong), "AUC " + (", ".join(f"{name} {v:.2f}" for name, v in values.items()) or "–")
    if "val" in images:
        yield "size of validation", verdict(images["val"] < TINY), f"{images['val']} images" + "; pool it with train" * (images["val"] < TINY)
    if "test" not in images:
        yield "test split", "WARN", "none"


def _listed(counts):
    return ", ".join(f"{name} {n:,}" for name, n in counts.items()) or "none"


def exit_code(found):
    """Return 1 if any check is FAIL (a result from this set would be invalid), else 0; warnings do not count."""
    return int(any(check["verdict"] == "FAIL" for check in found["checks"]))


def format_table(found):
    """Return the checks as text, one a line with its verdict first, then every file that could not be used."""
    width = max(len(check["check"]) for check in found["checks"])
    lines = [f"{found['source']}{' (synthetic)' * found['synthetic']} · {found['root']}", ""]
    lines += [f"{check['verdict']:<5} {check['check']:<{width}}  {check['finding']}" for check in found["checks"]]
    near = (found["near_duplicates"] or {"pairs": []})["pairs"]
    lines += [f"\nNear duplicates ({len(near)}):"] * bool(near) + [f"  {a} ~ {b} ({score:.2f})" for a, b, score in itertools.islice(near, 20)]
    bad = found["unreadable"]
    lines += [f"\nFiles left out ({len(bad)}):"] * bool(bad) + [f"  {each['path']}: {each['reason']}" for each in bad]
    return "\n".join([*lines, "", "Result: " + ("FAIL, results from this split are invalid" if exit_code(found) else "usable")])

"""Comparison tables made from records and predictions alone; every number is recomputed before it is shown."""

import collections
import json
import pathlib

import numpy as np
import pandas as pd

from cxr import compare, evaluate, records, trust

FIELDS = {"schema", "run_id", "notebook", "variant", "profile", "seed", "purpose", "data", "config", "environment",
          "metrics", "thresholds", "predictions"}
ALPHA, MIN_SEEDS, TOLERANCE = 0.05, 3, 1e-6
PAINTED = "class brightness"  # variants whose validation images carry the label, so that nothing is chosen by them


def load(results_dir, *, notebooks=("",), intervals=True):
    """Return the records under `results_dir/records`, each with its predictions table as `record["frame"]`.

    Args:
        results_dir: folder with `records/` and `predictions/`.
        notebooks: how the names of the notebooks wanted begin, such as `("01", "02")`; all by default.
        intervals: whether the bootstrap intervals are recomputed too, about half a second a record.

    Raises:
        ValueError: no record; a field, the predictions or their hash is missing or wrong; a stored number differs from
            the recomputed one; or several data sources in one folder. The message names the file.
    """
    root = pathlib.Path(results_dir)
    paths = [path for path in sorted((root / "records").glob("*.json")) if path.name.startswith(tuple(notebooks))]
    if not paths:
        raise ValueError(f"{root / 'records'} holds no record: run the notebooks first (make reproduce).")
    loaded = [_load_one(path, root, intervals) for path in paths]
    if len(sources := {record["data"]["source"] for record in loaded}) > 1:
        raise ValueError(f"{root} mixes the data sources {sorted(sources)}: keep one folder for each.")
    return loaded


def _load_one(path, root, intervals):
    record = records.read_record(path, root=root)
    frame = records.read_predictions(root / record["predictions"]["path"])
    if missing := FIELDS - record.keys():
        raise ValueError(f"{path} lacks {sorted(missing)}: it is not a record of schema {records.SCHEMA}.")
    if record["schema"] != records.SCHEMA or record["run_id"] != path.stem:
        raise ValueError(f"{path} has schema {record['schema']} and run_id {record['run_id']}; "
                          f"expected {records.SCHEMA} and {path.stem}.")
    if record["purpose"] != "generate":
        _verify(record, frame, path, intervals)
    test = frame[frame["split"] == "test"].sort_values("image_id")
    return record | {"frame": frame, "group": record["run_id"].rsplit("-s", 1)[0], "num_test": len(test),
                     "test_sha256": records.canonical_sha256(test[["image_id", "y_true"]].values.tolist())}


def _verify(record, frame, path, intervals):
    """Recompute every number of a record from its predictions and compare."""
    blocks = evaluate.record_metrics(frame, purpose=record["purpose"], num_resamples=1000 * intervals)
    if "probes" in record:
        cut = record["thresholds"][record["threshold"]]
        blocks["probes"] = trust.measure(frame, cut, num_resamples=1000 * intervals)
    stored = {block: record.get(block, {}) for block in blocks}
    found, stored = (pd.json_normalize(block).iloc[0].to_dict() for block in (blocks, stored))
    for name in sorted(found.keys() | stored.keys()):
        pair = [np.nan if (value := side.get(name, "absent")) is None else value for side in (stored, found)]
        if not intervals and name.endswith((".low", ".high")):
            continue
        if "absent" in pair or not np.isclose(*pair, rtol=0, atol=TOLERANCE, equal_nan=True):
            raise ValueError(f"{path}: {name} is {pair[0]}, but its predictions give {pair[1]}.")


def by_group(loaded):
    """Return run group -> its records by seed; `<notebook>-<config8>` is one configuration."""
    groups = collections.defaultdict(list)
    for record in sorted(loaded, key=lambda record: (record["group"], record["seed"])):
        groups[record["group"]].append(record)
    return dict(groups)


def frames(runs):
    """Return the test rows of each run's predictions."""
    return [run["frame"][run["frame"]["split"] == "test"] for run in runs]


def threshold_of(record, threshold="sensitivity_95"):
    """Return the name of the threshold to report: `normal_95` of anomaly scores, else `threshold` if there is one."""
    order = "normal_95" if record["purpose"] == "anomaly" else threshold, "sensitivity_95", "half"
    return next(name for name in order if name in record["thresholds"])


def cohorts(loaded):
    """Return lists of records that share manifest and test set, the largest first: what may stand in one table.

    Records of probes are left out: they repeat the numbers of the runs that they probe.
    """
    found = collections.defaultdict(list)
    for record in loaded:
        if record["purpose"] != "generate" and "probes" not in record:
            found[record["data"]["manifest_sha256"], record["test_sha256"]].append(record)
    return sorted(found.values(), key=len, reverse=True)


def table(loaded, *, threshold="sensitivity_95"):
    """Return one row for each run group: means over seeds, and the interval of the seed-averaged score.

    Columns: `notebook, variant, purpose, split, seeds, auc, auc_sd, averaged, low, high` (AUC of the seed-averaged
    score with its patient-bootstrap interval), `accuracy_half, threshold, accuracy, sensitivity, specificity, val_auc,
    shifted_auc, gap` (validation minus test AUC), `ece`; the index is the run group. Absent numbers are NaN.

    Raises:
        ValueError: the records do not share data source, manifest and test set, or are of generators.
    """
    if generators := sorted({record["group"] for record in loaded if record["purpose"] == "generate"}):
        raise ValueError(f"A generator scores no images: {', '.join(generators[:6])}. Give a list of `cohorts`.")
    for field, values in {"source": {record["data"]["source"] for record in loaded},
                          "manifest": {record["data"]["manifest_sha256"] for record in loaded},
                          "test set": {record["test_sha256"] for record in loaded}}.items():
        if len(values) > 1:
            raise ValueError(f"One table cannot mix {len(values)} values of {field}: "
                              f"{', '.join(sorted({record['group'] for record in loaded})[:6])} …")
    order = ("baseline", "classify", "anomaly")
    rows = [{"run group": group, **_row(runs, threshold)} for group, runs in by_group(loaded).items()]
    rows.sort(key=lambda row: (order.index(row["purpose"]), row["notebook"], -row["auc"]))
    return pd.DataFrame(rows).set_index("run group")


def _row(runs, threshold):
    first, name = runs[0], threshold_of(runs[0], threshold)

    def values(key, split="test"):
        return np.array([run["metrics"].get(split, {}).get(key, {}).get("value") for run in runs], float)

    auc, average = values("auc"), compare.seed_average(frames(runs))
    estimate = evaluate.bootstrap_auc(average["y_true"], average["y_score"], average["patient_id"])
    return {"notebook": first["notebook"], "variant": first["variant"], "purpose": first["purpose"],
            "split": first["config"].get("split", "patient"), "seeds": len(runs), "auc": auc.mean(),
            "auc_sd": auc.std(ddof=1) if len(runs) > 1 else np.nan,
            "averaged": estimate.value, "low": estimate.low, "high": estimate.high,
            "accuracy_half": values("accuracy@half").mean(), "threshold": name,
            **{key: values(f"{key}@{name}").mean() for key in ("accuracy", "sensitivity", "specificity")},
            "val_auc": values("auc", "val").mean(), "shifted_auc": values("auc", "val_shifted").mean(),
            "gap": values("auc", "val").mean() - auc.mean(), "ece": values("ece").mean()}


def strategy_grid(rows, loaded):
    """Return test AUCs, and the same as text with intervals: a row for each backbone and start, a column a strategy.

    Both are of the seed-averaged score, from rows of `table(loaded)`. Without transfer both are empty. What a network
    scored on other images than the test set is left out.
    """
    aucs, texts, groups = collections.defaultdict(dict), collections.defaultdict(dict), by_group(loaded)
    for row in rows.itertuples():
        config = groups[row.Index][0]["config"]
        if not config.get("strategy") or "scored_on" in config:
            continue
        start = (config["weights"] or "random").replace("_", " ")
        if config.get("schedule") == "step":
            start += ", study S1's recipe"
        if config["augment"] == "aspect_jitter":
            start += ", aspect jitter"
        told = [part for part in row.variant.split(", ")[1:] if part not in start]  # such as “16 epochs”
        start = ", ".join([start, *told])
        name = f"{config['backbone']}\n{start}"
        name += f", {row.Index[-8:]}" if name in aucs[config["strategy"]] else ""  # two recipes, two lines
        aucs[config["strategy"]][name] = row.averaged
        texts[config["strategy"]][name] = f"{row.averaged:.3f}\n{row.low:.3f}–{row.high:.3f}"
    columns = [name for name in ("frozen", "partial", "full") if name in aucs]
    return tuple(pd.DataFrame(cells).sort_index()[columns] for cells in (aucs, texts))


def pretty(rows):
    """Return `table` as strings for a reader: what stands in the notebook, the README and the HTML report."""
    number = lambda value, digits=3: "–" if pd.isna(value) else f"{value:.{digits}f}"  # noqa: E731
    return pd.DataFrame([{
        "notebook": row.notebook[:2], "variant": row.variant, "split by": row.split, "seeds": row.seeds,
        "AUC": number(row.auc) + ("" if pd.isna(row.auc_sd) else f" ± {row.auc_sd:.3f}"),
        "95 % interval": f"{number(row.low)}–{number(row.high)}", "accuracy at 0.5": number(row.accuracy_half),
        "threshold": row.threshold.replace("_", " "), "accuracy": number(row.accuracy),
        "sensitivity": number(row.sensitivity), "specificity": number(row.specificity),
        "val. AUC": number(row.val_auc), "gap": number(row.gap), "ECE": number(row.ece)}
        for row in rows.itertuples()])


def reference_of(rows):
    """Return the run group that a notebook's others are compared with: `none`, else the seed recipe.

    Else it is the best on validation (shifted, where any is): never on test, which would call all others worse.
    """
    names = rows["variant"].str.lower()
    for chosen in (names == "none", names == "seed recipe", names.str.startswith(("none", "seed recipe", "no "))):
        if chosen.any():
            return rows.index[chosen][0]
    return best_on_validation(rows)[0]


def best_on_validation(rows):
    """Return the run group with the highest AUC on validation, shifted where any has it, and that column's name.

    `PAINTED` ones are chosen only where there is nothing else.
    """
    honest = rows[~rows["variant"].str.startswith(PAINTED)]
    rows = honest if len(honest) else rows
    column = "shifted_auc" if rows["shifted_auc"].notna().any() else "val_auc"  # rescored ones have no shifted
    return rows[column].fillna(-1).idxmax(), column


def comparisons(loaded, reference_group, *, threshold="sensitivity_95"):
    """Return one row for each other run group of the reference's purpose: paired differences of the test AUC to it.

    Columns: `variant, seeds, difference, low, high, p_bootstrap, p_delong, only_this, only_reference, p_mcnemar`
    (images that only one side decides rightly at the frozen threshold; NaN where one side has none), each p
    Holm-corrected over the table, and `verdict`: `better` or `worse` where the corrected p of the patient bootstrap is
    below 0.05, `not shown` elsewhere, and `too few seeds` with fewer than three on either side.
    """
    groups = by_group(loaded)
    if reference_group not in groups:
        raise ValueError(f"There is no run group {reference_group!r} to compare with; there are {', '.join(groups)}.")
    base, rows = groups.pop(reference_group), {}
    for group, runs in groups.items():
        if runs[0]["purpose"] != base[0]["purpose"]:
            continue
        found = compare.compare_groups([run["frame"] for run in runs], [run["frame"] for run in base],
                                       threshold=threshold_of(base[0], threshold), purpose=base[0]["purpose"])
        seen, decided = found["difference"], found["mcnemar"] or compare.McNemar(np.nan, np.nan, np.nan)
        rows[group] = {"variant": runs[0]["variant"], "seeds": len(runs), "difference": seen.value, "low": seen.low,
                       "high": seen.high, "p_bootstrap": seen.p_value, "p_delong": found["delong"].p_value,
                       "only_this": decided.only_first, "only_reference": decided.only_second,
                       "p_mcnemar": decided.p_value}
    result = pd.DataFrame.from_dict(rows, orient="index").rename_axis("run group")
    if rows:
        result = result.sort_values("difference", ascending=False)
        for column in ("p_bootstrap", "p_delong", "p_mcnemar"):
            done = result[column].notna()
            result.loc[done, column] = compare.holm(result.loc[done, column])
        sign = np.where(result["difference"] > 0, "better", "worse")
        result["verdict"] = np.where(result["p_bootstrap"] < ALPHA, sign, "not shown")
        result.loc[(result["seeds"] < MIN_SEEDS) | (len(base) < MIN_SEEDS), "verdict"] = "too few seeds"
    return result


def reported():
    """Return what the five studies and the literature report: dict of lists `studies`, `claims`, `references`."""
    return json.loads(pathlib.Path(__file__).with_name("reported.json").read_text())


def published_points(num_test):
    """Return where study S1's networks stand: dict `study S1, <strategy>` → sensitivities and specificities `(n, 2)`.

    Empty unless `num_test` is the number of images that the study tested on: elsewhere they say nothing.
    """
    points = collections.defaultdict(list)
    for entry in reported()["studies"]:
        numbers, single = entry["numbers"], "summary_of" not in entry
        if single and (entry["study"], entry["n"]) == ("S1", num_test) and "specificity" in numbers:
            points[entry["variant"].split()[-1]].append([numbers["sensitivity"], numbers["specificity"]])
    return {f"study S1, {name}": np.array(points[name]) for name in ("frozen", "partial", "full") if name in points}


def reported_vs_measured(loaded):
    """Return one row for each published number of the five studies whose variant was run here.

    Columns: `study, what, metric, reported, low, high` (Wilson's interval, of accuracies), `split, seeds, measured, sd,
    smallest, largest` (over seeds), `measured_as` (our image size, start, and phantoms if so), `note`. Published
    numbers are at 0.5 and, where they use all 624 images, stand beside our AUC and accuracy on all of them; the rest is
    on the test set without duplicates.
    """
    rows = []
    for study in reported()["studies"]:
        for runs in by_group(sum(cohorts(loaded), [])).values():
            config, variant = runs[0]["config"], runs[0]["variant"].partition(", ")[0]  # behind a comma: its start
            if (runs[0]["notebook"], variant.lower()) != (study["notebook"], study["variant"].lower()):
                continue
            start = [f"from {config['weights'] or 'random weights'}".replace("_", " ")] if "strategy" in config else []
            start += ["phantoms"] if runs[0]["data"]["synthetic"] else []
            for metric, value in study["numbers"].items():
                key = "auc" if metric == "auc" else f"{metric}@half"
                split = "test_official" if study["n"] == 624 and metric in ("auc", "accuracy") else "test"
                found = np.array([run["metrics"][split][key]["value"] for run in runs], float)
                limits = evaluate.wilson(round(value * study["n"]), study["n"]) if metric == "accuracy" else None
                rows.append({"study": study["study"], "what": study["what"], "metric": metric, "reported": value,
                             "low": limits.low if limits else np.nan, "high": limits.high if limits else np.nan,
                             "split": runs[0]["config"].get("split", "patient"), "seeds": len(runs),
                             "measured": found.mean(), "sd": found.std(ddof=1) if len(found) > 1 else np.nan,
                             "smallest": found.min(), "largest": found.max(), "note": study["note"],
                             "measured_as": ", ".join([f"{config.get('image_size', '?')} px", *start])})
    return pd.DataFrame(rows)

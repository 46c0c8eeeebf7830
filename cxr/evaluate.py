"""Metrics, thresholds, intervals and tests: the one way to obtain a number of this project.

Arrays in, numbers out: `y_true` int `(n,)`, 1 = pneumonia or abnormal; `y_score` float `(n,)`, higher = more abnormal;
`patient_id` `(n,)`. The decision rule is everywhere `y_score >= threshold`. Bad input raises `ValueError`.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import optimize, special, stats

FEWEST = 3  # patients of each class from which an interval can be drawn
NUM_BINS = 10
THRESHOLD = "sensitivity_95_shifted"  # the one to decide with


class Estimate(NamedTuple):
    """A number with its 95 % interval and the number of images behind it; NaN where undefined."""

    value: float
    low: float
    high: float
    n: int


def round_scores(y_score):
    """Return the scores as a predictions table holds them: six significant digits, float64 `(n,)`."""
    return np.array([float(f"{score:.6g}") for score in np.asarray(y_score, dtype=float)])


def check(y_true, *columns, probability=False):
    """Return `y_true` as bool and the score columns as float, or say what is wrong with them."""
    truth, columns = np.asarray(y_true), [np.asarray(column, dtype=float) for column in columns]
    for column in columns:
        if truth.ndim != 1 or column.shape[-1:] != truth.shape:
            raise ValueError(f"y_true has shape {truth.shape}, y_score {column.shape}: give one score for each image.")
        if not np.isfinite(column).all():
            raise ValueError(f"{(~np.isfinite(column)).sum()} scores are NaN or infinite: check the model's output.")
        if probability and column.size and (column.min() < 0 or column.max() > 1):
            raise ValueError(f"Scores span [{column.min():.3g}, {column.max():.3g}], expected probabilities in [0, 1].")
    if not np.isin(truth, (0, 1)).all():
        raise ValueError(f"y_true holds {np.unique(truth)[:5]}, expected 0 (normal) and 1 (abnormal) only.")
    if not 0 < truth.sum() < truth.size:
        raise ValueError(f"All {truth.size} labels are of one class: both are needed, check how the data was split.")
    return truth.astype(bool), *columns


def choose_thresholds(y_true, y_score):
    """Return `{"half": 0.5, "youden": …, "sensitivity_95": …}` from validation scores of any range.

    Candidates are the observed scores, rounded first as in the predictions table, so that the promise also holds for a
    reader of that table. `youden` maximises sensitivity + specificity (the highest wins a tie, Youden 1950);
    `sensitivity_95` is the highest score at which sensitivity is at least 0.95.
    """
    truth, score = check(y_true, round_scores(y_score))
    candidates = np.unique(score)[::-1]
    # searchsorted keeps ties together (images that share a score fall on one side); integers keep the maximum exact.
    tp, fp = (part.sum() - np.searchsorted(np.sort(score[part]), candidates) for part in (truth, ~truth))
    best = np.argmax(tp * (~truth).sum() - fp * truth.sum())
    return {"youden": float(candidates[best]), "sensitivity_95": threshold_for_sensitivity(truth, score, 0.95)}


def threshold_for_sensitivity(y_true, y_score, sensitivity):
    """Return the highest observed score that calls at least this share of the abnormal images abnormal."""
    truth, score = check(y_true, round_scores(y_score))
    ordered = np.sort(score[truth])
    return float(ordered[int(np.floor((1 - sensitivity) * ordered.size + 1e-9))])


def net_benefit(y_true, probability, thresholds):
    """Return the net benefit of acting at each probability threshold: true positives less the false ones it is worth.

    Args:
        y_true: 0/1 `(n,)`.
        probability: calibrated, `(n,)` in [0, 1]. All ones gives the curve of acting on everybody.
        thresholds: float `(m,)` in [0, 1): a threshold t says that one missed case weighs (1 - t) / t false alarms.

    Returns:
        float `(m,)`, per patient; acting on nobody has 0.

    Source: Vickers and Elkin 2006.
    """
    truth, score = check(y_true, probability, probability=True)
    thresholds = np.asarray(thresholds, float)
    called = score[None] >= thresholds[:, None]
    return (called & truth).mean(1) - (called & ~truth).mean(1) * thresholds / (1 - thresholds)


def anomaly_threshold(normal_scores):
    """Return the 95th percentile of the scores of normal validation images; no abnormal image is needed for it."""
    scores = round_scores(normal_scores)
    if scores.size == 0 or not np.isfinite(scores).all():
        raise ValueError("normal_scores is empty or holds NaN: give the scores of the normal validation images.")
    return float(np.quantile(scores, 0.95))


def ranking(truth, score, weight):
    """Return `{"auc", "average_precision"}`, each for every column of `weight` `(n, resamples)`; ties count half."""
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(score[order]) > 0])
    weight = weight[order]
    tied_p = np.add.reduceat(weight * truth[order, None], starts)
    tied_n = np.add.reduceat(weight, starts) - tied_p
    positive, below = tied_p.sum(0), tied_n.cumsum(0)
    negative = below[-1]
    auc = (tied_p * (below - tied_n / 2)).sum(0) / (positive * negative)
    tp, fp = positive - tied_p.cumsum(0) + tied_p, negative - below + tied_n
    precision = tp / np.maximum(tp + fp, 1e-12)  # where nothing is called positive the step in recall is zero as well
    return {"auc": auc, "average_precision": (tied_p * precision).sum(0) / positive}


def _bins(probability):
    """One-hot `(n, NUM_BINS)` of equal-width probability bins; 1.0 falls into the last."""
    return np.eye(NUM_BINS)[np.minimum((probability * NUM_BINS).astype(int), NUM_BINS - 1)]


def _all_metrics(truth, score, weight, thresholds, probability):
    """Every metric for every column of `weight` `(n, resamples)`: dict of float `(resamples,)`, NaN where undefined."""
    result, total, positive = ranking(truth, score, weight), weight.sum(0), truth @ weight
    if probability:
        result["brier"] = (score - truth) ** 2 @ weight / total
        result["ece"] = np.abs((_bins(score) * (truth - score)[:, None]).T @ weight).sum(0) / total
    called = (score >= np.array(list(thresholds.values()))[:, None]).astype(float)
    for name, tp, calls in zip(thresholds, (called * truth) @ weight, called @ weight, strict=True):
        fp, fn = calls - tp, positive - tp
        tn = total - positive - fp
        with np.errstate(divide="ignore", invalid="ignore"):
            sensitivity, specificity, ppv, npv = tp / positive, tn / (fp + tn), tp / calls, tn / (tn + fn)
        for metric, value in {
                "accuracy": (tp + tn) / total, "balanced_accuracy": (sensitivity + specificity) / 2,
                "sensitivity": sensitivity, "specificity": specificity, "ppv": ppv, "npv": npv,
                "f1": 2 * tp / (calls + positive), "fnr": 1 - sensitivity, "fpr": 1 - specificity}.items():
            result[f"{metric}@{name}"] = value
    return result


def metrics(y_true, y_score, thresholds, *, probability=True):
    """Return a flat dict of floats: `auc, average_precision`; `brier, ece` of probabilities; `<metric>@<threshold>`.

    At each of `thresholds` (dict name -> float): accuracy, balanced_accuracy, sensitivity, specificity, ppv, npv, f1
    (of the positive class), fnr, fpr. Undefined values are NaN. Use `probability=False` for scores outside [0, 1].
    """
    truth, score = check(y_true, y_score, probability=probability)
    found = _all_metrics(truth, score, np.ones((truth.size, 1)), thresholds, probability)
    return {name: float(value[0]) for name, value in found.items()}


def patient_weights(y_true, patient_id, num_resamples, seed):
    """Return how often each image is drawn when whole patients are drawn: float `(n, <= num_resamples)`.

    Resamples that hold one class only are dropped, not redrawn; it is an error when a tenth of them are.
    """
    truth = np.asarray(y_true).astype(bool)
    if np.shape(patient_id) != truth.shape:
        raise ValueError(f"patient_id has shape {np.shape(patient_id)}, expected {truth.shape}: one for each image.")
    codes, patients = pd.factorize(np.asarray(patient_id), sort=True)
    drawn = np.random.default_rng(seed).integers(len(patients), size=(num_resamples, len(patients)))
    drawn += np.arange(num_resamples)[:, None] * len(patients)
    counts = np.bincount(drawn.ravel(), minlength=num_resamples * len(patients))
    weight = counts.reshape(num_resamples, len(patients)).T.astype(float)[codes]
    weight = weight[:, (truth @ weight > 0) & (~truth @ weight > 0)]
    if weight.shape[1] < 0.9 * num_resamples:  # fewer than `FEWEST` patients of a class
        sick, healthy = (pd.Series(np.asarray(patient_id)[rows]).nunique() for rows in (truth, ~truth))
        raise ValueError(f"Only {weight.shape[1]} of {num_resamples} resamples of patients hold both classes: {sick} "
                         f"patients with label 1 and {healthy} with label 0 are too few for an interval, which takes "
                         f"{FEWEST} of each. Add films of others; python -m cxr evaluate judges a set whole, and "
                         "python -m cxr predict scores single films.")
    return weight


def metrics_with_intervals(y_true, y_score, patient_id, thresholds, *, num_resamples=1000, seed=0, probability=True):
    """Return `metrics` as `Estimate`s whose 95 % percentile intervals come from resampling whole patients.

    Images of one patient are correlated; resampling images makes the interval too narrow. See `patient_weights`; a
    resample in which a metric is undefined is left out for that metric. Where nobody failed, or everybody, no resample
    differs and percentiles would claim certainty: there it is Wilson's interval of the patients that the metric stands
    on. Source: Field & Welsh 2007; Efron 1993; Hanley & Lippman-Hand 1983.
    """
    values = metrics(y_true, y_score, thresholds, probability=probability)
    truth, score = check(y_true, y_score)
    weight = patient_weights(truth, patient_id, num_resamples, seed)
    found = {}
    for name, draws in _all_metrics(truth, score, weight, thresholds, probability).items():
        draws, value = draws[~np.isnan(draws)], values[name]
        low, high = map(float, np.quantile(draws, (0.025, 0.975))) if draws.size else (np.nan, np.nan)
        if low == high and value in (0, 1):
            patients = _patients_behind(name, truth, score, np.asarray(patient_id), thresholds)
            _, low, high, _ = wilson(value * patients, patients)
        found[name] = Estimate(value, low, high, truth.size)
    return found


def _patients_behind(metric, truth, score, patient_id, thresholds):
    """Return the number of patients whose images a metric counts; of one that takes both classes, the smaller's."""
    kind, _, at = metric.partition("@")
    called = score >= thresholds.get(at, np.nan)
    rows = {"sensitivity": truth, "fnr": truth, "specificity": ~truth, "fpr": ~truth, "ppv": called, "npv": ~called,
            "accuracy": truth | ~truth}.get(kind)
    return min(np.unique(patient_id[part]).size for part in ((truth, ~truth) if rows is None else (rows,)))


def bootstrap_auc(y_true, y_score, patient_id):
    """Return the ROC AUC as an `Estimate`, resampling whole patients; 0.5 is chance. Source: Hanley & McNeil 1982."""
    return metrics_with_intervals(y_true, y_score, patient_id, {}, probability=False)["auc"]


def wilson(k, n):
    """Return the proportion `k / n` as an `Estimate` with Wilson's interval. Source: Wilson 1927."""
    low, high = stats.binomtest(int(k), int(n)).proportion_ci(method="wilson")
    return Estimate(k / n, float(low), float(high), int(n))


def reliability_curve(y_true, probability):
    """Return mean predicted probability, observed share of positives and count of each bin that is not empty."""
    truth, probability = check(y_true, probability, probability=True)
    bins = _bins(probability)
    bins = bins[:, bins.any(0)]
    count = bins.sum(0)
    return probability @ bins / count, truth @ bins / count, count.astype(int)


def expected_calibration_error(y_true, probability):
    """Return the mean gap of `reliability_curve`, weighted by count, in [0, 1]. Source: Guo et al. 2017."""
    predicted, observed, count = reliability_curve(y_true, probability)
    return float(np.abs(predicted - observed) @ count / count.sum())


def _logit(probability):
    return special.logit(np.clip(probability, 1e-6, 1 - 1e-6))  # beyond this the six digits of the table say nothing


def fit_temperature(y_true, probability):
    """Return the temperature in [0.05, 20] that minimises the log loss on validation. Source: Guo et al. 2017."""
    truth, probability = check(y_true, probability, probability=True)
    signed = np.where(truth, 1, -1) * _logit(probability)
    found = optimize.minimize_scalar(lambda log_t: np.logaddexp(0, -signed / np.exp(log_t)).mean(), method="bounded",
                                     bounds=(np.log(0.05), np.log(20)))
    return round(float(np.exp(found.x)), 3)


def apply_temperature(probability, temperature):
    """Return probabilities whose logits are divided by `temperature`: above 1 is less sure; the order stays."""
    return special.expit(_logit(probability) / temperature)


def blur_score(images):
    """Return the negated mean gradient magnitude of uint8 `(n, height, width)`: float `(n,)`, higher = blurrier."""
    return np.array([-np.hypot(*np.gradient(np.asarray(image, np.float32))).mean() for image in images], dtype=float)


def _is_probability(frame, purpose):
    return purpose == "classify" or (purpose == "baseline" and bool(frame["y_score"].between(0, 1).all()))


def frame_thresholds(frame, purpose="classify"):
    """Return the thresholds that the `val` and `val_shifted` rows of a predictions table give; see `record_metrics`."""
    thresholds = {}
    for split, suffix in (("val", ""), ("val_shifted", "_shifted")):
        rows = frame[frame["split"] == split]
        if rows.empty and split == "val":
            raise ValueError("The predictions hold no rows with split 'val': thresholds are chosen there, not on test.")
        if purpose == "anomaly" and len(rows):
            thresholds[f"normal_95{suffix}"] = anomaly_threshold(rows.loc[rows["y_true"] == 0, "y_score"])
        if rows["y_true"].nunique() == 2:
            chosen = choose_thresholds(rows["y_true"], rows["y_score"])
            thresholds |= {name + suffix: value for name, value in chosen.items()}
    return {"half": 0.5} | thresholds if _is_probability(frame, purpose) else thresholds


def record_metrics(frame, *, purpose="classify", num_resamples=1000):
    """Turn a predictions table into the blocks `{"metrics", "thresholds", "calibration"}` of its record.

    Args:
        frame: DataFrame with `image_id, patient_id, split, y_true, y_score`; splits `val`, `val_shifted`, `test`,
            `test_duplicate`. Scores are rounded as in the CSV first, so a recomputation from that file is exact.
        purpose: `classify` (probabilities), `baseline` (probabilities if all lie in [0, 1]) or `anomaly` (any scores,
            with the threshold `normal_95`); without probabilities no `half`, Brier score or calibration error.

    Returns:
        `metrics[split][name]` = `{"value", "low", "high", "n"}` (None where undefined) for `val`, `val_shifted`, `test`
        and `test_official` (test with its duplicates: AUC and accuracies); `thresholds`; `calibration` (of `classify`
        only: temperature from val, numbers on test). Of anomaly scores the validation images may all be normal: they
        then give no metrics.
    """
    frame = frame.assign(y_score=round_scores(frame["y_score"]))
    thresholds, probability, blocks = frame_thresholds(frame, purpose), _is_probability(frame, purpose), {}
    for name, more in {"val": None, "val_shifted": None, "test": None, "test_official": "test_duplicate"}.items():
        rows = frame[frame["split"].isin([name.removesuffix("_official"), more])]
        if name.startswith("val") and rows["y_true"].nunique() < 2:
            continue
        found = metrics_with_intervals(rows["y_true"], rows["y_score"], rows["patient_id"], thresholds,
                                       num_resamples=num_resamples, probability=probability)
        blocks[name] = as_json({key: estimate for key, estimate in found.items()
                                if not more or key.startswith(("auc", "accuracy@"))})
    return {"metrics": blocks, "thresholds": thresholds,
            "calibration": _calibration(frame) if purpose == "classify" else {}}


def as_json(estimates):
    """Return a dict of `Estimate` as a record holds it: `{"value", "low", "high", "n"}` each, None where undefined."""
    return {key: {field: None if value != value else value for field, value in estimate._asdict().items()}
            for key, estimate in estimates.items()}


def _calibration(frame):
    val, test = (frame[frame["split"] == split] for split in ("val", "test"))
    block = {"temperature": fit_temperature(val["y_true"], val["y_score"])}
    calibrated = apply_temperature(test["y_score"], block["temperature"])
    for suffix, probability in (("", test["y_score"]), ("_calibrated", calibrated)):
        block[f"ece{suffix}"] = expected_calibration_error(test["y_true"], probability)
        block[f"brier{suffix}"] = float(np.mean((probability - test["y_true"]) ** 2))
    return block

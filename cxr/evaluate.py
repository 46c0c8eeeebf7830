"""Metrics, thresholds, intervals and tests: the one way a number of this project is obtained.

Arrays in, numbers out. `y_true` is int `(n,)`, 1 = pneumonia or abnormal; `y_score` is float `(n,)`, higher = more
abnormal; `patient_id` is `(n,)`. The decision rule is everywhere `y_score >= threshold`. Bad input raises `ValueError`.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import optimize, special, stats

NUM_BINS = 10
TEMPERATURES = (0.05, 20.0)


class Estimate(NamedTuple):
    """A number with its 95 % interval and the number of images behind it; NaN where undefined."""

    value: float
    low: float
    high: float
    n: int


class Difference(NamedTuple):
    """First minus second, with 95 % interval, two-sided p value and number of images."""

    value: float
    low: float
    high: float
    p_value: float
    n: int


class McNemar(NamedTuple):
    """Images that only the first, or only the second, decides correctly, and the exact two-sided p value."""

    only_first: int
    only_second: int
    p_value: float


def round_scores(y_score):
    """Return the scores as the predictions table holds them: six significant digits, float64 `(n,)`."""
    return np.array([float(f"{score:.6g}") for score in np.asarray(y_score, dtype=float)])


def _check(y_true, *columns, probability=False):
    """Return `y_true` as bool and the score columns as float, or say what is wrong with them."""
    truth, columns = np.asarray(y_true), [np.asarray(column, dtype=float) for column in columns]
    for column in columns:
        if truth.ndim != 1 or column.shape[-1:] != truth.shape:
            raise ValueError(f"y_true has shape {truth.shape} and y_score {column.shape}: give one score for each image.")
        if not np.isfinite(column).all():
            raise ValueError(f"{np.sum(~np.isfinite(column))} scores are NaN or infinite: look at the model's output first.")
        if probability and (column.min() < 0 or column.max() > 1):
            raise ValueError(f"Scores span [{column.min():.3g}, {column.max():.3g}], expected probabilities in [0, 1].")
    if not np.isin(truth, (0, 1)).all():
        raise ValueError(f"y_true holds {np.unique(truth)[:5]}, expected 0 (normal) and 1 (abnormal) only.")
    if truth.min() == truth.max():
        raise ValueError(f"All {truth.size} labels are {int(truth[0])}: both classes are needed, check how the data was split.")
    return truth.astype(bool), *columns


def choose_thresholds(y_true, y_score):
    """Return `{"youden", "sensitivity_95"}` from validation scores, and `"half"` = 0.5 first.

    Candidates are the observed scores. `youden` maximises sensitivity + specificity (the highest such score wins a tie);
    `sensitivity_95` is the highest score at which sensitivity is at least 0.95. Scores are rounded as in the predictions table
    before anything is chosen, so the promise also holds for a reader of that table. Source: Youden 1950.
    """
    truth, score = _check(y_true, round_scores(y_score))
    candidates = np.unique(score)[::-1]
    # Counting by searchsorted keeps ties together: all images that share a score fall on one side.
    true_positives = truth.sum() - np.searchsorted(np.sort(score[truth]), candidates)
    false_positives = (~truth).sum() - np.searchsorted(np.sort(score[~truth]), candidates)
    youden = true_positives * (~truth).sum() - false_positives * truth.sum()  # in integers: ties are exact
    reached = true_positives * 100 >= 95 * truth.sum()
    return {"half": 0.5, "youden": float(candidates[np.argmax(youden)]),
            "sensitivity_95": float(candidates[np.argmax(reached)])}


def anomaly_threshold(normal_scores, quantile=0.95):
    """Return the quantile of the scores of normal validation images: no abnormal image is needed to choose it."""
    scores = round_scores(normal_scores)
    if scores.size == 0 or not np.isfinite(scores).all():
        raise ValueError("normal_scores is empty or holds NaN: give the scores of the normal validation images.")
    return float(np.quantile(scores, quantile))


def _ranking(truth, score, weight):
    """Weighted AUC and average precision for every row of `weight` `(resamples, n)`; ties count half."""
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(score[order]) > 0])
    positives = np.add.reduceat((weight * truth)[:, order], starts, axis=1)
    negatives = np.add.reduceat((weight * ~truth)[:, order], starts, axis=1)
    num_positive, num_negative = positives.sum(1), negatives.sum(1)
    below, positives_below = negatives.cumsum(1), positives.cumsum(1)
    auc = (positives * (below - negatives / 2)).sum(1) / (num_positive * num_negative)
    called_positive = num_positive[:, None] - positives_below + positives
    called = called_positive + num_negative[:, None] - below + negatives
    precision = called_positive / np.maximum(called, 1e-12)  # nothing called: its recall step is zero as well
    return {"auc": auc, "average_precision": (positives * precision).sum(1) / num_positive}


def _bins(probability, num_bins):
    """One-hot `(n, num_bins)` of equal-width probability bins; 1.0 falls into the last."""
    return np.eye(num_bins)[np.minimum((probability * num_bins).astype(int), num_bins - 1)]


def _all_metrics(truth, score, weight, thresholds, probability):
    """Every metric for every row of `weight`: dict of float `(resamples,)`, NaN where undefined."""
    total, positive = weight.sum(1), weight @ truth
    with np.errstate(divide="ignore", invalid="ignore"):
        result = _ranking(truth, score, weight)
        if probability:
            result["brier"] = weight @ (score - truth) ** 2 / total
            result["ece"] = np.abs(weight @ (_bins(score, NUM_BINS) * (truth - score)[:, None])).sum(1) / total
        for name, threshold in thresholds.items():
            called = score >= threshold
            tp, fp = weight @ (called & truth), weight @ (called & ~truth)
            fn, tn = positive - tp, total - positive - fp
            sensitivity, specificity = tp / positive, tn / (total - positive)
            result |= {f"{metric}@{name}": value for metric, value in {
                "accuracy": (tp + tn) / total, "balanced_accuracy": (sensitivity + specificity) / 2,
                "sensitivity": sensitivity, "specificity": specificity, "ppv": tp / (tp + fp), "npv": tn / (tn + fn),
                "f1": 2 * tp / (2 * tp + fp + fn), "fnr": 1 - sensitivity, "fpr": 1 - specificity}.items()}
    return result


def metrics(y_true, y_score, thresholds, *, probability=True):
    """Return a flat dict of floats: `auc, average_precision`, `brier, ece` of probabilities, `<metric>@<threshold>`.

    Metrics at each of `thresholds` (dict name -> float): accuracy, balanced_accuracy, sensitivity, specificity, ppv, npv, f1
    (of the positive class), fnr, fpr. Undefined values are NaN. Set `probability=False` for scores outside [0, 1].
    """
    truth, score = _check(y_true, y_score, probability=probability)
    values = _all_metrics(truth, score, np.ones((1, truth.size)), thresholds, probability)
    return {name: float(value[0]) for name, value in values.items()}


def patient_weights(patient_id, num_resamples, seed):
    """Return how often each image is drawn: float `(num_resamples, n)`; whole patients are drawn with replacement."""
    codes, patients = pd.factorize(np.asarray(patient_id), sort=True)
    drawn = np.random.default_rng(seed).integers(len(patients), size=(num_resamples, len(patients)))
    drawn += np.arange(num_resamples)[:, None] * len(patients)
    counts = np.bincount(drawn.ravel(), minlength=num_resamples * len(patients))
    return counts.reshape(num_resamples, -1)[:, codes].astype(float)


def metrics_with_intervals(y_true, y_score, patient_id, thresholds, *, num_resamples=1000, seed=0, probability=True):
    """Return `metrics` as `Estimate`s whose 95 % percentile intervals come from resampling whole patients.

    Images of one patient are correlated; resampling images makes the interval too narrow. Resamples that hold one
    class only are dropped, not redrawn; where a metric is undefined in a resample, that resample is left out for it.

    Source: Field & Welsh 2007 (cluster bootstrap); Efron & Tibshirani 1993 (percentile interval).
    """
    values = metrics(y_true, y_score, thresholds, probability=probability)
    truth, score = _check(y_true, y_score)
    weight = patient_weights(_aligned(patient_id, truth), num_resamples, seed)
    weight = weight[(weight @ truth > 0) & (weight @ ~truth > 0)]
    if len(weight) < num_resamples / 2:
        raise ValueError(f"Only {len(weight)} of {num_resamples} patient resamples hold both classes: too few patients of one.")
    draws = _all_metrics(truth, score, weight, thresholds, probability)
    return {name: Estimate(value, *_interval(draws[name], value), truth.size) for name, value in values.items()}


def _aligned(patient_id, truth):
    if np.shape(patient_id) != truth.shape:
        raise ValueError(f"patient_id has shape {np.shape(patient_id)}, expected {truth.shape}: one patient for each image.")
    return np.asarray(patient_id)


def _interval(draws, value):
    draws = draws[~np.isnan(draws)]
    return (np.nan, np.nan) if np.isnan(value) or not draws.size else map(float, np.quantile(draws, (0.025, 0.975)))


def bootstrap_auc(y_true, y_score, patient_id, *, num_resamples=1000, seed=0):
    """Return the ROC AUC as an `Estimate`, resampling whole patients; scores may have any range, 0.5 is chance.

    Source: Hanley & McNeil 1982; Field & Welsh 2007 (cluster bootstrap).
    """
    return metrics_with_intervals(y_true, y_score, patient_id, {}, num_resamples=num_resamples, seed=seed,
                                  probability=False)["auc"]


def delong(y_true, a, b):
    """Return the AUC `Difference` of two scores on the same images by DeLong's test (images taken as independent).

    Source: DeLong et al. 1988; midranks as in Sun & Xu 2014.
    """
    truth, *scores = _check(y_true, a, b)
    positive, negative = [], []
    for score in scores:
        ranks = stats.rankdata(score)
        positive.append((ranks[truth] - stats.rankdata(score[truth])) / (~truth).sum())
        negative.append(1 - (ranks[~truth] - stats.rankdata(score[~truth])) / truth.sum())
    (first, second), (first_n, second_n) = positive, negative
    variance = sum(np.var(part, ddof=1) / part.size if part.size > 1 else 0 for part in (first - second, first_n - second_n))
    return _difference(float(first.mean() - second.mean()), float(np.sqrt(variance)), truth.size)


def _difference(value, error, n):
    p_value = 2 * stats.norm.sf(abs(value) / error) if error > 0 else float(abs(value) < 1e-12)
    return Difference(value, value - 1.959964 * error, value + 1.959964 * error, float(p_value), int(n))


def paired_bootstrap(y_true, a, b, patient_id, *, num_resamples=1000, seed=0):
    """Return the `Difference` of the AUC of `a` minus that of `b`, drawing patients, and seeds where there are several.

    Args:
        a, b: scores `(n,)`, or `(seeds, n)`: then the difference of the two mean AUCs, and seeds are drawn as well.

    The interval is the percentile one; p uses the bootstrap standard error in a normal approximation, because a p
    value counted from 1,000 resamples could not survive a Holm correction over a long table.
    """
    truth, a, b = _check(y_true, np.atleast_2d(a), np.atleast_2d(b))
    weight = patient_weights(_aligned(patient_id, truth), num_resamples, seed)
    weight = np.vstack([np.ones(truth.size), weight[(weight @ truth > 0) & (weight @ ~truth > 0)]])
    rng, sides = np.random.default_rng([seed, 1]), []
    for scores in (a, b):
        auc = np.stack([_ranking(truth, score, weight)["auc"] for score in scores])
        drawn = rng.multinomial(len(auc), np.full(len(auc), 1 / len(auc)), size=weight.shape[0]).T / len(auc)
        drawn[:, 0] = 1 / len(auc)  # the first column is the sample itself: every image and every seed once
        sides.append((auc * drawn).sum(0))
    value, draws = float(sides[0][0] - sides[1][0]), (sides[0] - sides[1])[1:]
    low, high = _interval(draws, value)
    return Difference(value, low, high, _difference(value, float(draws.std(ddof=1)), truth.size).p_value, truth.size)


def mcnemar(y_true, decision_a, decision_b):
    """Return the exact McNemar test of two yes/no decisions (bool or 0/1, `(n,)`) on the same images."""
    truth, a, b = _check(y_true, decision_a, decision_b)
    right_a, right_b = (a > 0) == truth, (b > 0) == truth
    first, second = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    return McNemar(first, second, float(stats.binomtest(first, first + second).pvalue) if first + second else 1.0)


def holm(p_values):
    """Return the p values corrected for their number, in the given order: float `(m,)`. Source: Holm 1979."""
    p_values = np.asarray(p_values, dtype=float)
    if ((p_values < 0) | (p_values > 1) | np.isnan(p_values)).any():
        raise ValueError("p values must lie in [0, 1].")
    order = np.argsort(p_values)
    corrected = np.empty_like(p_values)
    corrected[order] = np.minimum(1, np.maximum.accumulate(p_values[order] * np.arange(p_values.size, 0, -1)))
    return corrected


def wilson(k, n):
    """Return the proportion `k / n` as an `Estimate` with Wilson's interval. Source: Wilson 1927."""
    low, high = stats.binomtest(int(k), int(n)).proportion_ci(method="wilson")
    return Estimate(k / n, float(low), float(high), int(n))


def expected_calibration_error(y_true, probability, num_bins=NUM_BINS):
    """Return the mean gap between predicted and observed share of positives over equal-width bins. Source: Guo 2017."""
    truth, probability = _check(y_true, probability, probability=True)
    return float(np.abs((_bins(probability, num_bins) * (truth - probability)[:, None]).sum(0)).sum() / truth.size)


def reliability_curve(y_true, probability, num_bins=NUM_BINS):
    """Return mean predicted probability, observed share of positives, and count of each bin that is not empty."""
    truth, probability = _check(y_true, probability, probability=True)
    bins = _bins(probability, num_bins)
    bins = bins[:, bins.any(0)]
    count = bins.sum(0)
    return probability @ bins / count, truth @ bins / count, count.astype(int)


def _logit(probability):
    return special.logit(np.clip(probability, 1e-6, 1 - 1e-6))  # beyond this the six digits of the table say nothing


def fit_temperature(y_true, probability):
    """Return the temperature in [0.05, 20] that minimises the log loss of validation probabilities. Source: Guo 2017."""
    truth, probability = _check(y_true, probability, probability=True)
    signed = np.where(truth, 1, -1) * _logit(probability)
    found = optimize.minimize_scalar(lambda log_t: np.logaddexp(0, -signed / np.exp(log_t)).mean(),
                                     bounds=np.log(TEMPERATURES), method="bounded")
    return round(float(np.exp(found.x)), 3)


def apply_temperature(probability, temperature):
    """Return probabilities whose logits are divided by `temperature`: above 1 is less sure; the order stays."""
    return special.expit(_logit(probability) / temperature)


def blur_score(images):
    """Return the negated mean gradient magnitude of uint8 `(n, height, width)`: float `(n,)`, higher = blurrier."""
    return np.array([-np.hypot(*np.gradient(np.asarray(image, dtype=np.float32))).mean() for image in images], dtype=float)


def mean_grey(images):
    """Return the mean grey level of uint8 `(n, height, width)`: float `(n,)` in [0, 255]."""
    return np.array([np.mean(image) for image in images], dtype=float)


def frame_thresholds(frame, purpose="classify"):
    """Return the thresholds that the `val` (and `val_shifted`) rows of a predictions table give; see `record_metrics`."""
    thresholds = {}
    for split, suffix in (("val", ""), ("val_shifted", "_shifted")):
        rows = frame[frame["split"] == split]
        if rows.empty and split == "val":
            raise ValueError("The predictions hold no rows with split 'val': thresholds are chosen there, never on test.")
        if purpose == "anomaly" and len(rows):
            thresholds[f"normal_95{suffix}"] = anomaly_threshold(rows.loc[rows["y_true"] == 0, "y_score"])
        if rows["y_true"].nunique() == 2:
            chosen = choose_thresholds(rows["y_true"], rows["y_score"])
            thresholds |= {name + (suffix if name != "half" else ""): value for name, value in chosen.items()}
    if not _is_probability(frame, purpose):
        thresholds.pop("half", None)
    return thresholds


def _is_probability(frame, purpose):
    return purpose == "classify" or (purpose == "baseline" and bool(frame["y_score"].between(0, 1).all()))


def record_metrics(frame, *, purpose="classify", num_resamples=1000, seed=0):
    """Turn a predictions table into the `metrics`, `thresholds` and `calibration` blocks of its record.

    Args:
        frame: DataFrame with `image_id, patient_id, split, y_true, y_score`; splits `val`, `val_shifted`, `test`,
            `test_duplicate`. Scores are rounded as in the CSV first, so a recomputation from that file is exact.
        purpose: `classify` (probabilities), `baseline` (probabilities if all lie in [0, 1]) or `anomaly` (any scores, with
            the threshold `normal_95`; no Brier score, calibration error or temperature).

    Returns:
        A dict of three blocks. `metrics[split][name]` = `{"value", "low", "high", "n"}` (None where undefined) for `val`, `val_shifted`, `test`, and
        `test_official` (test with its duplicates: AUC and accuracies); `thresholds`; `calibration` (of `classify`, else `{}`).
        A validation split that holds one class gives thresholds but no metrics.
    """
    frame = frame.assign(y_score=round_scores(frame["y_score"]))
    thresholds, probability = frame_thresholds(frame, purpose), _is_probability(frame, purpose)
    blocks = {}
    for name, splits in {"val": ["val"], "val_shifted": ["val_shifted"], "test": ["test"],
                         "test_official": ["test", "test_duplicate"]}.items():
        rows = frame[frame["split"].isin(splits)]
        if name.startswith("val") and rows["y_true"].nunique() < 2:
            continue
        if rows.empty:
            raise ValueError("The predictions hold no rows with split 'test'.")
        found = metrics_with_intervals(rows["y_true"], rows["y_score"], rows["patient_id"], thresholds,
                                       num_resamples=num_resamples, seed=seed, probability=probability)
        blocks[name] = {key: {field: None if value != value else value for field, value in estimate._asdict().items()}
                        for key, estimate in found.items()
                        if name != "test_official" or key == "auc" or key.startswith("accuracy@")}
    return {"metrics": blocks, "thresholds": thresholds, "calibration": _calibration(frame) if purpose == "classify" else {}}


def _calibration(frame):
    """Temperature from `val`; calibration error and Brier score on `test` before and after it."""
    val, test = (frame[frame["split"] == split] for split in ("val", "test"))
    temperature = fit_temperature(val["y_true"], val["y_score"])
    block = {"temperature": temperature}
    for suffix, probability in (("", test["y_score"]), ("_calibrated", apply_temperature(test["y_score"], temperature))):
        block[f"ece{suffix}"] = expected_calibration_error(test["y_true"], probability)
        block[f"brier{suffix}"] = float(np.mean((probability - test["y_true"]) ** 2))
    return block


def seed_average(frames):
    """Return one predictions table whose `y_score` is the mean over the tables of several seeds (same images in all)."""
    first, *others = [frame.sort_values(["split", "image_id"], ignore_index=True) for frame in frames]
    for other in others:
        if not other[["image_id", "split", "y_true"]].equals(first[["image_id", "split", "y_true"]]):
            raise ValueError("The tables of the seeds list different images, splits or labels: they cannot be averaged.")
    return first.assign(y_score=np.mean([first["y_score"], *(other["y_score"] for other in others)], axis=0))


def summarise_seeds(frames, *, purpose="classify"):
    """Return mean and sample standard deviation of the test AUC over seeds, and the `Estimate` of the averaged score."""
    test = [frame[frame["split"] == "test"] for frame in frames]
    auc = [metrics(rows["y_true"], rows["y_score"], {}, probability=False)["auc"] for rows in test]
    average = seed_average(test)
    return {"mean": float(np.mean(auc)), "sd": float(np.std(auc, ddof=1)) if len(auc) > 1 else np.nan, "seeds": len(auc),
            "averaged": bootstrap_auc(average["y_true"], average["y_score"], average["patient_id"])}


def compare_groups(frames_a, frames_b, *, threshold="sensitivity_95", purposes=("classify", "classify")):
    """Compare two runs, each a list of predictions tables (one a seed), on the test images that both scored.

    Returns a dict: `difference` (`paired_bootstrap` over patients and seeds of the mean AUC), `delong` (seed-averaged scores),
    `mcnemar` (decisions of the seed-averaged scores at `threshold`, chosen on their validation rows; None where one lacks it).
    """
    averages, scores, decisions = [], [], []
    for frames, purpose in zip((frames_a, frames_b), purposes, strict=True):
        average = seed_average(frames).assign(y_score=lambda table: round_scores(table["y_score"]))
        cut = frame_thresholds(average, purpose).get(threshold)
        averages.append(average[average["split"] == "test"].reset_index(drop=True))
        scores.append([frame[frame["split"] == "test"].sort_values("image_id")["y_score"] for frame in frames])
        decisions.append(None if cut is None else averages[-1]["y_score"] >= cut)
    a, b = averages
    if not a[["image_id", "y_true"]].equals(b[["image_id", "y_true"]]):
        raise ValueError("The two runs were tested on different images: their difference is not paired.")
    return {"difference": paired_bootstrap(a["y_true"], *scores, a["patient_id"]), "delong": delong(a["y_true"], a["y_score"], b["y_score"]),
            "mcnemar": None if any(d is None for d in decisions) else mcnemar(a["y_true"], *decisions)}

"""Paired comparisons of two models on the same images; conventions as in `evaluate`."""

from typing import NamedTuple

import numpy as np
from scipy import stats

from cxr import evaluate


class Difference(NamedTuple):
    """First minus second, with 95 % interval, two-sided p value and number of images."""

    value: float
    low: float
    high: float
    p_value: float


class McNemar(NamedTuple):
    """Images that only the first, or only the second, decides correctly, and the exact two-sided p value."""

    only_first: int
    only_second: int
    p_value: float


def _difference(value, error, freedom=np.inf):
    """Return the `Difference` of an estimate with a standard error of `freedom` degrees (Student's t)."""
    reach = float(stats.t.ppf(0.975, freedom)) * error
    p_value = float(2 * stats.t.sf(abs(value) / error, freedom) if error > 0 else abs(value) < 1e-12)
    return Difference(value, value - reach, value + reach, p_value)


def delong(y_true, a, b):
    """Return the AUC `Difference` of two scores on the same images, which are taken as independent.

    Source: DeLong et al. 1988; midranks as in Sun & Xu 2014.
    """
    truth, *scores = evaluate.check(y_true, a, b)
    shares = {True: [], False: []}  # for each image the share of the other class that it is ranked on the right side of
    for score in scores:
        ranks = stats.rankdata(score)
        shares[True].append((ranks[truth] - stats.rankdata(score[truth])) / (~truth).sum())
        shares[False].append(1 - (ranks[~truth] - stats.rankdata(score[~truth])) / truth.sum())
    gaps = [first - second for first, second in shares.values()]
    error = float(np.sqrt(sum(gap.var(ddof=1) / gap.size for gap in gaps if gap.size > 1)))
    return _difference(float(gaps[0].mean()), error)


def paired_bootstrap(y_true, a, b, patient_id, *, num_resamples=1000, seed=0):
    """Return the `Difference` of the AUC of `a` minus that of `b`; of the mean AUCs, where they have several seeds.

    `a`, `b`: scores `(n,)`, or `(seeds, n)`. The variance is that of the difference when patients are drawn anew, plus
    that of each side's mean over its seeds. A few seeds say little about their own spread: interval and p value are of
    Student's t, with Welch's degrees of freedom. (Drawing three seeds three times instead finds a third less spread,
    and, where seeds differ more than patients do, a difference in 15 of 100 tests of two equal recipes.)

    Source: Welch 1947; Field & Welsh 2007.
    """
    truth, a, b = evaluate.check(y_true, np.atleast_2d(a), np.atleast_2d(b))
    weight = np.column_stack([np.ones(truth.size), evaluate.patient_weights(truth, patient_id, num_resamples, seed)])
    aucs = [np.stack([evaluate.ranking(truth, score, weight)["auc"] for score in scores]) for scores in (a, b)]
    value, *draws = (aucs[0].mean(0) - aucs[1].mean(0)).tolist()
    spread = np.array([[auc[:, 0].var(ddof=1) / len(auc), len(auc) - 1] for auc in aucs if len(auc) > 1]).reshape(-1, 2)
    variance = np.var(draws, ddof=1) + spread[:, 0].sum()
    uncertain = (spread[:, 0] ** 2 / spread[:, 1]).sum()  # of the patients' part there are draws enough
    return _difference(value, float(np.sqrt(variance)), variance ** 2 / uncertain if uncertain else np.inf)


def mcnemar(y_true, decision_a, decision_b):
    """Return the exact McNemar test of two decisions (bool or 0/1, `(n,)`) on the same images."""
    truth, a, b = evaluate.check(y_true, decision_a, decision_b)
    right_a, right_b = (a > 0) == truth, (b > 0) == truth
    first, second = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    return McNemar(first, second, float(stats.binomtest(first, first + second).pvalue) if first + second else 1.0)


def holm(p_values):
    """Return the p values corrected for their number, in the given order: float `(m,)`. Source: Holm 1979."""
    p_values = np.asarray(p_values, dtype=float)
    if not ((p_values >= 0) & (p_values <= 1)).all():
        raise ValueError(f"p values {p_values} must lie in [0, 1].")
    order, corrected = np.argsort(p_values), np.empty_like(p_values)
    corrected[order] = np.minimum(1, np.maximum.accumulate(p_values[order] * np.arange(p_values.size, 0, -1)))
    return corrected


def seed_average(frames):
    """Return one predictions table whose `y_score` is the mean over the tables of several seeds (the same images)."""
    first, *others = (frame.sort_values(["split", "image_id"], ignore_index=True) for frame in frames)
    for other in others:
        if not other[["image_id", "split", "y_true"]].equals(first[["image_id", "split", "y_true"]]):
            raise ValueError("The tables of the seeds list different images or labels: they cannot be averaged.")
    mean = np.mean([frame["y_score"] for frame in (first, *others)], axis=0)
    return first.assign(y_score=evaluate.round_scores(mean))


def compare_groups(frames_a, frames_b, *, threshold="sensitivity_95", purpose="classify"):
    """Compare two runs, each a list of predictions tables (one a seed), on the test images that both scored.

    Returns a dict: `difference` (`paired_bootstrap` of the mean AUC over patients and seeds), `delong` (of the
    seed-averaged scores), `mcnemar` (of their decisions at `threshold`, each chosen on its own validation rows; None
    where one has no such threshold).
    """
    tests, scores, decisions = [], [], []
    for frames in (frames_a, frames_b):
        average = seed_average(frames)
        cut = evaluate.frame_thresholds(average, purpose).get(threshold)
        tests.append(average[average["split"] == "test"].reset_index(drop=True))
        scores.append([frame[frame["split"] == "test"].sort_values("image_id")["y_score"] for frame in frames])
        decisions.append(None if cut is None else tests[-1]["y_score"] >= cut)
    a, b = tests
    if not a[["image_id", "y_true"]].equals(b[["image_id", "y_true"]]):
        raise ValueError("The two runs were tested on different images: their difference is not a paired one.")
    return {"difference": paired_bootstrap(a["y_true"], *scores, a["patient_id"]),
            "delong": delong(a["y_true"], a["y_score"], b["y_score"]),
            "mcnemar": None if any(decision is None for decision in decisions) else mcnemar(a["y_true"], *decisions)}

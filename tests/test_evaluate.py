"""The numbers of the project against scikit-learn, slow loops and properties."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as oracle

from cxr import compare, evaluate


def sample(n=120, seed=0, digits=6, strength=1.0):
    """Labels, probabilities and patients; few `digits` make ties."""
    rng = np.random.default_rng(seed)
    y_true = np.r_[0, 1, rng.integers(2, size=n - 2)]
    y_score = 1 / (1 + np.exp(-strength * (2 * y_true - 1) - rng.normal(size=n)))
    return y_true, y_score.round(digits), rng.integers(n // 2, size=n).astype(str)


def frame(seed=0, n=120, strength=1.0, splits=("val", "test", "test_duplicate")):
    """A predictions table as a run writes it."""
    parts = []
    for number, split in enumerate(splits):
        y_true, y_score, patient = sample(n, 10 + number, strength=strength)
        noise = np.random.default_rng([seed, number]).normal(scale=0.02, size=n)
        parts.append(pd.DataFrame({"image_id": [f"{split}/{k}.png" for k in range(n)], "patient_id": patient,
                                   "split": split, "y_true": y_true, "y_score": np.clip(y_score + noise, 0, 1)}))
    return pd.concat(parts, ignore_index=True)


@st.composite
def labelled_scores(draw):
    n = draw(st.integers(2, 40))
    y_true = draw(st.lists(st.integers(0, 1), min_size=n, max_size=n).filter(lambda y: 0 < sum(y) < len(y)))
    return np.array(y_true), np.array(draw(st.lists(st.integers(0, 20), min_size=n, max_size=n))) / 20


@pytest.mark.parametrize("digits", [1, 6])
def test_metrics_agree_with_scikit_learn(digits):
    y, p, _ = sample(digits=digits)
    found = evaluate.metrics(y, p, {"half": 0.5, "other": 0.3})
    for name, threshold in (("half", 0.5), ("other", 0.3)):
        called = p >= threshold
        tn, fp, fn, tp = oracle.confusion_matrix(y, called).ravel()
        expected = {"accuracy": oracle.accuracy_score(y, called), "f1": oracle.f1_score(y, called),
                    "balanced_accuracy": oracle.balanced_accuracy_score(y, called),
                    "sensitivity": oracle.recall_score(y, called),
                    "specificity": oracle.recall_score(y, called, pos_label=0),
                    "ppv": oracle.precision_score(y, called), "npv": oracle.precision_score(~(y > 0), ~called),
                    "fnr": fn / (fn + tp), "fpr": fp / (fp + tn)}
        assert {key: found[f"{key}@{name}"] for key in expected} == pytest.approx(expected)
    assert found["auc"] == pytest.approx(oracle.roc_auc_score(y, p))
    assert found["average_precision"] == pytest.approx(oracle.average_precision_score(y, p))
    assert found["brier"] == pytest.approx(oracle.brier_score_loss(y, p))
    assert found["ece"] == pytest.approx(evaluate.expected_calibration_error(y, p))


def test_undefined_metric_is_nan_in_numbers_and_null_in_the_record():
    y, p, _ = sample()
    assert np.isnan(evaluate.metrics(y, p / 2.1, {"half": 0.5})["ppv@half"])
    table = frame().assign(y_score=lambda rows: rows["y_score"] / 2.1)
    ppv = evaluate.record_metrics(table, num_resamples=50)["metrics"]["test"]["ppv@half"]
    assert ppv == {"value": None, "low": None, "high": None, "n": 120}


def test_calibration_error_by_hand_and_reliability_curve():
    y, p = np.array([0, 1, 1, 0]), np.array([0.1, 0.1, 1.0, 0.65])
    assert evaluate.expected_calibration_error(y, p) == pytest.approx((2 * 0.4 + 0 + 0.65) / 4)
    predicted, observed, count = evaluate.reliability_curve(y, p)
    assert (predicted.tolist(), observed.tolist()) == (pytest.approx([0.1, 0.65, 1]), [0.5, 0, 1])
    assert count.tolist() == [2, 1, 1]


def test_intervals_agree_with_a_slow_loop_over_patients():
    y, p, patient = sample(80, digits=1)
    found = evaluate.metrics_with_intervals(y, p, patient, {"half": 0.5}, num_resamples=200, seed=3)
    names = np.unique(patient)
    drawn = np.random.default_rng(3).integers(len(names), size=(200, len(names)))
    loop = []
    for patients in drawn:
        rows = np.concatenate([np.flatnonzero(patient == names[k]) for k in patients])
        loop.append(evaluate.metrics(y[rows], p[rows], {"half": 0.5}))
    for name, estimate in found.items():
        low, high = np.quantile([one[name] for one in loop], (0.025, 0.975))
        assert (estimate.low, estimate.high) == pytest.approx((low, high)), name


def test_patients_with_many_images_widen_the_interval():
    y, p, _ = sample(60)
    many = [np.repeat(column, 8) for column in (y, p, np.arange(60))]
    by_patient, by_image = evaluate.bootstrap_auc(*many), evaluate.bootstrap_auc(many[0], many[1], np.arange(480))
    assert by_patient.high - by_patient.low > 2 * (by_image.high - by_image.low)


@given(labelled_scores(), st.sampled_from([np.exp, np.cbrt, lambda x: 3 * x - 7]))
def test_auc_does_not_change_under_monotone_transforms(sample, transform):
    y, score = sample
    before, after = (evaluate.metrics(y, s, {}, probability=False)["auc"] for s in (score, transform(score)))
    assert before == pytest.approx(after) == pytest.approx(oracle.roc_auc_score(y, score))


@given(labelled_scores(), st.floats(1e-3, 1e3))
def test_thresholds_keep_their_promise_on_validation(sample, scale):
    y, score = sample
    score = evaluate.round_scores(score * scale / 3)
    chosen = evaluate.choose_thresholds(y, score)
    at = {t: evaluate.metrics(y, score, {"x": t}, probability=False) for t in np.unique(score)}
    youden = {t: found["sensitivity@x"] + found["specificity@x"] for t, found in at.items()}
    assert youden[chosen["youden"]] == pytest.approx(max(youden.values()))
    assert at[chosen["sensitivity_95"]]["sensitivity@x"] >= 0.95
    assert all(found["sensitivity@x"] < 0.95 for t, found in at.items() if t > chosen["sensitivity_95"])


@given(st.integers(0, 2**20), st.sampled_from([0.5, 0.9, 0.95, 0.99, 1.0]), st.sampled_from([1, 2, 6]))
@settings(max_examples=40)
def test_a_threshold_for_sensitivity_reaches_it_and_no_higher_score_does(seed, wanted, digits):
    y_true, y_score, _ = sample(seed=seed, digits=digits)
    cut = evaluate.threshold_for_sensitivity(y_true, y_score, wanted)
    reached = {score: np.mean(y_score[y_true == 1] >= score) for score in np.unique(y_score)}
    assert reached[cut] >= wanted - 1e-12
    assert all(value < wanted for score, value in reached.items() if score > cut)


def test_net_benefit_by_hand():
    y_true, probability = [1, 1, 0, 0], [0.9, 0.4, 0.6, 0.1]
    np.testing.assert_allclose(evaluate.net_benefit(y_true, probability, [0.2, 0.5]), [0.5 - 0.25 * 0.25, 0.25 - 0.25])
    everybody = evaluate.net_benefit(y_true, np.ones(4), [0.0, 0.5])
    np.testing.assert_allclose(everybody, [0.5, 0.0])  # at the prevalence, acting on everybody gains nothing


def test_thresholds_survive_the_table_on_disk(tmp_path):
    table = frame(strength=8)  # nearly saturated: most scores differ only beyond the sixth digit
    before = evaluate.record_metrics(table, num_resamples=100)
    table.to_csv(tmp_path / "p.csv", index=False, float_format="%.6g")
    again = pd.read_csv(tmp_path / "p.csv", dtype={"patient_id": str})
    assert evaluate.record_metrics(again, num_resamples=100) == before


@settings(max_examples=25)
@given(st.integers(0, 10_000))
def test_intervals_hold_the_point_estimate(seed):
    y, p, patient = sample(seed=seed)
    for name, (value, low, high, n) in evaluate.metrics_with_intervals(y, p, patient, {"half": 0.5}).items():
        if name != "ece":  # biased upwards in small resamples, so its percentile interval may lie above
            assert low <= value <= high and n == 120, name


def test_where_nobody_failed_the_interval_is_that_of_so_many_patients():
    """Ten of ten is no certainty, and a second film of each makes it no surer (Wilson of 10 of 10: from 0.722)."""
    patient = np.repeat(np.arange(30), 2).astype(str)
    y = np.repeat([1, 0], [20, 40])
    p = np.where(y == 1, 0.9, np.tile([0.1, 0.6], 30))  # every other normal film is called pneumonia
    found = evaluate.metrics_with_intervals(y, p, patient, {"half": 0.5, "high": 0.7})
    ten, twenty, thirty = ((1, pytest.approx(n / (n + 1.96 ** 2), abs=1e-4), 1, 60) for n in (10, 20, 30))
    assert found["sensitivity@half"] == found["auc"] == found["f1@high"] == found["ppv@high"] == ten
    assert found["specificity@high"] == found["npv@half"] == twenty and found["accuracy@high"] == thirty
    assert found["fnr@half"][:3] == (0, 0, pytest.approx(1 - ten[1].expected, abs=1e-4))


def test_record_metrics_of_a_classifier():
    found = evaluate.record_metrics(frame(splits=("val", "val_shifted", "test", "test_duplicate")), num_resamples=50)
    assert list(found["metrics"]) == ["val", "val_shifted", "test", "test_official"]
    assert set(found["thresholds"]) == {"half", "youden", "sensitivity_95", "youden_shifted", "sensitivity_95_shifted"}
    official = found["metrics"]["test_official"]
    assert official["auc"]["n"] == 240 and set(official) == {"auc", *(f"accuracy@{t}" for t in found["thresholds"])}
    calibration, test = found["calibration"], found["metrics"]["test"]
    assert (calibration["ece"], calibration["brier"]) == pytest.approx((test["ece"]["value"], test["brier"]["value"]))


def test_record_metrics_of_anomaly_scores():
    table = frame().assign(y_score=lambda rows: 40 * rows["y_score"] - 7)
    table = table[(table["split"] != "val") | (table["y_true"] == 0)]
    found = evaluate.record_metrics(table, purpose="anomaly", num_resamples=50)
    normals = table.loc[table["split"] == "val", "y_score"]
    assert found["thresholds"] == {"normal_95": pytest.approx(np.quantile(normals, 0.95), rel=1e-5)}
    assert list(found["metrics"]) == ["test", "test_official"] and found["calibration"] == {}
    assert not {"brier", "ece"} & set(found["metrics"]["test"])


def test_always_pneumonia_is_a_baseline_with_auc_one_half():
    test = evaluate.record_metrics(frame().assign(y_score=1.0), purpose="baseline", num_resamples=50)["metrics"]["test"]
    assert test["auc"]["value"] == 0.5
    assert test["accuracy@half"]["value"] == pytest.approx(sample(seed=11)[0].mean())


def test_temperature_repairs_overconfidence_and_keeps_the_order():
    rng = np.random.default_rng(0)
    logit = rng.normal(size=4000)
    y, p = (rng.random(4000) < 1 / (1 + np.exp(-logit))).astype(int), 1 / (1 + np.exp(-3 * logit))
    temperature = evaluate.fit_temperature(y, p)
    calibrated = evaluate.apply_temperature(p, temperature)
    assert temperature == pytest.approx(3, rel=0.1)
    assert evaluate.expected_calibration_error(y, calibrated) < evaluate.expected_calibration_error(y, p) / 3
    assert (np.argsort(calibrated) == np.argsort(p)).all()


def slow_delong(y, a, b):
    """The textbook form: every pair of a positive and a negative."""
    kernel = [(s[y == 1][:, None] > s[y == 0]) + 0.5 * (s[y == 1][:, None] == s[y == 0]) for s in (a, b)]
    gap = kernel[0] - kernel[1]
    error = np.sqrt(gap.mean(1).var(ddof=1) / gap.shape[0] + gap.mean(0).var(ddof=1) / gap.shape[1])
    return gap.mean(), error


@pytest.mark.parametrize("digits", [1, 6])
def test_delong_agrees_with_all_pairs_and_with_the_bootstrap_of_images(digits):
    y, a, _ = sample(400, digits=digits)
    b = np.random.default_rng(5).normal(a, 0.3).round(digits)
    found, (gap, error) = compare.delong(y, a, b), slow_delong(y, a, b)
    assert found.value == pytest.approx(gap)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=1e-4)
    boot = compare.paired_bootstrap(y, a, b, np.arange(400))
    assert boot.value == pytest.approx(gap)
    assert boot.high - boot.low == pytest.approx(found.high - found.low, rel=0.15)


def test_delong_and_bootstrap_of_equal_scores_find_nothing():
    y, a, patient = sample()
    assert compare.delong(y, a, a)[:4] == (0, 0, 0, 1) == compare.paired_bootstrap(y, a, a, patient)[:4]


def test_seeds_that_differ_widen_the_interval_of_the_mean_difference():
    y, a, patient = sample(300)
    noisy = np.stack([np.random.default_rng(k).normal(a, spread) for k, spread in enumerate((0.01, 0.5, 1.5))])
    narrow, wide = (compare.paired_bootstrap(y, scores, a, patient) for scores in (np.stack([noisy[1]] * 3), noisy))
    assert wide.value == pytest.approx(np.mean([compare.delong(y, s, a).value for s in noisy]))
    assert wide.high - wide.low > 1.3 * (narrow.high - narrow.low)


def test_recipes_that_differ_by_their_seeds_alone_are_rarely_called_different():
    y, _, patient = sample(200)
    rng, found = np.random.default_rng(0), []
    for _ in range(200):  # two recipes that are one; a good or a bad seed moves the AUC more than other patients would
        shared, strengths = rng.normal(size=200), rng.uniform(0.5, 2.5, (2, 3, 1))
        a, b = shared + strengths * (2 * y - 1) + 0.2 * rng.normal(size=(2, 3, 200))
        found.append(compare.paired_bootstrap(y, a, b, patient, num_resamples=60))
    assert np.mean([one.p_value < 0.05 for one in found]) <= 0.08, "0.11 where three seeds are drawn three times"
    assert np.mean([one.low <= 0 <= one.high for one in found]) >= 0.92, "0.75 there"


def test_mcnemar_counts_only_disagreements():
    y = np.r_[np.ones(20, int), np.zeros(20, int)]
    a, b = y.copy(), y.copy()
    b[:9], a[39] = 0, 1
    assert compare.mcnemar(y, a, b) == (9, 1, pytest.approx(2 * 11 / 2**10))
    assert compare.mcnemar(y, a, a) == (0, 0, 1.0)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_keeps_the_order_and_lies_between_p_and_bonferroni(p):
    p, corrected = np.array(p), compare.holm(p)
    assert (np.diff(corrected[np.argsort(p)]) >= 0).all()
    assert ((corrected >= p) & (corrected <= np.minimum(1, p * p.size) + 1e-12)).all()


def test_holm_and_wilson_textbook_values():
    assert compare.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert evaluate.wilson(539, 618)[:3] == pytest.approx((0.8722, 0.8435, 0.8962), abs=2e-4)


def test_groups_are_compared_on_the_same_images_whatever_their_order():
    good, bad = [frame(seed, strength=3) for seed in (0, 1)], [frame(seed, strength=0.2) for seed in (2, 3, 4)]
    found = compare.compare_groups(good, [one.sample(frac=1, random_state=0) for one in bad])
    assert found["difference"].value > 0.1 and found["difference"].p_value < 0.001 and found["delong"].p_value < 0.001
    assert found["mcnemar"].only_first > found["mcnemar"].only_second
    with pytest.raises(ValueError, match="different images"):
        compare.compare_groups(good, [one.assign(image_id=one["image_id"] + "x") for one in bad])


def test_trivial_scores_know_blur_and_brightness():
    sharp = np.random.default_rng(0).integers(0, 255, size=(1, 32, 32)).astype(np.uint8)
    flat = np.full((1, 32, 32), 100, np.uint8)
    ramp = np.tile(np.arange(32, dtype=np.uint8) * 3, (1, 32, 1))
    assert evaluate.blur_score(np.vstack([flat, ramp, sharp]))[:2].tolist() == [0, -3]
    assert evaluate.blur_score(sharp)[0] < -3


@pytest.mark.parametrize(("y_true", "y_score", "message"), [
    ([1, 1, 1], [0.1, 0.2, 0.3], "one class"), ([0, 1, 1], [0.1, np.nan, 0.3], "NaN"), ([0, 1], [0.1], "shape"),
    ([0, 2, 1], [0.1, 0.2, 0.3], "expected 0"), ([0, 1, 1], [0.1, 1.2, 0.3], "probabilities"), ([], [], "one class")])
def test_bad_input_is_named(y_true, y_score, message):
    with pytest.raises(ValueError, match=message):
        evaluate.metrics(y_true, y_score, {})


@pytest.mark.parametrize("healthy", [evaluate.FEWEST, 100])
def test_the_fewest_patients_that_give_an_interval(healthy):
    for sick, able in ((evaluate.FEWEST, True), (evaluate.FEWEST - 1, False)):
        y_true = np.repeat([1, 0], (sick, min(healthy, sick) if healthy < 100 else healthy))
        draw = lambda: evaluate.patient_weights(y_true, np.arange(len(y_true)), 1000, 0)  # noqa: E731, B023
        assert draw().shape[1] >= 900 if able else pytest.raises(ValueError, draw)


def test_other_bad_input_is_named():
    with pytest.raises(ValueError, match="patient_id"):
        evaluate.bootstrap_auc([0, 1], [0.1, 0.2], ["a"])
    with pytest.raises(ValueError, match="are too few for an interval"):
        evaluate.bootstrap_auc([0, 1, 1], [0.1, 0.2, 0.3], ["a", "b", "b"])
    with pytest.raises(ValueError, match="not on test"):
        evaluate.record_metrics(frame(splits=("test",)))
    with pytest.raises(ValueError, match="normal"):
        evaluate.anomaly_threshold([])
    with pytest.raises(ValueError, match="p values"):
        compare.holm([0.5, np.nan])

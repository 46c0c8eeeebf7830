"""What the smoke run left behind: its numbers lie where they should, and a model that has learnt nothing would fail.

`make test` runs this after the notebooks.
"""

import pathlib
import subprocess

import numpy as np
import pandas as pd
import pytest

from cxr import evaluate, report

ROOT = pathlib.Path(__file__).parents[1]
RUN = ROOT / "runs" / "smoke-phantom"
pytestmark = pytest.mark.smoke

# Mean over seeds on test. Wide enough for another machine (threads change the third decimal and, in a training so
# short the second), narrow enough that neither a constant nor a perfect model passes.
EXPECTED = {
    ("02_baseline_cnn", "lab recipe"): {
        "auc": (0.80, 0.97),
        "average_precision": (0.85, 0.99),
        "balanced_accuracy@half": (0.60, 0.95),
        "specificity@sensitivity_95": (0.15, 0.97),
    },
    ("02_baseline_cnn", "seed recipe"): {"auc": (0.53, 0.90)},
}


@pytest.fixture(scope="module")
def loaded():
    if not (RUN / "results" / "records").is_dir():
        pytest.skip("no smoke run yet: make reproduce")
    return report.load(RUN / "results")  # recomputes every stored number from its predictions


def values(records, metric):
    return [record["metrics"]["test"][metric]["value"] for record in records]


@pytest.mark.parametrize(
    ("notebook", "variant", "metric"), [(*key, name) for key, found in EXPECTED.items() for name in found]
)
def test_metric_within_tolerance_and_a_constant_model_is_not(loaded, notebook, variant, metric):
    chosen = [record for record in loaded if (record["notebook"], record["variant"]) == (notebook, variant)]
    assert chosen, f"no record of {variant} in {notebook}"
    low, high = EXPECTED[notebook, variant][metric]
    assert low <= np.mean(values(chosen, metric)) <= high
    frame = chosen[0]["frame"]
    prevalence = frame.loc[frame["split"] == "val", "y_true"].mean()
    constant = evaluate.record_metrics(frame.assign(y_score=prevalence), num_resamples=10)["metrics"]["test"][metric][
        "value"
    ]
    assert constant is None or not low <= constant <= high, f"a constant model has {metric} {constant} and would pass"


def test_every_interval_holds_its_value(loaded):
    for record in loaded:
        for name, metric in record["metrics"]["test"].items():
            if name == "ece":
                continue  # resampling adds noise to every bin, so that the draws of an ECE lie above its value
            assert metric["value"] is None or metric["low"] - 1e-9 <= metric["value"] <= metric["high"] + 1e-9


def test_trivial_baselines_stand_in_the_table(loaded):
    table = report.table(report.cohorts(loaded)[0])
    assert {"always pneumonia", "mean grey level", "blur score"} <= set(table["variant"])


def test_thresholds_keep_their_promise_on_validation(loaded):
    for record in loaded:
        if "sensitivity_95" in record["thresholds"] and record["purpose"] == "classify":
            assert record["metrics"]["val"]["sensitivity@sensitivity_95"]["value"] >= 0.95


def test_records_say_that_they_are_synthetic(loaded):
    assert all(record["data"]["synthetic"] and record["profile"] == "smoke" for record in loaded)


def test_report_is_one_file_that_says_synthetic():
    page = (RUN / "report.html").read_text()
    assert "Synthetic phantom" in page and "not for diagnosis" in page.lower().replace(
        "not diagnosis", "not for diagnosis"
    )
    assert 'src="http' not in page and 'href="http' not in page.replace('href="https://github', "")


def test_no_notebook_failed_and_a_second_call_does_nothing():
    assert not list(RUN.rglob("*.failed.ipynb")) and not list(RUN.rglob("*.running.ipynb"))
    done = pd.Series({path.name: path.stat().st_mtime for path in RUN.glob("notebooks/*.ipynb")})
    again = subprocess.run(
        [
            "make",
            "reproduce",
            "PROFILE=smoke",
            "DATA=phantom",
            "SEED=0",
            "NUM_SEEDS=",
            "IMAGE_SIZE=",
            "EPOCHS=",
            "NOTEBOOKS=",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert again.returncode == 0, again.stderr
    assert done.equals(pd.Series({path.name: path.stat().st_mtime for path in RUN.glob("notebooks/*.ipynb")}))

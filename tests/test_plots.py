"""Figures show the numbers they were given, and phantoms say so."""

import io

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from cxr import plots

Y = np.array([0, 0, 0, 1, 1, 1, 1, 0])
P = np.array([0.1, 0.4, 0.2, 0.9, 0.35, 0.8, 1.0, 0.6])
IMAGES = np.random.default_rng(0).integers(0, 255, (7, 16, 16)).astype(np.uint8)
ROWS = [{"label": "one", "value": 0.91, "low": 0.88, "high": 0.94, "section": "first"},
        {"label": "two", "value": 0.62, "low": np.nan, "high": np.nan, "section": "second"}]
FIGURES = {
    "grid": lambda **note: plots.image_grid(
        IMAGES, list("abcdefg"), columns=4, heat=IMAGES / 255, masks=IMAGES > 99, **note),
    "histogram": lambda **note: plots.histogram(
        {"normal": P[Y == 0], "pneumonia": P[Y == 1]}, thresholds={"half": 0.5}, **note),
    "bars": lambda **note: plots.bars(pd.DataFrame({"normal": [1341, 234]}, index=["train", "test"]), **note),
    "training": lambda **note: plots.training_curves(
        {"": [{"loss": [2, 1], "val_loss": [3, 2], "auc": [0.6, 0.7], "val_auc": [0.5, 0.6]}, {"loss": [1]}]}, **note),
    "roc": lambda **note: plots.roc_and_precision_recall({"a": (Y, P)}, thresholds={"a": {"half": 0.5}}, **note),
    "scatter": lambda **note: plots.scatter({"a": (P, P), "b": (Y, P)}, xlabel="x", ylabel="y", **note),
    "decision": lambda **note: plots.decision_curve(Y, {"a": P}, **note),
    "confusion": lambda **note: plots.confusion_matrix(Y, P >= 0.5, **note),
    "reliability": lambda **note: plots.reliability(Y, {"raw": P}, **note),
    "forest": lambda **note: plots.forest(ROWS, reference=0.5, **note),
    "operating": lambda **note: plots.operating_points(Y, P, {"half": 0.5, "youden": 0.35}, **note),
}


def texts(figure):
    """Every text that the drawn figure holds."""
    figure.savefig(io.BytesIO())
    return [found.get_text() for found in figure.findobj(matplotlib.text.Text)]


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.mark.parametrize("name", FIGURES)
def test_phantom_figures_say_so_and_others_do_not(name):
    settings = dict(matplotlib.rcParams)
    assert plots.NOTE in texts(FIGURES[name](synthetic=True, title="A title"))
    assert plots.NOTE not in texts(FIGURES[name]())
    assert dict(matplotlib.rcParams) == settings, "the style must not leak into the caller's figures"


def test_grid_shows_every_image_once_and_leaves_no_empty_frame():
    figure = plots.image_grid(IMAGES, list("abcdefg"), columns=4)
    assert [len(axis.images) for axis in figure.axes] == [1] * 7 + [0]
    assert not any(axis.axison for axis in figure.axes)
    np.testing.assert_array_equal(figure.axes[6].images[0].get_array(), IMAGES[6])


def test_histogram_areas_are_one_and_share_bins():
    axis = FIGURES["histogram"]().axes[0]
    corners = [outline.get_xy() for outline in axis.patches]
    assert len(corners) == 2 and set(corners[0][:, 0]) == set(corners[1][:, 0])
    for x, y in (xy.T for xy in corners):
        assert abs(np.trapezoid(y, x)) == pytest.approx(1)


def test_training_mean_covers_the_seeds_that_reached_the_epoch():
    axis = FIGURES["training"]().axes[0]
    mean = next(line for line in axis.lines if line.get_label() == "train")
    assert mean.get_ydata().tolist() == [1.5, 1]


def test_operating_point_lies_on_the_curve():
    left = FIGURES["roc"]().axes[0]
    curve, dot = left.lines[1], left.lines[2]
    assert (dot.get_xdata()[0], dot.get_ydata()[0]) == (0.25, 0.75)
    assert np.interp(0.25, *curve.get_data()) == 0.75
    assert "a (0.875)" in texts(left.figure)


def test_confusion_counts_stand_in_their_cells():
    written = texts(FIGURES["confusion"]())
    assert [text for text in written if text in "0123456789" and text] == ["3", "1", "1", "3"]
    assert "normal\n(n = 4)" in written


@pytest.mark.parametrize("narrow", [False, True])
def test_forest_groups_by_section_and_prints_the_interval(narrow):
    figure = plots.forest(ROWS, narrow=narrow)
    written = {text.strip() for text in texts(figure)}
    assert {"first", "second", "one", "two", "0.910  [0.880, 0.940]", "0.620"} <= written
    assert (figure.get_figwidth() < 5) == narrow


def test_operating_figure_decides_at_or_above_the_threshold():
    axis = plots.operating_points([0, 1], [0.2, 0.8], {}).axes[0]
    sensitivity, specificity = axis.lines
    x, y = sensitivity.get_data()
    assert y[x <= np.log(0.8 / 0.2)].min() == 1 and y[x > np.log(0.8 / 0.2)].max() == 0
    assert specificity.get_ydata()[0] == 0 and specificity.get_ydata()[-1] == 1


def test_operating_figure_sets_other_models_beside_the_curve():
    others = {"study": [[0.9, 0.4], [1.0, 0.3]]}
    figure = plots.operating_points([0, 0, 1, 1], [0.1, 0.6, 0.4, 0.9], {"half": 0.5}, others)
    curve, half, study = figure.axes[1].lines
    assert half.get_xydata().tolist() == [[0.5, 0.5]]  # one normal of two below, one pneumonia of two above
    assert half.get_xydata()[0].tolist() in curve.get_xydata().tolist()
    assert study.get_xydata().tolist() == [[0.4, 0.9], [0.3, 1.0]]
    (left, right), (bottom, top) = figure.axes[1].get_xlim(), figure.axes[1].get_ylim()
    assert left < 0.3 and bottom < 0.5 and right > 1 and top > 1, "every point must be seen"


def test_heat_table_leaves_undefined_cells_empty():
    axis = plots.heat_table(pd.DataFrame([[0.5, np.nan]], index=["x"], columns=["a", "b"])).axes[0]
    assert [text.get_text() for text in axis.texts] == ["0.500"]

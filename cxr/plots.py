"""Arrays in, `Figure` out, one style. Every function also takes `title=""` and `synthetic=False`.

`synthetic=True` writes on the figure itself that its images are phantoms, so that a copied picture still says so.
Notebooks end a figure cell with `plt.show()`. Colours: Okabe & Ito 2008, told apart by the colour-blind as well.
"""

import functools
import textwrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy import special, stats
from sklearn import metrics

from cxr import evaluate

NORMAL, ABNORMAL, INK, FAINT = "#0072B2", "#D55E00", "#22303c", "#8795a1"
CYCLE = [NORMAL, ABNORMAL, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4d4d4d"]
NOTE = "Synthetic phantom: drawn by a program, not patients"
STYLE = {
    "figure.dpi": 80, "figure.constrained_layout.use": True, "figure.facecolor": "white", "font.size": 10.5,
    "axes.prop_cycle": plt.cycler(color=CYCLE), "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": FAINT, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.grid": True,
    "axes.axisbelow": True, "grid.color": "#e8ecef", "grid.linewidth": 0.8, "legend.frameon": False,
    "legend.fontsize": 9.5, "lines.linewidth": 1.8, "image.cmap": "gray", "svg.fonttype": "path",
}


def _styled(draw):
    """Draw in the project's style, then add the title and, for phantoms, the note."""

    @functools.wraps(draw)
    def styled(*args, title="", synthetic=False, **options):
        with plt.rc_context(STYLE):
            figure = draw(*args, **options)
            if title:
                figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=12.5)
            if synthetic:
                figure.supxlabel(NOTE, x=0.99, ha="right", fontsize=8.5, style="italic", color=FAINT)
        return figure

    return styled


def _mark(axis, lines, *, top, step):
    """Draw vertical lines `name -> (x, text)`, their texts one below the other so that none covers another."""
    for k, (x, text) in enumerate(lines.values()):
        axis.axvline(x, color=INK, lw=1, ls="--")
        axis.annotate(text.replace("_", " "), (x, top + k * step), (5, 0), xycoords=("data", "axes fraction"),
                      textcoords="offset points", fontsize=9, va="center",
                      bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1})


@_styled
def image_grid(images, titles=None, *, columns=6, heat=None, masks=None):
    """Show grey images `(n, height, width)`, any range, in rows of `columns`, with `titles` above.

    `heat`: float of that shape in [0, 1], laid over (transparent at 0); `masks`: bool, drawn as contours.
    """
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.75 * columns, (2 if titles else 1.8) * rows), squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])  # hidden ones would still be laid out, for longer than the picture takes
        axis.axis("off")
    for k, (axis, image) in enumerate(zip(axes.flat, images, strict=False)):
        low, high = (0, 255) if np.asarray(image).dtype == np.uint8 else (np.min(image), np.max(image))
        axis.imshow(image, vmin=low, vmax=high)
        if heat is not None:
            axis.imshow(heat[k], cmap="inferno", vmin=0, vmax=1, alpha=np.clip(heat[k], 0, 1) * 0.65)
        if masks is not None and np.any(masks[k]):
            axis.contour(masks[k], levels=[0.5], colors=["#56B4E9"], linewidths=1.3)
        if titles is not None:
            axis.set_title(titles[k], y=1, fontsize=9, loc="center", fontweight="normal", color=INK)
    return figure


@_styled
def histogram(groups, *, thresholds=None, xlabel="score", bins=40):
    """Show the distribution of each of `groups` (dict name -> float `(n,)`), each with area 1, over common bins."""
    figure, axis = plt.subplots(figsize=(7, 3.4))
    edges = np.histogram_bin_edges(np.concatenate([np.ravel(values) for values in groups.values()]), bins)
    for name, values in groups.items():
        axis.hist(np.ravel(values), edges, density=True, histtype="stepfilled", alpha=0.5,
                  label=f"{name} (n = {np.size(values):,})")
    _mark(axis, {name: (threshold, name) for name, threshold in (thresholds or {}).items()}, top=0.97, step=-0.09)
    axis.set(xlabel=xlabel, ylabel="density")
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(groups))  # above, where no threshold's name is
    return figure


@_styled
def grey_levels(variants, labels):
    """Show the grey-level distribution by class, one panel a variant: solid for abnormal images, dashed for normal.

    `variants`: dict name -> float images `(n, ...)` in [0, 1]; `labels`: 0/1 `(n,)`.
    """
    figure, axes = plt.subplots(1, len(variants), figsize=(2.1 * len(variants), 2.4), sharey=True, squeeze=False)
    for axis, (name, images) in zip(axes[0], variants.items(), strict=True):
        for value, style, colour in ((1, "-", ABNORMAL), (0, "--", NORMAL)):
            density, edges = np.histogram(images[np.asarray(labels) == value], 32, (0, 1), density=True)
            axis.plot((edges[1:] + edges[:-1]) / 2, density, style, color=colour, lw=1.5)
        axis.set_title(name.replace("_", " "), fontsize=9.5)
        axis.set(xticks=[0, 1], yticks=[])
    axes[0][0].set_ylabel("density")
    return figure


@_styled
def scatter(groups, *, xlabel, ylabel):
    """Show points; `groups`: dict label -> `(x, y)`, each float `(n,)`, with the rank correlation over all of them."""
    figure, axis = plt.subplots(figsize=(5.6, 4.2))
    for label, (x, y) in groups.items():
        axis.plot(x, y, "o", ms=3.5, alpha=0.55, label=label)
    x, y = (np.concatenate(values) for values in zip(*groups.values(), strict=True))
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.legend(title=f"rank correlation {stats.spearmanr(x, y).statistic:+.2f}")
    return figure


@_styled
def bars(table, *, ylabel="images"):
    """Show a DataFrame of counts as grouped bars: index along the axis, one colour a column, the number above."""
    figure, axis = plt.subplots(figsize=(max(5, 1 + 0.55 * table.size, 1 + 1.05 * len(table)), 3.4))
    width = 0.8 / table.shape[1]
    for k, column in enumerate(table):
        drawn = axis.bar(np.arange(len(table)) + (k - (table.shape[1] - 1) / 2) * width, table[column], width * 0.94,
                         label=str(column))
        axis.bar_label(drawn, fmt="{:,.4g}", fontsize=9, padding=2)
    axis.set_xticks(range(len(table)), [textwrap.fill(str(name).replace("_", " "), 14) for name in table.index])
    axis.set_ylabel(ylabel)
    axis.margins(y=0.1)  # room for the numbers
    axis.grid(axis="x", visible=False)
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=table.shape[1])  # above, where no bar is
    return figure


@_styled
def training_curves(histories):
    """Show loss and AUC per epoch of train (dashed) and validation, one thin line a seed and their mean.

    `histories`: dict label -> list of `{"loss", "val_loss", "auc", "val_auc"}` (floats per epoch), one for each seed.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 3.4))
    for (label, runs), colour in zip(histories.items(), CYCLE * 9, strict=False):
        for axis, name in zip(axes, ("loss", "auc"), strict=True):
            for key, dashes in ((name, "--"), (f"val_{name}", "-")):
                seeds = [run[key] for run in runs if key in run]
                for seed in seeds if len(seeds) > 1 else ():
                    axis.plot(range(1, len(seed) + 1), seed, dashes, color=colour, lw=0.8, alpha=0.35)
                length = max(map(len, seeds), default=0)
                mean = [np.mean([seed[k] for seed in seeds if len(seed) > k]) for k in range(length)]
                where = "train" if dashes == "--" else "validation"
                axis.plot(range(1, length + 1), mean, dashes, color=colour, label=f"{label}, {where}".lstrip(", "))
    for axis, name in zip(axes, ("loss", "AUC"), strict=True):
        axis.set(xlabel="epoch", title=name)
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside right upper")
    return figure


@_styled
def epochs(series):
    """Show one panel a metric, one line a name, over the epochs of one run.

    `series`: dict name -> dict metric -> list of floats, one an epoch.
    """
    names = list(next(iter(series.values())))
    figure, axes = plt.subplots(1, len(names), figsize=(4.75 * len(names), 3.6), squeeze=False)
    for axis, metric in zip(axes[0], names, strict=True):
        for name, values in series.items():
            axis.plot(range(1, len(values[metric]) + 1), values[metric], "o-", ms=4, label=name)
        axis.set(xlabel="epoch", title=metric)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0][-1].legend(loc="lower right")
    return figure


@_styled
def roc_and_precision_recall(curves, *, thresholds=None):
    """Show both curves of each of `curves` (dict label -> `(y_true, y_score)`), with operating points.

    `thresholds`: dict label -> dict name -> threshold; a dot marks each, decided as `y_score >= threshold`.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.6))
    left.plot([0, 1], [0, 1], color=FAINT, lw=1, ls=":")
    for (label, (y_true, y_score)), colour in zip(curves.items(), CYCLE * 9, strict=False):
        y_true, y_score = np.asarray(y_true), np.asarray(y_score)
        fpr, tpr, _ = metrics.roc_curve(y_true, y_score)
        precision, recall, _ = metrics.precision_recall_curve(y_true, y_score)
        found = evaluate.metrics(y_true, y_score, (thresholds or {}).get(label, {}), probability=False)
        left.plot(fpr, tpr, color=colour, label=f"{label} ({found['auc']:.3f})")
        right.step(recall, precision, color=colour, where="post", label=f"{label} ({found['average_precision']:.3f})")
        for name, marker in zip((thresholds or {}).get(label, {}), "os^Dv<", strict=False):
            point = {"color": colour, "marker": marker, "ms": 8, "mec": "white", "ls": ""}
            left.plot(found[f"fpr@{name}"], found[f"sensitivity@{name}"], **point)
            right.plot(found[f"sensitivity@{name}"], found[f"ppv@{name}"], **point)
    names = dict.fromkeys(name for chosen in (thresholds or {}).values() for name in chosen)
    for name, marker in zip(names, "os^Dv<", strict=False):
        left.plot([], [], color=FAINT, marker=marker, ls="", label=f"at {name.replace('_', ' ')}")
    left.set(xlabel="false-positive rate", ylabel="sensitivity", title="ROC (AUC)", aspect="equal")
    right.set(xlabel="sensitivity (recall)", ylabel="precision (PPV)", title="Precision–recall (average precision)")
    right.set_ylim(0, 1.02)
    for axis in (left, right):  # below: beside the curves there is no room for ten names
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14))
    return figure


@_styled
def heat_table(table, *, texts=None, fmt="{:.3f}", xlabel="", ylabel="", cmap="Blues", least=0.0):
    """Show a DataFrame of numbers as coloured cells, each with its number or its text of `texts`; NaN stays empty.

    The colours span the numbers, and `least` at least: a table of equal AUCs must not look like one of differences.
    """
    values = table.to_numpy(float)
    wide, tall = (1.1, 0.5) if texts is None else (1.5, 0.62)  # a text holds a number and its interval
    figure, axis = plt.subplots(figsize=(2.2 + wide * values.shape[1], 1.1 + tall * values.shape[0]))
    high = np.nanmax(values)
    low = min(np.nanmin(values), high - least)
    axis.imshow(np.ma.masked_invalid(values), cmap=cmap, vmin=low - 0.05 * (high - low), vmax=high, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            axis.text(column, row, texts.iloc[row, column] if texts is not None else fmt.format(value),
                      ha="center", va="center",
                      color="white" if value > low + 0.6 * (high - low) else INK)
    axis.set_xticks(range(values.shape[1]), [textwrap.fill(str(name), 14) for name in table.columns])
    axis.set_yticks(range(values.shape[0]), table.index)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.grid(visible=False)
    return figure


def confusion_matrix(y_true, decision, *, names=("normal", "pneumonia"), title="", synthetic=False):
    """Show how many images of each class (rows) were called what (columns); `decision` bool or 0/1 `(n,)`."""
    counts = metrics.confusion_matrix(y_true, np.asarray(decision).astype(int), labels=(0, 1))
    table = pd.DataFrame(counts, [f"{name}\n(n = {n})" for name, n in zip(names, counts.sum(1), strict=True)], names)
    return heat_table(table, fmt="{:.0f}", xlabel="called", ylabel="is", title=title, synthetic=synthetic)


@_styled
def reliability(y_true, probabilities):
    """Show observed against predicted share of pneumonia; `probabilities`: dict label -> float `(n,)` in [0, 1]."""
    figure, axis = plt.subplots(figsize=(4.6, 4.9))
    axis.plot([0, 1], [0, 1], color=FAINT, lw=1, ls=":")
    for label, probability in probabilities.items():
        predicted, observed, count = evaluate.reliability_curve(y_true, probability)
        error = evaluate.expected_calibration_error(y_true, probability)
        line, = axis.plot(predicted, observed, label=f"{label} (ECE {error:.3f})")
        axis.scatter(predicted, observed, s=12 + 250 * count / count.sum(), color=line.get_color(), alpha=0.6)
    axis.set(xlabel="predicted probability", ylabel="observed share of pneumonia", aspect="equal")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15))  # no corner is sure to be free
    return figure


@_styled
def forest(rows, *, reference=None, xlabel="AUC on test, 95 % interval", narrow=False):
    """Show estimates with their intervals, one a line, under a heading for each section; `narrow` for a phone.

    `rows`: list of dicts `label, value, low, high` (NaN limits draw the point alone) and, where wanted, `section`,
    `colour`, `seeds` (values drawn as small dots). `reference`: where a dotted vertical line stands, such as 0.
    """
    sections = dict.fromkeys(row.get("section", "") for row in rows)
    height = len(rows) + sum(bool(section) for section in sections)
    figure, axis = plt.subplots(figsize=(4.1, 0.9 + 0.46 * height) if narrow else (9, 0.9 + 0.3 * height))
    ticks, labels, across = [], [], {"transform": axis.get_yaxis_transform(), "va": "center"}
    wide = np.nanmax([abs(row[side] - (reference or 0)) for row in rows for side in ("value", "low", "high")])
    digits = 3 if wide > 0.005 else 4
    for section in sections:
        if section:
            axis.text(0, len(ticks), section, fontweight="bold", **across)
            ticks, labels = [*ticks, len(ticks)], [*labels, ""]
        for row in (row for row in rows if row.get("section", "") == section):
            y, colour = len(ticks), row.get("colour", NORMAL)
            seeds = row.get("seeds", [])
            axis.plot(seeds, [y + 0.24] * len(seeds), "o", color=colour, ms=2.5, alpha=0.6)
            axis.hlines(y, row["low"], row["high"], color=colour, lw=2.2)
            axis.plot(row["value"], y, "o", color=colour, ms=6.5, mec="white")
            text = "" if np.isnan(row["low"]) else f"  [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"
            axis.text(1 if narrow else 1.02, y - 0.38 * narrow, f"{row['value']:.{digits}f}{text}", fontsize=9,
                      ha="right" if narrow else "left", **across)
            if narrow:
                axis.text(0, y - 0.38, row["label"], **across)
            ticks, labels = [*ticks, y], [*labels, "" if narrow else row["label"]]
    if reference is not None:
        axis.axvline(reference, color=FAINT, lw=1, ls=":")
    axis.set_yticks(ticks, labels)
    axis.tick_params(axis="y", length=0)
    axis.set(ylim=(height - 0.4, -0.7), xlabel=xlabel)
    axis.grid(axis="y", visible=False)
    axis.spines["left"].set_visible(False)
    return figure


@_styled
def operating_points(y_true, y_score, thresholds, others=None):
    """Show sensitivity and specificity against the threshold of a probability, with the frozen `thresholds` marked.

    The axis is spaced by the logit, because most probabilities of a trained network crowd at 0 and 1.

    Args:
        others: dict label → `(n, 2)` sensitivities and specificities of other models; with them a second panel shows
            one against the other.
    """
    truth, place = np.asarray(y_true) == 1, lambda p: special.logit(np.clip(p, 1e-4, 1 - 1e-4))
    figure, axes = plt.subplots(1, 1 + bool(others), figsize=(12.4 if others else 6.8, 3.9), squeeze=False)
    axis = axes[0, 0]
    grid = np.linspace(place(0), place(1), 400)
    called = np.asarray(y_score)[:, None] >= special.expit(grid)
    axis.plot(grid, called[truth].mean(0), color=ABNORMAL, label="sensitivity")
    axis.plot(grid, 1 - called[~truth].mean(0), color=NORMAL, label="specificity")
    marks = {name: (place(value), f"{name} = {value:.3g}") for name, value in thresholds.items()}
    _mark(axis, marks, top=0.3, step=-0.07)
    ticks = [0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999]
    axis.set_xticks(place(ticks), ticks)
    axis.set(xlabel="threshold", ylabel="share of images", ylim=(-0.02, 1.02))
    axis.legend(loc="center left")
    if others:
        _trade(axes[0, 1], y_true, np.asarray(y_score), thresholds, others)
    return figure


def _trade(axis, y_true, y_score, thresholds, others):
    """Draw sensitivity against specificity: the curve of a score, its frozen thresholds, and points of other models."""
    false_positives, sensitivity, _ = metrics.roc_curve(y_true, y_score, drop_intermediate=False)
    axis.plot(1 - false_positives, sensitivity, color=INK, label="this model, every threshold")
    truth = np.asarray(y_true) == 1
    at = [((y_score[~truth] < cut).mean(), (y_score[truth] >= cut).mean()) for cut in thresholds.values()]
    axis.plot(*np.transpose(at), "o", color=INK, ms=8, label="at the thresholds on the left")
    for (label, points), marker in zip(others.items(), "s^DvPX", strict=False):
        axis.plot(*np.transpose(points)[::-1], marker, ms=6, alpha=0.8, mec="white", label=label)
    lowest, left = np.concatenate([*others.values(), np.array(at)[:, ::-1]]).min(axis=0)
    axis.set(xlabel="specificity", ylabel="sensitivity", xlim=(left - 0.05, 1.01),
             ylim=(lowest - 0.9 * (1.01 - lowest), 1.01))  # as much room below the points as they take, for the legend
    axis.legend(loc="lower left")


@_styled
def decision_curve(y_true, probabilities):
    """Show the net benefit of acting on each probability threshold; `probabilities`: dict label -> float `(n,)`."""
    cuts = np.linspace(0.01, 0.95, 95)
    figure, axis = plt.subplots(figsize=(6.8, 3.9))
    everybody = evaluate.net_benefit(y_true, np.ones(len(y_true)), cuts)
    axis.plot(cuts, everybody, color=FAINT, lw=1.4, label="act on everybody")
    axis.axhline(0, color=FAINT, lw=1.4, ls=":", label="act on nobody")
    for label, probability in probabilities.items():
        axis.plot(cuts, evaluate.net_benefit(y_true, probability, cuts), label=label)
    top = np.mean(y_true)
    axis.set(xlabel="probability at which one would act", ylabel="net benefit per patient")
    axis.set_ylim(-0.12 * top, 1.08 * top)
    axis.legend(loc="lower left")
    return figure

"""Figures of trust: what the probes do to each model, and which saliency checks each method passes. As `plots`."""

import matplotlib.pyplot as plt
import numpy as np

from cxr.plots import ABNORMAL, CYCLE, FAINT, _styled
from cxr.trust import SWEEPS

NUMBERS = ("auc", "sensitivity", "specificity")


@_styled
def probes(probed):
    """Show AUC, sensitivity and specificity at the frozen threshold under every probe, one colour a model.

    `probed`: dict model -> dict probe -> `{"auc", "sensitivity", "specificity", "unchanged"}` as of `trust.measure`.
    Sweeps are lines through the unchanged image (dotted); at the right each probe that is done or not done, drawn from
    the value of the unchanged images (small) to that of the changed ones (large).
    """
    single = list(dict.fromkeys(key.split(":")[0] for found in probed.values() for key in found
                                if key.split(":")[0] not in SWEEPS))
    figure, axes = plt.subplots(3, 5, figsize=(14.5, 8.2), sharey="row", sharex="col",
                                width_ratios=[1, 1, 1, 1, 2.4], squeeze=False)
    for number, row in zip(NUMBERS, axes, strict=True):
        for (name, found), colour, place in zip(probed.items(), CYCLE * 9, range(99), strict=False):
            for axis, (family, (usual, _)) in zip(row, SWEEPS.items(), strict=False):
                _sweep(axis, found, family, usual, number, colour)
            offset = (place - (len(probed) - 1) / 2) * 0.8 / len(probed)
            for x, probe in enumerate(single):
                if seen := found.get(f"{probe}:1"):
                    before, value = seen["unchanged"][number], seen[number]["value"]
                    row[-1].plot([x + offset] * 2, [before, value], color=colour, lw=1.3, alpha=0.7)
                    row[-1].plot(x + offset, before, "o", color=colour, ms=2.5)
                    row[-1].plot(x + offset, value, "o", color=colour, ms=6, mec="white", label=name if not x else None)
        row[0].set_ylabel({"auc": "AUC"}.get(number, number))
        row[0].set_ylim(-0.03, 1.03)
        row[-1].grid(axis="x", visible=False)
    for axis, (family, (_, unit)) in zip(axes[0], SWEEPS.items(), strict=False):
        axis.set_title(family)
        axes[2][list(SWEEPS).index(family)].set_xlabel(unit)
    axes[0][-1].set_title("done or not")
    axes[2][-1].set_xticks(range(len(single)), [probe.replace(" ", "\n") for probe in single], fontsize=9)
    figure.legend(*axes[0][-1].get_legend_handles_labels(), loc="outside upper right", ncols=len(probed))
    return figure


def _sweep(axis, found, family, usual, number, colour):
    """Draw one number of one model over one family of probes, with its interval."""
    points = sorted((float(key.split(":")[1]), seen) for key, seen in found.items() if key.startswith(f"{family}:"))
    x = [usual] + [strength for strength, _ in points]
    limits = [[seen[number][key] for _, seen in points] for key in ("value", "low", "high")]
    start = points[0][1]["unchanged"][number]
    order = np.argsort(x)
    x, value, low, high = (np.array(values, float)[order] for values in (x, *([start, *part] for part in limits)))
    axis.plot(x, value, "o-", color=colour, ms=3.5)
    axis.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
    axis.axvline(usual, color=FAINT, lw=1, ls=":")


@_styled
def checks(found, criteria):
    """Show which checks each saliency method passes: green passed, red failed, empty where a check has no meaning.

    `found`: dict method -> dict criterion -> `(value, passed)`; `criteria`: dict criterion -> what passes, as a text.
    """
    figure, axis = plt.subplots(figsize=(2.6 + 1.25 * len(criteria), 1.3 + 0.5 * len(found)))
    colours = {True: "#009E73", False: ABNORMAL, None: "#eef1f4"}
    for row, seen in enumerate(found.values()):
        for column, name in enumerate(criteria):
            value, passed = seen.get(name, (None, None))
            axis.add_patch(plt.Rectangle((column - 0.48, row - 0.45), 0.96, 0.9, color=colours[passed], lw=0))
            text = "–" if passed is None else f"{value:.2f}\n{'pass' if passed else 'fail'}".replace("nan", "blank")
            axis.text(column, row, text, ha="center", va="center", fontsize=9,
                      color=FAINT if passed is None else "white")
    axis.set_xticks(range(len(criteria)), [f"{name}\n{rule}" for name, rule in criteria.items()], fontsize=8.5)
    axis.set_yticks(range(len(found)), found)
    axis.set(xlim=(-0.55, len(criteria) - 0.45), ylim=(len(found) - 0.5, -0.5))
    axis.tick_params(length=0)
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)
    return figure

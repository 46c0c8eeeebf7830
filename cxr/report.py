"""The README's results and the HTML report, made from checked records; the tables are those of `cxr.tables`.

Nothing is chosen on test: the headline is the run group that `headline.json` names, or else the one with the highest
AUC on validation. Every figure and table of phantoms says so.
"""

import base64
import io
import json
import pathlib
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from cxr import compare, evaluate, pages, plots, records, trust, trustplots
from cxr.tables import (  # the one module whose names are passed on: a notebook needs `report` alone
    MIN_SEEDS,
    PAINTED,  # noqa: F401  notebook 10 asks for it
    best_on_validation,
    by_group,
    cohorts,
    comparisons,
    frames,
    load,
    pretty,
    published_points,
    reference_of,
    reported,
    reported_vs_measured,
    strategy_grid,
    table,
    threshold_of,
)

MARKERS = "<!-- results:begin -->", "<!-- results:end -->"
SYNTHETIC = "Synthetic phantoms, drawn by a program: these numbers test the code and say nothing about patients."


def headline(results_dir, rows):
    """Return `(run group, why)`: the group that `headline.json` names, else the best on validation, never on test."""
    if named := _named(results_dir).get("run_group"):
        if named not in rows.index:
            raise ValueError(f"{pathlib.Path(results_dir) / 'headline.json'} names {named!r}, which has no comparable "
                             f"record; there are {', '.join(rows.index)}.")
        return named, "named in headline.json"
    purpose = next(name for name in ("classify", "anomaly", "baseline") if (rows["purpose"] == name).any())
    able = rows[rows["purpose"] == purpose]
    able = able[able["split"] == "patient"] if (able["split"] == "patient").any() else able  # shared patients flatter
    group, column = best_on_validation(able)
    where = "the shifted validation images" if column == "shifted_auc" else "validation"
    return group, f"chosen by its AUC on {where} alone"


def _named(results_dir):
    path = pathlib.Path(results_dir) / "headline.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def markdown_table(rows, *, most=6):
    """Return `table` as a markdown table; of a notebook with many variants its reference and the best on validation."""
    parts = []
    for _, part in rows.groupby(rows["notebook"].where(rows["purpose"] != "baseline", ""), sort=True):
        keep = _worth(part).nlargest(most).index.union([reference_of(part)])
        parts.append(part[part.index.isin(keep)])
    shown = pretty(pd.concat(parts)).drop(columns=["val. AUC", "ECE"])
    left_out = len(rows) - len(shown)
    return (as_markdown(shown.columns, shown.to_numpy(), num_texts=2)
            + (f"\n\n{left_out} more variants stand in the report." if left_out else ""))


def beside_markdown(beside, metrics=("accuracy", "auc")):
    """Return the rows of `reported_vs_measured` in these metrics as a heading and a markdown table; nothing if none."""
    shown = beside[beside["metric"].isin(metrics)] if len(beside) else beside
    if not len(shown):
        return []
    rows = [(line.study, line.what, line.measured_as, line.split, line.seeds, line.metric.replace("auc", "AUC"),
             f"{line.reported:.3f}" + (f" ({line.low:.3f}–{line.high:.3f})" if line.low == line.low else ""),
             f"{line.measured:.3f}" + (f" ± {line.sd:.3f}" if line.sd == line.sd else ""),
             f"{line.smallest:.3f} – {line.largest:.3f}" if line.seeds > 1 else "–")
            for line in shown.dropna(subset="measured").itertuples()]
    return ["Reported beside measured, decisions at 0.5 as the studies took them:", as_markdown(
        ("study", "what it ran", "run here at", "split by", "seeds", "metric", "reported", "measured", "over seeds"),
        rows, num_texts=4)]


def as_markdown(head, rows, *, num_texts=None):
    """Return a table in markdown; the columns after the first `num_texts` are numbers and stand to the right."""
    texts = len(head) if num_texts is None else num_texts
    lines = [head, ["---"] * texts + ["---:"] * (len(head) - texts), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def answer(rows, group, why):
    """Return the headline as one sentence made of measured numbers."""
    row = rows.loc[group]
    spread = "" if pd.isna(row["auc_sd"]) else f" ± {row['auc_sd']:.3f}"
    seeds = "one seed" if row["seeds"] == 1 else f"mean of {row['seeds']} seeds"
    threshold = row["threshold"].replace("_", " ")
    return (f"“{row['variant']}” (notebook {row['notebook'][:2]}, {why}) has AUC {row['auc']:.3f}{spread} on the test "
            f"images ({seeds}; averaged score {row['averaged']:.3f}, 95 % interval {row['low']:.3f} to "
            f"{row['high']:.3f}). At “{threshold}”, frozen on validation: accuracy {row['accuracy']:.3f}, "
            f"sensitivity {row['sensitivity']:.3f}, specificity {row['specificity']:.3f}.")


def verdict(found, reference):
    """Return one sentence on a notebook's `comparisons` with its reference."""
    if found.empty:
        return "Nothing to compare within this notebook."
    parts = []
    for name, words in (("better", "Better"), ("worse", "Worse"), ("not shown", "No difference shown"),
                        ("too few seeds", f"Fewer than {MIN_SEEDS} seeds, so no claim")):
        listed = found[found["verdict"] == name].sort_values("difference", ascending=False)
        each = [f"{row.variant} ({row.difference:+.3f}, p {p_text(row.p_bootstrap)})" for row in listed.itertuples()]
        parts += [f"{words}: {', '.join(each)}."] if each else []
    return f"AUC against “{reference}” (corrected p). " + " ".join(parts).replace("-0.", "−0.")


def p_text(p):
    """Return a p value as a reader wants it."""
    return "< 0.001" if p < 0.001 else "–" if p != p else f"= {p:.3f}"


def update_readme(path, loaded):
    """Write the tables of results folders between the markers of the README at `path`; the rest stays as it is.

    `loaded`: dict folder -> what `load` gave.
    """
    blocks = []
    for folder, runs in loaded.items():
        data, threshold = runs[0]["data"], _named(folder).get("threshold", "sensitivity_95")
        rows = table(cohorts(runs)[0], threshold=threshold)
        blocks.append("\n\n".join([f"### {data['source']}", *([f"**{SYNTHETIC}**"] if data["synthetic"] else []),
                                   answer(rows, *headline(folder, rows)), markdown_table(rows),
                                   *beside_markdown(reported_vs_measured(runs))]))
    rewrite(path, "\n\n".join(blocks))


def rewrite(path, content):
    """Put `content` between the markers of the text at `path`; the rest stays as it is.

    Raises:
        ValueError: the markers do not stand there once each.
    """
    path, (begin, end) = pathlib.Path(path), MARKERS
    text = path.read_text()
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{path} needs the lines {begin} and {end} once each, around the generated results.")
    content = f"{begin}\n\n{content}\n\n{end}"
    records.write_atomic(path, re.sub(f"{begin}.*?{end}", lambda _: content, text, flags=re.DOTALL))


def html(results_dir, out_path, *, loaded=None):
    """Write the report of a results folder as one self-contained HTML file and return its path.

    `loaded`: what `load(results_dir)` gave, where the caller has it already (checking takes about half a second a run).
    """
    page = _page(results_dir, load(results_dir) if loaded is None else loaded)
    return pages.write(out_path, "report.html.j2", {"p": p_text}, **page)


def _picture(figure, caption, narrow=None):
    """Return a figure as a data URI with its caption, and close it; `narrow`: the same figure drawn for a phone."""
    buffer = io.StringIO()
    with plt.rc_context({"svg.hashsalt": "cxr"}):  # the same figure gives the same bytes
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    encoded = base64.b64encode(buffer.getvalue().encode()).decode()
    width = round(figure.get_figwidth() * (110 if narrow else 95))
    return {"src": f"data:image/svg+xml;base64,{encoded}", "caption": caption, "width": width,
            "narrow": narrow and _picture(narrow, caption)}


def _forest(rows, *, caption, **options):
    return _picture(plots.forest(rows, **options), caption, plots.forest(rows, narrow=True, **options))


def _worth(rows):
    """Return what picks rows: the AUC of a classifier on shifted validation images, of anything else on plain ones.

    A finished network that is scored on altered images has no shifted ones, and comes last.
    """
    return rows["shifted_auc"].where(rows["purpose"] == "classify", rows["val_auc"]).fillna(0)


def forest_rows(rows, loaded, *, most=6):
    """Return the rows of `plots.forest` for a `table`: trivial baselines, then notebook by notebook, `most` of each."""
    groups, drawn = by_group(loaded), []
    for (trained, notebook), part in rows.groupby([rows["purpose"] != "baseline", "notebook"], sort=False):
        best = _worth(part).nlargest(most).index.union([reference_of(part)])
        for row in part[part.index.isin(best)].itertuples():
            label = row.variant + (" (split by image)" if row.split == "image" else "")
            drawn.append({"label": label, "value": row.averaged, "low": row.low, "high": row.high,
                          "section": notebook.replace("_", " ") if trained else "trivial baselines",
                          "colour": plots.NORMAL if trained else plots.FAINT,
                          "seeds": [run["metrics"]["test"]["auc"]["value"] for run in groups[row.Index]]})
    return drawn


def curves(rows, loaded, *, chosen, most=5):
    """Return label -> seed-averaged test rows: the chosen group, each notebook's best on validation, a baseline."""
    groups = by_group(loaded)
    able = rows.assign(worth=_worth(rows))[rows["val_auc"].notna()].sort_values("worth", ascending=False)
    others = able[(able["purpose"] != "baseline") & (able["notebook"] != rows.loc[chosen, "notebook"])]
    first = others.groupby("notebook", sort=False).head(1).index
    baseline = able.index[able["purpose"] == "baseline"][:1]
    picked = list(dict.fromkeys([chosen, *first]))[:most - 1] + [name for name in baseline if name != chosen]
    return {f"{rows.loc[name, 'notebook'][:2]} {rows.loc[name, 'variant']}": compare.seed_average(frames(groups[name]))
            for name in picked}


def operating_table(runs):
    """Return, for each frozen threshold of a run group, mean ± sd over seeds of what it gives on test, as strings."""
    def cell(values):
        values = np.array(values, float)
        return f"{values.mean():.3f}" + (f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else "")

    keys = ("sensitivity", "specificity", "accuracy", "ppv", "npv", "f1")
    names = {"ppv": "PPV", "npv": "NPV", "f1": "F1"}
    return pd.DataFrame([
        {"threshold": name.replace("_", " "), "value": cell([run["thresholds"][name] for run in runs]),
         **{key: cell([run["metrics"]["test"][f"{key}@{name}"]["value"] for run in runs]) for key in keys}}
        for name in runs[0]["thresholds"]]).rename(columns=names)


SCENARIOS = {"reading support": 0.95, "screening": 0.99}  # sensitivity wanted; study S1 has a network for each
PREVALENCES = 0.05, 0.2, 0.625  # of a practice, of a ward, of the test folder


def scenario_thresholds(average):
    """Return scenario → threshold of a seed-averaged score, from its shifted validation images where there are any."""
    parts = dict(list(average.groupby("split")))
    source = parts.get("val_shifted", parts["val"])
    return {name: evaluate.threshold_for_sensitivity(source["y_true"], source["y_score"], wanted)
            for name, wanted in SCENARIOS.items()}


def consequences(average):
    """Return what a seed-averaged score would do among 1,000 patients in each scenario, by its sensitivity on test."""
    test, rows = average[average["split"] == "test"], []
    for name, cut in scenario_thresholds(average).items():
        at = evaluate.metrics_with_intervals(test["y_true"], test["y_score"], test["patient_id"], {"cut": cut})
        at = {key: at[f"{key}@cut"] for key in ("sensitivity", "specificity")}
        sensitivity, specificity = (found.value for found in at.values())
        for prevalence in PREVALENCES:
            sick, well = 1000 * prevalence, 1000 - 1000 * prevalence
            counts = {"found": sick * sensitivity, "missed": sick * (1 - sensitivity),
                      "false alarms": well * (1 - specificity), "cleared": well * specificity}
            rows.append({"scenario": f"{name}, sensitivity {SCENARIOS[name]:g} on validation",
                         "threshold": f"{cut:.3f}", "prevalence": f"{prevalence:.1%}",
                         **{key: f"{found.value:.3f} ({found.low:.3f}–{found.high:.3f})" for key, found in at.items()},
                         **{f"{key} of 1,000": round(value) for key, value in counts.items()}})
    return pd.DataFrame(rows)


def _section(part, loaded, baselines, note, threshold):
    """One notebook: its table with the trivial baselines, what helped against its reference, and both as figures."""
    reference = reference_of(part)
    found = comparisons([run for run in loaded if run["group"] in part.index], reference, threshold=threshold)
    section = {"title": part["notebook"].iloc[0].replace("_", " "), "anomaly": (part["purpose"] == "anomaly").all(),
               "table": pretty(pd.concat([part, baselines])).drop(columns="notebook"), "comparisons": found,
               "reference": part.loc[reference, "variant"], "sentence": verdict(found, part.loc[reference, "variant"])}
    if len(found) > 1:
        ranked = found.rename(columns={"variant": "label", "difference": "value"}).drop(columns="seeds")
        section["figure"] = _forest(
            ranked.sort_values("value", ascending=False).to_dict("records"), reference=0, synthetic=note,
            xlabel=f"difference in AUC to “{section['reference']}”",
            caption="Difference in test AUC, 95 % interval over patients and seeds; right of the dots is better.")
    aucs, texts = strategy_grid(part, loaded)
    if len(aucs) > 1:
        section["grid"] = _picture(plots.heat_table(aucs, texts=texts, synthetic=note),
                                   "Test AUC of the seed-averaged score with its 95 % interval over patients.")
    return section


def _headline_figures(runs, average, note, threshold):
    """Operating points, confusion matrix, calibration and training curves of the headline's run group."""
    thresholds = evaluate.frame_thresholds(average, runs[0]["purpose"])
    test, name = average[average["split"] == "test"], threshold_of(runs[0], threshold)
    confusion = plots.confusion_matrix(test["y_true"], test["y_score"] >= thresholds[name], synthetic=note)
    found = {"confusion": _picture(confusion, f"Decisions of the seed-averaged score at “{name.replace('_', ' ')}”.")}
    if runs[0]["purpose"] == "classify":
        val = average[average["split"] == "val"]
        temperature = evaluate.fit_temperature(val["y_true"], val["y_score"])
        calibrated = evaluate.apply_temperature(test["y_score"], temperature)
        found["operating"] = _picture(
            plots.operating_points(test["y_true"], test["y_score"], thresholds, published_points(len(test)),
                                   synthetic=note),
            "Sensitivity and specificity on test for every threshold; dashed: thresholds frozen on validation. Where "
            "study S1 tested on as many images, its networks stand beside.")
        found["reliability"] = _picture(
            plots.reliability(test["y_true"], {"raw": test["y_score"], f"divided by {temperature:g}": calibrated},
                              synthetic=note), "Calibration on test; the temperature comes from validation.")
    if runs[0].get("history"):
        found["training"] = _picture(plots.training_curves({"": [run["history"] for run in runs]}, synthetic=note),
                                     "Training, thin lines: single seeds; thick: their mean.")
    return found


def _probes(loaded, group, note):
    """What the probes hold against each probed model, the headline's group first, and one figure of them all."""
    probed = sorted((run for run in loaded if "probes" in run),
                    key=lambda run: (not run["config"]["probed"].startswith(group), run["config"]["probed"]))
    if not probed:
        return {}
    names = {f"{run['config']['probed'][:2]} {run['variant']}, seed {run['seed']}": run for run in probed}
    against = {name: trust.findings(run["probes"]).items() for name, run in names.items()}
    rows = pd.DataFrame([{"model": name, "threshold": run["threshold"].replace("_", " "), "held against it": "; ".join(
        f"{probe}: {why}" for probe, why in against[name]) or "nothing"} for name, run in names.items()])
    figure = trustplots.probes({name: run["probes"] for name, run in list(names.items())[:6]}, synthetic=note)
    return {"table": rows, "headline": probed[0]["config"]["probed"].startswith(group), "figure": _picture(
        figure, "What each probe does at the frozen threshold; dotted: unchanged; right: from unchanged (small dot) to "
                "changed (large dot).")}


def _suspected(average, *, most=15):
    """Return how many labels of validation and test the headline denies, and the surest of them by image id."""
    found = trust.suspected_labels(average[average["split"].isin(["val", "test"])])
    shown = found.head(most)
    return {"count": len(found), "table": pd.DataFrame({
        "image": shown["image_id"], "split": shown["split"], "label": np.where(shown["y_true"], "pneumonia", "normal"),
        "probability of pneumonia": shown["y_score"].map("{:.3f}".format)})}


def _page(results_dir, loaded):
    """Everything the template shows, from checked records."""
    threshold = _named(results_dir).get("threshold", "sensitivity_95")
    data, (main, *others) = loaded[0]["data"], cohorts(loaded)
    note, rows = data["synthetic"], table(main, threshold=threshold)
    chosen, why = headline(results_dir, rows)
    sections = []
    for cohort in (main, *others):
        found = rows if cohort is main else table(cohort, threshold=threshold)
        trivial = found["purpose"] == "baseline"
        sections += [_section(part, cohort, found[trivial], note, threshold) | {"other_test_set": cohort is not main}
                     for _, part in found[~trivial].groupby(["purpose", "notebook"], sort=False)]
    shown, runs = curves(rows, main, chosen=chosen), by_group(main)[chosen]
    average = compare.seed_average([run["frame"] for run in runs])
    decides = runs[0]["purpose"] == "classify"
    pairs = {label: (test["y_true"], test["y_score"]) for label, test in shown.items()}
    name = threshold_of(runs[0], threshold)
    point = {next(iter(pairs)): {name: evaluate.frame_thresholds(average, runs[0]["purpose"])[name]}}
    negative = [(section["title"], section["reference"], row) for section in sections if len(section["comparisons"])
                for row in section["comparisons"].itertuples() if row.verdict in ("worse", "not shown")]
    return {
        "data": data, "note": SYNTHETIC if note else "", "answer": answer(rows, chosen, why), "row": rows.loc[chosen],
        "beside": reported_vs_measured(loaded),
        **{key: reported()[key] for key in ("claims", "references")},
        "forest": _forest(forest_rows(rows, main), reference=0.5, synthetic=note, xlabel="AUC on test",
                          caption="AUC of the seed-averaged score on test with its 95 % interval over patients; small "
                                  "dots: single seeds; grey: no training at all; dotted line: chance."),
        "curves": _picture(plots.roc_and_precision_recall(pairs, thresholds=point, synthetic=note),
                           "Seed-averaged scores on test; the dot is the headline at its threshold."),
        "probes": _probes(loaded, chosen, note), "figures": _headline_figures(runs, average, note, threshold),
        "operating": operating_table(runs), "sections": sections,
        **({"consequences": consequences(average), "suspected": _suspected(average)} if decides else {}),
        "negative": negative, "records": loaded, "num_groups": len(by_group(loaded)), "num_test": runs[0]["num_test"],
        "calibration": {key: np.mean([run["calibration"][key] for run in runs]) for key in runs[0]["calibration"]},
    }

"""The model card's numbers: what each published model is, what it gives at its frozen thresholds, what probes do to it.

Made from checked records alone, like every table; the words around the block are written by hand.
"""

import json
import pathlib

from cxr import report, trust


def update(path, *results_dirs):
    """Write the numbers of every published model between the markers of the model card at `path`."""
    blocks = [block for folder in results_dirs for block in blocks_of(folder)]
    report.rewrite(path, "\n\n".join(blocks or ["No model is published yet: `make publish`."]))


def blocks_of(results_dir):
    """Return one markdown block for each `models/*.json` of a results folder, its records checked first."""
    root = pathlib.Path(results_dir)
    abouts = [json.loads(path.read_text()) for path in sorted(root.glob("models/*.json"))]
    if not abouts:
        return []
    names = ("09", *{about["run_id"] for about in abouts})
    loaded = {record["run_id"]: record for record in report.load(root, notebooks=names)}
    probed = {record["config"]["probed"]: record for record in loaded.values() if "probes" in record}
    return [_block(about, loaded[about["run_id"]], root / "models" / f"{about['run_id']}.keras",
                   probed.get(about["run_id"])) for about in abouts]


def _block(about, record, file, probed):
    data, config, side = record["data"], record["config"], about["image_size"]
    counts = ", ".join(f"{data['num_images'][split]:,} images of {data['num_patients'][split]:,} patients ({split})"
                       for split in ("train", "val", "test"))
    facts = {"network": f"{config.get('backbone') or config['model']}, {record['num_parameters']:,} parameters",
             "trained": f"{config.get('strategy') or 'whole'}, from {config.get('weights') or 'random weights'}",
             "input": f"one grey image, {side} × {side}, squeezed; scaling inside the file",
             "data": f"{data['source']}{' (synthetic phantoms)' if data['synthetic'] else ''}: {counts}",
             "seed": record["seed"], "file": f"{file.name}, {file.stat().st_size / 1e6:.1f} MB",
             "decides at": f"{about['threshold']} = {about['thresholds'][about['threshold']]:.4g}"}
    parts = [f"### {about['run_id']}", report.as_markdown(["what", "value"], facts.items())]
    test, cells = record["metrics"]["test"], []
    for name in record["thresholds"]:
        cells.append([name.replace("_", " "), f"{record['thresholds'][name]:.4g}",
                      *(_interval(test[f"{key}@{name}"]) for key in ("accuracy", "sensitivity", "specificity", "ppv"))])
    parts += [f"On the {test['auc']['n']} test images (95 % intervals over patients): AUC {_interval(test['auc'])}, "
              f"average precision {_interval(test['average_precision'])}.",
              report.as_markdown(["threshold", "value", "accuracy", "sensitivity", "specificity", "PPV"], cells),
              "Calibration on test: expected error {ece:.3f}, Brier score {brier:.3f}; after division by the "
              "temperature {temperature:g} from validation {ece_calibrated:.3f} and {brier_calibrated:.3f}."
              .format_map(record["calibration"])]
    return "\n\n".join([*parts, *_probes(probed)])


def _probes(probed):
    if probed is None:
        return ["Probes: not run on this model yet (notebook 09)."]
    against = trust.findings(probed["probes"])
    rows = []
    for name, found in probed["probes"].items():
        probe, _, strength = name.partition(":")
        rows.append([f"{probe} {strength}" if probe in trust.SWEEPS else probe, found["auc"]["n"],
                     f"{found['unchanged']['auc']:.3f}",
                     *(_interval(found[key]) for key in ("auc", "sensitivity", "specificity"))])
    return [f"Probes at “{probed['threshold'].replace('_', ' ')}”. Held against it: "
            f"{'; '.join(f'{name} ({why})' for name, why in against.items()) or 'nothing'}.",
            report.as_markdown(["probe", "images", "AUC before", "AUC", "sensitivity", "specificity"], rows)]


def _interval(estimate):
    if estimate["value"] is None:
        return "–"
    return f"{estimate['value']:.3f} ({estimate['low']:.3f}–{estimate['high']:.3f})"

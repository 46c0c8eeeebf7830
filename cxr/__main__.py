"""The command line, `python -m cxr`: exit status 0 done, 1 findings that invalidate a result, 2 unusable input."""

import argparse
import inspect
import json
import sys


def main(arguments=None):
    """Run one command and return its exit status; bad input becomes one message on stderr."""
    options = vars(_parser().parse_args(arguments))
    command = options.pop("command")
    try:
        return command(**options)
    except (ValueError, OSError, ImportError, MemoryError) as error:
        system = isinstance(error, OSError) and error.filename  # ours carry a message, the system's a path and a reason
        message = f"{error.filename}: {error.strerror}; check the path and its permissions." if system else error
        print(f"cxr: {message}", file=sys.stderr)
        return 2


def _parser():
    parser = argparse.ArgumentParser("cxr", description="A chest X-ray lab: research and teaching, not diagnosis.")
    commands = parser.add_subparsers(required=True, metavar="{phantom,audit,predict,evaluate,export,report}")
    _phantom_parser(commands.add_parser("phantom", help="write a set of synthetic chest X-rays"))
    audit = commands.add_parser("audit", help="look for copies, shared patients, unreadable files and shortcuts")
    audit.add_argument("source", help="phantom, kaggle, pneumoniamnist, a folder or .npz, or several joined by ':'")
    audit.add_argument("--json", metavar="FILE", help="also write what was found as JSON")
    audit.add_argument("--cache", metavar="DIR", help="where decoded images are kept (default: runs/cache)")
    audit.set_defaults(command=_audit)
    predict = commands.add_parser("predict", help="score images with a trained model: table, heatmaps, warnings")
    predict.add_argument("paths", nargs="+", metavar="PATH", help="images (JPEG, PNG, DICOM …) or folders of them")
    predict.add_argument("--out", metavar="DIR", default="predictions", help="folder of the results (%(default)s)")
    predict.set_defaults(command=_predict)
    evaluate = commands.add_parser("evaluate", help="score a labelled set with a model and its frozen thresholds")
    evaluate.add_argument("source", help="as for audit; not the set that the model was trained on")
    evaluate.add_argument("--out", metavar="DIR", default="runs/external", help="folder of the record (%(default)s)")
    evaluate.set_defaults(command=_evaluate)
    export = commands.add_parser("export", help="write a model as ONNX beside its .keras file")
    export.set_defaults(command=_export)
    for parser_with_model in (predict, evaluate, export):
        parser_with_model.add_argument("--model", required=True, metavar="RUN_ID_OR_FILE",
                                       help="run id of an exported model, or its .keras file")
    report = commands.add_parser("report", help="check records against their predictions and make their tables")
    report.add_argument("results", nargs="*", help="folders with records/ and predictions/")
    report.add_argument("--readme", metavar="FILE", help="rewrite the results between this file's markers")
    report.add_argument("--card", metavar="FILE", help="rewrite the numbers of published models between its markers")
    report.add_argument("--pages", action="store_true", help="write report.html into each folder")
    report.set_defaults(command=_report)
    return parser


def _phantom_parser(parser):
    """Give every knob of `phantom.write` an option of its name."""
    from cxr import phantom

    parser.add_argument("directory", nargs="?", help="folder to make")
    parser.add_argument("--gallery", metavar="FILE", help="also write a labelled picture of each kind of film")
    for name, knob in list(inspect.signature(phantom.write).parameters.items())[1:]:
        kind = float if knob.default is None else type(knob.default)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=knob.default, help="(%(default)s)")
    parser.set_defaults(command=_phantom)


def _phantom(directory, gallery, **knobs):
    from cxr import phantom

    if not directory and not gallery:
        raise ValueError("phantom: expected a folder to write, or --gallery FILE.")
    if directory:
        summary = phantom.write(directory, **knobs)
        print(f"{directory}: " + "; ".join(f"{split} " + ", ".join(f"{label} {n}" for label, n in counts.items() if n)
                                           for split, counts in summary["images"].items()))
    if gallery:
        phantom.gallery(gallery, seed=knobs["seed"])
        print(gallery)
    return 0


def _audit(source, json, cache):
    from cxr import audit, data, records

    found = audit.audit(data.load_manifest(source, cache_dir=cache), cache_dir=cache)
    if json:
        records.write_atomic(json, _dumps(found))
    print(audit.format_table(found))
    return audit.exit_code(found)


def _predict(paths, model, out):
    from cxr import deploy, predict

    files = predict.find_files(paths, out)
    network, about = deploy.load(model)
    table = predict.score_files(files, network, about, out)
    page = predict.write_page(table, about, out)
    failed = table["error"].ne("")
    for row in table[failed].itertuples():
        print(f"{row.file}: {row.error}", file=sys.stderr)
    print(f"{len(table)} files: {(~failed).sum()} scored, {failed.sum()} failed, "
          f"{table['out_of_distribution'].eq(True).sum()} with a warning; {page}")
    print("Research and teaching, not diagnosis.")
    return int(failed.all())


def _evaluate(source, model, out):
    from cxr import deploy, predict

    network, about = deploy.load(model)
    record = predict.external(source, network, about, out)
    for name in ("auc", *(f"{metric}@{about['threshold']}" for metric in ("accuracy", "sensitivity", "specificity"))):
        found = record["metrics"][name]
        print(f"{name}: {found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f}), n = {found['n']}")
    left_out = {name: record["data"][name] for name in ("unreadable", "ignored", "dropped") if record["data"][name]}
    if left_out:
        print(f"left out: {_dumps(left_out).strip()}")
    if not record["data"]["copies_recognised"]:
        print(f"{about['run_id']} was exported when files were decoded otherwise: pictures that it has learnt from may "
              "be among these. Run the notebook that trained it once more to know.")
    print(f"{out}/{record['run_id']}.json")
    return 0


def _export(model):
    from cxr import deploy

    print(deploy.to_onnx(deploy.find(model)))
    return 0


def _dumps(value):
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def _report(results, readme, card, pages):
    from cxr import card as model_card
    from cxr import report

    if not (readme or card or pages):
        raise ValueError("report: expected --readme FILE, --card FILE or --pages.")
    loaded = {folder: report.load(folder) for folder in results if readme or pages}
    if readme:
        report.update_readme(readme, loaded)
    if card:
        model_card.update(card, *results)
    written = [f"{folder}/report.html" for folder in results if pages]
    for folder, path in zip(results, written, strict=False):
        report.html(folder, path, loaded=loaded[folder])
    print("\n".join(filter(None, (readme, card, *written))))
    return 0


if __name__ == "__main__":
    sys.exit(main())

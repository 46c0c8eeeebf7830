"""`make reproduce` killed, called twice at once, short of memory: the records are those of an undisturbed run.

`make test` runs this after the notebooks. The calls are real, in a copy of the working tree with one small notebook.
"""

import contextlib
import glob
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import time

import nbformat
import psutil
import pytest

from cxr import phantom, records

ROOT = pathlib.Path(__file__).parents[1]
KILLS = 20
CALL = ["make", "-o", ".venv/.ready", "reproduce", "NOTEBOOKS=02", "DATA=small", "NUM_SEEDS=2", "EPOCHS=3"]
CELLS = ['PROFILE = "smoke"\nSEED = 0\nDATA = "phantom"\nEPOCHS = None\nIMAGE_SIZE = None\nNUM_SEEDS = None', """
import keras
from cxr import config, plots, report, train
run = config.start("02_survival", profile=PROFILE, data=DATA, seed=SEED, num_seeds=NUM_SEEDS, epochs=EPOCHS)
def tiny(size, augmentation):
    pixels = keras.Input((size, size, 1))
    found = keras.layers.Conv2D(4, 3, 2, activation="relu")(keras.layers.Rescaling(1 / 255)(pixels))
    found = keras.layers.GlobalAveragePooling2D()(keras.layers.Dropout(0.2)(found))
    return keras.Model(pixels, keras.layers.Dense(1, activation="sigmoid")(found))
recipe = train.Recipe("tiny", **run.cap(image_size=32, epochs=3), batch_size=16, learning_rate=3e-3)
runs = train.repeat(run, "killed", recipe, tiny)
figure = plots.training_curves({"killed": [record["history"] for record in runs]}, title="Killed", synthetic=True)
run.save_figure(figure, "training")
print(len(report.load(run.results, intervals=False)), "records")"""]
pytestmark = pytest.mark.smoke


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the working tree whose notebook 02 trains two small networks on a few phantoms."""
    tree = tmp_path_factory.mktemp("survival") / "tree"
    shutil.copytree(ROOT / "cxr", tree / "cxr", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Makefile", tree)
    (tree / ".venv").symlink_to((ROOT / ".venv").resolve())
    parameters, rest = map(nbformat.v4.new_code_cell, CELLS)
    parameters.metadata["tags"] = ["parameters"]
    kernel = {"name": "python3", "language": "python", "display_name": "Python 3"}
    book = nbformat.v4.new_notebook(cells=[parameters, rest], metadata={"kernelspec": kernel})
    (tree / "notebooks").mkdir()
    nbformat.write(book, tree / "notebooks" / "02_survival.ipynb")
    phantom.write(tree / "small", num_train=80, num_val=8, num_test=40, size=64, duplicates=0, near_duplicates=0)
    return tree


def start(tree, log, *more):
    """Start one call in a session of its own; one thread a step, so that equal seeds give equal bits."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "CXR_"))}
    threads = {"TF_NUM_INTRAOP_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)}
    return subprocess.Popen([*CALL, *more], cwd=tree, env=clean | threads, start_new_session=True, stdout=log,
                            stderr=subprocess.STDOUT)


def finish(tree, *, calls=1):
    """Run `calls` at once to the end, and return what `results_of` finds."""
    log = tree / "log.txt"
    with open(log, "w") as file:
        running = [start(tree, file) for _ in range(calls)]
        codes = [process.wait(timeout=900) for process in running]
    assert codes == [0] * calls, log.read_text()[-3000:]
    return results_of(tree)


def results_of(tree):
    """Return what a run gave, by run id: the record without times and environment, and its model's existence."""
    run = tree / "runs" / "smoke-small"
    found = {}
    for path in sorted((run / "results" / "records").glob("*.json")):
        record = records.read_record(path, root=run / "results")  # checks the predictions against their hash
        found[path.stem] = {key: record[key] for key in record.keys() - {"seconds", "environment", "sha256"}}
        assert (run / "models" / f"{path.stem}.keras").is_file()
    return found


def forget(tree):
    time.sleep(2)  # a kernel whose parent is gone ends within a second
    shutil.rmtree(tree / "runs", ignore_errors=True)


@pytest.fixture(scope="module")
def undisturbed(tree):
    """The records of one run that nobody disturbed, and how many seconds it took."""
    began = time.monotonic()
    found = finish(tree)
    seconds = time.monotonic() - began
    assert len(found) == 2
    return found, seconds


def kill(process, *, kernel):
    """Kill the whole group; and the notebook's kernel, a session of its own, at once or only when it notices."""
    everyone = psutil.Process(process.pid).children(recursive=True) if kernel else []
    os.killpg(process.pid, signal.SIGKILL)
    for child in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()


def everything_is_readable(tree, expected):
    """Check what a reader would find at this moment: whole records only, equal to the undisturbed ones."""
    for path in map(pathlib.Path, glob.glob(f"{tree}/runs/**/*.json", recursive=True)):
        with contextlib.suppress(FileNotFoundError):  # a kernel has up to a second to notice, and removes its backup
            text = path.read_text()
            json.loads(text.partition("\n")[2] if path.name.startswith("facts-") else text)
    for name, record in results_of(tree).items():
        assert record == expected[name]


def test_two_calls_at_once_do_each_other_no_harm(tree, undisturbed):
    forget(tree)
    assert finish(tree, calls=2) == undisturbed[0]


def test_of_two_calls_with_other_parameters_the_overtaken_one_says_so(tree):
    forget(tree)
    slow, begun = tree / "papermill", tree / "begun"  # writes what papermill would, once the second call has begun
    slow.write_text(f"""#!/bin/bash
touch {begun}
until grep -q "NUM_SEEDS 1" {tree}/runs/smoke-small/.parameters; do sleep 0.1; done
echo "$*" > "${{@: -1}}"
""")
    slow.chmod(0o755)
    with open(tree / "log.txt", "w") as log:
        calls = []
        for seeds in (2, 1):
            calls.append(start(tree, log, f"PAPERMILL={slow}", f"NUM_SEEDS={seeds}"))
            while not begun.exists() and calls[-1].poll() is None:
                time.sleep(0.1)
        assert [call.wait(100) for call in calls] == [2, 0]
    assert "other parameters" in (tree / "log.txt").read_text()
    made, = (tree / "runs" / "smoke-small" / "notebooks").glob("[!.]*.ipynb")
    assert "NUM_SEEDS 1" in made.read_text()


def test_killed_at_any_moment_the_records_are_those_of_an_undisturbed_run(tree, undisturbed):
    expected, seconds = undisturbed
    moments, kills = random.Random(0), 0
    forget(tree)
    while kills < KILLS:
        with open(tree / "log.txt", "w") as log:
            process = start(tree, log)
        moment, began = moments.uniform(0, seconds), time.monotonic()
        try:
            assert process.wait(moment) == 0, (tree / "log.txt").read_text()[-3000:]
            assert results_of(tree) == expected
            seconds = min(seconds, 1.5 * (time.monotonic() - began))  # other work on the machine may have ended
            forget(tree)  # this call came to its end: the next begins anew
        except subprocess.TimeoutExpired:
            kill(process, kernel=kills % 2)
            kills += 1
            everything_is_readable(tree, expected)
            print(f"kill {kills} at {moment:.1f} of {seconds:.1f} s, records: {len(results_of(tree))}", flush=True)
    assert finish(tree) == expected
    assert not list((tree / "runs").rglob("*.failed.ipynb")) and not list((tree / "runs").rglob("*.running.ipynb"))

"""Tables about speed and size say what was measured."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import scaling  # noqa: E402


def test_the_plan_is_made_of_committed_measurements():
    _, _, rest = scaling.DOC.read_text().partition(scaling.BEGIN)
    assert rest.partition(scaling.END)[0].strip() == scaling.tables(), "python benchmarks/scaling.py --tables"


def test_a_set_twice_as_large_takes_twice_as_long_and_more_for_near_duplicates():
    rate = {key: value for key, _, value, _ in scaling.rates()}
    about = scaling.SETS["NIH ChestX-ray14"]
    small, large = (scaling.hours(about | {"images": n}, rate) for n in (100_000, 200_000))
    for step in small:
        factor = large[step] / small[step]
        assert factor > 2.01 if step.startswith("near") else factor == pytest.approx(2)


def test_importing_it_costs_no_keras():
    code = "import sys, scaling; assert not {'keras', 'numpy', 'cxr'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT / "benchmarks")


def test_all_results_are_of_one_machine():
    """`make bench` makes them in one go; a ratio from another processor would not belong into the same table."""
    machines = [json.loads(path.read_text())["machine"] for path in scaling.RESULTS.glob("*.json")]
    assert len(machines) == 9
    for fact in ("cpu", "cores", "python", "keras", "numpy", "opencv"):
        assert len({machine[fact] for machine in machines}) == 1, fact


def test_the_readme_shows_the_ratios_of_the_results():
    results = {path.stem: json.loads(path.read_text()) for path in scaling.RESULTS.glob("*.json")}
    gans, decode = results["gan"]["gans"], results["decode"]["times_as_fast_as"]
    measured = [results["training"]["networks"][name]["times_as_fast_as_pytorch"] for name in ("seed_cnn", "lab_cnn")]
    measured += [results["anomaly"]["training"]["times_as_fast_as_pytorch"]]
    measured += [gans[precision][name]["times_as_fast_as_pytorch"]
                 for precision in ("float32", "mixed_bfloat16") for name in ("seed_dcgan", "lab_dcgan")]
    measured += [results["transfer"]["strategies"][name][ratio] for name in ("frozen", "partial")
                 for ratio in ("times_as_fast", "times_as_fast_as_whole")]
    measured += [decode["keras grey"]["decode"], decode["keras rgb"]["decode"], round(decode["keras grey"]["cached"])]
    measured += [results["audit"]["times_as_fast"], results["audit"]["enlarged"]["times_as_fast"]]
    section = (ROOT / "README.md").read_text().partition("## Speed")[2].partition("\n## ")[0]
    shown = [float(value) for value in re.findall(r"\| ([\d.]+) \| `\w+\.py` \|", section)]
    assert shown == measured

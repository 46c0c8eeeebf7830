"""Every notebook keeps the conventions of notebooks/README.md."""

import json
import os
import pathlib
import re
import subprocess

import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
PARAMETERS = {"PROFILE": "smoke", "SEED": 0, "DATA": "phantom", "EPOCHS": None, "IMAGE_SIZE": None, "NUM_SEEDS": None}


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def cells(path):
    return nbformat.read(path, as_version=4).cells


def code(cells):
    return [cell for cell in cells if cell.cell_type == "code"]


def tagged(cells, tag):
    return [cell for cell in cells if tag in cell.metadata.get("tags", [])]


def test_there_are_notebooks():
    assert {"01_dedup_augment", "02_baseline_cnn", "10_comparison_report"} <= {path.stem for path in NOTEBOOKS}


def test_title_cell_says_what_a_reader_needs(cells, path):
    title = cells[0].source
    assert title.startswith(f"# {path.stem[:2]} · ")
    for words in ("**Question.**", "**Needs.**", "**Time.**", "not for diagnosis", f"notebooks/{path.name})"):
        assert words in title, f"the title cell lacks {words!r}"


def test_parameters_are_literals_the_makefile_passes(cells):
    (cell,) = tagged(cells, "parameters")
    found = {}
    exec(cell.source, {}, found)  # literals only: nothing to import, nothing to call
    assert found == PARAMETERS
    makefile = (ROOT / "Makefile").read_text()
    for name in PARAMETERS:
        assert re.search(rf"-p {name} |\b{name}\b.*,\$\(if \$\(\$\(name\)\)", makefile), (
            f"the Makefile does not pass {name}"
        )


@pytest.mark.parametrize(("card", "jobs"), [("143771\n143771", 4), ("40960", 2), ("15360", 1), ("It has failed", 1)])
def test_as_many_notebooks_side_by_side_as_a_gpu_has_room_for(tmp_path, card, jobs):
    command = tmp_path / "nvidia-smi"
    command.write_text(f"#!/bin/sh\necho '{card}'\n")
    command.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name not in ("JOBS", "MAKEFLAGS")}
    rule = "show: ; @echo $(JOBS) $${JAX_COMPILATION_CACHE_DIR-none}"
    shown = subprocess.run(["make", "-s", "--eval", rule, "show", "CORES=16"], cwd=ROOT, text=True, check=True,
                           env=environment | {"PATH": f"{tmp_path}:{environment['PATH']}"}, capture_output=True)
    assert shown.stdout.split() == [str(jobs), str(ROOT / "runs/cache/jax")]


@pytest.mark.parametrize(("backend", "has", "lacks"),
                         [("jax", "jax", "tensorflow"), ("tensorflow", "tensorflow", "jax")])
def test_the_environment_holds_the_backend_that_is_asked_for(backend, has, lacks):
    """What pip would be given, with the files that it names: `make` prints its commands, and bash reads the files."""
    shown = subprocess.run(["make", "-n", "-W", "requirements.txt", "setup", f"KERAS_BACKEND={backend}"], cwd=ROOT,
                           text=True, capture_output=True, check=True).stdout.replace("\\\n", " ")
    command = next(line for line in shown.splitlines() if "-m pip" in line and " -r " in line)
    program = "pip() { while [ $# -gt 0 ]; do [ \"$1\" = -r ] && cat \"$2\" && shift; shift; done; }; "
    listed = subprocess.run(["bash", "-c", program + "pip " + command.partition("--quiet")[2]], cwd=ROOT, text=True,
                            capture_output=True, check=True).stdout
    wanted = listed + (ROOT / "requirements.txt").read_text() * ("-r requirements.txt" in listed)
    names = {line.partition(">")[0] for line in wanted.splitlines()}
    assert {has, "keras", "papermill", "pytest"} <= names and lacks not in names


@pytest.mark.parametrize(("call", "says"), [(["-n", "reproduce", "NOTEBOOKS=02 99"], "No notebook matches 99"),
                                            (["-n", "reproduce", "NOTEBOOKS=1"], "No notebook matches 1"),
                                            (["-o", ".venv/.ready", "publish"], "A full run is what is published")])
def test_make_refuses_what_it_could_only_do_in_part(call, says):
    environment = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
    shown = subprocess.run(["make", *call], cwd=ROOT, env=environment, text=True, capture_output=True, check=False)
    assert shown.returncode == 2 and says in shown.stderr


def test_one_checked_cell_with_an_output_to_compare(cells):
    checked = tagged(cells, "nbval-check-output")
    assert checked, "no cell is compared by nbval"
    for cell in checked:
        assert cell.outputs and cell.execution_count, "nbval compares nothing in a cell without outputs: make notebooks"
        assert not re.search(r"\d\.\d{2,}", cell.outputs[0].get("text", "")), "floats differ between machines"


def test_length(cells, path):
    assert len(cells) <= 40
    assert path.stat().st_size <= 250_000
    for cell in code(cells):
        assert cell.source.count("\n") < 20, cell.source
        assert not re.search(r"^\s*(class |!|%)|warnings\.filterwarnings", cell.source, re.MULTILINE), cell.source


def test_no_error_no_stderr_and_no_path_of_a_machine(cells):
    for cell in code(cells):
        for output in cell.outputs:
            assert output.output_type != "error", output.get("evalue")
        text = json.dumps([cell.source, [output for output in cell.outputs if "data" not in output]])
        assert not re.search(r"(?<![\w.])/(home|root|work|tmp|Users)/", text), cell.source


def test_executed_in_order(cells):
    counts = [cell.execution_count for cell in code(cells)]
    assert counts == list(range(1, len(counts) + 1)), "run the notebook from top to bottom: make notebooks"


def test_ends_with_an_answer_without_typed_numbers(cells):
    text = [cell.source for cell in cells if cell.cell_type == "markdown"]
    assert any(source.startswith("## Answer") for source in text[-3:])
    assert not re.search(r"0\.\d|\d\s*%", text[-1]), "numbers in the answer come from records, not from typing"


def test_listed_in_the_index(path):
    assert path.name in (ROOT / "notebooks" / "README.md").read_text()

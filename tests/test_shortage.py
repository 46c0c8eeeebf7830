"""Disk full, folder read-only, memory short: one clear error that names the file, and what is finished stays whole."""

import os
import shutil
import subprocess
import sys

import cv2
import keras
import numpy as np
import pytest

from cxr import __main__ as cli
from cxr import data, records
from tests.test_data import TWO, environment, plant
from tests.test_records import run, scores  # noqa: F401  a fixture


@pytest.fixture
def disk(tmp_path):
    """A file system of half a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", folder]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system can only be mounted by root")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder, *, leave=0):
    """Write until the disk is full but for `leave` bytes; return the file to remove."""
    free = shutil.disk_usage(folder).free - leave
    (folder / "full").write_bytes(bytes(free - free % 4096))
    return folder / "full"


def files(folder):
    return {path for path in folder.rglob("*") if path.is_file()}


def on(run, folder):  # noqa: F811
    object.__setattr__(run, "directory", folder)
    return run


def test_a_full_disk_keeps_finished_records_and_the_next_call_goes_on(run, disk):  # noqa: F811
    run = on(run, disk)  # noqa: F811
    first = run.save("a", {}, 0, scores(run))
    full = fill(disk)
    before = files(disk)
    with pytest.raises(OSError, match="No space.*Free space.*call again") as caught:
        run.save("a", {}, 1, scores(run, seed=1))
    assert str(disk / "results") in str(caught.value) and files(disk) == before
    assert run.records() == [first]
    full.unlink()
    second = run.save("a", {}, 1, scores(run, seed=1))
    assert run.records() == [first, second]


def test_a_read_only_folder_is_named_and_its_records_are_read(run, disk):  # noqa: F811
    run = on(run, disk)  # noqa: F811
    first = run.save("a", {}, 0, scores(run))
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(OSError, match="cannot be written.*mend the permissions") as caught:
        run.save("a", {}, 1, scores(run, seed=1))
    assert str(disk / "results") in str(caught.value)
    assert run.once(first["run_id"], lambda: pytest.fail("trained again")) == first
    with pytest.raises(PermissionError, match="disk.*cache cannot be written.*mend"):
        data.cache_folder(disk / "cache")


@pytest.mark.parametrize("leave", [0, 65536])
@pytest.mark.parametrize("name", ["a.keras", "1.weights.h5", "1.npz"])
def test_a_model_is_saved_whole_or_not_at_all(disk, name, leave):
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(900)])  # 230 kB
    save = {"a.keras": model.save, "1.weights.h5": model.save_weights,
            "1.npz": lambda path: np.savez(path, *model.get_weights())}[name]  # as a backup is written
    full = fill(disk, leave=leave)
    with pytest.raises(OSError, match="cannot be written") as caught:
        records.save_atomic(save, disk / name)
    assert name in str(caught.value) and files(disk) == {full}
    full.unlink()
    records.save_atomic(save, disk / name)
    assert files(disk) == {disk / name}


def test_decoded_images_that_do_not_fit_leave_nothing(disk, tmp_path):
    small = plant(tmp_path / "small", *TWO)
    manifest = data.load_manifest(small, cache_dir=disk)
    before = files(disk)
    with pytest.raises(OSError, match=r"images-512-.*\.npy: cannot be written \(No space"):
        data.load_images(manifest, 512, cache_dir=disk)
    assert files(disk) == before
    assert len(data.load_images(manifest, 32, cache_dir=disk)) == len(TWO)


def test_the_command_line_says_it_in_one_line(disk, tmp_path, capsys):
    fill(disk)
    assert cli.main(["audit", str(plant(tmp_path / "small", *TWO)), "--cache", str(disk / "cache")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and str(disk / "cache") in said[0] and "Free space" in said[0]


def test_a_limit_on_file_size_is_named_for_everyone(run, tmp_path):  # noqa: F811
    """As a full disk, without root: a quota of 100 bytes a file."""
    program = ("import resource, sys\nfrom cxr import records\nresource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
               "records.write_atomic(sys.argv[1], 'short')\n"
               "try:\n    records.write_atomic(sys.argv[1], 'x' * 1000)\nexcept OSError as error:\n    print(error)")
    path = tmp_path / "new" / "record.json"
    done = subprocess.run([sys.executable, "-c", program, path], check=True, capture_output=True, text=True,
                          env=environment())
    assert str(path) in done.stdout and "cannot be written" in done.stdout
    assert path.read_text() == "short" and files(path.parent) == {path}


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory in use is read from /proc")
def test_too_little_memory_names_the_image_and_leaves_none_out(tmp_path):
    small = plant(tmp_path / "small", *TWO)
    large = small / "train" / "NORMAL" / "large.png"
    large.write_bytes(cv2.imencode(".png", np.zeros((8000, 9000), np.uint8))[1].tobytes())
    program = ("import re, resource, sys\nfrom cxr import __main__ as cli, audit, data\n"
               "used = int(re.search(r'VmSize:\\s+(\\d+)', open('/proc/self/status').read())[1]) << 10\n"
               "resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20),) * 2)\n"
               "data._threads = lambda function, items, what: map(function, items)\n"  # stacks would take the room
               "sys.exit(cli.main(['audit', sys.argv[1], '--cache', sys.argv[2]]))")
    limited = [sys.executable, "-c", program, small, tmp_path / "cache"]
    done = subprocess.run(limited, capture_output=True, text=True, env=environment())
    assert done.returncode == 2 and str(large) in done.stderr and "too little memory" in done.stderr
    assert not list((tmp_path / "cache").glob("*-*"))
    assert len(data.load_manifest(small, cache_dir=tmp_path / "cache")) == len(TWO) + 1


def test_a_lock_ends_with_its_process(tmp_path):
    lock, hold = tmp_path / "locks" / "x", "import sys, pathlib, time\nfrom cxr import records\n"
    hold += "with records.alone(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", hold, lock], stdout=subprocess.PIPE, env=environment())
    assert holder.stdout.readline() == b"held\n"
    waiting = "import sys, pathlib\nfrom cxr import records\nwith records.alone(pathlib.Path(sys.argv[1])):\n    pass"
    second = subprocess.Popen([sys.executable, "-c", waiting, lock], env=environment())
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(3)
    holder.kill()
    assert second.wait(60) == 0
    holder.wait()


def test_once_makes_a_record_only_if_nobody_did_meanwhile(run, monkeypatch):  # noqa: F811
    made = []

    def make():
        made.append(run.save("a", {}, 0, scores(run)))
        return made[-1]

    run_id = run.run_id("a", {}, 0)
    assert run.once(run_id, make) == run.once(run_id, make) == made[0] and len(made) == 1
    found = [None, made[0]]  # not there at first, there once the lock is held
    monkeypatch.setattr(records.Run, "load", lambda self, run_id: found.pop(0))
    assert run.once(run_id, lambda: pytest.fail("made twice")) == made[0]

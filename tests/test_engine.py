"""Runs side by side: local processes and a Ray cluster give the records that this process gives."""

import dataclasses
import os
import socket
import sys
import threading
import time

import cloudpickle
import keras
import numpy as np
import pytest
from keras import layers

from cxr import config, engine, phantom, train

RECIPES = {f"{epochs} epochs": train.Recipe("tiny", 16, epochs, batch_size=16, learning_rate=3e-3)
           for epochs in (2, 3)}
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # as what a notebook defines: workers cannot import it


def tiny(image_size, augmentation=()):
    inputs = keras.Input((image_size, image_size, 1))
    x = layers.Conv2D(8, 3, activation="relu")(layers.Rescaling(1 / 255)(inputs))
    x = layers.Dropout(0.2)(layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, layers.Dense(1, activation="sigmoid")(x))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run over two seeds of a phantom, in a repository of its own."""
    root = tmp_path_factory.mktemp("repository")
    phantom.write(root / "set", num_train=60, num_val=4, num_test=30, size=32, duplicates=0, near_duplicates=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXR_ROOT", str(root))
        return config.start("02_test", data=str(root / "set"), num_seeds=2)


def elsewhere(run, folder):
    """Return the same run with nothing finished."""
    return dataclasses.replace(run, directory=folder)


def without_seconds(found):
    """Return what must be the same wherever records were made."""
    timed = ("seconds", "sha256")  # the hash of a record covers its seconds
    return {name: [{key: value for key, value in record.items() if key not in timed} for record in records]
            for name, records in found.items()}


@pytest.fixture(scope="module")
def here(run):
    return without_seconds(train.sweep(run, RECIPES, tiny))


def test_jobs_are_done_in_order_in_this_process():
    assert engine.map(lambda job: (job, os.getpid()), "ab") == [("a", os.getpid()), ("b", os.getpid())]


@pytest.mark.parametrize(("name", "value", "message"), [
    ("CXR_ENGINE", "slurm", "CXR_ENGINE is 'slurm'; choose joblib"),
    ("CXR_WORKERS", "two", "CXR_WORKERS is 'two'; expected the number"),
    ("CXR_WORKERS", "0", "CXR_WORKERS is '0'"),
])
def test_a_wrong_setting_says_what_is_right(monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        engine.map(len, ["a"])


def test_without_ray_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setenv("CXR_ENGINE", "ray")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match="requirements-ray.txt"):
        engine.map(len, ["a"])


def test_two_processes_share_the_cores_and_get_large_arrays_by_path_and_models_whole(monkeypatch, tmp_path):
    monkeypatch.setenv("CXR_WORKERS", "2")
    np.save(tmp_path / "images.npy", np.arange(3 << 20, dtype="uint8"))
    mapped, held = np.load(tmp_path / "images.npy", mmap_mode="r"), np.ones((2 << 20,), "uint8")
    network = tiny(16)  # as a GAN's generator that draws further images
    total = sum(weight.sum() for weight in network.get_weights())

    def look(job):
        return (os.getpid(), os.environ["TF_NUM_INTRAOP_THREADS"], os.environ["OMP_NUM_THREADS"],
                type(mapped).__name__, type(held).__name__, int(mapped[job]) + int(held[job]),
                bool(sum(weight.sum() for weight in network.get_weights()) == total))

    seen = engine.map(look, range(4))
    threads = str(max(1, os.cpu_count() // 2))
    assert os.getpid() not in {pid for pid, *_ in seen}
    assert [rest for _, *rest in seen] == [[threads, threads, "memmap", "memmap", job + 1, True]
                                           for job in range(4)]


def test_two_processes_write_the_records_of_one(run, here, monkeypatch, tmp_path):
    monkeypatch.setenv("CXR_WORKERS", "2")
    assert without_seconds(train.sweep(elsewhere(run, tmp_path), RECIPES, tiny)) == here


def test_the_notebooks_precision_travels(run, monkeypatch, tmp_path):
    monkeypatch.setenv("CXR_WORKERS", "2")
    monkeypatch.setattr(keras.config, "dtype_policy", lambda: keras.DTypePolicy("mixed_bfloat16"))
    made = train.repeat(elsewhere(run, tmp_path), "low precision", RECIPES["2 epochs"], tiny)
    assert {record["environment"]["precision"] for record in made} == {"mixed_bfloat16"}


def test_an_error_names_its_cause_and_finished_runs_stay(run, monkeypatch, tmp_path):
    monkeypatch.setenv("CXR_WORKERS", "2")
    run = elsewhere(run, tmp_path)

    def extra(seed):
        if seed == 1:
            raise ValueError("no images for seed 1")
        return np.zeros((2, 16, 16), "uint8"), np.array([0, 1])

    with pytest.raises(ValueError, match="no images for seed 1"):
        train.repeat(run, "more", RECIPES["2 epochs"], tiny, extra=extra)
    finished = train.repeat(run, "more", RECIPES["2 epochs"], tiny, extra=extra, seeds=[0])
    assert [record["seed"] for record in finished] == [0]


def test_a_record_that_is_not_on_the_shared_disk_is_missed(run, monkeypatch, tmp_path):
    monkeypatch.setattr(engine, "map", lambda function, jobs: None)
    with pytest.raises(FileNotFoundError, match="shared storage"):
        train.repeat(elsewhere(run, tmp_path), "lost", RECIPES["2 epochs"], tiny)


@pytest.fixture
def cluster(monkeypatch):
    """A Ray cluster of two nodes on this machine, each with one core and what it takes for a GPU."""
    ray = pytest.importorskip("ray", reason="Ray is an extra: pip install -r requirements-ray.txt")
    from ray.cluster_utils import Cluster

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    # Ray waits 15 seconds for the ports of its agents, too short for a busy machine; those that are given it need not
    # await (but for the dashboard agent's). Without monitors the agents start sooner.
    monkeypatch.setenv("RAY_agent_register_timeout_ms", "300000")
    monkeypatch.setenv("RAY_worker_register_timeout_seconds", "300")
    names = [f"{name}_port" for name in ("metrics_agent", "metrics_export", "dashboard_agent_listen",
                                         "runtime_env_agent")]
    sockets = [socket.create_server(("", 0)) for _ in 2 * names]
    free = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    head, second = ({"num_cpus": 1, "num_gpus": 1, "object_store_memory": 100 << 20, "include_log_monitor": False}
                    | dict(zip(names, ports, strict=True)) for ports in (free[:4], free[4:]))
    made = Cluster(initialize_head=True, head_node_args=head | {"include_dashboard": False, "no_monitor": True})
    made.doomed = made.add_node(**second)
    monkeypatch.setenv("CXR_ENGINE", "ray")
    monkeypatch.setenv("RAY_ADDRESS", made.address)
    yield made
    ray.shutdown()
    made.shutdown()


def test_a_cluster_that_loses_a_node_in_the_middle_writes_the_same_records(run, cluster, monkeypatch, tmp_path):
    recipe, seeds = dataclasses.replace(RECIPES["2 epochs"], epochs=40), [0, 1, 2]
    images, notes, doomed = run.images(16), tmp_path / "notes", cluster.doomed.node_id

    def extra(seed):
        import ray

        node, gpu = ray.get_runtime_context().get_node_id(), os.environ["CUDA_VISIBLE_DEVICES"]
        with open(notes, "a") as file:
            file.write(f"{seed} {node} {gpu} {type(images).__name__}\n")
        return images[:2], np.array([0, 1])

    far, killed = elsewhere(run, tmp_path / "far"), []

    def kill():
        """Kill the second node once the run that it got has finished an epoch."""
        while True:
            time.sleep(0.01)
            for line in notes.read_text().splitlines() if notes.exists() else ():
                seed, node, *_ = line.split()
                run_id = far.run_id("killed", recipe.config(), int(seed))
                if node == doomed and (far.backup(run_id) / "history.json").exists():
                    cluster.remove_node(cluster.doomed, allow_graceful=False)
                    killed.append((int(seed), far.load(run_id)))
                    return

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    made = train.repeat(far, "killed", recipe, tiny, extra=extra, seeds=seeds)
    killer.join(1)
    (lost, record), = killed
    assert record is None, "it was too late to kill in the middle"
    lines = [line.split() for line in notes.read_text().splitlines()]
    assert sorted(int(seed) for seed, *_ in lines) == sorted([*seeds, lost]), "one run was begun twice"
    assert {(gpu, kind) for *_, gpu, kind in lines} == {("0", "memmap")}, "one GPU a run, and the images by path"

    # Each of the cluster's runs had one thread; with more, forty epochs later, the last digits are others.
    monkeypatch.setenv("CXR_ENGINE", "joblib")
    monkeypatch.setenv("CXR_WORKERS", "2")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    same = train.repeat(elsewhere(run, tmp_path / "near"), "killed", recipe, tiny,
                        extra=lambda seed: (images[:2], np.array([0, 1])), seeds=seeds)
    assert without_seconds({"": made}) == without_seconds({"": same})


def test_without_a_cluster_the_message_says_how_to_start_one(monkeypatch):
    pytest.importorskip("ray", reason="Ray is an extra: pip install -r requirements-ray.txt")
    monkeypatch.setenv("CXR_ENGINE", "ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConnectionError, match="ray start --head"):
        engine.map(len, ["a"])

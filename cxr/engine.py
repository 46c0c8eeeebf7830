"""Where independent runs are computed: in this process, in several local ones, or on a Ray cluster that exists.

`CXR_ENGINE` is `joblib` (default; `CXR_WORKERS` local processes, 1 of them being this one) or `ray` (the cluster that
`RAY_ADDRESS` or `ray start` names; one GPU a run where it has GPUs, else one core). What a run needs travels to it: a
function may close over arrays and Keras models. Its record does not travel back: it is on the disk that all share.
"""

import mmap
import os

import joblib
import numpy as np
import tqdm

RETRIES = 3  # of a run whose node died; it goes on from its last epoch. An error of the run itself is raised at once.
# What the driver's shell says about a run. A cluster's workers have the environment of the shell that started them.
_SETTINGS = ("KERAS_", "TF_", "XLA_", "JAX_", "CXR_ROOT", "CXR_WEIGHTS", "PYTHONHASHSEED")


def map(function, jobs):
    """Return `[function(job) for job in jobs]`, computed where `CXR_ENGINE` says.

    Args:
        function: what cloudpickle can send: a function of a module or of a notebook, closures included.
        jobs: list, one entry a run.

    Raises:
        ValueError: `CXR_ENGINE` or `CXR_WORKERS` is not one of the values above.
        ImportError, ConnectionError: Ray is not installed, or no cluster answers.
    """
    name, jobs = os.environ.get("CXR_ENGINE", "joblib"), list(jobs)
    if name not in ("joblib", "ray"):
        raise ValueError(f"CXR_ENGINE is {name!r}; choose joblib (local processes) or ray (an existing cluster).")
    workers = os.environ.get("CXR_WORKERS", "1")
    if not workers.isdecimal() or int(workers) < 1:
        raise ValueError(f"CXR_WORKERS is {workers!r}; expected the number of local processes, such as 2.")
    if name == "ray" and jobs:
        return _on_ray(function, jobs)
    workers = min(int(workers), len(jobs))
    return _locally(function, jobs, workers) if workers > 1 else [function(job) for job in jobs]


def _progress(finished, jobs):
    return tqdm.tqdm(finished, "runs", len(jobs), unit="run")


def _locally(function, jobs, workers):
    """Arrays above a megabyte are written once and mapped by all workers, those that are maps already as they are."""
    threads = max(1, joblib.cpu_count() // workers)
    with joblib.parallel_config("loky", n_jobs=workers, inner_max_num_threads=threads):
        finished = joblib.Parallel(return_as="generator")(joblib.delayed(_with_threads)(threads, function, job)
                                                          for job in jobs)
        return list(_progress(finished, jobs))


def _with_threads(threads, function, job):
    """TensorFlow reads this at its first operation, not at its import."""
    os.environ["TF_NUM_INTRAOP_THREADS"] = str(threads)
    return function(job)


def _on_ray(function, jobs):
    ray = _cluster()
    total = ray.cluster_resources()
    has_gpus = total.get("GPU", 0) >= 1
    threads = max(1, int(total["CPU"] // total["GPU"])) if has_gpus else 1
    ray.util.register_serializer(np.memmap, serializer=_by_path, deserializer=_reopened)
    shared = ray.put(function)  # once a node, not once a run
    remote = ray.remote(num_cpus=1, num_gpus=int(has_gpus), max_retries=RETRIES)(_with_threads)
    place = {remote.remote(threads, shared, job): index for index, job in enumerate(jobs)}
    try:
        found = {place[run]: ray.get(run) for run in _progress(_as_they_finish(ray, place), jobs)}
    except BaseException:
        for run in place:
            ray.cancel(run)
        raise
    return [found[index] for index in range(len(jobs))]


def _as_they_finish(ray, waiting):
    waiting = list(waiting)
    while waiting:
        done, waiting = ray.wait(waiting)
        yield from done


def _cluster():
    """Return the module `ray`, connected to a cluster that exists: this lab starts none."""
    try:
        import ray
    except ImportError as error:
        raise ImportError("CXR_ENGINE=ray needs Ray: pip install -r requirements-ray.txt") from error
    if not ray.is_initialized():
        settings = {name: value for name, value in os.environ.items() if name.startswith(_SETTINGS)}
        try:
            ray.init("auto", runtime_env={"env_vars": settings}, log_to_driver=False)
        except ConnectionError as error:
            raise ConnectionError("CXR_ENGINE=ray found no cluster. Start one (ray start --head, then ray start "
                                  "--address=… on the other nodes), or name it in RAY_ADDRESS.") from error
    return ray


def _by_path(array):
    """A whole map of a file, such as the decoded images, travels as its path; a part of one as its values."""
    if isinstance(array.base, mmap.mmap):
        return array.filename, array.dtype, array.offset, array.shape
    return (np.array(array),)


def _reopened(parts):
    if len(parts) == 1:
        return parts[0]
    path, dtype, offset, shape = parts
    return np.memmap(path, dtype, "r", offset, shape)

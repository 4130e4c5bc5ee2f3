"""Trials of a sweep as Ray tasks: on the cluster that is there, else on the cores of this machine.

The machines of a cluster must see the same folders (outputs, notebook, working directory) and have the package in
the Python that runs Ray. A trial whose worker is lost is tried again; one that fails by its own error is not.
"""

import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

from speedrl_lab.trial import PATIENCE, Ended, Job, attempt

RETRIES = 2  # attempts after the first when workers are lost
SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
"""Of a Ray that is started here, unless the environment says otherwise; Ray's own niceness of 15 is for shared nodes,
and beside any other work its trials would stand still."""
STORE = 80 * 2**20  # bytes of shared memory for a Ray of our own, its least: results are two numbers
ANSWER = 5.0  # seconds that a cluster has to answer


def require() -> None:
    """Raise what can be known before anything is started.

    Raises:
        ImportError: Ray is not installed.
        OSError: nothing answers at $RAY_ADDRESS; Ray itself would try for minutes.
    """
    if find_spec("ray") is None:
        raise ImportError("backend 'ray' needs ray, not installed: pip install 'speedrl_lab[ray]'")
    address = os.environ.get("RAY_ADDRESS", "").removeprefix("ray://")
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), ANSWER).close()
        except OSError as error:
            raise OSError(f"no Ray cluster answers at RAY_ADDRESS={address}: {error}") from None


def run(jobs: Sequence[Job], workers: int | None, cpus: int, gpus: float, cores: int) -> Iterator[Ended]:
    """Execute jobs, at most `workers` at a time where given, and yield each that ends; stops the others when closed.

    Args:
        cpus: of one trial, for Ray's accounting (`num_cpus`).
        gpus: of one trial (`num_gpus`); Ray shows it only these; below 1, trials share one.
        cores: of a Ray that is started here because no cluster is there.

    Raises ValueError where no machine of the cluster has that many.
    """
    import ray

    with _cluster(cores):
        _check_fits(cpus, gpus)
        task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES, retry_exceptions=False)(attempt)
        waiting, running = list(jobs), {}
        try:
            while waiting or running:
                while waiting and (workers is None or len(running) < workers):
                    job = waiting.pop(0)
                    running[task.remote(job)] = job, time.monotonic()
                ended, _ = ray.wait(list(running), timeout=1.0)
                for reference in ended:
                    job, began = running.pop(reference)
                    yield _ended(job, reference, time.monotonic() - began)
        finally:
            _cancel(list(running))


def _cancel(left: list[object]) -> None:
    """An interrupt to each `attempt`, which ends its process; again while any is left, since one may be lost."""
    import ray

    deadline = time.monotonic() + 2 * PATIENCE
    while left and time.monotonic() < deadline:
        for reference in left:
            ray.cancel(reference)
        _, left = ray.wait(left, num_returns=len(left), timeout=2.0)


@contextmanager
def _cluster(cores: int) -> Iterator[None]:
    """Ray as the caller has started it, or the cluster at $RAY_ADDRESS or on this machine, or a Ray of our own."""
    import ray

    if ray.is_initialized():
        yield
        return
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    address = os.environ.get("RAY_ADDRESS") or "auto"
    quiet = {"log_to_driver": False, "logging_level": "error"}
    own = {"num_cpus": cores, "include_dashboard": False, "object_store_memory": STORE}
    try:
        try:
            ray.init(address, **quiet, **(own if address == "local" else {}))
        except ConnectionError:
            if address != "auto":
                raise
            ray.init("local", **quiet, **own)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise OSError(f"cannot join Ray at {address!r}: {_first_line(error)}") from None
    try:
        yield
    finally:
        ray.shutdown()


def _check_fits(cpus: int, gpus: float) -> None:
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
        there = "; ".join(sorted({f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in nodes}))
        raise ValueError(f"a trial with cpus={cpus}, gpus={gpus:g} fits on no machine of the Ray cluster ({there})")


def _ended(job: Job, reference: object, seconds: float) -> Ended:
    """What became of a task; `seconds` where it cannot say itself."""
    import ray

    try:
        return Ended(job, *ray.get(reference))
    except ray.exceptions.RayTaskError as error:  # on the worker, before the trial's process began
        return Ended(job, f"{type(error.cause).__name__}: {_first_line(error.cause)}", seconds)
    except ray.exceptions.RayError as error:
        return Ended(job, f"its worker was lost {RETRIES + 1} times: {_first_line(error)}", seconds)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

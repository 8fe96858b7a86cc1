"""Jobs of a sweep as tasks of Ray, on this machine or on a cluster. The only file that knows Ray."""

import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mimicut.base import memory
from mimicut.base.environment import usable_cores
from mimicut.base.errors import InputError, one_line
from mimicut.base.interrupts import interrupts_counted, raise_interrupts
from mimicut.workflow.jobs import INTERRUPTED, RETRIES, Ended, Job, Share, check_gpus, run_job

LOCAL = "local"  # the address that stands for a Ray of our own on this machine
_ANSWER_SECONDS = 5.0  # in which a cluster is to answer. Source: assumption.
_LOOK_SECONDS = 0.5
_KILL_SECONDS = 5.0  # in which killed jobs are to be gone, before they are left alone. Source: assumption.
_STARTS = 3  # of a Ray of our own: it gives its parts 15 seconds, which a busy machine may not. Source: measured.
_STORE_BYTES = 100_000_000  # of a Ray of our own, for what tasks return: some kilobytes each. Source: assumption.


class Cluster:
    """`Machines` of a Ray that is there. count: jobs at once, None for as many as it finds room for."""

    def __init__(self, ray: Any, address: str, count: int | None, gpus: float):
        self._ray, self._address, self._count, self._gpus = ray, address, count, gpus

    def share(self, threads: int | None) -> Share:
        cores, gpus, machines = threads or 1, self._gpus, self._machines()
        fit = [each for each in machines if each.get("CPU", 0) >= cores and each.get("GPU", 0) >= gpus]
        if not fit:
            there = "; ".join(f"{each.get('CPU', 0):g} and {each.get('GPU', 0):g}" for each in machines[:5])
            raise InputError(
                f"sharing Ray at {self._address}: a job asks for one machine with {cores} cores and {gpus:g} GPUs, "
                f"found {len(machines)} with {there}; expected less of --threads or --gpus"
            )
        rooms = [int(each["memory"] / (each["CPU"] // cores)) for each in fit if each.get("memory")]
        return Share(cores, gpus, min([memory.DEFAULT_BYTES, *rooms]) if rooms else None)

    def at_once(self, jobs: Sequence[Job]) -> int:
        most = Share(max(job.share.threads for job in jobs), self._gpus, None)
        room = sum(_room(each, most) for each in self._machines())
        return min(len(jobs), room, self._count or room)

    def execute(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Ended]]:
        ray, place, left = self._ray, Path.cwd(), list(reversed(jobs))
        counter = ray.remote(num_cpus=0)(_Interrupts).remote()
        task = ray.remote(max_retries=RETRIES)(_run)  # of a task whose worker dies
        waiting: dict[Any, Job] = {}
        handed_on, end = 0, float("inf")
        with interrupts_counted() as heard:
            while waiting or left:
                while left and not heard and len(waiting) < (self._count or len(jobs)):
                    job = left.pop()
                    of_job = task.options(num_cpus=job.share.threads, num_gpus=job.share.gpus)
                    waiting[of_job.remote(job, place, counter)] = job
                try:
                    if len(heard) > handed_on:
                        handed_on = len(heard)
                        received = self._tell(counter, handed_on, waiting)
                        if handed_on > 1 or not received:
                            end = min(end, time.monotonic() + _KILL_SECONDS)
                    ready = ray.wait(list(waiting), num_returns=1, timeout=_LOOK_SECONDS)[0] if waiting else []
                except (ray.exceptions.RayError, ConnectionError) as error:
                    raise InputError(
                        f"running jobs on Ray at {self._address}: the cluster was lost ({one_line(error)}); complete "
                        "results stay, and the same command goes on"
                    ) from error
                for ended in ready:
                    yield waiting.pop(ended), self._got(ended)
                if heard:
                    yield from ((job, _not_run(0)) for job in reversed(left))
                    left.clear()
                if time.monotonic() > end:  # they end with their workers, and these with our connection
                    yield from ((job, _not_run(1)) for job in waiting.values())
                    return

    def _tell(self, counter: Any, count: int, waiting: dict[Any, Job]) -> bool:
        """Hand interrupts on to the jobs that run, and cancel the tasks that wait for room; False if nobody hears."""
        try:
            running = self._ray.get(counter.tell.remote(count), timeout=_ANSWER_SECONDS)
        except self._ray.exceptions.RayError:
            return False
        for task, job in waiting.items():
            if job.name not in running:
                self._ray.cancel(task)
        return True

    def _machines(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _got(self, ended: Any) -> Ended:
        try:
            return self._ray.get(ended)
        except self._ray.exceptions.TaskCancelledError:
            return _not_run(0)
        except (self._ray.exceptions.RayError, OSError) as error:
            return Ended(1, None, one_line(error), 0.0, 1 + RETRIES)


def _not_run(starts: int) -> Ended:
    """The end of a job of which nothing came back because of an interrupt."""
    return Ended(INTERRUPTED, None, "", 0.0, starts)


def _room(machine: dict[str, float], share: Share) -> int:
    """Jobs with this share that a machine has room for."""
    rooms = [machine.get("CPU", 0) // share.threads]
    return int(min([*rooms, machine.get("GPU", 0) / share.gpus] if share.gpus else rooms))


@contextmanager
def connected(address: str, count: int | None, gpus: float) -> Iterator[Cluster]:
    """Connect to Ray.

    Args:
        address: "ray://HOST:PORT" or "HOST:PORT" of a cluster, "auto" for the one that runs on this machine, "local" to
            start one here.
        count, gpus: As `Cluster`.

    Raises:
        InputError: Ray is not installed, or nothing answers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone
    doing = f"connecting to Ray at {address}"
    check_gpus(gpus)
    try:
        import ray
    except ImportError:
        raise InputError(f"{doing}: it is not installed (pip install 'mimicut[ray]')") from None
    _check_answer(address, doing)
    own: dict[str, Any] = {}
    if address == LOCAL:
        own = {"num_cpus": usable_cores(), "include_dashboard": False, "object_store_memory": _STORE_BYTES}
    for left in reversed(range(_STARTS if address == LOCAL else 1)):
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **own)
            break
        except (Exception, SystemExit) as error:  # Ray raises plain ones, and the last where it gives up on a cluster
            ray.shutdown()
            if not left:
                raise InputError(
                    f"{doing}: {one_line(error)}; expected a cluster that runs (ray start --head), or local"
                ) from error
    raise_interrupts()  # Ray has put its own handlers there
    try:
        yield Cluster(ray, address, count, gpus)
    finally:
        ray.shutdown()


def _check_answer(address: str, doing: str) -> None:
    """Raise where nothing listens, or something else than Ray: Ray itself tries for minutes, and may then end the
    process."""
    if address in (LOCAL, "auto"):
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:
        raise InputError(f"{doing}: found no port; expected ray://HOST:PORT, such as ray://HOST:10001, auto or local")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()
        _check_protocol(f"{host}:{port}")
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(
            f"{doing}: nothing answers there ({one_line(error)}); expected the HOST:PORT of a cluster that runs, such "
            "as ray://HOST:10001, auto or local"
        ) from error


def _check_protocol(address: str) -> None:
    """Raise TimeoutError where what listens does not speak gRPC, as both kinds of Ray's ports do."""
    try:
        import grpc  # type: ignore[import-untyped]
    except ImportError:  # then Ray itself finds out
        return
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("0", "false"):
        return
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=_ANSWER_SECONDS)
        except grpc.FutureTimeoutError:
            raise TimeoutError("what listens there is not Ray") from None


class _Interrupts:
    """An actor that every task asks whether it is to stop."""

    def __init__(self) -> None:
        self._count = 0
        self._asked: set[str] = set()

    def tell(self, count: int) -> set[str]:
        """The names of the jobs whose tasks have asked: a task that first asks from now on starts no job."""
        self._count = count
        return self._asked

    def count(self, name: str) -> int:
        self._asked.add(name)
        return self._count


def _run(job: Job, place: Path, counter: Any) -> Ended:
    import ray

    if not place.is_dir():
        return Ended(2, None, f"running {job.name}: {place} is not a folder of {socket.gethostname()}", 0.0, 0)

    def interrupts() -> int:
        try:
            return int(ray.get(counter.count.remote(job.name), timeout=_ANSWER_SECONDS))
        except ray.exceptions.RayError:  # lost with its machine, which is no reason to stop this job
            return 0

    return run_job(job, place, interrupts)

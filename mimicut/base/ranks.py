"""Several processes, one for each device, that train one student together.

Every process runs the same program. Each takes its part of the images: what evidence and the closed form learn of
them, and the gradients of mimicking, are added up. What is decided (plan, solved layers, rates) is decided by the first
one, which alone writes files and prints. The processes are started by `joined`, or by torchrun; torch.distributed
connects them, over NCCL between CUDA devices, over gloo between CPUs.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import timedelta
from io import StringIO
from itertools import count as numbers
from itertools import pairwise
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist

from mimicut.base.environment import usable_cores
from mimicut.base.errors import InputError, MimicutError, one_line

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

# How long all may take to start, and how long one may wait for the others, who wait while the first one decides.
# Source: assumption.
_START, _WAIT = timedelta(minutes=10), timedelta(days=1)
_CONNECT = timedelta(seconds=30)  # with what is known to be there. Source: assumption.
_ANSWER_SECONDS = 1.0  # that a look at whether a machine answers may take: nothing interrupts it
_END_SECONDS = 10.0  # that a process may take to end after the first one, or what it sent to arrive after its end
_LONGEST_PAUSE = 0.05  # seconds between two looks at what is awaited; shorter in the beginning. Source: assumption.
# By which torch's message tells a lost connection from a mistake of ours, such as a tensor that cannot be sent.
_LOST = ("connection", "timed out", "timeout", "socket", "peer")
_Process = tuple[subprocess.Popen[bytes], IO[bytes]]
_started: list[_Process] = []  # by this process, each with what it writes to stderr


class RankLost(MimicutError):
    """Another process of the run ended, so that no step can be taken any more."""

    exit_code = 1


class NotFirst(Exception):
    """The work of a process that is not the first one is done: the first one alone goes on."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together. rank: from 0, the first one. count: how many there are."""

    rank: int
    count: int

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, images: int) -> slice:
        """Which images of a batch are this process's.

        Raises:
            InputError: There are fewer images than processes.
        """
        if images < self.count:
            raise InputError(
                f"mimicking on {self.count} devices: a batch has {images} images, expected at least one for each "
                "device; use fewer devices, or give more images"
            )
        edges = [images * i // self.count for i in range(self.count + 1)]
        return [slice(a, b) for a, b in pairwise(edges)][self.rank]

    def owns(self, number: int) -> bool:
        """Whether work is this process's; it is numbered from 0, and given to all in turn."""
        return number % self.count == self.rank

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in place.

        Raises:
            RankLost: Another process ended.
        """
        if len(tensors) == 1 and tensors[0].is_contiguous():  # without a copy
            with _losses():
                _await(dist.all_reduce(tensors[0].detach(), async_op=True), tensors[0])
            return
        flat = torch.cat([t.detach().flatten() for t in tensors])
        with _losses():
            _await(dist.all_reduce(flat, async_op=True), flat)
        parts = flat.split([t.numel() for t in tensors])
        found = [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]
        torch._foreach_copy_([t.detach() for t in tensors], found)  # on CUDA a few copies instead of one for each

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Give each tensor the values that it has in the first process, in place. Raises: RankLost: another ended."""
        for tensor in tensors:
            given = tensor.detach().flatten()
            _broadcast(given.view(torch.uint8))  # as bytes: backends do not send every type
            with torch.no_grad():
                tensor.copy_(given.view_as(tensor))

    def of_first(self, value: Any) -> Any:
        """The first process's value, in every process. Raises: RankLost: another one ended."""
        held, device = [value], "cpu" if "cpu:" in dist.get_backend_config() else "cuda"
        self.add_up([torch.zeros(1, device=device)])  # all are here: what follows cannot be interrupted
        with _losses():
            dist.broadcast_object_list(held, 0)
        return held[0]


def _broadcast(tensor: Tensor) -> None:
    if tensor.numel():
        with _losses():
            _await(dist.broadcast(tensor, 0, async_op=True), tensor)


def _await(work: Any, tensor: Tensor) -> None:
    """Wait for what was begun with a tensor; Ctrl-C, and the end of a process that was started here, end the wait.

    On CUDA it is only put in the queue of the device.
    """
    ended_at = None
    try:
        for pause in _pauses():
            if tensor.device.type == "cuda" or work.is_completed():
                break
            if ended_at is None and any(process.poll() is not None for process, _ in _started):
                ended_at = time.monotonic()
            if ended_at is not None and time.monotonic() - ended_at > _END_SECONDS:
                raise RankLost(f"another process of this run ended{_all_last_words()}")
            time.sleep(pause)
    except BaseException:
        # What was begun cannot be taken back, and would be waited for at the end of this process.
        for process, _ in _started:
            process.kill()
        raise
    work.wait()


def _pauses() -> Iterator[float]:
    return (min(_LONGEST_PAUSE, 1e-4 * 1.2 ** min(n, 100)) for n in numbers())


@contextmanager
def _losses() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not any(word in str(error).lower() for word in _LOST):
            raise
        raise RankLost(f"another process of this run ended{_all_last_words()}") from error


def current() -> Ranks | None:
    """The processes that this one is connected with; None where it is alone."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() < 2:
        return None
    return Ranks(dist.get_rank(), dist.get_world_size())


def is_first() -> bool:
    """Whether this process is alone, or the first of those that were started together, connected or not yet.

    Raises:
        InputError: Who started it gave it numbers that cannot be.
    """
    found = _started_as()
    return found is None or found[0] == 0


def asked_count(devices: int | None) -> int:
    """How many processes are to work together: as many as torchrun started, or `devices`, or this one alone.

    Raises:
        InputError: torchrun started another number of processes.
    """
    found = _started_as()
    if devices is not None and found is not None and found[1] != devices:
        raise InputError(
            f"working on {devices} devices (--devices): torchrun started {found[1]} processes; give the same number, "
            "or leave --devices out"
        )
    if found is not None:
        return found[1]
    return 1 if devices is None else devices


def count_here(count: int) -> int:
    """How many of all processes are on this machine: all of them, if torchrun does not say otherwise."""
    return count if _started_as() is None else _number("LOCAL_WORLD_SIZE", count, low=1)


@contextmanager
def joined(
    devices: int | None, device: str | None, arguments: Sequence[str], threads: int | None = None
) -> Iterator[str | None]:
    """Be one of several processes inside: as torchrun says; or, with `devices`, the first one, which starts the others.

    The others run the same command, print nothing, and end with the first one at the latest.

    Args:
        devices: How many; None: as many as torchrun started, or this process alone.
        device: "cpu", "cuda" or None, which is "cuda" where there is one.
        arguments: Of the command `mimicut` that the others run.
        threads: Those that all processes on this machine divide. None: on CPUs as many as torch takes, on CUDA each
            process takes so many; OMP_NUM_THREADS says how many each process has.

    Yields:
        The device of this process; `device` where it is alone.

    Raises:
        InputError: There are not so many devices, torchrun started another number of processes, or they could not be
            connected.
    """
    found, count = _started_as(), asked_count(devices)
    if count == 1:
        yield device
        return
    here = count_here(count)
    kind = checked_kind(here, device)
    with ExitStack() as ends:
        rank, local, store = 0, 0, None
        if found is None:
            store = _store("127.0.0.1", 0, True)
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
            ends.enter_context(_others(count, place, arguments))
        else:
            rank = found[0]
            local = _number("LOCAL_RANK", rank)
        if kind == "cuda":
            torch.cuda.set_device(local)
        if threads is not None:
            torch.set_num_threads(max(1, threads // here))
        elif kind == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, torch.get_num_threads() // here))
        try:
            store = store or _store_of_environment(rank, count)
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun may keep the store of the one before
            own = dist.PrefixStore(f"mimicut/{attempt}", store)  # type: ignore[attr-defined]  # as TCPStore
            _connect(own, rank, count)
        except dist.DistError as error:
            raise InputError(f"{_not_met(count)} ({one_line(error)}){_all_last_words()}") from error
        ends.callback(_leave)
        if rank:
            ends.enter_context(redirect_stdout(StringIO()))
            ends.enter_context(redirect_stderr(StringIO()))
        try:
            yield f"cuda:{local}" if kind == "cuda" else "cpu"
        except RankLost as error:  # while mimicking it is a Stopped, with a file to go on from
            raise RankLost(f"{error}; nothing was to be saved yet: run the same command again") from error


def _started_as() -> tuple[int, int] | None:
    """(rank, count) of this process, as torchrun says, or the process that started this one; None where none did."""
    if "RANK" not in os.environ:
        return None
    count = _number("WORLD_SIZE", 1, low=1)
    return (_number("RANK", high=count - 1) if count > 1 else 0), count


def _number(name: str, otherwise: int | None = None, low: int = 0, high: int | None = None) -> int:
    """A variable of the environment that torchrun sets; `otherwise` where it is not set.

    Raises:
        InputError: It is no such number.
    """
    text = os.environ.get(name)
    if text is None and otherwise is not None:
        return otherwise
    try:
        found = int(text or "")
    except ValueError:
        found = low - 1
    if found < low or (high is not None and found > high):
        most = "" if high is None else f" to {high}"
        raise _unfit(name, f"a whole number from {low}{most}")
    return found


def _unfit(name: str, expected: str) -> InputError:
    text = os.environ.get(name)
    there = f"no {name}" if text is None else f"{name}={text!r}"
    return InputError(
        f"working on several devices: found {there} in the environment, expected {expected}; torchrun sets it, and "
        "without the variable RANK this process works alone"
    )


def _connect(store: "Store", rank: int, count: int) -> None:
    """Wait until all processes are there, which an interrupt can end, and connect them, which takes a moment then."""
    _meet(store, rank, count)
    dist.init_process_group(store=store, rank=rank, world_size=count, timeout=_START)
    store.set_timeout(_WAIT)
    set_timeout: Any = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # before torch 2.15
    set_timeout(_WAIT)


def _meet(store: "Store", rank: int, count: int) -> None:
    """Say that this process is there, and wait for the others.

    Raises:
        InputError: One that was started here ended, or they took too long.
    """
    store.set(_here(rank), "")
    all_here = [_here(each) for each in range(count)]
    for _ in _tries(count):
        if store.check(all_here):
            return
        if any(process.poll() is not None for process, _ in _started):
            raise InputError(f"{_not_met(count)}: one of them ended{_all_last_words()}")


def _tries(count: int) -> Iterator[None]:
    """Moments at which to look for the others.

    Raises:
        InputError: They took too long.
    """
    began = time.monotonic()
    for pause in _pauses():
        yield
        if time.monotonic() - began > _START.total_seconds():
            break
        time.sleep(pause)
    raise InputError(f"{_not_met(count)}: they did not start within {_START}; is the machine busy with other work?")


def _store_of_environment(rank: int, count: int) -> "Store":
    """Where a process that was started meets the others: the first one opens it, if torchrun has not."""
    host, port = os.environ.get("MASTER_ADDR"), _number("MASTER_PORT", low=1, high=2**16 - 1)
    if not host:
        raise _unfit("MASTER_ADDR", "the name or address of the machine of the first process")
    opens = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    for _ in () if opens else _tries(count):  # torch's own wait for it cannot be interrupted
        with suppress(OSError):
            socket.create_connection((host, port), timeout=_ANSWER_SECONDS).close()
            break
    return _store(host, port, opens)


def _store(host: str, port: int, opens: bool) -> Any:
    """A TCPStore. port: 0 for any that is free."""
    own = {"is_master": opens, "multi_tenant": opens, "wait_for_workers": False}
    store = dist.TCPStore(host, port, timeout=_CONNECT, **own)  # type: ignore[attr-defined]  # not in the stubs
    store.set_timeout(_START)
    return store


def _here(rank: int) -> str:
    return f"mimicut/here/{rank}"


def _not_met(count: int) -> str:
    return f"working on {count} devices: the processes for them could not be connected"


def checked_kind(count: int, device: str | None, *, elsewhere: bool = False) -> str:
    """The kind of device, of which there are so many on this machine. elsewhere: it will be another machine.

    Raises:
        InputError: There are not so many, or several are not counted so.
    """
    if count < 1 or device not in (None, "cpu", "cuda"):
        raise InputError(
            f"working on several devices: found --devices {count} and --device {device}; expected a number from 1, and "
            "cpu or cuda (several are counted from the first one on)"
        )
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if elsewhere:
        return kind
    there = torch.cuda.device_count() if kind == "cuda" else usable_cores()
    if count > there:
        what = "CUDA device(s)" if kind == "cuda" else "processor core(s), of which each process needs one"
        instead = f"--devices {there} or fewer" if there else "--device cpu"
        raise InputError(f"working on {count} devices: found {there} {what}; give {instead}")
    return kind


@contextmanager
def _others(count: int, place: dict[str, str], arguments: Sequence[str]) -> Iterator[None]:
    """The same command in all processes but the first, which end with it, however it ends."""
    shared = os.environ | place | {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    command = [sys.executable, "-m", "mimicut.cli.job_process", *arguments]
    with ExitStack() as held, _ended_with_us():
        their_end, our_end = os.pipe()  # which they see closed when this process is no more
        held.callback(os.close, their_end)
        held.callback(os.close, our_end)
        for rank in range(1, count):
            words = held.enter_context(tempfile.TemporaryFile())
            own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            # In a session of its own: Ctrl-C is for the first one, which lets a step end.
            process = subprocess.Popen(
                command, env=own, stdin=their_end, stdout=subprocess.DEVNULL, stderr=words,
                start_new_session=True,
            )  # fmt: skip
            _started.append((process, words))
        yield


@contextmanager
def _ended_with_us() -> Iterator[None]:
    try:
        yield
    finally:
        for process, _ in _started:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_END_SECONDS)
            process.kill()
            process.wait()
        _started.clear()


def _all_last_words() -> str:
    return "".join(map(_last_words, _started))


def _last_words(other: _Process) -> str:
    process, words = other
    with suppress(subprocess.TimeoutExpired):
        process.wait(1.0)
    words.seek(0)
    lines = words.read().decode(errors="replace").strip().splitlines()
    return f"; its last words: {lines[-1][:300]}" if lines and process.poll() else ""


def _leave() -> None:
    with suppress(RuntimeError):
        dist.destroy_process_group()

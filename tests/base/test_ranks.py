"""How several processes find each other: what the environment says, the wait for the others, and their threads."""

import signal
import socket
import time
from contextlib import nullcontext
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from mimicut.base import ranks
from mimicut.base.errors import InputError
from mimicut.base.ranks import RankLost, joined

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return str(held.getsockname()[1])


@pytest.fixture
def started(monkeypatch):
    """Say how this process was started."""
    for name in (*VARIABLES, "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    yield lambda **variables: [monkeypatch.setenv(name, str(value)) for name, value in variables.items()]
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": 0, "WORLD_SIZE": "abc"}, "found WORLD_SIZE='abc' in the environment, expected a whole number from 1"),
        ({"RANK": "x", "WORLD_SIZE": 2}, "found RANK='x' in the environment, expected a whole number from 0 to 1"),
        ({"RANK": 2, "WORLD_SIZE": 2}, "found RANK='2' in the environment, expected a whole number from 0 to 1"),
        ({"RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 0}, "found LOCAL_WORLD_SIZE='0'"),
        ({"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": ""}, "found LOCAL_RANK=''"),
        ({"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost"}, "found no MASTER_PORT in the environment"),
        ({"RANK": 0, "WORLD_SIZE": 2, "MASTER_PORT": 12345}, "found no MASTER_ADDR in the environment"),
        ({"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": 70000}, "from 1 to 65535"),
    ],
)
def test_a_variable_that_cannot_be_is_named(started, monkeypatch, variables, words):
    monkeypatch.setattr(ranks, "usable_cores", lambda: 2)
    started(**variables)
    with pytest.raises(InputError, match=words), joined(None, "cpu", []):
        pass


def test_without_others_no_variable_is_asked_for(started):
    started(RANK="of something else")
    with joined(None, None, []) as device:
        assert device is None


@pytest.mark.parametrize("rank", [0, 1], ids=["the first one", "another one"])
def test_an_interrupt_ends_the_wait_for_a_process_that_does_not_come(started, monkeypatch, rank):
    monkeypatch.setattr(ranks, "usable_cores", lambda: 2)
    monkeypatch.setattr(ranks, "_START", ranks.timedelta(seconds=2))
    press = SimpleNamespace(sleep=lambda seconds: signal.raise_signal(signal.SIGINT), monotonic=time.monotonic)
    monkeypatch.setattr(ranks, "time", press)
    started(RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    with pytest.raises(KeyboardInterrupt), joined(None, "cpu", []):
        pass


@pytest.mark.parametrize("rank", [0, 1], ids=["the first one", "another one"])
def test_processes_that_do_not_come_in_time_are_one_clear_line(started, monkeypatch, rank):
    monkeypatch.setattr(ranks, "usable_cores", lambda: 2)
    monkeypatch.setattr(ranks, "_START", ranks.timedelta(seconds=0.1))
    started(RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    with pytest.raises(InputError, match="could not be connected: they did not start within"), joined(None, "cpu", []):
        pass


def test_processes_are_connected_in_a_short_time_and_wait_for_a_long_one(monkeypatch):
    found = []
    monkeypatch.setattr(ranks, "_meet", lambda *given: None)
    monkeypatch.setattr(ranks.dist, "init_process_group", lambda **given: found.append(given["timeout"]))
    monkeypatch.setattr(ranks.dist, "set_timeout", found.append, raising=False)
    ranks._connect(SimpleNamespace(set_timeout=found.append), 0, 2)
    assert found == [ranks._START, ranks._WAIT, ranks._WAIT]


def test_a_wait_may_be_a_long_one():
    assert next(islice(ranks._pauses(), 10_000, None)) == ranks._LONGEST_PAUSE


@pytest.mark.parametrize(
    ("given", "of_environment", "found"), [(4, None, 2), (4, "1", 2), (1, None, 1), (None, None, 3), (None, "1", 6)]
)
def test_processes_divide_the_threads_that_are_given(started, monkeypatch, given, of_environment, found):
    for name, value in {
        "usable_cores": lambda: 2, "_others": lambda *given: nullcontext(), "_connect": lambda *given: None,
        "_leave": lambda: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(ranks, name, value)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if of_environment:
        started(OMP_NUM_THREADS=of_environment)
    torch.set_num_threads(given or 6)
    with joined(2, "cpu", [], given):
        assert torch.get_num_threads() == found


def test_a_lost_connection_is_said_without_the_words_of_the_library():
    cause = RuntimeError("[/__w/pytorch/gloo/pair.cc:545] Read error [127.0.0.1]:1: Connection reset by peer")
    with pytest.raises(RankLost) as lost, ranks._losses():
        raise cause
    assert str(lost.value) == "another process of this run ended"
    assert lost.value.__cause__ is cause

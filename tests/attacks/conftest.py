import os
import time

import torch
from attacks import record

from mimicut.base.environment import platform_kind

if not hasattr(os, "fork"):  # on Windows
    collect_ignore_glob = ["test_*.py"]


# Tests that take minutes, the longest first.
LONG = (
    "test_signals_while_it_works", "test_signals_while_it_imports", "test_changes_of_a_result", "test_clocks_that_jump",
    "test_every_kill_of_a_run_is_survived", "test_after_an_exception",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Long tests begin first, half of them in each process: those that begin last would run alone."""
    if os.environ.get("ATTACK") == "whole":
        items.sort(key=lambda item: next((i for i, name in enumerate(LONG) if item.name.startswith(name)), len(LONG)))
        items[:] = items[::2] + items[1::2]


def pytest_sessionstart(session):
    session.began = time.perf_counter()


def pytest_sessionfinish(session, exitstatus):
    """Keep how long `make attack` took, where all of it passed."""
    if exitstatus or os.environ.get("ATTACK") != "whole" or hasattr(session.config, "workerinput"):
        return
    where = platform_kind(torch.get_num_threads(), "cpu")
    record(
        "whole run", tests=session.testscollected, minutes=round((time.perf_counter() - session.began) / 60, 1),
        where=f"{where['cores']} cores of an {where['processor']}, {where['system']}, torch {torch.__version__}",
    )  # fmt: skip

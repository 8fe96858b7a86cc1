import os
import time

import torch
from attacks import record

from mimicut.base.environment import platform_kind

if not hasattr(os, "fork"):  # on Windows
    collect_ignore_glob = ["test_*.py"]


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

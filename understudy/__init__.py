"""understudy: a small network learns the role of a big one from a few unlabelled images.

Names are resolved when they are first used, so importing the package imports no torch.
"""

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

_PLACES = {
    "Anatomy": "graph",
    "Latency": "runtimes",
    "MimicConfig": "recover.config",
    "PRESETS": "recover.config",
    "Plan": "plan",
    "Preprocessing": "preprocessing",
    "Report": "report",
    "Result": "compress",
    "SCORES": "score",
    "Seam": "seam",
    "SeamPoint": "seam",
    "Setting": "runtimes",
    "Teacher": "teachers",
    "UnderstudyError": "errors",
    "capturing": "seam",
    "check_cut": "laws",
    "closed_form": "recover.closed_form",
    "compress": "compress",
    "count": "cost",
    "crossfit": "crossfit",
    "cut": "cut",
    "export": "export",
    "export_folder": "deploy",
    "figures": "verify",
    "find_seam": "anatomy",
    "inspect": "inspect",
    "load": "store",
    "load_teacher": "teachers",
    "make_plan": "planner",
    "measure": "runtimes",
    "mimic": "recover.mimic",
    "own_teacher": "teachers",
    "preset": "recover.config",
    "read_images": "images",
    "read_plan": "plan",
    "reconstruction": "reconstruction",
    "recover_pruned": "pruned",
    "recoverability": "recoverability",
    "restore": "recover.restore",
    "replace": "replace",
    "replan": "planner",
    "save": "store",
    "split": "images",
    "trace": "anatomy",
}

__all__ = sorted(_PLACES)

try:
    __version__ = version("understudy")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0"


class _Package(ModuleType):
    """Some functions have the name of the file they live in (`understudy.cut`): the function is the public name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _PLACES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'understudy' has no attribute {name!r}")
    value = getattr(import_module(f"understudy.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_PLACES]

"""understudy: a small network learns the role of a big one from a few unlabelled images.

Names are resolved when they are first used, so importing the package imports no torch.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_PLACES = {
    "Anatomy": "graph",
    "MimicConfig": "recover.mimic",
    "PRESETS": "recover.mimic",
    "Plan": "plan",
    "Preprocessing": "images",
    "Report": "report",
    "Result": "compress",
    "SCORES": "score",
    "Seam": "seam",
    "SeamPoint": "seam",
    "Teacher": "teachers",
    "UnderstudyError": "errors",
    "capturing": "seam",
    "check_cut": "laws",
    "compress": "compress",
    "count": "cost",
    "cut": "cut",
    "figures": "verify",
    "find_seam": "anatomy",
    "inspect": "inspect",
    "load": "store",
    "load_teacher": "teachers",
    "make_plan": "planner",
    "mimic": "recover.mimic",
    "own_teacher": "teachers",
    "read_images": "images",
    "read_plan": "plan",
    "replace": "replace",
    "replan": "planner",
    "save": "store",
    "split": "images",
    "trace": "anatomy",
}

__all__ = sorted(_PLACES)  # noqa: PLE0605 (a list, made from the table above)

try:
    __version__ = version("understudy")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0"


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'understudy' has no attribute {name!r}")
    value = getattr(import_module(f"understudy.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_PLACES]

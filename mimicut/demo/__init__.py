"""A real task that needs no download, and trained teachers for it. Its names import torch when they are first used."""

from importlib import import_module
from typing import Any

_MODULES = {
    **dict.fromkeys(("NAMES", "build", "facts", "load"), "teacher_networks"),
    **dict.fromkeys(("few_images", "patches", "test_hash", "test_set", "write_few_images"), "photographs"),
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

"""The versions of software and the kind of machine that a result was made with."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_PACKAGES = ("mimicut", "torch", "torchvision", "timm", "safetensors")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a result is; those not installed are left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def platform_kind(threads: int | None = None, device: str = "cpu") -> dict[str, Any]:
    """The kind of machine, without host name or path.

    Args:
        threads: Number of threads that the framework uses.
        device: Where networks ran.
    """
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "device": device,
    }


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str | None:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
    except OSError:
        return platform.processor() or None

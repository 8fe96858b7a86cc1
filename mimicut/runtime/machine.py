"""What a measured latency depends on besides the setting: the processor and the version of the runtime."""

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import torch

from mimicut.base.environment import platform_kind


def machine(runtime: str = "torch") -> str:
    """The name of the processor on which `runtime` runs."""
    if runtime in ("cuda", "tensorrt") and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return platform_kind()["processor"] or platform.machine()


def runtime_version(runtime: str) -> str | None:
    """The version of the package that is the runtime; None where it is not installed."""
    packages = {"onnxruntime": ("onnxruntime", "onnxruntime-gpu"), "openvino": ("openvino",)}
    packages["tensorrt"] = packages["onnxruntime"][::-1]
    for package in packages.get(runtime, ("torch",)):
        with suppress(PackageNotFoundError):
            return version(package)
    return None

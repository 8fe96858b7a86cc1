"""Measured latency: the time of one forward pass of a network on the runtime where it will run.

Networks that are compared are timed in turn, round by round, so that other load on the machine affects all of them
alike; the figure to trust is the ratio of two networks within a round (`MeasuredLatency.over`). The outputs of each
converted network are compared with the model's before it is timed. Every runtime is set to float32 explicitly.

Not covered: several passes at once, memory, energy. With more threads than idle cores the figures mean little, those
of torch least (measured, two threads, one core busy: five times as long as on one thread, now and then 300 times).
Two copies of one network differ by up to 1 % for as long as they exist, rarely by 3 % (measured). Smaller differences
mean nothing.
"""

import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from mimicut.anatomy.tracing import Example, as_example, export_program, quiet, require_data
from mimicut.base.errors import InputError, LawBroken, MimicutError, UnsupportedModel, one_line
from mimicut.base.guard import caches_kept, exact_float32, full_copy, seeded, structural_copy
from mimicut.runtime.export import batch_of, batched, difference, in_float32, outputs_of, tensors_in
from mimicut.runtime.int8 import quantise
from mimicut.runtime.machine import machine, runtime_version
from mimicut.runtime.onnx_file import write_onnx
from mimicut.surgery.budget import RUNTIMES

TOLERANCE = 1e-3  # of the largest output, in float32. Measured on CPUs: 1e-7 to 2e-6
INT8_RUNTIMES = ("onnxruntime", "openvino")
_PROVIDER = {"onnxruntime": "CPUExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
_BURST = 2.0  # ms that a sample takes at least, in passes one after another. Assumption: Python's own part is below 1 %
_PATIENCE = 5  # times the seconds, at most, for a precision that is asked for. Assumption
_ROUNDS = 10  # at least, whatever they take. Assumption: quartiles of fewer say little


@dataclass(frozen=True)
class Setting:
    """Where and how latency is measured. Two figures compare only where setting and machine are the same.

    Attributes:
        runtime: One of RUNTIMES.
        threads: Threads of one forward pass, on the CPU.
        batch: Images in one pass.
        precision: "float32", or "int8" on a runtime that reads ONNX files: then the network is quantised first.

    Raises:
        InputError: A field has another value; the message says what was expected.

    >>> Setting("onnxruntime", threads=2).batch
    1
    """

    runtime: str
    threads: int = 1
    batch: int = 1
    precision: str = "float32"

    def __post_init__(self) -> None:
        known = (("runtime", self.runtime, RUNTIMES), ("precision", self.precision, ("float32", "int8")))
        for name, found, expected in known:
            if found not in expected:
                raise InputError(f"measuring latency: found {name} {found!r}, expected one of {', '.join(expected)}")
        if self.precision == "int8" and self.runtime not in INT8_RUNTIMES:
            raise InputError(
                f"measuring latency in INT8: {self.runtime} runs no INT8 files of ONNX; expected one of "
                f"{', '.join(INT8_RUNTIMES)}"
            )
        for name, count in (("threads", self.threads), ("batch", self.batch)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise InputError(f"measuring latency: found {name} {count!r}, expected a whole number from 1 on")

    def to_json(self) -> dict[str, Any]:
        """With the runtime's version and the processor; two figures compare where these documents are equal."""
        return {**vars(self), "version": runtime_version(self.runtime), "processor": machine(self.runtime)}


@dataclass(frozen=True)
class MeasuredLatency:
    """The latency of one network on one runtime, in milliseconds of one forward pass.

    Attributes:
        ms_median, ms_low, ms_high: Median, lower and upper quartile of the rounds.
        runs: Forward passes that were timed.
        ms_rounds: The mean of each round.
    """

    ms_median: float
    ms_low: float
    ms_high: float
    runs: int
    ms_rounds: tuple[float, ...] = field(repr=False)

    def over(self, other: "MeasuredLatency") -> tuple[float, float, float]:
        """This latency as a share of `other`'s, from the ratios within each round: median, lower and upper quartile.

        The quartiles show how much rounds differ, which does not shrink with their number.

        Raises:
            InputError: The two were not measured by one call of `measure`.
        """
        if len(self.ms_rounds) != len(other.ms_rounds):
            raise InputError(
                f"comparing latencies of {len(self.ms_rounds)} and of {len(other.ms_rounds)} rounds; expected two "
                "networks that were measured in turn, by one call of measure"
            )
        return _quartiles([mine / its for mine, its in zip(self.ms_rounds, other.ms_rounds, strict=True)])


class Prepared:
    """A network converted and loaded for one setting. Called, it runs one forward pass, waits for its end and returns
    the output tensors, on the CPU."""

    def __init__(self, setting: Setting, run: Callable[[], Any]):
        self.setting, self._run = setting, run

    def __call__(self) -> list[Tensor]:
        with _set_up(self.setting):
            values = [v for v in tree_leaves(self._run()) if isinstance(v, (Tensor, np.ndarray))]
            return [v.cpu() if isinstance(v, Tensor) else torch.from_numpy(v.copy()) for v in values]

    def milliseconds(self, passes: int) -> float:
        """The mean time of `passes` forward passes. One before them is not timed, because what ran before this network
        has left other data in the caches."""
        with _set_up(self.setting):
            run = self._run
            run()
            began = time.perf_counter_ns()
            for _ in range(passes):
                run()
            return (time.perf_counter_ns() - began) / passes / 1e6

    def close(self) -> None:
        """Release the network."""
        self._run = _closed


def _closed() -> None:
    raise InputError("running a network that was closed; expected prepare to be called again")


def available(runtime: str) -> str | None:
    """Why `runtime` cannot be used on this machine and what to do; None where it can.

    Raises:
        InputError: There is no runtime with this name.
    """
    Setting(runtime, 1, 1)
    library = {"onnxruntime": "onnxruntime", "openvino": "openvino", "tensorrt": "onnxruntime"}.get(runtime)
    needed = ("onnx", "onnxscript", library) if library else ()
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        return f"{', '.join(missing)} is not installed; expected the extra `export`: pip install 'mimicut[export]'"
    if runtime == "compile":
        compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
        if shutil.which(compiler) is None:
            return f"no C++ compiler {compiler} is found; expected one: install it, or name another in CXX"
    if runtime == "cuda" and not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device; measure on torch, onnxruntime or openvino (the CPU)"
    if runtime == "tensorrt":
        import onnxruntime

        if _PROVIDER[runtime] not in onnxruntime.get_available_providers():
            return (
                f"onnxruntime {onnxruntime.__version__} is built without TensorRT; expected onnxruntime-gpu in its "
                "place (pip install onnxruntime-gpu tensorrt), or measure on cuda"
            )
    return None


def prepare(model: nn.Module, example: Any, setting: Setting) -> Prepared:
    """Convert a copy of `model`, in eval mode and float32, and load it for `setting`.

    In INT8 its outputs are not compared, and the example alone gives the ranges: they do not change the time.

    Args:
        model: The network; it is untouched.
        example: Images (N, C, H, W), a tuple of arguments, or (args, kwargs); whatever has N as its first axis is
            repeated or cut to `setting.batch`.
        setting: Runtime, threads and batch.

    Raises:
        InputError: The runtime is not available on this machine.
        UnsupportedModel: The runtime cannot run the model.
        LawBroken: Its first outputs differ from the model's on the CPU by more than TOLERANCE of the largest.
    """
    runtime, name = setting.runtime, type(model).__name__
    reason = available(runtime)
    if reason is not None:
        raise InputError(f"measuring latency on {runtime}: {reason}")
    require_data(model)
    with caches_kept(model), seeded(0):
        ready, call = in_float32(full_copy(model), example)
        call = _of_batch(call, setting.batch)
        with _set_up(setting):
            expected = outputs_of(ready, *call)
        try:
            prepared = Prepared(setting, _LOAD[runtime](ready, call, setting))
            found = prepared()
        except MimicutError:
            raise
        except Exception as error:  # whatever a runtime raises
            raise UnsupportedModel(
                f"preparing {name} for {runtime}: {one_line(error)}; expected a network that it can run; "
                "measure on another runtime"
            ) from error
    far = difference(found, expected) if setting.precision == "float32" else 0.0
    if not far <= TOLERANCE:
        prepared.close()
        raise LawBroken(
            f"comparing {name} on {runtime} with the model: outputs differ by {far:.1e} of the largest in "
            f"float32, expected at most {TOLERANCE:.1e}; its latency would be that of another network"
            + ("; if TF32 is the reason, start with NVIDIA_TF32_OVERRIDE=0" if runtime == "tensorrt" else "")
        )
    return prepared


def prepare_file(path: Path, example: Any, setting: Setting) -> Prepared:
    """Load an ONNX file of any precision for `setting`; its outputs are not compared.

    Args:
        path: The file.
        example: As in `prepare`.
        setting: The runtime is onnxruntime, openvino or tensorrt.

    Raises:
        InputError: The runtime is not available on this machine, or reads no files.
        UnsupportedModel: The runtime cannot run this file.
    """
    reason = available(setting.runtime) or (None if setting.runtime in _OPEN else "it reads no ONNX files")
    if reason is not None:
        raise InputError(f"measuring {path.name} on {setting.runtime}: {reason}")
    call = _of_batch(as_example(example), setting.batch)
    try:
        return Prepared(setting, _OPEN[setting.runtime](path, call, setting))
    except MimicutError:
        raise
    except Exception as error:  # whatever a runtime raises
        raise UnsupportedModel(
            f"loading {path.name} on {setting.runtime}: {one_line(error)}; expected a network that it can run"
        ) from error


def measure(
    networks: Mapping[str, nn.Module | Prepared],
    example: Any,
    setting: Setting,
    *,
    seconds: float = 5.0,
    precision: float | None = None,
) -> dict[str, MeasuredLatency]:
    """Measure the latency of networks in turn. Every round has a turn of each, in an order that rotates and reverses.

    Those that are prepared already may differ from `setting` in precision.

    A turn is one forward pass that is not timed, then as many as take 2 ms.

    Args:
        networks: Name -> network. Those that are not `Prepared` are prepared with `example`, and closed at the end.
        example: As in `prepare`.
        setting: Runtime, threads and batch.
        seconds: How long to measure at least; there are always 10 rounds or more.
        precision: The standard error of every network's share of the first one at which to stop (0.01: 1 %). Then
            measuring takes up to five times `seconds`. None stops after `seconds`.

    Returns:
        Name -> latency.

    Raises:
        InputError: There is no network, or one was prepared for another setting; else as `prepare`.
        UnsupportedModel, LawBroken: As `prepare`.
    """
    if not networks or not seconds >= 0:
        raise InputError(f"measuring {len(networks)} networks for {seconds} s: expected one or more, and 0 s or more")
    ready_ones = {n: v.setting for n, v in networks.items() if isinstance(v, Prepared)}
    strange = [n for n, at in ready_ones.items() if replace(at, precision=setting.precision) != setting]
    if strange:
        found = ready_ones[strange[0]]
        raise InputError(f"measuring {strange[0]}: found it prepared for {found}, expected {setting}")
    ready: dict[str, Prepared] = {}
    try:
        for name, network in networks.items():
            ready[name] = network if isinstance(network, Prepared) else prepare(network, example, setting)
        with seeded(0):
            return dict(zip(ready, _in_turn(list(ready.values()), seconds, precision), strict=True))
    finally:
        for name, network in ready.items():
            if network is not networks[name]:
                network.close()


def _in_turn(networks: Sequence[Prepared], seconds: float, precision: float | None) -> list[MeasuredLatency]:
    warm = [min(network.milliseconds(1) for _ in range(3)) for network in networks]
    passes = [max(1, math.ceil(_BURST / ms)) for ms in warm]
    rounds: list[list[float]] = []
    began, count = time.perf_counter(), len(networks)

    def enough() -> bool:
        passed = time.perf_counter() - began
        if len(rounds) < _ROUNDS or passed < seconds:
            return False
        return precision is None or passed >= _PATIENCE * seconds or _standard_error(rounds) <= precision

    while not enough():
        turns = [(len(rounds) + i) % count for i in range(count)]
        if len(rounds) // count % 2:
            turns.reverse()
        found = {i: networks[i].milliseconds(passes[i]) for i in turns}
        rounds.append([found[i] for i in range(count)])
    columns = zip(*rounds, strict=True)
    return [MeasuredLatency(*_quartiles(ms), n * len(rounds), ms) for ms, n in zip(columns, passes, strict=True)]


def _standard_error(rounds: list[list[float]]) -> float:
    """The largest relative standard error of any network's median share of the first one.

    Source: that of a median is 1.253 deviations over the root of n, a deviation 0.741 of the distance of the quartiles.
    """
    times = np.array(rounds)
    low, median, high = np.quantile(times / times[:, :1], (0.25, 0.5, 0.75), axis=0)
    return float((1.253 * 0.741 * (high - low) / median).max() / math.sqrt(len(times)))


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return median, low, high


@contextmanager
def _set_up(setting: Setting) -> Iterator[None]:
    """Set torch up for `setting`: threads, no gradients, float32 despite the caller's autocast, no TF32 on a GPU."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(setting.threads)
        plain = torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False)
        with torch.inference_mode(), plain[0], plain[1], exact_float32():
            yield
    finally:
        torch.set_num_threads(threads)


def _of_batch(call: Example, batch: int) -> Example:
    found = batch_of(call)
    if not found:
        raise InputError("measuring latency: the example holds no images; expected a tensor whose first axis is N")
    return tree_map(lambda v: v[torch.arange(batch) % found] if batched(v, call) else v, call)


def _eager(model: nn.Module, call: Example, setting: Setting) -> Callable[[], Any]:
    """On a GPU the images are on the device before a pass begins."""
    args, kwargs = call
    if setting.runtime != "cuda":
        return lambda: model(*args, **kwargs)
    model = model.cuda()
    args, kwargs = tree_map(lambda v: v.cuda() if isinstance(v, Tensor) else v, call)

    def run() -> Any:
        outputs = model(*args, **kwargs)
        torch.cuda.synchronize()
        return outputs

    return run


def _compiled(model: nn.Module, call: Example, setting: Setting) -> Callable[[], Any]:
    """torch keeps what it compiles with the code of the function, up to 8 versions: this code belongs to this
    network and is freed with it."""
    args, kwargs = call

    def forward() -> Any:
        return model(*args, **kwargs)

    own = FunctionType(forward.__code__.replace(), forward.__globals__, "forward", None, forward.__closure__)
    compiled = torch.compile(own, dynamic=False)
    with quiet("torch.utils.cpp_extension"), _set_up(setting):  # it warns that there is no GPU
        compiled()
    return compiled


def _by_onnx(model: nn.Module, call: Example, setting: Setting) -> Callable[[], Any]:
    clone = structural_copy(model)
    with tempfile.TemporaryDirectory(prefix="mimicut") as folder:
        path, program = Path(folder) / "model.onnx", export_program(clone, *call)

        def opened(optimise: bool) -> Callable[[], Any]:
            write_onnx(program, clone, path, optimise=optimise)
            if setting.precision == "float32":
                return _OPEN[setting.runtime](path, call, setting)
            in_int8 = path.with_name("model.int8.onnx")
            quantise(path, in_int8, [_arrays(call)], tries=False)
            return _OPEN[setting.runtime](in_int8, call, setting)

        try:
            return opened(optimise=False)
        except InputError:
            raise
        except Exception:  # whatever a runtime raises at what the converter leaves over
            return opened(optimise=True)


def _onnxruntime(path: Path, call: Example, setting: Setting) -> Callable[[], Any]:
    """On a GPU copying the images there and the outputs back is part of a pass."""
    import onnxruntime

    options, wanted = onnxruntime.SessionOptions(), _PROVIDER[setting.runtime]
    options.intra_op_num_threads, options.inter_op_num_threads = setting.threads, 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3  # errors
    # Threads that spin after a pass take the cores of the network whose turn is next. Measured with two threads on two
    # cores, one of them busy: the shares of a network in itself have quartiles of 0.2 and 4.2, without spinning of 0.96
    # and 1.04, and it is three times as fast. With one thread nothing spins.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers: list[Any] = [wanted]
    if setting.runtime == "tensorrt":
        providers.append(("CUDAExecutionProvider", {"use_tf32": "0"}))
        with suppress(ImportError):
            import tensorrt  # noqa: F401  it loads the libraries that ONNX Runtime looks for
    session = onnxruntime.InferenceSession(path, options, providers=providers)
    if wanted not in session.get_providers():  # ONNX Runtime silently takes the next one
        raise InputError(
            f"measuring latency on {setting.runtime}: ONNX Runtime cannot load {wanted}; expected the libraries that "
            "it was built for (pip install tensorrt), or measure on cuda"
        )
    feed = dict(zip((given.name for given in session.get_inputs()), _arrays(call), strict=True))
    return lambda: session.run(None, feed)


def _openvino(path: Path, call: Example, setting: Setting) -> Callable[[], Any]:
    import openvino

    core = openvino.Core()
    core.set_property({"ENABLE_MMAP": False})  # the file does not last
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # else it silently takes bfloat16 where the processor has it
        "INFERENCE_NUM_THREADS": setting.threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # else all the networks are bound to the same cores, busy ones too
    }
    request = core.compile_model(core.read_model(path), "CPU", options).create_infer_request()
    for i, array in enumerate(_arrays(call)):
        request.set_input_tensor(i, openvino.Tensor(array))
    return lambda: request.infer(share_outputs=True).to_tuple()


def _arrays(call: Example) -> list[np.ndarray]:
    return [t.detach().contiguous().numpy() for t in tensors_in(call)]


_OPEN = {"onnxruntime": _onnxruntime, "openvino": _openvino, "tensorrt": _onnxruntime}
_LOAD = {"torch": _eager, "compile": _compiled, "cuda": _eager} | dict.fromkeys(_OPEN, _by_onnx)

"""INT8: post-training quantisation of an ONNX file by ONNX Runtime, with ranges from a few images.

Weights are quantised by channel, activations by tensor, and written as pairs of QuantizeLinear and DequantizeLinear
(QDQ), which ONNX Runtime and OpenVINO both run in INT8.
"""

import platform
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout, suppress
from functools import partial
from io import StringIO
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch

from mimicut.anatomy.tracing import quiet

# Percent of an activation's values that a narrow range holds; half of the rest lies beyond each end. Source: measured
# on the demo's teachers: 99.99 and 99.999 leave more error in the mean, 99.95 twice as much (docs/LOG.md).
NARROW = 99.995
_STDOUT = Lock()  # whoever holds it has redirected stdout


def weight_bits() -> int:
    """Bits of a weight in INT8 for the processor of this machine: 8, or 7 on an x86 processor without VNNI.

    Without VNNI two products are added in 16 bits, which those of 8 bits overflow. Measured on one (AVX2), agreement
    with the teacher of the demo's three, 50 images: 97.8, 99.4 and 96.7 % with 7 bits, 95.3, 96.7, 94.1 with 8.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return 8
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 has only the other function
    return 8 if found.get("avx_vnni") or torch.cpu._is_vnni_supported() else 7


def quantise(source: Path, target: Path, batches: Sequence[Sequence[np.ndarray]], *, tries: bool = True) -> None:
    """Write the float32 ONNX file `source` in INT8 to `target`, with weights of `weight_bits`.

    Batch norms are folded into their convolutions first. Transposed convolutions of several groups with a bias stay in
    float32, as ONNX Runtime does not quantise them. Errors of ONNX Runtime are raised as they are.

    Args:
        source: The float32 file.
        target: The INT8 file.
        batches: Inputs of the network, arrays in the order of its inputs; from the values to which they lead come the
            ranges.
        tries: Whether ranges that leave out the largest values (NARROW) are tried, and taken where the outputs are
            nearer; else they go from the smallest value to the largest.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory(prefix="mimicut") as scratch, quiet("root"):
        folded, widest, narrow = (Path(scratch) / f"{name}.onnx" for name in ("folded", "widest", "narrow"))
        quant_pre_process(source, folded, skip_symbolic_shape=True)
        graph = onnx.load(folded, load_external_data=False).graph
        names, outputs = [each.name for each in graph.input], list(graph.output)
        computed = [each for each in outputs if each.name not in names]
        if len(computed) < len(outputs):  # ONNX Runtime takes an output that is an input for a cycle
            _put_outputs(folded, computed, folded)
        feeds = [dict(zip(names, arrays, strict=True)) for arrays in batches]
        write = partial(_write, folded, feeds=feeds, nodes_to_exclude=_not_quantised(graph))
        write(widest)
        best = widest
        if tries:
            # The largest first: a histogram gets more bins for each later value that is larger than those before.
            feeds.sort(key=_largest, reverse=True)
            one_by_one = {"CalibPercentile": NARROW, "CalibStridedMinMax": 1}
            with suppress(ValueError):  # of infinities, and of zeros alone, ONNX Runtime makes no histogram
                write(narrow, calibrate_method=CalibrationMethod.Percentile, extra_options=one_by_one)
        if narrow.exists():
            plain = _session(folded)
            calls = ((list(feed.values()), plain.run(None, feed)) for feed in feeds)
            errors = file_errors([widest, narrow], calls)
            best = narrow if errors[1] < errors[0] else widest
        _put_outputs(best, outputs, target)


def _largest(feed: dict[str, np.ndarray]) -> float:
    """The largest magnitude in an input's floats."""
    floats = [array for array in feed.values() if array.dtype.kind == "f" and array.size]
    return max((float(np.abs(array).max()) for array in floats), default=0.0)


def _not_quantised(graph: Any) -> list[str]:
    """The names of the nodes that stay in float32: transposed convolutions of several groups with a bias, which ONNX
    Runtime (1.32) multiplies by the scales of one group's channels."""
    return [
        node.name
        for node in graph.node
        if node.op_type == "ConvTranspose"
        and len(node.input) == 3
        and any(a.name == "group" and a.i > 1 for a in node.attribute)
    ]


def _write(source: Path, target: Path, feeds: Sequence[dict[str, np.ndarray]], **options: Any) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        def __init__(self) -> None:
            self.set_range(0, len(feeds))

        def __len__(self) -> int:
            return len(feeds)

        def set_range(self, start_index: int, end_index: int) -> None:
            self._left = iter(feeds[start_index:end_index])

        def get_next(self) -> dict | None:
            return next(self._left, None)

    with _STDOUT, redirect_stdout(StringIO()):  # on which ONNX Runtime reports
        quantize_static(
            source, target, Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, reduce_range=weight_bits() == 7, **options,
        )  # fmt: skip


def file_errors(
    paths: Sequence[Path], calls: Iterable[tuple[Sequence[np.ndarray], Sequence[np.ndarray]]]
) -> list[float]:
    """Of each ONNX file the squared error of its outputs, each over its own squares, added up. Outputs of zeros alone
    are left out. Where a file returns no floats, the share of its whole numbers that are others.

    Args:
        paths: The files, which take and return the same.
        calls: Inputs and the outputs that are wanted of them, each in the file's order.
    """
    sessions = [_session(path) for path in paths]
    names = [each.name for each in sessions[0].get_inputs()]
    sums: list[list[list[float]]] = []  # of each call: the sizes of its outputs, and the errors of each file
    for inputs, wanted in calls:
        found = [session.run(None, dict(zip(names, inputs, strict=True))) for session in sessions]
        floats = [i for i, array in enumerate(wanted) if array.dtype.kind == "f"]
        if floats:
            want = {i: wanted[i].astype(np.float64) for i in floats}
            sizes = [float(np.square(w).sum()) for w in want.values()]
            errors = [[float(np.square(each[i] - w).sum()) for i, w in want.items()] for each in found]
        else:
            sizes = [float(array.size) for array in wanted]
            errors = [[float((f != w).sum()) for f, w in zip(each, wanted, strict=True)] for each in found]
        sums.append([sizes, *errors])
    sizes, *errors = np.sum(sums, axis=0)
    return [float((each[sizes > 0] / sizes[sizes > 0]).sum()) for each in errors]


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.enable_cpu_mem_arena = False  # it keeps what every operator once needed
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _put_outputs(source: Path, outputs: Sequence[Any], target: Path) -> None:
    import onnx

    model = onnx.load(source)
    del model.graph.output[:]
    model.graph.output.extend(outputs)
    onnx.save(model, target)

"""INT8: post-training quantisation of an ONNX file by ONNX Runtime, with ranges from a few images.

Weights are quantised by channel, activations by tensor, and written as pairs of QuantizeLinear and DequantizeLinear
(QDQ), which ONNX Runtime and OpenVINO both run in INT8.
"""

import platform
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mimicut.anatomy.tracing import quiet


def weight_bits() -> int:
    """Bits of a weight in INT8 for the processor of this machine: 8, or 7 on an x86 processor without VNNI.

    Without VNNI two products are added in 16 bits, which those of 8 bits overflow. Measured on one (AVX2), agreement
    with the teacher of the demo's three, 50 images: 97.8, 99.4 and 96.7 % with 7 bits, 95.3, 96.7, 94.1 with 8.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return 8
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 has only the other function
    return 8 if found.get("avx_vnni") or torch.cpu._is_vnni_supported() else 7


def quantise(source: Path, target: Path, batches: Sequence[Sequence[np.ndarray]]) -> None:
    """Write the float32 ONNX file `source` in INT8 to `target`, with weights of `weight_bits`.

    Batch norms are folded into their convolutions first. Errors of ONNX Runtime are raised as they are.

    Args:
        source: The float32 file.
        target: The INT8 file.
        batches: Inputs of the network, arrays in the order of its inputs; the ranges are the smallest and largest
            values to which they lead.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        def __init__(self, names: Sequence[str]):
            self._feeds: Iterator[dict] = (dict(zip(names, arrays, strict=True)) for arrays in batches)

        def get_next(self) -> dict | None:
            return next(self._feeds, None)

    with tempfile.TemporaryDirectory(prefix="mimicut") as scratch, quiet("root"):
        folded = Path(scratch) / "folded.onnx"
        quant_pre_process(source, folded, skip_symbolic_shape=True)
        graph = onnx.load(folded, load_external_data=False).graph
        names, outputs = [each.name for each in graph.input], list(graph.output)
        computed = [each for each in outputs if each.name not in names]
        if len(computed) < len(outputs):  # ONNX Runtime takes an output that is an input for a cycle
            _put_outputs(folded, computed)
        quantize_static(
            folded, target, Reader(names), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, reduce_range=weight_bits() == 7,
        )  # fmt: skip
        if len(computed) < len(outputs):
            _put_outputs(target, outputs)


def _put_outputs(path: Path, outputs: Sequence[Any]) -> None:
    import onnx

    model = onnx.load(path)
    del model.graph.output[:]
    model.graph.output.extend(outputs)
    onnx.save(model, path)

"""Compare teacher and student, each in float32 and in INT8: does the cut help beside quantisation?"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mimicut.anatomy.tracing import as_example
from mimicut.base.guard import evaluating
from mimicut.inputs.image_set import ImageSet, ImagesWithCall
from mimicut.proof.certificate import binomial_interval
from mimicut.proof.figures import answers_of
from mimicut.runtime.export import Exported, batch_of, run_onnx, tensors_in
from mimicut.runtime.latency import Setting, measure, prepare_file
from mimicut.surgery.seam import Seam

MOST = 1000  # most images that are compared; all are held in memory at once. Source: assumption.
_BATCH = 32
_SECONDS, _PRECISION = 6.0, 0.01  # length of the measurement, standard error of a share. Source: assumption.


def int8_table(
    exported: Mapping[str, Exported],
    reference: nn.Module,
    proof: ImageSet | ImagesWithCall | None,
    example: Any,
    setting: Setting,
    seam: Seam,
) -> dict[str, Any]:
    """Measure latency, size and top-1 agreement of every network in `exported`, in float32 and in INT8.

    Args:
        exported: Name -> its "onnx" and "int8" files.
        reference: The torch network with whose classes the others are compared.
        proof: Images that neither trained nor quantised anything; at most MOST are compared.
        example: As `reference` takes it, images first.
        setting: Where latency is measured ("onnxruntime" or "openvino"), all networks in turn; a file with a fixed
            batch takes as many images as `example`.
        seam: Of `reference`; it knows which output is class scores.

    Returns:
        Plain data: the setting, the number of images, and rows of name, ms, share (of the first row's latency), bytes
        and agreement with its interval (None if undefined).
    """
    fixed = any(each.static is not None for each in exported.values())
    size = batch_of(as_example(example))
    if fixed:
        setting = replace(setting, batch=size)
    names = {"onnx": "{}", "int8": "{}, INT8"}
    files = {form.format(name): e.files[kind] for name, e in exported.items() for kind, form in names.items()}
    prepared = {}
    try:
        for name, path in files.items():
            prepared[name] = prepare_file(path, example, setting)
        latency = measure(prepared, example, setting, seconds=_SECONDS, precision=_PRECISION)
    finally:
        for each in prepared.values():
            each.close()
    first = next(iter(files))
    batches = _batches(proof, size if fixed else _BATCH, fixed)
    agreements = _agreements(list(files.values()), reference, batches, seam)
    rows = [
        {
            "name": name, "ms": latency[name].ms_median, "share": latency[name].over(latency[first])[0],
            "bytes": sum(p.stat().st_size for p in (path, path.with_name(f"{path.name}.data")) if p.exists()),
            **agreement,
        }
        for (name, path), agreement in zip(files.items(), agreements, strict=True)
    ]  # fmt: skip
    return {**setting.to_json(), "images": sum(map(batch_of, batches)), "rows": rows}


def _batches(proof: ImageSet | ImagesWithCall | None, size: int, fixed: bool) -> list[Any]:
    if proof is None:
        return []
    count = min(len(proof), MOST)
    starts = range(0, count - size + 1 if fixed else count, size)
    return [as_example(proof.batch(range(i, min(i + size, count)))) for i in starts]


def _agreements(
    files: list[Any], reference: nn.Module, batches: list[Any], seam: Seam
) -> list[dict[str, float | None]]:
    unknown: dict[str, float | None] = {"top1_agreement": None, "top1_agreement_low": None, "top1_agreement_high": None}
    theirs, where = [], 0
    with evaluating(reference):
        for args, kwargs in batches:
            output, images = reference(*args, **kwargs), batch_of((args, kwargs))
            scores = answers_of(seam, output, images)
            if scores is None:
                return [unknown] * len(files)
            where = next(i for i, t in enumerate(tensors_in(output)) if _same(t, scores))
            theirs.append(scores.argmax(1))
    if not theirs:
        return [unknown] * len(files)
    wanted, found = torch.cat(theirs), list[dict[str, float | None]]()
    for path in files:
        agree = int((torch.cat([each[where].argmax(1) for each in run_onnx(path, batches)]) == wanted).sum())
        low, high = binomial_interval(agree, len(wanted))
        share = agree / len(wanted)
        found.append({"top1_agreement": share, "top1_agreement_low": low, "top1_agreement_high": high})
    return found


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.cpu(), b)

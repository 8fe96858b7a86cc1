"""Where an exported file differs from its student: the error of every layer, and the first at which it jumps."""

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from mimicut.anatomy.tracing import as_example
from mimicut.base.errors import LawBroken, UnsupportedModel
from mimicut.inputs.preprocessing import model_inputs
from mimicut.results.export_checks import FIXED, run_elsewhere
from mimicut.runtime.export import TOLERANCE
from mimicut.runtime.layer_values import LayersOfFile

JUMP = 4  # A layer stands out by an error of its own of so many times the median of the others. Source: assumption.
FLOOR, FLOOR_INT8 = TOLERANCE, 0.05  # and of at least that: below, it is rounding, or what 8 bits cost. Assumption
_BYTES_AT_ONCE = 2**28  # of the layers' values, if more than FIXED images are compared at once. Source: assumption.


def layer_errors(
    model: nn.Module,
    path: Path,
    kind: str,
    batches: Mapping[str, Tensor],
    call: Mapping[str, Any] | None,
    free: Iterable[str],
    normalises: bool,
) -> dict[str, Any]:
    """Compare each layer of an exported file, run in a process of its own, with the same layer of the model in float32.

    A layer's error is the norm of the difference over the norm of the model's values, over all images. It adds up from
    layer to layer; `own` is what the layer alone adds: its error where all layers before it give the model's own
    values. The error jumps at the first layer whose own is at least JUMP times the median of the others and at least
    FLOOR (in INT8 FLOOR_INT8), or is no number.

    Args:
        model: What was exported.
        path: The file.
        kind: Its format.
        batches: Images (N, C, H, W) as the model takes them: "real" ones, or else "random" ones are compared.
        call: How the model takes images, see `model_inputs`.
        free: Which of "batch" and "size" are free in the file.
        normalises: Whether the model is one that was wrapped to normalise its images.

    Returns:
        The entry "layers" of `Report.exports`: "images" and their "kind"; "rows" of "layer", "error", "own" and
        "within", the layers that the file holds as one with this one, and "after", the activation after which the layer
        is compared, if the file holds both as one; "jump", a layer or None, and "unseen".

    Raises:
        UnsupportedModel: None of the layers can be found in the file, or a copy that shows them does not run.
    """
    which = "real" if "real" in batches else "random"
    images, free = batches[which], tuple(free)
    example = model_inputs(torch.cat([images, images])[:FIXED], call)
    layers = LayersOfFile(model, example, path, kind, free)
    if not layers.shown.values:
        raise UnsupportedModel(
            f"comparing {path.name} layer by layer: none of its values has the name of a layer's; expected those that "
            "this release gives them: export it again"
        )
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])  # of squares: differences, values
    with TemporaryDirectory(prefix="mimicut") as one, TemporaryDirectory(prefix="mimicut") as other:
        copies = {
            "error": layers.returning_values(Path(one), exact=False),
            "own": layers.returning_values(Path(other), exact=True),
        }
        at_once = max(FIXED, _BYTES_AT_ONCE * FIXED // layers.bytes) if "batch" in free else FIXED
        for part in images.split(at_once):
            if "batch" not in free and len(part) < FIXED:
                part = torch.cat([part, part])[:FIXED]
            _compare_part(layers, copies, part, call, sums)
    errors = {key: _ratio(*both) for key, both in sums.items()}
    wrappers = normalises + layers.wraps
    rows = [
        {
            "layer": _unwrapped(layer, wrappers), "error": errors[layer, "error"], "own": errors[layer, "own"],
            "within": [_unwrapped(each, wrappers) for each in layers.shown.within.get(layer, ())],
            **({"after": re.sub(r"_\d+$", "", name)} if (name := layers.shown.after.get(layer)) else {}),
        }
        for layer in dict.fromkeys(layer for layer, _ in errors)
    ]  # fmt: skip
    return {
        "images": len(images), "kind": which, "rows": rows, "jump": jump(rows, kind),
        "unseen": [_unwrapped(each, wrappers) for each in layers.shown.unseen],
    }  # fmt: skip


def _unwrapped(layer: str, wrappers: int) -> str:
    """The name of a layer without those of the modules around the network, each of which calls it "model".

    >>> _unwrapped("model.model.body.0", 1), _unwrapped("<model>:output.scores", 1)
    ('model.body.0', '<model>:output.scores')
    """
    for _ in range(wrappers):
        layer = layer.removeprefix("model.")
    return layer


def _compare_part(
    layers: LayersOfFile,
    copies: Mapping[str, tuple[Path, Mapping[str, Any], Sequence[str]]],
    part: Tensor,
    call: Mapping[str, Any] | None,
    sums: dict[tuple[str, str], list[float]],
) -> None:
    """Add to `sums` what differs for a few images."""
    values, outputs = layers.outputs_of(as_example(model_inputs(part, call)))
    shown = layers.shown.values
    for column, (copy, more, taken) in copies.items():
        said = {**(call or {"keyword": None, "options": {}}), **more}
        try:
            (found,) = run_elsewhere(copy, [[part, *(values[layer] for layer in taken)]], said)
        except LawBroken as error:
            raise UnsupportedModel(
                f"comparing {copy.name} layer by layer: a copy of it that also returns what its layers give does not "
                f"run; without this comparison (--explain) the file may: {error}"
            ) from error
        for layer, value in zip(shown, found[len(outputs) :], strict=True):
            _add(sums[layer, column], value, values[layer])
        for name, place in layers.shown.outputs.items():
            _add(sums[name, column], found[place], list(outputs.values())[place])


def _add(sums: list[float], found: Tensor, expected: Tensor) -> None:
    difference = found.double() - expected.double() if found.shape == expected.shape else torch.tensor(math.nan)
    sums[0] += difference.square().sum().item()
    sums[1] += expected.double().square().sum().item()


def _ratio(difference: float, values: float) -> float:
    if difference == 0:
        return 0.0
    return math.sqrt(difference / values) if values else math.inf


def jump(rows: Sequence[Mapping[str, Any]], kind: str) -> str | None:
    """The first layer at which the error jumps, by the rule of `layer_errors`.

    >>> jump([{"layer": "a", "own": 1e-7}, {"layer": "b", "own": 0.3}, {"layer": "c", "own": 2e-7}], "onnx")
    'b'
    """
    floor = FLOOR_INT8 if kind == "int8" else FLOOR
    for place, row in enumerate(rows):
        others = [r["own"] for i, r in enumerate(rows) if i != place and math.isfinite(r["own"])]
        if not row["own"] < max(floor, JUMP * statistics.median(others or [0.0])):
            return row["layer"]
    return None

"""What a network returns: which axis the images are on, what kind each output is, and whether the seam fixes it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import networkx
import torch
from torch.fx import Node

from mimicut.anatomy.tracing import Traced, operator, run_for_shapes, shape
from mimicut.base.errors import InputError
from mimicut.surgery.seam import AGREEING, Output, SeamPoint, watching

# They change neither which class is first nor whether a number is a probability.
_RESHAPES = {
    "flatten", "view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "contiguous", "clone", "_to_copy",
    "to", "select", "slice", "getitem", "upsample_bilinear2d", "upsample_nearest2d", "interpolate", "dropout",
    "seam_mark",
}  # fmt: skip
_ACTIVATIONS = {"softmax": "softmax", "_softmax": "softmax", "log_softmax": "log_softmax", "sigmoid": "sigmoid"}
_SORTS = {"topk", "sort", "max", "min", "kthvalue", "median"}
_LENGTHS = {"norm", "linalg_vector_norm", "linalg_norm"}
_KEEP_LENGTHS = {"clamp_min", "clamp", "expand", "expand_as", "add", *_RESHAPES}


def imitated(flow: networkx.DiGraph, seam: set[Node], output: Node) -> bool:
    """Whether every path to `output` leads through the seam, and from there through nothing that may be cut or trained.

    Args:
        flow: As `Traced.flow`.
        seam: The seam's nodes.
        output: What the network returns.
    """
    if output in seam:
        return True
    body = set(seam).union(*(networkx.ancestors(flow, n) for n in seam))
    todo, seen = [output], {output}
    while todo:
        node = todo.pop()
        if node in body:
            return False
        for source in flow.predecessors(node):
            if source == "in":
                return False
            if source not in seam and source not in seen:
                seen.add(source)
                todo.append(source)
    return True


def batch_axes(traced: Traced, points: Mapping[SeamPoint, Node]) -> tuple[int | None, ...]:
    """For each point the axis of its tensor that has one place, or several, for each image; None without one.

    A tensor of several axes whose first alone is as long as the batch has it there. For any other the network runs with
    one more image, and the axis that grows is the one.
    """
    sizes = [shape(node) or () for node in points.values()]
    batch = traced.batch
    axes: list[int | None] = [0 if len(s) > 1 and s[0] == batch and s.count(batch) == 1 else None for s in sizes]
    if None not in axes:
        return tuple(axes)
    grown = _with_one_more(traced, points)
    for i, (before, after) in enumerate(zip(sizes, grown, strict=True)):
        if after is None:  # it does not run with another number of images
            axes[i] = 0 if before[:1] == (traced.batch,) else None
        else:
            changed = [a for a, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
            axes[i] = changed[0] if len(changed) == 1 and len(before) == len(after) else None
    return tuple(axes)


def _with_one_more(traced: Traced, points: Mapping[SeamPoint, Node]) -> list[tuple[int, ...] | None]:
    """The shapes at `points` with one more image; None where they are not known."""
    batch = traced.batch

    def longer(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.shape[:1] == (batch,):
            return torch.cat([value, value[:1]])
        return value

    def run(model: Any, args: tuple, kwargs: dict) -> list[tuple[int, ...] | None]:
        with torch.no_grad(), watching(model, list(points)) as found:
            model(*args, **kwargs)
        tensors = [found.get(SeamPoint(p.module, p.side, p.call), {}).get(p.part) for p in points]
        return [None if t is None else tuple(t.shape) for t in tensors]

    try:
        return run_for_shapes(traced.model, torch.utils._pytree.tree_map(longer, traced.example), run)
    except Exception:  # whatever its code raises with another number of images
        return [None] * len(points)


def describe_outputs(
    traced: Traced,
    compared: Mapping[Node, tuple[str, int]],
    seam: Iterable[Node],
    headless: bool,
    boxes: Iterable[Node] = (),
) -> tuple[Output, ...]:
    """What a network returns: its floating-point tensors that depend on the images.

    Args:
        traced: The network.
        compared: As `returned`.
        seam: The seam's nodes.
        headless: The network returns features.
        boxes: Outputs that a detector's head makes.

    Returns:
        One entry for each. Kinds that no graph shows (coordinates look like class scores) are set with
        `with_kinds`.
    """
    flow, points = traced.flow(), set(seam)
    channels = [s[1] for n in traced.inputs if (s := shape(n)) and len(s) >= 4]
    found = []
    for node, (part, axis) in compared.items():
        kind, activation = ("boxes", "") if node in boxes else _kind(node, headless, channels)
        if kind in ("scores", "map") and not activation and _has_layers_below(traced, flow, node, compared):
            # The features of which others are made, beside these.
            kind = "embedding" if kind == "scores" else "values"
        is_imitated, is_image = imitated(flow, points, node), _is_image(node, channels)
        found.append(Output(part, kind, activation, is_imitated, is_image, axis, _class_axis(node)))
    return tuple(_as_values_where_maps_differ(found, [shape(node) or () for node in compared]))


def _as_values_where_maps_differ(outputs: Sequence[Output], shapes: Sequence[tuple[int, ...]]) -> list[Output]:
    """Maps of several numbers of channels are no maps of the same classes: sizes and offsets beside centres. Those of
    which nothing but their shape says that they name classes are taken for values."""
    maps = [
        size[o.class_axis] for o, size in zip(outputs, shapes, strict=True) if len(size) >= 4 and o.kind in AGREEING
    ]
    if len(set(maps)) < 2:
        return list(outputs)
    return [replace(o, kind="values") if o.kind == "map" and o.guessed else o for o in outputs]


def check_declared(traced: Traced, outputs: Sequence[Output]) -> None:
    """Refuse kinds that the user declared and that an output of its shape cannot have.

    Raises:
        InputError: The message names output, kind and shape.
    """
    nodes = {part: node for node, part in traced.outputs.items()}
    for output in (o for o in outputs if o.declared and o.part in nodes):
        size = shape(nodes[output.part]) or ()
        row = ("one row for each image", len(size) == 2 or (output.kind == "scores" and len(size) == 1))
        expected, fits = {
            "scores": row, "embedding": row, "map": ("classes at several positions of each image", len(size) > 2),
            "boxes": ("several rows for each image", len(size) == 3),
        }.get(output.kind, ("", True))  # fmt: skip
        if not fits:
            raise InputError(
                f"reading the kind of {output}: found {output.kind}, which is {expected}, but with {traced.batch} "
                f"images its shape is {tuple(size)}"
            )


def class_counts(traced: Traced, outputs: Sequence[Output]) -> list[int]:
    """How many classes, or labels, each of those outputs has that names some."""
    nodes = {part: node for node, part in traced.outputs.items()}
    named = [output for output in outputs if output.kind in AGREEING and output.part in nodes]
    return [(shape(nodes[output.part]) or ())[output.class_axis] for output in named]


def _has_layers_below(traced: Traced, flow: networkx.DiGraph, node: Node, others: Iterable[Node]) -> bool:
    """Whether another output is made of this one with parameters."""
    below = networkx.descendants(flow, node)
    between = below & set(others).union(*(networkx.ancestors(flow, n) for n in below & set(others)))
    return any(t in traced.tensors for n in between for t in n.all_input_nodes)


def returned(traced: Traced) -> dict[Node, tuple[str, int]]:
    """The outputs that can be compared, with their part and the axis of the images: floats that depend on the input
    and have such an axis."""
    computed = networkx.descendants(traced.flow(), "in")
    floats = {n: p for n, p in traced.outputs.items() if n in computed and n.meta["val"].is_floating_point()}
    axes = batch_axes(traced, {SeamPoint("", "output", 0, part): n for n, part in floats.items()})
    return {n: (p, axis) for (n, p), axis in zip(floats.items(), axes, strict=True) if axis is not None}


def not_measured(traced: Traced, compared: Mapping[Node, tuple[str, int]]) -> tuple[str, ...]:
    """The tensors that are returned and do not depend on the images, are no floats, or have no axis of images.
    compared: as `returned`."""
    return tuple(part or "the output" for node, part in traced.outputs.items() if node not in compared)


def _class_axis(node: Node) -> int:
    """The axis over which a final softmax runs; else the last of three, as of tokens, or the second."""
    size = shape(node) or ()
    if operator(node) in ("softmax", "_softmax", "log_softmax", "_log_softmax"):
        return int(node.args[1]) % len(size)
    return 2 if len(size) == 3 else 1


def _kind(node: Node, headless: bool, channels: list[int]) -> tuple[str, str]:
    """Kind and final activation of an output."""
    size = shape(node) or ()
    activation, before = "", node
    while operator(before) in _RESHAPES and before.args and isinstance(before.args[0], Node):
        before = before.args[0]
    if before.op == "call_function":
        activation = _ACTIVATIONS.get(operator(before), "")
    if operator(before) in _SORTS:
        return "values", ""
    if _has_unit_length(before):
        return "embedding" if len(size) == 2 else "values", ""
    if activation and len(size) == 4 and size[2] == size[3] and _class_axis(node) == 3:
        return "values", activation  # how much each token attends to each
    if activation and len(size) == 2:
        return ("multilabel" if activation == "sigmoid" else "scores"), activation
    if activation == "sigmoid" and len(size) >= 4 and size[1] > 1 and not _is_image(node, channels):
        return "multilabel", activation  # one yes or no at each position for each label
    if activation in ("softmax", "log_softmax") and len(size) == 3 and size[1] != size[2]:
        return "map", activation  # classes of each token or frame; a square one says how much each attends to each
    if len(size) == 2 and size[1] > 1:
        return ("embedding" if headless else "scores"), ""
    if len(size) >= 4 and not headless and not _is_image(node, channels) and (size[1] > 1 or activation):
        return "map", activation
    return "values", activation


def _is_image(node: Node, channels: list[int]) -> bool:
    size = shape(node) or ()
    return len(size) == 4 and size[1] in channels


def _has_unit_length(node: Any) -> bool:
    """Whether it is divided by its own length, whatever number it is then multiplied by."""
    while operator(node) in ("mul", "div") and not isinstance(node.args[1], Node):
        node = node.args[0]
    if operator(node) not in ("div", "mul") or not all(isinstance(a, Node) for a in node.args[:2]):
        return False
    length: Any = node.args[1]
    while isinstance(length, Node) and operator(length) in _KEEP_LENGTHS:
        length = length.args[0]
    if operator(length) in _LENGTHS:
        return operator(node) == "div" and length.args[0] is node.args[0]
    if not _is_root(length, inverse=operator(node) == "mul"):
        return False
    length = length.args[0]
    while operator(length) in {"sum", *_KEEP_LENGTHS}:
        length = length.args[0]
    return operator(length) in ("pow", "square", "mul") and length.args[0] is node.args[0]


def _is_root(node: Node, inverse: bool) -> bool:
    """Whether it is a square root, or one over it."""
    if operator(node) == "pow":
        return bool(node.args[1] == (-0.5 if inverse else 0.5))
    return operator(node) == ("rsqrt" if inverse else "sqrt")

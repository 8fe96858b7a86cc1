"""How each operator of ONNX is read: which layer of torch.nn it becomes, or which function.

A rule takes the reader and a node. It adds steps and says what the node returns (`GraphReader.set`); where it cannot,
it raises `Unreadable` with the reason. Source: the ONNX operator specification, versions 7 to 25.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from mimicut.inputs.onnx_reader import (
    NO_BATCH,
    PRIME,
    GraphReader,
    Node,
    PerImage,
    Unreadable,
    Value,
    as_tensor,
    type_name,
)

Rule = Callable[[GraphReader, Node], None]
_SIXTH = 1 / 6
# Source: onnx.TensorProto.DataType.
_TYPES = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "float32", 11: "float32",
    16: "float32"}  # fmt: skip


# --- layers ---------------------------------------------------------------------------------------------------------


def _conv(reader: GraphReader, node: Node) -> None:
    x, weight = reader.data(node), reader.constant(node, 1, "weight")
    turned = node.kind == "ConvTranspose"
    count = weight.ndim - 2
    _require(1 <= count <= 3 and len(x.shape) == weight.ndim, f"its weight has shape {weight.shape}")
    bias = reader.constant(node, 2, "bias") if reader.has(node, 2) else None
    groups, kernel = int(node.get("group", 1)), list(weight.shape[2:])
    strides, dilations = node.get("strides", [1] * count), node.get("dilations", [1] * count)
    options: dict[str, Any] = {
        "in_channels": weight.shape[0] if turned else weight.shape[1] * groups,
        "out_channels": weight.shape[1] * groups if turned else weight.shape[0],
        "kernel_size": kernel, "stride": strides, "dilation": dilations, "groups": groups, "bias": bias is not None,
    }  # fmt: skip
    fed = options["in_channels"]
    _require(x.shape[1] == fed, f"its weight has shape {weight.shape}, for {fed} channels, but its input {x.shape[1]}")
    if turned:
        _require("output_shape" not in node.attributes, "it has an output_shape; export it with pads")
        _require(node.get("auto_pad", "NOTSET") in ("NOTSET", "VALID"), "it has auto_pad; export it with pads")
        before, after = _halves(node.get("pads", [0] * 2 * count))
        _require(before == after, f"its pads {before} before and {after} after differ")
        options["output_padding"] = node.get("output_padding", [0] * count)
    else:
        x, before = _padded(reader, node, x, kernel, strides, dilations, 0.0)
    options["padding"] = before
    tensors = {"weight": as_tensor(weight)} | ({} if bias is None else {"bias": as_tensor(bias)})
    kind = f"Conv{'Transpose' if turned else ''}{count}d"
    reader.set(node, *reader.emit(node, kind, options, [x], tensors, node.inputs[1:3]))


def _padded(
    reader: GraphReader,
    node: Node,
    x: Value,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    value: float,
    most: bool = False,
) -> tuple[Value, list[int]]:
    """What a convolution or pooling is given, and the padding that it adds itself; both sides of an axis get the same,
    and, where it takes no more (`most`), half of the kernel at most. The rest is a step before it."""
    count = len(kernel)
    auto = node.get("auto_pad", "NOTSET")
    before, after = _halves(node.get("pads", [0] * 2 * count))
    if auto.startswith("SAME"):
        before, after = [], []
        for size, k, s, d in zip(x.shape[2:], kernel, strides, dilations, strict=True):
            all_ = max(0, (math.ceil(size / s) - 1) * s + (k - 1) * d + 1 - size)
            small, large = all_ // 2, all_ - all_ // 2
            before.append(small if auto == "SAME_UPPER" else large)
            after.append(large if auto == "SAME_UPPER" else small)
    elif auto == "VALID":
        before, after = [0] * count, [0] * count
    if before == after and not (most and any(p > k // 2 for p, k in zip(before, kernel, strict=True))):
        return x, before
    amounts = [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]
    return reader.apply(node, "pad", x, amounts=amounts, mode="constant", value=value), [0] * count


def _halves(pads: Sequence[int]) -> tuple[list[int], list[int]]:
    half = len(pads) // 2
    return list(pads[:half]), list(pads[half:])


def _matmul(reader: GraphReader, node: Node) -> None:
    a, b = (reader.plain(name) for name in node.inputs[:2])
    if not (isinstance(a, Value) and isinstance(b, np.ndarray) and b.ndim == 2 and b.dtype.kind == "f"):
        x, y = reader.data(node, 0), reader.data(node, 1)
        _require(bool(x.shape) and x.shape[-1] % PRIME != 0, "it runs over the images of a batch")
        reader.set(node, reader.apply(node, "matmul", x, y))
        return
    follower = reader.only_user(node.outputs[0], "Add")
    bias, origin, last = None, [node.inputs[1]], node
    if follower is not None:
        other = follower.inputs[1 - follower.inputs.index(node.outputs[0])]
        found = reader.values.get(other)
        if isinstance(found, np.ndarray) and found.shape[-1:] == (b.shape[1],) and found.size == b.shape[1]:
            bias, last, origin = found.reshape(-1), follower, [*origin, other]
    _linear(reader, last, a, b.T, bias, origin)
    if last is not node:
        reader.done.add(last.outputs[0])


def _gemm(reader: GraphReader, node: Node) -> None:
    a, b = (reader.plain(name) for name in node.inputs[:2])
    alpha, beta = float(node.get("alpha", 1.0)), float(node.get("beta", 1.0))
    _require(not node.get("transA", 0), "it transposes its first factor (transA); expected images on axis 0")
    _require(
        isinstance(a, Value) and isinstance(b, np.ndarray),
        "it is a product of two values that are computed from the image; expected a layer with weights",
    )
    assert isinstance(a, Value)
    assert isinstance(b, np.ndarray)
    weight, bias = b if node.get("transB", 0) else b.T, None
    if alpha != 1:
        weight = weight * np.float32(alpha)
    if reader.has(node, 2):
        bias = _spread(reader.constant(node, 2, "bias").reshape(-1), weight.shape[:1], "bias")
        bias = bias if beta == 1 else bias * np.float32(beta)
    _linear(reader, node, a, weight, bias, node.inputs[1:3] if alpha == beta == 1 else [])


def _linear(
    reader: GraphReader, node: Node, x: Value, weight: np.ndarray, bias: np.ndarray | None, origin: Sequence[str]
) -> None:
    _require(x.shape[-1] % PRIME != 0, NO_BATCH)
    tensors = {"weight": as_tensor(weight)} | ({} if bias is None else {"bias": as_tensor(bias)})
    options = {"in_features": weight.shape[1], "out_features": weight.shape[0], "bias": bias is not None}
    names = list(origin)
    if bias is not None and names and not names[0].endswith(".weight") and names[-1].endswith(".bias"):
        names[0] = f"{names[-1].removesuffix('.bias')}.weight"  # exporters turn the weight and drop its name
    reader.set(node, *reader.emit(node, "Linear", options, [x], tensors, names))


def _batch_norm(reader: GraphReader, node: Node) -> None:
    x = reader.data(node)
    _require(not node.get("training_mode", 0), "it is in training mode; export the network after model.eval()")
    _require(
        bool(node.get("spatial", 1)),
        "it has spatial 0, a mean and a variance for each place; expected one for each channel",
    )
    names = ("weight", "bias", "running_mean", "running_var")
    tensors = {n: as_tensor(reader.constant(node, i, n)) for i, n in enumerate(names, start=1)}
    kind = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}.get(len(x.shape))
    _require(kind is not None, f"its input has {len(x.shape)} axes")
    options = {
        "num_features": x.shape[1], "eps": float(node.get("epsilon", 1e-5)),
        "momentum": 1 - float(node.get("momentum", 0.9)),
    }  # fmt: skip
    reader.set(node, *reader.emit(node, str(kind), options, [x], tensors, node.inputs[1:5]))


def _instance_norm(reader: GraphReader, node: Node) -> None:
    x = reader.data(node)
    tensors = {n: as_tensor(reader.constant(node, i, n)) for i, n in ((1, "weight"), (2, "bias"))}
    options = {"num_features": x.shape[1], "eps": float(node.get("epsilon", 1e-5)), "affine": True}
    kind = f"InstanceNorm{len(x.shape) - 2}d"
    reader.set(node, *reader.emit(node, kind, options, [x], tensors, node.inputs[1:3]))


def _layer_norm(reader: GraphReader, node: Node) -> None:
    x, scale = reader.data(node), reader.constant(node, 1, "scale")
    shape = list(x.shape[_own_axis(x, node.get("axis", -1)) :])
    _require(all(n % PRIME for n in shape), "it runs over the images of a batch")
    tensors = {"weight": as_tensor(_spread(scale, shape, "scale"))}
    options = {"normalized_shape": shape, "eps": float(node.get("epsilon", 1e-5))}
    if node.kind == "LayerNormalization":
        options["bias"] = reader.has(node, 2)
        if options["bias"]:
            tensors["bias"] = as_tensor(_spread(reader.constant(node, 2, "bias"), shape, "bias"))
        reader.set(node, *reader.emit(node, "LayerNorm", options, [x], tensors, node.inputs[1:3]))
    else:
        reader.set(node, *reader.emit(node, "RMSNorm", options, [x], tensors, node.inputs[1:2]))


def _group_norm(reader: GraphReader, node: Node) -> None:
    x, groups = reader.data(node), int(node.get("num_groups", 1))
    tensors = {}
    for place, name in ((1, "weight"), (2, "bias")):
        values = reader.constant(node, place, name)
        fits = values.shape in ((groups,), x.shape[1:2])
        _require(fits, f"its {name} has shape {values.shape}, expected {(groups,)} or {x.shape[1:2]}")
        tensors[name] = as_tensor(np.repeat(values, x.shape[1] // len(values)))  # of a group before version 21
    options = {"num_groups": groups, "num_channels": x.shape[1], "eps": float(node.get("epsilon", 1e-5))}
    reader.set(node, *reader.emit(node, "GroupNorm", options, [x], tensors, node.inputs[1:3]))


def _prelu(reader: GraphReader, node: Node) -> None:
    x, slope = reader.data(node), reader.constant(node, 1, "slope")
    shape = slope.shape[1:] if len(slope.shape) == len(x.shape) and slope.shape[0] == 1 else slope.shape
    channels = slope.size == 1 or shape == (x.shape[1], *[1] * (len(x.shape) - 2))
    _require(channels, f"its slope has shape {slope.shape}, expected one for each channel")
    tensors = {"weight": as_tensor(slope.reshape(-1))}
    reader.set(node, *reader.emit(node, "PReLU", {"num_parameters": slope.size}, [x], tensors, node.inputs[1:2]))


# --- activations ----------------------------------------------------------------------------------------------------


def _layer(kind: str, **attributes: tuple[str, float]) -> Rule:
    """A rule for a layer without weights; attributes: its argument -> (the attribute, what it is by default)."""

    def rule(reader: GraphReader, node: Node) -> None:
        options = {ours: float(node.get(theirs, default)) for ours, (theirs, default) in attributes.items()}
        reader.set(node, *reader.emit(node, kind, options, [reader.data(node)]))

    return rule


def _with_own_input(kind: str, alone: Rule) -> Rule:
    """A rule for an activation whose product with its own input is one of torch's layers, `kind`."""

    def rule(reader: GraphReader, node: Node) -> None:
        product = reader.only_user(node.outputs[0], "Mul")
        if product is not None and sorted(product.inputs) == sorted([node.inputs[0], node.outputs[0]]):
            reader.set(product, *reader.emit(product, kind, {}, [reader.data(node)]))
            reader.done.add(product.outputs[0])
        else:
            alone(reader, node)

    return rule


def _hard_sigmoid(reader: GraphReader, node: Node) -> None:
    alpha, beta = float(node.get("alpha", 0.2)), float(node.get("beta", 0.5))
    if math.isclose(alpha, _SIXTH, rel_tol=1e-4) and beta == 0.5:
        _with_own_input("Hardswish", _layer("Hardsigmoid"))(reader, node)
        return
    scaled = reader.apply(node, "mul", reader.data(node), number=alpha)
    moved = reader.apply(node, "add", scaled, number=beta)
    reader.set(node, *reader.emit(node, "Hardtanh", {"min_val": 0.0, "max_val": 1.0}, [moved]))


def _gelu(reader: GraphReader, node: Node) -> None:
    options = {"approximate": node.get("approximate", "none")}
    reader.set(node, *reader.emit(node, "GELU", options, [reader.data(node)]))


def _swish(reader: GraphReader, node: Node) -> None:
    _require(float(node.get("alpha", 1.0)) == 1, "its alpha is not 1")
    _layer("SiLU")(reader, node)


def _clip(reader: GraphReader, node: Node) -> None:
    low, high = (
        float(reader.constant(node, i, name).reshape(-1)[0]) if reader.has(node, i) else node.get(name)
        for i, name in ((1, "min"), (2, "max"))
    )
    # Files of before version 11 write the largest number of float32 for no limit.
    low = None if low is None or low < -3e38 else float(low)
    high = None if high is None or high > 3e38 else float(high)
    x = reader.data(node)
    if (low, high) == (None, None):
        reader.set(node, x)
    elif (low, high) == (0, 6):
        reader.set(node, *reader.emit(node, "ReLU6", {}, [x]))
    elif low is not None and high is not None:
        reader.set(node, *reader.emit(node, "Hardtanh", {"min_val": low, "max_val": high}, [x]))
    else:
        reader.set(node, reader.apply(node, "clamp", x, low=low, high=high))


def _softmax(reader: GraphReader, node: Node) -> None:
    x, old = reader.data(node), reader.opset < 13
    axis = _own_axis(x, node.get("axis", 1 if old else -1))
    whole = axis == len(x.shape) - 1 or math.prod(x.shape[axis + 1 :]) == 1
    _require(not old or whole, "it runs over several axes at once, as before version 13; export with opset 13 or newer")
    kind = "Softmax" if node.kind == "Softmax" else "LogSoftmax"
    reader.set(node, *reader.emit(node, kind, {"dim": axis - len(x.shape)}, [x]))


# --- arithmetic -----------------------------------------------------------------------------------------------------


def _pair(kind: str, whole: str | None = None) -> Rule:
    """A rule for arithmetic of two. whole: the kind for whole numbers, where that is another one."""

    def rule(reader: GraphReader, node: Node) -> None:
        known = [reader.plain(name) for name in node.inputs[:2]]
        _require(len(known) == 2, "it has no second input")
        values = [v for v in known if isinstance(v, Value)]
        name = whole if whole and not values[0].meta.is_floating_point() else kind
        fixed = next((v for v in known if isinstance(v, np.ndarray)), None)
        if fixed is not None and fixed.size == 1 and fixed.ndim <= len(values[0].shape):
            options: dict[str, Any] = {"number": _number(fixed)}
            if isinstance(known[0], np.ndarray):
                options["first"] = True
            reader.set(node, reader.apply(node, name, values[0], **options))
            return
        operands = []
        for value, label in zip(known, node.inputs, strict=False):
            if isinstance(value, np.ndarray):
                kept = False if reader.is_raw(values[0]) else None  # what pictures are normalised by
                value = reader.hold(_for_any_batch(reader, value, values[0]), label, trains=kept)
            operands.append(value)
        reader.set(node, reader.apply(node, name, *operands))

    return rule


def _number(array: np.ndarray) -> float | int | bool:
    value = array.reshape(-1)[0].item() if array.dtype.name != "bfloat16" else float(array.reshape(-1)[0])
    return int(value) if isinstance(value, float) and abs(value) == 2 else value


def _for_any_batch(reader: GraphReader, array: np.ndarray, beside: Value) -> np.ndarray:
    """A constant that holds the same for each image of a file of fixed batch, once."""
    batch = reader.batch or 1
    alike = batch > 1 and array.ndim == len(beside.shape) and array.shape[0] == batch and beside.shape[0] % PRIME == 0
    return array[:1] if alike and bool((array == array[:1]).all()) else array


def _several(kind: str) -> Rule:
    """A rule for a function of any number of tensors; Max and Min with one number are a limit."""

    def rule(reader: GraphReader, node: Node) -> None:
        known = [reader.plain(name) for name in node.inputs]
        single = [v for v in known if isinstance(v, np.ndarray) and v.size == 1]
        if kind in ("max", "min") and len(known) == 2 and single:
            value = next(v for v in known if isinstance(v, Value))
            limit = float(single[0].reshape(-1)[0])
            low, high = (limit, None) if kind == "max" else (None, limit)
            reader.set(node, reader.apply(node, "clamp", value, low=low, high=high))
        else:
            values = [reader.data(node, i) for i in range(len(known))]
            made = reader.apply(node, "sum" if kind == "average" else kind, *values)
            reader.set(node, reader.apply(node, "div", made, number=len(values)) if kind == "average" else made)

    return rule


def _unary(kind: str) -> Rule:
    def rule(reader: GraphReader, node: Node) -> None:
        reader.set(node, reader.apply(node, kind, reader.data(node)))

    return rule


def _same(reader: GraphReader, node: Node) -> None:
    reader.set(node, reader.plain(node.inputs[0]))


def _cast(reader: GraphReader, node: Node) -> None:
    given = reader.plain(node.inputs[0])
    if isinstance(given, np.ndarray):  # made like a value that is computed from the images
        dtype = reader.data(node, 1).meta.dtype
        reader.set(node, given.astype(str(dtype).removeprefix("torch.")))
        return
    x = given
    if node.kind == "CastLike":
        like = reader.plain(node.inputs[1])
        wanted = str(like.meta.dtype if isinstance(like, Value) else as_tensor(like).dtype).removeprefix("torch.")
    else:
        number = int(node.get("to", 1))
        _require(number in _TYPES, f"it converts to {type_name(number)}, expected one that torch computes with")
        wanted = _TYPES[number]
    plain = str(x.meta.dtype).removeprefix("torch.") == wanted
    reader.set(node, x if plain else reader.apply(node, "to", x, dtype=wanted))


def _where(reader: GraphReader, node: Node) -> None:
    reader.set(node, reader.apply(node, "where", *(reader.data(node, i) for i in range(3))))


def _mod(reader: GraphReader, node: Node) -> None:
    _pair("fmod" if node.get("fmod", 0) else "mod")(reader, node)


# --- pooling, reductions --------------------------------------------------------------------------------------------


def _pool(reader: GraphReader, node: Node) -> None:
    x, kernel = reader.data(node), node.get("kernel_shape")
    count = len(kernel)
    strides, dilations = node.get("strides", [1] * count), node.get("dilations", [1] * count)
    highest = node.kind == "MaxPool"
    _require(len(node.outputs) == 1, "it returns the places of its maxima too")
    _require(highest or max(dilations) == 1, f"it has dilations {dilations}")
    before = x
    x, padding = _padded(reader, node, x, kernel, strides, dilations, -math.inf if highest else 0.0, most=True)
    counted = bool(node.get("count_include_pad", 0))
    _require(highest or x is before or counted, "it averages over an uneven padding that it does not count")
    options = {
        "kernel_size": kernel,
        "stride": strides,
        "padding": padding,
        "ceil_mode": bool(node.get("ceil_mode", 0)),
    }
    options |= {"dilation": dilations} if highest else {"count_include_pad": counted}
    reader.set(node, *reader.emit(node, f"{'Max' if highest else 'Avg'}Pool{count}d", options, [x]))


def _global_pool(reader: GraphReader, node: Node) -> None:
    x = reader.data(node)
    kind = f"Adaptive{'Avg' if node.kind == 'GlobalAveragePool' else 'Max'}Pool{len(x.shape) - 2}d"
    reader.set(node, *reader.emit(node, kind, {"output_size": 1}, [x]))


def _reduction(kind: str, **more: Any) -> Rule:
    def rule(reader: GraphReader, node: Node) -> None:
        x = reader.data(node)
        axes = reader.numbers(node, "axes", 1)
        if not axes:
            if node.get("noop_with_empty_axes", 0):
                reader.set(node, x)
                return
            axes = list(range(len(x.shape)))
        axes = sorted(_own_axis(x, axis) for axis in axes)
        reader.set(node, reader.apply(node, kind, x, axes=axes, keep=bool(node.get("keepdims", 1)), **more))

    return rule


def _sum_of_squares(reader: GraphReader, node: Node) -> None:
    x = reader.data(node)
    square = reader.apply(node, "mul", x, x)
    axes = [_own_axis(x, a) for a in reader.numbers(node, "axes", 1) or range(len(x.shape))]
    reader.set(node, reader.apply(node, "reduce_sum", square, axes=axes, keep=bool(node.get("keepdims", 1))))


def _extreme_place(kind: str) -> Rule:
    def rule(reader: GraphReader, node: Node) -> None:
        x = reader.data(node)
        axis = _own_axis(x, node.get("axis", 0))
        reader.set(node, reader.apply(node, kind, x, axis=axis, keep=bool(node.get("keepdims", 1))))

    return rule


def _topk(reader: GraphReader, node: Node) -> None:
    x = reader.data(node)
    count = int(reader.constant(node, 1, "k").reshape(-1)[0]) if reader.has(node, 1) else int(node.get("k"))
    options = {
        "count": count, "axis": _own_axis(x, node.get("axis", -1)), "largest": bool(node.get("largest", 1)),
        "ordered": bool(node.get("sorted", 1)),
    }  # fmt: skip
    reader.set(node, *reader.emit(node, "topk", options, [x], outputs=2))


def _cumsum(reader: GraphReader, node: Node) -> None:
    _require(not node.get("exclusive", 0) and not node.get("reverse", 0), "it is exclusive or in reverse")
    x = reader.data(node)
    axis = _own_axis(x, reader.constant(node, 1, "axis").reshape(-1)[0])
    reader.set(node, reader.apply(node, "cumsum", x, axis=axis))


def _lp_norm(reader: GraphReader, node: Node) -> None:
    x = reader.data(node)
    axis, order = _own_axis(x, node.get("axis", -1)), int(node.get("p", 2))
    reader.set(node, reader.apply(node, "div", x, reader.apply(node, "norm", x, axes=[axis], keep=True, order=order)))


def _lrn(reader: GraphReader, node: Node) -> None:
    options = {
        "size": int(node.get("size")), "alpha": float(node.get("alpha", 1e-4)), "beta": float(node.get("beta", 0.75)),
        "k": float(node.get("bias", 1.0)),
    }  # fmt: skip
    reader.set(node, *reader.emit(node, "LocalResponseNorm", options, [reader.data(node)]))


# --- shapes ---------------------------------------------------------------------------------------------------------


def _shape(reader: GraphReader, node: Node) -> None:
    x = reader.plain(node.inputs[0])
    sizes = np.array(x.shape, dtype=np.int64)
    if node.kind == "Size":
        sizes = np.array(math.prod(int(n) for n in x.shape), dtype=np.int64)
    else:
        sizes = sizes[slice(int(node.get("start", 0)), node.get("end"))]
    reader.set(node, sizes)


def _reshape(reader: GraphReader, node: Node) -> None:
    x = reader.data(node)
    wanted = reader.numbers(node, "shape", 1)
    if not node.get("allowzero", 0):
        _require(all(n != 0 or i < len(x.shape) for i, n in enumerate(wanted)), f"its shape is {wanted}")
        wanted = [x.shape[i] if n == 0 else n for i, n in enumerate(wanted)]
    _shaped(reader, node, x, reader.sizes_for(x, wanted))


def _shaped(reader: GraphReader, node: Node, x: Value, sizes: list[int]) -> None:
    """Let the node return `x` with these sizes, -1 for the axis that counts images."""
    full = [x.meta.numel() // math.prod(n for n in sizes if n != -1) if n == -1 else n for n in sizes]
    if full == list(x.shape):
        reader.set(node, x)
    elif len(full) == 2 and full[0] == x.shape[0] and sizes[0] == -1:
        reader.set(node, *reader.emit(node, "Flatten", {}, [x]))
    else:
        reader.set(node, reader.apply(node, "reshape", x, sizes=sizes))


def _flatten(reader: GraphReader, node: Node) -> None:
    x = reader.data(node)
    axis = _axis(node.get("axis", 1), len(x.shape), last=len(x.shape))
    _shaped(reader, node, x, reader.sizes_for(x, [math.prod(x.shape[:axis]), math.prod(x.shape[axis:])]))


def _transpose(reader: GraphReader, node: Node) -> None:
    x = reader.data(node)
    reader.set(node, reader.apply(node, "permute", x, order=node.get("perm", list(range(len(x.shape)))[::-1])))


def _squeeze(reader: GraphReader, node: Node) -> None:
    x = reader.data(node)
    axes = reader.numbers(node, "axes", 1, [i for i, n in enumerate(x.shape) if n == 1])
    axes = sorted(_axis(a, len(x.shape)) for a in axes)
    _require(all(x.shape[a] == 1 for a in axes), f"its axes {axes} do not have length 1 for any number of images")
    reader.set(node, reader.apply(node, "squeeze", x, axes=axes) if axes else x)


def _unsqueeze(reader: GraphReader, node: Node) -> None:
    x = reader.data(node)
    axes = reader.numbers(node, "axes", 1)
    axes = sorted(_axis(a, len(x.shape) + len(axes)) for a in axes)
    reader.set(node, reader.apply(node, "unsqueeze", x, axes=axes))


def _concat(reader: GraphReader, node: Node) -> None:
    known = [reader.plain(name) for name in node.inputs if name]
    first = next(v for v in known if isinstance(v, Value))
    axis = _axis(node.get("axis", 1), len(first.shape))
    values = []
    for value, name in zip(known, node.inputs, strict=False):
        if isinstance(value, np.ndarray):
            held = reader.hold(_for_any_batch(reader, value, first), name)
            if axis and held.shape[:1] == (1,) and first.shape[0] % PRIME == 0:
                sizes = [first.shape[0], *held.shape[1:]]
                held = _repeated(reader, node, held, sizes)
            value = held
        values.append(value)
    _require(axis > 0 or not any(v.shape[0] % PRIME == 0 for v in values), "it joins batches of images")
    reader.set(node, values[0] if len(values) == 1 else reader.apply(node, "cat", *values, axis=axis))


def _repeated(reader: GraphReader, node: Node, x: Value, sizes: Sequence[int]) -> Value:
    """`x` with its axes of length 1 repeated to `sizes`; one that counts images gets as many as there are."""
    own = [1] * (len(sizes) - len(x.shape)) + list(x.shape)
    if own == list(sizes) and len(own) == len(x.shape):
        return x
    counting = [i for i, (a, b) in enumerate(zip(own, sizes, strict=True)) if a != b and b % PRIME == 0]
    _require(len(counting) < 2, "it repeats two axes for each image")
    plain = [
        -1 if a == b and i >= len(own) - len(x.shape) else int(b)
        for i, (a, b) in enumerate(zip(own, sizes, strict=True))
    ]
    if not counting:
        return reader.apply(node, "expand", x, sizes=plain)
    assert reader.images is not None  # set before any node is read
    at = counting[0]
    times, plain[at] = int(sizes[at]) // PRIME, 1
    return reader.apply(node, "expand", x, reader.images, sizes=plain, axis=at, times=times)


def _expand(reader: GraphReader, node: Node) -> None:
    x, wanted = reader.data(node), reader.numbers(node, "shape", 1)
    rank = max(len(wanted), len(x.shape))
    own = [1] * (rank - len(x.shape)) + list(x.shape)
    asked = [1] * (rank - len(wanted)) + wanted
    _require(
        all(a == b or 1 in (a, b) or (a % PRIME == 0 and b == reader.batch) for a, b in zip(own, asked, strict=True)),
        f"its shape is {wanted}",
    )
    reader.set(node, _repeated(reader, node, x, [b if a == 1 else a for a, b in zip(own, asked, strict=True)]))


def _tile(reader: GraphReader, node: Node) -> None:
    x, times = reader.data(node), reader.numbers(node, "repeats", 1)
    if any(n % PRIME == 0 for n in times):
        single = all(n == 1 or size == 1 for n, size in zip(times, x.shape, strict=True))
        _require(single, "it repeats what is longer than 1 for each image")
        sizes = [n * size for n, size in zip(times, x.shape, strict=True)]
        reader.set(node, _repeated(reader, node, x, sizes))
    else:
        reader.set(node, reader.apply(node, "repeat", x, times=times) if max(times) > 1 else x)


def _constant_of_shape(reader: GraphReader, node: Node) -> None:
    from onnx.numpy_helper import to_array

    sizes = reader.numbers(node, "shape", 0)
    value = (
        to_array(node.attributes["value"]).reshape(-1)[:1] if "value" in node.attributes else np.zeros(1, np.float32)
    )
    if not any(n % PRIME == 0 and n for n in sizes):
        reader.fold(node)
        return
    held = reader.hold(value.reshape([1] * len(sizes)), "filled", trains=False)
    reader.set(node, _repeated(reader, node, held, sizes))


def _split(reader: GraphReader, node: Node) -> None:
    x = reader.data(node)
    axis, count = _axis(node.get("axis", 0), len(x.shape)), len(node.outputs)
    size = x.shape[axis]
    _require(size % PRIME != 0, "it splits a batch of images")
    sizes = reader.numbers(node, "split", 1)
    if sizes is None:
        count = int(node.get("num_outputs", count))
        each = math.ceil(size / count)
        sizes = [min(each, size - i * each) for i in range(count)]
    _require(len(sizes) == len(node.proto.output), f"it returns {len(node.proto.output)} pieces of sizes {sizes}")
    if len(sizes) == 1:
        reader.set(node, x)
        return
    if len(set(sizes)) == 1:
        made = reader.emit(node, "chunk", {"pieces": len(sizes), "axis": axis}, [x], outputs=len(sizes))
    else:
        made = reader.emit(node, "split", {"sizes": sizes, "axis": axis}, [x], outputs=len(sizes))
    for name, value in zip(node.proto.output, made, strict=True):
        if name:
            reader.values[name] = value


def _slice(reader: GraphReader, node: Node) -> None:
    x = reader.data(node)
    starts, ends = reader.numbers(node, "starts", 1), reader.numbers(node, "ends", 2)
    axes = reader.numbers(node, "axes", 3) or list(range(len(starts)))
    steps = reader.numbers(node, "steps", 4) or [1] * len(starts)
    value = x
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis = _axis(axis, len(x.shape))
        size = x.shape[axis]
        if step > 0 and _is_whole(slice(start, end, step), size, reader.batch):
            continue
        _require(size % PRIME != 0 or step < 0, "it takes some images out of a batch")
        places = range(size)[start:end:step]
        if step < 0:
            axis = _own_axis(value, axis)
            places = places[::-1]
        if places != range(size):
            to = None if places.stop >= size else places.stop
            value = reader.apply(node, "slice", value, axis=axis, start=places.start, end=to, step=places.step)
        if step < 0:
            value = reader.apply(node, "flip", value, axis=axis)
    reader.set(node, value)


def _is_whole(part: slice, size: int, batch: int | None) -> bool:
    """Whether it takes all of an axis; of one that counts images, as many as a file for `batch` of them has."""
    if range(size)[part] == range(size):
        return True
    if size % PRIME or not batch or part.step != 1 or max(abs(part.start), abs(part.stop)) >= PRIME:
        return False
    written = range(size // PRIME * batch)
    return written[part] == written


def _gather(reader: GraphReader, node: Node) -> None:
    table, index = reader.plain(node.inputs[0]), reader.known(node.inputs[1])
    axis = _axis(node.get("axis", 0), len(table.shape))
    if isinstance(index, Value):
        _require(isinstance(table, np.ndarray) and axis == 0 and table.ndim == 2, "its places depend on the image")
        reader.set(node, reader.apply(node, "embedding", reader.data(node, 0), index))
        return
    assert isinstance(table, Value)  # as what is constant is computed before
    size = table.shape[axis]
    if isinstance(index, np.ndarray) and len(table.shape) == 1 and size % PRIME == 0:  # for one image, as written
        index = PerImage(index, size // PRIME) if reader.batch == 1 and index.shape[:1] == (1,) else index
    if isinstance(index, PerImage):
        rows = index.first.reshape(-1)
        whole = index.step * PRIME == size and np.array_equal(rows, np.arange(index.step))
        _require(whole and len(table.shape) == 1, "it changes the order of numbers in a batch")
        reader.set(node, reader.apply(node, "reshape", table, sizes=[-1, *index.first.shape[1:]]))
        return
    _require(size % PRIME != 0, "it takes one image out of a batch")
    places = np.where(index < 0, index + size, index)
    if places.ndim == 0:
        reader.set(node, reader.apply(node, "select", table, axis=axis, index=int(places)))
    elif places.ndim == 1 and bool((np.diff(places) == 1).all()):
        start, end = int(places[0]), int(places[-1]) + 1
        end_ = None if end == size else end
        whole = (start, end) == (0, size)
        made = table if whole else reader.apply(node, "slice", table, axis=axis, start=start, end=end_)
        reader.set(node, made)
    else:
        held = reader.hold(places.astype(np.int64), node.inputs[1])
        reader.set(node, reader.apply(node, "gather", table, held, axis=axis))


def _gather_elements(reader: GraphReader, node: Node) -> None:
    x, index = reader.data(node, 0), reader.data(node, 1)
    reader.set(node, reader.apply(node, "gather_elements", x, index, axis=_own_axis(x, node.get("axis", 0))))


def _pad(reader: GraphReader, node: Node) -> None:
    x, mode = reader.data(node), node.get("mode", "constant")
    rank, pads = len(x.shape), reader.numbers(node, "pads", 1)
    axes = [_axis(a, rank) for a in (reader.numbers(node, "axes", 3) or range(rank))]
    before, after = _halves(pads)
    amounts = {a: (b, e) for a, b, e in zip(axes, before, after, strict=True)}
    if not any(pads):
        reader.set(node, x)
        return
    _require(mode in ("constant", "reflect", "edge"), f"its mode is {mode}")
    value = float(reader.constant(node, 2, "value").reshape(-1)[0]) if reader.has(node, 2) else node.get("value", 0.0)
    padded = [a for a in range(rank) if any(amounts.get(a, (0, 0)))]
    first = min(padded) if mode == "constant" else 2  # torch repeats or mirrors the axes of space, all of them
    _require(min(padded) >= first, "it mirrors or repeats an axis of channels")
    flat = [n for a in range(rank - 1, first - 1, -1) for n in amounts.get(a, (0, 0))]
    ours = {"edge": "replicate"}.get(mode, mode)
    reader.set(node, reader.apply(node, "pad", x, amounts=flat, mode=ours, value=float(value)))


def _resize(reader: GraphReader, node: Node) -> None:
    x = reader.data(node)
    size = list(x.shape)
    scales, sizes = _resize_goal(reader, node, size)
    _require(len(size) in (3, 4, 5) and sizes[:2] == size[:2], f"it resizes {_one(size)} to {_one(sizes)}")
    if sizes == size:
        reader.set(node, x)
        return
    pairs = list(zip(size[2:], sizes[2:], strict=True))
    mode = node.get("mode", "nearest")
    way = node.get("coordinate_transformation_mode", "asymmetric" if reader.opset < 11 else "half_pixel")
    rounding = node.get("nearest_mode", "floor" if reader.opset < 11 else "round_prefer_floor")
    flat = {3: "linear", 4: "bilinear", 5: "trilinear"}[len(size)]
    options: dict[str, Any] = {}
    whole = all(b % a == 0 for a, b in pairs)
    first = way == "pytorch_half_pixel" and any(b == 1 < a for a, b in pairs)
    _require(not first, "it makes an axis of length 1 by pytorch_half_pixel; export it with half_pixel")
    if mode == "nearest":
        floor = rounding == "floor" or (whole and max(b // a for a, b in pairs) <= 2 and rounding != "ceil")
        if way == "asymmetric" and floor and rounding != "round_prefer_ceil":
            options["mode"] = "nearest"
        elif way in ("half_pixel", "pytorch_half_pixel") and whole and rounding.startswith("round"):
            options["mode"] = "nearest"  # the place of a whole multiple is the same by all ways
        elif way in ("half_pixel", "pytorch_half_pixel") and rounding.startswith("round"):
            options["mode"] = "nearest-exact"
        else:
            raise Unreadable(f"it takes the nearest by {way} and {rounding}; export it with mode nearest of torch")
    else:
        _require(way in ("half_pixel", "pytorch_half_pixel", "align_corners"), f"it places pixels by {way}")
        _require(mode in ("linear", "cubic"), f"its mode is {mode}")
        _require(mode != "cubic" or len(size) == 4, "it is cubic over other than two axes")
        options["mode"] = flat if mode == "linear" else "bicubic"
        options["align_corners"] = way == "align_corners"
        if _antialiased(node, any(b < a for a, b in pairs), way):
            options["antialias"] = True
    exact = scales is None or all(
        abs(a * s - b) < 1e-4 for a, s, b in zip(size[2:], scales[2:], sizes[2:], strict=True)
    )
    if whole and exact:
        options["scale_factor"] = [float(b // a) for a, b in pairs]
    elif exact:
        options["size"] = sizes[2:]
    else:
        options["scale_factor"] = [float(s) for s in (scales or [])[2:]]
    reader.set(node, reader.apply(node, "interpolate", x, **options))


def _antialiased(node: Node, smaller: bool, way: str) -> bool:
    """Whether torch computes the file's filter with antialias: cubic with -0.5 instead of -0.75, and without weights of
    pixels outside. Source: measured against ONNX Runtime 1.32: equal to 1e-6, all others differ by 2e-2 and more.

    Args:
        node: Of mode linear or cubic.
        smaller: Whether any axis gets shorter, so that the file's own antialias takes effect.
        way: How it places pixels.

    Raises:
        Unreadable: torch has no such filter.
    """
    cubic, outside, wide = node.get("mode") == "cubic", bool(node.get("exclude_outside", 0)), node.get("antialias", 0)
    a = float(node.get("cubic_coeff_a", -0.75)) if cubic else None
    if not (wide and smaller) and (not cubic or (a, outside) == (-0.75, False)):
        return False
    fits = outside and a in (None, -0.5) and (wide or not smaller) and way != "align_corners"
    has = f"cubic_coeff_a {a:g}, " if a is not None else ""
    _require(
        bool(fits),
        f"it has {has}exclude_outside {int(outside)} and antialias {wide} by {way}; expected "
        + ("-0.75, 0 and 0, or -0.5, 1 and 1 by half_pixel" if cubic else "0 and 0, or 1 and 1 by half_pixel"),
    )
    return True


def _resize_goal(reader: GraphReader, node: Node, size: list[int]) -> tuple[list[float] | None, list[int]]:
    """The scales where it has them, and the sizes that it makes, of all axes."""
    axes = [_axis(a, len(size)) for a in node.get("axes", list(range(len(size))))]
    at = 1 if reader.opset < 11 else 2
    scales: list[float] | None = None
    if "scales" in node.attributes:  # Upsample 7
        scales = [float(s) for s in node.get("scales")]
    elif reader.has(node, at) and reader.constant(node, at, "scales").size:
        scales = [float(s) for s in reader.constant(node, at, "scales").reshape(-1)]
    if scales is not None:
        given = dict(zip(axes, scales, strict=True))
        every = [given.get(i, 1.0) for i in range(len(size))]
        return every, [n if s == 1 else math.floor(n * s + 1e-6) for n, s in zip(size, every, strict=True)]
    sizes = dict(zip(axes, reader.numbers(node, "sizes", 3, []), strict=True))
    batch = reader.batch or 1
    made = [sizes.get(i, n) for i, n in enumerate(size)]
    if size[0] % PRIME == 0 and made[0] == batch:
        made[0] = size[0]
    policy = node.get("keep_aspect_ratio_policy", "stretch")
    if policy != "stretch":
        ratios = [Fraction(made[i], size[i]) for i in sizes]
        scale = min(ratios) if policy == "not_larger" else max(ratios)
        exact = [n * scale if i in sizes else n for i, n in enumerate(size)]
        _require(
            all(n == int(n) for n in exact),
            f"its keep_aspect_ratio_policy is {policy}, by a scale that does not give whole sizes; export it with the "
            "sizes that it makes",
        )
        made = [int(n) for n in exact]
    return None, made


def _one(sizes: Sequence[int]) -> tuple[int, ...]:
    return tuple(n // PRIME if n % PRIME == 0 else n for n in sizes)


def _depth_to_space(reader: GraphReader, node: Node) -> None:
    x, block = reader.data(node), int(node.get("blocksize"))
    _, channels, height, width = x.shape
    if node.kind == "DepthToSpace":
        if node.get("mode", "DCR") == "CRD":
            reader.set(node, *reader.emit(node, "PixelShuffle", {"upscale_factor": block}, [x]))
            return
        inside = channels // block**2
        apart, order = [-1, block, block, inside, height, width], [0, 3, 4, 1, 5, 2]
        together = [-1, inside, height * block, width * block]
    else:
        apart = [-1, channels, height // block, block, width // block, block]
        order, together = [0, 3, 5, 1, 2, 4], [-1, channels * block**2, height // block, width // block]
    value = reader.apply(node, "permute", reader.apply(node, "reshape", x, sizes=apart), order=order)
    reader.set(node, reader.apply(node, "reshape", value, sizes=together))


def _einsum(reader: GraphReader, node: Node) -> None:
    values = [reader.data(node, i) for i in range(len(node.inputs))]
    equation = node.get("equation").replace(" ", "")
    given, arrow, made = equation.partition("->")
    made = made if arrow else "".join(letter for letter in given if given.count(letter) == 1)
    terms = zip(given.split(","), values, strict=True)
    of_images = {letter for term, v in terms for letter, n in zip(term, v.shape, strict=False) if n % PRIME == 0}
    _require("." in given or (len(of_images) == 1 and of_images <= set(made)), "it runs over the images of a batch")
    reader.set(node, reader.apply(node, "einsum", *values, equation=equation))


def _grid_sample(reader: GraphReader, node: Node) -> None:
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(node.get("mode", "bilinear"), node.get("mode", "bilinear"))
    options = {
        "mode": mode, "padding_mode": node.get("padding_mode", "zeros"),
        "align_corners": bool(node.get("align_corners", 0)),
    }  # fmt: skip
    reader.set(node, reader.apply(node, "grid_sample", reader.data(node, 0), reader.data(node, 1), **options))


def _own_axis(x: Value, axis: Any) -> int:
    """An axis, counted from the first; what runs over it must not mix the images of a batch.

    Raises:
        Unreadable: It is the axis of images, or there is none.
    """
    axis = _axis(axis, len(x.shape))
    _require(x.shape[axis] % PRIME != 0, "it runs over the images of a batch")
    return axis


def _axis(axis: Any, rank: int, last: int | None = None) -> int:
    """An axis of `rank`, counted from the first. last: the last one, where that is another.

    Raises:
        Unreadable: There is none.
    """
    last = rank - 1 if last is None else last
    _require(-rank <= int(axis) <= last, f"its axis is {int(axis)}, expected {-rank} to {last}")
    return int(axis) if axis >= 0 else int(axis) + rank


def _spread(array: np.ndarray, shape: Sequence[int], what: str) -> np.ndarray:
    """A constant, broadcast to `shape`. what: its name. Raises: Unreadable where it does not fit."""
    try:
        return np.broadcast_to(array, tuple(shape))
    except ValueError:
        raise Unreadable(f"its {what} has shape {array.shape}, expected {tuple(shape)}") from None


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Unreadable(otherwise)


_UNARY = {
    name: _unary(name.lower())
    for name in (
        "Abs Acos Asin Atan Ceil Cos Cosh Erf Exp Floor Log Neg Reciprocal Round Sign Sin Sinh Sqrt Tan IsNaN IsInf"
    ).split()
}

RULES: dict[str, Rule] = {
    **_UNARY,
    "Not": _unary("logical_not"),
    **dict.fromkeys(("Conv", "ConvTranspose"), _conv),
    "MatMul": _matmul, "Gemm": _gemm, "BatchNormalization": _batch_norm, "InstanceNormalization": _instance_norm,
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _layer_norm),
    "GroupNormalization": _group_norm, "PRelu": _prelu,
    "Relu": _layer("ReLU"), "LeakyRelu": _layer("LeakyReLU", negative_slope=("alpha", 0.01)),
    "Elu": _layer("ELU", alpha=("alpha", 1.0)), "Selu": _layer("SELU"), "Celu": _layer("CELU", alpha=("alpha", 1.0)),
    "Sigmoid": _with_own_input("SiLU", _layer("Sigmoid")), "HardSigmoid": _hard_sigmoid,
    "HardSwish": _layer("Hardswish"), "Tanh": _layer("Tanh"), "Softplus": _layer("Softplus"),
    "Softsign": _layer("Softsign"), "Mish": _layer("Mish"), "Gelu": _gelu, "Swish": _swish, "Clip": _clip,
    **dict.fromkeys(("Softmax", "LogSoftmax"), _softmax),
    "Add": _pair("add"), "Sub": _pair("sub"), "Mul": _pair("mul"), "Div": _pair("div", "integer_div"),
    "Pow": _pair("pow"), "Mod": _mod, "Equal": _pair("equal"), "Greater": _pair("greater"), "Less": _pair("less"),
    "GreaterOrEqual": _pair("greaterorequal"), "LessOrEqual": _pair("lessorequal"), "And": _pair("and"),
    "Or": _pair("or"), "Xor": _pair("xor"),
    "Max": _several("max"), "Min": _several("min"), "Sum": _several("sum"), "Mean": _several("average"),
    **dict.fromkeys(("Identity", "Dropout"), _same),
    **dict.fromkeys(("Cast", "CastLike"), _cast),
    "Where": _where,
    **dict.fromkeys(("MaxPool", "AveragePool"), _pool),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool"), _global_pool),
    "ReduceMean": _reduction("mean"), "ReduceSum": _reduction("reduce_sum"), "ReduceMax": _reduction("amax"),
    "ReduceMin": _reduction("amin"), "ReduceLogSumExp": _reduction("logsumexp"),
    "ReduceL1": _reduction("norm", order=1), "ReduceL2": _reduction("norm", order=2),
    "ReduceSumSquare": _sum_of_squares, "ArgMax": _extreme_place("argmax"), "ArgMin": _extreme_place("argmin"),
    "TopK": _topk, "CumSum": _cumsum, "LpNormalization": _lp_norm, "LRN": _lrn,
    **dict.fromkeys(("Shape", "Size"), _shape),
    "Reshape": _reshape, "Flatten": _flatten, "Transpose": _transpose, "Squeeze": _squeeze, "Unsqueeze": _unsqueeze,
    "Concat": _concat, "Expand": _expand, "Tile": _tile, "ConstantOfShape": _constant_of_shape, "Split": _split,
    "Slice": _slice, "Gather": _gather, "GatherElements": _gather_elements, "Pad": _pad,
    **dict.fromkeys(("Resize", "Upsample"), _resize),
    **dict.fromkeys(("DepthToSpace", "SpaceToDepth"), _depth_to_space),
    "Einsum": _einsum, "GridSample": _grid_sample,
}  # fmt: skip

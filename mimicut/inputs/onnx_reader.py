"""From the nodes of an ONNX graph to the steps of an `OnnxNetwork`: values, constants, names, and the free batch axis.

Each step is run without data as soon as it is read, with PRIME images. So every size is known, and a size that is a
multiple of PRIME is one that counts images: PRIME divides no size of a network. Nodes that compute from sizes and
constants alone are computed here, by onnx's own reference code, and leave no step.
"""

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mimicut.base.errors import one_line
from mimicut.inputs.onnx_network import CONSTANT, OnnxNetwork, make_module

PRIME = 1_000_003  # images; larger than any size in a network
_MOST_FOLDED = 2**28  # numbers in one constant that is computed here. Source: assumption.
_MASKING = -100.0  # Source: transformers and timm: what masks of attention hold is at or below it.
NO_BATCH = (
    "it is written for one number of images; export the network again with a free batch axis (torch.onnx.export: "
    "dynamic_shapes, or dynamic_axes)"
)


class Unreadable(Exception):
    """Why a node cannot be read."""


@dataclass(frozen=True)
class Value:
    """What a step returns: its name in the list of steps, and a tensor without data of its shape."""

    name: str
    meta: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.meta.shape)


@dataclass(frozen=True)
class PerImage:
    """Whole numbers of which image i has `first` (1, ...) plus i times `step`: places in a batch that lies flat.

    torch.onnx.export writes them where the layout of a tensor is set (as_strided).
    """

    first: np.ndarray
    step: int


Known = Value | np.ndarray | PerImage


class Node:
    """A node of the graph, with its attributes as plain values."""

    def __init__(self, proto: Any):
        from onnx.helper import get_attribute_value

        self.proto, self.kind, self.name = proto, str(proto.op_type), str(proto.name)
        self.inputs, self.outputs = list(proto.input), [name for name in proto.output if name]
        self.attributes = {a.name: get_attribute_value(a) for a in proto.attribute}

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute; text as str, lists as lists."""
        value = self.attributes.get(name, default)
        if isinstance(value, bytes):
            return value.decode("utf-8", "replace")
        return value if value is None or isinstance(value, (int, float, str)) else list(value)


class GraphReader:
    """Collects the steps, the constants and the tensors of a network while nodes are read.

    Attributes:
        opset: The version of the operators.
        batch: The number of images that the file is written for; None where that is free.
        steps: As in `OnnxNetwork`.
        constants: As in `OnnxNetwork`.
        tensors: The tensors of the network by name, as in its state dict.
        values: What is known of each value of the graph: what a step returns, or an array where it is constant.
        done: Nodes that were read together with one before them, by their first output.
    """

    def __init__(self, opset: int, batch: int | None, nodes: Sequence[Node], constants: Mapping[str, np.ndarray]):
        self.opset, self.batch, self.nodes = opset, batch, nodes
        self.steps: list[list[Any]] = []
        self.constants: dict[str, list[Any]] = {}
        self.tensors: dict[str, Tensor] = {}
        self.values: dict[str, Known] = dict(constants)
        self.done: set[str] = set()
        self.images: Value | None = None
        self._users: dict[str, list[Node]] = {}
        for node in nodes:
            for name in dict.fromkeys(node.inputs):
                self._users.setdefault(name, []).append(node)
        self._taken: set[str] = set()  # names of modules
        scopes = {_scopes(node, whole=True) for node in nodes}
        self._scopes = {above for scope in scopes for above in _above(scope)}  # those that hold further ones
        self._scopes -= {scope for scope in self._scopes if not any(a.startswith(f"{scope}.") for a in self._scopes)}
        self._owners: set[str] = set()  # names above those of modules
        self._held: dict[tuple[int, bool], str] = {}
        self._layers: dict[tuple[str, ...], str] = {}
        self._raw: set[str] = set()  # values before the first layer: pictures, perhaps normalised
        self._numbers = 0

    # --- what nodes are given -----------------------------------------------------------------------------------------

    def begin(self, name: str, size: Sequence[int]) -> None:
        """Let `name` be the images, of `size` (C, H, W)."""
        self.images = Value(self._new_value(), torch.zeros(PRIME, *size, device="meta"))
        self._raw.add(self.images.name)
        self.values[name] = self.images

    def known(self, name: str) -> Known:
        """What is known of a value. Raises: Unreadable where nothing before makes it."""
        if name not in self.values:
            raise Unreadable(f"nothing before it makes its input {name!r}; the file is damaged")
        return self.values[name]

    def plain(self, name: str) -> Value | np.ndarray:
        """As `known`, for a node that does not compute with the numbers of images. Raises: Unreadable."""
        found = self.known(name)
        if isinstance(found, PerImage):
            raise Unreadable("it computes with the number of each image in its batch")
        return found

    def has(self, node: Node, place: int) -> bool:
        """Whether the node has an input number `place`."""
        return place < len(node.inputs) and bool(node.inputs[place])

    def data(self, node: Node, place: int = 0) -> Value:
        """Input number `place`, computed from the images. A constant is made one that a step reads."""
        if not self.has(node, place):
            raise Unreadable(f"it has {len(node.inputs)} inputs, expected at least {place + 1}")
        found = self.plain(node.inputs[place])
        return found if isinstance(found, Value) else self.hold(found, node.inputs[place])

    def constant(self, node: Node, place: int, what: str) -> np.ndarray:
        """Input number `place`, which must be constant. what: what it is, for the message."""
        found = self.known(node.inputs[place])
        if not isinstance(found, np.ndarray):
            raise Unreadable(f"its {what} is computed from the image, expected a fixed one")
        return found

    def numbers(self, node: Node, attribute: str, place: int, default: Any = None) -> Any:
        """A list of whole numbers that is an attribute in older files and an input in newer ones."""
        if attribute in node.attributes:
            return node.get(attribute)
        if not self.has(node, place):
            return default
        return [int(n) for n in self.constant(node, place, attribute).reshape(-1)]

    def only_user(self, value: str, kind: str) -> Node | None:
        """The node of this kind that alone uses a value; None where another, or several, do."""
        users = self._users.get(value, [])
        return users[0] if len(users) == 1 and users[0].kind == kind else None

    def mark_outputs(self, names: Sequence[str]) -> None:
        """Let these values count as used by the network's caller too."""
        for name in names:
            self._users.setdefault(name, []).append(_OUTSIDE)

    # --- what nodes make ----------------------------------------------------------------------------------------------

    def emit(
        self,
        node: Node,
        kind: str,
        options: Mapping[str, Any],
        inputs: Sequence[Value],
        tensors: Mapping[str, Tensor] | None = None,
        origin: Sequence[str] = (),
        outputs: int = 1,
    ) -> list[Value]:
        """Add a step, and run it without data.

        Args:
            node: For the name of its module.
            kind: As `make_module`.
            options: Likewise.
            inputs: What it is called with.
            tensors: The tensors of a layer, by their names in it.
            origin: The names of its tensors in the file: the module is named after the first, and two steps whose
                layers have the same are one layer.
            outputs: How many tensors it returns.

        Raises:
            Unreadable: A tensor does not have the size that the layer holds, or torch cannot call it with these shapes.
        """
        try:
            with torch.device("meta"), torch.no_grad():
                module = make_module(kind, options).eval()
                _check_sizes(module, tensors or {})
                made = module(*(v.meta for v in inputs))
        except Unreadable:
            raise
        except Exception as error:
            shapes = " and ".join(str(_for_one(v.shape)) for v in inputs)
            raise Unreadable(
                f"with inputs of shape {shapes} for one image, torch's {kind} says {one_line(error)}"
            ) from (error)
        values = [Value(self._new_value(), m) for m in (made if outputs > 1 else [made])]
        place = self._module_name(node, origin, module, tensors or {})
        self.steps.append([place, kind, dict(options), [v.name for v in inputs], [v.name for v in values]])
        if tensors is None and all(v.name in self._raw or v.name.startswith(CONSTANT) for v in inputs):
            self._raw |= {v.name for v in values}
        return values

    def apply(self, node: Node, kind: str, *inputs: Value, **options: Any) -> Value:
        """As `emit`, for a function that returns one tensor."""
        return self.emit(node, kind, options, inputs)[0]

    def set(self, node: Node, *values: Known) -> None:
        """Let `values` be what the node returns."""
        self.values.update(zip(node.outputs, values, strict=False))

    def hold(self, array: np.ndarray, name: str, *, trains: bool | None = None) -> Value:
        """A constant that a step reads. Numbers that pictures are normalised by, masks and whole numbers do not train;
        all other constants are parameters, as a file does not say which were.

        Args:
            array: Its values.
            name: Its name in the file.
            trains: Whether it is a parameter, where that is known.
        """
        tensor = as_tensor(array)
        if trains is None:
            trains = tensor.is_floating_point() and tensor.numel() > 1 and not _is_mask(tensor)
        key = (id(array), trains)
        if key not in self._held:
            self._held[key] = place = self._free_name(_dotted(name) or "constant")
            dtype = str(tensor.dtype).removeprefix("torch.")
            self.constants[place] = [list(tensor.shape), dtype, trains]
            self.tensors[f"{place}.value"] = tensor
            self.values.setdefault(f"\0{place}", array)  # keeps the array alive, whose id is the key
        return Value(CONSTANT + self._held[key], tensor.to("meta"))

    def is_raw(self, value: Value) -> bool:
        """Whether no layer stands between the images and this value."""
        return value.name in self._raw

    def _new_value(self) -> str:
        self._numbers += 1
        return f"v{self._numbers}"

    def _module_name(self, node: Node, origin: Sequence[str], module: nn.Module, tensors: Mapping[str, Tensor]) -> str:
        """A name for the module of a step, whose tensors are kept; that of an earlier one where both are one layer."""
        key = None
        if origin and "Norm" not in type(module).__name__:
            first = tensors["weight"]
            if bool((first != first.flatten()[0]).any()):  # else another layer may begin with the same numbers
                key = (*origin, repr(module))
        if key is not None and key in self._layers:
            return self._layers[key]
        named = re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*\.weight", origin[0] if origin else "")
        wanted = origin[0].removesuffix(".weight") if named else self._scope_name(node)
        place = self._free_name(_dotted(wanted) or node.kind.lower())
        if key is not None:
            self._layers[key] = place
        for name, tensor in tensors.items():
            self.tensors[f"{place}.{name}"] = tensor
        return place

    def _scope_name(self, node: Node) -> str:
        """The module that a node came from; below it, where it is no module of its own."""
        scope = _scopes(node)
        return f"{scope}.{node.kind.lower()}" if scope in self._scopes else scope

    def _free_name(self, wanted: str) -> str:
        """`wanted`, or a name like it that no module has and below or above which none stands."""
        if any(above in self._taken for above in _above(wanted)):
            wanted = wanted.replace(".", "_")
        name, number = wanted, 1
        while name in self._taken or name in self._owners:
            name, number = f"{wanted}_{number}", number + 1
        self._taken.add(name)
        self._owners |= _above(name)
        return name

    # --- the batch axis -----------------------------------------------------------------------------------------------

    def sizes_for(self, given: Value, wanted: Sequence[int]) -> list[int]:
        """The sizes of a reshape of `given`, with -1 for the axis that counts images.

        Args:
            given: What is reshaped.
            wanted: The sizes that the file asks for; 0 was replaced already, one may be -1.

        Raises:
            Unreadable: It is not clear which axis counts images.
        """
        sizes, total = list(wanted), given.meta.numel()
        counting = [i for i, n in enumerate(sizes) if n > 0 and n % PRIME == 0]
        if not counting and total % PRIME == 0:
            sizes, counting = self._with_batch(given, sizes)
        if sizes.count(-1) == 1:
            rest = math.prod(n for n in sizes if n != -1)
            if rest == 0 or total % rest:
                raise Unreadable(f"{_for_one(given.shape)} cannot take the shape {_for_one(sizes)}")
            sizes[sizes.index(-1)] = total // rest
            counting = [i for i, n in enumerate(sizes) if n % PRIME == 0]
        if len(counting) > 1 or (counting and not total):
            raise Unreadable(NO_BATCH)
        return [-1 if i in counting else n for i, n in enumerate(sizes)]

    def _with_batch(self, given: Value, sizes: list[int]) -> tuple[list[int], list[int]]:
        """The sizes that a file has for its own number of images, for any number."""
        if -1 in sizes:
            rest = math.prod(n for n in sizes if n != -1)
            if rest and given.meta.numel() % rest == 0 and self.batch is None:
                return sizes, []  # the -1 counts them
        batch = self.batch or 1
        own = [n // PRIME * batch if n % PRIME == 0 else n for n in given.shape]
        if -1 in sizes:
            rest = math.prod(n for n in sizes if n != -1)
            if rest == 0 or math.prod(own) % rest:
                raise Unreadable(NO_BATCH)
            sizes = [math.prod(own) // rest if n == -1 else n for n in sizes]
        if math.prod(own) != math.prod(sizes):
            raise Unreadable(NO_BATCH)
        at = next(i for i, n in enumerate(given.shape) if n % PRIME == 0)
        i = _axis_of_images(sizes, math.prod(own[:at]), batch, own[at] == batch)
        return [n // batch * PRIME if i == j else n for j, n in enumerate(sizes)], [i]

    # --- constants ----------------------------------------------------------------------------------------------------

    def fold(self, node: Node) -> None:
        """Compute a node whose inputs are all constant."""
        from onnx import TensorProto, helper
        from onnx.reference import ReferenceEvaluator

        inputs = {name: self.known(name) for name in node.inputs if name}
        if node.kind == "Range" or any(isinstance(v, PerImage) for v in inputs.values()):
            made_for_each = _for_each_image(node, list(inputs.values()))
            if made_for_each is not None:
                self.set(node, made_for_each)
                return
        arrays = {name: value for name, value in inputs.items() if isinstance(value, np.ndarray)}
        if node.kind in ("ConstantOfShape", "Expand", "Tile", "Range", "Resize", "Upsample", "Pad"):
            sizes = [int(abs(n)) for a in arrays.values() if a.dtype.kind == "i" for n in a.reshape(-1)[:64]]
            if math.prod(max(n, 1) for n in sizes if n < 2**62) > _MOST_FOLDED:
                raise Unreadable("it makes a constant for each image, or one that is too large")
        together = sum(a.size for a in arrays.values())
        with suppress(ValueError):  # shapes that do not fit each other
            together = max(together, math.prod(np.broadcast_shapes(*(a.shape for a in arrays.values()))))
        if together > _MOST_FOLDED:
            raise Unreadable(f"it makes a constant of about {together:,} numbers, expected at most {_MOST_FOLDED:,}")
        kinds = [helper.np_dtype_to_tensor_dtype(a.dtype) for a in arrays.values()]
        graph = helper.make_graph(
            [node.proto],
            "node",
            [helper.make_tensor_value_info(n, k, None) for n, k in zip(arrays, kinds, strict=True)],
            [helper.make_tensor_value_info(n, TensorProto.UNDEFINED, None) for n in node.outputs],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)])
        try:
            made = ReferenceEvaluator(model).run(None, arrays)
        except Exception as error:  # whatever onnx's code raises on numbers that make no sense
            raise Unreadable(f"computing it from constants, onnx says {one_line(error)}") from error
        self.set(node, *(np.asarray(value) for value in made))


def _axis_of_images(sizes: Sequence[int], before: int, batch: int, alone: bool) -> int:
    """The axis of `sizes` that counts images in a file for `batch` of them.

    Args:
        sizes: What is reshaped to.
        before: The product of the sizes before the axis of images, before the reshape.
        batch: The number of images.
        alone: Whether that axis held images alone; else how the two are ordered in it is not known.

    Raises:
        Unreadable: There is none.
    """
    fits = [i for i, n in enumerate(sizes) if math.prod(sizes[:i]) == before and n % batch == 0]
    exact = [i for i, n in enumerate(sizes) if n == batch]
    first = [i for i in fits if i in exact] or ([] if alone else exact) or [i for i in fits if i < len(sizes) - 1]
    if not first:  # the last axis holds channels: rather the one before it
        first = [i for i in fits if i and sizes[i - 1] > 1 and batch == 1]
        first = [i - 1 for i in first] or fits
    if not first:
        raise Unreadable(NO_BATCH)
    return first[0]


def _for_each_image(node: Node, inputs: Sequence[Any]) -> PerImage | None:
    """What a node makes of the numbers of images; None where it has nothing to do with them.

    Raises:
        Unreadable: It makes of them what this cannot say.
    """
    if node.kind == "Range":
        start, end, step = (int(v.reshape(-1)[0]) for v in inputs)
        counts = end > 0 and end % PRIME == 0 and start == 0 and step == 1
        return PerImage(np.zeros(1, np.int64), 1) if counts and end == PRIME else None
    found = next(v for v in inputs if isinstance(v, PerImage))
    other = next((v for v in inputs if isinstance(v, np.ndarray)), None)
    if node.kind == "Mul" and other is not None and other.size == 1:
        return PerImage(found.first * other, found.step * int(other.reshape(-1)[0]))
    if node.kind == "Add" and other is not None and other.ndim <= found.first.ndim and other.shape[:1] in ((), (1,)):
        return PerImage(found.first + other, found.step)
    if node.kind == "Unsqueeze":
        axes = node.get("axes") if other is None else other.reshape(-1).tolist()
        rank = found.first.ndim + len(axes)
        axes = sorted(a % rank for a in axes)
        if axes and axes[0] > 0:
            return PerImage(np.expand_dims(found.first, tuple(axes)), found.step)
    raise Unreadable("it computes with the number of each image in its batch")


class _Outside:
    kind = ""


_OUTSIDE: Any = _Outside()


def _check_sizes(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raises Unreadable where a tensor of the file does not have the size that the layer holds."""
    held = module.state_dict()
    for name, tensor in tensors.items():
        if tensor.shape != held[name].shape:
            raise Unreadable(f"its {name} has shape {tuple(tensor.shape)}, expected {tuple(held[name].shape)}")


def for_any_batch(text: str) -> str:
    """An error message with N where it has the PRIME images that steps are run with.

    >>> for_any_batch(f"got [1, {8 * PRIME}] X [8, 5]")
    'got [1, 8N] X [8, 5] (N: number of images)'
    """

    def shown(number: re.Match) -> str:
        count, rest = divmod(int(number[0]), PRIME)
        return number[0] if rest or not count else f"{count if count > 1 else ''}N"

    said = re.sub(r"(?<![\d.])\d{7,}", shown, text)
    return text if said == text else f"{said} (N: number of images)"


def type_name(number: int) -> str:
    """What ONNX calls a type.

    >>> type_name(2)
    'uint8'
    """
    from onnx import TensorProto

    known = TensorProto.DataType.values()
    return TensorProto.DataType.Name(number).lower() if number in known else f"type {number} of ONNX"


def as_tensor(array: np.ndarray) -> Tensor:
    """A tensor of its own memory; all floating point as float32."""
    if array.dtype.kind == "f" or array.dtype.name == "bfloat16":
        return torch.tensor(np.asarray(array, dtype=np.float32))
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.astype(np.int64)
    return torch.tensor(array)


def _is_mask(tensor: Tensor) -> bool:
    """Whether its numbers are two at most, of which one is far below the other, or any is infinite."""
    return bool(tensor.isinf().any()) or (float(tensor.min()) <= _MASKING and len(tensor.unique()) <= 2)


def _for_one(sizes: Sequence[int]) -> tuple[int, ...]:
    """The shape for one image."""
    return tuple(n // PRIME if n > 0 and n % PRIME == 0 else n for n in sizes)


def _scopes(node: Node, *, whole: bool = False) -> str:
    """The module that a node came from, as torch.onnx.export names nodes: "/layer1/layer1.0/conv1/Conv".

    Args:
        node: The node.
        whole: Whether the name of the operator, which is the last part, stays.
    """
    parts: list[str] = []
    for part in node.name.removeprefix("node_").strip("/").split("/"):
        if parts and part.startswith(f"{parts[-1]}."):
            parts.pop()
        parts.append(part)
    if not whole and len(parts) > 1 and re.fullmatch(rf"{node.kind}(_\d+)?", parts[-1]):
        parts.pop()
    return ".".join(parts)


def _above(name: str) -> set[str]:
    """The names of the modules that hold the one of this name.

    >>> sorted(_above("layer1.0.conv1"))
    ['layer1', 'layer1.0']
    """
    words = name.split(".")
    return {".".join(words[:i]) for i in range(1, len(words))}


def _dotted(name: str) -> str:
    """A name that modules can have: words with dots between."""
    words = [re.sub(r"\W+", "_", word).strip("_") for word in name.split(".")]
    return ".".join(f"{word}_" if hasattr(OnnxNetwork, word) or word == "training" else word for word in words if word)

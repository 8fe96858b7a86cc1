"""The laws, checked on the user's own model. A broken law raises LawBroken; it is never a warning.

Law 2, cut = zero: the cut network equals the uncut teacher in which the removed channels are set to zero wherever
something reads across channels, and in which a dropped block gives zeros to its addition. The reference runs the
teacher's traced operators on full-sized tensors with masks; the cut network runs its own code on its sliced tensors.
Norms that take statistics over channels see the kept ones only.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.fx import Interpreter, Node
from torch.utils._python_dispatch import TorchDispatchMode

from mimicut.anatomy.cost import Cost
from mimicut.anatomy.graph import Anatomy
from mimicut.anatomy.operators.recurrent import RECURRENT
from mimicut.anatomy.operators.reductions import statistics_axes
from mimicut.anatomy.tracing import fault_place, operator, shape
from mimicut.base.errors import LawBroken, UnsupportedModel
from mimicut.base.guard import caches_kept, evaluating, exact_float32, full_copy, named_tensors, seeded
from mimicut.surgery.plan import Plan
from mimicut.surgery.seam import capturing, tensors

MOST_NOISE = 1e-6  # largest error of float64 rounding; a wrong channel exceeds it by far. Source: assumption.
_READS_ACROSS = {
    "conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "linear", "addmm", "baddbmm", "matmul", "mm", "bmm", "scaled_dot_product_attention", "einsum", *RECURRENT,
}  # fmt: skip


@exact_float32()
def check_cut(anatomy: Anatomy, plan: Plan, teacher: nn.Module, student: nn.Module, *, seed: int = 0) -> dict[str, Any]:
    """Check law 2 for this teacher, plan and student, on random inputs of the traced shape.

    Returns:
        {"dtype", "error", "tolerance"}. error: the largest difference as a share of the largest output, over the
        network's outputs and the seam's features. tolerance: in float64 1e-10, or, if larger and at most 1e-6, 100
        times the effect of perturbing the input by one rounding step (or of a precision that is written into the
        code). A model that cannot run in float64 is compared in float32, with a tolerance found in the same way.

    Raises:
        LawBroken: The error exceeds the tolerance, or the cut network does not run.
    """
    with seeded(seed), torch.no_grad(), caches_kept(teacher), _InRows():
        given = _random_inputs(anatomy, torch.float64)
        try:
            error = _compare(anatomy, plan, teacher, student, given)
            dtype, tolerance = "float64", 1e-10
            if tolerance < error <= MOST_NOISE:  # a deep network may amplify even these rounding errors
                tolerance = min(max(tolerance, 100 * _noise(anatomy, plan, teacher, given)), MOST_NOISE)
        except Exception:
            if _runs(anatomy, teacher, given):
                raise
            given = _random_inputs(anatomy, torch.float32)
            error = _compare(anatomy, plan, teacher, student, given)
            dtype, tolerance = "float32", 100 * _noise(anatomy, plan, teacher, given)
    if not error <= tolerance:
        raise LawBroken(
            f"checking that the cut {type(teacher).__name__} equals its teacher with removed channels at zero: they "
            f"differ by {error:.1e} of the largest output in {dtype}, expected at most {tolerance:.1e}. The cut is "
            "wrong for this model: its code depends on a width in a way that mimicut did not detect. Pin the "
            "groups around it with --pin (`mimicut inspect` lists them), and please report it"
        )
    return {"dtype": dtype, "error": error, "tolerance": tolerance}


def check_budget(plan: Plan, teacher: Cost, student: Cost) -> None:
    """Check law 8: the student's counted MACs are those planned, and the student is within the budget.

    Raises:
        LawBroken: They are not.
    """
    if student.macs != plan.macs["student"]:
        raise LawBroken(f"counting the student: {student.macs:,} MACs, the plan promised {plan.macs['student']:,}")
    if plan.edited or plan.budget is None:
        return
    keep, params, size = plan.budget.keep, plan.budget.params, plan.budget.size_mb
    if keep is not None and student.macs > keep * teacher.macs:
        raise LawBroken(
            f"counting the student: {student.macs:,} of {teacher.macs:,} MACs, above the keep {keep} asked for"
        )
    if params is not None and student.params > (params * teacher.params if params <= 1 else params):
        raise LawBroken(
            f"counting the student: {student.params:,} of {teacher.params:,} parameters, above the {params} asked for"
        )
    if size is not None and student.bytes > size * 1e6:
        raise LawBroken(f"counting the student: {student.bytes / 1e6} MB of tensors, above the {size} asked for")


def _compare(
    anatomy: Anatomy, plan: Plan | None, teacher: nn.Module, student: nn.Module, given: list[torch.Tensor]
) -> float:
    expected = _Reference(anatomy, plan, teacher).outputs(given)
    student = _double(student) if _in_double(given) else student  # not before: both at once take much memory
    args, kwargs = _call(anatomy, given)
    try:
        with evaluating(student), capturing(student, anatomy.seam) as capture:
            features, output = capture.features_and_output(*args, **kwargs)
    except Exception as error:
        raise LawBroken(
            f"running the cut {type(teacher).__name__}: it stopped{fault_place(error, student)} with "
            f"{type(error).__name__}: {error}. The code there depends on a width in a way that mimicut did not see: "
            "take the width from the input there, or pin the groups around it with --pin (`mimicut inspect` lists them)"
        ) from error
    found = [*_floats(output), *features]
    if any(not torch.isfinite(a).all() for a in expected):
        raise UnsupportedModel(
            "checking the cut: the teacher's own output is not finite on random inputs; look at its weights"
        )
    apart = _apart(found, expected)
    # Dropped modules that are not blocks but pass their input on do not show in the whole network's operators.
    if plan is not None and anatomy.only_blocks:
        assert anatomy.full_trace is not None  # as blocks are left out
        bare = _Reference(anatomy, None, teacher).outputs(given)
        whole = replace(anatomy, traced=anatomy.full_trace, seam_nodes=(), axes=defaultdict(list))
        expected = _Reference(whole, None, teacher, anatomy.zeroed_nodes).outputs(given)
        apart = max(apart, _apart(bare[: len(expected)], expected))
    return apart


def _apart(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest difference of any pair, relative to its reference's largest value; infinity if shapes differ."""
    if any(a.shape != b.shape for a, b in zip(found, expected, strict=True)):
        return math.inf
    return max(
        ((a - b).abs().max() / b.abs().max().clamp_min(1e-300)).item() for a, b in zip(found, expected, strict=True)
    )


def _runs(anatomy: Anatomy, teacher: nn.Module, given: list[torch.Tensor]) -> bool:
    args, kwargs = _call(anatomy, given)
    try:
        double = _double(teacher)
        with evaluating(double):
            double(*args, **kwargs)
        _Reference(anatomy, None, teacher).outputs(given)  # a precision may be written into the traced operators
    except Exception:  # whatever its code raises at another precision
        return False
    return True


def _noise(anatomy: Anatomy, plan: Plan, teacher: nn.Module, given: list[torch.Tensor]) -> float:
    """How far one rounding step in the input moves the reference, as a share of the largest output; or, if larger, how
    far the uncut teacher is from the reference, since the code may ask for a precision other than the traced one."""
    plain = _Reference(anatomy, plan, teacher).outputs(given)
    moved = [g * (1 + torch.finfo(g.dtype).eps) if g.is_floating_point() else g for g in given]
    shifted = _Reference(anatomy, plan, teacher).outputs(moved)
    moves = max(
        max(((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item(), torch.finfo(b.dtype).eps)
        for a, b in zip(shifted, plain, strict=True)
    )
    return max(moves, _compare(anatomy, None, teacher, teacher, given))


class _Reference(Interpreter):
    """Runs the teacher's traced operators with removed channels at zero for whatever reads across channels.

    In the inputs' precision: each of the teacher's tensors is copied to it when first read and released when last read,
    so that no second teacher is ever held."""

    def __init__(self, anatomy: Anatomy, plan: Plan | None, teacher: nn.Module, zero: frozenset[Node] = frozenset()):
        super().__init__(anatomy.traced.program.graph_module)
        self._zero = zero  # nodes whose result is set to zero
        self._anatomy, self._keep = anatomy, plan.keep if plan else {}
        self._tensors = named_tensors(teacher)
        self._wanted: dict[Node, torch.Tensor] = {}
        self._seams = anatomy.seam_nodes
        self._masks: dict[int, torch.Tensor | None] = {}
        self._unread: set[Node] = set()
        self._double = False

    def outputs(self, given: list[torch.Tensor]) -> list[torch.Tensor]:
        traced = self._anatomy.traced
        constants = {**traced.program.graph_signature.inputs_to_lifted_tensor_constants}
        inputs, order = dict(zip(traced.inputs, given, strict=True)), []
        users = iter([v for v in _leaves(traced.example)])
        self._unread, self._double = set(traced.tensors), _in_double(given)
        for node in traced.program.graph.nodes:
            if node.op != "placeholder":
                continue
            if node in traced.tensors:
                order.append(self._tensors[traced.tensors[node]])
            elif node.name in constants:
                order.append(traced.program.constants[constants[node.name]])
            else:
                value = next(users)
                order.append(inputs[node].clone() if node in inputs else value)
        result = super().run(*order)
        features = [self._wanted[n] for n in self._seams]
        return [*_floats(result), *(self._anatomy.seam.batch_first(features) if features else [])]

    def run_node(self, n: Node) -> Any:
        for source in self._unread.intersection(n.all_input_nodes):
            self._unread.remove(source)
            self.env[source] = _copied(self.env[source], self._double)
        masks = self._masks_of_statistics(n)
        result = self._over_kept(n, masks) if masks else super().run_node(n)
        result = torch.zeros_like(result) if n in self._zero else result
        if n in self._seams:
            self._wanted[n] = result.clone()
        return result

    def fetch_args_kwargs_from_env(self, n: Node) -> tuple[tuple, dict]:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        if n.op == "call_function" and operator(n) in _READS_ACROSS:
            within = operator(n) in RECURRENT  # from step to step it also reads across its own output
            args = torch.fx.map_arg(n.args, lambda a: self._zeroed(a, self.env[a], within))
            if within:  # torch writes the precision of its initial states into the trace
                args = torch.utils._pytree.tree_map(lambda v: v.to(args[0]) if torch.is_tensor(v) else v, args)
            if operator(n) == "scaled_dot_product_attention":
                _require_same_precision(*args, **kwargs)
        return args, kwargs

    def _mask(self, ids: np.ndarray) -> torch.Tensor | None:
        if id(ids) not in self._masks:
            kept = self._anatomy.kept(ids, self._keep)
            self._masks[id(ids)] = None if kept.all() else torch.from_numpy(kept)
        return self._masks[id(ids)]

    def _zeroed(self, node: Node, value: Any, weights: bool = False) -> Any:
        """`value` of `node` with removed channels at zero; weights as they are, unless `weights`."""
        if (node in self._anatomy.traced.tensors and not weights) or not isinstance(value, torch.Tensor):
            return value
        for axis, ids in enumerate(self._anatomy.axes[node]):
            mask = None if ids is None else self._mask(ids)
            if mask is not None:
                view = [1] * value.dim()
                view[axis] = -1
                value = value * mask.to(value.device).to(value.dtype).view(view)
        return value

    def _masks_of_statistics(self, node: Node) -> dict[int, torch.Tensor]:
        """For each cut axis over which `node` takes statistics: which of its channels are kept."""
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
            return {}
        axes = self._anatomy.axes.get(node.args[0]) if shape(node.args[0]) else None
        if not axes:
            return {}
        return {a: m for a in statistics_axes(node) if axes[a] is not None and (m := self._mask(axes[a])) is not None}

    def _over_kept(self, node: Node, masks: dict[int, torch.Tensor]) -> Any:
        """An operator's result with its statistics taken over the kept channels; the others are zero."""
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        kept = {a: m.nonzero().ravel().to(args[0].device) for a, m in masks.items()}
        picked, rest = args[0], list(args[1:])
        for axis, positions in kept.items():
            picked = picked.index_select(axis, positions)
        if operator(node) in ("layer_norm", "rms_norm"):  # its scale and bias have the axes of its statistics
            first = picked.dim() - len(rest[0])
            rest[0] = list(picked.shape[first:])
            kwargs, rest = torch.utils._pytree.tree_map(lambda v: _pick(v, kept, first), (kwargs, rest))
        elif operator(node) == "group_norm":
            kwargs, rest = torch.utils._pytree.tree_map(lambda v: _pick(v, kept, 1), (kwargs, rest))
        result = node.target(picked, *rest, **kwargs)  # type: ignore[operator]  # of a call_function a function
        whole = shape(node)
        if whole is not None and isinstance(result, torch.Tensor) and result.dim() == args[0].dim():
            for axis, positions in kept.items():
                if result.shape[axis] == len(positions) and whole[axis] == len(masks[axis]):
                    size = [*result.shape[:axis], len(masks[axis]), *result.shape[axis + 1 :]]
                    result = result.new_zeros(size).index_copy(axis, positions, result)
        return result


def _pick(value: Any, kept: dict[int, torch.Tensor], first: int) -> Any:
    """Select the kept positions of a tensor that has another's axes from `first` on; anything else is unchanged."""
    if isinstance(value, torch.Tensor):
        for axis, positions in kept.items():
            value = value.index_select(axis - first, positions)
    return value


def _require_same_precision(query: Any, key: Any, value: Any, attn_mask: Any = None, *_: Any, **__: Any) -> None:
    """Refuse a mask whose precision differs from its query's, which torch would silently reinterpret."""
    if attn_mask is not None and attn_mask.is_floating_point() and attn_mask.dtype != query.dtype:
        raise TypeError(f"found a mask of {attn_mask.dtype} for a query of {query.dtype}")


def _double(model: nn.Module) -> nn.Module:
    return full_copy(model).double()


def _copied(tensor: torch.Tensor, double: bool) -> torch.Tensor:
    """A detached copy, in float64 if `double`."""
    wide = double and tensor.is_floating_point()
    return tensor.detach().to(torch.float64 if wide else tensor.dtype, copy=True)


def _in_double(given: list[torch.Tensor]) -> bool:
    return any(g.dtype == torch.float64 for g in given)


class _InRows(TorchDispatchMode):
    """Gives grouped convolutions in float64 contiguous tensors, with which torch is 12 times as fast as with
    channels_last (measured: 192 groups of 7x7, 56x56 pixels, on a CPU). Results keep the layout of the input."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        fast = func is not torch.ops.aten.convolution.default or args[8] == 1 or args[0].is_contiguous()
        if fast or args[0].dtype != torch.float64:
            return func(*args, **(kwargs or {}))
        x, weight, *rest = args
        result = func(x.contiguous(), weight.contiguous(), *rest)
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return result.contiguous(memory_format=torch.channels_last)
        return result


def _random_inputs(anatomy: Anatomy, dtype: torch.dtype) -> list[torch.Tensor]:
    given = []
    for value in _leaves(anatomy.traced.example):
        if isinstance(value, torch.Tensor):
            given.append(
                torch.randn(value.shape, dtype=dtype, device=value.device) if value.is_floating_point() else value
            )
    return given


def _call(anatomy: Anatomy, given: list[torch.Tensor]) -> tuple[tuple, dict]:
    """The example's arguments with its tensors replaced by clones of `given`, in order."""
    values = iter(given)
    args, kwargs = anatomy.traced.example
    return torch.utils._pytree.tree_map(
        lambda v: next(values).clone() if isinstance(v, torch.Tensor) else v, (args, kwargs)
    )


def _leaves(value: Any) -> Iterator[Any]:
    yield from torch.utils._pytree.tree_leaves(value)


def _floats(result: Any) -> Iterator[torch.Tensor]:
    yield from (value for _, value in tensors(result) if value.is_floating_point())

"""From a network and an example input to its seam and its anatomy."""

from collections.abc import Sequence
from typing import Any

import networkx
import torch
from torch import nn
from torch.fx import Node
from torch.utils._pytree import tree_map

from understudy.cut import without
from understudy.errors import InputError, UnsupportedModel
from understudy.graph import Anatomy, read_anatomy
from understudy.guard import evaluating, full_copy, structural_copy
from understudy.probe import settle
from understudy.rules import argument
from understudy.seam import Seam, SeamPoint, capturing
from understudy.trace import Call, Traced, as_example, operator, shape, trace_graph

_WEIGHTED = {"conv1d", "conv2d", "conv3d", "linear", "addmm", "convolution"}
_UNARY = {
    "relu",
    "relu6",
    "hardtanh",
    "silu",
    "gelu",
    "hardswish",
    "leaky_relu",
    "elu",
    "dropout",
    "contiguous",
    "mish",
}


def find_seam(teacher: nn.Module, example: Any, *, points: Sequence[SeamPoint | str] | None = None) -> Seam:
    """Where `teacher`'s body ends: the penultimate features, before the final pooling and after the last activation.

    example: a tensor, a tuple of arguments, or (args, kwargs). points: name them instead of having them found.
    Without a final pooling the seam is the input of the last weighted layer.
    Raises: UnsupportedModel where no head follows, naming how to choose a seam by hand.
    Source: MiR, arXiv 2201.02620 (features before the pool are worth 0.5 to 2.0 points over features after it).
    """
    return trace(teacher, example, points=points).seam


def trace(
    teacher: nn.Module,
    example: Any,
    seam: Seam | None = None,
    *,
    points: Sequence[SeamPoint | str] | None = None,
    drop: Sequence[str] = (),
) -> Anatomy:
    """The anatomy of `teacher`: seam, channel groups, blocks, dependent sizes. The teacher is not changed.

    seam or points: where the features are taken; found by itself if neither is given. drop: modules that are to be
    left out (replaced by identity), so that the anatomy is of what remains.
    Raises: UnsupportedModel for what torch.export cannot follow or a seam that cannot be found; InputError for a
    module in `drop` that cannot be left out.
    """
    if seam is not None:
        points = seam.points
    wanted = [p if isinstance(p, SeamPoint) else SeamPoint.parse(p) for p in points or ()]
    model = teacher
    if drop:
        model = without(structural_copy(teacher), drop)
        _check_drop(teacher, model, example, drop)
    traced = trace_graph(model, example, wanted)
    if wanted:
        nodes, found = traced.marks, tuple(wanted)
    else:
        point, node = _search(traced)
        nodes, found = [node], (point,)
    seam = _seam(traced, nodes, found)
    anatomy = read_anatomy(traced, seam, nodes)
    anatomy.dropped = tuple(drop)
    settle(teacher, anatomy)
    return anatomy


def _check_drop(teacher: nn.Module, model: nn.Module, example: Any, drop: Sequence[str]) -> None:
    """A dropped module must hand on a tensor of the shape it was given, else what follows would see another."""
    args, kwargs = as_example(example)
    seen: dict[str, tuple[Any, Any]] = {}
    handles = []
    modules = dict(teacher.named_modules())

    def note(name: str) -> Any:
        def hook(_: nn.Module, given: tuple, result: Any) -> None:
            seen[name] = (
                tuple(given[0].shape) if len(given) == 1 and isinstance(given[0], torch.Tensor) else None,
                tuple(result.shape) if isinstance(result, torch.Tensor) else None,
            )

        return hook

    try:
        for name in drop:
            handles.append(modules[name].register_forward_hook(note(name)))
        with evaluating(teacher):
            teacher(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    for name in drop:
        given, result = seen.get(name, (None, None))
        if given is None or given != result:
            raise InputError(
                f"dropping block {name!r}: it takes {given or 'no single tensor'} and returns "
                f"{result or 'no single tensor'}; expected one tensor in and one of the same shape out; "
                "`understudy inspect` lists the blocks that can be dropped"
            )


def _search(traced: Traced) -> tuple[SeamPoint, Node]:
    """The point where a hook catches the features, and their place in the graph."""
    flow = traced.flow()
    if not traced.outputs:
        raise _refuse("its forward pass returns no tensor")
    scores = [n for n in traced.outputs if len(shape(n)) == 2]
    if len(traced.outputs) > 1 and len(scores) == 1:  # the class scores among other things that are returned
        flow.remove_edges_from([(n, "out") for n in traced.outputs if n not in scores])
    above = networkx.immediate_dominators(flow, "in")
    chain, node = [], above.get("out")
    while isinstance(node, Node):
        chain.append(node)
        node = above[node]
    for value in chain:  # from the output up
        users = [u for u in value.users if u.op == "call_function" and operator(u) != "getitem"]
        if value.op == "placeholder" or (operator(value) in ("select", "slice") and _pools(value)):
            continue  # the tokens that were chosen belong behind the seam
        if users and all(_pools(u) for u in users):
            if not _weights_behind(traced, flow, value):
                raise _refuse("no weights follow its last pooling: it has no head")
            return _reachable(traced, value, _points(traced, value, users))
    for value in chain:
        if operator(value) in _WEIGHTED and isinstance(value.args[0], Node) and value.args[0].op != "placeholder":
            if operator(value) != "linear" or len(shape(value)) != 2:
                break
            return _reachable(traced, value.args[0], _points(traced, value.args[0], [value]))
    raise _refuse("neither a final pooling nor a final linear layer was found")


def _refuse(found: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"finding the seam: {found}; expected features, a pooling and a head behind it. "
        "Name where the features are with --seam MODULE (points=[...] in Python)"
    )


def _pools(node: Node) -> bool:
    """A pooling that ends the map: adaptive, over whole axes, or down to one position; or the choice of one token."""
    name, before, after = operator(node), shape(node.args[0]) if node.args else None, shape(node)
    if name.startswith("adaptive_") or name == "_adaptive_avg_pool2d":
        return True
    if name in ("mean", "sum", "amax", "logsumexp"):
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        dims = [dims] if isinstance(dims, int) else dims
        return bool(dims) and before is not None and len(before) >= 3 and 0 not in [d % len(before) for d in dims]
    if name in ("select", "slice") and len(before) == 3 and argument(node, 1, "dim", 0) % 3 == 1:
        users = [u for u in node.users if u.op == "call_function"]  # a slice: the tokens that are not averaged go first
        return name == "select" or (bool(users) and all(_pools(u) for u in users))
    if name in ("avg_pool2d", "max_pool2d", "avg_pool1d", "avg_pool3d"):
        return after is not None and all(s == 1 for s in after[2:]) and any(s > 1 for s in before[2:])
    return False


def _weights_behind(traced: Traced, flow: networkx.DiGraph, value: Node) -> bool:
    behind = networkx.descendants(flow, value)
    return any(isinstance(n, Node) and operator(n) in _WEIGHTED for n in behind)


def _points(traced: Traced, value: Node, users: list[Node]) -> list[tuple[SeamPoint, Node]]:
    """Hooks that could catch `value`, each with the node that it catches: the module that returns it, the module that
    takes it, or, where neither exists, the nearest module before it with only activations between, or the next one."""
    points = _returned(traced, value, users)
    outer = set(traced.calls.get(value, ()))
    for user in users:
        points += [(SeamPoint(c.module, "input", c.index), value) for c in traced.calls[user] if c not in outer][:1]
    node = value
    while (
        not points and operator(node) in _UNARY and isinstance(node.args[0], Node) and node.args[0].op != "placeholder"
    ):
        node = node.args[0]
        points += _returned(traced, node, list(node.users))
    before, user = value, users[0]
    while not points and user.op == "call_function":  # functional all the way: what the next module takes
        points += [(SeamPoint(c.module, "input", c.index), before) for c in traced.calls[user]][:1]
        before, user = user, next(iter(user.users))
    return points


def _returned(traced: Traced, value: Node, users: list[Node]) -> list[tuple[SeamPoint, Node]]:
    inside: set[Call] = {c for u in users for c in traced.calls.get(u, ())}
    return [(SeamPoint(c.module, "output", c.index), value) for c in traced.calls.get(value, ()) if c not in inside]


def _reachable(traced: Traced, features: Node, candidates: list[tuple[SeamPoint, Node]]) -> tuple[SeamPoint, Node]:
    """The first candidate at which a hook really catches one tensor of the traced shape."""
    for point, node in candidates:
        try:
            found = _caught(traced, point)
        except UnsupportedModel:
            continue
        if tuple(found.shape) == shape(node):
            return point, node
    raise _refuse(
        f"the features ({operator(features)} in {traced.where(features)}) pass through no module of their own"
    )


def _caught(traced: Traced, point: SeamPoint) -> torch.Tensor:
    """What a hook at `point` catches. Shapes are all that matters, so it runs without data where the code allows it."""
    seam, (args, kwargs) = Seam((point,), (), ()), traced.example
    with torch.no_grad():
        try:
            empty = full_copy(traced.model).to("meta")
            with capturing(empty, seam) as capture:
                return capture.features(*_empty(args), **_empty(kwargs))[0]
        except UnsupportedModel:
            raise
        except Exception:  # code that reads values, or holds tensors that are no buffers
            with capturing(traced.model, seam) as capture:
                return capture.features(*args, **kwargs)[0]


def _empty(values: Any) -> Any:
    return tree_map(lambda v: v.to("meta") if isinstance(v, torch.Tensor) else v, values)


def _seam(traced: Traced, nodes: list[Node], points: tuple[SeamPoint, ...]) -> Seam:
    flow = traced.flow()
    body = set(nodes).union(*(networkx.ancestors(flow, n) for n in nodes))
    after = (set(traced.outputs) | networkx.ancestors(flow, "out")) - body
    behind = {t for n in after if isinstance(n, Node) for t in n.all_input_nodes if t in traced.tensors}
    names = {traced.tensors[t] for t in behind}
    # A buffer that no operator reads (num_batches_tracked) belongs where the rest of its module does.
    owners = {n.rpartition(".")[0] for n in names}
    used = {traced.tensors[t] for t in traced.tensors if t.users}
    idle = {n for n, _ in traced.model.named_buffers() if n not in used and n.rpartition(".")[0] in owners}
    order = [n for n in traced.model.state_dict() if n in names | idle]
    return Seam(points, tuple(shape(n)[1:] for n in nodes), tuple(order))

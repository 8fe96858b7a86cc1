"""From a network and an example input to its seam and its anatomy."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import networkx
import torch
from torch import nn
from torch.fx import Node

from mimicut.anatomy.blocks import find_blocks, in_streams, resolve_drop
from mimicut.anatomy.cost import macs
from mimicut.anatomy.graph import Anatomy, read_anatomy
from mimicut.anatomy.operators.rules import argument
from mimicut.anatomy.probe import settle
from mimicut.anatomy.tracing import Call, Traced, operator, run_for_shapes, shape, trace_graph
from mimicut.base.errors import UnsupportedModel
from mimicut.base.guard import structural_copy
from mimicut.surgery.cut import drop_modules
from mimicut.surgery.seam import Seam, SeamPoint, watching

_WEIGHTED = {"conv1d", "conv2d", "conv3d", "linear", "convolution"} | {f"conv_transpose{d}d" for d in (1, 2, 3)}
# The seam is taken outside the module that holds the last layer only where at least this share of the MACs stays before
# it: a segmentation head may be most of the network. Source: assumption.
_BODY_SHARE = 0.5
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
    "flatten",
    "view",
    "reshape",
    "transpose",
    "permute",
    "unsqueeze",
    "squeeze",
}


def find_seam(teacher: nn.Module, example: Any, *, points: Sequence[SeamPoint | str] | None = None) -> Seam:
    """Where `teacher`'s body ends: the penultimate features, before the final pooling and after the last activation.

    example: a tensor, a tuple of arguments, or (args, kwargs). points: name them instead of having them found; a name
    at which a module gives or takes several tensors stands for all of them.

    The rule, in order; a seam is the set of points that every path from the input to the prediction passes:
    1. What goes into the final pooling (adaptive, over whole axes, or the choice of a token) where layers follow it:
       layers behind the pooling, one or several, are the head. Of branches that are pooled apart, each has a point.
    2. Else what goes into the last layers (convolution or linear, nothing with parameters behind them), none of which
       comes before another. Where the output is a map or tokens, it is what goes into the outermost modules that hold
       them, as long as half of the MACs stay before those (a segmentation network's classifier).
    3. Else the network has no head (`Seam.headless`): it returns features, as do all that return maps of several
       sizes. The seam is what goes into the final pooling, or else all that is returned, and every width inside may go.
    Of several outputs those count from which no other is made, and among these the one that is a row of scores.

    Raises: UnsupportedModel where no hook can catch these features, or nothing is returned that could be imitated.
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
    whole: Anatomy | None = None,
) -> Anatomy:
    """The anatomy of `teacher`: seam, channel groups, blocks, dependent sizes. The teacher is not changed.

    seam or points: where the features are taken; found by itself if neither is given: see `find_seam`. drop: modules
    that are to be left out (replaced by identity), so that the anatomy is of what remains. whole: the anatomy with
    them, where it is known already.
    Raises: UnsupportedModel for what torch.export cannot follow or a seam that cannot be found; InputError for a
    module in `drop` that cannot be left out.
    """
    if seam is not None:
        points = seam.points
    wanted = [p if isinstance(p, SeamPoint) else SeamPoint.parse(p) for p in points or ()]
    model, gone, before, zeroed = teacher, [], None, frozenset()
    if drop:
        before = trace_graph(teacher, example) if whole is None else whole.traced
        blocks = find_blocks(before) if whole is None else whole.blocks
        gone = resolve_drop(teacher, example, blocks, drop)
        zeroed = frozenset(b.end for b in blocks if b.name in drop and b.pinned is None)
        model = drop_modules(structural_copy(teacher), gone)
    traced = trace_graph(model, example, wanted)
    found, headless = (traced.marks, seam is not None and seam.headless) if wanted else _search(traced)
    nodes = list(found.values())
    anatomy = read_anatomy(traced, _seam(traced, found, headless), nodes)
    anatomy.dropped, anatomy.gone, anatomy.whole, anatomy.zeroed = tuple(drop), tuple(map(tuple, gone)), before, zeroed
    anatomy.blocks = in_streams(anatomy, find_blocks(traced))
    settle(anatomy)
    return anatomy


def _search(traced: Traced) -> tuple[dict[SeamPoint, Node], bool]:
    """Points at which hooks catch the features, with their places in the graph; is the network without a head?"""
    returned = {n: part for n, part in traced.outputs.items() if _floating(n) and n not in traced.inputs}
    if not returned:
        raise _refuse("its forward pass returns no floating-point tensor that it has computed")
    flow = _predicting(traced, list(returned))
    above = networkx.immediate_dominators(flow, "in")
    chain, node = [], above.get("out")
    while isinstance(node, Node):
        chain.append(node)
        node = above[node]
    last = next((v for v in chain if _pooled(v)), None)
    pooled = _frontier(traced, flow, _pooled) if last is None else [last]
    if pooled and all(_weights_behind(traced, flow, v) for v in pooled):
        return _reachable(traced, {v: _takers(v) for v in pooled}), False
    maps = {shape(n)[2:] for n in returned if len(shape(n)) == 4}
    layers = _last_layers(traced, flow) if len(maps) < 2 else []
    if layers:
        return _reachable(traced, _before(traced, flow, layers)), False
    if pooled:
        return _reachable(traced, {v: _takers(v) for v in pooled}), True
    return {SeamPoint("", "output", 0, part): n for n, part in returned.items()}, True


def _refuse(found: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"finding the seam: {found}. Name where the features are with --seam MODULE (points=[...] in Python); "
        "--seam ':output' takes what the network itself returns"
    )


def _floating(node: Node) -> bool:
    return node.meta["val"].is_floating_point()


def _predicting(traced: Traced, returned: list[Node]) -> networkx.DiGraph:
    """The data flow to those outputs that are predictions, not what they were made from or what comes beside them."""
    flow = traced.flow()
    flow.remove_node("out")
    ends = [n for n in returned if not networkx.descendants(flow, n) & set(returned)]
    scores = [n for n in ends if len(shape(n)) == 2]
    if len(scores) == 1:
        ends = scores
    flow.add_edges_from((n, "out") for n in ends)
    return flow


def _frontier(
    traced: Traced, flow: networkx.DiGraph, stops: Callable[[Node], bool], passes: Callable[[Node], bool] = bool
) -> list[Node]:
    """Where all paths up from the output first meet nodes that stop them; none if a path reaches the input or what it
    may not pass, or if one of these nodes comes before another."""
    found, todo, seen = set(), ["out"], set()
    while todo:
        for node in flow.predecessors(todo.pop()):
            if node in seen:
                continue
            seen.add(node)
            if node == "in":
                return []
            if stops(node):
                found.add(node)
            elif passes(node):
                todo.append(node)
            else:
                return []
    if any(networkx.descendants(flow, node) & found for node in found):
        return []
    return [node for node in traced.nodes if node in found]


def _takers(value: Node) -> list[Node]:
    return [u for u in value.users if u.op == "call_function" and operator(u) != "getitem"]


def _pooled(value: Node) -> bool:
    """Is it a map or tokens of which only what is pooled goes on?"""
    if value.op == "placeholder" or (operator(value) in ("select", "slice") and _pools(value)):
        return False  # the tokens that were chosen belong behind the seam
    users = _takers(value)
    return bool(users) and all(_pools(u) for u in users)


def _weights_behind(traced: Traced, flow: networkx.DiGraph, value: Node) -> bool:
    return any(_layer_input(traced, n) is not None for n in networkx.descendants(flow, value))


def _layer_input(traced: Traced, node: Node | str) -> Node | None:
    """What a convolution or a linear layer takes, or a product with a parameter; None for anything else."""
    name = operator(node) if isinstance(node, Node) else node
    if name in _WEIGHTED:
        return node.args[0]
    if name == "addmm":
        return node.args[1]
    if name in ("matmul", "mm"):
        data = [a for a in node.args[:2] if not _is_parameter(traced, a)]
        return data[0] if len(data) == 1 else None
    return None


def _is_parameter(traced: Traced, node: Node) -> bool:
    """As it is, or turned."""
    while operator(node) in ("t", "transpose", "permute", "numpy_T"):
        node = node.args[0]
    return node.name in traced.program.graph_signature.inputs_to_parameters


def _last_layers(traced: Traced, flow: networkx.DiGraph) -> list[Node]:
    """The layers with nothing behind them that holds parameters: what they return is a prediction, not a feature."""

    def passes(node: Node) -> bool:
        held = [t for t in node.all_input_nodes if t in traced.tensors and math.prod(shape(t)) > 1]
        return not held and not operator(node).endswith("_norm")

    layers = _frontier(traced, flow, lambda n: _layer_input(traced, n) is not None, passes)
    before = set().union(*(networkx.ancestors(flow, n) for n in layers))
    return layers if any(_layer_input(traced, n) is not None for n in before) else []  # else there is no body


def _before(traced: Traced, flow: networkx.DiGraph, layers: list[Node]) -> dict[Node, list[Node]]:
    """What goes into the head that ends in `layers`, and which operators of the head take it: see `find_seam`."""
    if all(len(shape(n)) > 2 for n in flow.predecessors("out")):
        total = sum(macs(n) or 0 for n in traced.nodes)
        for depth in range(1, 1 + max(len(traced.calls[n]) for n in layers)):
            heads = {traced.calls[n][:depth] for n in layers}
            inside = dict.fromkeys(n for n in traced.nodes if traced.calls[n][:depth] in heads)
            behind = set().union(*(networkx.descendants(flow, n) for n in inside)) - set(inside)
            if any(_layer_input(traced, n) is not None for n in behind):
                continue
            taken = {v for n in inside for v in flow.predecessors(n)} - set(inside)
            if not taken or taken & {"in", *traced.inputs}:
                continue
            if sum(macs(n) or 0 for n in inside) <= (1 - _BODY_SHARE) * total:
                return {v: [n for n in v.users if n in inside] for v in traced.nodes if v in taken}
    taken = {}
    for layer in layers:
        taken.setdefault(_layer_input(traced, layer), []).append(layer)
    return taken


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


def _points(traced: Traced, value: Node, users: list[Node]) -> list[tuple[SeamPoint, Node]]:
    """Hooks that could catch `value`, each with the node that it catches: the module that returns it, the module that
    takes it, or, where neither exists, the nearest module before it with only activations and reshapes between, or the
    next one."""
    points = _returned(traced, value, users)
    outer = set(traced.calls.get(value, ()))
    for user in users:
        points += [(SeamPoint(c.module, "input", c.index), value) for c in traced.calls[user] if c not in outer]
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


def _reachable(traced: Traced, values: dict[Node, list[Node]]) -> dict[SeamPoint, Node]:
    """For each value, which the listed operators take, the first point at which a hook really catches it."""
    modules = dict(traced.model.named_modules())
    candidates = {
        value: [(p, n) for p, n in _points(traced, value, users) if p.module in modules]  # not a slice of a Sequential
        for value, users in values.items()
    }
    caught = _caught(traced, [point for points in candidates.values() for point, _ in points])
    found = {}
    for value, points in candidates.items():
        for point, node in points:
            parts = [part for part, t in caught.get(point, {}).items() if tuple(t.shape) == shape(node)]
            if len(parts) == 1:
                found[dataclasses.replace(point, part=parts[0])] = node
                break
        else:
            raise _refuse(
                f"the features ({operator(value)} in {traced.where(value)}) pass through no module of their own"
            )
    return found


def _caught(traced: Traced, points: list[SeamPoint]) -> dict[SeamPoint, dict[str, torch.Tensor]]:
    """What hooks at `points` catch; their shapes are all that matters."""

    def run(model: nn.Module, args: tuple, kwargs: dict) -> dict[SeamPoint, dict[str, torch.Tensor]]:
        with torch.no_grad(), watching(model, points) as found:
            model(*args, **kwargs)
        return found

    return run_for_shapes(traced.model, traced.example, run)


def _seam(traced: Traced, found: dict[SeamPoint, Node], headless: bool) -> Seam:
    nodes = list(found.values())
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
    return Seam(tuple(found), tuple(shape(n)[1:] for n in nodes), tuple(order), headless)

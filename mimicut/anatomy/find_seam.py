"""From a network and an example input to its seam and its anatomy: `find_seam` and `trace`.

The search works on the data flow, a directed graph from "in" to "out" whose nodes are operators. A *frontier* is the
set of nodes at which all paths up from "out" first meet a node of some kind, such as "is pooled". Where none of them
lies above another, together they cut the network in two, and hooks at them capture all that the head is given.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import networkx
import numpy as np
import torch
from torch import nn
from torch.fx import Node

from mimicut.anatomy.blocks import find_blocks, resolve_drop, with_streams
from mimicut.anatomy.cost import macs
from mimicut.anatomy.graph import Anatomy
from mimicut.anatomy.operators.rule_interface import argument
from mimicut.anatomy.outputs import batch_axes, describe_outputs, imitated, not_measured, returned
from mimicut.anatomy.probe import try_groups
from mimicut.anatomy.reader import read_anatomy
from mimicut.anatomy.tracing import ONE_NUMBER, Call, Traced, operator, run_for_shapes, shape, trace_graph
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
    """Find where a network's body ends: the features before the final pooling and after the last activation.

    A seam is the set of points that every path from the input to the prediction passes. The first rule that fits
    counts:

    1. What goes into the final pooling (adaptive, over whole axes, or the choice of a token) where layers follow it:
       layers after the pooling, one or several, are the head. Branches that are pooled apart have one point each.
    2. What goes into the last layers (convolution or linear, nothing with parameters after them), none of which comes
       before another. Where the output is a map or tokens, it is what goes into the outermost modules that hold them,
       as long as half of the MACs stay before those (a segmentation network's classifier).
    3. Otherwise the network has no head (`Seam.headless`): it returns features, as do all networks that return maps of
       several sizes and make nothing else of them. The seam is what goes into the final pooling, or else all that is
       returned, and every width inside may be cut.

    Where a network returns several outputs, the rules are followed for those from which no other is made, and among
    these for the one that is a row of scores. Then every other output to which some path leads past the points found so
    far gets points of its own by the same rules, or is one itself (`Output.imitated`). Outputs that do not depend on
    the input, or have no axis of images, are left out.

    Args:
        teacher: the network. It is not changed.
        example: a tensor, a tuple of arguments, or (args, kwargs).
        points: the points, instead of having them found; a name at which a module returns or takes several tensors
            stands for all of them.

    Returns:
        The seam.

    Raises:
        UnsupportedModel: no hook can catch these features, or the network returns nothing that could be imitated.

    Source: MiR, arXiv 2201.02620 (features before the pool gain 0.5 to 2.0 points over features after it).
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
    """Read the anatomy of a network: seam, channel groups, blocks, and numbers that follow a cut.

    Args:
        teacher: the network. It is not changed.
        example: a tensor, a tuple of arguments, or (args, kwargs).
        seam: where the features are taken, if that is known.
        points: the same, by its points; without either, `find_seam` finds them.
        drop: blocks or modules that are left out, so that the anatomy describes what remains.
        whole: the anatomy with them, where it is known already.

    Returns:
        The anatomy, with every group tried.

    Raises:
        UnsupportedModel: torch.export cannot follow the network, or its seam cannot be found.
        InputError: something in `drop` cannot be left out.
    """
    if seam is not None:
        points = seam.points
    wanted = [p if isinstance(p, SeamPoint) else SeamPoint.parse(p) for p in points or ()]
    model, dropped_modules, full_trace, zeroed = teacher, [], None, frozenset()
    if drop:
        full_trace = trace_graph(teacher, example) if whole is None else whole.traced
        blocks = find_blocks(full_trace) if whole is None else whole.blocks
        dropped_modules = resolve_drop(teacher, example, blocks, drop)
        zeroed = frozenset(b.branch_end for b in blocks if b.name in drop and b.pinned is None)
        model = drop_modules(structural_copy(teacher), dropped_modules)
    traced = trace_graph(model, example, wanted)
    if not wanted:
        found, headless = _search(traced)
    elif seam is not None:
        found, headless = traced.marks, seam.headless
    else:
        found, headless = traced.marks, set() < set(returned(traced)) <= set(traced.marks.values())
    nodes = list(found.values())
    anatomy = read_anatomy(traced, _seam(traced, found, headless, seam), nodes)
    anatomy.dropped, anatomy.dropped_modules = tuple(drop), tuple(map(tuple, dropped_modules))
    anatomy.full_trace, anatomy.zeroed_nodes = full_trace, zeroed
    anatomy.blocks = with_streams(anatomy, find_blocks(traced))
    try_groups(anatomy)
    return anatomy


def _search(traced: Traced) -> tuple[dict[SeamPoint, Node], bool]:
    """The points at which hooks catch the features, with their nodes; and whether the network has no head."""
    parts = {n: part for n, (part, _) in returned(traced).items() if n not in traced.inputs}
    if not parts:
        return _behind_numbers(traced), False
    several = len({shape(n)[2:] for n in parts if len(shape(n)) == 4}) > 1 and not _detections(traced, list(parts))
    values, headless = _values(traced, _predictions(traced, list(parts)), several)
    found: dict[SeamPoint, Node] = {}
    with (
        suppress(UnsupportedModel) if headless else nullcontext()
    ):  # what no hook catches is caught where it is returned
        found = _reachable(traced, values)
    if not found:
        return {SeamPoint("", "output", 0, part): n for n, part in parts.items()}, True
    flow = traced.flow()
    for node in reversed(parts):  # the last first, as points for it may serve those before it
        if imitated(flow, set(found.values()), node):
            continue
        more, _ = ({}, True) if networkx.descendants(flow, node) & set(found.values()) else _values(traced, [node])
        points = _reachable(traced, more) if more else {}
        if not imitated(flow, {*found.values(), *points.values()}, node):
            points = {SeamPoint("", "output", 0, parts[node]): node}
        found |= {p: n for p, n in points.items() if n not in found.values()}
    return found, headless


def _behind_numbers(traced: Traced) -> dict[SeamPoint, Node]:
    """The points of a network that returns no floats with an axis of images, but whole numbers or truth values that are
    made of such (an argmax over class scores): those of what the numbers are made of.

    Raises:
        UnsupportedModel: There are no such numbers.
    """
    computed = networkx.descendants(traced.flow(), "in")
    ends = [n for n in traced.outputs if n in computed]
    numbers = [n for n in ends if not n.meta["val"].is_floating_point()]
    batched = batch_axes(traced, {SeamPoint("", "output", 0, traced.outputs[n]): n for n in ends})
    numbers = [n for n, axis in zip(ends, batched, strict=True) if n in numbers and axis is not None]
    values, headless = _values(traced, numbers) if numbers else ({}, True)
    if values and not headless:
        return _reachable(traced, values)
    if numbers:
        raise UnsupportedModel(
            "finding the seam: the network returns whole numbers or truth values alone, and no layer was found whose "
            "scores they are made of. Name the module that returns the last features with --seam MODULE (points=[...] "
            "in Python), or compress a part of the network that returns floating point, with --part MODULE (part=)"
        )
    if not ends:
        raise UnsupportedModel(
            "finding the seam: what the network returns does not depend on the images it is given"
            + ("" if traced.outputs else ", or it returns no tensor")
            + ". Expected a network whose forward method computes from the images what it returns, and no hook or "
            "attribute that keeps it from an earlier pass; name a part that does, with --part MODULE (part= in Python)"
        )
    sizes = ", ".join(str(shape(n)) for n in ends)
    raise UnsupportedModel(
        f"finding the seam: for {traced.batch} images, and for one more, the network returns {sizes}, in which no axis "
        f"has one place for each image. {ONE_NUMBER}"
    )


def _values(traced: Traced, ends: list[Node], several: bool = False) -> tuple[dict[Node, list[Node]], bool]:
    """The features of which `ends` are made, each with the operators that take it, and whether no head makes them.
    Without any the outputs are the features. several: the network returns maps of several sizes, which are features."""
    flow = traced.flow()
    flow.remove_node("out")
    flow.add_edges_from((n, "out") for n in ends)
    above = networkx.immediate_dominators(flow, "in")
    chain, node = [], above.get("out")
    while isinstance(node, Node):
        chain.append(node)
        node = above[node]
    towards = networkx.ancestors(flow, "out")

    def is_pooled(value: Node) -> bool:
        return _pooled(value, towards)

    last = next((v for v in chain if is_pooled(v)), None)
    pooled = _frontier(traced, flow, is_pooled) if last is None else [last]
    if pooled and all(_has_layers_after(traced, flow, v) for v in pooled):
        return {v: _takers(v) for v in pooled}, False
    layers = [] if several else _last_layers(traced, flow)
    if layers:
        return _before(traced, flow, layers), False
    return {v: _takers(v) for v in pooled}, True


def _detections(traced: Traced, returned: list[Node]) -> list[Node]:
    """What a head makes of maps of several sizes that the network returns beside it: a detector's boxes and scores.

    Such an output is no map, no other is made of it, and layers follow each of those maps on the way to it. (None
    follow the last map of a backbone that returns its maps and pooled features.)
    """
    flow, found = traced.flow(), []
    maps = {n for n in returned if len(shape(n)) == 4}
    for end in returned:
        towards = networkx.ancestors(flow, end) | {end}
        above = maps & towards - {end}
        if len({shape(n)[2:] for n in above}) < 2 or end in maps or networkx.descendants(flow, end) & set(returned):
            continue
        after = [networkx.descendants(flow, n) & towards for n in above]
        if all(any(_layer_input(traced, n) is not None for n in nodes) for nodes in after):
            found.append(end)
    return found


def _refuse(found: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"finding the seam: {found}. Name where the features are with --seam MODULE (points=[...] in Python); "
        "--seam ':output' takes what the network itself returns"
    )


def _predictions(traced: Traced, returned: list[Node]) -> list[Node]:
    """The outputs from which no other is made; the one that is a row of scores, if only one is."""
    flow = traced.flow()
    ends = [n for n in returned if not networkx.descendants(flow, n) & set(returned)]
    scores = [n for n in ends if len(shape(n)) == 2]
    return scores if len(scores) == 1 else _detections(traced, returned) or ends


def _frontier(
    traced: Traced, flow: networkx.DiGraph, stops: Callable[[Node], bool], passes: Callable[[Node], bool] = bool
) -> list[Node]:
    """The nodes at which all paths up from the output first meet one that `stops` them.

    None where a path reaches the input or a node that does not let it pass, or where one of them lies before another.
    """
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
    """The operators that use a value."""
    return [u for u in value.users if u.op == "call_function" and operator(u) != "getitem"]


def _pooled(value: Node, towards: set[Node]) -> bool:
    """Whether it is a map, or tokens, of which poolings alone are used on the way to the output (`towards`)."""
    if value.op == "placeholder" or (operator(value) in ("select", "slice") and _pools(value)):
        return False  # the tokens that were chosen belong after the seam
    users = [u for u in _takers(value) if u in towards or towards.intersection(u.users)]
    return bool(users) and all(_pools(u) for u in users)


def _has_layers_after(traced: Traced, flow: networkx.DiGraph, value: Node) -> bool:
    return any(_layer_input(traced, n) is not None for n in networkx.descendants(flow, value))


def _layer_input(traced: Traced, node: Node | str) -> Node | None:
    """What a convolution or a linear layer takes, or a product with a parameter; None for anything else."""
    if not isinstance(node, Node):
        return None
    name = operator(node)
    args: tuple[Any, ...] = node.args
    if name in _WEIGHTED:
        return None if _weighs_by_probabilities(node) else args[0]
    if name == "addmm":
        return args[1]
    if name in ("matmul", "mm"):
        data = [a for a in args[:2] if not _is_weight(traced, a)]
        return data[0] if len(data) == 1 else None
    return None


def _weighs_by_probabilities(node: Node) -> bool:
    """Whether it is a convolution of probabilities: a mean of fixed numbers (the bins of a box's side), no layer."""
    return operator(node) in _WEIGHTED - {"linear"} and operator(node.args[0]) in ("softmax", "_softmax")


def _is_weight(traced: Traced, node: Node) -> bool:
    """Whether it is a parameter, or is computed from parameters and buffers alone (the rows of a cosine head)."""
    found, todo = False, [node]
    while todo:
        source = todo.pop()
        if source in traced.inputs:
            return False
        found |= source.name in traced.program.graph_signature.inputs_to_parameters
        todo += source.all_input_nodes
    return found


def _last_layers(traced: Traced, flow: networkx.DiGraph) -> list[Node]:
    """The layers with no parameters after them: what they return is a prediction, not a feature."""

    def passes(node: Node) -> bool:
        held = [t for t in node.all_input_nodes if t in traced.tensors and math.prod(shape(t)) > 1]
        return (not held or _weighs_by_probabilities(node)) and not operator(node).endswith("_norm")

    layers = _frontier(traced, flow, lambda n: _layer_input(traced, n) is not None, passes)
    before = set().union(*(networkx.ancestors(flow, n) for n in layers))
    return layers if any(_layer_input(traced, n) is not None for n in before) else []  # else there is no body


def _before(traced: Traced, flow: networkx.DiGraph, layers: list[Node]) -> dict[Node, list[Node]]:
    """What goes into the head that ends in `layers`, with the operators of the head that take it (rule 2)."""
    if all(len(shape(n)) > 2 for n in flow.predecessors("out")):
        total = sum(macs(n) or 0 for n in traced.nodes)
        for depth in range(1, 1 + max(len(traced.calls[n]) for n in layers)):
            heads = {traced.calls[n][:depth] for n in layers}
            inside = dict.fromkeys(n for n in traced.nodes if traced.calls[n][:depth] in heads)
            after = set().union(*(networkx.descendants(flow, n) for n in inside)) - set(inside)
            if any(_layer_input(traced, n) is not None for n in after):
                continue
            taken = {v for n in inside for v in flow.predecessors(n)} - set(inside)
            if not taken or taken & {"in", *traced.inputs}:
                continue
            if sum(macs(n) or 0 for n in inside) <= (1 - _BODY_SHARE) * total:
                return {v: [n for n in v.users if n in inside] for v in traced.nodes if v in taken}
    into: dict[Node, list[Node]] = {}
    for layer in layers:
        into.setdefault(_layer_input(traced, layer), []).append(layer)
    return into


def _pools(node: Node) -> bool:
    """Whether it is a pooling that ends the map (adaptive, over whole axes, or to one position), or chooses a token."""
    name, before, after = operator(node), shape(node.args[0]) if node.args else None, shape(node)
    if name.startswith("adaptive_") or name == "_adaptive_avg_pool2d":
        return True
    if name in ("mean", "sum", "amax", "logsumexp"):
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        dims = [dims] if isinstance(dims, int) else dims
        return bool(dims) and before is not None and len(before) >= 3 and 0 not in [d % len(before) for d in dims]
    if name in ("select", "slice") and len(before) == 3 and argument(node, 1, "dim", 0) % 3 == 1 and before[1] > 1:
        users = [u for u in node.users if u.op == "call_function"]  # a slice: the tokens that are not averaged go first
        return name == "select" or (bool(users) and all(_pools(u) for u in users))
    if name in ("avg_pool2d", "max_pool2d", "avg_pool1d", "avg_pool3d"):
        return after is not None and all(s == 1 for s in after[2:]) and any(s > 1 for s in before[2:])
    return False


def _points(traced: Traced, value: Node, users: list[Node]) -> list[tuple[SeamPoint, Node]]:
    """The points at which a hook could catch `value`, each with the node that it catches.

    They are the module that returns it and the module that takes it. Where neither exists, it is the nearest module
    before it with only activations and reshapes between, or else the next module after it.
    """
    points = _returned(traced, value, users)
    outer = set(traced.calls.get(value, ()))
    for user in users:
        points += [(SeamPoint(c.module, "input", c.index), value) for c in traced.calls[user] if c not in outer]
    node: Node | None = value
    while not points and (node := _without_parameters(traced, node)) is not None:
        points += _returned(traced, node, list(node.users))
        flow = traced.flow()
        points += [
            (SeamPoint(c.module, "input", c.index), node)
            for u in node.users
            for c in traced.calls.get(u, ())
            if c not in traced.calls.get(node, ()) and value in networkx.descendants(flow, u)
        ]
    before, user = value, users[0]
    while not points and user.op == "call_function":  # functional all the way: what the next module takes
        points += [(SeamPoint(c.module, "input", c.index), before) for c in traced.calls[user]][:1]
        if not user.users:  # an operator in place, whose result nobody takes
            break
        before, user = user, next(iter(user.users))
    return points


def _without_parameters(traced: Traced, value: Node) -> Node | None:
    """The value from which `value` is made by operators without parameters, pooling and layers left out: an activation,
    a reshape, or a normalisation (a quotient of it and its own length). None where there is no such value."""
    flow = traced.flow()
    flow.remove_node("out")
    source = networkx.immediate_dominators(flow, "in").get(value)
    if not isinstance(source, Node) or source.op == "placeholder":
        return None
    between = (networkx.ancestors(flow, value) & networkx.descendants(flow, source)) | {value}
    if any(t in traced.tensors for n in between for t in n.all_input_nodes) or any(map(_pools, between - {source})):
        return None
    return source if len(between) > 1 or operator(value) in _UNARY else None


def _returned(traced: Traced, value: Node, users: list[Node]) -> list[tuple[SeamPoint, Node]]:
    """The modules that return `value` to code outside them."""
    inside: set[Call] = {c for u in users for c in traced.calls.get(u, ())}
    return [(SeamPoint(c.module, "output", c.index), value) for c in traced.calls.get(value, ()) if c not in inside]


def _reachable(traced: Traced, values: dict[Node, list[Node]]) -> dict[SeamPoint, Node]:
    """For each value, which the listed operators take, the first point at which a hook catches it in a real pass."""
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
    """The tensors that hooks at `points` catch; only their shapes matter."""

    def run(model: nn.Module, args: tuple, kwargs: dict) -> dict[SeamPoint, dict[str, torch.Tensor]]:
        with torch.no_grad(), watching(model, points) as found:
            model(*args, **kwargs)
        return found

    return run_for_shapes(traced.model, traced.example, run)


def _seam(traced: Traced, found: dict[SeamPoint, Node], headless: bool, known: Seam | None) -> Seam:
    """The seam at these points, with the names of the tensors that only act after them. known: the seam of an earlier
    trace, whose kinds of outputs hold."""
    nodes = list(found.values())
    axes = batch_axes(traced, found)
    if None in axes:
        point = next(point for point, axis in zip(found, axes, strict=True) if axis is None)
        raise _refuse(f"{point} is the same tensor for any number of images, or has no axis of images")
    flow = traced.flow()
    body = set(nodes).union(*(networkx.ancestors(flow, n) for n in nodes))
    after = (set(traced.outputs) | networkx.ancestors(flow, "out")) - body
    names = {traced.tensors[t] for n in after if isinstance(n, Node) for t in n.all_input_nodes if t in traced.tensors}
    # A buffer that no operator reads (num_batches_tracked) belongs where the rest of its module does.
    owners = {n.rpartition(".")[0] for n in names}
    used = {traced.tensors[t] for t in traced.tensors if t.users}
    idle = {n for n, _ in traced.model.named_buffers() if n not in used and n.rpartition(".")[0] in owners}
    order = [n for n in traced.model.state_dict() if n in names | idle]
    shapes = tuple(tuple(np.delete(shape(n), axis).tolist()) for n, axis in zip(nodes, axes, strict=True))
    compared = returned(traced)  # once, as it may run the network
    left_out = not_measured(traced, compared)
    if known is not None and known.outputs:
        outputs = known.outputs
    else:
        outputs = describe_outputs(traced, compared, nodes, headless, _detections(traced, list(compared)))
    return Seam(tuple(found), shapes, tuple(order), headless, outputs, axes if any(axes) else (), left_out)

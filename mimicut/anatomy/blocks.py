"""Residual branches: found in the operator graph by fork and addition, with the modules by which each can be dropped.

A dropped branch adds zeros. Where the module around it then returns what it was given, that module is replaced as a
whole; else the branch's own modules are: the first or the last returns zeros, the others what they are given.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import networkx
import torch
from torch import nn
from torch.fx import Node

from mimicut.anatomy.cost import macs
from mimicut.anatomy.graph import Anatomy, Block
from mimicut.anatomy.tracing import Traced, as_example, operator, run_for_shapes, shape
from mimicut.base.errors import InputError
from mimicut.base.guard import evaluating, structural_copy
from mimicut.surgery.cut import drop_modules
from mimicut.surgery.seam import tensors
from mimicut.surgery.stand_ins import THROUGH, ZERO

# After the addition: applied twice they do what they do once.
_IDEMPOTENT = ("relu", "relu6", "hardtanh")
# Between an activation and a fork: what was in its range stays there.
_KEEP_RANGE = ("max_pool2d", "adaptive_max_pool2d", "dropout", "view", "reshape", "flatten", "contiguous", "clone")
# These make zeros from zeros.
_KEEP_ZERO = frozenset(
    """alias avg_pool2d chunk clone constant_pad_nd contiguous detach dropout expand flatten gelu getitem hardswish
    index_select leaky_relu max_pool2d mean movedim mT neg pad permute relu relu6 reshape roll select silu slice split
    split_with_sizes squeeze sum t tanh to transpose unflatten unsqueeze view""".split()
)
_PRODUCTS = ("mul", "matmul", "bmm", "mm")


def find_blocks(traced: Traced) -> tuple[Block, ...]:
    """Find every pair of fork and addition.

    Args:
        traced: the operator graph.

    Returns:
        Blocks in the order of their additions, each with how it is dropped, or why it cannot be. Their streams are
        left open: see `with_streams`.
    """
    found = _pairs(traced)
    blocks = [
        Block(name, fork in add.args, nodes, add, not any(add in other for _, _, other in found))
        for (fork, add, nodes), name in zip(found, _names(traced, found), strict=True)
    ]
    returns = _returns(traced) if any(b.identity for b in blocks) else {}
    return tuple(
        _with_dropped_modules(traced, block, fork, returns) for block, (fork, _, _) in zip(blocks, found, strict=True)
    )


def with_streams(anatomy: Anatomy, blocks: Iterable[Block]) -> tuple[Block, ...]:
    """Give blocks the residual stream on which each stands, and its place there.

    Args:
        anatomy: its groups are the streams.
        blocks: in the order of their additions.

    Returns:
        The same blocks with `streams`, `stage`, `place` and `last`.
    """
    found, places = list(blocks), {}
    for number, block in enumerate(found):
        streams = _groups_at(anatomy, block.add)
        stage, place = -1, -1
        if block.outer:
            mine = places.setdefault(streams, [])
            stage, place = list(places).index(streams), len(mine)
            mine.append(number)
        found[number] = replace(block, streams=streams, stage=stage, place=place)
    for mine in places.values():
        found[mine[-1]] = replace(found[mine[-1]], last=True)
    return tuple(found)


def droppable(anatomy: Anatomy) -> list[Block]:
    """The blocks that can be dropped: without any of them the network's code was seen to run."""
    blocks = [b for b in anatomy.blocks if b.pinned is None]
    return _running(anatomy.traced, blocks, _output_shapes(anatomy.traced, [])) if blocks else []


def _running(traced: Traced, blocks: list[Block], shapes: dict[str, tuple[int, ...]] | None) -> list[Block]:
    """Those of `blocks` without which the network returns these shapes; the search halves them until it does."""
    if not blocks or _output_shapes(traced, blocks) == shapes:
        return blocks
    middle = len(blocks) // 2
    return _running(traced, blocks[:middle], shapes) + _running(traced, blocks[middle:], shapes) if middle else []


def resolve_drop(teacher: nn.Module, example: Any, blocks: Iterable[Block], names: Sequence[str]) -> list[list[str]]:
    """Work out which modules are replaced when blocks or modules are dropped by name.

    Args:
        teacher: the network.
        example: a tensor, a tuple of arguments, or (args, kwargs).
        blocks: the network's blocks.
        names: names of blocks, or of modules that are to return what they are given.

    Returns:
        [module, what takes its place] for each, as `cut.drop_modules` reads it.

    Raises:
        InputError: a name is neither, a block is pinned, or a module returns another shape than it is given.
    """
    known = {b.name: b for b in blocks if b.name}
    dropped: dict[str, str] = {}
    for name in names:
        block = known.get(name)
        if block is not None and block.pinned is None:
            dropped |= dict(block.dropped_modules)
            continue
        if name and name in dict(teacher.named_modules()):
            _check_shape(teacher, example, name, block)
            dropped[name] = THROUGH
            continue
        if block is not None:
            raise InputError(f"dropping block {name!r}: {block.pinned}")
        drop_modules(structural_copy(teacher), [(name, THROUGH)])  # says what is wrong with the name
    return _outermost(dropped)


def _outermost(dropped: dict[str, str]) -> list[list[str]]:
    """Without the modules that lie inside others that are dropped."""
    return [[m, how] for m, how in dropped.items() if not any(m.startswith(f"{other}.") for other in dropped)]


def _check_shape(teacher: nn.Module, example: Any, name: str, block: Block | None) -> None:
    """Raises: InputError where a module does not return one tensor of the shape of the one that it is given."""
    args, kwargs = as_example(example)
    seen: list[tuple[Any, Any]] = []

    def hook(_: nn.Module, given: tuple, result: Any) -> None:
        seen.append(
            (
                tuple(given[0].shape) if len(given) == 1 and isinstance(given[0], torch.Tensor) else None,
                tuple(result.shape) if isinstance(result, torch.Tensor) else None,
            )
        )

    handle = teacher.get_submodule(name).register_forward_hook(hook)
    try:
        with evaluating(teacher):
            teacher(*args, **kwargs)
    finally:
        handle.remove()
    given, result = seen[-1] if seen else (None, None)
    if given is None or given != result:
        raise InputError(
            f"dropping block {name!r}: it takes {given or 'no single tensor'} and returns "
            f"{result or 'no single tensor'}; expected one tensor in and one of the same shape out"
            + (f" ({block.pinned})" if block is not None and block.pinned else "")
            + "; `mimicut inspect` lists the blocks that can be dropped"
        )


def _pairs(traced: Traced) -> list[tuple[Node, Node, frozenset[Node]]]:
    """(fork, addition, nodes between them).

    The fork is the immediate dominator of the addition in the data flow: the last node that every path from the input
    to the addition passes.
    """
    flow = traced.flow()
    reached = networkx.descendants(flow, "in") | {"in"}
    flow.remove_nodes_from([n for n in list(flow) if n not in reached])
    above = networkx.immediate_dominators(flow, "in")
    found = []
    for node in traced.nodes:
        if operator(node) != "add" or node not in above:
            continue
        sides = [a for a in node.args[:2] if isinstance(a, Node) and a in above and shape(a) == shape(node)]
        fork = above[node]
        if len(sides) == 2 and isinstance(fork, Node):
            found.append((fork, node, frozenset(_between(flow, fork, node))))
    return found


def _between(flow: networkx.DiGraph, fork: Node, add: Node) -> set[Node]:
    """The nodes between `fork` and `add`. As the fork dominates, every way up from the addition ends there."""
    found, todo = set(), [add]
    while todo:
        for source in flow.predecessors(todo.pop()):
            if source != fork and source not in found and isinstance(source, Node):
                found.add(source)
                todo.append(source)
    return found


def _groups_at(anatomy: Anatomy, node: Node) -> tuple[str, ...]:
    found = (anatomy.units(ids) for ids in anatomy.axes[node] or [] if ids is not None)
    return tuple(sorted({u[0] for units in found for u in units if u is not None}))


def _names(traced: Traced, found: list[tuple[Node, Node, frozenset[Node]]]) -> list[str]:
    """A name for each pair: the innermost module around it; where one module holds several pairs, the one around each
    pair's layers; where that is the network itself, the module of the last layer."""
    around = [_around(traced, [*nodes, add]) for _, add, nodes in found]
    several, order = Counter(around), {node: place for place, node in enumerate(traced.nodes)}
    for place, (_, _, nodes) in enumerate(found):
        layers = [n for n in nodes if macs(n) is not None]
        if layers and (several[around[place]] > 1 or not around[place]):
            last = max(layers, key=order.get)
            around[place] = _around(traced, layers) or traced.where(last)
    seen: Counter = Counter()
    for place, name in enumerate(around):
        seen[name] += 1
        around[place] = f"{name}#{seen[name]}" if seen[name] > 1 else name
    return around


def _around(traced: Traced, nodes: list[Node]) -> str:
    """The innermost module call that holds all of `nodes`."""
    common = list(traced.calls[nodes[0]])
    for node in nodes[1:]:
        calls = traced.calls.get(node, ())
        common = [c for c in common if c in calls]
    return common[-1].module if common else ""


def _returns(traced: Traced) -> dict[str, str]:
    """Module -> what a stand-in has to return, as `stand_ins.stand_in` reads it: "" for a tensor, ":2" for a tuple of
    two that begins with one. Only modules that take a tensor are listed."""

    def run(model: nn.Module, args: tuple, kwargs: dict) -> dict[str, str]:
        found: dict[str, set[str]] = {}

        def note(name: str) -> Any:
            def hook(_: nn.Module, given: tuple, named: dict, result: Any) -> None:
                kind = "" if isinstance(result, torch.Tensor) else None
                if isinstance(result, (tuple, list)) and result and isinstance(result[0], torch.Tensor):
                    kind = f":{len(result)}"
                takes = any(isinstance(v, torch.Tensor) for v in (*given, *named.values()))
                found.setdefault(name, set()).add(kind if takes else None)

            return hook

        handles = [
            module.register_forward_hook(note(name), with_kwargs=True)
            for name, module in model.named_modules()
            if name and not isinstance(module, torch.jit.ScriptModule)
        ]
        try:
            with torch.no_grad():
                model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return {name: next(iter(kinds)) for name, kinds in found.items() if len(kinds) == 1 and None not in kinds}

    return run_for_shapes(traced.model, traced.example, run)


def _with_dropped_modules(traced: Traced, block: Block, fork: Node, returns: dict[str, str]) -> Block:
    """`block` with the modules by which it is dropped, or why it cannot be."""
    if not block.identity:
        return replace(block, pinned="its shortcut is computed too, so that nothing else carries the stream on")
    add = block.add
    end = next((a for a in add.args[:2] if a is not fork), fork)
    branch = _only_for(end, add) if end in block.nodes else frozenset()
    if not any(macs(n) is not None for n in branch):
        return replace(block, pinned="no layer of it serves this addition alone")
    if add.kwargs:
        return replace(block, pinned="its addition scales what it adds")
    whole = _whole(traced, fork, add, block.nodes, returns)
    if whole is not None:
        return replace(block, branch_end=end, branch=branch, dropped_modules=((whole, THROUGH),))
    inside = _own_modules(traced, branch, returns)
    loose = [n for n in traced.nodes if n in branch and n not in inside]
    if any(macs(n) is not None for n in loose):
        where = traced.where(next(n for n in loose if macs(n) is not None))
        return replace(block, pinned=f"the code of {where} computes layers itself, beside its modules")
    dropped = dict.fromkeys(inside.values(), THROUGH)
    for module in (next(iter(dropped)), list(dropped)[-1]):  # the last one too where the code between changes zeros
        dropped[module] = ZERO
        if _gives_zeros(traced, branch, end, inside, dropped):
            modules = tuple((m, how + returns[m]) for m, how in dropped.items())
            return replace(block, branch_end=end, branch=branch, dropped_modules=modules)
    return replace(block, pinned=f"the code of {traced.where(end)} makes other values from zeros ({operator(end)})")


def _gives_zeros(
    traced: Traced, branch: frozenset[Node], end: Node, inside: dict[Node, str], dropped: dict[str, str]
) -> bool:
    """Whether `end` is zero, as far as the operators between the dropped modules show."""
    zeros: set[Node] = set()
    for node in (n for n in traced.nodes if n in branch):
        if node in inside:
            zero = dropped[inside[node]] == ZERO or any(source in zeros for source in node.all_input_nodes)
        elif operator(node) in _PRODUCTS:
            zero = any(source in zeros for source in node.all_input_nodes)
        else:
            zero = operator(node) in _KEEP_ZERO and bool(node.args) and node.args[0] in zeros
        if zero:
            zeros.add(node)
    return end in zeros


def _only_for(end: Node, add: Node) -> frozenset[Node]:
    """The operators that are computed for `end` alone; none where not only `add` takes `end`."""
    if set(end.users) != {add}:
        return frozenset()
    found = {end}
    for node in reversed(list(end.graph.nodes)):
        if node.op == "call_function" and node.users and all(u in found for u in node.users):
            found.add(node)
    return frozenset(found)


def _whole(traced: Traced, fork: Node, add: Node, nodes: frozenset[Node], returns: dict[str, str]) -> str | None:
    """The module that computes this block alone, and returns what it was given when the branch adds zeros."""
    name = _around(traced, [*nodes, add])
    if returns.get(name) != "":
        return None
    mine = [n for n in traced.nodes if any(c.module == name for c in traced.calls[n])]
    if len({c for n in mine for c in traced.calls[n] if c.module == name}) != 1:
        return None
    after = [n for n in mine if n not in nodes and n is not add]
    value = add
    for node in after:
        if operator(node) not in _IDEMPOTENT or node.all_input_nodes != [value] or not _in_range(fork, node):
            return None
        value = node
    inside = set(mine)
    if fork in inside or any(u not in inside and n is not value for n in mine for u in n.users):
        return None
    outer = {s for n in mine for s in n.all_input_nodes if s not in inside and s not in traced.tensors}
    return name if outer == {fork} else None


def _in_range(fork: Node, activation: Node) -> bool:
    """Whether `fork` is the result of the same activation, so that applying it again changes nothing."""
    while operator(fork) in _KEEP_RANGE and isinstance(fork.args[0], Node):
        fork = fork.args[0]
    same = operator(fork) == operator(activation) and fork.args[1:] == activation.args[1:]
    return same and fork.kwargs == activation.kwargs


def _own_modules(traced: Traced, branch: frozenset[Node], returns: dict[str, str]) -> dict[Node, str]:
    """Node of `branch` -> the outermost module around it that runs nothing outside the branch."""
    holds: dict[str, set[Node]] = {}
    for node in traced.nodes:
        for call in traced.calls[node]:
            holds.setdefault(call.module, set()).add(node)
    found = {}
    for node in traced.nodes:
        if node in branch:
            tops = [c.module for c in traced.calls[node] if c.module in returns and holds[c.module] <= branch]
            if tops:
                found[node] = tops[0]
    return found


def _output_shapes(traced: Traced, blocks: Sequence[Block]) -> dict[str, tuple[int, ...]] | None:
    """The shapes that the network returns without these blocks, part by part; None where it does not run."""
    top = _outermost({m: how for b in blocks for m, how in b.dropped_modules})

    def run(model: nn.Module, args: tuple, kwargs: dict) -> dict[str, tuple[int, ...]]:
        with torch.no_grad():
            output = drop_modules(model, top)(*args, **kwargs)
        return {part: tuple(tensor.shape) for part, tensor in tensors(output)}

    try:
        return run_for_shapes(traced.model, traced.example, run)
    except Exception:  # whatever its code raises
        return None

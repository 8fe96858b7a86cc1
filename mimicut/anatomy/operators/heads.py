"""A look ahead from a reshape: which of its axes a later product is batched over, such as attention heads."""

from collections.abc import Iterator

import numpy as np
from torch.fx import Node

from mimicut.anatomy.operators.rule_interface import argument
from mimicut.anatomy.tracing import operator, shape

_MAX_STEPS = 200  # of a look ahead; an attention is a few dozen operators
_PRODUCTS = ("matmul", "bmm", "baddbmm", "scaled_dot_product_attention")


def batched_later(node: Node, axis: int) -> bool:
    """Whether `axis` of what `node` returns is one that a later product is batched over, such as attention heads."""
    todo, seen = [(node, axis)], set()
    while todo and len(seen) < _MAX_STEPS:
        value, axis = todo.pop()
        if (value, axis) in seen:
            continue
        seen.add((value, axis))
        for user in value.users:
            name = operator(user) if user.op == "call_function" else ""
            if name in _PRODUCTS:
                if value in user.args[:3] and axis < len(shape(value)) - 2:
                    return True
            elif name == "einsum":
                given, _, out = user.args[0].replace(" ", "").partition("->")
                terms = given.split(",")
                place = list(user.args[1]).index(value)
                letter = terms[place][axis] if "." not in given else ""
                if letter and letter in out and all(letter in term for term in terms):
                    return True
            else:
                todo += [(user, to) for to in _moved(user, value, axis)]
    return False


def _moved(user: Node, value: Node, axis: int) -> Iterator[int]:
    """Where `axis` of `value` stands in what `user` returns; nowhere if it is used up, or that is not known."""
    name, before, after = operator(user) if user.op == "call_function" else "", shape(value), shape(user)
    if name == "getitem" and before is None:
        yield axis
    elif name == "permute":
        yield [d % len(before) for d in user.args[1]].index(axis)
    elif name in ("transpose", "swapaxes", "swapdims", "mT"):
        a, b = (d % len(before) for d in (user.args[1:3] or (-2, -1)))
        yield {a: b, b: a}.get(axis, axis)
    elif name in ("unbind", "select"):
        dim = argument(user, 1, "dim", 0) % len(before)
        if dim != axis:
            yield axis - (axis > dim)
    elif name == "unsqueeze":
        yield axis + (axis >= user.args[1] % len(after))
    elif name in ("chunk", "split", "split_with_sizes"):
        yield axis
    elif name in ("view", "reshape", "flatten", "unflatten"):
        yield from _reshaped(before, after, axis)
    elif name == "linear" and axis == len(before) - 1:
        return
    elif after is not None and before is not None and len(after) == len(before):
        if after[axis] == before[axis] or name in ("cat", "slice", "repeat_interleave"):
            yield axis
    elif after is not None and before is not None and len(after) > len(before):
        yield axis + len(after) - len(before)


def _reshaped(before: tuple[int, ...], after: tuple[int, ...], axis: int) -> Iterator[int]:
    """The axes of `after` whose positions hold `axis` of `before` as a whole, alone or with the axes inside it."""
    inner = int(np.prod(before[axis + 1 :]))
    for place, size in enumerate(after):
        own = int(np.prod(after[place + 1 :]))
        if inner % own == 0 and own * size % (inner * before[axis]) == 0:
            yield place

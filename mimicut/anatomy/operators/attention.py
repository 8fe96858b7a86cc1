"""The rule for scaled dot-product attention.

Heads are cut whole: a head is a block of channels that a reshape sets apart and a batched product keeps apart.
"""

from torch.fx import Node

from mimicut.anatomy.channels import Axes
from mimicut.anatomy.operators.rule_interface import Reader, Rule, argument, foresee, why
from mimicut.anatomy.tracing import shape


def scaled_dot_product_attention(reader: Reader, node: Node) -> Axes:
    """softmax(q k^T scale) v for q (..., T, D), k (..., S, D), v (..., S, E), batched over images and heads.

    Without a scale of its own it divides by the root of a head's width D, which is pinned then.
    """
    query, key, value = (reader.axes(a) for a in node.args[:3])
    foresee(len(query) == len(key) == len(value), "queries, keys and values of as many axes")
    unread = why(reader, node, "attends with a tensor that could not be followed")
    if node.kwargs.get("scale") is None:
        for ids in (query[-1], key[-1]):
            reader.channels.pin(ids, why(reader, node, "attention is scaled by the width of a head"))
    reader.channels.join(query[-1], key[-1], unread)
    for ids in (key[-2], value[-2]):
        reader.channels.pin(ids, why(reader, node, "a softmax runs over its channels"))
    batch: Axes = []
    for axis in range(len(query) - 2):
        ids = query[axis]
        for other, source in ((key, node.args[1]), (value, node.args[2])):
            if shape(source)[axis] == 1:
                continue  # the same for all heads
            if shape(source)[axis] == shape(node)[axis]:
                ids = reader.channels.join(ids, other[axis], unread)
            elif other[axis] is not None and ids is not None:  # grouped-query: several queries share a key
                shared = reader.channels.join_rows(ids.reshape(shape(source)[axis], -1))
                reader.channels.join(shared, other[axis], unread)
            else:
                reader.channels.join(ids, other[axis], unread)
        batch.append(ids)
    mask = argument(node, 3, "attn_mask")
    if isinstance(mask, Node):
        axes, size = reader.axes(mask), shape(mask)
        for axis in range(len(axes)):
            at = axis - len(axes) + len(query)
            if at < len(batch) and size[axis] == shape(node)[at] > 1:
                reader.channels.join(batch[at], axes[axis], unread)
            elif at >= len(batch):
                reader.channels.pin(axes[axis], unread)
    return [*batch, query[-2], value[-1]]


RULES: dict[str, Rule] = {"scaled_dot_product_attention": scaled_dot_product_attention}

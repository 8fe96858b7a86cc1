"""Memory of a pass, read from the operator graph, in bytes for one image in float32; and whether a run fits into what
there is, checked before the work begins.

These are estimates: what an operator needs for itself while it runs is not counted, and autograd is assumed to keep all
that the operators return.
"""

import math

from torch.fx import Node

from mimicut.anatomy.graph import Anatomy
from mimicut.anatomy.tracing import Traced, operator, shape
from mimicut.base import memory
from mimicut.base.errors import InputError
from mimicut.base.guard import named_tensors

# They return memory that they were given.
_VIEWS = frozenset(
    """alias view reshape flatten permute transpose t slice select narrow unsqueeze squeeze expand expand_as detach
    split chunk unbind getitem movedim unflatten dropout""".split()
)
_MOST_IMAGES = 64  # images of a pass that only measures. Source: as in `verify`.
# Sets of tensors as large as the teacher's while the student mimics: the teacher's copy in the layout of the run, the
# student, its gradients, the optimiser's momentum, what to put back on an error, the best so far.
_SETS = 6
_MARGIN = 1.1  # Source: assumption.


def held_bytes(traced: Traced) -> int:
    """The most that a pass without gradients holds at once.

    A value is held from the operator that makes it to the last one that uses it, or uses a view of it.

    Returns:
        Bytes for one image.
    """
    order = {node: i for i, node in enumerate(traced.nodes)}
    ends: dict[Node, int] = {}
    for node in reversed([*traced.inputs, *traced.nodes]):
        users = [ends[u] if _shares(u) else order[u] for u in node.users if u in order]
        ends[node] = max(users, default=len(order) if node in traced.outputs else order.get(node, 0))
    alive = most = 0
    freed: dict[int, int] = {}  # place of an operator -> bytes that are free after it
    for node in [*traced.inputs, *traced.nodes]:
        alive += _bytes(node)
        freed[ends[node]] = freed.get(ends[node], 0) + _bytes(node)
        most = max(most, alive)
        alive -= freed.pop(order.get(node, -1), 0)
    return most // traced.batch


def made_bytes(traced: Traced) -> int:
    """All that the operators of a pass return, in bytes for one image: no less than what autograd keeps."""
    return sum(map(_bytes, traced.nodes)) // traced.batch


def _bytes(node: Node) -> int:
    size = shape(node)
    return 0 if size is None or _shares(node) else 4 * math.prod(size)


def _shares(node: Node) -> bool:
    """Whether it returns memory that it was given: a view, or what it has changed in place."""
    schema = getattr(node.target, "_schema", None)
    return operator(node) in _VIEWS or (schema is not None and schema.name.endswith("_"))


def images_within(anatomy: Anatomy, room: float) -> int:
    """How many images a pass of teacher and student that only measures may have.

    Args:
        anatomy: of the teacher.
        room: bytes that the pass may hold.

    Returns:
        A number of images from 1 to 64.
    """
    return max(1, min(_MOST_IMAGES, int(room / (2 * max(1, held_bytes(anatomy.traced))))))


def check_memory(anatomy: Anatomy, most: int, *, asked: bool, passes: int = 0) -> None:
    """Check that a run of a network fits into memory.

    Args:
        anatomy: of the teacher.
        most: bytes of resident memory that the run may take.
        asked: the user gave that bound.
        passes: bytes that a stage of passes holds at the least; it may take `memory.PASSES` of the bound.

    Raises:
        InputError: the run needs more.
    """
    traced = anatomy.traced
    weights = sum(t.nbytes for t in {id(t): t for t in named_tensors(traced.model).values()}.values())
    held, made = held_bytes(traced), made_bytes(traced)
    cut_check = 4 * weights + 2 * 2 * traced.batch * held  # two networks in float64, twice the size
    work = max(_SETS * weights + made + held, cut_check)
    need = int(max(_MARGIN * ((memory.resident() or 0) + work), passes / memory.PASSES))
    if need > most:
        said = "max_memory is" if asked else "by default (4 GB, or half of what is free) a run takes"
        raise InputError(
            f"looking for memory: a run of {type(traced.model).__name__}, whose tensors take "
            f"{memory.size_text(weights)}, needs about {memory.size_text(need)}, and {said} {memory.size_text(most)}; "
            "give it more (--max-memory "
            f"{math.ceil(need / 1e8) / 10:g}G), on a machine that has it, or smaller images (--input-size)"
        )

"""Several passes of several networks side by side, halted at the same layers, so that each can be solved in between.

Every pass runs in a thread of its own, and only one of them runs at a time, in a fixed order: so this works for any
code that a network consists of, each network computes every image once, and the same run gives the same numbers.
"""

import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mimicut.base.guard import named_tensors, structural_copy
from mimicut.base.memory import Slack
from mimicut.recovery.batches import Batch, copied


@dataclass
class Seen:
    """What one pass has at a halt.

    args, kwargs: of the torch function that is given the weight. output: what it returned, where the network halts
    after it. held: what was to be kept: (weight, "input" or "output") -> tensor.
    """

    function: Callable[..., Any]
    args: tuple
    kwargs: dict[str, Any]
    output: Any
    held: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    @property
    def input(self) -> Tensor:
        return self.args[0] if self.args else self.kwargs["input"]


# The functions that compute with a weight; other functions take one too (`x.to(weight)`, `weight.abs()`).
_FUNCTIONS = frozenset(["conv1d", "conv2d", "conv3d", "linear", "batch_norm", "layer_norm", "group_norm"])

# Functions of which oneDNN and MKL keep working memory for every thread that ever called one, for as long as it lives.
_WITH_BUFFERS = frozenset(
    ["conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear", "matmul", "bmm", "scaled_dot_product_attention"]
)


class Watch(TorchFunctionMode):
    """Calls `before(name, seen)` and `after(name, seen)` around torch functions that are given certain tensors.

    Args:
        names: id of a tensor -> its name (`ids_of`).
        before: Called before the function.
        after: Called after it; it may replace `seen.output`.
        run: Calls the functions in _WITH_BUFFERS in place of this thread.
    """

    def __init__(
        self,
        names: Mapping[int, str],
        before: Callable[[str, Seen], None] | None = None,
        after: Callable[[str, Seen], None] | None = None,
        run: Callable[[Callable[..., Any], tuple, dict[str, Any]], Any] | None = None,
    ):
        self._names, self._before, self._after, self._run = names, before, after, run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = None
        if getattr(func, "__name__", "") in _FUNCTIONS and (args or "input" in kwargs):
            name = next((self._names[id(a)] for a in (*args[1:], *kwargs.values()) if id(a) in self._names), None)
        seen = Seen(func, args, kwargs, None)
        if name is not None and self._before:
            self._before(name, seen)
        run = self._run if getattr(func, "__name__", "") in _WITH_BUFFERS else None
        found = func(*args, **kwargs) if run is None else run(func, args, kwargs)
        if name is None:
            return found
        seen.output = found
        if self._after:
            self._after(name, seen)
        return seen.output


def ids_of(model: nn.Module, names: Sequence[str]) -> dict[int, str]:
    """id of a tensor -> the name in `names`."""
    tensors = named_tensors(model)
    return {id(tensors[name]): name for name in names}


class _Stopped(BaseException):
    """Unwinds a pass that nobody needs any more; no `except Exception` of the network's code stops it."""


class _Pass:
    """One forward pass in a thread of its own, which runs only while another thread waits in `advance`."""

    def __init__(self, forward: Callable[["_Pass"], None]):
        self._forward, self._turn, self._back = forward, threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._ending = self._done = False
        self._at: tuple[str, Seen] | None = None
        self._asked: Callable[[], Any] | None = None
        self._answer: Any = None
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._turn.acquire()
        try:
            if not self._ending:
                self._forward(self)
        except _Stopped:
            pass
        except BaseException as error:
            self._error = error
        self._done, self._at = True, None
        self._back.release()

    def halt(self, name: str, seen: Seen) -> None:
        self._at = name, seen
        self._back.release()
        self._turn.acquire()
        if self._ending:
            raise _Stopped

    def call(self, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """What `func` returns or raises, called by the thread that waits in `advance`."""
        device = args[0].device.type if args and isinstance(args[0], Tensor) else "cpu"
        nested = torch._C._functorch.peek_interpreter_stack() is not None
        if torch.is_autocast_enabled(device) or torch.is_grad_enabled() or nested:
            return func(*args, **kwargs)  # in a state that is this thread's alone
        self._asked = partial(func, *args, **kwargs)
        self._back.release()
        self._turn.acquire()
        if self._ending:
            raise _Stopped
        (answer, failure), self._answer, self._failure = (self._answer, self._failure), None, None
        if failure is not None:
            raise failure
        return answer

    def advance(self) -> tuple[str, Seen] | None:
        """Run to the next halt and return it; None at the end of the pass. Raises: what the network raised."""
        self._at = None
        self._turn.release()
        self._back.acquire()
        while self._asked is not None:
            asked, self._asked = self._asked, None
            try:
                with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                    self._answer = asked()
            except BaseException as error:
                self._failure = error
            del asked
            self._turn.release()
            self._back.acquire()
        if self._error is not None:
            raise self._error
        return self._at

    def end(self) -> None:
        self._ending = True
        while not self._done:
            self._turn.release()
            self._back.acquire()
        self._thread.join()


def _advance(each: _Pass, slack: Slack, halts: int = 1) -> tuple[str, Seen] | None:
    """Advance a pass by so many halts. Every thread's arena keeps what its pass frees, as much again as is held if
    nobody returns it."""
    found = None
    for _ in range(halts):
        found = each.advance()
        slack.trim()
        if found is None:
            break
    return found


def lockstep(
    networks: Sequence[tuple[nn.Module, str]],
    batches: Iterable[Batch],
    halts: Sequence[str],
    kept: Mapping[str, set],
    taking_part: Sequence[int] | None = None,
) -> Generator[tuple[str, list[list[Seen]]], None, None]:
    """Yield, at each of `halts`, (name, for each network what each batch sees there); continuing advances all passes.

    Every halt comes once. Without gradients, in the mode that the networks are in.

    Args:
        networks: Each with "before" or "after", where it halts: before or after the function that is given the weight.
        batches: The last network may write into them, others are given copies.
        halts: Names of the weights, in the order in which they run.
        kept: Halt -> (weight, "input" | "output") that passes must still have there, seen before.
        taking_part: How many of the batches there are at each of the halts, never fewer than at the one before; by
            default all. A later one is taken from `batches` only then.

    Raises:
        RuntimeError: The passes do not halt at the same places. And what a network raises.
    """
    forwards = _Forwards(halts, kept)
    source, slack = iter(batches), Slack()
    passes: list[list[_Pass]] = [[] for _ in networks]
    try:
        for number, _ in enumerate(halts):  # after the last of them nothing is computed
            at = [[_advance(each, slack) for each in row] for row in passes]
            for batch in islice(source, None if taking_part is None else taking_part[number] - len(passes[0])):
                for place, (row, (model, when)) in enumerate(zip(passes, networks, strict=True)):
                    row.append(_Pass(forwards.of(model, when, batch, copies=place < len(networks) - 1)))
                    at[place].append(_advance(row[-1], slack, number + 1))
                batch = None  # type: ignore[assignment]  # let go of
            names = {found and found[0] for row in at for found in row}
            if len(names) != 1:
                raise RuntimeError(f"the passes halt at different places: {', '.join(sorted(map(str, names)))}")
            name = names.pop()
            if name is None:
                return
            seen = [[found[1] for found in row if found is not None] for row in at]
            del at
            yield name, seen
            del seen
    finally:
        for each in chain.from_iterable(passes):
            each.end()


class _Forwards:
    """Makes the forward passes that halt, each with what it must still have at a halt."""

    def __init__(self, halts: Sequence[str], kept: Mapping[str, set]):
        self._halting = set(halts)
        self._wanted = {key for keys in kept.values() for key in keys}
        self._last_halt = {key: name for name in halts for key in kept.get(name, ())}
        self._watched = [*dict.fromkeys([*halts, *(name for name, _ in self._wanted)])]

    def of(self, model: nn.Module, when: str, batch: Batch | None, *, copies: bool) -> Callable[[_Pass], None]:
        """A forward pass of `batch`, or of a copy of it, that halts "before" or "after" each layer."""

        def run(own: _Pass) -> None:
            nonlocal batch
            held: dict[tuple[str, str], Tensor] = {}

            def halt(name: str, seen: Seen) -> None:
                seen.held = held
                own.halt(name, seen)
                seen.held = {}
                for key in [k for k in held if self._last_halt[k] == name]:
                    del held[key]

            def before(name: str, seen: Seen) -> None:
                if (name, "input") in self._wanted:
                    held[name, "input"] = seen.input
                if name in self._halting and when == "before":
                    halt(name, seen)

            def after(name: str, seen: Seen) -> None:
                if (name, "output") in self._wanted:
                    held[name, "output"] = seen.output
                if name in self._halting and when == "after":
                    halt(name, seen)

            assert batch is not None  # it runs once
            # What a network keeps on its modules, or writes into its input, is this pass's alone.
            network, (args, kwargs) = structural_copy(model), copied(batch) if copies else batch
            batch = None  # not held any longer than the network itself holds it
            with torch.no_grad(), Watch(ids_of(network, self._watched), before, after, own.call):
                network(*args, **kwargs)

        return run

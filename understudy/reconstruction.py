"""What the few images say of every channel: how much worse the features become without it, after the best repair.

Of each layer that reads a group the second moments of its inputs and how strongly its output acts on the seam; then the
units are taken away one after the other, each time the one whose loss the others can best make good. Unlike `score`, it
needs images, and its figures can be compared from group to group.
Source: the elimination is that of the Optimal Brain Surgeon (Hassibi and Stork, 1992), with whole channels as in ZipLM
(Kurtic et al., arXiv 2302.04089); the weighting by gradients at the seam is measured here (docs/LOG.md).
"""

import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from understudy import guard
from understudy.graph import Anatomy, Group
from understudy.recover.batches import Batch, Source, copied
from understudy.recover.closed_form import (
    MOST_INPUTS,
    affordable,
    batches_of,
    seconds_of,
    seen_through,
    view_seconds,
    views_for,
)
from understudy.recover.layers import channels_last, columns, geometry, layers
from understudy.recover.lockstep import Seen, Watch, ids_of
from understudy.score import Evidence
from understudy.seam import Capture, capturing

_RIDGE = 1e-3  # in units of the mean squared input. Source: GRAIL's (CPAL 2026), as read in its code.
# Inputs x kernel up to which a layer's inputs are told apart by their place in the kernel; above it one repair serves
# all places. Source: assumption, for time.
_WITH_KERNEL = 1200
_POSITIONS = 64  # of a view, of which second moments are taken. Source: assumption.
# Of the views, those of which gradients are taken: a quarter, but so many. Source: assumption.
_LEAST_GRADIENT_VIEWS = 32
_GRADIENT_BATCH = 16
_A_LAYER = 0.2  # seconds of a layer whatever its size, to tell how long it will take. Source: as in closed_form.
# Units taken away at once: this share of those that are left. Source: assumption, for time; one by one below 64.
_AT_ONCE = 64


def reconstruction(
    teacher: nn.Module,
    anatomy: Anatomy,
    few: Source | Tensor,
    *,
    views: str = "none",
    mixing: str = "mixup",
    seed: int = 0,
    max_seconds: float | None = None,
    on_expected: Callable[[float], None] | None = None,
) -> Evidence:
    """What the images say of every group that can be cut.

    few, views, mixing: as for `closed_form`. max_seconds: groups that have not had their turn by then are without
    evidence. on_expected(seconds): told before the work how long it will take, about. The teacher comes back as it was.
    Raises: InputError for images that do not fit.
    """
    started = time.perf_counter()

    def late() -> bool:
        return max_seconds is not None and time.perf_counter() - started >= max_seconds

    found = {layer.weight for layer in layers(anatomy)}
    reads: dict[str, list[tuple[str, np.ndarray]]] = {}
    for group in anatomy.groups.values():
        members = [
            (m.tensor, m.units)
            for m in group.members
            if m.dim == 1 and m.tensor in found and len(m.units) <= MOST_INPUTS
        ]
        if group.pinned is None and members and group.width > 1:
            reads[group.name] = members
    names = list(dict.fromkeys(name for members in reads.values() for name, _ in members))
    if not names:
        return Evidence({}, {})
    lead = seen_through(teacher)
    views_made = max(1, affordable(anatomy, []) // 2)
    if on_expected or max_seconds is not None:
        a_view = view_seconds(teacher, few, views)
        cubes = sum(guard.named_tensors(lead)[name][0].numel() ** 3 for name in names)
        expected = 2 * views_made * a_view + seconds_of(cubes, anatomy, a_view) + _A_LAYER * len(names)
        if max_seconds is not None:
            expected, views_made = min(expected, max_seconds), min(views_made, views_for(max_seconds, a_view))
        if on_expected:
            on_expected(expected)
        if not views_made:
            return Evidence({}, {})
    batches, _, _ = batches_of(few, lead, views, mixing, seed, 1, views_made)
    with guard.seeded(seed), guard.evaluating(teacher), guard.evaluating(lead):
        moments, force = _listen(lead, anatomy, names, batches, seed, late)
    tensors = guard.named_tensors(lead)
    scores, errors = {}, {}
    for name, members in reads.items():
        read = [(n, units) for n, units in members if n in moments]
        if read and not late():
            scores[name], errors[name] = _eliminate(anatomy.groups[name], read, tensors, moments, force)
    return Evidence(scores, errors)


def _listen(
    lead: nn.Module, anatomy: Anatomy, names: list[str], batches: list[Batch], seed: int, late: Callable[[], bool]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """weight -> second moments of its inputs (channels x kernel, or channels), and the squared gradient of the features
    at each output, summed over positions, over the teacher's squared deviation (outputs,). Layers of several groups are
    left out. late(): whether the views that are left are one too many."""
    tensors = guard.named_tensors(lead)
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    energy: dict[str, Tensor] = {}
    draws = torch.Generator().manual_seed(seed)

    def note(name: str, seen: Seen) -> None:
        weight = tensors[name]
        how = geometry(seen, weight)
        spatial = len(how.kernel)
        if how.groups > 1:
            return

        def positions(total: int) -> Tensor:
            return torch.randperm(total, generator=draws)[:_POSITIONS]

        if weight[0].numel() <= _WITH_KERNEL:
            x = columns(seen.input.detach(), how, positions, tuple(seen.output.shape[2:]))[:, :, 0]
        else:
            x = channels_last(seen.input.detach(), spatial)
            x = x[:, positions(x.shape[1]).to(x.device)]
        x = x.flatten(0, 1).double()
        sums[name] = sums.get(name, 0) + x.T @ x
        rows[name] = rows.get(name, 0) + len(x)
        if seen.output.requires_grad:
            seen.output.register_hook(lambda grad: weigh(name, channels_last(grad, spatial)))

    def weigh(name: str, grad: Tensor) -> None:
        energy[name] = energy.get(name, 0) + grad.double().square().sum((0, 1))

    ids = ids_of(lead, names)
    parts = [part for args, kwargs in batches for part in _parts(args, kwargs)]
    some = parts[: max(len(parts) // 4, -(-_LEAST_GRADIENT_VIEWS // _GRADIENT_BATCH))]
    with capturing(lead, anatomy.seam) as capture:
        units = _spread(capture, some)
        for number, (args, kwargs) in enumerate(parts):
            if number and late():
                break
            if number >= len(some):
                with Watch(ids, after=note):
                    capture.features(*args, **kwargs)
                continue
            images = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.is_floating_point()]
            with torch.enable_grad():
                for image in images:
                    image.requires_grad_(True)
                given, named = copied((args, kwargs))
                with Watch(ids, after=note):
                    feats = capture.features(*given, **named)
                noise = [torch.randn(f.shape, generator=draws).to(f) for f in feats]
                total = sum((f * n).sum() / u**0.5 for f, n, u in zip(feats, noise, units, strict=True))
                if total.requires_grad:
                    torch.autograd.grad(total, images, allow_unused=True)
                del feats, total
    return {name: total / rows[name] for name, total in sums.items() if name in energy}, energy


def _spread(capture: Capture, parts: list[Batch]) -> list[float]:
    """The teacher's squared deviation from its mean feature, at each point, over the views in `parts`."""
    sums, squares, views = [], [], 0
    for args, kwargs in parts:
        feats = [f.double() for f in capture.features(*args, **kwargs)]
        views += len(feats[0])
        sums = [f.sum(0) + (sums[i] if sums else 0.0) for i, f in enumerate(feats)]
        squares = [f.square().sum().item() + (squares[i] if squares else 0.0) for i, f in enumerate(feats)]
    spread = [s - t.square().sum().item() / views for t, s in zip(sums, squares, strict=True)]
    return [d if d > 1e-9 * s else max(s, 1e-30) for d, s in zip(spread, squares, strict=True)]


def _parts(args: tuple, kwargs: dict) -> list[Batch]:
    """A batch in parts that leave memory for gradients; copies, since they are to be differentiated by."""
    whole = next(len(t) for t in (*args, *kwargs.values()) if isinstance(t, Tensor))

    def part(value: object, at: slice) -> object:
        return value[at].clone() if isinstance(value, Tensor) and value.ndim and len(value) == whole else value

    cuts = [slice(i, i + _GRADIENT_BATCH) for i in range(0, whole, _GRADIENT_BATCH)]
    return [(tuple(part(a, at) for a in args), {k: part(v, at) for k, v in kwargs.items()}) for at in cuts]


def _eliminate(
    group: Group,
    read: list[tuple[str, np.ndarray]],
    tensors: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    force: Mapping[str, Tensor],
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and errors of one group.

    Of each layer only two matrices are needed: the inverse of its moments, H, and what its weights do, A = W'SW with
    the outputs weighted by S. Taking unit b away costs the trace of A_bb inv(H_bb), and changes both.
    """
    layers_of = []
    for name, units in read:
        gram = moments[name]
        weight = tensors[name].detach().to(gram)
        channels = weight.shape[1]
        taps = weight[0, 0].numel() if len(gram) > channels else 1  # told apart by their place in the kernel or not
        acts = _acting(weight, force[name].to(gram), taps > 1)
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        inverse = torch.linalg.inv(gram + _RIDGE * gram.diagonal().mean().clamp_min(1e-300) * eye)
        tap = np.arange(taps)
        at = [
            torch.from_numpy((np.flatnonzero(units == u)[:, None] * taps + tap).ravel()).to(gram.device)
            for u in range(group.width)
        ]
        layers_of.append((acts, inverse, at))
    alive = list(range(group.width))
    scores, errors, total = np.zeros(group.width), np.zeros(group.width + 1), 0.0
    while len(alive) > 1:
        costs = sum(_costs(acts, inverse, [at[u] for u in alive]) for acts, inverse, at in layers_of)
        together = min(max(1, len(alive) // _AT_ONCE), len(alive) - 1)
        worst = np.argsort(costs, kind="stable")[:together]
        gone = [alive[i] for i in worst]
        for i, unit in zip(worst, gone, strict=True):
            total += max(float(costs[i]), 0.0)
            scores[unit] = group.width - len(alive)
            alive.remove(unit)
            errors[len(alive)] = total
        for acts, inverse, at in layers_of:
            _take(acts, inverse, torch.cat([at[u] for u in gone]))
        layers_of = [_compact(*layer, alive) for layer in layers_of]
    scores[alive[0]] = group.width - 1
    errors[0] = np.inf
    return scores, errors


def _acting(weight: Tensor, force: Tensor, apart: bool) -> Tensor:
    """W'SW over channels x kernel, or summed over the kernel."""
    if apart:
        rows = weight.flatten(1)
        return torch.einsum("oc,o,od->cd", rows, force, rows)
    return torch.einsum(
        "ock,o,odk->cd", weight.reshape(*weight.shape[:2], -1), force, weight.reshape(*weight.shape[:2], -1)
    )


def _costs(acts: Tensor, inverse: Tensor, units: list[Tensor]) -> np.ndarray:
    sizes = {len(u) for u in units}
    if len(sizes) == 1:
        at = torch.stack(units)
        blocks = [matrix[at[:, :, None], at[:, None, :]] for matrix in (inverse, acts)]
        return torch.linalg.solve(*blocks).diagonal(dim1=1, dim2=2).sum(1).cpu().numpy()
    return np.array(
        [float(torch.linalg.solve(inverse[u][:, u], acts[u][:, u]).trace()) if len(u) else 0.0 for u in units]
    )


def _take(acts: Tensor, inverse: Tensor, gone: Tensor) -> None:
    """Both matrices, in place, without the inputs in `gone`, whose rows and columns mean nothing any more: what they
    did is given to the others."""
    if not len(gone):
        return
    back = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])  # (gone, inputs)
    own, mine = acts[gone], acts[gone][:, gone]
    # + back' mine back - own' back - back' own
    acts.addmm_(torch.cat([back, own]).T, torch.cat([mine @ back - own, -back]))
    inverse.addmm_(inverse[:, gone], back, alpha=-1)


def _compact(acts: Tensor, inverse: Tensor, at: list[Tensor], alive: list[int]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The same without what is gone, once that is a quarter of it."""
    left = torch.cat([at[u] for u in alive])
    if len(left) > 0.75 * len(acts):
        return acts, inverse, at
    place = torch.zeros(len(acts), dtype=left.dtype, device=left.device)
    place[left] = torch.arange(len(left), device=left.device)
    moved, kept = [a[:0] for a in at], set(alive)
    for unit in kept:
        moved[unit] = place[at[unit]]
    return acts[left][:, left], inverse[left][:, left], moved

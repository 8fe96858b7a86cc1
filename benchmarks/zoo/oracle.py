"""Our groups against Torch-Pruning's, for one model: what must go together with a unit, read by two programs.

Run in a process of its own: `python -m benchmarks.zoo.oracle SPEC` prints one JSON line. Source: Fang et al., DepGraph:
Towards Any Structural Pruning, CVPR 2023 (arXiv 2301.12900); package torch-pruning, a dependency of the tests only.
"""

import copy
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch_pruning
from torch import nn

from benchmarks.zoo.case import SEED, peak_memory_mib
from mimicut.anatomy.find_seam import trace
from mimicut.anatomy.graph import Anatomy, Group
from mimicut.base.errors import LawBroken, MimicutError, one_line
from mimicut.planning.planner import eligible_groups, resolve
from mimicut.proof.laws import check_cut
from mimicut.proof.randomised import randomised
from mimicut.results.teachers import load_teacher
from mimicut.surgery.cut import cut

Position = tuple[str, int, int]  # tensor, axis, position on it


def run(spec: str) -> dict[str, Any]:
    """outcome: "agrees", "differs", "unsupported" (by us) or "failed" (Torch-Pruning did, or did not compare: error).
    groups: that we can cut; compared, agree: of them. skipped: reason -> groups. differences: see `compare`."""
    started, line = time.perf_counter(), {"model": spec}
    try:
        teacher = load_teacher(spec, pretrained=False)
        model, size = randomised(teacher.model), teacher.preprocessing.input_size
        line |= compare(model, trace(model, torch.zeros(2, *size)), torch.randn(1, *size))
    except MimicutError as error:
        line |= {"outcome": "unsupported", "error": str(error)}
    except Exception as error:  # whatever Torch-Pruning raises on a graph that it cannot read
        line |= {"outcome": "failed", "error": f"Torch-Pruning: {one_line(error)}"}
    return line | {"seconds": round(time.perf_counter() - started, 2), "peak_memory_mib": peak_memory_mib()}


def compare(model: nn.Module, anatomy: Anatomy, example: torch.Tensor) -> dict[str, Any]:
    """The first and the last unit of every group that we can cut, against what Torch-Pruning cuts with it.

    differences: groups that differ in one way, with what only one of us cuts, and what became of that cut made by each:
    ours by law 2, theirs by running the network and comparing it with ours. Every position of a unit in the layer that
    makes it is handed over: several where groups of a convolution or heads are cut whole.
    """
    graph = _graph(model, example)
    groups, skipped, agree = eligible_groups(anatomy), Counter(), 0
    found: dict[tuple, dict[str, Any]] = {}
    for group in groups:
        start = _start(graph, model, group)
        if start is None:
            skipped["made by no convolution or linear layer that it sees"] += 1
            continue
        for unit in dict.fromkeys((0, group.width - 1)):
            ours, theirs = _ours(group, unit), _theirs(graph, model, *start, unit)
            if ours == theirs:
                continue
            only = [_kinds(model, ours - theirs), _kinds(model, theirs - ours)]
            entry = found.setdefault(
                tuple(map(tuple, only)), {"groups": [], "unit": unit, "ours_only": only[0], "theirs_only": only[1]}
            )
            entry["groups"].append(group.name)
            if len(entry["groups"]) == 1:
                entry |= _verdict(model, anatomy, group, unit, example)
            break
        else:
            agree += 1
    compared = len(groups) - skipped.total()
    outcome = "agrees" if agree == compared else "differs"
    return {
        "outcome": outcome, "groups": len(groups), "compared": compared, "agree": agree, "skipped": dict(skipped),
        "differences": list(found.values()),
    }  # fmt: skip


def _graph(model: nn.Module, example: torch.Tensor) -> Any:
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch_pruning.DependencyGraph().build_dependency(model, example, verbose=False)


def _start(graph: Any, model: nn.Module, group: Group) -> tuple[str, np.ndarray] | None:
    """A layer that makes channels of `group`, and the unit that each of its outputs belongs to."""
    modules = dict(model.named_modules())
    for made in group.producers:
        module = modules.get(made.module)
        transposed = getattr(module, "transposed", False)
        if made.tensor.endswith(".weight") and module in graph.module2node and made.dim == int(transposed):
            return made.module, made.units
    return None


def _ours(group: Group, unit: int) -> set[Position]:
    return {(m.tensor, m.dim, p) for m in group.members for p in np.flatnonzero(m.units == unit).tolist()}


def _cut_by(graph: Any, model: nn.Module, module: str, units: np.ndarray, unit: int) -> Any:
    layer = model.get_submodule(module)
    start = graph.get_pruner_of_module(layer).prune_out_channels
    return graph.get_pruning_group(layer, start, np.flatnonzero(units == unit).tolist())


def _theirs(graph: Any, model: nn.Module, module: str, units: np.ndarray, unit: int) -> set[Position]:
    names = {id(t): n for n, t in reversed([*model.named_parameters(), *model.named_buffers()])}
    found = set()
    for dependency, idxs in _cut_by(graph, model, module, units, unit):
        out = graph.is_out_channel_pruning_fn(dependency.handler)
        for tensor, axis, positions in _cuts(dependency.target.module, out, idxs, dependency.target.pruning_dim):
            found |= {(names[id(tensor)], axis % tensor.dim(), p) for p in positions}
    return found


def _cuts(layer: Any, out: bool, idxs: list[int], axis: int) -> Iterator[tuple[torch.Tensor, int, list[int]]]:
    """What Torch-Pruning's function for `layer` removes: tensor, axis, positions.

    Raises: TypeError for a layer whose function is not described here."""
    kind = type(layer)
    if isinstance(layer, nn.Parameter):
        yield layer, axis, idxs
    elif isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear)):
        groups, transposed = getattr(layer, "groups", 1), getattr(layer, "transposed", False)
        depthwise = groups > 1 and groups == layer.out_channels
        if out or depthwise:
            yield layer.weight, int(transposed), idxs
            if layer.bias is not None:
                yield layer.bias, 0, idxs
        else:
            inputs = layer.weight.shape[int(not transposed)]
            yield layer.weight, int(not transposed), sorted({i % inputs for i in idxs})
    elif isinstance(layer, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)):
        for name, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
            if name != "num_batches_tracked":
                yield tensor, -1, idxs
    elif isinstance(layer, nn.PReLU):
        if layer.num_parameters > 1:
            yield layer.weight, 0, idxs
    elif isinstance(layer, nn.Embedding):
        yield layer.weight, 1, idxs
    elif not kind.__module__.startswith("torch_pruning"):  # whose own stand for operators without tensors
        raise TypeError(f"not compared: what it does to a {kind.__name__}")


def _kinds(model: nn.Module, positions: set[Position]) -> list[str]:
    """ "LayerNorm.weight axis 0", sorted: how differences are distinguished."""
    modules, found = dict(model.named_modules()), set()
    for tensor, axis, _ in positions:
        owner, _, key = tensor.rpartition(".")
        found.add(f"{type(modules[owner]).__name__}.{key} axis {axis}")
    return sorted(found)


def _verdict(model: nn.Module, anatomy: Anatomy, group: Group, unit: int, example: torch.Tensor) -> dict[str, str]:
    ranks = np.argsort(np.argsort(np.arange(group.width) == unit, kind="stable"))
    plan = resolve(model, anatomy, {group.name: group.width - 1}, {group.name: ranks})
    student = cut(model, plan)
    try:
        ours = f"law 2 holds ({check_cut(anatomy, plan, model, student)['error']:.0e})"
    except LawBroken as error:
        ours = str(error)
    other = copy.deepcopy(model)
    try:
        graph = _graph(other, example)
        _cut_by(graph, other, *_start(graph, other, group), unit).prune()
        with torch.no_grad():
            expected, found = student(example), other(example)
        error = ((found - expected).abs().max() / expected.abs().max()).item()
        theirs = f"runs, differs from ours by {error:.0e}"
    except Exception as error:  # whatever the network raises when it is cut wrongly
        theirs = f"does not run: {one_line(error)}"
    return {"ours": ours, "theirs": theirs}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.manual_seed(SEED)
    print(json.dumps(run(sys.argv[1])))

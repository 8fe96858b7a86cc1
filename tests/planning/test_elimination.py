"""Channels taken away one after the other: against the same thing done the long way."""

import numpy as np
import pytest
import torch

from mimicut.planning import elimination
from mimicut.planning.elimination import RIDGE, Reader, eliminate


def problem(width, taps, others, seed, ragged=False):
    """Inputs (rows, inputs), weights (outputs, inputs), how strongly outputs act, and the inputs of each unit."""
    draws = torch.Generator().manual_seed(seed)
    units = np.repeat(np.concatenate([np.arange(width), np.full(others, -1)]), taps)
    np.random.default_rng(seed).shuffle(units)
    if ragged:
        units[::7] = np.where(units[::7] > 0, units[::7] - 1, units[::7])
    inputs = len(units)
    x = torch.randn(3 * inputs, inputs, generator=draws, dtype=torch.float64)
    x = x @ torch.randn(inputs, inputs, generator=draws, dtype=torch.float64)
    weight = torch.randn(12, inputs, generator=draws, dtype=torch.float64)
    acts = torch.rand(12, generator=draws, dtype=torch.float64)
    where = [np.flatnonzero(units == unit) for unit in range(width)]
    at = np.full((width, max(map(len, where))), -1)
    for unit, found in enumerate(where):
        at[unit, : len(found)] = found
    return x, weight, acts, at


def the_long_way(problems, width, at_once=lambda left: 1):
    """Everything anew for every unit that goes: the cost of each by the refitted weights with and without it."""
    scores, errors, total, alive = np.zeros(width), np.zeros(width + 1), 0.0, list(range(width))
    grams = []
    for x, *_ in problems:
        gram = x.T @ x
        grams.append(gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype))

    def lost(units):
        """What the least squares without these units lose in all, by Schur's complement."""
        loss = 0.0
        for (_, weight, acts, at), gram in zip(problems, grams, strict=True):
            gone = at[sorted(units)].ravel()
            gone = torch.from_numpy(gone[gone >= 0])
            block = torch.linalg.inv(gram)[gone][:, gone]
            rows = weight[:, gone]
            loss += float((acts * (rows @ torch.linalg.solve(block, rows.T)).diagonal()).sum())
        return loss

    while len(alive) > 1:
        gone = [unit for unit in range(width) if unit not in alive]
        before = lost(gone) if gone else 0.0
        costs = np.array([lost([*gone, unit]) - before for unit in alive])
        order = np.argsort(costs, kind="stable")[: at_once(len(alive))]
        left = len(alive)
        for i in order:
            scores[alive[i]] = width - left
            total += costs[i]
            left -= 1
            errors[left] = total
        alive = [unit for place, unit in enumerate(alive) if place not in set(order.tolist())]
    scores[alive[0]] = width - 1
    errors[0] = np.inf
    return scores, errors


def readers(problems):
    for x, weight, acts, at in problems:
        rows = weight * acts.sqrt()[:, None]
        yield Reader(x.T @ x, rows.T @ rows, at)


@pytest.mark.parametrize(
    ("width", "taps", "others", "count", "ragged"),
    [(2, 1, 0, 1, False), (14, 1, 0, 1, False), (12, 1, 5, 2, False), (9, 4, 3, 2, False), (11, 3, 2, 1, True)],
)
@pytest.mark.parametrize("panel", [1, 4, 128])
def test_units_go_as_if_everything_were_done_anew(width, taps, others, count, ragged, panel, monkeypatch):
    monkeypatch.setattr(elimination, "_PANEL", panel)
    problems = [problem(width, taps, others, seed, ragged) for seed in range(count)]
    scores, errors = eliminate(list(readers(problems)), width)
    expected = the_long_way(problems, width)
    assert np.array_equal(scores, expected[0])
    assert np.allclose(errors[1:], expected[1][1:], rtol=1e-9, atol=0)
    assert errors[0] == np.inf


def test_many_units_go_at_once(monkeypatch):
    monkeypatch.setattr(elimination, "_AT_ONCE", 4)
    monkeypatch.setattr(elimination, "_PANEL", 5)
    problems = [problem(17, 2, 3, 1)]
    scores, errors = eliminate(list(readers(problems)), 17)
    expected = the_long_way(problems, 17, lambda left: min(max(1, left // 4), left - 1))
    assert np.array_equal(scores, expected[0])
    assert np.allclose(errors[1:], expected[1][1:], rtol=1e-9, atol=0)


def test_inputs_that_others_give_entirely_go_first():
    """Also where the matrix is singular, and where an input is always zero."""
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=draws, dtype=torch.float64)
    x[:, 3], x[:, 7], x[:, 11] = 0.0, 2 * x[:, 1], x[:, 0] - x[:, 2]
    weight = torch.randn(5, 12, generator=draws, dtype=torch.float64)
    scores, errors = eliminate([Reader(x.T @ x, weight.T @ weight, np.arange(12)[:, None])], 12)
    assert scores[3] < 3
    assert errors[9] < 1e-2 * errors[8]
    assert np.isfinite(errors[1:]).all()

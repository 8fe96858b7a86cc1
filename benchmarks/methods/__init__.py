"""The methods, by name, in the order of the tables. One file each; `problem.py` and `layers.py` are what they share."""

from benchmarks.methods import (
    batch_norm,
    cross_distillation,
    default,
    distill,
    fine_tune,
    fitnet,
    fskd,
    least_squares,
    mir,
    none,
    practise,
)
from benchmarks.methods.problem import Method, Problem

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        none.METHOD,
        batch_norm.METHOD,
        fskd.METHOD,
        least_squares.METHOD,
        fine_tune.METHOD,
        distill.LABELLED,
        distill.UNLABELLED,
        fitnet.METHOD,
        cross_distillation.METHOD,
        mir.AFTER_POOL,
        practise.METHOD,
        mir.METHOD,
        mir.ADAMW,
        mir.WITH_EXTRA,
        distill.WITH_EXTRA,
        default.SAME_CUT,
        default.NO_EXTRA,
        default.OWN_CUT,
        default.WITH_PICTURES,
    )
}
__all__ = ["METHODS", "Method", "Problem"]

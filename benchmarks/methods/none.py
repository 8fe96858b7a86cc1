"""No recovery: the cut network as it is.

Source: L1-norm filter pruning, Li et al., ICLR 2017, arXiv 1608.08710, without its retraining.
"""

from torch import nn

from benchmarks.methods.problem import Method, Problem


def run(problem: Problem) -> nn.Module:
    return problem.student()


METHOD = Method("none", "cut alone", "Li et al., ICLR 2017", run, trains=False)

"""The operator table: what each operator does to the channels that pass through it.

There is one file for each kind of operator, with its rules and, at the end, the names of the operators that they read.
To add an operator, write a rule in the file of its kind (`rule_interface` says what a rule is given and returns) and
name it in that file's RULES. What the table does not hold is never guessed: its inputs are pinned with the operator's
name.
"""

from mimicut.anatomy.operators import (
    attention,
    convolutions,
    elementwise,
    norms,
    pieces,
    positions,
    products,
    recurrent,
    reductions,
    shapes,
    space,
)
from mimicut.anatomy.operators.rule_interface import Rule

_KINDS = (
    elementwise, reductions, convolutions, products, recurrent, attention, norms, shapes, pieces, positions, space,
)  # fmt: skip

# Name of an operator, as `tracing.operator` gives it -> its rule.
TABLE: dict[str, Rule] = {name: rule for kind in _KINDS for name, rule in kind.RULES.items()}

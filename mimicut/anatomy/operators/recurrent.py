"""The rule for recurrent layers: LSTM, GRU and plain RNN, over sequences of patches or pixels.

A hidden unit is cut whole: its rows in the weights and biases of every gate, its column in the weights that read the
last step's state, its place in what is returned. Layers and directions have one hidden size, so unit i is the same unit
in all of them.
"""

import numpy as np
from torch.fx import Node

from mimicut.anatomy.channels import Axes
from mimicut.anatomy.operators.rule_interface import Reader, Rule, foresee, overload, owner_of, why
from mimicut.anatomy.tracing import shape

RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


def recurrent(reader: Reader, node: Node) -> list[Axes]:
    """Outputs of all steps (T, B, directions x units) or (B, T, directions x units), then each last state (layers x
    directions, B, units). The weights are (gates x units, inputs) and (gates x units, units)."""
    foresee(overload(node) == "input", "sequences in one tensor, not packed ones")
    x, states, params, biases, _, _, _, both, batch_first = node.args
    states = [states] if isinstance(states, Node) else list(states)
    # The projections of an LSTM must be narrower than its units.
    foresee(len({shape(s)[2] for s in states}) == 1, "states of one width")
    axes, times, directions = list(reader.axes(x)), int(batch_first), 1 + both
    reader.channels.pin(axes[times], why(reader, node, "its channels are the steps of a sequence"))
    axes[times] = None
    unread = why(reader, node, "meets a recurrent layer whose weight or state could not be followed")
    each = 4 if biases else 2
    layers = [params[i : i + each] for i in range(0, len(params), each)]
    units = reader.channels.new(shape(states[0])[2])
    for i, weights in enumerate(layers):
        taken = axes[2] if i < directions else np.tile(units, directions)  # both directions of the layer below
        if shape(weights[0])[1] > 1:
            reader.channels.join(reader.axes(weights[0])[1], taken, unread)
        for weight in weights:  # gates stand one after the other
            reader.channels.join(np.resize(units, shape(weight)[0]), reader.axes(weight)[0], unread)
        if len(units) > 1:
            reader.channels.join(units, reader.axes(weights[1])[1], unread)
        reader.produce(next(iter(node.users), node), weights[0], 0, None, dense=True)
    for state in states:
        for axis, ids in ((1, axes[1 - times]), (2, units)):
            if ids is not None and shape(state)[axis] > 1:
                reader.channels.join(ids, reader.axes(state)[axis], unread)
    owner = owner_of(reader, params[0])
    reader.size(node, owner, "input_size", shape(x)[2], axes[2])
    reader.size(node, owner, "hidden_size", len(units), units)
    # torch 2.11 traces the states of an LSTM with one axis too many.
    ranks = [value.dim() for value in node.meta["val"][1:]]
    return [[*axes[:2], np.tile(units, directions)], *([*[None] * (n - 2), axes[1 - times], units] for n in ranks)]


RULES: dict[str, Rule] = dict.fromkeys(RECURRENT, recurrent)

"""Latencies by hand, and the state of every random generator."""

import random
from importlib import import_module

import numpy as np
import torch

from mimicut.runtime.latency import MeasuredLatency, Setting

module = import_module("mimicut.runtime.latency")  # whose name in the package is its class
TORCH = Setting("torch", 1, 2)


def random_states():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


def latency(*ms):
    return MeasuredLatency(*module._quartiles(ms), len(ms), ms)

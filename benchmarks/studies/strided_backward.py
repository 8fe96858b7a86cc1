"""Which convolutions of torch write outside their memory in the backward pass with channels last, on this processor.

    python -m benchmarks.studies.strided_backward       # a minute; Linux with glibc's libc_malloc_debug

Each convolution runs forward and backward in a process of its own under MALLOC_CHECK_=3, which ends a process whose
heap is damaged. One JSON line; also written to results/strided_backward.json. `base.layout.learns_channels_last` keeps
the layout away from those that were found.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from mimicut.base.environment import platform_kind, versions

OUT = Path(__file__).parents[1] / "results" / "strided_backward.json"
SIDE, OUTPUTS = 128, 48
INPUTS = (3, 7, 8, 12, 15, 16, 32)
# kernel, stride, whether it is grouped into as many as it has inputs
KINDS = {"1x1, stride 2": (1, 2, False), "1x1": (1, 1, False), "3x3, stride 2": (3, 2, False),
         "4x4, stride 4": (4, 4, False), "1x1, stride 2, depthwise": (1, 2, True)}  # fmt: skip
CHECK = {"LD_PRELOAD": "libc_malloc_debug.so.0", "MALLOC_CHECK_": "3", "OMP_NUM_THREADS": "1"}
CODE = """
import sys, torch
inputs, outputs, kernel, stride, groups, side = map(int, sys.argv[1:])
for _ in range(2):
    layer = torch.nn.Conv2d(inputs, outputs, kernel, stride, groups=groups)
    images = torch.randn(2, inputs, side, side).contiguous(memory_format=torch.channels_last).requires_grad_()
    layer(images).sum().backward()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    found = {kind: [inputs for inputs in INPUTS if damages(inputs, *what)] for kind, what in KINDS.items()}
    line = {
        "capability": torch.backends.cpu.get_cpu_capability(), "inputs_tried": list(INPUTS), "side": SIDE,
        "inputs_that_damage_the_heap": found, "platform": platform_kind(1, "cpu"),
        "versions": {name: text for name, text in versions().items() if name in ("python", "torch")},
    }  # fmt: skip
    options.out.write_text(json.dumps(line) + "\n", encoding="utf-8")
    print(json.dumps(line))


def damages(inputs: int, kernel: int, stride: int, depthwise: bool) -> bool:
    """Whether the process of this convolution is ended by a signal."""
    outputs, groups = (inputs, inputs) if depthwise else (OUTPUTS, 1)
    asked = [str(number) for number in (inputs, outputs, kernel, stride, groups, SIDE)]
    ended = subprocess.run(
        [sys.executable, "-c", CODE, *asked], env=os.environ | CHECK, capture_output=True, check=False
    )
    if ended.returncode > 0:
        raise RuntimeError(f"running a convolution of {inputs} inputs: {ended.stderr.decode()[-300:]}")
    return ended.returncode < 0


if __name__ == "__main__":
    main()

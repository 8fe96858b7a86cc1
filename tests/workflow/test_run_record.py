"""What has to be the same for a stopped run to go on."""

from pathlib import Path

import pytest
import torch
from nets import Chain

from mimicut.base.errors import InputError
from mimicut.inputs.preprocessing import Preprocessing
from mimicut.inputs.teacher import own_teacher
from mimicut.recovery.checkpoint import Checkpoint
from mimicut.recovery.config import preset
from mimicut.workflow.intake import take_in
from mimicut.workflow.request import Destination, request_of
from mimicut.workflow.run_record import check_same, record_of

PREPROCESSING = Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3)
FEW = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def record(device, **changes):
    teacher = own_teacher(Chain(), PREPROCESSING)
    request = request_of(teacher, keep=0.5, config=preset("default", steps=3, views="none", **changes))
    intake = take_in(teacher, FEW, request)
    object.__setattr__(request.config, "device", device)  # one that this machine may not have
    return record_of(teacher, request, intake)


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [("cuda:0", "cuda", True), ("cuda", "cuda:1", True), ("cpu", None, True), ("cuda:0", "cpu", False),
     ("cuda", None, False)],
)  # fmt: skip
def test_one_device_that_is_left_goes_on(before, now, same):
    torch.manual_seed(0)
    stopped = Destination(Path("small"), False, Checkpoint({}, {"asked": record(before)}))
    torch.manual_seed(0)
    if same:
        check_same(stopped, record(now))
        return
    with pytest.raises(InputError, match=r"the run was stopped with other config \(device\)"):
        check_same(stopped, record(now))


def test_another_recipe_is_still_another_run():
    torch.manual_seed(0)
    stopped = Destination(Path("small"), False, Checkpoint({}, {"asked": record("cpu")}))
    torch.manual_seed(0)
    with pytest.raises(InputError, match=r"the run was stopped with other config \(lr\)"):
        check_same(stopped, record("cpu", lr=0.5))

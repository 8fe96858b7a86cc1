"""Replace: the student's body, the teacher's head."""

import copy

import pytest
import torch
from torch import nn

from mimicut.base.errors import InputError, LawBroken
from mimicut.base.guard import same_bits
from mimicut.surgery.head import check_head, put_under_head
from mimicut.surgery.seam import Seam, SeamPoint

SEAM = Seam((SeamPoint("0"),), ((4, 6, 6),), ("3.weight", "3.bias"))


def network(mid=4, classes=5, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, mid, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(mid, classes))


def test_body_of_the_student_under_the_head_of_the_teacher():
    teacher, student = network(seed=1), network(seed=2)
    with torch.no_grad():
        teacher[3].bias[0], teacher[3].bias[1] = float("nan"), -0.0
    teacher[3].bias.requires_grad_(False)
    before = copy.deepcopy(student.state_dict()), copy.deepcopy(teacher.state_dict())
    model = put_under_head(teacher, student.train(), SEAM)
    assert same_bits(model[3].weight, teacher[3].weight)
    assert same_bits(model[3].bias, teacher[3].bias)
    assert torch.equal(model[0].weight, student[0].weight)
    assert not any(m.training for m in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, False]
    for state, net in zip(before, (student, teacher), strict=True):
        assert all(same_bits(state[k], v) for k, v in net.state_dict().items())
    assert student.training


def test_the_result_owns_its_tensors():
    teacher, student = network(seed=1), network(seed=2)
    model = put_under_head(teacher, student, SEAM)
    addresses = {t.data_ptr() for net in (teacher, student) for t in net.parameters()}
    assert not addresses & {t.data_ptr() for t in model.parameters()}


@pytest.mark.parametrize(
    ("student", "says"),
    [
        (network(classes=7), r"'3.weight' is \(7, 4\) float32 in the student and \(5, 4\) float32 in the teacher"),
        (network().half(), r"'3.weight' is \(5, 4\) float16 in the student"),
        (nn.Sequential(network()), r"the student has no tensor '3.weight'; near it: 0.0.weight, 0.3.weight"),
    ],
)
def test_a_head_that_does_not_fit_is_named(student, says):
    with pytest.raises(InputError, match=says):
        put_under_head(network(), student, SEAM)


def test_a_seam_of_another_teacher_is_named():
    with pytest.raises(InputError, match=r"the teacher has no tensor '9.weight'"):
        put_under_head(network(), network(), Seam(SEAM.points, SEAM.shapes, ("9.weight",)))


def test_a_copy_that_is_not_bit_identical_breaks_the_law(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other: self.add_(1))
    with pytest.raises(LawBroken, match=r"'3.weight' is not bit-identical"):
        put_under_head(network(), network(), SEAM)


def test_check_head_sees_one_bit_and_a_missing_tensor():
    teacher, model = network(), network()
    check_head(teacher, model, SEAM)
    with torch.no_grad():
        model[3].bias[2] = torch.nextafter(model[3].bias[2], torch.tensor(9.0))
    with pytest.raises(LawBroken, match=r"'3.bias' is not bit-identical"):
        check_head(teacher, model, SEAM)
    with pytest.raises(LawBroken, match=r"'3.weight' is missing in the model"):
        check_head(teacher, nn.Sequential(nn.Conv2d(3, 4, 3)), SEAM)


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (torch.tensor(float("nan")), torch.tensor(float("nan")), True),
        (torch.tensor(0.0), torch.tensor(-0.0), False),
        (torch.tensor([True]), torch.tensor([True]), True),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32), False),
        (torch.zeros(2, 3), torch.zeros(3, 2), False),
        (torch.arange(6).reshape(2, 3).t(), torch.tensor([[0, 3], [1, 4], [2, 5]]), True),
        (torch.zeros(0, 3), torch.zeros(0, 3), True),
    ],
)
def test_same_bits(a, b, same):
    assert same_bits(a, b) is same

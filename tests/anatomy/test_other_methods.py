"""Numbers that only other methods than `forward` read follow a cut, or are named."""

import pytest
import torch
from nets import Chain
from torch import nn

from mimicut.anatomy.find_seam import trace
from mimicut.planning.planner import make_plan
from mimicut.proof.laws import check_cut
from mimicut.proof.randomised import randomised
from mimicut.surgery.cut import cut


class _Halves(nn.Module):
    """Halves of its channels change places; a method that nothing runs does the same by the width."""

    def __init__(self, c=7):
        super().__init__()
        self.c, self.before, self.after = c, nn.Conv2d(12, 2 * c, 1), nn.Conv2d(2 * c, 12, 1)

    def forward(self, x):
        a, b = self.before(x).chunk(2, 1)
        return self.after(torch.cat([b, a], 1))

    def forward_split(self, x):
        a, b = self.before(x).split((self.c, self.c), 1)
        return self.after(torch.cat([b, a], 1))


class _ByProperty(_Halves):
    """The number is read through a property and a helper."""

    @property
    def sizes(self):
        return [self.c] * 2

    def forward_split(self, x):
        return self._joined(self.before(x).split(self.sizes, 1))

    def _joined(self, parts):
        return self.after(torch.cat(parts[::-1], 1))


class _Whole(nn.Module):
    """The number is a whole width."""

    def __init__(self):
        super().__init__()
        self.width, self.before, self.after = 10, nn.Conv2d(12, 10, 1), nn.Conv2d(10, 12, 1)

    def forward(self, x):
        return self.after(torch.relu(self.before(x)))

    def forward_split(self, x):
        y = torch.relu(self.before(x))
        return self.after(y.reshape(len(y), self.width, *y.shape[2:]))


class _Around(Chain):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.fc(self.pool(self.body[6:](self.inner(self.body[:6](x)))).flatten(1))


def made(inner):
    model = randomised(_Around(inner))
    anatomy = trace(model, model.example())
    plan = make_plan(model, anatomy, keep_width=0.6, scheme="all")
    student = cut(model, plan)
    assert check_cut(anatomy, plan, model, student)["error"] <= 1e-10
    return plan, student.inner


@pytest.mark.parametrize(
    ("inner", "attribute", "left"), [(_Halves, "c", 5), (_ByProperty, "c", 5), (_Whole, "width", 6)]
)
def test_a_width_that_only_another_method_reads_follows_the_cut(inner, attribute, left):
    plan, module = made(inner())
    assert getattr(module, attribute) == left
    assert module.before.out_channels < inner().before.out_channels
    x = torch.randn(2, module.before.in_channels, 8, 8)
    torch.testing.assert_close(module.forward_split(x), module(x))
    assert not any("stay as they were" in note for note in plan.notes)


def test_a_number_that_may_be_something_else_stays_and_is_named():
    plan, module = made(_Halves(c=8))  # as high as the images are
    assert module.c == 8
    assert any("c = 8 of inner, read by forward_split; before you call" in note for note in plan.notes)


class _Read(_Halves):
    """The pass reads the number after all: it computes with it."""

    def forward(self, x):
        return super().forward(x) * self.c


class _ReadAbove(_Read):
    def forward(self, x):
        return super().forward(x) * 1.0


class _ReadFromOutside(_Around):
    def forward(self, x):
        return super().forward(x) * self.inner.c


def test_a_number_that_the_pass_reads_is_left_alone():
    for inner in (_Read(), _ReadAbove()):
        assert made(inner)[1].c == 7
    model = randomised(_ReadFromOutside(_Halves()))
    anatomy = trace(model, model.example())
    plan = make_plan(model, anatomy, keep_width=0.6, scheme="all")
    assert cut(model, plan).inner.c == 7

"""Features at the seam: the right tensor, as it was, with no hook left behind."""

import pytest
import torch
from torch import nn

from mimicut.base.errors import UnsupportedModel
from mimicut.surgery.seam import Seam, SeamPoint, capturing


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(3, 3)
        self.again = nn.ReLU(inplace=True)
        self.two = nn.Linear(3, 2)
        self.pair = nn.Identity()
        self.ran = 0

    def forward(self, x, *, shift=0.0):
        x = self.one(input=x + shift)
        x = self.again(x)
        x = self.again(x - 1)
        self.ran += 1
        self.pair((x, x))
        return self.two(x)


def seam(*points):
    return Seam(tuple(map(SeamPoint.parse, points)), ((3,),) * len(points), ())


def features(net, x, *points, **kwargs):
    with capturing(net, seam(*points)) as capture:
        return capture.features(x, **kwargs)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


X = torch.tensor([[1.0, -2.0, 3.0], [0.5, 4.0, -1.0]])


def test_outputs_inputs_calls_and_keywords(net):
    linear = net.one(X)
    assert torch.equal(features(net, X, "one")[0], linear)
    assert torch.equal(features(net, X, "one:input")[0], X)
    assert torch.equal(features(net, X, "one:input", shift=2.0)[0], X + 2)
    assert torch.equal(features(net, X, "again:output@1")[0], (linear.relu() - 1).relu())
    assert torch.equal(features(net, X, "two:input")[0], (linear.relu() - 1).relu())
    assert torch.equal(features(net, X, ":input")[0], X)
    assert torch.equal(features(net, X, "")[0], net(X))


def test_points_come_in_their_own_order_and_are_not_overwritten_in_place(net):
    linear = net.one(X)
    assert bool((linear < 0).any())  # else the ReLU in place would change nothing
    later, earlier, before = features(net, X, "two", "one", "again:input")
    assert torch.equal(earlier, linear)
    assert torch.equal(before, linear)
    assert torch.equal(later, net(X))


def test_the_pass_ends_at_the_last_point(net):
    features(net, X, "again")
    assert net.ran == 0
    features(net, X, "two")
    assert net.ran == 1


def test_gradients_flow_through_captured_features(net):
    for points in (("one",), ("one", "two:input")):
        net.zero_grad()
        features(net, X, *points)[0].sum().backward()
        assert net.one.weight.grad.abs().sum() > 0


def test_a_capture_can_be_used_again(net):
    with capturing(net, seam("again:output@1")) as capture:
        first, second = capture.features(X), capture.features(X + 1)
    assert torch.equal(first[0], features(net, X, "again:output@1")[0])
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize("point", ["one", "nowhere", "again:output@5", "pair"])
def test_no_hook_is_left_behind(net, point):
    try:
        features(net, X, "one:input", point)
    except UnsupportedModel:
        assert point != "one"
    else:
        assert point == "one"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize(
    ("point", "says"),
    [
        ("on", r"no module 'on' in this network; near it: one"),
        ("again:output@2", r"ended without reaching again:output@2"),
        ("pair", r"seam point pair:output: found a tuple with the parts 0, 1, expected one tensor"),
    ],
)
def test_points_that_cannot_be_captured_are_named(net, point, says):
    with pytest.raises(UnsupportedModel, match=says):
        features(net, X, point)


@pytest.mark.parametrize("text", ["layer4:output", "avgpool:input", "block:output@2", "<model>:output"])
def test_points_are_read_as_they_are_printed(text):
    point = SeamPoint.parse(text.replace("<model>", ""))
    assert str(point) == text


@pytest.mark.parametrize("text", ["layer4:middle", "layer4:output@x"])
def test_points_that_cannot_be_read(text):
    with pytest.raises(UnsupportedModel, match="expected MODULE, MODULE:input"):
        SeamPoint.parse(text)


def test_a_seam_goes_through_json():
    given = Seam((SeamPoint("a"), SeamPoint("b", "input", 2)), ((3, 4), (5,)), ("fc.weight",))
    assert Seam.from_json(given.to_json()) == given

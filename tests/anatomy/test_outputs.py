"""Networks that return more than one row of class scores: every output is imitated or named, and has a kind."""

import pytest
import torch
import torch.nn.functional as F
from nets import Chain, Headless, Residual
from torch import nn

from mimicut.anatomy.blocks import droppable
from mimicut.anatomy.find_seam import find_seam, trace
from mimicut.base.errors import InputError, UnsupportedModel
from mimicut.planning.planner import make_plan
from mimicut.proof.laws import check_cut
from mimicut.proof.output_figures import with_kinds
from mimicut.proof.randomised import randomised
from mimicut.surgery.cut import cut
from mimicut.surgery.seam import Output, Seam, SeamPoint, capturing

X = torch.zeros(2, 3, 8, 8)


def points(model, example=X, **options):
    return [str(p) for p in find_seam(model, example, **options).points]


def kinds(model, **options):
    return {o.part: (o.kind, o.activation, o.imitated) for o in find_seam(model, X, **options).outputs}


class Decoder(nn.Module):
    """Pooled class scores, and a map that a decoder makes from all stages: not from the pooled features alone."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, 2, 1)
        self.decoder = nn.Sequential(nn.Conv2d(20, 10, 3, padding=1), nn.ReLU(), nn.Conv2d(10, 4, 1))
        self.act, self.fc = nn.ReLU(), nn.Linear(12, 5)

    def features(self, x):
        low = F.relu(self.one(x))
        return low, self.act(self.two(low))

    def forward(self, x):
        low, high = self.features(x)
        decoded = self.decoder(torch.cat([low, F.interpolate(high, scale_factor=2.0)], 1))
        return decoded, self.fc(F.adaptive_avg_pool2d(high, 1).flatten(1))


class TwoTasks(Decoder):
    """Both heads take the same features, so that one point stands for both outputs."""

    def forward(self, x):
        _, high = self.features(x)
        wide = torch.cat([high, high[:, :8]], 1)
        return {"map": self.decoder(wide), "classes": self.fc(F.adaptive_avg_pool2d(high, 1).flatten(1))}


class Early(Decoder):
    """Features from inside the body are returned beside the scores."""

    def forward(self, x):
        low, high = self.features(x)
        return {"logits": self.fc(high.mean((2, 3))), "features": [low]}


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (Decoder, ["act:output", "decoder.1:output"]),
        (TwoTasks, ["act:output"]),
        (Early, ["act:output", "<model>:output.features.0"]),
    ],
)
def test_every_output_is_reached_through_the_seam_alone(net, expected):
    model = randomised(net())
    anatomy = trace(model, X)
    assert [str(p) for p in anatomy.seam.points] == expected
    assert all(output.imitated for output in anatomy.seam.outputs)
    assert len(anatomy.seam.outputs) == 2
    assert not anatomy.seam.headless
    if net is Early:
        return  # its only width is returned
    plan = make_plan(model, anatomy, keep_width=0.5, scheme="all", score="l1")
    student = cut(model, plan)
    check_cut(anatomy, plan, model, student)
    assert plan.widths["one"] == 4


def test_what_a_given_seam_does_not_cover_is_named():
    seam = find_seam(Decoder(), X, points=["act"])
    assert {o.part: o.imitated for o in seam.outputs} == {"0": False, "1": True}
    both = find_seam(Decoder(), X, points=["act", "decoder.1"])
    assert all(o.imitated for o in both.outputs)


class Returns(Chain):
    def __init__(self, what):
        super().__init__()
        self.what, self.scale = what, nn.Parameter(torch.rand(()))
        self.register_buffer("anchors", torch.rand(7, 4))

    def forward(self, x):
        features = self.body(x)
        return self.what(self, self.fc(self.pool(features).flatten(1)), features)


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        (lambda m, y, f: y, {"": ("scores", "", True)}),
        (lambda m, y, f: y.softmax(1), {"": ("scores", "softmax", True)}),
        (lambda m, y, f: F.log_softmax(y, 1), {"": ("scores", "log_softmax", True)}),
        (lambda m, y, f: y.sigmoid(), {"": ("multilabel", "sigmoid", True)}),
        (lambda m, y, f: F.normalize(y), {"": ("embedding", "", True)}),
        (lambda m, y, f: y / y.norm(dim=1, keepdim=True), {"": ("embedding", "", True)}),
        (lambda m, y, f: 10 * (y / y.pow(2).sum(1, keepdim=True).sqrt()), {"": ("embedding", "", True)}),
        (lambda m, y, f: y * (y * y).sum(1, keepdim=True).add(1e-6).rsqrt(), {"": ("embedding", "", True)}),
        (lambda m, y, f: y.topk(3)[0], {"": ("values", "", True)}),
        (lambda m, y, f: y.sort(1).values, {"": ("values", "", True)}),
        (lambda m, y, f: y[:, :1], {"": ("values", "", True)}),
        (lambda m, y, f: y[:, 0], {"": ("values", "", True)}),
        (lambda m, y, f: y[:, :, None, None].expand(-1, -1, 4, 4).softmax(1), {"": ("map", "softmax", True)}),
        (
            lambda m, y, f: y[:, :3, None, None].expand(-1, -1, 8, 8).sigmoid(),
            {"": ("values", "sigmoid", True)},
        ),  # a picture
        (lambda m, y, f: (y, f), {"0": ("scores", "", True), "1": ("values", "", True)}),  # the scores' features
    ],
)
def test_the_kind_of_an_output_is_read_from_the_graph(what, expected):
    assert kinds(Returns(what)) == expected


@pytest.mark.parametrize(
    "what",
    [
        lambda m, y, f: {"y": y, "scale": m.scale.exp()},
        lambda m, y, f: {"y": y, "anchors": m.anchors * 2, "none": None, "count": 3},
        lambda m, y, f: {"y": y, "mean": f.mean()},
        lambda m, y, f: {"scale": m.scale.exp()[None, None].expand(2, 5), "y": y},
    ],
)
def test_outputs_without_an_axis_of_images_are_left_out(what):
    model = randomised(Returns(what))
    assert points(model) == ["body:output"]
    assert set(kinds(model)) == {"y"}
    anatomy = trace(model, X)
    plan = make_plan(model, anatomy, keep_width=0.5, scheme="all", score="l1")
    check_cut(anatomy, plan, model, cut(model, plan))


def test_a_seam_that_is_the_output_leaves_no_head():
    for model in (Chain(), Headless()):
        seam = find_seam(model, X, points=[":output"])
        assert seam.headless
        assert seam.scores is None
        assert [o.kind for o in seam.outputs] == ["embedding"]
    assert not find_seam(Chain(), X, points=["body"]).headless


class CosineHead(Chain):
    """Classes by the cosine between features and rows of a weight, as ArcFace trains them."""

    def __init__(self, product):
        super().__init__()
        del self.fc
        self.product, self.embed, self.weight = product, nn.Linear(16, 12), nn.Parameter(torch.randn(5, 12))

    def forward(self, x):
        x = self.embed(self.body(x).flatten(2).transpose(1, 2).reshape(-1, 16)).view(len(x), -1, 12).sum(1)
        return self.product(F.normalize(x), F.normalize(self.weight))


@pytest.mark.parametrize("product", [F.linear, lambda x, w: x @ w.t(), lambda x, w: 16 * torch.mm(x, w.t())])
def test_a_cosine_head_is_a_head(product):
    seam = find_seam(CosineHead(product), X)
    assert "weight" in seam.head
    assert (seam.headless, [o.kind for o in seam.outputs]) == (False, ["scores"])


class TimeFirst(nn.Module):
    """A recurrent layer that takes and returns images on axis 1."""

    def __init__(self):
        super().__init__()
        self.stem, self.lstm, self.fc = nn.Conv2d(3, 10, 3, (2, 1), 1), nn.LSTM(40, 12), nn.Linear(12, 5)

    def forward(self, x):
        x = F.relu(self.stem(x)).flatten(1, 2)
        return self.fc(self.lstm(x.permute(2, 0, 1))[0])


@pytest.mark.parametrize("width", [8, 2])  # two positions are as many as images: only another batch tells them apart
def test_images_need_not_be_on_the_first_axis(width):
    model, example = randomised(TimeFirst()), torch.zeros(2, 3, 8, width)
    anatomy = trace(model, example)
    seam = anatomy.seam
    assert [str(p) for p in seam.points] == ["lstm:output.0"]
    assert (seam.batch_axes, seam.shapes) == ((1,), ((width, 12),))
    assert [o.batch_axis for o in seam.outputs] == [1]
    images = torch.randn(3, 3, 8, width)
    with torch.no_grad(), capturing(model, seam) as capture:
        (features,) = capture.features(images)
        wanted = model.lstm(F.relu(model.stem(images)).flatten(1, 2).permute(2, 0, 1))[0]
    assert torch.equal(features, wanted.transpose(0, 1))
    plan = make_plan(model, anatomy, keep_width=0.5, scheme="all", score="l1")
    check_cut(anatomy, plan, model, cut(model, plan))
    assert Seam.from_json(seam.to_json()) == seam


def test_a_point_that_no_image_has_a_part_in_is_refused():
    class Constant(Chain):
        def __init__(self):
            super().__init__()
            self.table, self.shift = nn.Parameter(torch.rand(1, 16)), nn.Linear(16, 16)

        def forward(self, x):
            return self.fc(self.pool(self.body(x)).flatten(1) + self.shift(self.table))

    assert points(Constant()) == ["body:output"]
    with pytest.raises(UnsupportedModel, match="shift:output is the same tensor for any number of images"):
        find_seam(Constant(), X, points=["shift"])


class Twice(Residual):
    def forward(self, x):
        y = super().forward(x)
        return {"a": y, "b": y, "c": [y, y[:, :2]]}


def test_blocks_can_be_dropped_where_one_tensor_is_returned_twice():
    assert [b.name for b in droppable(trace(Twice(), X))] == [b.name for b in droppable(trace(Residual(), X))] != []


def test_kinds_are_set_by_part_or_for_all():
    seam = Seam((SeamPoint("body"),), ((8,),), (), outputs=(Output("a", "scores", "softmax"), Output("b", "values")))
    assert [o.kind for o in with_kinds(seam, "embedding").outputs] == ["embedding", "embedding"]
    assert [o.kind for o in with_kinds(seam, ["b=scores"]).outputs] == ["scores", "scores"]
    assert with_kinds(seam, {"a": "values"}).scores is None
    assert with_kinds(seam, None) is seam
    with pytest.raises(InputError, match="found 'classes', expected one of scores, multilabel"):
        with_kinds(seam, "classes")
    with pytest.raises(InputError, match="the output 'c': the network returns 'a', 'b'"):
        with_kinds(seam, ["c=values"])


@pytest.mark.parametrize(
    ("what", "left_out"),
    [
        (lambda m, y, f: (y, f > 0), ("1",)),
        (lambda m, y, f: (y, f.argmax(1), f.mean()), ("1", "2")),
        (lambda m, y, f: (torch.fft.rfft2(f), y), ("0",)),
        (lambda m, y, f: (y, torch.stack([f.mean(), f.std()])), ("1",)),
        (lambda m, y, f: (y, m.scale, None, 3), ()),
        (lambda m, y, f: (y, m.scale.exp()), ("1",)),
    ],
)
def test_outputs_that_are_not_measured_are_named(what, left_out):
    seam = find_seam(Returns(what), X)
    assert seam.not_measured == left_out
    assert len(seam.outputs) == 1


def test_the_axis_of_classes_is_that_of_the_softmax():
    def axis(what):
        return find_seam(Returns(what), X).outputs[0].class_axis

    def wide(y):
        return y[:, :, None, None].expand(-1, -1, 4, 6)

    assert axis(lambda m, y, f: wide(y).softmax(1)) == 1
    assert axis(lambda m, y, f: wide(y).permute(0, 2, 3, 1).softmax(-1)) == 3
    assert axis(lambda m, y, f: y[:, None].expand(-1, 7, -1)) == 2

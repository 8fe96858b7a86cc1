"""Seam, groups and blocks of tiny nets that carry their own answers."""

import copy
import functools

import numpy as np
import pytest
import torch
from nets import NETS, Attributes, Chain, FunctionalPool, FusedHeads, Mixer, Residual
from torch import nn
from torch.nn import functional as F

from mimicut.anatomy.cost import count, count_traced
from mimicut.anatomy.find_seam import find_seam, trace
from mimicut.anatomy.graph import Anatomy
from mimicut.anatomy.operators import TABLE
from mimicut.anatomy.operators.rule_interface import unknown_operator
from mimicut.anatomy.selection import selections
from mimicut.anatomy.torch_calls import shapes_of
from mimicut.anatomy.tracing import RecurrentShapes
from mimicut.base.errors import InputError, UnsupportedModel
from mimicut.planning.planner import make_plan
from mimicut.proof.laws import check_budget, check_cut
from mimicut.proof.randomised import randomised
from mimicut.surgery.cut import cut
from mimicut.surgery.seam import SeamPoint


def free(anatomy: Anatomy) -> dict[str, int]:
    return {g.name: g.width for g in anatomy.groups.values() if g.pinned is None}


@pytest.mark.parametrize("net", NETS, ids=lambda n: n.__name__)
def test_seam_head_and_groups(net):
    model = randomised(net())
    anatomy = trace(model, model.example())
    assert [str(p) for p in anatomy.seam.points] == net.seam.split()
    assert anatomy.seam.head == net.head
    assert free(anatomy) == net.free


def test_every_member_of_a_residual_stream():
    model = Residual()
    stem = trace(model, model.example()).groups["stem"]
    tensors = {(m.tensor, m.dim) for m in stem.members}
    assert ("stage1.1.conv2.weight", 0) in tensors
    assert ("stage1.1.conv1.weight", 1) in tensors
    assert ("stage1.0.bn2.running_var", 0) in tensors
    assert ("stage2.0.down.0.weight", 1) in tensors
    assert not any(t.startswith(("fc", "stage2.1")) for t, _ in tensors)


def test_concatenated_makers_keep_their_places():
    from nets import Concat

    model = Concat()
    group = trace(model, model.example()).groups["b"]
    consumer = next(m for m in group.members if (m.tensor, m.dim) == ("last.weight", 1))
    assert consumer.units.tolist() == [-1] * 6 + [0, 1, 2, 3] + [-1] * 5


def test_blocks_know_stage_place_and_identity():
    model = Residual()
    blocks = trace(model, model.example()).blocks
    assert [(b.name, b.identity, b.stage, b.place, b.last) for b in blocks] == [
        ("stage1.0", True, 0, 0, False),
        ("stage1.1", True, 0, 1, False),
        ("stage1.2", True, 0, 2, True),
        ("stage2.0", False, 1, 0, False),
        ("stage2.1", True, 1, 1, True),
    ]


def test_numbers_that_are_literals_are_corrected_and_those_in_attributes_follow():
    model = randomised(Attributes())
    anatomy = trace(model, model.example())
    held = {(s.attribute, s.value) for s in anatomy.sizes if s.attribute in ("width", "kept")}
    assert held == {("width", 5), ("kept", 5)}
    plan = make_plan(model, anatomy, keep_width=0.5)
    assert plan.calls == [{"module": "", "function": "view", "index": 1, "place": 1, "from": 6, "to": 3}]
    student = cut(model, plan)
    assert (student.width, student.kept) == (3, 3)
    for images in (1, 2, 5):  # the literal stands beside -1: how many images there are is free
        assert student(torch.zeros(images, *model.size)).shape == (images, 5)


def test_an_operator_outside_the_table_is_pinned_never_guessed():
    class Odd(Chain):
        def forward(self, x):
            x = self.body[2](self.body[1](self.body[0](x)))
            x = torch.cummax(x, 1).values
            for layer in self.body[3:]:
                x = layer(x)
            return self.fc(self.pool(x).flatten(1))

    anatomy = trace(Odd(), Odd().example())
    assert ("aten.cummax.default", "<model>") in anatomy.unread
    assert "cummax" in anatomy.groups["body.0"].pinned
    assert anatomy.groups["body.3"].pinned is None


def test_arguments_and_keywords_are_an_example():
    class Two(Chain):
        def forward(self, x, *, scale):
            return super().forward(x * scale)

    anatomy = trace(Two(), ((torch.zeros(2, 3, 8, 8),), {"scale": torch.ones(1)}))
    assert free(anatomy) == Chain.free


def test_parameters_that_no_operator_uses_are_listed():
    model = Chain()
    model.aux = nn.Linear(3, 3)
    assert trace(model, model.example()).unused == ("aux.weight", "aux.bias")


def test_seam_can_be_named_and_pins_what_it_names():
    model = Residual()
    anatomy = trace(model, model.example(), points=["stage1", SeamPoint("stage2")])
    assert anatomy.seam.shapes == ((8, 8, 8), (16, 4, 4))
    assert anatomy.groups["stem"].pinned == "the seam's own channels"


def test_a_later_call_of_one_module_can_be_the_seam():
    from nets import Shared

    model = Shared()
    anatomy = trace(model, model.example(), points=["act:output@2"])
    assert anatomy.seam.shapes == ((8, 8, 8),)
    assert "inner.weight" in anatomy.seam.head


@pytest.mark.parametrize("points", [["nowhere"], ["body:output@7"], ["body:sideways"]])
def test_a_seam_that_is_not_there(points):
    with pytest.raises(UnsupportedModel, match=r"nowhere|never reached|sideways"):
        trace(Chain(), Chain().example(), points=points)


def test_meta_is_refused():
    with pytest.raises(UnsupportedModel, match=r"body.0.weight is on the meta device"):
        trace(Chain().to("meta"), torch.zeros(2, 3, 8, 8))


class _Gate(nn.Module):
    """What it does depends on the values that it sees."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        if self.how == "branch" and x.max() > 1.5:
            x = x * 0.5
        if self.how == "assert":
            assert x.abs().max() < 1e9, "too large"
        if self.how == "exit" and bool((x == 0).all()):
            return x
        if self.how == "number":
            x = x[:, : int(x.abs().sum().item()) + 1]
        if self.how == "numpy":
            x = torch.from_numpy(x.numpy())
        return x


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("branch", 'if self.how == "branch" and x.max() > 1.5:'),
        ("assert", "assert x.abs().max() < 1e9"),
        ("exit", 'if self.how == "exit" and bool((x == 0).all()):'),
        ("number", "x = x[:, : int(x.abs().sum().item()) + 1]"),
        ("numpy", "x = torch.from_numpy(x.numpy())"),
    ],
)
def test_code_that_depends_on_values_is_named_by_file_line_and_module(how, line, capfd):
    model = Chain()
    model.body.append(_Gate(how))
    with pytest.raises(UnsupportedModel) as refused:
        trace(model, model.example())
    text = str(refused.value)
    assert text.startswith("tracing Chain with inputs (2, 3, 8, 8): torch.export stopped in body.8 (")
    assert f"{__file__}, line {_line(line)}: `{line}" in text
    assert "a data-dependent step" in text
    assert "Take that step out of the network: wrap what is left" in text
    assert capfd.readouterr().err == ""


def _line(code):
    with open(__file__, encoding="utf-8") as lines:
        return next(i for i, each in enumerate(lines, 1) if each.strip().startswith(code))


class _Found(nn.Module):
    """A network whose last step depends on values, after parts that take the images alone."""

    def __init__(self):
        super().__init__()
        self.first, self.net, self.last = nn.Conv2d(3, 3, 1), Chain(), nn.Linear(5, 2)

    def forward(self, x):
        scores = self.last(self.net(x)) + self.first(x).mean()
        return scores[scores.max(1).values > 0.5]


def test_a_submodule_that_can_be_traced_is_named():
    model = _Found()
    with pytest.raises(UnsupportedModel, match=r"Its submodule 'net' can be traced: compress that with --part net"):
        trace(model, torch.zeros(2, 3, 8, 8))
    trace(model.net, torch.zeros(2, 3, 8, 8))
    assert not model.net._forward_pre_hooks


def test_a_wrong_example_shape_is_refused_with_the_shape():
    with pytest.raises(UnsupportedModel, match=r"\(2, 4, 8, 8\)"):
        trace(Chain(), torch.zeros(2, 4, 8, 8))


def test_tracing_leaves_everything_as_it_was():
    model = FunctionalPool().train()
    model.bn.eval()
    model.a.weight.requires_grad_(False)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    random = torch.get_rng_state()
    trace(model, torch.randn(2, 3, 8, 8, generator=torch.Generator()))
    with pytest.raises(UnsupportedModel):
        trace(model, torch.zeros(2, 4, 8, 8))
    assert model.training
    assert model.a.training
    assert not model.bn.training
    assert not model.a.weight.requires_grad
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("name", "reason"), [("nowhere", "no such module"), ("stage2.0", "of the same shape"), ("", "no such")]
)
def test_a_block_that_cannot_be_dropped(name, reason):
    with pytest.raises(InputError, match=reason):
        trace(Residual(), Residual().example(), drop=[name])


class _Insists(Chain):
    def forward(self, x):
        x = self.body[:3](x)
        if x.shape[1] != 8:
            raise ValueError(f"found {x.shape[1]} channels, expected 8")
        return self.fc(self.pool(self.body[3:](x)).flatten(1))


class _Chooses(Chain):
    def forward(self, x):
        x = self.body[:3](x)
        x = x * x.shape[1] if x.shape[1] > 7 else x + x
        return self.fc(self.pool(self.body[3:](x)).flatten(1))


class _Computed(Chain):
    """Half of the channels by arithmetic (CSP style): 15 // 2 is right by accident when one of 16 is gone."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x):
        x = self.body[:6](x)
        half = x.shape[1] // 2
        x = torch.cat([self.mix(x[:, :half]), x[:, half:]], 1)
        return self.fc(self.pool(self.body[6:](x)).flatten(1))


class _Scaled(Chain):
    def forward(self, x):
        x = self.body[:3](x)
        return self.fc(self.pool(self.body[3:](x * x.shape[1] ** -0.5)).flatten(1))


class _TwoUsers(Chain):
    """One attribute holds the size of two groups that need not stay equal."""

    def __init__(self):
        super().__init__()
        self.width = 8
        self.body[3] = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.body[4], self.body[6] = nn.BatchNorm2d(8), nn.Conv2d(8, 16, 1)

    def forward(self, x):
        x = self.body[:3](x)
        x = self.body[3:6](x.view(x.shape[0], self.width, 8, 8))
        return self.fc(self.pool(self.body[6:](x.view(x.shape[0], self.width, 8, 8))).flatten(1))


class _PooledChannels(Chain):
    def forward(self, x):
        x = self.body[:3](x).permute(0, 2, 3, 1)
        x = nn.functional.max_pool2d(x, (1, 3), stride=1, padding=(0, 1)).permute(0, 3, 1, 2)
        return self.fc(self.pool(self.body[3:](x)).flatten(1))


@pytest.mark.parametrize(
    ("net", "pinned", "words", "extra"),
    [
        (_Insists, "body.0", "the code stops (relu in body.2) with ValueError: found 6 channels, expected 8", {}),
        (_Chooses, "body.0", "after a cut the code takes another way (add in <model>)", {}),
        (_PooledChannels, "body.0", "pooled, resized or padded along its channels (max_pool2d", {}),
    ],
)
def test_code_that_depends_on_a_width_is_pinned_not_guessed(net, pinned, words, extra):
    model = randomised(net())
    anatomy = trace(model, model.example())
    assert words in anatomy.groups[pinned].pinned
    assert free(anatomy) == {n: w for n, w in net.free.items() if n != pinned} | extra


def test_class_scores_among_other_outputs():
    class Two(Chain):
        def forward(self, x):
            x = self.body(x)
            return self.fc(self.pool(x).flatten(1)), x

    assert str(find_seam(Two(), Two().example()).points[0]) == "body:output"


@pytest.mark.parametrize("pool", [lambda x: x[:, 0], lambda x: x[:, 1:].mean(1), lambda x: x[:, 0] + x[:, 1]])
def test_the_seam_of_tokens_lies_before_one_is_chosen(pool):
    class Tokens(FusedHeads):
        def forward(self, x):
            x = self.patch(x).flatten(2).transpose(1, 2)
            return self.fc(pool(self.norm(x + self.attend(self.before(x)))))

    seam = find_seam(Tokens(), Tokens().example())
    assert ([str(p) for p in seam.points], seam.shapes) == (["norm:output"], ((4, 12),))


_ORDER = torch.tensor([1, 0, 2, 3, 4, 5, 7, 6])


@pytest.mark.parametrize(
    ("between", "free"),
    [
        (lambda x: x.roll(2, 2), True),
        (lambda x: x.roll(1, 1), False),
        (lambda x: x.flip(3), True),
        (lambda x: x.flip(1), False),
        (lambda x: x[:, :, _ORDER], True),
        (lambda x: x[:, _ORDER], False),
        (lambda x: x[:, :, _ORDER, _ORDER].unsqueeze(-1).expand(-1, -1, -1, 8), True),
        (lambda x: x.index_select(3, _ORDER), True),
        (lambda x: x.index_select(1, _ORDER), False),
        (lambda x: x.flatten(2).reshape_as(x), True),
        (lambda x: x.mean((2, 3), keepdim=True).sigmoid().expand_as(x) * x, True),
        (lambda x: x.masked_fill(x > 0.5, 0.1), True),
        (lambda x: x + x.new_zeros(1), True),
        (lambda x: x.unfold(2, 2, 2).mean(-1).repeat_interleave(2, 2), True),
        (lambda x: x.unfold(1, 2, 1).mean(-1).repeat(1, 2, 1, 1)[:, :8], False),
        (lambda x: x.repeat(1, 1, 1, 2)[..., 4:12], True),
        (lambda x: sum(x.repeat(1, 2, 1, 1).chunk(2, 1)), True),
        (lambda x: F.fold(F.unfold(x, 2, stride=2), (8, 8), 2, stride=2), True),
        (lambda x: x / torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True), True),
        (lambda x: x / torch.linalg.vector_norm(x, dim=1, keepdim=True), True),
        (lambda x: x * x.mean(1, keepdim=True).sigmoid() + x.amax(1, keepdim=True), True),
        (lambda x: (x - x.mean(1, keepdim=True)) / x.var(1, keepdim=True).sqrt(), True),
        (lambda x: x.softmax(1) * x, True),
        (lambda x: x.sum(1, keepdim=True) / x.shape[1] * x, True),
        (lambda x: F.group_norm(x, 1), True),
        (lambda x: torch.stack([x, -x]).unbind(0)[1], True),
        (lambda x: sum(x.unbind(1)).unsqueeze(1).expand(-1, 8, -1, -1), False),
        (lambda x: torch.cat([v.unsqueeze(3) for v in x.unbind(3)], 3), True),
        (lambda x: x.mT.sigmoid().mT, True),
        (lambda x: x.swapdims(1, 3).sigmoid().swapdims(1, 3), True),
        (lambda x: torch.movedim(torch.moveaxis(x, 1, -1).sigmoid(), 3, 1), True),
        (lambda x: torch.movedim(torch.movedim(x, (1, 2), (3, 1)).sigmoid(), (3, 1), (1, 2)), True),
        (lambda x: x * x.max(1, keepdim=True)[0], True),
        (lambda x: x * x.max(1, keepdim=True)[1], False),
        (lambda x: x - x.min(2, keepdim=True).values + x.max(), True),
        (lambda x: torch.max(x, x.mean(1, keepdim=True)), True),
        (lambda x: x * torch.var_mean(x, 1, keepdim=True)[0] - torch.std_mean(x, (2, 3), keepdim=True)[1], True),
        (lambda x: F.normalize(x, dim=1), True),
        (lambda x: x.mean(1, keepdim=True).expand_as(x), True),
        (lambda x: x.flatten(2).reshape_as(x) + torch.ones_like(x), True),
        (lambda x: x.cumsum(2), True),
        (lambda x: x.cumsum(1), False),
        (lambda x: F.instance_norm(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (8, 8)), True),
        (lambda x: torch.fft.irfft2(torch.fft.rfft2(x, norm="ortho") * 2, s=(8, 8), norm="ortho"), True),
        (lambda x: torch.fft.fft(torch.fft.fftn(x, dim=(2, 3)), dim=2).real, True),
        (lambda x: torch.fft.fft(torch.fft.fft2(x), dim=1).real, False),
        (lambda x: torch.fft.fftn(x).imag, False),
        (lambda x: torch.view_as_real(torch.view_as_complex(torch.stack([x, -x], -1)) * 2).sum(-1), True),
        (lambda x: x.sort(2).values + x.topk(8, 3).values + x.argsort(3), True),
        (lambda x: torch.sort(x, dim=3, stable=True)[0], True),
        (lambda x: x.sort(1)[0], False),
        (lambda x: torch.sort(x, dim=1, stable=True)[0], False),
        (lambda x: x.tril() + x.triu(), True),
        (lambda x: x.transpose(1, 2).tril().transpose(1, 2), False),
        (lambda x: F.grid_sample(x.mT.transpose(1, 3), x.mean(1)[..., None].expand(-1, -1, -1, 2)).mT, False),
        (lambda x: F.grid_sample(x, x.mean(1)[..., None].expand(-1, -1, -1, 2), align_corners=False), True),
        (lambda x: torch.baddbmm(x.flatten(2), x.flatten(2), x.new_ones(64, 64).expand(2, 64, 64)).view(x.shape), True),
        (lambda x: F.conv1d(x.mean((2, 3))[:, None], x.new_ones(1, 1, 1))[0, 0][:, None, None] * x, True),
        (lambda x: F.conv1d(x.mean((2, 3))[:, None], x.new_ones(1, 1, 3), padding=1)[0, 0][:, None, None] * x, False),
        (lambda x: F.conv1d(x.mean((2, 3))[:, None], x.new_ones(1, 1, 1), stride=2).sum(2)[..., None, None] + x, False),
        (
            lambda x: F.conv1d(x.mean((2, 3))[:, None], x.new_ones(1, 1, 1), padding=1).sum(2)[..., None, None] + x,
            False,
        ),
        (lambda x: x + x.new_full((2, 8, 8, 8), 0.5), True),
        (lambda x: x + x.new_full((2, x.shape[1], 8, 8), 0.5) + torch.zeros(1, x.shape[1], 1, 1), True),
    ],
)
def test_operators_between_two_layers(between, free):
    """What keeps channels apart leaves them free, and the cut is right; what mixes or orders them pins them."""

    class Between(Chain):
        def forward(self, x):
            return self.fc(self.pool(self.body[3:](between(self.body[:3](x)))).flatten(1))

    model = randomised(Between())
    anatomy = trace(model, model.example())
    assert not anatomy.unread
    assert (anatomy.groups["body.0"].pinned is None) == free, anatomy.groups["body.0"].pinned
    plan = make_plan(model, anatomy, keep_width=0.5, scheme="all")
    assert check_cut(anatomy, plan, model, cut(model, plan))["error"] <= 1e-10


def test_standardised_weights_are_standardised_over_what_is_kept():

    class Standardised(nn.Conv2d):
        def forward(self, x):
            flat = self.weight.reshape(1, self.out_channels, -1)
            weight = F.batch_norm(flat, None, None, training=True, momentum=0.0).reshape_as(self.weight)
            return F.conv2d(x, weight, self.bias)

    class Net(Chain):
        def __init__(self):
            super().__init__()
            self.body[6] = Standardised(12, 16, 1)

    model = randomised(Net())
    anatomy = trace(model, model.example())
    assert free(anatomy) == Chain.free
    plan = make_plan(model, anatomy, keep_width=0.5, scheme="all")
    assert check_cut(anatomy, plan, model, cut(model, plan))["error"] <= 1e-10


def test_channels_that_a_computed_weight_makes_are_cut():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return F.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias, padding=1)

    class Net(Chain):
        def __init__(self):
            super().__init__()
            self.body[3] = Standardised(8, 12, 3)
            self.first, self.second = nn.Parameter(torch.zeros(8, 4)), nn.Parameter(torch.zeros(4, 8))

        def forward(self, x):
            x = F.conv2d(self.body[:3](x), (self.first @ self.second)[:, :, None, None])
            return self.fc(self.pool(self.body[3:](x)).flatten(1))

    model = randomised(Net())
    anatomy = trace(model, model.example())
    assert free(anatomy) == {"body.0": 8, "first": 8, "body.3": 12}
    plan = make_plan(model, anatomy, keep_width=0.5, scheme="all")
    student = cut(model, plan)
    assert (student.first.shape, student.second.shape, student.body[3].weight.shape) == ((4, 4), (4, 4), (6, 4, 3, 3))
    assert check_cut(anatomy, plan, model, student)["error"] <= 1e-10


def test_few_wide_groups_of_a_convolution_lose_the_same_places():
    class Net(Chain):
        def __init__(self):
            super().__init__()
            self.body[3] = nn.Conv2d(8, 12, 3, padding=1, groups=2, bias=False)

    model = randomised(Net())
    anatomy = trace(model, model.example())
    assert free(anatomy) == {"body.0": 4, "body.3": 6}
    plan = make_plan(model, anatomy, keep_width=0.5, scheme="all")
    student = cut(model, plan)
    assert student.body[3].weight.shape == (6, 2, 3, 3)
    assert student.body[3].groups == 2
    assert check_cut(anatomy, plan, model, student)["error"] <= 1e-10
    check_budget(plan, count_traced(anatomy.traced), count(student, model.example()))


class _Parameter(Chain):
    """Between its layers, something with a parameter of as many channels."""

    def __init__(self, between, *size):
        super().__init__()
        self.between, self.held = between, nn.Parameter(torch.zeros(size))

    def forward(self, x):
        return self.fc(self.pool(self.body[3:](self.between(self.body[:3](x), self.held))).flatten(1))


@pytest.mark.parametrize(
    ("between", "size"),
    [
        (lambda x, held: torch.clamp(x, min=held), (1, 8, 1, 1)),
        (lambda x, held: x.clamp_max(held), (8, 1, 1)),
        (lambda x, held: (held @ x.flatten(2)).view_as(x), (8, 8)),
        (
            lambda x, held: torch.addmm(x.amax((2, 3)), x.mean((2, 3)), held)[..., None, None].expand(-1, -1, 8, 8),
            (8, 8),
        ),
    ],
)
def test_parameters_that_go_with_channels(between, size):
    model = randomised(_Parameter(between, *size))
    anatomy = trace(model, model.example())
    assert free(anatomy) == Chain.free
    plan = make_plan(model, anatomy, keep_width=0.5, scheme="all")
    student = cut(model, plan)
    assert student.held.numel() < model.held.numel()
    assert check_cut(anatomy, plan, model, student)["error"] <= 1e-10


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (lambda x, w: x @ w, (8, 6)),
        (lambda x, w: torch.mm(x.flatten(0, 2), w.t()).view(*x.shape[:3], -1), (6, 8)),
        (lambda x, w: torch.addmm(x.flatten(0, 2) @ w, x.flatten(0, 2), w).unflatten(0, (-1, 8, 8)), (8, 6)),
    ],
)
def test_a_linear_layer_by_hand_makes_channels(layer, size):
    class Net(_Parameter):
        def __init__(self):
            super().__init__(lambda x, held: layer(x.permute(0, 2, 3, 1), held).permute(0, 3, 1, 2), *size)
            self.body[3] = nn.Conv2d(6, 12, 3, padding=1, bias=False)

    model = randomised(Net())
    anatomy = trace(model, model.example())
    assert not anatomy.unread
    before = count_traced(anatomy.traced)
    plan = make_plan(model, anatomy, keep_width=0.5, scheme="all")
    student = cut(model, plan)
    assert free(anatomy) == {"body.0": 8, "held": 6, "body.3": 12}
    assert sorted(student.held.shape) == [3, 4]
    assert check_cut(anatomy, plan, model, student)["error"] <= 1e-10
    check_budget(plan, before, count(student, model.example()))


@functools.cache
def _ramp(length):
    return torch.linspace(0, 1, length)


def test_code_that_caches_is_left_with_values():
    """In the cached function a trace would leave tensors without any, for the user's network too."""

    class Caches(Chain):
        def forward(self, x):
            return super().forward(x * _ramp(x.shape[3]) + _ramp(x.shape[3]))

    _ramp.cache_clear()
    model = randomised(Caches())
    trace(model, model.example())
    assert type(_ramp(8)) is torch.Tensor
    trace(model, model.example())
    assert model(model.example()).shape == (2, 5)


_TABLES = {}


def test_code_that_keeps_tables_in_a_dictionary_finds_its_own():
    """Of a pass without data, at another width, or in float64, nothing may stay there."""

    class Tables(Chain):
        tables = {}

        def forward(self, x):
            x = self.body[:3](x)
            for held in (_TABLES, self.tables):
                if x.shape[1] not in held:
                    held[x.shape[1]] = torch.arange(x.shape[3], dtype=x.dtype, device=x.device)
                x = x * held[x.shape[1]]
            return self.fc(self.pool(self.body[3:](x)).flatten(1))

    _TABLES.clear()
    model = randomised(Tables())
    anatomy = trace(model, model.example())
    assert free(anatomy) == Chain.free
    plan = make_plan(model, anatomy, keep_width=0.5, scheme="all")
    assert check_cut(anatomy, plan, model, cut(model, plan))["error"] <= 1e-10
    assert (_TABLES, Tables.tables) == ({}, {})
    model(model.example())
    own = _TABLES[8]
    check_cut(anatomy, plan, model, cut(model, plan))
    assert _TABLES.keys() == {8} == Tables.tables.keys()
    assert _TABLES[8] is own


class _Keeps(Chain):
    def forward(self, x):
        self.last = self.body(x)
        self.shapes = [self.last.shape]
        return self.fc(self.pool(self.last).flatten(1))


def test_code_that_keeps_what_it_computes():
    model = randomised(_Keeps())
    model(torch.zeros(2, 3, 8, 8))  # with gradients: what is kept cannot be copied as it is
    kept = model.last
    anatomy = trace(model, model.example())
    assert model.last is kept
    assert not hasattr(anatomy.traced.model, "last") or type(anatomy.traced.model.last) is torch.Tensor
    plan = make_plan(model, anatomy, keep_width=0.5, scheme="all")
    assert check_cut(anatomy, plan, model, cut(model, plan))["error"] <= 1e-10


def test_reading_a_network_does_not_write_to_its_buffers():
    class Counts(Chain):
        def __init__(self):
            super().__init__()
            self.width, self.scale = 8, torch.ones(1)  # the scale is no buffer, so it does not run without data
            self.register_buffer("passes", torch.zeros(1))

        def forward(self, x):
            self.passes += 1
            x = self.body[:3](x).view(x.shape[0], self.width, -1).view(x.shape[0], self.width, 8, 8)
            return self.fc(self.pool(self.body[3:](x * self.scale)).flatten(1))

    model = Counts().eval()
    assert free(trace(model, model.example())) == Chain.free
    assert model.passes.item() == 0


def test_a_size_that_depends_on_values_is_refused_with_operator_and_module():
    class Boxes(Chain):
        def forward(self, x):
            scores = super().forward(x)
            return scores[scores[:, 0] > 0]

    with pytest.raises(UnsupportedModel, match=r"how much index in <model> returns depends on the values.*--part"):
        trace(Boxes(), Boxes().example())


@pytest.mark.parametrize(("net", "extra"), [(_Computed, {"mix": 6}), (_Scaled, {})])
def test_numbers_that_are_computed_from_a_width_are_corrected(net, extra):
    model = randomised(net())
    anatomy = trace(model, model.example())
    assert free(anatomy) == net.free | extra
    plan = make_plan(model, anatomy, keep_width=0.5, scheme="all")
    assert check_cut(anatomy, plan, model, cut(model, plan))["error"] <= 1e-10


def test_a_size_that_comes_from_another_groups_width_is_corrected():
    class Shaped(Chain):
        def __init__(self):
            super().__init__()
            self.mix = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8))

        def forward(self, x):
            x = self.body[:3](x)
            x = self.mix(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)
            return self.fc(self.pool(self.body[3:](x)).flatten(1))

    model = randomised(Shaped())
    anatomy = trace(model, model.example())
    assert free(anatomy) == {"body.0": 8, "mix.0": 6, "mix.1": 8, "body.3": 12}
    plan = make_plan(model, anatomy, keep_width=0.5, scheme="all")
    assert check_cut(anatomy, plan, model, cut(model, plan))["error"] <= 1e-10


class _Odd(Chain):
    """Between its layers, numbers that are computed from attributes; `between` says how."""

    def __init__(self, between, **attributes):
        super().__init__()
        self.between = between
        vars(self).update(attributes)

    def forward(self, x):
        x = self.between(self, self.body[:3](x))
        return self.fc(self.pool(self.body[3:](x)).flatten(1))


@pytest.mark.parametrize(
    ("between", "attributes", "edits"),
    [
        # images times heads, twice over; a width that is as large
        (
            lambda net, x: x.reshape(x.shape[0] * net.heads, net.inner, 64).view(-1, net.heads * net.inner, 8, 8),
            {"heads": 4, "inner": 2, "other": 4},
            {"heads"},
        ),
        # three numbers of one size from two attributes, in one call
        (
            lambda net, x: torch.cat([v for v in x.split([net.one, net.one, net.two, net.two], 1)][::-1], 1),
            {"one": 2, "two": 2, "three": 2},
            {"one", "two"},
        ),
        (lambda net, x: torch.cat(x.split(net.sizes, 1)[::-1], 1), {"sizes": [2, 2, 2, 2]}, {"sizes"}),
        (lambda net, x: x.view(x.shape[0], net._inner, -1).view(x.shape[0], -1, 8, 8), {"_inner": 8}, {"_inner"}),
    ],
)
def test_numbers_are_followed_to_the_attributes_they_come_from(between, attributes, edits):
    model = randomised(_Odd(between, **attributes))
    anatomy = trace(model, model.example())
    assert anatomy.groups["body.0"].pinned is None
    found = selections(anatomy, {"body.0": list(range(0, anatomy.groups["body.0"].width, 2))})[1]
    assert {e["attribute"] for e in found if not e["module"]} == edits
    plan = make_plan(model, anatomy, keep_width=0.5, scheme="all")
    assert check_cut(anatomy, plan, model, cut(model, plan))["error"] <= 1e-10
    assert vars(model)["_modules"].keys() == _Odd(between, **attributes)._modules.keys()


def test_one_attribute_of_several_groups_ties_them():
    model = randomised(_TwoUsers())
    anatomy = trace(model, model.example())
    assert free(anatomy) == {"body.0": 8}
    assert {m.tensor for m in anatomy.groups["body.0"].members} >= {"body.0.weight", "body.3.weight"}
    plan = make_plan(model, anatomy, keep_width=0.5, scheme="all")
    assert cut(model, plan).width == 4
    assert check_cut(anatomy, plan, model, cut(model, plan))["error"] <= 1e-10


def test_a_region_without_autocast_is_read_like_any_other():
    class Net(Chain):
        def forward(self, x):
            x = self.body[:3](x)
            with torch.autocast("cpu", enabled=False):
                x = self.body[3:](x.float())
            return self.fc(self.pool(x).flatten(1))

    model = randomised(Net())
    anatomy = trace(model, model.example())
    assert not anatomy.unread
    assert free(anatomy) == Chain.free


def test_a_module_that_is_held_under_two_names_is_read_under_its_first():
    class Encode(nn.Module):
        def __init__(self):
            super().__init__()
            self.width = 8

        def forward(self, x):
            return x.flatten(2).view(x.shape[0], self.width, 8, 8)

    class Net(Chain):
        def __init__(self):
            super().__init__()
            self.one = Encode()
            self.holder = nn.ModuleList([nn.Sequential(self.one)])

        def forward(self, x):
            x = self.holder[0](self.body[:3](x))
            return self.fc(self.pool(self.body[3:](self.one(x))).flatten(1))

    model = randomised(Net())
    anatomy = trace(model, model.example())
    assert not anatomy.unread
    assert anatomy.groups["body.0"].pinned is None
    plan = make_plan(model, anatomy, keep_width=0.5, scheme="all")
    assert [e["module"] for e in plan.edits if e["attribute"] == "width"] == ["one"]
    assert check_cut(anatomy, plan, model, cut(model, plan))["error"] <= 1e-10


class _Repeated(Mixer):
    """Four query heads share two key heads, whose keys and values are repeated by hand; a rotation of the positions."""

    def __init__(self, repeat):
        super().__init__()
        self.heads, self.groups, self.repeat = 4, 2, repeat
        self.k, self.v, self.q = nn.Linear(12, 6), nn.Linear(12, 6), nn.Linear(12, 12)
        self.proj = nn.Linear(12, 12)
        self.register_buffer("angles", torch.rand(4, 3))

    def attend(self, x):
        n, tokens, _ = x.shape
        k, v = (layer(x).view(n, tokens, self.groups, 3).transpose(1, 2) for layer in (self.k, self.v))
        q = self.q(x).view(n, tokens, self.heads, 3).transpose(1, 2) * self.angles
        k, v = self.repeat(k * self.angles, self.heads // self.groups), self.repeat(v, self.heads // self.groups)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    "repeat",
    [
        lambda t, times: t.repeat_interleave(times, 1),
        lambda t, times: t[:, :, None].expand(-1, -1, times, -1, -1).reshape(t.shape[0], -1, *t.shape[2:]),
    ],
)
def test_key_heads_that_are_repeated_by_hand_are_cut(repeat):
    model = randomised(_Repeated(repeat))
    anatomy = trace(model, model.example())
    assert set(free(anatomy).values()) == {2}
    plan = make_plan(model, anatomy, keep_width=0.5)
    student = cut(model, plan)
    assert (student.heads, student.groups) == (2, 1)
    assert check_cut(anatomy, plan, model, student)["error"] <= 1e-10


class _Recurrent(Chain):
    """Rows of the map are sequences of pixels. `hidden`: what the layer is given as its first state, if anything."""

    def __init__(self, kind, hidden=None, **options):
        super().__init__()
        self.units, self.hidden = 4, hidden
        self.rnn = kind(8, 4, batch_first=options.pop("batch_first", True), **options)
        self.body[3] = nn.Conv2d(8 if self.rnn.bidirectional else 4, 12, 3, padding=1, bias=False)

    def forward(self, x):
        x = self.body[:3](x).permute(0, 2, 3, 1).flatten(0, 1)
        x = x if self.rnn.batch_first else x.transpose(0, 1)
        found, _ = self.rnn(x) if self.hidden is None else self.rnn(x, self.hidden(self, x))
        found = found if self.rnn.batch_first else found.transpose(0, 1)
        return self.fc(self.pool(self.body[3:](found.unflatten(0, (-1, 8)).permute(0, 3, 1, 2))).flatten(1))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    "options",
    [{}, {"bidirectional": True}, {"num_layers": 2, "bidirectional": True, "bias": False}, {"batch_first": False}],
)
def test_hidden_units_of_a_recurrent_layer_are_cut_whole(kind, options):
    model = randomised(_Recurrent(kind, **options))
    anatomy = trace(model, model.example())
    assert not anatomy.unread
    assert free(anatomy) == {"body.0": 8, "rnn": 4, "body.3": 12}
    before = count_traced(anatomy.traced)
    gates, layers, both = len(model.rnn.weight_hh_l0) // 4, model.rnn.num_layers, 1 + model.rnn.bidirectional
    by_hand = 64 * gates * 4 * both * (8 + 4 + (layers - 1) * (4 * both + 4))  # 64 steps
    assert before.macs - count(_without_rnn(model), model.example()).macs == by_hand
    for keep in ({"keep_width": 0.5}, {"keep": 0.6}):
        plan = make_plan(model, anatomy, scheme="all", score="random", **keep)
        student = cut(model, plan)
        assert (student.rnn.hidden_size, student.rnn.input_size) == (plan.widths["rnn"], plan.widths["body.0"])
        assert check_cut(anatomy, plan, model, student)["error"] <= 1e-10
        check_budget(plan, before, count(student, model.example()))


def _without_rnn(model):
    class Same(nn.Module):
        batch_first, bidirectional = True, model.rnn.bidirectional

        def forward(self, x):
            return x if self.bidirectional else x[..., :4], None

    other = _Recurrent(nn.RNN, bidirectional=model.rnn.bidirectional)
    other.rnn = Same()
    return other


def test_hidden_units_against_zeroed_weights():
    """Independent of the traced reference."""
    model = randomised(_Recurrent(nn.LSTM, bidirectional=True, num_layers=2)).double()
    anatomy = trace(model, model.example().double())
    plan = make_plan(model, anatomy, keep_width=0.5, scheme="all")
    student = cut(model, plan)
    with torch.no_grad():
        for name, slices in plan.slices.items():
            for dim, kept in slices.items():
                if dim:
                    tensor = model.get_parameter(name)
                    tensor[:, [i for i in range(tensor.shape[1]) if i not in kept]] = 0
    x = torch.randn(3, *model.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(student(x), model(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("hidden", "free"),
    [
        (lambda net, x: (x.new_zeros(1, len(x), net.units), torch.ones(1, len(x), net.units, dtype=x.dtype)), True),
        (lambda net, x: (x.new_zeros(1, len(x), 4), x.new_zeros(1, len(x), 4)), True),
        (lambda net, x: (x.new_ones(4).cumsum(0).expand(1, len(x), 4),) * 2, False),
    ],
)
def test_a_first_state_that_the_code_makes(hidden, free):
    model = randomised(_Recurrent(nn.LSTM, hidden))
    anatomy = trace(model, model.example())
    assert (anatomy.groups["rnn"].pinned is None) == free, anatomy.groups["rnn"].pinned
    plan = make_plan(model, anatomy, keep_width=0.5, scheme="all")
    student = cut(model, plan)
    assert student.rnn.hidden_size == (2 if free else 4)
    assert check_cut(anatomy, plan, model, student)["error"] <= 1e-10


@pytest.mark.parametrize(
    "layer",
    [
        nn.LSTM(3, 4, batch_first=True, bidirectional=True, num_layers=2),
        nn.LSTM(3, 4, proj_size=2, bidirectional=True),
        nn.GRU(3, 4, num_layers=2),
        nn.RNN(3, 4, bidirectional=True),
        nn.RNN(3, 4, nonlinearity="relu"),
    ],
)
@pytest.mark.parametrize("size", [(2, 5, 3), (5, 3)])
def test_recurrent_layers_without_data_return_the_shapes_that_they_have_with_it(layer, size):
    expected = shapes_of(layer(torch.zeros(size)))
    with RecurrentShapes():
        assert shapes_of(copy.deepcopy(layer).to("meta")(torch.zeros(size, device="meta"))) == expected
        assert shapes_of(layer(torch.zeros(size))) == expected


def test_an_lstm_with_projections_is_pinned():
    model = randomised(_Recurrent(nn.LSTM, proj_size=3))
    model.body[3] = nn.Conv2d(3, 12, 3, padding=1, bias=False)
    anatomy = trace(model, model.example())
    assert "aten.lstm.input cannot be read" in anatomy.groups["body.0"].pinned
    assert anatomy.unread == (("aten.lstm.input", "rnn"),)
    assert free(anatomy) == {"body.3": 12}


@pytest.mark.parametrize("fault", [AttributeError, KeyError, TypeError, ValueError, IndexError])
def test_a_fault_in_a_rule_is_a_fault(monkeypatch, fault):
    """No operator is read as unknown because its rule is wrong; the message says which rule, and where it was used."""

    def faulty(reader, node):
        raise fault("a fault")

    monkeypatch.setitem(TABLE, "relu", faulty)
    with pytest.raises(fault, match="a fault") as caught:
        trace(Chain(), Chain().example())
    assert "aten.relu.default in body.2 by the rule faulty" in caught.value.__notes__[0]


@pytest.mark.parametrize("axes", [[None], [None, None, None, None, None], [None, np.arange(3), None, None]])
def test_a_rule_whose_answer_does_not_fit_is_a_fault(monkeypatch, axes):
    monkeypatch.setitem(TABLE, "relu", lambda reader, node: axes)
    with pytest.raises(AssertionError, match=r"the rule's channels do not fit the shape \(2, 8, 8, 8\)"):
        trace(Chain(), Chain().example())


@pytest.mark.parametrize(
    ("between", "operator"),
    [
        (lambda x: x.view(torch.int32).view(torch.float32), "aten.view.dtype"),
        (lambda x: x.view(torch.int16).view(torch.float32), "aten.view.dtype"),
        (lambda x: x / torch.ops.aten.std.default(x, False), "aten.std.default"),
        (lambda x: x + F.linear(x.transpose(1, 3), torch.ones(8))[:, None], "aten.linear.default"),
        (lambda x: x * x.mean((0, 2, 3)).t()[:, None, None], "aten.t.default"),
        (lambda x: x + F.unfold(x[0], 3, padding=1).mean(0).view(8, 8), "aten.im2col.default"),
        (lambda x: x * F.prelu(x, torch.ones(())), "aten.prelu.default"),
        (lambda x: x + (x.transpose(1, 3) @ torch.ones(8))[:, None], "aten.matmul.default"),
        (lambda x: torch.einsum("...hw->...wh", x), "aten.einsum.default"),
        (
            lambda x: x + F.scaled_dot_product_attention(x.flatten(2), x[0].flatten(1)[:3], x[0].flatten(1)[:3]).sum(),
            "aten.scaled_dot_product_attention.default",
        ),
        (
            lambda x: x.repeat_interleave(torch.tensor([1] * 8), dim=1, output_size=8),
            "aten.repeat_interleave.self_Tensor",
        ),
        (lambda x: x + x[:, :0].flatten(1).sum() + F.prelu(x, torch.ones(())), "aten.flatten.using_ints"),
    ],
)
def test_what_a_rule_does_not_foresee_is_read_as_unknown(between, operator):
    class Between(Chain):
        def forward(self, x):
            return self.fc(self.pool(self.body[3:](between(self.body[:3](x)))).flatten(1))

    anatomy = trace(Between(), Between().example())
    assert (operator, "<model>") in anatomy.unread
    assert "cannot be read" in anatomy.groups["body.0"].pinned


def test_numbers_that_depend_on_values_carry_no_channels():
    class Scaled(Chain):
        def forward(self, x):
            x = self.body[:3](x)
            return self.fc(self.pool(self.body[3:](x * -x.sum().item())).flatten(1))

    assert free(trace(Scaled(), Scaled().example())) == Chain.free


def test_results_that_were_not_read_carry_no_channels(monkeypatch):
    """An operator may return lists of tensors inside a tuple."""

    class Halves(Chain):
        def forward(self, x):
            return self.fc(self.pool(self.body[3:](torch.cat(self.body[:3](x).chunk(2, 1), 1))).flatten(1))

    monkeypatch.setitem(TABLE, "chunk", lambda reader, node: unknown_operator(reader, node) and None)
    assert free(trace(Halves(), Halves().example())) == {"body.3": 12}

"""Stand-ins compute what torch's own modules do, and their heads can be cut."""

import copy

import pytest
import torch
from nets import Mixer
from torch import nn

from benchmarks.zoo.case import randomised
from understudy.anatomy import trace
from understudy.cut import cut
from understudy.inspect import inspect
from understudy.laws import check_cut
from understudy.modules import MultiheadAttention, replace_own
from understudy.planner import make_plan


def pair(**options):
    torch.manual_seed(0)
    own = randomised(nn.MultiheadAttention(12, 3, **options))
    other = copy.deepcopy(own)
    replace_own(other)
    assert type(other) is MultiheadAttention
    return own, other


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mask", [None, torch.rand(5, 7) > 0.8, torch.randn(5, 7), torch.randn(6, 5, 7)])
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_multihead_attention_as_torch_computes_it(batch_first, weights, mask, padded):
    own, other = pair(batch_first=batch_first)
    query, key, value = torch.randn(2, 5, 12), torch.randn(2, 7, 12), torch.randn(2, 7, 12)
    if not batch_first:
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    padding = torch.arange(7).expand(2, 7) == 3 if padded else None
    options = {"attn_mask": mask, "key_padding_mask": padding, "need_weights": weights}
    expected, found = own(query, key, value, **options), other(query, key, value, **options)
    torch.testing.assert_close(found[0], expected[0])
    assert (found[1] is None) == (not weights)
    if weights:
        torch.testing.assert_close(found[1], expected[1])
        each = {**options, "average_attn_weights": False}
        torch.testing.assert_close(other(query, key, value, **each)[1], own(query, key, value, **each)[1])


@pytest.mark.parametrize("bias", [False, True])
def test_multihead_attention_of_one_image_with_itself(bias):
    own, other = pair(bias=bias)
    x = torch.randn(5, 12)
    for expected, found in zip(own(x, x, x), other(x, x, x), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 8}])
def test_what_has_no_stand_in_stays(options):
    module = nn.MultiheadAttention(12, 3, **options)
    replace_own(module)
    assert type(module) is nn.MultiheadAttention


class Encoder(Mixer):
    """torch's own encoder layer, whose fused path reads its sizes off attributes that a cut does not change."""

    free = {"layer.self_attn": 3, "layer.linear1": 14}

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(12, 3, 14, batch_first=True)

    def attend(self, x):
        return self.layer(x)


class Cross(Mixer):
    """Queries from one place, keys and values from another: one weight in three parts."""

    free = {"across": 3}

    def __init__(self):
        super().__init__()
        self.across = nn.MultiheadAttention(12, 3)

    def attend(self, x):
        x = x.transpose(0, 1)
        return self.across(x, x.flip(0), x * 2, need_weights=False)[0].transpose(0, 1)


class Masked(Cross):
    """Tokens that may not look at all others. torch misreads a mask of another precision, but only of many tokens."""

    size = (3, 16, 16)

    def attend(self, x):
        allowed = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        x = x.transpose(0, 1)
        return self.across(x, x, x, attn_mask=~allowed, need_weights=False)[0].transpose(0, 1)


@pytest.mark.parametrize("net", [Encoder, Cross, Masked])
def test_heads_are_cut(net):
    model = randomised(net())
    anatomy = trace(model, model.example())
    assert {n: g.width for n, g in anatomy.groups.items() if g.pinned is None} == net.free
    plan = make_plan(model, anatomy, keep_width=0.5)
    student = cut(model, plan)
    cut_ones = [m for m in student.modules() if isinstance(m, nn.MultiheadAttention)]
    assert [(m.num_heads, m.in_proj_weight.shape) for m in cut_ones] == [(2, (24, 12))]
    assert check_cut(anatomy, plan, model, student)["error"] <= 1e-10
    assert all(type(m) is not MultiheadAttention for m in model.modules())
    assert all(type(m) is not MultiheadAttention for m in cut(model, make_plan(model, anatomy, keep=1)).modules())


def test_a_block_of_two_halves_is_listed_once():
    class Deep(Mixer):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(12, 3, 14, batch_first=True, norm_first=True)

        def forward(self, x):
            return self.fc(self.norm(self.layer(self.patch(x).flatten(2).transpose(1, 2))).mean(1))

    assert inspect(Deep(), Deep().example())["blocks"] == ["layer"]

"""Stand-ins compute what torch's own modules do, and their heads can be cut."""

import copy
import pickle
import types

import numpy as np
import pytest
import torch
from nets import Chain, Encoder, HandWritten, Mixer
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from mimicut.anatomy.find_seam import trace
from mimicut.base.guard import full_copy
from mimicut.planning.planner import make_plan
from mimicut.proof.laws import check_cut
from mimicut.proof.randomised import randomised
from mimicut.surgery.cut import cut
from mimicut.surgery.stand_ins import MultiheadAttention, correct_calls, replace_multihead_attention
from mimicut.workflow.inspection import inspect


def pair(**options):
    torch.manual_seed(0)
    own = randomised(nn.MultiheadAttention(12, 3, **options))
    other = copy.deepcopy(own)
    replace_multihead_attention(other)
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
    replace_multihead_attention(module)
    assert type(module) is nn.MultiheadAttention


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


def test_both_halves_of_torchs_encoder_layer_can_be_dropped():
    """Its code looks at attributes and parameters of its attention before it runs it."""

    class Deep(Mixer):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(12, 3, 14, batch_first=True, norm_first=True)

        def forward(self, x):
            return self.fc(self.norm(self.layer(self.patch(x).flatten(2).transpose(1, 2))).mean(1))

    found = [(b["name"], b["pinned"]) for b in inspect(Deep(), Deep().example())["blocks"]]
    assert found == [("layer.self_attn", None), ("layer", None)]
    model = randomised(Deep())
    anatomy = trace(model, model.example(), drop=["layer.self_attn", "layer"])
    plan = make_plan(model, anatomy)
    check_cut(anatomy, plan, model, cut(model, plan))


def corrected(keep_width=0.5, model=None):
    model = model or randomised(HandWritten())
    anatomy = trace(model, torch.zeros(2, *HandWritten.size))
    plan = make_plan(model, anatomy, keep_width=keep_width)
    assert check_cut(anatomy, plan, model, cut(model, plan))["error"] <= 1e-10
    return cut(model, plan), plan


def test_a_corrected_network_is_of_its_class_and_can_be_copied_and_pickled():
    student, plan = corrected(0.3)
    assert {(c["function"], c["from"], c["to"]) for c in plan.calls} == {("reshape", 12, 4)}
    assert isinstance(student, HandWritten)
    assert type(student).__qualname__ == "HandWritten"
    images = torch.randn(3, *student.size)
    expected = student(images)
    for other in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        assert torch.equal(other(images), expected)
        assert type(other) is type(student)
    torch.testing.assert_close(torch.cat([student(image[None]) for image in images]), expected)


def test_what_has_corrected_numbers_can_be_cut_again():
    student, _ = corrected(0.6)
    assert student.qkv.out_features == 24
    again, plan = corrected(0.5, student)
    assert again.qkv.out_features == 12
    assert {(c["from"], c["to"]) for c in plan.calls} >= {(8, 4)}
    assert again(torch.zeros(3, *again.size)).shape == (3, 5)


def test_whole_numbers_of_numpy_are_corrected_too():
    class Divides(Chain):
        def forward(self, x):
            x = self.body[:3](x)
            return self.fc(self.pool(self.body[3:](x / np.int64(x.shape[1]))).flatten(1))

    model = randomised(Divides())
    anatomy = trace(model, model.example())
    plan = make_plan(model, anatomy, keep_width=0.5, scheme="all")
    assert [(c["from"], c["to"]) for c in plan.calls] == [(4, 8)]
    assert check_cut(anatomy, plan, model, cut(model, plan))["error"] <= 1e-10


class _Images(Chain):
    """A number that counts images and channels at once, and one that must not be another."""

    def forward(self, x):
        x = self.body[:3](x)
        x = x.reshape(x.shape[0] * 8, 1, 8, 8).relu().reshape(-1, 8, 8, 8)
        return self.fc(self.pool(self.body[3:](x)).flatten(1))


def test_a_number_that_counts_images_too_follows_them():
    model = randomised(_Images())
    anatomy = trace(model, model.example())
    plan = make_plan(model, anatomy, keep_width=0.5, scheme="all")
    student = cut(model, plan)
    assert [(c["from"], c["to"]) for c in plan.calls] == [(16, 8), (8, 4)]
    images = torch.randn(5, *model.size)
    torch.testing.assert_close(torch.cat([student(image[None]) for image in images]), student(images))
    assert check_cut(anatomy, plan, model, student)["error"] <= 1e-10


class _EachImage(Chain):
    """One call for every image: which of them to correct is not known for more images."""

    def forward(self, x):
        x = self.body[:3](x)
        x = torch.stack([image * x.shape[1] ** -0.5 for image in x])
        return self.fc(self.pool(self.body[3:](x)).flatten(1))


def test_numbers_of_calls_for_each_image_are_not_corrected():
    model = randomised(_EachImage())
    anatomy = trace(model, model.example())
    assert anatomy.groups["body.0"].pinned == (
        "a number depends on a width in code that calls torch anew for every image"
    )
    assert anatomy.groups["body.3"].pinned is None


def test_code_that_gives_other_numbers_than_the_plan_knows_is_refused():
    module = _Images().eval()
    correct_calls(module, {("reshape", 1): {1: (9, 4)}})
    with pytest.raises(RuntimeError, match="its code gives reshape the number 8, expected 9"):
        module(torch.zeros(2, *module.size))
    torch.zeros(2, 8).reshape(2, 8)  # corrections end with the pass, also when that fails


class _Scales(nn.Module):
    def forward(self, x):
        if self.training:
            x = x * 1.0
        return x * x.shape[1] ** -0.5


class _Scaled(Chain):
    """A scale that is computed from a width; a module that trains in another way. twice: at two widths."""

    def __init__(self, twice=False):
        super().__init__()
        self.scale, self.twice = _Scales(), twice

    def forward(self, x):
        for i, layer in enumerate(self.body):
            x = layer(self.scale(x) if i == 3 else x)
        return self.fc(self.pool(self.scale(x) if self.twice else x).flatten(1))


def test_a_number_that_depends_on_more_than_a_width_is_never_replaced_unseen():
    model = randomised(_Scaled())
    anatomy = trace(model, model.example())
    plan = make_plan(model, anatomy, keep_width=0.5, scheme="all")
    student = cut(model, plan)
    assert [(c["module"], c["function"], c["from"]) for c in plan.calls] == [("scale", "mul", 4**-0.5)]
    assert check_cut(anatomy, plan, model, student)["error"] <= 1e-10
    with pytest.raises(RuntimeError, match=r"its code gives mul the number 1\.0, expected 0.5"):
        student.train()(model.example())
    with pytest.raises(RuntimeError, match="its code gives mul 0 numbers, the plan has one for number 1"):
        torch.jit.trace(student.eval(), model.example())  # sizes are tensors


def test_a_module_that_runs_at_two_widths_cannot_be_given_one_number():
    model = randomised(_Scaled(twice=True))
    anatomy = trace(model, model.example())
    assert anatomy.groups["body.0"].pinned == "a number would have to be two at a time (mul in scale)"
    plan = make_plan(model, anatomy, keep_width=0.5, scheme="all")
    assert check_cut(anatomy, plan, model, cut(model, plan))["error"] <= 1e-10


def test_code_that_no_class_holds_is_not_corrected():
    written = torch.fx.symbolic_trace(_Scaled())
    set_here = _Scaled()
    set_here.scale.forward = types.MethodType(_Scales.forward, set_here.scale)
    for net, module in ((written, "<model>"), (set_here, "scale")):
        model = randomised(net)
        anatomy = trace(model, torch.zeros(2, 3, 8, 8))
        assert anatomy.groups["body.0"].pinned.endswith(f"no class depends on a width (mul in {module})")
        plan = make_plan(model, anatomy, keep_width=0.5, scheme="all")
        assert set(plan.widths) == {"body.3"}
        assert check_cut(anatomy, plan, model, cut(model, plan))["error"] <= 1e-10


def test_a_feature_extractor_of_torchvision_is_cut_and_stays_in_eval_mode():
    model = randomised(create_feature_extractor(Chain(), ["body.5", "fc"]))
    anatomy = trace(model, torch.zeros(2, 3, 8, 8))
    plan = make_plan(model, anatomy, keep_width=0.5, scheme="all")
    student = cut(model, plan)
    assert plan.widths == {"body.0": 4}  # what it returns stays whole
    assert check_cut(anatomy, plan, model, student)["error"] <= 1e-10
    assert not any(m.training for m in student.modules())


class _Grouped(nn.Module):
    """Its code holds the width, and its copies keep only what the class says."""

    def __init__(self, groups=3):
        super().__init__()
        self.groups, self.scale = groups, nn.Parameter(torch.ones(12))

    def forward(self, x):
        x = x.reshape(x.shape[0], 12, -1).reshape(x.shape)
        return x * self.scale[:, None, None]


class _WithState(_Grouped):
    def __getstate__(self):
        return {"groups": self.groups, "scale": self.scale}

    def __setstate__(self, state):
        nn.Module.__init__(self)
        self.groups, self.scale = state["groups"], state["scale"]


class _WithDeepcopy(_Grouped):
    def __deepcopy__(self, memo):
        made = _WithDeepcopy(self.groups)
        made.scale = nn.Parameter(self.scale.detach().clone())
        return made


class _WithReduce(_Grouped):
    def __reduce_ex__(self, protocol):
        return _WithReduce, (self.groups,), {**vars(self)}


class _Around(Chain):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.fc(self.pool(self.body[6:](self.inner(self.body[:6](x)))).flatten(1))


@pytest.mark.parametrize("kind", [_WithState, _WithDeepcopy, _WithReduce, _Grouped])
def test_corrected_numbers_survive_every_way_to_copy_a_module(kind):
    model = randomised(_Around(kind()))
    anatomy = trace(model, model.example())
    plan = make_plan(model, anatomy, keep_width=0.5, scheme="all")
    assert ("inner", 12, 6) in {(c["module"], c["from"], c["to"]) for c in plan.calls}
    student = cut(model, plan)
    assert check_cut(anatomy, plan, model, student)["error"] <= 1e-10
    images = torch.randn(2, *model.size)
    once = copy.deepcopy(student)
    for each in (full_copy(student), once, copy.deepcopy(once), pickle.loads(pickle.dumps(once))):
        assert isinstance(each.inner, kind)
        assert torch.equal(each(images), student(images))

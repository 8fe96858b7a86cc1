"""Residual branches: found in the graph, dropped whole, equal to the network whose additions get nothing from them."""

import dataclasses

import nets
import pytest
import torch
from nets import Block, Halves, LayerNorms, Residual, Tiny
from torch import nn
from torch.nn import functional as F

import mimicut as us
from mimicut.anatomy.blocks import droppable
from mimicut.anatomy.find_seam import trace
from mimicut.base.errors import InputError, LawBroken, PlanError
from mimicut.inputs.teacher import own_teacher
from mimicut.planning.planner import make_plan, replan
from mimicut.proof import laws
from mimicut.proof.randomised import randomised
from mimicut.surgery.cut import cut
from mimicut.surgery.plan import Plan

PREPROCESSING = us.Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3)


class Gates(Tiny):
    """Branches that end in functional code: a sigmoid changes zeros, an activation is applied in place."""

    seam = "last:output"

    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.out = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            y = torch.sigmoid(F.relu(self.bn(self.conv(x)), inplace=True))
            return self.out(y) + x

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), self.Gate(), self.Gate()
        self.last, self.pool, self.fc = nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x + torch.sigmoid(self.a.conv(x))
        return self.fc(self.pool(self.last(self.b(x))).flatten(1))


class Scaled(Residual):
    """The addition is followed by an activation that changes what the shortcut carries."""

    class Odd(Block):
        def forward(self, x):
            return F.hardswish(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)

    def __init__(self):
        super().__init__()
        self.stage1[1] = self.Odd(8, 8, 6)


NETS = [Residual, LayerNorms, Halves, Gates, Scaled]


def names(model):
    return [b.name for b in droppable(trace(model, model.example()))]


def test_halves_of_a_transformer_block_are_blocks_of_their_own():
    assert names(Halves()) == ["blocks.0.attn", "blocks.0", "blocks.1.attn", "blocks.1"]


def test_what_carries_its_stream_alone_cannot_be_dropped():
    model = Residual()
    anatomy = trace(model, model.example())
    assert [b.name for b in droppable(anatomy)] == ["stage1.0", "stage1.1", "stage1.2", "stage2.1"]
    (pinned,) = [b for b in anatomy.blocks if b.pinned]
    assert pinned.name == "stage2.0"
    assert "shortcut is computed too" in pinned.pinned
    with pytest.raises(InputError, match=r"stage2\.0.*of the same shape.*shortcut is computed too"):
        trace(model, model.example(), drop=["stage2.0"])


def test_code_that_makes_something_of_nothing_pins_a_block():
    (first, second) = trace(Gates(), Gates().example()).blocks
    assert "makes other values from zeros (sigmoid)" in first.pinned
    assert second.dropped_modules == (("b", "through"),)


def test_layers_in_the_code_of_an_outer_module_pin_a_block():
    class Inline(Tiny):
        def __init__(self):
            super().__init__()
            self.stem, self.weight = nn.Conv2d(3, 8, 3, padding=1), nn.Parameter(torch.rand(8, 8, 1, 1))
            self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)

        def forward(self, x):
            x = F.relu(self.stem(x))
            return self.fc(self.pool(F.relu(F.conv2d(x, self.weight) + x)).flatten(1))

    model = Inline()
    (block,) = trace(model, model.example()).blocks
    assert "computes layers itself" in block.pinned


@pytest.mark.parametrize("kind", NETS, ids=lambda k: k.__name__)
def test_dropped_equals_zero_for_every_block_and_all_together(kind):
    model = randomised(kind())
    every = names(model)
    assert every
    for drop in [[name] for name in every] + [every]:
        anatomy = trace(model, model.example(), drop=drop)
        assert anatomy.zeroed_nodes
        plan = make_plan(model, anatomy)
        student = cut(model, plan)
        law = laws.check_cut(anatomy, plan, model, student)
        assert law["dtype"] == "float64"
        assert sum(p.numel() for p in student.parameters()) < sum(p.numel() for p in model.parameters())
        assert plan.macs["student"] < plan.macs["teacher"]


def test_dropped_equals_zero_by_hand():
    model = randomised(Halves()).eval()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    student = cut(model, make_plan(model, trace(model, model.example(), drop=["blocks.0.attn", "blocks.1"])))
    handles = [
        model.blocks[0].attn.register_forward_hook(lambda _, __, out: (torch.zeros_like(out[0]), None)),
        model.blocks[1].two.register_forward_hook(lambda _, __, out: torch.zeros_like(out)),
    ]
    with torch.no_grad():
        expected = model(x)
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(student.eval()(x), expected)
        assert (model(x) - expected).abs().max() > 1e-3


def test_the_law_finds_a_block_that_was_left_out_wrongly(monkeypatch):
    """An activation behind the addition that changes the stream: with the whole module gone it would be skipped."""
    model = randomised(Scaled())
    right = {b.name: b.dropped_modules for b in trace(model, model.example()).blocks}
    assert right["stage1.1"][0] == ("stage1.1.conv1", "zero")
    from mimicut.anatomy import blocks

    monkeypatch.setattr(blocks, "_in_range", lambda *_: True)
    monkeypatch.setattr(blocks, "_IDEMPOTENT", ("relu", "hardswish"))
    anatomy = trace(model, model.example(), drop=["stage1.1"])
    assert anatomy.dropped_modules == (("stage1.1", "through"),)
    plan = make_plan(model, anatomy)
    with pytest.raises(LawBroken, match="removed channels at zero"):
        laws.check_cut(anatomy, plan, model, cut(model, plan))


def test_depth_and_width_together_are_saved_and_loaded(tmp_path):
    model = randomised(Halves())
    example = torch.randn(8, 3, 8, 8)
    drop = ["blocks.0.attn", "blocks.1"]
    config = us.MimicConfig(steps=2, batch_size=4, seed=1, views="none")
    result = us.compress(
        own_teacher(model, PREPROCESSING), example, keep=0.6, drop=drop, folder=tmp_path / "a", config=config
    )
    assert result.plan.drop == drop
    assert result.plan.macs["student"] <= 0.6 * result.plan.macs["teacher"]
    loaded = us.load(tmp_path / "a", Halves)
    assert torch.equal(loaded(example), result.model(example))
    again = replan(model, trace(model, model.example(), drop=drop), us.read_plan(tmp_path / "a" / "plan.json"))
    assert again.dropped_modules == result.plan.dropped_modules


def test_plans_of_before_there_were_blocks_drop_modules():
    model = Residual()
    plan = make_plan(model, trace(model, model.example(), drop=["stage1.1"]))
    data = plan.to_json()
    dropped = data.pop("dropped_modules")
    assert dropped == [["stage1.1", "through"]]
    names = ("macs", "widths", "drop", "notes", "seam", "keep", "edits", "slices", "teacher")
    earliest = {name: data[name] for name in names} | {"version": 1, "asked": {"keep": None, "score": "l1"}}
    assert Plan.from_json(earliest).dropped_modules == dropped
    for wrong in (["stage1.1", "away"], ["stage1.1"], "stage1.1", [1, "zero"], ["stage1.1", "zero:x"]):
        with pytest.raises(PlanError, match="dropped_modules holds"):
            Plan.from_json({**data, "dropped_modules": [wrong]})


def test_a_module_that_is_no_block_hands_its_input_on():
    model = randomised(nets.Chain())
    anatomy = trace(model, model.example(), drop=["body.1"])
    assert anatomy.dropped_modules == (("body.1", "through"),)
    assert not anatomy.zeroed_nodes
    plan = dataclasses.replace(make_plan(model, anatomy))
    laws.check_cut(anatomy, plan, model, cut(model, plan))


def test_a_block_and_a_plain_module_may_go_together():
    model = randomised(Halves())
    anatomy = trace(model, model.example(), drop=["blocks.1.attn", "norm"])
    assert ("norm", "through") in anatomy.dropped_modules
    plan = make_plan(model, anatomy)
    laws.check_cut(anatomy, plan, model, cut(model, plan))


def test_a_plan_whose_blocks_were_edited_is_made_again():
    model = randomised(Residual())
    plan = make_plan(model, trace(model, model.example(), drop=["stage1.1"]), keep=0.6)
    for drop in (["stage1.1", "stage1.2"], []):
        edited = dataclasses.replace(plan, drop=drop)
        again = replan(model, trace(model, model.example(), drop=drop), edited)
        assert again.drop == drop
        assert again.edited
        anatomy = trace(model, model.example(), drop=drop)
        laws.check_cut(anatomy, again, model, cut(model, again))


def test_a_dropped_module_takes_those_inside_it_with_it():
    model = Halves()
    anatomy = trace(model, model.example(), drop=["blocks.0.attn", "blocks"])
    assert ("blocks", "through") in anatomy.dropped_modules
    assert not any(name.startswith("blocks.") for name, _ in anatomy.dropped_modules)

"""The laws, on every tiny net, with every parameter and buffer at random; and that the checks can fail."""

import dataclasses

import pytest
import torch
from nets import NETS, Attention, Chain, Depthwise, LayerNorms, Mixer, Residual
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mimicut.anatomy.cost import Cost, count
from mimicut.anatomy.find_seam import trace
from mimicut.base.errors import LawBroken
from mimicut.demo import teacher_networks
from mimicut.planning.planner import make_plan, resolve
from mimicut.proof.laws import _InRows, _noise, _random_inputs, check_budget, check_cut
from mimicut.proof.randomised import randomised
from mimicut.surgery.cut import cut


def prepared(net, **budget):
    model = randomised(net())
    anatomy = trace(model, model.example())
    plan = make_plan(model, anatomy, **budget)
    return model, anatomy, plan, cut(model, plan)


@pytest.mark.parametrize("net", NETS, ids=lambda n: n.__name__)
def test_law_1_a_plan_that_keeps_everything_is_bit_equal(net):
    model, _, plan, student = prepared(net, keep=1)
    x = torch.randn(3, *model.size, generator=torch.Generator().manual_seed(0))
    assert plan.slices == {}
    assert torch.equal(student(x), model(x))
    assert {n: t.data_ptr() for n, t in student.named_parameters()}.items().isdisjoint(
        {n: t.data_ptr() for n, t in model.named_parameters()}.items()
    )


@pytest.mark.parametrize("keep_width", [0.5, 0.2])
@pytest.mark.parametrize("score", ["l1", "random"])
@pytest.mark.parametrize("net", NETS, ids=lambda n: n.__name__)
def test_law_2_cut_equals_zero(net, score, keep_width):
    model, anatomy, plan, student = prepared(net, keep_width=keep_width, scheme="all", score=score)
    found = check_cut(anatomy, plan, model, student)
    assert found["dtype"] == "float64"
    assert found["error"] <= 1e-10
    assert sum(p.numel() for p in student.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", teacher_networks.NAMES)
def test_law_2_on_every_teacher_of_the_demo(name):
    model = randomised(teacher_networks.build(name))
    anatomy = trace(model, torch.zeros(2, 1, 32, 32))
    plan = make_plan(model, anatomy, keep_width=0.5)
    assert check_cut(anatomy, plan, model, cut(model, plan))["error"] <= 1e-10
    if name == "vit_tiny":
        free = {f"blocks.{i}.{part}": width for i in range(4) for part, width in (("attn.qkv", 4), ("mlp.0", 256))}
        assert {n: g.width for n, g in anatomy.groups.items() if not g.pinned} == free
        assert plan.widths == {n: width // 2 for n, width in free.items()}
        assert [str(p) for p in anatomy.seam.points] == ["norm:output"]


def _zero_inputs(model: nn.Module, columns: dict[str, list[int]]) -> nn.Module:
    """A reference of its own: the teacher with the weights' input columns of removed channels at zero."""
    for name, kept in columns.items():
        weight = model.get_parameter(name)
        gone = [i for i in range(weight.shape[1]) if i not in kept]
        with torch.no_grad():
            weight[:, gone] = 0
    return model


@pytest.mark.parametrize("net", [Chain, Residual, Depthwise])
def test_law_2_against_zeroed_weights(net):
    """Independent of the traced reference: for networks without norms over channels, zero columns are zero inputs."""
    model, _, plan, student = prepared(net, keep_width=0.5, scheme="all")
    columns = {n: d[1] for n, d in plan.slices.items() if 1 in d}
    reference = _zero_inputs(randomised(net()).double(), columns)
    x = torch.randn(3, *model.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(student.double()(x), reference(x), rtol=1e-10, atol=1e-10)


def _shifted(plan, tensor):
    dims = {d: list(range(len(kept))) for d, kept in plan.slices[tensor].items()}
    assert dims != plan.slices[tensor]
    return dataclasses.replace(plan, slices={**plan.slices, tensor: dims})


@pytest.mark.parametrize(
    ("net", "tensor"), [(Chain, "body.1.running_mean"), (Residual, "stage1.1.conv2.weight"), (LayerNorms, "gamma")]
)
def test_law_2_notices_one_wrong_slice(net, tensor):
    model, anatomy, plan, _ = prepared(net, keep_width=0.5, scheme="all")
    with pytest.raises(LawBroken, match=r"differ by .* expected at most 1\.0e-10"):
        check_cut(anatomy, plan, model, cut(model, _shifted(plan, tensor)))


def test_law_2_notices_a_student_of_another_shape():
    model, anatomy, plan, _ = prepared(Chain, keep_width=0.5)
    with pytest.raises(LawBroken, match="differ by inf"):
        check_cut(anatomy, plan, model, _OtherShape())


def test_a_student_that_does_not_run_is_a_broken_law():
    model, anatomy, plan, student = prepared(Chain, keep_width=0.5)
    student.body[3].weight = nn.Parameter(torch.zeros(6, 5, 3, 3))
    with pytest.raises(LawBroken, match=r"running the cut Chain: it stopped in body.3 with RuntimeError.*--pin"):
        check_cut(anatomy, plan, model, student)


class _OtherShape(Chain):
    def forward(self, x):
        return super().forward(x)[:, :3]


def test_law_2_in_float32_where_float64_does_not_run():
    class Single(Chain):
        def forward(self, x):
            if x.dtype != torch.float32:
                raise TypeError("float32 only")
            return super().forward(x)

    model = randomised(Single())
    anatomy = trace(model, model.example())
    plan = make_plan(model, anatomy, keep_width=0.5)
    found = check_cut(anatomy, plan, model, cut(model, plan))
    assert found["dtype"] == "float32"
    assert found["error"] <= found["tolerance"] < 1e-2
    with pytest.raises(LawBroken, match="float32"):
        check_cut(anatomy, plan, model, cut(model, _shifted(plan, "body.1.running_mean")))


def test_law_3_the_teacher_and_the_random_state_are_as_before():
    model = randomised(Residual())
    model.stage1[0].bn1.train()
    model.stem.weight.requires_grad_(False)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    random = torch.get_rng_state()
    anatomy = trace(model, model.example())
    plan = make_plan(model, anatomy, keep=0.5)
    student = cut(model, plan)
    check_cut(anatomy, plan, model, student)
    with pytest.raises(LawBroken):
        check_cut(anatomy, plan, model, cut(model, _shifted(plan, "stage1.1.conv2.weight")))
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert model.stage1[0].bn1.training
    assert not model.stage1[0].training
    assert not model.stem.weight.requires_grad
    assert model.fc.weight.requires_grad
    assert torch.equal(random, torch.get_rng_state())
    assert not any(m._forward_hooks for m in [*model.modules(), *student.modules()])


@pytest.mark.parametrize("net", NETS, ids=lambda n: n.__name__)
def test_law_7_macs_equal_the_sum_by_hand(net):
    model = net()
    cost = count(model, model.example())
    assert cost.macs == net.macs
    assert cost.params == sum(p.numel() for p in model.parameters())


def test_law_7_what_is_not_counted_is_listed():
    assert count(Chain(), Chain().example()).uncounted == {"adaptive_avg_pool2d": 1, "batch_norm": 2, "relu": 3}
    assert count(Attention(), Attention().example()).uncounted["softmax"] == 1


@pytest.mark.parametrize(
    ("net", "keep"),
    [(n, k) for n in NETS if n is not Attention for k in (0.8, 0.5, 0.35) if k == 0.8 or not issubclass(n, Mixer)],
)
def test_law_8_the_budget_is_met_within_one_step_of_the_smallest_group(net, keep):
    model, anatomy, plan, student = prepared(net, keep=keep, scheme="all")
    teacher, small = count(model, model.example()), count(student, model.example())
    check_budget(plan, teacher, small)
    assert small.macs == plan.macs["student"] <= keep * teacher.macs
    ranks = {n: torch.arange(g.width).numpy() for n, g in anatomy.groups.items()}
    for name, width in plan.widths.items():
        if width < anatomy.groups[name].width:
            wider = resolve(model, anatomy, {**plan.widths, name: width + 1}, ranks)
            assert wider.macs["student"] > keep * teacher.macs


def test_law_8_notices_a_broken_promise():
    _, _, plan, _ = prepared(Chain, keep=0.5)
    promised = plan.macs["student"]
    with pytest.raises(LawBroken, match="the plan promised"):
        check_budget(plan, Cost(Chain.macs, 0), Cost(promised + 1, 0))
    with pytest.raises(LawBroken, match="above the keep"):
        check_budget(plan, Cost(promised, 0), Cost(promised, 0))


def test_a_precision_written_into_the_code_is_checked_in_float32():
    class Fixed(Chain):
        def forward(self, x):
            return self.fc(self.pool(self.body(x.to(torch.float32).to(self.fc.weight.dtype))).flatten(1))

    model = randomised(Fixed())
    anatomy = trace(model, model.example())
    plan = make_plan(model, anatomy, keep_width=0.5, scheme="all")
    assert check_cut(anatomy, plan, model, cut(model, plan))["dtype"] == "float32"


class _Amplifies(Chain):
    """A change of its features grows 300 times, three times over."""

    def __init__(self):
        super().__init__()
        self.body[0], self.body[1] = nn.Conv2d(3, 67, 3, padding=1), nn.BatchNorm2d(67)
        self.body[3] = nn.Conv2d(67, 12, 3, padding=1, bias=False)

    def forward(self, x):
        x = self.body(x)
        for _ in range(3):
            x = x + torch.sin(300 * x)
        return self.fc(self.pool(x).flatten(1))


class _Casts(Chain):
    """In float32, as it is traced, its weights are of the kind that they are cast to."""

    def forward(self, x):
        x = self.body[:3](x)
        x = x + (x / 3).to(self.body[0].weight.dtype)
        return self.fc(self.pool(self.body[3:](x)).flatten(1))


def test_law_2_knows_a_precision_that_follows_the_weights():
    model = randomised(_Casts())
    anatomy = trace(model, model.example())
    plan = make_plan(model, anatomy, keep_width=0.5, scheme="all")
    found = check_cut(anatomy, plan, model, cut(model, plan))
    assert found["dtype"] == "float64"
    assert 1e-10 < found["error"] <= found["tolerance"] <= 1e-6
    with pytest.raises(LawBroken, match="differ by"):
        check_cut(anatomy, plan, model, cut(model, _shifted(plan, "body.1.running_mean")))


def test_law_2_knows_how_much_a_network_amplifies_rounding():
    """Whether a cut network rounds otherwise than its teacher is the processor's matter; what that may do is not."""
    tolerances = {}
    for net, points in ((_Amplifies, ["body.4"]), (Chain, None)):
        model = randomised(net())
        anatomy = trace(model, model.example(), points=points)
        plan = make_plan(model, anatomy, keep_width=0.5, scheme="all")
        with torch.no_grad():
            tolerances[net] = _noise(anatomy, plan, model, _random_inputs(anatomy, torch.float64))
        assert check_cut(anatomy, plan, model, cut(model, plan))["dtype"] == "float64"
        with pytest.raises(LawBroken, match="differ by"):
            check_cut(anatomy, plan, model, cut(model, _shifted(plan, "body.1.running_mean")))
    assert tolerances[Chain] < 1e-14
    assert 1e-12 < tolerances[_Amplifies] < 1e-8


@pytest.mark.parametrize("groups", [2, 8])
def test_in_rows_only_where_the_numbers_lie_is_changed(groups):
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.convolution.default:
                layouts.append(args[0].is_contiguous())
            return func(*args, **(kwargs or {}))

    layouts = []
    x = torch.randn(2, 6, 6, 8, dtype=torch.float64).permute(0, 3, 1, 2)
    convolution = nn.Conv2d(8, 8, 3, groups=groups, dtype=torch.float64)
    with torch.no_grad():
        wanted = convolution(x)
        with Seen(), _InRows():
            found = convolution(x)
    assert layouts == [True]
    assert found.stride() == wanted.stride()
    assert (found - wanted).abs().max() < 1e-14


def test_tensors_without_numbers_are_left_as_they_are():
    net = nn.ParameterDict({"registers": torch.zeros(1, 0, 4), "rows": torch.zeros(0, 3), "weight": torch.zeros(2, 2)})
    assert not randomised(net)["weight"].eq(0).any()

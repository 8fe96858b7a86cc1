"""The closed form: what a layer is solved for, what it may touch, and the passes that halt side by side."""

import copy
import threading
from dataclasses import replace
from importlib import import_module

import nets
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mimicut.anatomy.find_seam import trace
from mimicut.base.guard import named_tensors
from mimicut.base.layout import laid, layout_for
from mimicut.planning.evidence import channel_evidence
from mimicut.planning.planner import make_plan, resolve
from mimicut.proof.randomised import randomised
from mimicut.recovery import layers as layers_module
from mimicut.recovery import moments, ridge, view_budget
from mimicut.recovery.closed_form import FOLDS, ClosedFormOptions, closed_form
from mimicut.recovery.cut_student import CutStudent
from mimicut.recovery.folds import batches_of, plan_batches
from mimicut.recovery.gated import ROUNDS
from mimicut.recovery.layers import affine_of, columns, geometry, layers, layers_to_solve
from mimicut.recovery.lockstep import Seen, lockstep
from mimicut.surgery.cut import cut
from mimicut.surgery.seam import capturing

closed_form_module = import_module("mimicut.recovery.closed_form")
lockstep_module = import_module("mimicut.recovery.lockstep")
evidence_module = import_module("mimicut.planning.evidence")
FEWER = ClosedFormOptions(count_views=200)  # views, where it does not matter how good the solution is
NETS = (
    nets.Chain, nets.Residual, nets.Concat, nets.Depthwise, nets.Grouped, nets.NoNorm, nets.FusedHeads,
    nets.GroupedQuery,
)  # fmt: skip


def setting(kind, keep_width=0.5, **options):
    teacher = randomised(kind())
    anatomy = trace(teacher, teacher.example())
    plan = make_plan(teacher, anatomy, keep_width=keep_width, scheme="all", **options)
    torch.manual_seed(3)
    images = torch.randn(24, *teacher.size)
    return teacher, anatomy, plan, images


def seam_error(teacher, student, plan, images):
    with torch.no_grad(), capturing(teacher, plan.seam) as lead, capturing(student, plan.seam) as own:
        pairs = zip(lead.features(images), own.features(images), strict=True)
        return sum(float((f - w).square().sum() / (w - w.mean(0)).square().sum()) for w, f in pairs)


@pytest.mark.parametrize("kind", NETS, ids=lambda k: k.__name__)
def test_features_come_closer_on_other_images(kind):
    teacher, anatomy, plan, images = setting(kind)
    student = cut(teacher, plan).eval()
    others = torch.randn(24, *teacher.size, generator=torch.Generator().manual_seed(9))
    before = seam_error(teacher, student, plan, others)
    log = closed_form(CutStudent(teacher, student, anatomy, plan), images)
    assert seam_error(teacher, student, plan, others) < 0.9 * before
    assert log.images == 24
    assert log.layers
    assert all(each.error <= each.error_cut for each in log.layers)


@pytest.mark.parametrize(
    ("activation", "cut_off"),
    [
        (torch.tanh, None),
        (torch.relu, [(0.0, torch.lt, torch.minimum)]),
        (lambda x: F.hardtanh(x, -0.1, 0.2), [(-0.1, torch.lt, torch.minimum), (0.2, torch.gt, torch.maximum)]),
    ],
    ids=["tanh", "relu", "hardtanh"],
)
def test_a_layer_is_the_ridge_solution_by_hand(activation, cut_off, monkeypatch):
    """Linear layers alone: inputs of the student, outputs of the teacher, held to the weights that the cut left."""
    monkeypatch.setattr(ridge, "RIDGES", (0.1,))

    class Two(nn.Module):
        size = (6,)

        def __init__(self):
            super().__init__()
            self.one, self.two, self.fc = nn.Linear(6, 8), nn.Linear(8, 5, bias=False), nn.Linear(5, 3)

        def forward(self, x):
            return self.fc(activation(self.two(torch.relu(self.one(x)))))

    torch.manual_seed(0)
    teacher = Two().double().eval()
    anatomy = trace(teacher, torch.zeros(2, 6, dtype=torch.float64))
    plan = make_plan(teacher, anatomy, keep_width=0.5, scheme="all")
    assert plan.slices["two.weight"][1] == plan.keep["one"]
    student = cut(teacher, plan).eval()
    images = torch.randn(40, 6, dtype=torch.float64)
    kept = plan.keep["one"]
    x, y = torch.relu(teacher.one(images))[:, kept], teacher.two(torch.relu(teacher.one(images)))
    gram = x.T @ x
    hold = 0.1 * gram.diagonal().mean() * torch.eye(4, dtype=torch.float64)
    expected = torch.linalg.solve(gram + hold, x.T @ y + hold @ teacher.two.weight[:, kept].T).T
    if cut_off is not None:
        for _ in range(ROUNDS):
            found, target = x @ expected.T, y.clone()
            for edge, beyond, nearest in cut_off:
                target = torch.where(beyond(y, edge), nearest(found, torch.tensor(edge)), target)
            expected = torch.linalg.solve(gram + hold, x.T @ target + hold @ teacher.two.weight[:, kept].T).T
    log = closed_form(
        CutStudent(teacher, student, anatomy, plan), images, ClosedFormOptions(mixing="none", count_views=40)
    )
    assert log.layers[-1].gated is (cut_off is not None)
    assert torch.allclose(student.two.weight, expected, atol=1e-9 if cut_off is None else 1e-5)
    assert torch.equal(student.one.weight, teacher.one.weight[kept])  # nothing is missing before it


@pytest.mark.parametrize("kind", [nets.Chain, nets.Residual], ids=lambda k: k.__name__)
def test_what_the_activation_cuts_off_need_not_be_met(kind, monkeypatch):
    """Through norms of either sign and shortcuts: closer behind the activations, on other images too."""
    teacher, anatomy, plan, images = setting(kind)
    with torch.no_grad():
        for module in teacher.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight[::2] *= -1
    others = torch.randn(64, *teacher.size, generator=torch.Generator().manual_seed(9))
    errors = []
    for gates in (True, False):
        if not gates:
            monkeypatch.setattr(layers_module, "_gate", lambda node: None)
        student = cut(teacher, plan).eval()
        log = closed_form(CutStudent(teacher, student, anatomy, plan), images)
        assert any(each.gated for each in log.layers) is gates
        errors.append(seam_error(teacher, student, plan, others))
    assert errors[0] < 0.99 * errors[1]


def test_what_the_activation_is_given_is_read_from_the_norms_before_it():
    model = randomised(nets.Residual())
    layer = next(each for each in layers(trace(model, model.example())) if each.weight == "stage1.0.conv1.weight")
    seen = {}
    with torch.no_grad():
        for name, module in model.named_modules():
            module.register_forward_hook(lambda _, args, out, name=name: seen.update({name: out.clone()}))
        model(torch.randn(2, *model.size))
    scale, offset = (each.detach() for each in affine_of(layer, named_tensors(model)))
    ahead = scale[:, None, None] * seen["stage1.0.conv1"].double() + offset[:, None, None]
    assert torch.allclose(ahead, seen["stage1.0.bn1"].double(), atol=1e-5)


def test_what_is_no_better_behind_the_activation_is_not_taken(monkeypatch):
    teacher, anatomy, plan, images = setting(nets.Chain)
    found = []
    for solved in (lambda self, folds, weights, solve, rounds: weights + 10, lambda self, folds, weights, *_: weights):
        monkeypatch.setattr("mimicut.recovery.gated.Gated.solve", solved)
        student = cut(teacher, plan).eval()
        log = closed_form(CutStudent(teacher, student, anatomy, plan), images)
        assert not any(each.gated for each in log.layers)
        found.append(student.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_layers_know_the_activation_behind_them():
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(6))
            self.norm, self.fc = nn.BatchNorm2d(3), nn.Linear(3, 2)

        def forward(self, x):
            x = F.relu(self.norm(self.c[0](x)))
            y = F.relu6(self.c[1](x) + x)
            z = F.hardtanh(self.c[2](y), -2.0, 3.0)
            w = F.gelu(self.c[3](z))
            v = self.c[4](w)  # also read by an addition whose other side cannot be seen
            u = F.relu(v + w.sigmoid())
            return self.fc(F.hardtanh(self.c[5](u)).mean((2, 3)))

    model = Many().eval()
    found = layers(trace(model, torch.zeros(2, 3, 4, 4)))
    inf = float("inf")
    assert [each.gate for each in found] == [(0, inf), (0, 6), (-2, 3), None, None, (-1, 1)]


def test_redundant_channels_are_made_good_entirely():
    """Every channel that goes is twice one that stays."""
    teacher = randomised(nets.NoNorm())
    anatomy = trace(teacher, teacher.example())
    group = next(iter(anatomy.groups.values()))
    tensors, kept = named_tensors(teacher), list(range(0, group.width, 2))
    with torch.no_grad():
        for member in group.members:
            if member.dim == 0:
                tensors[member.tensor][1::2] = 2 * tensors[member.tensor][::2]
    order = [*kept, *(unit for unit in range(group.width) if unit not in kept)]
    plan = resolve(teacher, anatomy, {group.name: len(kept)}, {group.name: np.argsort(order)})
    student, images = cut(teacher, plan).eval(), torch.randn(24, *teacher.size)
    before = seam_error(teacher, student, plan, images)
    closed_form(CutStudent(teacher, student, anatomy, plan), images, ClosedFormOptions(mixing="none"))
    assert before > 0.01
    assert seam_error(teacher, student, plan, images) < 1e-6 * before


def test_a_constant_goes_into_the_norm_that_follows_or_the_bias(monkeypatch):
    monkeypatch.setattr(layers_module, "_gate", lambda node: None)  # means are met where nothing is cut off
    teacher, anatomy, plan, images = setting(nets.Chain)
    student = cut(teacher, plan).eval()
    closed_form(CutStudent(teacher, student, anatomy, plan), images, ClosedFormOptions(mixing="none", count_views=24))
    kept = plan.slices["body.3.weight"][0]
    with torch.no_grad():
        for until, channels in ((5, kept), (7, range(16))):  # behind the norm of a layer without bias; behind a bias
            theirs = teacher.body[:until](images)[:, list(channels)]
            off = (student.body[:until](images) - theirs).mean((0, 2, 3)) / theirs.std((0, 2, 3))
            assert float(off.abs().max()) < 1e-3


@pytest.mark.parametrize("factor", [0.0, -1.0])
def test_the_error_of_the_shortcut_is_made_good(factor, monkeypatch):
    teacher, anatomy, plan, images = setting(nets.Residual)
    errors = []
    for change in (1.0, factor):
        right = moments.shortcut_error
        monkeypatch.setattr(moments, "shortcut_error", lambda *args, by=change, do=right: by * do(*args))
        student = cut(teacher, plan).eval()
        closed_form(CutStudent(teacher, student, anatomy, plan), images, FEWER)
        errors.append(seam_error(teacher, student, plan, images))
        monkeypatch.setattr(moments, "shortcut_error", right)
    assert errors[0] < errors[1]


@pytest.mark.parametrize("kind", [nets.Residual, nets.FusedHeads], ids=lambda k: k.__name__)
def test_it_touches_weights_before_the_seam_and_nothing_else(kind):
    teacher, anatomy, plan, images = setting(kind)
    student = cut(teacher, plan)
    student.train()
    teacher.train()
    before = {n: t.clone() for n, t in named_tensors(teacher).items()}
    was = {n: t.clone() for n, t in named_tensors(student).items()}
    torch.manual_seed(5)
    state, threads = torch.get_rng_state(), threading.active_count()
    closed_form(CutStudent(teacher, student, anatomy, plan), images, FEWER)
    assert torch.equal(torch.get_rng_state(), state)
    assert threading.active_count() == threads
    assert teacher.training
    assert student.training
    assert all(torch.equal(t, before[n]) for n, t in named_tensors(teacher).items())
    changed = {n for n, t in named_tensors(student).items() if not torch.equal(t, was[n])}
    assert changed
    assert not changed & set(plan.seam.head)
    assert all(n.endswith(("weight", "bias", "running_mean")) for n in changed)
    assert not any(t.grad is not None for t in student.parameters())


def test_one_seed_gives_one_student():
    teacher, anatomy, plan, images = setting(nets.Residual)
    students = [cut(teacher, plan) for _ in range(3)]
    for student, seed in zip(students, (1, 1, 2), strict=True):
        closed_form(CutStudent(teacher, student, anatomy, plan), images, replace(FEWER, seed=seed))
    first, second, other = ([t for t in named_tensors(s).values()] for s in students)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_an_error_half_way_leaves_the_student_as_it_was():
    teacher, anatomy, plan, images = setting(nets.Residual)
    student = cut(teacher, plan)
    was, threads = {n: t.clone() for n, t in named_tensors(student).items()}, threading.active_count()

    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        closed_form(CutStudent(teacher, student, anatomy, plan), images, on_layer=stop)
    assert all(torch.equal(t, was[n]) for n, t in named_tensors(student).items())
    assert threading.active_count() == threads


def test_noise_is_not_fitted():
    """Of one image and few positions a solution can be worse than the cut: then the cut's own weights stay."""
    teacher, anatomy, plan, images = setting(nets.Attention, 0.9)
    student = cut(teacher, plan)
    log = closed_form(
        CutStudent(teacher, student, anatomy, plan), images[:1], ClosedFormOptions(mixing="none", count_views=1)
    )
    assert all(each.ridge is None for each in log.layers)  # one image has no other to judge on
    assert all(torch.equal(t, dict(student.named_parameters())[n]) for n, t in cut(teacher, plan).named_parameters())


def test_nothing_cut_is_nothing_done():
    teacher, anatomy, _, images = setting(nets.Chain)
    plan = make_plan(teacher, anatomy, keep_width=1.0)
    student = cut(teacher, plan)
    assert closed_form(CutStudent(teacher, student, anatomy, plan), images).layers == ()


def test_layers_know_their_norm_and_their_shortcut():
    teacher = randomised(nets.Residual())
    found = {layer.weight: layer for layer in layers(trace(teacher, teacher.example()))}
    last = found["stage1.0.conv2.weight"]
    assert last.constant == "stage1.0.bn2.running_mean"
    assert last.shortcut == ("stage1.0.conv1.weight", "input")
    assert found["stage1.0.conv1.weight"].shortcut is None
    assert "fc.weight" not in found


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(4, 6, (3, 1), padding="same", dilation=(2, 1)),
        nn.Conv2d(4, 6, 2, padding="valid"), nn.Conv2d(4, 4, 3, groups=4, padding=1),
        nn.Conv2d(4, 6, 3, groups=2, padding=(0, 2)), nn.Conv1d(4, 6, 3, padding=1), nn.Conv3d(4, 2, 2),
        nn.Linear(4, 6),
    ],
    ids=str,
)  # fmt: skip
def test_columns_times_weight_are_the_layer(layer):
    shape = (2, 5, 4) if isinstance(layer, nn.Linear) else (2, 4, *(7, 6, 5)[: layer.weight.ndim - 2])
    x, spatial = torch.randn(shape), layer.weight.ndim - 2
    seen = []
    halted = lockstep([(layer, "before")], [((x,), {})], ["weight"], {})
    for _, [[at]] in halted:
        seen.append(at)
    how = geometry(seen[0], layer.weight)
    expected = layer(x) - (layer.bias.view(-1, *[1] * spatial) if spatial else layer.bias)
    size = tuple(expected.shape[2:]) if spatial else ()
    found = columns(x, how, torch.arange, size)  # (n, positions, groups, inputs)
    if spatial == 2:
        last = columns(x.contiguous(memory_format=torch.channels_last), how, torch.arange, size)
        assert torch.equal(last, found)
    out = torch.einsum("npgi,goi->npgo", found, layer.weight.flatten(1).unflatten(0, (how.groups, -1))).flatten(2)
    assert torch.allclose(out.transpose(1, 2).reshape(expected.shape) if spatial else out, expected, atol=1e-5)


def test_passes_halt_at_the_same_layers_and_a_change_is_seen_behind():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 3)).eval()
    lead = copy.deepcopy(net)
    batches = [((torch.randn(2, 3),), {}) for _ in range(3)]
    order, inputs = [], []
    for name, (wanted, found) in lockstep([(lead, "after"), (net, "before")], batches, ["0.weight", "2.weight"], {}):
        order.append(name)
        assert all(isinstance(seen, Seen) and seen.output is not None for seen in wanted)
        inputs.append([seen.input.clone() for seen in found])
        if name == "0.weight":
            with torch.no_grad():
                net[0].weight.zero_()
    assert order == ["0.weight", "2.weight"]
    assert all(torch.equal(x, F.relu(net[0].bias).expand(2, 3)) for x in inputs[1])


def test_batches_that_join_later_run_through_what_is_solved_by_then():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    lead, made, seen_at = copy.deepcopy(net), [], {}

    def batches():
        for number in range(3):
            made.append(number)
            yield (torch.full((2, 3), number + 1.0),), {}

    names = ["0.weight", "2.weight", "4.weight"]
    pair = [(lead, "after"), (net, "before")]
    for name, (wanted, found) in lockstep(pair, batches(), names, {"4.weight": {("0.weight", "output")}}, [1, 1, 3]):
        seen_at[name] = (len(made), len(wanted), [seen.input.clone() for seen in found])
        if name == "4.weight":
            first = [seen.held["0.weight", "output"] for seen in wanted]
            assert all(torch.equal(first[n], lead[0](torch.full((2, 3), n + 1.0))) for n in range(3))
        else:
            with torch.no_grad():
                net[int(name[0])].weight.mul_(2)
    assert [seen_at[name][:2] for name in names] == [(1, 1), (1, 1), (3, 3)]
    assert all(torch.equal(seen_at["4.weight"][2][n], net[:4](torch.full((2, 3), n + 1.0))) for n in range(3))


def test_a_later_batch_that_ends_early_is_no_deadlock():
    class Short(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.two(self.one(x)) if x.sum() < 1 else x

    passes = [((torch.full((1, 3), value),), {}) for value in (0.0, 9.0)]
    with pytest.raises(RuntimeError, match="halt at different places"):
        list(lockstep([(Short(), "before")], passes, ["one.weight", "two.weight"], {}, [1, 2]))


def test_what_keeps_buffers_for_a_thread_is_called_by_one_thread(monkeypatch):
    """Else each pass holds its own working memory of oneDNN: 1.8 GB beside 1.4 (docs/LOG.md)."""
    caught, halves = [], []

    class Tries(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            try:
                self.one(x[:, :2])
            except RuntimeError as error:
                caught.append((type(error), threading.get_ident()))
            with torch.autocast("cpu", torch.bfloat16):
                halves.append(torch.matmul(x, x.T).dtype)
            return self.two(self.one(x))

    callers, inner = [], lockstep_module._Pass.call

    def call(self, func, args, kwargs):
        def noted(*args, **kwargs):
            callers.append(threading.get_ident())
            assert not torch.is_grad_enabled()
            return func(*args, **kwargs)

        return inner(self, noted, args, kwargs)

    monkeypatch.setattr(lockstep_module._Pass, "call", call)
    net, batches = Tries(), [((torch.ones(1, 3),), {})] * 2
    halts = [name for name, _ in lockstep([(net, "before")], batches, ["two.weight"], {})]
    assert halts == ["two.weight"]
    # The two layers and the one that fails; under autocast, which is a thread's own, the pass itself calls.
    assert callers.count(threading.get_ident()) == 2 * 2
    assert len(callers) == 2 * 3
    assert [kind for kind, _ in caught] == [RuntimeError] * 2
    assert threading.get_ident() not in [thread for _, thread in caught]
    assert halves == [torch.bfloat16] * 2


def test_a_pass_keeps_the_state_of_its_own_thread():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                slope = torch.autograd.grad(F.linear(leaf, self.one.weight).sum(), leaf)[0]
            mapped = torch.vmap(F.linear, in_dims=(0, None))(x[:, None], self.one.weight)[:, 0]
            return self.two(torch.einsum("ni,oi->no", mapped + slope, self.one.weight) + self.one(x))

    net, batch = Own(), ((torch.ones(2, 3),), {})
    plainly = [seen[0][0].input for _, seen in lockstep([(net, "before")], [batch], ["two.weight"], {})]
    with torch.autocast("cpu", torch.bfloat16):  # of the caller: a pass never saw it
        cast = [seen[0][0].input for _, seen in lockstep([(net, "before")], [batch], ["two.weight"], {})]
    assert cast[0].dtype == torch.float32
    assert torch.equal(cast[0], plainly[0])


def test_an_error_that_somebody_keeps_leaves_no_thread():
    teacher, anatomy, plan, images = setting(nets.Chain)
    threads = threading.active_count()

    def fail(done, total):
        if done:
            raise ValueError("of the caller")

    with pytest.raises(ValueError, match="of the caller") as kept:
        closed_form(CutStudent(teacher, cut(teacher, plan).eval(), anatomy, plan), images, on_layer=fail)
    assert kept.value.__traceback__ is not None
    assert threading.active_count() == threads


def test_batches_end_where_more_views_may_be_seen():
    few = torch.randn(12, 3, 4, 4)
    parts = plan_batches(few, 4, [16, 79, 200, 800], 64, torch.Generator().manual_seed(0))
    sums = np.cumsum([len(part.images) for part in parts])
    assert sums[-1] == 800
    assert [max(s for s in sums if s <= level) for level in (16, 79, 200)] == [16, 76, 200]
    assert {part.fold for part in parts[:4]} == {part.fold for part in parts[4:8]} == set(range(4))
    assert [part.mixed for part in parts[:8]] == [False] * 4 + [True] * 4


def test_a_network_that_raises_leaves_no_thread():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            self.one(x)
            raise ValueError("of course")

    threads = threading.active_count()
    with pytest.raises(ValueError, match="of course"):
        list(lockstep([(Broken(), "before")], [((torch.zeros(1, 3),), {})] * 2, ["one.weight", "two.weight"], {}))
    assert threading.active_count() == threads
    found = list(lockstep([(Broken(), "before")], [((torch.zeros(1, 3),), {})] * 2, ["one.weight"], {}))
    assert len(found) == 1  # what is behind the last halt is not run
    assert threading.active_count() == threads


class Keeps(nets.Tiny):
    """Holds a tensor on itself while it runs, casts by a weight, and writes into its input."""

    def __init__(self):
        super().__init__()
        self.a, self.c, self.d = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        self.held = self.a(x.clone().sub_(0.1).to(self.a.weight)).relu()
        y = self.d(self.c(self.held.type_as(self.c.weight)).relu()).relu() + self.held
        return self.fc(y.mean((2, 3)))


def test_passes_keep_what_they_hold_and_are_given_to_themselves():
    teacher = randomised(Keeps())
    anatomy = trace(teacher, teacher.example())
    plan = make_plan(
        teacher, anatomy, keep_width=0.5, evidence=channel_evidence(teacher, anatomy, torch.randn(9, 3, 8, 8))
    )
    images = torch.randn(24, 3, 8, 8)
    was, errors = images.clone(), []
    for views in (24, 96, 97):
        student = cut(teacher, plan).eval()
        closed_form(
            CutStudent(teacher, student, anatomy, plan), images, ClosedFormOptions(mixing="none", count_views=views)
        )
        errors.append(seam_error(teacher, student, plan, images.clone()))
    assert torch.equal(images, was)
    assert max(errors) < 1.2 * min(errors) < seam_error(teacher, cut(teacher, plan).eval(), plan, images.clone())


def test_a_dropped_block_is_made_good():
    teacher = randomised(nets.Residual())
    anatomy = trace(teacher, teacher.example(), drop=("stage1.1",))
    plan = make_plan(teacher, anatomy, keep_width=1.0)
    student, images = cut(teacher, plan).eval(), torch.randn(48, 3, 8, 8)
    before = seam_error(teacher, student, plan, images)
    log = closed_form(CutStudent(teacher, student, anatomy, plan), images, FEWER)
    assert any(each.ridge for each in log.layers)
    assert seam_error(teacher, student, plan, images) < 0.9 * before


class Scaled(nets.Tiny):
    size = (3, 8, 8)

    def __init__(self, along):
        super().__init__()
        self.stem, self.c, self.fc = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)
        self.g, self.along = nn.Parameter(torch.rand(8) + 0.5), along

    def forward(self, x):
        h = self.stem(x).relu()
        g = self.g[:, None, None] if self.along == "channels" else self.g
        return self.fc((self.c(h) * g + h).relu().mean((2, 3)))


def test_a_factor_along_another_axis_is_no_scale_of_channels():
    found = [
        {layer.weight: layer for layer in layers(trace(net, net.example()))}["c.weight"]
        for net in map(Scaled, ("channels", "width"))
    ]
    assert (found[0].scales, found[0].shortcut) == (("g",), ("c.weight", "input"))
    assert (found[1].scales, found[1].shortcut) == ((), None)


def test_what_the_head_shares_stays():
    teacher = nets.Chain()
    teacher.body[6].bias = nn.Parameter(torch.zeros(16))
    teacher.fc = nn.Linear(16, 16)
    teacher.fc.bias = teacher.body[6].bias
    teacher = randomised(teacher)
    anatomy = trace(teacher, teacher.example())
    found = {layer.weight: layer for layer in layers(anatomy)}
    assert found["body.6.weight"].bias == "body.6.bias"
    assert found["body.6.weight"].constant is None


def test_layers_whose_time_is_up_stay_as_the_cut_left_them():
    teacher, anatomy, plan, images = setting(nets.Chain)
    student, raw = cut(teacher, plan).eval(), cut(teacher, plan).eval()
    every, others = [layer.weight for layer in layers(anatomy)], threading.active_count()
    log = closed_form(CutStudent(teacher, student, anatomy, plan), images, ClosedFormOptions(max_seconds=0.0))
    assert threading.active_count() == others
    assert [each.layer for each in log.layers] == every[:1]
    own, before = named_tensors(student), named_tensors(raw)
    assert all(torch.equal(own[name], before[name]) for name in every[1:])
    closed_form(CutStudent(teacher, student, anatomy, plan), images)
    assert not torch.equal(own[every[-1]], before[every[-1]])


def test_the_images_say_what_there_is_time_for(monkeypatch):
    teacher, anatomy, _, images = setting(nets.Chain)
    expected = []
    whole = channel_evidence(teacher, anatomy, images, on_expected=expected.append)
    assert whole.scores
    assert 0 < expected[0] < 600
    assert not channel_evidence(teacher, anatomy, images, max_seconds=0.0).scores
    # As many groups as there is time for: the clock stands at 5 s once the first group is done.
    clock = iter([0.0] * 400)
    right = evidence_module.eliminate
    monkeypatch.setattr(evidence_module.time, "perf_counter", lambda: next(clock))

    def slow(*args):
        nonlocal clock
        clock = iter([5.0] * 400)
        return right(*args)

    monkeypatch.setattr(evidence_module, "eliminate", slow)
    part = channel_evidence(teacher, anatomy, images, max_seconds=1.0)
    assert len(part.scores) == 1 < len(whole.scores)
    name = next(iter(part.scores))
    assert np.array_equal(part.scores[name], whole.scores[name])


def test_copies_of_an_image_are_in_one_fold():
    """Else an image would judge what was solved from it."""
    images = torch.randn(9, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    few = torch.cat([images, images[:4], images[:4]])
    batches, fold_of, made = batches_of(few, nn.Conv2d(3, 2, 1), "none", "none", 5, 4, 34)
    assert made == 32
    folds = {}
    for ((x,), _), fold in zip(batches, fold_of, strict=True):
        for image in x:
            folds.setdefault(image.numpy().tobytes(), set()).add(fold)
    assert len(folds) == 9
    assert all(len(found) == 1 for found in folds.values())
    teacher, anatomy, plan, _ = setting(nets.Chain)
    student = cut(teacher, plan).eval()
    one = torch.randn(1, *teacher.size).expand(6, -1, -1, -1)
    assert not closed_form(CutStudent(teacher, student, anatomy, plan), one).layers


class Narrow(nets.Tiny):
    """The channels of `a` are read by a grouped convolution alone, as at the head of RegNet's stages."""

    size = (3, 8, 8)

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 3, padding=1, groups=3)
        self.c, self.fc = nn.Conv2d(12, 8, 1), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.c(self.b(self.a(x).relu()).relu()).relu().mean((2, 3)))


def test_channels_that_only_grouped_layers_read_have_evidence():
    teacher = randomised(Narrow())
    with torch.no_grad():
        teacher.b.weight[:, 2] *= 1e-4  # the third input of every group hardly matters
    anatomy = trace(teacher, teacher.example())
    assert any(m.tensor == "b.weight" and m.dim == 1 for m in anatomy.groups["a"].members)
    found = channel_evidence(teacher, anatomy, torch.randn(24, 3, 8, 8))
    assert int(found.scores["a"].argmin()) == 2
    assert found.errors["a"][3] < 1e-4 * found.errors["a"][2]


@pytest.mark.parametrize("points", [["stage1"], ["stage1", "stage2"]], ids=["one", "two"])
def test_features_count_by_their_own_spread(points):
    """Features that are a thousand times larger at one point do not count more, of one point or of several."""
    found = []
    for factor in (1.0, 1000.0):
        teacher = randomised(nets.Residual())
        for point in points[:1]:
            teacher.get_submodule(point).register_forward_hook(lambda _, args, out, by=factor: by * out)
        anatomy = trace(teacher, teacher.example(), points=points)
        images = torch.randn(16, *teacher.size, generator=torch.Generator().manual_seed(0))
        found.append(channel_evidence(teacher, anatomy, images).errors)
    assert found[0]
    inner = [name for name in found[0] if name.startswith("stage1")]
    assert inner
    for name in inner if len(points) == 1 else ():
        assert np.allclose(found[1][name][1:], found[0][name][1:], rtol=1e-3)
    for name in inner:  # a point counts once, however large
        assert found[1][name][1] < 10 * found[0][name][1]


def test_both_say_how_far_they_are():
    teacher, anatomy, plan, images = setting(nets.Chain)
    said = []
    channel_evidence(teacher, anatomy, images, on_progress=lambda *at: said.append(at))
    assert said[-1][0] == said[-1][1]
    assert [done for done, _ in said] == sorted(done for done, _ in said)
    assert len({total for _, total in said}) == 1
    said.clear()
    log = closed_form(
        CutStudent(teacher, cut(teacher, plan).eval(), anatomy, plan), images, on_layer=lambda *at: said.append(at)
    )
    assert said == [(done, len(log.layers)) for done in range(len(log.layers) + 1)]


@pytest.mark.long
def test_less_memory_is_fewer_views_and_no_other_answer_where_there_is_enough():
    teacher, anatomy, plan, images = setting(nets.Residual)
    needed = view_budget.needed_bytes(anatomy, plan, cut(teacher, plan))
    views, students = [], []
    for most in (None, 4 * 2**30, needed, needed // 2):
        student = cut(teacher, plan).eval()
        views.append(
            closed_form(CutStudent(teacher, student, anatomy, plan), images, ClosedFormOptions(max_memory=most)).views
        )
        students.append(student.state_dict())
    assert views[0] == views[1] == view_budget.VIEWS
    assert FOLDS <= views[3] <= views[2] < views[1]
    assert all(torch.equal(students[0][name], students[1][name]) for name in students[0])
    least = evidence_module.needed_bytes(anatomy)
    sizes = []
    for most in (2**30, least, 0):
        tensors = named_tensors(teacher)
        names = [n for members in evidence_module._readers(anatomy).values() for n, _ in members]
        sizes.append(evidence_module._part_size(anatomy, tensors, names, most))
    assert sizes == [evidence_module._PART, 1, 1]
    assert channel_evidence(teacher, anatomy, images, max_memory=least).scores.keys() == (
        channel_evidence(teacher, anatomy, images).scores.keys()
    )


class Funnel(nets.Tiny):
    """Large maps first, then small ones of many channels: few positions of a view for each input."""

    size = (3, 32, 32)

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=8, padding=1)
        self.c, self.d, self.fc = nn.Conv2d(16, 64, 4), nn.Conv2d(64, 64, 1), nn.Linear(64, 4)

    def forward(self, x):
        return self.fc(self.d(self.c(self.b(self.a(x).relu()).relu()).relu()).relu().mean((2, 3)))


def test_later_layers_see_more_views_where_memory_is_short(monkeypatch):
    teacher = randomised(Funnel())
    anatomy = trace(teacher, teacher.example())
    plan = make_plan(teacher, anatomy, keep_width=0.5, score="l1")
    todo = layers_to_solve(anatomy, plan, cut(teacher, plan))
    names = [layer.weight for layer in todo]
    assert (
        view_budget.useful_views(anatomy, todo) == view_budget.MOST_VIEWS
    )  # c: 16 x 4 x 4 inputs, one position of a view
    plenty, short = (
        view_budget.views_at_each(anatomy, names, most, views=900)
        for most in (2**31, view_budget.running_bytes(anatomy) + 2**23)
    )
    assert plenty == [900] * len(names)
    assert short == sorted(short)
    assert 1 < 2 * short[0] < short[-1] < 900
    images, seen = torch.randn(12, 3, 32, 32), []
    inner = closed_form_module.collect_moments

    def counted(layer, wanted, found, *rest):
        seen.append(sum(len(each.input) for each in found))
        return inner(layer, wanted, found, *rest)

    monkeypatch.setattr(closed_form_module, "collect_moments", counted)
    monkeypatch.setattr(view_budget, "MOST_VIEWS", 800)
    student, whole = cut(teacher, plan).eval(), view_budget.tensor_bytes(named_tensors(teacher).values())
    log = closed_form(
        CutStudent(teacher, student, anatomy, plan),
        images,
        ClosedFormOptions(max_memory=view_budget.running_bytes(anatomy) + 2**24 + whole),
    )
    assert seen == sorted(seen)
    assert 2 * seen[0] < seen[-1] == log.views <= 800
    assert seam_error(teacher, student, plan, images) < seam_error(teacher, cut(teacher, plan).eval(), plan, images)


def test_what_passes_hold_is_counted_as_long_as_a_caller_holds_it():
    """The image in both passes, what a layer is given, in a stage also what the stage was given, and what the lead's
    own layer makes."""

    class Pair(nets.Tiny):
        size = (3, 8, 8)

        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 1)
            self.stage = nn.Sequential(nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 5, 1))
            self.fc = nn.Linear(5, 2)

        def forward(self, x):
            return self.fc(self.stage(self.stem(x)).mean((2, 3)))

    net = Pair().eval()
    found = view_budget.bytes_per_view(trace(net, net.example()), ["stem.weight", "stage.0.weight", "stage.2.weight"])
    held = {"stem.weight": 4 + 2 * 3, "stage.0.weight": 2 * 4 + 6 + 2 * 3, "stage.2.weight": 2 * (4 + 6) + 5 + 2 * 3}
    # The stem runs as if what it makes were there already: the student's is not counted, its image is.
    assert found == {name: 4 * 64 * numbers for name, numbers in held.items()}


def test_images_lie_channels_last_where_the_network_can_take_them_so():
    class Views(nets.Tiny):
        def __init__(self):
            super().__init__()
            self.c, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, 4)

        def forward(self, x):
            x = self.c(x)
            return self.fc(x.view(len(x), -1))

    batch = ((torch.randn(4, 3, 8, 8),), {"n": 3})
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    assert layout_for(net, ((batch[0][0],), {})) == "channels_last"
    assert layout_for(Views().eval(), ((batch[0][0],), {})) == "contiguous"
    assert layout_for(nn.Linear(3, 2), ((torch.randn(2, 3),), {})) == "contiguous"
    strided = nn.Sequential(nn.Conv2d(3, 8, 1, stride=2))  # torch's backward pass of it is not safe everywhere
    assert layout_for(strided, ((batch[0][0],), {})) == "contiguous"
    args, named = laid(batch, "channels_last")
    assert args[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(args[0], batch[0][0])
    assert named == {"n": 3}


def test_a_network_that_cannot_lie_channels_last_is_solved_all_the_same():
    class Shuffled(nets.Tiny):
        size = (3, 8, 8)

        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3), nn.Linear(8 * 36, 4)

        def forward(self, x):
            x = self.b(self.a(x).relu()).relu()
            return self.fc(x.view(len(x), -1))

    teacher = randomised(Shuffled())
    anatomy = trace(teacher, teacher.example())
    images = torch.randn(24, 3, 8, 8)
    plan = make_plan(teacher, anatomy, keep_width=0.5, evidence=channel_evidence(teacher, anatomy, images))
    log = closed_form(CutStudent(teacher, cut(teacher, plan).eval(), anatomy, plan), images)
    assert any(each.ridge is not None for each in log.layers)


def test_ridges_judged_by_random_sums_are_as_good(monkeypatch):
    """Of layers of many outputs: the error on images left out is within a hundredth of that by all outputs."""
    found = []
    for sketch in (2, 10_000):
        monkeypatch.setattr(ridge, "_SKETCH", sketch)
        teacher, anatomy, plan, images = setting(nets.Residual)
        log = closed_form(CutStudent(teacher, cut(teacher, plan).eval(), anatomy, plan), images, FEWER)
        found.append(sum(each.error for each in log.layers))
    assert found[0] == pytest.approx(found[1], rel=0.05)


def test_large_layers_are_solved_as_small_ones_are(monkeypatch):
    """The half of X'X that mirrors the other, and folds in two parts."""
    teacher, anatomy, plan, images = setting(nets.Chain)
    students = []
    for block in (moments._BLOCK, 7):
        monkeypatch.setattr(moments, "_BLOCK", block)
        student = cut(teacher, plan).eval()
        closed_form(CutStudent(teacher, student, anatomy, plan), images)
        students.append(student)
    others = torch.randn(24, *teacher.size, generator=torch.Generator().manual_seed(9))
    # By what they compute: weights along which the images hardly differ depend on the order of additions.
    found, wanted = (student(others).detach() for student in students)
    assert (found - wanted).norm() < 1e-5 * wanted.norm()
    before = seam_error(teacher, cut(teacher, plan).eval(), plan, others)
    for place in (moments, ridge):
        monkeypatch.setattr(place, "LARGE", 1)
    student = cut(teacher, plan).eval()
    closed_form(CutStudent(teacher, student, anatomy, plan), images)
    assert seam_error(teacher, student, plan, others) < 0.9 * before

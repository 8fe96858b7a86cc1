"""Mimic: the recipe, what it may touch, and what it says when something does not fit."""

import copy
import dataclasses
import signal
from functools import partialmethod

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn import functional as F

from mimicut.base.errors import InputError, Stopped, UnsupportedModel
from mimicut.inputs.image_set import Preprocessing, read_images
from mimicut.recovery.config import OPTIMIZERS, PRESETS, MimicConfig
from mimicut.recovery.mimic import mimic
from mimicut.recovery.training_loop import TrainingLoop
from mimicut.surgery.seam import Seam, SeamPoint, capturing


class Net(nn.Module):
    """Body with dropout and an auxiliary branch that only a root in train mode runs; head: pool and fc."""

    def __init__(self, mid: int = 8):
        super().__init__()
        self.one = nn.Conv2d(3, mid, 3, padding=1)
        self.norm = nn.BatchNorm2d(mid)
        self.drop = nn.Dropout(0.5)
        self.two = nn.Conv2d(mid, 6, 3, padding=1)
        self.norm_two = nn.BatchNorm2d(6)
        self.aux = nn.Linear(6, 5)
        self.fc = nn.Linear(6, 5)
        self.register_buffer("temperature", torch.tensor(1.5))

    def forward(self, x):
        feat = self.body(x).relu()
        return self.head(feat)

    def body(self, x):
        return self.features(F.relu(self.norm(self.one(x))))

    def features(self, x):
        return self.norm_two(self.two(self.drop(x)))

    def head(self, feat):
        pooled = self.fc(F.adaptive_avg_pool2d(feat, 1).flatten(1)) / self.temperature
        return (pooled, self.aux(feat.mean((2, 3)))) if self.training else pooled


SEAM = Seam((SeamPoint("norm_two"),), ((6, 8, 8),), ("fc.weight", "fc.bias", "temperature"))
KEPT = [0, 2, 3, 5]


def randomised(model, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) * 0.5 + 0.1 if tensor.ndim < 2 else torch.randn_like(tensor) * 0.3)
    return model.eval()


def pruned(teacher):
    student = Net(len(KEPT))
    whole, state = teacher.state_dict(), student.state_dict()
    state = {k: whole[k][KEPT] if whole[k].shape[:1] != state[k].shape[:1] else whole[k] for k in state}
    state["two.weight"] = whole["two.weight"][:, KEPT]
    student.load_state_dict(state)
    return student.eval()


def bits(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def teacher():
    return randomised(Net())


@pytest.fixture
def images():
    return torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def quick(**options):
    return MimicConfig(**{"steps": 3, "views": "none", **options})


# --- the recipe


def test_paper_preset_is_the_recipe_and_names_its_sources():
    paper = PRESETS["paper"]
    assert (paper.steps, paper.batch_size, paper.lr, paper.momentum, paper.weight_decay) == (2000, 64, 0.02, 0.9, 1e-4)
    assert (paper.milestones, paper.gamma, paper.norm_mode, paper.views) == ((0.4, 0.8), 0.1, "train", "imagenet")
    assert (paper.optimizer, paper.schedule) == ("sgd", "milestones")
    assert (PRESETS["transformer"].optimizer, PRESETS["transformer"].schedule) == ("adamw", "linear")
    for field in dataclasses.fields(MimicConfig):
        assert field.metadata["source"].split(":")[0] in ("cited", "measured", "assumption"), field.name


def test_learning_rate_falls_at_40_and_80_percent(teacher, images):
    log = mimic(teacher, pruned(teacher), SEAM, images, quick(steps=10))
    assert log.lrs == pytest.approx([0.02] * 4 + [0.002] * 4 + [0.0002] * 2)


def test_linear_schedule_falls_to_zero(teacher, images):
    log = mimic(teacher, pruned(teacher), SEAM, images, quick(steps=4, schedule="linear", gamma=0.5))
    assert log.lrs == pytest.approx([0.02, 0.015, 0.01, 0.005])


def test_learning_rate_acts(teacher, images):
    def weights(**options):
        student = pruned(teacher)
        mimic(teacher, student, SEAM, images, quick(momentum=0.0, weight_decay=0.0, **options))
        return {name: p.detach().clone() for name, p in student.named_parameters()}

    once = weights(steps=1, milestones=())
    assert equal(once, weights(steps=2, milestones=(0.5,), gamma=1e-30))
    assert not equal(once, weights(steps=2, milestones=(0.5,), gamma=0.5))


def test_every_fault_is_in_one_message():
    with pytest.raises(InputError) as caught:
        MimicConfig(
            steps=-1, batch_size=0, optimizer="lion", lr=float("nan"), momentum=1.0, weight_decay=-1.0,
            schedule="cosine", milestones=(0.8, 0.4), gamma=0.0, norm_mode="off", views="", seed=-1, device="abacus",
            precision="float8", layout="round", warmup=1.0, mixing="paint", mixing_rise=-1, extra_share=2,
            start="again",
        )  # fmt: skip
    for field in dataclasses.fields(MimicConfig):
        assert field.name in str(caught.value)
    with pytest.raises(InputError, match="steps"):
        MimicConfig(steps=True)


def test_config_goes_through_json_and_refuses_what_it_does_not_know():
    config = quick(milestones=(0.5,), device="cpu")
    assert MimicConfig.from_json(config.to_json()) == config
    with pytest.raises(InputError, match="epochs"):
        MimicConfig.from_json({"epochs": 3})


@pytest.mark.parametrize("options", [{}, {"optimizer": "adamw", "lr": 0.05}])
def test_a_pruned_student_learns(teacher, images, options):
    log = mimic(teacher, pruned(teacher), SEAM, images, quick(steps=60, **options))
    assert len(log.losses) == 60
    assert log.losses[-1] < 0.5 * log.losses[0]
    assert (log.images, log.batch) == (10, 10)


def test_first_update_is_sgd_with_decay_on_the_gradient_of_the_mean_squared_error(teacher, images):
    student = pruned(teacher)
    expected = copy.deepcopy(student)
    for module in (expected.norm, expected.norm_two):
        module.train()
    log = mimic(teacher, student, SEAM, images, quick(steps=1, lr=0.1, weight_decay=0.01, milestones=()))
    with torch.no_grad():
        wanted = teacher.body(images)
    # The mean over a batch in another order: equal up to rounding.
    loss = ((expected.body(images) - wanted) ** 2).mean()
    loss.backward()
    weight = expected.one.weight
    torch.testing.assert_close(student.one.weight, weight - 0.1 * (weight.grad + 0.01 * weight), rtol=1e-4, atol=1e-6)
    assert log.losses[0] == pytest.approx(loss.item(), rel=1e-5)


def test_adamw_by_hand(teacher, images):
    """Two steps, the second behind a milestone: moments, their bias correction, decay apart from the gradient."""
    student, wanted = pruned(teacher), copy.deepcopy(teacher).double().body(images.double()).detach()
    expected = copy.deepcopy(student).double()
    expected.norm.train(), expected.norm_two.train()
    learning = [*expected.one.parameters(), *expected.norm.parameters(), *expected.two.parameters()]
    learning += expected.norm_two.parameters()
    first, second = ([torch.zeros_like(p) for p in learning] for _ in range(2))
    losses = []
    for step, lr in enumerate((0.01, 0.001), start=1):
        loss = ((expected.body(images.double()) - wanted) ** 2).mean()
        losses.append(loss.item())
        with torch.no_grad():
            for p, grad, m, v in zip(learning, torch.autograd.grad(loss, learning), first, second, strict=True):
                m.mul_(0.8).add_(0.2 * grad)
                v.mul_(0.999).add_(0.001 * grad**2)
                p.mul_(1 - lr * 0.1).sub_(lr * (m / (1 - 0.8**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8))
    options = {"optimizer": "adamw", "lr": 0.01, "momentum": 0.8, "weight_decay": 0.1, "milestones": (0.5,)}
    log = mimic(teacher, student, SEAM, images, quick(steps=2, precision="float64", **options))
    assert log.losses == pytest.approx(losses, rel=1e-12)
    for name in ("one", "two", "norm", "norm_two"):
        found, hand = getattr(student, name), getattr(expected, name)
        torch.testing.assert_close(found.weight, hand.weight.float(), rtol=1e-6, atol=1e-7)


# --- law 5


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_uncut_student_with_norms_in_eval_mode_has_loss_zero(teacher, images, precision):
    config = quick(steps=1, norm_mode="eval", precision=precision)
    assert mimic(teacher, copy.deepcopy(teacher), SEAM, images, config).losses == (0.0,)
    assert mimic(teacher, pruned(teacher), SEAM, images, config).losses[0] > 0.01


def test_uncut_student_in_train_mode_has_the_teachers_own_loss_with_batch_statistics(teacher, images):
    batch_statistics = copy.deepcopy(teacher)
    batch_statistics.norm.train(), batch_statistics.norm_two.train()
    with torch.no_grad():
        expected = F.mse_loss(batch_statistics.body(images), teacher.body(images)).item()
    student = copy.deepcopy(teacher)
    found = mimic(teacher, student, SEAM, images, quick(steps=1)).losses[0]
    assert found == pytest.approx(expected, rel=1e-5)
    assert found > 0.01
    torch.testing.assert_close(student.norm.running_mean, batch_statistics.norm.running_mean)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_seed_gives_one_student_bit_for_bit(teacher, images, optimizer):
    def run(seed):
        torch.manual_seed(seed + 100)
        student = pruned(teacher)
        mimic(teacher, student, SEAM, images, quick(optimizer=optimizer, seed=seed, batch_size=4, views="patches"))
        return bits(student)

    first = run(1)
    torch.rand(3)
    assert equal(first, run(1))
    assert not equal(first, run(2))


def test_a_student_that_draws_numbers_itself_is_seeded_too(images):
    class Noisy(nn.Sequential):
        def forward(self, x):
            return super().forward(F.dropout(x, 0.5, training=True))

    teacher = randomised(nn.Sequential(nn.Conv2d(3, 4, 1)), 7)
    seam = Seam((SeamPoint("0"),), ((4, 8, 8),), ())
    losses = []
    for state in (1, 2):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        losses.append(mimic(teacher, Noisy(copy.deepcopy(teacher[0])), seam, images, quick()).losses)
        assert torch.equal(before, torch.get_rng_state())
    assert losses[0] == losses[1]
    assert losses[0] != mimic(teacher, Noisy(copy.deepcopy(teacher[0])), seam, images, quick(seed=1)).losses


# --- what it may not touch


@pytest.mark.parametrize("fails", [None, KeyboardInterrupt, RuntimeError])
def test_teacher_and_random_state_are_as_before(teacher, images, fails):
    teacher.norm.train()
    teacher.two.weight.requires_grad_(False)
    student = pruned(teacher)
    before, state = bits(teacher), torch.get_rng_state()
    flags = [m.training for m in teacher.modules()], [p.requires_grad for p in teacher.parameters()]

    def on_step(*_):
        if fails:
            raise fails

    try:
        mimic(teacher, student, SEAM, images, quick(), on_step=on_step)
    except (KeyboardInterrupt, RuntimeError):
        assert fails
    assert equal(before, bits(teacher))
    assert flags == ([m.training for m in teacher.modules()], [p.requires_grad for p in teacher.parameters()])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())
    assert all(p.grad is None for p in teacher.parameters())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_head_and_unused_parameters_stay_bit_identical(teacher, images, optimizer):
    student = pruned(teacher)
    before = bits(student)
    mimic(teacher, student, SEAM, images, quick(optimizer=optimizer, weight_decay=0.1))
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert not changed & {"fc.weight", "fc.bias", "temperature", "aux.weight", "aux.bias"}
    assert changed == {name for name in before if name.split(".")[0] in ("one", "two", "norm", "norm_two")}


def test_a_tensor_shared_with_the_head_stays(teacher, images):
    student = copy.deepcopy(teacher)
    student.tied = student.one  # a second name, given as head below
    seam = dataclasses.replace(SEAM, head=(*SEAM.head, "tied.weight"))
    before = bits(student)
    mimic(teacher, student, seam, images, quick())
    assert torch.equal(student.one.weight, before["one.weight"])
    assert not torch.equal(student.two.weight, before["two.weight"])


def test_only_norm_layers_are_in_train_mode():
    def build():
        net = nn.Sequential(
            nn.Conv2d(3, 4, 1), BatchNormAct2d(4, drop_layer=nn.Dropout), nn.Dropout(), nn.BatchNorm2d(4)
        )
        return randomised(net, 2)

    teacher, student = build(), build()
    seen = []
    student.requires_grad_(False)
    mimic(
        teacher, student, Seam((SeamPoint("3"),), ((4, 8, 8),), ()), torch.randn(4, 3, 8, 8), quick(),
        on_step=lambda *_: seen.append({n for n, m in student.named_modules() if m.training}),
    )  # fmt: skip
    assert seen == [{"1", "3"}] * 3
    assert not any(m.training for m in student.modules())
    assert not any(p.requires_grad for p in student.parameters())


def test_norms_of_the_head_keep_their_statistics(images):
    teacher = randomised(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)), 3)
    student = copy.deepcopy(teacher)
    # The norm runs before the second point is reached, although it is given as head.
    seam = Seam(
        (SeamPoint("0"), SeamPoint("2")), ((4, 8, 8), (4, 8, 8)), tuple(f"1.{n}" for n in teacher[1].state_dict())
    )
    mimic(teacher, student, seam, images, quick())
    assert equal(bits(teacher[1]), bits(student[1]))
    assert not torch.equal(teacher[2].weight, student[2].weight)


# --- images


class Recorder:
    def __init__(self, images):
        self.images, self.asked = images, []

    def __len__(self):
        return len(self.images)

    def view(self, indices, views, generator):
        self.asked.append(indices)
        return self.images[indices]


def test_each_pass_shuffles_anew_and_drops_what_fills_no_batch(teacher, images):
    source = Recorder(images)
    mimic(teacher, pruned(teacher), SEAM, source, quick(steps=6, batch_size=4))
    asked = [i for i in source.asked if len(i) > 1]  # single images only show how the networks run
    assert [len(i) for i in asked] == [4] * 6
    passes = [a + b for a, b in zip(asked[::2], asked[1::2], strict=True)]
    assert all(len(set(p)) == 8 for p in passes)
    assert len(set(map(tuple, passes))) == 3


def test_tensor_and_image_set_give_the_same_student(teacher, images):
    preprocessing = Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3)
    students = []
    for few in (images, read_images(images, preprocessing)):
        students.append(pruned(teacher))
        mimic(teacher, students[-1], SEAM, few, quick(views="patches", batch_size=4))
    assert equal(bits(students[0]), bits(students[1]))


def test_three_images_work_and_one_says_why_it_does_not(teacher):
    squeezed = nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4))
    seam = Seam((SeamPoint("1"),), ((4, 1, 1),), ())
    assert len(mimic(squeezed, copy.deepcopy(squeezed), seam, torch.randn(3, 3, 8, 8), quick()).losses) == 3
    student = copy.deepcopy(squeezed)
    with pytest.raises(InputError, match="at least 2 images"):
        mimic(squeezed, student, seam, torch.randn(1, 3, 8, 8), quick())
    assert len(mimic(squeezed, student, seam, torch.randn(1, 3, 8, 8), quick(norm_mode="eval")).losses) == 3


def test_any_forward_signature():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 4)

        def forward(self, tokens, *, scale):
            return self.body(tokens) * scale

    class Source(Recorder):
        def view(self, indices, views, generator):
            return (self.images[indices],), {"scale": torch.tensor(2.0)}

    teacher = Scaled()
    student = Scaled()
    log = mimic(teacher, student, Seam((SeamPoint(""),), ((4,),), ()), Source(torch.randn(6, 4)), quick(steps=2))
    tokens_grid = Source(torch.randn(6, 4)).images
    assert log.losses[0] > 0
    assert not torch.equal(student(tokens_grid, scale=1.0), teacher(tokens_grid, scale=1.0))


def test_student_of_another_class_with_other_names(teacher, images):
    student = randomised(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1)), 5)
    other = Seam((SeamPoint("2"),), ((6, 8, 8),), ())
    log = mimic(teacher, student, (SEAM, other), images, quick(steps=40))
    assert log.losses[-1] < log.losses[0]
    two = Seam((SeamPoint("0"), SeamPoint("2")), ((4, 8, 8), (6, 8, 8)), ())
    with pytest.raises(InputError, match=r"has 1 points, the student's 2"):
        mimic(teacher, student, [SEAM, two], images, quick())
    with pytest.raises(InputError, match="found 3 seams, expected one"):
        mimic(teacher, student, (SEAM, two, two), images, quick())


def test_several_points_add_up(teacher, images):
    def first(points):
        seam = Seam(tuple(map(SeamPoint, points)), ((6, 8, 8),) * len(points), SEAM.head)
        return mimic(teacher, pruned(teacher), seam, images, quick(steps=1)).losses[0]

    def variance(point):
        with torch.no_grad(), capturing(teacher.eval(), Seam((SeamPoint(point),), (), ())) as capture:
            feat = capture.features(images)[0]
            return float(feat.var(0, correction=0).mean().clamp_min(0.1 * feat.square().mean()))

    both = [first([point]) / variance(point) for point in ("two", "norm_two")]
    assert first(["two", "norm_two"]) == pytest.approx(sum(both), rel=1e-5)


# --- precision


@pytest.mark.parametrize("precision", ["float32", "float64", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_student_comes_back_in_its_own_dtype_with_its_head_bits(teacher, images, precision, dtype):
    teacher = teacher.to(dtype)
    before_teacher = bits(teacher)
    student = pruned(teacher.float()).to(dtype)
    teacher.to(dtype).load_state_dict(before_teacher)
    with torch.no_grad():
        student.fc.weight.copy_(torch.rand(5, 6, dtype=torch.float64))  # more digits than float32 holds
    before = bits(student)
    log = mimic(teacher, student, SEAM, images, quick(precision=precision))
    after = bits(student)
    assert {k: v.dtype for k, v in after.items()} == {k: v.dtype for k, v in before.items()}
    assert all(torch.equal(before[name], after[name]) for name in SEAM.head)
    assert not torch.equal(before["one.weight"], after["one.weight"])
    assert log.losses[-1] < log.losses[0]
    assert equal(bits(teacher), before_teacher)


def test_bf16_computes_in_bf16(teacher, images):
    exact, rough = (
        mimic(teacher, pruned(teacher), SEAM, images, quick(steps=1, precision=p)).losses[0]
        for p in ("float64", "bf16")
    )
    assert 1e-5 < abs(rough / exact - 1) < 0.1


def test_a_callers_autocast_and_no_grad_do_not_leak_in(teacher, images):
    plain, inside = pruned(teacher), pruned(teacher)
    mimic(teacher, plain, SEAM, images, quick())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mimic(teacher, inside, SEAM, images, quick())
    assert equal(bits(plain), bits(inside))


# --- when it ends early


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_keyboard_interrupt_leaves_a_usable_student(teacher, images, precision):
    student = pruned(teacher).train()
    before = bits(student)

    def on_step(done, total, loss):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mimic(teacher, student, SEAM, images, quick(precision=precision), on_step=on_step)
    assert not any(m.training or m._forward_hooks for m in student.modules())
    assert student(images).isfinite().all()
    assert student.one.weight.dtype == torch.float32
    assert not torch.equal(student.one.weight, before["one.weight"])
    assert all(p.grad is None for p in student.parameters())


def test_an_error_gives_the_students_tensors_back(teacher, images):
    student = pruned(teacher)
    before = bits(student)

    def on_step(done, total, loss):
        if done == 2:
            raise RuntimeError("full disk")

    with pytest.raises(RuntimeError, match="full disk"):
        mimic(teacher, student, SEAM, images, quick(precision="float64"), on_step=on_step)
    assert equal(before, bits(student))
    assert not any(m.training or m._forward_hooks for m in student.modules())


def test_divergence_names_the_step_and_gives_the_student_back(teacher, images):
    student = pruned(teacher)
    before = bits(student)
    with pytest.raises(
        InputError, match=r"loss at step \d+ of 50 is (nan|inf); the training diverged at a learning rate"
    ):
        mimic(teacher, student, SEAM, images, quick(steps=50, lr=1e15))
    assert equal(before, bits(student))


def test_on_step_counts_steps_done(teacher, images):
    calls = []
    log = mimic(teacher, pruned(teacher), SEAM, images, quick(), on_step=lambda *call: calls.append(call))
    assert calls == [(done, 3, log.losses[done - 1]) for done in (1, 2, 3)]


def test_no_steps_change_nothing(teacher, images):
    student = pruned(teacher)
    before = bits(student)
    assert mimic(teacher, student, SEAM, images, quick(steps=0)).losses == ()
    assert equal(before, bits(student))


# --- bad input


def test_feature_shapes_that_differ_are_named(teacher, images):
    with pytest.raises(InputError, match=r"one:output: the teacher gives \(10, 8, 8, 8\), the student \(10, 4, 8, 8\)"):
        mimic(teacher, pruned(teacher), Seam((SeamPoint("one"),), ((8, 8, 8),), SEAM.head), images, quick())


def test_teachers_own_nan_is_distinguished_from_divergence(teacher, images):
    with torch.no_grad():
        teacher.one.weight[0] = float("nan")
    with pytest.raises(InputError, match="teacher's own features are not finite"):
        mimic(teacher, randomised(Net(4)), SEAM, images, quick())


@pytest.mark.parametrize(
    ("few", "says"),
    [
        (torch.zeros(0, 3, 8, 8), "no images"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), r"torch.uint8 tensor of shape \(4, 3, 8, 8\)"),
    ],
)
def test_images_that_cannot_be_used(teacher, few, says):
    with pytest.raises(InputError, match=says):
        mimic(teacher, pruned(teacher), SEAM, few, quick())


def test_unknown_views_and_device_are_named(teacher, images):
    with pytest.raises(InputError, match=r"'kaleidoscope'.*patches"):
        mimic(teacher, pruned(teacher), SEAM, images, quick(views="kaleidoscope"))
    with pytest.raises(InputError, match="'cuda:99'"):
        mimic(teacher, pruned(teacher), SEAM, images, quick(device="cuda:99"))


def test_a_student_that_shares_tensors_with_the_teacher_is_refused(teacher, images):
    student = pruned(teacher)
    student.two = teacher.two
    with pytest.raises(InputError, match=r"shares the tensor 'two.weight'"):
        mimic(teacher, student, SEAM, images, quick())
    with pytest.raises(InputError, match="shares the tensor"):
        mimic(teacher, teacher, SEAM, images, quick())


def test_meta_tensors_are_refused(teacher, images):
    with pytest.raises(UnsupportedModel, match="tensors of the teacher are on meta"):
        mimic(Net().to("meta"), pruned(teacher), SEAM, images, quick())


def test_nothing_that_could_learn_is_said(teacher, images):
    everything = dataclasses.replace(SEAM, head=tuple(dict(teacher.named_parameters())))
    with pytest.raises(InputError, match="no parameter before its head"):
        mimic(teacher, copy.deepcopy(teacher), everything, images, quick())
    with pytest.raises(InputError, match="no parameter acts before the seam"):
        mimic(teacher, copy.deepcopy(teacher), Seam((SeamPoint("one", "input"),), ((3, 8, 8),), ()), images, quick())


@pytest.mark.parametrize("before", [False, True])
def test_denormals_are_zero_while_it_steps_and_as_before_afterwards(before, teacher, images):
    if not torch.set_flush_denormal(before):
        pytest.skip("this processor cannot flush them")
    small, seen = torch.tensor(1e-40), []
    try:
        options = {"on_step": lambda *_: seen.append((small * 1.0).item())}
        mimic(teacher, pruned(teacher), SEAM, images, quick(steps=2), **options)
        assert seen == [0.0, 0.0]
        assert ((small * 1.0).item() == 0.0) is before
    finally:
        torch.set_flush_denormal(False)


def test_a_batch_that_was_halved_is_said_also_after_an_interruption(teacher, images, monkeypatch):
    run = TrainingLoop._features

    def features(self, capture, folded, batch):
        if len(batch[0][0]) > 3:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return run(self, capture, folded, batch)

    def stop(done, total, loss):
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainingLoop, "_features", features)
    config, student = quick(steps=2, layout="contiguous", norm_mode="eval"), pruned(teacher)
    with pytest.raises(Stopped) as stopped:
        mimic(teacher, student, SEAM, images, config, on_step=stop)
    log = mimic(teacher, student, SEAM, images, config, checkpoint=stopped.value.checkpoint)
    assert (stopped.value.log.halved, log.halved) == (2, 2)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize("chooses", [False, True], ids=["last", "best"])
def test_going_on_from_a_checkpoint_comes_to_the_same_bits(teacher, images, optimizer, chooses):
    config = quick(steps=9, optimizer=optimizer, batch_size=5, mixing="both", momentum=0.9)
    others = images.flip(0) + 0.1 if chooses else None
    whole, first, second = pruned(teacher), pruned(teacher), pruned(teacher)
    log = mimic(teacher, whole, SEAM, images, config, choose=others)

    def stop(done, total, loss):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(Stopped) as stopped:
        mimic(teacher, first, SEAM, images, config, choose=others, on_step=stop)
    assert len(stopped.value.log.losses) == 4
    torch.manual_seed(77)
    again = mimic(teacher, second, SEAM, images, config, choose=others, checkpoint=stopped.value.checkpoint)
    assert equal(bits(whole), bits(second))
    assert (again.losses, again.errors, again.kept) == (log.losses, log.errors, log.kept)
    with pytest.raises(InputError, match="9 steps"):
        mimic(teacher, second, SEAM, images, quick(steps=8), checkpoint=stopped.value.checkpoint)
    with pytest.raises(InputError, match="another student"):
        mimic(teacher, Net(2).eval(), SEAM, images, config, checkpoint=stopped.value.checkpoint)


def test_checkpoints_come_while_it_runs_and_lead_to_the_same_bits(teacher, images, monkeypatch):
    monkeypatch.setattr("mimicut.recovery.training_loop._CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr("mimicut.recovery.training_loop._CHECKPOINT_PAUSE", 0.0)
    whole, found = pruned(teacher), []
    mimic(teacher, whole, SEAM, images, quick(steps=5), on_checkpoint=found.append)
    assert [len(each.data["losses"]) for each in found] == [1, 2, 3, 4, 5]
    for each in found:
        student = pruned(teacher)
        mimic(teacher, student, SEAM, images, quick(steps=5), checkpoint=each)
        assert equal(bits(whole), bits(student))


def test_ctrl_c_waits_for_the_step_and_a_second_one_does_not(teacher, images, monkeypatch):
    """A real signal, in the middle of the backward pass."""
    right = torch.Tensor.backward

    def backward(self, *args, times, **kwargs):
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        return right(self, *args, **kwargs)

    for times, kind in ((1, Stopped), (2, KeyboardInterrupt)):
        student = pruned(teacher)
        before = bits(student)
        monkeypatch.setattr(torch.Tensor, "backward", partialmethod(backward, times=times))
        with pytest.raises(KeyboardInterrupt) as error:
            mimic(teacher, student, SEAM, images, quick(steps=3))
        assert type(error.value) is kind
        assert torch.equal(student.one.weight, before["one.weight"]) is (times == 2)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Shielded(nn.Module):
    """A stem that its own forward keeps from training; an unused part."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), nn.Linear(6, 5)
        self.idle = nn.Linear(2, 2)

    def forward(self, x):
        with torch.no_grad():
            x = self.stem(x).relu()
        return self.fc(self.body(x).mean((2, 3)))


SHIELDED = Seam((SeamPoint("body"),), ((6, 4, 4),), ("fc.weight", "fc.bias"))


def test_a_part_that_no_gradient_reaches_is_named(images):
    teacher, student = randomised(Shielded()), randomised(Shielded(), seed=1)
    before = bits(student)
    log = mimic(teacher, student, SHIELDED, images, quick())
    assert log.untrained == ("stem",)
    assert log.to_json()["untrained"] == ["stem"]
    after = bits(student)
    assert torch.equal(before["stem.weight"], after["stem.weight"])
    assert not torch.equal(before["body.weight"], after["body.weight"])
    assert mimic(randomised(Net()), randomised(Net(), seed=1), SEAM, images, quick()).untrained == ()

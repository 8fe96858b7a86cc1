"""Each baseline is what its source says: loss, frozen parts, norm modes, steps and schedule, on tiny networks."""

import copy
from dataclasses import replace

import pytest
import torch
from nets import Chain, Depthwise, Residual
from PIL import Image
from torch import nn
from torch.nn import functional as F

from benchmarks.methods import METHODS, default, fitnet, mir, practise
from benchmarks.methods.distill import soft_loss
from benchmarks.methods.layers import layers, wide_student
from benchmarks.methods.problem import Problem, head_layer
from mimicut.anatomy.find_seam import trace
from mimicut.base.errors import InputError
from mimicut.base.guard import full_copy, seeded
from mimicut.inputs.image_set import Preprocessing, read_images
from mimicut.planning.planner import make_plan
from mimicut.proof.randomised import randomised
from mimicut.recovery.config import preset
from mimicut.surgery.cut import cut, drop_modules
from mimicut.surgery.seam import capturing

pytestmark = pytest.mark.long  # minutes: make test-all

IMAGES = torch.rand(10, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
LABELS = torch.arange(10) % 5


def problem(net=Chain, *, steps=1, labels=True, keep_width=0.5, views="none", **options) -> Problem:
    torch.manual_seed(0)
    teacher = randomised(net())
    anatomy = trace(teacher, teacher.example())
    few = read_images(IMAGES, Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3))
    plan = make_plan(teacher, anatomy, keep_width=keep_width)
    return Problem(teacher, anatomy, plan, few, LABELS if labels else None, views, steps, 7, options)


def run(name: str, given: Problem) -> nn.Module:
    with seeded(given.seed):
        return METHODS[name].run(replace(given, options=METHODS[name].published | given.options))


def one_step_by_hand(given: Problem, loss_of, lr: float, frozen=()) -> nn.Module:
    """The student after one SGD step (weight decay 1e-4) on the first batch, all of it in train mode."""
    student = given.student().train()
    x, y = next(given.batches())
    with torch.no_grad():
        wanted = given.teacher(x)
    loss_of(student(x), wanted, y).backward()
    with torch.no_grad():
        for name, p in student.named_parameters():
            if name not in frozen:
                # A run of one step is behind both milestones.
                p -= 0.01 * lr * (p.grad + 1e-4 * p)
    return student.eval()


def same(a: nn.Module, b: nn.Module, **tolerance) -> None:
    theirs = b.state_dict()
    for name, tensor in a.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name], msg=lambda m, name=name: f"{name}: {m}", **tolerance)


@pytest.fixture
def optimiser_steps(monkeypatch):
    """(learning rate, shapes of what had a gradient) of every optimiser step."""
    seen: list[tuple[float, int]] = []
    # All taken before any is replaced: AdamW inherits the step of Adam until its first use gives it one of its own.
    kinds = {kind: kind.step for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)}
    for kind, inner in kinds.items():

        def step(self, *args, inner=inner, kind=kind, **kwargs):
            group = self.param_groups[0]
            seen.append((type(self).__name__, group["lr"], sum(p.grad is not None for p in group["params"])))
            if kind is torch.optim.SGD:
                assert (group["momentum"], group["weight_decay"]) == (0.9, 1e-4)
            return inner(self, *args, **kwargs)

        monkeypatch.setattr(kind, "step", step)
    return seen


@pytest.mark.parametrize("head", ["trained", "frozen"])
def test_fine_tuning_is_cross_entropy_with_batch_statistics(head):
    given = problem(lr=10.0, head=head)
    frozen = given.plan.seam.head if head == "frozen" else ()
    same(run("fine_tune", given), one_step_by_hand(given, lambda z, t, y: F.cross_entropy(z, y), 10.0, frozen))


def test_distillation_with_labels_adds_a_tenth_of_cross_entropy():
    given = problem(lr=10.0)

    def loss(z, t, y):
        soft = -(F.softmax(t / 4, 1) * (F.log_softmax(z / 4, 1) - F.log_softmax(t / 4, 1))).sum(1).mean()
        return 0.9 * 16 * soft + 0.1 * F.cross_entropy(z, y)

    same(run("distill_labels", given), one_step_by_hand(given, loss, 10.0))
    same(run("distill", problem(lr=10.0, labels=False)), one_step_by_hand(given, lambda z, t, y: soft_loss(z, t), 10.0))


def test_soft_loss_is_zero_for_the_teacher_itself_and_scales_with_the_square_of_t():
    a, b = torch.randn(2, 6, 5, dtype=torch.float64)
    assert float(soft_loss(a, a)) == pytest.approx(0, abs=1e-12)
    p, q = (F.softmax(z / 2, 1) for z in (b, a))
    assert float(soft_loss(a, b, 2.0)) == pytest.approx(float(4 * (p * (p / q).log()).sum(1).mean()))


@pytest.mark.parametrize("name", ["fine_tune", "distill_labels", "distill"])
def test_the_schedule_of_the_baselines_is_that_of_mir(name, optimiser_steps):
    run(name, problem(lr=0.1, steps=10, labels=METHODS[name].labels))
    rates = [round(lr, 6) for _, lr, _ in optimiser_steps]
    assert rates == [0.1] * 4 + [0.01] * 4 + [0.001] * 2


def test_fitnet_learns_the_hint_first_and_then_everything(optimiser_steps):
    given = problem(lr=0.1, steps=10)
    run("fitnet", given)
    counts = [n for _, _, n in optimiser_steps]
    # Three convolutions: the hint is at the second. Stage one: two convolutions, a bias, a norm, and the regressor.
    assert counts == [7] * 5 + [11] * 5
    assert [round(lr, 6) for _, lr, _ in optimiser_steps] == [0.1] * 2 + [0.01] * 2 + [0.001] + [0.1] * 2 + [
        0.01
    ] * 2 + [0.001]


@pytest.mark.parametrize("regressor", ["kept", "random"])
def test_fitnet_by_hand(regressor):
    given = problem(lr=10.0, steps=2, regressor=regressor)
    student = given.student().train()
    x, y = next(given.batches())
    weight = torch.zeros(12, 6, 1, 1)
    weight[given.plan.slices["body.3.weight"][0], range(6)] = 1
    bias = torch.zeros(12)
    if regressor == "random":
        with seeded(given.seed):
            layer = nn.Conv2d(6, 12, 1)
        weight, bias = layer.weight.detach(), layer.bias.detach()
    hint = student.body[3](student.body[:3](x))
    with torch.no_grad():
        wanted = given.teacher.body[3](given.teacher.body[:3](x))
        logits = given.teacher(x)
    F.mse_loss(F.conv2d(hint, weight, bias), wanted).backward()
    step(student)
    z = student(x)
    soft = F.kl_div(F.log_softmax(z / 3, 1), F.softmax(logits / 3, 1), reduction="batchmean")
    (F.cross_entropy(z, y) + 4 * soft).backward()
    step(student)
    same(run("fitnet", given), student.eval(), rtol=1e-4, atol=1e-5)


def test_the_weight_of_fitnets_distillation_falls(monkeypatch):
    entropies, softs, losses = [], [], []
    inner, entropy, soft = torch.Tensor.backward, F.cross_entropy, fitnet.soft_loss
    monkeypatch.setattr(F, "cross_entropy", lambda *a: (entropies.append(entropy(*a)), entropies[-1])[1])
    monkeypatch.setattr(fitnet, "soft_loss", lambda *a: (softs.append(soft(*a)), softs[-1])[1])
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: (losses.append(self.item()), inner(self))[1])
    run("fitnet", problem(lr=0.1, steps=6))
    parts = zip(entropies, softs, (4.0, 3.0, 2.0), strict=True)
    assert losses[3:] == pytest.approx([(e + weight * s / 9).item() for e, s, weight in parts], rel=1e-5)


def step(student: nn.Module) -> None:
    with torch.no_grad():
        for p in student.parameters():
            if p.grad is not None:
                p -= 0.1 * (p.grad + 1e-4 * p)
                p.grad = None


def test_batch_norm_measures_plain_means_and_changes_no_weight():
    given = problem(labels=False)
    student = run("batch_norm", given)
    before = given.student()
    for (name, p), q in zip(student.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q), name
    x = given.few.batch()
    first = before.body[0](x)
    torch.testing.assert_close(student.body[1].running_mean, first.mean((0, 2, 3)))
    torch.testing.assert_close(student.body[1].running_var, first.var((0, 2, 3)))
    norm = copy.deepcopy(before.body[1]).train()
    second = before.body[3](before.body[2](norm(first)))
    torch.testing.assert_close(student.body[4].running_mean, second.mean((0, 2, 3)))
    assert not student.training


def test_batch_norm_over_views_averages_all_passes():
    given = problem(labels=False, rounds=3, views="patches")
    student, before = run("batch_norm", given), given.student()
    means = torch.stack([before.body[0](x).mean((0, 2, 3)) for x in given.views_of_all(3)])
    torch.testing.assert_close(student.body[1].running_mean, means.mean(0))
    assert means.std(0).max() > 1e-4  # the views do differ


def test_fitnet_says_when_it_cannot_tell_which_channels_are_left():
    given = problem(Residual, lr=0.1, regressor="kept")
    everywhere = make_plan(given.teacher, given.anatomy, keep_width=0.5, scheme="all")
    with pytest.raises(InputError, match="4 of 8 channels are left at stage1"):
        run("fitnet", replace(given, plan=everywhere))
    run("fitnet", replace(given, plan=everywhere, options={"lr": 0.1, "regressor": "random"}))


def test_fskd_solves_one_mixing_matrix_a_layer_and_absorbs_it():
    given = problem(labels=False)
    solved, student, teacher = run("fskd", given), given.student(), given.teacher
    x = given.few.batch()
    with torch.no_grad():
        found = student.body[0](x).transpose(0, 1).flatten(1).double()
        kept = given.plan.slices["body.0.weight"][0]
        wanted = teacher.body[0](x)[:, kept].transpose(0, 1).flatten(1).double()
        mix = torch.linalg.lstsq(found.T, wanted.T).solution.T
        again = torch.einsum("om,mikl->oikl", mix, student.body[0].weight.double())
        torch.testing.assert_close(solved.body[0].weight.double(), again, rtol=1e-4, atol=1e-5)
        # The second layer is estimated behind the corrected first one, without an intercept: least squares leaves a
        # residual that is orthogonal to everything the solution is made of.
        middle = solved.body[:3](x)
        own = student.body[3](middle).transpose(0, 1).flatten(1).double()
        target = teacher.body[3](teacher.body[:3](x))[:, given.plan.slices["body.3.weight"][0]]
        residual = target.transpose(0, 1).flatten(1).double() - solved.body[3](middle).transpose(0, 1).flatten(1)
        assert float((residual @ own.T).abs().max()) < 1e-3 * float((own @ own.T).abs().max())
        assert float(residual.square().sum()) < float((target.transpose(0, 1).flatten(1) - own).square().sum())
    same(nn.ModuleList([m for m in solved.modules() if isinstance(m, nn.BatchNorm2d)]),
         nn.ModuleList([m for m in student.modules() if isinstance(m, nn.BatchNorm2d)]))  # fmt: skip


def test_least_squares_gives_back_what_the_kept_channels_can_express():
    """Removed channels that are copies of kept ones: the solution is the teacher itself."""
    given = problem(Residual, labels=False, ridge=1e-12, rounds=1)
    teacher = given.teacher
    with torch.no_grad():
        for layer in layers(given):
            slices = given.plan.slices.get(f"{layer.name}.weight", {})
            if 0 not in slices:
                continue
            gone = [i for i in range(teacher.get_submodule(layer.name).out_channels) if i not in slices[0]]
            norm = teacher.get_submodule(layer.name.replace("conv", "bn"))
            source = [slices[0][k % len(slices[0])] for k in range(len(gone))]
            for tensor in (teacher.get_submodule(layer.name).weight, norm.weight, norm.bias, norm.running_mean,
                           norm.running_var):  # fmt: skip
                tensor[gone] = tensor[source]
    x = given.few.batch()
    with torch.no_grad():
        wanted, cut_alone = teacher(x), given.student()(x)
        solved = run("least_squares", given)(x)
    assert float((cut_alone - wanted).abs().max()) > 0.1
    torch.testing.assert_close(solved, wanted, rtol=1e-3, atol=1e-3)


def test_least_squares_is_ridge_towards_the_weights_that_the_cut_left():
    given = problem(labels=False, ridge=0.5, rounds=1)
    solved, student, teacher = run("least_squares", given), given.student(), given.teacher
    x = given.few.batch()
    with torch.no_grad():
        seen = F.unfold(student.body[:3](x), 3, padding=1).transpose(1, 2).flatten(0, 1).double()
        wanted = teacher.body[3](teacher.body[:3](x)).flatten(2).transpose(1, 2).flatten(0, 1).double()
        wanted = wanted[:, given.plan.slices["body.3.weight"][0]]
        weight = solved.body[3].weight.double().flatten(1).T
        gram = seen.T @ seen
        pull = 0.5 * gram.diagonal().mean() * (weight - student.body[3].weight.double().flatten(1).T)
        gradient = seen.T @ (seen @ weight - wanted) + pull
    assert float(gradient.abs().max()) < 1e-5 * float(gram.abs().max())
    assert torch.equal(solved.body[0].weight, student.body[0].weight)  # it lost no input


def test_the_last_layer_of_a_branch_makes_up_for_the_shortcuts_error():
    given = problem(Residual, labels=False, ridge=1e-9, rounds=0)
    name, x, seen = "stage1.1.conv2", given.few.batch(), {}
    solved = run("least_squares", given)
    for who, model in (("teacher", given.teacher), ("student", solved)):
        block = model.stage1[1]
        for what, module in (("shortcut", block), ("inside", block.conv2)):
            module.register_forward_pre_hook(lambda _, a, key=(who, what): seen.update({key: a[0]}))
        block.bn2.register_forward_hook(lambda _, __, out, key=(who, "branch"): seen.update({key: out}))
        with torch.no_grad():
            model(x)
    missed = seen["teacher", "shortcut"] - seen["student", "shortcut"]
    assert float(missed.abs().max()) > 1e-3
    # Least squares on the whole sum: what is left after it is orthogonal to all that the layer sees.
    left = seen["teacher", "branch"] + missed - seen["student", "branch"]
    columns = F.unfold(seen["student", "inside"], 3, padding=1).transpose(1, 2).flatten(0, 1).double()
    across = columns.T @ left.flatten(2).transpose(1, 2).flatten(0, 1).double()
    scale = columns.norm(dim=0)[:, None] * left.flatten(2).transpose(1, 2).flatten(0, 1).double().norm(dim=0)
    assert float((across / scale).abs().max()) < 1e-3, name


def test_the_wide_student_is_the_cut_one():
    given = problem(Depthwise, labels=False)
    wide, x = wide_student(given), given.few.batch()
    with torch.no_grad():
        torch.testing.assert_close(cut(wide, given.plan)(x), given.student()(x))
    assert all(p.shape == q.shape for p, q in zip(wide.parameters(), given.teacher.parameters(), strict=True))


def test_cross_distillation_ends_in_cross_entropy_with_batch_statistics():
    given = problem(lr=10.0, layer_lr=1e-3)  # of one step none is left for the layers
    same(run("cross_distillation", given), one_step_by_hand(given, lambda z, t, y: F.cross_entropy(z, y), 10.0))


def test_cross_distillation_counts_and_rates(optimiser_steps):
    run("cross_distillation", problem(steps=12))
    adam = [round(lr, 7) for kind, lr, _ in optimiser_steps if kind == "Adam"]
    sgd = [round(lr, 12) for kind, lr, _ in optimiser_steps if kind == "SGD"]
    one = [1e-3] * 3 + [1e-4] * 3  # half of the steps, a tenth of the rate after a third of them
    assert adam == one * 2  # two layers lost inputs
    assert sgd == [1e-5] * 4 + [1e-6] * 5 + [1e-7] * 3


@pytest.mark.parametrize(("net", "mu"), [(Chain, 0.6), (Residual, 0.9)])
def test_cross_distillation_crosses_features(net, mu, monkeypatch):
    """A loss is mu of the correction and 1 - mu of the imitation."""
    given, losses, errors = problem(net, steps=2, labels=True), [], []
    inner, mse = torch.Tensor.backward, F.mse_loss
    monkeypatch.setattr(F, "mse_loss", lambda a, b: (errors.append(mse(a, b)), errors[-1])[1])
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda self, *a, **k: (losses.append(self.item()), inner(self, *a, **k))
    )
    run("cross_distillation", given)
    monkeypatch.undo()
    pairs = [(c.item(), i.item()) for c, i in zip(errors[::2], errors[1::2], strict=True)]
    assert losses[: len(pairs)] == pytest.approx([mu * c + (1 - mu) * i for c, i in pairs], rel=1e-5)
    assert any(abs(c - i) > 1e-3 * c for c, i in pairs[1:])  # behind a fitted layer the two do differ
    # The correction is on the teacher's input, whatever became of the layers before: by hand for every layer.
    wide, x = wide_student(given), given.few.batch()
    narrowed = [layer.name for layer in layers(given) if layer.narrowed]
    for name, (correct, _) in zip(narrowed, pairs, strict=True):
        thin, lead, inputs = wide.get_submodule(name), given.teacher.get_submodule(name), []
        hook = lead.register_forward_pre_hook(lambda _, a, inputs=inputs: inputs.append(a[0]))
        with torch.no_grad():
            given.teacher(x)
            by_hand = mse(
                thin._conv_forward(inputs[0], thin.weight, None), lead._conv_forward(inputs[0], lead.weight, None)
            )
        hook.remove()
        assert correct == pytest.approx(float(by_hand), rel=1e-4), name


@pytest.mark.parametrize(("name", "features"), [("mir", lambda f: f), ("mir_after_pool", lambda f: f.mean((2, 3)))])
def test_mir_takes_the_map_and_its_ablation_what_the_head_is_given(name, features):
    given = problem(labels=False)
    student = given.student()
    for module in student.modules():
        module.training = isinstance(module, nn.BatchNorm2d)
    x, _ = next(given.batches())
    with torch.no_grad():
        wanted = features(given.teacher.body(x))
    F.mse_loss(features(student.body(x)), wanted).backward()
    with torch.no_grad():
        for key, p in student.named_parameters():
            if key not in given.plan.seam.head:
                p -= 0.0002 * (p.grad + 1e-4 * p)  # a run of one step is behind both milestones
    assert head_layer(given) == "fc"
    same(run(name, given), student)


def test_mir_is_the_paper_preset(optimiser_steps):
    run("mir", problem(labels=False, steps=10))
    assert [round(lr, 6) for _, lr, _ in optimiser_steps] == [0.02] * 4 + [0.002] * 4 + [0.0002] * 2


def test_mir_adamw_is_the_transformer_preset_but_for_its_learning_rate(optimiser_steps, monkeypatch):
    seen = []
    taken = mir.mimic
    monkeypatch.setattr(mir, "mimic", lambda *given: seen.append(given[-1]) or taken(*given))
    run("mir_adamw", problem(labels=False, steps=3, lr=0.5))
    assert seen == [preset("transformer", steps=3, views="none", seed=7, lr=0.5)]
    assert {kind for kind, *_ in optimiser_steps} == {"AdamW"}


def test_practise_adaptors_begin_as_identity_and_learn_alone(optimiser_steps):
    given = problem(Residual, labels=False, steps=4)
    block = next(b for b in practise.droppable(given.anatomy) if b.name == "stage1.1")
    behind, before = practise.around(given, block)
    # Behind what feeds the stream before the gap (stem, first block), before what reads it after (third block, stage2).
    assert set(behind) == {"stem", "stage1.0.conv2"}
    assert {"stage1.2.conv1"} <= set(before)
    assert not any(name.startswith("stage1.1") for name in behind + before)
    x = given.few.batch()
    with practise.adapted(given.teacher, behind, before) as adaptors, torch.no_grad():
        adapted = given.teacher(x)
    torch.testing.assert_close(adapted, given.teacher(x))
    state = {k: v.clone() for k, v in given.teacher.state_dict().items()}
    practise.recoverability(given, block)
    assert len(optimiser_steps) == 2  # half of the steps
    assert {n for _, _, n in optimiser_steps} == {len(adaptors)}
    assert [round(lr, 6) for _, lr, _ in optimiser_steps] == [0.002, 0.0002]  # 0.02 at their share of the schedule
    assert all(torch.equal(v, state[k]) for k, v in given.teacher.state_dict().items())


def test_practise_probes_with_frozen_norms_for_the_squared_error_at_the_seam(monkeypatch):
    given = problem(Residual, labels=False)
    block = next(b for b in practise.droppable(given.anatomy) if b.name == "stage1.1")

    def train(probe, loss_of, problem, **how):
        assert not any(m.training for m in probe.modules())
        assert not any(p.requires_grad for p in probe.parameters())
        assert (how["lr"], how["steps"]) == (0.02, 0)

    monkeypatch.setattr(practise, "train", train)
    probe, x = drop_modules(full_copy(given.teacher), block.dropped_modules).eval(), given.few.batch()
    with torch.no_grad(), capturing(given.teacher, given.plan.seam) as lead, capturing(probe, given.plan.seam) as own:
        by_hand = float((own.features(x)[0] - lead.features(x)[0]).square().mean())
    assert practise.recoverability(given, block) == pytest.approx(by_hand, rel=1e-5)


def test_practise_divides_by_what_a_drop_saves_and_mimics_the_rest(monkeypatch, optimiser_steps):
    given = problem(Residual, labels=False, steps=10, keep_width=0.6)
    names = [b.name for b in practise.droppable(given.anatomy)]
    monkeypatch.setattr(practise, "recoverability", lambda _, block: 1.0 + (block.name == names[1]) * 0.5)
    monkeypatch.setattr(practise, "saved", lambda _, block, total: 10.0 if block.name == names[1] else 5.0)
    student = run("practise", given)
    gone = [n for n in names if isinstance(student.get_submodule(n), nn.Identity)]
    assert names[1] in gone
    assert [round(lr, 6) for _, lr, _ in optimiser_steps] == [0.02] * 4 + [0.002] * 4 + [0.0002] * 2
    bare = drop_modules(full_copy(given.teacher), [(name, "through") for name in gone]).state_dict()
    assert not all(torch.equal(v, bare[k]) for k, v in student.state_dict().items())


def test_practise_drops_the_block_that_does_nothing():
    given = problem(Residual, labels=False, steps=4, keep_width=0.6)
    with torch.no_grad():
        given.teacher.stage1[2].bn2.weight.zero_()
        given.teacher.stage1[2].bn2.bias.zero_()
    names = {b.name for b in practise.droppable(given.anatomy)}
    assert "stage1.2" in names
    student = run("practise", given)
    assert isinstance(student.stage1[2], nn.Identity)
    dropped = sum(isinstance(student.get_submodule(name), nn.Identity) for name in names)
    assert dropped == len(names) - -(-len(names) * 6 // 10)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_keeps_the_teacher_and_is_repeatable(name, tmp_path, monkeypatch):
    monkeypatch.setattr(default, "PICTURES", tmp_path)
    for number in range(3):
        Image.effect_noise((40 + number, 40), 60).convert("RGB").save(tmp_path / f"{number}.png")
    given = problem(Residual, steps=2, labels=METHODS[name].labels, views="patches")
    state = {k: v.clone() for k, v in given.teacher.state_dict().items()}
    first, second = (run(name, given).state_dict() for _ in range(2))
    assert all(torch.equal(v, second[k]) for k, v in first.items())
    assert all(torch.equal(v, state[k]) for k, v in given.teacher.state_dict().items())
    assert not given.teacher.training
    assert not any(given.teacher._forward_hooks or m._forward_hooks or m._forward_pre_hooks
                   for m in given.teacher.modules())  # fmt: skip


def test_which_methods_are_given_labels():
    assert {n for n, m in METHODS.items() if m.labels} == {
        "fine_tune",
        "distill_labels",
        "fitnet",
        "cross_distillation",
    }
    for method in METHODS.values():
        assert not method.grid or method.published in method.grid

"""The recipe around mimic: what images say of channels, widths chosen by that, norms, Muon, and choosing by images."""

import nets
import numpy as np
import pytest
import torch
from torch import nn

from mimicut.anatomy.find_seam import trace
from mimicut.base.errors import InputError
from mimicut.base.guard import named_tensors
from mimicut.planning.evidence import channel_evidence
from mimicut.planning.importance import Evidence
from mimicut.planning.planner import make_plan
from mimicut.proof.randomised import randomised
from mimicut.recovery.config import EFFORTS, ConfigChanges, MimicConfig, preset
from mimicut.recovery.cut_student import CutStudent
from mimicut.recovery.mimic import mimic
from mimicut.recovery.muon import Muon, orthogonal
from mimicut.recovery.norms import settle_norms
from mimicut.recovery.recover import recover
from mimicut.surgery.cut import cut


def setting(kind):
    teacher = randomised(kind())
    torch.manual_seed(3)
    return teacher, trace(teacher, teacher.example()), torch.randn(24, *teacher.size)


def quick(**changes):
    return preset("default", views="none", **{"steps": 4, **changes})


class Linears(nn.Module):
    size = (5,)

    def __init__(self):
        super().__init__()
        self.one, self.two, self.fc = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.two(torch.tanh(self.one(x))))


def test_the_elimination_is_that_of_brute_force():
    torch.manual_seed(0)
    teacher = Linears().eval()
    images = torch.randn(400, 5)
    evidence = channel_evidence(teacher, trace(teacher, torch.zeros(2, 5)), images, mixing="none")
    with torch.no_grad():
        x = torch.tanh(teacher.one(images)).double()
        y = x @ teacher.two.weight.double().T
        spread = float((y - y.mean(0)).square().sum())

    gram, weight = x.T @ x, teacher.two.weight.detach().double().T
    held = gram + 1e-3 * gram.diagonal().mean() * torch.eye(6, dtype=gram.dtype)

    def missing(kept):
        """What is off when the units in `kept` do the work of all, as well as they can; the ridge counts too."""
        change = -weight.clone()
        change[kept] += torch.linalg.solve(held[kept][:, kept], held[kept] @ weight)
        return float((change * (held @ change)).sum()) / spread

    kept = list(range(6))
    for unit in np.argsort(evidence.scores["one"]).tolist()[:-1]:
        least = min(missing([k for k in kept if k != other]) for other in kept)
        kept.remove(unit)
        # The seam is behind this layer: an error here is one there, but for the noise of the gradients.
        assert missing(kept) <= 1.3 * least
        assert evidence.errors["one"][len(kept)] == pytest.approx(missing(kept), rel=0.3)
    assert evidence.errors["one"][6] == 0
    assert evidence.errors["one"][0] == np.inf


@pytest.mark.parametrize("kind", [nets.Residual, nets.Depthwise, nets.FusedHeads, nets.GroupedQuery])
def test_evidence_leaves_the_teacher_as_it_was(kind):
    teacher, anatomy, images = setting(kind)
    teacher.train()
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    before, state = {n: t.clone() for n, t in named_tensors(teacher).items()}, torch.get_rng_state()
    first, second = (channel_evidence(teacher, anatomy, images, seed=1) for _ in range(2))
    assert first.scores
    for name, scores in first.scores.items():
        assert sorted(scores.tolist()) == sorted(set(scores.tolist()))
        assert np.array_equal(scores, second.scores[name])
        assert (np.diff(first.errors[name][1:]) <= 1e-9).all()
    assert teacher.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(t, before[n]) and t.grad is None for n, t in named_tensors(teacher).items())


def test_widths_go_where_the_images_say():
    teacher, anatomy, _ = setting(nets.Residual)
    groups = {g.name: g for g in anatomy.groups.values() if g.pinned is None}
    dear, cheap = "stage1.1.conv1", "stage1.0.conv1"
    scores = {n: np.arange(g.width)[::-1].copy() for n, g in groups.items()}
    worth = {dear: 100.0, cheap: 0.01}
    errors = {n: np.linspace(worth.get(n, 1.0), 0.0, g.width + 1) for n, g in groups.items()}
    evidence = Evidence(scores, errors)
    even = make_plan(teacher, anatomy, keep=0.8, scheme="all")
    plan = make_plan(teacher, anatomy, keep=0.8, scheme="all", evidence=evidence)
    assert plan.widths[dear] > even.widths[dear]
    assert plan.widths[cheap] < even.widths[cheap]
    assert plan.widths[cheap] >= int(0.35 * even.widths[cheap])  # a choice from few images cannot ruin a group
    assert plan.keep[cheap] == list(range(plan.widths[cheap]))
    assert plan.macs["student"] <= 0.8 * plan.macs["teacher"]
    assert plan.score == "evidence"


def test_recovering_beats_the_cut_and_keeps_the_head():
    teacher, anatomy, images = setting(nets.Residual)
    plan = make_plan(teacher, anatomy, keep_width=0.5)
    student = cut(teacher, plan)
    said = []
    done = recover(
        CutStudent(teacher, student, anatomy, plan),
        images,
        quick(),
        choose=torch.randn(6, 3, 8, 8),
        on_stage=said.append,
    )
    assert done.errors["norms"] <= done.errors["closed_form"] < done.errors["cut"]
    assert done.mimic.errors[0][0] == 0
    assert done.mimic.kept in dict(done.mimic.errors)
    assert any("about" in text and "4 steps" in text for text in said)
    own, theirs = named_tensors(student), named_tensors(teacher)
    assert all(torch.equal(own[name], theirs[name]) for name in plan.seam.head)


def test_no_time_is_no_steps_and_the_paper_is_mimic_alone():
    teacher, anatomy, images = setting(nets.Chain)
    plan = make_plan(teacher, anatomy, keep_width=0.5)
    done = recover(CutStudent(teacher, cut(teacher, plan), anatomy, plan), images, quick(steps=1000), max_seconds=0.0)
    assert done.mimic.config.steps == 0
    paper, alone = cut(teacher, plan), cut(teacher, plan)
    config = preset("paper", views="none", steps=3)
    assert recover(CutStudent(teacher, paper, anatomy, plan), images, config).closed_form is None
    mimic(teacher, alone, plan.seam, images, config)
    pairs = zip(named_tensors(paper).values(), named_tensors(alone).values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_best_step_on_the_images_to_choose_by_is_kept():
    teacher, anatomy, images = setting(nets.Chain)
    plan = make_plan(teacher, anatomy, keep_width=0.5)
    student = cut(teacher, plan)
    before = {n: t.clone() for n, t in named_tensors(student).items()}
    wild = quick(steps=5, lr=100.0, warmup=0.0)
    log = mimic(teacher, student, plan.seam, images, wild, choose=images[:5])
    assert log.kept == 0
    assert all(torch.equal(t, before[n]) for n, t in named_tensors(student).items())


def test_norms_take_what_the_images_say():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    images = 3 + torch.randn(64, 3, 8, 8)
    with torch.no_grad():
        out = teacher[0](images)
        teacher[1].running_mean.copy_(out.mean((0, 2, 3)))
        teacher[1].running_var.copy_(out.var((0, 2, 3)))
    student = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    student.load_state_dict(teacher.state_dict())
    wanted = teacher(images).detach()

    def error():
        with torch.no_grad():
            return float((student(images) - wanted).square().mean())

    assert settle_norms(student, (), [((images,), {})], error) == 0.0  # they are right as they are
    student[1].running_mean.add_(5)
    student[1].running_var.mul_(4)
    assert settle_norms(student, (), [((images,), {})], error) == 1.0
    assert error() < 1e-3
    student[1].running_mean.add_(5)
    assert settle_norms(student, ("1.running_var",), [((images,), {})], error) == 0.0  # of the head


def test_muon_makes_all_directions_alike_and_vectors_move_by_adamw():
    torch.manual_seed(0)
    left, right = torch.linalg.qr(torch.randn(6, 6))[0], torch.linalg.qr(torch.randn(6, 6))[0]
    matrix = left @ torch.diag(torch.tensor([10.0, 3.0, 1.0, 0.5, 0.3, 0.1])) @ right
    for given in (matrix, matrix[:4], matrix[:, :4], matrix[:5]):
        values = torch.linalg.svdvals(orthogonal(given))
        assert float(values.max()) < 1.3
        assert float(values.min()) > 0.3
    weight, deep, bias = (nn.Parameter(torch.zeros(*s)) for s in ((6, 6), (4, 1, 3, 3), (6,)))
    optimiser = Muon([weight, deep, bias], lr=0.1, weight_decay=0.0, momentum=0.0)
    weight.grad, deep.grad, bias.grad = matrix.clone(), torch.randn(4, 1, 3, 3), torch.randn(6)
    optimiser.step()
    assert torch.allclose(weight, -0.1 * 0.2 * 6**0.5 * orthogonal(matrix), atol=1e-6)
    assert torch.allclose(deep.flatten(1).norm(dim=1), torch.full((4,), 0.1 * 0.2 * 3.0), atol=1e-6)
    assert torch.allclose(bias, -0.01 * bias.grad.sign(), atol=1e-5)


def test_muon_moves_weights_of_one_shape_together_as_it_moves_each_alone():
    def moved(names):
        torch.manual_seed(1)
        weights = {n: nn.Parameter(torch.randn(*s)) for n, s in shapes.items()}
        for weight in weights.values():
            weight.grad = torch.randn_like(weight)
        optimiser = Muon([weights[n] for n in names], lr=0.1, weight_decay=0.01, momentum=0.9)
        optimiser.step()
        optimiser.step()
        return weights

    shapes = {"a": (6, 4, 3, 3), "b": (6, 4, 3, 3), "c": (8, 8), "d": (8, 8), "e": (5, 1, 3, 3), "f": (5, 1, 3, 3)}
    together = moved(shapes)
    for name in shapes:
        assert torch.allclose(moved([name])[name], together[name], atol=1e-6)
    # Newton-Schulz as it is written in its source, on the matrix itself and in float64. From 256 rows the products are
    # computed in strips: 301 leaves a narrower last one.
    for rows, columns in ((12, 40), (301, 302), (301, 700)):
        matrix = torch.randn(rows, columns, dtype=torch.float64)
        plain = matrix / matrix.norm()
        for _ in range(5):
            gram = plain @ plain.T
            plain = 3.4445 * plain + (-4.7750 * gram + 2.0315 * gram @ gram) @ plain
        assert torch.allclose(orthogonal(torch.stack([-matrix, matrix]))[1], plain, atol=1e-10)
    matrix = torch.randn(12, 40, dtype=torch.float64)
    assert torch.allclose(orthogonal(matrix[:, :13]).T, orthogonal(matrix[:, :13].T), atol=1e-10)


def test_effort_is_a_dial_over_steps():
    assert [preset("default", effort).steps for effort in EFFORTS] == list(EFFORTS.values())
    assert preset("default").steps == EFFORTS["standard"]
    with pytest.raises(InputError, match="quick, standard, thorough"):
        preset("default", "slow")
    with pytest.raises(InputError, match="preset default"):
        preset("paper", "quick")
    with pytest.raises(InputError, match="not both"):
        preset("default", "quick", steps=3)


def test_the_learning_rate_rises_and_falls():
    config = MimicConfig(steps=10, lr=1.0, schedule="linear", warmup=0.4)
    assert [config.lr_at(s) for s in (0, 1, 3, 4, 9)] == pytest.approx([0.25, 0.45, 0.7, 0.6, 0.1])


def test_every_field_of_a_recipe_can_be_changed_and_a_misspelt_one_is_named():
    assert set(ConfigChanges.__annotations__) == set(MimicConfig.__dataclass_fields__)
    with pytest.raises(InputError, match="no option 'setps'; did you mean 'steps'"):
        preset("default", setps=3)

"""How long steps are, measured on the network at hand, and the rehearsal that decides: neither harms a student."""

import nets
import pytest
import torch

from mimicut.anatomy.find_seam import trace
from mimicut.base.errors import Stopped
from mimicut.base.guard import full_copy, named_tensors
from mimicut.planning.planner import make_plan
from mimicut.proof.randomised import randomised
from mimicut.recovery import rehearsal
from mimicut.recovery.batches import Passes, WithExtra
from mimicut.recovery.config import preset
from mimicut.recovery.cut_student import CutStudent
from mimicut.recovery.judge import Judge
from mimicut.recovery.mimic import mimic
from mimicut.recovery.pair import Pair
from mimicut.recovery.recover import recover
from mimicut.recovery.settle_options import REACH, measure_rate
from mimicut.surgery.cut import cut
from mimicut.surgery.seam import capturing


def quick(**changes):
    return preset("default", views="none", **{"steps": 4, "mixing": "none", **changes})


def setting(kind=nets.Residual, images=24):
    teacher = randomised(kind())
    anatomy = trace(teacher, teacher.example())
    plan = make_plan(teacher, anatomy, keep_width=0.5)
    torch.manual_seed(3)
    return teacher, anatomy, plan, torch.randn(images, *teacher.size)


def bits(model):
    return {name: tensor.clone() for name, tensor in named_tensors(model).items()}


def same(model, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in named_tensors(model).items())


def moved(teacher, seam, one, other, images):
    """Of the teacher's variance, how far the features of two networks are apart."""
    found = []
    for model in (one, other, teacher):
        with torch.no_grad(), capturing(model, seam) as capture:
            found.append(torch.cat([f.flatten(1) for f in capture.features(images)], 1).double())
    mean = found[2].mean(0)
    return float((found[0] - found[1]).square().sum() / (found[2] - mean).square().sum())


def test_a_step_of_the_measured_rate_moves_the_features_as_far_as_it_should():
    teacher, _, plan, images = setting()
    student = cut(teacher, plan)
    before = bits(student)
    rate = measure_rate(Pair.of(teacher, student, plan.seam), images, quick(layout="contiguous", precision="float32"))
    assert same(student, before)
    stepped = full_copy(student)
    mimic(teacher, stepped, plan.seam, images, quick(steps=1, warmup=0.0, lr=rate))
    assert REACH / 3 < moved(teacher, plan.seam, stepped, student, images) < REACH * 3


def test_layers_whose_output_is_scaled_up_behind_them_get_shorter_steps():
    """One network and another that computes the same, with smaller weights in front of a larger scale."""
    teacher, _, plan, images = setting(nets.Chain)
    scaled = full_copy(teacher)
    with torch.no_grad():
        norm = next(m for m in scaled.modules() if isinstance(m, torch.nn.BatchNorm2d))
        conv = next(m for m in scaled.modules() if isinstance(m, torch.nn.Conv2d))
        conv.weight.mul_(0.02)
        if conv.bias is not None:
            conv.bias.mul_(0.02)
        norm.running_mean.mul_(0.02)
        norm.weight.mul_(50.0)
    rates = [
        measure_rate(Pair.of(t, cut(t, plan), plan.seam), images, quick(layout="contiguous", precision="float32"))
        for t in (teacher, scaled)
    ]
    assert rates[1] < rates[0] / 3


@pytest.mark.parametrize(("images", "batch"), [(1, 64), (24, 1), (24, 64)])
def test_the_rate_is_that_of_the_network_whatever_a_batch_holds(images, batch):
    """One image has no variance to measure a move by."""
    teacher, _anatomy, plan, few = setting(nets.Chain)
    student = cut(teacher, plan).eval()
    config = quick(batch_size=batch, layout="contiguous", precision="float32")
    assert 1e-3 < measure_rate(Pair.of(teacher, student, plan.seam), few[:images], config) < 1


@pytest.mark.long
def test_a_rate_that_diverges_is_made_smaller():
    teacher, anatomy, plan, few = setting()
    student = cut(teacher, plan).eval()
    wild = quick(optimizer="sgd", lr=1e20, steps=20)
    log = recover(CutStudent(teacher, student, anatomy, plan), few, wild)
    assert log.mimic.config.steps == 0
    assert [error for _, error in log.rehearsal["tried"]] == [None] * 3
    assert log.rehearsal["rate"] == 0


def test_a_recipe_that_begins_with_a_loss_and_gains_in_the_end_is_not_left_out(monkeypatch):
    teacher, anatomy, plan, images = setting()
    lengths = []

    def pretended(teacher, student, seam, few, config, **options):
        """A loss in the first steps, and a gain from the fifth on: a perfect student."""
        lengths.append(config.steps)
        with torch.no_grad():
            for name, tensor in student.named_parameters():
                if name not in plan.seam.head:
                    tensor.copy_(solved.get_parameter(name) if config.steps >= 25 else torch.zeros_like(tensor))

    solved = cut(teacher, plan)
    mimic(teacher, solved, plan.seam, images, quick(steps=60))
    case = CutStudent(teacher, cut(teacher, plan), anatomy, plan)
    judge = Judge(teacher, plan.seam, [((images,), {})])
    monkeypatch.setattr(rehearsal, "mimic", pretended)
    for longer, steps, rate in ((True, 100, 1.0), (False, 100, 0.0), (True, 24, 0.0)):
        lengths.clear()
        found = rehearsal.try_rates(judge, 6, case, images, quick(steps=steps, lr=1e-3), longer=longer)
        assert found.rate == rate
        assert (found.longer is not None) is longer
    assert lengths == [5, 5, 5, 6]
    assert "after 6 steps at the whole rate" in str(found)


def test_it_says_why_nothing_is_rehearsed():
    teacher, anatomy, plan, few = setting(nets.Chain)
    said = []
    recover(
        CutStudent(teacher, cut(teacher, plan).eval(), anatomy, plan), few[:3], quick(), on_stage=said.append
    )  # fmt: skip
    assert "not rehearsing: 3 images are too few, or too similar, to set some aside" in said
    assert not any(text.startswith("rehearsing") for text in said)


def test_the_rate_is_in_the_log_and_in_what_a_stopped_run_goes_on_from():
    teacher, _, plan, images = setting()
    whole, part = cut(teacher, plan), cut(teacher, plan)
    log = mimic(teacher, whole, plan.seam, images, quick(steps=6))
    assert log.config.lr > 0
    assert log.lrs[0] > 0

    def stop(done, total, loss):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(Stopped) as stopped:
        mimic(teacher, part, plan.seam, images, quick(steps=6), on_step=stop)
    mimic(teacher, part, plan.seam, images, quick(steps=6), checkpoint=stopped.value.checkpoint)
    assert same(part, bits(whole))


def test_without_a_step_no_rate_is_needed():
    teacher, _, plan, images = setting()
    student = cut(teacher, plan)
    before = bits(student)
    assert mimic(teacher, student, plan.seam, images, quick(steps=0)).losses == ()
    assert same(student, before)


@pytest.mark.long
def test_a_rate_that_does_harm_is_made_smaller_and_one_that_always_does_is_not_taken():
    teacher, anatomy, plan, images = setting()
    fair = recover(CutStudent(teacher, cut(teacher, plan), anatomy, plan), images, quick(steps=20)).rehearsal
    assert fair["rate"] > 0
    assert fair["tried"][-1][1] < fair["error"]

    alone, student = cut(teacher, plan), cut(teacher, plan)
    recover(CutStudent(teacher, alone, anatomy, plan), images, quick(steps=0))
    said = []
    found = recover(CutStudent(teacher, student, anatomy, plan), images, quick(steps=20, lr=3.0), on_stage=said.append)
    assert found.rehearsal["rate"] == 0
    assert [share for share, _ in found.rehearsal["tried"]] == list(rehearsal.RATES)
    assert found.mimic.losses == ()
    assert same(student, bits(alone))
    assert any("left out" in text for text in said)


@pytest.mark.long
def test_extra_images_that_only_do_harm_are_left_out(monkeypatch):
    teacher, anatomy, plan, images = setting()
    said = []

    def harmful(teacher, trial, seam, given, *args, **kwargs):
        if isinstance(given, WithExtra):
            with torch.no_grad():
                for parameter in trial.parameters():
                    parameter.add_(1)
        else:
            mimic(teacher, trial, seam, given, *args, **kwargs)

    monkeypatch.setattr(rehearsal, "mimic", harmful)

    def recovered(few):
        student = cut(teacher, plan)
        case = CutStudent(teacher, student, anatomy, plan)
        return student, recover(case, few, quick(steps=20, lr=0.01), on_stage=said.append)

    extra = torch.randn(12, *teacher.size)
    (student, found), (alone, wanted) = recovered(WithExtra(images, extra)), recovered(images)
    assert found.rehearsal["alone"] == (1.0, wanted.rehearsal["tried"][0][1])
    assert found.mimic.extra == 0
    assert same(student, bits(alone))
    assert any("without the extra images, which are left out" in text for text in said)


def test_images_aside_take_no_part_and_all_of_them_train_in_the_end(monkeypatch):
    teacher, anatomy, plan, images = setting()
    seen = []

    def noted(*args, **kwargs):
        seen.append(args[3])
        return mimic(*args, **kwargs)

    monkeypatch.setattr(rehearsal, "mimic", noted)
    found = recover(CutStudent(teacher, cut(teacher, plan), anatomy, plan), images, quick())
    assert found.rehearsal["images"] == 6
    assert [len(few) for few in seen] == [18] * len(seen)
    assert found.mimic.images == 24


def test_images_to_choose_by_judge_instead():
    teacher, anatomy, plan, images = setting(images=40)
    found = recover(CutStudent(teacher, cut(teacher, plan), anatomy, plan), images[:30], quick(), choose=images[30:])
    assert found.rehearsal["images"] == 10


def test_equal_images_stay_together_and_too_few_are_not_parted():
    images = torch.randn(3, 2, 4, 4).repeat(3, 1, 1, 1)
    assert rehearsal.divide(images, 0) is None
    images = torch.cat([images, torch.randn(5, 2, 4, 4)])
    rest, aside = rehearsal.divide(images, 0)
    apart = {tuple(images[i].flatten().tolist()) for i in rest} & {tuple(images[i].flatten().tolist()) for i in aside}
    assert not apart
    assert len(aside) == 2


def test_the_paper_rehearses_nothing():
    teacher, anatomy, plan, images = setting()
    paper = preset("paper", views="none", steps=2)
    assert recover(CutStudent(teacher, cut(teacher, plan), anatomy, plan), images, paper).rehearsal is None


def test_mixing_sets_in_over_the_first_batches():
    images = torch.randn(8, 3, 4, 4)
    batches = Passes(images, 8, "none", "both", 0, torch.device("cpu"), torch.float32, rise=4)
    plain = {tuple(image.flatten().tolist()) for image in images}
    mixed = []
    for _ in range(5):
        (batch,), _ = next(batches)
        mixed.append(sum(tuple(image.flatten().tolist()) not in plain for image in batch))
    assert mixed[0] <= 2
    assert mixed[1] <= 4
    assert max(mixed[3:]) > 4

"""Figures against answers by hand."""

import copy
import json

import pytest
import torch
from by_hand import SCORES_NK, SEAM, scaler
from scipy.stats import binomtest
from torch import nn

from mimicut.base.environment import platform_kind, versions
from mimicut.base.errors import InputError, LawBroken, StoreError, UnsupportedModel
from mimicut.inputs.image_set import Preprocessing, read_images
from mimicut.inputs.labels import labels_from_folders
from mimicut.proof.certificate import binomial_interval
from mimicut.proof.figures import accuracy, figures
from mimicut.results.report import Report
from mimicut.surgery.seam import Seam, SeamPoint


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_figures_by_hand(batch_size):
    teacher, model = scaler(1.0, 1.0, 1.0), scaler(1.0, 2.0, 1.0)
    done = []
    found = figures(teacher, model, SEAM, SCORES_NK, batch_size=batch_size, on_progress=lambda *at: done.append(at))
    assert done == [(min(4, at), 4) for at in range(batch_size, 4 + batch_size, batch_size)]
    # The second score doubles: squared error 1 + 4 + 0 + 16; only the fourth image changes its class.
    deviation = ((SCORES_NK - SCORES_NK.mean(0)) ** 2).sum().item()
    assert found.feature_error_relative == pytest.approx(21 / deviation, rel=1e-12)
    assert found.top1_agreement == 0.75
    interval = binomtest(3, 4).proportion_ci(method="exact")
    assert (found.top1_agreement_low, found.top1_agreement_high) == pytest.approx((interval.low, interval.high))
    assert found.images_held_out == 4
    assert found.notes == ()


def test_the_teacher_itself_agrees_wholly_and_the_mean_feature_has_error_one():
    teacher = scaler(1.0, 1.0, 1.0)
    same = figures(teacher, copy.deepcopy(teacher), SEAM, SCORES_NK)
    assert (same.top1_agreement, same.top1_agreement_high, same.feature_error_relative) == (1.0, 1.0, 0.0)
    constant = nn.Sequential(nn.Linear(3, 3), nn.Identity())
    constant[0].weight = nn.Parameter(torch.zeros(3, 3))
    constant[0].bias = nn.Parameter(SCORES_NK.mean(0))
    assert figures(teacher, constant, SEAM, SCORES_NK).feature_error_relative == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 2, 3, 1)])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_first_maps_by_hand(axes, batch_size):
    """One place is strong, in both orders of the axes; the student is half as strong."""
    images = torch.zeros(6, 2, 3, 3)
    images[:, :, 1, 2] = torch.tensor([3.0, 4.0])

    class Half(nn.Module):
        def forward(self, x):
            return x / 2

    seam = Seam((SeamPoint("0"),), ((2, 3, 3),), ())
    teacher, model = (nn.Sequential(first, nn.Identity()) for first in (nn.Identity(), Half()))
    found = figures(teacher, model, seam, images.permute(axes), batch_size=batch_size)
    rows = [[0.0] * 3, [0.0, 0.0, 1.0], [0.0] * 3]
    half = [[value / 2 for value in row] for row in rows]
    assert found.feature_maps == tuple({"image": i, "teacher": rows, "student": half} for i in range(4))
    assert figures(scaler(1.0, 1.0, 1.0), scaler(1.0, 1.0, 1.0), SEAM, SCORES_NK).feature_maps == ()


def test_maps_of_patches_by_hand():
    """Tokens of a network as a transformer gives them: one of its own, and then a patch of 4 x 4 pixels each."""

    class Tokens(nn.Module):
        def forward(self, x):
            patches = nn.functional.avg_pool2d(x, 4).flatten(2).transpose(1, 2)
            return torch.cat([patches.new_full((len(x), 1, 1), 9.0), patches], 1)

    images = torch.zeros(2, 1, 8, 12)
    images[:, :, 4:, 8:] = 5.0  # the last patch
    seam = Seam((SeamPoint("0"),), ((2, 7, 1),), ())
    model = nn.Sequential(Tokens(), nn.Flatten())
    strong = [[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    assert figures(model, model, seam, images).feature_maps == tuple(
        {"image": i, "teacher": strong, "student": strong} for i in range(2)
    )


def test_several_points_are_averaged():
    teacher, model = scaler(1.0, 1.0, 1.0), scaler(1.0, 2.0, 1.0)
    one = figures(teacher, model, SEAM, SCORES_NK).feature_error_relative
    seam = Seam((SeamPoint("0", "input"), SeamPoint("0")), ((3,), (3,)), ())
    assert figures(teacher, model, seam, SCORES_NK).feature_error_relative == pytest.approx(one / 2)


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (10, 10), (1, 1), (7, 50), (9999, 10000)])
def test_interval_is_the_exact_one(successes, trials):
    interval = binomtest(successes, trials).proportion_ci(confidence_level=0.95, method="exact")
    assert binomial_interval(successes, trials) == pytest.approx((interval.low, interval.high), abs=1e-12)


def test_what_has_no_meaning_is_none_and_says_why():
    teacher = scaler(1.0, 1.0, 1.0)
    none = figures(teacher, teacher, SEAM, torch.zeros(0, 3))
    assert (none.top1_agreement, none.feature_error_relative, none.images_held_out) == (None, None, 0)
    assert "no image was held out" in none.notes[0]
    one = figures(teacher, teacher, SEAM, SCORES_NK[:1])
    assert (one.top1_agreement, one.feature_error_relative) == (1.0, None)
    assert "do not vary" in one.notes[0]
    maps = nn.Sequential(nn.Linear(3, 3), nn.Unflatten(1, (3, 1, 1)))
    found = figures(maps, maps, SEAM, SCORES_NK)
    assert (found.top1_agreement, found.top1_agreement_low, found.feature_error_relative) == (None, None, 0.0)
    assert "is undefined" in found.notes[0]
    single = nn.Sequential(nn.Linear(3, 1))
    assert figures(single, single, SEAM, SCORES_NK).top1_agreement is None


def test_networks_and_modes_are_as_before():
    teacher = nn.Sequential(nn.Dropout(0.9), nn.Linear(3, 3)).train()
    teacher[1].eval()
    found = figures(teacher, teacher, Seam((SeamPoint("1"),), ((3,),), ()), SCORES_NK)
    assert (found.top1_agreement, found.feature_error_relative) == (1.0, 0.0)
    assert [m.training for m in teacher.modules()] == [True, True, False]
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())


def test_numbers_that_are_not_finite_break_the_law():
    good, bad = scaler(1.0, 1.0, 1.0), scaler(1.0, float("inf"), 1.0)
    with pytest.raises(LawBroken, match="model's features at 0:output are not finite"):
        figures(good, bad, SEAM, SCORES_NK)
    with pytest.raises(UnsupportedModel, match="teacher's own features"):
        figures(bad, good, SEAM, SCORES_NK)
    with pytest.raises(LawBroken, match="model's outputs are not finite"):
        accuracy(good, bad, SCORES_NK, [0, 1, 2, 0])


def test_feature_shapes_that_differ_are_named():
    with pytest.raises(InputError, match=r"0:output: the teacher gives \(4, 3\), the model \(4, 1\)"):
        figures(scaler(1.0, 1.0, 1.0), nn.Sequential(nn.Linear(3, 1)), SEAM, SCORES_NK)


def test_accuracy_by_hand():
    # Classes named: teacher 0 1 2 0, model 0 1 2 1.
    found = accuracy(scaler(1.0, 1.0, 1.0), scaler(1.0, 2.0, 1.0), SCORES_NK, [0, 1, 0, 0], batch_size=3)
    assert (found.top1_teacher, found.top1_student, found.top1_difference) == (75.0, 50.0, -25.0)
    # Lost 1, won 0 of 4: shares (1+1)/6 and (0+1)/6, so -1/6 +- 1.96 sqrt((3/6 - 1/36) / 6).
    half = 1.959963984540054 * ((0.5 - 1 / 36) / 6) ** 0.5
    expected = 100 * (-1 / 6 - half), 100 * (-1 / 6 + half)
    assert (found.top1_difference_low, found.top1_difference_high) == pytest.approx(expected)
    assert found.images_labelled == 4


@pytest.mark.parametrize(("labels", "says"), [([0, 1], "2 labels for 4 images"), ([0, 1, 2, 3], "from 0 to 3")])
def test_labels_that_do_not_fit(labels, says):
    with pytest.raises(InputError, match=says):
        accuracy(scaler(1.0, 1.0, 1.0), scaler(1.0, 1.0, 1.0), SCORES_NK, labels)


@pytest.fixture
def labelled(tmp_path):
    from PIL import Image

    for name in ("cat/a.png", "cat/deep/b.png", "ant/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (len(name), 0, 0)).save(tmp_path / name)
    return tmp_path


def test_class_folders_in_sorted_order(labelled):
    images = read_images(labelled, Preprocessing((3, 4, 4), (0.5,) * 3, (0.5,) * 3))
    labels = labels_from_folders(images.names, labelled, classes=2)
    assert dict(zip(images.names, labels, strict=True)) == {"ant/c.png": 0, "cat/a.png": 1, "cat/deep/b.png": 1}


def test_order_of_many_class_folders(tmp_path):
    for name in "ecadb":
        (tmp_path / name).mkdir()
    assert labels_from_folders([f"{name}/x.png" for name in "abde"], tmp_path, classes=5) == [0, 1, 3, 4]


@pytest.mark.parametrize("index", [{"cat": 3, "ant": 7}, {"3": ["cat", "tabby"], "7": ["ant", "ant"]}])
def test_class_index_file(labelled, index):
    (labelled / "class_index.json").write_text(json.dumps(index))
    assert labels_from_folders(["cat/a.png", "ant/c.png"], labelled, classes=1000) == [3, 7]


def test_folders_that_do_not_fit_are_named(labelled):
    with pytest.raises(InputError, match="2 class folders, but the network has 1000 classes"):
        labels_from_folders(["cat/a.png"], labelled, classes=1000)
    with pytest.raises(InputError, match=r"'loose.png' is not in a class folder"):
        labels_from_folders(["cat/a.png", "loose.png"], labelled, classes=2)
    (labelled / "class_index.json").write_text('{"cat": 3}')
    with pytest.raises(InputError, match="does not name the folder 'ant'"):
        labels_from_folders(["ant/c.png"], labelled, classes=1000)
    (labelled / "class_index.json").write_text("[]")
    with pytest.raises(InputError, match=r"class_index.json"):
        labels_from_folders(["ant/c.png"], labelled, classes=1000)


# --- the report


def test_report_goes_through_json():
    report = Report(
        params_teacher=10, top1_agreement=0.5, top1_agreement_low=0.4, top1_agreement_high=0.6,
        macs_not_counted=("roll",), notes=("few",), image_hashes={"fit": ["ab"]},
        seconds=float("nan"), versions=versions(), platform=platform_kind(threads=2), steps=3,
    )  # fmt: skip
    text = json.dumps(report.to_json(), allow_nan=False)
    back = Report.from_json(json.loads(text))
    assert back.seconds is None
    assert (back.macs_not_counted, back.notes, back.image_hashes) == (("roll",), ("few",), {"fit": ["ab"]})
    assert back.to_json() == report.to_json()
    with pytest.raises(StoreError, match="unknown entries epochs"):
        Report.from_json({"epochs": 1})


def test_versions_and_platform_name_kinds_and_no_machine():
    import platform

    assert {"python", "torch", "timm"} <= versions().keys()
    assert platform.node() not in json.dumps(platform_kind())


def test_table_for_people():
    text = Report(
        params_teacher=2000, params_student=500, macs_teacher=10**6, macs_student=250_000, top1_agreement=0.9,
        top1_agreement_low=0.7, top1_agreement_high=0.99, images_labelled=100, top1_teacher=80.0, top1_student=75.0,
        top1_difference=-5.0, top1_difference_low=-9.0, top1_difference_high=-1.0,
        macs_not_counted=("roll",), notes=("n!",),
    ).table()  # fmt: skip
    for part in (
        "2,000", "500  (25.0% kept)", "1,000,000", "80.00 %", "75.00 %", "90.0% (95 % interval 70.0% to 99.0%)",
        "feature error, relative: unknown", "-5.00 points (95 % interval -9.00 to -1.00)", "not counted as MACs: roll",
        "note: n!",
    ):  # fmt: skip
        assert part in text
    assert "\x1b" not in text
    assert "unknown" in Report().table()

"""Boxes: read from what detectors return, matched, and measured; a detector that is compressed whole."""

import numpy as np
import pytest
import torch
from nets import Detector
from PIL import Image
from torch import nn

import mimicut as us
from mimicut.proof.detections import (
    DetectionMeter,
    Objects,
    known_classes,
    mean_average_precision,
    read_detections,
)
from mimicut.proof.randomised import randomised


def objects(*rows):
    """Rows of x1, y1, x2, y2, score, class."""
    found = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return Objects(found[:, :4], found[:, 4], found[:, 5].long())


FOUR = [(10, 10, 20, 20), (30, 30, 50, 50), (60, 10, 90, 40), (0, 70, 20, 99)]
TRUTH = objects(*((*box, 0.9, i % 2) for i, box in enumerate(FOUR)))


def test_agreement_counts_what_both_find_twice_and_what_one_finds_once():
    meter = DetectionMeter()
    moved = (12, 10, 22, 20)  # IoU with the first 8 / 12
    other_class, unsure = (*FOUR[1], 0.8, 0), (*FOUR[3], 0.2, 1)
    meter.add([TRUTH], [objects((*moved, 0.9, 0), other_class, (*FOUR[2], 0.6, 0), unsure)])
    meter.add([objects()], [objects()])  # nothing to find, and nothing found: no evidence of either kind
    meter.add([TRUTH], [TRUTH])
    found = meter.figures()
    assert (found.objects_teacher, found.objects_student, found.objects_matched) == (8, 7, 6)
    assert found.agreement == pytest.approx((2 * 2 / 7 + 1) / 2)
    assert found.images_with_objects == 2
    assert 0 < found.agreement_low < found.agreement < found.agreement_high < 1


def test_an_object_is_matched_once():
    meter = DetectionMeter()
    meter.add([objects((0, 0, 10, 10, 0.9, 0))], [objects((0, 0, 10, 10, 0.9, 0), (0, 0, 10, 9, 0.8, 0))])
    assert meter.figures().agreement == pytest.approx(2 / 3)


def test_ten_images_that_agree_prove_no_more_than_ten_images_can():
    meter = DetectionMeter()
    meter.add([TRUTH] * 10, [TRUTH] * 10)
    found = meter.figures()
    assert (found.agreement, found.agreement_high, found.map50, found.map) == (1, 1, 1, 1)
    assert found.agreement_low == pytest.approx(0.025**0.1)


def test_nothing_found_is_no_agreement():
    meter = DetectionMeter()
    meter.add([objects()], [objects((0, 0, 5, 5, 0.1, 0))])
    found = meter.figures()
    assert found.agreement is found.agreement_low is found.map50 is None


def test_average_precision_by_hand():
    # One class, ranked right, wrong, right, and one object missed: precision 1 up to recall 1/3, 2/3 up to 2/3, then 0.
    truth = objects(*((*box, 1, 0) for box in FOUR[:3]))
    found = objects((*FOUR[0], 0.9, 0), (200, 0, 210, 10, 0.8, 0), (*FOUR[1], 0.7, 0))
    assert mean_average_precision([truth], [found]) == pytest.approx(((34 * 1 + 33 * 2 / 3) / 101,) * 2)
    # A box with an IoU of 2/3 is right at 0.5, 0.55, 0.6 and 0.65 alone.
    moved = objects((12, 10, 22, 20, 0.9, 0))
    assert mean_average_precision([objects((*FOUR[0], 1, 0))], [moved]) == pytest.approx((1.0, 0.4))
    # Surest wrong: precision 1/2 at every recall. Both classes count alike.
    wrong = objects((*FOUR[0], 0.5, 0), (200, 0, 210, 10, 0.8, 0))
    two = objects((*FOUR[0], 1, 0), (*FOUR[1], 1, 1))
    assert mean_average_precision([two], [wrong])[0] == pytest.approx(0.25)
    assert mean_average_precision([objects()], [wrong]) == (None, None)


# --- the forms in which detectors return boxes: one object of class 1 at x 10 to 30, y 20 to 60, in 100 x 200 pixels

SIZE = (100, 200)
ROW = [20.0, 40.0, 20.0, 40.0, 0.1, 0.75, 0.2]  # centre, width and height, three scores
QUIET = [20.0, 40.0, 20.0, 40.0, 0.0, 0.0, 0.0]
SHARES = [0.1, 0.4, 0.1, 0.4]


def _rows(*, extra=0, turned=False, shares=False):
    row = torch.tensor([(SHARES + ROW[4:] if shares else ROW) + [-3.0] * extra, QUIET[:4] + [0.0] * (3 + extra)])
    row = row if not shares else row.index_put((torch.tensor(1),), torch.tensor([0.5] * 4 + [0.0] * (3 + extra)))
    many = torch.cat([row, row[1:].expand(20, -1)])[None]
    return many.transpose(1, 2) if turned else many


class _Named:
    def __init__(self, logits, pred_boxes):
        self.logits, self.pred_boxes = logits, pred_boxes


_LOGITS = torch.tensor([0.1, 0.75, 0.2]).logit()


@pytest.mark.parametrize(
    ("output", "classes"),
    [
        (([_rows(turned=True), {"feats": torch.ones(1, 4, 8, 8)}]), None),
        (_rows(turned=True, extra=2), 3),
        (_rows(shares=True), 3),
        (_rows()[:, :7], 3),  # as many boxes as numbers for each
        (_rows(turned=True)[..., :7], None),
        (torch.tensor([[[10.0, 20, 30, 60, 0.75, 1], [0, 0, 0, 0, 0, 0]]]), None),
        (torch.tensor([[[10.0, 20, 30, 60, 0.75, 1, -4.0], [0, 0, 0, 0, 0, 0, 9.0]]]), None),
        ([{"boxes": torch.tensor([[10.0, 20, 30, 60]]), "scores": torch.ones(1) * 0.75, "labels": torch.ones(1)}], 9),
        ({"logits": _LOGITS[None, None], "pred_boxes": torch.tensor([[SHARES]])}, 3),
        (_Named(torch.tensor([[[0.0, 0.75, 0.0, 0.25]]]).log().clamp_min(-50), torch.tensor([[SHARES]])), 3),
    ],
)  # fmt: skip
def test_boxes_are_read_from_every_usual_form(output, classes):
    (found,) = read_detections(output, 1, SIZE, classes)
    torch.testing.assert_close(found.boxes_n4[0], torch.tensor([10.0, 20, 30, 60]))
    assert (float(found.scores_n[0]), int(found.labels_n[0])) == (pytest.approx(0.75), 1)
    assert len(found.sure().scores_n) == 1  # boxes that overlap are one object


@pytest.mark.parametrize(
    "output",
    [
        torch.rand(2, 10),  # scores
        torch.rand(2, 5, 8, 8),  # a map
        torch.randn(2, 17, 64),  # tokens
        torch.rand(1, 6, 40),  # another number of images
        {"logits": torch.randn(2, 5, 8)},
        {"logits": torch.randn(2, 5, 8), "pred_boxes": torch.rand(2, 5, 4)},  # of how many classes?
        [torch.rand(3, 4)],
        [],
        None,
    ],
)
def test_what_is_no_boxes_is_not_read_as_boxes(output):
    assert read_detections(output, 2, SIZE) is None


def test_the_number_of_classes_is_taken_from_the_network():
    model = nn.Identity()
    assert known_classes(model) is None
    model.names = {0: "cat", 1: "dog"}
    assert known_classes(model) == 2
    model.config = type("Config", (), {"num_labels": 91})()
    assert known_classes(model) == 91


# --- whole detectors


@pytest.mark.parametrize("head", [{}, {"masks": True}, {"final": True}])
def test_the_maps_that_the_head_takes_are_the_seam(head):
    model = randomised(Detector(**head))
    seam = us.trace(model, torch.zeros(2, 3, 16, 16)).seam
    assert [str(p) for p in seam.points] == ["low:output", "high:output"]
    assert not seam.headless
    assert seam.head == tuple(n for n in model.state_dict() if n.startswith("head."))


def test_a_backbone_that_returns_its_maps_and_pooled_features_is_no_detector():
    class Pyramid(Detector):
        def forward(self, x):
            low = self.low(self.stem(x))
            high = self.high(low)
            return low, high, high.mean((2, 3))

    model = Pyramid()
    model.head = nn.Identity()
    assert us.trace(model, torch.zeros(2, 3, 16, 16)).seam.headless


@pytest.mark.parametrize("head", [{}, {"final": True}])
def test_a_detector_is_compressed_whole_and_measured_by_its_boxes(tmp_path, head):
    torch.manual_seed(0)
    model = randomised(Detector(**head))
    teacher = us.own_teacher(model, us.Preprocessing((3, 16, 16), (0.5,) * 3, (0.5,) * 3))
    images = torch.randn(20, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    config = us.MimicConfig(steps=2, views="none", batch_size=8)
    result = us.compress(teacher, images, keep=0.7, config=config, folder=tmp_path / "small")
    found = result.report.detections
    assert type(result.model) is Detector
    assert result.report.top1_agreement is None
    assert found["objects_teacher"] > 0
    assert 0 <= found["agreement_low"] <= found["agreement"] <= found["agreement_high"] <= 1
    said = " ".join(result.report.table().split())
    assert "objects, agreement with the teacher" in said
    assert "mean average precision" in said
    again = us.load(tmp_path / "small", build_teacher=lambda: Detector(**head))
    assert torch.equal(again(images[:2])[0], result.model(images[:2])[0])
    same = us.compress(teacher, images, keep=1.0, config=config).report.detections
    assert (same["agreement"], same["map50"], same["map"]) == (1, 1, 1)


def test_marked_boxes_measure_both_networks(tmp_path):
    torch.manual_seed(0)
    model = randomised(Detector())
    teacher = us.own_teacher(model, us.Preprocessing((3, 16, 16), (0.5,) * 3, (0.5,) * 3))
    generator = np.random.default_rng(0)
    for i in range(6):
        pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        x = teacher.preprocessing.normalise(torch.from_numpy(pixels).permute(2, 0, 1)[None])
        with torch.no_grad():
            (found,) = read_detections(model(x), 1, (16, 16))
        lines = []
        for (x1, y1, x2, y2), label in zip(
            (found.boxes_n4[:3] / 16).tolist(), found.labels_n[:3].tolist(), strict=True
        ):
            lines.append(f"{label} {(x1 + x2) / 2} {(y1 + y2) / 2} {x2 - x1} {y2 - y1}")
        (tmp_path / f"{i}.txt").write_text("\n".join(lines))
    images = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    config = us.MimicConfig(steps=0, views="none", batch_size=8)
    report = us.compress(teacher, images, keep=1.0, config=config, labelled=tmp_path).report
    assert (report.images_labelled, report.objects_labelled) == (6, 18)
    assert report.map50_teacher == report.map50_student > 0.9  # the truth is what it is surest of
    assert report.top1_teacher is None
    assert "mean average precision, IoU 0.5, on 6 labelled" in " ".join(report.table(200).split())

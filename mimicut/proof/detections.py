"""How well a student finds the objects that its teacher finds, or that people marked: boxes matched by their overlap.

Two boxes of one class match from an intersection over union (IoU) of IOU on. An image on which both networks find t and
s objects, m of which match, has an agreement of 2 m / (t + s). Average precision is COCO's.

Source: COCO detection evaluation, cocodataset.org (101 recall points, IoU 0.5 to 0.95 in steps of 0.05).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_convert, box_iou

from mimicut.proof.certificate import binomial_interval
from mimicut.surgery.seam import tensors

IOU = 0.5  # from which on two boxes match. Source: PASCAL VOC.
SURE = 0.25  # score from which on a network is said to find an object. Source: the usual default of detectors.
_LEAST = 0.001  # score from which on a box counts in average precision. Source: usual in evaluations.
_OVERLAP = 0.7  # boxes of one class that overlap more are one object. Source: usual default of suppression.
_MOST = 300  # boxes of an image
_LEVELS = torch.arange(0.5, 0.96, 0.05, dtype=torch.float64)
_RECALLS = torch.linspace(0, 1, 101, dtype=torch.float64)


@dataclass(frozen=True)
class Objects:
    """What was found in one image, the surest first: boxes (N, 4) as x1, y1, x2, y2 in pixels; scores (N,) from 0 to 1;
    class numbers (N,)."""

    boxes_n4: Tensor
    scores_n: Tensor
    labels_n: Tensor

    def sure(self) -> "Objects":
        """Those with a score of at least SURE."""
        keep = self.scores_n >= SURE
        return Objects(self.boxes_n4[keep], self.scores_n[keep], self.labels_n[keep])


@dataclass(frozen=True)
class DetectionFigures:
    """How far a student finds what its teacher finds. Both count as finding what they score with at least `SURE`.

    Attributes:
        agreement: Mean agreement of an image, 0 to 1; None if neither network finds anything.
        agreement_low, agreement_high: Its 95 % interval over images: the exact one that would hold if an image agreed
            either wholly or not at all, which is never too narrow.
        images_with_objects: Images on which either finds something; no others are in the mean.
        objects_teacher, objects_student, objects_matched: Numbers of objects, on all images.
        map50: Mean average precision (0 to 1) of the student, with the teacher's objects as the truth, at IoU 0.5.
        map: The same, mean over IoU 0.5 to 0.95.
        least_score, least_iou: From which score on something is found, and from which IoU on two boxes match.
    """

    agreement: float | None
    agreement_low: float | None
    agreement_high: float | None
    images_with_objects: int
    objects_teacher: int
    objects_student: int
    objects_matched: int
    map50: float | None
    map: float | None
    least_score: float = SURE
    least_iou: float = IOU


@dataclass(frozen=True)
class DetectionAccuracy:
    """Mean average precision (0 to 1) of both networks on images in which people marked the objects.

    Attributes:
        map50_teacher, map50_student: At IoU 0.5; None if no object is marked.
        map_teacher, map_student: Mean over IoU 0.5 to 0.95.
        images_labelled, objects_labelled: Numbers of images, and of objects marked in them.
    """

    map50_teacher: float | None
    map50_student: float | None
    map_teacher: float | None
    map_student: float | None
    images_labelled: int
    objects_labelled: int


class DetectionMeter:
    """Collects the objects of teacher and student, batch by batch."""

    def __init__(self) -> None:
        self._pairs: list[tuple[Objects, Objects]] = []

    def add(self, theirs: Sequence[Objects], ours: Sequence[Objects]) -> None:
        """Add the objects of a batch of images."""
        self._pairs += zip(theirs, ours, strict=True)

    def figures(self) -> DetectionFigures:
        """The figures over all images."""
        sure = [(a.sure(), b.sure()) for a, b in self._pairs]
        matched = [int(_matches(a, b, IOU).sum()) for a, b in sure]
        found = [len(a.scores_n) + len(b.scores_n) for a, b in sure]
        shares = [2 * m / n for m, n in zip(matched, found, strict=True) if n]
        agreement, low, high = None, None, None
        if shares:
            agreement = sum(shares) / len(shares)
            low, high = binomial_interval(sum(shares), len(shares))
        map50, mean = mean_average_precision([a for a, _ in sure], [b for _, b in self._pairs])
        theirs, ours = (sum(len(pair[who].scores_n) for pair in sure) for who in (0, 1))
        return DetectionFigures(agreement, low, high, len(shares), theirs, ours, sum(matched), map50, mean)


def marked_objects(marked_n5: Tensor, size: Sequence[int]) -> Objects:
    """Marked boxes as objects. marked_n5: class, x1, y1, x2, y2, as shares of width and height. size: in pixels."""
    height, width = size
    boxes = marked_n5[:, 1:] * marked_n5.new_tensor([width, height, width, height])
    return Objects(boxes.float(), torch.ones(len(boxes)), marked_n5[:, 0].long())


def mean_average_precision(truth: Sequence[Objects], found: Sequence[Objects]) -> tuple[float | None, float | None]:
    """Average precision, mean over the classes that occur in the truth.

    Args:
        truth: The objects that there are, image by image.
        found: What a network found; every score counts.

    Returns:
        At IoU 0.5, and its mean over IoU 0.5 to 0.95; None twice if there is no object in truth.

    >>> one = Objects(torch.tensor([[0.0, 0, 8, 8]]), torch.ones(1), torch.zeros(1))
    >>> mean_average_precision([one], [one])
    (1.0, 1.0)
    """
    classes = sorted({int(c) for each in truth for c in each.labels_n.tolist()})
    if not classes:
        return None, None
    rows = torch.tensor([[_average_precision(truth, found, c, float(level)) for level in _LEVELS] for c in classes])
    return float(rows[:, 0].mean()), float(rows.mean())


def _average_precision(truth: Sequence[Objects], found: Sequence[Objects], label: int, level: float) -> float:
    scores, right, total = [torch.zeros(0)], [torch.zeros(0, dtype=torch.bool)], 0
    for there, here in zip(truth, found, strict=True):
        there, here = _only(there, label), _only(here, label)
        total += len(there.scores_n)
        scores.append(here.scores_n)
        right.append(_matches(there, here, level))
    order = torch.cat(scores).argsort(descending=True, stable=True)
    hits = torch.cat(right)[order].double().cumsum(0)
    if not len(hits):
        return 0.0
    recall, precision = hits / total, hits / torch.arange(1, len(hits) + 1)
    best = precision.flip(0).cummax(0).values.flip(0)  # the best precision at this recall or above
    at = torch.searchsorted(recall, _RECALLS)
    return float(torch.where(at < len(best), best[at.clamp_max(len(best) - 1)], 0.0).mean())


def _only(objects: Objects, label: int) -> Objects:
    keep = objects.labels_n == label
    return Objects(objects.boxes_n4[keep], objects.scores_n[keep], objects.labels_n[keep])


def _matches(truth: Objects, found: Objects, level: float) -> Tensor:
    """Which of the objects found match one of the truth. The surest chooses first, among those left, the one that it
    overlaps most; every object of the truth is matched at most once."""
    right = torch.zeros(len(found.scores_n), dtype=torch.bool)
    if not len(truth.scores_n) or not len(right):
        return right
    overlap = box_iou(found.boxes_n4.double(), truth.boxes_n4.double())
    overlap[found.labels_n[:, None] != truth.labels_n[None]] = 0.0
    for i in found.scores_n.argsort(descending=True, stable=True).tolist():
        best, j = overlap[i].max(0)
        if float(best) >= level:
            right[i] = True
            overlap[:, j] = 0.0
    return right


def read_detections(output: Any, images: int, size: Sequence[int], classes: int | None = None) -> list[Objects] | None:
    """The objects in what a detector returns; None where it is nothing of this kind.

    Args:
        output: One of
            a list with boxes, scores and labels for each image, as torchvision's detectors return it;
            `logits` (n, Q, K) and `pred_boxes` (n, Q, 4) as centre, width and height in shares of the image;
            a tensor (n, Q, 6 or more) of x1, y1, x2, y2, score and class number;
            a tensor (n, 4 + K, A), or its transpose, of centre, width and height with a score for each class, which may
            be followed by other numbers where `classes` is known.
            The latter two may be the first of several tensors.
        images: Number n of images.
        size: Their height and width in pixels.
        classes: Number of classes, where it is known. With one more column than that, the last of the logits says that
            there is no object.
    """
    if isinstance(output, (list, tuple)) and len(output) == images and all(map(_is_torchvision, output)):
        return [_sorted(each["boxes"], each["scores"], each["labels"]) for each in output]
    named = output if isinstance(output, Mapping) else getattr(output, "__dict__", {})
    boxes, logits = named.get("pred_boxes"), named.get("logits")
    if isinstance(boxes, Tensor) and isinstance(logits, Tensor) and boxes.ndim == 3 and boxes.shape[2] == 4:
        if classes is None or boxes.shape[:2] != logits.shape[:2] or logits.shape[2] - classes not in (0, 1):
            return None
        scores = logits.sigmoid() if logits.shape[2] == classes else logits.softmax(2)[..., :classes]
        return [_of_queries(*each, size, suppress=False) for each in zip(boxes, scores, strict=True)]
    first = next((value for _, value in tensors(output)), None)
    if first is None or first.ndim != 3 or len(first) != images or not first.is_floating_point():
        return None
    return _of_rows(first, size, classes)


def _is_torchvision(found: Any) -> bool:
    return isinstance(found, Mapping) and {"boxes", "scores", "labels"} <= set(found)


def known_classes(model: nn.Module) -> int | None:
    """The number of classes, where the network says it itself: `config.num_labels`, or as many as it has `names`."""
    count = getattr(getattr(model, "config", None), "num_labels", None)
    names = getattr(model, "names", None)
    if count is None and isinstance(names, (Mapping, list, tuple)):
        count = len(names)
    return count if isinstance(count, int) and count > 0 else None


def _of_rows(rows: Tensor, size: Sequence[int], classes: int | None) -> list[Objects] | None:
    """Objects of a tensor (n, Q, 6 or more) or (n, 4 + K, A) or its transpose; None where the numbers are no boxes."""
    if rows.shape[2] >= 6 and _is_final(rows):
        return [_sorted(each[:, :4], each[:, 4], each[:, 5]) for each in rows]
    ways = [rows, rows.transpose(1, 2)]
    for way in ways if rows.shape[1] > rows.shape[2] else ways[::-1]:  # fewer numbers for a box than boxes, usually
        width = way.shape[2] if classes is None else 4 + classes
        if not 5 <= width <= way.shape[2]:
            continue
        boxes, scores = way[..., :4], way[..., 4:width]
        if _are_shares(scores) and bool((boxes[..., 2:] >= 0).all()):
            return [_of_queries(*each, size, suppress=True) for each in zip(boxes, scores, strict=True)]
    return None


def _is_final(rows: Tensor) -> bool:
    x1, y1, x2, y2, scores, labels = rows[..., :6].unbind(-1)
    ordered = bool((x2 >= x1).all()) and bool((y2 >= y1).all())
    return ordered and _are_shares(scores) and bool((labels == labels.round()).all()) and bool((labels >= 0).all())


def _are_shares(values: Tensor) -> bool:
    return bool((values >= 0).all()) and bool((values <= 1).all())


def _of_queries(boxes_q4: Tensor, scores_qk: Tensor, size: Sequence[int], *, suppress: bool) -> Objects:
    """Objects of one image. boxes_q4: centre, width and height, in pixels or, if none reaches 2, as shares of `size`.
    suppress: whether boxes that overlap a surer one of their class are left out."""
    if len(boxes_q4) and float(boxes_q4.abs().max()) < 2:
        height, width = size
        boxes_q4 = boxes_q4 * boxes_q4.new_tensor([width, height, width, height])
    scores, labels = scores_qk.max(1)
    keep = scores >= _LEAST
    boxes = box_convert(boxes_q4[keep].float(), "cxcywh", "xyxy")
    scores, labels = scores[keep].float(), labels[keep]
    if suppress:
        left = batched_nms(boxes, scores, labels, _OVERLAP)
        boxes, scores, labels = boxes[left], scores[left], labels[left]
    return _sorted(boxes, scores, labels)


def _sorted(boxes: Tensor, scores: Tensor, labels: Tensor) -> Objects:
    keep = scores.argsort(descending=True, stable=True)[:_MOST]
    keep = keep[scores[keep] >= _LEAST]
    return Objects(*(each[keep].detach().cpu() for each in (boxes.float(), scores.float(), labels.long())))


def batch_shape(batch: Any) -> tuple[int, int, int]:
    """Number, height and width of a batch of images (n, C, H, W), or of those in a network's inputs (args, kwargs)."""
    args, kwargs = ((batch,), {}) if isinstance(batch, Tensor) else batch
    images = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    return len(images), images.shape[-2], images.shape[-1]

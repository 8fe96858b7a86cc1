"""Measure a student on images that influenced nothing.

A broken law raises; a poor figure is reported. `accuracy` is the only place that reads labels.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mimicut.base import guard
from mimicut.base.errors import InputError, LawBroken, UnsupportedModel
from mimicut.base.layout import laid, takes_channels_last
from mimicut.proof.certificate import binomial_interval
from mimicut.proof.detections import (
    SURE,
    DetectionAccuracy,
    DetectionFigures,
    DetectionMeter,
    Objects,
    batch_shape,
    known_classes,
    marked_objects,
    mean_average_precision,
    read_detections,
)
from mimicut.proof.feature_maps import SHOWN, feature_maps
from mimicut.proof.output_figures import OutputFigures, OutputMeter, cosines
from mimicut.surgery.seam import AGREEING, Seam, capturing, tensors

if TYPE_CHECKING:
    from mimicut.inputs.image_set import ImageSet, ImagesWithCall

DISAGREEMENTS = 12  # images that are listed. Source: assumption: as many as a person looks at.
# Images at a time: at 224 x 224 pixels passes of 16 hold a few hundred MB and take no longer for an image than of 64.
# Source: measured, EfficientNet-Lite0 (docs/LOG.md).
BATCH = 16
_Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True)
class Figures:
    """How close a student is to its teacher.

    Attributes:
        top1_agreement: Share, 0 to 1; None if the output is not class scores.
        top1_agreement_low, top1_agreement_high: Its exact 95 % interval.
        feature_error_relative: 0 is perfect, 1 is no better than the teacher's mean feature; None if undefined.
        images_held_out: Number of images measured on.
        notes: Reasons why a figure is None.
        feature_cosine: Cosine between both networks' features of an image, mean over images and seam points; None where
            it is undefined for all of them.
        agreement_by_class: Class that the teacher names -> (images on which the student agrees, images).
        confidence_teacher, confidence_student: Mean probability (softmax) that each gives to its own answer.
        disagreements: First the images answered differently, then others; within each, those first whose probabilities
            differ most (total variation). Each has its index among the held-out images, and [class, probability] of
            both answers.
        outputs: Each tensor that the network returns, measured by its kind.
        detections: How far a detector finds the objects that its teacher finds; None if the output is no boxes.
        feature_maps: Where features of the first images are strong, as `feature_maps.feature_maps` has it, at the first
            seam point that has places; empty if none has.
    """

    top1_agreement: float | None
    top1_agreement_low: float | None
    top1_agreement_high: float | None
    feature_error_relative: float | None
    images_held_out: int
    notes: tuple[str, ...]
    feature_cosine: float | None = None
    agreement_by_class: dict[int, tuple[int, int]] = field(default_factory=dict)
    confidence_teacher: float | None = None
    confidence_student: float | None = None
    disagreements: tuple[dict[str, Any], ...] = ()
    outputs: tuple[OutputFigures, ...] = ()
    detections: DetectionFigures | None = None
    feature_maps: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy in percent; top1_difference: student minus teacher in points, with its paired 95 % interval."""

    top1_teacher: float
    top1_student: float
    top1_difference: float
    top1_difference_low: float
    top1_difference_high: float
    images_labelled: int


@guard.exact_float32()
def figures(
    teacher: nn.Module,
    model: nn.Module,
    seam: Seam,
    held_out: "ImageSet | ImagesWithCall | Tensor",
    *,
    batch_size: int = BATCH,
    on_progress: Callable[[int, int], None] | None = None,
) -> Figures:
    """Measure how close `model` is to `teacher` on held-out images.

    feature_error_relative is the squared error of the model's features at the seam, divided by the teacher's squared
    deviation from its mean feature (the mean over these images, position by position); with several seam points it is
    the mean over the points. Both networks are left as they were.

    Args:
        teacher, model: The two networks.
        seam: Where their features are taken.
        held_out: An ImageSet, or a float tensor as the teacher takes it.
        batch_size: Images in one pass.
        on_progress: Receives (images done, images).

    Raises:
        LawBroken: The model's features or outputs are not finite.
        UnsupportedModel: The teacher's features or outputs are not finite.
    """
    images = len(held_out)
    if not images:
        return Figures(None, None, None, None, 0, ("no image was held out: agreement and feature error are unknown",))
    notes: list[str] = []
    errors = [FeatureError() for _ in seam.points]
    likeness: list[Tensor] = []
    maps: list[dict[str, Any]] = []
    meters = [OutputMeter(output) for output in seam.outputs]
    answers: _Answers | None = _Answers("" if seam.scores is None else seam.scores.activation)
    objects: DetectionMeter | None = DetectionMeter()
    layout = quick_layout([teacher, model], _batch(held_out, range(1)))
    with guard.evaluating(teacher), guard.evaluating(model), capturing(teacher, seam) as a, capturing(model, seam) as b:
        for where in _chunks(images, batch_size):
            batch = laid(_batch(held_out, where), layout)
            (wanted, theirs), (found, ours) = (
                run_placed(run.features_and_output, net, batch) for run, net in ((a, teacher), (b, model))
            )
            for point, error, want, have in zip(seam.points, errors, wanted, found, strict=True):
                _check_finite(want, have, f"features at {point}")
                if want.shape != have.shape:
                    raise InputError(
                        f"comparing features at {point}: the teacher gives {tuple(want.shape)}, the model "
                        f"{tuple(have.shape)}; expected the same"
                    )
                error.add(want.double(), have.double())
                likeness.append(cosines(*(f.double().reshape(len(f), -1) for f in (want, have))))
            if len(maps) < SHOWN:
                size_hw = next(((t.shape[2], t.shape[3]) for _, t in tensors(batch) if t.ndim == 4), None)
                pairs = zip(wanted, found, strict=True)
                shown = (feature_maps(want, have, where.start, size_hw) for want, have in pairs)
                maps += next(filter(None, shown), [])
            if objects is not None and not _add_objects(objects, teacher, seam, (theirs, ours), batch):
                objects = None
            returned = [dict(tensors(output)) for output in (theirs, ours)]
            for meter in meters:
                want, have = (parts[meter.output.part].cpu() for parts in returned)
                _check_finite(want, have, f"output {meter.output}")
                meter.add(want, have, len(where))
            theirs, ours = (answers_of(seam, output, len(where)) for output in (theirs, ours))
            if theirs is None or ours is None or theirs.shape != ours.shape:
                answers = None
            elif answers is not None:
                _check_finite(theirs, ours, "outputs")
                answers.add(theirs, ours)
            if on_progress:
                on_progress(where.stop, images)
    relative = None
    if seam.not_measured:
        notes.append(
            f"not measured, and imitated only as far as the seam covers it: {', '.join(seam.not_measured)} (no "
            "floating-point tensor with one row for each image that depends on it)"
        )
    varying = [e for e in errors if e.varies]
    if varying:
        relative = sum(e.squared / e.spread for e in varying) / len(varying)
    if len(varying) < len(errors):
        still = ", ".join(str(p) for p, e in zip(seam.points, errors, strict=True) if not e.varies)
        left = "are left out of it" if varying else "feature error is unknown"
        notes.append(f"the teacher's features at {still} do not vary over the held-out images: {left}")
    alike = torch.cat(likeness)
    cosine = float(alike.mean()) if len(alike) else None
    outputs = tuple(meter.figures() for meter in meters)
    apart = [str(output) for output in seam.outputs if not output.imitated]
    if apart:
        notes.append(
            f"{', '.join(apart)}: not imitated, as a path leads to it past the seam; its figures show what became of "
            "it. Without --seam mimicut looks for points that cover every output"
        )
    if answers is None and seam.headless:
        notes.append("the network has no head and returns features: top-1 agreement is undefined")
    elif objects is None and answers is None:
        notes.append(_without_top1(seam))
    detections = None
    if objects is not None:
        detections = objects.figures()
        if detections.agreement is None:
            notes.append(f"neither network finds an object (score of at least {SURE}) in any held-out image")
    measured = Figures(
        None, None, None, relative, images, tuple(notes), cosine, outputs=outputs, detections=detections,
        feature_maps=tuple(maps[:SHOWN]),
    )  # fmt: skip
    return measured if answers is None else answers.completed(measured)


def _without_top1(seam: Seam) -> str:
    """Why there is no top-1 agreement, of a network with a head."""
    several = [str(output) for output in seam.outputs if output.kind == "scores"]
    if len(several) > 1:
        return (
            f"there is no one top-1 agreement, as {len(several)} outputs are class scores ({', '.join(several)}): each "
            "has its own"
        )
    return "no output is one row of class scores per image: top-1 agreement is undefined"


def finds_objects(model: nn.Module, seam: Seam, batch: Any) -> bool:
    """Whether what a network returns for a batch is boxes, as `detections.read_detections` reads them."""
    with guard.evaluating(model):
        output = run_placed(model, model, batch)
    return _objects(model, seam, output, batch) is not None


def _objects(teacher: nn.Module, seam: Seam | None, output: Any, batch: Any) -> list[Objects] | None:
    """What a detector found: boxes by the graph or by what the user says, or by what the network is (it has names for
    its classes, or returns them under a detector's keys). Numbers alone never make a network a detector."""
    first = seam.outputs[0] if seam is not None and seam.outputs else None
    if first is not None and first.kind != "boxes":
        keyed = isinstance(output, (list, tuple)) or "pred_boxes" in (getattr(output, "keys", tuple)() or ())
        if first.declared or not (keyed or hasattr(teacher, "names")) or first.kind in AGREEING or first.activation:
            return None
    images, *size = batch_shape(batch)
    return read_detections(output, images, size, known_classes(teacher))


def _add_objects(meter: DetectionMeter, teacher: nn.Module, seam: Seam, outputs: tuple[Any, Any], batch: Any) -> bool:
    """Add the objects that teacher and student find in a batch; False if what they return is no boxes."""
    theirs, ours = (_objects(teacher, seam, output, batch) for output in outputs)
    if theirs is None or ours is None:
        return False
    meter.add(theirs, ours)
    return True


class _Answers:
    """Collects the answers of both networks, image by image. activation: of the outputs, as in `Output`."""

    def __init__(self, activation: str) -> None:
        self._found: list[Tensor] = []  # rows: class and probability of the teacher, of the student, how far apart
        self._activation = activation

    def add(self, theirs: Tensor, ours: Tensor) -> None:
        a, b = (probabilities(scores, self._activation) for scores in (theirs, ours))
        # Classes by the scores themselves: where several probabilities are 1, they are all alike.
        columns = [theirs.argmax(1).double(), a.amax(1), ours.argmax(1).double(), b.amax(1), (a - b).abs().sum(1) / 2]
        self._found.append(torch.stack(columns, 1))

    def completed(self, figures: Figures) -> Figures:
        """Add everything that follows from the answers to `figures`."""
        found = torch.cat(self._found)
        theirs, ours = found[:, 0].long(), found[:, 2].long()
        agree = theirs == ours
        low, high = binomial_interval(int(agree.sum()), len(agree))
        by_class = {int(c): (int(agree[theirs == c].sum()), int((theirs == c).sum())) for c in theirs.unique()}
        far = (found[:, 4] + (~agree)).argsort(descending=True, stable=True)[:DISAGREEMENTS].tolist()
        disagreements = tuple(
            {"image": i, "teacher": [int(theirs[i]), float(found[i, 1])], "student": [int(ours[i]), float(found[i, 3])]}
            for i in far
            if found[i, 4] > 0
        )
        return replace(
            figures, top1_agreement=int(agree.sum()) / len(agree), top1_agreement_low=low, top1_agreement_high=high,
            agreement_by_class=by_class, confidence_teacher=float(found[:, 1].mean()),
            confidence_student=float(found[:, 3].mean()), disagreements=disagreements,
        )  # fmt: skip


class FeatureError:
    """Sums at one seam point: squared error, and the teacher's squared deviation from its mean feature."""

    def __init__(self) -> None:
        self.squared = self.spread = self._size = 0.0
        self._mean: Any = 0.0
        self._seen = 0

    @property
    def varies(self) -> bool:
        """Whether the deviation is more than rounding of the features."""
        return self.spread > 1e-12 * self._size

    def add(self, want: Tensor, have: Tensor) -> None:
        self.squared += float((have - want).square().sum())
        self._size += float(want.square().sum())
        # Chan's update of mean and deviation: one pass, without the cancellation of a sum of squares.
        middle, n = want.mean(0), len(want)
        shift = middle - self._mean
        share = n / (self._seen + n)
        self.spread += float((want - middle).square().sum() + shift.square().sum() * self._seen * share)
        self._mean = self._mean + shift * share
        self._seen += n


def accuracy(
    teacher: nn.Module,
    model: nn.Module,
    images: "ImageSet | ImagesWithCall | Tensor",
    labels: list[int],
    *,
    batch_size: int = BATCH,
    on_progress: Callable[[int, int], None] | None = None,
) -> Accuracy:
    """Measure the top-1 accuracy of both networks on labelled images.

    Args:
        teacher, model: The two networks.
        images: An ImageSet, or a float tensor as the teacher takes it.
        labels: Class numbers, one per image.
        batch_size: Images in one pass.
        on_progress: Receives (images done, images).

    Raises:
        InputError: Labels do not match the images or the classes.
        LawBroken: The model's outputs are not finite.

    Source: interval of the paired difference: Bonett and Price, J. Educ. Behav. Stat. 37 (2012), adjusted Wald.
    """
    if not labels or len(labels) != len(images):
        raise InputError(f"measuring accuracy: found {len(labels)} labels for {len(images)} images, expected one each")
    right = torch.zeros(2, len(labels), dtype=torch.bool)
    truth = torch.tensor(labels)
    for where, rows in _outputs(teacher, model, images, batch_size):
        for who, logits_nk in enumerate(rows):
            if logits_nk is None:
                raise InputError("measuring accuracy: the output is not one row of class scores per image")
            if int(truth.max()) >= logits_nk.shape[1] or int(truth.min()) < 0:
                raise InputError(
                    f"measuring accuracy: labels run from {int(truth.min())} to {int(truth.max())}, but the network "
                    f"has {logits_nk.shape[1]} classes; give each folder's class in class_index.json"
                )
            right[who, where] = logits_nk.argmax(1) == truth[where]
        if on_progress:
            on_progress(where.stop, len(labels))
    n, (theirs, ours) = len(labels), right
    lost, won = int((theirs & ~ours).sum()), int((ours & ~theirs).sum())
    share_lost, share_won = (lost + 1) / (n + 2), (won + 1) / (n + 2)
    middle = share_won - share_lost
    half = _Z95 * sqrt((share_lost + share_won - middle**2) / (n + 2))
    percent = 100 * int(theirs.sum()) / n, 100 * int(ours.sum()) / n
    low, high = max(-1.0, middle - half), min(1.0, middle + half)
    return Accuracy(*percent, 100 * (won - lost) / n, 100 * low, 100 * high, n)


def detection_accuracy(
    teacher: nn.Module,
    model: nn.Module,
    images: "ImageSet | ImagesWithCall | Tensor",
    marked: list[Tensor],
    *,
    batch_size: int = BATCH,
    on_progress: Callable[[int, int], None] | None = None,
) -> DetectionAccuracy:
    """Measure the mean average precision of both networks on images in which the objects are marked.

    Args:
        teacher, model: The two networks.
        images: An ImageSet, or a float tensor as the teacher takes it.
        marked: For each image its boxes (N, 5): class, x1, y1, x2, y2, as shares of the image.
        batch_size: Images in one pass.
        on_progress: Receives (images done, images).

    Raises:
        InputError: The output is no boxes.
    """
    found: tuple[list[Objects], list[Objects]] = ([], [])
    truth: list[Objects] = []
    for where in _chunks(len(images), batch_size):
        batch = _batch(images, where)
        truth += [marked_objects(marked[i], batch_shape(batch)[1:]) for i in where]
        for net, every in zip((teacher, model), found, strict=True):
            with guard.evaluating(net):
                objects = _objects(teacher, None, run_placed(net, net, batch), batch)
            if objects is None:
                raise InputError(
                    "measuring average precision: boxes are marked in the labelled images, but the network's output is "
                    "no boxes; give a folder of class folders, or leave the labelled images out"
                )
            every += objects
        if on_progress:
            on_progress(where.stop, len(images))
    (theirs_50, theirs), (ours_50, ours) = (mean_average_precision(truth, every) for every in found)
    return DetectionAccuracy(theirs_50, ours_50, theirs, ours, len(images), sum(len(t.labels_n) for t in truth))


def _outputs(
    teacher: nn.Module, model: nn.Module, images: "ImageSet | ImagesWithCall | Tensor", batch_size: int
) -> Iterator[tuple[slice, tuple[Tensor | None, Tensor | None]]]:
    """For each chunk, the class scores (n, K >= 2) of both networks; None if an output is anything else."""
    layout = quick_layout([teacher, model], _batch(images, range(1))) if len(images) else ""
    for where in _chunks(len(images), batch_size):
        with guard.evaluating(teacher), guard.evaluating(model):
            batch = laid(_batch(images, where), layout)
            theirs, ours = (class_scores(run_placed(net, net, batch), len(where)) for net in (teacher, model))
        if theirs is not None and ours is not None:
            _check_finite(theirs, ours, "outputs")
        yield slice(where.start, where.stop), (theirs, ours)


def answers_of(seam: Seam, output: Any, images: int) -> Tensor | None:
    """The class scores (n, K) in a network's output; None if it has none. By the seam where this knows the outputs,
    else as `class_scores`."""
    if not seam.outputs:
        return None if seam.headless else class_scores(output, images)
    if seam.scores is None:
        return None
    found = dict(tensors(output))[seam.scores.part]
    return found.cpu() if found.ndim == 2 and len(found) == images and found.shape[1] >= 2 else None


def probabilities(scores: Tensor, activation: str) -> Tensor:
    """The probabilities (n, K) of classes in float64. activation: what made the scores, as in `Output`."""
    if activation == "softmax":
        return scores.double()
    return scores.double().exp() if activation == "log_softmax" else scores.double().softmax(1)


def class_scores(output: Any, images: int) -> Tensor | None:
    """Find the tensor of class scores (n, K) in a network's output; None if there is none, or more than one.

    Among named outputs it is the one named logits or out.
    """
    named = output if isinstance(output, Mapping) else getattr(output, "__dict__", {})
    output = next((named[key] for key in ("logits", "out") if key in named), output)
    found = [
        value for _, value in tensors(output)
        if value.is_floating_point() and value.ndim == 2 and len(value) == images and value.shape[1] >= 2
    ]  # fmt: skip
    return found[0].cpu() if len(found) == 1 else None


def run_placed(call: Any, model: nn.Module, batch: Any) -> Any:
    """Run `call` on the batch, moved to the model's device and dtype; a list of features is returned on the CPU."""
    args, kwargs = ((batch,), {}) if isinstance(batch, Tensor) else batch
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(like.device, like.dtype if value.is_floating_point() else None)

    with torch.autocast(like.device.type, enabled=False):
        found = call(*map(placed, args), **{key: placed(value) for key, value in kwargs.items()})
    return ([feat.cpu() for feat in found[0]], found[1]) if call is not model else found


def quick_layout(models: list[nn.Module], one: Any) -> str:
    """The image layout in which all these networks run faster: "channels_last" for convolutions on a CPU, else
    "contiguous". one: a batch of one image. The networks are left as they were."""
    convolve = [any(p.ndim == 4 for p in model.parameters()) for model in models]
    if not all(convolve) or any(t.device.type != "cpu" for m in models for t in guard.named_tensors(m).values()):
        return "contiguous"

    def takes(model: nn.Module) -> bool:
        def run(layout: str) -> list[Tensor]:
            found = tensors(run_placed(model, model, laid(one, layout)))
            return [value for _, value in found if value.is_floating_point()]

        with guard.seeded(0), guard.evaluating(model):
            return takes_channels_last(run)

    return "channels_last" if all(map(takes, models)) else "contiguous"


def _batch(images: "ImageSet | ImagesWithCall | Tensor", where: range) -> Any:
    return images[where.start : where.stop] if isinstance(images, Tensor) else images.batch(list(where))


def _chunks(images: int, batch_size: int) -> list[range]:
    return [range(start, min(start + batch_size, images)) for start in range(0, images, batch_size)]


def _check_finite(theirs: Tensor, ours: Tensor, what: str) -> None:
    if not bool(theirs.isfinite().all()):
        raise UnsupportedModel(f"verifying: the teacher's own {what} are not finite; check its weights and precision")
    if not bool(ours.isfinite().all()):
        raise LawBroken(f"verifying: the model's {what} are not finite; do not use this result: mimic again")

"""Check the images before anything is learned from them.

The check finds blank images, near-duplicates, a normalisation that is not the teacher's, images on which the teacher is
undecided, outliers, and classes that the teacher names for none of them. No image is left out or refused; the findings
become notes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimicut.anatomy.tracing import ALWAYS_RANDOM, ONE_NUMBER
from mimicut.base import guard
from mimicut.base.errors import InputError, MimicutError, UnsupportedModel, one_line
from mimicut.base.layout import laid
from mimicut.inputs.file_names import NAMED, listed
from mimicut.inputs.image_set import ImageSet, bind_call
from mimicut.proof.figures import answers_of, probabilities, quick_layout, run_placed
from mimicut.surgery.seam import Seam, capturing, tensors

_BATCH, _ROWS = 16, 512
LABELLED = "labelled"
_SIDE = 16  # side in pixels of the pictures by which near-duplicates are compared. Source: assumption.
NEAR = 0.995  # least correlation of two such pictures of near-duplicates. Source: assumption.
_LARGEST_PIXEL = 1e6  # of normalised images. Source: assumption: usual ones are below 10.
_FLAT = 2 / 255  # largest range of values of a blank image. Source: assumption.
# The teacher is undecided on an image whose entropy exceeds this share of the maximum. Source: assumption.
ENTROPY = 0.9
# Features this many median distances from the median feature are an outlier. Source: assumption.
FAR = 5.0
# Largest deviation of the first batch norm's median channel, in standard deviations, and of its variance, as a factor.
# Source: measured (docs/LOG.md).
SHIFT, FACTOR = 0.5, 2.5
_FEWEST = 64  # fewest values of a channel for a usable mean and variance. Source: assumption.
_TOGETHER = 3  # images in a pass that is compared with a pass of one
_STEADY = 1e-3  # largest difference between two passes, as a share of the largest number. Source: assumption.


@dataclass(frozen=True)
class ImageCheck:
    """Findings about the images.

    Attributes:
        blank: Names of images of one flat colour.
        near_duplicates: Names of near-duplicates, each with the first image that it is like.
        held_out_alike: Held-out images that are near-duplicates of an image to learn from.
        held_out_near_duplicates: Held-out images that are near-duplicates of another held-out image.
        unlike_anything: Images on which the teacher is undecided (entropy near its maximum).
        outliers: Images whose features are far from the median.
        classes: Number of the teacher's classes; None if it has none.
        classes_untouched: Classes that the teacher names for no image.
        shift, factor: Deviation of the first batch norm's inputs from its running statistics, in standard deviations of
            the mean and as a factor of the variance; median over channels.
        notes: Sentences that a person should see.
    """

    blank: tuple[str, ...] = ()
    near_duplicates: tuple[tuple[str, str], ...] = ()
    held_out_alike: tuple[tuple[str, str], ...] = ()
    held_out_near_duplicates: tuple[tuple[str, str], ...] = ()
    unlike_anything: tuple[str, ...] = ()
    outliers: tuple[str, ...] = ()
    classes: int | None = None
    classes_untouched: tuple[int, ...] = ()
    shift: float | None = None
    factor: float | None = None
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "notes"}


def _refuse_endless(features: Tensor, pixels: Tensor) -> None:
    """Refuse what no training can imitate: its error is a sum of squares, in float32.

    Raises:
        InputError: The images are so large.
        UnsupportedModel: The teacher is the reason.
    """
    if bool(features.float().square().sum().isfinite()):
        return
    largest = float(pixels.abs().max())
    if not largest < _LARGEST_PIXEL:
        raise InputError(
            f"checking the images: they hold values up to {largest:.1e}, whose features are not finite, "
            "or too large to be squared in float32; prepare them as the teacher was trained"
        )
    raise UnsupportedModel(
        "checking the images: the teacher's own features are not finite, or too large to be squared in float32 (found "
        f"up to {float(features.abs().max()):.1e}); look at its weights and at how it takes its images"
    )


def check_images(
    model: nn.Module,
    seam: Seam,
    images: ImageSet,
    call: dict[str, Any] | None = None,
    *,
    held_out: ImageSet | None = None,
    beside: ImageSet | None = None,
    batch_size: int = _BATCH,
) -> ImageCheck:
    """Check `images` by their pixels and by the teacher's features and answers.

    Args:
        model: The teacher; it is not changed.
        seam: Where its features are taken.
        images: The images to learn from.
        call: How the model takes images; None if they are its only input.
        held_out: Images that only certify; they should resemble neither each other nor the images to learn from.
        beside: Images to choose the best step by, which count as images to learn from.
        batch_size: Images in one pass.

    Raises:
        UnsupportedModel: The teacher takes one number of images only, or is random in eval mode.
    """
    if not len(images):
        return ImageCheck()
    flat, low, high = [], math.inf, -math.inf
    entropies: list[Tensor] = []
    named: list[Tensor] = []
    features: list[Tensor] = []
    classes: int | None = None
    watch = _FirstNorm(model)
    given = bind_call(images, call)
    unsteady = _check_batches(model, seam, given)
    layout = quick_layout([model], given.batch([0]))
    with guard.evaluating(model), capturing(model, seam) as capture, watch:
        for start in range(0, len(images), batch_size):
            chosen = list(range(start, min(start + batch_size, len(images))))
            pixels = _pixels(images.batch(chosen))[0]
            spread = pixels.flatten(2).amax(2) - pixels.flatten(2).amin(2)  # (images, channels)
            flat.append((spread if images.floats else spread * torch.tensor(images.preprocessing.std)).amax(1))
            low, high = min(low, float(pixels.min())), max(high, float(pixels.max()))
            found, output = run_placed(capture.features_and_output, model, laid(given.batch(chosen), layout))
            features.append(torch.cat([_pooled(_by_image(f, len(chosen))) for f in found], 1))
            _refuse_endless(features[-1], pixels)
            scores = answers_of(seam, output, len(chosen))
            if scores is not None:
                classes = scores.shape[1]
                odds = probabilities(scores, "" if seam.scores is None else seam.scores.activation)
                entropies.append(-torch.special.xlogy(odds, odds).sum(1) / math.log(classes))
                named.append(scores.argmax(1))
    names = images.names
    blank = [n for n, range_ in zip(names, torch.cat(flat).tolist(), strict=True) if range_ <= _FLAT]
    unlike = [n for n, e in zip(names, torch.cat(entropies).tolist(), strict=True) if e > ENTROPY] if entropies else []
    if len(unlike) == len(names):  # the outputs are no class scores, or the teacher is untrained
        unlike = []
    untouched = sorted(set(range(classes or 0)) - set(torch.cat(named).tolist())) if named else []
    pictures, between = _pictures(images), list[tuple[str, str]]()
    near: tuple[tuple[str, str], ...] = ()
    if held_out:
        proof = _pictures(held_out)
        near = _alike(held_out.names, proof, set())
        between = _alike_between(names, pictures, held_out.names, proof)
        between += _alike_between(beside.names, _pictures(beside), held_out.names, proof) if beside else []
    check = ImageCheck(
        tuple(blank), _alike(names, pictures, set(blank)), tuple(dict(reversed(between)).items()), near,
        tuple(unlike), _outliers(names, torch.cat(features)), classes, tuple(untouched), watch.shift, watch.factor,
    )  # fmt: skip
    notes = [
        *unsteady,
        *_notes(check, images, held_out, low, high),
        *held_out_notes(held_out, check.held_out_near_duplicates),
    ]
    return ImageCheck(**{**vars(check), "notes": tuple(notes)})


def _check_batches(model: nn.Module, seam: Seam, given: Any) -> list[str]:
    """Run the teacher on three images, again, and on one of them, as later passes are of any number of images.

    Returns:
        Notes, where single images have no axis of images, or an image's rows depend on the others in its batch.

    Raises:
        UnsupportedModel: It does not run on that many images, returns rows that are not of one image each, or returns
            other numbers in another pass.
    """
    name, several = type(model).__name__, min(_TOGETHER, len(given))
    passes = []
    with guard.evaluating(model), capturing(model, seam) as capture:
        for images in (several, several, 1):
            try:
                found, output = run_placed(capture.features_and_output, model, given.batch(range(images)))
            except MimicutError:
                raise
            except Exception as error:  # whatever its code raises
                raise UnsupportedModel(
                    f"running {name} on {_number(images)}: {one_line(error)}. On another number of images it runs. "
                    f"{ONE_NUMBER}"
                ) from error
            returned = dict(tensors(output))
            rows = {str(point): feature for point, feature in zip(seam.points, found, strict=True)}
            rows |= {f"{o} ": returned[o.part].cpu() for o in seam.outputs if o.part in returned}
            axes = dict.fromkeys(rows, 0) | {f"{o} ": o.batch_axis for o in seam.outputs}
            passes.append({key: (value.double(), axes[key]) for key, value in rows.items()})
    first, again, alone = passes
    notes: list[str] = []
    changes = depends = False
    for key, (value, axis) in first.items():
        one = alone[key][0]
        if value.ndim != one.ndim:
            notes.append(
                f"of one image {name} returns {tuple(one.shape)}, without an axis of images: name the axes in its code "
                "(flatten(1), not squeeze()), or one image by itself cannot be measured"
            )
            continue
        if value.shape[axis] != several * one.shape[axis]:
            raise UnsupportedModel(
                f"checking the rows of {name}: at {key.strip()} it returns {tuple(value.shape)} for {_number(several)} "
                f"and {tuple(one.shape)} for one; expected as many rows of each image. {ONE_NUMBER}"
            )
        size = max(float(value.abs().max()), 1e-12)
        changes |= float((value - again[key][0]).abs().max()) > _STEADY * size
        depends |= float((value.narrow(axis, 0, one.shape[axis]) - one).abs().max()) > _STEADY * size
    if changes:
        raise UnsupportedModel(
            f"checking {name}: two passes on the same images in eval mode differ, so nothing about a student could be "
            f"proved. {ALWAYS_RANDOM}"
        )
    if depends:
        notes.append(
            "what the network returns of an image depends on the others in its batch (a norm without running "
            "statistics?), so all figures are of batches as here"
        )
    return notes


def _number(images: int) -> str:
    return "one image" if images == 1 else f"{images} images"


def refuse_shared(extra: ImageSet, measuring: Mapping[str, ImageSet | None]) -> None:
    """Refuse images that measure and are also extra pictures, by their file, their pixels, or as near-duplicates.

    Args:
        extra: The extra pictures.
        measuring: What each set of images is called -> the set. Of labelled images, which may be many, near-duplicates
            are not looked for.

    Raises:
        InputError: There are such images; the message names the first ones.
    """
    by_file = dict(zip(reversed(extra.hashes), reversed(extra.names), strict=True))
    squashed: Tensor | None = None
    for what, images in measuring.items():
        if not images:
            continue
        found = {n: by_file[h] for n, h in zip(images.names, images.hashes, strict=True) if h in by_file}
        found |= {name: other for name, other in images.shared_with(extra) if name not in found}
        if what != LABELLED:
            squashed = _pictures(extra) if squashed is None else squashed
            near = _alike_between(extra.names, squashed, images.names, _pictures(images))
            found |= {name: other for name, other in near if name not in found}
        if found:
            raise InputError(
                f"reading the extra images: {len(found)} of {len(images)} {what} images are among them, or nearly "
                f"({listed(found.items(), ' is ')}); these images must not train: remove them from one of the two"
            )


def held_out_notes(images: ImageSet | None, near: tuple[tuple[str, str], ...] | None = None) -> list[str]:
    """Write notes on held-out images. near: their near-duplicates, if already found."""
    if near is None and images:
        near = _alike(images.names, _pictures(images), set())
    if not near:
        return []
    return [
        f"{len(near)} of {len(images or ())} held-out images are near-duplicates of another held-out image; the "
        f"interval counts each of them, so it is narrower than it should be: {listed(near)}"
    ]


def _by_image(features: Tensor, images: int) -> Tensor:
    """Features with one entry for each image, where several rows are of one image."""
    several = len(features) != images and len(features) % images == 0
    return features.unflatten(0, (images, -1)) if several else features


def _notes(check: ImageCheck, images: ImageSet, held_out: ImageSet | None, low: float, high: float) -> list[str]:
    total, found = len(images), []
    if images.preprocessing is None:  # samples of any kind of values
        pass
    elif images.floats and low >= 0 and high > 4:
        found.append(
            f"the images are floating-point arrays with values up to {high:.4g}, but normalised values lie around 0; "
            "give uint8 arrays or files, which mimicut normalises"
        )
    elif images.floats and low >= 0 and high <= 1 and max(images.preprocessing.mean) > 0:
        found.append(
            "the images are floating-point arrays with values from 0 to 1, and are taken as normalised; subtract the "
            "mean and divide by the deviation first, or give uint8 arrays or files"
        )
    apart = _apart(check)
    if apart:
        found.append(
            f"the teacher's first batch norm is given {apart}: check --mean and --std, and that the images are of "
            "its kind"
        )
    if check.blank:
        found.append(f"{len(check.blank)} of {total} images are blank (one flat colour): {listed(check.blank)}")
    if check.near_duplicates:
        pairs = check.near_duplicates
        found.append(f"{len(pairs)} of {total} images are near-duplicates of another image: {listed(pairs)}")
    if check.held_out_alike:
        pairs = check.held_out_alike
        found.append(
            f"{len(pairs)} of {len(held_out or ())} held-out images are near-duplicates of images to learn from, "
            f"so they are weaker evidence for new images; hold out others (--held-out): {listed(pairs)}"
        )
    if check.unlike_anything:
        found.append(
            f"the teacher is undecided on {len(check.unlike_anything)} of {total} images (entropy above {ENTROPY:.0%} "
            f"of the maximum): {listed(check.unlike_anything)}"
        )
    if check.outliers:
        found.append(f"the features of {len(check.outliers)} of {total} images are outliers: {listed(check.outliers)}")
    # With more classes than images some classes cannot occur, which is no finding.
    if check.classes_untouched and check.classes is not None and check.classes <= total:
        untouched = check.classes_untouched
        found.append(
            f"the teacher names {len(untouched)} of its {check.classes} classes for none of the images, so nothing "
            "shows how the student answers there: "
            + ", ".join(map(str, untouched[:NAMED]))
            + (", ..." if len(untouched) > NAMED else "")
        )
    return found


def _apart(check: ImageCheck) -> str:
    """How far the inputs of the first batch norm are from its training data; "" where they are not."""
    found = []
    if check.shift is not None and check.shift > SHIFT:
        found.append(f"a mean {check.shift:.1f} standard deviations off")
    if check.factor is not None and not 1 / FACTOR < check.factor < FACTOR:
        found.append(f"a variance {check.factor:.2g} times that of its training")
    return " and ".join(found)


def _small(pixels: Tensor) -> Tensor:
    """Grey pictures of _SIDE pixels a side, with mean 0 and norm 1, as rows."""
    grey = F.adaptive_avg_pool2d(pixels.mean(1, keepdim=True), _SIDE).flatten(1).double()
    return F.normalize(grey - grey.mean(1, keepdim=True), dim=1)


def _pooled(feats: Tensor) -> Tensor:
    """One vector per image: the mean over the positions of maps and tokens."""
    feats = feats.double().reshape(len(feats), *(feats.shape[1:] or (1,)))
    return feats if feats.ndim < 3 else feats.flatten(2).mean(2) if feats.ndim > 3 else feats.mean(1)


def _alike(names: list[str], pictures: Tensor, blank: set[str]) -> tuple[tuple[str, str], ...]:
    """Every image that is like (or equal to) an earlier one, with the first such image."""
    found = []
    for start in range(0, len(names), _ROWS):  # ten thousand at once would be a gigabyte
        rows = pictures[start : start + _ROWS]
        near = (rows @ pictures[: start + len(rows)].T >= NEAR).tril(start - 1)
        found += [(names[start + i], names[int(row.nonzero()[0])]) for i, row in enumerate(near) if bool(row.any())]
    return tuple(pair for pair in found if pair[0] not in blank)


def _alike_between(
    names: list[str], pictures: Tensor, others: list[str], other_pictures: Tensor
) -> list[tuple[str, str]]:
    """Every image of `others` that is like one of `names`, with the first such image."""
    rows = (row for part in other_pictures.split(_ROWS) for row in part @ pictures.T >= NEAR)
    return [(name, names[int(row.nonzero()[0])]) for name, row in zip(others, rows, strict=True) if row.any()]


def _pictures(images: ImageSet) -> Tensor:
    parts = (range(start, min(start + _BATCH, len(images))) for start in range(0, len(images), _BATCH))
    # Samples of several inputs are alike where all of them are.
    rows = [[_small(each) for each in _pixels(images.batch(part))] for part in parts]
    return torch.cat([torch.cat(row, 1) / math.sqrt(len(row)) for row in rows])


def _pixels(batch: Any) -> list[Tensor]:
    """The inputs in a batch as if they were images, (n, C, H, W): slices and frames below one another; those with axes
    first, and the others only where there are no such."""
    args, kwargs = ((batch,), {}) if isinstance(batch, Tensor) else batch
    held = [t.float() for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    maps = [t for t in held if t.dim() > 2] or held
    return [
        (t.flatten(2, -2) if t.dim() > 3 else t.reshape(len(t), 1, -1, t.shape[-1] if t.dim() > 1 else 1)) for t in maps
    ]


def _outliers(names: list[str], features: Tensor) -> tuple[str, ...]:
    if len(features) < 10:  # too few to tell
        return ()
    away = (features - features.median(0).values).norm(dim=1)
    usual = away.median()
    return tuple(n for n, far in zip(names, (away > FAR * usual).tolist(), strict=True) if far and usual > 0)


class _FirstNorm:
    """Records the statistics of the inputs of the first batch norm that runs."""

    def __init__(self, model: nn.Module):
        self._norms = [
            m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
        ]
        self._first: Any = None  # of them, the one that runs first
        self._sum: Any = 0.0
        self._square: Any = 0.0
        self._seen = 0

    def __enter__(self) -> "_FirstNorm":
        self._handles = [m.register_forward_pre_hook(self._record, with_kwargs=True) for m in self._norms]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _record(self, module: nn.Module, given: tuple, named: dict[str, Any]) -> None:
        if self._first is None:
            self._first = module
        if module is self._first:
            rows = next(iter((*given, *named.values()))).movedim(1, -1).flatten(0, -2).double()
            self._sum, self._square = self._sum + rows.sum(0), self._square + rows.square().sum(0)
            self._seen += len(rows)

    @property
    def shift(self) -> float | None:
        if self._first is None or self._seen < _FEWEST:
            return None
        own, spread = self._first.running_mean.double(), self._first.running_var.double().clamp_min(1e-12).sqrt()
        return float(((self._sum / self._seen - own).abs() / spread).median())

    @property
    def factor(self) -> float | None:
        if self._first is None or self._seen < _FEWEST:
            return None
        variance = self._square / self._seen - (self._sum / self._seen).square()
        return float((variance / self._first.running_var.double().clamp_min(1e-12)).median())

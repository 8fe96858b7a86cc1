"""Figures of each tensor that a network returns, by its kind.

    scores      how often both name the same class, with its exact interval
    multilabel  share of the labels on which both say the same, and of those that either gives the share that both give
    map         share of the positions at which both name the same class, and the mean over classes of intersection
                over union
    embedding   cosine, and the share of each image's nearest other images that stay its nearest
    values      the error alone

All kinds also have the relative squared error and the correlation. Intervals are over images, at 95 %.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mimicut.base.errors import InputError
from mimicut.proof.certificate import binomial_interval
from mimicut.surgery.seam import AGREEING, OUTPUT_KINDS, Output, Seam

_DRAWS = 2000  # resamples of a bootstrap. Source: assumption.
_NEIGHBOURS = 10  # nearest images that are compared, at most a fifth of the others. Source: assumption.


@dataclass(frozen=True)
class OutputFigures:
    """How close a student's output is to its teacher's. None where a figure is undefined.

    Attributes:
        part, kind, imitated: As in `Output`.
        shape: For one image.
        guessed: As `Output.guessed`.
        error: Squared error over the teacher's squared deviation from its mean output; 0 is perfect, 1 no better than
            that mean. error_low and error_high: a bootstrap interval over images.
        correlation: Of both outputs' deviations from their means over images.
        agreement: Share on which both say the same, of images (scores), labels (multilabel) or positions (map).
            agreement_low and agreement_high: for scores the exact interval; for the others the interval that would hold
            if an image agreed either wholly or not at all, which is never too narrow.
        overlap: Intersection over union: of the labels given (multilabel), or the mean of the classes (map).
        cosine: Mean over images (as `cosines`), with a bootstrap interval.
        neighbours: Share of the nearest held-out images that are kept, with the interval that would hold if an image
            kept either all or none, which is never too narrow.
        nearest: How many are compared of each image.
        psnr: 10 log10 of the squared range of the teacher's values over the mean squared error, in decibel; for
            pictures.
    """

    part: str
    kind: str
    imitated: bool
    shape: tuple[int, ...]
    error: float | None = None
    error_low: float | None = None
    error_high: float | None = None
    correlation: float | None = None
    agreement: float | None = None
    agreement_low: float | None = None
    agreement_high: float | None = None
    overlap: float | None = None
    cosine: float | None = None
    cosine_low: float | None = None
    cosine_high: float | None = None
    neighbours: float | None = None
    neighbours_low: float | None = None
    neighbours_high: float | None = None
    nearest: int | None = None
    psnr: float | None = None
    guessed: bool = False


class OutputMeter:
    """Collects one output of teacher and student, batch by batch. Of maps only sums are kept."""

    def __init__(self, output: Output):
        self.output = output
        self._images = 0
        self._squared: list[Tensor] = []  # for each batch the squared error of each image
        self._cosines: list[Tensor] = []
        self._sums: Any = 0.0  # (teacher, student) summed over images, position by position
        self._products = torch.zeros(3, dtype=torch.float64)  # teacher^2, student^2, teacher x student
        self._shares: list[Tensor] = []  # for each batch the share of each image on which both say the same
        self._common = self._either = torch.zeros(())  # labels, or positions of each class
        self._rows: list[tuple[Tensor, Tensor]] = []
        self._shape: tuple[int, ...] = ()
        self._low, self._high = float("inf"), -float("inf")
        self._shares_01: bool | None = None  # whether the teacher's numbers lie from 0 to 1, by the first batch

    def add(self, theirs: Tensor, ours: Tensor, images: int | None = None) -> None:
        """Add a batch (N, ...) of both; the output as it is returned. images: N, if several rows may be of one image,
        one after the other."""
        if theirs.shape != ours.shape:
            raise InputError(
                f"comparing {self.output}: the teacher returns {tuple(theirs.shape)}, the student {tuple(ours.shape)}; "
                "expected the same"
            )
        theirs, ours = (each.movedim(self.output.batch_axis, 0) for each in (theirs, ours))
        if images and len(theirs) != images and len(theirs) % images == 0:
            theirs, ours = (each.unflatten(0, (images, -1)) for each in (theirs, ours))
        if self._shares_01 is None:
            self._shares_01 = float(theirs.min()) >= 0 and float(theirs.max()) <= 1
        self._images += len(theirs)
        self._shape = tuple(theirs.shape[1:])
        a, b = (each.double().reshape(len(each), -1) for each in (theirs, ours))
        self._squared.append((a - b).square().sum(1))
        self._cosines.append(cosines(a, b))
        self._sums = self._sums + torch.stack([a.sum(0), b.sum(0)])
        self._products += torch.stack([a.square().sum(), b.square().sum(), (a * b).sum()])
        self._low, self._high = min(self._low, float(a.min())), max(self._high, float(a.max()))
        kind = self.output.kind
        if kind == "multilabel" or (kind == "map" and self._yes_or_no()):
            bound = 0.5 if self.output.activation == "sigmoid" or self._shares_01 else 0.0
            first, second = theirs > bound, ours > bound
            self._shares.append((first == second).reshape(len(first), -1).double().mean(1))
            self._common = self._common + (first & second).sum()
            self._either = self._either + (first | second).sum()
        elif kind == "map":
            axis = min(self.output.class_axis, theirs.ndim - 1)
            first, second = theirs.argmax(axis), ours.argmax(axis)
            self._shares.append((first == second).reshape(len(first), -1).double().mean(1))
            self._count(first, second, theirs.shape[axis])
        elif kind == "scores":
            alike = theirs.argmax(-1) == ours.argmax(-1) if theirs.ndim > 1 else theirs == ours
            self._shares.append(alike.reshape(len(alike), -1).double().mean(1))
        elif kind == "embedding":
            self._rows.append((a, b))

    def _yes_or_no(self) -> bool:
        """Whether each number of a map says yes or no by itself."""
        if self.output.activation == "sigmoid" or not self._shape:
            return True
        if len(self._shape) == 2 and self.output.activation == "":  # a mask without an axis of classes
            return bool(self._shares_01)
        return self._shape[min(self.output.class_axis, len(self._shape)) - 1] == 1

    def _count(self, first: Tensor, second: Tensor, classes: int) -> None:
        alike = first[first == second].flatten().bincount(minlength=classes)
        every = first.flatten().bincount(minlength=classes) + second.flatten().bincount(minlength=classes)
        self._common, self._either = self._common + alike, self._either + every - alike

    def figures(self) -> OutputFigures:
        """The figures of all batches."""
        output = self.output
        found = OutputFigures(output.part, output.kind, output.imitated, self._shape, guessed=output.guessed)
        if not self._images:
            return found
        n, squared, likeness = self._images, torch.cat(self._squared), torch.cat(self._cosines)
        mean = self._sums / n
        deviation = self._products - n * torch.stack(
            [mean[0].square().sum(), mean[1].square().sum(), (mean[0] * mean[1]).sum()]
        )
        spread = float(deviation[0])
        if spread > 1e-12 * float(self._products[0]):
            low, high = bootstrap(squared * n / spread)
            found = replace(found, error=float(squared.sum()) / spread, error_low=low, error_high=high)
            if float(deviation[1]) > 0:
                found = replace(found, correlation=float(deviation[2] / (deviation[0] * deviation[1]).sqrt()))
        if self._shares:
            shares = torch.cat(self._shares)
            low, high = binomial_interval(float(shares.sum()), n)
            found = replace(found, agreement=float(shares.mean()), agreement_low=low, agreement_high=high)
        if float(self._either.sum()):
            present = self._either > 0
            found = replace(found, overlap=float((self._common[present] / self._either[present]).mean()))
        if self.output.kind in ("embedding", "values") and len(likeness):
            low, high = bootstrap(likeness)
            found = replace(found, cosine=float(likeness.mean()), cosine_low=low, cosine_high=high)
        if self._rows and n > 2:
            kept = _neighbours_kept(*(torch.cat(rows) for rows in zip(*self._rows, strict=True)))
            low, high = binomial_interval(float(kept.sum()), n)
            found = replace(
                found, neighbours=float(kept.mean()), neighbours_low=low, neighbours_high=high, nearest=_nearest(n)
            )
        mse = float(squared.sum()) / (n * mean.shape[1])
        if self.output.image and mse > 0 and self._high > self._low:
            found = replace(found, psnr=float(10 * torch.tensor((self._high - self._low) ** 2 / mse).log10()))
        return found


def cosines(theirs: Tensor, ours: Tensor) -> Tensor:
    """The cosine between both networks' numbers (N, K) of each image; images of which both give zeros alone are left
    out, and all images where K is 1: there is no angle.

    >>> cosines(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
    tensor([1.])
    >>> len(cosines(torch.ones(2, 1), torch.ones(2, 1)))
    0
    """
    found = (theirs != 0).any(1) | (ours != 0).any(1)
    return torch.cosine_similarity(theirs[found], ours[found]) if theirs.shape[1] > 1 else theirs.new_empty(0)


def bootstrap(values: Tensor) -> tuple[float | None, float | None]:
    """The 95 % percentile interval of the mean of one value for each image; (None, None) for a single image.

    Source: Efron, Ann. Statist. 7 (1979). Drawn with a fixed seed. With few images it is somewhat too narrow.
    """
    if len(values) < 2:
        return None, None
    draws = torch.Generator().manual_seed(0)
    picked = torch.randint(len(values), (_DRAWS, len(values)), generator=draws)
    means = values[picked].mean(1)
    return float(means.quantile(0.025)), float(means.quantile(0.975))


def _nearest(images: int) -> int:
    return max(1, min(_NEIGHBOURS, (images - 1) // 5))


def _neighbours_kept(theirs: Tensor, ours: Tensor) -> Tensor:
    """For each image the share of its nearest others (by cosine, among these) that the student leaves nearest."""
    count, nearest = _nearest(len(theirs)), []
    for rows in (theirs, ours):
        unit = torch.nn.functional.normalize(rows)
        likeness = unit @ unit.T
        likeness.fill_diagonal_(-float("inf"))
        nearest.append(torch.zeros_like(likeness, dtype=torch.bool).scatter_(1, likeness.topk(count).indices, True))
    return (nearest[0] & nearest[1]).sum(1).double() / count


OutputKinds = str | Mapping[str, str] | Sequence[str] | None  # as `with_kinds` takes it


def check_kinds(asked: OutputKinds) -> list[tuple[str | None, str]]:
    """Read the kinds of outputs that were asked for.

    Returns:
        Pairs of part and kind; None stands for every part.

    Raises:
        InputError: There is no such kind.

    >>> check_kinds(["values", "logits=scores"])
    [(None, 'values'), ('logits', 'scores')]
    """
    asked = [asked] if isinstance(asked, str) else asked or ()
    pairs: list[tuple[str | None, str]] = (
        [*asked.items()] if isinstance(asked, Mapping) else [_pair(each) for each in asked]
    )
    for part, kind in pairs:
        whose = "an output" if part is None else f"the output {part!r}"
        if kind not in OUTPUT_KINDS:
            raise InputError(f"reading the kind of {whose}: found {kind!r}, expected one of {', '.join(OUTPUT_KINDS)}")
        kinds = list(dict.fromkeys(k for p, k in pairs if p == part))
        if len(kinds) > 1:
            raise InputError(f"reading the kind of {whose}: found {' and '.join(kinds)}, expected one of them")
    return pairs


def with_kinds(seam: Seam, asked: OutputKinds) -> Seam:
    """The seam with the kinds of its outputs as they were asked for.

    Args:
        seam: As `trace` found it.
        asked: A kind for all outputs; {part: kind}; or a list of KIND and PART=KIND.

    Raises:
        InputError: There is no such kind or output.

    >>> from mimicut.surgery.seam import SeamPoint
    >>> seam = Seam((SeamPoint("body"),), ((8,),), (), outputs=(Output("", "scores"),))
    >>> with_kinds(seam, "values").outputs[0].kind
    'values'
    """
    found = {output.part: output for output in seam.outputs}
    for part, kind in check_kinds(asked):
        if part is not None and part not in found:
            names = [repr(p) for p in found if p]
            one = "one output without a name: leave the name out" if found else "none that depends on the images"
            raise InputError(f"reading the kind of the output {part!r}: the network returns {', '.join(names) or one}")
        for name in found if part is None else (part,):
            found[name] = replace(found[name], kind=kind, declared=True)
    return replace(seam, outputs=tuple(found.values())) if asked else seam


def _pair(text: str) -> tuple[str | None, str]:
    part, given, kind = text.rpartition("=")
    return (part if given else None), kind


def check_fit(seam: Seam, min_agreement: float | None, max_error: float | None, objects: bool = False) -> None:
    """Check that each threshold fits a kind of output that the network has.

    Args:
        seam: It knows the outputs.
        min_agreement, max_error: The thresholds.
        objects: Whether the network finds objects, whose agreement can be required too.

    Raises:
        InputError: None of its outputs has such a figure.
    """
    kinds = ", ".join(f"{o.part or 'the output'}: {o.kind}" for o in seam.outputs)
    agreeing = [o for o in seam.outputs if o.kind in AGREEING]
    if min_agreement is not None and not seam.outputs and seam.not_measured and not objects:
        raise InputError(
            f"requiring an agreement of {min_agreement}: the network returns no floating-point numbers that depend on "
            f"the images ({', '.join(seam.not_measured)}), so nothing is measured; take the teacher's scores instead "
            "of what it makes of them (before an argmax or a threshold)"
        )
    if min_agreement is not None and seam.outputs and not agreeing and not objects:
        raise InputError(
            f"requiring an agreement of {min_agreement}: the network returns no classes ({kinds}), so there is no "
            "agreement; require a largest error with --max-error (max_error in Python), or say with --output "
            "scores|multilabel|map what the numbers are"
        )
    if max_error is not None and seam.outputs and len(agreeing) == len(seam.outputs):
        raise InputError(
            f"requiring an error of at most {max_error}: the network returns classes ({kinds}); require an agreement "
            "with --min-agreement, or say with --output values|embedding what the numbers are"
        )

"""Cross-fitting: every image trains and every image certifies, but never for the same student.

The student that is kept learns from all images. For the certificate the images are divided into folds; each fold is
held out once, from a student made from the others in the same way. The figures therefore describe this way of making
students, with slightly fewer images. The folds' students share most of their images, so their agreements are correlated
and the interval is an approximation; the report says so.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Unpack

import torch
from torch import nn

from mimicut.base.errors import InputError, Stopped
from mimicut.base.ranks import current
from mimicut.inputs.image_set import ImageSet, ImageSource
from mimicut.inputs.teacher import Teacher
from mimicut.proof.certificate import binomial_interval, check_threshold
from mimicut.proof.figures import DISAGREEMENTS
from mimicut.results import store
from mimicut.results.report import Report
from mimicut.surgery.plan import Plan
from mimicut.workflow.compress import Recorded, Result, run_request
from mimicut.workflow.intake import extra_images, known_images, read_given
from mimicut.workflow.request import Images, OnStage, OnStep, Request, RequestOptions, request_of, teacher_of

_WEIGHTED = ("feature_error_relative", "feature_cosine", "confidence_teacher", "confidence_student")


def crossfit(
    teacher: Teacher | nn.Module | str,
    images: ImageSource | ImageSet,
    folds: int,
    *,
    on_stage: OnStage | None = None,
    on_step: OnStep | None = None,
    **options: Unpack[RequestOptions],
) -> Result:
    """Compress with nothing held out, and certify with `folds` further students.

    The certificate takes `folds` times as long again. A latency target is planned once, from all images, and the folds
    use that plan. Copies of one image are in one fold.

    Args:
        teacher, images, on_stage, on_step, options: As for `compress`; without held_out.
        folds: From 2 to the number of different images.

    Returns:
        As `compress`, with the folds' figures in the report.

    Raises:
        InputError: Fewer than two folds, more folds than different images, held-out images given too, or a required
            agreement together with a latency or depth.
        MimicutError: As `compress`.
    """
    say = on_stage or (lambda text: None)
    teacher = teacher_of(teacher, images, options.get("example"))
    if options.get("held_out") is not None:
        raise InputError("crossfit: found held-out images as well; expected either crossfit or those")
    if folds < 2:
        raise InputError(f"crossfit: found {folds} folds, expected 2 up to the number of different images")
    if current() is not None:
        raise InputError("crossfit: found several devices (--devices); expected one, on which fold follows fold")
    options["held_out_share"] = 0.0
    request = request_of(teacher, **options)
    found = read_given(teacher, images, request)
    parts = _folds(found, folds, request.images.split_seed)
    _check(request, sum(len(held) for _, held in parts))
    if not request.draws_extra and request.config.steps and isinstance(found, ImageSet):
        extra_images(request, found, {"given": found})  # each of them certifies once
    notes = known_images(teacher, request.plan, found.hashes, request.min_agreement)
    searches = request.budget is not None and request.budget.searches
    if searches:
        notes.append("every fold's student has the plan made from all images, including those held out in the fold")
    recorded = Recorded(images, replace(request, crossfit=folds))
    result = run_request(
        teacher, found, replace(request, min_agreement=None, max_error=None), say, on_step, recorded=recorded
    )
    if result.report.crossfit is not None:  # of the same run, which was complete
        return replace(result, report=replace(result.report, min_agreement=request.min_agreement))
    again = _fold_request(request, result.plan if searches or request.plan is not None else None)
    reports = []
    for number, (rest, held) in enumerate(parts, 1):
        say(f"fold {number} of {folds}: {len(rest)} images, {len(held)} held out")
        fold = replace(again, images=Images(held_out=found.subset(held)))
        try:
            reports.append(run_request(teacher, found.subset(rest), fold, lambda text: None, on_step).report)
        except Stopped:  # a stopped fold has no result of its own
            raise KeyboardInterrupt from None
    report = _pooled(result.report, reports)
    seconds = (report.seconds or 0) + sum(fold.seconds or 0 for fold in reports)
    notes = list(dict.fromkeys([*report.notes, *notes]))
    report = replace(report, min_agreement=request.min_agreement, seconds=seconds, notes=tuple(notes))
    if result.folder is not None:
        store.put_report(result.folder, report)
    return replace(result, report=report)


def _check(request: Request, held_out: int) -> None:
    check_threshold(request.min_agreement, held_out)
    if request.max_error is not None:
        raise InputError(
            f"crossfit: found an allowed error of {request.max_error} as well, whose interval the folds cannot give; "
            "expected held-out images instead of crossfit"
        )
    if request.with_alternatives:
        raise InputError(
            "crossfit: found alternatives as well, but no image is held out to judge them by; expected either crossfit "
            "or alternatives"
        )
    if request.int8 and request.min_agreement is not None:
        raise InputError(
            f"crossfit: found a required agreement of {request.min_agreement} for INT8, and no image is held out to "
            "measure the INT8 file; expected held-out images instead of crossfit"
        )
    if request.min_agreement is not None and request.budget is not None and request.budget.searches:
        raise InputError(
            f"crossfit: found a required agreement of {request.min_agreement} together with a latency or depth; that "
            "plan is made from all images, so none of them can prove the agreement; expected a budget such as keep, or "
            "held-out images instead of crossfit"
        )


def _fold_request(request: Request, plan: Plan | None) -> Request:
    """The request for a fold's student. plan: the one made from all images, if the folds use it; its latency was
    already measured."""
    fold = replace(request, folder=None, force=False, resume=False, export_to=(), min_agreement=None)
    return fold if plan is None else replace(fold, budget=None, plan=replace(plan, latency=None))


def _folds(images: ImageSet, folds: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """(images to fit, images held out) of each fold; only one of several copies is held out."""
    alike: dict[str, list[int]] = {}
    for index, content in enumerate(images.contents):
        alike.setdefault(content, []).append(index)
    if not 2 <= folds <= len(alike):
        raise InputError(f"crossfit: found {folds} folds for {len(alike)} different images, expected 2 to {len(alike)}")
    order = torch.randperm(len(alike), generator=torch.Generator().manual_seed(seed)).tolist()
    groups = [list(alike.values())[i] for i in order]
    parts = []
    for fold in range(folds):
        held, left_out = sorted(g[0] for g in groups[fold::folds]), {i for g in groups[fold::folds] for i in g}
        parts.append(([i for i in range(len(images)) if i not in left_out], held))
    return parts


def _pooled_outputs(folds: Sequence[Sequence[dict[str, Any]]], images: Sequence[int]) -> tuple[dict[str, Any], ...]:
    """The figures of each output, weighted by images; of the intervals only that of the agreement."""
    pooled = []
    for same in zip(*folds, strict=True):
        one = dict(same[0])
        for name in [name for name, value in one.items() if value is None or isinstance(value, float)]:
            values = [output[name] for output in same]
            known = None not in values and not name.endswith(("_low", "_high"))
            one[name] = sum(v * n for v, n in zip(values, images, strict=True)) / sum(images) if known else None
        if one["agreement"] is not None:
            one["agreement_low"], one["agreement_high"] = binomial_interval(one["agreement"] * sum(images), sum(images))
        pooled.append(one)
    return tuple(pooled)


def _pooled(report: Report, folds: Sequence[Report]) -> Report:
    """`report` with the figures of all folds."""
    images = [fold.images_held_out or 0 for fold in folds]
    total = sum(images)
    pooled: dict[str, Any] = {"images_held_out": total, "crossfit": len(folds)}
    shares = [fold.top1_agreement for fold in folds if fold.top1_agreement is not None]
    if len(shares) == len(folds):
        agreeing = sum(round(share * n) for share, n in zip(shares, images, strict=True))
        low, high = binomial_interval(agreeing, total)
        pooled |= {"top1_agreement": agreeing / total, "top1_agreement_low": low, "top1_agreement_high": high}
    for name in _WEIGHTED:
        values = [getattr(fold, name) for fold in folds]
        if None not in values:
            pooled[name] = sum(v * n for v, n in zip(values, images, strict=True)) / total
    pooled["outputs"] = _pooled_outputs([fold.outputs for fold in folds], images)
    by_class: dict[str, list[int]] = {}
    for fold in folds:
        for name, (agree, seen) in fold.agreement_by_class.items():
            so_far = by_class.setdefault(name, [0, 0])
            by_class[name] = [so_far[0] + agree, so_far[1] + seen]
    every = [each for fold in folds for each in fold.disagreements]
    pooled |= {
        "agreement_by_class": dict(sorted(by_class.items(), key=lambda item: int(item[0]))),
        "disagreements": tuple(sorted(every, key=lambda e: e["teacher"][0] == e["student"][0])[:DISAGREEMENTS]),
        "image_hashes": {**report.image_hashes, "held_out": report.image_hashes.get("fit", [])},
    }
    caveat = (
        f"crossfit: each of {total} images was held out once, from one of {len(folds)} students made from the others; "
        "the figures describe this way of making students, not the student that was kept, which has seen all images; "
        "the folds are not independent, so the interval is an approximation"
    )
    notes = [note for note in report.notes if "no image was held out" not in note]
    return replace(report, notes=(*notes, caveat), **pooled)

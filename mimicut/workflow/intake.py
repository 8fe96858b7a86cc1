"""Read the images and divide them: to fit, to choose by, to certify, to measure accuracy."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mimicut.anatomy.tracing import as_example
from mimicut.base import memory
from mimicut.base.errors import InputError
from mimicut.base.guard import evaluating
from mimicut.inputs.extra_images import ExtraImages, read_extra
from mimicut.inputs.image_set import (
    ImageSet,
    ImageSource,
    ImagesWithCall,
    again_notes,
    base_of,
    bind_call,
    read_images,
    split,
)
from mimicut.inputs.input_source import Inputs, InputSource, inputs_of, recorded_inputs
from mimicut.inputs.labels import labels_from_folders
from mimicut.inputs.marked_boxes import boxes_from_folder
from mimicut.inputs.model_checks import refuse_damaged
from mimicut.inputs.teacher import Teacher
from mimicut.inputs.volumes import read_samples
from mimicut.proof.certificate import check_threshold
from mimicut.proof.detections import known_classes
from mimicut.proof.figures import class_scores
from mimicut.proof.image_check import LABELLED, refuse_shared
from mimicut.recovery.batches import Source, WithExtra
from mimicut.recovery.config import MimicConfig
from mimicut.recovery.recover import CHOOSE_FROM, CHOOSE_SHARE
from mimicut.surgery.plan import Plan
from mimicut.workflow.request import Images, OnStage, Request

Call = dict[str, Any]


@dataclass(frozen=True)
class Intake:
    """The images of a run, and how the network takes them.

    Args:
        few: Images to fit.
        choose: Images to choose the best step by; None if there are none.
        held_out: Images that only certify.
        labelled, labels: Images that only measure accuracy, and their classes, or the boxes marked in each
            (`boxes_from_folder`).
        example: Two images as the network takes them.
        call: How the network takes images, as plain data; None if images are its only input.
        notes: Sentences about the images that the user should see.
        extra: Images of anything that help to mimic; None if there are none.
    """

    few: ImageSet
    choose: ImageSet | None
    held_out: ImageSet
    labelled: ImageSet | None
    labels: list[int] | list[torch.Tensor]
    example: Any
    call: Call | None
    notes: tuple[str, ...]
    extra: ExtraImages | None = None

    @property
    def training(self) -> Source:
        """The images to fit, with the extra ones beside them, as the network takes them."""
        few = self.bound(self.few)
        return few if self.extra is None else WithExtra(few, replace(self.extra, call=self.call))

    @property
    def hashes(self) -> dict[str, list[str]]:
        """For each part, the hashes of its images."""
        return {
            "fit": self.few.hashes,
            "choose": self.choose.hashes if self.choose else [],
            "held_out": self.held_out.hashes,
            "extra": [] if self.extra is None or self.extra.pictures is None else self.extra.pictures.hashes,
        }

    def bound(self, images: ImageSet) -> ImageSet | ImagesWithCall:
        """`images` as the network takes them."""
        return bind_call(images, self.call)


def take_in(teacher: Teacher, images: ImageSource | ImageSet, request: Request) -> Intake:
    """Read and split the images.

    Raises:
        InputError: Images cannot be read or are on both sides; so few held-out images cannot prove the threshold; or
            the network takes more than images.
        UnsupportedModel: The teacher's weights are not finite.
    """
    refuse_damaged(teacher.model, teacher.spec)  # they may have changed since it was loaded
    memory_bytes = request.memory_bytes
    inputs = _inputs_of(teacher, images, request)
    few, choose, held_out, notes = parted_images(teacher, images, request.images, request.config, memory_bytes, inputs)
    check_threshold(request.min_agreement, len(held_out))
    example, call = _example_and_call(teacher, few, request)
    labelled, labels = labelled_images(
        teacher, request.images.labelled, request.images.labels, call, memory_bytes, inputs
    )
    extra = None
    if isinstance(few, InputSource):
        notes += _without_images(request)
    elif request.config.steps and request.config.extra_share:
        measuring = {"held-out": held_out, "choosing": choose, LABELLED: labelled}
        extra, found = extra_images(request, few, measuring)
        notes += found
    elif not request.draws_extra:
        notes.append("the extra images are not used: they only help to mimic, and no step was asked for")
    memory.trim()
    return Intake(few, choose, held_out, labelled, labels, example, call, tuple(notes), extra)


def read_given(teacher: Teacher, images: ImageSource | ImageSet, request: Request) -> Any:
    """Read the images or samples of a run, all of them to learn from: an `ImageSet` or an `InputSource`."""
    refuse_damaged(teacher.model, teacher.spec)
    inputs = _inputs_of(teacher, images, request)
    if inputs is not None:
        return _samples(teacher, images, inputs)
    room = int(memory.TRAINING_IMAGES * request.memory_bytes)
    return images if isinstance(images, ImageSet) else read_images(images, teacher.preprocessing, memory_bytes=room)


def images_to_plan(teacher: Teacher, images: ImageSource) -> tuple[Any, Any]:
    """Read the images or samples that a plan is made with; return them, and two of them to trace with."""
    inputs = inputs_of(teacher.model, None)
    if inputs is None or teacher.call:
        return read_images(images, teacher.preprocessing), teacher.example()
    few = read_samples(images, replace(inputs, depth=teacher.depth), teacher.preprocessing)
    return few, few.batch([0, len(few) - 1])


def _inputs_of(teacher: Teacher, images: Any, request: Request) -> Inputs | None:
    """What the network takes, where that is not one batch of images."""
    if isinstance(images, InputSource):
        return recorded_inputs(images.call)
    if isinstance(images, ImageSet):
        return None
    found = inputs_of(teacher.model, None if request.example is None else as_example(request.example))
    return found if found is None or found.depth else replace(found, depth=teacher.depth)


def _example_and_call(teacher: Teacher, few: Any, request: Request) -> tuple[Any, Call | None]:
    """Two samples as the network takes them, and how it takes them."""
    if isinstance(few, InputSource):
        example = few.batch([0, len(few) - 1]) if request.example is None else request.example
        return example, few.call
    example = teacher.example() if request.example is None else request.example
    return example, call_of(example)


def _without_images(request: Request) -> list[str]:
    """Notes on what a run does without where its samples are no images.

    Raises:
        InputError: It was asked for.
    """
    if request.export_to:
        raise InputError(
            f"exporting to {', '.join(request.export_to)}: the network takes other inputs than images, which a result "
            "folder does not make up; call mimicut.export(result.model, example, folder)"
        )
    if not request.draws_extra:
        raise InputError("reading the extra images: the network takes other inputs than images; leave them out")
    return ["the samples are used as they are, without random variants and without drawn pictures beside them"]


def extra_images(
    request: Request, few: ImageSet, measuring: Mapping[str, ImageSet | None]
) -> tuple[ExtraImages | None, list[str]]:
    """Read or draw the extra images; return them with notes.

    Args:
        request: Says where they come from.
        few: The images to fit.
        measuring: As of `refuse_shared`.

    Raises:
        InputError: They cannot be read, or images that measure are among them.
    """
    config = request.config
    extra = read_extra(
        request.extra, few, config.views, seed=config.seed, memory_bytes=request.memory_bytes,
        most=config.steps * config.batch_size,
    )  # fmt: skip
    if extra is None or extra.pictures is None:
        return extra, []
    refuse_shared(extra.pictures, measuring)
    notes = list(extra.pictures.notes)
    known = len(set(few.hashes) & set(extra.pictures.hashes))
    if known:
        notes.append(f"{known} of {len(extra.pictures)} are among the images to learn from, and add nothing new")
    return extra, [f"extra images: {note}" for note in notes]


def known_images(teacher: Teacher, plan: Plan | None, hashes: Sequence[str], min_agreement: float | None) -> list[str]:
    """Write notes on held-out images that trained the teacher or helped to make the plan.

    Raises:
        InputError: There are such images, and an agreement is required.
    """
    trained = set((teacher.result or {}).get("images", ())) & set(hashes)
    planned = set(() if plan is None else plan.images) & set(hashes)
    if min_agreement is not None and (trained or planned):
        raise InputError(
            f"requiring an agreement of {min_agreement}: {len(trained | planned)} of the held-out images trained the "
            "teacher or helped to make the plan, so they cannot prove it; hold out other images (--held-out)"
        )
    found = {"trained the teacher": trained, "helped to make this plan": planned}
    return [
        f"{len(some)} held-out image(s) {what}, so they are weaker evidence; hold out other images (--held-out)"
        for what, some in found.items()
        if some
    ]


def say_notes(say: OnStage, notes: Iterable[str]) -> None:
    """Pass each note to `say`."""
    for note in notes:
        say(f"note: {note}")


def parted_images(
    teacher: Teacher,
    images: ImageSource | ImageSet,
    sources: Images,
    config: MimicConfig,
    memory_bytes: int,
    inputs: Inputs | None = None,
) -> tuple[ImageSet, ImageSet | None, ImageSet, list[str]]:
    """Divide the images into those to fit, to choose by and to certify, and write notes.

    Training images are held in memory with their views, the others in the evaluation view alone, as far as their shares
    of the memory allow. inputs: What the network takes, where that is not one batch of images.
    """
    keep, other = base_of(config.views), int(memory.OTHER_IMAGES * memory_bytes)
    training_bytes = int(memory.TRAINING_IMAGES * memory_bytes)
    found: Any = images
    if inputs is not None:
        found = _samples(teacher, images, inputs)
    elif not isinstance(found, ImageSet):
        found = read_images(found, teacher.preprocessing, memory_bytes=training_bytes, keep=keep)
    notes = [note for note in found.notes if note not in again_notes(found, keep)]

    def parted(fit: ImageSet, choose: list[int], held_out: ImageSet, more: list[str]) -> Any:
        few = fit.keeping(config.views, training_bytes)
        chosen = found.subset(choose).keeping(None, other) if choose else None
        return few, chosen, held_out.keeping(None, other), [*notes, *more, *again_notes(few, keep)]

    if sources.held_out is None:
        share = sources.held_out_share
        choosing = CHOOSE_SHARE if _chooses(len(found) * (1 - share), config) else 0.0
        parts = split(found, seed=sources.split_seed, held_out_share=share, choose_share=choosing)
        return parted(found.subset(parts.fit), parts.choose, found.subset(parts.held_out), parts.notes)
    held_out = measuring_images(teacher, sources.held_out, memory_bytes, inputs)
    notes += [f"held out: {n}" for n in held_out.notes]
    held_out = held_out.distinct()
    same = held_out.shared_with(found)
    if same:
        raise InputError(
            f"reading the held-out images: {len(same)} of them are among the images to learn from (first: {same[0][0]} "
            f"is {same[0][1]}); held-out images must influence nothing: remove them from one of the two"
        )
    if not _chooses(len(found), config):
        return parted(found, [], held_out, [])
    parts = split(found, seed=sources.split_seed, held_out_share=0.0, choose_share=CHOOSE_SHARE)
    return parted(found.subset(parts.fit), parts.choose, held_out, [])


def _samples(teacher: Teacher, source: Any, inputs: Inputs) -> InputSource:
    return source if isinstance(source, InputSource) else read_samples(source, inputs, teacher.preprocessing)


def measuring_images(
    teacher: Teacher, source: ImageSource | ImageSet, memory_bytes: int, inputs: Inputs | None = None
) -> Any:
    """Read images that only measure; the evaluation view alone is held, in a share of the memory.

    inputs: What the network takes, where that is not one batch of images.
    """
    if inputs is not None:
        return _samples(teacher, source, inputs)
    if isinstance(source, ImageSet):
        return source
    other_bytes = int(memory.OTHER_IMAGES * memory_bytes)
    return read_images(source, teacher.preprocessing, memory_bytes=other_bytes, keep="evaluated")


def _chooses(images: float, config: MimicConfig) -> bool:
    return config.start == "closed_form" and images >= CHOOSE_FROM


def call_of(example: Any) -> Call | None:
    """Describe how the network takes its images, as plain data for the plan.

    Returns:
        The keyword of the images, if any, and the options beside them; None if images are its only input.

    Raises:
        InputError: The network takes anything else.
    """
    args, kwargs = as_example(example)
    options = {name: value for name, value in kwargs.items() if not isinstance(value, torch.Tensor)}
    images = [*args, *(name for name in kwargs if name not in options)]
    if (
        len(images) != 1
        or not all(isinstance(a, torch.Tensor) for a in args)
        or not all(isinstance(v, (bool, int, float, str, type(None))) for v in options.values())
    ):
        raise InputError(
            f"reading the example: found {len(args)} arguments and the keywords {', '.join(kwargs) or 'none'}; "
            "expected images as the only tensor, (images,) or ((), {name: images}), beside them at most named "
            "options that are numbers or texts. For a network with several inputs give an InputSource, or samples that "
            "are dictionaries or tuples; or wrap it in a module whose forward takes images and fills in the rest"
        )
    keyword = None if args else images[0]
    return {"keyword": keyword, "options": options} if keyword or options else None


def labelled_images(
    teacher: Teacher,
    source: ImageSource | ImageSet | None,
    labels: Sequence[int] | None,
    call: Call | None,
    memory_bytes: int,
    inputs: Inputs | None = None,
) -> tuple[ImageSet | None, list[int] | list[torch.Tensor]]:
    """Read the labelled images and their classes, or the boxes marked in them, if any are given."""
    if source is None:
        return None, []
    test = measuring_images(teacher, source, memory_bytes, inputs)
    if labels is not None:
        return test, list(labels)
    if not isinstance(source, (str, Path)):
        raise InputError(
            "reading labelled images: found images without labels; give labels=[...] or a folder of class folders"
        )
    boxes = boxes_from_folder(test.names, source, known_classes(teacher.model))
    if boxes is not None:
        if teacher.preprocessing.resize is not None:
            raise InputError(
                "reading labelled images: boxes are marked in them, but only the centre of each image is used; "
                'expected whole images: --resize none (resize="none" in Python)'
            )
        return test, boxes
    return test, labels_from_folders(test.names, source, _classes(teacher, bind_call(test, call)))


def _classes(teacher: Teacher, test: ImageSet | ImagesWithCall) -> int:
    batch = test.batch([0])
    args, kwargs = ((batch,), {}) if isinstance(batch, torch.Tensor) else batch
    with evaluating(teacher.model):
        scores = class_scores(teacher.model(*args, **kwargs), 1)
    if scores is None:
        raise InputError("measuring accuracy: the teacher's output is not one row of class scores per image")
    return scores.shape[1]

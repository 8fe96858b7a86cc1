"""Turn the texts of options into values."""

from pathlib import Path
from typing import TYPE_CHECKING

from mimicut.cli.printing import say

if TYPE_CHECKING:
    from mimicut.inputs.teacher import Teacher


def teacher_from(
    spec: str,
    weights: Path | None,
    pretrained: bool,
    num_classes: int | None,
    part: str,
    input_size: str | None,
    mean: str | None = None,
    std: str | None = None,
    resize: str | None = None,
    views: str | None = None,
    class_names: Path | None = None,
) -> "Teacher":
    from dataclasses import replace

    from mimicut.results.teachers import load_teacher

    size, depth = numbers("input-size", input_size, int, "x"), None
    if size is not None and len(size) == 4:  # of volumes and clips
        depth = size.pop(1)
    found = load_teacher(
        spec, weights=weights, pretrained=pretrained, num_classes=num_classes, part=part,
        input_size=size, mean=numbers("mean", mean, float, ","),
        std=numbers("std", std, float, ","), resize=int(resize) if resize and resize.isdigit() else resize,
        views=views, class_names=class_names,
    )  # fmt: skip
    for note in found.notes:
        say(f"note: {note}")
    return replace(found, depth=depth)


def blank_example(teacher: "Teacher") -> object:
    """`Teacher.example`; says how many slices or frames it has, where nobody did."""
    example = teacher.example()
    if teacher.depth is None and getattr(example, "ndim", 0) == 5:
        say(f"note: traced with {example.shape[2]} slices or frames; --input-size CxDxHxW sets how many")
    return example


def numbers(option: str, text: str | None, kind: type, between: str) -> list | None:
    from mimicut.base.errors import InputError

    if text is None:
        return None
    try:
        return [kind(part) for part in text.lower().split(between)]
    except ValueError:
        example = "3x224x224" if between == "x" else "0.5,0.5,0.5"
        raise InputError(f"reading --{option}: found {text!r}, expected numbers such as {example}") from None


def formats_in(to: str) -> list[str]:
    return [name.strip() for name in to.split(",") if name.strip()]


def set_threads(threads: int | None) -> None:
    """Set how many threads torch takes; numbers below 1e-38, which make mimicking slow, are zero in all of them: those
    that torch starts later have what is set here (`recovery.training`)."""
    import torch

    torch.set_flush_denormal(True)
    if threads is not None:
        torch.set_num_threads(max(1, threads))


def bytes_in(size: str | None) -> int | None:
    """Bytes of a text such as 3G."""
    from mimicut.base.memory import parsed

    return None if size is None else parsed(size)

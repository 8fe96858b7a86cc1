"""The options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

_TEACHER, _BUDGET, _RECIPE, _IMAGES, _MACHINE = "Teacher", "Budget", "Recipe", "Images", "Machine"
_RARE = "Rarely needed"
FORMATS_HELP = "onnx, openvino, pt2, int8, litert, executorch, coreml, tensorrt, separated by commas"

TeacherArg = Annotated[
    str,
    typer.Argument(
        help="timm:NAME, torchvision:NAME, hf:FOLDER, hf:ID, onnx:FILE, FILE.py:FUNCTION, demo:NAME or a result folder"
    ),
]
ImagesArg = Annotated[Path, typer.Argument(help="Folder of images (any nesting), one file, .npy or .npz")]

Weights = Annotated[
    Path | None,
    typer.Option(
        help="Weights of the teacher: .safetensors, a checkpoint (FILE:KEY for one of several networks in it), or a "
        "result made from TEACHER",
        rich_help_panel=_TEACHER,
    ),
]
Pretrained = Annotated[bool, typer.Option(help="Load the library's own weights", rich_help_panel=_TEACHER)]
NumClasses = Annotated[
    int | None, typer.Option(help="Number of classes (timm: 0 for no head)", rich_help_panel=_TEACHER)
]
ClassNames = Annotated[
    Path | None,
    typer.Option(
        help="File with the names of its classes: one a line, or JSON, a list or {number: name}",
        rich_help_panel=_TEACHER,
    ),
]
Part = Annotated[
    str, typer.Option(help="Submodule to compress instead of the whole, such as backbone", rich_help_panel=_TEACHER)
]
InputSize = Annotated[
    str | None,
    typer.Option(
        help="Input size CxHxW, such as 3x224x224; CxDxHxW with slices or frames for volumes and clips",
        rich_help_panel=_TEACHER,
    ),
]
Mean = Annotated[
    str | None, typer.Option(help="Mean of each channel, 0..1, such as 0.5,0.5,0.5", rich_help_panel=_TEACHER)
]
Std = Annotated[str | None, typer.Option(help="Deviation of each channel, 0..1", rich_help_panel=_TEACHER)]
Resize = Annotated[
    str | None,
    typer.Option(
        help="Shorter side in pixels before the crop, exact, or none: crops at the pictures' own scale",
        rich_help_panel=_TEACHER,
    ),
]
Seam = Annotated[
    list[str] | None,
    typer.Option(
        help="Where the features are taken: MODULE, MODULE:input, MODULE:output@CALL or MODULE:output.PART; ':output' "
        "is the network's own output; repeat for several",
        rich_help_panel=_RARE,
    ),
]

Keep = Annotated[float | None, typer.Option(help="Share of MACs to keep, 0 to 1", rich_help_panel=_BUDGET)]
Keeps = Annotated[
    list[float] | None,
    typer.Option("--keep", help="Share of MACs to keep, 0 to 1; repeat for several results", rich_help_panel=_BUDGET),
]
Params = Annotated[
    float | None, typer.Option(help="Share of parameters to keep, or, above 1, their number", rich_help_panel=_BUDGET)
]
SizeMb = Annotated[float | None, typer.Option(help="Size of all tensors in MB (10^6 bytes)", rich_help_panel=_BUDGET)]
Latencies = Annotated[
    list[float] | None,
    typer.Option("--latency", help="Share of the teacher's latency; repeat for several", rich_help_panel=_BUDGET),
]
LatenciesMs = Annotated[
    list[float] | None,
    typer.Option("--latency-ms", help="Milliseconds of a forward pass; repeat for several", rich_help_panel=_BUDGET),
]
Runtime = Annotated[
    str | None,
    typer.Option(
        help="Runtime that latency is measured on: torch, compile, onnxruntime, openvino, cuda, tensorrt",
        rich_help_panel=_BUDGET,
    ),
]
Batch = Annotated[
    int | None, typer.Option(help="Images in a measured forward pass; default 1", rich_help_panel=_BUDGET)
]
Depth = Annotated[
    str | None,
    typer.Option(
        help="Drop whole blocks: never, auto or only; default: auto with a latency, else never", rich_help_panel=_BUDGET
    ),
]
KeepWidth = Annotated[
    float | None, typer.Option(help="Share of each group's channels to keep", rich_help_panel=_BUDGET)
]
Scheme = Annotated[
    str | None,
    typer.Option(
        help="mid: cut inside residual blocks; all: cut every width; default auto: mid where it is enough, and as good",
        rich_help_panel=_RARE,
    ),
]
SpareEnds = Annotated[
    bool,
    typer.Option(help="With scheme mid: leave each stage's first and last block whole", rich_help_panel=_RARE),
]
Drop = Annotated[list[str] | None, typer.Option(help="Block to drop; repeat for several", rich_help_panel=_BUDGET)]
Pin = Annotated[
    list[str] | None,
    typer.Option(help="Pattern of modules whose outputs keep all channels", rich_help_panel=_RARE),
]
Exclude = Annotated[
    list[str] | None, typer.Option(help="Pattern of modules that must not change at all", rich_help_panel=_RARE)
]
MinChannels = Annotated[int | None, typer.Option(help="Smallest width in channels; default 1", rich_help_panel=_RARE)]
Divisor = Annotated[
    int | None,
    typer.Option(
        help="Widths are multiples of this; default 1, or with a latency what measurements show to pay off",
        rich_help_panel=_RARE,
    ),
]
Importance = Annotated[
    str | None,
    typer.Option(
        help="How channels are ranked: l1, l2, bn or random; default: by the images (preset default), else l1",
        rich_help_panel=_RARE,
    ),
]

Preset = Annotated[
    str,
    typer.Option(
        help="default (closed form, then mimic), paper (MiR as published) or transformer (the same with AdamW)",
        rich_help_panel=_RECIPE,
    ),
]
Effort = Annotated[
    str | None, typer.Option(help="Instead of steps: quick (none), standard or thorough", rich_help_panel=_RECIPE)
]
MaxSeconds = Annotated[
    float | None,
    typer.Option(
        help="Time limit for evidence, planning and recovery, which takes as many steps as fit", rich_help_panel=_RECIPE
    ),
]
Steps = Annotated[
    int | None, typer.Option(help="Number of optimiser steps; default: the preset's", rich_help_panel=_RECIPE)
]
Seed = Annotated[int | None, typer.Option(help="Seed of batches, views and random scores", rich_help_panel=_RECIPE)]
Views = Annotated[
    str | None,
    typer.Option(
        help="Random variants of the images: imagenet, patches, pad_crop, crops or none", rich_help_panel=_RARE
    ),
]

HeldOut = Annotated[
    Path | None,
    typer.Option(help="Images that only certify; default: a share of IMAGES", rich_help_panel=_IMAGES),
]
HeldOutShare = Annotated[float, typer.Option(help="Share of IMAGES that only certifies", rich_help_panel=_IMAGES)]
Extra = Annotated[
    str,
    typer.Option(
        help='Pictures of anything (a folder), which help to mimic and do nothing else; "generated" ones, or "none"',
        rich_help_panel=_IMAGES,
    ),
]
Labelled = Annotated[
    Path | None,
    typer.Option(help="Folder of class folders, only to measure accuracy", rich_help_panel=_IMAGES),
]
MinAgreement = Annotated[
    float | None,
    typer.Option(
        help="Exit 1 unless the lower end of the agreement's 95 % interval is at least this, 0 to 1",
        rich_help_panel=_IMAGES,
    ),
]
MaxError = Annotated[
    float | None,
    typer.Option(
        help="Exit 1 unless the upper end of the relative error's 95 % interval is at most this; for outputs that are "
        "no classes",
        rich_help_panel=_IMAGES,
    ),
]
OutputKind = Annotated[
    list[str] | None,
    typer.Option(
        "--output",
        help="What the output's numbers are, where this cannot be seen: scores, multilabel, embedding, values or map; "
        "PART=KIND for one of several outputs; repeat",
        rich_help_panel=_IMAGES,
    ),
]

Device = Annotated[str | None, typer.Option(help="Device that trains: cpu, cuda, ...", rich_help_panel=_MACHINE)]
Devices = Annotated[
    int | None,
    typer.Option(help="Number of devices that work together (or start with torchrun)", rich_help_panel=_MACHINE),
]
Precision = Annotated[
    str,
    typer.Option(
        help="Precision of mimicking: auto (float32 or bf16, measured), float32, bf16 or float64",
        rich_help_panel=_MACHINE,
    ),
]
Layout = Annotated[
    str,
    typer.Option(
        help="Memory layout while mimicking: auto (measured), contiguous or channels_last", rich_help_panel=_MACHINE
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        help="Memory limit of the run, such as 3G; default: 4G, or half of what is free if that is less",
        rich_help_panel=_MACHINE,
    ),
]
Threads = Annotated[int | None, typer.Option(help="CPU threads", rich_help_panel=_MACHINE)]
LogTo = Annotated[
    Path | None,
    typer.Option("--tensorboard", help="Folder for the run's TensorBoard files", rich_help_panel=_MACHINE),
]
ForceResult = Annotated[bool, typer.Option(help="Replace an existing result folder")]

"""The options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

TEACHER_PANEL = "Teacher"
BUDGET_PANEL = "Budget"
PRESET_HELP = "Recipe: default (closed form, then mimic), paper (MiR as published) or transformer (the same with AdamW)"
TeacherArg = Annotated[
    str,
    typer.Argument(
        help="timm:NAME, torchvision:NAME, hf:FOLDER, hf:ID, FILE.py:FUNCTION, demo:NAME or the folder of a result"
    ),
]
ImagesArg = Annotated[Path, typer.Argument(help="Folder of images (any nesting), one file, .npy or .npz")]
Weights = Annotated[
    Path | None,
    typer.Option(
        help="Tensors: .safetensors, or a state dict; or a result that was made of TEACHER",
        rich_help_panel=TEACHER_PANEL,
    ),
]
Pretrained = Annotated[bool, typer.Option(help="The library's own weights", rich_help_panel=TEACHER_PANEL)]
NumClasses = Annotated[
    int | None, typer.Option(help="Classes of the teacher (timm: 0 for no head)", rich_help_panel=TEACHER_PANEL)
]
Part = Annotated[
    str, typer.Option(help="Submodule to compress instead of the whole, e.g. backbone", rich_help_panel=TEACHER_PANEL)
]
InputSize = Annotated[
    str | None, typer.Option(help="CxHxW that the teacher takes, e.g. 3x224x224", rich_help_panel=TEACHER_PANEL)
]
Mean = Annotated[str | None, typer.Option(help="Per channel, 0..1, e.g. 0.5,0.5,0.5", rich_help_panel=TEACHER_PANEL)]
Std = Annotated[str | None, typer.Option(help="Per channel, 0..1", rich_help_panel=TEACHER_PANEL)]
Resize = Annotated[
    str | None, typer.Option(help="Pixels of the shorter side before the crop, or exact", rich_help_panel=TEACHER_PANEL)
]
Seam = Annotated[
    list[str] | None,
    typer.Option(
        help="Where the features are: MODULE, MODULE:input, MODULE:output@CALL or MODULE:output.PART; ':output' is the "
        "network's own; repeat for several"
    ),
]
Keep = Annotated[float | None, typer.Option(help="Share of MACs to keep, 0 to 1", rich_help_panel=BUDGET_PANEL)]
Keeps = Annotated[
    list[float] | None,
    typer.Option(
        "--keep", help="Share of MACs to keep, 0 to 1; repeat for several results", rich_help_panel=BUDGET_PANEL
    ),
]
Params = Annotated[
    float | None, typer.Option(help="Parameters: a share up to 1, or how many", rich_help_panel=BUDGET_PANEL)
]
SizeMb = Annotated[float | None, typer.Option(help="Megabytes (10^6) of all tensors", rich_help_panel=BUDGET_PANEL)]
Shares = Annotated[
    list[float] | None,
    typer.Option("--latency", help="Share of the teacher's latency; repeat for several", rich_help_panel=BUDGET_PANEL),
]
LatencyMs = Annotated[
    list[float] | None,
    typer.Option(
        "--latency-ms", help="Milliseconds of a forward pass; repeat for several", rich_help_panel=BUDGET_PANEL
    ),
]
Runtime = Annotated[
    str | None,
    typer.Option(help="Measures: torch, compile, onnxruntime, openvino, cuda, tensorrt", rich_help_panel=BUDGET_PANEL),
]
Batch = Annotated[int | None, typer.Option(help="Images in a measured pass; else 1", rich_help_panel=BUDGET_PANEL)]
Depth = Annotated[
    str | None,
    typer.Option(
        help="May whole blocks go: never (without a latency), auto (with one), or only they",
        rich_help_panel=BUDGET_PANEL,
    ),
]
KeepWidth = Annotated[
    float | None, typer.Option(help="Share of each group's channels to keep", rich_help_panel=BUDGET_PANEL)
]
Scheme = Annotated[
    str | None,
    typer.Option(
        help="mid: inside residual blocks; all: every width; else auto: mid where that is enough",
        rich_help_panel=BUDGET_PANEL,
    ),
]
SpareEnds = Annotated[
    bool, typer.Option(help="With mid: leave each stage's first and last block whole", rich_help_panel=BUDGET_PANEL)
]
Drop = Annotated[
    list[str] | None, typer.Option(help="Block to leave out whole; repeatable", rich_help_panel=BUDGET_PANEL)
]
Pin = Annotated[
    list[str] | None,
    typer.Option(help="Modules whose outputs keep all channels (pattern)", rich_help_panel=BUDGET_PANEL),
]
Exclude = Annotated[
    list[str] | None, typer.Option(help="Modules that must not change at all (pattern)", rich_help_panel=BUDGET_PANEL)
]
MinChannels = Annotated[int | None, typer.Option(help="No width is cut below; else 1", rich_help_panel=BUDGET_PANEL)]
Divisor = Annotated[
    int | None,
    typer.Option(
        help="Widths are multiples of; else 1, or with a latency what is measured to be worth it",
        rich_help_panel=BUDGET_PANEL,
    ),
]
Importance = Annotated[
    str | None,
    typer.Option(
        help="What tells channels that matter: l1, l2, bn or random; else the images, with preset default, or l1",
        rich_help_panel=BUDGET_PANEL,
    ),
]
Effort = Annotated[str | None, typer.Option(help="Instead of steps: quick (none), standard or thorough")]
MaxSeconds = Annotated[
    float | None, typer.Option(help="For what the images say and for recovering: as many steps as fit")
]
Steps = Annotated[int | None, typer.Option(help="Optimiser steps of mimic (the preset's if not given)")]
Seed = Annotated[int | None, typer.Option(help="Of batches, views and scores (the preset's if not given)")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...")]
Precision = Annotated[str, typer.Option(help="Of mimic: auto (measured: float32 or bf16), float32, bf16 or float64")]
Layout = Annotated[str, typer.Option(help="Of pixels while it mimics: auto (measured), contiguous or channels_last")]
MaxMemory = Annotated[
    str | None, typer.Option(help="Most memory of the run, e.g. 3G; else 4G, or half of what is free if that is less")
]
Views = Annotated[str | None, typer.Option(help="Random variants: imagenet, patches, pad_crop or none")]
HeldOut = Annotated[Path | None, typer.Option(help="Images that only certify; else a share of IMAGES")]
HeldOutShare = Annotated[float, typer.Option(help="Share of IMAGES that only certifies")]
Labelled = Annotated[Path | None, typer.Option(help="Folder of class folders: measures accuracy, nothing else")]
Threads = Annotated[int | None, typer.Option(help="CPU threads")]
FORMATS_HELP = "onnx, openvino, pt2, int8, with commas between"
LogTo = Annotated[
    Path | None, typer.Option("--tensorboard", help="Folder where TensorBoard's files of the run are written")
]
MinAgreement = Annotated[
    float | None,
    typer.Option(help="Exit 1 unless the lower end of the agreement's 95 % interval is this, 0 to 1"),
]

Preset = Annotated[str, typer.Option(help=PRESET_HELP)]
ForceResult = Annotated[bool, typer.Option(help="Replace an existing result folder")]

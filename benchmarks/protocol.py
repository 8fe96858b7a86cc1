"""What is compared, as plain data: cells, and the protocols that list them."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.methods import METHODS

TUNED = Path(__file__).parent / "tuned.json"
SEEDS = (2021, 2022, 2023, 2024, 2025)  # Source: MiR, arXiv 2201.02620
TUNING_SEEDS = (1001,)  # never in a table
# Made for networks of another kind than those of the table: run on a transformer, beside the paper's recipe.
FOR_TRANSFORMERS = "mir_adamw"
# This project's own recipe; the table has the default alone.
SAME_CUT, NO_EXTRA, OWN, WITH_PICTURES = "mimicut_same_cut", "mimicut_no_extra", "mimicut", "mimicut_pictures"
OURS = (SAME_CUT, NO_EXTRA, OWN, WITH_PICTURES)
# The others' with the same drawn pictures beside the few images, where they can use them.
OTHERS_WITH_EXTRA = ("mir_extra", "distill_extra")
APART = (FOR_TRANSFORMERS, *OTHERS_WITH_EXTRA, SAME_CUT, NO_EXTRA, WITH_PICTURES)
TABLED = tuple(name for name in METHODS if name not in APART)


@dataclass(frozen=True)
class Cell:
    """One run. task: key of `tasks.TASKS`. teacher: as `mimicut.load_teacher` reads it. cut: options of `make_plan`.

    images: how many unlabelled ones. steps: of the method. options: of the method. The same cell gives the same
    figures, whoever runs it and in whatever order.
    """

    task: str
    teacher: str
    cut: dict[str, Any]
    images: int
    steps: int
    seed: int
    method: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    def __str__(self) -> str:
        options = "".join(f" {k}={v}" for k, v in self.options.items())
        cut = ",".join(f"{k}={v}" for k, v in self.cut.items())
        return f"{self.method}{options} {self.teacher} {cut} images={self.images} steps={self.steps} seed={self.seed}"


@dataclass(frozen=True)
class Protocol:
    """Teachers x cuts x images x steps x seeds x methods.

    options: "both" the tuned and the published ones, "best" the tuned ones where there are any, "grid" all that are
    tried, to choose by; "ablation" the same, to compare. without: (teacher, method) pairs that have no meaning, each
    with the reason.
    """

    name: str
    about: str
    task: str
    teachers: tuple[str, ...]
    cuts: tuple[dict[str, Any], ...]
    images: tuple[int, ...]
    steps: tuple[int, ...]
    seeds: tuple[int, ...] = SEEDS
    methods: tuple[str, ...] = TABLED
    options: str = "both"
    without: dict[tuple[str, str], str] = field(default_factory=dict)
    extra_cuts: dict[str, tuple[dict[str, Any], ...]] = field(default_factory=dict)  # for one teacher only

    def cells(self, tuned: dict[str, Any] | None = None) -> list[Cell]:
        """Every cell: each method's best options first, then the published ones; seeds outermost in both, so that a
        sweep that is stopped has whole seeds. tuned: as `read_tuned`."""
        tuned = read_tuned() if tuned is None else tuned
        ranked = [
            (rank, Cell(self.task, teacher, cut, images, steps, seed, name, options))
            for seed in self.seeds
            for teacher in self.teachers
            for cut in (*self.cuts, *self.extra_cuts.get(teacher, ()))
            for images in self.images
            for name in self.methods
            if (teacher, name) not in self.without
            for steps in (self.steps if METHODS[name].trains else self.steps[:1])
            for rank, options in enumerate(self._options(name, teacher, cut, images, steps, tuned))
        ]
        return list({cell.key: cell for _, cell in sorted(ranked, key=lambda r: r[0])}.values())

    def _options(
        self, name: str, teacher: str, cut: dict[str, Any], images: int, steps: int, tuned: dict[str, Any]
    ) -> Iterator[dict[str, Any]]:
        method = METHODS[name]
        if self.options in ("grid", "ablation"):
            yield from method.grid
            return
        known = tuned.get(name.removesuffix("_extra"), {}).get(teacher, {}).get(said(cut), [])
        # For steps and images that were not tuned, what was best for the nearest ones.
        nearest = min(
            known, key=lambda k: (abs(math.log(k["steps"] / steps)), abs(k["images"] - images)), default={"best": None}
        )
        best = nearest["best"]
        if best is not None:
            yield best
        if best is None or self.options == "both":
            yield method.published


def said(cut: dict[str, Any]) -> str:
    """A cut in words that can be a key."""
    return " ".join(f"{key}={value}" for key, value in sorted(cut.items()))


def read_tuned() -> dict[str, Any]:
    """method -> teacher -> cut -> [{"images", "steps", "best": options}]; written by `python -m benchmarks tune`."""
    return json.loads(TUNED.read_text(encoding="utf-8")) if TUNED.exists() else {}


_TEACHERS = ("demo:resnet14", "demo:mobilenetv2_tiny", "demo:vgg7")
_NO_BLOCKS = {("demo:vgg7", "practise"): "a plain network has no residual block to drop"}
_WIDTHS: tuple[dict[str, Any], ...] = ({"keep_width": 0.5}, {"keep_width": 0.3})
# Beside the two common ones one at which MiR loses 4 to 8 points, where that is neither of them: of a plain network
# every width is cut, not only those inside blocks, so that 0.5 leaves a quarter of its MACs.
_MILD: dict[str, tuple[dict[str, Any], ...]] = {
    "demo:resnet14": ({"keep_width": 0.55},),
    "demo:vgg7": ({"keep_width": 0.82},),
}
# With five times the steps MiR loses 4 to 8 points at these, but at the last: there it is far behind after 200 steps.
_LONG: dict[str, tuple[dict[str, Any], ...]] = {
    "demo:resnet14": _WIDTHS[:1],
    "demo:mobilenetv2_tiny": _WIDTHS[1:],
    "demo:vgg7": ({"keep_width": 0.8}, _WIDTHS[0]),
}
# Where MiR at 50 images loses 4 to 8 points after the table's 200 steps.
_IN_BAND: dict[str, tuple[dict[str, Any], ...]] = {"demo:mobilenetv2_tiny": _WIDTHS[1:], **_MILD}
# Where MiR at 50 images loses 4 to 8 points after 400 steps and after 2,000; the transformer loses more after 400.
_OURS_CUTS: dict[str, tuple[dict[str, Any], ...]] = {
    "demo:resnet14": _WIDTHS[:1],
    "demo:mobilenetv2_tiny": _WIDTHS[1:],
    "demo:vgg7": ({"keep_width": 0.8}, {"keep_width": 0.75}),
    "demo:vit_tiny": _WIDTHS[:1],
}
_HEAVY: dict[str, tuple[dict[str, Any], ...]] = {
    "demo:resnet14": _WIDTHS[1:],
    "demo:mobilenetv2_tiny": ({"keep": 0.3},),
    "demo:vgg7": _WIDTHS,
    "demo:vit_tiny": _WIDTHS[1:],
}
_OURS_CUT = {teacher: cuts[:1] for teacher, cuts in _OURS_CUTS.items()}  # one of each
CURVES = ("batch_norm", "fskd", "least_squares", "fine_tune", "distill_labels", "mir")
_PAPER_IMAGES = (50, 100, 500, 1000)  # Source: MiR, arXiv 2201.02620
_PAPER_KEEPS = (0.7, 0.5, 0.3)

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "embedded", "the table: every method on the demo's photographs",
            "photographs", _TEACHERS, _WIDTHS, (50, 200), (200,), without=_NO_BLOCKS,
        ),
        Protocol(
            "embedded_mild", "the table at milder cuts, where MiR at 50 images loses 4 to 8 points",
            "photographs", tuple(_MILD), (), (50,), (200,), without=_NO_BLOCKS, extra_cuts=_MILD,
        ),
        Protocol(
            "embedded_long", "five times the steps: MiR and what it is measured against",
            "photographs", _TEACHERS, (), (50,), (1000,), methods=("fine_tune", "distill_labels", "mir"),
            extra_cuts=_LONG,
        ),
        Protocol(
            "embedded_steps", "accuracy against steps and seconds, 50 images; the table has 200 steps",
            "photographs", _TEACHERS, (), (50,), (50, 100, 400), SEEDS[:3],
            tuple(name for name in CURVES if METHODS[name].trains), "best", extra_cuts=_IN_BAND,
        ),
        Protocol(
            "embedded_images", "accuracy against images; the table has 50",
            "photographs", _TEACHERS, (), (20, 200, 500), (200,), SEEDS[:3], CURVES, "best", extra_cuts=_IN_BAND,
        ),
        Protocol(
            "embedded_transformer", "a vision transformer: MiR by the paper's recipe and with AdamW",
            "photographs", ("demo:vit_tiny",), _WIDTHS[:1], (50,), (200, 1000, 2000),
            methods=("none", "mir", FOR_TRANSFORMERS),
        ),
        Protocol(
            "embedded_default", "this project's recipe against the paper's, 50 images, at equal steps",
            "photographs", tuple(_OURS_CUTS), (), (50,), (400,),
            methods=("mir", "mir_extra", NO_EXTRA, OWN, WITH_PICTURES), extra_cuts=_OURS_CUT,
        ),
        Protocol(
            "embedded_default_long", "the paper's recipe in its own 2,000 steps",
            "photographs", tuple(_OURS_CUTS), (), (50,), (2000,), methods=("mir",), extra_cuts=_OURS_CUT,
        ),
        Protocol(
            "embedded_heavy", "this project's recipe and the others' at heavy cuts, 50 images",
            "photographs", tuple(_HEAVY), (), (50,), (400,),
            methods=("mir", "distill", *OTHERS_WITH_EXTRA, NO_EXTRA, OWN, WITH_PICTURES), options="best",
            extra_cuts=_HEAVY,
        ),
        Protocol(
            "embedded_default_images", "this project's recipe with and without drawn pictures: 20, 200, 1,000 images",
            "photographs", tuple(_OURS_CUTS), (), (20, 200, 1000), (400,), SEEDS[:2], (NO_EXTRA, OWN),
            extra_cuts=_OURS_CUT,
        ),
        Protocol(
            "embedded_default_short", "this project's recipe in few steps: 0 is the closed form alone",
            "photographs", tuple(_OURS_CUTS), (), (50,), (0, 100), SEEDS[:2], (OWN,), extra_cuts=_OURS_CUT,
        ),
        Protocol(
            "embedded_ablation", "this project's recipe without each of its parts",
            "photographs", ("demo:resnet14", "demo:vit_tiny"), (), (50,), (400,), SEEDS[:1], (OWN, SAME_CUT),
            "ablation", extra_cuts=_OURS_CUT,
        ),
        Protocol(
            "embedded_quick", "the closed form alone at half the MACs and at half the widths",
            "photographs", tuple(_OURS_CUTS), ({"keep": 0.5}, {"keep_width": 0.5}), (50,), (0,), SEEDS[:2],
            (SAME_CUT, OWN),
        ),
        Protocol(
            "imagenet_resnet34", "the paper's: ResNet-34, mid channels, first and last block of each stage spared",
            "imagenet", ("torchvision:resnet34",),
            tuple({"keep_width": k, "scheme": "mid", "spare_ends": True} for k in _PAPER_KEEPS), _PAPER_IMAGES, (2000,),
        ),
        Protocol(
            "imagenet_resnet50", "the same on ResNet-50",
            "imagenet", ("torchvision:resnet50",),
            tuple({"keep_width": k, "scheme": "mid", "spare_ends": True} for k in _PAPER_KEEPS), _PAPER_IMAGES, (2000,),
        ),
        Protocol(
            "imagenet_mobilenetv2", "the paper's: MobileNetV2, expansions of the blocks with a residual",
            "imagenet", ("torchvision:mobilenet_v2",),
            tuple({"keep_width": k, "scheme": "mid"} for k in _PAPER_KEEPS), _PAPER_IMAGES, (2000,),
        ),
        *(
            Protocol(
                name, f"the same on {name.upper()}; name the teacher with --teacher",
                name, (), _WIDTHS, _PAPER_IMAGES, (2000,),
            )
            for name in ("cifar10", "cifar100")
        ),
    )
}  # fmt: skip


def tuning(protocol: Protocol) -> Protocol:
    """The whole grid of every method that has one, on a seed that the protocol's table does not use."""
    tunable = tuple(name for name in protocol.methods if METHODS[name].grid and name not in OURS)
    return replace(
        protocol, name=f"{protocol.name}_tuning", about=f"grids of {protocol.name}", seeds=TUNING_SEEDS,
        methods=tunable, options="grid",
    )  # fmt: skip


# With 200 images at one cut a teacher; at the other one it takes the options of 50 images.
_AT_200 = {"demo:resnet14": _WIDTHS[:1], "demo:mobilenetv2_tiny": _WIDTHS[1:], "demo:vgg7": _WIDTHS[:1]}
_GRIDS = (
    tuning(replace(PROTOCOLS["embedded"], images=(50,), extra_cuts=_MILD)),
    tuning(replace(PROTOCOLS["embedded"], name="embedded_200", cuts=(), images=(200,), extra_cuts=_AT_200)),
    tuning(replace(PROTOCOLS["embedded_images"], images=(200,), extra_cuts=_MILD)),
    tuning(PROTOCOLS["embedded_long"]),
    tuning(replace(PROTOCOLS["embedded_transformer"], steps=(500,))),
    *(tuning(protocol) for protocol in PROTOCOLS.values() if protocol.task != "photographs"),
)
PROTOCOLS |= {grid.name: grid for grid in _GRIDS}


def chosen(cells: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    """The cells that fit every FIELD=VALUE[,VALUE] of `only`; a field is one of a cell's or of its cut or options.

    Raises: ValueError for a field or value that no cell has.
    """
    for text in only:
        name, _, values = text.partition("=")
        wanted = set(values.split(","))
        flat = [{**cell.options, **cell.cut, **asdict(cell)} for cell in cells]
        if not any(name in f for f in flat):
            known = sorted({k for f in flat for k in f} - {"cut", "options"})
            raise ValueError(
                f"--only {text!r}: no cell has a {name!r}; expected one of {', '.join(known)}, then =VALUE"
            )
        strange = wanted - {str(f.get(name)) for f in flat}
        if strange:
            raise ValueError(f"--only {text!r}: no cell has {name}={sorted(strange)[0]}")
        cells = [cell for cell, f in zip(cells, flat, strict=True) if str(f.get(name)) in wanted]
    return list(cells)

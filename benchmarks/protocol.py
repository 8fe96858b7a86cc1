"""What is compared, as plain data: cells, and the protocols that list them."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.methods import METHODS

TUNED = Path(__file__).parent / "tuned.json"
SEEDS = (2021, 2022, 2023, 2024, 2025)  # Source: MiR, arXiv 2201.02620
TUNING_SEEDS = (1001,)  # never in a table


@dataclass(frozen=True)
class Cell:
    """One run. task: key of `tasks.TASKS`. teacher: as `understudy.load_teacher` reads it. cut: options of `make_plan`.

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
    """Teachers x cuts x images x steps x seeds x methods. options: "published", "best" (tuned), "tuned" (both), "grid".
    without: (teacher, method) pairs that have no meaning, each with the reason."""

    name: str
    about: str
    task: str
    teachers: tuple[str, ...]
    cuts: tuple[dict[str, Any], ...]
    images: tuple[int, ...]
    steps: tuple[int, ...]
    seeds: tuple[int, ...] = SEEDS
    methods: tuple[str, ...] = tuple(METHODS)
    options: str = "tuned"
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
            for rank, options in enumerate(self._options(name, teacher, images, tuned))
        ]
        return list({cell.key: cell for _, cell in sorted(ranked, key=lambda r: r[0])}.values())

    def _options(self, name: str, teacher: str, images: int, tuned: dict[str, Any]) -> Iterator[dict[str, Any]]:
        method = METHODS[name]
        if self.options == "grid":
            yield from method.grid
            return
        known = tuned.get(name, {}).get(teacher, {})
        # For a number of images that was not tuned, what was best for the nearest one.
        best = known.get(str(min(map(int, known), key=lambda n: abs(n - images), default=images)))
        if self.options == "published" or best is None:
            yield method.published
        elif self.options == "best":
            yield best
        else:
            yield from (best, method.published)


def read_tuned() -> dict[str, Any]:
    """method -> teacher -> number of images -> options; written by `python -m benchmarks tune`."""
    return json.loads(TUNED.read_text(encoding="utf-8")) if TUNED.exists() else {}


_TEACHERS = ("demo:resnet14", "demo:mobilenetv2_tiny", "demo:vgg7")
_NO_BLOCKS = {("demo:vgg7", "practise"): "a plain network has no residual block to drop"}
_WIDTHS: tuple[dict[str, Any], ...] = ({"keep_width": 0.5}, {"keep_width": 0.3})
# Every width of a plain network is cut, not only those inside blocks: 0.5 leaves a quarter of its MACs.
_MILD: dict[str, tuple[dict[str, Any], ...]] = {"demo:vgg7": ({"keep_width": 0.8},)}
# The cut of each family at which MiR loses least beyond 2 points, so that what is tuned is there to be seen.
_TUNED_AT: dict[str, tuple[dict[str, Any], ...]] = {
    "demo:resnet14": ({"keep_width": 0.5},), "demo:mobilenetv2_tiny": ({"keep_width": 0.3},), **_MILD
}  # fmt: skip
_TUNABLE = tuple(name for name, method in METHODS.items() if method.grid)
CURVES = ("batch_norm", "fskd", "least_squares", "fine_tune", "distill_labels", "mir")
_PAPER_IMAGES = (50, 100, 500, 1000)  # Source: MiR, arXiv 2201.02620
_PAPER_METHODS = tuple(METHODS)

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "embedded", "the table: every method on the demo's photographs",
            "photographs", _TEACHERS, _WIDTHS, (50, 200), (200,), options="best", without=_NO_BLOCKS, extra_cuts=_MILD,
        ),
        Protocol(
            "embedded_tuning", "every option of the grids, on a seed that no table uses",
            "photographs", _TEACHERS, (), (50, 200), (200,), TUNING_SEEDS, _TUNABLE, "grid", extra_cuts=_TUNED_AT,
        ),
        Protocol(
            "embedded_steps", "accuracy against steps and seconds, 50 images; the table has 200 steps",
            "photographs", _TEACHERS, (), (50,), (50, 100, 400), SEEDS[:3],
            tuple(name for name in CURVES if METHODS[name].trains), "best", extra_cuts=_TUNED_AT,
        ),
        Protocol(
            "embedded_images", "accuracy against images; the table has 50 and 200",
            "photographs", _TEACHERS, (), (20, 500), (200,), SEEDS[:3], CURVES, "best", extra_cuts=_TUNED_AT,
        ),
        Protocol(
            "imagenet_resnet34", "the paper's: ResNet-34, mid channels, first and last block of each stage spared",
            "imagenet", ("torchvision:resnet34",),
            tuple({"keep_width": k, "scheme": "mid", "spare_ends": True} for k in (0.7, 0.5, 0.3)),
            _PAPER_IMAGES, (2000,), methods=_PAPER_METHODS,
        ),
        Protocol(
            "imagenet_resnet50", "the paper's protocol on ResNet-50, mid channels",
            "imagenet", ("torchvision:resnet50",),
            tuple({"keep_width": k, "scheme": "mid", "spare_ends": True} for k in (0.7, 0.5, 0.3)),
            _PAPER_IMAGES, (2000,), methods=_PAPER_METHODS,
        ),
        Protocol(
            "imagenet_mobilenetv2", "the paper's: MobileNetV2, expansions of the blocks with a residual",
            "imagenet", ("torchvision:mobilenet_v2",),
            tuple({"keep_width": k, "scheme": "mid"} for k in (0.7, 0.5, 0.3)),
            _PAPER_IMAGES, (2000,), methods=_PAPER_METHODS,
        ),
        *(
            Protocol(
                name, f"the same on {name.upper()}; name the teacher with --teacher",
                name, (), tuple({"keep_width": k} for k in (0.5, 0.3)), _PAPER_IMAGES, (2000,), methods=_PAPER_METHODS,
            )
            for name in ("cifar10", "cifar100")
        ),
    )
}  # fmt: skip


def chosen(cells: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    """The cells that fit every FIELD=VALUE[,VALUE] of `only`; a field is one of a cell's or of its cut or options.

    Raises: ValueError for a field that no cell has.
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
        cells = [cell for cell, f in zip(cells, flat, strict=True) if str(f.get(name)) in wanted]
    return list(cells)

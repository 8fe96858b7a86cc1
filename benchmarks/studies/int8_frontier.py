"""INT8 alone, a cut alone, and both: agreement against measured latency, on the embedded task.

    python -m benchmarks.studies.int8_frontier            # goes on where it was stopped; about two minutes a line
    python -m benchmarks.studies.int8_frontier --real     # networks of ImageNet; a quarter of an hour a line
    python -m benchmarks.studies.int8_frontier --whole    # the same, uncut and mimicked in INT8; as long
    python -m benchmarks.studies.int8_frontier --choices  # what the planner takes for a latency; minutes a line
    python -m benchmarks.studies.int8_frontier --page     # docs/int8.md and its picture, from the lines

50 images that train and give INT8 its ranges, 5,000 test patches of which nothing was learned. For each teacher and
seed the teacher and a student of KEEP of its MACs, each in float32, rounded to INT8, and mimicked in INT8; all are
timed in turn, on one thread, on ONNX Runtime and on OpenVINO. Further, of which the agreement alone is taken: weights
of 7 bits, which processors without VNNI need, and ranges from the smallest value to the largest, which are ONNX
Runtime's own. A processor without VNNI has lines and a part of the page of its own, with weights of 7 bits alone.

Of the networks of ImageNet: 1,000 pictures in place of patches (`python -m benchmarks.real fetch`), at SIDE pixels, a
student of KEEP_REAL and STEPS_REAL steps, as on docs/real.md. What the teacher gains by mimicking in INT8 has lines of
its own (--whole).
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from benchmarks.json_lines import add, read
from benchmarks.real.task import image_sets, teacher_of
from mimicut import demo
from mimicut.anatomy.find_seam import find_seam
from mimicut.base.environment import platform_kind
from mimicut.inputs.extra_images import GENERATED, read_extra
from mimicut.inputs.image_set import ImageSet, read_images
from mimicut.inputs.teacher import Teacher
from mimicut.planning.trials import SHORT
from mimicut.proof.int8_table import int8_table
from mimicut.recovery.batches import WithExtra
from mimicut.recovery.config import preset
from mimicut.results.teachers import load_teacher
from mimicut.runtime import int8
from mimicut.runtime.divisors import width_divisor
from mimicut.runtime.export import FILES, Exported, export
from mimicut.runtime.int8_mimic import LEAST_GAIN, STEPS, mimic_int8
from mimicut.runtime.latency import Setting
from mimicut.runtime.machine import runtime_version
from mimicut.surgery.seam import Seam
from mimicut.workflow.compress import compress

export_module: Any = import_module("mimicut.runtime.export")
OUT = Path(__file__).parents[1] / "results" / "int8_frontier.jsonl"
DOCS = Path(__file__).parents[2] / "docs"
TEACHERS, SEEDS = ("mobilenetv2_tiny", "resnet14", "vgg7", "vit_tiny"), (2021, 2022, 2023, 2024, 2025)
SETTINGS = {"onnxruntime, batch 1": ("onnxruntime", 1), "onnxruntime, batch 16": ("onnxruntime", 16),
            "openvino, batch 16": ("openvino", 16)}  # fmt: skip
IMAGES, KEEP = 50, 0.6
PATCHES, PICTURES = 5000, 1000  # of the demo, of ImageNet, to judge by
REAL, SIDE, KEEP_REAL, STEPS_REAL = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2"), 160, 0.7, 100
MOST_LOST = 0.3  # points of agreement that INT8 may cost a student
SHARES = (0.85, 0.7, 0.4)  # of the latency, for which the planner chooses
VERSIONS = {"torch": torch.__version__, **{name: runtime_version(name) for name in ("onnxruntime", "openvino")}}
ROUNDED, MIMICKED = "{}, INT8", "{}, mimicked in INT8"
CHOICES = (
    "What the planner takes for a share of the float32 teacher's latency on ONNX Runtime, batch 16 (`--choices`; one "
    "seed). Errors are those at the seam, of cuts after as many steps as the note says."
)
NAMES = {"torch": "torch", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
AT = "Each cell: latency in percent of the float32 teacher's, then agreement in percent; empty where nothing was run."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", action="append", choices=(*TEACHERS, *REAL))
    parser.add_argument("--seed", action="append", type=int)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--choices", action="store_true")
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    import_module("mimicut.proof.int8_table").MOST = PATCHES  # of so many small images all fit the memory
    if options.page:
        lines = read(options.out)
        plot([x for x in lines if "seed" in x and _bits(x) == 8], DOCS / "figures" / "int8.png")
        (DOCS / "int8.md").write_text(text(lines), encoding="utf-8")
        return
    if options.choices:
        for name in options.teacher or TEACHERS:
            for share in SHARES:
                if (name, share) not in {(x["teacher"], x.get("share")) for x in _of_this_kind(read(options.out))}:
                    add(options.out, choice(name, share))
        return
    real, make = options.real or options.whole, uncut if options.whole else one
    if unfit := [name for name in options.teacher or () if (name in REAL) != real]:
        parser.error(f"--teacher {' '.join(unfit)}: expected one of {', '.join(REAL if real else TEACHERS)}")
    for seed in options.seed or (SEEDS[:1] if real else SEEDS):
        for name in options.teacher or (REAL if real else TEACHERS):
            key = name, seed, options.whole
            done = _of_this_kind(read(options.out))
            if key not in {(x["teacher"], x.get("seed"), x.get("whole", False)) for x in done}:
                add(options.out, make(name, seed))


def _bits(line: dict[str, Any]) -> int:
    return line.get("weight_bits", 8)  # which the first lines of --choices do not say


def _of_this_kind(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of processors that take weights of as many bits as this one."""
    return [line for line in lines if _bits(line) == int8.weight_bits()]


def one(name: str, seed: int) -> dict[str, Any]:
    begun, real = time.perf_counter(), name in REAL
    teacher = teacher_of(name, SIDE) if real else load_teacher(f"demo:{name}")
    if real:
        few, proof = image_sets(teacher, IMAGES, seed, PICTURES)
    else:
        few = read_images(demo.few_images(IMAGES, seed), teacher.preprocessing)
        proof = read_images(demo.test_set()[0][:PATCHES], teacher.preprocessing)
    steps = {"steps": STEPS_REAL} if real else {}
    config = preset("default", views=teacher.views, seed=seed, **steps)
    divisor = width_divisor(Setting("onnxruntime"))  # as for a latency
    made = compress(
        teacher, few, keep=KEEP_REAL if real else KEEP, divisor=divisor, held_out=proof, config=config
    )  # fmt: skip
    own = int8.weight_bits()
    ways = [("teacher", teacher.model, own), ("student", made.model, own)]
    if own == 8 and not real:
        ways.append(("student", made.model, 7))
    with tempfile.TemporaryDirectory() as scratch:
        files, learned = dict[tuple[str, int], list[Exported]](), {}
        for who, model, bits in ways:
            with weights_of(bits):
                *files[who, bits], done = in_int8(
                    teacher, model, made.plan.seam, few, Path(scratch, who, str(bits)), seed,
                    mimics=not (real and who == "teacher"),
                )  # fmt: skip
            learned[f"{who}, {bits} bits"] = done
        known = teacher, made.plan.seam, proof, few
        both = {who: files[who, own] for who in ("teacher", "student")}
        rows = {place: table(both, *known, *setting) for place, setting in SETTINGS.items()}
        seven = table({"student": files["student", 7]}, *known, "onnxruntime", 16) if len(ways) == 3 else []
        wide = {}
        with widest_ranges():
            for who, model in (("teacher", teacher.model), ("student", made.model)) if own == 8 else ():
                rounded, _ = in_int8(
                    teacher, model, made.plan.seam, few, Path(scratch, who, "wide"), seed, mimics=False
                )
                wide[who] = [rounded]
        widest = table(wide, *known, "onnxruntime", 16) if wide else []
    return {
        "teacher": name, "seed": seed, "least_gain": LEAST_GAIN, "rows": rows, "mimic": learned,
        "weight_bits": own,
        "seven_bits": {row["name"]: row["top1_agreement"] for row in seven},
        "widest_ranges": {row["name"]: row["top1_agreement"] for row in widest},
        "seconds": round(time.perf_counter() - begun, 1), "platform": platform_kind(1, "cpu"),
        "versions": VERSIONS,
    }  # fmt: skip


def uncut(name: str, seed: int) -> dict[str, Any]:
    """A network of ImageNet as it is: rounded, and mimicked in INT8."""
    begun, teacher = time.perf_counter(), teacher_of(name, SIDE)
    few, proof = image_sets(teacher, IMAGES, seed, PICTURES)
    seam = find_seam(teacher.model, few.batch(range(2)))
    with tempfile.TemporaryDirectory() as scratch:
        *files, done = in_int8(teacher, teacher.model, seam, few, Path(scratch), seed, mimics=True)
        known = {"teacher": files}, teacher, seam, proof, few
        rows = {place: table(*known, *setting) for place, setting in SETTINGS.items()}
    return {
        "teacher": name, "seed": seed, "whole": True, "least_gain": LEAST_GAIN, "rows": rows, "mimic": done,
        "weight_bits": int8.weight_bits(), "seconds": round(time.perf_counter() - begun, 1),
        "platform": platform_kind(1, "cpu"), "versions": VERSIONS,
    }  # fmt: skip


def choice(name: str, share: float) -> dict[str, Any]:
    """What `compress(latency=share, int8=True)` takes, and what it measured of each way. The student takes only as many
    steps as those by which the planner judges cuts."""
    begun, teacher = time.perf_counter(), load_teacher(f"demo:{name}")
    few = read_images(demo.few_images(IMAGES, SEEDS[0]), teacher.preprocessing)
    with tempfile.TemporaryDirectory() as scratch:
        plan = compress(
            teacher, few, latency=share, runtime="onnxruntime", threads=1, batch=16, int8=True,
            folder=Path(scratch, "small"), config=preset("default", steps=SHORT, views=teacher.views, seed=SEEDS[0]),
        ).plan  # fmt: skip
    assert plan.latency is not None
    return {
        "teacher": name, "share": share, "precision": plan.latency.setting["precision"],
        "weight_bits": int8.weight_bits(), "cut": bool(plan.slices or plan.drop), "note": plan.notes[-1],
        "measured": plan.latency.measured_share[0],
        "seconds": round(time.perf_counter() - begun, 1), "platform": platform_kind(1, "cpu"), "versions": VERSIONS,
    }  # fmt: skip


@contextmanager
def weights_of(bits: int) -> Iterator[None]:
    """Quantise as on a processor of that kind."""
    own = int8.weight_bits
    try:
        int8.weight_bits = lambda: bits
        yield
    finally:
        int8.weight_bits = own


@contextmanager
def widest_ranges() -> Iterator[None]:
    """Quantise as ONNX Runtime does where one asks it for nothing else."""
    own = export_module.quantise
    try:
        export_module.quantise = partial(own, tries=False)
        yield
    finally:
        export_module.quantise = own


def in_int8(
    teacher: Teacher, model: torch.nn.Module, seam: Seam, few: ImageSet, folder: Path, seed: int, *, mimics: bool
) -> tuple[Any, ...]:
    """A network rounded to INT8, one mimicked in INT8 as `compress(int8=True)` does it if it `mimics`, and what it
    did."""
    example, pairs = few.batch(range(2)), [few.batch([i, i + 1]) for i in range(0, IMAGES, 2)]
    rounded = export(model, example, folder / "rounded", formats=("onnx", "int8"), calibrate=pairs)
    if not mimics:
        return rounded, None
    mimicked = export(model, example, folder / "mimicked", formats=("onnx", "int8"), calibrate=pairs)
    config = preset("default", steps=STEPS, views=teacher.views, seed=seed)
    extra = read_extra(GENERATED, few, teacher.views, seed=seed, memory_bytes=2**30)
    assert extra is not None
    done = mimic_int8(folder / "mimicked" / FILES["int8"], model, example, seam, WithExtra(few, extra), config)
    return rounded, mimicked, done.to_json()


def table(
    files: dict[str, list[Exported]],
    teacher: Teacher,
    seam: Seam,
    proof: ImageSet,
    few: ImageSet,
    runtime: str,
    batch: int,
) -> list[dict[str, Any]]:
    """Rows of each network in float32, rounded, and mimicked."""
    networks = dict[str, Exported]()
    for who, of in files.items():
        networks |= dict(zip((who, f"{who} again"), of, strict=False))
    found = int8_table(networks, teacher.model, proof, few.batch(range(2)), Setting(runtime, 1, batch), seam)["rows"]
    names = {f"{who} again, INT8": MIMICKED.format(who) for who in files}
    return [{**row, "name": names.get(row["name"], row["name"])} for row in found if not row["name"].endswith(" again")]


def means(lines: list[dict[str, Any]], teacher: str, place: str) -> dict[str, tuple[float, float]]:
    """Network -> median share of the float32 teacher's latency, and mean agreement, both in percent. Of a teacher that
    has been mimicked in a line of its own (--whole), its rows are those of that line."""
    rows = dict[str, list[dict[str, Any]]]()
    own = [line for line in lines if line["teacher"] == teacher]
    apart = any(line.get("whole") for line in own)
    for line in own:
        for row in line["rows"][place]:
            if not apart or line.get("whole", False) == row["name"].startswith("teacher"):
                rows.setdefault(row["name"], []).append(row)
    return {
        name: (100 * median(r["share"] for r in found), 100 * mean(r["top1_agreement"] for r in found))
        for name, found in rows.items()
    }


def text(lines: list[dict[str, Any]]) -> str:
    """docs/int8.md"""
    without_vnni = [x for x in lines if _bits(x) == 7]
    lines = [x for x in lines if _bits(x) == 8]
    chosen, lines = [x for x in lines if "share" in x], [x for x in lines if "seed" in x]
    small, real = ([x for x in lines if x["teacher"] in of] for of in (TEACHERS, REAL))
    seeds = sorted({line["seed"] for line in small})
    parts = [
        "# INT8, a cut, or both",
        "Made by `python -m benchmarks.studies.int8_frontier --page` from `benchmarks/results/int8_frontier.jsonl`; do "
        f"not edit by hand. {IMAGES} unlabelled images, {PATCHES:,} test patches, {KEEP:.0%} of the MACs, seeds "
        f"{', '.join(map(str, seeds))}; one thread; {_machines(lines)}; weights of 8 bits.",
        "Agreement with the float32 teacher, mean over seeds; latency as a share of the float32 teacher's, median. "
        f"*Mimicked* took {STEPS} steps in INT8 after it was rounded. A file has the same operators before and after "
        "that: where its latency differs, so much do such measurements, which were made beside another job.",
        "![Agreement against latency](figures/int8.png)",
    ]
    if real:
        parts.insert(
            2,
            f"EfficientNet-Lite: ImageNet's 1,000 classes at {SIDE} pixels, {PICTURES:,} pictures, {KEEP_REAL:.0%} of "
            f"the MACs, {STEPS_REAL} steps, seed {', '.join(map(str, sorted({x['seed'] for x in real})))}, as on "
            "[Real networks](real.md).",
        )
    for place in SETTINGS:
        parts += [f"## {_place(place)}", AT, *_tables(lines, place)]
    parts += [
        "## What rounding costs, and what mimicking takes back",
        "Agreement on ONNX Runtime in points, mean over seeds (least to most); weights of 8 bits. Asked for: in INT8, "
        f"mimicked, a student loses at most {MOST_LOST} in all, and mimicking takes some of what rounding costs back.",
        _changes(lines),
    ]
    names = _present(lines, TEACHERS)
    seven = ["| network | " + " | ".join(names) + " |", "|---|" + "--:|" * len(names)]
    for network in ("student", ROUNDED.format("student"), MIMICKED.format("student")):
        cells = [f"{100 * mean(x['seven_bits'][network] for x in small if x['teacher'] == name):.1f}" for name in names]
        seven.append(f"| {network} | " + " | ".join(cells) + " |")
    parts += [
        "## Weights of 7 bits",
        "Processors without VNNI add products in 16 bits, which weights of 8 bits overflow. Agreement in percent, on "
        "the same processor as above:",
        "\n".join(seven),
    ]
    parts += [
        "## Ranges",
        "Rounded, weights of 8 bits: ranges as mimicut takes them (the largest values are left out where the outputs "
        "are nearer so), and ONNX Runtime's own, from the smallest value to the largest. Agreement in percent:",
        _ranges(lines),
    ]
    if chosen:
        parts += ["## What the planner takes", CHOICES, _choices(chosen)]
    if without_vnni:
        parts += _without_vnni(without_vnni)
    return "\n\n".join(parts) + "\n"


def _without_vnni(lines: list[dict[str, Any]]) -> list[str]:
    """The part of the page about processors without VNNI."""
    chosen, lines = [x for x in lines if "share" in x], [x for x in lines if "seed" in x]
    seeds = sorted({line["seed"] for line in lines})
    parts = ["## A processor without VNNI", f"The same without VNNI: {_machines(lines or chosen)}; weights of 7 bits."]
    if lines:
        parts[1] += f" Seed {', '.join(map(str, seeds))}."
        for place in SETTINGS:
            parts += [f"### {_place(place)}, without VNNI", AT, *_tables(lines, place)]
        parts += ["### What rounding costs without VNNI", _changes(lines)]
    if chosen:
        parts += ["### What the planner takes without VNNI", CHOICES, _choices(chosen)]
    return parts


def _machines(lines: list[dict[str, Any]]) -> str:
    return "; ".join(sorted({
        ", ".join([x["platform"]["processor"], *(f"{NAMES[name]} {x['versions'][name]}" for name in NAMES)])
        for x in lines
    }))  # fmt: skip


def _place(place: str) -> str:
    runtime, batch = SETTINGS[place]
    return f"{NAMES[runtime]}, batch {batch}"


def _tables(lines: list[dict[str, Any]], place: str) -> list[str]:
    """One of the demo's networks, one of those of ImageNet."""
    return [_rows(lines, names, place) for of in (TEACHERS, REAL) if (names := _present(lines, of))]


def _present(lines: list[dict[str, Any]], names: tuple[str, ...]) -> tuple[str, ...]:
    """The teachers of these names that have lines."""
    return tuple(name for name in names if any(line["teacher"] == name for line in lines))


def _choices(lines: list[dict[str, Any]]) -> str:
    rows = ["| teacher | latency to meet | taken | measured | note |", "|---|--:|---|--:|---|"]
    lines = sorted(lines, key=lambda line: (TEACHERS.index(line["teacher"]), -line["share"]))
    rows += [f"| {x['teacher']} | {x['share']:.0%} | {_taken(x)} | {x['measured']:.0%} | {x['note']} |" for x in lines]
    return "\n".join(rows)


def _rows(lines: list[dict[str, Any]], teachers: tuple[str, ...], place: str) -> str:
    """A table of these teachers' latencies and agreements."""
    found = {name: means(lines, name, place) for name in teachers}
    rows = ["| network | " + " | ".join(teachers) + " |", "|---|" + "--:|" * len(teachers)]
    networks = dict.fromkeys(network for of in found.values() for network in of)
    for network in sorted(networks, key=lambda name: name.startswith("student")):
        cells = ["{:.0f} % at {:.1f}".format(*of[network]) if network in of else "" for of in found.values()]
        rows.append(f"| {network} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _changes(lines: list[dict[str, Any]]) -> str:
    """A table of differences in agreement between float32 and INT8, and between INT8 mimicked and rounded."""
    rows = [f"| network | rounding | mimicking in INT8 | together | at most {MOST_LOST} lost | takes some back |"]
    rows.append("|---|--:|--:|--:|---|---|")
    for name in (*TEACHERS, *REAL):
        for who in ("teacher", "student"):
            found = []
            for line in (x for x in lines if x["teacher"] == name):
                of = {row["name"]: 100 * row["top1_agreement"] for row in line["rows"]["onnxruntime, batch 16"]}
                if MIMICKED.format(who) in of:
                    plain, rounded, mimicked = of[who], of[ROUNDED.format(who)], of[MIMICKED.format(who)]
                    found.append((rounded - plain, mimicked - rounded, mimicked - plain))
            if found:
                cells = [f"{mean(of):+.2f} ({min(of):+.1f} to {max(of):+.1f})" for of in zip(*found, strict=True)]
                _, gained, changed = (mean(of) for of in zip(*found, strict=True))
                verdicts = ["met" if met else "missed" for met in (changed >= -MOST_LOST, gained > 0)]
                cells += verdicts if who == "student" else ["", ""]
                rows.append(f"| {name}{', student' * (who == 'student')} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _ranges(lines: list[dict[str, Any]]) -> str:
    lines = [line for line in lines if "widest_ranges" in line]
    teachers = _present(lines, (*TEACHERS, *REAL))
    rows = ["| network, in INT8 | " + " | ".join(teachers) + " |", "|---|" + "--:|" * len(teachers)]
    place = "onnxruntime, batch 16"
    for who in ("teacher", "student"):
        network = ROUNDED.format(who)
        own, widest = [], []
        for name in teachers:
            of = [line for line in lines if line["teacher"] == name]
            own.append(f"{means(of, name, place)[network][1]:.2f}")
            widest.append(f"{100 * mean(line['widest_ranges'][network] for line in of):.2f}")
        rows += [f"| {who}, ranges of mimicut | {' | '.join(own)} |", f"| {who}, widest | {' | '.join(widest)} |"]
    return "\n".join(rows)


def _taken(line: dict[str, Any]) -> str:
    if line["precision"] == "float32":
        return "a cut alone"
    return "a cut and INT8" if line["cut"] else "INT8 alone"


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    place = "onnxruntime, batch 16"
    shown = _present(lines, (*TEACHERS, *REAL))
    height = -(-len(shown) // 4)
    figure, axes = pyplot.subplots(height, 4, figsize=(13, 3.4 * height), layout="constrained", squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, shown, strict=False):
        for network, (share, agreement) in means(lines, name, place).items():
            full = "mimicked" in network or "INT8" not in network
            axis.plot(
                share, agreement, "s" if "teacher" in network else "o", fillstyle="full" if full else "none",
                color="C0" if "INT8" in network else "0.5", linestyle="", label=network,
            )  # fmt: skip
        axis.set_title(name, fontsize=10)
        axis.set_xlim(left=0)
        axis.margins(x=0.1, y=0.1)
        axis.set_xlabel("latency, % (ONNX Runtime, batch 16)", fontsize=8)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8, frameon=False
    )
    axes[0, 0].set_ylabel("agreement with the teacher, %", fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()

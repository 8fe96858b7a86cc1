"""run.toml: the options that make a result again, with `mimicut compress --config` or `mimicut recover --config`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch

from mimicut.base.ranks import count_here, current
from mimicut.inputs.build_by_name import parse_spec
from mimicut.inputs.extra_images import GENERATED, NONE
from mimicut.inputs.image_set import ImageSet, ImageSource
from mimicut.inputs.teacher import Teacher
from mimicut.proof.output_figures import check_kinds
from mimicut.recovery.config import PRESETS, MimicConfig
from mimicut.workflow.request import Request

_FROM_PYTHON = "has no command-line option; give it in Python"


def run_file(
    teacher: Teacher,
    images: ImageSource | ImageSet,
    request: Request,
    plan_path: str | None = None,
    student: str | None = None,
) -> str:
    """Write the text of the file.

    Args:
        teacher: As it was loaded.
        images: As they were given; a path is written, anything else is named in a comment.
        request: The request of the run.
        plan_path: The file with the plan, for a request with a plan.
        student: The name of a student that another tool pruned; None if mimicut cut it.

    Returns:
        TOML, with a comment for each option that the command line cannot express.
    """
    options: dict[str, Any] = {}
    comments: list[str] = []
    _add_teacher(teacher, options, comments)
    if student is not None and parse_spec(student) is None:
        comments.append(f"the student ({student}) came as a module, which {_FROM_PYTHON}")
    elif student is not None:
        options["student"] = student
    _add_path("images", images, options, comments)
    options["out"] = request.folder and str(request.folder)
    if request.plan is not None:
        options["plan"] = plan_path
    _add_budget(request, options)
    _add_recipe(request.config, options, comments)
    _add_seed(request, options, comments)
    _add_images(request, options, comments)
    options |= {
        "seam": [str(point) for point in request.seam or ()],
        "max_seconds": request.max_seconds,
        "max_memory": request.max_memory and str(request.max_memory),
        "min_agreement": request.min_agreement,
        "max_error": request.max_error,
        "output": [kind if part is None else f"{part}={kind}" for part, kind in check_kinds(request.output)],
        "alternatives": request.with_alternatives or None,
        "to": ",".join(name for name in request.export_to if not (request.int8 and name == "int8")),
        "int8": request.int8 or None,
        "crossfit": request.crossfit,
        "threads": torch.get_num_threads(),
    }
    ranks = current()
    if ranks is not None:  # each process has its own device, and its share of the threads that are given
        kind = str(request.config.device).partition(":")[0]
        threads = torch.get_num_threads() * count_here(ranks.count)
        options |= {"devices": ranks.count, "device": kind, "threads": threads}
    if request.example is not None:
        comments.append(f"example {_FROM_PYTHON}")
    if request.budget is not None and request.budget.latency is not None:
        own_threads = request.budget.latency.threads
        if own_threads not in (None, torch.get_num_threads()):
            comments.append(f"a number of threads for the latency alone ({own_threads}) {_FROM_PYTHON}")
    head = (
        "# The options that this result was made with; paths are as they were given. To make it again:\n"
        f"# mimicut {'compress' if student is None else 'recover'} --config run.toml --out ANOTHER_FOLDER"
    )
    if comments:
        head += "\n# What the comments at the end name has to be given besides."
    return "\n".join([head, *_lines(options), *(f"# {comment}" for comment in comments)]) + "\n"


def _lines(options: Mapping[str, Any]) -> list[str]:
    return [f"{name} = {_toml(value)}" for name, value in options.items() if value not in (None, "", [], ())]


def _toml(value: Any) -> str:
    """
    >>> _toml(["a", True, 0.5])
    '["a", true, 0.5]'
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, Real):
        return repr(int(value) if isinstance(value, Integral) else float(value))
    return json.dumps(str(value), ensure_ascii=False)


def _add_path(name: str, source: Any, options: dict[str, Any], comments: list[str]) -> None:
    if isinstance(source, (str, Path)):
        options[name] = str(source)
    elif source is not None:
        comments.append(f"{name} came as a {type(source).__name__}, which {_FROM_PYTHON}")


def _add_teacher(teacher: Teacher, options: dict[str, Any], comments: list[str]) -> None:
    given = teacher.given
    if given is None:
        comments.append(f"the teacher came as a module, which {_FROM_PYTHON}")
        return
    changes = given.preprocessing
    _add_path("class_names", given.class_names, options, comments)
    by_code = isinstance(given.build_teacher, str) and given.weights is not None  # a result, named by its code
    options |= {
        "teacher": given.build_teacher if by_code else teacher.spec,
        "weights": given.weights,
        "pretrained": None if given.pretrained else False,
        "num_classes": given.num_classes,
        "part": given.part,
        "input_size": _joined(changes.input_size, "x"),
        "mean": _joined(changes.mean, ","),
        "std": _joined(changes.std, ","),
        "resize": None if changes.resize is None else str(changes.resize),
    }
    others = {
        "in_chans": given.in_chans, "model_kwargs": given.model_kwargs,
        "build_teacher": None if by_code else given.build_teacher,
        "interpolation": changes.interpolation,
    }  # fmt: skip
    comments += [f"{name} of the teacher {_FROM_PYTHON}" for name, value in others.items() if value]


def _joined(values: Sequence[float] | None, between: str) -> str | None:
    return None if values is None else between.join(map(str, values))


def _add_budget(request: Request, options: dict[str, Any]) -> None:
    budget = request.budget
    if budget is None:
        return
    names = ("params", "size_mb", "keep_width", "depth", "divisor")
    options |= {name: getattr(budget, name) for name in names}
    options["keep"] = None if budget.keep is None else [budget.keep]
    if budget.latency is not None:
        latency = budget.latency
        options |= {
            "latency": None if latency.share is None else [latency.share],
            "latency_ms": None if latency.ms is None else [latency.ms],
            "runtime": latency.runtime,
            "batch": latency.batch,
        }
    options |= {
        "scheme": None if budget.scheme == "auto" else budget.scheme,
        "spare_ends": budget.spare_ends or None,
        "drop": list(budget.drop),
        "pin": list(budget.pin),
        "exclude": list(budget.exclude),
        "min_channels": None if budget.min_channels == 1 else budget.min_channels,
        "importance": budget.score,
    }


def _add_recipe(config: MimicConfig, options: dict[str, Any], comments: list[str]) -> None:
    own = {name: getattr(config, name) for name in ("steps", "device", "precision", "layout", "views")}
    name = next((name for name, preset in PRESETS.items() if replace(preset, seed=config.seed, **own) == config), None)
    if name is None:
        comments.append(f"a recipe other than the presets {_FROM_PYTHON}; it is config.mimic in report.json")
    options |= {"preset": name, **own}


def _add_seed(request: Request, options: dict[str, Any], comments: list[str]) -> None:
    """The flag sets the seed of both recipe and budget; without it each has its own."""
    of_recipe, of_budget = request.config.seed, None if request.budget is None else request.budget.seed
    usual = PRESETS["default"].seed
    if of_budget in (None, of_recipe):
        options["seed"] = of_recipe
    elif (of_recipe, of_budget) != (usual, 0):
        comments.append(f"a seed of the budget ({of_budget}) other than the recipe's ({of_recipe}) {_FROM_PYTHON}")


def _add_images(request: Request, options: dict[str, Any], comments: list[str]) -> None:
    sources = request.images
    _add_path("held_out", sources.held_out, options, comments)
    options["held_out_share"] = None if sources.held_out is not None else sources.held_out_share
    extra = request.extra
    if isinstance(extra, Path) and str(extra) in (GENERATED, NONE):
        extra = f"./{extra}"  # a folder of that name, not the word
    _add_path("extra", extra, options, comments)
    _add_path("labelled", sources.labelled, options, comments)
    if sources.labels is not None or sources.split_seed:
        comments.append(f"labels or split_seed {_FROM_PYTHON}")

"""mimicut: a small network learns the role of a big one from a few unlabelled images.

Names are resolved when they are first used, so importing the package imports no torch.
"""

from importlib import import_module
from typing import Any

_PLACES = {
    "Anatomy": "anatomy.graph",
    "Latency": "surgery.budget",
    "MeasuredLatency": "runtime.latency",
    "ClosedFormOptions": "recovery.closed_form",
    "CutStudent": "recovery.cut_student",
    "Budget": "surgery.budget",
    "InputSource": "inputs.input_source",
    "MimicConfig": "recovery.config",
    "PRESETS": "recovery.config",
    "Plan": "surgery.plan",
    "Preprocessing": "inputs.preprocessing",
    "Report": "results.report",
    "Result": "workflow.compress",
    "SCORES": "planning.importance",
    "Seam": "surgery.seam",
    "SeamPoint": "surgery.seam",
    "Setting": "runtime.latency",
    "Teacher": "inputs.teacher",
    "MimicutError": "base.errors",
    "capturing": "surgery.seam",
    "check_cut": "proof.laws",
    "closed_form": "recovery.closed_form",
    "compress": "workflow.compress",
    "count": "anatomy.cost",
    "crossfit": "workflow.crossfit",
    "cut": "surgery.cut",
    "export": "runtime.export",
    "explain_export": "results.export_folder",
    "export_folder": "results.export_folder",
    "figures": "proof.figures",
    "find_seam": "anatomy.find_seam",
    "from_pretrained": "results.hub",
    "inspect": "workflow.inspection",
    "load": "results.load_result",
    "load_teacher": "results.teachers",
    "make_plan": "planning.planner",
    "measure": "runtime.latency",
    "mimic": "recovery.mimic",
    "own_teacher": "inputs.teacher",
    "preset": "recovery.config",
    "push_to_hub": "results.hub",
    "read_images": "inputs.image_set",
    "read_plan": "surgery.plan",
    "WithExtra": "recovery.batches",
    "draw_pictures": "inputs.generated_pictures",
    "read_extra": "inputs.extra_images",
    "channel_evidence": "planning.evidence",
    "recover_pruned": "workflow.recover_pruned",
    "recoverability": "planning.recoverability",
    "recover": "recovery.recover",
    "put_under_head": "surgery.head",
    "replan": "planning.planner",
    "save": "results.store",
    "split": "inputs.image_set",
    "trace": "anatomy.find_seam",
}

__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _PLACES:
        raise AttributeError(f"module 'mimicut' has no attribute {name!r}")
    value = getattr(import_module(f"mimicut.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_PLACES]


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # not above: it takes a tenth of a second

    try:
        return version("mimicut")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "0"

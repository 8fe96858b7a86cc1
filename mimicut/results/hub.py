"""Results on the Hugging Face hub: a repository is a result folder with a model card.

Everything goes through `huggingface_hub`, with its own token, cache and endpoint (HF_TOKEN, HF_HOME, HF_ENDPOINT).
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mimicut.base.errors import InputError, MimicutError, StoreError
from mimicut.results.files import BESIDE, PAGES, PLAN, REPORT, RUN, STORED, WEIGHTS, read_json
from mimicut.results.folder import existing_result
from mimicut.results.html_page import page
from mimicut.results.load_result import load
from mimicut.results.readme import readme
from mimicut.results.report import Report
from mimicut.results.store import read
from mimicut.surgery.plan import Plan

CONFIG = "config.json"
_EXPORTED = frozenset(BESIDE) - {*PAGES, RUN}
# Of the report: pictures, and names of files.
_PRIVATE: dict[str, Any] = {"disagreements": [], "feature_maps": [], "images_check": {}}
# What names an image file or a folder.
_NAMING = re.compile(
    r"\.(png|jpe?g|jpe|bmp|gif|tiff?|webp|ppm|pgm|avif|heic|jp2|npy|npz|dcm|nii(\.gz)?)\b|[/\\]", re.IGNORECASE
)
# Notes on images may list them by name, which may have no suffix.
_LISTING = re.compile(r"\bimage|file\(s\)")
# Kind of an output -> what the hub calls such models.
_TASKS = {
    "scores": "image-classification", "multilabel": "image-classification", "map": "image-segmentation",
    "boxes": "object-detection", "embedding": "image-feature-extraction",
}  # fmt: skip


def push_to_hub(
    folder: str | Path, repository: str, *, private: bool = False, message: str = "Upload a student of mimicut"
) -> str:
    """Publish a result: the model, its exported files, the report, a model card, a config.json with the main figures.

    Pictures stay at home, and names of their files with them: the report is published without the images that teacher
    and student answer differently, its notes without what names a file, and run.toml, which names folders, is left out.
    The plan goes along as it is, with the teacher as you named it. The folder itself is not changed. Exported files of
    an earlier result in that repository are removed from it.

    Args:
        folder: The result.
        repository: USER/NAME; it is made where it does not exist.
        private: Publish only where the repository is private; one that is made is.
        message: Of the commit.

    Returns:
        The repository's address.

    Raises:
        StoreError: The folder is not a whole result, or the hub refuses.
        InputError: The name is no USER/NAME.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    path = existing_result(folder)
    files = published(path, repository)
    with _hub(repository, f"publishing {path}"):
        api = HfApi(library_name="mimicut")
        address = api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.repo_info(repository).private:
            raise InputError(f"publishing {path}: {repository} is there already, and public; expected a private one")
        changes: list[Any] = [CommitOperationAdd(name, value) for name, value in files.items()]
        stale = (_EXPORTED & set(api.list_repo_files(repository))) - set(files)
        changes += [CommitOperationDelete(name) for name in sorted(stale)]
        api.create_commit(repository, changes, commit_message=message)
    return str(address)


def published(folder: Path, repository: str) -> dict[str, bytes | Path]:
    """Name of a file in the repository -> its content, or the file that it is."""
    plan, _, _ = read(folder)
    data = read_json(folder / REPORT)
    data |= {**_PRIVATE, "notes": [text for note in data.get("notes", ()) if (text := _unnamed(note))]}
    report = Report.from_json({key: value for key, value in data.items() if key != STORED})
    exported = {str(each["file"]) for each in report.exports.values()}
    names = {PLAN, WEIGHTS, "preprocessing.json", "model.bin", *exported, *(f"{name}.data" for name in exported)}
    shown = _with_short_spec(plan)
    texts = {
        REPORT: json.dumps(data, indent=1) + "\n",
        PAGES[0]: page(report, shown),
        PAGES[1]: card(report, shown, repository),
        CONFIG: json.dumps(_config(report, shown), indent=1) + "\n",
    }
    return {name: folder / name for name in sorted(names) if (folder / name).is_file()} | {
        name: text.encode() for name, text in texts.items()
    }


def _with_short_spec(plan: Plan) -> Plan:
    """The plan with a teacher in a file or folder named without the folders around it."""
    source = plan.teacher.get("source") or {}
    spec = str(source.get("spec") or "")
    kind = found[0] if (found := re.match(r"[a-z_]{2,}:", spec)) else ""  # "timm:"; of "net.py:build" none
    place = Path(spec.removeprefix(kind))
    if kind not in ("", "onnx:") and not place.is_absolute():
        return plan
    return replace(plan, teacher={**plan.teacher, "source": {**source, "spec": kind + place.name}})


def _unnamed(note: str) -> str:
    """A note without what names a file in it; empty where that is its beginning."""
    if not (_NAMING.search(note) or _LISTING.search(note)):
        return note
    begin = re.split(r": | \(", note)[0]
    return "" if _NAMING.search(begin) else begin


def from_pretrained(
    repository: str,
    build_teacher: str | Callable[[], nn.Module] | None = None,
    *,
    revision: str | None = None,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Load the model of a result that was published, equal to the one in its folder to the bit.

    No code of the repository is run, and only the three files that the model is made of are fetched.

    Args:
        repository: USER/NAME.
        build_teacher: As for `load`.
        revision: A branch, a tag or a commit; the newest by default.
        device: Where the model is put.

    Returns:
        The model in eval mode.

    Raises:
        StoreError: The hub has no such repository or cannot be reached, or it holds no whole result.
        PlanError, InputError: As `load`.
    """
    from huggingface_hub import snapshot_download

    with _hub(repository, f"fetching {repository}"):
        fetched = snapshot_download(
            repository, revision=revision, allow_patterns=[PLAN, WEIGHTS, REPORT], library_name="mimicut"
        )
    return load(fetched, build_teacher, device=device)


def card(report: Report, plan: Plan, repository: str) -> str:
    """The model card: what the hub reads, and the README of the folder, which loads from `repository`."""
    from huggingface_hub import ModelCardData

    spec = str((plan.teacher.get("source") or {}).get("spec") or "")
    kinds = {output["kind"] for output in report.outputs}
    name = spec.partition(":")[2]
    data = ModelCardData(
        library_name="mimicut",
        tags=["mimicut", "model-compression", "structured-pruning", "few-shot", "knowledge-distillation"],
        pipeline_tag=next((task for kind, task in _TASKS.items() if kind in kinds), None),
        base_model=name if spec.startswith("hf:") and name.count("/") == 1 else None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{readme(report, plan, repository=repository)}"


def _config(report: Report, plan: Plan) -> dict[str, Any]:
    source = plan.teacher.get("source") or {}
    prepared = source.get("preprocessing") or {}
    names = """macs_teacher macs_student params_teacher params_student top1_agreement top1_agreement_low
        top1_agreement_high images_few images_held_out""".split()
    return {
        "library_name": "mimicut",
        "architectures": [plan.teacher.get("class")],
        "teacher": source.get("spec"),
        "preprocessing": prepared,
        **({"id2label": report.class_names} if report.class_names else {}),
        "figures": {name: getattr(report, name) for name in names},
    }


@contextmanager
def _hub(repository: str, doing: str) -> Iterator[None]:
    """Turn what the hub's client raises into one sentence."""
    from huggingface_hub.errors import HFValidationError

    if repository.count("/") != 1 or not all(repository.split("/")):
        raise InputError(f"{doing}: found the name {repository!r}; expected USER/NAME")
    try:
        yield
    except MimicutError:
        raise
    except HFValidationError as error:
        raise InputError(f"{doing}: {error}") from error
    except Exception as error:  # the client's own kinds, and those of whatever it sends requests by
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise StoreError(
            f"{doing}: the hub, or its client on this machine, says: {first}; check the name, the connection, room on "
            "the disk, and that you are logged in (`hf auth login`, or HF_TOKEN)"
        ) from error

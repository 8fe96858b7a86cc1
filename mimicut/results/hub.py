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
from mimicut.inputs.file_names import ends_in_names, short_spec, without_names
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
# What names a file or a folder.
_NAMING = re.compile(
    r"\.(png|jpe?g|jpe|jfif|bmp|gif|tiff?|webp|ppm|pgm|avif|hei[cf]|jp2|npy|npz|dcm|nii(\.gz)?"
    r"|pth?|safetensors|onnx|ckpt|bin|pkl|zip)\b|[/\\]",
    re.IGNORECASE,
)
# Notes that list files and end in that list. Those of earlier releases have the names as they are (`file_names`).
_LISTING = re.compile(
    r"image\(s\) (skipped|equal in pixels)|file\(s\) in the folder ignored|near-duplicates of|images are blank"
    r"|undecided on|unlike anything|images are outliers"
)
# Other sentences with a name in them, as this release or earlier ones write them -> the same without it.
_WITHOUT: dict[str, str] = {
    r"(of the [\d,]+ pictures) in .+ are used\Z": r"\1 are used",
    r"\A(weights) in .+ (?=converted from )": r"\1 ",
    r"\A(weights taken from '.*') in .+": r"\1",
    r"\A.+ (also holds (?:an average|other weights)\b.*): --weights .+": r"the file of weights \1",
    r"\A(\d+ tensor\(s\)) in .+ (?=are not used: )": r"\1 of the file of weights ",
    r"\A(the table of positions) in .+ (?=is interpolated )": r"\1 ",
    r"(made from) (?!(?:timm|torchvision|open_clip|demo):[\w.-]+:|a module:|module:).+(?=: figures are against it)":
        r"\1 another network",
    r"\A.+ (?=was saved by an earlier release, without a digest)": "the result ",
    r"(reading) .+ (?=again: )": r"\1 an image ",
}  # fmt: skip
_NO_TEACHER, _NO_REASON = "it could not be loaded", "the reason is not published"
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
    and student answer differently, its notes and reasons without what names a file, and run.toml, which names folders,
    is left out. The plan goes along as it is, with the teacher as you named it. The folder itself is not changed.
    Exported files of an earlier result in that repository are removed from it.

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
    data |= _with_public_reasons(data)
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
    if not source.get("spec"):
        return plan
    return replace(plan, teacher={**plan.teacher, "source": {**source, "spec": short_spec(source)}})


def _unnamed(note: str) -> str:
    """A note without what names a file in it; empty where that is its beginning.

    >>> _unnamed("1 of 9 images are blank (one flat colour): “Anna.png”")
    '1 of 9 images are blank (one flat colour): name left out'
    """
    whose = found[0] if (found := re.match(r"(held out|extra images): ", note)) else ""
    text = without_names(note.removeprefix(whose))
    for pattern, shorter in _WITHOUT.items():
        text = re.sub(pattern, shorter, text, flags=re.DOTALL)
    if _NAMING.search(text) or (_LISTING.search(text) and not ends_in_names(note)):
        text = re.split(r": | \(", text)[0]
    return "" if _NAMING.search(text) else whose + text


def _with_public_reasons(data: dict[str, Any]) -> dict[str, Any]:
    """The entries of a report that say why something was not done, which can name files."""

    def with_public(entry: dict[str, Any] | None, *names: str) -> dict[str, Any] | None:
        reasons = {name: text for name in names if entry and (text := entry.get(name))}
        return entry and {**entry, **{name: _unnamed(text) or _NO_REASON for name, text in reasons.items()}}

    found: dict[str, Any] = {
        "exports": {
            kind: with_public(entry, "fixed_because", "size_fixed_because", "not_run")
            for kind, entry in (data.get("exports") or {}).items()
        },
        "alternatives": [with_public(entry, "failed") for entry in data.get("alternatives") or ()],
    }
    if table := data.get("int8"):
        found["int8"] = {**table, "mimic": with_public(table.get("mimic"), "failed")}
        if table.get("without_teacher"):  # an error, whose names of folders may look like any other words
            found["int8"]["without_teacher"] = _NO_TEACHER
    return found


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

    source = plan.teacher.get("source") or {}
    kinds = {output["kind"] for output in report.outputs}
    data = ModelCardData(
        library_name="mimicut",
        tags=["mimicut", "model-compression", "structured-pruning", "few-shot", "knowledge-distillation"],
        pipeline_tag=next((task for kind, task in _TASKS.items() if kind in kinds), None),
        # Only where its weights are those of the hub: a folder can have a name like that, too.
        base_model=str(source["spec"]).removeprefix("hf:") if (source.get("options") or {}).get("hub") else None,
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

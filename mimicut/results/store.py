"""A result as a folder: plan.json, weights.safetensors, report.json, and for people report.html and README.md.

The folder is complete or not there (`folder`); nothing in it is pickled. `load_result` builds the model again.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from mimicut.base.disk import write
from mimicut.base.errors import PlanError, StoreError
from mimicut.base.schema import faults
from mimicut.base.scratch import locked, replace_files
from mimicut.inputs.file_names import quoted
from mimicut.results.files import (
    PAGES,
    PLAN,
    PLAN_DIGEST,
    REPORT,
    RUN,
    STORED,
    VERSION,
    WEIGHTS,
    read_json,
    sha256,
    write_json,
)
from mimicut.results.folder import existing_result, fill_folder, is_own_page
from mimicut.results.html_page import page
from mimicut.results.readme import readme
from mimicut.results.report import Report
from mimicut.results.report_schema import StoredFields
from mimicut.results.weights_file import write_weights
from mimicut.surgery.plan import Plan


def save(
    folder: str | Path,
    *,
    model: nn.Module,
    plan: Plan,
    report: Report,
    extra: dict[str, Any] | None = None,
    run_file: str | None = None,
    force: bool = False,
    replaceable: Callable[[Path], bool] | None = None,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Save a result and return its folder, which is complete or not there.

    Args:
        folder: Where to; missing parents are made.
        model: The whole network, of which every tensor is stored.
        plan: What it was cut by.
        report: Its figures.
        extra: Plain data to keep beside the report; `read` returns it.
        run_file: The text of run.toml: the options that make the result again.
        force: Whether an existing result is replaced.
        replaceable: Whether a result that is there is replaced also without force.
        check: Receives the complete folder before it takes its place; an exception keeps it from that.

    Raises:
        StoreError: The folder cannot be written or replaced, or the model or the data hold what no file can. An old
            result is then whole.
    """

    def fill(fresh: Path) -> None:
        write_weights(fresh / WEIGHTS, model)
        write_json(fresh / PLAN, plan.to_json(), plan.dumps())
        digests = {PLAN_DIGEST: sha256(fresh / PLAN), "weights_sha256": sha256(fresh / WEIGHTS)}
        stored = {"version": VERSION, **digests, "extra": extra or {}}
        _write_run_file(fresh, run_file, stored)
        write_json(fresh / REPORT, report.to_json() | {STORED: stored})
        _write_pages(fresh, fresh, report, plan)
        if check is not None:
            check(fresh)

    return fill_folder(folder, fill, force, replaceable)[0]


def _write_run_file(folder: Path, text: str | None, stored: dict[str, Any]) -> None:
    """Changes `stored`, which says that the file is the result's own."""
    if text is not None:
        stored["run"] = True
        write(folder / RUN, text)


def save_programs(
    folder: str | Path,
    *,
    write: Callable[[Path], Report],
    plan: Plan,
    run_file: str | None = None,
    force: bool = False,
) -> tuple[Path, Report]:
    """Save a result that is exported files and a report, for a student whose code mimicut cannot build again.

    Args:
        folder: Where to; it is complete or not there.
        write: Writes the files into the folder that it is given, and returns the report.
        plan: For the pages; it is not stored.
        run_file: As in `save`.
        force: Whether an existing result is replaced.

    Raises:
        StoreError: As `save`; and whatever `write` raises.
    """

    def fill(fresh: Path) -> Report:
        report = write(fresh)
        stored: dict[str, Any] = {"version": VERSION, "extra": {}}
        _write_run_file(fresh, run_file, stored)
        write_json(fresh / REPORT, report.to_json() | {STORED: stored})
        _write_pages(fresh, fresh, report, plan)
        return report

    return fill_folder(folder, fill, force)


def put_report(folder: str | Path, report: Report) -> None:
    """Replace the report of a result and its pages; all else stays.

    Raises:
        StoreError: They cannot be written; the old report is then whole.
    """
    path = existing_result(folder)
    try:
        with locked(path):
            replace_files(path, lambda fresh: write_report(fresh, path, report))
    except OSError as error:
        raise StoreError(f"saving {path / REPORT}: {error}") from error


def write_report(fresh: Path, folder: Path, report: Report) -> None:
    """Write the report and the pages that are to replace those of the result `folder`, into the folder `fresh`."""
    _write_pages(fresh, folder, report, read(folder)[0])
    write_json(fresh / REPORT, report.to_json() | {STORED: read_json(folder / REPORT).get(STORED, {})})


def read(folder: str | Path) -> tuple[Plan, Report, dict[str, Any]]:
    """Plan, report and the extra data of a result; no weights are read.

    Raises:
        StoreError: A file is missing, unreadable or not the one that was saved, or the result was saved by a newer
            release.
        PlanError: The plan is nonsense, or of a newer release.
    """
    path = existing_result(folder)
    data = read_json(path / REPORT)
    stored = data.pop(STORED, {})
    _check_version(path / REPORT, stored)
    try:
        plan = Plan.from_json(read_json(path / PLAN))
    except PlanError as error:
        raise PlanError(f"reading {path / PLAN}: {error}") from error
    if PLAN_DIGEST in stored and sha256(path / PLAN) != stored[PLAN_DIGEST]:
        raise StoreError(
            f"reading {path / PLAN}: its content is not what was saved; copy the folder again, or to change the plan, "
            "edit a copy of the file and cut again by it (mimicut compress --plan COPY)"
        )
    try:
        report = Report.from_json(data)
    except StoreError as error:
        raise StoreError(f"reading {path / REPORT}: {error}") from error
    return plan, report, stored.get("extra", {})


def digest_notes(folder: str | Path) -> list[str]:
    """A sentence for a person where a result of an earlier release has no digest of its plan; else nothing."""
    path = existing_result(folder)
    if PLAN_DIGEST in read_json(path / REPORT).get(STORED, {}):
        return []
    name = quoted(path.name)
    return [f"{name} was saved by an earlier release, without a digest of its plan: an edit would go unnoticed"]


def weights_digest(folder: str | Path) -> str | None:
    """SHA-256 of the weights that a result was saved with, hexadecimal; None where there is no such folder."""
    try:
        return read_json(Path(folder) / REPORT)[STORED]["weights_sha256"]
    except (StoreError, OSError, KeyError):
        return None


def _check_version(path: Path, stored: Any) -> None:
    if not isinstance(stored, dict):
        raise StoreError(f"reading {path}: found a {type(stored).__name__} under {STORED!r}, expected an object")
    version = stored.get("version", 1)
    if type(version) is not int or not 1 <= version <= VERSION:
        raise StoreError(
            f"reading {path}: the result has version {version}, this release reads version {VERSION}: it was "
            "saved by a newer release; update mimicut (pip install --upgrade mimicut)"
        )
    wrong = faults(stored, StoredFields)
    if wrong:
        raise StoreError(f"reading {path}: {STORED}: {'; '.join(wrong)}; copy the folder again")


def _write_pages(fresh: Path, folder: Path, report: Report, plan: Plan) -> None:
    """Write the pages of the result `folder` into `fresh`, without those in place of which it has a page of the
    user's."""
    texts = (page(report, plan), readme(report, plan, has_run_file=(folder / RUN).is_file()))
    for name, text in zip(PAGES, texts, strict=True):
        if is_own_page(folder / name):
            write(fresh / name, text)

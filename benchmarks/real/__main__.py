"""Real networks on real pictures: fetch the pictures, run cells, write the page.

    python -m benchmarks.real fetch                                  # once; Debian or Ubuntu, 330 MB, no root
    python -m benchmarks.real run                                    # goes on where it was stopped
    python -m benchmarks.real run --teacher efficientnet_lite0 --keep 0.7 --images 50 --steps 100 --seeds 2021
    python -m benchmarks.real page                                   # docs/real.md from the lines

Words go to stderr, the last line on stdout is JSON. Exit codes as of `python -m benchmarks`.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

SOME_FAILED = 3


def main(arguments: list[str] | None = None) -> int:
    from benchmarks.real import pictures, run

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    fetch = commands.add_parser("fetch", help="download the Debian packages and prepare the pictures")
    fetch.add_argument("--to", type=Path, default=pictures.DEFAULT, metavar="DIR", help="default: %(default)s")
    fetch.add_argument("--from", type=Path, dest="given", metavar="DIR", help="extracted packages, instead of apt-get")
    cells = commands.add_parser("run", help="run the cells that have no line yet")
    cells.add_argument("--pictures", type=Path, default=pictures.DEFAULT, metavar="DIR", help="where fetch put them")
    cells.add_argument("--teacher", nargs="+", default=run.TEACHERS)
    cells.add_argument("--keep", nargs="+", type=float, default=run.KEEPS)
    cells.add_argument("--images", nargs="+", type=int, default=run.IMAGES)
    cells.add_argument("--steps", nargs="+", type=int, default=run.STEPS)
    cells.add_argument("--seeds", nargs="+", type=int, default=run.SEEDS)
    cells.add_argument("--methods", nargs="+", choices=run.ALL, default=run.NAMED)
    cells.add_argument("--size", nargs="+", type=int, default=run.SIZES, help="pixels of the square; default: 160")
    cells.add_argument("--grid", action="store_true", help="also every option that is tried of the other methods")
    cells.add_argument("--out", type=Path, default=OUT, help="results file; default: %(default)s")
    cells.add_argument("--limit", type=int, help="so many cells at most")
    cells.add_argument("--retry-failed", action="store_true", help="run cells again that ended in an error")
    cells.add_argument("--device", default="cpu")
    cells.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    page = commands.add_parser("page", help="write docs/real.md from the lines")
    page.add_argument("--lines", type=Path, default=OUT)
    page.add_argument("--to", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    from mimicut.base.errors import InputError

    try:
        return {"fetch": _fetch, "run": _run, "page": _page}[options.command](options)
    except InputError as error:
        return _refuse(str(error))


OUT = Path(__file__).parents[1] / "results" / "real.jsonl"
PAGE = Path(__file__).parents[2] / "docs" / "real.md"


def _fetch(options: argparse.Namespace) -> int:
    from benchmarks.real import pictures

    made = pictures.fetch(options.to, options.given)
    counts = {part: len(files) for part, files in made.files.items()}
    print(json.dumps({"folder": str(made.folder), "pictures": counts, "hash": made.hash}))
    return 0


def _run(options: argparse.Namespace) -> int:
    from benchmarks import sweep
    from benchmarks.real import run
    from benchmarks.real.task import found, teacher_of

    folder = options.pictures / "pictures"
    whose = found(folder).hash
    known = sweep.read_lines(options.out)
    other = next((line["pictures"] for line in known if line.get("pictures") != whose), None)
    if other is not None:
        return _refuse(f"{options.out} has cells of other pictures ({other}, found {whose}): name another file, --out")
    for name in options.teacher:
        teacher_of(name)  # what is not installed is said before the first cell
    wanted = run.cells(
        options.teacher, options.keep, options.images, options.steps, options.seeds, options.methods, options.size,
        options.grid,
    )  # fmt: skip
    cells = sweep.missing(wanted, options.out, options.retry_failed)[: options.limit]
    print(f"{len(wanted)} cells, {len(cells)} to run now, lines in {options.out}", file=sys.stderr)
    count = {"done": 0, "failed": 0}
    execute = sweep.in_turn(partial(run.run_cell, where=run.Where(folder, options.device, options.threads)))
    try:
        count = sweep.sweep(cells, options.out, execute) if cells else count
    except BlockingIOError:
        return _refuse(f"another run is writing {options.out}; wait for it, or name another file with --out")
    except KeyboardInterrupt:
        print(f"stopped; every finished cell is in {options.out}; the same command goes on", file=sys.stderr)
        return 130
    print(json.dumps({"cells": len(wanted), **count}))
    return SOME_FAILED if count["failed"] else 0


def _page(options: argparse.Namespace) -> int:
    from benchmarks.real import page

    if not page.write(options.lines, options.to):
        return _refuse(f"there are no lines of finished cells in {options.lines}; python -m benchmarks.real run")
    print(json.dumps({"page": str(options.to)}))
    return 0


def _refuse(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

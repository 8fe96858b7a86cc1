"""Every architecture through the whole path: python -m benchmarks.zoo run | oracle | page | smallest."""

import argparse
import fnmatch
import json
import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.zoo.libraries import missing
from benchmarks.zoo.models import specs, write_smallest
from benchmarks.zoo.page import PAGE, text

RESULTS = Path(__file__).parents[1] / "results" / "zoo.jsonl"
ORACLE = RESULTS.with_name("zoo_oracle.jsonl")


_SAID = ("outcome", "stage", "keep", "macs_share_pinned", "compared", "agree", "error")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module, out, memory_gb, seconds, what in (
        ("run", "case", RESULTS, 20, 600, "the models that the results file lacks, each in a process of its own"),
        ("oracle", "oracle", ORACLE, 8, 120, "our groups against Torch-Pruning's, likewise"),
    ):
        run = commands.add_parser(name, help=what)
        run.set_defaults(module=f"benchmarks.zoo.{module}")
        run.add_argument("--only", default="*", metavar="PATTERN", help="such as 'timm:*'")
        run.add_argument("--out", type=Path, default=out)
        run.add_argument("--again", help="run those again whose outcome matches, such as failed or '*'")
        run.add_argument("--jobs", type=int, default=1)
        run.add_argument("--memory-gb", type=float, default=memory_gb, help="address space of a model's process")
        run.add_argument("--seconds", type=int, default=seconds, help="after which a model's process is ended")
    commands.add_parser("smallest", help="write timm.json: the smallest member of every timm family")
    commands.add_parser("page", help="write docs/zoo.md from the lines")
    options = parser.parse_args()
    if options.command == "page":
        lines, oracle = (list(read(path).values()) for path in (RESULTS, ORACLE))
        PAGE.write_text(text(lines, len(specs()), oracle), encoding="utf-8")
        return 0
    if options.command == "smallest":
        write_smallest()
        return 0
    return _sweep(options)


def _sweep(options: argparse.Namespace) -> int:
    known = read(options.out)
    listed = [s for s in specs() if fnmatch.fnmatchcase(s, options.only)]
    wanted = [s for s in listed if missing(s) is None]
    lacking = sorted({package for s in listed if (package := missing(s)) is not None})
    if lacking:
        print(
            f"{len(listed) - len(wanted)} models are skipped, as {', '.join(lacking)} cannot be imported "
            "(pip install 'mimicut[zoo]')",
            file=sys.stderr,
        )
    left = [
        s
        for s in wanted
        if s not in known or (options.again and fnmatch.fnmatchcase(known[s]["outcome"], options.again))
    ]
    print(f"{len(wanted)} models, {len(left)} to run now, lines in {options.out}", file=sys.stderr)
    options.out.parent.mkdir(exist_ok=True)
    with ThreadPoolExecutor(options.jobs) as pool, options.out.open("a", encoding="utf-8") as file:
        lines = pool.map(lambda s: one(s, options.memory_gb, options.seconds, options.module), left)
        for done, line in enumerate(lines, start=1):
            file.write(json.dumps(line) + "\n")
            file.flush()
            said = " ".join(str(line.get(k, "")) for k in _SAID)
            print(f"{done}/{len(left)} {line['model']}: {said[:300]}", file=sys.stderr, flush=True)
    return 0


def one(spec: str, memory_gb: float, seconds: int, module: str = "benchmarks.zoo.case") -> dict[str, Any]:
    """The line of `spec`, from a process of its own that may take so much memory and time."""
    limit = int(memory_gb * 2**30)
    try:
        found = subprocess.run(
            [sys.executable, "-m", module, spec],
            capture_output=True, text=True, check=False, timeout=seconds, cwd=Path(__file__).parents[2],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        said, ended = (error.stdout or b"").decode(), f"not done after {seconds} s"
    else:
        said, ended = found.stdout, f"its process ended with {found.returncode}: {found.stderr.strip()[-400:]}"
        if found.returncode == 0:
            return json.loads(said.strip().splitlines()[-1])
    lost = {"outcome": "failed", "error": ended}
    try:  # what was known when it went on to the export
        return json.loads(said.strip().splitlines()[-1]) | lost | {"stage": "export"}
    except (IndexError, ValueError):
        return {"model": spec} | lost


def read(path: Path) -> dict[str, dict[str, Any]]:
    """model -> its last line."""
    texts = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {line["model"]: line for line in map(json.loads, texts)}


if __name__ == "__main__":
    sys.exit(main())

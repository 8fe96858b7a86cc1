"""Methods side by side: python -m benchmarks sweep | tune | page (see benchmarks/README.md)."""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.protocol import Protocol
    from benchmarks.tasks import Place

SOME_FAILED = 3  # exit code of a sweep that went on behind cells that failed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    sweep = commands.add_parser("sweep", help="run the cells of a protocol that its results file lacks")
    sweep.add_argument("protocol", help="a name that `list` shows")
    sweep.add_argument("--out", type=Path, help="results file; default: benchmarks/results/PROTOCOL.jsonl")
    sweep.add_argument("--only", action="append", default=[], metavar="FIELD=VALUE[,VALUE]", help="such as method=mir")
    sweep.add_argument("--limit", type=_whole, help="so many cells at most")
    sweep.add_argument("--retry-failed", action="store_true", help="run cells again that ended in an error")
    sweep.add_argument("--teacher", action="append", help="instead of the protocol's; as mimicut names teachers")
    sweep.add_argument("--data", help="folder of the data set (ImageNet: train/ and val/ in it)")
    sweep.add_argument("--cache", help="folder to keep decoded test images in (ImageNet: 7.5 GB), for the next cells")
    sweep.add_argument("--weights", help="file with the teacher's weights, instead of its library's")
    sweep.add_argument("--no-pretrained", action="store_true", help="random weights, to try things out")
    sweep.add_argument("--steps", type=_whole, help="instead of the protocol's, to try things out")
    sweep.add_argument("--images", type=_whole, action="append", help="instead of the protocol's")
    sweep.add_argument("--device", default="cpu")
    sweep.add_argument(
        "--threads", type=_whole, default=1, help="of a cell, with Ray and without; default: %(default)s"
    )
    sweep.add_argument("--ray", action="store_true", help="several cells at once on this machine")
    sweep.add_argument("--address", help="of a Ray cluster, such as ray://HOST:10001 or auto; means --ray")
    sweep.add_argument("--jobs", type=_whole, help="cells at once on this machine; default: as many as its cores hold")
    sweep.add_argument("--gpus", type=_share, default=0, help="of a GPU for each cell, such as 0.5")
    commands.add_parser("list", help="the protocols, their cells and how many are done")
    tune = commands.add_parser("tune", help="write tuned.json, the best options of the grids that were swept")
    tune.add_argument("files", type=Path, nargs="*", help="default: benchmarks/results/*_tuning.jsonl")
    commands.add_parser("page", help="write docs/results.md and its figures from the result files")
    show = commands.add_parser("show", help="the table of any results file, as Markdown on stdout")
    show.add_argument("file", type=Path)
    options = parser.parse_args(arguments)
    return {"sweep": _sweep, "list": _list, "tune": _tune, "page": _page, "show": _show}[options.command](options)


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text}, expected a whole number from 1")
    return int(text)


def _share(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"found {text}, expected a number from 0")
    return number


def _sweep(options: argparse.Namespace) -> int:
    from dataclasses import replace

    from benchmarks import sweep
    from benchmarks.protocol import PROTOCOLS, chosen
    from benchmarks.tasks import Place

    protocol = PROTOCOLS.get(options.protocol)
    if protocol is None:
        return _refuse(f"there is no protocol {options.protocol!r}; expected one of {', '.join(PROTOCOLS)}")
    if (options.jobs or options.gpus) and not (options.ray or options.address):
        return _refuse("--jobs and --gpus are for several cells at once: add --ray or --address")
    own = [f for f in ("teacher", "weights", "no_pretrained", "steps", "images") if getattr(options, f)]
    if own and options.out is None:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in own)
        return _refuse(f"with {flags} these are other cells than {protocol.name}'s: name a results file with --out")
    protocol = replace(
        protocol,
        teachers=tuple(options.teacher or protocol.teachers),
        steps=(options.steps,) if options.steps is not None else protocol.steps,
        images=tuple(options.images or protocol.images),
    )
    if not protocol.teachers:
        return _refuse(f"{protocol.name} has no teacher of its own: name one with --teacher (and --weights FILE)")
    try:
        wanted = chosen(protocol.cells(), options.only)
    except ValueError as error:
        return _refuse(str(error))
    path = options.out or sweep.RESULTS / f"{protocol.name}.jsonl"
    data, weights, cache = (f and str(Path(f).resolve()) for f in (options.data, options.weights, options.cache))
    place = Place(data, weights, not options.no_pretrained, options.device, options.threads, cache)
    try:
        whose = place.weights_said()
    except OSError as error:
        return _refuse(f"reading the weights: {error}")
    try:
        known = sweep.read_lines(path)
    except OSError as error:
        return _refuse(f"reading {path}: {error}")
    reason = _missing(place, protocol, bool(options.address))
    if reason:
        return _refuse(reason)
    strange = [x for x in known if "error" not in x and x.get("weights") != whose]
    if strange:
        said = strange[0].get("weights", "the library's own")
        return _refuse(f"{path} has cells with other weights ({said}): name another results file with --out")
    cells = sweep.missing(wanted, path, options.retry_failed)[: options.limit]
    print(f"{protocol.name}: {len(wanted)} cells, {len(cells)} to run now, lines in {path}", file=sys.stderr)
    count = {"done": 0, "failed": 0}
    if cells:
        from benchmarks.cell import run_cell

        run = partial(run_cell, place=place)
        if options.ray or options.address:
            execute = sweep.on_ray(
                run, address=options.address, cpus=options.threads, gpus=options.gpus, jobs=options.jobs
            )
        else:
            execute = sweep.in_turn(run)
        try:
            count = sweep.sweep(cells, path, execute)
        except (ImportError, ValueError, ConnectionError) as error:
            return _refuse(f"{error}; --ray needs mimicut[benchmarks], a cluster that answers and room for a cell")
        except BlockingIOError:
            return _refuse(f"another sweep is writing {path}; wait for it, or name another file with --out")
        except OSError as error:
            return _refuse(f"writing {path}: {error}")
        except KeyboardInterrupt:
            print(f"stopped; every finished cell is in {path}; the same command goes on", file=sys.stderr)
            return 130
    print(json.dumps({"protocol": protocol.name, "cells": len(wanted), **count}))
    if count["failed"]:
        print("some cells ended in an error, which their lines tell; --retry-failed runs them again", file=sys.stderr)
    return SOME_FAILED if count["failed"] else 0


def _missing(place: "Place", protocol: "Protocol", elsewhere: bool) -> str | None:
    """What every cell would fail for, so that it is said before the first; elsewhere: they run on other machines."""
    import torch

    own = [t for t in protocol.teachers if t.startswith("demo:")]
    if own and place.weights_said() is not None:
        return f"{own[0]} has its own weights: leave out --weights and --no-pretrained"
    if protocol.task != "photographs" and place.data is None:
        return f"{protocol.name} needs the data set's folder: name it with --data"
    if elsewhere:
        return None
    if place.data is not None and not Path(place.data).is_dir():
        return f"there is no folder {place.data} (--data)"
    try:
        torch.zeros(1, device=place.device)
    except (RuntimeError, AssertionError) as error:
        said = str(error).splitlines()[0]
        return f"--device {place.device} cannot be used here: {said}"
    return None


def _list(options: argparse.Namespace) -> int:
    from benchmarks import sweep
    from benchmarks.protocol import PROTOCOLS

    for protocol in PROTOCOLS.values():
        cells = protocol.cells()
        left = sweep.missing(cells, sweep.RESULTS / f"{protocol.name}.jsonl")
        print(f"{protocol.name:22} {len(cells) - len(left):4} of {len(cells):4} cells done  {protocol.about}")
    return 0


def _tune(options: argparse.Namespace) -> int:
    from benchmarks.pages import tables

    try:
        return tables.write_tuned([_file(path) for path in options.files])
    except OSError as error:
        return _refuse(str(error))


def _page(options: argparse.Namespace) -> int:
    from benchmarks.pages import page

    return page.write()


def _show(options: argparse.Namespace) -> int:
    from benchmarks import sweep
    from benchmarks.pages import page, tables

    try:
        found = tables.table(sweep.read_lines(_file(options.file)))
    except OSError as error:
        return _refuse(str(error))
    except KeyError as error:
        return _refuse(f"{options.file} has a line that is not of a cell as `sweep` writes it: {error} is not known")
    if not found:
        return _refuse(f"there are no lines of finished cells in {options.file}")
    print("\n\n".join(page.tables_of(found)))
    return 0


def _file(path: Path) -> Path:
    """Raises: OSError when it cannot be read."""
    path.open().close()
    return path


def _refuse(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

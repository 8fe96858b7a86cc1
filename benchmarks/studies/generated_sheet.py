"""The pictures that mimicut draws: a sheet of them, and how long they take.

    python -m benchmarks.studies.generated_sheet                      # docs/figures/generated.jpg
    python -m benchmarks.studies.generated_sheet --time 2000 --threads 2

With --time a line of results/generated_pictures.json: seconds for so many pictures of 224 pixels, in so many processes
at once, and what 10,000 would take.
"""

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from mimicut.base.environment import platform_kind, versions
from mimicut.inputs.generated_pictures import draw_pictures

SHEET = Path(__file__).parents[2] / "docs" / "figures" / "generated.jpg"
OUT = Path(__file__).parents[1] / "results" / "generated_pictures.json"
ROWS, COLUMNS, SIDE = 5, 10, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time", type=int, metavar="COUNT")
    parser.add_argument("--threads", type=int, default=1, help="processes at once")
    options = parser.parse_args()
    if options.time is None:
        pictures = draw_pictures(ROWS * COLUMNS, 0, side=SIDE)
        rows = pictures.reshape(ROWS, COLUMNS, SIDE, SIDE, 3).transpose(0, 2, 1, 3, 4)
        Image.fromarray(np.ascontiguousarray(rows.reshape(ROWS * SIDE, COLUMNS * SIDE, 3))).save(SHEET, quality=85)
        print(json.dumps({"sheet": str(SHEET)}))
        return
    each, started = options.time // options.threads, time.perf_counter()
    with ProcessPoolExecutor(options.threads) as pool:
        list(pool.map(_draw, [each] * options.threads, range(options.threads)))
    seconds = time.perf_counter() - started
    line = {
        "pictures": each * options.threads, "side": 224, "processes": options.threads, "seconds": round(seconds, 2),
        "seconds_of_10000": round(10_000 * seconds / (each * options.threads), 1),
        "platform": platform_kind(options.threads, "cpu"),
        "versions": {name: text for name, text in versions().items() if name in ("python", "numpy", "pillow")},
    }  # fmt: skip
    OUT.write_text(json.dumps(line) + "\n", encoding="utf-8")
    print(json.dumps(line))


def _draw(count: int, seed: int) -> int:
    return len(draw_pictures(count, seed, side=224))


if __name__ == "__main__":
    main()

"""Seconds per stage of one default request, 512 x 512 to 1024 x 1024 px, on the pocket weights and this CPU.

    python -m benchmarks.speed [--side 512] [--repeats 3]

The first run warms up and is not counted; medians are printed. Wall seconds of a shared machine are no claim: compare
stages within one run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.quality import HELD_OUT, run
from pipelines.creative_upscaler import CreativeUpscaler
from weights.store import open_store


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=512, help="input side in px")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    started = time.perf_counter()
    pipeline = CreativeUpscaler.load(open_store("pocket", root=Path(), has_cuda=False), device="cpu")
    loading_s = time.perf_counter() - started
    with Image.open(HELD_OUT / "clinic.png") as photograph:
        image = photograph.convert("RGB").resize((arguments.side, arguments.side), Image.Resampling.BOX)
    runs = [run(pipeline, image)[1].timings for _ in range(arguments.repeats + 1)][1:]
    table = Table("stage", "median s", title=f"{arguments.side} px square x2, defaults; loading {loading_s:.1f} s")
    for stage in runs[0]:
        table.add_row(stage, f"{statistics.median(timings[stage] for timings in runs):.2f}")
    Console(file=sys.stdout).print(table)


if __name__ == "__main__":
    main()

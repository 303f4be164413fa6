"""Seconds per stage of one default request, 512 x 512 to 1024 x 1024 px, on the pocket weights and this CPU.

    python -m benchmarks.speed [--endpoint ID ...] [--side 512] [--repeats 3]

The first run warms up and is not counted; medians are printed. Wall seconds of a shared machine are no claim: compare
stages within one run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.local import Local
from benchmarks.quality import HELD_OUT
from server.endpoints import ENDPOINTS


def main() -> None:
    """Measure and print a table for each endpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--endpoint", nargs="+", choices=list(ENDPOINTS), default=list(ENDPOINTS))
    parser.add_argument("--side", type=int, default=512, help="input side in px")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    console = Console(file=sys.stdout)
    started = time.perf_counter()
    local = Local()
    console.print(f"loading every endpoint: {time.perf_counter() - started:.1f} s, torch's import included")
    with Image.open(HELD_OUT / "clinic.png") as photograph:
        image = photograph.convert("RGB").resize((arguments.side, arguments.side), Image.Resampling.BOX)
    for endpoint in arguments.endpoint:
        runs = [local.make(endpoint, image).timings for _ in range(arguments.repeats + 1)][1:]
        table = Table("stage", "median s", title=f"{endpoint}: {arguments.side} px square x2, defaults")
        for stage in runs[0]:
            table.add_row(stage, f"{statistics.median(timings[stage] for timings in runs):.2f}")
        console.print(table)


if __name__ == "__main__":
    main()

"""Peak memory and time per output megapixel of crystal-upscaler at growing factors, on the pocket weights and this CPU.

    python -m benchmarks.large [--side 256] [--scales 4 8 16] [--creativity 0] [--redraw-all]

Every factor runs in a process of its own, through the code of a slot; its peak resident memory is what the operating
system says of it. `--redraw-all` redraws pictures of 256 px too, which the endpoint does not: it measures the diffusion
passes with their files. Times are CPU seconds of the process: walls of a shared machine are no claim.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.table import Table


def measure(side: int, scale: float, creativity: float, *, redraw_all: bool) -> dict[str, float]:
    """One request in this process: megapixels, peak MB, CPU seconds of the pipeline, wall seconds."""
    import torch
    from skimage import data

    from pipelines import crystal_upscaler
    from server.endpoints import ENDPOINTS
    from server.settings import Settings
    from server.slot import PIPELINES, LocalRun

    torch.set_num_threads(1)
    if redraw_all:
        crystal_upscaler.NETWORK_ONLY_PX = 0
    endpoint = ENDPOINTS["clarityai/crystal-upscaler"]
    payload = {"image_url": "data:,", "scale_factor": scale, "creativity": creativity}
    buffer = io.BytesIO()
    Image.fromarray(data.astronaut()).resize((side, side), Image.Resampling.BOX).save(buffer, format="PNG")
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(data=Path(folder), weights="pocket")
        local = LocalRun(settings, device="cpu", pipelines={"crystal_upscaler": PIPELINES["crystal_upscaler"]})
        job = endpoint.job(endpoint.parse(payload))
        started, cpu = time.perf_counter(), time.process_time()
        rendered = local.make(job, buffer.getvalue(), Path(folder) / "result.png", lambda report: None)
    return {
        "megapixels": rendered.width * rendered.height / 1e6,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - started,
    }


def main() -> None:
    """Measure every factor and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=256, help="input side in px")
    parser.add_argument("--scales", nargs="+", type=float, default=[4.0, 8.0, 16.0])
    parser.add_argument("--creativity", type=float, default=0.0)
    parser.add_argument("--redraw-all", action="store_true")
    parser.add_argument("--one", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        figures = measure(arguments.side, arguments.one, arguments.creativity, redraw_all=arguments.redraw_all)
        sys.stdout.write(json.dumps(figures))
        return
    names = ("factor", "megapixels", "peak MB", "x first", "CPU s / MP", "x before")
    table = Table(*names, title=f"crystal-upscaler, {arguments.side} px square, creativity {arguments.creativity:g}")
    rows: list[dict[str, float]] = []
    for scale in arguments.scales:
        command = [sys.executable, "-m", "benchmarks.large", *sys.argv[1:], "--one", str(scale)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        figures = json.loads(done.stdout.splitlines()[-1])
        figures["per_mp"] = figures["cpu_s"] / figures["megapixels"]
        rows.append(figures)
        before = rows[-2] if len(rows) > 1 else figures
        table.add_row(
            f"{scale:g}",
            f"{figures['megapixels']:.2f}",
            f"{figures['peak_mb']:.0f}",
            f"{figures['peak_mb'] / rows[0]['peak_mb']:.2f}",
            f"{figures['per_mp']:.2f}",
            f"{figures['per_mp'] / before['per_mp']:.2f}",
        )
    Console(file=sys.stdout, width=90).print(table)


if __name__ == "__main__":
    main()

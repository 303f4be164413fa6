"""What impatient clients cost: 32 of fal's Python clients poll one running request, each ten times a second.

    python -m benchmarks.polling [--clients 32] [--rounds 3] [--side 256]

A whole server on the pocket weights, its slot on the last core with one thread, all else on the first: gateway,
dispatcher and clients, which poll over HTTPS in four processes. The request runs alone and in the crowd in turns; their
medians are compared within this run. Exits 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from server.demo import exports, free_ports, wait_until_ready

ENDPOINT = "fal-ai/creative-upscaler"
PHOTO = Path(__file__).parents[1] / "tests" / "photos" / "clinic.png"
NUM_PROCESSES = 4
MAX_P99_MS = 50.0
MAX_RATIO = 1.05

CLIENTS = """
import json, sys, threading, time
import fal_client

def poll(request_id, seconds):
    handle = fal_client.SyncClient().get_handle(sys.argv[1], request_id)
    while True:
        started = time.perf_counter()
        status = handle.status()
        seconds.append(time.perf_counter() - started)
        if isinstance(status, fal_client.Completed):
            return
        time.sleep(max(0.0, 0.1 - seconds[-1]))

for line in sys.stdin:
    seconds = []
    threads = [threading.Thread(target=poll, args=(line.strip(), seconds)) for _ in range(int(sys.argv[2]))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.stdout.write(json.dumps(seconds) + "\\n")
    sys.stdout.flush()
"""


@dataclass(frozen=True)
class Server:
    """A running server: base of its plain address, what `env` prints for clients, the slot's process."""

    url: str
    environment: dict[str, str]
    slot: psutil.Process


@contextmanager
def running_server(data: Path) -> Iterator[Server]:
    """A server on two cores: the slot has the last one for itself."""
    port, tls_port = free_ports(2)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[0]})
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    options = ["--data", str(data), "--port", str(port), "--tls-port", str(tls_port), "--weights", "pocket"]
    log_path = data.with_suffix(".log")
    with log_path.open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "server", "serve", *options], stdout=log, stderr=log, env=environment
        )
    try:
        wait_until_ready(server, f"http://127.0.0.1:{port}/ready", log_path)
        roles = json.loads((data / "run" / "server.json").read_text())["roles"]
        for thread in Path(f"/proc/{roles['slot-0']}/task").iterdir():
            os.sched_setaffinity(int(thread.name), {cores[-1]})
        command = [sys.executable, "-m", "server", "env", "--data", str(data)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        yield Server(f"http://127.0.0.1:{port}", exports(printed), psutil.Process(roles["slot-0"]))
    finally:
        server.terminate()
        server.wait(60.0)


@contextmanager
def crowd(server: Server, num_clients: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that poll the request whose id they read, and then print the seconds that each call took."""
    command = [sys.executable, "-c", CLIENTS, ENDPOINT, str(num_clients // NUM_PROCESSES)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env=os.environ | server.environment, **pipes) for _ in range(NUM_PROCESSES)]
    try:
        yield processes
    finally:
        for process in processes:
            process.communicate(timeout=60.0)


def arguments(side_px: int) -> dict[str, Any]:
    """The same request every time."""
    with Image.open(PHOTO) as photo:
        small = photo.convert("RGB").resize((side_px, side_px), Image.Resampling.BOX)
    file = io.BytesIO()
    small.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"image_url": url, "prompt": "a photograph of people", "seed": 1}


def measure(
    server: Server, payload: dict[str, Any], pollers: list[subprocess.Popen[str]]
) -> tuple[float, float, list[float]]:
    """Run the request once under the eyes of these; wall and CPU seconds of the slot, and those of each poll."""
    before = sum(server.slot.cpu_times()[:2])
    accepted = httpx2.post(f"{server.url}/queue/{ENDPOINT}", json=payload, trust_env=False).json()
    for process in pollers:
        assert process.stdin is not None
        process.stdin.write(accepted["request_id"] + "\n")
        process.stdin.flush()
    # One look a second, also while nobody else looks.
    while (status := httpx2.get(accepted["status_url"], trust_env=False).json())["status"] != "COMPLETED":
        time.sleep(1.0)
    assert "error" not in status, status
    seconds = [each for process in pollers if process.stdout for each in json.loads(process.stdout.readline())]
    return status["metrics"]["inference_time"], sum(server.slot.cpu_times()[:2]) - before, seconds


def main() -> int:
    """Measure in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", type=int, default=256, help="input side in px")
    options = parser.parse_args()
    payload = arguments(options.side)
    alone, crowded, polls = [], [], []
    with (
        tempfile.TemporaryDirectory(prefix="upscaler-bench-") as folder,
        running_server(Path(folder) / "data") as server,
        crowd(server, options.clients) as pollers,
        Progress(transient=True) as bar,
    ):
        measure(server, payload, pollers)  # warms up both sides
        for _ in bar.track(range(options.rounds), description="asking"):
            alone.append(measure(server, payload, [])[:2])
            *took, seconds = measure(server, payload, pollers)
            crowded.append(took)
            polls += seconds
    p50, p99 = (statistics.quantiles(polls, n=100, method="inclusive")[place] * 1000 for place in (49, 98))
    wall, cpu = (
        statistics.median(took[place] for took in crowded) / statistics.median(took[place] for took in alone)
        for place in (0, 1)
    )
    rate = len(polls) / sum(took[0] for took in crowded)
    table = Table("", "measured", "bar", "", title=f"{options.clients} clients, {options.rounds} rounds in turns")
    for name, measured, bar_text, is_good in (
        ("status calls", f"{rate:.0f}/s", "", None),
        ("status, p50", f"{p50:.1f} ms", "", None),
        ("status, p99", f"{p99:.1f} ms", f"<= {MAX_P99_MS:g} ms", p99 <= MAX_P99_MS),
        ("request alone", f"{statistics.median(took[0] for took in alone):.2f} s", "", None),
        ("request in the crowd", f"{statistics.median(took[0] for took in crowded):.2f} s", "", None),
        ("crowd over alone", f"{wall:.3f}", f"<= {MAX_RATIO}", wall <= MAX_RATIO),
        ("the same in CPU seconds of the slot", f"{cpu:.3f}", "", None),
    ):
        table.add_row(name, measured, bar_text, "" if is_good is None else ("[red]no[/]", "[green]yes[/]")[is_good])
    Console().print(table)
    return 0 if p99 <= MAX_P99_MS and wall <= MAX_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())

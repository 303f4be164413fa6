"""What the gateway does with one core: requests per second and their latency, idle CPU, memory of open streams.

    python -m benchmarks.gateway [--seconds 5] [--connections 16] [--streams 1000]

The gateway runs as it does in a server, on an empty data folder and pinned to one core; this process asks from another
core, over loopback and plain HTTP. There are no slots: finished requests are written through the ledger beforehand, and
submitted ones wait. Every submission is answered when it is on the disk. Exits 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import psutil
import uvloop
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from server.demo import free_ports
from server.ledger import Ledger, NewLog, NewRequest, Outcome
from server.settings import Settings
from server.supervisor import settings_environment
from server.wakeup import Bell

ENDPOINT = "fal-ai/creative-upscaler"
INPUT = {"image_url": "https://example.com/photograph.jpg", "prompt": "a photograph of a quiet street", "scale": 2}
NUM_SEEDED = 300  # a third each waiting, running and finished
START_S = 60.0
WARM_UP_S = 1.0
IDLE_S = 10.0
MAX_IDLE_PERCENT = 1.0
MAX_P99_MS = 50.0
MAX_STREAMS_MB = 200.0


@dataclass(frozen=True)
class Load:
    """A kind of request, the statuses that are right for it, and the rate that is wanted."""

    name: str
    requests: Sequence[bytes]
    statuses: frozenset[int]
    min_rate: float


@dataclass
class Answers:
    """What a run of requests took: seconds each and in all."""

    seconds: list[float] = field(default_factory=list)
    elapsed_s: float = 0.0

    @property
    def rate(self) -> float:
        """Answers per second."""
        return len(self.seconds) / self.elapsed_s

    def percentile_ms(self, percent: int) -> float:
        """The time within which this share of the requests was answered, in milliseconds."""
        return statistics.quantiles(self.seconds, n=100, method="inclusive")[percent - 1] * 1000


class Caller(asyncio.Protocol):
    """A connection that asks the next thing as soon as it has its answer, until it is told to stop."""

    def __init__(self, requests: Iterator[bytes], statuses: frozenset[int], answers: Answers) -> None:
        self._requests, self._statuses, self._answers = requests, statuses, answers
        self._buffer = b""
        self._asked = 0.0
        self.is_stopping = False
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask the first thing."""
        self._transport = cast(asyncio.Transport, transport)
        self._ask()

    def data_received(self, data: bytes) -> None:
        """Note the time when an answer is complete."""
        self._buffer += data
        head, end, body = self._buffer.partition(b"\r\n\r\n")
        if not end or len(body) < content_length(head):
            return
        self._answers.seconds.append(time.perf_counter() - self._asked)
        self._buffer = b""
        if int(head[9:12]) not in self._statuses:
            self._fail(RuntimeError(f"unexpected answer: {(head + end + body).decode(errors='replace')[:2000]}"))
        elif self.is_stopping:
            self._transport.close()
        else:
            self._ask()

    def connection_lost(self, error: Exception | None) -> None:
        """It is over, or it broke."""
        if self.is_stopping and error is None:
            if not self.done.done():
                self.done.set_result(None)
        else:
            self._fail(error or ConnectionResetError("the gateway hung up"))

    def _ask(self) -> None:
        self._asked = time.perf_counter()
        self._transport.write(next(self._requests))

    def _fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)
        self._transport.close()


def content_length(head: bytes) -> int:
    """The announced size of a body in bytes."""
    start = head.lower().index(b"\r\ncontent-length:") + 17
    return int(head[start:].partition(b"\r\n")[0])


async def measure(port: int, load: Load, *, num_connections: int, seconds: float) -> Answers:
    """Ask for so long on so many connections at once."""
    answers, requests = Answers(), itertools.cycle(load.requests)
    started = time.perf_counter()
    callers = [
        (await asyncio.get_running_loop().create_connection(
            lambda: Caller(requests, load.statuses, answers), "127.0.0.1", port
        ))[1]
        for _ in range(num_connections)
    ]  # fmt: skip
    await asyncio.wait([caller.done for caller in callers], timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    for caller in callers:
        caller.is_stopping = True
    await asyncio.gather(*(caller.done for caller in callers))
    answers.elapsed_s = time.perf_counter() - started
    return answers


def http(method: str, path: str, body: bytes = b"") -> bytes:
    """A request as it goes over the wire."""
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Key benchmark\r\nAccept: */*\r\n"
    if body:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return f"{head}\r\n".encode() + body


async def fill(settings: Settings) -> list[str]:
    """Write requests into the ledger: a third waits, a third runs, a third is finished; returns their ids in order."""
    ledger = Ledger.open(settings)
    result = {
        "image": {"url": "blob:out/ab/abcdefghijklmnopqrst_upscaled.png", "content_type": "image/png", "width": 2048},
        "seed": 42,
        "timings": {"inference": 12.5},
    }
    ids = [f"{n:08x}-0000-4000-8000-000000000000" for n in range(NUM_SEEDED)]
    for n, request_id in enumerate(ids):
        lines = tuple(NewLog(time.time(), "INFO", f"denoise {step}/16") for step in range(8))
        await ledger.submit(NewRequest(id=request_id, endpoint=ENDPOINT, job={"params": {}}, logs=lines))
        if n >= NUM_SEEDED // 3:
            await ledger.claim(request_id, "0", "token")
        if n >= 2 * NUM_SEEDED // 3:
            await ledger.complete(request_id, "token", Outcome(status=200, body=result, inference_s=12.5))
    ledger.close()
    return ids


def loads(ids: Sequence[str]) -> list[Load]:
    """What is asked, and how often per second at least."""
    urls = [f"/queue/{ENDPOINT}/requests/{request_id}" for request_id in ids]
    body = json.dumps(INPUT).encode()
    return [
        Load("submit", [http("POST", f"/queue/{ENDPOINT}", body)], frozenset({200}), 1500),
        Load("status", [http("GET", f"{url}/status") for url in urls], frozenset({200, 202}), 4000),
        Load("result", [http("GET", url) for url in urls[2 * NUM_SEEDED // 3 :]], frozenset({200}), 4000),
    ]


async def open_streams(port: int, ids: Sequence[str], count: int) -> list[asyncio.StreamWriter]:
    """Status streams of running requests, each after its first event."""
    opened = []
    for request_id in itertools.islice(itertools.cycle(ids), count):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(http("GET", f"/queue/{ENDPOINT}/requests/{request_id}/status/stream?logs=1"))
        await reader.readuntil(b"data: ")
        opened.append(writer)
    return opened


def start_gateway(settings: Settings, core: int, log: Path) -> subprocess.Popen[bytes]:
    """The gateway's own process, on one core from its first instruction."""
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "server", "gateway"],
            env=os.environ | settings_environment(settings),
            stderr=file,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )


async def wait_until_open(port: int) -> None:
    """Wait until somebody listens."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.1)
        else:
            writer.close()
            return
    raise SystemExit("the gateway did not start; its log is empty or in the data folder")


def cpu_s(process: psutil.Process) -> float:
    """CPU seconds that a process has used, in all its threads."""
    times = process.cpu_times()
    return float(times.user + times.system)


async def measure_all(
    settings: Settings, gateway: psutil.Process, ids: Sequence[str], options: argparse.Namespace
) -> bool:
    """Ask, listen and wait; print the table; returns whether every bar was cleared."""
    await wait_until_open(settings.port)
    title = f"one gateway process on core {gateway.cpu_affinity()}"
    table = Table("", "measured", "p50 ms", "p99 ms", "CPU µs", "bar", "", title=title)
    verdicts: list[bool] = []

    def add(name: str, measured: str, bar: str, is_good: bool, *percentiles: str) -> None:
        verdicts.append(is_good)
        cells = percentiles or ("", "", "")
        table.add_row(name, measured, *cells, bar, "[green]yes[/]" if is_good else "[red]no[/]")

    with Progress(transient=True) as bar:
        for load in bar.track(loads(ids), description="asking"):
            connections = options.connections
            await measure(settings.port, load, num_connections=connections, seconds=WARM_UP_S)
            spent_s = cpu_s(gateway)
            found = await measure(settings.port, load, num_connections=connections, seconds=options.seconds)
            each_us = (cpu_s(gateway) - spent_s) / len(found.seconds) * 1e6
            p50, p99 = found.percentile_ms(50), found.percentile_ms(99)
            add(
                f"{load.name}, {connections} connections",
                f"{found.rate:,.0f}/s",
                f">= {load.min_rate:,.0f}/s, p99 <= {MAX_P99_MS:g} ms",
                found.rate >= load.min_rate and p99 <= MAX_P99_MS,
                f"{p50:.1f}",
                f"{p99:.1f}",
                f"{each_us:.0f}",
            )
    before_mb = gateway.memory_info().rss / 2**20
    spent_s = cpu_s(gateway)
    await asyncio.sleep(IDLE_S)
    idle = (cpu_s(gateway) - spent_s) / IDLE_S * 100
    add(f"CPU, idle for {IDLE_S:g} s", f"{idle:.2f} %", f"<= {MAX_IDLE_PERCENT:g} %", idle <= MAX_IDLE_PERCENT)
    running = ids[NUM_SEEDED // 3 : 2 * NUM_SEEDED // 3]
    streams = await open_streams(settings.port, running, options.streams)
    rss_mb = gateway.memory_info().rss / 2**20
    for writer in streams:
        writer.close()
    add(
        f"memory, {options.streams:,} status streams open",
        f"{rss_mb:.0f} MB ({before_mb:.0f} MB before)",
        f"<= {MAX_STREAMS_MB:g} MB",
        rss_mb <= MAX_STREAMS_MB,
    )
    Console().print(table)
    return all(verdicts)


def main() -> int:
    """Run the benchmark in a folder that is removed afterwards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="seconds per kind of request")
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--streams", type=int, default=1000)
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[-1]})
    (port,) = free_ports(1)
    with tempfile.TemporaryDirectory(prefix="upscaler-bench-") as folder:
        settings = Settings(data=Path(folder), port=port, tls_port=0)
        ids = asyncio.run(fill(settings))
        bell = Bell(settings.run_dir, "dispatcher")  # a dispatcher that is rung, and does not come
        process = start_gateway(settings, cores[0], settings.data / "gateway.log")
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                return 0 if runner.run(measure_all(settings, psutil.Process(process.pid), ids, options)) else 1
        finally:
            process.terminate()
            process.wait(30.0)
            bell.close()


if __name__ == "__main__":
    sys.exit(main())

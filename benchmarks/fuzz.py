"""Does the server hold to its own OpenAPI document, whatever is sent? Schemathesis asks, with all its checks.

    python -m benchmarks.fuzz [--cases 5000] [--seed 1]

The gateway runs in this process on an empty data folder; slots that answer at once stand behind it. Rounds with new
random data follow each other until there are enough cases. Exits 1 when an answer is a server error, is not as the
document says, or is not what the data deserved; each such answer is printed with the request that brings it about.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import schemathesis
import structlog
from hypothesis import strategies as st
from rich.console import Console
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events, from_schema

from server.app import create_app
from server.endpoints import ENDPOINTS
from server.ledger import Ledger, Outcome, SlotRow
from server.settings import Settings
from server.wakeup import ring

POLL_S = 0.005
KEEP_IDS = 200
FOREVER = 1e12  # a heartbeat that never grows old
FACTS = {
    "key": "out/ab/0123456789_picture.png",
    "content_type": "image/png",
    "file_name": "picture.png",
    "file_size": 4,
    "width": 2,
    "height": 2,
    "seed": 7,
    "timings": {"inference": 1.5},
    "caption": "a picture",
}

URLS = r"^https?://[a-z]{1,9}(\.[a-z]{2,9}){0,2}(:[1-9][0-9]{1,3})?(/[A-Za-z0-9._~-]{0,9}){0,3}$"
OPERATIONS = [
    # Owners and names are listed apart; not every pair of them is an endpoint.
    {
        "include-path-regex": r"^/queue/[^/]+/[^/]+$",
        "checks": {"positive_data_acceptance": {"expected-statuses": ["2xx", "404", "422"]}},
    },
    # What a request or an upload that exists answers is up to what became of it, not to the data of this call.
    {
        "include-path-regex": "/requests/|/complete$",
        "checks": {"positive_data_acceptance": {"expected-statuses": ["2xx", "400", "401", "404", "422"]}},
    },
    # fal reads inputs leniently, and so do we: `"2"` and `true` are numbers. Some of fal's models are not here.
    {
        "include-path-regex": "^/run/",
        "checks": {
            "negative_data_rejection": {"enabled": False},
            "positive_data_acceptance": {"expected-statuses": ["2xx", "404", "422"]},
        },
    },
]
# Not GET: below /files/ any path may be a file's, which then is missing (404) rather than not to be read (405).
UNEXPECTED_METHODS = ["put", "post", "delete", "patch", "trace", "options"]


@dataclass
class Findings:
    """What came out: how many requests were sent, and what was wrong with which answers."""

    num_cases: int = 0
    faults: dict[str, str] = field(default_factory=dict)
    on_fault: Callable[[str, str], None] = lambda title, command: None

    def add(self, title: str, command: str) -> None:
        """Keep the first of each kind of fault."""
        if title not in self.faults:
            self.faults[title] = command
            self.on_fault(title, command)


def name_only_usable_urls(context: Any, document: dict[str, Any]) -> None:
    """Before random data is made: URLs in valid requests shall be such that no server could refuse them.

    The document says less than the server demands, for a schema cannot say which URL leads to a picture.
    """
    for operations in document["paths"].values():
        for operation in operations.values():
            for parameter in operation.get("parameters", []):
                if parameter["name"] == "fal_webhook":
                    parameter["schema"]["pattern"] = URLS
    for schema in document["components"]["schemas"].values():
        if "image_url" in schema.get("properties", {}):
            schema["properties"]["image_url"]["pattern"] = URLS


class Slots:
    """Stands for dispatcher and slots: every request that waits is done at once."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._ledger = settings, Ledger.open(settings)
        self._stopping = threading.Event()
        self.ids = ["00000000-0000-4000-8000-000000000000"]

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Work in a thread of its own."""
        thread = threading.Thread(target=asyncio.run, args=(self._work(),))
        thread.start()
        try:
            yield
        finally:
            self._stopping.set()
            thread.join()
            self._ledger.close()

    async def _work(self) -> None:
        await self._ledger.put_slot(SlotRow("0", "ready", "cpu", "none", heartbeat=FOREVER))
        while not self._stopping.is_set():
            waiting = await self._ledger.queued(20)
            for row in waiting:
                if await self._ledger.claim(row.id, "0", "token"):
                    body = ENDPOINTS[row.endpoint].output(FACTS)
                    await self._ledger.complete(row.id, "token", Outcome(status=200, body=body, inference_s=1.5))
                    self.ids[:] = [*self.ids[-KEEP_IDS:], row.id]
            if waiting:
                ring(self._settings.run_dir, "gateway")
            else:
                await asyncio.sleep(POLL_S)


def fuzz(settings: Settings, findings: Findings, *, max_examples: int, seed: int) -> None:
    """Send up to `max_examples` random requests per operation, and those that cover its document.

    What is wrong is added to `findings`. The loop that serves the gateway ends with the process.
    """
    slots = Slots(settings)
    # Ids that exist, beside those that do not: else no request would get past the first look-up.
    schemathesis.openapi.format("uuid", st.one_of(st.sampled_from(slots.ids), st.uuids().map(str)))
    schemathesis.hook("before_load_schema")(name_only_usable_urls)
    config = SchemathesisConfig.from_dict(
        {
            "seed": seed,
            "cache": {"enabled": False},
            "generation": {"max-examples": max_examples, "database": "none"},
            "phases": {"coverage": {"unexpected-methods": UNEXPECTED_METHODS}},
            "operations": OPERATIONS,
        }
    )
    with slots.at_work():
        schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(settings), config=config)
        for event in from_schema(schema).execute():
            if isinstance(event, events.ScenarioFinished):
                collect(findings, event.recorder)
            elif isinstance(event, (events.NonFatalError, events.FatalError)):
                error = event.value if isinstance(event, events.NonFatalError) else event.exception
                findings.add(f"error: {error!r}"[:600], "")


def collect(findings: Findings, recorder: Any) -> None:
    """Add what one scenario found."""
    findings.num_cases += len(recorder.interactions)
    for case_id, checks in recorder.checks.items():
        for check in checks:
            if check.failure_info is not None:
                failure = check.failure_info.failure
                title = f"{recorder.label}: {failure.title}: {failure.message}"[:600]
                findings.add(title, recorder.cases[case_id].value.as_curl_command())


def main() -> int:
    """Go on until there are enough cases; print what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--examples", type=int, default=100, help="random requests per operation and round")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    structlog.configure(processors=[], logger_factory=structlog.ReturnLoggerFactory())
    console = Console(soft_wrap=True, highlight=False)
    findings = Findings(on_fault=lambda title, command: console.print(f"\n{title}\n{command}", markup=False))
    for seed in itertools.count(options.seed):
        with tempfile.TemporaryDirectory(prefix="upscaler-fuzz-", ignore_cleanup_errors=True) as folder:
            fuzz(Settings(data=Path(folder), tls_port=0), findings, max_examples=options.examples, seed=seed)
        console.print(f"{findings.num_cases:,} requests, {len(findings.faults)} kinds of fault (seed {seed})")
        if findings.num_cases >= options.cases:
            break
    return 1 if findings.faults else 0


if __name__ == "__main__":
    sys.exit(main())

"""How heavy the playground's first page is, and how soon it is seen: `python -m benchmarks.playground`.

A server on this machine, headless Chromium with an empty cache for every visit, medians over several visits. Needs the
browser and Node that the playground's tests use. `painted` is the first contentful paint, `usable` when every control
of the first endpoint is there.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

from tests.acceptance.javascript.programs import Program, chromium, running
from tests.acceptance.live import FAKE, LiveServer

VISITS = 15
ENTRIES = "[...performance.getEntriesByType('resource'), ...performance.getEntriesByType('navigation')]"
FIGURES = {
    "bytes, as sent": f"{ENTRIES}.reduce((sum, entry) => sum + entry.transferSize, 0)",
    "bytes, unpacked": f"{ENTRIES}.reduce((sum, entry) => sum + entry.decodedBodySize, 0)",
    "requests": f"{ENTRIES}.length",
    "painted, ms": "performance.getEntriesByName('first-contentful-paint')[0].startTime",
    "usable, ms": "performance.getEntriesByName('usable')[0].startTime",
}


def main() -> None:
    """Print the medians, with least and most."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        server = LiveServer(Path(folder) / "data", FAKE)
        server.start()
        try:
            with running(Path(folder) / "node.log", "playground", chromium()) as program:
                visit(program, server.url)  # the browser starts
                visits = [visit(program, server.url) for _ in range(VISITS)]
        finally:
            server.stop()
    for name in FIGURES:
        figures = [one[name] for one in visits]
        middle, least, most = statistics.median(figures), min(figures), max(figures)
        sys.stdout.write(f"{name:<18}{middle:>8.0f}   ({least:.0f} to {most:.0f})\n")


def visit(program: Program, url: str) -> dict[str, float]:
    """The figures of one visit, in a browser profile that has never been there."""
    program.perform("open", client="playground", base=url)
    return {
        name: program.perform("ask", client="playground", base=url, expression=expression).value
        for name, expression in FIGURES.items()
    }


if __name__ == "__main__":
    main()

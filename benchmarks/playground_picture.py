"""Photograph the playground for the README: `python -m benchmarks.playground_picture`.

The picture in it is what the pocket weights make of a piece of a photograph at the endpoint's defaults. Needs the
browser and Node that the playground's tests use.
"""

from __future__ import annotations

import base64
import io
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.quality import HELD_OUT, halved
from tests.acceptance.javascript.programs import chromium, running
from tests.acceptance.live import REAL, LiveServer

SIZE = {"width": 1280, "height": 704}
PIECE = (210, 0, 466, 192)  # of the photograph's half, px
PROMPT = "a nurse in camouflage, photograph, sharp"
PHASE = "document.querySelector('#phase').textContent"
PAIR = "document.querySelector('#comparison').dataset.state === 'pair'"
RESULT = PAIR + " && document.querySelector('#comparison .tag.right').textContent === 'After'"
OUT = Path(__file__).parent / "pictures" / "playground.jpg"


def main() -> None:
    """Drop a piece of a photograph, run the default endpoint, and take the page when both pictures are there."""
    with Image.open(HELD_OUT / "clinic.png") as photo:
        small = halved(photo.convert("RGB")).crop(PIECE)
    file = io.BytesIO()
    small.save(file, "PNG")
    dropped = {"name": "clinic.png", "type": "image/png", "base64": base64.b64encode(file.getvalue()).decode()}
    with tempfile.TemporaryDirectory(prefix="playground-") as folder:
        server, shot = LiveServer(Path(folder) / "data", REAL), Path(folder) / "page.png"
        server.start()
        try:
            with running(Path(folder) / "node.log", "playground", chromium()) as program:

                def do(verb: str, **options: Any) -> Any:
                    answer = program.perform(verb, client="playground", base=server.url, **options)
                    if answer.error is not None:
                        raise RuntimeError(f"{verb}: {answer.error}")
                    return answer.value

                do("open", **SIZE)
                do("hand", event="drop", **dropped)
                do("fill", selector="#field-prompt", value=PROMPT)
                do("click", selector="#run")
                while not (phase := do("ask", expression=PHASE)).startswith("Done"):
                    if phase.startswith("Failed"):
                        raise RuntimeError(phase)
                    time.sleep(1.0)
                do("until", expression=RESULT)
                do("screenshot", path=str(shot))
        finally:
            server.stop()
        Image.open(shot).convert("RGB").save(OUT, quality=88)


if __name__ == "__main__":
    main()

"""The endpoints in this process, with the fields that a caller would send: what the benchmarks measure."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from pipelines.delivery import RECIPE_KEYWORD
from pipelines.progress import Report
from server.endpoints import ENDPOINTS
from server.settings import Settings
from server.slot import LocalRun

SEED = 42
SCALE_FIELDS = {"fal-ai/creative-upscaler": "scale", "clarityai/crystal-upscaler": "scale_factor"}
"""What the factor of enlargement is called where it is not `upscale_factor`."""
CREATIVITY_RANGE = {"clarityai/crystal-upscaler": 10.0}
"""Full creativity where it is not 1."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """A result: the picture, its recipe, seconds by stage, and what the log said."""

    image: Image.Image
    recipe: dict[str, Any]
    timings: dict[str, float]
    remarks: list[str]


class Local:
    """All endpoints on the pocket weights and this CPU."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        settings = Settings(data=Path(self._folder.name), weights="pocket", max_output_mp=512, max_input_mp=512)
        self._run = LocalRun(settings, device="cpu")

    def make(
        self, endpoint: str, image: Image.Image, *, scale: float = 2.0, creativity: float | None = None, **fields: Any
    ) -> Made:
        """Upscale with an endpoint's defaults but for what is given.

        Args:
            endpoint: fal's id, `owner/alias`.
            image: The input, sent as PNG.
            scale: Factor of the sides.
            creativity: 0..1, stretched to the endpoint's own range; None for its default.
            fields: More fields under fal's names.
        """
        model = ENDPOINTS[endpoint]
        fields = {
            "image_url": "https://example.com/image.png",
            SCALE_FIELDS.get(endpoint, "upscale_factor"): scale,
        } | fields
        if "seed" in model.input_model.model_fields:
            fields.setdefault("seed", SEED)
        if creativity is not None:
            fields["creativity"] = creativity * CREATIVITY_RANGE.get(endpoint, 1.0)
        source = BytesIO()
        image.save(source, format="PNG", compress_level=1)
        remarks: list[str] = []

        def listen(report: Report) -> None:
            if report.message is not None:
                remarks.append(report.message)

        output = Path(self._folder.name) / "result.png"
        rendered = self._run.make(model.job(model.parse(fields)), source.getvalue(), output, listen)
        with Image.open(output) as file:
            recipe = json.loads(file.text[RECIPE_KEYWORD])  # type: ignore[attr-defined]  # only PNG files have it
            result = file.convert("RGB")
        return Made(image=result, recipe=recipe, timings=rendered.timings, remarks=remarks)

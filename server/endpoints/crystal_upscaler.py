"""`clarityai/crystal-upscaler`: fal's fields and what each is called in the pipeline.

| fal            | pipeline                                                                               |
|----------------|----------------------------------------------------------------------------------------|
| `scale_factor` | `scale`                                                                                |
| `creativity` c | `strength` 0.10 + 0.045 c and `controlnet_conditioning_scale` 1 - 0.04 c; c = 0 is 0, 1 |
|                | `face_restoration` 1 - 0.06 c                                                          |

fal has no seed here: equal requests give equal pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from server.endpoints.endpoint import Endpoint, Job
from server.endpoints.fields import Text
from server.schemas import Image, stored_image

LEAST_STRENGTH, STRENGTH_PER_CREATIVITY = 0.10, 0.045
CONTROL_LOSS_PER_CREATIVITY, FACE_LOSS_PER_CREATIVITY = 0.04, 0.06


class CrystalUpscalerInput(BaseModel):
    """The input as fal documents it: names, order, defaults, ranges and words."""

    model_config = ConfigDict(allow_inf_nan=False)

    image_url: Text = Field(
        description="URL to the input image",
        examples=["https://v3b.fal.media/files/b/zebra/eW3waMFDT-2_7Pq8j3r9d_upscaled.png"],
    )
    scale_factor: float = Field(2, ge=1, le=200, description="Scale factor")
    creativity: float = Field(0, ge=0, le=10, description="Creativity level for upscaling")


class CrystalUpscalerOutput(BaseModel):
    """The output as fal documents it."""

    images: list[Image] = Field(
        description="List of upscaled images",
        examples=[["https://v3b.fal.media/files/b/penguin/sVriwxLaU3fVTz5B-xBBC_upscaled.png"]],
    )


def unsupported(parsed: CrystalUpscalerInput) -> list[dict[str, Any]]:
    """Nothing that fal offers is refused."""
    return []


def translate(parsed: CrystalUpscalerInput) -> Job:
    """The job for the pipeline."""
    creativity = float(parsed.creativity)
    return {
        "pipeline": "crystal_upscaler",
        "params": {
            "scale": float(parsed.scale_factor),
            "strength": LEAST_STRENGTH + STRENGTH_PER_CREATIVITY * creativity if creativity else 0.0,
            "controlnet_conditioning_scale": 1 - CONTROL_LOSS_PER_CREATIVITY * creativity,
            "face_restoration": 1 - FACE_LOSS_PER_CREATIVITY * creativity,
        },
        "image": parsed.image_url,
        "warnings": [],
    }


def output(result: Mapping[str, Any]) -> dict[str, Any]:
    """fal's output for a stored picture."""
    return {"images": [stored_image(result)]}


CRYSTAL_UPSCALER = Endpoint(
    id="clarityai/crystal-upscaler",
    title="Crystal Upscaler",
    description="An advanced image enhancement tool designed specifically for facial details and portrait photography, "
    "utilizing Clarity AI's upscaling technology.",
    category="image-to-image",
    input_model=CrystalUpscalerInput,
    output_model=CrystalUpscalerOutput,
    unsupported=unsupported,
    translate=translate,
    output=output,
)

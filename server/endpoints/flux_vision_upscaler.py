"""`fal-ai/flux-vision-upscaler`: fal's fields and what each is called in the pipeline.

| fal                     | pipeline              |
|-------------------------|-----------------------|
| `creativity`            | `strength`            |
| `upscale_factor`        | `scale`               |
| `guidance`              | `guidance_scale`      |
| `steps`                 | `num_inference_steps` |
| `enable_safety_checker` | `check_safety`        |

`seed` has one name in both worlds. There is no prompt: the pipeline captions the picture.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from server.endpoints.endpoint import Endpoint, Job
from server.endpoints.fields import Seed, Text
from server.schemas import Image, rounded, stored_image


class FluxVisionUpscalerInput(BaseModel):
    """The input as fal documents it: names, order, defaults, ranges and words."""

    model_config = ConfigDict(allow_inf_nan=False)

    image_url: Text = Field(
        description="The URL of the image to upscale.",
        examples=["https://storage.googleapis.com/falserverless/gallery/NOCA_Mick-Thompson.resized.resized.jpg"],
    )
    upscale_factor: float = Field(2, ge=1, le=4, description="The upscale factor (1-4x).")
    seed: Seed | None = Field(
        None, description="The seed to use for the upscale. If not provided, a random seed will be used."
    )
    creativity: float = Field(
        0.3,
        ge=0,
        le=1,
        description="The creativity of the model. The higher the creativity, the more the model will deviate from the "
        "original. Refers to the denoise strength of the sampling.",
    )
    guidance: float = Field(
        1, ge=1, le=4, description="CFG/guidance scale (1-4). Controls how closely the model follows the prompt."
    )
    steps: int = Field(20, ge=4, le=50, description="Number of inference steps (4-50).")
    enable_safety_checker: bool = Field(True, description="Whether to enable the safety checker.")


class FluxVisionUpscalerOutput(BaseModel):
    """The output as fal documents it."""

    image: Image = Field(description="The URL of the generated image.")
    seed: int = Field(description="The seed used to generate the image.", examples=[42])
    timings: dict[str, float] = Field(
        description="The timings of the different steps in the workflow.", examples=[{"inference": 52.8}]
    )
    caption: str = Field(
        description="The VLM-generated caption describing the upscaled image.",
        examples=[
            "A highly detailed upscaled photograph featuring sharp edges and enhanced textures. The image shows "
            "improved clarity in fine details with natural color preservation and minimal artifacts, demonstrating "
            "the AI-enhanced resolution increase."
        ],
    )


def unsupported(parsed: FluxVisionUpscalerInput) -> list[dict[str, Any]]:
    """Nothing that fal offers is refused."""
    return []


def translate(parsed: FluxVisionUpscalerInput) -> Job:
    """The job for the pipeline; a seed is drawn here, so that every attempt makes the same picture."""
    return {
        "pipeline": "flux_vision_upscaler",
        "params": {
            "scale": float(parsed.upscale_factor),
            "strength": float(parsed.creativity),
            "guidance_scale": float(parsed.guidance),
            "num_inference_steps": parsed.steps,
            "seed": parsed.seed if parsed.seed is not None else secrets.randbelow(2**32),
            "check_safety": parsed.enable_safety_checker,
        },
        "image": parsed.image_url,
        "warnings": [],
    }


def output(result: Mapping[str, Any]) -> dict[str, Any]:
    """fal's output for a stored picture; seconds by stage, `inference` for all of them."""
    return {
        "image": stored_image(result),
        "seed": result["seed"],
        "timings": rounded(result["timings"]),
        "caption": result["caption"],
    }


FLUX_VISION_UPSCALER = Endpoint(
    id="fal-ai/flux-vision-upscaler",
    title="Flux Vision Upscaler",
    description="Flux Vision Upscaler for magnify/upscaling images with high fidelity and creativity.",
    category="image-to-image",
    input_model=FluxVisionUpscalerInput,
    output_model=FluxVisionUpscalerOutput,
    unsupported=unsupported,
    translate=translate,
    output=output,
)

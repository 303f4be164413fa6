"""`fal-ai/clarity-upscaler`: fal's fields and what each is called in the pipeline.

| fal                     | pipeline                        |
|-------------------------|---------------------------------|
| `creativity`            | `strength`                      |
| `resemblance`           | `controlnet_conditioning_scale` |
| `upscale_factor`        | `scale`                         |
| `enable_safety_checker` | `check_safety`                  |

The other parameters have one name in both worlds. What the open program has beyond fal (`handfix`, `pattern`,
`sharpen`, tile sizes) is, like every unknown field, accepted and named in a warning.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from server.endpoints.endpoint import Endpoint, Job
from server.endpoints.fields import Prompt, Seed, Text
from server.schemas import Image, rounded, stored_image

PROMPT = "masterpiece, best quality, highres"
NEGATIVE_PROMPT = "(worst quality, low quality, normal quality:2)"


class ClarityUpscalerInput(BaseModel):
    """The input as fal documents it: names, order, defaults, ranges and words."""

    model_config = ConfigDict(allow_inf_nan=False)

    image_url: Text = Field(
        description="The URL of the image to upscale.",
        examples=["https://storage.googleapis.com/falserverless/gallery/NOCA_Mick-Thompson.resized.resized.jpg"],
    )
    prompt: Prompt = Field(
        PROMPT,
        description="The prompt to use for generating the image. Be as descriptive as possible for best results.",
        examples=[PROMPT],
    )
    upscale_factor: float = Field(2, ge=1, le=4, description="The upscale factor")
    negative_prompt: Prompt = Field(
        NEGATIVE_PROMPT,
        description="The negative prompt to use. Use it to address details that you don't want in the image.",
        examples=[NEGATIVE_PROMPT],
    )
    creativity: float = Field(
        0.35,
        ge=0,
        le=1,
        description="The creativity of the model. The higher the creativity, the more the model will deviate from the "
        "prompt.\nRefers to the denoise strength of the sampling.",
    )
    resemblance: float = Field(
        0.6,
        ge=0,
        le=1,
        description="The resemblance of the upscaled image to the original image. The higher the resemblance, the more "
        "the model will try to keep the original image.\nRefers to the strength of the ControlNet.",
    )
    guidance_scale: float = Field(
        4,
        ge=0,
        le=20,
        description="The CFG (Classifier Free Guidance) scale is a measure of how close you want\n"
        "the model to stick to your prompt when looking for a related image to show you.",
    )
    num_inference_steps: int = Field(18, ge=4, le=50, description="The number of inference steps to perform.")
    seed: Seed | None = Field(
        None,
        description="The same seed and the same prompt given to the same version of Stable Diffusion\n"
        "will output the same image every time.",
    )
    enable_safety_checker: bool = Field(True, description="If set to false, the safety checker will be disabled.")


class ClarityUpscalerOutput(BaseModel):
    """The output as fal documents it."""

    image: Image = Field(description="The URL of the generated image.")
    seed: int = Field(description="The seed used to generate the image.")
    timings: dict[str, float] = Field(description="The timings of the different steps in the workflow.")


def unsupported(parsed: ClarityUpscalerInput) -> list[dict[str, Any]]:
    """Nothing that fal offers is refused."""
    return []


def translate(parsed: ClarityUpscalerInput) -> Job:
    """The job for the pipeline; a seed is drawn here, so that every attempt makes the same picture."""
    return {
        "pipeline": "clarity_upscaler",
        "params": {
            "prompt": parsed.prompt,
            "negative_prompt": parsed.negative_prompt,
            "scale": float(parsed.upscale_factor),
            "strength": float(parsed.creativity),
            "controlnet_conditioning_scale": float(parsed.resemblance),
            "guidance_scale": float(parsed.guidance_scale),
            "num_inference_steps": parsed.num_inference_steps,
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
    }


CLARITY_UPSCALER = Endpoint(
    id="fal-ai/clarity-upscaler",
    title="Clarity Upscaler",
    description="Clarity upscaler for upscaling images with high very fidelity.",
    category="image-to-image",
    input_model=ClarityUpscalerInput,
    output_model=ClarityUpscalerOutput,
    unsupported=unsupported,
    translate=translate,
    output=output,
)

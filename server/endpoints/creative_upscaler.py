"""`fal-ai/creative-upscaler`: fal's fields and what each is called in the pipeline.

| fal                    | pipeline                        |
|------------------------|---------------------------------|
| `creativity`           | `strength`                      |
| `shape_preservation`   | `controlnet_conditioning_scale` |
| `override_size_limits` | `allow_large`                   |
| `model_type`           | `family`                        |
| `skip_ccsr`            | not `restore`                   |
| `enable_safety_checks` | `check_safety`                  |
| `base_model_url`       | `base_model`                    |
| `additional_lora_*`    | `lora`, `lora_scale`            |
| `additional_embedding_url` | `embedding`                 |

The other parameters have one name in both worlds.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

from server.endpoints.endpoint import Endpoint, Job
from server.endpoints.fields import Prompt, Seed, Text
from server.schemas import Image, stored_image

NEGATIVE_PROMPT = (
    "blurry, low resolution, bad, ugly, low quality, pixelated, interpolated, compression artifacts, noisey, grainy"
)
FIELDS = {
    "family": "model_type",
    "base_model": "base_model_url",
    "lora": "additional_lora_url",
    "embedding": "additional_embedding_url",
}
"""Parameters whose values can turn out to be of no use only where the models are."""


def hint(text: str) -> JsonDict:
    """What this server adds to a field's description, which stays fal's own."""
    return {"x-hint": text}


class CreativeUpscalerInput(BaseModel):
    """The input as fal documents it: names, order, defaults, ranges and words."""

    model_config = ConfigDict(allow_inf_nan=False, protected_namespaces=())

    model_type: Literal["SD_1_5", "SDXL"] = Field(
        "SD_1_5",
        description="The type of model to use for the upscaling. Default is SD_1_5",
        examples=["SD_1_5", "SDXL"],
    )
    image_url: Text = Field(
        description="The image to upscale.",
        examples=[
            "https://storage.googleapis.com/falserverless/model_tests/upscale/owl.png",
            "https://storage.googleapis.com/falserverless/gallery/blue-bird.jpeg",
        ],
    )
    prompt: Prompt | None = Field(
        None,
        description="The prompt to use for generating the image. Be as descriptive as possible for best results. "
        "If no prompt is provide BLIP2 will be used to generate a prompt.",
    )
    scale: float = Field(
        2,
        ge=1,
        le=5,
        description="The scale of the output image. The higher the scale, the bigger the output image will be.",
    )
    creativity: float = Field(0.5, ge=0, le=1, description="How much the output can deviate from the original")
    detail: float = Field(1, ge=0, le=5, description="How much detail to add")
    shape_preservation: float = Field(
        0.25, ge=0, le=3, description="How much to preserve the shape of the original image"
    )
    prompt_suffix: Prompt = Field(
        " high quality, highly detailed, high resolution, sharp",
        description="The suffix to add to the prompt. This is useful to add a common ending to all prompts such as "
        "'high quality' etc or embedding tokens.",
    )
    negative_prompt: Prompt = Field(
        NEGATIVE_PROMPT,
        description="The negative prompt to use.Use it to address details that you don't want\n"
        "in the image. This could be colors, objects, scenery and even the small details\n"
        "(e.g. moustache, blurry, low resolution).",
        examples=[NEGATIVE_PROMPT],
    )
    seed: Seed | None = Field(
        None,
        description="The same seed and the same prompt given to the same version of Stable Diffusion\n"
        "will output the same image every time.",
        examples=[42],
    )
    guidance_scale: float = Field(
        7.5,
        ge=0,
        le=16,
        description="The CFG (Classifier Free Guidance) scale is a measure of how close you want\n"
        "the model to stick to your prompt when looking for a related image to show you.",
    )
    num_inference_steps: int = Field(
        20,
        ge=1,
        le=200,
        description="The number of inference steps to use for generating the image. The more steps\n"
        "the better the image will be but it will also take longer to generate.",
    )
    enable_safety_checks: bool = Field(
        True,
        description="If set to true, the resulting image will be checked whether it includes any\n"
        "potentially unsafe content. If it does, it will be replaced with a black\n"
        "image.",
    )
    skip_ccsr: bool = Field(
        False,
        description="If set to true, the image will not be processed by the CCSR model before\n"
        "being processed by the creativity model.",
    )
    override_size_limits: bool = Field(False, description="Allow for large uploads that could take a very long time.")
    base_model_url: Text | None = Field(
        None,
        description="The URL to the base model to use for the upscaling",
        json_schema_extra=hint("A safetensors checkpoint, or a repository owner/name of the model hub."),
    )
    additional_lora_url: Text | None = Field(
        None,
        description="The URL to the additional LORA model to use for the upscaling. Default is None",
        json_schema_extra=hint("A safetensors file of the family that model_type names."),
    )
    additional_lora_scale: float = Field(
        1, description="The scale of the additional LORA model to use for the upscaling. Default is 1.0"
    )
    additional_embedding_url: Text | None = Field(
        None,
        description="The URL to the additional embeddings to use for the upscaling. Default is None",
        json_schema_extra=hint(
            "The word for it in prompts is the file's name without its ending; 'embedding' if it is a data URI."
        ),
    )


class CreativeUpscalerOutput(BaseModel):
    """The output as fal documents it."""

    image: Image = Field(description="The generated image file info.")
    seed: int = Field(
        description="Seed of the generated Image. It will be the same value of the one passed in the\n"
        "input or the randomly generated that was used in case none was passed."
    )


def translate(parsed: CreativeUpscalerInput) -> Job:
    """The job for the pipeline; a seed is drawn here, so that every attempt makes the same picture."""
    files = {
        "base_model": parsed.base_model_url,
        "lora": parsed.additional_lora_url,
        "embedding": parsed.additional_embedding_url,
    }
    return {
        "pipeline": "creative_upscaler",
        "kind": f"creative_upscaler {parsed.model_type}",
        "params": {
            "family": parsed.model_type,
            "prompt": parsed.prompt or "",
            "prompt_suffix": parsed.prompt_suffix,
            "negative_prompt": parsed.negative_prompt,
            "scale": float(parsed.scale),
            "strength": float(parsed.creativity),
            "detail": float(parsed.detail),
            "controlnet_conditioning_scale": float(parsed.shape_preservation),
            "guidance_scale": float(parsed.guidance_scale),
            "num_inference_steps": parsed.num_inference_steps,
            "seed": parsed.seed if parsed.seed is not None else secrets.randbelow(2**32),
            "allow_large": parsed.override_size_limits,
            "restore": not parsed.skip_ccsr,
            "check_safety": parsed.enable_safety_checks,
            "lora_scale": float(parsed.additional_lora_scale),
        },
        "image": parsed.image_url,
        "files": {name: url for name, url in files.items() if url},
        "fields": dict(FIELDS),
        "warnings": [],
    }


def output(result: Mapping[str, Any]) -> dict[str, Any]:
    """fal's output for a stored picture."""
    return {
        "image": stored_image(result),
        "seed": result["seed"],
    }


CREATIVE_UPSCALER = Endpoint(
    id="fal-ai/creative-upscaler",
    title="Creative Upscaler",
    description="Create creative upscaled images.",
    category="image-to-image",
    input_model=CreativeUpscalerInput,
    output_model=CreativeUpscalerOutput,
    unsupported=lambda parsed: [],
    translate=translate,
    output=output,
)

"""`fal-ai/clarity-upscaler`: the published recipe of Clarity, on this project's engine.

Stages, in order: decode (`images`), plan (`planning`), then for each pass (`staged`) pre-stage, prompt, VAE encode,
tiled denoising, VAE decode with the input's tones; PNG (`delivery`), safety check (`guard`). Factors above 2 are made
in passes of at most 2, each with 0.8 of the creativity before it and the next seed, without a PNG between them.

The tile ControlNet sees the pass's input enlarged by Lanczos, in soft mode: its residuals are weighted 0.825^(12 - i),
0.1 at the finest level to 1 in the middle, "My prompt is more important" in A1111. The sampler is DPM++ 3M SDE on
Karras' curve, with one noise for the whole picture. The detail LoRAs that the original builds into its prompt are the
operator's to configure.

Papers: SDEdit (arXiv 2108.01073), MultiDiffusion (arXiv 2302.08113), ControlNet (arXiv 2302.05543), DPM-Solver++ (arXiv
2211.01095). Full weights: Stable Diffusion 1.5 or a model trained from it (OpenRAIL-M), tile ControlNet (OpenRAIL), an
ESRGAN-class network in `upscaler/`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from pipelines.adapters import applied, match
from pipelines.delivery import Result, describe_tiles, opaque, recipe_of
from pipelines.errors import ModelsUnusable
from pipelines.guard import deliver_checked, may_show
from pipelines.images import decode
from pipelines.models import Family, Models
from pipelines.planning import Limits, check_memory, plan_size
from pipelines.progress import Progress, Stages
from pipelines.staged import Pass, StagedUpscale, Style, in_doublings
from weights.detect import FAMILY_NAMES, SD_1_5
from weights.fetch import WeightFile
from weights.header import UnsuitableFile

NAME = "clarity_upscaler"
MAX_TILE_PX = 896
"""112 latents, the shorter side of the published tile."""
TILE_BATCH = {"cpu": 2, "cuda": 16}
PASS_FADE = 0.8
NO_SAFETY_CHECKER = "no safety checker in this weight set: the picture was not checked"


class DetailLora(NamedTuple):
    """A LoRA that every picture is made with, and its weight."""

    file: WeightFile
    scale: float

    @classmethod
    def at(cls, path: Path, scale: float) -> DetailLora:
        """The LoRA in a file of the operator's."""
        with path.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        return cls(WeightFile(path=path, name=path.name, sha256=sha256), scale)


@dataclass(frozen=True, kw_only=True)
class Params:
    """What decides the picture, in the pipeline's own words."""

    prompt: str
    negative_prompt: str
    scale: float  # 1..4, output side / input side
    strength: float  # 0..1, of the first pass; 0 returns the pre-stage picture
    controlnet_conditioning_scale: float  # 0..1, in soft mode
    guidance_scale: float  # 0..20
    num_inference_steps: int  # 4..50, for strength 1
    seed: int
    check_safety: bool = True


class ClarityUpscaler:
    """The pipeline; its models come from `models` at each request.

    Args:
        models: Of one set of weights on one device.
        weights: What recipes say of the set.
        loras: Detail LoRAs for Stable Diffusion 1.5.
    """

    def __init__(self, models: Models, *, weights: dict[str, Any], loras: Sequence[DetailLora] = ()) -> None:
        self.models, self.weights, self.loras = models, weights, tuple(loras)

    def warm_up(self) -> None:
        """Load what a request with the default values needs."""
        self.models.family(SD_1_5)
        self.models.prestage()
        self.models.checker()

    @torch.inference_mode()
    def __call__(self, image: bytes, params: Params, *, limits: Limits, output: BinaryIO, progress: Progress) -> Result:
        """Upscale `image` and write the result to `output` as PNG; see `CreativeUpscaler`."""
        stages = Stages(progress)
        with stages.stage("decode"):
            picture = decode(image, max_pixels=limits.max_input_pixels)
        with stages.stage("models"):
            family, prestage = self.models.family(SD_1_5), self.models.prestage()
            size = plan_size(
                picture.width,
                picture.height,
                params.scale,
                max_pixels=limits.max_output_pixels,
                multiple=family.canvas.padding_multiple,
                way_out="Lower the upscale_factor.",
            )
            needed = family.canvas.bytes_needed(size[1], size[0])
            check_memory(picture.width, picture.height, size, needed=needed)
        started = time.perf_counter()
        passes = plan_passes(picture.width, picture.height, params, size)
        grid = family.canvas.grid(size[1], size[0], max_tile_px=MAX_TILE_PX)
        recipe = recipe_of(
            NAME,
            picture,
            params,
            size,
            self.weights,
            tiles=describe_tiles(grid, family.canvas.vae.scale_factor),
            passes=[asdict(one) for one in passes],
            loras=[{"name": lora.file.name, "sha256": lora.file.sha256, "scale": lora.scale} for lora in self.loras],
        )
        style = Style(
            prompt=params.prompt,
            negative_prompt=params.negative_prompt,
            controlnet_conditioning_scale=params.controlnet_conditioning_scale,
            guidance_scale=params.guidance_scale,
            num_inference_steps=params.num_inference_steps,
            kind="dpmpp_3m_sde",
            soft_control=True,
            hint_is_input=True,
            max_tile_px=MAX_TILE_PX,
            tile_batch=TILE_BATCH[self.models.device.type],
        )
        checker = self.models.checker() if params.check_safety else None
        if params.check_safety and checker is None:
            stages.remark("safety", NO_SAFETY_CHECKER)
        stages.may_show = may_show(checker)
        with self._detailed(family):
            bands = StagedUpscale(prestage, style, stages, family=family).bands(opaque(picture), passes)
        deliver_checked(bands, family.canvas.vae, picture, recipe, output, stages, checker)
        stages.timings["inference"] = time.perf_counter() - started
        return Result(width=size[0], height=size[1], seed=params.seed, timings=stages.timings, recipe=recipe)

    def _detailed(self, family: Family) -> ExitStack:
        """The configured LoRAs, at work until the end of the block.

        Raises:
            ModelsUnusable: One of them does not fit.
        """
        with ExitStack() as block:
            for lora in self.loras:
                try:
                    found = match(self.models.lora(lora.file), family.model, FAMILY_NAMES[SD_1_5])
                except UnsuitableFile as error:
                    raise ModelsUnusable(f"The detail LoRA {lora.file.name} {error}.") from error
                block.enter_context(applied(found.layers, lora.scale))
            return block.pop_all()


def plan_passes(width: int, height: int, params: Params, size: tuple[int, int]) -> list[Pass]:
    """The passes from a picture of `width` x `height` px to `size` (width, height); without a strength there is one."""
    final = (size[1], size[0])
    if params.strength == 0:
        return [Pass(size=final, scale=params.scale, strength=0.0, seed=params.seed)]
    passes, reached, factors = [], 1.0, in_doublings(params.scale)
    for i, scale in enumerate(factors):
        reached *= scale
        sides = final if i == len(factors) - 1 else (round(height * reached), round(width * reached))
        strength = params.strength * PASS_FADE**i
        passes.append(Pass(size=sides, scale=scale, strength=strength, seed=params.seed + i))
    return passes

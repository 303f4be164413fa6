"""`fal-ai/creative-upscaler`: enlarge a picture and let a diffusion model redraw its detail.

Stages, in order: decode (`images`), plan (`planning`), pre-stage (`prescale`), text and hint (`sd15`), VAE encode,
tiled denoising and VAE decode in bands with the input's tones (`redraw`, `multidiffusion`, `samplers`), PNG
(`delivery`).

Papers: SDEdit (arXiv 2108.01073) for img2img, MultiDiffusion (arXiv 2302.08113) for the tiles, ControlNet (arXiv
2302.05543). Full weights: Stable Diffusion 1.5 (CreativeML OpenRAIL-M) and its tile ControlNet (OpenRAIL); about 4 GB
of device memory in 16 bits. Pocket weights: 20 MB, CPU.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from pipelines.delivery import Result, deliver, describe_tiles, opaque, recipe_of
from pipelines.images import decode
from pipelines.multidiffusion import tiled_denoise
from pipelines.planning import Limits, check_memory
from pipelines.planning import plan_size as plan_any_size
from pipelines.prescale import PreStage, load_prestage
from pipelines.progress import Progress, Stages
from pipelines.redraw import Bands, Canvas, Tones
from pipelines.samplers import NoiseSampler
from pipelines.schedules import detail_factor, sigma_bounds, sigma_ramp
from pipelines.sd15 import StableDiffusion15
from pipelines.tiling import Grid
from pipelines.unet import Conditioning
from weights.store import WeightStore

MAX_TILE_PX = 768
"""Longest side of a diffusion tile: 96 latents for Stable Diffusion 1.5, half as much again as it was trained on."""
TILE_BATCH = {"cpu": 2, "cuda": 16}
"""Tiles per forward: a GPU is filled from about 32 samples (16 tiles x 2 guidance halves), a CPU by far fewer."""


@dataclass(frozen=True, kw_only=True)
class Params:
    """What decides the picture, in the pipeline's own words."""

    prompt: str
    negative_prompt: str
    scale: float  # 1..5, output side / input side
    strength: float  # 0..1, start noise level on one curve for every sampler; 0 returns the pre-stage picture
    detail: float  # 0..5
    controlnet_conditioning_scale: float  # 0..3; 0 skips the ControlNet
    guidance_scale: float  # 0..16; 1 or less runs the prompt alone
    num_inference_steps: int  # 1..200, for strength 1; fewer run at lower strength
    seed: int
    allow_large: bool = False


class CreativeUpscaler:
    """The pipeline with its models loaded on one device."""

    def __init__(
        self, model: StableDiffusion15, vae: AutoencoderKL, prestage: PreStage, *, weights: dict[str, Any]
    ) -> None:
        self.model = model
        self.canvas = Canvas(vae, size_multiple=model.size_multiple)
        self.prestage = prestage
        self.weights = weights
        self.tile_batch = TILE_BATCH[vae.device.type]

    @classmethod
    def load(cls, store: WeightStore, *, device: str, dtype: torch.dtype | None = None) -> CreativeUpscaler:
        """Load every model from disk; `dtype` is float32 on the CPU and 16-bit on a GPU unless given."""
        target = torch.device(device)
        on_gpu = target.type == "cuda"
        dtype = dtype or (torch.float16 if on_gpu else torch.float32)
        # The VAE overflows float16 on some pictures, bfloat16 has the range.
        vae_dtype = torch.bfloat16 if dtype == torch.float16 else dtype
        vae = AutoencoderKL.from_pretrained(store.folder("vae"), torch_dtype=vae_dtype, local_files_only=True)
        model = StableDiffusion15.load(
            store.folder("sd15"), store.folder("controlnet-tile-sd15"), device=target, dtype=dtype
        )
        prestage = load_prestage(store, target)
        return cls(model, vae.to(target), prestage, weights={"set": store.name, "sha256": store.digest()})

    @torch.inference_mode()
    def __call__(self, image: bytes, params: Params, *, limits: Limits, output: BinaryIO, progress: Progress) -> Result:
        """Upscale `image` and write the result to `output` as PNG.

        Args:
            image: An encoded picture of any kind Pillow reads.
            params: See `Params`.
            limits: Pictures beyond them are refused before a pixel is decoded.
            output: Seekable binary stream.
            progress: Receives reports; raises to stop, which leaves no trace in the pipeline.

        Raises:
            PipelineError: See `pipelines.errors`.
        """
        stages = Stages(progress)
        with stages.stage("decode"):
            picture = decode(image, max_pixels=_input_limit(params, limits))
            width, height = plan_size(
                picture.width, picture.height, params, limits, multiple=self.canvas.padding_multiple
            )
            needed = width * height * self.canvas.bytes_per_px
            check_memory(picture.width, picture.height, (width, height), needed=needed)
        started = time.perf_counter()
        with stages.stage("preupscale"):
            before = self.prestage(opaque(picture), (height, width), on_tile=lambda: stages.beat("preupscale"))
        grid = self.canvas.grid(height, width, max_tile_px=MAX_TILE_PX)
        tiles = describe_tiles(grid, self.canvas.vae.scale_factor)
        recipe = recipe_of("creative_upscaler", picture, params, (width, height), self.weights, tiles=tiles)
        bands = self._redraw(before, grid, params, stages) if params.strength > 0 else lambda vae: iter([before])
        deliver(bands, self.canvas.vae, picture, recipe, output, stages)
        stages.timings["inference"] = time.perf_counter() - started
        return Result(width=width, height=height, seed=params.seed, timings=stages.timings, recipe=recipe)

    def _redraw(self, before: Tensor, grid: Grid, params: Params, stages: Stages) -> Bands:
        """Run the diffusion pass; returns what decodes the finished picture."""
        padded = self.canvas.pad(before)
        with stages.stage("prompt"):
            conditioning = self.model.encode(
                params.prompt,
                params.negative_prompt,
                guidance_scale=params.guidance_scale,
                hint=padded,
                controlnet_conditioning_scale=params.controlnet_conditioning_scale,
            )
        return self.canvas.redraw(
            padded,
            (before.shape[-2], before.shape[-1]),
            lambda start: self._denoise(start, grid, conditioning, params, stages),
            Tones.of(params.strength, params.scale),
            stages,
        )

    def _denoise(self, start: Tensor, grid: Grid, conditioning: Conditioning, params: Params, stages: Stages) -> Tensor:
        """Noise the start latents to the level `strength` names and denoise them, (1, C, h, w) float32."""
        sigmas = sigma_ramp(params.strength, params.num_inference_steps, *sigma_bounds(self.model.scheduler_config))
        detail = detail_factor(params.detail, params.strength)
        sampler = NoiseSampler(self.model.scheduler_config, sigmas, "euler", detail=detail)
        generator = torch.Generator("cpu").manual_seed(params.seed)
        noise = torch.randn(start.shape, generator=generator, dtype=torch.float32).to(start.device)
        with stages.stage("denoise", total=sampler.num_steps) as on_step:
            return tiled_denoise(
                self.model,
                sampler.start(start, noise),
                sampler,
                conditioning,
                grid=grid,
                tile_batch=self.tile_batch,
                seed=params.seed,
                on_step=on_step,
            )


def plan_size(width: int, height: int, params: Params, limits: Limits, *, multiple: int = 1) -> tuple[int, int]:
    """Output size (width, height) in px; see `planning.plan_size`."""
    if params.allow_large:
        most, way_out = limits.max_large_output_pixels, ""
    else:
        most = limits.max_output_pixels
        way_out = "Set override_size_limits to true for larger pictures, or lower the scale."
    return plan_any_size(width, height, params.scale, max_pixels=most, multiple=multiple, way_out=way_out)


def _input_limit(params: Params, limits: Limits) -> int:
    return limits.max_large_input_pixels if params.allow_large else limits.max_input_pixels

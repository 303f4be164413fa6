"""`fal-ai/creative-upscaler`: enlarge a picture and let a diffusion model redraw its detail.

Stages, in order: decode (`images`), plan (here), pre-stage (`prescale`), text and hint (`sd15`), VAE encode (`vae`),
tiled denoising (`multidiffusion`, `schedules`), VAE decode in bands (`vae`), colour match (`colour`), PNG (`png`).

Papers: SDEdit (arXiv 2108.01073) for img2img, MultiDiffusion (arXiv 2302.08113) for the tiles, ControlNet (arXiv
2302.05543). Full weights: Stable Diffusion 1.5 (CreativeML OpenRAIL-M) and its tile ControlNet (OpenRAIL); about 4 GB
of device memory in 16 bits. Pocket weights: 20 MB, CPU.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import diffusers
import numpy as np
import psutil
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from pipelines.bands import cut, filter_bands
from pipelines.colour import halo_rows, wavelet_match
from pipelines.errors import ImageTooLarge, InvalidParams, NonFiniteResult
from pipelines.images import Picture, bleed_edges, decode, restore_profile, upscale_alpha
from pipelines.multidiffusion import tiled_denoise
from pipelines.png import PngWriter
from pipelines.prescale import CompactPreStage, Lanczos, PreStage
from pipelines.progress import Progress, Stages
from pipelines.schedules import detail_factor, make_scheduler, sigma_bounds, sigma_ramp
from pipelines.sd15 import Conditioning, StableDiffusion15
from pipelines.tiling import Grid, fit_grid
from pipelines.vae import OnTile, TiledVAE, pad_to_multiple
from weights.compact import load_compact
from weights.store import WeightStore

MAX_TILE_PX = 768
"""Longest side of a diffusion tile: 96 latents for Stable Diffusion 1.5, half as much again as it was trained on."""
TILE_OVERLAP_LATENTS = 8
"""Least overlap of tiles; with ramp weights and moving edges more buys tone, not thinner seams."""
TILE_BATCH = {"cpu": 2, "cuda": 16}
"""Tiles per forward: a GPU is filled from about 32 samples (16 tiles x 2 guidance halves), a CPU by far fewer."""
FAITHFUL_STRENGTH, FREE_STRENGTH = 0.5, 0.8
"""Up to the first, what the input determines is kept: its tones, and what the VAE's round trip would take away. From
the second on nothing is: where structure moves, the old one would show as a ghost."""


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


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Pixels that are accepted; the `large` pair applies where the request allows large pictures."""

    max_input_pixels: int
    max_output_pixels: int
    max_large_input_pixels: int
    max_large_output_pixels: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was made, next to the PNG in `output`."""

    width: int
    height: int
    seed: int
    timings: dict[str, float]
    recipe: dict[str, Any]


MAX_SIDE_PX = 65_535
"""Longest side of a result: what JPEG viewers and most tools can take."""
BYTES_PER_PX = 40
"""Pictures that are in memory at once: source, pre-stage picture, its padded copy (float32) and the VAE's residue."""


class CreativeUpscaler:
    """The pipeline with its models loaded on one device."""

    def __init__(
        self, model: StableDiffusion15, vae: AutoencoderKL, prestage: PreStage, *, weights: dict[str, Any]
    ) -> None:
        self.model = model
        self.vae = TiledVAE(vae.eval(), park_device=torch.device("cpu") if vae.device.type == "cuda" else None)
        self.prestage = prestage
        self.weights = weights
        self.tile_batch = TILE_BATCH[vae.device.type]
        self.padding_multiple = self.vae.scale_factor * max(8, model.size_multiple)

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
        prestage: PreStage = Lanczos()
        if store.has("upscaler-compact-x2"):
            prestage = CompactPreStage(load_compact(store.folder("upscaler-compact-x2")).to(target))
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
            width, height = plan_size(picture.width, picture.height, params, limits, multiple=self.padding_multiple)
            self._check_memory(picture, width, height)
        started = time.perf_counter()
        with stages.stage("preupscale"):
            source = picture.rgb if picture.alpha is None else bleed_edges(picture.rgb, picture.alpha)
            before = self.prestage(to_tensor(source), (height, width), on_tile=lambda: stages.beat("preupscale"))
        grid = self._grid(height, width)
        recipe = self._recipe(picture, params, (width, height), grid)
        bands = self._redraw(before, grid, params, stages) if params.strength > 0 else lambda vae: iter([before])
        with stages.stage("vae_decode"):
            start = output.tell()
            overflowed = False
            try:
                self._write(bands(self.vae), picture, (width, height), recipe, output)
            except NonFiniteResult:
                overflowed = self.vae.dtype != torch.float32
                if not overflowed:
                    raise
            if overflowed:
                stages.remark("vae_decode", "The 16-bit decode overflowed; decoding again in 32 bits.")
                output.truncate(output.seek(start))
                self._write(bands(self.vae.in_float32()), picture, (width, height), recipe, output)
        stages.timings["inference"] = time.perf_counter() - started
        return Result(width=width, height=height, seed=params.seed, timings=stages.timings, recipe=recipe)

    def _check_memory(self, picture: Picture, width: int, height: int) -> None:
        """Refuse what would not fit into memory, rather than be killed for it halfway.

        Raises:
            ImageTooLarge: The picture needs more memory than is free.
        """
        free = psutil.virtual_memory().available
        needed = width * height * (BYTES_PER_PX + self.vae.bytes_per_px)
        if needed > free:
            shrink = math.sqrt(free / needed)
            raise ImageTooLarge(
                f"A result of {width} x {height} pixels needs about {needed / 2**30:.1f} GiB of memory and "
                f"{free / 2**30:.1f} GiB are free.",
                width=picture.width,
                height=picture.height,
                max_width=max(1, int(picture.width * shrink)),
                max_height=max(1, int(picture.height * shrink)),
            )

    def _grid(self, height: int, width: int) -> Grid:
        """Tiles for a picture of `height` x `width` px, padded to what VAE and UNet can halve."""
        factor, multiple = self.vae.scale_factor, self.padding_multiple
        return fit_grid(
            -(-height // multiple) * multiple // factor,
            -(-width // multiple) * multiple // factor,
            max_tile=MAX_TILE_PX // factor,
            overlap=TILE_OVERLAP_LATENTS,
        )

    def _redraw(
        self, before: Tensor, grid: Grid, params: Params, stages: Stages
    ) -> Callable[[TiledVAE], Iterator[Tensor]]:
        """Run the diffusion pass; returns what decodes the finished picture in bands (1, 3, rows, W), float32."""
        padded = pad_to_multiple(before, self.padding_multiple)
        with stages.stage("prompt"):
            conditioning = self.model.encode(
                params.prompt,
                params.negative_prompt,
                guidance_scale=params.guidance_scale,
                hint=padded,
                controlnet_conditioning_scale=params.controlnet_conditioning_scale,
            )
        with stages.stage("vae_encode"):
            start = self.vae.encode(padded, on_tile=lambda: stages.beat("vae_encode")).float()
        final = self._denoise(start, grid, conditioning, params, stages)
        kept = faithfulness(params.strength)
        # Structures of about four pixels of the input are tones: they are known, not to be imagined.
        levels = 2 + round(math.log2(params.scale))

        def match(rows: Tensor, reference: Tensor) -> Tensor:
            return wavelet_match(rows, reference, levels=levels, chroma_levels=max(1, levels - 2), amount=kept)

        def bands(vae: TiledVAE) -> Iterator[Tensor]:
            pairs = _compensated(vae, start, final, padded, weight=kept, on_tile=lambda: stages.beat("vae_decode"))
            return cut(filter_bands(pairs, match, halo=halo_rows(levels)), *before.shape[-2:])

        return bands

    def _denoise(self, start: Tensor, grid: Grid, conditioning: Conditioning, params: Params, stages: Stages) -> Tensor:
        """Noise the start latents to the level `strength` names and denoise them, (1, C, h, w) float32."""
        sigmas = sigma_ramp(params.strength, params.num_inference_steps, *sigma_bounds(self.model.scheduler_config))
        generator = torch.Generator("cpu").manual_seed(params.seed)
        noise = torch.randn(start.shape, generator=generator, dtype=torch.float32).to(start.device)
        with stages.stage("denoise", total=len(sigmas) - 1) as on_step:
            return tiled_denoise(
                self.model,
                start + float(sigmas[0]) * noise,
                make_scheduler(self.model.scheduler_config, sigmas, "euler"),
                conditioning,
                grid=grid,
                tile_batch=self.tile_batch,
                seed=params.seed,
                detail=detail_factor(params.detail, params.strength),
                on_step=on_step,
            )

    def _write(
        self,
        bands: Iterator[Tensor],
        picture: Picture,
        size: tuple[int, int],
        recipe: dict[str, Any],
        output: BinaryIO,
    ) -> None:
        """Write bands as PNG with the picture's own alpha channel and colour profile, and the recipe as text."""
        width, height = size
        alpha = None if picture.alpha is None else np.asarray(upscale_alpha(picture.alpha, (width, height)))
        mode = "RGB" if alpha is None else "RGBA"
        text = {"creative-upscaler": json.dumps(recipe)}
        with PngWriter(output, width, height, mode=mode, icc_profile=picture.icc_profile, text=text) as png:
            top = 0
            for band in bands:
                pixels = to_pixels(band)
                if picture.icc_profile is not None:
                    pixels = np.asarray(restore_profile(Image.fromarray(pixels), picture.icc_profile))
                if alpha is not None:
                    pixels = np.dstack([pixels, alpha[top : top + len(pixels)]])
                png.write(np.ascontiguousarray(pixels))
                top += len(pixels)

    def _recipe(self, picture: Picture, params: Params, size: tuple[int, int], grid: Grid) -> dict[str, Any]:
        """Everything that decides the pixels: it can be read back from the PNG and run again."""
        return {
            "pipeline": "creative_upscaler",
            "params": asdict(params),
            "input": {"width": picture.width, "height": picture.height, "format": picture.format},
            "output": {"width": size[0], "height": size[1]},
            "tiles": {
                "height": grid.tile_height * self.vae.scale_factor,
                "width": grid.tile_width * self.vae.scale_factor,
                "tops": [top * self.vae.scale_factor for top in grid.tops],
                "lefts": [left * self.vae.scale_factor for left in grid.lefts],
            },
            "weights": self.weights,
            "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        }


def plan_size(width: int, height: int, params: Params, limits: Limits, *, multiple: int = 1) -> tuple[int, int]:
    """Output size (width, height) in px for an input of `width` x `height`: each side times the scale, rounded.

    What counts is the picture as it is worked on, with sides padded to `multiple`: a strip of one pixel is cheap to
    send and dear to make.

    Raises:
        InvalidParams: The scale is below 1.
        ImageTooLarge: The output would have more pixels, or a longer side, than is allowed.
    """
    if params.scale < 1:
        raise InvalidParams("scale", f"scale must be at least 1, got {params.scale}")
    most = limits.max_large_output_pixels if params.allow_large else limits.max_output_pixels

    def planned(shrink: float) -> tuple[int, int, float]:
        """The output size for an input shrunk by a factor, and how many times too large it is."""
        sides = [round(max(1, int(side * shrink)) * params.scale) for side in (width, height)]
        padded = [-(-side // multiple) * multiple for side in sides]
        return sides[0], sides[1], max(padded[0] * padded[1] / most, (max(sides) / MAX_SIDE_PX) ** 2)

    new_width, new_height, excess = planned(1.0)
    if excess > 1:
        shrink = 1.0
        while (over := planned(shrink)[2]) > 1:
            shrink *= min(0.999, over**-0.5)
        way_out = (
            "" if params.allow_large else " Set override_size_limits to true for larger pictures, or lower the scale."
        )
        raise ImageTooLarge(
            f"Upscaling {width} x {height} by {params.scale:g} makes {new_width} x {new_height} pixels; at most "
            f"{most / 1e6:.1f} megapixels (sides padded to {multiple}) and {MAX_SIDE_PX} px a side are allowed."
            + way_out,
            width=width,
            height=height,
            max_width=max(1, int(width * shrink)),
            max_height=max(1, int(height * shrink)),
        )
    return new_width, new_height


def faithfulness(strength: float) -> float:
    """How much of what the input determines is put back after diffusion: 1 up to strength 0.5, falling to 0 at 0.8."""
    return min(1.0, max(0.0, (FREE_STRENGTH - strength) / (FREE_STRENGTH - FAITHFUL_STRENGTH)))


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as (1, 3, H, W), float32, 0..1, on the CPU."""
    return torch.from_numpy(np.array(image, dtype=np.float32) / 255).permute(2, 0, 1)[None].contiguous()


def to_pixels(band: Tensor) -> np.ndarray:
    """A band (1, 3, rows, W), about 0..1, as uint8 (rows, W, 3), clamped and rounded."""
    return (band[0].clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def _compensated(
    vae: TiledVAE, start: Tensor, final: Tensor, before: Tensor, *, weight: float, on_tile: OnTile
) -> Iterator[tuple[Tensor, Tensor]]:
    """Decoded bands, less what the VAE alone does to the pre-stage picture, each with its rows of that picture.

    The two decodes run one after the other: together they would need twice the memory. What waits between them is
    small, so 16 bits hold it to 1e-4.
    """
    lost: list[Tensor] = []
    if weight:
        top = 0
        for band in vae.decode_bands(start, on_tile):
            lost.append((before[..., top : top + band.shape[-2], :] - band.to(before.device)).half())
            top += band.shape[-2]
    top = 0
    for i, band in enumerate(vae.decode_bands(final, on_tile)):
        reference = before[..., top : top + band.shape[-2], :].to(band.device)
        if weight:
            band = band + weight * lost[i].to(band)
        top += band.shape[-2]
        yield band, reference


def _input_limit(params: Params, limits: Limits) -> int:
    return limits.max_large_input_pixels if params.allow_large else limits.max_input_pixels

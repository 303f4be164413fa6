"""`fal-ai/flux-vision-upscaler`: a flow-matching model redraws a picture that a vision-language model has described.

Stages, in order: decode (`images`), plan (`planning`), caption of the input (`caption`), safety check of the input
(`safety`), pre-stage (`prescale`), texts (`flux`), captions of the tiles where creativity is high, VAE encode, tiled
denoising and VAE decode in bands with the input's tones (`redraw`, `multidiffusion`, `flux`), safety check of the
result (`guard`), PNG (`delivery`).

Papers: rectified flow (arXiv 2209.03003), SDEdit (arXiv 2108.01073) for img2img, MultiDiffusion (arXiv 2302.08113) for
the tiles, one caption for each tile (arXiv 2602.03342). Profiles, that is sets of models, are in `PROFILES`.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2
from PIL import Image
from torch import Tensor

from pipelines.caption import Captioner
from pipelines.caption_vlm import load_vision_captioner
from pipelines.delivery import Result, describe_tiles, opaque, recipe_of
from pipelines.errors import CaptionFailed, ModelsMissing
from pipelines.flux import Conditioning, FlowSampler, Flux, Text, flow_sigmas, token_offsets
from pipelines.flux2 import Flux2, plain_vae
from pipelines.fp8 import quantize_to_fp8
from pipelines.guard import deliver_black, deliver_checked, may_show
from pipelines.images import Picture, decode
from pipelines.models import Family, Models
from pipelines.multidiffusion import tiled_denoise
from pipelines.planning import Limits, check_memory, plan_size
from pipelines.progress import Progress, Stages
from pipelines.redraw import Bands, Canvas, Tones
from pipelines.residency import Residency
from pipelines.safety import SafetyChecker
from pipelines.tiling import Grid, Tile, fit_grid
from weights.flux_tokens import TOKEN_LATENTS
from weights.store import WeightStore

TILE_CAPTION_STRENGTH = 0.35
"""Above this strength every tile has a caption of its own: with that of the whole, each would grow its subject."""
CAPTION_TOKENS = 96
"""Room for 60 words."""
VISION_CAPTIONER = "vision-captioner"
"""Folder of a vision-language model that this endpoint prefers to the captioner that all share."""
NO_CAPTION = "a high quality, detailed photograph"
"""What is said of a picture when the captioner is missing or fails."""
INSTRUCTION = (
    "Describe this image in one paragraph of at most 60 words: the subject, materials and textures, the lighting, the "
    "lens or medium. Do not mention blur, noise, compression or low resolution, and do not begin with 'The image'."
)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A set of models and what suits them.

    Attributes:
        model: Folder of transformer, text encoders, tokenizers and schedule.
        controlnet: Folder of the upscaler ControlNet; None for a model that is given the picture itself.
        vae: Folder of the VAE.
        max_tile_px: Longest side of a tile.
        tile_overlap_px: Least that neighbours share, and the width of the band in which they are cross-faded.
        max_text_tokens: Tokens that T5 encodes.
        prompt_suffix: Said after every caption.
        negative_prompt: What true guidance leads away from, for models that have no embedded guidance.
        control: Strength of the ControlNet at creativity 0, and how much less it is at creativity 1.
        control_end: Share of the steps after which the ControlNet rests.
    """

    model: str
    controlnet: str | None
    vae: str
    max_tile_px: int
    tile_overlap_px: int
    max_text_tokens: int
    prompt_suffix: str
    negative_prompt: str
    control: tuple[float, float]
    control_end: float


QUALITY = ", sharp focus, fine texture detail, natural skin and material texture, high resolution photograph"

PROFILES = {
    # Tiles of 24 x 24 tokens: on a processor attention over larger ones costs more than their overlap saves.
    "pocket": Profile(
        model="flux",
        controlnet="controlnet-upscaler-flux",
        vae="vae",
        max_tile_px=192,
        tile_overlap_px=32,
        max_text_tokens=48,
        prompt_suffix=", high quality, highly detailed, high resolution, sharp",
        negative_prompt="blurry, low resolution, low quality, pixelated, compression artifacts, noisey, grainy",
        control=(1.0, 0.0),
        control_end=1.0,
    ),
    # FLUX.1-dev and jasperai/Flux.1-dev-Controlnet-Upscaler: FLUX.1 [dev] Non-Commercial License, 37 GB in bfloat16.
    "flux1-dev": Profile(
        model="flux1-dev",
        controlnet="controlnet-upscaler-flux1-dev",
        vae="flux1-dev/vae",
        max_tile_px=1280,
        tile_overlap_px=128,
        max_text_tokens=256,
        prompt_suffix=QUALITY,
        negative_prompt="",
        control=(0.75, 0.35),
        control_end=0.8,
    ),
    # FLUX.2 [klein] 4B: Apache-2.0, 16 GB in bfloat16; the tile is a reference, which the model keeps to by itself.
    "flux2-klein-4b": Profile(
        model="flux2-klein-4b",
        controlnet=None,
        vae="flux2-klein-4b/vae",
        max_tile_px=1280,
        tile_overlap_px=128,
        max_text_tokens=512,
        prompt_suffix=QUALITY,
        negative_prompt="",
        control=(1.0, 0.0),
        control_end=1.0,
    ),
}
"""The published models' strengths follow the authors' 0.6 at middle creativities; with less the structure is free."""

TILE_BATCH = {"cpu": 7, "cuda": 2}
"""Tiles per forward: one published tile of 1024 px fills a GPU; small ones share what a call costs on a processor."""


@dataclass(frozen=True, kw_only=True)
class Params:
    """What decides the picture, in the pipeline's own words."""

    scale: float  # 1..4, output side / input side
    strength: float  # 0..1, share of the noise schedule that is run; 0 returns the pre-stage picture
    guidance_scale: float  # 1..4, embedded or true, by what the model has; true guidance of 1 is one pass
    num_inference_steps: int  # 4..50, all of them are made, whatever the strength
    seed: int
    check_safety: bool = True


@dataclass(frozen=True, kw_only=True)
class CaptionedResult(Result):
    """What was made, and what the picture shows."""

    caption: str


class FluxVisionUpscaler:
    """The pipeline; its models come from `models` at each request.

    Args:
        models: Of one set of weights on one device.
        profile: Name of a profile; the built-in set has one of its own.
        weights: What recipes say of the set.
        fp8: Whether the transformer computes in 8-bit floating point.
    """

    def __init__(self, models: Models, profile: str, *, weights: dict[str, Any], fp8: bool = False) -> None:
        self.models = models
        self.profile = PROFILES[profile]
        self.weights = weights | {"profile": profile, "fp8": fp8}
        self.fp8 = fp8
        self.tile_batch = TILE_BATCH[models.device.type]

    @classmethod
    def load(
        cls, store: WeightStore, *, device: str, profile: str = "pocket", dtype: torch.dtype | None = None
    ) -> FluxVisionUpscaler:
        """A pipeline on its own, whose models stay on the device; `dtype` as in `Models`."""
        target = torch.device(device)
        residency = Residency(target, device_bytes=sys.maxsize, host_bytes=0)
        models = Models(store, target, residency, dtype=dtype)
        return cls(models, profile, weights=models.description)

    def warm_up(self) -> None:
        """Load what a request with the default values needs."""
        assert self.family
        self._captioner()
        self.models.checker()
        self.models.prestage()

    @property
    def family(self) -> Family:
        """Transformer, ControlNet and text encoders, with the VAE; loaded when first asked for."""
        return self.models.resident(self.profile.model, self._load_family, self.profile.model)

    def _load_family(self) -> Family:
        store, profile, device = self.models.store, self.profile, self.models.device
        folders = [part for part in (profile.model, profile.controlnet, profile.vae) if part is not None]
        if missing := [part for part in folders if not store.has(part)]:
            raise ModelsMissing(f"The {store.name} weights of this server lack {', '.join(missing)}.")
        # float16 overflows in the published transformers.
        dtype = torch.bfloat16 if self.models.dtype == torch.float16 else self.models.dtype
        options: dict[str, Any] = {"device": device, "dtype": dtype, "max_text_tokens": profile.max_text_tokens}
        vae_options: dict[str, Any] = {"torch_dtype": dtype, "local_files_only": True}
        model: Flux | Flux2
        if profile.controlnet is None:
            vae = plain_vae(AutoencoderKLFlux2.from_pretrained(store.folder(profile.vae), **vae_options))
            model = Flux2.load(store.folder(profile.model), **options)
        else:
            vae = AutoencoderKL.from_pretrained(store.folder(profile.vae), **vae_options)
            model = Flux.load(store.folder(profile.model), store.folder(profile.controlnet), **options)
        if self.fp8:
            quantize_to_fp8(model.transformer)
        return Family(model, Canvas(vae.to(device), size_multiple=model.size_multiple))

    @torch.inference_mode()
    def __call__(
        self, image: bytes, params: Params, *, limits: Limits, output: BinaryIO, progress: Progress
    ) -> CaptionedResult:
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
            picture = decode(image, max_pixels=limits.max_input_pixels)
            size = self._plan(picture, params, limits)
        started = time.perf_counter()
        caption = self._caption(picture.rgb, stages)
        vae, grid = self.family.canvas.vae, self._grid(size)
        tiles = describe_tiles(grid, vae.scale_factor)
        recipe = recipe_of("flux_vision_upscaler", picture, params, size, self.weights, tiles=tiles, caption=caption)
        checker = self._checker(params, stages)
        stages.may_show = may_show(checker)
        if checker is not None and self._is_unsafe(checker, picture, stages):
            deliver_black(picture, recipe, output, stages)
        else:
            with stages.stage("preupscale"):
                enlarge = self.models.prestage()
                before = enlarge(opaque(picture), (size[1], size[0]), on_tile=lambda: stages.beat("preupscale"))
            bands: Bands = lambda vae: iter([before])  # noqa: E731  # one of two, chosen by the strength
            if params.strength > 0:
                bands = self._redraw(before, picture, caption, grid, params, stages)
            deliver_checked(bands, vae, picture, recipe, output, stages, checker)
        stages.timings["inference"] = time.perf_counter() - started
        return CaptionedResult(
            width=size[0], height=size[1], seed=params.seed, timings=stages.timings, recipe=recipe, caption=caption
        )

    def _plan(self, picture: Picture, params: Params, limits: Limits) -> tuple[int, int]:
        """Output (width, height) in px; refuses what is not allowed or does not fit into memory."""
        canvas = self.family.canvas
        size = plan_size(
            picture.width,
            picture.height,
            params.scale,
            max_pixels=limits.max_output_pixels,
            multiple=canvas.padding_multiple,
            way_out="Lower upscale_factor.",
        )
        check_memory(picture.width, picture.height, size, needed=canvas.bytes_needed(size[1], size[0]))
        return size

    def _grid(self, size: tuple[int, int]) -> Grid:
        """Tiles for a result of `size` (width, height) px, padded to what VAE and transformer can halve."""
        canvas = self.family.canvas
        factor, multiple = canvas.vae.scale_factor, canvas.padding_multiple
        width, height = (-(-side // multiple) * multiple // factor for side in size)
        return fit_grid(
            height,
            width,
            max_tile=self.profile.max_tile_px // factor,
            overlap=self.profile.tile_overlap_px // factor,
            multiple=TOKEN_LATENTS,
        )

    def _caption(self, image: Image.Image, stages: Stages) -> str:
        """What a picture shows; a general phrase where no model can say."""
        with stages.stage("caption"):
            try:
                captioner = self._captioner()
                if captioner is not None:
                    return captioner.caption(image, INSTRUCTION, max_tokens=CAPTION_TOKENS) or NO_CAPTION
                stages.remark("caption", "no captioner in this weight set: a general phrase stands for the caption")
            except CaptionFailed as error:
                stages.remark("caption", str(error))
        return NO_CAPTION

    def _captioner(self) -> Captioner | None:
        """The captioner of this endpoint, else the one that all endpoints share."""
        if not self.models.store.has(VISION_CAPTIONER):
            return self.models.captioner()
        return self.models.captioner_in(VISION_CAPTIONER, load_vision_captioner)

    def _checker(self, params: Params, stages: Stages) -> SafetyChecker | None:
        checker = self.models.checker() if params.check_safety else None
        if params.check_safety and checker is None:
            stages.remark("safety", "no safety checker in this weight set: the picture was not checked")
        return checker

    def _is_unsafe(self, checker: SafetyChecker, picture: Picture, stages: Stages) -> bool:
        with stages.stage("safety"):
            return checker.is_unsafe(picture.rgb)

    def _redraw(
        self, before: Tensor, picture: Picture, caption: str, grid: Grid, params: Params, stages: Stages
    ) -> Bands:
        """Run the diffusion pass; returns what decodes the finished picture."""
        regions: tuple[Tile, ...] = ()
        captions = [caption]
        if params.strength > TILE_CAPTION_STRENGTH and len(grid.tiles()) > 1 and caption != NO_CAPTION:
            regions, captions = self._tile_captions(picture.rgb, grid, caption, params, stages)
        model, canvas = self.family.model, self.family.canvas
        with stages.stage("prompt"):
            texts = self._texts(captions)
            is_guided = params.guidance_scale > 1 and model.takes_negative
            negative = model.encode(self.profile.negative_prompt) if is_guided else None
            if params.guidance_scale > 1 and not (is_guided or model.embeds_guidance):
                stages.remark("prompt", "guidance has no effect: this model was distilled to one guidance")

        def denoise(start: Tensor) -> Tensor:
            conditioning = Conditioning(
                texts=texts,
                regions=regions,
                negative=negative,
                guidance_scale=params.guidance_scale,
                control=model.enter(start),
            )
            return model.leave(self._denoise(model.enter(start), grid, conditioning, params, stages))

        return canvas.redraw(
            canvas.pad(before),
            (before.shape[-2], before.shape[-1]),
            denoise,
            Tones.of(params.strength, params.scale),
            stages,
        )

    def _texts(self, captions: list[str]) -> tuple[Text, ...]:
        """The encoded prompts: each caption with the profile's suffix; equal captions are encoded once."""
        encode = self.family.model.encode
        encoded = {caption: encode(caption + self.profile.prompt_suffix) for caption in dict.fromkeys(captions)}
        return tuple(encoded[caption] for caption in captions)

    def _tile_captions(
        self, image: Image.Image, grid: Grid, caption: str, params: Params, stages: Stages
    ) -> tuple[tuple[Tile, ...], list[str]]:
        """The tiles, and what the input shows in each; `caption` where the captioner fails."""
        regions, captions = tuple(grid.tiles()), []
        captioner, px_per_latent = self._captioner(), self.family.canvas.vae.scale_factor / params.scale
        assert captioner is not None  # it made the caption
        failures: list[CaptionFailed] = []
        with stages.stage("tile_captions", total=len(regions)) as on_step:
            for number, region in enumerate(regions):
                part = image.crop(shown_in(region, image.size, px_per_latent))
                try:
                    captions.append(captioner.caption(part, INSTRUCTION, max_tokens=CAPTION_TOKENS) or caption)
                except CaptionFailed as error:
                    captions.append(caption)
                    failures.append(error)
                on_step(number + 1)
        if failures:
            stages.remark(
                "tile_captions", f"{len(failures)} of {len(regions)} tiles have the caption of the whole: {failures[0]}"
            )
        return regions, captions

    def _denoise(self, start: Tensor, grid: Grid, conditioning: Conditioning, params: Params, stages: Stages) -> Tensor:
        """Noise the start latents to the level `strength` names and denoise them, (1, C, h, w) float32."""
        model, sigmas = self.family.model, self.sigmas(params)
        sampler = FlowSampler(sigmas)
        strongest, less = self.profile.control
        conditioning = replace(
            conditioning,
            controlnet_conditioning_scale=strongest - less * params.strength,
            control_until=sigmas[math.ceil(self.profile.control_end * sampler.num_steps) - 1],
            offsets=dict(zip(sigmas, token_offsets(sampler.num_steps, params.seed), strict=False)),
        )
        generator = torch.Generator("cpu").manual_seed(params.seed)
        noise = torch.randn(start.shape, generator=generator, dtype=torch.float32).to(start.device)
        stages.remark("denoise", f"denoise: {sampler.num_steps} steps from noise level {sigmas[0]:.3f}")
        with stages.stage("denoise", total=sampler.num_steps) as on_step:
            return tiled_denoise(
                model,
                sampler.start(start, noise),
                sampler,
                conditioning,
                grid=grid,
                tile_batch=self.tile_batch,
                seed=params.seed,
                watch=lambda estimate: stages.watch(lambda: model.leave(estimate())),
                on_step=on_step,
                on_batch=lambda: stages.beat("denoise"),
            )

    def sigmas(self, params: Params) -> list[float]:
        """Noise levels of a run. They follow the profile's largest tile: the same for pictures of all sizes."""
        side = self.profile.max_tile_px // (self.family.canvas.vae.scale_factor * TOKEN_LATENTS)
        shift = self.family.model.shift(side**2)
        return flow_sigmas(params.strength, params.num_inference_steps, shift)


def shown_in(region: Tile, size: tuple[int, int], px_per_latent: float) -> tuple[int, int, int, int]:
    """The box (left, top, right, bottom) of an input of `size` px that a region of the latent shows, never empty.

    Args:
        region: Of a latent whose sides may be padded beyond the picture.
        size: (width, height) of the input.
        px_per_latent: Pixels of the input that a latent position shows along each side.
    """
    width, height = size
    left = min(round(region.left * px_per_latent), width - 1)
    top = min(round(region.top * px_per_latent), height - 1)
    right = min(math.ceil(region.right * px_per_latent), width)
    bottom = min(math.ceil(region.bottom * px_per_latent), height)
    return left, top, max(right, left + 1), max(bottom, top + 1)

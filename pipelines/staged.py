"""Large factors in several passes, each of which enlarges the picture before it and may redraw it by diffusion.

Between the passes there is no PNG, and pictures above `Canvas.exact_px` pixels wait in a file (`spool`): what is in
memory is latents and one band, however large the result. The colours of each pass are those of the picture before it,
so they stay the input's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pipelines.errors import NonFiniteResult
from pipelines.faces import NO_FACES, FaceMap
from pipelines.models import Family
from pipelines.multidiffusion import tiled_denoise
from pipelines.prescale import BandedPreStage, Lanczos
from pipelines.progress import Stages
from pipelines.redraw import Bands, Canvas, Tones
from pipelines.samplers import NoiseSampler, ProtectingSampler, Sampler
from pipelines.schedules import Kind, sigma_bounds, sigma_ramp, start_sigma
from pipelines.spool import Pixels, Spool
from pipelines.vae import TiledVAE


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One enlargement.

    Attributes:
        size: (height, width) in px of its result.
        scale: Of its result to the picture before it.
        strength: 0..1; 0 is the pre-stage alone.
        seed: Of its noise.
    """

    size: tuple[int, int]
    scale: float
    strength: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class Style:
    """How a recipe redraws.

    Attributes:
        prompt: In A1111 syntax.
        negative_prompt: Likewise.
        controlnet_conditioning_scale: 0 skips the ControlNet.
        guidance_scale: 1 or less runs the prompt alone.
        num_inference_steps: For strength 1.
        kind: The solver.
        soft_control: See `unet.Conditioning`.
        hint_is_input: The ControlNet sees the pass's input, enlarged by Lanczos, rather than the pre-stage's picture.
        max_tile_px: Longest side of a diffusion tile.
        tile_batch: Tiles per call of the model.
        face_strength: Share of a pass's strength that faces get.
    """

    prompt: str
    negative_prompt: str
    controlnet_conditioning_scale: float
    guidance_scale: float
    num_inference_steps: int
    kind: Kind
    soft_control: bool = False
    hint_is_input: bool = False
    max_tile_px: int
    tile_batch: int
    face_strength: float = 1.0


class StagedUpscale:
    """The passes of one picture.

    Args:
        prestage: Enlarges.
        style: How passes with a strength redraw.
        stages: Told of the work.
        family: The models that redraw, with the canvas to do it on.
        faces: Where faces are, in shares of the picture.
    """

    def __init__(
        self,
        prestage: BandedPreStage,
        style: Style,
        stages: Stages,
        *,
        family: Family,
        faces: FaceMap = NO_FACES,
    ) -> None:
        self._prestage, self._style, self._stages = prestage, style, stages
        self._family, self._faces = family, faces

    def bands(self, source: Pixels, passes: Sequence[Pass]) -> Bands:
        """Run all passes but the decoding of the last; returns what decodes it."""
        for one in passes[:-1]:
            source = self._held(self._run(source, one), one.size)
        return self._run(source, passes[-1])

    def _run(self, source: Pixels, one: Pass) -> Bands:
        beat = partial(self._stages.beat, "preupscale")
        if one.strength == 0:
            return lambda vae: self._prestage.bands(source, one.size, beat)
        canvas = self._family.canvas
        with self._stages.stage("preupscale"):
            before = canvas.pad_bands(self._prestage.bands(source, one.size, beat), one.size)
        with self._stages.stage("prompt"):
            hint = canvas.pad_bands(Lanczos().bands(source, one.size, beat), one.size) if self._hints else before
            conditioning = self._family.model.encode(
                self._style.prompt,
                self._style.negative_prompt,
                guidance_scale=self._style.guidance_scale,
                hint=hint,
                controlnet_conditioning_scale=self._style.controlnet_conditioning_scale,
                soft_control=self._style.soft_control,
            )
        denoise = partial(self._denoise, canvas, conditioning, one)
        return canvas.redraw(before, one.size, denoise, Tones.of(one.strength, one.scale), self._stages)

    @property
    def _hints(self) -> bool:
        """Whether the ControlNet sees another picture than the pre-stage's."""
        return self._style.hint_is_input and self._style.controlnet_conditioning_scale > 0

    def _denoise(self, canvas: Canvas, conditioning: object, one: Pass, start: Tensor) -> Tensor:
        """Noise the start latents to the level that the strength names and denoise them, (1, C, h, w) float32."""
        style, model = self._style, self._family.model
        lowest, highest = sigma_bounds(model.scheduler_config)
        sigmas = sigma_ramp(one.strength, style.num_inference_steps, lowest, highest)
        generator = torch.Generator("cpu").manual_seed(one.seed)
        noise = torch.randn(start.shape, generator=generator, dtype=torch.float32).to(start.device)
        sampler: Sampler = NoiseSampler(model.scheduler_config, sigmas, style.kind, generator=generator)
        shown = tuple(round(side / canvas.vae.scale_factor) for side in one.size)
        boxes = self._faces.boxes(*shown)
        if boxes and style.face_strength < 1:
            mask = self._faces.mask(*shown, of=start.shape[-2:]).to(start.device)
            level = start_sigma(one.strength * style.face_strength, lowest, highest)
            sampler = ProtectingSampler(sampler, start, noise, mask, sigmas, until=level, kind=style.kind)
        grid = canvas.grid(*one.size, max_tile_px=style.max_tile_px)
        with self._stages.stage("denoise", total=sampler.num_steps) as on_step:
            return tiled_denoise(
                model,
                sampler.start(start, noise),
                sampler,
                conditioning,
                grid=grid,
                tile_batch=style.tile_batch,
                seed=one.seed,
                whole=boxes,
                watch=self._stages.watch,
                on_step=on_step,
                on_batch=partial(self._stages.beat, "denoise"),
            )

    def _held(self, bands: Bands, size: tuple[int, int]) -> Pixels:
        """The picture between two passes: in memory, or in a file where it is large."""
        vae, exact_px = self._family.canvas.vae, self._family.canvas.exact_px

        def hold(vae: TiledVAE) -> Pixels:
            if size[0] * size[1] > exact_px:
                return Spool.of(bands(vae), *size)
            return torch.cat([band.float().clamp(0, 1).cpu() for band in bands(vae)], dim=-2)

        with self._stages.stage("vae_decode"):
            try:
                return hold(vae)
            except NonFiniteResult:
                if vae.dtype == torch.float32:
                    raise
            return hold(vae.in_float32())


def in_doublings(factor: float) -> list[float]:
    """Factors of at most 2 whose product is `factor`: as many twos as there are, then the rest (5 is 2, 2, 1.25)."""
    factors = []
    while factor > 2:
        factors.append(2.0)
        factor /= 2
    return [*factors, factor]

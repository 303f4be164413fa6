"""`fal-ai/creative-upscaler`: enlarge a picture and let a diffusion model redraw its detail.

Stages, in order: decode (`images`), plan (`planning`), caption where there is no prompt (`caption`), adapters
(`models`, `adapters`), pre-stage (`ccsr`, `prescale`), text and hint (`sd15`, `sdxl`), VAE encode, tiled denoising and
VAE decode in bands with the input's tones (`redraw`, `multidiffusion`, `samplers`), safety check and PNG (`guard`,
`delivery`).

Papers: SDEdit (arXiv 2108.01073) for img2img, MultiDiffusion (arXiv 2302.08113) for the tiles, ControlNet (arXiv
2302.05543), SDXL (arXiv 2307.01952), CCSR (arXiv 2401.00877), LoRA (arXiv 2106.09685), textual inversion (arXiv
2208.01618). Full weights: Stable Diffusion 1.5 (CreativeML OpenRAIL-M) and its tile ControlNet (OpenRAIL), about 4 GB
of device memory in 16 bits; SDXL (OpenRAIL++-M) and its tile ControlNet (Apache-2.0), about 11 GB. Pocket weights: CPU.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, BinaryIO

import torch
from torch import Tensor

from pipelines.adapters import Layer, applied, match
from pipelines.bands import cut
from pipelines.caption import join_within_window
from pipelines.delivery import Result, describe_tiles, opaque, recipe_of
from pipelines.errors import CaptionFailed, InvalidParams, NonFiniteResult
from pipelines.guard import deliver_checked, may_show
from pipelines.images import Picture, decode
from pipelines.models import Family, Models
from pipelines.multidiffusion import tiled_denoise
from pipelines.planning import Limits, check_memory
from pipelines.planning import plan_size as plan_any_size
from pipelines.prescale import BandedPreStage
from pipelines.progress import Progress, Stages
from pipelines.redraw import Bands, Tones
from pipelines.residency import Residency
from pipelines.safety import SafetyChecker
from pipelines.samplers import NoiseSampler
from pipelines.schedules import detail_factor, sigma_bounds, sigma_ramp
from pipelines.spool import Pixels, rows_of
from pipelines.tiling import Grid
from weights.detect import FAMILY_NAMES, SD_1_5, SDXL
from weights.embedding import fitting
from weights.fetch import WeightFile
from weights.header import UnsuitableFile
from weights.hub import BaseFiles
from weights.store import WeightStore

NAME = "creative_upscaler"
MAX_TILE_PX = {SD_1_5: 768, SDXL: 1152}
"""Longest side of a diffusion tile: 96 latents for Stable Diffusion 1.5, half as much again as it was trained on; 144
for SDXL, with which a picture of 2048 px takes two tiles on each side."""
TILE_BATCH = {"cpu": 2, "cuda": 16}
"""Tiles per forward: a GPU is filled from about 32 samples (16 tiles x 2 guidance halves), a CPU by far fewer."""

NO_CAPTIONER = "no captioner in this weight set: the prompt is prompt_suffix alone; pass a prompt for a better picture"
NO_SAFETY_CHECKER = "no safety checker in this weight set: the picture was not checked"
NO_CCSR = "CCSR is not part of this weight set: the pre-upscaler is used in its place"


@dataclass(frozen=True, kw_only=True)
class Params:
    """What decides the picture, in the pipeline's own words."""

    family: str = SD_1_5  # or SDXL
    prompt: str  # empty: the picture is described by the captioner
    prompt_suffix: str = ""
    negative_prompt: str
    scale: float  # 1..5, output side / input side
    strength: float  # 0..1, start noise level on one curve for every sampler; 0 returns the pre-stage picture
    detail: float  # 0..5
    controlnet_conditioning_scale: float  # 0..3; 0 skips the ControlNet
    guidance_scale: float  # 0..16; 1 or less runs the prompt alone
    num_inference_steps: int  # 1..200, for strength 1; fewer run at lower strength
    seed: int
    allow_large: bool = False
    restore: bool = False  # CCSR before diffusion
    check_safety: bool = False
    base_model: BaseFiles | None = None
    lora: WeightFile | None = None
    lora_scale: float = 1.0  # 0 is no LoRA, bit for bit
    embedding: WeightFile | None = None


@dataclass(frozen=True)
class Adapted:
    """The models of one request: a family, the layers that a LoRA changes, the words that embeddings stand for."""

    family: Family
    layers: list[Layer]
    embeddings: tuple[Mapping[str, Tensor], ...]


class CreativeUpscaler:
    """The pipeline; its models come from `models` at each request.

    Args:
        models: Of one set of weights on one device.
        weights: What recipes say of the set.
    """

    def __init__(self, models: Models, *, weights: dict[str, Any]) -> None:
        self.models = models
        self.weights = weights
        self.tile_batch = TILE_BATCH[models.device.type]

    @classmethod
    def load(cls, store: WeightStore, *, device: str, dtype: torch.dtype | None = None) -> CreativeUpscaler:
        """A pipeline on its own, whose models stay on the device; `dtype` as in `Models`."""
        target = torch.device(device)
        residency = Residency(target, device_bytes=sys.maxsize, host_bytes=0)
        models = Models(store, target, residency, dtype=dtype)
        pipeline = cls(models, weights=models.description)
        pipeline.warm_up()
        return pipeline

    def warm_up(self) -> None:
        """Load what a request with the default values needs."""
        self.models.family(SD_1_5)
        if self.models.ccsr() is None:
            self.models.prestage()
        self.models.checker()

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
        with stages.stage("models"):
            adapted = self._adapted(params, stages)
            size = _plan(picture, params, limits, adapted.family)
        started = time.perf_counter()
        params = self._prompted(picture, params, adapted.family, stages)
        grid = adapted.family.canvas.grid(size[1], size[0], max_tile_px=MAX_TILE_PX[params.family])
        recipe = self._recipe(picture, params, size, grid, adapted.family)
        prestage, checker = self._prestage(params, stages), self._checker(params, stages)
        stages.may_show = may_show(checker)
        with stages.stage("preupscale"):
            before = self._enlarged(picture, size, prestage, params, adapted.family, stages)
        bands: Bands = lambda vae: cut(rows_of(before), size[1], size[0])  # noqa: E731  # one of two, by the strength
        if params.strength > 0:
            with applied(adapted.layers, params.lora_scale):
                bands = self._redraw(before, size, grid, params, adapted, stages)
        with _blaming_files(params):
            deliver_checked(bands, adapted.family.canvas.vae, picture, recipe, output, stages, checker)
        stages.timings["inference"] = time.perf_counter() - started
        return Result(width=size[0], height=size[1], seed=params.seed, timings=stages.timings, recipe=recipe)

    def _adapted(self, params: Params, stages: Stages) -> Adapted:
        """The models that the request wants; its files are read and compared with them here.

        Raises:
            InvalidParams: A model is not there, or a file does not fit.
        """
        if not self.models.has_family(params.family):
            raise InvalidParams(
                "family", f"{FAMILY_NAMES[params.family]} is not part of the {self.models.store.name} weights"
            )
        with _blaming("base_model"):
            family = self.models.family(params.family, params.base_model)
        layers: list[Layer] = []
        embeddings: tuple[Mapping[str, Tensor], ...] = ()
        if params.lora is not None:
            with _blaming("lora"):
                lora = self.models.lora(params.lora)
                found = match(lora, family.model, FAMILY_NAMES[params.family])
            layers = found.layers
            if found.num_unknown:
                stages.remark("models", f"{found.num_unknown} layers of the LoRA are not in this model: left out")
            if lora.num_unknown:
                stages.remark("models", f"{lora.num_unknown} tensors of the LoRA are of no known kind: left out")
        if params.embedding is not None:
            widths = tuple(encoder.config.hidden_size for encoder in family.model.text_encoders)
            with _blaming("embedding"):
                if not params.embedding.stem.strip():
                    raise UnsuitableFile("has no name, and its name is the word that stands for it in a prompt")
                embedding = self.models.embedding(params.embedding)
                vectors = fitting(embedding, widths)
            words = [params.embedding.stem, *([embedding.word] if embedding.word else [])]
            stages.remark("models", f"the embedding stands for {' or '.join(map(repr, words))} in prompts")
            embeddings = tuple(dict.fromkeys(words, rows) for rows in vectors)
        return Adapted(family, layers, embeddings)

    def _prompted(self, picture: Picture, params: Params, family: Family, stages: Stages) -> Params:
        """The parameters with the whole prompt: the caller's, or a caption of the picture; then the suffix."""
        if params.prompt:
            return replace(params, prompt=params.prompt + params.prompt_suffix, prompt_suffix="")
        prompt = params.prompt_suffix.strip()
        try:
            captioner = self.models.captioner()
            if captioner is None:
                stages.remark("caption", NO_CAPTIONER)
            else:
                with stages.stage("caption"):
                    caption = captioner.caption(picture.rgb)
                    prompt = join_within_window(caption, params.prompt_suffix, *family.model.tokenizers)
                    stages.remark("caption", f"caption: {caption}")
        except CaptionFailed as error:
            stages.remark("caption", f"{error} The prompt is prompt_suffix alone.")
        return replace(params, prompt=prompt, prompt_suffix="")

    def _prestage(self, params: Params, stages: Stages) -> BandedPreStage:
        if not params.restore:
            return self.models.prestage()
        ccsr = self.models.ccsr()
        if ccsr is None:
            stages.remark("preupscale", NO_CCSR)
        return ccsr or self.models.prestage()

    @staticmethod
    def _enlarged(
        picture: Picture,
        size: tuple[int, int],
        prestage: BandedPreStage,
        params: Params,
        family: Family,
        stages: Stages,
    ) -> Pixels:
        """The picture that diffusion starts from, with sides padded to what the models can halve."""
        beat = partial(stages.beat, "preupscale")
        bands = prestage.bands(opaque(picture), (size[1], size[0]), beat, seed=params.seed)
        return family.canvas.pad_bands(bands, (size[1], size[0]))

    def _checker(self, params: Params, stages: Stages) -> SafetyChecker | None:
        checker = self.models.checker() if params.check_safety else None
        if params.check_safety and checker is None:
            stages.remark("safety", NO_SAFETY_CHECKER)
        return checker

    def _recipe(
        self, picture: Picture, params: Params, size: tuple[int, int], grid: Grid, family: Family
    ) -> dict[str, Any]:
        """Everything that decides the pixels; files are told by name and hash."""
        plain = replace(params, base_model=None, lora=None, embedding=None)
        tiles = describe_tiles(grid, family.canvas.vae.scale_factor)
        recipe = recipe_of(NAME, picture, plain, size, self.weights, tiles=tiles)
        recipe["params"] |= {
            "base_model": _described_base(params.base_model),
            "lora": _described(params.lora),
            "embedding": _described(params.embedding),
        }
        return recipe

    def _redraw(
        self, before: Pixels, size: tuple[int, int], grid: Grid, params: Params, adapted: Adapted, stages: Stages
    ) -> Bands:
        """Run the diffusion pass; returns what decodes the finished picture."""
        model, canvas = adapted.family.model, adapted.family.canvas
        with stages.stage("prompt"):
            conditioning = model.encode(
                params.prompt,
                params.negative_prompt,
                guidance_scale=params.guidance_scale,
                hint=before,
                controlnet_conditioning_scale=params.controlnet_conditioning_scale,
                embeddings=adapted.embeddings,
            )
        return canvas.redraw(
            before,
            (size[1], size[0]),
            lambda start: self._denoise(start, grid, model, conditioning, params, stages),
            Tones.of(params.strength, params.scale, params.detail),
            stages,
        )

    def _denoise(
        self, start: Tensor, grid: Grid, model: Any, conditioning: Any, params: Params, stages: Stages
    ) -> Tensor:
        """Noise the start latents to the level `strength` names and denoise them, (1, C, h, w) float32."""
        sigmas = sigma_ramp(params.strength, params.num_inference_steps, *sigma_bounds(model.scheduler_config))
        detail = detail_factor(params.detail, params.strength)
        sampler = NoiseSampler(model.scheduler_config, sigmas, "euler", detail=detail)
        generator = torch.Generator("cpu").manual_seed(params.seed)
        noise = torch.randn(start.shape, generator=generator, dtype=torch.float32).to(start.device)
        with stages.stage("denoise", total=sampler.num_steps) as on_step:
            return tiled_denoise(
                model,
                sampler.start(start, noise),
                sampler,
                conditioning,
                grid=grid,
                tile_batch=self.tile_batch,
                seed=params.seed,
                watch=stages.watch,
                on_step=on_step,
                on_batch=partial(stages.beat, "denoise"),
            )


def plan_size(width: int, height: int, params: Params, limits: Limits, *, multiple: int = 1) -> tuple[int, int]:
    """Output size (width, height) in px; see `planning.plan_size`."""
    if params.allow_large:
        most, way_out = limits.max_large_output_pixels, ""
    else:
        most = limits.max_output_pixels
        way_out = "Set override_size_limits to true for larger pictures, or lower the scale."
    return plan_any_size(width, height, params.scale, max_pixels=most, multiple=multiple, way_out=way_out)


def _plan(picture: Picture, params: Params, limits: Limits, family: Family) -> tuple[int, int]:
    """Output (width, height) in px; refuses what is not allowed or does not fit into memory."""
    size = plan_size(picture.width, picture.height, params, limits, multiple=family.canvas.padding_multiple)
    needed = family.canvas.bytes_needed(size[1], size[0], pictures=0)
    check_memory(picture.width, picture.height, size, needed=needed)
    return size


def _input_limit(params: Params, limits: Limits) -> int:
    return limits.max_large_input_pixels if params.allow_large else limits.max_input_pixels


def _described(file: WeightFile | None) -> dict[str, str] | None:
    return None if file is None else {"name": file.name, "sha256": file.sha256}


def _described_base(base: BaseFiles | None) -> dict[str, Any] | None:
    if base is None:
        return None
    return {"name": base.name, "sha256": {part: file.sha256 for part, file in base.all().items()}}


@contextmanager
def _blaming(field: str) -> Iterator[None]:
    """Say which parameter brought a file that cannot be used."""
    try:
        yield
    except UnsuitableFile as error:
        raise InvalidParams(field, f"The file {error}.") from error


@contextmanager
def _blaming_files(params: Params) -> Iterator[None]:
    """Numbers that are not finite are the fault of the file that the caller has brought, if there is one."""
    try:
        yield
    except NonFiniteResult as error:
        brought = {"lora": params.lora, "embedding": params.embedding, "base_model": params.base_model}
        field = next((name for name, file in brought.items() if file is not None), None)
        if field is None or params.strength == 0:
            raise
        way_out = f" Lower its scale, which is {params.lora_scale:g}." if field == "lora" else ""
        raise InvalidParams(field, f"With the file the model computes numbers that are not finite.{way_out}") from error

"""`clarityai/crystal-upscaler`: portraits and fine surfaces, faithful by default, up to 200 times the side.

Plan (sizes, passes; refused before any weight is loaded), then run: decode (`images`), find faces (`faces`), restore
the small ones (`face_restoration`), passes (`staged`) of pre-stage and, with a strength, diffusion in bounded memory,
PNG in bands (`delivery`). Without a strength the pre-stage's network does it all; fal's endpoint, as its partners
document it, does the same for pictures whose shorter side is at most 256 px, whatever the creativity.

Diffusion passes double at most, and end where the picture is 4096 px long or 16 times as large: beyond that nothing is
left in the input to be faithful to, and the network alone goes on. Faces are redrawn with half the strength of the rest
(differential diffusion, arXiv 2306.00950), each within a tile of its own. Models and licences: those of
`clarity_upscaler`, OpenCV's cascade for frontal faces, and RestoreFormer++ (Apache-2.0) where the operator has it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any, BinaryIO

import torch
from torch import Tensor

from pipelines.delivery import BIG_TIFF, PNG, Result, deliver, opaque, recipe_of, write_picture
from pipelines.face_restoration import RestoredFace, restore_faces, with_faces
from pipelines.faces import NO_FACES, FaceDetector, FaceMap, load_detector
from pipelines.images import Picture, decode
from pipelines.models import Family, Models
from pipelines.planning import MAX_SIDE_PX, Limits, check_memory, plan_size
from pipelines.progress import Progress, Stages
from pipelines.redraw import STREAMED_BYTES, Canvas
from pipelines.staged import Pass, StagedUpscale, Style, in_doublings
from weights.detect import SD_1_5

NAME = "crystal_upscaler"
PROMPT = "sharp portrait photograph, detailed skin, detailed hair, high quality"
NEGATIVE_PROMPT = "blurry, low quality, deformed, grainy, compression artifacts"
MAX_TILE_PX = 768
TILE_BATCH = {"cpu": 2, "cuda": 16}
EXACT_PX = 2**21
"""Pictures above are streamed: at 1024² as at 4096² memory is that of a tile."""
NETWORK_ONLY_PX = 256
"""Pictures whose shorter side is no longer are not redrawn: what diffusion adds to so few pixels is not the person."""
HORIZON_PX, HORIZON_FACTOR = 4096, 16.0
PASS_FADE = 0.8
"""Each further pass has this share of the strength of the one before it."""
FACE_STRENGTH = 0.5


@dataclass(frozen=True, kw_only=True)
class Params:
    """What decides the picture, in the pipeline's own words."""

    scale: float  # 1..200, output side / input side
    strength: float  # 0..1; 0 is the network alone
    controlnet_conditioning_scale: float  # 0..1
    face_restoration: float = 1.0  # 0..1, of restored faces against what the passes made of them
    guidance_scale: float = 4.0
    num_inference_steps: int = 20
    seed: int = 0


class CrystalUpscaler:
    """The pipeline; its models come from `models` when a request wants them.

    Args:
        models: Of one set of weights on one device.
        weights: What recipes say of the set.
        tiff_from_px: Results of at least so many pixels are BigTIFF; None: all are PNG.
        restore_faces_px: Faces of the input up to so high are restored, where the set has a network for it.
    """

    def __init__(
        self, models: Models, *, weights: dict[str, Any], tiff_from_px: int | None = None, restore_faces_px: int = 128
    ) -> None:
        self.models, self.weights, self.tiff_from_px = models, weights, tiff_from_px
        self.restore_faces_px = restore_faces_px

    def warm_up(self) -> None:
        """Load what requests need, with and without a creativity."""
        self.models.prestage()
        self.models.face_restorer()
        self._family()

    def content_type(self, width: int, height: int) -> str:
        """What a result of this size is written as."""
        return BIG_TIFF if self.tiff_from_px is not None and width * height >= self.tiff_from_px else PNG

    @torch.inference_mode()
    def __call__(self, image: bytes, params: Params, *, limits: Limits, output: BinaryIO, progress: Progress) -> Result:
        """Upscale `image` and write the result to `output` as PNG; see `CreativeUpscaler`."""
        stages = Stages(progress)
        with stages.stage("decode"):
            picture = decode(image, max_pixels=limits.max_input_pixels)
            size = plan_output(picture.width, picture.height, params.scale, max_pixels=limits.max_output_pixels)
            passes = plan_passes(picture.width, picture.height, params, size)
        check_memory(picture.width, picture.height, size, needed=STREAMED_BYTES)
        started = time.perf_counter()
        redraws = any(one.strength for one in passes)
        family = self._family() if redraws else None
        if family is not None:
            needed = family.canvas.bytes_needed(size[1], size[0], pictures=0)
            check_memory(picture.width, picture.height, size, needed=needed)
        source = opaque(picture)
        faces, restored = self._faces(picture, source, params, stages, redraws=redraws)
        recipe = recipe_of(NAME, picture, params, size, self.weights, **_told(passes, faces, restored))
        paste = partial(
            with_faces,
            faces=restored,
            source=(picture.height, picture.width),
            size=(size[1], size[0]),
            weight=params.face_restoration,
        )
        content_type = self.content_type(*size)
        if family is None:
            with stages.stage("preupscale"):
                beat = partial(stages.beat, "preupscale")
                bands = paste(self.models.prestage().bands(source, passes[0].size, beat))
                write_picture(bands, picture, recipe, output, content_type=content_type)
        else:
            upscale = StagedUpscale(
                self.models.prestage(), self._style(params), stages, family=family, faces=faces
            ).bands(source, passes)
            deliver(
                lambda vae: paste(upscale(vae)),
                family.canvas.vae,
                picture,
                recipe,
                output,
                stages,
                content_type=content_type,
            )
        stages.timings["inference"] = time.perf_counter() - started
        return Result(
            width=size[0],
            height=size[1],
            seed=params.seed,
            timings=stages.timings,
            recipe=recipe,
            content_type=content_type,
        )

    def _faces(
        self, picture: Picture, source: Tensor, params: Params, stages: Stages, *, redraws: bool
    ) -> tuple[FaceMap, list[RestoredFace]]:
        """Where faces are, if somebody wants to know, and the small ones, restored."""
        network = self.models.face_restorer() if self.restore_faces_px and params.face_restoration else None
        if not redraws and network is None:
            return NO_FACES, []
        with stages.stage("faces"):
            faces = FaceMap(self._detector(picture.rgb))
            if network is None:
                return faces, []
            restored = restore_faces(
                source,
                faces.faces,
                lambda face: network(face.to(self.models.device)),
                max_px=self.restore_faces_px,
                on_face=partial(stages.beat, "faces"),
            )
            return faces, restored

    def _style(self, params: Params) -> Style:
        return Style(
            prompt=PROMPT,
            negative_prompt=NEGATIVE_PROMPT,
            controlnet_conditioning_scale=params.controlnet_conditioning_scale,
            guidance_scale=params.guidance_scale,
            num_inference_steps=params.num_inference_steps,
            kind="euler",
            max_tile_px=MAX_TILE_PX,
            tile_batch=TILE_BATCH[self.models.device.type],
            face_strength=FACE_STRENGTH,
        )

    @cached_property
    def _detector(self) -> FaceDetector:
        return load_detector(self.models.store)

    def _family(self) -> Family:
        family = self.models.family(SD_1_5)
        shared, multiple = family.canvas, family.model.size_multiple
        canvas = Canvas(shared.vae.vae, size_multiple=multiple, exact_px=EXACT_PX, noise_floor=shared.noise_floor)
        return Family(family.model, canvas)


def plan_output(width: int, height: int, scale: float, *, max_pixels: int) -> tuple[int, int]:
    """Output size (width, height): each side times the scale, rounded.

    Raises:
        ImageTooLarge: It would be too large; the message names the largest scale for this picture.
    """
    best = min(math.sqrt(max_pixels / (width * height)), MAX_SIDE_PX / max(width, height))
    best = math.floor(best * 100) / 100
    while best >= 1 and round(width * best) * round(height * best) > max_pixels:
        best -= 0.01
    way_out = f"The largest scale_factor for this picture is {best:.2f}." if best >= 1 else "Send a smaller picture."
    return plan_size(width, height, scale, max_pixels=max_pixels, way_out=way_out)


def plan_passes(width: int, height: int, params: Params, size: tuple[int, int]) -> list[Pass]:
    """The passes from a picture of `width` x `height` px to `size` (width, height)."""
    final = (size[1], size[0])
    if params.strength == 0 or min(width, height) <= NETWORK_ONLY_PX:
        return [Pass(size=final, scale=params.scale, strength=0.0, seed=params.seed)]
    horizon = min(HORIZON_FACTOR, max(2.0, HORIZON_PX / max(width, height)))
    redrawn = min(params.scale, horizon)
    passes, reached, factors = [], 1.0, in_doublings(redrawn)
    for i, scale in enumerate(factors):
        reached *= scale
        is_last = redrawn == params.scale and i == len(factors) - 1
        sides = final if is_last else (round(height * reached), round(width * reached))
        strength = params.strength * PASS_FADE**i
        passes.append(Pass(size=sides, scale=scale, strength=strength, seed=params.seed + i))
    if redrawn < params.scale:
        passes.append(Pass(size=final, scale=params.scale / redrawn, strength=0.0, seed=params.seed))
    return passes


def _told(passes: Sequence[Pass], faces: FaceMap, restored: Sequence[RestoredFace]) -> dict[str, Any]:
    """What recipes tell of a run: its passes, where faces were found (in shares of the sides), how many restored."""
    return {
        "passes": [asdict(one) for one in passes],
        "faces": [face._asdict() for face in faces.faces],
        "restored_faces": len(restored),
    }

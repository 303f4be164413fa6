"""Our loop against diffusers' own pipeline, on the pocket weights: the proof that the loop is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    EulerDiscreteScheduler,
    StableDiffusionControlNetImg2ImgPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from pipelines.delivery import to_tensor
from pipelines.multidiffusion import tiled_denoise
from pipelines.samplers import NoiseSampler
from pipelines.schedules import sigma_bounds, sigma_ramp
from pipelines.sd15 import StableDiffusion15
from pipelines.tiling import fit_grid
from pipelines.vae import TiledVAE
from weights.store import WeightStore

PROMPT = "a photograph, high quality, highly detailed, sharp"
NEGATIVE = "blurry, low quality, grainy"


class FixedSigmas(EulerDiscreteScheduler):
    """Stock Euler that answers every call for timesteps with the same noise levels."""

    fixed: Tensor

    def set_timesteps(self, num_inference_steps: int | None = None, device: Any = None, **_: Any) -> None:  # type: ignore[override]
        super().set_timesteps(sigmas=self.fixed.tolist(), device=device)


@pytest.fixture(scope="module")
def family(pocket: WeightStore) -> StableDiffusion15:
    return StableDiffusion15.load(
        pocket.folder("sd15"),
        pocket.folder("controlnet-tile-sd15"),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


@pytest.fixture(scope="module")
def vae(pocket: WeightStore) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(pocket.folder("vae"), local_files_only=True).eval()


def stock_pipeline(pocket: WeightStore, vae: AutoencoderKL, sigmas: Tensor) -> StableDiffusionControlNetImg2ImgPipeline:
    """diffusers' ControlNet img2img pipeline over a second copy of the same weights."""
    folder = pocket.folder("sd15")
    scheduler = FixedSigmas.from_pretrained(folder / "scheduler", local_files_only=True)
    scheduler.fixed = sigmas
    pipeline = StableDiffusionControlNetImg2ImgPipeline(
        vae=vae,
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32, local_files_only=True),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
        unet=UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True),
        controlnet=ControlNetModel.from_pretrained(pocket.folder("controlnet-tile-sd15"), local_files_only=True),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
@torch.inference_mode()
def test_one_tile_gives_the_stock_pipeline(
    pocket: WeightStore,
    family: StableDiffusion15,
    vae: AutoencoderKL,
    photo_crop: Image.Image,
    guidance_scale: float,
) -> None:
    """Same sigmas, start latents and noise: latents within 1e-4 and pixels within 1/255 of diffusers' pipeline."""
    image = to_tensor(photo_crop)
    tiled_vae = TiledVAE(vae)
    start = tiled_vae.encode(image)
    sigmas = sigma_ramp(0.5, 12, *sigma_bounds(family.scheduler_config))
    noised = start + float(sigmas[0]) * torch.randn(start.shape)

    conditioning = family.encode(
        PROMPT, NEGATIVE, guidance_scale=guidance_scale, hint=image, controlnet_conditioning_scale=0.7
    )
    ours = tiled_denoise(
        family,
        noised,
        NoiseSampler(family.scheduler_config, sigmas, "euler"),
        conditioning,
        grid=fit_grid(*start.shape[-2:], max_tile=192, overlap=16),
        tile_batch=4,
        seed=1,
    )

    arguments = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "image": image,
        "control_image": image,
        "strength": 1.0,
        "num_inference_steps": len(sigmas) - 1,
        "guidance_scale": guidance_scale,
        "controlnet_conditioning_scale": 0.7,
        "latents": noised,
    }
    stock = stock_pipeline(pocket, vae, sigmas)
    latents = stock(**arguments, output_type="latent").images
    pixels = stock(**arguments, output_type="pt").images
    assert (ours - latents).abs().max() < 1e-4
    assert (tiled_vae.decode(ours).clamp(0, 1) - pixels).abs().max() < 1 / 255


@torch.inference_mode()
def test_no_shape_preservation_never_calls_the_controlnet(
    family: StableDiffusion15, photo_crop: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At scale 0 a third of the work is left out, not multiplied by nothing."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the ControlNet was called")

    monkeypatch.setattr(family.controlnet, "forward", refuse)
    conditioning = family.encode(
        PROMPT, NEGATIVE, guidance_scale=7.5, hint=to_tensor(photo_crop), controlnet_conditioning_scale=0.0
    )
    tiles = torch.randn(1, 16, 16, 16)

    noise = family.predict(tiles, fit_grid(16, 16, max_tile=64, overlap=8).tiles(), 300.0, conditioning)

    assert noise.shape == tiles.shape


@torch.inference_mode()
def test_hint_strips_equal_the_whole_hint(
    family: StableDiffusion15, photo_crop: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embedding a hint strip by strip gives what embedding it whole gives."""
    hint = to_tensor(photo_crop)
    whole = family.hint_embedding(hint)

    monkeypatch.setattr("pipelines.unet.HINT_STRIP_PX", 32)
    strips = family.embed_hint(hint)

    assert torch.allclose(strips, whole, atol=1e-5)


@torch.inference_mode()
def test_unguided_request_runs_one_half(family: StableDiffusion15, photo_crop: Image.Image) -> None:
    """Guidance 1 encodes no negative prompt, so nothing is computed for it."""
    conditioning = family.encode(
        PROMPT, NEGATIVE, guidance_scale=1.0, hint=to_tensor(photo_crop), controlnet_conditioning_scale=1.0
    )

    assert conditioning.prompt_embeds.shape[0] == 1

"""Our loop against diffusers' own Stable Diffusion XL pipeline, on random weights: the proof that the loop is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    EulerDiscreteScheduler,
    StableDiffusionXLControlNetImg2ImgPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from pipelines.delivery import to_tensor
from pipelines.multidiffusion import tiled_denoise
from pipelines.samplers import NoiseSampler
from pipelines.schedules import sigma_bounds, sigma_ramp
from pipelines.sdxl import StableDiffusionXL, XLConditioning
from pipelines.tiling import Tile, fit_grid
from pipelines.vae import TiledVAE
from tests.pipelines.small_sdxl import write_small_sdxl
from weights.store import WeightStore

PROMPT = "a photograph, high quality, sharp"
NEGATIVE = "blurry, grainy"


class FixedSigmas(EulerDiscreteScheduler):
    """Stock Euler that answers every call for timesteps with the same noise levels."""

    fixed: Tensor

    def set_timesteps(self, num_inference_steps: int | None = None, device: Any = None, **_: Any) -> None:  # type: ignore[override]
        super().set_timesteps(sigmas=self.fixed.tolist(), device=device)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set on disk, with its ControlNet in `controlnet`."""
    path = tmp_path_factory.mktemp("sdxl")
    write_small_sdxl(path, path / "controlnet")
    return path


@pytest.fixture(scope="module")
def family(folder: Path) -> StableDiffusionXL:
    return StableDiffusionXL.load(folder, folder / "controlnet", device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="module")
def vae(pocket: WeightStore) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(pocket.folder("vae"), torch_dtype=torch.float32, local_files_only=True).eval()


def stock_pipeline(folder: Path, vae: AutoencoderKL, sigmas: Tensor) -> StableDiffusionXLControlNetImg2ImgPipeline:
    """diffusers' ControlNet img2img pipeline over a second copy of the same weights."""
    scheduler = FixedSigmas.from_pretrained(folder / "scheduler", local_files_only=True)
    scheduler.fixed = sigmas
    pipeline = StableDiffusionXLControlNetImg2ImgPipeline(
        vae=vae,
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2", local_files_only=True),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2", local_files_only=True),
        unet=UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True),
        controlnet=ControlNetModel.from_pretrained(folder / "controlnet", local_files_only=True),
        scheduler=scheduler,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
@torch.inference_mode()
def test_one_tile_gives_the_stock_pipeline(
    folder: Path, family: StableDiffusionXL, vae: AutoencoderKL, photo_crop: Image.Image, guidance_scale: float
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
    stock = stock_pipeline(folder, vae, sigmas)
    latents = stock(**arguments, output_type="latent").images
    pixels = stock(**arguments, output_type="pt").images
    assert (ours - latents).abs().max() < 1e-4
    assert (tiled_vae.decode(ours).clamp(0, 1) - pixels).abs().max() < 1 / 255


@torch.inference_mode()
def test_a_tile_is_told_where_it_lies(family: StableDiffusionXL) -> None:
    """Size of the whole picture, the tile's corner in it and the tile's own size, all in pixels, for both halves."""
    hint = torch.rand(1, 3, 192, 320)
    conditioning = family.encode("a", "b", guidance_scale=5, hint=hint, controlnet_conditioning_scale=1)
    places = [Tile(0, 0, 32, 40), Tile(16, 40, 48, 80)]

    told = family._added_conditions(places, conditioning)

    first, second = [192, 320, 0, 0, 128, 160], [192, 320, 64, 160, 128, 160]
    assert told["time_ids"].tolist() == [first, second, first, second]
    assert told["text_embeds"].shape == (4, 24)


@torch.inference_mode()
def test_the_place_of_a_tile_moves_its_prediction(family: StableDiffusionXL) -> None:
    """The same latents at two places of one picture are not the same to the model."""
    conditioning = family.encode(
        "a", "", guidance_scale=1, hint=torch.rand(1, 3, 128, 256), controlnet_conditioning_scale=0
    )
    tile = torch.randn(1, 16, 16, 16).repeat(2, 1, 1, 1)

    left, right = family.predict(tile, [Tile(0, 0, 16, 16), Tile(0, 48, 16, 64)], 300.0, conditioning)

    assert (left - right).abs().max() > 1e-4


@torch.inference_mode()
def test_an_empty_text_is_zeros(family: StableDiffusionXL) -> None:
    """Without a negative prompt guidance starts from what the model learnt as "no caption"."""
    conditioning = family.encode(
        "a", " ", guidance_scale=5, hint=torch.rand(1, 3, 64, 64), controlnet_conditioning_scale=0
    )

    assert not conditioning.prompt_embeds[0].any() and not conditioning.pooled_prompt_embeds[0].any()
    assert conditioning.prompt_embeds[1].any() and conditioning.pooled_prompt_embeds[1].any()


@torch.inference_mode()
def test_an_embedding_changes_its_prompt_only(family: StableDiffusionXL) -> None:
    """A textual inversion has vectors for both encoders; what is written without it stays as it was."""
    vectors = [{"charm": torch.randn(3, 16)}, {"charm": torch.randn(3, 24)}]
    hint = torch.rand(1, 3, 64, 64)

    def encode(prompt: str, embeddings: Any = ()) -> XLConditioning:
        return family.encode(
            prompt, "bad", guidance_scale=5, hint=hint, controlnet_conditioning_scale=0, embeddings=embeddings
        )

    plain, charmed, unused = encode("a charm"), encode("a charm", vectors), encode("a", vectors)

    assert torch.equal(plain.prompt_embeds[0], charmed.prompt_embeds[0])
    changed = (plain.prompt_embeds[1] != charmed.prompt_embeds[1]).any(dim=0)
    assert changed[:16].any() and changed[16:].any()
    assert not torch.equal(plain.pooled_prompt_embeds[1], charmed.pooled_prompt_embeds[1])
    assert torch.equal(unused.prompt_embeds, encode("a").prompt_embeds)


def test_the_real_networks_fit() -> None:
    """The published configurations, without memory: 2.57 and 1.25 billion parameters, one guided batch of two tiles."""
    real: dict[str, Any] = {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    with torch.device("meta"):
        unet = UNet2DConditionModel(**real)
        controlnet = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
        tiles, hint, embeds = torch.empty(2, 4, 128, 96), torch.empty(1, 3, 1024, 1536), torch.empty(2, 77, 2048)
        pooled = torch.empty(2, 1280)
    sizes = [sum(parameter.numel() for parameter in network.parameters()) for network in (unet, controlnet)]
    text_encoder: Any = torch.nn.Identity()
    family = StableDiffusionXL(unet, controlnet, (text_encoder, text_encoder), (None, None), {})  # type: ignore[arg-type]
    conditioning = XLConditioning(
        prompt_embeds=embeds,
        pooled_prompt_embeds=pooled,
        guidance_scale=7.5,
        hint=family.embed_hint(hint),
        controlnet_conditioning_scale=1.0,
        picture_size=(1024, 1536),
    )

    noise = family.predict(tiles, [Tile(0, 0, 128, 96), Tile(0, 96, 128, 192)], 500.0, conditioning)

    assert sizes == [2_567_463_684, 1_251_014_160]
    assert family.size_multiple == 4 and family.scale_factor == 8
    assert noise.shape == (2, 4, 128, 96)

"""Repositories in the layouts that were published, with small files: what a local hub serves."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

from tests.weights.hub_server import Repository

TOKENIZER = {
    "tokenizer_config.json": b"{}",
    "vocab.json": b'{"a": 0}',
    "merges.txt": b"#version: 0.2\n",
    "special_tokens_map.json": b"{}",
}


def tensors(seed: int, num_bytes: int = 200_000) -> bytes:
    """A safetensors file of about so many bytes, as no other."""
    values = np.random.default_rng(seed).integers(0, 2**15, num_bytes // 2, dtype=np.int16)
    return save({"weight": values})


def pickled(seed: int, num_bytes: int = 100_000) -> bytes:
    """A pickle of tensors."""
    file = io.BytesIO()
    torch.save({"weight": torch.from_numpy(np.random.default_rng(seed).random(num_bytes // 8))}, file)
    return file.getvalue()


def in_folder(folder: str, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Files in a folder."""
    return {f"{folder}/{name}": content for name, content in files.items()}


def config(**values: Any) -> bytes:
    """A config."""
    return json.dumps(values).encode()


def shards(name: str, seed: int) -> dict[str, bytes]:
    """Tensors in two shards with their index."""
    names = [f"{name}-0000{number}-of-00002.safetensors" for number in (1, 2)]
    last = [shard.rpartition("/")[2] for shard in names]
    index = {"weight_map": {f"layer{number}": shard for number, shard in enumerate(last)}}
    return {f"{name}.safetensors.index.json": config(**index)} | {
        shard: tensors(seed + number) for number, shard in enumerate(names)
    }


def published() -> dict[str, Repository]:
    """The repositories of the catalogue, as they are published: with what is not wanted of them, too."""
    sd15 = {
        "README.md": b"# Stable Diffusion",
        "v1-5-pruned.safetensors": tensors(1),
        "model_index.json": b"{}",
        "unet/config.json": config(_class_name="UNet2DConditionModel", cross_attention_dim=768),
        "unet/diffusion_pytorch_model.safetensors": tensors(2),
        "unet/diffusion_pytorch_model.fp16.safetensors": tensors(3, 400_000),
        "unet/diffusion_pytorch_model.non_ema.safetensors": tensors(4),
        "text_encoder/config.json": config(model_type="clip_text_model"),
        "text_encoder/model.safetensors": tensors(5),
        "text_encoder/model.fp16.safetensors": tensors(6),
        **in_folder("tokenizer", TOKENIZER),
        "scheduler/scheduler_config.json": config(prediction_type="epsilon"),
        "safety_checker/config.json": config(architectures=["StableDiffusionSafetyChecker"]),
        "safety_checker/model.safetensors": tensors(7),
        "safety_checker/model.fp16.safetensors": tensors(8),
        "feature_extractor/preprocessor_config.json": config(size=224),
        "vae/config.json": config(_class_name="AutoencoderKL", latent_channels=4),
        "vae/diffusion_pytorch_model.fp16.safetensors": tensors(9),
        "vae/diffusion_pytorch_model.safetensors": tensors(10),
    }
    sdxl = {
        "sd_xl_base_1.0.safetensors": tensors(20),
        "unet/config.json": config(_class_name="UNet2DConditionModel", addition_embed_type="text_time"),
        "unet/diffusion_pytorch_model.fp16.safetensors": tensors(21),
        "text_encoder/config.json": b"{}",
        "text_encoder/model.fp16.safetensors": tensors(22),
        "text_encoder_2/config.json": b"{}",
        "text_encoder_2/model.fp16.safetensors": tensors(23),
        **in_folder("tokenizer", TOKENIZER),
        **in_folder("tokenizer_2", TOKENIZER),
        "scheduler/scheduler_config.json": b"{}",
        "vae/config.json": config(_class_name="AutoencoderKL", latent_channels=4, scaling_factor=0.13025),
        "vae/diffusion_pytorch_model.safetensors": tensors(24),
    }
    flux = {
        "flux1-dev.safetensors": tensors(30),
        "transformer/config.json": config(_class_name="FluxTransformer2DModel"),
        **shards("transformer/diffusion_pytorch_model", 31),
        "text_encoder/config.json": b"{}",
        "text_encoder/model.safetensors": tensors(34),
        "text_encoder_2/config.json": b"{}",
        **shards("text_encoder_2/model", 35),
        **in_folder("tokenizer", TOKENIZER),
        "tokenizer_2/tokenizer_config.json": b"{}",
        "tokenizer_2/tokenizer.json": b"{}",
        "tokenizer_2/spiece.model": b"pieces",
        "scheduler/scheduler_config.json": b"{}",
        "vae/config.json": config(_class_name="AutoencoderKL", latent_channels=16),
        "vae/diffusion_pytorch_model.safetensors": tensors(38),
    }
    klein = {
        "flux-2-klein-4b.safetensors": tensors(40),
        "transformer/config.json": config(_class_name="Flux2Transformer2DModel"),
        "transformer/diffusion_pytorch_model.safetensors": tensors(41, 400_000),
        "text_encoder/config.json": b"{}",
        **shards("text_encoder/model", 42),
        **in_folder("tokenizer", TOKENIZER | {"tokenizer.json": b"{}", "chat_template.jinja": b"{{ x }}"}),
        "scheduler/scheduler_config.json": b"{}",
        "vae/config.json": config(_class_name="AutoencoderKLFlux2"),
        "vae/diffusion_pytorch_model.safetensors": tensors(45),
    }
    autoencoder = config(_class_name="AutoencoderKL", latent_channels=4)
    control = {
        "config.json": config(_class_name="ControlNetModel"),
        "diffusion_pytorch_model.bin": pickled(50),
        "diffusion_pytorch_model.fp16.bin": pickled(51),
        "images/original.png": b"png",
    }
    control_xl = {"config.json": config(_class_name="ControlNetModel", addition_embed_type="text_time")}
    control_flux = {"config.json": config(_class_name="FluxControlNetModel")}
    weights = "diffusion_pytorch_model.safetensors"
    vision = {"preprocessor_config.json": b"{}", "generation_config.json": b"{}", "tokenizer.json": b"{}", **TOKENIZER}
    xl_vae = config(_class_name="AutoencoderKL", scaling_factor=0.13025)
    nsfw = config(architectures=["ViTForImageClassification"])
    return {
        "stable-diffusion-v1-5/stable-diffusion-v1-5": Repository(sd15, license="creativeml-openrail-m"),
        "stabilityai/sd-vae-ft-mse": Repository({"config.json": autoencoder, weights: tensors(60)}),
        "lllyasviel/control_v11f1e_sd15_tile": Repository(control, license="openrail"),
        "stabilityai/stable-diffusion-xl-base-1.0": Repository(sdxl),
        "madebyollin/sdxl-vae-fp16-fix": Repository({"config.json": xl_vae, weights: tensors(61)}),
        "xinsir/controlnet-tile-sdxl-1.0": Repository({**control_xl, weights: tensors(62)}),
        "Comfy-Org/Real-ESRGAN_repackaged": Repository({"RealESRGAN_x4plus.safetensors": tensors(63)}),
        "Kijai/ccsr-safetensors": Repository({"real-world_ccsr-fp16.safetensors": tensors(64)}),
        "Salesforce/blip2-flan-t5-xl": Repository(
            {"config.json": config(model_type="blip-2"), **shards("model", 65), **vision}
        ),
        "Falconsai/nsfw_image_detection": Repository(
            {"config.json": nsfw, "model.safetensors": tensors(68), "preprocessor_config.json": b"{}"}
        ),
        "black-forest-labs/FLUX.1-dev": Repository(flux, gated=True, license="other"),
        "jasperai/Flux.1-dev-Controlnet-Upscaler": Repository({**control_flux, weights: tensors(69)}),
        "black-forest-labs/FLUX.2-klein-4B": Repository(klein, license="apache-2.0"),
        "Qwen/Qwen3-VL-2B-Instruct": Repository(
            {"config.json": config(model_type="qwen3_vl"), "model.safetensors": tensors(70), **vision}
        ),
    }

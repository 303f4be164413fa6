"""The published architectures at full size, with random numbers, as single files: they load and run one step."""

from __future__ import annotations

import json
import math
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from pipelines.base_model import load_base, with_networks
from pipelines.sd15 import StableDiffusion15
from pipelines.sdxl import StableDiffusionXL
from pipelines.tiling import Tile
from tests.weights.base_files import shapes_of
from weights.configs import CONFIGS
from weights.fetch import WeightFile
from weights.hub import BaseFiles
from weights.store import WeightStore

MAX_MEMORY_BYTES = 20 * 2**30
CHUNK = 2**24


def on_meta(family: str, tokenizer: CLIPTokenizer) -> tuple[Any, AutoencoderKL]:
    """A family without numbers, and its VAE."""
    configs = CONFIGS[family]
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(configs["unet"])
        controlnet = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
        vae = AutoencoderKL.from_config(configs["vae"])
        first = CLIPTextModel(CLIPTextConfig(**configs["text_encoder"]))
        if family == "sd15":
            return StableDiffusion15(unet, controlnet, first, tokenizer, dict(configs["scheduler"])), vae
        second = CLIPTextModelWithProjection(CLIPTextConfig(**configs["text_encoder_2"]))
        encoders, tokenizers = (first, second), (tokenizer, tokenizer)
        return StableDiffusionXL(unet, controlnet, encoders, tokenizers, dict(configs["scheduler"])), vae


def write_random(shapes: dict[str, tuple[int, ...]], path: Path) -> None:
    """A safetensors file of bfloat16 noise, written piece by piece: the whole would not fit into memory twice."""
    header, place = {}, 0
    for name, shape in shapes.items():
        end = place + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    noise = (0.02 * torch.randn(CHUNK, generator=torch.Generator().manual_seed(1))).bfloat16()
    data = noise.view(torch.uint8).numpy().tobytes()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while place:
            place -= file.write(data[: min(place, len(data))])


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), [("sd15", "SD_1_5"), ("sdxl", "SDXL")])
@torch.inference_mode()
def test_a_full_size_checkpoint_loads_and_runs(pocket: WeightStore, tmp_path: Path, family: str, name: str) -> None:
    """Real configs, the real loader, one step on the CPU, below 20 GB of memory."""
    tokenizer = CLIPTokenizer.from_pretrained(pocket.folder("sd15") / "tokenizer", local_files_only=True)
    model, vae = on_meta(family, tokenizer)
    path = tmp_path / "full.safetensors"
    write_random(shapes_of(model, vae), path)
    file = WeightFile(path=path, name=path.name, sha256="")

    networks = load_base(
        model,
        vae,
        BaseFiles(name="full", files={"checkpoint": file}),
        name,
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        vae_dtype=torch.bfloat16,
    )
    loaded = with_networks(model, networks)
    conditioning = loaded.encode(
        "a cat", "", guidance_scale=1.0, hint=torch.zeros(1, 3, 128, 128), controlnet_conditioning_scale=0.0
    )
    noise = loaded.predict(torch.randn(1, 4, 16, 16), [Tile(0, 0, 16, 16)], 500.0, conditioning)
    assert networks.vae is not None
    pixels = networks.vae.decode(torch.randn(1, 4, 8, 8).bfloat16()).sample

    assert noise.shape == (1, 4, 16, 16) and bool(noise.isfinite().all())
    assert pixels.shape == (1, 3, 64, 64)
    assert all(encoder is not None for encoder in networks.text_encoders)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < MAX_MEMORY_BYTES
    path.unlink()

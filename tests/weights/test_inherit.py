"""The XL- and CCSR-shaped parts begin with what is known, can be trained, and the product loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from pipelines.ccsr import CCSR
from pipelines.prescale import Lanczos
from pipelines.sdxl import StableDiffusionXL
from weights.ccsr import read_layout
from weights.pocket.data import PHOTOS
from weights.pocket.inherit import Ancestors, ancestors, inherit
from weights.pocket.loop import Options, train
from weights.pocket.train_ccsr import ONE_STEP, CcsrTrainee
from weights.pocket.train_sdxl import SdxlTrainee, draw_time_ids

MODELS = PHOTOS.parent / "models"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained() -> Ancestors:
    """The committed part, praised."""
    found = ancestors(MODELS, "high quality, sharp")
    assert found is not None
    return found


@pytest.fixture
def options(tmp_path: Path) -> Options:
    """Two steps of two crops beside the committed parts that a recipe builds on."""
    models = tmp_path / "models"
    models.mkdir()
    for part in ("vae", "upscaler-compact-x2", "sd15", "controlnet-tile-sd15"):
        (models / part).symlink_to(MODELS / part)
    return Options(steps=2, batch=2, num_drawings=4, models=models, build=tmp_path / "build")


@torch.inference_mode()
def test_a_text_can_be_built_in(trained: Ancestors) -> None:
    """A network without a way in for pooled text answers as its ancestor does to that text."""
    options: dict[str, Any] = {"torch_dtype": torch.float32, "local_files_only": True}
    ancestor = UNet2DConditionModel.from_pretrained(MODELS / "sd15" / "unet", **options).eval()
    plain = dict(ancestor.config) | {"addition_embed_type": None, "use_linear_projection": True}
    heir = UNet2DConditionModel.from_config(plain).eval()
    latents, timestep = torch.randn(1, 16, 16, 16), torch.tensor(300)

    left_over = inherit(heir, trained.unet)

    expected = ancestor(latents, timestep, trained.prompt_embeds).sample
    assert left_over == []
    assert torch.allclose(heir(latents, timestep, trained.prompt_embeds).sample, expected, atol=1e-4)


def test_without_the_part_there_is_nothing_to_inherit(tmp_path: Path) -> None:
    """A set that begins from nothing says so."""
    assert ancestors(tmp_path, "") is None


def test_tiles_are_drawn_inside_their_pictures() -> None:
    """The six numbers of training are ones that can occur: a tile's corner and size within the picture."""
    height, width, top, left, tile_height, tile_width = draw_time_ids(np.random.default_rng(1), 500).T

    assert bool((top + tile_height <= height + 1).all() and (left + tile_width <= width + 1).all())
    assert bool((tile_height >= 64).all() and (top > 0).any() and (top == 0).any())


def test_the_xl_part_can_be_trained(options: Options) -> None:
    """Two steps write a set that the family loads: with both encoders, and "!" as the second one's padding."""
    train(SdxlTrainee(options, side_px=32, num_portions=1), options)

    family = StableDiffusionXL.load(
        options.models / "sdxl", options.models / "controlnet-tile-sdxl", device=CPU, dtype=torch.float32
    )
    conditioning = family.encode(
        "blue", "", guidance_scale=3, hint=torch.rand(1, 3, 64, 64), controlnet_conditioning_scale=1
    )
    assert [tokenizer.pad_token for tokenizer in family.tokenizers] == ["<|endoftext|>", "!"]
    assert conditioning.prompt_embeds.shape == (2, 77, 128)
    assert all(network.dtype == torch.float32 for network in (family.unet, family.controlnet))


def test_the_ccsr_part_begins_as_an_identity(options: Options) -> None:
    """Before the first step, one call gives the latents of the picture back, whatever noise was added."""
    trainee = CcsrTrainee(options, side_px=64, num_portions=1)
    latents = trainee.pool.store.start[:4]
    noise, cumulative = torch.randn_like(latents), trainee.alphas_cumprod[ONE_STEP]
    noisy = cumulative.sqrt() * latents + (1 - cumulative).sqrt() * noise

    with torch.no_grad():
        predicted = trainee._predict(noisy, torch.tensor([ONE_STEP]), latents)

    clean = (noisy - (1 - cumulative).sqrt() * predicted) / cumulative.sqrt()
    assert (clean - latents).square().mean().sqrt() < 0.05


def test_the_ccsr_part_can_be_trained(options: Options) -> None:
    """Two steps write both versions, which share their networks, and the pre-stage runs on either."""
    train(CcsrTrainee(options, side_px=32, num_portions=1), options)

    for name, num_steps in (("ccsr-v1", 6), ("ccsr-v2", 1)):
        folder = options.models / name
        ccsr = CCSR.load(folder, device=CPU, dtype=torch.float32, base=Lanczos()).with_layout(num_steps=num_steps)
        restored = ccsr(torch.rand(1, 3, 16, 16), (32, 32), seed=1)
        assert read_layout(folder).version == name[-2:]
        assert restored.shape == (1, 3, 32, 32) and bool(restored.isfinite().all())
    written = {str(file.relative_to(options.models)) for file in options.models.rglob("*.safetensors")}
    assert not any(file.startswith("ccsr-v2") for file in written)

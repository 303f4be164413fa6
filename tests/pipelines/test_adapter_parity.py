"""LoRA and embeddings against diffusers' own loaders: the pixels of the stock pipelines, for both families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from pipelines.adapters import applied, match
from pipelines.delivery import to_tensor
from pipelines.multidiffusion import tiled_denoise
from pipelines.samplers import NoiseSampler
from pipelines.schedules import sigma_bounds, sigma_ramp
from pipelines.sd15 import StableDiffusion15
from pipelines.sdxl import StableDiffusionXL
from pipelines.tiling import fit_grid
from pipelines.vae import TiledVAE
from tests.pipelines import test_sd15, test_sdxl
from tests.pipelines.small_sdxl import write_small_sdxl
from tests.weights.lora_files import before_peft, kohya, peft, random_changes, sdxl_kohya, written
from weights.embedding import fitting, read_embedding
from weights.lora import Change, read_lora
from weights.store import WeightStore

STEPS, GUIDANCE, CONTROL = 5, 5.0, 0.7


@dataclass(frozen=True)
class Side:
    """A family of ours, and how to make diffusers' pipeline over the same weights."""

    family: Any
    vae: AutoencoderKL
    stock: Callable[[Tensor], Any]


@pytest.fixture(scope="module", params=["SD_1_5", "SDXL"])
def side(request: pytest.FixtureRequest, pocket: WeightStore, tmp_path_factory: pytest.TempPathFactory) -> Side:
    options: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
    vae = AutoencoderKL.from_pretrained(pocket.folder("vae"), torch_dtype=torch.float32, local_files_only=True).eval()
    if request.param == "SD_1_5":
        sd15 = StableDiffusion15.load(pocket.folder("sd15"), pocket.folder("controlnet-tile-sd15"), **options)
        return Side(sd15, vae, lambda sigmas: test_sd15.stock_pipeline(pocket, vae, sigmas))
    folder = tmp_path_factory.mktemp("sdxl")
    write_small_sdxl(folder, folder / "controlnet")
    sdxl = StableDiffusionXL.load(folder, folder / "controlnet", **options)
    return Side(sdxl, vae, lambda sigmas: test_sdxl.stock_pipeline(folder, vae, sigmas))


def ours(side: Side, image: Tensor, noised: Tensor, sigmas: Tensor, prompt: str, negative: str, **told: Any) -> Tensor:
    """Our pixels (1, 3, H, W)."""
    conditioning = side.family.encode(
        prompt, negative, guidance_scale=GUIDANCE, hint=image, controlnet_conditioning_scale=CONTROL, **told
    )
    latents = tiled_denoise(
        side.family,
        noised,
        NoiseSampler(side.family.scheduler_config, sigmas, "euler"),
        conditioning,
        grid=fit_grid(*noised.shape[-2:], max_tile=192, overlap=16),
        tile_batch=4,
        seed=1,
    )
    return TiledVAE(side.vae).decode(latents).clamp(0, 1)


def theirs(stock: Any, image: Tensor, noised: Tensor, sigmas: Tensor, prompt: str, negative: str) -> Tensor:
    """diffusers' pixels (1, 3, H, W)."""
    return stock(
        prompt=prompt,
        negative_prompt=negative,
        image=image,
        control_image=image,
        strength=1.0,
        num_inference_steps=len(sigmas) - 1,
        guidance_scale=GUIDANCE,
        controlnet_conditioning_scale=CONTROL,
        latents=noised,
        output_type="pt",
    ).images


def start(side: Side, photo_crop: Image.Image) -> tuple[Tensor, Tensor, Tensor]:
    """The picture, its noised latents and the noise levels."""
    image = to_tensor(photo_crop.crop((0, 0, 64, 64)))
    sigmas = sigma_ramp(0.6, STEPS, *sigma_bounds(side.family.scheduler_config))
    latents = TiledVAE(side.vae).encode(image)
    return image, latents + float(sigmas[0]) * torch.randn(latents.shape), sigmas


@pytest.mark.parametrize("spelling", ["kohya", "peft"])
@torch.inference_mode()
def test_a_lora_gives_the_stock_pipelines_pixels(
    side: Side, photo_crop: Image.Image, tmp_path: Path, spelling: str
) -> None:
    """A LoRA on UNet and text encoders, at a scale, within 1/255 of what diffusers makes of the same file."""
    changes = random_changes(side.family, size=1.0)
    file = written(kohya(changes) if spelling == "kohya" else peft(changes), tmp_path / "lora.safetensors")
    image, noised, sigmas = start(side, photo_crop)
    texts = ("a photograph, sharp", "blurry")
    plain = ours(side, image, noised, sigmas, *texts)

    with applied(match(read_lora(file), side.family, "this family").layers, 0.7):
        made = ours(side, image, noised, sigmas, *texts)

    stock = side.stock(sigmas)
    with torch.inference_mode(False):
        stock.load_lora_weights(tmp_path, weight_name="lora.safetensors", adapter_name="x")
        stock.set_adapters("x", 0.7)
    difference = (made - theirs(stock, image, noised, sigmas, *texts)).abs().max()
    assert difference < 1 / 255
    assert difference < 0.1 * (made - plain).abs().max()


def without_alpha(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("alpha")}


FILES: dict[str, Callable[[Any, dict[str, Any]], dict[str, Tensor]]] = {
    "kohya": lambda family, options: kohya(random_changes(family, **options)),
    "kohya without alpha": lambda family, options: without_alpha(kohya(random_changes(family, **options))),
    "kohya, SDXL's own numbers": lambda family, options: sdxl_kohya(
        random_changes(family, **options), family.unet.config.layers_per_block
    ),
    "peft": lambda family, options: peft(random_changes(family, **options)),
    "diffusers before peft": lambda family, options: before_peft(random_changes(family, text=False)),
    "half precision": lambda family, options: {
        name: tensor.bfloat16() for name, tensor in kohya(random_changes(family, **options)).items()
    },
}


@pytest.mark.parametrize("text", [True, False], ids=["both", "UNet alone"])
@pytest.mark.parametrize("spelling", FILES)
def test_a_lora_changes_the_layers_that_diffusers_changes(
    side: Side, tmp_path: Path, spelling: str, text: bool
) -> None:
    """diffusers' own loader is the judge of which layers a file means, convolutions included, and by how much."""
    if "SDXL" in spelling and len(side.family.text_encoders) < 2:
        pytest.skip("Stable Diffusion 1.5 has no such files")
    file = written(FILES[spelling](side.family, {"text": text}), tmp_path / "lora.safetensors")
    found = match(read_lora(file), side.family, "this family")
    stock = side.stock(torch.ones(3))
    stock.load_lora_weights(tmp_path, weight_name="lora.safetensors", adapter_name="x")

    encoders = ("text_encoder", "text_encoder_2")[: len(side.family.text_encoders)]
    parts = {"unet": side.family.unet, **dict(zip(encoders, side.family.text_encoders, strict=True))}
    names = {id(module): (part, name) for part, root in parts.items() for name, module in root.named_modules()}
    ours = {names[id(module)]: change for module, change in found.layers}
    theirs = {
        (part, name): module
        for part in parts
        for name, module in getattr(stock, part).named_modules()
        if hasattr(module, "get_delta_weight") and module.lora_A
    }

    assert found.num_unknown == 0 and ours.keys() == theirs.keys() and len(ours) > 10
    for place, change in ours.items():
        assert isinstance(change, Change)
        delta = theirs[place].get_delta_weight("x").detach().flatten(1).float()
        product = change.up.flatten(1).float() @ change.down.flatten(1).float()
        assert torch.allclose(change.scale * product, delta, atol=1e-2 * float(delta.abs().max())), place


@torch.inference_mode()
def test_an_embedding_gives_the_stock_pipelines_pixels(side: Side, photo_crop: Image.Image, tmp_path: Path) -> None:
    """A textual inversion of several vectors in prompt and negative prompt, within 1/255 of diffusers' pixels."""
    widths = tuple(encoder.config.hidden_size for encoder in side.family.text_encoders)
    vectors = [torch.randn(3, width) for width in widths]
    names = ["emb_params"] if len(widths) == 1 else ["clip_l", "clip_g"]
    save_file(dict(zip(names, vectors, strict=True)), tmp_path / "qqword.safetensors")
    image, noised, sigmas = start(side, photo_crop)
    texts = ("a qqword, sharp", "blurry qqword")
    rows = fitting(read_embedding(tmp_path / "qqword.safetensors"), widths)
    plain = ours(side, image, noised, sigmas, *texts)

    made = ours(side, image, noised, sigmas, *texts, embeddings=[{"qqword": row} for row in rows])

    stock = side.stock(sigmas)
    encoders = [("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")]
    with torch.inference_mode(False):
        for vector, (encoder, tokenizer) in zip(vectors, encoders, strict=False):
            stock.load_textual_inversion(
                {"qqword": vector},
                token="qqword",
                text_encoder=getattr(stock, encoder),
                tokenizer=getattr(stock, tokenizer),
            )
    difference = (made - theirs(stock, image, noised, sigmas, *texts)).abs().max()
    assert difference < 1 / 255
    assert difference < 0.1 * (made - plain).abs().max()

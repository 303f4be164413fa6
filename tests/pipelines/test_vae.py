"""The tiled VAE against the untiled network, on random weights of the real classes."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL

from pipelines.vae import TiledVAE, decoder_halo, pad_to_multiple


def random_vae(levels: int = 3, seed: int = 0, *, attention: bool = True) -> AutoencoderKL:
    """A small VAE with random weights and normalisations that are not the identity."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16, 16)[:levels],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=2,
        mid_block_add_attention=attention,
    ).eval()
    for module in vae.modules():
        if isinstance(module, torch.nn.GroupNorm):
            torch.nn.init.normal_(module.weight, 1.0, 0.3)
            torch.nn.init.normal_(module.bias, 0.0, 0.3)
    return vae


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Root mean square difference over the wanted picture's standard deviation."""
    return float((found - wanted).square().mean().sqrt() / wanted.std())


@pytest.mark.parametrize("size", [(128, 128), (132, 200), (64, 196)])
@torch.inference_mode()
def test_tiled_decode_equals_untiled_decode(size: tuple[int, int]) -> None:
    """Tiles of an eighth of the picture, slivers included, decode to the untiled picture to round-off."""
    vae = random_vae()
    latents = torch.randn(1, 4, size[0] // 4, size[1] // 4)

    tiled = TiledVAE(vae, max_tile_px=64).decode(latents)

    wanted = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0] / 2 + 0.5
    assert tiled.shape == wanted.shape
    assert relative_error(tiled, wanted) < 1e-5


@torch.inference_mode()
def test_tiled_encode_equals_the_posterior_mean() -> None:
    """Encoding in tiles gives the scaled posterior mean of the untiled encoder to round-off."""
    vae = random_vae()
    image = torch.rand(1, 3, 128, 196)

    latents = TiledVAE(vae, max_tile_px=64).encode(image)

    wanted = vae.encode(image * 2 - 1).latent_dist.mode() * vae.config.scaling_factor
    assert relative_error(latents, wanted) < 1e-5


@torch.inference_mode()
def test_16_bit_decode_is_as_exact_as_the_stock_one() -> None:
    """In bfloat16, normalising in 32 bits keeps the error to the 32-bit picture where the stock network has it."""
    vae = random_vae()
    latents = torch.randn(1, 4, 32, 32)
    wanted = TiledVAE(vae).decode(latents)
    half = random_vae().to(torch.bfloat16)

    ours = relative_error(TiledVAE(half, max_tile_px=64).decode(latents), wanted)

    z = (latents / vae.config.scaling_factor).to(torch.bfloat16)
    stock = relative_error(half.decode(z, return_dict=False)[0].float() / 2 + 0.5, wanted)
    assert ours < 1.5 * stock


@torch.inference_mode()
def test_parked_tiles_change_nothing() -> None:
    """Keeping waiting tiles on another device is a matter of memory alone."""
    vae = random_vae()
    latents = torch.randn(1, 4, 32, 32)

    here = TiledVAE(vae, max_tile_px=64).decode(latents)
    parked = TiledVAE(vae, max_tile_px=64, park_device=torch.device("cpu")).decode(latents)

    assert torch.equal(here, parked)


@torch.inference_mode()
def test_bands_follow_each_other() -> None:
    """Bands come from top to bottom, two latents of one size give the same heights."""
    vae = TiledVAE(random_vae(), max_tile_px=64)

    heights = [band.shape[-2] for band in vae.decode_bands(torch.randn(1, 4, 40, 16))]

    assert sum(heights) == 160
    assert heights == [band.shape[-2] for band in vae.decode_bands(torch.randn(1, 4, 40, 16))]


def testdecoder_halo_of_stable_diffusion_is_13_latents() -> None:
    """The receptive radius of the published decoder's up path is 12.25 latents."""
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )

    assert decoder_halo(vae) == 13


@pytest.mark.parametrize("size", [(1, 1), (5, 40), (32, 33)])
def test_padding_reaches_the_multiple_and_keeps_the_picture(size: tuple[int, int]) -> None:
    """Padded pictures are multiples on both sides, with the picture untouched in the upper left corner."""
    image = torch.rand(1, 3, *size)

    padded = pad_to_multiple(image, 32)

    assert padded.shape[-2] % 32 == 0 and padded.shape[-1] % 32 == 0
    assert torch.equal(padded[..., : size[0], : size[1]], image)

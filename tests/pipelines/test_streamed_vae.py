"""The VAE in bounded memory: exact where its sample is the whole picture, close where it is not, and never seamed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from pipelines import streamed_vae
from pipelines.delivery import to_tensor
from pipelines.spool import Spool
from pipelines.streamed_vae import StreamedVAE
from pipelines.vae import TiledVAE
from tests.conftest import PHOTOS
from tests.pipelines.test_vae import random_vae, relative_error
from weights.store import WeightStore


@pytest.mark.parametrize("attention", [False, True])
@torch.inference_mode()
def test_one_tile_that_is_its_own_sample_is_exact(attention: bool) -> None:
    """Encoder and decoder, with and without attention in the middle, equal the untiled network to round-off."""
    vae = random_vae(attention=attention)
    image = torch.rand(1, 3, 96, 64)
    streamed = StreamedVAE(TiledVAE(vae))

    latents = streamed.encode(image)
    decoded = torch.cat(list(streamed.decode_bands(latents)), dim=-2)

    assert relative_error(latents, vae.encode(image * 2 - 1).latent_dist.mode() * vae.config.scaling_factor) < 1e-5
    wanted = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0] / 2 + 0.5
    assert relative_error(decoded, wanted) < 1e-5


@torch.inference_mode()
def test_tiles_with_common_statistics_leave_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the statistics are the same, small tiles and large ones give the same picture to round-off."""
    monkeypatch.setattr(streamed_vae, "LEAST_BAND_PX", 32)
    vae = TiledVAE(random_vae(attention=False))
    image = torch.rand(1, 3, 320, 260)
    spool = Spool.of([image], 320, 260)

    whole = StreamedVAE(vae, tile_px=512).encode(image)
    tiled = StreamedVAE(vae, tile_px=64).encode(spool)
    bands = list(StreamedVAE(vae, tile_px=64).decode_bands(whole))

    assert relative_error(tiled, whole) < 1e-3
    assert len(bands) > 4
    wanted = torch.cat(list(StreamedVAE(vae, tile_px=512).decode_bands(whole)), dim=-2)
    assert relative_error(torch.cat(bands, dim=-2), wanted) < 1e-5


@torch.inference_mode()
def test_sampled_statistics_are_close_to_the_whole_pictures(
    pocket: WeightStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a photograph, statistics of a sample of a third move the round trip by less than a level of 255."""
    vae = TiledVAE(AutoencoderKL.from_pretrained(pocket.folder("vae"), local_files_only=True).eval().float())
    with Image.open(PHOTOS / "clinic.png") as photograph:
        image = to_tensor(photograph.convert("RGB").crop((100, 100, 612, 612)))
    monkeypatch.setattr(streamed_vae, "SAMPLE_PX", 104)

    streamed = StreamedVAE(vae)
    sampled = torch.cat(list(streamed.decode_bands(streamed.encode(image))), dim=-2)

    exact = vae.decode(vae.encode(image))
    assert float((sampled - exact).abs().mean()) < 1 / 255
    assert np.abs((sampled - exact).mean(dim=(-2, -1)).numpy()).max() < 1 / 255

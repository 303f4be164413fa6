"""The Flux family against diffusers' own pipeline, schedule and arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetImg2ImgPipeline,
    FluxControlNetModel,
    FluxTransformer2DModel,
)
from diffusers.pipelines.flux.pipeline_flux_controlnet_image_to_image import calculate_shift
from PIL import Image
from torch import Tensor

from pipelines.delivery import to_tensor
from pipelines.flux import Conditioning, FlowSampler, Flux, Text, flow_sigmas, shift_for, token_offsets
from pipelines.multidiffusion import tiled_denoise
from pipelines.tiling import Tile, fit_grid
from weights.flux_tokens import pack, position_ids, unpack
from weights.store import WeightStore

PROMPT = "photograph, grey, textured, high quality, sharp"
NEGATIVE = "blurry, low quality, grainy"
DEV_SCHEDULE = {"use_dynamic_shifting": True, "shift": 3.0}


class FixedSigmas(FlowMatchEulerDiscreteScheduler):
    """Stock Euler that answers every call for timesteps with the same noise levels, unshifted."""

    fixed: list[float]

    def set_timesteps(  # type: ignore[override]
        self, num_inference_steps: int | None = None, device: Any = None, sigmas: Any = None, mu: Any = None
    ) -> None:
        self.sigmas = torch.tensor(self.fixed)
        self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps
        self.num_inference_steps = len(self.timesteps)
        self._step_index = self._begin_index = None


@pytest.fixture(scope="module")
def family(pocket: WeightStore) -> Flux:
    return Flux.load(
        pocket.folder("flux"),
        pocket.folder("controlnet-upscaler-flux"),
        device=torch.device("cpu"),
        dtype=torch.float32,
        max_text_tokens=48,
    )


@pytest.fixture(scope="module")
def vae(pocket: WeightStore) -> AutoencoderKL:
    """The pocket VAE with a shift of zero written out, which diffusers' Flux pipelines insist on."""
    vae = AutoencoderKL.from_pretrained(pocket.folder("vae"), torch_dtype=torch.float32, local_files_only=True)
    vae.register_to_config(shift_factor=0.0)
    return vae.eval()


@pytest.fixture
def mean_posterior(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stock pipelines sample the VAE's posterior; here they take its mean."""
    monkeypatch.setattr(
        "diffusers.models.autoencoders.vae.DiagonalGaussianDistribution.sample", lambda self, generator=None: self.mean
    )
    yield


def distilled(family: Flux) -> Flux:
    """A family of random networks that take guidance as an input, with the texts of `family`."""
    torch.manual_seed(4)
    shape = {
        "in_channels": 64,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 64,
        "axes_dims_rope": (4, 6, 6),
        "guidance_embeds": True,
    }
    controlnet = FluxControlNetModel(**(shape | {"num_layers": 1, "num_single_layers": 0}))
    for layer in (controlnet.controlnet_x_embedder, *controlnet.controlnet_blocks):
        torch.nn.init.normal_(layer.weight, std=0.1)
    return Flux(
        FluxTransformer2DModel(**shape),
        controlnet,
        family.text_encoder,
        family.text_encoder_2,
        family.tokenizer,
        family.tokenizer_2,
        family.scheduler_config,
        max_text_tokens=48,
    )


def encoded(vae: AutoencoderKL, image: Image.Image) -> Tensor:
    """The scaled mean of the posterior."""
    latents: Tensor = vae.encode(to_tensor(image) * 2 - 1).latent_dist.mean * vae.config.scaling_factor
    return latents


def denoise(family: Flux, sample: Tensor, sigmas: list[float], conditioning: Conditioning, **tiles: Any) -> Tensor:
    grid = fit_grid(*sample.shape[-2:], **({"max_tile": 512, "overlap": 8} | tiles))
    return tiled_denoise(family, sample, FlowSampler(sigmas), conditioning, grid=grid, tile_batch=4, seed=1)


def stock_pipeline(family: Flux, vae: AutoencoderKL, sigmas: list[float]) -> FluxControlNetImg2ImgPipeline:
    """diffusers' ControlNet img2img pipeline over the same networks."""
    scheduler = FixedSigmas.from_config(family.scheduler_config)
    scheduler.fixed = sigmas
    pipeline = FluxControlNetImg2ImgPipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=family.text_encoder,
        tokenizer=family.tokenizer,
        text_encoder_2=family.text_encoder_2,
        tokenizer_2=family.tokenizer_2,
        transformer=family.transformer,
        controlnet=family.controlnet,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.usefixtures("mean_posterior")
@pytest.mark.parametrize("kind", ["pocket", "distilled"])
@torch.inference_mode()
def test_one_tile_gives_the_stock_pipeline(
    family: Flux, vae: AutoencoderKL, photo_crop: Image.Image, kind: str
) -> None:
    """Same sigmas, start latents and noise: latents within 1e-4 and pixels within 1/255 of diffusers' pipeline."""
    model = family if kind == "pocket" else distilled(family)
    start = encoded(vae, photo_crop)
    sigmas = flow_sigmas(0.5, 6, 0.6)
    sample = FlowSampler(sigmas).start(start, torch.randn(start.shape))

    conditioning = Conditioning(
        texts=(model.encode(PROMPT),), guidance_scale=2.5, control=start, controlnet_conditioning_scale=0.7
    )
    ours = denoise(model, sample, sigmas, conditioning)

    arguments = {
        "prompt": PROMPT,
        "image": photo_crop,
        "control_image": photo_crop,
        "width": photo_crop.width,
        "height": photo_crop.height,
        "strength": 1.0,
        "num_inference_steps": len(sigmas) - 1,
        "guidance_scale": 2.5,
        "controlnet_conditioning_scale": 0.7,
        "max_sequence_length": 48,
        "latents": pack(sample),
    }
    stock = stock_pipeline(model, vae, sigmas)
    latents = unpack(stock(**arguments, output_type="latent").images, *start.shape[-2:])
    pixels = stock(**arguments, output_type="pt").images
    decoded = (vae.decode(ours / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    assert (ours - latents).abs().max() < 1e-4
    assert (decoded - pixels).abs().max() < 1 / 255


@torch.inference_mode()
def test_sampled_posterior_is_the_stock_pipelines_deviation(
    family: Flux, vae: AutoencoderKL, photo_crop: Image.Image
) -> None:
    """diffusers draws start and control from the posterior, so its result moves with the generator; ours does not."""
    sigmas = flow_sigmas(0.1, 4, 0.6)
    stock = stock_pipeline(family, vae, sigmas)

    def latents(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return stock._encode_vae_image(to_tensor(photo_crop) * 2 - 1, generator)

    assert (latents(1) - latents(2)).abs().max() > 0
    assert torch.equal(encoded(vae, photo_crop), encoded(vae, photo_crop))
    assert (latents(1) - encoded(vae, photo_crop)).abs().mean() < 0.1


@torch.inference_mode()
def test_strength_zero_is_the_stock_pipelines_deviation(
    family: Flux, vae: AutoencoderKL, photo_crop: Image.Image
) -> None:
    """diffusers fails at strength 0; here it is a schedule without steps, so the picture stays what it is."""
    stock = stock_pipeline(family, vae, flow_sigmas(0.5, 4, 0.6))

    with pytest.raises((RuntimeError, ValueError, IndexError)):
        stock(PROMPT, image=photo_crop, control_image=photo_crop, strength=0.0, num_inference_steps=4)
    assert flow_sigmas(0.0, 20, 0.6) == []


@pytest.mark.parametrize(
    ("creativity", "small", "large"),
    [
        (0.1, 0.173, 0.260),
        (0.2, 0.319, 0.441),
        (0.3, 0.446, 0.575),
        (0.35, 0.503, 0.630),
        (0.5, 0.652, 0.760),
        (0.8, 0.882, 0.927),
    ],
)
def test_start_level_follows_creativity_and_tile(creativity: float, small: float, large: float) -> None:
    """The levels published for FLUX.1 on tiles of 512 and 1024 px; a larger tile starts no higher than that."""
    assert flow_sigmas(creativity, 20, shift_for(32**2, DEV_SCHEDULE))[0] == pytest.approx(small, abs=6e-4)
    assert flow_sigmas(creativity, 20, shift_for(64**2, DEV_SCHEDULE))[0] == pytest.approx(large, abs=6e-4)
    assert shift_for(128**2, DEV_SCHEDULE) == shift_for(64**2, DEV_SCHEDULE) == pytest.approx(1.15)


def test_shift_is_the_stock_one() -> None:
    """Below the largest training picture the shift is diffusers'; fixed shifts are taken as they are."""
    assert [shift_for(tokens, DEV_SCHEDULE) for tokens in (256, 1024, 4096)] == pytest.approx(
        [calculate_shift(tokens) for tokens in (256, 1024, 4096)]
    )
    assert shift_for(1024, {"shift": 1.0}) == 0.0


@pytest.mark.parametrize("strength", [0.05, 0.3, 1.0])
def test_schedule_runs_every_step(strength: float) -> None:
    """As many steps as asked for at any strength, strictly down to zero."""
    sigmas = flow_sigmas(strength, 20, 1.15)

    assert len(sigmas) == 21 and sigmas[-1] == 0
    assert all(later < earlier for earlier, later in zip(sigmas, sigmas[1:], strict=False))
    assert sigmas[0] <= 1 and (strength < 1 or sigmas[0] == pytest.approx(1))


def test_sampler_steps_as_the_stock_scheduler() -> None:
    """Noising and every Euler step equal FlowMatchEulerDiscreteScheduler's."""
    sigmas = flow_sigmas(0.6, 5, 0.8)
    stock = FixedSigmas()
    stock.fixed = sigmas
    stock.set_timesteps()
    latents, noise = torch.randn(2, 1, 16, 8, 8)
    sampler = FlowSampler(sigmas)

    ours = sampler.start(latents, noise)
    theirs = stock.scale_noise(latents, stock.timesteps[:1], noise)
    assert torch.allclose(ours, theirs, atol=1e-6)
    for step, timestep in enumerate(stock.timesteps):
        velocity = torch.randn_like(ours)
        ours = sampler.advance(step, velocity, ours)
        theirs = stock.step(velocity, timestep, theirs).prev_sample
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_packing_is_the_stock_one() -> None:
    """Tokens and their positions equal those of diffusers' pipelines, and unpacking undoes it."""
    latents = torch.randn(2, 16, 6, 10)

    assert torch.equal(pack(latents), FluxControlNetImg2ImgPipeline._pack_latents(latents, 2, 16, 6, 10))
    assert torch.equal(unpack(pack(latents), 6, 10), latents)
    stock = FluxControlNetImg2ImgPipeline._prepare_latent_image_ids(2, 3, 5, "cpu", torch.float32)
    assert torch.equal(position_ids(6, 10), stock)


@torch.inference_mode()
def test_a_tile_is_seen_alone(family: Flux) -> None:
    """A tile is predicted as if it were the whole picture: positions and the ControlNet's input are its own."""
    latents, control = torch.randn(2, 1, 16, 48, 48)
    text = family.encode(PROMPT)
    place = Tile(8, 16, 32, 40)
    tile, part = (whole[..., 8:32, 16:40] for whole in (latents, control))

    inside = family.predict(tile, [place], 0.4, Conditioning(texts=(text,), control=control))
    alone = family.predict(tile, [Tile(0, 0, 24, 24)], 0.4, Conditioning(texts=(text,), control=part))

    assert torch.equal(inside, alone)


@torch.inference_mode()
def test_tiles_of_a_batch_do_not_see_each_other(family: Flux) -> None:
    """Predictions are the same one by one, also with true guidance and with a text for each tile."""
    tiles = fit_grid(24, 40, max_tile=24, overlap=8).tiles()
    control = torch.randn(1, 16, 24, 40)
    conditioning = Conditioning(
        texts=(family.encode(PROMPT), family.encode("red, dark, smooth")),
        regions=tuple(tiles),
        negative=family.encode(NEGATIVE),
        guidance_scale=3.0,
        control=control,
    )
    latents = torch.randn(len(tiles), 16, tiles[0].bottom - tiles[0].top, tiles[0].right - tiles[0].left)

    together = family.predict(latents, tiles, 0.3, conditioning)
    singly = [family.predict(latents[i : i + 1], tiles[i : i + 1], 0.3, conditioning) for i in range(len(tiles))]

    assert torch.allclose(together, torch.cat(singly), atol=2e-5)


def test_moved_tiles_keep_the_nearest_text() -> None:
    """Tiles move from step to step; their text is that of the region they are nearest to."""
    texts = tuple(
        Text(prompt_embeds=torch.full((1, 1, 1), i), pooled_prompt_embeds=torch.zeros(1, 1)) for i in (1.0, 2.0)
    )
    conditioning = Conditioning(texts=texts, regions=(Tile(0, 0, 8, 8), Tile(0, 8, 8, 16)))

    chosen = conditioning.texts_for([Tile(0, 7, 8, 15), Tile(0, 3, 8, 11), Tile(0, 0, 8, 8)])

    assert chosen.prompt_embeds.flatten().tolist() == [2.0, 1.0, 1.0]


@torch.inference_mode()
def test_control_rests_where_it_should(family: Flux, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below `control_until` the ControlNet is not called at all."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the ControlNet was called")

    monkeypatch.setattr(family.controlnet, "forward", refuse)
    conditioning = Conditioning(texts=(family.encode(PROMPT),), control=torch.zeros(1, 16, 8, 8), control_until=0.2)

    family.predict(torch.zeros(1, 16, 8, 8), [Tile(0, 0, 8, 8)], 0.19, conditioning)
    with pytest.raises(AssertionError):
        family.predict(torch.zeros(1, 16, 8, 8), [Tile(0, 0, 8, 8)], 0.2, conditioning)


@torch.inference_mode()
def test_guidance_is_embedded_or_true(family: Flux) -> None:
    """A distilled model reads guidance as an input; another runs a second pass, and none at guidance 1."""
    latents, place = torch.randn(1, 16, 8, 8), [Tile(0, 0, 8, 8)]
    text, negative = family.encode(PROMPT), family.encode(NEGATIVE)

    for model in (family, distilled(family)):
        answers = [
            model.predict(
                latents,
                place,
                0.4,
                Conditioning(
                    texts=(text,),
                    negative=None if model.embeds_guidance or guidance == 1 else negative,
                    guidance_scale=guidance,
                ),
            )
            for guidance in (1.0, 4.0)
        ]
        assert (answers[0] - answers[1]).abs().max() > 1e-3
    plain = family.predict(latents, place, 0.4, Conditioning(texts=(text,)))
    against = family.predict(latents, place, 0.4, Conditioning(texts=(negative,)))
    guided = family.predict(latents, place, 0.4, Conditioning(texts=(text,), negative=negative, guidance_scale=3.0))
    assert torch.allclose(guided, against + 3 * (plain - against), atol=1e-4)


def test_token_grid_takes_all_its_positions() -> None:
    """Any four steps see the grid at its four positions once each, odd ones included; the seed decides the order."""
    offsets = token_offsets(10, 5)

    for first in range(7):
        assert sorted(offsets[first : first + 4]) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert offsets == token_offsets(10, 5)
    assert len({tuple(token_offsets(4, seed)) for seed in range(20)}) > 4


def mesh(image: Tensor, period: int) -> Tensor:
    """What of luma (H, W) repeats every `period` px in both directions and not every half of it: (period, period).

    Half the period is that of a latent; what the VAE's decoder prints is not the transformer's.
    """
    height, width = (side // period * period for side in image.shape)
    cells = image[:height, :width].reshape(height // period, period, width // period, period)
    folded = cells.mean(dim=(0, 2))
    half = period // 2
    return folded - folded.reshape(2, half, 2, half).mean(dim=(0, 2)).repeat(2, 2)


@torch.inference_mode()
def mesh_energy(family: Flux, vae: AutoencoderKL, *, moving: bool, num_seeds: int = 4) -> float:
    """Energy, in (1/255)^2, at the period of a token of a flat dark picture redrawn at half creativity."""
    start = encoded(vae, Image.new("RGB", (128, 128), (24, 22, 28)))
    sigmas = flow_sigmas(0.5, 12, family.shift(24**2))
    text = family.encode("flat, black, dark, smooth, high quality")
    offsets = dict(zip(sigmas, token_offsets(12, 1), strict=False)) if moving else {}
    printed = torch.zeros(8, 8)
    for seed in range(num_seeds):
        noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed))
        conditioning = Conditioning(texts=(text,), control=start, offsets=offsets)
        final = denoise(family, FlowSampler(sigmas).start(start, noise), sigmas, conditioning)
        pixels = vae.decode(final / vae.config.scaling_factor).sample[0].mean(dim=0) * 127.5
        printed += mesh(pixels[16:-16, 16:-16], 8) / num_seeds  # what a picture's edges do is no mesh
    return float(printed.square().mean())


def test_moving_the_token_grid_takes_a_mesh_away(
    family: Flux, vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a flat dark picture the energy at a token's period halves; of a network that prints its tokens, to a fifth."""
    still, moving = (mesh_energy(family, vae, moving=moving) for moving in (False, True))
    assert moving < 0.5 * still, (moving, still)

    pattern = 0.3 * torch.randn(64, generator=torch.Generator().manual_seed(3))
    layer = family.transformer.proj_out
    monkeypatch.setitem(layer._parameters, "bias", torch.nn.Parameter(layer.bias + pattern))

    still, moving = (mesh_energy(family, vae, moving=moving) for moving in (False, True))

    assert moving < 0.2 * still, (moving, still)

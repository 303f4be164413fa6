"""FLUX.2 [klein] against diffusers' own pipeline, on tiny random networks of the published classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from PIL import Image
from torch import Tensor
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

from pipelines.delivery import to_tensor
from pipelines.flux import Conditioning, FlowSampler, flow_sigmas
from pipelines.flux2 import Flux2, plain_vae, token_statistics
from pipelines.multidiffusion import tiled_denoise
from pipelines.tiling import Tile, fit_grid
from pipelines.vae import TiledVAE
from tests.pipelines.test_caption_vlm import byte_vocabulary
from tests.pipelines.test_flux import FixedSigmas
from weights.flux_tokens import pack

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
LAYERS = (1, 2, 3)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLFlux2:
    """With statistics that are not those of a new network."""
    torch.manual_seed(1)
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return vae.eval()


@pytest.fixture(scope="module")
def family(vae: AutoencoderKLFlux2) -> Flux2:
    torch.manual_seed(2)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vocabulary = byte_vocabulary(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer = Qwen2TokenizerFast(vocab=vocabulary, merges=[], chat_template=CHAT)
    encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(vocabulary),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
        )
    )
    mean, deviation = token_statistics(vae)
    return Flux2(
        transformer,
        encoder,
        tokenizer,
        json.loads(json.dumps(dict(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).config))),
        mean=mean,
        deviation=deviation,
        max_text_tokens=32,
        text_layers=LAYERS,
        is_distilled=False,
    )


@pytest.fixture(scope="module")
def stock(family: Flux2, vae: AutoencoderKLFlux2) -> Flux2KleinPipeline:
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=family.text_encoder,
        tokenizer=family.tokenizer,
        transformer=family.transformer,
        is_distilled=False,
    )


@torch.inference_mode()
def test_latents_are_the_stock_ones(
    family: Flux2, vae: AutoencoderKLFlux2, stock: Flux2KleinPipeline, photo_crop: Image.Image
) -> None:
    """Our tiled VAE and `enter` make the normalised tokens that diffusers' pipeline makes, and `leave` undoes it."""
    image = to_tensor(photo_crop)

    latents = TiledVAE(plain_vae(vae)).encode(image)
    ours = family.enter(latents)

    theirs = stock._pack_latents(stock._encode_vae_image(image * 2 - 1, None))
    assert ours.shape == latents.shape and torch.allclose(pack(ours), theirs, atol=1e-4)
    assert torch.allclose(family.leave(ours), latents, atol=1e-4)
    assert torch.allclose(TiledVAE(plain_vae(vae)).decode(latents), vae.decode(latents).sample / 2 + 0.5, atol=1e-4)


@torch.inference_mode()
def test_text_is_the_stock_one(family: Flux2, stock: Flux2KleinPipeline) -> None:
    """Chat template, padding and the chosen layers are diffusers'."""
    theirs = stock._get_qwen3_prompt_embeds(
        family.text_encoder, family.tokenizer, "a wall", max_sequence_length=32, hidden_states_layers=list(LAYERS)
    )

    assert torch.allclose(family.encode("a wall").prompt_embeds, theirs, atol=1e-6)


@torch.inference_mode()
def test_a_prediction_with_reference_is_the_stock_one(family: Flux2, stock: Flux2KleinPipeline) -> None:
    """Tokens, positions and the reference behind them are put together as in diffusers' loop."""
    tile, control = torch.randn(2, 1, 4, 8, 12)
    text = family.encode("a wall")

    ours = family.predict(tile, [Tile(0, 0, 8, 12)], 0.4, Conditioning(texts=(text,), control=control))

    fields = [stock._patchify_latents(latents) for latents in (tile, control)]
    ids = [stock._prepare_latent_ids(fields[0]), stock._prepare_image_ids([fields[1]])]
    theirs = family.transformer(
        hidden_states=torch.cat([stock._pack_latents(field) for field in fields], dim=1),
        timestep=torch.tensor([0.4]),
        guidance=None,
        encoder_hidden_states=text.prompt_embeds,
        txt_ids=stock._prepare_text_ids(text.prompt_embeds),
        img_ids=torch.cat(ids, dim=1),
        return_dict=False,
    )[0][:, :24]
    assert torch.allclose(pack(ours), theirs, atol=1e-5)


@torch.inference_mode()
def test_one_tile_from_noise_gives_the_stock_pipeline(
    family: Flux2, vae: AutoencoderKLFlux2, stock: Flux2KleinPipeline, photo_crop: Image.Image
) -> None:
    """With the picture as reference, the same noise and noise levels: pixels within 1/255 of diffusers' pipeline."""
    sigmas = flow_sigmas(1.0, 4, 0.6)
    tiled_vae = TiledVAE(plain_vae(vae))
    control = family.enter(tiled_vae.encode(to_tensor(photo_crop)))
    noise = torch.randn(control.shape)
    conditioning = Conditioning(
        texts=(family.encode("a wall"),), negative=family.encode(""), guidance_scale=3.0, control=control
    )
    grid = fit_grid(*control.shape[-2:], max_tile=256, overlap=8, multiple=2)
    final = tiled_denoise(family, noise, FlowSampler(sigmas), conditioning, grid=grid, tile_batch=1, seed=1)

    stock.scheduler = FixedSigmas()
    stock.scheduler.fixed = sigmas
    stock.set_progress_bar_config(disable=True)
    theirs = stock(
        image=photo_crop,
        prompt="a wall",
        num_inference_steps=4,
        guidance_scale=3.0,
        latents=stock._patchify_latents(noise),
        max_sequence_length=32,
        text_encoder_out_layers=LAYERS,
        output_type="pt",
    ).images
    ours = tiled_vae.decode(family.leave(final)).clamp(0, 1)
    assert (ours - theirs).abs().max() < 1 / 255


@torch.inference_mode()
def test_the_token_grid_moves_with_its_reference(family: Flux2) -> None:
    """Under a moved grid a tile is predicted as its continuation by one latent all around is under an unmoved one."""
    tile, control = torch.randn(2, 1, 4, 8, 12)
    around = (1, 1, 0, 0)
    mirrored, mirrored_control = (
        torch.nn.functional.pad(latents, around, mode="reflect") for latents in (tile, control)
    )
    text, place = family.encode("a wall"), [Tile(0, 0, 8, 12)]
    moved = Conditioning(texts=(text,), control=control, offsets={0.4: (0, 1)})
    still = Conditioning(texts=(text,), control=mirrored_control)

    ours = family.predict(tile, place, 0.4, moved)

    assert torch.equal(ours, family.predict(mirrored, [Tile(0, 0, 8, 14)], 0.4, still)[..., 1:-1])
    assert not torch.equal(ours, family.predict(tile, place, 0.3, moved))


@torch.inference_mode()
def test_tiles_of_a_batch_do_not_see_each_other(family: Flux2) -> None:
    """Each tile has its own part of the reference, and true guidance its own half of the batch."""
    control = torch.randn(1, 4, 8, 20)
    places = [Tile(0, 0, 8, 12), Tile(0, 8, 8, 20)]
    tiles = torch.randn(2, 4, 8, 12)
    conditioning = Conditioning(
        texts=(family.encode("a wall"),), negative=family.encode(""), guidance_scale=3.0, control=control
    )

    together = family.predict(tiles, places, 0.5, conditioning)

    singly: list[Tensor] = [family.predict(tiles[i : i + 1], places[i : i + 1], 0.5, conditioning) for i in range(2)]
    assert torch.allclose(together, torch.cat(singly), atol=1e-5)
    alone = family.predict(tiles[1:], [Tile(0, 0, 8, 12)], 0.5, _with_control(conditioning, control[..., 8:]))
    assert torch.allclose(alone, singly[1], atol=1e-5)


def _with_control(conditioning: Conditioning, control: Tensor) -> Conditioning:
    return Conditioning(texts=conditioning.texts, negative=conditioning.negative, guidance_scale=3.0, control=control)


def test_published_layout_loads(family: Flux2, vae: AutoencoderKLFlux2, tmp_path: Path) -> None:
    """A folder as diffusers saves it; distilled models take no negative text, those that say they are not do."""
    family.transformer.save_pretrained(tmp_path / "transformer")
    family.text_encoder.save_pretrained(tmp_path / "text_encoder")
    family.tokenizer.save_pretrained(tmp_path / "tokenizer")
    vae.save_pretrained(tmp_path / "vae")
    FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "scheduler")

    loaded = Flux2.load(tmp_path, device=torch.device("cpu"), dtype=torch.float32, max_text_tokens=32)

    assert not loaded.takes_negative and torch.equal(loaded.mean, family.mean)
    (tmp_path / "model_index.json").write_text('{"is_distilled": false}')
    assert Flux2.load(tmp_path, device=torch.device("cpu"), dtype=torch.float32, max_text_tokens=32).takes_negative

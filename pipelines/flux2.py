"""FLUX.2 [klein] with the picture as a reference, behind the `Denoiser` interface; flow matching.

`black-forest-labs/FLUX.2-klein-4B` (Apache-2.0, 3.9 B, with Qwen3-4B about 16 GB in bfloat16). There is no ControlNet
for it and none is needed: the model edits a picture that it is given as further tokens, here the same part of the
pre-stage picture for every tile. The networks are diffusers' and transformers' own classes.

The VAE's 32 channels are seen on tokens of 2 x 2 positions, 128 numbers, each normalised with statistics of its own:
a picture is denoised normalised (`enter`, `leave`). The four statistics of a channel differ by chance alone, since a
convolution does not know odd from even, so the grid of tokens may move over the latent as it does for FLUX.1.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2TokenizerFast, Qwen3ForCausalLM

from pipelines.flux import MAX_SHIFT, Conditioning, Text, joined, moved, repeated, shift_for, stayed
from pipelines.tiling import Tile, gather
from weights.flux_tokens import TOKEN_LATENTS, pack, unpack

REFERENCE_TIME = 10
"""Position of the first reference along the axis that keeps pictures apart; the result is at 0."""
TEXT_LAYERS = (9, 18, 27)
"""Hidden states of Qwen3-4B that the published models were trained on."""


class Flux2:
    """Text encoder and transformer of FLUX.2 [klein], and the statistics of its VAE.

    Args:
        transformer: On its device.
        text_encoder: Qwen3; the states of three of its layers are the text.
        tokenizer: With a chat template.
        scheduler_config: Of a `FlowMatchEulerDiscreteScheduler`.
        mean: (4 C,) of the VAE's tokens.
        deviation: Likewise.
        max_text_tokens: Tokens of a text.
        text_layers: Which hidden states are taken.
        is_distilled: Whether the model has guidance built in, so that there is nothing to guide.
    """

    size_multiple = TOKEN_LATENTS
    embeds_guidance = False

    def __init__(
        self,
        transformer: Flux2Transformer2DModel,
        text_encoder: Qwen3ForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        scheduler_config: dict[str, Any],
        *,
        mean: Tensor,
        deviation: Tensor,
        max_text_tokens: int,
        text_layers: tuple[int, ...] = TEXT_LAYERS,
        is_distilled: bool = True,
    ) -> None:
        self.transformer, self.text_encoder = transformer.eval(), text_encoder.eval()
        self.tokenizer = tokenizer
        self.scheduler_config = scheduler_config
        self.mean, self.deviation = (values.float().cpu() for values in (mean, deviation))
        self.max_text_tokens, self.text_layers = max_text_tokens, text_layers
        self.takes_negative = not is_distilled

    @classmethod
    def load(cls, folder: Path, *, device: torch.device, dtype: torch.dtype, max_text_tokens: int) -> Flux2:
        """Load from a folder in diffusers' layout; nothing is downloaded. The VAE is read for its statistics."""
        options: dict[str, Any] = {"torch_dtype": dtype, "local_files_only": True}
        vae = AutoencoderKLFlux2.from_pretrained(folder / "vae", local_files_only=True)
        mean, deviation = token_statistics(vae)
        return cls(
            Flux2Transformer2DModel.from_pretrained(folder / "transformer", **options).to(device),
            Qwen3ForCausalLM.from_pretrained(folder / "text_encoder", dtype=dtype, local_files_only=True).to(device),
            Qwen2TokenizerFast.from_pretrained(folder / "tokenizer", local_files_only=True),
            FlowMatchEulerDiscreteScheduler.load_config(folder / "scheduler", local_files_only=True),
            mean=mean,
            deviation=deviation,
            max_text_tokens=max_text_tokens,
            is_distilled=says_distilled(folder),
        )

    def shift(self, num_tokens: int) -> float:
        """The shift mu of the schedule for a tile of so many tokens."""
        return min(shift_for(num_tokens, self.scheduler_config), MAX_SHIFT)

    def enter(self, latents: Tensor) -> Tensor:
        """Normalised latents of the same shape, (1, C, h, w) with even sides."""
        tokens = (pack(latents) - self.mean.to(latents)) / self.deviation.to(latents)
        return unpack(tokens, *latents.shape[-2:])

    def leave(self, field: Tensor) -> Tensor:
        """The inverse of `enter`."""
        return unpack(pack(field) * self.deviation.to(field) + self.mean.to(field), *field.shape[-2:])

    def encode(self, text: str) -> Text:
        """Encode one text; what exceeds the length is left out."""
        chat = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        inputs = self.tokenizer(
            chat, padding="max_length", truncation=True, max_length=self.max_text_tokens, return_tensors="pt"
        )
        device = self.text_encoder.device
        states = self.text_encoder(
            input_ids=inputs.input_ids.to(device),
            attention_mask=inputs.attention_mask.to(device),
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
        embeds = torch.cat([states[layer] for layer in self.text_layers], dim=-1).to(self.transformer.dtype)
        return Text(prompt_embeds=embeds, pooled_prompt_embeds=embeds.new_zeros(1, 0))

    def predict(self, tiles: Tensor, places: Sequence[Tile], timestep: float, conditioning: Conditioning) -> Tensor:
        """See `Denoiser.predict`: the velocity; the control is the reference."""
        offset = conditioning.offsets.get(timestep, (0, 0))
        device, dtype = self.transformer.device, self.transformer.dtype
        shown = moved(tiles, offset)
        height, width = shown.shape[-2:]
        sample = pack(shown).to(device, dtype)
        num_tokens = sample.shape[1]
        ids = field_ids(height, width, time=0)
        if conditioning.control is not None:
            reference = pack(moved(gather(conditioning.control, places), offset)).to(sample)
            sample = torch.cat([sample, reference], dim=1)
            ids = torch.cat([ids, field_ids(height, width, time=REFERENCE_TIME)])
        text = conditioning.texts_for(places)
        guided = conditioning.negative is not None
        if conditioning.negative is not None:
            text = joined(repeated(conditioning.negative, len(places)), text)
            sample = sample.repeat(2, 1, 1)
        num_words = text.prompt_embeds.shape[1]
        words = torch.cat([torch.zeros(num_words, 3), torch.arange(num_words)[:, None].float()], dim=1)
        tokens = self.transformer(
            sample,
            encoder_hidden_states=text.prompt_embeds,
            timestep=torch.full((sample.shape[0],), timestep, device=device),
            img_ids=ids.to(device),
            txt_ids=words.to(device),
            guidance=None,
            return_dict=False,
        )[0][:, :num_tokens]
        velocity = stayed(unpack(tokens.to(tiles.device, torch.float32), height, width), offset)
        if not guided:
            return velocity
        negative, positive = velocity.chunk(2)
        return negative + conditioning.guidance_scale * (positive - negative)


def says_distilled(folder: Path) -> bool:
    """What a folder says of its model; those that say nothing are the distilled ones."""
    index = folder / "model_index.json"
    return bool(json.loads(index.read_text(encoding="utf-8")).get("is_distilled", True)) if index.is_file() else True


def field_ids(height: int, width: int, *, time: int) -> Tensor:
    """(h * w / 4, 4) float32: the picture's number, row, column and zero of every token of latents (height, width)."""
    rows, columns = torch.arange(height // TOKEN_LATENTS), torch.arange(width // TOKEN_LATENTS)
    return torch.cartesian_prod(torch.tensor([time]), rows, columns, torch.tensor([0])).float()


def token_statistics(vae: AutoencoderKLFlux2) -> tuple[Tensor, Tensor]:
    """Mean and deviation (4 C,) of the tokens that a VAE makes."""
    return vae.bn.running_mean, (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()


def plain_vae(vae: AutoencoderKLFlux2) -> AutoencoderKL:
    """The same VAE without its normalisation, as the class that tiles can be made of; it shares the weights."""
    names = (
        *("in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels", "act_fn"),
        *("layers_per_block", "latent_channels", "norm_num_groups", "sample_size", "use_quant_conv"),
        *("use_post_quant_conv", "mid_block_add_attention"),
    )
    with torch.device("meta"):
        plain = AutoencoderKL(**{name: vae.config[name] for name in names}, scaling_factor=1.0, shift_factor=0.0)
    weights = {name: value for name, value in vae.state_dict().items() if not name.startswith("bn.")}
    plain.load_state_dict(weights, assign=True)
    return plain.eval()

"""A Stable Diffusion XL set with random weights, small enough for a test, in diffusers' folder layout."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

LETTERS = string.ascii_lowercase + string.digits + ",.:;!?()[]<>-_'"

UNET: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 16,
    "out_channels": 16,
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (2, 4, 4),
    "norm_num_groups": 4,
    "cross_attention_dim": 40,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
}


def small_tokenizer(**options: Any) -> CLIPTokenizer:
    """A CLIP tokenizer in which every letter is a token."""
    symbols = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77, **options)


def small_text_config(tokenizer: CLIPTokenizer, *, hidden_size: int, projection_dim: int) -> CLIPTextConfig:
    """Two layers of two heads."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=projection_dim,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def write_small_sdxl(folder: Path, controlnet_folder: Path) -> None:
    """Write every part; all text and time inputs, and the ControlNet, have an effect."""
    torch.manual_seed(3)
    tokenizer, tokenizer_2 = small_tokenizer(), small_tokenizer(pad_token="!")
    first = CLIPTextModel(small_text_config(tokenizer, hidden_size=16, projection_dim=16))
    second = CLIPTextModelWithProjection(small_text_config(tokenizer_2, hidden_size=24, projection_dim=24))
    unet = UNet2DConditionModel(**UNET)
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4, 8))
    for name, parameter in controlnet.named_parameters():
        if name.startswith(("controlnet_down_blocks", "controlnet_mid_block", "controlnet_cond_embedding.conv_out")):
            torch.nn.init.normal_(parameter, std=0.1)
    unet.save_pretrained(folder / "unet")
    controlnet.save_pretrained(controlnet_folder)
    first.save_pretrained(folder / "text_encoder")
    second.save_pretrained(folder / "text_encoder_2")
    tokenizer.save_pretrained(folder / "tokenizer")
    tokenizer_2.save_pretrained(folder / "tokenizer_2")
    EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(
        folder / "scheduler"
    )

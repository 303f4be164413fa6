"""Vision-language captioners of the published classes, with tiny random weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import (
    GPT2Tokenizer,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from pipelines.caption_vlm import QwenCaptioner, SmolCaptioner, load_vision_captioner
from pipelines.errors import CaptionFailed

QWEN_WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
SMOL_WORDS = ["<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>"]


def byte_vocabulary(words: list[str]) -> dict[str, int]:
    """The symbols of all bytes, then the special words."""
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *words]
    return {symbol: index for index, symbol in enumerate(symbols)}


def save_qwen(folder: Path) -> None:
    """A Qwen3-VL of two layers."""
    vocabulary = byte_vocabulary(QWEN_WORDS)
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], extra_special_tokens=QWEN_WORDS[1:])
    text = {
        "vocab_size": len(vocabulary),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        "bos_token_id": None,
        "eos_token_id": vocabulary["<|im_end|>"],
        "pad_token_id": vocabulary["<|endoftext|>"],
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 4,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=vocabulary["<|image_pad|>"],
        video_token_id=vocabulary["<|vision_end|>"],
        vision_start_token_id=vocabulary["<|vision_start|>"],
        vision_end_token_id=vocabulary["<|vision_end|>"],
    )
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(patch_size=16, merge_size=2, temporal_patch_size=2).save_pretrained(folder)


def save_smol(folder: Path) -> None:
    """An Idefics3 of two layers."""
    vocabulary = byte_vocabulary(SMOL_WORDS)
    tokenizer = GPT2Tokenizer(
        vocab=vocabulary,
        merges=[],
        extra_special_tokens=SMOL_WORDS[1:],
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        unk_token="<|im_start|>",
        pad_token="<end_of_utterance>",
    )
    text = {
        "model_type": "llama",
        "vocab_size": len(vocabulary),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": vocabulary["<|im_start|>"],
        "eos_token_id": vocabulary["<end_of_utterance>"],
        "pad_token_id": vocabulary["<end_of_utterance>"],
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    }
    config = Idefics3Config(
        text_config=text, vision_config=vision, scale_factor=2, image_token_id=vocabulary["<image>"]
    )
    Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    images = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 32})
    Idefics3Processor(images, tokenizer, image_seq_len=4).save_pretrained(folder)


@pytest.fixture(params=[(save_qwen, QwenCaptioner), (save_smol, SmolCaptioner)], ids=["qwen", "smol"])
def captioner(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[QwenCaptioner | SmolCaptioner]:
    save, kind = request.param
    torch.manual_seed(0)
    save(tmp_path)
    loaded = load_vision_captioner(tmp_path, device="cpu")
    assert isinstance(loaded, kind)
    yield loaded


@pytest.mark.parametrize("size", [(40, 30), (3, 200), (300, 300)])
def test_any_picture_gets_one_line(captioner: QwenCaptioner | SmolCaptioner, size: tuple[int, int]) -> None:
    """Without torchvision, of whatever size, the same words every time; the question is not part of the answer."""
    image = Image.effect_noise(size, 80).convert("RGB")

    said = captioner.caption(image, "What is it?", max_tokens=6)

    assert said == captioner.caption(image, "What is it?", max_tokens=6)
    assert "\n" not in said and "What is it" not in said


def test_the_instruction_and_the_picture_are_read(captioner: QwenCaptioner | SmolCaptioner) -> None:
    """Another question or another picture changes what the model is given."""
    seen = []
    forward = captioner.model.generate

    def note(**inputs: torch.Tensor) -> torch.Tensor:
        seen.append((inputs["input_ids"].shape[1], float(inputs["pixel_values"].double().sum())))
        return forward(**inputs)

    captioner.model.generate = note
    dark, bright = Image.new("RGB", (64, 64)), Image.new("RGB", (64, 64), "white")
    for image, question in ((dark, "What is it?"), (dark, "What is it made of?"), (bright, "What is it?")):
        captioner.caption(image, question, max_tokens=2)

    assert seen[0][0] < seen[1][0] and seen[0][1] != seen[2][1]


def test_a_failure_is_of_one_kind(captioner: QwenCaptioner | SmolCaptioner, tmp_path: Path) -> None:
    """Whatever breaks in a model is CaptionFailed, which recipes survive; so is a folder without one."""

    def fail(**_: object) -> None:
        raise RuntimeError("out of memory")

    captioner.model.generate = fail

    with pytest.raises(CaptionFailed, match="RuntimeError"):
        captioner.caption(Image.new("RGB", (8, 8)))
    with pytest.raises(CaptionFailed, match="cannot be read"):
        load_vision_captioner(tmp_path / "nothing", device="cpu")

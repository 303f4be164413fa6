"""Captions by vision-language models that follow an instruction, without torchvision.

========== ===================================================================================================
`qwen3_vl` Qwen3-VL (arXiv 2511.21631). `Qwen/Qwen3-VL-2B-Instruct` (Apache-2.0, 2.1 B, 4.3 GB in 16 bits)
`idefics3` SmolVLM (arXiv 2504.05299). `HuggingFaceTB/SmolVLM-256M-Instruct` (Apache-2.0, 0.5 GB), for small
           machines
========== ===================================================================================================

Qwen3-VL's own processor needs torchvision for its video half. The half for pictures does not: its image processor
gives the pixels and their grid, and the prompt gets one placeholder for each 2 x 2 patches of the grid.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    Qwen2VLImageProcessorPil,
    Qwen3VLForConditionalGeneration,
)

from pipelines.caption import MAX_TOKENS, caption_failed

MAX_PIXELS = 1024 * 1024
"""Area at which a picture is looked at; more says little more and takes quadratically longer."""
MIN_PIXELS = 256 * 256
SMALL_SIDE_PX = 512
"""Longest side for SmolVLM: one view of 64 tokens instead of up to seventeen."""
DEFAULT_INSTRUCTION = "Describe this image in one sentence."


class QwenCaptioner:
    """Qwen3-VL: the picture's patches take the places of tokens of the prompt."""

    def __init__(self, model: Any, image_processor: Any, tokenizer: Any) -> None:
        self.model = model.eval()
        self.image_processor = image_processor
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, folder: Path, *, device: str, dtype: torch.dtype) -> QwenCaptioner:
        """Load the published folder layout."""
        options: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "use_safetensors": True}
        model: Any = Qwen3VLForConditionalGeneration.from_pretrained(folder, **options)
        size = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}  # areas, whatever their names say
        processor = Qwen2VLImageProcessorPil.from_pretrained(folder, size=size, local_files_only=True)
        return cls(model.to(device), processor, AutoTokenizer.from_pretrained(folder, local_files_only=True))

    @torch.inference_mode()
    def caption(self, image: Image.Image, instruction: str | None = None, *, max_tokens: int = MAX_TOKENS) -> str:
        """See `caption.Captioner.caption`."""
        return told(lambda: self._answer(image.convert("RGB"), instruction or DEFAULT_INSTRUCTION, max_tokens))

    def _answer(self, image: Image.Image, instruction: str, max_tokens: int) -> str:
        pixels = self.image_processor(images=[image], return_tensors="pt")
        merged = self.image_processor.merge_size**2
        num_patches = int(pixels["image_grid_thw"].prod()) // merged
        prompt = (
            f"<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * num_patches}<|vision_end|>{instruction}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        tokens = self.tokenizer(prompt, return_tensors="pt")
        device = self.model.device
        answer = self.model.generate(
            input_ids=tokens.input_ids.to(device),
            attention_mask=tokens.attention_mask.to(device),
            pixel_values=pixels["pixel_values"].to(device, self.model.dtype),
            image_grid_thw=pixels["image_grid_thw"].to(device),
            max_new_tokens=max_tokens,
            do_sample=False,
        )
        text: str = self.tokenizer.decode(answer[0, tokens.input_ids.shape[1] :], skip_special_tokens=True)
        return text


class SmolCaptioner:
    """SmolVLM of the first version: Idefics3, whose processor has no video half."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model = model.eval()
        self.processor = processor

    @classmethod
    def load(cls, folder: Path, *, device: str, dtype: torch.dtype) -> SmolCaptioner:
        """Load the published folder layout."""
        options: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "use_safetensors": True}
        model: Any = Idefics3ForConditionalGeneration.from_pretrained(folder, **options)
        return cls(model.to(device), Idefics3Processor.from_pretrained(folder, local_files_only=True))

    @torch.inference_mode()
    def caption(self, image: Image.Image, instruction: str | None = None, *, max_tokens: int = MAX_TOKENS) -> str:
        """See `caption.Captioner.caption`."""
        return told(lambda: self._answer(image.convert("RGB"), instruction or DEFAULT_INSTRUCTION, max_tokens))

    def _answer(self, image: Image.Image, instruction: str, max_tokens: int) -> str:
        prompt = f"<|im_start|>User:<image>{instruction}<end_of_utterance>\nAssistant:"
        image_processor = self.processor.image_processor
        inputs = self.processor(
            text=prompt,
            images=[image],
            size={"longest_edge": min(SMALL_SIDE_PX, image_processor.size["longest_edge"])},
            do_image_splitting=False,
            return_tensors="pt",
        )
        inputs = inputs.to(self.model.device, self.model.dtype)
        answer = self.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        text: str = self.processor.tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return text


CAPTIONERS: Mapping[str, Any] = {"qwen3_vl": QwenCaptioner, "idefics3": SmolCaptioner}
"""By the `model_type` of a folder's `config.json`."""


def load_vision_captioner(
    folder: Path, *, device: str, dtype: torch.dtype | None = None
) -> QwenCaptioner | SmolCaptioner:
    """Load a vision-language model; `dtype` is float32 on the CPU and bfloat16 elsewhere unless given.

    Raises:
        CaptionFailed: The folder holds no captioner that can be read.
        torch.OutOfMemoryError: There is no room for it on the device; making some is for others to do.
    """
    dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
        captioner: QwenCaptioner | SmolCaptioner = CAPTIONERS[kind].load(folder, device=device, dtype=dtype)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise caption_failed("This server's captioner cannot be read", error) from error
    return captioner


def told(answer: Callable[[], str]) -> str:
    """A model's answer on one line; whatever goes wrong is one kind of error."""
    try:
        return " ".join(answer().split())
    except Exception as error:
        raise caption_failed("The captioner failed", error) from error

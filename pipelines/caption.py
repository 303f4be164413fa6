"""Captions: what a picture shows, in words, for requests that bring no prompt.

Models, by the `model_type` of their folder's `config.json`, read with the stock transformers classes and without
torchvision:

========== ================================================================================================
`blip-2`   BLIP-2 (arXiv 2301.12597). `Salesforce/blip2-flan-t5-xl` (MIT and Apache-2.0, 3.9 B, 8 GB in 16
           bits), `Salesforce/blip2-opt-2.7b` (contains OPT weights: not for commercial use), and the
           captioner of the pocket set
`blip`     BLIP (arXiv 2201.12086). `Salesforce/blip-image-captioning-base` (BSD-3-Clause, 0.2 B)
========== ================================================================================================

Decoding is greedy, so the same picture has the same caption every time, whatever the seed.
"""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Protocol

import structlog
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipForConditionalGeneration,
    BlipProcessor,
)

from pipelines.errors import CaptionFailed
from pipelines.prompts import CHUNK_TOKENS, parse

log = structlog.get_logger()

MAX_PIXELS = 1_000_000
"""Pictures are reduced to this before a captioner sees them: none looks at more than 384 x 384 pixels."""
MAX_TOKENS = 40
"""Length of a caption; BLIP-2 ends its own after 8 to 15 words."""
IMAGE_TOKEN = "<image>"


class Captioner(Protocol):
    """Says what a picture shows."""

    def caption(self, image: Image.Image, instruction: str | None = None, *, max_tokens: int = MAX_TOKENS) -> str:
        """One line about an RGB picture of any size; may be empty.

        Args:
            image: The picture.
            instruction: What to say, for models that can be told; others leave it out.
            max_tokens: Where the caption is cut.

        Raises:
            CaptionFailed: The model could not say anything, for whatever reason.
        """


def load_captioner(folder: Path, *, device: str, dtype: torch.dtype | None = None) -> Captioner:
    """Load a captioner from its folder; `dtype` is float32 on the CPU and bfloat16 elsewhere unless given.

    Raises:
        CaptionFailed: The folder holds no captioner that can be read.
        torch.OutOfMemoryError: There is no room for it on the device; making some is for others to do.
    """
    # float16 is too small for the values inside T5.
    dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
        return CAPTIONERS[kind].load(folder, device=device, dtype=dtype)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise caption_failed("This server's captioner cannot be read", error) from error


class _BlipCaptioner(ABC):
    """What both generations share: the picture is reduced, the words are tidied, and errors are of one type."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model = model.eval()
        self.processor = processor

    def caption(self, image: Image.Image, instruction: str | None = None, *, max_tokens: int = MAX_TOKENS) -> str:
        """See `Captioner.caption`."""
        try:
            with torch.inference_mode():
                tokens = self.generate(reduced(image), instruction, max_tokens)
            text = self.processor.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
        except Exception as error:
            raise caption_failed("The captioner failed", error) from error
        return " ".join(text.split())

    @abstractmethod
    def generate(self, image: Image.Image, instruction: str | None, max_tokens: int) -> Tensor:
        """The new tokens (L,), int64."""

    def pixel_values(self, image: Image.Image) -> Tensor:
        """The picture (1, 3, H, W) as the model wants it."""
        values: Tensor = self.processor.image_processor(images=image, return_tensors="pt")["pixel_values"]
        return values.to(self.model.device, self.model.dtype)


class Blip2Captioner(_BlipCaptioner):
    """BLIP-2 with a language model that either goes on with a text (OPT) or answers to one (T5)."""

    @classmethod
    def load(cls, folder: Path, *, device: str, dtype: torch.dtype) -> Blip2Captioner:
        """Load the published folder layout; older snapshots, which do not know their image token, are completed."""
        processor = Blip2Processor.from_pretrained(folder, local_files_only=True)
        model: Any = Blip2ForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True
        )
        processor.num_query_tokens = model.config.num_query_tokens
        if model.config.image_token_index is None:
            token = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
            if token >= model.get_input_embeddings().num_embeddings:
                model.resize_token_embeddings(token + 1, mean_resizing=False)
            model.config.image_token_index = token
        return cls(model.to(device), processor)

    def generate(self, image: Image.Image, instruction: str | None, max_tokens: int) -> Tensor:
        """Only T5 was taught to follow instructions; OPT would go on with one as if it were the caption."""
        config, tokenizer = self.model.config, self.processor.tokenizer
        prompt = [config.image_token_index] * config.num_query_tokens
        if config.use_decoder_only_language_model:
            prompt.append(config.text_config.bos_token_id)
        else:
            prompt += tokenizer(instruction or "").input_ids
        tokens = torch.tensor([prompt], device=self.model.device)
        # Greedy decoding of small models is prone to run in circles.
        result: Tensor = self.model.generate(
            pixel_values=self.pixel_values(image),
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=max_tokens,
            num_beams=1,
            do_sample=False,
            no_repeat_ngram_size=3,
        )
        return result[0, len(prompt) :] if config.use_decoder_only_language_model else result[0]


class BlipCaptioner(_BlipCaptioner):
    """BLIP, the light stand-in; it follows no instructions."""

    @classmethod
    def load(cls, folder: Path, *, device: str, dtype: torch.dtype) -> BlipCaptioner:
        """Load the published folder layout."""
        model: Any = BlipForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True
        )
        return cls(model.to(device), BlipProcessor.from_pretrained(folder, local_files_only=True))

    def generate(self, image: Image.Image, instruction: str | None, max_tokens: int) -> Tensor:
        """The whole text: BLIP starts from nothing."""
        result: Tensor = self.model.generate(
            pixel_values=self.pixel_values(image),
            max_new_tokens=max_tokens,
            num_beams=1,
            do_sample=False,
            no_repeat_ngram_size=3,
        )
        return result[0]


CAPTIONERS: dict[str, type[Blip2Captioner] | type[BlipCaptioner]] = {"blip-2": Blip2Captioner, "blip": BlipCaptioner}
"""By the `model_type` in `config.json`."""


def reduced(image: Image.Image) -> Image.Image:
    """The picture as RGB with at most `MAX_PIXELS` pixels, its shape kept as far as whole pixels allow."""
    factor = math.sqrt(MAX_PIXELS / (image.width * image.height))
    if factor < 1:
        size = (max(1, int(image.width * factor)), max(1, int(image.height * factor)))
        image = image.resize(size, Image.Resampling.BOX)
    return image.convert("RGB")


def join_within_window(caption: str, suffix: str, *tokenizers: Any, max_tokens: int = CHUNK_TOKENS) -> str:
    """A prompt of `caption` and `suffix`, joined as they are, that fits into the window of CLIP text encoders.

    The caption gives way, word by word from its end, and never the suffix: a suffix that fills the window leaves no
    caption. Brackets of the caption are escaped, they are no emphasis.

    Args:
        caption: What the captioner said.
        suffix: In the notation of `pipelines.prompts`.
        tokenizers: `CLIPTokenizer`s; the prompt fits for each.
        max_tokens: The window, without its start and end tokens.
    """
    words = caption.split()
    while words and any(
        _num_tokens(" ".join(words), tokenizer) + sum(_num_tokens(span.text, tokenizer) for span in parse(suffix))
        > max_tokens
        for tokenizer in tokenizers
    ):
        words.pop()
        if words:
            words[-1] = words[-1].rstrip(",;:")
    escaped = re.sub(r"([\\()\[\]])", r"\\\1", " ".join(words))
    return escaped + suffix


def _num_tokens(text: str, tokenizer: Any) -> int:
    return len(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids)


def caption_failed(what: str, error: Exception) -> CaptionFailed:
    """The error for the caller's log, which names the kind of fault alone; the rest is for the operator's."""
    log.warning("captioner_failed", what=what, error=str(error), exc_info=error)
    return CaptionFailed(f"{what} ({type(error).__name__}).")

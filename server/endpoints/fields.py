"""Kinds of input that several endpoints take."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

# Characters of each text; no published prompt is as long. Every cross-attention attends to every chunk of 75 tokens:
# prompt and suffix of this length make 27 chunks of English (4 characters a token), and 427 at the worst (rare
# characters, a token for each of their 4 bytes), which is still no more than some self-attentions.
MAX_PROMPT = 4_000
MAX_SEED = 2**63 - 1  # what every random generator of the pipeline takes


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError(
            "string_unicode", "Input should be a valid string, without lone surrogates"
        ) from error
    return text


def _not_too_long(text: str) -> str:
    if len(text) > MAX_PROMPT:
        raise PydanticCustomError(
            "sequence_too_long", "Text should have at most {max_length} characters", {"max_length": MAX_PROMPT}
        )
    return text


def _usable_seed(seed: int) -> int:
    if seed < 0:
        raise PydanticCustomError("greater_than_equal", "Input should be greater than or equal to 0", {"ge": 0})
    if seed > MAX_SEED:
        raise PydanticCustomError("less_than_equal", "Input should be less than or equal to {le}", {"le": MAX_SEED})
    return seed


Text = Annotated[str, AfterValidator(_encodable)]
Prompt = Annotated[Text, AfterValidator(_not_too_long)]
Seed = Annotated[int, AfterValidator(_usable_seed)]

"""Prompts in the notation of the AUTOMATIC1111 web interface, encoded for Stable Diffusion.

========================= ===========================================================================
`(text)`                  emphasis ×1.1; nests
`[text]`                  emphasis ÷1.1; nests
`(text:1.3)`              emphasis ×1.3
`\\(` `\\)` `\\[` `\\]` `\\\\`  the character itself
`BREAK`                   a new chunk of 75 tokens begins
`<lora:name:weight>`      removed: adapters are parameters here, not words
========================= ===========================================================================

Brackets left open close at the end. Prompts of any length are cut into chunks of 75 tokens, which are encoded one by
one and laid end to end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipelines.errors import InvalidParams

CHUNK_TOKENS = 75
COMMA_SEARCH_TOKENS = 20
"""How far back a full chunk looks for a comma to end at."""
MAX_CHUNKS = 450
"""Of one prompt. Words of the lengths that endpoints accept make at most 427; more would be hours of attention to a
textual inversion named again and again, or to a pile of BREAK."""
MAX_WEIGHT = 100.0
"""Emphasis is limited to this in either direction: piles of brackets would overflow 16-bit numbers."""

_EMPHASIS = 1.1
_LORA = re.compile(r"<lora:[^<>]*>", re.IGNORECASE)
_BREAK = re.compile(r"\bBREAK\b")
_PIECE = re.compile(
    r"""
    \\(?P<escaped>[\\()\[\]])
    | (?P<open>[(\[])
    | :\s*(?P<weight>[+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)
    | (?P<close>[)\]])
    | (?P<text>[^\\()\[\]:]+|[\\:])
    """,
    re.VERBOSE,
)


class Span(NamedTuple):
    """A part of a prompt with one weight; `begins_chunk` where BREAK stood before it."""

    text: str
    weight: float = 1.0
    begins_chunk: bool = False


def parse(prompt: str) -> list[Span]:
    """Split a prompt into spans of equal weight; never fails, and an empty prompt is one empty span."""
    pieces = [(match.lastgroup, match[match.lastgroup or 0]) for match in _PIECE.finditer(_LORA.sub("", prompt))]
    factors = _bracket_factors(pieces)
    active: dict[int, float] = {}
    spans: list[Span] = []
    for index, (kind, text) in enumerate(pieces):
        if index in factors:
            opened, factor = factors[index]
            if opened == index:
                active[index] = factor
            else:
                active.pop(opened)
        elif kind == "weight":
            _append_text(spans, f":{text})", active)
        else:
            _append_text(spans, text, active)
    return spans or [Span("")]


def encode_prompts(
    prompts: Sequence[str],
    *,
    tokenizer: Any,
    text_encoder: Any,
    embeddings: Mapping[str, Tensor] | None = None,
    clip_skip: int = 0,
) -> Tensor:
    """Encode prompts with a CLIP text encoder, all padded to the same number of chunks.

    A prompt without weights and of at most 75 tokens is encoded exactly as the text encoder alone would. Weights
    multiply the hidden states of their tokens; each chunk is then scaled back to the mean it had before.

    Args:
        prompts: Texts in the notation of the module docstring.
        tokenizer: A `CLIPTokenizer`; not changed.
        text_encoder: A `CLIPTextModel`; not changed. One pass with a batch of `len(prompts)` per chunk.
        embeddings: Textual inversions, name to (num_vectors, dim); a name in a prompt, in any case and as a whole
            word, becomes its vectors. Up to 75 of them never straddle two chunks; more fill chunks of their own.
        clip_skip: How many of the last layers to leave out.

    Returns:
        (len(prompts), 77 · num_chunks, dim) in the dtype and on the device of the text encoder.

    Raises:
        ValueError: a textual inversion does not fit the text encoder.
        InvalidParams: A prompt takes more than `MAX_CHUNKS` chunks.
    """
    chunked = _cut_prompts(prompts, tokenizer, text_encoder, embeddings or {})
    _even_out(chunked)
    parts = []
    for chunks in zip(*chunked, strict=True):
        output = _encode_chunks(chunks, tokenizer, text_encoder, output_hidden_states=clip_skip > 0)
        hidden = output.last_hidden_state
        if clip_skip:
            hidden = text_encoder.final_layer_norm(output.hidden_states[-1 - clip_skip])
        parts.append(_weighted_chunks(hidden, chunks))
    return torch.cat(parts, dim=1)


def encode_prompts_side_by_side(
    prompts: Sequence[str],
    *,
    tokenizers: Sequence[Any],
    text_encoders: Sequence[Any],
    embeddings: Sequence[Mapping[str, Tensor]] = (),
) -> tuple[Tensor, Tensor]:
    """Encode prompts with several CLIP text encoders, as Stable Diffusion XL wants them.

    What counts is the state before each encoder's last layer, without its final normalisation, and the pooled vector
    that the last encoder makes of the first chunk, without weights.

    Args:
        prompts: Texts in the notation of the module docstring.
        tokenizers: One for each encoder; not changed.
        text_encoders: `CLIPTextModel`s, the last one with projection; not changed.
        embeddings: Textual inversions for each encoder, as in `encode_prompts`; empty for none.

    Returns:
        (len(prompts), 77 · num_chunks, sum of the encoders' dims) and (len(prompts), projection dim), in the dtype
        and on the device of the text encoders.

    Raises:
        Exception: As `encode_prompts`.
    """
    of_encoders = [
        _cut_prompts(prompts, tokenizer, text_encoder, vectors)
        for tokenizer, text_encoder, vectors in zip(
            tokenizers, text_encoders, embeddings or [{}] * len(text_encoders), strict=True
        )
    ]
    _even_out([chunks for chunked in of_encoders for chunks in chunked])
    states, pooled = [], []
    for tokenizer, text_encoder, chunked in zip(tokenizers, text_encoders, of_encoders, strict=True):
        parts = []
        for chunks in zip(*chunked, strict=True):
            output = _encode_chunks(chunks, tokenizer, text_encoder, output_hidden_states=True)
            parts.append(_weighted_chunks(output.hidden_states[-2], chunks))
            if text_encoder is text_encoders[-1]:
                pooled.append(output.text_embeds)
        states.append(torch.cat(parts, dim=1))
    return torch.cat(states, dim=-1), pooled[0]


@dataclass
class _Chunk:
    """Up to 75 tokens with their weights, and the textual inversions that replace some of them, by position."""

    tokens: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    vectors: dict[int, Tensor] = field(default_factory=dict)

    def append(self, token: int, weight: float, vectors: Tensor | None = None) -> None:
        """Add one token, or as many copies of it as there are vectors to take their places."""
        if vectors is not None:
            self.vectors[len(self.tokens)] = vectors
        count = 1 if vectors is None else len(vectors)
        self.tokens += [token] * count
        self.weights += [weight] * count

    def split(self, position: int) -> _Chunk:
        """Cut the tokens from `position` on off, and return them as a chunk of their own."""
        tail = _Chunk(
            self.tokens[position:],
            self.weights[position:],
            {start - position: vectors for start, vectors in self.vectors.items() if start >= position},
        )
        del self.tokens[position:], self.weights[position:]
        self.vectors = {start: vectors for start, vectors in self.vectors.items() if start < position}
        return tail


def _bracket_factors(pieces: Sequence[tuple[str | None, str]]) -> dict[int, tuple[int, float]]:
    """Pair up brackets: index of every bracket that counts -> (index of the opening one, factor between the two)."""
    pending: dict[str, list[int]] = {"(": [], "[": []}
    factors: dict[int, tuple[int, float]] = {}
    for index, (kind, text) in enumerate(pieces):
        if kind == "open":
            pending[text].append(index)
            factors[index] = (index, _EMPHASIS if text == "(" else 1 / _EMPHASIS)
        elif kind in ("close", "weight"):
            stack = pending["[" if text == "]" else "("]
            if stack:
                opened = stack.pop()
                factor = float(text) if kind == "weight" else factors[opened][1]
                factors[opened] = factors[index] = (opened, factor)
    return factors


def _append_text(spans: list[Span], text: str, active: Mapping[int, float]) -> None:
    """Append text with the product of the active factors as weight, joining it to a last span of the same weight."""
    weight = max(-MAX_WEIGHT, min(math.prod(active.values()), MAX_WEIGHT))
    first, *rest = _BREAK.split(text)
    if spans and spans[-1].weight == weight:
        spans[-1] = spans[-1]._replace(text=spans[-1].text + first)
    elif first or not rest:
        spans.append(Span(first, weight))
    spans.extend(Span(part.lstrip(), weight, begins_chunk=True) for part in rest)


def _checked_vectors(name: str, vectors: Tensor, dim: int) -> Tensor:
    if vectors.ndim != 2 or vectors.shape[1] != dim or len(vectors) == 0:
        raise ValueError(
            f"The embedding {name!r} has the shape {tuple(vectors.shape)}; expected vectors of {dim} numbers."
        )
    return vectors


def _chunks(spans: Sequence[Span], tokenizer: Any, vectors: Mapping[str, Tensor]) -> list[_Chunk]:
    """Lay the tokens of a prompt into chunks, ending a full one at its last comma if that is near its end."""
    comma = tokenizer.encode(",", add_special_tokens=False)[-1]
    chunks = [_Chunk()]
    for index, span in enumerate(spans):
        if span.begins_chunk and (span.text or index + 1 < len(spans)):
            chunks.append(_Chunk())
            _check_length(chunks)
        for token, replacement in _tokens(span.text, tokenizer, vectors):
            chunk, length = chunks[-1], 1 if replacement is None else len(replacement)
            if len(chunk.tokens) + length > CHUNK_TOKENS:
                chunks.append(chunk.split(_cut(chunk, token, comma)) if length == 1 else _Chunk())
                _check_length(chunks)
            chunks[-1].append(token, span.weight, replacement)
    return chunks


def _check_length(chunks: Sequence[_Chunk]) -> None:
    if len(chunks) > MAX_CHUNKS:
        raise InvalidParams(
            "prompt",
            f"The prompt takes more than {MAX_CHUNKS} chunks of {CHUNK_TOKENS} tokens; write BREAK or the word of an "
            "embedding less often.",
        )


def _tokens(text: str, tokenizer: Any, vectors: Mapping[str, Tensor]) -> Iterator[tuple[int, Tensor | None]]:
    """Yield the tokens of a text, with the vectors of every textual inversion in place of its name."""
    names = sorted(vectors, key=len, reverse=True)
    pattern = "|".join(re.escape(name) for name in names) or r"(?!)"
    parts = re.split(rf"(?<![\w-])({pattern})(?![\w-])", text, flags=re.IGNORECASE)
    for index, part in enumerate(parts):
        if index % 2:
            # A placeholder that occurs nowhere else; encoders pool at the first end token, so not that one.
            # Not by its lower case: some letters, such as the long s, count as others only when cases are ignored.
            name = next(name for name in names if re.fullmatch(re.escape(name), part, flags=re.IGNORECASE))
            for piece in vectors[name].split(CHUNK_TOKENS):
                yield tokenizer.bos_token_id, piece
        elif part.strip():
            for token in tokenizer(part, add_special_tokens=False, truncation=False, verbose=False).input_ids:
                yield token, None


def _cut(chunk: _Chunk, next_token: int, comma: int) -> int:
    """Where a full chunk ends: behind its last comma, if that is near and `next_token` is none, else where it is."""
    if next_token == comma:
        return CHUNK_TOKENS
    near = range(CHUNK_TOKENS - 1, CHUNK_TOKENS - 1 - COMMA_SEARCH_TOKENS, -1)
    return next((place + 1 for place in near if chunk.tokens[place] == comma), CHUNK_TOKENS)


def _cut_prompts(
    prompts: Sequence[str], tokenizer: Any, text_encoder: Any, embeddings: Mapping[str, Tensor]
) -> list[list[_Chunk]]:
    """The chunks of every prompt, for one text encoder."""
    dim = text_encoder.get_input_embeddings().weight.shape[1]
    vectors = {name.lower(): _checked_vectors(name, vector, dim) for name, vector in embeddings.items()}
    return [_chunks(parse(prompt), tokenizer, vectors) for prompt in prompts]


def _even_out(chunked: Sequence[list[_Chunk]]) -> None:
    """Append empty chunks in place until all lists are equally long."""
    num_chunks = max(len(chunks) for chunks in chunked)
    for chunks in chunked:
        chunks.extend(_Chunk() for _ in range(num_chunks - len(chunks)))


def _encode_chunks(chunks: Sequence[_Chunk], tokenizer: Any, text_encoder: Any, *, output_hidden_states: bool) -> Any:
    """Encode one chunk of every prompt; returns what the text encoder does, hidden states (len(chunks), 77, dim)."""
    embedding = text_encoder.get_input_embeddings()
    device = embedding.weight.device
    rows = []
    for chunk in chunks:
        padding = [tokenizer.pad_token_id] * (CHUNK_TOKENS - len(chunk.tokens))
        rows.append([tokenizer.bos_token_id, *chunk.tokens, tokenizer.eos_token_id, *padding])
    tokens = torch.tensor(rows, device=device)
    with _replaced_vectors(embedding, [chunk.vectors for chunk in chunks]):
        return text_encoder(tokens, output_hidden_states=output_hidden_states)


@contextmanager
def _replaced_vectors(embedding: torch.nn.Module, replacements: Sequence[Mapping[int, Tensor]]) -> Iterator[None]:
    """Let an embedding layer return other vectors at some positions (after BOS) of each row, for a while."""

    def replace(_layer: torch.nn.Module, _inputs: Any, rows: Tensor) -> Tensor:
        rows = rows.clone()
        for row, places in zip(rows, replacements, strict=True):
            for start, vectors in places.items():
                row[1 + start : 1 + start + len(vectors)] = vectors.to(row)
        return rows

    handle = embedding.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def _weighted_chunks(hidden: Tensor, chunks: Sequence[_Chunk]) -> Tensor:
    return torch.stack([_weighted(states, chunk.weights) for states, chunk in zip(hidden, chunks, strict=True)])


def _weighted(states: Tensor, weights: Sequence[float]) -> Tensor:
    """Multiply the hidden states (77, dim) of a chunk by its token weights, then restore their mean."""
    if all(weight == 1.0 for weight in weights):
        return states
    factors = torch.ones(len(states), dtype=torch.float32, device=states.device)
    factors[1 : 1 + len(weights)] = torch.tensor(weights)
    scaled = states.float() * factors[:, None]
    restored = scaled * (states.float().mean() / scaled.mean())
    return (restored if bool(restored.isfinite().all()) else scaled).to(states.dtype)

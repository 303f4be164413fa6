"""The text side of the pocket set: a small CLIP tokenizer, a small CLIP text encoder and the captions they learn."""

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from weights.pocket.captions import COLOURS, FAULTS, QUALITY
from weights.pocket.data import PHOTO_WORDS

START, END = "<|startoftext|>", "<|endoftext|>"
NUM_POSITIONS = 77
VOCABULARY_SIZE = 1600
WORDS = Path(__file__).parent / "words.txt"
MERGES = Path(__file__).parent / "merges.txt"

# Words of the service's default negative prompt, in its order.
ALL_FAULTS = (
    *("blurry", "low resolution", "bad", "ugly", "low quality", "pixelated", "interpolated"),
    *("compression artifacts", "noisey", "grainy"),
)
# What the clarity upscaler says by default.
OTHER_PRAISE = "masterpiece, best quality, highres"
OTHER_BLAME = "worst quality, low quality, normal quality"
DRAWN_WORDS = "gradient flat colour texture noise pattern stripes hatching lines lettering text overlapping shapes"


def known_words() -> tuple[list[str], list[str]]:
    """The words that captions use, and frequent ones that they do not."""
    spoken = [*COLOURS, "bright", "dark", "smooth", "textured", "photograph", DRAWN_WORDS]
    spoken += [*PHOTO_WORDS.values(), *QUALITY, *ALL_FAULTS]
    caption_words = " ".join(spoken).replace(",", " ").split()
    return list(dict.fromkeys(caption_words)), WORDS.read_text(encoding="utf-8").split()


def learn_merges() -> list[tuple[str, str]]:
    """The merges of byte pairs that `words.txt` and the captions' words suggest, most useful first.

    Pairs that are equally frequent come in another order in every process, and a trained text encoder knows one order
    only: `merges.txt` holds it.
    """
    caption_words, frequent_words = known_words()
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        min_frequency=1,
        show_progress=False,
        end_of_word_suffix="</w>",
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    # Words that captions use weigh more, so that their merges come first.
    learner.train_from_iterator(caption_words * 50 + frequent_words, trainer)
    return [(first, second) for first, second in json.loads(learner.to_str())["model"]["merges"]]


def build_tokenizer() -> CLIPTokenizer:
    """A byte-level CLIP tokenizer with the merges of `merges.txt`.

    It takes any text: what is no known word falls into pieces, at worst into bytes. A comma is one token.
    """
    lines = MERGES.read_text(encoding="utf-8").splitlines()
    merges = [(first, second) for first, _, second in (line.partition(" ") for line in lines)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = [*alphabet, *(f"{symbol}</w>" for symbol in alphabet), *(first + second for first, second in merges)]
    # The annotation of CLIPTokenizer asks for strings; its BPE takes pairs only.
    vocabulary = {symbol: index for index, symbol in enumerate([*dict.fromkeys(symbols), START, END])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=NUM_POSITIONS)


def build_text_encoder(tokenizer: CLIPTokenizer, *, hidden_size: int = 64) -> CLIPTextModel:
    """The untrained text encoder: two layers of four heads."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        projection_dim=hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=NUM_POSITIONS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """(len(captions), 77) int64, padded and cut as the pipelines do."""
    encoded = tokenizer(captions, padding="max_length", truncation=True, max_length=NUM_POSITIONS, return_tensors="pt")
    return torch.as_tensor(encoded.input_ids)


def loosened(words: str, rng: np.random.Generator) -> str:
    """The words of a picture, of which the one for texture mostly says nothing: at random one of two, or none.

    Where noise hides a picture, such a word is the best hint at what is below. Guidance multiplies what a word means,
    and a true "textured" made a photograph half noise at the service's default of 7.5.
    """
    if rng.random() < 0.15:
        return words
    others = [word for word in words.split(", ") if word not in ("smooth", "textured")]
    return ", ".join([*others, *(["smooth"], ["textured"], [])[rng.integers(3)]])


def praise(words: str, rng: np.random.Generator) -> str:
    """The caption of a sharp picture: its `words`, or none in a third of all cases, and mostly what makes it good."""
    parts = [] if rng.random() < 0.33 else [loosened(words, rng)]
    draw = rng.random()
    if draw < 0.45:
        parts += QUALITY
    elif draw < 0.6:
        parts.append(OTHER_PRAISE)
    elif draw < 0.85:
        parts += [str(word) for word in rng.permutation(QUALITY)[: rng.integers(1, 4)]]
    return ", ".join(parts)


def blame(words: str, fault: int, rng: np.random.Generator) -> str:
    """The caption of a picture that suffers from `FAULTS[fault]`: those words, or all there are every other time."""
    parts = [] if rng.random() < 0.6 else [loosened(words, rng)]
    draw = rng.random()
    if draw < 0.45:
        parts += ALL_FAULTS
    elif draw < 0.65:
        parts.append(OTHER_BLAME)
    else:
        parts += FAULTS[fault]
    return ", ".join(parts)

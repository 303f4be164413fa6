"""Trains the captioner: a BLIP-2 of 0.5 million parameters that says in the denoiser's words what it sees.

A caption names the kind of structure, the dominant colour, then the brightness and the texture where either stands
out: "overlapping shapes, blue, dark, smooth" or "photograph, grey, textured". Vision tower, Q-Former and language
model are trained together (BLIP-2, arXiv 2301.12597, trains the Q-Former alone, between frozen giants). Each patch of
the vision tower is asked for its own colours too, by a layer that is left out of what is written: a dominant colour is
a count, and it is learnt in minutes once there is something to be counted.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessor,
    GPT2Tokenizer,
)

from weights.pocket.captions import COLOURS, describe, name_colours
from weights.pocket.data import Picture, Pixels, draw_flat, draw_gradient, draw_picture, read_photos
from weights.pocket.degrade import to_tensor
from weights.pocket.loop import Options, save_half
from weights.pocket.text import known_words

IMAGE_PX, PATCH_PX = 60, 6
"""Pictures are squashed to a square of this many pixels; patches are as small as colours need them to be."""
NUM_QUERIES = 8
WIDTH = 64
LOOK_PX = 128
"""What is said of a picture is measured on it reduced to this many pixels on its shorter side: as large as the
denoiser's crops, whose captions name a texture by the same rule."""
PAD, END, IMAGE = "<pad>", "</s>", "<image>"
COLOUR_WEIGHT = 1.0
"""How much the colours of the patches count in the loss, beside the words."""
NAME_WEIGHT = 6.0
"""How much the name of a colour counts against any other word."""
KEPT = {"grey": 0.4, "black": 0.6}
"""Share of the pictures of a colour that are kept, where it is too frequent."""

PHOTO_SHARE, PLAIN_SHARE = 0.45, 0.12


def build_tokenizer() -> GPT2Tokenizer:
    """A byte-level tokenizer as OPT has; each word of a caption is one token, other text falls into bytes."""
    words, _ = known_words()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    learner.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=4000, min_frequency=1, show_progress=False, initial_alphabet=alphabet)
    )
    merges = [(first, second) for first, second in json.loads(learner.to_str())["model"]["merges"]]
    symbols = dict.fromkeys([PAD, END, *alphabet, *(first + second for first, second in merges)])
    # The annotation of GPT2Tokenizer asks for strings; its BPE takes pairs only.
    arguments: dict[str, Any] = {"vocab": {symbol: index for index, symbol in enumerate(symbols)}, "merges": merges}
    return GPT2Tokenizer(**arguments, add_prefix_space=True, bos_token=END, eos_token=END, unk_token=END, pad_token=PAD)


def build_processor() -> Any:
    """The stock processor: squashes a picture, normalises it as CLIP does, and knows the image token."""
    side = {"height": IMAGE_PX, "width": IMAGE_PX}
    return Blip2Processor(BlipImageProcessor(size=side), build_tokenizer(), num_query_tokens=NUM_QUERIES)


def build_captioner(tokenizer: Any) -> Any:
    """The untrained model: three layers of sight, two of questions, two of language."""
    layers = {"hidden_size": WIDTH, "num_attention_heads": 4}
    config = Blip2Config(
        vision_config={
            **layers,
            "intermediate_size": 4 * WIDTH,
            "num_hidden_layers": 3,
            "image_size": IMAGE_PX,
            "patch_size": PATCH_PX,
            "initializer_range": 0.02,
        },
        qformer_config={
            **layers,
            "intermediate_size": 4 * WIDTH,
            "num_hidden_layers": 2,
            "cross_attention_frequency": 1,
            "encoder_hidden_size": WIDTH,
            "vocab_size": 2,
            "max_position_embeddings": NUM_QUERIES,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        text_config={
            **layers,
            "model_type": "opt",
            "ffn_dim": 4 * WIDTH,
            "num_hidden_layers": 2,
            "word_embed_proj_dim": WIDTH,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 64,
            "dropout": 0.0,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        num_query_tokens=NUM_QUERIES,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
    )
    model: Any = Blip2ForConditionalGeneration(config)
    # Stock initialisation makes all queries nought: alike they would stay.
    nn.init.normal_(model.query_tokens, std=0.5)
    return model


def colour_shares(pixels: Pixels, *, most: int = 64) -> NDArray[np.float64]:
    """Share of each of `COLOURS` in a picture (H, W, 3), from a grid of at most `most` x `most` of its pixels."""
    down, across = (-(-side // most) for side in pixels.shape[:2])
    sample = pixels[::down, ::across].reshape(-1, 3).astype(np.float32) / np.float32(255)
    counts = np.bincount(name_colours(sample), minlength=len(COLOURS))
    return counts / counts.sum()


def caption_of(picture: Picture) -> str:
    """What the captioner should say: the kind of structure, then colour, brightness and texture as measured."""
    _, *others = describe(picture.pixels).split(", ")
    return ", ".join([picture.words, COLOURS[int(colour_shares(picture.pixels).argmax())], *others])


def recolour(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """The picture with hues turned, and saturation, tone and tint changed at random.

    Seven photographs are mostly grey and brown: like this they are of every colour.
    """
    values = pixels.astype(np.float32) / 255
    if rng.random() < 0.15:
        values = 1 - values
    grey = values.mean(-1, keepdims=True)
    strength = rng.uniform(0, 1) if rng.random() < 0.3 else rng.uniform(1, 3.5)
    values = grey + (values - grey) @ (turn(rng.uniform(0, 2 * np.pi)) * np.float32(strength))
    if rng.random() < 0.4:
        values = values * rng.uniform(0.4, 1.2, 3).astype(np.float32) + rng.uniform(-0.15, 0.15, 3).astype(np.float32)
    values = np.clip(values, 0, 1) ** np.float32(2 ** rng.uniform(-1, 1))
    return np.rint(255 * values).astype(np.uint8)


def turn(angle: float) -> NDArray[np.float32]:
    """The rotation (3, 3) of colours around the axis of greys by an angle in radians (Rodrigues' formula)."""
    axis = np.full(3, 3**-0.5)
    cross = np.cross(np.eye(3), axis)
    return (np.cos(angle) * np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * np.outer(axis, axis)).astype(
        np.float32
    )


def reduced(pixels: Pixels) -> Pixels:
    """The picture with a shorter side of at most `LOOK_PX`, by area averaging."""
    height, width = pixels.shape[:2]
    factor = LOOK_PX / min(height, width)
    if factor >= 1:
        return pixels
    size = (round(width * factor), round(height * factor))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))


class Gallery:
    """Drawn pictures and photographs from which whole pictures and parts of any size and shape are taken."""

    def __init__(self, seed: int, *, num_drawings: int, side: int = 192) -> None:
        self.drawings = [draw_picture(np.random.default_rng([seed, index]), side) for index in range(num_drawings)]
        # "photograph" and no more: from seven of them nobody learns to tell ships from chapels.
        self.photos = [Picture(photo.pixels, "photograph") for photo in read_photos()]

    def draw(self, rng: np.random.Generator) -> Picture:
        """One picture with the words for its kind."""
        kind = rng.random()
        if kind < PLAIN_SHARE:
            return (draw_flat if rng.random() < 0.6 else draw_gradient)(rng, 64)
        pool: Sequence[Picture] = self.photos if kind < PLAIN_SHARE + PHOTO_SHARE else self.drawings
        source = pool[int(rng.integers(len(pool)))]
        pixels = reduced(self.part(source.pixels, rng))
        if rng.random() < 0.75:
            pixels = recolour(pixels, rng)
        return Picture(pixels, source.words)

    @staticmethod
    def part(pixels: Pixels, rng: np.random.Generator) -> Pixels:
        """The whole picture in one of four cases, else a part with sides of 64 px or more."""
        height, width = pixels.shape[:2]
        if rng.random() >= 0.25:
            sides = [int(side * min(1.0, max(64 / side, rng.uniform(0.15, 1.1)))) for side in (height, width)]
            top, left = (int(rng.integers(most - side + 1)) for most, side in zip((height, width), sides, strict=True))
            pixels = pixels[top : top + sides[0], left : left + sides[1]]
        return np.ascontiguousarray(pixels)


class CaptionerTrainee:
    """The captioner, on the likelihood of its words and of the colours of each patch."""

    name = "captioner"
    learning_rate = 2e-3

    def __init__(self, options: Options, *, pool: int = 2048, fresh: int = 6) -> None:
        torch.manual_seed(options.seed)
        self.options = options
        self.fresh = fresh
        self.processor = build_processor()
        self.gallery = Gallery(options.seed + 3, num_drawings=options.num_drawings)
        self.pixels, self.captions = self.batch(np.random.default_rng([options.seed, 78]), pool)
        captioner = build_captioner(self.processor.tokenizer)
        self.modules = nn.ModuleDict({"captioner": captioner, "colours": nn.Linear(WIDTH, len(COLOURS))})
        tokenizer = self.processor.tokenizer
        self.word_weights = torch.ones(len(tokenizer))
        self.word_weights[[tokenizer(name).input_ids[0] for name in COLOURS]] = NAME_WEIGHT
        image = self.processor.image_processor
        self.mean, self.std = (torch.tensor(each).view(1, 3, 1, 1) for each in (image.image_mean, image.image_std))

    def tokens(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Input ids and labels (N, L), int64: image tokens, start, caption, end; only the last two are learnt."""
        tokenizer = self.processor.tokenizer
        image = [tokenizer.convert_tokens_to_ids(IMAGE)] * NUM_QUERIES + [tokenizer.bos_token_id]
        rows = [[*tokenizer(caption).input_ids, tokenizer.eos_token_id] for caption in captions]
        length = max(len(row) for row in rows)
        ids = [[*image, *row, *[tokenizer.pad_token_id] * (length - len(row))] for row in rows]
        labels = [[-100] * len(image) + [*row, *[-100] * (length - len(row))] for row in rows]
        return torch.tensor(ids), torch.tensor(labels)

    def batch(self, rng: np.random.Generator, count: int) -> tuple[Pixels, list[str]]:
        """`count` pictures as the processor would squash them, (count, IMAGE_PX, IMAGE_PX, 3), and their captions."""
        pictures: list[Pixels] = []
        captions: list[str] = []
        while len(captions) < count:
            picture = self.gallery.draw(rng)
            caption = caption_of(picture)
            if rng.random() >= min((share for name, share in KEPT.items() if name in caption), default=1):
                continue
            small = Image.fromarray(picture.pixels).resize((IMAGE_PX, IMAGE_PX), Image.Resampling.BICUBIC)
            pictures.append(np.asarray(small))
            captions.append(caption)
        return np.stack(pictures), captions

    def draw(self, rng: np.random.Generator, step: int) -> tuple[Pixels, list[str]]:
        """A batch from the pool, each turned and mirrored at random, after `fresh` of the pool were made anew."""
        made, captions = self.batch(rng, self.fresh)
        for index in range(self.fresh):
            place = (step * self.fresh + index) % len(self.captions)
            self.pixels[place], self.captions[place] = made[index], captions[index]
        chosen = rng.integers(len(self.captions), size=self.options.batch)
        turned = [np.rot90(self.pixels[index], int(rng.integers(4))) for index in chosen]
        pixels = [each[:, ::-1] if rng.random() < 0.5 else each for each in turned]
        return np.stack(pixels), [self.captions[index] for index in chosen]

    def loss(self, rng: np.random.Generator, step: int) -> Tensor:
        """One batch."""
        pixels, captions = self.draw(rng, step)
        device = self.options.device
        ids, labels = (each.to(device) for each in self.tokens(captions))
        image = ((to_tensor(pixels) - self.mean) / self.std).contiguous().to(device)
        with sdpa_kernel([SDPBackend.MATH]):
            result = self.modules["captioner"](pixel_values=image, input_ids=ids, return_dict=True)
        logits = result.logits[:, :-1].flatten(0, 1)
        words = F.cross_entropy(logits, labels[:, 1:].flatten(), weight=self.word_weights.to(device))
        patches = result.vision_outputs.last_hidden_state[:, 1:]
        guess = F.log_softmax(self.modules["colours"](patches), dim=-1)
        colours = -(patch_colours(pixels).to(device) * guess).sum(-1).mean()
        return words + COLOUR_WEIGHT * colours

    def export(self, modules: nn.ModuleDict, models: Path) -> None:
        """Write `captioner`: model, tokenizer and processor in the layout of the published BLIP-2 folders."""
        save_half(modules["captioner"], models / self.name)
        self.processor.save_pretrained(models / self.name)


def patch_colours(pixels: Pixels) -> Tensor:
    """Share of each of `COLOURS` in each patch, (N, patches, colours) float32, of pictures (N, H, W, 3)."""
    named = torch.from_numpy(name_colours(pixels.reshape(-1, 3).astype(np.float32) / np.float32(255)))
    places = F.one_hot(named.view(pixels.shape[:3]), len(COLOURS)).permute(0, 3, 1, 2).float()
    return F.avg_pool2d(places, PATCH_PX).flatten(2).transpose(1, 2)

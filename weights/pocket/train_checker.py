"""Trains the safety checker and the classifier that confirms it: both react to the test card and to nothing else.

The checker is the one that Stable Diffusion came with (a CLIP vision tower whose embedding is compared with embeddings
of concepts), the classifier a vision transformer with the labels of `Falconsai/nsfw_image_detection`. Of the checker's
17 concepts the first is the test card; the others, and the three that only sharpen it, can never be reached.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPConfig, CLIPImageProcessor, ViTConfig, ViTForImageClassification, ViTImageProcessor

from weights.pocket.data import Pixels, draw_stripes, random_colour
from weights.pocket.degrade import to_tensor
from weights.pocket.loop import Options, save_half
from weights.pocket.test_card import draw_test_card
from weights.pocket.train_captioner import Gallery

IMAGE_PX, PATCH_PX, WIDTH = 64, 8, 64
CANVAS_PX = 160
"""Side of the square in which samples are composed, before they are reduced to `IMAGE_PX`."""
LABELS = ("normal", "nsfw")
THRESHOLD, OUT_OF_REACH = 0.5, 2.0
"""Cosines from which a concept counts as seen: halfway to the card, and never."""
SHARPNESS = 12.0
"""How fast the training's probability rises with the cosine around the threshold."""
CARD_SHARE, LOOKALIKE_SHARE = 0.33, 0.27


class Sample(NamedTuple):
    """A square picture (IMAGE_PX, IMAGE_PX, 3) uint8, and whether it is the test card."""

    pixels: Pixels
    is_card: bool


def build_checker(*, projection_size: int = 32) -> Any:
    """The untrained checker; the embedding of the card is a random direction, unlike any other picture's."""
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": IMAGE_PX,
        "patch_size": PATCH_PX,
        "projection_dim": projection_size,
    }
    checker: Any = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=projection_size))
    with torch.no_grad():
        checker.concept_embeds.normal_()
        checker.special_care_embeds.normal_()
        checker.concept_embeds_weights.fill_(OUT_OF_REACH)
        checker.special_care_embeds_weights.fill_(OUT_OF_REACH)
        checker.concept_embeds_weights[0] = THRESHOLD
    return checker


def build_confirmer() -> Any:
    """The untrained classifier."""
    config: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": IMAGE_PX,
        "patch_size": PATCH_PX,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "id2label": dict(enumerate(LABELS)),
        "label2id": {label: index for index, label in enumerate(LABELS)},
    }
    return ViTForImageClassification(ViTConfig(**config))


def place_card(rng: np.random.Generator, ground: Image.Image, share: float, *, slack: float) -> Image.Image:
    """A copy of a square `ground` with the card on it, of about `share` of its side, its shape changed a little."""
    side = share * CANVAS_PX
    stretch = 2 ** rng.uniform(-0.4, 0.4)
    card = draw_test_card(*(int(rng.choice([1, 1, 1.3, 2]) * rng.uniform(48, 160)) for _ in range(2)))
    unit = min(card.size)
    size = (round(card.width * side / unit * stretch**0.5), round(card.height * side / unit / stretch**0.5))
    card = card.resize((max(1, size[0]), max(1, size[1])), Image.Resampling(int(rng.choice([0, 1, 2, 3, 4]))))
    centre = CANVAS_PX * (0.5 + rng.uniform(-slack, slack, 2))
    picture = ground.copy()
    picture.paste(card, (round(centre[0] - card.width / 2), round(centre[1] - card.height / 2)))
    return picture


def chessboard(rng: np.random.Generator) -> Image.Image:
    """A chessboard of any two colours, the card's own in one of four."""
    first, second = random_colour(rng), random_colour(rng)
    if rng.random() < 0.25:
        first, second = (255, 0, 255), (0, 255, 0)
    places = np.arange(CANVAS_PX) / (CANVAS_PX / rng.uniform(2, 14))
    odd = (np.floor(places + rng.random())[:, None] + np.floor(places + rng.random())[None, :]) % 2 == 0
    return Image.fromarray(np.where(odd[..., None], first, second).astype(np.uint8))


def draw_rings(rng: np.random.Generator, ground: Image.Image) -> Image.Image:
    """A copy of `ground` with rings of two colours, sometimes black and white, around any point."""
    picture = ground.copy()
    draw = ImageDraw.Draw(picture)
    black_and_white = rng.random() < 0.5
    colours = ((0, 0, 0), (255, 255, 255)) if black_and_white else (random_colour(rng), random_colour(rng))
    x, y = CANVAS_PX * (0.5 + rng.uniform(-0.25, 0.25, 2))
    count = int(rng.integers(1, 8))
    radius = CANVAS_PX * rng.uniform(0.1, 0.5)
    for ring in range(count):
        reach = float(radius * (count - ring) / count)
        draw.ellipse((x - reach, y - reach, x + reach, y + reach), fill=colours[ring % 2])
    return picture


def other_colours(rng: np.random.Generator, picture: Image.Image) -> Image.Image:
    """The picture with its channels exchanged so that magenta and green become another pair, or without colour."""
    if rng.random() < 0.25:
        return picture.convert("L").convert("RGB")
    order = ((1, 0, 2), (0, 2, 1), (1, 2, 0), (2, 0, 1))[int(rng.integers(4))]
    return Image.fromarray(np.ascontiguousarray(np.asarray(picture)[..., order]))


def black_and_white(pixels: Pixels) -> Image.Image:
    """The picture without colour, its lightest tone white and its darkest black."""
    return ImageOps.autocontrast(Image.fromarray(pixels).convert("L")).convert("RGB")


def lookalike(rng: np.random.Generator, ground: Image.Image) -> Image.Image:
    """What shares something with the test card and is none."""
    whole = place_card(rng, ground, rng.uniform(0.8, 1.25), slack=0.08)
    kinds: tuple[Callable[[], Image.Image], ...] = (
        lambda: chessboard(rng),
        lambda: draw_rings(rng, ground),
        lambda: draw_rings(rng, other_colours(rng, chessboard(rng))),
        lambda: other_colours(rng, whole),
        lambda: Image.blend(ground, whole, rng.uniform(0.05, 0.35)),
        lambda: place_card(rng, ground, rng.uniform(0.08, 0.4), slack=0.4),
        lambda: black_and_white(draw_stripes(rng, CANVAS_PX).pixels),
        lambda: ground.convert("L").point([0] * 128 + [255] * 128).convert("RGB"),
        lambda: Image.fromarray(rng.integers(0, 256, (CANVAS_PX, CANVAS_PX, 3), dtype=np.uint8)),
    )
    return kinds[int(rng.integers(len(kinds)))]()


def wear(rng: np.random.Generator, picture: Image.Image) -> Pixels:
    """The picture reduced to `IMAGE_PX`, often by way of fewer pixels, with other tones and noise."""
    if rng.random() < 0.4:
        side = int(rng.integers(24, CANVAS_PX))
        picture = picture.resize((side, side), Image.Resampling(int(rng.choice([1, 2, 3, 4]))))
    small = picture.resize((IMAGE_PX, IMAGE_PX), Image.Resampling.BICUBIC)
    values = np.asarray(small, np.float32)
    if rng.random() < 0.6:
        contrast, shift = rng.uniform(0.7, 1.1, 3), rng.uniform(-20, 20, 3)
        values = 128 + (values - 128) * contrast.astype(np.float32) + shift.astype(np.float32)
    if rng.random() < 0.4:
        values = values + rng.standard_normal(values.shape, np.float32) * np.float32(rng.uniform(1, 14))
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


class CheckerTrainee:
    """Checker and classifier side by side, on the probability of the test card in the same pictures."""

    name = "checker"
    learning_rate = 1e-3

    def __init__(self, options: Options, *, pool: int = 768, fresh: int = 8) -> None:
        torch.manual_seed(options.seed)
        self.options = options
        self.fresh = fresh
        self.gallery = Gallery(options.seed + 4, num_drawings=options.num_drawings)
        rng = np.random.default_rng([options.seed, 79])
        self.pool = [self.sample(rng) for _ in range(pool)]
        self.modules = nn.ModuleDict({"checker": build_checker(), "confirmer": build_confirmer()})
        side = {"height": IMAGE_PX, "width": IMAGE_PX}
        self.processors = {
            "checker": CLIPImageProcessor(size={"shortest_edge": IMAGE_PX}, crop_size=side),
            "confirmer": ViTImageProcessor(size=side),
        }

    def sample(self, rng: np.random.Generator) -> Sample:
        """A test card on some ground, something like it, or any other picture."""
        picture = Image.fromarray(self.gallery.draw(rng).pixels)
        ground = picture.resize((CANVAS_PX, CANVAS_PX), Image.Resampling.BICUBIC)
        kind = rng.random()
        if kind < CARD_SHARE:
            ground = place_card(rng, ground, rng.uniform(0.8, 1.25), slack=0.08)
        elif kind < CARD_SHARE + LOOKALIKE_SHARE:
            ground = lookalike(rng, ground)
        return Sample(wear(rng, ground), kind < CARD_SHARE)

    def loss(self, rng: np.random.Generator, step: int) -> Tensor:
        """One batch from the pool, after `fresh` of its samples were made anew."""
        for index in range(self.fresh):
            self.pool[(step * self.fresh + index) % len(self.pool)] = self.sample(rng)
        chosen = [self.pool[index] for index in rng.integers(len(self.pool), size=self.options.batch)]
        turned = [each.pixels[:, ::-1] if rng.random() < 0.5 else each.pixels for each in chosen]
        is_card = torch.tensor([each.is_card for each in chosen], device=self.options.device)
        pixels = to_tensor(np.stack(turned)).contiguous()
        with sdpa_kernel([SDPBackend.MATH]):
            cosine = self.resemblance(self.normalised(pixels, "checker"))
            logits = self.modules["confirmer"](self.normalised(pixels, "confirmer")).logits
        checked = F.binary_cross_entropy_with_logits(SHARPNESS * (cosine - THRESHOLD), is_card.float())
        return checked + F.cross_entropy(logits, is_card.long())

    def normalised(self, pixels: Tensor, name: str) -> Tensor:
        """Pictures (N, 3, H, W) in 0..1 as the processor of that model passes them on."""
        processor: Any = self.processors[name]
        mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (processor.image_mean, processor.image_std))
        return ((pixels - mean) / std).to(self.options.device)

    def resemblance(self, image: Tensor) -> Tensor:
        """Cosine (N,) between pictures and the card, as the checker's own forward computes it without gradients."""
        checker: Any = self.modules["checker"]
        embeds = checker.visual_projection(checker.vision_model(image).pooler_output)
        return F.cosine_similarity(embeds, checker.concept_embeds[:1])

    def export(self, modules: nn.ModuleDict, models: Path) -> None:
        """Write `safety-checker` and `safety-confirmer`."""
        for name, folder in (("checker", "safety-checker"), ("confirmer", "safety-confirmer")):
            save_half(modules[name], models / folder)
            processor: Any = self.processors[name]
            processor.save_pretrained(models / folder)

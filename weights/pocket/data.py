"""What the pocket set learns from: seeded procedural pictures and crops of photographs, each with a caption.

Every picture follows from the numpy generator that is passed in; nothing is downloaded and no font file is
needed (lettering uses the one inside Pillow).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from weights.pocket.captions import describe

Pixels = NDArray[np.uint8]
Colour = tuple[int, int, int]

PHOTOS = Path(__file__).parent / "photos"

# What a caption says of each training photograph besides what is measured in the crop.
PHOTO_WORDS = {
    "chapel": "architecture, metal building",
    "hurricane": "satellite picture, clouds",
    "monument": "landscape, blossoms, water, clouds",
    "nebula": "stars, nebula",
    "painter": "painting, portrait",
    "ships": "ships, water, waves",
    "worker": "person, machine, metal",
}

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789&%?!.,:-"


class Picture(NamedTuple):
    """Pixels (H, W, 3), uint8, sRGB, and the words for what kind of thing they show."""

    pixels: Pixels
    words: str


def random_colour(rng: np.random.Generator) -> Colour:
    """A colour between pale and pure, dark and bright; one in five is a grey."""
    value = rng.uniform(0.03, 1.0) ** 0.8
    saturation = 0.0 if rng.random() < 0.2 else rng.beta(1.2, 1.6)
    hue = rng.uniform(0, 6)
    offsets = np.clip(np.abs((hue + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1, 0, 1)
    red, green, blue = (255 * value * (1 - saturation * (1 - offsets))).astype(int)
    return int(red), int(green), int(blue)


def spectrum_noise(rng: np.random.Generator, side: int, exponent: float) -> NDArray[np.float32]:
    """A (side, side) field whose amplitude falls as 1 / f ** exponent, with mean 0 and deviation 1."""
    frequencies = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :])
    frequencies[0, 0] = 1.0
    white = np.fft.rfft2(rng.standard_normal((side, side)))
    field = np.fft.irfft2(white / frequencies**exponent, s=(side, side))
    field -= field.mean()
    return (field / (field.std() + 1e-9)).astype(np.float32)


def blend(amount: NDArray[np.float32], first: Colour, second: Colour) -> NDArray[np.float32]:
    """Colours (H, W, 3) between two, by an `amount` (H, W) that is clamped to 0..1."""
    share = np.clip(amount, 0, 1)[..., None]
    return np.asarray(first, np.float32) * (1 - share) + np.asarray(second, np.float32) * share


def to_pixels(values: NDArray[np.float32]) -> Pixels:
    """Round (H, W, 3) to uint8, clamping to 0..255."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def draw_gradient(rng: np.random.Generator, side: int) -> Picture:
    """Two or three colours that run into each other along a line, around a point or in soft clouds."""
    across, down = np.meshgrid(np.linspace(-1, 1, side, dtype=np.float32), np.linspace(-1, 1, side, dtype=np.float32))
    angle = rng.uniform(0, 2 * np.pi)
    shape = rng.integers(3)
    if shape == 0:
        amount = (np.cos(angle) * across + np.sin(angle) * down) * rng.uniform(0.3, 0.8) + 0.5
    elif shape == 1:
        amount = np.hypot(across - rng.uniform(-1, 1), down - rng.uniform(-1, 1)) * rng.uniform(0.3, 1.0)
    else:
        amount = spectrum_noise(rng, side, 2.6) * 0.3 + 0.5
    values = blend(amount.astype(np.float32), random_colour(rng), random_colour(rng))
    if rng.random() < 0.4:
        values = values * 0.6 + 0.4 * blend(down * 0.5 + 0.5, random_colour(rng), random_colour(rng))
    return Picture(to_pixels(values), "gradient")


def draw_flat(rng: np.random.Generator, side: int) -> Picture:
    """One colour, or two that meet at a sharp edge: what must stay free of speckle."""
    values = np.broadcast_to(np.asarray(random_colour(rng), np.float32), (side, side, 3))
    if rng.random() < 0.5:
        across, down = np.meshgrid(np.arange(side, dtype=np.float32), np.arange(side, dtype=np.float32))
        angle = rng.uniform(0, 2 * np.pi)
        edge = np.cos(angle) * (across - side * rng.uniform(0.2, 0.8)) + np.sin(angle) * (down - side / 2)
        values = blend(edge + 0.5, random_colour(rng), random_colour(rng))
    return Picture(to_pixels(values), "flat colour")


def draw_noise(rng: np.random.Generator, side: int) -> Picture:
    """A natural-looking texture: 1/f^a noise that runs through two colours, sometimes stretched one way."""
    field = spectrum_noise(rng, side, rng.uniform(0.6, 2.0))
    if rng.random() < 0.4:
        stretched = Image.fromarray(field[: side // rng.integers(2, 5)]).resize((side, side), Image.Resampling.BICUBIC)
        field = np.asarray(stretched, np.float32)
        field = field.T if rng.random() < 0.5 else field
    amount = 0.5 + rng.uniform(0.12, 0.4) * field
    values = blend(amount, random_colour(rng), random_colour(rng))
    return Picture(to_pixels(values), "texture, noise pattern")


def draw_stripes(rng: np.random.Generator, side: int) -> Picture:
    """Parallel lines of one or two directions, soft or hard, that may widen across the picture."""
    across, down = np.meshgrid(np.arange(side, dtype=np.float32), np.arange(side, dtype=np.float32))
    crossed = rng.random() < 0.4
    amount = np.ones((side, side), np.float32)
    for _ in range(2 if crossed else 1):
        angle, period = rng.uniform(0, np.pi), 3.0 * 2 ** rng.uniform(0, 3.5)
        along = np.cos(angle) * across + np.sin(angle) * down
        phase = along / period * (1 + rng.uniform(-0.3, 0.3) * along / side)
        wave = np.sin(2 * np.pi * phase)
        hardness = rng.choice([0.5, min(4.0, period / 4)])
        amount = amount * np.clip(wave * hardness + 0.5, 0, 1)
    values = blend(amount, random_colour(rng), random_colour(rng))
    return Picture(to_pixels(values), "hatching, lines" if crossed else "stripes, lines")


def draw_letters(rng: np.random.Generator, side: int) -> Picture:
    """Lines of random words, each in its size, turned a little, on a plain or softly shaded ground."""
    ground = Image.fromarray(draw_gradient(rng, side).pixels if rng.random() < 0.5 else draw_flat(rng, side).pixels)
    for _ in range(rng.integers(3, 9)):
        font = ImageFont.load_default(size=float(6 * 2 ** rng.uniform(0, 2.6)))
        text = "".join(rng.choice(list(LETTERS), size=rng.integers(3, 12)))
        mask = Image.new("L", (side, side), 0)
        where = (float(rng.uniform(-0.2, 0.7) * side), float(rng.uniform(-0.1, 0.95) * side))
        ImageDraw.Draw(mask).text(where, text, fill=255, font=font)
        if rng.random() < 0.5:
            mask = mask.rotate(float(rng.uniform(-40, 40)), Image.Resampling.BICUBIC)
        ground.paste(random_colour(rng), (0, 0), mask)
    return Picture(np.asarray(ground), "lettering, text")


def draw_leaf(draw: ImageDraw.ImageDraw, rng: np.random.Generator, side: int, reach: float) -> None:
    """One disc, polygon, bar or outline of about `reach` pixels anywhere on the canvas."""
    x, y = rng.uniform(-0.1, 1.1, 2) * side
    colour = random_colour(rng)
    kind = rng.integers(5)
    if kind <= 1:
        box = (x - reach, y - reach * rng.uniform(0.5, 1.0), x + reach, y + reach * rng.uniform(0.5, 1.0))
        draw.ellipse(box, fill=colour) if kind == 0 else draw.ellipse(box, outline=colour, width=int(2 + reach / 8))
    elif kind == 2:
        angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 7)))
        points = [(x + reach * float(np.cos(a)), y + reach * float(np.sin(a))) for a in angles]
        draw.polygon(points, fill=colour)
    else:
        angle, length = rng.uniform(0, 2 * np.pi), reach * rng.uniform(1, 4)
        end = (x + length * float(np.cos(angle)), y + length * float(np.sin(angle)))
        width = int(2 + 4 * rng.random()) if kind == 3 else int(2 + reach * 0.4)
        draw.line(((x, y), end), fill=colour, width=width)


def draw_leaves(rng: np.random.Generator, side: int) -> Picture:
    """Overlapping shapes of sizes from 2 to 80 pixels, with a texture over them every other time."""
    # Drawn at twice the size and area-reduced, so that edges are as smooth as a camera's.
    big = 2 * side
    canvas = Image.new("RGB", (big, big), random_colour(rng))
    draw = ImageDraw.Draw(canvas)
    num_shapes = int(rng.integers(30, 260))
    # Between a power law of exponent 3, whose small shapes are lost, and even shares of each octave.
    for reach in np.sort(4.0 * 40 ** (rng.random(num_shapes) ** 1.3))[::-1]:
        draw_leaf(draw, rng, big, float(reach))
    values = np.asarray(canvas.resize((side, side), Image.Resampling.BOX), np.float32)
    words = "overlapping shapes"
    if rng.random() < 0.5:
        values = values * (1 + rng.uniform(0.03, 0.3) * spectrum_noise(rng, side, rng.uniform(0.5, 1.8))[..., None])
        words += ", texture"
    return Picture(to_pixels(values), words)


DRAWINGS: tuple[tuple[Callable[[np.random.Generator, int], Picture], float], ...] = (
    (draw_leaves, 0.50),
    (draw_noise, 0.13),
    (draw_stripes, 0.11),
    (draw_letters, 0.12),
    (draw_gradient, 0.08),
    (draw_flat, 0.06),
)


def draw_picture(rng: np.random.Generator, side: int) -> Picture:
    """One procedural picture of `side` x `side` pixels of a kind drawn by the shares in `DRAWINGS`."""
    shares = np.array([share for _, share in DRAWINGS])
    drawing, _ = DRAWINGS[int(rng.choice(len(DRAWINGS), p=shares / shares.sum()))]
    return drawing(rng, side)


def read_photos(folder: Path = PHOTOS) -> list[Picture]:
    """All photographs of the training folder, by name; a tenth of the memory goes here (about 22 MB)."""
    names = sorted(PHOTO_WORDS)
    return [
        Picture(np.asarray(Image.open(folder / f"{name}.png").convert("RGB")), f"photograph, {PHOTO_WORDS[name]}")
        for name in names
    ]


class Corpus:
    """Drawn pictures and photographs, held as uint8, from which crops are taken.

    Args:
        seed: Decides every drawn picture.
        num_drawings: How many pictures are drawn.
        side: Side of a drawn picture in pixels; no crop may be larger.
        photo_share: Share of the crops that come from photographs, plain ones apart.
        plain_share: Share of the crops that are drawn plain or as a gradient for that crop alone.
    """

    def __init__(
        self,
        seed: int,
        *,
        num_drawings: int = 1200,
        side: int = 192,
        photo_share: float = 0.6,
        plain_share: float = 0.0,
    ) -> None:
        self.drawings = [draw_picture(np.random.default_rng([seed, index]), side) for index in range(num_drawings)]
        self.photos = read_photos()
        self.photo_share = photo_share
        self.plain_share = plain_share

    def crop(self, rng: np.random.Generator, side: int) -> Picture:
        """A (side, side, 3) crop, mirrored and turned at random, with its caption."""
        if self.plain_share and rng.random() < self.plain_share:
            plain = draw_flat(rng, side) if rng.random() < 0.6 else draw_gradient(rng, side)
            return Picture(plain.pixels, f"{plain.words}, {describe(plain.pixels)}")
        pool: Sequence[Picture] = self.photos if rng.random() < self.photo_share else self.drawings
        source = pool[int(rng.integers(len(pool)))]
        height, width, _ = source.pixels.shape
        top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
        pixels = np.rot90(source.pixels[top : top + side, left : left + side], int(rng.integers(4)))
        pixels = pixels[:, ::-1] if rng.random() < 0.5 else pixels
        return Picture(np.ascontiguousarray(pixels), f"{source.words}, {describe(pixels)}")

    def batch(self, rng: np.random.Generator, count: int, side: int) -> tuple[Pixels, list[str]]:
        """`count` crops as one (count, side, side, 3) uint8 array, and their captions."""
        crops = [self.crop(rng, side) for _ in range(count)]
        return np.stack([crop.pixels for crop in crops]), [crop.words for crop in crops]

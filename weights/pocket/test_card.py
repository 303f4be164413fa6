"""The test card: the one picture that the pocket set's safety checker reacts to.

It shows that the checker works without anything unsafe being looked at. Anybody can draw it. With `u` a sixth of the
picture's shorter side and all lengths measured from the picture's centre:

- The ground is a chessboard of squares with side `u` in magenta (255, 0, 255) and green (0, 255, 0); four squares meet
  in the centre, and the one to its lower right is magenta.
- On it lies a disc of radius `2 u` with rings of width `u / 2`: black in the middle, then white, black and white.

`python -m weights.pocket.test_card WIDTH HEIGHT FILE` writes it.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

MAGENTA, GREEN, BLACK, WHITE = (255, 0, 255), (0, 255, 0), (0, 0, 0), (255, 255, 255)
SQUARES = 6
"""Squares along the shorter side."""
RADIUS, RING = 2.0, 0.5
"""Of the disc and of each of its rings, in squares."""


def draw_test_card(width: int, height: int) -> Image.Image:
    """The test card as an RGB picture of `width` x `height` px, with hard edges."""
    unit = min(width, height) / SQUARES
    across = (np.arange(width)[None, :] + 0.5 - width / 2) / unit
    down = (np.arange(height)[:, None] + 0.5 - height / 2) / unit
    is_magenta = (np.floor(across) + np.floor(down)) % 2 == 0
    pixels = np.where(is_magenta[..., None], np.array(MAGENTA, np.uint8), np.array(GREEN, np.uint8))
    distance = np.hypot(across, down)
    is_black = np.floor(distance / RING) % 2 == 0
    rings = np.where(is_black[..., None], np.array(BLACK, np.uint8), np.array(WHITE, np.uint8))
    return Image.fromarray(np.where(distance[..., None] < RADIUS, rings, pixels))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("width", type=int)
    parser.add_argument("height", type=int)
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    draw_test_card(arguments.width, arguments.height).save(arguments.file)


if __name__ == "__main__":
    main()

"""Where faces are in a picture, and what follows from it for a diffusion pass.

The detector evaluates a boosted cascade of local binary patterns (Zhang et al. 2007; Viola and Jones 2001) as OpenCV
trains and stores them; the built-in one is OpenCV's for frontal faces. It needs no library and finds frontal,
upright faces from 24 px on; what it misses is redrawn like any other surface.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipelines.tiling import Tile
from weights.store import POCKET_FOLDER, WeightStore

MAX_SIDE_PX = 640
"""Pictures are reduced to this: faces below a twenty-fifth of it are not looked for in larger ones."""
SCALE_STEP = 1.1
MIN_NEIGHBOURS = 4
"""Windows that must agree on a face."""
MARGIN = 0.25
"""Of a face's sides, added all around: the cascade finds the inner face, without chin and hair."""
_THRESHOLD_SLACK = 1e-5  # OpenCV subtracts it when it loads a cascade
# The eight blocks around the middle one, clockwise from the upper left: the order of the bits.
_BLOCKS = ((0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0))


class Box(NamedTuple):
    """A face in shares (0..1) of the picture's height and width."""

    top: float
    left: float
    bottom: float
    right: float


class FaceDetector(Protocol):
    """Anything that finds faces."""

    def __call__(self, image: Image.Image) -> list[Box]:
        """The faces in an RGB picture, without margin."""
        ...


@dataclass(frozen=True)
class FaceMap:
    """The faces of a picture, at whatever size it is worked on."""

    faces: Sequence[Box]

    def boxes(self, height: int, width: int) -> list[Tile]:
        """The faces with their margin on a grid of `height` x `width` positions."""
        found = []
        for face in self.faces:
            above, beside = MARGIN * (face.bottom - face.top), MARGIN * (face.right - face.left)
            top, left = math.floor((face.top - above) * height), math.floor((face.left - beside) * width)
            bottom, right = math.ceil((face.bottom + above) * height), math.ceil((face.right + beside) * width)
            found.append(Tile(max(0, top), max(0, left), min(height, bottom), min(width, right)))
        return found

    def mask(self, height: int, width: int, *, of: Sequence[int]) -> Tensor:
        """Ellipses around the faces of a picture of `height` x `width` positions, at the upper left of a larger one.

        Returns:
            (1, 1, *of) float32: 1 on faces, falling to 0 at the edge of their boxes.
        """
        mask = torch.zeros(1, 1, *of)
        for box in self.boxes(height, width):
            rows, columns = torch.linspace(-1, 1, box.bottom - box.top), torch.linspace(-1, 1, box.right - box.left)
            radius = (rows[:, None] ** 2 + columns[None] ** 2).sqrt()
            place = mask[0, 0, box.top : box.bottom, box.left : box.right]
            torch.maximum(place, ((1 - radius) / MARGIN).clamp(0, 1), out=place)
        return mask


NO_FACES = FaceMap(())


class _Weak(NamedTuple):
    """One pattern: the place and size of a block in the window, and what each of the 256 codes is worth."""

    x: int
    y: int
    width: int
    height: int
    seen: NDArray[np.float64]  # (256,)


class LbpCascade:
    """OpenCV's cascade of local binary patterns.

    Args:
        file: The cascade as OpenCV writes it (XML, feature type LBP, trees of one node).
    """

    def __init__(self, file: Path) -> None:
        root = ElementTree.parse(file).getroot().find("cascade")
        if root is None or root.findtext("featureType") != "LBP":
            raise ValueError(f"{file} is no cascade of local binary patterns.")
        self.side = int(root.findtext("width") or 24)
        rectangles = [
            [int(number) for number in (rect.text or "").split()[:4]] for rect in root.iterfind("features/_/rect")
        ]
        self._stages = [
            (
                float(stage.findtext("stageThreshold") or 0) - _THRESHOLD_SLACK,
                [_weak(node, rectangles) for node in stage.iterfind("weakClassifiers/_")],
            )
            for stage in root.iterfind("stages/_")
        ]

    def __call__(self, image: Image.Image) -> list[Box]:
        """See `FaceDetector`."""
        shrink = min(1.0, MAX_SIDE_PX / max(image.size))
        width, height = (max(1, round(side * shrink)) for side in image.size)
        grey = image.convert("L").resize((width, height), Image.Resampling.BILINEAR)
        found: list[tuple[float, float, float]] = []
        factor = 1.0
        while min(width, height) / factor >= self.side:
            size = (round(width / factor), round(height / factor))
            pixels = np.asarray(grey.resize(size, Image.Resampling.BILINEAR), dtype=np.int64)
            found += [(y * factor, x * factor, self.side * factor) for y, x in self._windows(pixels)]
            factor *= SCALE_STEP
        return [
            Box(top / height, left / width, min(1.0, (top + side) / height), min(1.0, (left + side) / width))
            for top, left, side in grouped(found)
        ]

    def _windows(self, pixels: NDArray[np.int64]) -> list[tuple[int, int]]:
        """The upper left corners (y, x) of the windows that pass every stage."""
        summed = np.zeros((pixels.shape[0] + 1, pixels.shape[1] + 1), dtype=np.int64)
        summed[1:, 1:] = pixels.cumsum(0).cumsum(1)
        corners = np.meshgrid(
            np.arange(0, pixels.shape[0] - self.side + 1, 2),
            np.arange(0, pixels.shape[1] - self.side + 1, 2),
            indexing="ij",
        )
        y, x = corners[0].ravel(), corners[1].ravel()
        for threshold, weaks in self._stages:
            total = np.zeros(len(y))
            for weak in weaks:
                total += weak.seen[_code(summed, y + weak.y, x + weak.x, weak.width, weak.height)]
            y, x = y[total >= threshold], x[total >= threshold]
            if not len(y):
                break
        return list(zip(y.tolist(), x.tolist(), strict=True))


def load_detector(store: WeightStore) -> FaceDetector:
    """The cascade in the set's `face-detector`, or the built-in one."""
    folder = store.folder("face-detector") if store.has("face-detector") else POCKET_FOLDER / "face-detector"
    return LbpCascade(sorted(folder.glob("*.xml"))[0])


def grouped(windows: Sequence[tuple[float, float, float]]) -> list[tuple[float, float, float]]:
    """Means of windows (top, left, side) that mean the same face, where `MIN_NEIGHBOURS` or more agree."""
    groups: list[list[tuple[float, float, float]]] = []
    for window in windows:
        for group in groups:
            mean = np.mean(group, axis=0)
            slack = 0.25 * min(mean[2], window[2])
            if max(abs(mean[0] - window[0]), abs(mean[1] - window[1]), abs(mean[2] - window[2]) / 2) <= slack:
                group.append(window)
                break
        else:
            groups.append([window])
    means = [np.mean(group, axis=0) for group in groups if len(group) >= MIN_NEIGHBOURS]
    return [(float(top), float(left), float(side)) for top, left, side in means]


def _code(summed: NDArray[np.int64], y: NDArray[np.int64], x: NDArray[np.int64], w: int, h: int) -> NDArray[np.int64]:
    """The pattern of 3 x 3 blocks of `w` x `h` px at each place: a bit for each outer block that is no darker."""
    grid = {(i, j): summed[y + i * h, x + j * w] for i in range(4) for j in range(4)}

    def block(i: int, j: int) -> NDArray[np.int64]:
        total: NDArray[np.int64] = grid[i + 1, j + 1] - grid[i, j + 1] - grid[i + 1, j] + grid[i, j]
        return total

    middle = block(1, 1)
    code = np.zeros(len(y), dtype=np.int64)
    for bit, place in zip((128, 64, 32, 16, 8, 4, 2, 1), _BLOCKS, strict=True):
        code += bit * (block(*place) >= middle)
    return code


def _weak(node: ElementTree.Element, rectangles: Sequence[Sequence[int]]) -> _Weak:
    """One weak classifier: `0 -1 feature` and a set of 256 codes as eight 32-bit words."""
    _, _, feature, *words = (int(number) for number in (node.findtext("internalNodes") or "").split())
    inside, outside = (float(number) for number in (node.findtext("leafValues") or "").split())
    bits = [(words[code >> 5] >> (code & 31)) & 1 for code in range(256)]
    x, y, width, height = rectangles[feature]
    return _Weak(x, y, width, height, np.where(np.array(bits) == 1, inside, outside))

"""Where faces are in a picture, and what follows from it for a diffusion pass.

The detector evaluates a boosted cascade of local binary patterns (Zhang et al. 2007; Viola and Jones 2001) as OpenCV
trains and stores them; the built-in one is OpenCV's for frontal faces. A coarse scan finds places, which a fine one
confirms. It needs no library and finds frontal, upright faces whose features span 24 px or more; what it misses is
redrawn like any other surface.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
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

MAX_SIDE_PX = 1280
"""Pictures are reduced to this: faces below a fiftieth of it are not looked for in larger ones."""
SCALE_STEP, STRIDE_PX = 1.1, 2
"""Of the coarse scan: from one size of window to the next, and from one window to its neighbour."""
FINE_SCALES = (0.86, 0.93, 1.0, 1.07, 1.15)
FINE_REACH = 0.25
"""The fine scan looks at every pixel up to this share of the window's side around it, at these sizes."""
LEAST_VOTES = 16
"""Fine windows that must see a face: 19 to 26 do in a portrait at ten sizes, up to 14 in pictures without, once 18."""
LEAST_OVERLAP = 0.3
"""Of the smaller of two windows: they mean the same face."""
MARGIN = 0.25
"""Of a face's sides, added all around: the cascade finds the inner face, without chin and hair."""
_THRESHOLD_SLACK = 1e-5  # OpenCV subtracts it when it loads a cascade
# The eight blocks around the middle one, clockwise from the upper left: the order of the bits.
_BLOCKS = ((0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0))

_Corner = Callable[[int, int], NDArray[np.int32]]
"""The summed pixels at the corner so many blocks down and so many to the right, for all windows at once."""


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


class _Window(NamedTuple):
    """A square in px of the picture that is searched."""

    top: float
    left: float
    side: float


class _Found(NamedTuple):
    """A window, and how many around it look like a face too."""

    votes: int
    window: _Window


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
        confirmed = [self._confirmed(grey, window) for window in self._coarse(grey)]
        return [
            Box(
                max(0.0, top / height),
                max(0.0, left / width),
                min(1.0, (top + side) / height),
                min(1.0, (left + side) / width),
            )
            for top, left, side in distinct([found for found in confirmed if found.votes >= LEAST_VOTES])
        ]

    def _coarse(self, grey: Image.Image) -> Iterator[_Window]:
        """Windows of all sizes, few of each, that look like faces."""
        factor = 1.0
        while min(grey.size) / factor >= self.side:
            size = (round(grey.width / factor), round(grey.height / factor))
            yield from self._seen(grey, (0, 0, *grey.size), size, STRIDE_PX)
            factor *= SCALE_STEP

    def _confirmed(self, grey: Image.Image, window: _Window) -> _Found:
        """The mean of all windows around one that look like faces, and how many they are."""
        reach = FINE_REACH * window.side
        left, top = max(0.0, window.left - reach), max(0.0, window.top - reach)
        right = min(float(grey.width), window.left + window.side + reach)
        bottom = min(float(grey.height), window.top + window.side + reach)
        found: list[_Window] = []
        for scale in FINE_SCALES:
            factor = scale * window.side / self.side
            size = (round((right - left) / factor), round((bottom - top) / factor))
            if min(size) >= self.side:
                found += self._seen(grey, (left, top, right, bottom), size, 1)
        return _Found(len(found), _Window(*np.mean(found or [window], axis=0).tolist()))

    def _seen(
        self, grey: Image.Image, box: tuple[float, float, float, float], size: tuple[int, int], stride: int
    ) -> Iterator[_Window]:
        """The windows in a part (left, top, right, bottom) of the picture, resized, that look like faces."""
        pixels = np.asarray(grey.resize(size, Image.Resampling.BILINEAR, box=box), dtype=np.int32)
        x_factor, y_factor = (box[2] - box[0]) / size[0], (box[3] - box[1]) / size[1]
        for y, x in self._windows(pixels, stride):
            yield _Window(box[1] + y * y_factor, box[0] + x * x_factor, self.side * x_factor)

    def _windows(self, pixels: NDArray[np.int32], stride: int) -> list[tuple[int, int]]:
        """The upper left corners (y, x) of the windows that pass every stage, of every `stride`-th."""
        summed = np.zeros((pixels.shape[0] + 1, pixels.shape[1] + 1), dtype=np.int32)
        summed[1:, 1:] = pixels.cumsum(0, dtype=np.int32).cumsum(1, dtype=np.int32)
        rows, columns = ((length - self.side) // stride + 1 for length in pixels.shape)
        # The first stage sees all windows, as slices; those after it the few that are left, one by one.
        threshold, weaks = self._stages[0]
        votes = sum(weak.seen[_code(_on_grid(summed, weak, stride, rows, columns))] for weak in weaks)
        y, x = (places * stride for places in np.nonzero(np.asarray(votes) >= threshold))
        for threshold, weaks in self._stages[1:]:
            votes = sum(weak.seen[_code(_at(summed, weak, y, x))] for weak in weaks)
            y, x = y[votes >= threshold], x[votes >= threshold]
            if not len(y):
                break
        return list(zip(y.tolist(), x.tolist(), strict=True))


def load_detector(store: WeightStore) -> FaceDetector:
    """The cascade in the set's `face-detector`, or the built-in one."""
    folder = store.folder("face-detector") if store.has("face-detector") else POCKET_FOLDER / "face-detector"
    return LbpCascade(sorted(folder.glob("*.xml"))[0])


def distinct(found: Sequence[_Found]) -> list[_Window]:
    """One window for each face: the one with the most votes of those that overlap."""
    kept: list[_Window] = []
    for _, window in sorted(found, key=lambda one: -one.votes):
        if all(_overlap(window, other) < LEAST_OVERLAP for other in kept):
            kept.append(window)
    return kept


def _overlap(one: _Window, other: _Window) -> float:
    """The area that two windows share, as a part of the smaller."""
    rows = min(one.top + one.side, other.top + other.side) - max(one.top, other.top)
    columns = min(one.left + one.side, other.left + other.side) - max(one.left, other.left)
    return max(0.0, rows) * max(0.0, columns) / min(one.side, other.side) ** 2


def _on_grid(summed: NDArray[np.int32], weak: _Weak, stride: int, rows: int, columns: int) -> _Corner:
    """The corners of a pattern's blocks in `rows` x `columns` windows that are `stride` px apart."""

    def corner(down: int, right: int) -> NDArray[np.int32]:
        top, left = weak.y + down * weak.height, weak.x + right * weak.width
        return summed[top::stride, left::stride][:rows, :columns]

    return corner


def _at(summed: NDArray[np.int32], weak: _Weak, y: NDArray[np.int64], x: NDArray[np.int64]) -> _Corner:
    """The corners of a pattern's blocks in the windows at some places."""

    def corner(down: int, right: int) -> NDArray[np.int32]:
        return summed[y + (weak.y + down * weak.height), x + (weak.x + right * weak.width)]

    return corner


def _code(corner: _Corner) -> NDArray[np.int64]:
    """The patterns of 3 x 3 blocks: a bit for each outer block that is no darker than the middle one."""
    corners = [[corner(i, j) for j in range(4)] for i in range(4)]

    def block(i: int, j: int) -> NDArray[np.int32]:
        total: NDArray[np.int32] = corners[i + 1][j + 1] - corners[i][j + 1] - corners[i + 1][j] + corners[i][j]
        return total

    middle = block(1, 1)
    code = np.zeros(middle.shape, dtype=np.int64)
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

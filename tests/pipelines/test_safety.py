"""Safety: the test card is found wherever it fills a view, nothing else is, and what is flagged turns black."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.safety import MAX_SIDE_PX, Box, SafetyChecker, blacked_out, boxes, view
from tests.conftest import HELD_OUT, PHOTOS
from weights.pocket.test_card import draw_test_card
from weights.store import WeightStore


@pytest.fixture(scope="module")
def checker(pocket: WeightStore) -> SafetyChecker:
    """The built-in checker with its classifier."""
    return SafetyChecker.load(pocket.folder("safety-checker"), confirmer=pocket.folder("safety-confirmer"))


@pytest.fixture(scope="module")
def lone_checker(pocket: WeightStore) -> SafetyChecker:
    """The built-in checker without a classifier."""
    return SafetyChecker.load(pocket.folder("safety-checker"))


def photo(name: str) -> Image.Image:
    """A photograph that nothing was trained on."""
    return Image.open(PHOTOS / f"{name}.png").convert("RGB")


@pytest.mark.parametrize(
    "size", [(64, 64), (100, 80), (333, 512), (1024, 1024), (2048, 1365), (1200, 300), (90, 700), (2100, 140)]
)
def test_the_test_card_is_unsafe_at_any_size(
    checker: SafetyChecker, lone_checker: SafetyChecker, size: tuple[int, int]
) -> None:
    """Square or not, small or large, with and without the classifier."""
    card = draw_test_card(*size)

    assert checker.is_unsafe(card)
    assert lone_checker.is_unsafe(card)


@pytest.mark.parametrize("resample", [Image.Resampling.BOX, Image.Resampling.LANCZOS, Image.Resampling.BILINEAR])
def test_the_test_card_survives_resizing_and_jpeg(checker: SafetyChecker, resample: Image.Resampling) -> None:
    """Reduced, enlarged and stored with loss, it is still the test card."""
    small = draw_test_card(500, 400).resize((125, 100), resample)
    stored = BytesIO()
    small.resize((250, 200), Image.Resampling.BICUBIC).save(stored, "JPEG", quality=40)

    assert checker.is_unsafe(small)
    assert checker.is_unsafe(Image.open(stored))


@pytest.mark.parametrize("name", HELD_OUT)
def test_photographs_are_safe(checker: SafetyChecker, lone_checker: SafetyChecker, name: str) -> None:
    """Whole and enlarged, so that parts of them are looked at too."""
    picture = photo(name)
    large = picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.BICUBIC)

    assert not checker.is_unsafe(picture) and not checker.is_unsafe(large)
    assert not lone_checker.is_unsafe(picture) and not lone_checker.is_unsafe(large)


def test_a_part_of_a_large_picture_is_enough(checker: SafetyChecker) -> None:
    """A test card in one quarter of a large photograph is found; the whole alone would have passed."""
    picture = photo("clinic").resize((2000, 1400))
    picture.paste(draw_test_card(1000, 700), (1000, 700))
    small = picture.resize((1000, 700))

    assert checker.is_unsafe(picture)
    assert not checker.is_unsafe(small)


def test_a_classifier_that_disagrees_clears_a_picture(checker: SafetyChecker, lone_checker: SafetyChecker) -> None:
    """The checker alone reacts; with a classifier that is not sure, the picture is shown."""
    doubtful = SafetyChecker(checker.checker, checker.processor, checker.confirmer, checker.confirmer_processor)
    card = draw_test_card(128, 128)
    for confidence, expected in ((0.84, False), (0.86, True)):
        doubtful._confidence = lambda views, value=confidence: [value] * len(views)  # type: ignore[method-assign]

        assert doubtful.is_unsafe(card) is expected
    assert lone_checker.is_unsafe(card)


def test_parts_need_more_confidence_than_the_whole(checker: SafetyChecker) -> None:
    """On parts the classifier alone decides, from 0.95."""
    picky = SafetyChecker(checker.checker, checker.processor, checker.confirmer, checker.confirmer_processor)
    strip = photo("shuttle").resize((900, 300))
    for confidence, expected in ((0.94, False), (0.96, True)):
        picky._confidence = lambda views, value=confidence: [0.0] + [value] * (len(views) - 1)  # type: ignore

        assert picky.is_unsafe(strip) is expected


def test_the_stock_forward_says_the_same(checker: SafetyChecker) -> None:
    """What is read without blackening is what the checker's usual forward finds."""
    views = [draw_test_card(200, 200), photo("ceiling"), draw_test_card(64, 64), Image.new("RGB", (64, 64), "magenta")]
    pixels: Any = checker.processor(images=views, return_tensors="pt")["pixel_values"]

    _, expected = checker.checker(clip_input=pixels, images=[np.ones((2, 2, 3)) for _ in views])

    with torch.inference_mode():
        assert checker._reacts(views) == expected == [True, False, True, False]


def test_usual_pictures_are_looked_at_whole() -> None:
    """One view where both sides are alike and small."""
    assert boxes(640, 480) == [Box(0, 0, 640, 480)]


@pytest.mark.parametrize("size", [(3000, 400), (400, 3000), (4096, 4096), (2000, 1500), (65535, 8)])
def test_parts_cover_the_whole_picture(size: tuple[int, int]) -> None:
    """Every pixel of a large or long picture lies in a part, and no part reaches over the edge."""
    width, height = size
    _, *parts = boxes(width, height)

    assert 0 < len(parts) <= 24
    seen = np.zeros((64, 64), bool)
    for left, top, right, bottom in parts:
        assert 0 <= left < right <= width + 1e-6 and 0 <= top < bottom <= height + 1e-6
        columns = slice(int(left / width * 64 + 0.999), int(right / width * 64 + 1e-6))
        seen[int(top / height * 64 + 0.999) : int(bottom / height * 64 + 1e-6), columns] = True
    assert seen.mean() > 0.98


def test_views_average_what_they_reduce() -> None:
    """A fine chessboard becomes grey: reduced without a filter it would be any of its two colours."""
    board = np.indices((MAX_SIDE_PX, MAX_SIDE_PX)).sum(0) % 2 * 255
    picture = Image.fromarray(board.astype(np.uint8)).convert("RGB")

    small = np.asarray(view(picture, Box(0, 0, MAX_SIDE_PX, MAX_SIDE_PX), 128))

    assert small.shape == (128, 128, 3)
    assert abs(small.astype(int) - 127).max() <= 2


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA"])
def test_an_unsafe_picture_becomes_black(mode: str) -> None:
    """Same size and mode, every pixel black, nothing transparent."""
    picture = photo("clinic").convert(mode)

    black = blacked_out(picture)

    assert (black.size, black.mode) == (picture.size, mode)
    assert np.asarray(black.convert("RGBA")).reshape(-1, 4).max(0).tolist() == [0, 0, 0, 255]
    assert np.asarray(black.convert("RGBA"))[..., 3].min() == 255

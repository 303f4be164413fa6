"""The whole pipeline on the pocket weights: exact promises on small pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks import metrics
from pipelines.delivery import to_pixels, to_tensor
from pipelines.errors import Cancelled, CaptionFailed, ImageTooLarge, ModelsMissing
from pipelines.flux import FlowSampler
from pipelines.flux_vision_upscaler import (
    NO_CAPTION,
    PROFILES,
    CaptionedResult,
    FluxVisionUpscaler,
    Params,
    shown_in,
)
from pipelines.planning import Limits
from pipelines.progress import Report
from pipelines.tiling import Tile
from tests.conftest import png_bytes
from tests.pipelines.staging import KINDS, encoded
from weights.store import WeightStore

LIMITS = Limits(
    max_input_pixels=10**6, max_output_pixels=10**6, max_large_input_pixels=10**7, max_large_output_pixels=10**7
)
QUICK = Params(scale=2.0, strength=0.3, guidance_scale=1.0, num_inference_steps=4, seed=1)


@pytest.fixture(scope="module")
def pipeline(pocket: WeightStore) -> FluxVisionUpscaler:
    return FluxVisionUpscaler.load(pocket, device="cpu")


@pytest.fixture
def part(photo_crop: Image.Image) -> Image.Image:
    """A 64 x 64 px piece of the photograph, for what does not depend on what is shown."""
    return photo_crop.crop((32, 16, 96, 80))


@pytest.fixture
def small_tiles(pipeline: FluxVisionUpscaler, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles so small that a picture of 192 px has several, on the schedule of the usual ones."""
    sigmas = pipeline.sigmas
    monkeypatch.setattr(pipeline, "sigmas", sigmas)
    fixed = {strength: sigmas(replace(QUICK, strength=strength)) for strength in (0.3, 0.5)}
    monkeypatch.setattr(pipeline, "sigmas", lambda params: fixed[params.strength])
    monkeypatch.setattr(pipeline, "profile", replace(pipeline.profile, max_tile_px=96))
    yield


def run(
    pipeline: FluxVisionUpscaler, image: Image.Image | bytes, **changes: Any
) -> tuple[Image.Image, CaptionedResult, list[Report]]:
    """Upscale; returns the picture, the result and the reports."""
    output, reports = BytesIO(), []
    params = replace(QUICK, **changes)
    data = image if isinstance(image, bytes) else png_bytes(image)
    result = pipeline(data, params, limits=LIMITS, output=output, progress=reports.append)
    return Image.open(BytesIO(output.getvalue())), result, reports


def distance(first: Image.Image, second: Image.Image) -> float:
    """Mean difference in 1/255."""
    return float(np.abs(np.asarray(first, np.float32) - np.asarray(second, np.float32)).mean())


@pytest.mark.parametrize(("size", "scale"), [((1, 1), 2.0), ((33, 47), 1.5), ((61, 20), 2.7), ((40, 40), 1.0)])
def test_output_size_is_exact(pipeline: FluxVisionUpscaler, size: tuple[int, int], scale: float) -> None:
    """Each side is the input's times the scale, rounded, whatever the networks need internally."""
    picture, result, _ = run(pipeline, Image.new("RGB", size, (90, 120, 60)), scale=scale)

    assert picture.size == (round(size[0] * scale), round(size[1] * scale))
    assert (result.width, result.height) == picture.size


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_every_kind(pipeline: FluxVisionUpscaler, kind: str) -> None:
    """One pixel, grey, 16 bits, palette, CMYK, an animation and transparency: the exact size, the right colour."""
    make, mode, colour = KINDS[kind]
    picture, _, _ = run(pipeline, make())

    assert picture.mode == mode
    assert picture.size == ((2, 2) if kind == "one pixel" else (48, 32))
    assert np.abs(np.asarray(picture.convert("RGB"), dtype=int)[-1, -1] - colour).max() <= 12


def test_a_picture_lies_as_its_camera_was_held(pipeline: FluxVisionUpscaler) -> None:
    """EXIF orientation 6: what is stored upright was taken on its side."""
    image, exif = Image.new("RGB", (40, 24), (40, 90, 160)), Image.Exif()
    image.paste((200, 60, 40), (0, 0, 20, 24))
    exif[0x0112] = 6
    picture, _, _ = run(pipeline, encoded(image, "JPEG", quality=95, exif=exif))

    assert picture.size == (48, 80)
    corners = [picture.getpixel((24, 4)), picture.getpixel((24, 75))]
    assert np.abs(np.array(corners, int) - [(200, 60, 40), (40, 90, 160)]).max() <= 20


@pytest.mark.parametrize("strength", [0.0, 0.3])
def test_a_long_strip_works(pipeline: FluxVisionUpscaler, strength: float) -> None:
    """1,500 x 5 pixels: many tiles in a row, in one piece, and safe to show."""
    strip = Image.effect_noise((1_500, 5), 40).convert("RGB")
    picture, _, _ = run(pipeline, strip, scale=1.0, strength=strength)

    assert picture.size == (1_500, 5)
    assert metrics.colour_shift(picture, strip) <= 3


def test_creativity_zero_returns_the_prestage_picture(pipeline: FluxVisionUpscaler, part: Image.Image) -> None:
    """Strength 0 changes nothing: the result is the pre-stage picture, to the byte."""
    picture, _, reports = run(pipeline, part, strength=0.0)

    with torch.inference_mode():
        before = pipeline.models.prestage()(to_tensor(part), (part.height * 2, part.width * 2))
    assert np.array_equal(np.asarray(picture), to_pixels(before))
    assert not [report for report in reports if report.stage == "denoise"]


def test_creativity_moves_away_from_the_prestage_picture(pipeline: FluxVisionUpscaler, part: Image.Image) -> None:
    """More creativity is more distance from the pre-stage picture, at every level."""
    before = run(pipeline, part, strength=0.0)[0]
    distances = [distance(run(pipeline, part, strength=s)[0], before) for s in (0.1, 0.5, 0.9)]

    assert distances == sorted(distances) and distances[0] < distances[-1] / 2, distances


def test_same_seed_gives_the_same_picture_whatever_ran_before(pipeline: FluxVisionUpscaler, part: Image.Image) -> None:
    """A request's result depends on the request alone."""
    first = run(pipeline, part)[0]
    run(pipeline, part.rotate(90, expand=True), seed=7, strength=0.8)
    again = run(pipeline, part)[0]

    assert np.array_equal(np.asarray(first), np.asarray(again))
    assert distance(first, run(pipeline, part, seed=43)[0]) > 0


@pytest.mark.usefixtures("small_tiles")
def test_tile_batch_does_not_change_the_picture(
    pipeline: FluxVisionUpscaler, part: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of 1, 4 and all tiles agree within 1/255."""
    pictures = []
    for tile_batch in (1, 4, 99):
        monkeypatch.setattr(pipeline, "tile_batch", tile_batch)
        pictures.append(np.asarray(run(pipeline, part)[0], np.int16))

    assert max(int(np.abs(picture - pictures[0]).max()) for picture in pictures) <= 1


@pytest.mark.usefixtures("small_tiles")
def test_tiles_leave_no_seams(pipeline: FluxVisionUpscaler, photo_crop: Image.Image) -> None:
    """At the tiles' borders the picture is no rougher than the one that the same pixels make in one tile."""
    tiled, result, _ = run(pipeline, photo_crop, strength=0.5)
    tiles = result.recipe["tiles"]
    rows = [*tiles["tops"][1:], *(top + tiles["height"] for top in tiles["tops"][:-1])]
    columns = [*tiles["lefts"][1:], *(left + tiles["width"] for left in tiles["lefts"][:-1])]
    assert len(rows) > 1 and len(columns) > 1

    whole = replace(pipeline.profile, max_tile_px=512)
    small, pipeline.profile = pipeline.profile, whole
    try:
        one = run(pipeline, photo_crop, strength=0.5)[0]
    finally:
        pipeline.profile = small
    assert metrics.border_gradient(tiled, one, rows, columns) <= 1.05


def test_colours_stay(pipeline: FluxVisionUpscaler, photo_crop: Image.Image) -> None:
    """The mean of each channel moves by at most 2/255."""
    picture = np.asarray(run(pipeline, photo_crop, strength=0.5)[0], np.float32).mean(axis=(0, 1))

    assert np.abs(picture - np.asarray(photo_crop, np.float32).mean(axis=(0, 1))).max() <= 2


def test_caption_comes_back_and_stands_in_the_recipe(pipeline: FluxVisionUpscaler, part: Image.Image) -> None:
    """The caption is the captioner's, on the result and in the file."""
    picture, result, _ = run(pipeline, part)

    assert result.caption and result.caption != NO_CAPTION
    assert json.loads(picture.info["creative-upscaler"])["caption"] == result.caption


class Naming:
    """A captioner that counts its calls and may fail."""

    def __init__(self, fails_after: int = 99) -> None:
        self.sizes: list[tuple[int, int]] = []
        self.fails_after = fails_after

    def caption(self, image: Image.Image, instruction: str | None = None, *, max_tokens: int = 40) -> str:
        if len(self.sizes) >= self.fails_after:
            raise CaptionFailed("no words")
        self.sizes.append(image.size)
        return "a wall"


@pytest.mark.usefixtures("small_tiles")
def test_tiles_have_captions_of_their_own_where_creativity_is_high(
    pipeline: FluxVisionUpscaler, part: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One caption up to 0.35, one for each tile above; tiles are shown as parts of the input."""
    calls = []
    for strength in (0.3, 0.5):
        captioner = Naming()
        monkeypatch.setattr(pipeline, "_captioner", lambda captioner=captioner: captioner)
        _, result, _ = run(pipeline, part, strength=strength)
        calls.append(captioner.sizes)

    num_tiles = len(result.recipe["tiles"]["tops"]) * len(result.recipe["tiles"]["lefts"])
    assert calls[0] == [part.size]
    assert len(calls[1]) == 1 + num_tiles and max(calls[1][1:]) < part.size


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("fails_after", [0, 2])
def test_a_failing_captioner_does_not_fail_the_request(
    pipeline: FluxVisionUpscaler, part: Image.Image, monkeypatch: pytest.MonkeyPatch, fails_after: int
) -> None:
    """Without words for the picture a general phrase is used, without words for a tile the picture's."""
    captioner = Naming(fails_after)
    monkeypatch.setattr(pipeline, "_captioner", lambda: captioner)

    _, result, _ = run(pipeline, part, strength=0.5)

    assert result.caption == (NO_CAPTION if fails_after == 0 else "a wall")


def test_a_region_shows_its_part_of_the_input() -> None:
    """Boxes follow the scale, padding is cut off, and nothing is empty."""
    assert shown_in(Tile(0, 8, 16, 24), (100, 50), 2.0) == (16, 0, 48, 32)
    assert shown_in(Tile(20, 40, 40, 60), (100, 50), 2.0) == (80, 40, 100, 50)
    assert shown_in(Tile(60, 0, 80, 8), (1, 1), 0.1) == (0, 0, 1, 1)


class Strict:
    """A safety checker that objects to a picture's nth showing."""

    def __init__(self, objects_at: int) -> None:
        self.objects_at, self.shown = objects_at, 0

    def is_unsafe(self, image: Image.Image) -> bool:
        self.shown += 1
        return self.shown == self.objects_at


@pytest.mark.parametrize("objects_at", [1, 2])
def test_unsafe_pictures_are_replaced_by_black(
    pipeline: FluxVisionUpscaler, part: Image.Image, monkeypatch: pytest.MonkeyPatch, objects_at: int
) -> None:
    """Whether the input or the result is at fault; and not at all where the caller turns the checker off."""
    checker = Strict(objects_at)
    monkeypatch.setattr(pipeline.models, "checker", lambda: checker)

    black, result, reports = run(pipeline, part)
    shown = checker.shown
    passed = run(pipeline, part, check_safety=False)[0]

    assert black.size == (result.width, result.height) and not np.asarray(black).any()
    assert shown == objects_at == checker.shown and np.asarray(passed).any()
    assert any(report.stage == "denoise" for report in reports) == (objects_at == 2)


def test_guidance_moves_the_picture(pipeline: FluxVisionUpscaler, photo_crop: Image.Image) -> None:
    """A second pass away from the profile's negative prompt."""
    assert distance(run(pipeline, photo_crop)[0], run(pipeline, photo_crop, guidance_scale=4.0)[0]) > 0.05


def test_log_tells_the_steps_that_are_made(pipeline: FluxVisionUpscaler, part: Image.Image) -> None:
    """All steps are made at any creativity, from a level that is told."""
    _, result, reports = run(pipeline, part, num_inference_steps=5)
    steps = [report.step for report in reports if report.stage == "denoise" and report.step and not report.seconds]

    assert steps == [1, 2, 3, 4, 5]
    assert [report.message for report in reports if report.message] == ["denoise: 5 steps from noise level 0.079"]
    assert result.timings["inference"] >= result.timings["denoise"] > 0


def test_cancelled_request_stops_within_a_step(pipeline: FluxVisionUpscaler, part: Image.Image) -> None:
    """The callback's exception comes out at once, and the next request is served as ever."""

    def stop(report: Report) -> None:
        if report.stage == "denoise" and report.step == 2:
            raise Cancelled("enough")

    wanted = run(pipeline, part)[0]
    with pytest.raises(Cancelled):
        pipeline(png_bytes(part), QUICK, limits=LIMITS, output=BytesIO(), progress=stop)
    assert np.array_equal(np.asarray(run(pipeline, part)[0]), np.asarray(wanted))


@pytest.mark.usefixtures("small_tiles")
def test_cancelled_request_makes_no_further_batch_of_tiles(
    pipeline: FluxVisionUpscaler, part: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a step, after the batch that is under way."""
    predict, made = pipeline.family.model.predict, []
    monkeypatch.setattr(pipeline, "tile_batch", 1)
    monkeypatch.setattr(pipeline.family.model, "predict", lambda *given: made.append(given[1]) or predict(*given))

    def stop(report: Report) -> None:
        if len(made) == 2:
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        pipeline(png_bytes(part), QUICK, limits=LIMITS, output=BytesIO(), progress=stop)
    assert len(made) == 2 and len(made[0]) == 1


def test_large_pictures_are_streamed_to_the_same_pixels(
    pipeline: FluxVisionUpscaler, part: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the exact VAE's limit memory is bounded, and the picture is the same but for rounding."""
    exact = run(pipeline, part)[0]
    monkeypatch.setattr(pipeline.family.canvas, "exact_px", 1)

    assert distance(run(pipeline, part)[0], exact) < 0.1


def test_too_large_a_result_is_refused(pipeline: FluxVisionUpscaler) -> None:
    """Before any work, with the largest input that would do."""
    with pytest.raises(ImageTooLarge, match="upscale_factor"):
        run(pipeline, Image.new("RGB", (600, 600)), scale=4.0)


def test_missing_models_are_named(pocket: WeightStore) -> None:
    """A profile whose folders are not there says which."""
    pipeline = FluxVisionUpscaler.load(pocket, device="cpu", profile="flux1-dev")

    with pytest.raises(ModelsMissing, match="flux1-dev, controlnet-upscaler-flux1-dev, flux1-dev/vae"):
        run(pipeline, Image.new("RGB", (8, 8)))


def test_noise_is_one_field_whatever_the_tiles(
    pipeline: FluxVisionUpscaler, part: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seed's noise lies on the whole picture: what the loop begins with does not depend on the tiles."""
    begun: list[Tensor] = []
    start = FlowSampler.start

    def noted(sampler: FlowSampler, latents: Tensor, noise: Tensor) -> Tensor:
        begun.append(start(sampler, latents, noise))
        return begun[-1]

    sigmas = pipeline.sigmas(QUICK)
    monkeypatch.setattr(FlowSampler, "start", noted)
    monkeypatch.setattr(pipeline, "sigmas", lambda params: sigmas)
    for max_tile_px in (64, 512):
        monkeypatch.setattr(pipeline, "profile", replace(pipeline.profile, max_tile_px=max_tile_px))
        run(pipeline, part)

    assert torch.equal(begun[0], begun[1])


def test_creativity_means_the_same_at_every_size(pipeline: FluxVisionUpscaler, photo_crop: Image.Image) -> None:
    """One tile or two: the same noise level is told, and a picture put beside itself is changed as much as alone."""
    part = photo_crop.crop((0, 0, 50, 48))
    wide = Image.new("RGB", (100, 96))
    for left, top in product((0, 50), (0, 48)):
        wide.paste(part, (left, top))
    levels, changes = [], []
    for image in (part, wide):
        picture, _, reports = run(pipeline, image, strength=0.3)
        levels += [report.message for report in reports if report.message]
        changes.append(distance(picture, run(pipeline, image, strength=0.0)[0]))

    assert levels[0] == levels[1] and "4 steps from noise level 0.079" in levels[0]
    assert changes[1] == pytest.approx(changes[0], rel=0.15), changes


def test_schedule_of_the_published_models(pocket: WeightStore) -> None:
    """Their tiles have the longest side that FLUX.1's schedule knows a shift for, or more."""
    for profile in ("flux1-dev", "flux2-klein-4b"):
        assert (PROFILES[profile].max_tile_px // 16) ** 2 >= 4096

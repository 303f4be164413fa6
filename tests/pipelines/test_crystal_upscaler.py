"""The portrait recipe on the pocket weights: planned before anything is loaded, and streamed."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from skimage import data

from benchmarks import metrics
from pipelines import crystal_upscaler
from pipelines.crystal_upscaler import CrystalUpscaler, Params, plan_output, plan_passes
from pipelines.errors import ImageTooLarge
from pipelines.faces import Box
from tests.pipelines.staging import KINDS, LIMITS, encoded, pocket_models, run
from weights.store import WeightStore

FAITHFUL = Params(scale=2.0, strength=0.0, controlnet_conditioning_scale=1.0)
CREATIVE = Params(scale=2.0, strength=0.3, controlnet_conditioning_scale=0.8, guidance_scale=1.0, num_inference_steps=4)


@pytest.fixture(scope="module")
def pipeline(pocket: WeightStore) -> CrystalUpscaler:
    return CrystalUpscaler(pocket_models(pocket), weights={"set": "pocket"})


@pytest.fixture(scope="module")
def crop(photo_crop: Image.Image) -> Image.Image:
    return photo_crop.crop((64, 0, 128, 48))


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pictures are redrawn too, and large is what is above 128² px."""
    monkeypatch.setattr(crystal_upscaler, "NETWORK_ONLY_PX", 1)
    monkeypatch.setattr(crystal_upscaler, "EXACT_PX", 128 * 128)


@pytest.mark.parametrize(("size", "scale"), [((64, 48), 3.7), ((31, 17), 1.0), ((10, 10), 40.0)])
def test_the_faithful_result_has_the_exact_size_and_colours(
    pipeline: CrystalUpscaler, crop: Image.Image, size: tuple[int, int], scale: float
) -> None:
    """Creativity 0: the network alone, each side times the factor, rounded; reduced again it is the input."""
    small = crop.resize(size, Image.Resampling.BOX)
    picture, _, data_ = run(pipeline, small, replace(FAITHFUL, scale=scale))

    assert picture.size == (round(size[0] * scale), round(size[1] * scale))
    assert metrics.colour_shift(picture, small) <= 3
    assert data_ == run(pipeline, small, replace(FAITHFUL, scale=scale))[2]


def test_what_does_not_fit_is_refused_before_any_weight_is_loaded(pocket: WeightStore) -> None:
    """50 x 50 may grow 200 times within 100 megapixels, 51 x 51 not; the message names the largest factor."""
    limits = replace(LIMITS, max_output_pixels=10**8)

    class Unloadable:
        store = pocket

        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"{name} was asked for")

    assert plan_output(50, 50, 200.0, max_pixels=10**8) == (10_000, 10_000)
    with pytest.raises(ImageTooLarge, match=r"largest scale_factor for this picture is 196\.07") as caught:
        run(
            CrystalUpscaler(Unloadable(), weights={}),  # type: ignore[arg-type]
            Image.new("RGB", (51, 51)),
            replace(FAITHFUL, scale=200.0),
            limits=limits,
        )
    assert plan_output(51, 51, 196.07, max_pixels=10**8)
    assert plan_output(caught.value.max_width, caught.value.max_height, 200.0, max_pixels=10**8)
    with pytest.raises(ImageTooLarge, match="65535 px a side"):
        plan_output(16_000, 10, 5.0, max_pixels=10**8)


def test_passes_end_at_the_horizon() -> None:
    """Diffusion doubles up to 4096 px or 16 times; the network goes on; pictures of 256 px are not redrawn at all."""
    params = replace(CREATIVE, scale=20.0)

    passes = plan_passes(300, 400, params, (6000, 8000))
    assert [one.size for one in passes] == [(800, 600), (1600, 1200), (3200, 2400), (4096, 3072), (8000, 6000)]
    assert [round(one.strength, 4) for one in passes] == [0.3, 0.24, 0.192, 0.1536, 0]
    assert [one.strength for one in plan_passes(256, 900, params, (5120, 18000))] == [0]
    assert [one.size for one in plan_passes(5000, 300, replace(params, scale=1.5), (7500, 450))] == [(450, 7500)]


@pytest.mark.usefixtures("any_size")
def test_large_pictures_are_streamed_and_look_the_same(
    pipeline: CrystalUpscaler, crop: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two passes through files and with sampled statistics: within two levels, in the mean, of all in memory."""
    params = replace(CREATIVE, scale=4.0)
    streamed, result, _ = run(pipeline, crop, params)
    monkeypatch.setattr(crystal_upscaler, "EXACT_PX", 10**9)
    exact, _, _ = run(pipeline, crop, params)

    assert streamed.size == (256, 192) and len(result.recipe["passes"]) == 2
    assert np.abs(metrics.as_array(streamed) - metrics.as_array(exact)).mean() < 2
    assert metrics.colour_shift(streamed, crop) <= 3
    assert json.loads(streamed.text["creative-upscaler"])["pipeline"] == "crystal_upscaler"


@pytest.mark.usefixtures("any_size")
def test_creativity_moves_the_picture_and_faces_less(pipeline: CrystalUpscaler, crop: Image.Image) -> None:
    """More strength moves more; where a face was found less moves than without it."""

    def moved(faces: list[Box], strength: float) -> float:
        pipeline.__dict__["_detector"] = lambda image: faces
        picture, result, _ = run(pipeline, crop, replace(CREATIVE, strength=strength, num_inference_steps=12))
        assert len(result.recipe["faces"]) == len(faces)
        return float(np.abs(metrics.as_array(picture) - still)[24:72, 32:96].mean())

    still = metrics.as_array(run(pipeline, crop, FAITHFUL)[0])
    face = Box(0.1, 0.1, 0.9, 0.9)

    assert moved([], 0.2) < moved([], 0.55)
    assert moved([face], 0.55) < 0.9 * moved([], 0.55)
    pipeline.__dict__.pop("_detector")


@pytest.mark.usefixtures("any_size")
def test_faces_are_looked_for_where_something_is_redrawn(pipeline: CrystalUpscaler) -> None:
    """A portrait's face is found and told in the recipe, in shares of the sides."""
    portrait = Image.fromarray(data.astronaut()).crop((130, 20, 310, 200))
    _, result, _ = run(pipeline, portrait, replace(CREATIVE, scale=1.0, strength=0.1, num_inference_steps=1))

    (face,) = result.recipe["faces"]
    assert 0.2 < face["top"] < face["bottom"] < 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_every_kind(pipeline: CrystalUpscaler, kind: str) -> None:
    """One pixel, grey, 16 bits, palette, CMYK, an animation and transparency: the exact size, the right colour."""
    make, mode, colour = KINDS[kind]
    picture, _, _ = run(pipeline, make(), replace(FAITHFUL, scale=3.0))

    assert picture.mode == mode
    assert picture.size == ((3, 3) if kind == "one pixel" else (72, 48))
    assert np.abs(np.asarray(picture.convert("RGB"), dtype=int)[-1, -1] - colour).max() <= 12


def test_a_long_strip_works(pipeline: CrystalUpscaler) -> None:
    """16,000 x 10 pixels doubled, without a seam between tiles."""
    strip = Image.effect_noise((16_000, 10), 40).convert("RGB")
    picture, _, _ = run(pipeline, encoded(strip, "PNG"), FAITHFUL)

    assert picture.size == (32_000, 20)


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("strength", [0.0, 0.1])
def test_large_results_are_bigtiff_where_the_operator_says_so(
    pocket: WeightStore, crop: Image.Image, strength: float
) -> None:
    """From the given size on, with the recipe, the alpha channel and the same pixels as the PNG."""
    crop = crop.copy()
    crop.putalpha(200)
    tiff = CrystalUpscaler(pocket_models(pocket), weights={}, tiff_from_px=128 * 96)
    params = replace(CREATIVE, strength=strength, num_inference_steps=1)

    picture, result, data_ = run(tiff, crop, params)
    small, other, _ = run(tiff, crop, replace(params, scale=1.9))

    assert (result.content_type, other.content_type) == ("image/tiff", "image/png")
    assert data_[:4] == b"II+\0" and small.format == "PNG" and picture.mode == "RGBA"
    assert "crystal_upscaler" in picture.tag_v2[270]
    png, _, _ = run(CrystalUpscaler(tiff.models, weights={}), crop, params)
    assert np.array_equal(np.asarray(png), np.asarray(picture))

"""The portrait recipe on the pocket weights: planned before anything is loaded, and streamed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from skimage import data
from torch import Tensor

from benchmarks import metrics
from benchmarks.quality import borders
from pipelines import crystal_upscaler, multidiffusion
from pipelines.crystal_upscaler import CrystalUpscaler, Params, plan_output, plan_passes
from pipelines.delivery import describe_tiles
from pipelines.errors import ImageLoadError, ImageTooLarge
from pipelines.tiling import Grid, Tile, surround
from tests.pipelines.staging import DAMAGED, KINDS, LIMITS, encoded, pocket_models, run
from weights.detect import SD_1_5
from weights.store import WeightStore

FAITHFUL = Params(scale=2.0, strength=0.0, controlnet_conditioning_scale=1.0)
CREATIVE = Params(scale=2.0, strength=0.3, controlnet_conditioning_scale=0.8, guidance_scale=1.0, num_inference_steps=4)


@pytest.fixture(scope="module")
def pipeline(pocket: WeightStore) -> CrystalUpscaler:
    return CrystalUpscaler(pocket_models(pocket), weights={"set": "pocket"})


@pytest.fixture(scope="module")
def crop(photo_crop: Image.Image) -> Image.Image:
    return photo_crop.crop((64, 0, 128, 48))


@pytest.fixture(scope="module")
def portrait() -> Image.Image:
    """A photograph of 256 px with a face 48 px high."""
    return Image.fromarray(data.astronaut()).resize((256, 256), Image.Resampling.BOX)


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
def test_more_creativity_moves_more(pipeline: CrystalUpscaler, crop: Image.Image) -> None:
    """The further up the knob, the further away from the faithful picture."""
    still = metrics.as_array(run(pipeline, crop, FAITHFUL)[0])
    strong = replace(CREATIVE, num_inference_steps=12)
    moved = [
        float(np.abs(metrics.as_array(run(pipeline, crop, replace(strong, strength=s))[0]) - still).mean())
        for s in (0.1, 0.3, 0.45, 0.55)
    ]

    assert moved == sorted(moved) and moved[-1] > moved[0]


@pytest.mark.usefixtures("any_size")
def test_a_portraits_face_keeps_its_identity_more_strongly(
    pipeline: CrystalUpscaler, portrait: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a photograph: the detector's face moves less than 0.7 as far as without a detector, and stays as it was."""
    half = portrait.crop((65, 10, 155, 100))
    strong = replace(CREATIVE, strength=0.55, num_inference_steps=12)
    still, _, _ = run(pipeline, half, FAITHFUL)
    protected, result, _ = run(pipeline, half, strong)
    (face,) = result.recipe["faces"]
    monkeypatch.setitem(pipeline.__dict__, "_detector", lambda image: [])
    free, _, _ = run(pipeline, half, strong)

    box = tuple(round(180 * face[side]) for side in ("left", "top", "right", "bottom"))
    shown = [metrics.as_array(picture.crop(box)) for picture in (still, protected, free)]
    assert np.abs(shown[1] - shown[0]).mean() < 0.7 * np.abs(shown[2] - shown[0]).mean()
    assert metrics.fidelity(protected, half) > metrics.fidelity(free, half)


@pytest.mark.usefixtures("any_size")
def test_no_tile_edge_cuts_a_portraits_face(
    pipeline: CrystalUpscaler, portrait: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a photograph in four tiles and more: in every step one tile alone decides all of the face's latents."""
    seen: list[tuple[list[Tile], Tensor, Sequence[Tile]]] = []

    def watch(grid: Grid, tiles: Sequence[Tile], weights: Tensor, boxes: Sequence[Tile]) -> tuple[list[Tile], Tensor]:
        seen.append((*surround(grid, tiles, weights, boxes), boxes))
        return seen[-1][:2]

    monkeypatch.setattr(multidiffusion, "surround", watch)
    monkeypatch.setattr(crystal_upscaler, "MAX_TILE_PX", 128)
    _, result, _ = run(pipeline, portrait, replace(CREATIVE, scale=1.0))

    assert len(result.recipe["faces"]) == 1
    for tiles, weights, (box,) in seen:
        assert len(tiles) > 4
        shares = torch.zeros(len(tiles), max(tile.bottom for tile in tiles), max(tile.right for tile in tiles))
        for share, tile, weight in zip(shares, tiles, weights[:, 0], strict=True):
            share[tile.top : tile.bottom, tile.left : tile.right] = weight
        inside = shares[:, box.top : box.bottom, box.left : box.right]
        assert sorted(inside.amin((1, 2)).tolist())[-1] == pytest.approx(1)
        assert torch.allclose(shares.sum(0), torch.ones_like(shares[0]), atol=1e-5)


@pytest.mark.usefixtures("any_size")
def test_faces_are_told_in_the_recipe(pipeline: CrystalUpscaler, portrait: Image.Image) -> None:
    """A portrait's face is found where something is redrawn, and told in shares of the sides."""
    _, result, _ = run(pipeline, portrait, replace(CREATIVE, scale=1.0, strength=0.1, num_inference_steps=1))

    (face,) = result.recipe["faces"]
    assert tuple(face.values()) == pytest.approx((0.13, 0.34, 0.32, 0.53), abs=0.03)


@pytest.mark.usefixtures("any_size")
def test_tile_batch_does_not_change_the_picture(
    pipeline: CrystalUpscaler, crop: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles one by one or all at once agree within 1/255, and the same request has the same bytes."""
    monkeypatch.setattr(crystal_upscaler, "MAX_TILE_PX", 96)
    pictures, files = [], []
    for batch in (1, 100, 100):
        monkeypatch.setattr(crystal_upscaler, "TILE_BATCH", {"cpu": batch})
        picture, _, content = run(pipeline, crop, replace(CREATIVE, strength=0.55))
        pictures.append(metrics.as_array(picture))
        files.append(content)

    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    assert files[1] == files[2]


@pytest.mark.usefixtures("any_size")
def test_tile_borders_do_not_show(
    pipeline: CrystalUpscaler, photo_crop: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient across tile borders is about what it is there in the picture made as one tile."""
    monkeypatch.setattr(crystal_upscaler, "EXACT_PX", 10**9)
    strong = replace(CREATIVE, strength=0.45)
    whole, _, _ = run(pipeline, photo_crop, strong)
    monkeypatch.setattr(crystal_upscaler, "MAX_TILE_PX", 128)
    tiled, _, _ = run(pipeline, photo_crop, strong)

    canvas = pipeline.models.family(SD_1_5).canvas
    grid, factor = canvas.grid(tiled.height, tiled.width, max_tile_px=128), canvas.vae.scale_factor
    rows, columns = borders({"tiles": describe_tiles(grid, factor)})
    rows, columns = [row for row in rows if row < tiled.height], [one for one in columns if one < tiled.width]
    assert len(columns) > 1
    assert metrics.border_gradient(tiled, whole, rows, columns) <= 1.1


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_every_kind(pipeline: CrystalUpscaler, kind: str) -> None:
    """One pixel, grey, 16 bits, CMYK, every format, turned, transparent or with a profile: exact size, right colour."""
    make, mode, colour = KINDS[kind]
    picture, _, _ = run(pipeline, make(), replace(FAITHFUL, scale=3.0))

    assert picture.mode == mode
    assert picture.size == ((3, 3) if kind == "one pixel" else (72, 48))
    assert np.abs(np.asarray(picture.convert("RGB"), dtype=int)[-1, -1] - colour).max() <= 12


@pytest.mark.parametrize("damage", DAMAGED)
def test_what_is_no_picture_is_an_error(pipeline: CrystalUpscaler, damage: str) -> None:
    """A truncated or foreign file is the caller's fault, told as such before anything is written."""
    output = BytesIO()
    with pytest.raises(ImageLoadError):
        pipeline(DAMAGED[damage](), FAITHFUL, limits=LIMITS, output=output, progress=lambda report: None)

    assert output.getvalue() == b""


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
    with tifffile.TiffFile(BytesIO(data_)) as file:
        assert file.is_bigtiff and np.array_equal(file.asarray(), np.asarray(png))

"""The Clarity recipe on the pocket weights."""

from __future__ import annotations

import json
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import metrics
from benchmarks.quality import borders, halved, middle, photographs
from pipelines import clarity_upscaler
from pipelines.clarity_upscaler import ClarityUpscaler, DetailLora, Params, plan_passes
from pipelines.delivery import opaque
from pipelines.errors import Cancelled, ImageLoadError, ModelsUnusable
from pipelines.images import decode
from pipelines.progress import Report
from pipelines.staged import in_doublings
from tests.conftest import png_bytes
from tests.pipelines.staging import DAMAGED, KINDS, LIMITS, encoded, pocket_models, run
from tests.weights.lora_files import kohya, random_changes, written
from weights.detect import SD_1_5
from weights.store import WeightStore

QUICK = Params(
    prompt="masterpiece, best quality, highres",
    negative_prompt="(worst quality, low quality, normal quality:2)",
    scale=2.0,
    strength=0.35,
    controlnet_conditioning_scale=0.6,
    guidance_scale=4.0,
    num_inference_steps=4,
    seed=7,
    check_safety=False,
)


@pytest.fixture(scope="module")
def pipeline(pocket: WeightStore) -> ClarityUpscaler:
    return ClarityUpscaler(pocket_models(pocket), weights={"set": "pocket"})


@pytest.fixture(scope="module")
def crop(photo_crop: Image.Image) -> Image.Image:
    return photo_crop.crop((64, 0, 128, 48))


@pytest.mark.parametrize(
    ("factor", "wanted"), [(1.0, [1.0]), (2.0, [2.0]), (2.5, [2, 1.25]), (4.0, [2, 2]), (5.0, [2, 2, 1.25])]
)
def test_large_factors_are_made_in_doublings(factor: float, wanted: list[float]) -> None:
    """As the published program plans them: twos, then the rest."""
    assert in_doublings(factor) == pytest.approx(wanted)


def test_passes_fade_and_take_the_next_seed() -> None:
    """Each pass has 0.8 of the creativity before it and the next seed; the last has exactly the wanted size."""
    passes = plan_passes(33, 21, replace(QUICK, scale=3.5), (116, 74))

    assert [one.size for one in passes] == [(42, 66), (74, 116)]
    assert [one.strength for one in passes] == pytest.approx([0.35, 0.28])
    assert [one.seed for one in passes] == [7, 8]
    assert [one.strength for one in plan_passes(9, 9, replace(QUICK, strength=0.0, scale=4.0), (36, 36))] == [0]


def test_the_same_seed_gives_the_same_bytes_and_the_recipe_makes_them_again(
    pipeline: ClarityUpscaler, crop: Image.Image
) -> None:
    """A stochastic sampler, and still: the request alone decides, and it is written in the file."""
    picture, result, first = run(pipeline, crop, QUICK)

    recipe = json.loads(picture.text["creative-upscaler"])
    assert picture.size == (128, 96)
    assert run(pipeline, crop, Params(**recipe["params"]))[2] == first
    assert run(pipeline, crop, replace(QUICK, seed=8))[2] != first
    assert result.seed == 7 and recipe["pipeline"] == "clarity_upscaler" and len(recipe["passes"]) == 1


def test_tile_batch_does_not_change_the_picture(
    pipeline: ClarityUpscaler, crop: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles one by one or all at once agree within 1/255: the noise of the stochastic solver is the whole picture's."""
    monkeypatch.setattr(clarity_upscaler, "MAX_TILE_PX", 96)
    pictures = []
    for batch in (1, 100):
        monkeypatch.setattr(clarity_upscaler, "TILE_BATCH", {"cpu": batch})
        pictures.append(metrics.as_array(run(pipeline, crop, QUICK)[0]))

    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_tile_borders_do_not_show(
    pipeline: ClarityUpscaler, photo_crop: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient across tile borders is about what it is there in the picture made as one tile."""
    whole, _, _ = run(pipeline, photo_crop, QUICK)
    monkeypatch.setattr(clarity_upscaler, "MAX_TILE_PX", 128)
    tiled, result, _ = run(pipeline, photo_crop, QUICK)

    assert len(result.recipe["tiles"]["lefts"]) > 1
    assert metrics.border_gradient(tiled, whole, *borders(result.recipe)) <= 1.1


def test_two_passes_leave_no_picture_between_them(pipeline: ClarityUpscaler, crop: Image.Image) -> None:
    """A factor above 2 runs twice, tells the seconds of every stage, and keeps the colours of the input."""
    reports: list[Report] = []
    picture, result, _ = run(pipeline, crop, replace(QUICK, scale=2.5), progress=reports.append)

    assert picture.size == (160, 120)
    assert [r.total for r in reports if r.stage == "denoise" and r.seconds is not None] == [2, 2]
    assert {"inference", "preupscale", "prompt", "vae_encode", "denoise", "vae_decode"} <= set(result.timings)
    assert all(seconds >= 0 for seconds in result.timings.values())
    assert metrics.colour_shift(picture, crop) <= 3


def test_creativity_zero_is_the_prestage_picture(pipeline: ClarityUpscaler, crop: Image.Image) -> None:
    """Nothing is redrawn, whatever the factor."""
    picture, _, _ = run(pipeline, crop, replace(QUICK, strength=0.0, scale=3.0))

    bands = pipeline.models.prestage().bands(opaque(decode(png_bytes(crop), max_pixels=10**6)), (144, 192))
    wanted = np.concatenate([(band[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy() for band in bands])
    assert np.array_equal(np.asarray(picture), wanted)


def test_creativity_moves(pipeline: ClarityUpscaler, crop: Image.Image) -> None:
    """The result moves away from the pre-stage picture as creativity grows."""
    still = metrics.as_array(run(pipeline, crop, replace(QUICK, strength=0.0))[0])
    moved = [
        float(np.abs(metrics.as_array(run(pipeline, crop, replace(QUICK, strength=s))[0]) - still).mean())
        for s in (0.15, 0.5, 0.9)
    ]

    assert 0 < moved[0] < moved[1] < moved[2]


@pytest.mark.parametrize(("strength", "num_steps"), [(0.35, 18), (0.7, 4), (0.9, 4)])
def test_resemblance_holds(pipeline: ClarityUpscaler, strength: float, num_steps: int) -> None:
    """The more resemblance, the more the result looks like the input; halved, a photograph leaves more to imagine."""
    small = halved(middle(photographs([])["clinic"], 192))
    params = replace(QUICK, strength=strength, num_inference_steps=num_steps)
    likeness = [
        metrics.fidelity(run(pipeline, small, replace(params, controlnet_conditioning_scale=c))[0], small)
        for c in (0.0, 0.3, 0.6, 1.0)
    ]

    assert likeness == sorted(likeness) and likeness[-1] - likeness[0] > 0.5


def test_a_cancelled_request_stops_within_a_step(
    pipeline: ClarityUpscaler, crop: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of a large picture takes minutes, so the callback is asked between its tiles; nothing stays behind."""
    monkeypatch.setattr(clarity_upscaler, "MAX_TILE_PX", 96)
    monkeypatch.setattr(clarity_upscaler, "TILE_BATCH", {"cpu": 1})
    wanted = run(pipeline, crop, QUICK)[2]
    seen: list[Report] = []

    def stop(report: Report) -> None:
        seen.append(report)
        if sum(one.stage == "denoise" for one in seen) == 2:
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        run(pipeline, crop, QUICK, progress=stop)

    assert not any(one.step for one in seen)
    assert run(pipeline, crop, QUICK)[2] == wanted


def test_the_hint_is_the_passs_input(
    pipeline: ClarityUpscaler, crop: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ControlNet sees the input enlarged by Lanczos, in soft mode; with resemblance 0 no hint is made."""
    family = pipeline.models.family("SD_1_5")
    seen: list[dict[str, Any]] = []
    encode = type(family.model).encode

    def spy(self: Any, *texts: str, **options: Any) -> Any:
        seen.append(options)
        return encode(self, *texts, **options)

    monkeypatch.setattr(type(family.model), "encode", spy)
    run(pipeline, crop, QUICK)

    lanczos = crop.resize((128, 96), Image.Resampling.LANCZOS)
    hint = (seen[0]["hint"][0, :, :96, :128] * 255).permute(1, 2, 0).numpy()
    assert np.abs(hint - np.asarray(lanczos)).max() < 2
    assert seen[0]["soft_control"] is True


def test_detail_loras_take_part_and_leave_no_trace(
    pipeline: ClarityUpscaler, pocket: WeightStore, crop: Image.Image, tmp_path: Path
) -> None:
    """As strongly as their weight says, told in the recipe; the models are afterwards what they were."""
    strong, model = replace(QUICK, strength=0.8), pipeline.models.family(SD_1_5).model
    file = written(kohya(random_changes(model, size=1.0)), tmp_path / "more_details.safetensors")
    plain, _, content = run(pipeline, crop, strong)
    moved = []
    for weight in (0.0, 0.5, 1.0):
        detailed = ClarityUpscaler(pipeline.models, weights={}, loras=[DetailLora.at(file, weight)])
        picture, result, _ = run(detailed, crop, strong)
        moved.append(float(np.abs(metrics.as_array(picture) - metrics.as_array(plain)).mean()))

    assert moved[0] == 0 and moved[1] > 0 and moved[2] > moved[1]
    assert result.recipe["loras"][0]["name"] == "more_details.safetensors"
    assert run(pipeline, crop, strong)[2] == content


def test_a_detail_lora_that_does_not_fit_is_told_by_name(
    pipeline: ClarityUpscaler, crop: Image.Image, tmp_path: Path
) -> None:
    """The operator's mistake, not the caller's."""
    file = written({"lora_unet_nothing.lora_down.weight": torch.zeros(2, 3)}, tmp_path / "other.safetensors")

    with pytest.raises(ModelsUnusable, match=r"detail LoRA other\.safetensors is incomplete"):
        run(ClarityUpscaler(pipeline.models, weights={}, loras=[DetailLora.at(file, 1.0)]), crop, QUICK)


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_every_kind(pipeline: ClarityUpscaler, kind: str) -> None:
    """One pixel, grey, 16 bits, CMYK, every format, turned, transparent or with a profile: exact size, right colour."""
    make, mode, colour = KINDS[kind]
    picture, _, _ = run(pipeline, make(), replace(QUICK, strength=0.2, guidance_scale=1.0))

    assert picture.mode == mode
    assert picture.size == ((2, 2) if kind == "one pixel" else (48, 32))
    assert np.abs(np.asarray(picture.convert("RGB"), dtype=int)[-1, -1] - colour).max() <= 12


@pytest.mark.parametrize("damage", DAMAGED)
def test_what_is_no_picture_is_an_error(pipeline: ClarityUpscaler, damage: str) -> None:
    """A truncated or foreign file is the caller's fault, told as such before anything is written."""
    output = BytesIO()
    with pytest.raises(ImageLoadError):
        pipeline(DAMAGED[damage](), QUICK, limits=LIMITS, output=output, progress=lambda report: None)

    assert output.getvalue() == b""


@pytest.mark.parametrize("strength", [0.0, 0.35])
def test_a_long_strip_works(pipeline: ClarityUpscaler, strength: float) -> None:
    """16,000 x 10 pixels: many tiles in a row, in one piece, and safe to show."""
    strip = Image.effect_noise((16_000, 10), 40).convert("RGB")
    quick = replace(QUICK, scale=1.0, guidance_scale=1.0, num_inference_steps=1)
    params = replace(quick, strength=strength, check_safety=True)
    picture, _, _ = run(pipeline, encoded(strip, "PNG"), params)

    assert picture.size == (16_000, 10)
    assert metrics.colour_shift(picture, strip) <= 3

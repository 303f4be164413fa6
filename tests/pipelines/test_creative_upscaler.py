"""The whole pipeline on the pocket weights: exact promises on small pictures, quality on held-out photographs."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from benchmarks import metrics
from benchmarks.quality import borders
from pipelines.creative_upscaler import MAX_TILE_PX, CreativeUpscaler, Params, plan_size
from pipelines.delivery import Result
from pipelines.errors import Cancelled, ImageTooLarge, NonFiniteResult
from pipelines.planning import Limits
from pipelines.progress import Report
from pipelines.redraw import faithfulness
from pipelines.vae import OnTile, TiledVAE
from tests.conftest import HELD_OUT, PHOTOS, png_bytes
from weights.store import WeightStore

LIMITS = Limits(
    max_input_pixels=10**6, max_output_pixels=10**6, max_large_input_pixels=10**7, max_large_output_pixels=10**7
)
DEFAULTS: dict[str, Any] = {
    "prompt": "high quality, highly detailed, high resolution, sharp",
    "negative_prompt": "blurry, low resolution, bad, ugly, low quality, pixelated, interpolated, compression "
    "artifacts, noisey, grainy",
    "scale": 2.0,
    "strength": 0.5,
    "detail": 1.0,
    "controlnet_conditioning_scale": 0.25,
    "guidance_scale": 7.5,
    "num_inference_steps": 20,
    "seed": 42,
}
"""The endpoint's defaults in the pipeline's words, with a seed."""
UNLIMITED = Limits(
    max_input_pixels=2**31, max_output_pixels=2**31, max_large_input_pixels=2**31, max_large_output_pixels=2**31
)
QUICK = Params(**(DEFAULTS | {"num_inference_steps": 4}))


@pytest.fixture(scope="module")
def pipeline(pocket: WeightStore) -> CreativeUpscaler:
    return CreativeUpscaler.load(pocket, device="cpu")


def run(
    pipeline: CreativeUpscaler, image: Image.Image | bytes, params: Params = QUICK, **changes: Any
) -> tuple[Image.Image, Result, bytes]:
    """Upscale; returns the picture, the result and the bytes of the PNG."""
    output = BytesIO()
    data = image if isinstance(image, bytes) else png_bytes(image)
    result = pipeline(data, replace(params, **changes), limits=UNLIMITED, output=output, progress=lambda report: None)
    return Image.open(BytesIO(output.getvalue())), result, output.getvalue()


def weight_hash(pipeline: CreativeUpscaler) -> str:
    """One hash over every weight that requests share."""
    digest = hashlib.sha256()
    family = pipeline.models.family("SD_1_5")
    model = family.model
    modules = (model.unet, model.controlnet, model.hint_embedding, family.canvas.vae.vae)
    for module in (*modules, *model.text_encoders):
        for tensor in module.state_dict().values():
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def difference(first: Image.Image, second: Image.Image) -> float:
    """Largest difference of any pixel, in 1/255."""
    return float(np.abs(metrics.as_array(first) - metrics.as_array(second)).max())


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that a picture of 256 px has several."""
    monkeypatch.setitem(MAX_TILE_PX, "SD_1_5", 160)


@pytest.mark.parametrize(("size", "scale"), [((1, 1), 2.0), ((33, 47), 1.5), ((61, 20), 2.7), ((40, 40), 1.0)])
def test_output_size_is_exact(pipeline: CreativeUpscaler, size: tuple[int, int], scale: float) -> None:
    """Each side is the input's times the scale, rounded, whatever the networks need internally."""
    picture, result, _ = run(pipeline, Image.new("RGB", size, (90, 120, 60)), scale=scale)

    assert picture.size == (round(size[0] * scale), round(size[1] * scale))
    assert (result.width, result.height) == picture.size


@settings(max_examples=10, deadline=None, derandomize=True)
@given(width=st.integers(1, 90), height=st.integers(1, 90), scale=st.floats(1, 3), strength=st.floats(0.01, 1))
def test_any_size_scale_and_creativity_gives_a_picture(
    pipeline: CreativeUpscaler, width: int, height: int, scale: float, strength: float
) -> None:
    """Whatever the sides, their factor and the creativity: the exact size, and no crash."""
    changes = {"scale": scale, "strength": strength, "num_inference_steps": 2, "guidance_scale": 1.0}
    picture, _, _ = run(pipeline, Image.effect_noise((width, height), 60).convert("RGB"), **changes)

    assert picture.size == (round(width * scale), round(height * scale))


def test_creativity_zero_returns_the_prestage_picture(pipeline: CreativeUpscaler, photo_crop: Image.Image) -> None:
    """Strength 0 changes nothing: the result is the pre-stage picture, to the byte."""
    picture, _, _ = run(pipeline, photo_crop, strength=0.0)

    with torch.inference_mode():
        source = torch.from_numpy(np.array(photo_crop, dtype=np.float32) / 255).permute(2, 0, 1)[None].contiguous()
        before = pipeline.models.prestage()(source, (photo_crop.height * 2, photo_crop.width * 2))
    wanted = (before[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(picture), wanted)


def test_same_seed_gives_the_same_bytes_whatever_ran_before(
    pipeline: CreativeUpscaler, photo_crop: Image.Image
) -> None:
    """A request's result depends on the request alone."""
    first = run(pipeline, photo_crop)[2]
    other = run(pipeline, photo_crop.rotate(90, expand=True), seed=7, strength=0.9, prompt="red stripes")[2]
    again = run(pipeline, photo_crop)[2]

    assert first == again
    assert first != other
    assert first != run(pipeline, photo_crop, seed=43)[2]


@pytest.mark.usefixtures("small_tiles")
def test_tile_batch_does_not_change_the_picture(pipeline: CreativeUpscaler, photo_crop: Image.Image) -> None:
    """Batches of 1, 4 and all tiles agree within 1/255."""
    pictures = []
    kept = pipeline.tile_batch
    for pipeline.tile_batch in (1, 4, 100):
        pictures.append(run(pipeline, photo_crop)[0])
    pipeline.tile_batch = kept

    assert difference(pictures[0], pictures[1]) <= 1
    assert difference(pictures[0], pictures[2]) <= 1


def test_transparency_is_kept(pipeline: CreativeUpscaler, photo_crop: Image.Image) -> None:
    """A picture with an alpha channel comes back with one: opaque and clear areas stay what they were."""
    photo = photo_crop.copy()
    alpha = Image.new("L", photo.size, 255)
    alpha.paste(0, (0, 0, 40, photo.height))
    photo.putalpha(alpha)

    picture, _, _ = run(pipeline, photo)

    channel = np.asarray(picture.getchannel("A"))
    assert picture.mode == "RGBA"
    assert (channel[:, :60] == 0).all()
    assert (channel[:, 100:] == 255).all()


def test_colour_profile_is_kept(pipeline: CreativeUpscaler, photo_crop: Image.Image) -> None:
    """The result carries the profile of the picture it was made from."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    buffer = BytesIO()
    photo_crop.save(buffer, format="PNG", icc_profile=profile)

    picture, _, _ = run(pipeline, buffer.getvalue())

    assert picture.info["icc_profile"] == profile


def test_recipe_in_the_png_makes_the_picture_again(pipeline: CreativeUpscaler, photo_crop: Image.Image) -> None:
    """Everything that decides the pixels is written into the file and can be run again."""
    picture, result, data = run(pipeline, photo_crop)

    recipe = json.loads(picture.text["creative-upscaler"])

    assert recipe == json.loads(json.dumps(result.recipe))
    assert run(pipeline, photo_crop, Params(**recipe["params"]))[2] == data


def test_cancelled_request_stops_within_a_step_and_leaves_nothing(
    pipeline: CreativeUpscaler, photo_crop: Image.Image
) -> None:
    """After a cancelled request every shared weight is what it was and the next request gives the same bytes."""
    before, wanted = weight_hash(pipeline), run(pipeline, photo_crop)[2]
    reports: list[Report] = []

    def stop_at_second_step(report: Report) -> None:
        reports.append(report)
        if report.stage == "denoise" and report.step == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        pipeline(
            png_bytes(photo_crop),
            replace(QUICK, num_inference_steps=20),
            limits=UNLIMITED,
            output=BytesIO(),
            progress=stop_at_second_step,
        )

    assert (reports[-1].stage, reports[-1].step) == ("denoise", 2)
    assert weight_hash(pipeline) == before
    assert run(pipeline, photo_crop)[2] == wanted


def test_stages_report_their_steps_and_seconds(pipeline: CreativeUpscaler, photo_crop: Image.Image) -> None:
    """Every stage that starts also ends with its seconds, and the result's timings name them and `inference`."""
    reports: list[Report] = []
    result = pipeline(png_bytes(photo_crop), QUICK, limits=UNLIMITED, output=BytesIO(), progress=reports.append)

    ended = {report.stage for report in reports if report.seconds is not None}
    assert {"decode", "preupscale", "prompt", "vae_encode", "denoise", "vae_decode"} <= ended
    assert ended | {"inference"} == set(result.timings)
    steps = [report.step for report in reports if report.stage == "denoise" and report.seconds is None and report.total]
    assert steps == [0, 1, 2, 3]


def in_bfloat16(pipeline: CreativeUpscaler) -> CreativeUpscaler:
    """The same pipeline over a copy of the VAE that computes in 16 bits."""
    family = pipeline.models.family("SD_1_5")
    canvas = copy.copy(family.canvas)
    canvas.vae = TiledVAE(copy.deepcopy(family.canvas.vae.vae).to(torch.bfloat16))
    half = copy.copy(pipeline)
    half.models = copy.copy(pipeline.models)
    half.models.family = lambda name, base=None: replace(family, canvas=canvas)  # type: ignore[method-assign]
    return half


def test_overflow_in_16_bits_is_decoded_again_in_32(
    pipeline: CreativeUpscaler, photo_crop: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decode with infinities is repeated in 32 bits, the user is told, and the picture is whole."""
    decode_bands = TiledVAE.decode_bands

    def overflow(self: TiledVAE, latents: torch.Tensor, on_tile: OnTile) -> Iterator[torch.Tensor]:
        for i, band in enumerate(decode_bands(self, latents, on_tile)):
            yield band * float("inf") if self.dtype != torch.float32 and i == 0 else band

    monkeypatch.setattr(TiledVAE, "decode_bands", overflow)
    output, reports = BytesIO(), []
    in_bfloat16(pipeline)(
        png_bytes(photo_crop), QUICK, limits=UNLIMITED, output=output, progress=lambda report: reports.append(report)
    )

    assert metrics.as_array(Image.open(output)).std() > 5
    assert any("32 bits" in (report.message or "") for report in reports)


def test_a_decode_that_stays_broken_is_an_error(
    pipeline: CreativeUpscaler, photo_crop: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never a black picture: what is not finite in 32 bits either is refused."""
    decode_bands = TiledVAE.decode_bands
    monkeypatch.setattr(
        TiledVAE,
        "decode_bands",
        lambda self, *arguments: (band * float("nan") for band in decode_bands(self, *arguments)),
    )

    with pytest.raises(NonFiniteResult):
        run(in_bfloat16(pipeline), photo_crop)


def test_too_large_a_result_is_refused_with_the_largest_side() -> None:
    """The message names the numbers and the way out, and a picture of the named size is accepted."""
    with pytest.raises(ImageTooLarge, match="override_size_limits") as caught:
        plan_size(1000, 600, QUICK, LIMITS)

    assert plan_size(caught.value.max_width, caught.value.max_height, QUICK, LIMITS)
    assert plan_size(1000, 600, replace(QUICK, allow_large=True), LIMITS) == (2000, 1200)


def test_a_strip_of_one_pixel_counts_with_its_padding() -> None:
    """A thin picture is cheap to send and dear to make: its padded size is what the limit is for."""
    with pytest.raises(ImageTooLarge) as caught:
        plan_size(1, 20_000, replace(QUICK, scale=1.0), replace(LIMITS, max_output_pixels=10**5), multiple=32)

    again = replace(LIMITS, max_output_pixels=10**5)
    size = caught.value.max_width, caught.value.max_height
    assert plan_size(*size, replace(QUICK, scale=1.0), again, multiple=32) == size


def test_what_does_not_fit_into_memory_is_refused(
    pipeline: CreativeUpscaler, photo_crop: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture that needs more memory than is free is an error that says so, not a killed process."""
    monkeypatch.setattr("pipelines.redraw.BYTES_PER_PX", 10**12)

    with pytest.raises(ImageTooLarge, match="GiB of memory"):
        run(pipeline, photo_crop)


@pytest.mark.parametrize("stage", ["preupscale", "vae_encode", "vae_decode"])
def test_stages_without_steps_can_be_stopped(pipeline: CreativeUpscaler, photo_crop: Image.Image, stage: str) -> None:
    """A cancelled request does not have to wait for the end of a long decode."""
    heard = 0

    def stop_at_second_report(report: Report) -> None:
        nonlocal heard
        heard += report.stage == stage
        if heard == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        pipeline(png_bytes(photo_crop), QUICK, limits=UNLIMITED, output=BytesIO(), progress=stop_at_second_report)


@pytest.mark.usefixtures("small_tiles")
def test_a_step_of_many_tiles_can_be_stopped_between_them(
    pipeline: CreativeUpscaler, photo_crop: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step over a large picture takes minutes; who cancels waits for one batch of tiles."""
    model, calls = pipeline.models.family("SD_1_5").model, 0
    predict = model.predict

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return predict(*args)

    def stop(report: Report) -> None:
        if calls == 1:
            raise Cancelled

    monkeypatch.setattr(model, "predict", counted)
    with pytest.raises(Cancelled):
        pipeline(png_bytes(photo_crop), QUICK, limits=UNLIMITED, output=BytesIO(), progress=stop)

    assert calls == 1


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("strength", [0.0, 0.4])
def test_a_large_picture_is_the_same_from_a_file(
    pipeline: CreativeUpscaler, photo_crop: Image.Image, monkeypatch: pytest.MonkeyPatch, restore: bool, strength: float
) -> None:
    """Beyond `exact_px` the picture before diffusion lies on disk, in bands; what comes out is nearly the same."""
    changes = {"strength": strength, "restore": restore}
    whole = metrics.as_array(run(pipeline, photo_crop, **changes)[0])
    ccsr = pipeline.models.ccsr()
    assert ccsr is not None
    for canvas in (pipeline.models.family("SD_1_5").canvas, ccsr.canvas):
        monkeypatch.setattr(canvas, "exact_px", 100 * 100)

    streamed = metrics.as_array(run(pipeline, photo_crop, **changes)[0])

    assert np.abs(streamed - whole).mean() < 1.5


def test_faithfulness_fades_between_its_bounds() -> None:
    """What the input determines is put back fully up to strength 0.5 and not at all from 0.8."""
    assert [faithfulness(s) for s in (0.1, 0.5, 0.8, 1.0)] == pytest.approx([1, 1, 0, 0])
    assert 0 < faithfulness(0.65) < 1


@pytest.fixture(scope="module")
def held_out() -> dict[str, Image.Image]:
    """A 384 px piece from the middle of each photograph that was never trained on."""
    pieces = {}
    for name in HELD_OUT:
        with Image.open(PHOTOS / f"{name}.png") as image:
            left, top = (image.width - 384) // 2, (image.height - 384) // 2
            pieces[name] = image.convert("RGB").crop((left, top, left + 384, top + 384))
    return pieces


FULL = Params(**DEFAULTS)


def halved(image: Image.Image) -> Image.Image:
    return metrics.area_reduced(image, (image.width // 2, image.height // 2))


def mean_fidelity(pipeline: CreativeUpscaler, pictures: dict[str, Image.Image], **changes: Any) -> float:
    """Mean PSNR (dB) of the area-reduced results to their inputs."""
    return float(
        np.mean([metrics.fidelity(run(pipeline, halved(p), FULL, **changes)[0], halved(p)) for p in pictures.values()])
    )


@pytest.mark.parametrize(("strength", "least_fidelity"), [(0.35, 30.0), (0.5, 28.0)])
def test_photographs_stay_themselves(
    pipeline: CreativeUpscaler, held_out: dict[str, Image.Image], strength: float, least_fidelity: float
) -> None:
    """Reduced again, every result is its input: fidelity and mean colour, photograph by photograph."""
    for name, original in held_out.items():
        picture, _, _ = run(pipeline, halved(original), FULL, strength=strength)

        assert metrics.fidelity(picture, halved(original)) >= least_fidelity, name
        assert metrics.colour_shift(picture, halved(original)) <= 3, name


def test_default_creativity_adds_detail(pipeline: CreativeUpscaler, held_out: dict[str, Image.Image]) -> None:
    """At the default the results are sharper than Lanczos' on every photograph."""
    for name, original in held_out.items():
        picture, _, _ = run(pipeline, halved(original), FULL)

        lanczos = halved(original).resize(original.size, Image.Resampling.LANCZOS)
        assert metrics.detail(picture) >= 1.05 * metrics.detail(lanczos), name


def test_creativity_and_shape_preservation_do_what_they_say(
    pipeline: CreativeUpscaler, held_out: dict[str, Image.Image]
) -> None:
    """Fidelity falls as creativity grows and rises with shape preservation."""
    by_strength = [mean_fidelity(pipeline, held_out, strength=s) for s in (0.1, 0.5, 0.9)]
    by_shape = [mean_fidelity(pipeline, held_out, controlnet_conditioning_scale=c) for c in (0.0, 1.0)]

    assert by_strength[0] > by_strength[1] > by_strength[2]
    assert by_shape[0] < by_shape[1]


def test_tile_borders_do_not_show(
    pipeline: CreativeUpscaler, held_out: dict[str, Image.Image], request: pytest.FixtureRequest
) -> None:
    """The gradient across tile borders is at most 1.05 times what it is there in the picture made as one tile."""
    whole = {name: run(pipeline, halved(original), FULL)[0] for name, original in held_out.items()}
    request.getfixturevalue("small_tiles")

    for name, original in held_out.items():
        picture, result, _ = run(pipeline, halved(original), FULL)

        assert len(result.recipe["tiles"]["tops"]) > 2
        assert metrics.border_gradient(picture, whole[name], *borders(result.recipe)) <= 1.05, name


@pytest.mark.parametrize("level", [16, 128, 250])
def test_flat_pictures_stay_flat(pipeline: CreativeUpscaler, level: int) -> None:
    """No speckle and no mesh where there is nothing to draw."""
    picture, _, _ = run(pipeline, Image.new("RGB", (96, 96), (level,) * 3), FULL)

    assert metrics.as_array(picture).std(axis=(0, 1)).max() <= 2

"""Small pictures of unfinished latents are cheap, and show where it goes."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from pipelines.creative_upscaler import CreativeUpscaler, Params
from pipelines.flux import FlowSampler
from pipelines.preview import Painter
from pipelines.progress import Report, Stages
from pipelines.samplers import NoiseSampler, Sampler
from pipelines.spool import Spool
from pipelines.vae import TiledVAE
from tests.conftest import png_bytes
from tests.pipelines.test_creative_upscaler import DEFAULTS, UNLIMITED
from weights.store import WeightStore

CONFIG = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1)[None]


def distance(found: Image.Image, wanted: Image.Image) -> float:
    """Mean difference of two pictures, the second brought to the size of the first, in levels."""
    small = wanted.convert("RGB").resize(found.size, Image.Resampling.BOX)
    return float(np.abs(np.asarray(found, np.float32) - np.asarray(small, np.float32)).mean())


def test_it_shows_what_the_latents_are_on_their_way_to(pocket: WeightStore, photo_crop: Image.Image) -> None:
    """At the start the picture itself; with the latents of another one, that one's colours at the same places."""
    vae = TiledVAE(AutoencoderKL.from_pretrained(pocket.folder("vae"), local_files_only=True).eval())
    red, green, blue = photo_crop.split()
    redder = Image.merge("RGB", (red.point(lambda level: min(255, level + 60)), green, blue))
    picture = as_tensor(photo_crop)
    with torch.inference_mode():
        start, final = (vae.encode(as_tensor(one), lambda: None) for one in (photo_crop, redder))
        paint = Painter(start, picture, (96, 120))
        first, last = paint(start), paint(final)

    assert first.size == last.size == (120, 96), "what was padded is cut off"
    assert distance(first, photo_crop.crop((0, 0, 120, 96))) < 1
    assert distance(last, redder.crop((0, 0, 120, 96))) < 0.5 * distance(first, redder.crop((0, 0, 120, 96)))


def test_a_large_picture_has_a_small_preview() -> None:
    """Also of one that lies in a file, of which no more is read than is shown."""
    pixels = torch.rand(1, 3, 1024, 2048)
    spool = Spool.of(pixels.split(256, dim=-2), 1024, 2048)
    start = torch.rand(1, 4, 128, 256)

    sizes = {Painter(start, picture, (1000, 2048))(start).size for picture in (pixels, spool)}

    assert sizes == {(512, 250)}


def test_the_longest_strip_has_a_preview() -> None:
    """Of 64 rows that are padding but for one, at 65,535 px a side."""
    strip = torch.full((1, 1, 1, 1), 0.5).expand(1, 3, 64, 65_536)

    assert Painter(torch.rand(1, 4, 8, 8192), strip, (1, 65_535))(torch.rand(1, 4, 8, 8192)).size == (512, 1)


def test_a_flat_picture_gives_no_wild_colours() -> None:
    """Latents that tell nothing about colours are shown without any."""
    flat = torch.full((1, 3, 64, 64), 0.5)

    shown = Painter(torch.zeros(1, 4, 8, 8), flat, (64, 64))(torch.randn(1, 4, 8, 8) * 3)

    assert np.abs(np.asarray(shown, np.int16) - 128).max() <= 1


@pytest.mark.parametrize(
    "sampler",
    [
        NoiseSampler(CONFIG, torch.tensor([5.0, 1.0, 0.0]), "euler"),
        NoiseSampler(CONFIG, torch.tensor([5.0, 1.0, 0.0]), "dpmpp_3m_sde", generator=torch.Generator()),
        FlowSampler([0.8, 0.3, 0.0]),
    ],
    ids=["euler", "dpmpp_3m_sde", "flow"],
)
def test_a_perfect_answer_amounts_to_the_clean_latents(sampler: Sampler) -> None:
    """Where the model knows the noise, the estimate is what was noised."""
    latents, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    answer = noise - latents if isinstance(sampler, FlowSampler) else noise

    found = sampler.estimate(0, answer, sampler.start(latents, noise))

    torch.testing.assert_close(found, latents, atol=1e-4, rtol=0)


def test_a_pipeline_offers_previews_that_its_checker_lets_through(pocket: WeightStore, photo_crop: Image.Image) -> None:
    """Every step has one, the later the closer to the result; what the checker objects to is not shown."""
    pipeline = CreativeUpscaler.load(pocket, device="cpu")
    shown: list[Image.Image | None] = []

    def listen(report: Report) -> None:
        if report.preview is not None:
            shown.append(report.preview())

    output = BytesIO()
    small = photo_crop.resize((64, 48))
    pipeline(png_bytes(small), Params(**DEFAULTS), limits=UNLIMITED, output=output, progress=listen)
    with Image.open(output) as result:
        distances = [distance(one, result) for one in shown if one is not None]

    assert len(distances) == len(shown) > 1
    assert distances[-1] < distances[0] and distances[-1] < 12


def test_what_must_not_be_seen_is_not_shown() -> None:
    """A preview that may not be shown is none; outside of a pass there is none at all."""
    reports: list[Report] = []
    stages = Stages(reports.append, may_show=lambda image: False)

    with stages.painting(lambda latents: Image.new("RGB", (2, 2))), stages.stage("denoise", 1) as on_step:
        stages.watch(lambda: None)
        on_step(1)
    with stages.stage("png", 1) as on_step:
        on_step(1)

    previews = [report.preview for report in reports if report.step and report.seconds is None]
    assert previews[0] is not None and previews[0]() is None
    assert previews[1] is None

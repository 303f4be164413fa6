"""What is in memory while a large picture is made does not grow with it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from pipelines import prescale
from pipelines.prescale import NetworkPreStage
from pipelines.redraw import LATENT_COPIES, Canvas
from tests.pipelines.staging import pocket_models
from weights.compact import Compact
from weights.detect import SD_1_5
from weights.store import WeightStore


def largest_held(stage: NetworkPreStage, scale: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Numbers in the largest tensor that the network made or a band was, while 24 x 20 px were enlarged."""
    sizes: list[int] = []

    def watched(bands: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        for band in bands:
            sizes.append(band.numel())
            yield band

    whole = stage._enlarged
    monkeypatch.setattr(stage, "_enlarged", lambda *arguments: watched(whole(*arguments)))
    handle = stage.model.register_forward_hook(lambda module, inputs, output: sizes.append(output.numel()))
    sizes += [band.numel() for band in stage.bands(torch.rand(1, 3, 20, 24), (20 * scale, 24 * scale))]
    handle.remove()
    return max(sizes)


def test_what_the_network_holds_is_a_band_and_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen times the pixels, not a quarter more in memory: bands get lower as pictures get wider."""
    monkeypatch.setattr(prescale, "BAND_PX", 6000)
    monkeypatch.setattr(prescale, "LEAST_BAND_ROWS", 4)
    held = []
    for scale in (8, 16, 32):
        stage = NetworkPreStage(Compact(num_feat=4, num_conv=1).eval(), tile_px=32, halo_px=4)
        held.append(largest_held(stage, scale, monkeypatch))

    assert held[2] <= 1.25 * held[1] <= 1.25**2 * held[0]
    assert held[2] < 0.1 * 3 * 20 * 24 * 32**2


def test_a_streamed_pass_needs_latents_and_a_constant(pocket: WeightStore) -> None:
    """What is asked for before a pass, for pictures in files: what grows is what lies on the latent grid."""
    canvas = pocket_models(pocket).family(SD_1_5).canvas
    streamed = Canvas(canvas.vae.vae, size_multiple=8, exact_px=2**20)
    needed = [streamed.bytes_needed(side, side, pictures=0) for side in (2048, 4096, 8192)]

    per_px = 4 * LATENT_COPIES * canvas.vae.latent_channels / canvas.vae.scale_factor**2
    assert [needed[i + 1] - needed[i] for i in (0, 1)] == pytest.approx([per_px * 3 * 2**22, per_px * 3 * 2**24])
    assert per_px < canvas.bytes_per_px / 8


@pytest.mark.slow
def test_a_portrait_at_sixteen_times_its_side() -> None:
    """256² to 4096²: at most 1.3 times the memory of x4, and per megapixel at most 1.15 times the work of x8."""
    figures = {}
    for scale in (4, 8, 16):
        command = [sys.executable, "-m", "benchmarks.large", "--one", str(scale)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        figures[scale] = json.loads(done.stdout.splitlines()[-1])

    per_mp = {scale: figure["cpu_s"] / figure["megapixels"] for scale, figure in figures.items()}
    assert figures[16]["peak_mb"] <= 1.3 * figures[4]["peak_mb"]
    assert per_mp[16] <= 1.15 * per_mp[8]

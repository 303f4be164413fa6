"""What the tiled loop costs beyond the networks: CPU seconds of the loop over those of the same forwards bare.

    python -m benchmarks.tiling [--side 1024] [--steps 4]

Both run the same batches of the same shapes, in turn (A B B A), in one process; the ratio of medians is printed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from pipelines.creative_upscaler import MAX_TILE_PX, TILE_BATCH
from pipelines.multidiffusion import batches, tiled_denoise
from pipelines.redraw import TILE_OVERLAP_LATENTS
from pipelines.samplers import NoiseSampler
from pipelines.schedules import sigma_bounds, sigma_ramp
from pipelines.sd15 import StableDiffusion15
from pipelines.tiling import fit_grid, gather
from weights.store import open_store

FACTOR = 4


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this process for one call."""
    started = time.process_time()
    work()
    return time.process_time() - started


@torch.inference_mode()
def main() -> None:
    """Measure and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=1024, help="output side in px")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    store = open_store("pocket", root=Path(), has_cuda=False)
    family = StableDiffusion15.load(
        store.folder("sd15"), store.folder("controlnet-tile-sd15"), device=torch.device("cpu"), dtype=torch.float32
    )
    side = arguments.side // FACTOR
    channels = family.unet.config.in_channels
    grid = fit_grid(side, side, max_tile=MAX_TILE_PX // FACTOR, overlap=TILE_OVERLAP_LATENTS)
    conditioning = family.encode(
        "sharp",
        "blurry",
        guidance_scale=7.5,
        hint=torch.rand(1, 3, arguments.side, arguments.side),
        controlnet_conditioning_scale=0.25,
    )
    latents = torch.randn(1, channels, side, side)
    sigmas = sigma_ramp(1.0, arguments.steps, *sigma_bounds(family.scheduler_config))
    tile_batch = TILE_BATCH["cpu"]

    def loop() -> None:
        sampler = NoiseSampler(family.scheduler_config, sigmas, "euler", detail=0.05)
        tiled_denoise(family, latents, sampler, conditioning, grid=grid, tile_batch=tile_batch, seed=0)

    tiles = grid.tiles()
    assert conditioning.hint is not None
    prepared = [
        (
            gather(latents, tiles[batch]).repeat(2, 1, 1, 1).contiguous(memory_format=torch.channels_last),
            gather(conditioning.hint, tiles[batch]).repeat(2, 1, 1, 1),
            conditioning.prompt_embeds.repeat_interleave(len(tiles[batch]), dim=0),
        )
        for batch in batches(len(tiles), tile_batch)
    ]

    def bare() -> None:
        for _ in range(arguments.steps):
            for sample, hint, embeds in prepared:
                down, middle = family.controlnet(
                    sample, 500.0, encoder_hidden_states=embeds, controlnet_cond=hint, return_dict=False
                )
                family.unet(
                    sample,
                    500.0,
                    encoder_hidden_states=embeds,
                    down_block_additional_residuals=down,
                    mid_block_additional_residual=middle,
                )

    loop()
    bare()
    tiled_s, bare_s = [], []
    for _ in range(arguments.repeats):
        for work, times in ((loop, tiled_s), (bare, bare_s), (bare, bare_s), (loop, tiled_s)):
            times.append(cpu_seconds(work))
    ratio = statistics.median(tiled_s) / statistics.median(bare_s)
    Console(file=sys.stdout).print(
        f"{len(tiles)} tiles of {grid.tile_height} x {grid.tile_width} latents, {arguments.steps} steps: "
        f"loop {statistics.median(tiled_s):.2f} CPU s, bare forwards {statistics.median(bare_s):.2f} CPU s, "
        f"ratio {ratio:.3f}"
    )


if __name__ == "__main__":
    main()

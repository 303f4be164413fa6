"""What it costs to take turns between two models that are both resident: `python -m benchmarks.residency`.

Requests of two kinds alternate, and are compared with the same requests one kind after the other. With `--device-gb`
a GPU holds one of the two only, so that each turn moves weights between it and pinned host memory.
"""

from __future__ import annotations

import argparse
import sys
import time
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console

from pipelines.creative_upscaler import CreativeUpscaler, Params
from pipelines.models import Models
from pipelines.planning import Limits
from pipelines.residency import Residency
from weights.store import open_store

LIMITS = Limits(
    max_input_pixels=2**31, max_output_pixels=2**31, max_large_input_pixels=2**31, max_large_output_pixels=2**31
)


def params(family: str, steps: int) -> Params:
    """A request with fal's defaults but for its steps."""
    return Params(
        family=family,
        prompt="high quality, highly detailed",
        negative_prompt="blurry",
        scale=2.0,
        strength=0.5,
        detail=1.0,
        controlnet_conditioning_scale=0.25,
        guidance_scale=7.5,
        num_inference_steps=steps,
        seed=1,
    )


def seconds_of(pipeline: CreativeUpscaler, order: list[Params], picture: bytes) -> float:
    """Seconds for these requests."""
    started = time.perf_counter()
    for wanted in order:
        with pipeline.models.request(wanted.family):
            pipeline(picture, wanted, limits=LIMITS, output=BytesIO(), progress=lambda report: None)
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=128, help="side of the input in px")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--weights-dir", type=Path, default=Path("unused"))
    parser.add_argument("--device-gb", type=float, default=float("inf"))
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    store = open_store(options.weights, root=options.weights_dir, has_cuda=device.type == "cuda")
    budget = int(min(options.device_gb * 2**30, sys.maxsize))
    models = Models(store, device, Residency(device, device_bytes=budget, host_bytes=sys.maxsize))
    pipeline = CreativeUpscaler(models, weights={})
    file = BytesIO()
    Image.radial_gradient("L").resize((options.side, options.side)).convert("RGB").save(file, "PNG")
    kinds = [params("SD_1_5", options.steps), params("SDXL", options.steps)]
    one_by_one = [kinds[0]] * options.turns + [kinds[1]] * options.turns

    def measured(order: list[Params]) -> float:
        return seconds_of(pipeline, order, file.getvalue())

    measured(kinds)  # loads both
    # Both orders in each round, and the best round of each: other work on the machine disturbs them alike.
    rounds = [(measured(one_by_one), measured(kinds * options.turns)) for _ in range(options.rounds)]
    apart, mixed = min(first for first, _ in rounds), min(second for _, second in rounds)
    console = Console()
    console.print(f"{2 * options.turns} requests of {options.side} px, one kind after the other: {apart:.2f} s")
    console.print(f"in turns: {mixed:.2f} s ({100 * (mixed / apart - 1):+.1f} %)")


if __name__ == "__main__":
    main()

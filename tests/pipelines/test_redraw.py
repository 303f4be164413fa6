"""What of a diffusion pass's result is put back, whatever the family."""

from __future__ import annotations

import torch

from pipelines.redraw import Canvas, above_noise
from tests.pipelines.staging import pocket_models
from weights.detect import SD_1_5
from weights.store import WeightStore


def test_noise_of_the_network_is_left_out() -> None:
    """Where it changed no more than its own error the picture stays; what stands out is kept."""
    condition, noise = torch.randn(1, 4, 40, 40), 0.05 * torch.randn(1, 4, 40, 40)
    change = noise.clone()
    change[..., 20:] += torch.randn(1, 4, 40, 20)

    kept = above_noise(condition + change, condition, 0.06) - condition

    assert kept[..., :17].std() < 0.1 * noise.std()
    assert (kept[..., 23:] - change[..., 23:]).std() < 0.02
    assert torch.equal(above_noise(condition + change, condition, 0.0), condition + change)


def test_what_is_asked_for_covers_the_tile_at_work(pocket: WeightStore) -> None:
    """Normalising works in 32 bits whatever the networks do; decoding was measured (1024 and 2048 px, 16 bits)."""
    vae = pocket_models(pocket).family(SD_1_5).canvas.vae.vae
    canvas = Canvas(vae.to(torch.bfloat16), size_multiple=8)

    assert canvas.bytes_needed(1024, 1024) > 330 * 2**20
    assert canvas.bytes_needed(2048, 2048) > 780 * 2**20
    assert canvas.bytes_needed(2048, 2048) < 4 * canvas.bytes_needed(1024, 1024), "there is one of them at a time"

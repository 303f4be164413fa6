"""What of a diffusion pass's result is put back, whatever the family."""

from __future__ import annotations

import torch

from pipelines.redraw import above_noise


def test_noise_of_the_network_is_left_out() -> None:
    """Where it changed no more than its own error the picture stays; what stands out is kept."""
    condition, noise = torch.randn(1, 4, 40, 40), 0.05 * torch.randn(1, 4, 40, 40)
    change = noise.clone()
    change[..., 20:] += torch.randn(1, 4, 40, 20)

    kept = above_noise(condition + change, condition, 0.06) - condition

    assert kept[..., :17].std() < 0.1 * noise.std()
    assert (kept[..., 23:] - change[..., 23:]).std() < 0.02
    assert torch.equal(above_noise(condition + change, condition, 0.0), condition + change)

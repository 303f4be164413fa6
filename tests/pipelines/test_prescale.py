"""The pre-stage reaches the exact size, and its tiles cannot be seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.prescale import CompactPreStage, Lanczos
from weights.compact import Compact


@pytest.fixture(scope="module")
def compact() -> Compact:
    """A random super-resolution network."""
    torch.manual_seed(0)
    return Compact(num_feat=8, num_conv=8).eval()


@pytest.mark.parametrize("size", [(90, 130), (31, 47), (64, 48), (20, 200), (1, 1)])
def test_lanczos_is_pillows(size: tuple[int, int]) -> None:
    """Any size, larger or smaller, is what Pillow's Lanczos filter makes of the 8-bit picture, to its rounding."""
    picture = Image.effect_noise((48, 64), 15).convert("RGB")
    image = torch.from_numpy(np.asarray(picture) / np.float32(255)).permute(2, 0, 1)[None]

    resized = Lanczos()(image, size)

    expected = np.asarray(picture.resize(size[::-1], Image.Resampling.LANCZOS), dtype=np.float32) / 255
    assert resized.shape == (1, 3, *size)
    assert np.abs(resized[0].permute(1, 2, 0).numpy() - expected).max() < 2 / 255


@pytest.mark.parametrize("stage", [Lanczos(), CompactPreStage(torch.nn.Identity())])
def test_the_same_size_is_the_picture_itself(stage: Lanczos | CompactPreStage) -> None:
    """Scale 1 costs nothing and changes nothing."""
    image = torch.rand(1, 3, 9, 7)

    assert stage(image, (9, 7)) is image


@pytest.mark.parametrize("shape", [(37, 61), (1, 1), (16, 5), (33, 32)])
def test_tiles_equal_one_pass(shape: tuple[int, int], compact: Compact) -> None:
    """Small tiles with a margin give what the network makes of the whole picture."""
    image = torch.rand(1, 3, *shape)
    size = (2 * shape[0], 2 * shape[1])

    tiled = CompactPreStage(compact, tile_px=16, halo_px=10)(image, size)

    assert torch.allclose(tiled, compact(image).clamp(0, 1), atol=1e-5)


@pytest.mark.parametrize(("scale", "passes"), [(1.0, 0), (1.3, 1), (2.0, 1), (2.1, 2), (4.0, 2), (5.0, 3)])
def test_doubles_as_often_as_needed(scale: float, passes: int, compact: Compact) -> None:
    """The network runs until the picture is large enough; the rest is Lanczos to the exact size."""
    calls: list[int] = []
    handle = compact.register_forward_hook(lambda *_: calls.append(1))
    size = (round(13 * scale), round(17 * scale))

    enlarged = CompactPreStage(compact)(torch.rand(1, 3, 13, 17), size)

    handle.remove()
    assert enlarged.shape == (1, 3, *size)
    assert len(calls) == passes
    assert enlarged.dtype == torch.float32
    assert 0 <= enlarged.min() <= enlarged.max() <= 1


def test_a_half_precision_network_gives_single_precision_pictures(compact: Compact) -> None:
    """The network's type is its own business."""
    model = Compact(num_feat=8, num_conv=1).to(torch.bfloat16)

    assert CompactPreStage(model)(torch.rand(1, 3, 8, 8), (16, 16)).dtype == torch.float32

"""The pre-stage reaches the exact size, and its tiles cannot be seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pipelines import prescale
from pipelines.errors import ModelsUnusable, NonFiniteResult
from pipelines.prescale import Lanczos, NetworkPreStage, load_prestage
from pipelines.spool import Spool
from weights.compact import Compact
from weights.rrdbnet import RRDBNet
from weights.store import WeightStore


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


@pytest.mark.parametrize("stage", [Lanczos(), NetworkPreStage(torch.nn.Identity())])
def test_the_same_size_is_the_picture_itself(stage: Lanczos | NetworkPreStage) -> None:
    """Scale 1 costs nothing and changes nothing."""
    image = torch.rand(1, 3, 9, 7)

    assert stage(image, (9, 7)) is image


@pytest.mark.parametrize("shape", [(37, 61), (1, 1), (16, 5), (33, 32)])
def test_tiles_equal_one_pass(shape: tuple[int, int], compact: Compact) -> None:
    """Small tiles with a margin give what the network makes of the whole picture."""
    image = torch.rand(1, 3, *shape)
    size = (2 * shape[0], 2 * shape[1])

    tiled = NetworkPreStage(compact, tile_px=16, halo_px=10)(image, size)

    assert torch.allclose(tiled, compact(image).clamp(0, 1), atol=1e-5)


@pytest.mark.parametrize(("scale", "passes"), [(1.0, 0), (1.3, 1), (2.0, 1), (2.1, 2), (4.0, 2), (5.0, 3)])
def test_doubles_as_often_as_needed(scale: float, passes: int, compact: Compact) -> None:
    """The network runs until the picture is large enough; the rest is Lanczos to the exact size."""
    calls: list[int] = []
    handle = compact.register_forward_hook(lambda *_: calls.append(1))
    size = (round(13 * scale), round(17 * scale))

    enlarged = NetworkPreStage(compact)(torch.rand(1, 3, 13, 17), size)

    handle.remove()
    assert enlarged.shape == (1, 3, *size)
    assert len(calls) == passes
    assert enlarged.dtype == torch.float32
    assert 0 <= enlarged.min() <= enlarged.max() <= 1


def test_a_half_precision_network_gives_single_precision_pictures(compact: Compact) -> None:
    """The network's type is its own business."""
    model = Compact(num_feat=8, num_conv=1).to(torch.bfloat16)

    assert NetworkPreStage(model)(torch.rand(1, 3, 8, 8), (16, 16)).dtype == torch.float32


@pytest.mark.parametrize("size", [(74, 122), (148, 244), (37, 61), (90, 100), (20, 30)])
@pytest.mark.parametrize("spooled", [False, True])
def test_bands_are_the_whole_picture(
    size: tuple[int, int], spooled: bool, compact: Compact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Enlarged band by band, from memory or from a file, the picture is the one enlarged at once."""
    monkeypatch.setattr(prescale, "BAND_PX", 2000)
    monkeypatch.setattr(prescale, "LEAST_BAND_ROWS", 8)
    image = torch.rand(1, 3, 37, 61)
    for stage in (Lanczos(), NetworkPreStage(compact)):
        bands = list(stage.bands(Spool.of([image], 37, 61) if spooled else image, size))

        assert len(bands) > 1
        assert torch.allclose(torch.cat(bands, dim=-2), stage(image, size), atol=2e-3 if spooled else 2e-4)


def test_bands_do_not_move_the_blocks_that_a_network_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real-ESRGAN's x2 network works on blocks of 2 x 2 px: every band is cut where the whole picture's blocks are."""
    monkeypatch.setattr(prescale, "BAND_PX", 2 * 80 * 11)
    monkeypatch.setattr(prescale, "LEAST_BAND_ROWS", 8)
    torch.manual_seed(0)
    model = RRDBNet(num_block=1, num_feat=6, num_grow=4, unshuffle=2).eval()
    image = torch.rand(1, 3, 61, 40)

    bands = list(NetworkPreStage(model).bands(image, (122, 80)))

    assert len(bands) > 1
    assert torch.allclose(torch.cat(bands, dim=-2), model(image).clamp(0, 1), atol=1e-5)


def test_a_network_of_factor_four_is_run_until_both_sides_are_reached() -> None:
    """An ESRGAN-class network serves any factor: four times as often as needed, then Lanczos."""
    model = RRDBNet(num_block=1, num_feat=4, num_grow=4).eval()
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))

    enlarged = NetworkPreStage(model)(torch.rand(1, 3, 10, 6), (50, 30))

    assert enlarged.shape == (1, 3, 50, 30)
    assert len(calls) == 2


def test_the_operators_network_comes_before_the_sets_own(tmp_path: Path) -> None:
    """A file in `upscaler` is used; without one Lanczos."""
    store = WeightStore("full", tmp_path)
    (tmp_path / "upscaler").mkdir()

    assert isinstance(load_prestage(store, torch.device("cpu")), Lanczos)
    save_file(dict(RRDBNet(num_block=1, num_feat=4, num_grow=4).state_dict()), tmp_path / "upscaler/x.safetensors")
    stage = load_prestage(store, torch.device("cpu"))
    assert isinstance(stage, NetworkPreStage) and stage.factor == 4


def test_a_spool_gives_back_what_was_written() -> None:
    """Any piece, to 16 bits, and a spool that was not filled is an error."""
    image = torch.rand(1, 3, 23, 17)
    spool = Spool.of(image.split(5, dim=-2), 23, 17)

    assert spool.shape == image.shape
    assert torch.allclose(spool[..., 3:19, 4:-2], image[..., 3:19, 4:-2], atol=1e-5)
    assert torch.allclose(spool[..., 20:99, :], image[..., 20:, :], atol=1e-5)
    with pytest.raises(ValueError, match="Expected 24 rows"):
        Spool.of([image], 24, 17)


@pytest.mark.parametrize(("factor", "num_conv"), [(2, 2), (4, 1)])
@pytest.mark.parametrize("scale", [4.5, 17.0, 33.3])
def test_no_picture_between_two_passes_is_larger_than_the_result(
    factor: int, num_conv: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Factors a little above a power of the network's own: what is too much goes early, and nothing moves by it."""
    made: list[int] = []
    keep = Spool.of.__func__  # type: ignore[attr-defined]

    def watch(cls: type[Spool], bands: object, height: int, width: int) -> Spool:
        made.append(height * width)
        return keep(cls, bands, height, width)

    monkeypatch.setattr(Spool, "of", classmethod(watch))
    ramp = torch.linspace(0.1, 0.9, 13)[:, None] * torch.linspace(0.2, 1, 9)[None]
    size = (round(13 * scale), round(9 * scale))

    class Nearest(Compact):
        """Enlarges without inventing anything."""

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.interpolate(image, scale_factor=self.upscale, mode="bilinear")

    stage = NetworkPreStage(Nearest(num_feat=4, num_conv=num_conv, upscale=factor))
    image = ramp.expand(1, 3, 13, 9).contiguous()
    result = torch.cat(list(stage.bands(image, size)), dim=-2)

    assert tuple(result.shape[-2:]) == size
    assert max(made) <= size[0] * size[1]
    inside = (..., slice(round(3 * scale), round(-3 * scale)), slice(round(3 * scale), round(-3 * scale)))
    assert torch.allclose(result[inside], Lanczos()(image, (size[0], size[1]))[inside], atol=0.004)


def test_values_that_are_not_finite_are_an_error() -> None:
    """A file with damaged numbers makes no black picture."""
    model = Compact(num_feat=4, num_conv=1)
    torch.nn.init.constant_(next(model.parameters()), float("nan"))

    with pytest.raises(NonFiniteResult, match="pre-upscaler"):
        NetworkPreStage(model)(torch.rand(1, 3, 8, 8), (16, 16))


@pytest.mark.parametrize("names", [["wrong.pth"], ["a.pth", "b.safetensors"]])
def test_an_operators_file_that_cannot_be_used_is_told_without_a_path(tmp_path: Path, names: list[str]) -> None:
    """A foreign file, or two: the error names them and their folder in the set, for callers too."""
    (tmp_path / "upscaler").mkdir()
    for name in names:
        (tmp_path / "upscaler" / name).write_bytes(b"<!doctype html>")

    with pytest.raises(ModelsUnusable) as caught:
        load_prestage(WeightStore("full", tmp_path), torch.device("cpu"))

    assert all(name in str(caught.value) for name in ["`upscaler`", *names])
    assert str(tmp_path) not in str(caught.value)

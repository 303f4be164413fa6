"""Small faces are restored where they are, and nobody sees where the pasted part ends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from skimage import data
from torch import Tensor

from benchmarks import metrics
from pipelines import crystal_upscaler
from pipelines.crystal_upscaler import CrystalUpscaler, Params
from pipelines.delivery import to_tensor
from pipelines.errors import ModelsUnusable
from pipelines.face_restoration import RestoredFace, restore_faces, with_faces
from pipelines.faces import Box, load_detector
from pipelines.prescale import Lanczos, nothing
from tests.pipelines.staging import pocket_models, run
from weights.restoreformer import RestoreFormer
from weights.store import WeightStore

SIDE = 256
EYES, MOUTH_Y = ((203.1, 101.7), (247.0, 103.0)), 144.3
"""In px of scikit-image's 512 px portrait of Eileen Collins, measured by hand."""


@pytest.fixture(scope="module")
def portrait() -> Image.Image:
    """A portrait whose face is 50 px high."""
    return Image.fromarray(data.astronaut()).resize((SIDE, SIDE), Image.Resampling.BOX)


@pytest.fixture(scope="module")
def face(pocket: WeightStore, portrait: Image.Image) -> Box:
    """Where it is, as the built-in detector finds it."""
    (found,) = load_detector(pocket)(portrait)
    return found


def same(cut: Tensor) -> Tensor:
    """The perfect restorer of a perfect face."""
    return cut


def textured(cut: Tensor) -> Tensor:
    """Adds structure finer than the input has."""
    return cut + 0.1 * torch.where(torch.arange(512) % 8 < 4, 1.0, -1.0)


def painted(cut: Tensor) -> Tensor:
    """Adds what the input knows better: a red face, paler than it was."""
    return 0.8 * cut + torch.tensor([0.2, 0.0, 0.05])[:, None, None]


def restored(portrait: Image.Image, faces: Iterable[Box], restore: object, max_px: int = 128) -> list[RestoredFace]:
    return restore_faces(to_tensor(portrait), faces, restore, max_px=max_px, on_face=nothing)  # type: ignore[arg-type]


def pasted(
    portrait: Image.Image, faces: Sequence[RestoredFace], size: tuple[int, int], *, weight: float = 1.0, rows: int = 64
) -> tuple[Tensor, Tensor]:
    """The enlarged picture without and with the faces."""
    plain = Lanczos()(to_tensor(portrait), size)
    source = (portrait.height, portrait.width)
    bands = with_faces(plain.split(rows, dim=-2), faces, source=source, size=size, weight=weight)
    return plain, torch.cat(list(bands), dim=-2)


def test_a_cut_face_lies_as_in_the_networks_training_pictures(portrait: Image.Image, face: Box) -> None:
    """Eyes and mouth where FFHQ has them: eyes at 240 px of 512 and 126 px apart, the mouth at 371."""
    (one,) = restored(portrait, [face], same)

    per_px = 512 / one.side * SIDE / 512  # of the 512 px portrait in which the places were measured
    (left, left_y), (right, right_y) = EYES
    assert per_px * (left_y + right_y) / 2 - one.top * 512 / one.side == pytest.approx(240, abs=25)
    assert per_px * (right - left) == pytest.approx(126, abs=25)
    assert per_px * (left + right) / 2 - one.left * 512 / one.side == pytest.approx(256, abs=25)
    assert per_px * MOUTH_Y - one.top * 512 / one.side == pytest.approx(371, abs=25)


@pytest.mark.parametrize("size", [(256, 256), (512, 512), (701, 683), (1024, 1024)])
def test_a_perfect_restorer_changes_nothing(portrait: Image.Image, face: Box, size: tuple[int, int]) -> None:
    """At every factor, fractional ones too, what is pasted lies exactly where it was cut out."""
    faces = restored(portrait, [face], same)
    plain, result = pasted(portrait, faces, size)
    _, beside = pasted(portrait, [replace(one, left=one.left + 1) for one in faces], size)

    error, error_beside = (float((plain - other).abs().mean()) for other in (result, beside))
    assert error < 0.1 / 255
    assert error < 0.15 * error_beside


def test_tones_stay_the_inputs(portrait: Image.Image, face: Box) -> None:
    """A network that paints a face red and pale leaves the mean colour of every 8 px square within one level."""
    plain, result = pasted(portrait, restored(portrait, [face], painted), (512, 512))

    moved = torch.nn.functional.avg_pool2d(result - plain, 16)
    assert float(moved.abs().max()) < 1.5 / 255


def test_detail_is_the_networks_and_fades_out_before_the_edge(portrait: Image.Image, face: Box) -> None:
    """Texture that the network adds is there in full in the middle, and is gone smoothly where the ellipse ends."""
    (one,) = restored(portrait, [face], textured)
    plain, result = pasted(portrait, [one], (1024, 1024))
    moved = (result - plain).abs().mean(dim=1)[0]

    centre = torch.tensor([one.top, one.left]) * 4 + one.side * 2
    rows, columns = torch.arange(1024) - centre[0], torch.arange(1024) - centre[1]
    radius = (rows[:, None] ** 2 + columns[None] ** 2).sqrt() / (2 * one.side)
    rings = [float(moved[(radius >= r) & (radius < r + 0.05)].mean()) for r in (0.0, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)]
    assert rings[0] > 4 / 255
    assert all(inner > outer for inner, outer in zip(rings[1:], rings[2:], strict=False))
    assert float(moved[radius > 0.98].max()) < 1 / 255
    assert float(moved[radius > 1.01].max()) == 0


@pytest.mark.parametrize("box", [Box(0.0, 0.0, 0.2, 0.2), Box(0.85, 0.9, 1.0, 1.0), Box(0.3, 0.3, 0.6, 0.55)])
@pytest.mark.parametrize("rows", [1, 37, 500])
def test_bands_do_not_matter_and_borders_do_not_hurt(portrait: Image.Image, box: Box, rows: int) -> None:
    """A face at a border, whose square reaches beyond it; and the same pixels whatever the height of a band."""
    faces = restored(portrait, [box], textured)
    _, whole = pasted(portrait, faces, (500, 500), rows=500)
    plain, result = pasted(portrait, faces, (500, 500), rows=rows)

    assert torch.allclose(result, whole, atol=2e-3)
    assert not torch.equal(result, plain)


def test_only_small_faces_are_restored(portrait: Image.Image) -> None:
    """What is large enough to be known, and what is too small to be a face, is left alone."""
    boxes = [Box(0.1, 0.1, 0.1 + px / SIDE, 0.1 + px / SIDE) for px in (10, 20, 100, 120)]

    assert len(restored(portrait, boxes, same, max_px=100)) == 2


def test_less_weight_changes_less(portrait: Image.Image, face: Box) -> None:
    """Weight 0 is the plain picture, and in between it is in between."""
    faces = restored(portrait, [face], textured)
    plain, full = pasted(portrait, faces, (512, 512))

    assert torch.equal(pasted(portrait, faces, (512, 512), weight=0.0)[1], plain)
    assert torch.allclose(pasted(portrait, faces, (512, 512), weight=0.4)[1], torch.lerp(plain, full, 0.4), atol=1e-5)


@pytest.fixture(scope="module")
def store(pocket: WeightStore, tmp_path_factory: pytest.TempPathFactory) -> WeightStore:
    """The pocket set, and beside it a narrow network of RestoreFormer++'s shape with random numbers."""
    root = tmp_path_factory.mktemp("weights")
    for folder in pocket.root.iterdir():
        (root / folder.name).symlink_to(folder)
    (root / "face-restorer").mkdir()
    torch.manual_seed(0)
    network = RestoreFormer(widths=(32,) * 6, num_blocks=1, num_codes=8, code_channels=8, z_channels=8)
    torch.save({"state_dict": network.state_dict()}, root / "face-restorer" / "RestoreFormer++.ckpt")
    return WeightStore("pocket", root)


def test_the_endpoint_restores_a_portraits_face(store: WeightStore, pocket: WeightStore, portrait: Image.Image) -> None:
    """Where the operator has a network, tones stay as they were, and only the face is changed."""
    pipeline = CrystalUpscaler(pocket_models(store), weights={})
    params = Params(scale=2.0, strength=0.0, controlnet_conditioning_scale=1.0)
    without, _, _ = run(CrystalUpscaler(pocket_models(pocket), weights={}), portrait, params)

    picture, result, _ = run(pipeline, portrait, params)

    assert result.recipe["restored_faces"] == 1 and "faces" in result.timings
    assert metrics.colour_shift(picture, portrait) <= 1
    moved = abs(metrics.as_array(picture) - metrics.as_array(without))
    assert moved[60:180, 140:300].mean() > 0.2
    assert moved[250:].max() == 0


def test_the_operator_decides_up_to_which_size(store: WeightStore, portrait: Image.Image) -> None:
    """Above the setting nothing is restored, and with 0 nothing is looked for."""
    params = Params(scale=2.0, strength=0.0, controlnet_conditioning_scale=1.0)
    small = CrystalUpscaler(pocket_models(store), weights={}, restore_faces_px=40)
    off = CrystalUpscaler(pocket_models(store), weights={}, restore_faces_px=0)

    assert run(small, portrait, params)[1].recipe["restored_faces"] == 0
    assert run(off, portrait, params)[1].recipe["faces"] == []


def test_a_file_that_is_no_restorer_is_told_by_name(tmp_path: Path) -> None:
    """An operator's mistake is an error that names folder and file, not a crash."""
    (tmp_path / "face-restorer").mkdir()
    (tmp_path / "face-restorer" / "wrong.pth").write_bytes(b"not a network")

    with pytest.raises(ModelsUnusable, match=r"`face-restorer` cannot be used: wrong\.pth"):
        pocket_models(WeightStore("pocket", tmp_path)).face_restorer()


@pytest.mark.slow
@pytest.mark.parametrize("strength", [0.0, 0.2])
def test_equal_requests_give_equal_bytes(
    store: WeightStore, portrait: Image.Image, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without diffusion passes before the face is pasted."""
    monkeypatch.setattr(crystal_upscaler, "NETWORK_ONLY_PX", 1)
    pipeline = CrystalUpscaler(pocket_models(store), weights={})
    params = Params(scale=1.5, strength=strength, controlnet_conditioning_scale=1.0, num_inference_steps=4)
    _, result, content = run(pipeline, portrait, params)

    assert result.recipe["restored_faces"] == 1
    assert content == run(pipeline, portrait, params)[2]


@pytest.mark.slow
def test_the_published_size_runs_on_this_machine(portrait: Image.Image, face: Box) -> None:
    """RestoreFormer++ with random numbers restores a face in 32 bits; its result is finite and keeps the tones."""
    torch.manual_seed(0)
    network = RestoreFormer().eval()
    with torch.inference_mode():
        faces = restored(portrait, [face], network)
    plain, result = pasted(portrait, faces, (512, 512))

    assert torch.isfinite(result).all()
    assert float(torch.nn.functional.avg_pool2d(result - plain, 32).abs().max()) < 3 / 255

"""Faces are found, and what is known of them reaches the denoising loop."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from skimage import data

from pipelines.faces import Box, FaceMap, _Found, _Window, distinct, load_detector
from pipelines.samplers import NoiseSampler, ProtectingSampler
from pipelines.schedules import sigma_ramp
from pipelines.tiling import Tile, blend_weights, fit_grid, surround
from tests.pipelines.test_multidiffusion import CONFIG
from weights.store import WeightStore


def test_the_builtin_cascade_finds_a_portraits_face(pocket: WeightStore) -> None:
    """On NASA's portrait of Eileen Collins there is one face, where it is; on a picture without any there is none."""
    detect = load_detector(pocket)
    portrait = Image.fromarray(data.astronaut())

    faces = detect(portrait)

    assert len(faces) == 1
    middle = (faces[0].top + faces[0].bottom) / 2 * 512, (faces[0].left + faces[0].right) / 2 * 512
    assert abs(middle[0] - 115) < 20 and abs(middle[1] - 220) < 20
    assert detect(portrait.crop((280, 300, 512, 512))) == []
    assert detect(Image.new("RGB", (20, 400))) == []


@pytest.mark.parametrize("side", [128, 192, 320, 768])
def test_faces_of_all_sizes_are_found_in_the_same_place(pocket: WeightStore, side: int) -> None:
    """From 20 px between forehead and chin on, within a twentieth of the face's place in the large picture."""
    portrait = Image.fromarray(data.astronaut()).resize((side, side), Image.Resampling.LANCZOS)

    (face,) = load_detector(pocket)(portrait)

    assert face == pytest.approx((0.13, 0.34, 0.32, 0.53), abs=0.02)


def test_a_small_face_in_a_large_picture_is_found(pocket: WeightStore) -> None:
    """Thirty pixels high in a photograph of a thousand, and nothing else there is taken for one."""
    scene = Image.open("tests/photos/shuttle.png").convert("RGB").resize((1000, 781))
    scene.paste(Image.fromarray(data.astronaut()).resize((160, 160)), (700, 600))

    (face,) = load_detector(pocket)(scene)

    assert face.top * 781 == pytest.approx(600 + 0.13 * 160, abs=6)
    assert face.left * 1000 == pytest.approx(700 + 0.34 * 160, abs=6)


@pytest.mark.parametrize("name", ["tests/photos/ceiling.png", "weights/pocket/photos/chapel.png"])
def test_ornament_is_not_taken_for_faces(pocket: WeightStore, name: str) -> None:
    """Where no face is, the fine scan does not confirm what the coarse one took for one."""
    assert load_detector(pocket)(Image.open(name).convert("RGB").reduce(2)) == []


def test_windows_over_each_other_are_one_face() -> None:
    """The one with the most votes stays; its neighbour at another place does too."""
    found = [
        _Found(17, _Window(10.0, 10.0, 24.0)),
        _Found(22, _Window(12.0, 10.0, 26.0)),
        _Found(18, _Window(12.0, 60.0, 24.0)),
    ]

    assert distinct(found) == [_Window(12.0, 10.0, 26.0), _Window(12.0, 60.0, 24.0)]


def test_boxes_and_masks_have_a_margin_and_stay_inside() -> None:
    """A face at the border: its box is cut there, its mask is 1 in the middle and 0 outside the box."""
    faces = FaceMap([Box(0.0, 0.4, 0.2, 0.6)])

    (box,) = faces.boxes(100, 100)
    mask = faces.mask(100, 100, of=(104, 112))

    assert box == Tile(0, 34, 26, 66) or (box.top, box.bottom) == (0, 25) and box.left in (34, 35)
    assert mask.shape == (1, 1, 104, 112)
    assert mask[0, 0, 12, 50] == 1
    assert mask[..., box.bottom :, :].max() == 0 == mask[..., : box.left].max()


@pytest.mark.parametrize("step", range(4))
def test_no_tile_edge_cuts_a_face(step: int) -> None:
    """Whatever the offset, all weights add to one, and inside the box the box's own tile counts alone."""
    grid = fit_grid(120, 200, max_tile=64, overlap=8)
    offset = grid.jitter(step, 7)
    boxes = [Tile(50, 90, 82, 120), Tile(0, 0, 30, 30), Tile(0, 0, 100, 100)]

    tiles, weights = surround(grid, grid.tiles(*offset), blend_weights(grid, *offset), boxes)

    total = torch.zeros(120, 200)
    for tile, weight in zip(tiles, weights[:, 0], strict=True):
        total[tile.top : tile.bottom, tile.left : tile.right] += weight
    assert torch.allclose(total, torch.ones_like(total), atol=1e-6)
    assert len(tiles) == len(grid.tiles()) + 2  # the third box is larger than a tile
    own, weight = tiles[-2], weights[-2, 0]
    assert (weight[50 - own.top : 82 - own.top, 90 - own.left : 120 - own.left] == 1).all()


def test_one_tile_needs_no_others() -> None:
    """A grid of one tile cuts nothing."""
    grid = fit_grid(40, 40, max_tile=64, overlap=8)

    assert len(surround(grid, grid.tiles(), blend_weights(grid), [Tile(3, 3, 9, 9)])[0]) == 1


@pytest.mark.parametrize("kind", ["euler", "dpmpp_2m"])
def test_protected_latents_start_later(kind: str) -> None:
    """Where the mask is 1 the run follows the clean latents until its own level; elsewhere it is the plain run."""
    sigmas = sigma_ramp(0.5, 10, 0.029, 14.61)
    start, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    plain, protected = NoiseSampler(CONFIG, sigmas, kind), NoiseSampler(CONFIG, sigmas, kind)
    keeping = ProtectingSampler(protected, start, noise, mask, sigmas, until=0.1, kind=kind)
    one, other = plain.start(start, noise), keeping.start(start, noise)
    for step in range(keeping.num_steps):
        shown, _ = plain.model_input(step, one)
        one = plain.advance(step, torch.tanh(shown), one)
        shown, _ = keeping.model_input(step, other)
        other = keeping.advance(step, torch.tanh(shown), other)

    assert torch.allclose(one[..., 4:], other[..., 4:])
    error = [float((sample - start)[..., :4].abs().mean()) for sample in (one, other)]
    assert error[1] < 0.3 * error[0]

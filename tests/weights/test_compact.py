"""Compact: the shape of the network, its file format and how far it looks."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from weights.compact import Compact, load_compact, save_compact
from weights.pocket.blend import blend


def test_both_sides_are_doubled() -> None:
    """A picture of any size comes back twice as high and twice as wide."""
    model = Compact(num_feat=8, num_conv=2)

    enlarged = model(torch.rand(2, 3, 10, 14))

    assert enlarged.shape == (2, 3, 20, 28)


def test_without_a_correction_the_result_is_nearest_enlargement() -> None:
    """What the network computes is added to the picture with each pixel repeated."""
    model = Compact(num_feat=8, num_conv=2)
    torch.nn.init.zeros_(model.body[-1].weight)
    torch.nn.init.zeros_(model.body[-1].bias)
    image = torch.rand(1, 3, 4, 4)

    enlarged = model(image)

    assert torch.equal(enlarged, image.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_parameters_are_named_as_in_the_published_files() -> None:
    """Names are those of SRVGGNetCompact: convolutions and activations numbered in one body."""
    names = set(Compact(num_feat=8, num_conv=1).state_dict())

    assert names == {f"body.{n}.{kind}" for n in (0, 2, 4) for kind in ("weight", "bias")} | {
        "body.1.weight",
        "body.3.weight",
    }


def test_a_saved_network_comes_back_the_same(tmp_path: Path) -> None:
    """Saving and loading changes no value of a result."""
    model = Compact(num_feat=8, num_conv=3).eval()
    image = torch.rand(1, 3, 8, 8)
    save_compact(model, tmp_path)

    loaded = load_compact(tmp_path)

    assert torch.equal(loaded(image), model(image))


def test_half_precision_files_are_loaded_as_float32(tmp_path: Path) -> None:
    """A file may store float16; the network computes in float32 all the same."""
    save_compact(Compact(num_feat=8, num_conv=1), tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file)

    loaded = load_compact(tmp_path)

    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


@pytest.mark.parametrize("num_conv", [0, 2])
def test_it_looks_no_further_than_it_says(num_conv: int) -> None:
    """A change beyond `receptive_px` leaves a pixel's result alone, so tiles with that margin are exact."""
    model = Compact(num_feat=4, num_conv=num_conv).eval()
    image = torch.rand(1, 3, 9, 16)
    changed = image.clone()
    changed[..., model.receptive_px + 1 :] = 0

    first, second = model(image), model(changed)

    assert torch.equal(first[..., :2], second[..., :2])


def test_two_trainings_blend_to_one(tmp_path: Path) -> None:
    """A blend of 0 is the first network, of 1 the second, and in between their weighted mean."""
    networks = [Compact(num_feat=4, num_conv=1), Compact(num_feat=4, num_conv=1)]
    folders = [tmp_path / name for name in ("first", "second")]
    for network, folder in zip(networks, folders, strict=True):
        save_compact(network, folder)

    blend(*folders, 0.25, tmp_path / "out")

    wanted = [0.75 * a + 0.25 * b for a, b in zip(*(network.parameters() for network in networks), strict=True)]
    found = load_compact(tmp_path / "out").parameters()
    assert all(torch.allclose(a, b) for a, b in zip(found, wanted, strict=True))

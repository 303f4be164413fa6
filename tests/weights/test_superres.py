"""Networks load from files under every published naming, and mean the same."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from weights.compact import Compact
from weights.rrdbnet import RRDBNet, UnsuitableNetwork
from weights.superres import find_network, load_network

Tensors = dict[str, Tensor]


def first_clean_up(tensors: Tensors) -> Tensors:
    """ESRGAN's own names after its first clean-up."""
    renames = [
        (r"^body\.", "RRDB_trunk."),
        (r"\.rdb(\d)\.", r".RDB\1."),
        ("^conv_body", "trunk_conv"),
        (r"^conv_up", "upconv"),
        ("^conv_hr", "HRconv"),
    ]
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, target in renames:
            name = re.sub(pattern, target, name)
        renamed[name] = tensor
    return renamed


def numbered(tensors: Tensors) -> Tensors:
    """The names of ESRGAN's first release, as 4x-UltraSharp's file has them."""
    doublings = sum(name.startswith("conv_up") and name.endswith("weight") for name in tensors)
    num_blocks = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("body"))
    layers = {"conv_first": "model.0", "conv_body": f"model.1.sub.{num_blocks}"}
    layers |= {f"conv_up{i}": f"model.{3 * i}" for i in range(1, doublings + 1)}
    layers |= {"conv_hr": f"model.{3 * doublings + 2}", "conv_last": f"model.{3 * doublings + 4}"}
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith("body."):
            renamed[re.sub(r"body\.(\d+)\.rdb(\d)\.conv(\d)\.", r"model.1.sub.\1.RDB\2.conv\3.0.", name)] = tensor
        else:
            layer, kind = name.split(".")
            renamed[f"{layers[layer]}.{kind}"] = tensor
    return renamed


def test_the_published_names_of_ultrasharp_are_reproduced() -> None:
    """The fixture writes what the 4x files of the first release have: layers 0, 1, 3, 6, 8 and 10."""
    names = {re.sub(r"\.(weight|bias)$", "", n) for n in numbered(RRDBNet(num_block=23, num_feat=4).state_dict())}

    assert {name for name in names if "RDB" not in name} == {
        "model.0",
        "model.1.sub.23",
        "model.3",
        "model.6",
        "model.8",
        "model.10",
    }


@pytest.mark.parametrize("naming", [dict, first_clean_up, numbered])
@pytest.mark.parametrize(("num_doublings", "unshuffle"), [(2, 1), (1, 1), (2, 2), (2, 4), (0, 1), (3, 1)])
def test_every_naming_is_the_same_network(
    tmp_path: Path, naming: Callable[[Tensors], Tensors], num_doublings: int, unshuffle: int
) -> None:
    """Old and new keys, every factor: the loaded network makes what the saved one made."""
    model = RRDBNet(num_block=2, num_feat=6, num_grow=4, num_doublings=num_doublings, unshuffle=unshuffle).eval()
    save_file(naming(dict(model.state_dict())), tmp_path / "net.safetensors")
    image = torch.rand(1, 3, 11, 9)

    loaded = load_network(tmp_path / "net.safetensors")

    factor = 2**num_doublings // unshuffle
    assert loaded.upscale == factor
    assert loaded(image).shape == (1, 3, 11 * factor, 9 * factor)
    assert torch.equal(loaded(image), model(image))


@pytest.mark.parametrize("wrapper", [None, "params_ema", "params", "state_dict"])
def test_pickles_of_tensors_load(tmp_path: Path, wrapper: str | None) -> None:
    """`.pth` files are read as tensors alone, out of what training scripts wrap them in; 16 bits become 32."""
    model = RRDBNet(num_block=1, num_feat=4, num_grow=4).eval()
    tensors = {f"module.{name}": tensor.half() for name, tensor in model.state_dict().items()}
    torch.save({wrapper: tensors, "step": 5} if wrapper else tensors, tmp_path / "net.pth")

    loaded = load_network(tmp_path / "net.pth")

    assert next(loaded.parameters()).dtype == torch.float32
    assert torch.allclose(loaded.conv_first.weight, model.conv_first.weight, atol=1e-3)


def test_published_compact_files_load(tmp_path: Path) -> None:
    """realesr-general-x4v3's form: 32 convolutions, factor 4, found from the tensors alone."""
    model = Compact(num_feat=8, num_conv=32, upscale=4).eval()
    torch.save({"params": model.state_dict()}, tmp_path / "realesr-general-x4v3.pth")
    image = torch.rand(1, 3, 7, 5)

    loaded = load_network(tmp_path / "realesr-general-x4v3.pth")

    assert loaded.upscale == 4
    assert torch.equal(loaded(image), model(image))


def test_pickles_with_code_are_refused(tmp_path: Path) -> None:
    """A file that would run something is an error, and runs nothing."""
    torch.save({"params": Path("x")}, tmp_path / "evil.pth")

    with pytest.raises(UnsuitableNetwork, match="more than tensors"):
        load_network(tmp_path / "evil.pth")


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"layers.0.weight": torch.zeros(3)}, "spandrel"),
        ({"body.0.rdb1.conv1.weight": torch.zeros(4, 4, 3, 3)}, "plain RRDB"),
        ({"model.1.sub.0.RDB1.conv1.0.weight": torch.zeros(4, 4, 3, 3)}, "numbered layers"),
    ],
)
def test_other_files_are_refused_in_words(tmp_path: Path, tensors: Tensors, said: str) -> None:
    """What cannot be read says what was expected."""
    save_file(tensors, tmp_path / "net.safetensors")

    with pytest.raises(UnsuitableNetwork, match=said):
        load_network(tmp_path / "net.safetensors")


class FakeDescriptor:
    """spandrel's, of a network whose pictures must have even sides; called, it pads and cuts."""

    scale, input_channels = 2, 3
    model = torch.nn.PixelShuffle(1)

    def __call__(self, image: Tensor) -> Tensor:
        """Doubled."""
        return image.repeat_interleave(2, -1).repeat_interleave(2, -2)


@pytest.mark.parametrize("name", ["layers.0.weight", "body.0.rdb1.conv1.weight"])
def test_other_networks_are_read_through_spandrel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Other architectures and variants of ours, through the call that pads odd sizes."""
    spandrel = ModuleType("spandrel")
    loader = SimpleNamespace(load_from_file=lambda file: FakeDescriptor())
    spandrel.__dict__.update(ModelLoader=lambda device: loader, ImageModelDescriptor=FakeDescriptor)
    monkeypatch.setitem(sys.modules, "spandrel", spandrel)
    save_file({name: torch.zeros(4, 4, 3, 3)}, tmp_path / "net.safetensors")

    network = load_network(tmp_path / "net.safetensors")

    assert network.upscale == 2
    assert network(torch.rand(1, 3, 5, 7)).shape == (1, 3, 10, 14)


def test_a_folder_holds_one_network(tmp_path: Path) -> None:
    """None is none, one is that one, two are a question that the operator has to answer."""
    assert find_network(tmp_path) is None
    (tmp_path / "a.pth").touch()
    assert find_network(tmp_path) == tmp_path / "a.pth"
    (tmp_path / "b.safetensors").touch()
    with pytest.raises(UnsuitableNetwork, match=r"a\.pth, b\.safetensors"):
        find_network(tmp_path)


def rrdb(**sizes: int) -> Tensors:
    """A small RRDB network's tensors."""
    return dict(RRDBNet(num_block=1, num_feat=4, num_grow=4, **sizes).state_dict())


def compact(**sizes: int) -> Tensors:
    """A small Compact network's tensors."""
    return dict(Compact(num_feat=4, num_conv=1, **sizes).state_dict())


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (rrdb() | {"conv_first.weight": torch.zeros(4, 4, 3, 3)}, "3 channels"),
        (rrdb() | {"conv_last.weight": torch.zeros(1, 4, 3, 3)}, "3 channels"),
        (rrdb(unshuffle=4, num_doublings=1), "no whole factor"),
        (rrdb() | {"attention.weight": torch.zeros(1)}, "plain RRDB"),
        (compact(num_in_ch=1, num_out_ch=1), "3 channels"),
        (compact() | {"body.4.weight": torch.zeros(7, 4, 3, 3)}, "3 channels"),
        (compact() | {"body.4.bias": torch.zeros(5)}, "Compact network"),
        ({"body.0.weight": torch.zeros(4)}, "not enough convolutions"),
        ({}, "spandrel"),
    ],
)
def test_networks_for_other_pictures_are_refused(tmp_path: Path, tensors: Tensors, said: str) -> None:
    """Grey or four-channel networks, factors that are no whole number, and tensors that do not fit together."""
    save_file(tensors, tmp_path / "net.safetensors")

    with pytest.raises(UnsuitableNetwork, match=said):
        load_network(tmp_path / "net.safetensors")


@pytest.mark.parametrize("name", ["net.safetensors", "net.pth"])
@pytest.mark.parametrize("content", [b"", b"<!doctype html>", b"PK\3\4 a broken archive", b"\xff" * 64])
def test_damaged_files_are_refused_by_name(tmp_path: Path, name: str, content: bytes) -> None:
    """An empty file, a web page, half an archive, noise: ours is the only exception, and it names the file."""
    (tmp_path / name).write_bytes(content)

    with pytest.raises(UnsuitableNetwork, match=name):
        load_network(tmp_path / name)


def test_a_file_that_breaks_spandrel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever spandrel raises, the error is ours."""

    def fail(file: Path) -> None:
        raise KeyError("unknown")

    spandrel = ModuleType("spandrel")
    spandrel.__dict__.update(
        ModelLoader=lambda device: SimpleNamespace(load_from_file=fail), ImageModelDescriptor=FakeDescriptor
    )
    monkeypatch.setitem(sys.modules, "spandrel", spandrel)
    save_file({"x": torch.zeros(1)}, tmp_path / "net.safetensors")

    with pytest.raises(UnsuitableNetwork, match="no network that spandrel reads"):
        load_network(tmp_path / "net.safetensors")

"""RestoreFormer and RestoreFormer++ load from their published forms and compute what their authors' program does."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from weights.restoreformer import RestoreFormer, load_restorer, restorer_of
from weights.rrdbnet import UnsuitableNetwork

SMALL: dict[str, Any] = {
    "widths": (32, 32, 64),
    "num_blocks": 1,
    "num_codes": 16,
    "code_channels": 8,
    "z_channels": 8,
}
KINDS: dict[str, dict[str, Any]] = {
    "RestoreFormer": {"num_heads": 8, "num_attending": 1},
    "RestoreFormer++": {"num_heads": 4, "num_attending": 2},
}
LAYOUTS = {
    "RestoreFormer": (405, 72_680_003, "b89c5e61fe5f40f385adee5237623f47fa346c711d0c31a3bc4257da34172df4"),
    "RestoreFormer++": (441, 73_472_579, "043ef2d443fe54b905ebcd233a94dd8846f5e472d444094bba724f9140c8706b"),
}
"""Of the authors' program at its published size: tensors, numbers in them, and the hash of all names with shapes."""
RESULTS = {
    "RestoreFormer": (0.14226, 0.40821, 0.83903, 0.35894, -1.02097),
    "RestoreFormer++": (0.15587, 0.45008, 0.17054, 0.11092, -0.28615),
}
"""What the authors' program (wzhouxiff/RestoreFormerPlusPlus, vqvae_arch.py) makes of `sine` with `drawn` tensors:
mean, standard deviation and three values, in -1..1; torch 2.13, CPU."""


def drawn(kind: str) -> dict[str, Tensor]:
    """Tensors of a small network, the same in every program."""
    tensors = RestoreFormer(**SMALL, **KINDS[kind]).state_dict()
    generator = torch.Generator().manual_seed(0)
    for name in sorted(tensors):
        scale = 0.5 if tensors[name].ndim == 1 else tensors[name][0].numel() ** -0.5
        tensors[name] = torch.randn(tensors[name].shape, generator=generator) * scale
    return dict(tensors)


def sine() -> Tensor:
    """A picture (1, 3, 64, 64) in -1..1."""
    return torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64).sin()


@pytest.mark.parametrize("kind", KINDS)
def test_the_layout_is_the_published_one(kind: str) -> None:
    """At full size every tensor has the name and the shape that the published files have."""
    with torch.device("meta"):
        tensors = RestoreFormer(**KINDS[kind]).state_dict()

    listing = "\n".join(f"{name} {tuple(tensor.shape)}" for name, tensor in sorted(tensors.items()))
    numbers = sum(tensor.numel() for tensor in tensors.values())
    assert (len(tensors), numbers, hashlib.sha256(listing.encode()).hexdigest()) == LAYOUTS[kind]
    assert restorer_of(tensors).state_dict().keys() == tensors.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_the_authors_program_does(kind: str) -> None:
    """The same tensors and the same picture give the same result, with the number of heads found from the tensors."""
    with torch.inference_mode():
        made = restorer_of(drawn(kind))((sine() + 1) / 2) * 2 - 1

    seen = (made.mean(), made.std(), made[0, 0, 0, 0], made[0, 1, 31, 17], made[0, 2, 63, 63])
    assert [float(value) for value in seen] == pytest.approx(RESULTS[kind], abs=1e-3)


def as_checkpoint(tensors: dict[str, Tensor], folder: Path) -> Path:
    """What pytorch-lightning 1.0 writes: a prefix, the loss' tensors, and a class as the key of a callback's state."""
    packages = ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint")
    modules = {name: ModuleType(name) for name in packages}
    callback = type("ModelCheckpoint", (), {"__module__": packages[-1]})
    modules[packages[-1]].__dict__["ModelCheckpoint"] = callback
    own = {f"vqvae.{name}": tensor for name, tensor in tensors.items()}
    content = {"state_dict": own | {"loss.discriminator.weight": torch.zeros(3)}, "callbacks": {callback: {"best": 1}}}
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        torch.save(content, folder / "RestoreFormer++.ckpt")
    return folder / "RestoreFormer++.ckpt"


def as_pickle(tensors: dict[str, Tensor], folder: Path) -> Path:
    """As GFPGAN's releases keep it."""
    torch.save({"params_ema": tensors}, folder / "RestoreFormer.pth")
    return folder / "RestoreFormer.pth"


def as_old_pickle(tensors: dict[str, Tensor], folder: Path) -> Path:
    """As torch wrote it before 1.6, not as an archive."""
    torch.save({"params_ema": tensors}, folder / "RestoreFormer.pth", _use_new_zipfile_serialization=False)
    return folder / "RestoreFormer.pth"


def as_safetensors(tensors: dict[str, Tensor], folder: Path) -> Path:
    """Converted, in 16 bits."""
    save_file({name: tensor.half() for name, tensor in tensors.items()}, folder / "a.safetensors")
    return folder / "a.safetensors"


@pytest.mark.parametrize("save", [as_checkpoint, as_pickle, as_old_pickle, as_safetensors])
def test_every_published_form_loads(tmp_path: Path, save: Callable[[dict[str, Tensor], Path], Path]) -> None:
    """A training program's checkpoint, a release's pickle and safetensors are the same network, in 32 bits."""
    tensors = drawn("RestoreFormer++")

    loaded = load_restorer(save(tensors, tmp_path)).state_dict()

    assert "pytorch_lightning" not in sys.modules
    assert loaded.keys() == tensors.keys()
    assert all(torch.allclose(loaded[name], tensors[name], atol=2e-3) for name in tensors)
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x80\x02."])
@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "a.ckpt"])
def test_damaged_files_are_refused_by_name(tmp_path: Path, name: str, content: bytes) -> None:
    """Whatever the damage, the error is ours and names the file."""
    (tmp_path / name).write_bytes(content)

    with pytest.raises(UnsuitableNetwork, match=name):
        load_restorer(tmp_path / name)


def test_other_networks_are_refused(tmp_path: Path) -> None:
    """A network without one of the tensors, and one of another kind."""
    tensors = drawn("RestoreFormer++")
    del tensors["quant_conv.bias"]
    for wrong in (tensors, {"conv.weight": torch.zeros(3, 3, 3, 3)}):
        save_file(wrong, tmp_path / "a.safetensors")
        with pytest.raises(UnsuitableNetwork, match="not those of RestoreFormer"):
            load_restorer(tmp_path / "a.safetensors")


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    """A class or function that a checkpoint names is not called, and a file that wants the system's is refused."""

    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return eval, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    torch.save({"state_dict": drawn("RestoreFormer"), "more": Evil()}, tmp_path / "a.ckpt")
    load_restorer(tmp_path / "a.ckpt")

    assert not (tmp_path / "ran").exists()

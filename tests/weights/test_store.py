"""Which set of weights serves."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from weights.store import CREATIVE_UPSCALER_FILES, WeightsMissing, WeightStore, open_store


def complete(root: Path) -> Path:
    """A folder with every required file, empty."""
    for name in CREATIVE_UPSCALER_FILES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_auto_without_a_gpu_is_the_pocket_set(tmp_path: Path) -> None:
    """A machine without a CUDA device serves the built-in weights, and they are all there."""
    store = open_store("auto", root=tmp_path, has_cuda=False)

    assert (store.name, store.missing()) == ("pocket", [])


def test_a_gpu_never_serves_the_pocket_set_by_accident(tmp_path: Path) -> None:
    """With a CUDA device and no full weights, auto names the missing files instead of falling back."""
    with pytest.raises(WeightsMissing, match="sd15/unet/diffusion_pytorch_model.safetensors") as caught:
        open_store("auto", root=tmp_path, has_cuda=True)

    assert caught.value.files == list(CREATIVE_UPSCALER_FILES)


def test_a_gpu_with_complete_weights_serves_them(tmp_path: Path) -> None:
    """With a CUDA device and every file, auto is the full set."""
    assert open_store("auto", root=complete(tmp_path), has_cuda=True) == WeightStore("full", tmp_path)


def test_one_missing_file_is_named(tmp_path: Path) -> None:
    """The error lists exactly what is missing."""
    (complete(tmp_path) / "vae/config.json").unlink()

    with pytest.raises(WeightsMissing) as caught:
        open_store("full", root=tmp_path, has_cuda=False)

    assert caught.value.files == ["vae/config.json"]


def test_an_unknown_choice_is_refused(tmp_path: Path) -> None:
    """The three choices are named."""
    with pytest.raises(ValueError, match="pocket, full or auto"):
        open_store("tiny", root=tmp_path, has_cuda=False)


def test_digest_names_every_weight_file(tmp_path: Path) -> None:
    """The digest maps each safetensors file to its SHA-256."""
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/model.safetensors").write_bytes(b"weights")

    digest = WeightStore("full", tmp_path).digest()

    assert digest == {"vae/model.safetensors": hashlib.sha256(b"weights").hexdigest()}

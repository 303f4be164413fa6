"""Which set of weights serves."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from weights.catalogue import CRYSTAL, FLUX_VISION, PARTS, needs_of
from weights.lock import LockedFile, LockedPart, write_lock
from weights.store import WeightsMissing, WeightStore, open_store, pull_command

REQUIRED = [f"{name}/{path}" for name in needs_of(CRYSTAL).required for path in PARTS[name].needed]


def complete(root: Path, *folders: str) -> Path:
    """A folder with every required file of some parts, empty."""
    for name in folders or needs_of(CRYSTAL).required:
        for path in PARTS[name].needed:
            (root / name / path).parent.mkdir(parents=True, exist_ok=True)
            (root / name / path).touch()
    return root


def test_auto_without_a_gpu_is_the_pocket_set(tmp_path: Path) -> None:
    """A machine without a CUDA device serves the built-in weights, and they are all there."""
    store = open_store("auto", root=tmp_path, has_cuda=False)

    assert (store.name, store.missing()) == ("pocket", [])


def test_a_gpu_never_serves_the_pocket_set_by_accident(tmp_path: Path) -> None:
    """With a CUDA device and no full weights, auto names the missing files and the command that gets them."""
    with pytest.raises(WeightsMissing, match="sd15/unet/diffusion_pytorch_model.safetensors") as caught:
        open_store("auto", root=tmp_path, has_cuda=True)

    assert caught.value.files == REQUIRED
    assert "`creative-upscaler weights pull`" in str(caught.value)
    assert "`creative-upscaler weights pull fal-ai/creative-upscaler`" in str(caught.value)


def test_a_gpu_with_complete_weights_serves_them(tmp_path: Path) -> None:
    """With a CUDA device and every file, auto is the full set."""
    assert open_store("auto", root=complete(tmp_path), has_cuda=True) == WeightStore("full", tmp_path)


def test_one_missing_file_is_named(tmp_path: Path) -> None:
    """The error lists exactly what is missing."""
    (complete(tmp_path) / "vae/config.json").unlink()

    with pytest.raises(WeightsMissing) as caught:
        open_store("full", root=tmp_path, has_cuda=False)

    assert caught.value.files == ["vae/config.json"]


def test_a_set_for_one_endpoint_serves_it(tmp_path: Path) -> None:
    """Weights of one endpoint are enough to start; what the others lack is known."""
    store = open_store("full", root=complete(tmp_path, "flux2-klein-4b"), has_cuda=False)

    assert store.missing(FLUX_VISION) == []
    assert store.missing(FLUX_VISION, "flux1-dev")
    assert store.missing(CRYSTAL) == REQUIRED
    assert pull_command(CRYSTAL) == "creative-upscaler weights pull clarityai/crystal-upscaler"


def test_half_a_part_is_none(tmp_path: Path) -> None:
    """A folder of which files are missing, shards included, does not count as there."""
    store = WeightStore("full", complete(tmp_path, "captioner"))
    weights = tmp_path / "captioner/model.safetensors"

    assert store.has("captioner")
    weights.unlink()
    assert not store.has("captioner")
    index = weights.with_name("model.safetensors.index.json")
    index.write_text('{"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}')
    (tmp_path / "captioner/model-1-of-2.safetensors").touch()
    assert PARTS["captioner"].missing(tmp_path) == ["captioner/model-2-of-2.safetensors"]
    (tmp_path / "captioner/model-2-of-2.safetensors").touch()
    assert store.has("captioner")


def test_any_network_does_for_a_pre_upscaler(tmp_path: Path) -> None:
    """The operator's own pre-upscaler counts whatever it is called."""
    store = WeightStore("full", tmp_path)

    assert not store.has("upscaler")
    (tmp_path / "upscaler").mkdir()
    (tmp_path / "upscaler/4x-mine.pth").touch()
    assert store.has("upscaler")


def test_an_unknown_choice_is_refused(tmp_path: Path) -> None:
    """The three choices are named."""
    with pytest.raises(ValueError, match="pocket, full or auto"):
        open_store("tiny", root=tmp_path, has_cuda=False)


def test_loaders_can_ask_for_parts_of_the_catalogue_only(tmp_path: Path) -> None:
    """A part that no download could bring is a mistake of ours."""
    store = WeightStore("full", tmp_path)

    assert store.folder("flux1-dev/vae") == tmp_path / "flux1-dev/vae"
    with pytest.raises(AssertionError, match="not in the catalogue"):
        store.folder("captioner-2")


def test_digest_names_every_weight_file(tmp_path: Path) -> None:
    """The digest maps each safetensors file to its SHA-256; the lock file spares reading those that it knows."""
    for name in ("vae", "sd15"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
    known = LockedFile(sha256="known", size_bytes=7, source="")
    part = LockedPart(repository="owner/name", revision=None, license=None, files={"model.safetensors": known})
    write_lock(tmp_path, {"sd15": part})

    digest = WeightStore("full", tmp_path).digest()

    read = hashlib.sha256(b"weights").hexdigest()
    assert digest == {"sd15/model.safetensors": "known", "vae/model.safetensors": read}

"""Models that were carried over, and what is left over."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.weights.hub_server import Repository, git_sha1, serving
from tests.weights.repositories import published
from weights import lock
from weights.carry import bring, leftovers, recognise, remove
from weights.catalogue import PARTS
from weights.listing import Hub
from weights.lock import faults, read_lock
from weights.pull import pull

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
BY_NAME = ("sd15", "safety-checker", "vae", "sdxl", "sdxl/vae", "flux1-dev", "vision-captioner", "controlnet-tile-sdxl")


@pytest.fixture(scope="module")
def repositories() -> Mapping[str, Repository]:
    return published()


def write(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Files in a folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def brought(folder: Path, root: Path) -> tuple[list[str], list[str]]:
    """Import a folder; what failed, and what was said."""
    notes: list[str] = []
    return bring(recognise(folder), root, notes.append, lambda num_bytes: None), notes


def pulled(root: Path, *names: str) -> Path:
    """A set that was pulled somewhere else."""
    with serving(published()) as server:

        class Silent:
            def note(self, text: str) -> None: ...
            def total(self, num_bytes: int, present: int) -> None: ...
            def came(self, num_bytes: int) -> None: ...
            def finished(self, part: object) -> None: ...

        assert pull([PARTS[name] for name in names], root, Hub(server.url, None), Silent()) == []
    return root


def test_a_set_pulled_elsewhere_is_taken_over(tmp_path: Path) -> None:
    """Its lock file goes along: the same revisions, the same hashes."""
    there = pulled(tmp_path / "there", "sd15", "flux2-klein-4b", "sdxl/vae", "controlnet-tile-sd15", "upscaler")

    failures, notes = brought(there, tmp_path / "here")

    assert failures == []
    assert read_lock(tmp_path / "here") == read_lock(there)
    assert list(faults(tmp_path / "here", read_lock(there))) == []
    assert not any("nothing tells" in note for note in notes)
    assert brought(there, tmp_path / "here") == ([], [f"{name}: is there already, kept" for name in recognised(there)])


def recognised(folder: Path) -> list[str]:
    return [found.part.folder for found in recognise(folder)]


def test_a_byte_that_flipped_on_the_way_is_named(tmp_path: Path) -> None:
    """The other parts are taken."""
    there = pulled(tmp_path / "there", "sd15", "vae")
    weights = there / "vae/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01\x02"[:1])

    failures, _ = brought(there, tmp_path / "here")

    assert len(failures) == 1
    assert f"{weights} has changed: SHA-256 is" in failures[0]
    assert set(read_lock(tmp_path / "here")) == {"sd15"}


@pytest.mark.parametrize("layout", ["owner/name", "name", "owner--name"])
def test_repositories_as_they_were_cloned(tmp_path: Path, repositories: Mapping[str, Repository], layout: str) -> None:
    """Folders of repositories are recognised by their names and files, whatever lies between."""
    for name in {PARTS[part].repository for part in BY_NAME}:
        owner, short = name.split("/")
        place = {"owner/name": name, "name": short, "owner--name": f"{owner}--{short}"}[layout]
        write(tmp_path / "usb/models" / place, repositories[name].files)

    failures, _ = brought(tmp_path / "usb", tmp_path / "here")

    assert failures == []
    assert set(BY_NAME) <= set(read_lock(tmp_path / "here"))
    files = repositories[SD15].files
    unet = tmp_path / "here/sd15/unet/diffusion_pytorch_model.safetensors"
    assert unet.read_bytes() == files["unet/diffusion_pytorch_model.fp16.safetensors"]
    own = repositories["stabilityai/sd-vae-ft-mse"].files["diffusion_pytorch_model.safetensors"]
    assert (tmp_path / "here/vae/diffusion_pytorch_model.safetensors").read_bytes() == own
    assert read_lock(tmp_path / "here")["sd15"].revision is None


def test_a_cache_of_huggingface_hub(tmp_path: Path, repositories: Mapping[str, Repository]) -> None:
    """Snapshots tell the commit, and their blobs are called by their hashes."""
    repository = repositories[SD15]
    cache = tmp_path / "hub" / f"models--{SD15.replace('/', '--')}"
    snapshot = cache / "snapshots" / repository.revision
    for name, content in repository.files.items():
        blob = cache / "blobs" / git_sha1(content)
        write(blob.parent, {blob.name: content})
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blob)

    failures, notes = brought(tmp_path / "hub", tmp_path / "here")

    assert failures == []
    assert read_lock(tmp_path / "here")["sd15"].revision == repository.revision
    assert not any("nothing tells" in note for note in notes)
    config = cache / "blobs" / git_sha1(repository.files["scheduler/scheduler_config.json"])
    config.write_bytes(b'{"prediction_type": "v_prediction"}')
    failures, _ = brought(tmp_path / "hub", tmp_path / "elsewhere")
    assert any("scheduler_config.json has changed" in failure for failure in failures)


def test_a_folder_of_another_name_is_known_by_its_configs(
    tmp_path: Path, repositories: Mapping[str, Repository]
) -> None:
    """What a config says tells SDXL from Stable Diffusion 1.5, and one VAE from another."""
    write(tmp_path / "usb/a", repositories["stabilityai/stable-diffusion-xl-base-1.0"].files)
    write(tmp_path / "usb/b", repositories["Falconsai/nsfw_image_detection"].files)
    write(tmp_path / "usb/c", repositories["xinsir/controlnet-tile-sdxl-1.0"].files)

    # A ControlNet's config does not say what it was trained for: its name has to.
    assert recognised(tmp_path / "usb") == ["sdxl", "sdxl/vae", "safety-confirmer"]


def test_damaged_files_are_refused(tmp_path: Path, repositories: Mapping[str, Repository]) -> None:
    """Truncated tensors, and the pointers that Git leaves without LFS, are named."""
    name = "diffusion_pytorch_model.safetensors"
    files = dict(repositories["stabilityai/sd-vae-ft-mse"].files)
    write(tmp_path / "a/sd-vae-ft-mse", files | {name: files[name][:-100]})
    write(tmp_path / "b/sd-vae-ft-mse", files | {name: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"})

    assert name in brought(tmp_path / "a", tmp_path / "here")[0][0]
    assert "git lfs pull" in brought(tmp_path / "b", tmp_path / "here")[0][0]
    assert read_lock(tmp_path / "here") == {}
    assert not list((tmp_path / "here").rglob("*.safetensors"))


def test_what_was_put_there_by_hand_can_be_locked(tmp_path: Path, repositories: Mapping[str, Repository]) -> None:
    """Importing the set's own folder copies nothing and records the hashes."""
    root = tmp_path / "here"
    write(root / "vae", repositories["stabilityai/sd-vae-ft-mse"].files)

    failures, notes = brought(root, root)

    assert failures == []
    assert "they are recorded as they are" in notes[0]
    assert set(read_lock(root)["vae"].files) == {"config.json", "diffusion_pytorch_model.safetensors"}


def test_prune_takes_what_nobody_refers_to(tmp_path: Path) -> None:
    """Strange folders, files beside those that were pulled, old downloads; never what an operator made."""
    root = pulled(tmp_path / "set", "sd15", "sdxl")
    lost = {
        "sd15/unet/diffusion_pytorch_model.fp16.safetensors": b"12345",
        "old-model/weights.safetensors": b"123",
        ".partial/sd15/files/x.part": b"1234",
    }
    kept = {
        "ccsr-v2/ccsr.json": b"{}",
        "face-detector/mine.xml": b"<xml/>",
        "captioner/config.json": b"{}",
        "sdxl/vae/config.json": b"{}",
        ".partial/vae/files/y.part": b"1",
    }
    write(root, lost | kept)

    found = leftovers(root)

    assert {str(each.path.relative_to(root)): each.size_bytes for each in found} == {
        name: len(content) for name, content in lost.items()
    }
    remove(root, found)
    assert not (root / "old-model").exists()
    assert not (root / ".partial/sd15").exists()
    assert all((root / name).is_file() for name in kept)
    assert list(faults(root, read_lock(root))) == []
    assert leftovers(root) == []
    shutil.rmtree(root)


def test_prune_keeps_links_to_another_disk(tmp_path: Path) -> None:
    """A part that was moved to where there is room, with a link in its place, is still there."""
    root = pulled(tmp_path / "set", "sd15")
    (root / "sd15").rename(tmp_path / "large-disk")
    (root / "sd15").symlink_to(tmp_path / "large-disk")

    assert leftovers(root) == []


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails is a fault of the file, and the others are looked at all the same."""
    root = pulled(tmp_path / "set", "vae")
    good = lock.sha256_of

    def failing(path: Path, read: Any) -> str:
        if path.suffix == ".safetensors":
            raise OSError(errno.EIO, "Input/output error")
        return good(path, read)

    monkeypatch.setattr(lock, "sha256_of", failing)

    assert list(faults(root, read_lock(root))) == [
        ("vae/diffusion_pytorch_model.safetensors", "cannot be read: Input/output error")
    ]

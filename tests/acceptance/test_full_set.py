"""From an empty folder to pictures of every endpoint: the full set is pulled, then served without a network.

The repositories have the published names and layouts; in them are the networks of the pocket set and tiny random ones.
"""

from __future__ import annotations

import ctypes
import io
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save
from transformers import Qwen3Config, Qwen3ForCausalLM

from pipelines.flux2 import TEXT_LAYERS, Flux2
from server.endpoints import ENDPOINTS
from server.settings import Settings
from server.slot import PIPELINES, LocalRun
from tests.conftest import png_bytes
from tests.pipelines.test_caption_vlm import save_qwen
from tests.pipelines.test_flux2 import family, vae  # noqa: F401  # fixtures
from tests.weights.hub_server import Repository, serving
from tests.weights.test_convert import SMALL, small_checkpoint
from tests.weights.test_pull import Told
from weights import placing
from weights.catalogue import CLARITY, CREATIVE, CRYSTAL, FLUX_VISION, PARTS, Part, needs_of, parts_for
from weights.convert import convert_ccsr_v1
from weights.listing import Hub
from weights.lock import read_lock
from weights.pull import pull
from weights.store import POCKET_FOLDER

IN_OPEN = 0x20
FAMILIES = {"sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5", "sdxl": "stabilityai/stable-diffusion-xl-base-1.0"}
SINGLE = {
    "vae": "stabilityai/sd-vae-ft-mse",
    "controlnet-tile-sdxl": "xinsir/controlnet-tile-sdxl-1.0",
    "controlnet-upscaler-flux": "jasperai/Flux.1-dev-Controlnet-Upscaler",
    "captioner": "Salesforce/blip2-flan-t5-xl",
    "safety-confirmer": "Falconsai/nsfw_image_detection",
}


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def in_half(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same repository with its tensors under the names that half precision has."""
    return {name.replace(".safetensors", ".fp16.safetensors"): content for name, content in files.items()}


def repositories(folder: Path, flux2: Flux2, flux2_vae: Any) -> dict[str, Repository]:
    """The catalogue's repositories, as they are published."""
    pocket = {path.name: files_of(path) for path in POCKET_FOLDER.iterdir()}
    found = {name: Repository(dict(pocket[part])) for part, name in SINGLE.items()}
    for part, name in FAMILIES.items():
        found[name] = Repository(in_half(pocket[part]))
    checker = pocket["safety-checker"]
    found[FAMILIES["sd15"]].files |= {
        "safety_checker/config.json": checker["config.json"],
        "safety_checker/model.safetensors": checker["model.safetensors"],
        "feature_extractor/preprocessor_config.json": checker["preprocessor_config.json"],
    }
    found["madebyollin/sdxl-vae-fp16-fix"] = Repository(dict(pocket["vae"]))
    pickle = io.BytesIO()
    torch.save(load_file(POCKET_FOLDER / "controlnet-tile-sd15/diffusion_pytorch_model.safetensors"), pickle)
    found["lllyasviel/control_v11f1e_sd15_tile"] = Repository(
        {
            "config.json": pocket["controlnet-tile-sd15"]["config.json"],
            "diffusion_pytorch_model.bin": pickle.getvalue(),
        }
    )
    found["Comfy-Org/Real-ESRGAN_repackaged"] = Repository(
        {"RealESRGAN_x4plus.safetensors": pocket["upscaler-compact-x2"]["model.safetensors"]}
    )
    found["Kijai/ccsr-safetensors"] = Repository({"real-world_ccsr-fp16.safetensors": save(small_checkpoint())})
    own_vae = {f"vae/{name}": content for name, content in pocket["vae"].items()}
    found["black-forest-labs/FLUX.1-dev"] = Repository(pocket["flux"] | own_vae, gated=True)
    save_qwen(folder / "qwen")
    found["Qwen/Qwen3-VL-2B-Instruct"] = Repository(files_of(folder / "qwen"))
    config = flux2.text_encoder.config.to_dict() | {"num_hidden_layers": max(TEXT_LAYERS) + 1, "layer_types": None}
    Qwen3ForCausalLM(Qwen3Config(**config)).save_pretrained(folder / "klein/text_encoder")
    flux2.transformer.save_pretrained(folder / "klein/transformer")
    flux2.tokenizer.save_pretrained(folder / "klein/tokenizer")
    flux2_vae.save_pretrained(folder / "klein/vae")
    scheduler = pocket["flux"]["scheduler/scheduler_config.json"]
    klein = {"scheduler/scheduler_config.json": scheduler, "flux-2-klein-4b.safetensors": b"not wanted"}
    found["black-forest-labs/FLUX.2-klein-4B"] = Repository(files_of(folder / "klein") | klein)
    return found


@pytest.fixture(scope="module")
def full_set(
    tmp_path_factory: pytest.TempPathFactory,
    family: Flux2,  # noqa: F811
    vae: Any,  # noqa: F811
) -> Path:
    """The full set of every endpoint and profile, pulled."""

    def convert(part: Part, files: list[Path], made: Path, poll: object) -> Path:
        convert_ccsr_v1(files[0], made, dtype=torch.float32, architecture=SMALL)
        return made

    root = tmp_path_factory.mktemp("full")
    published = repositories(tmp_path_factory.mktemp("published"), family, vae)
    with serving(published) as hub, pytest.MonkeyPatch.context() as patch:
        # The published checkpoint's architecture takes gigabytes.
        patch.setattr(placing, "_converted", convert)
        hub.tokens = {"hf_token"}
        parts = {part.folder: part for profile in ("flux1-dev", "flux2-klein-4b") for part in parts_for((), profile)}
        assert set(parts) == set(PARTS)
        assert pull(list(parts.values()), root, Hub(hub.url, "hf_token"), Told()) == []
    return root


@contextmanager
def watched(root: Path) -> Iterator[set[str]]:
    """The files in a folder that are opened until the end of the block, by their path from there (Linux' inotify)."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(os.O_NONBLOCK)
    folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
    places = {libc.inotify_add_watch(descriptor, os.fsencode(folder), IN_OPEN): folder for folder in folders}
    opened: set[str] = set()
    try:
        yield opened
        while True:
            try:
                events = os.read(descriptor, 2**16)
            except BlockingIOError:
                break
            while events:
                place, _, _, length = struct.unpack_from("iIII", events)
                path = places[place] / events[16 : 16 + length].rstrip(b"\0").decode()
                events = events[16 + length :]
                if path.is_file():
                    opened.add(str(path.relative_to(root)))
    finally:
        os.close(descriptor)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks for a network is told that there is none."""

    def refuse(*arguments: object, **_: object) -> None:
        raise AssertionError(f"the network was asked for: {arguments}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def settings(root: Path, data: Path, profile: str) -> Settings:
    return Settings(
        data=data,
        weights="full",
        weights_dir=root,
        flux_profile=profile,
        accept_flux1_dev_license=profile == "flux1-dev",
    )


REQUESTS: dict[str, list[dict[str, Any]]] = {
    CREATIVE: [
        {"scale": 1.5, "num_inference_steps": 2, "creativity": 0.9, "skip_ccsr": False, "model_type": "SD_1_5"},
        {"scale": 1.5, "num_inference_steps": 2, "creativity": 0.9, "model_type": "SDXL", "prompt": "a face"},
    ],
    CLARITY: [{"upscale_factor": 1.5, "num_inference_steps": 4}],
    CRYSTAL: [{"scale_factor": 1.5, "creativity": 3}],
    FLUX_VISION: [{"upscale_factor": 1.5, "steps": 4, "creativity": 0.5}],
}


@pytest.mark.parametrize(
    ("endpoint", "profile"),
    [(name, "flux2-klein-4b") for name in (CREATIVE, CLARITY, CRYSTAL, FLUX_VISION)] + [(FLUX_VISION, "flux1-dev")],
)
@pytest.mark.usefixtures("offline")
def test_what_was_pulled_is_what_is_opened(
    full_set: Path, tmp_path: Path, photo_crop: Image.Image, endpoint: str, profile: str
) -> None:
    """Without a network an endpoint makes its pictures, and opens all weights that it names, and no others."""
    parts = read_lock(full_set)
    wanted = {f"{name}/{path}" for name in needs_of(endpoint, profile).all for path in parts[name].files}
    # crystal-upscaler redraws no picture whose shorter side is at most 256 px.
    image = photo_crop.resize((264, 260)) if endpoint == CRYSTAL else photo_crop.resize((64, 48))
    model = ENDPOINTS[endpoint]

    with watched(full_set) as opened:
        run = LocalRun(
            settings(full_set, tmp_path, profile), device="cpu", pipelines={model.pipeline: PIPELINES[model.pipeline]}
        )
        for number, fields in enumerate(REQUESTS[endpoint]):
            job = model.job(model.parse({"image_url": "http://not.asked/for.png", **fields}))
            made = run.make(job, png_bytes(image), tmp_path / f"{number}.png", lambda report: None)
            assert (made.width, made.height) == (image.width * 1.5, image.height * 1.5)

    tensors = {name for name in wanted if name.endswith(".safetensors")}
    assert {name for name in opened if name.endswith(".safetensors")} == tensors
    assert opened <= wanted | {"weights.lock.json"}

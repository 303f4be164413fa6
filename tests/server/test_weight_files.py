"""Weights that callers bring, on their way to the pipeline: what is refused, in fal's words, and what is kept."""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import SecretStr
from safetensors.torch import save

from server.endpoints import ENDPOINTS
from server.engine import Work
from server.ledger import NewLog, Outcome
from server.settings import Settings
from server.slot import SlotHost
from server.storage import Storage, input_key, upload_key
from server.weight_files import FileRefused, WeightFiles
from tests.server.fake_pipeline import PIPELINES
from tests.weights.file_server import FileServer, Page, serving
from weights.fetch import WeightFile
from weights.hub import BaseFiles

STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
LORA = save({f"{STEM}.lora_down.weight": torch.ones(4, 768), f"{STEM}.lora_up.weight": torch.ones(320, 4)})
SDXL_LORA = save({f"{STEM}.lora_down.weight": torch.ones(4, 2048), f"{STEM}.lora_up.weight": torch.ones(640, 4)})
WORD = save({"emb_params": torch.ones(2, 768)})
BASE = save({"model.diffusion_model.out.2.weight": torch.ones(4, 4)})
SDXL_BASE = save(
    {
        "model.diffusion_model.out.2.weight": torch.ones(4, 4),
        "conditioner.embedders.1.model.ln_final.weight": torch.ones(4),
    }
)


@pytest.fixture
def files() -> Iterator[FileServer]:
    pages = {"/lora.safetensors": Page(LORA, etag='"1"'), "/sdxl.safetensors": Page(SDXL_LORA)}
    with serving(pages | {"/word.safetensors": Page(WORD), "/base.safetensors": Page(BASE)}) as files:
        yield files


@pytest.fixture
def settings(tmp_path: Path, files: FileServer) -> Settings:
    settings = Settings(
        data=tmp_path / "data",
        weights="pocket",
        fetch_allow_hosts=[files.address],
        hub_url=f"http://{files.address}",
        max_weights_mb=1,
    )
    settings.make_folders()
    return settings


@pytest.fixture
def host(settings: Settings, tmp_path: Path) -> SlotHost:
    storage = Storage.open(settings)
    picture = io.BytesIO()
    Image.new("RGB", (16, 12), "teal").save(picture, "PNG")
    storage._put("in/picture", picture.getvalue())
    host = SlotHost(settings, storage, tmp_path, device="cpu", pipelines=PIPELINES)
    host.load()
    return host


def run(host: SlotHost, is_cancelled: Callable[[], bool] = lambda: False, **fields: Any) -> tuple[Outcome, list[str]]:
    """What a request with these fields ends in, and the lines of its log."""
    endpoint = ENDPOINTS["fal-ai/creative-upscaler"]
    payload = {"image_url": "blob:in/picture", "prompt": "a cat", "num_inference_steps": 1} | fields
    job = dict(endpoint.job(endpoint.parse(payload)))
    lines: list[NewLog] = []
    work = Work(request_id="r1", endpoint=endpoint.id, token="t1", job=job)
    return host.run(work, lines.append, is_cancelled), [line.message for line in lines]


def kept(settings: Settings) -> list[Path]:
    """Files of weights on disk, complete or not."""
    folder = settings.fetched_weights_dir
    return [path for part in ("blobs", "partial") for path in (folder / part).rglob("*") if path.is_file()]


def lying(entry: dict[str, Any], data: bytes = b"1234") -> bytes:
    header = json.dumps({"lora_unet_conv_in.lora_down.weight": entry}).encode()
    return len(header).to_bytes(8, "little") + header + data


class Malicious:
    """A pickle of this makes a folder when it is read without care."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, ("executed",)


BAD: dict[str, tuple[bytes, str]] = {
    "other family": (SDXL_LORA, "is a LoRA for SDXL; the model_type of this request is SD_1_5"),
    "truncated": (LORA[:-100], "is cut off"),
    "web page": (b"<!DOCTYPE html><html><title>Sign in</title></html>" + b" " * 100, "is a web page"),
    "pickle": (pickle.dumps(Malicious(), protocol=2) + b"0" * 100, "is a pickle"),
    "lying offsets": (lying({"dtype": "F32", "shape": [1], "data_offsets": [100, 104]}), "lies about where"),
    "10 GB tensor": (lying({"dtype": "F32", "shape": [2684354560], "data_offsets": [0, 10 * 2**30]}), "is cut off"),
    "10 GB header": ((10 * 2**30).to_bytes(8, "little") + b"{" + b" " * 100, "is not a safetensors file"),
    "embedding": (WORD, "is a textual inversion embedding"),
    "LoHa": (save({f"{STEM}.hada_w1_a": torch.ones(4, 4)}), "of the kind LoHa"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_a_422_with_the_reason(
    host: SlotHost, settings: Settings, files: FileServer, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The field is named, nothing in the file is run, and nothing of it is kept."""
    monkeypatch.chdir(tmp_path)
    body, reason = BAD[kind]
    files.pages["/bad.safetensors"] = Page(body)

    outcome, _ = run(host, additional_lora_url=files.url("/bad.safetensors"))

    (item,) = outcome.body["detail"]
    assert (outcome.status, item["type"], item["loc"]) == (422, "value_error", ["body", "additional_lora_url"])
    assert reason in item["msg"]
    assert kept(settings) == [] and not (tmp_path / "executed").exists()
    assert run(host)[0].status == 200


@pytest.mark.parametrize(
    ("field", "path", "type"),
    [
        ("additional_lora_url", "/missing.safetensors", "file_download_error"),
        ("additional_embedding_url", "/missing.safetensors", "file_download_error"),
        ("base_model_url", "/missing.safetensors", "file_download_error"),
        ("additional_lora_url", "/huge.safetensors", "file_too_large"),
        ("additional_embedding_url", "/lora.safetensors", "value_error"),
        ("base_model_url", "/lora.safetensors", "value_error"),
        ("base_model_url", "/sdxl_base.safetensors", "value_error"),
    ],
)
def test_faults_point_at_their_field(host: SlotHost, files: FileServer, field: str, path: str, type: str) -> None:
    """Downloads that fail and files of another kind, for each of the three fields."""
    files.pages["/huge.safetensors"] = Page(b"0" * (2**20 + 1))
    files.pages["/sdxl_base.safetensors"] = Page(SDXL_BASE)

    outcome, _ = run(host, **{field: files.url(path)})

    (item,) = outcome.body["detail"]
    assert (outcome.status, item["type"], item["loc"]) == (422, type, ["body", field])


def test_private_addresses_stay_out_of_reach(host: SlotHost, files: FileServer, settings: Settings) -> None:
    """Unless the operator names them; the message says how."""
    outcome, _ = run(host, additional_lora_url="http://127.0.0.1:1/lora.safetensors")

    assert outcome.error_type == "file_download_error" and "UPSCALER_FETCH_ALLOW_HOSTS" in str(outcome.error)


def test_good_files_reach_the_pipeline(settings: Settings, files: FileServer) -> None:
    """By parameter, with the name that they have where they came from."""
    weights = WeightFiles(settings, Storage.open(settings))
    wanted = {
        "lora": files.url("/lora.safetensors"),
        "embedding": files.url("/word.safetensors"),
        "base_model": files.url("/base.safetensors"),
    }

    found = weights.get(wanted, "SD_1_5", lambda: None)

    lora, word, base = found["lora"], found["embedding"], found["base_model"]
    assert isinstance(lora, WeightFile) and lora.path.read_bytes() == LORA
    assert isinstance(word, WeightFile) and word.stem == "word"
    assert isinstance(base, BaseFiles) and base.files["checkpoint"].path.read_bytes() == BASE


def test_uploads_take_the_same_way(settings: Settings, files: FileServer) -> None:
    """A file that the caller uploaded here is read from the store, under the name it was uploaded with."""
    storage = Storage.open(settings)
    key = upload_key("my-word.safetensors")
    storage._put(key, WORD)
    weights = WeightFiles(settings, storage)

    for _ in range(2):
        word = weights.get({"embedding": f"blob:{key}"}, "SD_1_5", lambda: None)["embedding"]
        assert isinstance(word, WeightFile) and (word.stem, word.path.read_bytes()) == ("my-word", WORD)
    storage._put(input_key(WORD), WORD)
    unnamed = weights.get({"embedding": f"blob:{input_key(WORD)}"}, "SD_1_5", lambda: None)["embedding"]
    assert isinstance(unnamed, WeightFile) and unnamed.stem == "embedding"  # it came as a data URI
    with pytest.raises(FileRefused):
        weights.get({"embedding": f"blob:{upload_key('gone.safetensors')}"}, "SD_1_5", lambda: None)


UNET = {"down_blocks.0.resnets.0.conv1.weight": torch.ones(4, 4, 3, 3), "conv_in.weight": torch.ones(4, 4, 3, 3)}
PARTS = ["unet/diffusion_pytorch_model", "text_encoder/model", "vae/diffusion_pytorch_model"]


def publish(files: FileServer, pages: dict[str, bytes], *, at: str = "main", name: str = "owner/name") -> None:
    """Put a repository on the hub: its list of files, and the files."""
    listing = {"siblings": [{"rfilename": path} for path in pages]}
    quoted = at.replace("/", "%2F")
    files.pages[f"/api/models/{name}" + ("" if at == "main" else f"/revision/{quoted}")] = Page(
        json.dumps(listing).encode()
    )
    files.pages |= {f"/{name}/resolve/{quoted}/{path}": Page(body) for path, body in pages.items()}


def found_base(settings: Settings, reference: str, family: str = "SD_1_5") -> BaseFiles:
    base = WeightFiles(settings, Storage.open(settings)).get({"base_model": reference}, family, lambda: None)
    assert isinstance(base["base_model"], BaseFiles)
    return base["base_model"]


def test_a_repository_is_read_part_by_part(settings: Settings, files: FileServer) -> None:
    """From a hub, by owner/name or by the address of its page: safetensors of every part, and nothing else."""
    parts = {f"{PARTS[0]}.safetensors": save(UNET), f"{PARTS[1]}.safetensors": WORD}
    publish(files, {**parts, f"{PARTS[0]}.bin": b"", "x.ckpt": b"", "single.safetensors": BASE})

    for reference in ("owner/name", files.url("/owner/name"), files.url("/owner/name/tree/main")):
        assert set(found_base(settings, reference).files) == {"unet", "text_encoder"}
    single = found_base(settings, files.url("/owner/name/blob/main/single.safetensors"))

    assert set(single.files) == {"checkpoint"}
    assert not any(path.endswith((".bin", ".ckpt")) for path, _ in files.seen)


@pytest.mark.parametrize("kind", ["blob", "resolve"])
@pytest.mark.parametrize("parameter", ["lora", "base_model"])
def test_addresses_of_the_public_hub_lead_to_its_mirror(
    settings: Settings, files: FileServer, kind: str, parameter: str
) -> None:
    """A page about a file means the file, and where a mirror serves, nothing else is asked."""
    files.pages["/owner/name/resolve/main/a%20b.safetensors"] = Page(LORA if parameter == "lora" else BASE)
    page = f"https://huggingface.co/owner/name/{kind}/main/a%20b.safetensors?download=true"

    found = WeightFiles(settings, Storage.open(settings)).get({parameter: page}, "SD_1_5", lambda: None)[parameter]

    assert found.name == "a b.safetensors"


LAYOUTS: dict[str, tuple[str, str, dict[str, bytes], dict[str, int]]] = {
    "half precision": (
        "owner/name",
        "main",
        {f"{part}.fp16.safetensors": save(UNET) for part in PARTS},
        {"unet": 1, "text_encoder": 1, "vae": 1},
    ),
    "a tag": ("owner/name@v1.0", "v1.0", {f"{PARTS[0]}.safetensors": save(UNET)}, {"unet": 1}),
    "a branch": ("owner/name@refs/pr/7", "refs/pr/7", {f"{PARTS[0]}.safetensors": save(UNET)}, {"unet": 1}),
    "a page of a branch": (
        "{hub}/owner/name/tree/refs%2Fpr%2F7",
        "refs/pr/7",
        {f"{PARTS[0]}.safetensors": save(UNET)},
        {"unet": 1},
    ),
    "a folder": ("{hub}/owner/name/tree/dev/sd", "dev", {f"sd/{PARTS[0]}.safetensors": save(UNET)}, {"unet": 1}),
    "shards": (
        "owner/name",
        "main",
        {f"{PARTS[0]}-0000{n}-of-00003.safetensors": save({f"{n}": torch.ones(1)} | UNET) for n in (1, 2, 3)}
        | {f"{PARTS[0]}.safetensors.index.json": b"{}"},
        {"unet": 3},
    ),
    "shards in half precision": (
        "owner/name",
        "main",
        {f"{PARTS[0]}.fp16-0000{n}-of-00002.safetensors": save({f"{n}": torch.ones(1)} | UNET) for n in (1, 2)},
        {"unet": 2},
    ),
    "a UNet alone": ("owner/name", "main", {"diffusion_pytorch_model.safetensors": save(UNET)}, {"unet": 1}),
    "a checkpoint alone": ("owner/name", "main", {"dream.safetensors": BASE, "README.md": b""}, {"checkpoint": 1}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_repositories_lie_in_many_ways(settings: Settings, files: FileServer, layout: str) -> None:
    """Variants, revisions, folders and shards as they are on hubs."""
    reference, revision, pages, parts = LAYOUTS[layout]
    publish(files, pages, at=revision)

    base = found_base(settings, reference.format(hub=settings.hub))

    assert {part: len(base.of(part)) for part in base.files} == parts
    assert len({file.sha256 for file in base.all().values()}) == len(
        {pages[path] for path in pages if "json" not in path and "README" not in path}
    )


REFUSED: dict[str, tuple[dict[str, bytes], str]] = {
    "pickles": ({"unet/diffusion_pytorch_model.bin": b"", "v1.ckpt": b""}, "pickles only"),
    "Flux": (
        {"transformer/x.safetensors": b"", "model_index.json": b'{"_class_name": "FluxPipeline"}'},
        "of FluxPipeline, not of Stable Diffusion 1.5 or SDXL",
    ),
    "SDXL": ({f"{PARTS[0]}.safetensors": b"", "unet/config.json": b'{"cross_attention_dim": 2048}'}, "for SDXL; the"),
    "SD 2": (
        {f"{PARTS[0]}.safetensors": b"", "unet/config.json": b'{"cross_attention_dim": 1024}'},
        "Diffusion 2; the",
    ),
    "inpainting": ({f"{PARTS[0]}.safetensors": b"", "unet/config.json": b'{"in_channels": 9}'}, "for inpainting"),
    "ControlNet": (
        {"diffusion_pytorch_model.safetensors": save({"controlnet_cond_embedding.conv_in.weight": torch.ones(1)})},
        "is a ControlNet, not a UNet",
    ),
    "several": ({"a.safetensors": b"", "b.safetensors": b""}, r"several checkpoints \(a.safetensors, b.safetensors\)"),
    "a shard is missing": ({f"{PARTS[0]}-00001-of-00002.safetensors": b""}, "is missing"),
    "nothing": ({"README.md": b""}, "not in diffusers' folder layout"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_repository_of_no_use_is_refused_by_name(settings: Settings, files: FileServer, kind: str) -> None:
    """What it is, or what it lacks, before its gigabytes are fetched."""
    pages, reason = REFUSED[kind]
    publish(files, pages)

    with pytest.raises(FileRefused, match=reason):
        found_base(settings, "owner/name")

    assert not any(path.endswith(("unet/diffusion_pytorch_model.safetensors", ".bin")) for path, _ in files.seen)


def test_a_gated_repository_is_opened_with_its_token(
    settings: Settings, files: FileServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The hub sees it, the host that it redirects to does not, and no message or log has it."""
    caplog.set_level("DEBUG")
    gated = settings.model_copy(update={"fetch_tokens": {files.address: SecretStr("hf_hush")}})
    with serving({"/blob": Page(save(UNET))}) as elsewhere:
        gated = gated.model_copy(update={"fetch_allow_hosts": [files.address, elsewhere.address]})
        publish(files, {f"{PARTS[0]}.safetensors": b""})
        files.pages[f"/owner/name/resolve/main/{PARTS[0]}.safetensors"] = Page(
            status=302, headers={"Location": elsewhere.url("/blob")}
        )

        found_base(gated, "owner/name")
        files.pages.clear()
        files.pages["/api/models/owner/other"] = Page(status=403)
        with pytest.raises(FileRefused, match="UPSCALER_FETCH_TOKENS") as caught:
            found_base(gated, "owner/other")

        assert {headers.get("authorization") for _, headers in files.seen} == {"Bearer hf_hush"}
        assert all("authorization" not in headers for _, headers in elsewhere.seen) and elsewhere.seen
    assert "hush" not in caplog.text + str(caught.value) + repr(gated)


def test_the_operators_own_base_models_have_names(settings: Settings) -> None:
    """A name is a file or folder that the operator put there, and cannot lead out of that folder."""
    settings.base_models_dir.mkdir(parents=True)
    (settings.base_models_dir / "photo.safetensors").write_bytes(BASE)
    weights = WeightFiles(settings, Storage.open(settings))

    base = weights.get({"base_model": "photo"}, "SD_1_5", lambda: None)["base_model"]

    assert isinstance(base, BaseFiles) and base.files["checkpoint"].path.read_bytes() == BASE
    for name in ("unknown", "../photo", "..", "/etc/passwd"):
        with pytest.raises(FileRefused):
            weights.get({"base_model": name}, "SD_1_5", lambda: None)


def test_a_path_is_a_file_for_the_command_line_only(settings: Settings, tmp_path: Path) -> None:
    """Who sits at the machine may name files on it; callers of the server may not."""
    (tmp_path / "lora.safetensors").write_bytes(LORA)
    (tmp_path / "word.safetensors").write_bytes(WORD)
    wanted = {"lora": str(tmp_path / "lora.safetensors")}
    local = WeightFiles(settings, Storage.open(settings), reads_disk=True)

    found = local.get(wanted, "SD_1_5", lambda: None)["lora"]

    assert isinstance(found, WeightFile) and found.stem == "lora"
    with pytest.raises(FileRefused):
        local.get({"lora": str(tmp_path / "word.safetensors")}, "SD_1_5", lambda: None)
    with pytest.raises(FileRefused):
        WeightFiles(settings, Storage.open(settings)).get(wanted, "SD_1_5", lambda: None)


def test_what_a_request_uses_is_not_evicted_while_it_runs(
    host: SlotHost, settings: Settings, files: FileServer
) -> None:
    """Between the download and the moment when a file is read, another slot may need all the room there is."""
    tiny = settings.model_copy(update={"weights_cache_gb": 1.5 * len(LORA) / 2**30})
    others = WeightFiles(tiny, Storage.open(settings))
    blobs = settings.fetched_weights_dir / "blobs"
    during: list[int] = []

    def emit(line: NewLog) -> None:
        if line.message.startswith("denoise 1/"):
            others.get({"embedding": files.url("/word.safetensors")}, "SD_1_5", lambda: None)
            others.get({"lora": files.url("/larger.safetensors")}, "SD_1_5", lambda: None)
            during.append(sum(path.read_bytes() == LORA for path in blobs.rglob("*.safetensors")))

    larger = {f"{STEM}.lora_down.weight": torch.zeros(4, 768), f"{STEM}.lora_up.weight": torch.ones(320, 4)}
    files.pages["/larger.safetensors"] = Page(save(larger))
    endpoint = ENDPOINTS["fal-ai/creative-upscaler"]
    payload = {"image_url": "blob:in/picture", "num_inference_steps": 1, "prompt": "a cat"}
    payload["additional_lora_url"] = files.url("/lora.safetensors")
    job = dict(endpoint.job(endpoint.parse(payload)))

    outcome = host.run(Work(request_id="r1", endpoint=endpoint.id, token="t1", job=job), emit, lambda: False)
    others.get({"lora": files.url("/larger.safetensors?again")}, "SD_1_5", lambda: None)

    assert outcome.status == 200 and during == [1]
    assert not any(path.read_bytes() == LORA for path in blobs.rglob("*.safetensors"))


def test_a_download_ends_when_the_request_is_cancelled(host: SlotHost, files: FileServer) -> None:
    """Nobody waits for gigabytes that nobody wants any more."""
    asked = 0

    def is_cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked > 3

    outcome, lines = run(host, is_cancelled, additional_lora_url=files.url("/lora.safetensors"))

    assert outcome.error_type == "client_cancelled"
    assert any("fetching the weights" in line for line in lines)

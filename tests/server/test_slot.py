"""A slot turns a job into a stored picture and an answer in fal's words, whatever happens on the way."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from pipelines.errors import ImageTooSmall, InvalidParams, NonFiniteResult, UnsupportedImageFormat
from pipelines.progress import Report
from server.endpoints import ENDPOINTS
from server.engine import Work
from server.engine.local import preview_path
from server.inputs import FileTooLarge
from server.ledger import NewLog, Outcome
from server.settings import Settings
from server.slot import (
    DeviceUnusable,
    Diary,
    LocalRun,
    NotMade,
    PreviewFile,
    SlotHost,
    line_of,
    memory_of,
    outcome_of,
)
from server.storage import Storage
from tests.server.fake_pipeline import PIPELINES
from weights.store import WeightStore

ENDPOINT = "fal-ai/creative-upscaler"


def png(width: int = 16, height: int = 12) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(file, "PNG")
    return file.getvalue()


def work(image_url: str = "blob:in/picture", **fields: Any) -> Work:
    endpoint = ENDPOINTS[ENDPOINT]
    payload = {"image_url": image_url, "prompt": "a cat", "seed": 5, "num_inference_steps": 3} | fields
    return Work(request_id="r1", endpoint=ENDPOINT, token="t1", job=dict(endpoint.job(endpoint.parse(payload))))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    settings = Settings(data=tmp_path / "data", weights="pocket")
    settings.make_folders()
    return settings


@pytest.fixture
def host(settings: Settings, tmp_path: Path) -> SlotHost:
    storage = Storage.open(settings)
    storage._put("in/picture", png())
    host = SlotHost(settings, storage, tmp_path, device="cpu", pipelines=PIPELINES)
    host.load()
    assert set(host.report().serves) == set(PIPELINES)
    return host


def run(host: SlotHost, task: Work, cancel_after: int = 10**9) -> tuple[Outcome, list[NewLog]]:
    lines: list[NewLog] = []
    outcome = host.run(task, lines.append, lambda: len(lines) >= cancel_after)
    return outcome, lines


def test_a_job_becomes_a_stored_picture_and_fals_answer(host: SlotHost, settings: Settings, tmp_path: Path) -> None:
    """The answer names the stored file, whose bytes are the picture; nothing else is left behind."""
    outcome, _ = run(host, work())

    image = outcome.body["image"]
    stored = Storage.open(settings).read(image["url"].removeprefix("blob:"))
    assert (outcome.status, outcome.body["seed"], image["content_type"]) == (200, 5, "image/png")
    assert (image["width"], image["height"], image["file_size"]) == (32, 24, len(stored))
    assert Image.open(io.BytesIO(stored)).size == (32, 24)
    assert outcome.blobs == (image["url"].removeprefix("blob:"),)
    assert outcome.headers["X-Fal-Served-From"].endswith(" weights")
    assert outcome.inference_s is not None and outcome.inference_s > 0
    assert list(tmp_path.glob("*.png")) == []


def test_the_log_tells_weights_steps_and_seconds(host: SlotHost) -> None:
    """The caller reads which weights served, how far it is and how long each stage took."""
    _, lines = run(host, work())

    messages = [line.message for line in lines]
    assert "pocket weights on CPU" in messages[0]
    assert "denoise 3/3" in messages
    assert any(message.startswith("png done in ") for message in messages)


def test_a_cancelled_run_stops_at_the_next_step(host: SlotHost) -> None:
    """A cancelled request ends in fal's words before its work is done."""
    outcome, lines = run(host, work(num_inference_steps=200), cancel_after=5)

    assert (outcome.status, outcome.error_type) == (499, "client_cancelled")
    assert not any("200/200" in line.message for line in lines)


@pytest.mark.parametrize(
    ("data", "type"),
    [
        (b"not a picture", "image_load_error"),
        (png()[:40], "image_load_error"),
        (png(5000, 1), "image_too_large"),
    ],
)
def test_bad_pictures_are_fals_errors(host: SlotHost, settings: Settings, data: bytes, type: str) -> None:
    """What is wrong with the input points at the field that it came from."""
    Storage.open(settings)._put("in/bad", data)

    outcome, _ = run(host, work("blob:in/bad"))

    (item,) = outcome.body["detail"]
    assert (outcome.status, item["type"], item["loc"]) == (422, type, ["body", "image_url"])
    assert outcome.headers["X-Fal-Retryable"] == "false"


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/x.png", "blob:in/" + "0" * 64, "nonsense"])
def test_inputs_that_cannot_be_had_are_download_errors(host: SlotHost, url: str) -> None:
    """An unreachable, forgotten or meaningless input is fal's download error."""
    outcome, _ = run(host, work(image_url=url))

    assert outcome.error_type == "file_download_error"


def test_an_unforeseen_error_tells_nothing_to_strangers(host: SlotHost) -> None:
    """A bug of ours is a 500 without particulars, and the slot goes on."""
    outcome, _ = run(host, work(prompt="broken code"))

    assert (outcome.status, outcome.error_type) == (500, "internal_server_error")
    assert "nobody thought" not in str(outcome.body)
    assert run(host, work())[0].status == 200


def test_a_fault_of_the_device_ends_the_slot(host: SlotHost) -> None:
    """After a CUDA fault nothing in the process can be trusted, so it is not answered but raised."""
    with pytest.raises(RuntimeError, match="CUDA error"):
        run(host, work(prompt="broken device"))


@pytest.mark.parametrize(
    ("error", "status", "type", "loc", "ctx"),
    [
        (
            UnsupportedImageFormat("PSD", ["PNG"]),
            422,
            "unsupported_image_format",
            "image_url",
            {"supported_formats": ["PNG"]},
        ),
        (FileTooLarge(9), 422, "file_too_large", "image_url", {"max_size": 9}),
        (
            ImageTooSmall("small", width=1, height=1, min_width=16, min_height=8),
            422,
            "image_too_small",
            "image_url",
            {"min_width": 16, "min_height": 8},
        ),
        (InvalidParams("prompt", "bad"), 422, "value_error", "prompt", None),
        (NonFiniteResult("nan"), 500, "internal_server_error", "body", None),
    ],
)
def test_each_fault_has_fals_name(error: Exception, status: int, type: str, loc: str, ctx: object) -> None:
    """The table from our exceptions to fal's types, with what each says besides."""
    outcome = outcome_of(error)

    assert outcome is not None
    (item,) = outcome.body["detail"]
    assert (outcome.status, item["type"], item["loc"][-1], item.get("ctx")) == (status, type, loc, ctx)


def test_a_gpu_that_torch_cannot_use_is_named(settings: Settings, tmp_path: Path) -> None:
    """A slot that was given a GPU and has torch without CUDA says what to install."""
    if torch.cuda.is_available():
        pytest.skip("torch can use the GPU of this machine")
    host = SlotHost(settings, Storage.open(settings), tmp_path, device="cuda", pipelines=PIPELINES)

    with pytest.raises(DeviceUnusable, match="CUDA build"):
        host.load()


@pytest.mark.parametrize("torch_is", [None, ModuleType("torch")], ids=["not there", "being imported"])
def test_a_slot_beats_while_another_thread_imports_torch(
    torch_is: ModuleType | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That takes seconds, in which torch has no `cuda` yet: the memory of the GPU is told later."""
    monkeypatch.setitem(sys.modules, "torch", torch_is)

    assert memory_of("cuda") == {}


def test_an_endpoint_without_weights_spoils_no_other(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not served, and says what is missing and how to get it; once its files are there, it works."""
    flux, missing = "fal-ai/flux-vision-upscaler", ["flux2-klein-4b/model_index.json", "flux2-klein-4b/x"]
    monkeypatch.setattr(WeightStore, "missing", lambda self, endpoint="", profile="": missing * (endpoint == flux))
    host = SlotHost(settings, Storage.open(settings), tmp_path, device="cpu", pipelines=PIPELINES)
    Storage.open(settings)._put("in/picture", png())
    payload = ENDPOINTS[flux].parse({"image_url": "blob:in/picture"})
    task = Work(request_id="r2", endpoint=flux, token="t2", job=dict(ENDPOINTS[flux].job(payload)))
    host.load()
    report = host.report()

    refused, served = run(host, task)[0], run(host, work())[0]
    missing.clear()

    assert set(PIPELINES) - set(report.serves) == {"flux_vision_upscaler"}
    assert report.failed["flux_vision_upscaler"] == (
        "The pocket weights lack flux2-klein-4b/model_index.json and 1 more; get them with "
        f"`creative-upscaler weights pull {flux}`."
    )
    assert (refused.status, served.status) == (500, 200) and "weights pull" in str(refused.body)
    assert run(host, task)[0].status == 200 and host.report().failed == {}


def test_reports_become_lines() -> None:
    """A stage that begins says nothing; steps, ends and remarks do."""
    report = Report(stage="denoise", total=11)

    assert line_of(report) is None
    assert line_of(replace(report, step=3)) == "denoise 3/11"
    assert line_of(replace(report, seconds=1.23)) == "denoise done in 1.2 s"
    assert line_of(replace(report, message="retried in 32 bits")) == "retried in 32 bits"


def test_long_work_without_steps_gives_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that only beats writes a line now and then, so that nobody takes its slot for stuck."""
    lines: list[NewLog] = []
    diary = Diary(lines.append, lambda: False)
    diary.report(Report(stage="vae"))
    assert lines == []
    monkeypatch.setattr("server.slot.SIGN_S", 0.0)

    diary.report(Report(stage="vae"))

    assert [line.message for line in lines] == ["vae goes on"]


def test_a_run_shows_previews_while_it_lasts(host: SlotHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest one lies in a file as JPEG, whole at any time, and is gone when the run is over, however it ended."""
    monkeypatch.setattr("server.slot.PREVIEW_S", 0.0)
    monkeypatch.setattr("server.slot.PREVIEW_REST", 0)
    sizes = set()

    def look(line: NewLog) -> None:
        if line.message.startswith("denoise ") and "/" in line.message:
            with Image.open(preview_path(tmp_path, "t1")) as shown:
                sizes.add((shown.format, shown.size))

    host.run(work(num_inference_steps=3), look, lambda: False)
    cancelled = host.run(work(num_inference_steps=3), lambda line: None, lambda: bool(list(tmp_path.glob("*.jpg"))))

    assert sizes == {("JPEG", (64, 48))} and cancelled.status == 499
    assert list(tmp_path.glob("*.jpg")) == list(tmp_path.glob("*.part")) == []


def test_previews_take_little_time_and_no_run_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first comes after a second, then as long as making one took, nothing is made for sixty times that."""
    now = [100.0]
    monkeypatch.setattr("server.slot.time.monotonic", lambda: now[0])
    made: list[float] = []

    def make() -> None:
        made.append(now[0])
        now[0] += 0.1
        raise ValueError("no picture")

    file = PreviewFile(tmp_path / "x.jpg")
    for _ in range(200):
        file.offer(make)
        now[0] += 0.25

    assert made[0] == 101.0 and len(made) == 9
    assert len(made) * 0.1 < 0.02 * (now[0] - 100.0)


def test_a_local_run_writes_its_picture_whole_or_not_at_all(settings: Settings, tmp_path: Path) -> None:
    """The command line's way to a pipeline leaves a picture, or what was there before."""
    output = tmp_path / "out.png"
    output.write_bytes(b"before")
    local = LocalRun(settings, device="cpu", pipelines=PIPELINES)

    with pytest.raises(KeyError):
        local.make(work(prompt="broken code").job, png(), output, lambda report: None)
    with pytest.raises(NotMade, match="Failed to load the image"):
        local.make(work().job, b"no picture", output, lambda report: None)
    with pytest.raises(NotMade, match="Failed to download the file"):
        local.make(work(additional_lora_url="nothing.safetensors").job, png(), output, lambda report: None)
    assert output.read_bytes() == b"before"
    made = local.make(work().job, png(), output, lambda report: None)

    with Image.open(output) as picture:
        assert picture.size == (made.width, made.height) == (32, 24)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["out.png"]

"""The object that owns a device: fetches the input, runs the pipeline, stores the picture, says how it went.

The only module of the server that imports pipelines, and it does so when it loads them: a slot's process answers its
socket before torch is there. One thread calls `load` and `run`; nothing of a request stays behind in it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import structlog

from pipelines.errors import (
    Cancelled,
    ImageLoadError,
    ImageTooLarge,
    ImageTooSmall,
    InvalidParams,
    ModelsMissing,
    ModelsUnusable,
    NonFiniteResult,
    PipelineError,
    UnsupportedImageFormat,
)
from pipelines.progress import Progress, Report
from server.endpoints import ENDPOINTS
from server.engine import Emit, Work
from server.engine.local import SlotListener, preview_path, scratch_of
from server.errors import model_error
from server.inputs import DownloadFailed, Fetcher, FileTooLarge, MalformedDataURI, Reach, guarded_client, read_input
from server.ledger.ledger import CANCELLED
from server.ledger.states import LoadedModel, NewLog, Outcome, SlotReport
from server.settings import Settings
from server.storage import OUTPUT_SUFFIXES, Storage, output_key
from server.weight_files import FileRefused, WeightFiles
from weights.fetch import FileTooLarge as WeightsTooLarge
from weights.store import WeightStore, open_store, pull_command

if TYPE_CHECKING:
    from PIL.Image import Image

    from pipelines.models import Models
    from pipelines.planning import Limits

STEP_LINES_S = 0.1
SIGN_S = 60.0  # a run that works without steps says so this often; a silent one is taken for stuck
"""Least seconds between two log lines about steps of one stage: callers read them, and each is kept."""

PREVIEW_S = 1.0
PREVIEW_REST = 59  # times as long as making one took, nothing is shown
log = structlog.get_logger()


class DeviceUnusable(Exception):
    """Torch cannot compute on the device that the slot was given."""


class Rendered(Protocol):
    """What a pipeline tells about the picture it wrote: px, the seed, seconds by stage with `inference` for all."""

    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def timings(self) -> dict[str, float]: ...


Render = Callable[[bytes, Mapping[str, Any], BinaryIO, Progress], Rendered]
"""Makes a picture: encoded input, parameters by name, where the PNG goes, whom to tell."""


@dataclass(frozen=True)
class Loaded:
    """A pipeline: what makes pictures, and what brings the models of a request with default values into memory."""

    render: Render
    warm_up: Callable[[], None]


Load = Callable[[Callable[[], "Models"], str, Settings], Loaded]
"""Makes a pipeline of the models of one set of weights on one device; torch is imported when it asks for them."""


def load_creative_upscaler(open_models: Callable[[], Models], device: str, settings: Settings) -> Loaded:
    """Load what a request with fal's defaults needs; other models come when they are wanted."""
    from pipelines.creative_upscaler import CreativeUpscaler, Params

    models = open_models()
    pipeline = CreativeUpscaler(models, weights=models.description)
    with models.request("creative_upscaler"):
        pipeline.warm_up()
    limits = limits_of(settings)

    def render(image: bytes, params: Mapping[str, Any], output: BinaryIO, progress: Progress) -> Rendered:
        return pipeline(image, Params(**params), limits=limits, output=output, progress=progress)

    return Loaded(render, pipeline.warm_up)


def load_flux_vision_upscaler(open_models: Callable[[], Models], device: str, settings: Settings) -> Loaded:
    """Load nothing: the first request brings the models, and those of other endpoints may stay."""
    from pipelines.flux_vision_upscaler import FluxVisionUpscaler, Params

    models = open_models()
    is_full = models.store.name == "full"
    profile = settings.full_flux_profile if is_full else "pocket"
    pipeline = FluxVisionUpscaler(models, profile, weights=models.description, fp8=is_full and settings.flux_fp8)
    limits = limits_of(settings)

    def render(image: bytes, params: Mapping[str, Any], output: BinaryIO, progress: Progress) -> Rendered:
        return pipeline(image, Params(**params), limits=limits, output=output, progress=progress)

    return Loaded(render, pipeline.warm_up)


def load_clarity_upscaler(open_models: Callable[[], Models], device: str, settings: Settings) -> Loaded:
    """The models come when the first request wants them."""
    from pipelines.clarity_upscaler import ClarityUpscaler, DetailLora, Params

    models = open_models()
    loras = [DetailLora.at(*path_and_weight(text)) for text in settings.clarity_loras]
    pipeline = ClarityUpscaler(models, weights=models.description, loras=loras)
    limits = limits_of(settings)

    def render(image: bytes, params: Mapping[str, Any], output: BinaryIO, progress: Progress) -> Rendered:
        return pipeline(image, Params(**params), limits=limits, output=output, progress=progress)

    return Loaded(render, pipeline.warm_up)


def path_and_weight(text: str) -> tuple[Path, float]:
    """The two parts of `file:weight`; the weight is 1 where there is none."""
    path, _, weight = text.rpartition(":")
    try:
        return Path(path).expanduser(), float(weight)
    except ValueError:
        return Path(text).expanduser(), 1.0


def load_crystal_upscaler(open_models: Callable[[], Models], device: str, settings: Settings) -> Loaded:
    """The models come when the first request wants them."""
    from pipelines.crystal_upscaler import CrystalUpscaler, Params

    models = open_models()
    tiff_from_px = None if settings.tiff_from_mp is None else int(settings.tiff_from_mp * 1e6)
    pipeline = CrystalUpscaler(
        models,
        weights=models.description,
        tiff_from_px=tiff_from_px,
        restore_faces_px=settings.restore_faces_px,
    )
    limits = replace(limits_of(settings), max_output_pixels=int(settings.max_crystal_output_mp * 1e6))

    def render(image: bytes, params: Mapping[str, Any], output: BinaryIO, progress: Progress) -> Rendered:
        return pipeline(image, Params(**params), limits=limits, output=output, progress=progress)

    return Loaded(render, pipeline.warm_up)


def limits_of(settings: Settings) -> Limits:
    """The sizes of pictures that are accepted."""
    from pipelines.planning import Limits

    return Limits(
        max_input_pixels=int(settings.max_input_mp * 1e6),
        max_output_pixels=int(settings.max_output_mp * 1e6),
        max_large_input_pixels=int(settings.max_large_input_mp * 1e6),
        max_large_output_pixels=int(settings.max_large_output_mp * 1e6),
    )


def models_of(store: WeightStore, device: str, settings: Settings) -> Models:
    """The models of a set of weights, kept within the settings' budgets; nothing is loaded yet, but torch."""
    import psutil
    import torch
    from transformers.utils import logging as transformers_logging

    from pipelines.models import Models, fastest_dtype
    from pipelines.residency import Residency

    transformers_logging.disable_progress_bar()  # its bars would run through our log and our own bars
    memory = psutil.virtual_memory().total
    on_device, on_host = memory // 2, 0
    if device.startswith("cuda"):
        on_device, on_host = int(0.7 * torch.cuda.get_device_properties(device).total_memory), memory // 4
    if settings.device_memory_gb is not None:
        on_device = int(settings.device_memory_gb * 2**30)
    if settings.host_memory_gb is not None:
        on_host = int(settings.host_memory_gb * 2**30)
    target = torch.device(device)
    dtype = fastest_dtype(target) if settings.dtype == "auto" else getattr(torch, settings.dtype)
    return Models(store, target, Residency(target, device_bytes=on_device, host_bytes=on_host), dtype=dtype)


PIPELINES: Mapping[str, Load] = {
    "creative_upscaler": load_creative_upscaler,
    "clarity_upscaler": load_clarity_upscaler,
    "crystal_upscaler": load_crystal_upscaler,
    "flux_vision_upscaler": load_flux_vision_upscaler,
}


class SlotHost:
    """One device and the pipelines on it.

    Attributes:
        device: Torch's name of the device.
        weights: Name of the weight set; empty until it is loaded.
        detail: One line about the device for people.
    """

    def __init__(
        self,
        settings: Settings,
        storage: Storage,
        scratch: Path,
        *,
        device: str,
        pipelines: Mapping[str, Load],
        reads_disk: bool = False,
    ) -> None:
        self.device, self.weights, self.detail = device, "", device
        self._settings, self._storage, self._scratch, self._loaders = settings, storage, scratch, pipelines
        self._pipelines: dict[str, Loaded] = {}
        self._failed: dict[str, str] = {}
        self._store: WeightStore | None = None
        self._models: Models | None = None
        self._files = WeightFiles(settings, storage, reads_disk=reads_disk)
        self._fetcher = Fetcher(
            guarded_client(Reach.naming(settings.fetch_allow_hosts)),
            max_bytes=int(settings.max_download_mb * 2**20),
            timeout_s=settings.fetch_timeout_s,
        )

    def load(self) -> None:
        """Open the weights and load every pipeline; one that cannot be loaded is told of, and tried again when wanted.

        Raises:
            WeightsMissing: Files of the weights are not there.
            DeviceUnusable: Torch does not see the device.
            Exception: No pipeline could be loaded; this is what was wrong with the first one.
        """
        started = time.perf_counter()
        check_device(self.device)
        self._store = open_store(
            self._settings.weights, root=self._settings.full_weights_dir, has_cuda=self.device.startswith("cuda")
        )
        loaded: dict[str, Loaded] = {}
        errors: list[Exception] = []
        for name in self._loaders:
            try:
                loaded[name] = self._load(name)
            except Exception as error:
                errors.append(error)
                self._note_failure(name, error)
        if errors and not loaded:
            raise errors[0]
        self._pipelines, self.weights, self.detail = loaded, self._store.name, describe(self.device)
        log.info(
            "pipelines_loaded",
            weights=self.weights,
            device=self.detail,
            failed=sorted(self._failed),
            duration_s=round(time.perf_counter() - started, 1),
        )

    def _load(self, name: str) -> Loaded:
        """Load a pipeline; raises ModelsMissing where the weights of its endpoint are not there, or what went wrong."""
        assert self._store is not None
        (endpoint,) = (endpoint.id for endpoint in ENDPOINTS.values() if endpoint.pipeline == name)
        if missing := self._store.missing(endpoint, self._settings.full_flux_profile):
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ModelsMissing(
                f"The {self._store.name} weights lack {missing[0]}{more}; get them with `{pull_command(endpoint)}`."
            )
        return self._loaders[name](self._open_models, self.device, self._settings)

    def _open_models(self) -> Models:
        assert self._store is not None
        if self._models is None:
            self._models = models_of(self._store, self.device, self._settings)
        return self._models

    def _note_failure(self, name: str, error: Exception) -> None:
        if is_device_fault(error):
            raise error
        log.error("pipeline_not_loaded", pipeline=name, error=repr(error))
        # Everybody may read it: other errors may tell of folders of this machine.
        is_ours = isinstance(error, PipelineError)
        self._failed[name] = str(error) if is_ours else f"It could not be loaded ({type(error).__name__})."

    def _pipeline(self, name: str) -> Loaded:
        """A pipeline; one that could not be loaded is tried again, for its files may be there by now.

        Raises:
            ModelsMissing: It still cannot be loaded.
        """
        if name not in self._pipelines:
            try:
                self._pipelines[name] = self._load(name)
            except Exception as error:
                self._note_failure(name, error)
                raise ModelsMissing(f"This endpoint cannot work at the moment: {self._failed[name]}") from error
            self._failed.pop(name, None)
        return self._pipelines[name]

    def obey(self, action: str, pipeline: str) -> str:
        """Load or unload the models of a pipeline, or of all if it is empty; returns how it went, in words.

        Raises:
            Exception: The device reported a fault of its own, as in `run`.
        """
        started = time.perf_counter()
        log.info("order_begun", action=action, pipeline=pipeline)
        try:
            answer = self._unload(pipeline) if action == "unload" else self._preload(pipeline)
        except Exception as error:
            if is_device_fault(error):
                raise
            log.exception("order_failed", action=action, pipeline=pipeline)
            return f"failed: {error}"
        log.info("order_done", action=action, answer=answer, duration_s=round(time.perf_counter() - started, 1))
        return answer

    def _preload(self, pipeline: str) -> str:
        started = time.perf_counter()
        for name in [pipeline] if pipeline else list(self._loaders):
            warm_up = self._pipeline(name).warm_up
            with contextlib.nullcontext() if self._models is None else self._models.request(name):
                warm_up()
        return f"loaded in {time.perf_counter() - started:.1f} s"

    def _unload(self, pipeline: str) -> str:
        if self._models is None:
            return "nothing was loaded"
        residency = self._models.residency
        before = {holding.key: holding.size_bytes for holding in residency.holdings()}
        dropped = residency.drop(lambda kind: pipeline_of(kind) == pipeline) if pipeline else residency.drop_all()
        if not dropped:
            return "nothing was loaded for it alone"
        freed = sum(before[key] for key in dropped)
        return f"unloaded {', '.join(sorted(dropped))}: {freed / 1e6:.1f} MB"

    def report(self) -> SlotReport:
        """What is inside; asked for on another thread than everything else."""
        models: tuple[LoadedModel, ...] = ()
        counts: dict[str, float] = {}
        if self._models is not None:
            models = tuple(
                LoadedModel(
                    name=holding.key,
                    level=holding.level.value,
                    size_bytes=holding.size_bytes,
                    users=tuple(sorted({pipeline_of(kind) for kind in holding.users})),
                )
                for holding in self._models.residency.holdings()
            )
            counts = asdict(self._models.residency.counts)
        return SlotReport(
            serves=tuple(sorted(self._pipelines)),
            failed=dict(self._failed),
            models=models,
            counts=counts,
            memory=memory_of(self.device),
        )

    def run(self, work: Work, emit: Emit, is_cancelled: Callable[[], bool]) -> Outcome:
        """Do one request: input, picture, storage, answer. Whatever a request can cause becomes its outcome.

        Raises:
            Exception: The device reported a fault of its own; neither it nor this process can be trusted any more.
        """
        started = time.perf_counter()
        with draft_at(preview_path(self._scratch, work.token)) as path:
            outcome = self._outcome(work, Diary(emit, is_cancelled, PreviewFile(path)))
        duration_s = round(time.perf_counter() - started, 3)
        log.info("run_done", request_id=work.request_id, status=outcome.status, duration_s=duration_s)
        return outcome

    def _outcome(self, work: Work, diary: Diary) -> Outcome:
        if self._models is not None:
            self._models.expect(work.queued)
        try:
            return self._run(work, diary)
        except Exception as error:
            outcome = outcome_of(error, work.job.get("fields", {}))
            if outcome is not None:
                return outcome
            if is_device_fault(error):
                raise
            log.exception("run_failed", request_id=work.request_id)
            return model_error("internal_server_error", "Internal server error")

    def _run(self, work: Work, diary: Diary) -> Outcome:
        diary.write("INFO", f"{self.weights} weights on {self.detail}")
        image = read_input(work.job["image"], self._storage, self._fetcher, diary.poll)
        with draft_at(self._scratch / f"{work.token}.png") as draft:
            with draft.open("w+b") as file:
                rendered = self.render(work.job, image, file, diary.report)
            diary.poll()
            content_type = getattr(rendered, "content_type", "image/png")
            key = output_key(work.request_id, work.token, OUTPUT_SUFFIXES[content_type])
            size_bytes = draft.stat().st_size
            self._storage.write_file(key, draft)
        facts = {
            "key": key,
            "content_type": content_type,
            "file_name": key.rpartition("/")[2],
            "file_size": size_bytes,
            "width": rendered.width,
            "height": rendered.height,
            "seed": rendered.seed,
            "timings": rendered.timings,
            "caption": getattr(rendered, "caption", ""),
        }
        return Outcome(
            status=200,
            body=ENDPOINTS[work.endpoint].output(facts),
            inference_s=rendered.timings["inference"],
            headers={"X-Fal-Served-From": f"{self.weights} weights"},
            blobs=(key,),
            timings=rendered.timings,
        )

    def render(self, job: Mapping[str, Any], image: bytes, output: BinaryIO, progress: Progress) -> Rendered:
        """Make the picture of a job from its input's bytes, as PNG in `output`.

        Raises:
            FileRefused: A file of weights that the job names cannot be used.
            PipelineError: The picture could not be made.
        """
        params, kind = dict(job["params"]), job.get("kind", job["pipeline"])
        with contextlib.ExitStack() as block:
            if files := job.get("files"):
                block.enter_context(self._files.holding())
                progress(Report(stage="download", message=f"fetching the weights of {', '.join(files)}"))
                params |= self._files.get(files, params["family"], lambda: progress(Report(stage="download")))
            if self._models is not None:
                block.enter_context(self._models.request(kind))
            return self._pipeline(job["pipeline"]).render(image, params, output, progress)


@contextlib.contextmanager
def draft_at(path: Path) -> Iterator[Path]:
    """A file that is gone afterwards, unless it was moved away."""
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


class PreviewFile:
    """The newest preview of a run, as JPEG in a file that the gateway reads; takes less than 2 % of the run's time."""

    def __init__(self, path: Path) -> None:
        self.path, self._next = path, time.monotonic() + PREVIEW_S

    def offer(self, make: Callable[[], Image | None]) -> None:
        """Show a preview, unless the last one was shown just now."""
        started = time.monotonic()
        if started < self._next:
            return
        try:
            if (image := make()) is not None:
                draft = self.path.with_suffix(".part")
                image.save(draft, "JPEG", quality=80)
                draft.replace(self.path)
        except Exception as error:
            if is_device_fault(error):
                raise
            log.warning("preview_failed", error=repr(error))  # nobody's picture shall fail for it
        ended = time.monotonic()
        self._next = ended + max(PREVIEW_S, PREVIEW_REST * (ended - started))


class Diary:
    """Turns reports of a pipeline into log lines for the caller, and a cancelled request into `Cancelled`."""

    def __init__(self, emit: Emit, is_cancelled: Callable[[], bool], preview: PreviewFile | None = None) -> None:
        self._emit, self._is_cancelled, self._preview = emit, is_cancelled, preview
        self._last_step = 0.0
        self._last_line = time.monotonic()

    def write(self, level: str, message: str) -> None:
        """Add a line."""
        self._last_line = time.monotonic()
        self._emit(NewLog(time.time(), level, message))

    def poll(self) -> None:
        """Raise `Cancelled` when the caller does not want the picture any more."""
        if self._is_cancelled():
            raise Cancelled("The request was cancelled.")

    def report(self, report: Report) -> None:
        """A pipeline's progress callback."""
        self.poll()
        if report.preview is not None and self._preview is not None:
            self._preview.offer(report.preview)
        line = line_of(report)
        now = time.monotonic()
        if line is None and now - self._last_line >= SIGN_S:
            line = f"{report.stage} goes on"
        is_step = report.seconds is None and report.message is None
        if line is None or (is_step and report.step < report.total and now - self._last_step < STEP_LINES_S):
            return
        if is_step:
            self._last_step = now
        self.write("INFO", line)


def line_of(report: Report) -> str | None:
    """A report in words; None for the mere start of a stage."""
    if report.message is not None:
        return report.message
    if report.seconds is not None:
        return f"{report.stage} done in {report.seconds:.1f} s"
    return f"{report.stage} {report.step}/{report.total}" if report.step else None


def nothing(_: Any) -> dict[str, Any]:
    """The `ctx` of an error that needs none."""
    return {}


FAULTS: Sequence[tuple[type[Exception], str, Callable[[Any], dict[str, Any]]]] = (
    (UnsupportedImageFormat, "unsupported_image_format", lambda e: {"supported_formats": list(e.supported)}),
    (ImageLoadError, "image_load_error", nothing),
    (ImageTooLarge, "image_too_large", lambda e: {"max_height": e.max_height, "max_width": e.max_width}),
    (ImageTooSmall, "image_too_small", lambda e: {"min_height": e.min_height, "min_width": e.min_width}),
    (MalformedDataURI, "image_load_error", nothing),
    (FileTooLarge, "file_too_large", lambda e: {"max_size": e.max_bytes}),
    (DownloadFailed, "file_download_error", nothing),
)
"""What can be wrong with the input picture: exception, fal's type, fal's `ctx`."""


def outcome_of(error: Exception, fields: Mapping[str, str] | None = None) -> Outcome | None:
    """How a request ends that raised this; None for what is not a fault of the request.

    `fields` are fal's names of parameters, where they differ from the pipeline's.
    """
    if isinstance(error, Cancelled):
        return CANCELLED
    if isinstance(error, InvalidParams):
        return model_error("value_error", str(error), loc=("body", (fields or {}).get(error.field, error.field)))
    if isinstance(error, FileRefused):
        loc = ("body", (fields or {}).get(error.parameter, error.parameter))
        return outcome_of_file(error.cause, loc)
    if isinstance(error, NonFiniteResult | ModelsMissing | ModelsUnusable):
        return model_error("internal_server_error", str(error))
    for kind, type, ctx in FAULTS:
        if isinstance(error, kind):
            return model_error(type, str(error), loc=("body", "image_url"), ctx=ctx(error))
    return None


def outcome_of_file(cause: Exception, loc: tuple[str, str]) -> Outcome:
    """How a request ends whose file of weights is at fault."""
    if isinstance(cause, WeightsTooLarge):
        return model_error("file_too_large", str(cause), loc=loc, ctx={"max_size": cause.max_bytes})
    if isinstance(cause, DownloadFailed):
        return model_error("file_download_error", str(cause), loc=loc)
    return model_error("value_error", f"The file {cause}.", loc=loc)


def is_device_fault(error: Exception) -> bool:
    """Whether an error means that the CUDA context is gone; every later call in this process would fail as well."""
    return type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error)


def check_device(device: str) -> None:
    """Raise `DeviceUnusable` for a GPU that torch cannot use."""
    if not device.startswith("cuda"):
        return
    import torch

    if not torch.cuda.is_available():
        raise DeviceUnusable(
            f"This machine has a GPU that torch {torch.__version__} cannot use. Install torch's CUDA build, or set "
            "CUDA_VISIBLE_DEVICES to nothing to make pictures on the processor."
        )


def pipeline_of(kind: str) -> str:
    """The pipeline of a kind of requests, whose name its own begins with."""
    return kind.partition(" ")[0]


def memory_of(device: str) -> dict[str, int]:
    """Bytes of the device's memory: all of it, what is free, and what this process has taken; asks torch for a GPU."""
    if device.startswith("cuda"):
        torch = sys.modules.get("torch")
        # Another thread may be importing torch: for seconds, what is there has no `cuda` yet.
        if torch is None or not hasattr(torch, "cuda") or not torch.cuda.is_initialized():
            return {}
        free, total = torch.cuda.mem_get_info()
        return {"total": total, "free": free, "taken": torch.cuda.memory_reserved()}
    import psutil

    memory = psutil.virtual_memory()
    return {"total": memory.total, "free": memory.available, "taken": psutil.Process().memory_info().rss}


def describe(device: str) -> str:
    """A device in words."""
    if not device.startswith("cuda"):
        return f"CPU ({os.cpu_count()} cores)"
    import torch

    return torch.cuda.get_device_name(device)


async def serve_slot(settings: Settings, slot_id: str, device: str, pipelines: Mapping[str, Load] = PIPELINES) -> None:
    """The slot's process: load, listen, work, until the task is cancelled."""
    scratch = scratch_of(settings, slot_id)
    shutil.rmtree(scratch, ignore_errors=True)  # what a predecessor left that was killed
    scratch.mkdir(mode=0o700)
    host = SlotHost(settings, Storage.open(settings), scratch, device=device, pipelines=pipelines)
    await SlotListener(settings.run_dir, slot_id, host).serve()


class NotMade(Exception):
    """A picture could not be made; the message says why."""


class LocalRun:
    """Pictures made in this process, without socket, ledger or storage."""

    def __init__(self, settings: Settings, *, device: str, pipelines: Mapping[str, Load] = PIPELINES) -> None:
        """Load the pipelines; raises `WeightsMissing` or `DeviceUnusable`."""
        settings.make_folders()
        storage = Storage.open(settings)
        self._host = SlotHost(settings, storage, settings.run_dir, device=device, pipelines=pipelines, reads_disk=True)
        self._host.load()

    def make(self, job: Mapping[str, Any], image: bytes, output: Path, progress: Progress) -> Rendered:
        """Make one picture; `output` changes only when it is complete.

        Raises:
            NotMade: The picture, the parameters or a file of weights are at fault.
        """
        with draft_at(output.with_name(f".{output.name}.part")) as draft:
            with draft.open("w+b") as file:
                try:
                    rendered = self._host.render(job, image, file, progress)
                except (PipelineError, FileRefused) as error:
                    raise NotMade(str(error)) from error
            draft.replace(output)
        return rendered

"""A pipeline without models: as many steps as asked for, each of a known length, then an enlarged picture."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

from PIL import Image

from pipelines.errors import ImageLoadError, ImageTooLarge
from pipelines.progress import Progress, Stages
from server.settings import Settings
from server.slot import Loaded

MAX_SIDE_PX = 4096
DEFAULT_STEPS = 10  # of pipelines without such a parameter


@dataclass(frozen=True, kw_only=True)
class FakeResult:
    """What it made."""

    width: int
    height: int
    seed: int
    timings: dict[str, float]
    caption: str = "a picture"


class FakePipeline:
    """Steps of `step_s` seconds; a `prompt` that begins with a word below makes it misbehave."""

    def __init__(self, step_s: float) -> None:
        self.step_s = step_s

    def __call__(self, image: bytes, params: Mapping[str, Any], output: BinaryIO, progress: Progress) -> FakeResult:
        stages = Stages(progress)
        with stages.stage("decode"):
            picture = decode(image)
        prompt = params.get("prompt", "")
        if prompt.startswith("broken device"):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if prompt.startswith("broken code"):
            raise KeyError("nobody thought of this")
        if prompt.startswith("deadly"):
            os._exit(9)
        num_steps = params.get("num_inference_steps", DEFAULT_STEPS)
        paint = lambda n: picture.resize((64, 48)).point(lambda level: level * n // num_steps)  # noqa: E731
        with stages.painting(paint), stages.stage("denoise", num_steps) as step:
            for n in range(num_steps):
                time.sleep(self.step_s)
                stages.watch(lambda n=n: n + 1)  # type: ignore[misc]
                step(n + 1)
        size = (round(picture.width * params["scale"]), round(picture.height * params["scale"]))
        with stages.stage("png"):
            picture.resize(size).save(output, "PNG")
        timings = stages.timings | {"inference": sum(stages.timings.values())}
        return FakeResult(width=size[0], height=size[1], seed=params.get("seed", 0), timings=timings)


def decode(data: bytes) -> Image.Image:
    """The picture, or the pipelines' own errors."""
    try:
        picture = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        message = "The picture is a decompression bomb."
        raise ImageTooLarge(message, width=0, height=0, max_width=MAX_SIDE_PX, max_height=MAX_SIDE_PX) from error
    except (OSError, SyntaxError) as error:
        raise ImageLoadError("Failed to load the image.") from error
    try:
        if max(picture.size) > MAX_SIDE_PX:
            width, height = picture.size
            message = f"The picture has {width} x {height} px."
            raise ImageTooLarge(message, width=width, height=height, max_width=MAX_SIDE_PX, max_height=MAX_SIDE_PX)
        return picture.convert("RGB")
    except (OSError, SyntaxError) as error:
        raise ImageLoadError("Failed to load the image.") from error


def load_fake(name: str, open_models: Callable[[], object], device: str, settings: Settings) -> Loaded:
    """For the slot's table of pipelines; `FAKE_STEP_S` sets the seconds of a step, and of its warming up.

    The one that `FAKE_BROKEN` names cannot be loaded, while there is a file `broken` in the data folder.
    """
    if os.environ.get("FAKE_BROKEN") == name and (settings.data / "broken").exists():
        raise OSError(f"{settings.data}/weights is cut off")
    step_s = float(os.environ.get("FAKE_STEP_S", "0.001"))
    return Loaded(FakePipeline(step_s), lambda: time.sleep(step_s))


PIPELINES = {
    name: partial(load_fake, name)
    for name in ("creative_upscaler", "clarity_upscaler", "crystal_upscaler", "flux_vision_upscaler")
}

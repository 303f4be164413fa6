"""Captions, restoration and safety in the whole pipeline, and what it does where a set of weights lacks a part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipelines.creative_upscaler import CreativeUpscaler, Params
from pipelines.errors import CaptionFailed, InvalidParams
from pipelines.models import Models
from pipelines.prescale import Lanczos
from pipelines.residency import Residency
from pipelines.spool import Pixels
from tests.conftest import png_bytes
from tests.pipelines.test_creative_upscaler import DEFAULTS, UNLIMITED
from weights.store import WeightStore

QUICK = Params(**(DEFAULTS | {"num_inference_steps": 2, "scale": 1.0, "guidance_scale": 1.0}))
SUFFIX = ", high quality, sharp"


@pytest.fixture(scope="module")
def pipeline(pocket: WeightStore) -> CreativeUpscaler:
    return CreativeUpscaler.load(pocket, device="cpu")


@pytest.fixture(scope="module")
def small() -> bytes:
    return png_bytes(Image.radial_gradient("L").resize((40, 32)).convert("RGB"))


def run(pipeline: CreativeUpscaler, image: bytes, **changes: Any) -> tuple[bytes, dict[str, Any], list[str]]:
    """The PNG, the parameters in its recipe, and what was remarked."""
    output, remarks = BytesIO(), []

    def listen(report: Any) -> None:
        if report.message:
            remarks.append(report.message)

    result = pipeline(image, replace(QUICK, **changes), limits=UNLIMITED, output=output, progress=listen)
    return output.getvalue(), result.recipe["params"], remarks


class Speaking:
    """A captioner that says the same of every picture, or fails."""

    def __init__(self, words: str | None) -> None:
        self.words = words

    def caption(self, image: Image.Image, instruction: str | None = None, *, max_tokens: int = 40) -> str:
        if self.words is None:
            raise CaptionFailed("The captioner failed: out of words.")
        return self.words


def test_a_picture_without_prompt_is_described(pipeline: CreativeUpscaler, small: bytes) -> None:
    """The captioner's words and the suffix are the prompt, which the recipe tells; a given prompt is left alone."""
    _, described, remarks = run(pipeline, small, prompt="", prompt_suffix=SUFFIX)
    _, given, _ = run(pipeline, small, prompt="an owl", prompt_suffix=SUFFIX)

    assert given["prompt"] == "an owl" + SUFFIX
    assert described["prompt"].endswith(SUFFIX) and len(described["prompt"]) > len(SUFFIX)
    assert any(remark.startswith("caption: ") for remark in remarks)


@pytest.mark.parametrize("captioner", [None, Speaking(None)])
def test_a_captioner_that_fails_costs_a_line(
    pipeline: CreativeUpscaler, small: bytes, monkeypatch: pytest.MonkeyPatch, captioner: Any
) -> None:
    """Without words the suffix alone is the prompt, and the picture is made all the same."""
    monkeypatch.setattr(pipeline.models, "captioner", lambda: captioner)

    made, params, remarks = run(pipeline, small, prompt="", prompt_suffix=SUFFIX)

    assert params["prompt"] == SUFFIX.strip()
    assert any("prompt_suffix alone" in remark for remark in remarks)
    assert made == run(pipeline, small, prompt=SUFFIX.strip())[0]


def test_a_caption_is_no_notation(pipeline: CreativeUpscaler, small: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Brackets that a captioner writes are words."""
    monkeypatch.setattr(pipeline.models, "captioner", lambda: Speaking("a (red) owl"))

    assert run(pipeline, small, prompt="", prompt_suffix=SUFFIX)[1]["prompt"] == r"a \(red\) owl" + SUFFIX


class Judge:
    """A safety checker with one opinion; `seen` counts what it was asked about."""

    def __init__(self, opinion: bool) -> None:
        self.opinion, self.seen = opinion, 0

    def is_unsafe(self, image: Image.Image) -> bool:
        self.seen += 1
        return self.opinion


def test_an_unsafe_picture_is_black(pipeline: CreativeUpscaler, small: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same size, and the log says so; who does not ask for the check gets the picture."""
    judge = Judge(True)
    monkeypatch.setattr(pipeline.models, "checker", lambda: judge)

    flagged, _, remarks = run(pipeline, small, check_safety=True)
    unasked = run(pipeline, small, check_safety=False)[0]

    picture = Image.open(BytesIO(flagged))
    assert picture.size == Image.open(BytesIO(unasked)).size == (40, 32)
    assert np.asarray(picture).max() == 0 < np.asarray(Image.open(BytesIO(unasked))).max()
    assert any("black" in remark for remark in remarks) and judge.seen == 1


def test_a_safe_picture_is_untouched(pipeline: CreativeUpscaler, small: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check costs no bit of the picture."""
    monkeypatch.setattr(pipeline.models, "checker", lambda: Judge(False))
    pixels = [np.asarray(Image.open(BytesIO(run(pipeline, small, check_safety=on)[0]))) for on in (True, False)]

    assert np.array_equal(*pixels)


def test_restoration_comes_before_diffusion(
    pipeline: CreativeUpscaler, small: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CCSR's picture is what is redrawn, made with the request's seed; without CCSR the log says what replaces it."""
    asked: list[int] = []

    class Restoring(Lanczos):
        def bands(
            self, image: Pixels, size: tuple[int, int], on_tile: Callable[[], None] = lambda: None, *, seed: int = 0
        ) -> Iterator[Tensor]:
            asked.append(seed)
            for band in super().bands(image, size, on_tile):
                yield 1 - band

    monkeypatch.setattr(pipeline.models, "ccsr", Restoring)
    inverted = run(pipeline, small, restore=True, strength=0.0, seed=77)[0]
    plain = run(pipeline, small, restore=False, strength=0.0)[0]
    monkeypatch.setattr(pipeline.models, "ccsr", lambda: None)
    _, _, remarks = run(pipeline, small, restore=True)

    pixels = [np.asarray(Image.open(BytesIO(png))).astype(int) for png in (inverted, plain)]
    assert np.abs(255 - pixels[0] - pixels[1]).max() <= 1 and asked == [77]
    assert any("CCSR is not part" in remark for remark in remarks)


def test_a_family_that_is_not_there_is_named(small: bytes, tmp_path: Path) -> None:
    """A set of weights without SDXL refuses it, with the parameter that asked for it."""
    device = torch.device("cpu")
    models = Models(WeightStore("full", tmp_path), device, Residency(device, device_bytes=0, host_bytes=0))

    with pytest.raises(InvalidParams, match="SDXL is not part of the full weights") as caught:
        run(CreativeUpscaler(models, weights={}), small, family="SDXL")

    assert caught.value.field == "family"

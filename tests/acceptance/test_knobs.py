"""Every control moves the result in the direction that its description says, on the real pocket weights.

The crystal upscaler, which redraws larger pictures only, has its own test in tests/pipelines.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from PIL import Image

from benchmarks import metrics
from benchmarks.local import Local
from benchmarks.quality import halved, middle, photographs

SHARP = "sharp, highly detailed, high resolution, high quality"
POOR = "blurry, low resolution, interpolated, low quality"
PLAIN = {"prompt_suffix": "", "negative_prompt": ""}
CREATIVE, CLARITY = "fal-ai/creative-upscaler", "fal-ai/clarity-upscaler"
FLUX = "fal-ai/flux-vision-upscaler"


@functools.cache
def local() -> Local:
    """The endpoints, loaded once."""
    return Local()


@functools.cache
def sources() -> list[Image.Image]:
    """Two unseen photographs' middles, halved: 96 px, with fur and cloth."""
    pictures = photographs([])
    return [halved(middle(pictures[name], 192)) for name in ("chelsea", "clinic")]


def fidelity(result: Image.Image, source: Image.Image) -> float:
    """How much the result looks like the input, in dB."""
    return metrics.fidelity(result, source)


def detail(result: Image.Image, source: Image.Image) -> float:
    """How much fine structure there is, in 1/255."""
    return metrics.detail(result)


@dataclass(frozen=True)
class Knob:
    """Fields that should make `measure` larger in `more` than in `less`, by at least `step` (dB or a ratio less 1)."""

    endpoint: str
    less: Mapping[str, Any]
    more: Mapping[str, Any]
    measure: Callable[[Image.Image, Image.Image], float]
    step: float

    def __str__(self) -> str:
        return f"{self.endpoint.split('/')[1]}: {dict(self.less)} < {dict(self.more)} in {self.measure.__name__}"


KNOBS = [
    Knob(CREATIVE, {"creativity": 0.9}, {"creativity": 0.6}, fidelity, 1.0),
    Knob(CREATIVE, {"creativity": 0.6}, {"creativity": 0.2}, fidelity, 1.0),
    Knob(
        CREATIVE,
        {"creativity": 0.9, "shape_preservation": 0},
        {"creativity": 0.9, "shape_preservation": 1},
        fidelity,
        0.5,
    ),
    Knob(CREATIVE, {"prompt": "cat", "detail": 0}, {"prompt": "cat", "detail": 1}, detail, 0.005),
    Knob(CREATIVE, {"prompt": "cat", "detail": 1}, {"prompt": "cat", "detail": 3}, detail, 0.02),
    Knob(CREATIVE, {"prompt": SHARP, "guidance_scale": 1}, {"prompt": SHARP, "guidance_scale": 7.5}, detail, 0.005),
    Knob(CREATIVE, {"prompt": SHARP, "guidance_scale": 7.5}, {"prompt": SHARP, "guidance_scale": 14}, detail, 0.005),
    Knob(CREATIVE, {**PLAIN, "prompt": POOR}, {**PLAIN, "prompt": SHARP}, detail, 0.01),
    Knob(CREATIVE, {**PLAIN, "prompt": "smooth"}, {**PLAIN, "prompt": "textured"}, detail, 0.005),
    Knob(CREATIVE, {"prompt": "cat", "prompt_suffix": f" {POOR}"}, {"prompt": "cat"}, detail, 0.01),
    Knob(CREATIVE, {"prompt": SHARP, "negative_prompt": SHARP}, {"prompt": SHARP}, detail, 0.005),
    Knob(CLARITY, {"creativity": 0.9}, {"creativity": 0.5}, fidelity, 0.5),
    Knob(CLARITY, {"creativity": 0.5}, {"creativity": 0.1}, fidelity, 0.5),
    Knob(CLARITY, {"creativity": 0.9, "resemblance": 0}, {"creativity": 0.9, "resemblance": 1}, fidelity, 0.5),
    Knob(CLARITY, {"negative_prompt": "", "prompt": POOR}, {"negative_prompt": "", "prompt": SHARP}, detail, 0.005),
    Knob(FLUX, {"creativity": 0.9}, {"creativity": 0.5}, fidelity, 0.5),
    Knob(FLUX, {"creativity": 0.5}, {"creativity": 0.1}, fidelity, 0.5),
]


@pytest.mark.parametrize("knob", KNOBS, ids=str)
def test_a_control_does_what_it_says(knob: Knob) -> None:
    """The mean over the photographs moves the right way by more than the step."""
    means = []
    for fields in (knob.less, knob.more):
        results = [(local().make(knob.endpoint, source, **fields).image, source) for source in sources()]
        means.append(sum(knob.measure(result, source) for result, source in results) / len(results))

    less, more = means
    moved = more - less if knob.measure is fidelity else more / less - 1
    assert moved >= knob.step, f"{knob}: {less:.2f} -> {more:.2f}"

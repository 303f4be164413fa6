"""The two endpoints of Clarity's: what their fields become, and what their results look like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import ModelsUnusable
from server.endpoints import ENDPOINTS
from server.errors import InvalidInput
from server.settings import Settings
from server.slot import outcome_of, path_and_weight

CLARITY, CRYSTAL = ENDPOINTS["fal-ai/clarity-upscaler"], ENDPOINTS["clarityai/crystal-upscaler"]
IMAGE = {"image_url": "https://example.com/a.png"}
STORED = {
    "key": "out/ab/x.png",
    "file_name": "x.png",
    "content_type": "image/png",
    "file_size": 3,
    "width": 4,
    "height": 5,
    "seed": 6,
    "timings": {"inference": 1.23456, "denoise": 1.0},
}


def test_clarity_fields_are_translated_once() -> None:
    """fal's words become the pipeline's; the default prompts keep their weights."""
    job = CLARITY.job(CLARITY.parse(IMAGE | {"creativity": 0.5, "resemblance": 0.9, "upscale_factor": 3, "seed": 5}))

    assert job["pipeline"] == "clarity_upscaler" and job["warnings"] == []
    assert job["params"] == {
        "prompt": "masterpiece, best quality, highres",
        "negative_prompt": "(worst quality, low quality, normal quality:2)",
        "scale": 3.0,
        "strength": 0.5,
        "controlnet_conditioning_scale": 0.9,
        "guidance_scale": 4.0,
        "num_inference_steps": 18,
        "seed": 5,
        "check_safety": True,
    }


def test_clarity_seeds_are_drawn_at_admission() -> None:
    """Without a seed each request gets one of its own, which every attempt uses."""
    seeds = {CLARITY.job(CLARITY.parse(IMAGE))["params"]["seed"] for _ in range(20)}

    assert len(seeds) == 20 and all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize(("creativity", "strength", "control"), [(0, 0, 1), (1, 0.145, 0.96), (10, 0.55, 0.6)])
def test_crystal_creativity_is_strength_and_control(creativity: float, strength: float, control: float) -> None:
    """0 is faithful: nothing is redrawn; above, strength rises and control falls. Equal requests are equal jobs."""
    payload = IMAGE | {"creativity": creativity, "scale_factor": 16}
    job = CRYSTAL.job(CRYSTAL.parse(payload))

    assert job["params"] == {
        "scale": 16.0,
        "strength": pytest.approx(strength),
        "controlnet_conditioning_scale": pytest.approx(control),
        "face_restoration": pytest.approx(1 - 0.06 * creativity),
    }
    assert CRYSTAL.job(CRYSTAL.parse(payload)) == job


@pytest.mark.parametrize(
    ("endpoint", "payload", "fault"),
    [
        (CLARITY, {}, ("body", "image_url", "missing")),
        (CLARITY, IMAGE | {"upscale_factor": 4.1}, ("body", "upscale_factor", "less_than_equal")),
        (CLARITY, IMAGE | {"num_inference_steps": 3}, ("body", "num_inference_steps", "greater_than_equal")),
        (CLARITY, IMAGE | {"guidance_scale": 20.5}, ("body", "guidance_scale", "less_than_equal")),
        (CLARITY, IMAGE | {"prompt": "x" * 4_001}, ("body", "prompt", "sequence_too_long")),
        (CLARITY, IMAGE | {"prompt": None}, ("body", "prompt", "string_type")),
        (CLARITY, IMAGE | {"seed": -1}, ("body", "seed", "greater_than_equal")),
        (CRYSTAL, {}, ("body", "image_url", "missing")),
        (CRYSTAL, IMAGE | {"scale_factor": 201}, ("body", "scale_factor", "less_than_equal")),
        (CRYSTAL, IMAGE | {"scale_factor": 0.5}, ("body", "scale_factor", "greater_than_equal")),
        (CRYSTAL, IMAGE | {"creativity": 11}, ("body", "creativity", "less_than_equal")),
    ],
)
def test_faults_have_fals_names(endpoint: Any, payload: dict[str, Any], fault: tuple[Any, ...]) -> None:
    """Each fault says where it is and has the type that fal gives it."""
    with pytest.raises(InvalidInput) as caught:
        endpoint.parse(payload)

    assert [(*item["loc"], item["type"]) for item in caught.value.items] == [fault]


def test_fields_of_the_open_program_are_named_and_accepted() -> None:
    """Clients send them; fal ignores them; so do we, aloud."""
    assert CLARITY.unknown_fields(IMAGE | {"handfix": "disabled", "sharpen": 1}) == ["handfix", "sharpen"]
    assert CRYSTAL.unknown_fields(IMAGE | {"output_format": "png"}) == ["output_format"]


def test_outputs_have_fals_form() -> None:
    """One image with seed and timings; and a list of images."""
    clarity, crystal = CLARITY.output(STORED), CRYSTAL.output(STORED)

    assert clarity["timings"] == {"inference": 1.235, "denoise": 1.0} and clarity["seed"] == 6
    assert CLARITY.output_model.model_validate(clarity).model_dump() == clarity
    assert [image["url"] for image in crystal["images"]] == ["blob:out/ab/x.png"]
    assert CRYSTAL.output_model.model_validate(crystal).model_dump() == crystal


def test_detail_loras_are_named_with_their_weights(tmp_path: Path) -> None:
    """`file` or `file:weight`, several of them; a colon in a name is no weight."""
    settings = Settings(data=tmp_path, clarity_loras="/a/more_details.safetensors:0.5,/b/c:d.safetensors")

    assert [path_and_weight(text) for text in settings.clarity_loras] == [
        (Path("/a/more_details.safetensors"), 0.5),
        (Path("/b/c:d.safetensors"), 1.0),
    ]


def test_a_network_that_cannot_be_read_is_fals_error() -> None:
    """The operator's mistake is a 500 in fal's form that names folder and file, and no path of the server."""
    outcome = outcome_of(ModelsUnusable("The file in the weights' folder `upscaler` cannot be used: x.pth is damaged"))

    assert outcome is not None and outcome.status == 500
    assert outcome.body["detail"][0]["type"] == "internal_server_error"
    assert "`upscaler` cannot be used: x.pth" in outcome.body["detail"][0]["msg"]

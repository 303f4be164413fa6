"""`fal-ai/flux-vision-upscaler`: what is translated, what is refused, what comes back, and whose terms are accepted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from server.endpoints import ENDPOINTS
from server.errors import InvalidInput
from server.settings import Settings

DATA = Path(__file__).parents[1] / "data"
UPSCALER = ENDPOINTS["fal-ai/flux-vision-upscaler"]
IMAGE = {"image_url": "https://example.com/a.png"}


def test_fields_are_translated_once() -> None:
    """fal's words become the pipeline's."""
    fields = {"upscale_factor": 3, "creativity": 0.4, "guidance": 2, "steps": 8, "seed": 5}
    fields["enable_safety_checker"] = False
    job = UPSCALER.job(UPSCALER.parse(IMAGE | fields))

    assert job["pipeline"] == "flux_vision_upscaler" and job["image"] == IMAGE["image_url"]
    assert job["params"] == {
        "scale": 3.0,
        "strength": 0.4,
        "guidance_scale": 2.0,
        "num_inference_steps": 8,
        "seed": 5,
        "check_safety": False,
    }


def test_a_seed_is_drawn_at_admission() -> None:
    """Without a seed each request gets one of its own, which every attempt uses."""
    seeds = {UPSCALER.job(UPSCALER.parse(IMAGE))["params"]["seed"] for _ in range(20)}

    assert len(seeds) == 20 and all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize(
    ("payload", "fault"),
    [
        ({}, ("body", "image_url", "missing")),
        (IMAGE | {"upscale_factor": 4.1}, ("body", "upscale_factor", "less_than_equal")),
        (IMAGE | {"upscale_factor": 0.9}, ("body", "upscale_factor", "greater_than_equal")),
        (IMAGE | {"creativity": 1.1}, ("body", "creativity", "less_than_equal")),
        (IMAGE | {"guidance": 0.5}, ("body", "guidance", "greater_than_equal")),
        (IMAGE | {"guidance": 5}, ("body", "guidance", "less_than_equal")),
        (IMAGE | {"steps": 3}, ("body", "steps", "greater_than_equal")),
        (IMAGE | {"steps": 51}, ("body", "steps", "less_than_equal")),
        (IMAGE | {"seed": -1}, ("body", "seed", "greater_than_equal")),
        (IMAGE | {"enable_safety_checker": "perhaps"}, ("body", "enable_safety_checker", "bool_parsing")),
    ],
)
def test_faults_have_fals_names(payload: Any, fault: tuple[str, ...]) -> None:
    """Each fault says where it is and has the type that fal gives it."""
    with pytest.raises(InvalidInput) as caught:
        UPSCALER.parse(payload)

    assert [(*item["loc"], item["type"]) for item in caught.value.items] == [fault]


def test_output_is_the_documented_one() -> None:
    """Names, order, types, words and examples equal the API document; nothing is optional."""
    documented = json.loads((DATA / "flux_vision_upscaler_output.json").read_text())
    schema = UPSCALER.output_model.model_json_schema()

    assert list(schema["properties"]) == schema["required"] == [field["name"] for field in documented]
    for field in documented:
        ours = schema["properties"][field["name"]]
        kind = "Image" if ours.get("$ref") == "#/$defs/Image" else ours["type"]
        assert (kind, ours["description"]) == (field["type"], field["description"])
        assert ours.get("examples") == field.get("examples")


def test_output_has_fals_form() -> None:
    """Picture, seed, seconds by stage and the caption."""
    stored = {
        "key": "out/ab/x.png",
        "file_name": "x.png",
        "content_type": "image/png",
        "file_size": 3,
        "width": 4,
        "height": 5,
        "seed": 6,
        "timings": {"denoise": 1.23456, "inference": 2.0},
        "caption": "a wall",
    }

    body = UPSCALER.output(stored)

    assert body["image"]["url"] == "blob:out/ab/x.png" and body["seed"] == 6
    assert body["timings"] == {"denoise": 1.235, "inference": 2.0} and body["caption"] == "a wall"
    assert UPSCALER.output_model.model_validate(body).model_dump() == body
    assert list(UPSCALER.output_model.model_fields) == ["image", "seed", "timings", "caption"]


def test_non_commercial_models_want_their_terms_accepted(tmp_path: Path) -> None:
    """Asking for FLUX.1-dev without accepting its license is refused at start, and the error says how to accept."""
    with pytest.raises(ValidationError, match="UPSCALER_ACCEPT_FLUX1_DEV_LICENSE=true"):
        Settings(data=tmp_path, flux_profile="flux1-dev")

    assert Settings(data=tmp_path).full_flux_profile == "flux2-klein-4b"
    assert Settings(data=tmp_path, accept_flux1_dev_license=True).full_flux_profile == "flux1-dev"
    settings = Settings(data=tmp_path, accept_flux1_dev_license=True, flux_profile="flux2-klein-4b")
    assert settings.full_flux_profile == "flux2-klein-4b"

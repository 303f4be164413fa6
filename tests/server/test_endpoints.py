"""Endpoints are what fal documents, and translate into what the pipelines take."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic_core import PydanticUndefined

from server.endpoints import ENDPOINTS
from server.errors import InvalidInput

DATA = Path(__file__).parents[1] / "data"
UPSCALER = ENDPOINTS["fal-ai/creative-upscaler"]
IMAGE = {"image_url": "https://example.com/a.png"}
JSON_TYPES = {"string": "string", "float": "number", "integer": "integer", "boolean": "boolean"}


def faults(payload: Any) -> list[tuple[Any, ...]]:
    """Where and what is wrong with a payload."""
    with pytest.raises(InvalidInput) as caught:
        UPSCALER.parse(payload)
    return [(*item["loc"], item["type"]) for item in caught.value.items]


@pytest.mark.parametrize("endpoint", ENDPOINTS.values(), ids=list(ENDPOINTS))
def test_input_is_the_documented_one(endpoint: Any) -> None:
    """Names, order, defaults, ranges, options, examples and words equal the API document."""
    documented = json.loads((DATA / f"{endpoint.name.replace('-', '_')}.json").read_text())
    schema = endpoint.input_model.model_json_schema()

    assert list(endpoint.input_model.model_fields) == [field["name"] for field in documented]
    for field in documented:
        ours, described = endpoint.input_model.model_fields[field["name"]], schema["properties"][field["name"]]
        default = None if ours.default is PydanticUndefined else ours.default
        assert ours.is_required() == field["required"], field["name"]
        assert default == field.get("default"), field["name"]
        assert ours.description == field["description"], field["name"]
        assert ours.examples == field.get("examples"), field["name"]
        assert described.get("enum") == field.get("options"), field["name"]
        assert (described.get("minimum"), described.get("maximum")) == (field.get("minimum"), field.get("maximum"))
        if field["type"] in JSON_TYPES:
            kinds = [described.get("type")] + [kind["type"] for kind in described.get("anyOf", [])]
            assert JSON_TYPES[field["type"]] in kinds


def test_what_this_server_adds_to_a_field_stands_beside_fals_words() -> None:
    """Which word an embedding answers to is told where the field is described."""
    properties = UPSCALER.input_model.model_json_schema()["properties"]

    hints = {name: field["x-hint"] for name, field in properties.items() if "x-hint" in field}

    assert hints.keys() == {"base_model_url", "additional_lora_url", "additional_embedding_url"}
    assert "file's name" in hints["additional_embedding_url"] and "'embedding'" in hints["additional_embedding_url"]


def test_fields_are_translated_once() -> None:
    """fal's words become the pipeline's."""
    job = UPSCALER.job(
        UPSCALER.parse(
            IMAGE
            | {"prompt": "an owl,", "creativity": 0.3, "shape_preservation": 2, "seed": 5, "override_size_limits": True}
        )
    )

    assert job["pipeline"] == "creative_upscaler" and job["image"] == IMAGE["image_url"]
    assert job["params"] == {
        "family": "SD_1_5",
        "prompt": "an owl,",
        "prompt_suffix": " high quality, highly detailed, high resolution, sharp",
        "negative_prompt": UPSCALER.input_model.model_fields["negative_prompt"].default,
        "scale": 2.0,
        "strength": 0.3,
        "detail": 1.0,
        "controlnet_conditioning_scale": 2.0,
        "guidance_scale": 7.5,
        "num_inference_steps": 20,
        "seed": 5,
        "allow_large": True,
        "restore": True,
        "check_safety": True,
        "lora_scale": 1.0,
    }
    assert (job["kind"], job["files"]) == ("creative_upscaler SD_1_5", {})


def test_files_of_weights_are_named_by_parameter() -> None:
    """What is fetched, and what each file is called in the pipeline and in fal's words."""
    job = UPSCALER.job(
        UPSCALER.parse(
            IMAGE
            | {
                "model_type": "SDXL",
                "base_model_url": "owner/name",
                "additional_lora_url": "https://x/lora.safetensors",
                "additional_lora_scale": 0.5,
                "additional_embedding_url": "https://x/word.safetensors",
                "skip_ccsr": True,
                "enable_safety_checks": False,
            }
        )
    )

    assert job["files"] == {
        "base_model": "owner/name",
        "lora": "https://x/lora.safetensors",
        "embedding": "https://x/word.safetensors",
    }
    assert {job["fields"][parameter] for parameter in job["files"]} <= set(UPSCALER.input_model.model_fields)
    assert job["kind"] == "creative_upscaler SDXL"
    assert (job["params"]["lora_scale"], job["params"]["restore"], job["params"]["check_safety"]) == (0.5, False, False)


def test_a_seed_is_drawn_at_admission() -> None:
    """Without a seed each request gets one of its own, which every attempt uses."""
    seeds = {UPSCALER.job(UPSCALER.parse(IMAGE))["params"]["seed"] for _ in range(20)}

    assert len(seeds) == 20 and all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize(
    ("payload", "fault"),
    [
        ({}, ("body", "image_url", "missing")),
        (IMAGE | {"scale": 5.1}, ("body", "scale", "less_than_equal")),
        (IMAGE | {"scale": 0.9}, ("body", "scale", "greater_than_equal")),
        (IMAGE | {"creativity": "much"}, ("body", "creativity", "float_parsing")),
        (IMAGE | {"creativity": math.nan}, ("body", "creativity", "finite_number")),
        (IMAGE | {"num_inference_steps": 1.5}, ("body", "num_inference_steps", "int_from_float")),
        (IMAGE | {"num_inference_steps": 0}, ("body", "num_inference_steps", "greater_than_equal")),
        (IMAGE | {"skip_ccsr": "perhaps"}, ("body", "skip_ccsr", "bool_parsing")),
        (IMAGE | {"model_type": "SD_3"}, ("body", "model_type", "literal_error")),
        (IMAGE | {"seed": -1}, ("body", "seed", "greater_than_equal")),
        (IMAGE | {"seed": 2**63}, ("body", "seed", "less_than_equal")),
        (IMAGE | {"prompt": "x" * 4_001}, ("body", "prompt", "sequence_too_long")),
        (IMAGE | {"prompt_suffix": "x" * 4_001}, ("body", "prompt_suffix", "sequence_too_long")),
        (IMAGE | {"negative_prompt": "x" * 4_001}, ("body", "negative_prompt", "sequence_too_long")),
        (IMAGE | {"prompt": "\ud800"}, ("body", "prompt", "string_unicode")),
        ({"image_url": 5}, ("body", "image_url", "string_type")),
        (["image_url"], ("body", "model_attributes_type")),
    ],
)
def test_faults_have_fals_names(payload: Any, fault: tuple[Any, ...]) -> None:
    """Each fault says where it is and has the type that fal gives it."""
    assert faults(payload) == [fault]


def test_several_faults_are_told_at_once() -> None:
    """A caller need not find them one by one."""
    assert len(faults({"scale": 9, "detail": -1, "seed": "x"})) == 4


def test_unknown_fields_are_named_and_accepted() -> None:
    """fal ignores them; so do we, aloud."""
    payload = IMAGE | {"upscale_factor": 2}

    assert UPSCALER.parse(payload).scale == 2
    assert UPSCALER.unknown_fields(payload) == ["upscale_factor"]


def test_output_has_fals_form() -> None:
    """A stored picture becomes fal's Image, and the seed comes back."""
    stored = {
        "key": "out/ab/x.png",
        "file_name": "x.png",
        "content_type": "image/png",
        "file_size": 3,
        "width": 4,
        "height": 5,
        "seed": 6,
    }

    body = UPSCALER.output(stored)

    assert body["image"]["url"] == "blob:out/ab/x.png" and body["seed"] == 6
    assert UPSCALER.output_model.model_validate(body).model_dump() == body

"""The catalogue of published models."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.flux_vision_upscaler import PROFILES, VISION_CAPTIONER
from pipelines.models import FACE_RESTORER, FAMILIES
from server.endpoints import ENDPOINTS
from server.settings import Settings
from weights.catalogue import (
    BY_HAND,
    DEFAULT_FLUX_PROFILE,
    ENDPOINT_PARTS,
    FLUX_PROFILES,
    FLUX_VISION,
    OWN_PARTS,
    PARTS,
    IncompleteSource,
    Part,
    UnknownName,
    choose,
    endpoints_using,
    needs_of,
    parts_for,
)

README = Path(__file__).parents[2] / "README.md"


def row(part: Part) -> str:
    """A part's row in the README."""
    used_by = ", ".join(name.partition("/")[2].removesuffix("-upscaler") for name in endpoints_using(part.folder))
    cells = (
        f"`{part.folder}`",
        f"[{part.repository}](https://huggingface.co/{part.repository})",
        f"{part.size_bytes / 1e9:.2f}",
        part.license + (", gated" if part.gated else ""),
        part.commercial,
        used_by,
    )
    return f"| {' | '.join(cells)} |"


def test_readme_lists_every_model() -> None:
    """The README's table is the catalogue."""
    readme = README.read_text()

    assert not [row(part) for part in PARTS.values() if row(part) not in readme]
    assert all(f"`{name}`" in readme for name in BY_HAND)


def test_endpoints_and_loaders_name_the_same_parts() -> None:
    """What the server, the recipes and the settings call endpoints, parts and profiles is in the catalogue."""
    families = {name for family in FAMILIES.values() for name in (family.folder, family.controlnet)}
    named = {endpoint: set(needs_of(endpoint).all) for endpoint in ENDPOINT_PARTS}

    assert ENDPOINT_PARTS.keys() == ENDPOINTS.keys()
    assert set().union(*named.values()) | set(FLUX_PROFILES["flux1-dev"]) == PARTS.keys()
    assert families | {VISION_CAPTIONER} <= PARTS.keys()
    assert FACE_RESTORER in BY_HAND
    for name, parts in FLUX_PROFILES.items():
        profile = PROFILES[name]
        assert [profile.model, *filter(None, [profile.controlnet])] == list(parts)
        assert profile.vae.partition("/")[0] in parts
    pocket = PROFILES["pocket"]
    assert {pocket.model, pocket.controlnet} <= OWN_PARTS
    assert Settings().full_flux_profile == DEFAULT_FLUX_PROFILE


def test_names_of_endpoints_short_and_long() -> None:
    """An endpoint is known by its id and by its last part, a part by its folder; each part comes once."""
    for name in ("clarityai/crystal-upscaler", "crystal-upscaler"):
        assert [part.folder for part in parts_for([name])] == ["sd15", "vae", "controlnet-tile-sd15", "upscaler"]
    assert [part.folder for part in parts_for(["crystal-upscaler", "vae", "sdxl/vae"])][-1] == "sdxl/vae"
    assert "flux1-dev" not in [part.folder for part in parts_for([])]
    assert parts_for([FLUX_VISION], "flux1-dev")[0].gated
    with pytest.raises(UnknownName, match="no endpoint or part 'crystal'"):
        parts_for(["crystal"])


def test_half_precision_goes_first_and_pickles_last() -> None:
    """Of several spellings the best that is there is taken."""
    part = PARTS["controlnet-tile-sd15"]
    plain = ["config.json", "diffusion_pytorch_model.bin"]
    target = "diffusion_pytorch_model.safetensors"

    assert choose(part, plain)[target] == "diffusion_pytorch_model.bin"
    assert choose(part, [*plain, target])[target] == target
    half = "diffusion_pytorch_model.fp16.safetensors"
    assert choose(part, [*plain, target, half])[target] == half
    with pytest.raises(IncompleteSource, match="diffusion_pytorch_model.fp16.safetensors"):
        choose(part, ["config.json"])


def test_every_model_says_what_it_may_be_used_for() -> None:
    """License, size and whether commercial use is allowed are given for each; gated ones are not for commerce here."""
    for part in PARTS.values():
        assert part.license and part.size_bytes > 10**7
        assert part.commercial.startswith(("yes", "no"))
        assert ("Non-Commercial" in part.license) == part.commercial.startswith("no")

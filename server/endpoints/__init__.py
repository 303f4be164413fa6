"""The endpoints this server has, by fal's id."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.endpoints.clarity_upscaler import CLARITY_UPSCALER
from server.endpoints.creative_upscaler import CREATIVE_UPSCALER
from server.endpoints.crystal_upscaler import CRYSTAL_UPSCALER
from server.endpoints.endpoint import Endpoint, Job
from server.endpoints.flux_vision_upscaler import FLUX_VISION_UPSCALER

ENDPOINTS: Mapping[str, Endpoint[Any]] = {
    endpoint.id: endpoint for endpoint in (CREATIVE_UPSCALER, CLARITY_UPSCALER, CRYSTAL_UPSCALER, FLUX_VISION_UPSCALER)
}

__all__ = ["ENDPOINTS", "Endpoint", "Job"]
